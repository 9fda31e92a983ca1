//! A server that is saved, and goes on in another one: at every step of a connection's life, with
//! requests in flight, and nothing lost or done twice.
//!
//! One thread does everything, one step after the other: the moment of the move is the test's to
//! choose. The two servers are in one process; what the guest sees of the first one's end is what it
//! sees when a process is killed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kmcl::{
    Channel, ChannelState, Frozen, Guid, IncomingPacket, NtStatus, Packet, PacketCompletion,
    ProcessPacket, ResumedPacket, Save, SaveOptions, SendFlags, Side,
};
use kmcl_worker::Worker;
use tempfile::TempDir;
use vmbus_guest::ConnectionState;
use vmbus_host::HostBus;
use vmbus_unix::{
    ConnectionError, FinishError, GuestEvent, GuestOptions, HeldHost, HostOptions, Reason,
    RestoringHost, UnixGuest, UnixHost,
};
use vmbus_wire::version::Version;

use crate::ends::{Client, Drive, ECHO, Echo, INSTANCE, MEMORY, PATIENCE, echo, eventually};

/// Requests of a whole life.
const REQUESTS: u64 = 40;

/// Requests that the device keeps to itself before it begins to complete them.
const KEPT: usize = 5;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device that takes its time, and what all its incarnations have done.
#[derive(Default)]
struct Slow {
    held: Mutex<Vec<IncomingPacket>>,
    done: Arc<Mutex<Vec<u64>>>,
}

impl Slow {
    /// Completes the oldest request, if it has more than `keep`.
    fn complete_one(&self, keep: usize) {
        let packet = {
            let mut held = lock(&self.held);
            if held.len() <= keep {
                return;
            }
            held.remove(0)
        };
        let payload = packet.payload().to_vec();
        lock(&self.done).push(number(&payload));
        packet.complete(&payload);
    }
}

fn number(payload: &[u8]) -> u64 {
    u64::from_le_bytes(payload[..8].try_into().unwrap())
}

impl ProcessPacket for Slow {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        lock(&self.held).push(packet);
    }

    fn resume_packet(&self, _: &Channel, packet: ResumedPacket) {
        assert_eq!(packet.device_state(), b"kept");
        lock(&self.held).push(packet.into_packet());
    }

    fn freeze(&self, _: &Channel) {
        for packet in lock(&self.held).drain(..) {
            packet.never_started().hand_over(b"kept").unwrap();
        }
    }
}

/// What the client's requests have come to.
#[derive(Default)]
struct Answers(Mutex<Vec<(u64, NtStatus, u64)>>);

impl PacketCompletion for Answers {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        let answer = if payload.is_empty() { u64::MAX } else { number(payload) };
        lock(&self.0).push((packet.pointer() as u64, status, answer));
    }
}

/// A server, its device, and a client in another world.
struct World {
    directory: TempDir,
    host: UnixHost,
    device: Channel,
    slow: Arc<Slow>,
    guest: UnixGuest,
    client: Channel,
    answers: Arc<Answers>,
    sent: u64,
    steps: usize,
}

fn device(bus: &HostBus, done: &Arc<Mutex<Vec<u64>>>) -> (Channel, Arc<Slow>) {
    let slow = Arc::new(Slow { done: Arc::clone(done), ..Slow::default() });
    let device = Channel::allocate(Side::Server, Arc::new(bus.clone()));
    device.server_init_set_target_interface_id(ECHO, INSTANCE).unwrap();
    device.init_set_process_packet_callbacks(Arc::clone(&slow) as _).unwrap();
    device.enable().unwrap();
    (device, slow)
}

