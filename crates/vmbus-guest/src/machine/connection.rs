//! Coming and going: versions, unload, loss.

use vmbus_wire::guid::Guid;
use vmbus_wire::message::contact::MessageTarget;
use vmbus_wire::message::{
    ConnectionState as WireState, GuestMessage, InitiateContact, InitiateContactV2, MessageType,
    VersionResponse,
};
use vmbus_wire::status::NtStatus;
use vmbus_wire::synic::connection;
use vmbus_wire::version::{FeatureFlags, Negotiated, Version};

use super::{ConnectionState, Guest};
use crate::channel::{ClientState, Phase};
use crate::config::GuestConfig;
use crate::effect::{ClientEvent, ConnectionEvent, Effect};
use crate::error::{ContactError, HostError, LossReason, RequestError};
use crate::gpadl::{Owner, State};
use crate::post::Tag;

/// Where the connection is, with what only that state knows.
#[derive(Debug)]
pub(super) enum Connection {
    Disconnected,
    /// `asked` is the index in the list of versions.
    Contacting {
        asked: usize,
    },
    Connected(Session),
    Unloading(Session),
    Unloaded,
    Lost(LossReason),
}

/// What was agreed on, and what is open between the two sides as a whole.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) version: Version,
    pub(super) features: FeatureFlags,
    pub(super) message_connection: u32,
    pub(super) offers_delivered: bool,
    pub(super) modifying: bool,
    pub(super) pause: Pause,
    /// hvsock requests that the host may still refuse: endpoint id, service id.
    pub(super) hvsock: Vec<(Guid, Guid)>,
}

/// Whether the host may send messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Pause {
    Running,
    Pausing,
    Paused,
}

impl Connection {
    pub(super) fn state(&self, config: &GuestConfig) -> ConnectionState {
        match self {
            Self::Disconnected => ConnectionState::Disconnected,
            Self::Contacting { asked } => match config.versions.get(*asked) {
                Some(&version) => ConnectionState::Contacting { version },
                None => ConnectionState::Disconnected, // `asked` never leaves the list
            },
            Self::Connected(session) => ConnectionState::Connected {
                version: session.version,
                features: session.features,
                offers_delivered: session.offers_delivered,
            },
            Self::Unloading(_) => ConnectionState::Unloading,
            Self::Unloaded => ConnectionState::Unloaded,
            Self::Lost(reason) => ConnectionState::Lost(*reason),
        }
    }

    /// What the host's next message has to be read by.
    pub(super) fn negotiated(&self, config: &GuestConfig) -> Option<Negotiated> {
        match self {
            Self::Contacting { asked } => Some(asked_for(*config.versions.get(*asked)?, config)),
            Self::Connected(session) | Self::Unloading(session) => {
                Some((session.version, session.features))
            }
            Self::Disconnected | Self::Unloaded | Self::Lost(_) => None,
        }
    }

    /// For messages: what the connection is doing.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Disconnected => "not connected",
            Self::Contacting { .. } => "making contact",
            Self::Connected(Session { pause: Pause::Paused, .. }) => "paused",
            Self::Connected(_) => "connected",
            Self::Unloading(_) => "unloading",
            Self::Unloaded => "unloaded",
            Self::Lost(_) => "cut off from the host",
        }
    }

    /// Where a message with `tag` is posted to.
    pub(super) fn message_connection(&self, tag: Tag, config: &GuestConfig) -> u32 {
        match self {
            Self::Contacting { asked } if tag == Tag::Contact => {
                match config.versions.get(*asked) {
                    Some(version) if version.has_message_sint() => connection::MULTI_CLIENT_MESSAGE,
                    _ => connection::MESSAGE,
                }
            }
            Self::Connected(session) | Self::Unloading(session) => session.message_connection,
            _ => connection::MESSAGE,
        }
    }
}

impl Guest {
    /// Connects: asks the host for each version of the list until it takes one, then for its
    /// offers. On a live connection, makes the host forget everything first: every bound client
    /// endpoint is rescinded.
    ///
    /// # Errors
    /// [`RequestError::Connection`] while an attempt or an unload is under way.
    pub fn connect(&mut self) -> Result<(), RequestError> {
        match self.connection {
            Connection::Contacting { .. } | Connection::Unloading(_) => {
                return Err(RequestError::Connection { state: self.connection.name() });
            }
            Connection::Connected(_) => self.drop_session(true),
            Connection::Disconnected | Connection::Unloaded | Connection::Lost(_) => {}
        }
        self.contact(0);
        Ok(())
    }

