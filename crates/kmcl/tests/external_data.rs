//! External data: memory that a packet describes and does not carry.
//!
//! Source: VmbChannelPacketGetExternalData, kmcl-semantics section 6; D-40, D-42, D-43, D-46.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{Answers, Call, Device, Pair, WAIT, lock, packet, padded, send};
use kmcl::bus::{BusEvent, EventSink, Residency};
use kmcl::{ChannelState, Error, ExternalDataFlags, NtStatus};
use vmbus_wire::ranges::GpaRange;

use Call::{Complete, Packet};

const ANY: ExternalDataFlags = ExternalDataFlags::empty();

/// A pair whose channels take external data of 64 KiB in 4 ranges.
fn external_pair(device: Arc<Device>) -> Pair {
    Pair::open_with(device, |pair| {
        for channel in [&pair.server, &pair.client] {
            channel.init_set_maximum_external_data(64 << 10, 4).unwrap();
        }
    })
}

/// VmbChannelPacketGetExternalData, D-43, D-46: the memory that the client has described, to be read
/// and written until the completion; a second call gives the same.
#[test]
fn external_data_is_the_clients_memory() {
    let device = Device::on_packet(|_, packet| {
        assert!(packet.has_external_data());
        let data = packet.external_data(ANY).unwrap();
        assert_eq!(data.len(), 5000);
        assert!(!data.is_read_only() && !data.is_empty());
        let segments: Vec<_> = data.segments().collect();
        assert_eq!(packet.external_data(ANY).unwrap().segments().collect::<Vec<_>>(), segments);
        let ranges: Vec<_> = data.ranges().map(|r| (r.byte_offset, r.byte_count)).collect();
        assert_eq!(ranges, [(100, 3900), (0, 1100)]);
        let resident = packet.resident_ranges().unwrap();
        assert_eq!(resident.iter().collect::<Vec<_>>(), data.ranges().collect::<Vec<_>>());
        let mut bytes = vec![0; 5000];
        assert_eq!(data.read_at(0, &mut bytes).unwrap(), 5000);
        bytes.reverse();
        assert_eq!(data.write_at(0, &bytes).unwrap(), 5000);
        packet.complete(&[]);
    });
    let pair = external_pair(device);
    let pages = pair.client.allocate_pages(2).unwrap();
    let pfns: Vec<u64> = pages.pfns().collect();
    let ranges = [
        GpaRange { byte_count: 3900, byte_offset: 100, pfns: &pfns[1..] },
        GpaRange { byte_count: 1100, byte_offset: 0, pfns: &pfns[..1] },
    ];
    let slice = pages.slice().unwrap();
    let bytes: Vec<u8> = (0..5000).map(|n| (n % 241) as u8).collect();
    slice.write_at(4096 + 100, &bytes[..3900]).unwrap();
    slice.write_at(0, &bytes[3900..]).unwrap();
    let answers = Arc::new(Answers::default());
    packet(&pair.client, 1, &answers).send(&[0; 8], Some(&ranges), WAIT).unwrap();
    pair.pump();
    assert_eq!(answers.take(), [(1, NtStatus::SUCCESS, vec![])]);
    let mut back = vec![0; 5000];
    slice.read_at(4096 + 100, &mut back[..3900]).unwrap();
    slice.read_at(0, &mut back[3900..]).unwrap();
    back.reverse();
    assert_eq!(back, bytes);
    drop(pages);
    pair.close();
}

/// VmbChannelPacketGetExternalData after the callback, on another thread: the packet has its data as
/// long as it lives (D-43 allows to refuse that; there is no reason to).
#[test]
fn external_data_is_there_until_the_completion() {
    let pair = external_pair(Device::holding());
    let pages = pair.client.allocate_pages(1).unwrap();
    let pfns: Vec<u64> = pages.pfns().collect();
    let answers = Arc::new(Answers::default());
    packet(&pair.client, 1, &answers).send_with_external_pfns(&[0; 8], &pfns, WAIT).unwrap();
    pair.pump();
    let [held] = <[_; 1]>::try_from(pair.device.take_held()).unwrap();
    thread::spawn(move || {
        held.external_data(ANY).unwrap().write_at(4090, b"to the end of the page").unwrap();
        held.complete(&[]);
    })
    .join()
    .unwrap();
    let mut bytes = [0; 6];
    pages.slice().unwrap().read_at(4090, &mut bytes).unwrap();
    assert_eq!(&bytes, b"to the", "the rest lies beyond the data");
    drop(pages);
    pair.pump();
    pair.close();
}

/// VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAG_READ_ONLY, and the refusals: none there (D-43), more than
/// the channel takes (D-40), not RAM. The device decides what becomes of the packet.
#[test]
fn external_data_is_refused_with_its_status() {
    let pair = Pair::open_with(Device::holding(), |pair| {
        pair.server.init_set_maximum_external_data(8192, 2).unwrap();
        pair.client.init_set_maximum_external_data(1 << 20, 8).unwrap();
    });
    let beyond = pair.bus.memory().total_bytes() / 4096;
    let one = |pfns: &[u64]| {
        let answers = Arc::new(Answers::default());
        let sent = match pfns {
            [] => packet(&pair.client, 0, &answers).send(&[0; 8], None, WAIT),
            pfns => packet(&pair.client, 0, &answers).send_with_external_pfns(&[0; 8], pfns, WAIT),
        };
        sent.unwrap();
        pair.pump();
        let [packet] = <[_; 1]>::try_from(pair.device.take_held()).unwrap();
        assert_eq!(packet.has_external_data(), !pfns.is_empty());
        packet
    };
    let read_only = one(&[1]);
    let data = read_only.external_data(ExternalDataFlags::READ_ONLY).unwrap();
    assert!(data.is_read_only());
    assert_eq!(data.write_at(0, &[1]), Err(Error::ReadOnly));
    assert_eq!(Error::ReadOnly.status(), NtStatus::ACCESS_DENIED);
    assert_eq!(data.read_at(0, &mut [0]), Ok(1));
    read_only.complete(&[]);

    let many: Vec<u64> = (0..100).collect();
    let rows: [(&str, &[u64], NtStatus); 4] = [
        ("none", &[], NtStatus::INVALID_PARAMETER_1),
        ("three pages", &[1, 2, 3], NtStatus::INVALID_BUFFER_SIZE),
        ("a hundred pages", &many, NtStatus::INVALID_BUFFER_SIZE),
        ("not RAM", &[1, beyond], NtStatus::INVALID_PARAMETER),
    ];
    for (what, pfns, status) in rows {
        let packet = one(pfns);
        let error = packet.external_data(ANY).err().unwrap();
        assert_eq!(error.status(), status, "{what}: {error}");
        assert_eq!(packet.resident_ranges(), None, "{what}");
        packet.complete(&[]);
    }
    assert_eq!(pair.server.stop_reason(), None);
    pair.close();
}

/// VmbChannelInitSetMaximumExternalData: ranges that begin and end inside pages are within the bounds
/// as long as their bytes are.
#[test]
fn external_data_within_its_bounds_always_fits() {
    let pair = Pair::open_with(Device::holding(), |pair| {
        for channel in [&pair.server, &pair.client] {
            channel.init_set_maximum_external_data(4096, 4).unwrap();
        }
    });
    // Each touches two pages with two bytes.
    let range = GpaRange { byte_count: 2, byte_offset: 4095, pfns: &[1, 2] };
    let answers = Arc::new(Answers::default());
    packet(&pair.client, 1, &answers).send(&[], Some(&[range; 4]), WAIT).unwrap();
    pair.pump();
    let [packet] = <[_; 1]>::try_from(pair.device.take_held()).unwrap();
    assert_eq!(packet.external_data(ANY).unwrap().len(), 8);
    packet.complete(&[]);
    pair.pump();
    pair.close();
}

/// Memory that has to be brought in first: counts what was asked for, and says no until told.
#[derive(Default)]
struct Away {
    asked: AtomicUsize,
    missing: AtomicU32,
    events: Mutex<Option<EventSink>>,
}

impl Residency for Away {
    fn ensure(&self, _gpa: u64, _len: u64, events: &EventSink) -> bool {
        self.asked.fetch_add(1, Ordering::SeqCst);
        *lock(&self.events) = Some(events.clone());
        self.missing.load(Ordering::SeqCst) == 0
    }
}

impl Away {
    /// One more segment is there.
    fn arrive(&self) {
        self.missing.fetch_sub(1, Ordering::SeqCst);
        let events = lock(&self.events).clone().unwrap();
        assert!(events.post(BusEvent::MemoryArrived));
    }
}

