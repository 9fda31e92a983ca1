//! What a saved state promises, shown on bytes: the layout, every way of cutting it into buffers, damage
//! of every kind, and versions before and after this one.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod damage;
mod document;
mod evolution;
mod file;
mod file_tools;
mod golden;
mod hostile;
mod memory;
mod proto;
mod records;
mod round_trip;
mod tools;
mod writing;
