//! State-change callbacks: what they see, what they may do, on which thread they run.
//!
//! Source: kmcl-semantics sections 3.2 and 5; D-12.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{Answers, Call, Device, Driver, Pair, in_time, lock, send, until};
use kmcl::{Channel, ChannelState, Error, NtStatus, Side};

use Call::{Closed, Opened, PostStarted, Started, Suspend};
use ChannelState as S;

// ---- What callbacks see and may do ------------------------------------------------------------------

/// What the channel looks like from inside each callback: on its way, and memory is there as long as
/// GPADLs may be handled.
#[test]
fn callbacks_see_the_channel_on_its_way() {
    let pair = Pair::new(Device::new());
    let seen = Arc::new(Mutex::new(Vec::new()));
    for device in [&pair.device, &pair.driver] {
        let seen = seen.clone();
        device.when(move |channel, call| {
            let memory = channel.memory().is_some();
            lock(&seen).push((channel.side(), call.clone(), channel.state(), memory));
            Ok(())
        });
    }
    pair.enable();
    pair.server.pause();
    pair.server.start();
    pair.client.disable();
    pair.pump();
    let seen = std::mem::take(&mut *lock(&seen));
    for side in [Side::Server, Side::Client] {
        let of_side: Vec<_> = seen.iter().filter(|seen| seen.0 == side).cloned().collect();
        let expected: &[(Call, ChannelState)] = match side {
            Side::Server => &[
                (Opened, S::Opening),
                (Started, S::Opening),
                (PostStarted, S::Opening),
                (Suspend, S::Pausing),
                (Started, S::Paused),
                (PostStarted, S::Paused),
                (Suspend, S::Closing),
                (Closed, S::Closing),
            ],
            Side::Client => &[
                (Opened, S::Opening),
                (Started, S::Opening),
                (PostStarted, S::Opening),
                (Suspend, S::Closing),
                (Closed, S::Closing),
            ],
        };
        let expected: Vec<_> =
            expected.iter().map(|(call, state)| (side, call.clone(), *state, true)).collect();
        assert_eq!(of_side, expected);
    }
    pair.close();
}

/// D-12: Start, Pause and Disable inside a state-change callback are asserted in debug builds and
/// ignored otherwise; Enable is refused. Nothing hangs.
#[test]
fn life_cycle_calls_inside_a_callback_do_nothing() {
    let pair = Pair::new(Device::new());
    let refused = Arc::new(AtomicUsize::new(0));
    pair.device.when({
        let refused = refused.clone();
        move |channel, _| {
            let calls: [fn(&Channel); 3] = [Channel::start, Channel::pause, Channel::disable];
            for call in calls {
                let panicked = catch_unwind(AssertUnwindSafe(|| call(channel))).is_err();
                assert_eq!(panicked, cfg!(debug_assertions));
                refused.fetch_add(1, Ordering::SeqCst);
            }
            let state = channel.state();
            let error = channel.enable().unwrap_err();
            assert_eq!(error, Error::State { function: "enable", state });
            assert_eq!(error.status(), NtStatus::INVALID_DEVICE_STATE);
            Ok(())
        }
    });
    pair.enable();
    assert_eq!(refused.load(Ordering::SeqCst), 3 * 3);
    pair.client.disable();
    pair.pump();
    assert_eq!(refused.load(Ordering::SeqCst), 3 * 5);
    assert_eq!(pair.server.state(), S::Closed);
    pair.close();
}

/// D-12: so are Pause and Disable inside a packet callback; `begin_pause` is the way there.
#[test]
fn pause_inside_a_packet_callback_has_to_be_begun() {
    let pair = Pair::open(Device::on_packet(|channel, packet| {
        let calls: [fn(&Channel); 2] = [Channel::pause, Channel::disable];
        for call in calls {
            let panicked = catch_unwind(AssertUnwindSafe(|| call(channel))).is_err();
            assert_eq!(panicked, cfg!(debug_assertions));
        }
        channel.begin_pause();
        packet.complete(&[]);
    }));
    let answers = Arc::new(Answers::default());
    for n in 0..3 {
        send(&pair.client, n, &[0; 8], &answers);
    }
    pair.pump();
    assert_eq!(pair.server.state(), S::Paused);
    assert_eq!(pair.device.take_changes(), [Suspend]);
    pair.server.start();
    pair.pump();
    pair.close();
}

