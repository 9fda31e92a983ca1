//! The two forms of a ring's pages. What runs on top of them is tested in `vmbus-ring`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may stop at a surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small test values")]

use std::sync::atomic::Ordering::Relaxed;

use vmbus_memory::{
    DEFAULT_MAPPINGS, FdRegion, GuestMemory, MAX_RING_PAGES, MappingBudget, MemoryError, RingPages,
};

const PAGE: u32 = 4096;

type Make = fn(&GuestMemory, &[u64]) -> RingPages;

const FORMS: [(&str, Make); 2] = [
    ("mapped", |memory, pfns| {
        let ring = RingPages::map(memory, pfns, &MappingBudget::default()).unwrap();
        assert!(ring.is_mapped());
        ring
    }),
    ("scattered", |memory, pfns| {
        let ring = RingPages::scattered(memory, pfns).unwrap();
        assert!(!ring.is_mapped());
        ring
    }),
];

fn byte_at(memory: &GuestMemory, pfns: &[u64], at: u32) -> u8 {
    let page = pfns[1 + (at / PAGE) as usize];
    memory.read_obj(page * u64::from(PAGE) + u64::from(at % PAGE)).unwrap()
}

/// Every position, wherever the guest's pages lie: bytes written through the ring are in the right
/// page, bytes in the page are read through the ring, around the end too.
#[test]
fn positions_are_bytes_of_the_pages_in_order() {
    let memory = GuestMemory::memfd(16 * 4096).unwrap();
    for pfns in [&[3, 4, 5, 6][..], &[9, 2, 14, 1, 0], &[7, 8], &[5, 4, 3, 2, 1]] {
        for (form, make) in FORMS {
            let ring = make(&memory, pfns);
            let size = ring.data_len();
            assert_eq!(size as usize, (pfns.len() - 1) * PAGE as usize, "{form}");
            for at in (0..size).step_by(509).chain([size - 1, PAGE - 1]) {
                for len in [1, 2, 7, 4096, size] {
                    let bytes: Vec<u8> = (0..len).map(|n| (at + n * 7) as u8).collect();
                    ring.write(at, &bytes);
                    let last = (at + len - 1) % size;
                    assert_eq!(byte_at(&memory, pfns, at), bytes[0], "{form} {pfns:?} {at}+{len}");
                    assert_eq!(
                        byte_at(&memory, pfns, last),
                        bytes[bytes.len() - 1],
                        "{form} {last}"
                    );
                    let mut got = vec![0; len as usize];
                    ring.read(at, &mut got);
                    assert!(got == bytes, "{form} {pfns:?} {at}+{len}");
                }
            }
        }
    }
}

/// Positions count modulo the size, and more bytes than the ring has go round again.
#[test]
fn positions_and_lengths_beyond_the_ring_go_round() {
    let memory = GuestMemory::memfd(4 * 4096).unwrap();
    for (form, make) in FORMS {
        let ring = make(&memory, &[0, 2, 1]);
        ring.write(2 * PAGE + 5, b"abc");
        let mut got = [0; 3];
        ring.read(5, &mut got);
        assert_eq!(&got, b"abc", "{form}");
        ring.read(u32::MAX, &mut got);
        let mut twice = vec![0; 4 * 4096];
        ring.read(0, &mut twice);
        assert!(twice[..8192] == twice[8192..], "{form}");
        let laps: Vec<u8> = (0..3 * 4096u32).map(|n| (n / PAGE) as u8).collect();
        ring.write(0, &laps);
        ring.read(0, &mut twice);
        assert_eq!((twice[0], twice[4096]), (2, 1), "{form}: the last lap stays");
    }
}

#[test]
fn pieces_are_what_lies_together() {
    let memory = GuestMemory::memfd(4 * 4096).unwrap();
    for (at, len, mapped, scattered) in [
        (0, 16, 16, 16),
        (PAGE - 8, 16, 16, 8),
        (2 * PAGE - 8, 16, 16, 8),
        (8, 2 * PAGE, 2 * PAGE, PAGE - 8),
        (0, 2 * PAGE + 1, 2 * PAGE, PAGE),
        (2 * PAGE, 8, 0, 0),
        (u32::MAX, u32::MAX, 0, 0),
        (16, 0, 0, 0),
    ] {
        for ((form, make), expected) in FORMS.into_iter().zip([mapped, scattered]) {
            let ring = make(&memory, &[0, 2, 1]);
            assert_eq!(ring.piece(at, len).len(), expected as usize, "{form} piece {at}+{len}");
            assert_eq!(ring.view(at, len).len(), expected as usize, "{form} view {at}+{len}");
            let window = ring.window(at, len).map(|window| window.len());
            let whole = form == "mapped" && at < 2 * PAGE && len <= 2 * PAGE;
            assert_eq!(window, whole.then_some(len as usize), "{form} window {at}+{len}");
        }
    }
}

#[test]
fn control_words_are_those_of_the_control_page() {
    let memory = GuestMemory::memfd(4 * 4096).unwrap();
    for (form, make) in FORMS {
        let ring = make(&memory, &[3, 0]);
        ring.control_word::<0x40>().store(0x1234_5678, Relaxed);
        assert_eq!(memory.read_obj::<u32>(3 * 4096 + 0x40), Ok(0x1234_5678), "{form}");
        memory.write_obj(3 * 4096 + 4092, &7u32).unwrap();
        assert_eq!(ring.control_word::<4092>().load(Relaxed), 7, "{form}");
    }
}

