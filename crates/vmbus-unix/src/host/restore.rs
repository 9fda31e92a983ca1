//! A host that takes the place of one that was saved.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmbus_host::{GuestPort, HostBus};

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
}

/// Why a host did not go on with a saved state. The state is as good as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FinishError {
    /// The guest has not come back, or has gone again.
    #[error("the guest of the saved state is not there")]
    NoGuest,
    /// The guest would go on with the same state once more.
    #[error("the epoch cannot be raised: {0}")]
    Epoch(io::Error),
}

impl RestoringHost {
    pub(super) fn start<E>(
        path: &Path,
        options: HostOptions,
        transport: &[u8],
        new_bus: impl FnOnce(Arc<dyn GuestPort>) -> Result<HostBus, E>,
    ) -> Result<Self, E>
    where
        E: From<BindError> + From<TransportReadError>,
    {
        let saved = saved::read(transport)?.map(Box::new);
        let host = UnixHost::start(path, options, Stage::Restoring { saved }, new_bus)?;
        Ok(Self { host })
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

    /// The host goes on where the saved one stopped, if `go_on` has the bus do so.
    ///
    /// The epoch is raised first: whatever comes of it from then on, nobody else may go on with the
    /// same state. Where the bus refuses, nothing has come of it, and the state is good again.
    pub(super) fn finish_with<E: From<FinishError>>(
        self,
        go_on: impl FnOnce(&HostBus) -> Result<(), E>,
    ) -> Result<UnixHost, E> {
        let Self { host } = self;
        let mut driver = lock(&host.driver);
        let had_guest = matches!(driver.stage, Stage::Restoring { saved: Some(_) });
        let is_gone = host.port.session().as_ref().is_none_or(|session| session.link.is_hung_up());
        if had_guest && is_gone {
            return Err(FinishError::NoGuest.into());
        }
        host.set_epoch(1)?;
        if let Err(error) = go_on(&host.bus) {
            // Fails only where raising it would have.
            host.set_epoch(-1)?;
            return Err(error);
        }
        driver.stage = Stage::Serving;
        host.watch_event_port(true);
        if let Some(session) = &mut *host.port.session() {
            session.set_hearing(&host.port.poller, Hearing::Normal);
            session.ring_all();
        }
        drop(driver);
        host.bus.messages_drained();
        Ok(host)
    }
}

impl UnixHost {
    fn set_epoch(&self, change: i64) -> Result<(), FinishError> {
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
