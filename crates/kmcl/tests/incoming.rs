//! Packets from the peer: delivery, batches, failure, deferral, quota, client context.
//!
//! Source: kmcl-semantics sections 6 and 14; D-36, D-42, D-44, D-47, D-61, D-62.

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
use std::thread;

use common::raw::{RawBus, as_bus, push, read_all};
use common::{
    Answers, Call, Device, Driver, Pair, WAIT, in_time, lock, packet, padded, send, server, until,
};
use kmcl::{
    Channel, ChannelError, ChannelState, IncomingPacket, Level, NtStatus, Progress, SendFlags,
};
use vmbus_wire::packet::PacketKind;

use Call::{Complete, Packet};

const NONE: SendFlags = SendFlags::empty();

/// Sends so many transactions of 8 bytes, numbered in their first byte and as their pointer.
fn send_numbered(channel: &Channel, numbers: std::ops::Range<u8>, answers: &Arc<Answers>) {
    numbers.for_each(|n| send(channel, n.into(), &[n; 8], answers));
}

fn numbered(numbers: std::ops::Range<u8>) -> Vec<Call> {
    numbers.map(|n| Packet(vec![n; 8])).collect()
}

// ---- Delivery ---------------------------------------------------------------------------------------

/// EvtVmbChannelProcessPacket: once for each packet, in order, with its payload, its transaction and
/// whether the peer waits; VmbChannelPacketComplete answers.
#[test]
fn each_packet_is_delivered_once_in_order() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let device = Device::on_packet({
        let seen = seen.clone();
        move |channel, packet| {
            assert_eq!(packet.level(), Level::Passive);
            assert!(!packet.has_external_data());
            assert_eq!(channel.state(), ChannelState::Active);
            lock(&seen).push((packet.payload().to_vec(), packet.wants_completion()));
            packet.complete(b"done");
        }
    });
    let pair = Pair::open(device);
    let answers = Arc::new(Answers::default());
    for n in 0..200_u8 {
        let flags = if n % 2 == 0 { WAIT } else { NONE };
        packet(&pair.client, n.into(), &answers).send(&[n; 5], None, flags).unwrap();
    }
    pair.pump();
    let expected: Vec<_> = (0..200).map(|n| (padded(&[n; 5]), n % 2 == 0)).collect();
    assert_eq!(*lock(&seen), expected);
    let mut answers = answers.take();
    answers.sort();
    for (n, answer) in answers.into_iter().enumerate() {
        let payload = if n % 2 == 0 { padded(b"done") } else { vec![] };
        assert_eq!(answer, (n, NtStatus::SUCCESS, payload));
    }
    pair.close();
}

/// The peer's transaction id: any 64 bits, repeated as often as it likes, returned as they came.
#[test]
fn transaction_ids_are_opaque() {
    let bus = RawBus::new();
    let device = Device::holding();
    let server = server(&as_bus(&bus), &device);
    server.init_set_maximum_completion_size(8).unwrap();
    server.enable().unwrap();
    server.start();
    let peer = bus.open(8, 8);
    server.process(8);
    let mut writer = peer.writer();
    let ids = [0, u64::MAX, 5, 5, 5, 0xffff_ffff_ffff_fffd, 1 << 63];
    for id in ids {
        push(&mut writer, PacketKind::InBand, true, id, &[0; 8]);
    }
    server.process(8);
    let mut held = device.take_held();
    let came: Vec<_> = held.iter().map(IncomingPacket::transaction_id).collect();
    assert_eq!(came, ids);
    while let Some(packet) = held.pop() {
        packet.complete(&[1; 8]);
    }
    let back: Vec<_> = read_all(&mut peer.reader()).iter().map(|r| r.transaction_id).collect();
    let reversed: Vec<_> = ids.into_iter().rev().collect();
    assert_eq!(back, reversed, "completions may come in any order");
    server.disable();
}

