//! A guest with a socket driver of its own, a host with a broker, and programs, all in one thread that the
//! test turns.
//!
//! The guest does what Linux does: rings of six pages, packets of at most 4088 bytes, room asked for once
//! and for all; and it looks at its rings only when it was signalled, so that a signal that is missing
//! shows.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "each test file uses a part of it, and a test may stop at its first surprise"
)]

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::time::Duration;

use kmcl::bus::{
    Bus, BusEvent, ClientLink, Doorbell, Endpoint, EventSink, OpenRequest, OpenRings, Recorder,
    Signal, Target, USER_DATA_SIZE,
};
use kmcl::memory::MappingBudget;
use kmcl::{Channel, Guid, NtStatus, SaveOptions};
use saved_state::Save;
use tempfile::TempDir;
use vmbus_guest::{ConnectionState, GuestBus, GuestConfig, HostPort, OfferedChannel, PostStatus};
use vmbus_host::{Config, GuestPort, HostBus, SlotId};
use vmbus_memory::{GuestMemory, PageAllocator};
use vmbus_ring::{ControlWords, OutgoingPacket, PushError, RingReader, RingWriter, Word};
use vmbus_wire::hvsock::{port_of_service, service_of_port};
use vmbus_wire::offer::{HvsockUserDefined, OfferFlags};
use vmbus_wire::packet::PacketKind;
use vmbus_wire::pipe::PipeHeader;
use vsp_socket::{Driver, SocketBroker, SocketConfig, SocketCounts};
use zerocopy::IntoBytes;

/// Bytes of the guest's memory.
const MEMORY: u64 = 64 << 20;

/// Pages of each ring that Linux opens, the control page included.
pub(crate) const RING_PAGES: u32 = 6;

/// Most bytes that Linux sends in one packet.
pub(crate) const SEND_BYTES: usize = 4088;

/// Turns after which nothing moves any more, whatever has begun it.
const TURNS: usize = 8;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- Wires ------------------------------------------------------------------------------------------

/// What lies between guest and host. Everything arrives at once.
#[derive(Default)]
pub(crate) struct Wires {
    memory: OnceLock<GuestMemory>,
    guest: OnceLock<GuestBus>,
    host: Mutex<Option<(HostBus, Arc<HostEnd>)>>,
    /// The guest does not look at its messages.
    is_deaf: AtomicBool,
}

/// One host's end: what a former host still does has no effect.
pub(crate) struct HostEnd {
    wires: Arc<Wires>,
    doorbells: Mutex<BTreeMap<u32, Arc<dyn Doorbell>>>,
}

struct GuestEnd(Arc<Wires>);

struct ToGuest(Arc<Wires>, u16);

struct ToHost(Arc<Wires>, u32);

impl Wires {
    fn is_current(&self, end: &HostEnd) -> bool {
        lock(&self.host).as_ref().is_some_and(|(_, current)| std::ptr::eq(&**current, end))
    }
}

impl GuestPort for HostEnd {
    fn memory(&self) -> Option<GuestMemory> {
        self.wires.memory.get().cloned()
    }
    fn vp_count(&self) -> u32 {
        1
    }
    fn post_message(&self, _: SlotId, message: &[u8]) -> vmbus_host::Posted {
        if self.wires.is_current(self) && !self.wires.is_deaf.load(Ordering::SeqCst) {
            self.wires.guest.get().unwrap().host_message(message).unwrap();
        }
        vmbus_host::Posted::Taken
    }
    fn event_flag(&self, _: u32, _: u8, flag: u16) -> io::Result<Arc<dyn Signal>> {
        Ok(Arc::new(ToGuest(self.wires.clone(), flag)))
    }
    fn listen(&self, connection_id: u32, doorbell: Arc<dyn Doorbell>) -> io::Result<()> {
        lock(&self.doorbells).insert(connection_id, doorbell);
        Ok(())
    }
    fn unlisten(&self, connection_id: u32) {
        lock(&self.doorbells).remove(&connection_id);
    }
}

impl HostPort for GuestEnd {
    fn post_message(&self, connection_id: u32, message: &[u8]) -> vmbus_guest::Posted {
        let host = lock(&self.0.host).as_ref().map(|(host, _)| host.clone());
        let status = host.unwrap().post_message(connection_id, message);
        vmbus_guest::Posted::Answered(match status {
            Ok(()) => PostStatus::SUCCESS,
            Err(error) => PostStatus(error.hypercall_status()),
        })
    }
    fn retry_post_later(&self, _: u32) {}
    fn attach(
        &self,
        channel: &OfferedChannel,
        _: &Arc<dyn Doorbell>,
    ) -> Result<Arc<dyn Signal>, NtStatus> {
        Ok(Arc::new(ToHost(self.0.clone(), channel.connection_id)))
    }
}

