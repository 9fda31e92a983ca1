//! A guest that says anything, of any length, at any rate; and saved states that anybody made up.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::sync::OnceLock;

use proptest::prelude::*;
use saved_state::integration::{
    HeartbeatRecord, IntegrationServiceRecord, KINDS, NegotiationStep, SavedService, SavedShutdown,
    ShutdownRequestRecord,
};
use saved_state::testing::{chunk_ranges, rechain};
use saved_state::writer::Step;
use saved_state::{FormatVersion, Record, StreamInfo, StreamKind, StreamReader, StreamWriter};
use vsp_integration::protocol::{Outcome, Protocol, Unexpected};
use vsp_integration::wire::{IcHeader, MAX_MESSAGE_BYTES, MessageType};
use vsp_integration::{
    Clocks, Event, FileTime, Phase, Service, ServicesRestoreError, ShutdownAnswer, ShutdownKind,
    ShutdownRequest, Version, Versions,
};
use zerocopy::FromBytes;

use common::{Linux, SECOND, V3, World, save};

const POWER_OFF: ShutdownRequest = ShutdownRequest { kind: ShutdownKind::PowerOff, force: false };

// ---- What a guest says ------------------------------------------------------------------------------

/// A protocol that has offered versions, and the right answer to that.
fn offered(service: Service) -> (Protocol, Vec<u8>) {
    let mut protocol = Protocol::default();
    let offer = protocol.opened(service).message.unwrap();
    let answer = Linux::new(service).answer(service, &offer);
    (protocol, answer)
}

/// One that has agreed on the newest.
fn agreed(service: Service) -> Protocol {
    let (mut protocol, answer) = offered(service);
    let outcome = protocol.received(service, &answer).unwrap();
    assert!(matches!(outcome.event, Some(Event::Agreed { .. })));
    protocol
}

fn edit(answer: &[u8], change: impl Fn(&mut IcHeader)) -> Vec<u8> {
    let mut answer = answer.to_vec();
    change(IcHeader::mut_from_prefix(&mut answer).unwrap().0);
    answer
}

fn patch(answer: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut answer = answer.to_vec();
    answer[at..at + bytes.len()].copy_from_slice(bytes);
    answer
}

#[test]
fn an_answer_that_is_none_to_an_offer_changes_nothing() {
    for service in Service::ALL {
        let (protocol, right) = offered(service);
        let id = right[16];
        let long = right.len();
        let never = Versions { framework: V3, message: Version::new(2, 0) };
        let neither = Versions { framework: Version::new(0, 3), message: V3 };
        let rows: Vec<(&str, Vec<u8>, Unexpected)> = vec![
            ("nothing", vec![], Unexpected::Short { len: 0, least: 20 }),
            ("half a header", right[..19].to_vec(), Unexpected::Short { len: 19, least: 20 }),
            ("a header alone", right[..20].to_vec(), Unexpected::Truncated { size: 16, len: 0 }),
            (
                "more than there is",
                edit(&right, |header| header.size.set(u16::MAX)),
                Unexpected::Truncated { size: u16::MAX, len: long - 20 },
            ),
            (
                "a request",
                edit(&right, |header| header.flags = 3),
                Unexpected::NoAnswer { flags: 3 },
            ),
            (
                "another's answer",
                edit(&right, |header| header.transaction_id = 99),
                Unexpected::Late { found: 99, expected: id },
            ),
            (
                "of the service's type",
                edit(&right, |header| header.message_type.set(service.message_type().0)),
                Unexpected::Type {
                    found: service.message_type(),
                    expected: MessageType::NEGOTIATE,
                },
            ),
            (
                "a short body",
                edit(&right, |header| header.size.set(15)),
                Unexpected::Body { len: 15, least: 16 },
            ),
            (
                "two versions",
                patch(&right, 20, &[2, 0, 1, 0]),
                Unexpected::Choice { frameworks: 2, messages: 1 },
            ),
            (
                "a version of the messages that was not offered",
                patch(&right, 32, &[2, 0, 0, 0]),
                Unexpected::Version { versions: never },
            ),
            (
                "a version of the framework that was not offered",
                patch(&right, 28, &[0, 0, 3, 0, 3, 0, 0, 0]),
                Unexpected::Version { versions: neither },
            ),
        ];
        for (what, bytes, expected) in rows {
            let row = format!("{service}: {what}");
            let mut protocol = protocol;
            let found = protocol.received(service, &bytes);
            assert_eq!(found, Err(expected), "{row}");
            assert_eq!(protocol.phase(service), Phase::Offered, "{row}");
            let outcome = protocol.received(service, &right).unwrap();
            assert!(matches!(outcome.event, Some(Event::Agreed { .. })), "{row}: {outcome:?}");
            // And once more.
            let again = protocol.received(service, &right);
            assert_eq!(again, Err(Unexpected::Unasked { transaction_id: id }), "{row}");
        }
    }
}

