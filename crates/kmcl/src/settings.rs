//! What the Init setters set, with the defaults of D-60, and the bounds that follow from it.

use std::sync::Arc;

use vmbus_ring::packet_ring_bytes;
use vmbus_wire::PAGE_SIZE_U32;
use vmbus_wire::guid::Guid;
use vmbus_wire::packet::{MAX_PACKET_BYTES, TRAILER_SIZE};
use vmbus_wire::pipe;
use vmbus_wire::ring::RESERVED_BYTES;

use crate::bus::USER_DATA_SIZE;
use crate::callbacks::{PnpFailure, ProcessPacket, SaveRestorePacket, StateChange};
use crate::flags::{ChannelFlags, ServerFlags};
use crate::lifecycle::Side;

/// Bounds of one channel that no setter exceeds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits;

impl Limits {
    /// Largest message, in bytes: what 16 bits of 8-byte units can say, less descriptor and padding.
    pub const PACKET_SIZE: u32 = 0xffff * 8 - 64;
    /// Largest external data of one packet, in bytes.
    pub const EXTERNAL_DATA: u32 = 32 << 20;
    /// Most ranges in a packet's external data.
    pub const EXTERNAL_RANGES: u32 = 8192;
    /// Largest driver area on an incoming packet, in bytes.
    pub const CLIENT_CONTEXT: u32 = 64 << 10;
    /// Most incoming packets in flight, and most outgoing packet objects.
    pub const PACKETS: u32 = 64 << 10;
    /// Largest ring, in pages: what one GPADL can describe holds both rings.
    pub const RING_PAGES: u32 = 4096;
    /// Highest virtual trust level (D-68).
    pub const VTL: u8 = 2;
    /// Longest friendly name, in bytes.
    pub const NAME: usize = 256;
}

/// The settings of a channel; fixed from Enable to Disable.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) friendly_name: String,
    pub(crate) flags: ChannelFlags,
    pub(crate) maximum_packet_size: u32,
    /// Bytes of completion payload for which ring space is reserved; `None`: the packet size.
    pub(crate) maximum_completion_size: Option<u32>,
    pub(crate) maximum_packet_count: u32,
    pub(crate) external_data_size: u32,
    pub(crate) external_data_ranges: u32,
    pub(crate) client_context_size: u32,
    pub(crate) process_packet: Option<Arc<dyn ProcessPacket>>,
    pub(crate) state_change: Option<Arc<dyn StateChange>>,
    pub(crate) subchannel_index: u16,
    pub(crate) user_data: [u8; USER_DATA_SIZE],
    pub(crate) interface_type: Guid,
    /// Always set on a server; on a client `None` takes any.
    pub(crate) interface_instance: Option<Guid>,
    // Server.
    pub(crate) server_flags: ServerFlags,
    pub(crate) target_vtl: u8,
    pub(crate) mmio_megabytes: u16,
    pub(crate) mmio_megabytes_optional: u16,
    pub(crate) save_restore: Option<Arc<dyn SaveRestorePacket>>,
    // Client.
    pub(crate) incoming_pages: u32,
    pub(crate) outgoing_pages: u32,
    pub(crate) target_vp: u32,
    pub(crate) pnp_failure: Option<Arc<dyn PnpFailure>>,
}

impl Settings {
    pub(crate) fn completion_size(&self) -> u32 {
        self.maximum_completion_size.unwrap_or(self.maximum_packet_size)
    }

    pub(crate) fn is_pipe(&self) -> bool {
        self.flags.contains(ChannelFlags::IS_PIPE)
            || self.server_flags.contains(ServerFlags::OFFER_AS_PIPE)
    }

    /// Words of 8 bytes that the ranges of a packet within the bounds can take: the pages of the
    /// data, and for each range a head and two pages more, since it may begin and end inside one.
    pub(crate) fn external_words(&self) -> usize {
        if self.external_data_size == 0 {
            return 0;
        }
        (self.external_data_size.div_ceil(PAGE_SIZE_U32) + 3 * self.external_data_ranges) as usize
    }

    /// Bytes of ring that the largest packet takes which `side` may write: a message, from a client
    /// with external data, or a completion.
    pub(crate) fn largest_packet(&self, side: Side) -> u32 {
        let header = if self.is_pipe() { pipe::HEADER_SIZE } else { 0 };
        let words = match side {
            Side::Client if self.external_data_size != 0 => 1 + self.external_words(),
            Side::Client | Side::Server => 0,
        };
        let external = u32::try_from(8 * words).unwrap_or(u32::MAX);
        let message = packet_ring_bytes(external, self.maximum_packet_size + header);
        let completion = packet_ring_bytes(0, self.completion_size());
        message.max(completion).min(MAX_PACKET_BYTES + TRAILER_SIZE)
    }

    /// Pages of the rings that a client asks for, incoming and outgoing: those that were set, or as
    /// many as hold the largest packet.
    pub(crate) fn ring_pages(&self) -> (u32, u32) {
        let least = |side| {
            let data = self.largest_packet(side) + RESERVED_BYTES;
            1 + data.div_ceil(PAGE_SIZE_U32)
        };
        let incoming = self.incoming_pages.max(least(Side::Server));
        (incoming, self.outgoing_pages.max(least(Side::Client)))
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            friendly_name: String::new(),
            flags: ChannelFlags::empty(),
            maximum_packet_size: 4096,
            maximum_completion_size: None,
            maximum_packet_count: 256,
            external_data_size: 0,
            external_data_ranges: 0,
            client_context_size: 0,
            process_packet: None,
            state_change: None,
            subchannel_index: 0,
            user_data: [0; USER_DATA_SIZE],
            interface_type: Guid::ZERO,
            interface_instance: None,
            server_flags: ServerFlags::empty(),
            target_vtl: 0,
            mmio_megabytes: 0,
            mmio_megabytes_optional: 0,
            save_restore: None,
            incoming_pages: 8,
            outgoing_pages: 8,
            target_vp: 0,
            pnp_failure: None,
        }
    }
}
