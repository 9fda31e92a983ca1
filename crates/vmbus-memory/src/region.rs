//! Regions of RAM, and what is asked of them.
#![allow(unsafe_code, reason = "makes slices of mapped regions")]

use core::fmt;
use core::ptr::NonNull;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::SealFlags;
use rustix::io::Errno;
use vmbus_wire::PAGE_SIZE;

use crate::MemoryError;
use crate::mapping::Mapping;
use crate::ram::{GuestRam, HostRegion};
use crate::slice::{SharedSlice, WriteLog};

/// Most regions one guest's memory may have. KVM on x86 has about as many slots.
pub const MAX_REGIONS: usize = 512;

/// Most bytes one guest's memory may have: 16 TiB, an eighth of a process's address space.
pub const MAX_MEMORY_BYTES: u64 = 1 << 44;

const PAGE: u64 = PAGE_SIZE as u64;

/// A piece of a file that becomes RAM. Offsets and lengths are bytes, whole pages.
#[derive(Debug)]
pub struct FdRegion {
    /// A memfd sealed with `F_SEAL_SHRINK`.
    pub fd: OwnedFd,
    /// Where in the file the region starts.
    pub fd_offset: u64,
    /// Guest physical address.
    pub gpa: u64,
    /// Length.
    pub len: u64,
}

/// One region of RAM.
pub struct RamRegion {
    gpa: u64,
    len: u64,
    base: NonNull<u8>,
    backing: Option<Backing>,
    _mapped: Mapped,
}

struct Backing {
    fd: OwnedFd,
    offset: u64,
    /// Whether single pages of the file can be mapped.
    small_pages: bool,
}

/// What keeps a region mapped.
enum Mapped {
    ByUs { _mapping: Mapping },
    ByOwner { _ram: Arc<dyn GuestRam> },
}

// SAFETY: `base` is only ever turned into a `SharedSlice`, which may be used from any thread.
unsafe impl Send for RamRegion {}
// SAFETY: as for `Send`.
unsafe impl Sync for RamRegion {}

impl RamRegion {
    /// Guest physical address of the first byte, page aligned.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes, whole pages, never 0.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a region has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The file behind the region and the region's byte offset in it, if it has one.
    #[must_use]
    pub fn backing(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.backing.as_ref().map(|backing| (backing.fd.as_fd(), backing.offset))
    }

    /// As [`Self::backing`], if single pages of the file can be mapped.
    pub(crate) fn page_backing(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.backing().filter(|_| self.backing.as_ref().is_some_and(|backing| backing.small_pages))
    }

    /// The address behind the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.gpa.saturating_add(self.len) // cannot saturate: checked when the region was made
    }

    /// Maps `region`, which a peer gave us and [`check_placement`] has passed.
    pub(crate) fn map(region: FdRegion) -> Result<Self, MemoryError> {
        let FdRegion { fd, fd_offset, gpa, len } = region;
        check_file(&fd, fd_offset, gpa, len)?;
        let overflow = MemoryError::RegionOverflow { gpa, len, fd_offset };
        let host_len = usize::try_from(len).map_err(|_| overflow)?;
        let mapping = Mapping::file(fd.as_fd(), fd_offset, host_len)?;
        let base = mapping.base();
        let backing = Some(Backing { fd, offset: fd_offset, small_pages: true });
        Ok(Self { gpa, len, base, backing, _mapped: Mapped::ByUs { _mapping: mapping } })
    }

    /// Takes over what `ram` has told about one of its regions.
    pub(crate) fn adopt(
        told: &HostRegion<'_>,
        ram: &Arc<dyn GuestRam>,
    ) -> Result<Self, MemoryError> {
        let HostRegion { gpa, len, base, backing } = *told;
        let fd_offset = backing.map_or(0, |(_, offset)| offset);
        check_placement(gpa, len, fd_offset)?;
        if !base.as_ptr().addr().is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::RegionUnaligned { gpa, len, fd_offset });
        }
        let backing = match backing {
            None => None,
            Some((fd, offset)) => {
                let fd = fd.try_clone_to_owned().map_err(|error| MemoryError::System {
                    call: "fcntl(F_DUPFD_CLOEXEC)",
                    errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
                })?;
                let small_pages = !is_hugetlb(&fd)?;
                Some(Backing { fd, offset, small_pages })
            }
        };
        Ok(Self { gpa, len, base, backing, _mapped: Mapped::ByOwner { _ram: Arc::clone(ram) } })
    }

    /// The `len` bytes from guest physical address `gpa` on, or `None` if they are not all in this
    /// region. Writes are reported to `log`.
    #[inline]
    pub(crate) fn slice<'a>(
        &'a self,
        gpa: u64,
        len: u64,
        log: Option<&'a dyn WriteLog>,
    ) -> Option<SharedSlice<'a>> {
        let offset = gpa.checked_sub(self.gpa)?;
        if offset > self.len || len > self.len - offset {
            return None;
        }
        #[allow(clippy::cast_possible_truncation, reason = "the region is mapped, so it fits")]
        let (offset, len) = (offset as usize, len as usize);
        // SAFETY: S1: offset and length lie in the region (tested), which stays mapped while `self`
        // is borrowed (`_mapped`: M1, R1) and has no references into it (M2, R2).
        Some(unsafe { SharedSlice::new(self.base.add(offset), len, log.map(|log| (log, gpa))) })
    }
}

