//! A device's end of the seam.

use std::sync::atomic::{AtomicBool, Ordering};

use kmcl::bus::{GpadlPages, ServerLink};
use vmbus_wire::status::NtStatus;

use crate::bus::HostBus;
use crate::offer::OfferId;

/// Withdraws the offer when dropped, unless its channel has moved away, or it was taken back.
pub(crate) struct HostLink {
    bus: HostBus,
    offer: OfferId,
    has_let_go: AtomicBool,
}

impl HostLink {
    pub(crate) fn new(bus: HostBus, offer: OfferId) -> Self {
        Self { bus, offer, has_let_go: AtomicBool::new(false) }
    }
}

impl ServerLink for HostLink {
    fn open_result(&self, status: NtStatus) {
        self.bus.step(|host, effects| host.open_result(self.offer, status, effects));
    }

    fn closed(&self) {
        self.bus.step(|host, effects| host.closed(self.offer, effects));
    }

    fn revoke(&self) {
        if self.bus.revoke(self.offer) {
            self.has_let_go.store(true, Ordering::Relaxed);
        }
    }

    fn moved_away(&self) {
        self.has_let_go.store(true, Ordering::Relaxed);
        self.bus.forget_device(self.offer);
    }

    fn gpadl(&self, gpadl: u32) -> Result<GpadlPages, NtStatus> {
        let pages = self.bus.inspect(|host| host.gpadl(self.offer, gpadl));
        pages.map_err(|_| NtStatus::INVALID_PARAMETER_3)
    }

    fn set_gpadl_in_use(&self, gpadl: u32, in_use: bool) {
        self.bus.step(|host, _| host.set_gpadl_in_use(self.offer, gpadl, in_use));
    }
}

impl Drop for HostLink {
    fn drop(&mut self) {
        if !self.has_let_go.load(Ordering::Relaxed) {
            self.bus.drop_device(self.offer);
        }
    }
}
