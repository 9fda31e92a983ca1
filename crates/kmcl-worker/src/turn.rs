//! The worker's thread: turn after turn until it is told to stop.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use crate::roster::{Started, Token};
use crate::shared::{OWN_BELL, Shared};
use crate::task::Task;

/// Doorbells taken from the kernel in one look. The kernel hands out the rest first next time.
const EVENTS_PER_LOOK: usize = 64;

/// Body of the thread.
pub(crate) fn drive(shared: &Shared) {
    let mut events = Vec::with_capacity(EVENTS_PER_LOOK);
    while let Some(ready) = collect(shared, &mut events) {
        shared.turns.fetch_add(1, Ordering::Relaxed);
        for _ in 0..ready {
            if !run_next(shared) {
                break;
            }
        }
    }
    let mut state = shared.lock();
    state.is_stopping = true; // also where the system ended us: nobody may be added any more
    while let Some(task) = state.roster.remove_first() {
        drop(state); // the channel's code is foreign, and so is what dropping it runs
        task.let_go();
        drop_task(task);
        state = shared.lock();
    }
}

/// Queues whatever rang, sleeping for it if nothing is ready. Returns how many tasks are ready;
/// `None` when the worker is to end.
fn collect(shared: &Shared, events: &mut Vec<epoll::Event>) -> Option<usize> {
    const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
    let timeout = {
        let mut state = shared.lock();
        if state.is_stopping {
            return None;
        }
        state.is_asleep = state.roster.ready_count() == 0;
        (!state.is_asleep).then_some(&NO_WAIT)
    };
    events.clear();
    match epoll::wait(&shared.epoll, spare_capacity(events), timeout) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => {
            tracing::error!(%error, "a worker cannot wait, and ends");
            return None;
        }
    }
    let mut state = shared.lock();
    state.is_asleep = false;
    for token in events.iter().map(|event| Token(event.data.u64())) {
        if token == OWN_BELL {
            shared.silence_bell();
        } else {
            state.roster.mark_rung(token);
        }
    }
    Some(state.roster.ready_count())
}

/// Runs the first ready task; `false` if there is none, or the worker is to end.
fn run_next(shared: &Shared) -> bool {
    let Started { token, task, rang } = {
        let mut state = shared.lock();
        if state.is_stopping {
            return false;
        }
        let Some(started) = state.roster.start_next() else { return false };
        started
    };
    // Nothing of the worker's is in a half-done state while the task runs, and the task is not used
    // again after a panic; so unwinding breaks no promise of ours.
    let outcome = catch_unwind(AssertUnwindSafe(|| task.run(rang)));
    let panicked = outcome.is_err();
    let more = outcome.unwrap_or_else(|payload| {
        tracing::error!(panic = panic_text(&*payload), "a device panicked; its channel is let go");
        false
    });
    let mut state = shared.lock();
    if panicked {
        shared.remove(&mut state, token);
    }
    state.roster.finish(more);
    drop(state);
    shared.finished.notify_all();
    if panicked {
        task.let_go();
    }
    drop_task(task);
    true
}

/// Drops our hold on a task outside the lock: it may be the last, and run a device's `drop`.
fn drop_task(task: Arc<Task>) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(task))) {
        tracing::error!(panic = panic_text(&*panic), "a device panicked while it was dropped");
    }
}

/// The words of a panic, where it has any.
fn panic_text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
