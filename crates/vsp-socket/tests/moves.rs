//! Sockets that stand still while their guest is saved: they go on here, and are reset where it goes on.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::Arc;

use common::{Got, World, read_some, stream, write_some};
use kmcl::SaveOptions;
use saved_state::Save;
use vsp_socket::{AdoptedSockets, FreezeError, SocketBroker, SocketConfig, SocketRestoreError};

/// Everything that can be under way: bytes in both rings and sockets, a held packet, an open that has not
/// come, a request, a greeting.
#[test]
fn after_a_thaw_everything_goes_on() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    let (to_program, to_guest) = (stream(1 << 20, 1), stream(1 << 20, 2));
    let (mut sent, mut got) = ((0, 0), (Vec::new(), Vec::new()));
    for _ in 0..40 {
        sent.0 += socket.send(&to_program[sent.0..]);
        sent.1 += write_some(&mut program, &to_guest[sent.1..]);
        world.settle();
    }
    let mut waits = world.program(b"CONNECT 1024\n");
    let mut speaks = world.program(b"CONN");
    world.tick(0);

    for round in 0..3 {
        let frozen = world.broker().freeze().unwrap();
        assert!(matches!(world.broker().freeze(), Err(FreezeError::Held)));
        // The world goes on, and nothing comes through.
        let before = got.0.len();
        while let Got::Bytes(more) = read_some(&mut program) {
            got.0.extend(more);
        }
        if round == 0 {
            assert!(got.0.len() > before, "what the program's socket had");
            assert_eq!(write_some(&mut speaks, b"ECT 1025\n"), 9);
            world.ask(52);
        }
        world.settle();
        assert_eq!(read_some(&mut program), Got::Nothing, "round {round}");
        let counts = world.counts();
        world.tick(100_000 * (round + 1));
        assert_eq!(world.counts(), counts, "no time passes");
        let late = std::os::unix::net::UnixStream::connect(world.path()).unwrap();
        world.settle();
        assert_eq!(world.counts(), counts);
        // It can be saved, again and again.
        let mut state = Vec::new();
        frozen.save(&SaveOptions::default()).unwrap().write_to(&mut state).unwrap();
        assert!(!state.is_empty());
        drop(late);
        frozen.thaw();
        world.settle();
    }
    assert_eq!(world.offers().len(), 4, "{:?}", world.offers());
    assert_eq!(read_some(&mut waits), Got::Nothing);
    assert_eq!(read_some(&mut speaks), Got::Nothing);
    let mut idle = 0;
    while idle < 4 {
        let before = (sent, got.0.len(), got.1.len());
        sent.0 += socket.send(&to_program[sent.0..]);
        sent.1 += write_some(&mut program, &to_guest[sent.1..]);
        world.settle();
        while let Got::Bytes(more) = read_some(&mut program) {
            got.0.extend(more);
        }
        got.1.extend(socket.recv(9999));
        idle = if before == (sent, got.0.len(), got.1.len()) { idle + 1 } else { 0 };
    }
    assert!(got.0 == to_program && got.1 == to_guest, "{} {}", got.0.len(), got.1.len());
    for (service, endpoint, from_host) in world.offers() {
        if from_host {
            world.open(service, endpoint).close();
        }
    }
    assert!(matches!(read_some(&mut waits), Got::Bytes(_)));
    assert!(matches!(read_some(&mut speaks), Got::Bytes(_)));
}

/// A guest that closes while nothing moves is served after the thaw, and no byte is lost.
#[test]
fn a_close_waits_for_the_thaw() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    let frozen = world.broker().freeze().unwrap();
    assert_eq!(socket.send(b"last words"), 10);
    socket.finish();
    socket.close();
    world.settle();
    assert_eq!(read_some(&mut program), Got::Nothing);
    drop(frozen);
    world.settle();
    assert_eq!(read_some(&mut program), Got::Bytes(b"last words".to_vec()));
    assert_eq!(read_some(&mut program), Got::End);
    world.assert_nothing_left();
}

