//! Many threads at one channel: completions, sends, life-cycle calls and processing race, and every
//! packet ends exactly once. No test is decided by timing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use common::{Answers, Device, Driver, Pair, WAIT, in_time, lock, packet, send};
use kmcl::{
    Channel, ChannelState, IncomingPacket, NtStatus, Packet, PacketCompletion, ProcessPacket,
    SendFlags, StateChange, Timeout,
};

const NONE: SendFlags = SendFlags::empty();

/// Counts how often each numbered packet ended, and how.
#[derive(Default)]
struct Ends(Mutex<BTreeMap<usize, Vec<NtStatus>>>);

impl PacketCompletion for Ends {
    fn completed(&self, packet: Packet, status: NtStatus, _: &[u8]) {
        lock(&self.0).entry(packet.pointer()).or_default().push(status);
    }
}

impl Ends {
    fn packet(self: &Arc<Self>, channel: &Channel, n: usize) -> Packet {
        let mut packet = channel.packet_allocate().unwrap();
        packet.set_pointer(n);
        packet.set_completion_routine(Arc::clone(self) as _);
        packet
    }
}

/// Asserts that no two callbacks of a kind overlap, and that packets come between Started and Suspend.
#[derive(Default)]
struct Strict {
    changing: AtomicBool,
    processing: AtomicBool,
    active: AtomicBool,
    delivered: AtomicUsize,
}

/// True while this lives.
struct Alone<'a>(&'a AtomicBool);

impl<'a> Alone<'a> {
    fn enter(flag: &'a AtomicBool) -> Self {
        assert!(!flag.swap(true, Ordering::SeqCst), "two callbacks overlap");
        Self(flag)
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl StateChange for Strict {
    fn opened(&self, _: &Channel) -> Result<(), NtStatus> {
        let _alone = Alone::enter(&self.changing);
        assert!(!self.active.load(Ordering::SeqCst));
        Ok(())
    }
    fn started(&self, _: &Channel) {
        let _alone = Alone::enter(&self.changing);
        assert!(!self.active.swap(true, Ordering::SeqCst), "Started twice");
    }
    fn post_started(&self, _: &Channel) {
        let _alone = Alone::enter(&self.changing);
        assert!(self.active.load(Ordering::SeqCst));
    }
    fn suspend(&self, _: &Channel) {
        let _alone = Alone::enter(&self.changing);
        assert!(self.active.swap(false, Ordering::SeqCst), "Suspend twice");
        assert!(!self.processing.load(Ordering::SeqCst), "Suspend while a packet is delivered");
    }
    fn closed(&self, channel: &Channel) {
        let _alone = Alone::enter(&self.changing);
        assert!(!self.active.load(Ordering::SeqCst));
        assert_eq!(channel.incoming_outstanding(), 0, "Closed while packets are out");
    }
}

impl ProcessPacket for Strict {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        let _alone = Alone::enter(&self.processing);
        assert!(self.active.load(Ordering::SeqCst), "a packet outside Started and Suspend");
        self.delivered.fetch_add(1, Ordering::SeqCst);
        let payload = packet.payload().to_vec();
        packet.complete(&payload);
    }
    fn processing_complete(&self, _: &Channel, _: u32) {
        let _alone = Alone::enter(&self.processing);
    }
}

/// A pair that is open, with strict callbacks on both ends.
fn strict() -> (Pair, [Arc<Strict>; 2]) {
    let devices = [Arc::new(Strict::default()), Arc::new(Strict::default())];
    let pair = Pair::open_with(Device::new(), |pair| {
        for (channel, device) in [&pair.server, &pair.client].into_iter().zip(&devices) {
            channel.init_set_state_change_callbacks(device.clone()).unwrap();
            channel.init_set_process_packet_callbacks(device.clone()).unwrap();
        }
    });
    (pair, devices)
}

/// VmbChannelPacketComplete from many threads, in whatever order: each packet is answered once, with
/// what was meant for it.
#[test]
fn many_threads_complete() {
    const PACKETS: usize = 3000;
    let pair = Pair::open_with(Device::holding(), |pair| {
        pair.server.init_set_maximum_completion_size(64).unwrap();
    });
    let drivers = [Driver::spawn(&pair.server), Driver::spawn(&pair.client)];
    let over = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let (device, over) = (pair.device.clone(), over.clone());
            thread::spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    // Whatever is there, backwards.
                    for packet in device.take_held().into_iter().rev() {
                        let payload = packet.payload().to_vec();
                        packet.complete(&payload);
                    }
                    thread::yield_now();
                }
            })
        })
        .collect();
    let answers = Arc::new(Answers::default());
    let pair = in_time(move || {
        let mut ended = Vec::new();
        for chunk in (0..PACKETS).collect::<Vec<_>>().chunks(100) {
            for &n in chunk {
                send(&pair.client, n, &(n as u64).to_le_bytes(), &answers);
            }
            ended.extend(answers.wait(0));
        }
        while ended.len() < PACKETS {
            ended.extend(answers.wait(1));
        }
        ended.sort();
        for (n, (pointer, status, payload)) in ended.into_iter().enumerate() {
            assert_eq!((pointer, status), (n, NtStatus::SUCCESS));
            assert_eq!(payload, (n as u64).to_le_bytes());
        }
        over.store(true, Ordering::SeqCst);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        pair
    });
    drop(drivers);
    pair.close();
}

