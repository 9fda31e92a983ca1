//! What a machine tells while it runs, and how it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use hyperv_kvm::CrashReport;

use crate::error::Error;

/// Crashes that wait to be looked at. A guest can report as many as it likes: what comes beyond is
/// dropped.
pub const MAX_CRASHES: usize = 64;

/// How a machine has ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum End {
    /// The guest has powered it off.
    PowerOff,
    /// The guest has reset it.
    Reset,
    /// A processor has met a fault while it could handle none: a reset that nobody asked for, or the last
    /// resort of a kernel that did.
    TripleFault {
        /// Its index.
        vp: u32,
    },
    /// It was stopped from outside.
    Stopped,
    /// A processor cannot go on.
    Failed(Error),
}

/// What a machine tells.
#[derive(Debug)]
#[non_exhaustive]
pub enum MachineEvent {
    /// The guest has crashed, and says why. It may run on, to write a dump.
    Crash(CrashReport),
    /// A processor has ended, and with it the machine. Each processor says so once; the first one counts.
    Ended(End),
}

/// What a machine tells, in order: see [`Events::next`].
#[derive(Debug)]
pub struct Events {
    happened: Receiver<MachineEvent>,
    waiting: Arc<AtomicUsize>,
}

impl Events {
    /// Waits for the next event; `None` once every processor has ended and been told of.
    #[expect(clippy::should_implement_trait, reason = "an iterator would be one that blocks")]
    pub fn next(&mut self) -> Option<MachineEvent> {
        let event = self.happened.recv().ok()?;
        if matches!(event, MachineEvent::Crash(_)) {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        Some(event)
    }

    /// Waits for the machine's end.
    pub fn end(&mut self) -> End {
        while let Some(event) = self.next() {
            if let MachineEvent::Ended(end) = event {
                return end;
            }
        }
        End::Stopped
    }
}

/// The machine's side of [`Events`].
pub(crate) struct Teller {
    happened: SyncSender<MachineEvent>,
    waiting: Arc<AtomicUsize>,
}

impl Teller {
    pub(crate) fn new(processors: usize) -> (Self, Events) {
        // Room for the end of each, whatever a guest has reported before.
        let (sender, receiver) = sync_channel(MAX_CRASHES + processors);
        let waiting = Arc::new(AtomicUsize::new(0));
        let teller = Self { happened: sender, waiting: Arc::clone(&waiting) };
        (teller, Events { happened: receiver, waiting })
    }

    /// A processor has ended.
    pub(crate) fn end(&self, end: End) {
        let _nobody_listens = self.happened.try_send(MachineEvent::Ended(end));
    }

    /// The guest has crashed.
    pub(crate) fn crash(&self, report: CrashReport) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) < MAX_CRASHES {
            let _nobody_listens = self.happened.try_send(MachineEvent::Crash(report));
        } else {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that reports crash after crash fills no memory and hides no end.
    #[test]
    fn crashes_that_nobody_looks_at_are_bounded() {
        let (teller, mut events) = Teller::new(1);
        let report = CrashReport { parameters: [0; 5], has_message: false };
        for _ in 0..10 * MAX_CRASHES {
            teller.crash(report);
        }
        teller.end(End::Reset);
        for _ in 0..MAX_CRASHES {
            assert!(matches!(events.next(), Some(MachineEvent::Crash(_))));
        }
        assert!(matches!(events.next(), Some(MachineEvent::Ended(End::Reset))));
        teller.crash(report);
        assert!(matches!(events.next(), Some(MachineEvent::Crash(_))), "there is room again");
        drop(teller);
        assert!(events.next().is_none());
    }
}
