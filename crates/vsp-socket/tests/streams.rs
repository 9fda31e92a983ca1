//! Bytes both ways, whole and in order, however slow either side is.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::os::unix::net::UnixStream;

use common::{Got, RING_PAGES, Socket, World, read_some, stream, write_some};
use vsp_socket::limits::{MAX_HELD_PACKETS, MAX_PACKET_BYTES};

/// Sizes around every boundary there is: packets, rings, buffers.
const SIZES: [usize; 15] =
    [1, 7, 8, 9, 4087, 4088, 4089, 8191, 8192, 8193, 16384, 16385, 20480, 100_000, 1_000_000];

/// Moves `bytes` from the guest to the program, which takes `step` bytes at a time.
fn to_program(world: &World, socket: &mut Socket, program: &mut UnixStream, bytes: &[u8]) {
    let (mut sent, mut got) = (0, Vec::new());
    let mut idle = 0;
    while got.len() < bytes.len() {
        let before = (sent, got.len());
        sent += socket.send(&bytes[sent..]);
        world.settle();
        if let Got::Bytes(more) = read_some(program) {
            got.extend(more);
        }
        idle = if before == (sent, got.len()) { idle + 1 } else { 0 };
        assert!(idle < 4, "stuck: {sent} of {} sent, {} arrived", bytes.len(), got.len());
    }
    assert!(got == bytes, "{} bytes are not those that were sent", bytes.len());
}

fn to_guest(world: &World, socket: &mut Socket, program: &mut UnixStream, bytes: &[u8]) {
    let (mut sent, mut got) = (0, Vec::new());
    let mut idle = 0;
    while got.len() < bytes.len() {
        let before = (sent, got.len());
        sent += write_some(program, &bytes[sent..]);
        world.settle();
        got.extend(socket.recv(usize::MAX));
        idle = if before == (sent, got.len()) { idle + 1 } else { 0 };
        assert!(idle < 4, "stuck: {sent} of {} sent, {} arrived", bytes.len(), got.len());
    }
    assert!(got == bytes, "{} bytes are not those that were sent", bytes.len());
}

#[test]
fn a_guest_and_a_program_talk_whoever_has_connected() {
    for from_host in [false, true] {
        let mut world = World::new();
        let listener = world.listener(52);
        let (mut socket, mut program) = match from_host {
            false => world.guest_connects(&listener, 52),
            true => world.host_connects(1024),
        };
        assert_eq!(world.counts(), (1, 0, 0, 0));
        for (at, size) in SIZES.into_iter().enumerate() {
            let seed = u8::try_from(at).unwrap();
            to_program(&world, &mut socket, &mut program, &stream(size, seed));
            to_guest(&world, &mut socket, &mut program, &stream(size, !seed));
        }
        drop(program);
        socket.close();
        world.assert_nothing_left();
    }
}

/// What a program sends together with its greeting is the guest's, to the byte.
#[test]
fn bytes_behind_a_greeting_are_the_guests() {
    let world = World::new();
    let _program = world.program(b"CONNECT 1024\nCONNECT 7\nfirst");
    let (service, endpoint, _) = world.offers()[0];
    let mut socket = world.open(service, endpoint);
    assert_eq!(socket.recv(100), b"CONNECT 7\nfirst");
}

/// A greeting may come byte by byte.
#[test]
fn a_greeting_comes_in_pieces() {
    let world = World::new();
    let mut program = world.program(b"");
    for byte in b"CONNECT 77\n" {
        assert_eq!(world.offers(), []);
        assert_eq!(write_some(&mut program, &[*byte]), 1);
        world.settle();
    }
    assert_eq!(world.offers()[0].0, 77);
}

