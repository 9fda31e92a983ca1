//! The guest that is connected.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kmcl::bus::Doorbell;
use rustix::net::{Shutdown, shutdown};
use vmbus_memory::GuestMemory;
use vmbus_wire::message::MAX_CHANNEL_ID;

use super::Peer;
use crate::error::{ConnectionError, FrameError};
use crate::event::PeerEvent;
use crate::frame::Frame;
use crate::handshake::Hello;
use crate::link::Link;
use crate::poller::{Interest, Poller};

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
    /// The bus has a message that the socket did not take.
    blocked: bool,
    interest: Interest,
    /// What went wrong where it could not be told.
    pub(super) failed: Option<ConnectionError>,
}

impl Session {
    pub(super) fn new(link: Link, token: u64, hello: Hello, peer: Peer) -> Self {
        let Hello { memory, attention } = hello;
        let attention = Arc::new(attention);
        Self {
            link,
            token,
            peer,
            memory,
            attention,
            doorbells: BTreeMap::new(),
            listening: BTreeMap::new(),
            blocked: false,
            interest: Interest::READ,
            failed: None,
        }
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
        let _gone = shutdown(&self.link, Shutdown::Both);
    }

    fn watch(&mut self, poller: &Poller) {
        let waiting = self.link.is_waiting();
        let interest = Interest { read: !waiting, write: waiting || self.blocked };
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

/// A channel's event flag, as a guest gives it.
pub(super) fn event_flag(flag: u32) -> Result<u16, FrameError> {
    match u16::try_from(flag) {
        Ok(narrow) if (1..=MAX_CHANNEL_ID).contains(&flag) => Ok(narrow),
        _ => Err(FrameError::EventFlag { flag }),
    }
}
