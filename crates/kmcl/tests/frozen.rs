//! Freezing: packets in flight are handed over or completed while nothing leaves, the channel is saved,
//! and goes on here or elsewhere. Design, promises 1, 3, 4 and 7.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::thread;
use std::time::Duration;

use common::keeper::{Asked, Kept, chunks, hand_over, saved};
use common::raw::Said;
use common::{Answers, Device, Driver, PATIENCE, Pair, in_time, lock, send, until};
use kmcl::{
    Channel, ChannelState, Error, Fence, HandOverProblem, IncomingPacket, MAX_DEVICE_STATE,
    NtStatus, ProcessPacket, ResumedPacket, Save,
};

/// An Active channel whose device has packets with the ids from 0 on.
fn busy(packets: u64) -> Kept {
    let mut kept = Kept::active();
    for id in 0..packets {
        kept.guest().send(id, 2);
    }
    kept.process();
    assert_eq!(lock(&kept.keeper.held).len(), usize::try_from(packets).unwrap());
    kept
}

/// As [`busy`], of a device that settles nothing by itself.
fn stubborn(packets: u64) -> (Kept, Arc<Mutex<Vec<IncomingPacket>>>) {
    let kept = busy(packets);
    let running = Arc::new(Mutex::new(Vec::new()));
    let keep = running.clone();
    kept.keeper.when_frozen(move |packet| lock(&keep).push(packet));
    (kept, running)
}

