//! Which channels there are: messages 1 to 4 and 13. REQUEST_OFFERS and ALL_OFFERS_DELIVERED have no
//! body.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{HEADER_SIZE, USER_DATA_SIZE};
use crate::guid::Guid;
use crate::offer::OfferFlags;
use crate::version::{FeatureFlags, Negotiated};

/// 1 OFFER_CHANNEL, 196 bytes: a channel is there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct OfferChannel {
    /// At 8: the protocol spoken on the channel.
    pub interface_id: Guid,
    /// At 24: tells apart the channels of one interface.
    pub instance_id: Guid,
    /// At 40: zero.
    pub reserved: [u8; 16],
    /// At 56: [`OfferFlags`].
    pub flags: U16,
    /// At 58: MMIO space that the device needs, in MiB.
    pub mmio_megabytes: U16,
    /// At 60: bytes that the device defines; see [`crate::offer`] for the known layouts.
    pub user_defined: [u8; USER_DATA_SIZE],
    /// At 180: 0 for a primary channel, n for the nth subchannel of the same interface and instance;
    /// from 2.4 on.
    pub subchannel_index: U16,
    /// At 182: MMIO space that the device would like on top, in MiB.
    pub mmio_megabytes_optional: U16,
    /// At 184: names the channel, 1 to [`MAX_CHANNEL_ID`](super::MAX_CHANNEL_ID). Also the event flag
    /// by which the host signals the guest.
    pub channel_id: U32,
    /// At 188: the monitor, 0 to 127; meaningful if one is allocated.
    pub monitor_id: u8,
    /// At 189: bit 0: the guest signals by a monitor.
    pub monitor_allocated: u8,
    /// At 190: bit 0: the channel's interrupt is its own; from 1.1 on.
    pub is_dedicated_interrupt: U16,
    /// At 192: the connection by which the guest signals the host, 24 bits; from 1.1 on.
    pub connection_id: U32,
}

impl OfferChannel {
    /// What [`OfferChannel::monitor_id`] says where there is no monitor.
    pub const NO_MONITOR: u8 = 0xff;

    /// The flags, bits without a name included.
    #[must_use]
    pub const fn offer_flags(&self) -> OfferFlags {
        OfferFlags::from_bits_retain(self.flags.get())
    }

    /// This offer as a guest of that version may see it: what the version or the features do not have
    /// is cleared.
    #[must_use]
    pub fn for_guest(mut self, (version, features): Negotiated) -> Self {
        if !version.has_subchannels() {
            self.subchannel_index = U16::ZERO;
        }
        if !version.has_dedicated_interrupts() {
            self.is_dedicated_interrupt = U16::ZERO;
            self.connection_id = U32::ZERO;
        }
        let mut flags = self.offer_flags();
        for (feature, needing_it) in [
            (
                FeatureFlags::CONFIDENTIAL_CHANNELS,
                OfferFlags::CONFIDENTIAL_RING_BUFFER | OfferFlags::CONFIDENTIAL_EXTERNAL_MEMORY,
            ),
            (FeatureFlags::GPA_PINNING, OfferFlags::REQUIRE_PINNED_EXTERNAL_MEMORY),
        ] {
            if !(version.has_feature_flags() && features.contains(feature)) {
                flags.remove(needing_it);
            }
        }
        self.flags = flags.bits().into();
        self
    }
}

/// 2 RESCIND_CHANNEL_OFFER, 12 bytes: the channel goes away. The guest closes it if it is open, and
/// answers with REL_ID_RELEASED.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct RescindChannelOffer {
    /// At 8: the channel.
    pub channel_id: U32,
}

/// 13 REL_ID_RELEASED, 12 bytes: the guest has let go of a rescinded channel, whose id may now be
/// used again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct RelIdReleased {
    /// At 8: the channel.
    pub channel_id: U32,
}

const _: () = {
    assert!(HEADER_SIZE + size_of::<OfferChannel>() == 196);
    assert!(HEADER_SIZE + size_of::<RescindChannelOffer>() == 12);
    assert!(HEADER_SIZE + size_of::<RelIdReleased>() == 12);
};
