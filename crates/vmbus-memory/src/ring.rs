//! The pages of one ring.
//!
//! # Two addresses for one byte
//!
//! In the mapped form every byte of data has two addresses here and a third in its region, and the
//! two ends of a ring in one process have mappings of their own. The compiler takes them for
//! different bytes and could move a store to one over a load from another. Nothing depends on it
//! not doing so: whatever is written by one address and read by another is ordered by the index
//! protocols, whose releases, acquires and fences hold for all addresses; and the `asm!` copies are
//! not moved over each other at all. The processor orders by what the addresses mean, not by the
//! addresses.
#![allow(unsafe_code, reason = "makes slices and atomics of ring pages")]

use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vmbus_wire::PAGE_SIZE;

use crate::mapping::Mapping;
use crate::slice::{SharedSlice, SharedView, WriteLog};
use crate::{GuestMemory, MemoryError};

/// Most pages a ring may have, its control page included: what the largest GPADL describes
/// (vmbus-wire section 5).
pub const MAX_RING_PAGES: usize = 8190;

/// Mappings one guest's rings may use, unless told otherwise. The kernel lets a process have 65,530
/// in all (`vm.max_map_count`).
pub const DEFAULT_MAPPINGS: usize = 4096;

/// How many more mappings the rings of one guest may use. A clone is another handle to the same
/// count.
#[derive(Clone, Debug)]
pub struct MappingBudget(Arc<AtomicUsize>);

impl Default for MappingBudget {
    fn default() -> Self {
        Self::new(DEFAULT_MAPPINGS)
    }
}

impl MappingBudget {
    /// A budget of `mappings`; 0 makes every ring scattered.
    #[must_use]
    pub fn new(mappings: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(mappings)))
    }

    /// Mappings left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.0.load(Relaxed)
    }

    fn take(&self, count: usize) -> Option<Taken> {
        // Relaxed: the count guards no other data.
        let taken = self.0.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(count));
        taken.ok().map(|_| Taken { budget: self.clone(), count })
    }
}

/// Mappings taken from a budget, given back on drop.
struct Taken {
    budget: MappingBudget,
    count: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.budget.0.fetch_add(self.count, Relaxed);
    }
}

/// The pages of one ring: a control page and a circle of data.
pub struct RingPages {
    control: NonNull<u8>,
    data_len: u32,
    form: Form,
    /// The page numbers and whom to tell about writes to them, if anybody wants to know.
    log: Option<Box<RingLog>>,
    /// M1 for the scattered form, and for the log.
    _memory: GuestMemory,
}

enum Form {
    /// All data twice in a row from `data` on.
    Mapped { data: NonNull<u8>, _mapping: Mapping, _taken: Taken },
    /// Where each page of data lies.
    Scattered { pages: Box<[NonNull<u8>]> },
}

// SAFETY: the pointers are turned into `SharedSlice`s and atomics only, usable from any thread.
unsafe impl Send for RingPages {}
// SAFETY: as for `Send`.
unsafe impl Sync for RingPages {}

struct RingLog {
    memory: GuestMemory,
    /// Data pages.
    pfns: Box<[u64]>,
    control: u64,
}

impl WriteLog for RingLog {
    fn wrote(&self, at: u64, len: u64) {
        let page = PAGE_SIZE as u64;
        let data = self.pfns.len() as u64 * page;
        let (mut at, mut left) = (at, len.min(data));
        while left > 0 {
            let now = left.min(page - at % page);
            let index = usize::try_from(at % data / page).unwrap_or(0);
            if let Some(pfn) = self.pfns.get(index) {
                self.memory.mark_dirty(pfn * page + at % page, now);
            }
            at += now;
            left -= now;
        }
    }
}

impl fmt::Debug for RingPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingPages")
            .field("data_len", &self.data_len)
            .field("mapped", &self.is_mapped())
            .finish_non_exhaustive()
    }
}

impl RingPages {
    /// The ring whose control page is `pfns[0]` and whose data are the rest, in order: mapped if the
    /// memory has a descriptor and `budget` allows, otherwise scattered.
    ///
    /// # Errors
    /// A page that is not RAM, or a number of pages outside `2..=`[`MAX_RING_PAGES`].
    pub fn map(
        memory: &GuestMemory,
        pfns: &[u64],
        budget: &MappingBudget,
    ) -> Result<Self, MemoryError> {
        let mut ring = Self::scattered(memory, pfns)?;
        if let Some((mapping, taken)) = map_circle(memory, pfns, budget) {
            ring.control = mapping.base();
            // SAFETY: the mapping is longer than one page.
            let data = unsafe { mapping.base().add(PAGE_SIZE) };
            ring.form = Form::Mapped { data, _mapping: mapping, _taken: taken };
        }
        Ok(ring)
    }

