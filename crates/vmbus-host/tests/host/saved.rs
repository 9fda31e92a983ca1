//! What a host's saved state is: nothing but the state, whoever asks for it in whatever pieces, and what
//! follows from it afterwards.
//!
//! That a state comes back as it was is shown everywhere else: [`Machine::check`] saves and restores the
//! host after every step of every test.

use proptest::prelude::*;
use saved_state::bus::{BUS_GPADL, KINDS};
use saved_state::{
    FieldProblem, FormatVersion, Save, StreamHeader, StreamKind, StreamReader, WriteError,
};
use vmbus_host::limits::MAX_RAM_RUNS;
use vmbus_host::{
    Config, Effect, GuestShape, Host, HostRestore, HvsockRequest, Interrupt, OfferId, OpenState,
    RamMap, RestoreError, SaveOptions, SlotId,
};
use vmbus_wire::status::NtStatus;

use crate::bytes::*;
use crate::machine::*;

const RING: u32 = 5;
const PAGES: [u64; 8] = [10, 11, 12, 13, 20, 21, 22, 23];
const NONE: [Vec<u8>; 0] = [];

/// A host in the middle of everything: a channel in each state, half a GPADL, others that are in use and
/// taken back, requests without an answer, messages that wait, on both sides of a PAUSE.
pub(crate) fn everything() -> Host {
    let (mut machine, offers) = Machine::connected_v6(9);
    let [modified, _opening, closing, reopening, abandoned, reserved, rescinded, dump, open_still] =
        <[OfferId; 9]>::try_from(offers).unwrap();
    for (offer, channel) in [
        (modified, 1),
        (closing, 3),
        (reopening, 4),
        (abandoned, 5),
        (rescinded, 7),
        (open_still, 9),
    ] {
        machine.create_gpadl(channel, RING, &PAGES);
        machine.ok(&signalled(open(channel, 0x77, RING, 0, 4), channel));
        machine.open_result(offer, NtStatus::SUCCESS);
        assert_eq!(machine.messages(), [open_result(channel, 0x77, SUCCESS)]);
    }
    machine.create_gpadl(2, RING, &PAGES);
    machine.ok(&open_v2(open(2, 0x78, RING, u32::MAX, 4), 0x1234, 99));
    for (offer, channel) in [(reserved, 6), (dump, 8)] {
        machine.create_gpadl(channel, RING, &PAGES);
        machine.ok(&open_reserved(channel, 3, 7, RING, 4));
        machine.open_result(offer, NtStatus::SUCCESS);
        assert_eq!(machine.slot_messages().len(), 1);
    }
    // From here on the guest takes no message.
    machine.ok(&modify(1, 2));
    machine.create_two(1);
    machine.host.set_gpadl_in_use(modified, 6, true);
    machine.host.set_gpadl_in_use(modified, 7, true);
    machine.all_ok(&[gpadl_teardown(1, 7), gpadl_teardown(1, RING)]);
    let half = whole_pages(1, 8, &(0..80).collect::<Vec<_>>());
    machine.all_ok(&half[..2]);
    machine.ok(&gpadl_header(2, 9, 16, 1, &[])); // not a word yet
    machine.all_ok(&[
        close(3),
        close(4),
        signalled(open(4, 0x79, RING, 0, 4), 4),
        gpadl_teardown(3, RING),
    ]);
    machine.closed(abandoned);
    machine.revoke(rescinded);
    machine.ok(&close_reserved(8, 2, 5));
    machine.offer(7); // its name is not free yet
    machine.ok(&tl_connect(instance(20), instance(21)));
    let mut with_silo = tl_connect(instance(22), instance(23));
    with_silo.extend(instance(24).to_bytes());
    machine.ok(&with_silo);
    machine.ok(&modify_connection(0x7000, 0x8000));
    machine.ok(&pause());
    machine.ok(&modify_connection(0x7000, 0x9000)); // answered behind the pause
    machine.host
}

/// An open with the signals that a guest would have by default.
fn signalled(message: Vec<u8>, channel: u32) -> Vec<u8> {
    open_v2(message, 0x2000 | channel, u16::try_from(channel).unwrap())
}

