//! The descriptor that starts every packet, its checks, and the trailer that ends it.

use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a descriptor.
pub const DESCRIPTOR_SIZE: u32 = 16;

/// Bytes of a trailer.
pub const TRAILER_SIZE: u32 = 8;

/// The unit in which a descriptor counts lengths, in bytes.
pub const UNIT: u32 = 8;

/// Longest packet in bytes, the trailer not counted: what a descriptor can say.
pub const MAX_PACKET_BYTES: u32 = u16::MAX as u32 * UNIT;

/// Fewest bytes of ring that a packet takes: a descriptor and a trailer.
pub const MIN_PACKET_BYTES: u32 = DESCRIPTOR_SIZE + TRAILER_SIZE;

/// The descriptor of a packet, as either side writes it. Any bit pattern is a value of this type;
/// only [`PacketDescriptor::check`] says that it makes sense. Lengths count units of 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct PacketDescriptor {
    /// [`PacketKind`].
    pub kind: U16,
    /// Start of the payload, from the start of this descriptor.
    pub data_offset_8b: U16,
    /// Descriptor, extension and payload, without the trailer.
    pub length_8b: U16,
    /// [`PacketFlags`].
    pub flags: U16,
    /// Chosen by the sender of a request, returned unchanged in its completion. Opaque.
    pub transaction_id: U64,
}

const _: () = assert!(size_of::<PacketDescriptor>() == DESCRIPTOR_SIZE as usize);

/// The end of a packet. Nobody needs to check a peer's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct PacketTrailer {
    /// Zero.
    pub reserved: U32,
    /// Where the packet's descriptor starts: a byte offset into the ring's data area.
    pub descriptor_offset: U32,
}

const _: () = assert!(size_of::<PacketTrailer>() == TRAILER_SIZE as usize);

impl PacketTrailer {
    /// The trailer of the packet whose descriptor starts at byte `descriptor_offset` of the data
    /// area.
    #[inline]
    #[must_use]
    pub const fn new(descriptor_offset: u32) -> Self {
        Self { reserved: U32::ZERO, descriptor_offset: U32::new(descriptor_offset) }
    }
}

bitflags! {
    /// Flags of a descriptor. Other bits are refused.
    #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
    pub struct PacketFlags: u16 {
        /// The sender wants a completion packet.
        const COMPLETION_REQUESTED = 0x1;
    }
}

/// What a packet is for, and so what its extension is.
///
/// Guests and hosts of today use [`InBand`](Self::InBand), [`TransferPages`](Self::TransferPages),
/// [`GpaDirect`](Self::GpaDirect) and [`Completion`](Self::Completion) only.
#[repr(u16)]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PacketKind {
    /// Synchronisation.
    Synch = 0x1,
    /// Registers a set of transfer pages.
    AddPageSet = 0x2,
    /// Withdraws a set of transfer pages.
    RemovePageSet = 0x3,
    /// Describes a GPADL in the ring.
    EstablishGpadl = 0x4,
    /// Takes a GPADL back.
    TeardownGpadl = 0x5,
    /// The payload is all there is.
    InBand = 0x6,
    /// Data in transfer pages. Host to guest only.
    TransferPages = 0x7,
    /// Data in a GPADL.
    Gpadl = 0x8,
    /// Data in pages that the extension names.
    GpaDirect = 0x9,
    /// Asks to cancel a request.
    Cancel = 0xa,
    /// Ends the request with the same transaction id.
    Completion = 0xb,
    /// Data, with more to come in packets of the next kind.
    DataWithAdditional = 0xc,
    /// The rest of such data.
    AdditionalData = 0xd,
}

impl PacketKind {
    /// Every kind, by value.
    pub const ALL: [Self; 13] = [
        Self::Synch,
        Self::AddPageSet,
        Self::RemovePageSet,
        Self::EstablishGpadl,
        Self::TeardownGpadl,
        Self::InBand,
        Self::TransferPages,
        Self::Gpadl,
        Self::GpaDirect,
        Self::Cancel,
        Self::Completion,
        Self::DataWithAdditional,
        Self::AdditionalData,
    ];

