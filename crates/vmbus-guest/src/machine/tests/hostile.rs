//! A host that lies: each lie has its error, changes nothing, and is heard by nobody.

use super::*;
use vmbus_wire::message::{
    CloseReservedResponse, MessageError, ModifyChannelResponse, ModifyConnectionResponse,
    TlConnectRequest, TlConnectResult,
};

/// Channel 1 is open with ring 0xe1e10, channel 2 has a client, channel 3 has none, channel 4 is
/// withdrawn and its client has not let go, channel 5's ring waits for the host's answer.
fn busy_guest() -> Lab {
    let mut lab = Lab::connected(Version::V6_0);
    lab.opened(1);
    lab.bound(2);
    lab.bound(4);
    lab.rescind(4).unwrap();
    lab.told.clear();
    let client = lab.bound(5);
    lab.guest.open(client, ring_request(8)).unwrap();
    lab.host(HostMessage::OfferChannel(offer(3))).unwrap();
    lab.host(HostMessage::AllOffersDelivered).unwrap();
    lab.posts.clear();
    lab.told.clear();
    lab.events.clear();
    lab
}

const RING: u32 = 0xe1e10;
const RING_OF_5: u32 = 0xe1e11;

#[test]
fn every_lie_has_its_error_and_changes_nothing() {
    use MessageType as T;
    let twin = {
        let mut twin = offer(9);
        twin.instance_id = instance(3);
        HostMessage::OfferChannel(twin)
    };
    let result = |channel, open_id| {
        HostMessage::OpenChannelResult(OpenChannelResult::new(channel, open_id, NtStatus::SUCCESS))
    };
    let created = |channel, gpadl| {
        HostMessage::GpadlCreated(GpadlCreated::new(channel, gpadl, NtStatus::SUCCESS))
    };
    let torn_down =
        |gpadl: u32| HostMessage::GpadlTorndown(GpadlTorndown { gpadl_id: gpadl.into() });
    let rescind = |channel: u32| {
        HostMessage::RescindChannelOffer(RescindChannelOffer { channel_id: channel.into() })
    };
    let modified = |channel| {
        HostMessage::ModifyChannelResponse(ModifyChannelResponse::new(channel, NtStatus::SUCCESS))
    };
    let unknown = |kind, channel_id| HostError::UnknownChannel { kind, channel_id };
    let in_state = |kind, channel_id, state| HostError::ChannelState { kind, channel_id, state };
    let no_gpadl = |kind, gpadl_id| HostError::UnknownGpadl { kind, gpadl_id };
    let unexpected = |kind| HostError::Unexpected { kind, state: "connected" };
    let table = [
        (HostMessage::OfferChannel(offer(0)), HostError::ChannelId { channel_id: 0 }),
        (HostMessage::OfferChannel(offer(2048)), HostError::ChannelId { channel_id: 2048 }),
        (HostMessage::OfferChannel(offer(u32::MAX)), HostError::ChannelId { channel_id: u32::MAX }),
        (HostMessage::OfferChannel(offer(1)), HostError::ChannelInUse { channel_id: 1 }),
        (HostMessage::OfferChannel(offer(3)), HostError::ChannelInUse { channel_id: 3 }),
        (HostMessage::OfferChannel(offer(4)), HostError::ChannelInUse { channel_id: 4 }),
        (
            twin,
            HostError::SameInstance {
                channel_id: 9,
                existing: 3,
                instance: instance(3),
                subchannel_index: 0,
            },
        ),
        (HostMessage::AllOffersDelivered, unexpected(T::AllOffersDelivered)),
        (rescind(9), unknown(T::RescindChannelOffer, 9)),
        (rescind(4), in_state(T::RescindChannelOffer, 4, "withdrawn")),
        (result(9, 1), unknown(T::OpenChannelResult, 9)),
        (result(1, 1), in_state(T::OpenChannelResult, 1, "open")),
        (result(2, 1), in_state(T::OpenChannelResult, 2, "closed")),
        (result(4, 1), in_state(T::OpenChannelResult, 4, "withdrawn")),
        (result(5, 2), in_state(T::OpenChannelResult, 5, "having its ring described")),
        (created(1, 1), no_gpadl(T::GpadlCreated, 1)),
        (
            created(1, RING),
            HostError::GpadlState { kind: T::GpadlCreated, gpadl_id: RING, state: "created" },
        ),
        (
            created(1, RING_OF_5),
            HostError::GpadlChannel { gpadl_id: RING_OF_5, expected: 5, got: 1 },
        ),
        (torn_down(1), no_gpadl(T::GpadlTorndown, 1)),
        (
            torn_down(RING),
            HostError::GpadlState { kind: T::GpadlTorndown, gpadl_id: RING, state: "created" },
        ),
        (
            torn_down(RING_OF_5),
            HostError::GpadlState {
                kind: T::GpadlTorndown,
                gpadl_id: RING_OF_5,
                state: "being created",
            },
        ),
        (accept(Version::V6_0, FeatureFlags::empty()), unexpected(T::VersionResponse)),
        (REFUSE, unexpected(T::VersionResponse)),
        (HostMessage::UnloadComplete, unexpected(T::UnloadComplete)),
        (
            HostMessage::CloseReservedResponse(CloseReservedResponse { channel_id: 1.into() }),
            unexpected(T::CloseReservedResponse),
        ),
        (modified(9), unknown(T::ModifyChannelResponse, 9)),
        (modified(1), in_state(T::ModifyChannelResponse, 1, "open")),
        (
            HostMessage::ModifyConnectionResponse(ModifyConnectionResponse::new(
                WireState::Successful,
            )),
            unexpected(T::ModifyConnectionResponse),
        ),
        (HostMessage::PauseResponse, unexpected(T::PauseResponse)),
        (
            HostMessage::TlConnectResult(TlConnectResult::new(
                &TlConnectRequest { endpoint_id: INSTANCE, service_id: TYPE },
                NtStatus::CONNECTION_REFUSED,
            )),
            HostError::UnknownHvsock { endpoint_id: INSTANCE, service_id: TYPE },
        ),
    ];
    for (message, expected) in table {
        let mut lab = busy_guest();
        let before = format!("{:?}", lab.guest);
        assert_eq!(lab.host(message), Err(expected), "{message:?}");
        assert_eq!(format!("{:?}", lab.guest), before, "{message:?} changed something");
        assert_eq!((lab.posts.len(), lab.told.len(), lab.events.len()), (0, 0, 0), "{message:?}");
        assert!(lab.released.is_empty(), "{message:?}");
    }
}

