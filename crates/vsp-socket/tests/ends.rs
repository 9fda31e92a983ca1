//! How connections end: one direction after the other, all at once, or not at all.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::net::Shutdown;

use common::{Got, SEND_BYTES, World, read_some, stream, write_some};
use vsp_socket::limits::{OPEN_TIMEOUT, RESET_DELAY};

#[test]
fn each_direction_ends_by_itself() {
    for guest_first in [true, false] {
        let mut world = World::new();
        let listener = world.listener(52);
        let (mut socket, mut program) = world.guest_connects(&listener, 52);
        if guest_first {
            assert_eq!(socket.send(b"last words"), 10);
            socket.finish();
            world.settle();
            assert_eq!(read_some(&mut program), Got::Bytes(b"last words".to_vec()));
            assert_eq!(read_some(&mut program), Got::End);
            assert_eq!(write_some(&mut program, b"still here"), 10);
            world.settle();
            assert_eq!(socket.recv(100), b"still here");
            program.shutdown(Shutdown::Write).unwrap();
            world.settle();
            assert_eq!((socket.recv(100), socket.is_at_end), (vec![], true));
        } else {
            assert_eq!(write_some(&mut program, b"last words"), 10);
            program.shutdown(Shutdown::Write).unwrap();
            world.settle();
            assert_eq!(socket.recv(100), b"last words");
            assert!(socket.is_at_end);
            assert_eq!(socket.packets, [10, 0]);
            assert_eq!(socket.send(b"still here"), 10);
            world.settle();
            assert_eq!(read_some(&mut program), Got::Bytes(b"still here".to_vec()));
            socket.finish();
            world.settle();
            assert_eq!(read_some(&mut program), Got::End);
        }
        // Nothing is withdrawn before the guest has closed, however long that takes.
        world.tick(0);
        world.tick(60_000);
        assert_eq!(world.counts(), (1, 0, 0, 0));
        assert!(!socket.is_rescinded());
        socket.close();
        world.assert_nothing_left();
    }
}

/// An end waits for the bytes in front of it.
#[test]
fn an_end_does_not_overtake_bytes() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    let bytes = stream(1 << 20, 9);
    let mut sent = 0;
    loop {
        let more = socket.send(&bytes[sent..]);
        world.settle();
        sent += more;
        if more == 0 {
            break;
        }
    }
    socket.finish();
    world.settle();
    let mut got = Vec::new();
    loop {
        match read_some(&mut program) {
            Got::Bytes(more) => got.extend(more),
            Got::Nothing => panic!("no end after {} of {sent}", got.len()),
            Got::End => break,
        }
        world.settle();
    }
    assert!(got == bytes[..sent]);

    // And to the guest.
    let mut sent = 0;
    loop {
        let more = write_some(&mut program, &bytes[sent..]);
        world.settle();
        sent += more;
        if more == 0 {
            break;
        }
    }
    drop(program);
    let mut got = Vec::new();
    while !socket.is_at_end {
        let more = socket.recv(10_000);
        world.settle();
        assert!(!more.is_empty() || socket.is_at_end, "no end after {} of {sent}", got.len());
        got.extend(more);
    }
    assert!(got == bytes[..sent]);
    socket.close();
    world.assert_nothing_left();
}

/// The guest writes, finishes and closes in one breath: the host sees the close first, and the bytes are in
/// the ring still.
#[test]
fn bytes_in_front_of_a_close_arrive() {
    for (size, finishes) in [(0, true), (5, true), (15_000, true), (15_000, false)] {
        let mut world = World::new();
        let listener = world.listener(52);
        let (mut socket, mut program) = world.guest_connects(&listener, 52);
        let bytes = stream(size, 1);
        assert_eq!(socket.send(&bytes), size);
        if finishes {
            socket.finish();
        }
        socket.close();
        world.settle();
        let mut got = Vec::new();
        loop {
            match read_some(&mut program) {
                Got::Bytes(more) => got.extend(more),
                Got::Nothing => panic!("{size} bytes: no end after {}", got.len()),
                Got::End => break,
            }
        }
        assert!(got == bytes, "{size} bytes: {} arrived", got.len());
        world.assert_nothing_left();
    }
}

/// A program that is slow keeps no channel, and loses nothing, when the guest closes.
#[test]
fn a_slow_program_gets_what_was_left_when_the_guest_closed() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    let bytes = stream(2 << 20, 2);
    let mut sent = 0;
    loop {
        let more = socket.send(&bytes[sent..]);
        world.settle();
        sent += more;
        if more == 0 {
            break;
        }
    }
    assert!(sent > 8 * SEND_BYTES);
    socket.finish();
    socket.close();
    world.settle();
    assert_eq!(world.counts(), (0, 1, 0, 0), "only bytes for the program are left");
    world.assert_guest_has_nothing();
    // What it sends itself is for nobody any more, and keeps nothing from it.
    assert_eq!(write_some(&mut program, b"too late"), 8);
    world.settle();
    world.tick(0);
    world.tick(60_000);
    let mut got = Vec::new();
    loop {
        match read_some(&mut program) {
            Got::Bytes(more) => got.extend(more),
            Got::Nothing => panic!("no end after {} of {sent}", got.len()),
            Got::End => break,
        }
        world.settle();
    }
    assert!(got == bytes[..sent], "{} of {sent}", got.len());
    world.assert_nothing_left();
}

