//! The few parts of the protobuf encoding that records need, over borrowed bytes.
//!
//! `prost` encodes and decodes messages that own their bytes. What is written by the hundred is
//! written from, and read into, slices; what is read is walked through once before anything else is
//! done with it. Groups, which no message of ours has, are refused.

use crate::error::FieldProblem;
use crate::schema::Value;

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const LENGTH: u8 = 2;
const FIXED32: u8 = 5;

/// Bytes of the longest varint.
const VARINT_BYTES: usize = 10;

/// Largest field number.
const MAX_NUMBER: u64 = (1 << 29) - 1;

/// Takes the fields of a message in ascending order. What is 0, `false` or empty is left out, as
/// proto3 demands.
pub(crate) trait Message {
    fn varint(&mut self, number: u32, value: u64);
    fn fixed64(&mut self, number: u32, value: u64);
    fn bytes(&mut self, number: u32, value: &[u8]);

    /// So many bytes that `fill` writes: for what is not one slice where it comes from.
    fn filled(&mut self, number: u32, len: usize, fill: impl FnOnce(&mut [u8]));

    fn bool(&mut self, number: u32, value: bool) {
        self.varint(number, u64::from(value));
    }

    fn uint32(&mut self, number: u32, value: u32) {
        self.varint(number, u64::from(value));
    }
}

/// Bytes of `value` as a varint.
#[inline]
pub(crate) fn varint_len(value: u64) -> usize {
    // One byte for each seven bits, and one for 0: a multiplication instead of a division.
    let bits = 64 - (value | 1).leading_zeros();
    ((bits * 9 + 64) / 64) as usize
}

fn key(number: u32, wire_type: u8) -> u64 {
    u64::from(number) << 3 | u64::from(wire_type)
}

/// Counts the bytes of a message.
#[derive(Default)]
pub(crate) struct Counter {
    pub(crate) bytes: usize,
}

impl Message for Counter {
    #[inline]
    fn varint(&mut self, number: u32, value: u64) {
        if value != 0 {
            self.bytes += varint_len(key(number, VARINT)) + varint_len(value);
        }
    }

    #[inline]
    fn fixed64(&mut self, number: u32, value: u64) {
        if value != 0 {
            self.bytes += varint_len(key(number, FIXED64)) + 8;
        }
    }

    #[inline]
    fn bytes(&mut self, number: u32, value: &[u8]) {
        if !value.is_empty() {
            self.filled(number, value.len(), |_| ());
        }
    }

    #[inline]
    fn filled(&mut self, number: u32, len: usize, _: impl FnOnce(&mut [u8])) {
        if len != 0 {
            self.bytes += varint_len(key(number, LENGTH)) + varint_len(len as u64) + len;
        }
    }
}

/// Writes a message into room that was counted before.
pub(crate) struct Sink<'a> {
    room: &'a mut [u8],
    overrun: bool,
}

impl<'a> Sink<'a> {
    pub(crate) fn new(room: &'a mut [u8]) -> Self {
        Self { room, overrun: false }
    }

    /// Whether the room was filled exactly.
    pub(crate) fn is_full(&self) -> bool {
        self.room.is_empty() && !self.overrun
    }

    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        match std::mem::take(&mut self.room).split_at_mut_checked(bytes.len()) {
            Some((head, tail)) => {
                head.copy_from_slice(bytes);
                self.room = tail;
            }
            None => self.overrun = true,
        }
    }

    #[inline]
    fn put_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.put(&[low_bits(value) | 0x80]);
            value >>= 7;
        }
        self.put(&[low_bits(value)]);
    }
}

#[inline]
fn low_bits(value: u64) -> u8 {
    let [low, ..] = value.to_le_bytes();
    low & 0x7f
}

