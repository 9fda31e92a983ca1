//! What this guest's own side asks for.

use kmcl::bus::{GpadlPages, PageRange, Target, USER_DATA_SIZE};
use vmbus_wire::PAGE_SIZE_U32;
use vmbus_wire::guid::Guid;
use vmbus_wire::message::{
    GuestMessage, MessageType, ModifyChannel, ModifyConnection, TlConnectRequest,
    TlConnectRequestV2, VP_INDEX_NONE,
};
use vmbus_wire::version::FeatureFlags;

use super::connection::{Connection, Pause, Session};
use super::{Guest, MAX_CLIENTS};
use crate::channel::{Channel, Client, ClientState, OpenParameters, Phase};
use crate::effect::{ClientEvent, ClientId, Effect};
use crate::error::RequestError;
use crate::gpadl::{MAX_GPADL_PAGES, MAX_GPADLS_IN_PROGRESS, Owner, State};
use crate::offer::OfferedChannel;
use crate::post::Tag;

/// hvsock requests that may wait for the host's answer.
pub const MAX_HVSOCK_REQUESTS: usize = 64;

/// What a client endpoint opens its channel with.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RingRequest {
    /// Pages of both rings, in the order in which they are used: first those of the ring the guest
    /// writes, then those of the ring it reads. In each, the control page comes first.
    pub pfns: Vec<u64>,
    /// How many of them are of the ring the guest writes.
    pub outgoing_pages: u32,
    /// The virtual processor that is interrupted; `u32::MAX` for none. Always 0 below version 2.4.
    pub target_vp: u32,
    /// Device-defined bytes.
    pub user_data: [u8; USER_DATA_SIZE],
}

impl Guest {
    /// Adds a client endpoint, which gets the first free offer that matches `target`, now or later.
    ///
    /// # Errors
    /// [`RequestError::Limit`] at [`MAX_CLIENTS`]; [`RequestError::Connection`] after the end of
    /// the connection.
    pub fn bind(&mut self, target: Target) -> Result<ClientId, RequestError> {
        match self.connection {
            Connection::Disconnected | Connection::Contacting { .. } | Connection::Connected(_) => {
            }
            Connection::Unloading(_) | Connection::Unloaded | Connection::Lost(_) => {
                return Err(RequestError::Connection { state: self.connection.name() });
            }
        }
        if self.clients.len() >= MAX_CLIENTS {
            return Err(RequestError::Limit { what: "client endpoints", limit: MAX_CLIENTS });
        }
        let id = ClientId(self.next_client);
        self.next_client += 1; // 64 bits: not in a lifetime
        self.clients.insert(id, Client { target, state: ClientState::Waiting });
        self.match_client(id);
        Ok(id)
    }

    /// Takes a client endpoint away: its channel is closed, and free for the next one.
    pub fn unbind(&mut self, id: ClientId) {
        self.quarantine
            .retain(|effect| !matches!(effect, Effect::Client { client, .. } if *client == id));
        match self.clients.remove(&id).map(|client| client.state) {
            Some(ClientState::Bound(channel_id)) => self.detach(channel_id),
            Some(ClientState::Gone { ring: Some(gpadl) }) => {
                self.let_go(Effect::RingReleased { gpadl });
            }
            Some(ClientState::Gone { ring: None } | ClientState::Waiting) | None => {}
        }
    }

    /// The offer that a client endpoint is bound to.
    #[must_use]
    pub fn bound_offer(&self, id: ClientId) -> Option<&OfferedChannel> {
        match self.clients.get(&id)?.state {
            ClientState::Bound(channel_id) => Some(&self.channels.get(&channel_id)?.offer),
            ClientState::Waiting | ClientState::Gone { .. } => None,
        }
    }

