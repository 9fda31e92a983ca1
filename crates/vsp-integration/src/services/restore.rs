//! Services out of a saved state.
//!
//! ```text
//!   restoring(state) ──► enable ──► restore each channel ──► start ──► tick: the guest learns the time
//!      │                  │ offers are taken over, rings       │
//!      └ refused          └ come back when the bus is there    └ go on where they were
//! ```

use std::fmt;
use std::io::Read;
use std::sync::Arc;

use kmcl::bus::Bus;
use kmcl::{Channel, ChannelRestore, Guid, RestoreError, RestoreFromError, Restored};
use saved_state::input::{ChunkInput, InputError};
use saved_state::integration::{HEARTBEAT, INTEGRATION_SERVICE, KINDS};
use saved_state::{Chunk, ReadError, StreamKind, StreamReader};

use super::{IntegrationConfig, IntegrationError, IntegrationServices, STATE_INTERFACE};
use crate::driver::{Driver, Observer};
use crate::protocol::{Protocol, Restoring, StateError};
use crate::wire::Service;

/// Why the services were not restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServicesRestoreError {
    /// The bytes are not the services' saved state, or damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The bytes cannot be had.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A record that they cannot have.
    #[error("chunk {chunk}: {record}: {why}")]
    Record {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
        /// What is wrong with it.
        #[source]
        why: StateError,
    },
    /// Records that do not fit together, or are not there.
    #[error("the records of the services: {0}")]
    Records(#[source] StateError),
    /// The services cannot be made.
    #[error(transparent)]
    Services(#[from] IntegrationError),
}

/// Why a channel was not restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreServiceError {
    /// There are three.
    #[error("channel {index} of {}", Service::ALL.len())]
    NoSuchChannel {
        /// Which one was asked for.
        index: u32,
    },
    /// It is restored already.
    #[error("{service}: restored already")]
    Twice {
        /// Whose channel.
        service: Service,
    },
    /// The library refuses.
    #[error("{service}: {why}")]
    Channel {
        /// Whose channel.
        service: Service,
        /// Why.
        #[source]
        why: RestoreFromError,
    },
}

/// Why the services were not started.
#[derive(Debug, thiserror::Error)]
#[error("{service}: the channel was not restored")]
pub struct StartError {
    /// The first service whose channel was not restored.
    pub service: Service,
    /// The services, to be restored further.
    pub services: RestoringServices,
}

/// Services that are being restored: see [`IntegrationServices::restoring`].
///
/// Dropping them gives the restore up; what the bus has taken over of them is withdrawn.
pub struct RestoringServices {
    services: IntegrationServices,
    /// By place in [`Service::ALL`]: the channel is restored.
    restored: [bool; Service::ALL.len()],
}

impl IntegrationServices {
    /// Services that go on where `state`, the first of the streams that were saved of them, says. Next,
    /// [enable](RestoringServices::enable) them.
    ///
    /// # Errors
    /// [`ServicesRestoreError`].
    pub fn restoring(
        bus: Arc<dyn Bus>,
        driver: Arc<dyn Driver>,
        observer: Arc<dyn Observer>,
        config: IntegrationConfig,
        state: impl Read,
    ) -> Result<RestoringServices, ServicesRestoreError> {
        let protocol = read(state)?;
        let services = Self::with(bus, driver, observer, config, protocol)?;
        Ok(RestoringServices { services, restored: [false; Service::ALL.len()] })
    }
}

impl RestoringServices {
    /// Channels: three.
    #[must_use]
    pub fn channels(&self) -> u32 {
        u32::try_from(self.restored.len()).unwrap_or(u32::MAX)
    }

    /// Channel `index`, that of the service with this place in [`Service::ALL`], to look at.
    #[must_use]
    pub fn channel(&self, index: u32) -> Option<Channel> {
        self.services.channel(service_at(index)?)
    }

    /// Offers the channels, all of them: a bus that was restored takes them for those that it had. Next,
    /// restore each channel, before or after the bus has brought their rings.
    ///
    /// # Errors
    /// [`IntegrationError::Channel`], also if they are offered already.
    pub fn enable(&self) -> Result<(), IntegrationError> {
        self.services.core.enable()
    }

