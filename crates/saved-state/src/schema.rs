//! The fields of records, as data: what a reader checks before it uses anything, and what a tool
//! shows of a record whose meaning it does not know.

use std::fmt;

use vmbus_wire::guid::Guid;

use crate::error::{FieldError, FieldProblem};
use crate::protobuf::{Raw, Walk};

/// One field of a record.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Field {
    /// Its number in the message. Never given to another field.
    pub number: u32,
    /// Its name in the message.
    pub name: &'static str,
    /// What it holds.
    pub shape: Shape,
    /// Whether the record makes no sense without it, and so not with 0 or nothing in it, either. (An
    /// absent field is otherwise 0, `false` or empty.)
    pub required: bool,
    /// The first version of the record whose readers know it, where older ones must not skip it;
    /// else 1.
    pub since: u16,
}

impl Field {
    /// A field that may be absent, and that an older reader may skip.
    #[must_use]
    pub const fn new(number: u32, name: &'static str, shape: Shape) -> Self {
        Self { number, name, shape, required: false, since: 1 }
    }

    /// The same, required.
    #[must_use]
    pub const fn required(self) -> Self {
        Self { required: true, ..self }
    }

    /// The same, since version `since` of the record.
    #[must_use]
    pub const fn since(self, since: u16) -> Self {
        Self { since, ..self }
    }

    fn error(&self, problem: FieldProblem) -> FieldError {
        FieldError { number: self.number, name: self.name, problem }
    }

    /// Whether so many bytes are within the field's bound.
    #[inline]
    pub(crate) fn holds(&self, bytes: &[u8]) -> Result<(), FieldError> {
        let (Shape::Bytes { most } | Shape::Text { most }) = self.shape else { return Ok(()) };
        if bytes.len() <= most {
            return Ok(());
        }
        let (found, most) = (bytes.len() as u64, most as u64);
        Err(self.error(FieldProblem::Length { found, most }))
    }

    /// Checks what was found against what the field may hold.
    #[inline]
    fn check<'a>(&self, raw: Raw<'a>) -> Result<Value<'a>, FieldProblem> {
        let range = |found: u64, most: u64| {
            if found <= most { Ok(found) } else { Err(FieldProblem::Range { found, most }) }
        };
        let length = |bytes: &'a [u8], most: usize| {
            let (found, most_bytes) = (bytes.len() as u64, most as u64);
            if bytes.len() <= most {
                Ok(bytes)
            } else {
                Err(FieldProblem::Length { found, most: most_bytes })
            }
        };
        Ok(match (self.shape, raw) {
            (Shape::Bool, Raw::Varint(found)) => Value::Bool(range(found, 1)? == 1),
            (Shape::Uint32, Raw::Varint(found)) => {
                let beyond = FieldProblem::Range { found, most: u64::from(u32::MAX) };
                Value::Uint32(u32::try_from(found).map_err(|_| beyond)?)
            }
            (Shape::Uint64, Raw::Varint(found)) | (Shape::Fixed64, Raw::Fixed64(found)) => {
                Value::Uint64(found)
            }
            (Shape::Enum(names), Raw::Varint(found)) => {
                let at = usize::try_from(found).ok();
                let name = at.and_then(|at| names.get(at)).copied();
                let name = name.ok_or(FieldProblem::Enumeration { found })?;
                // A place in a list of names.
                Value::Enum { number: u32::try_from(found).unwrap_or(u32::MAX), name }
            }
            (Shape::Bytes { most }, Raw::Bytes(bytes)) => Value::Bytes(length(bytes, most)?),
            (Shape::Text { most }, Raw::Bytes(bytes)) => {
                let text = std::str::from_utf8(length(bytes, most)?);
                let text = text.map_err(|_| FieldProblem::Text)?;
                if let Some(found) = text.chars().find(|letter| letter.is_control()) {
                    return Err(FieldProblem::Control { found });
                }
                Value::Text(text)
            }
            (Shape::Guid, Raw::Bytes(bytes)) => {
                let found = bytes.len() as u64;
                let bytes = bytes.try_into().map_err(|_| FieldProblem::Guid { found })?;
                Value::Guid(Guid::from_bytes(bytes))
            }
            (shape, raw) => {
                let (found, expected) = (raw.wire_type(), Some(shape.wire_type()));
                return Err(FieldProblem::WireType { found, expected });
            }
        })
    }
}

/// What a field holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shape {
    /// `bool`.
    Bool,
    /// `uint32`.
    Uint32,
    /// `uint64`.
    Uint64,
    /// `fixed64`: for ids, which are large numbers more often than not.
    Fixed64,
    /// An enumeration; a value's name is at its place. The first one, 0, is the name for "not said".
    Enum(&'static [&'static str]),
    /// `bytes`, at most so many.
    Bytes {
        /// Bytes.
        most: usize,
    },
    /// `string`, at most so many bytes, without control characters: safe to show on a terminal,
    /// whoever wrote it.
    Text {
        /// Bytes.
        most: usize,
    },
    /// `bytes`: the 16 of a GUID as Windows stores it. Absent: all zeros.
    Guid,
}

