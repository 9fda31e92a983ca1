//! The seam between a guest bus and the transport that reaches the host.

use std::sync::Arc;

use kmcl::bus::{Doorbell, Signal};
use vmbus_wire::status::NtStatus;

use crate::effect::ConnectionEvent;
use crate::offer::OfferedChannel;
use crate::post::PostStatus;

/// What became of a message given to [`HostPort::post_message`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Posted {
    /// The host has answered.
    Answered(PostStatus),
    /// The answer comes by [`GuestBus::message_posted`](crate::GuestBus::message_posted).
    Later,
}

/// How a guest bus reaches its host. Called from any thread, never under a lock of the bus, and
/// allowed to call the bus back. Nothing here may block.
pub trait HostPort: Send + Sync {
    /// Posts a message of at most 240 bytes to `connection_id` (HvPostMessage). No further one
    /// comes before the answer.
    fn post_message(&self, connection_id: u32, message: &[u8]) -> Posted;

    /// The host was short of buffers for the `attempt`th time in a row:
    /// [`GuestBus::retry_post`](crate::GuestBus::retry_post) is to be called after a while.
    fn retry_post_later(&self, attempt: u32);

    /// Before a channel is opened: `doorbell` is what the host rings for it. Gives what signals the
    /// host. Dropping that ends the attachment; a channel attached anew replaces the former one.
    ///
    /// # Errors
    /// The status that the open is to fail with.
    fn attach(
        &self,
        channel: &OfferedChannel,
        doorbell: &Arc<dyn Doorbell>,
    ) -> Result<Arc<dyn Signal>, NtStatus>;

    /// Tells what happens to the connection. On [`ConnectionEvent::Lost`] the transport is to be
    /// closed, and [`GuestBus::host_gone`](crate::GuestBus::host_gone) called.
    fn connection_changed(&self, event: &ConnectionEvent) {
        let _ = event;
    }
}
