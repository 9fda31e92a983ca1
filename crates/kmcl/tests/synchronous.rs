//! Send one packet, wait for its answer: VmbChannelSendSynchronousRequest, section 10, D-48, D-49.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use common::raw::{RawBus, as_bus, push, read_all};
use common::{
    Answers, Call, Device, Driver, PATIENCE, Pair, WAIT, client, in_time, lock, packet, server,
    until,
};
use kmcl::bus::BusEvent;
use kmcl::memory::PageRun;
use kmcl::{Channel, ChannelFlags, ChannelState, Error, NtStatus, SendFlags, Side, Timeout};
use vmbus_wire::packet::PacketKind;
use vmbus_wire::ranges::GpaRange;

const NONE: SendFlags = SendFlags::empty();

/// A request with an answer of at most `room` bytes.
fn request(
    channel: &Channel,
    message: &[u8],
    room: usize,
    timeout: Timeout,
) -> Result<Vec<u8>, Error> {
    let mut answer = vec![0xee; room];
    let len = channel.send_synchronous_request(message, None, WAIT, Some(&mut answer), timeout)?;
    answer.truncate(len);
    Ok(answer)
}

/// Both ends open, the server driven by a thread of its own that echoes.
fn echoing() -> (Pair, Driver) {
    let pair = Pair::open(Device::echo());
    let driver = Driver::spawn(&pair.server);
    (pair, driver)
}

// ---- Success ----------------------------------------------------------------------------------------

/// Success with every time-out that allows waiting, in a channel that nobody else drives: the caller
/// processes packets itself meanwhile.
#[test]
fn the_caller_drives_a_channel_that_nobody_drives() {
    let (pair, driver) = echoing();
    let pair = in_time(move || {
        for timeout in
            [Timeout::Never, Timeout::After(PATIENCE), Timeout::At(SystemTime::now() + PATIENCE)]
        {
            assert_eq!(request(&pair.client, &[7; 16], 16, timeout), Ok(vec![7; 16]));
        }
        pair
    });
    drop(driver);
    pair.close();
}

/// Success where a thread drives the channel: the caller only waits.
#[test]
fn the_caller_waits_for_the_driver_of_the_channel() {
    let (pair, server) = echoing();
    let client = Driver::spawn(&pair.client);
    let pair = in_time(move || {
        for n in 0..100 {
            assert_eq!(request(&pair.client, &[n; 8], 8, Timeout::Never), Ok(vec![n; 8]));
        }
        pair
    });
    drop((server, client));
    pair.close();
}

/// Requests of many threads at a time in a channel that nobody drives: the thread that happens to
/// read an answer wakes the one that it is for.
#[test]
fn many_callers_at_a_time_share_the_driving() {
    let (pair, driver) = echoing();
    // With a descriptor the doorbell wakes one sleeper only.
    pair.client.doorbell_fd().unwrap();
    let pair = in_time(move || {
        let begin = Barrier::new(4);
        thread::scope(|scope| {
            for thread in 0..4 {
                let (client, begin) = (&pair.client, &begin);
                scope.spawn(move || {
                    begin.wait();
                    for _ in 0..200 {
                        let answer = request(client, &[thread; 8], 8, Timeout::Never);
                        assert_eq!(answer, Ok(vec![thread; 8]));
                    }
                });
            }
        });
        pair
    });
    drop(driver);
    pair.close();
}

/// EvtVmbChannelPostStarted: the place for negotiation, with and without a driver thread.
#[test]
fn a_request_works_inside_post_started() {
    for driven in [false, true] {
        let pair = Pair::new(Device::echo());
        let answer = Arc::new(Mutex::new(None));
        pair.driver.when({
            let answer = answer.clone();
            move |channel, call| {
                if *call == Call::PostStarted {
                    *lock(&answer) = Some(request(channel, &[3; 8], 8, Timeout::Never));
                }
                Ok(())
            }
        });
        let mut drivers = vec![Driver::spawn(&pair.server)];
        drivers.extend(driven.then(|| Driver::spawn(&pair.client)));
        pair.server.enable().unwrap();
        pair.server.start();
        pair.client.enable().unwrap();
        let pair = in_time(move || {
            while !driven && pair.client.state() != ChannelState::Active {
                pair.client.process(8);
            }
            pair.driver.wait_for(&Call::PostStarted);
            pair
        });
        assert_eq!(lock(&answer).take(), Some(Ok(vec![3; 8])), "driven={driven}");
        drop(drivers);
        pair.close();
    }
}

