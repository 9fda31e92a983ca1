//! What the services say to guests of every age, and what they make of the answers.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use vsp_integration::wire::{
    HeartbeatBody, MAX_MESSAGE_BYTES, OldTimeBody, ShutdownBody, TimeBody,
};
use vsp_integration::{
    ApplicationState, Event, HeartbeatStatus, IcStatus, MAX_REASON_BYTES, Phase, Service,
    ShutdownAnswer, ShutdownError, ShutdownKind, ShutdownRequest, Version, Versions,
};
use zerocopy::{FromBytes, IntoBytes};

use common::{Guest, Linux, NOW, SECOND, V1, V3, World, split};

const POWER_OFF: ShutdownRequest = ShutdownRequest { kind: ShutdownKind::PowerOff, force: false };

fn ended(request: ShutdownRequest, answer: ShutdownAnswer) -> Event {
    Event::ShutdownEnded { request, answer }
}

#[test]
fn every_version_that_a_guest_may_know_is_agreed_on_and_spoken() {
    for service in Service::ALL {
        for &framework in Service::FRAMEWORKS {
            for &message in service.versions() {
                let row = format!("{service} {message} framework {framework}");
                let mut world = World::empty();
                // Newer ones that nobody offers, first.
                let newer = Version::new(9, 0);
                let linux = Linux::knowing(&[newer, framework], &[newer, message]);
                world.open(service, Some(linux));
                world.settle();
                let versions = Versions { framework, message };
                assert_eq!(world.services().phase(service), Phase::Agreed(versions), "{row}");
                assert_eq!(world.events.take(), [Event::Agreed { service, versions }], "{row}");
                let (offer, _) = split(&world.guest(service).take_read()[0]);
                assert_eq!((offer.message_type.get(), offer.status.get()), (0, 0), "{row}");

                match service {
                    Service::Shutdown => {
                        world.services().request_shutdown(POWER_OFF, "").unwrap();
                    }
                    Service::Heartbeat | Service::TimeSync => world.pass(1),
                }
                world.settle();
                let read = world.guest(service).take_read();
                let [request] = &read[..] else { panic!("{row}: {} requests", read.len()) };
                let (header, body) = split(request);
                assert_eq!((header.framework, header.message), (framework, message), "{row}");
                assert_eq!(header.message_type.get(), service.message_type().0, "{row}");
                assert_eq!(header.transaction_id, offer.transaction_id + 1, "{row}");
                let bytes = match (service, message.to_u32() >> 16) {
                    (Service::Heartbeat, _) => size_of::<HeartbeatBody>(),
                    (Service::Shutdown, _) => size_of::<ShutdownBody>(),
                    (Service::TimeSync, 4) => size_of::<TimeBody>(),
                    (Service::TimeSync, _) => size_of::<OldTimeBody>(),
                };
                assert_eq!(body.len(), bytes, "{row}");
            }
        }
    }
}

#[test]
fn a_guest_that_knows_all_gets_the_newest() {
    let world = World::new();
    for (service, message) in [
        (Service::Heartbeat, V3),
        (Service::Shutdown, Version::new(3, 2)),
        (Service::TimeSync, Version::new(4, 0)),
    ] {
        let versions = Versions { framework: V3, message };
        assert_eq!(world.services().phase(service), Phase::Agreed(versions), "{service}");
    }
}

#[test]
fn a_guest_that_knows_none_is_left_alone_until_it_comes_again() {
    for service in Service::ALL {
        for (frameworks, messages) in
            [(&[][..], &[V1, V3][..]), (&[V3], &[]), (&[Version::new(2, 0)], &[V3])]
        {
            let mut world = World::empty();
            world.open(service, Some(Linux::knowing(frameworks, messages)));
            world.settle();
            assert_eq!(world.services().phase(service), Phase::Refused, "{service}");
            assert_eq!(world.events.take(), [Event::Refused { service }]);
            world.forget();
            world.live(20);
            assert_eq!(world.guest(service).take_read(), [[0; 0]; 0], "{service}");
            let refused = world.services().request_shutdown(POWER_OFF, "");
            assert!(matches!(refused, Err(ShutdownError::NotReady { .. })), "{service}");

            world.guests.clear();
            world.settle();
            assert_eq!(world.services().phase(service), Phase::Closed, "{service}");
            world.open(service, Some(Linux::new(service)));
            world.settle();
            assert!(matches!(world.services().phase(service), Phase::Agreed(_)), "{service}");
        }
    }
}

