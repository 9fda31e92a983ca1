//! What the host must know of the machine to check a guest's words: which pages are RAM, and how
//! many virtual processors there are.

use vmbus_memory::GuestMemory;
use vmbus_wire::{MAX_PFN, PAGE_SHIFT, PAGE_SIZE};

/// The guest's machine, as plain data.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct GuestShape {
    /// Number of virtual processors; VP indices are below it.
    pub vp_count: u32,
    /// Pages that a guest may name in a GPADL.
    pub ram: RamMap,
}

impl GuestShape {
    /// The shape of a machine with `vp_count` processors and this memory.
    #[must_use]
    pub fn new(vp_count: u32, memory: &GuestMemory) -> Self {
        let regions = memory.regions().iter().map(|region| (region.gpa(), region.len()));
        Self { vp_count, ram: RamMap::new(regions) }
    }
}

/// The page frames that are RAM.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RamMap {
    /// `(first PFN, PFN behind the last)`, ascending, without overlap or neighbours.
    runs: Vec<(u64, u64)>,
}

impl RamMap {
    /// From regions of `(guest physical address, bytes)`, in any order. Pages that a region covers
    /// only in part are left out.
    #[must_use]
    pub fn new(regions: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut runs: Vec<(u64, u64)> = regions
            .into_iter()
            .map(|(gpa, len)| {
                // An end beyond 64 bits is cut off; the last page is then partial, and left out.
                let first = (gpa >> PAGE_SHIFT) + u64::from(gpa & 0xfff != 0);
                (first, gpa.saturating_add(len) >> PAGE_SHIFT)
            })
            .filter(|(first, end)| first < end)
            .collect();
        runs.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::with_capacity(runs.len());
        for (first, end) in runs {
            match merged.last_mut() {
                Some(last) if first <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((first, end)),
            }
        }
        Self { runs: merged }
    }

    /// Whether page frame `pfn` is RAM.
    #[must_use]
    pub fn contains(&self, pfn: u64) -> bool {
        self.run_of(pfn).is_some()
    }

    /// Whether `gpa` is the address of a page that is RAM.
    pub(crate) fn is_page(&self, gpa: u64) -> bool {
        gpa.is_multiple_of(PAGE_SIZE as u64) && self.contains(gpa >> PAGE_SHIFT)
    }

    fn run_of(&self, pfn: u64) -> Option<(u64, u64)> {
        let above = self.runs.partition_point(|(first, _)| *first <= pfn);
        let run = above.checked_sub(1).and_then(|index| self.runs.get(index));
        run.copied().filter(|(_, end)| pfn < *end)
    }

    /// The first of these page frames that is not RAM.
    pub(crate) fn first_outside(&self, pfns: &[u64]) -> Option<u64> {
        // Most often all are in one run, and one pass without a branch tells so.
        let run = pfns.first().and_then(|pfn| self.run_of(*pfn));
        let (first, pages) = run.map_or((0, 0), |(first, end)| (first, end - first));
        let outside = |pfn: &u64| pfn.wrapping_sub(first) >= pages;
        if !pfns.iter().fold(false, |found, pfn| found | outside(pfn)) {
            return None;
        }
        pfns.iter().copied().find(|pfn| !self.contains(*pfn))
    }

    /// As [`Self::first_outside`], for RAM that is not [wide](Self::is_wide).
    pub(crate) fn first_outside_narrow(&self, pfns: &[u32]) -> Option<u64> {
        let run = pfns.first().and_then(|pfn| self.run_of((*pfn).into()));
        let run = run.and_then(|(first, end)| {
            // The last page rather than the number of pages, which could be 2^32.
            Some((u32::try_from(first).ok()?, u32::try_from(end - 1 - first).ok()?))
        });
        if let Some((first, last)) = run {
            let outside = |pfn: &u32| pfn.wrapping_sub(first) > last;
            if !pfns.iter().fold(false, |found, pfn| found | outside(pfn)) {
                return None;
            }
        }
        pfns.iter().copied().map(u64::from).find(|pfn| !self.contains(*pfn))
    }

    /// The runs: the first page frame of each, and the one behind its last; ascending, without overlap
    /// or neighbours.
    #[must_use]
    pub fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    /// Whether page frames need more than 32 bits.
    pub(crate) fn is_wide(&self) -> bool {
        self.runs.last().is_some_and(|(_, end)| *end > 1 << 32)
    }

    /// Adds a run behind the others, if it is one that does not touch them.
    pub(crate) fn push_run(&mut self, first: u64, end: u64) -> bool {
        let behind = self.runs.last().is_none_or(|(_, last)| *last < first);
        let fits = behind && first < end && end <= MAX_PFN + 1;
        if fits {
            self.runs.push((first, end));
        }
        fits
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|(first, end)| end - first).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_ram_where_a_region_covers_all_of_it() {
        // RAM, a hole of two pages, RAM that touches further RAM, and a region of odd bounds.
        let ram = RamMap::new([
            (0x5000, 0x2000),
            (0x0000, 0x3000),
            (0x7000, 0x1000),
            (0xa800, 0x2000),
            (0xf000, 0x0800),
        ]);
        let expected = [0, 1, 2, 5, 6, 7, 11];
        for pfn in 0..20 {
            assert_eq!(ram.contains(pfn), expected.contains(&pfn), "pfn {pfn}");
        }
        for (pfns, outside) in [
            (&[][..], None),
            (&[0, 2, 1], None),
            (&[0, 6, 11], None),
            (&[0, 3, 4], Some(3)),
            (&[4, 3], Some(4)),
            (&[11, 0, u64::MAX], Some(u64::MAX)),
        ] {
            assert_eq!(ram.first_outside(pfns), outside, "{pfns:?}");
            let narrow: Result<Vec<u32>, _> = pfns.iter().copied().map(u32::try_from).collect();
            if let Ok(narrow) = narrow {
                assert_eq!(ram.first_outside_narrow(&narrow), outside, "{pfns:?}");
            }
        }
        assert_eq!(RamMap::default().first_outside(&[0]), Some(0));
        assert_eq!(RamMap::default().first_outside_narrow(&[0]), Some(0));
        let all = RamMap { runs: vec![(0, 1 << 32)] };
        assert!(!all.is_wide());
        assert_eq!(all.first_outside_narrow(&[0, u32::MAX]), None);
        assert!(RamMap { runs: vec![(0, (1 << 32) + 1)] }.is_wide());
        assert_eq!(ram.pages(), 7);
        assert!(!RamMap::default().contains(0));
        let top = RamMap::new([(u64::MAX - 0x1fff, u64::MAX)]);
        assert!(top.contains((u64::MAX >> PAGE_SHIFT) - 1));
        assert!(!top.contains(u64::MAX));
    }
}