impl Message for Sink<'_> {
    #[inline]
    fn varint(&mut self, number: u32, value: u64) {
        if value != 0 {
            self.put_varint(key(number, VARINT));
            self.put_varint(value);
        }
    }

    #[inline]
    fn fixed64(&mut self, number: u32, value: u64) {
        if value != 0 {
            self.put_varint(key(number, FIXED64));
            self.put(&value.to_le_bytes());
        }
    }

    #[inline]
    fn bytes(&mut self, number: u32, value: &[u8]) {
        if !value.is_empty() {
            self.put_varint(key(number, LENGTH));
            self.put_varint(value.len() as u64);
            self.put(value);
        }
    }

    #[inline]
    fn filled(&mut self, number: u32, len: usize, fill: impl FnOnce(&mut [u8])) {
        if len == 0 {
            return;
        }
        self.put_varint(key(number, LENGTH));
        self.put_varint(len as u64);
        match std::mem::take(&mut self.room).split_at_mut_checked(len) {
            Some((head, tail)) => {
                fill(head);
                self.room = tail;
            }
            None => self.overrun = true,
        }
    }
}

/// What stands in a field, as far as the encoding tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Raw<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
}

impl<'a> Raw<'a> {
    pub(crate) fn wire_type(self) -> u8 {
        match self {
            Self::Varint(_) => VARINT,
            Self::Fixed64(_) => FIXED64,
            Self::Fixed32(_) => FIXED32,
            Self::Bytes(_) => LENGTH,
        }
    }

    /// The value of a field of which nothing else is known.
    pub(crate) fn value(self) -> Value<'a> {
        match self {
            Self::Varint(value) | Self::Fixed64(value) => Value::Uint64(value),
            Self::Fixed32(value) => Value::Uint32(value),
            Self::Bytes(bytes) => Value::Bytes(bytes),
        }
    }
}

/// Number and content of each field of a message; stops at the first that makes no sense.
#[derive(Clone, Debug)]
pub(crate) struct Walk<'a> {
    rest: &'a [u8],
}

impl<'a> Walk<'a> {
    pub(crate) fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, FieldProblem> {
        if let Some((&byte, rest)) = self.rest.split_first()
            && byte < 0x80
        {
            self.rest = rest;
            return Ok(u64::from(byte));
        }
        self.long_varint()
    }

    fn long_varint(&mut self) -> Result<u64, FieldProblem> {
        let mut value: u64 = 0;
        for (&byte, place) in self.rest.iter().zip(0..VARINT_BYTES) {
            let bits = u64::from(byte & 0x7f);
            let shifted = bits << (7 * place);
            if shifted >> (7 * place) != bits {
                return Err(FieldProblem::Varint);
            }
            value |= shifted;
            if byte < 0x80 {
                self.rest = self.rest.get(place + 1..).unwrap_or_default();
                return Ok(value);
            }
        }
        let left = self.rest.len();
        if left >= VARINT_BYTES {
            return Err(FieldProblem::Varint);
        }
        Err(FieldProblem::Cut { needed: left as u64 + 1, left: left as u64 })
    }

    #[inline]
    fn take(&mut self, needed: u64) -> Result<&'a [u8], FieldProblem> {
        let split = usize::try_from(needed).ok().and_then(|len| self.rest.split_at_checked(len));
        let cut = FieldProblem::Cut { needed, left: self.rest.len() as u64 };
        let (taken, rest) = split.ok_or(cut)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FieldProblem> {
        let left = self.rest.len() as u64;
        let (taken, rest) =
            self.rest.split_first_chunk().ok_or(FieldProblem::Cut { needed: N as u64, left })?;
        self.rest = rest;
        Ok(*taken)
    }

    #[inline]
    fn content(&mut self, wire_type: u8) -> Result<Raw<'a>, FieldProblem> {
        Ok(match wire_type {
            VARINT => Raw::Varint(self.varint()?),
            FIXED64 => Raw::Fixed64(u64::from_le_bytes(self.array()?)),
            LENGTH => {
                let len = self.varint()?;
                Raw::Bytes(self.take(len)?)
            }
            FIXED32 => Raw::Fixed32(u32::from_le_bytes(self.array()?)),
            found => return Err(FieldProblem::WireType { found, expected: None }),
        })
    }
}

