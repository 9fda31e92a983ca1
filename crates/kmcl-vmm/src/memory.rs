//! The guest's memory: one memfd, mapped here and into the guest. How it is saved into a file, and comes
//! back from one, at once or while the guest runs.
//!
//! | module | what it has |
//! |---|---|
//! | `index` | what is where in a file of memory, as the saved state has it |
//! | `part` | which pages of a part are zeros |
//! | `lanes` | several parts at once |
//! | `save` | memory into a file |
//! | `source` | a file of memory, read part by part |
//! | `sparse` | what of a file is not a hole |
//! | `eager` | memory that is read at once |
//! | `lazy` | memory that is read while the guest runs |
//! | `fault` | pages that are brought in when they are touched |
//!
//! A memory of a guest is cut into parts of [`PART_BYTES`]. Each is checked as a whole by its checksum, and
//! stands by itself in the file: that is what lets it be loaded in any order, and on several threads.
#![allow(unsafe_code, reason = "tells KVM, and the bus, what is mapped")]

mod eager;
mod fault;
mod index;
mod lanes;
mod lazy;
mod part;
mod save;
mod source;
mod sparse;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::mmap::{GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmbus_memory::{GuestMemory, GuestRam, HostRegion};

use crate::error::Error;
use crate::layout::{GAP, HIGH_RAM};
use fault::MissingPages;
use lazy::Loading;
use source::MemoryFile;

pub use index::{Form, IndexError, MemoryIndex, MemoryIndexSave, PART_BYTES};
pub use lazy::LoadFailed;
pub use save::{Compression, ZSTD_LEVEL, save_memory};
pub use source::MemoryFileError;

/// Least memory of a guest, in bytes.
pub(crate) const LEAST: u64 = 64 << 20;
/// Most memory of a guest, in bytes.
pub(crate) const MOST: u64 = 1 << 40;
/// Memory comes in units of so many bytes.
const UNIT: u64 = 2 << 20;

/// How far memory has come on its way into a file or out of one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemoryProgress {
    /// Bytes of memory that are done.
    pub done_bytes: u64,
    /// Bytes of memory in all.
    pub total_bytes: u64,
    /// Bytes that were written, to the file or to memory: zeros are not.
    pub written_bytes: u64,
}

/// When memory is read from its file.
pub enum Load {
    /// At once: when it is there, all of it is, and all of it is checked.
    Eager,
    /// While the guest runs. Memory is there at once; whoever touches a page that is not waits for it.
    ///
    /// Where the kernel does not allow that, it is read at once instead, and a warning is logged.
    Lazy {
        /// Who is told if it cannot be loaded after all: the file is damaged, or cannot be read any
        /// more.
        failed: LoadFailed,
    },
}

impl fmt::Debug for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eager => "Eager",
            Self::Lazy { .. } => "Lazy",
        })
    }
}

/// Where a region of memory is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Placed {
    /// In the guest.
    gpa: u64,
    /// In the memory, and its memfd.
    offset: u64,
    /// Bytes.
    len: u64,
}

impl Placed {
    /// Where the guest has what is at `offset`.
    fn gpa_of(regions: &[Self], offset: u64) -> Option<u64> {
        regions.iter().find_map(|region| {
            let inside = offset.checked_sub(region.offset).filter(|at| *at < region.len)?;
            region.gpa.checked_add(inside)
        })
    }
}

