//! Every Init setter: success, each refusal with its status, wrong endpoint, wrong state, defaults.
//!
//! Source: kmcl-semantics section 4; D-1, D-53 to D-55, D-59, D-60, D-68.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::{Arc, Mutex};

use common::raw::{OTHER, RawBus, Said, as_bus};
use common::{
    Answers, Call, Device, INSTANCE, Pair, TYPE, WAIT, client, lock, packet, refusal, send, server,
};
use kmcl::bus::{Target, USER_DATA_SIZE};
use kmcl::{
    Channel, ChannelFlags, ChannelState, Error, Limits, NtStatus, SendFlags, ServerFlags, Side,
};

type Set = fn(&Channel) -> Result<(), Error>;

/// Every setter with arguments that it takes: for both endpoints, or for one.
const SETTERS: [(&str, Option<Side>, Set); 18] = [
    ("init_set_flags", None, |c| c.init_set_flags(ChannelFlags::IS_PIPE)),
    ("init_set_friendly_name", None, |c| c.init_set_friendly_name("disk 0")),
    ("init_set_maximum_packet_size", None, |c| c.init_set_maximum_packet_size(64)),
    ("init_set_maximum_external_data", None, |c| c.init_set_maximum_external_data(4096, 1)),
    ("init_set_client_context_size", None, |c| c.init_set_client_context_size(16)),
    ("init_set_process_packet_callbacks", None, |c| {
        c.init_set_process_packet_callbacks(Device::new())
    }),
    ("init_set_state_change_callbacks", None, |c| c.init_set_state_change_callbacks(Device::new())),
    ("init_set_maximum_completion_size", None, |c| c.init_set_maximum_completion_size(8)),
    ("init_set_maximum_packet_count", None, |c| c.init_set_maximum_packet_count(4)),
    ("init_set_subchannel_index", None, |c| c.init_set_subchannel_index(1)),
    ("init_set_user_data", None, |c| c.init_set_user_data(&[1; USER_DATA_SIZE])),
    ("client_init_set_ring_buffer_page_count", Some(Side::Client), |c| {
        c.client_init_set_ring_buffer_page_count(2, 2)
    }),
    ("client_init_set_target_pnp", Some(Side::Client), |c| {
        c.client_init_set_target_pnp(TYPE, Some(INSTANCE), None)
    }),
    ("client_init_set_target_vp", Some(Side::Client), |c| c.client_init_set_target_vp(3)),
    ("server_init_set_flags", Some(Side::Server), |c| c.server_init_set_flags(ServerFlags::all())),
    ("server_init_set_target_interface_id", Some(Side::Server), |c| {
        c.server_init_set_target_interface_id(TYPE, INSTANCE)
    }),
    ("server_init_set_target_vtl", Some(Side::Server), |c| c.server_init_set_target_vtl(1)),
    ("server_init_set_mmio_megabytes", Some(Side::Server), |c| {
        c.server_init_set_mmio_megabytes(8, 0)
    }),
];

/// Every setter is refused with STATUS_INVALID_PARAMETER_1.
fn all_refused(channel: &Channel, why: &str) {
    for (name, _, set) in SETTERS {
        let error = set(channel).expect_err(name);
        assert_eq!(error.status(), NtStatus::INVALID_PARAMETER_1, "{name}, {why}");
        let Error::NotInitializing { function, state, .. } = error else {
            panic!("{name}, {why}: {error}");
        };
        assert_eq!((function, state), (name, channel.state()), "{why}");
    }
}

/// D-59: a setter for the other endpoint is refused, one for this or both is taken.
#[test]
fn setters_belong_to_their_endpoint() {
    for side in [Side::Server, Side::Client] {
        let channel = Channel::allocate(side, as_bus(&RawBus::new()));
        for (name, only, set) in SETTERS {
            let status = set(&channel).map_err(|error| error.status());
            let fits = only.is_none_or(|only| only == side);
            let expected = if fits { Ok(()) } else { Err(NtStatus::INVALID_PARAMETER_1) };
            assert_eq!(status, expected, "{name} on a {side:?}");
        }
    }
}

