//! Guests that send without end, and take nothing.

use std::os::fd::AsFd;

use rustix::io::{Errno, ioctl_fionbio, write};
use vmbus_unix::frame::Kind;
use vmbus_unix::{HostEvent, HostOptions};

use crate::raw::*;

/// A guest that posts and posts, and never takes an answer: the host stops reading it, keeps
/// nothing for it, and has nothing to do until it reads.
#[test]
fn a_guest_that_does_not_read_is_not_read_either() {
    let server = Server::new(HostOptions::default());
    let raw = Raw::welcomed(&server);
    let contact_after_contact = [&[14u8, 0, 0, 0, 0, 0, 0, 0][..], &[0; 32]].concat();
    let mut posted = 0u32;
    loop {
        match raw.try_send(&post(1, &contact_after_contact), &[]) {
            Ok(()) => posted += 1,
            Err(Errno::AGAIN) => {
                server.settle();
                // Full, and still full after the host has done all it will.
                if raw.try_send(&post(1, &contact_after_contact), &[]) == Err(Errno::AGAIN) {
                    break;
                }
                posted += 1;
            }
            Err(error) => panic!("{error}"),
        }
        assert!(posted < 1_000_000, "the host takes everything");
    }
    assert!(server.settle().is_empty(), "and does not spin");
    assert!(server.host.bus().usage().messages <= 1, "{:?}", server.host.bus().usage());
    // It reads after all: every post has its answer, in order, none is lost.
    let mut answered = 0;
    while answered < posted {
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| raw.receive())) {
            Ok(Some(came)) => answered += u32::from(came.header.kind == Kind::Posted as u32),
            Ok(None) => panic!("the host has ended the connection"),
            Err(_nothing_there) => {
                server.settle();
            }
        }
    }
    drop(raw);
    assert!(matches!(server.settle()[..], [HostEvent::GuestGone { .. }]));
    server.assert_takes_a_guest();
}

/// Signals to the port of old versions, from a guest that has no channel: each look costs one turn.
#[test]
fn signals_without_end_are_one_signal() {
    let server = Server::new(HostOptions::default());
    let raw = Raw::connect(&server.path);
    let memory = vmbus_memory::GuestMemory::memfd(1 << 20).unwrap();
    let attention = event();
    let (fd, _) = memory.regions()[0].backing().unwrap();
    raw.send(&hello(&[region(0, 1 << 20, 0)]), &[attention.as_fd(), fd]);
    server.settle();
    let event_port = raw.receive().unwrap().descriptors.pop().unwrap();
    // The guest makes both blocking, and fills them.
    for event in [&event_port, &attention] {
        ioctl_fionbio(event, false).unwrap();
        write(event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    }
    assert!(server.settle().is_empty());
    assert!(!server.host.wait(Some(std::time::Duration::ZERO)).unwrap(), "it is quiet");
    drop(raw);
    server.settle();
    drop((event_port, attention));
    server.assert_takes_a_guest();
}
