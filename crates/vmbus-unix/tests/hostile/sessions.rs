//! Guests that were taken, and then break the rules.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kmcl::{Channel, Guid, IncomingPacket, ProcessPacket, Side};
use vmbus_unix::frame::Kind;
use vmbus_unix::{ConnectionError, HostEvent, HostOptions, Reason};

use crate::raw::*;

#[test]
fn each_broken_rule_ends_the_connection_and_is_told() {
    let server = Server::new(HostOptions::default());
    server.assert_takes_a_guest();
    let before = held();
    let with_flag = |flag: u32| frame(Kind::Post as u32, 1, flag, &[b"any message"]);
    let (pipe, _) = std::io::pipe().unwrap();
    let rows: Vec<(&str, Vec<u8>, Vec<OwnedFd>, &str)> = vec![
        ("no header", vec![4, 0, 0], vec![], "3 bytes"),
        ("a kind from nowhere", frame(77, 0, 0, &[]), vec![], "unknown kind 77"),
        ("a second greeting", hello(&[region(0, 4096, 0)]), vec![event()], "Hello while connected"),
        ("a host's frame", frame(Kind::Posted as u32, 0, 0, &[]), vec![], "Posted while connected"),
        ("a host's message", frame(Kind::Message as u32, 0, 2, &[b"x"]), vec![], "Message while"),
        ("a message too long", post(1, &[0; 241]), vec![], "a message of 241 bytes"),
        ("a frame too long", vec![4; 10_000], vec![], "a frame of more than"),
        ("two doorbells", with_flag(1), vec![event(), event()], "2 descriptors, it takes 1"),
        ("a pipe for a doorbell", with_flag(1), vec![pipe.into()], "not a non-blocking eventfd"),
        ("flag 0", with_flag(0), vec![event()], "event flag 0"),
        ("flag 2048", with_flag(2048), vec![event()], "event flag 2048"),
        ("flag 65537", with_flag(65_537), vec![event()], "event flag 65537"),
    ];
    for (what, bytes, descriptors, text) in rows {
        let raw = Raw::welcomed(&server);
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        raw.send(&bytes, &borrowed);
        let events = server.settle();
        assert!(matches!(events[..], [HostEvent::GuestGone { .. }]), "{what}: {events:?}");
        let told = raw.assert_refused(Reason::Protocol);
        assert!(told.contains(text), "{what}: {told:?} does not say {text:?}");
        drop((raw, descriptors));
    }
    assert_eq!(held(), before);
    server.assert_takes_a_guest();
}

/// What is wrong with a message is the bus's business, and no reason to end the connection.
#[test]
fn a_wrong_message_has_a_status_and_the_connection_goes_on() {
    let server = Server::new(HostOptions::default());
    let raw = Raw::welcomed(&server);
    let table: [(u32, &[u8], u32); 6] = [
        (1, b"", 0),
        (1, b"\xff\xff\xff\xff\0\0\0\0", 0),
        (1, b"\x01\0\0\0\0\0\0\0", 0), // only hosts offer
        (4, &[0xee; 240], 0),
        (2, b"\x0e\0\0\0\0\0\0\0", 18),
        (0x00ff_ffff, b"\x0e\0\0\0\0\0\0\0", 18),
    ];
    for (connection_id, message, status) in table {
        raw.send(&post(connection_id, message), &[]);
        assert!(server.settle().is_empty());
        let answer = raw.receive().unwrap();
        assert_eq!(answer.header.kind, Kind::Posted as u32);
        assert_eq!(answer.header.a, status, "connection {connection_id:#x}");
    }
}

/// A datagram of no bytes cannot be told from the end.
#[test]
fn an_empty_datagram_is_the_end() {
    let server = Server::new(HostOptions::default());
    let raw = Raw::welcomed(&server);
    raw.send(&[], &[]);
    assert!(matches!(
        server.settle()[..],
        [HostEvent::GuestGone { reason: ConnectionError::Closed, .. }]
    ));
}

struct Nothing;

impl ProcessPacket for Nothing {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        packet.complete(&[]);
    }
}

/// Doorbells without end: the host keeps no more of them than there are channels.
#[test]
fn doorbells_are_kept_for_as_many_channels_as_there_are() {
    let server = Server::new(HostOptions::default());
    let devices: Vec<_> = (1..=3u128)
        .map(|instance| {
            let device = Channel::allocate(Side::Server, Arc::new(server.host.bus().clone()));
            let id = Guid::from_u128(instance);
            device.server_init_set_target_interface_id(id, id).unwrap();
            device.init_set_process_packet_callbacks(Arc::new(Nothing)).unwrap();
            device.enable().unwrap();
            device
        })
        .collect();
    let raw = Raw::welcomed(&server);
    let before = held();
    let doorbell = event();
    for flag in 1..=2047 {
        let bytes = frame(Kind::Post as u32, 1, flag, &[b"no open"]);
        raw.send(&bytes, &[doorbell.as_fd()]);
        server.settle();
        raw.receive().unwrap();
    }
    drop(doorbell);
    let after = held();
    assert!(format!("{after:?}") != format!("{before:?}"), "some are kept");
    drop(raw);
    server.settle();
    server.assert_takes_a_guest();
    let raw = Raw::welcomed(&server);
    assert_eq!(held(), before, "none outlives the guest");
    drop(raw);
    devices.iter().for_each(Channel::disable);
}
