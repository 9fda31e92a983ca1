//! Guests and hosts that break the rules of the transport, byte by byte: each gets its error, the
//! server goes on and takes the next guest, and no descriptor or mapping stays.
//!
//! The server is driven by the test itself, so that nothing depends on time.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests stop at surprises"
)]

mod floods;
mod greetings;
mod hosts;
mod raw;
mod returning;
mod returns;
mod sessions;
