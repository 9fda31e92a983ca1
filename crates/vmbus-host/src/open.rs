//! Opening, closing and modifying channels: OPEN_CHANNEL, CLOSE_CHANNEL, MODIFY_CHANNEL, and what
//! devices say to them.
//!
//! Source: vmbus-wire section 3, messages 5 to 7, 22 and 24, "Open" and "Close".

use vmbus_wire::message::{
    CloseReservedResponse, GpadlTorndown, HostMessage, MessageType, ModifyChannel, OpenChannel,
    OpenChannelResult, OpenChannelV2, VP_INDEX_NONE,
};
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::FeatureFlags;

use crate::channel::{Channel, Closing, Modifying, OfferState, OpenKind, OpenParams, OpenState};
use crate::connection::{CONNECTION_ID_MASK, LAST_RESERVED_CONNECTION};
use crate::effect::{Effect, Interrupt, Rings};
use crate::error::Refusal;
use crate::gpadl::GpadlRefusal;
use crate::host::Host;
use crate::limits::MAX_CHANNEL_ID;
use crate::offer::OfferId;
use crate::offers::default_signal_connection;
use crate::outgoing::{SlotId, VMBUS_SINT};
use crate::pages::{Pages, PfnSlice};

/// The signals that a guest has chosen by itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ChosenSignal {
    connection_id: u32,
    event_flag: u16,
}

impl Host {
    /// What a longer OPEN_CHANNEL says of signals, if its words count.
    pub(crate) fn chosen_signal(&self, message: &OpenChannelV2) -> Option<ChosenSignal> {
        let established = self.connection.established()?;
        established.features.contains(FeatureFlags::GUEST_SPECIFIED_SIGNAL_PARAMETERS).then(|| {
            ChosenSignal {
                connection_id: message.connection_id.get(),
                event_flag: message.event_flag.get(),
            }
        })
    }

    pub(crate) fn open_channel(
        &mut self,
        message: &OpenChannel,
        signal: Option<ChosenSignal>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let channel_id = message.channel_id.get();
        let kind = OpenKind::Ordinary { open_id: message.open_id.get() };
        let version = self.connection.established().map(|established| established.version);
        let target_vp = match message.target_vp.get() {
            _ if !version.is_some_and(|version| version.has_channel_target_vp()) => Some(0),
            VP_INDEX_NONE => None,
            vp => Some(vp),
        };
        let signal = signal.unwrap_or(default_signal(channel_id));
        let open = OpenParams {
            kind,
            ring_gpadl: message.ring_gpadl_id.get(),
            downstream_page_offset: message.downstream_page_offset.get(),
            target_vp,
            event_flag: signal.event_flag,
            connection_id: signal.connection_id,
            user_data: message.user_data,
        };
        self.begin_open(MessageType::OpenChannel, channel_id, open, effects)
    }

    /// Opens a channel, now or when its device has let go of the last open; or answers that it
    /// cannot be.
    pub(crate) fn begin_open(
        &mut self,
        message: MessageType,
        channel_id: u32,
        open: OpenParams,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let kind = open.kind;
        let begun = self.try_open(message, channel_id, open, effects);
        if begun.is_err() {
            self.send_open_result(channel_id, kind, NtStatus::INVALID_PARAMETER);
        }
        begun
    }

    fn try_open(
        &mut self,
        message: MessageType,
        channel_id: u32,
        open: OpenParams,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let offer = self.known_channel(message, channel_id)?;
        let Some(channel) = self.channels.get(offer) else { return Ok(()) };
        if channel.offer == OfferState::Rescinded {
            // It has crossed the rescind, which says it all; but a crashed guest reads no rescinds.
            if matches!(open.kind, OpenKind::Reserved { .. }) {
                self.send_open_result(channel_id, open.kind, NtStatus::DEVICE_REMOVED);
            }
            return Ok(());
        }
        if !matches!(channel.open, OpenState::Closed | OpenState::Closing(_)) {
            let state = channel.open.name();
            return Err(Refusal::ChannelState { message, channel_id, state });
        }
        let vp_count = self.shape.vp_count;
        if let Some(vp) = open.target_vp.filter(|vp| *vp >= vp_count) {
            return Err(Refusal::Vp { message, vp, vp_count });
        }
        self.check_signal(channel_id, &open)?;
        let rings = self.rings(offer, channel_id, &open)?;

        let Some(channel) = self.channels.get_mut(offer) else { return Ok(()) };
        channel.open = match std::mem::replace(&mut channel.open, OpenState::Closed) {
            OpenState::Closing(closing) => OpenState::Reopening(closing, open),
            _ => {
                effects.push(Effect::Open { offer, rings: Box::new(rings) });
                OpenState::Opening(open)
            }
        };
        Ok(())
    }

