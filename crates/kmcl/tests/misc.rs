//! MMIO, pointers, interrupt latency, interface instance, packet sizes, statuses: the small functions.
//!
//! Source: kmcl-semantics sections 7, 12 to 14; D-37, D-51 to D-53.

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
use common::{Answers, Call, Device, INSTANCE, Pair, TYPE, WAIT, client, lock, packet, server};
use kmcl::bus::BusEvent;
use kmcl::{Channel, ChannelState, Error, Guid, Limits, NtStatus, Side};

/// VmbChannelGetMmioSpace, D-52: a guest physical address and a size in bytes, known in Opened; zeroes
/// where there is none; not those of a former offer.
#[test]
fn mmio_space_is_that_of_the_offer() {
    let bus = RawBus::new();
    let driver = Device::new();
    let client = client(&as_bus(&bus), &driver);
    assert_eq!(client.get_mmio_space(), (0, 0));
    for mmio in [Some((0xf800_0000, 8 << 20)), None, Some((0x10_0000_0000, 0x1000))] {
        driver.when(move |channel, _| {
            assert_eq!(channel.get_mmio_space(), mmio.unwrap_or_default());
            Ok(())
        });
        client.enable().unwrap();
        assert_eq!(client.get_mmio_space(), (0, 0), "not known yet");
        bus.offered(mmio);
        client.process(1);
        let peer = bus.open_completed();
        client.process(1);
        assert_eq!(client.state(), ChannelState::Active);
        client.disable();
        drop(peer);
    }
}

/// VmbChannelGetInterfaceInstance: the server's own from the start; a client's once it is bound.
#[test]
fn the_interface_instance_is_that_of_the_offer() {
    let pair = Pair::new(Device::new());
    assert_eq!(pair.client.get_interface_instance(), Guid::ZERO);
    pair.server.enable().unwrap();
    assert_eq!(pair.server.get_interface_instance(), INSTANCE);
    pair.client.enable().unwrap();
    pair.pump();
    assert_eq!(pair.client.get_interface_instance(), INSTANCE);
    pair.close();

    let bus = RawBus::new();
    let client = client(&as_bus(&bus), &Device::new());
    client.client_init_set_target_pnp(TYPE, Some(OTHER), None).unwrap();
    client.enable().unwrap();
    assert_eq!(client.get_interface_instance(), OTHER, "asked for by name");
    assert!(bus.post(BusEvent::Offered { interface_instance: OTHER, mmio: None }));
    client.process(1);
    assert_eq!(client.get_interface_instance(), OTHER);
    client.disable();
}

/// VmbChannelSetPointer, VmbChannelGetPointer, VmbPacketSetPointer, VmbPacketGetPointer: a word each,
/// 0 at first (D-51), in every state.
#[test]
fn pointers_are_kept() {
    let pair = Pair::new(Device::new());
    for channel in [&pair.server, &pair.client] {
        assert_eq!(channel.get_pointer(), 0);
        channel.set_pointer(usize::MAX);
    }
    pair.enable();
    assert_eq!(pair.server.get_pointer(), usize::MAX);
    let mut packets =
        [pair.client.packet_allocate().unwrap(), pair.client.packet_allocate().unwrap()];
    packets[1].set_pointer(7);
    assert_eq!([packets[0].pointer(), packets[1].pointer()], [0, 7]);
    assert_eq!(format!("{:?}", packets[0].channel()), format!("{:?}", pair.client));
    drop(packets);
    pair.client.disable();
    pair.server.set_pointer(3);
    assert_eq!((pair.server.get_pointer(), pair.client.get_pointer()), (3, usize::MAX));
    pair.close();
}

/// VmbChannelSetInterruptLatency: gives the former value, in units of 100 ns; from Opened to Closed,
/// both included; a client's only; not on a bus without monitors.
#[test]
fn interrupt_latency_is_the_buss_while_the_channel_is_open() {
    let bus = RawBus::new();
    let driver = Device::new();
    let client = client(&as_bus(&bus), &driver);
    let former = Arc::new(Mutex::new(Vec::new()));
    driver.when({
        let former = former.clone();
        move |channel, call| {
            let latency = if *call == Call::Opened { 1000 } else { 2000 };
            lock(&former).push(channel.set_interrupt_latency(latency));
            Ok(())
        }
    });
    let refused = |client: &Channel| client.set_interrupt_latency(5).unwrap_err().status();
    assert_eq!(refused(&client), NtStatus::INVALID_DEVICE_STATE, "Disabled");
    client.enable().unwrap();
    bus.offered(None);
    client.process(1);
    assert_eq!(refused(&client), NtStatus::INVALID_DEVICE_STATE, "Connecting");
    bus.take_said();
    let peer = bus.open_completed();
    client.process(1);
    let said = [Said::Latency(1000), Said::Latency(2000), Said::Latency(2000)];
    assert_eq!(bus.take_said(), said);
    client.disable();
    assert_eq!(*lock(&former), [Ok(0), Ok(1000), Ok(2000), Ok(2000), Ok(2000)]);
    drop(peer);

    let pair = Pair::open(Device::new());
    assert_eq!(refused(&pair.client), NtStatus::NOT_SUPPORTED);
    assert_eq!(refused(&pair.server), NtStatus::INVALID_DEVICE_STATE);
    pair.close();
}

