//! The life cycle of both endpoints: which callbacks run, in which order, and what the life-cycle
//! calls wait for.
//!
//! Source: kmcl-semantics section 3; D-2 to D-4, D-7, D-8, D-11.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use common::{
    Answers, Call, Device, Failures, INSTANCE, Pair, TYPE, in_time, open_descriptors, send, until,
};
use kmcl::{Channel, ChannelState, NtStatus, Side};

use Call::{Closed, Opened, PostStarted, Started, Suspend};
use ChannelState as S;

// ---- Opening ----------------------------------------------------------------------------------------

/// VmbChannelAllocate, VmbChannelEnable, VmbChannelStart: neither waits for the peer; the client is
/// started by Enable itself, the server by Start (section 3.2).
#[test]
fn enable_and_start_do_not_wait_for_the_peer() {
    let pair = Pair::new(Device::new());
    assert_eq!(pair.states(), (S::Disabled, S::Disabled));
    pair.client.enable().unwrap();
    assert_eq!(pair.states(), (S::Disabled, S::Enabled), "waits for an offer");
    pair.server.enable().unwrap();
    pair.server.start();
    assert_eq!(pair.states(), (S::Enabled, S::Enabled));
    assert_eq!(pair.device.take_calls(), []);
    assert_eq!(pair.driver.take_calls(), []);
    pair.pump();
    assert_eq!(pair.states(), (S::Active, S::Active));
    assert_eq!(pair.device.take_calls(), [Opened, Started, PostStarted]);
    assert_eq!(pair.driver.take_calls(), [Opened, Started, PostStarted]);
    pair.close();
}

/// D-2: Started comes when the channel is both open and started, whichever came last.
#[test]
fn started_comes_with_the_later_of_open_and_start() {
    let pair = Pair::new(Device::new());
    pair.server.enable().unwrap();
    pair.client.enable().unwrap();
    pair.pump();
    assert_eq!(pair.states(), (S::Paused, S::Active));
    assert_eq!(pair.device.take_calls(), [Opened]);
    pair.server.start();
    assert_eq!(pair.states(), (S::Active, S::Active));
    assert_eq!(pair.device.take_calls(), [Started, PostStarted]);
    pair.server.start();
    assert_eq!(pair.device.take_calls(), [], "a second start changes nothing");
    pair.close();
}

/// VMB_CHANNEL_STATE_CHANGE_CALLBACKS: each callback, and the whole set, is optional.
#[test]
fn callbacks_are_optional() {
    struct None;
    impl kmcl::StateChange for None {}
    impl kmcl::ProcessPacket for None {
        fn process_packet(&self, _: &Channel, packet: kmcl::IncomingPacket) {
            packet.complete(&[]);
        }
    }
    let bus = kmcl::loopback::LoopbackBus::new(1 << 20).unwrap();
    let server = Channel::allocate(Side::Server, bus.clone());
    server.server_init_set_target_interface_id(TYPE, INSTANCE).unwrap();
    server.init_set_process_packet_callbacks(Arc::new(None)).unwrap();
    let client = Channel::allocate(Side::Client, bus);
    client.client_init_set_target_pnp(TYPE, Some(INSTANCE), Option::None).unwrap();
    client.init_set_state_change_callbacks(Arc::new(None)).unwrap();
    server.enable().unwrap();
    server.start();
    client.enable().unwrap();
    for _ in 0..3 {
        server.process(1);
        client.process(1);
    }
    let answers = Arc::new(Answers::default());
    send(&client, 1, &[0; 8], &answers);
    server.process(1);
    client.process(1);
    assert_eq!(answers.take(), [(1, NtStatus::SUCCESS, vec![])]);
    client.disable();
    server.disable();
}

