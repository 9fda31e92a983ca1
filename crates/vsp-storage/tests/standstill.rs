//! What belongs to a controller beside its requests, across a freeze or a pause: what it has agreed on,
//! its disks, resets, notices.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use kmcl::{ChannelState, NtStatus, SaveOptions};
use vsp_storage::block::{Fate, TestMedium, TestTime};
use vsp_storage::{
    AttachError, ControllerError, Disk, DiskDifference, DiskOptions, EnableError, LunError,
    ScsiAddress,
};
use vstor_wire::packet::{Operation, VstorPacket};
use vstor_wire::protocol::{ProtocolVersion, ProtocolVersionBody};
use vstor_wire::scsi::cdb::Command;
use vstor_wire::srb::{DataDirection, ScsiRequest, SrbStatus};

use common::world::{DISK_BYTES, Server, World, disk, restoring, save, write};
use common::{Guest, LUN0, PATIENCE, WorkerDriver, ram, sense, until};

const MS: Duration = Duration::from_millis(1);
const LUN1: ScsiAddress = ScsiAddress::new(0, 0, 1);

fn statuses(answers: &[(usize, ScsiRequest)]) -> Vec<SrbStatus> {
    answers.iter().map(|(_, srb)| srb.srb_status).collect()
}

// ---- Holding -----------------------------------------------------------------------------------------

#[test]
fn a_controller_is_held_once_and_its_disks_stay() {
    let world = World::new();
    let other = common::disk(ram(4096), "other");
    let frozen = world.controller().freeze().unwrap();
    assert!(matches!(world.controller().freeze(), Err(ControllerError::Held)));
    assert!(matches!(world.controller().pause(), Err(ControllerError::Held)));
    let attached = world.controller().attach(LUN1, Arc::clone(&other));
    assert!(matches!(
        attached,
        Err(ControllerError::Lun(LunError::Frozen { address })) if address == LUN1
    ));
    assert!(matches!(world.controller().detach(LUN0), Err(LunError::Frozen { address: LUN0 })));
    assert!(!other.is_attached());
    drop(frozen);
    world.controller().attach(LUN1, other).unwrap();
    let paused = world.controller().pause().unwrap();
    assert!(matches!(world.controller().freeze(), Err(ControllerError::Held)));
    drop(paused);
    world.controller().freeze().unwrap().thaw();
}

#[test]
fn a_controller_that_was_not_offered_cannot_be_held() {
    let bus = kmcl::loopback::LoopbackBus::new(1 << 20).unwrap();
    let driver = WorkerDriver::new();
    let controller =
        vsp_storage::ScsiController::new(bus, driver, common::world::config(0)).unwrap();
    for _ in 0..2 {
        assert!(matches!(controller.freeze(), Err(ControllerError::Channel(_))));
        assert!(matches!(controller.pause(), Err(ControllerError::Channel(_))));
    }
}

#[test]
fn streams_come_once_at_a_time_and_as_often_as_wanted() {
    let mut world = World::new();
    world.medium.set_fate(Fate::after(10 * MS));
    world.write(0, 4, 1);
    world.until_held(0, 1);
    let frozen = world.controller().freeze().unwrap();
    assert!(frozen.wait(Some(PATIENCE)));
    let streams = frozen.streams(&SaveOptions::default()).unwrap();
    assert!(frozen.streams(&SaveOptions::default()).is_err(), "the first are still there");
    let names: Vec<_> = streams.iter().map(|it| (it.name.as_str(), it.index)).collect();
    assert_eq!(names, [("scsi", 0), ("scsi/0", 0)]);
    let first = write(streams);
    assert!(first == save(&frozen), "the same state, the same bytes");
    // However small the buffers are.
    let mut bytewise = Vec::new();
    for mut stream in frozen.streams(&SaveOptions::default()).unwrap() {
        use kmcl::Save;
        let mut bytes = Vec::new();
        let mut room = 1;
        loop {
            let mut buffer = vec![0; room];
            let step = stream.save.step(&mut buffer).unwrap();
            bytes.extend_from_slice(&buffer[..step.written]);
            if step.done {
                break;
            }
            assert!(step.needed > room - step.written);
            room += 7;
        }
        bytewise.push(bytes);
    }
    assert!(bytewise == first);
    frozen.thaw();
    assert_eq!(statuses(&world.finish()), [SrbStatus::SUCCESS]);
}