impl Machine {
    /// Two GPADLs with ranges of every shape.
    fn create_two(&mut self, channel: u32) {
        self.all_ok(&whole_pages(channel, 6, &(0..100).rev().collect::<Vec<_>>()));
        let words = [4096 | 0xff0 << 32, 30, 31, 1, 32, 1 | 4095 << 32, 33];
        self.all_ok(&gpadl_messages(channel, 7, 3, &words));
    }
}

fn with(prepare: impl FnOnce(&mut Machine)) -> Host {
    let (mut machine, offers) = Machine::connected(V5_3, 2);
    machine.open(offers[0], 1, RING);
    prepare(&mut machine);
    machine.host
}

/// Hosts at steps that have fields of their own.
pub(crate) fn states() -> Vec<(&'static str, Host)> {
    vec![
        ("new", Host::new(Config::default(), GuestShape::default())),
        ("everything", everything()),
        ("old", {
            let mut machine = Machine::new();
            let offer = machine.offer(1);
            machine.ok(&contact(V1_1, 0, 0x3000).fill(0, 16).done());
            machine.messages();
            machine.ok(&request_offers());
            machine.messages();
            machine.open(offer, 1, RING);
            machine.host
        }),
        ("unload", with(|machine| machine.ok(&unload()))),
        ("reset", with(Machine::reset)),
        (
            "contact",
            with(|machine| machine.ok(&contact(V6_0, 1, target(2, 0, 0xff)).fill(3, 16).done())),
        ),
        ("contact, unsupported", with(|machine| machine.ok(&plain_contact(0x7777_7777, 0)))),
        (
            "contact, failed",
            with(|machine| {
                let _refused = machine.post(&contact(V4_1, 0, 0).u64(0x1000).u64(0).done());
            }),
        ),
        ("unload, untold", {
            let mut machine = Machine::new();
            let offer = machine.offer(1);
            machine.connect(V0_13);
            machine.ok(&request_offers());
            machine.messages();
            machine.open(offer, 1, RING);
            machine.ok(&unload());
            machine.host
        }),
        ("no guest", {
            let mut host = Host::new(Config::default(), GuestShape::default());
            host.offer(plain_offer(1)).unwrap();
            host
        }),
    ]
}

fn saved_by(host: &Host, sizes: &mut dyn FnMut() -> usize) -> Vec<u8> {
    let mut save = host.save(&SaveOptions::default()).unwrap();
    let mut bytes = Vec::new();
    let mut needed = 0;
    loop {
        // Whatever is offered; but as much as the last step has asked for where it got nowhere.
        let mut buffer = vec![0xaa; sizes().max(needed)];
        let step = save.step(&mut buffer).unwrap();
        assert!(buffer[step.written..].iter().all(|byte| *byte == 0xaa), "written past the end");
        bytes.extend(&buffer[..step.written]);
        if step.done {
            assert_eq!(save.step(&mut []).unwrap().written, 0, "over is over");
            return bytes;
        }
        assert!(step.written != 0 || step.needed > buffer.len(), "no progress, and no reason");
        needed = if step.written == 0 { step.needed } else { 0 };
    }
}

#[test]
fn every_state_comes_back() {
    for (name, host) in states() {
        assert_eq!(host.violations(), Vec::<String>::new(), "{name}");
        let bytes = saved(&host);
        assert_eq!(Host::restore(&bytes), Ok(host.clone()), "{name}");
        let header = StreamHeader::read(&bytes).unwrap();
        assert_eq!(header.info.stream, StreamKind::BUS);
        assert_eq!(header.info.items as usize, host.usage().channels, "{name}");
        assert_eq!(header.info.producer, SaveOptions::default().producer);
        let mut reader = StreamReader::new(StreamKind::BUS, KINDS);
        let mut input = &bytes[..];
        while reader.read(&mut input).unwrap().is_some() {}
        assert_eq!(header.info.chunks, reader.chunks(), "{name}");
    }
}