/// Guest memory, as each of its users sees it. A clone is another handle to the same memory.
#[derive(Clone)]
pub struct Ram {
    /// For the loader.
    pub(crate) map: Arc<GuestMemoryMmap>,
    /// For the bus and its devices.
    pub(crate) shared: GuestMemory,
    /// What is mapped.
    file: Arc<File>,
    /// Where it is being loaded from.
    loading: Option<Arc<Loading>>,
}

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl Ram {
    /// `bytes` of zeros, in pages of the usual size.
    ///
    /// # Errors
    /// [`Error::MemorySize`]; [`Error::Memory`] where the system refuses.
    pub fn new(bytes: u64) -> Result<Self, Error> {
        Self::of(bytes, false)
    }

    /// `bytes` of zeros, in huge pages of 2 MiB. All of them are reserved now, out of those that the
    /// system has set aside.
    ///
    /// # Errors
    /// As [`Self::new`]; [`Error::HugePages`] where there are not enough of them.
    pub fn with_huge_pages(bytes: u64) -> Result<Self, Error> {
        Self::of(bytes, true)
    }

    fn of(bytes: u64, huge_pages: bool) -> Result<Self, Error> {
        let (map, file) = make(bytes, huge_pages)?;
        let shared = GuestMemory::from_ram(Arc::clone(&map) as _).map_err(failed)?;
        Ok(Self { map, shared, file, loading: None })
    }

    /// Memory as [`save_memory`] has written it to the file `from`, and described it with `index`.
    ///
    /// # Errors
    /// The file is not there, or not the one that `index` describes; what of it is read now is damaged;
    /// regions are not where this version has them; and as [`Self::new`] and [`Self::with_huge_pages`].
    pub fn restore(
        from: &Path,
        index: &MemoryIndex,
        load: Load,
        huge_pages: bool,
        progress: &mut dyn FnMut(MemoryProgress),
    ) -> Result<Self, Error> {
        let bytes = index.memory_bytes();
        if index.regions != layout(bytes) {
            return Err(Error::MemoryLayout { bytes });
        }
        let source = MemoryFile::open(from, index)?;
        let ram = Self::of(bytes, huge_pages)?;
        if let Load::Lazy { failed: told } = load {
            match MissingPages::watch(&ram.map, huge_pages) {
                Ok(pages) => {
                    let loading = Arc::new(Loading::start(pages, source.reader()?, told)?);
                    return ram.with(loading);
                }
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "memory cannot be loaded while the guest runs, and is read at once"
                ),
            }
        }
        eager::load(&ram, huge_pages, &source, progress)?;
        Ok(ram)
    }

    /// The same memory, whose users keep `loading` going.
    fn with(self, loading: Arc<Loading>) -> Result<Self, Error> {
        let Self { map, file, .. } = self;
        let watched = Watched { _loading: Arc::clone(&loading), map: Arc::clone(&map) };
        let shared = GuestMemory::from_ram(Arc::new(watched)).map_err(failed)?;
        Ok(Self { map, shared, file, loading: Some(loading) })
    }

    /// The guest physical address space.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.shared
    }

    /// Bytes of memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shared.total_bytes()
    }

    /// Bytes that need not be loaded any more.
    #[must_use]
    pub fn loaded_bytes(&self) -> u64 {
        self.loading.as_ref().map_or(self.bytes(), |loading| loading.loaded_bytes())
    }

    /// Waits until all of the memory is there, where it is being loaded.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub fn wait_until_loaded(&self) -> Result<(), Error> {
        self.loading.as_ref().map_or(Ok(()), |loading| loading.wait())
    }

    /// Where its regions are.
    fn placed(&self) -> Vec<Placed> {
        layout(self.bytes())
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

/// Memory that is being loaded for as long as anybody uses it.
struct Watched {
    _loading: Arc<Loading>,
    map: Arc<GuestMemoryMmap>,
}

// SAFETY: R1 to R3 are those of `map`, which this holds and whose regions it tells unchanged.
unsafe impl GuestRam for Watched {
    fn regions(&self) -> Vec<HostRegion<'_>> {
        self.map.regions()
    }

    fn tracks_writes(&self) -> bool {
        self.map.tracks_writes()
    }

    fn mark_dirty(&self, gpa: u64, len: u64) {
        self.map.mark_dirty(gpa, len);
    }
}

/// Where the regions of a memory of `bytes` are.
fn layout(bytes: u64) -> Vec<Placed> {
    let low = bytes.min(GAP);
    let low = Placed { gpa: 0, offset: 0, len: low };
    let high = Placed { gpa: HIGH_RAM, offset: low.len, len: bytes - low.len };
    [low, high].into_iter().filter(|region| region.len != 0).collect()
}

/// A memfd, and each region of the guest's memory as a mapping of a piece of it.
fn make(bytes: u64, huge_pages: bool) -> Result<(Arc<GuestMemoryMmap>, Arc<File>), Error> {
    if !bytes.is_multiple_of(UNIT) || !(LEAST..=MOST).contains(&bytes) {
        return Err(Error::MemorySize { bytes, least: LEAST >> 20, most: MOST >> 30 });
    }
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Huge pages are reserved when they are mapped, so that it is not a guest's touch that finds none
    // left: SIGBUS.
    let mut map_flags = MapFlags::SHARED;
    if huge_pages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    } else {
        map_flags |= MapFlags::NORESERVE;
    }
    let none_left = || Error::HugePages { needed: bytes / UNIT, free: free_huge_pages() };
    let memfd = match memfd_create("guest memory", flags) {
        Err(_) if huge_pages && free_huge_pages().is_none() => return Err(none_left()),
        memfd => memfd.map_err(failed)?,
    };
    ftruncate(&memfd, bytes).map_err(failed)?;
    // Nobody who gets the descriptor can take pages away under us.
    fcntl_add_seals(&memfd, SealFlags::SHRINK).map_err(failed)?;
    let file = Arc::new(File::from(memfd));
    let regions = layout(bytes).into_iter().map(|Placed { gpa, offset, len }| {
        let file = FileOffset::from_arc(Arc::clone(&file), offset);
        let len = usize::try_from(len).map_err(failed)?;
        let protection = (ProtFlags::READ | ProtFlags::WRITE).bits().cast_signed();
        let flags = map_flags.bits().cast_signed();
        let region = MmapRegion::build(Some(file), len, protection, flags);
        let region =
            region.map_err(|error| if huge_pages { none_left() } else { failed(error) })?;
        GuestRegionMmap::new(region, GuestAddress(gpa))
            .ok_or_else(|| failed("a region at the end of the address space"))
    });
    let map = GuestMemoryMmap::from_regions(regions.collect::<Result<_, _>>()?);
    Ok((Arc::new(map.map_err(failed)?), file))
}

/// Huge pages of 2 MiB that nobody uses; `None` where the system has none.
fn free_huge_pages() -> Option<u64> {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    free.ok()?.trim().parse().ok()
}

fn failed(error: impl fmt::Display) -> Error {
    Error::Memory(error.to_string())
}
