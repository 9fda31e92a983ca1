//! One descriptor for all that the broker waits for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

/// Events taken at a time.
pub(crate) const EVENTS: usize = 64;

/// An epoll instance, readable itself when something in it is ready. Each event is told once: whoever
/// handles it asks for the next one. So what a connection cannot use at the moment wakes nobody.
#[derive(Debug)]
pub(crate) struct Poller(OwnedFd);

/// Something that is ready.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) token: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
}

impl Poller {
    pub(crate) fn new() -> Result<Self, Errno> {
        epoll::create(CreateFlags::CLOEXEC).map(Self)
    }

    pub(crate) fn add(&self, fd: impl AsFd, token: u64, what: EventFlags) -> Result<(), Errno> {
        epoll::add(&self.0, fd, EventData::new_u64(token), what | EventFlags::ONESHOT)
    }

    pub(crate) fn ask(&self, fd: impl AsFd, token: u64, what: EventFlags) {
        let asked =
            epoll::modify(&self.0, fd, EventData::new_u64(token), what | EventFlags::ONESHOT);
        if let Err(error) = asked {
            // The descriptor is in the set for as long as it is open.
            tracing::error!(%error, "a socket can no longer be waited for");
        }
    }

    /// What is ready now.
    pub(crate) fn ready(&self) -> Result<Vec<Ready>, Errno> {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.0, spare_capacity(&mut events), Some(&now)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let gone = EventFlags::HUP | EventFlags::ERR;
        Ok(events
            .into_iter()
            .map(|Event { flags, data, .. }| Ready {
                token: data.u64(),
                // An end is read, or met by a write.
                readable: flags.intersects(EventFlags::IN | gone),
                writable: flags.intersects(EventFlags::OUT | gone),
            })
            .collect())
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An eventfd that is rung from any thread.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> Result<Self, Errno> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Self)
    }

    pub(crate) fn ring(&self) {
        // The only error is a full counter, and then it is readable already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    pub(crate) fn clear(&self) {
        // The only error is an empty counter, and then there is nothing to clear.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