/// D-3, EvtVmbChannelOpened: a device that turns the open down hears nothing more; its offer stands;
/// the client is told the status (EvtVmbChannelPnpFailure) and is Disabled.
#[test]
fn a_server_that_refuses_the_open_stays_as_it_was() {
    let pair = Pair::new(Device::new());
    let failures = Failures::of(&pair.client);
    let refuse = Arc::new(AtomicBool::new(true));
    pair.device.when({
        let refuse = refuse.clone();
        move |_, call| match call {
            Opened if refuse.load(Ordering::SeqCst) => Err(NtStatus::ACCESS_DENIED),
            _ => Ok(()),
        }
    });
    pair.server.enable().unwrap();
    pair.server.start();
    pair.client.enable().unwrap();
    pair.pump();
    assert_eq!(pair.device.take_calls(), [Opened]);
    assert_eq!(pair.driver.take_calls(), []);
    assert_eq!(pair.states(), (S::Enabled, S::Disabled));
    assert_eq!(failures.take(), [(NtStatus::ACCESS_DENIED, S::Disabled)]);
    assert!(pair.server.memory().is_none(), "the rings were let go of");

    // The offer stands: the next client may have it, and after it was open it returns to Closed.
    refuse.store(false, Ordering::SeqCst);
    pair.client.enable().unwrap();
    pair.pump();
    assert_eq!(pair.device.take_calls(), [Opened, Started, PostStarted]);
    pair.client.disable();
    pair.pump();
    assert_eq!(pair.states(), (S::Closed, S::Disabled));
    pair.device.take_calls();
    refuse.store(true, Ordering::SeqCst);
    pair.client.enable().unwrap();
    pair.pump();
    assert_eq!(pair.states(), (S::Closed, S::Disabled));
    assert_eq!(pair.device.take_calls(), [Opened]);
    pair.close();
}

/// D-3: a client whose Opened fails closes the channel again and is Disabled; no callback follows.
#[test]
fn a_client_that_refuses_the_open_is_disabled() {
    let pair = Pair::new(Device::new());
    let failures = Failures::of(&pair.client);
    pair.driver.when(|_, call| match call {
        Opened => Err(NtStatus::UNSUCCESSFUL),
        _ => Ok(()),
    });
    pair.server.enable().unwrap();
    pair.server.start();
    pair.client.enable().unwrap();
    pair.pump();
    assert_eq!(pair.driver.take_calls(), [Opened]);
    assert_eq!(pair.states(), (S::Closed, S::Disabled));
    assert_eq!(pair.device.take_calls(), [Opened, Started, PostStarted, Suspend, Closed]);
    assert_eq!(failures.take(), [], "the connection did not fail");
    pair.close();
}

// ---- Pause and start --------------------------------------------------------------------------------

/// VmbChannelPause and VmbChannelStart of an open channel, any number of times, on both sides (D-7).
#[test]
fn pause_and_start_alternate_suspend_and_started() {
    let pair = Pair::open(Device::new());
    for (channel, device) in [(&pair.server, &pair.device), (&pair.client, &pair.driver)] {
        for _ in 0..3 {
            channel.pause();
            assert_eq!(channel.state(), S::Paused);
            assert_eq!(device.take_calls(), [Suspend]);
            channel.pause();
            assert_eq!(device.take_calls(), [], "a second pause changes nothing");
            channel.start();
            assert_eq!(channel.state(), S::Active);
            assert_eq!(device.take_calls(), [Started, PostStarted]);
        }
    }
    pair.close();
}

/// EvtVmbChannelSuspend: no packet is delivered between Suspend and the next Started; what came
/// meanwhile is delivered then.
#[test]
fn nothing_is_delivered_while_paused() {
    let pair = Pair::open(Device::echo());
    let answers = Arc::new(Answers::default());
    pair.server.pause();
    for n in 0..5 {
        send(&pair.client, n, &[1; 8], &answers);
    }
    pair.pump();
    assert_eq!(pair.device.take_calls(), [Suspend]);
    assert_eq!(answers.take(), []);
    pair.server.start();
    pair.pump();
    let calls = pair.device.take_calls();
    assert_eq!(calls[..2], [Started, PostStarted]);
    assert_eq!(answers.take().len(), 5);
    pair.close();
}

