//! What can go wrong, sorted by whose doing it is.

use vmbus_wire::guid::Guid;
use vmbus_wire::message::{ConnectionState, MessageError, MessageType};
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::Version;

use crate::post::PostStatus;

/// Why a message of the host was refused. Always the host's doing: the message is dropped, and what
/// it was about stays as it was.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// Not a message, or not one for guests.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// Nobody asked for it, or the connection is not that far.
    #[error("{kind} came while {state}")]
    Unexpected {
        /// What came.
        kind: MessageType,
        /// What the connection was doing.
        state: &'static str,
    },
    /// A channel number that no channel can have.
    #[error("an offer has channel id {channel_id}, outside 1..=2047")]
    ChannelId {
        /// The number.
        channel_id: u32,
    },
    /// The number of a channel that was not released.
    #[error("channel {channel_id} is offered while it is in use")]
    ChannelInUse {
        /// The number.
        channel_id: u32,
    },
    /// Two live offers that a client could not tell apart.
    #[error(
        "channel {channel_id} offers {instance}, subchannel {subchannel_index}, \
         as channel {existing} does"
    )]
    SameInstance {
        /// The channel offered.
        channel_id: u32,
        /// The channel that stands.
        existing: u32,
        /// The instance of both.
        instance: Guid,
        /// The subchannel index of both.
        subchannel_index: u16,
    },
    /// Nothing of this number is offered.
    #[error("{kind} names channel {channel_id}, which is not offered")]
    UnknownChannel {
        /// What came.
        kind: MessageType,
        /// The number.
        channel_id: u32,
    },
    /// The channel is not waiting for that.
    #[error("{kind} for channel {channel_id}, which is {state}")]
    ChannelState {
        /// What came.
        kind: MessageType,
        /// The channel.
        channel_id: u32,
        /// What it was doing.
        state: &'static str,
    },
    /// The answer to another open.
    #[error(
        "open of channel {channel_id} is answered with open id {got:#x}, asked with {expected:#x}"
    )]
    OpenId {
        /// The channel.
        channel_id: u32,
        /// The id of the open that waits.
        expected: u32,
        /// The id that came.
        got: u32,
    },
    /// A GPADL this guest does not have.
    #[error("{kind} names GPADL {gpadl_id:#x}, which does not exist")]
    UnknownGpadl {
        /// What came.
        kind: MessageType,
        /// The GPADL.
        gpadl_id: u32,
    },
    /// A GPADL of another channel.
    #[error("GPADL {gpadl_id:#x} is answered for channel {got}, and belongs to channel {expected}")]
    GpadlChannel {
        /// The GPADL.
        gpadl_id: u32,
        /// Its channel.
        expected: u32,
        /// The channel that came.
        got: u32,
    },
    /// The GPADL is not waiting for that.
    #[error("{kind} for GPADL {gpadl_id:#x}, which is {state}")]
    GpadlState {
        /// What came.
        kind: MessageType,
        /// The GPADL.
        gpadl_id: u32,
        /// What it was doing.
        state: &'static str,
    },
    /// An answer to something the host has not been given in full.
    #[error("{kind} for GPADL {gpadl_id:#x} with {unsent} of its messages not yet posted")]
    TooEarly {
        /// What came.
        kind: MessageType,
        /// The GPADL.
        gpadl_id: u32,
        /// Messages that wait to be posted.
        unsent: usize,
    },
    /// The connection could not be made, and was given up.
    #[error(transparent)]
    Contact(#[from] ContactError),
    /// No such hvsock request is open.
    #[error("hvsock request {endpoint_id} to {service_id} is answered, and was not made")]
    UnknownHvsock {
        /// The guest's end.
        endpoint_id: Guid,
        /// The host's end.
        service_id: Guid,
    },
}

/// Why the host's answer to INITIATE_CONTACT ends the attempt to connect.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ContactError {
    /// The host refused every version on the list.
    #[error("the host refused every version down to {oldest}")]
    NoCommonVersion {
        /// The last one asked for.
        oldest: Version,
    },
    /// The version fits, and the host failed for another reason.
    #[error("the host takes version {version} and refuses the connection: {connection_state:?}")]
    Refused {
        /// The version asked for.
        version: Version,
        /// Why.
        connection_state: ConnectionState,
    },
    /// The host wants messages where none can be posted.
    #[error("the host wants messages on connection id {connection_id:#x}, outside 1..=0xffffff")]
    ConnectionId {
        /// What it asked for.
        connection_id: u32,
    },
    /// The host grants what nobody asked for.
    #[error("the host grants features {granted:#x}, asked for were {requested:#x}")]
    Features {
        /// The bits asked for.
        requested: u32,
        /// The bits granted.
        granted: u32,
    },
    /// The answer cannot be read.
    #[error("the host's answer: {0}")]
    Answer(#[source] MessageError),
}