/// A waker that counts.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Nothing is delivered, completed or sent while frozen; after the thaw all of it is, in order, each
/// once: completions that were held, packets that were handed over, new ones.
#[test]
fn a_thaw_goes_on_as_if_nothing_had_happened() {
    let mut kept = busy(4);
    kept.keeper.when_frozen(|packet| match packet.transaction_id() {
        0 | 2 => packet.complete(&[0xc0; 8]),
        _ => hand_over(packet),
    });
    let frozen = kept.channel.freeze().unwrap();
    assert!(kept.channel.is_frozen());
    assert_eq!(frozen.running(), 0);
    kept.guest().send(4, 1);
    kept.process();
    kept.send(1);
    assert_eq!(kept.guest().read(), [], "nothing leaves");
    assert_eq!(lock(&kept.keeper.held).len(), 0, "nothing is delivered");
    assert_eq!(kept.keeper.take_asked(), [Asked::Freeze]);
    saved(frozen.channel());
    assert!(kept.channel.freeze().is_err(), "once at a time");
    frozen.thaw();
    assert!(!kept.channel.is_frozen());
    let asked = kept.keeper.take_asked();
    assert!(asked.contains(&Asked::Thaw));
    kept.process();
    let read = kept.guest().read();
    let completed: Vec<_> = read.iter().filter(|read| read.payload == [0xc0; 8]).collect();
    assert_eq!(completed.iter().map(|read| read.transaction_id).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(read.len(), 3, "and what was sent");
    let state = |id: u64| id.to_le_bytes().repeat(2).into_iter().rev().collect::<Vec<_>>();
    assert_eq!(
        kept.keeper.take_again(),
        [1, 3].map(|id| (Fence::NeverStarted, state(id), id.to_le_bytes().repeat(2)))
    );
    let ids: Vec<_> = lock(&kept.keeper.held).iter().map(IncomingPacket::transaction_id).collect();
    assert_eq!(ids, [1, 3, 4], "before any new one");
    kept.end();
}

/// Packets come again in the order of their first delivery, whatever order they were handed over in, here
/// and elsewhere.
#[test]
fn packets_come_again_in_the_order_of_their_first_delivery() {
    for elsewhere in [false, true] {
        let (mut kept, running) = stubborn(6);
        let frozen = kept.channel.freeze().unwrap();
        let mut packets = std::mem::take(&mut *lock(&running));
        for at in [4, 0, 2, 0, 1, 0] {
            let packet = packets.remove(at);
            match packet.transaction_id() % 2 {
                0 => packet.never_started().hand_over(&[]).unwrap(),
                _ => packet.cancelled().hand_over(&[]).unwrap(),
            }
        }
        if elsewhere {
            let state = saved(frozen.channel());
            let next = kept.successor();
            frozen.move_away();
            next.reopen(true);
            next.channel.restore_from(&state[..]).unwrap();
            next.start();
            kept = next;
        } else {
            frozen.thaw();
        }
        kept.process();
        let again: Vec<_> =
            kept.keeper.take_again().into_iter().map(|(fence, _, p)| (fence, p[0])).collect();
        let expected: Vec<_> = (0..6)
            .map(|id| (if id % 2 == 0 { Fence::NeverStarted } else { Fence::Cancelled }, id))
            .collect();
        assert_eq!(again, expected, "{elsewhere}");
        kept.end();
    }
}

/// A packet that is still running holds the save back with STATUS_DEVICE_BUSY and its number; a wait and
/// a waker tell when none is, whoever settles the last one, on whatever thread, however.
#[test]
fn a_running_packet_holds_the_save_back_and_its_end_wakes() {
    type Settle = fn(IncomingPacket);
    let ways: [(&str, Settle); 4] = [
        ("completed", |packet| packet.complete(&[1; 8])),
        ("handed over", hand_over),
        ("failed", IncomingPacket::fail),
        ("dropped", drop),
    ];
    for (what, settle) in ways {
        let (kept, running) = stubborn(2);
        let frozen = kept.channel.freeze().unwrap();
        let woken = Arc::new(Woken::default());
        frozen.notify(Waker::from(woken.clone()));
        for left in [2, 1] {
            let refused = frozen.save().unwrap_err();
            assert_eq!(refused, Error::Running { packets: left }, "{what}");
            assert_eq!(refused.status(), NtStatus::DEVICE_BUSY);
            assert_eq!(kept.channel.save_begin().unwrap_err(), refused);
            assert_eq!(frozen.running(), left);
            assert!(!frozen.wait(Some(Duration::ZERO)));
            assert_eq!(woken.0.load(Ordering::SeqCst), 0, "{what}");
            let packet = lock(&running).remove(0);
            if left == 1 {
                let (frozen, waited) = in_time(move || {
                    let settling = thread::spawn(move || settle(packet));
                    let waited = frozen.wait(None);
                    settling.join().unwrap();
                    (frozen, waited)
                });
                assert!(waited);
                until("woken", || woken.0.load(Ordering::SeqCst) != 0);
                assert!(frozen.wait(Some(Duration::ZERO)));
                let late = Arc::new(Woken::default());
                frozen.notify(Waker::from(late.clone()));
                assert_eq!(late.0.load(Ordering::SeqCst), 1, "at once where nothing runs");
                saved(frozen.channel());
                frozen.thaw();
                break;
            }
            settle(packet);
        }
        kept.channel.disable();
    }
}

/// Only a frozen channel takes packets, and no more device state than the limit; the packet comes back
/// with the reason. A statement can be taken back.
#[test]
fn a_packet_is_handed_over_only_to_a_frozen_channel() {
    let (kept, running) = stubborn(1);
    let packet = kept.keeper.take_held().remove(0);
    let refused = packet.never_started().hand_over(&[]).unwrap_err();
    assert_eq!(refused.why, HandOverProblem::NotFrozen);
    assert_eq!(refused.why.status(), NtStatus::INVALID_DEVICE_STATE);
    lock(&kept.keeper.held).push(refused.packet);
    let frozen = kept.channel.freeze().unwrap();
    let packet = lock(&running).remove(0);
    let too_much = vec![0; MAX_DEVICE_STATE + 1];
    let refused = packet.cancelled().hand_over(&too_much).unwrap_err();
    assert_eq!(refused.why, HandOverProblem::TooLarge { bytes: MAX_DEVICE_STATE + 1 });
    assert_eq!(refused.why.status(), NtStatus::INVALID_BUFFER_SIZE);
    assert_eq!(frozen.running(), 1);
    let fenced = refused.packet.cancelled();
    assert_eq!(fenced.fence(), Fence::Cancelled);
    let packet = fenced.into_packet();
    packet.cancelled().hand_over(&too_much[1..]).unwrap();
    assert_eq!(frozen.running(), 0);
    let state = saved(frozen.channel());
    assert!(state.len() > MAX_DEVICE_STATE);
    frozen.thaw();
    kept.process();
    assert_eq!(kept.keeper.take_again()[0].1.len(), MAX_DEVICE_STATE);
    kept.end();
}

/// A channel that thaws in the middle of settling takes back what was handed over; what is still running
/// is completed as ever.
#[test]
fn a_thaw_may_come_in_the_middle_of_settling() {
    let (mut kept, running) = stubborn(3);
    let frozen = kept.channel.freeze().unwrap();
    let mut packets = std::mem::take(&mut *lock(&running));
    packets.remove(0).never_started().hand_over(&[]).unwrap();
    packets.remove(0).complete(&[1; 8]);
    frozen.thaw();
    assert_eq!(kept.guest().completions().len(), 1, "what was held leaves");
    let refused = packets.remove(0).never_started().hand_over(&[]).unwrap_err();
    assert_eq!(refused.why, HandOverProblem::NotFrozen);
    refused.packet.complete(&[2; 8]);
    kept.process();
    kept.keeper.take_held().into_iter().for_each(|packet| packet.complete(&[3; 8]));
    let completions = kept.guest().completions();
    assert_eq!(completions, [(2, vec![2; 8]), (0, vec![3; 8])]);
    assert_eq!(kept.channel.incoming_outstanding(), 0);
    kept.end();
}

/// Which channels can be frozen: a server's that is enabled, in whatever state.
#[test]
fn a_server_that_is_enabled_can_be_frozen() {
    let mut kept = Kept::disabled();
    assert_eq!(
        kept.channel.freeze().unwrap_err(),
        Error::State { function: "freeze", state: ChannelState::Disabled }
    );
    kept.channel.enable().unwrap();
    kept.channel.freeze().unwrap().thaw();
    kept.open();
    kept.channel.freeze().unwrap().thaw();
    assert_eq!(kept.channel.state(), ChannelState::Paused);
    kept.start();
    // Pausing: thawed, it goes on pausing.
    kept.guest().send(1, 1);
    kept.process();
    kept.channel.begin_pause();
    let frozen = kept.channel.freeze().unwrap();
    assert_eq!(frozen.running(), 0, "handed over");
    frozen.thaw();
    assert_eq!(kept.channel.state(), ChannelState::Paused);
    assert_eq!(kept.keeper.take_again(), [], "not while it is paused");
    saved(&kept.channel);
    kept.start();
    kept.process();
    assert_eq!(kept.keeper.take_again().len(), 1);
    kept.close();
    kept.keeper.take_held().into_iter().for_each(|packet| packet.complete(&[]));
    kept.channel.process(1);
    assert_eq!(kept.channel.state(), ChannelState::Closed);
    kept.channel.freeze().unwrap().thaw();
    let save = kept.channel.save().unwrap();
    assert!(kept.channel.freeze().is_err(), "not while it is saved");
    drop(save);
    kept.end();
    let pair = Pair::open(Device::new());
    assert!(pair.client.freeze().is_err(), "a client's");
    pair.close();
}

/// Inside a callback of its own the channel cannot be frozen, thawed in its save, or moved away: the
/// freeze ends when the callback is over.
#[test]
fn a_channel_is_not_frozen_inside_its_callbacks() {
    let device = Device::on_packet(|channel, packet| {
        assert!(channel.freeze().is_err());
        assert!(channel.save().is_err());
        assert!(channel.restore().is_err());
        packet.complete(&[]);
    });
    let pair = Pair::open_with(device, |pair| {
        pair.device.when(|channel, _| {
            assert!(channel.freeze().is_err());
            Ok(())
        });
    });
    let answers = Arc::new(Answers::default());
    send(&pair.client, 1, &[1; 8], &answers);
    pair.pump();
    assert_eq!(answers.take().len(), 1);
    pair.close();

    // A Frozen that a save callback drops.
    let kept = Kept::active();
    kept.send(1);
    let frozen = Arc::new(Mutex::new(Some(kept.channel.freeze().unwrap())));
    let dropped = frozen.clone();
    *lock(&kept.keeper.on_size) = Arc::new(move |channel, _| {
        drop(lock(&dropped).take());
        assert!(channel.is_frozen(), "not in the middle of the callback");
        Ok(1)
    });
    let mut save = kept.channel.save().unwrap();
    let mut buffer = vec![0; 4096];
    let _whatever = save.step(&mut buffer);
    assert!(!kept.channel.is_frozen());
    drop(save);
    assert!(kept.channel.freeze().is_ok());
    kept.end();
}

/// What happens to the channel while it is frozen waits, and is then handled: a close by the guest, a
/// pause, a start.
#[test]
fn life_cycle_events_wait_for_the_thaw() {
    let mut kept = busy(2);
    let frozen = kept.channel.freeze().unwrap();
    kept.channel.begin_pause();
    kept.channel.pause();
    assert_eq!(kept.channel.state(), ChannelState::Active);
    frozen.thaw();
    assert_eq!(kept.channel.state(), ChannelState::Paused);
    kept.start();
    kept.process();
    let frozen = kept.channel.freeze().unwrap();
    kept.close();
    assert_eq!(kept.channel.state(), ChannelState::Active);
    kept.bus.take_said();
    frozen.thaw();
    assert_eq!(kept.channel.state(), ChannelState::Closed);
    assert_eq!(kept.bus.take_said(), [Said::Closed]);
    assert_eq!(kept.guest().completions(), []);
    kept.end();
}

/// A disable thaws the channel; the Frozen that is left over ends nothing of what comes later.
#[test]
fn a_disable_thaws_first() {
    let mut kept = busy(2);
    let stale = kept.channel.freeze().unwrap();
    kept.channel.disable();
    assert_eq!(kept.channel.state(), ChannelState::Disabled);
    assert!(!kept.channel.is_frozen());
    assert!(stale.save().is_err());
    kept.channel.enable().unwrap();
    kept.guest = None;
    kept.open();
    kept.start();
    assert!(stale.save().is_err());
    let frozen = kept.channel.freeze().unwrap();
    drop(stale);
    assert!(kept.channel.is_frozen(), "thawed by a Frozen of before");
    saved(frozen.channel());
    frozen.thaw();
    kept.end();
}

/// A channel that moves away says so to its bus and to nobody else. Packets that were held, handed over or
/// in flight are forgotten, no callback runs, and what still runs ends in nothing, also when the channel
/// is open again by then.
#[test]
fn what_moves_away_leaves_nothing_behind() {
    let (mut kept, running) = stubborn(4);
    kept.send(3);
    let sent = kept.guest().read();
    assert_eq!(sent.len(), 1);
    let frozen = kept.channel.freeze().unwrap();
    let mut packets = std::mem::take(&mut *lock(&running));
    packets.remove(0).complete(&[1; 8]);
    hand_over(packets.remove(0));
    kept.bus.take_said();
    frozen.move_away();
    assert_eq!(kept.bus.take_said(), [Said::MovedAway]);
    assert_eq!(kept.channel.state(), ChannelState::Disabled);
    assert_eq!(kept.keeper.answers.take(), []);
    assert_eq!(kept.channel.outgoing_in_use(), (0, 0));
    assert_eq!(kept.channel.incoming_outstanding(), 0);
    assert_eq!(kept.guest().read(), []);
    packets.remove(0).complete(&[2; 8]);
    kept.guest = None;
    kept.channel.enable().unwrap();
    kept.open();
    kept.start();
    let frozen = kept.channel.freeze().unwrap();
    // One that is left is nothing to the channel of now, whatever is done with it.
    let refused = packets.remove(0).cancelled().hand_over(&[]).unwrap_err();
    frozen.thaw();
    drop(refused.packet);
    assert_eq!(kept.channel.stop_reason(), None);
    kept.guest().send(9, 1);
    kept.process();
    kept.keeper.take_held().into_iter().for_each(|packet| packet.complete(&[4; 8]));
    assert_eq!(kept.guest().completions(), [(9, vec![4; 8])]);
    assert_eq!(kept.channel.incoming_outstanding(), 0);
    kept.end();
}

/// The same with a late completion on the thread that delivers the next opening's packets.
#[test]
fn a_late_completion_in_a_callback_of_the_next_opening_is_nobodys() {
    let late = Arc::new(Mutex::new(Vec::<IncomingPacket>::new()));
    let device = Device::on_packet({
        let late = late.clone();
        move |_, packet| {
            for packet in lock(&late).drain(..) {
                packet.complete(&[0xbb; 8]);
            }
            packet.complete(&[0xaa; 8]);
        }
    });
    let mut kept = Kept::disabled();
    kept.channel.init_set_process_packet_callbacks(kept.keeper.clone()).unwrap();
    kept.channel.enable().unwrap();
    kept.open();
    kept.start();
    kept.guest().send(1, 1);
    kept.process();
    let running = late.clone();
    kept.keeper.when_frozen(move |packet| lock(&running).push(packet));
    kept.channel.freeze().unwrap().move_away();
    assert_eq!(lock(&late).len(), 1);
    kept.channel.init_set_process_packet_callbacks(device).unwrap();
    kept.channel.enable().unwrap();
    kept.guest = None;
    kept.open();
    kept.start();
    kept.guest().send(2, 1);
    kept.process();
    assert_eq!(kept.guest().completions(), [(2, vec![0xaa; 8])]);
    assert_eq!(kept.channel.incoming_outstanding(), 0);
    kept.end();
}

/// The frozen save takes packets in flight both ways, and each ends exactly once elsewhere: the device's
/// completed ones without its doing.
#[test]
fn every_packet_ends_once_elsewhere() {
    let mut kept = busy(6);
    kept.keeper.when_frozen(|packet| match packet.transaction_id() % 3 {
        0 => {
            let answer = packet.transaction_id().to_le_bytes().repeat(3);
            packet.complete(&answer);
        }
        1 => hand_over(packet),
        _ => packet.cancelled().hand_over(&[1, 2, 3]).unwrap(),
    });
    (0..5).for_each(|pointer| kept.send(pointer));
    let frozen = kept.channel.freeze().unwrap();
    let state = saved(frozen.channel());
    assert_eq!(chunks(&state).len(), 3 + 6 + 5);
    assert_eq!(saved(frozen.channel()), state);
    let next = kept.successor();
    frozen.move_away();
    next.reopen(true);
    next.channel.restore_from(&state[..]).unwrap();
    let mut next = next;
    assert_eq!(next.guest().completions(), [], "nothing leaves before it starts");
    next.start();
    next.process();
    let done: Vec<_> = next.guest().completions();
    assert_eq!(
        done,
        [0_u64, 3].map(|id| (id, id.to_le_bytes().repeat(3))),
        "completed by the library itself"
    );
    let again = next.keeper.take_again();
    assert_eq!(again.len(), 4);
    assert!(again.iter().all(|(fence, state, payload)| match fence {
        Fence::NeverStarted => state.iter().rev().eq(payload),
        Fence::Cancelled => *state == [1, 2, 3],
    }));
    next.keeper.take_held().into_iter().for_each(|packet| packet.complete(&[]));
    let mut ids: Vec<_> = next.guest().completions().into_iter().map(|done| done.0).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 4, 5]);
    next.end();
}

