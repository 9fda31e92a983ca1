//! Pipe mode: the header in front of each payload on channels offered with
//! [`OfferFlags::NAMED_PIPE_MODE`](crate::offer::OfferFlags::NAMED_PIPE_MODE), which knows the exact
//! length that a packet's descriptor does not. Integration services use the same header.
//!
//! On a message pipe one packet is one message. On a byte pipe packets are pieces of a stream, and a
//! data packet of no bytes is its end.
//!
//! Source: vmbus-wire section 4, "Pipe channels".

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a pipe header.
pub const HEADER_SIZE: u32 = 8;

/// Most bytes behind a pipe header.
pub const MAX_PAYLOAD: u32 = 16384;

/// The header in front of a payload in pipe mode.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct PipeHeader {
    /// [`PipePacketType`].
    pub packet_type: U32,
    /// Exact number of bytes that follow. In a [`PipePacketType::Partial`] packet the lower half; the
    /// upper half counts the bytes that its reader has consumed.
    pub length: U32,
}

const _: () = assert!(size_of::<PipeHeader>() == HEADER_SIZE as usize);

/// What follows a pipe header.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PipePacketType {
    /// Data.
    Data = 1,
    /// Data of which a part is read: only a reader makes it, in place, of a data packet.
    Partial = 2,
    /// Announces data in guest pages.
    SetupGpaDirect = 3,
    /// Ends such data.
    TeardownGpaDirect = 4,
}

impl PipePacketType {
    /// The type with this value on the wire, or `None` where there is none.
    #[must_use]
    pub const fn from_wire(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Data,
            2 => Self::Partial,
            3 => Self::SetupGpaDirect,
            4 => Self::TeardownGpaDirect,
            _ => return None,
        })
    }

    /// The value on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        self as u32
    }
}

/// A pipe header that has been checked, and the bytes it speaks of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PipePacket<'a> {
    /// What the bytes are.
    pub packet_type: PipePacketType,
    /// The exact bytes, without the padding of the packet; of a partial packet those not consumed yet.
    pub data: &'a [u8],
}

impl PipeHeader {
    /// The header in front of `length` bytes of data, or `None` for more than [`MAX_PAYLOAD`].
    #[must_use]
    pub const fn data(length: u32) -> Option<Self> {
        if length > MAX_PAYLOAD {
            return None;
        }
        Some(Self {
            packet_type: U32::new(PipePacketType::Data.to_wire()),
            length: U32::new(length),
        })
    }
}

impl<'a> PipePacket<'a> {
    /// Parses the payload of a packet, header first; what follows the length is padding.
    ///
    /// # Errors
    /// [`PipeError`].
    pub fn parse(payload: &'a [u8]) -> Result<Self, PipeError> {
        let Ok((header, rest)) = PipeHeader::read_from_prefix(payload) else {
            return Err(PipeError::NoHeader { len: payload.len() });
        };
        let packet_type = header.packet_type.get();
        let Some(packet_type) = PipePacketType::from_wire(packet_type) else {
            return Err(PipeError::Type { packet_type });
        };
        let length = header.length.get();
        let (length, consumed) = match packet_type {
            PipePacketType::Partial => (length & 0xffff, length >> 16),
            _ => (length, 0),
        };
        if length > MAX_PAYLOAD {
            return Err(PipeError::TooLong { length });
        }
        let data = usize::try_from(length).ok().and_then(|length| rest.get(..length));
        let Some(data) = data else {
            return Err(PipeError::Truncated { length, len: rest.len() });
        };
        let data = usize::try_from(consumed).ok().and_then(|consumed| data.get(consumed..));
        let Some(data) = data else {
            return Err(PipeError::Consumed { consumed, length });
        };
        Ok(Self { packet_type, data })
    }
}