#[test]
fn a_paused_controller_has_nothing_in_flight_and_moves_as_well() {
    let mut world = World::new();
    world.open_sub_channels(2);
    world.medium.set_fate(Fate::after(10 * MS));
    for block in 0..20 {
        world.write(block * 4, 4, 9);
    }
    world.until_held(0, 20);
    let mut paused = world.controller().pause().unwrap();
    assert!(paused.pending() > 0);
    assert!(!paused.wait(Some(MS)));
    assert!(paused.streams(&SaveOptions::default()).is_err());
    world.medium.advance(10 * MS);
    assert!(paused.wait(Some(PATIENCE)));
    until("the answers leave before the pause is complete", || world.answered().len() == 20);
    let number = world.write(100, 4, 8); // stays in the ring
    let streams = write(paused.streams(&SaveOptions::default()).unwrap());
    drop(streams);
    paused.resume();
    until("it goes on", || {
        world.process();
        world.medium.advance(10 * MS);
        world.answered().iter().any(|(answered, _)| *answered == number)
    });
    // And once more, elsewhere.
    let mut paused = world.controller().pause().unwrap();
    assert!(paused.wait(Some(PATIENCE)));
    let number = world.write(200, 4, 8);
    let streams = write(paused.streams(&SaveOptions::default()).unwrap());
    // A paused channel has no other way to leave quietly than to be frozen.
    std::mem::drop(paused);
    let frozen = world.controller().freeze().unwrap();
    frozen.move_away();
    drop(world.server.take());
    world.server = Some(Server::restore(&world.bus, &world.medium, &streams));
    until("the request in the ring", || {
        world.medium.advance(10 * MS);
        world.answered().iter().any(|(answered, _)| *answered == number)
    });
}

#[test]
fn a_controller_that_is_dropped_ends_its_freeze_and_its_pause() {
    for pauses in [false, true] {
        let mut world = World::new();
        world.medium.set_fate(Fate::after(10 * MS));
        world.write(0, 4, 1);
        world.until_held(0, 1);
        let server = world.server.take().unwrap();
        if pauses {
            let paused = server.controller.pause().unwrap();
            world.medium.advance(10 * MS);
            drop(server);
            drop(paused);
        } else {
            let frozen = server.controller.freeze().unwrap();
            world.medium.set_fate(Fate::after(Duration::ZERO));
            drop(server);
            assert_eq!(frozen.running(), 0);
            drop(frozen);
        }
        until("the guest is not told", || {
            world.process();
            world.guests[0].channel.state() == ChannelState::Closed
                || world.guests[0].channel.state() == ChannelState::Disabled
        });
    }
}

#[test]
fn a_controller_that_nobody_has_opened_moves_too() {
    // Never opened, and opened and closed again.
    for was_open in [false, true] {
        let bus = kmcl::loopback::LoopbackBus::new(16 << 20).unwrap();
        let medium = TestMedium::new(DISK_BYTES, TestTime::Simulated).unwrap();
        let server = Server::new(&bus, &medium, 4);
        if was_open {
            drop(Guest::ready(&bus, ProtocolVersion::WIN10));
            until("it is not closed", || {
                server.controller.channel().unwrap().state() == ChannelState::Closed
            });
        }
        let frozen = server.controller.freeze().unwrap();
        let streams = save(&frozen);
        frozen.move_away();
        drop(server);
        let _server = Server::restore(&bus, &medium, &streams);
        let guest = Guest::ready(&bus, ProtocolVersion::WIN10);
        assert!(guest.can_read(LUN0), "was open: {was_open}");
    }
}

#[test]
fn a_guest_that_starts_over_after_a_move_finds_a_fresh_controller() {
    let mut world = World::new();
    world.open_sub_channels(1);
    let frozen = world.controller().freeze().unwrap();
    world.go_elsewhere(frozen);
    until("the restored channel is not at work", || {
        world.process();
        world.is_active()
    });
    world.guests.clear(); // closes the channels
    let guest = Guest::open(&world.bus, 0);
    // Nothing is agreed on any more.
    let early = guest.call(&VstorPacket::request(Operation::END_INITIALIZATION));
    assert_eq!(early.status(), NtStatus::INVALID_DEVICE_STATE);
    guest.initialise(ProtocolVersion::WIN8);
    assert!(guest.can_read(LUN0));
    drop(guest);
}

// ---- What was agreed on ------------------------------------------------------------------------------

