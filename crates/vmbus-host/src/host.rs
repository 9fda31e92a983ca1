//! The host's side of one VMBus connection, as a pure state machine.

use vmbus_wire::message::{GuestMessage, HostMessage};
use vmbus_wire::version::Version;

use crate::channel::{Channel, Channels, OpenState};
use crate::connection::{
    CONNECTION_ID_MASK, Connection, MESSAGE_CONNECTION, MULTI_CLIENT_CONNECTION,
};
use crate::effect::Effect;
use crate::error::PostError;
use crate::gpadl::Gpadls;
use crate::hvsock::HvsockRequests;
use crate::limits::{DEFAULT_GPADL_PAGES, MAX_HVSOCK_REQUESTS, MAX_WAITING_MESSAGES};
use crate::offer::{OfferId, OfferKey};
use crate::outgoing::{Outgoing, OutgoingMessage, SlotId};
use crate::shape::GuestShape;

/// What a host is willing to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// The newest version spoken. Below 5.0 there is no connection 4, so that guests ask for nothing
    /// newer.
    pub newest_version: Version,
    /// Pages that all GPADLs of the guest together may describe.
    pub gpadl_pages: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { newest_version: Version::LATEST, gpadl_pages: DEFAULT_GPADL_PAGES }
    }
}

/// The host's side of one VMBus connection.
///
/// Events go in: messages of the guest, offers and answers of devices. The new state is in the value
/// itself; what has to be done outside comes out as [`Effect`]s, appended to the vector that each
/// method is given, and as messages for the guest, which wait here until [`Host::message_taken`].
/// The value does no I/O, holds no handle, closure, clock or random number, and compares by what it
/// is: two hosts that were given the same events in the same order are equal.
///
/// Devices are known by [`OfferId`]; whoever runs the machine keeps what belongs to them.
///
/// ```
/// use vmbus_host::{Config, GuestShape, Host, MESSAGE_CONNECTION, RamMap};
/// use vmbus_wire::message::{GuestMessage, InitiateContact, MessageType};
/// use vmbus_wire::version::Version;
///
/// let ram = RamMap::new([(0, 64 << 20)]);
/// let mut host = Host::new(Config::default(), GuestShape { vp_count: 1, ram });
/// let mut effects = Vec::new();
///
/// let contact = InitiateContact::with_interrupt_page(Version::V4_0, 0, 0);
/// let message = GuestMessage::InitiateContact(contact).to_buffer();
/// host.guest_message(MESSAGE_CONNECTION, &message, &mut effects)?;
///
/// let answer = host.next_message(&[]).ok_or("a contact is always answered")?;
/// assert_eq!(answer.message[0], MessageType::VersionResponse as u8);
/// let serial = answer.serial;
/// host.message_taken(serial);
/// assert!(host.connection().established().is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Host {
    pub(crate) config: Config,
    pub(crate) shape: GuestShape,
    pub(crate) connection: Connection,
    pub(crate) channels: Channels,
    pub(crate) gpadls: Gpadls,
    pub(crate) hvsock: HvsockRequests,
    pub(crate) outgoing: Outgoing,
    /// Given to effects whose answer must not be taken for that of a later one.
    pub(crate) last_serial: u64,
}

/// How much of what is bounded is taken. All zero, but for `channels`, when no guest is connected
/// and its devices have let go.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Usage {
    /// Channels, those included that were withdrawn and not released.
    pub channels: usize,
    /// Channels that their device holds open.
    pub held: usize,
    /// GPADLs.
    pub gpadls: usize,
    /// GPADLs of which words are missing.
    pub incomplete_gpadls: usize,
    /// Pages of all GPADLs.
    pub gpadl_pages: u64,
    /// Messages that wait for the guest.
    pub messages: usize,
    /// hvsock connect requests that wait for an answer.
    pub hvsock_requests: usize,
}

impl Host {
    /// A host to which no guest is connected and that offers nothing.
    #[must_use]
    pub fn new(config: Config, shape: GuestShape) -> Self {
        Self {
            config,
            shape,
            connection: Connection::Disconnected,
            channels: Channels::default(),
            gpadls: Gpadls::default(),
            hvsock: HvsockRequests::default(),
            outgoing: Outgoing::default(),
            last_serial: 0,
        }
    }

