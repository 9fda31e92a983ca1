//! Hosts that lie to their guest.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use vmbus_unix::frame::{Kind, TRANSPORT_VERSION};
use vmbus_unix::{ConnectError, ConnectionError, FrameError, GuestOptions, Reason, UnixGuest};
use zerocopy::IntoBytes;

use crate::raw::*;

/// A socket at a path, and nothing behind it but the test.
pub(crate) struct Fake {
    pub(crate) socket: OwnedFd,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Fake {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmbus");
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&socket, 4).unwrap();
        Self { socket, path, _directory: directory }
    }

    /// A guest that connects, to whose greeting the host answers `answer`.
    fn meet(
        &self,
        timeout: Duration,
        answer: impl FnOnce(&Raw) + Send,
    ) -> (Result<UnixGuest, ConnectError>, Raw) {
        self.meet_with(GuestOptions { timeout, ..GuestOptions::new(1 << 20) }, answer)
    }

    pub(crate) fn meet_with(
        &self,
        options: GuestOptions,
        answer: impl FnOnce(&Raw) + Send,
    ) -> (Result<UnixGuest, ConnectError>, Raw) {
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| UnixGuest::connect_with(&self.path, options));
            let raw = Raw(accept_with(&self.socket, SocketFlags::CLOEXEC).unwrap());
            answer(&raw);
            (guest.join().unwrap(), raw)
        })
    }

    /// A guest that has been welcomed.
    fn welcomed(&self) -> (UnixGuest, Raw) {
        let event = event();
        let (guest, raw) = self.meet(PATIENCE, |raw| welcome(raw, &[event.as_fd()]));
        (guest.unwrap(), raw)
    }
}

fn welcome(raw: &Raw, descriptors: &[std::os::fd::BorrowedFd<'_>]) {
    raw.send(&frame(Kind::Welcome as u32, 0, 0, &[greeting(0).as_bytes()]), descriptors);
}

/// Why a guest did not come to a connection.
pub(crate) fn connection_error(result: Result<UnixGuest, ConnectError>) -> ConnectionError {
    match result.unwrap_err() {
        ConnectError::Connection { source, .. } => source,
        other => panic!("{other}"),
    }
}

#[test]
fn wrong_answers_to_a_greeting_have_their_error() {
    let fake = Fake::new();
    let refuse = |version: u32, text: &'static [u8]| {
        let mut greeting = greeting(0);
        greeting.transport_version = version.into();
        frame(Kind::Refused as u32, Reason::Busy.to_wire(), 0, &[greeting.as_bytes(), text])
    };
    let mut other_version = greeting(0);
    other_version.transport_version = 9.into();
    let rows: Vec<(&str, Vec<u8>, Vec<OwnedFd>, &str)> = vec![
        ("nonsense", vec![0xff; 40], vec![], "unknown kind"),
        ("short", vec![2, 0], vec![], "2 bytes"),
        ("a guest's frame", post(1, b"x"), vec![], "Post while"),
        (
            "no event port",
            frame(2, 0, 0, &[greeting(0).as_bytes()]),
            vec![],
            "0 descriptors, it takes 1",
        ),
        (
            "two of them",
            frame(2, 0, 0, &[greeting(0).as_bytes()]),
            vec![event(), event()],
            "2 descriptors, it takes 1",
        ),
        (
            "a file for it",
            frame(2, 0, 0, &[greeting(0).as_bytes()]),
            vec![tempfile::tempfile().unwrap().into()],
            "not a non-blocking eventfd",
        ),
        (
            "another version",
            frame(2, 0, 0, &[other_version.as_bytes()]),
            vec![event()],
            "version 9 of the transport, this end version 1",
        ),
        ("a refusal", refuse(TRANSPORT_VERSION, b"not \x1b[31mtoday"), vec![], "not [31mtoday"),
        ("a refusal by another version", refuse(3, b"?"), vec![], "version 3 of the transport"),
        ("a refusal in another tongue", frame(3, 1, 0, &[&[7; 16]]), vec![], "no VMBus"),
        ("no bytes", vec![], vec![], "closed the connection"),
    ];
    for (what, bytes, descriptors, text) in rows {
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let (guest, _raw) = fake.meet(PATIENCE, |raw| raw.send(&bytes, &borrowed));
        let error = connection_error(guest).to_string();
        assert!(error.contains(text), "{what}: {error:?} does not say {text:?}");
    }
}