/// Why there is no connection any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LossReason {
    /// The connection was never made.
    #[error(transparent)]
    Contact(#[from] ContactError),
    /// The transport says that the host is gone.
    #[error("the host is gone")]
    HostGone,
    /// The host does not take a message.
    #[error("the host refused a message with {status} after {attempts} attempts")]
    PostRefused {
        /// The last answer.
        status: PostStatus,
        /// How often it was asked.
        attempts: u32,
    },
}

impl LossReason {
    /// The nearest NTSTATUS, for client endpoints.
    #[must_use]
    pub fn status(self) -> NtStatus {
        match self {
            Self::Contact(ContactError::NoCommonVersion { .. }) => NtStatus::REVISION_MISMATCH,
            Self::Contact(_) => NtStatus::CONNECTION_REFUSED,
            Self::HostGone | Self::PostRefused { .. } => NtStatus::DEVICE_REMOVED,
        }
    }
}

/// Why a request of this guest's own side was refused. Nothing changes then.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// Not while the connection is like this.
    #[error("not possible while {state}")]
    Connection {
        /// What the connection is doing.
        state: &'static str,
    },
    /// Not in the version, or without the feature, agreed on.
    #[error("{kind} is not part of what was negotiated ({version})")]
    NotNegotiated {
        /// The message it would take.
        kind: MessageType,
        /// The version agreed on.
        version: Version,
    },
    /// No such client endpoint, or it has been unbound.
    #[error("no such client endpoint")]
    UnknownClient,
    /// The client endpoint is not bound to an offer.
    #[error("the client endpoint is not bound")]
    NotBound,
    /// The channel cannot do that now.
    #[error("channel {channel_id} is {state}")]
    ChannelState {
        /// The channel.
        channel_id: u32,
        /// What it is doing.
        state: &'static str,
    },
    /// The ring has no legal shape.
    #[error(
        "a ring of {pages} pages, {outgoing} of them outgoing, needs 2 or more each way and at \
         most {max} in all",
        max = crate::gpadl::MAX_GPADL_PAGES
    )]
    RingShape {
        /// Pages in both directions.
        pages: usize,
        /// Pages of the outgoing ring.
        outgoing: u32,
    },
    /// No GPADL can describe that.
    #[error(
        "range {range}: {byte_count} bytes from byte {byte_offset} of {pages} pages is not a range"
    )]
    Range {
        /// Which range, from 0.
        range: usize,
        /// Its length.
        byte_count: u32,
        /// Its start.
        byte_offset: u32,
        /// The pages given.
        pages: usize,
    },
    /// More than one GPADL can describe.
    #[error(
        "{ranges} ranges in {words} words: a GPADL has 1 range or more, in at most {max} words",
        max = vmbus_wire::message::gpadl::MAX_GPADL_WORDS
    )]
    GpadlSize {
        /// Ranges given.
        ranges: usize,
        /// 64-bit words they take.
        words: usize,
    },
    /// A virtual processor that cannot be interrupted.
    #[error("virtual processor {target_vp:#x} cannot be a target")]
    TargetVp {
        /// What was asked for.
        target_vp: u32,
    },
    /// A bound is reached.
    #[error("{what}: {limit} is the bound")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// An answer without a question.
    #[error("no message waits for a post status")]
    NothingPosted,
}

impl RequestError {
    /// The nearest NTSTATUS, for KMCL.
    #[must_use]
    pub fn status(&self) -> NtStatus {
        match self {
            Self::Connection { .. } => NtStatus::DEVICE_REMOVED,
            Self::NotNegotiated { .. } => NtStatus::NOT_SUPPORTED,
            Self::UnknownClient
            | Self::NotBound
            | Self::ChannelState { .. }
            | Self::NothingPosted => NtStatus::INVALID_DEVICE_STATE,
            Self::RingShape { .. }
            | Self::Range { .. }
            | Self::GpadlSize { .. }
            | Self::TargetVp { .. } => NtStatus::INVALID_PARAMETER,
            Self::Limit { .. } => NtStatus::INSUFFICIENT_RESOURCES,
        }
    }
}