    /// Takes a message that the guest has posted to `connection_id`. `message` is a private copy of
    /// the payload, header first.
    ///
    /// # Errors
    /// [`PostError`]. After [`PostError::Refused`] an answer may be queued, where the guest waits for
    /// one; nothing else has changed. After the other errors nothing has.
    pub fn guest_message(
        &mut self,
        connection_id: u32,
        message: &[u8],
        effects: &mut Vec<Effect>,
    ) -> Result<(), PostError> {
        let has_multi_client = self.config.newest_version.has_message_sint();
        match connection_id & CONNECTION_ID_MASK {
            MESSAGE_CONNECTION => {}
            MULTI_CLIENT_CONNECTION if has_multi_client => {}
            _ => return Err(PostError::UnknownConnection { connection_id }),
        }
        let negotiated = self.connection.established().map(|established| established.negotiated());
        let message = GuestMessage::parse(message, negotiated)
            .map_err(|error| PostError::Refused(error.into()))?;

        let waiting = self.outgoing.len();
        if waiting >= MAX_WAITING_MESSAGES && !self.makes_room(&message) {
            return Err(PostError::Busy { waiting });
        }
        match message {
            GuestMessage::InitiateContact(contact) => {
                self.initiate_contact(&contact, None, effects)
            }
            GuestMessage::InitiateContactV2(message) => {
                self.initiate_contact(&message.contact, Some(message.client_id), effects)
            }
            GuestMessage::Unload => self.unload(effects),
            GuestMessage::RequestOffers => self.request_offers(),
            GuestMessage::RelIdReleased(message) => {
                self.release_channel_id(message.channel_id.get())
            }
            GuestMessage::OpenChannel(message) => self.open_channel(&message, None, effects),
            GuestMessage::OpenChannelV2(message) => {
                let signal = self.chosen_signal(&message);
                self.open_channel(&message.open, signal, effects)
            }
            GuestMessage::CloseChannel(message) => {
                self.close_channel(message.channel_id.get(), effects)
            }
            GuestMessage::GpadlHeader(message) => self.gpadl_header(&message),
            GuestMessage::GpadlBody(message) => self.gpadl_body(&message),
            GuestMessage::GpadlTeardown(message) => self.gpadl_teardown(&message),
            GuestMessage::OpenReservedChannel(message) => {
                self.open_reserved_channel(&message, effects)
            }
            GuestMessage::CloseReservedChannel(message) => {
                self.close_reserved_channel(&message, effects)
            }
            GuestMessage::TlConnectRequest(message) => self.hvsock_connect(&message, None, effects),
            GuestMessage::TlConnectRequestV2(message) => {
                self.hvsock_connect(&message.request, Some(message.silo_id), effects)
            }
            GuestMessage::ModifyChannel(message) => self.modify_channel(&message, effects),
            GuestMessage::ModifyConnection(message) => self.modify_connection(&message),
            GuestMessage::Pause => self.pause(),
            GuestMessage::Resume => self.resume(),
        }
        .map_err(PostError::Refused)
    }

    /// Messages that empty the queue, or let it empty itself, are taken even when it is full: a guest
    /// that crashed with a full slot must be able to start again.
    fn makes_room(&self, message: &GuestMessage<'_>) -> bool {
        match message {
            GuestMessage::Unload | GuestMessage::Resume => true,
            GuestMessage::InitiateContact(contact) => self.ends_connection(contact),
            GuestMessage::InitiateContactV2(message) => self.ends_connection(&message.contact),
            _ => false,
        }
    }

    /// The first message for the guest that goes to none of the slots in `full`, if one may leave.
    #[must_use]
    pub fn next_message(&self, full: &[SlotId]) -> Option<&OutgoingMessage> {
        self.outgoing.next(full)
    }

    /// The message with this serial number is in its slot. One that was dropped meanwhile is ignored.
    pub fn message_taken(&mut self, serial: u64) {
        self.outgoing.taken(serial);
    }

    /// How far the connection has come.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Every channel, oldest offer first.
    pub fn channels(&self) -> impl Iterator<Item = (OfferId, &Channel)> {
        self.channels.iter()
    }

