//! A disk whose requests end when, and in the order in which, the seed says.
//!
//! The medium outlives the host. A request that a host has started and not had confirmed as ended
//! goes on without it, as it does in a kernel or on a network: it may still land when another host
//! has taken over.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vmbus_memory::MemoryError;
use vsp_storage::block::{Backend, IoDone, IoError, IoOperation, IoRequest, RamBackend};

use crate::rng::Rng;

/// Bytes of a block: the unit in which the disk is written and judged.
pub(crate) const BLOCK_BYTES: u32 = 512;

/// Blocks of the disk.
pub(crate) const BLOCKS: u64 = 64;

/// The block that cannot be read.
pub(crate) const BAD_BLOCK: u64 = 13;

/// What stores the bytes, and the requests that are under way on it, whoever has made them.
pub(crate) struct Medium {
    bytes: RamBackend,
    inner: Mutex<Inner>,
}

struct Inner {
    rng: Rng,
    now: u64,
    next: u64,
    running: Vec<Running>,
}

struct Running {
    id: u64,
    due: u64,
    request: IoRequest,
    /// Whom to tell.
    owner: Arc<Finished>,
}

/// Requests that have ended and were not asked for yet.
#[derive(Default)]
struct Finished(Mutex<Vec<IoDone>>);

impl Finished {
    fn lock(&self) -> MutexGuard<'_, Vec<IoDone>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Medium {
    pub(crate) fn new(rng: Rng) -> Result<Arc<Self>, MemoryError> {
        let bytes = RamBackend::new(BLOCKS * u64::from(BLOCK_BYTES))?;
        let inner = Mutex::new(Inner { rng, now: 0, next: 0, running: Vec::new() });
        Ok(Arc::new(Self { bytes, inner }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The requests that can land, and when.
    pub(crate) fn landings(&self, now: u64, mut found: impl FnMut(u64, u64)) {
        let mut inner = self.lock();
        inner.now = now;
        for running in &inner.running {
            found(running.due, running.id);
        }
    }

    /// A request takes effect.
    pub(crate) fn land(&self, id: u64) {
        let mut inner = self.lock();
        let Some(at) = inner.running.iter().position(|running| running.id == id) else { return };
        let Running { request, owner, .. } = inner.running.swap_remove(at);
        drop(inner);
        let done = self.perform(request);
        owner.lock().push(done);
    }

    /// Every request takes effect.
    pub(crate) fn land_all(&self) {
        let ids: Vec<u64> = self.lock().running.iter().map(|running| running.id).collect();
        ids.into_iter().for_each(|id| self.land(id));
    }

    fn perform(&self, request: IoRequest) -> IoDone {
        let bad = BAD_BLOCK * u64::from(BLOCK_BYTES);
        let hits_bad_block =
            (request.offset..request.offset.saturating_add(request.bytes)).contains(&bad);
        if request.operation == IoOperation::Read && hits_bad_block {
            return IoDone { request, result: Err(IoError::Read { at: bad, errno: Errno::IO }) };
        }
        let (mut one, mut done) = (vec![request], Vec::new());
        self.bytes.submit(&mut one, &mut done);
        done.pop().expect("memory does everything at once")
    }

    /// What is on the disk.
    pub(crate) fn block(&self, block: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        let read = self.bytes.medium().read(block * u64::from(BLOCK_BYTES), &mut bytes);
        read.expect("the block is on the disk");
        bytes
    }
}

/// One host's way to the medium.
pub(crate) struct SimBackend {
    medium: Arc<Medium>,
    finished: Arc<Finished>,
    /// Only there to be asked for: the simulator knows when something has finished.
    fd: OwnedFd,
}

impl SimBackend {
    pub(crate) fn new(medium: &Arc<Medium>) -> Result<Arc<Self>, Errno> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { medium: Arc::clone(medium), finished: Arc::default(), fd }))
    }

    /// Whether [`Backend::reap`] has something to do.
    pub(crate) fn has_finished(&self) -> bool {
        !self.finished.lock().is_empty()
    }

    fn is_mine(&self, running: &Running) -> bool {
        Arc::ptr_eq(&running.owner, &self.finished)
    }
}

impl Backend for SimBackend {
    fn bytes(&self) -> u64 {
        self.medium.bytes.bytes()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn submit(&self, requests: &mut Vec<IoRequest>, _done: &mut Vec<IoDone>) {
        let inner = &mut *self.medium.lock();
        for request in requests.drain(..) {
            let mut due = inner.now + inner.rng.delay();
            if request.operation == IoOperation::Flush {
                // Behind everything that was submitted before it.
                let mine = inner.running.iter().filter(|running| self.is_mine(running));
                due = mine.map(|running| running.due + 1).fold(due, u64::max);
            }
            let owner = Arc::clone(&self.finished);
            inner.running.push(Running { id: inner.next, due, request, owner });
            inner.next += 1;
        }
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn reap(&self, done: &mut Vec<IoDone>) {
        done.append(&mut self.finished.lock());
    }
}
