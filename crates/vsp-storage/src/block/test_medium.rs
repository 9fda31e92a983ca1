//! A disk whose time, errors and order a test decides, and that tells what landed when.
//!
//! ```text
//!   submit ──► held (order) ──► waiting (no slot) ──► running ── parts land ──► out
//!                                                      │  stalled until released
//!                                                      └─ cancelled, where its fate allows
//! ```
//!
//! Each request has a [`Fate`], chosen when it comes: how long it takes, in how many parts its data
//! lands and from which end, how it ends, and whether it lets itself be cancelled. The time is
//! simulated, and goes on when the test says so, or it is that of the system.
//!
//! Several back ends may work on one medium, as several processes do one after the other: what one has
//! begun goes on landing while the next is at work. [`TestMedium::overlaps`] counts the writes that
//! came while another write to the same bytes was still under way, in whichever back end.

mod queue;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
use vmbus_memory::{GuestMemory, MemoryError};

use self::queue::{Bell, Entry, Log, Queue};
use super::event::Event;
use super::{Backend, IoDone, IoError, IoOperation, IoOutcome, IoRequest, RamBackend};

/// Most entries of a history; the oldest go first.
pub const MAX_HISTORY: usize = 1 << 18;

/// Most requests that one back end holds; further ones are refused as busy.
pub const MAX_REQUESTS: usize = 1 << 15;

/// Whose time a medium goes by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TestTime {
    /// It starts at 0 and goes on with [`TestMedium::advance`].
    Simulated,
    /// That of the system. Parts land when somebody looks.
    Real,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fate {
    /// From its start to its end.
    pub latency: Duration,
    /// It lands in so many parts of whole sectors, evenly spaced, the last one at the end. 0 is 1.
    pub parts: u32,
    /// The parts land from the last to the first.
    pub backwards: bool,
    /// How it ends. If badly, its last part does not land.
    pub result: Result<(), IoError>,
    /// It does not end before [`TestMedium::release`]; all but its last part land.
    pub stalls: bool,
    /// It can be cancelled while it runs.
    pub can_cancel: bool,
}

impl Fate {
    /// It ends well after `latency`, in one part, and can be cancelled.
    #[must_use]
    pub const fn after(latency: Duration) -> Self {
        Self {
            latency,
            parts: 1,
            backwards: false,
            result: Ok(()),
            stalls: false,
            can_cancel: true,
        }
    }

    /// It does not end before it is released, and cannot be cancelled.
    #[must_use]
    pub const fn stalled() -> Self {
        Self { stalls: true, can_cancel: false, ..Self::after(Duration::ZERO) }
    }

    /// The same, but it cannot be cancelled.
    #[must_use]
    pub const fn uncancellable(self) -> Self {
        Self { can_cancel: false, ..self }
    }
}

/// A request, as those see it who choose fates and read histories.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TestIo {
    /// Its number; each that is submitted to the medium gets the next one.
    pub number: u64,
    /// Of the back end, in the order of their making.
    pub backend: u32,
    /// As it was submitted.
    pub token: u64,
    /// As it was submitted.
    pub operation: IoOperation,
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes of the disk.
    pub bytes: u64,
}

impl TestIo {
    fn overlaps(&self, other: &Self) -> bool {
        self.operation.is_write()
            && other.operation.is_write()
            && self.offset < other.offset + other.bytes
            && other.offset < self.offset + self.bytes
    }
}

/// What happened, and when.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TestEvent {
    /// Since the medium was made.
    pub at: Duration,
    /// To which request.
    pub io: TestIo,
    /// What.
    pub what: TestStep,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TestStep {
    /// It was submitted.
    Came,
    /// It started.
    Started,
    /// These bytes of the disk were written, read or compared.
    Landed {
        /// First byte.
        offset: u64,
        /// Bytes.
        bytes: u64,
    },
    /// It came out.
    Out(IoOutcome),
}

type Chooser = Box<dyn FnMut(&TestIo) -> Fate + Send>;

/// See the module.
#[derive(Clone)]
pub struct TestMedium {
    inner: Arc<Inner>,
}

struct Inner {
    ram: RamBackend,
    epoch: Option<Instant>,
    state: Mutex<State>,
}

struct State {
    now: Duration,
    chooser: Chooser,
    slots: usize,
    next_number: u64,
    history: VecDeque<TestEvent>,
    overlaps: u64,
    /// By back end.
    queues: Vec<Queue>,
}

