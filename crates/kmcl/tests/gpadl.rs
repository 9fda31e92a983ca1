//! GPADLs from both sides: VmbChannelCreateGpadlFromBuffer, CreateGpadlFromMdl, DeleteGpadl, MapGpadl,
//! UnmapGpadl.
//!
//! Source: kmcl-semantics section 11; D-56 to D-58.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::thread;

use common::raw::{RawBus, Said, as_bus};
use common::{Call, Device, Driver, Pair, client, in_time, lock, server, until};
use kmcl::bus::{BusEvent, GpadlPages, PageRange};
use kmcl::{Channel, ChannelState, Error, GpadlFlags, NtStatus};
use vmbus_wire::ranges::GpaRange;

const WRITE: GpadlFlags = GpadlFlags::empty();
const READ_ONLY: GpadlFlags = GpadlFlags::READ_ONLY;

fn one_range(byte_count: u32, byte_offset: u32, pfns: &[u64]) -> GpadlPages {
    let range = PageRange { byte_count, byte_offset, pfns: pfns.to_vec() };
    GpadlPages { ranges: vec![range], read_only: false }
}

/// A client of a bus in the hands of the test, Active.
fn raw_client() -> (Arc<RawBus>, Channel) {
    let bus = RawBus::new();
    let client = client(&as_bus(&bus), &Device::new());
    client.enable().unwrap();
    bus.offered(None);
    client.process(1);
    drop(bus.open_completed());
    client.process(1);
    bus.take_said();
    (bus, client)
}

/// A server of a bus in the hands of the test, Active.
fn raw_server() -> (Arc<RawBus>, Channel) {
    let bus = RawBus::new();
    let server = server(&as_bus(&bus), &Device::new());
    server.enable().unwrap();
    server.start();
    drop(bus.open(8, 8));
    server.process(1);
    bus.take_said();
    (bus, server)
}

// ---- Both ends --------------------------------------------------------------------------------------

/// Create on the client, map on the server: the pages are the client's, until the unmap; the handle
/// can be mapped again.
#[test]
fn pages_are_shared_while_they_are_mapped() {
    let pair = Pair::open(Device::new());
    let pages = pair.client.allocate_pages(3).unwrap();
    let gpadl = pair.client.create_gpadl_from_pages(WRITE, &pages).unwrap();
    for round in 0..3_u8 {
        let mapping = pair.server.map_gpadl(WRITE, gpadl).unwrap();
        let data = mapping.data().unwrap();
        assert_eq!(data.len(), 3 * 4096);
        assert_eq!(data.segments().collect::<Vec<_>>(), [(pages.gpa(), 3 * 4096)]);
        let mut byte = [0];
        pages.slice().unwrap().write_at(5000, &[round]).unwrap();
        data.read_at(5000, &mut byte).unwrap();
        assert_eq!(byte, [round]);
        data.write_at(9000, &[!round]).unwrap();
        pages.slice().unwrap().read_at(9000, &mut byte).unwrap();
        assert_eq!(byte, [!round]);
        pair.server.unmap_gpadl(gpadl);
    }
    pair.client.delete_gpadl(gpadl);
    let gone = pair.server.map_gpadl(WRITE, gpadl).err().unwrap();
    assert_eq!(gone.status(), NtStatus::INVALID_PARAMETER_3);
    drop(pages);
    pair.close();
}

/// D-56, D-57: write access to a GPADL created read-only is refused; a read-only view takes no writes.
#[test]
fn read_only_is_kept() {
    let pair = Pair::open(Device::new());
    let pages = pair.client.allocate_pages(1).unwrap();
    let plain = pair.client.create_gpadl_from_pages(WRITE, &pages).unwrap();
    let read_only = pair.client.create_gpadl_from_pages(READ_ONLY, &pages).unwrap();
    let refused = pair.server.map_gpadl(WRITE, read_only).err();
    assert_eq!(refused, Some(Error::ReadOnly));
    assert_eq!(Error::ReadOnly.status(), NtStatus::ACCESS_DENIED);
    for gpadl in [plain, read_only] {
        let mapping = pair.server.map_gpadl(READ_ONLY, gpadl).unwrap();
        let data = mapping.data().unwrap();
        assert_eq!(data.write_at(0, &[1]), Err(Error::ReadOnly));
        assert_eq!(data.read_at(0, &mut [0]), Ok(1));
        pair.server.unmap_gpadl(gpadl);
    }
    pair.client.delete_gpadl(plain);
    pair.client.delete_gpadl(read_only);
    drop(pages);
    pair.close();
}