#[test]
fn a_heart_beats_every_two_seconds() {
    let mut world = World::new();
    world.live(20);
    let read = world.guest(Service::Heartbeat).take_read();
    let sequences: Vec<u64> = read
        .iter()
        .map(|beat| HeartbeatBody::ref_from_bytes(split(beat).1).unwrap().sequence.get())
        .collect();
    assert_eq!(sequences, (1..=10).collect::<Vec<_>>());
    let status = world.services().heartbeat();
    assert_eq!((status.sent, status.answered, status.missed), (10, 10, 0));
    assert_eq!(status.applications, ApplicationState::Unknown);

    for (raw, applications) in [
        (1, ApplicationState::Healthy),
        (2, ApplicationState::Critical),
        (77, ApplicationState::Other(77)),
        (0, ApplicationState::Unknown),
    ] {
        world.guest(Service::Heartbeat).linux.as_mut().unwrap().applications = raw;
        world.live(2);
        assert_eq!(world.services().heartbeat().applications, applications);
    }
}

#[test]
fn a_heart_that_has_stopped_is_noticed_and_not_flooded() {
    let mut world = World::new();
    world.live(3); // at 1 and 3
    let linux = world.guest(Service::Heartbeat).linux.take();
    world.live(10); // at 5; at 7, 9, 11 and 13 there is no answer
    let stopped = world.services().heartbeat();
    let counts = |status: HeartbeatStatus| {
        (status.sent, status.answered, status.missed, status.missed_in_a_row)
    };
    assert_eq!(counts(stopped), (3, 2, 4, 4));
    let read = world.guest(Service::Heartbeat).take_read();
    assert_eq!(read.len(), 3, "one is open, and there is no other");

    // It answers after all, late as that is.
    let linux = linux.unwrap();
    let answer = linux.answer(Service::Heartbeat, &read[2]);
    let guest = world.guest(Service::Heartbeat);
    guest.say(&answer);
    guest.linux = Some(linux);
    world.live(2);
    assert_eq!(counts(world.services().heartbeat()), (4, 4, 4, 0));
}

#[test]
fn each_shutdown_is_asked_for_in_the_versions_that_have_it() {
    for kind in [ShutdownKind::PowerOff, ShutdownKind::Reboot, ShutdownKind::Hibernate] {
        for force in [false, true] {
            for &version in Service::Shutdown.versions() {
                let row = format!("{kind} force={force} {version}");
                let mut world = World::empty();
                let linux = Linux::knowing(&[V3], &[version]);
                world.open(Service::Shutdown, Some(linux));
                world.settle();
                world.forget();
                let request = ShutdownRequest { kind, force };
                let asked = world.services().request_shutdown(request, "na\u{ef}ve");
                world.settle();
                let read = world.guest(Service::Shutdown).take_read();
                let has_it = match kind {
                    ShutdownKind::PowerOff => true,
                    ShutdownKind::Reboot => version.minor.get() >= 1,
                    ShutdownKind::Hibernate => version.minor.get() >= 2,
                };
                if !has_it {
                    assert_eq!(asked, Err(ShutdownError::Unsupported { kind, version }), "{row}");
                    assert_eq!(read.len(), 0, "{row}");
                    continue;
                }
                asked.unwrap();
                let [message] = &read[..] else { panic!("{row}: {} messages", read.len()) };
                let body = ShutdownBody::ref_from_bytes(split(message).1).unwrap();
                let flags = match kind {
                    ShutdownKind::PowerOff => 0,
                    ShutdownKind::Reboot => 2,
                    ShutdownKind::Hibernate => 4,
                };
                assert_eq!(body.flags.get(), flags | u32::from(force), "{row}");
                assert_eq!((body.reason.get(), body.timeout_seconds.get()), (0x8000_0000, 0));
                let mut text = [0; 2048];
                text[..6].copy_from_slice("na\u{ef}ve".as_bytes());
                assert_eq!(body.text, text, "{row}");
                assert_eq!(world.events.take(), [ended(request, ShutdownAnswer::Accepted)]);
            }
        }
    }
}

