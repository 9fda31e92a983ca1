//! Descriptors and mappings of this process, counted. Alone in its file: another test's would count.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may stop at a surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small test values")]

use std::fs;

use vmbus_memory::{FdRegion, GuestMemory, MappingBudget, PageAllocator, RingPages};

const PAGE: u64 = 4096;

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Mappings of shared files: the heap's come and go as they like.
fn shared_mappings() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("vmbus-memory")).count()
}

/// Address space in pages: reservations that were never filled would show here only.
fn address_space() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse().unwrap()
}

fn once(rounds: usize) {
    let memory = GuestMemory::memfd(64 * PAGE).unwrap();
    let fd = || memory.regions()[0].backing().unwrap().0.try_clone_to_owned().unwrap();
    let budget = MappingBudget::default();
    let allocator = PageAllocator::new(&memory, 0, 64 * PAGE).unwrap();
    for _ in 0..rounds {
        let run = allocator.allocate(8).unwrap();
        let pfns: Vec<u64> = run.pfns().collect();
        let ring = RingPages::map(&memory, &pfns, &budget).unwrap();
        assert!(ring.is_mapped());
        let reversed: Vec<u64> = run.pfns().rev().collect();
        let pieces = RingPages::map(&memory, &reversed, &budget).unwrap();
        assert!(pieces.is_mapped());
        assert!(RingPages::map(&memory, &[1, 2, 64], &budget).is_err());
        // The peer's second region is wrong; the first was mapped already.
        let half_right = vec![
            FdRegion { fd: fd(), fd_offset: 0, gpa: 0, len: 64 * PAGE },
            FdRegion { fd: fd(), fd_offset: 0, gpa: 64 * PAGE, len: 65 * PAGE },
        ];
        assert!(GuestMemory::from_fds(half_right).is_err());
        let overlap = vec![
            FdRegion { fd: fd(), fd_offset: 0, gpa: 0, len: 64 * PAGE },
            FdRegion { fd: fd(), fd_offset: 0, gpa: 0, len: 64 * PAGE },
        ];
        assert!(GuestMemory::from_fds(overlap).is_err());
    }
    assert_eq!(budget.left(), vmbus_memory::DEFAULT_MAPPINGS);
    assert_eq!(allocator.free_pages(), 64);
}

#[test]
fn nothing_is_left_behind() {
    once(1); // whatever the allocator of the process takes the first time
    let before = (descriptors(), shared_mappings(), address_space());
    once(100);
    let after = (descriptors(), shared_mappings(), address_space());
    assert_eq!((before.0, before.1), (after.0, after.1), "descriptors, mappings");
    // A hundred leaked reservations of 15 pages would be 1500.
    assert!(after.2 < before.2 + 500, "pages of address space: {} -> {}", before.2, after.2);
    assert_eq!(shared_mappings(), 0);
}
