//! Guests and programs that ask for what there is not, say what is none, or ask for too much.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;

use common::{Got, RING_PAGES, Socket, World, read_some, stream, write_some};
use kmcl::Guid;
use vmbus_ring::{ControlWords, Word};
use vmbus_wire::hvsock::service_of_port;
use vmbus_wire::message::{GuestMessage, MessageBuffer, TlConnectRequest};
use vmbus_wire::packet::PacketKind;
use vsp_socket::limits::{CONNECT_TIMEOUT, GREETING_TIMEOUT, MAX_CONNECTIONS, MAX_HELD_PACKETS};

#[test]
fn a_guests_connection_to_nobody_is_refused() {
    let world = World::new();
    let listener = world.listener(52);
    // What was a program once.
    drop(world.listener(53));
    std::fs::write(world.directory.path().join("vsock_54"), "a file").unwrap();
    for (service, what) in [
        (service_of_port(51), "nobody was ever there"),
        (service_of_port(53), "nobody is there any more"),
        (service_of_port(54), "no socket"),
        (service_of_port(u32::MAX), "any port"),
        (Guid::from_u128(52 << 96), "a service that is no port"),
        (Guid::ZERO, "no service"),
    ] {
        let endpoint = service_of_port(9000);
        world.guest.connect_hvsock(endpoint, service, None).unwrap();
        world.settle();
        assert_eq!(world.offers(), [], "{what}");
        assert_eq!(world.bus.usage().hvsock_requests, 0, "{what}: not answered");
    }
    // A container of a Windows guest is a guest like others.
    let (endpoint, service) = (service_of_port(9000), service_of_port(52));
    world.guest.connect_hvsock(endpoint, service, Some(Guid::from_u128(5))).unwrap();
    world.settle();
    world.open(52, 9000).close();
    listener.accept().unwrap();
    world.assert_nothing_left();
}

#[test]
fn programs_that_say_nonsense_are_sent_away() {
    let world = World::new();
    for line in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT 4294967296\n",
        b"\n",
        &[b'x'; 33],
        &[0; 4096],
    ] {
        let mut program = world.program(line);
        assert_eq!(read_some(&mut program), Got::End, "{}", line.escape_ascii());
    }
    let mut hangs_up = world.program(b"CONNECT 5");
    hangs_up.shutdown(std::net::Shutdown::Write).unwrap();
    world.settle();
    assert_eq!(read_some(&mut hangs_up), Got::End);
    world.assert_nothing_left();
}

#[test]
fn a_program_that_says_nothing_has_a_minute() {
    let world = World::new();
    let mut program = world.program(b"CONNECT ");
    let limit = u64::try_from(GREETING_TIMEOUT.as_millis()).unwrap();
    world.tick(0);
    world.tick(limit - 1);
    assert_eq!(world.counts(), (0, 0, 1, 0));
    world.tick(limit);
    assert_eq!(read_some(&mut program), Got::End);
    world.assert_nothing_left();
}

/// A listener whose queue holds one connection.
fn busy_listener(world: &World, port: u32) -> UnixListener {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let socket = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let path = world.directory.path().join(format!("vsock_{port}"));
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 0).unwrap();
    UnixListener::from(socket)
}

/// A program whose queue is full is asked again until the guest gives up.
#[test]
fn a_busy_program_is_waited_for() {
    let limit = u64::try_from(CONNECT_TIMEOUT.as_millis()).unwrap();
    let mut world = World::new();
    let listener = busy_listener(&world, 52);
    for _ in 0..3 {
        world.ask(52);
    }
    world.settle();
    assert_eq!(world.counts(), (1, 0, 0, 2));
    world.tick(100);
    assert_eq!(world.counts(), (1, 0, 0, 2));
    let _first = listener.accept().unwrap();
    world.tick(200);
    assert_eq!(world.counts(), (2, 0, 0, 1));
    world.tick(100 + limit - 1);
    assert_eq!(world.counts().3, 1);
    world.tick(100 + limit);
    assert_eq!(world.counts().3, 0);
    assert_eq!(world.bus.usage().hvsock_requests, 0, "refused");
}

