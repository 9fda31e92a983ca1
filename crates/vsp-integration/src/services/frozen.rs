//! Services that stand still to be saved.
//!
//! ```text
//!           freeze
//!  at work ───────► frozen ──► streams(), again and again
//!     ▲               │  │
//!     └──── thaw ─────┘  └──► move_away(): go on elsewhere
//! ```
//!
//! Nothing has to settle: no packet of a guest is kept, and what was asked and not answered is part of
//! the state.

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use kmcl::{Frozen, SaveOptions};

use super::save::{SavedStream, ServicesSave, StreamSave};
use super::{Core, IntegrationError, IntegrationServices, lock};
use crate::wire::Service;

impl IntegrationServices {
    /// Freezes the services, all of their channels: see [`FrozenServices`]. Waits for callbacks and for
    /// calls that are sending, and for nothing else. Not to be called in a callback.
    ///
    /// # Errors
    /// [`IntegrationError::Held`] if they are frozen already; [`IntegrationError::Channel`] if they were
    /// not offered. They are at work then.
    pub fn freeze(&self) -> Result<FrozenServices, IntegrationError> {
        let mut frozen = FrozenServices { channels: Vec::new(), hold: Hold::take(&self.core)? };
        for service in Service::ALL {
            let channel = self.core.channel(service).ok_or(IntegrationError::Closed)?;
            let channel =
                channel.freeze().map_err(|why| IntegrationError::Channel { service, why })?;
            frozen.channels.push(channel);
        }
        Ok(frozen)
    }
}

/// The right to hold the services, given back on drop.
struct Hold {
    core: Arc<Core>,
}

impl Hold {
    fn take(core: &Arc<Core>) -> Result<Self, IntegrationError> {
        let mut state = lock(&core.state);
        if state.is_held {
            return Err(IntegrationError::Held);
        }
        state.is_held = true;
        // Sends never block.
        while state.steps > 0 {
            state = core.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        Ok(Self { core: Arc::clone(core) })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = lock(&self.core.state);
        state.is_held = false;
        // Whoever froze the services has had the guest stand still.
        state.protocol.resync();
    }
}

/// Frozen services. Thaw when dropped.
///
/// From [`IntegrationServices::freeze`] on, nothing is delivered and nothing sent. They can be saved at
/// once: nothing is ever running.
#[must_use = "services that are not kept frozen thaw at once"]
pub struct FrozenServices {
    // Dropped in this order: channels thaw before the hold ends.
    channels: Vec<Frozen>,
    hold: Hold,
}

impl FrozenServices {
    /// Answers of the guest that are being worked on: none, since a freeze waits for them.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.channels.iter().map(Frozen::running).fold(0, u32::saturating_add)
    }

    /// Waits until nothing is running, or `limit` is over; returns whether nothing is.
    #[must_use]
    pub fn wait(&self, limit: Option<Duration>) -> bool {
        self.channels.iter().all(|channel| channel.wait(limit))
    }

    /// The streams to be saved: that of the services, then those of their channels, in the order of
    /// [`Service::ALL`]. Each can be written once; the next call gives them anew. The channels are being
    /// saved as long as they exist.
    ///
    /// # Errors
    /// [`IntegrationError::Channel`] while streams of another call exist; [`IntegrationError::Format`].
    pub fn streams(&self, options: &SaveOptions) -> Result<Vec<SavedStream>, IntegrationError> {
        let name = &self.hold.core.config.name;
        let records = lock(&self.hold.core.state).protocol.records();
        let save = StreamSave::Services(Box::new(ServicesSave::new(records, options)?));
        let mut streams = vec![SavedStream { name: name.clone(), index: 0, save }];
        for ((index, service), channel) in (0..).zip(Service::ALL).zip(&self.channels) {
            let save = channel.save_with(options);
            let save = save.map_err(|why| IntegrationError::Channel { service, why })?;
            let (name, save) = (format!("{name}/{service}"), StreamSave::Channel(save));
            streams.push(SavedStream { name, index, save });
        }
        Ok(streams)
    }

    /// Lets the services go on. The guest is told to set its clock.
    pub fn thaw(self) {
        drop(self);
    }

    /// Ends the services here, because they go on elsewhere: the guest learns nothing. What is left of
    /// them can only be dropped.
    pub fn move_away(self) {
        let Self { channels, hold } = self;
        channels.into_iter().for_each(Frozen::move_away);
        drop(hold);
    }
}

impl fmt::Debug for FrozenServices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrozenServices").field("channels", &self.channels).finish_non_exhaustive()
    }
}
