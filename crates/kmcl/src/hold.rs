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
    /// The number of the freeze under way.
    frozen: Option<u64>,
    /// The number of the save under way.
    saving: Option<u64>,
    /// Freezes and saves begun so far: what was begun once cannot end what was begun later.
    begun: u64,
    /// A thaw that was asked for inside a callback.
    thaw_later: Option<u64>,
    /// Woken when a frozen channel has settled.
    waker: Option<Waker>,
}

impl Inner {
    fn next(&mut self) -> u64 {
        self.begun += 1;
        self.begun
    }
}

impl Hold {
    pub(crate) fn is_held(&self) -> bool {
        self.held.load(Ordering::SeqCst)
    }

    pub(crate) fn is_frozen(&self) -> bool {
        lock(&self.inner).frozen.is_some()
    }

    pub(crate) fn is_frozen_as(&self, number: u64) -> bool {
        lock(&self.inner).frozen == Some(number)
    }

    /// The number of a freeze that begins, unless the channel is frozen already, or being saved.
    pub(crate) fn freeze(&self) -> Option<u64> {
        let mut inner = lock(&self.inner);
        if inner.frozen.is_some() || inner.saving.is_some() {
            return None;
        }
        inner.frozen = Some(inner.next());
        self.held.store(true, Ordering::SeqCst);
        inner.frozen
    }

    /// Ends that freeze, or any, and a save with it; `false` if there is none.
    pub(crate) fn thaw(&self, number: Option<u64>) -> bool {
        let mut inner = lock(&self.inner);
        if inner.frozen.is_none() || (number.is_some() && inner.frozen != number) {
            return false;
        }
        (inner.frozen, inner.saving, inner.waker) = (None, None, None);
        self.held.store(false, Ordering::SeqCst);
        true
    }

    /// Has that freeze ended when the present callback has returned.
    pub(crate) fn thaw_later(&self, number: u64) {
        lock(&self.inner).thaw_later = Some(number);
    }

    pub(crate) fn take_thaw_later(&self) -> Option<u64> {
        lock(&self.inner).thaw_later.take()
    }

    /// The number of a save that begins, unless one is under way.
    pub(crate) fn begin_save(&self) -> Option<u64> {
        let mut inner = lock(&self.inner);
        if inner.saving.is_some() {
            return None;
        }
        inner.saving = Some(inner.next());
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
        self.held.store(inner.frozen.is_some(), Ordering::SeqCst);
        inner.frozen.is_none()
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
