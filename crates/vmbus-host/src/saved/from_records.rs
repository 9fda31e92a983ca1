//! From single records to parts of a host.

use kmcl::bus::USER_DATA_SIZE;
use saved_state::bus::{
    BusChannelRecord, BusConnectionRecord, BusHvsockRecord, BusMessageRecord, OfferStep, OpenStep,
};
use vmbus_wire::guid::Guid;
use vmbus_wire::message::MessageBuffer;
use vmbus_wire::version::{FeatureFlags, Version};

use crate::channel::{Channel, Closing, Modifying, OfferState, OpenKind, OpenParams, OpenState};
use crate::connection::{
    CONNECTION_ID_MASK, Established, LAST_RESERVED_CONNECTION, SUPPORTED_FEATURES,
};
use crate::effect::HvsockRequest;
use crate::limits::MAX_CHANNEL_ID;
use crate::offer::{OfferKey, OfferParams};
use crate::outgoing::OutgoingMessage;
use crate::saved::check::Place;
use crate::saved::error::{Misfit, RestoreError};
use crate::shape::GuestShape;

type Checked<T> = Result<T, RestoreError>;

pub(super) fn connection(
    place: Place,
    record: &BusConnectionRecord,
    newest: Version,
    shape: &GuestShape,
) -> Checked<Established> {
    let BusConnectionRecord {
        version: number,
        features: bits,
        slot_vp,
        slot_sint,
        named,
        client_id,
        interrupt_page: page,
        parent_to_child_monitor,
        child_to_parent_monitor,
        offers_requested,
    } = *record;
    let version = place.version("version", number)?;
    if version > newest {
        return Err(place.wrong("version", Misfit::Contradiction { other: "newest_version" }));
    }
    let features = FeatureFlags::from_bits(bits).filter(|bits| SUPPORTED_FEATURES.contains(*bits));
    let unknown = Misfit::Unknown { found: u64::from(bits & !SUPPORTED_FEATURES.bits()) };
    let features = features.ok_or_else(|| place.wrong("features", unknown))?;
    let slot = place.slot(("slot_vp", slot_vp), ("slot_sint", slot_sint), shape.vp_count)?;
    if !named {
        place.absent(&[("client_id", client_id != Guid::ZERO)], "named")?;
    }
    if page != 0 && (version.has_event_flags_page() || !shape.ram.is_page(page)) {
        return Err(place.wrong("interrupt_page", Misfit::Unknown { found: page }));
    }
    let monitors = (parent_to_child_monitor, child_to_parent_monitor);
    if (monitors.0 == 0) != (monitors.1 == 0) {
        let other = "parent_to_child_monitor";
        return Err(place.wrong("child_to_parent_monitor", Misfit::Contradiction { other }));
    }
    Ok(Established {
        version,
        features,
        slot,
        client_id: named.then_some(client_id),
        interrupt_page: (page != 0).then_some(page),
        monitor_pages: (monitors != (0, 0)).then_some(monitors),
        offers_requested,
    })
}

/// What a channel is checked against.
#[derive(Clone, Copy)]
pub(super) struct Around {
    pub(super) vp_count: u32,
    pub(super) last_serial: u64,
}

pub(super) fn channel(
    place: Place,
    record: &BusChannelRecord<'_>,
    around: Around,
) -> Checked<Channel> {
    let most = u64::from(MAX_CHANNEL_ID);
    place.range("channel_id", record.channel_id.into(), 1, most)?;
    Ok(Channel {
        channel_id: record.channel_id,
        params: offer(place, record)?,
        offer: match record.offer_step {
            OfferStep::Offered => OfferState::Offered,
            OfferStep::Rescinded => OfferState::Rescinded,
            OfferStep::Released => OfferState::Released,
            // The table of fields lets *unspecified* not through.
            OfferStep::Hidden | OfferStep::Unspecified => OfferState::Hidden,
        },
        open: open_state(place, record, around)?,
        modifying: modifying(place, record, around)?,
    })
}

fn offer(place: Place, record: &BusChannelRecord<'_>) -> Checked<OfferParams> {
    Ok(OfferParams {
        key: OfferKey {
            interface_type: record.interface_type,
            interface_instance: record.interface_instance,
            subchannel_index: place.half_word("subchannel_index", record.subchannel_index)?,
        },
        enumerate_device_interface: record.enumerate_device_interface,
        pipe: record.pipe,
        tlnpi_provider: record.tlnpi_provider,
        force_new_channel: record.force_new_channel,
        mmio_megabytes: place.half_word("mmio_megabytes", record.mmio_megabytes)?,
        mmio_megabytes_optional: place
            .half_word("mmio_megabytes_optional", record.mmio_megabytes_optional)?,
        user_defined: padded(record.user_defined),
    })
}

/// With the zeros at its end. There are not more bytes: the table of fields has seen to that.
fn padded(bytes: &[u8]) -> [u8; USER_DATA_SIZE] {
    let mut all = [0; USER_DATA_SIZE];
    if let Some(room) = all.get_mut(..bytes.len()) {
        room.copy_from_slice(bytes);
    }
    all
}

