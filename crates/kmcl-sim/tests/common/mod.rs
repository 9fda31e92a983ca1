//! Seeds, and how a failing one is told and run again.

use kmcl_sim::{Outcome, World};

/// A seed that is printed when the test fails under it.
pub(crate) struct Seed(u64);

impl Seed {
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
