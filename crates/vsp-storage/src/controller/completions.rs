//! What finishes later: the completions of one disk's back end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

use super::lane::Scratch;
use super::{Core, lock};
use crate::disk::Disk;

/// The completions of one disk: readable when there are some, and then [`Completions::ready`] answers
/// the guest.
pub struct Completions {
    core: Weak<Core>,
    disk: Arc<Disk>,
    /// A duplicate: descriptors of a back end live as long as the back end, this one as long as
    /// somebody waits on it.
    fd: OwnedFd,
    scratch: Mutex<Scratch>,
}

impl Completions {
    /// The completions of `disk`, whose descriptor is `fd`.
    pub(super) fn new(core: Weak<Core>, disk: Arc<Disk>, fd: OwnedFd) -> Arc<Self> {
        Arc::new(Self { core, disk, fd, scratch: Mutex::default() })
    }

    /// Answers the guest about every request that has finished. May be called at any time, from any
    /// thread; does nothing if nothing has finished. Returns whether there is more to do at once, so
    /// that an event loop can serve others in between: never, at present.
    pub fn ready(&self) -> bool {
        let mut scratch = std::mem::take(&mut *lock(&self.scratch));
        self.disk.backend().reap(&mut scratch.done);
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
