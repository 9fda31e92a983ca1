//! Services saved in the middle of anything, and going on here or elsewhere.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use vsp_integration::wire::TimeBody;
use vsp_integration::{
    Event, IcStatus, IntegrationError, Phase, Service, ShutdownAnswer, ShutdownError, ShutdownKind,
    ShutdownRequest,
};
use zerocopy::FromBytes;

use common::{Linux, NOW, SECOND, V1, V3, World, save, split};

const REBOOT: ShutdownRequest = ShutdownRequest { kind: ShutdownKind::Reboot, force: true };

/// What ends a freeze.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Thaw,
    /// Saved, and given up.
    SaveAndThaw,
    Move,
    /// To another host, and on to the next one before anything was said.
    MoveTwice,
}

impl End {
    const ALL: [Self; 4] = [Self::Thaw, Self::SaveAndThaw, Self::Move, Self::MoveTwice];

    fn apply(self, world: &mut World) {
        match self {
            Self::Thaw => world.services().freeze().unwrap().thaw(),
            Self::SaveAndThaw => {
                let frozen = world.services().freeze().unwrap();
                let first = save(&frozen);
                assert!(first == save(&frozen), "the state alone decides the bytes");
                frozen.thaw();
            }
            Self::Move => drop(world.move_away()),
            Self::MoveTwice => {
                world.move_away();
                world.move_away();
            }
        }
    }
}

/// Where things stand.
struct Row {
    name: &'static str,
    make: fn() -> World,
    /// How the shutdown ends that was asked for.
    shutdown: Option<ShutdownAnswer>,
}

/// A guest that has everything open and does not answer.
fn mute() -> World {
    let mut world = World::new();
    for guest in &mut world.guests {
        guest.linux = None;
    }
    world
}

/// Everything is asked for, and not read.
fn asked() -> World {
    let world = World::new();
    world.services().tick(world.clocks);
    world.services().request_shutdown(REBOOT, "moving").unwrap();
    world
}

/// Everything is asked for, and answered; the host has not looked.
fn answered(status: u32) -> World {
    let mut world = asked();
    world.guest(Service::Shutdown).linux.as_mut().unwrap().status = status;
    assert!(world.guest_turn());
    world
}

fn opened(linux: fn(Service) -> Linux) -> World {
    let mut world = World::empty();
    for service in Service::ALL {
        world.open(service, Some(linux(service)));
    }
    world
}

const ROWS: &[Row] = &[
    Row { name: "no guest", make: World::empty, shutdown: None },
    Row { name: "being opened", make: || opened(Linux::new), shutdown: None },
    Row {
        name: "versions offered",
        make: || {
            let world = opened(Linux::new);
            world.host_turn();
            world
        },
        shutdown: None,
    },
    Row {
        name: "versions chosen",
        make: || {
            let mut world = opened(Linux::new);
            world.host_turn();
            while !world.guest_turn() {
                world.host_turn(); // the guest has to learn that its channels are open
            }
            world
        },
        shutdown: None,
    },
    Row {
        name: "refused",
        make: || {
            let mut world = opened(|_| Linux::knowing(&[], &[]));
            world.settle();
            world
        },
        shutdown: None,
    },
    Row {
        name: "old versions",
        make: || {
            let mut world = opened(|_| Linux::knowing(&[V1], &[V1]));
            world.settle();
            world
        },
        shutdown: None,
    },
    Row { name: "idle", make: World::new, shutdown: None },
    Row {
        name: "at work for long",
        make: || {
            let mut world = World::new();
            world.live(600); // transaction ids have come round
            world
        },
        shutdown: None,
    },
    Row { name: "asked", make: asked, shutdown: Some(ShutdownAnswer::Accepted) },
    Row { name: "accepted", make: || answered(0), shutdown: Some(ShutdownAnswer::Accepted) },
    Row {
        name: "not accepted",
        make: || answered(IcStatus::FAIL.0),
        shutdown: Some(ShutdownAnswer::Refused(IcStatus::FAIL)),
    },
    Row {
        name: "read and never answered",
        make: || {
            let mut world = mute();
            world.services().tick(world.clocks);
            world.services().request_shutdown(REBOOT, "moving").unwrap();
            world.settle();
            world
        },
        shutdown: Some(ShutdownAnswer::Silent),
    },
    Row {
        name: "rings full",
        make: || {
            let mut world = World::new();
            let is_full = |world: &World, service| {
                world.services().channel(service).unwrap().outgoing_in_use().0 == 1
            };
            for _ in 0..10_000 {
                world.pass(5);
                world.services().resync();
                let _ = world.services().request_shutdown(REBOOT, "again");
            }
            assert!(is_full(&world, Service::TimeSync) && is_full(&world, Service::Shutdown));
            let refused = world.services().request_shutdown(REBOOT, "");
            assert!(matches!(refused, Err(ShutdownError::Unread | ShutdownError::Busy { .. })));
            world.events.take();
            world
        },
        // All but the last: that is the one in the queue.
        shutdown: None,
    },
    Row {
        name: "closing",
        make: || {
            let mut world = asked();
            world.guests.clear();
            world
        },
        shutdown: Some(ShutdownAnswer::Closed),
    },
];

