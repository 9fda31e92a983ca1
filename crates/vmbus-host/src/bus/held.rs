//! A bus that stands still: to be saved, and then to move away or to go on.

use std::sync::{Arc, PoisonError};
use std::thread;

use kmcl::SaveOptions;
use saved_state::WriteError;

use crate::bus::HostBus;
use crate::host::Host;
use crate::saved::HostSave;

/// A bus that is being saved. What it writes is the state of the moment in which it was begun.
pub type BusSave = HostSave<Arc<Host>>;

/// Holds a [`HostBus`] still until it is dropped: the guest's messages are refused with
/// [`PostError::Busy`](crate::PostError::Busy), none go to it, and what steps want done waits.
///
/// The order of a save: hold the bus, freeze the channels and wait for their devices, then save bus and
/// channels. What devices say while the bus is held is part of its state if it comes before
/// [`HeldBus::save`], and of no save's that was begun before.
#[derive(Debug)]
#[must_use = "dropping it lets the bus go on"]
pub struct HeldBus {
    bus: HostBus,
}

impl HostBus {
    /// Holds the bus still. Waits for a call of the port that another thread is in, and for what steps
    /// have begun; not if it is called from inside such a call, which then goes on behind its back.
    ///
    /// A bus can be held several times over; it stands still until the last one lets go.
    pub fn hold(&self) -> HeldBus {
        let here = thread::current().id();
        let mut inner = self.lock();
        inner.holds += 1;
        while inner.worker.is_some_and(|worker| worker != here) {
            inner = self.shared.idle.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        drop(inner);
        HeldBus { bus: self.clone() }
    }

    /// One hold less.
    pub(super) fn release(&self) {
        let mut inner = self.lock();
        inner.holds = inner.holds.saturating_sub(1);
        drop(inner);
        self.work();
    }
}

impl HeldBus {
    /// The bus.
    #[must_use]
    pub fn bus(&self) -> &HostBus {
        &self.bus
    }

    /// Begins to save the bus: all that [`Host`] is. It needs no memory but the buffers it is given; only
    /// if a device changes the state while it lasts, the bus goes on with a copy of it.
    ///
    /// # Errors
    /// As for [`Host::save`].
    pub fn save(&self, options: &SaveOptions) -> Result<BusSave, WriteError> {
        let host = Arc::clone(&self.bus.lock().host);
        HostSave::new(host, options)
    }

    /// The guest goes on elsewhere, with the state that was saved. From now on this bus does nothing: it
    /// calls its port no more, takes no message, and what devices say comes to nothing. Signals that they
    /// still hold lead nowhere.
    pub fn move_away(self) {
        let mut inner = self.bus.lock();
        inner.moved_away = true;
        inner.effects.clear();
        let active = std::mem::take(&mut inner.active);
        let left_behind = (std::mem::take(&mut inner.devices), inner.hvsock.take());
        drop(inner);
        for active in active.values() {
            active.signal.set_target(None);
        }
        drop((active, left_behind)); // foreign code, not under the lock
    }
}

impl Drop for HeldBus {
    fn drop(&mut self) {
        self.bus.release();
    }
}
