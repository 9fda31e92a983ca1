//! Who answers a guest's requests for socket connections.

use vmbus_wire::guid::Guid;
use vmbus_wire::status::NtStatus;

use crate::bus::HostBus;
use crate::effect::HvsockRequest;

/// Accepts or refuses a guest's requests for socket connections to the host.
pub trait HvsockHandler: Send + Sync {
    /// The guest asks. The answer may come later, from any thread; no lock of the bus is held.
    fn connect(&self, request: HvsockConnect);
}

/// A request that waits for its answer. Dropping it refuses it.
pub struct HvsockConnect {
    bus: HostBus,
    request: HvsockRequest,
    answer: Option<Result<(), NtStatus>>,
}

impl HvsockConnect {
    pub(crate) fn new(bus: HostBus, request: HvsockRequest) -> Self {
        Self { bus, request, answer: None }
    }

    /// The guest's end: the instance that the connection's offer must have.
    #[must_use]
    pub fn endpoint_id(&self) -> Guid {
        self.request.endpoint_id
    }

    /// The service asked for: the interface type that the connection's offer must have.
    #[must_use]
    pub fn service_id(&self) -> Guid {
        self.request.service_id
    }

    /// The container that asks, where the guest says so.
    #[must_use]
    pub fn silo_id(&self) -> Option<Guid> {
        self.request.silo_id
    }

    /// Says that the connection is there: a channel of this service and endpoint has been offered.
    /// No message tells the guest more than that offer.
    pub fn accept(mut self) {
        self.answer = Some(Ok(()));
    }

    /// Refuses, with a status that the guest is told from version 4.1 on.
    pub fn refuse(mut self, status: NtStatus) {
        self.answer = Some(Err(status));
    }
}

impl Drop for HvsockConnect {
    fn drop(&mut self) {
        let answer = self.answer.unwrap_or(Err(NtStatus::CONNECTION_REFUSED));
        self.bus.step(|host, _| host.hvsock_result(self.request.id, answer));
    }
}

impl std::fmt::Debug for HvsockConnect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("HvsockConnect").field(&self.request).finish()
    }
}
