//! The first chunk: what a stream is, in plain bytes that every later version can read.

use std::fmt;

use vmbus_wire::guid::Guid;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::chunk::{self, CHECKSUM_BYTES};
use crate::error::{Damage, ReadError, WriteError};
use crate::kind::{RecordKind, StreamKind};
use crate::limits::{MAX_HEADER_BYTES, MAX_KINDS};
use crate::text::{KindName, Producer};
use crate::version::FormatVersion;
use crate::writer::Announced;

/// The first eight bytes of every saved state. The first is no ASCII, the two before the last are a
/// line's end, the last ends a text: a transfer that takes the file for text is noticed at once.
pub const MAGIC: [u8; 8] = *b"\x89KMCL\r\n\x1a";

/// The part of the header that every version has. The list of kinds comes after it, wherever
/// `table_offset` says, and the checksum in the last four bytes.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub(crate) struct FixedHeader {
    magic: [u8; 8],
    length: U32, // bytes of the chunk: this struct, the table, whatever later versions add, checksum
    format_version: U16,
    oldest_reader: U16,
    stream: U16,
    rows: U16,
    row_bytes: U16,
    table_offset: U16, // from the start of this struct
    flags: U32,
    chunks: U32, // the first and the last included; 0: not known beforehand
    bytes: U64,  // of the whole stream; 0: not known beforehand
    items: U32,
    reserved: U32,
    interface_type: Guid,
    interface_instance: Guid,
    producer: [u8; crate::limits::MAX_PRODUCER_BYTES],
}
const _: () = assert!(size_of::<FixedHeader>() == FIXED_BYTES as usize);
const FIXED_BYTES: u32 = 128;
const TABLE_OFFSET: u16 = 128;

/// One row of the list of kinds. Later versions may have longer ones.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub(crate) struct KindRow {
    kind: U16,
    version: U16,
    flags: U16, // bit 0: mandatory
    reserved: U16,
    name: [u8; crate::limits::MAX_NAME_BYTES],
}
const _: () = assert!(size_of::<KindRow>() == ROW_BYTES as usize);
const ROW_BYTES: u16 = 32;

const ROW_MANDATORY: u16 = 1;

/// Bytes of the shortest header.
pub(crate) const LEAST_BYTES: u32 = FIXED_BYTES + CHECKSUM_BYTES;

/// Flags of a stream. A reader ignores an unknown one of the lower sixteen, and refuses the stream
/// for an unknown one of the upper sixteen.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct HeaderFlags(pub u32);

impl HeaderFlags {
    /// The channel was frozen, not paused: incoming packets may be among those in flight.
    pub const FROZEN: Self = Self(1);
    /// All that there are.
    pub const KNOWN: Self = Self::FROZEN;
    /// The bits that must not be ignored.
    const MANDATORY: u32 = 0xffff_0000;

    /// Whether all of `flags` are set.
    #[must_use]
    pub const fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// Unknown ones that must not be ignored.
    pub(crate) fn refused(self) -> u32 {
        self.0 & Self::MANDATORY & !Self::KNOWN.0
    }
}

/// What a stream that begins says of itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StreamInfo {
    /// What it is the state of.
    pub stream: StreamKind,
    /// Its flags.
    pub flags: HeaderFlags,
    /// Interface type of the channel or device; all zeros for a bus.
    pub interface_type: Guid,
    /// Its instance.
    pub interface_instance: Guid,
    /// Who saves.
    pub producer: Producer,
    /// Chunks of the whole stream, the first and the last included; 0: not known beforehand.
    pub chunks: u32,
    /// Bytes of the whole stream; 0: not known beforehand.
    pub bytes: u64,
    /// How much is saved: packets in flight of a channel, offers of a bus, requests of a device.
    pub items: u32,
}

/// One kind of record in a stream, as its header tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AnnouncedKind {
    /// Its number.
    pub kind: RecordKind,
    /// The version of its records.
    pub version: u16,
    /// Whether a reader that does not know it has to refuse the stream.
    pub mandatory: bool,
    /// Its name.
    pub name: KindName,
}

impl AnnouncedKind {
    const NONE: Self =
        Self { kind: RecordKind(0), version: 0, mandatory: false, name: KindName::EMPTY };
}

/// The first chunk of a stream, undamaged. Its records need not be readable here.
#[derive(Clone)]
pub struct StreamHeader {
    /// The version of the format.
    pub format_version: u16,
    /// The oldest version whose readers can read it.
    pub oldest_reader: u16,
    /// Bytes of the header.
    pub length: u32,
    /// What else it says.
    pub info: StreamInfo,
    kinds: [AnnouncedKind; MAX_KINDS],
    rows: usize,
}