    /// The kind with this value on the wire, or `None` where there is none.
    #[inline]
    #[must_use]
    pub const fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            0x1 => Self::Synch,
            0x2 => Self::AddPageSet,
            0x3 => Self::RemovePageSet,
            0x4 => Self::EstablishGpadl,
            0x5 => Self::TeardownGpadl,
            0x6 => Self::InBand,
            0x7 => Self::TransferPages,
            0x8 => Self::Gpadl,
            0x9 => Self::GpaDirect,
            0xa => Self::Cancel,
            0xb => Self::Completion,
            0xc => Self::DataWithAdditional,
            0xd => Self::AdditionalData,
            _ => return None,
        })
    }

    /// The value on the wire.
    #[inline]
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        self as u16
    }

    /// Fewest bytes of extension that make sense of this kind: its fixed part, and one range where
    /// ranges follow.
    #[inline]
    #[must_use]
    pub const fn min_extension_len(self) -> u32 {
        ((MIN_EXTENSION_UNITS >> (4 * self.to_wire())) & 0xf) as u32 * UNIT
    }

    const fn min_extension_units(self) -> u64 {
        match self {
            Self::Synch | Self::InBand | Self::Cancel | Self::Completion => 0,
            Self::AddPageSet | Self::RemovePageSet | Self::TeardownGpadl | Self::Gpadl => 1,
            // The fixed part, and the one word of a range.
            Self::TransferPages => 2,
            // The fixed part, and the two words of a range: header and PFN.
            Self::EstablishGpadl | Self::GpaDirect => 3,
            Self::DataWithAdditional | Self::AdditionalData => 2,
        }
    }
}

/// [`PacketKind::min_extension_units`] of kind k in bits 4k and up: looked up for each packet, where
/// a jump by kind would be mispredicted.
const MIN_EXTENSION_UNITS: u64 = {
    let mut table = 0;
    let mut kinds: &[PacketKind] = &PacketKind::ALL;
    while let [kind, rest @ ..] = kinds {
        table |= kind.min_extension_units() << (4 * kind.to_wire());
        kinds = rest;
    }
    table
};

/// A descriptor that has been checked: the lengths are in bytes, multiples of 8, and add up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PacketHeader {
    /// What the packet is for.
    pub kind: PacketKind,
    /// Whether the sender wants a completion packet.
    pub wants_completion: bool,
    /// Chosen by the sender of a request; opaque, and never unique by force.
    pub transaction_id: u64,
    /// Bytes between descriptor and payload.
    pub extension_len: u32,
    /// Bytes of payload, padding included: the exact length is known to the device's protocol only.
    pub payload_len: u32,
}

impl PacketDescriptor {
    /// Checks this descriptor, a copy that the peer can no longer change, against the `available`
    /// bytes of ring that hold the packet: from the start of the descriptor to the write index.
    ///
    /// A packet that passes ends within `available`, its trailer included, so that stepping over it
    /// by [`PacketHeader::ring_bytes`] always makes progress and never overtakes the writer.
    ///
    /// # Errors
    /// [`PacketError`], with the numbers.
    #[inline]
    pub const fn check(&self, available: u32) -> Result<PacketHeader, PacketError> {
        if available < MIN_PACKET_BYTES {
            return Err(PacketError::NoRoom { available });
        }
        // Sixteen bits times 8: neither length can overflow.
        let length = self.length_8b.get() as u32 * UNIT;
        let data_offset = self.data_offset_8b.get() as u32 * UNIT;
        if length > available - TRAILER_SIZE {
            return Err(PacketError::Truncated { length, available });
        }
        if data_offset < DESCRIPTOR_SIZE || data_offset > length {
            return Err(PacketError::DataOffset { data_offset, length });
        }
        let flags = self.flags.get();
        if flags & !PacketFlags::all().bits() != 0 {
            return Err(PacketError::Flags { flags });
        }
        let Some(kind) = PacketKind::from_wire(self.kind.get()) else {
            return Err(PacketError::Kind { kind: self.kind.get() });
        };
        let extension_len = data_offset - DESCRIPTOR_SIZE;
        if extension_len < kind.min_extension_len() {
            return Err(PacketError::Extension {
                kind,
                needed: kind.min_extension_len(),
                extension_len,
            });
        }
        Ok(PacketHeader {
            kind,
            wants_completion: flags & PacketFlags::COMPLETION_REQUESTED.bits() != 0,
            transaction_id: self.transaction_id.get(),
            extension_len,
            payload_len: length - data_offset,
        })
    }
}