impl World {
    /// A guest that the server has taken, and nothing more.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmbus");
        let host = UnixHost::bind(&path).unwrap();
        let (device, slow) = device(host.bus(), &Arc::default());
        device.start();
        let options = GuestOptions { reconnect: Some(PATIENCE), ..GuestOptions::new(MEMORY) };
        let guest = std::thread::scope(|scope| {
            let connecting = scope.spawn(|| UnixGuest::connect_with(&path, options).unwrap());
            while host.guest().is_none() {
                host.wait(Some(PATIENCE)).unwrap();
                host.drive().unwrap();
            }
            connecting.join().unwrap()
        });
        let client = Channel::allocate(Side::Client, Arc::new(guest.bus().clone()));
        client.client_init_set_target_pnp(ECHO, Some(INSTANCE), None).unwrap();
        // Large enough that their description takes several messages.
        client.client_init_set_ring_buffer_page_count(40, 40).unwrap();
        client.enable().unwrap();
        let answers = Arc::new(Answers::default());
        Self { directory, host, device, slow, guest, client, answers, sent: 0, steps: 0 }
    }

    /// One of the four does a little.
    fn step(&mut self) {
        match self.steps % 4 {
            0 => drop(self.host.drive().unwrap()),
            1 => drop(self.guest.drive().unwrap()),
            2 => {
                self.device.acknowledge();
                self.device.process(3);
                let all_sent = self.sent == REQUESTS;
                self.slow.complete_one(if all_sent { 0 } else { KEPT });
            }
            _ => {
                self.client.acknowledge();
                self.client.process(3);
                if self.sent < REQUESTS && self.client.state() == ChannelState::Active {
                    self.send();
                }
            }
        }
        self.steps += 1;
    }

    fn send(&mut self) {
        let mut packet = self.client.packet_allocate().unwrap();
        packet.set_pointer(usize::try_from(self.sent).unwrap());
        packet.set_completion_routine(Arc::clone(&self.answers) as _);
        let flags = SendFlags::WAIT_FOR_COMPLETION;
        packet.send(&self.sent.to_le_bytes(), None, flags).unwrap();
        self.sent += 1;
    }

    fn is_over(&self) -> bool {
        lock(&self.answers.0).len() as u64 == REQUESTS
    }

    /// Saves everything, and throws it away.
    fn save_for_nothing(&self) -> Saved {
        let held = self.host.hold().unwrap();
        let frozen = self.device.freeze().unwrap();
        let saved = Saved::of(&held, &frozen);
        held.release();
        frozen.thaw();
        saved
    }

    /// Saves everything, and ends the server as SIGKILL does.
    fn save_and_kill(&self) -> Saved {
        let held = self.host.hold().unwrap();
        let frozen = self.device.freeze().unwrap();
        let saved = Saved::of(&held, &frozen);
        frozen.move_away();
        held.move_away();
        saved
    }

    /// Another server takes over.
    fn move_on(mut self) -> Self {
        let saved = self.save_and_kill();
        let restoring = self.restoring(&saved);
        let (device, slow) = device(restoring.bus(), &self.slow.done);
        device.restore_from(&saved.channel[..]).unwrap();
        self.until_back(&restoring);
        self.host = restoring.finish().unwrap();
        (self.device, self.slow) = (device, slow);
        self.device.start();
        self
    }

    fn restoring(&self, saved: &Saved) -> RestoringHost {
        let options = HostOptions::default();
        UnixHost::bind_restoring(self.host.path(), options, &saved.transport, &saved.bus).unwrap()
    }

    fn until_back(&self, restoring: &RestoringHost) {
        let deadline = Instant::now() + PATIENCE;
        while !(restoring.guest_is_back() && self.guest.is_linked()) {
            assert!(Instant::now() < deadline, "{:?} {:?}", restoring.take_events(), self.guest);
            settle(|| restoring.drive(), || restoring.wait(Some(Duration::ZERO)));
            self.guest.wait(Some(Duration::from_millis(1))).unwrap();
            self.guest.drive().unwrap();
        }
    }

    /// Goes on until every request is answered, each once and with what belongs to it.
    #[track_caller]
    fn finish(mut self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_over() {
            let (lost, usage) = (self.guest.lost(), self.host.bus().usage());
            let answered = lock(&self.answers.0).len();
            let states = (self.device.state(), self.client.state());
            let stuck = (lost, usage, answered, states, self.host.take_events());
            assert!(Instant::now() < deadline && stuck.0.is_none(), "{what}: {stuck:?}");
            self.step();
        }
        let mut answers = std::mem::take(&mut *lock(&self.answers.0));
        answers.sort_unstable_by_key(|(number, ..)| *number);
        let expected: Vec<_> = (0..REQUESTS).map(|n| (n, NtStatus::SUCCESS, n)).collect();
        assert_eq!(answers, expected, "{what}");
        let mut done = std::mem::take(&mut *lock(&self.slow.done));
        done.sort_unstable();
        assert_eq!(done, (0..REQUESTS).collect::<Vec<_>>(), "{what}: done once each");
        let over = self.guest.take_events();
        assert!(!over.iter().any(|event| matches!(event, GuestEvent::Over(_))), "{what}");
        drop((self.client, self.guest, self.device, self.host, self.directory));
    }
}

/// Drives something until there is nothing to do.
fn settle(drive: impl Fn() -> io::Result<bool>, wait: impl Fn() -> io::Result<bool>) {
    let mut more = false;
    while more || wait().unwrap() {
        more = drive().unwrap();
    }
}

/// The streams of a saved server.
pub(crate) struct Saved {
    pub(crate) transport: Vec<u8>,
    pub(crate) bus: Vec<u8>,
    pub(crate) channel: Vec<u8>,
}

