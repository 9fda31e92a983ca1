//! The host as a bus: the state machine, the devices it serves, and the way to their guest.
//!
//! One lock guards the state. It is held for a step and never while a port, a device's mailbox, a
//! doorbell or an hvsock handler is called, so none of these can deadlock with it, whatever they do.
//! What a step wants done waits in a queue; the thread that finds nobody at work performs it, in
//! order, until nothing is left; others leave their share to it and return. A channel's signal has a
//! lock of its own, taken last, under which only the port's signal is called.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kmcl::bus::{
    Bus, BusEvent, ClientLink, Doorbell, Endpoint, Offer, OpenRings, ServerLink, Target,
};
use vmbus_memory::{GuestMemory, MappingBudget, RingPages};
use vmbus_wire::status::NtStatus;

use crate::channel::OpenState;
use crate::connection::{CONNECTION_ID_MASK, INTERRUPT_PAGE_CONNECTION, MESSAGE_CONNECTION};
use crate::effect::{Effect, Interrupt, Rings};
use crate::error::{PostError, SignalError};
use crate::host::{Config, Host, Usage};
use crate::hvsock_handler::{HvsockConnect, HvsockHandler};
use crate::limits::MAX_WAITING_EFFECTS;
use crate::link::HostLink;
use crate::offer::{OfferError, OfferId, OfferParams};
use crate::outgoing::SlotId;
use crate::port::{GuestPort, Posted};
use crate::refused::LogGate;
use crate::shape::GuestShape;
use crate::signal::{self, ChannelSignal};

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
}

struct Inner {
    host: Host,
    memory: Option<GuestMemory>,
    /// The devices whose offers have a link.
    devices: BTreeMap<OfferId, Arc<Endpoint>>,
    /// What runs for the channels whose device was told that they are opened.
    active: BTreeMap<OfferId, Active>,
    hvsock: Option<Arc<dyn HvsockHandler>>,
    /// What steps want done, oldest first.
    effects: VecDeque<Effect>,
    /// A thread is at work on `effects` and messages.
    working: bool,
    /// Slots found full since the guest last emptied one.
    full: Vec<SlotId>,
    /// How often the guest has emptied slots.
    drained: u64,
    refused: LogGate,
}

