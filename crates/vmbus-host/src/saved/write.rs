//! From a host to its records.

use std::borrow::Borrow;
use std::ops::Bound;

use kmcl::SaveOptions;
use kmcl::bus::{GpadlPages, USER_DATA_SIZE};
use saved_state::bus::{
    AfterEnd, BusChannelRecord, BusConnectionRecord, BusGpadlRecord, BusHostRecord,
    BusHvsockRecord, BusMessageRecord, BusRamRecord, ConnectionStep, GpadlStep, KINDS, OfferStep,
    OpenStep, Words,
};
use saved_state::{
    FieldError, FieldProblem, HeaderFlags, Save, SaveStep, Step, StreamInfo, StreamKind,
    StreamWriter, WriteError,
};
use vmbus_wire::guid::Guid;

use crate::channel::{Channel, Closing, Modifying, OfferState, OpenKind, OpenParams, OpenState};
use crate::connection::{Connection, ContactAnswer, Established, Next};
use crate::effect::HvsockRequest;
use crate::gpadl::{Assembly, Gpadl, GpadlState};
use crate::host::{Config, Host};
use crate::limits::MAX_RAM_RUNS;
use crate::offer::{OfferId, OfferParams};
use crate::outgoing::{OutgoingMessage, SlotId};
use crate::shape::GuestShape;

/// A host that is being saved: over a host that is borrowed, or one that is shared and does not change.
///
/// Memory: the caller's buffer, and this value.
#[derive(Clone, Debug)]
pub struct HostSave<H> {
    host: H,
    writer: StreamWriter,
    next: At,
}

/// What is written next.
#[derive(Clone, Copy, Debug)]
enum At {
    Header,
    Host,
    Ram(usize),
    Connection,
    /// The channel behind this one.
    Channel(Bound<OfferId>),
    /// The GPADL behind this one.
    Gpadl(Bound<(OfferId, u32)>),
    /// The request behind this one.
    Hvsock(Bound<u64>),
    Message(usize),
    End,
    Over,
}

impl Host {
    /// Begins to save the host, at whatever step it is.
    ///
    /// # Errors
    /// [`WriteError`], where the format asked for cannot say it, or the guest's memory has more than
    /// [`MAX_RAM_RUNS`] pieces.
    pub fn save(&self, options: &SaveOptions) -> Result<HostSave<&Self>, WriteError> {
        HostSave::new(self, options)
    }
}

impl<H: Borrow<Host>> HostSave<H> {
    /// As [`Host::save`], over a host that is borrowed in any way.
    ///
    /// # Errors
    /// As [`Host::save`].
    pub fn new(host: H, options: &SaveOptions) -> Result<Self, WriteError> {
        let counts = Counts::of(host.borrow());
        if counts.ram_runs as usize > MAX_RAM_RUNS {
            let (found, most) = (u64::from(counts.ram_runs), MAX_RAM_RUNS as u64);
            let problem = FieldProblem::Range { found, most };
            let why = FieldError { number: 15, name: "ram_runs", problem };
            return Err(WriteError::Field { record: "bus.host", why });
        }
        let info = StreamInfo {
            stream: StreamKind::BUS,
            flags: HeaderFlags::default(),
            interface_type: Guid::ZERO,
            interface_instance: Guid::ZERO,
            producer: options.producer,
            chunks: counts.chunks(),
            bytes: 0,
            items: counts.channels,
        };
        let writer = StreamWriter::new(options.format, info, KINDS)?;
        Ok(Self { host, writer, next: At::Header })
    }

