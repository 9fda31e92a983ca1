//! The guest's control plane of VMBus, in user space.
//!
//! [`Guest`] is the protocol as a pure state machine: versions negotiated from a list downwards,
//! offers, GPADLs, channels opened and closed, rescinds, unload and reconnect. [`GuestBus`] puts
//! memory and a transport around it and serves [`kmcl`]'s client endpoints; a transport implements
//! [`HostPort`].
//!
//! | module | one idea |
//! |---|---|
//! | `machine` | [`Guest`]: calls in, [`Effect`]s out |
//! | `channel`, `gpadl`, `offer`, `mmio` | what it remembers |
//! | `post` | messages in order, one at a time, again when the host was short of buffers |
//! | `bus` | [`GuestBus`]: effects performed, outside every lock, in order |
//!
//! The host is not trusted with anything but the memory it is given: a message that does not fit
//! what this guest asked for is refused by a [`HostError`] and changes nothing, and nothing that a
//! host sends makes a table grow beyond the 2047 channels that a bus can have.
//!
//! Not here: monitored notifications (this guest makes no monitor pages, so hosts must not offer
//! monitors, and [`kmcl::bus::ClientLink::set_interrupt_latency`] is not supported), reserved
//! channels (crash dumps), and any clock: a host that never answers is for the transport to notice.
//!
//! Source: vmbus-wire sections 1 to 3.

#![forbid(unsafe_code)]

mod bus;
mod channel;
mod config;
mod effect;
mod error;
mod gpadl;
mod machine;
mod mmio;
mod offer;
mod post;

pub use bus::{BusCounts, GuestBus, GuestBusError, HostPort, Posted};
pub use config::{ConfigError, GuestConfig, MAX_VTL};
pub use effect::{ClientEvent, ClientId, ConnectionEvent, Effect};
pub use error::{ContactError, HostError, LossReason, RequestError};
pub use gpadl::{MAX_GPADL_PAGES, MAX_GPADLS, MAX_GPADLS_IN_PROGRESS};
pub use machine::{
    ConnectionState, Guest, GuestCounts, MAX_CLIENTS, MAX_HVSOCK_REQUESTS, RingRequest,
};
pub use mmio::MmioWindow;
pub use offer::{MAX_MONITOR_ID, OfferedChannel};
pub use post::{MAX_POST_ATTEMPTS, MAX_QUEUED_MESSAGES, PostStatus};