/// D-1: every setter is refused in every state but Disabled, and inside every callback.
#[test]
fn setters_belong_to_a_disabled_channel() {
    let pair = Pair::new(Device::new());
    let inside = Arc::new(Mutex::new(Vec::new()));
    for device in [&pair.device, &pair.driver] {
        let inside = inside.clone();
        device.when(move |channel, call| {
            all_refused(channel, &format!("{call:?}"));
            lock(&inside).push(call.clone());
            Ok(())
        });
    }
    pair.server.enable().unwrap();
    all_refused(&pair.server, "Enabled");
    pair.client.enable().unwrap();
    all_refused(&pair.client, "Enabled");
    pair.pump();
    assert_eq!(pair.states(), (ChannelState::Paused, ChannelState::Active));
    all_refused(&pair.server, "Paused");
    all_refused(&pair.client, "Active");
    pair.server.start();
    pair.client.disable();
    pair.pump();
    assert_eq!(pair.states(), (ChannelState::Closed, ChannelState::Disabled));
    all_refused(&pair.server, "Closed");
    pair.server.disable();
    assert_eq!(lock(&inside).len(), 10, "both endpoints, five callbacks each");
    for (name, only, set) in SETTERS {
        for channel in [&pair.server, &pair.client] {
            if only.is_none_or(|only| only == channel.side()) {
                assert_eq!(set(channel), Ok(()), "{name} on a {channel:?}");
            }
        }
    }
}

/// Each argument out of its range, with the status of its position; the value set before stays.
#[test]
fn arguments_out_of_range_are_refused_by_position() {
    let bus = as_bus(&RawBus::new());
    let server = Channel::allocate(Side::Server, bus.clone());
    let client = Channel::allocate(Side::Client, bus);
    let over = |n: u8| NtStatus::invalid_parameter(n);
    let long = "n".repeat(Limits::NAME + 1);
    let rows: [(&str, Result<(), Error>, NtStatus); 20] = [
        ("unknown flag", server.init_set_flags(ChannelFlags::from_bits_retain(2)), over(2)),
        ("unknown flag", client.init_set_flags(ChannelFlags::from_bits_retain(3)), over(2)),
        ("long name", server.init_set_friendly_name(&long), over(2)),
        ("no packet", server.init_set_maximum_packet_size(0), over(2)),
        ("packet", server.init_set_maximum_packet_size(Limits::PACKET_SIZE + 1), over(2)),
        ("no data", server.init_set_maximum_external_data(0, 1), over(2)),
        ("data", server.init_set_maximum_external_data(Limits::EXTERNAL_DATA + 1, 1), over(2)),
        ("no chain", server.init_set_maximum_external_data(1, 0), over(3)),
        ("chain", server.init_set_maximum_external_data(1, Limits::EXTERNAL_RANGES + 1), over(3)),
        ("context", server.init_set_client_context_size(Limits::CLIENT_CONTEXT + 1), over(2)),
        ("completion", server.init_set_maximum_completion_size(Limits::PACKET_SIZE + 1), over(2)),
        ("no packets", server.init_set_maximum_packet_count(0), over(2)),
        ("packets", server.init_set_maximum_packet_count(Limits::PACKETS + 1), over(2)),
        ("no incoming pages", client.client_init_set_ring_buffer_page_count(0, 8), over(2)),
        ("no outgoing pages", client.client_init_set_ring_buffer_page_count(8, 0), over(3)),
        ("a page without data", client.client_init_set_ring_buffer_page_count(1, 8), over(2)),
        (
            "outgoing pages",
            client.client_init_set_ring_buffer_page_count(2, Limits::RING_PAGES + 1),
            over(3),
        ),
        (
            "unknown flag",
            server.server_init_set_flags(ServerFlags::from_bits_retain(0x20)),
            over(2),
        ),
        ("VTL (D-68)", server.server_init_set_target_vtl(3), over(2)),
        (
            "no MMIO (D-53)",
            server.server_init_set_mmio_megabytes(0, 0),
            NtStatus::INVALID_PARAMETER,
        ),
    ];
    for (what, result, status) in rows {
        assert_eq!(result.unwrap_err().status(), status, "{what}");
    }
}

