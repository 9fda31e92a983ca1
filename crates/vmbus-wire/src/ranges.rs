//! Byte ranges over guest pages, as GPADLs and GPA-direct packets describe them.
//!
//! Both carry a list of 64-bit words: per range a header word, whose low half is the length in bytes
//! and whose high half is the offset into the first page, followed by the page frame number (PFN) of
//! each page touched. [`GpaRanges`] checks such a list once and then walks it without failing.
//!
//! The words are in the byte order of this machine; whoever copies them out of a message or a ring
//! converts them. They must be a private copy: what was checked must not change afterwards.
//!
//! Source: vmbus-wire sections 3 (message 8), 4 (packet type 9) and 5.

use core::iter::FusedIterator;

use crate::{MAX_PFN, PAGE_SHIFT, PAGE_SIZE_U32};

/// One range: `byte_count` bytes, from `byte_offset` of the first page on, over pages that need not
/// be neighbours.
///
/// Ranges that come out of [`GpaRanges`] hold to what the fields say; the fields are public so that a
/// sender can describe ranges of its own, which [`GpaRange::check`] tests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GpaRange<'a> {
    /// Length in bytes; at least 1.
    pub byte_count: u32,
    /// Start within the first page, in bytes; below 4096.
    pub byte_offset: u32,
    /// Page frame numbers, in order; exactly [`pages_spanned`] of them, none above [`MAX_PFN`].
    pub pfns: &'a [u64],
}

/// Words of a range beside its PFNs.
pub const RANGE_HEADER_WORDS: usize = 1;

/// Pages that `byte_count` bytes touch, starting `byte_offset` bytes into the first one.
#[inline]
#[must_use]
pub const fn pages_spanned(byte_offset: u32, byte_count: u32) -> u64 {
    // The sum of three 32-bit numbers fits 64 bits.
    (byte_offset as u64 + byte_count as u64 + (PAGE_SIZE_U32 as u64 - 1)) >> PAGE_SHIFT
}

impl<'a> GpaRange<'a> {
    /// The header word that precedes the PFNs of this range.
    #[inline]
    #[must_use]
    pub const fn header_word(&self) -> u64 {
        (self.byte_offset as u64) << 32 | self.byte_count as u64
    }

    /// Words that this range takes: its header and its PFNs.
    #[inline]
    #[must_use]
    pub const fn words(&self) -> usize {
        RANGE_HEADER_WORDS + self.pfns.len()
    }

    /// Tests a range of the caller's own making by the rules that hold for a peer's.
    ///
    /// # Errors
    /// [`RangeError`], for range 0; [`RangeError::TrailingWords`] where there are more PFNs than the
    /// range spans.
    pub fn check(&self) -> Result<(), RangeError> {
        match Self::from_header(0, self.header_word(), self.pfns)? {
            (_, []) => Ok(()),
            (_, rest) => Err(RangeError::TrailingWords { words: rest.len() }),
        }
    }

    /// The range whose header word is `header`, its PFNs taken from the front of `words`; and the
    /// words behind it.
    #[inline]
    fn from_header(
        range: u32,
        header: u64,
        words: &'a [u64],
    ) -> Result<(Self, &'a [u64]), RangeError> {
        let (byte_count, byte_offset) = split_header(header);
        if byte_count == 0 {
            return Err(RangeError::Empty { range });
        }
        if byte_offset >= PAGE_SIZE_U32 {
            return Err(RangeError::ByteOffset { range, byte_offset });
        }
        if byte_count.checked_add(byte_offset).is_none() {
            return Err(RangeError::Overflow { range, byte_count, byte_offset });
        }
        let pages = pages_spanned(byte_offset, byte_count);
        let split = usize::try_from(pages).ok().and_then(|pages| words.split_at_checked(pages));
        let Some((pfns, rest)) = split else {
            return Err(RangeError::Truncated { range, pages, words: words.len() });
        };
        // One test for all PFNs: a bit above the limit in any of them survives in the union.
        if pfns.iter().fold(0, |union, pfn| union | pfn) > MAX_PFN {
            return Err(pfn_error(range, pfns));
        }
        Ok((Self { byte_count, byte_offset, pfns }, rest))
    }
}

