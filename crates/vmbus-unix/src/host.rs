//! The host's end: a socket at a path, and one guest after another behind it.

mod port;
mod session;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use vmbus_host::{Config, HostBus};
use vmbus_wire::synic::connection;

use crate::error::{BindError, ConnectionError, FrameError, Reason};
use crate::event::{OwnEvent, PeerEvent};
use crate::frame::{Frame, FrameRef, Kind};
use crate::handshake::{self, Hello};
use crate::link::{Link, Received};
use crate::listener::Listener;
use crate::poller::{Interest, Poller};
use crate::timer::Timer;

use port::Port;
use session::Session;

/// Processes that may have connected and not yet introduced themselves.
pub const MAX_HANDSHAKES: usize = 8;

/// Events kept for [`UnixHost::take_events`] and
/// [`UnixGuest::take_events`](crate::UnixGuest::take_events). Older ones are dropped.
pub const MAX_EVENTS: usize = 64;

/// Frames of the guest handled by one [`UnixHost::drive`].
const FRAMES_PER_TURN: usize = 64;

/// How long nobody is accepted after the system had no descriptor left for it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the poller's tokens mean. Connections have the numbers from `FIRST_PEER` on, each its own.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const EVENT_PORT: u64 = 2;
const FIRST_PEER: u64 = 16;

/// What a host allows its guests.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// What the bus is willing to do.
    pub bus: Config,
    /// Most bytes of memory that a guest may donate. Pages that nobody has touched are made when a
    /// device first does, and count as this process's: this bounds what a guest can make it use.
    pub max_memory_bytes: u64,
    /// How long a process that has connected may take to introduce itself.
    pub handshake_timeout: Duration,
}

impl Default for HostOptions {
    /// The newest version, 16 GiB, one second.
    fn default() -> Self {
        Self {
            bus: Config::default(),
            max_memory_bytes: 16 << 30,
            handshake_timeout: Duration::from_secs(1),
        }
    }
}

/// The process at the other end of the socket, as the system tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Peer {
    /// Its process id when it connected.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

/// What has happened on a host's socket.
#[derive(Debug)]
#[non_exhaustive]
pub enum HostEvent {
    /// A guest is there.
    GuestConnected {
        /// Who.
        peer: Peer,
        /// Bytes of memory that it has donated.
        memory_bytes: u64,
    },
    /// The guest is gone, by its own will ([`ConnectionError::Closed`]) or ours. The next may come.
    GuestGone {
        /// Who.
        peer: Peer,
        /// Why.
        reason: ConnectionError,
    },
    /// Somebody connected and was turned away.
    Refused {
        /// Why.
        reason: ConnectionError,
    },
    /// A second guest was turned away while one is there.
    Busy,
    /// Nobody can be accepted for the moment.
    AcceptFailed {
        /// Why.
        error: io::Error,
    },
}

/// The host's end of a transport between processes: serves the guests that connect to a socket, one
/// at a time, with the channels offered on one [`HostBus`], which stay offered while guests come
/// and go.
///
/// It needs a loop: wait until its descriptor ([`AsFd`]) is readable, then call
/// [`UnixHost::drive`]. Both are safe to use from any thread; `drive` does bounded work and never
/// waits. Dropping the host removes the socket and ends its guest; the bus remains, without a
/// guest.
///
/// What a guest can do to this process beside using its devices is told in the [crate's
/// documentation](crate).
pub struct UnixHost {
    listener: Listener,
    bus: HostBus,
    port: Arc<Port>,
    options: HostOptions,
    driver: Mutex<Driver>,
    events: Mutex<VecDeque<HostEvent>>,
}

/// What only the thread that drives needs.
#[derive(Debug)]
struct Driver {
    timer: Timer,
    handshakes: Vec<Handshake>,
    next_token: u64,
    /// Until when nobody is accepted.
    accept_paused: Option<Instant>,
}

/// A process that has connected and not introduced itself.
#[derive(Debug)]
struct Handshake {
    link: Link,
    token: u64,
    deadline: Instant,
}

impl UnixHost {
    /// Serves at `path`, with default options.
    ///
    /// # Errors
    /// As for [`UnixHost::bind_with`].
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, BindError> {
        Self::bind_with(path, HostOptions::default())
    }

