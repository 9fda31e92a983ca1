//! [`GuestBus`]: a [`Guest`] with memory, a transport, and channels that use it.

mod interrupt_page;
mod link;
mod port;
mod ring;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kmcl::bus::{
    Bus, BusEvent, ClientLink, Doorbell, Endpoint, EventSink, Offer, OpenRings, ServerLink, Target,
};
use vmbus_memory::{GuestMemory, MappingBudget, MemoryError, PageAllocator};
use vmbus_wire::guid::Guid;
use vmbus_wire::message::MessageBuffer;
use vmbus_wire::status::NtStatus;

use crate::config::{ConfigError, GuestConfig};
use crate::effect::{ClientEvent, ClientId, ConnectionEvent, Effect};
use crate::error::{HostError, RequestError};
use crate::machine::{ConnectionState, Guest, GuestCounts};
use crate::offer::OfferedChannel;
use crate::post::PostStatus;

use interrupt_page::InterruptPage;
use link::GuestLink;
pub use port::{HostPort, Posted};
use ring::Ring;

/// Messages of a misbehaving host that are logged one by one; later, only every time their number
/// has doubled.
const LOGGED_ERRORS: u64 = 16;

/// A guest's VMBus connection: [`kmcl::bus::Bus`] for client endpoints. A clone is another handle
/// to the same connection; everything may be called from any thread, and nothing blocks.
///
/// The owner of the transport feeds [`GuestBus::host_message`], [`GuestBus::message_posted`] and
/// [`GuestBus::host_gone`]; the bus talks to the transport through [`HostPort`]. No lock is held
/// across a call to it or to a channel.
#[derive(Clone)]
pub struct GuestBus(Arc<Shared>);

struct Shared {
    port: Arc<dyn HostPort>,
    pages: PageAllocator,
    budget: MappingBudget,
    interrupt_page: Option<InterruptPage>,
    state: Mutex<State>,
}

struct State {
    guest: Guest,
    clients: HashMap<ClientId, Endpoint>,
    /// By the handle of the ring's GPADL. Dropping one frees its pages.
    rings: HashMap<u32, Ring>,
    /// What is to be done outside the lock, in order.
    actions: VecDeque<Action>,
    /// A thread is doing it.
    acting: bool,
    host_errors: u64,
}

/// Something to do outside the lock.
enum Action {
    Post {
        connection_id: u32,
        message: MessageBuffer,
    },
    RetryPost {
        attempt: u32,
    },
    Tell {
        events: EventSink,
        event: BusEvent,
    },
    /// To be dropped: what a transport has made is not destroyed under our lock.
    Discard(Box<OpenRings>),
    Release(Ring),
    Announce(ConnectionEvent),
}

/// How much a guest bus keeps.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BusCounts {
    /// The control plane's.
    pub guest: GuestCounts,
    /// Rings whose pages are not free: in use by a channel, or not let go of by the host.
    pub rings: usize,
    /// Pages that are free for rings and buffers.
    pub free_pages: u64,
}

