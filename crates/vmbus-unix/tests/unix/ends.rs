//! A server with an echo device, and a client with its driver.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use kmcl::{
    Channel, ChannelFlags, Error, Guid, IncomingPacket, NtStatus, ProcessPacket, SendFlags, Side,
    StateChange, Timeout,
};
use kmcl_worker::{Source, Worker};
use tempfile::TempDir;
use vmbus_unix::{ConnectError, GuestOptions, HostOptions, UnixGuest, UnixHost};

pub(crate) const ECHO: Guid = Guid::from_u128(0x6c8d9f5e_3a41_4c0b_9d0e_2f1b7a6011ec);
pub(crate) const INSTANCE: Guid = Guid::from_u128(1);

/// Longer than anything takes on a machine that is busy with other things: reached only by a fault.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const MEMORY: u64 = 4 << 20;

/// Lets a worker drive one end.
pub(crate) struct Drive<End>(pub(crate) Arc<End>);

impl Source for Drive<UnixHost> {
    fn ready(&self) -> bool {
        self.0.ready()
    }
}

impl Source for Drive<UnixGuest> {
    fn ready(&self) -> bool {
        self.0.ready()
    }
}

/// Completes each packet with its own payload.
pub(crate) struct Echo;

impl ProcessPacket for Echo {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        let payload = packet.payload().to_vec();
        packet.complete(&payload);
    }
}

/// What state changes a channel has seen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Seen {
    Opened,
    Started,
    Closed,
}

struct Watch(Sender<Seen>);

impl StateChange for Watch {
    fn opened(&self, _: &Channel) -> Result<(), NtStatus> {
        let _nobody_looks = self.0.send(Seen::Opened);
        Ok(())
    }

    fn post_started(&self, _: &Channel) {
        let _nobody_looks = self.0.send(Seen::Started);
    }

    fn closed(&self, _: &Channel) {
        let _nobody_looks = self.0.send(Seen::Closed);
    }
}

/// Waits for the next state change.
#[track_caller]
pub(crate) fn expect(seen: &Receiver<Seen>, expected: Seen) {
    assert_eq!(seen.recv_timeout(PATIENCE), Ok(expected));
}

/// Waits until `done`: what another thread is about to do.
#[track_caller]
pub(crate) fn eventually(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not even after {PATIENCE:?}");
        std::thread::yield_now();
    }
}

/// Serves echo devices, each on its own instance, until dropped.
pub(crate) struct Server {
    pub(crate) devices: Vec<Channel>,
    pub(crate) seen: Receiver<Seen>,
    pub(crate) host: Arc<UnixHost>,
    worker: Worker,
    path: PathBuf,
    _directory: Option<TempDir>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_with(HostOptions::default(), 1)
    }

    pub(crate) fn start_with(options: HostOptions, devices: u128) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmbus");
        let mut server = Self::start_at(&path, options, devices);
        server._directory = Some(directory);
        server
    }

    pub(crate) fn start_at(path: &Path, options: HostOptions, devices: u128) -> Self {
        let host = Arc::new(UnixHost::bind_with(path, options).unwrap());
        let worker = Worker::spawn("server").unwrap();
        let (sender, seen) = channel();
        let devices = (1..=devices)
            .map(|instance| {
                let device = Channel::allocate(Side::Server, Arc::new(host.bus().clone()));
                let instance = Guid::from_u128(instance);
                device.server_init_set_target_interface_id(ECHO, instance).unwrap();
                device.init_set_process_packet_callbacks(Arc::new(Echo)).unwrap();
                device.init_set_state_change_callbacks(Arc::new(Watch(sender.clone()))).unwrap();
                worker.add(&device).unwrap();
                device.enable().unwrap();
                device.start();
                device
            })
            .collect();
        worker.add_source(Arc::clone(&host), Arc::new(Drive(Arc::clone(&host)))).unwrap();
        Self { devices, seen, host, worker, path: path.to_owned(), _directory: None }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The first device.
    pub(crate) fn device(&self) -> &Channel {
        &self.devices[0]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for device in &self.devices {
            device.disable();
            self.worker.remove(device);
        }
    }
}

/// A guest with one driver.
pub(crate) struct Client {
    pub(crate) channel: Channel,
    pub(crate) seen: Receiver<Seen>,
    pub(crate) guest: Arc<UnixGuest>,
    pub(crate) worker: Worker,
}

impl Client {
    /// Connected, its channel open and started.
    pub(crate) fn connect(path: &Path) -> Self {
        Self::connect_with(path, GuestOptions::new(MEMORY)).unwrap()
    }

    pub(crate) fn connect_with(path: &Path, options: GuestOptions) -> Result<Self, ConnectError> {
        let client = Self::start(path, options)?;
        expect(&client.seen, Seen::Opened);
        expect(&client.seen, Seen::Started);
        Ok(client)
    }

    /// Connected, its channel enabled; whatever comes of it.
    pub(crate) fn start(path: &Path, options: GuestOptions) -> Result<Self, ConnectError> {
        let guest = Arc::new(UnixGuest::connect_with(path, options)?);
        let worker = Worker::spawn("client").unwrap();
        worker.add_source(Arc::clone(&guest), Arc::new(Drive(Arc::clone(&guest)))).unwrap();
        let (channel, seen) = driver(&guest, &worker, INSTANCE);
        Ok(Self { channel, seen, guest, worker })
    }

    /// Sends `payload`, and returns what comes back.
    pub(crate) fn echo(&self, payload: &[u8]) -> Result<Vec<u8>, Error> {
        echo(&self.channel, payload)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.channel.disable();
        self.worker.remove(&self.channel);
    }
}

/// A client endpoint that is enabled, driven by `worker`.
pub(crate) fn driver(
    guest: &UnixGuest,
    worker: &Worker,
    instance: Guid,
) -> (Channel, Receiver<Seen>) {
    let (sender, seen) = channel();
    let driver = Channel::allocate(Side::Client, Arc::new(guest.bus().clone()));
    driver.client_init_set_target_pnp(ECHO, Some(instance), None).unwrap();
    driver.init_set_state_change_callbacks(Arc::new(Watch(sender))).unwrap();
    driver.init_set_flags(ChannelFlags::empty()).unwrap();
    worker.add(&driver).unwrap();
    driver.enable().unwrap();
    (driver, seen)
}

pub(crate) fn echo(channel: &Channel, payload: &[u8]) -> Result<Vec<u8>, Error> {
    let mut answer = vec![0; payload.len().next_multiple_of(8)];
    let len = channel.send_synchronous_request(
        payload,
        None,
        SendFlags::WAIT_FOR_COMPLETION,
        Some(&mut answer),
        Timeout::After(PATIENCE),
    )?;
    answer.truncate(len);
    Ok(answer)
}