impl PacketHeader {
    /// Bytes that the packet takes in the ring, its trailer included.
    #[inline]
    #[must_use]
    pub const fn ring_bytes(&self) -> u32 {
        // For a checked header at most 524 280 + 8. One of the caller's own making may hold anything;
        // `to_descriptor` refuses what is too long.
        DESCRIPTOR_SIZE
            .saturating_add(self.extension_len)
            .saturating_add(self.payload_len)
            .saturating_add(TRAILER_SIZE)
    }

    /// Byte offset of the payload from the start of the descriptor.
    #[inline]
    #[must_use]
    pub const fn payload_offset(&self) -> u32 {
        DESCRIPTOR_SIZE.saturating_add(self.extension_len)
    }

    /// The descriptor of this packet. Lengths are rounded up to the unit of 8 bytes; the writer pads.
    ///
    /// # Errors
    /// [`PacketError::TooLong`] where descriptor, extension and payload exceed
    /// [`MAX_PACKET_BYTES`].
    #[inline]
    pub const fn to_descriptor(&self) -> Result<PacketDescriptor, PacketError> {
        let too_long = PacketError::TooLong {
            extension_len: self.extension_len,
            payload_len: self.payload_len,
        };
        // Both in units, at most 2^29 each: the sums cannot overflow.
        let data_offset_8b = DESCRIPTOR_SIZE / UNIT + self.extension_len.div_ceil(UNIT);
        let length_8b = data_offset_8b + self.payload_len.div_ceil(UNIT);
        if length_8b > u16::MAX as u32 {
            return Err(too_long);
        }
        let flags =
            if self.wants_completion { PacketFlags::COMPLETION_REQUESTED.bits() } else { 0 };
        Ok(PacketDescriptor {
            kind: U16::new(self.kind.to_wire()),
            data_offset_8b: U16::new(low_half(data_offset_8b)),
            length_8b: U16::new(low_half(length_8b)),
            flags: U16::new(flags),
            transaction_id: U64::new(self.transaction_id),
        })
    }
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the caller has tested against u16::MAX")]
const fn low_half(units: u32) -> u16 {
    units as u16
}

/// Why a packet was refused. The peer's doing, but for [`PacketError::TooLong`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// The ring holds bytes, but fewer than any packet has.
    #[error("{available} bytes in the ring, the smallest packet takes 24")]
    NoRoom {
        /// Bytes up to the write index.
        available: u32,
    },
    /// The packet ends behind the write index.
    #[error("packet of {length} bytes and an 8-byte trailer, the ring holds {available}")]
    Truncated {
        /// Bytes the descriptor claims, without the trailer.
        length: u32,
        /// Bytes up to the write index.
        available: u32,
    },
    /// The payload does not start within the packet.
    #[error("payload starts at byte {data_offset}, outside 16..={length}")]
    DataOffset {
        /// Where it starts.
        data_offset: u32,
        /// Bytes the descriptor claims, without the trailer.
        length: u32,
    },
    /// Flags that do not exist.
    #[error("packet flags {flags:#06x}, only bit 0 is defined")]
    Flags {
        /// All flags as found.
        flags: u16,
    },
    /// A kind that does not exist.
    #[error("packet of unknown kind {kind:#x}")]
    Kind {
        /// The kind as found.
        kind: u16,
    },
    /// The extension that the kind of packet needs is not there.
    #[error("{kind:?} packet with an extension of {extension_len} bytes, it needs {needed}")]
    Extension {
        /// The kind of packet.
        kind: PacketKind,
        /// Fewest bytes of extension.
        needed: u32,
        /// Bytes of extension.
        extension_len: u32,
    },
    /// A packet to be sent is longer than a descriptor can say.
    #[error("extension of {extension_len} and payload of {payload_len} bytes exceed 524280 in all")]
    TooLong {
        /// Bytes of extension.
        extension_len: u32,
        /// Bytes of payload.
        payload_len: u32,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GPA_DIRECT: [u8; 16] = [9, 0, 5, 0, 12, 0, 1, 0, 0xfd, 1, 2, 3, 4, 5, 6, 0xff];

    fn descriptor(kind: u16, data_offset_8b: u16, length_8b: u16, flags: u16) -> PacketDescriptor {
        PacketDescriptor {
            kind: kind.into(),
            data_offset_8b: data_offset_8b.into(),
            length_8b: length_8b.into(),
            flags: flags.into(),
            transaction_id: 7.into(),
        }
    }

    #[test]
    fn a_descriptor_has_its_layout() {
        let descriptor = PacketDescriptor::read_from_bytes(&GPA_DIRECT).unwrap();
        let header = PacketHeader {
            kind: PacketKind::GpaDirect,
            wants_completion: true,
            transaction_id: 0xff06_0504_0302_01fd,
            extension_len: 24,
            payload_len: 56,
        };
        assert_eq!(descriptor.check(104), Ok(header));
        assert_eq!((header.payload_offset(), header.ring_bytes()), (40, 104));
        assert_eq!(header.to_descriptor().unwrap().as_bytes(), GPA_DIRECT);
        let trailer = PacketTrailer::new(0x0403_0208);
        assert_eq!(trailer.as_bytes(), [0, 0, 0, 0, 8, 2, 3, 4]);
    }

    #[test]
    fn a_descriptor_is_refused_by_the_first_rule_it_breaks() {
        let ok = |extension_len, payload_len| Ok((extension_len, payload_len));
        for (row, available, expected) in [
            ((6, 2, 2, 0), 24, ok(0, 0)), // the smallest packet
            ((6, 2, 2, 1), 4096, ok(0, 0)),
            ((6, 3, 4, 0), 40, ok(8, 8)), // an extension where none is needed
            ((6, 2, 0xffff, 0), 524_288, ok(0, 524_264)), // the longest
            ((6, 0xffff, 0xffff, 0), 524_288, ok(524_264, 0)),
            ((9, 5, 5, 0), 48, ok(24, 0)),
            ((6, 2, 2, 0), 0, Err(PacketError::NoRoom { available: 0 })),
            ((6, 2, 2, 0), 23, Err(PacketError::NoRoom { available: 23 })),
            ((6, 2, 3, 0), 31, Err(PacketError::Truncated { length: 24, available: 31 })),
            ((6, 2, 3, 0), 24, Err(PacketError::Truncated { length: 24, available: 24 })),
            (
                (6, 2, 0xffff, 0),
                524_287,
                Err(PacketError::Truncated { length: 524_280, available: 524_287 }),
            ),
            ((6, 1, 2, 0), 24, Err(PacketError::DataOffset { data_offset: 8, length: 16 })),
            ((6, 0, 0, 0), 24, Err(PacketError::DataOffset { data_offset: 0, length: 0 })),
            ((6, 2, 1, 0), 24, Err(PacketError::DataOffset { data_offset: 16, length: 8 })),
            ((6, 3, 2, 0), 24, Err(PacketError::DataOffset { data_offset: 24, length: 16 })),
            ((6, 2, 2, 2), 24, Err(PacketError::Flags { flags: 2 })),
            ((6, 2, 2, 0x8001), 24, Err(PacketError::Flags { flags: 0x8001 })),
            ((0, 2, 2, 0), 24, Err(PacketError::Kind { kind: 0 })),
            ((14, 2, 2, 0), 24, Err(PacketError::Kind { kind: 14 })),
            ((0xffff, 2, 2, 0), 24, Err(PacketError::Kind { kind: 0xffff })),
            (
                (9, 4, 4, 0),
                40,
                Err(PacketError::Extension {
                    kind: PacketKind::GpaDirect,
                    needed: 24,
                    extension_len: 16,
                }),
            ),
            (
                (7, 3, 8, 0),
                72,
                Err(PacketError::Extension {
                    kind: PacketKind::TransferPages,
                    needed: 16,
                    extension_len: 8,
                }),
            ),
        ] {
            let (kind, data_offset_8b, length_8b, flags) = row;
            let got = descriptor(kind, data_offset_8b, length_8b, flags)
                .check(available)
                .map(|header| (header.extension_len, header.payload_len));
            assert_eq!(got, expected, "{row:?} with {available} bytes");
        }
    }

    #[test]
    fn kinds_have_their_values() {
        for (row, kind) in PacketKind::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(kind.to_wire()), row + 1, "{kind:?}");
            assert_eq!(PacketKind::from_wire(kind.to_wire()), Some(kind));
        }
    }

    #[test]
    fn kinds_need_their_extensions() {
        for (kind, needed) in [
            (PacketKind::Synch, 0),
            (PacketKind::AddPageSet, 8),
            (PacketKind::RemovePageSet, 8),
            (PacketKind::EstablishGpadl, 24),
            (PacketKind::TeardownGpadl, 8),
            (PacketKind::InBand, 0),
            (PacketKind::TransferPages, 16),
            (PacketKind::Gpadl, 8),
            (PacketKind::GpaDirect, 24),
            (PacketKind::Cancel, 0),
            (PacketKind::Completion, 0),
            (PacketKind::DataWithAdditional, 16),
            (PacketKind::AdditionalData, 16),
        ] {
            assert_eq!(kind.min_extension_len(), needed, "{kind:?}");
        }
    }

    #[test]
    fn a_packet_to_be_sent_is_padded_and_bounded() {
        let header = |extension_len, payload_len| PacketHeader {
            kind: PacketKind::InBand,
            wants_completion: false,
            transaction_id: 0,
            extension_len,
            payload_len,
        };
        for (extension_len, payload_len, expected) in [
            (0, 0, Some((2, 2))),
            (0, 1, Some((2, 3))),
            (0, 8, Some((2, 3))),
            (9, 1, Some((4, 5))),
            (0, 524_264, Some((2, 0xffff))),
            (0, 524_265, None),
            (524_264, 0, Some((0xffff, 0xffff))),
            (524_264, 1, None),
            (u32::MAX, u32::MAX, None),
        ] {
            let got = header(extension_len, payload_len).to_descriptor();
            let lengths = got.map(|got| (got.data_offset_8b.get(), got.length_8b.get()));
            let expected = expected.ok_or(PacketError::TooLong { extension_len, payload_len });
            assert_eq!(lengths, expected, "{extension_len} and {payload_len} bytes");
        }
        assert_eq!(header(u32::MAX, u32::MAX).ring_bytes(), u32::MAX);
    }

    proptest! {
        /// No bytes make the check panic, and what it accepts lies within what is available and is
        /// written as it was read.
        #[test]
        fn an_accepted_packet_lies_within_the_ring(
            bytes: [u8; 16],
            likely in (0..16_u16, 0..8_u16, 0..16_u16, 0..2_u16),
            use_likely: bool,
            available in prop_oneof![0..160_u32, any::<u32>()],
        ) {
            let (kind, data_offset_8b, length_8b, flags) = likely;
            let descriptor = if use_likely {
                descriptor(kind, data_offset_8b, length_8b, flags)
            } else {
                PacketDescriptor::read_from_bytes(&bytes).unwrap()
            };
            if let Ok(header) = descriptor.check(available) {
                prop_assert!((MIN_PACKET_BYTES..=available).contains(&header.ring_bytes()));
                prop_assert!(header.ring_bytes().is_multiple_of(UNIT));
                prop_assert!(header.extension_len >= header.kind.min_extension_len());
                prop_assert_eq!(header.to_descriptor(), Ok(descriptor));
            }
        }
    }
}
