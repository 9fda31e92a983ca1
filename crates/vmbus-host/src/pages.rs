//! The pages of a GPADL, as a host keeps them.
//!
//! Page frames are most of what a host has in memory and of what it saves. Those of a guest with less
//! than 16 TiB of RAM take four bytes each.

use kmcl::bus::{GpadlPages, PageRange};
use vmbus_wire::PAGE_SIZE_U32;
use vmbus_wire::ranges::{GpaRanges, pages_spanned};

use crate::error::RingRefusal;
use crate::shape::RamMap;

/// Ranges of whole or partial pages, all of them RAM.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Pages {
    pub(crate) ranges: Vec<PageSpan>,
    /// Those of all ranges, one after the other.
    pub(crate) pfns: Pfns,
}

/// A range without its page frames: there are as many as it [spans](PageSpan::pages).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct PageSpan {
    /// Bytes; at least 1.
    pub(crate) byte_count: u32,
    /// Offset into the first page, below its size; with the bytes at most 32 bits.
    pub(crate) byte_offset: u32,
}

/// Page frames. Which form it is depends on the guest's RAM, not on these pages.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Pfns {
    Narrow(Vec<u32>),
    Wide(Vec<u64>),
}

/// Some of them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PfnSlice<'a> {
    Narrow(&'a [u32]),
    Wide(&'a [u64]),
}

impl PageSpan {
    pub(crate) fn pages(self) -> usize {
        // At most 2^20.
        usize::try_from(pages_spanned(self.byte_offset, self.byte_count)).unwrap_or(usize::MAX)
    }
}

impl Default for Pfns {
    fn default() -> Self {
        Self::Narrow(Vec::new())
    }
}

impl Pfns {
    pub(crate) fn as_slice(&self) -> PfnSlice<'_> {
        match self {
            Self::Narrow(pfns) => PfnSlice::Narrow(pfns),
            Self::Wide(pfns) => PfnSlice::Wide(pfns),
        }
    }
}

impl<'a> PfnSlice<'a> {
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Narrow(pfns) => pfns.len(),
            Self::Wide(pfns) => pfns.len(),
        }
    }

    pub(crate) fn split_at_checked(self, at: usize) -> Option<(Self, Self)> {
        match self {
            Self::Narrow(pfns) => {
                pfns.split_at_checked(at).map(|(a, b)| (Self::Narrow(a), Self::Narrow(b)))
            }
            Self::Wide(pfns) => {
                pfns.split_at_checked(at).map(|(a, b)| (Self::Wide(a), Self::Wide(b)))
            }
        }
    }

    pub(crate) fn to_vec(self) -> Vec<u64> {
        match self {
            Self::Narrow(pfns) => pfns.iter().copied().map(u64::from).collect(),
            Self::Wide(pfns) => pfns.to_vec(),
        }
    }

    /// The first that is not RAM.
    pub(crate) fn first_outside(self, ram: &RamMap) -> Option<u64> {
        match self {
            Self::Narrow(pfns) => ram.first_outside_narrow(pfns),
            Self::Wide(pfns) => ram.first_outside(pfns),
        }
    }
}

impl Pages {
    /// # Errors
    /// The first page frame that is not RAM.
    pub(crate) fn new(ranges: GpaRanges<'_>, ram: &RamMap) -> Result<Self, u64> {
        let mut spans = Vec::with_capacity(ranges.iter().len());
        let mut pfns = Vec::with_capacity(ranges.total_pages());
        for range in ranges {
            let (byte_count, byte_offset) = (range.byte_count, range.byte_offset);
            spans.push(PageSpan { byte_count, byte_offset });
            pfns.extend_from_slice(range.pfns);
        }
        if let Some(pfn) = ram.first_outside(&pfns) {
            return Err(pfn);
        }
        let pfns = if ram.is_wide() {
            Pfns::Wide(pfns)
        } else {
            // All are RAM, and so have no more bits.
            Pfns::Narrow(pfns.iter().filter_map(|pfn| u32::try_from(*pfn).ok()).collect())
        };
        Ok(Self { ranges: spans, pfns })
    }

    /// Pages of all ranges.
    pub(crate) fn count(&self) -> usize {
        self.pfns.as_slice().len()
    }

    /// As a device gets them.
    pub(crate) fn for_device(&self) -> GpadlPages {
        let mut pfns = self.pfns.as_slice();
        let mut ranges = Vec::with_capacity(self.ranges.len());
        for span in &self.ranges {
            let PageSpan { byte_count, byte_offset } = *span;
            // There are as many as the ranges span together.
            let Some((now, later)) = pfns.split_at_checked(span.pages()) else { break };
            pfns = later;
            ranges.push(PageRange { byte_count, byte_offset, pfns: now.to_vec() });
        }
        GpadlPages { ranges, read_only: false } // no message says otherwise
    }

    /// The pages of the guest-to-host ring and of the host-to-guest ring, which begins at page `offset`.
    ///
    /// Source: vmbus-wire section 4.
    pub(crate) fn rings(&self, offset: u32) -> Result<(PfnSlice<'_>, PfnSlice<'_>), RingRefusal> {
        let [PageSpan { byte_count, byte_offset }] = *self.ranges.as_slice() else {
            return Err(RingRefusal::Ranges { ranges: self.ranges.len() });
        };
        if byte_offset != 0 || byte_count % PAGE_SIZE_U32 != 0 {
            return Err(RingRefusal::Unaligned { byte_count, byte_offset });
        }
        let pfns = self.pfns.as_slice();
        let wrong = RingRefusal::Split { offset, pages: pfns.len() };
        let at = usize::try_from(offset).map_err(|_| wrong)?;
        match pfns.split_at_checked(at) {
            Some((incoming, outgoing)) if incoming.len() >= 2 && outgoing.len() >= 2 => {
                Ok((incoming, outgoing))
            }
            _ => Err(wrong),
        }
    }
}
