//! Records of a bus, written by `vmbus-host`: the host's side of one connection, then what it has a list
//! of, each list in one piece and in ascending order.
//!
//! GPADLs come by the hundred, with hundreds of pages each, so everything here is written from the bus's
//! own memory and read as slices of the input. What the numbers say together is checked by their owner.

mod flat;
mod gpadl;

use vmbus_wire::guid::Guid;

use crate::kind::{KindInfo, RecordKind};
use crate::reader::Kinds;
use crate::record::Record;
use crate::schema::Shape;

use flat::{flat_enum, flat_record};

pub use gpadl::{BusGpadlRecord, Filled};

/// The kind of [`BusHostRecord`].
pub const BUS_HOST: RecordKind = RecordKind(64);
/// The kind of [`BusRamRecord`].
pub const BUS_RAM: RecordKind = RecordKind(65);
/// The kind of [`BusConnectionRecord`].
pub const BUS_CONNECTION: RecordKind = RecordKind(66);
/// The kind of [`BusChannelRecord`].
pub const BUS_CHANNEL: RecordKind = RecordKind(67);
/// The kind of [`BusGpadlRecord`].
pub const BUS_GPADL: RecordKind = RecordKind(68);
/// The kind of [`BusHvsockRecord`].
pub const BUS_HVSOCK: RecordKind = RecordKind(69);
/// The kind of [`BusMessageRecord`].
pub const BUS_MESSAGE: RecordKind = RecordKind(70);

/// The kinds of a bus's stream, in the order in which they come.
pub const KINDS: Kinds = &[
    BusHostRecord::KIND,
    BusRamRecord::KIND,
    BusConnectionRecord::KIND,
    <BusChannelRecord<'static> as Record>::KIND,
    gpadl::KIND,
    BusHvsockRecord::KIND,
    <BusMessageRecord<'static> as Record>::KIND,
];

/// Most device-defined bytes of an offer, and of an open.
pub const MAX_USER_BYTES: usize = 120;
/// Most bytes of a message to the guest.
pub const MAX_MESSAGE_BYTES: usize = 240;
/// Most bytes of a GPADL's words: its messages count them with 16 bits, in whole words of 8 bytes.
pub const MAX_WORD_BYTES: usize = 0xffff / 8 * 8;

flat_enum! {
    /// How far the connection has come.
    pub enum ConnectionStep: CONNECTION_STEPS {
        /// Not said; never written.
        Unspecified = 0, "unspecified";
        /// No guest is connected.
        Disconnected = 1, "disconnected";
        /// It is over, and devices have not let go.
        Disconnecting = 2, "disconnecting";
        /// It is agreed on.
        Connected = 3, "connected";
    }
}

flat_enum! {
    /// What follows when devices have let go of a connection that is over.
    pub enum AfterEnd: AFTER_END {
        /// The connection is not ending.
        None = 0, "none";
        /// Nothing.
        Nothing = 1, "nothing";
        /// The guest is told that the unload is complete.
        UnloadComplete = 2, "unload_complete";
        /// The unload is complete, and the guest's version has no message for it.
        UnloadUntold = 3, "unload_untold";
        /// The guest is told that there is a new connection.
        Accepted = 4, "accepted";
        /// The guest is told that its version is not spoken.
        Unsupported = 5, "unsupported";
        /// The guest is told that its version is spoken, and that there is no connection.
        Failed = 6, "failed";
    }
}

flat_record! {
    /// The host's side of a connection apart from its lists. Once, before them.
    pub struct BusHostRecord: BUS_HOST, "bus.host" {
        /// The newest version that the host speaks, as on the wire.
        1 newest_version: u32, Shape::Uint32, required;
        /// Pages that all GPADLs together may describe.
        2 gpadl_page_quota: u64, Shape::Uint64;
        /// Virtual processors of the guest.
        3 vp_count: u32, Shape::Uint32;
        /// How far the connection has come. A connection record follows where it is connected.
        4 connection: ConnectionStep, Shape::Enum(CONNECTION_STEPS), required;
        /// What comes next where it is disconnecting. A connection record follows for *accepted*.
        5 after_end: AfterEnd, Shape::Enum(AFTER_END);
        /// Where the guest is told of that: VP index.
        6 after_end_vp: u32, Shape::Uint32;
        /// Where the guest is told of that: SINT.
        7 after_end_sint: u32, Shape::Uint32;
        /// For *failed*: the version asked for, as on the wire.
        8 failed_version: u32, Shape::Uint32;
        /// The last number given to something that is to be answered.
        9 last_serial: u64, Shape::Uint64;
        /// Offers made so far: the last one's number.
        10 offers_made: u64, Shape::Uint64;
        /// The channel id given out last.
        11 last_channel_id: u32, Shape::Uint32;
        /// The last message's number.
        12 last_message: u64, Shape::Uint64;
        /// The guest has paused the connection.
        13 paused: bool, Shape::Bool;
        /// Messages that were there before that, and may still leave.
        14 before_pause: u32, Shape::Uint32;
        /// Runs of RAM that follow.
        15 ram_runs: u32, Shape::Uint32;
        /// Channels that follow.
        16 channels: u32, Shape::Uint32;
        /// GPADLs that follow.
        17 gpadls: u32, Shape::Uint32;
        /// hvsock requests that follow.
        18 hvsock_requests: u32, Shape::Uint32;
        /// Messages that follow.
        19 messages: u32, Shape::Uint32;
    }
}