/// A guest that asks without end gets as many as there may be, and the rest is refused; so do programs,
/// which wait.
#[test]
fn there_is_a_most_of_everything() {
    let mut world = World::with(|mut config| {
        config.max_connections = 10;
        config
    });
    let listener = world.listener(52);
    for _ in 0..100 {
        world.ask(52);
        world.settle();
    }
    assert_eq!(world.counts(), (10, 0, 0, 0));
    assert_eq!(world.bus.usage().hvsock_requests, 0);
    let mut program = world.program(b"CONNECT 9\n");
    assert_eq!(world.counts(), (10, 0, 0, 0), "it waits to be accepted");
    // None of them is opened: they give room to others.
    world.tick(0);
    world.tick(2000);
    world.settle();
    assert_eq!(world.counts(), (1, 0, 0, 0));
    let (service, endpoint, true) = world.offers()[0] else { panic!("{:?}", world.offers()) };
    let _socket = world.open(service, endpoint);
    assert!(matches!(read_some(&mut program), Got::Bytes(_)));
    drop(listener);
    assert_eq!(MAX_CONNECTIONS, 1024);
}

/// A guest that asks faster than anybody answers is held back by the bus.
#[test]
fn a_flood_of_requests_is_bounded() {
    let world = World::new();
    let _listener = world.listener(52);
    world.guest_is_deaf(); // it has not asked, as far as its own bus knows
    for endpoint in 0..1000 {
        let endpoint_id = service_of_port(endpoint);
        let service_id = service_of_port(52);
        let mut message = MessageBuffer::new();
        GuestMessage::TlConnectRequest(TlConnectRequest { endpoint_id, service_id })
            .encode(&mut message);
        let taken = world.bus.guest_message(&message).is_ok();
        assert_eq!(taken, endpoint < 128, "request {endpoint}");
    }
    assert_eq!(world.bus.usage().hvsock_requests, vmbus_host::limits::MAX_HVSOCK_REQUESTS);
    world.settle();
    // As many as the program's queue holds; the rest waits for it.
    let (connections, _, _, requests) = world.counts();
    assert_eq!(connections + requests, 128);
    assert_eq!(world.bus.usage().hvsock_requests, requests);
    world.tick(0);
    world.tick(2000);
    assert_eq!(world.counts(), (0, 0, 0, 0));
    assert_eq!(world.bus.usage().hvsock_requests, 0);
}

/// The same names twice: the second is refused, the first goes on.
#[test]
fn names_are_used_once_at_a_time() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    let (service, endpoint, _) = world.offers()[0];
    let again = |world: &World| {
        let (endpoint, service) = (service_of_port(endpoint), service_of_port(service));
        world.guest.connect_hvsock(endpoint, service, None).unwrap();
        world.settle();
    };
    again(&world);
    assert_eq!(world.counts(), (1, 0, 0, 0));
    assert!(listener.accept().is_err(), "the program is not bothered");
    assert_eq!(socket.send(b"mine"), 4);
    world.settle();
    assert_eq!(read_some(&mut program), Got::Bytes(b"mine".to_vec()));
    socket.close();
    world.settle();
    again(&world);
    assert_eq!(world.counts(), (1, 0, 0, 0));
}

/// A driver that can take no more channels.
#[test]
fn what_cannot_be_driven_is_refused() {
    let mut world = World::new();
    let listener = world.listener(52);
    world.driver.refuses.store(true, Ordering::SeqCst);
    world.ask(52);
    world.settle();
    let (mut refused, _) = listener.accept().unwrap();
    refused.set_nonblocking(true).unwrap();
    assert_eq!(read_some(&mut refused), Got::End);
    let mut program = world.program(b"CONNECT 9\n");
    assert_eq!(read_some(&mut program), Got::End);
    world.assert_nothing_left();
}

