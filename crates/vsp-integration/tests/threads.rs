//! The owner's clock on one thread, saving on another, channels on a third.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Wake, Waker};

use kmcl::Channel;
use kmcl::loopback::LoopbackBus;
use kmcl_worker::Worker;
use saved_state::integration::{HeartbeatRecord, KINDS};
use saved_state::{Record, StreamKind, StreamReader};
use vsp_integration::{
    Clocks, Driver, Event, FileTime, IntegrationConfig, IntegrationServices, Observer, Phase,
    Service, ShutdownError, ShutdownKind, ShutdownRequest,
};

use common::{Guest, Linux, SECOND, save};

const POWER_OFF: ShutdownRequest = ShutdownRequest { kind: ShutdownKind::PowerOff, force: false };

/// Looks while something is not so, and lets others run.
fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        std::thread::yield_now();
    }
}

struct OneWorker(Worker);

impl Driver for OneWorker {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.0.add(channel)?)
    }

    fn remove_channel(&self, channel: &Channel) {
        self.0.remove(channel);
    }
}

fn services(bus: &Arc<LoopbackBus>, observer: Arc<dyn Observer>) -> IntegrationServices {
    let driver = Arc::new(OneWorker(Worker::spawn("host").unwrap()));
    let config = IntegrationConfig::default();
    let services = IntegrationServices::new(bus.clone(), driver, observer, config).unwrap();
    services.offer().unwrap();
    services
}

/// How many heartbeats a saved state says were sent.
fn heartbeats_sent(stream: &[u8]) -> u64 {
    let mut reader = StreamReader::new(StreamKind::DEVICE, KINDS);
    let mut input = stream;
    loop {
        let chunk = reader.read(&mut input).unwrap().unwrap();
        if chunk.kind() == HeartbeatRecord::KIND.kind {
            return chunk.decode::<HeartbeatRecord>().unwrap().sent;
        }
    }
}

/// A state that says "asked" has the question in its ring, whenever it was taken: what was said to have
/// been sent, the guest finds, while everything is frozen.
#[test]
fn a_saved_state_and_its_rings_tell_the_same() {
    let bus = LoopbackBus::new(4 << 20).unwrap();
    let services = services(&bus, Arc::new(()));
    let mut guest = Guest::open(&bus, Service::Heartbeat, Some(Linux::new(Service::Heartbeat)));
    until(|| {
        guest.turn();
        matches!(services.phase(Service::Heartbeat), Phase::Agreed(_))
    });
    guest.take_read();
    let is_over = AtomicBool::new(false);
    let ticks = AtomicU64::new(0);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let mut reference_time = 0;
            while !is_over.load(Ordering::Relaxed) {
                reference_time += 10 * SECOND;
                ticks.fetch_add(1, Ordering::Relaxed);
                services.tick(Clocks { now: FileTime(reference_time), reference_time });
            }
        });
        let mut read = 0;
        for save_number in 0..300 {
            guest.turn();
            read += guest.take_read().len() as u64;
            // Right after a tick has begun: the freeze may well come in the middle of it.
            let before = ticks.load(Ordering::Relaxed);
            until(|| ticks.load(Ordering::Relaxed) > before);
            let frozen = services.freeze().unwrap();
            guest.turn();
            read += guest.take_read().len() as u64;
            assert_eq!(heartbeats_sent(&save(&frozen)[0]), read, "save {save_number}");
            frozen.thaw();
        }
        is_over.store(true, Ordering::Relaxed);
        assert!(read > 0, "nothing was ever sent");
    });
}

/// Runs in the middle of a send: the message is in the ring, and the guest is being signalled.
struct InTheMiddle<F>(Mutex<Option<F>>);

impl<F: FnOnce() + Send> Wake for InTheMiddle<F> {
    fn wake(self: Arc<Self>) {
        let act = self.0.lock().unwrap().take();
        if let Some(act) = act {
            act();
        }
    }
}

