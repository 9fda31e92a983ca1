//! The way from the bus to the guest that is connected, if one is.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use kmcl::bus::{Doorbell, Signal};
use vmbus_host::{GuestPort, Posted, SlotId};
use vmbus_memory::GuestMemory;

use super::lock;
use super::session::Session;
use crate::event::{self, OwnEvent};
use crate::frame::{Frame, Kind};
use crate::poller::Poller;

/// Virtual processors that a guest may name as the target of interrupts: as many as the largest of
/// VMs has. Descriptors are rung the same way for each.
const VIRTUAL_PROCESSORS: u32 = 2048;

/// What the bus and the thread that drives share.
pub(super) struct Port {
    pub(super) poller: Poller,
    /// What guests of old versions ring for all their channels.
    pub(super) event_port: OwnEvent,
    session: Mutex<Option<Session>>,
}

impl Port {
    pub(super) fn new(poller: Poller, event_port: OwnEvent) -> Self {
        Self { poller, event_port, session: Mutex::new(None) }
    }

    /// The guest rings the port for all channels of an old version: each of these is rung next, by
    /// somebody who trusts that there is room.
    pub(super) fn make_room(&self) {
        let listening: Vec<_> = match &*self.session() {
            Some(session) => session.listening.values().map(Arc::clone).collect(),
            None => return,
        };
        for doorbell in listening {
            if let Ok(event) = doorbell.event_fd() {
                event::make_room(event);
            }
        }
    }

    /// The guest. Not to be held across a call to the bus, which calls back.
    pub(super) fn session(&self) -> MutexGuard<'_, Option<Session>> {
        lock(&self.session)
    }
}

impl GuestPort for Port {
    fn memory(&self) -> Option<GuestMemory> {
        self.session().as_ref().map(|session| session.memory.clone())
    }

    fn vp_count(&self) -> u32 {
        VIRTUAL_PROCESSORS
    }

    fn post_message(&self, slot: SlotId, message: &[u8]) -> Posted {
        let frame = Frame::new(Kind::Message, slot.vp, u32::from(slot.sint), &[message]);
        let mut session = self.session();
        let Some(session) = &mut *session else { return Posted::Taken };
        match session.send_message(&self.poller, &frame) {
            Ok(true) => Posted::Taken,
            Ok(false) => Posted::Busy,
            Err(reason) => {
                session.fail(reason);
                Posted::Taken // there is nobody to take it
            }
        }
    }

    fn event_flag(&self, _vp: u32, _sint: u8, flag: u16) -> io::Result<Arc<dyn Signal>> {
        let session = self.session();
        let doorbell = session.as_ref().and_then(|session| session.doorbell(flag));
        Ok(doorbell.ok_or(io::ErrorKind::NotFound)?)
    }

    /// Gives the guest what signals the channel: the eventfd behind its doorbell.
    fn listen(&self, connection_id: u32, doorbell: Arc<dyn Doorbell>) -> io::Result<()> {
        let event = doorbell.event_fd()?;
        let frame = Frame::new(Kind::Listening, connection_id, 0, &[]);
        let mut session = self.session();
        let Some(session) = &mut *session else { return Ok(()) };
        session.send(&self.poller, frame, &[event]).map_err(io::Error::other)?;
        session.listening.insert(connection_id, Arc::clone(&doorbell));
        Ok(())
    }

    /// The guest keeps what it was given, and rings for nothing.
    fn unlisten(&self, connection_id: u32) {
        let doorbell =
            self.session().as_mut().and_then(|session| session.listening.remove(&connection_id));
        drop(doorbell); // foreign code, so not under our lock
    }
}
