//! What a host may send.

use super::{
    CloseReservedResponse, Direction, GpadlCreated, GpadlTorndown, MessageBuffer, MessageError,
    MessageType, ModifyChannelResponse, ModifyConnectionResponse, OfferChannel, OpenChannelResult,
    RescindChannelOffer, TlConnectResult, VersionResponse, VersionResponseV2, VersionResponseV3,
    fits, read, split,
};
use crate::version::{FeatureFlags, Negotiated};

/// A control message from host to guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HostMessage {
    /// 1.
    OfferChannel(OfferChannel),
    /// 2.
    RescindChannelOffer(RescindChannelOffer),
    /// 4: that is all for now.
    AllOffersDelivered,
    /// 6.
    OpenChannelResult(OpenChannelResult),
    /// 10.
    GpadlCreated(GpadlCreated),
    /// 12.
    GpadlTorndown(GpadlTorndown),
    /// 15, below 6.0 or for a version that is not supported.
    VersionResponse(VersionResponse),
    /// 15, from 6.0 on.
    VersionResponseV2(VersionResponseV2),
    /// 15, with monitor pages of the host's.
    VersionResponseV3(VersionResponseV3),
    /// 17: the connection is forgotten.
    UnloadComplete,
    /// 20.
    CloseReservedResponse(CloseReservedResponse),
    /// 23.
    TlConnectResult(TlConnectResult),
    /// 24.
    ModifyChannelResponse(ModifyChannelResponse),
    /// 26.
    ModifyConnectionResponse(ModifyConnectionResponse),
    /// 28: no more messages until RESUME.
    PauseResponse,
}

impl HostMessage {
    /// Parses a message that a host has sent: all of `bytes`, header first.
    ///
    /// `negotiated` is what was agreed on; while INITIATE_CONTACT is unanswered, what it asked for,
    /// which decides the form of the answer; `None` when neither holds.
    ///
    /// # Errors
    /// [`MessageError`]; [`MessageError::NotFromHost`] for what only a guest sends.
    pub fn parse(bytes: &[u8], negotiated: Option<Negotiated>) -> Result<Self, MessageError> {
        let (message, body) = split(bytes)?;
        if message.direction() != Direction::HostToGuest {
            return Err(MessageError::NotFromHost { message });
        }
        super::check_allowed(message, negotiated)?;
        Ok(match message {
            MessageType::OfferChannel => Self::OfferChannel(read(message, body)?),
            MessageType::RescindChannelOffer => Self::RescindChannelOffer(read(message, body)?),
            MessageType::AllOffersDelivered => Self::AllOffersDelivered,
            MessageType::OpenChannelResult => Self::OpenChannelResult(read(message, body)?),
            MessageType::GpadlCreated => Self::GpadlCreated(read(message, body)?),
            MessageType::GpadlTorndown => Self::GpadlTorndown(read(message, body)?),
            MessageType::VersionResponse => Self::version_response(body, negotiated)?,
            MessageType::UnloadComplete => Self::UnloadComplete,
            MessageType::CloseReservedResponse => Self::CloseReservedResponse(read(message, body)?),
            MessageType::TlConnectResult => Self::TlConnectResult(read(message, body)?),
            MessageType::ModifyChannelResponse => Self::ModifyChannelResponse(read(message, body)?),
            MessageType::ModifyConnectionResponse => {
                Self::ModifyConnectionResponse(read(message, body)?)
            }
            MessageType::PauseResponse => Self::PauseResponse,
            MessageType::RequestOffers
            | MessageType::OpenChannel
            | MessageType::CloseChannel
            | MessageType::GpadlHeader
            | MessageType::GpadlBody
            | MessageType::GpadlTeardown
            | MessageType::RelIdReleased
            | MessageType::InitiateContact
            | MessageType::Unload
            | MessageType::OpenReservedChannel
            | MessageType::CloseReservedChannel
            | MessageType::TlConnectRequest
            | MessageType::ModifyChannel
            | MessageType::ModifyConnection
            | MessageType::Pause
            | MessageType::Resume => return Err(MessageError::NotFromHost { message }),
        })
    }

    /// A host that refuses 6.0 answers in the form of old; so does one that was asked for less.
    fn version_response(body: &[u8], negotiated: Option<Negotiated>) -> Result<Self, MessageError> {
        let message = MessageType::VersionResponse;
        let response: VersionResponse = read(message, body)?;
        let has_features = match negotiated {
            Some((version, _)) => version.has_feature_flags(),
            None => fits::<VersionResponseV2>(body),
        };
        if !response.is_supported() || !has_features {
            return Ok(Self::VersionResponse(response));
        }
        let response: VersionResponseV2 = read(message, body)?;
        if !response.features().contains(FeatureFlags::SERVER_SPECIFIED_MONITOR_PAGES) {
            return Ok(Self::VersionResponseV2(response));
        }
        Ok(Self::VersionResponseV3(read(message, body)?))
    }

    /// The message's type.
    #[must_use]
    pub const fn message_type(&self) -> MessageType {
        match self {
            Self::OfferChannel(_) => MessageType::OfferChannel,
            Self::RescindChannelOffer(_) => MessageType::RescindChannelOffer,
            Self::AllOffersDelivered => MessageType::AllOffersDelivered,
            Self::OpenChannelResult(_) => MessageType::OpenChannelResult,
            Self::GpadlCreated(_) => MessageType::GpadlCreated,
            Self::GpadlTorndown(_) => MessageType::GpadlTorndown,
            Self::VersionResponse(_) | Self::VersionResponseV2(_) | Self::VersionResponseV3(_) => {
                MessageType::VersionResponse
            }
            Self::UnloadComplete => MessageType::UnloadComplete,
            Self::CloseReservedResponse(_) => MessageType::CloseReservedResponse,
            Self::TlConnectResult(_) => MessageType::TlConnectResult,
            Self::ModifyChannelResponse(_) => MessageType::ModifyChannelResponse,
            Self::ModifyConnectionResponse(_) => MessageType::ModifyConnectionResponse,
            Self::PauseResponse => MessageType::PauseResponse,
        }
    }

    /// Writes the message into `buffer`, in place of what is there.
    pub fn encode(&self, buffer: &mut MessageBuffer) {
        let message = self.message_type();
        match self {
            Self::AllOffersDelivered | Self::UnloadComplete | Self::PauseResponse => {
                buffer.begin(message);
            }
            Self::OfferChannel(body) => buffer.put(message, body),
            Self::RescindChannelOffer(body) => buffer.put(message, body),
            Self::OpenChannelResult(body) => buffer.put(message, body),
            Self::GpadlCreated(body) => buffer.put(message, body),
            Self::GpadlTorndown(body) => buffer.put(message, body),
            Self::VersionResponse(body) => buffer.put(message, body),
            Self::VersionResponseV2(body) => buffer.put(message, body),
            Self::VersionResponseV3(body) => buffer.put(message, body),
            Self::CloseReservedResponse(body) => buffer.put(message, body),
            Self::TlConnectResult(body) => buffer.put(message, body),
            Self::ModifyChannelResponse(body) => buffer.put(message, body),
            Self::ModifyConnectionResponse(body) => buffer.put(message, body),
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
