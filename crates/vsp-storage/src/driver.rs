//! The seam to whoever runs the threads.

use std::error::Error;
use std::sync::Arc;

use kmcl::Channel;

use crate::controller::Completions;

/// Runs a controller's channels and completions: an event loop, or a worker thread.
///
/// A controller calls this from its constructor and destructor, from the calls that attach and detach
/// disks, and, for subchannels, inside a packet callback of its primary channel.
pub trait Driver: Send + Sync {
    /// From now on, drive `channel`: wait for its doorbell, set its waker, call its `process`.
    ///
    /// # Errors
    /// Whatever stands in the way; the channel is given up.
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Stop driving `channel`. When this returns, none of its callbacks runs and it has no waker,
    /// unless this was called in one of these very callbacks.
    fn remove_channel(&self, channel: &Channel);

    /// From now on, call [`Completions::ready`] whenever `completions` is readable, on any thread.
    ///
    /// # Errors
    /// Whatever stands in the way; the disk is not attached.
    fn add_completions(
        &self,
        completions: Arc<Completions>,
    ) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Stop waiting for `completions`.
    fn remove_completions(&self, completions: &Arc<Completions>);
}
