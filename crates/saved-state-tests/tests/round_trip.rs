//! What is restored is what was saved: saved again it says the same.

#![allow(clippy::unwrap_used, reason = "a test stops at its first surprise")]

use saved_state::{StreamHeader, StreamKind};
use saved_state_tests::channel::{assert_same, parts, restore};
use saved_state_tests::golden::made;

#[test]
fn a_channel_that_was_restored_saves_what_it_was_restored_from() {
    let is_channel =
        |state: &[u8]| StreamHeader::read(state).unwrap().info.stream == StreamKind::CHANNEL;
    for (name, state) in made().filter(|(_, state)| is_channel(state)) {
        println!("{name}");
        let (server, _rings) = restore(&state).unwrap();
        let again = server.save();
        assert_same(&parts(&state).unwrap(), &parts(&again).unwrap());
    }
}