/// VmbPacketSend from many threads on both ends at a time: everything arrives once, and what one thread
/// has sent arrives in its order.
#[test]
fn many_threads_send() {
    const THREADS: u8 = 4;
    const EACH: u32 = 500;
    let pair = Pair::open(Device::new());
    let drivers = [Driver::spawn(&pair.server), Driver::spawn(&pair.client)];
    let pair = in_time(move || {
        let ends = Arc::new(Ends::default());
        thread::scope(|scope| {
            for sender in [&pair.server, &pair.client] {
                for thread in 0..THREADS {
                    let ends = &ends;
                    scope.spawn(move || {
                        for n in 0..EACH {
                            let mut message = [thread; 100];
                            message[..4].copy_from_slice(&n.to_le_bytes());
                            let flags = if n % 2 == 0 { WAIT } else { NONE };
                            let id = usize::from(thread) << 32 | n as usize;
                            ends.packet(sender, id).send(&message, None, flags).unwrap();
                        }
                    });
                }
            }
        });
        let all = usize::from(THREADS) * EACH as usize;
        common::until("all have ended", || {
            lock(&ends.0).values().map(Vec::len).sum::<usize>() == 2 * all
        });
        for (id, statuses) in &*lock(&ends.0) {
            assert_eq!(*statuses, [NtStatus::SUCCESS; 2], "{id:#x}, once from each end");
        }
        for device in [&pair.device, &pair.driver] {
            let mut next = [0; THREADS as usize];
            common::until("all have arrived", || device.delivered() == all);
            for message in device.take_packets() {
                let thread = usize::from(message[50]);
                let n = u32::from_le_bytes(message[..4].try_into().unwrap());
                assert_eq!(n, next[thread], "of thread {thread}");
                next[thread] += 1;
            }
            assert_eq!(next, [EACH; THREADS as usize]);
        }
        pair
    });
    drop(drivers);
    pair.close();
}

/// Start and Pause racing with traffic on both ends: nothing is delivered outside Started and Suspend,
/// nothing is lost.
#[test]
fn pause_and_start_race_with_traffic() {
    const PACKETS: usize = 2000;
    for driven in [true, false] {
        let (pair, devices) = strict();
        let drivers = driven.then(|| [Driver::spawn(&pair.server), Driver::spawn(&pair.client)]);
        let pair = in_time(move || {
            let answers = Arc::new(Answers::default());
            thread::scope(|scope| {
                for channel in [&pair.server, &pair.client] {
                    scope.spawn(move || {
                        for _ in 0..300 {
                            channel.pause();
                            assert_ne!(channel.state(), ChannelState::Pausing);
                            channel.start();
                            if !driven {
                                channel.process(16);
                            }
                        }
                    });
                }
                for (n, channel) in [&pair.server, &pair.client].into_iter().enumerate() {
                    for i in 0..PACKETS {
                        send(channel, n * PACKETS + i, &[0; 100], &answers);
                        if !driven {
                            channel.process(16);
                        }
                    }
                }
                let mut ended = Vec::new();
                while ended.len() < 2 * PACKETS {
                    if !driven {
                        pair.server.process(64);
                        pair.client.process(64);
                        ended.extend(answers.take());
                    } else {
                        ended.extend(answers.wait(1));
                    }
                }
                ended.sort();
                for (n, answer) in ended.into_iter().enumerate() {
                    assert_eq!(answer, (n, NtStatus::SUCCESS, vec![0; 104]));
                }
            });
            pair
        });
        for device in &devices {
            assert_eq!(device.delivered.load(Ordering::SeqCst), PACKETS);
        }
        drop(drivers);
        pair.close();
    }
}

