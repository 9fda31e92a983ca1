//! The guest's end: a connection to a host's socket, and the bus over it.

mod connect;
mod port;
mod resume;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use vmbus_guest::{ConnectionEvent, ConnectionState, GuestBus, GuestConfig, PostStatus};
use vmbus_wire::guid::Guid;

use crate::error::{ConnectError, ConnectionError, FrameError};
use crate::event::{OwnEvent, PeerEvent};
use crate::frame::{FrameRef, Kind};
use crate::handshake;
use crate::link::Received;

use port::Port;
use resume::Back;

/// Frames of the host handled by one [`UnixGuest::drive`].
const FRAMES_PER_TURN: usize = 64;

/// What the poller's tokens mean.
const SOCKET: u64 = 0;
const TIMER: u64 = 1;
const WAKE: u64 = 2;
const ATTENTION: u64 = 3;
const BACK: u64 = 4;

/// What a guest brings along.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// Bytes of memory that it donates, whole pages: all its rings and buffers. The first page
    /// stays unused, as address 0 has a meaning of its own in messages.
    pub memory_bytes: u64,
    /// What it asks for. Versions below 2.4 may be listed; the interrupt page is made.
    pub config: GuestConfig,
    /// How long the host may take to answer the greeting.
    pub timeout: Duration,
    /// For how long a guest whose host's process has gone away looks for another one that goes on
    /// with the connection, at the same path; `None`: not at all. Its channels notice nothing, if one
    /// does. What such a host was made from is the saved state of the one that is gone
    /// ([`UnixHost::hold`](crate::UnixHost::hold)).
    pub reconnect: Option<Duration>,
}

impl GuestOptions {
    /// Every version from 6.0 down to 2.4, a random client id, five seconds; the connection ends with
    /// the host's process.
    #[must_use]
    pub fn new(memory_bytes: u64) -> Self {
        let config = GuestConfig::new(random_id());
        Self { memory_bytes, config, timeout: Duration::from_secs(5), reconnect: None }
    }
}

/// What has happened to a guest's connection.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum GuestEvent {
    /// The bus has told of something.
    Bus(ConnectionEvent),
    /// The host's process has gone away. Channels stay as they are; the guest looks for another one.
    LinkLost,
    /// Another host has taken the connection over. It goes on as soon as its devices are there; should
    /// that fail, the link is lost once more.
    Resumed {
        /// How long there was none.
        after: Duration,
    },
    /// The connection is over, and every channel rescinded.
    Over(Arc<ConnectionError>),
}

/// The guest's end of a transport between processes: donates memory to the host that serves at a
/// path, and gives a [`GuestBus`] for client endpoints.
///
/// It needs a loop, and not on a thread that waits for the bus (as `kmcl` does for GPADLs): wait
/// until its descriptor ([`AsFd`]) is readable, then call [`UnixGuest::drive`]. Dropping it ends
/// the connection, and every channel is rescinded; so it does when the host goes, unless another
/// process takes its place ([`GuestOptions::reconnect`]).
#[derive(Debug)]
pub struct UnixGuest {
    bus: GuestBus,
    port: Arc<Port>,
    /// Rung by the host for the shared interrupt page of old versions.
    attention: OwnEvent,
    back: Back,
    driving: Mutex<()>,
}

impl UnixGuest {
    /// Connects to the host that serves at `path`, donating `memory_bytes` of memory. The bus is
    /// making contact when this returns; offers come as the guest is driven.
    ///
    /// # Errors
    /// [`ConnectError`]: nobody there, refused, no answer in time.
    pub fn connect(path: impl AsRef<Path>, memory_bytes: u64) -> Result<Self, ConnectError> {
        Self::connect_with(path, GuestOptions::new(memory_bytes))
    }

    /// The bus: where client endpoints are bound.
    #[must_use]
    pub fn bus(&self) -> &GuestBus {
        &self.bus
    }

    /// What has happened to the connection since the last call, oldest first;
    /// [`MAX_EVENTS`](crate::MAX_EVENTS) at most.
    #[must_use]
    pub fn take_events(&self) -> Vec<GuestEvent> {
        self.port.state().events.drain(..).collect()
    }

    /// Why the connection is over, if it is.
    #[must_use]
    pub fn lost(&self) -> Option<Arc<ConnectionError>> {
        self.port.state().lost.clone()
    }

    /// Whether there is a host, as far as is known. While there is none, and
    /// [`UnixGuest::lost`] is `None`, the guest looks for one.
    #[must_use]
    pub fn is_linked(&self) -> bool {
        self.port.is_linked()
    }

