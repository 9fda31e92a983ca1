//! The host's end: a socket at a path, and one guest after another behind it.

mod accept;
mod hold;
mod port;
mod restore;
mod saved;
mod session;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use rustix::io::Errno;
use vmbus_host::{Config, GuestPort, HostBus};
use vmbus_wire::synic::connection;

use crate::error::{BindError, ConnectionError, FrameError, Reason};
use crate::event::{OwnEvent, PeerEvent};
use crate::frame::{FrameRef, Kind};
use crate::handshake;
use crate::link::Received;
use crate::listener::Listener;
use crate::poller::{Interest, Poller};
use crate::resume::SavedGuest;
use crate::timer::Timer;

use accept::Door;
pub use hold::{HeldHost, HoldError};
use port::Port;
pub use restore::{FinishError, NotFinished, RestoreError, RestoringHost};
pub use saved::{TransportReadError, TransportSave, TransportSaveError, check_saved_transport};
use session::Hearing;

/// Processes that may have connected and not yet introduced themselves.
pub const MAX_HANDSHAKES: usize = 8;

/// Events kept for [`UnixHost::take_events`] and
/// [`UnixGuest::take_events`](crate::UnixGuest::take_events). Older ones are dropped.
pub const MAX_EVENTS: usize = 64;

/// Frames of the guest handled by one [`UnixHost::drive`].
const FRAMES_PER_TURN: usize = 64;

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
    /// The guest of the saved state is there again.
    GuestBack {
        /// Who.
        peer: Peer,
        /// Bytes of its memory.
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
    path: PathBuf,
    bus: HostBus,
    port: Arc<Port>,
    options: HostOptions,
    driver: Mutex<Driver>,
    events: Mutex<VecDeque<HostEvent>>,
}

/// What only the thread that drives needs.
struct Driver {
    /// `None` once another process may serve.
    listener: Option<Listener>,
    door: Door,
    stage: Stage,
}

