//! How a guest finds the host that goes on with its connection: see [`crate::resume`].

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::port::{Port, State};
use super::{GuestEvent, SOCKET, UnixGuest};
use crate::error::{ConnectionError, FrameError, Reason};
use crate::frame::ResumeClaim;
use crate::handshake::{self, Resumed};
use crate::link::{Link, Received};
use crate::listener;
use crate::poller::Interest;
use crate::timer::Timer;

/// The pause before the first look for another host. It doubles from one look to the next.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// The longest pause: what a move takes longer because of it, and 50 tries to connect a second.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// What the socket is for.
#[derive(Debug)]
pub(super) enum Line {
    /// A host is there.
    Up,
    /// None is. There is no socket.
    Down(Absence),
    /// Somebody is there, and was asked whether it is the host.
    Asking(Absence),
}

/// That there is no host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Absence {
    since: Instant,
    pause: Duration,
}

impl Absence {
    fn begin() -> Self {
        Self { since: Instant::now(), pause: FIRST_PAUSE }
    }

    fn after_pause(self) -> Self {
        Self { pause: (self.pause * 2).min(LONGEST_PAUSE), ..self }
    }
}

/// What a guest needs to find another host.
#[derive(Debug)]
pub(super) struct Back {
    pub(super) timer: Timer,
    path: PathBuf,
    /// How long it looks.
    limit: Duration,
}

impl Back {
    pub(super) fn new(path: &Path, limit: Option<Duration>) -> Result<Self, Errno> {
        let limit = limit.unwrap_or_default();
        Ok(Self { timer: Timer::new()?, path: path.to_owned(), limit })
    }
}

impl Port {
    pub(super) fn is_linked(&self) -> bool {
        let state = self.state();
        matches!(state.line, Line::Up) && state.link.is_some()
    }

    pub(super) fn is_asking(&self) -> bool {
        matches!(self.state().line, Line::Asking(_))
    }

    pub(super) fn count_message(&self) {
        let mut state = self.state();
        state.progress.messages = state.progress.messages.wrapping_add(1);
    }

    pub(super) fn count_answer(&self) -> Result<(), FrameError> {
        let mut state = self.state();
        state.unanswered.take().ok_or(FrameError::NothingPosted)?;
        state.progress.answers = state.progress.answers.wrapping_add(1);
        Ok(())
    }

    /// Closes the socket.
    fn hang_up(&self, state: &mut State) {
        if let Some(link) = state.link.take() {
            self.poller.remove(&link);
        }
        if let Some(post) = &mut state.unanswered {
            post.sent = false;
        }
    }
}

impl UnixGuest {
    /// The link has ended, or has to. All that the host has said was read.
    pub(super) fn link_ended(&self, reason: ConnectionError) {
        let mut state = self.port.state();
        let absence = match (&state.line, &reason) {
            (Line::Up, ConnectionError::Closed) if !state.ends_with_link() => {
                state.report(GuestEvent::LinkLost);
                Absence::begin()
            }
            // A host that is about to die, or to be freed from another guest.
            (
                Line::Asking(absence),
                ConnectionError::Closed | ConnectionError::Refused { reason: Reason::Busy, .. },
            ) => absence.after_pause(),
            _ => return state.fail(reason),
        };
        self.port.hang_up(&mut state);
        self.wait_down(&mut state, absence);
    }

    /// Looks again in a while, if there is time.
    fn wait_down(&self, state: &mut State, absence: Absence) {
        let left = self.back.limit.saturating_sub(absence.since.elapsed());
        state.line = Line::Down(absence);
        if left.is_zero() {
            return self.give_up(state);
        }
        self.set_timer(state, absence.pause.min(left));
    }

    fn set_timer(&self, state: &mut State, delay: Duration) {
        if let Err(error) = self.back.timer.set(Some(delay)) {
            state.fail(ConnectionError::system("timerfd_settime")(error));
        }
    }

    fn give_up(&self, state: &mut State) {
        let milliseconds = self.back.limit.as_millis();
        state.fail(ConnectionError::NobodyResumes { milliseconds });
    }

    /// The pause is over, or the time to look.
    pub(super) fn look_for_host(&self) {
        let absence = {
            let mut state = self.port.state();
            match state.line {
                Line::Up => return,
                // Nobody has answered.
                Line::Asking(_) => return self.give_up(&mut state),
                Line::Down(absence) => absence,
            }
        };
        let asked = open(&self.back.path).and_then(|link| self.ask(link, absence));
        if asked.is_err() {
            // Nobody is there, or not yet, or no longer: in all cases the next look will show.
            let mut state = self.port.state();
            self.wait_down(&mut state, absence.after_pause());
        }
    }

    /// Asks whoever is there to go on with the connection.
    fn ask(&self, mut link: Link, absence: Absence) -> Result<(), ConnectionError> {
        let doorbells = self.port.state().doorbells();
        // Foreign code, so not under our lock. A channel whose doorbell has no descriptor was never
        // opened.
        let given: Vec<_> = doorbells
            .iter()
            .filter_map(|(channel, doorbell)| Some((*channel, doorbell.event_fd().ok()?)))
            .collect();
        let mut state = self.port.state();
        let Some((connection_id, epoch)) = &state.resumable else { return Ok(()) };
        let claim = ResumeClaim {
            connection_id: *connection_id,
            epoch: epoch.value().into(),
            posts: state.progress.posts.into(),
            answers: state.progress.answers.into(),
            messages: state.progress.messages.into(),
        };
        let (frame, descriptors) =
            handshake::resume(self.bus.memory(), self.attention.as_fd(), &claim, given.len())?;
        link.send(frame, &descriptors)?;
        for (frame, descriptors) in handshake::doorbells(&given) {
            link.send(frame, &descriptors)?;
        }
        let interest = Interest { read: true, write: link.is_waiting() };
        let added = self.port.poller.add(&link, SOCKET, interest);
        added.map_err(ConnectionError::system("epoll_ctl"))?;
        state.interest = interest;
        state.link = Some(link);
        state.line = Line::Asking(absence);
        let left = self.back.limit.saturating_sub(absence.since.elapsed());
        self.set_timer(&mut state, left);
        Ok(())
    }

    /// What was asked has an answer.
    pub(super) fn resume(&self, received: Received) -> Result<(), ConnectionError> {
        let Resumed { event_port, epoch, posts } = handshake::resume_answer(received)?;
        {
            let mut state = self.port.state();
            let again = state.progress.posts_again(posts)?;
            let Line::Asking(absence) = state.line else { return Ok(()) };
            if let Some(post) = &mut state.unanswered {
                post.sent = !again; // else its answer follows
            }
            if let Some((_, current)) = &mut state.resumable {
                *current = epoch;
            }
            state.line = Line::Up;
            state.report(GuestEvent::Resumed { after: absence.since.elapsed() });
        }
        let _quiet = self.back.timer.set(None);
        self.port.event_port.set(event_port);
        self.port.send_unanswered();
        Ok(())
    }
}

/// A socket connected to whoever listens at `path`. Does not wait.
fn open(path: &Path) -> Result<Link, ConnectionError> {
    let address = listener::address(path)
        .map_err(|_| ConnectionError::system("connect")(io::Error::from(Errno::NAMETOOLONG)))?;
    let socket = listener::new_socket().map_err(ConnectionError::system("socket"))?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(Link::new(socket)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(ConnectionError::system("connect")(error)),
        }
    }
}
