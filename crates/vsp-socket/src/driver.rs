//! The seam to whoever runs the threads.

use std::error::Error;

use kmcl::Channel;

/// Runs the channels of connections: an event loop, or a worker thread.
///
/// A broker calls this in [`SocketBroker::ready`](crate::SocketBroker::ready) and
/// [`SocketBroker::tick`](crate::SocketBroker::tick), when it is frozen to move away, and when it is
/// dropped; never in a callback of the channel.
pub trait Driver: Send + Sync {
    /// From now on, drive `channel`: wait for its doorbell, set its waker, call its `process`.
    ///
    /// # Errors
    /// Whatever stands in the way; the connection is refused.
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Stop driving `channel`. When this returns, none of its callbacks runs and it has no waker.
    fn remove_channel(&self, channel: &Channel);
}
