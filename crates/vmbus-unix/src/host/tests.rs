//! The transport alone: what is lost and what comes again, with a bus that knows nothing of it.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kmcl::SaveOptions;
use saved_state::Save;
use vmbus_guest::ConnectionState;

use super::*;
use crate::resume::Progress;
use crate::{GuestEvent, GuestOptions, ResumeError, UnixGuest};

/// Longer than anything takes on a machine that is busy with other things: reached only by a fault.
const PATIENCE: Duration = Duration::from_secs(30);

struct Place {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { path: directory.path().join("vmbus"), _directory: directory }
    }

    fn host(&self) -> UnixHost {
        UnixHost::bind(&self.path).unwrap()
    }

    /// A host in the place of the saved one, with a bus that knows nothing.
    fn restoring(&self, transport: &[u8]) -> RestoringHost {
        self.try_restoring(transport).unwrap()
    }

    fn try_restoring(&self, transport: &[u8]) -> Result<RestoringHost, RestoreError> {
        let options = HostOptions::default();
        RestoringHost::start(&self.path, options, transport, |port| {
            Ok::<_, BindError>(HostBus::new(port, Config::default()))
        })
    }

    /// A guest that the host has taken, and nothing of which it has read.
    fn guest(&self, host: &UnixHost, reconnect: Option<Duration>) -> UnixGuest {
        let options = GuestOptions { reconnect, ..GuestOptions::new(1 << 20) };
        std::thread::scope(|scope| {
            let connecting = scope.spawn(|| UnixGuest::connect_with(&self.path, options).unwrap());
            while host.guest().is_none() {
                host.wait(Some(PATIENCE)).unwrap();
                host.drive().unwrap();
            }
            connecting.join().unwrap()
        })
    }
}

fn save(held: &HeldHost<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    held.save(&SaveOptions::default()).unwrap().write_to(&mut bytes).unwrap();
    bytes
}

/// As good as SIGKILL, for the guest.
fn save_and_kill(host: &UnixHost) -> Vec<u8> {
    let held = host.hold().unwrap();
    let bytes = save(&held);
    held.move_away();
    bytes
}

/// Goes on with a bus that finds the guest as it would find a new one.
fn finish(restoring: RestoringHost) -> UnixHost {
    let go_on = |bus: &HostBus| {
        bus.guest_reset();
        Ok(())
    };
    restoring.finish_with(go_on).unwrap()
}

/// Drives one end until there is nothing to do.
fn settle(drive: impl Fn() -> io::Result<bool>, wait: impl Fn() -> io::Result<bool>) {
    let mut more = false;
    while more || wait().unwrap() {
        more = drive().unwrap();
    }
}

fn settle_host(host: &UnixHost) {
    settle(|| host.drive(), || host.wait(Some(Duration::ZERO)));
}

fn settle_guest(guest: &UnixGuest) {
    settle(|| guest.drive(), || guest.wait(Some(Duration::ZERO)));
}

/// Drives both until `done`.
#[track_caller]
fn until(
    restoring: &RestoringHost,
    guest: &UnixGuest,
    mut done: impl FnMut(&RestoringHost, &UnixGuest) -> bool,
) {
    let deadline = Instant::now() + PATIENCE;
    while !done(restoring, guest) {
        assert!(Instant::now() < deadline, "{:?} {:?}", restoring.take_events(), guest.lost());
        settle(|| restoring.drive(), || restoring.wait(Some(Duration::ZERO)));
        guest.wait(Some(Duration::from_millis(1))).unwrap();
        guest.drive().unwrap();
    }
}

fn back(restoring: &RestoringHost, guest: &UnixGuest) -> bool {
    restoring.guest_is_back() && guest.is_linked()
}

fn is_connected(guest: &UnixGuest) -> bool {
    matches!(guest.bus().state(), ConnectionState::Connected { offers_delivered: true, .. })
}

/// Drives both until the guest is connected.
#[track_caller]
fn until_connected(host: &UnixHost, guest: &UnixGuest) {
    let deadline = Instant::now() + PATIENCE;
    while !is_connected(guest) {
        assert!(Instant::now() < deadline, "{:?} {:?}", host.take_events(), guest.lost());
        settle_host(host);
        settle_guest(guest);
    }
}

