//! What the tests share: a device that records and obeys, a pair of endpoints in one process, a bus
//! whose other end is in the hands of the test ([`raw`]), and a channel to be lied to ([`victim`]).

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "each test file uses a part of it, and a test may stop at its first surprise"
)]

pub(crate) mod keeper;
pub(crate) mod raw;
pub(crate) mod victim;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, ChannelState, Error, Guid, IncomingPacket, NtStatus, Packet, PacketCompletion,
    PnpFailure, ProcessPacket, SendError, SendFlags, Side, StateChange,
};

/// The protocol of the tests' channels.
pub(crate) const TYPE: Guid = Guid::from_u128(0x6b6d_636c_0000_4000_8000_7465_7374_0001);
/// The instance of the tests' channels.
pub(crate) const INSTANCE: Guid = Guid::from_u128(0x6b6d_636c_0000_4000_8000_7465_7374_0002);

/// Decides nothing but how long a failing test takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Packets that one turn of [`Pair::pump`] takes at most.
const BUDGET: u32 = 64;

/// The flags of a transaction.
pub(crate) const WAIT: SendFlags = SendFlags::WAIT_FOR_COMPLETION;

/// A lock that a failed test has not made useless for the next look at it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- A device ---------------------------------------------------------------------------------------

/// One callback of a channel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Call {
    Opened,
    Started,
    PostStarted,
    Suspend,
    Closed,
    /// The payload, as delivered.
    Packet(Vec<u8>),
    /// How many deliveries a batch had.
    Complete(u32),
}

type OnChange = dyn Fn(&Channel, &Call) -> Result<(), NtStatus> + Send + Sync;
type OnPacket = dyn Fn(&Channel, IncomingPacket) + Send + Sync;

/// Records every callback, and does in it what the test has asked for.
pub(crate) struct Device {
    calls: Mutex<Vec<Call>>,
    changed: Condvar,
    on_change: Mutex<Option<Arc<OnChange>>>,
    on_packet: Mutex<Arc<OnPacket>>,
    held: Arc<Mutex<Vec<IncomingPacket>>>,
}

impl Device {
    /// Completes each packet with nothing.
    pub(crate) fn new() -> Arc<Self> {
        Self::on_packet(|_, packet| packet.complete(&[]))
    }

    /// Completes each packet with its own payload.
    pub(crate) fn echo() -> Arc<Self> {
        Self::on_packet(|_, packet| {
            let payload = packet.payload().to_vec();
            packet.complete(&payload);
        })
    }

    /// Keeps each packet, for the test to [`Self::take_held`].
    pub(crate) fn holding() -> Arc<Self> {
        let held = Arc::new(Mutex::new(Vec::new()));
        let keeper = Arc::clone(&held);
        Self::with(held, move |_, packet| lock(&keeper).push(packet))
    }

    /// Does `act` with each packet.
    pub(crate) fn on_packet(
        act: impl Fn(&Channel, IncomingPacket) + Send + Sync + 'static,
    ) -> Arc<Self> {
        Self::with(Arc::default(), act)
    }

