//! A record without a chunk: what a device keeps in the bytes that it saves with a packet.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 2 | kind |
//! | 2 | 2 | version |
//! | 4 | | the message |
//!
//! There is no checksum and no length: the record that the bytes are part of has both.

use crate::error::FieldError;
use crate::kind::RecordKind;
use crate::record::{Decode, Encode};

/// Bytes before the message.
const PREFIX_BYTES: usize = 4;

/// Why bytes are not the record that was expected.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BareError {
    /// Too short for kind and version.
    #[error("{found} bytes, too few for a record")]
    Cut {
        /// Bytes there.
        found: usize,
    },
    /// Another record.
    #[error("a record of kind {found}, not {expected}")]
    Kind {
        /// What it is.
        found: RecordKind,
        /// What was expected.
        expected: RecordKind,
    },
    /// A later version than is known.
    #[error("record {record} has version {found}, known are those up to {newest}")]
    Version {
        /// Its name.
        record: &'static str,
        /// Its version.
        found: u16,
        /// The newest known.
        newest: u16,
    },
    /// A field is not what it may be.
    #[error("record {record}: {why}")]
    Record {
        /// Its name.
        record: &'static str,
        /// What is wrong.
        why: FieldError,
    },
}

/// Bytes that [`encode`] writes.
#[must_use]
pub fn encoded_len<R: Encode>(record: &R) -> usize {
    PREFIX_BYTES + record.encoded_len()
}

/// Writes a record, in its newest version, to the start of `out` and returns how many bytes it takes;
/// `None` where there is too little room, or the record states a wrong length.
#[must_use]
pub fn encode<R: Encode>(record: &R, out: &mut [u8]) -> Option<usize> {
    let bytes = encoded_len(record);
    let (prefix, message) = out.get_mut(..bytes)?.split_first_chunk_mut::<PREFIX_BYTES>()?;
    let [a, b] = R::KIND.kind.0.to_le_bytes();
    let [c, d] = R::KIND.newest().to_le_bytes();
    *prefix = [a, b, c, d];
    record.encode(message).ok()?;
    Some(bytes)
}

/// Kind, version and message of a record that is all of `bytes`; `None` where these are too short for
/// one. Nothing of it is checked.
#[must_use]
pub fn split(bytes: &[u8]) -> Option<(RecordKind, u16, &[u8])> {
    let (&[a, b, c, d], message) = bytes.split_first_chunk()?;
    Some((RecordKind(u16::from_le_bytes([a, b])), u16::from_le_bytes([c, d]), message))
}

/// Reads a record that is all of `bytes`.
///
/// # Errors
/// [`BareError`].
pub fn decode<'a, R: Decode<'a>>(bytes: &'a [u8]) -> Result<R, BareError> {
    let split = split(bytes).ok_or(BareError::Cut { found: bytes.len() });
    let (kind, version, message) = split?;
    if kind != R::KIND.kind {
        return Err(BareError::Kind { found: kind, expected: R::KIND.kind });
    }
    let (record, newest) = (R::KIND.name, R::KIND.newest());
    if version > newest {
        return Err(BareError::Version { record, found: version, newest });
    }
    R::decode(message).map_err(|why| BareError::Record { record, why })
}