/// Room for their completions is promised to packets that come back: the channel's own packets do not
/// take it.
#[test]
fn restored_packets_have_room_for_their_completions() {
    let mut kept = Kept::paused_with(|channel| {
        channel.init_set_maximum_completion_size(4000).unwrap();
    });
    kept.start();
    for id in 0..4 {
        kept.guest().send(id, 1);
    }
    kept.process();
    let frozen = kept.channel.freeze().unwrap();
    let state = saved(frozen.channel());
    let mut next = Kept::on(&kept.bus, |channel| {
        channel.init_set_maximum_completion_size(4000).unwrap();
    });
    next.guest = kept.guest.take();
    frozen.move_away();
    next.reopen(true);
    next.channel.restore_from(&state[..]).unwrap();
    (0..40).for_each(|n| send(&next.channel, n, &[5; 1000], &next.keeper.answers));
    let (queued, in_flight) = next.channel.outgoing_in_use();
    assert!(queued > 0 && in_flight > 0, "{queued} {in_flight}");
    next.start();
    next.channel.process(64);
    let held = next.keeper.take_held();
    assert_eq!(held.len(), 4);
    held.into_iter().for_each(|packet| packet.complete(&[6; 4000]));
    let done = next.guest().completions();
    assert_eq!(done.len(), 4, "all at once, though the ring is full");
    assert!(done.iter().all(|(_, payload)| *payload == [6; 4000]));
    assert_eq!(next.channel.stop_reason(), None);
    next.channel.disable();
}

