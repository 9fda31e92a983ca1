//! The worker with real channels: both ends in one process, over the loopback bus.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test may stop at its first surprise"
)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, ChannelState, Guid, IncomingPacket, NtStatus, Packet, PacketCompletion, ProcessPacket,
    SendFlags, Side, StateChange,
};
use kmcl_worker::{Source, Worker, WorkerError};
use rustix::event::{EventfdFlags, eventfd};

/// Decides nothing but how long a failing test takes.
const PATIENCE: Duration = Duration::from_secs(60);

const MEMORY_BYTES: u64 = 4 << 20;
const TYPE: Guid = Guid::from_fields(0x6b6d_636c, 1, 2, [1, 2, 3, 4, 5, 6, 7, 8]);
const INSTANCE: Guid = Guid::from_fields(0x6b6d_636c, 3, 4, [1, 2, 3, 4, 5, 6, 7, 8]);

/// Answers each packet with its own bytes.
struct Echo;

impl ProcessPacket for Echo {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        let answer = packet.payload().to_vec();
        packet.complete(&answer);
    }
}

/// Counts and completes.
#[derive(Default)]
struct Count(AtomicU32);

impl ProcessPacket for Count {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        self.0.fetch_add(1, Ordering::SeqCst);
        packet.complete(&[]);
    }
}

/// Runs a closure for each packet, before completing it.
struct Do<F>(F);

impl<F: Fn(&Channel) + Send + Sync> ProcessPacket for Do<F> {
    fn process_packet(&self, channel: &Channel, packet: IncomingPacket) {
        (self.0)(channel);
        packet.complete(&[]);
    }
}

