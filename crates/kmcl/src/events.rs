//! The mailbox of a channel: what the bus and its own users ask of it, in order, and the bell that
//! wakes whoever drives it or waits for it.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmbus_wire::status::NtStatus;

use crate::bus::{BusEvent, MAX_PENDING_EVENTS};
use crate::doorbell::Event as EventFd;
use crate::lifecycle::Event;

/// Where a bus puts the events of one channel. Cheap to clone; usable from any thread.
#[derive(Clone)]
pub struct EventSink {
    mailbox: Arc<Mailbox>,
    connection: u32,
}

impl EventSink {
    pub(crate) fn new(mailbox: Arc<Mailbox>, connection: u32) -> Self {
        Self { mailbox, connection }
    }

    /// Puts `event` behind those that wait, and wakes whoever drives the channel. Events of a former
    /// connection of the channel (before it was disabled and enabled again) are dropped.
    ///
    /// Returns `false` when [`MAX_PENDING_EVENTS`] are waiting: the bus has broken its rules, and the
    /// event is lost.
    pub fn post(&self, event: BusEvent) -> bool {
        let posted = match event {
            // Whoever asked is waiting, perhaps inside a callback: it must not queue behind that.
            BusEvent::GpadlCreated { gpadl, status } => {
                self.mailbox.answer(GpadlAnswer::Created { gpadl, status })
            }
            BusEvent::GpadlTornDown { gpadl } => {
                self.mailbox.answer(GpadlAnswer::TornDown { gpadl })
            }
            event => self.mailbox.post_bus(self.connection, event),
        };
        if !posted {
            tracing::error!(limit = MAX_PENDING_EVENTS, "bus events for a channel overflow");
        }
        posted
    }

    /// A sink that belongs to no channel and keeps what it is given: for the tests of a bus.
    #[must_use]
    pub fn recorder() -> (Self, Recorder) {
        let mailbox = Arc::new(Mailbox::default());
        (Self::new(Arc::clone(&mailbox), 0), Recorder { mailbox })
    }
}

impl std::fmt::Debug for EventSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventSink").field("connection", &self.connection).finish_non_exhaustive()
    }
}

/// The other end of [`EventSink::recorder`].
pub struct Recorder {
    mailbox: Arc<Mailbox>,
}

impl Recorder {
    /// The events posted since the last call, oldest first.
    #[must_use]
    pub fn take(&self) -> Vec<BusEvent> {
        let mut events = Vec::new();
        while let Some(letter) = self.mailbox.take() {
            if let Letter::Bus { event, .. } = letter {
                events.push(event);
            }
        }
        events.extend(self.mailbox.lock().answers.drain(..).map(|answer| match answer {
            GpadlAnswer::Created { gpadl, status } => BusEvent::GpadlCreated { gpadl, status },
            GpadlAnswer::TornDown { gpadl } => BusEvent::GpadlTornDown { gpadl },
        }));
        events
    }
}

/// One thing for the channel to look at.
#[expect(clippy::large_enum_variant, reason = "letters are few, short-lived and moved twice")]
pub(crate) enum Letter {
    Bus { connection: u32, event: BusEvent },
    Request { ticket: u64, event: Event },
}

/// The answer to something that a caller waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum GpadlAnswer {
    Created { gpadl: u32, status: NtStatus },
    TornDown { gpadl: u32 },
}

/// See the module.
#[derive(Default)]
pub(crate) struct Mailbox {
    inner: Mutex<Inner>,
    /// Mirrors `!inner.letters.is_empty()`, so that the data path need not lock to find nothing.
    waiting: AtomicBool,
    bell: Condvar,
    /// Rings with the bell, for the one waiter that sleeps in `poll`.
    alarm: EventFd,
    /// There is such a waiter.
    watched: AtomicBool,
}

#[derive(Default)]
struct Inner {
    letters: VecDeque<Letter>,
    answers: Vec<GpadlAnswer>,
    /// Tickets given to requests so far.
    tickets: u64,
    waker: Option<Waker>,
    /// Counts rings of the bell: a waiter that saw n sleeps only while it is still n.
    rung: u64,
    /// Threads that wait for the bell: without any, ringing it costs no system call.
    sleepers: u32,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post_bus(&self, connection: u32, event: BusEvent) -> bool {
        let mut inner = self.lock();
        let is_arrival = |letter: &Letter| {
            matches!(letter, Letter::Bus { connection: of, event: BusEvent::MemoryArrived }
                if *of == connection)
        };
        if matches!(event, BusEvent::MemoryArrived) && inner.letters.iter().any(is_arrival) {
            // One says it all. A guest decides how many there are: they must not crowd others out.
            return true;
        }
        if inner.letters.len() >= MAX_PENDING_EVENTS {
            return false;
        }
        inner.letters.push_back(Letter::Bus { connection, event });
        self.waiting.store(true, Ordering::Release);
        self.ring(inner);
        true
    }

    /// Puts a request of the channel's own user into the mailbox; its ticket tells when it was
    /// handled.
    pub(crate) fn post_request(&self, event: Event) -> u64 {
        let mut inner = self.lock();
        inner.tickets += 1;
        let ticket = inner.tickets;
        inner.letters.push_back(Letter::Request { ticket, event });
        self.waiting.store(true, Ordering::Release);
        self.ring(inner);
        ticket
    }