flat_record! {
    /// A run of the guest's RAM. Ascending, without overlap or neighbours.
    pub struct BusRamRecord: BUS_RAM, "bus.ram" {
        /// The first page frame.
        1 first_pfn: u64, Shape::Uint64;
        /// The page frame behind the last.
        2 end_pfn: u64, Shape::Uint64, required;
    }
}

flat_record! {
    /// A connection as agreed. At most once, after the RAM.
    pub struct BusConnectionRecord: BUS_CONNECTION, "bus.connection" {
        /// The version, as on the wire.
        1 version: u32, Shape::Uint32, required;
        /// The features that both sides have, as on the wire.
        2 features: u32, Shape::Uint32;
        /// Where the guest takes messages: VP index.
        3 slot_vp: u32, Shape::Uint32;
        /// Where the guest takes messages: SINT.
        4 slot_sint: u32, Shape::Uint32;
        /// The client has a name for itself.
        5 named: bool, Shape::Bool;
        /// That name.
        6 client_id: Guid, Shape::Guid;
        /// Guest physical address of the shared interrupt page; 0 without one.
        7 interrupt_page: u64, Shape::Uint64;
        /// Guest physical address of the parent-to-child monitor page; 0 without one.
        8 parent_to_child_monitor: u64, Shape::Uint64;
        /// Guest physical address of the child-to-parent monitor page; 0 without one.
        9 child_to_parent_monitor: u64, Shape::Uint64;
        /// The guest has asked for offers.
        10 offers_requested: bool, Shape::Bool;
    }
}

flat_enum! {
    /// How an offer stands.
    pub enum OfferStep: OFFER_STEPS {
        /// Not said; never written.
        Unspecified = 0, "unspecified";
        /// The guest was not told of it.
        Hidden = 1, "hidden";
        /// The guest was told of it.
        Offered = 2, "offered";
        /// The guest was told that it is withdrawn.
        Rescinded = 3, "rescinded";
        /// The guest knows nothing of it any more.
        Released = 4, "released";
    }
}

flat_enum! {
    /// How far opening and closing has come.
    pub enum OpenStep: OPEN_STEPS {
        /// Not said; never written.
        Unspecified = 0, "unspecified";
        /// Closed.
        Closed = 1, "closed";
        /// The guest waits for the device.
        Opening = 2, "opening";
        /// Open.
        Open = 3, "open";
        /// Open for the guest; the device has let go.
        Abandoned = 4, "abandoned";
        /// Closed for the guest; the device has not let go.
        Closing = 5, "closing";
        /// As *closing*, and the guest waits for the next open.
        Reopening = 6, "reopening";
    }
}

