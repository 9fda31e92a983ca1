//! Page runs: never two owners of a page, all of them back in the end.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may stop at a surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small test values")]

use std::collections::BTreeSet;
use std::thread;

use proptest::collection::vec;
use proptest::prelude::*;
use vmbus_memory::{GuestMemory, MAX_RUNS, MemoryError, PageAllocator, PageRun};

const PAGE: u64 = 4096;

#[test]
fn a_run_is_pages_of_the_range() {
    let memory = GuestMemory::memfd(16 * PAGE).unwrap();
    let allocator = PageAllocator::new(&memory, 4 * PAGE, 8 * PAGE).unwrap();
    let run = allocator.allocate(3).unwrap();
    assert_eq!((run.gpa(), run.pages(), run.len()), (4 * PAGE, 3, 3 * 4096));
    assert_eq!(run.pfns().collect::<Vec<_>>(), [4, 5, 6]);
    assert_eq!(allocator.free_pages(), 5);
    run.slice().unwrap().write_at(4096, b"mine").unwrap();
    assert_eq!(memory.read_obj::<[u8; 4]>(5 * PAGE), Ok(*b"mine"));
    drop(run);
    assert_eq!(allocator.clone().free_pages(), 8);
    assert_eq!(allocator.allocate(8).unwrap().gpa(), 4 * PAGE, "joined again");
}

#[test]
fn what_cannot_be_had_is_refused() {
    let memory = GuestMemory::memfd(16 * PAGE).unwrap();
    for (gpa, len) in [(0, 0), (1, PAGE), (0, PAGE + 1), (8 * PAGE, 9 * PAGE), (u64::MAX, PAGE)] {
        assert!(PageAllocator::new(&memory, gpa, len).is_err(), "{gpa:#x}+{len:#x}");
    }
    let allocator = PageAllocator::new(&memory, 0, 16 * PAGE).unwrap();
    let refused = |pages, free| MemoryError::NoPages { pages, free };
    assert_eq!(allocator.allocate(0).unwrap_err(), refused(0, 16));
    assert_eq!(allocator.allocate(17).unwrap_err(), refused(17, 16));
    let runs: Vec<PageRun> = (0..16).map(|_| allocator.allocate(1).unwrap()).collect();
    assert_eq!(allocator.allocate(1).unwrap_err(), refused(1, 0));
    // Every other page back: eight are free, no two in a row.
    let kept: Vec<PageRun> =
        runs.into_iter().enumerate().filter(|(n, _)| n % 2 == 0).map(|(_, run)| run).collect();
    assert_eq!(allocator.allocate(2).unwrap_err(), refused(2, 8));
    drop(kept);
    assert_eq!(allocator.allocate(16).unwrap().pages(), 16);
}

#[test]
fn runs_are_bounded() {
    let pages = MAX_RUNS as u64 + 1;
    let memory = GuestMemory::memfd(pages * PAGE).unwrap();
    let allocator = PageAllocator::new(&memory, 0, pages * PAGE).unwrap();
    let mut runs: Vec<PageRun> = (0..MAX_RUNS).map(|_| allocator.allocate(1).unwrap()).collect();
    let refused = MemoryError::TooManyRuns { max: MAX_RUNS };
    assert_eq!(allocator.allocate(1).unwrap_err(), refused);
    runs.pop();
    assert!(allocator.allocate(1).is_ok());
}

proptest! {
    /// Whatever is allocated and freed in whatever order: no page has two owners, free pages are
    /// counted, and freeing everything makes the range whole.
    #[test]
    fn pages_have_one_owner(steps in vec((any::<bool>(), 1u32..9, any::<prop::sample::Index>()), 1..120)) {
        let memory = GuestMemory::memfd(64 * PAGE).unwrap();
        let allocator = PageAllocator::new(&memory, 0, 64 * PAGE).unwrap();
        let mut runs: Vec<PageRun> = Vec::new();
        for (free, pages, index) in steps {
            if free && !runs.is_empty() {
                runs.swap_remove(index.index(runs.len()));
            } else if let Ok(run) = allocator.allocate(pages) {
                runs.push(run);
            }
            let owned: Vec<u64> = runs.iter().flat_map(PageRun::pfns).collect();
            let distinct: BTreeSet<u64> = owned.iter().copied().collect();
            prop_assert_eq!(distinct.len(), owned.len());
            prop_assert!(distinct.range(64..).next().is_none());
            prop_assert_eq!(allocator.free_pages(), 64 - owned.len() as u64);
        }
        runs.clear();
        prop_assert_eq!(allocator.allocate(64).map(|run| run.gpa()), Ok(0));
    }
}

#[test]
fn threads_share_an_allocator() {
    let memory = GuestMemory::memfd(64 * PAGE).unwrap();
    let allocator = PageAllocator::new(&memory, 0, 64 * PAGE).unwrap();
    thread::scope(|scope| {
        for id in 1..=4u64 {
            let allocator = allocator.clone();
            scope.spawn(move || {
                for round in 0..500u64 {
                    let Ok(run) = allocator.allocate(1 + (round % 7) as u32) else { continue };
                    let mark = id << 32 | round;
                    for pfn in run.pfns() {
                        run.memory().write_obj(pfn * PAGE, &mark).unwrap();
                    }
                    for pfn in run.pfns() {
                        assert_eq!(run.memory().read_obj::<u64>(pfn * PAGE), Ok(mark));
                    }
                }
            });
        }
    });
    assert_eq!(allocator.allocate(64).unwrap().pages(), 64);
}
