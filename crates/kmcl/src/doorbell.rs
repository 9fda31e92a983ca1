//! What the peer rings when it has put packets into our incoming ring.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, ReadWriteFlags, preadv2, write};

use crate::bus::Doorbell;
use crate::events::Mailbox;

/// An eventfd made when somebody first asks for it; until then a ring wakes the channel's driver.
pub(crate) struct EventDoorbell {
    event: OnceLock<OwnedFd>,
    mailbox: Arc<Mailbox>,
}

impl EventDoorbell {
    pub(crate) fn new(mailbox: Arc<Mailbox>) -> Self {
        Self { event: OnceLock::new(), mailbox }
    }

    /// Makes the descriptor quiet until the next ring.
    pub(crate) fn acknowledge(&self) {
        let Some(event) = self.event.get() else { return };
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

impl Doorbell for EventDoorbell {
    fn ring(&self) {
        match self.event.get() {
            None => self.mailbox.wake(),
            Some(event) => ring_event_fd(event.as_fd()),
        }
    }

    fn event_fd(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(event) = self.event.get() {
            return Ok(event.as_fd());
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(self.event.get_or_init(|| event).as_fd())
    }
}

/// Adds 1 to an eventfd. A full counter is as loud as can be, so that error is no error.
fn ring_event_fd(event: BorrowedFd<'_>) {
    match write(event, &1u64.to_ne_bytes()) {
        Ok(_) | Err(Errno::AGAIN) => {}
        Err(error) => tracing::error!(%error, "cannot ring a doorbell"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn readable(fd: BorrowedFd<'_>) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn rings_are_seen_until_acknowledged_and_acknowledging_never_waits() {
        let bell = EventDoorbell::new(Arc::new(Mailbox::default()));
        assert!(!readable(bell.event_fd().unwrap()));
        bell.ring();
        bell.ring();
        assert!(readable(bell.event_fd().unwrap()));
        bell.acknowledge();
        assert!(!readable(bell.event_fd().unwrap()));

        // A peer that holds the descriptor makes it blocking: the next line would hang with read().
        let fd = bell.event_fd().unwrap();
        rustix::io::ioctl_fionbio(fd, false).unwrap();
        bell.acknowledge();
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
