//! The guest's control plane as a pure state machine.
//!
//! [`Guest`] holds what a guest knows of its connection, offers, channels and GPADLs. Whatever
//! happens is a call; whatever has to be done about it comes out of [`Guest::next_effect`], in
//! order. There is no I/O, clock, thread or lock in here, and no memory of anybody's is touched.
//!
//! The host is not trusted: each of its messages is checked against what was asked of it, and one
//! that does not fit is refused with a [`HostError`] and changes nothing. All tables are bounded by
//! what this guest itself has asked for, and by the 2047 numbers that channels can have.
//!
//! ```text
//!               connect            VERSION_RESPONSE
//! Disconnected ─────────▶ Contacting ─────────────▶ Connected ──unload──▶ Unloading ──▶ Unloaded
//!                          │  ▲  │ refused: the next older version │
//!                          │  └──┘                                 │
//!                          └───────────────▶ Lost ◀────────────────┘   (host gone, or it misbehaves)
//! ```
//!
//! `connect` is possible from every state but Contacting and Unloading; on a live connection it
//! makes the host forget everything first.

mod channels;
mod connection;
mod dispatch;
mod gpadls;
mod requests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use vmbus_wire::message::GuestMessage;
use vmbus_wire::version::{FeatureFlags, Version};

use crate::channel::{Channel, Client};
use crate::config::{ConfigError, GuestConfig};
use crate::effect::{ClientEvent, ClientId, ConnectionEvent, Effect};
use crate::error::{HostError, LossReason, RequestError};
use crate::gpadl::{FIRST_GPADL, Gpadl};
use crate::mmio::MmioSpace;
use crate::offer::OfferedChannel;
use crate::post::{Outbox, PostStatus, Refused, Tag};

use connection::Connection;
pub use requests::{MAX_HVSOCK_REQUESTS, RingRequest};

/// Client endpoints of one guest, waiting ones included.
pub const MAX_CLIENTS: usize = 4096;

/// The guest's control plane. See the module documentation.
#[derive(Debug)]
pub struct Guest {
    config: GuestConfig,
    connection: Connection,
    outbox: Outbox,
    channels: BTreeMap<u32, Channel>,
    clients: BTreeMap<ClientId, Client>,
    gpadls: BTreeMap<u32, Gpadl>,
    mmio: MmioSpace,
    /// The host was told to forget everything and has not said that it did: it may still use
    /// memory.
    reset_pending: bool,
    /// What to report once it did.
    quarantine: Vec<Effect>,
    effects: VecDeque<Effect>,
    next_client: u64,
    next_gpadl: u32,
    next_open: u32,
}

/// Where a connection is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ConnectionState {
    /// Never connected.
    Disconnected,
    /// The host was asked for a version and has not answered.
    Contacting {
        /// The version asked for last.
        version: Version,
    },
    /// Connected.
    Connected {
        /// The version agreed on.
        version: Version,
        /// The features agreed on.
        features: FeatureFlags,
        /// Whether everything is offered that the host had when it was asked.
        offers_delivered: bool,
    },
    /// The host was told to forget everything and has not answered.
    Unloading,
    /// It has.
    Unloaded,
    /// There is no connection any more.
    Lost(LossReason),
}

/// How much a guest keeps. For tests that look for leaks, and for curious owners.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct GuestCounts {
    /// Offers that stand or are not yet released.
    pub channels: usize,
    /// Client endpoints that are not unbound.
    pub clients: usize,
    /// GPADLs that the host may know of.
    pub gpadls: usize,
    /// Messages that wait to be posted, or for a post status.
    pub messages: usize,
    /// Rings and GPADLs given up while the host may still use them.
    pub quarantined: usize,
}