#[test]
fn what_is_no_message_of_a_host_is_refused() {
    let mut lab = busy_guest();
    let before = format!("{:?}", lab.guest);
    for kind in 0..40u32 {
        let Some(message) = MessageType::from_wire(kind) else {
            let bytes = [&kind.to_le_bytes()[..], &[0; 200]].concat();
            let expected = MessageError::UnknownType { message_type: kind };
            assert_eq!(lab.guest.host_message(&bytes), Err(expected.into()));
            continue;
        };
        let bytes = [&kind.to_le_bytes()[..], &[0; 236]].concat();
        if message.direction() == vmbus_wire::message::Direction::GuestToHost {
            let expected = MessageError::NotFromHost { message };
            assert_eq!(lab.guest.host_message(&bytes), Err(expected.into()), "{message}");
        } else if message.min_size() > 8 {
            let cut = lab.guest.host_message(&bytes[..message.min_size() - 1]);
            assert!(
                matches!(cut, Err(HostError::Message(MessageError::Truncated { .. }))),
                "{message}: {cut:?}"
            );
        }
    }
    for len in [0, 7, 241, 4096] {
        assert!(matches!(lab.guest.host_message(&vec![0; len]), Err(HostError::Message(_))));
    }
    assert_eq!(format!("{:?}", lab.guest), before);
}

