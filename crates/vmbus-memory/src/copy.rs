//! Copies to and from bytes that somebody else may be writing.
#![allow(unsafe_code, reason = "the one place where shared bytes are loaded and stored in bulk")]

/// Copies `len` bytes from `src` to `dst`, at least one of which is shared.
///
/// # Safety
/// (1) `src..src + len` is valid for reads and `dst..dst + len` for writes. (2) They do not overlap.
/// (3) The private side, if there is one, is the caller's alone. (4) The shared side is covered by
/// promise M2.
#[inline]
pub(crate) unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: the caller's (1) and (2).
    unsafe { core::ptr::copy_nonoverlapping(src, dst, len) }
}

/// Sets `len` shared bytes at `dst` to `byte`.
///
/// # Safety
/// (1) `dst..dst + len` is valid for writes. (2) It is covered by promise M2.
pub(crate) unsafe fn fill(dst: *mut u8, byte: u8, len: usize) {
    // SAFETY: the caller's (1).
    unsafe { core::ptr::write_bytes(dst, byte, len) }
}
