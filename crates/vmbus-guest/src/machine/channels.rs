//! Offers and what becomes of them: bound, opened, closed, withdrawn, released.

use vmbus_wire::guid::Guid;
use vmbus_wire::message::{
    CloseChannel, GuestMessage, MAX_CHANNEL_ID, MessageType, OfferChannel, OpenChannel,
    OpenChannelV2, RelIdReleased,
};
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::FeatureFlags;

use super::Guest;
use super::connection::Connection;
use super::dispatch::failure;
use crate::channel::{Channel, ClientState, OpenParameters, Phase};
use crate::effect::{ClientEvent, ClientId, ConnectionEvent};
use crate::error::HostError;
use crate::offer::OfferedChannel;
use crate::post::Tag;

impl Guest {
    /// OFFER_CHANNEL.
    pub(super) fn offered(&mut self, message: &OfferChannel) -> Result<(), HostError> {
        let Connection::Connected(session) = &mut self.connection else {
            return Err(self.unexpected(MessageType::OfferChannel));
        };
        let offer = OfferedChannel::new(message, session.version);
        let channel_id = offer.channel_id;
        if !(1..=MAX_CHANNEL_ID).contains(&channel_id) {
            return Err(HostError::ChannelId { channel_id });
        }
        if self.channels.contains_key(&channel_id) {
            return Err(HostError::ChannelInUse { channel_id });
        }
        // A withdrawn offer may be made again under another number before it is released.
        let standing = self.channels.values().filter(|channel| !channel.rescinded);
        if let Some(twin) = standing.map(|c| &c.offer).find(|other| other.is_same_instance(&offer))
        {
            return Err(HostError::SameInstance {
                channel_id,
                existing: twin.channel_id,
                instance: offer.interface_instance,
                subchannel_index: offer.subchannel_index,
            });
        }
        // An hvsock request is answered by the offer of a channel for the pair it named.
        let pair = (offer.interface_instance, offer.interface_type);
        session.hvsock.retain(|pending| *pending != pair);
        self.channels.insert(channel_id, Channel::new(offer));
        self.announce(ConnectionEvent::ChannelOffered { channel_id });
        self.match_channel(channel_id);
        Ok(())
    }

    /// RESCIND_CHANNEL_OFFER.
    pub(super) fn rescind(&mut self, channel_id: u32) -> Result<(), HostError> {
        let kind = MessageType::RescindChannelOffer;
        let channel = self.channel_named(kind, channel_id)?;
        if channel.rescinded {
            return Err(HostError::ChannelState { kind, channel_id, state: channel.state() });
        }
        channel.rescinded = true;
        let client = channel.client;
        let modifying = std::mem::take(&mut channel.modifying);
        if modifying {
            self.outbox.withdraw(Tag::Modify(channel_id));
            self.modified(channel_id, NtStatus::DEVICE_REMOVED);
        }
        self.give_up_unanswered(channel_id);
        self.give_up_opening(channel_id);
        if let Some(client) = client {
            self.tell(client, ClientEvent::Rescinded);
        }
        self.settle(channel_id);
        Ok(())
    }

    /// The host ignores an OPEN that crosses its rescind, so nobody waits for the answer.
    fn give_up_opening(&mut self, channel_id: u32) {
        let Some(channel) = self.channels.get_mut(&channel_id) else { return };
        let Phase::Opening { gpadl, given_up, .. } = channel.phase else { return };
        channel.phase = Phase::Open { gpadl };
        match (given_up, channel.client) {
            (false, Some(client)) => {
                let status = NtStatus::DEVICE_REMOVED;
                self.tell(client, ClientEvent::OpenFailed { gpadl, status });
            }
            _ => self.begin_close(channel_id),
        }
    }

