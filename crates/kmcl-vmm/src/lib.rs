//! A small VMM: it boots unmodified guests, whose disks, network and services are on a VMBus.
//!
//! There is no PCI, and no emulated hardware beyond what boot needs: interrupt controllers (KVM's), a
//! serial port, ACPI tables, and ports to power off and reset. Everything else is a channel, offered on
//! [`Machine::bus`].
//!
//! | module | what it has |
//! |---|---|
//! | `event` | what a machine tells |
//! | `machine` | the parts put together, and the threads that run them |
//! | [`config`] | what a VM is made of, as JSON too |
//! | [`control`] | the interface by which a VM is controlled while it runs |
//! | [`sandbox`] | what the program may still do should its guest take it over |
//! | `boot` | kernel, RAM disk, command line, ACPI, the first state of a processor |
//! | [`memory`] | guest memory, saved and restored too |
//! | `serial` | the console |
//! | `layout` | where things are |

mod boot;
pub mod config;
pub mod control;
mod devices;
mod error;
mod event;
mod layout;
mod machine;
pub mod memory;
pub mod sandbox;
mod serial;
mod vm;
mod workers;

pub use boot::BootConfig;
pub use devices::DiskConfigError;
pub use error::Error;
pub use event::{End, Events, MAX_CRASHES, MachineEvent};
pub use machine::{
    MAX_PROCESSORS, Machine, MachineConfig, MachineCounters, MachineSave, MachineStateError,
    RestoreConfig, RestoringMachine, Running,
};
pub use serial::ConsoleOutput;
pub use vm::{Notice, Observer, RestoreOptions, Vm, VmEnd, VmError, VmHandle, VmHost};
pub use workers::{Workers, WorkersSource};

pub use hyperv_kvm::{CrashReport, Mode};
