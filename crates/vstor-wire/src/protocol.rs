//! Bodies of the packets that initialise a storage channel.

use core::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::packet::{BODY_BYTES, Body, PacketForm};

/// A version of the storage protocol: major in the high byte, minor in the low one.
///
/// Source: Linux `drivers/scsi/storvsc_drv.c`, `VMSTOR_PROTO_VERSION_*`.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ProtocolVersion(pub u16);

impl ProtocolVersion {
    /// 2.0: Windows Server 2008.
    pub const WIN6: Self = Self(0x0200);
    /// 4.2: Windows 7.
    pub const WIN7: Self = Self(0x0402);
    /// 5.1: Windows 8. From here on packets are 64 bytes and there are subchannels.
    pub const WIN8: Self = Self(0x0501);
    /// 6.0: Windows 8.1.
    pub const WIN8_1: Self = Self(0x0600);
    /// 6.2: Windows 10.
    pub const WIN10: Self = Self(0x0602);

    /// All versions, ascending.
    pub const ALL: [Self; 5] = [Self::WIN6, Self::WIN7, Self::WIN8, Self::WIN8_1, Self::WIN10];

    /// Whether this is one of [`ProtocolVersion::ALL`].
    #[must_use]
    pub fn is_known(self) -> bool {
        Self::ALL.contains(&self)
    }

    /// The form of packet that SRBs have in this version.
    #[must_use]
    pub fn packet_form(self) -> PacketForm {
        if self >= Self::WIN8 { PacketForm::Full } else { PacketForm::Compact }
    }

    /// Whether a controller can have subchannels in this version.
    #[must_use]
    pub fn has_sub_channels(self) -> bool {
        self >= Self::WIN8
    }
}

impl fmt::Display for ProtocolVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 8, self.0 & 0xff)
    }
}

impl fmt::Debug for ProtocolVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Body of a version query.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct ProtocolVersionBody {
    /// Major in the high byte, minor in the low one.
    pub version: U16,
    /// Build of the sender; 0 in practice, without meaning to the receiver.
    pub revision: U16,
}

impl ProtocolVersionBody {
    /// A query for `version`.
    #[must_use]
    pub fn new(version: ProtocolVersion) -> Self {
        Self { version: U16::new(version.0), revision: U16::ZERO }
    }

    /// The version asked for.
    #[must_use]
    pub fn version(&self) -> ProtocolVersion {
        ProtocolVersion(self.version.get())
    }
}

/// Body of the answer to a properties query.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct ChannelProperties {
    /// Zero.
    pub reserved: U32,
    /// Most subchannels the guest may ask for.
    pub max_sub_channel_count: U16,
    /// Zero.
    pub reserved2: U16,
    /// Bit 0: subchannels are supported, see [`ChannelProperties::MULTI_CHANNEL`].
    pub flags: U32,
    /// Most bytes one SRB may transfer; a multiple of 4096, at least 4096.
    pub max_transfer_bytes: U32,
    /// Zero.
    pub reserved3: U64,
}

const _: () = assert!(size_of::<ChannelProperties>() == 24);

impl ChannelProperties {
    /// Flag: the guest may ask for subchannels.
    pub const MULTI_CHANNEL: u32 = 1;
}

/// Body of a request for subchannels.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct SubChannelRequest {
    /// How many the guest wants.
    pub count: U16,
}

/// Body of the answer to a request for Fibre Channel names.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct FibreChannelPorts {
    /// 1 if the primary port is the active one.
    pub primary_active: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// World-wide name of the primary port.
    pub primary_port: [u8; 8],
    /// World-wide name of the primary node.
    pub primary_node: [u8; 8],
    /// World-wide name of the secondary port.
    pub secondary_port: [u8; 8],
    /// World-wide name of the secondary node.
    pub secondary_node: [u8; 8],
}

const _: () = assert!(size_of::<FibreChannelPorts>() == 36);

/// Device-defined bytes in the offer of an IDE disk's channel; zero in that of a SCSI controller.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct IdeOfferProperties {
    /// Zero.
    pub reserved: U16,
    /// IDE channel: 0 primary, 1 secondary.
    pub path_id: u8,
    /// Device on the channel: 0 or 1.
    pub target_id: u8,
    /// Zero.
    pub reserved2: U32,
    /// [`IdeOfferProperties::IDE_DEVICE`].
    pub flags: U32,
    /// Zero.
    pub reserved3: [u8; 12],
}

