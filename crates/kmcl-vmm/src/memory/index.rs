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
pub const PART_BYTES: u64 = PART_LEN as u64;

/// The same, as a part's length is stated.
const PART_LEN: u32 = 2 << 20;

// Regions, then, are whole parts.
const _: () = assert!(PART_BYTES == UNIT);

/// Most bytes of a compressed part: what Zstandard makes of bytes that it cannot compress.
pub(super) const MAX_FRAME_BYTES: u32 = PART_LEN + (PART_LEN >> 8);

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

    /// Says of each part where in the file it is: that follows from the lengths.
    pub(super) fn place_parts(&mut self) {
        let mut stored = 0;
        for (number, part) in (0..).zip(&mut self.parts) {
            part.at = match self.form {
                Form::Plain => number * PART_BYTES,
                Form::Zstd => stored,
            };
            stored += u64::from(part.length); // at most 2^19 parts of little more than 2^21 bytes
        }
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
            let most = match form {
                Form::Plain => PART_LEN,
                Form::Zstd => MAX_FRAME_BYTES,
            };
            if length > most {
                let part = self.parts.len() as u64;
                return Err(IndexError::Length { part, length, most });
            }
            self.parts.push(Part { at: 0, length, checksum });
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
        let mut index = MemoryIndex { form, regions, parts };
        index.place_parts();
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

#[cfg(test)]
mod tests {
    use super::*;
    use saved_state::Encode;

    const MIB: u64 = 1 << 20;

    fn regions() -> Vec<Placed> {
        let low = Placed { gpa: 0, offset: 0, len: 48 * MIB };
        vec![low, Placed { gpa: 1 << 32, offset: 48 * MIB, len: 16 * MIB }]
    }

    fn index(form: Form) -> MemoryIndex {
        let mut index = MemoryIndex::zeros(form, regions());
        for (number, part) in index.parts.iter_mut().enumerate() {
            let length = [0, 4096, 8192][number % 3];
            let checksum = if length == 0 { 0 } else { 7 + u32::try_from(number).unwrap() };
            *part = Part { at: 0, length, checksum };
        }
        index.place_parts();
        index
    }

    fn stream(index: &MemoryIndex) -> Vec<u8> {
        let mut out = Vec::new();
        let producer = Producer::new("test").unwrap();
        let mut save = index.save(FormatVersion::NEWEST, producer).unwrap();
        save.write_to(&mut out).unwrap();
        out
    }

    #[test]
    fn an_index_comes_back_and_nothing_behind_it_is_read() {
        for form in [Form::Plain, Form::Zstd] {
            let index = index(form);
            let bytes = [stream(&index), b"next".to_vec()].concat();
            let mut source = &bytes[..];
            assert_eq!(MemoryIndex::read(&mut source).unwrap(), index, "{form:?}");
            assert_eq!(source, b"next");
        }
    }

    /// As much memory as there can be, over many records.
    #[test]
    fn the_largest_index_comes_back() {
        let all = vec![Placed { gpa: 0, offset: 0, len: MOST }];
        let mut index = MemoryIndex::zeros(Form::Plain, all);
        index.parts.fill(Part { at: 0, length: PART_LEN, checksum: 9 });
        index.place_parts();
        let bytes = stream(&index);
        assert!(bytes.len() < 5 << 20, "{} bytes", bytes.len());
        assert_eq!(MemoryIndex::read(&bytes[..]).unwrap(), index);
    }

    #[test]
    fn no_frame_is_longer_than_what_cannot_be_compressed() {
        let longest = zstd::zstd_safe::compress_bound(PART_LEN as usize);
        assert_eq!(longest, MAX_FRAME_BYTES as usize);
    }

    /// The records of an index, to be changed.
    struct Records {
        file: MemoryFileRecord,
        regions: Vec<MemoryRegionRecord>,
        parts: Vec<MemoryPartsRecord>,
        /// The file's record comes again, or not at all.
        files: usize,
    }

    impl Records {
        fn bytes(&self) -> Vec<u8> {
            let info = StreamInfo {
                stream: StreamKind::MEMORY,
                flags: HeaderFlags::default(),
                interface_type: Guid::ZERO,
                interface_instance: Guid::ZERO,
                producer: Producer::new("test").unwrap(),
                chunks: 0,
                bytes: 0,
                items: 0,
            };
            let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).unwrap();
            let mut out = Vec::new();
            let mut room = vec![0; 1 << 20];
            let mut add = |step: Step, room: &[u8]| {
                let Step::Written { bytes } = step else { panic!("{step:?}") };
                out.extend_from_slice(&room[..bytes]);
            };
            add(writer.header(&mut room).unwrap(), &room);
            fn record<R: Encode>(writer: &mut StreamWriter, it: &R, room: &mut [u8]) -> Step {
                writer.record(it, room).unwrap()
            }
            for _ in 0..self.files {
                add(record(&mut writer, &self.file, &mut room), &room);
            }
            for region in &self.regions {
                add(record(&mut writer, region, &mut room), &room);
            }
            for parts in &self.parts {
                add(record(&mut writer, parts, &mut room), &room);
            }
            add(writer.end(&mut room).unwrap(), &room);
            out
        }
    }

    #[test]
    fn an_index_that_lies_is_refused_with_the_numbers() {
        let rows = |value: u32, count: usize| value.to_le_bytes().repeat(count);
        let good = || Records {
            file: MemoryFileRecord {
                memory_bytes: 64 * MIB,
                part_bytes: PART_BYTES,
                form: MemoryForm::Zstd.into(),
                file_bytes: 32 * 100,
                regions: 1,
            },
            regions: vec![MemoryRegionRecord { gpa: 0, offset: 0, len: 64 * MIB }],
            parts: vec![MemoryPartsRecord {
                first: 0,
                lengths: rows(100, 32),
                checksums: rows(1, 32),
            }],
            files: 1,
        };
        MemoryIndex::read(&good().bytes()[..]).unwrap();
        type Change = fn(&mut Records);
        let changes: [(&str, Change); 20] = [
            ("Order { found: \"memory.region\"", |it| it.files = 0),
            ("Order { found: \"memory.file\"", |it| it.files = 2),
            ("MemoryBytes { bytes: 2097152", |it| it.file.memory_bytes = UNIT),
            ("MemoryBytes { bytes: 67108865", |it| it.file.memory_bytes += 1),
            ("MemoryBytes { bytes: 18446744073707454464", |it| {
                it.file.memory_bytes = u64::MAX - UNIT + 1
            }),
            ("PartBytes { found: 4096", |it| it.file.part_bytes = 4096),
            ("Regions { found: 0, expected: 4294967295, most: 8", |it| it.file.regions = u32::MAX),
            ("Regions { found: 2, expected: 1", |it| it.regions.push(it.regions[0].clone())),
            ("Regions { found: 1, expected: 2", |it| it.file.regions = 2),
            ("Region { offset: 1, len: 67108864, expected: 0", |it| it.regions[0].offset = 1),
            ("Region { offset: 0, len: 4096, expected: 0", |it| it.regions[0].len = 4096),
            ("Region { offset: 0, len: 33554432, expected: 67108864", |it| {
                it.regions[0].len = 32 * MIB;
            }),
            ("Region { offset: 0, len: 67108864, expected: 0", |it| it.regions[0].gpa = u64::MAX),
            ("Region { offset: 0, len: 9223372036854775808", |it| it.regions[0].len = 1 << 63),
            ("Parts { first: 1, end: 33, next: 0, total: 32", |it| it.parts[0].first = 1),
            ("Parts { first: 0, end: 32, next: 32, total: 32", |it| {
                it.parts.push(it.parts[0].clone())
            }),
            ("Parts { first: 32, end: 32, next: 32, total: 64", |it| {
                it.file.memory_bytes *= 2;
                it.regions[0].len *= 2;
            }),
            ("Lists { first: 0, lengths: 128, checksums: 127", |it| {
                it.parts[0].checksums.pop();
            }),
            ("Length { part: 0, length: 2105345, most: 2105344", |it| {
                it.parts[0].lengths[..4].copy_from_slice(&2_105_345_u32.to_le_bytes());
            }),
            ("FileBytes { stated: 3201, found: 3200", |it| it.file.file_bytes += 1),
        ];
        for (expected, change) in changes {
            let mut records = good();
            change(&mut records);
            let error = MemoryIndex::read(&records.bytes()[..]).unwrap_err();
            assert!(format!("{error:?}").starts_with(expected), "{expected}: {error:?}");
        }
    }

    /// What is cut or damaged is told by the stream; nothing is taken for memory without its end.
    #[test]
    fn an_index_that_is_cut_is_refused() {
        let bytes = stream(&index(Form::Zstd));
        for end in 0..bytes.len() {
            assert!(MemoryIndex::read(&bytes[..end]).is_err(), "{end}");
        }
    }
}
