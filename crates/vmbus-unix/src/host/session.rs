//! The guest that is connected.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kmcl::bus::{Doorbell, Signal};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use vmbus_memory::GuestMemory;
use vmbus_wire::guid::Guid;

use super::Peer;
use crate::epoch::Epoch;
use crate::error::ConnectionError;
use crate::event::PeerEvent;
use crate::frame::{Frame, Kind};
use crate::handshake::{Hello, Returning};
use crate::link::Link;
use crate::poller::{Interest, Poller};
use crate::resume::{self, Progress, SavedGuest};

/// What it takes for another process to go on with a connection.
pub(super) struct Resumable {
    pub(super) connection_id: Guid,
    pub(super) epoch: Epoch,
}

/// Whether the guest is heard, and answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Hearing {
    /// It is.
    Normal,
    /// It may be told something; what it says waits.
    Deaf,
    /// It is not looked at. Whatever it is to be told waits.
    Held,
}

/// A connected guest.
pub(super) struct Session {
    pub(super) link: Link,
    pub(super) token: u64,
    pub(super) peer: Peer,
    pub(super) memory: GuestMemory,
    /// Rung for event flag 0, which stands for the shared interrupt page.
    pub(super) attention: Arc<PeerEvent>,
    /// By event flag: what the guest gave along with its opens. In use as long as somebody else
    /// holds it as well.
    doorbells: BTreeMap<u16, Arc<PeerEvent>>,
    /// By connection id: what the guest was given to ring.
    pub(super) listening: BTreeMap<u32, Arc<dyn Doorbell>>,
    /// How far the connection has come.
    pub(super) progress: Progress,
    /// `None` for a guest that does not outlive us.
    pub(super) resumable: Option<Resumable>,
    hearing: Hearing,
    /// The bus has a message that the socket did not take.
    blocked: bool,
    interest: Interest,
    /// What went wrong where it could not be told.
    pub(super) failed: Option<ConnectionError>,
}

impl Session {
    /// For a guest that is new.
    pub(super) fn new(
        link: Link,
        token: u64,
        hello: Hello,
        peer: Peer,
        resumable: Option<Resumable>,
    ) -> Self {
        let Hello { memory, attention, resumable: _ } = hello;
        Self {
            link,
            token,
            peer,
            memory,
            attention: Arc::new(attention),
            doorbells: BTreeMap::new(),
            listening: BTreeMap::new(),
            progress: Progress::default(),
            resumable,
            hearing: Hearing::Normal,
            blocked: false,
            interest: Interest::READ,
            failed: None,
        }
    }

    /// For a guest that is back; it is not heard yet.
    pub(super) fn resumed(
        link: Link,
        token: u64,
        returning: Returning,
        peer: Peer,
        saved: &SavedGuest,
        epoch: Epoch,
    ) -> Self {
        let Returning { memory, attention, doorbells, .. } = returning;
        let doorbells = doorbells.into_iter().map(|(flag, event)| (flag, Arc::new(event)));
        Self {
            link,
            token,
            peer,
            memory,
            attention: Arc::new(attention),
            doorbells: doorbells.collect(),
            listening: BTreeMap::new(),
            progress: saved.progress,
            resumable: Some(Resumable { connection_id: saved.connection_id, epoch }),
            hearing: Hearing::Normal, // as the poller has it
            blocked: false,
            interest: Interest::READ,
            failed: None,
        }
    }

    /// The connection as another process needs to know it; `None` where none can go on with it.
    pub(super) fn to_saved(&self) -> Result<Option<SavedGuest>, Errno> {
        let Some(Resumable { connection_id, epoch }) = &self.resumable else { return Ok(None) };
        let in_use = self.doorbells.iter().filter(|(_, doorbell)| Arc::strong_count(doorbell) > 1);
        Ok(Some(SavedGuest {
            connection_id: *connection_id,
            epoch: epoch.value(),
            progress: self.progress,
            doorbells: in_use.map(|(&flag, _)| flag).collect(),
            regions: resume::identify(&self.memory)?,
        }))
    }

