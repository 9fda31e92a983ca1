//! The memory of a rust-vmm VMM: regions, descriptors, dirty pages.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may stop at a surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small test values")]

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};
use vmbus_memory::{GuestMemory, MappingBudget, MemoryError, RingPages};

const PAGE: u64 = 4096;

fn file(pages: u64) -> FileOffset {
    let fd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, pages * PAGE).unwrap();
    FileOffset::new(File::from(fd), 0)
}

type Tracked = GuestMemoryMmap<AtomicBitmap>;

/// 8 pages at 0 in a file, 8 pages at 16 anonymous.
fn two_regions() -> Arc<Tracked> {
    let ranges =
        [(GuestAddress(0), 8 * 4096, Some(file(8))), (GuestAddress(16 * PAGE), 8 * 4096, None)];
    Arc::new(Tracked::from_ranges_with_files(ranges).unwrap())
}

/// Guest page numbers marked dirty, which are then clean again.
fn dirty(ram: &Tracked) -> Vec<u64> {
    let mut pages = Vec::new();
    for region in ram.iter() {
        for page in 0..region.len() / PAGE {
            if MmapRegion::bitmap(region).dirty_at((page * PAGE) as usize) {
                pages.push(region.start_addr().0 / PAGE + page);
            }
        }
        MmapRegion::bitmap(region).reset();
    }
    pages
}

#[test]
fn both_see_the_same_bytes() {
    let ram = two_regions();
    let memory = GuestMemory::from_ram(Arc::clone(&ram) as _).unwrap();
    assert_eq!(memory.total_bytes(), 16 * PAGE);
    let backed: Vec<bool> = memory.regions().iter().map(|r| r.backing().is_some()).collect();
    assert_eq!(backed, [true, false]);
    for gpa in [5, 17 * PAGE] {
        memory.write(gpa, b"ours").unwrap();
        assert_eq!(ram.read_obj::<[u8; 4]>(GuestAddress(gpa)).unwrap(), *b"ours");
        ram.write_obj(*b"vmm!", GuestAddress(gpa)).unwrap();
        assert_eq!(memory.read_obj::<[u8; 4]>(gpa), Ok(*b"vmm!"));
    }
}

#[test]
fn every_write_of_ours_is_marked() {
    let ram = two_regions();
    let memory = GuestMemory::from_ram(Arc::clone(&ram) as _).unwrap();
    dirty(&ram);
    let mut bytes = [0; 9000];
    memory.read(0, &mut bytes).unwrap();
    assert!(dirty(&ram).is_empty(), "a read");
    memory.write(4095, &[1, 2]).unwrap();
    assert_eq!(dirty(&ram), [0, 1], "a write across a page boundary");
    memory.fill(17 * PAGE, 2 * PAGE, 1).unwrap();
    assert_eq!(dirty(&ram), [17, 18], "a fill in the second region");
    memory.write_obj(7 * PAGE, &1u32).unwrap();
    assert_eq!(dirty(&ram), [7], "an object");
    let slice = memory.slice(PAGE, 4 * 4096).unwrap();
    slice.subslice(4096, 8192).unwrap().write_at(4096, &[1]).unwrap();
    assert_eq!(dirty(&ram), [3], "a part of a slice");
    slice.store_u64(8, 1).unwrap();
    assert_eq!(dirty(&ram), [1], "a word");
    slice.mark_dirty(4096, 4097);
    assert_eq!(dirty(&ram), [2, 3], "a report");
    slice.mark_dirty(3 * 4096, usize::MAX);
    assert_eq!(dirty(&ram), [4], "a report that ends with the slice");
    memory.mark_dirty(7 * PAGE, 1);
    memory.mark_dirty(17 * PAGE + 4095, 2);
    memory.mark_dirty(7 * PAGE, 2 * PAGE);
    assert_eq!(dirty(&ram), [7, 17, 18], "reports of RAM");
    slice.subslice(0, 4096).unwrap().copy_to(&slice.subslice(8192, 4096).unwrap()).unwrap();
    assert_eq!(dirty(&ram), [3], "the target of a copy");
}

