//! Whether the processors of a machine run: who wants them to stand, and who of them does.
//!
//! ```text
//!            ┌──────── resume ────────┐
//!            ▼                        │
//!   ──► running ──── pause ───► standing       a processor's end, or the machine's drop,
//!          │                          │        from anywhere: stopped, for good
//!          └─────► stopped ◄──────────┘
//! ```
//!
//! A processor looks here before each exit that it takes. One that is in KVM does not look: it is kicked
//! out of it by a signal. A signal that comes between the look and the call is lost, so that whoever waits
//! kicks again, every [`KICK_EVERY`].

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long processors have to come to a stand. One that is in an exit ends it first, and none takes long;
/// the rest is for machines that are emulated or have much else to do.
pub(super) const STAND_WITHIN: Duration = Duration::from_secs(30);

/// How long a kick is waited for before the next one.
pub(super) const KICK_EVERY: Duration = Duration::from_millis(1);

/// What processors are to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(super) enum Wanted {
    Run,
    Stand,
    Stop,
}

/// See the module.
pub(super) struct Gate {
    /// As in the state, for a look without a lock.
    wanted: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    wanted: Wanted,
    /// The processors that stand, a bit for each.
    standing: u64,
    /// All of them.
    all: u64,
}

/// Why processors do not stand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum DoNotStand {
    /// The machine has ended.
    Stopped,
    /// They took too long, and run again. How many of them stood.
    TooLong { standing: u32 },
}

impl Gate {
    /// For so many processors, 64 at most. They may run.
    pub(super) fn new(processors: usize) -> Self {
        let all = (0..processors).fold(0, |all, index| all | bit(index));
        let state = State { wanted: Wanted::Run, standing: 0, all };
        let wanted = AtomicU8::new(Wanted::Run as u8);
        Self { wanted, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, state: &mut State, wanted: Wanted) {
        state.wanted = wanted;
        self.wanted.store(wanted as u8, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Whether a processor may go on without a further look.
    pub(super) fn is_open(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) == Wanted::Run as u8
    }

    /// Whether a processor is to stand rather than to stop.
    pub(super) fn is_to_stand(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) == Wanted::Stand as u8
    }

    /// A processor stands here until it may run; `false`: it is to stop instead.
    pub(super) fn pass(&self, index: usize) -> bool {
        let mut state = self.lock();
        loop {
            match state.wanted {
                Wanted::Stop => return false,
                Wanted::Run => {
                    state.standing &= !bit(index);
                    return true;
                }
                Wanted::Stand => {
                    state.standing |= bit(index);
                    self.changed.notify_all();
                }
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Brings all processors to a stand, with `kick` for each that does not. They stand already: nothing
    /// happens. If they do not by `deadline`, they run again.
    pub(super) fn stand(
        &self,
        deadline: Instant,
        mut kick: impl FnMut(usize),
    ) -> Result<(), DoNotStand> {
        let mut state = self.lock();
        if state.wanted == Wanted::Run {
            self.want(&mut state, Wanted::Stand);
        }
        loop {
            match state.wanted {
                Wanted::Stop => return Err(DoNotStand::Stopped),
                // Somebody lets them run who does not wait: that is the last word.
                Wanted::Run => return Err(DoNotStand::TooLong { standing: 0 }),
                Wanted::Stand if state.standing == state.all => return Ok(()),
                Wanted::Stand => {}
            }
            let running = state.all & !state.standing;
            (0..u64::BITS as usize).filter(|index| running & bit(*index) != 0).for_each(&mut kick);
            let waited = self.changed.wait_timeout(state, KICK_EVERY);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            let standing = state.standing.count_ones();
            if state.wanted == Wanted::Stand
                && state.standing != state.all
                && Instant::now() >= deadline
            {
                self.want(&mut state, Wanted::Run);
                return Err(DoNotStand::TooLong { standing });
            }
        }
    }

    /// Whether all processors stand.
    pub(super) fn is_standing(&self) -> bool {
        let state = self.lock();
        state.wanted == Wanted::Stand && state.standing == state.all
    }

    /// Lets processors run that stand or are about to.
    pub(super) fn open(&self) {
        let mut state = self.lock();
        if state.wanted == Wanted::Stand {
            self.want(&mut state, Wanted::Run);
        }
    }

    /// Has all processors stop.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        self.want(&mut state, Wanted::Stop);
    }
}

fn bit(index: usize) -> u64 {
    u32::try_from(index).ok().and_then(|index| 1_u64.checked_shl(index)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    use super::*;

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// Processors that count what they do between two looks, and that each must be kicked out of.
    struct Running {
        gate: Arc<Gate>,
        steps: Arc<Vec<AtomicU64>>,
        threads: Vec<thread::JoinHandle<()>>,
    }

    impl Running {
        fn start(count: usize) -> Self {
            let gate = Arc::new(Gate::new(count));
            let steps: Arc<Vec<_>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
            let threads = (0..count).map(|index| {
                let (gate, steps) = (Arc::clone(&gate), Arc::clone(&steps));
                thread::spawn(move || {
                    while gate.pass(index) {
                        while gate.is_open() {
                            steps[index].fetch_add(1, Ordering::SeqCst);
                            thread::park();
                        }
                    }
                })
            });
            let threads = threads.collect();
            Self { gate, steps, threads }
        }

        fn kick(&self, index: usize) {
            self.threads[index].thread().unpark();
        }

        fn steps(&self) -> Vec<u64> {
            self.steps.iter().map(|steps| steps.load(Ordering::SeqCst)).collect()
        }
    }

    #[test]
    fn processors_stand_until_they_may_run() {
        let running = Running::start(3);
        for _round in 0..100 {
            assert_eq!(running.gate.stand(later(), |index| running.kick(index)), Ok(()));
            assert!(running.gate.is_standing());
            let before = running.steps();
            assert_eq!(running.gate.stand(later(), |_| panic!("they stand already")), Ok(()));
            (0..3).for_each(|index| running.kick(index));
            assert_eq!(running.steps(), before, "they do not run while they stand");
            running.gate.open();
            assert!(!running.gate.is_standing());
        }
        running.gate.stop();
        assert_eq!(running.gate.stand(later(), |_| {}), Err(DoNotStand::Stopped));
        running.gate.open();
        assert!(!running.gate.pass(0), "a stop is for good");
        for thread in running.threads {
            thread.thread().unpark();
            thread.join().unwrap();
        }
    }

    #[test]
    fn those_that_do_not_come_hold_nobody_up() {
        let gate = Gate::new(2);
        let mut kicked = Vec::new();
        let result = gate.stand(Instant::now(), |index| kicked.push(index));
        assert_eq!(result, Err(DoNotStand::TooLong { standing: 0 }));
        assert_eq!(kicked, [0, 1], "each of them is kicked");
        assert!(gate.is_open() && gate.pass(0) && gate.pass(1), "and they run again");
    }
}
