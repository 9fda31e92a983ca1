//! Memory shared with a peer that may change it at any moment: guest memory, page runs, ring
//! mappings.
//!
//! This crate is where the project's unsafe memory access lives. It hands out no reference to a
//! shared byte, only copies and atomics, so nothing built on it can be surprised by a peer that
//! writes while it reads.
//!
//! | item | what it is |
//! |---|---|
//! | [`GuestMemory`] | the guest physical address space: regions of RAM, mapped for as long as a clone lives |
//! | [`SharedSlice`], [`SharedView`] | a bounded span of shared memory; one that is only read |
//! | [`PageAllocator`], [`PageRun`] | page runs of a client endpoint's own memory |
//! | [`RingPages`] | the pages of one ring, mapped as a circle or reached page by page |
//! | [`GuestRam`] | how the memory of a VMM comes in; implemented for vm-memory's `GuestMemoryMmap` |
//!
//! # Promises
//!
//! Safety comments in this crate cite these by number.
//!
//! - **M1** (mapped): every byte of a region stays mapped, readable and writable, at one address,
//!   while any clone of its `GuestMemory` lives. No memory object behind a mapping can shrink, so
//!   no access ends in SIGBUS.
//! - **M2** (no references): no `&[u8]`, `&mut [u8]` or other reference to a non-atomic type ever
//!   points into a region. This process reaches the bytes through the functions of the `copy`
//!   module and through atomics.
//! - **M3** (aligned): regions start and end on page boundaries, in guest addresses and in ours.
//!
//! The pages of a memfd that nobody wrote yet are allocated at first touch. A host that has run out
//! of memory then meets its out-of-memory killer: that, unlike a truncation, is not a peer's doing.

mod copy;
mod error;
mod guest;
mod mapping;
mod pages;
mod ram;
mod ring;
mod slice;
#[cfg(feature = "vm-memory")]
mod vm_memory;

pub use error::MemoryError;
pub use guest::{FdRegion, GuestMemory, MAX_MEMORY_BYTES, MAX_REGIONS, RamRegion};
pub use pages::{MAX_RUNS, PageAllocator, PageRun};
pub use ram::{GuestRam, HostRegion};
pub use ring::{DEFAULT_MAPPINGS, MAX_RING_PAGES, MappingBudget, RingPages};
pub use slice::{SharedSlice, SharedView};