    fn with(
        held: Arc<Mutex<Vec<IncomingPacket>>>,
        act: impl Fn(&Channel, IncomingPacket) + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            calls: Mutex::default(),
            changed: Condvar::new(),
            on_change: Mutex::default(),
            on_packet: Mutex::new(Arc::new(act)),
            held,
        })
    }

    /// From now on does `act` in each state-change callback; only what it says to
    /// [`Call::Opened`] matters.
    pub(crate) fn when(
        &self,
        act: impl Fn(&Channel, &Call) -> Result<(), NtStatus> + Send + Sync + 'static,
    ) {
        *lock(&self.on_change) = Some(Arc::new(act));
    }

    /// From now on does `act` with each packet.
    pub(crate) fn with_packets(
        &self,
        act: impl Fn(&Channel, IncomingPacket) + Send + Sync + 'static,
    ) {
        *lock(&self.on_packet) = Arc::new(act);
    }

    /// Keeps `packet`.
    pub(crate) fn hold(&self, packet: IncomingPacket) {
        lock(&self.held).push(packet);
    }

    /// The packets kept so far, oldest first.
    pub(crate) fn take_held(&self) -> Vec<IncomingPacket> {
        std::mem::take(&mut *lock(&self.held))
    }

    /// The callbacks since the last look, oldest first.
    pub(crate) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut *lock(&self.calls))
    }

    /// The state changes since the last look; what packets did is left out.
    pub(crate) fn take_changes(&self) -> Vec<Call> {
        let is_change = |call: &Call| !matches!(call, Call::Packet(_) | Call::Complete(_));
        self.take_calls().into_iter().filter(is_change).collect()
    }

    /// Packets delivered since the last look at calls.
    pub(crate) fn delivered(&self) -> usize {
        lock(&self.calls).iter().filter(|call| matches!(call, Call::Packet(_))).count()
    }

    /// The payloads delivered since the last look; all else is left out.
    pub(crate) fn take_packets(&self) -> Vec<Vec<u8>> {
        let payload = |call| if let Call::Packet(payload) = call { Some(payload) } else { None };
        self.take_calls().into_iter().filter_map(payload).collect()
    }

    /// Waits, on whatever thread drives the channel, until `call` was made.
    pub(crate) fn wait_for(&self, call: &Call) {
        let calls = lock(&self.calls);
        let wait = self.changed.wait_timeout_while(calls, PATIENCE, |calls| !calls.contains(call));
        let (calls, _) = wait.unwrap_or_else(PoisonError::into_inner);
        assert!(calls.contains(call), "no {call:?} in {calls:?}");
    }

    fn called(&self, channel: &Channel, call: Call) -> Result<(), NtStatus> {
        let act = lock(&self.on_change).clone();
        let result = act.map_or(Ok(()), |act| act(channel, &call));
        self.record(call);
        result
    }

    fn record(&self, call: Call) {
        lock(&self.calls).push(call);
        self.changed.notify_all();
    }
}

impl StateChange for Device {
    fn opened(&self, channel: &Channel) -> Result<(), NtStatus> {
        self.called(channel, Call::Opened)
    }
    fn started(&self, channel: &Channel) {
        let _ = self.called(channel, Call::Started);
    }
    fn post_started(&self, channel: &Channel) {
        let _ = self.called(channel, Call::PostStarted);
    }
    fn suspend(&self, channel: &Channel) {
        let _ = self.called(channel, Call::Suspend);
    }
    fn closed(&self, channel: &Channel) {
        let _ = self.called(channel, Call::Closed);
    }
}

impl ProcessPacket for Device {
    fn process_packet(&self, channel: &Channel, packet: IncomingPacket) {
        self.record(Call::Packet(packet.payload().to_vec()));
        let act = Arc::clone(&lock(&self.on_packet));
        act(channel, packet);
    }
    fn processing_complete(&self, _: &Channel, packets: u32) {
        self.record(Call::Complete(packets));
    }
}

/// Keeps what a client hears of a connection that failed, and where its channel was then.
#[derive(Default)]
pub(crate) struct Failures(Mutex<Vec<(NtStatus, ChannelState)>>);

impl PnpFailure for Failures {
    fn pnp_failure(&self, channel: &Channel, status: NtStatus) {
        lock(&self.0).push((status, channel.state()));
    }
}

impl Failures {
    pub(crate) fn of(client: &Channel) -> Arc<Self> {
        let failures = Arc::new(Self::default());
        client.client_init_set_target_pnp(TYPE, None, Some(failures.clone())).unwrap();
        failures
    }

    pub(crate) fn take(&self) -> Vec<(NtStatus, ChannelState)> {
        std::mem::take(&mut lock(&self.0))
    }
}

// ---- Packets that were sent -------------------------------------------------------------------------

/// How a packet ended: its pointer, status and completion data.
pub(crate) type Answer = (usize, NtStatus, Vec<u8>);

/// Records how packets ended; the packets are freed.
#[derive(Default)]
pub(crate) struct Answers {
    answers: Mutex<Vec<Answer>>,
    changed: Condvar,
}

impl Answers {
    /// The ends since the last look, oldest first.
    pub(crate) fn take(&self) -> Vec<Answer> {
        std::mem::take(&mut *lock(&self.answers))
    }

