//! Traffic that stands still: while its channel is frozen, saved or restored.

use std::collections::{BTreeMap, VecDeque};

use vmbus_ring::RingError;

use super::{Consequences, Ring, Traffic};
use crate::packet::PacketBody;
use crate::pool::Body;
use crate::transactions::{Place, is_saved};
use crate::waiting::Waiting;

/// Where a packet is that a save comes by.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SavedPlace {
    /// In flight.
    InFlight(Place),
    /// Queued with this number, and last seen there.
    Queued { number: u64, at: usize },
}

impl PartialEq for SavedPlace {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::InFlight(place), Self::InFlight(other)) => place == other,
            (Self::Queued { number, .. }, Self::Queued { number: other, .. }) => number == other,
            _ => false,
        }
    }
}

/// A packet lent to its driver for a look: where it belongs, and its id if it is in flight.
pub(crate) struct LentPacket {
    pub(crate) place: SavedPlace,
    pub(crate) id: Option<u64>,
    pub(crate) body: Box<PacketBody>,
}

/// What a channel's outgoing ring is like, for a saved state.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct RingState {
    pub(crate) data_len: u32,
    pub(crate) index: u32,
}

impl Traffic {
    // ---- Freezing ---------------------------------------------------------------------------------

    /// From here on no completion leaves and nothing is sent. `line` is what waits in the receiver.
    pub(crate) fn freeze(&mut self, line: &mut VecDeque<Waiting>) {
        self.frozen = true;
        self.stand_still(line);
    }

    /// From here on nothing is sent, and what waits can be saved.
    pub(crate) fn stand_still(&mut self, line: &mut VecDeque<Waiting>) {
        self.still = true;
        self.waiting.extend(line.drain(..));
    }

    /// Nothing is sent while a restore is under way. There is none of a channel that stands still for
    /// another reason.
    pub(crate) fn set_restoring(&mut self, restoring: bool) {
        (self.restoring, self.still) = (restoring, restoring);
    }

    /// Goes on where [`Self::freeze`] or [`Self::stand_still`] has stopped: what waits goes back to
    /// `line`, in the order of delivery, and completions that were held leave.
    pub(crate) fn go_on(
        &mut self,
        line: &mut VecDeque<Waiting>,
    ) -> (Consequences, Ring, Result<(), RingError>) {
        (self.frozen, self.still) = (false, false);
        self.sort_waiting();
        line.extend(self.waiting.drain(..));
        let mut held = std::mem::take(&mut self.held);
        let (consequences, written) = self.complete_all(&mut held);
        self.held = held; // for its memory
        (consequences, self.publish_now(false), written)
    }

    /// Keeps a completion until the channel thaws.
    pub(super) fn hold(&mut self, mut body: Box<Body>, payload: &[u8]) -> Consequences {
        body.hold_completion(payload);
        self.hold_kept(body)
    }

    /// As [`Self::hold`], with the payload that `body` keeps.
    pub(super) fn hold_kept(&mut self, body: Box<Body>) -> Consequences {
        self.held.push(body);
        Consequences { settled: self.is_settled(), ..Consequences::default() }
    }

    /// Takes a packet that its device hands over, or gives it back: the channel is not frozen.
    pub(crate) fn hand_over(&mut self, waiting: Waiting) -> Result<Consequences, Waiting> {
        if !self.frozen || self.is_stale(&waiting.body) {
            return Err(waiting);
        }
        self.waiting.push(waiting);
        self.outstanding = self.outstanding.saturating_sub(1);
        let drained = self.takes_part_in_drain();
        Ok(Consequences { drained, settled: self.is_settled(), restart: false })
    }

    /// Packets of a frozen channel that are still with the device.
    pub(crate) fn running(&self) -> u32 {
        let held = u32::try_from(self.held.len()).unwrap_or(u32::MAX);
        self.outstanding.saturating_sub(held)
    }