/// Both forms of a ring report the guest pages that were written, not positions in the ring.
#[test]
fn writes_to_a_ring_are_marked() {
    let ram = two_regions();
    let memory = GuestMemory::from_ram(Arc::clone(&ram) as _).unwrap();
    let budget = MappingBudget::default();
    let pfns = [4, 7, 2, 5];
    for ring in [
        RingPages::map(&memory, &pfns, &budget).unwrap(),
        RingPages::scattered(&memory, &pfns).unwrap(),
    ] {
        let form = format!("{ring:?}");
        dirty(&ram);
        ring.write(4096 - 8, &[1; 16]);
        assert_eq!(dirty(&ram), [2, 7], "{form}");
        ring.write(3 * 4096 - 8, &[1; 16]);
        assert_eq!(dirty(&ram), [5, 7], "{form}: around the end");
        ring.piece(100, 8).write_at(0, &[1; 8]).unwrap();
        assert_eq!(dirty(&ram), [7], "{form}: a piece");
        assert!(ring.window(0, 8).is_none(), "{form}: a window would not report");
        ring.mark_control_dirty();
        assert_eq!(dirty(&ram), [4], "{form}: the control page");
        assert_eq!(ring.view(0, 8).len(), 8, "{form}: reading needs no report");
        let mut bytes = [0; 64];
        ring.read(0, &mut bytes);
        assert!(dirty(&ram).is_empty(), "{form}: a read");
    }
    assert_eq!(budget.left(), vmbus_memory::DEFAULT_MAPPINGS);
}

#[test]
fn rings_are_mapped_where_there_is_a_shared_file() {
    let ram = two_regions();
    let memory = GuestMemory::from_ram(Arc::clone(&ram) as _).unwrap();
    let budget = MappingBudget::default();
    for (pfns, mapped) in [([1, 2, 3], true), ([17, 18, 19], false), ([1, 2, 17], false)] {
        let ring = RingPages::map(&memory, &pfns, &budget).unwrap();
        assert_eq!(ring.is_mapped(), mapped, "{pfns:?}");
        ring.write(8190, &[1, 2, 3, 4]);
        let last = pfns[2] * PAGE + 4094;
        assert_eq!(ram.read_obj::<[u8; 2]>(GuestAddress(last)).unwrap(), [1, 2], "{pfns:?}");
        let first = pfns[1] * PAGE;
        assert_eq!(ram.read_obj::<[u8; 2]>(GuestAddress(first)).unwrap(), [3, 4], "{pfns:?}");
    }
}

/// A second mapping of a private one's file would show other bytes: such a file is not told.
#[test]
fn a_private_mapping_has_no_descriptor() {
    let flags = MapFlags::PRIVATE.bits() | MapFlags::NORESERVE.bits();
    let prot = ProtFlags::READ.bits() | ProtFlags::WRITE.bits();
    let region: MmapRegion<()> = MmapRegionBuilder::new(4 * 4096)
        .with_file_offset(file(4))
        .with_mmap_prot(prot.cast_signed())
        .with_mmap_flags(flags.cast_signed())
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let ram: GuestMemoryMmap = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    let memory = GuestMemory::from_ram(Arc::new(ram)).unwrap();
    assert!(memory.regions()[0].backing().is_none());
    let ring = RingPages::map(&memory, &[0, 1, 2], &MappingBudget::default()).unwrap();
    assert!(!ring.is_mapped());
}

#[test]
fn regions_that_are_no_whole_pages_are_refused() {
    let ram: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096 + 512)]).unwrap();
    let expected = MemoryError::RegionUnaligned { gpa: 0, len: 4608, fd_offset: 0 };
    assert_eq!(GuestMemory::from_ram(Arc::new(ram)).unwrap_err(), expected);
    let ram: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(100), 4096)]).unwrap();
    let expected = MemoryError::RegionUnaligned { gpa: 100, len: 4096, fd_offset: 0 };
    assert_eq!(GuestMemory::from_ram(Arc::new(ram)).unwrap_err(), expected);
    let empty: GuestMemoryMmap = GuestMemoryMmap::new();
    assert!(matches!(
        GuestMemory::from_ram(Arc::new(empty)).unwrap_err(),
        MemoryError::RegionCount { count: 0, .. }
    ));
}

/// The VMM may close its own descriptor or drop its handle: we hold what we need.
#[test]
fn memory_outlives_the_vmms_handle() {
    let ram = two_regions();
    let memory = GuestMemory::from_ram(Arc::clone(&ram) as _).unwrap();
    drop(ram);
    memory.write(3, b"still there").unwrap();
    let (fd, _) = memory.regions()[0].backing().unwrap();
    let mut got = [0; 11];
    rustix::io::pread(fd.as_fd(), &mut got, 3).unwrap();
    assert_eq!(&got, b"still there");
}