/// Why a payload in pipe mode was refused. Always the peer's doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PipeError {
    /// Not even a header.
    #[error("pipe payload of {len} bytes, its header alone takes 8")]
    NoHeader {
        /// Bytes of the payload.
        len: usize,
    },
    /// There is no such type.
    #[error("unknown pipe packet type {packet_type:#x}")]
    Type {
        /// The type as found.
        packet_type: u32,
    },
    /// The header claims more than a pipe allows.
    #[error("pipe packet of {length} bytes, the longest has {MAX_PAYLOAD}")]
    TooLong {
        /// Bytes the header claims.
        length: u32,
    },
    /// The header claims more than there is.
    #[error("pipe packet of {length} bytes, {len} follow its header")]
    Truncated {
        /// Bytes the header claims.
        length: u32,
        /// Bytes behind the header.
        len: usize,
    },
    /// More was consumed than there was.
    #[error("pipe packet of {length} bytes, {consumed} of them consumed")]
    Consumed {
        /// Bytes consumed.
        consumed: u32,
        /// Bytes there were.
        length: u32,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;

    #[test]
    fn the_header_knows_the_exact_length() {
        let data = |packet_type, data| Ok(PipePacket { packet_type, data });
        let table: [(&[u8], Result<PipePacket<'_>, PipeError>); 11] = [
            (
                &[1, 0, 0, 0, 3, 0, 0, 0, 7, 8, 9, 0, 0, 0, 0, 0],
                data(PipePacketType::Data, &[7, 8, 9]),
            ),
            (&[1, 0, 0, 0, 0, 0, 0, 0], data(PipePacketType::Data, &[])),
            (&[2, 0, 0, 0, 3, 0, 2, 0, 7, 8, 9], data(PipePacketType::Partial, &[9])),
            (&[3, 0, 0, 0, 1, 0, 0, 0, 7], data(PipePacketType::SetupGpaDirect, &[7])),
            (&[4, 0, 0, 0, 1, 0, 0, 0, 7], data(PipePacketType::TeardownGpaDirect, &[7])),
            (&[1, 0, 0, 0, 0, 0, 0], Err(PipeError::NoHeader { len: 7 })),
            (&[0, 0, 0, 0, 0, 0, 0, 0], Err(PipeError::Type { packet_type: 0 })),
            (&[5, 1, 0, 0, 0, 0, 0, 0], Err(PipeError::Type { packet_type: 0x105 })),
            (&[1, 0, 0, 0, 1, 0x40, 0, 0], Err(PipeError::TooLong { length: 16385 })),
            (&[1, 0, 0, 0, 2, 0, 0, 0, 7], Err(PipeError::Truncated { length: 2, len: 1 })),
            (&[2, 0, 0, 0, 1, 0, 2, 0, 7], Err(PipeError::Consumed { consumed: 2, length: 1 })),
        ];
        for (payload, expected) in table {
            assert_eq!(PipePacket::parse(payload), expected, "{payload:?}");
        }
    }

    #[test]
    fn a_data_header_is_bounded() {
        let header = PipeHeader::data(MAX_PAYLOAD).unwrap();
        assert_eq!(header.as_bytes(), [1, 0, 0, 0, 0, 0x40, 0, 0]);
        assert_eq!(PipeHeader::data(MAX_PAYLOAD + 1), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(sent in proptest::collection::vec(any::<u8>(), 0..64), pad in 0..8_usize) {
            let mut payload = Vec::new();
            payload.extend_from_slice(PipeHeader::data(sent.len().try_into().unwrap()).unwrap().as_bytes());
            payload.extend_from_slice(&sent);
            payload.resize(payload.len() + pad, 0xcc);
            let packet = PipePacket::parse(&payload).unwrap();
            prop_assert_eq!(packet, PipePacket { packet_type: PipePacketType::Data, data: &sent });
        }

        #[test]
        fn any_payload_is_a_packet_or_an_error(payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(packet) = PipePacket::parse(&payload) {
                prop_assert!(packet.data.len() + 8 <= payload.len());
            }
        }
    }
}
