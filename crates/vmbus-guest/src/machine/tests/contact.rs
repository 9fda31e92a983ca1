//! Making contact: what is asked, in which order, and what an answer does.

use super::*;
use crate::error::ContactError;

/// INITIATE_CONTACT, byte for byte: version, VP 3, interrupt page 0x1000 or SINT 2 and VTL 1 and
/// features 0x2d, monitor pages 0x2000 and 0x3000, client id.
#[test]
fn each_version_is_asked_for_in_its_own_form() {
    const PAGE: [u8; 8] = [0x00, 0x10, 0, 0, 0, 0, 0, 0];
    let table = [
        (Version::V0_13, 1, [0x0d, 0, 0, 0], PAGE, 40),
        (Version::V1_1, 1, [1, 0, 1, 0], PAGE, 40),
        (Version::V2_4, 1, [4, 0, 2, 0], PAGE, 40),
        (Version::V3_0, 1, [0, 0, 3, 0], PAGE, 40),
        (Version::V4_0, 1, [0, 0, 4, 0], PAGE, 40),
        (Version::V4_1, 1, [1, 0, 4, 0], PAGE, 40),
        (Version::V5_0, 4, [0, 0, 5, 0], [2, 0, 0, 0, 0, 0, 0, 0], 40),
        (Version::V5_1, 4, [1, 0, 5, 0], [2, 1, 0, 0, 0, 0, 0, 0], 40),
        (Version::V5_2, 4, [2, 0, 5, 0], [2, 1, 0, 0, 0, 0, 0, 0], 40),
        (Version::V5_3, 4, [3, 0, 5, 0], [2, 1, 0, 0, 0, 0, 0, 0], 40),
        (Version::V6_0, 4, [0, 0, 6, 0], [2, 1, 0, 0, 0x2d, 0, 0, 0], 56),
    ];
    for (version, connection_id, version_bytes, target, len) in table {
        let mut config = config().only(version);
        config.message_vp = 3;
        config.message_vtl = 1;
        config.monitor_pages = Some((0x2000, 0x3000));
        let mut lab = Lab::new(config);
        lab.guest.connect().unwrap();
        lab.run();
        let mut expected = vec![14, 0, 0, 0, 0, 0, 0, 0];
        expected.extend(version_bytes);
        expected.extend([3, 0, 0, 0]);
        expected.extend(target);
        expected.extend([0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0]);
        if len == 56 {
            expected.extend(CLIENT_ID.to_bytes());
        }
        assert_eq!(expected.len(), len, "{version}");
        assert_eq!(lab.posts, [(connection_id, expected)], "{version}");
        assert_eq!(lab.guest.state(), ConnectionState::Contacting { version });
    }
}

/// REQUEST_OFFERS goes to the connection that the host has named, from 5.0 on.
#[test]
fn offers_are_requested_once_a_version_is_agreed_on() {
    for version in Version::ALL {
        let mut lab = Lab::new(config().only(version));
        lab.guest.connect().unwrap();
        lab.run();
        lab.posts.clear();
        let mut answer = accept(version, GuestConfig::FEATURES);
        match &mut answer {
            HostMessage::VersionResponse(response)
            | HostMessage::VersionResponseV2(VersionResponseV2 { response, .. }) => {
                response.selected_version_or_connection_id = 0x00ab_cdef.into();
            }
            _ => unreachable!(),
        }
        lab.host(answer).unwrap();
        let connection_id = if version >= Version::V5_0 { 0x00ab_cdef } else { 1 };
        assert_eq!(lab.posts, [(connection_id, vec![3, 0, 0, 0, 0, 0, 0, 0])], "{version}");
        let features = match version {
            Version::V6_0 => GuestConfig::FEATURES,
            _ => FeatureFlags::empty(),
        };
        assert_eq!(lab.events, [ConnectionEvent::Connected { version, features }], "{version}");
    }
}

#[test]
fn a_refused_version_leads_to_the_next_older_one() {
    for (accepted, asked) in [(Version::V6_0, 1), (Version::V5_0, 5), (Version::V0_13, 11)] {
        let mut lab = Lab::new(config());
        lab.guest.connect().unwrap();
        lab.run();
        for version in Version::ALL.into_iter().rev() {
            assert_eq!(lab.guest.state(), ConnectionState::Contacting { version });
            if version == accepted {
                break;
            }
            lab.host(REFUSE).unwrap();
        }
        assert_eq!(lab.posts.len(), asked, "{accepted}");
        lab.host(accept(accepted, FeatureFlags::empty())).unwrap();
        assert!(
            matches!(lab.guest.state(), ConnectionState::Connected { version, .. } if version == accepted)
        );
    }
}

/// A host of version 4.1 has no port 4: each newer version falls through without an answer.
#[test]
fn a_missing_port_counts_as_a_refusal() {
    let mut lab = Lab::new(config());
    lab.statuses.extend([PostStatus::INVALID_CONNECTION_ID; 5]);
    lab.guest.connect().unwrap();
    lab.run();
    assert_eq!(lab.guest.state(), ConnectionState::Contacting { version: Version::V4_1 });
    assert_eq!(lab.posts.len(), 1);
    assert_eq!(lab.posts[0].0, 1);
    assert!(lab.retries.is_empty());
}

