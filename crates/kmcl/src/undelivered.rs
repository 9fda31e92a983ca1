//! What a client has written before it closed its channel, and nobody has delivered.
//!
//! The documented close drops it: whoever waits for a completion learns that the channel is gone. On a
//! pipe there are no completions: a client may write the end of a stream and close at once, and counts
//! on its being read.

use vmbus_wire::packet::PacketKind;
use vmbus_wire::pipe::{PipePacket, PipePacketType};

use crate::channel::Channel;
use crate::error::{ChannelError, Error};
use crate::lifecycle::{ChannelState, Side};
use crate::receiver::Receiver;

impl Channel {
    /// Server, inside [`StateChange::suspend`](crate::StateChange::suspend) or
    /// [`StateChange::closed`](crate::StateChange::closed) of a channel that goes down: gives `take` the
    /// message of each in-band packet that is left in the ring, in order, without the bus's headers.
    /// Nothing is completed, and no room given back: a client that goes on writing keeps this going for
    /// no longer than a ring.
    ///
    /// Packets that were handed back or handed over are not among them. A packet that is none stops the
    /// channel ([`Self::stop_reason`]), and ends this.
    ///
    /// # Errors
    /// [`Error::State`] at any other time.
    ///
    /// An extension.
    pub fn take_undelivered(&self, mut take: impl FnMut(&[u8])) -> Result<(), Error> {
        let state = self.state();
        let is_possible = self.side() == Side::Server
            && state == ChannelState::Closing
            && self.in_control_callback();
        if !is_possible {
            return Err(Error::State { function: "take_undelivered", state });
        }
        if self.is_stopped() {
            return Ok(());
        }
        // Out of its place meanwhile: `take` is foreign code, and runs under no lock. The queue is off
        // for good, so nobody misses it.
        let mut taken = None;
        self.with_receiver(|receiver| {
            taken = receiver;
            None
        });
        let Some(mut receiver) = taken else { return Ok(()) };
        let read = receiver.read_undelivered(&mut take);
        self.with_receiver(|_| Some(receiver));
        if let Err(reason) = read {
            self.stop(reason);
        }
        Ok(())
    }
}

impl Receiver {
    fn read_undelivered(&mut self, take: &mut dyn FnMut(&[u8])) -> Result<(), ChannelError> {
        let (reader, is_pipe, message) = self.for_undelivered();
        while let Some(packet) = reader.peek().map_err(ChannelError::Incoming)? {
            match packet.kind {
                PacketKind::Completion => {}
                PacketKind::InBand => {
                    message.resize(packet.payload_len as usize, 0);
                    packet.copy_payload(message);
                    take(if is_pipe { pipe_message(message)? } else { message });
                }
                kind => return Err(ChannelError::Kind(kind)),
            }
            reader.advance();
        }
        Ok(())
    }
}

fn pipe_message(payload: &[u8]) -> Result<&[u8], ChannelError> {
    let packet = PipePacket::parse(payload).map_err(ChannelError::Pipe)?;
    match packet.packet_type {
        PipePacketType::Data => Ok(packet.data),
        other => Err(ChannelError::PipeType(other)),
    }
}
