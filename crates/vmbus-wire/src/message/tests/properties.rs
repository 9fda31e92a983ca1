//! What holds for all bytes and all messages.

use proptest::collection::vec as vec_of;
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::*;

/// A body of any bytes: whatever a struct of the wire can be.
fn any_body<Body: FromBytes + core::fmt::Debug>() -> impl Strategy<Value = Body> {
    vec_of(any::<u8>(), size_of::<Body>()).prop_map(|bytes| Body::read_from_bytes(&bytes).unwrap())
}

fn any_negotiation() -> impl Strategy<Value = Option<Negotiated>> {
    proptest::sample::select(negotiations())
}

/// Any message of a guest, under a negotiation that allows its form.
fn any_guest_message() -> impl Strategy<Value = (GuestMessage<'static>, Option<Negotiated>)> {
    let at = |negotiated| move |message: GuestMessage<'static>| (message, negotiated);
    let all = v6_0(FeatureFlags::all());
    // Version and features decide whether there is a client id: set them to match the form.
    let asking = |version: u32, features: u8| {
        move |mut contact: InitiateContact| {
            contact.version = version.into();
            contact.interrupt_page_or_target[4] = features;
            contact
        }
    };
    prop_oneof![
        proptest::sample::select(vec![
            GuestMessage::RequestOffers,
            GuestMessage::Unload,
            GuestMessage::Pause,
            GuestMessage::Resume
        ])
        .prop_map(at(all)),
        any_body().prop_map(GuestMessage::OpenChannel).prop_map(at(V5_3)),
        any_body().prop_map(GuestMessage::OpenChannelV2).prop_map(at(all)),
        any_body().prop_map(GuestMessage::CloseChannel).prop_map(at(V5_3)),
        any_body().prop_map(GuestMessage::GpadlTeardown).prop_map(at(V5_3)),
        any_body().prop_map(GuestMessage::RelIdReleased).prop_map(at(V5_3)),
        any_body()
            .prop_map(asking(0x0006_0000, 0x37))
            .prop_map(GuestMessage::InitiateContact)
            .prop_map(at(None)),
        any_body()
            .prop_map(asking(0x0005_0003, 0xff))
            .prop_map(GuestMessage::InitiateContact)
            .prop_map(at(None)),
        (any_body().prop_map(asking(0x0006_0000, 0x08)), any_body())
            .prop_map(|(contact, client_id)| InitiateContactV2 { contact, client_id })
            .prop_map(GuestMessage::InitiateContactV2)
            .prop_map(at(None)),
        any_body().prop_map(GuestMessage::OpenReservedChannel).prop_map(at(V5_3)),
        any_body().prop_map(GuestMessage::CloseReservedChannel).prop_map(at(None)),
        any_body().prop_map(GuestMessage::TlConnectRequest).prop_map(at(V5_3)),
        any_body().prop_map(GuestMessage::TlConnectRequestV2).prop_map(at(V5_3)),
        any_body().prop_map(GuestMessage::ModifyChannel).prop_map(at(V5_3)),
        any_body().prop_map(GuestMessage::ModifyConnection).prop_map(at(all)),
    ]
}

/// Any message of a host, under a negotiation that allows its form.
fn any_host_message() -> impl Strategy<Value = (HostMessage, Option<Negotiated>)> {
    let at = |negotiated| move |message: HostMessage| (message, negotiated);
    let all = v6_0(FeatureFlags::all());
    prop_oneof![
        proptest::sample::select(vec![
            HostMessage::AllOffersDelivered,
            HostMessage::UnloadComplete,
            HostMessage::PauseResponse
        ])
        .prop_map(at(all)),
        any_body().prop_map(HostMessage::OfferChannel).prop_map(at(V5_3)),
        any_body().prop_map(HostMessage::RescindChannelOffer).prop_map(at(V5_3)),
        any_body().prop_map(HostMessage::OpenChannelResult).prop_map(at(V5_3)),
        any_body().prop_map(HostMessage::GpadlCreated).prop_map(at(V5_3)),
        any_body().prop_map(HostMessage::GpadlTorndown).prop_map(at(V5_3)),
        any_body().prop_map(HostMessage::VersionResponse).prop_map(at(V5_3)),
        any_body()
            .prop_map(|mut response: VersionResponseV2| {
                response.response.version_supported |= 1;
                response.supported_features = (response.supported_features.get() & !0x40).into();
                HostMessage::VersionResponseV2(response)
            })
            .prop_map(at(all)),
        any_body()
            .prop_map(|mut response: VersionResponseV3| {
                response.response.response.version_supported |= 1;
                response.response.supported_features =
                    (response.response.supported_features.get() | 0x40).into();
                HostMessage::VersionResponseV3(response)
            })
            .prop_map(at(all)),
        any_body().prop_map(HostMessage::CloseReservedResponse).prop_map(at(None)),
        any_body().prop_map(HostMessage::TlConnectResult).prop_map(at(V5_3)),
        any_body().prop_map(HostMessage::ModifyChannelResponse).prop_map(at(V5_3)),
        any_body().prop_map(HostMessage::ModifyConnectionResponse).prop_map(at(all)),
    ]
}

/// Bytes that look like a message more often than chance would have it.
fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    let likely = (0..32_u8, vec_of(any::<u8>(), 0..300)).prop_map(|(message_type, tail)| {
        let mut bytes = vec![message_type, 0, 0, 0];
        bytes.extend(tail);
        bytes
    });
    prop_oneof![4 => likely, 1 => vec_of(any::<u8>(), 0..300)]
}

proptest! {
    #[test]
    fn a_guest_message_reads_back((message, negotiated) in any_guest_message()) {
        let buffer = message.to_buffer();
        prop_assert_eq!(GuestMessage::parse(&buffer, negotiated), Ok(message));
    }

    #[test]
    fn a_host_message_reads_back((message, negotiated) in any_host_message()) {
        let buffer = message.to_buffer();
        prop_assert_eq!(HostMessage::parse(&buffer, negotiated), Ok(message));
    }

    /// No bytes make a parser panic, and what is accepted is written with the bytes it was read from:
    /// nothing that counts is lost or made up.
    #[test]
    fn what_is_accepted_is_written_as_it_was_read(
        bytes in any_bytes(),
        negotiated in any_negotiation(),
    ) {
        let written = match MessageType::from_wire(u32::from(*bytes.first().unwrap_or(&0))) {
            Some(message) if message.direction() == Direction::HostToGuest => {
                prop_assert!(GuestMessage::parse(&bytes, negotiated).is_err());
                HostMessage::parse(&bytes, negotiated).map(|message| message.to_buffer())
            }
            _ => {
                prop_assert!(HostMessage::parse(&bytes, negotiated).is_err());
                GuestMessage::parse(&bytes, negotiated).map(|message| message.to_buffer())
            }
        };
        if let Ok(written) = written {
            prop_assert_eq!(&written[..4], &bytes[..4]);
            prop_assert_eq!(&written[4..8], &[0; 4]);
            prop_assert_eq!(&written[8..], &bytes[8..written.len()]);
        }
    }

    /// A buffer that held a longer message shows nothing of it.
    #[test]
    fn a_buffer_is_used_again(
        (first, _) in any_host_message(),
        (second, _) in any_guest_message(),
    ) {
        let mut buffer = first.to_buffer();
        second.encode(&mut buffer);
        prop_assert_eq!(buffer.padded(), second.to_buffer().padded());
        prop_assert_eq!(usize::from(buffer.size()), buffer.len());
    }
}
