//! The outgoing packets that the peer has and has not completed, by their transaction id.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

use crate::packet::PacketBody;
use crate::settings::Limits;
use crate::traffic::Sent;

/// Transactions in flight. An id is a slot and how often the slot was used, so that an id that the
/// peer repeats, keeps or makes up finds nothing.
#[derive(Default)]
pub(crate) struct Transactions {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Free slots promised to queued packets.
    reserved: usize,
    /// Those that were begun before a restore: their ids were given elsewhere.
    restored: BTreeMap<u64, Box<PacketBody>>,
    /// Uses with which a new slot begins, so that no id from before a restore comes again.
    first_use: u32,
}

#[derive(Default)]
struct Slot {
    uses: u32,
    packet: Option<Box<PacketBody>>,
}

/// A place in the order in which transactions are saved: slots, then what a restore has brought.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    Slot(u32),
    Restored(u64),
}

impl Transactions {
    /// Promises a slot, or `None` at the bound.
    pub(crate) fn reserve(&mut self) -> Option<()> {
        if self.reserved == self.free.len() {
            let bound = (Limits::PACKETS as usize).saturating_sub(self.restored.len());
            let slot = u32::try_from(self.slots.len()).ok().filter(|_| self.slots.len() < bound)?;
            self.slots.push(Slot { uses: self.first_use, packet: None });
            self.free.push(slot);
        }
        self.reserved += 1;
        Some(())
    }

    pub(crate) fn unreserve(&mut self, transaction: bool) {
        self.reserved = self.reserved.saturating_sub(usize::from(transaction));
    }

    /// The id that the next transaction will have; 0 for a packet that is none.
    #[inline]
    pub(crate) fn next_id(&mut self, transaction: bool) -> u64 {
        let Some(&slot) = self.free.last().filter(|_| transaction) else { return 0 };
        let mut id = self.id(slot);
        // A saved state may say anything of how often slots were used. The id of a transaction that is
        // in flight is not given once more, whatever it says. Ends: there are fewer than uses.
        while !self.restored.is_empty() && self.restored.contains_key(&id) {
            if let Some(slot) = self.slots.get_mut(slot as usize) {
                slot.uses = slot.uses.wrapping_add(1);
            }
            id = self.id(slot);
        }
        id
    }

    fn id(&self, slot: u32) -> u64 {
        let uses = self.slots.get(slot as usize).map_or(0, |slot| slot.uses);
        u64::from(uses) << 32 | u64::from(slot + 1)
    }

    /// Puts a transaction just written into the slot whose id it was given.
    pub(crate) fn begin(&mut self, packet: Box<PacketBody>) -> Sent {
        if !packet.transaction {
            return Sent::Done(packet);
        }
        self.reserved = self.reserved.saturating_sub(1);
        let slot = self.free.pop().and_then(|slot| self.slots.get_mut(slot as usize));
        match slot {
            Some(slot) => {
                slot.packet = Some(packet);
                Sent::Kept
            }
            None => {
                debug_assert!(false, "a transaction was begun without a reservation");
                Sent::Done(packet)
            }
        }
    }

    /// The packet whose transaction the peer completes, or `None` for an id that is not in flight.
    pub(crate) fn end(&mut self, transaction_id: u64) -> Option<Box<PacketBody>> {
        self.end_slot(transaction_id).or_else(|| self.restored.remove(&transaction_id))
    }

    #[inline]
    fn end_slot(&mut self, transaction_id: u64) -> Option<Box<PacketBody>> {
        let uses = u32::try_from(transaction_id >> 32).ok()?;
        let index = u32::try_from(transaction_id & 0xffff_ffff).ok()?.checked_sub(1)?;
        let slot = self.slots.get_mut(index as usize).filter(|slot| slot.uses == uses)?;
        let packet = slot.packet.take()?;
        slot.uses = slot.uses.wrapping_add(1);
        self.free.push(index);
        Some(packet)
    }

    /// Takes the packet of a request that nobody waits for any more.
    pub(crate) fn abandon(&mut self, tag: u64) -> Option<Box<PacketBody>> {
        let slot = self
            .slots
            .iter()
            .position(|slot| slot.packet.as_ref().is_some_and(|packet| packet.tag == tag))?;
        let id = self.id(u32::try_from(slot).ok()?);
        self.end(id)
    }

