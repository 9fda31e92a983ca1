//! A deterministic world: a guest with its drivers, a host with its devices, and what lies between
//! them, on one thread, with a clock of its own.
//!
//! Everything that happens is one step, and a seed chooses it: which message or signal arrives, which
//! channel is processed and how far, which disk request lands, what a device or a driver does next.
//! The library, both ends of the bus, the storage controller and its client are the real ones. The same
//! seed gives the same steps, always; a run that fails is run again by its seed.
//!
//! ```
//! use kmcl_sim::{Plan, World};
//!
//! let mut world = World::new(7, Plan::small(7));
//! let outcome = world.finish();
//! assert!(outcome.is_clean(), "{:#?}", outcome.violations);
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | `world` | the steps, and who takes them |
//! | `guest`, `host` | the two machines |
//! | `moves` | the host is saved, and goes on, here or in another one |
//! | `plan`, `outcome` | what there is to do, and what became of it |
//! | `wires` | messages and signals on their way |
//! | `tasks` | channels that are driven |
//! | `disk`, `storage` | the disk and its user, judged by `vsc_storage::ledger` |
//! | `gadget` | a device that sends packets itself, and its driver |
//! | `churn` | a channel that is opened, closed, moved and withdrawn all the time |
//! | `sockets` | requests for socket connections, refused late |
//! | `log` | the bystander who counts every packet of that device |
//! | `wiretap` | the bystander who looks at the rings |
//! | `rng`, `trace` | chance, and what it led to |
//!
//! No thread, no clock of the system, no map without an order, no chance but the seed's.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "all of it is a test: what should not be stops it, and the seed says where"
)]

mod churn;
mod disk;
mod gadget;
mod guest;
mod host;
mod log;
mod moves;
mod outcome;
mod plan;
mod rng;
mod sockets;
mod storage;
mod tasks;
mod trace;
mod wires;
mod wiretap;
mod world;

pub use log::Ends;
pub use moves::{Damage, SavedWorld};
pub use outcome::Outcome;
pub use plan::Plan;
pub use rng::Rng;
pub use storage::StorageEnd;
pub use trace::Trace;
pub use wiretap::WireCounts;
pub use world::World;
