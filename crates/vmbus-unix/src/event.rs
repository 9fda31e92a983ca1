//! eventfds that two processes share.
//!
//! The two processes share one *open file description*: its counter and its flags. So a peer can
//! read it empty, fill it, and clear its `O_NONBLOCK`.
//!
//! - *Reading* never waits here: it is done with `RWF_NOWAIT`, which the flag does not matter to.
//! - *Writing* has no such flag in Linux. Before each write the counter is polled for room, so that
//!   a peer that merely keeps it full cannot make us wait. **What remains:** a peer that clears
//!   `O_NONBLOCK` and fills the counter just between the poll and the write makes the writing
//!   thread wait until somebody reads. The counter is read when the connection ends, which frees
//!   such a thread unless it is the one that would do so. A host with guests that it does not trust
//!   even so far gives each its own process.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kmcl::bus::Signal;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2, writev};

use crate::error::ConnectionError;

/// "At no offset", for the calls that take one.
const NO_OFFSET: u64 = u64::MAX;

/// An eventfd of ours, read by us and rung by the peer.
#[derive(Debug)]
pub(crate) struct OwnEvent(OwnedFd);

impl OwnEvent {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Rings it for ourselves.
    pub(crate) fn ring(&self) {
        let _full = writev(&self.0, &[IoSlice::new(&1u64.to_ne_bytes())]);
    }

    /// Makes it quiet until the next ring. Never waits.
    pub(crate) fn acknowledge(&self) {
        read_empty(self.0.as_fd());
    }
}

impl AsFd for OwnEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An eventfd of the peer's, rung by us.
#[derive(Debug)]
pub(crate) struct PeerEvent(OwnedFd);

impl PeerEvent {
    /// Takes what a peer has sent as `what`.
    ///
    /// All eventfds share the one inode of anonymous files, which pipes, sockets and files do not
    /// have. Other descriptors without a file of their own pass, and refuse our eight bytes.
    pub(crate) fn from_peer(fd: OwnedFd, what: &'static str) -> Result<Self, ConnectionError> {
        let system = ConnectionError::system;
        let ours = OwnEvent::new().map_err(system("eventfd"))?;
        let (ours, theirs) =
            (fstat(&ours).map_err(system("fstat"))?, fstat(&fd).map_err(system("fstat"))?);
        let flags = fcntl_getfl(&fd).map_err(system("fcntl"))?;
        let is_event = (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino);
        let can_ring = flags.contains(OFlags::RDWR | OFlags::NONBLOCK);
        if is_event && can_ring { Ok(Self(fd)) } else { Err(ConnectionError::NotAnEvent { what }) }
    }

    /// Rings, unless the counter is full, which is as loud as can be.
    pub(crate) fn ring(&self) {
        if has_room(self.0.as_fd()) {
            // Fails only where it is no eventfd after all, and then nobody listens.
            let _rung = writev(&self.0, &[IoSlice::new(&1u64.to_ne_bytes())]);
        }
    }

    /// Lets a thread go on that waits for room in the counter.
    pub(crate) fn relieve(&self) {
        read_empty(self.0.as_fd());
    }
}

impl Signal for PeerEvent {
    fn signal(&self) {
        self.ring();
    }
}

/// Makes room in the counter of an eventfd that a peer may have filled, before somebody writes to
/// it who does not look.
pub(crate) fn make_room(event: BorrowedFd<'_>) {
    if !has_room(event) {
        read_empty(event);
    }
}

fn has_room(event: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
}

fn read_empty(event: BorrowedFd<'_>) {
    let mut count = [0; 8];
    let mut buffers = [IoSliceMut::new(&mut count)];
    // Nothing to read is fine.
    let _count = preadv2(event, &mut buffers, NO_OFFSET, ReadWriteFlags::NOWAIT);
}

#[cfg(test)]
mod tests {
    use rustix::event::epoll;
    use rustix::io::{ioctl_fionbio, write};

    use super::*;

    fn readable(event: &impl AsFd) -> bool {
        let mut fds = [PollFd::new(event, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    fn shared() -> (OwnEvent, PeerEvent) {
        let own = OwnEvent::new().unwrap();
        let peer = PeerEvent::from_peer(own.0.try_clone().unwrap(), "test").unwrap();
        (own, peer)
    }

    #[test]
    fn a_ring_is_heard_until_acknowledged() {
        let (own, peer) = shared();
        assert!(!readable(&own));
        peer.ring();
        peer.signal();
        assert!(readable(&own));
        own.acknowledge();
        assert!(!readable(&own));
        own.acknowledge();
    }

    /// Each of these would hang without the care taken: the peer has made the description blocking.
    #[test]
    fn a_peer_that_makes_the_descriptor_blocking_stops_nobody() {
        let (own, peer) = shared();
        ioctl_fionbio(&own, false).unwrap();
        own.acknowledge();
        write(&own, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        peer.ring();
        assert!(readable(&own));
        peer.relieve();
        assert!(!readable(&own));
        peer.ring();
        assert!(readable(&own));
        make_room(own.as_fd());
        assert!(readable(&own), "there was room");
        own.acknowledge();
        write(&own, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        make_room(own.as_fd());
        own.ring();
        assert!(readable(&own));
    }

    #[test]
    fn only_non_blocking_eventfds_are_taken() {
        let (pipe_read, pipe_write) = std::io::pipe().unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let blocking = OwnEvent::new().unwrap().0;
        ioctl_fionbio(&blocking, false).unwrap();
        let file = tempfile::tempfile().unwrap();
        let table: [(&str, OwnedFd, bool); 7] = [
            ("eventfd", OwnEvent::new().unwrap().0, true),
            ("blocking eventfd", blocking, false),
            ("read end of a pipe", pipe_read.into(), false),
            ("write end of a pipe", pipe_write.into(), false),
            ("socket", socket.into(), false),
            ("file", file.into(), false),
            ("null", std::fs::File::open("/dev/null").unwrap().into(), false),
        ];
        for (what, fd, taken) in table {
            assert_eq!(PeerEvent::from_peer(fd, "test").is_ok(), taken, "{what}");
        }
        // An epoll descriptor is anonymous too; ringing it does nothing, and does not wait.
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        if let Ok(event) = PeerEvent::from_peer(epoll, "test") {
            event.ring();
        }
    }
}
