//! Copies in Rust's own terms: relaxed atomics on the shared side.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

const WORD: usize = size_of::<u64>();

/// Bytes in front of the first aligned word of the `len` at `at`, and the whole words behind them.
fn split(at: *const u8, len: usize) -> (usize, usize) {
    let head = at.align_offset(align_of::<AtomicU64>()).min(len);
    (head, (len - head) / WORD)
}

/// # Safety
/// C1 to C4 of [`super::load`].
pub(super) unsafe fn load(dst: *mut u8, src: *const u8, len: usize) {
    let (head, words) = split(src, len);
    let byte = |at: usize| {
        // SAFETY: `at < len`, so C1 covers both sides; C4 allows the atomic, C3 the plain store.
        unsafe { dst.add(at).write(AtomicU8::from_ptr(src.cast_mut().add(at)).load(Relaxed)) }
    };
    (0..head).for_each(byte);
    for word in 0..words {
        let at = head + word * WORD;
        // SAFETY: `at + 8 <= len`, C1. `split` has aligned the shared side; the private side need
        // not be. C3 and C4 as above.
        unsafe {
            let value = AtomicU64::from_ptr(src.cast_mut().add(at).cast()).load(Relaxed);
            dst.add(at).cast::<u64>().write_unaligned(value);
        }
    }
    (head + words * WORD..len).for_each(byte);
}

/// # Safety
/// C1 to C4 of [`super::store`].
pub(super) unsafe fn store(dst: *mut u8, src: *const u8, len: usize) {
    let (head, words) = split(dst, len);
    let byte = |at: usize| {
        // SAFETY: as in `load`, with the sides exchanged.
        unsafe { AtomicU8::from_ptr(dst.add(at)).store(src.add(at).read(), Relaxed) }
    };
    (0..head).for_each(byte);
    for word in 0..words {
        let at = head + word * WORD;
        // SAFETY: as in `load`, with the sides exchanged.
        unsafe {
            let value = src.add(at).cast::<u64>().read_unaligned();
            AtomicU64::from_ptr(dst.add(at).cast()).store(value, Relaxed);
        }
    }
    (head + words * WORD..len).for_each(byte);
}

/// # Safety
/// C1, C2 and C4 of [`super::across`].
pub(super) unsafe fn across(dst: *mut u8, src: *const u8, len: usize) {
    let mut private = [0u8; 512];
    let mut at = 0;
    while at < len {
        let now = private.len().min(len - at);
        // SAFETY: `at + now <= len`, C1; `private` is ours and long enough; C4.
        unsafe {
            load(private.as_mut_ptr(), src.add(at), now);
            store(dst.add(at), private.as_ptr(), now);
        }
        at += now;
    }
}

/// # Safety
/// C1 and C4 of [`super::fill`].
pub(super) unsafe fn fill(dst: *mut u8, byte: u8, len: usize) {
    let private = [byte; 512];
    let mut at = 0;
    while at < len {
        let now = private.len().min(len - at);
        // SAFETY: as in `across`.
        unsafe { store(dst.add(at), private.as_ptr(), now) };
        at += now;
    }
}
