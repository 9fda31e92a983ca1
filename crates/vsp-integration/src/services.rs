//! The device: the protocol on three channels of the library.

mod end;
mod frozen;
mod restore;
mod save;

use std::error::Error as StdError;
use std::fmt;
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use kmcl::bus::Bus;
use kmcl::{Channel, ChannelFlags, Guid, SendFlags, ServerFlags, Side};

use self::end::End;
use crate::driver::{Driver, Observer};
use crate::protocol::{
    Clocks, HeartbeatStatus, Message, Outcome, Phase, Protocol, ShutdownError, ShutdownRequest,
};
use crate::wire::{MAX_MESSAGE_BYTES, Service};

pub use self::frozen::FrozenServices;
pub use self::restore::{RestoreServiceError, RestoringServices, ServicesRestoreError, StartError};
pub use self::save::{SavedStream, ServicesSave, StreamSave, StreamSaveError};

/// Answers of a guest that are delivered at a time. It has one request of each service to answer, and
/// none is kept.
const PACKETS_PER_CHANNEL: u32 = 8;

/// The interface type in the header of the services' saved state. It stands for the three together, and
/// no guest sees it.
pub const STATE_INTERFACE: Guid = Guid::from_u128(0x1d62_55a5_4c0b_4c5e_9a53_86f0_5f2b_7e61);

/// How the services show themselves.
#[derive(Clone, Debug)]
pub struct IntegrationConfig {
    /// What log lines and saved states call them.
    pub name: String,
}

impl Default for IntegrationConfig {
    fn default() -> Self {
        Self { name: String::from("integration") }
    }
}

/// Why a call on the services was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IntegrationError {
    /// The library or the bus refuses.
    #[error("{service}: the channel cannot be offered: {why}")]
    Channel {
        /// Which service.
        service: Service,
        /// Why.
        #[source]
        why: kmcl::Error,
    },
    /// The driver refuses.
    #[error("{service}: the channel cannot be driven: {why}")]
    Driver {
        /// Which service.
        service: Service,
        /// Why.
        #[source]
        why: Box<dyn StdError + Send + Sync>,
    },
    /// They are being closed.
    #[error("the integration services are closed")]
    Closed,
    /// They are frozen, to be saved.
    #[error("the integration services are being saved")]
    Held,
    /// The state cannot be said in the version of the format that was asked for.
    #[error(transparent)]
    Format(#[from] saved_state::WriteError),
}

/// The integration services of a guest; see the [crate].
///
/// Dropping them withdraws them, as [`IntegrationServices::close`] does.
pub struct IntegrationServices {
    core: Arc<Core>,
}

/// What the services and their channels share.
struct Core {
    myself: Weak<Self>,
    driver: Arc<dyn Driver>,
    observer: Arc<dyn Observer>,
    config: IntegrationConfig,
    state: Mutex<State>,
    /// [`State::steps`] has come to 0.
    idle: Condvar,
    /// In the order of [`Service::ALL`]; none after the end.
    channels: RwLock<Vec<Channel>>,
}

struct State {
    protocol: Protocol,
    /// They are frozen: nobody but the channels' callbacks makes steps, and these do not run.
    is_held: bool,
    /// Calls of the owner that have stepped the protocol, and not sent what came of it.
    steps: u32,
}

