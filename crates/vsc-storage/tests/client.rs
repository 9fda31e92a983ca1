//! A client against a server that keeps to the protocol.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod server;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use server::{BLOCK, DISK_BYTES, MAX_TRANSFER, Reply, Server, config};
use vsc_storage::wire::packet::Operation;
use vsc_storage::wire::protocol::ProtocolVersion;
use vsc_storage::wire::scsi::cdb::Command;
use vsc_storage::wire::scsi::sense::{AdditionalSense, SenseKey};
use vsc_storage::wire::srb::ScsiAddress;
use vsc_storage::{Data, Error, Extent, Notice, Request, Reset, ScsiError, StorageClient};

const LUN: ScsiAddress = ScsiAddress::new(0, 0, 0);

#[test]
fn a_disk_is_found_read_and_written() {
    for (version, sub_channels) in [(0x0602, 0), (0x0602, 3), (0x0501, 1), (0x0402, 0), (0x0200, 2)]
    {
        let case = format!("version={version:#x} sub_channels={sub_channels}");
        let server = Server::with_version(version);
        let mut client = server.client(|config| config.sub_channels = sub_channels);
        let properties = client.properties().unwrap();
        assert_eq!(properties.version, ProtocolVersion(version), "{case}");
        let expected = if version >= 0x0501 { sub_channels } else { 0 };
        assert_eq!(properties.sub_channels, expected, "{case}");
        assert_eq!(client.instance(), server::INSTANCE, "{case}");

        let disks = client.scan().unwrap();
        assert_eq!(disks.len(), 1, "{case}");
        let disk = &disks[0];
        assert_eq!((disk.address, disk.bytes()), (LUN, DISK_BYTES as u64), "{case}");

        let mut data = vec![0; DISK_BYTES];
        client.read(disk, 0, &mut data).unwrap();
        assert_eq!(data, server.disk(), "{case}");

        let written: Vec<u8> =
            (0..5 * MAX_TRANSFER as usize).map(|at| (at * 7 / 3) as u8).collect();
        client.write(disk, BLOCK as u64, &written).unwrap();
        client.flush(disk).unwrap();
        assert_eq!(server.disk()[BLOCK..BLOCK + written.len()], written, "{case}");
        assert_eq!(server.disk()[..BLOCK], [0; BLOCK], "{case}");
    }
}

#[test]
fn every_request_ends_once_and_the_queue_depth_is_kept() {
    let server = Server::start();
    let mut client = server.client(|config| {
        config.queue_depth = 8;
        config.sub_channels = 2;
    });
    let mut buffers: Vec<_> = (0..8).map(|_| client.allocate(4096).unwrap()).collect();
    let (mut next, mut ended) = (0, BTreeSet::new());
    while ended.len() < 1000 {
        while next < 1000 {
            let Some(buffer) = buffers.pop() else { break };
            let cdb = Command::read(next % 128, 1).encode().unwrap();
            let request = Request::new(LUN, cdb).reading(buffer, 0, 512).with_token(next);
            client.submit(request).unwrap();
            next += 1;
        }
        assert!(client.in_flight() <= 8);
        client.wait_completion(Duration::from_secs(10)).unwrap();
        while let Some(completion) = client.next_completion() {
            assert_eq!(completion.result, Ok(512));
            assert!(ended.insert(completion.token), "{} ended twice", completion.token);
            let mut data = [0; 512];
            let buffer = completion.buffer.unwrap();
            buffer.copy_to(&mut data).unwrap();
            assert_eq!(data, [(completion.token % 128) as u8; 512]);
            buffers.push(buffer);
        }
    }
    assert_eq!(client.in_flight(), 0);
}

#[test]
fn requests_beyond_bounds_come_back_whole() {
    let server = Server::start();
    server.set_policy(|_, _| Reply::Honest);
    let mut client = server.client(|config| config.queue_depth = 2);
    server.set_policy(|request, _| match request.operation {
        Operation::EXECUTE_SRB => Reply::Hold,
        _ => Reply::Honest,
    });
    let cdb = Command::read(0, 1).encode().unwrap();
    let buffer = |client: &StorageClient| client.allocate(4096).unwrap();

    let too_long = Request::new(LUN, cdb).reading(buffer(&client), 0, MAX_TRANSFER + 1);
    let refused = client.submit(too_long).unwrap_err();
    assert_eq!(
        refused.error,
        Error::TransferTooLong { asked: MAX_TRANSFER + 1, limit: MAX_TRANSFER }
    );
    let buffer_back = refused.request.into_buffer().unwrap();

    for (offset, bytes) in [(4096, 1), (4000, 97), (u32::MAX, 2), (0, 0)] {
        let outside = Request::new(LUN, cdb).reading(buffer(&client), offset, bytes);
        let refused = client.submit(outside).unwrap_err();
        assert_eq!(refused.error, Error::OutsideBuffer { offset, bytes, buffer: 4096 });
    }

    client.submit(Request::new(LUN, cdb).reading(buffer_back, 3584, 512)).unwrap();
    client.submit(Request::new(LUN, cdb).reading(buffer(&client), 0, 512)).unwrap();
    let third = Request::new(LUN, cdb).reading(buffer(&client), 0, 512).with_token(3);
    let refused = client.submit(third).unwrap_err();
    assert_eq!(refused.error, Error::QueueFull { depth: 2 });

    server.wait_held(2);
    server.release(|_| {});
    client.wait_completion(Duration::from_secs(10)).unwrap();
    assert_eq!(client.next_completion().unwrap().result, Ok(512));
    client.submit(refused.request).unwrap();
}

