//! What is where in a file of guest memory, and with which checksums: the stream of kind
//! [`StreamKind::MEMORY`].
//!
//! It comes from outside, as the file does. All of it is checked before memory is made or the file is
//! opened; the file then is held against it.

use std::io::Read;

use kmcl::Guid;
use saved_state::input::{ChunkInput, InputError};
use saved_state::memory::{
    KINDS, MAX_PARTS_PER_RECORD, MAX_REGIONS, MemoryFileRecord, MemoryForm, MemoryPartsRecord,
    MemoryRegionRecord, ROW_BYTES,
};
use saved_state::text::Producer;
use saved_state::writer::Step;
use saved_state::{
    FormatVersion, HeaderFlags, ReadError, Record, Save, SaveStep, StreamInfo, StreamKind,
    StreamReader, StreamWriter, WriteError,
};

use super::{LEAST, MOST, Placed, UNIT};

/// Bytes of each part of memory: what is checked, compressed and loaded as one. A page of huge pages is
/// a part.
pub const PART_BYTES: u64 = UNIT;

/// Most bytes of a compressed part: what Zstandard makes of bytes that it cannot compress.
pub(super) const MAX_FRAME_BYTES: u32 = (PART_BYTES + (PART_BYTES >> 8)) as u32;

/// Bytes of a page: what is left out where it is zeros.
pub(super) const PAGE: usize = 4096;

/// In which form memory is kept in its file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// As it is, at its own offsets; pages of zeros are holes.
    Plain,
    /// A Zstandard frame for each part that is not all zeros.
    Zstd,
}

/// A part of memory, as it is in the file.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Part {
    /// Where in the file.
    pub(super) at: u64,
    /// Bytes in the file: of the frame, or of the pages that are not zeros. 0: all of it is zeros.
    pub(super) length: u32,
    /// CRC-32C of its bytes in memory; 0 where it is all zeros.
    pub(super) checksum: u32,
}

/// What is where in a file of guest memory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MemoryIndex {
    pub(super) form: Form,
    pub(super) regions: Vec<Placed>,
    /// Never changed in number once made: memory has so many.
    pub(super) parts: Vec<Part>,
}

/// Why an index of memory is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The stream cannot be read, or is damaged.
    #[error(transparent)]
    Input(#[from] InputError),
    /// It is another stream, or is damaged.
    #[error(transparent)]
    Stream(#[from] ReadError),
    /// Records are missing, or not in their order.
    #[error("record {found} of memory comes where {expected} is expected")]
    Order {
        /// The record's name.
        found: &'static str,
        /// What could come there.
        expected: &'static str,
    },
    /// There is as much memory as no guest has.
    #[error(
        "{bytes} bytes of memory: no guest has that; it is a multiple of 2 MiB, at least {LEAST} and \
         at most {MOST}"
    )]
    MemoryBytes {
        /// What is stated.
        bytes: u64,
    },
    /// The parts have another size than this version's.
    #[error("parts of {found} bytes: this version reads parts of {expected}")]
    PartBytes {
        /// What is stated.
        found: u64,
        /// What it would have to be.
        expected: u64,
    },
    /// The number of regions is not the one stated, or none that a memory has.
    #[error("{found} regions of memory: {expected} are stated, at most {most} are possible")]
    Regions {
        /// What is there.
        found: u32,
        /// What is stated.
        expected: u32,
        /// Most.
        most: u32,
    },
    /// Regions do not follow each other from the start of the memory to its end.
    #[error(
        "a region of {len} bytes at offset {offset} of the memory, where {expected} is expected"
    )]
    Region {
        /// Where it begins, in the memory.
        offset: u64,
        /// Its bytes.
        len: u64,
        /// Where it would have to begin; or, of the last one, to end.
        expected: u64,
    },
    /// Parts do not follow each other from the first to the last.
    #[error("parts {first} to {end} of memory, where {next} of {total} is expected")]
    Parts {
        /// The first.
        first: u64,
        /// Behind the last.
        end: u64,
        /// The next one to come.
        next: u64,
        /// How many there are.
        total: u64,
    },
    /// A record's lists are not equally long.
    #[error(
        "{lengths} bytes of lengths and {checksums} bytes of checksums for parts from {first} on"
    )]
    Lists {
        /// The first part.
        first: u32,
        /// Bytes of one list.
        lengths: u64,
        /// Bytes of the other.
        checksums: u64,
    },
    /// A part has more bytes in the file than it can have.
    #[error("part {part} of memory has {length} bytes in the file: at most {most} are possible")]
    Length {
        /// Which.
        part: u64,
        /// What is stated.
        length: u32,
        /// Most.
        most: u32,
    },
    /// The parts together have not the bytes of the file.
    #[error("a file of {stated} bytes whose parts have {found}")]
    FileBytes {
        /// What is stated.
        stated: u64,
        /// What the parts say.
        found: u64,
    },
}

impl MemoryIndex {
    /// Memory that is all zeros.
    pub(super) fn zeros(form: Form, regions: Vec<Placed>) -> Self {
        let bytes: u64 = regions.iter().map(|region| region.len).sum();
        let parts = usize::try_from(bytes / PART_BYTES).unwrap_or(0); // at most 2^19
        Self { form, regions, parts: vec![Part::default(); parts] }
    }