/// Without a connection, nothing but the answers to contact and unload is looked at.
#[test]
fn a_host_without_a_connection_has_nothing_to_say() {
    for disconnect in [
        (|_| ()) as fn(&mut Lab),
        |lab| lab.guest.host_gone(),
        |lab| {
            lab.guest.connect().unwrap();
            lab.run();
            lab.host(accept(Version::V6_0, FeatureFlags::empty())).unwrap();
            lab.guest.unload().unwrap();
            lab.host(HostMessage::UnloadComplete).unwrap();
        },
    ] {
        let mut lab = Lab::new(config());
        disconnect(&mut lab);
        lab.run();
        let before = format!("{:?}", lab.guest);
        for message in [
            HostMessage::OfferChannel(offer(1)),
            HostMessage::AllOffersDelivered,
            HostMessage::UnloadComplete,
            HostMessage::PauseResponse,
            accept(Version::V5_3, FeatureFlags::empty()),
        ] {
            assert!(lab.host(message).is_err(), "{message:?}");
        }
        assert_eq!(format!("{:?}", lab.guest), before);
    }
}

#[test]
fn an_open_is_answered_under_its_own_id_only() {
    let mut lab = Lab::connected(Version::V5_3);
    let client = lab.bound(1);
    let gpadl = lab.guest.open(client, ring_request(8)).unwrap();
    lab.run();
    lab.created(1, gpadl, NtStatus::SUCCESS).unwrap();
    let expected = lab.open_id(1);
    for got in [0, expected + 1, u32::MAX] {
        let error = HostError::OpenId { channel_id: 1, expected, got };
        assert_eq!(lab.opened_with(1, got, NtStatus::SUCCESS), Err(error));
    }
    lab.opened_with(1, expected, NtStatus::SUCCESS).unwrap();
}

/// Memory is given back on the host's word only once the host was asked for it.
#[test]
fn answers_to_what_was_not_posted_yet_are_refused() {
    let mut lab = Lab::connected(Version::V5_3);
    let client = lab.bound(1);
    lab.statuses.push_back(PostStatus::INSUFFICIENT_BUFFERS);
    let gpadl_id = lab.guest.open(client, ring_request(100)).unwrap();
    lab.run();
    let kind = MessageType::GpadlCreated;
    let early = HostError::TooEarly { kind, gpadl_id, unsent: 4 };
    assert_eq!(lab.created(1, gpadl_id, NtStatus::SUCCESS), Err(early));
    lab.guest.retry_post();
    lab.run();
    lab.created(1, gpadl_id, NtStatus::SUCCESS).unwrap();
    lab.opened_with(1, 1, NtStatus::SUCCESS).unwrap();

    lab.statuses.push_back(PostStatus::INSUFFICIENT_BUFFERS);
    lab.guest.close(client);
    lab.run();
    let kind = MessageType::GpadlTorndown;
    let early = HostError::TooEarly { kind, gpadl_id, unsent: 1 };
    assert_eq!(lab.torn_down(gpadl_id), Err(early));
    assert!(lab.released.is_empty());
    lab.guest.retry_post();
    lab.run();
    lab.torn_down(gpadl_id).unwrap();
    assert_eq!(lab.released, [gpadl_id]);
}

/// The most that a host can make a guest keep: 2047 channels, whatever it does with them.
#[test]
fn offers_without_end_fill_the_numbers_there_are_and_no_more() {
    let mut lab = Lab::connected(Version::V5_3);
    // The host takes no message: nothing that is withdrawn can be released.
    lab.statuses.push_back(PostStatus::INSUFFICIENT_BUFFERS);
    for round in 0..3u32 {
        for channel_id in 0..4096 {
            let mut message = offer(channel_id);
            message.instance_id = Guid::from_u128(u128::from(round * 4096 + channel_id));
            let result = lab.host(HostMessage::OfferChannel(message));
            let fits = round == 0 && (1..=2047).contains(&channel_id);
            assert_eq!(result.is_ok(), fits, "round {round}, channel {channel_id}");
            let _again = lab.rescind(channel_id);
        }
    }
    let counts = lab.guest.counts();
    assert_eq!((counts.channels, counts.messages), (2047, 2047));
    lab.guest.retry_post();
    lab.run();
    lab.assert_rest(0, 0);
}
