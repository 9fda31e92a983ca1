//! The broker: who wants to be connected to whom, and the connections there are.

mod frozen;
mod guest_side;
mod host_side;
mod restore;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kmcl::{Channel, ServerFlags, Side};
use rustix::event::epoll::EventFlags;
use vmbus_host::HostBus;
use vmbus_wire::offer::HvsockUserDefined;

use crate::connection::{Callbacks, Connection, Names};
use crate::driver::Driver;
use crate::error::SocketError;
use crate::inbox::{Inbox, Requests};
use crate::limits::{FIRST_HOST_PORT, MAX_CONNECTIONS, MAX_HELD_PACKETS, MAX_PACKET_BYTES};
use crate::listener::Listener;
use crate::poller::{EVENTS, Poller, Ready};
use guest_side::Queued;
use host_side::Program;

pub use frozen::{FrozenSockets, SAVED_INTERFACE, SocketsSave};
pub use restore::{AdoptedSockets, RestoringSockets, SocketRestoreError};

/// The poller's names for what is no connection.
const LISTENER: u64 = 0;
const BELL: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// Where the sockets are.
#[derive(Clone, Debug)]
pub struct SocketConfig {
    /// Programs of the host connect to this path; those that wait for the guest's connections to a port
    /// listen at the same path with `_` and the port's number behind it. At most 96 bytes.
    pub path: PathBuf,
    /// Most connections at a time, up to [`MAX_CONNECTIONS`].
    pub max_connections: usize,
}

impl SocketConfig {
    /// Sockets at `path`, as many as may be.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), max_connections: MAX_CONNECTIONS }
    }
}

/// The sockets of one guest; see the [crate].
///
/// Readable ([`AsFd`]) when [`Self::ready`] is to be called. That and [`Self::tick`] may be called from any
/// thread, but not in a callback of one of its channels.
///
/// Dropping it ends all connections, and removes the socket that programs connect to.
pub struct SocketBroker {
    core: Arc<Core>,
}

struct Core {
    bus: HostBus,
    driver: Arc<dyn Driver>,
    config: SocketConfig,
    poller: Arc<Poller>,
    inbox: Arc<Inbox>,
    /// Held by whoever serves: one thread at a time steps connections. None of their callbacks takes it.
    turn: Mutex<Turn>,
}

/// What only the thread that serves looks at.
struct Turn {
    /// `None` once the broker has moved away.
    listener: Option<Listener>,
    /// The poller was asked for programs that connect.
    is_listening: bool,
    /// Programs that connect wait until the next tick: there was no descriptor for one.
    listener_rests: bool,
    /// Programs that have not said yet where they want to be connected.
    programs: BTreeMap<u64, Program>,
    /// The guest's requests to programs that are busy, oldest first.
    queued: VecDeque<Queued>,
    connections: BTreeMap<u64, Entry>,
    next_token: u64,
    /// Of the host's side, for the next connection from the host.
    next_port: u32,
    /// Nothing is done: the broker is being saved or restored.
    stands_still: bool,
    /// Room for a packet to the guest.
    room: Box<[u8]>,
}

struct Entry {
    connection: Arc<Connection>,
    /// Gone when the guest has closed it and bytes for the program are left.
    channel: Option<Channel>,
}

impl Entry {
    /// Whether an offer of these names stands.
    fn has_offered(&self, names: Names) -> bool {
        let Names { service, endpoint, .. } = self.connection.names;
        self.channel.is_some() && (service, endpoint) == (names.service, names.endpoint)
    }
}

/// How many there are.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct SocketCounts {
    /// Connections whose offers stand.
    pub connections: usize,
    /// Connections that the guest has closed, while programs of the host have not taken all of it.
    pub draining: usize,
    /// Programs of the host that have not said where they want to be connected.
    pub programs: usize,
    /// The guest's requests that wait for a busy program of the host.
    pub requests: usize,
}

impl SocketBroker {
    /// Sockets for the guest behind `bus`, whose requests for connections it answers from now on. `driver`
    /// runs their channels.
    ///
    /// # Errors
    /// [`SocketError`]. A socket at the path is replaced only if nobody listens there.
    pub fn new(
        bus: HostBus,
        driver: Arc<dyn Driver>,
        config: SocketConfig,
    ) -> Result<Self, SocketError> {
        let broker = Self { core: Core::new(bus, driver, config)? };
        broker.core.turn().go_on(&broker.core);
        Ok(broker)
    }