/// A request with external data, and one whose answer nobody wants.
#[test]
fn a_request_may_carry_external_data_and_have_no_buffer() {
    let pair = Pair::open_with(
        Device::on_packet(|_, packet| {
            let data = packet.external_data(kmcl::ExternalDataFlags::empty()).unwrap();
            assert_eq!(data.write_at(0, b"written").unwrap(), 7);
            packet.complete(b"answered");
        }),
        |pair| {
            for channel in [&pair.server, &pair.client] {
                channel.init_set_maximum_external_data(4096, 1).unwrap();
            }
        },
    );
    let driver = Driver::spawn(&pair.server);
    let page: PageRun = pair.client.allocate_pages(1).unwrap();
    let pfns: Vec<u64> = page.pfns().collect();
    let (pair, page) = in_time(move || {
        let range = GpaRange { byte_count: 100, byte_offset: 50, pfns: &pfns };
        let sent = pair.client.send_synchronous_request(
            &[0; 8],
            Some(&[range]),
            WAIT,
            None,
            Timeout::Never,
        );
        assert_eq!(sent, Ok(0));
        (pair, page)
    });
    let mut bytes = [0; 7];
    page.slice().unwrap().read_at(50, &mut bytes).unwrap();
    assert_eq!(&bytes, b"written");
    drop((driver, page));
    pair.close();
}

/// Without WAIT_FOR_COMPLETION the call is over when the packet is in the ring, on both sides.
#[test]
fn a_request_without_completion_ends_in_the_ring() {
    let pair = Pair::open(Device::new());
    for (channel, timeout) in [
        (&pair.client, Timeout::Never),
        (&pair.client, Timeout::Immediate),
        (&pair.server, Timeout::Immediate),
    ] {
        let sent = channel.send_synchronous_request(&[5; 8], None, NONE, None, timeout);
        assert_eq!(sent, Ok(0), "{:?} {timeout:?}", channel.side());
    }
    pair.pump();
    assert_eq!(pair.device.take_packets().len(), 2);
    assert_eq!(pair.driver.take_packets().len(), 1);
    pair.close();
}

// ---- Refusals ---------------------------------------------------------------------------------------

/// D-48: each misuse with the status of the argument at fault; nothing is sent.
#[test]
fn misuse_is_refused_by_argument() {
    let pair = Pair::open(Device::new());
    let unknown = SendFlags::from_bits_retain(0x8);
    type Row<'a> = (&'a str, Side, usize, SendFlags, usize, Timeout, u8);
    let rows: [Row<'_>; 6] = [
        ("buffer of 12", Side::Client, 8, WAIT, 12, Timeout::Never, 7),
        ("message too long", Side::Client, 4097, WAIT, 8, Timeout::Never, 3),
        ("message too long, at once", Side::Client, 4097, WAIT, 8, Timeout::Immediate, 3),
        ("unknown flag", Side::Client, 8, unknown, 8, Timeout::Never, 5),
        ("a server that waits", Side::Server, 8, NONE, 8, Timeout::Never, 8),
        ("a server's transaction", Side::Server, 8, WAIT, 8, Timeout::Immediate, 5),
    ];
    for (what, side, len, flags, room, timeout, position) in rows {
        let channel = if side == Side::Server { &pair.server } else { &pair.client };
        let (message, mut answer) = (vec![0; len], vec![0; room]);
        let sent =
            channel.send_synchronous_request(&message, None, flags, Some(&mut answer), timeout);
        let status = sent.unwrap_err().status();
        assert_eq!(status, NtStatus::invalid_parameter(position), "{what}");
    }
    pair.pump();
    assert_eq!(pair.device.take_calls(), []);
    pair.close();
}