/// The guest goes on in another process: its connections are reset there, those that nobody has opened are
/// withdrawn, requests are answered, and new connections can be made.
#[test]
fn where_the_guest_goes_on_its_connections_are_reset() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    let (mut second, mut other) = world.host_connects(1024);
    let bytes = stream(1 << 20, 1);
    while socket.send(&bytes) != 0 {
        world.settle();
    }
    while write_some(&mut other, &bytes) != 0 {
        world.settle();
    }
    let mut waits = world.program(b"CONNECT 1025\n");
    let last_port = world.offers().into_iter().filter(|it| it.2).map(|it| it.1).max().unwrap();
    let frozen = world.broker().freeze().unwrap();
    let asked = world.ask(52);
    let (bus, sockets) = world.save(&frozen);
    frozen.move_away();
    while let Got::Bytes(_) = read_some(&mut program) {}
    for program in [&mut program, &mut other, &mut waits] {
        assert_eq!(read_some(program), Got::End);
    }
    assert!(!world.path().exists());
    assert_eq!(world.driver.channels().len(), 0);
    assert!(!socket.is_rescinded() && !second.is_rescinded(), "the guest was told nothing");
    assert!(!world.broker().ready());
    world.broker = None;

    world.next_host(&bus);
    let (bus, driver) = (world.bus.clone(), world.driver.clone());
    let config = SocketConfig::new(world.path());
    let restoring = SocketBroker::restoring(bus, driver, config, &sockets[..]).unwrap();
    assert_eq!(restoring.connections(), 3);
    let early = std::os::unix::net::UnixStream::connect(world.path()).unwrap();
    world.bus.finish_restore().unwrap();
    world.broker = Some(restoring.start());
    world.settle();
    assert!(socket.is_rescinded() && second.is_rescinded());
    socket.recv(0);
    second.recv(0);
    socket.close();
    second.close();
    world.settle();
    // The request that nobody had answered.
    assert_eq!(world.offers(), [(52, asked, false)]);
    world.open(52, asked).close();
    drop(early);
    world.settle();
    world.assert_nothing_left();
    let (mut socket, mut program) = world.host_connects(1024);
    let port = world.offers()[0].1;
    assert!(port > last_port, "a port of the former life is not used again at once");
    assert_eq!(socket.send(b"hello"), 5);
    world.settle();
    assert_eq!(read_some(&mut program), Got::Bytes(b"hello".to_vec()));
    socket.close();
    world.assert_nothing_left();
}

/// The guest has closed, and nobody has looked after it yet: the offer stands, and is saved.
#[test]
fn a_connection_that_was_just_closed_is_withdrawn_elsewhere() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (socket, _program) = world.guest_connects(&listener, 52);
    socket.close();
    for channel in world.driver.channels() {
        channel.process(64);
    }
    let frozen = world.broker().freeze().unwrap();
    let (bus, sockets) = world.save(&frozen);
    frozen.move_away();
    world.broker = None;
    world.next_host(&bus);
    let (bus, driver) = (world.bus.clone(), world.driver.clone());
    let config = SocketConfig::new(world.path());
    let restoring = SocketBroker::restoring(bus, driver, config, &sockets[..]).unwrap();
    assert_eq!(restoring.connections(), 1);
    world.bus.finish_restore().unwrap();
    world.broker = Some(restoring.start());
    world.assert_nothing_left();
}

/// A guest can go on without sockets.
#[test]
fn connections_are_withdrawn_where_there_are_no_sockets() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (socket, _program) = world.guest_connects(&listener, 52);
    let frozen = world.broker().freeze().unwrap();
    let (bus, sockets) = world.save(&frozen);
    frozen.move_away();
    world.broker = None;
    world.next_host(&bus);
    let adopted = AdoptedSockets::adopt(&world.bus, &sockets[..]).unwrap();
    assert_eq!(adopted.connections(), 1);
    world.bus.finish_restore().unwrap();
    adopted.withdraw();
    assert!(socket.is_rescinded());
    socket.close();
    world.assert_guest_has_nothing();
}

