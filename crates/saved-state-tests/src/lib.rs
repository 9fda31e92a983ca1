//! States of every crate that saves, for whoever has to show that they can be restored: made by the real
//! code, restored by it, and damaged on the way.
//!
//! | module | what it has |
//! |---|---|
//! | [`guest`] | the guest's end of one channel, by hand: rings, packets, completions |
//! | [`channel`] | a server's channel that is saved in the middle of its work, and what must come of it |
//! | [`bus`] | the control plane at every step of its protocol |
//! | [`storage`] | a storage controller at every step of its device's protocol |
//! | [`integration`] | integration services: any state, and a guest that says anything |
//! | [`services`] | integration services at every step of what they say to a guest |
//! | [`sockets`] | the connections of a guest's sockets, which are reset where it goes on |
//! | [`machine`] | a machine's processors, made by hand, and its memory |
//! | [`golden`] | the states under `tests/golden/`: how each is made, and how it is restored |
//! | [`targets`] | what is fuzzed: one function for each decoder, given any bytes |
//! | [`mutate`] | changes that somebody makes who knows the format: checksums are put right afterwards |
//!
//! The fuzz targets themselves, in `fuzz/`, are one line each. Their corpora are run through the same
//! functions by `tests/corpus.rs`, with the other tests.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at its first surprise, and a fuzzer reports it"
)]

pub mod bus;
pub mod channel;
pub mod golden;
pub mod guest;
mod hand;
pub mod integration;
pub mod machine;
pub mod mutate;
pub mod services;
pub mod sockets;
pub mod storage;
pub mod targets;
