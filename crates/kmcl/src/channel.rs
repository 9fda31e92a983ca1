//! A channel, as its user holds it: life-cycle calls, what to wait on, and the processing that
//! everything else happens in. The setters are in `setters`, sending is in `send`, and what a
//! life-cycle step does is in `control`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use vmbus_memory::{GuestMemory, PageRun};
use vmbus_ring::RingError;
use vmbus_wire::guid::Guid;

use crate::batch::Batch;
use crate::bus::{Bus, ClientLink, Doorbell, EventSink, ServerLink};
use crate::control::{Control, Link};
use crate::doorbell::EventDoorbell;
use crate::error::{ChannelError, Error};
use crate::events::Mailbox;
use crate::gpadl::Mappings;
use crate::hold::Hold;
use crate::incoming::Level;
use crate::lifecycle::{ChannelState, Event, Side};
use crate::pool::Body;
use crate::receiver::{Receiver, Turn};
use crate::restore::RestoreSlot;
use crate::save::SaveState;
use crate::send::SendBounds;
use crate::settings::Settings;
use crate::thread_mark;
use crate::traffic::{Consequences, Traffic};
use crate::waiting::Waiting;

/// A channel's handle: cheap to clone, usable from any thread. The channel lives as long as a handle
/// or one of its packets does.
///
/// Source: VMBCHANNEL.
#[derive(Clone)]
pub struct Channel {
    pub(crate) shared: Arc<Shared>,
}

/// What all handles of a channel share. Locks are taken one at a time, but for `control` before
/// `settings` and `receiver` before `traffic`; none is held across a callback or a call to the bus that could call back.
pub(crate) struct Shared {
    pub(crate) side: Side,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) settings: Mutex<Settings>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) doorbell: Arc<EventDoorbell>,
    pub(crate) control: Mutex<Control>,
    /// The thread that performs life-cycle steps, or 0: state-change callbacks never overlap.
    pub(crate) control_thread: AtomicUsize,
    /// Mirrors the life cycle's state, for looks without the lock.
    pub(crate) state: AtomicU8,
    receiver: Mutex<Post>,
    receiver_back: Condvar,
    /// The thread inside a packet callback, or 0.
    batch_thread: AtomicUsize,
    /// Something has happened since the receiver last looked.
    work: AtomicBool,
    /// Cleared when the receiver has to stop after the present packet.
    queue_on: AtomicBool,
    requires_passive: AtomicBool,
    /// Its driver looks by itself: the peer need not signal.
    polled: AtomicBool,
    memory_arrived: AtomicBool,
    /// A packet callback has handed its packet back, or stopped the channel.
    callback_asked: AtomicBool,
    stopped: AtomicBool,
    stop_reason: Mutex<Option<ChannelError>>,
    traffic: Mutex<Traffic>,
    pub(crate) bounds: SendBounds,
    pub(crate) mappings: Mutex<Mappings>,
    pointer: AtomicUsize,
    /// Numbers the packets of synchronous requests.
    pub(crate) tags: AtomicU64,
    pub(crate) hold: Hold,
    /// The save of the documented calls.
    pub(crate) save: Mutex<Option<Box<SaveState>>>,
    pub(crate) restore: Mutex<RestoreSlot>,
}

/// Where the receiver is kept while nobody processes.
struct Post {
    slot: Slot,
    /// Threads that wait for it to come back. Waking a condition variable costs a system call,
    /// whether somebody waits or not.
    waiting: u32,
}

/// Where the receiver is.
enum Slot {
    /// The channel has no rings.
    Absent,
    Here(Box<Receiver>),
    /// Some thread is processing.
    Taken,
}

/// The receiver in the hands of the thread that processes; put back when dropped, also by a callback
/// that panics.
struct TakenReceiver<'a> {
    channel: &'a Channel,
    receiver: Option<Box<Receiver>>,
}

impl TakenReceiver<'_> {
    fn run(&mut self, level: Level, budget: u32) -> Turn {
        let channel = self.channel;
        self.receiver.as_mut().map_or_else(Turn::default, |it| it.run(channel, level, budget))
    }
}

impl Drop for TakenReceiver<'_> {
    fn drop(&mut self) {
        let Some(mut receiver) = self.receiver.take() else { return };
        if std::thread::panicking() {
            receiver.recover(self.channel);
        }
        self.channel.put_receiver(receiver);
    }
}