    fn check_signal(&self, channel_id: u32, open: &OpenParams) -> Result<(), Refusal> {
        let OpenParams { connection_id, event_flag, .. } = *open;
        let mut channels = self.channels.iter();
        let taken = channels.any(|(_, channel)| channel.signal_connection() == Some(connection_id));
        let in_range = (LAST_RESERVED_CONNECTION + 1..=CONNECTION_ID_MASK).contains(&connection_id)
            && (1..=MAX_CHANNEL_ID).contains(&event_flag.into());
        if taken || !in_range {
            return Err(Refusal::SignalParameters { channel_id, connection_id, event_flag });
        }
        Ok(())
    }

    /// What the device is given for this open.
    fn rings(&self, offer: OfferId, channel_id: u32, open: &OpenParams) -> Result<Rings, Refusal> {
        let (incoming, outgoing) =
            ring_pfns(channel_id, open, self.gpadls.get(offer, open.ring_gpadl))?;
        Ok(self.rings_in(channel_id, open, incoming, outgoing))
    }

    fn rings_in(
        &self,
        channel_id: u32,
        open: &OpenParams,
        incoming: PfnSlice<'_>,
        outgoing: PfnSlice<'_>,
    ) -> Rings {
        Rings {
            incoming: incoming.to_vec(),
            outgoing: outgoing.to_vec(),
            interrupt: self.interrupt(channel_id, open.target_vp, open.event_flag),
            connection_id: open.connection_id,
            user_data: open.user_data,
        }
    }

    /// The pages of the rings of an open that the device was told of. The guest may be taking their GPADL
    /// back already.
    pub(crate) fn standing_ring_pfns(
        &self,
        offer: OfferId,
        channel_id: u32,
        open: &OpenParams,
    ) -> Result<(PfnSlice<'_>, PfnSlice<'_>), Refusal> {
        ring_pfns(channel_id, open, self.gpadls.ring_pages(offer, open.ring_gpadl))
    }

    /// What the device was given for this open.
    pub(crate) fn standing_rings(
        &self,
        offer: OfferId,
        channel_id: u32,
        open: &OpenParams,
    ) -> Result<Rings, Refusal> {
        let (incoming, outgoing) = self.standing_ring_pfns(offer, channel_id, open)?;
        Ok(self.rings_in(channel_id, open, incoming, outgoing))
    }

    pub(crate) fn interrupt(
        &self,
        channel_id: u32,
        target_vp: Option<u32>,
        flag: u16,
    ) -> Interrupt {
        let Some(vp) = target_vp else { return Interrupt::None };
        let sint = VMBUS_SINT;
        let page = self.connection.established().and_then(|established| established.interrupt_page);
        match (page, u16::try_from(channel_id)) {
            (Some(gpa), Ok(bit)) => Interrupt::SharedPage { gpa, bit, vp, sint },
            _ => Interrupt::EventFlag { vp, sint, flag },
        }
    }

    /// A device, or whoever prepares the rings for it, answers [`Effect::Open`]. After a failure the
    /// device has let go of everything, and the channel can be opened again.
    ///
    /// It answers [`Effect::Resume`] as well: the guest knows that the channel is open, so that a success
    /// tells it nothing; after a failure the channel is as after [`Host::closed`].
    pub fn open_result(&mut self, offer: OfferId, status: NtStatus, effects: &mut Vec<Effect>) {
        let Some(channel) = self.channels.get_mut(offer) else { return };
        let channel_id = channel.channel_id;
        match std::mem::replace(&mut channel.open, OpenState::Closed) {
            OpenState::Opening(open) if status.is_success() => {
                let kind = open.kind;
                channel.open = OpenState::Open(open);
                self.send_open_result(channel_id, kind, NtStatus::SUCCESS);
            }
            OpenState::Opening(open) => {
                effects.push(Effect::Close { offer, tell_device: false });
                self.device_let_go(offer);
                self.send_open_result(channel_id, open.kind, status);
            }
            OpenState::Open(open) => {
                channel.open = OpenState::Open(open);
                if !status.is_success() {
                    self.closed(offer, effects);
                }
            }
            // The guest has not waited for the answer.
            mut other => {
                let (OpenState::Closing(closing) | OpenState::Reopening(closing, _)) = &mut other
                else {
                    channel.open = other;
                    return;
                };
                let has_nothing = !closing.accepted && !status.is_success();
                closing.accepted |= status.is_success();
                channel.open = other;
                if has_nothing {
                    self.closed(offer, effects);
                }
            }
        }
    }

