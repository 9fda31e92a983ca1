//! Packets of a saved state: what is checked of them, and what they become.

use saved_state::Decode as _;
use saved_state::channel::{
    ChannelRecord, Fence as SavedFence, HandedBack, IncomingPacketRecord, OutgoingPacketRecord,
    Place,
};
use vmbus_wire::packet::extension::gpa_direct;

use super::error::{CHANNEL, INCOMING, OUTGOING, RestoreError};
use crate::fenced::Fence;
use crate::lifecycle::Side;
use crate::pool::{Body, External};
use crate::settings::{Limits, Settings};
use crate::waiting::Why;

/// Incoming packets that were checked, until there are bodies for them: their messages, one behind the
/// other.
#[derive(Default)]
pub(crate) struct Incoming {
    bytes: Vec<u8>,
    /// Where each ends, and the chunk that it came in.
    ends: Vec<(usize, u32)>,
}

impl Incoming {
    /// As many bytes are there for it: they are not copied again and again.
    pub(super) fn expect(&mut self, bytes: usize) {
        self.bytes.reserve(bytes);
    }

    pub(super) fn push(&mut self, chunk: u32, message: &[u8]) {
        self.bytes.extend_from_slice(message);
        self.ends.push((self.bytes.len(), chunk));
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// One of them, and its chunk.
    pub(crate) fn get(&self, at: usize) -> Option<(u32, IncomingPacketRecord<'_>)> {
        let &(end, chunk) = self.ends.get(at)?;
        let start = match at.checked_sub(1) {
            Some(before) => self.ends.get(before)?.0,
            None => 0,
        };
        let record = IncomingPacketRecord::decode(self.bytes.get(start..end)?);
        debug_assert!(record.is_ok(), "decoded before");
        Some((chunk, record.ok()?))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, IncomingPacketRecord<'_>)> {
        (0..self.len()).map_while(|at| self.get(at))
    }
}

/// Holds a channel's record against the channel: both must have been set up alike.
pub(super) fn check_channel(
    record: &ChannelRecord,
    settings: &Settings,
    chunk: u32,
) -> Result<(), RestoreError> {
    let side = saved_state::channel::Side::Server as i32;
    let number = |side: i32| u64::from(side.unsigned_abs());
    for (setting, saved, here) in [
        ("side", number(record.side), number(side)),
        (
            "maximum_packet_size",
            record.maximum_packet_size.into(),
            settings.maximum_packet_size.into(),
        ),
        (
            "maximum_external_data",
            record.maximum_external_data.into(),
            settings.external_data_size.into(),
        ),
        (
            "maximum_external_ranges",
            record.maximum_external_ranges.into(),
            settings.external_data_ranges.into(),
        ),
        (
            "maximum_completion_size",
            record.maximum_completion_size.into(),
            settings.completion_size().into(),
        ),
        (
            "maximum_packet_count",
            record.maximum_packet_count.into(),
            settings.maximum_packet_count.into(),
        ),
        (
            "client_context_size",
            record.client_context_size.into(),
            settings.client_context_size.into(),
        ),
        ("pipe", record.pipe.into(), settings.is_pipe().into()),
        ("subchannel_index", record.subchannel_index.into(), settings.subchannel_index.into()),
    ] {
        if saved != here {
            return Err(RestoreError::Setting { chunk, setting, saved, here });
        }
    }
    if !record.open && record.incoming_packets != 0 {
        let (record, field, other) = (CHANNEL, "incoming_packets", "open");
        return Err(RestoreError::Contradiction { chunk, record, field, other });
    }
    for (of, stated, most) in [
        (OUTGOING, record.outgoing_packets, Limits::PACKETS),
        (INCOMING, record.incoming_packets, settings.maximum_packet_count),
    ] {
        if stated > most {
            return Err(RestoreError::Count { chunk, record: of, found: stated, stated, most });
        }
    }
    Ok(())
}

pub(super) fn check_outgoing(
    packet: &OutgoingPacketRecord<'_>,
    channel: &ChannelRecord,
    settings: &Settings,
    chunk: u32,
) -> Result<(), RestoreError> {
    let size = |field, bytes: usize, most: u32| match bytes as u64 {
        bytes if bytes <= u64::from(most) => Ok(()),
        bytes => {
            let (most, step) = (most.into(), 1);
            Err(RestoreError::Size { chunk, record: OUTGOING, field, bytes, most, step })
        }
    };
    // External data is the guest's to donate (D-41).
    size("extension", packet.extension.len(), 0)?;
    match packet.place {
        Place::Queued { message, .. } => {
            let len = u32::try_from(message.len()).unwrap_or(u32::MAX);
            let bytes = vmbus_ring::packet_ring_bytes(0, len);
            size("message", bytes as usize, settings.largest_packet(Side::Server))
        }
        Place::InRing { .. } if !channel.open => {
            let (record, field, other) = (OUTGOING, "place", "open");
            Err(RestoreError::Contradiction { chunk, record, field, other })
        }
        Place::InRing { .. } => Ok(()),
    }
}

/// `words` is scratch space.
pub(super) fn check_incoming(
    packet: &IncomingPacketRecord<'_>,
    settings: &Settings,
    chunk: u32,
    words: &mut Vec<u64>,
) -> Result<(), RestoreError> {
    let size = |field, bytes: usize, most: usize, step: u32| {
        let (bytes, most) = (bytes as u64, most as u64);
        if bytes <= most && bytes.is_multiple_of(step.into()) {
            return Ok(());
        }
        Err(RestoreError::Size { chunk, record: INCOMING, field, bytes, most, step })
    };
    if let SavedFence::Finished { completion } = packet.fence {
        return size("completion", completion.len(), settings.completion_size() as usize, 1);
    }
    let first_time = packet.handed_back != HandedBack::No;
    if first_time && (packet.fence != SavedFence::NeverStarted || !packet.device_state.is_empty()) {
        let (record, field, other) = (INCOMING, "handed_back", "fence");
        return Err(RestoreError::Contradiction { chunk, record, field, other });
    }
    let step = if settings.is_pipe() { 1 } else { 8 };
    size("payload", packet.payload.len(), saved_state::limits::MAX_PACKET_BYTES, step)?;
    let (context, bytes) = (settings.client_context_size, packet.client_context.len() as u64);
    if bytes != u64::from(context) {
        let (field, most, step) = ("client_context", context.into(), context.max(1));
        return Err(RestoreError::Size { chunk, record: INCOMING, field, bytes, most, step });
    }
    size("extension", packet.extension.len(), (settings.external_words() + 1) * 8, 8)?;
    if packet.extension.is_empty() {
        return Ok(());
    }
    words.clear();
    words.extend(packet.extension.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)));
    gpa_direct(words).map(drop).map_err(|why| RestoreError::Extension { chunk, why })
}

