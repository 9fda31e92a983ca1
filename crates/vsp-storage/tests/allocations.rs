//! Requests allocate nothing on their way, once as many were in flight before.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a counting allocator, in a test"
)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Host, LUN0, PATIENCE, ram};
use vsc_storage::{ClientConfig, Request, StorageClient};
use vsp_storage::block::{Backend, CacheMode, Engine, FileOptions, ImageError, open_file};
use vstor_wire::scsi::cdb::Command;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: passes everything on to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, new) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Requests in flight at a time.
const DEPTH: u64 = 16;

/// Moves `count` requests of 4 KiB, reads and writes in turn, `DEPTH` at a time.
fn run(client: &mut StorageClient, buffers: &mut Vec<vsc_storage::Buffer>, count: u64) {
    let (mut sent, mut ended) = (0, 0);
    while ended < count {
        while let Some(buffer) = (sent < count).then(|| buffers.pop()).flatten() {
            let lba = sent % 64 * 8;
            let request = if sent % 2 == 0 {
                Request::new(LUN0, Command::read(lba, 8).encode().unwrap()).reading(buffer, 0, 4096)
            } else {
                Request::new(LUN0, Command::write(lba, 8, false).encode().unwrap())
                    .writing(buffer, 0, 4096)
            };
            client.submit(request).unwrap();
            sent += 1;
        }
        client.wait_completion(PATIENCE).unwrap();
        while let Some(completion) = client.next_completion() {
            assert_eq!(completion.result, Ok(4096));
            buffers.push(completion.buffer.unwrap());
            ended += 1;
        }
    }
}

#[test]
fn requests_allocate_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let file = |engine, cache| -> Option<Arc<dyn Backend>> {
        let options = FileOptions { engine, cache, ..FileOptions::default() };
        match open_file(&path, &options) {
            Err(ImageError::Resources { .. }) if engine == Engine::IoUring => None,
            opened => Some(opened.unwrap()),
        }
    };
    type Open<'a> = &'a dyn Fn() -> Option<Arc<dyn Backend>>;
    let rows: [(&str, Open<'_>); 4] = [
        ("RAM", &|| Some(ram(1 << 20))),
        ("io_uring, direct", &|| file(Engine::IoUring, CacheMode::Direct)),
        ("io_uring, buffered", &|| file(Engine::IoUring, CacheMode::Buffered)),
        ("threads", &|| file(Engine::Threads(2), CacheMode::Direct)),
    ];
    for (name, open) in rows {
        let Some(backend) = open() else { continue };
        let host = Host::with_disk(0, backend);
        let mut config = ClientConfig::default();
        config.queue_depth = u16::try_from(DEPTH).unwrap();
        let mut client = StorageClient::connect(host.bus.clone(), config).unwrap();
        let mut buffers: Vec<_> = (0..DEPTH).map(|_| client.allocate(4096).unwrap()).collect();
        run(&mut client, &mut buffers, 2000);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        run(&mut client, &mut buffers, 5000);
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        // A vector that had never been so full may still grow, at most once for each of its kind.
        assert!(allocations <= 8, "{name}: {allocations} allocations in 5000 requests");
    }
}
