//! Channels that are closed, refused, withdrawn or lost at every moment of their life.

use kmcl::bus::{GpadlPages, PageRange};

use super::*;

fn buffer() -> GpadlPages {
    let range = PageRange { byte_count: 4096, byte_offset: 0, pfns: vec![0x500] };
    GpadlPages { ranges: vec![range], read_only: false }
}

/// The moments at which something may happen to a channel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Moment {
    Bound,
    CreatingRing,
    Opening,
    Open,
    Closing,
}

const MOMENTS: [Moment; 5] =
    [Moment::Bound, Moment::CreatingRing, Moment::Opening, Moment::Open, Moment::Closing];

/// A client whose channel 1 is at `moment`, and its ring.
fn at(moment: Moment) -> (Lab, ClientId, Option<u32>) {
    let mut lab = Lab::connected(Version::V5_3);
    let client = lab.bound(1);
    if moment == Moment::Bound {
        return (lab, client, None);
    }
    let ring = lab.guest.open(client, ring_request(8)).unwrap();
    lab.run();
    if moment == Moment::CreatingRing {
        lab.posts.clear();
        return (lab, client, Some(ring));
    }
    lab.created(1, ring, NtStatus::SUCCESS).unwrap();
    if moment != Moment::Opening {
        lab.opened_with(1, 1, NtStatus::SUCCESS).unwrap();
        lab.heard();
    }
    if moment == Moment::Closing {
        lab.guest.close(client);
        lab.run();
    }
    lab.posts.clear();
    (lab, client, Some(ring))
}

#[test]
fn a_channel_closed_at_any_moment_gives_its_ring_back_and_can_be_opened_again() {
    for moment in MOMENTS {
        let (mut lab, client, ring) = at(moment);
        lab.guest.close(client);
        lab.run();
        if moment == Moment::CreatingRing {
            assert_eq!(lab.posted(), [], "{moment:?}: the host has not answered");
            lab.created(1, ring.unwrap(), NtStatus::SUCCESS).unwrap();
            assert_eq!(lab.posted(), [MessageType::GpadlTeardown], "{moment:?}");
        }
        if moment == Moment::Opening {
            assert_eq!(lab.posted(), [], "{moment:?}: the host has not answered");
            lab.opened_with(1, 1, NtStatus::SUCCESS).unwrap();
        }
        if matches!(moment, Moment::Opening | Moment::Open) {
            let expected = [MessageType::CloseChannel, MessageType::GpadlTeardown];
            assert_eq!(lab.posted(), expected, "{moment:?}");
        }
        if let Some(ring) = ring {
            assert!(lab.released.is_empty(), "{moment:?}");
            lab.torn_down(ring).unwrap();
            assert_eq!(lab.released, [ring], "{moment:?}");
        }
        assert_eq!(lab.heard(), [], "{moment:?}: nobody asked");
        lab.assert_rest(1, 1);
        assert!(lab.guest.open(client, ring_request(8)).is_ok(), "{moment:?}");
    }
}

#[test]
fn a_channel_whose_client_leaves_goes_to_the_next_one_once_it_is_at_rest() {
    for moment in MOMENTS {
        let (mut lab, client, ring) = at(moment);
        let next = lab.guest.bind(target()).unwrap();
        lab.guest.unbind(client);
        lab.run();
        match moment {
            Moment::CreatingRing => lab.created(1, ring.unwrap(), NtStatus::SUCCESS).unwrap(),
            Moment::Opening => lab.opened_with(1, 1, NtStatus::SUCCESS).unwrap(),
            Moment::Bound | Moment::Open | Moment::Closing => {}
        }
        if let Some(ring) = ring {
            assert_eq!(lab.heard(), [], "{moment:?}: the host has not let go");
            lab.torn_down(ring).unwrap();
        }
        let told = lab.told.pop_front();
        assert!(
            matches!(&told, Some((id, ClientEvent::Offered { .. })) if *id == next),
            "{moment:?}: {told:?}"
        );
        assert!(lab.told.is_empty(), "{moment:?}");
        lab.assert_rest(1, 1);
    }
}

#[test]
fn a_withdrawn_channel_is_released_once_its_client_and_the_host_have_let_go() {
    for moment in MOMENTS {
        let (mut lab, client, ring) = at(moment);
        lab.rescind(1).unwrap();
        let failed =
            ring.map(|gpadl| ClientEvent::OpenFailed { gpadl, status: NtStatus::DEVICE_REMOVED });
        let told = match moment {
            Moment::CreatingRing | Moment::Opening => {
                vec![failed.unwrap(), ClientEvent::Rescinded]
            }
            Moment::Bound | Moment::Open | Moment::Closing => vec![ClientEvent::Rescinded],
        };
        assert_eq!(lab.heard(), told, "{moment:?}");
        assert_eq!(lab.posted(), [], "{moment:?}: the client has not let go");
        if moment == Moment::CreatingRing {
            assert_eq!(lab.released, [ring.unwrap()], "no device has seen the ring");
            // The host's answer may cross its rescind.
            lab.created(1, ring.unwrap(), NtStatus::SUCCESS).unwrap();
        }
        lab.guest.close(client);
        lab.run();
        if matches!(moment, Moment::Opening | Moment::Open) {
            let expected = [MessageType::CloseChannel, MessageType::GpadlTeardown];
            assert_eq!(lab.posted(), expected, "{moment:?}");
        }
        if matches!(moment, Moment::Opening | Moment::Open | Moment::Closing) {
            assert!(lab.released.is_empty(), "{moment:?}");
            lab.torn_down(ring.unwrap()).unwrap();
        }
        assert_eq!(lab.released, ring.into_iter().collect::<Vec<_>>(), "{moment:?}");
        assert_eq!(lab.posted(), [MessageType::RelIdReleased], "{moment:?}");
        lab.assert_rest(1, 0);
        assert_eq!(lab.guest.open(client, ring_request(8)), Err(RequestError::NotBound));

        // The number may come again, and a new client gets it.
        lab.guest.unbind(client);
        lab.bound(1);
        lab.assert_rest(1, 1);
    }
}