/// The program dies: the guest reads what was sent, and its end.
#[test]
fn a_program_that_dies_is_an_end_for_the_guest() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (mut socket, mut program) = world.guest_connects(&listener, 52);
    assert_eq!(write_some(&mut program, b"farewell"), 8);
    drop(program);
    world.settle();
    assert_eq!(socket.recv(100), b"farewell");
    assert!(socket.is_at_end);
    // The guest has not heard, and goes on writing.
    let limit = u64::try_from(RESET_DELAY.as_millis()).unwrap();
    let bytes = stream(1 << 20, 1);
    let mut sent = 0;
    while sent < bytes.len() {
        let more = socket.send(&bytes[sent..]);
        assert_ne!(more, 0, "for nobody, but it does not wait");
        sent += more;
        world.settle();
    }
    world.tick(0);
    world.tick(limit - 1);
    assert!(!socket.is_rescinded());
    world.tick(limit);
    assert!(socket.is_rescinded());
    socket.close();
    world.assert_nothing_left();
}

/// Nobody listens in the guest: its driver leaves the offer alone, and the program is told by an end.
#[test]
fn a_guest_without_a_listener_has_two_seconds() {
    let limit = u64::try_from(OPEN_TIMEOUT.as_millis()).unwrap();
    assert_eq!(limit, 2000);
    let world = World::new();
    let mut program = world.program(b"CONNECT 1024\n");
    assert_eq!(world.offers().len(), 1);
    // The clock of the owner, whatever it shows, from the first tick on.
    world.tick(1_000_000);
    world.tick(1_000_000 + limit - 1);
    assert_eq!(read_some(&mut program), Got::Nothing);
    assert_eq!(world.offers().len(), 1);
    world.tick(1_000_000 + limit);
    assert_eq!(read_some(&mut program), Got::End);
    assert_eq!(world.offers(), []);
    world.assert_nothing_left();
}

/// A guest may go on right before the limit.
#[test]
fn an_open_just_in_time_counts() {
    let world = World::new();
    let mut program = world.program(b"CONNECT 1024\n");
    world.tick(0);
    world.tick(1999);
    let (service, endpoint, _) = world.offers()[0];
    let _socket = world.open(service, endpoint);
    world.tick(10_000);
    assert_eq!(world.counts(), (1, 0, 0, 0));
    let answer = format!("OK {endpoint}\n").into_bytes();
    assert_eq!(read_some(&mut program), Got::Bytes(answer));
}

/// The program goes away before the guest has answered.
#[test]
fn a_program_that_does_not_wait_is_an_end_too() {
    let world = World::new();
    let program = world.program(b"CONNECT 1024\n");
    drop(program);
    world.settle();
    let (service, endpoint, _) = world.offers()[0];
    let mut socket = world.open(service, endpoint);
    world.settle();
    assert_eq!((socket.recv(100), socket.is_at_end), (vec![], true));
    socket.close();
    world.assert_nothing_left();
}

/// The guest is gone: so are its connections, and the next guest gets none of them.
#[test]
fn a_guest_that_is_reset_leaves_nothing() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (socket, mut program) = world.guest_connects(&listener, 52);
    let mut waits = world.program(b"CONNECT 9\n");
    world.bus.guest_reset();
    world.settle();
    assert_eq!(read_some(&mut program), Got::End);
    assert_eq!(world.driver.channels().len(), 1, "the offer that nobody has opened");
    world.tick(0);
    world.tick(2000);
    assert_eq!(read_some(&mut waits), Got::End);
    assert_eq!(world.counts(), (0, 0, 0, 0));
    assert_eq!(world.bus.usage().channels, 0);
    drop(socket);
}

/// The broker ends: so do its connections, and its path.
#[test]
fn without_a_broker_there_is_nothing() {
    let mut world = World::new();
    let listener = world.listener(52);
    let (socket, mut program) = world.guest_connects(&listener, 52);
    let mut waits = world.program(b"CONNECT 9\n");
    let mut asks = world.program(b"CON");
    world.ask(52);
    world.broker = None;
    assert!(!world.path().exists());
    for program in [&mut program, &mut waits, &mut asks] {
        assert_eq!(read_some(program), Got::End);
    }
    assert!(socket.is_rescinded());
    socket.close();
    world.ask(52);
    world.assert_guest_has_nothing();
}
