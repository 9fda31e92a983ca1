//! Copies for x86-64. SSE2 is part of the architecture; nothing else is asked for.
//!
//! All copies are one function: the processor does not care which side is shared.

use core::arch::asm;

/// Up to here 16-byte moves are faster than `rep movsb`, which takes some ten nanoseconds to start.
const VECTOR_MAX: usize = 1024;

pub(super) use copy as load;
pub(super) use copy as store;
pub(super) use copy as across;

/// # Safety
/// C1, C2, C4 and, for a private side, C3 of [`super::load`].
#[inline]
pub(super) unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: C1 to C4 are passed on; each block gets the lengths it asks for.
    unsafe {
        if len > 64 {
            long(dst, src, len);
        } else if len > 32 {
            up_to_64(dst, src, len);
        } else if len >= 16 {
            up_to_32(dst, src, len);
        } else if len >= 8 {
            up_to_16(dst, src, len);
        } else if len > 0 {
            up_to_7(dst, src, len);
        }
    }
}

// In the blocks below the second half of the moves is counted from the end, and overlaps the first
// half where `len` is not the maximum. A byte moved twice may differ between the two if the peer
// writes it just then; either is a byte that was there, and nobody looks before both are done.

/// # Safety
/// As [`copy`], `32 <= len <= 64`.
#[inline]
unsafe fn up_to_64(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: reads `src..src + 32` and `src + len - 32..src + len`, writes the same of `dst`: with
    // `len >= 32` all of it is inside what C1 makes valid. No stack, no flags are touched.
    unsafe {
        asm!(
            "movups {a}, [{src}]",
            "movups {b}, [{src} + 16]",
            "movups {c}, [{src} + {len} - 32]",
            "movups {d}, [{src} + {len} - 16]",
            "movups [{dst}], {a}",
            "movups [{dst} + 16], {b}",
            "movups [{dst} + {len} - 32], {c}",
            "movups [{dst} + {len} - 16], {d}",
            src = in(reg) src,
            dst = in(reg) dst,
            len = in(reg) len,
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            c = out(xmm_reg) _,
            d = out(xmm_reg) _,
            options(nostack, preserves_flags),
        );
    }
}

/// # Safety
/// As [`copy`], `16 <= len <= 32`.
#[inline]
unsafe fn up_to_32(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: as for `up_to_64`, with 16 bytes from each end.
    unsafe {
        asm!(
            "movups {a}, [{src}]",
            "movups {b}, [{src} + {len} - 16]",
            "movups [{dst}], {a}",
            "movups [{dst} + {len} - 16], {b}",
            src = in(reg) src,
            dst = in(reg) dst,
            len = in(reg) len,
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            options(nostack, preserves_flags),
        );
    }
}

/// # Safety
/// As [`copy`], `8 <= len <= 16`.
#[inline]
unsafe fn up_to_16(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: as for `up_to_64`, with 8 bytes from each end.
    unsafe {
        asm!(
            "mov {a}, [{src}]",
            "mov {b}, [{src} + {len} - 8]",
            "mov [{dst}], {a}",
            "mov [{dst} + {len} - 8], {b}",
            src = in(reg) src,
            dst = in(reg) dst,
            len = in(reg) len,
            a = out(reg) _,
            b = out(reg) _,
            options(nostack, preserves_flags),
        );
    }
}

/// # Safety
/// As [`copy`], `1 <= len`; meant for few bytes.
#[inline]
unsafe fn up_to_7(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: moves byte `i` for each `i` from `len - 1` down to 0: inside C1.
    unsafe {
        asm!(
            "2:",
            "mov {byte}, [{src} + {i} - 1]",
            "mov [{dst} + {i} - 1], {byte}",
            "dec {i}",
            "jnz 2b",
            src = in(reg) src,
            dst = in(reg) dst,
            i = inout(reg) len => _,
            byte = out(reg_byte) _,
            options(nostack),
        );
    }
}

/// # Safety
/// As [`copy`], `64 < len`.
// A call is little beside so many bytes, and keeps the callers small.
#[inline(never)]
unsafe fn long(dst: *mut u8, src: *const u8, len: usize) {
    if len > VECTOR_MAX {
        // SAFETY: reads and writes exactly the `len` bytes of C1. The direction flag is clear on
        // entry to every `asm!` block.
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") len => _,
                inout("rdi") dst => _,
                inout("rsi") src => _,
                options(nostack, preserves_flags),
            );
        }
        return;
    }
    // SAFETY: moves 64 bytes at 0, 64, ... as long as that is less than `len - 64`, then those at
    // `len - 64`: inside C1, as `len > 64`.
    unsafe {
        asm!(
            "2:",
            "movups {a}, [{src} + {i}]",
            "movups {b}, [{src} + {i} + 16]",
            "movups {c}, [{src} + {i} + 32]",
            "movups {d}, [{src} + {i} + 48]",
            "movups [{dst} + {i}], {a}",
            "movups [{dst} + {i} + 16], {b}",
            "movups [{dst} + {i} + 32], {c}",
            "movups [{dst} + {i} + 48], {d}",
            "add {i}, 64",
            "cmp {i}, {last}",
            "jb 2b",
            "movups {a}, [{src} + {last}]",
            "movups {b}, [{src} + {last} + 16]",
            "movups {c}, [{src} + {last} + 32]",
            "movups {d}, [{src} + {last} + 48]",
            "movups [{dst} + {last}], {a}",
            "movups [{dst} + {last} + 16], {b}",
            "movups [{dst} + {last} + 32], {c}",
            "movups [{dst} + {last} + 48], {d}",
            src = in(reg) src,
            dst = in(reg) dst,
            i = inout(reg) 0usize => _,
            last = in(reg) len - 64,
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            c = out(xmm_reg) _,
            d = out(xmm_reg) _,
            options(nostack),
        );
    }
}

/// # Safety
/// C1 and C4 of [`super::fill`].
pub(super) unsafe fn fill(dst: *mut u8, byte: u8, len: usize) {
    // SAFETY: writes exactly the `len` bytes of C1; the direction flag is clear on entry.
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") dst => _,
            in("al") byte,
            options(nostack, preserves_flags),
        );
    }
}
