//! Offers and who gets them; requests beside opening and closing.

use kmcl::bus::{GpadlPages, PageRange};

use super::*;
use crate::gpadl::MAX_GPADLS_IN_PROGRESS;
use crate::machine::requests::MAX_HVSOCK_REQUESTS;
use crate::mmio::MmioWindow;
use crate::post::MAX_QUEUED_MESSAGES;
use vmbus_wire::message::{
    ModifyChannelResponse, ModifyConnectionResponse, TlConnectRequest, TlConnectResult,
};

#[test]
fn an_offer_goes_to_the_first_client_that_it_fits() {
    let exactly = |channel| Target { interface_instance: Some(instance(channel)), ..target() };
    let other_type = Target { interface_type: INSTANCE, ..target() };
    let sub = Target { subchannel_index: 1, ..exactly(1) };
    let mut lab = Lab::connected(Version::V5_3);
    let wants_two = lab.guest.bind(exactly(2)).unwrap();
    lab.guest.bind(other_type).unwrap();
    let wants_any = lab.guest.bind(target()).unwrap();
    let wants_sub = lab.guest.bind(sub).unwrap();
    let mut subchannel = offer(3);
    subchannel.instance_id = instance(1);
    subchannel.subchannel_index = 1.into();
    for (offer, client) in
        [(offer(1), Some(wants_any)), (offer(2), Some(wants_two)), (subchannel, Some(wants_sub))]
    {
        lab.host(HostMessage::OfferChannel(offer)).unwrap();
        let told: Vec<_> = lab.told.drain(..).map(|(id, _)| id).collect();
        assert_eq!(told, client.into_iter().collect::<Vec<_>>(), "{offer:?}");
    }
    // A channel offered before anybody asked is there for whoever comes.
    lab.host(HostMessage::OfferChannel(offer(9))).unwrap();
    assert!(lab.told.is_empty());
    let late = lab.guest.bind(target()).unwrap();
    lab.run();
    let (client, event) = lab.told.pop_front().unwrap();
    assert_eq!(client, late);
    let ClientEvent::Offered { offer, mmio } = event else { panic!("{event:?}") };
    assert_eq!((offer.channel_id, offer.connection_id, mmio), (9, 0x2009, None));
    assert_eq!(lab.guest.bound_offer(late), Some(&*offer));
    assert_eq!(lab.guest.client_of(9), Some(late));
    assert_eq!(lab.guest.offers().count(), 4);
}

/// Fields that a version does not have mean nothing in it.
#[test]
fn an_offer_is_read_by_the_rules_of_its_version() {
    for version in Version::ALL {
        let mut lab = Lab::connected(version);
        let mut message = offer(5);
        message.subchannel_index = 4.into();
        message.monitor_id = 17;
        message.monitor_allocated = 0xff;
        lab.host(HostMessage::OfferChannel(message)).unwrap();
        let offer = lab.guest.offers().next().unwrap();
        assert_eq!(offer.subchannel_index, if version < Version::V2_4 { 0 } else { 4 });
        assert_eq!(offer.connection_id, if version < Version::V1_1 { 2 } else { 0x2005 });
        assert_eq!(offer.monitor_id, Some(17), "{version}");
    }
}

#[test]
fn mmio_space_comes_out_of_the_window_and_goes_back() {
    const MIB: u64 = 1 << 20;
    let mut config = config();
    config.mmio = Some(MmioWindow { gpa: 0xf800_0000, len: 8 * MIB });
    let mut lab = Lab::connected_with(config, Version::V5_3);
    let mut wants = offer(1);
    wants.mmio_megabytes = 6.into();
    let first = lab.guest.bind(target()).unwrap();
    lab.host(HostMessage::OfferChannel(wants)).unwrap();
    assert!(matches!(
        lab.heard()[..],
        [ClientEvent::Offered { mmio: Some((0xf800_0000, len)), .. }] if len == 6 * MIB
    ));
    // There is not enough for a second one, until the first client has left.
    let mut second = offer(2);
    second.mmio_megabytes = 6.into();
    lab.host(HostMessage::OfferChannel(second)).unwrap();
    let only_two = Target { interface_instance: Some(instance(2)), ..target() };
    lab.guest.bind(only_two).unwrap();
    lab.run();
    let status = NtStatus::INSUFFICIENT_RESOURCES;
    assert_eq!(lab.heard(), [ClientEvent::ConnectFailed(status)]);
    lab.guest.unbind(first);
    lab.guest.bind(only_two).unwrap();
    lab.run();
    assert!(matches!(lab.heard()[..], [ClientEvent::Offered { mmio: Some(_), .. }]));
}

