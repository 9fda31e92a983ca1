//! Messages about the connection: INITIATE_CONTACT, UNLOAD, MODIFY_CONNECTION, PAUSE, RESUME; and the
//! reset of a guest.

use vmbus_wire::guid::Guid;
use vmbus_wire::message::{
    ConnectionState, HostMessage, InitiateContact, MessageType, ModifyConnection,
    ModifyConnectionResponse,
};
use vmbus_wire::status::NtStatus;

use crate::channel::{Channel, OfferState, OpenKind, OpenState};
use crate::connection::{
    self, Connection, Contact, ContactAnswer, Next, monitor_pages, version_response,
};
use crate::effect::Effect;
use crate::error::Refusal;
use crate::host::Host;
use crate::offer::OfferId;
use crate::outgoing::SlotId;
use crate::shape::GuestShape;

/// How a connection ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Ending {
    /// By UNLOAD: reserved channels stay open.
    Unload,
    /// By a new contact, or with the guest itself.
    Gone,
}

impl Host {
    fn judge(
        &self,
        contact: &InitiateContact,
        client_id: Option<Guid>,
    ) -> Result<Contact, Refusal> {
        connection::judge(contact, client_id, self.config.newest_version, &self.shape)
    }

    /// Whether INITIATE_CONTACT ends the connection that stands.
    pub(crate) fn ends_connection(&self, contact: &InitiateContact) -> bool {
        self.judge(contact, None).is_ok_and(|contact| !contact.foreign)
    }

    pub(crate) fn initiate_contact(
        &mut self,
        contact: &InitiateContact,
        client_id: Option<Guid>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let Contact { slot, answer, foreign, refusal } = self.judge(contact, client_id)?;
        if foreign {
            self.send_to(slot, &version_response(&answer));
        } else {
            self.disconnect(Ending::Gone, Next::VersionResponse { slot, answer }, effects);
        }
        refusal.map_or(Ok(()), Err)
    }

    pub(crate) fn unload(&mut self, effects: &mut Vec<Effect>) -> Result<(), Refusal> {
        let slot = match &self.connection {
            Connection::Connected(established) => {
                established.version.has_unload_complete().then_some(established.slot)
            }
            Connection::Disconnecting { next: Next::UnloadComplete(_) } => {
                return Err(Refusal::UnloadTwice);
            }
            // The second kernel of a crashed guest takes no chances. It gets its answer where it
            // asked to have answers, if it has asked.
            Connection::Disconnecting { next: Next::VersionResponse { slot, .. } } => Some(*slot),
            Connection::Disconnecting { next: Next::Nothing } | Connection::Disconnected => {
                Some(SlotId::DEFAULT)
            }
        };
        self.disconnect(Ending::Unload, Next::UnloadComplete(slot), effects);
        Ok(())
    }

    /// The guest is gone: its machine was reset, or its process has ended. `shape` describes the
    /// machine that the next guest finds.
    pub fn guest_reset(&mut self, shape: GuestShape, effects: &mut Vec<Effect>) {
        self.shape = shape;
        self.disconnect(Ending::Gone, Next::Nothing, effects);
    }

    /// Ends the connection for the guest, tells the devices, and does `next` when they have let go.
    fn disconnect(&mut self, ending: Ending, next: Next, effects: &mut Vec<Effect>) {
        self.outgoing.clear(ending == Ending::Unload);
        self.hvsock.clear();
        let mut kept_rings = Vec::new();
        let offers: Vec<OfferId> = self.channels.iter().map(|(offer, _)| offer).collect();
        for offer in offers {
            kept_rings.extend(self.disconnect_channel(offer, ending, effects));
        }
        self.gpadls.disconnect(&kept_rings);
        self.connection = Connection::Disconnecting { next };
        self.finish_disconnect();
    }

