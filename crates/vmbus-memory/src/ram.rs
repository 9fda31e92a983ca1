//! How a VMM's own guest memory comes in.
#![allow(unsafe_code, reason = "an unsafe trait: its implementor promises what the rest rests on")]

use core::ptr::NonNull;
use std::os::fd::BorrowedFd;

/// One region of RAM as a [`GuestRam`] describes it. Lengths and offsets are bytes.
#[derive(Clone, Copy, Debug)]
pub struct HostRegion<'a> {
    /// Guest physical address, page aligned.
    pub gpa: u64,
    /// Length, whole pages.
    pub len: u64,
    /// Where the region is mapped in this process, page aligned.
    pub base: NonNull<u8>,
    /// The file behind the mapping and the region's offset in it, if there is one and the mapping is
    /// shared: a second mapping of it shows the same bytes. Rings are then mapped as a circle.
    pub backing: Option<(BorrowedFd<'a>, u64)>,
}

/// Guest memory that somebody else owns, such as a VMM.
///
/// # Safety
///
/// The implementor promises, for as long as the value lives:
///
/// - **R1** every [`HostRegion`] that [`Self::regions`] has told is mapped at `base`, readable and
///   writable, for `len` bytes, and stays so;
/// - **R2** this process reaches those bytes through raw pointers, volatile or atomic accesses only:
///   nobody makes a Rust reference to them;
/// - **R3** `backing` names the file that `base` is a shared mapping of, and nobody shrinks that file.
pub unsafe trait GuestRam: Send + Sync {
    /// The regions, in any order.
    fn regions(&self) -> Vec<HostRegion<'_>>;

    /// Whether [`Self::mark_dirty`] does anything; asked once.
    fn tracks_writes(&self) -> bool {
        false
    }

    /// Called after `len` bytes at guest physical address `gpa`, all in one region, have been written
    /// through us.
    fn mark_dirty(&self, gpa: u64, len: u64) {
        let _ = (gpa, len);
    }
}