/// A restore that fails can be begun again, with the same state.
#[test]
fn a_restore_that_is_given_up_changes_nothing() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (socket, _program) = world.guest_connects(&listener, 52);
    let frozen = world.broker().freeze().unwrap();
    let (bus, sockets) = world.save(&frozen);
    frozen.move_away();
    world.broker = None;
    world.next_host(&bus);
    drop(AdoptedSockets::adopt(&world.bus, &sockets[..]).unwrap());
    let twice = AdoptedSockets::adopt(&world.bus, &sockets[..]).unwrap();
    let refused = AdoptedSockets::adopt(&world.bus, &sockets[..]).unwrap_err();
    assert!(matches!(refused, SocketRestoreError::Offer { .. }), "{refused}");
    assert!(!socket.is_rescinded());
    world.bus.finish_restore().unwrap();
    twice.withdraw();
    assert!(socket.is_rescinded());
}

/// Bytes that are no state of sockets: refused, without a panic, and nothing is offered.
#[test]
fn states_that_cannot_be_are_refused() {
    use saved_state::sockets::{KINDS, SocketConnectionRecord, SocketsRecord};
    use saved_state::text::Producer;
    use saved_state::writer::Step;
    use saved_state::{FormatVersion, HeaderFlags, StreamInfo, StreamKind, StreamWriter};

    enum Chunk {
        Sockets(u32, u32),
        Connection(u8),
    }
    use Chunk::{Connection, Sockets};
    let state = |chunks: &[Chunk]| {
        let info = StreamInfo {
            stream: StreamKind::DEVICE,
            flags: HeaderFlags::default(),
            interface_type: vsp_socket::SAVED_INTERFACE,
            interface_instance: kmcl::Guid::ZERO,
            producer: Producer::new("test").unwrap(),
            chunks: u32::try_from(chunks.len()).unwrap() + 2,
            bytes: 0,
            items: 0,
        };
        let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).unwrap();
        let mut bytes = vec![0; 64 << 10];
        let mut filled = 0;
        let put = |step: Step| match step {
            Step::Written { bytes } => bytes,
            Step::Needs { bytes } => panic!("{bytes}"),
        };
        filled += put(writer.header(&mut bytes[filled..]).unwrap());
        for chunk in chunks {
            let room = &mut bytes[filled..];
            filled += put(match chunk {
                Sockets(next_port, connections) => {
                    let (next_port, connections) = (*next_port, *connections);
                    writer.record(&SocketsRecord { next_port, connections }, room).unwrap()
                }
                Connection(name) => {
                    let service = vec![*name; 16];
                    let endpoint = Vec::new();
                    let record = SocketConnectionRecord { service, endpoint, from_host: true };
                    writer.record(&record, room).unwrap()
                }
            });
        }
        filled += put(writer.end(&mut bytes[filled..]).unwrap());
        bytes.truncate(filled);
        bytes
    };
    let first = 1 << 30;
    let world = World::without_broker();
    for (what, chunks, expected) in [
        ("nothing", vec![], "out of order"),
        ("a connection first", vec![Connection(1)], "out of order"),
        ("sockets twice", vec![Sockets(first, 0), Sockets(first, 0)], "out of order"),
        ("a missing one", vec![Sockets(first, 2), Connection(1)], "connections is 2"),
        ("one more", vec![Sockets(first, 0), Connection(1)], "connections is 1"),
        ("too many", vec![Sockets(first, 1025)], "connections is 1025"),
        ("a low port", vec![Sockets(80, 0)], "next_port is 80"),
        ("any port", vec![Sockets(u32::MAX, 0)], "next_port is 4294967295"),
        ("one twice", vec![Sockets(first, 2), Connection(1), Connection(1)], "the bus answered"),
    ] {
        let error = AdoptedSockets::adopt(&world.bus, &state(&chunks)[..]).unwrap_err();
        let message = format!("{error}");
        assert!(message.contains(expected), "{what}: {message}");
        assert_eq!(world.bus.usage().channels, 0, "{what}");
    }
    // Every bit of one that is good.
    let good = state(&[Sockets(first, 2), Connection(1), Connection(2)]);
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            assert!(AdoptedSockets::adopt(&world.bus, &bad[..]).is_err(), "byte {at} bit {bit}");
            assert!(AdoptedSockets::adopt(&world.bus, &good[..at]).is_err(), "{at} bytes");
        }
    }
    let adopted = AdoptedSockets::adopt(&world.bus, &good[..]).unwrap();
    assert_eq!(adopted.connections(), 2);
    drop(Arc::new(adopted));
}