#[test]
fn everything_is_in_everything() {
    let host = everything();
    let usage = host.usage();
    assert_eq!((usage.channels, usage.incomplete_gpadls, usage.hvsock_requests), (10, 2, 2));
    assert!(usage.messages > 5);
    let mut names: Vec<_> = host.channels().map(|(_, channel)| channel.open.name()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 6, "{names:?}");
}

#[test]
fn one_byte_more_each_time_gives_the_same_bytes() {
    for (name, host) in states() {
        let expected = saved(&host);
        for size in [0, 1, 2, 27, 28, 100, 1000, 1 << 20] {
            assert_eq!(saved_by(&host, &mut || size), expected, "{name}, {size}");
        }
        let mut size = 0;
        let mut growing = || {
            size += 1;
            size
        };
        assert_eq!(saved_by(&host, &mut growing), expected, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Neither the buffers of who saves nor those of who restores have a part in what comes of it.
    #[test]
    fn buffers_have_no_part(sizes in proptest::collection::vec(0..700usize, 1..40)) {
        let host = everything();
        let bytes = saved(&host);
        let mut turn = sizes.iter().cycle();
        prop_assert_eq!(&saved_by(&host, &mut || *turn.next().unwrap()), &bytes);

        let mut chunks = saved_state::testing::chunk_ranges(&bytes).into_iter().peekable();
        let mut restore = HostRestore::new();
        for size in sizes.iter().cycle() {
            let Some(first) = chunks.next() else { break };
            let mut end = first.end;
            while let Some(next) = chunks.next_if(|next| next.end <= first.start + size) {
                end = next.end;
            }
            prop_assert!(!restore.is_complete());
            restore.feed(&bytes[first.start..end]).unwrap();
        }
        prop_assert!(restore.is_complete());
        prop_assert_eq!(restore.finish(), Ok(host));
    }
}

#[test]
fn a_guest_whose_page_frames_need_more_bits() {
    let ram = RamMap::new([(0, 16 << 20), (1 << 45, 16 << 20)]);
    let mut host = Host::new(Config::default(), GuestShape { vp_count: 1, ram });
    host.offer(plain_offer(1)).unwrap();
    let mut effects = Vec::new();
    let pages = [1, (1 << 33) + 5, 2, (1 << 33) + 4095];
    let messages = [vec![plain_contact(V4_1, 0), request_offers()], whole_pages(1, RING, &pages)];
    for message in messages.concat() {
        host.guest_message(1, &message, &mut effects).unwrap();
    }
    let restored = Host::restore(&saved(&host)).unwrap();
    assert_eq!(restored, host);
    assert_eq!(restored.gpadl(OfferId(1), RING).unwrap().ranges[0].pfns, pages);
}

#[test]
fn memory_in_too_many_pieces_is_not_saved() {
    let pieces = |count: usize| {
        let ram = RamMap::new((0..count as u64).map(|at| ((2 * at) << 12, 1 << 12)));
        Host::new(Config::default(), GuestShape { vp_count: 1, ram })
    };
    let most = pieces(MAX_RAM_RUNS);
    assert_eq!(Host::restore(&saved(&most)), Ok(most));
    let refused = pieces(MAX_RAM_RUNS + 1).save(&SaveOptions::default()).unwrap_err();
    let WriteError::Field { record: "bus.host", why } = refused else { panic!("{refused}") };
    assert_eq!((why.number, why.name), (15, "ram_runs"));
    assert_eq!(why.problem, FieldProblem::Range { found: 4097, most: 4096 });
}

#[test]
fn the_format_that_was_asked_for_is_written() {
    for format in FormatVersion::ALL {
        let options = SaveOptions { format: *format, ..SaveOptions::default() };
        let mut bytes = Vec::new();
        everything().save(&options).unwrap().write_to(&mut bytes).unwrap();
        assert_eq!(StreamHeader::read(&bytes).unwrap().format_version, format.number());
        assert_eq!(Host::restore(&bytes), Ok(everything()));
    }
}

#[test]
fn a_large_gpadl_is_one_record() {
    let pages: Vec<u64> = (0..4000).collect();
    let host = with(|machine| machine.all_ok(&whole_pages(1, 6, &pages)));
    let bytes = saved(&host);
    let mut reader = StreamReader::new(StreamKind::BUS, KINDS);
    let (mut input, mut gpadls) = (&bytes[..], 0);
    while let Some(chunk) = reader.read(&mut input).unwrap() {
        gpadls += u32::from(chunk.kind() == BUS_GPADL);
    }
    assert_eq!(gpadls, 2);
    assert_eq!(Host::restore(&bytes), Ok(host));
}

/// What follows from a state, with nothing else known.
#[test]
fn what_was_under_way_is_asked_for_again() {
    let mut machine = Machine::new();
    machine.host = everything();
    assert_eq!(machine.host.devices_have_moved(), []);
    machine.check();
    let mut effects = Vec::new();
    machine.host.go_on(&mut effects);
    let told: Vec<_> = effects
        .iter()
        .map(|effect| match effect {
            Effect::Open { offer, rings } => {
                ("open", offer.0, rings.connection_id, rings.interrupt)
            }
            Effect::Resume { offer, rings } => {
                ("resume", offer.0, rings.connection_id, rings.interrupt)
            }
            Effect::Retarget { offer, serial, interrupt } => {
                ("retarget", offer.0, u32::try_from(*serial).unwrap(), *interrupt)
            }
            Effect::ConnectHvsock(HvsockRequest { id, silo_id, .. }) => {
                let silo = u32::from(silo_id.is_some());
                ("hvsock", *id, silo, Interrupt::None)
            }
            Effect::Close { .. } => panic!("{effect:?}"),
        })
        .collect();
    let flag = |vp, flag| Interrupt::EventFlag { vp, sint: 2, flag };
    assert_eq!(
        told,
        [
            ("resume", 1, 0x2001, flag(0, 1)),
            ("retarget", 1, 1, flag(2, 1)),
            ("open", 2, 0x1234, Interrupt::None),
            ("open", 4, 0x2004, flag(0, 4)), // which the former device was to let go of first
            ("resume", 6, 0x2006, Interrupt::None),
            ("resume", 9, 0x2009, flag(0, 9)),
            ("hvsock", 2, 0, Interrupt::None),
            ("hvsock", 3, 1, Interrupt::None),
        ]
    );
    let rings = effects.iter().find_map(|effect| match effect {
        Effect::Resume { offer: OfferId(1), rings } => Some(rings),
        _ => None,
    });
    // The guest is taking their GPADL back, and still they are where they were.
    assert_eq!(rings.unwrap().incoming, PAGES[..4]);
    assert_eq!(rings.unwrap().outgoing, PAGES[4..]);
    assert_eq!(rings.unwrap().user_data, [0x5a; 120]);
}

#[test]
fn a_device_that_has_moved_has_let_go() {
    // Closing: the guest gets its ring back.
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, RING);
    machine.all_ok(&[close(1), gpadl_teardown(1, RING)]);
    machine.effects();
    assert_eq!(machine.host.devices_have_moved(), []);
    assert_eq!(machine.messages(), [gpadl_torndown(RING)]);
    assert_eq!(machine.host.channel(offers[0]).unwrap().open, OpenState::Closed);

    // Ending: the guest gets its answer.
    for (ending, answer) in
        [(unload(), unload_complete()), (plain_contact(V5_3, 0), accepted(V5_3))]
    {
        let (mut machine, offers) = Machine::connected(V5_3, 1);
        machine.open(offers[0], 1, RING);
        machine.ok(&ending);
        assert_eq!(machine.messages(), NONE);
        machine.host.devices_have_moved();
        assert_eq!(machine.messages(), [answer]);
        machine.go_on();
        assert_eq!(machine.host.usage().held, 0);
    }

    // Open: it has mapped nothing any more of what the guest is taking back; what the guest has not, it
    // may map again.
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, RING);
    machine.create_gpadl(1, 6, &[1, 2]);
    machine.create_gpadl(1, 7, &[3]);
    machine.host.set_gpadl_in_use(offers[0], 6, true);
    machine.host.set_gpadl_in_use(offers[0], 7, true);
    machine.all_ok(&[gpadl_teardown(1, 6), gpadl_teardown(1, RING)]);
    assert_eq!(machine.messages(), NONE);
    machine.host.devices_have_moved();
    assert_eq!(machine.messages(), [gpadl_torndown(6)], "the ring is not the device's to give");
    machine.ok(&gpadl_teardown(1, 7));
    assert_eq!(machine.messages(), NONE, "held back until the new device has let go");
    machine.host.set_gpadl_in_use(offers[0], 7, false);
    assert_eq!(machine.messages(), [gpadl_torndown(7)]);
}