#[test]
fn an_answer_of_any_length_that_says_enough_is_one() {
    let (protocol, right) = offered(Service::Shutdown);
    let mut tight = right.clone();
    tight.truncate(36);
    let mut long = right.clone();
    long.resize(4000, 0xcc);
    let size = |bytes: &[u8]| u16::try_from(bytes.len() - 20).unwrap();
    for bytes in [tight, right, edit(&long, |header| header.size.set(size(&long))), long.clone()] {
        let mut protocol = protocol;
        let outcome = protocol.received(Service::Shutdown, &bytes).unwrap();
        assert!(matches!(outcome.event, Some(Event::Agreed { .. })), "{} bytes", bytes.len());
    }
}

#[test]
fn a_guest_refuses_in_several_ways() {
    for service in Service::ALL {
        let (protocol, right) = offered(service);
        for (what, bytes) in [
            ("no framework", patch(&right, 20, &[0, 0, 1, 0])),
            ("no message", patch(&right, 20, &[1, 0, 0, 0])),
            ("neither", patch(&right, 20, &[0, 0, 0, 0])),
            ("a status", edit(&right, |header| header.status.set(0x8000_4005))),
            (
                "a status, and no body",
                edit(&right[..20], |header| {
                    header.status.set(0x8000_4005);
                    header.size.set(0);
                }),
            ),
        ] {
            let mut protocol = protocol;
            let outcome = protocol.received(service, &bytes).unwrap();
            assert_eq!(outcome.event, Some(Event::Refused { service }), "{service}: {what}");
            assert_eq!(protocol.phase(service), Phase::Refused, "{service}: {what}");
        }
    }
}

#[test]
fn an_answer_to_a_request_may_be_short_and_counts() {
    for service in Service::ALL {
        let mut protocol = agreed(service);
        let clocks = Clocks { now: FileTime(0), reference_time: SECOND };
        let request = match service {
            Service::Shutdown => protocol.request_shutdown(POWER_OFF, "", true).unwrap(),
            _ => protocol.tick(service, clocks, true),
        };
        let request = request.message.unwrap();
        let answer = edit(&request[..20], |header| {
            header.flags = 5;
            header.size.set(0);
        });
        let found = protocol.received(service, &answer);
        match service {
            Service::Heartbeat => {
                assert_eq!(found, Err(Unexpected::Body { len: 0, least: 40 }));
                assert_eq!(protocol.heartbeat().answered, 1, "it lives all the same");
            }
            Service::Shutdown => {
                let (request, answer) = (POWER_OFF, ShutdownAnswer::Accepted);
                let event = Some(Event::ShutdownEnded { request, answer });
                assert_eq!(found, Ok(Outcome { message: None, event }));
            }
            Service::TimeSync => assert_eq!(found, Ok(Outcome::default())),
        }
    }
}

#[test]
fn a_flood_is_drained_and_forgotten() {
    let mut world = World::new();
    let long = vec![0xff; 4000];
    for round in 0..200 {
        for guest in &world.guests {
            for len in [0, 1, 19, 20, 21, 100, 4000] {
                guest.say(&long[..len]);
            }
        }
        world.settle();
        for service in Service::ALL {
            let channel = world.services().channel(service).unwrap();
            assert_eq!(channel.incoming_outstanding(), 0, "{service} in round {round}");
            assert_eq!(channel.outgoing_in_use(), (0, 0), "{service} in round {round}");
        }
    }
    assert_eq!(world.events.take(), []);
    world.live(2);
    assert_eq!(world.services().heartbeat().answered, 1);
}

