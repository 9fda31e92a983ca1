//! From a message's bytes to the one method that knows what it means.

use vmbus_wire::guid::Guid;
use vmbus_wire::message::{
    ConnectionState, HostMessage, MessageError, MessageType, VersionResponseV3,
};
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::FeatureFlags;

use super::Guest;
use super::connection::{Connection, Pause};
use crate::effect::{ClientEvent, ConnectionEvent};
use crate::error::{ContactError, HostError};

impl Guest {
    pub(super) fn dispatch(&mut self, bytes: &[u8]) -> Result<(), HostError> {
        let message = match HostMessage::parse(bytes, self.connection.negotiated(&self.config)) {
            Ok(message) => message,
            Err(error) => return Err(self.unreadable(error)),
        };
        // Only these two answer something that was asked outside a connection.
        match &message {
            HostMessage::VersionResponse(response) => {
                return self.version_response(response, FeatureFlags::empty());
            }
            HostMessage::VersionResponseV2(answer)
            | HostMessage::VersionResponseV3(VersionResponseV3 { response: answer, .. }) => {
                return self.version_response(&answer.response, answer.features());
            }
            HostMessage::UnloadComplete => return self.unload_complete(),
            _ => {}
        }
        let kind = message.message_type();
        match &mut self.connection {
            Connection::Connected(session) if session.pause != Pause::Paused => {}
            // What was on its way when the connection was given up means nothing any more.
            Connection::Unloading(_) | Connection::Contacting { .. } => return Ok(()),
            _ => return Err(self.unexpected(kind)),
        }
        match message {
            HostMessage::OfferChannel(offer) => self.offered(&offer),
            HostMessage::RescindChannelOffer(rescind) => self.rescind(rescind.channel_id.get()),
            HostMessage::AllOffersDelivered => self.all_offers_delivered(),
            HostMessage::OpenChannelResult(result) => {
                self.open_result(result.channel_id.get(), result.open_id.get(), result.status.get())
            }
            HostMessage::GpadlCreated(created) => self.gpadl_created(
                created.channel_id.get(),
                created.gpadl_id.get(),
                created.status.get(),
            ),
            HostMessage::GpadlTorndown(torn_down) => self.gpadl_torn_down(torn_down.gpadl_id.get()),
            HostMessage::ModifyChannelResponse(response) => {
                self.modify_response(response.channel_id.get(), response.status.get())
            }
            HostMessage::TlConnectResult(result) => {
                self.hvsock_result(result.endpoint_id, result.service_id, result.status.get())
            }
            HostMessage::ModifyConnectionResponse(response) => {
                self.connection_modified(response.state())
            }
            HostMessage::PauseResponse => self.paused(),
            // Reserved channels are for crash dumps of kernels; this guest opens none.
            HostMessage::CloseReservedResponse(_)
            | HostMessage::VersionResponse(_)
            | HostMessage::VersionResponseV2(_)
            | HostMessage::VersionResponseV3(_)
            | HostMessage::UnloadComplete => Err(self.unexpected(kind)),
        }
    }

    /// A version response that cannot be read is all the answer there will be.
    fn unreadable(&mut self, error: MessageError) -> HostError {
        let is_answer =
            matches!(error, MessageError::Truncated { message: MessageType::VersionResponse, .. });
        if is_answer && matches!(self.connection, Connection::Contacting { .. }) {
            let error = ContactError::Answer(error);
            self.lose(error.into());
            return error.into();
        }
        error.into()
    }

    fn all_offers_delivered(&mut self) -> Result<(), HostError> {
        match &mut self.connection {
            Connection::Connected(session) if !session.offers_delivered => {
                session.offers_delivered = true;
                self.announce(ConnectionEvent::OffersDelivered);
                Ok(())
            }
            _ => Err(self.unexpected(MessageType::AllOffersDelivered)),
        }
    }

    fn connection_modified(&mut self, connection_state: ConnectionState) -> Result<(), HostError> {
        match &mut self.connection {
            Connection::Connected(session) if session.modifying => {
                session.modifying = false;
                self.announce(ConnectionEvent::ConnectionModified { connection_state });
                Ok(())
            }
            _ => Err(self.unexpected(MessageType::ModifyConnectionResponse)),
        }
    }

    fn paused(&mut self) -> Result<(), HostError> {
        match &mut self.connection {
            Connection::Connected(session) if session.pause == Pause::Pausing => {
                session.pause = Pause::Paused;
                self.announce(ConnectionEvent::Paused);
                Ok(())
            }
            _ => Err(self.unexpected(MessageType::PauseResponse)),
        }
    }

    /// TL_CONNECT_RESULT: sent for a refused request only.
    fn hvsock_result(
        &mut self,
        endpoint_id: Guid,
        service_id: Guid,
        status: u32,
    ) -> Result<(), HostError> {
        let request = (endpoint_id, service_id);
        let Connection::Connected(session) = &mut self.connection else {
            return Err(self.unexpected(MessageType::TlConnectResult));
        };
        let Some(index) = session.hvsock.iter().position(|pending| *pending == request) else {
            return Err(HostError::UnknownHvsock { endpoint_id, service_id });
        };
        session.hvsock.swap_remove(index);
        let status = failure(status);
        self.announce(ConnectionEvent::HvsockRefused { endpoint_id, service_id, status });
        for id in self.waiting_for(service_id, endpoint_id) {
            self.give_up_client(id, ClientEvent::ConnectFailed(status));
        }
        Ok(())
    }
}

/// A status that the protocol calls a failure, whatever number the host has put there.
pub(super) fn failure(status: u32) -> NtStatus {
    match NtStatus(status) {
        lie if lie.is_success() => NtStatus::UNSUCCESSFUL,
        status => status,
    }
}
