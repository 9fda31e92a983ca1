//! A GPADL and its record. Nearly all of a bus's state is page frames of these.

use saved_state::bus::{BusGpadlRecord, Filled, GpadlStep, MAX_WORD_BYTES};
use vmbus_wire::PAGE_SIZE_U32;
use vmbus_wire::ranges::RangeError;

use crate::gpadl::{Assembly, Gpadl, GpadlState};
use crate::offer::OfferId;
use crate::pages::{PageSpan, Pages, PfnSlice, Pfns};
use crate::saved::check::Place;
use crate::saved::error::{Misfit, RestoreError};
use crate::shape::RamMap;

type Checked<T> = Result<T, RestoreError>;

/// Bytes of a range in a record: its length and its offset.
const RANGE_BYTES: usize = 8;

/// A list of a GPADL where it lies.
#[derive(Clone, Copy)]
pub(super) enum HeldList<'a> {
    Nothing,
    Received(&'a [u64]),
    Ranges(&'a [PageSpan]),
    Pfns(PfnSlice<'a>),
}

impl Filled for HeldList<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Received(words) => size_of_val(*words),
            Self::Ranges(ranges) => RANGE_BYTES * ranges.len(),
            Self::Pfns(PfnSlice::Narrow(pfns)) => size_of_val(*pfns),
            Self::Pfns(PfnSlice::Wide(pfns)) => size_of_val(*pfns),
        }
    }

    fn fill(&self, room: &mut [u8]) {
        match self {
            Self::Nothing => {}
            Self::Received(words) => fill(room, words, |word| word.to_le_bytes()),
            Self::Ranges(ranges) => fill(room, ranges, |range| {
                // The offset comes second, and so in the high half.
                let word = u64::from(range.byte_offset) << 32 | u64::from(range.byte_count);
                word.to_le_bytes()
            }),
            Self::Pfns(PfnSlice::Narrow(pfns)) => fill(room, pfns, |pfn| pfn.to_le_bytes()),
            Self::Pfns(PfnSlice::Wide(pfns)) => fill(room, pfns, |pfn| pfn.to_le_bytes()),
        }
    }
}

#[inline]
fn fill<T, const BYTES: usize>(room: &mut [u8], items: &[T], encoded: impl Fn(&T) -> [u8; BYTES]) {
    let (rooms, _) = room.as_chunks_mut();
    rooms.iter_mut().zip(items).for_each(|(room, item)| *room = encoded(item));
}

pub(super) fn to_record(
    (offer, gpadl): (OfferId, u32),
    held: &Gpadl,
) -> BusGpadlRecord<HeldList<'_>> {
    let step = match held.state {
        GpadlState::Assembling(_) => GpadlStep::Assembling,
        GpadlState::Created(_) => GpadlStep::Created,
        GpadlState::TearingDown(_) => GpadlStep::TearingDown,
    };
    let record = BusGpadlRecord {
        offer: offer.0,
        gpadl,
        step,
        in_use: held.in_use,
        range_count: 0,
        words_total: 0,
        received: HeldList::Nothing,
        ranges: HeldList::Nothing,
        wide: false,
        pfns: HeldList::Nothing,
    };
    match &held.state {
        GpadlState::Assembling(Assembly { words, words_total, range_count }) => BusGpadlRecord {
            range_count: u32::from(*range_count),
            words_total: u32::try_from(*words_total).unwrap_or(u32::MAX), // below 2^13
            received: HeldList::Received(words),
            ..record
        },
        GpadlState::Created(pages) | GpadlState::TearingDown(pages) => {
            let Pages { ranges, pfns } = pages;
            BusGpadlRecord {
                ranges: HeldList::Ranges(ranges),
                wide: matches!(pfns, Pfns::Wide(_)),
                pfns: HeldList::Pfns(pfns.as_slice()),
                ..record
            }
        }
    }
}

/// Most words that the messages of one GPADL can count.
const MAX_WORDS: usize = MAX_WORD_BYTES / size_of::<u64>();

