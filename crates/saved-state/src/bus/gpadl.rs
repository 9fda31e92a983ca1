//! A GPADL: a list of the guest's pages, which is most of what a bus has to save.

use crate::bus::flat::Flat;
use crate::bus::{BUS_GPADL, GPADL_STEPS, GpadlStep, MAX_WORD_BYTES};
use crate::error::{FieldError, FieldProblem};
use crate::kind::{KindInfo, SINCE_V1};
use crate::protobuf::{Counter, Message, Sink};
use crate::record::{Decode, Encode, EncodeError, Record};
use crate::schema::{self, Field, Fields, Found, Shape, Value};

/// The words of a GPADL, wherever they are: per range its bytes (low half) and its offset into the first
/// page (high half), then its page frames.
pub trait Words {
    /// Bytes that the words take: 8 each.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes them, little-endian, into `room`, which is [`Self::len`] bytes long.
    fn write(&self, room: &mut [u8]);
}

/// As they were written.
impl Words for &[u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn write(&self, room: &mut [u8]) {
        room.copy_from_slice(self);
    }
}

/// A GPADL. In the order of offers, then of ids. It is never split: with all the words that its messages
/// can count it takes less than 64 KiB.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BusGpadlRecord<W> {
    /// The number of its channel's offer.
    pub offer: u64,
    /// What the guest calls it.
    pub gpadl: u32,
    /// How far it has come.
    pub step: GpadlStep,
    /// The device has it mapped.
    pub in_use: bool,
    /// Ranges that its words describe.
    pub ranges: u32,
    /// *Assembling*: words announced. Else 0: all are there.
    pub words_total: u32,
    /// The words that are there.
    pub words: W,
}

const FIELDS: &[Field] = &[
    Field::new(1, "offer", Shape::Uint64).required(),
    Field::new(2, "gpadl", Shape::Uint32),
    Field::new(3, "step", Shape::Enum(GPADL_STEPS)).required(),
    Field::new(4, "in_use", Shape::Bool),
    Field::new(5, "ranges", Shape::Uint32).required(),
    Field::new(6, "words_total", Shape::Uint32),
    Field::new(7, "words", Shape::Bytes { most: MAX_WORD_BYTES }),
];

pub(super) const KIND: &KindInfo = &KindInfo {
    kind: BUS_GPADL,
    name: "bus.gpadl",
    mandatory: true,
    versions: SINCE_V1,
    fields: FIELDS,
    check: |payload| schema::check(payload, FIELDS),
};

impl<W> Record for BusGpadlRecord<W> {
    const KIND: &'static KindInfo = KIND;
}

impl<W: Words> BusGpadlRecord<W> {
    #[inline]
    fn put(&self, to: &mut impl Message) {
        self.offer.put(1, to);
        self.gpadl.put(2, to);
        self.step.put(3, to);
        self.in_use.put(4, to);
        self.ranges.put(5, to);
        self.words_total.put(6, to);
        to.filled(7, self.words.len(), |room| self.words.write(room));
    }

    /// Whether a reader will take it. What is required stands in the first, third and fifth place of the
    /// table.
    fn check(&self) -> Result<(), FieldError> {
        let [offer, _, step, _, ranges, _, words] = FIELDS else { return Ok(()) };
        self.offer.check(offer)?;
        self.step.check(step)?;
        self.ranges.check(ranges)?;
        if self.words.len() > MAX_WORD_BYTES {
            let (found, most) = (self.words.len() as u64, MAX_WORD_BYTES as u64);
            let (number, name) = (words.number, words.name);
            return Err(FieldError { number, name, problem: FieldProblem::Length { found, most } });
        }
        Ok(())
    }
}

impl<W: Words> Encode for BusGpadlRecord<W> {
    #[inline]
    fn encoded_len(&self) -> usize {
        let mut counter = Counter::default();
        self.put(&mut counter);
        counter.bytes
    }

    #[inline]
    fn encode(&self, out: &mut [u8]) -> Result<(), EncodeError> {
        self.check().map_err(EncodeError::Field)?;
        let mut sink = Sink::new(out);
        self.put(&mut sink);
        if sink.is_full() { Ok(()) } else { Err(EncodeError::Length) }
    }
}

impl<'a> Decode<'a> for BusGpadlRecord<&'a [u8]> {
    fn decode(payload: &'a [u8]) -> Result<Self, FieldError> {
        let mut record = Self::default();
        for found in Fields::new(payload, FIELDS) {
            let Found { number, value, .. } = found?;
            match (number, value) {
                (1, Value::Uint64(found)) => record.offer = found,
                (2, Value::Uint32(found)) => record.gpadl = found,
                (3, value) => record.step = Flat::take(value).unwrap_or_default(),
                (4, Value::Bool(found)) => record.in_use = found,
                (5, Value::Uint32(found)) => record.ranges = found,
                (6, Value::Uint32(found)) => record.words_total = found,
                (7, Value::Bytes(found)) => record.words = found,
                _ => {} // from a later version
            }
        }
        Ok(record)
    }
}
