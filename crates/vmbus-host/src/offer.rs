//! What a device offers.

use std::fmt;

use kmcl::bus::{Offer, USER_DATA_SIZE};
use vmbus_wire::guid::Guid;
use vmbus_wire::version::Version;

/// Names an offer for as long as the host lives; no two offers ever have the same. Channel ids are
/// for the guest, and come again.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct OfferId(pub u64);

/// What tells an offer from the others that stand.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct OfferKey {
    /// The protocol spoken on the channel.
    pub interface_type: Guid,
    /// Tells apart the channels of one type.
    pub interface_instance: Guid,
    /// 0 for a primary channel, n for its nth subchannel.
    pub subchannel_index: u16,
}

impl fmt::Display for OfferKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { interface_type, interface_instance, subchannel_index } = self;
        write!(f, "{interface_type} instance {interface_instance} subchannel {subchannel_index}")
    }
}

/// An offer, as plain data. The fields are those of [`Offer`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OfferParams {
    /// Interface type, instance and subchannel index.
    pub key: OfferKey,
    /// Publish a device interface in the guest.
    pub enumerate_device_interface: bool,
    /// Packets carry pipe headers.
    pub pipe: bool,
    /// A socket-style (hvsock) channel.
    pub tlnpi_provider: bool,
    /// After a save and restore of the VM this is a new channel.
    pub force_new_channel: bool,
    /// MMIO space needed, in MiB.
    pub mmio_megabytes: u16,
    /// MMIO space wanted on top, in MiB.
    pub mmio_megabytes_optional: u16,
    /// Device-defined bytes, as the guest gets them.
    pub user_defined: [u8; USER_DATA_SIZE],
}

/// Why an offer was not made.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// An offer of this type, instance and subchannel index stands.
    #[error("an offer of {key} stands")]
    Clash {
        /// What it is told apart by.
        key: OfferKey,
    },
    /// All channel ids are taken.
    #[error("{count} channels, the limit")]
    TooManyChannels {
        /// Channels, those included that the guest has not released.
        count: usize,
    },
    /// The guest of this bus has no such trust level.
    #[error("an offer to virtual trust level {vtl}, the guest has level 0 only")]
    TargetVtl {
        /// The level.
        vtl: u8,
    },
    /// An offer to the local partition: that is what a loopback bus is for.
    #[error("an offer to the local partition")]
    Loopback,
}

impl TryFrom<&Offer> for OfferParams {
    type Error = OfferError;

    fn try_from(offer: &Offer) -> Result<Self, OfferError> {
        if offer.loopback {
            return Err(OfferError::Loopback);
        }
        if offer.target_vtl != 0 {
            return Err(OfferError::TargetVtl { vtl: offer.target_vtl });
        }
        Ok(Self {
            key: OfferKey {
                interface_type: offer.interface_type,
                interface_instance: offer.interface_instance,
                subchannel_index: offer.subchannel_index,
            },
            enumerate_device_interface: offer.enumerate_device_interface,
            pipe: offer.pipe,
            tlnpi_provider: offer.tlnpi_provider,
            force_new_channel: offer.force_new_channel,
            mmio_megabytes: offer.mmio_megabytes,
            mmio_megabytes_optional: offer.mmio_megabytes_optional,
            user_defined: offer.user_defined,
        })
    }
}

impl OfferParams {
    /// Whether a guest of this version can make sense of the offer: to an older one a subchannel
    /// would look like a second channel of the same name, and a socket like a device.
    #[must_use]
    pub fn suits(&self, version: Version) -> bool {
        (self.key.subchannel_index == 0 || version.has_subchannels())
            && (!self.tlnpi_provider || version.has_hvsock())
    }
}
