//! Why a guest's message did not do what it asks for.

use vmbus_wire::message::{MessageError, MessageType};

use crate::gpadl::GpadlRefusal;

/// What comes of posting a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PostError {
    /// The host takes no messages at this connection. A guest that asks for a version from 5.0 on
    /// falls back to an older one when connection 4 is not there.
    #[error("message posted to connection {connection_id:#x}, where none are taken")]
    UnknownConnection {
        /// The connection id, of which 24 bits count.
        connection_id: u32,
    },
    /// Back-pressure: the guest does not take its own messages; or the bus is held, or being restored.
    /// Nothing was done, and nothing is lost: it may post the same message again later.
    #[error(
        "no message is taken now; {waiting} steps of the host, or messages for the guest, wait"
    )]
    Busy {
        /// Messages, or steps of the host, that wait.
        waiting: usize,
    },
    /// The message was taken, and refused: it is wrong. If the guest waits for an answer, it has
    /// been given one.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl PostError {
    /// The hypercall status that a guest gets from HvPostMessage: 18 (invalid connection id), 19
    /// (insufficient buffers), or 0, since a hypervisor delivers messages without reading them.
    ///
    /// Source: vmbus-wire section 2, "Post status codes".
    #[must_use]
    pub const fn hypercall_status(&self) -> u16 {
        match self {
            Self::UnknownConnection { .. } => 18,
            Self::Busy { .. } => 19,
            Self::Refused(_) => 0,
        }
    }
}

/// Why a message was refused. Always the guest's doing; only this message is affected.
///
/// Source: vmbus-wire section 5.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Not a message that a guest may send now.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// There is no such virtual processor.
    #[error("{message} names VP {vp}, the guest has {vp_count}")]
    Vp {
        /// The message.
        message: MessageType,
        /// The VP index.
        vp: u32,
        /// VPs there are.
        vp_count: u32,
    },
    /// There is no such SINT.
    #[error("{message} names SINT {sint}, outside 0..16")]
    Sint {
        /// The message.
        message: MessageType,
        /// The SINT.
        sint: u32,
    },
    /// One monitor page without the other.
    #[error(
        "{message} names monitor pages {parent_to_child:#x} and {child_to_parent:#x}: one only"
    )]
    MonitorPages {
        /// The message.
        message: MessageType,
        /// Guest physical address.
        parent_to_child: u64,
        /// Guest physical address.
        child_to_parent: u64,
    },
    /// The interrupt page cannot be one.
    #[error("the interrupt page at {gpa:#x} is unaligned or not RAM")]
    InterruptPage {
        /// Guest physical address.
        gpa: u64,
    },
    /// REQUEST_OFFERS came before on this connection.
    #[error("offers requested for the second time")]
    OffersRequestedTwice,
    /// The guest knows no channel of this id.
    #[error("{message} for channel {channel_id}, which the guest does not have")]
    UnknownChannel {
        /// The message.
        message: MessageType,
        /// The channel id.
        channel_id: u32,
    },
    /// The channel is not in a state for this.
    #[error("{message} for channel {channel_id}, which is {state}")]
    ChannelState {
        /// The message.
        message: MessageType,
        /// The channel id.
        channel_id: u32,
        /// What state it is in.
        state: &'static str,
    },
    /// Something about a GPADL.
    #[error("{message} for GPADL {gpadl:#x}: {reason}")]
    Gpadl {
        /// The message.
        message: MessageType,
        /// The GPADL's id.
        gpadl: u32,
        /// What is wrong.
        reason: GpadlRefusal,
    },
    /// The rings cannot lie where the guest says.
    #[error("channel {channel_id} cannot have its rings in GPADL {gpadl:#x}: {reason}")]
    Ring {
        /// The channel id.
        channel_id: u32,
        /// The GPADL's id.
        gpadl: u32,
        /// What is wrong.
        reason: RingRefusal,
    },
    /// The guest's choice of event flag or connection cannot be.
    #[error(
        "channel {channel_id} cannot signal by connection {connection_id:#x} and flag {event_flag}"
    )]
    SignalParameters {
        /// The channel id.
        channel_id: u32,
        /// The connection by which the guest would signal.
        connection_id: u32,
        /// The event flag by which the host would.
        event_flag: u16,
    },
    /// More hvsock connect requests than may wait for an answer.
    #[error("{count} hvsock connect requests are unanswered, the limit")]
    TooManyHvsockRequests {
        /// How many.
        count: usize,
    },
    /// PAUSE of a paused connection, or RESUME of one that is not.
    #[error("{message} while the connection is {}", if *paused { "paused" } else { "not paused" })]
    Paused {
        /// The message.
        message: MessageType,
        /// Whether the connection is paused.
        paused: bool,
    },
    /// MODIFY_CHANNEL before the last one was answered, under a version that answers.
    #[error("channel {channel_id} is being modified")]
    ModifyTwice {
        /// The channel id.
        channel_id: u32,
    },
    /// UNLOAD during an UNLOAD.
    #[error("UNLOAD while the last one is in progress")]
    UnloadTwice,
}

/// Why rings cannot lie in a GPADL.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RingRefusal {
    /// There is no such GPADL, or it is not usable.
    #[error(transparent)]
    Gpadl(#[from] GpadlRefusal),
    /// More than one range.
    #[error("it has {ranges} ranges, a ring takes one")]
    Ranges {
        /// Ranges of the GPADL.
        ranges: usize,
    },
    /// Not whole pages.
    #[error("it covers {byte_count} bytes from byte {byte_offset} on, no whole pages")]
    Unaligned {
        /// Bytes of its range.
        byte_count: u32,
        /// Where in the first page it starts.
        byte_offset: u32,
    },
    /// One of the rings would have no data page.
    #[error("the second ring starts at page {offset} of {pages}, each ring takes two pages")]
    Split {
        /// Where the second ring starts.
        offset: u32,
        /// Pages of the GPADL.
        pages: usize,
    },
}

/// Why a signal of the guest reached nobody.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SignalError {
    /// No channel listens to this connection.
    #[error("signal to connection {connection_id:#x}, to which no channel listens")]
    UnknownConnection {
        /// The connection id.
        connection_id: u32,
    },
    /// Connections of VMBus have flag 0 only.
    #[error("signal by flag {flag}, there is only flag 0")]
    UnknownFlag {
        /// The flag number.
        flag: u16,
    },
}

impl SignalError {
    /// The hypercall status that a guest gets from HvSignalEvent: 18 (invalid connection id) or 5
    /// (invalid parameter).
    #[must_use]
    pub const fn hypercall_status(&self) -> u16 {
        match self {
            Self::UnknownConnection { .. } => 18,
            Self::UnknownFlag { .. } => 5,
        }
    }
}
