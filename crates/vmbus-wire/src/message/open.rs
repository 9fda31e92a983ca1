//! Opening and closing channels: messages 5 to 7.

use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{HEADER_SIZE, USER_DATA_SIZE};
use crate::status::NtStatus;

/// 5 OPEN_CHANNEL, 148 bytes: the guest opens a channel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct OpenChannel {
    /// At 8: the channel.
    pub channel_id: U32,
    /// At 12: chosen by the guest, returned in the result.
    pub open_id: U32,
    /// At 16: the GPADL that holds both rings.
    pub ring_gpadl_id: U32,
    /// At 20: the VP to interrupt, [`VP_INDEX_NONE`](super::VP_INDEX_NONE) for none; meaningful from
    /// 2.4 on, VP 0 before.
    pub target_vp: U32,
    /// At 24: pages of the GPADL that form the guest-to-host ring. The rest is the host-to-guest ring.
    pub downstream_page_offset: U32,
    /// At 28: bytes that the device's protocol defines.
    pub user_data: [u8; USER_DATA_SIZE],
}

/// 5 OPEN_CHANNEL, 156 bytes: where
/// [`FeatureFlags::has_open_v2`](crate::version::FeatureFlags::has_open_v2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct OpenChannelV2 {
    /// At 8: the shorter form.
    pub open: OpenChannel,
    /// At 148: the connection by which the guest will signal the host; with
    /// [`GUEST_SPECIFIED_SIGNAL_PARAMETERS`](crate::version::FeatureFlags::GUEST_SPECIFIED_SIGNAL_PARAMETERS).
    pub connection_id: U32,
    /// At 152: the event flag by which the host is to signal the guest; with the same feature.
    pub event_flag: U16,
    /// At 154: [`OpenFlags`].
    pub flags: U16,
}

bitflags! {
    /// Flags of the longer form of OPEN_CHANNEL.
    #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
    pub struct OpenFlags: u16 {
        /// Deliver the channel's interrupts elsewhere; with
        /// [`CHANNEL_INTERRUPT_REDIRECTION`](crate::version::FeatureFlags::CHANNEL_INTERRUPT_REDIRECTION).
        const REDIRECT_INTERRUPT = 0x1;
    }
}

impl OpenChannelV2 {
    /// The flags, bits without a name included.
    #[must_use]
    pub const fn open_flags(&self) -> OpenFlags {
        OpenFlags::from_bits_retain(self.flags.get())
    }
}

/// 6 OPEN_CHANNEL_RESULT, 20 bytes: whether the channel is open. Also the answer to
/// OPEN_RESERVED_CHANNEL.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct OpenChannelResult {
    /// At 8: the channel.
    pub channel_id: U32,
    /// At 12: as in the request.
    pub open_id: U32,
    /// At 16: an NTSTATUS; 0 if the channel is open.
    pub status: U32,
}

impl OpenChannelResult {
    /// The answer to the request with this `open_id`.
    #[must_use]
    pub fn new(channel_id: u32, open_id: u32, status: NtStatus) -> Self {
        Self { channel_id: channel_id.into(), open_id: open_id.into(), status: status.0.into() }
    }

    /// The status. Guests take any but [`NtStatus::SUCCESS`] for a failure.
    #[must_use]
    pub const fn nt_status(&self) -> NtStatus {
        NtStatus(self.status.get())
    }
}

/// 7 CLOSE_CHANNEL, 12 bytes: the guest closes a channel. No reply.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct CloseChannel {
    /// At 8: the channel.
    pub channel_id: U32,
}

const _: () = {
    assert!(HEADER_SIZE + size_of::<OpenChannel>() == 148);
    assert!(HEADER_SIZE + size_of::<OpenChannelV2>() == 156);
    assert!(HEADER_SIZE + size_of::<OpenChannelResult>() == 20);
    assert!(HEADER_SIZE + size_of::<CloseChannel>() == 12);
};