flat_record! {
    /// A channel: what is offered, how the offer stands, and how the channel does. In the order in which
    /// the offers were made.
    pub struct BusChannelRecord<'a>: BUS_CHANNEL, "bus.channel" {
        /// The offer's number.
        1 offer: u64, Shape::Uint64, required;
        /// What the guest calls the channel.
        2 channel_id: u32, Shape::Uint32, required;
        /// The protocol spoken on it.
        3 interface_type: Guid, Shape::Guid;
        /// Tells apart the channels of one type.
        4 interface_instance: Guid, Shape::Guid;
        /// 0, or which subchannel it is.
        5 subchannel_index: u32, Shape::Uint32;
        /// Publish a device interface in the guest.
        6 enumerate_device_interface: bool, Shape::Bool;
        /// Payloads have a pipe's header.
        7 pipe: bool, Shape::Bool;
        /// A socket-style channel.
        8 tlnpi_provider: bool, Shape::Bool;
        /// After a restore it is a new channel.
        9 force_new_channel: bool, Shape::Bool;
        /// MMIO space needed, in MiB.
        10 mmio_megabytes: u32, Shape::Uint32;
        /// MMIO space wanted on top, in MiB.
        11 mmio_megabytes_optional: u32, Shape::Uint32;
        /// Device-defined bytes of the offer; zeros at the end may be left out.
        12 user_defined: &'a [u8], Shape::Bytes { most: MAX_USER_BYTES };
        /// How the offer stands.
        13 offer_step: OfferStep, Shape::Enum(OFFER_STEPS), required;
        /// How the channel does.
        14 open_step: OpenStep, Shape::Enum(OPEN_STEPS), required;
        /// *Opening*, *open*, *abandoned*, *reopening*: as a reserved channel.
        15 reserved: bool, Shape::Bool;
        /// Not reserved: the guest's number for the open.
        16 open_id: u32, Shape::Uint32;
        /// Reserved: where the guest takes answers, VP index.
        17 reply_vp: u32, Shape::Uint32;
        /// Reserved: where the guest takes answers, SINT.
        18 reply_sint: u32, Shape::Uint32;
        /// *Opening*, *open*, *reopening*: the GPADL of the rings.
        19 ring_gpadl: u32, Shape::Uint32;
        /// Where in it the host-to-guest ring begins, in pages.
        20 downstream_page_offset: u32, Shape::Uint32;
        /// The guest is interrupted; else it polls.
        21 interrupts: bool, Shape::Bool;
        /// VP index of the interrupt.
        22 target_vp: u32, Shape::Uint32;
        /// Event flag of the interrupt.
        23 event_flag: u32, Shape::Uint32;
        /// The connection by which the guest signals.
        24 connection_id: u32, Shape::Uint32;
        /// What came with the open; zeros at the end may be left out.
        25 user_data: &'a [u8], Shape::Bytes { most: MAX_USER_BYTES };
        /// *Closing*, *reopening*: the GPADL of the rings that the device may still use.
        26 closing_gpadl: u32, Shape::Uint32;
        /// The device had accepted the open.
        27 closing_accepted: bool, Shape::Bool;
        /// The guest waits to hear that the device has let go.
        28 closing_told: bool, Shape::Bool;
        /// Where: VP index.
        29 closing_reply_vp: u32, Shape::Uint32;
        /// Where: SINT.
        30 closing_reply_sint: u32, Shape::Uint32;
        /// The interrupt is being moved.
        31 modifying: bool, Shape::Bool;
        /// Number of that request.
        32 modifying_serial: u64, Shape::Uint64;
        /// Where to: VP index.
        33 modifying_vp: u32, Shape::Uint32;
        /// The guest waits for the answer.
        34 modifying_told: bool, Shape::Bool;
    }
}

flat_enum! {
    /// How far a GPADL has come.
    pub enum GpadlStep: GPADL_STEPS {
        /// Not said; never written.
        Unspecified = 0, "unspecified";
        /// Words are missing.
        Assembling = 1, "assembling";
        /// The guest was told that it exists.
        Created = 2, "created";
        /// The guest has taken it back, and waits.
        TearingDown = 3, "tearing_down";
    }
}

flat_record! {
    /// A guest's request for a socket connection that nobody has answered. In the order of their numbers.
    pub struct BusHvsockRecord: BUS_HVSOCK, "bus.hvsock_request" {
        /// Its number.
        1 id: u64, Shape::Uint64, required;
        /// The guest's end.
        2 endpoint_id: Guid, Shape::Guid;
        /// The host's service.
        3 service_id: Guid, Shape::Guid;
        /// A container asks.
        4 contained: bool, Shape::Bool;
        /// That container.
        5 silo_id: Guid, Shape::Guid;
    }
}

flat_record! {
    /// A message that waits for its slot. In the order of sending.
    pub struct BusMessageRecord<'a>: BUS_MESSAGE, "bus.message" {
        /// Its number.
        1 serial: u64, Shape::Uint64, required;
        /// Where it goes: VP index.
        2 slot_vp: u32, Shape::Uint32;
        /// Where it goes: SINT.
        3 slot_sint: u32, Shape::Uint32;
        /// The payload.
        4 message: &'a [u8], Shape::Bytes { most: MAX_MESSAGE_BYTES }, required;
        /// It is about a reserved channel.
        5 for_reserved: bool, Shape::Bool;
    }
}

#[cfg(test)]
mod tests;
