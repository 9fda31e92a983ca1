//! Processes that connect, until they are taken as the guest or turned away.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;
use rustix::rand::{GetRandomFlags, getrandom};
use vmbus_wire::guid::Guid;

use super::session::{Hearing, Resumable, Session};
use super::{
    Driver, EVENT_PORT, FIRST_PEER, HostEvent, LISTENER, MAX_HANDSHAKES, Peer, Stage, TIMER,
    UnixHost,
};
use crate::epoch::Epoch;
use crate::error::{ConnectionError, Reason};
use crate::frame::Frame;
use crate::handshake::{self, First, Hello, Returning};
use crate::link::{Link, Received};
use crate::poller::Interest;
use crate::resume::SavedGuest;
use crate::timer::Timer;

/// How long nobody is accepted after the system had no descriptor left for it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The processes that are not the guest.
pub(super) struct Door {
    pub(super) timer: Timer,
    handshakes: Vec<Handshake>,
    next_token: u64,
    /// Until when nobody is accepted.
    paused: Option<Instant>,
}

/// A process that has connected and not introduced itself.
struct Handshake {
    link: Link,
    token: u64,
    deadline: Instant,
    /// A guest that comes back, and has not said everything.
    returning: Option<Returning>,
}

/// What becomes of a process after it has said something.
enum Introduction {
    /// It has more to say.
    Unfinished(Returning),
    New(Hello),
    Back(Returning),
}

impl Door {
    pub(super) fn new(timer: Timer) -> Self {
        Self { timer, handshakes: Vec::new(), next_token: FIRST_PEER, paused: None }
    }

    /// Has the timer go off when the next of those that wait is late.
    fn set_timer(&self) {
        let deadlines = self.handshakes.iter().map(|waiting| waiting.deadline);
        let next = deadlines.chain(self.paused).min();
        let delay = next.map(|next| next.saturating_duration_since(Instant::now()));
        if let Err(error) = self.timer.set(delay) {
            tracing::error!(%error, "cannot set a timer");
        }
    }
}

impl UnixHost {
    /// Takes the processes that have connected.
    pub(super) fn accept(&self, driver: &mut Driver) {
        for _ in 0..MAX_HANDSHAKES {
            let Some(listener) = &driver.listener else { return };
            let socket = match listener.accept() {
                Ok(Some(socket)) => socket,
                Ok(None) => return,
                Err(error) => {
                    // It would be reported again at once, for as long as there is no descriptor.
                    self.watch_listener(driver, false);
                    driver.door.paused = Some(Instant::now() + ACCEPT_PAUSE);
                    driver.door.set_timer();
                    return self.report(HostEvent::AcceptFailed { error: error.into() });
                }
            };
            let mut link = Link::new(socket);
            // Whoever comes after the last guest has ended is not turned away because of it, even
            // where we have not looked yet.
            if self.port.session().as_ref().is_some_and(|session| session.link.is_hung_up()) {
                self.lost(driver, ConnectionError::Closed);
            }
            if self.guest().is_some() || driver.door.handshakes.len() >= MAX_HANDSHAKES {
                self.turn_away(&mut link, "another guest is connected");
                continue;
            }
            let token = driver.door.next_token;
            driver.door.next_token += 1; // 64 bits: not in a lifetime
            if let Err(error) = self.port.poller.add(&link, token, Interest::READ) {
                let reason = ConnectionError::system("epoll_ctl")(error);
                self.report(HostEvent::Refused { reason });
                continue;
            }
            let deadline = Instant::now() + self.options.handshake_timeout;
            driver.door.handshakes.push(Handshake { link, token, deadline, returning: None });
            driver.door.set_timer();
        }
    }

    fn watch_listener(&self, driver: &Driver, read: bool) {
        let Some(listener) = &driver.listener else { return };
        let interest = Interest { read, write: false };
        if let Err(error) = self.port.poller.modify(listener, LISTENER, interest) {
            tracing::error!(%error, "cannot watch the socket");
        }
    }

    /// From now on nobody is listened to, or everybody again: nothing that the poller knows of but
    /// the guest itself, and the signals of its old versions.
    pub(super) fn set_door_held(&self, driver: &Driver, held: bool) {
        let open = driver.door.paused.is_none();
        let fds = driver.listener.iter().map(|listener| (listener.as_fd(), LISTENER, open));
        let fds = fds.chain([(driver.door.timer.as_fd(), TIMER, true)]);
        let waiting = driver.door.handshakes.iter();
        let fds = fds.chain(waiting.map(|waiting| (waiting.link.as_fd(), waiting.token, true)));
        for (fd, token, read) in fds {
            self.set_watched(fd, token, (!held).then_some(Interest { read, write: false }));
        }
    }

