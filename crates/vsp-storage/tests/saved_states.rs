//! Saved states that are damaged, made up, or another's.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use kmcl::bus::Bus;
use kmcl::loopback::LoopbackBus;
use proptest::prelude::*;
use saved_state::bare;
use saved_state::channel::{self, ChannelRecord, IncomingPacketRecord};
use saved_state::storage::{
    DiskIdentityRecord, InitStep, KINDS, StorageRecord, StorageRequestRecord,
};
use saved_state::testing::{chunk_ranges, rechain};
use saved_state::writer::Step;
use saved_state::{Encode, FormatVersion, StreamInfo, StreamKind, StreamReader, StreamWriter};
use vsp_storage::block::Fate;
use vsp_storage::{ControllerRestoreError, ScsiController};
use vstor_wire::packet::VstorPacket;
use vstor_wire::scsi::cdb::Command;
use vstor_wire::srb::{DataDirection, ScsiRequest, SrbStatus};

use common::world::{Server, World, config, restoring, save};
use common::{LUN0, PATIENCE, WorkerDriver, until};

const MS: Duration = Duration::from_millis(1);

/// A state with a request in flight, half done, and where it came from.
fn saved() -> (World, Vec<Vec<u8>>) {
    let mut world = World::new();
    world.medium.set_fate(Fate { parts: 4, ..Fate::after(40 * MS) });
    world.write(100, 8, 0x11);
    world.until_held(0, 1);
    world.medium.advance(15 * MS);
    let frozen = world.controller().freeze().unwrap();
    let streams = save(&frozen);
    frozen.move_away();
    drop(world.server.take());
    (world, streams)
}

/// What comes of a controller's stream, on a bus of its own.
fn refuse(stream: &[u8]) -> Option<ControllerRestoreError> {
    let bus = LoopbackBus::new(1 << 20).unwrap() as Arc<dyn Bus>;
    ScsiController::restoring(bus, WorkerDriver::new(), config(0), stream).err()
}

fn push(
    out: &mut Vec<u8>,
    put: impl Fn(&mut StreamWriter, &mut [u8]) -> Step,
    to: &mut StreamWriter,
) {
    let mut room = vec![0; 8192];
    let Step::Written { bytes } = put(to, &mut room) else { panic!("no room") };
    out.extend_from_slice(&room[..bytes]);
}

/// The records of a controller's stream.
fn records(stream: &[u8]) -> (StreamInfo, StorageRecord, Vec<DiskIdentityRecord>) {
    let mut reader = StreamReader::new(StreamKind::DEVICE, KINDS);
    let mut input = stream;
    let controller = reader.read(&mut input).unwrap().unwrap().decode().unwrap();
    let mut disks = Vec::new();
    while let Some(chunk) = reader.read(&mut input).unwrap() {
        disks.push(chunk.decode().unwrap());
    }
    (reader.header().unwrap().info, controller, disks)
}

/// A stream with these records, in this order.
fn stream(
    info: StreamInfo,
    controllers: &[StorageRecord],
    disks: &[DiskIdentityRecord],
) -> Vec<u8> {
    let info = StreamInfo { chunks: 0, ..info };
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).unwrap();
    let mut out = Vec::new();
    push(&mut out, |writer, room| writer.header(room).unwrap(), &mut writer);
    for record in controllers {
        push(&mut out, |writer, room| writer.record(record, room).unwrap(), &mut writer);
    }
    for record in disks {
        push(&mut out, |writer, room| writer.record(record, room).unwrap(), &mut writer);
    }
    push(&mut out, |writer, room| writer.end(room).unwrap(), &mut writer);
    out
}