#[test]
fn a_host_that_says_nothing_is_given_up() {
    let fake = Fake::new();
    let (guest, _raw) = fake.meet(Duration::from_millis(50), |_| {});
    let error = connection_error(guest);
    assert!(matches!(error, ConnectionError::HandshakeTimeout { milliseconds: 50 }), "{error}");
    // Not even accepted.
    let options =
        || GuestOptions { timeout: Duration::from_millis(50), ..GuestOptions::new(1 << 20) };
    let mut waiting = Vec::new();
    for _ in 0..8 {
        let error = connection_error(UnixGuest::connect_with(&fake.path, options()));
        assert!(matches!(error, ConnectionError::HandshakeTimeout { .. }), "{error}");
        waiting.push(error);
    }
}

#[test]
fn frames_that_break_the_rules_end_the_connection() {
    let fake = Fake::new();
    let rows: Vec<(&str, Vec<u8>, Vec<OwnedFd>, &str)> = vec![
        ("nonsense", vec![0xee; 100], vec![], "unknown kind"),
        ("a guest's frame", post(1, b"x"), vec![], "Post while connected"),
        (
            "a second welcome",
            frame(2, 0, 0, &[greeting(0).as_bytes()]),
            vec![event()],
            "Welcome while connected",
        ),
        ("a message too long", frame(6, 0, 2, &[&[0; 241]]), vec![], "241 bytes"),
        ("a message with a gift", frame(6, 0, 2, &[b"x"]), vec![event()], "it takes 0"),
        ("a status with a gift", frame(5, 0, 0, &[]), vec![event()], "it takes 0"),
        ("a status of 17 bits", frame(5, 0x10000, 0, &[]), vec![], "does not fit 16 bits"),
        ("nothing to ring", frame(7, 0x2001, 0, &[]), vec![], "it takes 1"),
        (
            "a socket to ring",
            frame(7, 0x2001, 0, &[]),
            vec![std::os::unix::net::UnixStream::pair().unwrap().0.into()],
            "not a non-blocking",
        ),
        (
            "a refusal",
            frame(3, 4, 0, &[greeting(0).as_bytes(), b"enough"]),
            vec![],
            "the host refuses: enough",
        ),
    ];
    for (what, bytes, descriptors, text) in rows {
        let (guest, raw) = fake.welcomed();
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        raw.send(&bytes, &borrowed);
        assert!(!guest.drive_until(PATIENCE, |_| false).unwrap(), "{what}");
        let lost = guest.lost().unwrap().to_string();
        assert!(lost.contains(text), "{what}: {lost:?} does not say {text:?}");
    }
}

/// A post is answered once.
#[test]
fn an_answer_that_nobody_waits_for_ends_the_connection() {
    let fake = Fake::new();
    let (guest, raw) = fake.welcomed();
    raw.send(&frame(5, 0, 0, &[]), &[]); // INITIATE_CONTACT
    raw.send(&frame(5, 0, 0, &[]), &[]);
    assert!(!guest.drive_until(PATIENCE, |_| false).unwrap());
    assert!(matches!(
        guest.lost().as_deref(),
        Some(ConnectionError::Frame(FrameError::NothingPosted))
    ));
}

/// A host without buffers is asked again, after a while that the guest's own timer ends.
#[test]
fn a_post_without_success_is_made_again() {
    let fake = Fake::new();
    let (guest, raw) = fake.welcomed();
    assert_eq!(raw.receive().unwrap().header.kind, Kind::Hello as u32);
    let first = raw.receive().unwrap();
    for status in [19, 11, 19] {
        raw.send(&frame(5, status, 0, &[]), &[]);
        let mut again = None;
        guest
            .drive_until(PATIENCE, |_| {
                if wait_for_frame(&raw) {
                    again = raw.receive();
                }
                again.is_some()
            })
            .unwrap();
        let again = again.expect("the same message");
        assert_eq!((again.header, &again.payload), (first.header, &first.payload));
    }
    raw.send(&frame(5, 0, 0, &[]), &[]);
    raw.send(&frame(5, 0, 0, &[]), &[]);
    assert!(!guest.drive_until(PATIENCE, |_| false).unwrap(), "there is nothing more to answer");
}

/// Whether the guest has sent something.
fn wait_for_frame(raw: &Raw) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(&raw.0, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

/// Signals for channels that nobody opens, and messages that make no sense, are dropped.
#[test]
fn what_means_nothing_changes_nothing() {
    let fake = Fake::new();
    let (guest, raw) = fake.welcomed();
    let before = held();
    for number in 0..1000u32 {
        raw.send(&frame(7, number, 0, &[]), &[event().as_fd()]);
        raw.send(&frame(6, number, number, &[&number.to_le_bytes()]), &[]);
        while guest.wait(Some(Duration::ZERO)).unwrap() {
            guest.drive().unwrap();
        }
    }
    assert!(guest.lost().is_none());
    assert_eq!(held(), before);
}
