//! Real disks, frozen and moved again and again while a guest writes: through io_uring and through
//! threads, past the page cache and through it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::fs;
use std::sync::Arc;

use kmcl::bus::Bus;
use kmcl::loopback::LoopbackBus;
use vsp_storage::ScsiController;
use vsp_storage::block::{Backend, CacheMode, Engine, FileOptions, ImageError, open_file};
use vstor_wire::scsi::cdb::{CdbForm, Command, Extent};
use vstor_wire::srb::{DataDirection, SrbStatus};

use common::world::{World, config, disk, restoring, save};
use common::{LUN0, PATIENCE, WorkerDriver};

const DISK_BYTES: usize = 4 << 20;

/// A request in each slot of 8 sectors: every fourth one is given back, every seventh one flushed.
fn ask(world: &mut World, slot: u64, stamp: u8, expected: &mut [u8]) {
    let (block, at) = (slot * 8, usize::try_from(slot * 4096).unwrap());
    let range = &mut expected[at..at + 4096];
    match slot % 8 {
        3 => {
            let extent = Extent { form: CdbForm::Sixteen, lba: block, blocks: 8 };
            let same = Command::WriteSame { extent, unmap: true, no_data: true };
            world.ask(same, DataDirection::None, 0, &[]);
            range.fill(0);
        }
        5 => {
            let extent = Extent { form: CdbForm::Sixteen, lba: block, blocks: 8 };
            let same = Command::WriteSame { extent, unmap: false, no_data: false };
            world.ask(same, DataDirection::Out, 512, &[stamp; 512]);
            range.fill(stamp);
        }
        7 => drop(world.flush()),
        other => {
            let command = Command::write(block, 8, other == 2);
            world.ask(command, DataDirection::Out, 4096, &[stamp; 4096]);
            range.fill(stamp);
        }
    }
}

#[test]
fn requests_of_real_disks_move_with_their_controller() {
    for (engine, cache) in [
        (Engine::IoUring, CacheMode::Direct),
        (Engine::IoUring, CacheMode::Buffered),
        (Engine::Threads(2), CacheMode::Direct),
        (Engine::Threads(2), CacheMode::Buffered),
    ] {
        let name = format!("{engine:?} {cache:?}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        fs::write(&path, vec![0xee; DISK_BYTES]).unwrap();
        let open = || -> Option<Arc<dyn Backend>> {
            match open_file(&path, &FileOptions { engine, cache, ..FileOptions::default() }) {
                Ok(backend) => Some(backend),
                Err(ImageError::Resources { errno, .. }) => {
                    eprintln!("skipped: {name} is refused here: {errno}");
                    None
                }
                Err(error) => panic!("{error}"),
            }
        };
        let Some(backend) = open() else { continue };
        let mut world = World::new();
        world.controller().detach(LUN0).unwrap();
        world.controller().attach(LUN0, disk(backend)).unwrap();
        let mut expected = vec![0xee; DISK_BYTES];
        let (mut moved, mut finished) = (0, 0);
        for round in 0..24u8 {
            for slot in 0..32 {
                let slot = (u64::from(round) * 32 + slot) % 1024;
                ask(&mut world, slot, round + 1, &mut expected);
            }
            // As far as it has come.
            for _ in 0..round % 4 {
                world.process();
            }
            let frozen = world.controller().freeze().unwrap();
            assert!(frozen.wait(Some(PATIENCE)), "{name}");
            moved += frozen.unfinished();
            if round % 3 == 0 {
                frozen.thaw();
            } else {
                let streams = save(&frozen);
                frozen.move_away();
                let old = world.server.take().unwrap();
                let medium = old.backend.clone();
                drop(old);
                // The image is locked: it can be opened when the former server has gone.
                let driver = WorkerDriver::new();
                let mut restoring = restoring(&world.bus, &driver, streams[0].as_slice());
                restoring.attach(LUN0, disk(open().unwrap())).unwrap();
                restoring.enable().unwrap();
                restoring.restore_channel(0, streams[1].as_slice()).unwrap();
                let controller = restoring.start().unwrap();
                world.server = Some(common::world::Server { controller, driver, backend: medium });
            }
            // The first commands after a disk has come or gone are refused once, and not performed.
            finished = world.finish().len();
        }
        let answers = world.finish();
        let refused = answers.iter().filter(|(_, srb)| srb.srb_status != SrbStatus::SUCCESS);
        assert_eq!(refused.count(), 0, "{name}");
        assert_eq!(finished, 24 * 32, "{name}");
        eprintln!("{name}: {moved} requests moved");
        drop(world);
        assert!(fs::read(&path).unwrap() == expected, "{name}");
    }
}

#[test]
fn an_image_that_another_process_serves_is_not_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    fs::write(&path, [0; 65536]).unwrap();
    let bus = LoopbackBus::new(1 << 20).unwrap() as Arc<dyn Bus>;
    let controller = ScsiController::new(bus, WorkerDriver::new(), config(0)).unwrap();
    controller.attach(LUN0, disk(open_file(&path, &FileOptions::default()).unwrap())).unwrap();
    let second = open_file(&path, &FileOptions::default());
    assert!(matches!(second, Err(ImageError::InUse { .. })));
}
