//! What a device or driver implements. Every callback gets its channel; none is called while a lock
//! of the library is held.

use vmbus_wire::status::NtStatus;

use crate::channel::Channel;
use crate::incoming::IncomingPacket;
use crate::packet::Packet;

/// The five state-change callbacks. They may sleep, never overlap for one channel, and all have
/// bodies that do nothing, because each is optional.
///
/// [`Channel::start`], [`Channel::pause`] and [`Channel::disable`] must not be called in them.
///
/// Source: DDI page VMB_CHANNEL_STATE_CHANGE_CALLBACKS; D-7 to D-10.
pub trait StateChange: Send + Sync {
    /// The channel was opened: by the client (server side), or with success (client side). Packets
    /// can be sent, and are transmitted once this has returned success. GPADLs may be set up from
    /// here on.
    ///
    /// # Errors
    /// A failing status turns the open down: no further callback follows (D-3).
    ///
    /// Source: EvtVmbChannelOpened.
    fn opened(&self, channel: &Channel) -> Result<(), NtStatus> {
        let _ = channel;
        Ok(())
    }

    /// The channel is open and started, and nothing was delivered yet. Sending is fine; waiting for
    /// the peer is not, since the incoming queue is off.
    ///
    /// Source: EvtVmbChannelStarted.
    fn started(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The incoming queue is on: the place for negotiation with the peer, synchronous requests
    /// included. Packets may be delivered at the same time (D-9).
    ///
    /// Source: EvtVmbChannelPostStarted.
    fn post_started(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The channel leaves Active. No packet callback runs now or before the next `started`. The
    /// device completes what it was given, here or later; the library waits for that.
    ///
    /// Source: EvtVmbChannelSuspend; D-7, D-8.
    fn suspend(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The channel is closed. GPADLs that are still mapped or created are undone after it (D-58).
    ///
    /// Source: EvtVmbChannelClosed.
    fn closed(&self, channel: &Channel) {
        let _ = channel;
    }
}

/// The packet callbacks. They never overlap for one channel and must not sleep for long: the
/// channel's other packets wait.
///
/// Source: VmbChannelInitSetProcessPacketCallbacks.
pub trait ProcessPacket: Send + Sync {
    /// One packet from the peer. It must finally be completed, now or later, from any thread; one
    /// that is dropped counts as failed. Called again for the same packet after a deferral.
    ///
    /// Completions and sends made inside the callback become visible to the peer together, with at
    /// most one signal, when the batch ends.
    ///
    /// Source: EvtVmbChannelProcessPacket.
    fn process_packet(&self, channel: &Channel, packet: IncomingPacket);

    /// The batch has ended after `packets` deliveries, whatever ended it (D-44).
    ///
    /// Source: EvtVmbChannelProcessingComplete.
    fn processing_complete(&self, channel: &Channel, packets: u32) {
        let _ = (channel, packets);
    }
}

/// Takes the end of packets that were sent.
pub trait PacketCompletion: Send + Sync {
    /// `packet` is the driver's again: free it by dropping it, or send it once more. `payload` is
    /// the peer's completion data, padded to a multiple of 8 bytes; empty without one.
    ///
    /// `status` is [`NtStatus::SUCCESS`] when the packet is in the ring (no
    /// [`WAIT_FOR_COMPLETION`](crate::SendFlags::WAIT_FOR_COMPLETION)) or was completed by the peer,
    /// [`NtStatus::CANCELLED`] when the channel was disabled here, [`NtStatus::DEVICE_REMOVED`] when
    /// the peer closed it (D-34).
    ///
    /// Source: EvtVmbPacketCompletionRoutine.
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]);
}

/// Told when a client's channel cannot be connected.
pub trait PnpFailure: Send + Sync {
    /// The bus was found but the connection failed with `status`; the channel is Disabled.
    ///
    /// Source: EvtVmbChannelPnpFailure.
    fn pnp_failure(&self, channel: &Channel, status: NtStatus);
}
