//! What a peer can do wrong with a ring.

use core::fmt;

use vmbus_wire::packet::PacketError;

/// Which index of a ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Index {
    /// `in`, the writer's.
    Write,
    /// `out`, the reader's.
    Read,
}

impl fmt::Display for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "write index",
            Self::Read => "read index",
        })
    }
}

/// Why a ring is beyond use. Always the peer's doing: stop the channel, and only that. Positions and
/// lengths are bytes of the data area.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// An index lies outside the data area.
    #[error("{index} {value:#x} lies outside the ring's {data_len:#x} bytes")]
    IndexOutOfRange {
        /// Which index.
        index: Index,
        /// What it holds.
        value: u32,
        /// Size of the data area.
        data_len: u32,
    },
    /// An index is not a multiple of 8.
    #[error("{index} {value:#x} is not a multiple of 8")]
    IndexMisaligned {
        /// Which index.
        index: Index,
        /// What it holds.
        value: u32,
    },
    /// An index went back, or past the other one.
    #[error("{index} went from {from:#x} to {to:#x}, past the other index at {other:#x}")]
    IndexPassed {
        /// Which index.
        index: Index,
        /// Where it was.
        from: u32,
        /// Where it is.
        to: u32,
        /// The index we own, as last published.
        other: u32,
    },
    /// A packet's descriptor makes no sense.
    #[error("packet at {at:#x}: {error}")]
    Packet {
        /// Where the packet starts.
        at: u32,
        /// What is wrong with it.
        #[source]
        error: PacketError,
    },
}