impl Shape {
    fn wire_type(self) -> u8 {
        match self {
            Self::Bool | Self::Uint32 | Self::Uint64 | Self::Enum(_) => 0,
            Self::Fixed64 => 1,
            Self::Bytes { .. } | Self::Text { .. } | Self::Guid => 2,
        }
    }
}

/// What a record has in a field.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Value<'a> {
    /// For [`Shape::Bool`].
    Bool(bool),
    /// For [`Shape::Uint32`], and unknown fields of four bytes.
    Uint32(u32),
    /// For [`Shape::Uint64`] and [`Shape::Fixed64`], and other unknown numbers.
    Uint64(u64),
    /// For [`Shape::Enum`].
    Enum {
        /// Its number.
        number: u32,
        /// Its name.
        name: &'static str,
    },
    /// For [`Shape::Bytes`], and unknown fields that have a length.
    Bytes(&'a [u8]),
    /// For [`Shape::Text`].
    Text(&'a str),
    /// For [`Shape::Guid`].
    Guid(Guid),
}

impl Value<'_> {
    /// Whether it is what an absent field stands for.
    #[inline]
    fn is_default(&self) -> bool {
        match *self {
            Self::Bool(value) => !value,
            Self::Uint32(value) | Self::Enum { number: value, .. } => value == 0,
            Self::Uint64(value) => value == 0,
            Self::Bytes(bytes) => bytes.is_empty(),
            Self::Text(text) => text.is_empty(),
            Self::Guid(guid) => guid == Guid::ZERO,
        }
    }
}

/// Bytes that are shown of [`Value::Bytes`].
const SHOWN_BYTES: usize = 32;

/// For people: a number as digits, text in quotes, bytes in hexadecimal, of many only the first.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Uint32(value) => value.fmt(f),
            Self::Uint64(value) => value.fmt(f),
            Self::Enum { name, .. } => f.pad(name),
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Guid(guid) => guid.fmt(f),
            Self::Bytes(bytes) => {
                bytes.iter().take(SHOWN_BYTES).try_for_each(|byte| write!(f, "{byte:02x}"))?;
                match bytes.len() {
                    0 => f.write_str("none"),
                    len if len > SHOWN_BYTES => write!(f, "… ({len} bytes)"),
                    _ => Ok(()),
                }
            }
        }
    }
}

/// One field found in a record.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Found<'a> {
    /// Its number.
    pub number: u32,
    /// What is known of it; `None` for one from a later version.
    pub field: Option<&'static Field>,
    /// What it holds, within the bounds of the field.
    pub value: Value<'a>,
}

/// The fields of a record in the order they are in, each checked; ends with the first error. A
/// required field that never came is the last.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    walk: Walk<'a>,
    table: &'static [Field],
    /// A bit for each place in `table`. Tables are shorter than 64: tests see to it.
    seen: u64,
    over: bool,
}

impl<'a> Fields<'a> {
    /// The fields in `payload`, the message of a record with the fields in `table`.
    #[must_use]
    pub fn new(payload: &'a [u8], table: &'static [Field]) -> Self {
        Self { walk: Walk::new(payload), table, seen: 0, over: false }
    }

    fn lookup(&self, number: u32) -> Option<(usize, &'static Field)> {
        // Most tables count from 1 without a gap.
        let guess = (number as usize).wrapping_sub(1);
        match self.table.get(guess) {
            Some(field) if field.number == number => Some((guess, field)),
            _ => self.table.iter().enumerate().find(|(_, field)| field.number == number),
        }
    }

    #[cold]
    fn error(&self, number: u32, problem: FieldProblem) -> FieldError {
        let name = self.lookup(number).map_or("", |(_, field)| field.name);
        FieldError { number, name, problem }
    }

    /// The first required field that did not come.
    fn missing(&self) -> Option<FieldError> {
        let mut places = self.table.iter().zip(0..);
        let missing = places.find(|(field, at)| field.required && self.seen >> at & 1 == 0);
        missing.map(|(field, _)| field.error(FieldProblem::Missing))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Found<'a>, FieldError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let (number, raw) = match self.walk.next() {
            Some(Ok(found)) => found,
            Some(Err((number, problem))) => {
                self.over = true;
                return Some(Err(self.error(number, problem)));
            }
            None => {
                self.over = true;
                return self.missing().map(Err);
            }
        };
        let Some((place, field)) = self.lookup(number) else {
            return Some(Ok(Found { number, field: None, value: raw.value() }));
        };
        match field.check(raw) {
            Ok(value) => {
                // Writers leave it out then: what says no more than its absence is taken for that.
                // The last one counts.
                self.seen &= !(1 << place);
                self.seen |= u64::from(!value.is_default()) << place;
                Some(Ok(Found { number, field: Some(field), value }))
            }
            Err(problem) => {
                self.over = true;
                Some(Err(field.error(problem)))
            }
        }
    }
}

/// Checks every field of a record.
///
/// # Errors
/// The first field that is not what `table` says, with the numbers.
pub fn check(payload: &[u8], table: &'static [Field]) -> Result<(), FieldError> {
    Fields::new(payload, table).try_for_each(|found| found.map(drop))
}