/// A lock whose holder panicked guards data that is still whole: every change to it is a single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl IntegrationServices {
    /// The services for the guest behind `bus`, not offered yet. `driver` runs them, `observer` learns
    /// what happens.
    ///
    /// # Errors
    /// [`IntegrationError::Channel`], [`IntegrationError::Driver`].
    pub fn new(
        bus: Arc<dyn Bus>,
        driver: Arc<dyn Driver>,
        observer: Arc<dyn Observer>,
        config: IntegrationConfig,
    ) -> Result<Self, IntegrationError> {
        Self::with(bus, driver, observer, config, Protocol::default())
    }

    fn with(
        bus: Arc<dyn Bus>,
        driver: Arc<dyn Driver>,
        observer: Arc<dyn Observer>,
        config: IntegrationConfig,
        protocol: Protocol,
    ) -> Result<Self, IntegrationError> {
        let core = Arc::new_cyclic(|myself| Core {
            myself: myself.clone(),
            driver,
            observer,
            config,
            state: Mutex::new(State { protocol, is_held: false, steps: 0 }),
            idle: Condvar::new(),
            channels: RwLock::default(),
        });
        let services = Self { core };
        for service in Service::ALL {
            services.core.add_channel(&bus, service)?;
        }
        Ok(services)
    }

    /// Offers the services to the guest.
    ///
    /// # Errors
    /// [`IntegrationError::Channel`], also if they are offered already.
    pub fn offer(&self) -> Result<(), IntegrationError> {
        self.core.enable()?;
        self.core.channels().iter().for_each(Channel::start);
        Ok(())
    }

    /// Does what is due. To be called about once a second, by whoever has a clock, and right after
    /// [`RestoringServices::start`]; more often does no harm. Does nothing while the services are
    /// frozen.
    ///
    /// Both clocks are to be read together. While the guest stands still this is not to be called: it
    /// would be taken for dead.
    pub fn tick(&self, clocks: Clocks) {
        for service in Service::ALL {
            let can_send = self.core.can_send(service);
            let step = |protocol: &mut Protocol| protocol.tick(service, clocks, can_send);
            if self.core.step(service, step).is_none() {
                return; // frozen
            }
        }
    }

    /// The guest's clock may be wrong, because the guest stood still: with the next tick it is told to
    /// set it. Nobody has to say so after a restore or a thaw.
    pub fn resync(&self) {
        lock(&self.core.state).protocol.resync();
    }

    /// Asks the guest for a shutdown. What it answers, the observer learns
    /// ([`Event::ShutdownEnded`](crate::Event::ShutdownEnded)); that it is done, whoever runs the
    /// machine: by its power-off or reset.
    ///
    /// `reason` is a text for people. It ends at its first zero.
    ///
    /// # Errors
    /// [`ShutdownError`]; the guest was not asked.
    pub fn request_shutdown(
        &self,
        request: ShutdownRequest,
        reason: &str,
    ) -> Result<(), ShutdownError> {
        let mut refused = None;
        let can_send = self.core.can_send(Service::Shutdown);
        let step = |protocol: &mut Protocol| {
            protocol.request_shutdown(request, reason, can_send).unwrap_or_else(|error| {
                refused = Some(error);
                Outcome::default()
            })
        };
        self.core.step(Service::Shutdown, step).ok_or(ShutdownError::Held)?;
        refused.map_or(Ok(()), Err)
    }

    /// The shutdown that was asked for and not answered.
    #[must_use]
    pub fn shutdown_asked(&self) -> Option<ShutdownRequest> {
        lock(&self.core.state).protocol.shutdown_asked()
    }

    /// What is known of the guest's life.
    #[must_use]
    pub fn heartbeat(&self) -> HeartbeatStatus {
        lock(&self.core.state).protocol.heartbeat()
    }

    /// How far `service` and the guest have come to terms.
    #[must_use]
    pub fn phase(&self, service: Service) -> Phase {
        lock(&self.core.state).protocol.phase(service)
    }

    /// The channel of `service`, to look at.
    #[must_use]
    pub fn channel(&self, service: Service) -> Option<Channel> {
        self.core.channel(service)
    }

    /// Withdraws the services from the guest, and returns when nothing of them is left. Not to be
    /// called in a callback of theirs.
    pub fn close(self) {
        drop(self);
    }
}

impl fmt::Debug for IntegrationServices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntegrationServices")
            .field("name", &self.core.config.name)
            .field("phases", &Service::ALL.map(|service| self.phase(service)))
            .finish_non_exhaustive()
    }
}

impl Drop for IntegrationServices {
    fn drop(&mut self) {
        self.core.close();
    }
}

impl Core {
    fn channels(&self) -> RwLockReadGuard<'_, Vec<Channel>> {
        self.channels.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn channels_mut(&self) -> RwLockWriteGuard<'_, Vec<Channel>> {
        self.channels.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn channel(&self, service: Service) -> Option<Channel> {
        self.channels().get(service.index()).cloned()
    }

