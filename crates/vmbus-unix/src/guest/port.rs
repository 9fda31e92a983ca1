//! The way from the bus to the host.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use kmcl::bus::{Doorbell, Signal};
use rustix::io::Errno;
use vmbus_guest::{ConnectionEvent, HostPort, LossReason, OfferedChannel, Posted};
use vmbus_wire::message::{MessageHeader, MessageType, OpenChannel};
use vmbus_wire::status::NtStatus;
use vmbus_wire::synic::connection;
use zerocopy::FromBytes;

use super::{SOCKET, TIMER, WAKE};
use crate::MAX_EVENTS;
use crate::error::ConnectionError;
use crate::event::{OwnEvent, PeerEvent};
use crate::frame::{Frame, Kind};
use crate::link::{Link, Received};
use crate::poller::{Interest, Poller};
use crate::timer::Timer;

/// The longest wait before a message is posted again that the host had no buffer for.
const MAX_BACK_OFF: Duration = Duration::from_millis(100);

/// What the bus and the thread that drives share.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) poller: Poller,
    pub(super) timer: Timer,
    /// Wakes the thread that drives.
    pub(super) wake: OwnEvent,
    /// Signals the host for channels of old versions.
    event_port: Arc<PeerEvent>,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    /// `None` once the connection is over.
    link: Option<Link>,
    interest: Interest,
    /// By channel: what the host is to ring, given to it with the open.
    doorbells: BTreeMap<u32, Weak<dyn Doorbell>>,
    /// By connection id: what signals the host, once it has said so.
    signals: BTreeMap<u32, Weak<HostSignal>>,
    pub(super) lost: Option<Arc<ConnectionError>>,
    /// What the bus has told of the connection, oldest first.
    pub(super) events: VecDeque<ConnectionEvent>,
}

impl State {
    /// The connection is over. Only the first reason counts.
    pub(super) fn fail(&mut self, reason: ConnectionError) {
        self.lost.get_or_insert_with(|| Arc::new(reason));
    }
}

/// Signals the host for one channel. Quiet until the host has given what to ring, which it does
/// before it says that the channel is open.
#[derive(Debug, Default)]
struct HostSignal(OnceLock<PeerEvent>);

impl Signal for HostSignal {
    fn signal(&self) {
        if let Some(event) = self.0.get() {
            event.ring();
        }
    }
}

impl Port {
    /// For a host that has taken the guest.
    pub(super) fn new(link: Link, event_port: PeerEvent) -> Result<Self, Errno> {
        let (poller, timer, wake) = (Poller::new()?, Timer::new()?, OwnEvent::new()?);
        poller.add(&link, SOCKET, Interest::READ)?;
        poller.add(&timer, TIMER, Interest::READ)?;
        poller.add(&wake, WAKE, Interest::READ)?;
        let state = State {
            link: Some(link),
            interest: Interest::READ,
            doorbells: BTreeMap::new(),
            signals: BTreeMap::new(),
            lost: None,
            events: VecDeque::new(),
        };
        Ok(Self { poller, timer, wake, event_port: Arc::new(event_port), state: Mutex::new(state) })
    }

