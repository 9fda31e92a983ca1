//! Packets in flight that can be saved: those whose original I/O can no longer land.
//!
//! A request that is carried out again after a restore, while its original is still on its way to the
//! disk, overwrites what came after it. So a device says of each packet what has become of the
//! original, and only what has been said makes a packet one that can be saved: [`Fenced`] has no other
//! constructors than the two statements, and a third, that it has finished, is its completion.

use vmbus_wire::status::NtStatus;

use crate::channel::Channel;
use crate::incoming::IncomingPacket;
use crate::waiting::{Waiting, Why};

/// Most bytes that a device keeps with a packet.
pub const MAX_DEVICE_STATE: usize = saved_state::limits::MAX_OWN_STATE_BYTES;

/// What has become of the original I/O of a packet: none of it can happen any more.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Fence {
    /// The device had not begun with it.
    NeverStarted,
    /// It was cancelled, and the cancelling confirmed: what was not done by then will not be done.
    Cancelled,
}

/// An incoming packet of which the device has said that its original I/O can no longer land.
///
/// Dropping it fails the packet, as for [`IncomingPacket`].
#[derive(Debug)]
#[must_use = "a packet that is not handed over is failed"]
pub struct Fenced {
    packet: IncomingPacket,
    fence: Fence,
}

/// A packet that could not be handed over.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct NotHandedOver {
    /// The packet, still the device's.
    pub packet: IncomingPacket,
    /// Why.
    pub why: HandOverProblem,
}

/// Why a packet could not be handed over.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HandOverProblem {
    /// Its channel is not frozen: the device goes on with it.
    #[error("the channel of the packet is not frozen")]
    NotFrozen,
    /// More than [`MAX_DEVICE_STATE`] bytes.
    #[error("{bytes} bytes of device state, limit {MAX_DEVICE_STATE}")]
    TooLarge {
        /// Bytes.
        bytes: usize,
    },
}

impl HandOverProblem {
    /// The status that fits it.
    #[must_use]
    pub fn status(self) -> NtStatus {
        match self {
            Self::NotFrozen => NtStatus::INVALID_DEVICE_STATE,
            Self::TooLarge { .. } => NtStatus::INVALID_BUFFER_SIZE,
        }
    }
}

impl IncomingPacket {
    /// States that no I/O of this packet has begun, so that none can land.
    pub fn never_started(self) -> Fenced {
        Fenced { packet: self, fence: Fence::NeverStarted }
    }

    /// States that the I/O of this packet was cancelled, and that whoever performed it has confirmed
    /// that nothing more of it will land.
    pub fn cancelled(self) -> Fenced {
        Fenced { packet: self, fence: Fence::Cancelled }
    }
}

impl Fenced {
    /// What was stated.
    #[must_use]
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// Hands the packet to its frozen channel, with what the device wants to know of it again, up to
    /// [`MAX_DEVICE_STATE`] bytes. It comes back through
    /// [`ProcessPacket::resume_packet`](crate::ProcessPacket::resume_packet): here, when the channel
    /// thaws, or where the channel was restored.
    ///
    /// # Errors
    /// The packet, and why.
    pub fn hand_over(self, device_state: &[u8]) -> Result<(), NotHandedOver> {
        let Self { packet, fence } = self;
        let (level, bytes) = (packet.level(), device_state.len());
        if bytes > MAX_DEVICE_STATE {
            return Err(NotHandedOver { packet, why: HandOverProblem::TooLarge { bytes } });
        }
        let Some((body, channel)) = packet.into_parts() else { return Ok(()) };
        let why = Why::HandedOver { fence, state: device_state.into() };
        let handed_over = channel.traffic().hand_over(Waiting { body, why });
        match handed_over {
            Ok(consequences) => {
                channel.follow(consequences);
                Ok(())
            }
            Err(Waiting { body, .. }) => {
                let packet = IncomingPacket::new(body, channel, level);
                Err(NotHandedOver { packet, why: HandOverProblem::NotFrozen })
            }
        }
    }

    /// Takes the statement back.
    #[must_use]
    pub fn into_packet(self) -> IncomingPacket {
        self.packet
    }
}

/// A packet that comes to its device again: after a thaw, or in another process after a restore.
#[derive(Debug)]
pub struct ResumedPacket {
    packet: IncomingPacket,
    fence: Fence,
    state: Box<[u8]>,
}

impl ResumedPacket {
    pub(crate) fn new(packet: IncomingPacket, fence: Fence, state: Box<[u8]>) -> Self {
        Self { packet, fence, state }
    }

    /// What the device had said of its original I/O.
    #[must_use]
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// What the device had kept with it. After a restore these are bytes of a saved state: as
    /// trustworthy as that is.
    #[must_use]
    pub fn device_state(&self) -> &[u8] {
        &self.state
    }

    /// The packet.
    #[must_use]
    pub fn packet(&self) -> &IncomingPacket {
        &self.packet
    }

    /// The packet, to be completed like any other.
    #[must_use]
    pub fn into_packet(self) -> IncomingPacket {
        self.packet
    }
}

impl Channel {
    /// Completes a packet that was completed before a restore.
    pub(crate) fn complete_again(&self, body: Box<crate::pool::Body>) {
        let (consequences, written) = {
            let mut traffic = self.traffic();
            traffic.deliver_again(); // as those that are completed now
            traffic.complete_all(&mut vec![body])
        };
        if let Err(error) = written {
            self.stop(crate::ChannelError::Outgoing(error));
        }
        self.follow(consequences);
    }
}