#[test]
fn every_step_of_the_initialisation_survives() {
    let version = ProtocolVersion::WIN10;
    let query = VstorPacket::request(Operation::QUERY_PROTOCOL_VERSION);
    let steps = [
        VstorPacket::request(Operation::BEGIN_INITIALIZATION),
        query.with_body(&ProtocolVersionBody::new(version)),
        VstorPacket::request(Operation::QUERY_PROPERTIES),
        VstorPacket::request(Operation::END_INITIALIZATION),
    ];
    for done in 0..=steps.len() {
        let bus = kmcl::loopback::LoopbackBus::new(16 << 20).unwrap();
        let medium = TestMedium::new(DISK_BYTES, TestTime::Simulated).unwrap();
        let mut server = Server::new(&bus, &medium, 4);
        let guest = Guest::open(&bus, 0);
        let call = |server: &Server, step: &VstorPacket| {
            // See `World::process`.
            let done = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        server.driver.process();
                        std::thread::sleep(Duration::from_micros(100));
                    }
                });
                let answer = guest.call(step);
                done.store(true, std::sync::atomic::Ordering::Relaxed);
                answer
            })
        };
        for step in &steps[..done] {
            assert_eq!(call(&server, step).status(), NtStatus::SUCCESS);
        }
        let frozen = server.controller.freeze().unwrap();
        let streams = save(&frozen);
        frozen.move_away();
        drop(server);
        server = Server::restore(&bus, &medium, &streams);
        // Neither further than it was, nor less far.
        if let Some(skipped) = steps.get(done + 1) {
            let answer = call(&server, skipped);
            assert_eq!(answer.status(), NtStatus::INVALID_DEVICE_STATE, "after {done} steps");
        }
        for step in &steps[done..] {
            assert_eq!(call(&server, step).status(), NtStatus::SUCCESS, "after {done} steps");
        }
        drop(guest);
    }
}

#[test]
fn subchannels_survive_and_are_granted_once() {
    use vstor_wire::protocol::SubChannelRequest;
    use zerocopy::little_endian::U16;
    let mut world = World::new();
    world.open_sub_channels(2);
    let frozen = world.controller().freeze().unwrap();
    let streams = world.go_elsewhere(frozen);
    assert_eq!(streams.len(), 4);
    let create = VstorPacket::request(Operation::CREATE_SUB_CHANNELS)
        .with_body(&SubChannelRequest { count: U16::new(1) });
    let number = world.send(0, &create, 0, &[]);
    world.ask_on(2, Command::write(0, 1, false), DataDirection::Out, 512, &[5; 512]);
    until("no answer", || {
        world.process();
        world.raw_answers().len() == 2
    });
    let status = |wanted| {
        let answers = world.raw_answers();
        let (_, payload) = answers.iter().find(|(number, _)| *number == wanted).unwrap();
        VstorPacket::parse(payload).unwrap().0.status()
    };
    assert_eq!(status(number), NtStatus::INVALID_DEVICE_STATE);
    assert_eq!(status(number + 1), NtStatus::SUCCESS);
    assert_eq!(world.byte(0), 5);
}

#[test]
fn notices_that_wait_for_room_in_the_ring_survive() {
    for moves in [false, true] {
        let mut world = World::new();
        let channel = world.controller().channel().unwrap();
        let coming_and_going =
            disk(TestMedium::new(4096, TestTime::Simulated).unwrap().backend().unwrap());
        let mut said = 0;
        while channel.outgoing_in_use().0 < 20 {
            world.controller().attach(LUN1, coming_and_going.clone()).unwrap();
            until("the disk is free again", || {
                let _ = world.controller().detach(LUN1);
                !coming_and_going.is_attached()
            });
            said += 2;
        }
        let frozen = world.controller().freeze().unwrap();
        if moves {
            world.go_elsewhere(frozen);
        } else {
            frozen.thaw();
        }
        until("notices are lost", || {
            world.process();
            world.guests[0].notices.count() == said
        });
    }
}

#[test]
fn a_unit_attention_and_a_notice_survive() {
    for moves in [false, true] {
        let mut world = World::new();
        let read = || Command::read(0, 1);
        // A second disk, which the guest is told of, and whose neighbours report it.
        let second = TestMedium::new(DISK_BYTES, TestTime::Simulated).unwrap();
        world.controller().attach(LUN1, disk(second.backend().unwrap())).unwrap();
        let frozen = world.controller().freeze().unwrap();
        if moves {
            let streams = save(&frozen);
            frozen.move_away();
            drop(world.server.take());
            let driver = WorkerDriver::new();
            let mut restoring = restoring(&world.bus, &driver, streams[0].as_slice());
            assert_eq!(restoring.disks().len(), 2);
            // In either order; without reports of their own.
            let backend = world.medium.backend().unwrap();
            restoring.attach(LUN1, disk(second.backend().unwrap())).unwrap();
            restoring.attach(LUN0, disk(backend.clone())).unwrap();
            restoring.enable().unwrap();
            restoring.restore_channel(0, streams[1].as_slice()).unwrap();
            let controller = restoring.start().unwrap();
            world.server = Some(Server { controller, driver, backend });
        } else {
            frozen.thaw();
        }
        until("the guest is not told", || {
            world.process();
            world.guests[0].notices.count() == 1
        });
        let first = world.ask(read(), DataDirection::In, 512, &[]);
        let again = world.ask(read(), DataDirection::In, 512, &[]);
        let answers = world.finish();
        let attention = sense(&answers[first].1).unwrap();
        assert_eq!((attention.code.asc, attention.code.ascq), (0x3f, 0x0e), "moved: {moves}");
        assert_eq!(answers[again].1.srb_status, SrbStatus::SUCCESS, "moved: {moves}");
    }
}