impl StreamHeader {
    /// Reads the first chunk of `stream`, whatever its version, and nothing after it.
    ///
    /// # Errors
    /// [`ReadError::NotASavedState`] and [`ReadError::Damaged`].
    pub fn read(stream: &[u8]) -> Result<Self, ReadError> {
        let fixed = check_fixed(stream)?;
        Self::read_checked(stream, &fixed)
    }

    /// The rest of [`Self::read`], once length and checksum are known to be right.
    pub(crate) fn read_checked(stream: &[u8], fixed: &FixedHeader) -> Result<Self, ReadError> {
        Self::read_rest(stream, fixed).map_err(damaged)
    }

    fn read_rest(stream: &[u8], fixed: &FixedHeader) -> Result<Self, Damage> {
        let producer =
            Producer::from_bytes(fixed.producer).ok_or(Damage::Text { what: "the producer" })?;
        let mut header = Self {
            format_version: fixed.format_version.get(),
            oldest_reader: fixed.oldest_reader.get(),
            length: fixed.length.get(),
            info: StreamInfo {
                stream: StreamKind(fixed.stream.get()),
                flags: HeaderFlags(fixed.flags.get()),
                interface_type: fixed.interface_type,
                interface_instance: fixed.interface_instance,
                producer,
                chunks: fixed.chunks.get(),
                bytes: fixed.bytes.get(),
                items: fixed.items.get(),
            },
            kinds: [AnnouncedKind::NONE; MAX_KINDS],
            rows: 0,
        };
        let table = table(stream, fixed)?;
        let row_bytes = usize::from(fixed.row_bytes.get()).max(1);
        for row in table.chunks_exact(row_bytes) {
            header.add_row(row)?;
        }
        Ok(header)
    }

    fn add_row(&mut self, row: &[u8]) -> Result<(), Damage> {
        // A row is at least as long, and the table at most as long: `table` has checked that.
        let Ok((row, _)) = KindRow::read_from_prefix(row) else { return Ok(()) };
        let kind = RecordKind(row.kind.get());
        if self.kind(kind).is_some() {
            return Err(Damage::Twice { kind });
        }
        let name = KindName::from_bytes(row.name);
        if let Some(room) = self.kinds.get_mut(self.rows) {
            *room = AnnouncedKind {
                kind,
                version: row.version.get(),
                mandatory: row.flags.get() & ROW_MANDATORY != 0,
                name: name.ok_or(Damage::Text { what: "the name of a kind" })?,
            };
            self.rows += 1;
        }
        Ok(())
    }

    /// The kinds of records in the stream.
    #[must_use]
    pub fn kinds(&self) -> &[AnnouncedKind] {
        self.kinds.get(..self.rows).unwrap_or_default()
    }

    /// What the header says of a kind.
    #[must_use]
    pub fn kind(&self, kind: RecordKind) -> Option<&AnnouncedKind> {
        self.kinds().iter().find(|announced| announced.kind == kind)
    }
}

impl fmt::Debug for StreamHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamHeader")
            .field("format_version", &self.format_version)
            .field("oldest_reader", &self.oldest_reader)
            .field("length", &self.length)
            .field("info", &self.info)
            .field("kinds", &self.kinds())
            .finish()
    }
}

impl FixedHeader {
    pub(crate) fn length(&self) -> u32 {
        self.length.get()
    }

    pub(crate) fn versions(&self) -> (u16, u16) {
        (self.format_version.get(), self.oldest_reader.get())
    }
}

/// The fixed part of a header whose magic and length are right, whatever else is not.
pub(crate) fn fixed_despite(stream: &[u8]) -> Option<FixedHeader> {
    let (fixed, _) = FixedHeader::read_from_prefix(stream).ok()?;
    let plausible = (LEAST_BYTES..=MAX_HEADER_BYTES).contains(&fixed.length());
    (plausible && fixed.magic == MAGIC && stream.len() >= fixed.length() as usize).then_some(fixed)
}

fn damaged(why: Damage) -> ReadError {
    ReadError::Damaged { chunk: 0, offset: 0, why }
}

