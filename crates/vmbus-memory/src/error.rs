//! What can go wrong with shared memory.

use rustix::io::Errno;

/// Why memory was refused or could not be reached. Addresses and lengths are bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Part of the range is not RAM.
    #[error("guest range {gpa:#x}+{len:#x} is not all RAM")]
    NotRam {
        /// Start of the range, a guest physical address.
        gpa: u64,
        /// Length of the range.
        len: u64,
    },
    /// The range is RAM, but lies in more than one region.
    #[error("guest range {gpa:#x}+{len:#x} lies in more than one region")]
    CrossesRegions {
        /// Start of the range, a guest physical address.
        gpa: u64,
        /// Length of the range.
        len: u64,
    },
    /// An access reaches outside its [`SharedSlice`](crate::SharedSlice).
    #[error("bytes {offset}+{len} lie outside a slice of {slice_len}")]
    OutsideSlice {
        /// Start of the access within the slice.
        offset: usize,
        /// Length of the access.
        len: usize,
        /// Length of the slice.
        slice_len: usize,
    },
    /// No regions at all, or more than [`MAX_REGIONS`](crate::MAX_REGIONS).
    #[error("{count} regions of memory, outside 1..={max}")]
    RegionCount {
        /// Regions given.
        count: usize,
        /// Most regions accepted.
        max: usize,
    },
    /// A region is empty, or its address, its length or its offset in the file is not a multiple of
    /// the page size.
    #[error("region {gpa:#x}+{len:#x} at file offset {fd_offset:#x} is empty or not page aligned")]
    RegionUnaligned {
        /// Guest physical address.
        gpa: u64,
        /// Length.
        len: u64,
        /// Offset in the file behind it, 0 if there is none.
        fd_offset: u64,
    },
    /// A region's end is beyond the largest address or file offset.
    #[error("region {gpa:#x}+{len:#x} at file offset {fd_offset:#x} runs past the largest address")]
    RegionOverflow {
        /// Guest physical address.
        gpa: u64,
        /// Length.
        len: u64,
        /// Offset in the file behind it, 0 if there is none.
        fd_offset: u64,
    },
    /// Two regions share guest addresses.
    #[error("region {gpa:#x}+{len:#x} overlaps the region at {other_gpa:#x}")]
    RegionOverlap {
        /// Guest physical address of the higher region.
        gpa: u64,
        /// Its length.
        len: u64,
        /// Guest physical address of the lower region.
        other_gpa: u64,
    },
    /// More memory than [`MAX_MEMORY_BYTES`](crate::MAX_MEMORY_BYTES).
    #[error("{bytes:#x} bytes of memory, more than {max:#x}")]
    TooMuchMemory {
        /// Bytes given.
        bytes: u64,
        /// Most bytes accepted.
        max: u64,
    },
    /// The file behind a region may still be truncated by whoever holds it: it lacks
    /// `F_SEAL_SHRINK`, or is no memfd. Reading it could end in SIGBUS.
    #[error("the file behind region {gpa:#x} is not sealed against shrinking")]
    NotSealed {
        /// Guest physical address.
        gpa: u64,
    },
    /// The file behind a region is made of huge pages: with none left, touching it would end in
    /// SIGBUS, whatever the seals.
    #[error("the file behind region {gpa:#x} is made of huge pages")]
    HugePages {
        /// Guest physical address.
        gpa: u64,
    },
    /// The file behind a region ends before the region does.
    #[error("region {gpa:#x} needs {needed:#x} bytes of a file that has {size:#x}")]
    FileTooShort {
        /// Guest physical address.
        gpa: u64,
        /// Size the file must have at least.
        needed: u64,
        /// Size it has.
        size: u64,
    },
    /// A ring has too few or too many pages: a control page and at least one data page, at most
    /// [`MAX_RING_PAGES`](crate::MAX_RING_PAGES).
    #[error("a ring of {pages} pages, outside 2..={max}")]
    RingPages {
        /// Pages given, the control page included.
        pages: usize,
        /// Most pages accepted.
        max: usize,
    },
    /// A page number whose address does not fit 64 bits.
    #[error("page number {pfn:#x} has no 64-bit address")]
    PageNumber {
        /// The page number.
        pfn: u64,
    },
    /// No run of that many free pages is left, or none was asked for.
    #[error("no run of {pages} free pages ({free} are free in all)")]
    NoPages {
        /// Pages asked for.
        pages: u32,
        /// Free pages, not necessarily in a row.
        free: u64,
    },
    /// As many runs as [`MAX_RUNS`](crate::MAX_RUNS) are out.
    #[error("{max} page runs are out already")]
    TooManyRuns {
        /// Most runs at a time.
        max: usize,
    },
    /// A system call failed.
    #[error("{call}: {errno}")]
    System {
        /// The call.
        call: &'static str,
        /// What it answered.
        #[source]
        errno: Errno,
    },
}

impl MemoryError {
    pub(crate) fn system(call: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::System { call, errno }
    }
}