/// The transaction ids of all that guests have read: each once, in order.
fn check_ids(world: &mut World, row: &str) {
    for guest in &mut world.guests {
        let ids: Vec<u8> = guest.read.iter().map(|it| split(it).0.transaction_id).collect();
        for pair in ids.windows(2) {
            assert_eq!(pair[1], pair[0].wrapping_add(1), "{row}: {} {ids:?}", guest.service);
        }
    }
}

#[test]
fn services_go_on_from_wherever_they_were() {
    for row in ROWS {
        let outcome = |end: Option<End>| {
            let name = format!("{}: {end:?}", row.name);
            let mut world = (row.make)();
            if let Some(end) = end {
                end.apply(&mut world);
            }
            world.settle();
            world.live(70);
            check_ids(&mut world, &name);
            let ended: Vec<Event> = world.events.take_others();
            let phases = Service::ALL.map(|service| world.services().phase(service));
            (ended, phases, world)
        };
        let (ended, phases, _) = outcome(None);
        if let Some(answer) = row.shutdown {
            assert_eq!(ended, [Event::ShutdownEnded { request: REBOOT, answer }], "{}", row.name);
        }
        for end in End::ALL {
            let (ended_then, phases_then, mut world) = outcome(Some(end));
            let name = format!("{}: {end:?}", row.name);
            assert_eq!((&ended_then, phases_then), (&ended, phases), "{name}");
            // All goes on.
            let alive = world.guests.iter().any(|guest| guest.linux.is_some());
            if alive && matches!(phases[0], Phase::Agreed(_)) {
                let before = world.services().heartbeat().answered;
                world.live(2);
                assert_eq!(world.services().heartbeat().answered, before + 1, "{name}");
            }
            // Whoever comes now is served.
            world.guests.clear();
            world.settle();
            for service in Service::ALL {
                world.open(service, Some(Linux::new(service)));
            }
            world.settle();
            for service in Service::ALL {
                let phase = world.services().phase(service);
                assert!(matches!(phase, Phase::Agreed(_)), "{name}: {service} {phase}");
            }
        }
    }
}

#[test]
fn a_restored_guest_is_told_the_time_at_once() {
    // Whatever was open: nothing, a sample that was read, one that was not.
    for (what, make) in [
        ("nothing", World::new as fn() -> World),
        ("a sample, read", || {
            let mut world = mute();
            world.live(10);
            world
        }),
        ("a sample, not read", asked),
    ] {
        for end in End::ALL {
            let mut world = make();
            let before = world.clocks;
            end.apply(&mut world);
            world.guest_turn();
            world.forget();
            world.services().tick(world.clocks);
            world.guest_turn();
            let read = world.guest(Service::TimeSync).take_read();
            let row = format!("{what}: {end:?}: {} messages", read.len());
            assert_eq!(read.len(), 1, "{row}");
            let body = TimeBody::ref_from_bytes(split(&read[0]).1).unwrap();
            assert_eq!(body.flags, TimeBody::FLAG_SYNC, "{row}");
            assert_eq!(body.reference_time.get(), before.reference_time, "{row}");
            let behind = match end {
                End::Thaw | End::SaveAndThaw => 0,
                End::Move => 3600 * SECOND,
                End::MoveTwice => 2 * 3600 * SECOND,
            };
            assert_eq!(body.parent_time.get(), before.now.0 + behind, "{row}");
            assert!(body.parent_time.get() >= NOW.0, "{row}");
        }
    }
}

