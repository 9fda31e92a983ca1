//! The VMBus Kernel Mode Client Library (KMCL) outside Windows.
//!
//! On Hyper-V a guest's devices are *channels* over VMBus: two rings in shared memory between a
//! device on the host (the server endpoint, VSP) and its driver in the guest (the client endpoint,
//! VSC). This crate is the library both are written against: the documented interface, function by
//! function, as Rust items of the same words, with the documented statuses kept in typed errors.
//!
//! | idea | where |
//! |---|---|
//! | a channel: setters, life cycle, processing | [`Channel`] |
//! | what a device implements | [`StateChange`], [`ProcessPacket`] |
//! | a packet from the peer, and its external data | [`IncomingPacket`], [`ExternalData`] |
//! | a packet to the peer, and its completion | [`Packet`], [`PacketCompletion`] |
//! | saving and restoring with packets in flight | [`ChannelSave`], [`ChannelRestore`], [`Frozen`] |
//! | the seam to the bus underneath | [`bus`] |
//! | both ends in one process, for tests of devices | [`loopback`] |
//!
//! The library brings no event loop and makes no thread. A channel hands out what to wait on
//! ([`Channel::doorbell_fd`], [`Channel::set_waker`]) and does its work in [`Channel::process`];
//! `kmcl-worker` is a ready-made loop, and optional.
//!
//! # Who calls whom, and on which thread
//!
//! State-change callbacks and packet callbacks run on the thread that calls [`Channel::process`]. A
//! channel that nobody drives (no waker set) runs its state-change callbacks on the thread that calls
//! [`Channel::start`], [`Channel::pause`] or [`Channel::disable`], because these have to block until
//! it is done. State-change callbacks of one channel never overlap each other; packet callbacks never
//! overlap each other. No lock is held across a callback.

#![forbid(unsafe_code)]
#![allow(
    clippy::vec_box,
    reason = "packet bodies change owners all the time: a box moves as one word"
)]

mod batch;
pub mod bus;
mod callbacks;
mod channel;
mod clip;
mod control;
mod doorbell;
mod error;
mod events;
mod external;
mod fenced;
mod flags;
mod frozen;
mod gpadl;
mod hold;
mod incoming;
pub mod lifecycle;
pub mod loopback;
mod packet;
mod pool;
mod receiver;
mod restore;
mod save;
mod send;
mod setters;
mod settings;
mod stage;
mod synchronous;
mod thread_mark;
mod traffic;
mod transactions;
mod undelivered;
mod waiting;

pub use batch::Batch;
pub use callbacks::{PacketCompletion, PnpFailure, ProcessPacket, SaveRestorePacket, StateChange};
pub use channel::{Channel, Progress};
pub use error::{ChannelError, Error, SendError};
pub use external::ExternalData;
pub use fenced::{Fence, Fenced, HandOverProblem, MAX_DEVICE_STATE, NotHandedOver, ResumedPacket};
pub use flags::{ChannelFlags, ExternalDataFlags, GpadlFlags, SendFlags, ServerFlags};
pub use frozen::Frozen;
pub use gpadl::GpadlMapping;
pub use incoming::{IncomingPacket, Level};
pub use lifecycle::{ChannelState, Side};
pub use packet::Packet;
pub use restore::{
    ChannelRestore, RESTORE_BYTES_PER_BYTE, RestoreError, RestoreFromError, Restored,
};
pub use save::{ChannelSave, ChannelSaveError, MAX_DRIVER_STATE, SaveContinue, SaveOptions};
pub use settings::Limits;
pub use synchronous::Timeout;

pub use saved_state::{ReadError, Save, SaveError, SaveStep};
pub use vmbus_memory as memory;
pub use vmbus_wire::guid::Guid;
pub use vmbus_wire::status::NtStatus;
