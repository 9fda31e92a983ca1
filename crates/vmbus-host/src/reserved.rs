//! Reserved channels: a Windows guest that crashes opens one to write its dump, polls it, and closes
//! it, perhaps after it has unloaded.
//!
//! Source: vmbus-wire section 3, messages 18 to 20.

use vmbus_wire::message::{
    CloseReservedChannel, CloseReservedResponse, HostMessage, MessageType, OpenReservedChannel,
};

use crate::channel::{Closing, OfferState, OpenKind, OpenParams, OpenState};
use crate::effect::Effect;
use crate::error::Refusal;
use crate::host::Host;
use crate::limits::SINT_COUNT;
use crate::outgoing::SlotId;

impl Host {
    pub(crate) fn open_reserved_channel(
        &mut self,
        message: &OpenReservedChannel,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        const MESSAGE: MessageType = MessageType::OpenReservedChannel;
        let slot = self.slot(MESSAGE, message.target_vp.get(), message.target_sint.get())?;
        let channel_id = message.channel_id.get();
        let (gpadl, offset) = (message.ring_gpadl_id.get(), message.downstream_page_offset.get());
        let open = OpenParams::reserved(channel_id, slot, gpadl, offset);
        self.begin_open(MESSAGE, channel_id, open, effects)
    }

    pub(crate) fn close_reserved_channel(
        &mut self,
        message: &CloseReservedChannel,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        const MESSAGE: MessageType = MessageType::CloseReservedChannel;
        let slot = self.slot(MESSAGE, message.target_vp.get(), message.target_sint.get())?;
        let channel_id = message.channel_id.get();
        // The guest may have unloaded, and remembers the id all the same.
        let unknown = Refusal::UnknownChannel { message: MESSAGE, channel_id };
        let offer = self.channels.by_channel_id(channel_id).ok_or(unknown)?;
        let channel = self.channels.get_mut(offer).ok_or(unknown)?;
        match &channel.open {
            OpenState::Open(OpenParams { kind: OpenKind::Reserved { .. }, ring_gpadl, .. }) => {
                let (ring_gpadl, reserved_reply) = (*ring_gpadl, Some(slot));
                channel.open =
                    OpenState::Closing(Closing { ring_gpadl, accepted: true, reserved_reply });
                effects.push(Effect::Close { offer, tell_device: true });
                Ok(())
            }
            OpenState::Abandoned(OpenKind::Reserved { .. }) => {
                channel.open = OpenState::Closed;
                self.send_closed(slot, channel_id);
                Ok(())
            }
            // It has crossed the rescind, and the guest waits to hear that the device has let go.
            OpenState::Closing(Closing { ring_gpadl, accepted, reserved_reply: None })
                if channel.offer == OfferState::Rescinded =>
            {
                let (ring_gpadl, accepted) = (*ring_gpadl, *accepted);
                let reserved_reply = Some(slot);
                channel.open = OpenState::Closing(Closing { ring_gpadl, accepted, reserved_reply });
                Ok(())
            }
            // Its device has let go, or it never was open: it is closed, and the guest waits to hear
            // that.
            OpenState::Closed if channel.offer != OfferState::Released => {
                self.send_closed(slot, channel_id);
                Ok(())
            }
            open => {
                let state = open.name();
                Err(Refusal::ChannelState { message: MESSAGE, channel_id, state })
            }
        }
    }

    fn send_closed(&mut self, slot: SlotId, channel_id: u32) {
        let response = CloseReservedResponse { channel_id: channel_id.into() };
        self.send_reserved(slot, &HostMessage::CloseReservedResponse(response));
    }

    /// The message slot that a guest names in a message.
    fn slot(&self, message: MessageType, vp: u32, sint: u32) -> Result<SlotId, Refusal> {
        let vp_count = self.shape.vp_count;
        if vp >= vp_count {
            return Err(Refusal::Vp { message, vp, vp_count });
        }
        match u8::try_from(sint) {
            Ok(sint) if sint < SINT_COUNT => Ok(SlotId { vp, sint }),
            _ => Err(Refusal::Sint { message, sint }),
        }
    }
}