    /// Opens the channel of `id` with the rings of `request`; returns the handle of their GPADL.
    /// Answered by [`ClientEvent::Opened`] or [`ClientEvent::OpenFailed`]. Both control pages must
    /// be initialised.
    ///
    /// # Errors
    /// [`RequestError`]: the endpoint is not bound, the channel not closed, the ring has no legal
    /// shape, or a bound is reached.
    pub fn open(&mut self, id: ClientId, request: RingRequest) -> Result<u32, RequestError> {
        let channel_id = self.bound(id)?;
        let channel = self.usable(channel_id)?;
        if !matches!(channel.phase, Phase::Idle) {
            return Err(RequestError::ChannelState { channel_id, state: channel.state() });
        }
        let RingRequest { pfns, outgoing_pages, target_vp, user_data } = request;
        let (pages, outgoing) = (pfns.len(), outgoing_pages);
        let shape = RequestError::RingShape { pages, outgoing };
        let incoming = u32::try_from(pages).ok().and_then(|pages| pages.checked_sub(outgoing));
        if pages > MAX_GPADL_PAGES || outgoing < 2 || incoming.is_none_or(|pages| pages < 2) {
            return Err(shape);
        }
        // At most 8190 pages, checked above.
        let byte_count = u32::try_from(pages).map_err(|_| shape)? * PAGE_SIZE_U32;
        let ranges = vec![PageRange { byte_count, byte_offset: 0, pfns }];
        let gpadl =
            self.describe(channel_id, Owner::Ring, &GpadlPages { ranges, read_only: false })?;
        let open =
            Box::new(OpenParameters { downstream_page_offset: outgoing, target_vp, user_data });
        if let Some(channel) = self.channels.get_mut(&channel_id) {
            channel.phase = Phase::CreatingRing { gpadl, open, given_up: false };
        }
        Ok(gpadl)
    }

    /// Closes the channel of `id`, if it is open or being opened, and takes back every GPADL. The
    /// client must no longer use its rings. It stays bound, unless the channel is gone.
    pub fn close(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        match &mut client.state {
            ClientState::Waiting => {}
            ClientState::Gone { ring } => {
                if let Some(gpadl) = ring.take() {
                    self.let_go(Effect::RingReleased { gpadl });
                }
            }
            ClientState::Bound(channel_id) => {
                let channel_id = *channel_id;
                if self.channels.get(&channel_id).is_some_and(|channel| channel.rescinded) {
                    client.state = ClientState::Gone { ring: None };
                    self.detach(channel_id);
                } else {
                    self.begin_close(channel_id);
                    self.settle(channel_id);
                }
            }
        }
    }

    /// Describes `pages` to the host; answered by [`ClientEvent::GpadlCreated`].
    ///
    /// # Errors
    /// [`RequestError`]: the endpoint is not bound, the pages cannot be described, a bound is
    /// reached.
    pub fn create_gpadl(&mut self, id: ClientId, pages: &GpadlPages) -> Result<u32, RequestError> {
        let channel_id = self.bound(id)?;
        let channel = self.usable(channel_id)?;
        if matches!(channel.phase, Phase::Closing) {
            return Err(RequestError::ChannelState { channel_id, state: channel.state() });
        }
        let creating = |id: &&u32| {
            self.gpadls.get(id).is_some_and(|gpadl| matches!(gpadl.state, State::Creating { .. }))
        };
        if channel.gpadls.iter().filter(creating).count() >= MAX_GPADLS_IN_PROGRESS {
            let limit = MAX_GPADLS_IN_PROGRESS;
            return Err(RequestError::Limit { what: "GPADLs without an answer", limit });
        }
        self.describe(channel_id, Owner::Client, pages)
    }

