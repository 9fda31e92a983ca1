//! How long it takes from freezing a controller to having its saved state, with a back end that takes
//! 1 ms for a request and with one that takes 1 s. Rounds alternate, and medians are compared: requests
//! that have not started, that run and can be cancelled, and that have finished must not wait for it.
//!
//! 256 requests of 4 KiB are in flight, as many as one channel has.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on has nothing to measure"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::{Duration, Instant};

use kmcl::{Save, SaveOptions};
use vsp_storage::block::{Fate, IoOutcome, TestStep, TestTime};

use common::until;
use common::world::World;

const REQUESTS: usize = 256;
const ROUNDS: usize = 15;
const FAST: Duration = Duration::from_millis(1);
const SLOW: Duration = Duration::from_secs(1);
/// How much one may take of the other. Whoever waited for a single request of the slow back end would take
/// a thousand times as long; whoever has slept for a second finds its caches cold.
const NOISE: f64 = 3.0;

/// Where the requests are when the controller is frozen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    NeverStarted,
    Cancelled,
    Finished,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::NeverStarted => "never-started",
            Self::Cancelled => "cancelled",
            Self::Finished => "finished",
        }
    }

    /// What has to become of the requests: never started, cancelled, finished.
    fn outcomes(self) -> [usize; 3] {
        match self {
            Self::NeverStarted => [REQUESTS, 0, 0],
            Self::Cancelled => [0, REQUESTS, 0],
            Self::Finished => [0, 0, REQUESTS],
        }
    }
}

/// One round: the time, the bytes that were saved, and what became of the requests.
fn measure(stage: Stage, latency: Duration) -> (Duration, usize, [usize; 3]) {
    let mut world = World::with(TestTime::Real);
    // Nobody takes what finishes before the freeze does.
    world.server.as_ref().unwrap().driver.stop_listening();
    world.medium.set_slots(0);
    world.medium.set_fate(Fate::after(latency));
    for block in 0..REQUESTS as u64 {
        world.write(1000 + block % 256, 8, 1);
    }
    until("requests never came", || {
        world.process();
        world.controller().in_flight().1 == REQUESTS
    });
    if stage != Stage::NeverStarted {
        world.medium.set_slots(REQUESTS);
    }
    if stage == Stage::Finished {
        std::thread::sleep(latency + FAST);
    }
    let mut buffer = vec![0; 64 << 10];
    let mut bytes = 0;
    let start = Instant::now();
    let frozen = world.controller().freeze().unwrap();
    assert!(frozen.wait(None));
    for mut stream in frozen.streams(&SaveOptions::default()).unwrap() {
        loop {
            let step = stream.save.step(&mut buffer).unwrap();
            black_box(&buffer[..step.written]);
            bytes += step.written;
            if step.done {
                break;
            }
        }
    }
    let time = start.elapsed();
    let mut outcomes = [0; 3];
    for event in world.medium.history() {
        match event.what {
            TestStep::Out(IoOutcome::NeverStarted) => outcomes[0] += 1,
            TestStep::Out(IoOutcome::Cancelled { .. }) => outcomes[1] += 1,
            TestStep::Out(IoOutcome::Done(_)) => outcomes[2] += 1,
            _ => {}
        }
    }
    frozen.move_away();
    (time, bytes, outcomes)
}

fn median_us(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

fn main() {
    let rounds = if std::env::args().any(|arg| arg == "--short") { 5 } else { ROUNDS };
    for stage in [Stage::NeverStarted, Stage::Cancelled, Stage::Finished] {
        let (mut fast, mut slow) = (Vec::new(), Vec::new());
        let mut saved = 0;
        let mut became = [[0; 3]; 2];
        for _ in 0..rounds {
            let (time, _, outcomes) = measure(stage, FAST);
            fast.push(time);
            became[0] = outcomes;
            let (time, bytes, outcomes) = measure(stage, SLOW);
            slow.push(time);
            became[1] = outcomes;
            saved = bytes;
        }
        let (fast, slow) = (median_us(fast), median_us(slow));
        let name = format!("storage/freeze-to-saved/{}/{REQUESTS}", stage.name());
        println!(
            "RATIO {name} ours={:.0} peer={:.0} ratio={:.2} limit={NOISE}",
            slow * 1e3,
            fast * 1e3,
            slow / fast
        );
        println!("FIGURE {name}/state {saved} bytes");
        // Each round is about the stage that it says it is about.
        assert_eq!(became, [stage.outcomes(); 2], "{name}: never started, cancelled, finished");
    }
}
