//! The threads on which calls are made: one for questions, one for changes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::api::{ControlError, Controlled, ErrorKind};
use super::call::Call;
use super::http::Answer;

/// Calls that may wait for either thread, whoever asked and perhaps went away since.
pub(super) const MAX_WAITING: usize = 64;

/// An eventfd that wakes the thread of the sockets.
#[derive(Debug)]
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> Result<Self, Errno> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Self)
    }

    pub(super) fn ring(&self) {
        // It can only be full, and then it is heard.
        let _rung = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(super) fn quiet(&self) {
        let _was_quiet = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What the two threads and the sockets' thread share.
struct Shared {
    vm: Arc<dyn Controlled>,
    ending: AtomicBool,
    bell: Arc<Bell>,
}

/// A call, and the connection that waits for its answer.
struct Job {
    connection: u64,
    call: Call,
}

/// The two threads.
pub(super) struct Callers {
    questions: SyncSender<Job>,
    changes: SyncSender<Job>,
    answers: Receiver<(u64, Answer)>,
    /// Calls whose answer has not been taken.
    pending: usize,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Callers {
    /// Makes the threads. `bell` rings when there is an answer.
    pub(super) fn spawn(vm: Arc<dyn Controlled>, bell: Arc<Bell>) -> io::Result<Self> {
        let shared = Arc::new(Shared { vm, ending: AtomicBool::new(false), bell });
        // As many at once as there are jobs, which are bounded.
        let (sender, answers) = channel();
        let mut threads = Vec::new();
        let mut spawn = |name: &str| {
            let (jobs, waiting) = sync_channel(MAX_WAITING);
            let (shared, sender) = (Arc::clone(&shared), sender.clone());
            let thread = Builder::new().name(name.into());
            threads.push(thread.spawn(move || make_calls(&waiting, &sender, &shared))?);
            Ok::<_, io::Error>(jobs)
        };
        let (questions, changes) = (spawn("ctl-questions")?, spawn("ctl-changes")?);
        Ok(Self { questions, changes, answers, pending: 0, threads, shared })
    }

    /// Has a call made for a connection.
    ///
    /// # Errors
    /// The answer to give instead, where too many wait.
    pub(super) fn call(&mut self, connection: u64, call: Call) -> Result<(), Answer> {
        let to = if call.is_question() { &self.questions } else { &self.changes };
        to.try_send(Job { connection, call }).map_err(|_| busy("too many requests wait"))?;
        self.pending += 1;
        Ok(())
    }

    /// The next answer that is there.
    pub(super) fn answer(&mut self) -> Option<(u64, Answer)> {
        let answer = self.answers.try_recv().ok()?;
        self.pending = self.pending.saturating_sub(1);
        Some(answer)
    }

    /// Whether no call is being made, or waits to be.
    pub(super) fn is_idle(&self) -> bool {
        self.pending == 0
    }

    /// From now on calls that have not begun are answered, and not made.
    pub(super) fn end(&self) {
        self.shared.ending.store(true, Ordering::SeqCst);
    }

    /// Ends the threads. One that is still at a call is left to it.
    pub(super) fn close(self) {
        self.end();
        let is_idle = self.is_idle();
        drop((self.questions, self.changes));
        for thread in self.threads {
            if is_idle {
                let _ended = thread.join();
            }
        }
    }
}

pub(super) fn busy(why: &str) -> Answer {
    Answer::error(&ControlError::new(ErrorKind::Busy, why))
}

fn make_calls(jobs: &Receiver<Job>, answers: &Sender<(u64, Answer)>, shared: &Shared) {
    for Job { connection, call } in jobs {
        let answer = if shared.ending.load(Ordering::SeqCst) {
            busy("the program is ending")
        } else {
            make(call, &*shared.vm)
        };
        let _nobody_waits = answers.send((connection, answer));
        shared.bell.ring();
    }
}

fn make(call: Call, vm: &dyn Controlled) -> Answer {
    // Whatever it has left behind, it is behind the VM's own locks, and those say whether they are whole.
    catch_unwind(AssertUnwindSafe(|| call.perform(vm))).unwrap_or_else(|_panic| {
        tracing::error!("a call of the control interface has panicked");
        Answer::error(&ControlError::failed("a defect in the program: its log says more"))
    })
}
