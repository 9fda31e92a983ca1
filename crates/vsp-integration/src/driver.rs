//! The seam to whoever runs the threads.

use std::error::Error;

use kmcl::Channel;

/// Runs the services' channels: an event loop, or a worker thread.
///
/// Called when the services are made and when they are closed.
///
/// With a worker of `kmcl-worker`:
///
/// ```
/// use std::error::Error;
///
/// use kmcl::Channel;
/// use kmcl_worker::Worker;
/// use vsp_integration::Driver;
///
/// struct OneWorker(Worker);
///
/// impl Driver for OneWorker {
///     fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
///         Ok(self.0.add(channel)?)
///     }
///
///     fn remove_channel(&self, channel: &Channel) {
///         self.0.remove(channel);
///     }
/// }
/// ```
pub trait Driver: Send + Sync {
    /// From now on, drive `channel`: wait for its doorbell, set its waker, call its `process`.
    ///
    /// # Errors
    /// Whatever stands in the way; the services are given up.
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Stop driving `channel`. When this returns, none of its callbacks runs and it has no waker,
    /// unless this was called in one of these very callbacks.
    fn remove_channel(&self, channel: &Channel);
}

/// Learns what happens. Called on the thread that drives the channel, or on the one that calls
/// [`IntegrationServices::tick`](crate::IntegrationServices::tick), with no lock held; it may call the
/// services, but not freeze or close them.
pub trait Observer: Send + Sync {
    /// Something has happened.
    fn happened(&self, event: crate::Event);
}

/// Whoever wants to know nothing.
impl Observer for () {
    fn happened(&self, _event: crate::Event) {}
}