#[test]
fn a_post_that_the_state_has_not_seen_comes_again() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    assert!(guest.is_resumable());
    let state = save_and_kill(&host);
    drop(host);
    settle_guest(&guest);
    assert!(!guest.is_linked() && guest.lost().is_none());
    let restoring = place.restoring(&state);
    assert!(!restoring.guest_is_back());
    until(&restoring, &guest, back);
    let host = finish(restoring);
    until_connected(&host, &guest);
    let events = guest.take_events();
    assert!(matches!(events[0], GuestEvent::LinkLost), "{events:?}");
    assert!(matches!(events[1], GuestEvent::Resumed { .. }), "{events:?}");
}

/// At each moment of making contact, with frames on their way in either direction.
#[test]
fn wherever_contact_is_interrupted_it_goes_on() {
    for steps in 0..12 {
        for guest_first in [false, true] {
            let place = Place::new();
            let mut host = place.host();
            let guest = place.guest(&host, Some(PATIENCE));
            for step in 0..steps {
                if (step % 2 == 0) == guest_first {
                    guest.drive().unwrap();
                } else {
                    host.drive().unwrap();
                }
            }
            // The bus is a new one each time, so it is one that has to hear everything again that
            // makes a difference. That the transport loses nothing shows in its numbers alone.
            let before = host.port.session().as_ref().unwrap().progress;
            let state = save_and_kill(&host);
            drop(host);
            let restoring = place.restoring(&state);
            until(&restoring, &guest, back);
            host = finish(restoring);
            let after = host.port.session().as_ref().unwrap().progress;
            assert_eq!(before, after, "{steps} steps");
            assert!(host.guest().is_some());
        }
    }
}

/// What the socket did not take is in the state, and the guest gets it from the next host.
#[test]
fn an_answer_that_waited_for_room_comes_again() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    // Whatever the host wants to say waits, as it does where the socket has no room.
    host.port.session().as_mut().unwrap().link.hold(true);
    host.drive().unwrap();
    let session_has = |host: &UnixHost| host.port.session().as_ref().unwrap().progress;
    assert_eq!(session_has(&host), Progress { posts: 1, post_status: 0, messages: 0 });
    assert!(host.port.session().as_ref().unwrap().link.is_waiting());
    let state = save_and_kill(&host);
    drop(host);
    settle_guest(&guest);
    let restoring = place.restoring(&state);
    until(&restoring, &guest, back);
    settle_guest(&guest);
    // The answer is there, and the post was not made again: the bus of the guest waits for what the
    // message is answered, which the new bus knows nothing of.
    assert_eq!(guest.bus().counts().guest.messages, 0);
    let host = finish(restoring);
    settle_host(&host);
    assert_eq!(session_has(&host), Progress { posts: 1, post_status: 0, messages: 0 });
}

#[test]
fn messages_that_were_given_are_read_before_the_end() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    settle_host(&host);
    let given = host.port.session().as_ref().unwrap().progress;
    assert_eq!((given.posts, given.messages), (1, 1));
    let state = save_and_kill(&host);
    drop(host);
    settle_guest(&guest);
    // It has read both, and answered with a post to nobody.
    assert!(!guest.is_linked());
    assert!(matches!(guest.bus().state(), ConnectionState::Connected { .. }));
    let restoring = place.restoring(&state);
    until(&restoring, &guest, back);
    let host = finish(restoring);
    settle_host(&host);
    assert_eq!(host.port.session().as_ref().unwrap().progress.posts, 2);
}

/// A host that is held does nothing, says nothing, and is not busy with it.
#[test]
fn a_held_host_is_quiet_until_it_is_released() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    let held = host.hold().unwrap();
    assert_eq!(host.hold().unwrap_err(), HoldError::Held);
    for _ in 0..3 {
        assert!(!host.wait(Some(Duration::ZERO)).unwrap() && !host.drive().unwrap());
        settle_guest(&guest);
    }
    assert_eq!(guest.bus().counts().guest.messages, 1);
    assert!(guest.is_linked());
    drop(held);
    until_connected(&host, &guest);
    let events = guest.take_events();
    assert!(events.iter().all(|event| matches!(event, GuestEvent::Bus(_))), "{events:?}");
}

