//! Messages on their way to the guest.
//!
//! A message slot holds one message; the next has to wait until the guest has emptied it. Messages
//! to one slot leave in the order in which they were queued; a slot that a guest does not empty holds
//! up no other one.
//!
//! Source: vmbus-wire section 1.

use std::collections::VecDeque;

use vmbus_wire::message::{HostMessage, MessageBuffer};

use crate::limits::MAX_OUTGOING_MESSAGES;

/// A message slot of the guest.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SlotId {
    /// VP index.
    pub vp: u32,
    /// SINT of that VP, 0 to 15.
    pub sint: u8,
}

impl SlotId {
    /// Where messages go that no guest has asked to have elsewhere: VP 0, SINT 2.
    pub const DEFAULT: Self = Self { vp: 0, sint: VMBUS_SINT };
}

/// The SINT of VMBus, for messages and for events.
pub const VMBUS_SINT: u8 = 2;

/// A message that waits for its slot.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OutgoingMessage {
    /// Names it towards [`Host::message_taken`](crate::Host::message_taken).
    pub serial: u64,
    /// Where it goes.
    pub slot: SlotId,
    /// The payload, 240 bytes at most.
    pub message: MessageBuffer,
    /// It answers a message about a reserved channel: neither PAUSE nor UNLOAD holds it up, since a
    /// crashed guest waits for it.
    pub(crate) for_reserved: bool,
}

/// The messages that wait.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Outgoing {
    pub(crate) queue: VecDeque<OutgoingMessage>,
    /// The last number given to a message.
    pub(crate) serials: u64,
    /// While the guest has paused the connection: as many from the front may still leave.
    pub(crate) before_pause: Option<usize>,
}

impl Outgoing {
    pub(crate) fn push(&mut self, slot: SlotId, message: &HostMessage, for_reserved: bool) {
        let mut buffer = MessageBuffer::new();
        message.encode(&mut buffer);
        self.serials += 1;
        let serial = self.serials;
        self.queue.push_back(OutgoingMessage { serial, slot, message: buffer, for_reserved });
    }

    /// The first message that may leave and does not go to one of `full`.
    pub(crate) fn next(&self, full: &[SlotId]) -> Option<&OutgoingMessage> {
        let allowed = |index: usize| self.before_pause.is_none_or(|count| index < count);
        let mut messages = self.queue.iter().enumerate();
        messages
            .find(|(index, message)| {
                (allowed(*index) || message.for_reserved) && !full.contains(&message.slot)
            })
            .map(|(_, message)| message)
    }

    /// Forgets a message, if it still waits.
    pub(crate) fn taken(&mut self, serial: u64) {
        let Ok(index) = self.queue.binary_search_by_key(&serial, |message| message.serial) else {
            return;
        };
        self.queue.remove(index);
        if let Some(count) = &mut self.before_pause
            && index < *count
        {
            *count -= 1;
        }
    }

    /// Holds back what is queued from now on.
    pub(crate) fn pause(&mut self) {
        self.before_pause = Some(self.queue.len());
    }

    pub(crate) fn resume(&mut self) {
        self.before_pause = None;
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.before_pause.is_some()
    }

    /// The guest has said that it listens to nothing that waits; `keep_reserved`: other than answers
    /// about reserved channels.
    pub(crate) fn clear(&mut self, keep_reserved: bool) {
        self.before_pause = None;
        self.queue.retain(|message| keep_reserved && message.for_reserved);
    }

    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    /// What is wrong with the queue, if anything.
    pub(crate) fn violations(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.queue.len() > MAX_OUTGOING_MESSAGES {
            wrong.push(format!("{} messages wait", self.queue.len()));
        }
        if self.before_pause.is_some_and(|count| count > self.queue.len()) {
            wrong.push(format!("{:?} of {} wait", self.before_pause, self.queue.len()));
        }
        if !self.queue.iter().is_sorted_by(|a, b| a.serial < b.serial) {
            wrong.push("messages out of order".into());
        }
        wrong
    }
}
