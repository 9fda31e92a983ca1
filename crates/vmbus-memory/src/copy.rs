//! Copies to and from bytes that somebody else may be writing.
//!
//! # The argument
//!
//! Three parties may touch a shared byte while a function of this module does:
//!
//! 1. *A guest's processor, another process, the kernel.* They are outside this program: Rust's
//!    memory model has nothing to say about them and the hardware's decides. Every byte we load is
//!    some byte that was stored there; which one, and whether neighbours belong together, is
//!    unknown until an index protocol has said so.
//! 2. *Another thread of this program, through this crate.* It uses these functions or atomics,
//!    never a reference (promise M2).
//! 3. *Code of the embedding program* that reaches the same memory by other means, such as
//!    vm-memory: by volatile or atomic accesses (promise R2).
//!
//! What must not happen is that the compiler assumes nobody else writes. It could then load a byte
//! twice, once to check it and once to use it, or remember what it stored. A plain
//! `ptr::copy_nonoverlapping` leaves it that freedom. So:
//!
//! * On x86-64 the bytes move in `asm!` blocks. A block is opaque: the compiler can neither repeat
//!   it, nor split it, nor assume what the memory holds before or after. What such a block does must
//!   also be explicable in Rust's terms; here: *for each byte, a relaxed atomic load and a relaxed
//!   atomic store of a `u8`, in no particular order, perhaps more than once*. Two such copies that
//!   meet are no data race; the result is bytes of either.
//! * Elsewhere, and under Miri, that story is told in Rust itself, with relaxed atomics of 8 bytes
//!   where the shared side is aligned and of one byte at its ends.
//!
//! What this does not cover by the letter: accesses of *different sizes* to the same byte by threads
//! of one program at the same time (a copy that meets an `AtomicU32`, say). The language leaves
//! them undefined where they are not synchronised. Between two ends of a ring in one process they
//! do not meet: the index protocols order every access to the data, and the control words are
//! reached by equally large atomics only. Where a caller lets them meet, the instructions are still
//! single loads and stores that the hardware defines.
//!
//! # The measure
//!
//! `cargo bench -p vmbus-memory`, against `memcpy` on one core of a Sapphire Rapids: up to 64 bytes
//! 0.5 to 0.8 of its time, as there is no call; from there to 2 KiB, a loop of 16-byte moves, 1.3 to
//! 1.6 of it; from 4 KiB on, `rep movsb`, the same. Relaxed 8-byte atomics would take 2 times as long
//! at 64 bytes and 4 times at 4 KiB. A processor without fast `rep movsb` (before Intel's Ivy Bridge
//! and AMD's Zen 3) runs that more slowly, and no less correctly.
#![allow(unsafe_code, reason = "the one place where shared bytes are loaded and stored in bulk")]

#[cfg(all(target_arch = "x86_64", not(miri)))]
use self::x86_64 as arch;

#[cfg(any(test, miri, not(target_arch = "x86_64")))]
mod portable;
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod x86_64;
#[cfg(any(miri, not(target_arch = "x86_64")))]
use self::portable as arch;

/// Copies `len` bytes from shared memory at `src` to private memory at `dst`.
///
/// # Safety
/// **C1** `src..src + len` is valid for reads and `dst..dst + len` for writes, for the whole call.
/// **C2** They do not overlap. **C3** The private bytes are the caller's alone. **C4** The shared
/// bytes are reached by this module, by atomics and by parties outside this program only.
#[inline]
pub(crate) unsafe fn load(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: passed on unchanged.
    unsafe { arch::load(dst, src, len) }
}

/// Copies `len` bytes from private memory at `src` to shared memory at `dst`.
///
/// # Safety
/// C1 to C4 of [`load`]; nobody writes the private bytes during the call.
#[inline]
pub(crate) unsafe fn store(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: passed on unchanged.
    unsafe { arch::store(dst, src, len) }
}

/// Copies `len` bytes from shared memory at `src` to shared memory at `dst`.
///
/// # Safety
/// C1, C2 and C4 of [`load`], C4 for both sides.
pub(crate) unsafe fn across(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: passed on unchanged.
    unsafe { arch::across(dst, src, len) }
}

/// Sets `len` bytes of shared memory at `dst` to `byte`.
///
/// # Safety
/// **C1** `dst..dst + len` is valid for writes. C4 of [`load`].
pub(crate) unsafe fn fill(dst: *mut u8, byte: u8, len: usize) {
    // SAFETY: passed on unchanged.
    unsafe { arch::fill(dst, byte, len) }
}

/// Asks for the cache line at `at` to be brought near. Any address will do: it is a hint, which
/// reads nothing and never faults.
#[inline]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: `prefetcht0` is part of the architecture (SSE), changes no register, flag or memory,
    // and ignores addresses that cannot be read.
    unsafe {
        core::arch::asm!("prefetcht0 [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: as above, for `prfm`.
    unsafe {
        core::arch::asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
    let _ = at;
}

#[cfg(test)]
mod tests;