/// What a guest writes that is none: its own connection ends at the next tick, with what came before
/// delivered, and the others do not notice.
#[test]
fn a_guest_that_lies_ends_its_own_connection() {
    fn header(packet_type: u32, length: u32) -> Vec<u8> {
        [packet_type.to_le_bytes(), length.to_le_bytes()].concat()
    }
    type Lie = Box<dyn Fn(&mut Socket)>;
    let raw = |kind, header: Vec<u8>, bytes: Vec<u8>| -> Lie {
        Box::new(move |socket| socket.raw(kind, &header, &bytes).unwrap())
    };
    let in_band = PacketKind::InBand;
    let lies: Vec<(&str, Lie)> = vec![
        ("more than there is", raw(in_band, header(1, 100), vec![7; 16])),
        ("more than there may be", raw(in_band, header(1, 16385), vec![7; 16392])),
        ("most of all", raw(in_band, header(1, u32::MAX), vec![7; 16])),
        ("no such type", raw(in_band, header(5, 1), vec![7; 8])),
        ("read in part", raw(in_band, header(2, 8 << 16 | 8), vec![7; 8])),
        ("memory", raw(in_band, header(3, 8), vec![7; 8])),
        ("no header", raw(in_band, vec![], vec![])),
        (
            "an impossible index",
            Box::new(|socket| {
                socket.writer.pages().store(Word::WriteIndex, 3, Ordering::SeqCst);
                assert!(socket.packet(1, b"look"));
                socket.writer.pages().store(Word::WriteIndex, 3, Ordering::SeqCst);
            }),
        ),
        (
            "bytes behind the end",
            Box::new(|socket| {
                socket.finish();
                assert!(socket.packet(1, b"more"));
            }),
        ),
    ];
    for (what, lie) in lies {
        let mut world = World::new();
        let listener = world.listener(52);
        let (mut honest, mut other) = world.guest_connects(&listener, 52);
        let (mut socket, mut program) = world.guest_connects(&listener, 52);
        assert_eq!(socket.send(b"truth"), 5);
        world.settle();
        lie(&mut socket);
        world.settle();
        world.tick(0);
        assert_eq!(read_some(&mut program), Got::Bytes(b"truth".to_vec()), "{what}");
        assert_eq!(read_some(&mut program), Got::End, "{what}");
        assert!(socket.is_rescinded(), "{what}");
        assert_eq!(honest.send(b"still here"), 10);
        world.settle();
        assert_eq!(read_some(&mut other), Got::Bytes(b"still here".to_vec()), "{what}");
        socket.close();
        honest.close();
        world.assert_nothing_left();
    }
}

/// The same in front of a close: what came before the lie arrives, nothing of it does.
#[test]
fn a_lie_in_front_of_a_close_ends_the_stream() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    assert!(socket.packet(1, b"truth"));
    socket.raw(PacketKind::InBand, &[1, 0, 0, 0, 0xff, 0xff, 0, 0], &[7; 16]).unwrap();
    assert!(socket.packet(1, b"behind"));
    socket.close();
    world.settle();
    assert_eq!(read_some(&mut program), Got::Bytes(b"truth".to_vec()));
    assert_eq!(read_some(&mut program), Got::End);
    world.assert_nothing_left();
}