/// VmbChannelPacketComplete in the packet's own buffer: in its callback, later, and while the channel is
/// frozen. What is not part of the payload is empty.
#[test]
fn a_packet_can_be_answered_with_a_part_of_itself() {
    let device = Device::on_packet(|_, packet| {
        let part = match packet.payload()[0] {
            0 => 0..8,
            1 => 8..16,
            2 => 16..16,
            3 => 9..17,
            _ => 5..5,
        };
        packet.complete_with_own(part);
    });
    let pair = Pair::open(device);
    let answers = Arc::new(Answers::default());
    let message = |n: u8| -> Vec<u8> { (n..n + 16).collect() };
    (0..5_u8).for_each(|n| send(&pair.client, n.into(), &message(n), &answers));
    pair.pump();
    let expected = |n: u8| match n {
        0 => message(0)[..8].to_vec(),
        1 => message(1)[8..].to_vec(),
        _ => vec![],
    };
    let mut got = answers.take();
    got.sort();
    for (n, answer) in (0..5_u8).zip(got) {
        assert_eq!(answer, (n.into(), NtStatus::SUCCESS, expected(n)));
    }
    pair.close();

    let pair = Pair::open(Device::holding());
    (0..3_u8).for_each(|n| send(&pair.client, n.into(), &message(n), &answers));
    pair.pump();
    let mut held = pair.device.take_held();
    held.pop().unwrap().complete_with_own(8..16);
    let frozen = pair.server.freeze().unwrap();
    held.pop().unwrap().complete_with_own(0..16);
    pair.pump();
    assert_eq!(answers.take(), [(2, NtStatus::SUCCESS, message(2)[8..].to_vec())]);
    frozen.thaw();
    held.pop().unwrap().complete_with_own(4..12);
    pair.pump();
    let mut got = answers.take();
    got.sort();
    let expected = [(0, message(0)[4..12].to_vec()), (1, message(1))]
        .map(|(n, bytes)| (n, NtStatus::SUCCESS, bytes));
    assert_eq!(got, expected);
    pair.close();
}

/// D-44, EvtVmbChannelProcessingComplete: at the end of every batch, whatever ended it, with the
/// number of its deliveries; not where nothing was delivered.
#[test]
fn processing_complete_ends_every_batch() {
    let answers = Arc::new(Answers::default());
    // The ring is empty.
    let pair = Pair::open(Device::new());
    pair.pump();
    assert_eq!(pair.device.take_calls(), []);
    send_numbered(&pair.client, 0..3, &answers);
    pair.server.process(100);
    assert_eq!(pair.device.take_calls(), [numbered(0..3), vec![Complete(3)]].concat());
    // The budget ends, and begins again.
    send_numbered(&pair.client, 0..3, &answers);
    let progress = pair.server.process(2);
    assert_eq!(progress, Progress { packets: 2, more: true, needs_passive: false });
    assert_eq!(pair.device.take_calls(), [numbered(0..2), vec![Complete(2)]].concat());
    let progress = pair.server.process(2);
    assert_eq!(progress, Progress { packets: 1, more: false, needs_passive: false });
    assert_eq!(pair.device.take_calls(), [numbered(2..3), vec![Complete(1)]].concat());
    // The quota.
    pair.server.set_transaction_quota(2);
    pair.device.with_packets({
        let device = Arc::downgrade(&pair.device);
        move |_, packet| device.upgrade().unwrap().hold(packet)
    });
    send_numbered(&pair.client, 0..3, &answers);
    pair.server.process(100);
    assert_eq!(pair.device.take_calls(), [numbered(0..2), vec![Complete(2)]].concat());
    pair.device.take_held().into_iter().for_each(|packet| packet.complete(&[]));
    pair.server.process(100);
    assert_eq!(pair.device.take_calls(), [numbered(2..3), vec![Complete(1)]].concat());
    pair.device.take_held().into_iter().for_each(|packet| packet.complete(&[]));
    // A pause: it takes effect after the present packet.
    pair.device.with_packets(|channel, packet| {
        channel.begin_pause();
        packet.complete(&[]);
    });
    send_numbered(&pair.client, 0..1, &answers);
    pair.server.process(100);
    assert_eq!(
        pair.device.take_calls(),
        [Packet(vec![0; 8]), Complete(1), Call::Suspend],
        "Suspend comes when the batch is over"
    );
    pair.server.start();
    pair.pump();
    pair.close();
}

