//! The host as a bus: the state machine, the devices it serves, and the way to their guest.
//!
//! One lock guards the state. It is held for a step and never while a port, a device's mailbox, a
//! doorbell or an hvsock handler is called, so none of these can deadlock with it, whatever they do.
//! What a step wants done waits in a queue; the thread that finds nobody at work performs it, in
//! order, until nothing is left; others leave their share to it and return. A channel's signal has a
//! lock of its own, taken last, under which only the port's signal is called.
//!
//! A bus that is *held* does nothing of its own accord: no message is taken from the guest or given to
//! it, and no effect is performed. Devices are heard all the same, so that none of them has to wait. That
//! is the condition in which it is saved ([`held`]), and in which one that is restored waits for its
//! devices and its guest ([`restoring`]).

mod held;
mod perform;
mod restoring;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use kmcl::bus::{Bus, ClientLink, Doorbell, Endpoint, Offer, ServerLink, Target};
use vmbus_memory::{GuestMemory, MappingBudget};
use vmbus_wire::status::NtStatus;

use crate::connection::{CONNECTION_ID_MASK, INTERRUPT_PAGE_CONNECTION, MESSAGE_CONNECTION};
use crate::effect::Effect;
use crate::error::{PostError, SignalError};
use crate::host::{Config, Host, Usage};
use crate::hvsock_handler::HvsockHandler;
use crate::limits::MAX_WAITING_EFFECTS;
use crate::link::HostLink;
use crate::offer::{OfferError, OfferId, OfferParams};
use crate::outgoing::SlotId;
use crate::port::{GuestPort, Posted};
use crate::refused::LogGate;
use crate::shape::GuestShape;
use crate::signal::{self, ChannelSignal};

use restoring::Restoring;

pub use held::{BusSave, HeldBus};
pub use restoring::{ChangedOffer, FinishRestoreError, OffersDiffer};

/// The VMBus of one guest, seen from the host. A clone is another handle to it.
///
/// Devices use it as a [`Bus`]; a transport brings it what comes from the guest, as [`GuestPort`]
/// says. Every method may be called from any thread, and returns at once: what it causes may be
/// performed by another thread that is at work already.
#[derive(Clone)]
pub struct HostBus {
    shared: Arc<Shared>,
}

struct Shared {
    port: Arc<dyn GuestPort>,
    budget: MappingBudget,
    inner: Mutex<Inner>,
    /// Told when no thread is at work any more.
    idle: Condvar,
}

struct Inner {
    /// Shared with saves that are under way, for which it stays as it was: a step that comes meanwhile
    /// makes a copy.
    host: Arc<Host>,
    memory: Option<GuestMemory>,
    /// The devices whose offers have a link.
    devices: BTreeMap<OfferId, Arc<Endpoint>>,
    /// What runs for the channels whose device was told that they are opened.
    active: BTreeMap<OfferId, Active>,
    hvsock: Option<Arc<dyn HvsockHandler>>,
    /// What steps want done, oldest first.
    effects: VecDeque<Effect>,
    /// The thread at work on `effects` and messages.
    worker: Option<ThreadId>,
    /// Who wants the bus to stand still: each [`HeldBus`], and a restore.
    holds: usize,
    /// The guest goes on elsewhere.
    moved_away: bool,
    /// Until the restore is finished.
    restoring: Option<Restoring>,
    /// Slots found full since the guest last emptied one.
    full: Vec<SlotId>,
    /// How often the guest has emptied slots.
    drained: u64,
    refused: LogGate,
}

#[derive(Clone)]
struct Active {
    signal: Arc<ChannelSignal>,
    connection_id: u32,
    doorbell: Arc<dyn Doorbell>,
}

impl Inner {
    fn new(host: Host, memory: Option<GuestMemory>) -> Self {
        Self {
            host: Arc::new(host),
            memory,
            devices: BTreeMap::new(),
            active: BTreeMap::new(),
            hvsock: None,
            effects: VecDeque::new(),
            worker: None,
            holds: 0,
            moved_away: false,
            restoring: None,
            full: Vec::new(),
            drained: 0,
            refused: LogGate::default(),
        }
    }

    /// Whether the bus does nothing of its own accord.
    fn stands_still(&self) -> bool {
        self.holds != 0 || self.moved_away
    }

    /// One step of the state machine. What it wants done waits.
    fn step<R>(&mut self, step: impl FnOnce(&mut Host, &mut Vec<Effect>) -> R) -> R {
        let mut effects = Vec::new();
        let result = step(Arc::make_mut(&mut self.host), &mut effects);
        self.effects.extend(effects);
        result
    }
}

impl HostBus {
    /// A bus to the guest behind `port`, with the default mapping budget for its rings.
    #[must_use]
    pub fn new(port: Arc<dyn GuestPort>, config: Config) -> Self {
        Self::with_budget(port, config, MappingBudget::default())
    }

    /// A bus to the guest behind `port`, whose rings take their mappings from `budget`.
    #[must_use]
    pub fn with_budget(port: Arc<dyn GuestPort>, config: Config, budget: MappingBudget) -> Self {
        let memory = port.memory();
        let shape = shape(port.vp_count(), memory.as_ref());
        Self::of(port, budget, Inner::new(Host::new(config, shape), memory))
    }

