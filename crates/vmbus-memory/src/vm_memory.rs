//! The memory of a rust-vmm VMM.
#![allow(unsafe_code, reason = "implements the unsafe trait `GuestRam`")]

use core::any::TypeId;
use core::ptr::NonNull;
use std::os::fd::AsFd;

use rustix::mm::MapFlags;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::ram::{GuestRam, HostRegion};

// SAFETY: R1: a `GuestRegionMmap` owns an `MmapRegion`, which unmaps on drop only, and we hold the
// collection by `Arc`. Regions without write permission are not listed. R2: vm-memory's first rule
// is that guest memory is reached by volatile accesses and never through references. R3: the file
// offset is the one given to `mmap`; it is told only for shared mappings.
unsafe impl<B: Bitmap + Send + Sync + 'static> GuestRam for GuestMemoryMmap<B> {
    fn regions(&self) -> Vec<HostRegion<'_>> {
        let told = self.iter().filter_map(|region| {
            let backing = region
                .file_offset()
                .filter(|_| region.flags().cast_unsigned() & MapFlags::SHARED.bits() != 0)
                .map(|file| (file.file().as_fd(), file.start()));
            Some(HostRegion {
                gpa: region.start_addr().0,
                len: region.len(),
                base: NonNull::new(region.as_ptr())?,
                backing,
            })
        });
        told.collect()
    }

    fn tracks_writes(&self) -> bool {
        TypeId::of::<B>() != TypeId::of::<()>()
    }

    fn mark_dirty(&self, gpa: u64, len: u64) {
        let Some(region) = self.find_region(GuestAddress(gpa)) else { return };
        let offset = gpa.saturating_sub(region.start_addr().0);
        if let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(len)) {
            GuestMemoryRegion::bitmap(region).mark_dirty(offset, len);
        }
    }
}
