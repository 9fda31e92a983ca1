//! What can go wrong between the two processes.

use std::io;
use std::path::PathBuf;

use vmbus_guest::{GuestBusError, LossReason, RequestError};
use vmbus_memory::MemoryError;
use vmbus_wire::guid::Guid;

use crate::frame::{Kind, MAX_FRAME_SIZE, MAX_HELLO_REGIONS, MAX_REASON_TEXT, TRANSPORT_VERSION};

/// Why a frame was refused. Always the peer's doing, and the end of its connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Not even a header.
    #[error("a frame of {len} bytes, its header alone takes 16")]
    TooShort {
        /// Bytes of the datagram.
        len: usize,
    },
    /// More than any frame has.
    #[error("a frame of more than {MAX_FRAME_SIZE} bytes")]
    TooLong,
    /// There is no such frame.
    #[error("a frame of unknown kind {kind}")]
    Kind {
        /// The number.
        kind: u32,
    },
    /// The header does not fit the datagram.
    #[error("{kind:?} claims {claimed} bytes of payload and has {got}")]
    Length {
        /// The frame.
        kind: Kind,
        /// Bytes that the header speaks of.
        claimed: u32,
        /// Bytes that came.
        got: usize,
    },
    /// The payload is shorter than its structure.
    #[error("{kind:?} has a payload of {len} bytes, too few")]
    PayloadTooShort {
        /// The frame.
        kind: Kind,
        /// Bytes that came.
        len: usize,
    },
    /// A greeting in another tongue.
    #[error("the greeting begins with {magic:02x?}: this is no VMBus")]
    Magic {
        /// What stood there.
        magic: [u8; 8],
    },
    /// More than a VMBus message has.
    #[error("a message of {len} bytes, the longest has 240")]
    MessageTooLong {
        /// Bytes that came.
        len: usize,
    },
    /// More descriptors than a frame may carry: the system has dropped some.
    #[error("more descriptors than a frame may carry")]
    DescriptorsCut,
    /// The frame does not carry as many descriptors as it should.
    #[error("{kind:?} carries {got} descriptors, it takes {expected}")]
    Descriptors {
        /// The frame.
        kind: Kind,
        /// How many it should.
        expected: usize,
        /// How many came.
        got: usize,
    },
    /// A guest's memory in no pieces, or in too many.
    #[error("memory in {regions} regions, outside 1..={MAX_HELLO_REGIONS}")]
    Regions {
        /// How many.
        regions: u32,
    },
    /// Not now, or not from this end.
    #[error("{kind:?} while {state}")]
    Unexpected {
        /// The frame.
        kind: Kind,
        /// What the connection was doing.
        state: &'static str,
    },
    /// A status that no hypercall has.
    #[error("post status {status:#x} does not fit 16 bits")]
    Status {
        /// The number.
        status: u32,
    },
    /// A flag that no event page has.
    #[error("event flag {flag} is outside 1..=2047")]
    EventFlag {
        /// The number.
        flag: u32,
    },
    /// An answer that nobody waits for.
    #[error("a post is answered, and none was made")]
    NothingPosted,
    /// A host that goes on with another connection than ours.
    #[error("the host has taken {taken} posts, {made} were made")]
    PostsTaken {
        /// How many it says.
        taken: u64,
        /// How many there are.
        made: u64,
    },
}

