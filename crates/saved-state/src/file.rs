//! A file of several streams: a bus, its devices and their channels, saved at one moment.
//!
//! ```text
//! ┌──────────┬──────────┬──────────┬─────┬──────────┐
//! │ contents │ stream 1 │ stream 2 │  …  │ sums     │     each box is a stream: header, records, end
//! └──────────┴──────────┴──────────┴─────┴──────────┘
//! ```
//!
//! The first stream lists the others in order ([`StreamEntry`]); the last one says what each came to.
//! The one lets a reader see what is missing, doubled or in another's place before it uses any of it;
//! the other that all of them are of the same save. Streams are counted from 0, the first one, so that
//! those that are listed begin with 1.
//!
//! A [`FileWriter`] takes whatever is to be saved and writes it all. A [`FileReader`] hands the streams
//! out one after the other, chunk by chunk: nothing but the list is held in memory. [`check`] reads a
//! file from end to end and keeps nothing, for who wants to know that it is whole before a restore
//! begins.

mod reader;
mod writer;

use std::io;

use crate::contents::StreamEntry;
use crate::error::ReadError;
use crate::input::InputError;

pub use reader::{FileReader, StreamInput, check};
pub use writer::{FileWriteError, FileWriter, Written};

/// Why a file is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The source failed.
    #[error("the saved state cannot be read: {0}")]
    Source(#[source] io::Error),
    /// A stream is damaged, or cannot be read here. Chunks and offsets count from its start.
    #[error("stream {stream} ({name}): {why}")]
    Stream {
        /// Which one.
        stream: u32,
        /// What the list calls it.
        name: Box<str>,
        /// What is wrong.
        why: ReadError,
    },
    /// A record of the first or the last stream is not where it belongs.
    #[error("stream {stream} ({name}), chunk {chunk}: a record {found}, where {expected} is due")]
    Order {
        /// Which stream.
        stream: u32,
        /// What it is: `"contents"` or `"sums"`.
        name: &'static str,
        /// Which chunk.
        chunk: u32,
        /// The record that is there.
        found: &'static str,
        /// The one that would be right.
        expected: &'static str,
    },
    /// There are not as many of something as was stated.
    #[error("stream {stream}, record {record}, field {field}: {stated} stated, {counted} there")]
    Count {
        /// The stream in which it is stated.
        stream: u32,
        /// The record.
        record: &'static str,
        /// The field.
        field: &'static str,
        /// What it says.
        stated: u64,
        /// What there is.
        counted: u64,
    },
    /// More streams than a file has.
    #[error("stream 0, record file.contents, field streams: {stated}, at most {most}")]
    TooMany {
        /// What it says.
        stated: u32,
        /// The most.
        most: u32,
    },
    /// Two entries of the list are for the same thing.
    #[error("streams {first} and {second} are both listed as {listed}")]
    Twice {
        /// The first of them.
        first: u32,
        /// The second.
        second: u32,
        /// What they are listed as.
        listed: Box<StreamEntry>,
    },
    /// A stream that is listed is not there, and nothing is in its place.
    #[error("stream {stream} ({}) is missing at byte {offset}: {listed}", listed.name)]
    Missing {
        /// Which one.
        stream: u32,
        /// Where it would begin in the file.
        offset: u64,
        /// What is listed.
        listed: Box<StreamEntry>,
    },
    /// A stream has another one's place.
    #[error(
        "stream {stream} ({}) at byte {offset} is not as listed: its header has another {field}; \
         it is {found}, listed is {listed}{}",
        listed.name,
        Elsewhere(*elsewhere)
    )]
    NotAsListed {
        /// Which one is due.
        stream: u32,
        /// Where it begins in the file.
        offset: u64,
        /// The first field of the entry that differs.
        field: &'static str,
        /// What its header says.
        found: Box<StreamEntry>,
        /// What is listed.
        listed: Box<StreamEntry>,
        /// The first entry that a stream with this header would fit.
        elsewhere: Option<u32>,
    },
    /// A stream more than listed.
    #[error("a stream that is not listed at byte {offset}, after {streams} that are: {found}")]
    Extra {
        /// Streams listed.
        streams: u32,
        /// Where it begins in the file.
        offset: u64,
        /// What its header says.
        found: Box<StreamEntry>,
    },
    /// A stream is not the one that was saved with the others.
    #[error("stream {stream} ({name}) has {field} {found}, saved with the others was {stated}")]
    Exchanged {
        /// Which one.
        stream: u32,
        /// What the list calls it.
        name: Box<str>,
        /// What differs: `"bytes"` or `"checksum"`, fields of `file.sum`.
        field: &'static str,
        /// What was read.
        found: u64,
        /// What the last stream says.
        stated: u64,
    },
    /// The file was over before.
    #[error("bytes after the last stream, at byte {offset}")]
    AfterEnd {
        /// Where.
        offset: u64,
    },
    /// There was an error before, and there is no way on behind it.
    #[error("the file is not read on after an error")]
    AfterError,
}

struct Elsewhere(Option<u32>);

impl std::fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |stream| write!(f, "; it would fit as stream {stream}"))
    }
}

impl FileError {
    /// An error of a file's stream.
    pub(crate) fn of_stream(stream: u32, name: &str, error: InputError) -> Self {
        match error {
            InputError::Source(error) => Self::Source(error),
            InputError::Stream(why) => Self::Stream { stream, name: name.into(), why },
        }
    }
}