    pub(super) fn watch_event_port(&self, read: bool) {
        let interest = read.then_some(Interest::READ);
        self.set_watched(self.port.event_port.as_fd(), EVENT_PORT, interest);
    }

    fn set_watched(&self, fd: BorrowedFd<'_>, token: u64, interest: Option<Interest>) {
        match interest {
            None => self.port.poller.remove(fd),
            Some(interest) => {
                if let Err(error) = self.port.poller.add(fd, token, interest) {
                    tracing::error!(%error, token, "cannot watch a descriptor");
                }
            }
        }
    }

    /// Tells a process that it is not its turn.
    fn turn_away(&self, link: &mut Link, why: &str) {
        let _gone = link.try_send(&handshake::refusal(Reason::Busy, why));
        self.report(HostEvent::Busy);
    }

    /// Turns away those that have taken too long.
    pub(super) fn expire(&self, driver: &mut Driver) {
        driver.door.timer.acknowledge();
        let now = Instant::now();
        if driver.door.paused.take_if(|until| *until <= now).is_some() {
            self.watch_listener(driver, true);
        }
        let milliseconds = self.options.handshake_timeout.as_millis();
        let late = driver.door.handshakes.extract_if(.., |waiting| waiting.deadline <= now);
        for handshake in late.collect::<Vec<_>>() {
            self.refuse(handshake.link, ConnectionError::HandshakeTimeout { milliseconds });
        }
        driver.door.set_timer();
    }

    /// Turns a process away, and says why.
    fn refuse(&self, mut link: Link, reason: ConnectionError) {
        self.port.poller.remove(&link);
        say_why(&mut link, &reason);
        self.report(HostEvent::Refused { reason });
    }

    /// A process that has not introduced itself has something to say.
    pub(super) fn introduced(&self, driver: &mut Driver, token: u64) {
        let handshakes = &mut driver.door.handshakes;
        let Some(index) = handshakes.iter().position(|waiting| waiting.token == token) else {
            return; // ended by something else that was ready
        };
        let Some(waiting) = handshakes.get_mut(index) else { return };
        let said = match waiting.link.receive() {
            Ok(None) => return,
            Ok(Some(received)) => {
                let saved = match &driver.stage {
                    Stage::Restoring { saved } => saved.as_deref(),
                    Stage::Serving | Stage::Held | Stage::Gone => None,
                };
                self.judge(received, waiting.returning.take(), saved)
            }
            Err(error) => Err(error),
        };
        if let Ok(Introduction::Unfinished(returning)) = said {
            waiting.returning = Some(returning);
            return;
        }
        let Handshake { mut link, .. } = handshakes.swap_remove(index);
        match said {
            Ok(Introduction::Unfinished(_)) => {} // told above
            Ok(Introduction::New(hello)) => match driver.stage {
                Stage::Serving => self.begin(driver, token, link, hello),
                Stage::Restoring { .. } | Stage::Held | Stage::Gone => {
                    self.port.poller.remove(&link);
                    self.turn_away(&mut link, "the host waits for the guest of its saved state");
                }
            },
            Ok(Introduction::Back(returning)) => self.take_back(driver, token, link, returning),
            Err(reason) => self.refuse(link, reason),
        }
        driver.door.set_timer();
    }

    fn judge(
        &self,
        received: Received,
        returning: Option<Returning>,
        saved: Option<&SavedGuest>,
    ) -> Result<Introduction, ConnectionError> {
        let returning = match returning {
            Some(mut returning) => {
                returning.add(received)?;
                returning
            }
            None => match First::accept(received, self.options.max_memory_bytes, saved)? {
                First::Hello(hello) => return Ok(Introduction::New(hello)),
                First::Resume(returning) => returning,
            },
        };
        if !returning.is_complete() {
            return Ok(Introduction::Unfinished(returning));
        }
        if let Some(saved) = saved {
            saved.has_doorbells(|flag| returning.doorbells.contains_key(&flag))?;
        }
        Ok(Introduction::Back(returning))
    }

