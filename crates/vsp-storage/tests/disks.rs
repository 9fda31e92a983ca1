//! Real disks, served to the client of `vsc-storage`.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Gate, Guest, Host, LUN0, disk, ram, sense, until};
use vsc_storage::{ClientConfig, Error, Notice, ScsiError, StorageClient};
use vsp_storage::block::{Backend, CacheMode, Engine, FileOptions, ImageError, open_file};
use vsp_storage::{ControllerError, LunError, ScsiAddress};
use vstor_wire::protocol::ProtocolVersion;
use vstor_wire::scsi::cdb::Command;
use vstor_wire::scsi::sense::SenseKey;
use vstor_wire::srb::DataDirection;

const DISK_BYTES: usize = 2 << 20;

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 7 + i / 512 + seed * 13) % 251).to_le_bytes()[0]).collect()
}

fn image(folder: &Path, name: &str, contents: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, contents).unwrap();
    path
}

fn file(path: &Path, engine: Engine, cache: CacheMode) -> Option<Arc<dyn Backend>> {
    let options = FileOptions { engine, cache, ..FileOptions::default() };
    match open_file(path, &options) {
        Err(ImageError::Resources { errno, .. }) if engine == Engine::IoUring => {
            eprintln!("skipped: io_uring is refused here: {errno}");
            None
        }
        opened => Some(opened.unwrap()),
    }
}

fn client(host: &Host, sub_channels: u16) -> StorageClient {
    let mut config = ClientConfig::default();
    config.sub_channels = sub_channels;
    StorageClient::connect(host.bus.clone(), config).unwrap()
}

#[test]
fn a_disk_is_read_and_written_whole() {
    let folder = tempfile::tempdir().unwrap();
    for (engine, cache, sub_channels) in [
        (Engine::IoUring, CacheMode::Direct, 0),
        (Engine::IoUring, CacheMode::Direct, 3),
        (Engine::IoUring, CacheMode::Buffered, 1),
        (Engine::Threads(4), CacheMode::Direct, 2),
        (Engine::Threads(1), CacheMode::Buffered, 0),
    ] {
        let case = format!("{engine:?} {cache:?} {sub_channels}");
        let old = pattern(1, DISK_BYTES);
        let path = image(folder.path(), "disk.img", &old);
        let Some(backend) = file(&path, engine, cache) else { continue };
        let host = Host::with_disk(4, backend);
        let mut client = client(&host, sub_channels);
        assert_eq!(client.properties().unwrap().sub_channels, sub_channels, "{case}");
        let disks = client.scan().unwrap();
        assert_eq!(disks.len(), 1, "{case}");
        assert_eq!(disks[0].bytes(), DISK_BYTES as u64, "{case}");
        let mut data = vec![0; DISK_BYTES];
        client.read(&disks[0], 0, &mut data).unwrap();
        assert!(data == old, "{case}");
        let new = pattern(2, DISK_BYTES);
        client.write(&disks[0], 0, &new).unwrap();
        client.flush(&disks[0]).unwrap();
        client.read(&disks[0], 0, &mut data).unwrap();
        assert!(data == new, "{case}");
        assert!(fs::read(&path).unwrap() == new, "{case}");
    }
}