#[test]
fn when_the_host_is_gone_every_client_knows_at_once_and_keeps_its_ring_until_it_closes() {
    for moment in MOMENTS {
        let (mut lab, client, ring) = at(moment);
        let waiting = lab.guest.bind(Target { subchannel_index: 9, ..target() }).unwrap();
        lab.guest.host_gone();
        lab.run();
        let mut told = Vec::new();
        if let (Moment::CreatingRing | Moment::Opening, Some(gpadl)) = (moment, ring) {
            let status = NtStatus::DEVICE_REMOVED;
            told.push((client, ClientEvent::OpenFailed { gpadl, status }));
        }
        told.push((client, ClientEvent::Rescinded));
        told.push((waiting, ClientEvent::ConnectFailed(NtStatus::DEVICE_REMOVED)));
        assert_eq!(lab.told, told, "{moment:?}");
        assert_eq!(lab.events, [ConnectionEvent::Lost(LossReason::HostGone)], "{moment:?}");
        if moment == Moment::Open {
            assert!(lab.released.is_empty(), "the client still uses it");
            lab.guest.close(client);
            lab.run();
        }
        assert_eq!(lab.released, ring.into_iter().collect::<Vec<_>>(), "{moment:?}");
        lab.guest.unbind(client);
        lab.guest.unbind(waiting);
        lab.run();
        lab.assert_rest(0, 0);
        assert_eq!(lab.released.len(), usize::from(ring.is_some()), "{moment:?}: only once");
        assert_eq!(lab.posted(), [], "{moment:?}: there is nobody to post to");
    }
}

/// Connecting again makes the host forget everything; until it answers, it may use what it had.
#[test]
fn a_reconnect_keeps_memory_until_the_host_has_answered() {
    for moment in MOMENTS {
        let (mut lab, client, ring) = at(moment);
        lab.guest.connect().unwrap();
        lab.run();
        assert_eq!(lab.posted(), [MessageType::InitiateContact], "{moment:?}");
        assert_eq!(lab.heard().last(), Some(&ClientEvent::Rescinded), "{moment:?}");
        lab.guest.unbind(client);
        lab.run();
        assert!(lab.released.is_empty(), "{moment:?}");
        // What was on its way before the host read the contact means nothing.
        lab.rescind(1).unwrap();
        lab.host(accept(Version::V5_3, FeatureFlags::empty())).unwrap();
        assert_eq!(lab.released, ring.into_iter().collect::<Vec<_>>(), "{moment:?}");
        assert_eq!(lab.posted(), [MessageType::RequestOffers], "{moment:?}");
        lab.opened(1);
    }
}

#[test]
fn a_refused_ring_or_open_is_told_and_can_be_tried_again() {
    // A success that is no zero is a failure as well.
    for status in [NtStatus::UNSUCCESSFUL, NtStatus(0x8000_ffff), NtStatus(1), NtStatus::PENDING] {
        let reported = if status.is_success() { NtStatus::UNSUCCESSFUL } else { status };
        let (mut lab, client, ring) = at(Moment::CreatingRing);
        let gpadl = ring.unwrap();
        lab.created(1, gpadl, status).unwrap();
        assert_eq!(lab.heard(), [ClientEvent::OpenFailed { gpadl, status: reported }], "{status}");
        assert_eq!((lab.posted(), &lab.released[..]), (vec![], &[gpadl][..]), "{status}");
        lab.assert_rest(1, 1);

        let gpadl = lab.guest.open(client, ring_request(8)).unwrap();
        lab.run();
        lab.created(1, gpadl, NtStatus::SUCCESS).unwrap();
        lab.posts.clear();
        lab.opened_with(1, 1, status).unwrap();
        assert_eq!(lab.heard(), [ClientEvent::OpenFailed { gpadl, status: reported }], "{status}");
        assert_eq!(lab.posted(), [MessageType::GpadlTeardown], "{status}: never opened, no close");
        assert!(
            matches!(
                lab.guest.open(client, ring_request(8)),
                Err(RequestError::ChannelState { state: "being closed", .. })
            ),
            "{status}"
        );
        lab.torn_down(gpadl).unwrap();
        assert_eq!(lab.released.last(), Some(&gpadl), "{status}");
        assert!(lab.guest.open(client, ring_request(8)).is_ok(), "{status}");
    }
}

