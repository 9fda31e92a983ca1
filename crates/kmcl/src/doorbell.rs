//! What the peer rings when it has put packets into our incoming ring, and the descriptor behind it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2, write};

use crate::bus::Doorbell;
use crate::events::Mailbox;

/// An eventfd, made when somebody first asks for it.
#[derive(Default)]
pub(crate) struct Event(OnceLock<OwnedFd>);

impl Event {
    /// The descriptor, if there is one yet.
    pub(crate) fn existing(&self) -> Option<BorrowedFd<'_>> {
        self.0.get().map(AsFd::as_fd)
    }

    pub(crate) fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(event) = self.existing() {
            return Ok(event);
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(self.0.get_or_init(|| event).as_fd())
    }

    /// Makes the descriptor readable. One that is readable is left alone: a peer that holds it may
    /// have filled its counter and cleared O_NONBLOCK, and a write would wait for ever. A peer that
    /// does both between the look and the write still can; it then stops its own channels' thread.
    pub(crate) fn ring(&self) {
        let Some(event) = self.existing() else { return };
        let mut look = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut look, Some(&at_once)) == Ok(1) {
            return;
        }
        match write(event, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, "cannot ring a doorbell"),
        }
    }

    /// Makes the descriptor quiet until the next ring.
    pub(crate) fn acknowledge(&self) {
        let Some(event) = self.existing() else { return };
        let mut count = [0; 8];
        // The peer may hold this descriptor and clear O_NONBLOCK, or read it empty before us;
        // RWF_NOWAIT keeps this from waiting whatever it does. The offset u64::MAX means "none".
        let _nothing_to_read = preadv2(
            event,
            &mut [io::IoSliceMut::new(&mut count)],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        );
    }
}

/// What the peer rings. While nobody has asked for its descriptor a ring wakes the channel's driver.
pub(crate) struct EventDoorbell {
    pub(crate) event: Event,
    mailbox: Arc<Mailbox>,
}

impl EventDoorbell {
    pub(crate) fn new(mailbox: Arc<Mailbox>) -> Self {
        Self { event: Event::default(), mailbox }
    }
}

impl Doorbell for EventDoorbell {
    fn ring(&self) {
        match self.event.existing() {
            None => self.mailbox.wake(),
            Some(_) => self.event.ring(),
        }
    }

    fn event_fd(&self) -> io::Result<BorrowedFd<'_>> {
        let is_new = self.event.existing().is_none();
        let event = self.event.descriptor()?;
        if is_new {
            // Whoever waits for a ring must look here from now on.
            self.mailbox.notify();
        }
        Ok(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable(fd: BorrowedFd<'_>) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn rings_are_seen_until_acknowledged_and_no_peer_makes_us_wait() {
        let bell = EventDoorbell::new(Arc::new(Mailbox::default()));
        assert!(!readable(bell.event_fd().unwrap()));
        bell.ring();
        bell.ring();
        assert!(readable(bell.event_fd().unwrap()));
        bell.event.acknowledge();
        assert!(!readable(bell.event_fd().unwrap()));

        // A peer that holds the descriptor makes it blocking: the next line would hang with read().
        let fd = bell.event_fd().unwrap();
        rustix::io::ioctl_fionbio(fd, false).unwrap();
        bell.event.acknowledge();

        // It fills the counter as well: this one would hang with write() alone.
        write(fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        bell.ring();
        assert!(readable(fd));
    }

    #[test]
    fn a_doorbell_without_descriptor_wakes_the_driver() {
        let mailbox = Arc::new(Mailbox::default());
        let bell = EventDoorbell::new(Arc::clone(&mailbox));
        let before = mailbox.rung();
        bell.ring();
        assert_eq!(mailbox.rung(), before + 1);
    }
}
