//! What an offer says beside identifiers: its flags, and the known layouts of the 120 bytes that a
//! device defines (`user_defined`).
//!
//! Source: vmbus-wire section 3, message 1; devices section 1 for IDE.

use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::guid::Guid;
use crate::message::USER_DATA_SIZE;

bitflags! {
    /// Flags of an offer.
    #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
    pub struct OfferFlags: u16 {
        /// Publish a device interface in the guest.
        const ENUMERATE_DEVICE_INTERFACE = 0x0001;
        /// The rings may be encrypted; with
        /// [`CONFIDENTIAL_CHANNELS`](crate::version::FeatureFlags::CONFIDENTIAL_CHANNELS).
        const CONFIDENTIAL_RING_BUFFER = 0x0002;
        /// External memory may be encrypted; with the same feature.
        const CONFIDENTIAL_EXTERNAL_MEMORY = 0x0004;
        /// External memory must be pinned; with
        /// [`GPA_PINNING`](crate::version::FeatureFlags::GPA_PINNING).
        const REQUIRE_PINNED_EXTERNAL_MEMORY = 0x0008;
        /// Packets carry pipe headers, and `user_defined` is [`PipeUserDefined`].
        const NAMED_PIPE_MODE = 0x0010;
        /// An offer to the local partition.
        const LOOPBACK_OFFER = 0x0100;
        /// An offer from the parent partition.
        const PARENT_OFFER = 0x0200;
        /// The host would like the guest to signal by a monitor.
        const REQUEST_MONITORED_NOTIFICATION = 0x0400;
        /// A socket connection, and `user_defined` is [`HvsockUserDefined`].
        const TLNPI_PROVIDER = 0x2000;
    }
}

impl OfferFlags {
    /// The flags of a pipe.
    pub const PIPE: Self = Self::ENUMERATE_DEVICE_INTERFACE.union(Self::NAMED_PIPE_MODE);

    /// The flags of a socket connection.
    pub const HVSOCK: Self = Self::PIPE.union(Self::TLNPI_PROVIDER);
}

/// `user_defined` of a channel in pipe mode.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct PipeUserDefined {
    /// At 60 of the offer: [`PipeUserDefined::BYTE_PIPE`] or [`PipeUserDefined::MESSAGE_PIPE`].
    pub pipe_type: U32,
    /// At 64: bytes that the provider defines.
    pub provider_data: [u8; 112],
    /// At 176: [`PipeFlags`].
    pub flags: U32,
}

bitflags! {
    /// Flags of a pipe.
    #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
    pub struct PipeFlags: u32 {
        /// Packets may carry external memory.
        const GPA_DIRECT = 0x1;
    }
}

impl PipeUserDefined {
    /// A stream of bytes.
    pub const BYTE_PIPE: u32 = 0;

    /// Each packet is one message.
    pub const MESSAGE_PIPE: u32 = 4;

    /// A message pipe without further data.
    #[must_use]
    pub fn message_pipe() -> Self {
        Self { pipe_type: Self::MESSAGE_PIPE.into(), ..Self::byte_pipe() }
    }

    /// A byte pipe without further data.
    #[must_use]
    pub fn byte_pipe() -> Self {
        Self { pipe_type: Self::BYTE_PIPE.into(), provider_data: [0; 112], flags: U32::ZERO }
    }

    /// The bytes for an offer.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; USER_DATA_SIZE] {
        zerocopy::transmute!(self)
    }

    /// From the bytes of an offer.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; USER_DATA_SIZE]) -> Self {
        zerocopy::transmute!(bytes)
    }
}

/// `user_defined` of a socket connection, which is a byte pipe.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct HvsockUserDefined {
    /// At 60 of the offer: [`PipeUserDefined::BYTE_PIPE`].
    pub pipe_type: U32,
    /// At 64: 1 if the host connects to a listener in the guest, 0 if this answers a request.
    pub is_for_guest_accept: u8,
    /// At 65: 1 for a container in the guest.
    pub is_for_guest_container: u8,
    /// At 66: 0, or [`HvsockUserDefined::VERSION_RS5`] where the silo id is meaningful.
    pub version: U32,
    /// At 70: the container.
    pub silo_id: Guid,
    /// At 86: zero.
    pub padding: U16,
    /// At 88: zero.
    pub reserved: [u8; 92],
}

impl HvsockUserDefined {
    /// [`HvsockUserDefined::version`] from Windows 10 RS5 on.
    pub const VERSION_RS5: u32 = 1;

    /// A connection without a container; `from_host` if it is the host that connects.
    #[must_use]
    pub const fn new(from_host: bool) -> Self {
        Self {
            pipe_type: U32::new(PipeUserDefined::BYTE_PIPE),
            is_for_guest_accept: from_host as u8,
            is_for_guest_container: 0,
            version: U32::ZERO,
            silo_id: Guid::ZERO,
            padding: U16::ZERO,
            reserved: [0; 92],
        }
    }

