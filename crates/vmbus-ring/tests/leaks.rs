//! What is left of rings once they are dropped. Alone in its file: another test's descriptors and
//! mappings would count.

#![allow(clippy::unwrap_used, reason = "a test may stop at a surprise")]

use std::fs;
use std::sync::atomic::Ordering::Relaxed;

use vmbus_memory::{DEFAULT_MAPPINGS, GuestMemory, MappingBudget, RingPages};
use vmbus_ring::{RingReader, RingWriter, initialize};

/// Descriptors, and mappings of the guest's memory.
fn held() -> (usize, usize) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mappings = maps.lines().filter(|line| line.contains("vmbus-memory")).count();
    (fs::read_dir("/proc/self/fd").unwrap().count(), mappings)
}

#[test]
fn a_dropped_ring_gives_everything_back() {
    let memory = GuestMemory::memfd(16 * 4096).unwrap();
    let budget = MappingBudget::default();
    let before = held();
    for pfns in [&[0, 1, 2, 3][..], &[7, 5, 6, 4], &[15, 13, 11, 9, 7]] {
        for broken in [false, true] {
            let pages = || RingPages::map(&memory, pfns, &budget).unwrap();
            let raw = pages();
            initialize(&raw);
            let mut ends = (RingWriter::new(pages()).unwrap(), RingReader::new(pages()).unwrap());
            assert!(budget.left() < DEFAULT_MAPPINGS);
            assert!(held().1 > before.1);
            if broken {
                raw.control_word::<0>().store(3, Relaxed);
                raw.control_word::<4>().store(u32::MAX, Relaxed);
                assert!(ends.1.peek().is_err());
                assert!(ends.0.free().is_err());
                // Ends that are refused drop the pages they were given.
                assert!(RingWriter::new(pages()).is_err());
                assert!(RingReader::new(pages()).is_err());
            }
        }
        assert_eq!(budget.left(), DEFAULT_MAPPINGS);
        assert_eq!(held(), before);
    }
}
