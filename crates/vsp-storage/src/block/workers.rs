//! Threads that perform jobs.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::io::Errno;

use super::event::Event;
use super::image::Image;
use super::job::Job;
use super::perform::{Performed, Scratch, perform};

/// A fixed number of threads. Dropping waits for the jobs that have started and gives up the others.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    image: Arc<Image>,
    queues: Mutex<Queues>,
    /// Signalled when there is a job, or an end.
    work: Condvar,
    /// Raised when there is a result.
    event: Arc<Event>,
    /// By thread: the present job is wanted back. Set and cleared under the lock of the queues.
    interrupts: Vec<AtomicBool>,
}

struct Queues {
    jobs: VecDeque<Job>,
    results: Vec<(Job, Performed)>,
    /// By thread: the token of the present job.
    running: Vec<Option<u64>>,
    stopping: bool,
}

impl Workers {
    /// Starts `count` threads that raise `event` for each result.
    pub(super) fn start(image: Arc<Image>, event: Arc<Event>, count: usize) -> Result<Self, Errno> {
        let shared = Arc::new(Shared {
            image,
            queues: Mutex::new(Queues {
                jobs: VecDeque::new(),
                results: Vec::new(),
                running: vec![None; count],
                stopping: false,
            }),
            work: Condvar::new(),
            event,
            interrupts: (0..count).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut workers = Self { shared: Arc::clone(&shared), threads: Vec::with_capacity(count) };
        for number in 0..count {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new()
                .name(format!("disk-io-{number}"))
                .spawn(move || shared.run(number))
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Takes all `jobs`.
    pub(super) fn push(&self, jobs: &mut Vec<Job>) {
        if jobs.is_empty() {
            return;
        }
        let more_than_one = jobs.len() > 1;
        self.shared.lock().jobs.extend(jobs.drain(..));
        if more_than_one {
            self.shared.work.notify_all();
        } else {
            self.shared.work.notify_one();
        }
    }

    /// Gives the jobs back that `wanted` names and that no thread has begun. Those that one is at end
    /// at their next system call, as [`Performed::Interrupted`], unless that was their last.
    pub(super) fn withdraw(&self, wanted: impl Fn(u64) -> bool, withdrawn: &mut Vec<Job>) {
        let mut queues = self.shared.lock();
        for job in std::mem::take(&mut queues.jobs) {
            if wanted(job.request.token) {
                withdrawn.push(job);
            } else {
                queues.jobs.push_back(job);
            }
        }
        for (token, interrupt) in queues.running.iter().zip(&self.shared.interrupts) {
            if token.is_some_and(&wanted) {
                interrupt.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Swaps the results with `results`, which is empty, so that both keep their memory.
    pub(super) fn take_results(&self, results: &mut Vec<(Job, Performed)>) {
        std::mem::swap(&mut self.shared.lock().results, results);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        {
            let mut queues = self.shared.lock();
            queues.stopping = true;
            queues.jobs.clear();
        }
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        // Nothing panics while it holds the lock; the queues are whole in any case.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, thread: usize) {
        let mut scratch = Scratch::new();
        let never = AtomicBool::new(false);
        let interrupt = self.interrupts.get(thread).unwrap_or(&never);
        while let Some(mut job) = self.next(thread, interrupt) {
            job.was_tried = true;
            let performed = perform(&self.image, &mut job, &mut scratch, interrupt);
            let mut queues = self.lock();
            if let Some(running) = queues.running.get_mut(thread) {
                *running = None;
            }
            job.is_cancelled = interrupt.load(Ordering::Relaxed);
            queues.results.push((job, performed));
            drop(queues);
            self.event.raise();
        }
    }

    fn next(&self, thread: usize, interrupt: &AtomicBool) -> Option<Job> {
        let mut queues = self.lock();
        loop {
            if queues.stopping {
                return None;
            }
            if let Some(job) = queues.jobs.pop_front() {
                if let Some(running) = queues.running.get_mut(thread) {
                    *running = Some(job.request.token);
                }
                interrupt.store(false, Ordering::Relaxed);
                return Some(job);
            }
            queues = self.work.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