/// A driver's thread that runs `process` all the time, as a worker does.
#[test]
fn a_channel_that_is_driven_by_a_thread_freezes_and_thaws() {
    let pair = Pair::open(Device::echo());
    let drivers = [Driver::spawn(&pair.server), Driver::spawn(&pair.client)];
    let pair = in_time(move || {
        let answers = Arc::new(Answers::default());
        let mut ended = 0;
        for round in 0..100 {
            for n in 0..20 {
                send(&pair.client, n, &[1; 64], &answers);
            }
            let frozen = pair.server.freeze().unwrap();
            assert!(frozen.wait(None));
            assert_eq!(saved(&pair.server), saved(&pair.server), "{round}");
            frozen.thaw();
            ended += answers.take().len();
        }
        ended += answers.wait(2000 - ended).len();
        assert_eq!(ended, 2000);
        pair
    });
    drop(drivers);
    pair.close();
}

/// A device whose packets are settled by worker threads of its own: completed while there is time, handed
/// over once the channel is frozen.
struct Busy {
    /// Packets with the workers.
    work: Mutex<Vec<IncomingPacket>>,
    over: AtomicBool,
    freezing: AtomicBool,
    resumed: AtomicUsize,
}

impl Busy {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            work: Mutex::default(),
            over: AtomicBool::new(false),
            freezing: AtomicBool::new(false),
            resumed: AtomicUsize::new(0),
        })
    }

    fn run(&self, number: usize) {
        let mut turn = number;
        while !self.over.load(Ordering::SeqCst) {
            let packet = lock(&self.work).pop();
            let Some(packet) = packet else {
                thread::yield_now();
                continue;
            };
            turn += 1;
            if self.freezing.load(Ordering::SeqCst) && !turn.is_multiple_of(3) {
                let payload = packet.payload().to_vec();
                match packet.never_started().hand_over(&payload) {
                    Ok(()) => continue,
                    Err(refused) => lock(&self.work).push(refused.packet),
                }
            } else {
                let payload = packet.payload().to_vec();
                packet.complete(&payload);
            }
        }
    }
}

