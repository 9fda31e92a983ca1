//! A packet from the peer, in the hands of the device.

use std::ops::Range;

use vmbus_wire::ranges::GpaRanges;

use crate::channel::Channel;
use crate::error::Error;
use crate::external::ExternalData;
use crate::flags::ExternalDataFlags;
use crate::pool::{Body, External};
use crate::stage;
use crate::waiting::{Waiting, Why};

/// What the thread that delivers a packet may do. KMCL's two interrupt levels, outside Windows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Level {
    /// PASSIVE_LEVEL: it may sleep.
    Passive,
    /// DISPATCH_LEVEL: it must not sleep.
    Dispatch,
}

/// One incoming packet, from its delivery to its completion. The payload is a private copy that the
/// peer cannot change; external data is memory that it can.
///
/// Dropping a packet that was not completed fails it ([`Self::fail`]) and says so in the log.
///
/// Source: VMBPACKETCOMPLETION.
pub struct IncomingPacket {
    /// Gone once the packet is over: only a packet that still has it is failed when dropped. Two words, so
    /// that a packet travels in registers.
    held: Option<Held>,
}

struct Held {
    body: Box<Body>,
    channel: Channel,
}

impl IncomingPacket {
    #[inline]
    pub(crate) fn new(mut body: Box<Body>, channel: Channel, level: Level) -> Self {
        body.level = level;
        Self { held: Some(Held { body, channel }) }
    }