const _: () = assert!(size_of::<IdeOfferProperties>() == 24);

impl IdeOfferProperties {
    /// Flag: the offer is for an IDE disk.
    pub const IDE_DEVICE: u32 = 2;
}

/// Declares that types may stand in a packet's body, and proves that they fit.
macro_rules! bodies {
    ($($body:ty),*) => {
        $(impl Body for $body {}
        const _: () = assert!(size_of::<$body>() <= BODY_BYTES);)*
    };
}
bodies!(
    ProtocolVersionBody,
    ChannelProperties,
    SubChannelRequest,
    FibreChannelPorts,
    crate::srb::ScsiRequest
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::VstorPacket;
    use std::string::ToString;
    use vmbus_wire::status::NtStatus;

    #[test]
    fn versions_have_the_protocols_numbers_and_forms() {
        for (version, raw, text, form, sub_channels) in [
            (ProtocolVersion::WIN6, 0x0200, "2.0", PacketForm::Compact, false),
            (ProtocolVersion::WIN7, 0x0402, "4.2", PacketForm::Compact, false),
            (ProtocolVersion::WIN8, 0x0501, "5.1", PacketForm::Full, true),
            (ProtocolVersion::WIN8_1, 0x0600, "6.0", PacketForm::Full, true),
            (ProtocolVersion::WIN10, 0x0602, "6.2", PacketForm::Full, true),
        ] {
            assert_eq!(version.0, raw, "{text}");
            assert_eq!(version.to_string(), text);
            assert_eq!(version.packet_form(), form, "{text}");
            assert_eq!(version.has_sub_channels(), sub_channels, "{text}");
            assert!(version.is_known(), "{text}");
        }
        for unknown in [0, 0x0100, 0x0201, 0x0500, 0x0601, 0x0603, 0xffff] {
            assert!(!ProtocolVersion(unknown).is_known(), "{unknown:#x}");
        }
    }

    #[test]
    fn properties_have_these_bytes() {
        let packet = VstorPacket::answer(NtStatus::SUCCESS).with_body(&ChannelProperties {
            reserved: U32::ZERO,
            max_sub_channel_count: U16::new(0x0102),
            reserved2: U16::ZERO,
            flags: U32::new(ChannelProperties::MULTI_CHANNEL),
            max_transfer_bytes: U32::new(0x0004_0000),
            reserved3: U64::ZERO,
        });
        let mut expected = [0u8; 64];
        expected[0] = 1;
        expected[16..20].copy_from_slice(&[0x02, 0x01, 0, 0]);
        expected[20..24].copy_from_slice(&[1, 0, 0, 0]);
        expected[24..28].copy_from_slice(&[0, 0, 4, 0]);
        assert_eq!(packet.as_bytes(), expected);
        let read: ChannelProperties = packet.body();
        assert_eq!(read.max_transfer_bytes.get(), 0x40000);
    }

    #[test]
    fn sub_channel_and_port_bodies_have_these_offsets() {
        let mut bytes = [0u8; 64];
        bytes[12..14].copy_from_slice(&[7, 1]);
        let (packet, _) = VstorPacket::parse(&bytes).unwrap();
        assert_eq!(packet.body::<SubChannelRequest>().count.get(), 0x0107);

        let bytes: [u8; 64] = {
            let mut next = 0..;
            [(); 64].map(|()| next.next().unwrap())
        };
        let (packet, _) = VstorPacket::parse(&bytes).unwrap();
        let ports: FibreChannelPorts = packet.body();
        assert_eq!(ports.primary_active, 12);
        assert_eq!(ports.primary_port, bytes[16..24]);
        assert_eq!(ports.primary_node, bytes[24..32]);
        assert_eq!(ports.secondary_port, bytes[32..40]);
        assert_eq!(ports.secondary_node, bytes[40..48]);
    }

    #[test]
    fn an_ide_offer_has_these_bytes() {
        let offer = IdeOfferProperties {
            reserved: U16::ZERO,
            path_id: 1,
            target_id: 0,
            reserved2: U32::ZERO,
            flags: U32::new(IdeOfferProperties::IDE_DEVICE),
            reserved3: [0; 12],
        };
        let mut expected = [0u8; 24];
        expected[2] = 1;
        expected[8] = 2;
        assert_eq!(offer.as_bytes(), expected);
    }
}
