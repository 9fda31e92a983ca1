//! From parts of a host to records.

use kmcl::bus::USER_DATA_SIZE;
use saved_state::bus::{
    AfterEnd, BusChannelRecord, BusConnectionRecord, BusHostRecord, BusHvsockRecord,
    BusMessageRecord, ConnectionStep, OfferStep, OpenStep,
};
use vmbus_wire::guid::Guid;

use crate::channel::{Channel, Closing, Modifying, OfferState, OpenKind, OpenParams, OpenState};
use crate::connection::{Connection, ContactAnswer, Established, Next};
use crate::effect::HvsockRequest;
use crate::host::{Config, Host};
use crate::offer::{OfferId, OfferParams};
use crate::outgoing::{OutgoingMessage, SlotId};
use crate::shape::GuestShape;

/// How many records of each list there are.
pub(super) struct Counts {
    pub(super) ram_runs: u32,
    connections: u32,
    pub(super) channels: u32,
    gpadls: u32,
    hvsock_requests: u32,
    messages: u32,
}

impl Counts {
    pub(super) fn of(host: &Host) -> Self {
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
    pub(super) fn chunks(&self) -> u32 {
        let Self { ram_runs, connections, channels, gpadls, hvsock_requests, messages } = *self;
        3 + ram_runs + connections + channels + gpadls + hvsock_requests + messages
    }
}

/// The connection that stands, or that comes next.
pub(super) fn agreed(connection: &Connection) -> Option<&Established> {
    match connection {
        Connection::Connected(established)
        | Connection::Disconnecting {
            next: Next::VersionResponse { answer: ContactAnswer::Accepted(established), .. },
        } => Some(established),
        Connection::Disconnected | Connection::Disconnecting { .. } => None,
    }
}

pub(super) fn host_record(host: &Host) -> BusHostRecord {
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

pub(super) fn connection_record(established: &Established) -> BusConnectionRecord {
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

pub(super) fn channel_record(offer: OfferId, channel: &Channel) -> BusChannelRecord<'_> {
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

pub(super) fn hvsock_record(request: &HvsockRequest) -> BusHvsockRecord {
    let HvsockRequest { id, endpoint_id, service_id, silo_id } = *request;
    let (contained, silo_id) = (silo_id.is_some(), silo_id.unwrap_or(Guid::ZERO));
    BusHvsockRecord { id, endpoint_id, service_id, contained, silo_id }
}

pub(super) fn message_record(message: &OutgoingMessage) -> BusMessageRecord<'_> {
    let OutgoingMessage { serial, slot, message, for_reserved } = message;
    BusMessageRecord {
        serial: *serial,
        slot_vp: slot.vp,
        slot_sint: slot.sint.into(),
        message,
        for_reserved: *for_reserved,
    }
}
