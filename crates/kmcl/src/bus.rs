//! The seam between a channel and the bus that carries it.
//!
//! A [`Channel`](crate::Channel) knows rings, packets and callbacks; a bus knows offers, messages and
//! page lists. This module is all they know of each other. `vmbus-host` and `vmbus-guest` implement
//! it, and so do [`LoopbackBus`](crate::loopback::LoopbackBus), a simulator, or a VMM of one's own.
//!
//! Calls go down through [`Bus`], [`ServerLink`] and [`ClientLink`]; they return at once, call nothing
//! back on the caller's stack, and may be made from any thread. Answers come up as [`BusEvent`]s
//! through the [`EventSink`] of the channel, in the order in which the bus saw them.
//!
//! What a bus must hold to:
//!
//! - After [`BusEvent::Opened`] a server's bus sends no second one before the channel called
//!   [`ServerLink::closed`], or answered it with a failing [`ServerLink::open_result`].
//! - An offer that is made again after a restore is the one that stood: where its channel was open, the
//!   bus sends [`BusEvent::Opened`] with [`OpenRings::resumed`]; where it was being opened, without.
//! - A bus that reports [`BusEvent::PeerClosed`] or [`BusEvent::Rescinded`] leaves ring memory mapped
//!   until the channel says `closed`: callbacks may be running.
//! - Events for one channel are bounded by the protocol: at most [`MAX_PENDING_EVENTS`] wait unread.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmbus_memory::{GuestMemory, RingPages};
use vmbus_wire::guid::Guid;
use vmbus_wire::status::NtStatus;

pub use crate::events::{EventSink, Recorder};

/// Most events that may wait for a channel. A bus that keeps the rules above never reaches it.
pub const MAX_PENDING_EVENTS: usize = 64;

/// Bytes of device-defined data in an offer and in an open request.
///
/// Source: vmbus-wire, messages 1 (`user_defined`) and 5 (`user_data`).
pub const USER_DATA_SIZE: usize = 120;

/// A VMBus connection, seen from its channels. One value per guest.
pub trait Bus: Send + Sync {
    /// Server endpoint: makes `offer` to the guest. `events` reports what the guest does with it,
    /// `doorbell` is what the guest rings when it has put packets into the ring.
    ///
    /// # Errors
    /// [`NtStatus::INVALID_PARAMETER`] where the offer clashes with one that stands,
    /// [`NtStatus::INSUFFICIENT_RESOURCES`] where a bound is reached,
    /// [`NtStatus::NOT_SUPPORTED`] on a bus that has only a client side.
    fn offer(&self, offer: Offer, endpoint: Endpoint) -> Result<Box<dyn ServerLink>, NtStatus>;

    /// Client endpoint: takes the standing offer that matches `target`, or waits for it. Either way
    /// [`BusEvent::Offered`] says when the channel is bound.
    ///
    /// # Errors
    /// As for [`Bus::offer`].
    fn bind(&self, target: Target, endpoint: Endpoint) -> Result<Box<dyn ClientLink>, NtStatus>;
}

/// What a channel hands to its bus: where events go, and how the peer reaches it.
pub struct Endpoint {
    /// Takes the events about this channel.
    pub events: EventSink,
    /// Rung by the peer, for data. A bus between processes passes a duplicate of its descriptor on.
    pub doorbell: Arc<dyn Doorbell>,
}

/// What the peer rings to say "look at the rings". A hint: it may come late, early, or for nothing.
pub trait Doorbell: Send + Sync {
    /// Rings, from any thread; never blocks.
    fn ring(&self);

    /// The eventfd behind it, for a bus whose peer rings from elsewhere (another process, KVM).
    ///
    /// # Errors
    /// Whatever the system says when it has no descriptor left.
    fn event_fd(&self) -> std::io::Result<BorrowedFd<'_>>;
}

/// How this endpoint tells the peer to look at the rings. Comes with [`OpenRings`].
pub trait Signal: Send + Sync {
    /// Signals the peer, from any thread; never blocks. Lost signals are the bus's fault.
    fn signal(&self);
}