    /// The guest is there.
    fn begin(&self, driver: &mut Driver, token: u64, mut link: Link, hello: Hello) {
        let peer = match peer(&link) {
            Ok(peer) => peer,
            Err(reason) => return self.refuse(link, reason),
        };
        let resumable = if hello.resumable { resumable() } else { None };
        let terms = resumable.as_ref().map(|terms| (terms.connection_id, &terms.epoch));
        let (welcome, descriptors) = handshake::welcome(self.port.event_port.as_fd(), terms);
        if let Err(reason) = link.send(welcome, &descriptors) {
            return self.refuse(link, reason);
        }
        let memory_bytes = hello.memory.total_bytes();
        *self.port.session() = Some(Session::new(link, token, hello, peer, resumable));
        self.bus.guest_reset();
        self.report(HostEvent::GuestConnected { peer, memory_bytes });
        self.turn_others_away(driver);
    }

    /// The guest is back.
    fn take_back(&self, driver: &mut Driver, token: u64, link: Link, returning: Returning) {
        let memory_bytes = returning.memory.total_bytes();
        let answer_again = returning.answer_again;
        let begun = match &driver.stage {
            Stage::Restoring { saved: Some(saved) } => {
                self.resumed(token, link, returning, saved, answer_again)
            }
            Stage::Restoring { saved: None } | Stage::Serving | Stage::Held | Stage::Gone => return,
        };
        match begun {
            Ok(session) => {
                let peer = session.peer;
                *self.port.session() = Some(session);
                self.report(HostEvent::GuestBack { peer, memory_bytes });
                self.turn_others_away(driver);
            }
            Err((link, reason)) => self.refuse(link, reason),
        }
    }

    /// Tells the guest that it is taken. It is not heard before the bus goes on.
    fn resumed(
        &self,
        token: u64,
        mut link: Link,
        returning: Returning,
        saved: &SavedGuest,
        answer_again: bool,
    ) -> Result<Session, (Link, ConnectionError)> {
        let (peer, epoch) = match (peer(&link), Epoch::new(saved.epoch)) {
            (Ok(peer), Ok(epoch)) => (peer, epoch),
            (Err(reason), _) => return Err((link, reason)),
            (_, Err(error)) => {
                return Err((link, ConnectionError::system("memfd_create")(error)));
            }
        };
        let event_port = self.port.event_port.as_fd();
        let (frame, descriptors) = handshake::resumed(event_port, &epoch, saved.progress.posts);
        if let Err(reason) = link.send(frame, &descriptors) {
            return Err((link, reason));
        }
        let poller = &self.port.poller;
        let mut session = Session::resumed(link, token, returning, peer, saved, epoch);
        session.set_hearing(poller, Hearing::Deaf);
        if answer_again && let Err(reason) = session.answer_last_post(poller) {
            return Err((session.link, reason));
        }
        Ok(session)
    }

    fn turn_others_away(&self, driver: &mut Driver) {
        for Handshake { mut link, .. } in driver.door.handshakes.drain(..) {
            self.port.poller.remove(&link);
            self.turn_away(&mut link, "another guest is connected");
        }
    }
}

/// The process at the other end.
fn peer(link: &Link) -> Result<Peer, ConnectionError> {
    let credentials = socket_peercred(link).map_err(ConnectionError::system("SO_PEERCRED"))?;
    let (pid, uid) = (credentials.pid.as_raw_nonzero().get(), credentials.uid.as_raw());
    Ok(Peer { pid, uid })
}

/// A name and an epoch for a new connection. Without them it ends with us.
fn resumable() -> Option<Resumable> {
    let mut name = [0; 16];
    let random = getrandom(&mut name, GetRandomFlags::NONBLOCK);
    let made = random.and_then(|_| Epoch::new(FIRST_EPOCH));
    match made {
        Ok(epoch) => Some(Resumable { connection_id: Guid::from_bytes(name), epoch }),
        Err(error) => {
            tracing::warn!(%error, "the guest's connection cannot be saved");
            None
        }
    }
}

/// Where a connection begins: not at 0, which a file that was never written has.
const FIRST_EPOCH: u64 = 1;

/// The last words to a process that is turned away, if it listens.
pub(super) fn say_why(link: &mut Link, reason: &ConnectionError) {
    if let Some(code) = reason.reason() {
        say(link, code, &reason.to_string());
    }
}

/// The same, in other words.
pub(super) fn say(link: &mut Link, code: Reason, text: &str) {
    let refusal: Frame = handshake::refusal(code, text);
    let _gone = link.try_send(&refusal);
}
