//! Reading a file stream by stream.

use std::collections::BTreeMap;
use std::io::{self, Read};

use crate::chunk;
use crate::contents::{
    ContentsRecord, FIRST_KINDS, LAST_KINDS, STREAM_ENTRY, StreamEntry, StreamEntryRecord,
    StreamSumRecord,
};
use crate::end::EndRecord;
use crate::error::ReadError;
use crate::file::FileError;
use crate::header::StreamHeader;
use crate::input::ChunkInput;
use crate::kind::StreamKind;
use crate::limits::MAX_STREAMS;
use crate::reader::{Kinds, StreamReader};
use crate::record::Record;

/// What the first stream is called.
const FIRST: &str = "contents";
/// What the last stream is called.
const LAST: &str = "sums";

/// Reads a file from its start to its end, each chunk and each field, and says what is in it. `kinds`
/// are those whose fields are checked: [`ALL_KINDS`](crate::inspect::ALL_KINDS), or more.
///
/// For before a restore: a file that passes is whole, and of one save. Whether its state can be
/// restored is for the owners of the streams.
///
/// # Errors
/// The first [`FileError`].
pub fn check(source: impl Read, kinds: Kinds) -> Result<Vec<StreamEntry>, FileError> {
    let mut file = FileReader::new(source)?;
    while let Some(mut stream) = file.next_stream()? {
        let mut reader = StreamReader::new(stream.entry().stream, kinds);
        let mut wrong = Ok(());
        while let Some(mut bytes) = stream.next()? {
            wrong = reader.read(&mut bytes).and_then(|chunk| chunk.map_or(Ok(()), |it| it.check()));
            if wrong.is_err() {
                break;
            }
        }
        wrong.and_then(|()| reader.finish()).map_err(|why| stream.wrong(why))?;
    }
    Ok(file.entries)
}

/// What a stream came to.
#[derive(Clone, Copy, Debug)]
struct Sum {
    bytes: u64,
    checksum: u32,
}

/// A file that is being read: its list, and one stream after the other.
///
/// Its memory is one chunk, as [`ChunkInput`]'s, and the list:
/// [`CONTENTS_BYTES_PER_BYTE`](crate::limits::CONTENTS_BYTES_PER_BYTE).
#[derive(Debug)]
pub struct FileReader<R> {
    input: ChunkInput<R>,
    entries: Vec<StreamEntry>,
    /// Of the streams that were read to their end.
    sums: Vec<Sum>,
    /// Of the listed streams, those that were handed out.
    given: usize,
    progress: Progress,
}

/// How far a file was read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Progress {
    Streams,
    /// To its end, where nothing was wrong.
    Over,
    Failed,
}

impl<R: Read> FileReader<R> {
    /// Reads the list at the start of `source`.
    ///
    /// # Errors
    /// [`FileError`]: the first stream is damaged, or is no list.
    pub fn new(source: R) -> Result<Self, FileError> {
        let mut input = ChunkInput::new(source);
        let entries = read_list(&mut input)?;
        refuse_doubles(&entries)?;
        let mut file =
            Self { input, entries, sums: Vec::new(), given: 0, progress: Progress::Streams };
        file.sum_up();
        Ok(file)
    }

    /// The streams, as listed. The first of them is stream 1.
    #[must_use]
    pub fn entries(&self) -> &[StreamEntry] {
        &self.entries
    }

