//! What lies between guest and host: messages, message slots, signals. Everything that is on its way
//! waits here until the seed lets it arrive.
//!
//! What may overtake what is what may do so in a machine: a guest's messages arrive in order, and so
//! do those of the host in one slot; signals come whenever they like, and several of one kind are one.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kmcl::NtStatus;
use kmcl::bus::{Doorbell, Signal};
use vmbus_guest::{GuestBus, HostError, HostPort, OfferedChannel, PostStatus};
use vmbus_host::{GuestPort, HostBus, SlotId};
use vmbus_memory::GuestMemory;
use vmbus_wire::message::MessageType;

use crate::log::Log;
use crate::rng::Rng;

/// Virtual processors of the guest.
pub(crate) const VP_COUNT: u32 = 2;

/// An event flag of the guest: VP, SINT, number.
pub(crate) type Flag = (u32, u8, u16);

/// See the module.
pub(crate) struct Wires {
    log: Arc<Log>,
    memory: GuestMemory,
    guest: OnceLock<GuestBus>,
    inner: Mutex<Inner>,
}

struct Inner {
    rng: Rng,
    now: u64,
    /// Ends made for hosts.
    ends: u64,
    /// The number of the present host's end: what others do has no effect.
    host: u64,
    post: Option<Post>,
    /// When the guest posts again what was refused.
    retry: Option<u64>,
    slots: BTreeMap<SlotId, Slot>,
    /// Connections that the guest has signalled, and when that arrives.
    to_host: BTreeMap<u32, u64>,
    to_guest: BTreeMap<Flag, u64>,
    /// While it is set nothing waits: a message arrives before the call that posts it returns.
    direct: Option<HostBus>,
}

/// A message of the guest on its way.
pub(crate) struct Post {
    pub(crate) connection_id: u32,
    pub(crate) message: Vec<u8>,
    pub(crate) due: u64,
}

#[derive(Default)]
struct Slot {
    message: Option<(Vec<u8>, u64)>,
    /// A host was told that the slot is full.
    refused: bool,
}

/// Something that can arrive.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Arrival {
    /// The guest's message reaches the host.
    Post,
    /// The guest posts its message again.
    Retry,
    /// The guest looks into a message slot.
    Slot(SlotId),
    /// The guest's signal reaches the host.
    Connection(u32),
    /// The host's signal reaches the guest.
    Flag(Flag),
}

