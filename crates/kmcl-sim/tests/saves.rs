//! Saves: at every step, and then another way than without.

mod common;

use common::{finish, seeds};
use kmcl_sim::{Outcome, Plan, World};

/// Steps that a frozen host is given to settle: far more than any takes.
const SETTLING_STEPS: u32 = 5000;

fn plans(seed: u64) -> [Plan; 2] {
    [Plan::small(seed), Plan::negotiation(seed)]
}

/// The world of `seed` after `steps` steps; `None` if it does not have as many.
fn world_at(seed: u64, plan: &Plan, steps: u64) -> Option<World> {
    let mut world = World::new(seed, plan.clone());
    (0..steps).all(|_| world.step()).then_some(world)
}

/// Freezes the host, and waits until it has settled.
fn freeze(world: &mut World) {
    world.freeze();
    for _ in 0..SETTLING_STEPS {
        if world.is_settled() {
            return;
        }
        assert!(world.step(), "what is under way in the devices never ends");
    }
    panic!("not settled after {SETTLING_STEPS} steps");
}

/// A save that is thrown away: nothing is lost, and nothing comes twice.
#[test]
fn a_host_that_thaws_goes_on() {
    for seed in seeds(2) {
        for plan in plans(seed.get()) {
            let whole = finish(World::new(seed.get(), plan.clone()));
            for step in 0.. {
                let Some(mut world) = world_at(seed.get(), &plan, step) else { break };
                freeze(&mut world);
                let saved = world.save(1);
                assert_eq!(saved, world.save(1 << 16), "the buffers have no part in the bytes");
                world.thaw();
                compare(&finish(world), &whole, step);
            }
        }
    }
}

#[track_caller]
fn compare(outcome: &Outcome, whole: &Outcome, step: u64) {
    let differences = outcome.differences(whole);
    assert!(differences.is_empty(), "saved after step {step}: {differences:#?}");
}