/// VmbChannelDeleteGpadl blocks while the server has the GPADL mapped.
#[test]
fn delete_waits_for_the_unmap() {
    let pair = Pair::open(Device::new());
    let pages = pair.client.allocate_pages(1).unwrap();
    let gpadl = pair.client.create_gpadl_from_pages(WRITE, &pages).unwrap();
    let mapping = pair.server.map_gpadl(WRITE, gpadl).unwrap();
    let unmapped = Arc::new(Mutex::new(false));
    let deleting = thread::spawn({
        let (client, unmapped) = (pair.client.clone(), unmapped.clone());
        move || {
            client.delete_gpadl(gpadl);
            assert!(*lock(&unmapped), "deleted while it is mapped");
        }
    });
    mapping.data().unwrap().write_at(0, b"still mine").unwrap();
    *lock(&unmapped) = true;
    pair.server.unmap_gpadl(gpadl);
    in_time(move || deleting.join().unwrap());
    drop((mapping, pages));
    pair.close();
}

/// Section 11: the life of a GPADL is from Opened until inside Closed, on both sides, with and without
/// a driver.
#[test]
fn gpadls_may_be_handled_in_opened_and_closed() {
    for driven in [false, true] {
        let pair = Pair::new(Device::new());
        let handle = Arc::new(Mutex::new(None));
        let pages = Arc::new(Mutex::new(None));
        pair.driver.when({
            let (handle, pages) = (handle.clone(), pages.clone());
            move |channel, call| {
                match call {
                    Call::Opened => {
                        let run = channel.allocate_pages(1).unwrap();
                        let gpadl = channel.create_gpadl_from_pages(WRITE, &run).unwrap();
                        *lock(&handle) = Some(gpadl);
                        *lock(&pages) = Some(run);
                    }
                    Call::Closed => {
                        channel.delete_gpadl(lock(&handle).take().unwrap());
                        *lock(&pages) = None;
                    }
                    _ => {}
                }
                Ok(())
            }
        });
        let drivers = driven.then(|| [Driver::spawn(&pair.server), Driver::spawn(&pair.client)]);
        let pair = in_time(move || {
            pair.server.enable().unwrap();
            pair.server.start();
            pair.client.enable().unwrap();
            while !driven && pair.client.state() != ChannelState::Active {
                pair.pump();
            }
            pair.driver.wait_for(&Call::PostStarted);
            let gpadl = lock(&handle).unwrap();
            drop(pair.server.map_gpadl(READ_ONLY, gpadl).unwrap());
            pair.server.unmap_gpadl(gpadl);
            pair.client.disable();
            assert_eq!(*lock(&handle), None);
            pair
        });
        drop(drivers);
        pair.pump();
        pair.close();
    }
}

/// D-58: what Closed leaves behind the library undoes, on both sides and in any number; the next
/// opening works.
#[test]
fn gpadls_left_behind_are_undone() {
    let pair = Pair::open(Device::new());
    for round in 0..2 {
        let pages = pair.client.allocate_pages(1).unwrap();
        let gpadls: Vec<_> =
            (0..200).map(|_| pair.client.create_gpadl_from_pages(WRITE, &pages).unwrap()).collect();
        for &gpadl in &gpadls[..150] {
            pair.server.map_gpadl(WRITE, gpadl).unwrap();
        }
        pair.client.disable();
        pair.pump();
        for &gpadl in &gpadls {
            let gone = pair.server.map_gpadl(WRITE, gpadl).err().unwrap();
            assert_eq!(gone.status(), NtStatus::INVALID_DEVICE_STATE, "round {round}: closed");
        }
        let (client, server) = (pair.client.clone(), pair.server.clone());
        client.enable().unwrap();
        pair.pump();
        in_time(move || {
            let gpadl = client.create_gpadl_from_pages(WRITE, &pages).unwrap();
            server.map_gpadl(WRITE, gpadl).unwrap();
            server.unmap_gpadl(gpadl);
            client.delete_gpadl(gpadl);
            for gpadl in gpadls {
                let gone = server.map_gpadl(WRITE, gpadl).err().unwrap();
                assert_eq!(gone.status(), NtStatus::INVALID_PARAMETER_3, "round {round}: undone");
            }
        });
    }
    pair.close();
}

// ---- The client's side ------------------------------------------------------------------------------