// ---- Resets ------------------------------------------------------------------------------------------

fn reset() -> VstorPacket {
    let srb =
        ScsiRequest::new(LUN0, &Command::TestUnitReady.encode().unwrap(), DataDirection::None, 0);
    VstorPacket::request(Operation::RESET_LUN).with_body(&srb)
}

#[test]
fn what_a_reset_waits_for_is_aborted_by_a_freeze() {
    for moves in [false, true] {
        let mut world = World::new();
        world.medium.set_fate(Fate::after(10 * MS));
        world.write(0, 4, 1);
        world.write(8, 4, 2);
        world.until_held(0, 2);
        let number = world.send(0, &reset(), 0, &[]);
        until("the reset never came", || {
            world.process();
            world.controller().channel().unwrap().incoming_outstanding() == 3
        });
        let frozen = world.controller().freeze().unwrap();
        assert!(frozen.wait(Some(PATIENCE)));
        assert_eq!((frozen.running(), frozen.unfinished()), (0, 0));
        if moves {
            world.go_elsewhere(frozen);
        } else {
            frozen.thaw();
        }
        until("no answers", || {
            world.process();
            world.raw_answers().len() == 3
        });
        for (answered, payload) in world.raw_answers() {
            let (answer, _) = VstorPacket::parse(&payload).unwrap();
            assert_eq!(answer.status(), NtStatus::SUCCESS);
            if answered != number {
                let srb: ScsiRequest = answer.body();
                assert_eq!(srb.srb_status.code(), SrbStatus::ABORTED, "moved: {moves}");
            }
        }
        world.medium.advance(100 * MS);
        assert_eq!((world.byte(0), world.byte(8 * 512)), (0xff, 0xff), "nothing of them landed");
    }
}

#[test]
fn requests_that_come_again_behind_a_reset_on_another_channel_are_aborted() {
    let mut world = World::new();
    world.open_sub_channels(1);
    world.medium.set_fate(Fate::after(10 * MS));
    let write = Command::write(0, 4, false);
    let number = world.ask_on(1, write, DataDirection::Out, 2048, &[3; 2048]);
    world.until_held(0, 1);
    let frozen = world.controller().freeze().unwrap();
    let streams = save(&frozen);
    frozen.move_away();
    drop(world.server.take());
    // Only the primary channel is looked at, until the reset is answered: the request comes later.
    let driver = WorkerDriver::new();
    let mut restoring = restoring(&world.bus, &driver, streams[0].as_slice());
    let backend = world.medium.backend().unwrap();
    restoring.attach(LUN0, disk(backend.clone())).unwrap();
    let late = restoring.channel(1).unwrap();
    driver.worker.remove(&late);
    restoring.enable().unwrap();
    for (index, stream) in (0..).zip(&streams[1..]) {
        restoring.restore_channel(index, stream.as_slice()).unwrap();
    }
    let primary = restoring.channel(0).unwrap();
    let controller = restoring.start().unwrap();
    let reset = world.send(0, &reset(), 0, &[]);
    until("the reset is not answered", || {
        primary.process(256);
        world.guests[0].channel.process(256);
        world.raw_answers().iter().any(|(answered, _)| *answered == reset)
    });
    driver.worker.add(&late).unwrap();
    world.server = Some(Server { controller, driver, backend });
    let answers = {
        until("no answer", || {
            world.process();
            world.raw_answers().len() == 2
        });
        world.raw_answers()
    };
    let (_, payload) = answers.iter().find(|(answered, _)| *answered == number).unwrap();
    let srb: ScsiRequest = VstorPacket::parse(payload).unwrap().0.body();
    assert_eq!(srb.srb_status.code(), SrbStatus::ABORTED);
    world.medium.advance(100 * MS);
    assert_eq!(world.byte(0), 0xff);
}