#[test]
fn channels_that_are_to_be_new_are_withdrawn_and_offered_again() {
    let mut machine = Machine::new();
    let mut params = plain_offer(1);
    params.force_new_channel = true;
    let offers: Vec<_> = (1..=3)
        .map(|number| {
            params.key.interface_instance = instance(number);
            machine.host.offer(params.clone()).unwrap()
        })
        .collect();
    machine.connect(V5_3);
    machine.ok(&request_offers());
    machine.messages();
    machine.open(offers[0], 1, RING);
    machine.create_gpadl(2, RING, &PAGES);
    machine.ok(&open(2, 0x78, RING, 0, 4));
    machine.effects();

    let renewed = machine.host.devices_have_moved();
    assert_eq!(renewed.len(), 3);
    machine.check();
    let refused = open_result(2, 0x78, DEVICE_REMOVED);
    assert_eq!(machine.messages(), [rescind(1), refused, rescind(2), rescind(3)]);
    let again = machine.host.offer(renewed[0].clone()).unwrap();
    assert!(!offers.contains(&again));
    machine.go_on();
    assert_eq!(machine.effects(), []);
    assert_eq!(machine.messages(), NONE, "the guest has yet to release the former one");
    machine.ok(&release(1));
    assert_eq!(machine.messages(), [offered(TYPE, instance(1), 0, 4)]);
}

