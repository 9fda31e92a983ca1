//! A bus with devices that answer when a test says so, and a port to a guest that is the test.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use kmcl::bus::{
    Bus, BusEvent, Doorbell, Endpoint, EventSink, Offer, OpenRings, ServerLink, Signal,
};
use vmbus_host::{Config, GuestPort, HostBus, Posted, SlotId, Usage};
use vmbus_memory::{GuestMemory, MappingBudget};
use vmbus_wire::status::NtStatus;

use crate::bytes::*;
use crate::machine::{RAM, SLOT, SUCCESS, TYPE, VP_COUNT, instance};

pub(crate) const RING: u32 = 5;
pub(crate) const PAGES: [u64; 8] = [10, 11, 12, 13, 20, 21, 22, 23];
pub(crate) const NONE: [Vec<u8>; 0] = [];
pub(crate) const MAPPINGS: usize = 64;

/// A guest's machine as a port shows it, and what was done to it.
pub(crate) struct FakePort {
    /// A call of the bus is in progress: there is one at a time.
    busy: AtomicBool,
    pub(crate) machine: Mutex<FakeMachine>,
    pub(crate) signals: Arc<Mutex<Vec<(u32, u8, u16)>>>,
}

#[derive(Default)]
pub(crate) struct FakeMachine {
    pub(crate) memory: Option<GuestMemory>,
    /// Messages delivered.
    pub(crate) messages: Vec<(SlotId, Vec<u8>)>,
    /// Slots that take no message.
    pub(crate) full: Vec<SlotId>,
    pub(crate) listening: BTreeMap<u32, Arc<dyn Doorbell>>,
    pub(crate) cannot_listen: bool,
    pub(crate) cannot_signal: bool,
    /// Instead of the usual number of processors.
    pub(crate) vp_count: Option<u32>,
    /// Called in the middle of the next delivery.
    pub(crate) during_post: Option<Box<dyn FnOnce() + Send>>,
    pub(crate) during_listen: Option<Box<dyn FnOnce() + Send>>,
}

/// A call in progress.
struct Call<'a>(&'a AtomicBool);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl FakePort {
    fn call(&self) -> Call<'_> {
        assert!(!self.busy.swap(true, Ordering::Acquire), "two calls at a time");
        Call(&self.busy)
    }

    pub(crate) fn machine(&self) -> MutexGuard<'_, FakeMachine> {
        self.machine.lock().unwrap()
    }
}

pub(crate) struct FlagSignal {
    pub(crate) flag: (u32, u8, u16),
    pub(crate) signals: Arc<Mutex<Vec<(u32, u8, u16)>>>,
}

impl Signal for FlagSignal {
    fn signal(&self) {
        self.signals.lock().unwrap().push(self.flag);
    }
}

fn no_room() -> io::Error {
    io::Error::from(io::ErrorKind::OutOfMemory)
}

impl GuestPort for FakePort {
    fn memory(&self) -> Option<GuestMemory> {
        self.machine().memory.clone()
    }

    fn vp_count(&self) -> u32 {
        self.machine().vp_count.unwrap_or(VP_COUNT)
    }

    fn post_message(&self, slot: SlotId, message: &[u8]) -> Posted {
        let _call = self.call();
        let is_full = self.machine().full.contains(&slot);
        let during = self.machine().during_post.take();
        if let Some(during) = during {
            during();
        }
        if is_full {
            return Posted::Busy;
        }
        self.machine().messages.push((slot, message.to_vec()));
        Posted::Taken
    }

    fn event_flag(&self, vp: u32, sint: u8, flag: u16) -> io::Result<Arc<dyn Signal>> {
        let _call = self.call();
        if self.machine().cannot_signal {
            return Err(no_room());
        }
        let signals = Arc::clone(&self.signals);
        Ok(Arc::new(FlagSignal { flag: (vp, sint, flag), signals }))
    }

    fn listen(&self, connection_id: u32, doorbell: Arc<dyn Doorbell>) -> io::Result<()> {
        let _call = self.call();
        let during = self.machine().during_listen.take();
        if let Some(during) = during {
            during();
        }
        if self.machine().cannot_listen {
            return Err(no_room());
        }
        assert!(self.machine().listening.insert(connection_id, doorbell).is_none());
        Ok(())
    }

    fn unlisten(&self, connection_id: u32) {
        let _call = self.call();
        assert!(self.machine().listening.remove(&connection_id).is_some());
    }
}

#[derive(Default)]
pub(crate) struct Bell(AtomicU32);