    /// Writes one chunk into `room`, if there is enough; `None` when the last one was written.
    fn write_next(&mut self, room: &mut [u8]) -> Result<Option<Step>, WriteError> {
        let host = self.host.borrow();
        let writer = &mut self.writer;
        loop {
            // What is written, and what comes after it; or, at a list's end, the next list.
            let (step, next) = match self.next {
                At::Header => (writer.header(room)?, At::Host),
                At::Host => (writer.record(&host_record(host), room)?, At::Ram(0)),
                At::Ram(at) => match host.shape.ram.runs().get(at) {
                    Some(&(first_pfn, end_pfn)) => {
                        let run = BusRamRecord { first_pfn, end_pfn };
                        (writer.record(&run, room)?, At::Ram(at + 1))
                    }
                    None => {
                        self.next = At::Connection;
                        continue;
                    }
                },
                At::Connection => {
                    let channels = At::Channel(Bound::Unbounded);
                    match agreed(&host.connection) {
                        Some(agreed) => {
                            (writer.record(&connection_record(agreed), room)?, channels)
                        }
                        None => {
                            self.next = channels;
                            continue;
                        }
                    }
                }
                At::Channel(from) => {
                    match host.channels.table.range((from, Bound::Unbounded)).next() {
                        Some((&id, channel)) => {
                            let record = channel_record(id, channel);
                            (writer.record(&record, room)?, At::Channel(Bound::Excluded(id)))
                        }
                        None => {
                            self.next = At::Gpadl(Bound::Unbounded);
                            continue;
                        }
                    }
                }
                At::Gpadl(from) => match host.gpadls.table.range((from, Bound::Unbounded)).next() {
                    Some((&key, gpadl)) => {
                        let record = gpadl_record(key, gpadl);
                        (writer.record(&record, room)?, At::Gpadl(Bound::Excluded(key)))
                    }
                    None => {
                        self.next = At::Hvsock(Bound::Unbounded);
                        continue;
                    }
                },
                At::Hvsock(from) => {
                    match host.hvsock.waiting.range((from, Bound::Unbounded)).next() {
                        Some((&id, request)) => {
                            let record = hvsock_record(request);
                            (writer.record(&record, room)?, At::Hvsock(Bound::Excluded(id)))
                        }
                        None => {
                            self.next = At::Message(0);
                            continue;
                        }
                    }
                }
                At::Message(at) => match host.outgoing.queue.get(at) {
                    Some(message) => {
                        (writer.record(&message_record(message), room)?, At::Message(at + 1))
                    }
                    None => {
                        self.next = At::End;
                        continue;
                    }
                },
                At::End => (writer.end(room)?, At::Over),
                At::Over => return Ok(None),
            };
            if let Step::Written { .. } = step {
                self.next = next;
            }
            return Ok(Some(step));
        }
    }
}

impl<H: Borrow<Host>> Save for HostSave<H> {
    type Error = WriteError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, WriteError> {
        let mut written = 0;
        loop {
            let room = buffer.get_mut(written..).unwrap_or_default();
            match self.write_next(room)? {
                Some(Step::Written { bytes }) => written += bytes,
                Some(Step::Needs { bytes }) => {
                    return Ok(SaveStep { written, needed: bytes, done: false });
                }
                None => return Ok(SaveStep { written, needed: 0, done: true }),
            }
        }
    }
}

/// How many records of each list there are.
struct Counts {
    ram_runs: u32,
    connections: u32,
    channels: u32,
    gpadls: u32,
    hvsock_requests: u32,
    messages: u32,
}

impl Counts {
    fn of(host: &Host) -> Self {
        // All but the runs of RAM are bounded by `limits`, far below.
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        Self {
            ram_runs: count(host.shape.ram.runs().len()),
            connections: u32::from(agreed(&host.connection).is_some()),
            channels: count(host.channels.len()),
            gpadls: count(host.gpadls.len()),
            hvsock_requests: count(host.hvsock.len()),
            messages: count(host.outgoing.len()),
        }
    }

    /// Chunks of the stream: header, host and end beside the lists.
    fn chunks(&self) -> u32 {
        let Self { ram_runs, connections, channels, gpadls, hvsock_requests, messages } = *self;
        3 + ram_runs + connections + channels + gpadls + hvsock_requests + messages
    }
}

/// The connection that stands, or that comes next.
fn agreed(connection: &Connection) -> Option<&Established> {
    match connection {
        Connection::Connected(established)
        | Connection::Disconnecting {
            next: Next::VersionResponse { answer: ContactAnswer::Accepted(established), .. },
        } => Some(established),
        Connection::Disconnected | Connection::Disconnecting { .. } => None,
    }
}

