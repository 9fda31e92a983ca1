//! The host driven from outside: by bytes of a guest on one side, by device events on the other.
#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test stops at the first surprise, in its helpers as well"
)]

mod bytes;
mod machine;

mod back_pressure;
mod bus;
mod channel;
mod connections;
mod hostile;
mod life_cycle;
mod negotiation;
mod random;
mod refusals;
mod restoring;
mod saved;
mod scenarios;
mod world;