/// What the host is doing, see [`crate::resume`].
enum Stage {
    Serving,
    /// Nothing is taken from the guest, and nothing given to it.
    Held,
    /// The bus does not go on before the guest is back; `None` if there was none.
    Restoring {
        saved: Option<Box<SavedGuest>>,
    },
    /// Another process serves, or will.
    Gone,
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
        let config = options.bus.clone();
        let new_bus = |port| Ok::<_, BindError>(HostBus::new(port, config));
        Self::start(path.as_ref(), options, Stage::Serving, new_bus)
    }

    fn start<E: From<BindError>>(
        path: &Path,
        options: HostOptions,
        stage: Stage,
        new_bus: impl FnOnce(Arc<dyn GuestPort>) -> Result<HostBus, E>,
    ) -> Result<Self, E> {
        let failed = |call| {
            move |error: Errno| BindError::System {
                path: path.to_owned(),
                call,
                source: error.into(),
            }
        };
        let poller = Poller::new().map_err(failed("epoll_create"))?;
        let timer = Timer::new().map_err(failed("timerfd_create"))?;
        let event_port = OwnEvent::new().map_err(failed("eventfd"))?;
        let port = Arc::new(Port::new(poller, event_port));
        // Before the socket is there: whoever connects to it is served.
        let bus = new_bus(Arc::clone(&port) as Arc<_>)?;
        let listener = Listener::bind(path)?;
        let watch = |fd: BorrowedFd<'_>, token| {
            port.poller.add(fd, token, Interest::READ).map_err(failed("epoll_ctl"))
        };
        watch(listener.as_fd(), LISTENER)?;
        watch(timer.as_fd(), TIMER)?;
        // Signals of a guest that is not heard yet are kept for when it is.
        if !matches!(stage, Stage::Restoring { .. }) {
            watch(port.event_port.as_fd(), EVENT_PORT)?;
        }
        let driver = Driver { listener: Some(listener), door: Door::new(timer), stage };
        let (path, driver, events) = (path.to_owned(), Mutex::new(driver), Mutex::default());
        Ok(Self { path, bus, port, options, driver, events })
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
        &self.path
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
        if matches!(driver.stage, Stage::Held | Stage::Gone) {
            return Ok(false);
        }
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
                        self.flush(&driver);
                    }
                    more |= ready.readable && self.read(&driver);
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
                HostEvent::GuestBack { peer, memory_bytes } => {
                    tracing::info!(peer.pid, memory_bytes, "guest back");
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

    /// The guest is gone, or has to go.
    fn lost(&self, driver: &Driver, reason: ConnectionError) {
        match driver.stage {
            // Nothing has come of it yet: it may come back once more.
            Stage::Restoring { .. } => self.forget(reason),
            Stage::Serving | Stage::Held | Stage::Gone => self.end(reason),
        }
    }

    /// The guest's connection is over.
    fn end(&self, reason: ConnectionError) {
        let Some(mut session) = self.port.session().take() else { return };
        self.port.poller.remove(&session.link);
        let reason = session.failed.take().unwrap_or(reason);
        accept::say_why(&mut session.link, &reason);
        session.relieve();
        let peer = session.peer;
        drop(session);
        self.bus.guest_reset();
        self.report(HostEvent::GuestGone { peer, reason });
    }

    /// Lets go of the guest without a word to it, and without one to the bus.
    fn forget(&self, reason: ConnectionError) {
        let Some(mut session) = self.port.session().take() else { return };
        self.port.poller.remove(&session.link);
        let reason = session.failed.take().unwrap_or(reason);
        session.relieve();
        session.ring_all(); // what relieved a thread was perhaps a signal
        let peer = session.peer;
        drop(session);
        self.report(HostEvent::GuestGone { peer, reason });
    }

    /// The socket has room again.
    fn flush(&self, driver: &Driver) {
        let flushed = match &mut *self.port.session() {
            Some(session) => session.flush(&self.port.poller),
            None => return,
        };
        match flushed {
            Ok(true) => self.bus.messages_drained(),
            Ok(false) => {}
            Err(reason) => self.lost(driver, reason),
        }
    }

    /// Handles frames of the guest. Returns whether there may be more.
    fn read(&self, driver: &Driver) -> bool {
        for _ in 0..FRAMES_PER_TURN {
            let received = match &*self.port.session() {
                // A guest that does not take its answers gets no more of them.
                Some(session) if session.link.is_waiting() => return false,
                // One that is not heard yet is watched for its end alone.
                Some(session) if matches!(driver.stage, Stage::Restoring { .. }) => {
                    match session.link.is_hung_up() {
                        true => Err(ConnectionError::Closed),
                        false => return false,
                    }
                }
                Some(session) => session.link.receive(),
                None => return false,
            };
            let handled = match received {
                Ok(None) => return false,
                Ok(Some(received)) => self.handle(received),
                Err(error) => Err(error),
            };
            if let Err(reason) = handled {
                self.lost(driver, reason);
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
            let flag = handshake::event_flag(frame.b)?;
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
        match &mut *self.port.session() {
            Some(session) => session.answer_post(&self.port.poller, status),
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
        let mut driver = lock(&self.driver);
        match driver.stage {
            Stage::Serving | Stage::Held => {
                // No other process will go on with it: it need not wait for one.
                if let Some(session) = &mut *self.port.session()
                    && session.resumable.is_some()
                {
                    session.set_hearing(&self.port.poller, Hearing::Normal);
                    accept::say(&mut session.link, Reason::Ended, "the host has ended");
                }
                self.end(ConnectionError::Closed);
            }
            Stage::Restoring { .. } | Stage::Gone => {
                driver.listener = None; // before the guest looks for another host
                self.forget(ConnectionError::Closed);
            }
        }
    }
}

/// Locks what a thread cannot leave half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
