//! What one back end of a medium holds, and how it goes on with time.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};

use super::{Fate, MAX_HISTORY, MAX_REQUESTS, TestEvent, TestIo, TestStep};
use crate::block::event::Event;
use crate::block::order::{Class, Order, Sharing, Ticket};
use crate::block::{IoDone, IoError, IoOperation, IoOutcome, IoRequest, RamBackend};

/// Where parts of a request begin and end.
const PART_BYTES: u64 = 512;

/// What one back end holds.
pub(super) struct Queue {
    bell: Arc<Bell>,
    order: Order<Entry>,
    /// They have no slot yet.
    waiting: VecDeque<(Entry, Ticket)>,
    running: Vec<Running>,
    finished: Vec<IoDone>,
    in_flight: usize,
    // Kept for its memory; empty between calls.
    ready: Vec<(Entry, Ticket)>,
}

/// A request and what becomes of it.
pub(super) struct Entry {
    pub(super) io: TestIo,
    pub(super) fate: Fate,
    pub(super) request: IoRequest,
}

struct Running {
    entry: Entry,
    ticket: Ticket,
    started: Duration,
    /// Parts that have landed.
    landed: u32,
}

/// How a back end says that something is finished.
pub(super) enum Bell {
    Event(Event),
    Timer(OwnedFd),
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Event(event) => event.as_fd(),
            Self::Timer(timer) => timer.as_fd(),
        }
    }
}

/// The history, at one time.
pub(super) struct Log<'a> {
    pub(super) at: Duration,
    pub(super) history: &'a mut VecDeque<TestEvent>,
}

impl Log<'_> {
    pub(super) fn note(&mut self, io: TestIo, what: TestStep) {
        if self.history.len() == MAX_HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(TestEvent { at: self.at, io, what });
    }
}

impl Queue {
    pub(super) fn new(bell: Arc<Bell>) -> Self {
        Self {
            bell,
            order: Order::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            finished: Vec::new(),
            in_flight: 0,
            ready: Vec::new(),
        }
    }

    /// How many have not started, and how many run.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.in_flight - self.running.len(), self.running.len())
    }

    pub(super) fn is_full(&self) -> bool {
        self.in_flight == MAX_REQUESTS
    }

    pub(super) fn running(&self) -> impl Iterator<Item = &TestIo> {
        self.running.iter().map(|running| &running.entry.io)
    }

    pub(super) fn take_finished(&mut self, done: &mut Vec<IoDone>) {
        done.append(&mut self.finished);
    }

    /// A request that does not get in.
    pub(super) fn refuse(&mut self, done: IoDone) {
        self.finished.push(done);
    }

    /// Nothing is stalled any more.
    pub(super) fn release(&mut self) {
        let waiting = self.waiting.iter_mut().map(|(entry, _)| entry);
        for entry in self.running.iter_mut().map(|one| &mut one.entry).chain(waiting) {
            entry.fate.stalls = false;
        }
    }

    /// Lets everything that runs land at once.
    pub(super) fn hurry(&mut self, ram: &RamBackend, log: &mut Log<'_>) {
        self.release();
        for running in &mut self.running {
            running.entry.fate.latency = Duration::ZERO;
            running.land(ram, log);
        }
    }

    /// Forgets everything; returns how much that was.
    pub(super) fn clear(&mut self) -> usize {
        let gone = self.in_flight + self.finished.len();
        *self = Self::new(Arc::clone(&self.bell));
        gone
    }

    pub(super) fn admit(&mut self, entry: Entry) {
        let class = match entry.io.operation {
            IoOperation::Flush => Class::Flush,
            operation if operation.is_write() => Class::Write(Sharing::Any),
            _ => Class::Read,
        };
        self.in_flight += 1;
        self.order.admit(entry, class, &mut self.ready);
    }

    /// Lets land, end and start what is due.
    pub(super) fn go_on(&mut self, ram: &RamBackend, slots: usize, log: &mut Log<'_>) {
        loop {
            let mut has_ended = false;
            let mut at = 0;
            while let Some(running) = self.running.get_mut(at) {
                match running.land(ram, log) {
                    Some(result) => {
                        let Running { entry, ticket, .. } = self.running.remove(at);
                        let outcome = IoOutcome::Done(result);
                        self.leave(entry, Some(ticket), outcome, log);
                        has_ended = true;
                    }
                    None => at += 1,
                }
            }
            self.waiting.extend(self.ready.drain(..));
            let mut has_started = false;
            while self.running.len() < slots {
                let Some((entry, ticket)) = self.waiting.pop_front() else { break };
                log.note(entry.io, TestStep::Started);
                self.running.push(Running { entry, ticket, started: log.at, landed: 0 });
                has_started = true;
            }
            if !has_ended && !has_started {
                return;
            }
        }
    }

    fn leave(
        &mut self,
        entry: Entry,
        ticket: Option<Ticket>,
        outcome: IoOutcome,
        log: &mut Log<'_>,
    ) {
        let Entry { io, request, .. } = entry;
        log.note(io, TestStep::Out(outcome));
        if let Some(ticket) = ticket {
            self.order.finish(ticket, &mut self.ready);
        }
        self.in_flight -= 1;
        self.finished.push(IoDone { request, outcome });
    }

    /// What [`Backend::cancel`] says. What runs and cannot be cancelled stays.
    pub(super) fn cancel(&mut self, wanted: &dyn Fn(u64) -> bool, log: &mut Log<'_>) {
        let mut withdrawn = Vec::new();
        self.order.withdraw(|entry| wanted(entry.io.token), &mut withdrawn, &mut self.ready);
        for entry in withdrawn {
            self.leave(entry, None, IoOutcome::NeverStarted, log);
        }
        for (entry, ticket) in std::mem::take(&mut self.waiting) {
            if wanted(entry.io.token) {
                self.leave(entry, Some(ticket), IoOutcome::NeverStarted, log);
            } else {
                self.waiting.push_back((entry, ticket));
            }
        }
        for running in std::mem::take(&mut self.running) {
            if running.entry.fate.can_cancel && wanted(running.entry.io.token) {
                let moved = running.moved();
                let Running { entry, ticket, .. } = running;
                self.leave(entry, Some(ticket), IoOutcome::Cancelled { moved }, log);
            } else {
                self.running.push(running);
            }
        }
    }

    pub(super) fn next_at(&self) -> Option<Duration> {
        self.running.iter().filter_map(Running::next_at).min()
    }

    /// Lets the descriptor say what it has to.
    pub(super) fn ring(&self, now: Duration) {
        match &*self.bell {
            Bell::Event(event) if !self.finished.is_empty() => event.raise(),
            Bell::Event(_) => {}
            Bell::Timer(timer) => {
                let next = if self.finished.is_empty() { self.next_at() } else { Some(now) };
                // 0 would switch it off.
                let in_ns = next.map(|next| next.saturating_sub(now).max(Duration::from_nanos(1)));
                let in_ns = in_ns.unwrap_or_default();
                let it_value = Timespec {
                    tv_sec: i64::try_from(in_ns.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: i64::from(in_ns.subsec_nanos()),
                };
                let never = Timespec { tv_sec: 0, tv_nsec: 0 };
                let at = Itimerspec { it_interval: never, it_value };
                // The only error is a time that is none.
                let _ = timerfd_settime(timer, TimerfdTimerFlags::empty(), &at);
            }
        }
    }
}