/// Long runs come in batches of at most 64, so that completions reach the peer meanwhile.
#[test]
fn long_runs_come_in_batches() {
    let pair = Pair::open(Device::new());
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..150, &answers);
    assert_eq!(pair.server.process(1000).packets, 150);
    let batches: Vec<_> = pair
        .device
        .take_calls()
        .into_iter()
        .filter_map(|call| if let Complete(n) = call { Some(n) } else { None })
        .collect();
    assert_eq!(batches.iter().sum::<u32>(), 150);
    assert!(batches.iter().all(|&n| n <= 64), "{batches:?}");
    pair.pump();
    assert_eq!(answers.take().len(), 150);
    pair.close();
}

/// VmbChannelPacketComplete: later, in any order, from any thread.
#[test]
fn packets_are_completed_later_in_any_order_from_any_thread() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..6, &answers);
    pair.pump();
    assert_eq!(pair.server.incoming_outstanding(), 6);
    let mut held = pair.device.take_held();
    held.reverse();
    thread::scope(|scope| {
        for packet in held {
            let complete = move || {
                let n = packet.payload()[0];
                packet.complete(&[n + 100; 8]);
            };
            scope.spawn(complete).join().unwrap();
        }
    });
    assert_eq!(pair.server.incoming_outstanding(), 0);
    pair.pump();
    let expected: Vec<_> =
        (0..6_u8).rev().map(|n| (n.into(), NtStatus::SUCCESS, vec![n + 100; 8])).collect();
    assert_eq!(answers.take(), expected);
    pair.close();
}

/// D-47: a completion buffer for a peer that wants no completion is ignored; one beyond the limit is a
/// driver's bug, asserted in debug builds and clipped otherwise.
#[test]
fn completion_data_that_nobody_takes() {
    let pair = Pair::open_with(Device::holding(), |pair| {
        pair.server.init_set_maximum_completion_size(16).unwrap();
    });
    let answers = Arc::new(Answers::default());
    packet(&pair.client, 1, &answers).send(&[0; 8], None, NONE).unwrap();
    pair.pump();
    assert_eq!(answers.take(), [(1, NtStatus::SUCCESS, vec![])]);
    pair.device.take_held().into_iter().for_each(|packet| packet.complete(&[9; 16]));
    pair.pump();
    assert_eq!(answers.take(), []);

    send_numbered(&pair.client, 2..4, &answers);
    pair.pump();
    let [fits, large] = <[_; 2]>::try_from(pair.device.take_held()).unwrap();
    fits.complete(&[7; 16]);
    pair.pump();
    assert_eq!(answers.take(), [(2, NtStatus::SUCCESS, vec![7; 16])]);
    let panicked = catch_unwind(AssertUnwindSafe(|| large.complete(&[7; 17]))).is_err();
    assert_eq!(panicked, cfg!(debug_assertions));
    if !panicked {
        pair.pump();
        assert_eq!(answers.take(), [(3, NtStatus::SUCCESS, vec![7; 16])]);
        pair.close();
    }
}

/// Only what the ring holds: a packet longer than the channel's own limit is delivered all the same,
/// as the limit is that of sending (VmbChannelInitSetMaximumPacketSize).
#[test]
fn packets_longer_than_the_own_limit_are_delivered() {
    let pair = Pair::open_with(Device::echo(), |pair| {
        pair.server.init_set_maximum_packet_size(8).unwrap();
        pair.server.init_set_maximum_completion_size(8).unwrap();
    });
    pair.device.with_packets(|_, packet| {
        let sum: u64 = packet.payload().iter().map(|&byte| u64::from(byte)).sum();
        packet.complete(&sum.to_le_bytes());
    });
    let answers = Arc::new(Answers::default());
    send(&pair.client, 1, &[3; 4096], &answers);
    pair.pump();
    let expected = (3 * 4096_u64).to_le_bytes().to_vec();
    assert_eq!(answers.take(), [(1, NtStatus::SUCCESS, expected)]);
    pair.close();
}

// ---- Failure ----------------------------------------------------------------------------------------