    /// Tells the host to forget everything about this guest. Every client endpoint is rescinded;
    /// [`ConnectionEvent::Unloaded`] says when the host has done it.
    ///
    /// # Errors
    /// [`RequestError::Connection`] unless connected.
    pub fn unload(&mut self) -> Result<(), RequestError> {
        if !matches!(self.connection, Connection::Connected(_)) {
            return Err(RequestError::Connection { state: self.connection.name() });
        }
        self.drop_session(true);
        self.refuse_waiting(NtStatus::DEVICE_REMOVED);
        if let Connection::Connected(session) =
            std::mem::replace(&mut self.connection, Connection::Unloaded)
        {
            self.connection = Connection::Unloading(session);
        }
        self.send(Tag::Unload, GuestMessage::Unload);
        Ok(())
    }

    /// The transport has lost the host: no message comes or goes any more, no post status comes,
    /// and the host uses no memory.
    pub fn host_gone(&mut self) {
        if !matches!(self.connection, Connection::Lost(_)) {
            self.lose(LossReason::HostGone);
        }
        self.outbox.clear(true);
        self.reset_done();
    }

    fn contact(&mut self, asked: usize) {
        let Some(&version) = self.config.versions.get(asked) else { return };
        self.connection = Connection::Contacting { asked };
        let config = &self.config;
        let (_, features) = asked_for(version, config);
        let mut contact = if version.has_message_sint() {
            let target = MessageTarget {
                sint: config.message_sint,
                vtl: if version.has_message_vtl() { config.message_vtl } else { 0 },
                reserved: 0.into(),
                feature_flags: features.bits().into(),
            };
            InitiateContact::with_message_target(version, config.message_vp, target)
        } else {
            let page = config.interrupt_page.unwrap_or_default();
            InitiateContact::with_interrupt_page(version, config.message_vp, page)
        };
        let (parent_to_child, child_to_parent) = config.monitor_pages.unwrap_or_default();
        contact.parent_to_child_monitor_gpa = parent_to_child.into();
        contact.child_to_parent_monitor_gpa = child_to_parent.into();
        let message = if features.contains(FeatureFlags::CLIENT_ID) {
            let client_id = config.client_id;
            GuestMessage::InitiateContactV2(InitiateContactV2 { contact, client_id })
        } else {
            GuestMessage::InitiateContact(contact)
        };
        self.send(Tag::Contact, message);
    }

    /// The host does not take the version asked for.
    pub(super) fn contact_older(&mut self) {
        let Connection::Contacting { asked } = self.connection else { return };
        match self.config.versions.get(asked + 1) {
            Some(_) => self.contact(asked + 1),
            None => {
                let oldest = self.config.versions.last().copied().unwrap_or(Version::LATEST);
                self.lose(ContactError::NoCommonVersion { oldest }.into());
            }
        }
    }

    /// VERSION_RESPONSE, with the features of its longer forms.
    pub(super) fn version_response(
        &mut self,
        response: &VersionResponse,
        features: FeatureFlags,
    ) -> Result<(), HostError> {
        let Connection::Contacting { asked } = self.connection else {
            return Err(self.unexpected(MessageType::VersionResponse));
        };
        let Some(&version) = self.config.versions.get(asked) else {
            return Err(self.unexpected(MessageType::VersionResponse));
        };
        // Whatever the answer, the host has dealt with the contact, and so with what was before it.
        self.reset_done();
        if !response.is_supported() {
            self.contact_older();
            return Ok(());
        }
        match self.agree(version, response, features) {
            Ok(session) => {
                let (version, features) = (session.version, session.features);
                self.connection = Connection::Connected(session);
                self.announce(ConnectionEvent::Connected { version, features });
                self.send(Tag::Plain, GuestMessage::RequestOffers);
                Ok(())
            }
            Err(error) => {
                self.lose(error.into());
                Err(error.into())
            }
        }
    }

    fn agree(
        &self,
        version: Version,
        response: &VersionResponse,
        features: FeatureFlags,
    ) -> Result<Session, ContactError> {
        let connection_state = response.state();
        if version.has_connection_state() && connection_state != WireState::Successful {
            return Err(ContactError::Refused { version, connection_state });
        }
        let message_connection = if version.has_message_sint() {
            response.selected_version_or_connection_id.get()
        } else {
            connection::MESSAGE
        };
        if !(1..=connection::MASK).contains(&message_connection) {
            return Err(ContactError::ConnectionId { connection_id: message_connection });
        }
        if !self.config.features.contains(features) {
            return Err(ContactError::Features {
                requested: self.config.features.bits(),
                granted: features.bits(),
            });
        }
        Ok(Session {
            version,
            features,
            message_connection,
            offers_delivered: false,
            modifying: false,
            pause: Pause::Running,
            hvsock: Vec::new(),
        })
    }

