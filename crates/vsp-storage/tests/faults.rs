//! The deliberate mistakes do what they are for. One test, because they are switched for the process.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::time::Duration;

use vsp_storage::block::{Fate, IoOutcome, TestEvent, TestStep};
use vsp_storage::faults::Fault;
use vstor_wire::srb::SrbStatus;

use common::until;
use common::world::World;

const MS: Duration = Duration::from_millis(1);

/// A world with two writes under way, of which the first takes long and cannot be cancelled.
fn at_work() -> World {
    let mut world = World::new();
    world.medium.choose_fates(|io| {
        if io.offset == 0 { Fate::after(100 * MS).uncancellable() } else { Fate::after(10 * MS) }
    });
    world.write(0, 4, 1);
    world.write(100, 4, 2);
    world.until_held(0, 2);
    world
}

/// Lets time go on until `done`.
fn wait(world: &World, done: impl Fn() -> bool) {
    until("it never came to that", || {
        world.process();
        world.medium.advance(MS);
        done()
    });
}

#[test]
fn mistakes_show() {
    // A replay without the fence: an older write lands over a newer one, both acknowledged.
    Fault::ReplayWithoutFence.set(true);
    let mut world = at_work();
    let frozen = world.controller().freeze().unwrap();
    assert_eq!(frozen.running(), 0, "it says that all is settled");
    world.medium.set_fate(Fate::after(MS));
    // The process that is left behind has something to do until its disk has finished.
    let streams = common::world::save(&frozen);
    frozen.move_away();
    let old = world.server.take().unwrap();
    world.server = Some(common::world::Server::restore(&world.bus, &world.medium, &streams));
    wait(&world, || world.answered().len() == 2);
    assert!(world.medium.overlaps() > 0);
    let newer = world.write(0, 4, 9);
    wait(&world, || world.answered().len() == 3);
    assert_eq!(world.answered()[newer].1.srb_status, SrbStatus::SUCCESS);
    assert_eq!(world.byte(0), 9);
    world.medium.advance(200 * MS);
    assert_eq!(world.byte(0), 1, "the original has landed over what was acknowledged after it");
    Fault::ReplayWithoutFence.set(false);
    drop((world, old));

    // A dropped packet: one request is never answered, the others are.
    Fault::DropPacket.set(true);
    let mut world = at_work();
    let frozen = world.controller().freeze().unwrap();
    world.medium.advance(100 * MS);
    world.go_elsewhere(frozen);
    wait(&world, || world.answered().len() == 1);
    world.medium.advance(1000 * MS);
    assert_eq!(world.answered().len(), 1);
    drop(world);
    Fault::DropPacket.set(false);

    // A doubled completion: one request is carried out twice, and each time answered. KMCL's own client
    // ignores an answer to a transaction that is over.
    Fault::CompleteTwice.set(true);
    let mut world = World::new();
    world.medium.set_fate(Fate::after(10 * MS));
    world.write(0, 4, 1);
    world.until_held(0, 1);
    let frozen = world.controller().freeze().unwrap();
    world.medium.clear_history();
    world.go_elsewhere(frozen);
    let done = |event: &TestEvent| event.what == TestStep::Out(IoOutcome::Done(Ok(())));
    wait(&world, || world.medium.history().iter().filter(|event| done(event)).count() == 2);
    assert_eq!(world.finish().len(), 1);
    drop(world);

    // Switched off, nothing of it.
    let mut world = at_work();
    let frozen = world.controller().freeze().unwrap();
    world.medium.advance(100 * MS);
    world.go_elsewhere(frozen);
    assert_eq!(world.finish().len(), 2);
    assert_eq!(world.medium.overlaps(), 0);
}
