//! The worker as its owner sees it.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::task::Waker;
use std::thread::{self, JoinHandle};

use kmcl::Channel;

use crate::WorkerError;
use crate::roster::Token;
use crate::shared::{ChannelWaker, Shared};
use crate::task::{Source, Task};
use crate::turn;

/// A thread that drives channels and sources; see the [crate] for how.
///
/// Dropping it ends the thread after the callback that is running, and waits for that; the channels
/// go on existing, undriven. Dropped in a callback of its own thread, it does not wait.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Names a source that a worker drives.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct SourceId(Token);

impl Worker {
    /// Starts a worker whose thread bears `name` (Linux shows 15 bytes of it).
    ///
    /// # Errors
    /// [`WorkerError::System`] where the system gives no thread or no descriptor.
    pub fn spawn(name: &str) -> Result<Self, WorkerError> {
        let shared = Arc::new(Shared::new()?);
        let for_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            // A name with a zero byte in it is no name for a thread.
            .name(name.replace('\0', ""))
            .spawn(move || turn::drive(&for_thread))
            .map_err(WorkerError::system("thread"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Drives `channel` from now on: all its callbacks run on this worker's thread. Works in every
    /// state of the channel; the usual place is before it is enabled. Sets the channel's waker.
    ///
    /// A channel has one driver: nobody else may call [`Channel::process`] or
    /// [`Channel::set_waker`] meanwhile.
    ///
    /// # Errors
    /// [`WorkerError::AlreadyDriven`], [`WorkerError::Full`], [`WorkerError::Stopped`] after the
    /// system ended the worker, [`WorkerError::System`] where the doorbell cannot be watched. The
    /// channel is then as undriven as before.
    pub fn add(&self, channel: &Channel) -> Result<(), WorkerError> {
        let token = self.shared.new_token();
        self.shared.add(token, Arc::new(Task::Channel(channel.clone())))?;
        // The first run may already have begun without the waker. What it missed is found by the
        // one that is queued here.
        let waker = Arc::new(ChannelWaker { shared: Arc::downgrade(&self.shared), token });
        let waker = Waker::from(waker);
        channel.set_waker(waker.clone());
        waker.wake();
        Ok(())
    }

    /// Stops driving `channel`; `false` if this worker does not drive it (any more). When this
    /// returns, no callback of the channel runs on the worker; called in a callback of that very
    /// channel, it takes effect when that returns.
    pub fn remove(&self, channel: &Channel) -> bool {
        let token = self.shared.lock().roster.find(|task| task.is_channel(channel));
        token.is_some_and(|token| self.remove_task(token))
    }

    /// Whether this worker drives `channel`: it was added, not removed, and has not panicked.
    #[must_use]
    pub fn drives(&self, channel: &Channel) -> bool {
        self.shared.lock().roster.find(|task| task.is_channel(channel)).is_some()
    }

    /// Calls `source` once soon, and from then on whenever `descriptor` is readable.
    ///
    /// # Errors
    /// As for [`Worker::add`].
    pub fn add_source<D>(
        &self,
        descriptor: D,
        source: Arc<dyn Source>,
    ) -> Result<SourceId, WorkerError>
    where
        D: AsFd + Send + Sync + 'static,
    {
        let token = self.shared.new_token();
        let descriptor = Box::new(descriptor);
        self.shared.add(token, Arc::new(Task::Source { descriptor, source }))?;
        Ok(SourceId(token))
    }

    /// Stops calling a source, as [`Worker::remove`] does for a channel.
    pub fn remove_source(&self, source: SourceId) -> bool {
        self.remove_task(source.0)
    }

    /// Turns so far. Stays as it is while nothing is to be done.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.shared.turns.load(Ordering::Relaxed)
    }

    fn remove_task(&self, token: Token) -> bool {
        let mut state = self.shared.lock();
        let Some(task) = self.shared.remove(&mut state, token) else { return false };
        if !self.is_own_thread() {
            while state.roster.is_running(token) {
                state = self.shared.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        drop(state);
        task.let_go();
        true
    }

    fn is_own_thread(&self) -> bool {
        self.thread.as_ref().is_some_and(|own| own.thread().id() == thread::current().id())
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("turns", &self.turns()).finish_non_exhaustive()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let is_own_thread = self.is_own_thread();
        {
            let mut state = self.shared.lock();
            state.is_stopping = true;
            self.shared.end_sleep(&mut state);
        }
        if let Some(own) = self.thread.take()
            && !is_own_thread
            && own.join().is_err()
        {
            tracing::error!("a worker's thread ended in a panic");
        }
    }
}