    /// The message, without the bus's headers. Its length is a multiple of 8 (the ring keeps no
    /// other), except on a pipe, where it is exact.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.held.as_ref().map_or(&[], |held| held.body.payload())
    }

    /// The peer's id of the transaction: any 64 bits, not necessarily unique.
    #[must_use]
    pub fn transaction_id(&self) -> u64 {
        self.held.as_ref().map_or(0, |held| held.body.transaction_id)
    }

    /// Whether the peer waits for a completion.
    #[must_use]
    pub fn wants_completion(&self) -> bool {
        self.held.as_ref().is_some_and(|held| held.body.wants_completion)
    }

    /// Whether the packet refers to external data
    /// (`VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA`).
    #[must_use]
    pub fn has_external_data(&self) -> bool {
        self.held.as_ref().is_some_and(|held| held.body.external != External::None)
    }

    /// What the thread that delivers the packet may do.
    #[must_use]
    pub fn level(&self) -> Level {
        self.held.as_ref().map_or(Level::Dispatch, |held| held.body.level)
    }

    /// Most bytes of its completion: [`Channel::init_set_maximum_completion_size`], or the packet size.
    #[inline]
    #[must_use]
    pub fn completion_limit(&self) -> usize {
        self.held.as_ref().map_or(0, |held| held.body.completion_limit())
    }

    /// The driver's own area on the packet, zeroed at delivery; its size is that of
    /// [`Channel::init_set_client_context_size`] (D-62).
    ///
    /// Source: VmbChannelPacketGetClientContext.
    pub fn client_context(&mut self) -> &mut [u8] {
        self.held.as_mut().map_or(&mut [], |held| held.body.context())
    }

    /// The guest memory that belongs to the transaction. It stays valid until the packet is
    /// completed, and a second call gives the same (D-43).
    ///
    /// # Errors
    /// [`Error::Argument`] 1 without external data (D-43), 2 for undefined flags; [`Error::TooMuchExternalData`] beyond what
    /// the channel was set up for (D-40); [`Error::NotMemory`] for pages that are not RAM;
    /// [`Error::Pending`] while memory is brought in: call [`Self::redeliver`] then.
    ///
    /// Source: VmbChannelPacketGetExternalData.
    #[inline]
    pub fn external_data(&self, flags: ExternalDataFlags) -> Result<ExternalData<'_>, Error> {
        let no_data = Error::Argument { position: 1, name: "PacketCompletionContext", value: 0 };
        let Held { body, channel } = self.held.as_ref().ok_or(no_data)?;
        match body.external {
            External::Ranges { .. } => {}
            External::None => return Err(no_data),
            External::TooMuch { bytes } => {
                return Err(Error::TooMuchExternalData { bytes, limit: body.external_limit() });
            }
            External::NotMemory { gpa, len } => return Err(Error::NotMemory { gpa, len }),
        }
        if !ExternalDataFlags::all().contains(flags) {
            let value = u64::from(flags.bits());
            return Err(Error::Argument { position: 2, name: "Flags", value });
        }
        let ranges = body.ranges().ok_or(no_data)?;
        let data = ExternalData::new(body.memory(), ranges, flags);
        match body.residency() {
            Some(residency) if !data.ensure_resident(residency, channel) => Err(Error::Pending),
            _ => Ok(data),
        }
    }

    /// The ranges that [`Self::external_data`] gives, for a device that wants no more than the page
    /// frame numbers; `None` wherever that one fails, and where it has to look whether the memory is
    /// there.
    ///
    /// Source: VmbChannelPacketGetExternalData.
    #[inline]
    #[must_use]
    pub fn resident_ranges(&self) -> Option<GpaRanges<'_>> {
        let body = &self.held.as_ref()?.body;
        if body.residency().is_some() { None } else { body.ranges() }
    }

    /// Completes the packet: `payload` goes to the peer if it asked for a completion, and is ignored
    /// otherwise (D-47). More than [`Channel::init_set_maximum_completion_size`] is a driver's bug:
    /// asserted in debug builds, clipped otherwise.
    ///
    /// Any thread, any order. Never waits: room in the ring was reserved before the delivery. While the
    /// channel is frozen the completion is held: it leaves when the channel thaws, or where it was
    /// restored.
    ///
    /// Source: VmbChannelPacketComplete.
    #[inline]
    pub fn complete(self, payload: &[u8]) {
        let Some((body, channel)) = self.into_parts() else { return };
        if let Err((body, channel)) = stage::complete(body, channel, payload) {
            channel.complete(body, payload);
        }
    }

    /// As [`Self::complete`], with a part of [`Self::payload`], which is then not copied. A part that is not
    /// within it is empty.
    ///
    /// Source: VmbChannelPacketComplete.
    #[inline]
    pub fn complete_with_own(self, part: Range<usize>) {
        let Some((mut body, channel)) = self.into_parts() else { return };
        body.keep_part(part);
        if let Err((body, channel)) = stage::complete_kept(body, channel) {
            channel.complete_kept(body);
        }
    }

    /// Gives the packet up as malformed: no completion is sent, and the channel delivers nothing more
    /// until it is closed and opened again (D-36).
    ///
    /// Source: VmbChannelPacketFail.
    pub fn fail(mut self) {
        self.give_up();
    }

    /// Hands the packet back, to be delivered again by a thread that may sleep. It keeps its place:
    /// later packets wait (D-42). Only inside the packet callback; elsewhere the packet is failed.
    ///
    /// Source: VmbChannelPacketDeferToPassive.
    pub fn defer_to_passive(self) {
        self.hand_back(true, false);
    }

    /// Hands the packet back after [`Error::Pending`], to be delivered again once the memory is
    /// there. It keeps its place. Only inside the packet callback.
    ///
    /// Source: VmbChannelPacketGetExternalData, STATUS_PENDING.
    pub fn redeliver(self) {
        self.hand_back(false, true);
    }

    fn hand_back(mut self, at_passive: bool, after_memory: bool) {
        let Some(Held { body, channel }) = self.held.take() else { return };
        if channel.in_packet_callback() {
            channel.hand_back(Waiting { body, why: Why::HandedBack { at_passive, after_memory } });
        } else {
            channel.refuse_back(body);
        }
    }

    fn give_up(&mut self) {
        if let Some(Held { body, channel }) = self.held.take() {
            channel.fail(body);
        }
    }

    #[inline]
    pub(crate) fn into_parts(mut self) -> Option<(Box<Body>, Channel)> {
        let held = self.held.take();
        std::mem::forget(self); // it is over: nothing is left to look at
        held.map(|Held { body, channel }| (body, channel))
    }
}

impl Drop for IncomingPacket {
    fn drop(&mut self) {
        if self.held.is_some() {
            tracing::error!(
                transaction_id = self.transaction_id(),
                "incoming packet dropped without a completion: failed"
            );
            self.give_up();
        }
    }
}

impl std::fmt::Debug for IncomingPacket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IncomingPacket")
            .field("transaction_id", &self.transaction_id())
            .field("payload_len", &self.payload().len())
            .field("wants_completion", &self.wants_completion())
            .field("has_external_data", &self.has_external_data())
            .finish_non_exhaustive()
    }
}