/// D-37, VmbChannelSizeofPacket: more than the largest message and a pointer. VmbPacketInitialize: at
/// least that many bytes; such a packet does not count against the pool.
#[test]
fn a_packet_may_be_initialized_apart_from_the_pool() {
    let pair = Pair::open_with(Device::echo(), |pair| {
        pair.client.init_set_maximum_packet_size(1000).unwrap();
    });
    let size = pair.client.sizeof_packet();
    assert!(size as usize > 1000 + size_of::<usize>());
    for too_small in [0, 1000, size - 1] {
        let error = pair.client.packet_initialize(too_small).unwrap_err();
        assert_eq!(error.status(), NtStatus::INVALID_PARAMETER_3, "{too_small}");
    }
    let pool: Vec<_> = std::iter::from_fn(|| pair.client.packet_allocate()).collect();
    assert_eq!(pool.len(), Limits::PACKETS as usize);
    let answers = Arc::new(Answers::default());
    for n in 1..4 {
        let mut packet = pair.client.packet_initialize(size + n).unwrap();
        assert_eq!(packet.pointer(), 0);
        packet.set_pointer(n as usize);
        packet.set_completion_routine(answers.clone());
        packet.send(&[9; 1000], None, WAIT).unwrap();
        pair.pump();
        assert_eq!(answers.take(), [(n as usize, NtStatus::SUCCESS, vec![9; 1000])]);
    }
    assert!(pair.client.packet_allocate().is_none(), "no packet of the pool came back");
    drop(pool);
    pair.close();
}

/// Every error has the NTSTATUS that the documentation names, and a text with its numbers.
#[test]
fn every_error_has_its_status() {
    let (state, function) = (ChannelState::Paused, "f");
    for (error, status, text) in [
        (
            Error::NotInitializing { function, needed: "server", state },
            NtStatus::INVALID_PARAMETER_1,
            "server",
        ),
        (
            Error::Argument { position: 7, name: "Flags", value: 64 },
            NtStatus::INVALID_PARAMETER_7,
            "Flags must not be 64",
        ),
        (Error::NoMmio, NtStatus::INVALID_PARAMETER, "MMIO"),
        (Error::State { function, state }, NtStatus::INVALID_DEVICE_STATE, "Paused"),
        (Error::Removed { state }, NtStatus::DEVICE_REMOVED, "Paused"),
        (Error::Cancelled, NtStatus::CANCELLED, "cancelled"),
        (Error::RingFull { needed: 48 }, NtStatus::BUFFER_OVERFLOW, "48"),
        (Error::BufferTooSmall { needed: 16, given: 8 }, NtStatus::BUFFER_TOO_SMALL, "16"),
        (Error::Pending, NtStatus::PENDING, "brought in"),
        (Error::NotMemory { gpa: 0x5000, len: 9 }, NtStatus::INVALID_PARAMETER, "0x5000"),
        (
            Error::TooMuchExternalData { bytes: 99, limit: 5 },
            NtStatus::INVALID_BUFFER_SIZE,
            "99 bytes",
        ),
        (Error::ReadOnly, NtStatus::ACCESS_DENIED, "read-only"),
        (Error::AlreadyMapped { gpadl: 0xe1 }, NtStatus::ALREADY_COMMITTED, "0xe1"),
        (Error::ServerExternalData, NtStatus::NOT_SUPPORTED, "server"),
        (Error::Bus(NtStatus::NOT_FOUND), NtStatus::NOT_FOUND, "STATUS_NOT_FOUND"),
        (Error::Resources("packets"), NtStatus::INSUFFICIENT_RESOURCES, "packets"),
    ] {
        assert_eq!(error.status(), status, "{error:?}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

/// Subchannels (an extension): each is a channel of its own, found by its index.
#[test]
fn subchannels_are_found_by_their_index() {
    let bus: Arc<dyn kmcl::bus::Bus> = kmcl::loopback::LoopbackBus::new(4 << 20).unwrap();
    let mut channels = Vec::new();
    for index in [2, 0, 1] {
        let device = Device::on_packet(move |_, packet| packet.complete(&[index; 8]));
        let server = server(&bus, &device);
        server.init_set_subchannel_index(index.into()).unwrap();
        server.enable().unwrap();
        server.start();
        channels.push(server);
    }
    let answers = Arc::new(Answers::default());
    for index in [0_u8, 1, 2] {
        let client = client(&bus, &Device::new());
        client.init_set_subchannel_index(index.into()).unwrap();
        client.enable().unwrap();
        packet(&client, index.into(), &answers).send(&[0; 8], None, WAIT).unwrap();
        channels.push(client);
    }
    for _ in 0..4 {
        channels.iter().for_each(|channel| {
            channel.process(8);
        });
    }
    let mut answers = answers.take();
    answers.sort();
    let expected = [0_u8, 1, 2].map(|n| (n.into(), NtStatus::SUCCESS, vec![n; 8]));
    assert_eq!(answers, expected);
    channels.iter().rev().for_each(Channel::disable);
}

/// The sides of a channel, and memory that is there while it is open.
#[test]
fn memory_is_there_while_the_channel_is_open() {
    let pair = Pair::new(Device::new());
    assert_eq!((pair.server.side(), pair.client.side()), (Side::Server, Side::Client));
    let has_memory = || (pair.server.memory().is_some(), pair.client.memory().is_some());
    assert_eq!(has_memory(), (false, false));
    pair.enable();
    assert_eq!(has_memory(), (true, true));
    let bytes = pair.server.memory().unwrap().total_bytes();
    assert_eq!(bytes, pair.bus.memory().total_bytes());
    pair.client.disable();
    pair.pump();
    assert_eq!(has_memory(), (false, false));
    pair.close();
}