#[test]
fn wrong_pages_are_refused() {
    let memory = GuestMemory::memfd(4 * 4096).unwrap();
    let too_many = vec![1; MAX_RING_PAGES + 1];
    let count = |pages| MemoryError::RingPages { pages, max: MAX_RING_PAGES };
    let not_ram = |pfn: u64| MemoryError::NotRam { gpa: pfn * 4096, len: 4096 };
    for (pfns, expected) in [
        (&[][..], count(0)),
        (&[1], count(1)),
        (&too_many, count(MAX_RING_PAGES + 1)),
        (&[4, 1], not_ram(4)),
        (&[1, 2, 4], not_ram(4)),
        (&[1, 1 << 52], MemoryError::PageNumber { pfn: 1 << 52 }),
        (&[u64::MAX, 1], MemoryError::PageNumber { pfn: u64::MAX }),
    ] {
        let budget = MappingBudget::default();
        let mapped = RingPages::map(&memory, pfns, &budget).unwrap_err();
        let scattered = RingPages::scattered(&memory, pfns).unwrap_err();
        assert_eq!((mapped, scattered), (expected, expected), "{} pages", pfns.len());
        assert_eq!(budget.left(), DEFAULT_MAPPINGS);
    }
    assert!(RingPages::scattered(&memory, &vec![1; MAX_RING_PAGES]).is_ok());
}

/// Neighbouring pages of one file share a mapping; the data are mapped twice.
#[test]
fn the_budget_counts_mappings_and_gets_them_back() {
    let memory = GuestMemory::memfd(16 * 4096).unwrap();
    for (pfns, mappings) in [
        (&[0, 1, 2, 3][..], 2),
        (&[0, 2, 3, 4], 3),
        (&[0, 2, 4, 6], 7),
        (&[3, 2, 1], 5),
        (&[5, 5, 5], 5),
    ] {
        let budget = MappingBudget::new(mappings);
        let ring = RingPages::map(&memory, pfns, &budget).unwrap();
        assert!(ring.is_mapped(), "{pfns:?}");
        assert_eq!(budget.left(), 0, "{pfns:?}");
        let second = RingPages::map(&memory, pfns, &budget).unwrap();
        assert!(!second.is_mapped(), "{pfns:?}: nothing is left");
        drop((ring, second));
        assert_eq!(budget.left(), mappings, "{pfns:?}");
        let tight = MappingBudget::new(mappings - 1);
        assert!(!RingPages::map(&memory, pfns, &tight).unwrap().is_mapped(), "{pfns:?}");
        assert_eq!(tight.left(), mappings - 1, "{pfns:?}");
    }
}

/// A ring across two files, whose offsets happen to continue.
#[test]
fn pages_of_different_files_are_mapped_apart() {
    let (low, high) = (GuestMemory::memfd(4096).unwrap(), GuestMemory::memfd(3 * 4096).unwrap());
    let fd = |memory: &GuestMemory| {
        memory.regions()[0].backing().unwrap().0.try_clone_to_owned().unwrap()
    };
    let memory = GuestMemory::from_fds(vec![
        FdRegion { fd: fd(&low), fd_offset: 0, gpa: 0, len: 4096 },
        FdRegion { fd: fd(&high), fd_offset: 4096, gpa: 4096, len: 8192 },
    ])
    .unwrap();
    let budget = MappingBudget::new(3);
    let ring = RingPages::map(&memory, &[0, 1, 2], &budget).unwrap();
    assert!(ring.is_mapped());
    assert_eq!(budget.left(), 0);
    ring.write(0, b"first data page");
    assert_eq!(high.read_obj::<[u8; 5]>(4096), Ok(*b"first"));
    ring.control_word::<0>().store(9, Relaxed);
    assert_eq!(low.read_obj::<u32>(0), Ok(9));
}

/// The ring keeps what it is made of, whoever else lets go.
#[test]
fn a_ring_outlives_every_other_handle() {
    for (form, make) in FORMS {
        let ring = make(&GuestMemory::memfd(4 * 4096).unwrap(), &[0, 1]);
        ring.write(10, b"alive");
        let mut got = [0; 5];
        ring.read(10, &mut got);
        assert_eq!(&got, b"alive", "{form}");
    }
}

/// A ring's pages are brought in where the memory's owner has mapped them, before they are mapped a second
/// time.
#[test]
fn pages_are_there_before_they_are_mapped_again() {
    let memory = GuestMemory::memfd(16 * 4096).unwrap();
    let (file, _) = memory.regions()[0].backing().unwrap();
    let pages_there = || rustix::fs::fstat(file).unwrap().st_blocks * 512 / i64::from(PAGE);
    assert_eq!(pages_there(), 0);
    let ring = RingPages::map(&memory, &[9, 2, 14], &MappingBudget::default()).unwrap();
    assert!(ring.is_mapped());
    assert!(pages_there() >= 3, "large pages may bring in more");
}