    /// Goes on to the next stream; `None` after the last one that is listed, once the file has ended
    /// as it should.
    ///
    /// What is left of the stream before is read and dropped. That its chunks are undamaged is checked;
    /// who wants more must read it.
    ///
    /// # Errors
    /// [`FileError`]: the stream is not the one that is listed, or the one before is damaged. After an
    /// error there is no next stream: [`FileError::AfterError`].
    pub fn next_stream(&mut self) -> Result<Option<StreamInput<'_, R>>, FileError> {
        match self.progress {
            Progress::Streams => {}
            Progress::Over => return Ok(None),
            Progress::Failed => return Err(FileError::AfterError),
        }
        // Until it is known that it went well.
        self.progress = Progress::Failed;
        if self.given != 0 {
            self.skip_rest()?;
        }
        let Some(entry) = self.entries.get(self.given).cloned() else {
            self.read_sums()?;
            self.progress = Progress::Over;
            return Ok(None);
        };
        let header = begin_listed(&mut self.input, self.given, &entry, &self.entries)?;
        self.given += 1;
        self.progress = Progress::Streams;
        let header = Box::new(header);
        Ok(Some(StreamInput { file: self, entry, header, position: Position::Before }))
    }

    /// Reads to the end of the file.
    ///
    /// # Errors
    /// As [`Self::next_stream`].
    pub fn finish(mut self) -> Result<(), FileError> {
        while self.next_stream()?.is_some() {}
        Ok(())
    }

    /// Number and name of the stream that was handed out last.
    fn current(&self) -> (u32, &str) {
        let entry = self.given.checked_sub(1).and_then(|at| self.entries.get(at));
        (number(self.given), entry.map_or(FIRST, |entry| &entry.name))
    }

    fn wrong(&self, why: ReadError) -> FileError {
        let (stream, name) = self.current();
        FileError::Stream { stream, name: name.into(), why }
    }

    /// The next chunk of the current stream; `None` after its last.
    fn next_chunk(&mut self) -> Result<bool, FileError> {
        match self.input.next() {
            Ok(Some(_)) => return Ok(true),
            Ok(None) => {}
            Err(error) => {
                let (stream, name) = self.current();
                return Err(FileError::of_stream(stream, name, error));
            }
        }
        if !self.input.is_complete() {
            let (chunks, bytes) = (self.input.chunks(), self.input.bytes());
            return Err(self.wrong(ReadError::Unfinished { chunks, bytes }));
        }
        Ok(false)
    }

    fn skip_rest(&mut self) -> Result<(), FileError> {
        // The chunk that was given last is its owner's to check.
        while self.next_chunk()? {
            let chunk = self.input.chunks().saturating_sub(1);
            let offset = self.input.bytes() - self.input.chunk().len() as u64;
            if let Err(why) = chunk::check_sum(self.input.chunk()) {
                return Err(self.wrong(ReadError::Damaged { chunk, offset, why }));
            }
        }
        self.sum_up();
        Ok(())
    }

    /// Keeps what the stream came to that was read to its end.
    fn sum_up(&mut self) {
        let last = self.input.chunk().last_chunk().copied().unwrap_or_default();
        let sum = Sum { bytes: self.input.bytes(), checksum: u32::from_le_bytes(last) };
        self.sums.push(sum);
    }

    /// Reads the last stream, and holds what it says against what was read.
    fn read_sums(&mut self) -> Result<(), FileError> {
        let stream = number(self.entries.len() + 1);
        self.input.begin_stream();
        let offset = self.input.stream_start();
        let mut reader = StreamReader::new(StreamKind::CONTENTS, LAST_KINDS);
        let mut sums = self.sums.iter().zip(0_usize..);
        let wrong = |why| FileError::Stream { stream, name: LAST.into(), why };
        loop {
            let next = self.input.next();
            let Some(mut bytes) =
                next.map_err(|error| FileError::of_stream(stream, LAST, error))?
            else {
                break;
            };
            if reader.header().is_none()
                && let Ok(header) = StreamHeader::read(bytes)
                && header.info.stream != StreamKind::CONTENTS
            {
                let streams = number(self.entries.len());
                let found = Box::new(StreamEntry::of(&header.info, 0, ""));
                return Err(FileError::Extra { streams, offset, found });
            }
            let Some(chunk) = reader.read(&mut bytes).map_err(wrong)? else { continue };
            let stated: StreamSumRecord = chunk.decode().map_err(wrong)?;
            let Some((sum, at)) = sums.next() else {
                let counted = self.sums.len() as u64;
                return Err(sum_count(stream, counted + 1, counted));
            };
            let entry = at.checked_sub(1).and_then(|at| self.entries.get(at));
            for (field, found, stated) in [
                ("bytes", sum.bytes, stated.bytes),
                ("checksum", u64::from(sum.checksum), u64::from(stated.checksum)),
            ] {
                if found != stated {
                    let name = entry.map_or(FIRST, |entry| &entry.name).into();
                    let stream = number(at);
                    return Err(FileError::Exchanged { stream, name, field, found, stated });
                }
            }
        }
        reader.finish().map_err(wrong)?;
        if let Some((_, stated)) = sums.next() {
            return Err(sum_count(stream, stated as u64, self.sums.len() as u64));
        }
        self.refuse_more()
    }

    /// Nothing comes after the last stream.
    fn refuse_more(&mut self) -> Result<(), FileError> {
        self.input.begin_stream();
        let offset = self.input.stream_start();
        match self.input.next() {
            Ok(None) => Ok(()),
            Ok(Some(_)) | Err(crate::input::InputError::Stream(_)) => {
                Err(FileError::AfterEnd { offset })
            }
            Err(crate::input::InputError::Source(error)) => Err(FileError::Source(error)),
        }
    }
}

