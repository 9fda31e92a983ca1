//! Send one packet, wait for its answer.
//!
//! The only place of the library that looks at a clock, and only for a caller who waits with a limit.
//!
//! Source: kmcl-semantics section 10; D-48, D-49.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use vmbus_ring::packet_ring_bytes;
use vmbus_wire::ranges::GpaRange;
use vmbus_wire::status::NtStatus;

use crate::callbacks::PacketCompletion;
use crate::channel::{Channel, lock};
use crate::error::Error;
use crate::events::Watch;
use crate::flags::SendFlags;
use crate::incoming::Level;
use crate::lifecycle::Side;
use crate::packet::Packet;

/// How long a synchronous request waits. The convention of KeWaitForSingleObject, spelled out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Timeout {
    /// No limit (no time-out given).
    Never,
    /// Do not wait at all (0): the packet goes into the ring now or fails.
    Immediate,
    /// So long from now (negative values).
    After(Duration),
    /// Until then (positive values).
    At(SystemTime),
}

impl Timeout {
    fn deadline(self) -> Option<Instant> {
        let now = Instant::now();
        match self {
            Self::Never => None,
            Self::Immediate => Some(now),
            Self::After(limit) => now.checked_add(limit),
            Self::At(time) => {
                now.checked_add(time.duration_since(SystemTime::now()).unwrap_or_default())
            }
        }
    }
}

/// Packets that a waiting caller processes at a time where nobody else drives the channel.
const BUDGET: u32 = 64;

/// Waits in somebody's stead; the packet's completion routine.
#[derive(Default)]
struct Waiter {
    answer: Mutex<Option<(NtStatus, Vec<u8>)>>,
}

impl PacketCompletion for Waiter {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        *lock(&self.answer) = Some((status, payload.to_vec()));
        packet.channel().shared.mailbox.notify();
    }
}

