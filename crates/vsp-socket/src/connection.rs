//! One connection: a channel of the guest on one side, a stream of the host on the other.
//!
//! ```text
//!            opened                 closed, or withdrawn here
//!  Offered ─────────▶ Open ─────────────────────────────────▶ Ended ──▶ gone, once all is written
//!     └──────────────── not opened in time, withdrawn ──────────▲
//! ```
//!
//! Each direction ends by itself: the guest's with a packet of no bytes, the program's with the end of its
//! stream. Neither is buffered here without bound: what the program does not take stays in the guest's
//! packets, and when those are used up in the ring; what the guest does not take stays in the program's
//! socket.
//!
//! Packets come on the thread that drives the channel, the program's bytes on the one that serves the
//! broker. A lock guards what both use; the channel is never called under it, since it calls back.

mod to_guest;
mod to_host;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use kmcl::{
    Channel, IncomingPacket, NtStatus, Packet, PacketCompletion, ProcessPacket, StateChange,
};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{self, Shutdown, shutdown};
use vmbus_wire::guid::Guid;

use crate::backlog::Backlog;
use crate::greeting;
use crate::inbox::Inbox;
use crate::limits::{OPEN_TIMEOUT, RESET_DELAY};
use crate::poller::Poller;
use to_host::Piece;

/// Who has connected to whom, as the offer says it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Names {
    /// The service connected to: the offer's interface type.
    pub(crate) service: Guid,
    /// The connecting end: the offer's instance.
    pub(crate) endpoint: Guid,
    /// The host has connected to the guest.
    pub(crate) from_host: bool,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// The guest has not opened it.
    Offered,
    Open,
    /// The guest has closed it, or it is withdrawn.
    Ended,
}

/// See the module.
pub(crate) struct Connection {
    pub(crate) token: u64,
    pub(crate) names: Names,
    socket: OwnedFd,
    poller: Arc<Poller>,
    inbox: Arc<Inbox>,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// What the poller was asked to tell, and has not told.
    asked: EventFlags,
    /// It was said that the connection has ended.
    is_reported: bool,
    /// What is waited for, with a limit.
    limit: Option<Limit>,

    /// The guest's bytes that the program has not taken.
    backlog: Backlog<Piece>,
    /// The guest sends nothing any more.
    guest_has_finished: bool,
    /// The program takes nothing any more.
    program_is_deaf: bool,

    /// The packet for the program's bytes, while it is not on its way.
    packet: Option<Packet>,
    /// Its sender works through the stream at this moment, and asks the poller itself.
    is_pumped: bool,
    /// The program sends nothing any more, and the guest was told so.
    program_has_finished: bool,
}

/// A time that was first seen by the tick after it began.
#[derive(Clone, Copy, Debug)]
struct Limit {
    since: Option<Duration>,
    length: Duration,
}

impl Limit {
    fn of(length: Duration) -> Self {
        Self { since: None, length }
    }

    fn is_over(&mut self, now: Duration) -> bool {
        let since = *self.since.get_or_insert(now);
        now.saturating_sub(since) >= self.length
    }
}

