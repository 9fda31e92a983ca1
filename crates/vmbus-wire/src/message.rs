//! Control messages: everything guest and host say to each other outside the rings.
//!
//! A message is an 8-byte [`MessageHeader`] and a body, 240 bytes at most. Each body has a struct
//! here, in the module of its family; [`GuestMessage`] and [`HostMessage`] are what the two sides may
//! send, and parse and encode whole messages. Sizes in the documentation include the header.
//!
//! Bytes behind a message's structure are tolerated: some guests, boot firmware among them, always
//! post 240 bytes. A message shorter than its structure is an error. Where a message has several
//! forms, the negotiated version, the feature flags and the size decide, in this order.
//!
//! | family | messages |
//! |---|---|
//! | [`contact`] | 14 INITIATE_CONTACT, 15 VERSION_RESPONSE, 16 UNLOAD, 17 UNLOAD_COMPLETE |
//! | [`offer`] | 1 OFFER_CHANNEL, 2 RESCIND_CHANNEL_OFFER, 3 REQUEST_OFFERS, 4 ALL_OFFERS_DELIVERED, 13 REL_ID_RELEASED |
//! | [`open`] | 5 OPEN_CHANNEL, 6 OPEN_CHANNEL_RESULT, 7 CLOSE_CHANNEL |
//! | [`gpadl`] | 8 GPADL_HEADER, 9 GPADL_BODY, 10 GPADL_CREATED, 11 GPADL_TEARDOWN, 12 GPADL_TORNDOWN |
//! | [`reserved`] | 18 OPEN_RESERVED_CHANNEL, 19 CLOSE_RESERVED_CHANNEL, 20 CLOSE_RESERVED_RESPONSE |
//! | [`hvsock`] | 21 TL_CONNECT_REQUEST, 23 TL_CONNECT_RESULT |
//! | [`modify`] | 22 MODIFY_CHANNEL, 24 MODIFY_CHANNEL_RESPONSE, 25 MODIFY_CONNECTION, 26 MODIFY_CONNECTION_RESPONSE |
//! | (no body) | 27 PAUSE, 28 PAUSE_RESPONSE, 29 RESUME |
//!
//! Source: vmbus-wire sections 1 and 3.

mod buffer;
pub mod contact;
mod error;
pub mod gpadl;
mod guest;
mod host;
pub mod hvsock;
mod kind;
pub mod modify;
pub mod offer;
pub mod open;
pub mod reserved;
#[cfg(test)]
mod tests;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use self::buffer::MessageBuffer;
pub use self::contact::{
    ConnectionState, InitiateContact, InitiateContactV2, VersionResponse, VersionResponseV2,
    VersionResponseV3,
};
pub use self::error::MessageError;
pub use self::gpadl::{
    GpadlBody, GpadlCreated, GpadlError, GpadlHeader, GpadlMessages, GpadlTeardown, GpadlTorndown,
};
pub use self::guest::GuestMessage;
pub use self::host::HostMessage;
pub use self::hvsock::{TlConnectRequest, TlConnectRequestV2, TlConnectResult};
pub use self::kind::{Direction, MessageType};
pub use self::modify::{
    ModifyChannel, ModifyChannelResponse, ModifyConnection, ModifyConnectionResponse,
};
pub use self::offer::{OfferChannel, RelIdReleased, RescindChannelOffer};
pub use self::open::{CloseChannel, OpenChannel, OpenChannelResult, OpenChannelV2};
pub use self::reserved::{CloseReservedChannel, CloseReservedResponse, OpenReservedChannel};
use crate::version::Negotiated;

/// Longest message in bytes, its header included.
pub const MAX_MESSAGE_SIZE: usize = 240;

/// Bytes of a message's header.
pub const HEADER_SIZE: usize = 8;

/// Bytes that a device may put into an offer (`user_defined`) and a client into an open request
/// (`user_data`).
pub const USER_DATA_SIZE: usize = 120;

/// Largest channel id. Ids start at 1; an id is also the number of the channel's event flag.
pub const MAX_CHANNEL_ID: u32 = 2047;

/// In place of a VP index: send no interrupts for this channel.
pub const VP_INDEX_NONE: u32 = u32::MAX;

/// The start of every message.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct MessageHeader {
    /// [`MessageType`].
    pub message_type: U32,
    /// Zero.
    pub padding: U32,
}

const _: () = assert!(size_of::<MessageHeader>() == HEADER_SIZE);

/// Takes a message apart into its type and the bytes behind its header.
fn split(bytes: &[u8]) -> Result<(MessageType, &[u8]), MessageError> {
    if bytes.len() > MAX_MESSAGE_SIZE {
        return Err(MessageError::TooLong { len: bytes.len() });
    }
    let Ok((header, body)) = MessageHeader::read_from_prefix(bytes) else {
        return Err(MessageError::NoHeader { len: bytes.len() });
    };
    let message_type = header.message_type.get();
    match MessageType::from_wire(message_type) {
        Some(message) => Ok((message, body)),
        None => Err(MessageError::UnknownType { message_type }),
    }
}

fn check_allowed(message: MessageType, negotiated: Option<Negotiated>) -> Result<(), MessageError> {
    if message.is_allowed(negotiated) {
        return Ok(());
    }
    Err(match negotiated {
        Some((version, features)) => {
            MessageError::NotInVersion { message, version, features: features.bits() }
        }
        None => MessageError::NotConnected { message },
    })
}

/// Reads the body of a message from the bytes behind its header; what follows the body is padding.
fn read<Body: FromBytes>(message: MessageType, bytes: &[u8]) -> Result<Body, MessageError> {
    match Body::read_from_prefix(bytes) {
        Ok((body, _padding)) => Ok(body),
        Err(_) => Err(MessageError::Truncated {
            message,
            needed: HEADER_SIZE + size_of::<Body>(),
            len: HEADER_SIZE + bytes.len(),
        }),
    }
}

/// Whether the bytes behind the header hold this body.
fn fits<Body>(bytes: &[u8]) -> bool {
    bytes.len() >= size_of::<Body>()
}
