//! Guest memory from descriptors: what is refused, and how bytes are reached across regions.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may stop at a surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small test values")]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{MemfdFlags, SealFlags};
use vmbus_memory::{FdRegion, GuestMemory, MAX_MEMORY_BYTES, MAX_REGIONS, MemoryError};

const PAGE: u64 = 4096;

fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("test", flags).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn region(fd_offset: u64, gpa: u64, len: u64) -> FdRegion {
    FdRegion { fd: memfd(8 * PAGE, SealFlags::SHRINK), fd_offset, gpa, len }
}

#[test]
fn regions_that_a_peer_got_wrong_are_refused() {
    let unaligned = |gpa, len, fd_offset| MemoryError::RegionUnaligned { gpa, len, fd_offset };
    let overflow = |gpa, len, fd_offset| MemoryError::RegionOverflow { gpa, len, fd_offset };
    let top = u64::MAX - PAGE + 1;
    // File offsets are signed: the first page whose end is none.
    let last = (1 << 63) - PAGE;
    for (regions, expected) in [
        (vec![], MemoryError::RegionCount { count: 0, max: MAX_REGIONS }),
        (vec![region(0, 0, 0)], unaligned(0, 0, 0)),
        (vec![region(0, 0, PAGE - 1)], unaligned(0, PAGE - 1, 0)),
        (vec![region(0, 8, PAGE)], unaligned(8, PAGE, 0)),
        (vec![region(512, 0, PAGE)], unaligned(0, PAGE, 512)),
        (vec![region(0, top, PAGE)], overflow(top, PAGE, 0)),
        (vec![region(0, 0, top)], overflow(0, top, 0)),
        (vec![region(top, 0, PAGE)], overflow(0, PAGE, top)),
        (vec![region(last, 0, PAGE)], overflow(0, PAGE, last)),
        (
            vec![region(0, 0, MAX_MEMORY_BYTES), region(0, 1 << 50, PAGE)],
            MemoryError::TooMuchMemory { bytes: MAX_MEMORY_BYTES + PAGE, max: MAX_MEMORY_BYTES },
        ),
        (
            vec![region(PAGE, 0, 8 * PAGE)],
            MemoryError::FileTooShort { gpa: 0, needed: 9 * PAGE, size: 8 * PAGE },
        ),
        (
            vec![region(0, 4 * PAGE, 2 * PAGE), region(0, 3 * PAGE, 2 * PAGE)],
            MemoryError::RegionOverlap { gpa: 4 * PAGE, len: 2 * PAGE, other_gpa: 3 * PAGE },
        ),
        (
            vec![region(0, 0, PAGE), region(PAGE, 0, PAGE)],
            MemoryError::RegionOverlap { gpa: 0, len: PAGE, other_gpa: 0 },
        ),
    ] {
        let row = format!("{regions:?}");
        assert_eq!(GuestMemory::from_fds(regions).unwrap_err(), expected, "{row}");
    }
}

#[test]
fn too_many_regions_are_refused() {
    let fd = memfd(PAGE, SealFlags::SHRINK);
    let many = |count: usize| {
        let regions = (0..count as u64).map(|n| FdRegion {
            fd: fd.as_fd().try_clone_to_owned().unwrap(),
            fd_offset: 0,
            gpa: n * PAGE,
            len: PAGE,
        });
        GuestMemory::from_fds(regions.collect())
    };
    assert_eq!(many(MAX_REGIONS).unwrap().regions().len(), MAX_REGIONS);
    let expected = MemoryError::RegionCount { count: MAX_REGIONS + 1, max: MAX_REGIONS };
    assert_eq!(many(MAX_REGIONS + 1).unwrap_err(), expected);
}

/// A file that its owner can truncate would end in SIGBUS at the next access.
#[test]
fn files_that_can_shrink_are_refused() {
    let zero = || OwnedFd::from(File::open("/dev/zero").unwrap());
    for (what, fd, expected) in [
        ("no seal", memfd(PAGE, SealFlags::empty()), Err(MemoryError::NotSealed { gpa: PAGE })),
        ("growth only", memfd(PAGE, SealFlags::GROW), Err(MemoryError::NotSealed { gpa: PAGE })),
        ("no memfd", zero(), Err(MemoryError::NotSealed { gpa: PAGE })),
        ("sealed", memfd(PAGE, SealFlags::SHRINK), Ok(PAGE)),
    ] {
        let memory =
            GuestMemory::from_fds(vec![FdRegion { fd, fd_offset: 0, gpa: PAGE, len: PAGE }]);
        assert_eq!(memory.map(|memory| memory.total_bytes()), expected, "{what}");
    }
}

