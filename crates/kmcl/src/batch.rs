//! Several completions and sends, shown to the peer at once.

use std::sync::Arc;

use vmbus_wire::ranges::GpaRange;

use crate::channel::Channel;
use crate::error::SendError;
use crate::flags::SendFlags;
use crate::incoming::IncomingPacket;
use crate::packet::Packet;

/// See [`Channel::batch`]. Inside packet callbacks this happens by itself; a batch is for threads
/// that complete or send several packets at a time elsewhere.
pub struct Batch<'a> {
    channel: &'a Channel,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(channel: &'a Channel) -> Self {
        Self { channel }
    }

    /// As [`IncomingPacket::complete`]. A packet of another channel is completed by itself.
    pub fn complete(&mut self, packet: IncomingPacket, payload: &[u8]) {
        let Some((body, channel)) = packet.into_parts() else { return };
        if Arc::ptr_eq(&channel.shared, &self.channel.shared) {
            channel.complete_staged(body, payload);
        } else {
            channel.complete(body, payload);
        }
    }

    /// As [`Packet::send`]. A packet of another channel is sent by itself.
    ///
    /// # Errors
    /// As for [`Packet::send`].
    pub fn send(
        &mut self,
        packet: Packet,
        message: &[u8],
        external: Option<&[GpaRange<'_>]>,
        flags: SendFlags,
    ) -> Result<(), SendError> {
        if !Arc::ptr_eq(&packet.channel().shared, &self.channel.shared) {
            return packet.send(message, external, flags);
        }
        self.channel.send_staged(packet, message, external, flags)
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.channel.publish();
    }
}