    /// Restores channel `index` from all of its stream.
    ///
    /// # Errors
    /// [`RestoreServiceError`]; the channel is as before.
    pub fn restore_channel(
        &mut self,
        index: u32,
        state: impl Read,
    ) -> Result<(), RestoreServiceError> {
        let (service, channel) = self.begin(index)?;
        let refused = |why| RestoreServiceError::Channel { service, why };
        channel.restore_from(state).map_err(refused)?;
        self.note_restored(index);
        Ok(())
    }

    /// Begins to restore channel `index` chunk by chunk. When [`ChannelRestore::feed`] has answered that
    /// it is complete, [`Self::finish_channel`] takes it.
    ///
    /// # Errors
    /// [`RestoreServiceError`].
    pub fn begin_channel(&self, index: u32) -> Result<ChannelRestore, RestoreServiceError> {
        let (service, channel) = self.begin(index)?;
        let refused = |why: RestoreError| RestoreServiceError::Channel { service, why: why.into() };
        channel.restore().map_err(refused)
    }

    /// Takes note that channel `index` is restored, because `last` says so.
    pub fn finish_channel(&mut self, index: u32, last: Restored) {
        if last == Restored::Complete {
            self.note_restored(index);
        }
    }

    fn begin(&self, index: u32) -> Result<(Service, Channel), RestoreServiceError> {
        let none = RestoreServiceError::NoSuchChannel { index };
        let Some(service) = service_at(index) else { return Err(none) };
        if self.restored.get(service.index()) != Some(&false) {
            return Err(RestoreServiceError::Twice { service });
        }
        self.services.channel(service).map(|channel| (service, channel)).ok_or(none)
    }

    fn note_restored(&mut self, index: u32) {
        let restored = service_at(index).and_then(|it| self.restored.get_mut(it.index()));
        if let Some(restored) = restored {
            *restored = true;
        }
    }

    /// Lets the services go on. At the next [tick](IntegrationServices::tick), which should come at
    /// once, the guest is told to set its clock.
    ///
    /// # Errors
    /// [`StartError`], which has the services, if a channel was not restored.
    pub fn start(self) -> Result<IntegrationServices, StartError> {
        let missing = Service::ALL.into_iter().zip(self.restored).find(|(_, restored)| !restored);
        if let Some((service, _)) = missing {
            return Err(StartError { service, services: self });
        }
        let channels = self.services.core.channels().clone();
        channels.iter().for_each(Channel::start);
        Ok(self.services)
    }
}

impl fmt::Debug for RestoringServices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestoringServices")
            .field("services", &self.services)
            .field("restored", &self.restored)
            .finish()
    }
}

fn service_at(index: u32) -> Option<Service> {
    Service::ALL.get(usize::try_from(index).ok()?).copied()
}

/// What the stream says, checked.
fn read(state: impl Read) -> Result<Protocol, ServicesRestoreError> {
    let reader = StreamReader::new(StreamKind::DEVICE, KINDS);
    let mut reader = reader.of_interface(STATE_INTERFACE, Guid::ZERO);
    let mut input = ChunkInput::new(state);
    let mut restoring = Restoring::default();
    while let Some(mut bytes) = input.next()? {
        while let Some(chunk) = reader.read(&mut bytes)? {
            take(&mut restoring, &chunk)?;
        }
    }
    reader.finish()?;
    restoring.finish().map_err(ServicesRestoreError::Records)
}

fn take(restoring: &mut Restoring, chunk: &Chunk<'_>) -> Result<(), ServicesRestoreError> {
    let taken = match chunk.kind() {
        INTEGRATION_SERVICE => restoring.service(&chunk.decode()?),
        HEARTBEAT => restoring.heartbeat(chunk.decode()?),
        _ => restoring.shutdown(chunk.decode()?),
    };
    let (chunk, record) = (chunk.sequence(), chunk.info().name);
    taken.map_err(|why| ServicesRestoreError::Record { chunk, record, why })
}