type Create = fn(&Channel) -> Result<u32, Error>;

/// Two ranges of one and a half pages and 32 bytes.
const RANGES: [GpaRange<'_>; 2] = [
    GpaRange { byte_count: 0x1800, byte_offset: 0x400, pfns: &[10, 12] },
    GpaRange { byte_count: 0x20, byte_offset: 0xff0, pfns: &[20, 21] },
];

/// What the bus is asked to describe, for each way to create one; the call waits for the server's word.
#[test]
fn each_way_to_create_describes_its_pages() {
    /// Offset, length and pages of each range.
    type Ranges<'a> = &'a [(u32, u32, &'a [u64])];
    let whole: [(u32, u32, &[u64]); 2] = [(0x400, 0x1800, &[10, 12]), (0xff0, 0x20, &[20, 21])];
    let rows: [(Create, bool, Ranges<'_>); 6] = [
        (|c| c.create_gpadl_from_buffer(WRITE, 0x5000, 1), false, &[(0, 1, &[5])]),
        (
            |c| c.create_gpadl_from_buffer(WRITE, 0x5ffe, 0x1003),
            false,
            &[(0xffe, 0x1003, &[5, 6, 7])],
        ),
        (|c| c.create_gpadl_from_buffer(READ_ONLY, 0x5000, 0x1000), true, &[(0, 0x1000, &[5])]),
        (|c| c.create_gpadl_from_mdl(WRITE, &RANGES, 0, 0), false, &whole),
        (
            |c| c.create_gpadl_from_mdl(WRITE, &RANGES, 0xc00, 0),
            false,
            &[(0, 0xc00, &[12]), (0xff0, 0x20, &[20, 21])],
        ),
        (
            |c| c.create_gpadl_from_mdl(READ_ONLY, &RANGES, 0x17f8, 0x18),
            true,
            &[(0xbf8, 8, &[12]), (0xff0, 0x10, &[20])],
        ),
    ];
    let (bus, client) = raw_client();
    for (gpadl, (create, read_only, ranges)) in (1..).zip(rows) {
        let creating = thread::spawn({
            let client = client.clone();
            move || create(&client)
        });
        let range = |&(offset, count, pfns)| one_range(count, offset, pfns).ranges.remove(0);
        let expected = GpadlPages { ranges: ranges.iter().map(range).collect(), read_only };
        assert_eq!(bus.wait_said(), [Said::CreateGpadl(expected)]);
        assert!(bus.post(BusEvent::GpadlCreated { gpadl, status: NtStatus::SUCCESS }));
        assert_eq!(in_time(move || creating.join().unwrap()), Ok(gpadl));
    }
    client.disable();
    let torn_down: Vec<_> = (1..=6).map(Said::TeardownGpadl).collect();
    assert_eq!(bus.take_said(), [torn_down, vec![Said::Close]].concat(), "D-58");
}

/// Each refusal of the create functions with its status; nothing is asked of the bus.
#[test]
fn misuse_of_create_is_refused_with_its_status() {
    const NO_PAGE: [GpaRange<'_>; 1] = [GpaRange { byte_count: 8, byte_offset: 0, pfns: &[] }];
    let unknown: Create =
        |c| c.create_gpadl_from_buffer(GpadlFlags::from_bits_retain(2), 0x5000, 1);
    let rows: [(&str, Create, NtStatus); 8] = [
        ("unknown flag", unknown, NtStatus::INVALID_PARAMETER_2),
        (
            "no bytes",
            |c| c.create_gpadl_from_buffer(WRITE, 0x5000, 0),
            NtStatus::INVALID_PARAMETER_4,
        ),
        (
            "beyond the address space",
            |c| c.create_gpadl_from_buffer(WRITE, u64::MAX, 2),
            NtStatus::INVALID_PARAMETER,
        ),
        ("no range", |c| c.create_gpadl_from_mdl(WRITE, &[], 0, 0), NtStatus::INVALID_PARAMETER_4),
        (
            "a range without its page",
            |c| c.create_gpadl_from_mdl(WRITE, &NO_PAGE, 0, 0),
            NtStatus::INVALID_PARAMETER_3,
        ),
        (
            "offset behind the end",
            |c| c.create_gpadl_from_mdl(WRITE, &RANGES, 0x1820, 0),
            NtStatus::INVALID_PARAMETER_4,
        ),
        (
            "length behind the end",
            |c| c.create_gpadl_from_mdl(WRITE, &RANGES, 0, 0x1821),
            NtStatus::INVALID_PARAMETER_5,
        ),
        (
            "a server's map of it",
            |c| c.map_gpadl(WRITE, 1).map(|_| 0),
            NtStatus::INVALID_DEVICE_STATE,
        ),
    ];
    let (bus, client) = raw_client();
    for (what, create, status) in rows {
        assert_eq!(create(&client).unwrap_err().status(), status, "{what}");
    }
    client.disable();
    assert_eq!(bus.take_said(), [Said::Close]);
    for (what, create, _) in [rows[1], rows[5]] {
        assert!(create(&client).is_err(), "{what}");
    }
    let disabled = client.create_gpadl_from_buffer(WRITE, 0x5000, 1).unwrap_err();
    assert_eq!(disabled.status(), NtStatus::INVALID_DEVICE_STATE);
    let disabled = client.allocate_pages(1).err().unwrap();
    assert_eq!(disabled.status(), NtStatus::INVALID_DEVICE_STATE);
}

/// A server that refuses: its status comes back, and nothing is left to be undone.
#[test]
fn a_refused_gpadl_is_none() {
    let (bus, client) = raw_client();
    let creating = thread::spawn({
        let client = client.clone();
        move || client.create_gpadl_from_buffer(WRITE, 0, 4096)
    });
    bus.wait_said();
    let status = NtStatus::INSUFFICIENT_RESOURCES;
    assert!(bus.post(BusEvent::GpadlCreated { gpadl: 1, status }));
    assert_eq!(in_time(move || creating.join().unwrap()), Err(Error::Bus(status)));
    client.disable();
    assert_eq!(bus.take_said(), [Said::Close]);
}

/// A create or delete that waits ends with the channel, with and without a driver, inside Opened too;
/// what was half created is undone.
#[test]
fn waiting_for_the_server_ends_with_the_channel() {
    for (driven, inside) in [(false, false), (true, false), (false, true), (true, true)] {
        let bus = RawBus::new();
        let driver = Device::new();
        let client = client(&as_bus(&bus), &driver);
        let result = Arc::new(Mutex::new(None));
        if inside {
            driver.when({
                let result = result.clone();
                move |channel, call| {
                    if *call == Call::Opened {
                        *lock(&result) = Some(channel.create_gpadl_from_buffer(WRITE, 0, 4096));
                    }
                    Ok(())
                }
            });
        }
        client.enable().unwrap();
        bus.offered(None);
        client.process(1);
        bus.take_said();
        let peer = bus.open_completed();
        let driving = driven.then(|| Driver::spawn(&client));
        let creating = thread::spawn({
            let (client, driver, result) = (client.clone(), driver.clone(), result.clone());
            move || {
                if inside {
                    client.process(1);
                } else {
                    while client.state() != ChannelState::Active {
                        client.process(1);
                        thread::yield_now();
                    }
                    driver.wait_for(&Call::PostStarted);
                    *lock(&result) = Some(client.create_gpadl_from_buffer(WRITE, 0, 4096));
                }
            }
        });
        assert_eq!(bus.wait_said(), [Said::CreateGpadl(one_range(4096, 0, &[0]))]);
        assert!(bus.post(BusEvent::Rescinded));
        in_time(move || creating.join().unwrap());
        until("closed", || {
            client.process(1);
            client.state() == ChannelState::Disabled
        });
        let error = lock(&result).take().unwrap().unwrap_err();
        assert_eq!(error.status(), NtStatus::DEVICE_REMOVED, "driven={driven} inside={inside}");
        let mut said = bus.take_said();
        said.retain(|said| *said != Said::Close);
        assert_eq!(said, [Said::TeardownGpadl(1)], "driven={driven} inside={inside}");
        drop((driving, peer));
    }
}

/// A handle that is not the channel's: ignored, and asserted in debug builds.
#[test]
fn deleting_or_unmapping_what_is_not_there_does_nothing() {
    let ((bus, client), (server_bus, server)) = (raw_client(), raw_server());
    let delete = || client.delete_gpadl(77);
    assert_eq!(catch_unwind(AssertUnwindSafe(delete)).is_err(), cfg!(debug_assertions));
    let unmap = || server.unmap_gpadl(77);
    assert_eq!(catch_unwind(AssertUnwindSafe(unmap)).is_err(), cfg!(debug_assertions));
    assert_eq!((bus.take_said(), server_bus.take_said()), (vec![], vec![]));
    client.disable();
    server.disable();
}

// ---- The server's side ------------------------------------------------------------------------------

/// D-57: each refusal of the map with its status; a refused GPADL is not held in use.
#[test]
fn misuse_of_map_is_refused_with_its_status() {
    let (bus, server) = raw_server();
    let beyond = bus.memory().total_bytes() / 4096;
    let shapes: [(&str, GpadlPages, NtStatus); 7] = [
        ("not RAM", one_range(8192, 0, &[1, beyond]), NtStatus::INVALID_PARAMETER),
        ("no bytes", one_range(0, 0, &[1]), NtStatus::INVALID_PARAMETER_3),
        ("a page missing", one_range(4097, 0, &[1]), NtStatus::INVALID_PARAMETER_3),
        ("a page too many", one_range(4096, 0, &[1, 2]), NtStatus::INVALID_PARAMETER_3),
        ("offset beyond the page", one_range(8, 4096, &[1]), NtStatus::INVALID_PARAMETER_3),
        ("page number too large", one_range(8, 0, &[u64::MAX]), NtStatus::INVALID_PARAMETER_3),
        (
            "no range",
            GpadlPages { ranges: vec![], read_only: false },
            NtStatus::INVALID_PARAMETER_3,
        ),
    ];
    for (gpadl, (what, pages, status)) in (1..).zip(shapes) {
        bus.set_gpadl(gpadl, pages);
        let refused = server.map_gpadl(WRITE, gpadl).err().unwrap();
        assert_eq!(refused.status(), status, "{what}");
        assert_eq!(bus.take_said(), [Said::InUse(gpadl, true), Said::InUse(gpadl, false)]);
    }
    let unknown = server.map_gpadl(WRITE, 999).err().unwrap();
    assert_eq!(unknown.status(), NtStatus::INVALID_PARAMETER_3);
    bus.take_said();
    let flags = server.map_gpadl(GpadlFlags::from_bits_retain(4), 1).err().unwrap();
    assert_eq!(flags.status(), NtStatus::INVALID_PARAMETER_2);

    bus.set_gpadl(50, one_range(4096, 0, &[1]));
    let mapping = server.map_gpadl(WRITE, 50).unwrap();
    let again = server.map_gpadl(WRITE, 50).err();
    assert_eq!(again, Some(Error::AlreadyMapped { gpadl: 50 }));
    assert_eq!(again.unwrap().status(), NtStatus::ALREADY_COMMITTED);
    assert_eq!(bus.take_said(), [Said::InUse(50, true)], "the first mapping is not touched");
    drop(mapping);
    server.disable();
    assert_eq!(bus.take_said(), [Said::InUse(50, false), Said::Closed, Said::Revoke], "D-58");
    let closed = server.map_gpadl(WRITE, 50).err().unwrap();
    assert_eq!(closed.status(), NtStatus::INVALID_DEVICE_STATE);
    let wrong_side = server.create_gpadl_from_buffer(WRITE, 0, 1).err().unwrap();
    assert_eq!(wrong_side.status(), NtStatus::INVALID_DEVICE_STATE);
}

/// The bus is called without a lock held: a waker that looks at the channel does not hang.
#[test]
fn the_bus_is_not_called_under_a_lock() {
    struct Look(Mutex<Vec<Channel>>);
    impl Wake for Look {
        fn wake(self: Arc<Self>) {
            for channel in &*lock(&self.0) {
                let _looked = (channel.memory(), channel.get_interface_instance());
            }
        }
    }
    let pair = Pair::open(Device::new());
    let pages = pair.client.allocate_pages(1).unwrap();
    let look = Arc::new(Look(Mutex::new(vec![pair.server.clone(), pair.client.clone()])));
    let mut waking = Vec::new();
    for channel in [&pair.server, &pair.client] {
        waking.push(Driver::spawn_with(channel, Waker::from(look.clone())));
    }
    let pair = in_time(move || {
        for left_behind in [false, true] {
            let gpadl = pair.client.create_gpadl_from_pages(WRITE, &pages).unwrap();
            drop(pair.server.map_gpadl(WRITE, gpadl).unwrap());
            if !left_behind {
                pair.server.unmap_gpadl(gpadl);
                pair.client.delete_gpadl(gpadl);
            }
        }
        pair.client.disable();
        pair.server.disable();
        drop(pages);
        pair
    });
    drop(waking);
    lock(&look.0).clear();
    pair.close();
}
