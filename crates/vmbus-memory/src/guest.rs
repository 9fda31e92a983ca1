//! The guest physical address space.
#![allow(unsafe_code, reason = "makes slices of mapped regions")]

use core::fmt;
use core::ptr::NonNull;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use vmbus_wire::PAGE_SIZE;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::MemoryError;
use crate::mapping::Mapping;
use crate::ram::GuestRam;
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
    backing: Option<(OwnedFd, u64)>,
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
        self.backing.as_ref().map(|(fd, offset)| (fd.as_fd(), *offset))
    }

    fn end(&self) -> u64 {
        self.gpa.saturating_add(self.len)
    }
}

impl fmt::Debug for RamRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.gpa, self.len)
    }
}

/// The guest physical address space: regions of RAM. A clone is another handle to the same memory.
#[derive(Clone)]
pub struct GuestMemory(Arc<Inner>);

struct Inner {
    /// Sorted by address, without overlap; never empty.
    regions: Box<[RamRegion]>,
    total_bytes: u64,
    /// Whom to tell about writes.
    log: Option<RamLog>,
    /// Keep the regions mapped: our own mappings, or their owner.
    _mappings: Vec<Mapping>,
    _ram: Option<Arc<dyn GuestRam>>,
}

struct RamLog(Arc<dyn GuestRam>);

impl WriteLog for RamLog {
    fn wrote(&self, at: u64, len: u64) {
        self.0.mark_dirty(at, len);
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory").field("regions", &self.0.regions).finish_non_exhaustive()
    }
}

impl GuestMemory {
    /// One region of `bytes` zero bytes at guest physical address 0, in a memfd that can neither
    /// shrink nor grow and can be given to a peer.
    ///
    /// # Errors
    /// A size that is no whole number of pages, 0 or over [`MAX_MEMORY_BYTES`]; a refusal by the
    /// system.
    pub fn memfd(bytes: u64) -> Result<Self, MemoryError> {
        check_region(0, bytes, 0)?;
        check_total(bytes)?;
        let fd = rustix::fs::memfd_create(
            "vmbus-memory",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )
        .map_err(MemoryError::system("memfd_create"))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(MemoryError::system("ftruncate"))?;
        // Also against further seals: a peer that holds the file could otherwise forbid new writable
        // mappings and push every ring into its slower form.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(MemoryError::system("fcntl(F_ADD_SEALS)"))?;
        Self::from_fds(vec![FdRegion { fd, fd_offset: 0, gpa: 0, len: bytes }])
    }

    /// Maps memory that a peer gave us by descriptor.
    ///
    /// # Errors
    /// Everything about `regions` is the peer's word and is checked: their number
    /// ([`MAX_REGIONS`]), alignment, ends, overlaps, sum ([`MAX_MEMORY_BYTES`]), the seal and the
    /// size of each file. Nothing stays mapped or open after an error.
    pub fn from_fds(regions: Vec<FdRegion>) -> Result<Self, MemoryError> {
        check_count(regions.len())?;
        let mut total = 0u64;
        for FdRegion { fd_offset, gpa, len, .. } in &regions {
            check_region(*gpa, *len, *fd_offset)?;
            total = total.saturating_add(*len);
        }
        check_total(total)?;

        let mut mappings = Vec::with_capacity(regions.len());
        let mut mapped = Vec::with_capacity(regions.len());
        for FdRegion { fd, fd_offset, gpa, len } in regions {
            check_file(&fd, fd_offset, gpa, len)?;
            let mapping = Mapping::file(fd.as_fd(), fd_offset, host_len(gpa, len)?)?;
            let base = mapping.base();
            mappings.push(mapping);
            mapped.push(RamRegion { gpa, len, base, backing: Some((fd, fd_offset)) });
        }
        Self::assemble(mapped, mappings, None)
    }

