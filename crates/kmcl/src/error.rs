//! Why a call was refused, and why a channel stopped.

use vmbus_ring::RingError;
use vmbus_wire::packet::{ExtensionError, PacketKind};
use vmbus_wire::pipe::{PipeError, PipePacketType};
use vmbus_wire::status::NtStatus;

use crate::lifecycle::ChannelState;
use crate::packet::Packet;

/// Why a call was refused. [`Error::status`] gives the documented NTSTATUS.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setter was called on a channel that is not Disabled, or on the wrong kind of endpoint
    /// (D-1, D-59): STATUS_INVALID_PARAMETER_1.
    #[error("{function} needs a {needed} channel that is Disabled; this one is {state:?}")]
    NotInitializing {
        /// The function as Rust spells it.
        function: &'static str,
        /// `server`, `client`, or empty for either.
        needed: &'static str,
        /// Where the channel is.
        state: ChannelState,
    },
    /// An argument is out of its range: STATUS_INVALID_PARAMETER_`position`.
    #[error("{name} must not be {value}")]
    Argument {
        /// Which argument, counted from 1 as the documented function has them.
        position: u8,
        /// Its documented name.
        name: &'static str,
        /// The value given.
        value: u64,
    },
    /// Both MMIO amounts are 0: STATUS_INVALID_PARAMETER.
    #[error("one of the two MMIO amounts must not be 0")]
    NoMmio,
    /// The channel is not in a state for this call: STATUS_INVALID_DEVICE_STATE.
    #[error("{function} is not possible while the channel is {state:?}")]
    State {
        /// The function as Rust spells it.
        function: &'static str,
        /// Where the channel is.
        state: ChannelState,
    },
    /// The channel is disabled, closing, or its peer is gone: STATUS_DEVICE_REMOVED.
    #[error("the channel is {state:?}: its peer cannot be reached")]
    Removed {
        /// Where the channel is.
        state: ChannelState,
    },
    /// The packet was cancelled, by a time-out or because the channel went down:
    /// STATUS_CANCELLED.
    #[error("the packet was cancelled")]
    Cancelled,
    /// No room in the ring, and the caller would not wait: STATUS_BUFFER_OVERFLOW.
    #[error("the ring has no room for a packet of {needed} bytes")]
    RingFull {
        /// Bytes of ring the packet needs.
        needed: u32,
    },
    /// The peer's answer is larger than the buffer for it: STATUS_BUFFER_TOO_SMALL.
    #[error("the answer has {needed} bytes, the buffer {given}")]
    BufferTooSmall {
        /// Bytes of the answer.
        needed: u32,
        /// Bytes of the buffer.
        given: u32,
    },
    /// The memory is being brought in; the packet will be delivered again: STATUS_PENDING.
    #[error("the external data is being brought in")]
    Pending,
    /// The pages named are not the guest's RAM: STATUS_INVALID_PARAMETER.
    #[error("{len} bytes at guest physical address {gpa:#x} are not RAM")]
    NotMemory {
        /// Guest physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// More external data than the channel was set up for (D-40): STATUS_INVALID_BUFFER_SIZE.
    #[error("{bytes} bytes of external data, the channel takes {limit}")]
    TooMuchExternalData {
        /// Bytes the packet describes.
        bytes: u64,
        /// The limit of VmbChannelInitSetMaximumExternalData.
        limit: u32,
    },
    /// Write access to pages that are read-only (D-57): STATUS_ACCESS_DENIED.
    #[error("the pages are read-only")]
    ReadOnly,
    /// The GPADL is mapped already (D-57): STATUS_ALREADY_COMMITTED.
    #[error("GPADL {gpadl:#x} is mapped already")]
    AlreadyMapped {
        /// Its handle.
        gpadl: u32,
    },
    /// External data is the guest's to donate; a server endpoint has none (D-41):
    /// STATUS_NOT_SUPPORTED.
    #[error("a server endpoint cannot send external data")]
    ServerExternalData,
    /// The bus refused, with this status.
    #[error("the bus answered {0}")]
    Bus(NtStatus),
    /// The device of a frozen channel still has packets that it has neither completed nor handed over:
    /// STATUS_DEVICE_BUSY.
    #[error("{packets} packets are still running")]
    Running {
        /// How many.
        packets: u32,
    },
    /// The state cannot be said in the version of the format that was asked for: STATUS_UNSUCCESSFUL.
    #[error(transparent)]
    Format(saved_state::WriteError),
    /// The library's state of a packet is not the one that is being restored: length 3, anything else
    /// 2 (D-28): STATUS_INVALID_PARAMETER_`position`.
    #[error("the library's state of a packet is not the one given to the restore callback")]
    ForeignState {
        /// Which argument of VmbPacketRestore.
        position: u8,
    },
    /// The system is out of something: STATUS_INSUFFICIENT_RESOURCES.
    #[error("out of resources: {0}")]
    Resources(&'static str),
}

impl Error {
    /// The documented status.
    #[must_use]
    pub fn status(&self) -> NtStatus {
        match self {
            Self::NotInitializing { .. } => NtStatus::INVALID_PARAMETER_1,
            Self::Argument { position, .. } | Self::ForeignState { position } => {
                NtStatus::invalid_parameter(*position)
            }
            Self::Running { .. } => NtStatus::DEVICE_BUSY,
            Self::Format(_) => NtStatus::UNSUCCESSFUL,
            Self::NoMmio | Self::NotMemory { .. } => NtStatus::INVALID_PARAMETER,
            Self::State { .. } => NtStatus::INVALID_DEVICE_STATE,
            Self::Removed { .. } => NtStatus::DEVICE_REMOVED,
            Self::Cancelled => NtStatus::CANCELLED,
            Self::RingFull { .. } => NtStatus::BUFFER_OVERFLOW,
            Self::BufferTooSmall { .. } => NtStatus::BUFFER_TOO_SMALL,
            Self::Pending => NtStatus::PENDING,
            Self::TooMuchExternalData { .. } => NtStatus::INVALID_BUFFER_SIZE,
            Self::ReadOnly => NtStatus::ACCESS_DENIED,
            Self::AlreadyMapped { .. } => NtStatus::ALREADY_COMMITTED,
            Self::ServerExternalData => NtStatus::NOT_SUPPORTED,
            Self::Bus(status) => *status,
            Self::Resources(_) => NtStatus::INSUFFICIENT_RESOURCES,
        }
    }
}

/// A send that was refused. The packet comes back: nothing of it was sent.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct SendError {
    /// The packet, still the caller's.
    pub packet: Packet,
    /// Why.
    pub error: Error,
}

