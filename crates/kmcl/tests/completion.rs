//! How packets that were sent end: statuses, completion data, and a peer that completes what it likes.
//!
//! Source: kmcl-semantics section 9; D-34.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use common::raw::{RawBus, as_bus, push, read_all};
use common::{Answers, Call, Device, Pair, WAIT, client, lock, packet, padded, send};
use kmcl::bus::BusEvent;
use kmcl::{ChannelState, NtStatus, Packet, PacketCompletion, SendFlags};
use vmbus_wire::packet::PacketKind;

const NONE: SendFlags = SendFlags::empty();

// ---- Statuses ---------------------------------------------------------------------------------------

/// D-34: each way in which a packet ends, queued or in flight, with its status; each ends once.
#[test]
fn each_end_has_its_status() {
    type End = fn(&Pair);
    let ends: [(&str, End, NtStatus, NtStatus); 4] = [
        (
            "the client disables",
            |pair| pair.client.begin_disable(),
            NtStatus::DEVICE_REMOVED,
            NtStatus::CANCELLED,
        ),
        (
            "the server disables",
            |pair| pair.server.begin_disable(),
            NtStatus::CANCELLED,
            NtStatus::DEVICE_REMOVED,
        ),
        (
            "the client disables, paused",
            |pair| {
                pair.client.begin_pause();
                pair.server.begin_pause();
                pair.client.begin_disable();
            },
            NtStatus::DEVICE_REMOVED,
            NtStatus::CANCELLED,
        ),
        (
            "the peers complete them",
            |pair| {
                pair.driver.take_held().into_iter().for_each(|packet| packet.complete(&[]));
                pair.device.take_held().into_iter().for_each(|packet| packet.complete(&[]));
                pair.pump();
            },
            NtStatus::SUCCESS,
            NtStatus::SUCCESS,
        ),
    ];
    for (what, end, server_status, client_status) in ends {
        let pair = Pair::open(Device::holding());
        pair.driver.with_packets({
            let driver = Arc::downgrade(&pair.driver);
            move |_, packet| driver.upgrade().unwrap().hold(packet)
        });
        let (of_server, of_client) = (Arc::default(), Arc::default());
        for n in 0..3 {
            send(&pair.server, n, &[0; 8], &of_server);
            send(&pair.client, n, &[0; 8], &of_client);
        }
        pair.pump();
        assert_eq!(pair.server.outgoing_in_use(), (0, 3), "{what}");
        end(&pair);
        // Whoever is still open waits for its device, which has to end too.
        drop((pair.device.take_held(), pair.driver.take_held()));
        pair.pump();
        for (answers, status) in [(of_server, server_status), (of_client, client_status)] {
            let mut answers = Answers::take(&answers);
            answers.sort();
            let expected: Vec<_> = (0..3).map(|n| (n, status, vec![])).collect();
            assert_eq!(answers, expected, "{what}");
        }
        pair.close();
    }
}

/// D-34 before the channel is open: a disable, a refused open and a failed connection end what is
/// queued.
#[test]
fn packets_queued_before_the_opening_end_with_it() {
    type End = fn(&RawBus, &kmcl::Channel);
    let ends: [(&str, End, NtStatus); 4] = [
        ("disabled", |_, client| client.disable(), NtStatus::CANCELLED),
        (
            "the open failed",
            |bus, client| {
                bus.offered(None);
                client.process(1);
                assert!(bus.post(BusEvent::OpenCompleted(Err(NtStatus::UNSUCCESSFUL))));
            },
            NtStatus::DEVICE_REMOVED,
        ),
        (
            "opened was refused",
            |bus, client| {
                bus.offered(None);
                client.process(1);
                let _peer = bus.open_completed();
                client.process(1);
            },
            NtStatus::CANCELLED,
        ),
        ("rescinded", |bus, _| assert!(bus.post(BusEvent::Rescinded)), NtStatus::DEVICE_REMOVED),
    ];
    for (what, end, status) in ends {
        let bus = RawBus::new();
        let driver = Device::new();
        driver.when(|_, call| match call {
            Call::Opened => Err(NtStatus::ACCESS_DENIED),
            _ => Ok(()),
        });
        let client = client(&as_bus(&bus), &driver);
        client.enable().unwrap();
        let answers = Arc::new(Answers::default());
        for (n, flags) in [NONE, WAIT].into_iter().enumerate() {
            packet(&client, n, &answers).send(&[0; 8], None, flags).unwrap();
        }
        end(&bus, &client);
        client.process(1);
        assert_eq!(client.state(), ChannelState::Disabled, "{what}");
        let expected: Vec<_> = (0..2).map(|n| (n, status, vec![])).collect();
        assert_eq!(answers.take(), expected, "{what}");
        assert_eq!(client.outgoing_in_use(), (0, 0), "{what}");
    }
}