impl ProcessPacket for Busy {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        lock(&self.work).push(packet);
    }
    fn resume_packet(&self, _: &Channel, packet: ResumedPacket) {
        assert_eq!(packet.device_state(), packet.packet().payload());
        self.resumed.fetch_add(1, Ordering::SeqCst);
        lock(&self.work).push(packet.into_packet());
    }
    fn freeze(&self, _: &Channel) {
        self.freezing.store(true, Ordering::SeqCst);
    }
    fn thaw(&self, _: &Channel) {
        self.freezing.store(false, Ordering::SeqCst);
    }
}

/// Freezes race with completions and hand-overs on many threads, with sends on both ends, and with
/// `process` on others: every transaction ends once, with what was meant for it.
#[test]
fn freezes_race_with_everything() {
    const PACKETS: usize = 2000;
    let busy = Busy::new();
    let pair = Pair::open_with(Device::new(), |pair| {
        pair.server.init_set_process_packet_callbacks(busy.clone()).unwrap();
    });
    let drivers = [Driver::spawn(&pair.server), Driver::spawn(&pair.client)];
    let workers: Vec<_> = (0..3)
        .map(|number| {
            let busy = busy.clone();
            thread::spawn(move || busy.run(number))
        })
        .collect();
    let pair = in_time({
        let busy = busy.clone();
        move || {
            let (answers, own) = (Arc::new(Answers::default()), Arc::new(Answers::default()));
            let sending = AtomicBool::new(true);
            thread::scope(|scope| {
                scope.spawn(|| {
                    while sending.load(Ordering::SeqCst) {
                        pair.server.process(8);
                        thread::yield_now();
                    }
                });
                let freezing = scope.spawn(|| {
                    let mut freezes = 0;
                    while sending.load(Ordering::SeqCst) {
                        let frozen = pair.server.freeze().unwrap();
                        if freezes % 3 != 0 {
                            assert!(frozen.wait(Some(PATIENCE)));
                            assert_eq!(frozen.running(), 0);
                            saved(frozen.channel());
                        }
                        frozen.thaw();
                        freezes += 1;
                        thread::yield_now();
                    }
                    freezes
                });
                let mut ended = Vec::new();
                for n in 0..PACKETS {
                    send(&pair.client, n, &n.to_le_bytes(), &answers);
                    if n % 4 == 0 {
                        send(&pair.server, n, &[2; 32], &own);
                    }
                    ended.extend(answers.take());
                }
                while ended.len() < PACKETS {
                    ended.extend(answers.wait(1));
                }
                let mut own_ended = own.take().len();
                while own_ended < PACKETS / 4 {
                    own_ended += own.wait(1).len();
                }
                sending.store(false, Ordering::SeqCst);
                assert!(freezing.join().unwrap() > 0);
                ended.sort();
                for (n, (pointer, status, payload)) in ended.into_iter().enumerate() {
                    assert_eq!((pointer, status), (n, NtStatus::SUCCESS));
                    assert_eq!(payload, n.to_le_bytes());
                }
                assert_eq!(own_ended, PACKETS / 4);
            });
            busy.over.store(true, Ordering::SeqCst);
            workers.into_iter().for_each(|worker| worker.join().unwrap());
            pair
        }
    });
    drop(drivers);
    pair.close();
}