// ---- Disks -------------------------------------------------------------------------------------------

#[test]
fn requests_of_a_disk_that_went_do_not_reach_the_next_one() {
    let mut world = World::new();
    world.medium.set_fate(Fate::after(10 * MS));
    let number = world.write(0, 4, 1);
    world.until_held(0, 1);
    world.controller().detach(LUN0).unwrap();
    let next = TestMedium::new(DISK_BYTES, TestTime::Simulated).unwrap();
    world.controller().attach(LUN0, disk(next.backend().unwrap())).unwrap();
    let frozen = world.controller().freeze().unwrap();
    assert!(frozen.wait(Some(PATIENCE)));
    frozen.thaw();
    let answers = world.finish();
    assert_eq!(answers[number].1.srb_status.code(), SrbStatus::INVALID_LUN);
    world.medium.advance(100 * MS);
    let mut byte = [0];
    next.contents().read(0, &mut byte).unwrap();
    assert_eq!((world.byte(0), byte), (0xff, [0]));
}

#[test]
fn another_disk_is_refused_with_a_line_for_each_difference() {
    let mut world = World::new();
    let frozen = world.controller().freeze().unwrap();
    let streams = save(&frozen);
    frozen.move_away();
    drop(world.server.take());
    let driver = WorkerDriver::new();
    let mut restoring = restoring(&world.bus, &driver, streams[0].as_slice());
    let medium = |bytes| TestMedium::new(bytes, TestTime::Simulated).unwrap();
    let options =
        |serial: &str, sector_bytes| DiskOptions { sector_bytes, ..DiskOptions::new(serial) };
    let copy = medium(DISK_BYTES);
    copy.contents().fill(0, DISK_BYTES, 0xff).unwrap();
    let longer = medium(DISK_BYTES * 2);
    longer.contents().fill(0, DISK_BYTES, 0xff).unwrap();
    for (medium, options, count) in [
        (&copy, options("other", 512), 1),
        (&copy, options("moving", 4096), 1),
        (&longer, options("moving", 512), 1),
        (&medium(DISK_BYTES), options("moving", 512), 1),
        (&medium(DISK_BYTES * 2), options("x", 4096), 4),
    ] {
        let disk = Disk::new(medium.backend().unwrap(), &options).unwrap();
        let refused = restoring.attach(LUN0, Arc::clone(&disk)).unwrap_err();
        let AttachError::Differs { address: LUN0, differences } = &refused else {
            panic!("{refused}")
        };
        assert_eq!(differences.len(), count, "{refused}");
        assert!(!disk.is_attached());
    }
    let blank = disk(medium(DISK_BYTES).backend().unwrap());
    let refused = restoring.attach(LUN0, blank).unwrap_err();
    assert!(matches!(
        refused,
        AttachError::Differs { differences, .. }
            if matches!(differences.as_slice(), [DiskDifference::Contents { .. }])
    ));
    // Not there at all.
    let elsewhere = restoring.attach(LUN1, disk(copy.backend().unwrap()));
    assert!(matches!(elsewhere, Err(AttachError::NotSaved { address: LUN1 })));
    let missing = restoring.enable().unwrap_err();
    assert!(matches!(missing, EnableError::DisksMissing { first: LUN0, .. }), "{missing}");
    // A true copy will do: nobody can tell it apart.
    restoring.attach(LUN0, disk(copy.backend().unwrap())).unwrap();
    assert!(restoring.disks()[0].is_attached());
    restoring.enable().unwrap();
    let incomplete = restoring.start().unwrap_err();
    assert_eq!(incomplete.index, 0);
}

#[test]
fn the_fingerprint_is_that_of_the_moment_of_the_save() {
    let mut world = World::new();
    // The first bytes change, while the controller works and before it is saved.
    world.write(2, 4, 0x42);
    world.finish();
    let frozen = world.controller().freeze().unwrap();
    let streams = world.go_elsewhere(frozen); // attaches the same medium again
    // Somebody writes there behind the controller's back, and it is another disk.
    let frozen = world.controller().freeze().unwrap();
    frozen.move_away();
    drop(world.server.take());
    world.medium.contents().fill(100, 1, 1).unwrap();
    let driver = WorkerDriver::new();
    let mut restoring = restoring(&world.bus, &driver, streams[0].as_slice());
    let disk = disk(world.medium.backend().unwrap());
    assert!(matches!(restoring.attach(LUN0, disk), Err(AttachError::Differs { .. })));
}