impl Running {
    fn parts(&self) -> u32 {
        let sectors = u32::try_from(self.entry.io.bytes.div_ceil(PART_BYTES)).unwrap_or(u32::MAX);
        self.entry.fate.parts.clamp(1, sectors.max(1))
    }

    /// When the next part lands, or the end comes; `None` while it is stalled.
    fn next_at(&self) -> Option<Duration> {
        let parts = self.parts();
        if self.entry.fate.stalls && self.landed + 1 >= parts {
            return None;
        }
        Some(self.started + self.entry.fate.latency * (self.landed + 1) / parts)
    }

    /// Bytes from the start of part `index`, counted in the order of the disk.
    fn part(&self, index: u32) -> u64 {
        let (bytes, parts) = (self.entry.io.bytes, u64::from(self.parts()));
        let even = u128::from(bytes) * u128::from(index) / u128::from(parts);
        let even = u64::try_from(even).unwrap_or(bytes);
        if u64::from(index) == parts { bytes } else { even - even % PART_BYTES }
    }

    /// The bytes of the part that lands as the `turn`th.
    fn nth(&self, turn: u32) -> (u64, u64) {
        let index = if self.entry.fate.backwards { self.parts() - 1 - turn } else { turn };
        (self.part(index), self.part(index + 1))
    }

    /// Bytes from the start that have landed without a gap.
    fn moved(&self) -> u64 {
        match self.entry.fate.backwards {
            true if self.landed < self.parts() => 0,
            true => self.entry.io.bytes,
            false => self.part(self.landed),
        }
    }

    /// Lets land what is due; the result, if that was all.
    fn land(&mut self, ram: &RamBackend, log: &mut Log<'_>) -> Option<Result<(), IoError>> {
        while self.next_at().is_some_and(|next| next <= log.at) {
            let is_last = self.landed + 1 == self.parts();
            if is_last && self.entry.fate.result.is_err() {
                return Some(self.entry.fate.result);
            }
            let (from, to) = self.nth(self.landed);
            if let Err(error) = ram.perform(&self.entry.request, from, to) {
                return Some(Err(error));
            }
            let offset = self.entry.io.offset + from;
            log.note(self.entry.io, TestStep::Landed { offset, bytes: to - from });
            self.landed += 1;
            if is_last {
                return Some(Ok(()));
            }
        }
        None
    }
}
