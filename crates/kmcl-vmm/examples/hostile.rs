//! Writes a hostile guest as a kernel file: `hostile FILE [SEED [ACTIONS]]`. Booted, it misuses whatever a
//! VMBus gives it and then resets, which makes it begin anew. Without a seed, or with 0, it takes one from
//! the processor's clock: it is another guest after each reset.

#[path = "../tests/hostile/conversation.rs"]
mod conversation;
#[path = "../tests/hostile/guest.rs"]
mod guest;

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let Some(file) = arguments.next() else {
        println!("hostile FILE [SEED [ACTIONS]]");
        return Ok(());
    };
    let seed = arguments.next().map_or(Ok(0), |seed| seed.parse())?;
    let actions = arguments.next().map_or(Ok(1 << 20), |actions| actions.parse())?;
    let messages = conversation::messages(guest::ring_pages())?;
    let first_connection = conversation::FIRST_CONNECTION;
    let plan = guest::Plan { seed, actions, messages: &messages, first_connection };
    std::fs::write(&file, guest::elf(&guest::assemble(&plan)?))?;
    Ok(())
}