    /// OPEN_CHANNEL_RESULT.
    pub(super) fn open_result(
        &mut self,
        channel_id: u32,
        open_id: u32,
        status: u32,
    ) -> Result<(), HostError> {
        let kind = MessageType::OpenChannelResult;
        let channel = self.channel_named(kind, channel_id)?;
        let client = channel.client;
        let Phase::Opening { gpadl, open_id: expected, given_up } = channel.phase else {
            return Err(HostError::ChannelState { kind, channel_id, state: channel.state() });
        };
        if open_id != expected {
            return Err(HostError::OpenId { channel_id, expected, got: open_id });
        }
        let opened = status == 0;
        channel.phase = if opened { Phase::Open { gpadl } } else { Phase::Closing };
        match client {
            Some(client) if opened && !given_up => self.tell(client, ClientEvent::Opened { gpadl }),
            _ if opened => self.begin_close(channel_id),
            client => {
                if let (Some(client), false) = (client, given_up) {
                    let status = failure(status);
                    self.tell(client, ClientEvent::OpenFailed { gpadl, status });
                }
                self.tear_down(gpadl, false);
            }
        }
        Ok(())
    }

    /// The ring's GPADL stands: opens the channel.
    pub(super) fn open_ring(&mut self, channel_id: u32, gpadl: u32, open: &OpenParameters) {
        let Connection::Connected(session) = &self.connection else { return };
        let (version, features) = (session.version, session.features);
        let Some(channel) = self.channels.get_mut(&channel_id) else { return };
        let open_id = self.next_open;
        self.next_open = self.next_open.wrapping_add(1);
        channel.phase = Phase::Opening { gpadl, open_id, given_up: false };
        let message = OpenChannel {
            channel_id: channel_id.into(),
            open_id: open_id.into(),
            ring_gpadl_id: gpadl.into(),
            target_vp: if version.has_channel_target_vp() { open.target_vp } else { 0 }.into(),
            downstream_page_offset: open.downstream_page_offset.into(),
            user_data: open.user_data,
        };
        // The parameters a host chooses for itself are as good as any of ours.
        let message = if features.contains(FeatureFlags::GUEST_SPECIFIED_SIGNAL_PARAMETERS) {
            let event_flag = u16::try_from(channel_id).unwrap_or_default(); // at most 2047
            GuestMessage::OpenChannelV2(OpenChannelV2 {
                open: message,
                connection_id: channel.offer.connection_id.into(),
                event_flag: event_flag.into(),
                flags: 0.into(),
            })
        } else {
            GuestMessage::OpenChannel(message)
        };
        self.send(Tag::Plain, message);
    }

    /// Closes what is open, and has the host let go of every GPADL, as far as it has them already;
    /// the rest follows its answers.
    pub(super) fn begin_close(&mut self, channel_id: u32) {
        let Some(channel) = self.channels.get_mut(&channel_id) else { return };
        match &mut channel.phase {
            Phase::CreatingRing { given_up, .. } | Phase::Opening { given_up, .. } => {
                *given_up = true;
            }
            Phase::Open { .. } => {
                channel.phase = Phase::Closing;
                let message = CloseChannel { channel_id: channel_id.into() };
                self.send(Tag::Plain, GuestMessage::CloseChannel(message));
            }
            Phase::Idle | Phase::Closing => {}
        }
        self.tear_down_unused(channel_id);
    }

    /// The client endpoint has let go of its channel, or never had one.
    pub(super) fn detach(&mut self, channel_id: u32) {
        if let Some(channel) = self.channels.get_mut(&channel_id) {
            channel.client = None;
            self.begin_close(channel_id);
            self.settle(channel_id);
        }
    }

    /// Sees whether the channel has come to rest: then it is released, or free for the next client.
    pub(super) fn settle(&mut self, channel_id: u32) {
        let Some(channel) = self.channels.get_mut(&channel_id) else { return };
        if matches!(channel.phase, Phase::Closing) && channel.gpadls.is_empty() {
            channel.phase = Phase::Idle;
        }
        if !channel.is_at_rest() || channel.client.is_some() || channel.releasing {
            return;
        }
        self.mmio.free(channel_id);
        if channel.rescinded {
            channel.releasing = true;
            let message = RelIdReleased { channel_id: channel_id.into() };
            self.send(Tag::Release(channel_id), GuestMessage::RelIdReleased(message));
        } else {
            self.match_channel(channel_id);
        }
    }

    /// The host has REL_ID_RELEASED: the number may come again.
    pub(super) fn released(&mut self, channel_id: u32) {
        if self.channels.get(&channel_id).is_some_and(|channel| channel.releasing) {
            self.channels.remove(&channel_id);
        }
    }