impl Guest {
    /// A guest that has not connected yet.
    ///
    /// # Errors
    /// [`ConfigError`] where `config` makes no sense.
    pub fn new(config: GuestConfig) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            mmio: MmioSpace::new(config.mmio),
            config,
            connection: Connection::Disconnected,
            outbox: Outbox::default(),
            channels: BTreeMap::new(),
            clients: BTreeMap::new(),
            gpadls: BTreeMap::new(),
            reset_pending: false,
            quarantine: Vec::new(),
            effects: VecDeque::new(),
            next_client: 0,
            next_gpadl: FIRST_GPADL,
            next_open: 1,
        })
    }

    /// The next thing to do. To be called until it gives `None`, after every other call.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// The host's answer to the last [`Effect::Post`].
    ///
    /// # Errors
    /// [`RequestError::NothingPosted`] where no message waits for an answer.
    pub fn posted(&mut self, status: PostStatus) -> Result<(), RequestError> {
        let tag = self.outbox.in_flight().ok_or(RequestError::NothingPosted)?;
        match status {
            PostStatus::SUCCESS => {
                self.outbox.settle();
                self.taken(tag);
            }
            // The port for newer versions does not exist: the host knows only older ones.
            PostStatus::INVALID_CONNECTION_ID if tag == Tag::Contact => {
                self.outbox.settle();
                self.contact_older();
            }
            status if status.is_temporary() => match self.outbox.refuse() {
                Refused::Again { attempt, .. } => {
                    self.effects.push_back(Effect::RetryPost { attempt });
                }
                Refused::Dropped => {}
                Refused::GivenUp { attempts } => {
                    self.lose(LossReason::PostRefused { status, attempts });
                }
            },
            status => {
                self.outbox.settle();
                self.lose(LossReason::PostRefused { status, attempts: 1 });
            }
        }
        self.pump();
        Ok(())
    }

    /// The host may have buffers again: posts what it refused.
    pub fn retry_post(&mut self) {
        self.outbox.resume();
        self.pump();
    }

    /// Where the connection is.
    #[must_use]
    pub fn state(&self) -> ConnectionState {
        self.connection.state(&self.config)
    }

    /// The offers that stand, by channel number.
    pub fn offers(&self) -> impl Iterator<Item = &OfferedChannel> {
        self.channels.values().filter(|channel| !channel.rescinded).map(|channel| &channel.offer)
    }

    /// The client endpoint that has a channel.
    #[must_use]
    pub fn client_of(&self, channel_id: u32) -> Option<ClientId> {
        self.channels.get(&channel_id)?.client
    }

    /// How much is kept.
    #[must_use]
    pub fn counts(&self) -> GuestCounts {
        GuestCounts {
            channels: self.channels.len(),
            clients: self.clients.len(),
            gpadls: self.gpadls.len(),
            messages: self.outbox.len(),
            quarantined: self.quarantine.len(),
        }
    }

    /// The host has the message that `tag` belongs to.
    fn taken(&mut self, tag: Tag) {
        match tag {
            Tag::Release(channel_id) => self.released(channel_id),
            Tag::Unload => self.unload_taken(),
            Tag::Modify(channel_id) => self.modify_taken(channel_id),
            Tag::Contact | Tag::Gpadl(_) | Tag::Plain | Tag::Stale => {}
        }
    }

    /// Queues `message`.
    fn send(&mut self, tag: Tag, message: GuestMessage<'_>) {
        self.outbox.push(tag, message.to_buffer());
        self.pump();
    }

    /// Posts the next message if the way is free.
    fn pump(&mut self) {
        if let Some(outgoing) = self.outbox.next() {
            let connection_id = self.connection.message_connection(outgoing.tag, &self.config);
            self.effects.push_back(Effect::Post { connection_id, message: outgoing.message });
        }
    }

    fn tell(&mut self, client: ClientId, event: ClientEvent) {
        self.effects.push_back(Effect::Client { client, event });
    }

    fn announce(&mut self, event: ConnectionEvent) {
        self.effects.push_back(Effect::Connection(event));
    }

    /// Reports that memory is free, or a GPADL gone: now, or when the host no longer uses anything.
    fn let_go(&mut self, effect: Effect) {
        if self.reset_pending {
            self.quarantine.push(effect);
        } else {
            self.effects.push_back(effect);
        }
    }

    /// Takes a message of the host: its payload, as it stood in the message slot.
    ///
    /// # Errors
    /// [`HostError`]; nothing has changed then, except by [`HostError::Contact`].
    pub fn host_message(&mut self, message: &[u8]) -> Result<(), HostError> {
        let result = self.dispatch(message);
        self.pump();
        result
    }
}