/// Why a channel stopped reading its ring. Always the peer's doing, but for the last: the channel
/// stays stopped until it is closed and opened again; bus and other channels go on.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The ring holds something that is not a packet.
    #[error("incoming ring: {0}")]
    Incoming(RingError),
    /// The peer's index of the ring we write is impossible.
    #[error("outgoing ring: {0}")]
    Outgoing(RingError),
    /// A packet of a kind that has no meaning on this channel.
    #[error("packet of kind {0:?} has no meaning here")]
    Kind(PacketKind),
    /// External data that is described wrongly.
    #[error("external data: {0}")]
    ExternalData(ExtensionError),
    /// More page frame numbers in one packet than any ring of this size should carry.
    #[error("{words} words of external data, limit {limit}")]
    ExternalDataSize {
        /// Words of 8 bytes in the packet's extension.
        words: u32,
        /// The most that is taken.
        limit: u32,
    },
    /// A pipe's header that does not fit its packet.
    #[error("{0}")]
    Pipe(PipeError),
    /// A pipe packet that is not data: only a reader makes those, in place.
    #[error("pipe packet of type {0:?} from the peer")]
    PipeType(PipePacketType),
    /// The device failed a packet (VmbChannelPacketFail, D-36).
    #[error("the device failed a packet")]
    PacketFailed,
    /// It was stopped when it was saved.
    #[error("the channel was stopped before it was restored")]
    BeforeRestore,
}