/// There is a sum for each stream.
fn sum_count(stream: u32, stated: u64, counted: u64) -> FileError {
    let record = StreamSumRecord::KIND.name;
    FileError::Count { stream, record, field: "records", stated, counted }
}

/// At most [`MAX_STREAMS`] and two.
fn number(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

/// Reads the header of the stream that is listed at `at`.
fn begin_listed<R: Read>(
    input: &mut ChunkInput<R>,
    at: usize,
    entry: &StreamEntry,
    entries: &[StreamEntry],
) -> Result<StreamHeader, FileError> {
    let stream = number(at + 1);
    input.begin_stream();
    let offset = input.stream_start();
    let missing = || FileError::Missing { stream, offset, listed: Box::new(entry.clone()) };
    let wrong = |why| FileError::Stream { stream, name: entry.name.clone(), why };
    let next = input.next().map_err(|error| FileError::of_stream(stream, &entry.name, error))?;
    let header = StreamHeader::read(next.ok_or_else(missing)?).map_err(wrong)?;
    let Some(field) = entry.differs(&header.info) else { return Ok(header) };
    if header.info.stream == StreamKind::CONTENTS {
        // The last one: everything from here on is missing.
        return Err(missing());
    }
    let fits = entries.iter().position(|other| other.differs(&header.info).is_none());
    Err(FileError::NotAsListed {
        stream,
        offset,
        field,
        found: Box::new(StreamEntry::of(&header.info, 0, "")),
        listed: Box::new(entry.clone()),
        elsewhere: fits.map(|at| number(at + 1)),
    })
}

fn read_list<R: Read>(input: &mut ChunkInput<R>) -> Result<Vec<StreamEntry>, FileError> {
    let mut reader = StreamReader::new(StreamKind::CONTENTS, FIRST_KINDS);
    let mut stated = None;
    let mut entries = Vec::new();
    let wrong = |why| FileError::Stream { stream: 0, name: FIRST.into(), why };
    loop {
        let next = input.next().map_err(|error| FileError::of_stream(0, FIRST, error))?;
        let Some(mut bytes) = next else { break };
        let Some(chunk) = reader.read(&mut bytes).map_err(wrong)? else { continue };
        let is_entry = chunk.kind() == STREAM_ENTRY;
        if is_entry == stated.is_none() {
            let expected =
                if is_entry { ContentsRecord::KIND.name } else { StreamEntryRecord::KIND.name };
            let (chunk, found) = (chunk.sequence(), chunk.info().name);
            return Err(FileError::Order { stream: 0, name: FIRST, chunk, found, expected });
        }
        if is_entry {
            let record: StreamEntryRecord = chunk.decode().map_err(wrong)?;
            if entries.len() >= MAX_STREAMS as usize {
                return Err(FileError::TooMany { stated: MAX_STREAMS + 1, most: MAX_STREAMS });
            }
            entries.push(record.into());
        } else {
            let record: ContentsRecord = chunk.decode().map_err(wrong)?;
            if record.streams > MAX_STREAMS {
                return Err(FileError::TooMany { stated: record.streams, most: MAX_STREAMS });
            }
            stated = Some(record.streams);
        }
    }
    reader.finish().map_err(wrong)?;
    let Some(stated) = stated else {
        let (found, expected) = (EndRecord::KIND.name, ContentsRecord::KIND.name);
        return Err(FileError::Order { stream: 0, name: FIRST, chunk: 1, found, expected });
    };
    let (stated, counted) = (u64::from(stated), entries.len() as u64);
    if stated != counted {
        let (record, field) = (ContentsRecord::KIND.name, "streams");
        return Err(FileError::Count { stream: 0, record, field, stated, counted });
    }
    Ok(entries)
}

fn refuse_doubles(entries: &[StreamEntry]) -> Result<(), FileError> {
    let mut seen = BTreeMap::new();
    for (entry, at) in entries.iter().zip(1_usize..) {
        if let Some(first) = seen.insert(entry.identity(), at) {
            let (first, second) = (number(first), number(at));
            return Err(FileError::Twice { first, second, listed: Box::new(entry.clone()) });
        }
    }
    Ok(())
}

/// How much of a stream was handed out.
#[derive(Clone, Copy, Debug)]
enum Position {
    /// Nothing: its header is the current chunk.
    Before,
    /// So many bytes of the current chunk, the last one included.
    Within(usize),
}

/// One stream of a file: chunk by chunk, or, as a [`Read`], byte by byte. It ends where the stream does.
#[derive(Debug)]
pub struct StreamInput<'a, R> {
    file: &'a mut FileReader<R>,
    entry: StreamEntry,
    header: Box<StreamHeader>,
    position: Position,
}