/// Disable and Enable racing with sends from other threads: a send is refused, or its packet ends exactly
/// once; when Disable returns nothing is in use.
#[test]
fn disable_races_with_sends() {
    let (pair, _devices) = strict();
    let drivers = [Driver::spawn(&pair.server), Driver::spawn(&pair.client)];
    let ends = Arc::new(Ends::default());
    let (pair, sent) = in_time({
        let ends = ends.clone();
        move || {
            let over = AtomicBool::new(false);
            let mut sent = Vec::new();
            thread::scope(|scope| {
                let threads: Vec<_> = (0..3)
                    .map(|thread| {
                        let (over, ends, client) = (&over, &ends, &pair.client);
                        scope.spawn(move || {
                            let mut accepted = Vec::new();
                            for n in 0.. {
                                if over.load(Ordering::SeqCst) {
                                    break;
                                }
                                let id = thread << 32 | n;
                                let flags = if n % 3 == 0 { NONE } else { WAIT };
                                match ends.packet(client, id).send(&[0; 64], None, flags) {
                                    Ok(()) => accepted.push(id),
                                    Err(refused) => {
                                        let status = refused.error.status();
                                        assert_eq!(status, NtStatus::DEVICE_REMOVED);
                                    }
                                }
                                if client.outgoing_in_use().0 > 1000 {
                                    thread::yield_now();
                                }
                            }
                            accepted
                        })
                    })
                    .collect();
                for round in 0..100 {
                    pair.client.disable();
                    assert_eq!(pair.client.outgoing_in_use(), (0, 0), "round {round}");
                    pair.client.enable().unwrap();
                    if round % 2 == 0 {
                        let open = || pair.client.state() == ChannelState::Active;
                        common::until("open again", open);
                    }
                }
                over.store(true, Ordering::SeqCst);
                sent.extend(threads.into_iter().flat_map(|thread| thread.join().unwrap()));
            });
            pair.client.disable();
            (pair, sent)
        }
    });
    drop(drivers);
    pair.close();
    let ends = lock(&ends.0);
    let twice: Vec<_> = ends.iter().filter(|(_, statuses)| statuses.len() != 1).collect();
    assert!(twice.is_empty(), "not once: {twice:?}");
    assert_eq!(ends.len(), sent.len());
    assert!(sent.iter().all(|id| ends.contains_key(id)));
}

/// Completions racing with the end of the channel, on either side: Closed waits for the last one.
#[test]
fn completions_race_with_the_close() {
    let (to_worker, from_device) = mpsc::channel::<IncomingPacket>();
    let pair = Pair::open(Device::on_packet(move |_, packet| to_worker.send(packet).unwrap()));
    let drivers = [Driver::spawn(&pair.server), Driver::spawn(&pair.client)];
    let completing = thread::spawn(move || {
        for packet in from_device {
            packet.complete(&[1; 8]);
        }
    });
    let pair = in_time(move || {
        let ends = Arc::new(Ends::default());
        let mut sent = 0;
        for round in 0..100 {
            for _ in 0..20 {
                ends.packet(&pair.client, sent).send(&[0; 8], None, WAIT).unwrap();
                sent += 1;
            }
            if round % 2 == 0 {
                pair.client.disable();
                pair.client.enable().unwrap();
            } else {
                pair.server.disable();
                common::until("rescinded", || pair.client.state() == ChannelState::Disabled);
                pair.server.enable().unwrap();
                pair.server.start();
                pair.client.enable().unwrap();
            }
            common::until("open again", || {
                pair.client.state() == ChannelState::Active
                    && pair.server.state() == ChannelState::Active
            });
        }
        pair.client.disable();
        let ends = lock(&ends.0);
        assert_eq!(ends.len(), sent);
        assert!(ends.values().all(|statuses| statuses.len() == 1));
        pair
    });
    drop(drivers);
    pair.device.with_packets(|_, packet| packet.complete(&[]));
    pair.close();
    in_time(move || completing.join().unwrap());
}

/// Many threads that all call `process`, on both ends: callbacks of a kind never overlap, nothing is
/// missed.
#[test]
fn many_threads_process() {
    let (pair, devices) = strict();
    let pair = in_time(move || {
        const PACKETS: usize = 3000;
        let answers = Arc::new(Answers::default());
        let ended = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                for channel in [&pair.server, &pair.client] {
                    let ended = &ended;
                    scope.spawn(move || {
                        while ended.load(Ordering::SeqCst) < PACKETS {
                            channel.process(7);
                        }
                    });
                }
            }
            for n in 0..PACKETS {
                send(&pair.client, n, &[0; 64], &answers);
            }
            while ended.load(Ordering::SeqCst) < PACKETS {
                ended.fetch_add(answers.wait(1).len(), Ordering::SeqCst);
            }
        });
        pair
    });
    assert_eq!(devices[0].delivered.load(Ordering::SeqCst), 3000);
    pair.close();
}