/// D-36, VmbChannelPacketFail, or dropping the packet: no completion is sent, nothing is delivered
/// any more, Suspend and Closed still come; closed and opened again the channel works.
#[test]
fn a_failed_packet_stops_the_queue_until_the_next_opening() {
    type Fail = fn(IncomingPacket);
    let fails: [(&str, Fail); 2] = [("fail", IncomingPacket::fail), ("drop", drop)];
    for (what, fail) in fails {
        let pair = Pair::open(Device::on_packet(move |_, packet| match packet.payload()[0] {
            1 => fail(packet),
            n => packet.complete(&[n; 8]),
        }));
        let answers = Arc::new(Answers::default());
        send_numbered(&pair.client, 0..3, &answers);
        pair.pump();
        let delivered = [numbered(0..2), vec![Complete(2)]].concat();
        assert_eq!(pair.device.take_calls(), delivered, "{what}");
        assert_eq!(answers.take(), [(0, NtStatus::SUCCESS, vec![0; 8])], "{what}");
        assert_eq!(pair.server.stop_reason(), Some(ChannelError::PacketFailed), "{what}");
        assert_eq!(pair.server.state(), ChannelState::Active, "{what}");
        assert_eq!(pair.server.incoming_outstanding(), 0, "{what}");

        pair.server.pause();
        pair.server.start();
        pair.pump();
        let changes = [Call::Suspend, Call::Started, Call::PostStarted];
        assert_eq!(pair.device.take_calls(), changes, "{what}: nothing more is delivered");

        pair.client.disable();
        pair.pump();
        assert_eq!(pair.device.take_calls(), [Call::Suspend, Call::Closed], "{what}");
        assert_eq!(pair.server.stop_reason(), None, "{what}");
        pair.client.enable().unwrap();
        pair.pump();
        pair.device.take_calls();
        answers.take();
        send_numbered(&pair.client, 0..1, &answers);
        pair.pump();
        assert_eq!(answers.take(), [(0, NtStatus::SUCCESS, vec![0; 8])], "{what}: works again");
        pair.close();
    }
}

/// A packet failed by another thread, later, stops the queue as well; packets delivered before it can
/// still be completed.
#[test]
fn a_packet_may_be_failed_later() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..2, &answers);
    pair.pump();
    let [first, second] = <[_; 2]>::try_from(pair.device.take_held()).unwrap();
    thread::spawn(move || first.fail()).join().unwrap();
    send_numbered(&pair.client, 2..3, &answers);
    pair.pump();
    assert_eq!(pair.device.take_packets().len(), 2);
    second.complete(&[5; 8]);
    pair.pump();
    assert_eq!(answers.take(), [(1, NtStatus::SUCCESS, vec![5; 8])]);
    pair.close();
}

/// VmbChannelInitSetProcessPacketCallbacks: without them an incoming packet stops the channel.
#[test]
fn a_channel_without_callbacks_stops_at_its_first_packet() {
    let pair = Pair::new(Device::new());
    let client = Channel::allocate(kmcl::Side::Client, pair.bus.clone());
    client.client_init_set_target_pnp(common::TYPE, None, None).unwrap();
    pair.server.enable().unwrap();
    client.enable().unwrap();
    let answers = Arc::new(Answers::default());
    send(&pair.server, 1, &[0; 8], &answers);
    for _ in 0..4 {
        pair.server.process(8);
        client.process(8);
    }
    assert_eq!(client.stop_reason(), Some(ChannelError::PacketFailed));
    client.disable();
    pair.server.process(8);
    assert_eq!(answers.take(), [(1, NtStatus::DEVICE_REMOVED, vec![])]);
    pair.close();
}

/// A callback that panics fails its packet and takes nothing else with it: the channel can be closed,
/// and what others of the batch have completed is completed.
#[test]
fn a_callback_that_panics_fails_its_packet_only() {
    let pair = Pair::open(Device::on_packet(|_, packet| {
        assert_ne!(packet.payload()[0], 2, "the device's own bug");
        packet.complete(&[]);
    }));
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..5, &answers);
    let panicked = catch_unwind(AssertUnwindSafe(|| pair.server.process(100)));
    assert!(panicked.is_err());
    assert_eq!(pair.server.stop_reason(), Some(ChannelError::PacketFailed));
    assert_eq!(pair.server.incoming_outstanding(), 0);
    pair.pump();
    assert_eq!(answers.take().len(), 2);
    in_time(move || pair.close());
}

