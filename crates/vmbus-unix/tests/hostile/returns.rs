//! Hosts that lie to a guest that would go on with its connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::io::pwrite;
use rustix::net::{SocketFlags, accept_with};
use vmbus_unix::frame::{Greeting, Kind, RESUMABLE, ResumeClaim};
use vmbus_unix::{ConnectionError, GuestEvent, GuestOptions, Reason, UnixGuest};
use zerocopy::{FromBytes, IntoBytes};

use crate::hosts::{Fake, connection_error};
use crate::raw::*;

const NAME: [u8; 16] = *b"\x01name of a guest";

fn epoch(value: u64) -> OwnedFd {
    let file = memfd_create("epoch", MemfdFlags::CLOEXEC).unwrap();
    pwrite(&file, &value.to_le_bytes(), 0).unwrap();
    file
}

fn options(reconnect: Option<Duration>) -> GuestOptions {
    GuestOptions { reconnect, ..GuestOptions::new(1 << 20) }
}

fn send(raw: &Raw, bytes: &[u8], descriptors: &[OwnedFd]) {
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    raw.send(bytes, &borrowed);
}

fn welcome() -> Vec<u8> {
    frame(Kind::Welcome as u32, RESUMABLE, 0, &[greeting(0).as_bytes(), &NAME])
}

fn resumed(posts: u64) -> Vec<u8> {
    frame(Kind::Resumed as u32, 0, 0, &[greeting(0).as_bytes(), &posts.to_le_bytes()])
}

fn refused(reason: Reason) -> Vec<u8> {
    frame(Kind::Refused as u32, reason.to_wire(), 0, &[greeting(0).as_bytes(), b"no"])
}

/// A guest that would go on, and the host's end of its connection.
fn welcomed(fake: &Fake) -> (UnixGuest, Raw, OwnedFd) {
    let (event, epoch) = (event(), epoch(7));
    let answer = |raw: &Raw| raw.send(&welcome(), &[event.as_fd(), epoch.as_fd()]);
    let (guest, raw) = fake.meet_with(options(Some(PATIENCE)), answer);
    let guest = guest.unwrap();
    assert!(guest.is_resumable());
    assert_eq!(raw.receive().unwrap().header.kind, Kind::Hello as u32);
    (guest, raw, epoch)
}