    /// Not to be held across a call to the bus, which calls back.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn receive(&self) -> Result<Option<Received>, ConnectionError> {
        match &self.state().link {
            Some(link) => link.receive(),
            None => Ok(None),
        }
    }

    /// The socket has room.
    pub(super) fn flush(&self) {
        self.use_link(|link| link.flush().map(drop));
    }

    /// The host listens for signals to a connection. Where no channel waits for that, it is
    /// forgotten.
    pub(super) fn listening(&self, connection_id: u32, event: PeerEvent) {
        let signal = self.state().signals.get(&connection_id).and_then(Weak::upgrade);
        if let Some(signal) = signal {
            let _had_one = signal.0.set(event);
        }
    }

    /// Closes the socket of a connection that is over. Returns whether it was open.
    pub(super) fn close_if_lost(&self) -> bool {
        let mut state = self.state();
        if state.lost.is_none() {
            return false;
        }
        let Some(link) = state.link.take() else { return false };
        self.poller.remove(&link);
        true
    }

    fn use_link(&self, use_it: impl FnOnce(&mut Link) -> Result<(), ConnectionError>) {
        let mut state = self.state();
        let State { link: Some(link), interest, .. } = &mut *state else { return };
        let result = use_it(link).and_then(|()| {
            // The host is always read: it may be waiting for that before it reads us.
            let wanted = Interest { read: true, write: link.is_waiting() };
            if wanted != std::mem::replace(interest, wanted) {
                let modified = self.poller.modify(&*link, SOCKET, wanted);
                modified.map_err(ConnectionError::system("epoll_ctl"))?;
            }
            Ok(())
        });
        if let Err(reason) = result {
            state.fail(reason);
            self.wake.ring();
        }
    }
}

impl HostPort for Port {
    fn post_message(&self, connection_id: u32, message: &[u8]) -> Posted {
        let opened = opened_channel(message);
        // Foreign code, so not under our lock.
        let doorbell = opened.and_then(|channel| self.state().doorbells.get(&channel)?.upgrade());
        let event = doorbell.as_ref().and_then(|doorbell| doorbell.event_fd().ok());
        // A channel's interrupt flag is its number: this guest asks for no other one.
        let flag = opened.unwrap_or_default();
        let frame = Frame::new(Kind::Post, connection_id, flag, &[message]);
        self.use_link(|link| link.send(frame, event.as_slice()));
        Posted::Later
    }

    fn retry_post_later(&self, attempt: u32) {
        let doubled = 1u64.checked_shl(attempt).unwrap_or(u64::MAX);
        let delay = Duration::from_micros(doubled).min(MAX_BACK_OFF);
        if let Err(error) = self.timer.set(Some(delay)) {
            self.state().fail(ConnectionError::system("timerfd_settime")(error));
            self.wake.ring();
        }
    }

    fn attach(
        &self,
        channel: &OfferedChannel,
        doorbell: &Arc<dyn Doorbell>,
    ) -> Result<Arc<dyn Signal>, NtStatus> {
        // It goes along with the open; whether there is one shows now.
        doorbell.event_fd().map_err(|_| NtStatus::INSUFFICIENT_RESOURCES)?;
        let mut state = self.state();
        // Offers come and go, and the host chooses their numbers: those that went leave nothing.
        state.doorbells.retain(|_, doorbell| doorbell.strong_count() > 0);
        state.signals.retain(|_, signal| signal.strong_count() > 0);
        state.doorbells.insert(channel.channel_id, Arc::downgrade(doorbell));
        if channel.connection_id == connection::EVENT {
            return Ok(Arc::clone(&self.event_port) as Arc<dyn Signal>);
        }
        let signal = Arc::new(HostSignal::default());
        state.signals.insert(channel.connection_id, Arc::downgrade(&signal));
        Ok(signal)
    }

    fn connection_changed(&self, event: &ConnectionEvent) {
        let mut state = self.state();
        if state.events.len() >= MAX_EVENTS {
            state.events.pop_front();
        }
        state.events.push_back(event.clone());
        if let ConnectionEvent::Lost(reason) = event
            && *reason != LossReason::HostGone
        {
            state.fail(ConnectionError::Bus(*reason));
            self.wake.ring();
        }
    }
}

/// The channel that a message opens, if it does.
fn opened_channel(message: &[u8]) -> Option<u32> {
    let (header, body) = MessageHeader::read_from_prefix(message).ok()?;
    let (open, _) = OpenChannel::read_from_prefix(body).ok()?;
    let opens = header.message_type.get() == MessageType::OpenChannel.to_wire();
    opens.then_some(open.channel_id.get())
}
