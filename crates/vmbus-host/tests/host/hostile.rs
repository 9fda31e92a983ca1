//! Saved states that nobody saved.

use std::sync::LazyLock;

use proptest::prelude::*;
use saved_state::bus::*;
use saved_state::record::{Decode, Encode};
use saved_state::testing::{chunk_ranges, rechain};
use saved_state::text::Producer;
use saved_state::{
    Damage, FormatVersion, HeaderFlags, ReadError, RecordKind, Step, StreamInfo, StreamKind,
    StreamReader, StreamWriter,
};
use vmbus_host::limits::*;
use vmbus_host::{Host, Misfit, RestoreError};
use vmbus_wire::guid::Guid;
use vmbus_wire::ranges::RangeError;

use crate::machine::*;
use crate::saved::{everything, states};

/// Whatever the bytes: an error, or a host that can be; and one that can be saved.
#[track_caller]
fn judged(bytes: &[u8]) -> Result<Host, RestoreError> {
    let restored = Host::restore(bytes);
    if let Ok(host) = &restored {
        assert_eq!(host.violations(), Vec::<String>::new());
        assert_eq!(Host::restore(&saved(host)).as_ref(), Ok(host));
        let mut moved = host.clone();
        moved.devices_have_moved();
        moved.go_on(&mut Vec::new());
        assert_eq!(moved.violations(), Vec::<String>::new());
    }
    restored
}

#[test]
fn a_state_that_is_cut_anywhere_is_refused() {
    let bytes = saved(&everything());
    for len in 0..bytes.len() {
        let error = judged(&bytes[..len]).unwrap_err();
        assert!(matches!(error, RestoreError::Stream(_)), "{len}: {error}");
    }
    let more = [&bytes[..], &[0]].concat();
    let end = ReadError::AfterEnd { offset: bytes.len() as u64, bytes: 1 };
    assert_eq!(judged(&more), Err(RestoreError::Stream(end)));
}

#[test]
fn a_bit_that_flips_is_noticed() {
    let bytes = saved(&everything());
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            let error = judged(&flipped).unwrap_err();
            assert!(matches!(error, RestoreError::Stream(_)), "byte {at}, bit {bit}: {error}");
        }
    }
}

