//! A file back end on io_uring.
//!
//! One ring per file, shared by all threads that submit: the submission queue is filled under a
//! lock, `io_uring_enter` is called once per batch and outside it. The kernel raises an eventfd for
//! every completion.
#![allow(unsafe_code, reason = "hands guest memory to the kernel")]

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use io_uring::squeue::Entry;
use io_uring::{IoUring, Probe, opcode, types};
use rustix::io::Errno;

use super::event::Event;
use super::file::{QUEUE_DEPTH, QUEUE_MAX};
use super::image::Image;
use super::job::{Job, Waiting, Way, plan};
use super::order::{Order, Ticket};
use super::perform::{Performed, allocate_mode, nothing_moved, read_all, write_flags};
use super::threads::{Settled, again, settle};
use super::workers::Workers;
use super::{Backend, IoDone, IoError, IoOperation, IoOutcome, IoRequest};

/// User data of requests to cancel, whose own completions say nothing: what became of a job is said
/// by the job's. No slot has this number.
const CANCEL: u64 = u64::MAX;

/// Kernel threads the ring may use for requests that block.
const MAX_KERNEL_WORKERS: u32 = 16;

/// See [`Engine::IoUring`](super::Engine::IoUring).
pub(super) struct UringBackend {
    // Dropped in this order, after `drop` below has emptied the ring: nothing refers to the state
    // or the files any more.
    ring: IoUring,
    state: Mutex<State>,
    /// One thread for what the kernel cannot do by itself, from the first such request on.
    by_hand: OnceLock<Option<Workers>>,
    event: Arc<Event>,
    image: Arc<Image>,
    /// The kernel can cancel. An older one lets everything finish.
    can_cancel: bool,
}

struct State {
    order: Order<Waiting>,
    /// Jobs in the submission queue or with the kernel; the index is their user data. A job stays
    /// in its slot, untouched, until its completion has been taken from the ring.
    slots: Vec<Option<Job>>,
    free: Vec<u32>,
    /// Slots whose jobs the kernel is to be asked back for.
    to_cancel: Vec<u32>,
    /// Jobs that may start but have no slot.
    backlog: VecDeque<Job>,
    /// Requests that are submitted and not reaped.
    in_flight: usize,
    // Kept for their memory; empty between calls.
    ready: Vec<(Waiting, Ticket)>,
    by_hand: Vec<Job>,
    withdrawn: Vec<Waiting>,
    results: Vec<(Job, Performed)>,
}

