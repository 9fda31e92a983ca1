//! Page runs: the memory a client endpoint gives away for rings, GPADLs and I/O buffers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmbus_wire::PAGE_SIZE;

use crate::{GuestMemory, MemoryError, SharedSlice};

/// Most runs one allocator has out at a time. Free extents are at most one more than runs, so this
/// also bounds what the allocator itself needs.
pub const MAX_RUNS: usize = 65_536;

const PAGE: u64 = PAGE_SIZE as u64;

/// Hands out runs of pages from one range of guest memory: first fit, neighbours joined when freed.
/// A clone is another handle to the same allocator; it may be used from any thread.
#[derive(Clone, Debug)]
pub struct PageAllocator(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    memory: GuestMemory,
    free: Mutex<Free>,
}

#[derive(Debug)]
struct Free {
    /// First page number -> number of pages; no two touch.
    extents: BTreeMap<u64, u64>,
    pages: u64,
    runs_out: usize,
}

impl PageAllocator {
    /// Takes charge of the `len` bytes of `memory` from guest physical address `gpa_start` on. They
    /// must be whole pages of one region, and nobody else's.
    ///
    /// # Errors
    /// [`MemoryError::RegionUnaligned`], and those of [`GuestMemory::slice`].
    pub fn new(memory: &GuestMemory, gpa_start: u64, len: u64) -> Result<Self, MemoryError> {
        let unaligned = MemoryError::RegionUnaligned { gpa: gpa_start, len, fd_offset: 0 };
        if len == 0 || !gpa_start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(unaligned);
        }
        memory.slice(gpa_start, usize::try_from(len).map_err(|_| unaligned)?)?;
        let pages = len / PAGE;
        let extents = BTreeMap::from([(gpa_start / PAGE, pages)]);
        let free = Mutex::new(Free { extents, pages, runs_out: 0 });
        Ok(Self(Arc::new(Shared { memory: memory.clone(), free })))
    }

    /// A run of `pages` pages in a row. They hold whatever was there before.
    ///
    /// # Errors
    /// [`MemoryError::NoPages`] (also for 0 pages), [`MemoryError::TooManyRuns`].
    pub fn allocate(&self, pages: u32) -> Result<PageRun, MemoryError> {
        let mut free = self.0.free();
        if free.runs_out >= MAX_RUNS {
            return Err(MemoryError::TooManyRuns { max: MAX_RUNS });
        }
        let wanted = u64::from(pages);
        let fits = |(first, count): (&u64, &u64)| (*count >= wanted).then_some((*first, *count));
        let found = free.extents.iter().find_map(fits).filter(|_| pages > 0);
        let Some((first, count)) = found else {
            return Err(MemoryError::NoPages { pages, free: free.pages });
        };
        free.extents.remove(&first);
        if count > wanted {
            free.extents.insert(first + wanted, count - wanted);
        }
        free.pages -= wanted;
        free.runs_out += 1;
        drop(free);
        Ok(PageRun { allocator: self.clone(), first, pages })
    }

    /// Pages that are not out at the moment.
    #[must_use]
    pub fn free_pages(&self) -> u64 {
        self.0.free().pages
    }

    /// The memory the pages belong to.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.0.memory
    }
}

impl Shared {
    fn free(&self) -> MutexGuard<'_, Free> {
        // Nothing in the critical sections panics half-way.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pages in a row, given back on drop.
#[derive(Debug)]
pub struct PageRun {
    allocator: PageAllocator,
    first: u64,
    pages: u32,
}

impl PageRun {
    /// Guest physical address of the first byte.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.first * PAGE
    }

    /// Number of pages, never 0.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a run is never empty")]
    pub fn len(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }

    /// The page numbers, ascending.
    pub fn pfns(&self) -> impl DoubleEndedIterator<Item = u64> + ExactSizeIterator + Clone + use<> {
        let first = self.first;
        (0..self.pages).map(move |page| first + u64::from(page))
    }

    /// The memory the pages belong to.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        self.allocator.memory()
    }

    /// All bytes of the run.
    ///
    /// # Errors
    /// Those of [`GuestMemory::slice`]; never, as the allocator's range lies in one region.
    pub fn slice(&self) -> Result<SharedSlice<'_>, MemoryError> {
        self.memory().slice(self.gpa(), self.len())
    }
}

impl Drop for PageRun {
    fn drop(&mut self) {
        let mut free = self.allocator.0.free();
        let (mut first, mut count) = (self.first, u64::from(self.pages));
        free.pages += count;
        free.runs_out -= 1;
        if let Some(after) = free.extents.remove(&(first + count)) {
            count += after;
        }
        let before = free.extents.range(..first).next_back().map(|(at, len)| (*at, *len));
        if let Some((at, len)) = before.filter(|(at, len)| at + len == first) {
            first = at;
            count += len;
        }
        free.extents.insert(first, count);
    }
}