impl TestMedium {
    /// A medium of `bytes` zeros, on which every request ends well at once and 256 run at a time.
    ///
    /// # Errors
    /// A size of 0, or one the system has no memory for.
    pub fn new(bytes: u64, time: TestTime) -> Result<Self, MemoryError> {
        let state = State {
            now: Duration::ZERO,
            chooser: Box::new(|_| Fate::after(Duration::ZERO)),
            slots: 256,
            next_number: 0,
            history: VecDeque::new(),
            overlaps: 0,
            queues: Vec::new(),
        };
        let epoch = (time == TestTime::Real).then(Instant::now);
        let ram = RamBackend::new(bytes)?;
        Ok(Self { inner: Arc::new(Inner { ram, epoch, state: Mutex::new(state) }) })
    }

    /// A back end on the medium. It takes what it has begun along when it is dropped; see
    /// [`TestBackend::kill`] for the other end.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub fn backend(&self) -> Result<Arc<TestBackend>, Errno> {
        let bell = match self.inner.epoch {
            None => Bell::Event(Event::new()?),
            Some(_) => Bell::Timer(timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?),
        };
        let bell = Arc::new(bell);
        let mut state = self.inner.lock();
        let number = u32::try_from(state.queues.len()).map_err(|_| Errno::MFILE)?;
        state.queues.push(Queue::new(Arc::clone(&bell)));
        drop(state);
        Ok(Arc::new(TestBackend { medium: self.clone(), number, bell }))
    }

    /// Gives every request that comes from now on this fate.
    pub fn set_fate(&self, fate: Fate) {
        self.choose_fates(move |_| fate);
    }

    /// Lets `choose` decide what becomes of each request that comes from now on. It is called under
    /// the medium's lock and may not call the medium.
    pub fn choose_fates(&self, choose: impl FnMut(&TestIo) -> Fate + Send + 'static) {
        self.inner.lock().chooser = Box::new(choose);
    }

    /// How many requests of one back end run at a time; further ones wait and have not started.
    pub fn set_slots(&self, slots: usize) {
        let mut state = self.inner.lock();
        state.slots = slots;
        self.inner.go_on(&mut state);
    }

    /// Lets simulated time go on. Everything lands and ends in its order.
    pub fn advance(&self, by: Duration) {
        let mut state = self.inner.lock();
        let until = state.now + by;
        while let Some(next) = state.next_at().filter(|&next| next <= until) {
            state.now = next.max(state.now);
            self.inner.go_on(&mut state);
        }
        state.now = until;
    }

    /// The time, since the medium was made.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.inner.lock().now
    }

    /// When something lands or ends next, if nothing else happens before.
    #[must_use]
    pub fn next_at(&self) -> Option<Duration> {
        self.inner.lock().next_at()
    }

    /// Lets go of every request that is stalled now: it ends as soon as its latency is over.
    pub fn release(&self) {
        let mut state = self.inner.lock();
        for queue in &mut state.queues {
            queue.release();
        }
        self.inner.go_on(&mut state);
    }

    /// Requests of all back ends that have not started, and that run.
    #[must_use]
    pub fn in_flight(&self) -> (usize, usize) {
        let state = self.inner.lock();
        state.queues.iter().fold((0, 0), |(waiting, running), queue| {
            let (waits, runs) = queue.count();
            (waiting + waits, running + runs)
        })
    }

    /// What has happened, in order; up to [`MAX_HISTORY`].
    #[must_use]
    pub fn history(&self) -> Vec<TestEvent> {
        self.inner.lock().history.iter().copied().collect()
    }

    /// Forgets what has happened.
    pub fn clear_history(&self) {
        self.inner.lock().history.clear();
    }

    /// How many writes came while another write to some of the same bytes had started and could still
    /// land. 0, if nobody writes the same bytes twice at a time.
    #[must_use]
    pub fn overlaps(&self) -> u64 {
        self.inner.lock().overlaps
    }

    /// The bytes, to fill them or to look at them.
    #[must_use]
    pub fn contents(&self) -> &GuestMemory {
        drop(self.inner.lock()); // what is due has landed
        self.inner.ram.medium()
    }
}

impl Inner {
    /// Takes the lock, and lets land what is due.
    fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(epoch) = self.epoch {
            state.now = epoch.elapsed();
            self.go_on(&mut state);
        }
        state
    }

    /// Lets land, end and start what is due, in all back ends.
    fn go_on(&self, state: &mut State) {
        let State { now, history, queues, slots, .. } = state;
        let mut log = Log { at: *now, history };
        for queue in &mut *queues {
            queue.go_on(&self.ram, *slots, &mut log);
            queue.ring(*now);
        }
    }
}