struct Active {
    signal: Arc<ChannelSignal>,
    connection_id: u32,
    doorbell: Arc<dyn Doorbell>,
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
        let inner = Mutex::new(Inner {
            host: Host::new(config, shape),
            memory,
            devices: BTreeMap::new(),
            active: BTreeMap::new(),
            hvsock: None,
            effects: VecDeque::new(),
            working: false,
            full: Vec::new(),
            drained: 0,
            refused: LogGate::default(),
        });
        Self { shared: Arc::new(Shared { port, budget, inner }) }
    }

    /// Takes a message that the guest has posted to `connection_id` (HvPostMessage with message type
    /// 1). `message` is a private copy of the payload.
    ///
    /// # Errors
    /// [`PostError`]; [`PostError::hypercall_status`] is what the guest gets.
    pub fn post_message(&self, connection_id: u32, message: &[u8]) -> Result<(), PostError> {
        let mut inner = self.lock();
        let waiting = inner.effects.len();
        if waiting >= MAX_WAITING_EFFECTS {
            return Err(PostError::Busy { waiting });
        }
        let mut effects = Vec::new();
        let result = inner.host.guest_message(connection_id, message, &mut effects);
        inner.effects.extend(effects);
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
        let mut effects = Vec::new();
        let mut inner = self.lock();
        // In one breath: an open must not find the old request and the new memory.
        inner.memory = memory;
        inner.host.guest_reset(shape, &mut effects);
        inner.effects.extend(effects);
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

    /// One step of the state machine, and what follows from it.
    pub(crate) fn step<R>(&self, step: impl FnOnce(&mut Host, &mut Vec<Effect>) -> R) -> R {
        let mut effects = Vec::new();
        let mut inner = self.lock();
        let result = step(&mut inner.host, &mut effects);
        inner.effects.extend(effects);
        drop(inner);
        self.work();
        result
    }

    /// The device of an offer takes no further events. Its rings are gone, or going with it.
    pub(crate) fn drop_device(&self, offer: OfferId) {
        let device = self.lock().devices.remove(&offer);
        self.step(|host, effects| {
            host.closed(offer, effects); // first, so that the guest gets its answers before the rescind
            host.revoke(offer, effects);
        });
        drop(device); // foreign code, not under the lock
    }

    /// The device of an offer takes no further events; what the guest has of it stays as it is.
    pub(crate) fn forget_device(&self, offer: OfferId) {
        let device = self.lock().devices.remove(&offer);
        drop(device); // foreign code, not under the lock
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Performs effects and posts messages until nothing is left to do, unless another thread is at
    /// it, which then does this as well.
    fn work(&self) {
        if std::mem::replace(&mut self.lock().working, true) {
            return;
        }
        let at_work = AtWork(self);
        let mut inner = self.lock();
        loop {
            if let Some(effect) = inner.effects.pop_front() {
                drop(inner);
                self.perform(effect);
                inner = self.lock();
                continue;
            }
            let Some(message) = inner.host.next_message(&inner.full).cloned() else { break };
            let drained = inner.drained;
            drop(inner);
            let posted = self.shared.port.post_message(message.slot, &message.message);
            inner = self.lock();
            match posted {
                Posted::Taken => inner.host.message_taken(message.serial),
                // Emptied while we were told that it is full: try again.
                Posted::Busy if inner.drained != drained => {}
                Posted::Busy => inner.full.push(message.slot),
            }
        }
        inner.working = false; // in the same breath as finding nothing to do
        drop(inner);
        std::mem::forget(at_work);
    }

    fn perform(&self, effect: Effect) {
        match effect {
            Effect::Open { offer, rings } => {
                if let Err(status) = self.open(offer, &rings) {
                    self.feed(|host, effects| host.open_result(offer, status, effects));
                }
            }
            Effect::Close { offer, tell_device } => self.close(offer, tell_device),
            Effect::Retarget { offer, interrupt, serial } => {
                let status = self.retarget(offer, interrupt);
                self.feed(|host, _| host.retargeted(offer, serial, status));
            }
            Effect::ConnectHvsock(request) => {
                let handler = self.lock().hvsock.clone();
                let connect = HvsockConnect::new(self.clone(), request);
                match handler {
                    Some(handler) => handler.connect(connect),
                    None => connect.refuse(NtStatus::CONNECTION_REFUSED),
                }
            }
        }
    }

    /// [`HostBus::step`] for the thread at work.
    fn feed(&self, step: impl FnOnce(&mut Host, &mut Vec<Effect>)) {
        let mut effects = Vec::new();
        let mut inner = self.lock();
        step(&mut inner.host, &mut effects);
        inner.effects.extend(effects);
    }

    /// Prepares everything for an open, and tells the device of it.
    fn open(&self, offer: OfferId, rings: &Rings) -> Result<(), NtStatus> {
        let inner = self.lock();
        // The guest may have gone in the meantime, and another be there with other memory.
        let is_opening = inner
            .host
            .channel(offer)
            .is_some_and(|channel| matches!(channel.open, OpenState::Opening(_)));
        let device = inner.devices.get(&offer).filter(|_| is_opening).cloned();
        let (Some(device), Some(memory)) = (device, inner.memory.clone()) else {
            return Err(NtStatus::CANCELLED);
        };
        drop(inner);

        let ring = |pfns: &[u64]| {
            RingPages::map(&memory, pfns, &self.shared.budget).map_err(|error| {
                tracing::warn!(%error, "rings of a channel refused");
                NtStatus::INVALID_PARAMETER
            })
        };
        let (incoming, outgoing) = (ring(&rings.incoming)?, ring(&rings.outgoing)?);
        let failed = |error: std::io::Error| {
            tracing::error!(%error, "cannot exchange signals for a channel");
            NtStatus::INSUFFICIENT_RESOURCES
        };
        let port = &*self.shared.port;
        let target = signal::target(port, &memory, rings.interrupt).map_err(failed)?;
        let signal = Arc::new(ChannelSignal::new(target));
        let connection_id = rings.connection_id;
        port.listen(connection_id, Arc::clone(&device.doorbell)).map_err(failed)?;
        let doorbell = Arc::clone(&device.doorbell);
        let active = Active { signal: Arc::clone(&signal), connection_id, doorbell };
        self.lock().active.insert(offer, active);

        let user_data = rings.user_data;
        let (residency, resumed) = (None, false);
        let opened =
            OpenRings { incoming, outgoing, memory, signal, residency, user_data, resumed };
        if device.events.post(BusEvent::Opened(opened)) {
            return Ok(());
        }
        self.close(offer, false);
        Err(NtStatus::INSUFFICIENT_RESOURCES)
    }

    /// Undoes [`HostBus::open`], if it came so far.
    fn close(&self, offer: OfferId, tell_device: bool) {
        let mut inner = self.lock();
        let active = inner.active.remove(&offer);
        // It may have let go in the meantime, by itself.
        let is_closing = inner.host.channel(offer).is_some_and(|channel| {
            matches!(channel.open, OpenState::Closing(_) | OpenState::Reopening(..))
        });
        let device = inner.devices.get(&offer).filter(|_| tell_device && is_closing).cloned();
        drop(inner);
        let Some(active) = active else { return };
        active.signal.set_target(None);
        self.shared.port.unlisten(active.connection_id);
        if let Some(device) = device {
            device.events.post(BusEvent::PeerClosed);
        }
    }

    fn retarget(&self, offer: OfferId, interrupt: Interrupt) -> NtStatus {
        let inner = self.lock();
        let signal = inner.active.get(&offer).map(|active| Arc::clone(&active.signal));
        let (Some(signal), Some(memory)) = (signal, inner.memory.clone()) else {
            return NtStatus::CANCELLED;
        };
        drop(inner);
        match signal::target(&*self.shared.port, &memory, interrupt) {
            Ok(target) => {
                signal.set_target(target);
                NtStatus::SUCCESS
            }
            Err(error) => {
                tracing::error!(%error, "cannot move a channel's interrupts");
                NtStatus::INSUFFICIENT_RESOURCES
            }
        }
    }
}

/// Lets another thread go on where this one has panicked in foreign code.
struct AtWork<'a>(&'a HostBus);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.lock().working = false;
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
            let offer = inner.host.offer(params)?;
            inner.devices.insert(offer, Arc::new(endpoint));
            Ok(offer)
        });
        match offered {
            Ok(offer) => {
                self.work();
                Ok(Box::new(HostLink::new(self.clone(), offer)))
            }
            Err(error) => {
                tracing::warn!(%error, "offer refused");
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
