//! A controller that stands still to be saved: frozen where it is, or paused when everything in flight
//! has ended.
//!
//! ```text
//!          freeze                      running() == 0
//!   at work ─────► frozen, settling ──────────────────► streams(), again and again
//!      ▲                 │ thaw                            │       │
//!      └─────────────────┴─────────────────────────────────┘       └─► move_away(): goes on elsewhere
//! ```
//!
//! How long freezing takes does not depend on how slow a disk is: requests that have not started, and
//! those that have finished, settle at once. What runs is cancelled where its back end can do that, and
//! waited for where it cannot. Until then nothing can be saved.
//!
//! Requests that go on come in the order in which they were first delivered, channel by channel, and
//! flushes wait for the writes before them as ever. Between channels there is no such order, as there is
//! none between requests that a guest has in flight on two of them.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use kmcl::{Channel, ChannelState, Frozen, SaveOptions};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::completions::Completions;
use super::save::{ControllerSave, SavedStream, StreamSave};
use super::{ControllerError, Core, ScsiController, lock};

/// How long a wait sleeps at most before it looks again: channels that are closing do not tell.
const NAP: Duration = Duration::from_millis(10);

/// Rung when something has settled.
pub(super) struct Bell {
    event: OwnedFd,
    waker: Mutex<Option<Waker>>,
}

impl Bell {
    fn new() -> std::io::Result<Arc<Self>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { event, waker: Mutex::new(None) }))
    }

    pub(super) fn ring(&self) {
        // The only error is a full counter, and then it is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        let waker = lock(&self.waker).clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn clear(&self) {
        // The only error is an empty counter, and then there is nothing to clear.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }
}

impl ScsiController {
    /// Freezes the controller, all channels of it: see [`FrozenController`]. Waits for callbacks that
    /// run, and for nothing else. Not to be called in a callback of its own.
    ///
    /// Until the end of the freeze no disk can be attached or detached.
    ///
    /// # Errors
    /// [`ControllerError::Held`] if it is frozen or paused already; [`ControllerError::Channel`] if it
    /// was not offered; [`ControllerError::Descriptor`]. The controller is at work then.
    pub fn freeze(&self) -> Result<FrozenController, ControllerError> {
        let hold = Hold::take(&self.core)?;
        let bell = Bell::new().map_err(ControllerError::Descriptor)?;
        *lock(&self.core.bell) = Some(Arc::clone(&bell));
        let mut frozen = FrozenController { channels: Vec::new(), bell, hold };
        // The primary channel first: from then on there will be no other subchannels.
        let core = &self.core;
        let primary = core.channel(0).ok_or(ControllerError::Closed)?;
        frozen.channels.push(primary.freeze()?);
        let others: Vec<Channel> =
            core.read_lanes().present.iter().skip(1).map(|(channel, _)| channel.clone()).collect();
        for channel in others {
            frozen.channels.push(channel.freeze()?);
        }
        for channel in &frozen.channels {
            channel.notify(Waker::from(Arc::clone(&frozen.bell)));
        }
        Ok(frozen)
    }

    /// Pauses the controller, all channels of it: the documented way, in which everything in flight is
    /// completed first. Does not wait for that; see [`PausedController`].
    ///
    /// # Errors
    /// As for [`Self::freeze`].
    pub fn pause(&self) -> Result<PausedController, ControllerError> {
        let hold = Hold::take(&self.core)?;
        let mut paused = PausedController { channels: Vec::new(), hold };
        // The primary channel first, and no other before it is paused: it could still be making
        // subchannels.
        let primary = self.core.channel(0).ok_or(ControllerError::Closed)?;
        if primary.state() == ChannelState::Disabled {
            let state = primary.state();
            return Err(kmcl::Error::State { function: "pause", state }.into());
        }
        primary.begin_pause();
        paused.channels.push(primary);
        Ok(paused)
    }
}

/// The right to hold a controller, given back on drop.
struct Hold {
    core: Arc<Core>,
}

impl Hold {
    fn take(core: &Arc<Core>) -> Result<Self, ControllerError> {
        if core.is_held.swap(true, Ordering::AcqRel) {
            return Err(ControllerError::Held);
        }
        Ok(Self { core: Arc::clone(core) })
    }