#[test]
fn target_processors_are_changed_as_the_version_allows() {
    for version in Version::ALL {
        let mut lab = Lab::connected(version);
        lab.opened(1);
        let result = lab.guest.modify_channel(1, 5);
        lab.run();
        if version < Version::V4_1 {
            let kind = MessageType::ModifyChannel;
            assert_eq!(result, Err(RequestError::NotNegotiated { kind, version }));
            continue;
        }
        assert_eq!(result, Ok(()), "{version}");
        let message = [22u32, 0, 1, 5].map(u32::to_le_bytes).concat();
        assert_eq!(lab.posts, [(1, message)], "{version}");
        let done = ConnectionEvent::ChannelModified { channel_id: 1, status: NtStatus::SUCCESS };
        if version >= Version::V5_3 {
            assert!(lab.events.is_empty(), "{version}: the host answers");
            let again = lab.guest.modify_channel(1, 6);
            assert!(matches!(again, Err(RequestError::ChannelState { .. })), "{version}");
            let response = ModifyChannelResponse::new(1, NtStatus::SUCCESS);
            lab.host(HostMessage::ModifyChannelResponse(response)).unwrap();
        }
        assert_eq!(lab.events, [done], "{version}");
        assert_eq!(lab.guest.modify_channel(1, 6), Ok(()), "{version}");
    }
}

#[test]
fn only_open_channels_have_a_target_processor_to_change() {
    let mut lab = Lab::connected(Version::V5_3);
    let none = lab.guest.modify_channel(1, 0);
    assert!(matches!(none, Err(RequestError::ChannelState { state: "not offered", .. })));
    let client = lab.bound(1);
    let closed = lab.guest.modify_channel(1, 0);
    assert!(matches!(closed, Err(RequestError::ChannelState { state: "closed", .. })));
    lab.guest.unbind(client);
    lab.rescind(1).unwrap();
    lab.opened(1);
    let target_vp = u32::MAX;
    assert_eq!(lab.guest.modify_channel(1, target_vp), Err(RequestError::TargetVp { target_vp }));
    // A rescind answers for the host.
    lab.guest.modify_channel(1, 0).unwrap();
    lab.rescind(1).unwrap();
    let status = NtStatus::DEVICE_REMOVED;
    assert_eq!(
        lab.events.pop_back(),
        Some(ConnectionEvent::ChannelModified { channel_id: 1, status })
    );
}

#[test]
fn sockets_are_asked_for_as_the_version_allows() {
    let (endpoint_id, service_id) = (INSTANCE, TYPE);
    for version in Version::ALL {
        for silo in [None, Some(CLIENT_ID)] {
            let mut lab = Lab::connected(version);
            let asked = lab.guest.connect_hvsock(endpoint_id, service_id, silo);
            lab.run();
            let needs = if silo.is_some() { Version::V5_2 } else { Version::V4_0 };
            assert_eq!(asked.is_ok(), version >= needs, "{version}, silo {silo:?}");
            if version < needs {
                assert!(lab.posts.is_empty(), "{version}");
                continue;
            }
            let mut message = vec![21, 0, 0, 0, 0, 0, 0, 0];
            message.extend(endpoint_id.to_bytes());
            message.extend(service_id.to_bytes());
            message.extend(silo.into_iter().flat_map(Guid::to_bytes));
            assert_eq!(lab.posts, [(1, message)], "{version}");
        }
    }
}

#[test]
fn a_socket_is_an_offer_for_whoever_waits_for_it_or_a_refusal() {
    let (endpoint_id, service_id) = (instance(3), TYPE);
    let socket = Target {
        interface_type: service_id,
        interface_instance: Some(endpoint_id),
        subchannel_index: 0,
    };
    let refusal = |status| {
        let request = TlConnectRequest { endpoint_id, service_id };
        HostMessage::TlConnectResult(TlConnectResult::new(&request, status))
    };
    let mut lab = Lab::connected(Version::V5_3);
    let client = lab.guest.bind(socket).unwrap();
    lab.guest.connect_hvsock(endpoint_id, service_id, None).unwrap();
    lab.host(HostMessage::OfferChannel(offer(3))).unwrap();
    assert!(matches!(lab.heard()[..], [ClientEvent::Offered { .. }]));
    let late = lab.host(refusal(NtStatus::CONNECTION_REFUSED));
    assert_eq!(late, Err(HostError::UnknownHvsock { endpoint_id, service_id }));
    lab.guest.unbind(client);
    lab.rescind(3).unwrap();
    lab.events.clear();

    // A refusal that says success is a refusal.
    for status in [NtStatus::CONNECTION_REFUSED, NtStatus::SUCCESS] {
        let shown = if status.is_success() { NtStatus::UNSUCCESSFUL } else { status };
        let client = lab.guest.bind(socket).unwrap();
        lab.guest.connect_hvsock(endpoint_id, service_id, None).unwrap();
        lab.host(refusal(status)).unwrap();
        assert_eq!(lab.heard(), [ClientEvent::ConnectFailed(shown)]);
        let event = ConnectionEvent::HvsockRefused { endpoint_id, service_id, status: shown };
        assert_eq!(lab.events.pop_front(), Some(event));
        lab.guest.unbind(client);
    }
    lab.assert_rest(0, 0);
}