/// What a call of [`Channel::process`] has done, and whether it is worth calling again at once.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Packets taken from the ring: deliveries and completions.
    pub packets: u32,
    /// The budget ended before the ring did: call again, nobody will signal what is left.
    pub more: bool,
    /// The next thing to do may sleep: call again with [`Level::Passive`].
    pub needs_passive: bool,
}

impl Channel {
    /// A new channel with default settings, Disabled.
    ///
    /// Source: VmbChannelAllocate.
    #[must_use]
    pub fn allocate(side: Side, bus: Arc<dyn Bus>) -> Self {
        let mailbox = Arc::new(Mailbox::default());
        let bounds = SendBounds::default();
        bounds.set(&Settings::default());
        Self {
            shared: Arc::new(Shared {
                side,
                bus,
                settings: Mutex::default(),
                doorbell: Arc::new(EventDoorbell::new(Arc::clone(&mailbox))),
                mailbox,
                control: Mutex::new(Control::new(side)),
                control_thread: AtomicUsize::new(0),
                state: AtomicU8::new(ChannelState::Disabled as u8),
                receiver: Mutex::new(Post { slot: Slot::Absent, waiting: 0 }),
                receiver_back: Condvar::new(),
                batch_thread: AtomicUsize::new(0),
                work: AtomicBool::new(false),
                queue_on: AtomicBool::new(false),
                requires_passive: AtomicBool::new(false),
                polled: AtomicBool::new(false),
                memory_arrived: AtomicBool::new(false),
                callback_asked: AtomicBool::new(false),
                stopped: AtomicBool::new(false),
                stop_reason: Mutex::new(None),
                traffic: Mutex::new(Traffic::new()),
                bounds,
                mappings: Mutex::default(),
                pointer: AtomicUsize::new(0),
                tags: AtomicU64::new(1),
                hold: Hold::default(),
                save: Mutex::new(None),
                restore: Mutex::default(),
            }),
        }
    }

    /// Gives the channel up: callbacks and pooled memory are released. The channel must be Disabled;
    /// one that is not is an error of the caller, asserted in debug builds, and is disabled first
    /// (D-12).
    ///
    /// Source: VmbChannelCleanup.
    pub fn cleanup(self) {
        if self.state() != ChannelState::Disabled {
            debug_assert!(false, "cleanup of a channel that is not Disabled");
            tracing::error!(state = ?self.state(), "cleanup of a channel that is not Disabled");
            self.disable();
        }
        *lock(&self.shared.settings) = Settings::default();
        self.traffic().forget_idle_packets();
        self.shared.mailbox.set_waker(None);
    }

    /// Server: offers the channel. Client: takes a matching offer, or waits for one; its channel is
    /// started by this. Does not wait for the peer.
    ///
    /// # Errors
    /// [`Error::State`] unless the channel is Disabled and its interface is set; [`Error::Bus`] with
    /// the bus's status.
    ///
    /// Source: VmbChannelEnable.
    pub fn enable(&self) -> Result<(), Error> {
        self.connect()?;
        self.drive_unless_driven();
        Ok(())
    }

    /// Ends the paused condition. An open channel's `started` sequence runs, on the thread that
    /// drives the channel; otherwise it runs when the channel opens. On a Disabled channel this only
    /// takes an armed pause back (D-4). Not in a state-change callback.
    ///
    /// Source: VmbChannelStart.
    pub fn start(&self) {
        if self.allowed_here("start") {
            self.shared.mailbox.post_request(Event::Start);
            self.drive_unless_driven();
        }
    }

    /// Stops deliveries, and returns when `suspend` has run and every packet delivered is completed.
    /// On a Disabled channel it arms a pause for the next enable (D-4). Not in a callback: a packet
    /// callback uses [`Self::begin_pause`].
    ///
    /// Source: VmbChannelPause; D-11.
    pub fn pause(&self) {
        self.request_and_wait("pause", Event::Pause);
    }

    /// Asks for the pause and does not wait for it: [`Self::state`] is Paused when it has come
    /// about. For event loops and simulators.
    pub fn begin_pause(&self) {
        self.shared.mailbox.post_request(Event::Pause);
        self.drive_unless_driven();
    }

    /// Server: withdraws the offer. Client: closes the channel. Returns when all is torn down:
    /// `suspend`, completion of packets delivered, `closed`. Not in a callback.
    ///
    /// Source: VmbChannelDisable.
    pub fn disable(&self) {
        self.request_and_wait("disable", Event::Disable);
    }

    /// Asks for it and does not wait: [`Self::state`] is Disabled when it has come about.
    pub fn begin_disable(&self) {
        self.end_hold();
        self.shared.mailbox.post_request(Event::Disable);
        self.drive_unless_driven();
    }