    /// Requests of channels of the past, which end by themselves; and these channels, until they are
    /// withdrawn: the bus would save offers that nobody makes again.
    fn retired(&self) -> u32 {
        let lanes = self.core.read_lanes();
        let waits = |(channel, lane): &(Channel, Arc<super::lane::Lane>)| {
            let (gathered, submitted) = lane.requests().count();
            gathered + submitted + usize::from(channel.state() != ChannelState::Disabled)
        };
        u32::try_from(lanes.retired.iter().map(waits).sum::<usize>()).unwrap_or(u32::MAX)
    }

    /// The streams of the controller and of `channels`, which are in the order of their indices.
    fn streams<'a>(
        &self,
        options: &SaveOptions,
        channels: impl Iterator<Item = &'a Channel>,
    ) -> Result<Vec<SavedStream>, ControllerError> {
        let name = &self.core.config.name;
        let controller = Box::new(ControllerSave::new(&self.core, options)?);
        let controller = StreamSave::Controller(controller);
        let mut streams = vec![SavedStream { name: name.clone(), index: 0, save: controller }];
        for (index, channel) in (0..).zip(channels) {
            let save = StreamSave::of_channel(channel, options)?;
            streams.push(SavedStream { name: format!("{name}/{index}"), index, save });
        }
        Ok(streams)
    }

    /// Lets back ends say what has finished, and waits a moment if nothing has.
    fn turn(&self, bell: Option<&Bell>, limit: Duration) {
        let completions = self.core.luns.completions();
        let limit = limit.min(NAP);
        let limit = Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) };
        let mut fds: Vec<PollFd<'_>> =
            completions.iter().map(|one| PollFd::new(&**one, PollFlags::IN)).collect();
        fds.extend(bell.map(|bell| PollFd::new(&bell.event, PollFlags::IN)));
        // An interruption is as good as a time-out.
        let _ = poll(&mut fds, Some(&limit));
        for one in &completions {
            Completions::ready(one);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        *lock(&self.core.bell) = None;
        self.core.is_held.store(false, Ordering::Release);
    }
}

/// Waits for `running` to come to 0, and has back ends looked after meanwhile.
fn wait(
    hold: &Hold,
    bell: Option<&Bell>,
    limit: Option<Duration>,
    mut running: impl FnMut() -> u32,
) -> bool {
    let until = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        if let Some(bell) = bell {
            bell.clear(); // before the look: what comes later rings again
        }
        if running() == 0 {
            return true;
        }
        let left = until.map_or(NAP, |until| until.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return false;
        }
        hold.turn(bell, left);
    }
}

/// A frozen controller. Thaws when dropped.
///
/// From [`ScsiController::freeze`] on, no request begins and no answer leaves. Those that were in flight
/// settle: see [`Self::running`]. A descriptor ([`AsFd`]) and a waker ([`Self::notify`]) tell when
/// something has.
#[must_use = "a controller that is not kept frozen thaws at once"]
pub struct FrozenController {
    // Dropped in this order: channels thaw before the hold ends.
    channels: Vec<Frozen>,
    bell: Arc<Bell>,
    hold: Hold,
}

impl FrozenController {
    /// Requests that back ends still work on: none of them can be cancelled, and none has finished.
    /// While there are some the controller cannot be saved.
    #[must_use]
    pub fn running(&self) -> u32 {
        let channels = self.channels.iter().map(Frozen::running);
        channels.fold(self.hold.retired(), u32::saturating_add)
    }

    /// Requests that have not finished: those that will be carried out later, and those that are
    /// running. Finished ones, whose answers are held, are saved as well and not counted here.
    #[must_use]
    pub fn unfinished(&self) -> u32 {
        let lanes = self.hold.core.read_lanes();
        let handed_over = lanes.present.iter().map(|(_, lane)| lane.requests().handed_over());
        handed_over.fold(self.running(), u32::saturating_add)
    }

    /// Waits until nothing is running, or `limit` is over; returns whether nothing is. Looks after the
    /// disks' completions meanwhile, so it may be called by the thread that drives them.
    #[must_use]
    pub fn wait(&self, limit: Option<Duration>) -> bool {
        wait(&self.hold, Some(&self.bell), limit, || self.running())
    }

    /// Has `waker` woken whenever something has settled, and at once if nothing is running.
    pub fn notify(&self, waker: Waker) {
        *lock(&self.bell.waker) = Some(waker);
        if self.running() == 0 {
            self.bell.ring();
        }
    }