#[test]
fn a_guest_that_opens_and_closes_all_the_time_is_offered_versions_each_time() {
    let mut world = World::empty();
    for round in 0..50 {
        for service in Service::ALL {
            world.open(service, Some(Linux::new(service)));
        }
        world.settle();
        world.live(1);
        for guest in &world.guests {
            let negotiations = guest.read.iter().filter(|message| message[4..6] == [0, 0]).count();
            assert_eq!(negotiations, 1, "{} in round {round}", guest.service);
        }
        world.guests.clear();
        world.settle();
    }
    let free = world.bus.free_pages();
    assert_eq!(free * 4096, 4 << 20, "all pages came back");
}

/// What happens to a protocol.
#[derive(Clone, Debug)]
enum Deed {
    Open(usize),
    Close(usize),
    /// Bytes of the guest's, at random.
    Say(usize, Vec<u8>),
    /// An answer to what was last said, with bytes changed.
    Answer(usize, Vec<(prop::sample::Index, u8)>),
    Tick(usize, u64, bool),
    Ask(ShutdownKind, bool),
    Resync,
}

fn deed() -> impl Strategy<Value = Deed> {
    let kind = prop_oneof![
        Just(ShutdownKind::PowerOff),
        Just(ShutdownKind::Reboot),
        Just(ShutdownKind::Hibernate)
    ];
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    prop_oneof![
        1 => (0..3_usize).prop_map(Deed::Open),
        1 => (0..3_usize).prop_map(Deed::Close),
        2 => (0..3_usize, prop::collection::vec(any::<u8>(), 0..64)).prop_map(|(at, it)| Deed::Say(at, it)),
        8 => (0..3_usize, edits).prop_map(|(at, edits)| Deed::Answer(at, edits)),
        6 => (0..3_usize, any::<u64>(), any::<bool>()).prop_map(|(at, time, can)| Deed::Tick(at, time, can)),
        2 => (kind, any::<bool>()).prop_map(|(kind, force)| Deed::Ask(kind, force)),
        1 => Just(Deed::Resync),
    ]
}

proptest! {
    /// Whatever comes, and whenever: no panic; every message is a request that a guest can take, of a
    /// service whose channel is open; each shutdown ends once.
    #[test]
    fn any_order_of_events_is_taken(deeds in prop::collection::vec(deed(), 1..200)) {
        let mut protocol = Protocol::default();
        let mut open = [false; 3];
        let mut last: [Vec<u8>; 3] = Default::default();
        let (mut asked, mut ended) = (0, 0);
        for deed in deeds {
            let (at, outcome) = match deed {
                Deed::Open(at) => {
                    open[at] = true;
                    (at, protocol.opened(Service::ALL[at]))
                }
                Deed::Close(at) => {
                    open[at] = false;
                    (at, protocol.closed(Service::ALL[at]))
                }
                Deed::Say(at, bytes) => {
                    (at, protocol.received(Service::ALL[at], &bytes).unwrap_or_default())
                }
                Deed::Answer(at, edits) => {
                    let mut answer = match last[at].is_empty() {
                        true => Vec::new(),
                        false => Linux::new(Service::ALL[at]).answer(Service::ALL[at], &last[at]),
                    };
                    for (index, value) in edits {
                        if !answer.is_empty() {
                            let index = index.index(answer.len().min(40));
                            answer[index] = value;
                        }
                    }
                    (at, protocol.received(Service::ALL[at], &answer).unwrap_or_default())
                }
                Deed::Tick(at, time, can_send) => {
                    let clocks = Clocks { now: FileTime(!time), reference_time: time };
                    (at, protocol.tick(Service::ALL[at], clocks, can_send))
                }
                Deed::Ask(kind, force) => {
                    let request = ShutdownRequest { kind, force };
                    let outcome = protocol.request_shutdown(request, "reason", true);
                    asked += usize::from(outcome.is_ok());
                    (Service::Shutdown.index(), outcome.unwrap_or_default())
                }
                Deed::Resync => {
                    protocol.resync();
                    continue;
                }
            };
            if let Some(message) = outcome.message {
                prop_assert!(open[at], "{} is closed", Service::ALL[at]);
                prop_assert!(message.len() <= MAX_MESSAGE_BYTES);
                let (header, body) = IcHeader::ref_from_prefix(&message).unwrap();
                prop_assert_eq!((header.flags, usize::from(header.size.get())), (3, body.len()));
                last[at] = message;
            }
            if let Some(Event::ShutdownEnded { .. }) = outcome.event {
                ended += 1;
            }
            prop_assert_eq!(asked - ended, usize::from(protocol.shutdown_asked().is_some()));
        }
    }
}