/// Why a host does not go on with a guest's connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// It has no saved state of any connection.
    #[error("this host waits for no guest to come back")]
    NotRestoring,
    /// Its saved state is of another connection.
    #[error("the saved state is not of connection {claimed}")]
    OtherConnection {
        /// The guest's.
        claimed: Guid,
    },
    /// The guest comes with memory that has another shape.
    #[error("memory in {claimed} regions, it was saved with {saved}")]
    Regions {
        /// Regions in the state.
        saved: usize,
        /// Regions that it has now.
        claimed: usize,
    },
    /// The guest comes with other memory.
    #[error("region {region} of the memory is another one than was saved")]
    OtherMemory {
        /// Which, counted from 0.
        region: usize,
    },
    /// The connection has gone on since the state was saved.
    #[error("the saved state is of epoch {saved}, the connection is in epoch {claimed}")]
    Epoch {
        /// The state's.
        saved: u64,
        /// The connection's.
        claimed: u64,
    },
    /// The guest has other messages than the state says.
    #[error("{given} messages were given before the state was saved, the guest has {taken}")]
    Messages {
        /// In the state.
        given: u64,
        /// In the guest.
        taken: u64,
    },
    /// The guest has made other posts than the state says.
    #[error(
        "{taken} posts were taken before the state was saved, the guest has made {made} and got {answered} answers"
    )]
    Posts {
        /// In the state.
        taken: u64,
        /// In the guest.
        made: u64,
        /// Answers that the guest has.
        answered: u64,
    },
    /// More doorbells than there can be channels.
    #[error("{announced} doorbells, at most 2047 can be")]
    TooManyDoorbells {
        /// How many are to come.
        announced: u32,
    },
    /// Doorbells that were not spoken of.
    #[error("{came} doorbells, {announced} were to come")]
    DoorbellCount {
        /// How many were to come.
        announced: u32,
        /// How many there would be now.
        came: usize,
    },
    /// A channel cannot have two.
    #[error("two doorbells for event flag {flag}")]
    DoorbellTwice {
        /// The channel's flag.
        flag: u16,
    },
    /// A channel is open, and there is no way to signal it.
    #[error("no doorbell for event flag {flag}, whose channel is open")]
    DoorbellMissing {
        /// The channel's flag.
        flag: u16,
    },
}

impl ResumeError {
    /// What the guest is told, beside the words.
    fn reason(&self) -> Reason {
        match self {
            Self::NotRestoring => Reason::CannotResume,
            Self::OtherConnection { .. } | Self::Regions { .. } | Self::OtherMemory { .. } => {
                Reason::OtherGuest
            }
            Self::Epoch { .. } | Self::Messages { .. } | Self::Posts { .. } => Reason::Stale,
            Self::TooManyDoorbells { .. }
            | Self::DoorbellCount { .. }
            | Self::DoorbellTwice { .. }
            | Self::DoorbellMissing { .. } => Reason::Protocol,
        }
    }
}

/// Why a host will not have a guest, as it says in its refusal.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Reason {
    /// It has one.
    Busy,
    /// Its transport has another version.
    Version,
    /// The memory donated cannot be used.
    Memory,
    /// The guest has broken the rules of the transport.
    Protocol,
    /// The host ends. No other one will go on with the connection.
    Ended,
    /// The guest wants to go on with a connection, and the host has no state of any.
    CannotResume,
    /// The guest wants to go on with a connection, and the host has the state of another one.
    OtherGuest,
    /// The guest wants to go on with a connection, and the host has a state of another moment.
    Stale,
    /// A number that this end does not know.
    Unknown(u32),
}

impl Reason {
    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::Busy => 1,
            Self::Version => 2,
            Self::Memory => 3,
            Self::Protocol => 4,
            Self::Ended => 5,
            Self::CannotResume => 6,
            Self::OtherGuest => 7,
            Self::Stale => 8,
            Self::Unknown(number) => number,
        }
    }

    /// The reason of this number.
    #[must_use]
    pub const fn from_wire(number: u32) -> Self {
        match number {
            1 => Self::Busy,
            2 => Self::Version,
            3 => Self::Memory,
            4 => Self::Protocol,
            5 => Self::Ended,
            6 => Self::CannotResume,
            7 => Self::OtherGuest,
            8 => Self::Stale,
            number => Self::Unknown(number),
        }
    }
}

/// The text of a refusal as it came: at most [`MAX_REASON_TEXT`] bytes, printable.
pub(crate) fn reason_text(bytes: &[u8]) -> String {
    let bytes = bytes.get(..MAX_REASON_TEXT).unwrap_or(bytes);
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control()).collect()
}

