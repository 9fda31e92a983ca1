//! What is told of a VM: not more often than a person can read, however often its guest crashes or resets.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::{Notice, Observer};

/// Notices that may come at once.
const BURST: u32 = 16;

/// Notices that a guest causes, in a second, once it has caused more than that.
const PER_SECOND: u32 = 1;

/// Tells an [`Observer`] what happens.
pub(super) struct Notices {
    observer: Observer,
    gate: Mutex<Gate>,
}

/// How many more may pass.
#[derive(Debug)]
struct Gate {
    left: u32,
    /// Seconds since the beginning, when it was filled last.
    filled: u64,
    untold: u64,
    since: Instant,
}

impl Gate {
    fn new() -> Self {
        Self { left: BURST, filled: 0, untold: 0, since: Instant::now() }
    }

    /// Whether one more may pass at `now`, in seconds; and how many did not before it.
    fn pass(&mut self, now: u64) -> Option<u64> {
        let more = u32::try_from(now.saturating_sub(self.filled)).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more.saturating_mul(PER_SECOND)).min(BURST);
        self.filled = self.filled.max(now);
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.untold))
            }
            None => {
                self.untold += 1;
                None
            }
        }
    }
}

impl Notices {
    pub(super) fn new(observer: Observer) -> Self {
        Self { observer, gate: Mutex::new(Gate::new()) }
    }

    /// Something has happened that is told in any case.
    pub(super) fn tell(&self, notice: &Notice) {
        (self.observer)(notice);
    }

    /// Something has happened that a guest can bring about as often as it likes.
    pub(super) fn tell_of_guest(&self, notice: &Notice) {
        let passed = {
            let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
            let now = gate.since.elapsed().as_secs();
            gate.pass(now)
        };
        let Some(untold) = passed else { return };
        if untold > 0 {
            self.tell(&Notice::Untold(untold));
        }
        self.tell(notice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_flood_whoever_listens() {
        let mut gate = Gate::new();
        let passed = (0..1000).filter(|_| gate.pass(0).is_some()).count();
        assert_eq!(passed, 16);
        assert_eq!(gate.pass(1), Some(984), "and it is told how many were not");
        assert_eq!(gate.pass(1), None);
        assert_eq!(gate.pass(0), None, "a clock that goes back opens nothing");
        let passed = (0..1000).filter(|_| gate.pass(1_000_000).is_some()).count();
        assert_eq!(passed, 16, "rest is not saved up for ever");
    }
}