#[test]
fn pause_resume_and_new_monitor_pages_need_their_features() {
    for version in Version::ALL {
        let mut lab = Lab::connected(version);
        let results = [lab.guest.pause(), lab.guest.resume(), lab.guest.modify_connection(None)];
        if version < Version::V6_0 {
            for result in results {
                assert!(matches!(result, Err(RequestError::NotNegotiated { .. })), "{version}");
            }
            continue;
        }
        lab.run();
        assert_eq!(lab.posted(), [MessageType::Pause, MessageType::ModifyConnection]);
        assert!(lab.guest.modify_connection(None).is_err(), "one at a time");
        let state = WireState::LowResources;
        let response = ModifyConnectionResponse::new(state);
        lab.host(HostMessage::ModifyConnectionResponse(response)).unwrap();
        lab.host(HostMessage::PauseResponse).unwrap();
        assert_eq!(
            lab.events.drain(..).collect::<Vec<_>>(),
            [
                ConnectionEvent::ConnectionModified { connection_state: state },
                ConnectionEvent::Paused
            ]
        );
        let while_paused = lab.host(HostMessage::OfferChannel(offer(1)));
        assert!(matches!(while_paused, Err(HostError::Unexpected { state: "paused", .. })));
        lab.guest.resume().unwrap();
        lab.guest.modify_connection(Some((0x5000, 0x6000))).unwrap();
        lab.run();
        assert_eq!(lab.posts[0], (1, vec![29, 0, 0, 0, 0, 0, 0, 0]));
        let mut modify = vec![25, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0];
        modify.extend([0, 0x60, 0, 0, 0, 0, 0, 0]);
        assert_eq!(lab.posts[1], (1, modify));
        lab.host(HostMessage::OfferChannel(offer(1))).unwrap();
    }
}

#[test]
fn every_table_of_the_guests_own_is_bounded() {
    let limit = |result: Result<(), RequestError>| match result {
        Err(RequestError::Limit { limit, .. }) => limit,
        other => panic!("{other:?}"),
    };
    let mut lab = Lab::connected(Version::V5_3);
    for request in 0..MAX_HVSOCK_REQUESTS {
        let endpoint = Guid::from_u128(request as u128);
        lab.guest.connect_hvsock(endpoint, TYPE, None).unwrap();
    }
    assert_eq!(limit(lab.guest.connect_hvsock(TYPE, TYPE, None)), MAX_HVSOCK_REQUESTS);

    let client = lab.bound(1);
    let page = PageRange { byte_count: 4096, byte_offset: 0, pfns: vec![1] };
    let small = GpadlPages { ranges: vec![page], read_only: false };
    for _ in 0..MAX_GPADLS_IN_PROGRESS {
        lab.guest.create_gpadl(client, &small).unwrap();
    }
    let result = lab.guest.create_gpadl(client, &small).map(drop);
    assert_eq!(limit(result), MAX_GPADLS_IN_PROGRESS);

    // A host that takes no message: what waits for it does not grow without end.
    let mut lab = Lab::connected(Version::V5_3);
    let client = lab.bound(1);
    lab.statuses.push_back(PostStatus::INSUFFICIENT_BUFFERS);
    let pfns = (0..8190).collect();
    let page = PageRange { byte_count: 8190 * 4096, byte_offset: 0, pfns };
    let large = GpadlPages { ranges: vec![page], read_only: false };
    let full = loop {
        if let Err(error) = lab.guest.create_gpadl(client, &large) {
            break limit(Err(error));
        }
        lab.run();
    };
    assert_eq!(full, MAX_QUEUED_MESSAGES);
    assert!(lab.guest.counts().messages <= MAX_QUEUED_MESSAGES);

    let mut lab = Lab::connected(Version::V5_3);
    for _ in 0..MAX_CLIENTS {
        lab.guest.bind(target()).unwrap();
    }
    assert_eq!(limit(lab.guest.bind(target()).map(drop)), MAX_CLIENTS);
}

#[test]
fn requests_of_unknown_or_unbound_clients_are_refused() {
    let mut lab = Lab::connected(Version::V5_3);
    let waiting = lab.guest.bind(target()).unwrap();
    let gone = lab.guest.bind(target()).unwrap();
    lab.guest.unbind(gone);
    let pages = GpadlPages { ranges: vec![], read_only: false };
    for (client, expected) in
        [(waiting, RequestError::NotBound), (gone, RequestError::UnknownClient)]
    {
        assert_eq!(lab.guest.open(client, ring_request(4)), Err(expected));
        assert_eq!(lab.guest.create_gpadl(client, &pages), Err(expected));
        lab.guest.close(client);
    }
    assert_eq!(lab.guest.teardown_gpadl(gone, 1), Err(RequestError::UnknownClient));
    lab.guest.unbind(gone);
    lab.run();
    assert!(lab.posts.is_empty());
}