/// `process` inside a callback, while an event for the channel waits, comes back: the event is
/// handled when the callback is over.
#[test]
fn process_inside_a_callback_comes_back() {
    let pair = Pair::new(Device::new());
    let client = pair.client.clone();
    pair.device.when(move |channel, call| {
        if *call == PostStarted {
            client.disable();
            assert_eq!(channel.process(8).packets, 0);
        }
        Ok(())
    });
    let (server, device) = (pair.server.clone(), pair.device.clone());
    let pair = in_time(move || {
        pair.server.enable().unwrap();
        pair.server.start();
        pair.client.enable().unwrap();
        pair.pump();
        pair
    });
    assert_eq!(server.state(), S::Closed);
    assert_eq!(device.take_calls(), [Opened, Started, PostStarted, Suspend, Closed]);
    pair.close();
}

/// `process` comes back at once while another thread is inside a callback, also when an event waits.
#[test]
fn process_comes_back_while_another_thread_is_in_a_callback() {
    let pair = Pair::new(Device::new());
    let (inside, entered) = std::sync::mpsc::channel();
    let (leave, left) = std::sync::mpsc::channel();
    let left = Mutex::new(left);
    pair.device.when(move |_, call| {
        if *call == Opened {
            inside.send(()).unwrap();
            lock(&left).recv().unwrap();
        }
        Ok(())
    });
    pair.server.enable().unwrap();
    pair.client.enable().unwrap();
    pair.client.process(1);
    let opening = thread::spawn({
        let server = pair.server.clone();
        move || server.process(1)
    });
    entered.recv().unwrap();
    let pair = in_time(move || {
        pair.server.begin_disable(); // an event that waits
        pair.server.process(1);
        pair
    });
    leave.send(()).unwrap();
    in_time(move || opening.join().unwrap());
    until("disabled", || pair.server.state() == S::Disabled);
    assert_eq!(pair.device.take_calls(), [Opened, Closed]);
    pair.pump();
    pair.close();
}

// ---- Threads ----------------------------------------------------------------------------------------

/// With a waker set the callbacks run on the driver's thread, and life-cycle calls of other threads
/// wait for it.
#[test]
fn with_a_waker_the_driver_runs_the_callbacks() {
    let pair = Pair::new(Device::new());
    let threads = Arc::new(Mutex::new(Vec::new()));
    for device in [&pair.device, &pair.driver] {
        let threads = threads.clone();
        device.when(move |channel, _| {
            lock(&threads).push((channel.side(), thread::current().id()));
            Ok(())
        });
    }
    let drivers = [Driver::spawn(&pair.server), Driver::spawn(&pair.client)];
    pair.server.enable().unwrap();
    pair.server.start();
    pair.client.enable().unwrap();
    pair.device.wait_for(&PostStarted);
    pair.driver.wait_for(&PostStarted);
    let pair = in_time(move || {
        for _ in 0..10 {
            pair.server.pause();
            assert_eq!(pair.server.state(), S::Paused);
            pair.server.start();
        }
        pair.client.disable();
        assert_eq!(pair.client.state(), S::Disabled);
        pair.device.wait_for(&Closed);
        pair.server.disable();
        assert_eq!(pair.server.state(), S::Disabled);
        pair
    });
    let threads = std::mem::take(&mut *lock(&threads));
    for (side, driver) in [Side::Server, Side::Client].into_iter().zip(&drivers) {
        let of_side: Vec<_> = threads.iter().filter(|(of, _)| *of == side).collect();
        assert!(of_side.len() >= 5);
        assert!(of_side.iter().all(|(_, thread)| *thread == driver.thread_id()), "{side:?}");
    }
    drop(drivers);
    pair.close();
}

/// Without a waker they run on the thread that makes the life-cycle call.
#[test]
fn without_a_waker_the_caller_runs_the_callbacks() {
    let pair = Pair::open(Device::new());
    let threads = Arc::new(Mutex::new(Vec::new()));
    pair.device.when({
        let threads = threads.clone();
        move |_, _| {
            lock(&threads).push(thread::current().id());
            Ok(())
        }
    });
    let caller = thread::spawn({
        let server = pair.server.clone();
        move || {
            server.pause();
            server.start();
            thread::current().id()
        }
    });
    let caller = caller.join().unwrap();
    pair.server.disable();
    let here = thread::current().id();
    assert_eq!(*lock(&threads), [caller, caller, caller, here, here]);
    pair.close();
}