    /// Does what is to be done, without waiting. Returns whether there is more.
    pub fn ready(&self) -> bool {
        let core = &self.core;
        let events = core.poller.ready().unwrap_or_else(|error| {
            tracing::error!(%error, "sockets cannot be waited for");
            Vec::new()
        });
        let is_full = events.len() == EVENTS;
        let mut turn = core.turn();
        for event in events {
            turn.on_event(core, event);
        }
        if turn.stands_still {
            core.inbox.bell.clear(); // what it rang for waits
            return is_full;
        }
        turn.read_inbox(core);
        turn.listen(core);
        is_full
    }

    /// Ends what has taken too long. `now` is that of any clock that never goes back; to be called every
    /// [`TICK_PERIOD`](crate::limits::TICK_PERIOD) or so.
    pub fn tick(&self, now: Duration) {
        let core = &self.core;
        let mut turn = core.turn();
        if turn.stands_still {
            return;
        }
        turn.tick_programs(now);
        turn.tick_requests(core, now);
        let overdue: Vec<u64> = turn
            .connections
            .values()
            .filter(|entry| {
                let is_stopped =
                    entry.channel.as_ref().is_some_and(|channel| channel.stop_reason().is_some());
                is_stopped || entry.connection.is_overdue(now)
            })
            .map(|entry| entry.connection.token)
            .collect();
        for token in overdue {
            turn.withdraw(core, token);
        }
        turn.listener_rests = false;
        turn.listen(core);
    }

    /// How many there are.
    #[must_use]
    pub fn counts(&self) -> SocketCounts {
        let turn = self.core.turn();
        let draining = turn.connections.values().filter(|entry| entry.channel.is_none()).count();
        SocketCounts {
            connections: turn.connections.len() - draining,
            draining,
            programs: turn.programs.len(),
            requests: turn.queued.len(),
        }
    }
}

impl AsFd for SocketBroker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.core.poller.as_fd()
    }
}

impl Drop for SocketBroker {
    fn drop(&mut self) {
        self.core.close();
    }
}

impl fmt::Debug for SocketBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketBroker")
            .field("path", &self.core.config.path)
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