impl UringBackend {
    /// Sets up a ring for `image`.
    ///
    /// # Errors
    /// What the system says where io_uring is switched off, filtered or too old.
    pub(super) fn new(image: Arc<Image>) -> Result<Self, Errno> {
        let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let ring = IoUring::builder()
            .dontfork()
            .setup_cqsize(QUEUE_DEPTH * 2)
            .build(QUEUE_DEPTH)
            .map_err(errno)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(errno)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        // Without NODROP, completions could be lost, and memory would stay with the kernel for ever.
        if !needed.iter().all(|&code| probe.is_supported(code))
            || !ring.params().is_feature_nodrop()
        {
            return Err(Errno::NOSYS);
        }
        let can_cancel = probe.is_supported(opcode::AsyncCancel::CODE);
        let event = Arc::new(Event::new()?);
        ring.submitter().register_eventfd(event.as_fd().as_raw_fd()).map_err(errno)?;
        // An old kernel has no such limit; it then bounds its workers by itself.
        let _ = ring.submitter().register_iowq_max_workers(&mut [MAX_KERNEL_WORKERS, 0]);
        let state = State {
            order: Order::new(),
            slots: (0..QUEUE_DEPTH).map(|_| None).collect(),
            free: (0..QUEUE_DEPTH).rev().collect(),
            to_cancel: Vec::new(),
            backlog: VecDeque::new(),
            in_flight: 0,
            ready: Vec::new(),
            by_hand: Vec::new(),
            withdrawn: Vec::new(),
            results: Vec::new(),
        };
        let state = Mutex::new(state);
        Ok(Self { ring, state, by_hand: OnceLock::new(), event, image, can_cancel })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; slots and ring agree in any case.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves what may start into the submission queue, or to the thread. Returns whether the
    /// submission queue has entries the kernel has not seen.
    fn start(&self, state: &mut State, done: &mut Vec<IoDone>) -> bool {
        for admitted in state.ready.drain(..) {
            let job = Job::new(admitted);
            if job.way == Way::ByHand {
                state.by_hand.push(job);
            } else {
                state.backlog.push_back(job);
            }
        }
        if !state.by_hand.is_empty() {
            self.start_by_hand(state, done);
        }
        // SAFETY: no other `SubmissionQueue` exists: this function is the only one that makes one,
        // except `drop`, and `state` is borrowed from behind the lock.
        let mut queue = unsafe { self.ring.submission_shared() };
        while let Some(&index) = state.to_cancel.last() {
            // A slot may have been given back meanwhile, and even be in use again.
            let slot = state.slots.get(index as usize).and_then(Option::as_ref);
            if slot.is_some_and(|job| job.is_cancelled) {
                let entry = opcode::AsyncCancel::new(u64::from(index)).build().user_data(CANCEL);
                // SAFETY: "parameters of the entry must be valid for the entire duration of the
                // operation". It has none but a number: it names no memory and no file.
                if unsafe { queue.push(&entry) }.is_err() {
                    // The queue is full. It is given to the kernel next, and this function is
                    // called again.
                    return true;
                }
            }
            state.to_cancel.pop();
        }
        while let Some(&index) = state.free.last() {
            let Some(slot) = state.slots.get_mut(index as usize) else { break };
            let Some(job) = state.backlog.pop_front() else { break };
            let job = slot.insert(Job { was_tried: true, ..job });
            let entry = entry(&self.image, job).user_data(u64::from(index));
            // SAFETY: "parameters of the entry must be valid for the entire duration of the
            // operation". They are the image's files, and an I/O vector or the memory it names.
            // - The job is in its slot now. `take` removes it when the entry's completion has been
            //   taken from the ring, and `drop` waits for all completions or leaks the slots.
            //   Until then nobody changes or drops its `Buffers`.
            // - `Buffers` holds the `GuestMemory` that its vectors point into, which stays mapped
            //   and never moves while it is held. The vectors are on the heap and do not move with
            //   the job.
            // - The kernel holds the file of an operation that it has accepted; before, the image
            //   holds it, and `image` is dropped after `ring`.
            // Guest memory is shared with parties outside this program, of which the kernel is one;
            // Rust code has no slices of it.
            if unsafe { queue.push(&entry) }.is_err() {
                // Full of entries that cancel. The job waits for the next time.
                if let Some(job) = slot.take() {
                    state.backlog.push_front(job);
                }
                break;
            }
            state.free.pop();
        }
        !queue.is_empty()
    }

    fn start_by_hand(&self, state: &mut State, done: &mut Vec<IoDone>) {
        let workers = self.by_hand.get_or_init(|| {
            Workers::start(Arc::clone(&self.image), Arc::clone(&self.event), 1)
                .inspect_err(|errno| tracing::error!(%errno, "no thread for slow disk requests"))
                .ok()
        });
        if let Some(workers) = workers {
            return workers.push(&mut state.by_hand);
        }
        while let Some(job) = state.by_hand.pop() {
            leave(state, job, IoOutcome::Done(Err(IoError::Busy)), done);
        }
    }

    /// Gives the submission queue to the kernel.
    fn enter(&self) {
        loop {
            let error = match self.ring.submit() {
                Ok(_) => return,
                Err(error) => error,
            };
            if Errno::from_io_error(&error) != Some(Errno::INTR) {
                // Too many completions unread, or no memory just now. `reap` tries again, after
                // it has read what there is.
                tracing::debug!(%error, "io_uring_enter");
                return self.event.raise();
            }
        }
    }

    /// Takes completions and results, and starts what may follow, until there is nothing to start.
    fn collect(&self, done: &mut Vec<IoDone>) {
        loop {
            let mut state = self.lock();
            let state = &mut *state;
            self.take_completions(state, done);
            if let Some(Some(workers)) = self.by_hand.get() {
                workers.take_results(&mut state.results);
                while let Some((job, performed)) = state.results.pop() {
                    self.settle(state, job, performed, done);
                }
            }
            if !self.start(state, done) {
                return;
            }
            self.enter();
        }
    }

    fn take_completions(&self, state: &mut State, done: &mut Vec<IoDone>) {
        // SAFETY: no other `CompletionQueue` exists: this function is the only one that makes one,
        // and `state` is borrowed from behind the lock.
        let queue = unsafe { self.ring.completion_shared() };
        for completion in queue {
            let Some(job) = take(state, completion.user_data()) else { continue };
            let result = match u32::try_from(completion.result()) {
                Ok(moved) => Ok(moved),
                Err(_) => Err(Errno::from_raw_os_error(-completion.result())),
            };
            self.completed(state, job, result, done);
        }
    }

    /// The kernel has finished with `job`.
    fn completed(
        &self,
        state: &mut State,
        mut job: Job,
        result: Result<u32, Errno>,
        done: &mut Vec<IoDone>,
    ) {
        let request = &mut job.request;
        let performed = match (job.way, result) {
            // The kernel has let go of it and moved nothing. It does so by itself for requests of a
            // thread that ends.
            (_, Err(Errno::INTR | Errno::AGAIN | Errno::CANCELED)) => {
                return self.go_on(state, job, done);
            }
            (Way::Sync, result) => Performed::Finished(self.image.judge_flush(result.map(drop))),
            (_, Err(errno)) => Performed::Refused(errno),
            (Way::Allocate | Way::ByHand, Ok(_)) => Performed::Finished(Ok(())),
            (Way::Direct | Way::Buffered, Ok(0)) => {
                let at = request.offset + job.progress;
                Performed::Finished(Err(nothing_moved(request.operation, at)))
            }
            (Way::Direct | Way::Buffered, Ok(moved)) => {
                job.progress += u64::from(moved);
                if job.progress < request.bytes {
                    request.buffers.advance(u64::from(moved));
                    return self.go_on(state, job, done);
                }
                Performed::Finished(Ok(()))
            }
        };
        self.settle(state, job, performed, done);
    }

    /// The kernel does not have `job` any more, and some of it is left to do.
    fn go_on(&self, state: &mut State, job: Job, done: &mut Vec<IoDone>) {
        if job.is_cancelled {
            let outcome = job.withdrawn();
            leave(state, job, outcome, done);
        } else {
            state.backlog.push_front(job);
        }
    }

    /// See [`Backend::cancel`]. Returns whether the kernel has to be entered.
    fn withdraw(
        &self,
        state: &mut State,
        wanted: &dyn Fn(u64) -> bool,
        done: &mut Vec<IoDone>,
    ) -> bool {
        let waits = |waiting: &Waiting| wanted(waiting.request.token);
        state.order.withdraw(waits, &mut state.withdrawn, &mut state.ready);
        state.in_flight -= state.withdrawn.len();
        done.extend(state.withdrawn.drain(..).map(Waiting::withdrawn));
        if let Some(Some(workers)) = self.by_hand.get() {
            workers.withdraw(wanted, &mut state.by_hand);
        }
        let mut withdrawn = std::mem::take(&mut state.by_hand);
        for job in std::mem::take(&mut state.backlog) {
            if wanted(job.request.token) {
                withdrawn.push(job);
            } else {
                state.backlog.push_back(job);
            }
        }
        for job in withdrawn.drain(..) {
            let outcome = job.withdrawn();
            leave(state, job, outcome, done);
        }
        state.by_hand = withdrawn;
        if self.can_cancel {
            for (index, slot) in (0..).zip(&mut state.slots) {
                let job = slot.as_mut().filter(|job| !job.is_cancelled);
                if let Some(job) = job.filter(|job| wanted(job.request.token)) {
                    job.is_cancelled = true;
                    state.to_cancel.push(index);
                }
            }
        }
        self.start(state, done)
    }

    fn settle(&self, state: &mut State, job: Job, performed: Performed, done: &mut Vec<IoDone>) {
        match settle(&self.image, job, performed) {
            Settled::Out(job, outcome) => leave(state, job, outcome, done),
            Settled::Again(job, way) => {
                again(&self.image, &mut state.order, job, way, &mut state.ready);
            }
        }
    }
}

/// Takes the job out of a slot whose completion has been taken from the ring.
fn take(state: &mut State, user_data: u64) -> Option<Job> {
    let index = u32::try_from(user_data).ok()?;
    let job = state.slots.get_mut(index as usize)?.take()?;
    state.free.push(index);
    Some(job)
}

/// Gives a job back that neither the kernel nor a thread has.
fn leave(state: &mut State, job: Job, outcome: IoOutcome, done: &mut Vec<IoDone>) {
    state.in_flight -= 1;
    state.order.finish(job.ticket, &mut state.ready);
    done.push(job.come_out(outcome));
}

/// The submission queue entry that does what is left of `job`.
fn entry(image: &Image, job: &mut Job) -> Entry {
    let request = &mut job.request;
    let at = request.offset + job.progress;
    let file = match (job.way, image.direct_file()) {
        (Way::Direct, Some(file)) => file,
        _ => image.file(),
    };
    let fd = types::Fd(file.as_raw_fd());
    match (request.operation, job.way) {
        (_, Way::Sync) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        (operation, Way::Allocate) => opcode::Fallocate::new(fd, request.bytes)
            .offset(at)
            .mode(allocate_mode(operation).bits().cast_signed())
            .build(),
        (IoOperation::Write { fua }, _) => {
            let flags = write_flags(fua).bits().cast_signed();
            match request.buffers.vectors() {
                [one] => opcode::Write::new(
                    fd,
                    std::ptr::with_exposed_provenance(one.base),
                    len(one.len),
                )
                .offset(at)
                .rw_flags(flags)
                .build(),
                all => opcode::Writev::new(fd, all.as_ptr().cast(), len(all.len()))
                    .offset(at)
                    .rw_flags(flags)
                    .build(),
            }
        }
        _ => match request.buffers.vectors() {
            [one] => {
                opcode::Read::new(fd, std::ptr::with_exposed_provenance_mut(one.base), len(one.len))
                    .offset(at)
                    .build()
            }
            all => opcode::Readv::new(fd, all.as_ptr().cast(), len(all.len())).offset(at).build(),
        },
    }
}

/// Lengths of vectors and numbers of them are made from `u32`s.
fn len(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Backend for UringBackend {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    fn submit(&self, requests: &mut Vec<IoRequest>, done: &mut Vec<IoDone>) {
        let started = {
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
            self.start(state, done)
        };
        if started {
            self.enter();
            // What the page cache had is finished already.
            self.collect(done);
        }
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn reap(&self, done: &mut Vec<IoDone>) {
        // Before the queues are read: what comes later raises it again.
        self.event.clear();
        self.collect(done);
    }

    fn cancel(&self, wanted: &dyn Fn(u64) -> bool, done: &mut Vec<IoDone>) {
        // A request to cancel is carried out while it is submitted: whoever could be stopped has
        // its completion in the ring when `enter` returns. The others, of which the kernel says
        // that they are too far along, complete by themselves.
        let started = self.withdraw(&mut self.lock(), wanted, done);
        if started {
            self.enter();
            self.collect(done);
        }
    }

    fn read_now(&self, offset: u64, into: &mut [u8]) -> Option<Result<(), IoError>> {
        Some(read_all(&self.image, into, offset))
    }
}

impl Drop for UringBackend {
    /// Waits for everything the kernel still does with guest memory and the file.
    fn drop(&mut self) {
        // Jobs of the thread that have started finish, the others are given up.
        drop(self.by_hand.take());
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.backlog.clear();
        while state.slots.iter().any(Option::is_some) {
            let waited = self.ring.submit_and_wait(1);
            for completion in self.ring.completion() {
                drop(take(state, completion.user_data()));
            }
            let Err(error) = waited else { continue };
            if !matches!(
                Errno::from_io_error(&error),
                Some(Errno::INTR | Errno::AGAIN | Errno::BUSY)
            ) {
                // Nothing is known about the operations any more. Their memory must outlive them:
                // better lost than written to by the kernel after it was given to somebody else.
                tracing::error!(%error, "io_uring_enter failed; the memory of disk requests is lost");
                std::mem::forget(std::mem::take(&mut state.slots));
            }
        }
    }
}