/// The largest and smallest arguments that are taken.
#[test]
fn arguments_at_their_bounds_are_taken() {
    let bus = as_bus(&RawBus::new());
    let server = Channel::allocate(Side::Server, bus.clone());
    let client = Channel::allocate(Side::Client, bus);
    let longest = "n".repeat(Limits::NAME);
    let rows: [(&str, Result<(), Error>); 13] = [
        ("no flag", server.init_set_flags(ChannelFlags::empty())),
        ("name", server.init_set_friendly_name(&longest)),
        ("packet", server.init_set_maximum_packet_size(Limits::PACKET_SIZE)),
        ("packet of a byte", server.init_set_maximum_packet_size(1)),
        (
            "external data",
            server.init_set_maximum_external_data(Limits::EXTERNAL_DATA, Limits::EXTERNAL_RANGES),
        ),
        ("external byte", server.init_set_maximum_external_data(1, 1)),
        ("no context", server.init_set_client_context_size(0)),
        ("no completion payload", server.init_set_maximum_completion_size(0)),
        ("packets", server.init_set_maximum_packet_count(Limits::PACKETS)),
        ("pages", client.client_init_set_ring_buffer_page_count(2, Limits::RING_PAGES)),
        ("VTL", server.server_init_set_target_vtl(Limits::VTL)),
        ("MMIO that is needed (D-53)", server.server_init_set_mmio_megabytes(1, 0)),
        ("MMIO that would be nice (D-53)", server.server_init_set_mmio_megabytes(0, 1)),
    ];
    for (what, result) in rows {
        assert_eq!(result, Ok(()), "{what}");
    }
}

// ---- Where settings go ------------------------------------------------------------------------------

/// The offer says what was set: VmbServerChannelInitSetFlags, SetTargetInterfaceId, SetTargetVtl,
/// SetMmioMegabytes, and our subchannel index and user data.
#[test]
fn the_offer_carries_the_settings_of_a_server() {
    let bus = RawBus::new();
    let server = server(&as_bus(&bus), &Device::new());
    server.server_init_set_target_interface_id(OTHER, TYPE).unwrap();
    server.server_init_set_mmio_megabytes(12, 34).unwrap();
    server.server_init_set_target_vtl(2).unwrap();
    server.init_set_subchannel_index(5).unwrap();
    server.init_set_user_data(&[0xab; USER_DATA_SIZE]).unwrap();
    type Flag = fn(&kmcl::bus::Offer) -> bool;
    let flags: [(ServerFlags, Flag); 5] = [
        (ServerFlags::LOOPBACK_OFFER, |offer| offer.loopback),
        (ServerFlags::ENUMERATE_DEVICE_INTERFACE, |offer| offer.enumerate_device_interface),
        (ServerFlags::OFFER_AS_PIPE, |offer| offer.pipe),
        (ServerFlags::FORCE_NEW_CHANNEL, |offer| offer.force_new_channel),
        (ServerFlags::TLNPI_PROVIDER_OFFER, |offer| offer.tlnpi_provider),
    ];
    for (set, _) in flags {
        server.server_init_set_flags(set).unwrap();
        server.enable().unwrap();
        let offer = bus.offer_made();
        for (flag, of) in flags {
            assert_eq!(of(&offer), flag == set, "{flag:?} where {set:?} was set");
        }
        assert_eq!((offer.interface_type, offer.interface_instance), (OTHER, TYPE));
        assert_eq!((offer.mmio_megabytes, offer.mmio_megabytes_optional), (12, 34));
        assert_eq!((offer.target_vtl, offer.subchannel_index), (2, 5));
        assert_eq!(offer.user_defined, [0xab; USER_DATA_SIZE]);
        server.disable();
    }
    server.server_init_set_flags(ServerFlags::empty()).unwrap();
    server.init_set_flags(ChannelFlags::IS_PIPE).unwrap();
    server.enable().unwrap();
    assert!(bus.offer_made().pipe, "a pipe of either flag is offered as one");
    server.disable();
}