#[test]
fn extents_are_handed_over_in_order_whatever_the_order_of_the_answers() {
    let server = Server::start();
    let mut client = server.client(|config| config.queue_depth = 6);
    let disk = client.identify(LUN).unwrap().unwrap();
    server.set_policy(|request, _| match request.operation {
        Operation::EXECUTE_SRB => Reply::Hold,
        _ => Reply::Honest,
    });
    // The server answers the last request first, whenever the queue is full.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..8 {
                server.wait_held(6);
                server.release(|held| held.reverse());
            }
        });
        let mut offsets = Vec::new();
        let extents = Extent::cut(0, 48 * 512, 512);
        let read = client.read_extents(&disk, extents, |offset, data| {
            assert_eq!(data, [(offset / 512) as u8; 512]);
            offsets.push(offset);
            Ok::<_, Error>(())
        });
        assert_eq!(read, Ok(48 * 512));
        assert_eq!(offsets, (0..48).map(|block| block * 512).collect::<Vec<_>>());
    });
}

#[test]
fn an_error_of_the_user_ends_a_call_and_the_next_one_works() {
    let server = Server::start();
    let mut client = server.client(|_| {});
    let disk = client.identify(LUN).unwrap().unwrap();
    let started = Instant::now();
    #[derive(Debug, PartialEq)]
    enum Stop {
        Here(u64),
        Client(Error),
    }
    impl From<Error> for Stop {
        fn from(error: Error) -> Self {
            Self::Client(error)
        }
    }
    let stopped = client.read_extents(&disk, Extent::cut(0, 65536, 512), |offset, _| {
        if offset == 1024 { Err(Stop::Here(offset)) } else { Ok(()) }
    });
    assert_eq!(stopped, Err(Stop::Here(1024)));
    assert_eq!(client.in_flight(), 0, "nothing moves data after the call");
    let beyond =
        client.read_extents(&disk, Extent::cut(65024, 1024, 512), |_, _| Ok::<_, Stop>(()));
    assert!(matches!(beyond, Err(Stop::Client(Error::Range { offset: 65536, .. }))), "{beyond:?}");
    let mut data = [9; 512];
    client.read(&disk, 512, &mut data).unwrap();
    assert_eq!(data, [1; 512]);
    assert!(started.elapsed() < Duration::from_secs(5), "something waited for what never comes");
}

#[test]
fn a_refusal_brings_sense_data() {
    let server = Server::start();
    let mut client = server.client(|_| {});
    let mut data = [0; 512];
    let cdb = Command::read(128, 1).encode().unwrap();
    let Err(Error::Scsi(ScsiError { opcode: 0x28, address: LUN, sense: Some(sense), .. })) =
        client.execute(LUN, &cdb, Data::In(&mut data))
    else {
        panic!("a read beyond the end succeeded, or brought no sense data");
    };
    assert_eq!(sense.key, SenseKey::IllegalRequest);
    assert_eq!(sense.code, AdditionalSense::LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE);
}

#[test]
fn resets_and_notices() {
    let server = Server::start();
    let mut client = server.client(|_| {});
    for (reset, operation) in [
        (Reset::Lun(LUN), Operation::RESET_LUN),
        (Reset::Bus(0), Operation::RESET_BUS),
        (Reset::Adapter, Operation::RESET_ADAPTER),
    ] {
        client.reset(reset).unwrap();
        assert_eq!(server.operations().last(), Some(&operation));
    }
    assert_eq!(client.next_notice(), None);
    server.say(Operation::ENUMERATE_BUS);
    server.say(Operation::REMOVE_DEVICE);
    let mut notices = Vec::new();
    while notices.len() < 2 {
        client.wait(Duration::from_secs(10)).unwrap();
        notices.extend(std::iter::from_fn(|| client.next_notice()));
    }
    assert_eq!(notices, [Notice::EnumerateBus, Notice::RemoveDevice]);
}

#[test]
fn small_rings_make_short_transfers_and_still_move_everything() {
    let server = Server::start();
    for (ring_pages, limit) in [(2, 4096 * (256 - 32)), (3, 4096 * (512 - 32)), (32, 1 << 20)] {
        let mut client = server.client(|config| config.ring_pages = ring_pages);
        assert_eq!(client.max_transfer_bytes(), MAX_TRANSFER.min(limit), "{ring_pages} pages");
        let disk = client.identify(LUN).unwrap().unwrap();
        let mut data = vec![0; DISK_BYTES];
        client.read(&disk, 0, &mut data).unwrap();
        assert_eq!(data, server.disk(), "{ring_pages} pages");
    }
}

#[test]
fn nobody_there_is_a_time_out() {
    let bus = kmcl::loopback::LoopbackBus::new(1 << 20).unwrap();
    let limit = Duration::from_millis(20);
    let config = config(|config| config.connect_timeout = limit);
    assert_eq!(StorageClient::connect(bus, config).unwrap_err(), Error::Timeout(limit));
}

#[test]
fn a_client_that_goes_leaves_nothing_behind_and_the_next_one_connects() {
    let server = Server::start();
    let free = server.bus.free_pages();
    for round in 0..3 {
        let mut client = server.client(|config| config.sub_channels = 0);
        let disk = client.identify(LUN).unwrap().unwrap();
        let mut data = [0; 1024];
        client.read(&disk, 0, &mut data).unwrap();
        drop(client);
        let started = std::time::Instant::now();
        while server.bus.free_pages() != free {
            assert!(started.elapsed() < Duration::from_secs(10), "pages are lost in round {round}");
            std::thread::yield_now();
        }
    }
}
