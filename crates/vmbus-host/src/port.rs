//! What a transport gives a host: the way to one guest.

use std::io;
use std::sync::Arc;

use kmcl::bus::{Doorbell, Signal};
use vmbus_memory::GuestMemory;

use crate::outgoing::SlotId;

/// The way to one guest, seen from a [`HostBus`](crate::HostBus): a hypervisor's SynIC, a socket to
/// another process, a test.
///
/// The bus calls a port with no lock held, from whatever thread has brought it something to do; the
/// methods that act on the guest, one call at a time and in order. A port may call the bus back from
/// inside a call; what that causes happens after the call has returned.
///
/// What comes from the guest goes to the bus:
///
/// | the guest | the transport calls |
/// |---|---|
/// | posts a message (HvPostMessage) | [`HostBus::post_message`](crate::HostBus::post_message), and gives the guest the status |
/// | signals a connection that the port listens to | the doorbell given to [`GuestPort::listen`] |
/// | signals another connection (HvSignalEvent) | [`HostBus::guest_signal`](crate::HostBus::guest_signal), and gives the guest the status |
/// | empties a message slot that was busy | [`HostBus::messages_drained`](crate::HostBus::messages_drained) |
/// | is reset, ends, or is there for the first time | [`HostBus::guest_reset`](crate::HostBus::guest_reset) |
pub trait GuestPort: Send + Sync {
    /// The guest's memory; `None` while there is no guest. Asked when the bus is made, and at each
    /// reset; for a bus that was restored, when that is finished.
    fn memory(&self) -> Option<GuestMemory>;

    /// The number of virtual processors; VP indices are below it. Asked together with the memory.
    fn vp_count(&self) -> u32;

    /// Puts a VMBus message (message type 1) into a slot and interrupts the VP. `message` is the
    /// payload, 240 bytes at most. Where the guest is gone, the message is [`Posted::Taken`].
    fn post_message(&self, slot: SlotId, message: &[u8]) -> Posted;

    /// The way to signal the guest by an event flag: sets flag number `flag` (0 to 2047) of that SINT
    /// in the event page of that VP, and interrupts the VP if it was clear. `vp` is below the
    /// number of VPs, `sint` below 16.
    ///
    /// The signal must not call the bus, and be usable from any thread for as long as it lives.
    ///
    /// # Errors
    /// Whatever the system says; the guest's open fails.
    fn event_flag(&self, vp: u32, sint: u8, flag: u16) -> io::Result<Arc<dyn Signal>>;

    /// From now on the guest's signals to `connection_id` ring `doorbell`: by its eventfd, or by
    /// [`Doorbell::ring`]. There is one doorbell to a connection at most.
    ///
    /// A port that traps every signal, and passes it to
    /// [`HostBus::guest_signal`](crate::HostBus::guest_signal), need do nothing here.
    ///
    /// # Errors
    /// Whatever the system says; the guest's open fails.
    fn listen(&self, connection_id: u32, doorbell: Arc<dyn Doorbell>) -> io::Result<()>;

    /// Ends [`GuestPort::listen`].
    fn unlisten(&self, connection_id: u32);
}

/// What became of a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Posted {
    /// It is in the slot.
    Taken,
    /// The slot holds a message that the guest has not taken. Nothing was done;
    /// [`HostBus::messages_drained`](crate::HostBus::messages_drained) is to follow when the slot is
    /// empty, and must not be lost if the slot becomes empty during the call.
    Busy,
}
