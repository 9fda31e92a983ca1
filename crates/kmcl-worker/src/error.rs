//! Why a worker refuses something.

use std::io;

use crate::MAX_TASKS;

/// Why a worker could not be made, or did not take a channel or source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The system gave no thread, no descriptor, or no room to watch one more.
    #[error("the system refuses a worker its {what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The worker drives as many channels and sources as it may.
    #[error("the worker already drives {MAX_TASKS} channels and sources")]
    Full,
    /// The worker drives this channel already.
    #[error("the worker already drives this channel")]
    AlreadyDriven,
    /// The worker's thread has ended.
    #[error("the worker has stopped")]
    Stopped,
}

impl WorkerError {
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}
