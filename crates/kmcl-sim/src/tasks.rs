//! Channels that somebody drives, and who of them has something to do.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

use kmcl::{Channel, Level};
use vsp_storage::{Completions, Driver};

use crate::rng::Rng;

/// Rung by a channel's waker.
#[derive(Default)]
struct Bell(AtomicBool);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A channel that is driven. It is processed when it was woken, and never for another reason: a
/// wake-up that is lost shows.
struct Task {
    id: u32,
    channel: Channel,
    bell: Arc<Bell>,
    /// Since when there is something to do, and when the seed lets it be done.
    due: Option<u64>,
    needs_passive: bool,
}

/// The driver of one machine's channels and completions.
pub(crate) struct Tasks(Mutex<Inner>);

struct Inner {
    rng: Rng,
    now: u64,
    next_id: u32,
    tasks: Vec<Task>,
    completions: Vec<Arc<Completions>>,
}

impl Tasks {
    pub(crate) fn new(rng: Rng) -> Arc<Self> {
        let (tasks, completions) = (Vec::new(), Vec::new());
        Arc::new(Self(Mutex::new(Inner { rng, now: 0, next_id: 0, tasks, completions })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on drives `channel`.
    pub(crate) fn add(&self, channel: &Channel) {
        let bell = Arc::new(Bell::default());
        {
            let mut inner = self.lock();
            inner.next_id += 1;
            let (id, bell, channel) = (inner.next_id, Arc::clone(&bell), channel.clone());
            channel.set_pointer(id as usize); // its word belongs to its driver: nobody else uses it
            inner.tasks.push(Task { id, channel, bell, due: None, needs_passive: false });
        }
        channel.set_waker(Waker::from(bell));
    }

    /// Stops driving `channel`.
    pub(crate) fn remove(&self, channel: &Channel) {
        channel.clear_waker();
        let mut inner = self.lock();
        let gone: Vec<Task> = {
            let all = std::mem::take(&mut inner.tasks);
            let (gone, rest) =
                all.into_iter().partition(|task| task.id as usize == channel.get_pointer());
            inner.tasks = rest;
            gone
        };
        drop(inner);
        drop(gone); // foreign code, not under the lock
    }

    /// Who has something to do, and when.
    pub(crate) fn ready(&self, now: u64, mut found: impl FnMut(u64, u32)) {
        let inner = &mut *self.lock();
        inner.now = now;
        for task in &mut inner.tasks {
            if task.bell.0.load(Ordering::Relaxed) && task.due.is_none() {
                task.due = Some(now + inner.rng.delay());
            }
            if let Some(due) = task.due {
                found(due, task.id);
            }
        }
    }

    /// Lets a channel do what it has to do, or some of it. Returns the packets it has taken.
    pub(crate) fn run(&self, id: u32) -> u32 {
        let mut inner = self.lock();
        let mut rng = inner.rng.fork();
        let now = inner.now;
        let Some(task) = inner.tasks.iter_mut().find(|task| task.id == id) else { return 0 };
        task.bell.0.store(false, Ordering::Relaxed);
        task.due = None;
        let passive = std::mem::take(&mut task.needs_passive) || !rng.once_in(4);
        let channel = task.channel.clone();
        drop(inner);
        let budget = if rng.once_in(3) { 1 } else { 64 };
        let level = if passive { Level::Passive } else { Level::Dispatch };
        let progress = channel.process_at(level, budget);
        if progress.more || progress.needs_passive {
            let mut inner = self.lock();
            if let Some(task) = inner.tasks.iter_mut().find(|task| task.id == id) {
                task.due = Some(now + rng.delay());
                task.needs_passive = progress.needs_passive;
            }
        }
        progress.packets
    }

    /// Lets every channel do what it has to do.
    pub(crate) fn run_all(&self) {
        let channels: Vec<Channel> =
            self.lock().tasks.iter().map(|task| task.channel.clone()).collect();
        for channel in channels {
            channel.process(u32::MAX);
        }
    }

    /// The completions of the disks.
    pub(crate) fn completions(&self) -> Vec<Arc<Completions>> {
        self.lock().completions.clone()
    }
}

impl Driver for Tasks {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.add(channel);
        Ok(())
    }

    fn remove_channel(&self, channel: &Channel) {
        self.remove(channel);
    }

    fn add_completions(&self, one: Arc<Completions>) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.lock().completions.push(one);
        Ok(())
    }

    fn remove_completions(&self, one: &Arc<Completions>) {
        self.lock().completions.retain(|other| !Arc::ptr_eq(other, one));
    }
}
