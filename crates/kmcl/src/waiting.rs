//! Incoming packets that nobody has: taken from the ring, and waiting to come to the device.
//!
//! They stand in a line in front of the ring. One gets there when its callback hands it back, when its
//! device hands it over to a frozen channel, or when it comes out of a saved state. The room for its
//! completion stays promised.

use crate::fenced::Fence;
use crate::pool::Body;

/// See the module.
pub(crate) struct Waiting {
    pub(crate) body: Box<Body>,
    pub(crate) why: Why,
}

/// Why a packet waits, and so how it is delivered.
pub(crate) enum Why {
    /// Its callback handed it back: it is delivered as if for the first time.
    HandedBack {
        /// Only a thread that may sleep may deliver it.
        at_passive: bool,
        /// Not before the bus says that memory has arrived.
        after_memory: bool,
    },
    /// Its device handed it over, here or before a restore.
    HandedOver {
        fence: Fence,
        /// What the device keeps with it.
        state: Box<[u8]>,
    },
    /// Its device completed it before a restore: the body keeps the completion, and the device does
    /// not see it any more.
    Completed,
}

impl Waiting {
    /// Memory has arrived.
    pub(crate) fn forget_memory(&mut self) {
        if let Why::HandedBack { after_memory, .. } = &mut self.why {
            *after_memory = false;
        }
    }
}