impl Saved {
    pub(crate) fn of(held: &HeldHost<'_>, frozen: &Frozen) -> Self {
        let options = SaveOptions::default();
        assert_eq!(frozen.running(), 0);
        Self {
            transport: bytes(held.save(&options).unwrap()),
            bus: bytes(held.bus().save(&options).unwrap()),
            channel: bytes(frozen.save().unwrap()),
        }
    }
}

fn bytes(mut save: impl Save) -> Vec<u8> {
    let mut bytes = Vec::new();
    save.write_to(&mut bytes).unwrap();
    bytes
}

/// Steps that a whole life takes.
fn life() -> usize {
    let mut world = World::new();
    eventually(|| {
        world.step();
        world.is_over()
    });
    world.steps
}

#[test]
fn a_server_can_move_at_every_step() {
    let steps = life();
    assert!((150..2000).contains(&steps), "{steps}");
    let mut at_work = 0;
    for step in 0..steps {
        let mut world = World::new();
        (0..step).for_each(|_| world.step());
        at_work += usize::from(lock(&world.slow.held).len() >= KEPT);
        world.move_on().finish(&format!("moved at step {step}"));
    }
    assert!(at_work > steps / 4, "requests in flight at {at_work} of {steps} moves");
}

#[test]
fn it_can_move_again_and_again() {
    let steps = life();
    for apart in [1, 2, 7, 31] {
        let mut world = World::new();
        for step in 0..steps {
            if step % apart == 0 && step < 60 * apart {
                world = world.move_on();
            }
            world.step();
        }
        world.finish(&format!("moved every {apart} steps"));
    }
}

#[test]
fn a_save_that_is_thrown_away_changes_nothing() {
    let steps = life();
    for step in (0..steps).step_by(3) {
        let mut world = World::new();
        (0..step).for_each(|_| world.step());
        drop(world.save_for_nothing());
        (0..5).for_each(|_| world.step());
        drop(world.save_for_nothing());
        world.move_on().finish(&format!("saved for nothing at step {step}"));
    }
}

/// Nobody goes on with what was thrown away, whether anything has happened since or not.
#[test]
fn a_save_that_was_thrown_away_is_void() {
    for (before, after) in [(0, 0), (10, 0), (60, 0), (60, 1), (60, 30), (120, 0), (120, 40)] {
        let mut world = World::new();
        (0..before).for_each(|_| world.step());
        let stale = world.save_for_nothing();
        (0..after).for_each(|_| world.step());
        drop(world.save_and_kill());
        let restoring = world.restoring(&stale);
        eventually(|| {
            restoring.drive().unwrap();
            world.guest.drive().unwrap();
            world.guest.lost().is_some()
        });
        let lost = world.guest.lost().unwrap();
        let refused = matches!(*lost, ConnectionError::Refused { reason: Reason::Stale, .. });
        assert!(refused && !restoring.guest_is_back(), "{before}, {after}: {lost}");
    }
}

/// Whoever sleeps is woken: a client that waits for each answer, on threads that do nothing unless
/// they are signalled.
fn moves_under_load(options: GuestOptions, moves: usize) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmbus");
    let worker = Worker::spawn("server").unwrap();
    let host = Arc::new(UnixHost::bind(&path).unwrap());
    let mut echo_device = quick_device(host.bus());
    worker.add(&echo_device).unwrap();
    echo_device.enable().unwrap();
    echo_device.start();
    let source = |host: &Arc<UnixHost>| {
        worker.add_source(Arc::clone(host), Arc::new(Drive(Arc::clone(host)))).unwrap()
    };
    let mut host = (source(&host), host);
    let client = Client::connect_with(&path, options).unwrap();
    let channel = &client.channel;
    let (answered, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let number = answered.load(Ordering::Relaxed).to_le_bytes();
                assert_eq!(echo(channel, &number).unwrap(), number);
                answered.fetch_add(1, Ordering::Relaxed);
            }
        });
        for round in 0..moves {
            let before = answered.load(Ordering::Relaxed);
            eventually(|| answered.load(Ordering::Relaxed) > before + 10 || load.is_finished());
            assert!(!load.is_finished(), "round {round}");
            let (source_id, old) = host;
            let held = old.hold().unwrap();
            let frozen = echo_device.freeze().unwrap();
            assert!(frozen.wait(Some(PATIENCE)));
            let saved = Saved::of(&held, &frozen);
            frozen.move_away();
            held.move_away();
            worker.remove_source(source_id);
            worker.remove(&echo_device);
            drop(old);
            let options = HostOptions::default();
            let restoring =
                UnixHost::bind_restoring(&path, options, &saved.transport, &saved.bus).unwrap();
            echo_device = quick_device(restoring.bus());
            echo_device.enable().unwrap();
            echo_device.restore_from(&saved.channel[..]).unwrap();
            worker.add(&echo_device).unwrap();
            assert!(restoring.drive_until_back(PATIENCE).unwrap());
            let next = Arc::new(restoring.finish().unwrap());
            echo_device.start();
            host = (source(&next), next);
        }
        over.store(true, Ordering::Relaxed);
    });
    echo_device.disable();
    worker.remove(&echo_device);
    drop(client);
}