    /// A device has let go of everything that came with the last [`Effect::Open`].
    pub fn closed(&mut self, offer: OfferId, effects: &mut Vec<Effect>) {
        let Some(channel) = self.channels.get_mut(offer) else { return };
        let channel_id = channel.channel_id;
        match std::mem::replace(&mut channel.open, OpenState::Closed) {
            OpenState::Closed => {}
            OpenState::Abandoned(kind) => channel.open = OpenState::Abandoned(kind),
            OpenState::Opening(open) => {
                effects.push(Effect::Close { offer, tell_device: false });
                self.device_let_go(offer);
                self.send_open_result(channel_id, open.kind, NtStatus::DEVICE_REMOVED);
            }
            OpenState::Open(open) => {
                // A reserved channel of a guest that has unloaded is closed once and for all.
                if channel.offer == OfferState::Offered {
                    channel.open = OpenState::Abandoned(open.kind);
                }
                effects.push(Effect::Close { offer, tell_device: false });
                self.device_let_go(offer);
            }
            OpenState::Closing(closing) => self.finish_close(offer, channel_id, closing),
            OpenState::Reopening(closing, open) => {
                self.finish_close(offer, channel_id, closing);
                self.reopen(offer, channel_id, open, effects);
            }
        }
    }

    fn finish_close(&mut self, offer: OfferId, channel_id: u32, closing: Closing) {
        self.device_let_go(offer);
        if let Some(slot) = closing.reserved_reply {
            let response = CloseReservedResponse { channel_id: channel_id.into() };
            self.send_reserved(slot, &HostMessage::CloseReservedResponse(response));
        }
        let released = |offer: &OfferState| *offer == OfferState::Released;
        if self.channels.get(offer).map(|channel| channel.offer).as_ref().is_some_and(released) {
            self.remove(offer);
        }
        self.finish_disconnect();
    }

    /// The open that waited for the device is next.
    fn reopen(
        &mut self,
        offer: OfferId,
        channel_id: u32,
        open: OpenParams,
        effects: &mut Vec<Effect>,
    ) {
        match self.rings(offer, channel_id, &open) {
            Ok(rings) => {
                effects.push(Effect::Open { offer, rings: Box::new(rings) });
                if let Some(channel) = self.channels.get_mut(offer) {
                    channel.open = OpenState::Opening(open);
                }
            }
            Err(_) => self.send_open_result(channel_id, open.kind, NtStatus::UNSUCCESSFUL),
        }
    }

    /// Answers the teardowns that waited for the device.
    fn device_let_go(&mut self, offer: OfferId) {
        for gpadl_id in self.gpadls.device_let_go(offer) {
            let torndown = GpadlTorndown { gpadl_id: gpadl_id.into() };
            self.send(&HostMessage::GpadlTorndown(torndown));
        }
    }

    pub(crate) fn close_channel(
        &mut self,
        channel_id: u32,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        const MESSAGE: MessageType = MessageType::CloseChannel;
        let offer = self.known_channel(MESSAGE, channel_id)?;
        let Some(channel) = self.channels.get_mut(offer) else { return Ok(()) };
        if channel.offer == OfferState::Rescinded {
            return Ok(()); // the rescind has closed it
        }
        match &channel.open {
            OpenState::Open(open @ OpenParams { kind: OpenKind::Ordinary { .. }, .. }) => {
                channel.open = Channel::begin_close(open, true);
                effects.push(Effect::Close { offer, tell_device: true });
                Ok(())
            }
            OpenState::Abandoned(OpenKind::Ordinary { .. }) => {
                channel.open = OpenState::Closed;
                Ok(())
            }
            open => {
                let state = if channel.is_reserved() { "reserved" } else { open.name() };
                Err(Refusal::ChannelState { message: MESSAGE, channel_id, state })
            }
        }
    }

    pub(crate) fn modify_channel(
        &mut self,
        message: &ModifyChannel,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        const MESSAGE: MessageType = MessageType::ModifyChannel;
        let channel_id = message.channel_id.get();
        let version = self.connection.established().map(|established| established.version);
        let answered = version.is_some_and(|version| version.has_modify_channel_response());
        let modified = self.try_modify(MESSAGE, message, answered, effects);
        // The second of two requests is not answered: the first one's answer is on its way.
        let is_second = matches!(modified, Err(Refusal::ModifyTwice { .. }));
        if answered && modified != Ok(true) && !is_second {
            self.send_modify_response(channel_id, NtStatus::INVALID_PARAMETER);
        }
        modified.map(|_| ())
    }