    /// UNLOAD_COMPLETE.
    pub(super) fn unload_complete(&mut self) -> Result<(), HostError> {
        if !matches!(self.connection, Connection::Unloading(_)) {
            return Err(self.unexpected(MessageType::UnloadComplete));
        }
        self.unloaded();
        Ok(())
    }

    /// The host has UNLOAD; the oldest version has no answer to wait for.
    pub(super) fn unload_taken(&mut self) {
        if let Connection::Unloading(session) = &self.connection
            && !session.version.has_unload_complete()
        {
            self.unloaded();
        }
    }

    fn unloaded(&mut self) {
        self.connection = Connection::Unloaded;
        self.reset_done();
        self.announce(ConnectionEvent::Unloaded);
    }

    /// Gives the connection up.
    pub(super) fn lose(&mut self, reason: LossReason) {
        self.drop_session(true);
        self.refuse_waiting(reason.status());
        self.connection = Connection::Lost(reason);
        self.announce(ConnectionEvent::Lost(reason));
    }

    /// Client endpoints that wait for an offer get none.
    fn refuse_waiting(&mut self, status: NtStatus) {
        let waiting: Vec<_> = self
            .clients
            .iter()
            .filter(|(_, client)| client.state == ClientState::Waiting)
            .map(|(&id, _)| id)
            .collect();
        for id in waiting {
            if let Some(client) = self.clients.get_mut(&id) {
                client.state = ClientState::Gone { ring: None };
            }
            self.tell(id, ClientEvent::ConnectFailed(status));
        }
    }

    /// Forgets every channel, and tells their clients. What the host may still use until it has
    /// done the same stays in quarantine.
    fn drop_session(&mut self, host_uses_memory: bool) {
        self.outbox.clear(false);
        self.reset_pending |= host_uses_memory;
        let gpadls = std::mem::take(&mut self.gpadls);
        let channels = std::mem::take(&mut self.channels);
        for (&id, gpadl) in &gpadls {
            let client = channels.get(&gpadl.channel).and_then(|channel| channel.client);
            let (Some(client), Owner::Client) = (client, gpadl.owner) else { continue };
            match gpadl.state {
                State::Creating { unwanted: false, .. } => self.tell(
                    client,
                    ClientEvent::GpadlCreated { gpadl: id, status: NtStatus::DEVICE_REMOVED },
                ),
                State::Creating { tell_torn_down: true, .. }
                | State::TearingDown { tell_torn_down: true } => {
                    let event = ClientEvent::GpadlTornDown { gpadl: id };
                    self.let_go(Effect::Client { client, event });
                }
                State::Creating { .. } | State::Created | State::TearingDown { .. } => {}
            }
        }
        for (id, channel) in channels {
            if channel.modifying {
                self.modified(id, NtStatus::DEVICE_REMOVED);
            }
            let mut kept_by_client = None;
            match channel.phase {
                Phase::CreatingRing { gpadl, given_up, .. }
                | Phase::Opening { gpadl, given_up, .. } => {
                    self.let_go(Effect::RingReleased { gpadl });
                    if let (Some(client), false) = (channel.client, given_up) {
                        let status = NtStatus::DEVICE_REMOVED;
                        self.tell(client, ClientEvent::OpenFailed { gpadl, status });
                    }
                }
                Phase::Open { gpadl } => kept_by_client = Some(gpadl),
                Phase::Idle => {}
                Phase::Closing => {
                    for gpadl in channel.gpadls {
                        if gpadls.get(&gpadl).is_some_and(|record| record.owner == Owner::Ring) {
                            self.let_go(Effect::RingReleased { gpadl });
                        }
                    }
                }
            }
            let Some(id) = channel.client else { continue };
            if let Some(client) = self.clients.get_mut(&id) {
                client.state = ClientState::Gone { ring: kept_by_client };
            }
            if !channel.rescinded {
                self.tell(id, ClientEvent::Rescinded);
            }
        }
        self.mmio.clear();
    }

    /// The host uses nothing of what it had before.
    fn reset_done(&mut self) {
        self.reset_pending = false;
        self.effects.extend(self.quarantine.drain(..));
    }

    pub(super) fn unexpected(&self, kind: MessageType) -> HostError {
        HostError::Unexpected { kind, state: self.connection.name() }
    }

    /// What was agreed on.
    pub(super) fn session(&self) -> Result<&Session, RequestError> {
        match &self.connection {
            Connection::Connected(session) => Ok(session),
            other => Err(RequestError::Connection { state: other.name() }),
        }
    }
}

/// What a contact under `version` asks for.
fn asked_for(version: Version, config: &GuestConfig) -> Negotiated {
    let features =
        if version.has_feature_flags() { config.features } else { FeatureFlags::empty() };
    (version, features)
}