// `> MAX_PFN` of a union of bits finds exactly the unions with a bit above the limit.
const _: () = assert!((MAX_PFN + 1).is_power_of_two());

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "takes the two halves of the word apart")]
const fn split_header(header: u64) -> (u32, u32) {
    (header as u32, (header >> 32) as u32)
}

#[cold]
fn pfn_error(range: u32, pfns: &[u64]) -> RangeError {
    let pfn = pfns.iter().copied().find(|&pfn| pfn > MAX_PFN).unwrap_or_default();
    RangeError::Pfn { range, pfn }
}

/// A list of ranges that has been checked: every range touches at least one byte and has exactly the
/// PFNs it needs. Iterating gives each [`GpaRange`] in order, and cannot fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GpaRanges<'a> {
    words: &'a [u64],
    range_count: u32,
    total_bytes: u64,
}

impl<'a> GpaRanges<'a> {
    /// Checks that `words` are exactly `range_count` ranges, as in a GPADL.
    ///
    /// # Errors
    /// The first [`RangeError`] found; [`RangeError::TrailingWords`] where words are left over.
    #[inline]
    pub fn parse(words: &'a [u64], range_count: u32) -> Result<Self, RangeError> {
        match Self::parse_prefix(words, range_count)? {
            (ranges, []) => Ok(ranges),
            (_, rest) => Err(RangeError::TrailingWords { words: rest.len() }),
        }
    }

    /// Checks that `words` begin with `range_count` ranges, and gives the words behind them. For
    /// GPA-direct packets, where some guests send a fixed-size list with unused words at its end.
    ///
    /// # Errors
    /// The first [`RangeError`] found.
    #[inline]
    pub fn parse_prefix(
        words: &'a [u64],
        range_count: u32,
    ) -> Result<(Self, &'a [u64]), RangeError> {
        if range_count == 0 {
            return Err(RangeError::NoRanges);
        }
        let mut rest = words;
        let mut total_bytes = 0_u64;
        // Each turn takes two words or more, or fails: `words` bounds the loop, not the count.
        for range in 0..range_count {
            let Some((&header, after)) = rest.split_first() else {
                return Err(RangeError::Truncated { range, pages: 1, words: 0 });
            };
            let (found, after) = GpaRange::from_header(range, header, after)?;
            total_bytes += u64::from(found.byte_count);
            rest = after;
        }
        // `rest` is a tail of `words`, so that the subtraction and the split hold.
        let used = words.len() - rest.len();
        let (words, rest) = words.split_at_checked(used).unwrap_or((words, &[]));
        Ok((Self { words, range_count, total_bytes }, rest))
    }

    /// A list that was checked before, put together again from its [`words`](Self::words),
    /// [`range_count`](Self::range_count) and [`total_bytes`](Self::total_bytes) without a second
    /// check: for owners of the words who cannot keep a borrow of them beside them.
    ///
    /// All three must come from one list, and the words must not have changed. Anything else is the
    /// caller's fault: an assertion in debug builds, wrong ranges in others.
    #[inline]
    #[must_use]
    pub fn from_checked(words: &'a [u64], range_count: u32, total_bytes: u64) -> Self {
        let ranges = Self { words, range_count, total_bytes };
        debug_assert_eq!(Self::parse(words, range_count), Ok(ranges), "not as it was checked");
        ranges
    }

    /// Number of ranges; at least 1.
    #[inline]
    #[must_use]
    pub const fn range_count(&self) -> u32 {
        self.range_count
    }

    /// Bytes of all ranges together; at least 1.
    #[inline]
    #[must_use]
    pub const fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Pages of all ranges together; a page named twice counts twice.
    #[inline]
    #[must_use]
    pub const fn total_pages(&self) -> usize {
        self.words.len().saturating_sub(self.range_count as usize * RANGE_HEADER_WORDS)
    }