/// Nothing that happens meanwhile keeps whoever drives it busy, and nothing is forgotten.
#[test]
fn a_held_host_sleeps_whatever_happens() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    until_connected(&host, &guest);
    let held = host.hold().unwrap();
    let late = crate::listener::new_socket().unwrap();
    rustix::net::connect(&late, &crate::listener::address(&place.path).unwrap()).unwrap();
    drop(guest);
    assert!(!host.wait(Some(Duration::ZERO)).unwrap());
    assert!(host.guest().is_some());
    held.release();
    settle_host(&host);
    assert!(host.guest().is_none());
    // A guest that is gone by then is not saved.
    let guest = place.guest(&host, Some(PATIENCE));
    drop(guest);
    let held = host.hold().unwrap();
    assert!(host.guest().is_none());
    assert!(save(&held).len() < 300);
}

/// A state is of one moment: as soon as its host has gone on, no guest goes on with it.
#[test]
fn a_state_whose_host_has_gone_on_is_refused() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    let held = host.hold().unwrap();
    let stale = save(&held);
    held.release();
    // Not one frame has gone over the socket since, in either direction.
    let state = save_and_kill(&host);
    drop(host);
    let restoring = place.restoring(&stale);
    let deadline = Instant::now() + PATIENCE;
    while guest.lost().is_none() {
        assert!(Instant::now() < deadline);
        settle(|| restoring.drive(), || restoring.wait(Some(Duration::ZERO)));
        guest.wait(Some(Duration::from_millis(1))).unwrap();
        guest.drive().unwrap();
    }
    let events = restoring.take_events();
    let [HostEvent::Refused { reason: ConnectionError::Resume(reason) }] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!(*reason, ResumeError::Epoch { saved: 1, claimed: 2 });
    let lost = guest.lost().unwrap();
    assert!(matches!(*lost, ConnectionError::Refused { reason: Reason::Stale, .. }), "{lost}");
    drop(state);
}

/// Held and saved, and saved again, and killed: both states are of the same moment.
#[test]
fn two_saves_of_one_hold_are_the_same() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    let held = host.hold().unwrap();
    let states = [save(&held), save(&held)];
    assert_eq!(states[0], states[1]);
    held.move_away();
    drop(host);
    let restoring = place.restoring(&states[0]);
    until(&restoring, &guest, back);
}

/// Until the next host has gone on with it, a state can be tried again; after that, not once more.
#[test]
fn a_state_is_used_once() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    let state = save_and_kill(&host);
    drop(host);
    for _ in 0..3 {
        let restoring = place.restoring(&state);
        until(&restoring, &guest, back);
        // Dropped: it has failed for a reason of its own.
    }
    let restoring = place.restoring(&state);
    until(&restoring, &guest, back);
    let refused = |_: &HostBus| Err(FinishError::NoGuest);
    assert!(restoring.finish_with(refused).is_err());
    let restoring = place.restoring(&state);
    until(&restoring, &guest, back);
    let host = finish(restoring);
    let _newer = save_and_kill(&host);
    drop(host);
    let restoring = place.restoring(&state);
    until(&restoring, &guest, |_, guest| guest.lost().is_some());
    let lost = guest.lost().unwrap();
    assert!(matches!(*lost, ConnectionError::Refused { reason: Reason::Stale, .. }), "{lost}");
}

#[test]
fn a_fresh_host_does_not_go_on_with_anything() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    let _state = save_and_kill(&host);
    drop(host);
    let host = place.host();
    let deadline = Instant::now() + PATIENCE;
    while guest.lost().is_none() {
        assert!(Instant::now() < deadline);
        settle_host(&host);
        guest.wait(Some(Duration::from_millis(1))).unwrap();
        guest.drive().unwrap();
    }
    let lost = guest.lost().unwrap();
    assert!(
        matches!(*lost, ConnectionError::Refused { reason: Reason::CannotResume, .. }),
        "{lost}"
    );
    let events = guest.take_events();
    assert!(matches!(events.last(), Some(GuestEvent::Bus(_))), "{events:?}");
    assert!(events.iter().any(|event| matches!(event, GuestEvent::Over(_))), "{events:?}");
    let next = place.guest(&host, None);
    until_connected(&host, &next);
}