    fn answer(&self, answer: GpadlAnswer) -> bool {
        let mut inner = self.lock();
        if inner.answers.len() >= MAX_PENDING_EVENTS {
            // The oldest is one that nobody came for: the teardown of a GPADL left behind.
            inner.answers.remove(0);
        }
        inner.answers.push(answer);
        self.ring(inner);
        true
    }

    /// The answer that `wanted` accepts, if it is there.
    pub(crate) fn take_answer(&self, wanted: impl Fn(&GpadlAnswer) -> bool) -> Option<GpadlAnswer> {
        let mut inner = self.lock();
        let at = inner.answers.iter().position(wanted)?;
        Some(inner.answers.remove(at))
    }

    /// Forgets answers that nobody came for.
    pub(crate) fn clear_answers(&self) {
        self.lock().answers.clear();
    }

    /// The oldest letter.
    pub(crate) fn take(&self) -> Option<Letter> {
        let mut inner = self.lock();
        let letter = inner.letters.pop_front();
        self.waiting.store(!inner.letters.is_empty(), Ordering::Release);
        letter
    }

    /// Whether a letter waits.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    /// Whether something waits that ends `connection`: an event, or a request to disable.
    pub(crate) fn has_ending(&self, connection: u32) -> bool {
        self.lock().letters.iter().any(|letter| match letter {
            Letter::Bus { connection: of, event: BusEvent::PeerClosed | BusEvent::Rescinded } => {
                *of == connection
            }
            Letter::Bus { .. } => false,
            Letter::Request { event, .. } => *event == Event::Disable,
        })
    }

    /// Wakes whoever drives the channel and whoever waits for it.
    pub(crate) fn wake(&self) {
        self.ring(self.lock());
    }

    /// Wakes whoever waits for the channel, and not its driver: it is the driver who calls.
    pub(crate) fn notify(&self) {
        let mut inner = self.lock();
        inner.rung = inner.rung.wrapping_add(1);
        let sleepers = inner.sleepers;
        drop(inner);
        self.strike(sleepers);
    }

    /// As [`Self::notify`], by whoever has handled letters and stops. The driver, which may have been
    /// turned away meanwhile, is woken for those that are left.
    pub(crate) fn pass_on(&self) {
        let inner = self.lock();
        if inner.letters.is_empty() {
            drop(inner);
            self.notify();
        } else {
            self.ring(inner);
        }
    }

    /// Wakes the waiters. Where there are none it costs no system call.
    fn strike(&self, sleepers: u32) {
        if sleepers != 0 {
            self.bell.notify_all();
        }
        if self.watched.load(Ordering::SeqCst) {
            self.alarm.ring();
        }
    }

    fn ring(&self, mut inner: MutexGuard<'_, Inner>) {
        inner.rung = inner.rung.wrapping_add(1);
        let (waker, sleepers) = (inner.waker.clone(), inner.sleepers);
        drop(inner);
        self.strike(sleepers);
        if let Some(waker) = waker {
            waker.wake(); // foreign code: never under our lock
        }
    }

    /// How often the bell has rung. Taken before a condition is checked, given to [`Self::wait`].
    pub(crate) fn rung(&self) -> u64 {
        self.lock().rung
    }

    /// Sleeps until the bell has rung more often than `seen`, or `limit` is over.
    pub(crate) fn wait(&self, seen: u64, limit: Option<Duration>) {
        let mut inner = self.lock();
        inner.sleepers += 1;
        while inner.rung == seen {
            match limit {
                None => inner = self.bell.wait(inner).unwrap_or_else(PoisonError::into_inner),
                Some(limit) => {
                    let (guard, timeout) = self
                        .bell
                        .wait_timeout(inner, limit)
                        .unwrap_or_else(PoisonError::into_inner);
                    inner = guard;
                    if timeout.timed_out() {
                        break;
                    }
                }
            }
        }
        inner.sleepers -= 1;
    }

    /// Becomes the waiter that sleeps in `poll`, unless there is one. The caller looks at what it waits
    /// for afterwards: what has happened before did not ring the alarm.
    pub(crate) fn watch(&self) -> Option<Watch<'_>> {
        self.watched
            .compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst)
            .ok()
            .map(|_| Watch { mailbox: self, alarm: self.alarm.descriptor().ok() })
    }

    pub(crate) fn set_waker(&self, waker: Option<Waker>) {
        self.lock().waker = waker;
    }

    /// Whether somebody drives the channel from a loop of his own.
    pub(crate) fn has_driver(&self) -> bool {
        self.lock().waker.is_some()
    }
}

/// The right to sleep in `poll`, for the bell and a doorbell at once. Passed on when dropped.
pub(crate) struct Watch<'a> {
    mailbox: &'a Mailbox,
    /// Missing where the system had no descriptor left.
    alarm: Option<BorrowedFd<'a>>,
}

impl Watch<'_> {
    /// Sleeps until the bell or `doorbell` rings, or `limit` is over; perhaps for less.
    pub(crate) fn sleep(&self, doorbell: Option<BorrowedFd<'_>>, limit: Option<Duration>) {
        let Some(alarm) = self.alarm else { return std::thread::yield_now() };
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let of = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = [of(alarm), of(doorbell.unwrap_or(alarm))];
        // An interrupted or failed wait is a spurious wake-up: the caller looks again.
        let _woken = poll(&mut fds, limit.as_ref());
        self.mailbox.alarm.acknowledge();
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.mailbox.watched.store(false, Ordering::SeqCst);
        self.mailbox.notify();
    }
}
