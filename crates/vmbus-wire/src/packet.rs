//! Packets in a ring: a descriptor, an extension that depends on the kind of packet, the payload
//! padded to 8 bytes, and a trailer.
//!
//! | offset | size | part |
//! |---|---|---|
//! | 0 | 16 | [`PacketDescriptor`] |
//! | 16 | `extension_len` | extension, see [`extension`] |
//! | 16 + `extension_len` | `payload_len` | payload, padding included |
//! | 16 + `extension_len` + `payload_len` | 8 | [`PacketTrailer`] |
//!
//! A reader copies the descriptor once and has [`PacketDescriptor::check`] turn the copy into a
//! [`PacketHeader`], whose lengths hold together and fit the ring. A writer goes the other way with
//! [`PacketHeader::to_descriptor`].
//!
//! Source: vmbus-wire section 4.

mod descriptor;
pub mod extension;

pub use descriptor::{
    DESCRIPTOR_SIZE, MAX_PACKET_BYTES, MIN_PACKET_BYTES, PacketDescriptor, PacketError,
    PacketFlags, PacketHeader, PacketKind, PacketTrailer, TRAILER_SIZE, UNIT,
};
pub use extension::{
    AdditionalDataHeader, EstablishGpadlHeader, ExtensionError, GpaDirectHeader, GpadlReference,
    PageSetHeader, TransferPageRange, TransferPages, TransferPagesHeader,
};

pub use crate::ranges::{GpaRange, GpaRangeIter, GpaRanges, RangeError};
