//! What can go wrong, apart from what guests and programs do to each other.

use std::io;
use std::path::PathBuf;

/// Why there is no socket for programs of the host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The address of a Unix socket has no room for it, with a port behind it.
    #[error("{path:?} has {len} bytes, 96 are the most for a socket and its ports")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its bytes.
        len: usize,
    },
    /// Something else is there.
    #[error("{path:?} is there and no socket: it is left alone")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A process listens there.
    #[error("{path:?}: another process listens there")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("{path:?}: {call}: {source}")]
    System {
        /// The path.
        path: PathBuf,
        /// The system call.
        call: &'static str,
        /// What it says.
        source: io::Error,
    },
}

/// Why a broker was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// No socket for programs of the host.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The system has no descriptor left.
    #[error("sockets cannot be waited for: {0}")]
    Descriptor(#[source] io::Error),
}

/// Why a broker was not frozen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// It is frozen.
    #[error("the sockets are being saved")]
    Held,
    /// The library refuses.
    #[error("a connection cannot be frozen: {0}")]
    Channel(#[from] kmcl::Error),
}