    /// Bytes of memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.parts.len() as u64 * PART_BYTES
    }

    /// Bytes of the file, its holes included.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        match self.form {
            Form::Plain => self.memory_bytes(),
            Form::Zstd => self.stored_bytes(),
        }
    }

    /// Bytes in the file that are no holes.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.parts.iter().map(|part| u64::from(part.length)).sum()
    }

    /// In which form the memory is in the file.
    #[must_use]
    pub fn form(&self) -> Form {
        self.form
    }

    /// The stream that [`Self::read`] takes.
    ///
    /// # Errors
    /// `format` has no such records.
    pub fn save(
        &self,
        format: FormatVersion,
        producer: Producer,
    ) -> Result<MemoryIndexSave<'_>, WriteError> {
        let records = self.parts.len().div_ceil(MAX_PARTS_PER_RECORD) + self.regions.len();
        let info = StreamInfo {
            stream: StreamKind::MEMORY,
            flags: HeaderFlags::default(),
            interface_type: Guid::ZERO,
            interface_instance: Guid::ZERO,
            producer,
            chunks: count(records + 3),
            bytes: 0,
            items: count(self.regions.len()),
        };
        let writer = StreamWriter::new(format, info, KINDS)?;
        Ok(MemoryIndexSave { index: self, writer, next: 0 })
    }

    /// Reads the stream that [`Self::save`] has written, and not a byte beyond it.
    ///
    /// # Errors
    /// Everything in it is checked: [`IndexError`].
    pub fn read(source: impl Read) -> Result<Self, IndexError> {
        let mut input = ChunkInput::new(source);
        let mut reader = StreamReader::new(StreamKind::MEMORY, KINDS);
        let mut reading = Reading::default();
        while let Some(bytes) = input.next()? {
            let mut bytes = bytes;
            let Some(chunk) = reader.read(&mut bytes)? else { continue };
            match chunk.kind() {
                kind if kind == MemoryFileRecord::KIND.kind => reading.file(chunk.decode()?)?,
                kind if kind == MemoryRegionRecord::KIND.kind => {
                    reading.region(&chunk.decode()?)?
                }
                _ => reading.parts(&chunk.decode()?)?,
            }
        }
        reader.finish()?;
        reading.finish()
    }
}

/// An index that is being read.
#[derive(Default)]
struct Reading {
    file: Option<(MemoryFileRecord, Form)>,
    regions: Vec<Placed>,
    parts: Vec<Part>,
    /// Bytes of frames that were told of.
    stored: u64,
}

impl Reading {
    fn file(&mut self, record: MemoryFileRecord) -> Result<(), IndexError> {
        if self.file.is_some() {
            let expected = "memory.region or memory.parts";
            return Err(IndexError::Order { found: MemoryFileRecord::KIND.name, expected });
        }
        let MemoryFileRecord { memory_bytes: bytes, part_bytes, form, regions, .. } = record;
        if !bytes.is_multiple_of(UNIT) || !(LEAST..=MOST).contains(&bytes) {
            return Err(IndexError::MemoryBytes { bytes });
        }
        if part_bytes != PART_BYTES {
            return Err(IndexError::PartBytes { found: part_bytes, expected: PART_BYTES });
        }
        if regions > MAX_REGIONS {
            let (found, expected, most) = (0, regions, MAX_REGIONS);
            return Err(IndexError::Regions { found, expected, most });
        }
        // Others are refused with the record.
        let zstd = form == i32::from(MemoryForm::Zstd);
        self.file = Some((record, if zstd { Form::Zstd } else { Form::Plain }));
        Ok(())
    }

    fn begun(&self, found: &'static str) -> Result<(&MemoryFileRecord, Form), IndexError> {
        let expected = MemoryFileRecord::KIND.name;
        let (record, form) = self.file.as_ref().ok_or(IndexError::Order { found, expected })?;
        Ok((record, *form))
    }

    fn region(&mut self, record: &MemoryRegionRecord) -> Result<(), IndexError> {
        let (file, _) = self.begun(MemoryRegionRecord::KIND.name)?;
        let stated = file.regions;
        let found = count(self.regions.len() + 1);
        if found > stated {
            return Err(IndexError::Regions { found, expected: stated, most: MAX_REGIONS });
        }
        let &MemoryRegionRecord { gpa, offset, len } = record;
        let expected = self.regions_end();
        let fits = len.is_multiple_of(UNIT) && len <= MOST && gpa.checked_add(len).is_some();
        if offset != expected || !fits {
            return Err(IndexError::Region { offset, len, expected });
        }
        self.regions.push(Placed { gpa, offset, len });
        Ok(())
    }

    /// Cannot overflow: at most [`MAX_REGIONS`] of at most [`MOST`] bytes.
    fn regions_end(&self) -> u64 {
        self.regions.last().map_or(0, |last| last.offset + last.len)
    }