#[test]
fn numbers_that_cannot_be_are_refused_by_name() {
    let (_world, streams) = saved();
    let (info, controller, disks) = records(&streams[0]);
    let disk = &disks[0];
    assert!(refuse(&stream(info, std::slice::from_ref(&controller), &disks)).is_none());
    let ready = StorageRecord { sub_channels: 0, ..controller.clone() };
    let controllers = [
        (StorageRecord { protocol_version: 0x0601, ..ready.clone() }, "0x0601"),
        (StorageRecord { protocol_version: 0x1_0602, ..ready.clone() }, "0x10602"),
        (StorageRecord { protocol_version: 0, ..ready.clone() }, "0x0000"),
        (StorageRecord { max_sub_channels: 65, ..ready.clone() }, "max_sub_channels"),
        (StorageRecord { sub_channels: 5, ..ready.clone() }, "sub_channels"),
        (
            StorageRecord { sub_channels: 1, step: InitStep::Begun.into(), ..ready.clone() },
            "sub_channels",
        ),
        (
            StorageRecord { sub_channels: 1, protocol_version: 0x0402, ..ready.clone() },
            "sub_channels",
        ),
        (StorageRecord { max_transfer_bytes: 0x4_0001, ..ready.clone() }, "max_transfer_bytes"),
        (StorageRecord { disks: 2, ..ready.clone() }, "disks"),
        (StorageRecord { disks: 0, ..ready.clone() }, "disks"),
        (StorageRecord { disks: u32::MAX, ..ready.clone() }, "disks"),
        (StorageRecord { attachments: 0, ..ready.clone() }, "attachment"),
    ];
    for (record, named) in controllers {
        let error = refuse(&stream(info, std::slice::from_ref(&record), &disks));
        let error = error.unwrap_or_else(|| panic!("{record:?} is not refused")).to_string();
        assert!(error.contains(named) && error.contains("storage."), "{error}");
    }
    let changed = |change: fn(&mut DiskIdentityRecord)| {
        let mut disk = disk.clone();
        change(&mut disk);
        vec![disk]
    };
    for (disks, named) in [
        (changed(|disk| disk.path = 8), "path"),
        (changed(|disk| disk.target = 2), "target"),
        (changed(|disk| disk.lun = 255), "lun"),
        (changed(|disk| disk.path = 256), "path"),
        (changed(|disk| disk.attachment = 0), "attachment"),
        (changed(|disk| disk.attachment = 2), "attachment"),
        (changed(|disk| disk.fingerprint.truncate(15)), "fingerprint"),
        (changed(|disk| disk.fingerprinted_bytes = 1), "fingerprinted_bytes"),
        (changed(|disk| disk.unit_attentions = vec![0x29, 0]), "unit_attentions"),
        (changed(|disk| disk.unit_attentions = vec![0x3f]), "unit_attentions"),
        (changed(|disk| disk.unit_attentions = vec![0x3f, 0x0e, 0x29, 0]), "unit_attentions"),
    ] {
        let error =
            refuse(&stream(info, std::slice::from_ref(&controller), &disks)).unwrap().to_string();
        assert!(error.contains(named) && error.contains("storage.disk"), "{error}");
    }
    // Twice, out of order, missing.
    let two = StorageRecord { disks: 2, attachments: 2, ..controller.clone() };
    let second = DiskIdentityRecord { attachment: 2, ..disk.clone() };
    let elsewhere = DiskIdentityRecord { lun: 1, ..disk.clone() };
    for (controllers, disks) in [
        (vec![two.clone()], vec![disk.clone(), second]),
        (vec![two], vec![disk.clone(), elsewhere]),
        (vec![controller.clone(), controller.clone()], disks.clone()),
        (vec![], disks.clone()),
        (vec![], vec![]),
    ] {
        assert!(refuse(&stream(info, &controllers, &disks)).is_some());
    }
}

#[test]
fn another_stream_is_not_a_controllers() {
    let (_world, streams) = saved();
    assert!(matches!(refuse(&streams[1]), Some(ControllerRestoreError::Read(_))));
    assert!(refuse(&[]).is_some());
    assert!(refuse(b"\x89KMCL\r\n\x1a").is_some());
    let (info, controller, disks) = records(&streams[0]);
    let other = StreamInfo { interface_instance: kmcl::Guid::from_u128(1), ..info };
    assert!(refuse(&stream(other, &[controller], &disks)).is_some());
}