/// Reports each state change with the thread that it runs on.
struct Changes(Sender<(&'static str, Option<String>)>);

impl Changes {
    fn tell(&self, change: &'static str) {
        let thread = thread::current().name().map(str::to_owned);
        // The test may have seen enough.
        let _ = self.0.send((change, thread));
    }
}

impl StateChange for Changes {
    fn post_started(&self, _: &Channel) {
        self.tell("post_started");
    }
    fn suspend(&self, _: &Channel) {
        self.tell("suspend");
    }
    fn closed(&self, _: &Channel) {
        self.tell("closed");
    }
}

/// Hands on how packets ended.
struct Answers(Sender<(NtStatus, Vec<u8>)>);

impl PacketCompletion for Answers {
    fn completed(&self, _: Packet, status: NtStatus, payload: &[u8]) {
        let _ = self.0.send((status, payload.to_vec()));
    }
}

/// Both ends of one open channel.
struct Pair {
    server: Channel,
    client: Channel,
    routine: Arc<Answers>,
    answers: Receiver<(NtStatus, Vec<u8>)>,
    changes: Receiver<(&'static str, Option<String>)>,
}

impl Pair {
    /// Opens a channel whose ends are driven by these workers.
    fn open(for_server: &Worker, for_client: &Worker, device: Arc<dyn ProcessPacket>) -> Self {
        let bus = LoopbackBus::new(MEMORY_BYTES).unwrap();
        let (send_change, changes) = channel();
        let (send_answer, answers) = channel();

        let server = Channel::allocate(Side::Server, bus.clone());
        server.server_init_set_target_interface_id(TYPE, INSTANCE).unwrap();
        server.init_set_process_packet_callbacks(device).unwrap();
        for_server.add(&server).unwrap();
        server.enable().unwrap();
        server.start();

        let client = Channel::allocate(Side::Client, bus);
        client.client_init_set_target_pnp(TYPE, None, None).unwrap();
        client.init_set_state_change_callbacks(Arc::new(Changes(send_change))).unwrap();
        for_client.add(&client).unwrap();
        client.enable().unwrap();

        let pair =
            Self { server, client, routine: Arc::new(Answers(send_answer)), answers, changes };
        assert_eq!(pair.next_change().0, "post_started");
        pair
    }

    fn next_change(&self) -> (&'static str, Option<String>) {
        self.changes.recv_timeout(PATIENCE).expect("no further state change")
    }

    fn send(&self, payload: &[u8]) {
        let mut packet = self.client.packet_allocate().unwrap();
        packet.set_completion_routine(self.routine.clone());
        packet.send(payload, None, SendFlags::WAIT_FOR_COMPLETION).map_err(|e| e.error).unwrap();
    }

    fn answer(&self) -> (NtStatus, Vec<u8>) {
        self.answers.recv_timeout(PATIENCE).expect("no answer")
    }

    fn round_trip(&self) {
        self.send(&[7; 8]);
        assert_eq!(self.answer().0, NtStatus::SUCCESS);
    }

    /// Disables both ends, on the test's own thread once nobody drives them.
    fn close(self) {
        self.client.disable();
        self.server.disable();
    }
}

fn worker(name: &str) -> Worker {
    Worker::spawn(name).unwrap()
}

fn event() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

fn ring(event: impl AsFd) {
    rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
}

#[test]
fn every_packet_is_delivered_and_its_completion_comes_back() {
    let worker = worker("echo");
    let pair = Pair::open(&worker, &worker, Arc::new(Echo));
    for first in (0..10_000u64).step_by(100) {
        for number in first..first + 100 {
            pair.send(&number.to_le_bytes());
        }
        for number in first..first + 100 {
            assert_eq!(pair.answer(), (NtStatus::SUCCESS, number.to_le_bytes().to_vec()));
        }
    }
    pair.close();
}

/// Each round trip needs a doorbell or a waker in both directions: one that is lost hangs the test.
#[test]
fn no_wake_up_is_lost_between_two_workers() {
    let (left, right) = (worker("left"), worker("right"));
    let pair = Pair::open(&left, &right, Arc::new(Echo));
    for _ in 0..20_000 {
        pair.round_trip();
    }
    pair.close();
}

#[test]
fn an_idle_worker_makes_no_turns() {
    let (busy, idle) = (worker("busy"), worker("idle"));
    let watched = Pair::open(&idle, &idle, Arc::new(Echo));
    let pair = Pair::open(&busy, &busy, Arc::new(Echo));
    watched.round_trip();
    let before = idle.turns();
    // Something else goes on for long enough that a loop without sleep would have turned thousands of
    // times; the few turns allowed are the end of what went on before.
    for _ in 0..1000 {
        pair.round_trip();
    }
    assert!(busy.turns() > 1000);
    let turns = idle.turns() - before;
    assert!(turns <= 4, "{turns} turns while idle");
}

/// Wants to run again, always.
struct Greedy(AtomicU32);

impl Source for Greedy {
    fn ready(&self) -> bool {
        self.0.fetch_add(1, Ordering::SeqCst);
        true
    }
}

#[test]
fn a_task_that_always_has_more_does_not_starve_the_others() {
    let worker = worker("fair");
    let greedy = Arc::new(Greedy(AtomicU32::new(0)));
    let source = worker.add_source(event(), greedy.clone()).unwrap();
    let pair = Pair::open(&worker, &worker, Arc::new(Echo));
    for _ in 0..100 {
        pair.round_trip();
    }
    assert!(greedy.0.load(Ordering::SeqCst) > 100);
    assert!(worker.remove_source(source));
    let calls = greedy.0.load(Ordering::SeqCst);
    pair.round_trip();
    assert_eq!(greedy.0.load(Ordering::SeqCst), calls, "called after its removal");
    assert!(!worker.remove_source(source));
}

#[test]
fn what_happened_before_a_channel_was_added_is_found() {
    let (left, right) = (worker("left"), worker("right"));
    let pair = Pair::open(&left, &right, Arc::new(Echo));
    for _ in 0..100 {
        assert!(left.remove(&pair.server));
        pair.send(&[1; 8]);
        left.add(&pair.server).unwrap();
        assert_eq!(pair.answer().0, NtStatus::SUCCESS);
    }
    pair.close();
}

#[test]
fn after_its_removal_a_channel_does_not_run() {
    let worker = worker("removes");
    let count = Arc::new(Count::default());
    let pair = Pair::open(&worker, &worker, count.clone());
    let other = Pair::open(&worker, &worker, Arc::new(Echo));
    pair.round_trip();
    assert!(worker.drives(&pair.server));
    assert!(worker.remove(&pair.server));
    assert!(!worker.drives(&pair.server));
    assert!(!worker.remove(&pair.server));
    pair.send(&[1; 8]);
    other.round_trip();
    assert_eq!(count.0.load(Ordering::SeqCst), 1);

    worker.add(&pair.server).unwrap();
    assert_eq!(pair.answer().0, NtStatus::SUCCESS);
    assert_eq!(count.0.load(Ordering::SeqCst), 2);
}

#[test]
fn removal_waits_for_the_callback_that_runs() {
    let worker = Arc::new(worker("waits"));
    let (entered, has_entered) = channel();
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let left = Arc::new(AtomicU32::new(0));
    let left_in_callback = left.clone();
    let device = Do(move |_: &Channel| {
        entered.send(()).unwrap();
        released.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        // As long as it takes a removal that does not wait to return.
        for _ in 0..1000 {
            thread::yield_now();
        }
        left_in_callback.store(1, Ordering::SeqCst);
    });
    let pair = Pair::open(&worker, &worker, Arc::new(device));
    pair.send(&[1; 8]);
    has_entered.recv_timeout(PATIENCE).unwrap();
    release.send(()).unwrap();
    assert!(worker.remove(&pair.server));
    assert_eq!(left.load(Ordering::SeqCst), 1, "removed while its callback ran");
}

#[test]
fn a_callback_may_remove_its_own_channel() {
    let worker = Arc::new(worker("self"));
    let in_callback = Arc::downgrade(&worker);
    let (tell, told) = channel();
    let device = Do(move |channel: &Channel| {
        if let Some(worker) = in_callback.upgrade() {
            tell.send(worker.remove(channel)).unwrap();
        }
    });
    let pair = Pair::open(&worker, &worker, Arc::new(device));
    pair.send(&[1; 8]);
    assert!(told.recv_timeout(PATIENCE).unwrap());
    assert_eq!(pair.answer().0, NtStatus::SUCCESS);
    assert!(!worker.drives(&pair.server));
}

#[test]
fn a_device_that_panics_loses_its_own_channel_only() {
    let worker = worker("panics");
    let healthy = Pair::open(&worker, &worker, Arc::new(Echo));
    let sick = Pair::open(&worker, &worker, Arc::new(Do(|_: &Channel| panic_on_purpose())));
    sick.send(&[1; 8]);
    while worker.drives(&sick.server) {
        healthy.round_trip();
    }
    assert!(worker.drives(&sick.client));
    assert!(worker.drives(&healthy.server));
    healthy.round_trip();
    sick.close();
}

#[expect(clippy::panic, reason = "the subject of the test")]
fn panic_on_purpose() {
    panic!("the device is faulty");
}

#[test]
fn life_cycle_calls_run_their_callbacks_on_the_worker() {
    let (left, right) = (worker("left"), worker("right"));
    let pair = Pair::open(&left, &right, Arc::new(Echo));
    let on_right = Some("right".to_owned());
    pair.client.pause();
    assert_eq!(pair.next_change(), ("suspend", on_right.clone()));
    assert_eq!(pair.client.state(), ChannelState::Paused);
    pair.client.start();
    assert_eq!(pair.next_change(), ("post_started", on_right.clone()));
    pair.client.disable();
    assert_eq!(pair.next_change(), ("suspend", on_right.clone()));
    assert_eq!(pair.next_change(), ("closed", on_right));
    assert_eq!(pair.client.state(), ChannelState::Disabled);

    // Undriven, the caller's own thread does it.
    assert!(left.remove(&pair.server));
    pair.server.disable();
    assert_eq!(pair.server.state(), ChannelState::Disabled);
}

/// Reports calls; reads its descriptor empty at every second one.
struct Slow {
    event: Arc<OwnedFd>,
    calls: Sender<u32>,
    count: AtomicU32,
}

impl Source for Slow {
    fn ready(&self) -> bool {
        let call = self.count.fetch_add(1, Ordering::SeqCst);
        if call.is_multiple_of(2) {
            let _ = rustix::io::read(&*self.event, &mut [0; 8]);
        }
        let _ = self.calls.send(call);
        false
    }
}

#[test]
fn a_source_runs_until_its_descriptor_is_read_empty() {
    let worker = worker("level");
    let event = event();
    let (calls, called) = channel();
    let source = Slow { event: event.clone(), calls, count: AtomicU32::new(0) };
    worker.add_source(event.clone(), Arc::new(source)).unwrap();
    // The first call comes from the adding alone.
    assert_eq!(called.recv_timeout(PATIENCE).unwrap(), 0);
    for round in 0..10 {
        ring(&*event);
        for call in [1, 2] {
            assert_eq!(called.recv_timeout(PATIENCE).unwrap(), 2 * round + call);
        }
    }
}

#[test]
fn what_cannot_be_driven_is_refused_and_forgotten() {
    let worker = worker("refuses");
    let greedy: Arc<Greedy> = Arc::new(Greedy(AtomicU32::new(0)));
    let descriptor = event();

    let bus = LoopbackBus::new(MEMORY_BYTES).unwrap();
    let channel = Channel::allocate(Side::Server, bus);
    worker.add(&channel).unwrap();
    let again = worker.add(&channel.clone());
    assert!(matches!(again, Err(WorkerError::AlreadyDriven)), "{again:?}");
    assert!(worker.drives(&channel));

    worker.add_source(descriptor.clone(), greedy.clone()).unwrap();
    let holders = Arc::strong_count(&greedy);
    let same_descriptor = worker.add_source(descriptor, greedy.clone());
    assert!(matches!(same_descriptor, Err(WorkerError::System { .. })), "{same_descriptor:?}");
    // A plain file is always readable, and cannot be watched.
    let file = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap();
    let plain_file = worker.add_source(file, greedy.clone());
    assert!(matches!(plain_file, Err(WorkerError::System { .. })), "{plain_file:?}");
    assert_eq!(Arc::strong_count(&greedy), holders, "a refused source is kept");
}

#[test]
fn dropping_a_worker_ends_its_thread_and_lets_go_of_everything() {
    let worker = worker("ends");
    let greedy = Arc::new(Greedy(AtomicU32::new(0)));
    worker.add_source(event(), greedy.clone()).unwrap();
    let pair = Pair::open(&worker, &worker, Arc::new(Echo));
    pair.round_trip();
    drop(worker);
    assert_eq!(Arc::strong_count(&greedy), 1);
    // Nobody drives the ends now: this thread does, or the calls would never return.
    pair.close();
}

/// Drops the worker it runs on.
struct Last(Mutex<Option<Worker>>, Sender<()>);

impl Source for Last {
    fn ready(&self) -> bool {
        let Some(worker) = self.0.lock().unwrap().take() else { return false };
        drop(worker);
        let _ = self.1.send(());
        false
    }
}

#[test]
fn a_callback_may_drop_its_worker() {
    let worker = worker("drops");
    let (tell, told) = channel();
    let event = event();
    let source = Arc::new(Last(Mutex::new(None), tell));
    worker.add_source(event.clone(), source.clone()).unwrap();
    *source.0.lock().unwrap() = Some(worker);
    ring(&*event);
    told.recv_timeout(PATIENCE).unwrap();
}