    /// Where the channel is in its life.
    #[must_use]
    pub fn state(&self) -> ChannelState {
        let state = self.shared.state.load(Ordering::Acquire);
        ChannelState::ALL.get(usize::from(state)).copied().unwrap_or(ChannelState::Disabled)
    }

    /// Which end of the channel this is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.shared.side
    }

    /// Why the channel delivers nothing any more, if it was stopped by a bad ring or packet. It is
    /// deliverable again after it was closed and opened.
    #[must_use]
    pub fn stop_reason(&self) -> Option<ChannelError> {
        *lock(&self.shared.stop_reason)
    }

    /// The instance that was offered or bound; all zeroes before it is known.
    ///
    /// Source: VmbChannelGetInterfaceInstance.
    #[must_use]
    pub fn get_interface_instance(&self) -> Guid {
        lock(&self.shared.control).instance.unwrap_or(Guid::ZERO)
    }

    /// Guest physical address and size in bytes of the MMIO space that was reserved; zeroes without
    /// (D-52). Known once the channel was opened.
    ///
    /// Source: VmbChannelGetMmioSpace.
    #[must_use]
    pub fn get_mmio_space(&self) -> (u64, u64) {
        lock(&self.shared.control).mmio.unwrap_or_default()
    }

    /// Keeps a word for the driver; 0 at first (D-51).
    ///
    /// Source: VmbChannelSetPointer.
    pub fn set_pointer(&self, pointer: usize) {
        self.shared.pointer.store(pointer, Ordering::Release);
    }

    /// The word kept by [`Self::set_pointer`].
    ///
    /// Source: VmbChannelGetPointer.
    #[must_use]
    pub fn get_pointer(&self) -> usize {
        self.shared.pointer.load(Ordering::Acquire)
    }

    /// Most incoming packets outstanding at a time. May be below the present number. Raising it
    /// restarts nothing by itself: the next completion does. 0 is ignored (D-61).
    ///
    /// Source: VmbChannelSetTransactionQuota.
    pub fn set_transaction_quota(&self, quota: u32) {
        debug_assert_ne!(quota, 0, "a quota of 0 packets");
        if quota != 0 {
            self.traffic().quota = quota;
        }
    }

    /// Whether packets are delivered only by threads that may sleep. May be changed at any time; the
    /// next packet delivered goes by it.
    ///
    /// Source: VmbChannelSetIncomingProcessingAtPassive.
    pub fn set_incoming_processing_at_passive(&self, require_passive: bool) {
        self.shared.requires_passive.store(require_passive, Ordering::Relaxed);
    }

    /// Asks for another latency of monitored notifications, in units of 100 ns; returns the former.
    ///
    /// # Errors
    /// [`Error::State`] unless the channel is a client's and open; [`Error::Bus`] where the offer
    /// has no monitor.
    ///
    /// Source: VmbChannelSetInterruptLatency.
    pub fn set_interrupt_latency(&self, latency_100ns: u16) -> Result<u16, Error> {
        let link = self.client_link("set_interrupt_latency")?;
        link.set_interrupt_latency(latency_100ns).map_err(Error::Bus)
    }

    /// The guest's memory, while the channel is open.
    #[must_use]
    pub fn memory(&self) -> Option<GuestMemory> {
        lock(&self.shared.control).memory.clone()
    }

    /// Device-defined bytes of the client's open request, while the channel is open.
    #[must_use]
    pub fn open_user_data(&self) -> Option<[u8; crate::bus::USER_DATA_SIZE]> {
        lock(&self.shared.control).user_data
    }

    /// Whether the channel was open before a restore, and its client knows of nothing else: valid from
    /// the `opened` callback on, for devices that begin anew with a new client. An extension.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        lock(&self.shared.control).resumed
    }

    /// Client: pages that the server can reach, for external data and GPADLs.
    ///
    /// # Errors
    /// [`Error::State`] unless the channel is a client's and connected; [`Error::Bus`] when there
    /// are none left.
    pub fn allocate_pages(&self, pages: u32) -> Result<PageRun, Error> {
        let link = lock(&self.shared.control).link.client("allocate_pages", self.state())?;
        link.allocate_pages(pages).map_err(Error::Bus)
    }

    /// Outgoing packets queued for room in the ring, and in flight at the peer.
    #[must_use]
    pub fn outgoing_in_use(&self) -> (usize, usize) {
        self.traffic().in_use()
    }

    /// Incoming packets delivered and not completed.
    #[must_use]
    pub fn incoming_outstanding(&self) -> u32 {
        self.traffic().outstanding()
    }

    /// Completions and sends made through the batch become visible to the peer together, with at
    /// most one signal, when it is dropped.
    #[must_use]
    pub fn batch(&self) -> Batch<'_> {
        Batch::new(self)
    }

    /// Readable when the peer has rung. Call [`Self::acknowledge`] and [`Self::process`] then.
    ///
    /// # Errors
    /// The system's, when it has no descriptor left.
    pub fn doorbell_fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.shared.doorbell.event_fd()
    }

    /// Makes [`Self::doorbell_fd`] quiet until the next ring. Costs a system call, so only when it
    /// was found readable, and before [`Self::process`].
    pub fn acknowledge(&self) {
        self.shared.doorbell.event.acknowledge();
    }

    /// Names who drives this channel: `waker` is woken when [`Self::process`] is wanted for another
    /// reason than the doorbell. Life-cycle calls leave their callbacks to the driver then.
    pub fn set_waker(&self, waker: Waker) {
        let waiting = self.shared.mailbox.is_waiting();
        self.shared.mailbox.set_waker(Some(waker.clone()));
        if waiting || self.shared.work.load(Ordering::Acquire) {
            waker.wake();
        }
    }

    /// Takes the waker back: from now on life-cycle calls run their callbacks themselves.
    pub fn clear_waker(&self) {
        self.shared.mailbox.set_waker(None);
    }

    /// Says that [`Self::process`] is called again and again without waiting: the peer is asked not to
    /// signal, and its packets cost no interrupt and no system call. Off by default. Whoever turns it
    /// off to wait calls [`Self::process`] once more before. An extension.
    pub fn set_polled(&self, polled: bool) {
        self.shared.polled.store(polled, Ordering::SeqCst);
    }

    /// Does what is to be done, on a thread that may sleep: life-cycle steps with their callbacks,
    /// and up to `budget` packets. Returns at once when another thread is at it.
    pub fn process(&self, budget: u32) -> Progress {
        self.process_at(Level::Passive, budget)
    }

    /// As [`Self::process`], for a thread that may or may not sleep.
    pub fn process_at(&self, level: Level, budget: u32) -> Progress {
        let mut progress = Progress::default();
        loop {
            let at_rest = match level {
                Level::Passive => self.drive_control(),
                Level::Dispatch if self.shared.mailbox.is_waiting() => {
                    progress.needs_passive = true;
                    return progress;
                }
                Level::Dispatch => true,
            };
            let turn = self.process_data(level, budget.saturating_sub(progress.packets));
            progress.packets += turn.packets;
            progress.more = turn.more;
            progress.needs_passive = turn.needs_passive;
            // What has come meanwhile is for this call, unless somebody else is at it already.
            let again = at_rest && self.shared.mailbox.is_waiting();
            if turn.more || turn.needs_passive || !again {
                return progress;
            }
        }
    }

    /// The data half of [`Self::process`].
    pub(crate) fn process_data(&self, level: Level, budget: u32) -> Turn {
        let mut sum = Turn::default();
        // Before the attempt: if another thread has the receiver it sees this when it puts it back.
        self.shared.work.store(true, Ordering::SeqCst);
        while let Some(mut receiver) = self.take_receiver() {
            self.shared.work.store(false, Ordering::SeqCst);
            let turn = receiver.run(level, budget - sum.packets);
            drop(receiver);
            sum.packets += turn.packets;
            sum.more = turn.more;
            sum.needs_passive = turn.needs_passive;
            if turn.more || turn.needs_passive || !self.shared.work.load(Ordering::SeqCst) {
                break;
            }
            if sum.packets >= budget {
                sum.more = true;
                break;
            }
        }
        sum
    }

    fn take_receiver(&self) -> Option<TakenReceiver<'_>> {
        let mut post = lock(&self.shared.receiver);
        match std::mem::replace(&mut post.slot, Slot::Taken) {
            Slot::Here(receiver) => Some(TakenReceiver { channel: self, receiver: Some(receiver) }),
            other => {
                post.slot = other;
                None
            }
        }
    }

    fn put_receiver(&self, receiver: Box<Receiver>) {
        let waiting = {
            let mut post = lock(&self.shared.receiver);
            post.slot = Slot::Here(receiver);
            post.waiting
        };
        if waiting != 0 {
            self.shared.receiver_back.notify_all();
        }
    }

    /// Waits until no packet callback runs.
    fn post(&self) -> MutexGuard<'_, Post> {
        let mut post = lock(&self.shared.receiver);
        while matches!(post.slot, Slot::Taken) {
            post.waiting += 1;
            post = self.shared.receiver_back.wait(post).unwrap_or_else(PoisonError::into_inner);
            post.waiting -= 1;
        }
        post
    }

    /// Waits until no packet callback runs, then changes the receiver; `None` takes it away.
    pub(crate) fn with_receiver(
        &self,
        change: impl FnOnce(Option<Box<Receiver>>) -> Option<Box<Receiver>>,
    ) {
        let mut post = self.post();
        let before = match std::mem::replace(&mut post.slot, Slot::Absent) {
            Slot::Here(receiver) => Some(receiver),
            Slot::Absent | Slot::Taken => None,
        };
        post.slot = change(before).map_or(Slot::Absent, Slot::Here);
    }

    /// Changes the traffic together with what waits in front of the incoming ring, while no packet
    /// callback runs.
    pub(crate) fn with_line<R>(
        &self,
        change: impl FnOnce(&mut Traffic, &mut VecDeque<Waiting>) -> R,
    ) -> R {
        let mut post = self.post();
        let mut none = VecDeque::new();
        let line = match &mut post.slot {
            Slot::Here(receiver) => receiver.line(),
            Slot::Absent | Slot::Taken => &mut none,
        };
        change(&mut self.traffic(), line)
    }

    /// Lets packets be delivered, or stops it and waits until none is.
    pub(crate) fn set_queue_on(&self, on: bool) {
        self.shared.queue_on.store(on, Ordering::SeqCst);
        self.with_receiver(|receiver| {
            receiver.map(|mut receiver| {
                receiver.set_queue_on(on);
                receiver.mask();
                receiver
            })
        });
        if on {
            self.kick();
        }
    }

    /// Has the receiver look again, on whatever thread drives it.
    pub(crate) fn kick(&self) {
        self.shared.work.store(true, Ordering::SeqCst);
        if !self.in_packet_callback() {
            self.shared.mailbox.wake();
        }
    }

    pub(crate) fn follow(&self, consequences: Consequences) {
        if consequences.drained {
            self.shared.mailbox.post_request(Event::Drained);
        }
        if consequences.restart {
            self.kick();
        }
        if consequences.settled {
            self.shared.mailbox.wake();
            self.shared.hold.wake();
        }
    }

    // ---- What packets ask of their channel --------------------------------------------------------

    pub(crate) fn complete(&self, body: Box<Body>, payload: &[u8]) {
        self.complete_by(|traffic| traffic.complete(body, payload));
    }

    /// As [`Self::complete`], with the payload that `body` keeps.
    pub(crate) fn complete_kept(&self, body: Box<Body>) {
        self.complete_by(|traffic| traffic.complete_kept(body));
    }

    fn complete_by(
        &self,
        complete: impl FnOnce(&mut Traffic) -> (Consequences, Result<(), RingError>),
    ) {
        let (consequences, ring, written) = {
            let mut traffic = self.traffic();
            let (consequences, written) = complete(&mut traffic);
            (consequences, traffic.publish(), written)
        };
        ring.give();
        if let Err(error) = written {
            self.stop(ChannelError::Outgoing(error));
        }
        self.follow(consequences);
    }

    /// As [`Self::complete`], shown to the peer later.
    pub(crate) fn complete_staged(&self, body: Box<Body>, payload: &[u8]) {
        let (consequences, written) = self.traffic().complete(body, payload);
        if let Err(error) = written {
            self.stop(ChannelError::Outgoing(error));
        }
        self.follow(consequences);
    }

    /// Ends a packet without a completion, and deliveries with it (D-36).
    pub(crate) fn fail(&self, body: Box<Body>) {
        let consequences = {
            let mut traffic = self.traffic();
            if traffic.is_stale(&body) {
                return;
            }
            traffic.retire(body)
        };
        self.stop(ChannelError::PacketFailed);
        self.follow(consequences);
    }

    pub(crate) fn hand_back(&self, handed_back: Waiting) {
        let kept = self.traffic().hand_back(handed_back);
        self.shared.callback_asked.store(true, Ordering::Relaxed);
        match kept {
            Ok(consequences) => self.follow(consequences),
            Err(body) => self.refuse_back(body),
        }
    }

    /// Fails a packet that was handed back where it cannot be delivered again.
    pub(crate) fn refuse_back(&self, body: Box<Body>) {
        tracing::error!("packet handed back outside its callback: failed");
        self.fail(body);
        debug_assert!(false, "a packet can be handed back only inside its callback");
    }

    /// Shows the peer what was written, unless this thread is in a batch.
    pub(crate) fn publish(&self) {
        let ring = self.traffic().publish();
        ring.give();
    }

    /// Stops deliveries until the channel is closed and opened again. The first reason is kept.
    pub(crate) fn stop(&self, reason: ChannelError) {
        let mut first = lock(&self.shared.stop_reason);
        if first.is_none() {
            *first = Some(reason);
            drop(first);
            // Once per opening, so a peer cannot flood the log.
            tracing::warn!(channel = %self.name(), %reason, "channel stopped");
        }
        self.shared.stopped.store(true, Ordering::SeqCst);
        self.shared.callback_asked.store(true, Ordering::Relaxed);
        // Whoever waits for an answer waits in vain.
        self.shared.mailbox.notify();
    }

    pub(crate) fn clear_stop(&self) {
        *lock(&self.shared.stop_reason) = None;
        self.shared.stopped.store(false, Ordering::SeqCst);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Relaxed)
    }

    /// Whether a callback has asked for something since the last call. Same thread: no ordering.
    pub(crate) fn callback_asked(&self) -> bool {
        self.shared.callback_asked.load(Ordering::Relaxed)
            && self.shared.callback_asked.swap(false, Ordering::Relaxed)
    }

    /// Whether packets are delivered. Only meaningful to the thread that steps the life cycle.
    pub(crate) fn queue_is_on(&self) -> bool {
        self.shared.queue_on.load(Ordering::Relaxed)
    }

    pub(crate) fn is_polled(&self) -> bool {
        self.shared.polled.load(Ordering::Relaxed)
    }

    pub(crate) fn requires_passive(&self) -> bool {
        self.shared.requires_passive.load(Ordering::Relaxed)
    }

    pub(crate) fn set_memory_arrived(&self) {
        self.shared.memory_arrived.store(true, Ordering::SeqCst);
        self.kick();
    }

    pub(crate) fn take_memory_arrived(&self) -> bool {
        self.shared.memory_arrived.load(Ordering::Relaxed)
            && self.shared.memory_arrived.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn set_batch_thread(&self, running: bool) {
        let thread = if running { thread_mark::current() } else { 0 };
        self.shared.batch_thread.store(thread, Ordering::Relaxed);
    }

    /// Whether this very thread is inside one of the channel's packet callbacks.
    pub(crate) fn in_packet_callback(&self) -> bool {
        self.shared.batch_thread.load(Ordering::Relaxed) == thread_mark::current()
    }

    // ---- Access -----------------------------------------------------------------------------------

    pub(crate) fn traffic(&self) -> MutexGuard<'_, Traffic> {
        lock(&self.shared.traffic)
    }

    pub(crate) fn settings(&self) -> Settings {
        lock(&self.shared.settings).clone()
    }

    /// The event sink of the present connection.
    pub(crate) fn events(&self) -> EventSink {
        let connection = lock(&self.shared.control).connection;
        EventSink::new(Arc::clone(&self.shared.mailbox), connection)
    }

    /// What log lines call the channel.
    pub(crate) fn name(&self) -> String {
        let settings = lock(&self.shared.settings);
        if settings.friendly_name.is_empty() {
            settings.interface_type.to_string()
        } else {
            settings.friendly_name.clone()
        }
    }

    pub(crate) fn server_link(&self, function: &'static str) -> Result<Arc<dyn ServerLink>, Error> {
        let state = self.state();
        match &lock(&self.shared.control).link {
            Link::Server(link) if state.is_open() || is_changing(state) => Ok(Arc::clone(link)),
            _ => Err(Error::State { function, state }),
        }
    }

    pub(crate) fn client_link(&self, function: &'static str) -> Result<Arc<dyn ClientLink>, Error> {
        let state = self.state();
        if !state.is_open() && !is_changing(state) {
            return Err(Error::State { function, state });
        }
        lock(&self.shared.control).link.client(function, state)
    }
}

/// The states in which `opened` and `closed` run: GPADLs may be handled in both.
fn is_changing(state: ChannelState) -> bool {
    matches!(state, ChannelState::Opening | ChannelState::Closing)
}

/// A lock whose holder panicked guards data that is still whole: every change to it is a single step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("name", &self.name())
            .field("side", &self.side())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