fn open_state(place: Place, record: &BusChannelRecord<'_>, around: Around) -> Checked<OpenState> {
    let step = record.open_step;
    if !matches!(step, OpenStep::Closing | OpenStep::Reopening) {
        place.absent(
            &[
                ("closing_gpadl", record.closing_gpadl != 0),
                ("closing_accepted", record.closing_accepted),
                ("closing_told", record.closing_told),
            ],
            "open_step",
        )?;
    }
    if !record.closing_told {
        place.absent(
            &[
                ("closing_reply_vp", record.closing_reply_vp != 0),
                ("closing_reply_sint", record.closing_reply_sint != 0),
            ],
            "closing_told",
        )?;
    }
    if !matches!(step, OpenStep::Opening | OpenStep::Open | OpenStep::Reopening) {
        place.absent(
            &[
                ("ring_gpadl", record.ring_gpadl != 0),
                ("downstream_page_offset", record.downstream_page_offset != 0),
                ("interrupts", record.interrupts),
                ("target_vp", record.target_vp != 0),
                ("event_flag", record.event_flag != 0),
                ("connection_id", record.connection_id != 0),
                ("user_data", !record.user_data.is_empty()),
            ],
            "open_step",
        )?;
    }
    if matches!(step, OpenStep::Closed | OpenStep::Closing) {
        place.absent(
            &[("reserved", record.reserved), ("open_id", record.open_id != 0)],
            "open_step",
        )?;
    }
    let kind = open_kind(place, record, around)?;
    Ok(match step {
        // The table of fields lets *unspecified* not through.
        OpenStep::Closed | OpenStep::Unspecified => OpenState::Closed,
        OpenStep::Opening => OpenState::Opening(open(place, record, kind, around)?),
        OpenStep::Open => OpenState::Open(open(place, record, kind, around)?),
        OpenStep::Abandoned => OpenState::Abandoned(kind),
        OpenStep::Closing => OpenState::Closing(closing(place, record, around)?),
        OpenStep::Reopening => OpenState::Reopening(
            closing(place, record, around)?,
            open(place, record, kind, around)?,
        ),
    })
}

fn open_kind(place: Place, record: &BusChannelRecord<'_>, around: Around) -> Checked<OpenKind> {
    let (vp, sint) = (("reply_vp", record.reply_vp), ("reply_sint", record.reply_sint));
    if record.reserved {
        place.absent(&[("open_id", record.open_id != 0)], "reserved")?;
        Ok(OpenKind::Reserved { slot: place.slot(vp, sint, around.vp_count)? })
    } else {
        place.absent(&[(vp.0, vp.1 != 0), (sint.0, sint.1 != 0)], "reserved")?;
        Ok(OpenKind::Ordinary { open_id: record.open_id })
    }
}

fn open(
    place: Place,
    record: &BusChannelRecord<'_>,
    kind: OpenKind,
    around: Around,
) -> Checked<OpenParams> {
    let target_vp = if record.interrupts {
        Some(place.vp("target_vp", record.target_vp, around.vp_count)?)
    } else {
        place.absent(&[("target_vp", record.target_vp != 0)], "interrupts")?;
        None
    };
    let (least, most) = (u64::from(LAST_RESERVED_CONNECTION) + 1, u64::from(CONNECTION_ID_MASK));
    place.range("connection_id", record.connection_id.into(), least, most)?;
    place.range("event_flag", record.event_flag.into(), 1, MAX_CHANNEL_ID.into())?;
    Ok(OpenParams {
        kind,
        ring_gpadl: record.ring_gpadl,
        downstream_page_offset: record.downstream_page_offset,
        target_vp,
        event_flag: place.half_word("event_flag", record.event_flag)?,
        connection_id: record.connection_id,
        user_data: padded(record.user_data),
    })
}

fn closing(place: Place, record: &BusChannelRecord<'_>, around: Around) -> Checked<Closing> {
    let vp = ("closing_reply_vp", record.closing_reply_vp);
    let sint = ("closing_reply_sint", record.closing_reply_sint);
    let reserved_reply = match record.closing_told {
        true => Some(place.slot(vp, sint, around.vp_count)?),
        false => None,
    };
    let (ring_gpadl, accepted) = (record.closing_gpadl, record.closing_accepted);
    Ok(Closing { ring_gpadl, accepted, reserved_reply })
}

fn modifying(
    place: Place,
    record: &BusChannelRecord<'_>,
    around: Around,
) -> Checked<Option<Modifying>> {
    if !record.modifying {
        let fields = [
            ("modifying_serial", record.modifying_serial != 0),
            ("modifying_vp", record.modifying_vp != 0),
            ("modifying_told", record.modifying_told),
        ];
        place.absent(&fields, "modifying")?;
        return Ok(None);
    }
    let serial = place.range("modifying_serial", record.modifying_serial, 1, around.last_serial)?;
    let target_vp = place.vp("modifying_vp", record.modifying_vp, around.vp_count)?;
    Ok(Some(Modifying { serial, target_vp, answered: record.modifying_told }))
}

pub(super) fn hvsock(place: Place, record: &BusHvsockRecord) -> Checked<HvsockRequest> {
    let BusHvsockRecord { id, endpoint_id, service_id, contained, silo_id } = *record;
    if !contained {
        place.absent(&[("silo_id", silo_id != Guid::ZERO)], "contained")?;
    }
    let silo_id = contained.then_some(silo_id);
    Ok(HvsockRequest { id, endpoint_id, service_id, silo_id })
}

pub(super) fn message(
    place: Place,
    record: &BusMessageRecord<'_>,
    vp_count: u32,
) -> Checked<OutgoingMessage> {
    let BusMessageRecord { serial, slot_vp, slot_sint, message, for_reserved } = *record;
    let slot = place.slot(("slot_vp", slot_vp), ("slot_sint", slot_sint), vp_count)?;
    let length = Misfit::Length { found: message.len() as u64 };
    let buffer = MessageBuffer::copy_from(message).map_err(|_| place.wrong("message", length))?;
    Ok(OutgoingMessage { serial, slot, message: buffer, for_reserved })
}