#[test]
fn every_cut_and_every_flipped_bit_is_refused() {
    let (_world, streams) = saved();
    let whole = &streams[0];
    for len in 0..whole.len() {
        assert!(refuse(&whole[..len]).is_some(), "cut at {len}");
    }
    for at in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[at / 8] ^= 1 << (at % 8);
        assert!(refuse(&damaged).is_some(), "bit {at}");
    }
    for skip in 1..chunk_ranges(whole).len() {
        let ranges = chunk_ranges(whole);
        let dropped: Vec<u8> = (ranges.iter().enumerate())
            .filter(|(at, _)| *at != skip)
            .flat_map(|(_, range)| whole[range.clone()].to_vec())
            .collect();
        assert!(refuse(&dropped).is_some(), "without chunk {skip}");
        let mut doubled = whole[..ranges[skip].end].to_vec();
        doubled.extend_from_slice(&whole[ranges[skip].start..]);
        // What stands behind the last chunk is not read: another stream may follow there.
        let is_last = skip + 1 == ranges.len();
        assert_eq!(refuse(&doubled).is_none(), is_last, "with chunk {skip} twice");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever a stream with right checksums says: it is refused, or it makes a controller that can be
    /// dropped. Nothing panics, and nothing large is allocated.
    #[test]
    fn any_state_with_right_checksums_is_refused_or_harmless(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let whole = {
            static STREAM: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
            STREAM.get_or_init(|| saved().1.remove(0)).clone()
        };
        let mut damaged = whole;
        for (at, value) in edits {
            let at = at.index(damaged.len());
            damaged[at] = value;
        }
        rechain(&mut damaged);
        drop(refuse(&damaged));
    }
}

/// The stream of a channel with the notes of its requests changed.
fn with_notes(stream: &[u8], change: &dyn Fn(&mut Vec<u8>)) -> Vec<u8> {
    rewrite(stream, &|packet, out| {
        let mut note = packet.device_state.to_vec();
        change(&mut note);
        out(&IncomingPacketRecord { device_state: &note, ..*packet });
    })
}

type Emit<'a> = &'a mut dyn FnMut(&IncomingPacketRecord<'_>);

/// The stream of a channel with its incoming packets replaced by what `change` emits for each.
fn rewrite(stream: &[u8], change: &dyn Fn(&IncomingPacketRecord<'_>, Emit<'_>)) -> Vec<u8> {
    let mut reader = StreamReader::new(StreamKind::CHANNEL, channel::KINDS);
    let mut input = stream;
    let record: ChannelRecord = reader.read(&mut input).unwrap().unwrap().decode().unwrap();
    let info = reader.header().unwrap().info;
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, channel::KINDS).unwrap();
    let mut out = Vec::new();
    push(&mut out, |writer, room| writer.header(room).unwrap(), &mut writer);
    push(&mut out, |writer, room| writer.record(&record, room).unwrap(), &mut writer);
    while let Some(chunk) = reader.read(&mut input).unwrap() {
        let packet: IncomingPacketRecord<'_> = chunk.decode().unwrap();
        change(&packet, &mut |packet| {
            let mut room = vec![0; packet.encoded_len() + 64];
            let Step::Written { bytes } = writer.record(packet, &mut room).unwrap() else {
                panic!("no room")
            };
            out.extend_from_slice(&room[..bytes]);
        });
    }
    push(&mut out, |writer, room| writer.end(room).unwrap(), &mut writer);
    out
}

fn note(change: fn(&mut StorageRequestRecord)) -> impl Fn(&mut Vec<u8>) {
    move |bytes| {
        let mut record: StorageRequestRecord = bare::decode(bytes).unwrap();
        change(&mut record);
        bytes.resize(bare::encoded_len(&record), 0);
        bare::encode(&record, bytes).unwrap();
    }
}

