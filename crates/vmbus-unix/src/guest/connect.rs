//! How a guest comes to its host.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use vmbus_guest::GuestBus;
use vmbus_memory::{GuestMemory, PageAllocator};
use vmbus_wire::PAGE_SIZE;

use super::port::Port;
use super::resume::Back;
use super::{ATTENTION, BACK, GuestOptions, UnixGuest};
use crate::error::{ConnectError, ConnectionError};
use crate::event::OwnEvent;
use crate::handshake;
use crate::link::{Link, Received};
use crate::listener;
use crate::poller::{Interest, wait_for};

/// How long to wait before another try where as many wait for the host already as may.
const BACKLOG_PAUSE: Duration = Duration::from_millis(5);

impl UnixGuest {
    /// [`UnixGuest::connect`] with more to choose.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect_with(
        path: impl AsRef<Path>,
        options: GuestOptions,
    ) -> Result<Self, ConnectError> {
        let path = path.as_ref();
        let deadline = Instant::now() + options.timeout;
        let timed_out =
            || ConnectionError::HandshakeTimeout { milliseconds: options.timeout.as_millis() };
        let failed = |source| ConnectError::Connection { path: path.to_owned(), source };

        let bytes = options.memory_bytes;
        let no_memory = |source| ConnectError::Memory { bytes, source };
        let memory = GuestMemory::memfd(bytes).map_err(no_memory)?;
        let page = PAGE_SIZE as u64;
        let pages = PageAllocator::new(&memory, page, bytes.saturating_sub(page));
        let pages = pages.map_err(no_memory)?;

        let mut link = open(path, deadline)?.ok_or_else(|| failed(timed_out()))?;
        let attention = OwnEvent::new().map_err(system("eventfd"))?;
        let (hello, descriptors) =
            handshake::hello(&memory, attention.as_fd(), options.reconnect.is_some())
                .map_err(|error| failed(error.into()))?;
        match link.send(hello, &descriptors) {
            // A host that is busy says so without listening.
            Ok(()) | Err(ConnectionError::Closed) => {}
            Err(error) => return Err(failed(error)),
        }
        let answer = receive(&link, deadline).map_err(failed)?;
        let answer = answer.ok_or_else(|| failed(timed_out()))?;
        let mut welcome = handshake::answer(answer).map_err(failed)?;
        // A host may let the connection outlive it; whether it does is up to us.
        welcome.resumable = welcome.resumable.filter(|_| options.reconnect.is_some());

        let port = Arc::new(Port::new(link, welcome).map_err(system("epoll"))?);
        port.poller.add(&attention, ATTENTION, Interest::READ).map_err(system("epoll_ctl"))?;
        let back = Back::new(path, options.reconnect).map_err(system("timerfd_create"))?;
        port.poller.add(&back.timer, BACK, Interest::READ).map_err(system("epoll_ctl"))?;
        let bus = GuestBus::new(options.config, pages, Arc::clone(&port) as Arc<_>)?;
        let guest = Self { bus, port, attention, back, driving: Mutex::new(()) };
        guest.bus.connect()?;
        Ok(guest)
    }
}

/// A socket connected to `path`; `None` if the deadline came first.
fn open(path: &Path, deadline: Instant) -> Result<Option<Link>, ConnectError> {
    let address = listener::address(path)
        .map_err(|len| ConnectError::PathTooLong { path: path.to_owned(), len })?;
    let socket = listener::new_socket().map_err(system("socket"))?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(Some(Link::new(socket))),
            Err(Errno::NOENT | Errno::CONNREFUSED) => {
                return Err(ConnectError::NoServer { path: path.to_owned() });
            }
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(BACKLOG_PAUSE);
            }
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(system("connect")(error)),
        }
    }
}

/// The host's first frame; `None` if the deadline came first.
fn receive(link: &Link, deadline: Instant) -> Result<Option<Received>, ConnectionError> {
    loop {
        if let Some(received) = link.receive()? {
            return Ok(Some(received));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let failed = ConnectionError::system("poll");
        wait_for(link, PollFlags::IN, Some(left)).map_err(failed)?;
    }
}

fn system(call: &'static str) -> impl Fn(Errno) -> ConnectError {
    move |error| ConnectError::System { call, source: io::Error::from(error) }
}