/// Huge pages may run out at any touch. (On a kernel without them there is nothing to refuse.)
#[test]
fn files_of_huge_pages_are_refused() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    let Ok(fd) = rustix::fs::memfd_create("test", flags) else { return };
    let huge = 1 << 30;
    rustix::fs::ftruncate(&fd, huge).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    let regions = vec![FdRegion { fd, fd_offset: 0, gpa: 0, len: huge }];
    assert_eq!(GuestMemory::from_fds(regions).unwrap_err(), MemoryError::HugePages { gpa: 0 });
}

/// What a peer maps of our own memory can neither be truncated nor closed to us by it.
#[test]
fn our_memfd_is_sealed() {
    let memory = GuestMemory::memfd(2 * PAGE).unwrap();
    let (fd, offset) = memory.regions()[0].backing().unwrap();
    assert_eq!(offset, 0);
    assert!(rustix::fs::ftruncate(fd, PAGE).is_err(), "shrunk");
    assert!(rustix::fs::ftruncate(fd, 3 * PAGE).is_err(), "grown");
    assert!(rustix::fs::fcntl_add_seals(fd, SealFlags::FUTURE_WRITE).is_err(), "sealed further");
    for bytes in [0, 1, PAGE + 1, u64::MAX] {
        assert!(GuestMemory::memfd(bytes).is_err(), "{bytes}");
    }
    let fd = fd.try_clone_to_owned().unwrap();
    let peer = FdRegion { fd, fd_offset: PAGE, gpa: 16 * PAGE, len: PAGE };
    let peer = GuestMemory::from_fds(vec![peer]).unwrap();
    peer.write(16 * PAGE + 5, b"hello").unwrap();
    let mut got = [0; 5];
    memory.read(PAGE + 5, &mut got).unwrap();
    assert_eq!(&got, b"hello");
}

/// Two regions side by side, a hole, a third; given in another order.
fn three_regions() -> GuestMemory {
    GuestMemory::from_fds(vec![
        region(0, 6 * PAGE, PAGE),
        region(0, PAGE, 2 * PAGE),
        region(PAGE, 3 * PAGE, PAGE),
    ])
    .unwrap()
}

#[test]
fn ranges_are_ram_region_or_neither() {
    let memory = three_regions();
    let gpas: Vec<u64> = memory.regions().iter().map(|region| region.gpa()).collect();
    assert_eq!(gpas, [PAGE, 3 * PAGE, 6 * PAGE]);
    assert_eq!(memory.total_bytes(), 4 * PAGE);

    let not_ram = |gpa, len| Err(MemoryError::NotRam { gpa, len });
    let crosses = |gpa, len| Err(MemoryError::CrossesRegions { gpa, len });
    for (gpa, len, expected) in [
        (PAGE, 2 * PAGE, Ok(2 * PAGE)),
        (PAGE, 0, Ok(0)),
        (3 * PAGE - 1, 1, Ok(1)),
        (3 * PAGE - 1, 2, crosses(3 * PAGE - 1, 2)),
        (PAGE, 3 * PAGE, crosses(PAGE, 3 * PAGE)),
        (PAGE, 3 * PAGE + 1, not_ram(PAGE, 3 * PAGE + 1)),
        (0, 1, not_ram(0, 1)),
        (PAGE - 1, 2, not_ram(PAGE - 1, 2)),
        (4 * PAGE, 1, not_ram(4 * PAGE, 1)),
        (4 * PAGE, 0, not_ram(4 * PAGE, 0)),
        (3 * PAGE, 4 * PAGE, not_ram(3 * PAGE, 4 * PAGE)),
        (6 * PAGE, PAGE, Ok(PAGE)),
        (7 * PAGE - 1, 2, not_ram(7 * PAGE - 1, 2)),
        (u64::MAX, 1, not_ram(u64::MAX, 1)),
        (PAGE, u64::MAX, not_ram(PAGE, u64::MAX)),
    ] {
        let slice = memory.slice(gpa, len as usize).map(|slice| slice.len() as u64);
        assert_eq!(slice, expected, "slice {gpa:#x}+{len:#x}");
        let is_ram = !matches!(expected, Err(MemoryError::NotRam { .. }));
        assert_eq!(memory.contains(gpa, len), is_ram, "contains {gpa:#x}+{len:#x}");
        if len < 16 * PAGE {
            let mut bytes = vec![0; len as usize];
            assert_eq!(memory.read(gpa, &mut bytes).is_ok(), is_ram, "read {gpa:#x}+{len:#x}");
            assert_eq!(memory.write(gpa, &bytes).is_ok(), is_ram, "write {gpa:#x}+{len:#x}");
        }
    }
}

