//! A GPADL and its record. Nearly all of a bus's state is page frames of these.

use kmcl::bus::{GpadlPages, PageRange};
use saved_state::bus::{BusGpadlRecord, Filled, GpadlStep, MAX_WORD_BYTES};
use vmbus_wire::PAGE_SIZE_U32;
use vmbus_wire::ranges::{RangeError, pages_spanned};

use crate::gpadl::{Assembly, Gpadl, GpadlState};
use crate::offer::OfferId;
use crate::saved::check::Place;
use crate::saved::error::{Misfit, RestoreError};
use crate::shape::RamMap;

type Checked<T> = Result<T, RestoreError>;

/// Bytes of a range in a record: its length and its offset.
const RANGE_BYTES: usize = 8;

/// Bytes of a page frame in a record.
const fn pfn_bytes(wide: bool) -> usize {
    if wide { 8 } else { 4 }
}

/// A list of a GPADL where it lies.
#[derive(Clone, Copy)]
pub(super) enum HeldList<'a> {
    Nothing,
    Received(&'a [u64]),
    Ranges(&'a [PageRange]),
    Pfns { ranges: &'a [PageRange], wide: bool },
}

impl Filled for HeldList<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Received(words) => size_of_val(*words),
            Self::Ranges(ranges) => RANGE_BYTES * ranges.len(),
            Self::Pfns { ranges, wide } => {
                pfn_bytes(*wide) * ranges.iter().map(|range| range.pfns.len()).sum::<usize>()
            }
        }
    }

    fn fill(&self, mut room: &mut [u8]) {
        match self {
            Self::Nothing => {}
            Self::Received(words) => fill_words(room, words),
            Self::Ranges(ranges) => {
                let (rooms, _) = room.as_chunks_mut::<RANGE_BYTES>();
                for (room, range) in rooms.iter_mut().zip(*ranges) {
                    // The offset comes second, and so in the high half.
                    let word = u64::from(range.byte_offset) << 32 | u64::from(range.byte_count);
                    *room = word.to_le_bytes();
                }
            }
            Self::Pfns { ranges, wide } => {
                for PageRange { pfns, .. } in *ranges {
                    let bytes = pfn_bytes(*wide) * pfns.len();
                    // The room is as long as `len` says.
                    let Some((now, later)) = room.split_at_mut_checked(bytes) else { return };
                    if *wide {
                        fill_words(now, pfns)
                    } else {
                        fill_narrow(now, pfns)
                    }
                    room = later;
                }
            }
        }
    }
}

fn fill_words(room: &mut [u8], words: &[u64]) {
    let (rooms, _) = room.as_chunks_mut();
    rooms.iter_mut().zip(words).for_each(|(room, word)| *room = word.to_le_bytes());
}

#[expect(clippy::cast_possible_truncation, reason = "no page frame has more bits than 32")]
fn fill_narrow(room: &mut [u8], pfns: &[u64]) {
    let (rooms, _) = room.as_chunks_mut();
    rooms.iter_mut().zip(pfns).for_each(|(room, pfn)| *room = (*pfn as u32).to_le_bytes());
}

/// `wide`: page frames of this guest's RAM need more than 32 bits.
pub(super) fn to_record(
    (offer, gpadl): (OfferId, u32),
    held: &Gpadl,
    wide: bool,
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
            let GpadlPages { ranges, read_only: _ } = pages; // no message says that it is
            let pfns = HeldList::Pfns { ranges, wide };
            BusGpadlRecord { ranges: HeldList::Ranges(ranges), wide, pfns, ..record }
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
    let (words, rest) = record.received.as_chunks();
    whole_items(place, "received", record.received, rest)?;
    // A word more than there are, and two for every range; as a GPADL_HEADER can announce.
    let least = (words.len() as u64 + 1).max(2 * u64::from(range_count));
    let total = place.range("words_total", record.words_total.into(), least, MAX_WORDS as u64)?;
    let words = words.iter().copied().map(u64::from_le_bytes).collect();
    Ok(Assembly { words, words_total: usize::try_from(total).unwrap_or(usize::MAX), range_count })
}

/// A list ends with an item, not inside of one.
fn whole_items(place: Place, field: &'static str, list: &[u8], rest: &[u8]) -> Checked<()> {
    let found = list.len() as u64;
    if rest.is_empty() { Ok(()) } else { Err(place.wrong(field, Misfit::Length { found })) }
}

fn whole_pages(place: Place, record: &BusGpadlRecord<&[u8]>, ram: &RamMap) -> Checked<GpadlPages> {
    let (ranges, rest) = record.ranges.as_chunks::<RANGE_BYTES>();
    whole_items(place, "ranges", record.ranges, rest)?;
    let width = pfn_bytes(record.wide);
    whole_items(place, "pfns", record.pfns, record.pfns.chunks_exact(width).remainder())?;
    let pages = record.pfns.len() / width;
    place.range("pfns", (ranges.len() + pages) as u64, 0, MAX_WORDS as u64)?;
    let wrong = |error| place.wrong("ranges", Misfit::Ranges(error));
    if ranges.is_empty() {
        return Err(wrong(RangeError::NoRanges));
    }
    let mut pfns = record.pfns;
    let mut parsed = Vec::with_capacity(ranges.len());
    for (range, bytes) in (0..).zip(ranges) {
        let [a, b, c, d, e, f, g, h] = *bytes;
        let (byte_count, byte_offset) =
            (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        check_range(range, byte_count, byte_offset).map_err(wrong)?;
        let pages = pages_spanned(byte_offset, byte_count);
        let bytes = usize::try_from(pages).ok().and_then(|pages| pages.checked_mul(width));
        let Some((now, later)) = bytes.and_then(|bytes| pfns.split_at_checked(bytes)) else {
            return Err(wrong(RangeError::Truncated { range, pages, words: pfns.len() / width }));
        };
        pfns = later;
        let pfns = if record.wide { widened::<8>(now) } else { widened::<4>(now) };
        if let Some(pfn) = ram.first_outside(&pfns) {
            return Err(place.wrong("pfns", Misfit::NotRam { pfn }));
        }
        parsed.push(PageRange { byte_count, byte_offset, pfns });
    }
    if !pfns.is_empty() {
        return Err(wrong(RangeError::TrailingWords { words: pfns.len() / width }));
    }
    Ok(GpadlPages { ranges: parsed, read_only: false }) // no message says otherwise
}

/// The rules for a range of a guest's, but for its pages.
fn check_range(range: u32, byte_count: u32, byte_offset: u32) -> Result<(), RangeError> {
    if byte_count == 0 {
        return Err(RangeError::Empty { range });
    }
    if byte_offset >= PAGE_SIZE_U32 {
        return Err(RangeError::ByteOffset { range, byte_offset });
    }
    match byte_count.checked_add(byte_offset) {
        Some(_) => Ok(()),
        None => Err(RangeError::Overflow { range, byte_count, byte_offset }),
    }
}

/// Numbers of `WIDTH` bytes.
fn widened<const WIDTH: usize>(bytes: &[u8]) -> Vec<u64> {
    const { assert!(WIDTH <= size_of::<u64>()) };
    let widen = |number: &[u8; WIDTH]| {
        let mut wide = [0; size_of::<u64>()];
        wide.iter_mut().zip(number).for_each(|(to, byte)| *to = *byte);
        u64::from_le_bytes(wide)
    };
    bytes.as_chunks().0.iter().map(widen).collect()
}