/// Why a connection between two processes ended, or never began.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The other process has closed its end, or is gone.
    #[error("the peer has closed the connection")]
    Closed,
    /// The other process sent what it must not.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The other end speaks another version of the transport.
    #[error(
        "the peer speaks version {theirs} of the transport, this end version {TRANSPORT_VERSION}"
    )]
    Version {
        /// The peer's version.
        theirs: u32,
    },
    /// The memory that a guest donates cannot be used.
    #[error("the memory of the guest: {0}")]
    Memory(#[from] MemoryError),
    /// A guest donates more memory than it may.
    #[error("the guest donates {bytes:#x} bytes of memory, {limit:#x} are the bound")]
    TooMuchMemory {
        /// Bytes donated.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// A descriptor that is to be rung is no eventfd, or would block.
    #[error("{what} is not a non-blocking eventfd")]
    NotAnEvent {
        /// What it was to be.
        what: &'static str,
    },
    /// What is to hold the epoch of the connection is no file in memory.
    #[error("the epoch is not in a file in memory")]
    NotAnEpoch,
    /// The host does not go on with the guest's connection.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// The host went away, and no other one has gone on with the connection.
    #[error("no host has gone on with the connection within {milliseconds} ms")]
    NobodyResumes {
        /// How long was waited.
        milliseconds: u128,
    },
    /// The host will not have this guest.
    #[error("the host refuses: {text}")]
    Refused {
        /// Why.
        reason: Reason,
        /// The host's own words.
        text: String,
    },
    /// The other end took too long to introduce itself.
    #[error("no greeting within {milliseconds} ms")]
    HandshakeTimeout {
        /// How long was waited.
        milliseconds: u128,
    },
    /// As many frames wait for the peer as may.
    #[error("{frames} frames wait for the peer, which does not read")]
    NotReading {
        /// How many.
        frames: usize,
    },
    /// The VMBus connection is over.
    #[error("VMBus: {0}")]
    Bus(#[from] LossReason),
    /// The system refuses.
    #[error("{call}: {source}")]
    System {
        /// The call.
        call: &'static str,
        /// What it answered.
        source: io::Error,
    },
}

impl ConnectionError {
    pub(crate) fn system<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> Self {
        move |error| Self::System { call, source: error.into() }
    }

    /// What a host says to the guest about it, if anything.
    pub(crate) fn reason(&self) -> Option<Reason> {
        match self {
            Self::Version { .. } => Some(Reason::Version),
            Self::Memory(_) | Self::TooMuchMemory { .. } => Some(Reason::Memory),
            Self::Frame(_)
            | Self::NotAnEvent { .. }
            | Self::HandshakeTimeout { .. }
            | Self::NotReading { .. } => Some(Reason::Protocol),
            Self::Resume(error) => Some(error.reason()),
            Self::NotAnEpoch
            | Self::NobodyResumes { .. }
            | Self::Closed
            | Self::Refused { .. }
            | Self::Bus(_)
            | Self::System { .. } => None,
        }
    }
}

/// Why a host cannot have its socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// A Unix socket's address has 107 bytes.
    #[error("the socket path {path:?} has {len} bytes, 107 are the limit")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// A server is there, and answers.
    #[error("{path:?} is being served by another process")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something is there that is no socket. It is left alone.
    #[error("{path:?} exists and is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("cannot serve on {path:?}: {call}: {source}")]
    System {
        /// The path.
        path: PathBuf,
        /// The call.
        call: &'static str,
        /// What it answered.
        source: io::Error,
    },
}

/// Why a guest could not connect.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody serves there.
    #[error("no server on {path:?}")]
    NoServer {
        /// The path.
        path: PathBuf,
    },
    /// A Unix socket's address has 107 bytes.
    #[error("the socket path {path:?} has {len} bytes, 107 are the limit")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Somebody serves there, and it did not come to a connection.
    #[error("{path:?}: {source}")]
    Connection {
        /// The path.
        path: PathBuf,
        /// What went wrong.
        source: ConnectionError,
    },
    /// No memory to donate.
    #[error("cannot make {bytes:#x} bytes of memory: {source}")]
    Memory {
        /// How much was wanted.
        bytes: u64,
        /// Why not.
        source: MemoryError,
    },
    /// The guest's configuration makes no sense.
    #[error(transparent)]
    Bus(#[from] GuestBusError),
    /// The bus would not make contact.
    #[error(transparent)]
    Contact(#[from] RequestError),
    /// The system refuses.
    #[error("{call}: {source}")]
    System {
        /// The call.
        call: &'static str,
        /// What it answered.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_read_back() {
        for number in 0..10 {
            assert_eq!(Reason::from_wire(number).to_wire(), number);
        }
    }

    #[test]
    fn a_peers_text_is_short_and_printable() {
        assert_eq!(reason_text(b"plain"), "plain");
        assert_eq!(reason_text(b"\x1b[31mred\n\0"), "[31mred");
        assert_eq!(reason_text(&[b'x'; 1000]).len(), MAX_REASON_TEXT);
        assert!(reason_text(&[0xff; 4]).chars().all(|c| c == char::REPLACEMENT_CHARACTER));
    }
}
