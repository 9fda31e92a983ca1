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
/// [`Channel::disable`] thaws the channel first.
#[derive(Debug)]
#[must_use = "a channel that is not kept frozen thaws at once"]
pub struct Frozen {
    channel: Channel,
}

impl Channel {
    /// Freezes the channel of a server endpoint: see [`Frozen`]. The device is told
    /// ([`ProcessPacket::freeze`](crate::ProcessPacket::freeze)), on this thread. Waits for a callback
    /// that runs, and for nothing else.
    ///
    /// # Errors
    /// [`Error::State`] for a client's channel, one that is Disabled, frozen or being saved, and
    /// inside a callback.
    pub fn freeze(&self) -> Result<Frozen, Error> {
        let wrong = || Error::State { function: "freeze", state: self.state() };
        if self.side() != Side::Server || self.in_packet_callback() {
            return Err(wrong());
        }
        let stepping = Stepping::wait(self).ok_or_else(wrong)?;
        if self.state() == ChannelState::Disabled || !self.shared.hold.freeze() {
            return Err(wrong());
        }
        self.set_queue_on(false);
        self.with_line(|traffic, line| traffic.freeze(line));
        let process = self.settings().process_packet;
        let frozen = Frozen { channel: self.clone() };
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

    /// Ends the freeze, and the save with it.
    fn thaw(&self) {
        let Some(stepping) = Stepping::wait(self) else { return };
        if !self.shared.hold.thaw() {
            return;
        }
        let process = self.settings().process_packet;
        if let Some(process) = process {
            process.thaw(self);
        }
        self.resume_traffic();
        if self.state() == ChannelState::Active {
            self.set_queue_on(true);
        }
        drop(stepping);
        self.drive_unless_driven();
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
        if self.shared.hold.end_save(None) {
            self.resume_traffic();
        }
        self.thaw();
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
    /// [`Error::State`] while another save is under way.
    pub fn save(&self) -> Result<ChannelSave, Error> {
        self.channel.save()
    }

    /// As [`Self::save`], in another version of the format or another program's name.
    ///
    /// # Errors
    /// As for [`Channel::save_with`].
    pub fn save_with(&self, options: &SaveOptions) -> Result<ChannelSave, Error> {
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
    pub fn move_away(self) {
        let channel = &self.channel;
        let Some(_stepping) = Stepping::wait(channel) else { return };
        if channel.shared.hold.thaw() {
            channel.step(Event::MovedAway);
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.channel.thaw();
    }
}
