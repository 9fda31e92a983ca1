//! The threads that drive devices: channels, disks' completions, timers, sockets.

use std::collections::HashMap;
use std::error::Error;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kmcl::Channel;
use kmcl_worker::{Source, SourceId, Worker, WorkerError};
use vsp_storage::{Completions, Driver};

/// Threads that share channels and sources among themselves, in turn.
pub struct Workers {
    workers: Vec<Worker>,
    next: AtomicUsize,
    /// Where the completions of disks are waited for, by their address.
    completions: Mutex<HashMap<usize, WorkersSource>>,
}

/// Something that one of the threads waits for: see [`Workers::add_source`].
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct WorkersSource {
    worker: usize,
    source: SourceId,
}

impl Workers {
    /// Starts `count` threads, at least one.
    ///
    /// # Errors
    /// [`WorkerError::System`] where the system has no thread left.
    pub fn start(count: u16) -> Result<Arc<Self>, WorkerError> {
        let workers = (0..count.max(1)).map(|index| Worker::spawn(&format!("kmcl-worker-{index}")));
        Ok(Arc::new(Self {
            workers: workers.collect::<Result<_, _>>()?,
            next: AtomicUsize::new(0),
            completions: Mutex::default(),
        }))
    }

    /// The number of threads where nobody asked for one: the other half of the processors is for guests.
    #[must_use]
    pub fn default_count() -> u16 {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        u16::try_from(processors / 2).unwrap_or(1).clamp(1, 8)
    }

    /// Has one of the threads call `source` whenever `descriptor` is readable.
    ///
    /// # Errors
    /// As for [`Worker::add_source`].
    pub fn add_source(
        &self,
        descriptor: impl AsFd + Send + Sync + 'static,
        source: Arc<dyn Source>,
    ) -> Result<WorkersSource, Box<dyn Error + Send + Sync>> {
        let Some((worker, thread)) = self.next() else { return Err("there is no worker".into()) };
        Ok(WorkersSource { worker, source: thread.add_source(descriptor, source)? })
    }

    /// Ends that. Returns when the source is not being called any more, unless it is called by itself.
    pub fn remove_source(&self, source: WorkersSource) {
        if let Some(worker) = self.workers.get(source.worker) {
            worker.remove_source(source.source);
        }
    }

    /// Drives a channel.
    ///
    /// # Errors
    /// As for [`Worker::add`].
    pub fn add(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        match self.next() {
            Some((_, worker)) => Ok(worker.add(channel)?),
            None => Err("there is no worker".into()),
        }
    }

    /// Ends that, as [`Worker::remove`] does.
    pub fn remove(&self, channel: &Channel) {
        let _driven = self.workers.iter().any(|worker| worker.remove(channel));
    }

    /// The worker whose turn it is, and its index.
    fn next(&self) -> Option<(usize, &Worker)> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let index = turn.checked_rem(self.workers.len())?;
        Some((index, self.workers.get(index)?))
    }
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("threads", &self.workers.len()).finish_non_exhaustive()
    }
}

/// Answers a guest when its disk has finished something.
struct Reaper(Arc<Completions>);

impl Source for Reaper {
    fn ready(&self) -> bool {
        self.0.ready()
    }
}

fn key(completions: &Arc<Completions>) -> usize {
    Arc::as_ptr(completions).addr()
}

impl Driver for Workers {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.add(channel)
    }

    fn remove_channel(&self, channel: &Channel) {
        self.remove(channel);
    }

    fn add_completions(
        &self,
        completions: Arc<Completions>,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let reaper = Arc::new(Reaper(Arc::clone(&completions)));
        let key = key(&completions);
        let source = self.add_source(completions, reaper)?;
        self.completions.lock().unwrap_or_else(PoisonError::into_inner).insert(key, source);
        Ok(())
    }

    fn remove_completions(&self, completions: &Arc<Completions>) {
        let removed = {
            let mut all = self.completions.lock().unwrap_or_else(PoisonError::into_inner);
            all.remove(&key(completions))
        };
        if let Some(source) = removed {
            self.remove_source(source);
        }
    }
}

impl vsp_integration::Driver for Workers {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.add(channel)
    }

    fn remove_channel(&self, channel: &Channel) {
        self.remove(channel);
    }
}

impl vsp_socket::Driver for Workers {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.add(channel)
    }

    fn remove_channel(&self, channel: &Channel) {
        self.remove(channel);
    }
}
