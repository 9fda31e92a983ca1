//! The control interface of a VM: HTTP/1.1 on a Unix socket, as `docs/api.yaml` describes it.
//!
//! ```text
//! curl --unix-socket PATH http://vm/api/v1/vm.info
//! curl --unix-socket PATH -X PUT -d '{"destination": "/srv/saved"}' http://vm/api/v1/vm.save
//! ```
//!
//! A VM takes part as a [`Controlled`]; [`Control::serve`] does the rest, on three threads of its own.
//! One has the sockets and never waits for a VM or for a peer; one asks the VM questions, one makes
//! changes, so that a save that takes a minute leaves [`Controlled::info`] to be asked. No thread is made
//! later, and none of them runs a guest or its devices: whatever comes over the socket, the VM goes on.
//!
//! Everything is bounded: connections ([`MAX_CONNECTIONS`]), bytes of a request ([`MAX_HEAD_BYTES`],
//! [`MAX_BODY_BYTES`]), the time a request may take to come ([`REQUEST_PATIENCE`]) and a peer to read its
//! answer ([`ANSWER_PATIENCE`]). A connection without a request stays open until the VM has ended, unless its
//! place is needed.
//!
//! The socket's path has mode 0600, and whoever connects is asked for by the system's word: the owner of
//! this process, or root, and nobody else.
//!
//! | module | what it has |
//! |---|---|
//! | `api` | requests, answers, errors, and the trait |
//! | `call` | which path is which request |
//! | [`client`] | the other end |
//! | `http` | bytes to a request's head, an answer to bytes |
//! | `exchange` | one connection, without its socket |
//! | `door` | the socket that listens |
//! | `server` | the thread of the sockets |
//! | `callers` | the threads on which calls are made |

mod api;
mod call;
mod callers;
pub mod client;
mod door;
mod exchange;
mod http;
mod server;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use rustix::io::Errno;

pub use api::{
    Compression, ControlError, Controlled, Counters, Crash, DiskAddress, ErrorKind, Heartbeat,
    HeartbeatState, Hex, Info, Progress, RemoveDiskRequest, SaveRequest, Saved, ShutdownRequest,
    State,
};
pub use call::{API_ROOT, REQUESTS};
pub use exchange::{ANSWER_PATIENCE, REQUEST_PATIENCE};
pub use http::{MAX_BODY_BYTES, MAX_FIELDS, MAX_HEAD_BYTES};
pub use server::{CLOSE_PATIENCE, MAX_CONNECTIONS};

use callers::{Bell, Callers};
use door::Door;
use server::Server;

/// Why a VM cannot be controlled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path of a socket at which somebody listens.
    #[error("somebody listens at {0} already")]
    InUse(PathBuf),
    /// The path of something that is not a socket.
    #[error("{0} is there, and is not a socket")]
    NotASocket(PathBuf),
    /// The socket cannot be had.
    #[error("cannot listen at {path}: {source}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A thread, or what wakes it, cannot be had.
    #[error("the control interface's threads: {0}")]
    Thread(#[source] io::Error),
}

/// A VM's control interface. Dropping it closes it: nobody is let in, calls that have not begun are answered
/// with [`ErrorKind::Busy`], and those that are being made are waited for, and their answers sent, for
/// [`CLOSE_PATIENCE`] at most. So it must not be dropped under a lock that a call may want.
#[derive(Debug)]
pub struct Control {
    stop: Arc<AtomicBool>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Listens at `path` for whoever wants to control `vm`. A socket that a program has left behind there
    /// is replaced.
    ///
    /// # Errors
    /// [`Error`].
    pub fn serve(path: &Path, vm: Arc<dyn Controlled>) -> Result<Self, Error> {
        let door = Door::open(path).map_err(|error| match error {
            Errno::ADDRINUSE => Error::InUse(path.to_owned()),
            Errno::EXIST => Error::NotASocket(path.to_owned()),
            source => Error::Listen { path: path.to_owned(), source: source.into() },
        })?;
        let bell = Arc::new(Bell::new().map_err(|error| Error::Thread(error.into()))?);
        let stop = Arc::new(AtomicBool::new(false));
        let callers = Callers::spawn(vm, Arc::clone(&bell)).map_err(Error::Thread)?;
        let server = Server::new(door, Arc::clone(&bell), Arc::clone(&stop), callers);
        let thread = Builder::new().name("ctl-sockets".into());
        let thread = thread.spawn(move || server.run()).map_err(Error::Thread)?;
        Ok(Self { stop, bell, thread: Some(thread) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}