    /// Whether the connection can go on with another process of the host: it was asked for
    /// ([`GuestOptions::reconnect`]), and the host lets it.
    #[must_use]
    pub fn is_resumable(&self) -> bool {
        !self.port.state().ends_with_link()
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
    /// Whatever the system says about waiting itself. The end of the connection is told by
    /// [`UnixGuest::lost`], and to each channel.
    pub fn drive(&self) -> io::Result<bool> {
        let _driving = match self.driving.try_lock() {
            Ok(driving) => driving,
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        let mut more = false;
        for ready in self.port.poller.ready()? {
            match ready.token {
                SOCKET => {
                    if ready.writable {
                        self.port.flush();
                    }
                    more |= ready.readable && self.read();
                }
                BACK => {
                    self.back.timer.acknowledge();
                    self.look_for_host();
                }
                TIMER => {
                    self.port.timer.acknowledge();
                    self.bus.retry_post();
                }
                ATTENTION => {
                    self.attention.acknowledge();
                    self.bus.legacy_interrupt();
                }
                _wake => self.port.wake.acknowledge(),
            }
        }
        if self.port.close_if_lost() {
            self.bus.host_gone();
        }
        Ok(more)
    }

    /// [`UnixGuest::drive`] for loops that take no errors.
    pub fn ready(&self) -> bool {
        self.drive().unwrap_or_else(|error| {
            tracing::error!(%error, "cannot wait for the host");
            false
        })
    }

    /// Drives until `done` says so, the connection is over, or `limit` has passed. Returns whether
    /// `done` said so. For programs that have nothing else to do meanwhile.
    ///
    /// # Errors
    /// As for [`UnixGuest::drive`].
    pub fn drive_until(
        &self,
        limit: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        let mut more = false;
        loop {
            if done(self) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if self.lost().is_some() || left.is_zero() {
                return Ok(false);
            }
            if more || self.wait(Some(left))? {
                more = self.drive()?;
            }
        }
    }

    /// Drives until the host has made all its offers. Returns whether it has.
    ///
    /// # Errors
    /// As for [`UnixGuest::drive`].
    pub fn drive_until_offered(&self, limit: Duration) -> io::Result<bool> {
        self.drive_until(limit, |guest| {
            matches!(guest.bus().state(), ConnectionState::Connected { offers_delivered: true, .. })
        })
    }

    /// Handles frames of the host. Returns whether there may be more.
    fn read(&self) -> bool {
        for _ in 0..FRAMES_PER_TURN {
            let handled = match self.port.receive() {
                Ok(None) => return false,
                Ok(Some(received)) => self.handle(received),
                Err(error) => Err(error),
            };
            if let Err(reason) = handled {
                self.link_ended(reason);
                return false;
            }
        }
        true
    }

    fn handle(&self, received: Received) -> Result<(), ConnectionError> {
        if self.port.is_asking() {
            return self.resume(received);
        }
        let Received { bytes, descriptors } = received;
        let frame = FrameRef::parse(&bytes)?;
        match frame.kind {
            Kind::Message => {
                handshake::no_descriptor(frame.kind, &descriptors)?;
                let message = frame.message()?;
                self.port.count_message();
                // A message that makes no sense is the bus's to refuse, and to log.
                let _refused = self.bus.host_message(message);
                Ok(())
            }
            Kind::Posted => {
                handshake::no_descriptor(frame.kind, &descriptors)?;
                let status = frame.a;
                let status = u16::try_from(status).map_err(|_| FrameError::Status { status })?;
                self.port.count_answer()?;
                let answered = self.bus.message_posted(PostStatus(status));
                Ok(answered.map_err(|_| FrameError::NothingPosted)?)
            }
            Kind::Listening => {
                let event = handshake::one_descriptor(frame.kind, descriptors)?;
                let event = PeerEvent::from_peer(event, "a channel's signal")?;
                self.port.listening(frame.a, event);
                Ok(())
            }
            Kind::Refused => Err(handshake::refused(&frame)?),
            kind @ (Kind::Hello
            | Kind::Welcome
            | Kind::Post
            | Kind::Resume
            | Kind::Doorbells
            | Kind::Resumed) => Err(FrameError::Unexpected { kind, state: "connected" }.into()),
        }
    }
}

impl AsFd for UnixGuest {
    /// Readable when there is something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.poller.as_fd()
    }
}

impl Drop for UnixGuest {
    fn drop(&mut self) {
        self.port.state().fail(ConnectionError::Closed);
        self.port.close_if_lost();
        self.bus.host_gone();
    }
}

/// A random (version 4) GUID.
fn random_id() -> Guid {
    let mut bytes = [0; 16];
    // Where the system has no randomness yet, the id is less telling, and nothing else.
    let _filled = getrandom(&mut bytes, GetRandomFlags::NONBLOCK);
    Guid::from_bytes(bytes)
}
