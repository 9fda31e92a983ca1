//! The seam to the bus: what a channel asks of its bus, what it makes of the bus's events.
//!
//! Source: `kmcl::bus`; kmcl-semantics section 3.2.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::Arc;

use common::raw::{RawBus, Said, as_bus};
use common::{Call, Device, Failures, INSTANCE, TYPE, client, server};
use kmcl::bus::{BusEvent, MAX_PENDING_EVENTS};
use kmcl::{Channel, ChannelState, Error, Guid, NtStatus, Side};

use Call::{Closed, Opened, PostStarted, Started, Suspend};
use ChannelState as S;

// ---- The bus ----------------------------------------------------------------------------------------

/// VmbChannelEnable: needs a Disabled channel and an interface; a bus that refuses is heard at once,
/// and the channel can be enabled again.
#[test]
fn enable_reports_why_it_failed() {
    for side in [Side::Server, Side::Client] {
        let bus = RawBus::new();
        let channel = Channel::allocate(side, as_bus(&bus));
        let error = channel.enable().unwrap_err();
        assert_eq!(error, Error::State { function: "enable", state: S::Disabled });
        match side {
            Side::Server => channel.server_init_set_target_interface_id(TYPE, INSTANCE),
            Side::Client => channel.client_init_set_target_pnp(TYPE, None, None),
        }
        .unwrap();
        bus.refuse(NtStatus::INSUFFICIENT_RESOURCES);
        let error = channel.enable().unwrap_err();
        assert_eq!(error.status(), NtStatus::INSUFFICIENT_RESOURCES);
        assert_eq!(channel.state(), S::Disabled);
        channel.enable().unwrap();
        let error = channel.enable().unwrap_err();
        assert_eq!(error, Error::State { function: "enable", state: S::Enabled });
        assert_eq!(error.status(), NtStatus::INVALID_DEVICE_STATE);
        channel.disable();
    }
}

/// What the server tells its bus, and when: the answer to an open, that it has let go after a close,
/// and the end of the offer.
#[test]
fn the_server_answers_its_bus_in_order() {
    let bus = RawBus::new();
    let device = Device::new();
    let server = server(&as_bus(&bus), &device);
    device.when({
        let bus = bus.clone();
        move |channel, call| {
            match call {
                Opened => assert_eq!(bus.take_said(), []),
                Started => assert_eq!(bus.take_said(), [Said::OpenResult(NtStatus::SUCCESS)]),
                Closed => {
                    assert_eq!(bus.take_said(), []);
                    assert!(channel.memory().is_some(), "the rings are let go of afterwards");
                }
                _ => {}
            }
            Ok(())
        }
    });
    server.enable().unwrap();
    server.start();
    for _ in 0..2 {
        let peer = bus.open(8, 8);
        server.process(1);
        assert_eq!(server.state(), S::Active);
        assert!(bus.post(BusEvent::PeerClosed));
        server.process(1);
        assert_eq!(server.state(), S::Closed);
        assert_eq!(bus.take_said(), [Said::Closed]);
        drop(peer);
    }
    let _peer = bus.open(8, 8);
    server.process(1);
    server.disable();
    assert_eq!(bus.take_said(), [Said::Closed, Said::Revoke]);
}

/// The client asks for the rings that were set, and closes once its callbacks are over.
#[test]
fn the_client_asks_its_bus_in_order() {
    let bus = RawBus::new();
    let driver = Device::new();
    let client = client(&as_bus(&bus), &driver);
    client.client_init_set_ring_buffer_page_count(4, 5).unwrap();
    driver.when({
        let bus = bus.clone();
        move |_, _| {
            assert_eq!(bus.take_said(), []);
            Ok(())
        }
    });
    client.enable().unwrap();
    bus.offered(None);
    client.process(1);
    assert_eq!(client.state(), S::Connecting);
    assert_eq!(bus.take_said(), [Said::Open(4, 5)]);
    let _peer = bus.open_completed();
    client.process(1);
    assert_eq!(client.state(), S::Active);
    client.disable();
    assert_eq!(bus.take_said(), [Said::Close]);
    assert_eq!(driver.take_calls(), [Opened, Started, PostStarted, Suspend, Closed]);
}

