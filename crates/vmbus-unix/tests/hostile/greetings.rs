//! Processes that introduce themselves wrongly, or not at all.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vmbus_unix::frame::{HelloRegion, Kind, MAX_HELLO_REGIONS, TRANSPORT_VERSION};
use vmbus_unix::{ConnectionError, HostEvent, HostOptions, MAX_HANDSHAKES, Reason};
use zerocopy::IntoBytes;

use crate::raw::*;

const MIB: u64 = 1 << 20;

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    if !seals.is_empty() {
        fcntl_add_seals(&fd, seals).unwrap();
    }
    fd
}

fn sealed() -> OwnedFd {
    memfd(MIB, SealFlags::SHRINK)
}

type Row = (&'static str, Vec<u8>, Vec<OwnedFd>, Reason, &'static str);

/// What, the frame, its descriptors, the reason told, and words of the text told.
fn rows() -> Vec<Row> {
    let one = || hello(&[region(0, MIB, 0)]);
    let regions = |regions: &[HelloRegion]| (hello(regions), vec![event(), sealed()]);
    let good = || vec![event(), sealed()];
    let version = |version: u32| {
        let mut greeting = greeting(1);
        greeting.transport_version = version.into();
        frame(Kind::Hello as u32, 0, 0, &[greeting.as_bytes(), b"who knows"])
    };
    let claims = |count: u32| {
        let region = region(0, MIB, 0);
        frame(Kind::Hello as u32, 0, 0, &[greeting(count).as_bytes(), region.as_bytes()])
    };
    let mut cut = one();
    cut.truncate(40);
    let mut long = one();
    long[4] = 0xff;
    let (pipe, _) = std::io::pipe().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB).unwrap();
    let read_only = File::open("/proc/self/exe").unwrap();
    let many: Vec<_> = (0..MAX_HELLO_REGIONS as u64 + 4).map(|i| region(i * MIB, MIB, 0)).collect();
    let in_memory = |what, (bytes, fds): (Vec<u8>, Vec<OwnedFd>), text| -> Row {
        (what, bytes, fds, Reason::Memory, text)
    };
    let protocol = |what, bytes, fds, text| -> Row { (what, bytes, fds, Reason::Protocol, text) };
    vec![
        protocol("one byte", vec![1], vec![], "a frame of 1 bytes"),
        protocol("no kind", frame(0, 0, 0, &[]), vec![], "unknown kind 0"),
        protocol("a kind from nowhere", frame(99, 0, 0, &[]), good(), "unknown kind 99"),
        protocol("a post first", post(1, b"x"), vec![], "Post while"),
        protocol("our own answer", frame(Kind::Welcome as u32, 0, 0, &[]), good(), "Welcome while"),
        protocol("another tongue", frame(1, 0, 0, &[b"GET / HTTP/1.1\r\n"]), good(), "no VMBus"),
        protocol("half a greeting", frame(1, 0, 0, &[b"vmbus/ux"]), good(), "too few"),
        protocol("cut short", cut, good(), "claims 40 bytes of payload and has 24"),
        protocol("a length that lies", long, good(), "claims 255"),
        protocol("no memory", hello(&[]), vec![event()], "0 regions"),
        protocol("a region too many", claims(65), good(), "65 regions"),
        protocol("regions without end", claims(u32::MAX), good(), "4294967295 regions"),
        protocol("regions that are not there", claims(2), good(), "too few"),
        protocol("too long", hello(&many), good(), "more than"),
        protocol("no descriptors", one(), vec![], "0 descriptors, it takes 2"),
        protocol("one descriptor", one(), vec![event()], "1 descriptors, it takes 2"),
        protocol("three", one(), vec![event(), sealed(), event()], "3 descriptors, it takes 2"),
        protocol(
            "a hundred",
            one(),
            (0..100).map(|_| event()).collect(),
            "more descriptors than a frame may carry",
        ),
        protocol("a pipe for an event", one(), vec![pipe.into(), sealed()], "not a non-blocking"),
        protocol("memory for an event", one(), vec![sealed(), sealed()], "not a non-blocking"),
        (
            "an older version",
            version(0),
            good(),
            Reason::Version,
            "version 0 of the transport, this end version 1",
        ),
        ("a newer version", version(2), vec![], Reason::Version, "version 2 of the transport"),
        in_memory("an event for memory", (one(), vec![event(), event()]), "not sealed"),
        in_memory("a file", (one(), vec![event(), file.into()]), "not sealed"),
        in_memory("a program", (one(), vec![event(), read_only.into()]), "not sealed"),
        in_memory(
            "a memfd that can shrink",
            (one(), vec![event(), memfd(MIB, SealFlags::GROW)]),
            "not sealed",
        ),
        in_memory(
            "a memfd that is too short",
            (one(), vec![event(), memfd(MIB - 1, SealFlags::SHRINK)]),
            "needs 0x100000 bytes",
        ),
        in_memory(
            "a memfd that cannot be written",
            (one(), vec![event(), memfd(MIB, SealFlags::SHRINK | SealFlags::WRITE)]),
            "mmap",
        ),
        in_memory("no length", regions(&[region(0, 0, 0)]), "empty or not page aligned"),
        in_memory("half a page", regions(&[region(0, 2048, 0)]), "not page aligned"),
        in_memory("a crooked address", regions(&[region(1, MIB, 0)]), "not page aligned"),
        in_memory("a crooked offset", regions(&[region(0, 4096, 7)]), "not page aligned"),
        in_memory(
            "the end of the address space",
            regions(&[region(u64::MAX - 0xfff, 0x2000, 0)]),
            "past the largest address",
        ),
        in_memory(
            "an offset from beyond",
            regions(&[region(0, 4096, u64::MAX - 0xfff)]),
            "past the largest",
        ),
        in_memory("everything", regions(&[region(0, u64::MAX, 0)]), "are the bound"),
        in_memory("more than allowed", regions(&[region(0, 17 << 30, 0)]), "are the bound"),
        in_memory(
            "more than allowed, by overflow",
            (hello(&[region(0, u64::MAX, 0), region(0, 2, 0)]), vec![event(), sealed(), sealed()]),
            "are the bound",
        ),
        in_memory(
            "regions on top of each other",
            (
                hello(&[region(0, 0x2000, 0), region(0x1000, 0x2000, 0)]),
                vec![event(), sealed(), sealed()],
            ),
            "overlaps",
        ),
    ]
}

