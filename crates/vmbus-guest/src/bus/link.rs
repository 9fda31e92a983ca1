//! A client endpoint's end of the seam.

use std::sync::Arc;

use kmcl::bus::{BusEvent, ClientLink, GpadlPages, OpenRequest, Signal};
use vmbus_memory::{MemoryError, PageRun};
use vmbus_wire::status::NtStatus;

use super::Shared;
use super::interrupt_page::LegacySignal;
use super::ring::Ring;
use crate::effect::ClientId;
use crate::machine::ConnectionState;

/// Dropping it unbinds the endpoint: its channel is closed, and free for the next one.
pub(super) struct GuestLink {
    shared: Arc<Shared>,
    id: ClientId,
}

impl GuestLink {
    pub(super) fn new(shared: Arc<Shared>, id: ClientId) -> Self {
        Self { shared, id }
    }

    /// Attaches the doorbell, prepares the rings, and has the control plane open the channel.
    fn try_open(&self, request: &OpenRequest) -> Result<(), NtStatus> {
        let shared = &self.shared;
        let (offer, doorbell, state) = {
            let state = shared.lock();
            let offer = state.guest.bound_offer(self.id).cloned();
            let doorbell = state.clients.get(&self.id).map(|c| Arc::clone(&c.doorbell));
            (offer, doorbell, state.guest.state())
        };
        let (Some(offer), Some(doorbell)) = (offer, doorbell) else {
            return Err(NtStatus::INVALID_DEVICE_STATE);
        };
        let mut signal: Arc<dyn Signal> = shared.port.attach(&offer, &doorbell)?;
        if let ConnectionState::Connected { version, .. } = state
            && !version.has_event_flags_page()
            && let Some(page) = &shared.interrupt_page
        {
            let (page, channel_id) = (page.clone(), offer.channel_id);
            signal = Arc::new(LegacySignal { page, channel_id, port: signal });
        }
        let ring =
            Ring::new(request, &shared.pages, &shared.budget, signal).map_err(memory_status)?;
        let open = ring.request(request);
        let mut ring = Some(ring); // if refused, given up outside the lock
        shared.with(|state| {
            let gpadl = state.guest.open(self.id, open).map_err(|error| error.status())?;
            state.rings.extend(ring.take().map(|ring| (gpadl, ring)));
            Ok(())
        })
    }
}

impl ClientLink for GuestLink {
    fn open(&self, request: OpenRequest) {
        if let Err(status) = self.try_open(&request) {
            let failed = BusEvent::OpenCompleted(Err(status));
            self.shared.with(|state| state.post_event(self.id, failed));
        }
    }

    fn close(&self) {
        self.shared.with(|state| state.guest.close(self.id));
    }

    fn create_gpadl(&self, pages: GpadlPages) -> Result<u32, NtStatus> {
        self.shared
            .with(|state| state.guest.create_gpadl(self.id, &pages))
            .map_err(|error| error.status())
    }

    fn teardown_gpadl(&self, gpadl: u32) {
        // Only an endpoint that is gone is unknown, and this one lives as long as its link.
        let _known = self.shared.with(|state| state.guest.teardown_gpadl(self.id, gpadl));
    }

    /// Always [`NtStatus::NOT_SUPPORTED`]: this guest makes no monitor pages.
    fn set_interrupt_latency(&self, _latency_100ns: u16) -> Result<u16, NtStatus> {
        Err(NtStatus::NOT_SUPPORTED)
    }

    fn allocate_pages(&self, pages: u32) -> Result<PageRun, NtStatus> {
        self.shared.pages.allocate(pages).map_err(memory_status)
    }
}

impl Drop for GuestLink {
    fn drop(&mut self) {
        let _endpoint_ends_outside_the_lock = self.shared.with(|state| {
            state.guest.unbind(self.id);
            state.clients.remove(&self.id)
        });
    }
}

fn memory_status(error: MemoryError) -> NtStatus {
    match error {
        MemoryError::RingPages { .. } => NtStatus::INVALID_PARAMETER,
        _ => NtStatus::INSUFFICIENT_RESOURCES,
    }
}