    /// Whether the change is under way; not, if it has crossed a rescind.
    fn try_modify(
        &mut self,
        message: MessageType,
        modify: &ModifyChannel,
        answered: bool,
        effects: &mut Vec<Effect>,
    ) -> Result<bool, Refusal> {
        let channel_id = modify.channel_id.get();
        let vp = modify.target_vp.get();
        let vp_count = self.shape.vp_count;
        let offer = self.known_channel(message, channel_id)?;
        let Some(channel) = self.channels.get(offer) else { return Ok(false) };
        if channel.offer == OfferState::Rescinded {
            return Ok(false);
        }
        if channel.modifying.is_some_and(|modifying| modifying.answered) {
            return Err(Refusal::ModifyTwice { channel_id });
        }
        let OpenState::Open(OpenParams { kind: OpenKind::Ordinary { .. }, event_flag, .. }) =
            &channel.open
        else {
            let state = if channel.is_reserved() { "reserved" } else { channel.open.name() };
            return Err(Refusal::ChannelState { message, channel_id, state });
        };
        // No VP has the index that means "no interrupts", which is not allowed here.
        if vp >= vp_count {
            return Err(Refusal::Vp { message, vp, vp_count });
        }
        let interrupt = self.interrupt(channel_id, Some(vp), *event_flag);
        let serial = self.next_serial();
        effects.push(Effect::Retarget { offer, interrupt, serial });
        if let Some(channel) = self.channels.get_mut(offer) {
            channel.modifying = Some(Modifying { serial, target_vp: vp, answered });
        }
        Ok(true)
    }

    /// Answers [`Effect::Retarget`]: no further interrupt goes where they went before; or, after a
    /// failure, they still do.
    pub fn retargeted(&mut self, offer: OfferId, serial: u64, status: NtStatus) {
        let Some(channel) = self.channels.get_mut(offer) else { return };
        let Some(modifying) = channel.modifying.take_if(|modify| modify.serial == serial) else {
            return;
        };
        if status.is_success()
            && let OpenState::Open(open) = &mut channel.open
        {
            open.target_vp = Some(modifying.target_vp);
        }
        let channel_id = channel.channel_id;
        if modifying.answered {
            self.send_modify_response(channel_id, status);
        }
    }

    pub(crate) fn send_open_result(&mut self, channel_id: u32, kind: OpenKind, status: NtStatus) {
        let result = |open_id| {
            HostMessage::OpenChannelResult(OpenChannelResult::new(channel_id, open_id, status))
        };
        match kind {
            OpenKind::Ordinary { open_id } => self.send(&result(open_id)),
            OpenKind::Reserved { slot } => self.send_reserved(slot, &result(0)),
        }
    }
}

pub(crate) fn default_signal(channel_id: u32) -> ChosenSignal {
    ChosenSignal {
        connection_id: default_signal_connection(channel_id),
        event_flag: default_event_flag(channel_id),
    }
}

/// The event flag of a channel whose guest names none.
pub(crate) fn default_event_flag(channel_id: u32) -> u16 {
    u16::try_from(channel_id).unwrap_or(0) // 0 is refused
}

impl OpenParams {
    /// Of a reserved channel, which polls.
    pub(crate) fn reserved(
        channel_id: u32,
        slot: SlotId,
        ring_gpadl: u32,
        downstream_page_offset: u32,
    ) -> Self {
        let signal = default_signal(channel_id);
        Self {
            kind: OpenKind::Reserved { slot },
            ring_gpadl,
            downstream_page_offset,
            target_vp: None,
            event_flag: signal.event_flag,
            connection_id: signal.connection_id,
            user_data: [0; kmcl::bus::USER_DATA_SIZE],
        }
    }
}

fn ring_pfns<'a>(
    channel_id: u32,
    open: &OpenParams,
    pages: Result<&'a Pages, GpadlRefusal>,
) -> Result<(PfnSlice<'a>, PfnSlice<'a>), Refusal> {
    let gpadl = open.ring_gpadl;
    let refuse = |reason| Refusal::Ring { channel_id, gpadl, reason };
    let pages = pages.map_err(|reason| refuse(reason.into()))?;
    pages.rings(open.downstream_page_offset).map_err(refuse)
}