#[test]
fn a_note_that_does_not_fit_its_packet_is_not_used() {
    let aborted = SrbStatus::ABORTED;
    for (what, change, status) in [
        ("as it was", Box::new(note(|_| {})) as Box<dyn Fn(&mut Vec<u8>)>, SrbStatus::SUCCESS),
        ("nothing moved", Box::new(note(|note| note.moved_bytes = 0)), SrbStatus::SUCCESS),
        ("another path", Box::new(note(|note| note.path = 1)), aborted),
        ("another target", Box::new(note(|note| note.target = 1)), aborted),
        ("another LUN", Box::new(note(|note| note.lun = 1)), aborted),
        ("another command", Box::new(note(|note| note.cdb[5] ^= 1)), aborted),
        ("a shorter command", Box::new(note(|note| note.cdb.truncate(6))), aborted),
        ("another length", Box::new(note(|note| note.transfer_bytes = 512)), aborted),
        ("all moved", Box::new(note(|note| note.moved_bytes = 4096)), aborted),
        ("more than all moved", Box::new(note(|note| note.moved_bytes = u32::MAX)), aborted),
        ("a part of a sector", Box::new(note(|note| note.moved_bytes = 100)), aborted),
        ("ranges", Box::new(note(|note| note.discarded_ranges = 1)), aborted),
        ("another disk", Box::new(note(|note| note.attachment = 7)), SrbStatus::INVALID_LUN),
        ("no disk", Box::new(note(|note| note.attachment = 0)), SrbStatus::INVALID_LUN),
        ("a cut note", Box::new(|bytes: &mut Vec<u8>| bytes.truncate(9)), aborted),
        ("a note of one byte", Box::new(|bytes: &mut Vec<u8>| bytes.truncate(1)), aborted),
        ("another record", Box::new(|bytes: &mut Vec<u8>| bytes[0] ^= 1), aborted),
        ("a later version", Box::new(|bytes: &mut Vec<u8>| bytes[2] = 9), aborted),
        ("no note", Box::new(Vec::clear), SrbStatus::SUCCESS), // it begins anew
    ] {
        let (mut world, mut streams) = saved();
        streams[1] = with_notes(&streams[1], &change);
        world.server = Some(Server::restore(&world.bus, &world.medium, &streams));
        let answers = world.finish();
        assert_eq!(answers[0].1.srb_status.code(), status, "{what}");
        if status == SrbStatus::SUCCESS {
            assert_eq!((world.byte(100 * 512), world.byte(108 * 512 - 1)), (0x11, 0x11), "{what}");
        }
        // It goes on, whatever it was.
        world.medium.set_fate(Fate::after(MS));
        let next = world.write(500, 1, 5);
        assert_eq!(world.finish()[next].1.srb_status, SrbStatus::SUCCESS, "{what}");
    }
}

#[test]
fn a_packet_of_a_saved_state_is_worth_no_more_than_one_of_a_guests() {
    // Packets that no device would have handed over, with the note of one that it has.
    let srb = |command: Command, direction, bytes| {
        let cdb = command.encode().unwrap();
        VstorPacket::request(vstor_wire::packet::Operation::EXECUTE_SRB)
            .with_body(&ScsiRequest::new(LUN0, &cdb, direction, bytes))
    };
    let beyond = srb(Command::write(u32::MAX.into(), 8, false), DataDirection::Out, 4096);
    let long = srb(Command::write(100, 65535, false), DataDirection::Out, 4096);
    let inquiry = srb(Command::ReadCapacity10, DataDirection::In, 8);
    let luns = srb(Command::ReportLuns { select: 0, allocation: 64 }, DataDirection::In, 64);
    let begin = VstorPacket::request(vstor_wire::packet::Operation::BEGIN_INITIALIZATION);
    let unknown = VstorPacket::request(vstor_wire::packet::Operation::from_raw(0xffff_ffff));
    for (row, payload) in [beyond, long, inquiry, luns, begin, unknown]
        .iter()
        .map(|packet| packet.bytes(vstor_wire::packet::PacketForm::Full).to_vec())
        .chain([vec![], vec![0; 8], vec![0xff; 256]])
        .enumerate()
    {
        let (mut world, mut streams) = saved();
        streams[1] = rewrite(&streams[1], &|packet, out| {
            out(&IncomingPacketRecord { payload: &payload, ..*packet });
        });
        world.medium.clear_history();
        world.server = Some(Server::restore(&world.bus, &world.medium, &streams));
        until("no answer", || {
            world.medium.advance(MS);
            world.raw_answers().len() == 1
        });
        assert!(world.medium.history().is_empty(), "row {row}: nothing reaches the disk");
    }
}

#[test]
fn a_restore_that_is_given_up_leaves_the_bus_to_others() {
    let (mut world, streams) = saved();
    let driver = WorkerDriver::new();
    let mut first = restoring(&world.bus, &driver, streams[0].as_slice());
    let mut cut = streams[1].clone();
    cut.truncate(cut.len() - 1);
    assert!(first.restore_channel(0, cut.as_slice()).is_err());
    assert!(first.restore_channel(1, streams[1].as_slice()).is_err(), "there is one channel");
    first.restore_channel(0, streams[1].as_slice()).unwrap();
    assert!(first.restore_channel(0, streams[1].as_slice()).is_err(), "it is restored already");
    drop(first);
    world.server = Some(Server::restore(&world.bus, &world.medium, &streams));
    assert_eq!(world.finish()[0].1.srb_status, SrbStatus::SUCCESS);
    let frozen = world.controller().freeze().unwrap();
    assert!(frozen.wait(Some(PATIENCE)));
    world.go_elsewhere(frozen);
}