/// STATUS_PENDING: the packet comes again, at its place, once the memory is there, and then the call
/// succeeds (D-42). Every segment is asked for at once.
#[test]
fn pending_external_data_brings_the_packet_again() {
    let away = Arc::new(Away::default());
    away.missing.store(2, Ordering::SeqCst);
    let pair = Pair::new(Device::on_packet(|_, packet| {
        assert_eq!(packet.resident_ranges(), None, "nobody has looked");
        match packet.has_external_data().then(|| packet.external_data(ANY).map(|data| data.len())) {
            Some(Err(Error::Pending)) => packet.redeliver(),
            Some(Ok(len)) => packet.complete(&len.to_le_bytes()),
            None => packet.complete(b"behind"),
            Some(Err(error)) => panic!("{error}"),
        }
    }));
    assert_eq!(Error::Pending.status(), NtStatus::PENDING);
    pair.bus.set_residency(away.clone());
    for channel in [&pair.server, &pair.client] {
        channel.init_set_maximum_external_data(64 << 10, 4).unwrap();
    }
    pair.enable();
    let answers = Arc::new(Answers::default());
    packet(&pair.client, 0, &answers).send_with_external_pfns(&[0; 8], &[1, 9], WAIT).unwrap();
    send(&pair.client, 1, &[1; 8], &answers);
    pair.pump();
    assert_eq!(away.asked.load(Ordering::SeqCst), 2, "both segments");
    assert_eq!(pair.device.take_calls(), [Packet(vec![0; 8]), Complete(1)]);
    assert_eq!(answers.take(), [], "the packet behind waits");

    away.arrive();
    pair.pump();
    assert_eq!(pair.device.take_calls(), [Packet(vec![0; 8]), Complete(1)], "not all of it yet");
    away.arrive();
    pair.pump();
    let delivered = [Packet(vec![0; 8]), Packet(vec![1; 8]), Complete(2)];
    assert_eq!(pair.device.take_calls(), delivered);
    let order: Vec<_> = answers.take().into_iter().map(|(n, _, payload)| (n, payload)).collect();
    assert_eq!(order, [(0, padded(&8192_u32.to_le_bytes())), (1, padded(b"behind"))]);
    pair.close();
}

/// Memory that arrives while the callback still runs is not missed.
#[test]
fn memory_that_arrives_during_the_callback_is_not_missed() {
    let away = Arc::new(Away::default());
    away.missing.store(1, Ordering::SeqCst);
    let pair = Pair::new(Device::on_packet({
        let away = away.clone();
        move |_, packet| match packet.external_data(ANY).map(|_| ()) {
            Err(Error::Pending) => {
                away.arrive();
                packet.redeliver();
            }
            result => packet.complete(&[u8::from(result.is_ok()); 8]),
        }
    }));
    pair.bus.set_residency(away);
    for channel in [&pair.server, &pair.client] {
        channel.init_set_maximum_external_data(64 << 10, 4).unwrap();
    }
    pair.enable();
    let answers = Arc::new(Answers::default());
    packet(&pair.client, 0, &answers).send_with_external_pfns(&[0; 8], &[1], WAIT).unwrap();
    pair.pump();
    assert_eq!(answers.take(), [(0, NtStatus::SUCCESS, vec![1; 8])]);
    pair.close();
}

/// A channel may be closed while memory is awaited; a flood of arrivals does not crowd the close out.
#[test]
fn a_channel_waiting_for_memory_can_be_closed() {
    let away = Arc::new(Away::default());
    away.missing.store(1000, Ordering::SeqCst);
    let pair = Pair::new(Device::on_packet(|_, packet| {
        assert!(packet.external_data(ANY).is_err());
        packet.redeliver();
    }));
    pair.bus.set_residency(away.clone());
    for channel in [&pair.server, &pair.client] {
        channel.init_set_maximum_external_data(64 << 10, 4).unwrap();
    }
    pair.enable();
    let answers = Arc::new(Answers::default());
    packet(&pair.client, 0, &answers).send_with_external_pfns(&[0; 8], &[1], WAIT).unwrap();
    pair.pump();
    pair.server.set_waker(std::task::Waker::noop().clone()); // nobody takes events for a while
    (0..500).for_each(|_| away.arrive());
    pair.client.disable();
    pair.server.clear_waker();
    pair.pump();
    assert_eq!(pair.states(), (ChannelState::Closed, ChannelState::Disabled));
    assert_eq!(answers.take(), [(0, NtStatus::CANCELLED, vec![])]);
    pair.close();
}