impl Connection {
    /// A connection that is about to be offered. `socket` is in the poller's set as `token`.
    pub(crate) fn new(
        token: u64,
        names: Names,
        socket: OwnedFd,
        poller: Arc<Poller>,
        inbox: Arc<Inbox>,
    ) -> Arc<Self> {
        let state = State {
            phase: Phase::Offered,
            asked: EventFlags::empty(),
            is_reported: false,
            limit: Some(Limit::of(OPEN_TIMEOUT)),
            backlog: Backlog::default(),
            guest_has_finished: false,
            program_is_deaf: false,
            packet: None,
            is_pumped: false,
            program_has_finished: false,
        };
        Arc::new(Self { token, names, socket, poller, inbox, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the poller tell what can be used now.
    fn ask(&self, state: &mut State) {
        let mut wanted = EventFlags::empty();
        let reads = state.phase == Phase::Open
            && !state.program_has_finished
            && !state.is_pumped
            && state.packet.is_some();
        wanted.set(EventFlags::IN, reads);
        wanted.set(EventFlags::OUT, !state.backlog.is_empty());
        if !state.asked.contains(wanted) {
            state.asked |= wanted;
            self.poller.ask(&self.socket, self.token, state.asked);
        }
    }

    /// The poller has told something: it tells nothing more before it is asked again.
    pub(crate) fn told(&self) {
        self.state().asked = EventFlags::empty();
    }

    /// What was told is done with, as far as it could be.
    pub(crate) fn ask_again(&self) {
        self.ask(&mut self.state());
    }

    /// Goes on after a freeze: what was told meanwhile is asked for again, and limits begin anew.
    pub(crate) fn go_on(&self) {
        let mut state = self.state();
        if let Some(limit) = &mut state.limit {
            limit.since = None;
        }
        state.asked = EventFlags::empty();
        self.ask(&mut state);
    }

    /// Something happened that ends the connection.
    fn report(&self, state: &mut State) {
        if !std::mem::replace(&mut state.is_reported, true) {
            self.inbox.report(self.token);
        }
    }

    /// Whether a limit is over.
    pub(crate) fn is_overdue(&self, now: Duration) -> bool {
        self.state().limit.as_mut().is_some_and(|limit| limit.is_over(now))
    }

    /// Whether the guest has closed, and something is left to be written.
    pub(crate) fn is_draining(&self) -> bool {
        let state = self.state();
        state.phase == Phase::Ended && !state.backlog.is_empty()
    }

    /// The connection is over: what waits is given up. The channel can be disabled then.
    pub(crate) fn end(&self) {
        let (packet, pieces) = {
            let mut state = self.state();
            state.phase = Phase::Ended;
            state.limit = None;
            (state.packet.take(), state.backlog.clear())
        };
        drop(packet);
        pieces.into_iter().for_each(Piece::complete);
    }

    /// The guest has opened the channel. `packet` is for what goes to it.
    fn open(&self, packet: Packet) -> Result<(), NtStatus> {
        let mut state = self.state();
        if state.phase != Phase::Offered {
            drop(state);
            drop(packet);
            return Err(NtStatus::INVALID_DEVICE_STATE);
        }
        state.phase = Phase::Open;
        state.limit = None;
        state.packet = Some(packet);
        if self.names.from_host {
            let line = greeting::answer(self.names.endpoint.data1());
            // The first bytes of a stream always fit, unless the program is gone.
            if let Err(error) = send(&self.socket, line.as_bytes()) {
                self.program_is_gone(&mut state, error);
            }
        }
        self.ask(&mut state);
        Ok(())
    }

    /// The program takes nothing any more. The guest may read what it was sent, and is then reset.
    fn program_is_gone(&self, state: &mut State, error: Errno) {
        tracing::debug!(%error, "a program of the host is gone");
        state.program_is_deaf = true;
        if state.phase == Phase::Open && state.limit.is_none() {
            state.limit = Some(Limit::of(RESET_DELAY));
        }
    }

    /// The program gets no more bytes.
    fn finish_for_program(&self) {
        // The only error is that it is gone.
        let _ = shutdown(&self.socket, Shutdown::Write);
    }
}

/// Writes as much as fits.
fn send(socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    let flags = net::SendFlags::NOSIGNAL | net::SendFlags::DONTWAIT;
    loop {
        match net::send(socket, bytes, flags) {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The connection as its channel and its packets know it. They do not keep it: it keeps them.
pub(crate) struct Callbacks(Weak<Connection>);

impl Callbacks {
    pub(crate) fn of(connection: &Arc<Connection>) -> Arc<Self> {
        Arc::new(Self(Arc::downgrade(connection)))
    }
}

impl StateChange for Callbacks {
    fn opened(&self, channel: &Channel) -> Result<(), NtStatus> {
        let connection = self.0.upgrade().ok_or(NtStatus::DEVICE_REMOVED)?;
        let mut packet = channel.packet_allocate().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
        packet.set_completion_routine(Arc::new(Self(self.0.clone())));
        connection.open(packet)
    }

    fn suspend(&self, channel: &Channel) {
        if let Some(connection) = self.0.upgrade() {
            connection.guest_closes(channel);
        }
    }

    fn closed(&self, _: &Channel) {
        if let Some(connection) = self.0.upgrade() {
            connection.guest_has_closed();
        }
    }
}

impl ProcessPacket for Callbacks {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        match self.0.upgrade() {
            Some(connection) => connection.guest_sends(packet),
            None => packet.complete(&[]),
        }
    }
}

impl PacketCompletion for Callbacks {
    fn completed(&self, packet: Packet, status: NtStatus, _: &[u8]) {
        match self.0.upgrade() {
            Some(connection) if status.is_success() => connection.packet_is_back(packet),
            _ => drop(packet),
        }
    }
}
