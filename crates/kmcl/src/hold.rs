//! What keeps a channel as it is: a freeze, a save. While one does, life-cycle events wait in the
//! mailbox, and whoever wants to see the channel changed has to wait for its end.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

use crate::channel::lock;

/// See the module.
#[derive(Default)]
pub(crate) struct Hold {
    /// Mirrors whether there is one.
    held: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    frozen: bool,
    /// The number of the save under way.
    saving: Option<u64>,
    saves: u64,
    /// Woken when a frozen channel has settled.
    waker: Option<Waker>,
}

impl Hold {
    pub(crate) fn is_held(&self) -> bool {
        self.held.load(Ordering::SeqCst)
    }

    pub(crate) fn is_frozen(&self) -> bool {
        lock(&self.inner).frozen
    }

    /// `false` if it is frozen already, or being saved.
    pub(crate) fn freeze(&self) -> bool {
        let mut inner = lock(&self.inner);
        if inner.frozen || inner.saving.is_some() {
            return false;
        }
        inner.frozen = true;
        self.held.store(true, Ordering::SeqCst);
        true
    }

    /// Ends the freeze, and a save with it; `false` if there is none.
    pub(crate) fn thaw(&self) -> bool {
        let mut inner = lock(&self.inner);
        let was = std::mem::take(&mut inner.frozen);
        if was {
            (inner.saving, inner.waker) = (None, None);
            self.held.store(false, Ordering::SeqCst);
        }
        was
    }

    /// The number of a save that begins, unless one is under way.
    pub(crate) fn begin_save(&self) -> Option<u64> {
        let mut inner = lock(&self.inner);
        if inner.saving.is_some() {
            return None;
        }
        inner.saves += 1;
        inner.saving = Some(inner.saves);
        self.held.store(true, Ordering::SeqCst);
        inner.saving
    }

    pub(crate) fn is_saving(&self, number: u64) -> bool {
        lock(&self.inner).saving == Some(number)
    }

    /// Ends that save, or any; `true` if there was one and the channel was not frozen for it.
    pub(crate) fn end_save(&self, number: Option<u64>) -> bool {
        let mut inner = lock(&self.inner);
        if inner.saving.is_none() || (number.is_some() && inner.saving != number) {
            return false;
        }
        inner.saving = None;
        self.held.store(inner.frozen, Ordering::SeqCst);
        !inner.frozen
    }

    pub(crate) fn set_waker(&self, waker: Option<Waker>) {
        lock(&self.inner).waker = waker;
    }

    pub(crate) fn wake(&self) {
        let waker = lock(&self.inner).waker.clone();
        if let Some(waker) = waker {
            waker.wake(); // foreign code: never under our lock
        }
    }
}