impl fmt::Debug for RamRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.gpa, self.len)
    }
}

/// That a memory of `count` regions is one.
pub(crate) fn check_count(count: usize) -> Result<(), MemoryError> {
    if count == 0 || count > MAX_REGIONS {
        return Err(MemoryError::RegionCount { count, max: MAX_REGIONS });
    }
    Ok(())
}

/// That a region is made of whole pages and ends before the largest address.
pub(crate) fn check_placement(gpa: u64, len: u64, fd_offset: u64) -> Result<(), MemoryError> {
    if len == 0 || [gpa, len, fd_offset].iter().any(|value| !value.is_multiple_of(PAGE)) {
        return Err(MemoryError::RegionUnaligned { gpa, len, fd_offset });
    }
    let signed_end = fd_offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
    if gpa.checked_add(len).is_none() || signed_end.is_none() {
        return Err(MemoryError::RegionOverflow { gpa, len, fd_offset });
    }
    Ok(())
}

/// That `bytes` are not too many.
pub(crate) fn check_total(bytes: u64) -> Result<(), MemoryError> {
    if bytes > MAX_MEMORY_BYTES {
        return Err(MemoryError::TooMuchMemory { bytes, max: MAX_MEMORY_BYTES });
    }
    Ok(())
}

/// That `fd` has the region's bytes and will keep them.
fn check_file(fd: &OwnedFd, fd_offset: u64, gpa: u64, len: u64) -> Result<(), MemoryError> {
    // A file that cannot be sealed answers EINVAL.
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| MemoryError::NotSealed { gpa })?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(MemoryError::NotSealed { gpa });
    }
    if is_hugetlb(fd)? {
        return Err(MemoryError::HugePages { gpa });
    }
    // Only after the seal: what cannot shrink any more is still as long when it is mapped.
    let stat = rustix::fs::fstat(fd).map_err(MemoryError::system("fstat"))?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let needed = fd_offset.saturating_add(len);
    if size < needed {
        return Err(MemoryError::FileTooShort { gpa, needed, size });
    }
    Ok(())
}

/// Whether `fd` is made of huge pages, which are mapped whole only.
fn is_hugetlb(fd: &OwnedFd) -> Result<bool, MemoryError> {
    const HUGETLBFS_MAGIC: i128 = 0x9584_58f6; // `linux/magic.h`
    let stat = rustix::fs::fstatfs(fd).map_err(MemoryError::system("fstatfs"))?;
    // Its type differs between architectures.
    Ok(i128::from(stat.f_type) == HUGETLBFS_MAGIC)
}
