//! Sockets between a VMBus guest and Unix sockets of its host.
//!
//! A guest's AF_VSOCK is carried by VMBus channels (hvsock): each connection is a channel of its own. A
//! [`SocketBroker`] connects them to Unix stream sockets, with the names that Firecracker and Cloud
//! Hypervisor use for theirs, so that their users' programs work unchanged. With the broker at `PATH`:
//!
//! - *To the guest.* A program connects to `PATH`, sends `CONNECT <port>\n`, and gets `OK <port>\n` once a
//!   listener in the guest has taken the connection; the port in the answer is the one that the guest sees
//!   on the host's side. What follows goes to and from the guest. If nobody listens there, or the
//!   line is none, the connection ends without an answer.
//! - *From the guest.* A guest that connects to port 52 of its host (CID 2) reaches the program that listens at
//!   `PATH_52`. If there is none it is refused.
//!
//! ```text
//!   guest                                host
//!   AF_VSOCK ── channel, two rings ── Connection ── Unix stream socket ── program
//!      └─ TL_CONNECT_REQUEST ───────▶ SocketBroker ◀── CONNECT 1024\n ─────┘
//! ```
//!
//! Only the broker's own user can connect to `PATH`. Who can put a socket at `PATH_52` is told by the
//! directory it is in.
//!
//! # Who drives it
//!
//! There is no thread here, and no clock. The broker is one descriptor ([`AsFd`](std::os::fd::AsFd)): when it
//! is readable, its owner calls [`SocketBroker::ready`]; and [`SocketBroker::tick`] now and then with the
//! time. Channels are run by a [`Driver`]. With a worker of `kmcl-worker` both are one thread's:
//!
//! ```
//! use std::error::Error;
//! use std::sync::{Arc, Mutex};
//!
//! use kmcl::Channel;
//! use kmcl_worker::{Source, Worker};
//! use vmbus_host::HostBus;
//! use vsp_socket::{Driver, SocketBroker, SocketConfig};
//!
//! struct OneWorker(Worker);
//!
//! impl Driver for OneWorker {
//!     fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
//!         Ok(self.0.add(channel)?)
//!     }
//!     fn remove_channel(&self, channel: &Channel) {
//!         self.0.remove(channel);
//!     }
//! }
//!
//! struct Sockets(Arc<SocketBroker>);
//!
//! impl Source for Sockets {
//!     fn ready(&self) -> bool {
//!         self.0.ready()
//!     }
//! }
//!
//! fn serve(bus: HostBus, worker: Arc<OneWorker>) -> Result<Arc<SocketBroker>, Box<dyn Error>> {
//!     let broker = SocketBroker::new(bus, worker.clone(), SocketConfig::new("/run/vm/vsock"))?;
//!     let broker = Arc::new(broker);
//!     worker.0.add_source(broker.clone(), Arc::new(Sockets(broker.clone())))?;
//!     Ok(broker)
//! }
//! ```
//!
//! # What a guest or a program can do to the others
//!
//! Take time and room within [`limits`], and nothing else. A side that does not read stops the one that
//! writes to it, and nobody besides: a slow program leaves the guest's bytes in the ring, a slow guest the
//! program's in its socket. A guest that sends what is none ends its own connection. So does a
//! program that dies: the guest reads what was sent before, and is then reset.
//!
//! A connection takes three descriptors or so: [`limits::MAX_CONNECTIONS`] want a limit of open files above
//! the usual 1024. Where none is left, a connection is refused, or waits.
//!
//! # A guest that goes on elsewhere
//!
//! Its connections do not: their programs stay behind. [`SocketBroker::freeze`] has the sockets stand still
//! while everything else is saved, and they go on after a thaw. In the process where the guest goes on,
//! [`SocketBroker::restoring`] takes the old connections over and withdraws them, which the guest takes for
//! a reset; new ones can be made at once.
//!
//! Source: devices section 4.

#![forbid(unsafe_code)]

mod backlog;
mod broker;
mod connection;
mod driver;
mod error;
mod greeting;
mod inbox;
pub mod limits;
mod listener;
mod poller;

pub use broker::{
    AdoptedSockets, FrozenSockets, RestoringSockets, SAVED_INTERFACE, SocketBroker, SocketConfig,
    SocketCounts, SocketRestoreError, SocketsSave,
};
pub use driver::Driver;
pub use error::{BindError, FreezeError, SocketError};
