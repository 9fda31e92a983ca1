//! What a guest may send.

use super::{
    CloseChannel, CloseReservedChannel, Direction, GpadlBody, GpadlHeader, GpadlTeardown,
    InitiateContact, InitiateContactV2, MessageBuffer, MessageError, MessageType, ModifyChannel,
    ModifyConnection, OpenChannel, OpenChannelV2, OpenReservedChannel, RelIdReleased,
    TlConnectRequest, TlConnectRequestV2, fits, read, split,
};
use crate::version::Negotiated;

/// A control message from guest to host. Parsed from a private copy; `'a` is that copy's, used by the
/// two GPADL messages only.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GuestMessage<'a> {
    /// 3: which channels are there?
    RequestOffers,
    /// 5, short form.
    OpenChannel(OpenChannel),
    /// 5, where the features give it its long form.
    OpenChannelV2(OpenChannelV2),
    /// 7.
    CloseChannel(CloseChannel),
    /// 8.
    GpadlHeader(GpadlHeader<'a>),
    /// 9.
    GpadlBody(GpadlBody<'a>),
    /// 11.
    GpadlTeardown(GpadlTeardown),
    /// 13.
    RelIdReleased(RelIdReleased),
    /// 14, without a client id.
    InitiateContact(InitiateContact),
    /// 14, with a client id.
    InitiateContactV2(InitiateContactV2),
    /// 16: end the connection.
    Unload,
    /// 18.
    OpenReservedChannel(OpenReservedChannel),
    /// 19.
    CloseReservedChannel(CloseReservedChannel),
    /// 21, without a silo id.
    TlConnectRequest(TlConnectRequest),
    /// 21, with a silo id.
    TlConnectRequestV2(TlConnectRequestV2),
    /// 22.
    ModifyChannel(ModifyChannel),
    /// 25.
    ModifyConnection(ModifyConnection),
    /// 27: send no more messages for now.
    Pause,
    /// 29: send messages again.
    Resume,
}

impl<'a> GuestMessage<'a> {
    /// Parses a message that a guest has posted: all of `bytes`, header first. `negotiated` is `None`
    /// while the guest is not connected.
    ///
    /// # Errors
    /// [`MessageError`]; [`MessageError::NotFromGuest`] for what only a host sends.
    pub fn parse(bytes: &'a [u8], negotiated: Option<Negotiated>) -> Result<Self, MessageError> {
        let (message, body) = split(bytes)?;
        if message.direction() != Direction::GuestToHost {
            return Err(MessageError::NotFromGuest { message });
        }
        super::check_allowed(message, negotiated)?;
        Ok(match message {
            MessageType::RequestOffers => Self::RequestOffers,
            MessageType::OpenChannel => {
                if negotiated.is_some_and(|(_, features)| features.has_open_v2()) {
                    Self::OpenChannelV2(read(message, body)?)
                } else {
                    Self::OpenChannel(read(message, body)?)
                }
            }
            MessageType::CloseChannel => Self::CloseChannel(read(message, body)?),
            MessageType::GpadlHeader => Self::GpadlHeader(GpadlHeader::parse(body)?),
            MessageType::GpadlBody => Self::GpadlBody(GpadlBody::parse(body)?),
            MessageType::GpadlTeardown => Self::GpadlTeardown(read(message, body)?),
            MessageType::RelIdReleased => Self::RelIdReleased(read(message, body)?),
            MessageType::InitiateContact => {
                let contact: InitiateContact = read(message, body)?;
                if contact.has_client_id() {
                    Self::InitiateContactV2(read(message, body)?)
                } else {
                    Self::InitiateContact(contact)
                }
            }
            MessageType::Unload => Self::Unload,
            MessageType::OpenReservedChannel => Self::OpenReservedChannel(read(message, body)?),
            MessageType::CloseReservedChannel => Self::CloseReservedChannel(read(message, body)?),
            MessageType::TlConnectRequest => {
                let may_have_silo =
                    negotiated.is_some_and(|(version, _)| version.has_hvsock_silo());
                if may_have_silo && fits::<TlConnectRequestV2>(body) {
                    Self::TlConnectRequestV2(read(message, body)?)
                } else {
                    Self::TlConnectRequest(read(message, body)?)
                }
            }
            MessageType::ModifyChannel => Self::ModifyChannel(read(message, body)?),
            MessageType::ModifyConnection => Self::ModifyConnection(read(message, body)?),
            MessageType::Pause => Self::Pause,
            MessageType::Resume => Self::Resume,
            MessageType::OfferChannel
            | MessageType::RescindChannelOffer
            | MessageType::AllOffersDelivered
            | MessageType::OpenChannelResult
            | MessageType::GpadlCreated
            | MessageType::GpadlTorndown
            | MessageType::VersionResponse
            | MessageType::UnloadComplete
            | MessageType::CloseReservedResponse
            | MessageType::TlConnectResult
            | MessageType::ModifyChannelResponse
            | MessageType::ModifyConnectionResponse
            | MessageType::PauseResponse => return Err(MessageError::NotFromGuest { message }),
        })
    }

    /// The message's type.
    #[must_use]
    pub const fn message_type(&self) -> MessageType {
        match self {
            Self::RequestOffers => MessageType::RequestOffers,
            Self::OpenChannel(_) | Self::OpenChannelV2(_) => MessageType::OpenChannel,
            Self::CloseChannel(_) => MessageType::CloseChannel,
            Self::GpadlHeader(_) => MessageType::GpadlHeader,
            Self::GpadlBody(_) => MessageType::GpadlBody,
            Self::GpadlTeardown(_) => MessageType::GpadlTeardown,
            Self::RelIdReleased(_) => MessageType::RelIdReleased,
            Self::InitiateContact(_) | Self::InitiateContactV2(_) => MessageType::InitiateContact,
            Self::Unload => MessageType::Unload,
            Self::OpenReservedChannel(_) => MessageType::OpenReservedChannel,
            Self::CloseReservedChannel(_) => MessageType::CloseReservedChannel,
            Self::TlConnectRequest(_) | Self::TlConnectRequestV2(_) => {
                MessageType::TlConnectRequest
            }
            Self::ModifyChannel(_) => MessageType::ModifyChannel,
            Self::ModifyConnection(_) => MessageType::ModifyConnection,
            Self::Pause => MessageType::Pause,
            Self::Resume => MessageType::Resume,
        }
    }

    /// Writes the message into `buffer`, in place of what is there.
    pub fn encode(&self, buffer: &mut MessageBuffer) {
        let message = self.message_type();
        match self {
            Self::RequestOffers | Self::Unload | Self::Pause | Self::Resume => {
                buffer.begin(message);
            }
            Self::OpenChannel(body) => buffer.put(message, body),
            Self::OpenChannelV2(body) => buffer.put(message, body),
            Self::CloseChannel(body) => buffer.put(message, body),
            Self::GpadlHeader(header) => header.encode(buffer),
            Self::GpadlBody(body) => body.encode(buffer),
            Self::GpadlTeardown(body) => buffer.put(message, body),
            Self::RelIdReleased(body) => buffer.put(message, body),
            Self::InitiateContact(body) => buffer.put(message, body),
            Self::InitiateContactV2(body) => buffer.put(message, body),
            Self::OpenReservedChannel(body) => buffer.put(message, body),
            Self::CloseReservedChannel(body) => buffer.put(message, body),
            Self::TlConnectRequest(body) => buffer.put(message, body),
            Self::TlConnectRequestV2(body) => buffer.put(message, body),
            Self::ModifyChannel(body) => buffer.put(message, body),
            Self::ModifyConnection(body) => buffer.put(message, body),
        }
    }

    /// The message as bytes.
    #[must_use]
    pub fn to_buffer(&self) -> MessageBuffer {
        let mut buffer = MessageBuffer::new();
        self.encode(&mut buffer);
        buffer
    }
}
