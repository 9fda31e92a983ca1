//! Reading a stream: each chunk is checked whole, then handed out.

use crate::chunk::{self, Framed};
use crate::end::{END, EndRecord};
use crate::error::{Damage, FieldError, ReadError};
use crate::header::{self, AnnouncedKind, StreamHeader};
use crate::kind::{KindInfo, RecordKind, StreamKind};
use crate::limits::MAX_CHUNKS;
use crate::record::{Decode, Record};
use crate::schema::Fields;
use crate::version::Readable;

use vmbus_wire::guid::Guid;

/// Kinds of records that a reader knows.
pub type Kinds = &'static [&'static KindInfo];

/// A chunk with a record, undamaged and in its place. Its fields are checked when it is decoded.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    info: &'static KindInfo,
    framed: Framed<'a>,
    offset: u64,
}

impl<'a> Chunk<'a> {
    /// Checks `bytes` as one whole chunk outside of its stream, as a driver hands it back: length,
    /// checksum, and that it is a record of `kinds`. Where it belongs is not checked.
    ///
    /// # Errors
    /// Any [`ReadError`]; offsets count from the start of `bytes`.
    pub fn alone(bytes: &'a [u8], kinds: Kinds) -> Result<Self, ReadError> {
        let damaged = |chunk, why| ReadError::Damaged { chunk, offset: 0, why };
        let framed = chunk::parse(bytes).map_err(|why| damaged(0, why))?;
        let label = framed.label;
        if let Some(why) = framed.strange {
            return Err(damaged(label.sequence, why));
        }
        if framed.bytes.len() != bytes.len() {
            let offset = framed.bytes.len() as u64;
            return Err(ReadError::AfterEnd { offset, bytes: bytes.len() as u64 - offset });
        }
        let known = find(kinds, label.kind);
        let info = known.filter(|info| label.version <= info.newest());
        let stranger = Damage::NotAnnounced {
            kind: label.kind,
            version: label.version,
            mandatory: label.mandatory,
        };
        let info = info.ok_or_else(|| damaged(label.sequence, stranger))?;
        Ok(Self { info, framed, offset: 0 })
    }

    /// The kind of its record.
    #[must_use]
    pub fn kind(&self) -> RecordKind {
        self.info.kind
    }

    /// What is known of that kind.
    #[must_use]
    pub fn info(&self) -> &'static KindInfo {
        self.info
    }

    /// The version of its record.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.framed.label.version
    }

    /// Its place in the stream; the header has 0.
    #[must_use]
    pub fn sequence(&self) -> u32 {
        self.framed.label.sequence
    }

    /// Where it begins in the stream, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// All of it, for [`Self::alone`].
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.framed.bytes
    }

    /// The message of its record, to be decoded later.
    #[must_use]
    pub fn message(&self) -> &'a [u8] {
        self.framed.payload
    }

    /// Its record.
    ///
    /// # Errors
    /// [`ReadError::Record`] with the field; [`ReadError::OtherRecord`] if it is of another kind.
    #[inline]
    pub fn decode<R: Decode<'a>>(&self) -> Result<R, ReadError> {
        if self.info.kind != R::KIND.kind {
            return Err(ReadError::OtherRecord {
                chunk: self.sequence(),
                found: self.info.name,
                expected: R::KIND.name,
            });
        }
        R::decode(self.framed.payload).map_err(|why| self.wrong_field(why))
    }

    /// Its fields, for showing them.
    #[must_use]
    pub fn fields(&self) -> Fields<'a> {
        Fields::new(self.framed.payload, self.info.fields)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`ReadError::Record`] with the field.
    pub fn check(&self) -> Result<(), ReadError> {
        (self.info.check)(self.framed.payload).map_err(|why| self.wrong_field(why))
    }

    #[cold]
    fn wrong_field(&self, why: FieldError) -> ReadError {
        let (chunk, offset) = (self.sequence(), self.offset);
        ReadError::Record { chunk, offset, record: self.info.name, why }
    }
}

fn find(kinds: Kinds, kind: RecordKind) -> Option<&'static KindInfo> {
    kinds.iter().copied().find(|info| info.kind == kind)
}

