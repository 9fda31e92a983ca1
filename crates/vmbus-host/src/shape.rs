//! What the host must know of the machine to check a guest's words: which pages are RAM, and how
//! many virtual processors there are.

use vmbus_memory::GuestMemory;
use vmbus_wire::PAGE_SHIFT;

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
        let above = self.runs.partition_point(|(first, _)| *first <= pfn);
        let run = above.checked_sub(1).and_then(|index| self.runs.get(index));
        run.is_some_and(|(_, end)| pfn < *end)
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
        assert_eq!(ram.pages(), 7);
        assert!(!RamMap::default().contains(0));
        let top = RamMap::new([(u64::MAX - 0x1fff, u64::MAX)]);
        assert!(top.contains((u64::MAX >> PAGE_SHIFT) - 1));
        assert!(!top.contains(u64::MAX));
    }
}