impl State {
    fn next_at(&self) -> Option<Duration> {
        self.queues.iter().filter_map(Queue::next_at).min()
    }
}

/// A back end on a [`TestMedium`].
pub struct TestBackend {
    medium: TestMedium,
    number: u32,
    bell: Arc<Bell>,
}

impl TestBackend {
    /// Its medium.
    #[must_use]
    pub fn medium(&self) -> &TestMedium {
        &self.medium
    }

    /// Ends it as the end of its process would: nothing that it holds lands any more, and nothing
    /// comes out. Returns how many requests are gone.
    pub fn kill(&self) -> usize {
        let mut state = self.medium.inner.lock();
        let Some(queue) = state.queue(self.number) else { return 0 };
        queue.clear()
    }

    /// Calls `change` with its queue, and gives it what comes out.
    fn with_queue(&self, done: &mut Vec<IoDone>, change: impl FnOnce(&mut State, &RamBackend)) {
        let inner = &self.medium.inner;
        let mut state = inner.lock();
        change(&mut state, &inner.ram);
        inner.go_on(&mut state);
        let now = state.now;
        if let Some(queue) = state.queue(self.number) {
            queue.take_finished(done);
            queue.ring(now);
        }
    }
}

impl State {
    fn queue(&mut self, number: u32) -> Option<&mut Queue> {
        self.queues.get_mut(number as usize)
    }

    /// A new request of back end `number`.
    fn come(&mut self, number: u32, request: IoRequest, ram: &RamBackend) {
        let IoRequest { token, operation, offset, bytes, .. } = request;
        let io =
            TestIo { number: self.next_number, backend: number, token, operation, offset, bytes };
        self.next_number += 1;
        if self.queues.iter().flat_map(Queue::running).any(|running| running.overlaps(&io)) {
            self.overlaps += 1;
        }
        let mut log = Log { at: self.now, history: &mut self.history };
        log.note(io, TestStep::Came);
        let Some(queue) = self.queues.get_mut(number as usize) else { return };
        let admitted = match ram.admit(&request) {
            Ok(()) if queue.is_full() => Err(IoError::Busy),
            admitted => admitted,
        };
        match admitted {
            Ok(()) => {
                let fate = (self.chooser)(&io);
                queue.admit(Entry { io, fate, request });
            }
            Err(error) => {
                let outcome = IoOutcome::Done(Err(error));
                log.note(io, TestStep::Out(outcome));
                queue.refuse(IoDone { request, outcome });
            }
        }
    }
}

impl Backend for TestBackend {
    fn bytes(&self) -> u64 {
        self.medium.inner.ram.bytes()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn submit(&self, requests: &mut Vec<IoRequest>, done: &mut Vec<IoDone>) {
        self.with_queue(done, |state, ram| {
            for request in requests.drain(..) {
                state.come(self.number, request, ram);
            }
        });
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bell.as_fd())
    }

    fn reap(&self, done: &mut Vec<IoDone>) {
        match &*self.bell {
            Bell::Event(event) => event.clear(),
            // The only error is that it has not gone off.
            Bell::Timer(timer) => drop(rustix::io::read(timer, &mut [0; 8])),
        }
        self.with_queue(done, |_, _| {});
    }

    fn cancel(&self, wanted: &dyn Fn(u64) -> bool, done: &mut Vec<IoDone>) {
        self.with_queue(done, |state, _| {
            let State { now, history, queues, .. } = state;
            let mut log = Log { at: *now, history };
            if let Some(queue) = queues.get_mut(self.number as usize) {
                queue.cancel(wanted, &mut log);
            }
        });
    }

    fn read_now(&self, offset: u64, into: &mut [u8]) -> Option<Result<(), IoError>> {
        self.medium.inner.ram.read_now(offset, into)
    }
}

impl Drop for TestBackend {
    fn drop(&mut self) {
        // As with every back end: what has started is waited for, and nobody hears of it.
        let mut state = self.medium.inner.lock();
        let State { now, history, queues, .. } = &mut *state;
        let mut log = Log { at: *now, history };
        if let Some(queue) = queues.get_mut(self.number as usize) {
            queue.hurry(&self.medium.inner.ram, &mut log);
            queue.clear();
        }
    }
}

impl fmt::Debug for TestMedium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (waiting, running) = self.in_flight();
        f.debug_struct("TestMedium")
            .field("waiting", &waiting)
            .field("running", &running)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for TestBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestBackend").field("number", &self.number).finish_non_exhaustive()
    }
}