    fn of(port: Arc<dyn GuestPort>, budget: MappingBudget, inner: Inner) -> Self {
        let (inner, idle) = (Mutex::new(inner), Condvar::new());
        Self { shared: Arc::new(Shared { port, budget, inner, idle }) }
    }

    /// Takes a message that the guest has posted to `connection_id` (HvPostMessage with message type
    /// 1). `message` is a private copy of the payload. While the bus is held, every message is
    /// [`PostError::Busy`].
    ///
    /// # Errors
    /// [`PostError`]; [`PostError::hypercall_status`] is what the guest gets.
    pub fn post_message(&self, connection_id: u32, message: &[u8]) -> Result<(), PostError> {
        let mut inner = self.lock();
        let waiting = inner.effects.len();
        if waiting >= MAX_WAITING_EFFECTS || inner.stands_still() {
            return Err(PostError::Busy { waiting });
        }
        let result =
            inner.step(|host, effects| host.guest_message(connection_id, message, effects));
        let logged = match result {
            Err(_) => inner.refused.count(),
            Ok(()) => None,
        };
        drop(inner);
        if let (Err(error), Some(number)) = (&result, logged) {
            tracing::warn!(%error, number, "message from the guest refused");
        }
        self.work();
        result
    }

    /// [`HostBus::post_message`] for a transport that has one way to post only.
    ///
    /// # Errors
    /// As for [`HostBus::post_message`].
    pub fn guest_message(&self, message: &[u8]) -> Result<(), PostError> {
        self.post_message(MESSAGE_CONNECTION, message)
    }

    /// The guest has signalled a connection (HvSignalEvent), and the port has not rung the doorbell
    /// by itself.
    ///
    /// # Errors
    /// [`SignalError`]; [`SignalError::hypercall_status`] is what the guest gets.
    pub fn guest_signal(&self, connection_id: u32, flag: u16) -> Result<(), SignalError> {
        if flag != 0 {
            return Err(SignalError::UnknownFlag { flag });
        }
        let doorbells = self.signalled(connection_id & CONNECTION_ID_MASK);
        let doorbells = doorbells.ok_or(SignalError::UnknownConnection { connection_id })?;
        for doorbell in doorbells {
            doorbell.ring();
        }
        Ok(())
    }

    fn signalled(&self, connection_id: u32) -> Option<Vec<Arc<dyn Doorbell>>> {
        let inner = self.lock();
        let doorbell_of = |active: &Active| Arc::clone(&active.doorbell);
        if connection_id != INTERRUPT_PAGE_CONNECTION {
            let listens = |active: &&Active| active.connection_id == connection_id;
            return inner.active.values().find(listens).map(|active| vec![doorbell_of(active)]);
        }
        let page = inner.host.connection().established()?.interrupt_page?;
        let bits = signal::take_guest_bits(inner.memory.as_ref()?, page);
        let offers = bits.iter().filter_map(|channel_id| inner.host.offer_of(*channel_id));
        Some(offers.filter_map(|offer| inner.active.get(&offer).map(doorbell_of)).collect())
    }

    /// The guest has emptied a message slot that was busy.
    pub fn messages_drained(&self) {
        let mut inner = self.lock();
        inner.drained = inner.drained.wrapping_add(1);
        inner.full.clear();
        drop(inner);
        self.work();
    }

    /// The guest was reset, is gone, or is there for the first time: asks the port for memory and
    /// processors anew. Devices that have something of the former guest's are told that it has
    /// closed; the next guest's INITIATE_CONTACT is answered when they have let go.
    pub fn guest_reset(&self) {
        let memory = self.shared.port.memory();
        let shape = shape(self.shared.port.vp_count(), memory.as_ref());
        let mut inner = self.lock();
        if inner.moved_away {
            return;
        }
        // In one breath: an open must not find the old request and the new memory.
        inner.memory = memory;
        inner.step(|host, effects| host.guest_reset(shape, effects));
        if inner.restoring.is_some() {
            inner.step(|host, _| host.devices_hold_nothing()); // they were not told of any open
        }
        inner.full.clear();
        drop(inner);
        self.work();
    }

    /// Who answers the guest's requests for socket connections. Without a handler they are refused.
    pub fn set_hvsock_handler(&self, handler: Arc<dyn HvsockHandler>) {
        let former = self.lock().hvsock.replace(handler);
        drop(former); // foreign code, not under the lock
    }

