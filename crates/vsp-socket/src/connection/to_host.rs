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
    /// lock. `false` if the program takes nothing any more.
    fn write(&mut self, socket: &OwnedFd, done: &mut Vec<Piece>) -> bool {
        while let Some(bytes) = self.backlog.next() {
            match send(socket, bytes) {
                Ok(written) => done.extend(self.backlog.wrote(written)),
                Err(Errno::AGAIN) => return true,
                Err(error) => {
                    tracing::debug!(%error, "a program of the host takes no more from the guest");
                    done.extend(self.backlog.clear());
                    return false;
                }
            }
        }
        true
    }
}

impl Connection {
    /// A packet of the guest.
    pub(super) fn from_guest(&self, packet: IncomingPacket) {
        let mut done = Vec::new();
        {
            let mut state = self.state();
            if state.guest_has_finished {
                // Its end was its last packet.
                tracing::debug!("a guest sends more after it has finished");
                self.report(&mut state);
            }
            if state.phase != Phase::Open || state.guest_has_finished || state.program_is_deaf {
                // For nobody; but an end is an end.
                state.guest_has_finished |= packet.payload().is_empty();
                done.push(Piece::Held(packet));
            } else if let Some(end) = state.backlog.push(Piece::Held(packet)) {
                state.guest_has_finished = true;
                done.push(end);
                self.finish_if_written(&mut state);
            } else if state.asked.contains(rustix::event::epoll::EventFlags::OUT) {
                // The program is slow, and the poller will tell.
            } else {
                self.write_on(&mut state, &mut done);
            }
        }
        done.into_iter().for_each(Piece::complete);
    }

    /// The program can take more.
    pub(crate) fn program_takes(&self) {
        let mut done = Vec::new();
        self.write_on(&mut self.state(), &mut done);
        done.into_iter().for_each(Piece::complete);
    }

    fn write_on(&self, state: &mut State, done: &mut Vec<Piece>) {
        if !state.write(&self.socket, done) {
            self.program_is_gone(state);
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