#[test]
fn buffers_left_behind_are_torn_down_with_the_channel() {
    let (mut lab, client, ring) = at(Moment::Open);
    let created = lab.guest.create_gpadl(client, &buffer()).unwrap();
    lab.run();
    lab.created(1, created, NtStatus::SUCCESS).unwrap();
    let creating = lab.guest.create_gpadl(client, &buffer()).unwrap();
    let asked_back = lab.guest.create_gpadl(client, &buffer()).unwrap();
    lab.guest.teardown_gpadl(client, asked_back).unwrap();
    lab.run();
    lab.posts.clear();
    lab.heard();
    lab.guest.close(client);
    lab.run();
    assert_eq!(
        lab.posted(),
        [MessageType::CloseChannel, MessageType::GpadlTeardown, MessageType::GpadlTeardown]
    );
    lab.created(1, creating, NtStatus::SUCCESS).unwrap();
    lab.created(1, asked_back, NtStatus::SUCCESS).unwrap();
    assert_eq!(lab.posted(), [MessageType::GpadlTeardown; 2]);
    for gpadl in [created, ring.unwrap(), creating] {
        lab.torn_down(gpadl).unwrap();
        assert_eq!(lab.heard(), [], "{gpadl:#x}");
    }
    lab.torn_down(asked_back).unwrap();
    assert_eq!(lab.heard(), [ClientEvent::GpadlTornDown { gpadl: asked_back }]);
    lab.assert_rest(1, 1);
}

#[test]
fn a_teardown_is_always_answered() {
    let (mut lab, client, ring) = at(Moment::Open);
    // Unknown, or not the client's own: there is nothing to wait for.
    for gpadl in [1, ring.unwrap()] {
        lab.guest.teardown_gpadl(client, gpadl).unwrap();
        lab.run();
        assert_eq!(lab.heard(), [ClientEvent::GpadlTornDown { gpadl }]);
    }
    assert_eq!(lab.posted(), []);
    // While the host may still use the pages, the answer waits.
    let gpadl = lab.guest.create_gpadl(client, &buffer()).unwrap();
    lab.run();
    lab.created(1, gpadl, NtStatus::SUCCESS).unwrap();
    lab.heard();
    lab.guest.unload().unwrap();
    lab.guest.teardown_gpadl(client, gpadl).unwrap();
    lab.run();
    assert_eq!(lab.heard(), [ClientEvent::Rescinded]);
    lab.host(HostMessage::UnloadComplete).unwrap();
    assert_eq!(lab.heard(), [ClientEvent::GpadlTornDown { gpadl }]);
}

#[test]
fn a_rescind_answers_for_every_gpadl_in_progress() {
    let (mut lab, client, _) = at(Moment::Open);
    let first = lab.guest.create_gpadl(client, &buffer()).unwrap();
    let second = lab.guest.create_gpadl(client, &buffer()).unwrap();
    lab.guest.teardown_gpadl(client, second).unwrap();
    lab.run();
    lab.rescind(1).unwrap();
    let status = NtStatus::DEVICE_REMOVED;
    assert_eq!(
        lab.heard(),
        [
            ClientEvent::GpadlCreated { gpadl: first, status },
            ClientEvent::GpadlTornDown { gpadl: second },
            ClientEvent::Rescinded,
        ]
    );
    lab.created(1, first, NtStatus::SUCCESS).unwrap();
    lab.created(1, second, NtStatus::UNSUCCESSFUL).unwrap();
    assert!(lab.created(1, second, NtStatus::SUCCESS).is_err(), "only once");
}

#[test]
fn the_same_instance_may_be_offered_again_while_the_old_channel_is_being_released() {
    let (mut lab, client, ring) = at(Moment::Open);
    lab.rescind(1).unwrap();
    let mut again = offer(2);
    again.instance_id = instance(1);
    lab.host(HostMessage::OfferChannel(again)).unwrap();
    lab.heard();
    let next = lab.guest.bind(target()).unwrap();
    lab.run();
    assert!(
        matches!(&lab.told.make_contiguous(), [(id, ClientEvent::Offered { .. })] if *id == next)
    );
    lab.told.clear();
    lab.guest.unbind(client);
    lab.run();
    lab.torn_down(ring.unwrap()).unwrap();
    lab.assert_rest(1, 1);
}

#[test]
fn messages_that_wait_for_a_channel_that_ends_are_not_posted() {
    let (mut lab, client, _) = at(Moment::Bound);
    // The host is short of buffers just when a long ring is described.
    lab.statuses.push_back(PostStatus::INSUFFICIENT_BUFFERS);
    lab.guest.open(client, ring_request(100)).unwrap();
    lab.run();
    assert_eq!(lab.guest.counts().messages, 4);
    lab.rescind(1).unwrap();
    lab.guest.unbind(client);
    lab.guest.retry_post();
    lab.run();
    assert_eq!(lab.posted(), [MessageType::RelIdReleased]);
    lab.assert_rest(0, 0);
}