    /// Has the guest heard, or not.
    pub(super) fn set_hearing(&mut self, poller: &Poller, hearing: Hearing) {
        let was_held = self.hearing == Hearing::Held;
        let is_held = hearing == Hearing::Held;
        self.hearing = hearing;
        self.link.hold(is_held);
        match (was_held, is_held) {
            (false, true) => poller.remove(&self.link),
            (true, false) => {
                self.interest = Interest::READ;
                if let Err(error) = poller.add(&self.link, self.token, self.interest) {
                    return self.fail(ConnectionError::system("epoll_ctl")(error));
                }
            }
            _ => {}
        }
        if self.failed.is_some() && !is_held {
            let _gone = shutdown(&self.link, Shutdown::Both);
        }
        self.watch(poller);
    }

    /// Answers a post.
    pub(super) fn answer_post(
        &mut self,
        poller: &Poller,
        status: u16,
    ) -> Result<(), ConnectionError> {
        self.progress.posts = self.progress.posts.wrapping_add(1); // 64 bits: not in a lifetime
        self.progress.post_status = status;
        self.answer_last_post(poller)
    }

    /// Answers the last post, perhaps again.
    pub(super) fn answer_last_post(&mut self, poller: &Poller) -> Result<(), ConnectionError> {
        let status = u32::from(self.progress.post_status);
        self.send(poller, Frame::new(Kind::Posted, status, 0, &[]), &[])
    }

    /// Rings everything that the guest listens to.
    pub(super) fn ring_all(&self) {
        self.attention.signal();
        self.doorbells.values().for_each(|doorbell| doorbell.signal());
    }

    /// Sends a frame, now or when the socket has room; the guest is not read meanwhile.
    pub(super) fn send(
        &mut self,
        poller: &Poller,
        frame: Frame,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        let sent = self.link.send(frame, descriptors);
        self.watch(poller);
        sent
    }

    /// Sends a message of the bus, or remembers that it waits for room.
    pub(super) fn send_message(
        &mut self,
        poller: &Poller,
        frame: &Frame,
    ) -> Result<bool, ConnectionError> {
        let sent = self.link.try_send(frame);
        self.blocked |= matches!(sent, Ok(false));
        self.progress.messages += u64::from(matches!(sent, Ok(true)));
        self.watch(poller);
        sent
    }

    /// The socket has room. Returns whether the bus can go on with its messages.
    pub(super) fn flush(&mut self, poller: &Poller) -> Result<bool, ConnectionError> {
        let empty = self.link.flush()?;
        let unblocked = empty && std::mem::take(&mut self.blocked);
        self.watch(poller);
        Ok(unblocked)
    }

    /// Gives up on the guest: what drives the host hears of an end, and finds the reason.
    pub(super) fn fail(&mut self, reason: ConnectionError) {
        self.failed.get_or_insert(reason);
        // A guest that is held must not notice anything: it may go on with another process.
        if self.hearing != Hearing::Held {
            let _gone = shutdown(&self.link, Shutdown::Both);
        }
    }

    fn watch(&mut self, poller: &Poller) {
        if self.hearing == Hearing::Held {
            return; // the poller does not have it
        }
        let waiting = self.link.is_waiting();
        let read = !waiting && self.hearing == Hearing::Normal;
        let interest = Interest { read, write: waiting || self.blocked };
        if interest != self.interest {
            self.interest = interest;
            if let Err(error) = poller.modify(&self.link, self.token, interest) {
                self.fail(ConnectionError::system("epoll_ctl")(error));
            }
        }
    }

    /// Keeps what the host rings by `flag`. There are as many in use as `channels` at most; when
    /// more come, those go that nobody uses.
    pub(super) fn keep_doorbell(&mut self, flag: u16, doorbell: PeerEvent, channels: usize) {
        if self.doorbells.len() >= channels {
            self.doorbells.retain(|_, doorbell| Arc::strong_count(doorbell) > 1);
        }
        self.doorbells.insert(flag, Arc::new(doorbell));
    }

    pub(super) fn doorbell(&self, flag: u16) -> Option<Arc<PeerEvent>> {
        match flag {
            0 => Some(Arc::clone(&self.attention)),
            flag => self.doorbells.get(&flag).map(Arc::clone),
        }
    }

    /// Lets threads go on that the guest has made wait.
    pub(super) fn relieve(&self) {
        self.attention.relieve();
        self.doorbells.values().for_each(|doorbell| doorbell.relieve());
    }
}
