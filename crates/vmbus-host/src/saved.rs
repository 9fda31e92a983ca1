//! A host's saved state: all of it, at any step of the protocol, as a stream of flat records.
//!
//! [`HostSave`] walks over the host in place, record by record, and keeps nothing but its place.
//! [`HostRestore`] reads the stream, chunk by chunk, holds every number against what it may be, and gives
//! a host that is equal to the one that was saved, or an error that names chunk, record and field.
//! What follows from the state and not from any event (effects that were not performed, devices that are
//! others now) is derived afterwards: [`Host::devices_have_moved`], [`Host::go_on`].
//!
//! The records and their order are those of [`saved_state::bus`]; `docs/saved-state.md` has the framing.
//!
//! [`Host::devices_have_moved`]: crate::Host::devices_have_moved
//! [`Host::go_on`]: crate::Host::go_on

mod check;
mod error;
mod from_records;
mod gpadl;
mod read;
mod to_records;
mod write;

pub use error::{Misfit, RestoreError};
pub use read::HostRestore;
pub use write::HostSave;
