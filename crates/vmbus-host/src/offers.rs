//! Offering channels to the guest, and withdrawing them: REQUEST_OFFERS, REL_ID_RELEASED, and what
//! devices do.
//!
//! Source: vmbus-wire section 3, messages 1 to 4 and 13, "Connect" and "Rescind".

use vmbus_wire::message::{
    GpadlCreated, HostMessage, MessageType, ModifyChannelResponse, OfferChannel,
    RescindChannelOffer,
};
use vmbus_wire::offer::OfferFlags;
use vmbus_wire::status::NtStatus;
use zerocopy::little_endian::{U16, U32};

use crate::channel::{Channel, OfferState, OpenState};
use crate::effect::Effect;
use crate::error::Refusal;
use crate::host::Host;
use crate::offer::{OfferError, OfferId, OfferKey, OfferParams};
use crate::outgoing::VMBUS_SINT;

/// The connection by which the guest signals a channel, unless it names one itself: apart from those
/// with a meaning of their own, and never that of two channels.
pub(crate) fn default_signal_connection(channel_id: u32) -> u32 {
    channel_id | u32::from(VMBUS_SINT) << 12
}

impl Host {
    /// A device offers a channel. The guest is told at once, if it has asked for offers.
    ///
    /// # Errors
    /// [`OfferError::Clash`], [`OfferError::TooManyChannels`]; nothing has changed then.
    pub fn offer(&mut self, params: OfferParams) -> Result<OfferId, OfferError> {
        let offer = self.channels.add(params)?;
        self.show(offer);
        Ok(offer)
    }

    pub(crate) fn request_offers(&mut self) -> Result<(), Refusal> {
        let Some(established) = self.connection.established_mut() else { return Ok(()) };
        if established.offers_requested {
            return Err(Refusal::OffersRequestedTwice);
        }
        established.offers_requested = true;
        for offer in self.channels.in_offer_order() {
            self.show(offer);
        }
        self.send(&HostMessage::AllOffersDelivered);
        Ok(())
    }

    /// Tells the guest of an offer, if it is to know of it and does not.
    fn show(&mut self, offer: OfferId) {
        let Some(established) = self.connection.established() else { return };
        let Some(channel) = self.channels.get(offer) else { return };
        // A guest discards an offer whose name it knows. So the name must be free first.
        let wanted = established.offers_requested
            && channel.offer == OfferState::Hidden
            && channel.params.suits(established.version)
            && self.channels.rescinded(channel.params.key).is_none();
        if !wanted {
            return;
        }
        let message = offer_message(channel);
        if let Some(channel) = self.channels.get_mut(offer) {
            channel.offer = OfferState::Offered;
        }
        self.send(&HostMessage::OfferChannel(message));
    }

    fn show_key(&mut self, key: OfferKey) {
        if let Some(offer) = self.channels.standing(key) {
            self.show(offer);
        }
    }

    /// A device withdraws its offer. The guest is told by a rescind; what it waits for is answered
    /// before. If the device holds the channel open, it still says [`Host::closed`] when it has let
    /// go. Does nothing the second time.
    pub fn revoke(&mut self, offer: OfferId, effects: &mut Vec<Effect>) {
        let Some(channel) = self.channels.get_mut(offer) else { return };
        if matches!(channel.offer, OfferState::Rescinded | OfferState::Released) {
            return;
        }
        let channel_id = channel.channel_id;
        let mut cancelled = None;
        channel.open = match std::mem::replace(&mut channel.open, OpenState::Closed) {
            OpenState::Closed | OpenState::Abandoned(_) => OpenState::Closed,
            OpenState::Opening(open) => {
                cancelled = Some(open.kind);
                effects.push(Effect::Close { offer, tell_device: false });
                Channel::begin_close(&open, false)
            }
            OpenState::Open(open) => {
                effects.push(Effect::Close { offer, tell_device: false });
                Channel::begin_close(&open, true)
            }
            OpenState::Closing(closing) => OpenState::Closing(closing),
            OpenState::Reopening(closing, open) => {
                cancelled = Some(open.kind);
                OpenState::Closing(closing)
            }
        };
        let is_closed = channel.open == OpenState::Closed;
        let modifying = channel.modifying.take();
        let was_offered = channel.offer == OfferState::Offered;
        channel.offer = if was_offered { OfferState::Rescinded } else { OfferState::Released };

        if let Some(kind) = cancelled {
            self.send_open_result(channel_id, kind, NtStatus::DEVICE_REMOVED);
        }
        if was_offered {
            if modifying.is_some_and(|modify| modify.answered) {
                self.send_modify_response(channel_id, NtStatus::DEVICE_REMOVED);
            }
            for gpadl in self.gpadls.drop_incomplete(offer) {
                let failed = GpadlCreated::new(channel_id, gpadl, NtStatus::DEVICE_REMOVED);
                self.send(&HostMessage::GpadlCreated(failed));
            }
            let channel_id = channel_id.into();
            self.send(&HostMessage::RescindChannelOffer(RescindChannelOffer { channel_id }));
        } else if is_closed {
            self.remove(offer);
        }
    }

