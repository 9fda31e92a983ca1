//! Writing a stream, chunk by chunk, into buffers of the caller's.

use crate::chunk::{self, Label, OVERHEAD_BYTES};
use crate::end::EndRecord;
use crate::error::WriteError;
use crate::header::{self, StreamInfo};
use crate::kind::KindInfo;
use crate::limits::{MAX_CHUNK_BYTES, MAX_CHUNKS, MAX_KINDS};
use crate::record::{self, Encode, EncodeError, Record};
use crate::version::FormatVersion;

/// What became of a chunk that was to be written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Step {
    /// It is in the buffer, whole, and takes so many bytes from its start. 0: the version of the
    /// format that is written has no such record, and readers do without it.
    Written {
        /// Bytes.
        bytes: usize,
    },
    /// The buffer is too short: nothing was written, and nothing has changed. The same call with at
    /// least so many bytes of room writes it.
    Needs {
        /// Bytes.
        bytes: usize,
    },
}

/// A kind that the header lists, and the version of it that is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Announced {
    pub(crate) info: &'static KindInfo,
    pub(crate) version: u16,
}

/// A stream that is being written. It keeps its place and nothing of what was written; it allocates
/// nothing.
///
/// A chunk goes whole into a buffer or not at all, so where chunks begin and end is decided by the
/// state alone: any sequence of buffers gives the same stream.
#[derive(Clone, Debug)]
pub struct StreamWriter {
    version: FormatVersion,
    info: StreamInfo,
    kinds: [Option<Announced>; MAX_KINDS],
    kind_count: usize,
    chunks: u32,
    bytes: u64,
    /// Checksum of the last chunk written.
    previous: u32,
    ended: bool,
}

impl StreamWriter {
    /// A stream that will have records of `kinds`, and no others: readers are told beforehand, so
    /// that one that cannot read them refuses the stream before it has used anything.
    ///
    /// # Errors
    /// [`WriteError::Kinds`]; [`WriteError::NoSuchRecord`] where `version` does not have one of the
    /// kinds, and it is mandatory.
    pub fn new(
        version: FormatVersion,
        info: StreamInfo,
        kinds: &[&'static KindInfo],
    ) -> Result<Self, WriteError> {
        let mut writer = Self {
            version,
            info,
            kinds: [None; MAX_KINDS],
            kind_count: 0,
            chunks: 0,
            bytes: 0,
            previous: 0,
            ended: false,
        };
        let refused = WriteError::Kinds { found: kinds.len(), most: MAX_KINDS };
        for &info in [EndRecord::KIND].iter().chain(kinds) {
            let Some(version) = info.version_in(version) else {
                if info.mandatory {
                    let format = version.number();
                    return Err(WriteError::NoSuchRecord { record: info.name, format });
                }
                continue;
            };
            if writer.announced(info).is_some() {
                return Err(refused);
            }
            let room = writer.kinds.get_mut(writer.kind_count).ok_or(refused)?;
            *room = Some(Announced { info, version });
            writer.kind_count += 1;
        }
        Ok(writer)
    }

    /// The kinds in the header.
    fn listed(&self) -> impl Iterator<Item = Announced> + Clone {
        self.kinds.iter().take(self.kind_count).flatten().copied()
    }

    fn announced(&self, info: &KindInfo) -> Option<Announced> {
        self.listed().find(|announced| announced.info.kind == info.kind)
    }

    /// Writes the first chunk.
    ///
    /// # Errors
    /// [`WriteError::Order`] if it is not the first, [`WriteError::Name`].
    pub fn header(&mut self, out: &mut [u8]) -> Result<Step, WriteError> {
        self.expect("the header", self.chunks == 0)?;
        let bytes = header::header_bytes(self.kind_count);
        let Some(room) = out.get_mut(..bytes) else { return Ok(Step::Needs { bytes }) };
        let checksum = header::write(room, self.version, &self.info, self.listed())?;
        self.step(bytes, checksum);
        Ok(Step::Written { bytes })
    }

    /// Writes a record as the next chunk.
    ///
    /// # Errors
    /// Any [`WriteError`]; the stream is as before, the start of `out` is not.
    pub fn record<R: Encode>(&mut self, record: &R, out: &mut [u8]) -> Result<Step, WriteError> {
        self.expect("a record", self.chunks != 0 && R::KIND.kind != EndRecord::KIND.kind)?;
        if self.chunks >= MAX_CHUNKS - 1 {
            return Err(WriteError::TooManyChunks { most: MAX_CHUNKS });
        }
        self.write(record, out, false)
    }

    /// Writes the last chunk.
    ///
    /// # Errors
    /// [`WriteError::Order`] without a header, or after the last one.
    pub fn end(&mut self, out: &mut [u8]) -> Result<Step, WriteError> {
        self.expect("the end", self.chunks != 0)?;
        let record = EndRecord { chunks: self.chunks, bytes: self.bytes };
        let step = self.write(&record, out, true)?;
        self.ended = matches!(step, Step::Written { .. });
        Ok(step)
    }

    /// Chunks written.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Bytes written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the last chunk is written.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    fn expect(&self, asked: &'static str, holds: bool) -> Result<(), WriteError> {
        if holds && !self.ended {
            Ok(())
        } else {
            Err(WriteError::Order { asked, chunks: self.chunks, ended: self.ended })
        }
    }

    fn write<R: Encode>(
        &mut self,
        record: &R,
        out: &mut [u8],
        last: bool,
    ) -> Result<Step, WriteError> {
        let kind = R::KIND;
        let Some(Announced { version, .. }) = self.announced(kind) else {
            if !kind.mandatory && kind.version_in(self.version).is_none() {
                return Ok(Step::Written { bytes: 0 });
            }
            return Err(WriteError::NotAnnounced { record: kind.name });
        };
        let stated = record.encoded_len();
        let bytes = stated.saturating_add(OVERHEAD_BYTES as usize);
        if bytes > MAX_CHUNK_BYTES as usize {
            let (bytes, most) = (bytes as u64, MAX_CHUNK_BYTES);
            return Err(WriteError::TooLarge { record: kind.name, bytes, most });
        }
        let Some(room) = out.get_mut(..bytes) else { return Ok(Step::Needs { bytes }) };
        let wrong_length = WriteError::Length { record: kind.name, stated };
        let payload = chunk::payload_mut(room).ok_or(wrong_length)?;
        record.encode(payload).map_err(|wrong| match wrong {
            EncodeError::Length => wrong_length,
            EncodeError::Field(why) => WriteError::Field { record: kind.name, why },
        })?;
        if version < kind.newest()
            && let Some(field) = record::too_new(kind, version, payload)
        {
            return Err(WriteError::NoSuchField { record: kind.name, field, version });
        }
        let label = Label {
            sequence: self.chunks,
            previous: self.previous,
            kind: kind.kind,
            version,
            mandatory: kind.mandatory,
            last,
        };
        let checksum = chunk::finish(room, &label).ok_or(wrong_length)?;
        self.step(bytes, checksum);
        Ok(Step::Written { bytes })
    }

    fn step(&mut self, bytes: usize, checksum: u32) {
        self.chunks += 1;
        self.bytes += bytes as u64;
        self.previous = checksum;
    }
}
