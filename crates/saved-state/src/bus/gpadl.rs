//! A GPADL: a list of the guest's pages, which is most of what a bus has to save.

use crate::bus::flat::Flat;
use crate::bus::{BUS_GPADL, GPADL_STEPS, GpadlStep, MAX_WORD_BYTES};
use crate::error::{FieldError, FieldProblem};
use crate::kind::{KindInfo, SINCE_V1};
use crate::protobuf::{Counter, Message, Sink};
use crate::record::{Decode, Encode, EncodeError, Record};
use crate::schema::{self, Field, Fields, Found, Shape, Value};

/// Bytes of a record that are written where they belong, wherever they come from.
pub trait Filled {
    /// How many.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes them into `room`, which is [`Self::len`] bytes long.
    fn fill(&self, room: &mut [u8]);
}

/// As they were written.
impl Filled for &[u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn fill(&self, room: &mut [u8]) {
        room.copy_from_slice(self);
    }
}

/// A GPADL. In the order of offers, then of ids. It is never split: with all that its messages can
/// describe it takes less than 128 KiB.
///
/// Numbers in its lists are little-endian.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BusGpadlRecord<B> {
    /// The number of its channel's offer.
    pub offer: u64,
    /// What the guest calls it.
    pub gpadl: u32,
    /// How far it has come.
    pub step: GpadlStep,
    /// The device has it mapped.
    pub in_use: bool,
    /// *Assembling*: ranges announced.
    pub range_count: u32,
    /// *Assembling*: words announced, of 8 bytes.
    pub words_total: u32,
    /// *Assembling*: the words that are there, as in the guest's messages.
    pub received: B,
    /// Else: of each range its length in bytes and its offset into the first page, 4 bytes each.
    pub ranges: B,
    /// Else: page frames have 8 bytes, not 4.
    pub wide: bool,
    /// Else: the page frames of all ranges.
    pub pfns: B,
}

const LIST: Shape = Shape::Bytes { most: MAX_WORD_BYTES };

const FIELDS: &[Field] = &[
    Field::new(1, "offer", Shape::Uint64).required(),
    Field::new(2, "gpadl", Shape::Uint32),
    Field::new(3, "step", Shape::Enum(GPADL_STEPS)).required(),
    Field::new(4, "in_use", Shape::Bool),
    Field::new(5, "range_count", Shape::Uint32),
    Field::new(6, "words_total", Shape::Uint32),
    Field::new(7, "received", LIST),
    Field::new(8, "ranges", LIST),
    Field::new(9, "wide", Shape::Bool),
    Field::new(10, "pfns", LIST),
];

pub(super) const KIND: &KindInfo = &KindInfo {
    kind: BUS_GPADL,
    name: "bus.gpadl",
    mandatory: true,
    versions: SINCE_V1,
    fields: FIELDS,
    check: |payload| schema::check(payload, FIELDS),
};

impl<B> Record for BusGpadlRecord<B> {
    const KIND: &'static KindInfo = KIND;
}

impl<B: Filled> BusGpadlRecord<B> {
    #[inline]
    fn put(&self, to: &mut impl Message) {
        self.offer.put(1, to);
        self.gpadl.put(2, to);
        self.step.put(3, to);
        self.in_use.put(4, to);
        self.range_count.put(5, to);
        self.words_total.put(6, to);
        to.filled(7, self.received.len(), |room| self.received.fill(room));
        to.filled(8, self.ranges.len(), |room| self.ranges.fill(room));
        self.wide.put(9, to);
        to.filled(10, self.pfns.len(), |room| self.pfns.fill(room));
    }

    /// Whether a reader will take it.
    fn check(&self) -> Result<(), FieldError> {
        let [offer, _, step, _, _, _, received, ranges, _, pfns] = FIELDS else { return Ok(()) };
        self.offer.check(offer)?;
        self.step.check(step)?;
        for (field, list) in
            [(received, &self.received), (ranges, &self.ranges), (pfns, &self.pfns)]
        {
            if list.len() > MAX_WORD_BYTES {
                let (found, most) = (list.len() as u64, MAX_WORD_BYTES as u64);
                let problem = FieldProblem::Length { found, most };
                return Err(FieldError { number: field.number, name: field.name, problem });
            }
        }
        Ok(())
    }
}

impl<B: Filled> Encode for BusGpadlRecord<B> {
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
                (5, Value::Uint32(found)) => record.range_count = found,
                (6, Value::Uint32(found)) => record.words_total = found,
                (7, Value::Bytes(found)) => record.received = found,
                (8, Value::Bytes(found)) => record.ranges = found,
                (9, Value::Bool(found)) => record.wide = found,
                (10, Value::Bytes(found)) => record.pfns = found,
                _ => {} // from a later version
            }
        }
        Ok(record)
    }
}