/// Makes `body` the packet that was saved, and says why it waits. The packet was checked.
pub(super) fn fill(
    body: &mut Body,
    packet: &IncomingPacketRecord<'_>,
    chunk: u32,
) -> Result<Why, RestoreError> {
    let (id, wants_completion) = (packet.transaction_id, packet.wants_completion);
    let fence = match packet.fence {
        SavedFence::Finished { completion } => {
            body.begin(id, wants_completion, 0);
            body.hold_completion(completion);
            return Ok(Why::Completed);
        }
        SavedFence::NeverStarted => Fence::NeverStarted,
        SavedFence::Cancelled => Fence::Cancelled,
    };
    body.begin(id, wants_completion, packet.payload.len()).copy_from_slice(packet.payload);
    if body.context().len() == packet.client_context.len() {
        body.context().copy_from_slice(packet.client_context);
    }
    if packet.refused_external_bytes != 0 {
        body.external = External::TooMuch { bytes: packet.refused_external_bytes };
    } else if !packet.extension.is_empty() {
        let words = packet.extension.len() / 8;
        let room = body.extension_room(words).unwrap_or_default();
        for (word, bytes) in room.iter_mut().zip(packet.extension.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        body.check_external(words).map_err(|why| RestoreError::Extension { chunk, why })?;
    }
    Ok(match packet.handed_back {
        HandedBack::No => Why::HandedOver { fence, state: packet.device_state.into() },
        HandedBack::AtPassive => Why::HandedBack { at_passive: true, after_memory: false },
        // Asked for anew: whether the memory is there is not known here.
        HandedBack::AfterMemory => Why::HandedBack { at_passive: false, after_memory: false },
    })
}
