//! A chunk: a header, a record's message, the checksum of the chunk before, and a checksum over all of
//! that.
//!
//! What ties a chunk to the one before comes last, so that nothing waits for it: the checksum of a chunk
//! is computed up to its last step while that of the one before is not known yet, and a processor does
//! just that. In front, it would make one long dependency of the whole stream.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Damage;
use crate::kind::RecordKind;
use crate::limits::MAX_CHUNK_BYTES;

/// The first four bytes of every chunk but the first.
pub(crate) const MAGIC: [u8; 4] = *b"CHNK";

/// Bytes of the checksum that ends every chunk, the first included: CRC-32C of all bytes before it.
pub(crate) const CHECKSUM_BYTES: u32 = 4;

#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub(crate) struct ChunkHeader {
    magic: [u8; 4],
    length: U32,   // bytes: this header, the message, the trailer
    sequence: U32, // the stream's header is 0
    kind: U16,
    version: U16,
    flags: U16,
    reserved: U16,
}
const HEADER_BYTES: u32 = 20;
const _: () = assert!(size_of::<ChunkHeader>() == HEADER_BYTES as usize);

/// Checksum of the chunk before, and that of this one.
const TRAILER_BYTES: u32 = 4 + CHECKSUM_BYTES;

/// Bytes of a chunk beside the message.
pub(crate) const OVERHEAD_BYTES: u32 = HEADER_BYTES + TRAILER_BYTES;

/// Nothing comes after the chunk.
const LAST: u16 = 1;
/// A reader that does not know the record must refuse the stream.
const MANDATORY: u16 = 2;
const KNOWN_FLAGS: u16 = LAST | MANDATORY;

/// What the header of a chunk says, apart from how long it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Label {
    pub(crate) sequence: u32,
    /// Checksum of the chunk before.
    pub(crate) previous: u32,
    pub(crate) kind: RecordKind,
    pub(crate) version: u16,
    pub(crate) mandatory: bool,
    pub(crate) last: bool,
}

/// A chunk whose length and checksum are right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Framed<'a> {
    pub(crate) label: Label,
    /// Flags that no chunk has, and what is kept free.
    pub(crate) strange: Option<Damage>,
    /// All of it.
    pub(crate) bytes: &'a [u8],
    /// The message.
    pub(crate) payload: &'a [u8],
    pub(crate) checksum: u32,
}

/// The checksum that `chunk` ends with, and what the bytes before it come to.
pub(crate) fn check_sum(chunk: &[u8]) -> Result<u32, Damage> {
    let Some((content, stored)) = chunk.split_last_chunk() else {
        let (needed, available) = (u64::from(CHECKSUM_BYTES), chunk.len() as u64);
        return Err(Damage::Cut { needed, available });
    };
    let (stored, computed) = (u32::from_le_bytes(*stored), crc32c::crc32c(content));
    if stored == computed { Ok(stored) } else { Err(Damage::Checksum { stored, computed }) }
}

/// Puts the checksum into the last bytes of `chunk`; `None` where it has no room for one.
pub(crate) fn seal(chunk: &mut [u8]) -> Option<u32> {
    let (content, room) = chunk.split_last_chunk_mut()?;
    let checksum = crc32c::crc32c(content);
    *room = checksum.to_le_bytes();
    Some(checksum)
}

impl ChunkHeader {
    /// Bytes of the chunk, as it says: within the limits, once [`head`] has read it.
    pub(crate) fn length(&self) -> usize {
        self.length.get() as usize
    }

    /// Whether it says that nothing comes after it.
    pub(crate) fn is_last(&self) -> bool {
        self.flags.get() & LAST != 0
    }
}

