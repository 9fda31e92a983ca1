//! What other threads leave for whoever serves the broker.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::io::Errno;
use vmbus_host::{HvsockConnect, HvsockHandler};

use crate::poller::Bell;

/// See the module. Bounded: the bus has a bound for requests that nobody has answered
/// ([`vmbus_host::limits::MAX_HVSOCK_REQUESTS`]), and a connection reports once.
#[derive(Debug)]
pub(crate) struct Inbox {
    pub(crate) bell: Bell,
    waiting: Mutex<Waiting>,
}

/// What was left.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// The guest's requests, oldest first.
    pub(crate) requests: Vec<HvsockConnect>,
    /// Connections that have ended.
    pub(crate) ended: Vec<u64>,
}

impl Inbox {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self { bell: Bell::new()?, waiting: Mutex::default() })
    }

    /// The connection has ended, and its offer is to be withdrawn.
    pub(crate) fn report(&self, token: u64) {
        self.leave(|waiting| waiting.ended.push(token));
    }

    pub(crate) fn take(&self) -> Waiting {
        self.bell.clear(); // before the look: what comes later rings again
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn leave(&self, put: impl FnOnce(&mut Waiting)) {
        put(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        self.bell.ring();
    }
}

/// Takes the guest's requests, on whatever thread brings them: often that of a virtual processor, so
/// nothing else is done there. Outlives the inbox in the hands of the bus.
pub(crate) struct Requests(pub(crate) Weak<Inbox>);

impl HvsockHandler for Requests {
    fn connect(&self, request: HvsockConnect) {
        // Dropped without an inbox, which refuses it.
        if let Some(inbox) = self.0.upgrade() {
            inbox.leave(|waiting| waiting.requests.push(request));
        }
    }
}

impl Requests {
    pub(crate) fn of(inbox: &Arc<Inbox>) -> Arc<Self> {
        Arc::new(Self(Arc::downgrade(inbox)))
    }
}
