//! A host that is held still, so that it can be saved, and then goes on or goes away.

use std::sync::atomic::{AtomicBool, Ordering};

use kmcl::SaveOptions;
use vmbus_host::HeldBus;

use super::saved::{TransportSave, TransportSaveError};
use super::session::Hearing;
use super::{Stage, UnixHost, accept, lock};
use crate::error::{ConnectionError, Reason};

/// A [`UnixHost`] that takes nothing from its guest and gives it nothing: no frame, no message, no
/// answer. What the devices want to say waits; their channels are frozen by their owners. The host's
/// descriptor is not readable meanwhile, and driving it does nothing.
///
/// Dropping it is [`HeldHost::release`].
///
/// **Order.** The host is held before channels are frozen, and released *before* they are thawed: what a
/// channel does after a save makes the saved state void, which only `release` says
/// ([`crate::resume`]).
#[derive(Debug)]
#[must_use = "dropping it lets the host go on"]
pub struct HeldHost<'a> {
    // In the order in which they are let go: the transport before the bus that wants to use it.
    gate: Gate<'a>,
    bus: HeldBus,
}

/// The host goes on when it is dropped, unless it has moved away.
#[derive(Debug)]
struct Gate<'a> {
    host: &'a UnixHost,
    /// Something was saved that another process could go on with.
    saved: AtomicBool,
}

/// Why a host cannot be held.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HoldError {
    /// It is held already.
    #[error("the host is held already")]
    Held,
    /// It has not gone on yet after a restore.
    #[error("the host waits for the guest of its saved state")]
    Restoring,
    /// Another process serves.
    #[error("the host has moved away")]
    Gone,
}

impl UnixHost {
    /// Holds the host still. Waits for a thread that is driving it; so it must not be called from
    /// anything that this host calls.
    ///
    /// # Errors
    /// [`HoldError`].
    pub fn hold(&self) -> Result<HeldHost<'_>, HoldError> {
        let mut driver = lock(&self.driver);
        // A guest that is gone already is not one to be saved.
        if self.port.session().as_ref().is_some_and(|session| session.link.is_hung_up()) {
            self.lost(&driver, ConnectionError::Closed);
        }
        match driver.stage {
            Stage::Serving => driver.stage = Stage::Held,
            Stage::Held => return Err(HoldError::Held),
            Stage::Restoring { .. } => return Err(HoldError::Restoring),
            Stage::Gone => return Err(HoldError::Gone),
        }
        let bus = self.bus.hold();
        self.set_door_held(&driver, true);
        self.watch_event_port(false);
        if let Some(session) = &mut *self.port.session() {
            session.set_hearing(&self.port.poller, Hearing::Held);
        }
        Ok(HeldHost { gate: Gate { host: self, saved: AtomicBool::new(false) }, bus })
    }
}

impl<'a> HeldHost<'a> {
    /// The host.
    #[must_use]
    pub fn host(&self) -> &'a UnixHost {
        self.gate.host
    }

    /// Its bus, to be saved as well.
    pub fn bus(&self) -> &HeldBus {
        &self.bus
    }

    /// The state of the transport, to be written to wherever it is kept. It is good until
    /// [`HeldHost::release`]: from then on no guest goes on with it.
    ///
    /// # Errors
    /// [`TransportSaveError`]; a guest that does not outlive this process cannot be saved.
    pub fn save(&self, options: &SaveOptions) -> Result<TransportSave, TransportSaveError> {
        let guest = match &*self.gate.host.port.session() {
            None => None,
            Some(session) => {
                let cannot = TransportSaveError::GuestCannotResume { peer: session.peer };
                Some(session.to_saved()?.ok_or(cannot)?)
            }
        };
        // Before anybody can have the bytes.
        self.gate.saved.store(true, Ordering::Relaxed);
        Ok(TransportSave::new(guest.as_ref(), options)?)
    }

    /// The host goes on. Whatever was saved is void from now on, and a guest that is asked to go on
    /// with it refuses: see [`crate::resume`]. To be called before any channel is thawed.
    pub fn release(self) {}

    /// The host is over, and the guest is told nothing: its link ends as if this process had been
    /// killed. Another process may serve at the path at once, and go on with the saved state. What
    /// devices do with the bus from now on has no effect.
    pub fn move_away(self) {
        let Self { gate, bus } = self;
        bus.move_away();
        let host = gate.host;
        let mut driver = lock(&host.driver);
        driver.stage = Stage::Gone;
        driver.listener = None; // before the guest looks for another host
        host.forget(ConnectionError::Closed);
        drop(driver); // the gate takes it
    }
}

impl Drop for Gate<'_> {
    fn drop(&mut self) {
        let host = self.host;
        let mut driver = lock(&host.driver);
        if !matches!(driver.stage, Stage::Held) {
            return; // moved away
        }
        if let Some(session) = &mut *host.port.session() {
            if self.saved.load(Ordering::Relaxed)
                && let Some(resumable) = &mut session.resumable
                && let Err(error) = resumable.epoch.raise()
            {
                // What was saved is not void: then the connection has to be.
                session.link.hold(false);
                accept::say(&mut session.link, Reason::Ended, "the epoch cannot be raised");
                session.fail(ConnectionError::system("pwrite")(error));
            }
            session.set_hearing(&host.port.poller, Hearing::Normal);
        }
        driver.stage = Stage::Serving;
        host.set_door_held(&driver, false);
        host.watch_event_port(true);
    }
}