/// D-4, VmbChannelPause on a Disabled channel: the client's next Enable does not start it, the one
/// after that does; Start on the Disabled channel takes it back.
#[test]
fn pause_of_a_disabled_client_arms_the_next_enable_only() {
    let pair = Pair::new(Device::new());
    pair.server.enable().unwrap();
    pair.server.start();
    let open = || {
        pair.client.enable().unwrap();
        pair.pump();
        let calls = pair.driver.take_calls();
        let state = pair.client.state();
        pair.client.disable();
        pair.pump();
        pair.driver.take_calls();
        (state, calls)
    };
    let started = (S::Active, vec![Opened, Started, PostStarted]);
    let paused = (S::Paused, vec![Opened]);
    pair.client.pause();
    assert_eq!(open(), paused);
    assert_eq!(open(), started, "the pause was used up");
    pair.client.pause();
    pair.client.start();
    assert_eq!(open(), started, "the pause was taken back");
    pair.client.pause();
    pair.client.enable().unwrap();
    pair.pump();
    pair.client.start();
    assert_eq!(pair.client.state(), S::Active, "start ends the armed pause");
    pair.close();
}

/// VmbChannelPause, D-11: it returns when the packets delivered are completed, outgoing ones or not.
#[test]
fn pause_waits_for_incoming_packets_and_not_for_outgoing_ones() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    send(&pair.client, 7, &[0; 8], &answers);
    send(&pair.server, 8, &[0; 8], &answers);
    pair.server.process(8);
    let [packet] = <[_; 1]>::try_from(pair.device.take_held()).unwrap();
    pair.device.take_calls();

    let completed = Arc::new(AtomicBool::new(false));
    let pausing = thread::spawn({
        let (server, completed) = (pair.server.clone(), completed.clone());
        move || {
            server.pause();
            completed.load(Ordering::SeqCst)
        }
    });
    until("suspended", || pair.server.state() == S::Pausing);
    assert_eq!(pair.server.incoming_outstanding(), 1);
    pair.device.wait_for(&Suspend);
    completed.store(true, Ordering::SeqCst);
    packet.complete(&[]);
    assert!(in_time(move || pausing.join().unwrap()), "pause returned before the completion");
    assert_eq!(pair.server.state(), S::Paused);
    assert_eq!(pair.server.outgoing_in_use(), (0, 1), "the outgoing transaction survives (D-11)");

    // The peer completes it: that is seen once the channel is started again.
    pair.pump();
    pair.server.start();
    pair.pump();
    let mut answers: Vec<_> =
        answers.take().into_iter().map(|(n, status, _)| (n, status)).collect();
    answers.sort();
    assert_eq!(answers, [(7, NtStatus::SUCCESS), (8, NtStatus::SUCCESS)]);
    pair.close();
}

/// VmbChannelStart while a pause still waits: when the last packet is completed the channel goes on.
#[test]
fn start_during_a_pause_resumes_when_drained() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    send(&pair.client, 1, &[0; 8], &answers);
    pair.server.process(8);
    pair.device.take_calls();
    pair.server.begin_pause();
    assert_eq!(pair.server.state(), S::Pausing);
    pair.server.start();
    assert_eq!(pair.server.state(), S::Pausing);
    assert_eq!(pair.device.take_calls(), [Suspend]);
    for packet in pair.device.take_held() {
        packet.complete(&[]);
    }
    pair.pump();
    assert_eq!(pair.server.state(), S::Active);
    assert_eq!(pair.device.take_calls(), [Started, PostStarted]);
    pair.close();
}

/// `begin_pause` and `begin_disable` do not wait; the state tells when they are done.
#[test]
fn begin_pause_and_begin_disable_do_not_wait() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    send(&pair.client, 1, &[0; 8], &answers);
    pair.server.process(8);
    let held = pair.device.take_held();
    pair.device.take_calls();
    pair.server.begin_pause();
    assert_eq!((pair.server.state(), pair.device.take_calls()), (S::Pausing, vec![Suspend]));
    pair.server.begin_disable();
    assert_eq!((pair.server.state(), pair.device.take_calls()), (S::Closing, vec![]));
    drop(held);
    pair.server.process(0);
    assert_eq!((pair.server.state(), pair.device.take_calls()), (S::Disabled, vec![Closed]));
    pair.close();
}