/// Completes each packet with its own payload, at once.
pub(crate) fn quick_device(bus: &HostBus) -> Channel {
    let device = Channel::allocate(Side::Server, Arc::new(bus.clone()));
    device.server_init_set_target_interface_id(ECHO, INSTANCE).unwrap();
    device.init_set_process_packet_callbacks(Arc::new(Echo)).unwrap();
    device
}

#[test]
fn a_server_moves_under_load() {
    let reconnect = Some(PATIENCE);
    moves_under_load(GuestOptions { reconnect, ..GuestOptions::new(MEMORY) }, 30);
}

/// Signals of old versions go through bits in shared pages, and one event for all of them.
#[test]
fn a_server_of_an_old_guest_moves_under_load() {
    let mut options = GuestOptions { reconnect: Some(PATIENCE), ..GuestOptions::new(MEMORY) };
    options.config.versions = vec![Version::V1_1];
    moves_under_load(options, 10);
}

/// Offers that the socket had no room for are in the bus's state, and come from the next host.
#[test]
fn messages_that_wait_for_room_come_from_the_next_host() {
    const DEVICES: u128 = 1500;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmbus");
    let host = UnixHost::bind(&path).unwrap();
    let offer = |bus: &HostBus| -> Vec<_> {
        let offer = |instance| {
            let channel = Channel::allocate(Side::Server, Arc::new(bus.clone()));
            let instance = Guid::from_u128(instance);
            channel.server_init_set_target_interface_id(ECHO, instance).unwrap();
            channel.init_set_process_packet_callbacks(Arc::new(Echo)).unwrap();
            channel.enable().unwrap();
            channel
        };
        (1..=DEVICES).map(offer).collect()
    };
    let devices = offer(host.bus());
    let options = GuestOptions { reconnect: Some(PATIENCE), ..GuestOptions::new(MEMORY) };
    let guest = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| UnixGuest::connect_with(&path, options).unwrap());
        while !connecting.is_finished() {
            host.wait(Some(Duration::from_millis(1))).unwrap();
            host.drive().unwrap();
        }
        connecting.join().unwrap()
    });
    // It asks for offers, and does not look at any.
    eventually(|| {
        assert_eq!(guest.bus().offers().len(), 0);
        host.drive().unwrap();
        if !matches!(guest.bus().state(), ConnectionState::Connected { .. }) {
            guest.drive().unwrap();
        }
        host.bus().usage().messages > 0
    });
    let waiting = host.bus().usage().messages;
    assert!(waiting > 100 && waiting < 1400, "{waiting}");
    let held = host.hold().unwrap();
    let options = SaveOptions::default();
    let transport = bytes(held.save(&options).unwrap());
    let bus = bytes(held.bus().save(&options).unwrap());
    for device in &devices {
        device.freeze().unwrap().move_away();
    }
    held.move_away();
    drop((host, devices));
    let options = HostOptions::default();
    let restoring = UnixHost::bind_restoring(&path, options, &transport, &bus).unwrap();
    let _devices = offer(restoring.bus());
    eventually(|| {
        restoring.drive().unwrap();
        guest.drive().unwrap();
        restoring.guest_is_back() && guest.is_linked()
    });
    let host = restoring.finish().unwrap();
    eventually(|| {
        host.drive().unwrap();
        guest.drive().unwrap();
        guest.bus().offers().len() == 1500
    });
    guest.drive().unwrap();
    let delivered = guest.bus().state();
    assert!(matches!(delivered, ConnectionState::Connected { offers_delivered: true, .. }));
}

/// What a restored host lacks is said, and can be made good; the guest notices nothing of it.
#[test]
fn other_devices_are_refused_and_the_right_ones_taken_afterwards() {
    let mut world = World::new();
    eventually(|| {
        world.step();
        world.client.state() == ChannelState::Active
    });
    let saved = world.save_and_kill();
    let restoring = world.restoring(&saved);
    let refused = restoring.finish().unwrap_err();
    assert!(matches!(refused.why, FinishError::NoGuest), "{refused}");
    let restoring = refused.restoring;
    world.until_back(&restoring);
    let refused = restoring.finish().unwrap_err();
    assert!(refused.to_string().contains("missing"), "{refused}");
    let (device, slow) = device(refused.restoring.bus(), &world.slow.done);
    device.restore_from(&saved.channel[..]).unwrap();
    world.host = refused.restoring.finish().unwrap();
    (world.device, world.slow) = (device, slow);
    world.device.start();
    world.finish("at the third try");
}