impl Channel {
    /// Sends `message` and waits until it is in the ring, or, with
    /// [`SendFlags::WAIT_FOR_COMPLETION`], until the peer has completed it. The answer goes into
    /// `completion`; its length in bytes is returned.
    ///
    /// Where nobody drives the channel, or inside `post_started`, the caller processes packets itself
    /// while it waits. Not in `started`, nor in a packet callback.
    ///
    /// # Errors
    /// [`Error::Argument`] 7 for a completion buffer whose size is not a multiple of 8, and on a
    /// server 8 for a time-out other than [`Timeout::Immediate`] or 5 for a transaction (D-48);
    /// [`Error::RingFull`] with [`Timeout::Immediate`] where there is no room; [`Error::Cancelled`]
    /// when the time is over; [`Error::Removed`] when the channel goes down;
    /// [`Error::BufferTooSmall`] for an answer larger than the buffer; [`Error::State`] where it
    /// could never return; and those of [`Packet::send`].
    ///
    /// Source: VmbChannelSendSynchronousRequest.
    pub fn send_synchronous_request(
        &self,
        message: &[u8],
        external: Option<&[GpaRange<'_>]>,
        flags: SendFlags,
        completion: Option<&mut [u8]>,
        timeout: Timeout,
    ) -> Result<usize, Error> {
        let transaction = flags.contains(SendFlags::WAIT_FOR_COMPLETION);
        let room = completion.as_ref().map_or(0, |buffer| buffer.len());
        if !room.is_multiple_of(8) {
            let value = room as u64;
            return Err(Error::Argument { position: 7, name: "CompletionBufferSize", value });
        }
        if self.side() == Side::Server {
            if timeout != Timeout::Immediate {
                return Err(Error::Argument { position: 8, name: "Timeout", value: 0 });
            }
            if transaction {
                let value = u64::from(flags.bits());
                return Err(Error::Argument { position: 5, name: "Flags", value });
            }
        }
        if self.in_packet_callback() || (self.in_control_callback() && !self.queue_is_on()) {
            let state = self.state();
            return Err(Error::State { function: "send_synchronous_request", state });
        }
        if timeout == Timeout::Immediate {
            self.must_have_room(message, external)?;
        }

        let deadline = timeout.deadline();
        let waiter = Arc::new(Waiter::default());
        let mut packet = self.packet_allocate().ok_or(Error::Resources("packet objects"))?;
        let tag = self.shared.tags.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        packet.set_completion_routine(Arc::clone(&waiter) as _);
        if let Some(body) = packet.body_mut() {
            body.tag = tag;
        }
        packet.send(message, external, flags).map_err(|refused| refused.error)?;
        let (status, answer) = self.await_completion(&waiter, tag, deadline);
        match status {
            NtStatus::SUCCESS => {}
            NtStatus::DEVICE_REMOVED => return Err(Error::Removed { state: self.state() }),
            _ => return Err(Error::Cancelled),
        }
        let Some(buffer) = completion else { return Ok(0) };
        match buffer.get_mut(..answer.len()) {
            Some(buffer) => buffer.copy_from_slice(&answer),
            None => {
                let bytes = |len| u32::try_from(len).unwrap_or(u32::MAX);
                return Err(Error::BufferTooSmall {
                    needed: bytes(answer.len()),
                    given: bytes(room),
                });
            }
        }
        Ok(answer.len())
    }

    fn must_have_room(
        &self,
        message: &[u8],
        external: Option<&[GpaRange<'_>]>,
    ) -> Result<(), Error> {
        self.may_send(message.len())?;
        let words =
            external.map_or(0, |ranges| 1 + ranges.iter().map(GpaRange::words).sum::<usize>());
        let bytes = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let message = message.len() + self.shared.bounds.header_len();
        let needed = packet_ring_bytes(bytes(words.saturating_mul(8)), bytes(message));
        match self.traffic().has_room(needed) {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(Error::RingFull { needed }),
        }
    }

    fn await_completion(
        &self,
        waiter: &Waiter,
        tag: u64,
        deadline: Option<Instant>,
    ) -> (NtStatus, Vec<u8>) {
        let mut watch = None;
        loop {
            let seen = self.shared.mailbox.rung();
            if let Some(answer) = lock(&waiter.answer).take() {
                return answer;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return self.give_up(waiter, tag, NtStatus::CANCELLED);
            }
            let inside = self.in_control_callback();
            // Inside a callback the end of the channel waits for the callback; a channel that has
            // stopped reads no answer any more.
            if (inside && self.is_ending()) || self.is_stopped() {
                return self.give_up(waiter, tag, NtStatus::DEVICE_REMOVED);
            }
            if !inside && self.shared.mailbox.has_driver() {
                watch = None;
                self.shared.mailbox.wait(seen, left);
                continue;
            }
            // Nobody else sees the doorbell.
            self.acknowledge();
            self.drive_unless_driven();
            if self.process_data(Level::Passive, BUDGET).packets != 0 {
                continue;
            }
            match &watch {
                Some(watch) => {
                    let watch: &Watch<'_> = watch;
                    watch.sleep(self.shared.doorbell.event.existing(), left);
                }
                // Another waiter watches, and tells everybody when something has happened.
                None => match self.shared.mailbox.watch() {
                    None => self.shared.mailbox.wait(seen, left),
                    taken => watch = taken,
                },
            }
        }
    }

    /// Takes the packet back; what has come at the last moment counts.
    fn give_up(&self, waiter: &Waiter, tag: u64, status: NtStatus) -> (NtStatus, Vec<u8>) {
        let body = {
            let mut traffic = self.traffic();
            traffic.withdraw(tag).or_else(|| traffic.abandon(tag))
        };
        if let Some(body) = body {
            self.traffic().free_packet(body);
            return (status, Vec::new());
        }
        // Neither queued nor in flight: its routine has run, or runs on another thread now.
        loop {
            let seen = self.shared.mailbox.rung();
            if let Some(answer) = lock(&waiter.answer).take() {
                return answer;
            }
            self.shared.mailbox.wait(seen, None);
        }
    }
}
