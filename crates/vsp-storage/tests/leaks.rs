//! What is left of a process's descriptors, threads and memory afterwards: nothing. One test, because
//! it counts what the whole process has.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::path::Path;

use common::{Guest, Host, LUN0, ram, until};
use vmbus_memory::GuestMemory;
use vsp_storage::block::{
    Buffers, CacheMode, Engine, FileOptions, ImageError, IoOperation, IoRequest, open_file,
};
use vstor_wire::packet::{Operation, VstorPacket};
use vstor_wire::protocol::ProtocolVersion;
use vstor_wire::scsi::cdb::Command;
use vstor_wire::srb::{DataDirection, ScsiRequest};

/// Descriptors and threads of this process. The kernel's own threads for io_uring show up among a
/// process's too, and leave when they like.
fn resources() -> (usize, usize) {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let threads = tasks.filter(|task| {
        let path = task.as_ref().unwrap().path().join("comm");
        std::fs::read_to_string(path).is_ok_and(|name| !name.starts_with("iou-"))
    });
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    (descriptors, threads.count())
}

fn options(engine: Engine, cache: CacheMode) -> FileOptions {
    FileOptions { engine, cache, ..FileOptions::default() }
}

const ENGINES: [(Engine, CacheMode); 4] = [
    (Engine::IoUring, CacheMode::Direct),
    (Engine::IoUring, CacheMode::Buffered),
    (Engine::Threads(3), CacheMode::Direct),
    (Engine::Threads(3), CacheMode::Buffered),
];

#[test]
fn nothing_is_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    // What the process makes once is made before the count.
    back_ends_dropped_at_work(&path);
    let before = resources();
    for _ in 0..3 {
        back_ends_dropped_at_work(&path);
    }
    assert_eq!(resources(), before, "back ends dropped in the middle of their work");
    for (engine, cache) in ENGINES {
        guests_that_come_and_go(&path, engine, cache);
    }
    assert_eq!(resources(), before, "controllers closed");
    a_thousand_lies();
    assert_eq!(resources(), before, "a guest that lied");
}

fn back_ends_dropped_at_work(path: &Path) {
    for (engine, cache) in ENGINES {
        let backend = match open_file(path, &options(engine, cache)) {
            Err(ImageError::Resources { .. }) if engine == Engine::IoUring => continue,
            opened => opened.unwrap(),
        };
        let memory = GuestMemory::memfd(4 << 20).unwrap();
        let mut requests = (0..500u64)
            .map(|i| {
                let mut buffers = Buffers::new();
                buffers.set(&memory, [(i * 4096 + i % 2, 2048)], 2048).unwrap();
                let verify = i % 7 == 0;
                let operation =
                    if verify { IoOperation::Verify } else { IoOperation::Write { fua: false } };
                IoRequest { token: i, operation, offset: i * 2048, bytes: 2048, buffers }
            })
            .collect();
        backend.submit(&mut requests, &mut Vec::new());
    }
}

fn guests_that_come_and_go(path: &Path, engine: Engine, cache: CacheMode) {
    let backend = match open_file(path, &options(engine, cache)) {
        Err(ImageError::Resources { .. }) if engine == Engine::IoUring => return,
        opened => opened.unwrap(),
    };
    let mut host = Host::with_disk(2, backend);
    for round in 0..5u64 {
        let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
        for i in 0..round {
            let write = Command::write(i * 64, 64, false);
            guest.send_command(LUN0, write, DataDirection::Out, 32768);
        }
    }
    host.controller.take().unwrap().close();
}

fn a_thousand_lies() {
    let host = Host::with_disk(2, ram(1 << 20));
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    assert!(guest.can_read(LUN0));
    let before = (resources(), host.bus.free_pages());
    let cdb = Command::read(0, 1).encode().unwrap();
    let all_answered = || {
        until("the lies were never answered", || {
            guest.channel.process(64);
            guest.channel.outgoing_in_use() == (0, 0)
        });
    };
    for i in 0..1000usize {
        let srb = ScsiRequest::new(LUN0, &cdb, DataDirection::In, 512);
        let mut packet = VstorPacket::request(Operation::EXECUTE_SRB).with_body(&srb);
        packet.body[i % 52] ^= 0xff;
        guest.send(&packet, 512);
        if i % 16 == 0 {
            all_answered();
        }
    }
    all_answered();
    assert_eq!(host.controller().in_flight(), (0, 0));
    until("the host has packets of answered requests", || {
        host.channel().incoming_outstanding() == 0
    });
    let ((descriptors, threads), pages) = (resources(), host.bus.free_pages());
    // The guest's channel makes an eventfd of its own when it has to sleep for the first time.
    assert!(descriptors <= before.0.0 + 1, "{descriptors} descriptors, were {}", before.0.0);
    assert_eq!((threads, pages), (before.0.1, before.1));
}