fn host_record(host: &Host) -> BusHostRecord {
    let counts = Counts::of(host);
    let Host { config, shape, connection, channels, gpadls: _, hvsock: _, outgoing, last_serial } =
        host;
    let Config { newest_version, gpadl_pages } = config;
    let GuestShape { vp_count, ram: _ } = shape;
    let mut failed_version = 0;
    let mut told = SlotId { vp: 0, sint: 0 };
    let (connection, after_end) = match connection {
        Connection::Disconnected => (ConnectionStep::Disconnected, AfterEnd::None),
        Connection::Connected(_) => (ConnectionStep::Connected, AfterEnd::None),
        Connection::Disconnecting { next } => {
            let after_end = match next {
                Next::Nothing => AfterEnd::Nothing,
                Next::UnloadComplete(None) => AfterEnd::UnloadUntold,
                Next::UnloadComplete(Some(slot)) => {
                    told = *slot;
                    AfterEnd::UnloadComplete
                }
                Next::VersionResponse { slot, answer } => {
                    told = *slot;
                    match answer {
                        ContactAnswer::Accepted(_) => AfterEnd::Accepted,
                        ContactAnswer::Unsupported => AfterEnd::Unsupported,
                        ContactAnswer::Failed { version } => {
                            failed_version = version.to_wire();
                            AfterEnd::Failed
                        }
                    }
                }
            };
            (ConnectionStep::Disconnecting, after_end)
        }
    };
    let before_pause = outgoing.before_pause.and_then(|count| u32::try_from(count).ok());
    BusHostRecord {
        newest_version: newest_version.to_wire(),
        gpadl_page_quota: *gpadl_pages,
        vp_count: *vp_count,
        connection,
        after_end,
        after_end_vp: told.vp,
        after_end_sint: told.sint.into(),
        failed_version,
        last_serial: *last_serial,
        offers_made: channels.offers_made,
        last_channel_id: channels.last_channel_id,
        last_message: outgoing.serials,
        paused: outgoing.before_pause.is_some(),
        before_pause: before_pause.unwrap_or(0),
        ram_runs: counts.ram_runs,
        channels: counts.channels,
        gpadls: counts.gpadls,
        hvsock_requests: counts.hvsock_requests,
        messages: counts.messages,
    }
}

fn connection_record(established: &Established) -> BusConnectionRecord {
    let Established {
        version,
        features,
        slot,
        client_id,
        interrupt_page,
        monitor_pages,
        offers_requested,
    } = established;
    let (parent_to_child_monitor, child_to_parent_monitor) = monitor_pages.unwrap_or((0, 0));
    BusConnectionRecord {
        version: version.to_wire(),
        features: features.bits(),
        slot_vp: slot.vp,
        slot_sint: slot.sint.into(),
        named: client_id.is_some(),
        client_id: client_id.unwrap_or(Guid::ZERO),
        interrupt_page: interrupt_page.unwrap_or(0),
        parent_to_child_monitor,
        child_to_parent_monitor,
        offers_requested: *offers_requested,
    }
}

fn channel_record(offer: OfferId, channel: &Channel) -> BusChannelRecord<'_> {
    let Channel { channel_id, params, offer: standing, open, modifying } = channel;
    let OfferParams {
        key,
        enumerate_device_interface,
        pipe,
        tlnpi_provider,
        force_new_channel,
        mmio_megabytes,
        mmio_megabytes_optional,
        user_defined,
    } = params;
    let mut record = BusChannelRecord {
        offer: offer.0,
        channel_id: *channel_id,
        interface_type: key.interface_type,
        interface_instance: key.interface_instance,
        subchannel_index: key.subchannel_index.into(),
        enumerate_device_interface: *enumerate_device_interface,
        pipe: *pipe,
        tlnpi_provider: *tlnpi_provider,
        force_new_channel: *force_new_channel,
        mmio_megabytes: (*mmio_megabytes).into(),
        mmio_megabytes_optional: (*mmio_megabytes_optional).into(),
        user_defined: unless_zero(user_defined),
        offer_step: match standing {
            OfferState::Hidden => OfferStep::Hidden,
            OfferState::Offered => OfferStep::Offered,
            OfferState::Rescinded => OfferStep::Rescinded,
            OfferState::Released => OfferStep::Released,
        },
        ..BusChannelRecord::default()
    };
    record.open_step = match open {
        OpenState::Closed => OpenStep::Closed,
        OpenState::Opening(params) => {
            put_open(&mut record, params);
            OpenStep::Opening
        }
        OpenState::Open(params) => {
            put_open(&mut record, params);
            OpenStep::Open
        }
        OpenState::Abandoned(kind) => {
            put_kind(&mut record, *kind);
            OpenStep::Abandoned
        }
        OpenState::Closing(closing) => {
            put_closing(&mut record, closing);
            OpenStep::Closing
        }
        OpenState::Reopening(closing, params) => {
            put_closing(&mut record, closing);
            put_open(&mut record, params);
            OpenStep::Reopening
        }
    };
    if let Some(Modifying { serial, target_vp, answered }) = modifying {
        record.modifying = true;
        record.modifying_serial = *serial;
        record.modifying_vp = *target_vp;
        record.modifying_told = *answered;
    }
    record
}

