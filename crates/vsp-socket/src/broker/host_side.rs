//! Programs of the host that want to be connected to the guest.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use vmbus_wire::hvsock::service_of_port;

use super::{Core, Entry, Turn};
use crate::connection::{Connection, Names};
use crate::greeting::Greeting;
use crate::limits::{ACCEPTS_PER_TURN, FIRST_HOST_PORT, GREETING_TIMEOUT, MAX_GREETING_BYTES};

/// A program that has not said yet where it wants to be connected.
pub(super) struct Program {
    socket: OwnedFd,
    greeting: Greeting,
    /// When a tick has first seen it.
    since: Option<Duration>,
}

/// What a program has said.
enum Heard {
    /// Nothing more for the moment.
    Nothing,
    /// To be connected to this port.
    Port(u32),
    /// Nonsense, or it is gone.
    Over,
}

impl Program {
    pub(super) fn go_on(&mut self, core: &Core, token: u64) {
        self.since = None;
        self.ask(core, token);
    }

    fn ask(&self, core: &Core, token: u64) {
        core.poller.ask(&self.socket, token, EventFlags::IN);
    }

    /// Reads what belongs to the greeting, and not a byte of what follows.
    fn hear(&mut self) -> Heard {
        let mut bytes = [0; MAX_GREETING_BYTES];
        loop {
            let look = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let seen = match recv(&self.socket, &mut bytes, look) {
                Ok((0, _)) => return Heard::Over,
                Ok((seen, _)) => bytes.get(..seen).unwrap_or_default(),
                Err(Errno::AGAIN) => return Heard::Nothing,
                Err(Errno::INTR) => continue,
                Err(_) => return Heard::Over,
            };
            let (taken, heard) = self.greeting.take(seen);
            let read =
                recv(&self.socket, bytes.get_mut(..taken).unwrap_or_default(), RecvFlags::DONTWAIT);
            // What was seen is there.
            if read.map(|(read, _)| read) != Ok(taken) {
                return Heard::Over;
            }
            match heard {
                Ok(Some(port)) => return Heard::Port(port),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, "a program of the host is sent away");
                    return Heard::Over;
                }
            }
        }
    }
}

impl Turn {
    /// Takes programs that have connected.
    pub(super) fn accept(&mut self, core: &Core) {
        for _ in 0..ACCEPTS_PER_TURN {
            if !self.has_room(core) {
                return;
            }
            let Some(listener) = &self.listener else { return };
            let socket = match listener.accept() {
                Ok(Some(socket)) => socket,
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(%error, "programs of the host cannot be accepted");
                    self.listener_rests = true;
                    return;
                }
            };
            let token = self.token();
            if core.poller.add(&socket, token, EventFlags::IN).is_ok() {
                let program = Program { socket, greeting: Greeting::new(), since: None };
                self.programs.insert(token, program);
            }
        }
        self.listen(core);
    }

    /// A program says something.
    pub(super) fn hear(&mut self, core: &Core, token: u64) {
        let Some(program) = self.programs.get_mut(&token) else { return };
        match program.hear() {
            Heard::Nothing => program.ask(core, token),
            Heard::Port(port) => {
                if let Some(program) = self.programs.remove(&token) {
                    self.offer_to_guest(core, token, port, program.socket);
                }
            }
            Heard::Over => {
                self.programs.remove(&token);
            }
        }
    }

    /// Offers a program's connection to the guest. One that cannot be offered is over for the program.
    fn offer_to_guest(&mut self, core: &Core, token: u64, port: u32, socket: OwnedFd) {
        let endpoint = service_of_port(self.host_port());
        let names = Names { service: service_of_port(port), endpoint, from_host: true };
        let (poller, inbox) = (core.poller.clone(), core.inbox.clone());
        let connection = Connection::new(token, names, socket, poller, inbox);
        match core.offer(&connection) {
            Ok(channel) => {
                let channel = Some(channel);
                self.connections.insert(token, Entry { connection, channel });
            }
            Err(error) => {
                tracing::debug!(port, %error, "a connection cannot be offered to the guest");
            }
        }
    }

    /// A port of the host's side that no connection has.
    fn host_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            // The last number means any port.
            self.next_port = match port.checked_add(1) {
                Some(next) if next < u32::MAX => next,
                _ => FIRST_HOST_PORT,
            };
            let endpoint = service_of_port(port);
            let is_free = |entry: &Entry| {
                !entry.connection.names.from_host || entry.connection.names.endpoint != endpoint
            };
            // There are fewer connections than ports.
            if self.connections.values().all(is_free) {
                return port;
            }
        }
    }

    pub(super) fn tick_programs(&mut self, now: Duration) {
        self.programs.retain(|_, program| {
            let since = *program.since.get_or_insert(now);
            now.saturating_sub(since) < GREETING_TIMEOUT
        });
    }
}
