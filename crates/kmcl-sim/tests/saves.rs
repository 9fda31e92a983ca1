//! Saves: at every step, and then another way than without.

mod common;

use std::collections::BTreeSet;

use common::{finish, freeze, seeds, world_at};
use kmcl_sim::{Damage, Outcome, Plan, Rng, World};

fn plans(seed: u64) -> [Plan; 2] {
    [Plan::small(seed), Plan::negotiation(seed)]
}

/// A save that is thrown away: nothing is lost, and nothing comes twice.
#[test]
fn a_host_that_thaws_goes_on() {
    for seed in seeds(1) {
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

/// Saves the host, ends it, and has another one go on.
fn move_host(world: &mut World, buffer: usize) {
    freeze(world);
    let saved = world.save(buffer);
    world.kill_host();
    assert_eq!(world.restore(&saved), Ok(()));
}

/// At every step, the first contact included: the host is saved there, ends, and another one goes on.
#[test]
fn a_host_that_moves_goes_on() {
    for seed in seeds(2) {
        for plan in plans(seed.get()) {
            let whole = finish(World::new(seed.get(), plan.clone()));
            for step in 0.. {
                let Some(mut world) = world_at(seed.get(), &plan, step) else { break };
                move_host(&mut world, 1 << 16);
                compare(&finish(world), &whole, step);
            }
        }
    }
}

/// The moments at which hosts are saved here are those that matter.
#[test]
fn hosts_are_saved_in_the_middle_of_everything() {
    let mut met = BTreeSet::new();
    for seed in 1..=6 {
        for plan in plans(seed) {
            let mut world = World::new(seed, plan);
            while world.step() {
                met.append(&mut world.conditions());
            }
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

/// Two moves one after the other, some steps apart, through buffers of other sizes.
#[test]
fn a_host_that_moves_twice_goes_on() {
    for seed in seeds(1) {
        for plan in plans(seed.get()) {
            let whole = finish(World::new(seed.get(), plan.clone()));
            for step in 0.. {
                let Some(mut world) = world_at(seed.get(), &plan, step) else { break };
                move_host(&mut world, 1);
                // Sometimes at once, sometimes when the other host is well at work.
                let _at_its_end = (0..step % 23).all(|_| world.step());
                move_host(&mut world, 300);
                compare(&finish(world), &whole, step);
            }
        }
    }
}

/// A whole life in which the host moves again and again.
#[test]
fn a_host_that_never_stays_goes_on() {
    for seed in seeds(20) {
        for plan in plans(seed.get()) {
            let whole = finish(World::new(seed.get(), plan.clone()));
            let mut rng = Rng::new(seed.get());
            let mut world = World::new(seed.get(), plan);
            let mut moves = 0;
            while world.step() {
                if rng.once_in(8) {
                    let buffer = 1 << rng.below(21);
                    match rng.below(3) {
                        0 => {
                            freeze(&mut world);
                            world.thaw();
                        }
                        _ => move_host(&mut world, buffer),
                    }
                    moves += 1;
                }
            }
            assert!(moves > 0, "it never moved");
            compare(&finish(world), &whole, u64::MAX);
        }
    }
}

/// A restore that fails, at each chunk: the host that was saved thaws, and goes on.
#[test]
fn a_damaged_state_is_refused_and_the_host_goes_on() {
    for seed in seeds(1) {
        for plan in plans(seed.get()) {
            let whole = finish(World::new(seed.get(), plan.clone()));
            let mut rng = Rng::new(seed.get());
            for step in (0..).step_by(11) {
                let Some(mut world) = world_at(seed.get(), &plan, step) else { break };
                freeze(&mut world);
                let saved = world.save(1 << 16);
                for chunk in 0..saved.chunks() {
                    let damage = Damage::ALL[rng.index(Damage::ALL.len())];
                    let damaged = saved.damaged(chunk, damage, &mut rng);
                    if world.try_restore(&damaged).is_ok() {
                        panic!("step {step}: {damage:?} of chunk {chunk} is not seen");
                    }
                }
                world.thaw();
                compare(&finish(world), &whole, step);
            }
        }
    }
}
