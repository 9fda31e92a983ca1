//! The bytes of VMBus: control messages, packet descriptors, control pages.
//!
//! Everything that two sides of a VMBus connection show each other is described here once, as
//! structs whose sizes are proved at compile time, with parsers that take a *private copy* of a
//! peer's bytes and give either a checked value or an error that carries the numbers. The crate
//! does no I/O, knows no connection state, allocates nothing, and has no unsafe code.
//!
//! | module | what it describes |
//! |---|---|
//! | [`version`] | protocol versions, feature flags, what each of them brings |
//! | [`message`] | every control message, 1 to 29 |
//! | [`offer`] | flags and device-defined bytes of an offer |
//! | [`packet`] | descriptors, extensions and trailers of the packets in a ring |
//! | [`ranges`] | byte ranges over guest pages, as in GPADLs and GPA-direct packets |
//! | [`pipe`] | the header of payloads in pipe mode |
//! | [`ring`] | the control page of a ring |
//! | [`monitor`] | the monitor pages of a connection |
//! | [`synic`] | how a hypervisor carries control messages |
//! | [`hvsock`] | vsock ports and service GUIDs |
//! | [`guid`], [`status`] | identifiers and NTSTATUS values |
//!
//! All integers on the wire are little-endian, at whatever alignment their offset gives them.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod guid;
pub mod hvsock;
pub mod message;
pub mod monitor;
pub mod offer;
pub mod packet;
pub mod pipe;
pub mod ranges;
pub mod ring;
pub mod status;
pub mod synic;
pub mod version;

/// Bytes of a page on the wire, whatever the page size of the guest itself.
pub const PAGE_SIZE: usize = 4096;

/// [`PAGE_SIZE`], for arithmetic on wire lengths.
pub const PAGE_SIZE_U32: u32 = 4096;

/// A page frame number is a guest physical address shifted right by this.
pub const PAGE_SHIFT: u32 = 12;

/// Largest page frame number whose address, and that of the page's end, fits 64 bits.
pub const MAX_PFN: u64 = u64::MAX >> PAGE_SHIFT;

const _: () = assert!(1 << PAGE_SHIFT == PAGE_SIZE && PAGE_SIZE_U32 as usize == PAGE_SIZE);