// ---- Passive level and deferral ---------------------------------------------------------------------

/// VmbChannelSetIncomingProcessingAtPassive: with it a thread that may not sleep delivers nothing;
/// without it either does. It can be changed at any time.
#[test]
fn processing_at_passive_waits_for_a_thread_that_may_sleep() {
    let pair = Pair::open(Device::on_packet(|_, packet| {
        let level = packet.level();
        packet.complete(format!("{level:?}").as_bytes());
    }));
    let answers = Arc::new(Answers::default());
    let needs = Progress { packets: 0, more: false, needs_passive: true };
    for require in [false, true, false] {
        pair.server.set_incoming_processing_at_passive(require);
        send_numbered(&pair.client, 0..1, &answers);
        let dispatched = pair.server.process_at(Level::Dispatch, 8);
        let level = if require {
            assert_eq!(dispatched, needs);
            assert_eq!(pair.server.process_at(Level::Passive, 8).packets, 1);
            "Passive"
        } else {
            assert_eq!(dispatched, Progress { packets: 1, more: false, needs_passive: false });
            "Dispatch"
        };
        pair.client.process(8);
        assert_eq!(answers.take()[0].2, padded(level.as_bytes()), "require={require}");
    }
    pair.close();
}

/// State-change callbacks run on threads that may sleep only (section 5).
#[test]
fn state_changes_wait_for_a_thread_that_may_sleep() {
    let pair = Pair::open(Device::new());
    pair.client.disable();
    let needs = Progress { packets: 0, more: false, needs_passive: true };
    assert_eq!(pair.server.process_at(Level::Dispatch, 8), needs);
    assert_eq!(pair.device.take_calls(), []);
    pair.server.process_at(Level::Passive, 8);
    assert_eq!(pair.device.take_calls(), [Call::Suspend, Call::Closed]);
    pair.close();
}

/// VmbChannelPacketDeferToPassive, D-42: the packet comes again, at passive level for certain; later
/// ones wait for it; its context and payload are kept.
#[test]
fn a_deferred_packet_keeps_its_place() {
    let pair = Pair::open_with(
        Device::on_packet(|_, mut packet| {
            let first_time = packet.client_context()[0] == 0;
            packet.client_context()[0] = 1;
            match (packet.payload()[0], packet.level()) {
                (1, Level::Dispatch) => packet.defer_to_passive(),
                (1, Level::Passive) => {
                    assert!(!first_time, "the context is kept");
                    packet.complete(b"passive");
                }
                _ => packet.complete(b"at once"),
            }
        }),
        |pair| pair.server.init_set_client_context_size(1).unwrap(),
    );
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..3, &answers);
    let progress = pair.server.process_at(Level::Dispatch, 8);
    assert_eq!(progress, Progress { packets: 2, more: false, needs_passive: true });
    assert_eq!(pair.device.take_calls(), [numbered(0..2), vec![Complete(2)]].concat());
    assert_eq!(pair.server.process_at(Level::Dispatch, 8).packets, 0, "it waits");
    assert_eq!(pair.device.take_calls(), []);
    assert_eq!(pair.server.process_at(Level::Passive, 8).packets, 2);
    assert_eq!(pair.device.take_calls(), [numbered(1..3), vec![Complete(2)]].concat());
    pair.client.process(8);
    let answers: Vec<_> = answers.take().into_iter().map(|(n, _, payload)| (n, payload)).collect();
    let expected = [(0, &b"at once"[..]), (1, b"passive"), (2, b"at once")];
    assert_eq!(answers, expected.map(|(n, payload)| (n, padded(payload))));
    pair.close();
}

/// A deferral at passive level is honoured at once, within the budget: it cannot loop for ever.
#[test]
fn a_packet_that_defers_for_ever_ends_with_the_budget() {
    let pair = Pair::open(Device::on_packet(|_, packet| packet.defer_to_passive()));
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..1, &answers);
    let progress = pair.server.process(10);
    assert_eq!(progress, Progress { packets: 10, more: true, needs_passive: false });
    pair.device.with_packets(|_, packet| packet.complete(&[]));
    pair.pump();
    assert_eq!(answers.take().len(), 1);
    pair.close();
}