#[test]
fn a_tick_may_come_before_the_rings() {
    let mut world = asked();
    let frozen = world.services().freeze().unwrap();
    let streams = save(&frozen);
    frozen.move_away();
    world.restore_without_rings(&streams);
    assert_eq!(world.services().phase(Service::TimeSync), Phase::Closed);
    let refused = world.services().request_shutdown(REBOOT, "");
    assert_eq!(refused, Err(ShutdownError::NotReady { phase: Phase::Closed }));
    world.services().tick(world.clocks);
    world.guest_turn();
    world.forget();
    world.host_turn();
    world.guest_turn();
    let read = world.guest(Service::TimeSync).take_read();
    assert_eq!(read.len(), 1);
    let body = TimeBody::ref_from_bytes(split(&read[0]).1).unwrap();
    assert_eq!(body.flags, TimeBody::FLAG_SYNC);
    assert_eq!(body.parent_time.get(), world.clocks.now.0);
    assert_eq!(body.reference_time.get(), world.clocks.reference_time);
    // It is one, and there is no other.
    world.live(1);
    assert_eq!(world.guest(Service::TimeSync).take_read().len(), 0);
    world.live(5);
    assert_eq!(world.guest(Service::TimeSync).take_read().len(), 1);
}

#[test]
fn a_heartbeat_that_was_open_is_not_missed_for_the_move() {
    let mut world = asked();
    let before = world.services().heartbeat();
    world.move_away();
    // The guest's time goes on where it stood; it answers within its two seconds.
    world.services().tick(world.clocks);
    world.settle();
    let after = world.services().heartbeat();
    assert_eq!((after.sent, after.answered), (before.sent, before.answered + 1));
    assert_eq!((after.missed, after.missed_in_a_row), (0, 0));
    world.live(2);
    assert_eq!(world.services().heartbeat().answered, after.answered + 1);
}

#[test]
fn what_is_known_of_a_guest_moves_with_it() {
    let mut world = World::new();
    world.guest(Service::Heartbeat).linux.as_mut().unwrap().applications = 2;
    world.live(9);
    world.guest(Service::Heartbeat).linux = None;
    world.live(10);
    let before = (world.services().heartbeat(), Service::ALL.map(|it| world.services().phase(it)));
    assert!(before.0.missed > 0 && before.0.answered > 0);
    world.services().request_shutdown(REBOOT, "").unwrap();
    world.move_away();
    let after = (world.services().heartbeat(), Service::ALL.map(|it| world.services().phase(it)));
    assert_eq!(after, before);
    assert_eq!(world.services().shutdown_asked(), Some(REBOOT));
}

#[test]
fn frozen_services_do_nothing() {
    let mut world = World::new();
    let frozen = world.services().freeze().unwrap();
    assert!(matches!(world.services().freeze(), Err(IntegrationError::Held)));
    let refused = world.services().request_shutdown(REBOOT, "");
    assert_eq!(refused, Err(ShutdownError::Held));
    let before = save(&frozen);
    for _ in 0..100 {
        world.clocks.reference_time += 10 * SECOND;
        world.services().tick(world.clocks);
    }
    // A guest that talks is not heard.
    for guest in &world.guests {
        guest.say(&[0xff; 100]);
    }
    world.settle();
    assert!(save(&frozen)[0] == before[0], "something was done");
    assert!(frozen.wait(None));
    for guest in &mut world.guests {
        assert_eq!(guest.take_read().len(), 0, "{}", guest.service);
    }
    frozen.thaw();
    world.live(4);
    assert_eq!(world.services().heartbeat().missed, 0);
    assert!(world.services().heartbeat().answered > 0);
}

#[test]
fn services_that_were_not_offered_cannot_be_frozen() {
    let world = World::empty();
    let services = vsp_integration::IntegrationServices::new(
        kmcl::loopback::LoopbackBus::new(1 << 20).unwrap(),
        world.driver.clone(),
        world.events.clone(),
        vsp_integration::IntegrationConfig::default(),
    )
    .unwrap();
    for _ in 0..2 {
        let error = services.freeze().unwrap_err();
        assert!(matches!(error, IntegrationError::Channel { .. }), "{error}");
    }
    services.offer().unwrap();
    services.freeze().unwrap().thaw();
}

#[test]
fn a_close_of_frozen_services_leaves_nothing() {
    let mut world = asked();
    let frozen = world.services().freeze().unwrap();
    world.services.take().unwrap().close();
    drop(frozen);
    world.guests.clear();
    assert_eq!(world.bus.free_pages() * 4096, 4 << 20, "all pages came back");
}

#[test]
fn old_guests_move_too() {
    // An old guest cannot be asked for a reboot afterwards either.
    let mut world = opened(|_| Linux::knowing(&[V3], &[V3]));
    world.settle();
    world.move_away();
    let refused = world.services().request_shutdown(REBOOT, "");
    let expected = ShutdownError::Unsupported { kind: ShutdownKind::Reboot, version: V3 };
    assert_eq!(refused, Err(expected));
}