/// Freezes, saves and thaws race with disables and enables of another thread: no save survives its
/// channel, nothing hangs, every packet ends once.
#[test]
fn freezes_race_with_disables() {
    let kept = Kept::paused();
    let (channel, keeper) = (kept.channel.clone(), kept.keeper.clone());
    let ended = in_time(move || {
        let over = AtomicBool::new(false);
        let mut sent = 0;
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut buffer = vec![0; 300];
                    while !over.load(Ordering::SeqCst) {
                        if let Ok(frozen) = channel.freeze() {
                            if let Ok(mut save) = frozen.save() {
                                for _ in 0..5 {
                                    if save.step(&mut buffer).is_err() {
                                        break;
                                    }
                                }
                            }
                            drop(frozen);
                        }
                        thread::yield_now();
                    }
                });
            }
            for _ in 0..200 {
                for _ in 0..4 {
                    send(&channel, sent, &[1; 8], &keeper.answers);
                    sent += 1;
                }
                channel.disable();
                assert_eq!(channel.state(), ChannelState::Disabled);
                assert_eq!(channel.outgoing_in_use(), (0, 0));
                channel.enable().unwrap();
            }
            over.store(true, Ordering::SeqCst);
        });
        let ended = keeper.answers.take();
        assert_eq!(ended.len(), sent);
        ended
    });
    let once: BTreeSet<_> = ended.iter().map(|(pointer, ..)| *pointer).collect();
    assert_eq!(once.len(), ended.len());
    kept.end();
}

/// Packets that their callback handed back before the freeze are saved with the others, and keep their
/// place; a packet that came again may be handed over again.
#[test]
fn a_packet_may_be_handed_over_again_and_again() {
    let mut kept = busy(3);
    for round in 0..5 {
        let frozen = kept.channel.freeze().unwrap();
        let state = saved(frozen.channel());
        assert_eq!(chunks(&state).len(), 6);
        if round % 2 == 0 {
            frozen.thaw();
        } else {
            let next = kept.successor();
            frozen.move_away();
            next.reopen(true);
            next.channel.restore_from(&state[..]).unwrap();
            next.start();
            kept = next;
        }
        kept.process();
        let again: Vec<_> = kept.keeper.take_again().iter().map(|(.., p)| p[0]).collect();
        assert_eq!(again, [0, 1, 2], "round {round}");
    }
    kept.keeper.take_held().into_iter().for_each(|packet| packet.complete(&[1; 8]));
    assert_eq!(kept.guest().completions().len(), 3);
    kept.end();
}