    /// Waits until `count` packets have ended, and gives their ends.
    pub(crate) fn wait(&self, count: usize) -> Vec<Answer> {
        let answers = lock(&self.answers);
        let wait =
            self.changed.wait_timeout_while(answers, PATIENCE, |answers| answers.len() < count);
        let (mut answers, _) = wait.unwrap_or_else(PoisonError::into_inner);
        assert!(answers.len() >= count, "{} of {count} packets ended", answers.len());
        std::mem::take(&mut *answers)
    }
}

impl PacketCompletion for Answers {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        lock(&self.answers).push((packet.pointer(), status, payload.to_vec()));
        self.changed.notify_all();
    }
}

/// A packet of `channel` with `pointer`, whose end goes to `answers`.
pub(crate) fn packet(channel: &Channel, pointer: usize, answers: &Arc<Answers>) -> Packet {
    let mut packet = channel.packet_allocate().unwrap();
    packet.set_pointer(pointer);
    packet.set_completion_routine(Arc::clone(answers) as _);
    packet
}

/// Sends a transaction with `pointer`, whose end goes to `answers`.
pub(crate) fn send(channel: &Channel, pointer: usize, message: &[u8], answers: &Arc<Answers>) {
    packet(channel, pointer, answers).send(message, None, WAIT).unwrap();
}

/// The status of a refused send; the packet is freed.
pub(crate) fn refusal(sent: Result<(), SendError>) -> Option<Error> {
    sent.err().map(|refused| refused.error)
}

/// `message` as it arrives: padded with zeroes to a multiple of 8 bytes.
pub(crate) fn padded(message: &[u8]) -> Vec<u8> {
    let mut bytes = message.to_vec();
    bytes.resize(message.len().next_multiple_of(8), 0);
    bytes
}

// ---- Both ends --------------------------------------------------------------------------------------

/// Both ends of a channel in one process, driven by the test's own thread unless it says otherwise.
pub(crate) struct Pair {
    pub(crate) bus: Arc<LoopbackBus>,
    pub(crate) server: Channel,
    pub(crate) client: Channel,
    /// The server's.
    pub(crate) device: Arc<Device>,
    /// The client's.
    pub(crate) driver: Arc<Device>,
}

impl Pair {
    /// Both ends Disabled, callbacks and interface set. Room for the largest rings the tests use.
    pub(crate) fn new(device: Arc<Device>) -> Self {
        let bus = LoopbackBus::new(16 << 20).unwrap();
        let driver = Device::new();
        let server = server(&(bus.clone() as _), &device);
        let client = client(&(bus.clone() as _), &driver);
        Self { bus, server, client, device, driver }
    }

    /// As [`Self::new`], set up by `set_up`, and then opened: both ends are Active.
    pub(crate) fn open_with(device: Arc<Device>, set_up: impl FnOnce(&Self)) -> Self {
        let pair = Self::new(device);
        set_up(&pair);
        pair.enable();
        pair
    }

    /// Both ends Active.
    pub(crate) fn open(device: Arc<Device>) -> Self {
        Self::open_with(device, |_| ())
    }

    /// Enables both ends and starts the server; callbacks of the opening are forgotten.
    pub(crate) fn enable(&self) {
        self.server.enable().unwrap();
        self.server.start();
        self.client.enable().unwrap();
        self.pump();
        assert_eq!(self.states(), (ChannelState::Active, ChannelState::Active));
        self.device.take_calls();
        self.driver.take_calls();
    }

    /// Where server and client are.
    pub(crate) fn states(&self) -> (ChannelState, ChannelState) {
        (self.server.state(), self.client.state())
    }

    /// Drives both ends until nothing moves any more.
    pub(crate) fn pump(&self) {
        // A turn that does nothing visible may still have handled an event that the other end's next
        // turn answers; three such turns in a row have not.
        let mut quiet = 0;
        while quiet < 3 {
            let before = self.states();
            let server = self.server.process(BUDGET);
            let client = self.client.process(BUDGET);
            let moved = server.packets + client.packets != 0 || self.states() != before;
            quiet = if moved { 0 } else { quiet + 1 };
        }
    }