/// The guest's next try to find its host.
fn next_try(fake: &Fake, guest: &UnixGuest) -> Raw {
    let is_there = |_: &UnixGuest| {
        let mut fds = [PollFd::new(&fake.socket, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    };
    assert!(guest.drive_until(PATIENCE, is_there).unwrap());
    Raw(accept_with(&fake.socket, SocketFlags::CLOEXEC).unwrap())
}

fn settle(guest: &UnixGuest) {
    while guest.wait(Some(Duration::ZERO)).unwrap() {
        guest.drive().unwrap();
    }
}

#[test]
fn wrong_terms_end_the_greeting() {
    let fake = Fake::new();
    let (pipe, _) = std::io::pipe().unwrap();
    let short = frame(2, RESUMABLE, 0, &[greeting(0).as_bytes(), &NAME[..15]]);
    let rows: Vec<(&str, Vec<u8>, Vec<OwnedFd>, &str)> = vec![
        ("no epoch", welcome(), vec![event()], "1 descriptors, it takes 2"),
        ("three", welcome(), vec![event(), epoch(1), event()], "3 descriptors, it takes 2"),
        ("a pipe", welcome(), vec![event(), pipe.into()], "not in a file in memory"),
        ("an event", welcome(), vec![event(), event()], "not in a file in memory"),
        ("the other order", welcome(), vec![epoch(1), event()], "not a non-blocking eventfd"),
        ("half a name", short, vec![event(), epoch(1)], "too few"),
    ];
    for (what, bytes, descriptors, text) in rows {
        let (guest, _raw) =
            fake.meet_with(options(Some(PATIENCE)), |raw| send(raw, &bytes, &descriptors));
        let error = connection_error(guest).to_string();
        assert!(error.contains(text), "{what}: {error:?} does not say {text:?}");
    }
}

/// A host may offer what nobody has asked for; it comes to nothing.
#[test]
fn a_guest_that_does_not_want_to_go_on_does_not() {
    let fake = Fake::new();
    let fds = [event(), epoch(1)];
    let (guest, raw) = fake.meet_with(options(None), |raw| send(raw, &welcome(), &fds));
    let guest = guest.unwrap();
    assert!(!guest.is_resumable());
    drop(raw);
    settle(&guest);
    assert!(matches!(guest.lost().as_deref(), Some(ConnectionError::Closed)));
}

#[test]
fn a_guest_says_exactly_where_it_is() {
    let fake = Fake::new();
    let (guest, raw, epoch) = welcomed(&fake);
    let post = raw.receive().unwrap();
    assert_eq!(post.header.kind, Kind::Post as u32);
    // Messages count whether they make sense or not.
    (0..3).for_each(|_| raw.send(&frame(Kind::Message as u32, 0, 2, &[b"nonsense"]), &[]));
    pwrite(&epoch, &8u64.to_le_bytes(), 0).unwrap();
    drop(raw);
    let raw = next_try(&fake, &guest);
    settle(&guest);
    let came = raw.receive().unwrap();
    assert_eq!((came.header.kind.get(), came.header.b.get()), (Kind::Resume as u32, 0));
    let (_, rest) = Greeting::read_from_prefix(&came.payload).unwrap();
    let (claim, _) = ResumeClaim::read_from_prefix(rest).unwrap();
    assert_eq!(claim.connection_id.to_bytes(), NAME);
    let numbers = [claim.epoch, claim.posts, claim.answers, claim.messages].map(|n| n.get());
    assert_eq!(numbers, [8, 1, 0, 3]);
    let (gpa, _) = guest.bus().memory().regions()[0].backing().unwrap();
    let (ours, theirs) = (fstat(gpa).unwrap(), fstat(&came.descriptors[1]).unwrap());
    assert_eq!((ours.st_dev, ours.st_ino), (theirs.st_dev, theirs.st_ino));

    // The post was not taken: it comes again. Once more it is not made.
    send(&raw, &resumed(0), &[event(), self::epoch(9)]);
    settle(&guest);
    assert!(guest.is_linked());
    let again = raw.receive().unwrap();
    assert_eq!((again.header, &again.payload), (post.header, &post.payload));
    drop(raw);
    let raw = next_try(&fake, &guest);
    settle(&guest);
    let came = raw.receive().unwrap();
    let (claim, _) = ResumeClaim::read_from_prefix(&came.payload[16..]).unwrap();
    let numbers = [claim.epoch, claim.posts, claim.answers, claim.messages].map(|n| n.get());
    assert_eq!(numbers, [9, 1, 0, 3]);
    // It was taken: nothing comes, and its answer is awaited.
    send(&raw, &resumed(1), &[event(), self::epoch(9)]);
    send(&raw, &frame(Kind::Posted as u32, 0, 0, &[]), &[]);
    settle(&guest);
    assert!(guest.is_linked() && guest.lost().is_none());
    assert_eq!(guest.bus().counts().guest.messages, 0);
    drop(raw);
    let raw = next_try(&fake, &guest);
    settle(&guest);
    let came = raw.receive().unwrap();
    let (claim, _) = ResumeClaim::read_from_prefix(&came.payload[16..]).unwrap();
    assert_eq!((claim.posts.get(), claim.answers.get()), (1, 1));
}

/// What a host may answer that does not go on, and whether the guest looks further.
#[test]
fn whoever_does_not_go_on_is_believed_or_asked_again() {
    let fake = Fake::new();
    let (pipe, _) = std::io::pipe().unwrap();
    let good = || vec![event(), epoch(1)];
    let mut other_version = greeting(0);
    other_version.transport_version = 9.into();
    let over: Vec<(&str, Vec<u8>, Vec<OwnedFd>, &str)> = vec![
        ("a state of another moment", refused(Reason::Stale), vec![], "refuses: no"),
        ("a state of another guest", refused(Reason::OtherGuest), vec![], "refuses: no"),
        ("no state", refused(Reason::CannotResume), vec![], "refuses: no"),
        ("a reason from nowhere", refused(Reason::Unknown(77)), vec![], "refuses: no"),
        ("posts that were not made", resumed(2), good(), "has taken 2 posts, 1 were made"),
        ("posts without end", resumed(u64::MAX), good(), "18446744073709551615 posts"),
        ("no descriptors", resumed(0), vec![], "0 descriptors, it takes 2"),
        ("one", resumed(0), vec![event()], "1 descriptors"),
        ("three", resumed(0), vec![event(), epoch(1), event()], "3 descriptors"),
        ("a pipe for the epoch", resumed(0), vec![event(), pipe.into()], "file in memory"),
        ("a file for the port", resumed(0), vec![epoch(1), epoch(1)], "non-blocking eventfd"),
        ("half a number", frame(10, 0, 0, &[greeting(0).as_bytes(), b"1234"]), good(), "too few"),
        ("a greeting", welcome(), good(), "Welcome while waiting to go on"),
        ("a message", frame(6, 0, 2, &[b"x"]), vec![], "Message while waiting to go on"),
        ("an answer", frame(5, 0, 0, &[]), vec![], "Posted while waiting to go on"),
        ("another version", frame(10, 0, 0, &[other_version.as_bytes()]), good(), "version 9"),
        ("nonsense", vec![0xff; 50], vec![], "unknown kind"),
    ];
    for (what, bytes, descriptors, text) in over {
        let (guest, raw, _epoch) = welcomed(&fake);
        drop(raw);
        // Neither a host that is just ending nor one that is busy is the last one asked.
        drop(next_try(&fake, &guest));
        let raw = next_try(&fake, &guest);
        send(&raw, &refused(Reason::Busy), &[]);
        drop(raw);
        let raw = next_try(&fake, &guest);
        send(&raw, &bytes, &descriptors);
        assert!(!guest.drive_until(PATIENCE, |_| false).unwrap(), "{what}");
        let lost = guest.lost().unwrap().to_string();
        assert!(lost.contains(text), "{what}: {lost:?} does not say {text:?}");
        let events = guest.take_events();
        let lost = events.iter().filter(|event| matches!(event, GuestEvent::LinkLost));
        assert_eq!(lost.count(), 1, "{what}: {events:?}");
    }
}

/// Whoever is there and says nothing has no more time than if nobody were.
#[test]
fn a_host_that_says_nothing_is_given_up_in_time() {
    let fake = Fake::new();
    let answer = [event(), epoch(1)];
    let limit = Some(Duration::from_millis(40));
    let (guest, raw) = fake.meet_with(options(limit), |raw| send(raw, &welcome(), &answer));
    let guest = guest.unwrap();
    drop(raw);
    let _silent = next_try(&fake, &guest);
    assert!(!guest.drive_until(PATIENCE, |_| false).unwrap());
    let lost = guest.lost().unwrap();
    assert!(matches!(*lost, ConnectionError::NobodyResumes { milliseconds: 40 }), "{lost}");
}

/// What the host has said that is wrong ends the connection, whoever would go on with it.
#[test]
fn a_host_that_breaks_the_rules_is_not_looked_for() {
    let fake = Fake::new();
    for (bytes, text) in [
        (refused(Reason::Protocol), "refuses: no"),
        (refused(Reason::Ended), "refuses: no"),
        (resumed(0), "Resumed while connected"),
        (vec![1, 2, 3], "3 bytes"),
    ] {
        let (guest, raw, _epoch) = welcomed(&fake);
        raw.send(&bytes, &[]);
        drop(raw);
        assert!(!guest.drive_until(PATIENCE, |_| false).unwrap());
        let lost = guest.lost().unwrap().to_string();
        assert!(lost.contains(text), "{lost:?} does not say {text:?}");
    }
}

/// Descriptors that come with each return replace those before: nothing piles up.
#[test]
fn a_guest_that_returns_often_keeps_nothing() {
    let fake = Fake::new();
    let (guest, raw, first) = welcomed(&fake);
    drop((raw, first));
    let mut before = None;
    for round in 0..20 {
        let raw = next_try(&fake, &guest);
        send(&raw, &resumed(0), &[event(), epoch(round)]);
        settle(&guest);
        assert!(guest.is_linked());
        drop(raw);
        settle(&guest);
        let now = held();
        assert_eq!(*before.get_or_insert(now), now, "round {round}");
    }
}