    pub(super) fn is_settled(&self) -> bool {
        self.frozen && self.running() == 0
    }

    // ---- Looking at it ----------------------------------------------------------------------------

    pub(crate) fn ring_state(&self) -> Option<RingState> {
        let writer = &self.ring.as_ref()?.writer;
        Some(RingState { data_len: writer.data_len(), index: writer.write_index() })
    }

    pub(crate) fn most_uses(&self) -> u32 {
        self.transactions.most_uses()
    }

    /// Outgoing packets that a save will come by.
    pub(crate) fn saved_outgoing(&self) -> usize {
        self.transactions.saved() + self.queue.iter().filter(|packet| is_saved(packet)).count()
    }

    /// Incoming packets that a save will come by.
    pub(crate) fn saved_incoming(&self) -> usize {
        self.held.len() + self.waiting.len()
    }

    /// The number of the last packet that was queued.
    pub(crate) fn last_queued(&self) -> u64 {
        self.queued
    }

    /// Lends the next packet that is saved: of those in flight, then of those that are queued, up to
    /// number `last`. `stand_in` keeps its place until [`Self::put_back`].
    pub(crate) fn lend_next(
        &mut self,
        after: Option<SavedPlace>,
        last: u64,
        stand_in: &mut Option<Box<PacketBody>>,
    ) -> Option<LentPacket> {
        let place = self.next_saved(after, last)?;
        match place {
            SavedPlace::InFlight(within) => {
                let (id, body) = self.transactions.lend(within, stand_in)?;
                Some(LentPacket { place, id: Some(id), body })
            }
            SavedPlace::Queued { number, at } => {
                let slot = self.queue.get_mut(at)?;
                let mut stand_in = stand_in.take()?;
                stand_in.queued = number;
                let body = std::mem::replace(slot, stand_in);
                Some(LentPacket { place, id: None, body })
            }
        }
    }

    fn next_saved(&self, after: Option<SavedPlace>, last: u64) -> Option<SavedPlace> {
        let in_flight = match after {
            None => self.transactions.next_saved(None),
            Some(SavedPlace::InFlight(place)) => self.transactions.next_saved(Some(place)),
            Some(SavedPlace::Queued { .. }) => None,
        };
        in_flight.map(SavedPlace::InFlight).or_else(|| {
            let from = match after {
                Some(SavedPlace::Queued { number, at }) if self.is_queued(number, at) => at + 1,
                Some(SavedPlace::Queued { number, .. }) => {
                    self.queue.partition_point(|packet| packet.queued <= number)
                }
                _ => 0,
            };
            let mut rest = self.queue.range(from..).zip(from..);
            let (packet, at) = rest.find(|(packet, _)| is_saved(packet))?;
            (packet.queued <= last).then_some(SavedPlace::Queued { number: packet.queued, at })
        })
    }

    pub(crate) fn put_back(
        &mut self,
        place: SavedPlace,
        packet: Box<PacketBody>,
        stand_in: &mut Option<Box<PacketBody>>,
    ) {
        match place {
            SavedPlace::InFlight(place) => self.transactions.put_back(place, packet, stand_in),
            SavedPlace::Queued { number, at } => {
                let at = match self.is_queued(number, at) {
                    true => Some(at),
                    false => self.queue.binary_search_by_key(&number, |it| it.queued).ok(),
                };
                if let Some(slot) = at.and_then(|at| self.queue.get_mut(at)) {
                    *stand_in = Some(std::mem::replace(slot, packet));
                }
            }
        }
    }

    /// Sends may be withdrawn from the queue's middle: a place in it is only where to look first.
    fn is_queued(&self, number: u64, at: usize) -> bool {
        self.queue.get(at).is_some_and(|packet| packet.queued == number)
    }

    /// Puts what waits into the order of delivery.
    pub(crate) fn sort_waiting(&mut self) {
        self.waiting.sort_unstable_by_key(|waiting| waiting.body.order);
    }

