//! The guest's memory: one memfd, mapped here and into the guest.
#![allow(unsafe_code, reason = "tells KVM what is mapped")]

use std::fs::File;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::mmap::{GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmbus_memory::GuestMemory;

use crate::error::Error;
use crate::layout::{GAP, HIGH_RAM};

/// Least memory of a guest, in bytes.
pub(crate) const LEAST: u64 = 64 << 20;
/// Most memory of a guest, in bytes.
pub(crate) const MOST: u64 = 1 << 40;
/// Memory comes in units of so many bytes.
const UNIT: u64 = 2 << 20;

/// Guest memory, as each of its users sees it.
#[derive(Clone)]
pub(crate) struct Ram {
    /// For the loader.
    pub(crate) map: Arc<GuestMemoryMmap>,
    /// For the bus and its devices.
    pub(crate) shared: GuestMemory,
}

impl Ram {
    pub(crate) fn new(bytes: u64) -> Result<Self, Error> {
        if !bytes.is_multiple_of(UNIT) || !(LEAST..=MOST).contains(&bytes) {
            return Err(Error::MemorySize { bytes, least: LEAST >> 20, most: MOST >> 30 });
        }
        let failed = |error: &dyn std::fmt::Display| Error::Memory(error.to_string());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = memfd_create("guest memory", flags).map_err(|error| failed(&error))?;
        ftruncate(&memfd, bytes).map_err(|error| failed(&error))?;
        // Nobody who gets the descriptor can take pages away under us.
        fcntl_add_seals(&memfd, SealFlags::SHRINK).map_err(|error| failed(&error))?;
        let file = Arc::new(File::from(memfd));
        let low = bytes.min(GAP);
        let pieces = [(0, 0, low), (HIGH_RAM, low, bytes - low)];
        let regions = pieces.into_iter().filter(|(_, _, len)| *len != 0);
        let regions = regions.map(|(gpa, offset, len)| {
            let file = FileOffset::from_arc(Arc::clone(&file), offset);
            let len = usize::try_from(len).map_err(|error| failed(&error))?;
            let region = MmapRegion::from_file(file, len).map_err(|error| failed(&error))?;
            GuestRegionMmap::new(region, GuestAddress(gpa))
                .ok_or_else(|| failed(&"a region at the end of the address space"))
        });
        let map = GuestMemoryMmap::from_regions(regions.collect::<Result<_, _>>()?);
        let map = Arc::new(map.map_err(|error| failed(&error))?);
        let shared =
            GuestMemory::from_ram(Arc::clone(&map) as _).map_err(|error| failed(&error))?;
        Ok(Self { map, shared })
    }

    /// Maps all of it into the guest.
    pub(crate) fn map_into(&self, vm: &VmFd) -> Result<(), Error> {
        for (slot, region) in (0..).zip(self.map.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
            };
            // SAFETY: the region is mapped for as long as its collection lives, which the machine holds
            // beside the VM; slots and addresses do not overlap. The guest changes it at will, which is
            // what vm-memory and vmbus-memory take all guest memory to do.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Where memory below 4 GiB ends.
    pub(crate) fn low_end(&self) -> u64 {
        self.map.iter().map(|region| region.len()).next().unwrap_or(0)
    }

    /// Bytes from 4 GiB on.
    pub(crate) fn high_bytes(&self) -> u64 {
        self.map.iter().skip(1).map(|region| region.len()).sum()
    }
}
