//! The requests in flight: a fixed number of slots, so that a request costs no allocation, each
//! with a count of its uses, so that a ticket for an earlier use finds nothing.

/// Names one use of one slot. Fits a word, which a packet carries through the library.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Ticket {
    slot: u16,
    uses: u32,
}

impl Ticket {
    /// The ticket as a word.
    pub(crate) fn to_word(self) -> usize {
        (self.uses as usize) << 16 | usize::from(self.slot)
    }

    /// The ticket that [`Self::to_word`] gave.
    #[expect(clippy::cast_possible_truncation, reason = "takes the two parts of the word apart")]
    pub(crate) fn from_word(word: usize) -> Self {
        Self { slot: word as u16, uses: (word >> 16) as u32 }
    }
}

const _: () = assert!(size_of::<usize>() == 8, "a ticket is 48 bits");

struct Slot<T> {
    uses: u32,
    value: Option<T>,
}

/// See the module.
pub(crate) struct Table<T> {
    slots: Box<[Slot<T>]>,
    free: Vec<u16>,
}

impl<T> Table<T> {
    /// A table of `slots` slots.
    pub(crate) fn new(slots: u16) -> Self {
        Self {
            slots: (0..slots).map(|_| Slot { uses: 0, value: None }).collect(),
            free: (0..slots).rev().collect(),
        }
    }

    /// Puts `value` into a free slot, or hands it back when there is none.
    pub(crate) fn insert(&mut self, value: T) -> Result<Ticket, T> {
        let Some(index) = self.free.pop() else { return Err(value) };
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return Err(value) };
        slot.value = Some(value);
        Ok(Ticket { slot: index, uses: slot.uses })
    }

    /// Takes what `ticket` names, once.
    pub(crate) fn take(&mut self, ticket: Ticket) -> Option<T> {
        let slot = self.slots.get_mut(usize::from(ticket.slot))?;
        if slot.uses != ticket.uses {
            return None;
        }
        let value = slot.value.take()?;
        slot.uses = slot.uses.wrapping_add(1);
        self.free.push(ticket.slot);
        Some(value)
    }

    /// What `ticket` names.
    pub(crate) fn get(&self, ticket: Ticket) -> Option<&T> {
        let slot = self.slots.get(usize::from(ticket.slot))?;
        slot.value.as_ref().filter(|_| slot.uses == ticket.uses)
    }

    /// Takes any value, as long as there is one.
    pub(crate) fn take_any(&mut self) -> Option<T> {
        let (index, slot) = self.slots.iter().enumerate().find(|(_, slot)| slot.value.is_some())?;
        let ticket = Ticket { slot: u16::try_from(index).ok()?, uses: slot.uses };
        self.take(ticket)
    }

    /// Slots in use.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_ticket_is_good_once() {
        let mut table = Table::new(2);
        let a = table.insert('a').unwrap();
        let b = table.insert('b').unwrap();
        assert_eq!(table.insert('c'), Err('c'));
        assert_eq!(table.take(a), Some('a'));
        assert_eq!(table.take(a), None);
        let c = table.insert('c').unwrap();
        assert_eq!(table.take(a), None, "the slot is in use again, by another request");
        assert_eq!((table.take(c), table.take(b)), (Some('c'), Some('b')));
        assert_eq!(table.len(), 0);
        assert_eq!(table.take(Ticket { slot: 7, uses: 0 }), None);
    }

    #[test]
    fn a_ticket_survives_as_a_word() {
        for (slot, uses) in [(0, 0), (u16::MAX, u32::MAX), (5, 1 << 31)] {
            let ticket = Ticket { slot, uses };
            assert_eq!(Ticket::from_word(ticket.to_word()), ticket);
        }
    }

    proptest! {
        /// Every value put in comes out exactly once, whatever the order, and never more are in than
        /// there are slots.
        #[test]
        fn every_value_comes_out_once(slots in 0u16..8, actions: Vec<(bool, u8)>) {
            let mut table = Table::new(slots);
            let mut inside = HashMap::new();
            let mut used = Vec::new();
            for (value, (insert, choice)) in actions.into_iter().enumerate() {
                if insert {
                    match table.insert(value) {
                        Ok(ticket) => { inside.insert(value, ticket); }
                        Err(_) => prop_assert_eq!(inside.len(), usize::from(slots)),
                    }
                } else if let Some((&value, &ticket)) =
                    inside.iter().nth(usize::from(choice) % inside.len().max(1))
                {
                    prop_assert_eq!(table.take(ticket), Some(value));
                    inside.remove(&value);
                    used.push(ticket);
                }
                prop_assert_eq!(table.len(), inside.len());
                prop_assert!(used.iter().all(|ticket| !inside.values().any(|other| other == ticket)));
            }
            while let Some(value) = table.take_any() {
                prop_assert!(inside.remove(&value).is_some());
            }
            prop_assert!(inside.is_empty());
        }
    }
}
