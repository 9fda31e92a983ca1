//! Writing a file of several streams.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::io::{self, Write};

use vmbus_wire::guid::Guid;

use crate::contents::{
    ContentsRecord, FIRST_KINDS, LAST_KINDS, StreamEntry, StreamEntryRecord, StreamSumRecord,
};
use crate::error::{ReadError, WriteError};
use crate::header::{HeaderFlags, StreamHeader, StreamInfo};
use crate::kind::StreamKind;
use crate::limits::{MAX_CHUNK_BYTES, MAX_STREAMS};
use crate::save::{Save, SaveStep};
use crate::text::Producer;
use crate::version::FormatVersion;
use crate::writer::{Step, StreamWriter};

/// Bytes of the buffer that streams are stepped with at first; it grows to the largest chunk.
const BUFFER_BYTES: usize = 64 << 10;

type AnyError = Box<dyn Error + Send + Sync>;

/// Why a file was not written. What is in the output is of no use; what was to be saved goes on as if
/// it had not begun.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileWriteError {
    /// What is to be saved cannot be.
    #[error("stream {stream} ({name}): {why}")]
    Stream {
        /// Its place in the file.
        stream: u32,
        /// What it is called.
        name: Box<str>,
        /// What it says.
        #[source]
        why: AnyError,
    },
    /// What is to be saved does not give a stream: a mistake in its [`Save`].
    #[error("stream {stream} ({name}) does not begin as one: {why}")]
    NotAStream {
        /// Its place in the file.
        stream: u32,
        /// What it is called.
        name: Box<str>,
        /// What is wrong with its first chunk.
        why: ReadError,
    },
    /// A step wrote nothing, though it had the room that it asked for: a mistake in its [`Save`].
    #[error("stream {stream} ({name}) makes no progress with {room} bytes of room")]
    Stuck {
        /// Its place in the file.
        stream: u32,
        /// What it is called.
        name: Box<str>,
        /// The room it had.
        room: usize,
    },
    /// Two of those to be saved are the same to a reader.
    #[error("streams {first} and {second} are both {listed}")]
    Twice {
        /// The first of them.
        first: u32,
        /// The second.
        second: u32,
        /// What they are.
        listed: Box<StreamEntry>,
    },
    /// More streams than a file has.
    #[error("{found} streams, at most {most}")]
    TooMany {
        /// How many there are.
        found: usize,
        /// The most.
        most: u32,
    },
    /// The list cannot be written: a name that is too long, or not fit to be shown.
    #[error("the list of streams: {0}")]
    List(#[from] WriteError),
    /// The output failed.
    #[error("the saved state cannot be written: {0}")]
    Output(#[source] io::Error),
}

/// What was written.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Written {
    /// Bytes of the file.
    pub bytes: u64,
    /// Each listed stream, and its bytes.
    pub streams: Vec<(StreamEntry, u64)>,
}

/// A file to be written: everything that is to be saved, first added, then written in one go.
///
/// Beside the list and a buffer of one chunk it holds the header of each stream, which it needs for
/// the list.
pub struct FileWriter<'a> {
    version: FormatVersion,
    producer: Producer,
    streams: Vec<Planned<'a>>,
}

/// A stream to be written.
struct Planned<'a> {
    name: Box<str>,
    index: u32,
    save: Box<dyn AnySave + 'a>,
    /// Its first chunk, once it was asked for.
    header: Box<[u8]>,
}

/// A [`Save`], whatever its error is.
trait AnySave {
    fn any_step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, AnyError>;
}

impl<S: Save> AnySave for S {
    fn any_step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, AnyError> {
        self.step(buffer).map_err(Into::into)
    }
}

impl fmt::Debug for FileWriter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.streams.iter().map(|planned| &planned.name).collect();
        f.debug_struct("FileWriter").field("streams", &names).finish_non_exhaustive()
    }
}

impl<'a> FileWriter<'a> {
    /// A file with nothing in it. `version` is that of its own two streams: the others have theirs.
    #[must_use]
    pub fn new(version: FormatVersion, producer: Producer) -> Self {
        Self { version, producer, streams: Vec::new() }
    }

    /// Adds a stream behind those that were added before. `index` is 0, or which subchannel it is;
    /// `name` says to people what it is.
    ///
    /// A save that is still needed afterwards may be lent: `&mut save` will do.
    pub fn add(&mut self, name: &str, index: u32, save: impl Save + 'a) {
        let save = Box::new(save);
        self.streams.push(Planned { name: name.into(), index, save, header: Box::default() });
    }

    /// Writes the file.
    ///
    /// # Errors
    /// The first [`FileWriteError`].
    pub fn write_to(mut self, out: &mut (impl Write + ?Sized)) -> Result<Written, FileWriteError> {
        let found = self.streams.len();
        if found > MAX_STREAMS as usize {
            return Err(FileWriteError::TooMany { found, most: MAX_STREAMS });
        }
        let entries = self.list()?;
        let mut out = Output { out, buffer: vec![0; BUFFER_BYTES], bytes: 0, last: [0; 4] };
        let mut sums = Vec::with_capacity(entries.len() + 1);
        out.begin_stream();
        self.write_list(&mut out, &entries)?;
        sums.push(out.sum());
        for (planned, stream) in self.streams.iter_mut().zip(1_u32..) {
            out.begin_stream();
            out.write(&planned.header)?;
            out.step_to_end(planned, stream)?;
            sums.push(out.sum());
        }
        out.begin_stream();
        self.write_sums(&mut out, &sums)?;
        let own = out.sum().bytes;
        let bytes = sums.iter().map(|sum| sum.bytes).sum::<u64>() + own;
        let streams = entries.into_iter().zip(sums.iter().skip(1).map(|sum| sum.bytes)).collect();
        Ok(Written { bytes, streams })
    }