#[test]
fn a_disk_that_shrinks_fails_alone() {
    let folder = tempfile::tempdir().unwrap();
    let contents = pattern(3, DISK_BYTES);
    let (short, whole) =
        (image(folder.path(), "short", &contents), image(folder.path(), "whole", &contents));
    let host = Host::new(0);
    let lun1 = ScsiAddress::new(0, 0, 1);
    for (address, path) in [(LUN0, &short), (lun1, &whole)] {
        let backend = file(path, Engine::Auto, CacheMode::Direct).unwrap();
        host.controller().attach(address, disk(backend, &address.to_string())).unwrap();
    }
    host.controller().offer().unwrap();
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    File::options().write(true).open(&short).unwrap().set_len(4096).unwrap();
    let read = |lun, block| guest.command(lun, Command::read(block, 8), DataDirection::In, 4096);
    assert_eq!(sense(&read(LUN0, 0)), None);
    let answer = read(LUN0, 8);
    let found = sense(&answer).unwrap();
    assert_eq!((found.key, found.code.asc, found.code.ascq), (SenseKey::MediumError, 0x11, 0));
    assert_eq!((found.information, answer.data_transfer_length.get()), (Some(8), 0));
    let flush = guest.command(LUN0, Command::synchronize_cache(), DataDirection::None, 0);
    assert_eq!(sense(&flush).unwrap().key, SenseKey::MediumError);
    for block in [0, 8, 4088] {
        assert_eq!(sense(&read(lun1, block)), None, "{block}");
    }
    let flush = guest.command(lun1, Command::synchronize_cache(), DataDirection::None, 0);
    assert_eq!(sense(&flush), None);
}

#[test]
fn unmap_and_write_same_reach_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "disk.img", &[0xff; DISK_BYTES]);
    let backend = file(&path, Engine::Auto, CacheMode::Direct).unwrap();
    let host = Host::with_disk(0, backend);
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    // Three ranges in one UNMAP, not in order.
    let mut list = vec![0, 54, 0, 48, 0, 0, 0, 0];
    for (lba, blocks) in [(64u64, 8u32), (0, 1), (1000, 100)] {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    guest.pages.slice().unwrap().write_at(0, &list).unwrap();
    let bytes = u16::try_from(list.len()).unwrap();
    let unmap = Command::Unmap { parameter_bytes: bytes };
    let answer = guest.command(LUN0, unmap, DataDirection::Out, bytes.into());
    assert_eq!((answer.srb_status.0, answer.scsi_status.0), (1, 0));
    let mut expected = vec![0xff; DISK_BYTES];
    for (block, blocks) in [(64, 8), (0, 1), (1000, 100)] {
        expected[block * 512..(block + blocks) * 512].fill(0);
    }
    assert!(fs::read(&path).unwrap() == expected);

    let extent = vstor_wire::scsi::cdb::Extent::new(16, 4);
    let same = Command::WriteSame { extent, unmap: false, no_data: false };
    guest.pages.slice().unwrap().write_at(0, &pattern(5, 512)).unwrap();
    let answer = guest.command(LUN0, same, DataDirection::Out, 512);
    assert_eq!((answer.srb_status.0, answer.scsi_status.0), (1, 0));
    for block in 16..20 {
        expected[block * 512..(block + 1) * 512].copy_from_slice(&pattern(5, 512));
    }
    assert!(fs::read(&path).unwrap() == expected);

    let compare = vstor_wire::scsi::cdb::ByteCheck::OneBlock;
    for (blocks, key) in [(4, None), (5, Some(SenseKey::Miscompare))] {
        let extent = vstor_wire::scsi::cdb::Extent::new(16, blocks);
        let verify = Command::Verify { extent, compare };
        let answer = guest.command(LUN0, verify, DataDirection::Out, 512);
        assert_eq!(sense(&answer).map(|found| found.key), key, "{blocks}");
        if let Some(found) = sense(&answer) {
            assert_eq!(found.information, Some(20));
        }
    }
}