/// A channel as the server endpoint offers it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Offer {
    /// The protocol spoken on the channel.
    pub interface_type: Guid,
    /// Tells apart the channels of one type.
    pub interface_instance: Guid,
    /// 0 for a primary channel, n for the nth subchannel of the same type and instance.
    pub subchannel_index: u16,
    /// Publish a device interface in the guest.
    pub enumerate_device_interface: bool,
    /// Packets carry pipe headers.
    pub pipe: bool,
    /// A socket-style (hvsock) channel.
    pub tlnpi_provider: bool,
    /// Offer to the local partition.
    pub loopback: bool,
    /// After a save and restore of the VM this is a new channel, and the old instance is dropped.
    pub force_new_channel: bool,
    /// MMIO space the guest needs for it, in MiB.
    pub mmio_megabytes: u16,
    /// MMIO space that would be nice to have on top, in MiB.
    pub mmio_megabytes_optional: u16,
    /// The virtual trust level the offer is visible to.
    pub target_vtl: u8,
    /// Device-defined bytes of the offer.
    pub user_defined: [u8; USER_DATA_SIZE],
}

impl Offer {
    /// A plain device offer: no flags, no MMIO, VTL 0.
    #[must_use]
    pub fn new(interface_type: Guid, interface_instance: Guid) -> Self {
        Self {
            interface_type,
            interface_instance,
            subchannel_index: 0,
            enumerate_device_interface: false,
            pipe: false,
            tlnpi_provider: false,
            loopback: false,
            force_new_channel: false,
            mmio_megabytes: 0,
            mmio_megabytes_optional: 0,
            target_vtl: 0,
            user_defined: [0; USER_DATA_SIZE],
        }
    }
}

/// Which offer a client endpoint wants.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Target {
    /// The protocol spoken on the channel.
    pub interface_type: Guid,
    /// The instance, or any.
    pub interface_instance: Option<Guid>,
    /// 0 for a primary channel, n for its nth subchannel.
    pub subchannel_index: u16,
}

/// What a client asks for when it opens its channel.
#[derive(Clone, Debug)]
pub struct OpenRequest {
    /// Pages of the ring the client reads, the control page included; at least 2.
    pub incoming_pages: u32,
    /// Pages of the ring the client writes, the control page included; at least 2.
    pub outgoing_pages: u32,
    /// The virtual processor that is to be interrupted.
    pub target_vp: u32,
    /// Device-defined bytes of the request.
    pub user_data: [u8; USER_DATA_SIZE],
}

/// Everything a channel needs to run its data path. Incoming and outgoing are the local endpoint's.
pub struct OpenRings {
    /// The ring this endpoint reads.
    pub incoming: RingPages,
    /// The ring this endpoint writes.
    pub outgoing: RingPages,
    /// The guest memory that external data and GPADLs name.
    pub memory: GuestMemory,
    /// Signals the peer.
    pub signal: Arc<dyn Signal>,
    /// Brings external data in where guest memory can be absent; `None` where it never is.
    pub residency: Option<Arc<dyn Residency>>,
    /// Device-defined bytes of the client's open request.
    pub user_data: [u8; USER_DATA_SIZE],
    /// The client has had the channel open since before a restore, and knows: the rings are in use,
    /// and a successful [`ServerLink::open_result`] tells it nothing.
    pub resumed: bool,
}

/// Guest memory that may have to be brought in before a device touches it (lazily restored, remote).
pub trait Residency: Send + Sync {
    /// Whether the `len` bytes at `gpa` are there. If not, the bus starts to bring them in, and posts
    /// [`BusEvent::MemoryArrived`] to `events` once they are.
    fn ensure(&self, gpa: u64, len: u64, events: &EventSink) -> bool;
}

/// The server endpoint's end of the seam. Dropping it withdraws the offer.
pub trait ServerLink: Send + Sync {
    /// Answers [`BusEvent::Opened`]: the guest is told whether the open succeeded.
    fn open_result(&self, status: NtStatus);

    /// The channel has let go of rings, signal and GPADLs: the bus may answer the guest's teardowns.
    fn closed(&self);

    /// Withdraws the offer. The guest learns of it by a rescind; no event answers.
    fn revoke(&self);

    /// The channel goes on elsewhere: the bus forgets its endpoint, tells the guest nothing, and keeps
    /// what the guest has of it. Nothing is called on this link afterwards, and dropping it withdraws
    /// nothing.
    fn moved_away(&self);