/// D-48: an answer larger than the buffer gives the size that it needs, and no byte of it.
#[test]
fn an_answer_too_large_for_the_buffer_is_not_cut() {
    let (pair, driver) = echoing();
    let pair = in_time(move || {
        let mut answer = [0xee; 8];
        let sent = pair.client.send_synchronous_request(
            &[1; 24],
            None,
            WAIT,
            Some(&mut answer),
            Timeout::Never,
        );
        let error = sent.unwrap_err();
        assert_eq!(error, Error::BufferTooSmall { needed: 24, given: 8 });
        assert_eq!(error.status(), NtStatus::BUFFER_TOO_SMALL);
        assert_eq!(answer, [0xee; 8]);
        pair
    });
    drop(driver);
    pair.close();
}

/// Where it could never return it says so at once: in Started and Opened, when the queue is off, and
/// inside a packet callback.
#[test]
fn it_is_refused_where_it_could_never_return() {
    let pair = Pair::new(Device::new());
    let refused = Arc::new(Mutex::new(Vec::new()));
    let ask = move |channel: &Channel| {
        let error = request(channel, &[0; 8], 8, Timeout::Never).unwrap_err();
        assert_eq!(error.status(), NtStatus::INVALID_DEVICE_STATE);
    };
    pair.driver.when({
        let refused = refused.clone();
        move |channel, call| {
            if *call != Call::PostStarted {
                ask(channel);
                lock(&refused).push(call.clone());
            }
            Ok(())
        }
    });
    pair.driver.with_packets(move |channel, packet| {
        ask(channel);
        packet.complete(&[]);
    });
    pair.enable();
    let answers = Arc::new(Answers::default());
    common::send(&pair.server, 1, &[0; 8], &answers);
    pair.pump();
    assert_eq!(answers.take(), [(1, NtStatus::SUCCESS, vec![])]);
    pair.client.disable();
    pair.pump();
    assert_eq!(*lock(&refused), [Call::Opened, Call::Started, Call::Suspend, Call::Closed]);
    pair.close();
}

/// STATUS_DEVICE_REMOVED: the channel is not there, with every time-out.
#[test]
fn a_channel_that_is_disabled_is_removed() {
    let pair = Pair::new(Device::new());
    for timeout in [Timeout::Never, Timeout::Immediate, Timeout::After(PATIENCE)] {
        let error = request(&pair.client, &[0; 8], 8, timeout).unwrap_err();
        assert_eq!(error.status(), NtStatus::DEVICE_REMOVED, "{timeout:?}");
    }
    pair.close();
}

// ---- Time-outs --------------------------------------------------------------------------------------

/// D-49, time-out 0: no room gives STATUS_BUFFER_OVERFLOW and queues nothing; in the ring but not
/// answered gives STATUS_CANCELLED, and the answer that comes later is ignored.
#[test]
fn an_immediate_request_fits_the_ring_or_fails() {
    let pair = Pair::open(Device::new());
    let mut in_ring = 0;
    let error = loop {
        match request(&pair.client, &[0; 4096], 8, Timeout::Immediate).unwrap_err() {
            Error::Cancelled => in_ring += 1,
            error => break error,
        }
    };
    assert!(in_ring > 1);
    assert_eq!(error, Error::RingFull { needed: 16 + 4096 + 8 });
    assert_eq!(error.status(), NtStatus::BUFFER_OVERFLOW);
    assert_eq!(pair.client.outgoing_in_use(), (0, 0), "nothing is queued, nobody waits");
    pair.pump();
    assert_eq!(pair.device.take_packets().len(), in_ring);
    assert_eq!(pair.client.outgoing_in_use(), (0, 0));
    pair.close();
}

