//! SIGINT and SIGTERM: a command that is told to end tidies up and ends.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::exit::{Exit, Failure, Result};

/// The exit code of a process that is told to end while it is ending.
const TOLD_TWICE: i32 = Exit::System as i32;

/// Whether this process was told to end.
pub(crate) struct Interrupt {
    told: Arc<AtomicBool>,
    pipe: UnixStream,
}

impl Interrupt {
    /// Takes the two signals over from now on.
    ///
    /// # Errors
    /// A [`Failure`] of kind system.
    pub(crate) fn catch() -> Result<Self> {
        let cannot = |error: std::io::Error| {
            Failure::system(format_args!("cannot catch signals: {error}"), "try again")
        };
        let told = Arc::new(AtomicBool::new(false));
        let (pipe, signalled) = UnixStream::pair().map_err(cannot)?;
        for signal in [SIGINT, SIGTERM] {
            // Told twice, it ends at once. Registered first, so that the first time does not count.
            let again = Arc::clone(&told);
            signal_hook::flag::register_conditional_shutdown(signal, TOLD_TWICE, again)
                .map_err(cannot)?;
            signal_hook::flag::register(signal, Arc::clone(&told)).map_err(cannot)?;
            let signalled = signalled.try_clone().map_err(cannot)?;
            signal_hook::low_level::pipe::register(signal, signalled).map_err(cannot)?;
        }
        Ok(Self { told, pipe })
    }

    /// An error, once this process was told to end.
    ///
    /// # Errors
    /// A [`Failure`] of kind system.
    pub(crate) fn check(&self) -> Result<()> {
        if self.told.load(Ordering::Relaxed) {
            return Err(Failure::system("interrupted", "start again when you like"));
        }
        Ok(())
    }
}

/// Readable once this process was told to end.
impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