// ---- Closing ----------------------------------------------------------------------------------------

/// Section 3.2: the client disables. Suspend, then Closed, on both sides; the server's offer stands
/// and is opened again; the client must be enabled again.
#[test]
fn a_client_closes_and_opens_again() {
    let pair = Pair::open(Device::new());
    for _ in 0..3 {
        pair.client.disable();
        assert_eq!(pair.driver.take_calls(), [Suspend, Closed]);
        pair.pump();
        assert_eq!(pair.states(), (S::Closed, S::Disabled));
        assert_eq!(pair.device.take_calls(), [Suspend, Closed]);
        pair.client.enable().unwrap();
        pair.pump();
        assert_eq!(pair.states(), (S::Active, S::Active));
        assert_eq!(pair.device.take_calls(), [Opened, Started, PostStarted]);
        assert_eq!(pair.driver.take_calls(), [Opened, Started, PostStarted]);
    }
    pair.close();
}

/// Section 3.2: the server disables, which rescinds the offer. Suspend, then Closed, on both sides;
/// both are Disabled and can be enabled again.
#[test]
fn a_server_rescinds_and_offers_again() {
    let pair = Pair::open(Device::new());
    for _ in 0..3 {
        pair.server.disable();
        assert_eq!(pair.device.take_calls(), [Suspend, Closed]);
        pair.pump();
        assert_eq!(pair.states(), (S::Disabled, S::Disabled));
        assert_eq!(pair.driver.take_calls(), [Suspend, Closed]);
        pair.enable();
    }
    pair.close();
}

/// Section 3.2: a paused channel that goes down hears Closed only, whoever closes it.
#[test]
fn a_paused_channel_hears_closed_only() {
    for server_closes in [false, true] {
        let pair = Pair::open(Device::new());
        pair.server.pause();
        pair.client.pause();
        pair.device.take_calls();
        pair.driver.take_calls();
        if server_closes {
            pair.server.disable();
        } else {
            pair.client.disable();
        }
        pair.pump();
        assert_eq!(pair.device.take_calls(), [Closed], "server_closes={server_closes}");
        assert_eq!(pair.driver.take_calls(), [Closed], "server_closes={server_closes}");
        pair.close();
    }
}

/// VmbChannelDisable: legal on a channel that was never opened, and on one that is Disabled.
#[test]
fn disable_of_a_channel_never_opened_calls_nothing() {
    let pair = Pair::new(Device::new());
    for (channel, device) in [(&pair.server, &pair.device), (&pair.client, &pair.driver)] {
        channel.disable();
        channel.enable().unwrap();
        channel.disable();
        channel.disable();
        assert_eq!(channel.state(), S::Disabled);
        assert_eq!(device.take_calls(), []);
    }
    pair.close();
}

/// VmbChannelDisable, EvtVmbChannelSuspend: Closed waits for the packets delivered; so does the call.
#[test]
fn disable_waits_for_incoming_packets() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    send(&pair.client, 1, &[0; 8], &answers);
    pair.server.process(8);
    pair.device.take_calls();
    let disabling = thread::spawn({
        let (server, device) = (pair.server.clone(), pair.device.clone());
        move || {
            server.disable();
            device.take_calls()
        }
    });
    pair.device.wait_for(&Suspend);
    until("closing", || pair.server.state() == S::Closing);
    for packet in pair.device.take_held() {
        packet.complete(&[]);
    }
    assert_eq!(in_time(move || disabling.join().unwrap()), [Suspend, Closed]);
    assert_eq!(pair.server.state(), S::Disabled);
    pair.close();
}