#[test]
fn a_shutdown_ends_once_whatever_the_guest_does() {
    type Deed = fn(&mut World, &[u8]);
    let answer = |request: &[u8], status| {
        let linux = Linux { status, ..Linux::new(Service::Shutdown) };
        linux.answer(Service::Shutdown, request)
    };
    // What the guest says.
    for (what, status, expected) in [
        ("accepts", 0, ShutdownAnswer::Accepted),
        ("accepts in other words", 1, ShutdownAnswer::Accepted),
        ("refuses", 0x8000_4005, ShutdownAnswer::Refused(IcStatus::FAIL)),
        ("does not know", 0x8007_0032, ShutdownAnswer::Refused(IcStatus::UNSUPPORTED)),
    ] {
        let mut world = World::new();
        world.guest(Service::Shutdown).linux = None;
        world.services().request_shutdown(POWER_OFF, "").unwrap();
        world.settle();
        assert_eq!(world.services().shutdown_asked(), Some(POWER_OFF), "{what}");
        let again = world.services().request_shutdown(POWER_OFF, "");
        assert_eq!(again, Err(ShutdownError::Busy { asked: POWER_OFF }), "{what}");
        let request = world.guest(Service::Shutdown).take_read().remove(0);
        for _ in 0..3 {
            world.guest(Service::Shutdown).say(&answer(&request, status));
        }
        world.settle();
        assert_eq!(world.events.take(), [ended(POWER_OFF, expected)], "{what}: thrice said");
        assert_eq!(world.services().shutdown_asked(), None, "{what}");
        // It may be asked again.
        world.services().request_shutdown(POWER_OFF, "").unwrap();
    }
    // What else it does.
    for (what, deed, expected) in [
        ("closes", (|world, _| world.guests.clear()) as Deed, ShutdownAnswer::Closed),
        ("hangs", |world, _| world.live(62), ShutdownAnswer::Silent),
    ] {
        let mut world = World::new();
        world.guest(Service::Shutdown).linux = None;
        world.services().request_shutdown(POWER_OFF, "").unwrap();
        world.settle();
        let request = world.guest(Service::Shutdown).take_read().remove(0);
        world.live(59);
        assert_eq!(world.events.take(), [], "{what}");
        deed(&mut world, &request);
        world.settle();
        assert_eq!(world.events.take(), [ended(POWER_OFF, expected)], "{what}");
        if expected == ShutdownAnswer::Silent {
            // What comes now is not taken for the answer to the next one.
            world.services().request_shutdown(POWER_OFF, "").unwrap();
            world.guest(Service::Shutdown).say(&answer(&request, 0x8000_4005));
            world.settle();
            assert_eq!(world.events.take(), [], "{what}");
            let request = world.guest(Service::Shutdown).take_read().remove(0);
            world.guest(Service::Shutdown).say(&answer(&request, 0));
            world.settle();
            assert_eq!(world.events.take(), [ended(POWER_OFF, ShutdownAnswer::Accepted)]);
        }
    }
}

#[test]
fn a_reason_fits_or_is_refused_by_its_length() {
    let mut world = World::new();
    let bytes = MAX_REASON_BYTES + 1;
    let refused = world.services().request_shutdown(POWER_OFF, &"x".repeat(bytes));
    assert_eq!(refused, Err(ShutdownError::ReasonTooLong { bytes }));
    let refused = world.services().request_shutdown(POWER_OFF, &"x".repeat(1 << 20));
    assert_eq!(refused, Err(ShutdownError::ReasonTooLong { bytes: 1 << 20 }));
    world.settle();
    assert_eq!(world.guest(Service::Shutdown).take_read().len(), 0);

    let longest = "x".repeat(MAX_REASON_BYTES);
    world.services().request_shutdown(POWER_OFF, &longest).unwrap();
    world.settle();
    let message = world.guest(Service::Shutdown).take_read().remove(0);
    let body = ShutdownBody::ref_from_bytes(split(&message).1).unwrap();
    assert_eq!((&body.text[..2047], body.text[2047]), (longest.as_bytes(), 0));
}

/// Linux has 4096 bytes for a packet, and drops the answer where the length differs from 2088 behind the
/// descriptor; its ring has three pages of data.
#[test]
fn a_shutdown_fits_the_buffers_and_the_ring_of_a_guest() {
    for pages in [1, 3] {
        let mut world = World::empty();
        let linux = Some(Linux::new(Service::Shutdown));
        world.guests.push(Guest::open_with(&world.bus, Service::Shutdown, linux, pages));
        world.settle();
        world.forget();
        shut_down_often(&mut world);
    }
}

fn shut_down_often(world: &mut World) {
    world.guest(Service::Shutdown).linux = None;
    for _ in 0..100 {
        // Neither end is ever full: the ring wraps many times.
        world.services().request_shutdown(POWER_OFF, "again").unwrap();
        world.settle();
        let request = world.guest(Service::Shutdown).take_read().remove(0);
        assert_eq!(request.len(), 20 + 2060);
        assert_eq!(request.len(), MAX_MESSAGE_BYTES);
        assert!(16 + 8 + request.len() <= 4096);
        let answer = Linux::new(Service::Shutdown).answer(Service::Shutdown, &request);
        world.guest(Service::Shutdown).say(&answer);
        world.settle();
        assert_eq!(world.events.take(), [ended(POWER_OFF, ShutdownAnswer::Accepted)]);
    }
}

fn time(message: &[u8]) -> (u64, u64, u8) {
    let (header, body) = split(message);
    if header.message.major.get() == 4 {
        let body = TimeBody::ref_from_bytes(body).unwrap();
        (body.parent_time.get(), body.reference_time.get(), body.flags)
    } else {
        let body = OldTimeBody::ref_from_bytes(body).unwrap();
        assert_eq!((body.child_time.get(), body.round_trip.get()), (0, 0));
        (body.parent_time.get(), 0, body.flags)
    }
}

