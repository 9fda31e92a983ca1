//! Messages on their way to the host: in order, one at a time, posted again when the host was short
//! of buffers.

use std::collections::VecDeque;
use std::fmt;

use vmbus_wire::message::MessageBuffer;

/// How often in a row a message may be refused for want of buffers before the host counts as gone.
///
/// Source: vmbus-wire section 2 (what Linux does).
pub const MAX_POST_ATTEMPTS: u32 = 100;

/// Messages that may wait to be posted when a further GPADL is described. The messages that close
/// and release things are not counted against it: their number is bounded by that of the things.
pub const MAX_QUEUED_MESSAGES: usize = 2048;

/// What the host answers to a posted message: the status of HvPostMessage. Any value may come.
///
/// Source: vmbus-wire section 2, "Post status codes".
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct PostStatus(pub u16);

impl PostStatus {
    /// The host has the message.
    pub const SUCCESS: Self = Self(0);
    /// The host was short of memory; worth another try.
    pub const INSUFFICIENT_MEMORY: Self = Self(11);
    /// There is no such connection, or not yet.
    pub const INVALID_CONNECTION_ID: Self = Self(18);
    /// The host's queue is full; worth another try.
    pub const INSUFFICIENT_BUFFERS: Self = Self(19);

    /// Whether the same message may be taken later.
    #[must_use]
    pub const fn is_temporary(self) -> bool {
        matches!(
            self,
            Self::INSUFFICIENT_MEMORY | Self::INVALID_CONNECTION_ID | Self::INSUFFICIENT_BUFFERS
        )
    }
}

impl fmt::Display for PostStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "post status {}", self.0)
    }
}

/// What a message is about, so that its answer, or its being withdrawn, finds what waits for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Tag {
    /// INITIATE_CONTACT.
    Contact,
    /// UNLOAD.
    Unload,
    /// One of a GPADL's messages: header, body, teardown.
    Gpadl(u32),
    /// MODIFY_CHANNEL.
    Modify(u32),
    /// REL_ID_RELEASED.
    Release(u32),
    /// Needs nothing further.
    Plain,
    /// In flight when what it was about came to an end.
    Stale,
}

#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    pub(crate) tag: Tag,
    pub(crate) message: MessageBuffer,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Outgoing>,
    in_flight: Option<Outgoing>,
    /// The message at the front was refused `attempts` times; nothing is posted until `resume`.
    backing_off: bool,
    attempts: u32,
}

impl Outbox {
    pub(crate) fn push(&mut self, tag: Tag, message: MessageBuffer) {
        self.queue.push_back(Outgoing { tag, message });
    }

    /// Messages that wait, the one in flight included.
    pub(crate) fn len(&self) -> usize {
        self.queue.len() + usize::from(self.in_flight.is_some())
    }

    /// Messages with `tag` that the host was not given yet, or has refused.
    pub(crate) fn waiting(&self, tag: Tag) -> usize {
        self.queue.iter().filter(|waiting| waiting.tag == tag).count()
    }

    /// The message to post now, if the way is free.
    pub(crate) fn next(&mut self) -> Option<Outgoing> {
        if self.in_flight.is_some() || self.backing_off {
            return None;
        }
        self.in_flight = self.queue.pop_front();
        self.in_flight.clone()
    }

    /// The host took the message in flight, or will never take it.
    pub(crate) fn settle(&mut self) -> Option<Tag> {
        self.attempts = 0;
        self.in_flight.take().map(|sent| sent.tag)
    }

    /// What is in flight.
    pub(crate) fn in_flight(&self) -> Option<Tag> {
        self.in_flight.as_ref().map(|sent| sent.tag)
    }

