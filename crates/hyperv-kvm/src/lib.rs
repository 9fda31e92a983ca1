//! What Hyper-V gives a guest, on KVM: enough that unmodified guests find the VMBus and use it with the
//! drivers they have.
//!
//! A VMM makes its VM, interrupt controllers and memory as ever, then a [`Partition`] of it, sets the
//! CPUID that [`Partition::cpuid`] gives, and adds a [`Vp`] for each vCPU. Devices are offered on
//! [`Partition::bus`]. The thread that runs a vCPU hands Hyper-V's exits to its [`Vp`]; a loop of the
//! VMM's waits for the partition's descriptor and calls [`Partition::messages_taken`].
//!
//! | module | what it has |
//! |---|---|
//! | [`cpuid`] | the leaves by which a guest knows Hyper-V |
//! | [`msr`] | the synthetic MSRs |
//! | [`hypercall`] | the calls, and the page through which they are made |
//! | `synic` | message slots, event flags, interrupts |
//! | `partition`, `vp` | the guest, and each of its processors |
//! | `probe` | what this KVM can do: [`Mode`] |
//! | `save`, [`restore`] | all of it and the vCPUs' state, as records and back |
//! | [`statistics`] | what KVM counts |
//!
//! A guest that stands still is saved with [`Partition::save`], and goes on from [`restore`], step by step:
//! the order that guests need is the only one that compiles.
//!
//! There are two ways behind one interface. Where KVM emulates Hyper-V ([`Mode::Kernel`]), a signal of
//! the guest reaches its channel without leaving the kernel. Where it was built without
//! ([`Mode::User`]), MSRs are exits, the hypercall page is ours and interrupts are MSIs; signals reach
//! their channels in the kernel even so, by an eventfd on the port that the page writes.

pub mod cpuid;
mod error;
pub mod hypercall;
mod kvm;
pub mod msr;
mod partition;
mod probe;
mod processor;
mod registers;
pub mod restore;
mod save;
mod state;
pub mod statistics;
mod synic;
mod synthetic;
mod vp;

pub use error::Error;
pub use partition::{Partition, PartitionConfig};
pub use probe::Mode;
pub use save::{Clocks, PartitionState};
pub use state::StateError;
pub use vp::{CrashReport, Outcome, Vp};