    /// The ring GPADL that stays, with a reserved channel.
    fn disconnect_channel(
        &mut self,
        offer: OfferId,
        ending: Ending,
        effects: &mut Vec<Effect>,
    ) -> Option<(OfferId, u32)> {
        let channel = self.channels.get_mut(offer)?;
        channel.modifying = None;
        let mut kept = None;
        let mut refused = None;
        let reserved = channel.is_reserved();
        channel.open = match std::mem::replace(&mut channel.open, OpenState::Closed) {
            OpenState::Closed | OpenState::Abandoned(_) => OpenState::Closed,
            open @ (OpenState::Opening(_) | OpenState::Open(_))
                if reserved && ending == Ending::Unload =>
            {
                if let OpenState::Opening(params) | OpenState::Open(params) = &open {
                    kept = Some((offer, params.ring_gpadl));
                }
                open
            }
            OpenState::Opening(open) => {
                effects.push(Effect::Close { offer, tell_device: true });
                Channel::begin_close(&open, false)
            }
            OpenState::Open(open) => {
                effects.push(Effect::Close { offer, tell_device: true });
                Channel::begin_close(&open, true)
            }
            OpenState::Closing(closing) => OpenState::Closing(closing),
            OpenState::Reopening(closing, open) => {
                refused = (ending == Ending::Unload).then_some(open.kind);
                OpenState::Closing(closing)
            }
        };
        if let OpenState::Closing(closing) = &mut channel.open
            && ending == Ending::Gone
        {
            closing.reserved_reply = None;
        }
        let channel_id = channel.channel_id;
        let is_closed = channel.open == OpenState::Closed;
        match channel.offer {
            OfferState::Hidden | OfferState::Offered => channel.offer = OfferState::Hidden,
            OfferState::Rescinded | OfferState::Released if is_closed => {
                self.channels.remove(offer);
            }
            OfferState::Rescinded | OfferState::Released => channel.offer = OfferState::Released,
        }
        if let Some(kind @ OpenKind::Reserved { .. }) = refused {
            self.send_open_result(channel_id, kind, NtStatus::CANCELLED);
        }
        kept
    }

    /// Whether a device still has memory of a guest that is disconnecting.
    pub(crate) fn waits_for_devices(&self) -> bool {
        let is_closing =
            |open: &OpenState| matches!(open, OpenState::Closing(_) | OpenState::Reopening(..));
        self.channels.iter().any(|(_, channel)| is_closing(&channel.open))
    }

    /// Goes on when the last device has let go.
    pub(crate) fn finish_disconnect(&mut self) {
        if !matches!(self.connection, Connection::Disconnecting { .. }) || self.waits_for_devices()
        {
            return;
        }
        let ended = std::mem::take(&mut self.connection);
        let Connection::Disconnecting { next } = ended else { return };
        match next {
            Next::Nothing | Next::UnloadComplete(None) => {}
            Next::UnloadComplete(Some(slot)) => self.send_to(slot, &HostMessage::UnloadComplete),
            Next::VersionResponse { slot, answer } => {
                self.send_to(slot, &version_response(&answer));
                if let ContactAnswer::Accepted(established) = answer {
                    self.connection = Connection::Connected(established);
                }
            }
        }
    }

    pub(crate) fn modify_connection(&mut self, message: &ModifyConnection) -> Result<(), Refusal> {
        let pages = monitor_pages(
            MessageType::ModifyConnection,
            message.parent_to_child_monitor_gpa.get(),
            message.child_to_parent_monitor_gpa.get(),
        );
        let state = match &pages {
            Ok(_) => ConnectionState::Successful,
            Err(_) => ConnectionState::UnknownFailure,
        };
        self.send(&HostMessage::ModifyConnectionResponse(ModifyConnectionResponse::new(state)));
        let pages = pages?;
        if let Some(established) = self.connection.established_mut() {
            established.monitor_pages = pages;
        }
        Ok(())
    }

    pub(crate) fn pause(&mut self) -> Result<(), Refusal> {
        if self.outgoing.is_paused() {
            return Err(Refusal::Paused { message: MessageType::Pause, paused: true });
        }
        self.send(&HostMessage::PauseResponse);
        self.outgoing.pause();
        Ok(())
    }

    pub(crate) fn resume(&mut self) -> Result<(), Refusal> {
        if !self.outgoing.is_paused() {
            return Err(Refusal::Paused { message: MessageType::Resume, paused: false });
        }
        self.outgoing.resume();
        Ok(())
    }
}