    /// The words that were checked, headers included.
    #[inline]
    #[must_use]
    pub const fn words(&self) -> &'a [u64] {
        self.words
    }

    /// The only range, or `None` where there are several.
    #[inline]
    #[must_use]
    pub fn single(&self) -> Option<GpaRange<'a>> {
        match (self.range_count, self.words) {
            (1, &[header, ref pfns @ ..]) => {
                let (byte_count, byte_offset) = split_header(header);
                Some(GpaRange { byte_count, byte_offset, pfns })
            }
            _ => None,
        }
    }

    /// The ranges, in order.
    #[inline]
    #[must_use]
    pub const fn iter(&self) -> GpaRangeIter<'a> {
        GpaRangeIter { words: self.words, left: self.range_count as usize }
    }
}

impl<'a> IntoIterator for GpaRanges<'a> {
    type Item = GpaRange<'a>;
    type IntoIter = GpaRangeIter<'a>;

    #[inline]
    fn into_iter(self) -> GpaRangeIter<'a> {
        self.iter()
    }
}

impl<'a> IntoIterator for &GpaRanges<'a> {
    type Item = GpaRange<'a>;
    type IntoIter = GpaRangeIter<'a>;

    #[inline]
    fn into_iter(self) -> GpaRangeIter<'a> {
        self.iter()
    }
}

/// The ranges of a [`GpaRanges`], in order.
#[derive(Clone, Debug)]
pub struct GpaRangeIter<'a> {
    words: &'a [u64],
    left: usize,
}

impl<'a> Iterator for GpaRangeIter<'a> {
    type Item = GpaRange<'a>;

    #[inline]
    fn next(&mut self) -> Option<GpaRange<'a>> {
        let (&header, after) = self.words.split_first()?;
        let (byte_count, byte_offset) = split_header(header);
        let pages = usize::try_from(pages_spanned(byte_offset, byte_count)).ok()?;
        let (pfns, rest) = after.split_at_checked(pages)?;
        self.words = rest;
        self.left = self.left.saturating_sub(1);
        Some(GpaRange { byte_count, byte_offset, pfns })
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for GpaRangeIter<'_> {}

impl FusedIterator for GpaRangeIter<'_> {}

/// Why a list of ranges was refused. Always the peer's doing. `range` counts from 0.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The list has a range count of 0.
    #[error("a list of no ranges")]
    NoRanges,
    /// The list ends before the range does.
    #[error("range {range} spans {pages} pages, {words} words are left for them")]
    Truncated {
        /// Which range.
        range: u32,
        /// Pages it spans; 1 where even its header is missing.
        pages: u64,
        /// Words left for their PFNs.
        words: usize,
    },
    /// A range of no bytes.
    #[error("range {range} has no bytes")]
    Empty {
        /// Which range.
        range: u32,
    },
    /// A range that does not start in its first page.
    #[error("range {range} starts at byte {byte_offset} of its first page, outside 0..4096")]
    ByteOffset {
        /// Which range.
        range: u32,
        /// Its offset.
        byte_offset: u32,
    },
    /// A range whose end has no 32-bit offset.
    #[error("range {range} ends beyond 32 bits: offset {byte_offset}, length {byte_count}")]
    Overflow {
        /// Which range.
        range: u32,
        /// Its length.
        byte_count: u32,
        /// Its offset.
        byte_offset: u32,
    },
    /// A page whose address does not fit 64 bits.
    #[error("range {range} names page frame {pfn:#x}, whose address exceeds 64 bits")]
    Pfn {
        /// Which range.
        range: u32,
        /// The page frame number.
        pfn: u64,
    },
    /// Words behind the last range, where there may be none.
    #[error("{words} words follow the last range")]
    TrailingWords {
        /// How many.
        words: usize,
    },
}

#[cfg(test)]
mod tests {
    use std::string::ToString;
    use std::vec;
    use std::vec::Vec;

    use proptest::collection::vec as vec_of;
    use proptest::prelude::*;

    use super::*;