    /// A completion that is held.
    pub(crate) fn held_at(&self, at: usize) -> Option<&Body> {
        self.held.get(at).map(|body| &**body)
    }

    /// A packet that waits.
    pub(crate) fn waiting_at(&self, at: usize) -> Option<&Waiting> {
        self.waiting.get(at)
    }

    pub(crate) fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    // ---- Restoring --------------------------------------------------------------------------------

    /// Whether no transaction is in flight, and no packet with the device or on its way back to it.
    pub(crate) fn is_idle(&self) -> bool {
        let promised = self.ring.as_ref().map_or(0, |ring| ring.promised);
        self.transactions.in_flight() == 0 && self.outstanding == 0 && promised == 0
    }

    /// Takes over packets that were in flight elsewhere, and those that were queued: they are sent
    /// before any other.
    pub(crate) fn restore_outgoing(
        &mut self,
        in_flight: BTreeMap<u64, Box<PacketBody>>,
        queued: Vec<Box<PacketBody>>,
        most_uses: u32,
    ) {
        self.transactions.restore(in_flight, most_uses);
        let later = std::mem::take(&mut self.queue);
        for packet in queued.into_iter().chain(later) {
            self.enqueue(packet);
        }
    }

    /// Promises room to transactions that are queued; `None` at the bound.
    pub(crate) fn reserve_transactions(&mut self, packets: usize) -> Option<()> {
        for reserved in 0..packets {
            if self.transactions.reserve().is_none() {
                (0..reserved).for_each(|_| self.transactions.unreserve(true));
                return None;
            }
        }
        Some(())
    }

    pub(crate) fn unreserve_transactions(&mut self, packets: usize) {
        (0..packets).for_each(|_| self.transactions.unreserve(true));
    }

    /// Packets in flight whose transactions belong to rings that are gone.
    pub(crate) fn take_in_flight(&mut self) -> Vec<Box<PacketBody>> {
        self.transactions.take_in_flight()
    }

    /// Where the ring was written when it was attached, if the peer knows it from before and nothing
    /// was restored into it yet; and where it is written now.
    pub(crate) fn resumable(&self) -> Option<(u32, u32)> {
        let ring = self.ring.as_ref()?;
        Some((ring.resumable?, ring.writer.write_index()))
    }

    /// The ring's writer goes on at `index`, with room promised to `packets` that come back. Nothing
    /// has changed where it fails.
    pub(crate) fn resume_ring(&mut self, index: u32, packets: usize) -> Result<(), ResumeError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let before = ring.writer.write_index();
        ring.writer.resume_at(index).map_err(ResumeError::Ring)?;
        // At most `Limits::PACKETS` of at most 512 KiB.
        let promised = packets as u64 * u64::from(ring.completion_room);
        let free = ring.writer.free_cached();
        if promised > u64::from(free) {
            let _as_before = ring.writer.resume_at(before);
            return Err(ResumeError::Room { promised, free });
        }
        ring.promised = u32::try_from(promised).unwrap_or(u32::MAX);
        ring.resumable = None;
        Ok(())
    }

    /// A body for a packet that comes back.
    pub(crate) fn body_for_restored(&mut self) -> Option<Box<Body>> {
        self.pool.pop()
    }

    /// Takes back the bodies of packets that do not come back after all.
    pub(crate) fn forget_restored(&mut self, bodies: impl IntoIterator<Item = Box<Body>>) {
        self.pool.extend(bodies);
    }

    /// The signal to the peer, whatever it waits for.
    pub(crate) fn signal_anyway(&self) -> Ring {
        Ring(self.ring.as_ref().map(|ring| std::sync::Arc::clone(&ring.signal)))
    }
}

/// Why the rings of a saved state do not fit these.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ResumeError {
    Ring(RingError),
    Room { promised: u64, free: u32 },
}
