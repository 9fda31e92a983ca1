//! From the program of the host to the guest.

use kmcl::{Channel, Packet, SendFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::{Connection, Phase};
use crate::limits::BYTES_PER_TURN;

impl Connection {
    /// The program has sent something, or has finished. `room` is for one packet.
    ///
    /// There is one packet: while it waits for room in the ring nothing is read, and what the program sends
    /// on waits in its socket.
    pub(crate) fn program_sends(&self, channel: &Channel, room: &mut [u8]) {
        self.state().is_pumped = true;
        let mut batch = channel.batch();
        let mut bytes = 0;
        while bytes < BYTES_PER_TURN {
            let Some(packet) = self.packet_to_send() else { break };
            let read = match recv(&self.socket, &mut *room, RecvFlags::DONTWAIT) {
                Ok((read, _)) => read,
                Err(Errno::AGAIN | Errno::INTR) => {
                    self.packet_is_back(packet);
                    break;
                }
                Err(error) => {
                    self.program_is_gone(&mut self.state(), error);
                    0
                }
            };
            if read == 0 {
                self.state().program_has_finished = true;
            }
            bytes += read;
            let message = room.get(..read).unwrap_or_default();
            // Without bytes it is the stream's end.
            if let Err(refused) = batch.send(packet, message, None, SendFlags::empty()) {
                // The channel goes down, which is heard of elsewhere.
                tracing::debug!(error = %refused.error, "nothing can be sent to the guest");
                break;
            }
        }
        drop(batch);
        let mut state = self.state();
        state.is_pumped = false;
        self.ask(&mut state);
    }

    fn packet_to_send(&self) -> Option<Packet> {
        let mut state = self.state();
        match state.phase == Phase::Open && !state.program_has_finished {
            true => state.packet.take(),
            false => None,
        }
    }

    /// The packet is in the ring: the next bytes may be read.
    pub(super) fn packet_is_back(&self, packet: Packet) {
        let mut state = self.state();
        if state.phase == Phase::Open {
            state.packet = Some(packet);
            self.ask(&mut state);
        } else {
            drop(state);
            drop(packet);
        }
    }
}