/// Why a guest bus could not be made.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestBusError {
    /// The configuration makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No page for the interrupt page of old versions.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl GuestBus {
    /// A bus that is not connected yet. Rings, client buffers and, where `config` lists versions
    /// below 2.4 and names none, the interrupt page come out of `pages`.
    ///
    /// # Errors
    /// [`GuestBusError`].
    pub fn new(
        mut config: GuestConfig,
        pages: PageAllocator,
        port: Arc<dyn HostPort>,
    ) -> Result<Self, GuestBusError> {
        let legacy = config.versions.iter().any(|version| !version.has_event_flags_page());
        let interrupt_page = if legacy && config.interrupt_page.is_none() {
            let page = InterruptPage::allocate(&pages)?;
            config.interrupt_page = Some(page.gpa());
            Some(page)
        } else {
            None
        };
        Ok(Self(Arc::new(Shared {
            port,
            pages,
            budget: MappingBudget::default(),
            interrupt_page,
            state: Mutex::new(State {
                guest: Guest::new(config)?,
                clients: HashMap::new(),
                rings: HashMap::new(),
                actions: VecDeque::new(),
                acting: false,
                host_errors: 0,
            }),
        })))
    }

    /// See [`Guest::connect`].
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn connect(&self) -> Result<(), RequestError> {
        self.0.with(|state| state.guest.connect())
    }

    /// See [`Guest::unload`].
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn unload(&self) -> Result<(), RequestError> {
        self.0.with(|state| state.guest.unload())
    }

    /// Takes a message of the host.
    ///
    /// # Errors
    /// [`HostError`], which is also logged, at a bounded rate.
    pub fn host_message(&self, message: &[u8]) -> Result<(), HostError> {
        let (result, errors) = self.0.with(|state| {
            let result = state.guest.host_message(message);
            state.host_errors += u64::from(result.is_err());
            (result, state.host_errors)
        });
        if let Err(error) = &result
            && (errors <= LOGGED_ERRORS || errors.is_power_of_two())
        {
            tracing::warn!(%error, errors, "message of the host refused");
        }
        result
    }

    /// The host's answer to the last message posted, where [`HostPort::post_message`] said
    /// [`Posted::Later`].
    ///
    /// # Errors
    /// [`RequestError::NothingPosted`].
    pub fn message_posted(&self, status: PostStatus) -> Result<(), RequestError> {
        self.0.with(|state| state.guest.posted(status))
    }

    /// Posts again what the host had no buffer for.
    pub fn retry_post(&self) {
        self.0.with(|state| state.guest.retry_post());
    }

    /// The transport has lost the host. Every client endpoint is told at once.
    pub fn host_gone(&self) {
        self.0.with(|state| state.guest.host_gone());
    }

    /// The host has interrupted the guest with `event_flag`, on a transport that has no descriptor
    /// per channel: rings the doorbell of the channel that has this flag.
    pub fn interrupt(&self, event_flag: u16) {
        if let Some(doorbell) = self.0.lock().doorbell(u32::from(event_flag)) {
            doorbell.ring();
        }
    }

    /// The host has interrupted a guest of a version below 2.4: rings the doorbell of each channel
    /// whose bit is set in the interrupt page, and clears the bits.
    pub fn legacy_interrupt(&self) {
        let Some(page) = &self.0.interrupt_page else { return };
        for channel_id in page.take_pending() {
            self.interrupt(channel_id);
        }
    }

    /// See [`Guest::modify_channel`].
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn modify_channel(&self, channel_id: u32, target_vp: u32) -> Result<(), RequestError> {
        self.0.with(|state| state.guest.modify_channel(channel_id, target_vp))
    }

    /// See [`Guest::modify_connection`].
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn modify_connection(&self, pages: Option<(u64, u64)>) -> Result<(), RequestError> {
        self.0.with(|state| state.guest.modify_connection(pages))
    }

    /// See [`Guest::pause`].
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn pause(&self) -> Result<(), RequestError> {
        self.0.with(|state| state.guest.pause())
    }

    /// See [`Guest::resume`].
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn resume(&self) -> Result<(), RequestError> {
        self.0.with(|state| state.guest.resume())
    }

    /// See [`Guest::connect_hvsock`]. A client endpoint that waits for the pair is told of a
    /// refusal by [`BusEvent::ConnectFailed`].
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn connect_hvsock(
        &self,
        endpoint_id: Guid,
        service_id: Guid,
        silo_id: Option<Guid>,
    ) -> Result<(), RequestError> {
        self.0.with(|state| state.guest.connect_hvsock(endpoint_id, service_id, silo_id))
    }

    /// Where the connection is.
    #[must_use]
    pub fn state(&self) -> ConnectionState {
        self.0.lock().guest.state()
    }

    /// The offers that stand, by channel number.
    #[must_use]
    pub fn offers(&self) -> Vec<OfferedChannel> {
        self.0.lock().guest.offers().cloned().collect()
    }

    /// The memory that rings and buffers come from.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        self.0.pages.memory()
    }

    /// The pages that rings and buffers come from.
    #[must_use]
    pub fn pages(&self) -> &PageAllocator {
        &self.0.pages
    }

    /// How much is kept.
    #[must_use]
    pub fn counts(&self) -> BusCounts {
        let state = self.0.lock();
        BusCounts {
            guest: state.guest.counts(),
            rings: state.rings.len(),
            free_pages: self.0.pages.free_pages(),
        }
    }
}

