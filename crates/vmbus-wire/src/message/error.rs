//! Why a control message was refused.

use super::{MAX_MESSAGE_SIZE, MessageType};
use crate::version::Version;

/// Why a control message was refused. Always the peer's doing: report it and drop the message.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// Not even a header.
    #[error("message of {len} bytes, its header alone takes 8")]
    NoHeader {
        /// Bytes of the message.
        len: usize,
    },
    /// More than a message can have.
    #[error("message of {len} bytes, the longest has {MAX_MESSAGE_SIZE}")]
    TooLong {
        /// Bytes of the message.
        len: usize,
    },
    /// There is no such message.
    #[error("unknown message type {message_type:#x}")]
    UnknownType {
        /// The type as found.
        message_type: u32,
    },
    /// The guest sent what only a host sends.
    #[error("{message} came from the guest, but only a host sends it")]
    NotFromGuest {
        /// The message.
        message: MessageType,
    },
    /// The host sent what only a guest sends.
    #[error("{message} came from the host, but only a guest sends it")]
    NotFromHost {
        /// The message.
        message: MessageType,
    },
    /// The message does not exist in the negotiated version, or needs a feature that was not
    /// negotiated.
    #[error("{message} is not part of version {version} with feature flags {features:#x}")]
    NotInVersion {
        /// The message.
        message: MessageType,
        /// The version.
        version: Version,
        /// The bits of the feature flags.
        features: u32,
    },
    /// The message needs a connection, and there is none.
    #[error("{message} while not connected")]
    NotConnected {
        /// The message.
        message: MessageType,
    },
    /// The message is shorter than its structure.
    #[error("{message} of {len} bytes, it takes {needed}")]
    Truncated {
        /// The message.
        message: MessageType,
        /// Bytes of its structure, in the form that the version asks for.
        needed: usize,
        /// Bytes of the message.
        len: usize,
    },
}