    const fn header(byte_count: u32, byte_offset: u32) -> u64 {
        (byte_offset as u64) << 32 | byte_count as u64
    }

    #[test]
    fn a_range_touches_each_page_it_has_a_byte_in() {
        for (byte_offset, byte_count, pages) in [
            (0, 1, 1),
            (0, 4096, 1),
            (0, 4097, 2),
            (4095, 1, 1),
            (4095, 2, 2),
            (1, 4095, 1),
            (1, 4096, 2),
            (0, u32::MAX, 1 << 20),
            (u32::MAX, u32::MAX, (1 << 21)), // no overflow, even of what no range may be
        ] {
            assert_eq!(pages_spanned(byte_offset, byte_count), pages, "{byte_offset}+{byte_count}");
        }
    }

    #[test]
    fn ranges_are_taken_apart() {
        let words = [header(4096, 0xff0), 10, 11, header(8, 0), 12, header(1, 4095), 13];
        let ranges = GpaRanges::parse(&words, 3).unwrap();
        assert_eq!(
            (ranges.range_count(), ranges.total_bytes(), ranges.total_pages()),
            (3, 4105, 4)
        );
        assert_eq!(ranges.iter().len(), 3);
        let expected = [
            GpaRange { byte_count: 4096, byte_offset: 0xff0, pfns: &[10, 11] },
            GpaRange { byte_count: 8, byte_offset: 0, pfns: &[12] },
            GpaRange { byte_count: 1, byte_offset: 4095, pfns: &[13] },
        ];
        assert!(ranges.iter().eq(expected));
        assert_eq!(ranges.single(), None);
        for range in expected {
            assert_eq!(range.check(), Ok(()), "{range:?}");
        }
        let words = [header(8, 0), 12];
        let ranges = GpaRanges::parse(&words, 1).unwrap();
        assert_eq!(ranges.single(), Some(expected[1]));
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        let most = MAX_PFN;
        let table: [(&[u64], u32, Result<u64, RangeError>); 19] = [
            (&[header(1, 0), most], 1, Ok(1)),
            (&[header(1, 4095), 0], 1, Ok(1)),
            (&[], 0, Err(RangeError::NoRanges)),
            (&[header(1, 0), 0], 0, Err(RangeError::NoRanges)),
            (&[], 1, Err(RangeError::Truncated { range: 0, pages: 1, words: 0 })),
            (&[header(1, 0)], 1, Err(RangeError::Truncated { range: 0, pages: 1, words: 0 })),
            (&[header(4097, 0), 1], 1, Err(RangeError::Truncated { range: 0, pages: 2, words: 1 })),
            (&[header(8, 4092), 1], 1, Err(RangeError::Truncated { range: 0, pages: 2, words: 1 })),
            (
                &[header(u32::MAX, 0), 1],
                1,
                Err(RangeError::Truncated { range: 0, pages: 1 << 20, words: 1 }),
            ),
            (&[header(1, 0), 1], 2, Err(RangeError::Truncated { range: 1, pages: 1, words: 0 })),
            (
                &[header(1, 0), 1],
                u32::MAX,
                Err(RangeError::Truncated { range: 1, pages: 1, words: 0 }),
            ),
            (&[header(0, 0), 1], 1, Err(RangeError::Empty { range: 0 })),
            (&[header(1, 0), 1, header(0, 5), 1], 2, Err(RangeError::Empty { range: 1 })),
            (&[header(1, 4096), 1], 1, Err(RangeError::ByteOffset { range: 0, byte_offset: 4096 })),
            (
                &[header(u32::MAX, u32::MAX), 1],
                1,
                Err(RangeError::ByteOffset { range: 0, byte_offset: u32::MAX }),
            ),
            (
                &[header(u32::MAX, 1), 1],
                1,
                Err(RangeError::Overflow { range: 0, byte_count: u32::MAX, byte_offset: 1 }),
            ),
            (&[header(1, 0), most + 1], 1, Err(RangeError::Pfn { range: 0, pfn: most + 1 })),
            (
                &[header(1, 0), 1, header(4097, 0), 3, u64::MAX],
                2,
                Err(RangeError::Pfn { range: 1, pfn: u64::MAX }),
            ),
            (&[header(1, 0), 1, 2], 1, Err(RangeError::TrailingWords { words: 1 })),
        ];
        for (words, range_count, expected) in table {
            let got = GpaRanges::parse(words, range_count).map(|ranges| ranges.total_bytes());
            assert_eq!(got, expected, "{range_count} ranges in {words:x?}");
        }
    }

