//! Reserved channels: messages 18 to 20. A Windows guest that crashes writes its dump through one,
//! without interrupts for data.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::HEADER_SIZE;

/// 18 OPEN_RESERVED_CHANNEL, 28 bytes. The answer, OPEN_CHANNEL_RESULT, goes to the VP and SINT named
/// here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct OpenReservedChannel {
    /// At 8: the channel.
    pub channel_id: U32,
    /// At 12: the VP that gets the answer.
    pub target_vp: U32,
    /// At 16: the SINT that gets the answer.
    pub target_sint: U32,
    /// At 20: the GPADL that holds both rings.
    pub ring_gpadl_id: U32,
    /// At 24: pages of the GPADL that form the guest-to-host ring.
    pub downstream_page_offset: U32,
}

/// 19 CLOSE_RESERVED_CHANNEL, 20 bytes. May come while there is no connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct CloseReservedChannel {
    /// At 8: the channel.
    pub channel_id: U32,
    /// At 12: the VP that gets the answer.
    pub target_vp: U32,
    /// At 16: the SINT that gets the answer.
    pub target_sint: U32,
}

/// 20 CLOSE_RESERVED_RESPONSE, 12 bytes: the reserved channel is closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct CloseReservedResponse {
    /// At 8: the channel.
    pub channel_id: U32,
}

const _: () = {
    assert!(HEADER_SIZE + size_of::<OpenReservedChannel>() == 28);
    assert!(HEADER_SIZE + size_of::<CloseReservedChannel>() == 20);
    assert!(HEADER_SIZE + size_of::<CloseReservedResponse>() == 12);
};
