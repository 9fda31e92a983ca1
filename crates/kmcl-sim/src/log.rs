//! What a bystander sees of the second device: every packet, from its making to its end, on both sides.
//! Neither side nor a save touches it, so it can tell what was lost, doubled or reordered.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kmcl::NtStatus;

use crate::trace::Trace;

/// See the module. Also keeps the trace and what is wrong, whoever finds it.
#[derive(Default)]
pub(crate) struct Log(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    now: u64,
    trace: Trace,
    violations: Vec<String>,
    /// Guest to device.
    work: Stream,
    /// Device to guest.
    events: Stream,
    /// How often the device did what a packet asked for.
    executed: BTreeMap<u64, u32>,
    /// Handed over to the channel, and not back yet.
    handed_over: BTreeSet<u64>,
    deferred: BTreeSet<u64>,
    /// The device's channel is frozen.
    is_frozen: bool,
}

/// The packets of one direction, numbered from 1 in the order in which they are sent.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Stream {
    sent: u64,
    /// The last one that the other side saw for the first time.
    seen: u64,
    /// How each ended, for its sender.
    ended: BTreeMap<u64, NtStatus>,
}

/// The ends of all packets, to be compared.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Ends {
    /// Guest to device: number and status.
    pub work: BTreeMap<u64, NtStatus>,
    /// Device to guest: number and status.
    pub events: BTreeMap<u64, NtStatus>,
    /// Packets that the device did something for.
    pub executed: usize,
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Way {
    /// Guest to device.
    Work,
    /// Device to guest.
    Event,
}

impl Log {
    pub(crate) fn new(trace: Trace) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Inner { trace, ..Inner::default() })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_now(&self, now: u64) {
        self.lock().now = now;
    }

    pub(crate) fn line(&self, what: fmt::Arguments<'_>) {
        let inner = &mut *self.lock();
        inner.trace.line(inner.now, what);
    }

    pub(crate) fn set_frozen(&self, is_frozen: bool) {
        self.lock().is_frozen = is_frozen;
    }

    /// Something that must not be.
    pub(crate) fn violation(&self, what: fmt::Arguments<'_>) {
        self.lock().violation(what);
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    pub(crate) fn trace(&self) -> Trace {
        self.lock().trace.clone()
    }

    pub(crate) fn ends(&self) -> Ends {
        let inner = self.lock();
        Ends {
            work: inner.work.ended.clone(),
            events: inner.events.ended.clone(),
            executed: inner.executed.len(),
        }
    }

    /// A packet is given to the library.
    pub(crate) fn sent(&self, way: Way) -> u64 {
        let inner = &mut *self.lock();
        let stream = inner.stream(way);
        stream.sent += 1;
        let number = stream.sent;
        inner.trace.line(inner.now, format_args!("{way:?} {number} sent"));
        number
    }

    /// Packets sent that have not ended.
    pub(crate) fn outstanding(&self, way: Way) -> u64 {
        let mut inner = self.lock();
        let stream = inner.stream(way);
        stream.sent - stream.ended.len() as u64
    }

    /// The other side sees a packet for the first time, or again after a deferral.
    pub(crate) fn seen(&self, way: Way, number: u64) {
        let inner = &mut *self.lock();
        inner.trace.line(inner.now, format_args!("{way:?} {number} delivered"));
        if way == Way::Work {
            if let Some(&waiting) = inner.handed_over.first() {
                inner.violation(format_args!("work {number} overtakes {waiting}, handed over"));
            }
            if inner.is_frozen {
                inner.violation(format_args!("work {number} delivered to a frozen device"));
            }
            if inner.deferred.remove(&number) {
                return;
            }
            if let Some(&waiting) = inner.deferred.first() {
                inner.violation(format_args!("work {number} overtakes {waiting}, deferred"));
            }
        }
        let stream = inner.stream(way);
        let expected = stream.seen + 1;
        stream.seen = stream.seen.max(number);
        if number != expected {
            inner.violation(format_args!("{way:?} {number} delivered, not {expected}"));
        }
    }

    /// The device hands a packet back until it may sleep.
    pub(crate) fn deferred(&self, number: u64) {
        let inner = &mut *self.lock();
        inner.trace.line(inner.now, format_args!("Work {number} deferred"));
        inner.deferred.insert(number);
    }

    /// The device does what a packet asks for.
    pub(crate) fn executed(&self, number: u64) {
        let inner = &mut *self.lock();
        inner.trace.line(inner.now, format_args!("Work {number} executed"));
        let times = inner.executed.entry(number).or_default();
        *times += 1;
        if *times != 1 {
            let times = *times;
            inner.violation(format_args!("work {number} executed {times} times"));
        }
    }

    /// The device hands a packet over to its channel.
    pub(crate) fn handed_over(&self, number: u64) {
        let inner = &mut *self.lock();
        inner.trace.line(inner.now, format_args!("Work {number} handed over"));
        inner.handed_over.insert(number);
    }

    /// A packet that was handed over comes back.
    pub(crate) fn resumed(&self, number: u64) {
        let inner = &mut *self.lock();
        inner.trace.line(inner.now, format_args!("Work {number} resumed"));
        if inner.is_frozen {
            inner.violation(format_args!("work {number} resumed by a frozen device"));
        }
        let first = inner.handed_over.first().copied();
        if first != Some(number) {
            inner.violation(format_args!("work {number} resumed, not {first:?}"));
        }
        inner.handed_over.remove(&number);
    }

    /// The sender hears of the end of a packet.
    pub(crate) fn ended(&self, way: Way, number: u64, status: NtStatus) {
        let inner = &mut *self.lock();
        inner.trace.line(inner.now, format_args!("{way:?} {number} ended: {status}"));
        let stream = inner.stream(way);
        let was_sent = (1..=stream.sent).contains(&number);
        let before = stream.ended.insert(number, status);
        if !was_sent || before.is_some() {
            inner.violation(format_args!(
                "{way:?} {number} ended with {status}: sent {was_sent}, ended before {before:?}"
            ));
        }
    }
}

impl Inner {
    fn stream(&mut self, way: Way) -> &mut Stream {
        match way {
            Way::Work => &mut self.work,
            Way::Event => &mut self.events,
        }
    }

    fn violation(&mut self, what: fmt::Arguments<'_>) {
        self.trace.line(self.now, format_args!("VIOLATION {what}"));
        self.violations.push(format!("at {}: {what}", self.now));
    }
}