    /// The host had no buffer: puts the message back, and counts. A stale one is not worth it.
    pub(crate) fn refuse(&mut self) -> Refused {
        self.attempts += 1;
        match self.in_flight.take() {
            Some(Outgoing { tag: Tag::Stale, .. }) | None => Refused::Dropped,
            Some(sent) if self.attempts < MAX_POST_ATTEMPTS => {
                let tag = sent.tag;
                self.queue.push_front(sent);
                self.backing_off = true;
                Refused::Again { tag, attempt: self.attempts }
            }
            Some(_) => Refused::GivenUp { attempts: self.attempts },
        }
    }

    /// Ends the waiting after a refusal.
    pub(crate) fn resume(&mut self) {
        self.backing_off = false;
    }

    /// Withdraws the messages with `tag`.
    pub(crate) fn withdraw(&mut self, tag: Tag) {
        self.queue.retain(|waiting| waiting.tag != tag);
        if let Some(sent) = &mut self.in_flight
            && sent.tag == tag
        {
            sent.tag = Tag::Stale;
        }
    }

    /// Withdraws everything: the connection the messages belong to is over. The answer to the one
    /// in flight still comes, unless the transport itself is gone.
    pub(crate) fn clear(&mut self, transport_is_gone: bool) {
        self.queue.clear();
        self.backing_off = false;
        self.attempts = 0;
        if transport_is_gone {
            self.in_flight = None;
        } else if let Some(sent) = &mut self.in_flight {
            sent.tag = Tag::Stale;
        }
    }
}

/// What becomes of a message that the host had no buffer for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Refused {
    /// It goes out again after a while.
    Again { tag: Tag, attempt: u32 },
    /// It was stale.
    Dropped,
    /// It was refused too often.
    GivenUp { attempts: u32 },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(byte: u8) -> MessageBuffer {
        MessageBuffer::copy_from(&[byte; 8]).unwrap()
    }

    #[test]
    fn a_refused_message_keeps_its_place() {
        let mut outbox = Outbox::default();
        outbox.push(Tag::Release(1), buffer(1));
        outbox.push(Tag::Release(2), buffer(2));
        assert_eq!(outbox.next().map(|m| m.tag), Some(Tag::Release(1)));
        assert!(outbox.next().is_none(), "one at a time");
        assert_eq!(outbox.refuse(), Refused::Again { tag: Tag::Release(1), attempt: 1 });
        assert!(outbox.next().is_none(), "nothing goes out while backing off");
        outbox.resume();
        assert_eq!(outbox.next().map(|m| m.tag), Some(Tag::Release(1)));
        assert_eq!(outbox.settle(), Some(Tag::Release(1)));
        assert_eq!(outbox.next().map(|m| m.tag), Some(Tag::Release(2)));
        assert_eq!(outbox.len(), 1);
    }

    #[test]
    fn refusals_in_a_row_are_bounded() {
        let mut outbox = Outbox::default();
        outbox.push(Tag::Plain, buffer(1));
        for attempt in 1..MAX_POST_ATTEMPTS {
            outbox.next().unwrap();
            assert_eq!(outbox.refuse(), Refused::Again { tag: Tag::Plain, attempt });
            outbox.resume();
        }
        outbox.next().unwrap();
        assert_eq!(outbox.refuse(), Refused::GivenUp { attempts: MAX_POST_ATTEMPTS });
    }

    #[test]
    fn withdrawn_messages_do_not_go_out_and_their_answers_mean_nothing() {
        let mut outbox = Outbox::default();
        for tag in [Tag::Gpadl(7), Tag::Gpadl(7), Tag::Plain, Tag::Gpadl(7)] {
            outbox.push(tag, buffer(1));
        }
        outbox.next().unwrap();
        assert_eq!(outbox.waiting(Tag::Gpadl(7)), 2);
        outbox.withdraw(Tag::Gpadl(7));
        assert_eq!(outbox.waiting(Tag::Gpadl(7)), 0);
        assert_eq!(outbox.settle(), Some(Tag::Stale));
        assert_eq!(outbox.next().map(|m| m.tag), Some(Tag::Plain));
        outbox.clear(false);
        assert_eq!(outbox.refuse(), Refused::Dropped);
        assert_eq!(outbox.len(), 0);
    }
}
