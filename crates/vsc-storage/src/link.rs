//! One channel of a client, from its allocation to its end.

use std::sync::Arc;

use kmcl::bus::Bus;
use kmcl::{Channel, Guid, Side};
use vstor_wire::packet::MAX_PACKET_BYTES;

use crate::config::{ClientConfig, MAX_TRANSFER_BYTES};
use crate::error::Error;
use crate::inbox::Inbox;

/// Incoming packets that are taken from the ring at a time: a server says little unasked.
const INCOMING_PACKETS: u32 = 16;

/// Bytes of the largest message a client sends.
const PACKET_BYTES: u32 = 64;
const _: () = assert!(PACKET_BYTES as usize == MAX_PACKET_BYTES);

/// A channel with everything set, ready to be enabled.
pub(crate) fn prepare(
    bus: &Arc<dyn Bus>,
    config: &ClientConfig,
    instance: Option<Guid>,
    subchannel_index: u16,
    inbox: &Arc<Inbox>,
) -> Result<Channel, Error> {
    let channel = Channel::allocate(Side::Client, Arc::clone(bus));
    channel.init_set_friendly_name("storage client")?;
    channel.init_set_maximum_packet_size(PACKET_BYTES)?;
    channel.init_set_maximum_external_data(MAX_TRANSFER_BYTES, 1)?;
    channel.init_set_maximum_packet_count(INCOMING_PACKETS)?;
    channel.init_set_process_packet_callbacks(Arc::clone(inbox) as _)?;
    channel.init_set_subchannel_index(subchannel_index)?;
    channel.client_init_set_ring_buffer_page_count(config.ring_pages, config.ring_pages)?;
    let failure = Some(Arc::clone(inbox) as _);
    channel.client_init_set_target_pnp(config.interface, instance, failure)?;
    Ok(channel)
}

/// Closes a channel and releases what it holds. The server is told, and not waited for.
pub(crate) fn close(channel: Channel) {
    channel.clear_waker(); // from here on life-cycle calls do their work themselves
    channel.disable();
    channel.cleanup();
}
