//! The thread of the sockets: it takes connections, moves bytes, and never waits for a VM or a peer.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::api::{ControlError, ErrorKind};
use super::call::Call;
use super::callers::{Bell, Callers, busy};
use super::door::{Door, Visitor};
use super::exchange::{Exchange, Request, Wants};
use super::http::Answer;

/// Most connections at once. A further one takes the place of one that has asked for nothing for the
/// longest time, or is turned away.
pub const MAX_CONNECTIONS: usize = 32;

/// How long, at the end, calls that are being made and answers on their way are waited for.
pub const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

/// How long nobody is let in after the system has had no descriptor or memory for it.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// See the module.
pub(super) struct Server {
    /// None once it is closed.
    door: Option<Door>,
    shut_until: Option<Instant>,
    bell: Arc<Bell>,
    stop: Arc<AtomicBool>,
    callers: Callers,
    connections: BTreeMap<u64, Connection>,
    next: u64,
}

struct Connection {
    socket: OwnedFd,
    exchange: Exchange,
    /// No more is sent: its peer knows.
    shut: bool,
}

impl Server {
    pub(super) fn new(
        door: Door,
        bell: Arc<Bell>,
        stop: Arc<AtomicBool>,
        callers: Callers,
    ) -> Self {
        let connections = BTreeMap::new();
        Self { door: Some(door), shut_until: None, bell, stop, callers, connections, next: 0 }
    }

    /// Serves until it is told to stop, and everybody has their answer or had their time.
    pub(super) fn run(mut self) {
        let mut end_by = None;
        loop {
            let now = Instant::now();
            if end_by.is_none() && self.stop.load(Ordering::SeqCst) {
                end_by = Some(now + CLOSE_PATIENCE);
                self.begin_to_end();
            }
            let through = self.connections.is_empty() && self.callers.is_idle();
            if end_by.is_some_and(|by| through || now >= by) {
                break;
            }
            if let Err(error) = self.turn(end_by) {
                // Nothing that a peer does: the process is short of something, or a descriptor is broken.
                tracing::error!(%error, "the control interface is closed");
                break;
            }
        }
        self.callers.close();
    }

    fn begin_to_end(&mut self) {
        self.door = None;
        self.callers.end();
        for connection in self.connections.values_mut() {
            connection.exchange.finish();
        }
        self.connections.retain(|_, connection| connection.exchange.wants() != Wants::Close);
    }

