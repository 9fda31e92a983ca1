//! Runs one world and prints its trace: `cargo run -p kmcl-sim --example run -- SEED [negotiation]`.

use kmcl_sim::{Plan, World};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seed = arguments.next().and_then(|it| it.parse().ok()).unwrap_or(1);
    let plan = match arguments.next().as_deref() {
        Some("negotiation") => Plan::negotiation(seed),
        _ => Plan::small(seed),
    };
    let mut world = World::new(seed, plan.traced());
    let outcome = world.finish();
    print!("{}", world.trace().text());
    println!("{} steps", world.steps());
    println!("{:#?}", outcome.violations);
}