    #[test]
    fn a_prefix_leaves_the_rest() {
        let words = [header(1, 0), 1, 2, u64::MAX];
        let (ranges, rest) = GpaRanges::parse_prefix(&words, 1).unwrap();
        assert_eq!((ranges.words(), rest), (&words[..2], &words[2..]));
    }

    #[test]
    fn a_checked_list_can_be_put_together_again() {
        let words = [header(4097, 0), 1, 2, header(8, 0), 3];
        let ranges = GpaRanges::parse(&words, 2).unwrap();
        let again =
            GpaRanges::from_checked(ranges.words(), ranges.range_count(), ranges.total_bytes());
        assert_eq!(again, ranges);
        assert!(again.iter().eq(ranges.iter()));
    }

    #[test]
    fn a_senders_own_range_is_held_to_the_same_rules() {
        let check = |byte_count, byte_offset, pfns: &[u64]| {
            GpaRange { byte_count, byte_offset, pfns }.check().err()
        };
        assert_eq!(check(4097, 0, &[1, 2]), None);
        assert_eq!(
            check(4097, 0, &[1]),
            Some(RangeError::Truncated { range: 0, pages: 2, words: 1 })
        );
        assert_eq!(check(4096, 0, &[1, 2]), Some(RangeError::TrailingWords { words: 1 }));
        assert_eq!(check(0, 0, &[]), Some(RangeError::Empty { range: 0 }));
    }

    #[test]
    fn an_error_reads_like_a_sentence_with_the_numbers() {
        let error = RangeError::Truncated { range: 2, pages: 4, words: 3 };
        assert_eq!(error.to_string(), "range 2 spans 4 pages, 3 words are left for them");
    }

    /// Words that look like ranges more often than chance would have it.
    fn any_words() -> impl Strategy<Value = Vec<u64>> {
        let word = prop_oneof![
            (0..20_000_u32, 0..4200_u32).prop_map(|(count, offset)| header(count, offset)),
            0..=MAX_PFN,
            any::<u64>(),
        ];
        vec_of(word, 0..40)
    }

    proptest! {
        /// No words make the parser panic, and what it accepts is what section 5 allows.
        #[test]
        fn accepted_ranges_hold_to_the_rules(words in any_words(), range_count in 0..8_u32) {
            let Ok((ranges, rest)) = GpaRanges::parse_prefix(&words, range_count) else {
                prop_assert!(GpaRanges::parse(&words, range_count).is_err());
                return Ok(());
            };
            prop_assert_eq!(GpaRanges::parse(&words, range_count).is_ok(), rest.is_empty());
            prop_assert_eq!(ranges.words().len() + rest.len(), words.len());
            let mut again: Vec<u64> = vec![];
            let mut total_bytes = 0;
            for range in &ranges {
                prop_assert!(range.byte_count > 0 && range.byte_offset < 4096);
                let end = u64::from(range.byte_offset) + u64::from(range.byte_count);
                prop_assert!(end <= u64::from(u32::MAX));
                prop_assert_eq!(range.pfns.len() as u64, end.div_ceil(4096));
                prop_assert!(range.pfns.iter().all(|pfn| pfn.checked_mul(4096).is_some()));
                total_bytes += u64::from(range.byte_count);
                again.push(range.header_word());
                again.extend(range.pfns);
            }
            prop_assert_eq!(again, ranges.words());
            prop_assert_eq!(total_bytes, ranges.total_bytes());
            prop_assert_eq!(ranges.iter().count(), range_count as usize);
        }
    }
}
