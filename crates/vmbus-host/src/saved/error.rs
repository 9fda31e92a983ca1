//! Why a saved state was refused.

use saved_state::ReadError;
use vmbus_wire::ranges::RangeError;

/// Why bytes are not the state of a bus. Nothing has come of them.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// They are damaged, of something else, from a later version, or not finished.
    #[error(transparent)]
    Stream(#[from] ReadError),
    /// A number, or a text, is not what it may be.
    #[error("chunk {chunk}, record {record}, field {field}: {why}")]
    Field {
        /// Which chunk; the header is 0.
        chunk: u32,
        /// The record's name.
        record: &'static str,
        /// The field's name.
        field: &'static str,
        /// What is wrong.
        why: Misfit,
    },
    /// A record stands where another one should.
    #[error("chunk {chunk} is a record {found}, {left} more {expected} should come")]
    Order {
        /// Which chunk.
        chunk: u32,
        /// What it has.
        found: &'static str,
        /// What should be there.
        expected: &'static str,
        /// How many of them.
        left: u32,
    },
    /// One more than the first record has announced.
    #[error("chunk {chunk} is one record {record} too many")]
    TooMany {
        /// Which chunk.
        chunk: u32,
        /// What it has.
        record: &'static str,
    },
    /// The stream is over, and records that were announced did not come.
    #[error("{left} records {record} are missing")]
    Missing {
        /// What did not come.
        record: &'static str,
        /// How many.
        left: u32,
    },
    /// Each record is right, and together they are no state that a host can be in.
    #[error("the records contradict each other: {what}")]
    Contradiction {
        /// The first contradiction, in words.
        what: String,
    },
}

impl RestoreError {
    /// The chunk that is to blame, where there is one.
    #[must_use]
    pub fn chunk(&self) -> Option<u32> {
        match self {
            Self::Stream(ReadError::Damaged { chunk, .. } | ReadError::Record { chunk, .. })
            | Self::Field { chunk, .. }
            | Self::Order { chunk, .. }
            | Self::TooMany { chunk, .. } => Some(*chunk),
            Self::Stream(_) | Self::Missing { .. } | Self::Contradiction { .. } => None,
        }
    }
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// A number out of range.
    #[error("{found}, not {least} to {most}")]
    Range {
        /// What is there.
        found: u64,
        /// The smallest.
        least: u64,
        /// The largest.
        most: u64,
    },
    /// A number that names nothing there is: a version, a feature, a channel.
    #[error("{found:#x} is unknown")]
    Unknown {
        /// What is there.
        found: u64,
    },
    /// Not behind the one before.
    #[error("{found} does not come behind the last one")]
    Order {
        /// What is there.
        found: u64,
    },
    /// Another record has it.
    #[error("{found:#x} is taken")]
    Taken {
        /// What is there.
        found: u64,
    },
    /// It is there, and another field says that it is not; or it is not there, and should be.
    #[error("contradicts field {other}")]
    Contradiction {
        /// That field.
        other: &'static str,
    },
    /// A number of bytes that it cannot have.
    #[error("{found} bytes")]
    Length {
        /// Bytes.
        found: u64,
    },
    /// The words of a GPADL describe nothing.
    #[error(transparent)]
    Ranges(#[from] RangeError),
    /// A page that is not RAM.
    #[error("page frame {pfn:#x} is not RAM")]
    NotRam {
        /// The page frame.
        pfn: u64,
    },
}
