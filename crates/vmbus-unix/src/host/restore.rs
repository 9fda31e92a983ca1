//! A host that takes the place of one that was saved.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmbus_host::{FinishRestoreError, GuestPort, HostBus};
use vmbus_memory::MappingBudget;

use super::saved::{self, TransportReadError};
use super::session::Hearing;
use super::{HostEvent, HostOptions, Stage, UnixHost, lock};
use crate::error::BindError;

/// A host that was made from a saved state, and has not gone on with it: its devices make their
/// offers on [`RestoringHost::bus`], and the guest comes back ([`crate::resume`]). Nothing that anybody
/// does can spoil the waiting: who is not the guest of the saved state is turned away with a reason.
///
/// It is driven like a [`UnixHost`]. Dropping it leaves the state as good as it was.
#[derive(Debug)]
pub struct RestoringHost {
    host: UnixHost,
}

/// Why a host could not be made from a saved state. The state is as good as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// It has no socket.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The state of the transport is none.
    #[error("the state of the transport: {0}")]
    Transport(#[from] TransportReadError),
    /// The state of the bus is none.
    #[error("the state of the bus: {0}")]
    Bus(#[from] vmbus_host::RestoreError),
}

/// A host did not go on with a saved state. The state is as good as it was.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct NotFinished {
    /// The host, as it was: more offers can be made, or others, and the guest may come back.
    pub restoring: RestoringHost,
    /// Why not.
    #[source]
    pub why: FinishError,
}

/// Why a host did not go on with a saved state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FinishError {
    /// The guest has not come back, or has gone again.
    #[error("the guest of the saved state is not there")]
    NoGuest,
    /// The guest would go on with the same state once more.
    #[error("the epoch cannot be raised: {0}")]
    Epoch(io::Error),
    /// The devices, or the guest, are not those that were saved.
    #[error(transparent)]
    Bus(#[from] FinishRestoreError),
}

impl UnixHost {
    /// Serves at `path` in the place of a host that was saved, with the state of its transport
    /// ([`HeldHost::save`](super::HeldHost::save)) and of its bus ([`vmbus_host::HeldBus::save`]), each a
    /// whole stream. That host must be gone. What the bus is willing to do is in the state;
    /// [`HostOptions::bus`] is not used.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn bind_restoring(
        path: impl AsRef<Path>,
        options: HostOptions,
        transport: &[u8],
        bus: &[u8],
    ) -> Result<RestoringHost, RestoreError> {
        RestoringHost::start(path.as_ref(), options, transport, |port| {
            HostBus::restoring(port, MappingBudget::default(), bus)
        })
    }
}

impl RestoringHost {
    pub(super) fn start<E>(
        path: &Path,
        options: HostOptions,
        transport: &[u8],
        new_bus: impl FnOnce(Arc<dyn GuestPort>) -> Result<HostBus, E>,
    ) -> Result<Self, RestoreError>
    where
        RestoreError: From<E>,
    {
        let saved = saved::read(transport)?.map(Box::new);
        let stage = Stage::Restoring { saved };
        let new_bus = |port| new_bus(port).map_err(RestoreError::from);
        Ok(Self { host: UnixHost::start(path, options, stage, new_bus)? })
    }

    /// The bus on which the devices make the offers that they made before.
    #[must_use]
    pub fn bus(&self) -> &HostBus {
        self.host.bus()
    }

    /// Where it serves.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.host.path()
    }

    /// Whether the guest of the saved state is there; always, if there was none.
    #[must_use]
    pub fn guest_is_back(&self) -> bool {
        let no_guest = matches!(lock(&self.host.driver).stage, Stage::Restoring { saved: None });
        no_guest || self.host.guest().is_some()
    }

    /// As [`UnixHost::take_events`].
    #[must_use]
    pub fn take_events(&self) -> Vec<HostEvent> {
        self.host.take_events()
    }

    /// As [`UnixHost::wait`].
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn wait(&self, limit: Option<Duration>) -> io::Result<bool> {
        self.host.wait(limit)
    }

    /// As [`UnixHost::drive`].
    ///
    /// # Errors
    /// As for [`UnixHost::drive`].
    pub fn drive(&self) -> io::Result<bool> {
        self.host.drive()
    }

    /// Drives until the guest is back, or `limit` has passed. Returns whether it is. For programs that
    /// have nothing else to do meanwhile.
    ///
    /// # Errors
    /// As for [`UnixHost::drive`].
    pub fn drive_until_back(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        let mut more = false;
        while !self.guest_is_back() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            if more || self.wait(Some(left))? {
                more = self.drive()?;
            }
        }
        Ok(true)
    }

    /// The host goes on where the saved one stopped. The devices have made their offers, and the guest
    /// is back. The devices whose channels were open get their rings from here on; their channels may be
    /// started before or after.
    ///
    /// # Errors
    /// [`NotFinished`], which has the host: nothing has come of it for the guest or for any device.
    pub fn finish(self) -> Result<UnixHost, Box<NotFinished>> {
        self.finish_with(|bus| Ok(bus.finish_restore()?))
    }

    /// [`RestoringHost::finish`], if `go_on` has the bus go on.
    pub(super) fn finish_with(
        self,
        go_on: impl FnOnce(&HostBus) -> Result<(), FinishError>,
    ) -> Result<UnixHost, Box<NotFinished>> {
        match self.host.go_on(go_on) {
            Ok(()) => Ok(self.host),
            Err(why) => Err(Box::new(NotFinished { restoring: self, why })),
        }
    }
}

impl UnixHost {
    /// The epoch is raised first: whatever comes of it from then on, nobody else may go on with the same
    /// state. Where the bus refuses, nothing has come of it, and the state is good again.
    fn go_on(
        &self,
        bus_goes_on: impl FnOnce(&HostBus) -> Result<(), FinishError>,
    ) -> Result<(), FinishError> {
        let mut driver = lock(&self.driver);
        let had_guest = matches!(driver.stage, Stage::Restoring { saved: Some(_) });
        let is_gone = self.port.session().as_ref().is_none_or(|session| session.link.is_hung_up());
        if had_guest && is_gone {
            return Err(FinishError::NoGuest);
        }
        self.change_epoch(1)?;
        if let Err(error) = bus_goes_on(&self.bus) {
            self.change_epoch(-1)?; // fails only where raising it would have
            return Err(error);
        }
        driver.stage = Stage::Serving;
        self.watch_event_port(true);
        if let Some(session) = &mut *self.port.session() {
            session.set_hearing(&self.port.poller, Hearing::Normal);
            session.ring_all();
        }
        Ok(())
    }

    fn change_epoch(&self, change: i64) -> Result<(), FinishError> {
        let mut session = self.port.session();
        let resumable = session.as_mut().and_then(|session| session.resumable.as_mut());
        let Some(resumable) = resumable else { return Ok(()) };
        let value = resumable.epoch.value().wrapping_add_signed(change);
        resumable.epoch.set(value).map_err(|error| FinishError::Epoch(error.into()))
    }
}

impl AsFd for RestoringHost {
    /// Readable when there is something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.host.as_fd()
    }
}
