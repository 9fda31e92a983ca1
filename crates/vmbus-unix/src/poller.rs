//! One descriptor for all that an end of the connection waits for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Events taken at a time.
const EVENTS: usize = 32;

/// An epoll instance. Readable itself when something in it is ready, so it can be waited for in
/// whatever loop the program has.
#[derive(Debug)]
pub(crate) struct Poller(OwnedFd);

/// Something that is ready.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) token: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
}

/// What to wait for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Interest {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Interest {
    pub(crate) const READ: Self = Self { read: true, write: false };

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.read);
        flags.set(EventFlags::OUT, self.write);
        flags
    }
}

impl Poller {
    pub(crate) fn new() -> Result<Self, Errno> {
        epoll::create(CreateFlags::CLOEXEC).map(Self)
    }

    pub(crate) fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> Result<(), Errno> {
        epoll::add(&self.0, fd, EventData::new_u64(token), interest.flags())
    }

    pub(crate) fn modify(
        &self,
        fd: impl AsFd,
        token: u64,
        interest: Interest,
    ) -> Result<(), Errno> {
        epoll::modify(&self.0, fd, EventData::new_u64(token), interest.flags())
    }

    /// A peer that holds the same open file keeps it in the set after we have closed our
    /// descriptor: what goes is taken out first.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        let _was_there = epoll::delete(&self.0, fd);
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
                // An end is read, not heard of.
                readable: flags.intersects(EventFlags::IN | gone),
                writable: flags.intersects(EventFlags::OUT | gone),
            })
            .collect())
    }

    /// Waits until something is ready, or `limit` is over. Returns whether something is.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> Result<bool, Errno> {
        wait_for(&self.0, PollFlags::IN, limit)
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until `fd` is ready for `what`, or at its end, or `limit` is over. Returns whether it is.
pub(crate) fn wait_for(
    fd: impl AsFd,
    what: PollFlags,
    limit: Option<Duration>,
) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(&fd, what)];
    let limit = limit.map(|limit| {
        Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
    });
    match poll(&mut fds, limit.as_ref()) {
        Ok(count) => Ok(count > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error),
    }
}
