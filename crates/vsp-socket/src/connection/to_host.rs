//! From the guest to the program of the host.

use std::os::fd::OwnedFd;

use kmcl::{Channel, IncomingPacket};
use rustix::io::Errno;

use super::{Connection, Phase, State, send};
use crate::limits::MAX_KEPT_BYTES;

/// Bytes of the guest that wait.
pub(super) enum Piece {
    /// In the guest's packet, of which there is a number: so the ring fills up, and the guest waits.
    Held(IncomingPacket),
    /// On their own, of a channel that is closed.
    Kept(Vec<u8>),
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Held(packet) => packet.payload(),
            Self::Kept(bytes) => bytes,
        }
    }
}

impl Piece {
    /// Done with it: the guest may send another.
    pub(super) fn complete(self) {
        if let Self::Held(packet) = self {
            packet.complete(&[]);
        }
    }
}

impl State {
    /// Writes what waits, as far as it fits. What was done with goes to `done`, to be completed without the
    /// lock.
    fn write(&mut self, socket: &OwnedFd, done: &mut Vec<Piece>) -> Result<(), Errno> {
        while let Some(bytes) = self.backlog.next() {
            match send(socket, bytes) {
                Ok(written) => done.extend(self.backlog.wrote(written)),
                Err(Errno::AGAIN) => break,
                Err(error) => {
                    done.extend(self.backlog.clear());
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

impl Connection {
    /// A packet of the guest.
    pub(super) fn guest_sends(&self, packet: IncomingPacket) {
        let done = self.take(&mut self.state(), packet);
        if let Some(packet) = done {
            packet.complete(&[]);
        }
    }

    /// Writes what the packet has. It comes back if it is done with.
    fn take(&self, state: &mut State, packet: IncomingPacket) -> Option<IncomingPacket> {
        if state.guest_has_finished {
            // Its end was its last packet.
            tracing::debug!("a guest sends more after it has finished");
            self.report(state);
            return Some(packet);
        }
        let bytes = packet.payload();
        if bytes.is_empty() {
            state.guest_has_finished = true;
            self.finish_if_written(state);
            return Some(packet);
        }
        if state.phase != Phase::Open || state.program_is_deaf {
            return Some(packet);
        }
        let mut written = 0;
        if state.backlog.is_empty() {
            match send(&self.socket, bytes) {
                Ok(all) if all == bytes.len() => return Some(packet),
                Ok(part) => written = part,
                Err(Errno::AGAIN) => {}
                Err(error) => {
                    self.program_is_gone(state, error);
                    return Some(packet);
                }
            }
        }
        state.backlog.push(Piece::Held(packet));
        if written != 0 {
            state.backlog.wrote(written);
        }
        self.ask(state);
        None
    }

    /// The program can take more.
    pub(crate) fn program_takes(&self) {
        let mut done = Vec::new();
        self.write_on(&mut self.state(), &mut done);
        done.into_iter().for_each(Piece::complete);
    }

    fn write_on(&self, state: &mut State, done: &mut Vec<Piece>) {
        if let Err(error) = state.write(&self.socket, done) {
            self.program_is_gone(state, error);
        }
        self.finish_if_written(state);
        self.ask(state);
    }

    /// Tells the program that no more comes, once it has taken all there was.
    fn finish_if_written(&self, state: &mut State) {
        let is_finished = state.guest_has_finished || state.phase == Phase::Ended;
        if is_finished && state.backlog.is_empty() {
            self.finish_for_program();
        }
    }

    /// The channel goes down. If it is the guest that has closed it, what it has sent before still goes to
    /// the program; but nobody waits for that with the channel.
    pub(super) fn guest_closes(&self, channel: &Channel) {
        let mut held = Vec::new();
        {
            let mut state = self.state();
            let keeps = state.phase == Phase::Open && !state.program_is_deaf;
            if keeps {
                state.backlog.replace(|piece| match piece {
                    Piece::Held(packet) => {
                        let bytes = packet.payload().to_vec();
                        held.push(packet);
                        Piece::Kept(bytes)
                    }
                    kept @ Piece::Kept(_) => kept,
                });
            }
            if !keeps || state.guest_has_finished {
                drop(state);
                held.into_iter().for_each(|packet| packet.complete(&[]));
                return;
            }
        }
        held.into_iter().for_each(|packet| packet.complete(&[]));
        let mut rest = Vec::new();
        let mut room = MAX_KEPT_BYTES.saturating_sub(self.state().backlog.bytes());
        let mut has_finished = false;
        let taken = channel.take_undelivered(|message| {
            has_finished |= message.is_empty();
            if !has_finished && message.len() <= room {
                room -= message.len();
                rest.extend_from_slice(message);
            } else if !message.is_empty() {
                room = 0; // a stream with a gap is none
            }
        });
        if let Err(error) = taken {
            tracing::error!(%error, "the end of a guest's stream cannot be read");
        }
        self.state().backlog.push(Piece::Kept(rest));
    }

    /// The channel is closed, and goes with the offer.
    pub(super) fn guest_has_closed(&self) {
        let mut done = Vec::new();
        let packet = {
            let mut state = self.state();
            let packet = state.packet.take();
            if state.phase == Phase::Open {
                state.phase = Phase::Ended;
                state.limit = None;
                self.write_on(&mut state, &mut done);
                self.report(&mut state);
            }
            packet
        };
        drop(packet);
        done.into_iter().for_each(Piece::complete);
    }
}
