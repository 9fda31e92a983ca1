//! What the worker's thread and everybody who wakes it share.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Wake;

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;

use crate::WorkerError;
use crate::roster::{Roster, Token};
use crate::task::Task;

/// The worker's own descriptor, in the place of a token in an epoll event.
pub(crate) const OWN_BELL: Token = Token(u64::MAX);

/// See the module.
pub(crate) struct Shared {
    /// Watches the doorbells, the sources and the worker's own bell, by level.
    pub(crate) epoll: OwnedFd,
    /// An eventfd that ends the worker's sleep.
    bell: OwnedFd,
    state: Mutex<State>,
    /// Signalled when a task has finished that was removed while it ran.
    pub(crate) finished: Condvar,
    next_token: AtomicU64,
    pub(crate) turns: AtomicU64,
}

/// Everything behind the one lock. It is never held while foreign code runs.
pub(crate) struct State {
    pub(crate) roster: Roster<Arc<Task>>,
    /// The worker found nothing ready and sleeps, or is about to: ring the bell.
    pub(crate) is_asleep: bool,
    /// The worker is to end, or has ended.
    pub(crate) is_stopping: bool,
}

impl Shared {
    pub(crate) fn new() -> Result<Self, WorkerError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(WorkerError::system("epoll instance"))?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(WorkerError::system("eventfd"))?;
        let data = epoll::EventData::new_u64(OWN_BELL.0);
        epoll::add(&epoll, &bell, data, epoll::EventFlags::IN)
            .map_err(WorkerError::system("watch on its eventfd"))?;
        Ok(Self {
            epoll,
            bell,
            state: Mutex::new(State {
                roster: Roster::new(),
                is_asleep: false,
                is_stopping: false,
            }),
            finished: Condvar::new(),
            next_token: AtomicU64::new(0),
            turns: AtomicU64::new(0),
        })
    }

    /// The state. A panic under the lock is a fault of this crate; the state is whole at every
    /// point where one could start, so the lock is used on.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn new_token(&self) -> Token {
        Token(self.next_token.fetch_add(1, Ordering::Relaxed))
    }

    /// Takes in a task and watches its descriptor. The task is ready at once: what happened before it
    /// was watched is found by its first run.
    pub(crate) fn add(&self, token: Token, task: Arc<Task>) -> Result<(), WorkerError> {
        let mut state = self.lock();
        if state.is_stopping {
            return Err(WorkerError::Stopped);
        }
        if let Task::Channel(channel) = &*task
            && state.roster.find(|known| known.is_channel(channel)).is_some()
        {
            return Err(WorkerError::AlreadyDriven);
        }
        let descriptor = task.descriptor().map_err(WorkerError::system("doorbell"))?;
        state.roster.insert(token, Arc::clone(&task)).map_err(|_| WorkerError::Full)?;
        let data = epoll::EventData::new_u64(token.0);
        if let Err(error) = epoll::add(&self.epoll, descriptor, data, epoll::EventFlags::IN) {
            state.roster.remove(token);
            return Err(WorkerError::system("watch on a descriptor")(error));
        }
        self.end_sleep(&mut state);
        Ok(())
    }

    /// Lets go of a task: it never starts again. It may still be running.
    pub(crate) fn remove(&self, state: &mut State, token: Token) -> Option<Arc<Task>> {
        let task = state.roster.remove(token)?;
        // The kernel would go on watching a descriptor of which a duplicate is open elsewhere, and
        // the peer has one of every doorbell.
        if let Ok(descriptor) = task.descriptor()
            && let Err(error) = epoll::delete(&self.epoll, descriptor)
        {
            tracing::error!(%error, "cannot stop watching a descriptor");
        }
        Some(task)
    }

    /// Queues a task.
    fn wake(&self, token: Token) {
        let mut state = self.lock();
        state.roster.mark_ready(token);
        self.end_sleep(&mut state);
    }

    /// Ends the worker's sleep after a change of the state, in the same hold of the lock.
    pub(crate) fn end_sleep(&self, state: &mut State) {
        if std::mem::take(&mut state.is_asleep) {
            match rustix::io::write(&self.bell, &1u64.to_ne_bytes()) {
                // A full counter rings as well as any.
                Ok(_) | Err(Errno::AGAIN) => {}
                Err(error) => tracing::error!(%error, "cannot wake a worker"),
            }
        }
    }

    /// Makes the bell quiet.
    pub(crate) fn silence_bell(&self) {
        // Nothing to read is as quiet as can be.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }
}

/// The waker of one channel. Weak, because the channel keeps it and the worker keeps the channel.
pub(crate) struct ChannelWaker {
    pub(crate) shared: Weak<Shared>,
    pub(crate) token: Token,
}

impl Wake for ChannelWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(shared) = self.shared.upgrade() {
            shared.wake(self.token);
        }
    }
}