/// Another guest, and one that is new, are turned away with a reason; the right one is awaited still.
#[test]
fn who_is_not_the_guest_does_not_spoil_the_waiting() {
    let (place, other_place) = (Place::new(), Place::new());
    let (host, other_host) = (place.host(), other_place.host());
    let guest = place.guest(&host, Some(PATIENCE));
    let other = other_place.guest(&other_host, Some(PATIENCE));
    let state = save_and_kill(&host);
    let _other_state = save_and_kill(&other_host);
    drop((host, other_host));
    let restoring = place.restoring(&state);
    std::os::unix::fs::symlink(&place.path, &other_place.path).unwrap();
    until(&restoring, &other, |_, other| other.lost().is_some());
    let lost = other.lost().unwrap();
    let refused = matches!(*lost, ConnectionError::Refused { reason: Reason::OtherGuest, .. });
    assert!(refused, "{lost}");
    let fresh = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| UnixGuest::connect(&place.path, 1 << 20));
        while !connecting.is_finished() {
            restoring.wait(Some(Duration::from_millis(1))).unwrap();
            restoring.drive().unwrap();
        }
        connecting.join().unwrap()
    });
    let error = fresh.unwrap_err().to_string();
    assert!(error.contains("waits for the guest of its saved state"), "{error}");
    until(&restoring, &guest, back);
    let _host = finish(restoring);
}

#[test]
fn a_guest_that_finds_no_host_in_time_gives_up() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(Duration::from_millis(30)));
    let _state = save_and_kill(&host);
    drop(host);
    assert!(!guest.drive_until(PATIENCE, is_connected).unwrap());
    let lost = guest.lost().unwrap();
    assert!(matches!(*lost, ConnectionError::NobodyResumes { milliseconds: 30 }), "{lost}");
    assert!(matches!(guest.bus().state(), ConnectionState::Lost(_)));
}

#[test]
fn a_guest_that_does_not_outlive_its_host_cannot_be_saved() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, None);
    assert!(!guest.is_resumable());
    let held = host.hold().unwrap();
    let error = held.save(&SaveOptions::default()).unwrap_err();
    assert!(matches!(error, TransportSaveError::GuestCannotResume { .. }), "{error}");
    drop(held);
    until_connected(&host, &guest);
    drop(host);
    settle_guest(&guest);
    assert!(matches!(guest.lost().as_deref(), Some(ConnectionError::Closed)));
}

/// A host that ends says so: nobody waits for another one.
#[test]
fn a_host_that_ends_is_not_waited_for() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    until_connected(&host, &guest);
    drop(host);
    settle_guest(&guest);
    let lost = guest.lost().unwrap();
    assert!(matches!(*lost, ConnectionError::Refused { reason: Reason::Ended, .. }), "{lost}");
}

#[test]
fn a_host_without_a_guest_is_restored_without_one() {
    let place = Place::new();
    let host = place.host();
    let state = save_and_kill(&host);
    drop(host);
    let restoring = place.restoring(&state);
    assert!(restoring.guest_is_back());
    let host = finish(restoring);
    let guest = place.guest(&host, Some(PATIENCE));
    until_connected(&host, &guest);
}

/// The guest's process dies while its host is away, or after it came back: the state waits on.
#[test]
fn a_guest_that_is_gone_again_is_awaited_again() {
    let place = Place::new();
    let host = place.host();
    let guest = place.guest(&host, Some(PATIENCE));
    let state = save_and_kill(&host);
    drop(host);
    let restoring = place.restoring(&state);
    until(&restoring, &guest, back);
    drop(guest);
    let deadline = Instant::now() + PATIENCE;
    while restoring.guest_is_back() {
        assert!(Instant::now() < deadline);
        restoring.drive().unwrap();
    }
    let refused = restoring.finish_with(|_| Ok(())).unwrap_err();
    assert!(matches!(refused.why, FinishError::NoGuest));
    assert!(!refused.restoring.guest_is_back());
}