#[test]
fn a_guest_sets_its_clock_once_and_then_gets_samples() {
    const SYNC: u8 = TimeBody::FLAG_SYNC;
    const SAMPLE: u8 = TimeBody::FLAG_SAMPLE;
    for &version in Service::TimeSync.versions() {
        let mut world = World::empty();
        world.open(Service::TimeSync, Some(Linux::knowing(&[V3], &[version])));
        world.settle();
        world.forget();
        world.live(12);
        let reference =
            |second: u64| if version == Version::new(4, 0) { (100 + second) * SECOND } else { 0 };
        let at = |second: u64, flags| (NOW.0 + second * SECOND, reference(second), flags);
        let times = |world: &mut World| -> Vec<_> {
            world.guest(Service::TimeSync).take_read().iter().map(|it| time(it)).collect()
        };
        assert_eq!(times(&mut world), [at(1, SYNC), at(6, SAMPLE), at(11, SAMPLE)], "{version}");

        // The host's clock is set: nothing is due for that.
        world.clocks.now.0 -= 3600 * SECOND;
        world.live(3);
        assert_eq!(times(&mut world), []);
        world.clocks.now.0 += 3600 * SECOND;
        // The guest stood still.
        world.services().resync();
        world.live(6); // at 16; the next sample is 5 s after it
        assert_eq!(times(&mut world), [at(16, SYNC), at(21, SAMPLE)], "{version}");

        // It opens the channel anew.
        world.guests.clear();
        world.settle();
        world.open(Service::TimeSync, Some(Linux::knowing(&[V3], &[version])));
        world.settle();
        world.forget();
        world.live(1);
        assert_eq!(times(&mut world), [at(22, SYNC)], "{version}");
    }
}

#[test]
fn a_guest_that_does_not_answer_is_told_no_more_than_it_has_to_know() {
    let mut world = World::new();
    world.guest(Service::TimeSync).linux = None;
    world.live(60);
    assert_eq!(world.guest(Service::TimeSync).take_read().len(), 1);
    world.services().resync();
    world.live(60);
    let read = world.guest(Service::TimeSync).take_read();
    assert_eq!(read.iter().map(|it| time(it).2).collect::<Vec<_>>(), [TimeBody::FLAG_SYNC]);
}

#[test]
fn a_reference_time_that_goes_back_is_a_new_one() {
    let mut world = World::new();
    world.live(1);
    world.forget();
    world.clocks.reference_time = 0;
    world.pass(0);
    world.settle();
    for service in [Service::Heartbeat, Service::TimeSync] {
        assert_eq!(world.guest(service).take_read().len(), 1, "{service}");
    }
}

#[test]
fn a_guest_that_reads_nothing_has_one_message_of_each_waiting() {
    let mut world = World::new();
    world.live(1);
    for second in 0..1000 {
        // Restored again and again, as it seems, and never read.
        world.pass(1);
        world.services().resync();
        let _ = world.services().request_shutdown(POWER_OFF, "");
        for service in Service::ALL {
            let (queued, _) = world.services().channel(service).unwrap().outgoing_in_use();
            assert!(queued <= 1, "{service} after {second} s: {queued}");
        }
    }
    world.settle();
    world.live(10);
    assert_eq!(world.services().heartbeat().missed_in_a_row, 0);
}

#[test]
fn services_are_withdrawn() {
    let mut world = World::new();
    world.services.take().unwrap().close();
    world.guest_turn();
    for guest in &world.guests {
        assert_ne!(guest.channel.state(), kmcl::ChannelState::Active, "{}", guest.service);
    }
    assert_eq!(world.events.take(), []);
    // Offered anew, on the same bus.
    world.guests.clear();
    let services = vsp_integration::IntegrationServices::new(
        world.bus.clone(),
        world.driver.clone(),
        world.events.clone(),
        vsp_integration::IntegrationConfig::default(),
    )
    .unwrap();
    services.offer().unwrap();
    assert!(services.offer().is_err(), "twice");
    world.services = Some(services);
    for service in Service::ALL {
        world.open(service, Some(Linux::new(service)));
    }
    world.settle();
    world.live(2);
    assert_eq!(world.services().heartbeat().answered, 1);
}

#[test]
fn a_version_is_spelled_and_counted() {
    let version = Version::from_u32(0x0003_0002);
    assert_eq!((version, version.to_string()), (Version::new(3, 2), "3.2".to_owned()));
    assert_eq!(version.as_bytes(), [3, 0, 2, 0]);
    assert_eq!(version.to_u32(), 0x0003_0002);
}
