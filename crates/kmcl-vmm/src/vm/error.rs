//! Why a VM cannot be made, changed, saved or restored.

use std::io;
use std::path::PathBuf;

use kmcl_worker::WorkerError;
use vsp_storage::ControllerError;

use crate::control::{ControlError, ErrorKind};
use crate::devices::DiskConfigError;
use crate::error::Error;

/// See the module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskConfigError),
    /// A storage controller.
    #[error("storage controller {controller}: {source}")]
    Controller {
        /// Which.
        controller: u8,
        /// Why.
        source: ControllerError,
    },
    /// The integration services.
    #[error(transparent)]
    Services(#[from] vsp_integration::IntegrationError),
    /// The guest's sockets.
    #[error("the guest's sockets: {0}")]
    Sockets(#[from] vsp_socket::SocketError),
    /// The guest's sockets cannot stand still.
    #[error("the guest's sockets: {0}")]
    SocketsFreeze(#[from] vsp_socket::FreezeError),
    /// The guest cannot be asked to shut down.
    #[error(transparent)]
    Shutdown(#[from] vsp_integration::ShutdownError),
    /// Threads for the devices.
    #[error("the threads for devices: {0}")]
    Workers(#[from] WorkerError),
    /// Something of the system's for the devices.
    #[error("{what}: {source}")]
    Driver {
        /// What.
        what: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
    /// It cannot do that as it is now.
    #[error("{0}")]
    State(String),
    /// Disk requests are still running, and cannot be cancelled.
    #[error("{requests} disk requests still run after {seconds} s and cannot be cancelled")]
    Unsettled {
        /// How many.
        requests: u32,
        /// How long was waited.
        seconds: u64,
    },
    /// A file or folder of a saved VM.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The folder that a VM is to be saved to is not free.
    #[error("{path} is there already: give a folder that is new or empty")]
    Taken {
        /// Which.
        path: PathBuf,
    },
    /// The VM may not write there.
    #[error(
        "{path}: the VM may not make it: the user it runs as must be allowed to, and a VM in a sandbox must \
         have been told of the directory (--allow)"
    )]
    Forbidden {
        /// Where it was to be.
        path: PathBuf,
    },
    /// A state cannot be written.
    #[error("the state cannot be saved: {0}")]
    Unsavable(String),
    /// A saved VM is damaged, or of something else.
    #[error("{path} cannot be restored: {why}")]
    Unrestorable {
        /// The file of it.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// What a saved VM needs is not here, or is not what it was: a line each.
    #[error("{}", .0.join("\n"))]
    Differences(Vec<String>),
    /// A guest does not take the request.
    #[error("the guest: {0}")]
    Guest(String),
    /// A guest does not answer.
    #[error("the guest has not answered within {seconds} s")]
    Silent {
        /// How long was waited.
        seconds: u64,
    },
}

impl VmError {
    /// What has to do with a file at `path`.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}

impl From<VmError> for ControlError {
    fn from(error: VmError) -> Self {
        use DiskConfigError as Disk;
        let kind = match &error {
            VmError::Disk(Disk::NoSuchDisk { .. }) => ErrorKind::NotFound,
            VmError::Disk(Disk::Id { .. } | Disk::NoController { .. }) => ErrorKind::Invalid,
            VmError::Disk(
                Disk::IdTaken { .. } | Disk::LunTaken { .. } | Disk::NoLun { .. } | Disk::TooMany,
            )
            | VmError::Ended
            | VmError::Shutdown(_)
            | VmError::State(_) => ErrorKind::State,
            VmError::Taken { .. } => ErrorKind::Invalid,
            VmError::Silent { .. } => ErrorKind::Timeout,
            _ => ErrorKind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}