/// The header of a chunk at the start of `input`, which need not be all there: magic and length are
/// right, the rest is as it is.
pub(crate) fn head(input: &[u8]) -> Result<ChunkHeader, Damage> {
    if let Some(&found) = input.first_chunk()
        && found != MAGIC
    {
        return Err(Damage::Magic { found });
    }
    let Ok((header, _)) = ChunkHeader::read_from_prefix(input) else {
        let (needed, available) = (u64::from(OVERHEAD_BYTES), input.len() as u64);
        return Err(Damage::Cut { needed, available });
    };
    let length = header.length.get();
    if !(OVERHEAD_BYTES..=MAX_CHUNK_BYTES).contains(&length) {
        let (least, most) = (OVERHEAD_BYTES, MAX_CHUNK_BYTES);
        return Err(Damage::Length { found: length, least, most });
    }
    Ok(header)
}

/// Looks at the header of a chunk at the start of `input`: how many bytes it has, all of them there.
pub(crate) fn measure(input: &[u8]) -> Result<(ChunkHeader, &[u8]), Damage> {
    let header = head(input)?;
    let (needed, available) = (header.length() as u64, input.len() as u64);
    let whole = input.get(..header.length()).ok_or(Damage::Cut { needed, available })?;
    Ok((header, whole))
}

/// Takes the chunk at the start of `input` apart, once its length and checksum are right.
#[inline]
pub(crate) fn parse(input: &[u8]) -> Result<Framed<'_>, Damage> {
    let (header, bytes) = measure(input)?;
    let checksum = check_sum(bytes)?;
    Ok(take_apart(&header, bytes, checksum))
}

/// Takes a measured chunk apart, whatever its checksum.
pub(crate) fn take_apart<'a>(header: &ChunkHeader, bytes: &'a [u8], checksum: u32) -> Framed<'a> {
    let flags = header.flags.get();
    let trailer = bytes.len().saturating_sub(TRAILER_BYTES as usize);
    let previous = bytes.get(trailer..).and_then(<[u8]>::first_chunk);
    let strange = if flags & !KNOWN_FLAGS != 0 {
        Some(Damage::Flags { found: flags, known: KNOWN_FLAGS })
    } else if header.reserved.get() != 0 {
        Some(Damage::Reserved { found: u32::from(header.reserved.get()) })
    } else {
        None
    };
    Framed {
        label: Label {
            sequence: header.sequence.get(),
            previous: previous.copied().map_or(0, u32::from_le_bytes),
            kind: RecordKind(header.kind.get()),
            version: header.version.get(),
            mandatory: flags & MANDATORY != 0,
            last: flags & LAST != 0,
        },
        strange,
        bytes,
        payload: bytes.get(HEADER_BYTES as usize..trailer).unwrap_or_default(),
        checksum,
    }
}

/// Ties a chunk to the one before; `None` where `out` is too short for a trailer.
pub(crate) fn set_previous(out: &mut [u8], previous: u32) -> Option<()> {
    let (_, trailer) = out.split_last_chunk_mut::<{ TRAILER_BYTES as usize }>()?;
    *trailer.first_chunk_mut()? = previous.to_le_bytes();
    Some(())
}

/// The place for the message in `out`, which is the whole chunk.
pub(crate) fn payload_mut(out: &mut [u8]) -> Option<&mut [u8]> {
    let trailer = out.len().checked_sub(TRAILER_BYTES as usize)?;
    out.get_mut(HEADER_BYTES as usize..trailer)
}

/// Puts header and trailer around the message that is in `out`; `None` where `out` is no chunk.
#[inline]
pub(crate) fn finish(out: &mut [u8], label: &Label) -> Option<u32> {
    let last = if label.last { LAST } else { 0 };
    let mandatory = if label.mandatory { MANDATORY } else { 0 };
    let header = ChunkHeader {
        magic: MAGIC,
        length: U32::new(u32::try_from(out.len()).ok()?),
        sequence: U32::new(label.sequence),
        kind: U16::new(label.kind.0),
        version: U16::new(label.version),
        flags: U16::new(last | mandatory),
        reserved: U16::ZERO,
    };
    out.first_chunk_mut::<{ HEADER_BYTES as usize }>()?.copy_from_slice(header.as_bytes());
    set_previous(out, label.previous)?;
    seal(out)
}
