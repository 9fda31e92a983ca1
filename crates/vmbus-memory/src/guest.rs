//! The guest physical address space.

use core::fmt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::MemoryError;
use crate::ram::GuestRam;
use crate::region::{FdRegion, RamRegion, check_count, check_placement, check_total};
use crate::slice::{SharedSlice, WriteLog};

/// The guest physical address space: regions of RAM. A clone is another handle to the same memory.
#[derive(Clone)]
pub struct GuestMemory(Arc<Inner>);

struct Inner {
    /// Sorted by address, without overlap; never empty.
    regions: Box<[RamRegion]>,
    total_bytes: u64,
    /// Whom to tell about writes.
    log: Option<RamLog>,
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
    ///
    /// [`MAX_MEMORY_BYTES`]: crate::MAX_MEMORY_BYTES
    pub fn memfd(bytes: u64) -> Result<Self, MemoryError> {
        check_placement(0, bytes, 0)?;
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
    /// ([`MAX_REGIONS`](crate::MAX_REGIONS)), alignment, ends, overlaps, sum
    /// ([`MAX_MEMORY_BYTES`]), the seal, the size and the kind of each file. Nothing stays mapped or
    /// open after an error.
    ///
    /// [`MAX_MEMORY_BYTES`]: crate::MAX_MEMORY_BYTES
    pub fn from_fds(regions: Vec<FdRegion>) -> Result<Self, MemoryError> {
        check_count(regions.len())?;
        let mut total = 0u64;
        for FdRegion { fd_offset, gpa, len, .. } in &regions {
            check_placement(*gpa, *len, *fd_offset)?;
            total = total.saturating_add(*len);
        }
        check_total(total)?;

        let mapped = regions.into_iter().map(RamRegion::map).collect::<Result<_, _>>()?;
        Self::assemble(mapped, None)
    }

    /// Uses memory that somebody else owns and has mapped, such as a VMM's.
    ///
    /// # Errors
    /// Regions that are not page aligned, overlap, are too many or too large; a descriptor that
    /// cannot be duplicated.
    pub fn from_ram(ram: Arc<dyn GuestRam>) -> Result<Self, MemoryError> {
        let told = ram.regions();
        check_count(told.len())?;
        let adopted = told.iter().map(|region| RamRegion::adopt(region, &ram));
        let regions = adopted.collect::<Result<_, _>>()?;
        drop(told);
        let log = ram.tracks_writes().then_some(RamLog(ram));
        Self::assemble(regions, log)
    }

    fn assemble(mut regions: Vec<RamRegion>, log: Option<RamLog>) -> Result<Self, MemoryError> {
        regions.sort_by_key(RamRegion::gpa);
        for pair in regions.windows(2) {
            if let [low, high] = pair
                && low.end() > high.gpa()
            {
                let (gpa, len) = (high.gpa(), high.len());
                return Err(MemoryError::RegionOverlap { gpa, len, other_gpa: low.gpa() });
            }
        }
        let total_bytes = regions.iter().fold(0u64, |sum, region| sum.saturating_add(region.len()));
        check_total(total_bytes)?;
        Ok(Self(Arc::new(Inner { regions: regions.into_boxed_slice(), total_bytes, log })))
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
        let region = self.region_at(gpa);
        region
            .and_then(|region| region.slice(gpa, len as u64, self.log()))
            .ok_or_else(|| self.no_slice(gpa, len as u64))
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

    /// Reports `len` bytes from `gpa` on as written, to an owner that keeps track. Needed only for
    /// bytes that somebody else has moved, such as the kernel; after they were, never before. What is
    /// not RAM is left out.
    pub fn mark_dirty(&self, gpa: u64, len: u64) {
        if self.tracks_writes()
            && let Ok(pieces) = self.pieces(gpa, len)
        {
            pieces.for_each(|piece| piece.mark_dirty(0, piece.len()));
        }
    }

    #[inline]
    pub(crate) fn region_at(&self, gpa: u64) -> Option<&RamRegion> {
        let regions = &self.0.regions;
        // Most guests have one or two regions: the search then is one or two comparisons.
        let above = regions.partition_point(|region| region.gpa() <= gpa);
        regions.get(above.checked_sub(1)?).filter(|region| gpa < region.end())
    }

    #[inline]
    fn log(&self) -> Option<&dyn WriteLog> {
        self.0.log.as_ref().map(|log| log as &dyn WriteLog)
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
        let above = self.0.regions.partition_point(|region| region.gpa() <= gpa);
        let first = above.checked_sub(1).ok_or(error)?;
        let regions = self.0.regions.get(first..).unwrap_or_default();
        let mut reached = gpa;
        for region in regions {
            if reached >= end || reached < region.gpa() || reached >= region.end() {
                break;
            }
            reached = region.end();
        }
        if reached < end || (len == 0 && self.region_at(gpa).is_none()) {
            return Err(error);
        }
        let touched = regions.iter().take_while(move |region| region.gpa() < end);
        Ok(touched.filter_map(move |region| {
            let start = gpa.max(region.gpa());
            region.slice(start, end.min(region.end()) - start, self.log())
        }))
    }
}
