//! Whoever looks for mistakes has to find some: a server that makes them deliberately is found out.

mod common;

use common::{finish, freeze, world_at};
use kmcl_sim::Plan;
use vsp_storage::faults::Fault;

/// A plan in which the disk is all that matters.
fn plan(seed: u64) -> Plan {
    let mut plan = Plan::small(seed);
    plan.storage_requests = 60;
    plan.storage_depth = 16;
    plan.slow_disk = true;
    plan
}

/// What is found in worlds whose host moves with this mistake, or without one.
fn violations(fault: Option<Fault>) -> Vec<String> {
    let mut found = Vec::new();
    for seed in 1..=4 {
        let plan = plan(seed);
        for step in (60..400).step_by(30) {
            let Some(mut world) = world_at(seed, &plan, step) else { break };
            if let Some(fault) = fault {
                fault.set(true);
            }
            freeze(&mut world);
            let saved = world.save(1 << 16);
            world.kill_host();
            let restored = world.restore(&saved);
            // The next request that comes again may be a while in coming.
            found.extend(restored.err());
            found.extend(finish(world).violations);
            if let Some(fault) = fault {
                fault.set(false);
            }
        }
    }
    found
}

/// One test: the mistakes are switched on for the whole process.
#[test]
fn a_server_that_makes_mistakes_is_found_out() {
    assert_eq!(violations(None), [""; 0], "without a mistake nothing is found");
    for (fault, signs) in [
        // By what is on the disk, and by the medium. The late write takes its data from a buffer that is
        // in use for something else by then.
        (Fault::ReplayWithoutFence, &[" holds ", "could still land"][..]),
        // A request without an end.
        (Fault::DropPacket, &["under_way: 1", "stuck"]),
        // The client's library ignores it; the rings have it.
        (Fault::CompleteTwice, &["the host completes what does not wait"]),
    ] {
        let found = violations(Some(fault));
        for sign in signs {
            let is_seen = found.iter().any(|violation| violation.contains(sign));
            assert!(is_seen, "{fault:?} is not found out by {sign:?}: {found:#?}");
        }
    }
}