/// The header of a pipe counts when there is to be room at once.
#[test]
fn an_immediate_message_on_a_pipe_fits_with_its_header_or_fails() {
    let pair = Pair::open_with(Device::new(), |pair| {
        for channel in [&pair.server, &pair.client] {
            channel.init_set_flags(ChannelFlags::IS_PIPE).unwrap();
            channel.init_set_maximum_completion_size(0).unwrap();
        }
    });
    let send = |len: usize| {
        pair.client.send_synchronous_request(&vec![0; len], None, NONE, None, Timeout::Immediate)
    };
    // 28 KiB of data, less 8 that stay free and 24 for a completion: six packets of 4128 bytes leave
    // 3872.
    (0..6).for_each(|_| assert_eq!(send(4096), Ok(0)));
    let error = Error::RingFull { needed: 16 + 8 + 3848 + 8 };
    assert_eq!(send(3848), Err(error), "8 bytes too many, for the header");
    assert_eq!(send(3840), Ok(0));
    assert_eq!(pair.client.outgoing_in_use(), (0, 0));
    pair.pump();
    assert_eq!(pair.device.take_packets().len(), 7);
    pair.close();
}

/// STATUS_CANCELLED when the time is over: in flight and in the queue; a late answer is ignored.
#[test]
fn a_request_is_cancelled_when_its_time_is_over() {
    let pair = Pair::open(Device::holding());
    let past = Timeout::At(SystemTime::UNIX_EPOCH);
    let soon = Timeout::After(Duration::from_millis(1));
    for timeout in [past, soon] {
        let error = request(&pair.client, &[0; 8], 8, timeout).unwrap_err();
        assert_eq!(error.status(), NtStatus::CANCELLED);
        assert_eq!(pair.client.outgoing_in_use(), (0, 0));
    }
    pair.pump();
    let held = pair.device.take_held();
    assert_eq!(held.len(), 2, "they were in the ring");
    held.into_iter().for_each(|packet| packet.complete(&[9; 8]));
    pair.pump();

    // In the queue: it is taken out, and those behind it go their way.
    let answers = Arc::new(Answers::default());
    let mut sent = 0;
    while pair.client.outgoing_in_use().0 == 0 {
        packet(&pair.client, sent, &answers).send(&[0; 4096], None, NONE).unwrap();
        sent += 1;
    }
    let queued = pair.client.outgoing_in_use();
    assert_eq!(request(&pair.client, &[0; 8], 8, soon).unwrap_err(), Error::Cancelled);
    assert_eq!(pair.client.outgoing_in_use(), queued);
    while !answers.take().is_empty() || pair.client.outgoing_in_use().0 != 0 {
        pair.pump();
        pair.device.take_held().into_iter().for_each(|packet| packet.complete(&[]));
    }
    assert_eq!(pair.device.take_packets().len(), 2 + sent);
    pair.close();
}

// ---- The end of the channel -------------------------------------------------------------------------

/// What ends a channel while a request waits.
type End = fn(&RawBus, &Channel);

const ENDS: [(&str, End, NtStatus); 2] = [
    ("rescinded", |bus, _| assert!(bus.post(BusEvent::Rescinded)), NtStatus::DEVICE_REMOVED),
    ("disabled", |_, client| client.begin_disable(), NtStatus::CANCELLED),
];

/// A client of a bus in the hands of the test.
fn raw_client() -> (Arc<RawBus>, Channel, Arc<Device>) {
    let bus = RawBus::new();
    let driver = Device::new();
    let client = client(&as_bus(&bus), &driver);
    client.enable().unwrap();
    bus.offered(None);
    client.process(1);
    (bus, client, driver)
}

/// STATUS_DEVICE_REMOVED or STATUS_CANCELLED when the channel goes down, with and without a driver.
#[test]
fn a_waiting_request_ends_with_the_channel() {
    for (what, end, status) in ENDS {
        for driven in [false, true] {
            let (bus, client, _device) = raw_client();
            let _peer = bus.open_completed();
            client.process(1);
            let driver = driven.then(|| Driver::spawn(&client));
            let waiting = thread::spawn({
                let client = client.clone();
                move || request(&client, &[0; 8], 8, Timeout::Never)
            });
            until("in flight", || client.outgoing_in_use().1 == 1);
            end(&bus, &client);
            let error = in_time(move || waiting.join().unwrap()).unwrap_err();
            assert_eq!(error.status(), status, "{what}, driven={driven}");
            drop(driver);
            client.disable();
        }
    }
}