impl Doorbell for Bell {
    fn ring(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn event_fd(&self) -> io::Result<BorrowedFd<'_>> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }
}

/// The events that a device has got and not looked at.
pub(crate) struct Events(Box<dyn Fn() -> Vec<BusEvent> + Send + Sync>);

impl Events {
    pub(crate) fn take(&self) -> Vec<BusEvent> {
        (self.0)()
    }
}

/// A device that answers when the test says so.
pub(crate) struct Device {
    pub(crate) link: Box<dyn ServerLink>,
    pub(crate) events: Events,
    pub(crate) bell: Arc<Bell>,
}

impl Device {
    pub(crate) fn rings(&self) -> OpenRings {
        let mut events = self.events.take();
        match (events.pop(), events.len()) {
            (Some(BusEvent::Opened(rings)), 0) => rings,
            (last, others) => panic!("no open: {others} events, then {}", last.is_some()),
        }
    }

    pub(crate) fn is_told_of_the_close(&self) -> bool {
        matches!(self.events.take()[..], [BusEvent::PeerClosed])
    }

    pub(crate) fn hears_nothing(&self) -> bool {
        self.events.take().is_empty()
    }

    pub(crate) fn rung(&self) -> u32 {
        self.bell.0.swap(0, Ordering::Relaxed)
    }
}

pub(crate) struct World {
    pub(crate) bus: HostBus,
    pub(crate) port: Arc<FakePort>,
    pub(crate) memory: GuestMemory,
    pub(crate) budget: MappingBudget,
}

impl World {
    pub(crate) fn new() -> Self {
        let memory = GuestMemory::memfd(RAM[0].1).unwrap();
        let machine = FakeMachine { memory: Some(memory.clone()), ..FakeMachine::default() };
        let port = Arc::new(FakePort {
            busy: AtomicBool::new(false),
            machine: Mutex::new(machine),
            signals: Arc::default(),
        });
        let budget = MappingBudget::new(MAPPINGS);
        let port_of_bus: Arc<dyn GuestPort> = Arc::clone(&port) as _;
        let bus = HostBus::with_budget(port_of_bus, Config::default(), budget.clone());
        Self { bus, port, memory, budget }
    }

    /// With one device that the guest has been told of, as channel 1.
    pub(crate) fn connected(version: u32) -> (Self, Device) {
        let world = Self::new();
        let device = world.offer(1);
        world.post(&plain_contact(version, 0));
        world.post(&request_offers());
        assert_eq!(world.messages().len(), 3);
        (world, device)
    }

    pub(crate) fn offer(&self, number: u32) -> Device {
        self.offer_as(Offer::new(TYPE, instance(number)))
    }

    pub(crate) fn offer_as(&self, offer: Offer) -> Device {
        let (events, recorder) = EventSink::recorder();
        let bell = Arc::new(Bell::default());
        let endpoint = Endpoint { events, doorbell: Arc::clone(&bell) as _ };
        let link = self.bus.offer(offer, endpoint).unwrap();
        Device { link, events: Events(Box::new(move || recorder.take())), bell }
    }

    #[track_caller]
    pub(crate) fn post(&self, message: &[u8]) {
        let newer = u32_at(message, 0) == 14 && u32_at(message, 8) >= V5_0;
        assert_eq!(self.bus.post_message(if newer { 4 } else { 1 }, message), Ok(()));
    }

    pub(crate) fn messages(&self) -> Vec<Vec<u8>> {
        let messages = std::mem::take(&mut self.port.machine().messages);
        assert!(messages.iter().all(|(slot, _)| *slot == SLOT), "{messages:?}");
        messages.into_iter().map(|(_, message)| message).collect()
    }

    pub(crate) fn signals(&self) -> Vec<(u32, u8, u16)> {
        std::mem::take(&mut *self.port.signals.lock().unwrap())
    }

    #[track_caller]
    pub(crate) fn open(&self, device: &Device, channel: u32) -> OpenRings {
        whole_pages(channel, RING, &PAGES).iter().for_each(|message| self.post(message));
        self.post(&open(channel, 0x77, RING, 3, 4));
        let rings = device.rings();
        device.link.open_result(NtStatus::SUCCESS);
        let expected = [gpadl_created(channel, RING, SUCCESS), open_result(channel, 0x77, SUCCESS)];
        assert_eq!(self.messages(), expected);
        rings
    }

    /// Nothing of the guest's is in use any more.
    #[track_caller]
    pub(crate) fn nothing_left(&self, channels: usize) {
        assert_eq!(self.bus.usage(), Usage { channels, ..Usage::default() });
        assert_eq!(self.bus.active_channels(), 0);
        assert_eq!(self.budget.left(), MAPPINGS, "mappings");
        assert_eq!(self.port.machine().listening.len(), 0);
        self.bus.inspect(|host| assert_eq!(host.violations(), Vec::<String>::new()));
    }
}