// ---- Saved states -----------------------------------------------------------------------------------

/// Everything is open, and a shutdown is asked for.
fn saved() -> &'static [Vec<u8>] {
    static STREAMS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    STREAMS.get_or_init(|| {
        let mut world = World::new();
        world.live(3);
        world.services().request_shutdown(POWER_OFF, "saved").unwrap();
        let frozen = world.services().freeze().unwrap();
        save(&frozen)
    })
}

fn refuse(stream: &[u8]) -> Option<ServicesRestoreError> {
    World::empty_bus().restoring(stream).err()
}

/// The records of a stream of the services.
#[derive(Clone)]
struct Records {
    services: Vec<IntegrationServiceRecord>,
    heartbeats: Vec<HeartbeatRecord>,
    shutdowns: Vec<ShutdownRequestRecord>,
}

fn records(stream: &[u8]) -> (StreamInfo, Records) {
    let mut reader = StreamReader::new(StreamKind::DEVICE, KINDS);
    let mut input = stream;
    let mut records =
        Records { services: Vec::new(), heartbeats: Vec::new(), shutdowns: Vec::new() };
    while let Some(chunk) = reader.read(&mut input).unwrap() {
        match chunk.kind() {
            kind if kind == IntegrationServiceRecord::KIND.kind => {
                records.services.push(chunk.decode().unwrap());
            }
            kind if kind == HeartbeatRecord::KIND.kind => {
                records.heartbeats.push(chunk.decode().unwrap());
            }
            _ => records.shutdowns.push(chunk.decode().unwrap()),
        }
    }
    (reader.header().unwrap().info, records)
}

fn stream(info: StreamInfo, records: &Records) -> Vec<u8> {
    let info = StreamInfo { chunks: 0, ..info };
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).unwrap();
    let mut out = Vec::new();
    let mut room = vec![0; 8192];
    let mut push = |step: Step, room: &[u8]| {
        let Step::Written { bytes } = step else { panic!("no room") };
        out.extend_from_slice(&room[..bytes]);
    };
    push(writer.header(&mut room).unwrap(), &room.clone());
    for record in &records.services {
        push(writer.record(record, &mut room).unwrap(), &room.clone());
    }
    for record in &records.heartbeats {
        push(writer.record(record, &mut room).unwrap(), &room.clone());
    }
    for record in &records.shutdowns {
        push(writer.record(record, &mut room).unwrap(), &room.clone());
    }
    push(writer.end(&mut room).unwrap(), &room.clone());
    out
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let (info, whole) = records(&saved()[0]);
    assert!(refuse(&stream(info, &whole)).is_none());
    let changed = |change: &dyn Fn(&mut Records)| {
        let mut records = whole.clone();
        change(&mut records);
        records
    };
    type Change<'a> = &'a dyn Fn(&mut Records);
    let rows: &[(&str, Change<'_>)] = &[
        ("not known", &|it| it.services[0].message_version = 0x0003_0001),
        ("not known", &|it| it.services[1].message_version = 0x0004_0000),
        ("not known", &|it| it.services[2].framework_version = 0),
        ("transaction_id", &|it| it.services[0].transaction_id = 256),
        ("framework_version", &|it| it.services[0].step = NegotiationStep::Offered.into()),
        ("message_version", &|it| {
            it.services[0].step = NegotiationStep::Closed.into();
            it.services[0].framework_version = 0;
        }),
        ("unanswered", &|it| {
            it.services[0].step = NegotiationStep::Refused.into();
            it.services[0].framework_version = 0;
            it.services[0].message_version = 0;
            it.services[0].unanswered = true;
        }),
        ("unanswered", &|it| it.services[1].unanswered = false),
        ("unanswered", &|it| it.shutdowns.clear()),
        ("out of order", &|it| it.shutdowns = vec![it.shutdowns[0].clone(); 2]),
        ("out of order", &|it| it.services.swap(0, 1)),
        ("out of order", &|it| it.services[1].service = SavedService::Heartbeat.into()),
        ("out of order", &|it| it.services.push(it.services[0].clone())),
        ("out of order", &|it| it.services.truncate(2)),
        ("out of order", &|it| it.services.clear()),
        ("out of order", &|it| it.heartbeats.clear()),
        ("out of order", &|it| it.heartbeats = vec![it.heartbeats[0].clone(); 2]),
        ("kind", &|it| {
            it.services[1].message_version = 0x0003_0001;
            it.shutdowns[0].kind = SavedShutdown::Hibernate.into();
        }),
        ("kind", &|it| {
            it.services[1].message_version = 0x0003_0000;
            it.shutdowns[0].kind = SavedShutdown::Reboot.into();
        }),
    ];
    for (row, (named, change)) in rows.iter().enumerate() {
        let records = changed(change);
        let error = refuse(&stream(info, &records));
        let error = error.unwrap_or_else(|| panic!("row {row} is not refused")).to_string();
        assert!(error.contains(named), "row {row}: {error}");
    }
}