    /// Disables both ends, and shows that nothing was leaked.
    pub(crate) fn close(self) {
        self.client.disable();
        self.server.process(BUDGET);
        self.server.disable();
        assert_eq!(self.states(), (ChannelState::Disabled, ChannelState::Disabled));
        for channel in [&self.server, &self.client] {
            assert_eq!(channel.outgoing_in_use(), (0, 0), "{channel:?}");
            assert_eq!(channel.incoming_outstanding(), 0, "{channel:?}");
        }
        assert_eq!(self.bus.free_pages(), self.bus.memory().total_bytes() / 4096);
    }
}

/// A server endpoint on `bus`, Disabled, with `device` for all callbacks.
pub(crate) fn server(bus: &Arc<dyn kmcl::bus::Bus>, device: &Arc<Device>) -> Channel {
    let server = Channel::allocate(Side::Server, Arc::clone(bus));
    server.server_init_set_target_interface_id(TYPE, INSTANCE).unwrap();
    server.init_set_state_change_callbacks(Arc::clone(device) as _).unwrap();
    server.init_set_process_packet_callbacks(Arc::clone(device) as _).unwrap();
    server
}

/// A client endpoint on `bus`, Disabled, with `driver` for all callbacks.
pub(crate) fn client(bus: &Arc<dyn kmcl::bus::Bus>, driver: &Arc<Device>) -> Channel {
    let client = Channel::allocate(Side::Client, Arc::clone(bus));
    client.client_init_set_target_pnp(TYPE, None, None).unwrap();
    client.init_set_state_change_callbacks(Arc::clone(driver) as _).unwrap();
    client.init_set_process_packet_callbacks(Arc::clone(driver) as _).unwrap();
    client
}

// ---- Threads ----------------------------------------------------------------------------------------

/// A thread that drives one channel, woken by its waker, until it is dropped.
pub(crate) struct Driver {
    channel: Channel,
    bell: Arc<Bell>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    over: AtomicBool,
    changed: Condvar,
    also: Mutex<Option<Waker>>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        if let Some(also) = &*lock(&self.also) {
            also.wake_by_ref();
        }
        *lock(&self.rung) = true;
        self.changed.notify_all();
    }
}

impl Driver {
    pub(crate) fn spawn(channel: &Channel) -> Self {
        Self::spawn_bell(channel, Arc::default())
    }

    /// As [`Self::spawn`]; `also` is woken on the stack of whoever wakes the driver.
    pub(crate) fn spawn_with(channel: &Channel, also: Waker) -> Self {
        let bell = Bell { also: Mutex::new(Some(also)), ..Bell::default() };
        Self::spawn_bell(channel, Arc::new(bell))
    }

    fn spawn_bell(channel: &Channel, bell: Arc<Bell>) -> Self {
        channel.set_waker(Waker::from(Arc::clone(&bell)));
        let thread = std::thread::spawn({
            let (channel, bell) = (channel.clone(), Arc::clone(&bell));
            move || {
                while !bell.over.load(Ordering::SeqCst) {
                    while channel.process(BUDGET).more {}
                    let rung = lock(&bell.rung);
                    let mut rung = bell.changed.wait_while(rung, |rung| !*rung).unwrap();
                    *rung = false;
                }
            }
        });
        // What has happened before there was a waker.
        Arc::clone(&bell).wake();
        Self { channel: channel.clone(), bell, thread: Some(thread) }
    }

    pub(crate) fn thread_id(&self) -> std::thread::ThreadId {
        self.thread.as_ref().unwrap().thread().id()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.channel.clear_waker();
        self.bell.over.store(true, Ordering::SeqCst);
        Arc::clone(&self.bell).wake();
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the driver's thread panicked");
        }
    }
}

/// Runs `act` on a thread of its own and waits for it; a test that hangs fails after [`PATIENCE`].
pub(crate) fn in_time<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _nobody_waits_any_more = done.send(act());
    });
    match result.recv_timeout(PATIENCE) {
        Ok(value) => {
            thread.join().unwrap();
            value
        }
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("still busy after {PATIENCE:?}"),
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().unwrap_err())
        }
    }
}

/// Waits, without deciding anything by time, until `condition` holds.
pub(crate) fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        std::thread::yield_now();
    }
}

/// Descriptors that this process has open.
pub(crate) fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
