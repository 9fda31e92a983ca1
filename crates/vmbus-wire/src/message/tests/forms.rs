//! Messages of several forms: what decides, and what is read out of the parts that depend on it.

use super::*;
use crate::guid::Guid;
use crate::message::contact::MessageTarget;
use crate::offer::OfferFlags;
use crate::status::NtStatus;

#[test]
fn features_decide_the_form_of_open_channel() {
    let short = wire(148, &[(0, &[5])]);
    let long = wire(156, &[(0, &[5]), (148, &[7])]);
    for negotiated in negotiations() {
        let Some((_, features)) = negotiated else { continue };
        let v2 = features.intersects(
            FeatureFlags::GUEST_SPECIFIED_SIGNAL_PARAMETERS
                | FeatureFlags::CHANNEL_INTERRUPT_REDIRECTION,
        );
        match GuestMessage::parse(&long, negotiated) {
            Ok(GuestMessage::OpenChannelV2(open)) => {
                assert!(v2, "{negotiated:?}");
                assert_eq!(open.connection_id.get(), 7);
            }
            Ok(GuestMessage::OpenChannel(_)) => assert!(!v2, "{negotiated:?}"),
            other => panic!("{negotiated:?}: {other:?}"),
        }
        let truncated =
            MessageError::Truncated { message: MessageType::OpenChannel, needed: 156, len: 148 };
        let got = GuestMessage::parse(&short, negotiated).err();
        assert_eq!(got, v2.then_some(truncated), "{negotiated:?}");
    }
}

#[test]
fn the_version_asked_for_decides_the_form_of_initiate_contact() {
    let client_id = 0x08;
    for (version, features, len, has_client_id) in [
        (0x0006_0000_u32, client_id, 56, Some(true)),
        (0x0006_0000, client_id, 240, Some(true)),
        (0x0006_0000, client_id, 55, None),
        (0x0006_0000, client_id, 40, None),
        (0x0006_0000, 0xf7, 56, Some(false)),
        (0x0006_0000, 0xf7, 40, Some(false)),
        (0x0005_0003, client_id, 240, Some(false)), // below 6.0 these bits mean nothing
        (0x0000_000d, client_id, 240, Some(false)), // and here they are an address
        (0x0007_0000, client_id, 40, Some(false)),  // of an unknown version nothing is known
    ] {
        let row = (version, features, len);
        let bytes = wire(len, &[(0, &[14]), (8, &version.to_le_bytes()), (20, &[features])]);
        let got = match GuestMessage::parse(&bytes, None) {
            Ok(GuestMessage::InitiateContact(_)) => Some(false),
            Ok(GuestMessage::InitiateContactV2(_)) => Some(true),
            Err(MessageError::Truncated { message, needed: 56, len: found }) => {
                assert_eq!((message, found), (MessageType::InitiateContact, len), "{row:x?}");
                None
            }
            other => panic!("{row:x?}: {other:?}"),
        };
        assert_eq!(got, has_client_id, "{row:x?}");
    }
}

#[test]
fn the_version_asked_for_decides_the_union_of_initiate_contact() {
    let bytes = [2, 1, 0x33, 0x44, 0xff, 0x01, 0, 0x80];
    for (version, page, target) in [
        (0x0000_000d, Some(0x8000_01ff_4433_0102), None),
        (0x0004_0001, Some(0x8000_01ff_4433_0102), None),
        (0x0005_0000, None, Some((2, 0, 0))),
        (0x0005_0001, None, Some((2, 1, 0))),
        (0x0005_0003, None, Some((2, 1, 0))),
        (0x0006_0000, None, Some((2, 1, 0x8000_01ff))),
        (0x0006_0001, None, Some((2, 1, 0x8000_01ff))),
    ] {
        let contact = InitiateContact {
            version: u32::into(version),
            target_message_vp: 0.into(),
            interrupt_page_or_target: bytes,
            parent_to_child_monitor_gpa: 0.into(),
            child_to_parent_monitor_gpa: 0.into(),
        };
        assert_eq!(contact.requested(), Version::from_wire(version), "{version:#x}");
        assert_eq!(contact.interrupt_page(), page, "{version:#x}");
        let got = contact
            .message_target()
            .map(|target| (target.sint, target.vtl, target.feature_flags.get()));
        assert_eq!(got, target, "{version:#x}");
        let features = target.map_or(0, |(_, _, features)| features);
        assert_eq!(contact.requested_features().bits(), features, "{version:#x}");
    }
}

#[test]
fn a_contact_is_made_in_the_form_of_its_version() {
    let old = InitiateContact::with_interrupt_page(Version::V4_1, 3, 0x1234_5000);
    assert_eq!(old.requested(), Some(Version::V4_1));
    assert_eq!((old.target_message_vp.get(), old.interrupt_page()), (3, Some(0x1234_5000)));
    let target = MessageTarget {
        sint: 2,
        vtl: 0,
        reserved: 0.into(),
        feature_flags: FeatureFlags::PAUSE_RESUME.bits().into(),
    };
    let new = InitiateContact::with_message_target(Version::V6_0, 3, target);
    assert_eq!(new.message_target(), Some(target));
    assert_eq!(new.requested_features(), FeatureFlags::PAUSE_RESUME);
}