#[test]
fn a_device_that_cannot_go_on_has_let_go() {
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, RING);
    machine.host = Host::restore(&saved(&machine.host)).unwrap();
    machine.go_on();
    assert!(matches!(machine.effects()[..], [Effect::Resume { .. }]));
    machine.ok(&gpadl_teardown(1, RING));
    machine.open_result(offers[0], NtStatus::UNSUCCESSFUL);
    assert_eq!(machine.messages(), [gpadl_torndown(RING)]);
    assert_eq!(machine.effects(), [Effect::Close { offer: offers[0], tell_device: false }]);
    assert!(matches!(machine.host.channel(offers[0]).unwrap().open, OpenState::Abandoned(_)));
    machine.ok(&close(1));
}

#[test]
fn errors_say_where() {
    for (error, text, chunk) in [
        (
            RestoreError::Order { chunk: 3, found: "bus.gpadl", expected: "bus.channel", left: 2 },
            "chunk 3 is a record bus.gpadl, 2 more bus.channel should come",
            Some(3),
        ),
        (
            RestoreError::TooMany { chunk: 4, record: "bus.ram" },
            "chunk 4 is one record bus.ram too many",
            Some(4),
        ),
        (
            RestoreError::Missing { record: "bus.message", left: 1 },
            "1 records bus.message are missing",
            None,
        ),
    ] {
        assert_eq!((error.to_string().as_str(), error.chunk()), (text, chunk));
    }
}

#[test]
fn a_slot_before_any_guest_can_wait_for_a_message() {
    // UNLOAD from a guest that has never connected, on a machine of which nothing is known.
    let mut host = Host::new(Config::default(), GuestShape::default());
    host.guest_message(1, &unload(), &mut Vec::new()).unwrap();
    assert_eq!(host.next_message(&[]).map(|next| next.slot), Some(SlotId::DEFAULT));
    assert_eq!(Host::restore(&saved(&host)), Ok(host));
}