/// VmbChannelSetTransactionQuota changed all the time by one thread while others complete: it never
/// stalls, and is never exceeded by more than what was outstanding when it was lowered.
#[test]
fn the_quota_may_change_at_any_time() {
    const HIGHEST: u32 = 8;
    let (to_worker, from_device) = mpsc::channel::<IncomingPacket>();
    let most = Arc::new(AtomicU32::new(0));
    let pair = Pair::open_with(
        Device::on_packet(move |_, packet| to_worker.send(packet).unwrap()),
        |pair| {
            pair.server.init_set_maximum_completion_size(8).unwrap();
            pair.server.set_transaction_quota(HIGHEST);
        },
    );
    let drivers = [Driver::spawn(&pair.server), Driver::spawn(&pair.client)];
    let completing = thread::spawn({
        let (server, most) = (pair.server.clone(), most.clone());
        move || {
            for packet in from_device {
                most.fetch_max(server.incoming_outstanding(), Ordering::SeqCst);
                packet.complete(&[]);
            }
        }
    });
    let pair = in_time(move || {
        let answers = Arc::new(Answers::default());
        for n in 0..2000_u32 {
            send(&pair.client, 0, &[0; 8], &answers);
            pair.server.set_transaction_quota(1 + n % HIGHEST);
        }
        pair.server.set_transaction_quota(HIGHEST);
        let mut ended = 0;
        while ended < 2000 {
            ended += answers.wait(1).len();
        }
        pair
    });
    assert!((1..=HIGHEST).contains(&most.load(Ordering::SeqCst)));
    drop(drivers);
    pair.device.with_packets(|_, packet| packet.complete(&[]));
    pair.close();
    in_time(move || completing.join().unwrap());
}

/// Synchronous requests of many threads while the channel is disabled and enabled: each returns.
#[test]
fn synchronous_requests_race_with_the_end_of_the_channel() {
    for driven in [true, false] {
        let (pair, _devices) = strict();
        let server = Driver::spawn(&pair.server);
        let client = driven.then(|| Driver::spawn(&pair.client));
        let pair = in_time(move || {
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                for thread in 0..3_u8 {
                    let (over, client) = (&over, &pair.client);
                    scope.spawn(move || {
                        while !over.load(Ordering::SeqCst) {
                            let mut answer = [0; 8];
                            let sent = client.send_synchronous_request(
                                &[thread; 8],
                                None,
                                WAIT,
                                Some(&mut answer),
                                Timeout::Never,
                            );
                            match sent {
                                Ok(len) => assert_eq!((len, answer), (8, [thread; 8])),
                                Err(error) => assert!(matches!(
                                    error.status(),
                                    NtStatus::CANCELLED | NtStatus::DEVICE_REMOVED
                                )),
                            }
                        }
                    });
                }
                for _ in 0..50 {
                    pair.client.disable();
                    pair.client.enable().unwrap();
                    common::until("open again", || {
                        if !driven {
                            pair.client.process(8);
                        }
                        pair.client.state() == ChannelState::Active
                    });
                }
                over.store(true, Ordering::SeqCst);
                // Those that wait for a channel that is not open any more are ended by this.
                pair.client.disable();
            });
            pair
        });
        drop((server, client));
        pair.close();
    }
}

/// A packet dropped by any thread fails the channel once and lets the close go on.
#[test]
fn packets_dropped_by_any_thread_let_the_channel_close() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    for round in 0..20 {
        (0..6).for_each(|n| send(&pair.client, n, &[0; 8], &answers));
        pair.server.process(64);
        let held = pair.device.take_held();
        let count = held.len();
        assert_ne!(count, 0, "round {round}");
        let droppers: Vec<_> =
            held.into_iter().map(|packet| thread::spawn(move || drop(packet))).collect();
        pair.client.disable();
        in_time({
            let server = pair.server.clone();
            move || {
                while server.state() != ChannelState::Closed {
                    server.process(8);
                }
            }
        });
        droppers.into_iter().for_each(|dropper| dropper.join().unwrap());
        assert_eq!(answers.take().len(), 6);
        pair.client.enable().unwrap();
        pair.pump();
    }
    packet(&pair.client, 0, &answers).send(&[0; 8], None, NONE).unwrap();
    pair.pump();
    assert_eq!(pair.device.take_held().len(), 1, "and works again");
    pair.close();
}