fn put_kind(record: &mut BusChannelRecord<'_>, kind: OpenKind) {
    match kind {
        OpenKind::Ordinary { open_id } => record.open_id = open_id,
        OpenKind::Reserved { slot } => {
            record.reserved = true;
            (record.reply_vp, record.reply_sint) = (slot.vp, slot.sint.into());
        }
    }
}

fn put_open<'a>(record: &mut BusChannelRecord<'a>, open: &'a OpenParams) {
    let OpenParams {
        kind,
        ring_gpadl,
        downstream_page_offset,
        target_vp,
        event_flag,
        connection_id,
        user_data,
    } = open;
    put_kind(record, *kind);
    record.ring_gpadl = *ring_gpadl;
    record.downstream_page_offset = *downstream_page_offset;
    record.interrupts = target_vp.is_some();
    record.target_vp = target_vp.unwrap_or(0);
    record.event_flag = (*event_flag).into();
    record.connection_id = *connection_id;
    record.user_data = unless_zero(user_data);
}

fn put_closing(record: &mut BusChannelRecord<'_>, closing: &Closing) {
    let Closing { ring_gpadl, accepted, reserved_reply } = closing;
    record.closing_gpadl = *ring_gpadl;
    record.closing_accepted = *accepted;
    if let Some(slot) = reserved_reply {
        record.closing_told = true;
        (record.closing_reply_vp, record.closing_reply_sint) = (slot.vp, slot.sint.into());
    }
}

/// Most offers and opens have no bytes of their own.
fn unless_zero(bytes: &[u8; USER_DATA_SIZE]) -> &[u8] {
    if bytes == &[0; USER_DATA_SIZE] { &[] } else { bytes }
}

/// The words of a GPADL where they lie.
enum HeldWords<'a> {
    Received(&'a [u64]),
    Pages(&'a GpadlPages),
}

impl Words for HeldWords<'_> {
    fn len(&self) -> usize {
        size_of::<u64>()
            * match self {
                Self::Received(words) => words.len(),
                Self::Pages(pages) => {
                    pages.ranges.iter().map(|range| 1 + range.pfns.len()).sum::<usize>()
                }
            }
    }

    fn write(&self, room: &mut [u8]) {
        let (mut room, _) = room.as_chunks_mut();
        let mut put = |words: &[u64]| {
            // The room is as long as `len` says.
            let Some((now, later)) = std::mem::take(&mut room).split_at_mut_checked(words.len())
            else {
                return;
            };
            now.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
            room = later;
        };
        match self {
            Self::Received(words) => put(words),
            Self::Pages(pages) => {
                for range in &pages.ranges {
                    put(&[u64::from(range.byte_offset) << 32 | u64::from(range.byte_count)]);
                    put(&range.pfns);
                }
            }
        }
    }
}

fn whole(step: GpadlStep, pages: &GpadlPages) -> (GpadlStep, u32, u32, HeldWords<'_>) {
    let GpadlPages { ranges, read_only: _ } = pages; // no message says that it is
    let ranges = u32::try_from(ranges.len()).unwrap_or(u32::MAX); // counted with 16 bits
    (step, ranges, 0, HeldWords::Pages(pages))
}

fn gpadl_record((offer, gpadl): (OfferId, u32), held: &Gpadl) -> BusGpadlRecord<HeldWords<'_>> {
    let (step, ranges, words_total, words) = match &held.state {
        GpadlState::Assembling(Assembly { words, words_total, range_count }) => {
            let words_total = u32::try_from(*words_total).unwrap_or(u32::MAX); // below 2^13
            let words = HeldWords::Received(words);
            (GpadlStep::Assembling, u32::from(*range_count), words_total, words)
        }
        GpadlState::Created(pages) => whole(GpadlStep::Created, pages),
        GpadlState::TearingDown(pages) => whole(GpadlStep::TearingDown, pages),
    };
    let in_use = held.in_use;
    BusGpadlRecord { offer: offer.0, gpadl, step, in_use, ranges, words_total, words }
}

fn hvsock_record(request: &HvsockRequest) -> BusHvsockRecord {
    let HvsockRequest { id, endpoint_id, service_id, silo_id } = *request;
    let (contained, silo_id) = (silo_id.is_some(), silo_id.unwrap_or(Guid::ZERO));
    BusHvsockRecord { id, endpoint_id, service_id, contained, silo_id }
}

fn message_record(message: &OutgoingMessage) -> BusMessageRecord<'_> {
    let OutgoingMessage { serial, slot, message, for_reserved } = message;
    BusMessageRecord {
        serial: *serial,
        slot_vp: slot.vp,
        slot_sint: slot.sint.into(),
        message,
        for_reserved: *for_reserved,
    }
}