#[test]
fn size_decides_the_form_of_tl_connect_request_from_5_2_on() {
    for (version, len, has_silo) in [
        (Version::V4_0, 40, false),
        (Version::V5_1, 56, false),
        (Version::V5_2, 40, false),
        (Version::V5_2, 55, false),
        (Version::V5_2, 56, true),
        (Version::V6_0, 240, true),
    ] {
        let bytes = wire(len, &[(0, &[21])]);
        let got = GuestMessage::parse(&bytes, Some((version, FeatureFlags::empty()))).unwrap();
        let v2 = matches!(got, GuestMessage::TlConnectRequestV2(_));
        assert_eq!(v2, has_silo, "{version} with {len} bytes");
    }
}

#[test]
fn what_was_asked_for_decides_the_form_of_version_response() {
    let all = FeatureFlags::all();
    let short = |needed, len| {
        Err(MessageError::Truncated { message: MessageType::VersionResponse, needed, len })
    };
    for (asked, len, supported, features, form) in [
        (V5_3, 240, 1, 0xff_u8, Ok(1)), // padding is no feature
        (v6_0(all), 240, 0, 0xff, Ok(1)),
        (v6_0(all), 16, 0, 0, Ok(1)),
        (v6_0(all), 16, 1, 0, short(20, 16)),
        (v6_0(all), 20, 1, 0x3f, Ok(2)),
        (v6_0(all), 240, 1, 0x3f, Ok(2)),
        (v6_0(all), 39, 1, 0x40, short(40, 39)),
        (v6_0(all), 40, 1, 0x40, Ok(3)),
        (None, 16, 1, 0, Ok(1)), // without a question the size decides
        (None, 20, 1, 0, Ok(2)),
        (None, 40, 1, 0x40, Ok(3)),
    ] {
        let row = (asked, len, supported, features);
        let mut parts: Vec<(usize, &[u8])> = vec![(0, &[15])];
        let (supported, features) = ([supported], [features]);
        parts.push((8, &supported));
        if len > 16 {
            parts.push((16, &features));
        }
        let got = HostMessage::parse(&wire(len, &parts), asked).map(|message| match message {
            HostMessage::VersionResponse(_) => 1,
            HostMessage::VersionResponseV2(_) => 2,
            HostMessage::VersionResponseV3(_) => 3,
            other => panic!("{row:?}: {other:?}"),
        });
        assert_eq!(got, form, "{row:?}");
    }
}

#[test]
fn a_version_response_says_how_connecting_went() {
    for (value, state) in [
        (0, ConnectionState::Successful),
        (1, ConnectionState::LowResources),
        (2, ConnectionState::UnknownFailure),
    ] {
        let response = VersionResponse::supported(state, 1);
        assert_eq!(response.connection_state, value);
        assert_eq!((response.is_supported(), response.state()), (true, state));
        assert_eq!(ModifyConnectionResponse::new(state).state(), state);
    }
    assert_eq!(ConnectionState::from_wire(3), ConnectionState::UnknownFailure);
    assert!(!VersionResponse::UNSUPPORTED.is_supported());
}

#[test]
fn an_offer_shows_a_guest_only_what_its_version_has() {
    let every_flag = OfferFlags::all();
    let offer = OfferChannel {
        interface_id: Guid::ZERO,
        instance_id: Guid::ZERO,
        reserved: [0; 16],
        flags: every_flag.bits().into(),
        mmio_megabytes: 1.into(),
        user_defined: [2; USER_DATA_SIZE],
        subchannel_index: 3.into(),
        mmio_megabytes_optional: 4.into(),
        channel_id: 5.into(),
        monitor_id: OfferChannel::NO_MONITOR,
        monitor_allocated: 0,
        is_dedicated_interrupt: 1.into(),
        connection_id: 0x2005.into(),
    };
    for negotiated in negotiations().into_iter().flatten() {
        let (version, features) = negotiated;
        let seen = offer.for_guest(negotiated);
        let dedicated = if version >= Version::V1_1 { (1, 0x2005) } else { (0, 0) };
        let index = if version >= Version::V2_4 { 3 } else { 0 };
        let mut hidden = OfferFlags::empty();
        if !features.contains(FeatureFlags::CONFIDENTIAL_CHANNELS) {
            hidden |= OfferFlags::from_bits_retain(0x6);
        }
        if !features.contains(FeatureFlags::GPA_PINNING) {
            hidden |= OfferFlags::from_bits_retain(0x8);
        }
        let got = (seen.is_dedicated_interrupt.get(), seen.connection_id.get());
        assert_eq!(got, dedicated, "{negotiated:?}");
        assert_eq!(seen.subchannel_index.get(), index, "{negotiated:?}");
        assert_eq!(seen.offer_flags(), every_flag.difference(hidden), "{negotiated:?}");
        assert_eq!(seen.user_defined, offer.user_defined);
    }
}

#[test]
fn answers_carry_their_status() {
    let refused = NtStatus::CONNECTION_REFUSED;
    assert_eq!(OpenChannelResult::new(1, 2, refused).nt_status(), refused);
    assert_eq!(GpadlCreated::new(1, 2, refused).nt_status(), refused);
    assert_eq!(ModifyChannelResponse::new(1, refused).nt_status(), refused);
    let request =
        TlConnectRequest { endpoint_id: Guid::from_u128(1), service_id: Guid::from_u128(2) };
    let result = TlConnectResult::new(&request, refused);
    assert_eq!(result.nt_status(), refused);
    assert_eq!((result.endpoint_id, result.service_id), (Guid::from_u128(1), Guid::from_u128(2)));
}
