//! What a device or driver implements. Every callback gets its channel; none is called while a lock
//! of the library is held.

use vmbus_wire::status::NtStatus;

use crate::channel::Channel;
use crate::fenced::ResumedPacket;
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

    /// A packet that was handed over comes again: the channel has thawed, or was restored. Such packets
    /// come before any other, in the order in which they were first delivered. Devices that keep
    /// nothing with a packet begin anew, which is what this does if it is not implemented.
    ///
    /// An extension: see [`Frozen`](crate::Frozen).
    fn resume_packet(&self, channel: &Channel, packet: ResumedPacket) {
        self.process_packet(channel, packet.into_packet());
    }

    /// The channel was frozen. The device begins no further I/O, and settles the packets that it has:
    /// it completes them, or says what has become of them and hands them over
    /// ([`IncomingPacket::never_started`], [`IncomingPacket::cancelled`]), here or later, on any thread.
    ///
    /// An extension: see [`Frozen`](crate::Frozen).
    fn freeze(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The channel goes on. Packets that were handed over come next.
    ///
    /// An extension: see [`Frozen`](crate::Frozen).
    fn thaw(&self, channel: &Channel) {
        let _ = channel;
    }

    /// The batch has ended after `packets` deliveries, whatever ended it (D-44).
    ///
    /// Source: EvtVmbChannelProcessingComplete.
    fn processing_complete(&self, channel: &Channel, packets: u32) {
        let _ = (channel, packets);
    }
}

/// What a server endpoint keeps with its packets in flight, while the channel is saved and restored.
///
/// Source: VmbServerChannelInitSetSaveRestorePacketCallbacks; D-20 to D-27.
pub trait SaveRestorePacket: Send + Sync {
    /// Bytes of private state that the driver has for `packet`, which is in flight; 0 for none. The
    /// driver knows its packet by [`Packet::pointer`], or by a table of its own.
    ///
    /// # Errors
    /// A status that ends the save (D-21).
    ///
    /// Source: EvtVmbChannelSavePacket, first call; D-23.
    fn state_size(&self, channel: &Channel, packet: &Packet) -> Result<u32, NtStatus> {
        let _ = (channel, packet);
        Ok(0)
    }

    /// Writes that state into `buffer`, which has at least as many bytes as were asked for, and
    /// returns how many of them count.
    ///
    /// # Errors
    /// A status that ends the save (D-21). So does a length beyond the buffer (D-22).
    ///
    /// Source: EvtVmbChannelSavePacket, second call.
    fn save_packet(
        &self,
        channel: &Channel,
        packet: &Packet,
        buffer: &mut [u8],
    ) -> Result<u32, NtStatus> {
        let _ = (channel, packet, buffer);
        Ok(0)
    }

    /// A packet that was in flight comes back. The driver allocates a packet, sets its completion
    /// routine (and pointer, if it has one), and calls [`Packet::restore`] with `library_state`;
    /// `own_state` is what [`Self::save_packet`] had written, empty if nothing. Both are valid during
    /// the call only. Returning success without the restore gives the transaction up (D-27).
    ///
    /// # Errors
    /// A status that ends the restore: packets that came back before end with STATUS_CANCELLED.
    ///
    /// Source: EvtVmbChannelRestorePacket; D-25, D-26.
    fn restore_packet(
        &self,
        channel: &Channel,
        library_state: &[u8],
        own_state: &[u8],
    ) -> Result<(), NtStatus>;
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