impl<'a> Iterator for Walk<'a> {
    /// On an error, the field's number comes with it; 0 where that is not known.
    type Item = Result<(u32, Raw<'a>), (u32, FieldProblem)>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let key = match self.varint() {
            Ok(key) => key,
            Err(problem) => return Some(Err((0, problem))),
        };
        let number = match u32::try_from(key >> 3) {
            Ok(number @ 1..) if u64::from(number) <= MAX_NUMBER => number,
            _ => return Some(Err((0, FieldProblem::Number { found: key >> 3 }))),
        };
        Some(match self.content(low_bits(key) & 7) {
            Ok(raw) => Ok((number, raw)),
            Err(problem) => Err((number, problem)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(value: u64) -> Vec<u8> {
        let mut room = vec![0; varint_len(value)];
        let mut sink = Sink::new(&mut room);
        sink.put_varint(value);
        assert!(sink.is_full(), "{value:#x}");
        room
    }

    #[test]
    fn varints_at_every_edge_are_counted_written_and_read() {
        for shift in 0..64 {
            for value in [(1_u64 << shift) - 1, 1 << shift, u64::MAX >> shift] {
                let bytes = written(value);
                assert_eq!(
                    bytes.len(),
                    prost::length_delimiter_len(usize::try_from(value).unwrap())
                );
                let mut walk = Walk::new(&bytes);
                assert_eq!(walk.varint(), Ok(value));
                assert!(walk.rest.is_empty());
                for cut in 0..bytes.len() {
                    let left = cut as u64;
                    assert_eq!(
                        Walk::new(&bytes[..cut]).varint(),
                        Err(FieldProblem::Cut { needed: left + 1, left })
                    );
                }
            }
        }
    }

    #[test]
    fn a_varint_has_at_most_64_bits() {
        for (bytes, expected) in [
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01][..], Ok(u64::MAX)),
            (
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02],
                Err(FieldProblem::Varint),
            ),
            (&[0x80; 10], Err(FieldProblem::Varint)),
            (&[0x80; 20], Err(FieldProblem::Varint)),
            (&[0x81, 0x80, 0x00], Ok(1)), // longer than needed, as protobuf allows
        ] {
            assert_eq!(Walk::new(bytes).varint(), expected, "{bytes:02x?}");
        }
    }

    #[test]
    fn what_no_message_has_is_refused() {
        for (bytes, number, problem) in [
            (&[0x0b_u8, 0x0c][..], 1, FieldProblem::WireType { found: 3, expected: None }),
            (&[0x0c], 1, FieldProblem::WireType { found: 4, expected: None }),
            (&[0x0e], 1, FieldProblem::WireType { found: 6, expected: None }),
            (&[0x0f], 1, FieldProblem::WireType { found: 7, expected: None }),
            (&[0x00, 0x00], 0, FieldProblem::Number { found: 0 }),
            (&[0x80, 0x80, 0x80, 0x80, 0x10, 0x00], 0, FieldProblem::Number { found: 1 << 29 }),
            (&[0x0d, 1, 2, 3], 1, FieldProblem::Cut { needed: 4, left: 3 }),
            (&[0x09, 1, 2, 3], 1, FieldProblem::Cut { needed: 8, left: 3 }),
            (
                // Ten gigabytes claimed in ten bytes.
                &[0x0a, 0x80, 0x80, 0x80, 0x80, 0x28, 1, 2, 3, 4],
                1,
                FieldProblem::Cut { needed: 10 << 30, left: 4 },
            ),
        ] {
            assert_eq!(Walk::new(bytes).next(), Some(Err((number, problem))), "{bytes:02x?}");
        }
    }

    #[test]
    fn a_sink_never_writes_past_its_room() {
        let mut room = [0; 3];
        let mut sink = Sink::new(&mut room);
        sink.bytes(1, &[7; 4]);
        assert!(!sink.is_full());
        let mut room = [0; 9];
        let mut sink = Sink::new(&mut room);
        sink.bytes(1, &[7; 4]);
        assert!(!sink.is_full(), "too little is no better");
    }
}
