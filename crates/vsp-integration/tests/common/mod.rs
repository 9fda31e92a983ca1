//! A host with the services, and a guest that answers as Linux does, or says whatever a test likes. All
//! on one thread: nothing happens but in [`World::host`] and [`World::guest`].

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::VecDeque;
use std::error::Error;
use std::sync::{Arc, Mutex};
use std::task::Waker;

use kmcl::bus::Bus;
use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, ChannelFlags, ChannelState, IncomingPacket, ProcessPacket, Save, SaveOptions,
    SendFlags, Side,
};
use vsp_integration::wire::{HeartbeatBody, IcHeader, NegotiateHead, ShutdownBody, TimeBody};
use vsp_integration::{
    Clocks, Driver, Event, FileTime, FrozenServices, IntegrationConfig, IntegrationServices,
    Observer, RestoringServices, SavedStream, Service, Version,
};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, IntoBytes};

/// A second of reference time.
pub(crate) const SECOND: u64 = 10_000_000;

pub(crate) const V1: Version = Version::new(1, 0);
pub(crate) const V3: Version = Version::new(3, 0);

/// Rounds in which everything comes to rest: far more than any exchange here takes.
const ROUNDS: usize = 64;

/// Runs channels when it is told to.
#[derive(Default)]
pub(crate) struct Inline(Mutex<Vec<Channel>>);

impl Inline {
    pub(crate) fn process(&self) {
        let channels = self.0.lock().unwrap().clone();
        for channel in channels {
            while channel.process(64).more {}
        }
    }
}

impl Driver for Inline {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        // Driven: nothing of it happens on other threads, or in other calls.
        channel.set_waker(Waker::noop().clone());
        self.0.lock().unwrap().push(channel.clone());
        Ok(())
    }

    fn remove_channel(&self, channel: &Channel) {
        channel.clear_waker();
        let instance = channel.get_interface_instance();
        self.0.lock().unwrap().retain(|other| other.get_interface_instance() != instance);
    }
}

/// What the owner learns.
#[derive(Default)]
pub(crate) struct Events(Mutex<Vec<Event>>);

impl Events {
    pub(crate) fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }

    /// Without those that say that a service has come to terms.
    pub(crate) fn take_others(&self) -> Vec<Event> {
        self.take().into_iter().filter(|it| !matches!(it, Event::Agreed { .. })).collect()
    }
}

impl Observer for Events {
    fn happened(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

/// What the host said on one channel.
#[derive(Default)]
struct Inbox(Mutex<VecDeque<Vec<u8>>>);

impl ProcessPacket for Inbox {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        assert!(!packet.wants_completion(), "a request is no transaction");
        self.0.lock().unwrap().push_back(packet.payload().to_vec());
        packet.complete(&[]);
    }
}

/// What a guest knows, and how it takes what it is asked.
#[derive(Clone, Debug)]
pub(crate) struct Linux {
    pub(crate) frameworks: Vec<Version>,
    pub(crate) messages: Vec<Version>,
    /// What it says to a shutdown.
    pub(crate) status: u32,
    /// How it says its applications are.
    pub(crate) applications: u32,
}

impl Linux {
    /// One that knows everything.
    pub(crate) fn new(service: Service) -> Self {
        let [mut frameworks, mut messages] =
            [Service::FRAMEWORKS, service.versions()].map(<[_]>::to_vec);
        frameworks.reverse();
        messages.reverse();
        Self { frameworks, messages, status: 0, applications: 0 }
    }

    pub(crate) fn knowing(frameworks: &[Version], messages: &[Version]) -> Self {
        let (frameworks, messages) = (frameworks.to_vec(), messages.to_vec());
        Self { frameworks, messages, status: 0, applications: 0 }
    }

