//! Worlds without a save: each comes to its end with nothing lost, and the seed alone decides how.

mod common;

use common::seeds;
use kmcl_sim::{Plan, World};

#[test]
fn every_world_comes_to_its_end() {
    for seed in seeds(100) {
        for plan in [Plan::small(seed.get()), Plan::negotiation(seed.get())] {
            let mut world = World::new(seed.get(), plan.clone());
            let outcome = world.finish();
            assert!(outcome.is_clean(), "{plan:?}\n{:#?}", outcome.violations);
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in seeds(10) {
        let run = || {
            let mut world = World::new(seed.get(), Plan::small(seed.get()).traced());
            let outcome = world.finish();
            (outcome, world.trace())
        };
        let (first, second) = (run(), run());
        assert_eq!(first.1.text(), second.1.text());
        assert_eq!(first.0, second.0);
    }
}