impl std::fmt::Debug for GuestBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestBus").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl Bus for GuestBus {
    /// Always [`NtStatus::NOT_SUPPORTED`]: only hosts offer.
    fn offer(&self, _: Offer, _: Endpoint) -> Result<Box<dyn ServerLink>, NtStatus> {
        Err(NtStatus::NOT_SUPPORTED)
    }

    fn bind(&self, target: Target, endpoint: Endpoint) -> Result<Box<dyn ClientLink>, NtStatus> {
        let id = self.0.with(|state| {
            let id = state.guest.bind(target).map_err(|error| error.status())?;
            state.clients.insert(id, endpoint);
            Ok::<_, NtStatus>(id)
        })?;
        Ok(Box::new(GuestLink::new(Arc::clone(&self.0), id)))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing of ours panics under the lock, and a half-made change is bounded by the checks.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `change` under the lock, then whatever follows from it outside.
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        state.collect();
        self.act(state);
        result
    }

    /// Performs actions until none is left. One thread at a time does so, and so in order; what
    /// others add meanwhile, this thread performs as well.
    fn act<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        if state.acting {
            return;
        }
        while let Some(action) = state.actions.pop_front() {
            state.acting = true;
            drop(state);
            let resume = ResumeOnUnwind(self);
            let answer = self.perform(action);
            std::mem::forget(resume);
            state = self.lock();
            state.acting = false;
            if let Some(status) = answer {
                // The port answers what it was given: something is in flight.
                let _answered = state.guest.posted(status);
                state.collect();
            }
        }
    }

    fn perform(&self, action: Action) -> Option<PostStatus> {
        match action {
            Action::Post { connection_id, message } => {
                match self.port.post_message(connection_id, &message) {
                    Posted::Answered(status) => return Some(status),
                    Posted::Later => {}
                }
            }
            Action::RetryPost { attempt } => self.port.retry_post_later(attempt),
            Action::Tell { events, event } => {
                events.post(event);
            }
            Action::Discard(rings) => drop(rings),
            Action::Release(ring) => drop(ring),
            Action::Announce(event) => self.port.connection_changed(&event),
        }
        None
    }
}

/// Lets the next thread act if a port or a waker panics.
struct ResumeOnUnwind<'a>(&'a Shared);

impl Drop for ResumeOnUnwind<'_> {
    fn drop(&mut self) {
        self.0.lock().acting = false;
    }
}

impl State {
    /// Turns what the state machine wants done into actions, which own what they need.
    fn collect(&mut self) {
        while let Some(effect) = self.guest.next_effect() {
            let action = match effect {
                Effect::Post { connection_id, message } => Action::Post { connection_id, message },
                Effect::RetryPost { attempt } => Action::RetryPost { attempt },
                Effect::Connection(event) => Action::Announce(event),
                Effect::RingReleased { gpadl } => match self.rings.remove(&gpadl) {
                    Some(ring) => Action::Release(ring),
                    None => continue,
                },
                Effect::Client { client, event } => {
                    self.tell(client, event);
                    continue;
                }
            };
            self.actions.push_back(action);
        }
    }

    fn tell(&mut self, client: ClientId, event: ClientEvent) {
        let event = match event {
            ClientEvent::Offered { offer, mmio } => {
                BusEvent::Offered { interface_instance: offer.interface_instance, mmio }
            }
            ClientEvent::Opened { gpadl } => {
                let rings = self.rings.get_mut(&gpadl).and_then(Ring::take);
                BusEvent::OpenCompleted(rings.ok_or(NtStatus::INVALID_DEVICE_STATE))
            }
            ClientEvent::OpenFailed { gpadl, status } => {
                let rings = self.rings.get_mut(&gpadl).and_then(Ring::take);
                self.actions.extend(rings.map(|rings| Action::Discard(Box::new(rings))));
                BusEvent::OpenCompleted(Err(status))
            }
            ClientEvent::GpadlCreated { gpadl, status } => BusEvent::GpadlCreated { gpadl, status },
            ClientEvent::GpadlTornDown { gpadl } => BusEvent::GpadlTornDown { gpadl },
            ClientEvent::Rescinded => BusEvent::Rescinded,
            ClientEvent::ConnectFailed(status) => BusEvent::ConnectFailed(status),
        };
        self.post_event(client, event);
    }

    fn post_event(&mut self, client: ClientId, event: BusEvent) {
        if let Some(endpoint) = self.clients.get(&client) {
            let events = endpoint.events.clone();
            self.actions.push_back(Action::Tell { events, event });
        }
    }

    fn doorbell(&self, channel_id: u32) -> Option<Arc<dyn Doorbell>> {
        let client = self.guest.client_of(channel_id)?;
        self.clients.get(&client).map(|endpoint| Arc::clone(&endpoint.doorbell))
    }
}