    /// The channel of an offer, until it is withdrawn, released by the guest and let go by the device.
    #[must_use]
    pub fn channel(&self, offer: OfferId) -> Option<&Channel> {
        self.channels.get(offer)
    }

    /// The offer whose channel has this id, whether or not the guest was told of it.
    #[must_use]
    pub fn offer_of(&self, channel_id: u32) -> Option<OfferId> {
        self.channels.by_channel_id(channel_id)
    }

    /// The offer of this key that its device has not withdrawn.
    pub(crate) fn standing(&self, key: OfferKey) -> Option<OfferId> {
        self.channels.standing(key)
    }

    /// What the host knows of the machine.
    #[must_use]
    pub fn shape(&self) -> &GuestShape {
        &self.shape
    }

    /// How much of what is bounded is taken.
    #[must_use]
    pub fn usage(&self) -> Usage {
        Usage {
            channels: self.channels.len(),
            held: self.channels.iter().filter(|(_, channel)| channel.device_holds()).count(),
            gpadls: self.gpadls.len(),
            incomplete_gpadls: self.gpadls.incomplete(),
            gpadl_pages: self.gpadls.pages(),
            messages: self.outgoing.len(),
            hvsock_requests: self.hvsock.len(),
        }
    }

    /// What is wrong with the state, in words; nothing ever, unless there is a mistake in here or
    /// the state came from somewhere else. For tests, fuzzing, and states that were saved.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        let mut wrong = self.channels.violations();
        wrong.extend(self.gpadls.violations(self.config.gpadl_pages));
        wrong.extend(self.outgoing.violations());
        if self.hvsock.len() > MAX_HVSOCK_REQUESTS {
            wrong.push(format!("{} hvsock requests", self.hvsock.len()));
        }
        let connected = self.connection.established().is_some();
        if !connected && (self.hvsock.len() != 0 || self.outgoing.is_paused()) {
            wrong.push("requests or a pause without a connection".into());
        }
        for (offer, channel) in self.channels.iter() {
            if !connected
                && !matches!(channel.offer, crate::OfferState::Hidden | crate::OfferState::Released)
            {
                wrong.push(format!("{offer:?} is {:?} without a connection", channel.offer));
            }
            if connected && channel.offer == crate::OfferState::Hidden && channel.device_holds() {
                wrong.push(format!("{offer:?} is hidden and {}", channel.open.name()));
            }
        }
        if matches!(self.connection, Connection::Disconnecting { .. }) && !self.waits_for_devices()
        {
            wrong.push("disconnecting, and nothing to wait for".into());
        }
        for (offer, id, gpadl) in self.gpadls.iter() {
            let Some(channel) = self.channels.get(offer) else {
                wrong.push(format!("GPADL {id:#x} of {offer:?}, which is gone"));
                continue;
            };
            let holds = channel.device_holds();
            if gpadl.in_use && !holds {
                wrong.push(format!("GPADL {id:#x} of {offer:?} is in use by nobody"));
            }
            if gpadl.is_tearing_down() && !(holds && (gpadl.in_use || channel.has_ring_in(id))) {
                wrong.push(format!("GPADL {id:#x} of {offer:?} is held back for nobody"));
            }
        }
        for (offer, channel) in self.channels.iter() {
            if let OpenState::Opening(open) | OpenState::Open(open) = &channel.open
                && let Err(refusal) = self.standing_ring_pfns(offer, channel.channel_id, open)
            {
                wrong.push(format!("{offer:?} is {}: {refusal}", channel.open.name()));
            }
        }
        wrong
    }

    pub(crate) fn next_serial(&mut self) -> u64 {
        self.last_serial += 1;
        self.last_serial
    }

    /// Queues a message for the guest of the present connection, if there is one.
    pub(crate) fn send(&mut self, message: &HostMessage) {
        if let Some(established) = self.connection.established() {
            self.outgoing.push(established.slot, message, false);
        }
    }

    /// Queues a message for a slot, connected or not.
    pub(crate) fn send_to(&mut self, slot: SlotId, message: &HostMessage) {
        self.outgoing.push(slot, message, false);
    }

    /// Queues a message about a reserved channel.
    pub(crate) fn send_reserved(&mut self, slot: SlotId, message: &HostMessage) {
        self.outgoing.push(slot, message, true);
    }
}
