//! What finishes later: the completions of one disk's back end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::lane::Scratch;
use super::{Core, lock};
use crate::scsi::bus::Lun;

/// The completions of one disk: readable when there are some, and then [`Completions::ready`] answers
/// the guest.
pub struct Completions {
    core: Weak<Core>,
    lun: Arc<Lun>,
    /// A duplicate: descriptors of a back end live as long as the back end, this one as long as
    /// somebody waits on it.
    fd: OwnedFd,
    /// The disk was detached; it goes when its last request has ended.
    is_detached: AtomicBool,
    scratch: Mutex<Scratch>,
}

impl Completions {
    /// The completions of a LUN's disk, whose descriptor is `fd`.
    pub(super) fn new(core: Weak<Core>, lun: Arc<Lun>, fd: OwnedFd) -> Arc<Self> {
        let is_detached = AtomicBool::new(false);
        Arc::new(Self { core, lun, fd, is_detached, scratch: Mutex::default() })
    }

    /// Answers the guest about every request that has finished. May be called at any time, from any
    /// thread; does nothing if nothing has finished. Returns whether there is more to do at once, so
    /// that an event loop can serve others in between: never, at present.
    pub fn ready(&self) -> bool {
        let mut scratch = std::mem::take(&mut *lock(&self.scratch));
        self.lun.disk.backend().reap(&mut scratch.done);
        match self.core.upgrade() {
            Some(core) => {
                core.finish(&mut scratch);
                core.retire_disks();
            }
            None => scratch.done.clear(),
        }
        *lock(&self.scratch) = scratch;
        false
    }

    pub(super) fn lun(&self) -> &Arc<Lun> {
        &self.lun
    }

    pub(super) fn detach(&self) {
        self.is_detached.store(true, Ordering::Release);
    }

    pub(super) fn is_detached(&self) -> bool {
        self.is_detached.load(Ordering::Acquire)
    }

    /// Whether the disk was detached and nothing of it is in flight.
    pub(super) fn is_over(&self) -> bool {
        // Requests in flight, and those that are being judged, hold their LUN; so does the table as
        // long as the LUN is in it. Once it is not, nobody can take hold of it any more.
        self.is_detached() && Arc::strong_count(&self.lun) == 1
    }
}

impl AsFd for Completions {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl std::fmt::Debug for Completions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Completions").field("fd", &self.fd).finish_non_exhaustive()
    }
}
