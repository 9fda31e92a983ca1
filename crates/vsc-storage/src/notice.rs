//! What a server says without being asked.

use std::collections::VecDeque;

use vstor_wire::packet::Operation;

/// Most notices that wait to be read. More of the same kind in a row count as one, so that nothing is
/// lost by a bound this small: every notice says "look again".
pub(crate) const MAX_NOTICES: usize = 16;

/// Something has changed on the controller.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Notice {
    /// LUNs have come or gone: scan again.
    EnumerateBus,
    /// A LUN was removed: scan again.
    RemoveDevice,
    /// An event on a LUN.
    Event,
}

impl Notice {
    /// The notice in the payload of a packet, or `None` for a packet that says nothing a client
    /// understands.
    ///
    /// Source: devices, section 1: an unsolicited packet has at least the four bytes of its operation.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let operation = payload.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))?;
        match Operation::from_raw(operation) {
            Operation::ENUMERATE_BUS => Some(Self::EnumerateBus),
            Operation::REMOVE_DEVICE => Some(Self::RemoveDevice),
            Operation::EVENT_NOTIFICATION => Some(Self::Event),
            _ => None,
        }
    }
}

/// Notices that wait to be read, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Notices(VecDeque<Notice>);

impl Notices {
    /// Adds `notice`; a repetition of the last one is that one.
    pub(crate) fn push(&mut self, notice: Notice) {
        if self.0.back() == Some(&notice) {
            return;
        }
        if self.0.len() == MAX_NOTICES {
            self.0.pop_front(); // the newer one says "look again" as well
        }
        self.0.push_back(notice);
    }

    /// The oldest notice.
    pub(crate) fn pop(&mut self) -> Option<Notice> {
        self.0.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_are_told_from_other_packets() {
        for (payload, expected) in [
            (&[11, 0, 0, 0, 0, 0, 0, 0][..], Some(Notice::EnumerateBus)),
            (&[2, 0, 0, 0], Some(Notice::RemoveDevice)),
            (&[14, 0, 0, 0, 9, 9], Some(Notice::Event)),
            (&[3, 0, 0, 0], None),
            (&[11, 0, 0, 1], None),
            (&[11, 0, 0], None),
            (&[], None),
        ] {
            assert_eq!(Notice::parse(payload), expected, "{payload:?}");
        }
    }

    #[test]
    fn a_flood_of_notices_stays_bounded_and_ends_with_the_newest() {
        let mut notices = Notices::default();
        for _ in 0..1000 {
            notices.push(Notice::EnumerateBus);
        }
        assert_eq!((notices.pop(), notices.pop()), (Some(Notice::EnumerateBus), None));
        for _ in 0..1000 {
            notices.push(Notice::EnumerateBus);
            notices.push(Notice::RemoveDevice);
        }
        let read: Vec<_> = std::iter::from_fn(|| notices.pop()).collect();
        assert_eq!(read.len(), MAX_NOTICES);
        assert_eq!(read.last(), Some(&Notice::RemoveDevice));
    }
}
