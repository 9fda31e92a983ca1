//! The host's control plane of VMBus.

#![forbid(unsafe_code)]

mod bus;
mod channel;
mod connection;
mod contact;
mod effect;
mod error;
mod gpadl;
mod host;
mod hvsock;
mod hvsock_handler;
pub mod limits;
mod link;
mod memory;
mod offer;
mod offers;
mod open;
mod outgoing;
mod port;
mod refused;
mod reserved;
mod shape;
mod signal;

pub use bus::HostBus;
pub use channel::{Channel, Closing, Modifying, OfferState, OpenKind, OpenParams, OpenState};
pub use connection::{
    Connection, ContactAnswer, Established, INTERRUPT_PAGE_CONNECTION, MESSAGE_CONNECTION,
    MULTI_CLIENT_CONNECTION, Next, SUPPORTED_FEATURES,
};
pub use effect::{Effect, HvsockRequest, Interrupt, Rings};
pub use error::{PostError, Refusal, RingRefusal, SignalError};
pub use gpadl::GpadlRefusal;
pub use host::{Config, Host, Usage};
pub use hvsock_handler::{HvsockConnect, HvsockHandler};
pub use offer::{OfferError, OfferId, OfferKey, OfferParams};
pub use outgoing::{OutgoingMessage, SlotId, VMBUS_SINT};
pub use port::{GuestPort, Posted};
pub use shape::{GuestShape, RamMap};
