//! The way from the bus to the host.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use kmcl::bus::{Doorbell, Signal};
use rustix::io::Errno;
use vmbus_guest::{ConnectionEvent, HostPort, LossReason, OfferedChannel, PostStatus, Posted};
use vmbus_wire::guid::Guid;
use vmbus_wire::message::{MessageBuffer, MessageHeader, MessageType, OpenChannel};
use vmbus_wire::status::NtStatus;
use vmbus_wire::synic::connection;
use zerocopy::FromBytes;

use super::resume::Line;
use super::{GuestEvent, SOCKET, TIMER, WAKE};
use crate::MAX_EVENTS;
use crate::epoch::PeerEpoch;
use crate::error::ConnectionError;
use crate::event::{OwnEvent, PeerEvent};
use crate::frame::{Frame, Kind};
use crate::handshake::Welcome;
use crate::link::{Link, Received};
use crate::poller::{Interest, Poller};
use crate::resume::GuestProgress;
use crate::timer::Timer;

/// What a hypercall answers to a message too long.
///
/// Source: vmbus-wire section 2, "Post status codes".
const INVALID_PARAMETER: PostStatus = PostStatus(5);

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
    pub(super) event_port: Arc<HostSignal>,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    /// The socket, if there is one.
    pub(super) link: Option<Link>,
    /// What it is for.
    pub(super) line: Line,
    pub(super) interest: Interest,
    /// By channel: what the host is to ring, given to it with the open.
    doorbells: BTreeMap<u32, Weak<dyn Doorbell>>,
    /// By connection id: what signals the host, once it has said so.
    signals: BTreeMap<u32, Weak<HostSignal>>,
    /// The message that the host has not answered. The bus posts no further one before.
    pub(super) unanswered: Option<Post>,
    /// How far the connection has come.
    pub(super) progress: GuestProgress,
    /// The connection's name and its epoch, if it can outlive the host's process.
    pub(super) resumable: Option<(Guid, PeerEpoch)>,
    pub(super) lost: Option<Arc<ConnectionError>>,
    /// The bus was told so.
    closed: bool,
    /// What has happened, oldest first.
    pub(super) events: VecDeque<GuestEvent>,
}

/// A message on its way to the host.
#[derive(Debug)]
pub(super) struct Post {
    connection_id: u32,
    message: MessageBuffer,
    /// It was given to the host that is there, or that one has it from the host before.
    pub(super) sent: bool,
}

impl Post {
    /// The channel that it opens, if it does.
    fn opens(&self) -> Option<u32> {
        opened_channel(&self.message)
    }

    /// The frame. A channel's doorbell goes with the message that opens it.
    fn frame(&self) -> Frame {
        // A channel's interrupt flag is its number: this guest asks for no other one.
        let flag = self.opens().unwrap_or_default();
        Frame::new(Kind::Post, self.connection_id, flag, &[&self.message])
    }
}

impl State {
    /// The connection is over. Only the first reason counts.
    pub(super) fn fail(&mut self, reason: ConnectionError) {
        if self.lost.is_none() {
            let reason = Arc::new(reason);
            self.lost = Some(Arc::clone(&reason));
            self.report(GuestEvent::Over(reason));
        }
    }

    pub(super) fn report(&mut self, event: GuestEvent) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// What the host rings, by channel.
    pub(super) fn doorbells(&self) -> Vec<(u32, Arc<dyn Doorbell>)> {
        let doorbells = self.doorbells.iter();
        doorbells.filter_map(|(&channel, doorbell)| Some((channel, doorbell.upgrade()?))).collect()
    }

    fn doorbell(&self, channel: u32) -> Option<Arc<dyn Doorbell>> {
        self.doorbells.get(&channel)?.upgrade()
    }

    /// Whether the end of the socket is the end of the connection.
    pub(super) fn ends_with_link(&self) -> bool {
        self.resumable.is_none()
    }
}

/// Signals the host for one channel. Quiet until the host has given what to ring, which it does
/// before it says that the channel is open. A host that goes on with the connection gives it anew.
#[derive(Debug, Default)]
pub(super) struct HostSignal(RwLock<Option<PeerEvent>>);

impl HostSignal {
    /// Rings something else from now on. Where it has rung before, it does so at once: what was rung
    /// last was perhaps not heard.
    pub(super) fn set(&self, event: PeerEvent) {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if current.is_some() {
            event.ring();
        }
        *current = Some(event);
    }
}

impl Signal for HostSignal {
    fn signal(&self) {
        // Locked for writing only when the host has changed.
        if let Some(event) = &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            event.ring();
        }
    }
}