/// Outgoing packets end between Suspend and Closed: a device may need their end to finish what it was
/// given (section 5, EvtVmbChannelSuspend).
#[test]
fn packets_end_between_suspend_and_closed() {
    struct Told(Arc<Mutex<Vec<String>>>);
    impl PacketCompletion for Told {
        fn completed(&self, _: Packet, status: NtStatus, _: &[u8]) {
            lock(&self.0).push(format!("{status:?}"));
        }
    }
    let pair = Pair::open(Device::holding());
    let told = Arc::new(Mutex::new(Vec::new()));
    pair.server_tells(&told);
    let mut packet = pair.server.packet_allocate().unwrap();
    packet.set_completion_routine(Arc::new(Told(told.clone())));
    packet.send(&[0; 8], None, WAIT).unwrap();
    pair.server.disable();
    let status = format!("{:?}", NtStatus::CANCELLED);
    assert_eq!(*lock(&told), ["Suspend", &status, "Closed"]);
    pair.pump();
    pair.close();
}

impl Pair {
    fn server_tells(&self, told: &Arc<Mutex<Vec<String>>>) {
        let told = told.clone();
        self.device.when(move |_, call| {
            lock(&told).push(format!("{call:?}"));
            Ok(())
        });
    }
}

// ---- Completion data --------------------------------------------------------------------------------

/// EvtVmbPacketCompletionRoutine: the peer's data, padded to a multiple of 8 bytes, of every length.
#[test]
fn completion_data_arrives_whole() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    let data: Vec<u8> = (0..4096).map(|n| (n % 239) as u8).collect();
    for len in (0..20).chain([1023, 1024, 1025, 4095, 4096]) {
        send(&pair.client, len, &[0; 8], &answers);
        pair.pump();
        pair.device.take_held().into_iter().for_each(|packet| packet.complete(&data[..len]));
        pair.pump();
        assert_eq!(answers.take(), [(len, NtStatus::SUCCESS, padded(&data[..len]))]);
    }
    pair.close();
}

/// Completions may come in any order; each finds its packet.
#[test]
fn completions_find_their_packets_in_any_order() {
    let pair = Pair::open_with(Device::holding(), |pair| {
        pair.server.init_set_maximum_completion_size(8).unwrap();
    });
    let answers = Arc::new(Answers::default());
    // Orders that visit all of 64: i -> (a * i + b) mod 64 for odd a.
    for (a, b) in [(1, 0), (63, 63), (5, 3), (37, 11)] {
        for n in 0..64_u8 {
            send(&pair.client, n.into(), &[n; 8], &answers);
        }
        pair.pump();
        let mut held: Vec<_> = pair.device.take_held().into_iter().map(Some).collect();
        assert_eq!(held.len(), 64);
        for i in 0..64 {
            let packet = held[(a * i + b) % 64].take().unwrap();
            let n = packet.payload()[0];
            packet.complete(&[n ^ 0x55; 8]);
        }
        pair.pump();
        let ended = answers.take();
        assert_eq!(ended.len(), 64);
        for (n, status, payload) in ended {
            let n = u8::try_from(n).unwrap();
            assert_eq!((status, payload), (NtStatus::SUCCESS, vec![n ^ 0x55; 8]));
        }
    }
    pair.close();
}