    /// Asks each stream for its header, and makes the list of them.
    fn list(&mut self) -> Result<Vec<StreamEntry>, FileWriteError> {
        let mut entries = Vec::with_capacity(self.streams.len());
        let mut seen = BTreeMap::new();
        for (planned, stream) in self.streams.iter_mut().zip(1_u32..) {
            let header = planned.take_header(stream)?;
            let entry = StreamEntry::of(&header.info, planned.index, &planned.name);
            if let Some(first) = seen.insert(entry.identity(), stream) {
                let listed = Box::new(entry);
                return Err(FileWriteError::Twice { first, second: stream, listed });
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    fn info(&self) -> StreamInfo {
        StreamInfo {
            stream: StreamKind::CONTENTS,
            flags: HeaderFlags::default(),
            interface_type: Guid::ZERO,
            interface_instance: Guid::ZERO,
            producer: self.producer,
            chunks: 0,
            bytes: 0,
            items: u32::try_from(self.streams.len()).unwrap_or(u32::MAX),
        }
    }

    fn write_list(
        &self,
        out: &mut Output<'_, impl Write + ?Sized>,
        entries: &[StreamEntry],
    ) -> Result<(), FileWriteError> {
        let info = self.info();
        let mut writer = StreamWriter::new(self.version, info, FIRST_KINDS)?;
        out.chunk(|room| writer.header(room))?;
        out.chunk(|room| writer.record(&ContentsRecord { streams: info.items }, room))?;
        for entry in entries {
            let record = StreamEntryRecord::from(entry);
            out.chunk(|room| writer.record(&record, room))?;
        }
        out.chunk(|room| writer.end(room))
    }

    fn write_sums(
        &self,
        out: &mut Output<'_, impl Write + ?Sized>,
        sums: &[StreamSumRecord],
    ) -> Result<(), FileWriteError> {
        let mut writer = StreamWriter::new(self.version, self.info(), LAST_KINDS)?;
        out.chunk(|room| writer.header(room))?;
        for sum in sums {
            out.chunk(|room| writer.record(sum, room))?;
        }
        out.chunk(|room| writer.end(room))
    }
}

impl Planned<'_> {
    fn step(&mut self, buffer: &mut [u8], stream: u32) -> Result<SaveStep, FileWriteError> {
        let step = self.save.any_step(buffer);
        step.map_err(|why| FileWriteError::Stream { stream, name: self.name.clone(), why })
    }

    /// Steps the save with just the room that its first chunk takes, and keeps that.
    fn take_header(&mut self, stream: u32) -> Result<StreamHeader, FileWriteError> {
        let needed = self.step(&mut [], stream)?.needed;
        let mut header = vec![0; needed.min(MAX_CHUNK_BYTES as usize)];
        let written = self.step(&mut header, stream)?.written;
        header.truncate(written);
        let read = StreamHeader::read(&header);
        self.header = header.into();
        read.map_err(|why| FileWriteError::NotAStream { stream, name: self.name.clone(), why })
    }
}

/// The output, and what the stream that goes there has come to.
struct Output<'o, W: ?Sized> {
    out: &'o mut W,
    buffer: Vec<u8>,
    bytes: u64,
    /// The last bytes written: a stream ends with its last chunk's checksum.
    last: [u8; 4],
}

impl<W: Write + ?Sized> Output<'_, W> {
    fn begin_stream(&mut self) {
        self.bytes = 0;
        self.last = [0; 4];
    }

    fn sum(&self) -> StreamSumRecord {
        StreamSumRecord { bytes: self.bytes, checksum: u32::from_le_bytes(self.last) }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), FileWriteError> {
        self.out.write_all(bytes).map_err(FileWriteError::Output)?;
        self.bytes += bytes.len() as u64;
        self.last = bytes.last_chunk().copied().unwrap_or(self.last);
        Ok(())
    }

    /// Writes what is at the start of the buffer.
    fn write_buffer(&mut self, bytes: usize) -> Result<(), FileWriteError> {
        let buffer = std::mem::take(&mut self.buffer);
        let written = self.write(buffer.get(..bytes).unwrap_or_default());
        self.buffer = buffer;
        written
    }

    /// Makes sure that a chunk of so many bytes fits.
    fn grow(&mut self, needed: usize) {
        if needed > self.buffer.len() {
            self.buffer.resize(needed.min(MAX_CHUNK_BYTES as usize), 0);
        }
    }

    fn step_to_end(
        &mut self,
        planned: &mut Planned<'_>,
        stream: u32,
    ) -> Result<(), FileWriteError> {
        loop {
            let SaveStep { written, needed, done } = planned.step(&mut self.buffer, stream)?;
            self.write_buffer(written)?;
            if done {
                return Ok(());
            }
            let room = self.buffer.len();
            self.grow(needed);
            if written == 0 && self.buffer.len() == room {
                return Err(FileWriteError::Stuck { stream, name: planned.name.clone(), room });
            }
        }
    }

    fn chunk(
        &mut self,
        mut write: impl FnMut(&mut [u8]) -> Result<Step, WriteError>,
    ) -> Result<(), FileWriteError> {
        loop {
            match write(&mut self.buffer)? {
                Step::Written { bytes } => return self.write_buffer(bytes),
                Step::Needs { bytes } => self.grow(bytes),
            }
        }
    }
}