    /// How much of what is bounded is taken.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.lock().host.usage()
    }

    /// Channels for which signals are exchanged with the guest.
    #[must_use]
    pub fn active_channels(&self) -> usize {
        self.lock().active.len()
    }

    /// Looks at the state. `look` must not call the bus.
    pub fn inspect<R>(&self, look: impl FnOnce(&Host) -> R) -> R {
        look(&self.lock().host)
    }

    /// One step of the state machine, and what follows from it. Nothing, if the guest goes on elsewhere.
    pub(crate) fn step(&self, step: impl FnOnce(&mut Host, &mut Vec<Effect>)) {
        self.feed(step);
        self.work();
    }

    /// A device withdraws its offer. Returns whether it was only taken back, on a bus that is being
    /// restored: the offer waits for another device then, and this one has nothing more to say of it.
    pub(crate) fn revoke(&self, offer: OfferId) -> bool {
        if self.takes_back(offer) {
            let device = self.lock().devices.remove(&offer);
            drop(device); // foreign code, not under the lock
            return true;
        }
        self.step(|host, effects| host.revoke(offer, effects));
        false
    }

    /// The device of an offer takes no further events. Its rings are gone, or going with it.
    pub(crate) fn drop_device(&self, offer: OfferId) {
        let was_taken_back = self.takes_back(offer);
        let device = self.lock().devices.remove(&offer);
        if !was_taken_back {
            self.step(|host, effects| {
                host.closed(offer, effects); // first: the guest gets its answers before the rescind
                host.revoke(offer, effects);
            });
        }
        drop(device); // foreign code, not under the lock
    }

    /// The device of an offer takes no further events, and signals nobody; what the guest has of it stays
    /// as it is. If the guest closes the channel here, it finds it closed.
    pub(crate) fn forget_device(&self, offer: OfferId) {
        let mut inner = self.lock();
        let device = inner.devices.remove(&offer);
        let signal = inner.active.get(&offer).map(|active| Arc::clone(&active.signal));
        drop(inner);
        if let Some(signal) = signal {
            signal.set_target(None);
        }
        drop(device); // foreign code, not under the lock
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Performs effects and posts messages until nothing is left to do, unless another thread is at
    /// it, which then does this as well; or the bus is held, and does it later.
    fn work(&self) {
        let mut inner = self.lock();
        if inner.worker.is_some() || inner.stands_still() {
            return;
        }
        inner.worker = Some(thread::current().id());
        drop(inner);
        let at_work = AtWork(self);
        let mut inner = self.lock(); // let go of before `at_work`, should anything panic
        loop {
            if inner.moved_away {
                break;
            }
            // Also while someone waits to hold the bus: what a step has begun is done.
            if let Some(effect) = inner.effects.pop_front() {
                drop(inner);
                self.perform(effect);
                inner = self.lock();
                continue;
            }
            if inner.holds != 0 {
                break;
            }
            let Some(message) = inner.host.next_message(&inner.full).cloned() else { break };
            let drained = inner.drained;
            drop(inner);
            let posted = self.shared.port.post_message(message.slot, &message.message);
            inner = self.lock();
            match posted {
                Posted::Taken => inner.step(|host, _| host.message_taken(message.serial)),
                // Emptied while we were told that it is full: try again.
                Posted::Busy if inner.drained != drained => {}
                Posted::Busy => inner.full.push(message.slot),
            }
        }
        inner.worker = None; // in the same breath as finding nothing to do
        drop(inner);
        std::mem::forget(at_work);
        self.shared.idle.notify_all();
    }

    /// [`HostBus::step`] for the thread at work.
    fn feed(&self, step: impl FnOnce(&mut Host, &mut Vec<Effect>)) {
        let mut inner = self.lock();
        if !inner.moved_away {
            inner.step(step);
        }
    }
}

/// Lets another thread go on where this one has panicked in foreign code.
struct AtWork<'a>(&'a HostBus);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.lock().worker = None;
        self.0.shared.idle.notify_all();
    }
}

impl fmt::Debug for HostBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBus").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

fn shape(vp_count: u32, memory: Option<&GuestMemory>) -> GuestShape {
    memory.map(|memory| GuestShape::new(vp_count, memory)).unwrap_or_default()
}

impl Bus for HostBus {
    fn offer(&self, offer: Offer, endpoint: Endpoint) -> Result<Box<dyn ServerLink>, NtStatus> {
        let offered = OfferParams::try_from(&offer).and_then(|params| {
            let mut inner = self.lock();
            let offer = match inner.restoring.is_some() {
                true => inner.adopt(params)?,
                false => inner.step(|host, _| host.offer(params))?,
            };
            inner.devices.insert(offer, Arc::new(endpoint));
            Ok(offer)
        });
        match offered {
            Ok(offer) => {
                self.work();
                Ok(Box::new(HostLink::new(self.clone(), offer)))
            }
            Err(error) => {
                // A guest can cause it: each of its socket connections is an offer.
                let logged = self.lock().refused.count();
                if let Some(number) = logged {
                    tracing::warn!(%error, number, "offer refused");
                }
                Err(match error {
                    OfferError::Clash { .. } => NtStatus::INVALID_PARAMETER,
                    OfferError::TooManyChannels { .. } => NtStatus::INSUFFICIENT_RESOURCES,
                    OfferError::TargetVtl { .. } | OfferError::Loopback => NtStatus::NOT_SUPPORTED,
                })
            }
        }
    }

    fn bind(&self, _: Target, _: Endpoint) -> Result<Box<dyn ClientLink>, NtStatus> {
        Err(NtStatus::NOT_SUPPORTED)
    }
}