#[test]
fn disks_come_and_go_while_a_guest_runs() {
    let host = Host::with_disk(0, ram(1 << 20));
    let mut client = client(&host, 0);
    let lun = ScsiAddress::new(0, 0, 7);
    assert_eq!(client.scan().unwrap().len(), 1);
    let extra = disk(ram(2 << 20), "extra");
    host.controller().attach(lun, Arc::clone(&extra)).unwrap();
    until("the guest was not told", || {
        client.process().unwrap();
        client.next_notice() == Some(Notice::EnumerateBus)
    });
    let disks = client.scan().unwrap();
    assert_eq!(disks.iter().map(|disk| disk.address).collect::<Vec<_>>(), [LUN0, lun]);
    let mut data = [1; 512];
    client.read(&disks[1], 0, &mut data).unwrap();
    assert_eq!(data, [0; 512]);

    assert!(extra.is_attached());
    let taken = host.controller().attach(ScsiAddress::new(0, 1, 0), Arc::clone(&extra));
    assert!(matches!(taken, Err(ControllerError::Lun(LunError::InUse { .. }))));
    let taken = host.controller().attach(lun, disk(ram(4096), "other"));
    assert!(matches!(taken, Err(ControllerError::Lun(LunError::Taken { .. }))));

    host.controller().detach(lun).unwrap();
    until("the guest was not told", || {
        client.process().unwrap();
        client.next_notice() == Some(Notice::EnumerateBus)
    });
    assert!(!extra.is_attached());
    let gone = client.read(&disks[1], 0, &mut data);
    assert!(matches!(gone, Err(Error::Scsi(ScsiError { .. }))), "{gone:?}");
    assert_eq!(client.scan().unwrap().len(), 1);
    assert!(matches!(host.controller().detach(lun), Err(LunError::Empty { .. })));
    // It may come back.
    host.controller().attach(lun, extra).unwrap();
    assert_eq!(client.scan().unwrap().len(), 2);
}

#[test]
fn a_detached_disk_is_free_when_its_last_request_has_ended() {
    let gate = Gate::new(1 << 20);
    let host = Host::with_disk(0, ram(1 << 20));
    let lun = ScsiAddress::new(0, 0, 1);
    let slow = disk(gate.clone(), "slow");
    host.controller().attach(lun, Arc::clone(&slow)).unwrap();
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    guest.send_command(lun, Command::write(0, 8, false), DataDirection::Out, 4096);
    until("the request never came", || gate.waiting() == 1);
    let detached = host.controller().detach(lun).unwrap();
    assert!(detached.is_attached() && host.driver.sources() == 1);
    let again = host.controller().attach(ScsiAddress::new(0, 0, 2), Arc::clone(&slow));
    assert!(matches!(again, Err(ControllerError::Lun(LunError::InUse { .. }))));
    gate.open();
    until("the disk was never free", || !detached.is_attached());
    until("its completions are still waited for", || host.driver.sources() == 0);
    drop((slow, detached));
    until("somebody still has the disk", || Arc::strong_count(&gate) == 1);
}

#[test]
fn an_image_is_free_when_its_controller_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "disk.img", &pattern(1, DISK_BYTES));
    for round in 0..3 {
        let backend = file(&path, Engine::Auto, CacheMode::Direct).unwrap();
        let mut host = Host::with_disk(2, backend);
        let mut client = client(&host, 2);
        let disks = client.scan().unwrap();
        client.read(&disks[0], 0, &mut vec![0; 65536]).unwrap();
        let in_use = open_file(&path, &FileOptions::default()).err();
        assert_eq!(in_use, Some(ImageError::InUse { path: path.clone() }), "{round}");
        host.controller.take().unwrap().close();
    }
    let contents = File::open(&path).unwrap();
    let mut first = [0; 512];
    contents.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first[..], pattern(1, 512));
}

#[test]
fn a_client_that_vanishes_leaves_a_host_that_takes_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "disk.img", &pattern(1, DISK_BYTES));
    let backend = file(&path, Engine::Auto, CacheMode::Direct).unwrap();
    let host = Host::with_disk(2, backend);
    for round in 0..20u32 {
        let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
        for i in 0..round % 7 {
            let block = u64::from(i) * 64;
            guest.send_command(
                LUN0,
                Command::write(block, 64, i % 2 == 0),
                DataDirection::Out,
                32768,
            );
        }
        drop(guest); // in the middle of it
    }
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    assert!(guest.can_read(LUN0));
    assert_eq!(host.controller().in_flight(), (0, 0));
}