#[test]
fn no_common_version_is_told_to_everybody_who_waits() {
    let mut lab = Lab::new(config().only(Version::V2_4));
    let client = lab.guest.bind(target()).unwrap();
    lab.guest.connect().unwrap();
    lab.run();
    lab.host(REFUSE).unwrap();
    let reason = LossReason::Contact(ContactError::NoCommonVersion { oldest: Version::V2_4 });
    assert_eq!(lab.events, [ConnectionEvent::Lost(reason)]);
    assert_eq!(lab.heard(), [ClientEvent::ConnectFailed(NtStatus::REVISION_MISMATCH)]);
    assert!(matches!(lab.guest.bind(target()), Err(RequestError::Connection { .. })));
    lab.guest.unbind(client);
    lab.guest.connect().unwrap();
    lab.run();
    lab.host(accept(Version::V2_4, FeatureFlags::empty())).unwrap();
    lab.assert_rest(0, 0);
}

#[test]
fn answers_that_lie_end_the_attempt() {
    let supported = VersionResponse::supported;
    let v2 = |connection: u32, features: u32| {
        HostMessage::VersionResponseV2(VersionResponseV2 {
            response: supported(WireState::Successful, connection),
            supported_features: features.into(),
        })
    };
    let table = [
        (
            Version::V5_3,
            HostMessage::VersionResponse(supported(WireState::LowResources, 1)),
            ContactError::Refused {
                version: Version::V5_3,
                connection_state: WireState::LowResources,
            },
        ),
        (
            Version::V5_0,
            HostMessage::VersionResponse(supported(WireState::Successful, 0)),
            ContactError::ConnectionId { connection_id: 0 },
        ),
        (
            Version::V5_0,
            HostMessage::VersionResponse(supported(WireState::Successful, 0x0100_0000)),
            ContactError::ConnectionId { connection_id: 0x0100_0000 },
        ),
        (Version::V6_0, v2(0, 0), ContactError::ConnectionId { connection_id: 0 }),
        (Version::V6_0, v2(1, 0x10), ContactError::Features { requested: 0x2d, granted: 0x10 }),
        (
            Version::V6_0,
            v2(1, 0x8000_0001),
            ContactError::Features { requested: 0x2d, granted: 0x8000_0001 },
        ),
    ];
    for (version, answer, error) in table {
        let mut lab = Lab::new(config().only(version));
        lab.guest.connect().unwrap();
        lab.run();
        assert_eq!(lab.host(answer), Err(HostError::Contact(error)), "{error}");
        assert_eq!(lab.guest.state(), ConnectionState::Lost(LossReason::Contact(error)));
    }
    // Version 6.0 accepted in 16 bytes: the features are missing.
    let mut lab = Lab::new(config());
    lab.guest.connect().unwrap();
    lab.run();
    let short = HostMessage::VersionResponse(VersionResponse::supported(WireState::Successful, 1));
    assert!(matches!(lab.host(short), Err(HostError::Contact(ContactError::Answer(_)))));
    assert!(matches!(lab.guest.state(), ConnectionState::Lost(_)));
}

/// Below 2.4 the answer has no connection state: whatever stands there means nothing.
#[test]
fn old_versions_have_no_connection_state() {
    for version in Version::ALL {
        let mut lab = Lab::new(config().only(version));
        lab.guest.connect().unwrap();
        lab.run();
        let mut answer = accept(version, FeatureFlags::empty());
        match &mut answer {
            HostMessage::VersionResponse(response)
            | HostMessage::VersionResponseV2(VersionResponseV2 { response, .. }) => {
                response.connection_state = 2;
            }
            _ => unreachable!(),
        }
        assert_eq!(lab.host(answer).is_ok(), version < Version::V2_4, "{version}");
    }
}

#[test]
fn a_short_host_is_asked_again_and_not_for_ever() {
    let mut lab = Lab::new(config());
    lab.statuses.extend([PostStatus::INSUFFICIENT_BUFFERS, PostStatus::INSUFFICIENT_MEMORY]);
    lab.guest.connect().unwrap();
    lab.run();
    assert_eq!((lab.retries.as_slice(), lab.posts.len()), ([1].as_slice(), 0));
    lab.guest.retry_post();
    lab.run();
    assert_eq!((lab.retries.as_slice(), lab.posts.len()), ([1, 2].as_slice(), 0));
    lab.guest.retry_post();
    lab.run();
    assert_eq!(lab.posts.len(), 1);

    let mut lab = Lab::new(config());
    lab.statuses.extend([PostStatus::INSUFFICIENT_BUFFERS; 100]);
    lab.guest.connect().unwrap();
    lab.run();
    while matches!(lab.guest.state(), ConnectionState::Contacting { .. }) {
        lab.guest.retry_post();
        lab.run();
    }
    assert_eq!(lab.retries.len(), 99);
    let status = PostStatus::INSUFFICIENT_BUFFERS;
    let reason = LossReason::PostRefused { status, attempts: 100 };
    assert_eq!(lab.events, [ConnectionEvent::Lost(reason)]);
}

#[test]
fn a_host_that_will_never_take_a_message_is_lost_at_once() {
    let mut lab = Lab::new(config());
    lab.statuses.push_back(PostStatus(5));
    lab.guest.connect().unwrap();
    lab.run();
    let reason = LossReason::PostRefused { status: PostStatus(5), attempts: 1 };
    assert_eq!(lab.events, [ConnectionEvent::Lost(reason)]);
    assert_eq!(lab.guest.posted(PostStatus::SUCCESS), Err(RequestError::NothingPosted));
}

#[test]
fn connecting_twice_at_a_time_is_refused() {
    let mut lab = Lab::new(config());
    lab.guest.connect().unwrap();
    assert!(matches!(lab.guest.connect(), Err(RequestError::Connection { .. })));
    assert!(matches!(lab.guest.unload(), Err(RequestError::Connection { .. })));
}