impl Port {
    /// For a host that has taken the guest.
    pub(super) fn new(link: Link, welcome: Welcome) -> Result<Self, Errno> {
        let Welcome { event_port, resumable } = welcome;
        let (poller, timer, wake) = (Poller::new()?, Timer::new()?, OwnEvent::new()?);
        poller.add(&link, SOCKET, Interest::READ)?;
        poller.add(&timer, TIMER, Interest::READ)?;
        poller.add(&wake, WAKE, Interest::READ)?;
        let state = State {
            link: Some(link),
            line: Line::Up,
            interest: Interest::READ,
            doorbells: BTreeMap::new(),
            signals: BTreeMap::new(),
            unanswered: None,
            progress: GuestProgress::default(),
            resumable,
            lost: None,
            closed: false,
            events: VecDeque::new(),
        };
        let signal = HostSignal::default();
        signal.set(event_port);
        Ok(Self { poller, timer, wake, event_port: Arc::new(signal), state: Mutex::new(state) })
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
        let mut state = self.state();
        if let Some(link) = &mut state.link {
            let flushed = link.flush().map(drop);
            self.used(&mut state, flushed);
        }
    }

    /// The host listens for signals to a connection. Where no channel waits for that, it is
    /// forgotten.
    pub(super) fn listening(&self, connection_id: u32, event: PeerEvent) {
        let signal = self.state().signals.get(&connection_id).and_then(Weak::upgrade);
        if let Some(signal) = signal {
            signal.set(event);
        }
    }

    /// Closes the socket of a connection that is over. Returns whether that is news.
    pub(super) fn close_if_lost(&self) -> bool {
        let mut state = self.state();
        if state.lost.is_none() {
            return false;
        }
        if let Some(link) = state.link.take() {
            self.poller.remove(&link);
        }
        !std::mem::replace(&mut state.closed, true)
    }

    /// After the link was used: waits for room in the socket if need be, and ends what cannot go on.
    pub(super) fn used(&self, state: &mut State, result: Result<(), ConnectionError>) {
        let result = result.and_then(|()| self.watch(state));
        match result {
            // What the host has said before its end is read first; then comes the end.
            Err(ConnectionError::Closed) if !state.ends_with_link() => {}
            Err(reason) => {
                state.fail(reason);
                self.wake.ring();
            }
            Ok(()) => {}
        }
    }

    fn watch(&self, state: &mut State) -> Result<(), ConnectionError> {
        let State { link: Some(link), interest, .. } = state else { return Ok(()) };
        // The host is always read: it may be waiting for that before it reads us.
        let wanted = Interest { read: true, write: link.is_waiting() };
        if wanted != std::mem::replace(interest, wanted) {
            let modified = self.poller.modify(&*link, SOCKET, wanted);
            modified.map_err(ConnectionError::system("epoll_ctl"))?;
        }
        Ok(())
    }

    /// Sends the post that is not answered, unless the host that is there has it. Where there is
    /// none, the next one gets it.
    pub(super) fn send_unanswered(&self) {
        let doorbell = {
            let state = self.state();
            let opens = state.unanswered.as_ref().and_then(Post::opens);
            opens.and_then(|channel| state.doorbell(channel))
        };
        // Foreign code, so not under our lock.
        let event = doorbell.as_ref().and_then(|doorbell| doorbell.event_fd().ok());
        let mut state = self.state();
        let State { line: Line::Up, link: Some(link), unanswered: Some(post), .. } = &mut *state
        else {
            return;
        };
        if !std::mem::replace(&mut post.sent, true) {
            let sent = link.send(post.frame(), event.as_slice());
            self.used(&mut state, sent);
        }
    }
}

impl HostPort for Port {
    fn post_message(&self, connection_id: u32, message: &[u8]) -> Posted {
        let Ok(message) = MessageBuffer::copy_from(message) else {
            return Posted::Answered(INVALID_PARAMETER); // the bus has no such message
        };
        {
            let mut state = self.state();
            state.progress.posts = state.progress.posts.wrapping_add(1); // 64 bits: not in a lifetime
            state.unanswered = Some(Post { connection_id, message, sent: false });
        }
        self.send_unanswered();
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
        state.report(GuestEvent::Bus(event.clone()));
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::event::PollFlags;

    use super::*;
    use crate::poller::wait_for;

    fn shared() -> (OwnEvent, PeerEvent) {
        let own = OwnEvent::new().unwrap();
        let theirs = own.as_fd().try_clone_to_owned().unwrap();
        (own, PeerEvent::from_peer(theirs, "test").unwrap())
    }

    /// Whether it was rung since the last look.
    fn was_rung(event: &OwnEvent) -> bool {
        let rung = wait_for(event, PollFlags::IN, Some(Duration::ZERO)).unwrap();
        event.acknowledge();
        rung
    }

    /// The host that is gone has perhaps not heard the last one.
    #[test]
    fn a_signal_that_leads_elsewhere_is_given_there_once() {
        let ((first, first_peer), (second, second_peer)) = (shared(), shared());
        let signal = HostSignal::default();
        signal.signal();
        signal.set(first_peer);
        assert!(!was_rung(&first), "nothing to say yet");
        signal.signal();
        assert!(was_rung(&first));
        signal.set(second_peer);
        assert!(was_rung(&second));
        signal.signal();
        assert!(was_rung(&second) && !was_rung(&first));
    }
}
