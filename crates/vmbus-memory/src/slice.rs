//! Bounded spans of shared memory.
#![allow(unsafe_code, reason = "turns checked offsets into copies and atomics")]

use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::MemoryError;
use crate::copy;

/// Where writes are reported when somebody keeps track of them. Positions are whatever the
/// implementor counts in: guest addresses for memory, bytes of data for a ring.
pub(crate) trait WriteLog: Send + Sync {
    fn wrote(&self, at: u64, len: u64);
}

/// A span of shared memory that is only read.
///
/// The peer may change the bytes at any time: what was read twice may differ. Read once, into memory
/// of your own, and check that.
#[derive(Clone, Copy, Debug)]
pub struct SharedView<'a> {
    base: NonNull<u8>,
    len: usize,
    lives: PhantomData<&'a ()>,
}

// SAFETY: the bytes are reached by copies and atomics only, which may run in any thread at any time
// (M2).
unsafe impl Send for SharedView<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for SharedView<'_> {}

impl<'a> SharedView<'a> {
    /// # Safety
    /// **S1**: for `'a`, `base..base + len` is shared memory under promises M1 and M2 (or R1 and R2).
    #[inline]
    pub(crate) unsafe fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len, lives: PhantomData }
    }

    /// Length in bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the span has no bytes.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the bytes from `offset` on into `into`, as many as it has.
    ///
    /// # Errors
    /// [`MemoryError::OutsideSlice`]; nothing was copied.
    #[inline]
    pub fn read_at(&self, offset: usize, into: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.at(offset, into.len()).ok_or_else(|| self.outside(offset, into.len()))?;
        // SAFETY: C1: `at` and S1; `into` is a slice. C2, C3: `into` is an exclusive reference, and
        // none points into shared memory (M2). C4: M2.
        unsafe { copy::load(into.as_mut_ptr(), from.as_ptr(), into.len()) };
        Ok(())
    }

    /// Loads the aligned 64-bit word at byte `offset` once, or `None` if it is misaligned or outside.
    #[inline]
    #[must_use]
    pub fn load_u64(&self, offset: usize) -> Option<u64> {
        Some(self.word::<AtomicU64>(offset)?.load(Relaxed))
    }

    /// Tells the processor that the `len` bytes from `offset` on will be read soon. Only a hint, and
    /// cheap: bytes outside the span are left out.
    #[inline]
    pub fn prefetch(&self, offset: usize, len: usize) {
        const LINE: usize = 64;
        let end = offset.saturating_add(len).min(self.len);
        let mut at = offset;
        while at < end {
            copy::prefetch(self.base.as_ptr().wrapping_add(at));
            at += LINE; // `end` lies in a mapping, so this cannot overflow
        }
    }

    /// The aligned word at byte `offset`, or `None` if it is misaligned or outside.
    #[inline]
    fn word<A: Atomic>(&self, offset: usize) -> Option<&'a A> {
        let word = self.at(offset, size_of::<A>())?.cast::<A>();
        if !word.is_aligned() {
            return None;
        }
        // SAFETY: aligned, valid for `'a` (`at`, S1), atomic (`Atomic`), and reached by atomics and
        // copies only (M2).
        Some(unsafe { word.as_ref() })
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        if offset > self.len || len > self.len - offset {
            return None;
        }
        // SAFETY: `offset <= len` bytes lie in one mapping (S1), so the sum stays inside it.
        Some(unsafe { self.base.add(offset) })
    }

    #[cold]
    fn outside(&self, offset: usize, len: usize) -> MemoryError {
        MemoryError::OutsideSlice { offset, len, slice_len: self.len }
    }
}

/// # Safety
/// The type is an atomic integer: any bytes are a value of it, and it may change while borrowed.
unsafe trait Atomic {}
// SAFETY: it is one.
unsafe impl Atomic for AtomicU32 {}
// SAFETY: it is one.
unsafe impl Atomic for AtomicU64 {}

/// A span of shared memory that lies in one piece in this process. Copying the value copies the
/// reference, not the bytes.
///
/// The peer may change the bytes at any time: what was read twice may differ. Read once, into memory
/// of your own, and check that.
#[derive(Clone, Copy)]
pub struct SharedSlice<'a> {
    view: SharedView<'a>,
    /// Whom to tell about writes, and where the first byte is in its terms.
    log: Option<(&'a dyn WriteLog, u64)>,
}

impl fmt::Debug for SharedSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.view.fmt(f)
    }
}

impl<'a> SharedSlice<'a> {
    /// # Safety
    /// S1 of [`SharedView::new`].
    #[inline]
    pub(crate) unsafe fn new(
        base: NonNull<u8>,
        len: usize,
        log: Option<(&'a dyn WriteLog, u64)>,
    ) -> Self {
        // SAFETY: S1.
        Self { view: unsafe { SharedView::new(base, len) }, log }
    }

    /// Length in bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.view.len
    }