/// A completion routine may send other packets, also many, and drop what it likes.
#[test]
fn a_completion_routine_may_send() {
    struct Fork;
    impl PacketCompletion for Fork {
        fn completed(&self, packet: Packet, _: NtStatus, payload: &[u8]) {
            let channel = packet.channel().clone();
            drop(packet);
            let generation = payload[0];
            channel.set_pointer(channel.get_pointer() + 1);
            for _ in 0..if generation < 4 { 2 } else { 0 } {
                let mut packet = channel.packet_allocate().unwrap();
                packet.set_completion_routine(Arc::new(Self));
                packet.send(&[generation + 1; 8], None, WAIT).unwrap();
            }
        }
    }
    let pair = Pair::open(Device::echo());
    let mut packet = pair.client.packet_allocate().unwrap();
    packet.set_completion_routine(Arc::new(Fork));
    packet.send(&[0; 8], None, WAIT).unwrap();
    pair.pump();
    assert_eq!(pair.client.get_pointer(), 1 + 2 + 4 + 8 + 16);
    pair.close();
}

// ---- A peer that completes what it likes ------------------------------------------------------------

/// vmbus-wire section 5: ids that were never given out, given out and over, or completed twice find
/// nobody; the channel goes on; packets in flight end once, by their own id.
#[test]
fn a_completion_of_no_transaction_is_ignored() {
    let bus = RawBus::new();
    let client = client(&as_bus(&bus), &Device::new());
    client.enable().unwrap();
    bus.offered(None);
    client.process(1);
    let peer = bus.open_completed();
    client.process(1);
    let (mut reader, mut writer) = (peer.reader(), peer.writer());
    let answers = Arc::new(Answers::default());
    let mut complete = |id: u64| {
        push(&mut writer, PacketKind::Completion, false, id, &[6; 8]);
        client.process(64);
    };
    let mut ids = BTreeSet::new();
    for round in 0..5 {
        for n in 0..4 {
            send(&client, n, &[0; 8], &answers);
        }
        packet(&client, 9, &answers).send(&[0; 8], None, NONE).unwrap();
        assert_eq!(answers.take().len(), 1, "the one that waits for nothing");
        let sent: Vec<_> = read_all(&mut reader).iter().map(|read| read.transaction_id).collect();
        let inventions = [0, 1 << 32, u64::MAX, u64::from(u32::MAX), 1 << 63, 5, 0xfffe]
            .into_iter()
            .chain(sent.iter().map(|id| id ^ (1 << 33)))
            .chain(sent.iter().map(|id| id ^ (1 << 16)))
            .filter(|id| !sent[..4].contains(id));
        for id in inventions.chain(ids.iter().copied()) {
            complete(id);
        }
        assert_eq!(answers.take(), [], "round {round}");
        assert_eq!(client.outgoing_in_use(), (0, 4));
        for (n, &id) in sent[..4].iter().enumerate() {
            assert!(ids.insert(id), "id {id:#x} was used before");
            complete(id);
            complete(id);
            assert_eq!(answers.take(), [(n, NtStatus::SUCCESS, vec![6; 8])], "round {round}");
        }
        assert_eq!(client.stop_reason(), None);
    }
    client.disable();
}

/// An id of a former opening finds nobody in the next one.
#[test]
fn ids_do_not_survive_a_reopening() {
    let bus = RawBus::new();
    let client = client(&as_bus(&bus), &Device::new());
    let answers = Arc::new(Answers::default());
    let mut former = Vec::new();
    for round in 0..3 {
        client.enable().unwrap();
        bus.offered(None);
        client.process(1);
        let peer = bus.open_completed();
        client.process(1);
        (0..4).for_each(|n| send(&client, n, &[0; 8], &answers));
        let mut writer = peer.writer();
        for &id in &former {
            push(&mut writer, PacketKind::Completion, false, id, &[]);
        }
        client.process(64);
        assert_eq!(answers.take(), [], "round {round}");
        former.extend(read_all(&mut peer.reader()).iter().map(|read| read.transaction_id));
        client.disable();
        assert_eq!(answers.take().len(), 4, "round {round}");
    }
}

/// Completions are taken in like packets: they count against the budget, and are not deliveries.
#[test]
fn completions_count_against_the_budget() {
    let pair = Pair::open(Device::new());
    let answers = Arc::new(Answers::default());
    (0..10).for_each(|n| send(&pair.client, n, &[0; 8], &answers));
    pair.server.process(64);
    let progress = pair.client.process(4);
    assert_eq!((progress.packets, progress.more), (4, true));
    assert_eq!(answers.take().len(), 4);
    assert_eq!(pair.client.process(64).packets, 6);
    assert_eq!(answers.take().len(), 6);
    assert_eq!(pair.driver.take_calls(), [], "no batch of deliveries has ended");
    pair.close();
}