    /// Gives a free channel to the client that has waited longest for one like it.
    fn match_channel(&mut self, channel_id: u32) {
        let Some(channel) = self.channels.get(&channel_id) else { return };
        if !channel.is_free() {
            return;
        }
        let waiting = self.clients.iter().find(|(_, client)| {
            client.state == ClientState::Waiting && channel.offer.matches(&client.target)
        });
        if let Some((&client, _)) = waiting {
            self.bind_to(client, channel_id);
        }
    }

    /// Gives a waiting client the free channel of lowest number that it may have.
    pub(super) fn match_client(&mut self, id: ClientId) {
        let Some(client) = self.clients.get(&id) else { return };
        let free = self
            .channels
            .iter()
            .find(|(_, channel)| channel.is_free() && channel.offer.matches(&client.target));
        if let Some((&channel_id, _)) = free {
            self.bind_to(id, channel_id);
        }
    }

    fn bind_to(&mut self, id: ClientId, channel_id: u32) {
        let Some(channel) = self.channels.get_mut(&channel_id) else { return };
        let Some(client) = self.clients.get_mut(&id) else { return };
        let (required, optional) =
            (channel.offer.mmio_megabytes, channel.offer.mmio_megabytes_optional);
        match self.mmio.allocate(channel_id, required, optional) {
            Ok(mmio) => {
                client.state = ClientState::Bound(channel_id);
                channel.client = Some(id);
                let offer = Box::new(channel.offer.clone());
                self.tell(id, ClientEvent::Offered { offer, mmio });
            }
            Err(_no_room) => {
                let failed = ClientEvent::ConnectFailed(NtStatus::INSUFFICIENT_RESOURCES);
                self.give_up_client(id, failed);
            }
        }
    }

    /// Ends a waiting client's wait without a channel.
    pub(super) fn give_up_client(&mut self, id: ClientId, event: ClientEvent) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.state = ClientState::Gone { ring: None };
            self.tell(id, event);
        }
    }

    /// Client endpoints that wait for exactly this pair.
    pub(super) fn waiting_for(&self, interface_type: Guid, instance: Guid) -> Vec<ClientId> {
        let waits = |client: &crate::channel::Client| {
            client.state == ClientState::Waiting
                && client.target.interface_type == interface_type
                && client.target.interface_instance == Some(instance)
        };
        self.clients.iter().filter(|(_, client)| waits(client)).map(|(&id, _)| id).collect()
    }

    /// MODIFY_CHANNEL_RESPONSE.
    pub(super) fn modify_response(
        &mut self,
        channel_id: u32,
        status: u32,
    ) -> Result<(), HostError> {
        let kind = MessageType::ModifyChannelResponse;
        let has_response = self.session().is_ok_and(|s| s.version.has_modify_channel_response());
        let channel = self.channel_named(kind, channel_id)?;
        if !has_response || !channel.modifying {
            return Err(HostError::ChannelState { kind, channel_id, state: channel.state() });
        }
        channel.modifying = false;
        let status = if status == 0 { NtStatus::SUCCESS } else { failure(status) };
        self.modified(channel_id, status);
        Ok(())
    }

    /// The host has MODIFY_CHANNEL; below 5.3 it gives no answer.
    pub(super) fn modify_taken(&mut self, channel_id: u32) {
        let has_response = self.session().is_ok_and(|s| s.version.has_modify_channel_response());
        if let Some(channel) = self.channels.get_mut(&channel_id)
            && channel.modifying
            && !has_response
        {
            channel.modifying = false;
            self.modified(channel_id, NtStatus::SUCCESS);
        }
    }

    pub(super) fn modified(&mut self, channel_id: u32, status: NtStatus) {
        self.announce(ConnectionEvent::ChannelModified { channel_id, status });
    }

    /// The channel that a message of the host names.
    pub(super) fn channel_named(
        &mut self,
        kind: MessageType,
        channel_id: u32,
    ) -> Result<&mut Channel, HostError> {
        match self.channels.get_mut(&channel_id) {
            Some(channel) if !channel.releasing => Ok(channel),
            _ => Err(HostError::UnknownChannel { kind, channel_id }),
        }
    }
}
