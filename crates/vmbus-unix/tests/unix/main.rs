//! Two ends of a transport, with devices on one and drivers on the other: in one process, and in
//! two of which one is killed.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests stop at surprises"
)]

mod ends;
mod killed;
mod moves;
mod serve;
mod versions;
