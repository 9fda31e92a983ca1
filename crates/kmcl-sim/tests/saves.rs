//! Saves at every step, the first contact included: what follows is what would have followed without.

mod common;

use std::collections::BTreeSet;

use common::{finish, freeze, seeds, world_at};
use kmcl_sim::{Damage, Outcome, Plan, Rng, World};

/// What there is to do: a little of everything, or above all for the control plane.
const PLANS: [fn(u64) -> Plan; 2] = [Plan::small, Plan::negotiation];

#[track_caller]
fn compare(outcome: &Outcome, whole: &Outcome, step: u64) {
    let differences = outcome.differences(whole);
    assert!(differences.is_empty(), "saved after step {step}: {differences:#?}");
}

/// For each seed, and each `stride`th step of its world: goes there, interferes, and compares what the
/// world then comes to.
fn at_every_step(
    seed_count: u64,
    plan_of: fn(u64) -> Plan,
    stride: usize,
    interfere: impl Fn(&mut World, u64),
) {
    for seed in seeds(seed_count) {
        let plan = plan_of(seed.get());
        let whole = finish(World::new(seed.get(), plan.clone()));
        for step in (0..).step_by(stride) {
            let Some(mut world) = world_at(seed.get(), &plan, step) else { break };
            interfere(&mut world, step);
            compare(&finish(world), &whole, step);
        }
    }
}

/// Saves the host, ends it, and has another one go on.
fn move_host(world: &mut World, buffer: usize) {
    freeze(world);
    let saved = world.save(buffer);
    world.kill_host();
    assert_eq!(world.restore(&saved), Ok(()));
}

/// A save that is thrown away.
fn save_and_thaw(world: &mut World, _step: u64) {
    freeze(world);
    let saved = world.save(1);
    assert_eq!(saved, world.save(1 << 16), "the buffers have no part in the bytes");
    world.thaw();
}

/// Two moves one after the other, through buffers of other sizes.
fn move_twice(world: &mut World, step: u64) {
    move_host(world, 1);
    // Sometimes at once, sometimes when the other host is well at work.
    let _at_its_end = (0..step % 23).all(|_| world.step());
    move_host(world, 300);
}

/// Restores that fail, one at each chunk: the host that was saved thaws.
fn fail_to_move(world: &mut World, step: u64) {
    let mut rng = Rng::new(step);
    freeze(world);
    let saved = world.save(1 << 16);
    for chunk in 0..saved.chunks() {
        let damage = Damage::any(&mut rng);
        let refused = world.try_restore(&saved.damaged(chunk, damage, &mut rng)).is_err();
        assert!(refused, "step {step}: {damage:?} of chunk {chunk} is not seen");
    }
    world.thaw();
}

#[test]
fn a_host_at_work_thaws_and_goes_on() {
    at_every_step(1, Plan::small, 1, save_and_thaw);
}

#[test]
fn a_host_that_negotiates_thaws_and_goes_on() {
    at_every_step(1, Plan::negotiation, 1, save_and_thaw);
}

#[test]
fn a_host_at_work_moves_and_goes_on() {
    at_every_step(2, Plan::small, 1, |world, _| move_host(world, 1 << 16));
}

#[test]
fn a_host_that_negotiates_moves_and_goes_on() {
    at_every_step(2, Plan::negotiation, 1, |world, _| move_host(world, 1 << 16));
}

#[test]
fn a_host_at_work_moves_twice_and_goes_on() {
    at_every_step(1, Plan::small, 1, move_twice);
}

#[test]
fn a_host_that_negotiates_moves_twice_and_goes_on() {
    at_every_step(1, Plan::negotiation, 1, move_twice);
}

#[test]
fn a_damaged_state_is_refused_and_the_first_host_goes_on() {
    for plan_of in PLANS {
        at_every_step(1, plan_of, 11, fail_to_move);
    }
}

/// A whole life in which the host moves again and again.
#[test]
fn a_host_that_never_stays_goes_on() {
    for (seed, plan_of) in seeds(20).flat_map(|seed| PLANS.map(|plan_of| (seed.get(), plan_of))) {
        let _told = common::Seed::new(seed);
        let whole = finish(World::new(seed, plan_of(seed)));
        let mut rng = Rng::new(seed);
        let mut world = World::new(seed, plan_of(seed));
        let mut moves = 0;
        while world.step() {
            if rng.once_in(8) {
                match rng.below(3) {
                    0 => save_and_thaw(&mut world, 0),
                    _ => move_host(&mut world, 1 << rng.below(21)),
                }
                moves += 1;
            }
        }
        assert!(moves > 0, "it never moved");
        compare(&finish(world), &whole, u64::MAX);
    }
}

/// The moments at which hosts are saved here are those that matter.
#[test]
fn hosts_are_saved_in_the_middle_of_everything() {
    let mut met = BTreeSet::new();
    for (seed, plan_of) in (1..=6).flat_map(|seed| PLANS.map(|plan_of| (seed, plan_of))) {
        let mut world = World::new(seed, plan_of(seed));
        while world.step() {
            met.append(&mut world.conditions());
        }
    }
    let wanted = [
        "a GPADL received in part",
        "a channel closed",
        "a channel closing",
        "a channel open",
        "a channel opening",
        "a message waiting",
        "a socket asked for",
        "an offer hidden",
        "an offer rescinded",
        "connected",
        "disconnected",
        "disconnecting",
        "disk requests running",
        "incoming packets in flight",
        "outgoing packets in flight",
        "outgoing packets queued",
    ];
    let missing: Vec<&str> = wanted.into_iter().filter(|it| !met.contains(*it)).collect();
    assert!(missing.is_empty(), "never met: {missing:?}; met: {met:?}");
}