/// The same inside post_started, where the end of the channel waits for the callback: the request
/// gives up.
#[test]
fn a_request_inside_post_started_ends_with_the_channel() {
    for (what, end, _) in ENDS {
        for driven in [false, true] {
            let (bus, client, device) = raw_client();
            let result = Arc::new(Mutex::new(None));
            device.when({
                let result = result.clone();
                move |channel, call| {
                    if *call == Call::PostStarted {
                        *lock(&result) = Some(request(channel, &[0; 8], 8, Timeout::Never));
                    }
                    Ok(())
                }
            });
            let _peer = bus.open_completed();
            let driver = driven.then(|| Driver::spawn(&client));
            let opening = thread::spawn({
                let client = client.clone();
                move || client.process(1)
            });
            until("in flight", || client.outgoing_in_use().1 == 1);
            end(&bus, &client);
            in_time(move || opening.join().unwrap());
            device.wait_for(&Call::Closed);
            let error = lock(&result).take().unwrap().unwrap_err();
            assert_eq!(error.status(), NtStatus::DEVICE_REMOVED, "{what}, driven={driven}");
            drop(driver);
            client.disable();
        }
    }
}

/// A peer that breaks the ring stops the channel: nobody will read an answer, and the request says so
/// instead of waiting for ever.
#[test]
fn a_waiting_request_ends_when_the_channel_stops() {
    let (bus, client, _device) = raw_client();
    let mut peer = bus.open_completed();
    client.process(1);
    let waiting = thread::spawn({
        let client = client.clone();
        move || request(&client, &[0; 8], 8, Timeout::Never)
    });
    until("in flight", || client.outgoing_in_use().1 == 1);
    peer.to_channel.put_words(&[u64::MAX; 4], 32);
    peer.ring();
    let error = in_time(move || waiting.join().unwrap()).unwrap_err();
    assert_eq!(error.status(), NtStatus::DEVICE_REMOVED);
    assert!(client.stop_reason().is_some());
    client.disable();
}

/// An answer that the peer sends with the doorbell's descriptor wakes the caller; so does one without.
#[test]
fn the_doorbell_wakes_the_caller() {
    for with_descriptor in [false, true] {
        let (bus, client, _device) = raw_client();
        let peer = bus.open_completed();
        client.process(1);
        if with_descriptor {
            client.doorbell_fd().unwrap();
        }
        let waiting = thread::spawn({
            let client = client.clone();
            move || request(&client, &[0; 8], 8, Timeout::Never)
        });
        let (mut reader, mut writer) = (peer.reader(), peer.writer());
        while reader.is_empty().unwrap() {
            thread::yield_now();
        }
        let asked = read_all(&mut reader);
        push(&mut writer, PacketKind::Completion, false, asked[0].transaction_id, &[4; 8]);
        peer.ring();
        let answer = in_time(move || waiting.join().unwrap());
        assert_eq!(answer, Ok(vec![4; 8]), "with_descriptor={with_descriptor}");
        client.disable();
    }
}

/// A server's end of a raw bus: its request is in the ring at once, or there is no room.
#[test]
fn a_server_sends_at_once_or_not_at_all() {
    let bus = RawBus::new();
    let server = server(&as_bus(&bus), &Device::new());
    server.enable().unwrap();
    let send = || server.send_synchronous_request(&[1; 4000], None, NONE, None, Timeout::Immediate);
    assert_eq!(send().unwrap_err().status(), NtStatus::BUFFER_OVERFLOW, "no ring yet");
    let peer = bus.open(4, 4);
    server.process(1);
    let mut reader = peer.reader();
    let mut sent = 0;
    while send().is_ok() {
        sent += 1;
    }
    assert_eq!(read_all(&mut reader).len(), sent);
    assert_eq!(send(), Ok(0), "there is room again");
    server.disable();
}