    /// Uses memory that somebody else owns and has mapped, such as a VMM's.
    ///
    /// # Errors
    /// Regions that are not page aligned, overlap, are too many or too large; a descriptor that
    /// cannot be duplicated.
    pub fn from_ram(ram: Arc<dyn GuestRam>) -> Result<Self, MemoryError> {
        let told = ram.regions();
        check_count(told.len())?;
        let mut regions = Vec::with_capacity(told.len());
        for region in &told {
            let fd_offset = region.backing.map_or(0, |(_, offset)| offset);
            check_region(region.gpa, region.len, fd_offset)?;
            if region.base.as_ptr().addr() % PAGE_SIZE != 0 {
                let (gpa, len) = (region.gpa, region.len);
                return Err(MemoryError::RegionUnaligned { gpa, len, fd_offset });
            }
            let backing = match region.backing {
                None => None,
                Some((fd, offset)) => {
                    let fd = fd.try_clone_to_owned().map_err(|error| MemoryError::System {
                        call: "fcntl(F_DUPFD_CLOEXEC)",
                        errno: rustix::io::Errno::from_io_error(&error)
                            .unwrap_or(rustix::io::Errno::IO),
                    })?;
                    Some((fd, offset))
                }
            };
            regions.push(RamRegion {
                gpa: region.gpa,
                len: region.len,
                base: region.base,
                backing,
            });
        }
        drop(told);
        Self::assemble(regions, Vec::new(), Some(ram))
    }

    fn assemble(
        mut regions: Vec<RamRegion>,
        mappings: Vec<Mapping>,
        ram: Option<Arc<dyn GuestRam>>,
    ) -> Result<Self, MemoryError> {
        regions.sort_by_key(RamRegion::gpa);
        for pair in regions.windows(2) {
            if let [low, high] = pair
                && low.end() > high.gpa
            {
                let (gpa, len) = (high.gpa, high.len);
                return Err(MemoryError::RegionOverlap { gpa, len, other_gpa: low.gpa });
            }
        }
        let total_bytes = regions.iter().fold(0u64, |sum, region| sum.saturating_add(region.len));
        check_total(total_bytes)?;
        let log = ram.as_ref().filter(|ram| ram.tracks_writes()).map(|ram| RamLog(Arc::clone(ram)));
        let regions = regions.into_boxed_slice();
        Ok(Self(Arc::new(Inner { regions, total_bytes, log, _mappings: mappings, _ram: ram })))
    }