/// The peer closes while a pause waits for packets: pause returns, Closed follows the last packet.
#[test]
fn a_close_during_a_pause_ends_in_closed() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    send(&pair.client, 1, &[0; 8], &answers);
    pair.server.process(8);
    pair.device.take_calls();
    pair.server.begin_pause();
    pair.client.disable();
    pair.pump();
    assert_eq!(pair.server.state(), S::Closing);
    assert_eq!(pair.device.take_calls(), [Suspend]);
    drop(pair.device.take_held());
    pair.pump();
    assert_eq!(pair.server.state(), S::Closed);
    assert_eq!(pair.device.take_calls(), [Closed]);
    pair.close();
}

/// VmbChannelPause must not return while a delivered packet is out, even if a Disable of another
/// thread overtakes it.
#[test]
fn pause_overtaken_by_disable_still_waits_for_the_packets() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    send(&pair.client, 1, &[0; 8], &answers);
    pair.server.process(8);
    let returned = Arc::new(AtomicUsize::new(0));
    let completed = Arc::new(AtomicBool::new(false));
    let calls: [fn(&Channel); 2] = [Channel::pause, Channel::disable];
    let mut threads = Vec::new();
    for (call, state) in calls.into_iter().zip([S::Pausing, S::Closing]) {
        threads.push(thread::spawn({
            let server = pair.server.clone();
            let (returned, completed) = (returned.clone(), completed.clone());
            move || {
                call(&server);
                assert!(completed.load(Ordering::SeqCst), "returned while a packet is out");
                returned.fetch_add(1, Ordering::SeqCst);
            }
        }));
        until("on its way", || pair.server.state() == state);
    }
    // Whoever waits was woken by the change of state and has looked by now, or will.
    assert_eq!(returned.load(Ordering::SeqCst), 0);
    completed.store(true, Ordering::SeqCst);
    drop(pair.device.take_held());
    in_time(move || threads.into_iter().for_each(|thread| thread.join().unwrap()));
    assert_eq!(returned.load(Ordering::SeqCst), 2);
    pair.close();
}

// ---- The end ----------------------------------------------------------------------------------------

/// VmbChannelCleanup: callbacks are released, also where device and channel hold each other.
#[test]
fn cleanup_releases_the_callbacks() {
    let device = Device::new();
    let server = {
        let pair = Pair::open(device.clone());
        let handle = pair.server.clone();
        device.when(move |_, _| {
            let _kept = &handle;
            Ok(())
        });
        let server = pair.server.clone();
        pair.close();
        server
    };
    assert!(Arc::strong_count(&device) > 1);
    server.cleanup();
    assert_eq!(Arc::strong_count(&device), 1);
}

/// VmbChannelCleanup needs a Disabled channel: asserted in debug builds (D-12), disabled otherwise.
#[test]
fn cleanup_of_an_open_channel_is_asserted() {
    let pair = Pair::open(Device::new());
    let server = pair.server.clone();
    let panicked = catch_unwind(AssertUnwindSafe(move || server.cleanup())).is_err();
    assert_eq!(panicked, cfg!(debug_assertions));
    pair.close();
}

/// Opening, closing and dropping channels in any state leaves nothing behind: memory, mappings,
/// descriptors.
#[test]
fn nothing_is_leaked_by_any_way_to_the_end() {
    let ends: [fn(Pair); 5] = [
        Pair::close,
        drop,
        |pair| drop(pair.server),
        |pair| {
            pair.server.disable();
            drop(pair);
        },
        |pair| {
            let answers = Arc::new(Answers::default());
            send(&pair.client, 1, &[0; 8], &answers);
            pair.server.process(1);
            drop(pair.device.take_held());
            drop(pair);
        },
    ];
    let before = open_descriptors();
    for (n, end) in ends.into_iter().enumerate() {
        let pair = Pair::open(Device::holding());
        pair.server.doorbell_fd().unwrap();
        let bus = pair.bus.clone();
        end(pair);
        assert_eq!(bus.free_pages(), bus.memory().total_bytes() / 4096, "end {n}");
        assert_eq!(Arc::strong_count(&bus), 1, "end {n}");
    }
    // Descriptors of other tests come and go where tests share a process.
    until("descriptors are closed", || open_descriptors() <= before);
}