    fn parts(&mut self, record: &MemoryPartsRecord) -> Result<(), IndexError> {
        let (file, form) = self.begun(MemoryPartsRecord::KIND.name)?;
        let total = file.memory_bytes / PART_BYTES;
        let MemoryPartsRecord { first, lengths, checksums } = record;
        let (lengths, left) = lengths.as_chunks::<ROW_BYTES>();
        let (checksums, also_left) = checksums.as_chunks::<ROW_BYTES>();
        if lengths.len() != checksums.len() || !left.is_empty() || !also_left.is_empty() {
            let (lengths, checksums) = (&record.lengths, &record.checksums);
            let (lengths, checksums) = (lengths.len() as u64, checksums.len() as u64);
            return Err(IndexError::Lists { first: *first, lengths, checksums });
        }
        let (next, first) = (self.parts.len() as u64, u64::from(*first));
        let end = first + lengths.len() as u64;
        if first != next || end > total {
            return Err(IndexError::Parts { first, end, next, total });
        }
        for (length, checksum) in lengths.iter().zip(checksums) {
            let (length, checksum) = (u32::from_le_bytes(*length), u32::from_le_bytes(*checksum));
            let part = self.parts.len() as u64;
            let (at, most) = match form {
                Form::Plain => (part * PART_BYTES, PART_BYTES as u32),
                Form::Zstd => (self.stored, MAX_FRAME_BYTES),
            };
            if length > most {
                return Err(IndexError::Length { part, length, most });
            }
            self.stored += u64::from(length); // at most 2^19 parts of little more than 2^21 bytes
            self.parts.push(Part { at, length, checksum });
        }
        Ok(())
    }

    fn finish(self) -> Result<MemoryIndex, IndexError> {
        let (file, form) = self.begun("stream.end")?;
        let (found, expected) = (count(self.regions.len()), file.regions);
        if found != expected {
            return Err(IndexError::Regions { found, expected, most: MAX_REGIONS });
        }
        if let Some(&Placed { offset, len, .. }) = self.regions.last()
            && offset + len != file.memory_bytes
        {
            return Err(IndexError::Region { offset, len, expected: file.memory_bytes });
        }
        let (next, total) = (self.parts.len() as u64, file.memory_bytes / PART_BYTES);
        if next != total {
            return Err(IndexError::Parts { first: next, end: next, next, total });
        }
        let stated = file.file_bytes;
        let Self { regions, parts, .. } = self;
        let index = MemoryIndex { form, regions, parts };
        let found = index.file_bytes();
        if stated != found {
            return Err(IndexError::FileBytes { stated, found });
        }
        Ok(index)
    }
}

/// An index of memory, to be written.
#[derive(Debug)]
pub struct MemoryIndexSave<'a> {
    index: &'a MemoryIndex,
    writer: StreamWriter,
    /// Chunks written: the header, the file, its regions, its parts, the end.
    next: usize,
}

impl MemoryIndexSave<'_> {
    fn chunk(&mut self, room: &mut [u8]) -> Result<Step, WriteError> {
        let Some(at) = self.next.checked_sub(2) else {
            return if self.next == 0 {
                self.writer.header(room)
            } else {
                let record = self.file();
                self.writer.record(&record, room)
            };
        };
        if let Some(&Placed { gpa, offset, len }) = self.index.regions.get(at) {
            return self.writer.record(&MemoryRegionRecord { gpa, offset, len }, room);
        }
        let first = (at - self.index.regions.len()) * MAX_PARTS_PER_RECORD;
        match self
            .index
            .parts
            .get(first..)
            .and_then(|rest| rest.chunks(MAX_PARTS_PER_RECORD).next())
        {
            Some(parts) => {
                let row = |word: fn(&Part) -> u32| {
                    parts.iter().flat_map(|part| word(part).to_le_bytes()).collect()
                };
                let (lengths, checksums) = (row(|part| part.length), row(|part| part.checksum));
                let record = MemoryPartsRecord { first: count(first), lengths, checksums };
                self.writer.record(&record, room)
            }
            None => self.writer.end(room),
        }
    }

    fn file(&self) -> MemoryFileRecord {
        let form = match self.index.form {
            Form::Plain => MemoryForm::Plain,
            Form::Zstd => MemoryForm::Zstd,
        };
        MemoryFileRecord {
            memory_bytes: self.index.memory_bytes(),
            part_bytes: PART_BYTES,
            form: form.into(),
            file_bytes: self.index.file_bytes(),
            regions: count(self.index.regions.len()),
        }
    }
}

impl Save for MemoryIndexSave<'_> {
    type Error = WriteError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, WriteError> {
        let mut written = 0;
        while !self.writer.is_ended() {
            match self.chunk(buffer.get_mut(written..).unwrap_or_default())? {
                Step::Written { bytes } => {
                    written += bytes;
                    self.next += 1;
                }
                Step::Needs { bytes: needed } => {
                    return Ok(SaveStep { written, needed, done: false });
                }
            }
        }
        Ok(SaveStep { written, needed: 0, done: true })
    }
}

/// As records have it. Memory has at most 2^19 parts, and 8 regions.
fn count(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}