/// What a client looks for and asks for: VmbClientChannelInitSetTargetPnp,
/// SetRingBufferPageCount, and our target VP and user data.
#[test]
fn the_open_carries_the_settings_of_a_client() {
    let bus = RawBus::new();
    let client = client(&as_bus(&bus), &Device::new());
    client.client_init_set_target_pnp(OTHER, Some(TYPE), None).unwrap();
    client.client_init_set_ring_buffer_page_count(9, 17).unwrap();
    client.client_init_set_target_vp(6).unwrap();
    client.init_set_subchannel_index(2).unwrap();
    client.init_set_user_data(&[0xcd; USER_DATA_SIZE]).unwrap();
    client.enable().unwrap();
    assert_eq!(
        bus.target_wanted(),
        Target { interface_type: OTHER, interface_instance: Some(TYPE), subchannel_index: 2 }
    );
    bus.offered(None);
    client.process(1);
    let request = bus.request_made();
    assert_eq!((request.incoming_pages, request.outgoing_pages), (9, 17));
    assert_eq!((request.target_vp, request.user_data), (6, [0xcd; USER_DATA_SIZE]));
    client.disable();
}

/// The device-defined bytes of the open reach the server, while it is open.
#[test]
fn the_server_sees_the_user_data_of_the_open() {
    let pair = Pair::open_with(Device::new(), |pair| {
        pair.client.init_set_user_data(&[0x3c; USER_DATA_SIZE]).unwrap();
    });
    assert_eq!(pair.server.open_user_data(), Some([0x3c; USER_DATA_SIZE]));
    pair.client.disable();
    pair.pump();
    assert_eq!(pair.server.open_user_data(), None);
    pair.close();
}

/// VmbChannelInitSetMaximumPacketSize, VmbChannelInitSetMaximumExternalData: the library makes the
/// rings large enough; rings that were set larger stay.
#[test]
fn a_clients_rings_hold_its_largest_packet() {
    // Packet size, external bytes and ranges; pages that were set; incoming and outgoing pages asked for.
    for (packet, external, set, expected) in [
        (4096, None, (2, 2), (3, 3)),
        (4064, None, (2, 2), (2, 2)), // 16 + 4064 + 8 bytes, and 8 that stay free: a page of data
        (4065, None, (2, 2), (3, 3)),
        (4065, None, (5, 6), (5, 6)),
        (65_536, None, (8, 8), (18, 18)),
        (64, Some((1 << 20, 1)), (2, 2), (2, 2)),
        (64, Some((2 << 20, 1)), (2, 2), (2, 3)),
        (64, Some((4096, 400)), (2, 2), (2, 4)),
        (Limits::PACKET_SIZE, Some((Limits::EXTERNAL_DATA, 8192)), (2, 2), (129, 130)),
    ] {
        let bus = RawBus::new();
        let client = client(&as_bus(&bus), &Device::new());
        client.init_set_maximum_packet_size(packet).unwrap();
        if let Some((bytes, ranges)) = external {
            client.init_set_maximum_external_data(bytes, ranges).unwrap();
        }
        client.client_init_set_ring_buffer_page_count(set.0, set.1).unwrap();
        client.enable().unwrap();
        bus.offered(None);
        client.process(1);
        let (incoming, outgoing) = expected;
        let said = bus.take_said();
        assert_eq!(said, [Said::Open(incoming, outgoing)], "{packet} {external:?} {set:?}");
        client.disable();
    }
}

/// VmbChannelInitSetFriendlyName: the channel goes by its name, or by its type.
#[test]
fn the_friendly_name_names_the_channel() {
    let bus = RawBus::new();
    let server = server(&as_bus(&bus), &Device::new());
    assert!(format!("{server:?}").contains(&TYPE.to_string()), "{server:?}");
    server.init_set_friendly_name("disk of the test").unwrap();
    assert!(format!("{server:?}").contains("disk of the test"), "{server:?}");
}

