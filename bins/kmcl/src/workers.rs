//! The server's threads: each drives channels and the completions of disks.

use std::collections::HashMap;
use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kmcl::Channel;
use kmcl_worker::{Source, SourceId, Worker, WorkerError};
use vsp_storage::{Completions, Driver};

/// Threads that share channels and completions among themselves, in turn.
pub(crate) struct Workers {
    workers: Vec<Worker>,
    next: AtomicUsize,
    /// Where completions are waited for, by their address.
    sources: Mutex<HashMap<usize, (usize, SourceId)>>,
}

impl Workers {
    /// Starts `count` threads, at least one.
    ///
    /// # Errors
    /// [`WorkerError::System`] where the system has no thread left.
    pub(crate) fn start(count: u16) -> Result<Arc<Self>, WorkerError> {
        let workers = (0..count.max(1)).map(|index| Worker::spawn(&format!("kmcl-worker-{index}")));
        Ok(Arc::new(Self {
            workers: workers.collect::<Result<_, _>>()?,
            next: AtomicUsize::new(0),
            sources: Mutex::default(),
        }))
    }

    /// The worker whose turn it is, and its index.
    fn next(&self) -> Option<(usize, &Worker)> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let index = turn.checked_rem(self.workers.len())?;
        Some((index, self.workers.get(index)?))
    }
}

/// The number of threads where nobody asked for one: the other half of the processors is for guests.
pub(crate) fn default_count() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(processors / 2).unwrap_or(1).clamp(1, 8)
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
        match self.next() {
            Some((_, worker)) => Ok(worker.add(channel)?),
            None => Err("there is no worker".into()),
        }
    }

    fn remove_channel(&self, channel: &Channel) {
        for worker in &self.workers {
            if worker.remove(channel) {
                return;
            }
        }
    }

    fn add_completions(
        &self,
        completions: Arc<Completions>,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Some((index, worker)) = self.next() else { return Err("there is no worker".into()) };
        let reaper = Arc::new(Reaper(Arc::clone(&completions)));
        let source = worker.add_source(Arc::clone(&completions), reaper)?;
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.insert(key(&completions), (index, source));
        Ok(())
    }

    fn remove_completions(&self, completions: &Arc<Completions>) {
        let removed = {
            let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
            sources.remove(&key(completions))
        };
        if let Some((index, source)) = removed
            && let Some(worker) = self.workers.get(index)
        {
            worker.remove_source(source);
        }
    }
}