/// EvtVmbChannelPnpFailure: the connection fails at each moment before Opened. The channel is
/// Disabled when the callback runs, and no other callback does.
#[test]
fn a_connection_that_fails_is_reported_once() {
    type Fail = fn(&RawBus);
    let fails: [(&str, bool, Fail, NtStatus); 4] = [
        (
            "the open failed",
            true,
            |bus| assert!(bus.post(BusEvent::OpenCompleted(Err(NtStatus::CONNECTION_REFUSED)))),
            NtStatus::CONNECTION_REFUSED,
        ),
        (
            "the connection failed",
            false,
            |bus| assert!(bus.post(BusEvent::ConnectFailed(NtStatus::NOT_FOUND))),
            NtStatus::NOT_FOUND,
        ),
        (
            "the bus went away",
            false,
            |bus| assert!(bus.post(BusEvent::Rescinded)),
            NtStatus::DEVICE_REMOVED,
        ),
        (
            "the offer was withdrawn",
            true,
            |bus| assert!(bus.post(BusEvent::Rescinded)),
            NtStatus::DEVICE_REMOVED,
        ),
    ];
    for (what, offered, fail, status) in fails {
        let bus = RawBus::new();
        let driver = Device::new();
        let client = client(&as_bus(&bus), &driver);
        let failures = Failures::of(&client);
        client.enable().unwrap();
        if offered {
            bus.offered(None);
        }
        client.process(1);
        fail(&bus);
        client.process(1);
        assert_eq!(failures.take(), [(status, S::Disabled)], "{what}");
        assert_eq!(driver.take_calls(), [], "{what}");
        assert_eq!(bus.take_said().last(), Some(&Said::Close), "{what}");
        client.enable().unwrap();
        client.disable();
        assert_eq!(failures.take(), [], "{what}");
    }
}

/// What the bus says about a connection that is over reaches nobody.
#[test]
fn events_of_a_former_connection_are_dropped() {
    let bus = RawBus::new();
    let device = Device::new();
    let server = server(&as_bus(&bus), &device);
    server.enable().unwrap();
    let former = bus.events();
    server.disable();
    server.enable().unwrap();
    server.start();
    let peer = bus.open(8, 8);
    server.process(1);
    assert!(former.post(BusEvent::PeerClosed));
    server.process(1);
    assert_eq!(server.state(), S::Active);
    server.disable();
    drop(peer);
}

/// A bus that floods a channel is told so, and the channel keeps the events it has room for.
#[test]
fn a_flood_of_events_is_bounded() {
    let bus = RawBus::new();
    let server = server(&as_bus(&bus), &Device::new());
    server.enable().unwrap();
    server.set_waker(std::task::Waker::noop().clone()); // nobody takes them
    for n in 0..MAX_PENDING_EVENTS {
        assert!(bus.post(BusEvent::PeerClosed), "{n}");
    }
    assert!(!bus.post(BusEvent::PeerClosed));
    server.process(1);
    assert!(bus.post(BusEvent::PeerClosed), "there is room again");
    server.clear_waker();
    server.disable();
}

/// Two offers of one interface clash; two clients get an offer each, in their order.
#[test]
fn the_loopback_bus_matches_offers_and_clients() {
    let bus = kmcl::loopback::LoopbackBus::new(1 << 20).unwrap();
    let as_dyn: Arc<dyn kmcl::bus::Bus> = bus.clone();
    let devices = [Device::new(), Device::new()];
    let other = Guid::from_u128(77);
    let servers = [server(&as_dyn, &devices[0]), server(&as_dyn, &devices[1])];
    servers[0].enable().unwrap();
    assert_eq!(servers[1].enable().unwrap_err().status(), NtStatus::INVALID_PARAMETER);
    servers[1].server_init_set_target_interface_id(TYPE, other).unwrap();
    servers[1].enable().unwrap();

    let clients = [client(&as_dyn, &Device::new()), client(&as_dyn, &Device::new())];
    clients[0].client_init_set_target_pnp(TYPE, Some(other), None).unwrap();
    for channel in clients.iter().chain(&servers).chain(&clients) {
        if channel.state() == S::Disabled {
            channel.enable().unwrap();
        }
        channel.process(1);
    }
    for client in &clients {
        client.process(1);
    }
    assert_eq!(clients[0].get_interface_instance(), other);
    assert_eq!(clients[1].get_interface_instance(), INSTANCE);
    for channel in clients.iter().chain(&servers) {
        assert!(channel.state().is_open(), "{channel:?}");
        channel.disable();
    }
}