pub(super) fn from_record(
    place: Place,
    record: &BusGpadlRecord<&[u8]>,
    ram: &RamMap,
) -> Checked<GpadlState> {
    if record.step == GpadlStep::Assembling {
        return assembly(place, record).map(GpadlState::Assembling);
    }
    let fields = [
        ("range_count", record.range_count != 0),
        ("words_total", record.words_total != 0),
        ("received", !record.received.is_empty()),
    ];
    place.absent(&fields, "step")?;
    let pages = whole_pages(place, record, ram)?;
    Ok(match record.step {
        GpadlStep::TearingDown => GpadlState::TearingDown(pages),
        _ => GpadlState::Created(pages),
    })
}

fn assembly(place: Place, record: &BusGpadlRecord<&[u8]>) -> Checked<Assembly> {
    let fields = [
        ("in_use", record.in_use),
        ("ranges", !record.ranges.is_empty()),
        ("wide", record.wide),
        ("pfns", !record.pfns.is_empty()),
    ];
    place.absent(&fields, "step")?;
    let range_count = place.half_word("range_count", record.range_count)?;
    place.range("range_count", range_count.into(), 1, u16::MAX.into())?;
    let words: Vec<u64> = items(place, "received", record.received, u64::from_le_bytes)?;
    // A word more than there are, and two for every range; as a GPADL_HEADER can announce.
    let least = (words.len() as u64 + 1).max(2 * u64::from(range_count));
    let total = place.range("words_total", record.words_total.into(), least, MAX_WORDS as u64)?;
    Ok(Assembly { words, words_total: usize::try_from(total).unwrap_or(usize::MAX), range_count })
}

/// The items of a list, which does not end inside of one.
#[inline]
fn items<T, const BYTES: usize>(
    place: Place,
    field: &'static str,
    list: &[u8],
    decoded: impl Fn([u8; BYTES]) -> T,
) -> Checked<Vec<T>> {
    let (items, rest) = list.as_chunks();
    if !rest.is_empty() {
        return Err(place.wrong(field, Misfit::Length { found: list.len() as u64 }));
    }
    Ok(items.iter().copied().map(decoded).collect())
}

fn whole_pages(place: Place, record: &BusGpadlRecord<&[u8]>, ram: &RamMap) -> Checked<Pages> {
    if record.wide != ram.is_wide() {
        return Err(place.wrong("wide", Misfit::Contradiction { other: "bus.ram" }));
    }
    let ranges = items(place, "ranges", record.ranges, |[a, b, c, d, e, f, g, h]| PageSpan {
        byte_count: u32::from_le_bytes([a, b, c, d]),
        byte_offset: u32::from_le_bytes([e, f, g, h]),
    })?;
    let pfns = if record.wide {
        Pfns::Wide(items(place, "pfns", record.pfns, u64::from_le_bytes)?)
    } else {
        Pfns::Narrow(items(place, "pfns", record.pfns, u32::from_le_bytes)?)
    };
    let count = pfns.as_slice().len();
    place.range("pfns", (ranges.len() + count) as u64, 0, MAX_WORDS as u64)?;
    check_ranges(&ranges, count).map_err(|error| place.wrong("ranges", Misfit::Ranges(error)))?;
    match pfns.as_slice().first_outside(ram) {
        None => Ok(Pages { ranges, pfns }),
        Some(pfn) => Err(place.wrong("pfns", Misfit::NotRam { pfn })),
    }
}

/// The rules for a guest's ranges, beside those for single page frames.
fn check_ranges(ranges: &[PageSpan], pfns: usize) -> Result<(), RangeError> {
    if ranges.is_empty() {
        return Err(RangeError::NoRanges);
    }
    let mut words = pfns;
    for (range, span) in (0..).zip(ranges) {
        let PageSpan { byte_count, byte_offset } = *span;
        if byte_count == 0 {
            return Err(RangeError::Empty { range });
        }
        if byte_offset >= PAGE_SIZE_U32 {
            return Err(RangeError::ByteOffset { range, byte_offset });
        }
        if byte_count.checked_add(byte_offset).is_none() {
            return Err(RangeError::Overflow { range, byte_count, byte_offset });
        }
        let pages = span.pages() as u64;
        words =
            words.checked_sub(span.pages()).ok_or(RangeError::Truncated { range, pages, words })?;
    }
    if words == 0 { Ok(()) } else { Err(RangeError::TrailingWords { words }) }
}
