//! One owned range of our address space.
#![allow(unsafe_code, reason = "mmap and munmap")]

use core::ffi::c_void;
use core::ptr::{self, NonNull};
use std::os::fd::BorrowedFd;

use rustix::mm::{MapFlags, ProtFlags};

use crate::MemoryError;

/// A range of address space that this value owns: created by one `mmap`, perhaps with files mapped
/// over parts of it, and unmapped whole on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Mapping` is an address and a length; the range belongs to the process, not to a thread,
// and this type never touches the bytes.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; no method with `&self` does more than tell the numbers.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset` on, shared, readable and writable. `len` is not 0.
    pub(crate) fn file(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Self, MemoryError> {
        // SAFETY: with a null hint and no `MAP_FIXED` the kernel picks free addresses, so no
        // existing mapping changes.
        let base = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                offset,
            )
        };
        Self::adopt(base.map_err(MemoryError::system("mmap"))?, len)
    }

    /// Takes `len` bytes of address space that fault on every access, to be filled by
    /// [`Self::place`].
    pub(crate) fn reserve(len: usize) -> Result<Self, MemoryError> {
        // SAFETY: as in `file`.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        Self::adopt(base.map_err(MemoryError::system("mmap"))?, len)
    }

    fn adopt(base: *mut c_void, len: usize) -> Result<Self, MemoryError> {
        let base = NonNull::new(base.cast::<u8>())
            .ok_or(MemoryError::System { call: "mmap", errno: rustix::io::Errno::FAULT })?;
        Ok(Self { base, len })
    }

    /// Maps `len` bytes of `fd` from `offset` on over our bytes from `at` on. False if they are not
    /// ours, or the system refuses: this value is then good for nothing but to be given up.
    pub(crate) fn place(&mut self, at: usize, fd: BorrowedFd<'_>, offset: u64, len: usize) -> bool {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return false;
        }
        // SAFETY: `MAP_FIXED` replaces `at..end` of a range that is ours alone (tested above). The
        // `&mut self` shows that nobody was given its addresses yet or holds on to them.
        let placed = unsafe {
            rustix::mm::mmap(
                self.base.as_ptr().add(at).cast(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                offset,
            )
        };
        placed.is_ok()
    }

    /// Leaves the addresses behind. For after a refused [`Self::place`]: the kernel may have removed
    /// what was there before it refused, and another thread may have mapped something of its own
    /// there since. Nobody can tell, so they are never unmapped.
    pub(crate) fn give_up(self) {
        core::mem::forget(self);
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone and whoever was given an address in it has kept this value
        // alive until now. The kernel refuses only ranges that were never mapped.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}
