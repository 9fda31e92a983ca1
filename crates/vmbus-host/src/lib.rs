//! The host's control plane of VMBus: everything that host and guest say to each other outside the
//! rings.
//!
//! Two layers. [`Host`] is the protocol, as a pure state machine: messages of the guest and answers of
//! devices go in, effects and messages for the guest come out, and all state is plain data that can
//! be cloned, compared and printed at every step. [`HostBus`] runs it: a [`kmcl::bus::Bus`] for
//! devices on one side, over a [`GuestPort`] to one guest on the other.
//!
//! ```text
//!  devices (kmcl channels)                           a transport: SynIC of a hypervisor, socket, test
//!     │ offer, open_result, closed, revoke …            │ post_message, guest_signal,
//!     ▼            ▲ BusEvent                           ▼ messages_drained, guest_reset
//!  ┌──────────────────────────── HostBus ────────────────────────────┐
//!  │  Host: contact · offers · open and close · GPADLs · reserved    │──▶ GuestPort: post_message,
//!  │        channels · hvsock requests · messages for the guest      │    event_flag, listen, unlisten
//!  └─────────────────────────────────────────────────────────────────┘
//! ```
//!
//! | module | what it is about |
//! |---|---|
//! | `connection`, `contact` | versions, features, where messages go; connecting, unloading, pausing |
//! | `offer`, `offers` | what devices offer, what the guest is told of it, rescinds, channel ids |
//! | `channel`, `open` | the life of a channel; opening, closing, moving interrupts |
//! | `gpadl`, `pages`, `memory` | page lists: assembly, quota, teardown held back while in use |
//! | `reserved`, `hvsock` | channels for crash dumps; socket connections |
//! | `outgoing` | messages that wait for their slot |
//! | `saved`, `resume` | the state as records and back; what follows from a state that was restored |
//! | [`limits`] | every bound |
//! | `bus`, `link`, `port`, `signal` | the state machine at work |
//!
//! # A guest that lies
//!
//! A wrong message is refused, alone, with a [`Refusal`] that carries the numbers; the guest gets the
//! answer it waits for, and nothing else changes. Whatever it sends, the state stays within
//! [`limits`]. A guest that does not take its messages is told to come again
//! ([`PostError::Busy`]); messages that end the trouble (INITIATE_CONTACT, UNLOAD, RESUME) are taken
//! all the same.
//!
//! # A guest that goes on elsewhere
//!
//! All state is plain data, so that it can be saved at every step of the protocol: with half a GPADL, with
//! an open that no device has answered, with messages that the guest has not taken. The guest notices
//! nothing. In the process that it leaves:
//!
//! 1. [`HostBus::hold`]: the bus stands still. Then the channels are frozen.
//! 2. [`HeldBus::save`], and channels and devices are saved.
//! 3. [`HeldBus::move_away`]; or the [`HeldBus`] is dropped, and all goes on as if nothing had been.
//!
//! In the process where it goes on:
//!
//! 1. [`HostBus::restoring`]: a bus that stands still.
//! 2. The devices make the offers that were saved, and the guest is there.
//! 3. [`HostBus::finish_restore`]: differences are told, or channels that were open are resumed.
//!
//! ```
//! # use std::sync::Arc;
//! # use kmcl::memory::MappingBudget;
//! # use vmbus_host::{GuestPort, HostBus, SaveOptions};
//! use saved_state::Save;
//!
//! # fn there_and_back(
//! #     bus: HostBus, next_port: Arc<dyn GuestPort>, make_offers: impl FnOnce(&HostBus),
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let held = bus.hold();
//! let mut state = Vec::new();
//! held.save(&SaveOptions::default())?.write_to(&mut state)?;
//! held.move_away();
//!
//! let next = HostBus::restoring(next_port, MappingBudget::default(), &state)?;
//! make_offers(&next);
//! next.finish_restore()?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is deliberately absent
//!
//! - Monitored notifications: no channel is offered with a monitor, and the monitor pages that a
//!   guest names are never looked at.
//! - Features of version 6.0 beyond [`SUPPORTED_FEATURES`]: they are not granted.
//! - Virtual trust levels other than 0, and several clients of one guest: they are turned away.
//! - Clocks: nothing here ever times out. A device that does not let go keeps its guest waiting.
//!
//! Source: vmbus-wire sections 1, 2, 3 and 5; devices section 4 for hvsock.

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
mod pages;
mod port;
mod refused;
mod reserved;
mod resume;
mod saved;
mod shape;
mod signal;

pub use bus::{BusSave, ChangedOffer, FinishRestoreError, HeldBus, HostBus, OffersDiffer};
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
pub use kmcl::SaveOptions;
pub use offer::{OfferError, OfferId, OfferKey, OfferParams};
pub use outgoing::{OutgoingMessage, SlotId, VMBUS_SINT};
pub use port::{GuestPort, Posted};
pub use saved::{HostRestore, HostSave, Misfit, RestoreError};
pub use shape::{GuestShape, RamMap};