#[test]
fn chunks_dropped_doubled_and_swapped_are_noticed() {
    let bytes = saved(&everything());
    let chunks: Vec<&[u8]> = chunk_ranges(&bytes).into_iter().map(|range| &bytes[range]).collect();
    for at in 0..chunks.len() {
        let mut dropped = chunks.clone();
        dropped.remove(at);
        assert!(judged(&dropped.concat()).is_err(), "without {at}");
        let mut doubled = chunks.clone();
        doubled.insert(at, chunks[at]);
        assert!(judged(&doubled.concat()).is_err(), "with {at} twice");
        for other in 0..at {
            let mut swapped = chunks.clone();
            swapped.swap(at, other);
            assert!(judged(&swapped.concat()).is_err(), "{at} and {other}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    /// Valid checksums over nonsense: an error that is told, or a host that can be.
    #[test]
    fn nonsense_with_good_checksums_is_judged(
        which in any::<prop::sample::Index>(),
        changes in proptest::collection::vec(
            (any::<prop::sample::Index>(), prop_oneof![
                any::<u8>(), Just(0), Just(1), Just(0x7f), Just(0x80), Just(0xff),
            ]),
            1..6,
        ),
    ) {
        static SAVED: LazyLock<Vec<Vec<u8>>> =
            LazyLock::new(|| states().iter().map(|(_, host)| saved(host)).collect());
        let mut bytes = SAVED[which.index(SAVED.len())].clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        rechain(&mut bytes);
        let _either = judged(&bytes);
    }
}

/// A record, apart from its chunk.
#[derive(Clone, Debug)]
enum Rec {
    Host(BusHostRecord),
    Ram(BusRamRecord),
    Connection(BusConnectionRecord),
    Channel(BusChannelRecord<'static>),
    Gpadl(BusGpadlRecord<&'static [u8]>),
    Hvsock(BusHvsockRecord),
    Message(BusMessageRecord<'static>),
}

fn take_apart(host: &Host) -> Vec<Rec> {
    let bytes: &'static [u8] = saved(host).leak(); // a test's
    let mut reader = StreamReader::new(StreamKind::BUS, KINDS);
    let mut input = bytes;
    let mut records = Vec::new();
    while let Some(chunk) = reader.read(&mut input).unwrap() {
        fn of<R: Decode<'static>>(chunk: &saved_state::Chunk<'static>) -> R {
            chunk.decode().unwrap()
        }
        records.push(match chunk.kind() {
            BUS_HOST => Rec::Host(of(&chunk)),
            BUS_RAM => Rec::Ram(of(&chunk)),
            BUS_CONNECTION => Rec::Connection(of(&chunk)),
            BUS_CHANNEL => Rec::Channel(of(&chunk)),
            BUS_GPADL => Rec::Gpadl(of(&chunk)),
            BUS_HVSOCK => Rec::Hvsock(of(&chunk)),
            BUS_MESSAGE => Rec::Message(of(&chunk)),
            RecordKind(other) => panic!("kind {other}"),
        });
    }
    records
}

fn put_together(records: &[Rec]) -> Vec<u8> {
    let info = StreamInfo {
        stream: StreamKind::BUS,
        flags: HeaderFlags::default(),
        interface_type: Guid::ZERO,
        interface_instance: Guid::ZERO,
        producer: Producer::EMPTY,
        chunks: 0,
        bytes: 0,
        items: 0,
    };
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).unwrap();
    let (mut bytes, mut room) = (Vec::new(), vec![0; 1 << 20]);
    let mut put = |step, room: &[u8]| match step {
        Step::Written { bytes: count } => bytes.extend(&room[..count]),
        Step::Needs { bytes } => panic!("{bytes}"),
    };
    fn write(writer: &mut StreamWriter, record: &impl Encode, room: &mut [u8]) -> Step {
        writer.record(record, room).unwrap()
    }
    put(writer.header(&mut room).unwrap(), &room);
    for record in records {
        let step = match record {
            Rec::Host(record) => write(&mut writer, record, &mut room),
            Rec::Ram(record) => write(&mut writer, record, &mut room),
            Rec::Connection(record) => write(&mut writer, record, &mut room),
            Rec::Channel(record) => write(&mut writer, record, &mut room),
            Rec::Gpadl(record) => write(&mut writer, record, &mut room),
            Rec::Hvsock(record) => write(&mut writer, record, &mut room),
            Rec::Message(record) => write(&mut writer, record, &mut room),
        };
        put(step, &room);
    }
    put(writer.end(&mut room).unwrap(), &room);
    bytes
}

#[test]
fn what_was_taken_apart_can_be_put_together() {
    for (name, host) in states() {
        assert_eq!(Host::restore(&put_together(&take_apart(&host))), Ok(host), "{name}");
    }
}

const CHANNEL: &str = "bus.channel";

/// What a field says is wrong, in the first record that `change` has changed.
#[track_caller]
fn refuse(host: &Host, what: &str, change: impl Fn(&mut Rec) -> bool) -> (&'static str, Misfit) {
    let mut records = take_apart(host);
    assert!(records.iter_mut().any(&change), "{what}: no record to change");
    match judged(&put_together(&records)) {
        Err(RestoreError::Field { field, why, .. }) => (field, why),
        other => panic!("{what}: {:?}", other.map(|_| "restored")),
    }
}

/// A change to the channel of that offer.
fn channel(
    offer: u64,
    change: impl Fn(&mut BusChannelRecord<'static>),
) -> impl Fn(&mut Rec) -> bool {
    move |record| match record {
        Rec::Channel(record) if record.offer == offer => {
            change(record);
            true
        }
        _ => false,
    }
}

fn host_record(change: impl Fn(&mut BusHostRecord)) -> impl Fn(&mut Rec) -> bool {
    move |record| match record {
        Rec::Host(record) => {
            change(record);
            true
        }
        _ => false,
    }
}

fn gpadl(
    step: GpadlStep,
    change: impl Fn(&mut BusGpadlRecord<&'static [u8]>),
) -> impl Fn(&mut Rec) -> bool {
    move |record| match record {
        Rec::Gpadl(record) if record.step == step => {
            change(record);
            true
        }
        _ => false,
    }
}

fn contradiction(other: &'static str) -> Misfit {
    Misfit::Contradiction { other }
}

fn range(found: u64, least: u64, most: u64) -> Misfit {
    Misfit::Range { found, least, most }
}

#[test]
fn numbers_of_the_host_out_of_range() {
    let host = everything();
    let beyond = MAX_SAVED_SERIAL + 1;
    let serial = range(beyond, 0, MAX_SAVED_SERIAL);
    type Row = (&'static str, Misfit, fn(&mut BusHostRecord));
    let rows: [Row; 14] = [
        ("newest_version", Misfit::Unknown { found: 7 }, |it| it.newest_version = 7),
        ("last_serial", serial, |it| it.last_serial = MAX_SAVED_SERIAL + 1),
        ("offers_made", serial, |it| it.offers_made = MAX_SAVED_SERIAL + 1),
        ("last_message", serial, |it| it.last_message = MAX_SAVED_SERIAL + 1),
        ("last_channel_id", range(2048, 0, 2047), |it| it.last_channel_id = 2048),
        ("ram_runs", range(4097, 0, MAX_RAM_RUNS as u64), |it| it.ram_runs = 4097),
        ("channels", range(2048, 0, 2047), |it| it.channels = 2048),
        ("gpadls", range(u64::from(u32::MAX), 0, MAX_GPADLS as u64), |it| it.gpadls = u32::MAX),
        ("hvsock_requests", range(129, 0, 128), |it| it.hvsock_requests = 129),
        ("messages", range(u64::from(u32::MAX), 0, MAX_OUTGOING_MESSAGES as u64), |it| {
            it.messages = u32::MAX
        }),
        ("before_pause", range(9999, 0, 9), |it| it.before_pause = 9999),
        ("before_pause", contradiction("paused"), |it| it.paused = false),
        ("after_end", contradiction("connection"), |it| it.after_end = AfterEnd::Nothing),
        ("failed_version", contradiction("after_end"), |it| it.failed_version = 13),
    ];
    for (field, why, change) in rows {
        let why = match why {
            // As many as there are.
            Misfit::Range { found: 9999, least, .. } => {
                range(9999, least, host.usage().messages as u64)
            }
            why => why,
        };
        assert_eq!(refuse(&host, field, host_record(change)), (field, why));
    }
    let (_, ending) = states().into_iter().find(|(name, _)| *name == "unload").unwrap();
    let sint = host_record(|it| it.after_end_sint = 16);
    assert_eq!(refuse(&ending, "sint", sint), ("after_end_sint", range(16, 0, 15)));
    let vp = host_record(|it| it.after_end_vp = 4);
    assert_eq!(refuse(&ending, "vp", vp), ("after_end_vp", range(4, 0, 3)));
    let nothing = host_record(|it| {
        it.after_end = AfterEnd::Nothing;
        it.after_end_sint = 2;
    });
    assert_eq!(refuse(&ending, "slot", nothing), ("after_end_sint", contradiction("after_end")));
}

#[test]
fn channels_that_cannot_be() {
    let host = everything();
    let half = |found| range(found, 0, 0xffff);
    type Row = (u64, &'static str, Misfit, fn(&mut BusChannelRecord<'static>));
    let rows: Vec<Row> = vec![
        (1, "channel_id", range(2048, 1, 2047), |it| it.channel_id = 2048),
        (2, "channel_id", Misfit::Taken { found: 1 }, |it| it.channel_id = 1),
        (1, "subchannel_index", half(65536), |it| it.subchannel_index = 65536),
        (1, "mmio_megabytes", half(65536), |it| it.mmio_megabytes = 65536),
        (1, "mmio_megabytes_optional", half(65536), |it| it.mmio_megabytes_optional = 65536),
        (1, "offer", range(99, 1, 10), |it| it.offer = 99),
        (2, "offer", Misfit::Order { found: 1 }, |it| it.offer = 1),
        (1, "event_flag", range(0, 1, 2047), |it| it.event_flag = 0),
        (1, "event_flag", range(2048, 1, 2047), |it| it.event_flag = 2048),
        (1, "connection_id", range(4, 5, 0xff_ffff), |it| it.connection_id = 4),
        (1, "target_vp", range(4, 0, 3), |it| it.target_vp = 4),
        (2, "target_vp", contradiction("interrupts"), |it| it.target_vp = 1),
        (1, "reply_vp", contradiction("reserved"), |it| it.reply_vp = 1),
        (6, "open_id", contradiction("reserved"), |it| it.open_id = 1),
        (6, "reply_sint", range(16, 0, 15), |it| it.reply_sint = 16),
        (6, "reply_vp", range(4, 0, 3), |it| it.reply_vp = 4),
        (1, "closing_gpadl", contradiction("open_step"), |it| it.closing_gpadl = 1),
        (1, "closing_accepted", contradiction("open_step"), |it| it.closing_accepted = true),
        (1, "closing_told", contradiction("open_step"), |it| it.closing_told = true),
        (3, "closing_reply_vp", contradiction("closing_told"), |it| it.closing_reply_vp = 1),
        (8, "closing_reply_vp", range(4, 0, 3), |it| it.closing_reply_vp = 4),
        (8, "closing_reply_sint", range(255, 0, 15), |it| it.closing_reply_sint = 255),
        (3, "ring_gpadl", contradiction("open_step"), |it| it.ring_gpadl = 1),
        (3, "user_data", contradiction("open_step"), |it| it.user_data = &[1]),
        (5, "interrupts", contradiction("open_step"), |it| it.interrupts = true),
        (3, "reserved", contradiction("open_step"), |it| it.reserved = true),
        (3, "open_id", contradiction("open_step"), |it| it.open_id = 1),
        (1, "modifying_serial", range(0, 1, 3), |it| it.modifying_serial = 0),
        (1, "modifying_serial", range(4, 1, 3), |it| it.modifying_serial = 4),
        (1, "modifying_vp", range(4, 0, 3), |it| it.modifying_vp = 4),
        (2, "modifying_vp", contradiction("modifying"), |it| it.modifying_vp = 1),
        (2, "modifying_told", contradiction("modifying"), |it| it.modifying_told = true),
    ];
    for (offer, field, why, change) in rows {
        assert_eq!(refuse(&host, field, channel(offer, change)), (field, why), "offer {offer}");
    }
}

#[test]
fn connections_requests_and_messages_that_cannot_be() {
    let host = everything();
    let at_connection = |change: fn(&mut BusConnectionRecord)| {
        move |record: &mut Rec| match record {
            Rec::Connection(record) => {
                change(record);
                true
            }
            _ => false,
        }
    };
    let monitor = contradiction("parent_to_child_monitor");
    type Row = (&'static str, Misfit, fn(&mut BusConnectionRecord));
    let rows: [Row; 7] = [
        ("version", Misfit::Unknown { found: 1 }, |it| it.version = 1),
        ("features", Misfit::Unknown { found: 0x100 }, |it| it.features |= 0x100),
        ("slot_vp", range(4, 0, 3), |it| it.slot_vp = 4),
        ("slot_sint", range(16, 0, 15), |it| it.slot_sint = 16),
        ("client_id", contradiction("named"), |it| it.named = false),
        ("interrupt_page", Misfit::Unknown { found: 0x3000 }, |it| it.interrupt_page = 0x3000),
        ("child_to_parent_monitor", monitor, |it| it.child_to_parent_monitor = 0),
    ];
    for (field, why, change) in rows {
        assert_eq!(refuse(&host, field, at_connection(change)), (field, why));
    }
    let old = host_record(|it| it.newest_version = 13);
    assert_eq!(refuse(&host, "newest", old), ("version", contradiction("newest_version")));
    let (_, old) = states().into_iter().find(|(name, _)| *name == "old").unwrap();
    let page = at_connection(|it| it.interrupt_page += 1);
    let why = Misfit::Unknown { found: 0x3001 };
    assert_eq!(refuse(&old, "unaligned", page), ("interrupt_page", why));
    let page = at_connection(|it| it.interrupt_page = NOT_RAM << 12);
    let why = Misfit::Unknown { found: NOT_RAM << 12 };
    assert_eq!(refuse(&old, "no RAM", page), ("interrupt_page", why));
    let (_, ending) = states().into_iter().find(|(name, _)| *name == "contact").unwrap();
    let slot = at_connection(|it| it.slot_vp = 3);
    assert_eq!(refuse(&ending, "slot", slot), ("slot_vp", contradiction("after_end_vp")));

    let hvsock = |change: fn(&mut BusHvsockRecord)| {
        move |record: &mut Rec| match record {
            Rec::Hvsock(record) if record.contained => {
                change(record);
                true
            }
            _ => false,
        }
    };
    let silo = hvsock(|it| it.contained = false);
    assert_eq!(refuse(&host, "silo", silo), ("silo_id", contradiction("contained")));
    let id = hvsock(|it| it.id = 4);
    assert_eq!(refuse(&host, "id", id), ("id", range(4, 1, 3)));
    let id = hvsock(|it| it.id = 2);
    assert_eq!(refuse(&host, "id", id), ("id", Misfit::Order { found: 2 }));

    let last = host.next_message(&[]).unwrap().serial;
    let message = |change: &'static dyn Fn(&mut BusMessageRecord<'static>)| {
        move |record: &mut Rec| match record {
            Rec::Message(record) if record.serial > last => {
                change(record);
                true
            }
            _ => false,
        }
    };
    let (field, why) = refuse(&host, "order", message(&|it| it.serial = 1));
    assert_eq!((field, why), ("serial", Misfit::Order { found: 1 }));
    let (field, _) = refuse(&host, "serial", message(&|it| it.serial = u64::MAX));
    assert_eq!(field, "serial");
    let slot = refuse(&host, "slot", message(&|it| it.slot_vp = u32::MAX));
    assert_eq!(slot, ("slot_vp", range(u32::MAX.into(), 0, 3)));
    let ram = |record: &mut Rec| match record {
        Rec::Ram(record) if record.first_pfn != 0 => {
            record.first_pfn = 4096; // the page behind the first run: they would be one
            true
        }
        _ => false,
    };
    let found = (1 << 18) + 4096;
    assert_eq!(refuse(&host, "ram", ram), ("end_pfn", Misfit::Order { found }));
}

#[test]
fn gpadls_that_cannot_be() {
    let host = everything();
    use GpadlStep::{Assembling, Created, TearingDown};
    let ranges = |error| Misfit::Ranges(error);
    type Row = (GpadlStep, &'static str, Misfit, fn(&mut BusGpadlRecord<&'static [u8]>));
    let rows: Vec<Row> = vec![
        (Created, "offer", Misfit::Unknown { found: 99 }, |it| it.offer = 99),
        (Created, "range_count", contradiction("step"), |it| it.range_count = 1),
        (Created, "words_total", contradiction("step"), |it| it.words_total = 1),
        (Created, "received", contradiction("step"), |it| it.received = &[0; 8]),
        (Created, "wide", contradiction("bus.ram"), |it| it.wide = true),
        (Created, "ranges", ranges(RangeError::NoRanges), |it| it.ranges = &[]),
        (Created, "ranges", Misfit::Length { found: 7 }, |it| it.ranges = &[1; 7]),
        (Created, "ranges", ranges(RangeError::Empty { range: 0 }), |it| it.ranges = &[0; 8]),
        (
            Created,
            "ranges",
            ranges(RangeError::ByteOffset { range: 0, byte_offset: 0x1000 }),
            |it| it.ranges = &[1, 0, 0, 0, 0, 0x10, 0, 0],
        ),
        (
            Created,
            "ranges",
            ranges(RangeError::Overflow { range: 0, byte_count: u32::MAX, byte_offset: 1 }),
            |it| it.ranges = &[0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0],
        ),
        (
            Created,
            "ranges",
            ranges(RangeError::Truncated { range: 0, pages: 1 << 20, words: 100 }),
            |it| it.ranges = &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        ),
        (Created, "ranges", ranges(RangeError::TrailingWords { words: 99 }), |it| {
            it.ranges = &[1, 0, 0, 0, 0, 0, 0, 0]
        }),
        (Created, "pfns", Misfit::Length { found: 30 }, |it| it.pfns = &it.pfns[..30]),
        (Created, "pfns", Misfit::NotRam { pfn: 0xffff_ffff }, |it| it.pfns = &[0xff; 400]),
        (Created, "pfns", range(16_383, 0, 8191), |it| it.pfns = &[0; 65_528]),
        (TearingDown, "received", contradiction("step"), |it| it.received = &[0; 8]),
        (Assembling, "in_use", contradiction("step"), |it| it.in_use = true),
        (Assembling, "ranges", contradiction("step"), |it| it.ranges = &[0; 8]),
        (Assembling, "wide", contradiction("step"), |it| it.wide = true),
        (Assembling, "pfns", contradiction("step"), |it| it.pfns = &[0; 4]),
        (Assembling, "range_count", range(0, 1, 65535), |it| it.range_count = 0),
        (Assembling, "range_count", range(65536, 0, 65535), |it| it.range_count = 65536),
        (Assembling, "received", Misfit::Length { found: 9 }, |it| it.received = &[0; 9]),
        (Assembling, "words_total", range(8192, 56, 8191), |it| it.words_total = 8192),
        (Assembling, "words_total", range(55, 56, 8191), |it| it.words_total = 55),
        (Assembling, "words_total", range(81, 8000, 8191), |it| it.range_count = 4000),
    ];
    for (step, field, why, change) in rows {
        assert_eq!(refuse(&host, field, gpadl(step, change)), (field, why), "{step:?}");
    }
    // Bodies name no channel: of two channels one receives.
    let busy = gpadl(Assembling, |it| it.gpadl = if it.offer == 1 { 9 } else { it.gpadl });
    assert_eq!(refuse(&host, "busy", busy), ("gpadl", Misfit::Taken { found: 9 }));
}

#[test]
fn records_out_of_order_missing_and_too_many() {
    let records = take_apart(&everything());
    let is_channel = |record: &Rec| matches!(record, Rec::Channel(_));
    let first = records.iter().position(is_channel).unwrap();
    let count = records.iter().filter(|record| is_channel(record)).count();

    let mut fewer = records.clone();
    fewer.remove(first);
    let chunk = u32::try_from(first + count).unwrap();
    let order = RestoreError::Order { chunk, found: "bus.gpadl", expected: CHANNEL, left: 1 };
    assert_eq!(judged(&put_together(&fewer)), Err(order));

    let mut more = records.clone();
    more.insert(first, more[first].clone());
    assert!(matches!(
        judged(&put_together(&more)),
        Err(RestoreError::Field { field: "offer", .. })
    ));
    let mut more = records.clone();
    let Rec::Message(mut message) = *records.last().unwrap() else { panic!() };
    message.serial += 1;
    more.push(Rec::Message(message));
    let Rec::Host(host) = &mut more[0] else { panic!() };
    host.last_message += 1;
    let chunk = u32::try_from(records.len() + 1).unwrap();
    let too_many = RestoreError::TooMany { chunk, record: "bus.message" };
    assert_eq!(judged(&put_together(&more)), Err(too_many));

    let mut short = records.clone();
    short.pop();
    let missing = RestoreError::Missing { record: "bus.message", left: 1 };
    assert_eq!(judged(&put_together(&short)), Err(missing));
    assert_eq!(
        judged(&put_together(&records[1..])),
        Err(RestoreError::Order { chunk: 1, found: "bus.ram", expected: "bus.host", left: 1 })
    );
    assert_eq!(
        judged(&put_together(&[])),
        Err(RestoreError::Missing { record: "bus.host", left: 1 })
    );
    let twice = [&records[..1], &records[..]].concat();
    let too_many = RestoreError::TooMany { chunk: 2, record: "bus.host" };
    assert_eq!(judged(&put_together(&twice)), Err(too_many));
}

/// Each record is right, and together they are not.
#[test]
fn records_that_contradict_each_other() {
    let contradicts = |what: &str, change: &dyn Fn(&mut Rec) -> bool| {
        let mut records = take_apart(&everything());
        assert!(records.iter_mut().any(change), "{what}");
        match judged(&put_together(&records)) {
            Err(RestoreError::Contradiction { what: told }) => told,
            other => panic!("{what}: {:?}", other.map(|_| "restored")),
        }
    };
    type Row<'a> = (&'a str, Box<dyn Fn(&mut Rec) -> bool>, &'a str);
    let rows: Vec<Row<'_>> = vec![
        ("name", Box::new(channel(2, |it| it.interface_instance = instance(1))), "both offers"),
        ("signal", Box::new(channel(2, |it| it.connection_id = 0x2001)), "share signal connection"),
        ("ring", Box::new(channel(9, |it| it.ring_gpadl = 77)), "is open"),
        ("split", Box::new(channel(9, |it| it.downstream_page_offset = 8)), "is open"),
        ("hidden", Box::new(channel(1, |it| it.offer_step = OfferStep::Hidden)), "is Hidden"),
        ("released", Box::new(channel(1, |it| it.offer_step = OfferStep::Released)), "is Released"),
        ("quota", Box::new(host_record(|it| it.gpadl_page_quota = 3)), "GPADL pages"),
        (
            "idle",
            Box::new(|record| match record {
                Rec::Gpadl(record) if record.offer == 5 => {
                    record.step = GpadlStep::TearingDown;
                    true
                }
                _ => false,
            }),
            "held back for nobody",
        ),
        (
            "used by nobody",
            Box::new(|record| match record {
                Rec::Gpadl(record) if record.offer == 5 => {
                    record.in_use = true;
                    true
                }
                _ => false,
            }),
            "in use by nobody",
        ),
    ];
    for (what, change, expected) in rows {
        let told = contradicts(what, &*change);
        assert!(told.contains(expected), "{what}: {told}");
    }
}

#[test]
fn an_error_stays_an_error() {
    let bytes = saved(&everything());
    let chunks = chunk_ranges(&bytes);
    let mut restore = vmbus_host::HostRestore::new();
    restore.feed(&bytes[chunks[0].clone()]).unwrap();
    let error = restore.feed(&bytes[chunks[2].clone()]).unwrap_err();
    let sequence = Damage::Sequence { found: 2, expected: 1 };
    let RestoreError::Stream(ReadError::Damaged { why, .. }) = &error else { panic!("{error}") };
    assert_eq!(*why, sequence);
    assert_eq!(error.chunk(), Some(1));
    assert_eq!(restore.feed(&bytes[chunks[1].clone()]), Err(error.clone()), "too late");
    assert_eq!(restore.finish(), Err(error));
}
