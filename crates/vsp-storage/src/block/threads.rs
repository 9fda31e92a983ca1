//! A file back end on a pool of threads, for systems that refuse io_uring.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::event::Event;
use super::file::QUEUE_MAX;
use super::image::Image;
use super::job::{Job, Waiting, Way, failure, other_way, plan, sharing};
use super::order::{Order, Ticket};
use super::perform::{Performed, read_all};
use super::workers::Workers;
use super::{Backend, IoDone, IoError, IoOperation, IoOutcome, IoRequest};

/// See [`Engine::Threads`](super::Engine::Threads).
pub(super) struct ThreadBackend {
    state: Mutex<State>,
    workers: Workers,
    event: Arc<Event>,
    image: Arc<Image>,
}

struct State {
    order: Order<Waiting>,
    /// Requests that are submitted and not reaped.
    in_flight: usize,
    // Kept for their memory; empty between calls.
    ready: Vec<(Waiting, Ticket)>,
    jobs: Vec<Job>,
    withdrawn: Vec<Waiting>,
    results: Vec<(Job, Performed)>,
}

impl ThreadBackend {
    pub(super) fn new(image: Arc<Image>, threads: usize) -> Result<Self, Errno> {
        let event = Arc::new(Event::new()?);
        let workers = Workers::start(Arc::clone(&image), Arc::clone(&event), threads)?;
        let state = State {
            order: Order::new(),
            in_flight: 0,
            ready: Vec::new(),
            jobs: Vec::new(),
            withdrawn: Vec::new(),
            results: Vec::new(),
        };
        Ok(Self { state: Mutex::new(state), workers, event, image })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_ready(&self, state: &mut State) {
        state.jobs.extend(state.ready.drain(..).map(Job::new));
        self.workers.push(&mut state.jobs);
    }
}

impl Backend for ThreadBackend {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    fn submit(&self, requests: &mut Vec<IoRequest>, done: &mut Vec<IoDone>) {
        let mut state = self.lock();
        let state = &mut *state;
        for request in requests.drain(..) {
            let planned = if state.in_flight == QUEUE_MAX {
                Err(IoError::Busy)
            } else {
                plan(&self.image, &request)
            };
            match planned {
                Ok(Some((way, class))) => {
                    state.in_flight += 1;
                    state.order.admit(Waiting::new(request, way), class, &mut state.ready);
                }
                Ok(None) => done.push(IoDone::finished(request, Ok(()))),
                Err(error) => done.push(IoDone::finished(request, Err(error))),
            }
        }
        self.start_ready(state);
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn reap(&self, done: &mut Vec<IoDone>) {
        // Before the results are taken: one that comes later raises it again.
        self.event.clear();
        let mut state = self.lock();
        let state = &mut *state;
        self.workers.take_results(&mut state.results);
        for (job, performed) in state.results.drain(..) {
            match settle(&self.image, job, performed) {
                Settled::Out(job, outcome) => {
                    state.in_flight -= 1;
                    state.order.finish(job.ticket, &mut state.ready);
                    done.push(job.come_out(outcome));
                }
                Settled::Again(job, way) => {
                    again(&self.image, &mut state.order, job, way, &mut state.ready);
                }
            }
        }
        self.start_ready(state);
    }

    fn cancel(&self, wanted: &dyn Fn(u64) -> bool, done: &mut Vec<IoDone>) {
        let mut state = self.lock();
        let state = &mut *state;
        let waits = |waiting: &Waiting| wanted(waiting.request.token);
        state.order.withdraw(waits, &mut state.withdrawn, &mut state.ready);
        state.in_flight -= state.withdrawn.len();
        done.extend(state.withdrawn.drain(..).map(Waiting::withdrawn));
        self.workers.withdraw(wanted, &mut state.jobs);
        for job in state.jobs.drain(..) {
            state.in_flight -= 1;
            state.order.finish(job.ticket, &mut state.ready);
            let outcome = job.withdrawn();
            done.push(job.come_out(outcome));
        }
        self.start_ready(state);
    }

    fn read_now(&self, offset: u64, into: &mut [u8]) -> Option<Result<(), IoError>> {
        Some(read_all(&self.image, into, offset))
    }
}

/// What follows from how a job ended.
pub(super) enum Settled {
    /// It comes out.
    Out(Job, IoOutcome),
    /// It is tried another way.
    Again(Job, Way),
}

/// Decides whether a job comes out or is tried another way.
pub(super) fn settle(image: &Image, job: Job, performed: Performed) -> Settled {
    let operation = job.request.operation;
    let outcome = match performed {
        Performed::Finished(result) => IoOutcome::Done(result),
        Performed::Interrupted => job.withdrawn(),
        Performed::Refused(errno) => match other_way(image, operation, job.way, errno) {
            Some(_) if job.is_cancelled => job.withdrawn(),
            Some(way) => return Settled::Again(job, way),
            None => {
                let at = job.request.offset + job.progress;
                IoOutcome::Done(Err(failure(operation, at, errno)))
            }
        },
    };
    Settled::Out(job, outcome)
}

/// Lets a job start over, the other `way`.
pub(super) fn again(
    image: &Image,
    order: &mut Order<Waiting>,
    job: Job,
    way: Way,
    ready: &mut Vec<(Waiting, Ticket)>,
) {
    let Job { mut request, ticket, .. } = job;
    request.buffers.rewind();
    let is_read = request.operation == IoOperation::Read;
    let waiting = Waiting { request, way, was_tried: true };
    if is_read {
        return ready.push((waiting, ticket));
    }
    order.readmit(waiting, ticket, sharing(image, way), ready);
}