    /// Whether the span has no bytes.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.view.len == 0
    }

    /// The same bytes, only to be read.
    #[inline]
    #[must_use]
    pub fn view(&self) -> SharedView<'a> {
        self.view
    }

    /// The address of the first byte in this process, for a system call or a device that moves the
    /// bytes itself. Valid for `'a`. Bytes written behind our back are reported with
    /// [`Self::mark_dirty`].
    #[inline]
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.view.base.as_ptr()
    }

    /// Bytes `offset..offset + len`, or `None` if they are not all inside.
    #[inline]
    #[must_use]
    pub fn subslice(&self, offset: usize, len: usize) -> Option<SharedSlice<'a>> {
        let base = self.view.at(offset, len)?;
        let log = self.log.map(|(log, at)| (log, at.saturating_add(offset as u64)));
        // SAFETY: S1 holds for the whole and `at` has shown this to be a part of it.
        Some(unsafe { Self::new(base, len, log) })
    }

    /// Copies the bytes from `offset` on into `into`, as many as it has.
    ///
    /// # Errors
    /// [`MemoryError::OutsideSlice`]; nothing was copied.
    #[inline]
    pub fn read_at(&self, offset: usize, into: &mut [u8]) -> Result<(), MemoryError> {
        self.view.read_at(offset, into)
    }

    /// Copies all of `from` to the bytes from `offset` on.
    ///
    /// # Errors
    /// [`MemoryError::OutsideSlice`]; nothing was copied.
    #[inline]
    pub fn write_at(&self, offset: usize, from: &[u8]) -> Result<(), MemoryError> {
        let to = self
            .view
            .at(offset, from.len())
            .ok_or_else(|| self.view.outside(offset, from.len()))?;
        // SAFETY: C1: `at` and S1; `from` is a slice. C2, C3: nobody writes `from` while it is
        // borrowed, and no reference points into shared memory (M2). C4: M2.
        unsafe { copy::store(to.as_ptr(), from.as_ptr(), from.len()) };
        self.mark_dirty(offset, from.len());
        Ok(())
    }

    /// Copies all bytes to `to`, which must be as long. The two must not share bytes.
    ///
    /// # Errors
    /// [`MemoryError::OutsideSlice`] if the lengths differ or the bytes overlap; nothing was copied.
    pub fn copy_to(&self, to: &SharedSlice<'_>) -> Result<(), MemoryError> {
        let (len, from, to_base) = (self.len(), self.as_ptr(), to.as_ptr());
        if len != to.len() || from.addr().abs_diff(to_base.addr()) < len {
            return Err(to.view.outside(0, len));
        }
        // SAFETY: C1: S1 of both. C2: tested, the starts are at least `len` apart. C4: M2.
        unsafe { copy::across(to_base, from, len) };
        to.mark_dirty(0, len);
        Ok(())
    }

    /// Sets every byte to `byte`.
    pub fn fill(&self, byte: u8) {
        // SAFETY: C1: S1. C4: M2.
        unsafe { copy::fill(self.as_ptr(), byte, self.len()) };
        self.mark_dirty(0, self.len());
    }

    /// The aligned word at byte `offset`, or `None` if it is misaligned or outside. Stores to it are
    /// reported with [`Self::mark_dirty`].
    #[inline]
    #[must_use]
    pub fn atomic_u32(&self, offset: usize) -> Option<&'a AtomicU32> {
        self.view.word(offset)
    }

    /// The aligned word at byte `offset`, or `None` if it is misaligned or outside. Stores to it are
    /// reported with [`Self::mark_dirty`].
    #[inline]
    #[must_use]
    pub fn atomic_u64(&self, offset: usize) -> Option<&'a AtomicU64> {
        self.view.word(offset)
    }

    /// Loads the aligned 64-bit word at byte `offset` once, or `None` if it is misaligned or outside.
    #[inline]
    #[must_use]
    pub fn load_u64(&self, offset: usize) -> Option<u64> {
        self.view.load_u64(offset)
    }

    /// Stores the aligned 64-bit word at byte `offset`, or `None` if it is misaligned or outside.
    #[inline]
    #[must_use]
    pub fn store_u64(&self, offset: usize, value: u64) -> Option<()> {
        self.atomic_u64(offset)?.store(value, Relaxed);
        self.mark_dirty(offset, size_of::<u64>());
        Some(())
    }

    /// Reports `len` bytes from `offset` on as written, to memory that tracks writes. Needed only
    /// after writing through [`Self::as_ptr`] or an atomic; after the write, never before.
    #[inline]
    pub fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some((log, at)) = self.log {
            let len = len.min(self.len().saturating_sub(offset));
            log.wrote(at.saturating_add(offset as u64), len as u64);
        }
    }
}
