//! A guest bus with a host that answers on the poster's stack: the worst case for locks.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use kmcl::bus::{EventSink, GpadlPages, OpenRequest, PageRange, Signal};
use vmbus_memory::GuestMemory;
use vmbus_wire::message::{
    GpadlCreated, GpadlTorndown, GuestMessage, HostMessage, OfferChannel, OpenChannelResult,
    RescindChannelOffer, VersionResponse,
};
use vmbus_wire::ring::ControlPage;
use vmbus_wire::version::{FeatureFlags, Version};

use super::*;

const TYPE: Guid = Guid::from_u128(0xba6163d9_04a1_4d29_b605_72e2ffb1dc7f);
const PAGES: u64 = 256;

#[derive(Default)]
struct Counter(AtomicU32);

impl Counter {
    fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Doorbell for Counter {
    fn ring(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn event_fd(&self) -> io::Result<BorrowedFd<'_>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Signal for Counter {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A host of version 5.3, or of another one, that offers channels 1 to 4 and grants everything.
struct TestHost {
    bus: OnceLock<GuestBus>,
    version: Version,
    signal: Arc<Counter>,
    doorbells: Mutex<Vec<(u32, Arc<dyn Doorbell>)>>,
    events: Mutex<Vec<ConnectionEvent>>,
    retries: Mutex<Vec<u32>>,
    /// Answers that wait for [`TestHost::say`], if set.
    held: Mutex<Option<VecDeque<HostMessage>>>,
    refuse_attach: Mutex<Option<NtStatus>>,
    statuses: Mutex<VecDeque<PostStatus>>,
    /// Features of the control pages of each ring whose GPADL came: outgoing, incoming.
    features_seen: Mutex<Vec<[u32; 2]>>,
}

impl TestHost {
    fn bus(&self) -> &GuestBus {
        self.bus.get().unwrap()
    }

    fn answer(&self, message: HostMessage) {
        if let Some(held) = &mut *self.held.lock().unwrap() {
            held.push_back(message);
            return;
        }
        self.bus().host_message(&message.to_buffer()).unwrap();
    }

    fn hold(&self) {
        *self.held.lock().unwrap() = Some(VecDeque::new());
    }

    /// Gives the held answers.
    fn say(&self) {
        let held = self.held.lock().unwrap().take();
        for message in held.unwrap_or_default() {
            self.answer(message);
        }
    }

    fn take(&self, message: GuestMessage<'_>) {
        match message {
            GuestMessage::InitiateContact(contact) => {
                let version = contact.requested().unwrap();
                let state = vmbus_wire::message::ConnectionState::Successful;
                self.answer(HostMessage::VersionResponse(if version == self.version {
                    VersionResponse::supported(state, 1)
                } else {
                    VersionResponse::UNSUPPORTED
                }));
            }
            GuestMessage::RequestOffers => {
                for channel in 1..=4 {
                    self.answer(HostMessage::OfferChannel(offer(channel)));
                }
                self.answer(HostMessage::AllOffersDelivered);
            }
            GuestMessage::GpadlHeader(header) => {
                self.look_at_control_pages(&header);
                let (channel, gpadl) = (header.fields.channel_id, header.fields.gpadl_id);
                let created = GpadlCreated::new(channel.get(), gpadl.get(), NtStatus::SUCCESS);
                self.answer(HostMessage::GpadlCreated(created));
            }
            GuestMessage::OpenChannel(open) => {
                let (channel, id) = (open.channel_id.get(), open.open_id.get());
                let result = OpenChannelResult::new(channel, id, NtStatus::SUCCESS);
                self.answer(HostMessage::OpenChannelResult(result));
            }
            GuestMessage::GpadlTeardown(teardown) => {
                let gpadl_id = teardown.gpadl_id;
                self.answer(HostMessage::GpadlTorndown(GpadlTorndown { gpadl_id }));
            }
            GuestMessage::Unload => self.answer(HostMessage::UnloadComplete),
            _ => {}
        }
    }

    /// For rings of 4 + 4 pages.
    fn look_at_control_pages(&self, header: &vmbus_wire::message::GpadlHeader<'_>) {
        let words = header.words();
        if words.len() == 9 {
            let feature_bits = |word: usize| {
                let gpa = words[word].get() * 4096 + u64::from(ControlPage::FEATURE_BITS);
                self.bus().memory().read_obj::<u32>(gpa).unwrap()
            };
            self.features_seen.lock().unwrap().push([feature_bits(1), feature_bits(5)]);
        }
    }
}

impl HostPort for TestHost {
    fn post_message(&self, _: u32, message: &[u8]) -> Posted {
        if let Some(status) = self.statuses.lock().unwrap().pop_front()
            && status != PostStatus::SUCCESS
        {
            return Posted::Answered(status);
        }
        let negotiated = Some((self.version, FeatureFlags::empty()));
        self.take(GuestMessage::parse(message, negotiated).unwrap());
        Posted::Answered(PostStatus::SUCCESS)
    }

    fn retry_post_later(&self, attempt: u32) {
        self.retries.lock().unwrap().push(attempt);
    }

    fn attach(
        &self,
        channel: &OfferedChannel,
        doorbell: &Arc<dyn Doorbell>,
    ) -> Result<Arc<dyn Signal>, NtStatus> {
        if let Some(status) = *self.refuse_attach.lock().unwrap() {
            return Err(status);
        }
        self.doorbells.lock().unwrap().push((channel.channel_id, Arc::clone(doorbell)));
        Ok(Arc::clone(&self.signal) as Arc<dyn Signal>)
    }

    fn connection_changed(&self, event: &ConnectionEvent) {
        self.events.lock().unwrap().push(event.clone());
    }
}

fn offer(channel: u32) -> OfferChannel {
    OfferChannel {
        interface_id: TYPE,
        instance_id: Guid::from_u128(u128::from(channel)),
        reserved: [0; 16],
        flags: 0.into(),
        mmio_megabytes: 0.into(),
        user_defined: [0; 120],
        subchannel_index: 0.into(),
        mmio_megabytes_optional: 0.into(),
        channel_id: channel.into(),
        monitor_id: 0xff,
        monitor_allocated: 0,
        is_dedicated_interrupt: 1.into(),
        connection_id: (0x2000 | channel).into(),
    }
}

fn host(version: Version) -> Arc<TestHost> {
    let host = Arc::new(TestHost {
        bus: OnceLock::new(),
        version,
        signal: Arc::default(),
        doorbells: Mutex::default(),
        events: Mutex::default(),
        retries: Mutex::default(),
        held: Mutex::default(),
        refuse_attach: Mutex::default(),
        statuses: Mutex::default(),
        features_seen: Mutex::default(),
    });
    let memory = GuestMemory::memfd(PAGES * 4096).unwrap();
    let pages = PageAllocator::new(&memory, 0, PAGES * 4096).unwrap();
    let config = GuestConfig::new(TYPE).only(version);
    let bus = GuestBus::new(config, pages, Arc::clone(&host) as Arc<dyn HostPort>).unwrap();
    assert!(host.bus.set(bus).is_ok());
    host
}

fn connected(version: Version) -> Arc<TestHost> {
    let host = host(version);
    host.bus().connect().unwrap();
    assert!(matches!(host.bus().state(), ConnectionState::Connected { .. }));
    host
}

struct TestClient {
    link: Box<dyn ClientLink>,
    /// The events since the last call.
    take_events: Box<dyn Fn() -> Vec<BusEvent> + Send + Sync>,
    doorbell: Arc<Counter>,
}

fn bind(bus: &GuestBus) -> TestClient {
    let target = Target { interface_type: TYPE, interface_instance: None, subchannel_index: 0 };
    let (sink, recorder) = EventSink::recorder();
    let doorbell = Arc::new(Counter::default());
    let endpoint = Endpoint { events: sink, doorbell: Arc::clone(&doorbell) as Arc<dyn Doorbell> };
    let take_events = Box::new(move || recorder.take());
    TestClient { link: bus.bind(target, endpoint).unwrap(), take_events, doorbell }
}

fn request() -> OpenRequest {
    OpenRequest { incoming_pages: 4, outgoing_pages: 4, target_vp: 0, user_data: [7; 120] }
}

impl TestClient {
    fn open(&self) -> Result<OpenRings, NtStatus> {
        self.link.open(request());
        self.opened()
    }

    #[track_caller]
    fn opened(&self) -> Result<OpenRings, NtStatus> {
        let opened = (self.take_events)().into_iter().find_map(|event| match event {
            BusEvent::OpenCompleted(result) => Some(result),
            _ => None,
        });
        opened.expect("the open was answered")
    }
}

#[track_caller]
fn assert_rest(bus: &GuestBus, clients: usize, reserved_pages: u64) {
    let counts = bus.counts();
    assert_eq!((counts.rings, counts.free_pages), (0, PAGES - reserved_pages));
    assert_eq!((counts.guest.clients, counts.guest.gpadls, counts.guest.messages), (clients, 0, 0));
}

#[test]
fn a_channel_is_opened_used_and_closed() {
    let host = connected(Version::V5_3);
    let bus = host.bus();
    let client = bind(bus);
    let offered = (client.take_events)();
    assert!(matches!(offered[..], [BusEvent::Offered { interface_instance, mmio: None }]
            if interface_instance == Guid::from_u128(1)));
    let rings = client.open().unwrap();
    assert_eq!(rings.incoming.data_len(), 3 * 4096);
    assert_eq!(rings.outgoing.data_len(), 3 * 4096);
    assert_eq!(rings.user_data, [7; 120]);
    rings.signal.signal();
    assert_eq!(host.signal.get(), 1);
    assert_eq!(bus.counts().rings, 1);
    drop(rings);
    client.link.close();
    assert_rest(bus, 1, 0);
    drop(client.open().unwrap());
    drop(client);
    assert_rest(bus, 0, 0);
}

/// The first words of the outgoing ring's memory are those of its control page: what the client
/// writes is where the host finds it.
#[test]
fn the_outgoing_ring_comes_first_and_both_control_pages_are_initialised() {
    let host = connected(Version::V5_3);
    // Whatever was in the pages before does not show.
    host.bus().memory().fill(0, PAGES * 4096, 0xaa).unwrap();
    let client = bind(host.bus());
    let rings = client.open().unwrap();
    for ring in [&rings.outgoing, &rings.incoming] {
        assert_eq!(ring.control_word::<0>().load(Ordering::Relaxed), 0);
        assert_eq!(ring.control_word::<4>().load(Ordering::Relaxed), 0);
        assert_eq!(ring.control_word::<8>().load(Ordering::Relaxed), 0);
        assert_eq!(ring.control_word::<0xc>().load(Ordering::Relaxed), 0);
    }
    let feature_bits = u64::from(ControlPage::FEATURE_BITS);
    for page in [0, 4] {
        let gpa = page * 4096 + feature_bits;
        assert_eq!(host.bus().memory().read_obj::<u32>(gpa).unwrap(), 1, "page {page}");
    }
    // The host sees that when it hears of the ring, and not later.
    assert_eq!(*host.features_seen.lock().unwrap(), [[1, 1]]);
    rings.outgoing.control_word::<0>().store(8, Ordering::Relaxed);
    assert_eq!(host.bus().memory().read_obj::<u32>(0).unwrap(), 8);
}

#[test]
fn ring_memory_is_kept_until_the_host_has_let_go() {
    let host = connected(Version::V5_3);
    let client = bind(host.bus());
    drop(client.open().unwrap());
    host.hold();
    client.link.close();
    assert_eq!(host.bus().counts().free_pages, PAGES - 8);
    host.say();
    assert_eq!(host.bus().counts().free_pages, PAGES);
}

#[test]
fn an_open_that_cannot_be_is_answered_and_leaks_nothing() {
    let host = connected(Version::V5_3);
    let bus = host.bus();
    let client = bind(bus);
    let large = OpenRequest { incoming_pages: 200, ..request() };
    let huge = OpenRequest { incoming_pages: u32::MAX, outgoing_pages: u32::MAX, ..request() };
    let table = [
        (OpenRequest { incoming_pages: 1, ..request() }, NtStatus::INVALID_PARAMETER),
        (OpenRequest { outgoing_pages: 0, ..request() }, NtStatus::INVALID_PARAMETER),
        (OpenRequest { outgoing_pages: 1, ..request() }, NtStatus::INVALID_PARAMETER),
        (huge, NtStatus::INVALID_PARAMETER),
        (OpenRequest { outgoing_pages: 200, ..large }, NtStatus::INSUFFICIENT_RESOURCES),
    ];
    for (request, status) in table {
        client.link.open(request.clone());
        assert_eq!(client.opened().err(), Some(status), "{request:?}");
        assert_rest(bus, 1, 0);
    }
    *host.refuse_attach.lock().unwrap() = Some(NtStatus::ACCESS_DENIED);
    assert_eq!(client.open().err(), Some(NtStatus::ACCESS_DENIED));
    assert_rest(bus, 1, 0);
    *host.refuse_attach.lock().unwrap() = None;

    let rings = client.open().unwrap();
    assert_eq!(client.open().err(), Some(NtStatus::INVALID_DEVICE_STATE), "open already");
    drop(rings);
    let others: Vec<_> = (0..4).map(|_| bind(bus)).collect();
    let unbound = others.last().unwrap();
    assert_eq!(unbound.open().err(), Some(NtStatus::INVALID_DEVICE_STATE), "no offer is left");
    drop((client, others));
    assert_rest(bus, 0, 0);
}

#[test]
fn only_client_endpoints_have_a_place_on_a_guests_bus() {
    let host = host(Version::V5_3);
    let (events, _recorder) = EventSink::recorder();
    let endpoint = Endpoint { events, doorbell: Arc::new(Counter::default()) };
    let offered = host.bus().offer(Offer::new(TYPE, TYPE), endpoint);
    assert_eq!(offered.err(), Some(NtStatus::NOT_SUPPORTED));
}

#[test]
fn buffers_are_described_and_taken_back() {
    let host = connected(Version::V5_3);
    let client = bind(host.bus());
    let run = client.link.allocate_pages(3).unwrap();
    let range = PageRange { byte_count: 3 * 4096, byte_offset: 0, pfns: run.pfns().collect() };
    let pages = GpadlPages { ranges: vec![range], read_only: false };
    let gpadl = client.link.create_gpadl(pages).unwrap();
    (client.take_events)().into_iter().for_each(drop);
    client.link.teardown_gpadl(gpadl);
    assert!(
        matches!((client.take_events)()[..], [BusEvent::GpadlTornDown { gpadl: id }] if id == gpadl)
    );
    let none = GpadlPages { ranges: vec![], read_only: false };
    assert_eq!(client.link.create_gpadl(none), Err(NtStatus::INVALID_PARAMETER));
    assert_eq!(client.link.set_interrupt_latency(1), Err(NtStatus::NOT_SUPPORTED));
    let all = client.link.allocate_pages(u32::try_from(PAGES).unwrap());
    assert_eq!(all.err(), Some(NtStatus::INSUFFICIENT_RESOURCES));
    drop(run);
    drop(client);
    assert_rest(host.bus(), 0, 0);
}

#[test]
fn an_interrupt_rings_the_doorbell_of_its_channel() {
    let host = connected(Version::V5_3);
    let (one, two) = (bind(host.bus()), bind(host.bus()));
    host.bus().interrupt(2);
    for flag in [0, 3, 4, 5, 2047, u16::MAX] {
        host.bus().interrupt(flag); // nobody is there
    }
    assert_eq!((one.doorbell.get(), two.doorbell.get()), (0, 1));
    host.bus().legacy_interrupt(); // there is no interrupt page
}

/// Below 2.4 both directions go through the bits of one page.
#[test]
fn old_versions_signal_by_the_interrupt_page() {
    for version in [Version::V0_13, Version::V1_1] {
        let host = connected(version);
        let bus = host.bus();
        let clients: Vec<_> = (0..4).map(|_| bind(bus)).collect();
        let rings = clients[2].open().unwrap();
        rings.signal.signal();
        assert_eq!(host.signal.get(), 1, "{version}");
        let page = 4096; // the first page whose address is not 0, which would mean "none"
        let to_host: u32 = bus.memory().read_obj(page + 2048).unwrap();
        assert_eq!(to_host, 1 << 3, "{version}");

        bus.memory().write_obj(page, &(1u32 << 2 | 1 << 4 | 1 | 1 << 31)).unwrap();
        bus.memory().write_obj(page + 252, &u32::MAX).unwrap();
        bus.legacy_interrupt();
        let rung: Vec<_> = clients.iter().map(|client| client.doorbell.get()).collect();
        assert_eq!(rung, [0, 1, 0, 1], "{version}");
        for word in 0..64 {
            let bits: u32 = bus.memory().read_obj(page + word * 4).unwrap();
            assert_eq!(bits, 0, "{version}, word {word}");
        }
        drop((rings, clients));
        assert_rest(bus, 0, 1);
    }
}

#[test]
fn everybody_hears_that_the_host_is_gone() {
    let host = connected(Version::V5_3);
    let bus = host.bus();
    let open = bind(bus);
    let rings = open.open().unwrap();
    let waiting: Vec<_> = (0..4).map(|_| bind(bus)).collect();
    (open.take_events)();
    waiting.iter().for_each(|client| drop((client.take_events)()));
    bus.host_gone();
    assert!(matches!((open.take_events)()[..], [BusEvent::Rescinded]));
    assert!(matches!((waiting[0].take_events)()[..], [BusEvent::Rescinded]));
    let failed = (waiting[3].take_events)();
    assert!(
        matches!(failed[..], [BusEvent::ConnectFailed(status)] if status == NtStatus::DEVICE_REMOVED)
    );
    assert_eq!(bus.counts().rings, 1, "the client still uses it");
    let (events, _recorder) = EventSink::recorder();
    let endpoint = Endpoint { events, doorbell: Arc::new(Counter::default()) };
    let target = Target { interface_type: TYPE, interface_instance: None, subchannel_index: 0 };
    assert_eq!(bus.bind(target, endpoint).err(), Some(NtStatus::DEVICE_REMOVED));
    drop((rings, open, waiting));
    assert_rest(bus, 0, 0);
    assert!(matches!(
        host.events.lock().unwrap().last(),
        Some(ConnectionEvent::Lost(crate::LossReason::HostGone))
    ));
}

#[test]
fn a_host_without_buffers_is_asked_again_when_the_port_says_so() {
    let host = host(Version::V5_3);
    host.statuses.lock().unwrap().extend([PostStatus::INSUFFICIENT_BUFFERS; 2]);
    host.bus().connect().unwrap();
    assert_eq!(*host.retries.lock().unwrap(), [1]);
    host.bus().retry_post();
    assert_eq!(*host.retries.lock().unwrap(), [1, 2]);
    host.bus().retry_post();
    assert!(matches!(host.bus().state(), ConnectionState::Connected { .. }));
    assert_eq!(host.bus().message_posted(PostStatus::SUCCESS), Err(RequestError::NothingPosted));
}

#[test]
fn a_withdrawn_channel_goes_back_to_the_host() {
    let host = connected(Version::V5_3);
    let bus = host.bus();
    let client = bind(bus);
    let rings = client.open().unwrap();
    let rescind = RescindChannelOffer { channel_id: 1.into() };
    host.answer(HostMessage::RescindChannelOffer(rescind));
    assert!(matches!((client.take_events)()[..], [BusEvent::Rescinded]));
    assert_eq!(bus.offers().len(), 3);
    drop((rings, client));
    assert_rest(bus, 0, 0);
    assert_eq!(bus.counts().guest.channels, 3);
    // Again: it was released.
    host.answer(HostMessage::OfferChannel(offer(1)));
    bind(bus).open().unwrap();
}

/// Clients on many threads, a host that answers on whichever of them posts: every open is answered,
/// everything comes back.
#[test]
fn threads_share_a_bus() {
    const ROUNDS: usize = 200;
    let host = connected(Version::V5_3);
    let bus = host.bus();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..ROUNDS {
                    let client = bind(bus);
                    let wait_for = |wanted: fn(&BusEvent) -> bool| loop {
                        let mut events = (client.take_events)().into_iter();
                        if let Some(event) = events.find(wanted) {
                            break event;
                        }
                        std::thread::yield_now();
                    };
                    wait_for(|event| matches!(event, BusEvent::Offered { .. }));
                    client.link.open(request());
                    if round % 3 == 0 {
                        continue; // leaves at once, whatever has become of the open
                    }
                    let opened = wait_for(|event| matches!(event, BusEvent::OpenCompleted(_)));
                    assert!(matches!(opened, BusEvent::OpenCompleted(Ok(_))), "round {round}");
                }
            });
        }
    });
    assert_rest(bus, 0, 0);
}
