//! Changing what stands: messages 22 and 24 for a channel, 25 and 26 for the connection.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::HEADER_SIZE;
use super::contact::ConnectionState;
use crate::status::NtStatus;

/// 22 MODIFY_CHANNEL, 16 bytes: the guest moves a channel's interrupts to another VP. Answered from
/// 5.3 on, when no further interrupt will go to the former VP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct ModifyChannel {
    /// At 8: the channel.
    pub channel_id: U32,
    /// At 12: the VP to interrupt; [`VP_INDEX_NONE`](super::VP_INDEX_NONE) is not allowed here.
    pub target_vp: U32,
}

/// 24 MODIFY_CHANNEL_RESPONSE, 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct ModifyChannelResponse {
    /// At 8: the channel.
    pub channel_id: U32,
    /// At 12: an NTSTATUS; 0 if the interrupts have moved.
    pub status: U32,
}

impl ModifyChannelResponse {
    /// The answer for this channel.
    #[must_use]
    pub fn new(channel_id: u32, status: NtStatus) -> Self {
        Self { channel_id: channel_id.into(), status: status.0.into() }
    }

    /// Whether the interrupts have moved.
    #[must_use]
    pub const fn nt_status(&self) -> NtStatus {
        NtStatus(self.status.get())
    }
}

/// 25 MODIFY_CONNECTION, 24 bytes: the guest changes its monitor pages. Both addresses, or neither.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct ModifyConnection {
    /// At 8: guest physical address of the page in which the host triggers notifications, or 0.
    pub parent_to_child_monitor_gpa: U64,
    /// At 16: guest physical address of the page in which the guest does, or 0.
    pub child_to_parent_monitor_gpa: U64,
}

/// 26 MODIFY_CONNECTION_RESPONSE, 9 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct ModifyConnectionResponse {
    /// At 8: [`ConnectionState`].
    pub connection_state: u8,
}

impl ModifyConnectionResponse {
    /// The answer.
    #[must_use]
    pub const fn new(state: ConnectionState) -> Self {
        Self { connection_state: state.to_wire() }
    }

    /// Whether the pages have changed.
    #[must_use]
    pub const fn state(&self) -> ConnectionState {
        ConnectionState::from_wire(self.connection_state)
    }
}

const _: () = {
    assert!(HEADER_SIZE + size_of::<ModifyChannel>() == 16);
    assert!(HEADER_SIZE + size_of::<ModifyChannelResponse>() == 16);
    assert!(HEADER_SIZE + size_of::<ModifyConnection>() == 24);
    assert!(HEADER_SIZE + size_of::<ModifyConnectionResponse>() == 9);
};
