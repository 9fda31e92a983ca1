//! Seeds, how a failing one is told and run again, and worlds at some moment.

#![allow(dead_code, reason = "each test uses a part of it")]

use kmcl_sim::{Outcome, Plan, World};

/// A seed that is printed when the test fails under it.
pub(crate) struct Seed(u64);

impl Seed {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn get(&self) -> u64 {
        self.0
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("run it again with KMCL_SIM_SEED={}", self.0);
        }
    }
}

/// The seeds of a test: `count` of them, times `KMCL_SIM_SEEDS`; or the one that `KMCL_SIM_SEED` names.
pub(crate) fn seeds(count: u64) -> impl Iterator<Item = Seed> {
    let number = |name: &str| std::env::var(name).ok().and_then(|it| it.parse::<u64>().ok());
    let range = match number("KMCL_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..1 + count * number("KMCL_SIM_SEEDS").unwrap_or(1),
    };
    range.map(Seed)
}

/// Runs a world to its end.
pub(crate) fn finish(mut world: World) -> Outcome {
    world.finish()
}

/// Steps that a frozen host is given to settle: far more than any takes.
const SETTLING_STEPS: u32 = 5000;

/// The world of `seed` after `steps` steps; `None` if it does not have as many.
pub(crate) fn world_at(seed: u64, plan: &Plan, steps: u64) -> Option<World> {
    let mut world = World::new(seed, plan.clone());
    (0..steps).all(|_| world.step()).then_some(world)
}

/// Freezes the host, and waits until it has settled.
pub(crate) fn freeze(world: &mut World) {
    world.freeze();
    let settled = (0..SETTLING_STEPS).any(|_| {
        let is_settled = world.is_settled();
        assert!(is_settled || world.step(), "what is under way in the devices never ends");
        is_settled
    });
    assert!(settled, "not settled after {SETTLING_STEPS} steps");
}