    /// As [`Self::map`], page by page in any case.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn scattered(memory: &GuestMemory, pfns: &[u64]) -> Result<Self, MemoryError> {
        let count = MemoryError::RingPages { pages: pfns.len(), max: MAX_RING_PAGES };
        let [control, data @ ..] = pfns else { return Err(count) };
        if data.is_empty() || pfns.len() > MAX_RING_PAGES {
            return Err(count);
        }
        let page = |pfn: &u64| {
            let gpa = gpa_of(*pfn)?;
            let slice = memory.slice(gpa, PAGE_SIZE)?;
            NonNull::new(slice.as_ptr()).ok_or(MemoryError::PageNumber { pfn: *pfn })
        };
        let pages = data.iter().map(page).collect::<Result<Box<[_]>, _>>()?;
        let data_len = u32::try_from(data.len() * PAGE_SIZE).map_err(|_| count)?;
        let log = memory.tracks_writes().then(|| {
            Box::new(RingLog { memory: memory.clone(), pfns: data.into(), control: *control })
        });
        Ok(Self {
            control: page(control)?,
            data_len,
            form: Form::Scattered { pages },
            log,
            _memory: memory.clone(),
        })
    }

    /// Whether the data are mapped as a circle.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        matches!(self.form, Form::Mapped { .. })
    }

    /// Bytes of data, whole pages.
    #[inline]
    #[must_use]
    pub fn data_len(&self) -> u32 {
        self.data_len
    }

    /// The control page's word at byte `OFFSET`. An offset that is not a word's does not compile.
    /// Stores to it are reported with [`Self::mark_control_dirty`].
    #[inline]
    #[must_use]
    pub fn control_word<const OFFSET: usize>(&self) -> &AtomicU32 {
        const { assert!(OFFSET.is_multiple_of(4) && OFFSET + 4 <= PAGE_SIZE) };
        // SAFETY: `control` is page aligned (M3) and valid for a page while `self` lives (M1, or the
        // mapping we own); the word is inside it and aligned (asserted); reached by atomics and
        // `copy` only (M2).
        unsafe { self.control.add(OFFSET).cast::<AtomicU32>().as_ref() }
    }

    /// Reports the control page as written, to memory that tracks writes.
    #[inline]
    pub fn mark_control_dirty(&self) {
        if let Some(log) = &self.log {
            log.memory.mark_dirty(log.control * PAGE_SIZE as u64, PAGE_SIZE as u64);
        }
    }

    /// The data from position `at` on, to be read: as many of `len` bytes as lie in one piece. In the
    /// mapped form that is all of them, as long as `at < data_len()` and `len <= data_len()`.
    #[inline]
    #[must_use]
    pub fn view(&self, at: u32, len: u32) -> SharedView<'_> {
        match self.circle_at(at, len) {
            // SAFETY: S1: `circle_at` has shown the bytes to be inside our own mapping.
            Some(base) => unsafe { SharedView::new(base, len as usize) },
            None => self.piece(at, len).view(),
        }
    }

    /// `len` bytes of data from position `at` on as one piece, to be written: the fast way, open in
    /// the mapped form only and if nobody keeps track of writes. `None` otherwise, and unless
    /// `at < data_len()` and `len <= data_len()`.
    #[inline]
    #[must_use]
    pub fn window(&self, at: u32, len: u32) -> Option<SharedSlice<'_>> {
        let base = self.circle_at(at, len)?;
        if self.log.is_some() {
            return None;
        }
        // SAFETY: as in `view`.
        Some(unsafe { SharedSlice::new(base, len as usize, None) })
    }

    #[inline]
    fn circle_at(&self, at: u32, len: u32) -> Option<NonNull<u8>> {
        let Form::Mapped { data, .. } = &self.form else { return None };
        if at >= self.data_len || len > self.data_len {
            return None;
        }
        // SAFETY: the data are mapped twice in a row from `data` on, so that the `len` bytes from
        // any position in the first turn are inside the mapping.
        Some(unsafe { data.add(at as usize) })
    }

    /// Copies the data from position `at` on into `into`, going round at the end. Positions count
    /// modulo [`Self::data_len`].
    pub fn read(&self, at: u32, into: &mut [u8]) {
        let mut rest = into;
        let mut at = self.inside(at);
        while !rest.is_empty() {
            let piece = self.piece(at, u32::try_from(rest.len()).unwrap_or(u32::MAX));
            let Some((now, later)) = rest.split_at_mut_checked(piece.len()) else { return };
            if now.is_empty() || piece.read_at(0, now).is_err() {
                return;
            }
            at = self.after(at, now.len());
            rest = later;
        }
    }

    /// Copies all of `from` to the data from position `at` on, going round at the end. Positions
    /// count modulo [`Self::data_len`].
    pub fn write(&self, at: u32, from: &[u8]) {
        let mut rest = from;
        let mut at = self.inside(at);
        while !rest.is_empty() {
            let piece = self.piece(at, u32::try_from(rest.len()).unwrap_or(u32::MAX));
            let Some((now, later)) = rest.split_at_checked(piece.len()) else { return };
            if now.is_empty() || piece.write_at(0, now).is_err() {
                return;
            }
            at = self.after(at, now.len());
            rest = later;
        }
    }

    /// The data from position `at` on: as many of `len` bytes as lie in one piece. In the mapped form
    /// that is all of them, up to [`Self::data_len`]; in the scattered form at most the rest of a
    /// page. Empty unless `at < data_len()`.
    #[must_use]
    pub fn piece(&self, at: u32, len: u32) -> SharedSlice<'_> {
        let log = self.log.as_deref().map(|log| (log as &dyn WriteLog, u64::from(at)));
        let len = len.min(self.data_len) as usize;
        let found = match &self.form {
            Form::Mapped { .. } => self.circle_at(at, self.data_len).map(|base| (base, len)),
            Form::Scattered { pages } => pages.get(at as usize / PAGE_SIZE).map(|page| {
                let inside = at as usize % PAGE_SIZE;
                // SAFETY: `inside` is less than the page.
                (unsafe { page.add(inside) }, len.min(PAGE_SIZE - inside))
            }),
        };
        let (base, len) = found.unwrap_or((NonNull::dangling(), 0));
        // SAFETY: S1: at most the data from inside our own mapping, or at most the rest of a page
        // (M1), or nothing; no references (M2).
        unsafe { SharedSlice::new(base, len, log) }
    }

    #[inline]
    fn inside(&self, at: u32) -> u32 {
        if at < self.data_len { at } else { at % self.data_len }
    }

    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "a piece is at most the data")]
    fn after(&self, at: u32, len: usize) -> u32 {
        let end = at + len as u32; // both at most 32 MiB
        if end >= self.data_len { end - self.data_len } else { end }
    }
}

