//! What is not a message, comes from the wrong side, or does not belong to the version.

use super::vectors::{guest_vectors, host_vectors};
use super::*;

#[test]
fn a_message_is_of_a_known_type_and_at_most_240_bytes() {
    let table = [
        (wire(8, &[]), MessageError::UnknownType { message_type: 0 }),
        (wire(8, &[(0, &[30])]), MessageError::UnknownType { message_type: 30 }),
        (wire(240, &[(0, &[3, 1])]), MessageError::UnknownType { message_type: 0x103 }),
        (wire(8, &[(3, &[0x80])]), MessageError::UnknownType { message_type: 0x8000_0000 }),
        (wire(241, &[(0, &[3])]), MessageError::TooLong { len: 241 }),
        (wire(0, &[]), MessageError::NoHeader { len: 0 }),
        (wire(7, &[(0, &[3])]), MessageError::NoHeader { len: 7 }),
    ];
    for (bytes, error) in table {
        assert_eq!(GuestMessage::parse(&bytes, V5_3), Err(error), "{bytes:x?}");
        assert_eq!(HostMessage::parse(&bytes, V5_3), Err(error), "{bytes:x?}");
    }
    assert_eq!(MessageBuffer::copy_from(&[0; 241]), Err(MessageError::TooLong { len: 241 }));
}

#[test]
fn each_side_is_refused_what_only_the_other_sends() {
    for negotiated in negotiations() {
        for vector in host_vectors() {
            let message = vector.message.message_type();
            assert_eq!(
                GuestMessage::parse(&vector.bytes, negotiated),
                Err(MessageError::NotFromGuest { message }),
                "{message} under {negotiated:?}"
            );
        }
        for vector in guest_vectors() {
            let message = vector.message.message_type();
            assert_eq!(
                HostMessage::parse(&vector.bytes, negotiated),
                Err(MessageError::NotFromHost { message }),
                "{message} under {negotiated:?}"
            );
        }
    }
}

/// The first version of each message, as the table of vmbus-wire section 3 has it, and the feature
/// it needs.
const SINCE: [(MessageType, Version, FeatureFlags); 29] = {
    use MessageType as M;
    use Version as V;
    const NONE: FeatureFlags = FeatureFlags::empty();
    [
        (M::OfferChannel, V::V0_13, NONE),
        (M::RescindChannelOffer, V::V0_13, NONE),
        (M::RequestOffers, V::V0_13, NONE),
        (M::AllOffersDelivered, V::V0_13, NONE),
        (M::OpenChannel, V::V0_13, NONE),
        (M::OpenChannelResult, V::V0_13, NONE),
        (M::CloseChannel, V::V0_13, NONE),
        (M::GpadlHeader, V::V0_13, NONE),
        (M::GpadlBody, V::V0_13, NONE),
        (M::GpadlCreated, V::V0_13, NONE),
        (M::GpadlTeardown, V::V0_13, NONE),
        (M::GpadlTorndown, V::V0_13, NONE),
        (M::RelIdReleased, V::V0_13, NONE),
        (M::InitiateContact, V::V0_13, NONE),
        (M::VersionResponse, V::V0_13, NONE),
        (M::Unload, V::V0_13, NONE),
        (M::UnloadComplete, V::V1_1, NONE),
        (M::OpenReservedChannel, V::V4_0, NONE),
        (M::CloseReservedChannel, V::V0_13, NONE),
        (M::CloseReservedResponse, V::V4_0, NONE),
        (M::TlConnectRequest, V::V4_0, NONE),
        (M::ModifyChannel, V::V4_1, NONE),
        (M::TlConnectResult, V::V4_1, NONE),
        (M::ModifyChannelResponse, V::V5_3, NONE),
        (M::ModifyConnection, V::V6_0, FeatureFlags::MODIFY_CONNECTION),
        (M::ModifyConnectionResponse, V::V6_0, FeatureFlags::MODIFY_CONNECTION),
        (M::Pause, V::V6_0, FeatureFlags::PAUSE_RESUME),
        (M::PauseResponse, V::V6_0, FeatureFlags::PAUSE_RESUME),
        (M::Resume, V::V6_0, FeatureFlags::PAUSE_RESUME),
    ]
};

/// What parsing a bare, but long enough message of this type says about when it may be sent.
fn refusal(message: MessageType, negotiated: Option<Negotiated>) -> Option<MessageError> {
    let bytes = wire(MAX_MESSAGE_SIZE, &[(0, &message.to_wire().to_le_bytes())]);
    match message.direction() {
        Direction::GuestToHost => GuestMessage::parse(&bytes, negotiated).err(),
        Direction::HostToGuest => HostMessage::parse(&bytes, negotiated).err(),
    }
}

#[test]
fn a_message_belongs_to_its_versions() {
    for (row, (message, since, feature)) in SINCE.into_iter().enumerate() {
        assert_eq!(message, MessageType::ALL[row]);
        for negotiated in negotiations() {
            let Some((version, features)) = negotiated else { continue };
            let allowed = version >= since && features.contains(feature);
            let expected = (!allowed).then_some(MessageError::NotInVersion {
                message,
                version,
                features: features.bits(),
            });
            assert_eq!(refusal(message, negotiated), expected, "{message} under {negotiated:?}");
        }
    }
}

#[test]
fn few_messages_exist_without_a_connection() {
    for message in MessageType::ALL {
        let expected = match message {
            MessageType::InitiateContact
            | MessageType::VersionResponse
            | MessageType::Unload
            | MessageType::UnloadComplete
            | MessageType::CloseReservedChannel
            | MessageType::CloseReservedResponse => None,
            _ => Some(MessageError::NotConnected { message }),
        };
        assert_eq!(refusal(message, None), expected, "{message}");
    }
}

#[test]
fn types_read_back_and_have_one_side() {
    for (row, message) in MessageType::ALL.into_iter().enumerate() {
        assert_eq!(message.to_wire() as usize, row + 1, "{message}");
        assert_eq!(MessageType::from_wire(message.to_wire()), Some(message));
    }
    for value in [0, 30, 31, 0x101, u32::MAX] {
        assert_eq!(MessageType::from_wire(value), None, "{value:#x}");
    }
}

#[test]
fn an_error_reads_like_a_sentence_with_the_numbers() {
    use std::string::ToString;
    let message = MessageType::OpenChannel;
    for (error, text) in [
        (MessageError::NoHeader { len: 3 }, "message of 3 bytes, its header alone takes 8"),
        (MessageError::TooLong { len: 300 }, "message of 300 bytes, the longest has 240"),
        (
            MessageError::Truncated { message, needed: 156, len: 148 },
            "OPEN_CHANNEL of 148 bytes, it takes 156",
        ),
        (
            MessageError::NotFromGuest { message: MessageType::OfferChannel },
            "OFFER_CHANNEL came from the guest, but only a host sends it",
        ),
        (
            MessageError::NotInVersion {
                message: MessageType::Pause,
                version: Version::V5_3,
                features: 0,
            },
            "PAUSE is not part of version 5.3 with feature flags 0x0",
        ),
    ] {
        assert_eq!(error.to_string(), text);
    }
}