#[test]
fn another_stream_is_not_the_services() {
    let streams = saved();
    assert!(matches!(refuse(&streams[1]), Some(ServicesRestoreError::Read(_))));
    assert!(refuse(&[]).is_some());
    let (info, whole) = records(&streams[0]);
    let other = StreamInfo { interface_type: Service::Shutdown.interface(), ..info };
    assert!(refuse(&stream(other, &whole)).is_some());
}

#[test]
fn every_cut_and_every_flipped_bit_is_refused() {
    let whole = &saved()[0];
    for len in 0..whole.len() {
        assert!(refuse(&whole[..len]).is_some(), "cut at {len}");
    }
    for at in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[at / 8] ^= 1 << (at % 8);
        assert!(refuse(&damaged).is_some(), "bit {at}");
    }
    let ranges = chunk_ranges(whole);
    for skip in 1..ranges.len() {
        let kept = ranges.iter().enumerate().filter(|(at, _)| *at != skip);
        let dropped: Vec<u8> = kept.flat_map(|(_, range)| whole[range.clone()].to_vec()).collect();
        assert!(refuse(&dropped).is_some(), "without chunk {skip}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever a stream with right checksums says: it is refused, or makes services that work for the
    /// next guest.
    #[test]
    fn any_state_with_right_checksums_is_refused_or_harmless(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut damaged = saved()[0].clone();
        for (at, value) in edits {
            let at = at.index(damaged.len());
            damaged[at] = value;
        }
        rechain(&mut damaged);
        let mut world = World::empty_bus();
        if world.restoring(&damaged).is_err() {
            return Ok(());
        }
        // Channels that were never opened.
        let fresh = World::empty();
        let frozen = fresh.services().freeze().unwrap();
        let mut streams = save(&frozen);
        streams[0] = damaged;
        world.restore(&streams);
        world.live(3);
        for service in Service::ALL {
            world.open(service, Some(Linux::new(service)));
        }
        world.settle();
        world.live(3);
        for service in Service::ALL {
            prop_assert!(matches!(world.services().phase(service), Phase::Agreed(_)));
        }
    }
}

#[test]
fn a_restore_that_is_given_up_leaves_the_bus_to_others() {
    let mut world = World::new();
    world.services().request_shutdown(POWER_OFF, "").unwrap();
    let frozen = world.services().freeze().unwrap();
    let streams = save(&frozen);
    frozen.move_away();
    drop(world.services.take());

    let mut first = world.restoring(&streams[0]).unwrap();
    let cut = &streams[1][..streams[1].len() - 1];
    assert!(first.restore_channel(0, cut).is_err());
    assert!(first.restore_channel(0, streams[2].as_slice()).is_err(), "another channel's");
    assert!(first.restore_channel(3, streams[1].as_slice()).is_err(), "there are three");
    first.restore_channel(0, streams[1].as_slice()).unwrap();
    assert!(first.restore_channel(0, streams[1].as_slice()).is_err(), "it is restored already");
    let unfinished = first.start().unwrap_err();
    assert_eq!(unfinished.service, Service::Shutdown);
    drop(unfinished);

    world.restore(&streams);
    world.settle();
    let (request, answer) = (POWER_OFF, ShutdownAnswer::Accepted);
    assert_eq!(world.events.take_others(), [Event::ShutdownEnded { request, answer }]);
}
