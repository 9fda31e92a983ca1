//! VMBus between two processes: a host that serves devices, and a guest that uses them, on one
//! Linux machine, without a hypervisor.
//!
//! The guest donates its memory, a sealed memfd. Control messages are frames over a Unix socket
//! (`SOCK_SEQPACKET`); signals are eventfds that each side gives the other; packets are in rings in
//! the guest's memory, and do not pass through here.
//!
//! | module | one idea |
//! |---|---|
//! | `host` | [`UnixHost`]: a socket at a path, one guest after another, one [`HostBus`](vmbus_host::HostBus) |
//! | `guest` | [`UnixGuest`]: a connection to it, and a [`GuestBus`](vmbus_guest::GuestBus) |
//! | [`frame`] | what goes over the socket |
//! | `handshake` | how the two get to know each other |
//! | [`resume`] | how a connection outlives the process that serves it |
//! | `epoch` | a number that both see, and that outlives who raises it |
//! | `link` | frames and descriptors in and out, in order and bounded |
//! | `event` | eventfds shared with a process that is not trusted |
//! | `listener` | the socket in the file system |
//!
//! # How a channel gets its signals
//!
//! ```text
//! guest                                            host
//!   │── Post OPEN_CHANNEL + the client's doorbell ──▶│  rings it for the guest
//!   │◀─ Posted ──────────────────────────────────────│
//!   │◀─ Listening + the server's doorbell ───────────│  the device is asked whether it opens
//!   │◀─ Message OPEN_CHANNEL_RESULT ─────────────────│
//! ```
//!
//! From then on each side writes to the other's eventfd: no frame, and no third thread, is between
//! a packet and whoever waits for it.
//!
//! # Moving a server
//!
//! A host can be held, saved, and its process killed; another process goes on with the same guest, whose
//! channels stay open and notice nothing. [`resume`] says how, and why nothing is lost.
//!
//! # What a peer can do
//!
//! Every frame and descriptor is checked; one that breaks the rules ends the connection, with a
//! reason, and the host takes the next guest. What remains:
//!
//! - An eventfd that two processes have is one open file: its counter and its `O_NONBLOCK` are
//!   shared. Reading is done with `RWF_NOWAIT`, which never waits. Linux has no such flag for
//!   writing to an eventfd, so each write is preceded by a poll for room: a peer that fills the
//!   counter stops nobody. A peer that clears `O_NONBLOCK` and fills the counter *between* the poll
//!   and the write makes the writing thread wait until somebody reads; the end of the connection
//!   does, on the thread that drives. A host for guests that it trusts so little gives each a
//!   process of its own.
//! - A guest can ring a device's doorbell for as long as it keeps the descriptor, even after it has
//!   disconnected. The device then looks at its rings for nothing.
//! - A guest's memory is made when it is first touched, by whoever touches it. A device that fills
//!   a buffer makes this process pay for it; [`HostOptions::max_memory_bytes`] is the bound.
//! - A guest can go on with an old state of its connection, if somebody restores one, by saying that it is
//!   where that state is. What it gets is a host that knows less of it than it does of itself.
//!
//! # What is bounded
//!
//! One guest at a time; [`MAX_HANDSHAKES`] processes that have not introduced themselves, each for
//! [`HostOptions::handshake_timeout`]; one post of the guest on its way, whose answer must be taken
//! before the next is read; a message of the host waits in the bus ([`vmbus_host::limits`]) until
//! the socket takes it; descriptors of the guest, one per channel, also of one that comes back.

#![forbid(unsafe_code)]

mod epoch;
mod error;
mod event;
pub mod frame;
mod guest;
mod handshake;
mod host;
mod link;
mod listener;
mod poller;
pub mod resume;
mod timer;

pub use error::{BindError, ConnectError, ConnectionError, FrameError, Reason, ResumeError};
pub use guest::{GuestEvent, GuestOptions, UnixGuest};
pub use host::{
    FinishError, HeldHost, HoldError, HostEvent, HostOptions, MAX_EVENTS, MAX_HANDSHAKES,
    NotFinished, Peer, RestoreError, RestoringHost, TransportReadError, TransportSave,
    TransportSaveError, UnixHost, check_saved_transport,
};