/// D-11, D-42: a packet that waits for its deferral is not in the driver's hands: a pause does not wait
/// for it, it is delivered again after the next start, and lost with the channel.
#[test]
fn a_pause_does_not_wait_for_a_deferred_packet() {
    for resumed in [true, false] {
        let pair = Pair::open(Device::on_packet(|_, packet| match packet.level() {
            Level::Dispatch => packet.defer_to_passive(),
            Level::Passive => packet.complete(&[]),
        }));
        let answers = Arc::new(Answers::default());
        send_numbered(&pair.client, 0..2, &answers);
        pair.server.process_at(Level::Dispatch, 8);
        assert_eq!(pair.server.incoming_outstanding(), 0);
        pair.server.pause();
        assert_eq!(pair.server.state(), ChannelState::Paused);
        pair.pump();
        assert_eq!(pair.device.take_packets().len(), 1);
        if resumed {
            pair.server.start();
            pair.pump();
            assert_eq!(pair.device.take_packets(), [[0; 8], [1; 8]]);
            assert_eq!(answers.take().len(), 2);
        }
        pair.close();
    }
}

/// Handing a packet back is for its own callback: elsewhere the packet is failed, and a debug build
/// says so.
#[test]
fn a_packet_is_handed_back_in_its_own_callback_only() {
    type HandBack = fn(&Pair);
    let ways: [(&str, HandBack); 3] = [
        ("after its callback", |pair| {
            let [packet] = <[_; 1]>::try_from(pair.device.take_held()).unwrap();
            packet.defer_to_passive();
        }),
        ("two in one callback", |pair| {
            pair.device.with_packets({
                let device = Arc::downgrade(&pair.device);
                move |_, packet| {
                    let former = device.upgrade().unwrap().take_held();
                    packet.defer_to_passive();
                    former.into_iter().for_each(IncomingPacket::defer_to_passive);
                }
            });
            packet(&pair.client, 9, &Arc::default()).send(&[9; 8], None, NONE).unwrap();
            pair.server.process(1);
        }),
        ("in a completion routine", |pair| {
            struct HandBack(Mutex<Vec<IncomingPacket>>);
            impl kmcl::PacketCompletion for HandBack {
                fn completed(&self, _: kmcl::Packet, _: NtStatus, _: &[u8]) {
                    std::mem::take(&mut *lock(&self.0))
                        .into_iter()
                        .for_each(IncomingPacket::defer_to_passive);
                }
            }
            let mut packet = pair.server.packet_allocate().unwrap();
            packet.set_completion_routine(Arc::new(HandBack(Mutex::new(pair.device.take_held()))));
            packet.send(&[0; 8], None, WAIT).unwrap();
            pair.client.process(8);
            // A packet behind the completion, so that the batch delivers something.
            pair.device.with_packets(|_, packet| packet.complete(&[]));
            pair.server.process(8);
        }),
    ];
    for (what, hand_back) in ways {
        let pair = Pair::open(Device::holding());
        let answers = Arc::new(Answers::default());
        send_numbered(&pair.client, 0..1, &answers);
        pair.pump();
        let panicked = catch_unwind(AssertUnwindSafe(|| hand_back(&pair))).is_err();
        assert_eq!(panicked, cfg!(debug_assertions), "{what}");
        assert_eq!(pair.server.stop_reason(), Some(ChannelError::PacketFailed), "{what}");
        assert_eq!(answers.take(), [], "{what}");
        in_time(move || pair.close());
    }
}

// ---- Quota ------------------------------------------------------------------------------------------

