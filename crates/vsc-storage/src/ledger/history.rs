//! What one block may hold, given everything that was done with it: an exact judgement.
//!
//! A block is a register: writes replace its value, reads return it, each at one moment between its
//! begin and its end. Every write has a value of its own, so each read tells which write it saw. What
//! is known about a value is then an interval between two moments:
//!
//! - *landed*: the first end of the write and of the reads that saw it. By then it was there.
//! - *seen*: the last begin of the write and of the reads that saw it. From then on it was there once
//!   more, or for the first time.
//!
//! Where *landed* comes before *seen* the block held the value from the one to the other, and nothing
//! else. Otherwise the block held it at some moment from *seen* to *landed*, which may have been
//! short. An order of all writes and reads exists if and only if no two intervals of the first kind
//! overlap, and no interval of the second kind lies within one of the first. (Gibbons and Korach,
//! *Testing shared memories*, SIAM J. Comput. 26, 1997, theorem 3.2, with one written value each.)
//!
//! A write that is in flight, or has failed, may have been done or not: it counts once a read has seen
//! it, and never before.

/// Moments are counted: no two events have the same.
pub(super) type Moment = u64;

/// Values after which it is worth while to look for ones that can be forgotten.
const CROWD: usize = 8;

/// A value that the block may hold, or held.
#[derive(Clone, Copy, Debug)]
struct Value {
    /// Number of the write; 0 is what the block held at first.
    write: u64,
    /// See the module; `Moment::MAX` where it is not known to have landed.
    landed: Moment,
    /// See the module.
    seen: Moment,
    /// The write has succeeded, or a read has seen it.
    certain: bool,
}

impl Value {
    /// Whether the block held this value, and no other, from `landed` to `seen`.
    fn stayed(&self) -> bool {
        self.landed < self.seen
    }

    /// Whether no order of events has room for both.
    fn contradicts(&self, other: &Self) -> bool {
        match (self.stayed(), other.stayed()) {
            (true, true) => self.landed.max(other.landed) < self.seen.min(other.seen),
            (true, false) => self.landed < other.seen && other.landed < self.seen,
            (false, true) => other.contradicts(self),
            (false, false) => false,
        }
    }
}

/// Everything about one block that can still matter.
#[derive(Clone, Debug)]
pub(super) struct History {
    values: Vec<Value>,
    /// Begins of the reads under way.
    reads: Vec<Moment>,
    /// Look for values to forget when there are more than this.
    crowd: usize,
}

impl Default for History {
    fn default() -> Self {
        let first = Value { write: 0, landed: 0, seen: 0, certain: true };
        Self { values: vec![first], reads: Vec::new(), crowd: CROWD }
    }
}

impl History {
    /// Write `write` was sent.
    pub(super) fn begin_write(&mut self, write: u64, now: Moment) {
        self.forget(now);
        self.values.push(Value { write, landed: Moment::MAX, seen: now, certain: false });
    }

    /// Write `write` has ended; whether it was done is certain only if it has succeeded.
    pub(super) fn end_write(&mut self, write: u64, succeeded: bool, now: Moment) {
        if let Some(value) = self.values.iter_mut().find(|value| value.write == write) {
            value.landed = value.landed.min(now);
            value.certain |= succeeded;
        }
    }

    /// A read was sent.
    pub(super) fn begin_read(&mut self, now: Moment) {
        self.reads.push(now);
    }

    /// The read that began at `begin` has ended; [`Self::saw`] comes before, if it saw anything.
    pub(super) fn end_read(&mut self, begin: Moment) {
        if let Some(index) = self.reads.iter().position(|read| *read == begin) {
            self.reads.swap_remove(index);
        }
    }

    /// A read from `begin` to `now` has seen what write `write` wrote.
    ///
    /// # Errors
    /// Where it cannot have been there: the write that has replaced it. Nothing is then remembered.
    pub(super) fn saw(&mut self, write: u64, begin: Moment, now: Moment) -> Result<(), u64> {
        let Some(index) = self.values.iter().position(|value| value.write == write) else {
            return Err(self.newest(write)); // forgotten, because it cannot be there any more
        };
        let Some(value) = self.values.get(index) else { return Err(self.newest(write)) };
        let value = Value {
            landed: value.landed.min(now),
            seen: value.seen.max(begin),
            certain: true,
            ..*value
        };
        match self.contradiction(&value) {
            Some(by) => Err(by),
            None => {
                if let Some(place) = self.values.get_mut(index) {
                    *place = value;
                }
                Ok(())
            }
        }
    }

    /// A value that certainly was there and leaves no room for `value`.
    fn contradiction(&self, value: &Value) -> Option<u64> {
        let others = self.values.iter().filter(|other| other.certain && other.write != value.write);
        others.filter(|other| value.contradicts(other)).map(|other| other.write).max()
    }

    /// The last value that certainly was there, besides `write`.
    fn newest(&self, write: u64) -> u64 {
        let others = self.values.iter().filter(|value| value.certain && value.write != write);
        others.max_by_key(|value| value.landed).map_or(0, |value| value.write)
    }

    /// Forgets values that no read can see any more.
    ///
    /// Every read that ends from now on began at `oldest` or later. A value that landed before that and
    /// that even a read from `oldest` on must not see cannot come again. Its interval is over: whatever
    /// is still learnt moves *seen* to `oldest` or later, or *landed* from unknown to a later moment
    /// still. And it excludes no value that remains: those that do remain have room at `oldest`.
    fn forget(&mut self, now: Moment) {
        if self.values.len() <= self.crowd {
            return;
        }
        let oldest = self.reads.iter().copied().min().unwrap_or(now);
        let gone = |value: &Value| {
            let again = Value { seen: value.seen.max(oldest), ..*value };
            value.landed < oldest && self.contradiction(&again).is_some()
        };
        let kept: Vec<Value> = self.values.iter().filter(|value| !gone(value)).copied().collect();
        self.values = kept;
        // Twice as many as cannot be forgotten, so that looking costs little per write.
        self.crowd = CROWD.max(2 * self.values.len());
    }

    #[cfg(test)]
    fn remembered(&self) -> usize {
        self.values.len()
    }
}

#[cfg(test)]
mod tests;
