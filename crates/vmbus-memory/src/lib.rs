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
//!   while any clone of its `GuestMemory` lives. No file behind a mapping can shrink.
//! - **M2** (no references): no `&[u8]`, `&mut [u8]` or other reference to a non-atomic type ever
//!   points into a region. This process reaches the bytes through the functions of the `copy`
//!   module and through atomics.
//! - **M3** (aligned): regions start and end on page boundaries, in guest addresses and in ours.
//!
//! What remains of SIGBUS: the pages of a memfd are allocated at first touch. Where the system
//! refuses to promise more memory than it has (`vm.overcommit_memory=2`) and has run out, that touch
//! ends in SIGBUS; elsewhere it ends with the out-of-memory killer. No seal prevents either, so a
//! host that must survive them gives its guests memory that it has allocated itself.

mod copy;
mod error;
mod guest;
mod mapping;
mod pages;
mod ram;
mod region;
mod ring;
mod slice;
#[cfg(feature = "vm-memory")]
mod vm_memory;

pub use error::MemoryError;
pub use guest::GuestMemory;
pub use pages::{MAX_RUNS, PageAllocator, PageRun};
pub use ram::{GuestRam, HostRegion};
pub use region::{FdRegion, MAX_MEMORY_BYTES, MAX_REGIONS, RamRegion};
pub use ring::{DEFAULT_MAPPINGS, MAX_RING_PAGES, MappingBudget, RingPages};
pub use slice::{SharedSlice, SharedView};