/// VmbChannelSetTransactionQuota: at most so many are outstanding; each completion lets the next one
/// in; lowering it below the present number holds all back until enough are completed.
#[test]
fn the_quota_bounds_what_is_outstanding() {
    let pair = Pair::open(Device::holding());
    pair.server.set_transaction_quota(4);
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..10, &answers);
    pair.pump();
    let mut held = pair.device.take_held();
    assert_eq!(held.len(), 4);
    held.remove(0).complete(&[]);
    pair.pump();
    held.extend(pair.device.take_held());
    assert_eq!(held.len(), 4, "one in, one out");

    pair.server.set_transaction_quota(2);
    for outstanding in [3, 2] {
        held.remove(0).complete(&[]);
        pair.pump();
        assert_eq!(pair.device.take_held().len(), 0);
        assert_eq!(pair.server.incoming_outstanding(), outstanding);
    }
    held.remove(0).complete(&[]);
    pair.pump();
    held.extend(pair.device.take_held());
    assert_eq!(held.len(), 2);

    // Raising it restarts nothing: the next completion does.
    pair.server.set_transaction_quota(100);
    held.remove(0).complete(&[]);
    pair.pump();
    held.extend(pair.device.take_held());
    assert_eq!(held.len(), 5, "all that there are");
    held.into_iter().for_each(|packet| packet.complete(&[]));
    pair.pump();
    assert_eq!(answers.take().len(), 10);
    pair.close();
}

/// A completion on another thread wakes the driver of a channel that the quota has stopped.
#[test]
fn a_completion_restarts_a_queue_stopped_by_the_quota() {
    let pair = Pair::open(Device::holding());
    pair.server.set_transaction_quota(1);
    let drivers = [Driver::spawn(&pair.server), Driver::spawn(&pair.client)];
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..100, &answers);
    let pair = in_time(move || {
        for n in 0..100 {
            until("the next packet is held", || pair.server.incoming_outstanding() == 1);
            let mut held = pair.device.take_held();
            while held.is_empty() {
                thread::yield_now();
                held = pair.device.take_held();
            }
            assert_eq!(held.len(), 1);
            assert_eq!(held[0].payload(), [n; 8]);
            held.into_iter().for_each(|packet| packet.complete(&[]));
        }
        answers.wait(100);
        pair
    });
    drop(drivers);
    pair.close();
}

/// D-61: a quota of 0 is asserted in debug builds and ignored otherwise.
#[test]
fn a_quota_of_nothing_is_ignored() {
    let pair = Pair::open(Device::new());
    let set = || pair.server.set_transaction_quota(0);
    assert_eq!(catch_unwind(AssertUnwindSafe(set)).is_err(), cfg!(debug_assertions));
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..3, &answers);
    pair.pump();
    assert_eq!(answers.take().len(), 3);
    pair.close();
}

/// Our bound on packets in flight (VmbChannelInitSetMaximumPacketCount of later interface versions).
#[test]
fn the_packet_count_bounds_what_is_outstanding() {
    let pair = Pair::open_with(Device::holding(), |pair| {
        pair.server.init_set_maximum_packet_count(3).unwrap();
    });
    let answers = Arc::new(Answers::default());
    send_numbered(&pair.client, 0..9, &answers);
    for _ in 0..3 {
        pair.pump();
        let held = pair.device.take_held();
        assert_eq!(held.len(), 3);
        held.into_iter().for_each(|packet| packet.complete(&[]));
    }
    pair.pump();
    assert_eq!(answers.take().len(), 9);
    pair.close();
}

// ---- Client context ---------------------------------------------------------------------------------

/// D-62, VmbChannelInitSetClientContextSize: an area on each packet, zeroed at delivery, kept until
/// completion, apart from that of other packets.
#[test]
fn each_packet_has_a_context_of_its_own() {
    let pair = Pair::open_with(Device::holding(), |pair| {
        pair.server.init_set_client_context_size(24).unwrap();
    });
    let answers = Arc::new(Answers::default());
    for _ in 0..3 {
        send_numbered(&pair.client, 1..5, &answers);
        pair.pump();
        let mut held = pair.device.take_held();
        for packet in &mut held {
            assert_eq!(packet.client_context(), [0; 24]);
            let n = packet.payload()[0];
            packet.client_context().fill(n);
        }
        for mut packet in held {
            let n = packet.payload()[0];
            assert_eq!(packet.client_context(), [n; 24]);
            packet.complete(&[]);
        }
    }
    pair.pump();
    pair.close();
}