impl<R: Read> StreamInput<'_, R> {
    /// Its place in the file. The first that is listed is 1.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.file.current().0
    }

    /// Where it begins in the file, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.file.input.stream_start()
    }

    /// What is listed. Its header agrees.
    #[must_use]
    pub fn entry(&self) -> &StreamEntry {
        &self.entry
    }

    /// What its first chunk says.
    #[must_use]
    pub fn header(&self) -> &StreamHeader {
        &self.header
    }

    /// The next chunk, all of it, the header first; `None` after the last.
    ///
    /// # Errors
    /// [`FileError::Source`] and [`FileError::Stream`].
    #[expect(clippy::should_implement_trait, reason = "an iterator cannot lend what it gives")]
    pub fn next(&mut self) -> Result<Option<&[u8]>, FileError> {
        if !matches!(self.position, Position::Before) && !self.file.next_chunk()? {
            return Ok(None);
        }
        let chunk = self.file.input.chunk();
        self.position = Position::Within(chunk.len());
        Ok(Some(chunk))
    }

    /// What its owner found wrong, as an error of the file.
    #[must_use]
    pub fn wrong(&self, why: ReadError) -> FileError {
        self.file.wrong(why)
    }
}

/// For whoever takes a stream as a reader. A [`FileError`] is inside of the [`io::Error`].
impl<R: Read> Read for StreamInput<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let taken = match self.position {
            Position::Before => 0,
            Position::Within(taken) => taken,
        };
        let mut rest = self.file.input.chunk().get(taken..).unwrap_or_default();
        let mut taken = taken;
        if rest.is_empty() {
            let more = self.file.next_chunk().map_err(|error| match error {
                FileError::Source(error) => error,
                error => io::Error::new(io::ErrorKind::InvalidData, error),
            })?;
            if !more {
                return Ok(0);
            }
            (rest, taken) = (self.file.input.chunk(), 0);
        }
        let bytes = rest.len().min(buffer.len());
        if let (Some(room), Some(from)) = (buffer.get_mut(..bytes), rest.get(..bytes)) {
            room.copy_from_slice(from);
        }
        self.position = Position::Within(taken + bytes);
        Ok(bytes)
    }
}