impl Signal for ToGuest {
    fn signal(&self) {
        self.0.guest.get().unwrap().interrupt(self.1);
    }
}

impl Signal for ToHost {
    fn signal(&self) {
        let end = lock(&self.0.host).as_ref().map(|(_, end)| end.clone()).unwrap();
        let doorbell = lock(&end.doorbells).get(&self.1).cloned();
        if let Some(doorbell) = doorbell {
            doorbell.ring();
        }
    }
}

// ---- Who drives -------------------------------------------------------------------------------------

/// Drives channels when the test says so.
#[derive(Default)]
pub(crate) struct Manual {
    channels: Mutex<Vec<Channel>>,
    /// Takes no further channel.
    pub(crate) refuses: AtomicBool,
}

fn same(one: &Channel, other: &Channel) -> bool {
    use std::os::fd::AsRawFd;
    one.doorbell_fd().unwrap().as_raw_fd() == other.doorbell_fd().unwrap().as_raw_fd()
}

impl Driver for Manual {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err("no more".into());
        }
        channel.set_waker(Waker::noop().clone());
        lock(&self.channels).push(channel.clone());
        Ok(())
    }
    fn remove_channel(&self, channel: &Channel) {
        lock(&self.channels).retain(|other| !same(other, channel));
        channel.clear_waker();
    }
}

impl Manual {
    pub(crate) fn channels(&self) -> Vec<Channel> {
        lock(&self.channels).clone()
    }
}

// ---- The world --------------------------------------------------------------------------------------