    pub(crate) fn release_channel_id(&mut self, channel_id: u32) -> Result<(), Refusal> {
        const MESSAGE: MessageType = MessageType::RelIdReleased;
        let offer = self.known_channel(MESSAGE, channel_id)?;
        let Some(channel) = self.channels.get_mut(offer) else { return Ok(()) };
        if channel.offer != OfferState::Rescinded {
            return Err(Refusal::ChannelState {
                message: MESSAGE,
                channel_id,
                state: "not rescinded",
            });
        }
        let key = channel.params.key;
        channel.offer = OfferState::Released;
        if channel.open == OpenState::Closed {
            self.remove(offer);
        }
        self.show_key(key);
        Ok(())
    }

    pub(crate) fn remove(&mut self, offer: OfferId) {
        self.gpadls.remove_channel(offer);
        self.channels.remove(offer);
    }

    /// The channel that the guest means by an id: one of which it was told, and that it has not
    /// released.
    pub(crate) fn known_channel(
        &self,
        message: MessageType,
        channel_id: u32,
    ) -> Result<OfferId, Refusal> {
        let known = |offer: &OfferId| {
            let channel = self.channels.get(*offer);
            channel.is_some_and(|channel| {
                matches!(channel.offer, OfferState::Offered | OfferState::Rescinded)
            })
        };
        let offer = self.channels.by_channel_id(channel_id).filter(known);
        offer.ok_or(Refusal::UnknownChannel { message, channel_id })
    }

    pub(crate) fn send_modify_response(&mut self, channel_id: u32, status: NtStatus) {
        let response = ModifyChannelResponse::new(channel_id, status);
        self.send(&HostMessage::ModifyChannelResponse(response));
    }
}

fn offer_message(channel: &Channel) -> OfferChannel {
    let params = &channel.params;
    let mut flags = OfferFlags::empty();
    flags.set(OfferFlags::ENUMERATE_DEVICE_INTERFACE, params.enumerate_device_interface);
    flags.set(OfferFlags::NAMED_PIPE_MODE, params.pipe);
    flags.set(OfferFlags::TLNPI_PROVIDER, params.tlnpi_provider);
    OfferChannel {
        interface_id: params.key.interface_type,
        instance_id: params.key.interface_instance,
        reserved: [0; 16],
        flags: flags.bits().into(),
        mmio_megabytes: params.mmio_megabytes.into(),
        user_defined: params.user_defined,
        subchannel_index: params.key.subchannel_index.into(),
        mmio_megabytes_optional: params.mmio_megabytes_optional.into(),
        channel_id: U32::new(channel.channel_id),
        monitor_id: OfferChannel::NO_MONITOR,
        monitor_allocated: 0,
        // Under every version: one that does not have these two fields does not read them, and some
        // firmware speaks an old version and reads them all the same.
        is_dedicated_interrupt: U16::new(1),
        connection_id: default_signal_connection(channel.channel_id).into(),
    }
}