    /// The pages of a GPADL that the guest has created for this channel.
    ///
    /// # Errors
    /// [`NtStatus::INVALID_PARAMETER_3`] for an unknown or incomplete one.
    fn gpadl(&self, gpadl: u32) -> Result<GpadlPages, NtStatus>;

    /// Whether this channel still uses the GPADL: the bus holds the answer to its teardown back
    /// while it is in use.
    fn set_gpadl_in_use(&self, gpadl: u32, in_use: bool);
}

/// The client endpoint's end of the seam. Dropping it closes the channel.
pub trait ClientLink: Send + Sync {
    /// Opens the bound channel; answered by [`BusEvent::OpenCompleted`].
    fn open(&self, request: OpenRequest);

    /// Closes the channel after its rings are no longer in use, and gives its memory back.
    fn close(&self);

    /// Describes pages to the server; answered by [`BusEvent::GpadlCreated`] with the handle
    /// returned here.
    ///
    /// # Errors
    /// [`NtStatus::INVALID_PARAMETER`] for pages that no GPADL can describe,
    /// [`NtStatus::INSUFFICIENT_RESOURCES`] where a bound is reached,
    /// [`NtStatus::INVALID_DEVICE_STATE`] while the channel is not bound.
    fn create_gpadl(&self, pages: GpadlPages) -> Result<u32, NtStatus>;

    /// Takes the description back; answered by [`BusEvent::GpadlTornDown`] once the server has let go.
    fn teardown_gpadl(&self, gpadl: u32);

    /// Asks for another latency of monitored notifications, in units of 100 ns; returns the former.
    ///
    /// # Errors
    /// [`NtStatus::NOT_SUPPORTED`] where the offer has no monitor.
    fn set_interrupt_latency(&self, latency_100ns: u16) -> Result<u16, NtStatus>;

    /// Pages for the client's own buffers, in memory that the server can reach.
    ///
    /// # Errors
    /// [`NtStatus::INSUFFICIENT_RESOURCES`] when there are none left.
    fn allocate_pages(&self, pages: u32) -> Result<vmbus_memory::PageRun, NtStatus>;
}

/// A list of guest pages: what a GPADL describes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GpadlPages {
    /// Ranges in order. A ring GPADL and most others have exactly one.
    pub ranges: Vec<PageRange>,
    /// The client asked for read-only. No VMBus message carries this, so a server behind a real bus
    /// always sees `false`; the flag is a hint for snapshots, not protection (DDI page
    /// VmbChannelCreateGpadlFromBuffer).
    pub read_only: bool,
}

/// One range of a GPADL: `byte_count` bytes from `byte_offset` of the first page on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PageRange {
    /// Length in bytes; at least 1.
    pub byte_count: u32,
    /// Start within the first page; below 4096.
    pub byte_offset: u32,
    /// Guest page frame numbers; exactly as many as the two fields above need.
    pub pfns: Vec<u64>,
}

/// What a bus tells a channel.
pub enum BusEvent {
    /// Server: the guest asks to open the channel. Answered by [`ServerLink::open_result`].
    Opened(OpenRings),
    /// Client: an offer matches. `mmio` is the address and size in bytes of its MMIO space, if any.
    Offered {
        /// The instance that is bound.
        interface_instance: Guid,
        /// Guest physical address and size in bytes.
        mmio: Option<(u64, u64)>,
    },
    /// Client: the answer to [`ClientLink::open`].
    OpenCompleted(Result<OpenRings, NtStatus>),
    /// Client: the answer to [`ClientLink::create_gpadl`].
    GpadlCreated {
        /// The handle that `create_gpadl` returned.
        gpadl: u32,
        /// Whether the server took it.
        status: NtStatus,
    },
    /// Client: the answer to [`ClientLink::teardown_gpadl`].
    GpadlTornDown {
        /// The handle that was torn down.
        gpadl: u32,
    },
    /// Server: the guest has closed the channel, or is gone. Answered by [`ServerLink::closed`].
    PeerClosed,
    /// Client: the offer was withdrawn, or the bus is gone. Answered by [`ClientLink::close`].
    Rescinded,
    /// Client: the bus was found but the connection to the offer failed.
    ConnectFailed(NtStatus),
    /// Memory asked for through [`Residency::ensure`] is there.
    MemoryArrived,
}
