//! What a record is: a message of a known kind that can be written into a chunk and read from one.
//!
//! Most records derive [`prost::Message`]; they are then [`Encode`] and [`Decode`] without more.

use crate::error::{FieldError, FieldProblem};
use crate::kind::KindInfo;
use crate::schema::{self, Fields};

/// A record.
pub trait Record {
    /// Its kind, names and fields.
    const KIND: &'static KindInfo;
}

/// Why a record was not encoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EncodeError {
    /// It is not as long as it stated: a mistake in its [`Encode`].
    Length,
    /// No reader would take that field.
    Field(FieldError),
}

/// A record that can be written.
///
/// It is written in its newest form, whatever version is asked for: fields have one meaning for ever,
/// and the writer refuses a field that is in use and that the version asked for does not have.
pub trait Encode: Record {
    /// Bytes of the message.
    fn encoded_len(&self) -> usize;

    /// Writes the message into `out`, which is [`Self::encoded_len`] bytes long, and sees to it that
    /// [`KindInfo::check`] will find nothing wrong with it: a state that cannot be restored must not
    /// come to be.
    ///
    /// # Errors
    /// Either [`EncodeError`]; what is in `out` is of no use then.
    fn encode(&self, out: &mut [u8]) -> Result<(), EncodeError>;
}

/// A record that can be read; it may borrow from the input.
pub trait Decode<'a>: Record + Sized {
    /// Reads a message, each field checked against [`KindInfo::fields`]. Unknown fields are skipped.
    ///
    /// # Errors
    /// The first field that is not what it may be.
    fn decode(payload: &'a [u8]) -> Result<Self, FieldError>;
}

impl<M: prost::Message + Record> Encode for M {
    fn encoded_len(&self) -> usize {
        prost::Message::encoded_len(self)
    }

    fn encode(&self, out: &mut [u8]) -> Result<(), EncodeError> {
        let mut room = &mut *out;
        prost::Message::encode(self, &mut room).map_err(|_| EncodeError::Length)?;
        if !room.is_empty() {
            return Err(EncodeError::Length);
        }
        (M::KIND.check)(out).map_err(EncodeError::Field)
    }
}

impl<M: prost::Message + Default + Record> Decode<'_> for M {
    fn decode(payload: &[u8]) -> Result<Self, FieldError> {
        // Walked through first: what is wrong is told by field and number, and nothing is allocated
        // for a record that is refused.
        (M::KIND.check)(payload)?;
        <M as prost::Message>::decode(payload).map_err(|_| FieldError {
            number: 0,
            name: "",
            problem: FieldProblem::Undecodable,
        })
    }
}

/// [`KindInfo::check`] of a record that derives [`prost::Message`]: its fields are all there is to check.
///
/// # Errors
/// The first field that is not what it may be.
pub fn check<M: prost::Message + Record>(payload: &[u8]) -> Result<(), FieldError> {
    schema::check(payload, M::KIND.fields)
}

/// The first field of a valid message that readers of `version` would skip, and must not.
pub(crate) fn too_new(kind: &KindInfo, version: u16, payload: &[u8]) -> Option<&'static str> {
    let in_use = Fields::new(payload, kind.fields).flatten();
    let mut known = in_use.filter_map(|found| found.field);
    known.find(|field| field.since > version).map(|field| field.name)
}
