//! The C interface of [`kmcl`]: a driver written in C against the documented KMCL interface compiles
//! against the headers in `include/`, links with this library, and behaves as documented.
//!
//! | idea | where |
//! |---|---|
//! | what the tables hold, and the query for them | [`tables`] |
//! | the life of a channel, and its setters | [`channel`], [`setters`] |
//! | packets from the peer, and to it | [`incoming`], [`packet`], [`synchronous`] |
//! | memory: MDLs, GPADLs, pages | [`mdl`], [`gpadl`], [`pages`] |
//! | save and restore, freezing | [`save`], [`frozen`] |
//! | buses, workers, devices | [`system`] |
//! | a bus for a guest in another process, saved and restored | [`unix_bus`] |
//!
//! Three things happen here and nowhere else:
//!
//! - **Handles.** What C holds is never an address of ours but a number with a kind and a generation
//!   (`handle`), so that a null, foreign or stale one costs a compare to notice.
//! - **Rules.** What the documentation forbids and no status reports is noticed ([`verifier`], [`context`]):
//!   in debug builds the process ends with function, argument and rule, in release builds nothing
//!   happens.
//! - **The boundary.** A panic does not cross it (`boundary`), in either direction.

// Handles are 64 bits wide, and MDLs are written word by word.
#[cfg(not(all(target_pointer_width = "64", target_endian = "little")))]
compile_error!("the C interface needs a 64-bit little-endian target");

mod asymmetric;
mod boundary;
mod callbacks;
pub mod channel;
pub mod context;
pub mod frozen;
pub mod gpadl;
mod handle;
pub mod incoming;
pub mod mdl;
pub mod packet;
pub mod pages;
pub mod save;
pub mod setters;
pub mod synchronous;
pub mod system;
pub mod tables;
pub mod types;
pub mod unix_bus;
pub mod verifier;