/// See the module.
pub(crate) struct World {
    pub(crate) wires: Arc<Wires>,
    pub(crate) guest: GuestBus,
    pub(crate) bus: HostBus,
    /// Mappings that the host's rings take.
    mappings: MappingBudget,
    all_mappings: usize,
    pub(crate) driver: Arc<Manual>,
    pub(crate) broker: Option<SocketBroker>,
    pub(crate) directory: TempDir,
    /// The guest's ephemeral ports.
    next_port: u32,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(|config| config)
    }

    pub(crate) fn with(config: impl FnOnce(SocketConfig) -> SocketConfig) -> Self {
        let mut world = Self::without_broker();
        let driver = world.driver.clone();
        let config = config(SocketConfig::new(world.path()));
        let broker = SocketBroker::new(world.bus.clone(), driver, config).unwrap();
        world.broker = Some(broker);
        world.connect_guest();
        world
    }

    pub(crate) fn without_broker() -> Self {
        let memory = GuestMemory::memfd(MEMORY).unwrap();
        let pages = PageAllocator::new(&memory, 0, MEMORY).unwrap();
        let wires = Arc::new(Wires::default());
        wires.memory.set(memory).unwrap();
        let end = Arc::new(HostEnd { wires: wires.clone(), doorbells: Mutex::default() });
        let mappings = MappingBudget::default();
        let all_mappings = mappings.left();
        let bus = HostBus::with_budget(end.clone(), Config::default(), mappings.clone());
        *lock(&wires.host) = Some((bus.clone(), end));
        let config = GuestConfig::new(Guid::from_u128(7));
        let guest = GuestBus::new(config, pages, Arc::new(GuestEnd(wires.clone()))).unwrap();
        let _only_once = wires.guest.set(guest.clone());
        let directory = tempfile::tempdir().unwrap();
        let driver = Arc::new(Manual::default());
        let (broker, next_port) = (None, 10_000);
        Self { wires, guest, bus, mappings, all_mappings, driver, broker, directory, next_port }
    }

    /// From now on the guest hears nothing.
    pub(crate) fn guest_is_deaf(&self) {
        self.wires.is_deaf.store(true, Ordering::SeqCst);
    }

    pub(crate) fn connect_guest(&self) {
        self.guest.connect().unwrap();
        assert!(matches!(self.guest.state(), ConnectionState::Connected { .. }));
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    pub(crate) fn broker(&self) -> &SocketBroker {
        self.broker.as_ref().unwrap()
    }

    /// Turns everything until nothing moves.
    pub(crate) fn settle(&self) {
        for _ in 0..TURNS {
            for channel in self.driver.channels() {
                channel.acknowledge();
                while channel.process(64).more {}
            }
            if let Some(broker) = &self.broker {
                while broker.ready() {}
            }
        }
    }

    pub(crate) fn tick(&self, millis: u64) {
        self.broker().tick(Duration::from_millis(millis));
        self.settle();
    }

    pub(crate) fn counts(&self) -> (usize, usize, usize, usize) {
        let SocketCounts { connections, draining, programs, requests, .. } = self.broker().counts();
        (connections, draining, programs, requests)
    }

    /// A program of the host that waits for the guest's connections to `port`.
    pub(crate) fn listener(&self, port: u32) -> UnixListener {
        let listener =
            UnixListener::bind(self.directory.path().join(format!("vsock_{port}"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// The guest asks for a connection to `port`; returns its own.
    pub(crate) fn ask(&mut self, port: u32) -> u32 {
        self.next_port += 1;
        let own = self.next_port;
        self.guest.connect_hvsock(service_of_port(own), service_of_port(port), None).unwrap();
        own
    }

    /// The guest's offers of socket connections: service port, endpoint port, from the host.
    pub(crate) fn offers(&self) -> Vec<(u32, u32, bool)> {
        self.guest
            .offers()
            .iter()
            .map(|offer| {
                assert_eq!(offer.flags, OfferFlags::HVSOCK);
                let user = HvsockUserDefined::from_bytes(offer.user_defined);
                assert_eq!(user.pipe_type.get(), 0, "a byte pipe");
                let port = |guid| port_of_service(guid).unwrap();
                (
                    port(offer.interface_type),
                    port(offer.interface_instance),
                    user.is_for_guest_accept == 1,
                )
            })
            .collect()
    }

    /// The guest's driver takes the offer of such a connection and opens it.
    pub(crate) fn open(&self, service: u32, endpoint: u32) -> Socket {
        let socket = self.open_with(service, endpoint, RING_PAGES);
        socket.expect("the open was refused")
    }

    pub(crate) fn open_with(
        &self,
        service: u32,
        endpoint: u32,
        pages: u32,
    ) -> Result<Socket, NtStatus> {
        let mut opening = self.begin_open(service, endpoint, pages);
        self.settle();
        opening.finish()
    }

    pub(crate) fn begin_open(&self, service: u32, endpoint: u32, pages: u32) -> Opening {
        let (events, recorder) = EventSink::recorder();
        let bell = Arc::new(Bell::default());
        let target = Target {
            interface_type: service_of_port(service),
            interface_instance: Some(service_of_port(endpoint)),
            subchannel_index: 0,
        };
        let endpoint = Endpoint { events, doorbell: bell.clone() };
        let link = self.guest.bind(target, endpoint).unwrap();
        link.open(OpenRequest {
            incoming_pages: pages,
            outgoing_pages: pages,
            target_vp: 0,
            user_data: [0; USER_DATA_SIZE],
        });
        Opening { link: Some(link), recorder: Some(recorder), bell, answer: None }
    }

    /// A guest's connection to a program that listens: both ends.
    pub(crate) fn guest_connects(
        &mut self,
        listener: &UnixListener,
        port: u32,
    ) -> (Socket, UnixStream) {
        let own = self.ask(port);
        self.settle();
        let socket = self.open(port, own);
        let (program, _) = listener.accept().unwrap();
        program.set_nonblocking(true).unwrap();
        (socket, program)
    }

    /// A program says where it wants to be connected.
    pub(crate) fn program(&self, line: &[u8]) -> UnixStream {
        let mut program = UnixStream::connect(self.path()).unwrap();
        program.write_all(line).unwrap();
        program.set_nonblocking(true).unwrap();
        self.settle();
        program
    }

    /// A program's connection to a listener in the guest: both ends. The answer is read.
    pub(crate) fn host_connects(&self, port: u32) -> (Socket, UnixStream) {
        let before = self.offers();
        let mut program = self.program(format!("CONNECT {port}\n").as_bytes());
        let offer = self.offers().into_iter().find(|offer| !before.contains(offer)).unwrap();
        let (service, endpoint, true) = offer else { panic!("{offer:?}") };
        assert_eq!(service, port);
        assert_eq!(read_some(&mut program), Got::Nothing, "nobody has taken it yet");
        let socket = self.open(service, endpoint);
        let answer = format!("OK {endpoint}\n");
        assert_eq!(read_some(&mut program), Got::Bytes(answer.into_bytes()));
        (socket, program)
    }

    /// Whether nothing is left of any connection, at either end.
    pub(crate) fn assert_nothing_left(&self) {
        self.settle();
        assert_eq!(self.counts(), (0, 0, 0, 0));
        self.assert_guest_has_nothing();
    }

    pub(crate) fn assert_guest_has_nothing(&self) {
        let usage = self.bus.usage();
        assert_eq!(
            (usage.channels, usage.gpadls, usage.messages, usage.hvsock_requests),
            (0, 0, 0, 0)
        );
        assert_eq!(self.bus.active_channels(), 0);
        assert_eq!(self.mappings.left(), self.all_mappings);
        assert_eq!(self.driver.channels().len(), 0);
        let counts = self.guest.counts();
        assert_eq!((counts.rings, counts.free_pages), (0, MEMORY / 4096));
        assert_eq!(counts.guest.channels, 0);
    }

    /// The guest is saved, and goes on in another host: its bus and its sockets' state.
    pub(crate) fn save(&self, frozen: &vsp_socket::FrozenSockets) -> (Vec<u8>, Vec<u8>) {
        let held = self.bus.hold();
        let (mut bus, mut sockets) = (Vec::new(), Vec::new());
        held.save(&SaveOptions::default()).unwrap().write_to(&mut bus).unwrap();
        frozen.save(&SaveOptions::default()).unwrap().write_to(&mut sockets).unwrap();
        (bus, sockets)
    }

    /// From now on another host has the guest: the bus out of this state.
    pub(crate) fn next_host(&mut self, state: &[u8]) {
        let end = Arc::new(HostEnd { wires: self.wires.clone(), doorbells: Mutex::default() });
        let bus = HostBus::restoring(end.clone(), self.mappings.clone(), state).unwrap();
        *lock(&self.wires.host) = Some((bus.clone(), end));
        self.bus = bus;
    }
}

// ---- The guest's end --------------------------------------------------------------------------------

#[derive(Default)]
pub(crate) struct Bell(AtomicBool);

impl Doorbell for Bell {
    fn ring(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
    fn event_fd(&self) -> io::Result<BorrowedFd<'_>> {
        Err(ErrorKind::Unsupported.into())
    }
}

/// An open that was asked for.
pub(crate) struct Opening {
    link: Option<Box<dyn ClientLink>>,
    recorder: Option<Recorder>,
    bell: Arc<Bell>,
    answer: Option<Result<OpenRings, NtStatus>>,
}

impl Opening {
    /// Whether the host has answered.
    pub(crate) fn is_answered(&mut self) -> bool {
        for event in self.recorder.as_ref().unwrap().take() {
            if let BusEvent::OpenCompleted(answer) = event {
                self.answer = Some(answer);
            }
        }
        self.answer.is_some()
    }

    pub(crate) fn finish(&mut self) -> Result<Socket, NtStatus> {
        assert!(self.is_answered(), "the open was not answered");
        let (link, recorder) = (self.link.take().unwrap(), self.recorder.take().unwrap());
        let rings = self.answer.take().unwrap()?;
        Ok(Socket::new(link, recorder, self.bell.clone(), rings))
    }
}

/// What the guest's driver has of a connection.
pub(crate) struct Socket {
    link: Option<Box<dyn ClientLink>>,
    recorder: Recorder,
    bell: Arc<Bell>,
    pub(crate) reader: RingReader,
    pub(crate) writer: RingWriter,
    signal: Arc<dyn Signal>,
    /// The ring to read was empty, and the host was asked to signal.
    waits_for_bytes: bool,
    /// The ring to write was full.
    waits_for_room: bool,
    /// Bytes of a packet that was read in part.
    rest: Vec<u8>,
    /// The host has finished.
    pub(crate) is_at_end: bool,
    /// Sizes of the packets read.
    pub(crate) packets: Vec<usize>,
}

impl Socket {
    fn new(
        link: Box<dyn ClientLink>,
        recorder: Recorder,
        bell: Arc<Bell>,
        rings: OpenRings,
    ) -> Self {
        let writer = RingWriter::new(rings.outgoing).unwrap();
        writer.pages().store(Word::PendingSendSize, 4120, Ordering::SeqCst);
        Self {
            link: Some(link),
            recorder,
            bell,
            reader: RingReader::new(rings.incoming).unwrap(),
            writer,
            signal: rings.signal,
            waits_for_bytes: false,
            waits_for_room: false,
            rest: Vec::new(),
            is_at_end: false,
            packets: Vec::new(),
        }
    }

    fn hear(&mut self) {
        if self.bell.0.swap(false, Ordering::SeqCst) {
            self.waits_for_bytes = false;
            self.waits_for_room = false;
        }
    }

    /// Sends as much as fits; returns how much that was.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> usize {
        self.hear();
        let mut sent = 0;
        for piece in bytes.chunks(SEND_BYTES) {
            if self.waits_for_room || !self.packet(1, piece) {
                self.waits_for_room = true;
                break;
            }
            sent += piece.len();
        }
        sent
    }

    /// Says that it has finished.
    pub(crate) fn finish(&mut self) {
        assert!(self.packet(1, &[]), "room for the end is always kept");
    }

    /// One packet with a pipe's header; `false` if there is no room.
    pub(crate) fn packet(&mut self, packet_type: u32, bytes: &[u8]) -> bool {
        let header = PipeHeader {
            packet_type: packet_type.into(),
            length: u32::try_from(bytes.len()).unwrap().into(),
        };
        // Room for the end of the stream is kept.
        let needed = 16 + 8 + bytes.len().next_multiple_of(8) + 8;
        let kept = if bytes.is_empty() { 0 } else { 32 };
        if (self.writer.free().unwrap() as usize) < needed + kept {
            return false;
        }
        self.raw(PacketKind::InBand, header.as_bytes(), bytes).unwrap();
        true
    }

    /// Anything at all.
    pub(crate) fn raw(
        &mut self,
        kind: PacketKind,
        header: &[u8],
        bytes: &[u8],
    ) -> Result<(), PushError> {
        self.writer.push(&OutgoingPacket {
            kind,
            wants_completion: false,
            transaction_id: 0,
            extension: &[],
            payload: &[header, bytes],
        })?;
        // As `publish`, which would clear the pending send size.
        if self.writer.publish() {
            self.signal.signal();
        }
        Ok(())
    }

    /// Reads up to `most` bytes; whole packets leave the ring once they are read.
    pub(crate) fn recv(&mut self, most: usize) -> Vec<u8> {
        self.hear();
        while self.rest.len() < most && !self.is_at_end && !self.waits_for_bytes {
            let Some(packet) = self.reader.peek().unwrap() else {
                if !self.reader.unmask_and_check().unwrap() {
                    self.waits_for_bytes = true;
                }
                continue;
            };
            assert_eq!(packet.kind, PacketKind::InBand);
            assert!(!packet.wants_completion);
            let mut payload = vec![0; packet.payload_len as usize];
            packet.copy_payload(&mut payload);
            let word = |at: usize| u32::from_le_bytes(payload[at..at + 4].try_into().unwrap());
            let len = word(4) as usize;
            assert_eq!(word(0), 1, "data");
            assert!(len <= 16384 && 8 + len <= payload.len(), "{len} of {}", payload.len());
            self.packets.push(len);
            if len == 0 {
                self.is_at_end = true;
            }
            self.rest.extend_from_slice(&payload[8..8 + len]);
            self.reader.advance();
            if self.reader.publish() {
                self.signal.signal();
            }
        }
        let rest = self.rest.split_off(most.min(self.rest.len()));
        std::mem::replace(&mut self.rest, rest)
    }

    /// Closes the channel, and lets go of it.
    pub(crate) fn close(mut self) {
        let link = self.link.take().unwrap();
        link.close();
    }

    /// Whether the host has withdrawn it.
    pub(crate) fn is_rescinded(&self) -> bool {
        self.recorder.take().iter().any(|event| matches!(event, BusEvent::Rescinded))
    }
}

// ---- Programs ---------------------------------------------------------------------------------------

/// What a program got.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Got {
    Bytes(Vec<u8>),
    /// Nothing for the moment.
    Nothing,
    /// Its end, or a reset.
    End,
}

pub(crate) fn read_some(program: &mut UnixStream) -> Got {
    let mut bytes = vec![0; 64 << 10];
    match program.read(&mut bytes) {
        Ok(0) => Got::End,
        Ok(read) => {
            bytes.truncate(read);
            Got::Bytes(bytes)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => Got::Nothing,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Got::End,
        Err(error) => panic!("{error}"),
    }
}

/// Writes as much as fits.
pub(crate) fn write_some(program: &mut UnixStream, bytes: &[u8]) -> usize {
    match program.write(bytes) {
        Ok(written) => written,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("{error}"),
    }
}

/// Bytes that tell their place in the stream.
pub(crate) fn stream(len: usize, seed: u8) -> Vec<u8> {
    let mut state = u64::from(seed) << 32 | 0x9e37_79b9;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Descriptors that this process has open.
pub(crate) fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