/// Checks magic, length and checksum of the first chunk; these are the same in every version.
pub(crate) fn check_fixed(stream: &[u8]) -> Result<FixedHeader, ReadError> {
    let fixed = head(stream)?;
    let (length, available) = (fixed.length(), stream.len() as u64);
    let whole = stream.get(..length as usize);
    let cut = Damage::Cut { needed: u64::from(length), available };
    chunk::check_sum(whole.ok_or(damaged(cut))?).map_err(damaged)?;
    Ok(fixed)
}

/// The fixed part of the first chunk, which need not be all there: magic and length are right, the rest
/// is as it is.
pub(crate) fn head(stream: &[u8]) -> Result<FixedHeader, ReadError> {
    let available = stream.len() as u64;
    let begins_right = stream.iter().zip(MAGIC).all(|(&found, expected)| found == expected);
    if !begins_right {
        let mut found = [0; 8];
        found.iter_mut().zip(stream).for_each(|(room, &byte)| *room = byte);
        return Err(ReadError::NotASavedState { found });
    }
    let Ok((fixed, _)) = FixedHeader::read_from_prefix(stream) else {
        return Err(damaged(Damage::Cut { needed: u64::from(LEAST_BYTES), available }));
    };
    let length = fixed.length();
    if !(LEAST_BYTES..=MAX_HEADER_BYTES).contains(&length) {
        let why = Damage::Length { found: length, least: LEAST_BYTES, most: MAX_HEADER_BYTES };
        return Err(damaged(why));
    }
    Ok(fixed)
}

/// The bytes of the list of kinds.
fn table<'a>(stream: &'a [u8], fixed: &FixedHeader) -> Result<&'a [u8], Damage> {
    let (rows, row_bytes) = (fixed.rows.get(), fixed.row_bytes.get());
    let offset = fixed.table_offset.get();
    let start = usize::from(offset);
    let end = start + usize::from(rows) * usize::from(row_bytes); // below 2^32
    let most = fixed.length().saturating_sub(CHECKSUM_BYTES) as usize;
    let fits = usize::from(rows) <= MAX_KINDS
        && row_bytes >= ROW_BYTES
        && u32::from(offset) >= FIXED_BYTES
        && end <= most;
    let table = if fits { stream.get(start..end) } else { None };
    table.ok_or(Damage::Table { rows, row_bytes, offset, length: fixed.length() })
}

/// Bytes of a header with so many kinds.
pub(crate) fn header_bytes(kinds: usize) -> usize {
    FIXED_BYTES as usize + kinds * usize::from(ROW_BYTES) + CHECKSUM_BYTES as usize
}

/// Writes a header into `out`, which is [`header_bytes`] long, and returns its checksum.
pub(crate) fn write(
    out: &mut [u8],
    version: FormatVersion,
    info: &StreamInfo,
    kinds: impl Iterator<Item = Announced> + Clone,
) -> Result<u32, WriteError> {
    let stated = out.len();
    let wrong_length = WriteError::Length { record: "header", stated };
    let rows = kinds.clone().count();
    let fixed = FixedHeader {
        magic: MAGIC,
        length: U32::new(u32::try_from(stated).map_err(|_| wrong_length)?),
        format_version: U16::new(version.number),
        oldest_reader: U16::new(version.oldest_reader),
        stream: U16::new(info.stream.0),
        rows: U16::new(u16::try_from(rows).map_err(|_| wrong_length)?),
        row_bytes: U16::new(ROW_BYTES),
        table_offset: U16::new(TABLE_OFFSET),
        flags: U32::new(info.flags.0),
        chunks: U32::new(info.chunks),
        bytes: U64::new(info.bytes),
        items: U32::new(info.items),
        reserved: U32::ZERO,
        interface_type: info.interface_type,
        interface_instance: info.interface_instance,
        producer: info.producer.to_bytes(),
    };
    let (head, mut rest) =
        out.split_at_mut_checked(size_of::<FixedHeader>()).ok_or(wrong_length)?;
    head.copy_from_slice(fixed.as_bytes());
    for Announced { info: kind, version } in kinds {
        let name = KindName::new(kind.name).map_err(|_| WriteError::Name { name: kind.name })?;
        let row = KindRow {
            kind: U16::new(kind.kind.0),
            version: U16::new(version),
            flags: U16::new(if kind.mandatory { ROW_MANDATORY } else { 0 }),
            reserved: U16::ZERO,
            name: name.to_bytes(),
        };
        let (room, after) = rest.split_at_mut_checked(size_of::<KindRow>()).ok_or(wrong_length)?;
        room.copy_from_slice(row.as_bytes());
        rest = after;
    }
    chunk::seal(out).ok_or(wrong_length)
}
