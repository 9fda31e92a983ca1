//! C's callbacks as the library wants them: the level and the thread's context are set, the channel is
//! named by its handle.
#![allow(unsafe_code, reason = "calls functions that C gave")]

use std::sync::Arc;

use kmcl::{Channel, NtStatus};

use crate::boundary::from_c;
use crate::context::in_state_callback;
use crate::handle::Handle;
use crate::types::{PnpFailure, StateChangeCallbacks, StateChanged};

/// EvtVmbChannelOpened and its four relatives. Installed in every channel, since the library's own
/// cleaning-up hangs on the last of them.
pub(crate) struct StateCallbacks {
    pub(crate) handle: Handle,
    pub(crate) callbacks: StateChangeCallbacks,
    /// Called when the channel is closed, after C.
    pub(crate) closed: Arc<dyn Fn() + Send + Sync>,
}

impl StateCallbacks {
    fn call(&self, callback: Option<StateChanged>) {
        if let Some(callback) = callback {
            // SAFETY: C gave the function for this channel, and its type by the table's layout.
            in_state_callback(self.handle, || unsafe { callback(self.handle.to_pointer()) });
        }
    }
}

impl kmcl::StateChange for StateCallbacks {
    fn opened(&self, _: &Channel) -> Result<(), NtStatus> {
        let Some(opened) = self.callbacks.opened else { return Ok(()) };
        // SAFETY: as for `call`.
        let status = in_state_callback(self.handle, || unsafe { opened(self.handle.to_pointer()) });
        let status = from_c(status);
        if status.is_success() { Ok(()) } else { Err(status) }
    }

    fn started(&self, _: &Channel) {
        self.call(self.callbacks.started);
    }

    fn post_started(&self, _: &Channel) {
        self.call(self.callbacks.post_started);
    }

    fn suspend(&self, _: &Channel) {
        self.call(self.callbacks.suspend);
    }

    fn closed(&self, _: &Channel) {
        self.call(self.callbacks.closed);
        (self.closed)();
    }
}

/// EvtVmbChannelPnpFailure.
pub(crate) struct PnpFailed {
    pub(crate) handle: Handle,
    pub(crate) callback: PnpFailure,
}

impl kmcl::PnpFailure for PnpFailed {
    fn pnp_failure(&self, _: &Channel, status: NtStatus) {
        let status = crate::boundary::to_c(status);
        // SAFETY: C gave the function for this channel.
        in_state_callback(self.handle, || unsafe {
            (self.callback)(self.handle.to_pointer(), status)
        });
    }
}