fn gpa_of(pfn: u64) -> Result<u64, MemoryError> {
    pfn.checked_mul(PAGE_SIZE as u64).ok_or(MemoryError::PageNumber { pfn })
}

/// A run of pages that are neighbours in one file.
struct FileRun<'a> {
    fd: BorrowedFd<'a>,
    offset: u64,
    /// First page in the ring.
    at: usize,
    pages: usize,
}

/// Maps control page, data, data. `None` if the pages have no file, the budget is spent or the
/// system refuses: the scattered form serves in every case.
fn map_circle(
    memory: &GuestMemory,
    pfns: &[u64],
    budget: &MappingBudget,
) -> Option<(Mapping, Taken)> {
    if rustix::param::page_size() != PAGE_SIZE {
        return None;
    }
    let data_pages = pfns.len().checked_sub(1)?;
    let once = file_runs(memory, pfns, 0)?;
    let again = file_runs(memory, pfns.get(1..)?, pfns.len())?;
    let taken = budget.take(once.len() + again.len())?;
    // A VMM may bring memory in on demand, when it is touched where the VMM has mapped it. A page that is
    // touched first through another mapping of the file would become zeros behind its back: so they are
    // brought in before there is another one.
    for pfn in pfns {
        memory.read(gpa_of(*pfn).ok()?, &mut [0]).ok()?;
    }
    let mut mapping = Mapping::reserve((1 + 2 * data_pages) * PAGE_SIZE).ok()?;
    for run in once.iter().chain(&again) {
        let (at, len) = (run.at * PAGE_SIZE, run.pages * PAGE_SIZE);
        if !mapping.place(at, run.fd, run.offset, len) {
            mapping.give_up();
            // Stays taken, so that what is given up is bounded too.
            core::mem::forget(taken);
            return None;
        }
    }
    Some((mapping, taken))
}

/// The pages joined to runs; the first is page `at` of the mapping.
fn file_runs<'a>(memory: &'a GuestMemory, pfns: &[u64], at: usize) -> Option<Vec<FileRun<'a>>> {
    let mut runs: Vec<FileRun<'a>> = Vec::new();
    for (index, pfn) in pfns.iter().enumerate() {
        let gpa = gpa_of(*pfn).ok()?;
        let region = memory.region_at(gpa)?;
        let (fd, region_offset) = region.page_backing()?;
        let offset = region_offset + (gpa - region.gpa());
        match runs.last_mut() {
            Some(run)
                if run.fd.as_raw_fd() == fd.as_raw_fd()
                    && run.offset + (run.pages * PAGE_SIZE) as u64 == offset =>
            {
                run.pages += 1;
            }
            _ => runs.push(FileRun { fd, offset, at: at + index, pages: 1 }),
        }
    }
    Some(runs)
}
