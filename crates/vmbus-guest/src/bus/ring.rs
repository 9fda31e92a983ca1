//! The memory of a channel's two rings, on the guest's side.

use std::sync::Arc;

use kmcl::bus::{OpenRequest, OpenRings, Signal, USER_DATA_SIZE};
use vmbus_memory::{MappingBudget, MemoryError, PageAllocator, PageRun, RingPages};
use vmbus_wire::PAGE_SIZE;
use vmbus_wire::ring::{ControlPage, FeatureBits};

use crate::gpadl::MAX_GPADL_PAGES;
use crate::machine::RingRequest;

/// The pages of a channel's two rings, the outgoing one first. They are free once this is dropped.
pub(super) struct Ring {
    pages: PageRun,
    /// For the channel, until it is told that it is open.
    prepared: Option<Prepared>,
}

struct Prepared {
    incoming: RingPages,
    outgoing: RingPages,
    signal: Arc<dyn Signal>,
    user_data: [u8; USER_DATA_SIZE],
}

impl Ring {
    /// Allocates, initialises and maps the rings that `request` asks for.
    pub(super) fn new(
        request: &OpenRequest,
        pages: &PageAllocator,
        budget: &MappingBudget,
        signal: Arc<dyn Signal>,
    ) -> Result<Self, MemoryError> {
        let OpenRequest { incoming_pages, outgoing_pages, user_data, .. } = *request;
        let total = incoming_pages.saturating_add(outgoing_pages);
        if total as usize > MAX_GPADL_PAGES {
            return Err(MemoryError::RingPages { pages: total as usize, max: MAX_GPADL_PAGES });
        }
        let run = pages.allocate(total)?;
        let memory = run.memory();
        let pfns: Vec<u64> = run.pfns().collect();
        let (outgoing, incoming) =
            pfns.split_at_checked(outgoing_pages as usize).unwrap_or((&pfns, &[]));
        for control in [outgoing.first(), incoming.first()].into_iter().flatten() {
            let gpa = control * PAGE_SIZE as u64;
            memory.fill(gpa, PAGE_SIZE as u64, 0)?;
            let features = FeatureBits::PENDING_SEND_SIZE.bits().to_le_bytes();
            memory.write(gpa + u64::from(ControlPage::FEATURE_BITS), &features)?;
        }
        let prepared = Some(Prepared {
            incoming: RingPages::map(memory, incoming, budget)?,
            outgoing: RingPages::map(memory, outgoing, budget)?,
            signal,
            user_data,
        });
        Ok(Self { pages: run, prepared })
    }

    /// What the control plane tells the host of it.
    pub(super) fn request(&self, request: &OpenRequest) -> RingRequest {
        RingRequest {
            pfns: self.pages.pfns().collect(),
            outgoing_pages: request.outgoing_pages,
            target_vp: request.target_vp,
            user_data: request.user_data,
        }
    }

    /// What the channel runs its data path with. Only once.
    pub(super) fn take(&mut self) -> Option<OpenRings> {
        let Prepared { incoming, outgoing, signal, user_data } = self.prepared.take()?;
        let memory = self.pages.memory().clone();
        let (residency, resumed) = (None, false);
        Some(OpenRings { incoming, outgoing, memory, signal, residency, user_data, resumed })
    }
}
