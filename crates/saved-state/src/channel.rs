//! Records of a channel, written by `kmcl`: the channel itself, then each packet in flight in the order
//! in which it was sent or delivered.

mod packets;

use crate::kind::{KindInfo, RecordKind, SINCE_V1};
use crate::limits::MAX_PACKET_BYTES;
use crate::reader::Kinds;
use crate::record::{self, Record};
use crate::schema::{Field, Shape};

pub use packets::{Fence, HandedBack, IncomingPacketRecord, OutgoingPacketRecord, Place};

/// The kind of [`ChannelRecord`].
pub const CHANNEL: RecordKind = RecordKind(16);
/// The kind of [`OutgoingPacketRecord`].
pub const OUTGOING_PACKET: RecordKind = RecordKind(17);
/// The kind of [`IncomingPacketRecord`].
pub const INCOMING_PACKET: RecordKind = RecordKind(18);

/// The kinds of a channel that was paused: no incoming packet is in flight.
pub const PAUSED_KINDS: Kinds =
    &[ChannelRecord::KIND, <OutgoingPacketRecord<'static> as Record>::KIND];

/// The kinds of a channel that was frozen. Readers know all of them.
pub const KINDS: Kinds = &[
    ChannelRecord::KIND,
    <OutgoingPacketRecord<'static> as Record>::KIND,
    <IncomingPacketRecord<'static> as Record>::KIND,
];

/// Most bytes of what comes with an open.
pub const MAX_USER_DATA_BYTES: usize = 120;

/// Which end of the channel was saved.
#[derive(Clone, Copy, Debug, Eq, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub enum Side {
    /// Not said; never written.
    Unspecified = 0,
    /// The server endpoint.
    Server = 1,
    /// The client endpoint.
    Client = 2,
}

/// A channel apart from its packets. Once, before them.
///
/// What was set on the channel is here to be compared, not to be taken over: a channel that is
/// restored was set up by its owner already.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ChannelRecord {
    /// Which end it is.
    #[prost(enumeration = "Side", tag = "1")]
    pub side: i32,
    /// It was started, and not paused by its owner since. (Pausing for the save does not count.)
    #[prost(bool, tag = "2")]
    pub started: bool,
    /// It was open.
    #[prost(bool, tag = "3")]
    pub open: bool,
    /// It was frozen, not paused.
    #[prost(bool, tag = "4")]
    pub frozen: bool,

    /// Size of the incoming ring's data, in bytes; 0 if it was not open.
    #[prost(uint32, tag = "5")]
    pub incoming_ring_bytes: u32,
    /// Size of the outgoing ring's data, in bytes; 0 if it was not open.
    #[prost(uint32, tag = "6")]
    pub outgoing_ring_bytes: u32,
    /// Where the next packet is read: a byte index into the incoming ring's data.
    #[prost(uint32, tag = "7")]
    pub read_index: u32,
    /// Where the next packet is written: a byte index into the outgoing ring's data.
    #[prost(uint32, tag = "8")]
    pub write_index: u32,

    /// Most incoming packets in flight.
    #[prost(uint32, tag = "9")]
    pub transaction_quota: u32,
    /// Largest message, in bytes.
    #[prost(uint32, tag = "10")]
    pub maximum_packet_size: u32,
    /// Largest external data of a packet, in bytes.
    #[prost(uint32, tag = "11")]
    pub maximum_external_data: u32,
    /// Most ranges of a packet's external data.
    #[prost(uint32, tag = "12")]
    pub maximum_external_ranges: u32,
    /// Bytes of a completion for which room in the ring is reserved.
    #[prost(uint32, tag = "13")]
    pub maximum_completion_size: u32,
    /// Incoming packets in the pool.
    #[prost(uint32, tag = "14")]
    pub maximum_packet_count: u32,
    /// Bytes of the area on each incoming packet.
    #[prost(uint32, tag = "15")]
    pub client_context_size: u32,
    /// Payloads have a pipe's header.
    #[prost(bool, tag = "16")]
    pub pipe: bool,
    /// 0, or which subchannel it is.
    #[prost(uint32, tag = "17")]
    pub subchannel_index: u32,
    /// What the client sent with its open.
    #[prost(bytes = "vec", tag = "18")]
    pub user_data: Vec<u8>,

    /// Outgoing packets that follow.
    #[prost(uint32, tag = "19")]
    pub outgoing_packets: u32,
    /// Incoming packets that follow.
    #[prost(uint32, tag = "20")]
    pub incoming_packets: u32,
    /// How often any one transaction id's slot was used at most. Ids that are given after a restore
    /// count from here, so that none comes twice.
    #[prost(uint32, tag = "21")]
    pub transaction_uses: u32,
    /// Incoming packets are delivered only by a thread that may sleep.
    #[prost(bool, tag = "22")]
    pub processing_at_passive: bool,
    /// It delivers nothing more until it was closed and opened again, because of a bad packet.
    #[prost(bool, tag = "23")]
    pub stopped: bool,
}

impl Record for ChannelRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: CHANNEL,
        name: "channel.channel",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "side", Shape::Enum(&["unspecified", "server", "client"])).required(),
            Field::new(2, "started", Shape::Bool),
            Field::new(3, "open", Shape::Bool),
            Field::new(4, "frozen", Shape::Bool),
            Field::new(5, "incoming_ring_bytes", Shape::Uint32),
            Field::new(6, "outgoing_ring_bytes", Shape::Uint32),
            Field::new(7, "read_index", Shape::Uint32),
            Field::new(8, "write_index", Shape::Uint32),
            Field::new(9, "transaction_quota", Shape::Uint32),
            Field::new(10, "maximum_packet_size", Shape::Uint32),
            Field::new(11, "maximum_external_data", Shape::Uint32),
            Field::new(12, "maximum_external_ranges", Shape::Uint32),
            Field::new(13, "maximum_completion_size", Shape::Uint32),
            Field::new(14, "maximum_packet_count", Shape::Uint32),
            Field::new(15, "client_context_size", Shape::Uint32),
            Field::new(16, "pipe", Shape::Bool),
            Field::new(17, "subchannel_index", Shape::Uint32),
            Field::new(18, "user_data", Shape::Bytes { most: MAX_USER_DATA_BYTES }),
            Field::new(19, "outgoing_packets", Shape::Uint32),
            Field::new(20, "incoming_packets", Shape::Uint32),
            Field::new(21, "transaction_uses", Shape::Uint32),
            Field::new(22, "processing_at_passive", Shape::Bool),
            Field::new(23, "stopped", Shape::Bool),
        ],
        check: record::check::<Self>,
    };
}

/// What a packet in a ring, or on its way there, can have of anything.
const PACKET_BYTES: Shape = Shape::Bytes { most: MAX_PACKET_BYTES };