impl Wires {
    pub(crate) fn new(memory: GuestMemory, log: &Arc<Log>, rng: Rng) -> Arc<Self> {
        Arc::new(Self {
            log: Arc::clone(log),
            memory,
            guest: OnceLock::new(),
            inner: Mutex::new(Inner {
                rng,
                now: 0,
                ends: 0,
                host: 0,
                post: None,
                retry: None,
                slots: BTreeMap::new(),
                to_host: BTreeMap::new(),
                to_guest: BTreeMap::new(),
                direct: None,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's end.
    pub(crate) fn guest_end(self: &Arc<Self>) -> Arc<dyn HostPort> {
        Arc::new(GuestEnd(Arc::downgrade(self)))
    }

    /// Who gets what arrives at the guest.
    pub(crate) fn set_guest(&self, guest: &GuestBus) {
        let _only_once = self.guest.set(guest.clone());
    }

    /// An end for a host. It has no effect before [`Wires::take_over`].
    pub(crate) fn new_host_end(self: &Arc<Self>) -> Arc<HostEnd> {
        let mut inner = self.lock();
        inner.ends += 1;
        Arc::new(HostEnd { wires: Arc::downgrade(self), number: inner.ends })
    }

    /// From now on this end is the host's.
    pub(crate) fn take_over(&self, end: &HostEnd) {
        let mut inner = self.lock();
        inner.host = end.number;
        for slot in inner.slots.values_mut() {
            slot.refused = false; // that was another host
        }
    }

    /// From now on no end is the host's: nothing that it does has an effect any more. Signals on their
    /// way are lost: one that was given before a save need not come after it.
    pub(crate) fn cut_host(&self) {
        let mut inner = self.lock();
        inner.host = 0;
        inner.to_host.clear();
        inner.to_guest.clear();
    }

    pub(crate) fn set_now(&self, now: u64) {
        self.lock().now = now;
    }

    /// What can arrive, and when. What concerns a host that is not listening waits.
    pub(crate) fn arrivals(&self, host_listens: bool, into: &mut Vec<(u64, Arrival)>) {
        let inner = self.lock();
        if host_listens {
            into.extend(inner.post.as_ref().map(|post| (post.due, Arrival::Post)));
            into.extend(inner.to_host.iter().map(|(&id, &due)| (due, Arrival::Connection(id))));
        }
        into.extend(inner.retry.map(|due| (due, Arrival::Retry)));
        for (&id, slot) in &inner.slots {
            into.extend(slot.message.as_ref().map(|(_, due)| (*due, Arrival::Slot(id))));
        }
        into.extend(inner.to_guest.iter().map(|(&flag, &due)| (due, Arrival::Flag(flag))));
    }

    pub(crate) fn take_post(&self) -> Option<Post> {
        self.lock().post.take()
    }

    pub(crate) fn take_retry(&self) {
        self.lock().retry = None;
    }

    /// Takes the message out of a slot; whether a host waits for that.
    pub(crate) fn take_slot(&self, id: SlotId) -> Option<(Vec<u8>, bool)> {
        let mut inner = self.lock();
        let slot = inner.slots.get_mut(&id)?;
        let (message, _) = slot.message.take()?;
        Some((message, std::mem::take(&mut slot.refused)))
    }

    pub(crate) fn take_connection(&self, id: u32) {
        self.lock().to_host.remove(&id);
    }

    pub(crate) fn take_flag(&self, flag: Flag) {
        self.lock().to_guest.remove(&flag);
    }

    /// Gives the guest a message of the host's.
    pub(crate) fn deliver_to_guest(&self, message: &[u8]) {
        let Some(guest) = self.guest.get() else { return };
        match guest.host_message(message) {
            Ok(()) => {}
            Err(error) if is_late(&error) => {
                self.log.line(format_args!("late: {error}"));
            }
            Err(error) => {
                let kind = message.first();
                self.log.violation(format_args!("message {kind:?} of the host: {error}"));
            }
        }
    }

    /// Whether no message is on its way.
    pub(crate) fn is_quiet(&self) -> bool {
        let inner = self.lock();
        inner.post.is_none() && inner.slots.values().all(|slot| slot.message.is_none())
    }

    /// From now on a message arrives before the call that posts it returns; `None` ends that.
    pub(crate) fn set_direct(&self, host: Option<HostBus>) {
        self.lock().direct = host;
    }

    fn signal_host(&self, connection_id: u32) {
        let inner = &mut *self.lock();
        let due = inner.now + inner.rng.delay();
        inner.to_host.entry(connection_id).or_insert(due);
    }

    fn signal_guest(&self, end: u64, flag: Flag) {
        let inner = &mut *self.lock();
        if inner.host == end {
            let due = inner.now + inner.rng.delay();
            inner.to_guest.entry(flag).or_insert(due);
        }
    }
}

/// Whether a message may be an answer for a channel that the guest has given up meanwhile, because it
/// was withdrawn; or for a guest that has left the bus.
fn is_late(error: &HostError) -> bool {
    use MessageType::{GpadlCreated, ModifyChannelResponse, OpenChannelResult};
    match error {
        HostError::UnknownGpadl { kind, .. } => *kind == GpadlCreated,
        HostError::ChannelState { kind, state, .. } => {
            *state == "withdrawn" && matches!(kind, ModifyChannelResponse | OpenChannelResult)
        }
        HostError::UnknownChannel { kind, .. } => {
            matches!(kind, ModifyChannelResponse | OpenChannelResult)
        }
        HostError::Unexpected { state, .. } => *state == "not connected",
        _ => false,
    }
}

/// What the host answers to a message, as the guest sees it.
pub(crate) fn deliver_to_host(host: &HostBus, connection_id: u32, message: &[u8]) -> PostStatus {
    match host.post_message(connection_id, message) {
        Ok(()) => PostStatus::SUCCESS,
        Err(error) => PostStatus(error.hypercall_status()),
    }
}

struct GuestEnd(Weak<Wires>);

impl HostPort for GuestEnd {
    fn post_message(&self, connection_id: u32, message: &[u8]) -> vmbus_guest::Posted {
        let Some(wires) = self.0.upgrade() else { return vmbus_guest::Posted::Later };
        let mut inner = wires.lock();
        if let Some(host) = inner.direct.clone() {
            drop(inner);
            return vmbus_guest::Posted::Answered(deliver_to_host(&host, connection_id, message));
        }
        let due = inner.now + inner.rng.delay();
        inner.post = Some(Post { connection_id, message: message.to_vec(), due });
        vmbus_guest::Posted::Later
    }

    fn retry_post_later(&self, attempt: u32) {
        if let Some(wires) = self.0.upgrade() {
            let mut inner = wires.lock();
            inner.retry = Some(inner.now + u64::from(attempt));
        }
    }

    fn attach(
        &self,
        channel: &OfferedChannel,
        _doorbell: &Arc<dyn Doorbell>,
    ) -> Result<Arc<dyn Signal>, NtStatus> {
        let connection_id = channel.connection_id;
        Ok(Arc::new(ToHost { wires: self.0.clone(), connection_id }))
    }
}

struct ToHost {
    wires: Weak<Wires>,
    connection_id: u32,
}

impl Signal for ToHost {
    fn signal(&self) {
        if let Some(wires) = self.wires.upgrade() {
            wires.signal_host(self.connection_id);
        }
    }
}

/// A host's end.
pub(crate) struct HostEnd {
    wires: Weak<Wires>,
    number: u64,
}

impl GuestPort for HostEnd {
    fn memory(&self) -> Option<GuestMemory> {
        self.wires.upgrade().map(|wires| wires.memory.clone())
    }

    fn vp_count(&self) -> u32 {
        VP_COUNT
    }

    fn post_message(&self, slot: SlotId, message: &[u8]) -> vmbus_host::Posted {
        let Some(wires) = self.wires.upgrade() else { return vmbus_host::Posted::Taken };
        let mut inner = wires.lock();
        if inner.host != self.number {
            return vmbus_host::Posted::Taken;
        }
        if inner.direct.is_some() {
            drop(inner);
            wires.deliver_to_guest(message);
            return vmbus_host::Posted::Taken;
        }
        let inner = &mut *inner;
        let due = inner.now + inner.rng.delay();
        let place = inner.slots.entry(slot).or_default();
        if place.message.is_some() {
            place.refused = true;
            return vmbus_host::Posted::Busy;
        }
        place.message = Some((message.to_vec(), due));
        vmbus_host::Posted::Taken
    }

    fn event_flag(&self, vp: u32, sint: u8, flag: u16) -> io::Result<Arc<dyn Signal>> {
        let (wires, end) = (self.wires.clone(), self.number);
        Ok(Arc::new(ToGuest { wires, end, flag: (vp, sint, flag) }))
    }

    /// Every signal goes through [`HostBus::guest_signal`].
    fn listen(&self, _connection_id: u32, _doorbell: Arc<dyn Doorbell>) -> io::Result<()> {
        Ok(())
    }

    fn unlisten(&self, _connection_id: u32) {}
}

struct ToGuest {
    wires: Weak<Wires>,
    end: u64,
    flag: Flag,
}

impl Signal for ToGuest {
    fn signal(&self) {
        if let Some(wires) = self.wires.upgrade() {
            wires.signal_guest(self.end, self.flag);
        }
    }
}