impl Core {
    /// A broker that stands still.
    fn new(
        bus: HostBus,
        driver: Arc<dyn Driver>,
        mut config: SocketConfig,
    ) -> Result<Arc<Self>, SocketError> {
        let descriptor = |error: rustix::io::Errno| SocketError::Descriptor(error.into());
        config.max_connections = config.max_connections.min(MAX_CONNECTIONS);
        let listener = Listener::bind(&config.path)?;
        let poller = Arc::new(Poller::new().map_err(descriptor)?);
        let inbox = Arc::new(Inbox::new().map_err(descriptor)?);
        poller.add(&listener, LISTENER, EventFlags::empty()).map_err(descriptor)?;
        poller.add(&inbox.bell, BELL, EventFlags::IN).map_err(descriptor)?;
        bus.set_hvsock_handler(Requests::of(&inbox));
        let turn = Turn {
            listener: Some(listener),
            is_listening: false,
            listener_rests: false,
            programs: BTreeMap::new(),
            queued: VecDeque::new(),
            connections: BTreeMap::new(),
            next_token: FIRST_CONNECTION,
            next_port: FIRST_HOST_PORT,
            stands_still: true,
            room: vec![0; MAX_PACKET_BYTES as usize].into(),
        };
        Ok(Arc::new(Self { bus, driver, config, poller, inbox, turn: Mutex::new(turn) }))
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A channel for a connection, Disabled.
    fn channel(&self, names: Names) -> Result<Channel, kmcl::Error> {
        let Names { service, endpoint, from_host } = names;
        let channel = Channel::allocate(Side::Server, Arc::new(self.bus.clone()));
        prepare(&channel, names)?;
        channel.init_set_friendly_name(&match from_host {
            true => format!("socket to guest port {}", service.data1()),
            false => format!("socket from guest port {}", endpoint.data1()),
        })?;
        Ok(channel)
    }

    /// Offers `connection` to the guest.
    fn offer(&self, connection: &Arc<Connection>) -> Result<Channel, OfferError> {
        let channel = self.channel(connection.names)?;
        let callbacks = Callbacks::of(connection);
        channel.init_set_process_packet_callbacks(Arc::clone(&callbacks) as _)?;
        channel.init_set_state_change_callbacks(callbacks)?;
        self.driver.add_channel(&channel).map_err(OfferError::Driver)?;
        match channel.enable() {
            Ok(()) => {
                channel.start();
                Ok(channel)
            }
            Err(error) => {
                self.remove(channel);
                Err(error.into())
            }
        }
    }

    /// Withdraws a channel, whatever it does: none of the packets in it is waited for.
    fn remove(&self, channel: Channel) {
        self.driver.remove_channel(&channel);
        channel.disable();
        channel.cleanup();
    }

    fn close(&self) {
        let mut turn = self.turn();
        turn.stands_still = true;
        for entry in std::mem::take(&mut turn.connections).into_values() {
            entry.connection.end();
            if let Some(channel) = entry.channel {
                self.remove(channel);
            }
        }
        turn.programs.clear();
        turn.listener = None;
        let refused = (std::mem::take(&mut turn.queued), self.inbox.take());
        drop(turn);
        drop(refused);
    }
}

/// Sets what makes a channel that of a socket connection.
fn prepare(channel: &Channel, names: Names) -> Result<(), kmcl::Error> {
    channel.server_init_set_flags(
        ServerFlags::ENUMERATE_DEVICE_INTERFACE
            | ServerFlags::OFFER_AS_PIPE
            | ServerFlags::TLNPI_PROVIDER_OFFER,
    )?;
    channel.server_init_set_target_interface_id(names.service, names.endpoint)?;
    channel.init_set_user_data(&HvsockUserDefined::new(names.from_host).to_bytes())?;
    channel.init_set_maximum_packet_size(MAX_PACKET_BYTES)?;
    channel.init_set_maximum_completion_size(0)?;
    channel.init_set_maximum_packet_count(MAX_HELD_PACKETS)
}

/// Why a connection was not offered.
#[derive(Debug, thiserror::Error)]
enum OfferError {
    #[error(transparent)]
    Channel(#[from] kmcl::Error),
    #[error("the driver refuses: {0}")]
    Driver(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Turn {
    fn token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    /// Whether another connection may be made.
    fn has_room(&self, core: &Core) -> bool {
        self.connections.len() + self.programs.len() < core.config.max_connections
    }

    /// Asks for programs that connect, if there is room for one: until then they wait in their queue.
    fn listen(&mut self, core: &Core) {
        if !self.is_listening
            && !self.listener_rests
            && self.has_room(core)
            && let Some(listener) = &self.listener
        {
            core.poller.ask(listener, LISTENER, EventFlags::IN);
            self.is_listening = true;
        }
    }

    fn on_event(&mut self, core: &Core, event: Ready) {
        match event.token {
            LISTENER => {
                self.is_listening = false;
                if !self.stands_still {
                    self.accept(core);
                }
            }
            BELL => core.poller.ask(&core.inbox.bell, BELL, EventFlags::IN),
            token => {
                if let Some(entry) = self.connections.get(&token) {
                    entry.connection.told();
                    if !self.stands_still {
                        self.serve(core, event);
                    }
                } else if !self.stands_still {
                    self.hear(core, token);
                }
            }
        }
    }

    /// Moves bytes of a connection.
    fn serve(&mut self, core: &Core, event: Ready) {
        let Some(Entry { connection, channel }) = self.connections.get(&event.token) else {
            return;
        };
        if event.writable {
            connection.program_takes();
        }
        match channel {
            Some(channel) if event.readable => connection.program_sends(channel, &mut self.room),
            None if !connection.is_draining() => {
                self.connections.remove(&event.token);
                self.listen(core);
            }
            _ => connection.ask_again(),
        }
    }

    /// Handles what other threads have left.
    fn read_inbox(&mut self, core: &Core) {
        let waiting = core.inbox.take();
        for request in waiting.requests {
            self.connect(core, request);
        }
        for token in waiting.ended {
            self.withdraw(core, token);
        }
    }

    /// Ends a connection for the guest. What is left for its program is still written.
    fn withdraw(&mut self, core: &Core, token: u64) {
        let Some(entry) = self.connections.get_mut(&token) else { return };
        let keeps = entry.connection.is_draining();
        if !keeps {
            entry.connection.end();
        }
        let channel = entry.channel.take();
        if !keeps {
            self.connections.remove(&token);
        }
        if let Some(channel) = channel {
            core.remove(channel);
        }
    }

    /// Goes on after standing still.
    fn go_on(&mut self, core: &Core) {
        self.stands_still = false;
        for entry in self.connections.values() {
            entry.connection.go_on();
        }
        for (token, program) in &mut self.programs {
            program.go_on(core, *token);
        }
        self.queued.iter_mut().for_each(Queued::go_on);
        self.is_listening = false;
        self.listen(core);
        core.inbox.bell.ring();
    }
}