/// A program that does not read stops the guest when its ring is full, and no byte is lost; what waits here
/// is bounded, and the other direction goes on.
#[test]
fn a_slow_program_fills_the_guests_ring_and_nothing_else() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    let bytes = stream(4 << 20, 3);
    let mut sent = 0;
    loop {
        let more = socket.send(&bytes[sent..]);
        world.settle();
        sent += more;
        if more == 0 {
            break;
        }
    }
    let channel = &world.driver.channels()[0];
    assert_eq!(channel.incoming_outstanding(), MAX_HELD_PACKETS);
    // The program's socket, the packets held, and the ring.
    let most = 512 << 10;
    assert!(sent < most, "{sent} bytes were taken for a program that reads nothing");
    to_guest(&world, &mut socket, &mut program, b"the other way is free");

    let mut got = Vec::new();
    while got.len() < bytes.len() {
        if let Got::Bytes(more) = read_some(&mut program) {
            got.extend(more);
        }
        world.settle();
        sent += socket.send(&bytes[sent..]);
        world.settle();
    }
    assert!(got == bytes);
}

/// A guest that does not read stops the program when the ring is full.
#[test]
fn a_slow_guest_fills_the_programs_socket_and_nothing_else() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    let bytes = stream(4 << 20, 5);
    let mut sent = 0;
    loop {
        let more = write_some(&mut program, &bytes[sent..]);
        world.settle();
        sent += more;
        if more == 0 {
            break;
        }
    }
    // One packet waits for room, the ring has two.
    let channel = &world.driver.channels()[0];
    assert_eq!(channel.outgoing_in_use(), (1, 0));
    assert!(sent < 1 << 20, "{sent}");
    to_program(&world, &mut socket, &mut program, b"the other way is free");

    let mut got = Vec::new();
    let mut idle = 0;
    while got.len() < bytes.len() {
        let more = socket.recv(1000);
        idle = if more.is_empty() { idle + 1 } else { 0 };
        assert!(idle < 4, "stuck after {}", got.len());
        got.extend(more);
        world.settle();
        sent += write_some(&mut program, &bytes[sent..]);
        world.settle();
    }
    assert!(got == bytes);
    let most = MAX_PACKET_BYTES as usize;
    assert!(socket.packets.iter().all(|len| *len <= most), "{:?}", socket.packets);
    assert!(socket.packets.contains(&most), "large pieces go in large packets");
}

/// Packets to the guest fit whatever rings it opens, or the open is refused.
#[test]
fn rings_of_any_size_work_or_are_refused() {
    for (pages, works) in [(2, false), (3, false), (4, true), (RING_PAGES, true), (65, true)] {
        let mut world = World::new();
        let listener = world.listener(52);
        let own = world.ask(52);
        world.settle();
        let (mut program, _) = listener.accept().unwrap();
        program.set_nonblocking(true).unwrap();
        let opened = world.open_with(52, own, pages);
        assert_eq!(opened.is_ok(), works, "{pages} pages");
        if let Ok(mut socket) = opened {
            to_guest(&world, &mut socket, &mut program, &stream(100_000, 1));
            to_program(&world, &mut socket, &mut program, &stream(100_000, 1));
        }
    }
}

/// Many at once do not disturb each other.
#[test]
fn a_hundred_connections_at_once() {
    let mut world = World::new();
    let listener = world.listener(52);
    let mut pairs = Vec::new();
    for at in 0..100_u8 {
        pairs.push(match at % 2 {
            0 => world.guest_connects(&listener, 52),
            _ => world.host_connects(1024),
        });
    }
    assert_eq!(world.counts(), (100, 0, 0, 0));
    let streams: Vec<_> = (0..100).map(|seed| stream(30_000, seed)).collect();
    let mut sent = vec![(0, 0); 100];
    let mut got = vec![(Vec::new(), Vec::new()); 100];
    for _ in 0..100 {
        for (at, (socket, program)) in pairs.iter_mut().enumerate() {
            let bytes = &streams[at];
            sent[at].0 += socket.send(&bytes[sent[at].0..]);
            sent[at].1 += write_some(program, &bytes[sent[at].1..]);
            if let Got::Bytes(more) = read_some(program) {
                got[at].0.extend(more);
            }
            got[at].1.extend(socket.recv(5000));
        }
        world.settle();
    }
    for (at, (to_program, to_guest)) in got.iter().enumerate() {
        assert!(*to_program == streams[at] && *to_guest == streams[at], "connection {at}");
    }
    for (socket, program) in pairs {
        drop(program);
        socket.close();
    }
    world.assert_nothing_left();
}