/// D-60: 4 KiB packets, no external data, 8 and 8 ring pages, no quota, no context, no flags.
#[test]
fn the_defaults_are_those_of_d_60() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    let send = |len: usize, external| {
        let message = vec![0; len];
        refusal(packet(&pair.client, 0, &answers).send(&message, external, WAIT))
    };
    assert_eq!(send(4096, None), None);
    assert_eq!(send(4097, None).map(|e| e.status()), Some(NtStatus::INVALID_PARAMETER_3));
    let range = vmbus_wire::ranges::GpaRange { byte_count: 1, byte_offset: 0, pfns: &[1] };
    let refused = send(8, Some(&[range]));
    assert_eq!(refused.map(|e| e.status()), Some(NtStatus::INVALID_PARAMETER_4));
    pair.pump();
    let mut held = pair.device.take_held();
    assert_eq!(held.len(), 1);
    assert_eq!(held[0].client_context().len(), 0);
    drop(held);
    pair.close();

    let bus = RawBus::new();
    let client = client(&as_bus(&bus), &Device::new());
    client.enable().unwrap();
    bus.offered(None);
    client.process(1);
    let request = bus.request_made();
    assert_eq!((request.incoming_pages, request.outgoing_pages, request.target_vp), (8, 8, 0));
    client.disable();
    let server = server(&as_bus(&bus), &Device::new());
    server.enable().unwrap();
    let offer = bus.offer_made();
    assert!(!offer.pipe && !offer.loopback && !offer.tlnpi_provider && !offer.force_new_channel);
    assert_eq!((offer.mmio_megabytes, offer.mmio_megabytes_optional, offer.target_vtl), (0, 0, 0));
    server.disable();
}

/// D-60: the default quota is that of the packets that the channel has: 256 of ours.
#[test]
fn the_default_quota_is_all_packets() {
    let pair = Pair::open_with(Device::holding(), |pair| {
        for channel in [&pair.server, &pair.client] {
            channel.init_set_maximum_completion_size(0).unwrap();
        }
    });
    let answers = Arc::new(Answers::default());
    (0..300).for_each(|n| send(&pair.client, n, &[0; 8], &answers));
    pair.pump();
    assert_eq!(pair.server.incoming_outstanding(), 256);
    while answers.take().len() < 300 && pair.client.outgoing_in_use() != (0, 0) {
        pair.device.take_held().into_iter().for_each(|packet| packet.complete(&[]));
        pair.pump();
    }
    pair.close();
}

/// Settings are those of the next opening: a channel that was disabled may be set up anew.
#[test]
fn settings_can_be_changed_between_openings() {
    let pair = Pair::open(Device::new());
    let longest = |channel: &Channel| {
        let fits = |len: usize| {
            let packet = channel.packet_allocate().unwrap();
            packet.send(&vec![0; len], None, SendFlags::empty()).is_ok()
        };
        (1..=4096).rev().find(|&len| fits(len)).unwrap_or(0)
    };
    assert_eq!(longest(&pair.client), 4096);
    for size in [100, 1, 4096] {
        pair.client.disable();
        pair.pump();
        pair.client.init_set_maximum_packet_size(size).unwrap();
        pair.client.init_set_maximum_packet_size(0).unwrap_err(); // changes nothing
        pair.client.enable().unwrap();
        pair.pump();
        assert_eq!(longest(&pair.client), size as usize);
        pair.pump();
    }
    pair.close();
}

/// VmbChannelInitSetStateChangeCallbacks, VmbChannelInitSetProcessPacketCallbacks: the last set counts.
#[test]
fn the_callbacks_set_last_are_called() {
    let pair = Pair::new(Device::new());
    let other = Device::new();
    pair.server.init_set_state_change_callbacks(other.clone()).unwrap();
    pair.server.init_set_process_packet_callbacks(other.clone()).unwrap();
    pair.enable();
    let answers = Arc::new(Answers::default());
    send(&pair.client, 0, &[6; 8], &answers);
    pair.pump();
    assert_eq!(pair.device.take_calls(), []);
    let calls = other.take_calls();
    assert_eq!(calls[..3], [Call::Opened, Call::Started, Call::PostStarted]);
    assert_eq!(calls[3..], [Call::Packet(vec![6; 8]), Call::Complete(1)]);
    pair.close();
}