    /// Makes the channel of `service`, the next one.
    fn add_channel(&self, bus: &Arc<dyn Bus>, service: Service) -> Result<(), IntegrationError> {
        let channel = Channel::allocate(Side::Server, Arc::clone(bus));
        let core = self.myself.upgrade().ok_or(IntegrationError::Closed)?;
        let end = Arc::new(End { core, service });
        set_up(&channel, service, &self.config.name, end)
            .map_err(|why| IntegrationError::Channel { service, why })?;
        self.driver
            .add_channel(&channel)
            .map_err(|why| IntegrationError::Driver { service, why })?;
        self.channels_mut().push(channel);
        Ok(())
    }

    fn enable(&self) -> Result<(), IntegrationError> {
        for service in Service::ALL {
            let channel = self.channel(service).ok_or(IntegrationError::Closed)?;
            channel.enable().map_err(|why| IntegrationError::Channel { service, why })?;
        }
        Ok(())
    }

    /// A step that the owner makes; `None`, and no step, while the services are frozen.
    ///
    /// What comes of it is sent after the lock is released, so a freeze waits for it: a saved state that
    /// says "asked" has the question in its channel's ring.
    fn step(&self, service: Service, step: impl FnOnce(&mut Protocol) -> Outcome) -> Option<()> {
        let (outcome, turn) = {
            let mut state = lock(&self.state);
            if state.is_held {
                return None;
            }
            let outcome = step(&mut state.protocol);
            state.steps += 1;
            (outcome, Turn(self))
        };
        if let Some(message) = outcome.message {
            self.send(service, &message);
        }
        drop(turn);
        if let Some(event) = outcome.event {
            self.observer.happened(event);
        }
        Some(())
    }

    /// Whether no message waits for room in the ring of `service`.
    fn can_send(&self, service: Service) -> bool {
        self.channel(service).is_some_and(|channel| channel.outgoing_in_use().0 == 0)
    }

    fn send(&self, service: Service, message: &Message) {
        let Some(channel) = self.channel(service) else { return };
        let sent =
            channel.packet_allocate().ok_or(kmcl::Error::Resources("packets")).and_then(|packet| {
                packet.send(message, None, SendFlags::empty()).map_err(|refused| refused.error)
            });
        // The channel is closing: the protocol hears of it in a moment.
        if let Err(error) = sent {
            tracing::debug!(%error, %service, "message not sent");
        }
    }

    /// See [`IntegrationServices::close`].
    fn close(&self) {
        let channels = std::mem::take(&mut *self.channels_mut());
        for channel in &channels {
            self.driver.remove_channel(channel);
        }
        // From here on this thread drives them.
        for channel in channels {
            channel.disable();
            channel.cleanup();
        }
    }
}

/// A step of the owner that has not sent what came of it.
struct Turn<'a>(&'a Core);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.steps -= 1;
        if state.steps == 0 {
            self.0.idle.notify_all();
        }
    }
}

/// Tells the library what the channel of `service` is.
fn set_up(
    channel: &Channel,
    service: Service,
    name: &str,
    end: Arc<End>,
) -> Result<(), kmcl::Error> {
    // A constant: 2080.
    let message_bytes = u32::try_from(MAX_MESSAGE_BYTES).unwrap_or(u32::MAX);
    channel.init_set_flags(ChannelFlags::IS_PIPE)?;
    channel.server_init_set_flags(ServerFlags::OFFER_AS_PIPE)?;
    channel.init_set_friendly_name(&format!("{name}/{service}"))?;
    channel.init_set_maximum_packet_size(message_bytes)?;
    // Guests ask for no completions; one that does gets them bare.
    channel.init_set_maximum_completion_size(0)?;
    channel.init_set_maximum_packet_count(PACKETS_PER_CHANNEL)?;
    channel.init_set_process_packet_callbacks(Arc::clone(&end) as _)?;
    channel.init_set_state_change_callbacks(Arc::clone(&end) as _)?;
    channel.server_init_set_save_restore_packet_callbacks(end)?;
    channel.server_init_set_target_interface_id(service.interface(), service.instance())
}
