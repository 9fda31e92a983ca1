//! Reads and writes between files and guest memory, for threads.
#![allow(unsafe_code, reason = "system calls on guest memory, of which Rust may have no slices")]

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;

use rustix::io::{ReadWriteFlags, Result, preadv2, pwritev2};

use super::buffers::{Buffers, IoVec};

/// Fills what is left of `buffers` from byte `offset` of the file on. Returns the bytes read.
pub(super) fn read(fd: BorrowedFd<'_>, buffers: &mut Buffers, offset: u64) -> Result<usize> {
    let vectors: &mut [IoVec] = buffers.vectors();
    // SAFETY: `IoSliceMut` is documented to be ABI compatible with `struct iovec`, and so is
    // `IoVec`: a pointer-sized address and length in this order, `repr(C)`, of equal size and
    // alignment (asserted beside it). Pointer and length of the slice are those of `vectors`, which
    // is borrowed mutably for as long.
    //
    // An `IoSliceMut` also says that the memory is valid and not used by others. Others use guest
    // memory, so no Rust slice of it may come to be: none does, since rustix hands the array to the
    // kernel as it is. Valid it is: `Buffers` made each vector from a `SharedSlice` of the
    // `GuestMemory` that it holds, and memory stays mapped while that is held.
    let vectors = unsafe {
        std::slice::from_raw_parts_mut(vectors.as_mut_ptr().cast::<IoSliceMut<'_>>(), vectors.len())
    };
    preadv2(fd, vectors, offset, ReadWriteFlags::empty())
}

/// Writes what is left of `buffers` to the file from byte `offset` on. Returns the bytes written.
pub(super) fn write(
    fd: BorrowedFd<'_>,
    buffers: &mut Buffers,
    offset: u64,
    flags: ReadWriteFlags,
) -> Result<usize> {
    let vectors: &[IoVec] = buffers.vectors();
    // SAFETY: as in `read`, with `IoSlice`.
    let vectors = unsafe {
        std::slice::from_raw_parts(vectors.as_ptr().cast::<IoSlice<'_>>(), vectors.len())
    };
    pwritev2(fd, vectors, offset, flags)
}