    /// Serves at `path`, a Unix socket that only this user may connect to. A socket there whose
    /// server is gone is replaced.
    ///
    /// # Errors
    /// [`BindError`]: a live server, something else than a socket, a path too long, no descriptors.
    pub fn bind_with(path: impl AsRef<Path>, options: HostOptions) -> Result<Self, BindError> {
        let path = path.as_ref();
        let failed = |call| {
            move |error: Errno| BindError::System {
                path: path.to_owned(),
                call,
                source: error.into(),
            }
        };
        let listener = Listener::bind(path)?;
        let poller = Poller::new().map_err(failed("epoll_create"))?;
        let timer = Timer::new().map_err(failed("timerfd_create"))?;
        let event_port = OwnEvent::new().map_err(failed("eventfd"))?;
        let watch = |fd: BorrowedFd<'_>, token| {
            poller.add(fd, token, Interest::READ).map_err(failed("epoll_ctl"))
        };
        watch(listener.as_fd(), LISTENER)?;
        watch(timer.as_fd(), TIMER)?;
        watch(event_port.as_fd(), EVENT_PORT)?;
        let port = Arc::new(Port::new(poller, event_port));
        let bus = HostBus::new(Arc::clone(&port) as Arc<_>, options.bus.clone());
        let driver =
            Driver { timer, handshakes: Vec::new(), next_token: FIRST_PEER, accept_paused: None };
        let (driver, events) = (Mutex::new(driver), Mutex::default());
        Ok(Self { listener, bus, port, options, driver, events })
    }

    /// The bus on which channels are offered to the guests that come. Devices outlive guests: when
    /// one goes, its channels are closed, and the next one opens them anew.
    #[must_use]
    pub fn bus(&self) -> &HostBus {
        &self.bus
    }

    /// Where it serves.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.listener.path()
    }

    /// The guest that is there.
    #[must_use]
    pub fn guest(&self) -> Option<Peer> {
        self.port.session().as_ref().map(|session| session.peer)
    }

    /// What has happened since the last call, oldest first; [`MAX_EVENTS`] at most.
    #[must_use]
    pub fn take_events(&self) -> Vec<HostEvent> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }

    /// Waits until there is something to do, or `limit` is over; returns whether there is.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn wait(&self, limit: Option<Duration>) -> io::Result<bool> {
        Ok(self.port.poller.wait(limit)?)
    }

    /// Does what there is to do, and returns whether there is more. A bounded amount of work,
    /// without waiting. While one thread is at it, other callers return at once.
    ///
    /// # Errors
    /// Whatever the system says about waiting itself. What goes wrong with a guest ends that guest,
    /// and is told by [`UnixHost::take_events`].
    pub fn drive(&self) -> io::Result<bool> {
        let mut driver = match self.driver.try_lock() {
            Ok(driver) => driver,
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        let mut more = false;
        for ready in self.port.poller.ready()? {
            match ready.token {
                LISTENER => self.accept(&mut driver),
                TIMER => self.expire(&mut driver),
                EVENT_PORT => {
                    self.port.event_port.acknowledge();
                    self.port.make_room();
                    // Only guests of old versions have channels behind it.
                    let _nobody = self.bus.guest_signal(connection::EVENT, 0);
                }
                token if self.port.session().as_ref().is_some_and(|s| s.token == token) => {
                    if ready.writable {
                        self.flush();
                    }
                    more |= ready.readable && self.read();
                }
                token => self.introduced(&mut driver, token),
            }
        }
        Ok(more)
    }

    /// [`UnixHost::drive`] for loops that take no errors: logs what has happened.
    pub fn ready(&self) -> bool {
        let more = self.drive().unwrap_or_else(|error| {
            tracing::error!(%error, "cannot wait for guests");
            false
        });
        for event in self.take_events() {
            match event {
                HostEvent::GuestConnected { peer, memory_bytes } => {
                    tracing::info!(peer.pid, memory_bytes, "guest connected");
                }
                HostEvent::GuestGone { peer, reason } => {
                    tracing::info!(peer.pid, %reason, "guest gone");
                }
                HostEvent::Refused { reason } => tracing::warn!(%reason, "guest refused"),
                HostEvent::Busy => tracing::info!("second guest refused"),
                HostEvent::AcceptFailed { error } => tracing::error!(%error, "cannot accept"),
            }
        }
        more
    }

    fn report(&self, event: HostEvent) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() >= MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// Takes the processes that have connected.
    fn accept(&self, driver: &mut Driver) {
        for _ in 0..MAX_HANDSHAKES {
            let socket = match self.listener.accept() {
                Ok(Some(socket)) => socket,
                Ok(None) => return,
                Err(error) => {
                    // It would be reported again at once, for as long as there is no descriptor.
                    self.watch_listener(false);
                    driver.accept_paused = Some(Instant::now() + ACCEPT_PAUSE);
                    driver.set_timer();
                    return self.report(HostEvent::AcceptFailed { error: error.into() });
                }
            };
            let mut link = Link::new(socket);
            // Whoever comes after the last guest has ended is not turned away because of it, even
            // where we have not looked yet.
            if self.port.session().as_ref().is_some_and(|session| session.link.is_hung_up()) {
                self.end(ConnectionError::Closed);
            }
            if self.guest().is_some() || driver.handshakes.len() >= MAX_HANDSHAKES {
                self.turn_away(&mut link);
                continue;
            }
            let token = driver.next_token;
            driver.next_token += 1; // 64 bits: not in a lifetime
            if let Err(error) = self.port.poller.add(&link, token, Interest::READ) {
                let reason = ConnectionError::system("epoll_ctl")(error);
                self.report(HostEvent::Refused { reason });
                continue;
            }
            let deadline = Instant::now() + self.options.handshake_timeout;
            driver.handshakes.push(Handshake { link, token, deadline });
            driver.set_timer();
        }
    }

    fn watch_listener(&self, read: bool) {
        let interest = Interest { read, write: false };
        if let Err(error) = self.port.poller.modify(&self.listener, LISTENER, interest) {
            tracing::error!(%error, "cannot watch the socket");
        }
    }

    /// Tells a process that there is a guest already.
    fn turn_away(&self, link: &mut Link) {
        let busy = handshake::refusal(Reason::Busy, "another guest is connected");
        let _gone = link.try_send(&busy);
        self.report(HostEvent::Busy);
    }

    /// Turns away those that have taken too long.
    fn expire(&self, driver: &mut Driver) {
        driver.timer.acknowledge();
        let now = Instant::now();
        if driver.accept_paused.take_if(|until| *until <= now).is_some() {
            self.watch_listener(true);
        }
        let milliseconds = self.options.handshake_timeout.as_millis();
        let late = driver.handshakes.extract_if(.., |waiting| waiting.deadline <= now);
        for handshake in late.collect::<Vec<_>>() {
            self.refuse(handshake.link, ConnectionError::HandshakeTimeout { milliseconds });
        }
        driver.set_timer();
    }

    /// Turns a process away, and says why.
    fn refuse(&self, mut link: Link, reason: ConnectionError) {
        self.port.poller.remove(&link);
        say_why(&mut link, &reason);
        self.report(HostEvent::Refused { reason });
    }

    /// A process that has not introduced itself has something to say.
    fn introduced(&self, driver: &mut Driver, token: u64) {
        let Some(index) = driver.handshakes.iter().position(|waiting| waiting.token == token)
        else {
            return; // ended by something else that was ready
        };
        let hello = match driver.handshakes.get(index).map(|waiting| waiting.link.receive()) {
            None | Some(Ok(None)) => return,
            Some(Ok(Some(received))) => Hello::accept(received, self.options.max_memory_bytes),
            Some(Err(error)) => Err(error),
        };
        let Handshake { link, .. } = driver.handshakes.swap_remove(index);
        match hello {
            Ok(hello) => self.begin(driver, token, link, hello),
            Err(reason) => self.refuse(link, reason),
        }
        driver.set_timer();
    }

    /// The guest is there.
    fn begin(&self, driver: &mut Driver, token: u64, mut link: Link, hello: Hello) {
        let peer = match socket_peercred(&link) {
            Ok(credentials) => {
                Peer { pid: credentials.pid.as_raw_nonzero().get(), uid: credentials.uid.as_raw() }
            }
            Err(error) => {
                return self.refuse(link, ConnectionError::system("SO_PEERCRED")(error));
            }
        };
        if let Err(reason) = link.send(handshake::welcome(), &[self.port.event_port.as_fd()]) {
            return self.refuse(link, reason);
        }
        let memory_bytes = hello.memory.total_bytes();
        *self.port.session() = Some(Session::new(link, token, hello, peer));
        self.bus.guest_reset();
        self.report(HostEvent::GuestConnected { peer, memory_bytes });
        for Handshake { mut link, .. } in driver.handshakes.drain(..) {
            self.port.poller.remove(&link);
            self.turn_away(&mut link);
        }
    }

    /// The guest is gone, or has to go.
    fn end(&self, reason: ConnectionError) {
        let Some(mut session) = self.port.session().take() else { return };
        self.port.poller.remove(&session.link);
        let reason = session.failed.take().unwrap_or(reason);
        say_why(&mut session.link, &reason);
        session.relieve();
        let peer = session.peer;
        drop(session);
        self.bus.guest_reset();
        self.report(HostEvent::GuestGone { peer, reason });
    }

    /// The socket has room again.
    fn flush(&self) {
        let flushed = match &mut *self.port.session() {
            Some(session) => session.flush(&self.port.poller),
            None => return,
        };
        match flushed {
            Ok(true) => self.bus.messages_drained(),
            Ok(false) => {}
            Err(reason) => self.end(reason),
        }
    }

    /// Handles frames of the guest. Returns whether there may be more.
    fn read(&self) -> bool {
        for _ in 0..FRAMES_PER_TURN {
            let received = match &*self.port.session() {
                // A guest that does not take its answers gets no more of them.
                Some(session) if session.link.is_waiting() => return false,
                Some(session) => session.link.receive(),
                None => return false,
            };
            let handled = match received {
                Ok(None) => return false,
                Ok(Some(received)) => self.handle(received),
                Err(error) => Err(error),
            };
            if let Err(reason) = handled {
                self.end(reason);
                return false;
            }
        }
        true
    }

    fn handle(&self, received: Received) -> Result<(), ConnectionError> {
        let Received { bytes, descriptors } = received;
        let frame = FrameRef::parse(&bytes)?;
        if frame.kind != Kind::Post {
            return Err(FrameError::Unexpected { kind: frame.kind, state: "connected" }.into());
        }
        let message = frame.message()?;
        if !descriptors.is_empty() {
            let flag = session::event_flag(frame.b)?;
            let doorbell = handshake::one_descriptor(Kind::Post, descriptors)?;
            let doorbell = PeerEvent::from_peer(doorbell, "a channel's doorbell")?;
            let channels = self.bus.usage().channels;
            if let Some(session) = &mut *self.port.session() {
                session.keep_doorbell(flag, doorbell, channels);
            }
        }
        let status = match self.bus.post_message(frame.a, message) {
            Ok(()) => 0,
            Err(error) => error.hypercall_status(),
        };
        let answer = Frame::new(Kind::Posted, u32::from(status), 0, &[]);
        match &mut *self.port.session() {
            Some(session) => session.send(&self.port.poller, answer, &[]),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for UnixHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (path, guest) = (self.path(), self.guest());
        f.debug_struct("UnixHost")
            .field("path", &path)
            .field("guest", &guest)
            .finish_non_exhaustive()
    }
}

impl AsFd for UnixHost {
    /// Readable when there is something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.poller.as_fd()
    }
}

impl Drop for UnixHost {
    fn drop(&mut self) {
        self.end(ConnectionError::Closed);
    }
}

impl Driver {
    /// Has the timer go off when the next of those that wait is late.
    fn set_timer(&self) {
        let deadlines = self.handshakes.iter().map(|waiting| waiting.deadline);
        let next = deadlines.chain(self.accept_paused).min();
        let delay = next.map(|next| next.saturating_duration_since(Instant::now()));
        if let Err(error) = self.timer.set(delay) {
            tracing::error!(%error, "cannot set a timer");
        }
    }
}

/// The last words to a process that is turned away, if it listens.
fn say_why(link: &mut Link, reason: &ConnectionError) {
    if let Some(code) = reason.reason() {
        let _gone = link.try_send(&handshake::refusal(code, &reason.to_string()));
    }
}

/// Locks what a thread cannot leave half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
