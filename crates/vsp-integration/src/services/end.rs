//! The host's end of one service's channel: what the library calls.

use std::sync::Arc;

use kmcl::{Channel, IncomingPacket, NtStatus, ProcessPacket, SaveRestorePacket, StateChange};

use super::{Core, lock};
use crate::protocol::Outcome;
use crate::wire::Service;

/// See the module.
pub(super) struct End {
    /// A circle, which closing the services opens.
    pub(super) core: Arc<Core>,
    pub(super) service: Service,
}

impl End {
    /// Does what came of a callback's step. No freeze comes in between: it waits for callbacks.
    fn perform(&self, outcome: Outcome) {
        let Outcome { message, event } = outcome;
        if let Some(message) = message {
            self.core.send(self.service, &message);
        }
        if let Some(event) = event {
            self.core.observer.happened(event);
        }
    }
}

impl ProcessPacket for End {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        let heard = lock(&self.core.state).protocol.received(self.service, packet.payload());
        // Before the observer: it may take its time.
        packet.complete(&[]);
        match heard {
            Ok(outcome) => self.perform(outcome),
            Err(error) => tracing::debug!(%error, service = %self.service, "message ignored"),
        }
    }
}

impl StateChange for End {
    fn opened(&self, channel: &Channel) -> Result<(), NtStatus> {
        let can_send = self.core.can_send(self.service);
        let outcome = {
            let mut state = lock(&self.core.state);
            // A guest that had it open before a restore goes on where the saved state says.
            match channel.is_resumed() {
                true => state.protocol.resumed(self.service, can_send),
                false => state.protocol.opened(self.service),
            }
        };
        self.perform(outcome);
        Ok(())
    }

    fn closed(&self, _channel: &Channel) {
        let outcome = lock(&self.core.state).protocol.closed(self.service);
        self.perform(outcome);
    }
}

/// Only messages that wait for room in the ring can be in flight, and there is nothing to know of them.
impl SaveRestorePacket for End {
    fn restore_packet(
        &self,
        channel: &Channel,
        library_state: &[u8],
        _own_state: &[u8],
    ) -> Result<(), NtStatus> {
        let packet = channel.packet_allocate().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
        packet.restore(library_state).map_err(|refused| refused.error.status())
    }
}