    /// The streams to be saved: the controller's, then those of its channels, by index. Each can be
    /// written once; the next call gives them anew. The channels are being saved as long as they exist.
    ///
    /// # Errors
    /// [`ControllerError::Running`] while some request is; [`ControllerError::Channel`] while streams of
    /// another call exist; [`ControllerError::Format`].
    pub fn streams(&self, options: &SaveOptions) -> Result<Vec<SavedStream>, ControllerError> {
        let requests = self.running();
        if requests > 0 {
            return Err(ControllerError::Running { requests });
        }
        self.hold.streams(options, self.channels.iter().map(Frozen::channel))
    }

    /// Lets the controller go on as if nothing had happened.
    pub fn thaw(self) {
        drop(self);
    }

    /// Ends the controller here, because it goes on elsewhere: what is in flight is forgotten, and the
    /// guest learns nothing. What is left of it can only be dropped.
    pub fn move_away(self) {
        let Self { channels, bell: _, hold } = self;
        channels.into_iter().for_each(Frozen::move_away);
        drop(hold);
    }
}

impl AsFd for FrozenController {
    /// Readable when something has settled: look at [`Self::running`], or [`Self::wait`] for a duration
    /// of zero, which makes it unreadable.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.event.as_fd()
    }
}

impl fmt::Debug for FrozenController {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrozenController")
            .field("channels", &self.channels)
            .field("running", &self.running())
            .finish_non_exhaustive()
    }
}

/// A controller that is paused or about to be: requests in flight are completed, and no new ones come.
/// Goes on when dropped.
#[must_use = "a controller that is not kept paused goes on at once"]
pub struct PausedController {
    channels: Vec<Channel>,
    hold: Hold,
}

impl PausedController {
    /// Pauses the subchannels once the primary channel is paused.
    fn go_on_pausing(&mut self) {
        if self.channels.len() == 1 && self.channels.first().is_some_and(is_paused) {
            let lanes = self.hold.core.read_lanes();
            let others: Vec<Channel> =
                lanes.present.iter().skip(1).map(|(channel, _)| channel.clone()).collect();
            drop(lanes);
            others.iter().for_each(Channel::begin_pause);
            self.channels.extend(others);
        }
    }

    /// Channels that are not paused yet, and requests in flight on channels that are closing. While
    /// there are some the controller cannot be saved.
    #[must_use]
    pub fn pending(&mut self) -> u32 {
        self.go_on_pausing();
        let channels = self.channels.iter().filter(|channel| !is_paused(channel)).count();
        u32::try_from(channels).unwrap_or(u32::MAX).saturating_add(self.hold.retired())
    }

    /// Waits until everything is paused, or `limit` is over; returns whether it is. Looks after the
    /// disks' completions meanwhile; somebody else has to drive the channels.
    #[must_use]
    pub fn wait(&mut self, limit: Option<Duration>) -> bool {
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            if self.pending() == 0 {
                return true;
            }
            let left = until.map_or(NAP, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return false;
            }
            self.hold.turn(None, left.min(Duration::from_millis(1)));
        }
    }

    /// As [`FrozenController::streams`].
    ///
    /// # Errors
    /// As there; [`ControllerError::Running`] counts channels that are not paused.
    pub fn streams(&mut self, options: &SaveOptions) -> Result<Vec<SavedStream>, ControllerError> {
        let requests = self.pending();
        if requests > 0 {
            return Err(ControllerError::Running { requests });
        }
        self.hold.streams(options, self.channels.iter())
    }

    /// Lets the controller go on.
    pub fn resume(self) {
        drop(self);
    }
}

impl Drop for PausedController {
    fn drop(&mut self) {
        self.channels.iter().for_each(Channel::start);
    }
}

impl fmt::Debug for PausedController {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PausedController").field("channels", &self.channels).finish_non_exhaustive()
    }
}

/// Whether nothing is in flight on a channel, and nothing will be before it is started.
fn is_paused(channel: &Channel) -> bool {
    use ChannelState::{Closed, Disabled, Enabled, Paused};
    matches!(channel.state(), Disabled | Enabled | Paused | Closed)
}

impl Core {
    /// Something of `channel` has ended or was handed over.
    pub(super) fn has_settled(&self, channel: &Channel) {
        if !self.is_held() || channel.is_frozen() {
            return; // a frozen channel rings by itself
        }
        let bell = lock(&self.bell).clone();
        if let Some(bell) = bell {
            bell.ring();
        }
    }
}
