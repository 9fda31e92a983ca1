//! Offers as the guest keeps them.

use kmcl::bus::{Target, USER_DATA_SIZE};
use vmbus_wire::guid::Guid;
use vmbus_wire::message::OfferChannel;
use vmbus_wire::offer::OfferFlags;
use vmbus_wire::synic::connection;
use vmbus_wire::version::Version;

/// Monitors that the two monitor pages have room for.
///
/// Source: vmbus-wire section 4, "Monitored notifications".
pub const MAX_MONITOR_ID: u8 = 127;

/// A channel as the host has offered it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OfferedChannel {
    /// The protocol spoken on the channel.
    pub interface_type: Guid,
    /// Tells apart the channels of one type.
    pub interface_instance: Guid,
    /// 0 for a primary channel, n for its nth subchannel. Always 0 below version 2.4.
    pub subchannel_index: u16,
    /// The channel's number, 1 to 2047; also its interrupt flag.
    pub channel_id: u32,
    /// What kind of channel it is.
    pub flags: OfferFlags,
    /// MMIO space the channel needs, in MiB.
    pub mmio_megabytes: u16,
    /// MMIO space that would be nice to have on top, in MiB.
    pub mmio_megabytes_optional: u16,
    /// The monitor that may be triggered in place of a signal, 0 to [`MAX_MONITOR_ID`].
    pub monitor_id: Option<u8>,
    /// Where to signal the host. Below version 1.1 that is 2 for all channels.
    pub connection_id: u32,
    /// Device-defined bytes.
    pub user_defined: [u8; USER_DATA_SIZE],
}

impl OfferedChannel {
    /// Reads a message, of which only the fields that `version` has mean anything.
    pub(crate) fn new(message: &OfferChannel, version: Version) -> Self {
        let monitored = message.monitor_allocated & 1 != 0;
        Self {
            interface_type: message.interface_id,
            interface_instance: message.instance_id,
            subchannel_index: if version.has_subchannels() {
                message.subchannel_index.get()
            } else {
                0
            },
            channel_id: message.channel_id.get(),
            flags: message.offer_flags(),
            mmio_megabytes: message.mmio_megabytes.get(),
            mmio_megabytes_optional: message.mmio_megabytes_optional.get(),
            monitor_id: (monitored && message.monitor_id <= MAX_MONITOR_ID)
                .then_some(message.monitor_id),
            connection_id: if version.has_dedicated_interrupts() {
                message.connection_id.get()
            } else {
                connection::EVENT
            },
            user_defined: message.user_defined,
        }
    }

    /// Whether a client that asked for `target` may have this channel.
    #[must_use]
    pub fn matches(&self, target: &Target) -> bool {
        self.interface_type == target.interface_type
            && self.subchannel_index == target.subchannel_index
            && target.interface_instance.is_none_or(|instance| instance == self.interface_instance)
    }

    /// Whether a client could not tell the two apart.
    pub(crate) fn is_same_instance(&self, other: &Self) -> bool {
        self.interface_type == other.interface_type
            && self.interface_instance == other.interface_instance
            && self.subchannel_index == other.subchannel_index
    }
}