    /// The bytes for an offer.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; USER_DATA_SIZE] {
        zerocopy::transmute!(self)
    }

    /// From the bytes of an offer.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; USER_DATA_SIZE]) -> Self {
        zerocopy::transmute!(bytes)
    }
}

/// `user_defined` of an IDE disk's accelerator channel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct IdeUserDefined {
    /// At 60 of the offer: zero.
    pub reserved: U16,
    /// At 62: the IDE path (controller).
    pub path_id: u8,
    /// At 63: the IDE target (drive).
    pub target_id: u8,
    /// At 64: zero.
    pub reserved2: U32,
    /// At 68: [`IdeUserDefined::FLAGS`].
    pub flags: U32,
    /// At 72: zero.
    pub reserved3: [u8; 108],
}

impl IdeUserDefined {
    /// What [`IdeUserDefined::flags`] is.
    pub const FLAGS: u32 = 2;

    /// The disk at this path and target.
    #[must_use]
    pub const fn new(path_id: u8, target_id: u8) -> Self {
        Self {
            reserved: U16::ZERO,
            path_id,
            target_id,
            reserved2: U32::ZERO,
            flags: U32::new(Self::FLAGS),
            reserved3: [0; 108],
        }
    }

    /// The bytes for an offer.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; USER_DATA_SIZE] {
        zerocopy::transmute!(self)
    }

    /// From the bytes of an offer.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; USER_DATA_SIZE]) -> Self {
        zerocopy::transmute!(bytes)
    }
}

const _: () = {
    assert!(size_of::<PipeUserDefined>() == USER_DATA_SIZE);
    assert!(size_of::<HvsockUserDefined>() == USER_DATA_SIZE);
    assert!(size_of::<IdeUserDefined>() == USER_DATA_SIZE);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_has_its_layout() {
        let mut bytes = [0; USER_DATA_SIZE];
        bytes[0] = 4; // 60 of the offer
        assert_eq!(PipeUserDefined::message_pipe().to_bytes(), bytes);
        bytes[4] = 0xaa; // 64
        bytes[115] = 0xbb; // 175
        bytes[116] = 1; // 176
        let pipe = PipeUserDefined::from_bytes(bytes);
        assert_eq!(pipe.pipe_type.get(), PipeUserDefined::MESSAGE_PIPE);
        assert_eq!((pipe.provider_data[0], pipe.provider_data[111]), (0xaa, 0xbb));
        assert_eq!(pipe.flags.get(), PipeFlags::GPA_DIRECT.bits());
        assert_eq!(pipe.to_bytes(), bytes);
        assert_eq!(PipeUserDefined::byte_pipe().to_bytes(), [0; USER_DATA_SIZE]);
    }

    #[test]
    fn a_socket_connection_has_its_layout() {
        let mut bytes = [0; USER_DATA_SIZE];
        assert_eq!(HvsockUserDefined::new(false).to_bytes(), bytes);
        bytes[4] = 1; // 64 of the offer
        assert_eq!(HvsockUserDefined::new(true).to_bytes(), bytes);
        bytes[5] = 1; // 65
        bytes[6..10].copy_from_slice(&[1, 2, 3, 4]); // 66, not aligned
        bytes[10..26].copy_from_slice(&[0xcc; 16]); // 70
        let hvsock = HvsockUserDefined::from_bytes(bytes);
        assert_eq!((hvsock.is_for_guest_accept, hvsock.is_for_guest_container), (1, 1));
        assert_eq!(hvsock.version.get(), 0x0403_0201);
        assert_eq!(hvsock.silo_id, Guid::from_bytes([0xcc; 16]));
        assert_eq!((hvsock.padding.get(), hvsock.reserved), (0, [0; 92]));
        assert_eq!(hvsock.to_bytes(), bytes);
    }

    #[test]
    fn an_ide_disk_has_its_layout() {
        let mut bytes = [0; USER_DATA_SIZE];
        bytes[2] = 1; // 62 of the offer
        bytes[3] = 3; // 63
        bytes[8] = 2; // 68
        let ide = IdeUserDefined::new(1, 3);
        assert_eq!(ide.to_bytes(), bytes);
        assert_eq!(IdeUserDefined::from_bytes(bytes), ide);
    }

    #[test]
    fn the_kinds_of_channel_have_their_flags() {
        assert_eq!(OfferFlags::PIPE.bits(), 0x0011);
        assert_eq!(OfferFlags::HVSOCK.bits(), 0x2011);
        assert_eq!(OfferFlags::all().bits(), 0x271f);
    }
}
