//! Why a request, or the whole client, failed.

use std::fmt;
use std::time::Duration;

use kmcl::{ChannelError, NtStatus};
use rustix::io::Errno;
use vmbus_memory::MemoryError;
use vstor_wire::packet::Operation;
use vstor_wire::scsi::cdb::EncodeError;
use vstor_wire::scsi::sense::SenseData;
use vstor_wire::srb::{ScsiAddress, ScsiStatus, SrbStatus};

use crate::handshake::HandshakeError;

/// Why a request, or the whole client, failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device refused or failed the command.
    #[error(transparent)]
    Scsi(#[from] ScsiError),
    /// The server's answer is not what the protocol allows. Always the server's doing.
    #[error("the server broke the protocol: {0}")]
    Answer(#[from] AnswerError),
    /// The initialisation failed.
    #[error("initialisation of the storage channel: {0}")]
    Handshake(#[from] HandshakeError),
    /// The server refused something other than an SRB.
    #[error("the server answered {operation:?} with {status}")]
    Refused {
        /// What was asked for.
        operation: Operation,
        /// The server's status.
        status: NtStatus,
    },
    /// The server has closed the channel, or is gone. All requests have ended.
    #[error("the server has closed the channel, or is gone")]
    Disconnected,
    /// The channel could not be connected.
    #[error("the channel cannot be connected: {0}")]
    Connect(NtStatus),
    /// The rings hold something that cannot be. Always the server's doing; all requests have ended.
    #[error("the server broke the channel: {0}")]
    Channel(#[from] ChannelError),
    /// Nothing was heard for this long. The request is still in flight.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// A success that moved fewer bytes than was asked for, where all of them are needed.
    #[error("{moved} of {asked} bytes were moved")]
    ShortTransfer {
        /// Bytes the request was for.
        asked: u32,
        /// Bytes that were moved.
        moved: u32,
    },
    /// The answer of a command is too short to be understood.
    #[error("SCSI command {opcode:#04x} gave {got} bytes, needs {needed}")]
    ShortData {
        /// First byte of the command.
        opcode: u8,
        /// Bytes that came.
        got: u32,
        /// Bytes needed.
        needed: u32,
    },
    /// A disk says that its blocks have a size that no disk has.
    #[error("blocks of {0} bytes: not a power of two between 512 and 65536")]
    BlockSize(u32),
    /// The client is still initialising, or has failed.
    #[error("the client is not ready for requests")]
    NotReady,
    /// As many requests are in flight as the queue depth allows.
    #[error("{depth} requests are in flight already")]
    QueueFull {
        /// The queue depth.
        depth: u16,
    },
    /// A request for more bytes than the server transfers at once.
    #[error("a transfer of {asked} bytes, at most {limit} are possible")]
    TransferTooLong {
        /// Bytes the request is for.
        asked: u32,
        /// The server's limit.
        limit: u32,
    },
    /// A request for bytes outside its buffer.
    #[error("bytes {offset}.. ({bytes} of them) are not in a buffer of {buffer}")]
    OutsideBuffer {
        /// First byte.
        offset: u32,
        /// How many.
        bytes: u32,
        /// Bytes of the buffer.
        buffer: u32,
    },
    /// A range of a disk that does not consist of whole blocks, or goes beyond the end.
    #[error(
        "bytes {offset}.. ({bytes} of them) are not whole blocks of a disk of {disk_bytes} bytes in blocks of {block_bytes}"
    )]
    Range {
        /// First byte of the disk.
        offset: u64,
        /// How many.
        bytes: u64,
        /// Size of the disk in bytes.
        disk_bytes: u64,
        /// Bytes of a block.
        block_bytes: u32,
    },
    /// A command that cannot be encoded.
    #[error(transparent)]
    Command(#[from] EncodeError),
    /// The library refused a call.
    #[error(transparent)]
    Library(#[from] kmcl::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The system refused a call.
    #[error("{call}: {errno}")]
    System {
        /// The system call.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
}

/// What a device said about a command that it did not do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ScsiError {
    /// The logical unit.
    pub address: ScsiAddress,
    /// First byte of the command.
    pub opcode: u8,
    /// How the transport fared.
    pub srb_status: SrbStatus,
    /// What the logical unit said.
    pub scsi_status: ScsiStatus,
    /// Why; absent where the device says nothing, or nothing that can be read.
    pub sense: Option<SenseData>,
    /// Bytes that were moved nevertheless.
    pub moved: u32,
}

impl fmt::Display for ScsiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SCSI command {:#04x} on {}: ", self.opcode, self.address)?;
        match self.sense {
            Some(sense) => write!(f, "{sense}"),
            None => write!(f, "{}, {}", self.srb_status, self.scsi_status),
        }
    }
}

impl std::error::Error for ScsiError {}

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AnswerError {
    /// It is shorter than a vstor packet.
    #[error("an answer of {got} bytes, the protocol has {needed}")]
    Length {
        /// Bytes that came.
        got: usize,
        /// Bytes of a packet in the version agreed on.
        needed: usize,
    },
    /// It is a packet, but not an answer.
    #[error("an answer with {operation:?} instead of COMPLETE_IO")]
    Operation {
        /// What it says it is.
        operation: Operation,
    },
    /// It claims to have moved more bytes than there were.
    #[error("an answer claims {claimed} bytes moved of {asked}")]
    Moved {
        /// Bytes it claims.
        claimed: u32,
        /// Bytes the request was for.
        asked: u32,
    },
}
