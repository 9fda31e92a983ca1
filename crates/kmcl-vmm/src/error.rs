//! Why a machine cannot be made or does not go on.

use std::io;
use std::path::PathBuf;

use crate::memory::MemoryFileError;

use crate::machine::MachineStateError;

/// See the module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The KVM device cannot be opened.
    #[error("/dev/kvm: {0}: load the module kvm, and see that this user may open the device")]
    NoKvm(#[source] kvm_ioctls::Error),
    /// A call to KVM failed.
    #[error("{call}: {source}")]
    Kvm {
        /// Which.
        call: &'static str,
        /// What the system said.
        source: kvm_ioctls::Error,
    },
    /// The guest's Hyper-V interfaces cannot be provided, or have failed.
    #[error(transparent)]
    HyperV(hyperv_kvm::Error),
    /// The amount of memory is out of range.
    #[error(
        "{bytes} bytes of memory: give a multiple of 2 MiB, at least {least} MiB and at most {most} GiB"
    )]
    MemorySize {
        /// What was asked for.
        bytes: u64,
        /// Least, in MiB.
        least: u64,
        /// Most, in GiB.
        most: u64,
    },
    /// The memory cannot be had.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The system has not set aside as many huge pages as the memory takes.
    #[error(
        "{needed} huge pages of 2 MiB are needed, {} are free: write how many to set aside to \
         /proc/sys/vm/nr_hugepages, or do without",
        free.unwrap_or(0)
    )]
    HugePages {
        /// How many.
        needed: u64,
        /// How many are free; `None` where the system has none of that size.
        free: Option<u64>,
    },
    /// A file of guest memory is not the one that was saved.
    #[error("{path}: {why}")]
    MemoryFile {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: MemoryFileError,
    },
    /// Saved memory has its regions where this version has none.
    #[error("the {bytes} bytes of saved memory are at other addresses than this version has them")]
    MemoryLayout {
        /// Bytes of it.
        bytes: u64,
    },
    /// The number of processors is out of range.
    #[error("{count} processors: give 1 to {most}")]
    Processors {
        /// What was asked for.
        count: u32,
        /// Most.
        most: u32,
    },
    /// A file cannot be read.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel is no kernel.
    #[error("{path} is neither a bzImage nor an ELF kernel: {why}")]
    Kernel {
        /// Which.
        path: PathBuf,
        /// What the loader said.
        why: String,
    },
    /// The initial RAM disk does not fit behind the kernel.
    #[error("the initrd has {bytes} bytes, the guest has room for {room}")]
    InitrdSize {
        /// Bytes of it.
        bytes: u64,
        /// Bytes between the kernel and the end of low memory.
        room: u64,
    },
    /// The command line is too long, or has a byte that none can have.
    #[error("the kernel's command line: {0}")]
    CommandLine(String),
    /// The machine has ended, and cannot be paused.
    #[error("the machine has ended")]
    Ended,
    /// The machine runs, and would have to stand.
    #[error("the machine is not paused")]
    NotPaused,
    /// Processors did not come to a stand.
    #[error("{standing} of {count} processors have come to a stand: one does not leave an exit")]
    DoesNotStand {
        /// How many stood.
        standing: u32,
        /// How many there are.
        count: u32,
    },
    /// The machine's state cannot be written.
    #[error("the machine's state: {0}")]
    Write(#[source] saved_state::WriteError),
    /// A saved machine's state is damaged, or that of something else.
    #[error("saved state of the machine: {0}")]
    State(#[from] MachineStateError),
    /// The serial port does not take the state that was saved.
    #[error("the serial port: {0}")]
    Serial(String),
    /// This host is not what a saved machine needs: a line for each difference.
    #[error("{}", .0.join("\n"))]
    Differences(Vec<String>),
    /// A thread cannot be made.
    #[error("thread: {0}")]
    Thread(#[source] io::Error),
    /// A signal or an event descriptor cannot be had.
    #[error("signals and events: {0}")]
    Event(#[source] io::Error),
    /// KVM cannot go on with a vCPU.
    #[error("processor {vp} has left KVM with {exit}")]
    Exit {
        /// Its index.
        vp: u32,
        /// What KVM said.
        exit: String,
    },
    /// Tables for the firmware interface do not fit.
    #[error("the ACPI tables do not fit: {bytes} bytes, room for {room}")]
    Acpi {
        /// Bytes of the tables.
        bytes: u64,
        /// Room.
        room: u64,
    },
}

impl From<hyperv_kvm::Error> for Error {
    fn from(error: hyperv_kvm::Error) -> Self {
        match error {
            hyperv_kvm::Error::Differences(lines) => Self::Differences(lines),
            error => Self::HyperV(error),
        }
    }
}

impl Error {
    pub(crate) fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { call, source }
    }
}
