//! Sockets of a guest that goes on elsewhere: what the guest says is written down byte by byte, its bus and
//! its sockets are the real ones.

use std::error::Error;
use std::io::{self, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::task::Waker;

use kmcl::bus::{Doorbell, Signal};
use kmcl::memory::{GuestMemory, MappingBudget};
use kmcl::{Channel, Guid, SaveOptions};
use saved_state::file::FileWriter;
use saved_state::{FormatVersion, StreamHeader};
use tempfile::TempDir;
use vmbus_host::{Config, GuestPort, HostBus, Posted, SlotId};
use vmbus_wire::hvsock::service_of_port;
use vsp_socket::{Driver, SocketBroker, SocketConfig};

use crate::bus::{contact, message};
use crate::guest::lock;
use crate::storage::streams;

const MEMORY_BYTES: u64 = 1 << 20;
/// Numbers of messages.
const OFFER: u32 = 1;
const RESCIND: u32 = 2;
const REQUEST_OFFERS: u32 = 3;
const TL_CONNECT_REQUEST: u32 = 21;

/// A guest that listens, and keeps the numbers of the messages that it got.
struct Port {
    memory: GuestMemory,
    heard: Mutex<Vec<u32>>,
}

struct Nobody;

impl Signal for Nobody {
    fn signal(&self) {}
}

impl GuestPort for Port {
    fn memory(&self) -> Option<GuestMemory> {
        Some(self.memory.clone())
    }

    fn vp_count(&self) -> u32 {
        1
    }

    fn post_message(&self, _: SlotId, message: &[u8]) -> Posted {
        lock(&self.heard).push(u32::from_le_bytes(message[..4].try_into().unwrap()));
        Posted::Taken
    }

    fn event_flag(&self, _: u32, _: u8, _: u16) -> io::Result<Arc<dyn Signal>> {
        Ok(Arc::new(Nobody))
    }

    fn listen(&self, _: u32, _: Arc<dyn Doorbell>) -> io::Result<()> {
        Ok(())
    }

    fn unlisten(&self, _: u32) {}
}

impl Port {
    fn new() -> Arc<Self> {
        let memory = GuestMemory::memfd(MEMORY_BYTES).unwrap();
        Arc::new(Self { memory, heard: Mutex::default() })
    }

    /// How many messages of that kind it got.
    fn heard(&self, kind: u32) -> usize {
        lock(&self.heard).iter().filter(|heard| **heard == kind).count()
    }
}

/// Runs no channel: none is opened.
struct Idle;

impl Driver for Idle {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        channel.set_waker(Waker::noop().clone());
        Ok(())
    }

    fn remove_channel(&self, channel: &Channel) {
        channel.clear_waker();
    }
}

/// A guest that is connected, its bus and its sockets.
pub struct Server {
    port: Arc<Port>,
    bus: HostBus,
    broker: SocketBroker,
    folder: TempDir,
    /// What keeps connections alive: programs of the host.
    programs: Vec<UnixStream>,
    listeners: Vec<UnixListener>,
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl Server {
    /// No connections.
    #[must_use]
    pub fn new() -> Self {
        let (port, folder) = (Port::new(), tempfile::tempdir().unwrap());
        let bus = HostBus::new(Arc::clone(&port) as Arc<dyn GuestPort>, Config::default());
        bus.post_message(4, &contact()).unwrap();
        bus.post_message(1, &message(REQUEST_OFFERS, &[])).unwrap();
        let config = SocketConfig::new(folder.path().join("vsock"));
        let broker = SocketBroker::new(bus.clone(), Arc::new(Idle), config).unwrap();
        Self { port, bus, broker, folder, programs: Vec::new(), listeners: Vec::new() }
    }

    fn run(&self) {
        for _ in 0..8 {
            while self.broker.ready() {}
        }
    }

    /// The guest asks for a connection to a port of its host.
    fn ask(&self, own: u32, port: u32) {
        let guid = |port| service_of_port(port).to_bytes();
        let guids = [guid(own), guid(port)].concat();
        let request = [message(TL_CONNECT_REQUEST, &[]), guids].concat();
        self.bus.post_message(1, &request).unwrap();
    }

    /// The guest connects to a program that listens at `port`.
    pub fn guest_connects(&mut self, own: u32, port: u32) {
        let offers = self.port.heard(OFFER);
        let path = self.folder.path().join(format!("vsock_{port}"));
        self.listeners.push(UnixListener::bind(path).unwrap());
        self.ask(own, port);
        self.run();
        assert_eq!(self.port.heard(OFFER), offers + 1);
    }

    /// A program connects to a port of the guest's.
    pub fn host_connects(&mut self, port: u32) {
        let offers = self.port.heard(OFFER);
        let mut program = UnixStream::connect(self.folder.path().join("vsock")).unwrap();
        program.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        self.programs.push(program);
        self.run();
        assert_eq!(self.port.heard(OFFER), offers + 1);
    }

    /// What is saved of the bus and the sockets; both are gone then. Meanwhile the guest asks for one
    /// more connection where `asks`.
    #[must_use]
    pub fn move_away(self, asks: bool) -> Vec<u8> {
        let frozen = self.broker.freeze().unwrap();
        if asks {
            self.ask(20_000, 99);
        }
        let held = self.bus.hold();
        let options = SaveOptions::default();
        let mut file = Vec::new();
        let mut writer = FileWriter::new(FormatVersion::NEWEST, options.producer);
        writer.add("bus", 0, held.save(&options).unwrap());
        writer.add("sockets", 0, frozen.save(&options).unwrap());
        writer.write_to(&mut file).unwrap();
        held.move_away();
        frozen.move_away();
        file
    }
}

/// Restores bus and sockets in a process where nothing is left of those that saved them: each connection is
/// withdrawn, once, and another one can be made.
pub fn assert_goes_on(file: &[u8]) {
    let streams = streams(file);
    let [bus, sockets] = &streams[..] else { panic!("{} streams", streams.len()) };
    let (port, folder) = (Port::new(), tempfile::tempdir().unwrap());
    let as_port = Arc::clone(&port) as Arc<dyn GuestPort>;
    let bus = HostBus::restoring(as_port, MappingBudget::default(), bus).unwrap();
    let config = SocketConfig::new(folder.path().join("vsock"));
    let restoring =
        SocketBroker::restoring(bus.clone(), Arc::new(Idle), config, &sockets[..]).unwrap();
    let connections = restoring.connections();
    let header = StreamHeader::read(&sockets[..]).unwrap();
    assert_eq!(connections, header.info.items as usize);
    assert_eq!(header.info.interface_instance, Guid::ZERO);
    bus.finish_restore().unwrap();
    let broker = restoring.start();
    let (programs, listeners) = (Vec::new(), Vec::new());
    let mut server = Server { port, bus, broker, folder, programs, listeners };
    server.run();
    assert_eq!(server.port.heard(RESCIND), connections);
    assert_eq!(server.broker.counts().connections, 0);
    assert_eq!(server.bus.usage().hvsock_requests, 0, "whoever asked is answered");
    server.guest_connects(30_000, 52);
    server.host_connects(1024);
    assert_eq!(server.broker.counts().connections, 2);
}