    /// Waits until something can be done, and does it.
    fn turn(&mut self, end_by: Option<Instant>) -> Result<(), Errno> {
        let now = Instant::now();
        let deadlines = self.connections.values().filter_map(|c| c.exchange.deadline());
        let until = deadlines.chain(end_by).chain(self.shut_until).min();
        let ready = self.wait(until.map(|until| until.saturating_duration_since(now)))?;
        let now = Instant::now();
        if ready.bell {
            self.bell.quiet();
        }
        while let Some((id, answer)) = self.callers.answer() {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.exchange.answer(&answer, now);
                self.go_on(id, None, now);
            }
        }
        for (id, gone) in ready.connections {
            if gone {
                // Nobody is there to read the answer.
                self.connections.remove(&id);
            } else {
                let request = self.connections.get_mut(&id).and_then(|c| c.receive(now));
                self.go_on(id, request, now);
            }
        }
        self.expire(now);
        if ready.door {
            self.let_in(now);
        }
        Ok(())
    }

    fn wait(&self, timeout: Option<Duration>) -> Result<Ready, Errno> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let door = self.door.as_ref().filter(|_| self.shut_until.is_none());
        let mut fds = vec![PollFd::new(&*self.bell, PollFlags::IN)];
        let mut ids = Vec::new();
        for (&id, connection) in &self.connections {
            let flags = match connection.exchange.wants() {
                Wants::Read | Wants::Drain => PollFlags::IN,
                Wants::Write => PollFlags::OUT,
                // That both directions have ended is always told.
                Wants::Answer | Wants::Close => PollFlags::empty(),
            };
            fds.push(PollFd::new(&connection.socket, flags));
            ids.push((id, connection.exchange.wants()));
        }
        fds.extend(door.map(|door| PollFd::new(door, PollFlags::IN)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(error),
        }
        let mut said = fds.iter().map(PollFd::revents);
        let bell = said.next().is_some_and(|flags| !flags.is_empty());
        let connections = ids
            .into_iter()
            .zip(said.by_ref())
            .filter(|(_, flags)| !flags.is_empty())
            .map(|((id, wants), flags)| {
                let gone =
                    wants == Wants::Answer && flags.intersects(PollFlags::HUP | PollFlags::ERR);
                (id, gone)
            })
            .collect();
        Ok(Ready { bell, connections, door: said.next().is_some_and(|flags| !flags.is_empty()) })
    }

    /// Makes what calls it can of a connection's requests, sends what can be sent, and closes it when it
    /// is through.
    fn go_on(&mut self, id: u64, mut request: Option<Request>, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        loop {
            if let Some(Request { method, path, body }) = request.take() {
                tracing::debug!(method, path, bytes = body.len(), "control request");
                let call = Call::of(&method, &path, &body);
                let refusal = call.and_then(|call| self.callers.call(id, call)).err();
                if let Some(answer) = refusal {
                    connection.exchange.answer(&answer, now);
                }
            }
            match connection.exchange.wants() {
                Wants::Write => match connection.send(now) {
                    Sent::Some(next) => request = next,
                    Sent::Blocked => return,
                    Sent::Gone => break,
                },
                Wants::Drain if !connection.shut => {
                    connection.shut = true;
                    let _gone = shutdown(&connection.socket, Shutdown::Write);
                }
                Wants::Read | Wants::Drain | Wants::Answer => return,
                Wants::Close => break,
            }
        }
        self.connections.remove(&id);
    }

    fn expire(&mut self, now: Instant) {
        if self.shut_until.is_some_and(|until| now >= until) {
            self.shut_until = None;
        }
        let late = |c: &Connection| c.exchange.deadline().is_some_and(|deadline| now >= deadline);
        let late: Vec<u64> =
            self.connections.iter().filter(|(_, c)| late(c)).map(|(&id, _)| id).collect();
        for id in late {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.exchange.expire(now);
            }
            self.go_on(id, None, now);
        }
    }

    fn let_in(&mut self, now: Instant) {
        let accepted = self.door.as_ref().map(Door::accept);
        let Visitor { socket, uid, welcome } = match accepted {
            Some(Ok(Some(visitor))) => visitor,
            Some(Ok(None)) | None => return,
            Some(Err(error)) => {
                tracing::warn!(%error, "nobody can be let in to the control interface for a moment");
                self.shut_until = Some(now + SHORTAGE_PAUSE);
                return;
            }
        };
        if !welcome {
            tracing::warn!(?uid, "somebody else has connected to the control interface");
            let what = "only the owner of the VM's process, and root, may control it";
            let refusal = Answer::error(&ControlError::new(ErrorKind::Forbidden, what));
            return turn_away(&socket, &refusal);
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            let idle = |(&id, c): (&u64, &Connection)| Some((c.exchange.idle_since()?, id));
            match self.connections.iter().filter_map(idle).min() {
                Some((_, id)) => drop(self.connections.remove(&id)),
                None => return turn_away(&socket, &busy("too many connections")),
            }
        }
        self.next += 1;
        let exchange = Exchange::new(now);
        self.connections.insert(self.next, Connection { socket, exchange, shut: false });
    }
}

/// What can be done.
#[derive(Default)]
struct Ready {
    bell: bool,
    door: bool,
    /// Connections, and whether their peer has gone for good while a call is being made.
    connections: Vec<(u64, bool)>,
}

/// What became of bytes to send.
enum Sent {
    /// Some went; here is the next request, if there is one.
    Some(Option<Request>),
    Blocked,
    Gone,
}

impl Connection {
    /// Reads what is there, if it is waited for.
    fn receive(&mut self, now: Instant) -> Option<Request> {
        if !matches!(self.exchange.wants(), Wants::Read | Wants::Drain) {
            return None;
        }
        let mut bytes = [0; READ_BYTES];
        match recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.exchange.ended(now),
            Ok((length, _)) => {
                let came = bytes.get(..length).unwrap_or(&bytes);
                return self.exchange.received(came, now);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_gone) => self.exchange.finish(),
        }
        None
    }

    fn send(&mut self, now: Instant) -> Sent {
        match send(&self.socket, self.exchange.to_send(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
        {
            Ok(length) => Sent::Some(self.exchange.sent(length, now)),
            Err(Errno::AGAIN | Errno::INTR) => Sent::Blocked,
            Err(_gone) => Sent::Gone,
        }
    }
}

/// Gives one answer, if there is room for it at once, and no more.
fn turn_away(socket: &OwnedFd, answer: &Answer) {
    let bytes = answer.to_bytes(false, false);
    let _told = send(socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
}