    /// The answer to a request: as many bytes, the header's but for flags and status.
    pub(crate) fn answer(&self, service: Service, request: &[u8]) -> Vec<u8> {
        let mut answer = request.to_vec();
        let (header, body) = IcHeader::mut_from_prefix(&mut answer).unwrap();
        assert_eq!(header.flags, 3, "a transaction, a request");
        header.flags = 5;
        if header.message_type.get() == 0 {
            let (head, rest) = NegotiateHead::mut_from_prefix(body).unwrap();
            let offered = <[Version]>::ref_from_bytes(rest).unwrap();
            let (first, second) = offered.split_at(head.frameworks.get().into());
            assert_eq!(second.len(), usize::from(head.messages.get()));
            let choose = |known: &[Version], offered: &[Version]| {
                known.iter().copied().find(|version| offered.contains(version))
            };
            let chosen = choose(&self.frameworks, first).zip(choose(&self.messages, second));
            let count = U16::new(chosen.is_some().into());
            (head.frameworks, head.messages) = (count, count);
            let (framework, message) = chosen.unwrap_or((V1, V1));
            rest[..4].copy_from_slice(framework.as_bytes());
            rest[4..8].copy_from_slice(message.as_bytes());
            header.size = U16::new(16);
            return answer;
        }
        assert_eq!(header.message_type.get(), service.message_type().0);
        match service {
            Service::Heartbeat => {
                let (body, _) = HeartbeatBody::mut_from_prefix(body).unwrap();
                body.sequence = U64::new(body.sequence.get() + 1);
                body.application_state.set(self.applications);
            }
            Service::Shutdown => {
                assert!(body.len() >= size_of::<ShutdownBody>(), "Linux ignores shorter ones");
                header.status.set(self.status);
            }
            Service::TimeSync => assert!(body.len() >= size_of::<TimeBody>() - 2),
        }
        answer
    }
}

/// The guest's end of one channel.
pub(crate) struct Guest {
    pub(crate) service: Service,
    pub(crate) channel: Channel,
    inbox: Arc<Inbox>,
    /// How it answers; `None`: not at all.
    pub(crate) linux: Option<Linux>,
    /// All that it has read.
    pub(crate) read: Vec<Vec<u8>>,
}

impl Guest {
    /// Opens the channel of `service` when the world goes on, with rings as Linux has them: three pages
    /// of data each way.
    pub(crate) fn open(
        bus: &Arc<impl Bus + 'static>,
        service: Service,
        linux: Option<Linux>,
    ) -> Self {
        Self::open_with(bus, service, linux, 3)
    }

    /// With so many pages of data in each ring.
    pub(crate) fn open_with(
        bus: &Arc<impl Bus + 'static>,
        service: Service,
        linux: Option<Linux>,
        pages: u32,
    ) -> Self {
        let channel = Channel::allocate(Side::Client, Arc::clone(bus) as Arc<dyn Bus>);
        let (interface, instance) = (service.interface(), service.instance());
        channel.client_init_set_target_pnp(interface, Some(instance), None).unwrap();
        channel.init_set_flags(ChannelFlags::IS_PIPE).unwrap();
        if pages == 1 {
            channel.init_set_maximum_packet_size(2080).unwrap(); // what it asks for holds its own
        }
        channel.client_init_set_ring_buffer_page_count(1 + pages, 1 + pages).unwrap();
        let inbox = Arc::new(Inbox::default());
        channel.init_set_process_packet_callbacks(inbox.clone()).unwrap();
        channel.enable().unwrap();
        channel.start();
        Self { service, channel, inbox, linux, read: Vec::new() }
    }

    /// Says any bytes.
    pub(crate) fn say(&self, bytes: &[u8]) {
        let packet = self.channel.packet_allocate().unwrap();
        packet.send(bytes, None, SendFlags::empty()).unwrap();
    }

    /// Reads what there is, and answers it.
    pub(crate) fn turn(&mut self) -> bool {
        while self.channel.process(64).more {}
        let mut is_busy = false;
        loop {
            let next = self.inbox.0.lock().unwrap().pop_front();
            let Some(request) = next else { return is_busy };
            is_busy = true;
            if let Some(linux) = &self.linux {
                self.say(&linux.answer(self.service, &request));
            }
            self.read.push(request);
        }
    }

    /// What it has read since it was last asked for.
    pub(crate) fn take_read(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.read)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.channel.disable();
    }
}

/// All of it.
pub(crate) struct World {
    // Guests go before the services: they close their channels.
    pub(crate) guests: Vec<Guest>,
    pub(crate) services: Option<IntegrationServices>,
    pub(crate) driver: Arc<Inline>,
    pub(crate) events: Arc<Events>,
    pub(crate) bus: Arc<LoopbackBus>,
    pub(crate) clocks: Clocks,
}

/// The middle of 2026.
pub(crate) const NOW: FileTime = FileTime(134_278_000_000_000_000);

impl World {
    /// Nothing but a bus.
    pub(crate) fn empty_bus() -> Self {
        let bus = LoopbackBus::new(4 << 20).unwrap();
        let (driver, events) = (Arc::new(Inline::default()), Arc::new(Events::default()));
        let clocks = Clocks { now: NOW, reference_time: 100 * SECOND };
        Self { guests: Vec::new(), services: None, driver, events, bus, clocks }
    }