    /// Takes a GPADL of the client's back; answered by [`ClientEvent::GpadlTornDown`] once the host
    /// has let go of it, at once where it has none of that handle.
    ///
    /// # Errors
    /// [`RequestError::UnknownClient`].
    pub fn teardown_gpadl(&mut self, id: ClientId, gpadl_id: u32) -> Result<(), RequestError> {
        let client = self.clients.get(&id).ok_or(RequestError::UnknownClient)?;
        let channel = match client.state {
            ClientState::Bound(channel_id) => Some(channel_id),
            ClientState::Waiting | ClientState::Gone { .. } => None,
        };
        let own = self
            .gpadls
            .get_mut(&gpadl_id)
            .filter(|gpadl| Some(gpadl.channel) == channel && gpadl.owner == Owner::Client);
        match own.map(|gpadl| &mut gpadl.state) {
            None => {
                let event = ClientEvent::GpadlTornDown { gpadl: gpadl_id };
                self.let_go(Effect::Client { client: id, event });
            }
            Some(State::Creating { unwanted, tell_torn_down }) => {
                (*unwanted, *tell_torn_down) = (true, true);
            }
            Some(State::TearingDown { tell_torn_down }) => *tell_torn_down = true,
            Some(State::Created) => self.tear_down(gpadl_id, true),
        }
        Ok(())
    }

    /// Has the host interrupt another virtual processor for an open channel. Answered by
    /// [`ConnectionEvent::ChannelModified`](crate::ConnectionEvent::ChannelModified).
    ///
    /// # Errors
    /// [`RequestError`]: below version 4.1, for a channel that is not open, for one whose last
    /// request is not answered, and for `u32::MAX`.
    pub fn modify_channel(&mut self, channel_id: u32, target_vp: u32) -> Result<(), RequestError> {
        let version = self.session()?.version;
        if !version.has_modify_channel() {
            let kind = MessageType::ModifyChannel;
            return Err(RequestError::NotNegotiated { kind, version });
        }
        if target_vp == VP_INDEX_NONE {
            return Err(RequestError::TargetVp { target_vp });
        }
        self.usable(channel_id)?;
        match self.channels.get_mut(&channel_id) {
            Some(channel @ Channel { phase: Phase::Open { .. }, modifying: false, .. }) => {
                channel.modifying = true;
            }
            Some(Channel { modifying: true, .. }) => {
                let state = "being modified";
                return Err(RequestError::ChannelState { channel_id, state });
            }
            Some(channel) => {
                return Err(RequestError::ChannelState { channel_id, state: channel.state() });
            }
            None => return Err(RequestError::ChannelState { channel_id, state: "not offered" }),
        }
        let message = ModifyChannel { channel_id: channel_id.into(), target_vp: target_vp.into() };
        self.send(Tag::Modify(channel_id), GuestMessage::ModifyChannel(message));
        Ok(())
    }

    /// Gives the host other monitor pages (guest physical addresses, parent to child and child to
    /// parent), or takes them away. Answered by
    /// [`ConnectionEvent::ConnectionModified`](crate::ConnectionEvent::ConnectionModified).
    ///
    /// # Errors
    /// [`RequestError`]: without the feature, and while the last request is not answered.
    pub fn modify_connection(&mut self, pages: Option<(u64, u64)>) -> Result<(), RequestError> {
        let kind = MessageType::ModifyConnection;
        let session = self.with_feature(FeatureFlags::MODIFY_CONNECTION, kind)?;
        if session.modifying {
            return Err(RequestError::Connection { state: "the connection is being modified" });
        }
        session.modifying = true;
        let (parent_to_child, child_to_parent) = pages.unwrap_or_default();
        let message = ModifyConnection {
            parent_to_child_monitor_gpa: parent_to_child.into(),
            child_to_parent_monitor_gpa: child_to_parent.into(),
        };
        self.send(Tag::Plain, GuestMessage::ModifyConnection(message));
        Ok(())
    }

    /// Has the host send no messages; [`ConnectionEvent::Paused`](crate::ConnectionEvent::Paused)
    /// says from when on.
    ///
    /// # Errors
    /// [`RequestError`]: without the feature, and unless messages flow.
    pub fn pause(&mut self) -> Result<(), RequestError> {
        self.change_pause(MessageType::Pause, Pause::Running, Pause::Pausing)?;
        self.send(Tag::Plain, GuestMessage::Pause);
        Ok(())
    }

