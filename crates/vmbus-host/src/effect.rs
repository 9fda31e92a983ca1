//! What a step of the host wants done outside of it.
//!
//! Effects are performed in the order in which they come, and before any message that the step has
//! queued goes to the guest: a MODIFY_CHANNEL_RESPONSE must not leave before the interrupts have
//! moved.

use kmcl::bus::USER_DATA_SIZE;
use vmbus_wire::guid::Guid;

use crate::offer::OfferId;

/// One thing to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// The guest opens the channel: listen to its signals, tell the device. Answered by
    /// [`Host::open_result`](crate::Host::open_result).
    Open {
        /// The channel.
        offer: OfferId,
        /// What the device is given.
        rings: Box<Rings>,
    },
    /// The channel has been open since before a restore: as [`Effect::Open`], for the device that goes on
    /// with it. Answered by [`Host::open_result`](crate::Host::open_result), of which the guest hears
    /// nothing.
    Resume {
        /// The channel.
        offer: OfferId,
        /// What the device is given.
        rings: Box<Rings>,
    },
    /// The open is over for the guest: from now on neither listen nor signal. Answered by
    /// [`Host::closed`](crate::Host::closed) once the device has let go.
    Close {
        /// The channel.
        offer: OfferId,
        /// Whether the device has to be told; not if it began by itself.
        tell_device: bool,
    },
    /// Signal the guest elsewhere from now on. Answered by
    /// [`Host::retargeted`](crate::Host::retargeted).
    Retarget {
        /// The channel.
        offer: OfferId,
        /// Where to.
        interrupt: Interrupt,
        /// Returned in the answer.
        serial: u64,
    },
    /// The guest asks for a socket connection. Answered by
    /// [`Host::hvsock_result`](crate::Host::hvsock_result).
    ConnectHvsock(HvsockRequest),
}

/// The rings of a channel that is being opened. Incoming and outgoing are the host's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rings {
    /// Page frames of the ring that the guest writes, the control page first; at least 2.
    pub incoming: Vec<u64>,
    /// Page frames of the ring that the guest reads, the control page first; at least 2.
    pub outgoing: Vec<u64>,
    /// How the host signals the guest.
    pub interrupt: Interrupt,
    /// The connection by which the guest signals the host.
    pub connection_id: u32,
    /// Device-defined bytes of the guest's request.
    pub user_data: [u8; USER_DATA_SIZE],
}

/// How a channel's guest is signalled.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Interrupt {
    /// Not at all: it polls.
    None,
    /// By an event flag of a VP.
    EventFlag {
        /// VP index.
        vp: u32,
        /// SINT of that VP.
        sint: u8,
        /// Number of the flag, 0 to 2047.
        flag: u16,
    },
    /// By a bit in the host-to-guest half of the shared interrupt page, and event flag 0 of the VP.
    ///
    /// Source: vmbus-wire section 2, rule 5.
    SharedPage {
        /// Guest physical address of the page.
        gpa: u64,
        /// Number of the bit, which is the channel id.
        bit: u16,
        /// VP index.
        vp: u32,
        /// SINT of that VP.
        sint: u8,
    },
}

/// A guest's request for a socket connection to the host.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct HvsockRequest {
    /// Names the request in its answer.
    pub id: u64,
    /// The guest's end. The channel that accepts the connection has it as its instance.
    pub endpoint_id: Guid,
    /// The host's service. The channel that accepts the connection has it as its interface type.
    pub service_id: Guid,
    /// The container that asks; newer guests only.
    pub silo_id: Option<Guid>,
}