/// A stream that is being read: its place, and what the next chunk must look like. It allocates
/// nothing, and keeps nothing of what it hands out.
///
/// After an error it stands where it stood before the chunk that the error is about.
#[derive(Clone, Debug)]
pub struct StreamReader {
    stream: StreamKind,
    interface: Option<(Guid, Guid)>,
    kinds: Kinds,
    pub(crate) readable: Readable,
    header: Option<StreamHeader>,
    chunks: u32,
    bytes: u64,
    /// Checksum of the last chunk read.
    previous: u32,
    complete: bool,
}

impl StreamReader {
    /// For a stream of that kind, from one who knows `kinds` beside the stream's own.
    #[must_use]
    pub fn new(stream: StreamKind, kinds: Kinds) -> Self {
        Self {
            stream,
            interface: None,
            kinds,
            readable: Readable::ALL,
            header: None,
            chunks: 0,
            bytes: 0,
            previous: 0,
            complete: false,
        }
    }

    /// The same, for the state of that channel or device alone.
    #[must_use]
    pub fn of_interface(self, interface_type: Guid, interface_instance: Guid) -> Self {
        Self { interface: Some((interface_type, interface_instance)), ..self }
    }

    /// Reads on until a record, which it takes off the start of `input`; `None` at the end of `input`.
    /// The header, the end, and records that are unknown here and may be skipped are checked and
    /// passed over.
    ///
    /// `input` holds whole chunks, as many or as few as the caller likes.
    ///
    /// # Errors
    /// Any [`ReadError`]. `input` is as it was, up to the chunk that the error is about.
    #[inline]
    pub fn read<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Chunk<'a>>, ReadError> {
        while !input.is_empty() {
            if self.complete {
                let (offset, bytes) = (self.bytes, input.len() as u64);
                return Err(ReadError::AfterEnd { offset, bytes });
            }
            let (taken, chunk) = match &self.header {
                None => (self.read_header(input)?, None),
                Some(_) => self.read_chunk(input)?,
            };
            *input = input.get(taken..).unwrap_or_default();
            if chunk.is_some() {
                return Ok(chunk);
            }
        }
        Ok(None)
    }

    /// What the first chunk says, once it was read.
    #[must_use]
    pub fn header(&self) -> Option<&StreamHeader> {
        self.header.as_ref()
    }

    /// Whether the last chunk was read.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Chunks read.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Bytes read.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// For who has given all there is.
    ///
    /// # Errors
    /// [`ReadError::Unfinished`] if the last chunk was not among it.
    pub fn finish(&self) -> Result<(), ReadError> {
        if self.complete {
            Ok(())
        } else {
            Err(ReadError::Unfinished { chunks: self.chunks, bytes: self.bytes })
        }
    }

    #[cold]
    fn damaged(&self, why: Damage) -> ReadError {
        ReadError::Damaged { chunk: self.chunks, offset: self.bytes, why }
    }

    /// Reads the first chunk and returns its length.
    fn read_header(&mut self, input: &[u8]) -> Result<usize, ReadError> {
        let fixed = header::check_fixed(input)?;
        // The version first: all that follows may have changed.
        let (found, needs) = fixed.versions();
        if !self.readable.covers(found, needs) {
            return Err(ReadError::Revision { found, needs, readable: self.readable });
        }
        let header = StreamHeader::read_checked(input, &fixed)?;
        let info = &header.info;
        if info.flags.refused() != 0 {
            return Err(ReadError::UnknownFlags { bits: info.flags.refused() });
        }
        if info.stream != self.stream {
            let (found, expected) = (info.stream, self.stream);
            return Err(ReadError::OtherStream { found, expected });
        }
        if let Some((expected_type, expected_instance)) = self.interface
            && (info.interface_type, info.interface_instance) != (expected_type, expected_instance)
        {
            return Err(ReadError::OtherInterface {
                found_type: info.interface_type,
                found_instance: info.interface_instance,
                expected_type,
                expected_instance,
            });
        }
        header.kinds().iter().try_for_each(|announced| self.check_kind(announced))?;
        let taken = header.length as usize;
        // The checksum, which `check_fixed` has verified.
        let stored = input.get(..taken).and_then(<[u8]>::last_chunk).copied().unwrap_or_default();
        self.header = Some(header);
        self.step(taken, u32::from_le_bytes(stored));
        Ok(taken)
    }

    /// Whether records of that kind can be read, or skipped.
    fn check_kind(&self, announced: &AnnouncedKind) -> Result<(), ReadError> {
        let &AnnouncedKind { kind, version, mandatory, name } = announced;
        match self.known(kind) {
            // What is skipped need not be known; the end cannot be.
            _ if !mandatory && kind != END => Ok(()),
            None => Err(ReadError::UnknownRecord { kind, name }),
            Some(info) if version > info.newest() => {
                let newest = info.newest();
                Err(ReadError::UnknownRecordVersion { kind, name, found: version, newest })
            }
            Some(_) => Ok(()),
        }
    }

    fn known(&self, kind: RecordKind) -> Option<&'static KindInfo> {
        if kind == END { Some(EndRecord::KIND) } else { find(self.kinds, kind) }
    }

    /// Reads a chunk after the first: its length, and the record if it is for the caller.
    #[inline]
    fn read_chunk<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Option<Chunk<'a>>), ReadError> {
        let framed = chunk::parse(input).map_err(|why| self.damaged(why))?;
        self.check_place(&framed).map_err(|why| self.damaged(why))?;
        let (taken, label) = (framed.bytes.len(), framed.label);
        let known = self.known(label.kind).filter(|info| label.version <= info.newest());
        let chunk = known.map(|info| Chunk { info, framed, offset: self.bytes });
        let chunk = match chunk {
            Some(chunk) if label.last => {
                self.check_end(&chunk)?;
                self.complete = true;
                None
            }
            chunk => chunk,
        };
        self.step(taken, framed.checksum);
        Ok((taken, chunk))
    }

    /// Whether a chunk is the next one of this stream, and what the header announced.
    #[inline]
    fn check_place(&self, framed: &Framed<'_>) -> Result<(), Damage> {
        let label = framed.label;
        if let Some(why) = framed.strange {
            return Err(why);
        }
        if label.sequence != self.chunks {
            return Err(Damage::Sequence { found: label.sequence, expected: self.chunks });
        }
        if label.previous != self.previous {
            return Err(Damage::Chain { found: label.previous, expected: self.previous });
        }
        if self.chunks >= MAX_CHUNKS {
            return Err(Damage::TooManyChunks { most: MAX_CHUNKS });
        }
        let announced = self.header.as_ref().and_then(|header| header.kind(label.kind));
        if !announced.is_some_and(|announced| {
            announced.version == label.version && announced.mandatory == label.mandatory
        }) {
            let (version, mandatory) = (label.version, label.mandatory);
            return Err(Damage::NotAnnounced { kind: label.kind, version, mandatory });
        }
        if label.last != (label.kind == END) {
            return Err(Damage::Last { kind: label.kind, last: label.last });
        }
        Ok(())
    }

    /// Holds the last chunk, and what the header said beforehand, against what was read.
    fn check_end(&self, chunk: &Chunk<'_>) -> Result<(), ReadError> {
        let end: EndRecord = chunk.decode()?;
        let (chunks, bytes) = (u64::from(self.chunks), self.bytes);
        // What the header does not know beforehand is 0 there.
        let (all_chunks, all_bytes) = (chunks + 1, bytes + chunk.bytes().len() as u64);
        let known = |stated: u64, counted| if stated == 0 { counted } else { stated };
        let info = self.header.as_ref().map(|header| header.info);
        let (info_chunks, info_bytes) = info.map_or((0, 0), |info| (info.chunks, info.bytes));
        for (what, stated, counted) in [
            ("chunks before the last", u64::from(end.chunks), chunks),
            ("bytes before the last chunk", end.bytes, bytes),
            ("chunks", known(u64::from(info_chunks), all_chunks), all_chunks),
            ("bytes", known(info_bytes, all_bytes), all_bytes),
        ] {
            if stated != counted {
                return Err(self.damaged(Damage::Total { what, stated, counted }));
            }
        }
        Ok(())
    }

    fn step(&mut self, bytes: usize, checksum: u32) {
        self.chunks += 1;
        self.bytes += bytes as u64;
        self.previous = checksum;
    }
}