    /// The regions, by ascending address.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.0.regions
    }

    /// Bytes of RAM in all.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.0.total_bytes
    }

    /// Whether all `len` bytes from `gpa` on are RAM, in however many regions.
    #[must_use]
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        self.pieces(gpa, len).is_ok()
    }

    /// The `len` bytes from `gpa` on, which must lie in one region.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`], [`MemoryError::CrossesRegions`].
    #[inline]
    pub fn slice(&self, gpa: u64, len: usize) -> Result<SharedSlice<'_>, MemoryError> {
        match self.region_at(gpa) {
            Some(region) if len as u64 <= region.len - (gpa - region.gpa) => {
                Ok(self.slice_of(region, gpa - region.gpa, len))
            }
            _ => Err(self.no_slice(gpa, len as u64)),
        }
    }

    /// Copies the bytes from `gpa` on into `into`, as many as it has.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`]; nothing was copied.
    #[inline]
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        if let Ok(slice) = self.slice(gpa, into.len()) {
            return slice.read_at(0, into);
        }
        let mut rest = into;
        for piece in self.pieces(gpa, rest.len() as u64)? {
            let Some((now, later)) = rest.split_at_mut_checked(piece.len()) else { break };
            piece.read_at(0, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Copies all of `from` to the bytes from `gpa` on.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`]; nothing was copied.
    #[inline]
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<(), MemoryError> {
        if let Ok(slice) = self.slice(gpa, from.len()) {
            return slice.write_at(0, from);
        }
        let mut rest = from;
        for piece in self.pieces(gpa, rest.len() as u64)? {
            let Some((now, later)) = rest.split_at_checked(piece.len()) else { break };
            piece.write_at(0, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Sets `len` bytes from `gpa` on to `byte`.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`]; nothing was written.
    pub fn fill(&self, gpa: u64, len: u64, byte: u8) -> Result<(), MemoryError> {
        for piece in self.pieces(gpa, len)? {
            piece.fill(byte);
        }
        Ok(())
    }

    /// A copy of the `T` at `gpa`.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`].
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, gpa: u64) -> Result<T, MemoryError> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Stores `value` at `gpa`.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`]; nothing was written.
    pub fn write_obj<T: IntoBytes + Immutable>(
        &self,
        gpa: u64,
        value: &T,
    ) -> Result<(), MemoryError> {
        self.write(gpa, value.as_bytes())
    }

    /// Whether writes are reported to the memory's owner.
    pub(crate) fn tracks_writes(&self) -> bool {
        self.0.log.is_some()
    }

    pub(crate) fn mark_dirty(&self, gpa: u64, len: u64) {
        if let Some(log) = &self.0.log {
            log.wrote(gpa, len);
        }
    }

    #[inline]
    pub(crate) fn region_at(&self, gpa: u64) -> Option<&RamRegion> {
        let regions = &self.0.regions;
        // Most guests have one or two regions: the search then is one or two comparisons.
        let above = regions.partition_point(|region| region.gpa <= gpa);
        let region = regions.get(above.checked_sub(1)?)?;
        (gpa - region.gpa < region.len).then_some(region)
    }

    #[inline]
    fn slice_of<'a>(&'a self, region: &RamRegion, offset: u64, len: usize) -> SharedSlice<'a> {
        debug_assert!(offset + len as u64 <= region.len);
        let log = self.0.log.as_ref().map(|log| (log as &dyn WriteLog, region.gpa + offset));
        // A region is mapped, so its length and every offset in it fit `usize`.
        #[allow(clippy::cast_possible_truncation, reason = "offsets within a mapping fit")]
        // SAFETY: the callers have checked `offset + len <= region.len`; the region stays mapped
        // while `self` is borrowed (M1) and nobody has references into it (M2).
        unsafe {
            SharedSlice::new(region.base.add(offset as usize), len, log)
        }
    }

    #[cold]
    fn no_slice(&self, gpa: u64, len: u64) -> MemoryError {
        if self.contains(gpa, len) {
            MemoryError::CrossesRegions { gpa, len }
        } else {
            MemoryError::NotRam { gpa, len }
        }
    }

    /// The range as one slice per region, or an error before the first if any of it is not RAM.
    fn pieces(
        &self,
        gpa: u64,
        len: u64,
    ) -> Result<impl Iterator<Item = SharedSlice<'_>>, MemoryError> {
        let error = MemoryError::NotRam { gpa, len };
        let end = gpa.checked_add(len).ok_or(error)?;
        let regions = &self.0.regions;
        let above = regions.partition_point(|region| region.gpa <= gpa);
        let first = above.checked_sub(1).ok_or(error)?;
        let touched = regions.get(first..).unwrap_or_default();
        let mut reached = gpa;
        for region in touched {
            if reached >= end || region.gpa > reached {
                break;
            }
            reached = reached.max(region.end());
        }
        let start_inside = touched.first().is_some_and(|region| gpa < region.end());
        if !start_inside || reached < end {
            return Err(error);
        }
        Ok(touched.iter().take_while(move |region| region.gpa < end).map(move |region| {
            let start = gpa.max(region.gpa);
            #[allow(clippy::cast_possible_truncation, reason = "lengths within a mapping fit")]
            let len = (end.min(region.end()) - start) as usize;
            self.slice_of(region, start - region.gpa, len)
        }))
    }
}

fn check_count(count: usize) -> Result<(), MemoryError> {
    if count == 0 || count > MAX_REGIONS {
        return Err(MemoryError::RegionCount { count, max: MAX_REGIONS });
    }
    Ok(())
}

fn check_region(gpa: u64, len: u64, fd_offset: u64) -> Result<(), MemoryError> {
    if len == 0 || [gpa, len, fd_offset].iter().any(|value| value % PAGE != 0) {
        return Err(MemoryError::RegionUnaligned { gpa, len, fd_offset });
    }
    let signed_end = fd_offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
    if gpa.checked_add(len).is_none() || signed_end.is_none() {
        return Err(MemoryError::RegionOverflow { gpa, len, fd_offset });
    }
    Ok(())
}

fn check_total(bytes: u64) -> Result<(), MemoryError> {
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
    // Only after the seal: what cannot shrink any more is still as long when it is mapped.
    let stat = rustix::fs::fstat(fd).map_err(MemoryError::system("fstat"))?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let needed = fd_offset.saturating_add(len);
    if size < needed {
        return Err(MemoryError::FileTooShort { gpa, needed, size });
    }
    Ok(())
}

fn host_len(gpa: u64, len: u64) -> Result<usize, MemoryError> {
    usize::try_from(len).map_err(|_| MemoryError::RegionOverflow { gpa, len, fd_offset: 0 })
}
