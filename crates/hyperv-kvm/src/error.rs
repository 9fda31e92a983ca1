//! Why a host cannot give a guest Hyper-V's interfaces.

use crate::probe::Mode;
use crate::state::StateError;

/// See the module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This KVM lacks what is needed.
    #[error("KVM here has no {capability} ({number}): {advice}")]
    Missing {
        /// The capability's name.
        capability: &'static str,
        /// Its number, for KVM_CHECK_EXTENSION.
        number: u32,
        /// What would help.
        advice: &'static str,
    },
    /// A call to KVM failed.
    #[error("{call}: {source}")]
    Kvm {
        /// Which.
        call: &'static str,
        /// What the system said.
        source: kvm_ioctls::Error,
    },
    /// More virtual processors than can be told to a guest.
    #[error("{count} virtual processors, limit {most}", most = crate::cpuid::MAX_VPS)]
    VpCount {
        /// How many were asked for.
        count: u32,
    },
    /// There is no virtual processor of this index.
    #[error("virtual processor {index} of {count}")]
    NoVp {
        /// The index.
        index: u32,
        /// How many there are.
        count: u32,
    },
    /// An event descriptor could not be made.
    #[error("eventfd: {0}")]
    Event(#[source] std::io::Error),
    /// More of something than one call to KVM takes.
    #[error("more {what} than KVM takes in one call")]
    TooMany {
        /// Of what.
        what: &'static str,
    },
    /// A saved state is damaged, or not one of a partition.
    #[error("saved state of the machine: {0}")]
    State(#[from] StateError),
    /// This machine is not like the one on which the guest was saved. A line for each difference.
    #[error("{}", .0.join("\n"))]
    Differences(Vec<String>),
    /// A processor of this machine refuses a register's value.
    #[error("processor {vp}: MSR {msr:#x} does not take {value:#x} here")]
    Msr {
        /// Index of the processor.
        vp: u32,
        /// The MSR's number.
        msr: u32,
        /// The value that was saved.
        value: u64,
    },
    /// The saved bus is damaged.
    #[error("saved state of the bus: {0}")]
    Bus(#[from] vmbus_host::RestoreError),
    /// The bus cannot go on.
    #[error(transparent)]
    Finish(#[from] vmbus_host::FinishRestoreError),
    /// An exit that does not come in this mode.
    #[error("{exit} in mode {mode}")]
    UnexpectedExit {
        /// Which.
        exit: &'static str,
        /// How the SynIC is provided.
        mode: Mode,
    },
}

impl Error {
    pub(crate) fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { call, source }
    }
}