#[test]
fn each_wrong_greeting_is_told_why_and_leaves_nothing() {
    let server = Server::new(HostOptions::default());
    server.assert_takes_a_guest();
    let before = held();
    for (what, bytes, descriptors, reason, text) in rows() {
        let raw = Raw::connect(&server.path);
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        raw.send(&bytes, &borrowed);
        let events = server.settle();
        assert!(matches!(events[..], [HostEvent::Refused { .. }]), "{what}: {events:?}");
        let told = raw.assert_refused(reason);
        assert!(told.contains(text), "{what}: {told:?} does not say {text:?}");
        drop((raw, descriptors));
    }
    assert_eq!(held(), before);
    server.assert_takes_a_guest();
    assert_eq!(held(), before);
}

/// Whatever comes in place of a greeting.
#[test]
fn random_greetings_are_refused() {
    use proptest::prelude::*;
    let server = Server::new(HostOptions::default());
    let strategy = (0..9u32, proptest::collection::vec(any::<u8>(), 0..300), 0..4usize);
    proptest!(ProptestConfig::with_cases(500), |((kind, payload, descriptors) in strategy)| {
        let raw = Raw::connect(&server.path);
        let events: Vec<_> = (0..descriptors).map(|_| event()).collect();
        let borrowed: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        raw.send(&frame(kind, 0, 0, &[&payload]), &borrowed);
        let told = server.settle();
        prop_assert!(matches!(told[..], [HostEvent::Refused { .. }]), "{:?}", told);
    });
    server.assert_takes_a_guest();
}

#[test]
fn a_guest_that_leaves_before_it_says_anything_is_forgotten() {
    let server = Server::new(HostOptions::default());
    let before = held();
    for _ in 0..3 {
        drop(Raw::connect(&server.path));
        assert!(matches!(
            server.settle()[..],
            [HostEvent::Refused { reason: ConnectionError::Closed }]
        ));
    }
    assert_eq!(held(), before);
    server.assert_takes_a_guest();
}

/// Those who connect and say nothing keep nobody out, as long as there are few of them; then only
/// for as long as a handshake may take.
#[test]
fn a_stalled_handshake_keeps_nobody_out_for_long() {
    let handshake_timeout = Duration::from_millis(100);
    let server = Server::new(HostOptions { handshake_timeout, ..HostOptions::default() });
    let before = held();
    let stalled: Vec<_> = (1..MAX_HANDSHAKES).map(|_| Raw::connect(&server.path)).collect();
    assert!(server.settle().is_empty());
    let guest = Raw::connect(&server.path);
    server.settle();
    drop(Raw::connect(&server.path));
    assert!(matches!(server.settle()[..], [HostEvent::Busy]), "one too many");
    drop(guest);
    server.settle();

    // Nobody is connected yet: a guest that speaks is taken, and the silent ones turned away.
    let guest = Raw::connect(&server.path);
    server.settle();
    guest.send(&hello(&[region(0, MIB, 0)]), &[event().as_fd(), sealed().as_fd()]);
    let events = server.settle();
    assert!(matches!(events[0], HostEvent::GuestConnected { .. }), "{events:?}");
    assert_eq!(events.len(), MAX_HANDSHAKES);
    for raw in &stalled {
        raw.assert_refused(Reason::Busy);
    }
    drop((guest, stalled));
    server.settle();

    // Alone, they are turned away when their time is over.
    let stalled: Vec<_> = (0..MAX_HANDSHAKES).map(|_| Raw::connect(&server.path)).collect();
    let mut gone = Vec::new();
    while gone.len() < MAX_HANDSHAKES {
        assert!(server.host.wait(Some(Duration::from_secs(30))).unwrap());
        gone.extend(server.settle());
    }
    for (raw, event) in stalled.iter().zip(gone) {
        let reason = ConnectionError::HandshakeTimeout { milliseconds: 100 }.to_string();
        assert!(matches!(event, HostEvent::Refused { reason: why } if why.to_string() == reason));
        assert_eq!(raw.assert_refused(Reason::Protocol), reason);
    }
    drop(stalled);
    assert_eq!(held(), before);
    server.assert_takes_a_guest();
}

#[test]
fn while_a_guest_is_there_others_are_told_so_without_being_asked() {
    let server = Server::new(HostOptions::default());
    let guest = Raw::welcomed(&server);
    let silent = Raw::connect(&server.path);
    let eager = Raw::connect(&server.path);
    eager.send(&hello(&[region(0, MIB, 0)]), &[event().as_fd(), sealed().as_fd()]);
    assert!(matches!(server.settle()[..], [HostEvent::Busy, HostEvent::Busy]));
    silent.assert_refused(Reason::Busy);
    eager.assert_refused(Reason::Busy);
    assert_eq!(TRANSPORT_VERSION, 1);
    drop(guest);
    assert!(matches!(server.settle()[..], [HostEvent::GuestGone { .. }]));
    server.assert_takes_a_guest();
}