    /// Has the host send messages again, those that piled up first.
    ///
    /// # Errors
    /// [`RequestError`]: without the feature, and unless paused.
    pub fn resume(&mut self) -> Result<(), RequestError> {
        self.change_pause(MessageType::Resume, Pause::Paused, Pause::Running)?;
        self.send(Tag::Plain, GuestMessage::Resume);
        Ok(())
    }

    fn change_pause(
        &mut self,
        kind: MessageType,
        from: Pause,
        to: Pause,
    ) -> Result<(), RequestError> {
        let state = self.connection.name();
        let session = self.with_feature(FeatureFlags::PAUSE_RESUME, kind)?;
        if session.pause != from {
            return Err(RequestError::Connection { state });
        }
        session.pause = to;
        Ok(())
    }

    /// Asks the host's service `service_id` for an hvsock channel. Success is an offer of type
    /// `service_id` and instance `endpoint_id`; from version 4.1 on a refusal is reported by
    /// [`ConnectionEvent::HvsockRefused`](crate::ConnectionEvent::HvsockRefused).
    ///
    /// # Errors
    /// [`RequestError`]: below version 4.0, with a silo below 5.2, at [`MAX_HVSOCK_REQUESTS`].
    pub fn connect_hvsock(
        &mut self,
        endpoint_id: Guid,
        service_id: Guid,
        silo_id: Option<Guid>,
    ) -> Result<(), RequestError> {
        let version = self.session()?.version;
        if !version.has_hvsock() || (silo_id.is_some() && !version.has_hvsock_silo()) {
            let kind = MessageType::TlConnectRequest;
            return Err(RequestError::NotNegotiated { kind, version });
        }
        if let Connection::Connected(session) = &mut self.connection
            && version.has_hvsock_connect_result()
        {
            if session.hvsock.len() >= MAX_HVSOCK_REQUESTS {
                let limit = MAX_HVSOCK_REQUESTS;
                return Err(RequestError::Limit { what: "hvsock requests", limit });
            }
            session.hvsock.push((endpoint_id, service_id));
        }
        let request = TlConnectRequest { endpoint_id, service_id };
        let message = match silo_id {
            None => GuestMessage::TlConnectRequest(request),
            Some(silo_id) => {
                GuestMessage::TlConnectRequestV2(TlConnectRequestV2 { request, silo_id })
            }
        };
        self.send(Tag::Plain, message);
        Ok(())
    }

    fn with_feature(
        &mut self,
        feature: FeatureFlags,
        kind: MessageType,
    ) -> Result<&mut Session, RequestError> {
        let state = self.connection.name();
        let Connection::Connected(session) = &mut self.connection else {
            return Err(RequestError::Connection { state });
        };
        if !session.features.contains(feature) {
            return Err(RequestError::NotNegotiated { kind, version: session.version });
        }
        Ok(session)
    }

    /// The channel that a client endpoint is bound to.
    fn bound(&self, id: ClientId) -> Result<u32, RequestError> {
        match self.clients.get(&id).ok_or(RequestError::UnknownClient)?.state {
            ClientState::Bound(channel_id) => Ok(channel_id),
            ClientState::Waiting | ClientState::Gone { .. } => Err(RequestError::NotBound),
        }
    }

    /// The channel, unless it is withdrawn or the connection is over.
    fn usable(&self, channel_id: u32) -> Result<&Channel, RequestError> {
        self.session()?;
        match self.channels.get(&channel_id) {
            Some(channel) if !channel.rescinded => Ok(channel),
            Some(channel) => Err(RequestError::ChannelState { channel_id, state: channel.state() }),
            None => Err(RequestError::ChannelState { channel_id, state: "not offered" }),
        }
    }
}