#[test]
fn a_freeze_waits_for_a_call_that_is_sending() {
    let bus = LoopbackBus::new(4 << 20).unwrap();
    let services = Arc::new(services(&bus, Arc::new(())));
    let mut guest = Guest::open(&bus, Service::Heartbeat, Some(Linux::new(Service::Heartbeat)));
    until(|| {
        guest.turn();
        matches!(services.phase(Service::Heartbeat), Phase::Agreed(_))
    });
    let [has_frozen, was_early] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let freezing = Arc::new(Mutex::new(None));
    let act = {
        let (services, has_frozen) = (Arc::clone(&services), Arc::clone(&has_frozen));
        let (freezing, was_early) = (Arc::clone(&freezing), Arc::clone(&was_early));
        move || {
            let thread = std::thread::spawn({
                let (services, has_frozen) = (Arc::clone(&services), Arc::clone(&has_frozen));
                move || {
                    let frozen = services.freeze().unwrap();
                    has_frozen.store(true, Ordering::SeqCst);
                    frozen.thaw();
                }
            });
            *freezing.lock().unwrap() = Some(thread);
            // It has begun, and would be done long before this ends.
            until(|| {
                has_frozen.load(Ordering::SeqCst)
                    || services.request_shutdown(POWER_OFF, "") == Err(ShutdownError::Held)
            });
            for _ in 0..10_000 {
                std::thread::yield_now();
            }
            was_early.store(has_frozen.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    };
    guest.channel.set_waker(Waker::from(Arc::new(InTheMiddle(Mutex::new(Some(act))))));
    services.tick(Clocks { now: FileTime(0), reference_time: 0 });
    guest.channel.clear_waker();
    let thread = freezing.lock().unwrap().take().unwrap();
    thread.join().unwrap();
    assert!(has_frozen.load(Ordering::SeqCst));
    assert!(!was_early.load(Ordering::SeqCst), "frozen in the middle of a send");
}

/// Asks again whenever it hears an answer: it may call the services.
#[derive(Default)]
struct Eager {
    services: Mutex<Option<Arc<IntegrationServices>>>,
    heard: Mutex<Vec<Event>>,
    asked: Mutex<Vec<Result<(), ShutdownError>>>,
}

impl Observer for Eager {
    fn happened(&self, event: Event) {
        self.heard.lock().unwrap().push(event);
        let services = self.services.lock().unwrap().clone();
        if let (Some(services), Event::ShutdownEnded { .. }) = (services, event) {
            let mut asked = self.asked.lock().unwrap();
            if asked.len() < 10 {
                asked.push(services.request_shutdown(POWER_OFF, "again"));
            }
        }
    }
}

#[test]
fn an_observer_may_call_the_services() {
    let bus = LoopbackBus::new(4 << 20).unwrap();
    let eager = Arc::new(Eager::default());
    let services = Arc::new(services(&bus, eager.clone()));
    *eager.services.lock().unwrap() = Some(services.clone());
    let mut guest = Guest::open(&bus, Service::Shutdown, Some(Linux::new(Service::Shutdown)));
    until(|| {
        guest.turn();
        matches!(services.phase(Service::Shutdown), Phase::Agreed(_))
    });
    services.request_shutdown(POWER_OFF, "first").unwrap();
    until(|| {
        guest.turn();
        eager.heard.lock().unwrap().len() == 12 // agreed, and eleven answers
    });
    assert!(eager.asked.lock().unwrap().iter().all(Result::is_ok));
    drop(guest);
    *eager.services.lock().unwrap() = None;
}

/// Many ask at a time: one is heard.
#[test]
fn one_shutdown_is_open_at_a_time() {
    let bus = LoopbackBus::new(4 << 20).unwrap();
    let services = services(&bus, Arc::new(()));
    let mut guest = Guest::open(&bus, Service::Shutdown, Some(Linux::new(Service::Shutdown)));
    until(|| {
        guest.turn();
        matches!(services.phase(Service::Shutdown), Phase::Agreed(_))
    });
    guest.take_read();
    let start = Barrier::new(8);
    let won: usize = std::thread::scope(|threads| {
        let ask = || {
            start.wait();
            usize::from(services.request_shutdown(POWER_OFF, "").is_ok())
        };
        let all: Vec<_> = (0..8).map(|_| threads.spawn(ask)).collect();
        all.into_iter().map(|it| it.join().unwrap()).sum()
    });
    assert_eq!(won, 1);
    until(|| {
        guest.turn();
        services.shutdown_asked().is_none()
    });
    assert_eq!(guest.take_read().len(), 1);
}
