//! Requests of the guest for socket connections.
//!
//! Source: vmbus-wire section 3, messages 21 and 23; devices section 4.

use std::collections::BTreeMap;

use vmbus_wire::guid::Guid;
use vmbus_wire::message::{HostMessage, TlConnectRequest, TlConnectResult};
use vmbus_wire::status::NtStatus;

use crate::effect::{Effect, HvsockRequest};
use crate::error::Refusal;
use crate::host::Host;
use crate::limits::MAX_HVSOCK_REQUESTS;

/// The requests that nobody has answered yet, by their ids.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct HvsockRequests {
    pub(crate) waiting: BTreeMap<u64, HvsockRequest>,
}

impl HvsockRequests {
    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }
}

impl Host {
    pub(crate) fn hvsock_connect(
        &mut self,
        request: &TlConnectRequest,
        silo_id: Option<Guid>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let count = self.hvsock.len();
        if count >= MAX_HVSOCK_REQUESTS {
            self.refuse_hvsock(request, NtStatus::INSUFFICIENT_RESOURCES);
            return Err(Refusal::TooManyHvsockRequests { count });
        }
        let id = self.next_serial();
        let TlConnectRequest { endpoint_id, service_id } = *request;
        let request = HvsockRequest { id, endpoint_id, service_id, silo_id };
        self.hvsock.waiting.insert(id, request);
        effects.push(Effect::ConnectHvsock(request));
        Ok(())
    }

    /// Answers [`Effect::ConnectHvsock`]. A success shows itself to the guest by the offer that
    /// whoever accepts makes; only a failure has a message. An answer that comes when the guest has
    /// gone is ignored.
    pub fn hvsock_result(&mut self, id: u64, result: Result<(), NtStatus>) {
        let Some(request) = self.hvsock.waiting.remove(&id) else { return };
        if let Err(status) = result {
            let HvsockRequest { endpoint_id, service_id, .. } = request;
            self.refuse_hvsock(&TlConnectRequest { endpoint_id, service_id }, status);
        }
    }

    fn refuse_hvsock(&mut self, request: &TlConnectRequest, status: NtStatus) {
        let version = self.connection.established().map(|established| established.version);
        if version.is_some_and(|version| version.has_hvsock_connect_result()) {
            self.send(&HostMessage::TlConnectResult(TlConnectResult::new(request, status)));
        }
    }
}