/// Large rings, packets as large as may be, a program that reads nothing: what is kept is bounded.
#[test]
fn a_guest_with_large_rings_takes_no_more_memory() {
    let mut world = World::new();
    let listener = world.listener(52);
    let own = world.ask(52);
    world.settle();
    let mut socket = world.open_with(52, own, 1000).unwrap();
    let (mut program, _) = listener.accept().unwrap();
    program.set_nonblocking(true).unwrap();
    // Small packets between large ones: one that is left out leaves no gap for others to follow.
    let bytes = stream(8 << 20, 1);
    let mut sent = 0;
    for len in [16384, 100, 3000].into_iter().cycle() {
        if !socket.packet(1, &bytes[sent..sent + len]) {
            break;
        }
        sent += len;
        world.settle();
    }
    let channel = &world.driver.channels()[0];
    assert_eq!(channel.incoming_outstanding(), MAX_HELD_PACKETS);
    assert!(sent > 3 << 20, "the ring is full");
    socket.close();
    world.settle();
    let mut got = Vec::new();
    loop {
        match read_some(&mut program) {
            Got::Bytes(more) => got.extend(more),
            Got::Nothing => panic!("no end after {}", got.len()),
            Got::End => break,
        }
        world.settle();
    }
    let most = (384 << 10) + (512 << 10);
    assert!(got.len() < most, "{} bytes were kept, and in the program's socket", got.len());
    assert!(got == bytes[..got.len()], "what arrives has no gap");
    world.assert_nothing_left();
}

/// The guest opens the same offer twice, or closes what is not open.
#[test]
fn a_guest_that_opens_again_gets_a_new_connection_or_none() {
    let mut world = World::new();
    let listener = world.listener(52);
    let own = world.ask(52);
    world.settle();
    world.open(52, own).close();
    // The host has not had its turn: the offer stands.
    let mut opening = world.begin_open(52, own, RING_PAGES);
    world.settle();
    let (mut program, _) = listener.accept().unwrap();
    program.set_nonblocking(true).unwrap();
    assert_eq!(read_some(&mut program), Got::End);
    assert!(!opening.is_answered() || opening.finish().is_err());
    drop(opening);
    world.assert_nothing_left();
}

/// A guest that signals without end is served no more often than others.
#[test]
fn programs_and_guests_that_stall_do_not_stop_others() {
    let mut world = World::new();
    let listener = world.listener(52);
    let mut stalled = Vec::new();
    for _ in 0..20 {
        let (mut socket, mut program) = world.guest_connects(&listener, 52);
        let bytes = stream(1 << 20, 1);
        while socket.send(&bytes) != 0 {
            world.settle();
        }
        while write_some(&mut program, &bytes) != 0 {
            world.settle();
        }
        stalled.push((socket, program));
    }
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    for round in 0..100_u8 {
        assert_eq!(socket.send(&[round; 100]), 100);
        world.settle();
        assert_eq!(read_some(&mut program), Got::Bytes(vec![round; 100]));
    }
    for (socket, program) in stalled {
        socket.close();
        drop(program);
    }
    socket.close();
    drop(program);
    world.assert_nothing_left();
}

/// No descriptor is left: programs wait, the guest is refused, and nobody is busy with it.
#[test]
fn without_descriptors_connections_wait_or_are_refused() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let mut world = World::new();
    let listener = world.listener(52);
    let mut program = std::os::unix::net::UnixStream::connect(world.path()).unwrap();
    program.set_nonblocking(true).unwrap();
    assert_eq!(write_some(&mut program, b"CONNECT 9\n"), 10);
    let before = getrlimit(Resource::Nofile);
    let next = rustix::io::dup(&program).unwrap();
    let lowest = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&next)).unwrap();
    drop(next);
    setrlimit(Resource::Nofile, Rlimit { current: Some(lowest), ..before }).unwrap();
    world.ask(52);
    world.settle();
    let is_busy = {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(world.broker(), PollFlags::IN)], Some(&now)).unwrap()
    };
    let counts = world.counts();
    world.tick(0);
    let still = world.counts();
    setrlimit(Resource::Nofile, before).unwrap();
    assert_eq!(is_busy, 0, "it would be called again and again");
    assert_eq!((counts, still), ((0, 0, 0, 0), (0, 0, 0, 0)));
    assert_eq!(world.bus.usage().hvsock_requests, 0, "refused");
    assert!(listener.accept().is_err());
    world.tick(100);
    let (service, endpoint, _) = world.offers()[0];
    let _socket = world.open(service, endpoint);
    assert!(matches!(read_some(&mut program), Got::Bytes(_)));
}
