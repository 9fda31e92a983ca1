//! Freezing a channel: its traffic stops where it is, with packets in flight in both directions.
//!
//! An extension beside the documented pause, which lets every delivered packet be completed first and
//! so takes as long as the device's slowest request.
//!
//! ```text
//!            freeze                    running() == 0
//!   at work ────────▶ frozen, settling ──────────────▶ frozen, settled ──▶ save(), again and again
//!      ▲                    │ thaw                          │      │
//!      └────────────────────┴───────────────────────────────┘      └─▶ move_away(): goes on elsewhere
//! ```

use std::task::Waker;
use std::time::{Duration, Instant};

use crate::channel::Channel;
use crate::control::Stepping;
use crate::error::{ChannelError, Error};
use crate::lifecycle::{ChannelState, Event, Side};
use crate::save::{ChannelSave, SaveOptions};

/// A frozen channel. Thaws when dropped.
///
/// From [`Channel::freeze`] on no packet is delivered, no completion leaves, nothing is sent, and
/// life-cycle events wait. Packets that the device has are *running* until it completes them, which
/// is held, or [hands them over](crate::Fenced::hand_over). When none is running the channel can be
/// saved ([`Frozen::save`]).
///
/// [`Channel::disable`] thaws the channel first, and leaves this without a meaning: nothing is saved or
/// moved with it any more. [`Channel::pause`] only leaves word, and returns: the channel is paused
/// after it has thawed.
#[derive(Debug)]
#[must_use = "a channel that is not kept frozen thaws at once"]
pub struct Frozen {
    channel: Channel,
    /// Which freeze of the channel it is.
    number: u64,
}

impl Channel {
    /// Freezes the channel of a server endpoint: see [`Frozen`]. The device is told
    /// ([`ProcessPacket::freeze`](crate::ProcessPacket::freeze)), on this thread. Waits for a callback
    /// that runs, and for nothing else.
    ///
    /// # Errors
    /// [`Error::State`] for a client's channel, one that is Disabled, frozen, being saved or restored,
    /// and inside a callback.
    pub fn freeze(&self) -> Result<Frozen, Error> {
        let wrong = || Error::State { function: "freeze", state: self.state() };
        let stepping = self.stepping().ok_or_else(wrong)?;
        if self.side() != Side::Server
            || self.state() == ChannelState::Disabled
            || self.is_being_restored()
        {
            return Err(wrong());
        }
        let number = self.shared.hold.freeze().ok_or_else(wrong)?;
        self.set_queue_on(false);
        self.with_line(|traffic, line| traffic.freeze(line));
        let process = self.settings().process_packet;
        let frozen = Frozen { channel: self.clone(), number };
        if let Some(process) = process {
            process.freeze(self);
        }
        drop(stepping);
        Ok(frozen)
    }

    /// Whether the channel is frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.shared.hold.is_frozen()
    }

    /// Ends that freeze, and the save with it; inside a callback of this very channel, which is one
    /// that saves a packet, once that has returned.
    pub(crate) fn thaw(&self, number: u64) {
        match self.stepping() {
            Some(stepping) => {
                let thawed = self.thaw_as(&stepping, Some(number));
                drop(stepping);
                if thawed {
                    self.drive_unless_driven();
                }
            }
            None => self.shared.hold.thaw_later(number),
        }
    }

    /// Whoever has the right to step thaws the channel; `false` if it is not frozen like that.
    fn thaw_as(&self, _right: &Stepping<'_>, number: Option<u64>) -> bool {
        if !self.shared.hold.thaw(number) {
            return false;
        }
        let process = self.settings().process_packet;
        if let Some(process) = process {
            process.thaw(self);
        }
        self.resume_traffic();
        if self.state() == ChannelState::Active {
            self.set_queue_on(true);
        }
        true
    }

    /// Lets traffic go on that was made to stand still.
    pub(crate) fn resume_traffic(&self) {
        let (consequences, ring, written) = self.with_line(|traffic, line| traffic.go_on(line));
        ring.give();
        if let Err(error) = written {
            self.stop(ChannelError::Outgoing(error));
        }
        self.follow(consequences);
        self.flush_outgoing();
        self.kick();
    }

    /// What keeps the channel as it is, ends: its user wants it disabled.
    pub(crate) fn end_hold(&self) {
        if !self.shared.hold.is_held() {
            return;
        }
        let Some(stepping) = self.stepping() else { return };
        if self.shared.hold.end_save(None) {
            self.resume_traffic();
        }
        self.thaw_as(&stepping, None);
    }
}

impl Frozen {
    /// The channel.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Packets that the device has and has neither completed nor handed over.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.channel.traffic().running()
    }

    /// Waits until nothing is running, or `limit` is over; returns whether nothing is.
    #[must_use]
    pub fn wait(&self, limit: Option<Duration>) -> bool {
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            let seen = self.channel.shared.mailbox.rung();
            if self.running() == 0 {
                return true;
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            self.channel.shared.mailbox.wait(seen, left);
        }
    }

    /// Has `waker` woken when nothing is running any more; at once if that is so.
    pub fn notify(&self, waker: Waker) {
        self.channel.shared.hold.set_waker(Some(waker));
        if self.running() == 0 {
            self.channel.shared.hold.wake();
        }
    }

    /// Begins a save: [`Channel::save`].
    ///
    /// # Errors
    /// [`Error::Running`] while the device has packets that it has neither completed nor handed over;
    /// [`Error::State`] while another save is under way, and once the channel was disabled.
    pub fn save(&self) -> Result<ChannelSave, Error> {
        self.save_with(&SaveOptions::default())
    }

    /// As [`Self::save`], in another version of the format or another program's name.
    ///
    /// # Errors
    /// As for [`Self::save`], and [`Error::Format`].
    pub fn save_with(&self, options: &SaveOptions) -> Result<ChannelSave, Error> {
        if !self.channel.shared.hold.is_frozen_as(self.number) {
            return Err(Error::State { function: "save", state: self.channel.state() });
        }
        self.channel.save_with(options)
    }

    /// Lets the channel go on as if nothing had happened: completions that were held leave, and packets
    /// that were handed over come to the device again.
    pub fn thaw(self) {
        drop(self);
    }

    /// Ends the channel here, because it goes on elsewhere: completions that were held, packets that
    /// were handed over, and the driver's packets in flight are forgotten; no callback runs, and the
    /// peer learns nothing. The channel is Disabled then.
    ///
    /// What the state does not have is lost with it: packets that the driver sent after the last save
    /// began, and those that are still running. Completing these later does nothing.
    pub fn move_away(self) {
        let channel = &self.channel;
        let Some(stepping) = channel.stepping() else { return };
        if channel.shared.hold.thaw(Some(self.number)) {
            channel.step(Event::MovedAway);
        }
        drop(stepping);
        channel.drive_unless_driven();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.channel.shared.hold.is_frozen_as(self.number) {
            self.channel.thaw(self.number);
        }
    }
}