#[test]
fn copies_go_on_in_the_next_region() {
    let memory = three_regions();
    let bytes: Vec<u8> = (0..3 * PAGE).map(|n| (n % 251) as u8).collect();
    memory.write(PAGE, &bytes).unwrap();
    let mut got = vec![0; bytes.len()];
    memory.read(PAGE, &mut got).unwrap();
    assert!(got == bytes);

    memory.fill(3 * PAGE - 2, 4, 0xee).unwrap();
    let value: u64 = memory.read_obj(3 * PAGE - 4).unwrap();
    let [a, b, .., c, d] = value.to_ne_bytes();
    assert_eq!([a, b, c, d], [bytes[8188], bytes[8189], bytes[8194], bytes[8195]]);
    assert_eq!(value.to_ne_bytes()[2..6], [0xee; 4]);
    memory.write_obj(3 * PAGE - 4, &u64::MAX).unwrap();
    assert_eq!(memory.read_obj::<u64>(3 * PAGE - 4), Ok(u64::MAX));
    // All or nothing: the first page is RAM, the second is not.
    let before: u64 = memory.read_obj(4 * PAGE - 8).unwrap();
    assert!(memory.write_obj(4 * PAGE - 8, &[0u8; 9]).is_err());
    assert!(memory.fill(4 * PAGE - 8, 9, 0).is_err());
    assert_eq!(memory.read_obj(4 * PAGE - 8), Ok(before));
}

#[test]
fn a_slice_keeps_to_its_bytes() {
    let memory = GuestMemory::memfd(2 * PAGE).unwrap();
    let slice = memory.slice(8, 64).unwrap();
    let outside = |offset, len| MemoryError::OutsideSlice { offset, len, slice_len: 64 };
    for (offset, len) in [(0, 65), (64, 1), (63, 2), (65, 0), (usize::MAX, 1), (1, usize::MAX)] {
        if len < 100 {
            let mut bytes = vec![0; len];
            assert_eq!(slice.read_at(offset, &mut bytes), Err(outside(offset, len)));
            assert_eq!(slice.write_at(offset, &bytes), Err(outside(offset, len)));
        }
        assert!(slice.subslice(offset, len).is_none(), "{offset}+{len}");
    }
    assert_eq!(slice.subslice(64, 0).unwrap().len(), 0);
    assert!(slice.subslice(64, 0).unwrap().is_empty());

    slice.fill(1);
    slice.subslice(16, 16).unwrap().write_at(4, &[2; 4]).unwrap();
    assert_eq!(memory.read_obj::<u32>(8 + 16 + 4), Ok(0x0202_0202));
    assert_eq!(memory.read_obj::<[u8; 2]>(7), Ok([0, 1]), "the byte before the slice");
    assert_eq!(memory.read_obj::<[u8; 2]>(71), Ok([1, 0]), "the byte behind the slice");

    for (offset, there) in [(0, true), (4, true), (60, true), (61, false), (2, false), (64, false)]
    {
        assert_eq!(slice.atomic_u32(offset).is_some(), there, "u32 at {offset}");
    }
    for (offset, there) in [(0, true), (56, true), (57, false), (4, false), (usize::MAX, false)] {
        assert_eq!(slice.atomic_u64(offset).is_some(), there, "u64 at {offset}");
        assert_eq!(slice.load_u64(offset).is_some(), there, "load at {offset}");
        assert_eq!(slice.store_u64(offset, 7).is_some(), there, "store at {offset}");
    }
    slice.atomic_u32(4).unwrap().store(9, Relaxed);
    assert_eq!(slice.load_u64(0), Some(u64::from_le(7 | 9 << 32)));

    let (low, high) = (memory.slice(0, 256).unwrap(), memory.slice(256, 256).unwrap());
    low.fill(3);
    low.copy_to(&high).unwrap();
    assert_eq!(memory.read_obj::<u64>(504), Ok(u64::from_ne_bytes([3; 8])));
    assert!(low.copy_to(&memory.slice(255, 256).unwrap()).is_err(), "overlap");
    assert!(low.copy_to(&memory.slice(512, 255).unwrap()).is_err(), "another length");
}

/// A clone and everything made of it keep the memory mapped.
#[test]
fn memory_lives_as_long_as_a_clone() {
    let memory = GuestMemory::memfd(PAGE).unwrap();
    let clone = memory.clone();
    drop(memory);
    clone.write(0, b"x").unwrap();
    assert_eq!(clone.read_obj::<u8>(0), Ok(b'x'));
}