    /// Services, offered, and no guest.
    pub(crate) fn empty() -> Self {
        let mut world = Self::empty_bus();
        let config = IntegrationConfig::default();
        let (bus, driver) = (world.bus.clone(), world.driver.clone());
        let services = IntegrationServices::new(bus, driver, world.events.clone(), config).unwrap();
        services.offer().unwrap();
        world.services = Some(services);
        world
    }

    /// A guest that has opened all three and answers as Linux does.
    pub(crate) fn new() -> Self {
        let mut world = Self::empty();
        for service in Service::ALL {
            world.open(service, Some(Linux::new(service)));
        }
        world.settle();
        world.forget();
        world
    }

    pub(crate) fn open(&mut self, service: Service, linux: Option<Linux>) {
        self.guests.push(Guest::open(&self.bus, service, linux));
    }

    pub(crate) fn services(&self) -> &IntegrationServices {
        self.services.as_ref().unwrap()
    }

    pub(crate) fn guest(&mut self, service: Service) -> &mut Guest {
        self.guests.iter_mut().find(|guest| guest.service == service).unwrap()
    }

    /// Lets the host do its work.
    pub(crate) fn host_turn(&self) {
        self.driver.process();
    }

    /// Lets the guest do its work; returns whether there was some.
    pub(crate) fn guest_turn(&mut self) -> bool {
        self.guests.iter_mut().map(Guest::turn).fold(false, |sum, one| sum | one)
    }

    /// Lets both do all there is to do.
    pub(crate) fn settle(&mut self) {
        for _ in 0..ROUNDS {
            self.host_turn();
            self.guest_turn();
        }
        self.host_turn();
        assert!(!self.guest_turn(), "it never ends");
    }

    /// Forgets what was said and happened.
    pub(crate) fn forget(&mut self) {
        self.events.take();
        for guest in &mut self.guests {
            guest.take_read();
        }
    }

    /// Time passes, and the owner says so; nobody does anything yet.
    pub(crate) fn pass(&mut self, seconds: u64) {
        self.clocks.now.0 += seconds * SECOND;
        self.clocks.reference_time += seconds * SECOND;
        self.services().tick(self.clocks);
    }

    /// Time passes, second by second, and everybody does what there is to do.
    pub(crate) fn live(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.pass(1);
            self.settle();
        }
    }

    /// The services of another host, which go on where `streams` say. The guest stood still meanwhile,
    /// an hour by the time of day.
    pub(crate) fn restore(&mut self, streams: &[Vec<u8>]) {
        self.restore_without_rings(streams);
        self.host_turn(); // the bus brings the rings
    }

    pub(crate) fn restore_without_rings(&mut self, streams: &[Vec<u8>]) {
        drop(self.services.take());
        self.driver = Arc::new(Inline::default());
        let mut restoring = self.restoring(&streams[0]).unwrap();
        restoring.enable().unwrap();
        assert_eq!(restoring.channels() as usize, streams.len() - 1);
        for (index, stream) in (0..).zip(&streams[1..]) {
            restoring.restore_channel(index, stream.as_slice()).unwrap();
        }
        self.services = Some(restoring.start().unwrap());
        self.clocks.now.0 += 3600 * SECOND;
    }

    pub(crate) fn restoring(
        &self,
        stream: &[u8],
    ) -> Result<RestoringServices, vsp_integration::ServicesRestoreError> {
        let config = IntegrationConfig::default();
        let (bus, driver, events) = (self.bus.clone(), self.driver.clone(), self.events.clone());
        IntegrationServices::restoring(bus, driver, events, config, stream)
    }

    /// Moves the services to another host.
    pub(crate) fn move_away(&mut self) -> Vec<Vec<u8>> {
        let frozen = self.services().freeze().unwrap();
        let streams = save(&frozen);
        frozen.move_away();
        self.restore(&streams);
        streams
    }

    pub(crate) fn is_open(&self, service: Service) -> bool {
        self.services().channel(service).unwrap().state() == ChannelState::Active
    }
}

/// The bytes of frozen services' streams.
pub(crate) fn save(frozen: &FrozenServices) -> Vec<Vec<u8>> {
    assert_eq!(frozen.running(), 0);
    let write = |mut stream: SavedStream| {
        let mut bytes = Vec::new();
        stream.save.write_to(&mut bytes).unwrap();
        bytes
    };
    frozen.streams(&SaveOptions::default()).unwrap().into_iter().map(write).collect()
}

/// The header and the body of a message.
pub(crate) fn split(message: &[u8]) -> (IcHeader, &[u8]) {
    let (header, body) = IcHeader::read_from_prefix(message).unwrap();
    assert_eq!(usize::from(header.size.get()), body.len());
    (header, body)
}
