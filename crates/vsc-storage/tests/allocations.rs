//! A request allocates nothing, from its submission to its end: counted, with both ends on one
//! thread.
#![allow(unsafe_code, reason = "an allocator that counts has to be an allocator")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod raw;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use vsc_storage::Request;
use vsc_storage::wire::scsi::cdb::Command;
use vsc_storage::wire::srb::ScsiAddress;

struct Counting;

std::thread_local! {
    /// Of this thread alone: the test harness has others.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator, unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the promises that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System`, as `alloc` shows, with the same layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_request_allocates_nothing() {
    let (mut client, mut server) = raw::connected();
    let mut buffers: Vec<_> = (0..16).map(|_| client.allocate(4096).unwrap()).collect();
    let mut round = |client: &mut vsc_storage::StorageClient, server: &mut raw::RawServer| {
        let mut lba = 0;
        let sent = client.submit_each(|| {
            let buffer = buffers.pop()?;
            lba += 1;
            let cdb = Command::read(lba, 8).encode().ok()?;
            Some(Request::new(ScsiAddress::default(), cdb).reading(buffer, 0, 4096).with_token(lba))
        });
        assert_eq!(sent.unwrap(), 16);
        server.succeed_all(4096);
        client.process().unwrap();
        while let Some(completion) = client.next_completion() {
            assert_eq!(completion.result, Ok(4096));
            buffers.push(completion.buffer.unwrap());
        }
        assert_eq!(buffers.len(), 16);
    };
    for _ in 0..4 {
        round(&mut client, &mut server); // whatever is made once is made here
    }
    let before = ALLOCATIONS.get();
    for _ in 0..1000 {
        round(&mut client, &mut server);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0, "allocations for 16000 requests");
}