    /// Every packet, for the end of the channel.
    pub(crate) fn take_all(&mut self) -> Vec<Box<PacketBody>> {
        self.reserved = 0;
        self.take_in_flight()
    }

    /// Every packet in flight; what is promised stays promised.
    pub(crate) fn take_in_flight(&mut self) -> Vec<Box<PacketBody>> {
        let mut packets = Vec::new();
        self.free.clear();
        for (slot, index) in self.slots.iter_mut().zip(0..) {
            self.free.push(index);
            if let Some(packet) = slot.packet.take() {
                slot.uses = slot.uses.wrapping_add(1);
                packets.push(packet);
            }
        }
        packets.extend(std::mem::take(&mut self.restored).into_values());
        packets
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.restored.len()
    }

    // ---- Saving and restoring ---------------------------------------------------------------------

    /// How often any one slot was used at most, here or before a restore.
    pub(crate) fn most_uses(&self) -> u32 {
        // One in flight has not been counted yet.
        let uses = |slot: &Slot| slot.uses.saturating_add(u32::from(slot.packet.is_some()));
        self.slots.iter().map(uses).fold(self.first_use, u32::max)
    }

    /// The first place behind `after` with a packet that is saved.
    pub(crate) fn next_saved(&self, after: Option<Place>) -> Option<Place> {
        let first_slot = match after {
            None => Some(0),
            Some(Place::Slot(slot)) => slot.checked_add(1),
            Some(Place::Restored(_)) => None,
        };
        let in_slot = first_slot.and_then(|first| {
            let rest = self.slots.get(first as usize..)?.iter().zip(first..);
            let mut saved = rest.filter(|(slot, _)| slot.packet.as_deref().is_some_and(is_saved));
            saved.next().map(|(_, slot)| Place::Slot(slot))
        });
        in_slot.or_else(|| {
            let bound = match after {
                Some(Place::Restored(id)) => Excluded(id),
                _ => Unbounded,
            };
            let (&id, _) = self.restored.range((bound, Unbounded)).next()?;
            Some(Place::Restored(id))
        })
    }

    /// Packets that [`Self::next_saved`] will come by.
    pub(crate) fn saved(&self) -> usize {
        let slots = self.slots.iter().filter_map(|slot| slot.packet.as_deref());
        slots.filter(|packet| is_saved(packet)).count() + self.restored.len()
    }

    /// Lends the packet at a place to its driver, with the id of its transaction; the place is kept for
    /// [`Self::put_back`], if need be by `stand_in`.
    pub(crate) fn lend(
        &mut self,
        place: Place,
        stand_in: &mut Option<Box<PacketBody>>,
    ) -> Option<(u64, Box<PacketBody>)> {
        match place {
            Place::Slot(slot) => {
                let packet = self.slots.get_mut(slot as usize)?.packet.take()?;
                Some((self.id(slot), packet))
            }
            Place::Restored(id) => {
                let packet = self.restored.get_mut(&id)?;
                Some((id, std::mem::replace(packet, stand_in.take()?)))
            }
        }
    }

    pub(crate) fn put_back(
        &mut self,
        place: Place,
        packet: Box<PacketBody>,
        stand_in: &mut Option<Box<PacketBody>>,
    ) {
        match place {
            Place::Slot(slot) => {
                if let Some(slot) = self.slots.get_mut(slot as usize) {
                    slot.packet = Some(packet);
                }
            }
            Place::Restored(id) => {
                if let Some(place) = self.restored.get_mut(&id) {
                    *stand_in = Some(std::mem::replace(place, packet));
                }
            }
        }
    }

    /// Takes over what was in flight elsewhere. Ids given from now on are none that were given there:
    /// no slot there was used more often than `most_uses`.
    pub(crate) fn restore(&mut self, packets: BTreeMap<u64, Box<PacketBody>>, most_uses: u32) {
        self.restored = packets;
        self.first_use = most_uses;
        for slot in &mut self.slots {
            slot.uses = slot.uses.max(most_uses);
        }
    }
}

/// A synchronous request belongs to the thread that waits for it: it cannot be taken elsewhere.
pub(crate) fn is_saved(packet: &PacketBody) -> bool {
    packet.tag == 0
}
