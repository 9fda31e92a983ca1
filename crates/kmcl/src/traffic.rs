//! What both directions of an open channel share, behind one short lock: the outgoing ring and the
//! promises made about its room, the packets in flight each way, and the pools they come from.
//!
//! The lock is never held across a callback. Taking it costs one atomic operation each way, and every
//! packet takes it once on its way in (as part of a batch) and once on its way out.

use std::collections::VecDeque;
use std::sync::Arc;

use vmbus_ring::{OutgoingPacket, PushError, RingError, RingWriter, packet_ring_bytes};
use vmbus_wire::packet::{MAX_PACKET_BYTES, PacketKind, TRAILER_SIZE};
use vmbus_wire::ring::RESERVED_BYTES;

use crate::bus::Signal;
use crate::packet::{Message, PacketBody};
use crate::pool::Body;
use crate::settings::Limits;
use crate::thread_mark;
use crate::transactions::Transactions;
use crate::waiting::Waiting;

mod still;

pub(crate) use still::{LentPacket, ResumeError, RingState, SavedPlace};

/// Why the receiver got no body for the next packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Starved {
    /// As many packets are outstanding as quota or pool allow; a completion restarts the queue.
    Packets,
    /// The outgoing ring has no room for one more completion; the peer's next read restarts it.
    Room,
}

/// See the module.
pub(crate) struct Traffic {
    ring: Option<OutgoingRing>,
    /// Which opening of the channel it is. A device may still have packets of a former one, which has
    /// moved away: nothing is done with them.
    opening: u64,
    /// Bodies for incoming packets.
    pool: Vec<Box<Body>>,
    /// Incoming packets that the device, or the receiver for it, has.
    outstanding: u32,
    /// Most of them at a time.
    pub(crate) quota: u32,
    /// Most bytes of a completion's payload.
    completion_size: u32,
    /// The receiver or the queue stopped for lack of a body or of room; the next completion has to
    /// wake the receiver.
    starved: bool,
    /// What the receiver lacks is room that the peer has to make.
    wants_room: bool,
    /// Somebody waits for `outstanding` to become 0.
    draining: bool,
    /// What follows from completions written in the middle of a batch.
    followers: Consequences,
    /// A body that a packet callback handed back, to be delivered again.
    handed_back: Option<Waiting>,
    /// No completion leaves.
    frozen: bool,
    /// Nothing is sent: the channel is frozen, being saved or restored.
    still: bool,
    /// It is being restored.
    restoring: bool,
    /// Completions made while frozen, kept in their bodies.
    held: Vec<Box<Body>>,
    /// What is in the receiver's line otherwise, and what devices hand over, while the channel is
    /// frozen or saved.
    waiting: Vec<Waiting>,

    /// Packets sent that wait for room in the ring, oldest first.
    queue: VecDeque<Box<PacketBody>>,
    transactions: Transactions,
    /// Idle packet objects.
    free_packets: Vec<Box<PacketBody>>,
    /// Packet objects that exist; bounded by [`Limits::PACKETS`].
    packets: u32,
    transmit: bool,
    /// Packets that were queued so far: tells their order.
    queued: u64,
    /// The thread that runs packet callbacks: what it writes is published when its batch ends.
    staging_thread: usize,
}

struct OutgoingRing {
    writer: RingWriter,
    signal: Arc<dyn Signal>,
    /// Ring bytes that each outstanding packet may claim for its completion.
    completion_room: u32,
    /// Ring bytes promised to completions of outstanding packets.
    promised: u32,
    /// The peer was asked for a signal when there is room.
    asked: bool,
    /// The peer knows the ring from before a restore, and nothing was restored into it yet: where it
    /// was written when it was attached.
    resumable: Option<u32>,
}

impl OutgoingRing {
    /// Bytes that an empty ring has.
    fn most(&self) -> u32 {
        self.writer.data_len() - RESERVED_BYTES
    }

    /// Bytes that have to be free for a packet of `needed` bytes to be sent, beside what is promised,
    /// or `None` if only completions of ours can make that room.
    ///
    /// Room for one completion more is left free. If two ends filled their rings with packets, neither
    /// could take the other's, for want of room to complete them: both would wait for ever. So each
    /// can always take one, and as long as completions are no larger than what they complete, the next
    /// one then. Ends that answer little with much, and both send without limit, need a protocol that
    /// limits them. What does not fit a ring beside a completion is sent into an empty one.
    fn wanted_for(&self, needed: u32) -> Option<u32> {
        let wanted = self.promised.saturating_add(needed).saturating_add(self.completion_room);
        match wanted <= self.most() {
            true => Some(wanted),
            false if self.promised == 0 => Some(self.most()),
            false => None,
        }
    }

    /// Whether a packet of `needed` bytes may be sent now.
    fn has_room(&mut self, needed: u32) -> Result<bool, RingError> {
        let Some(wanted) = self.wanted_for(needed) else { return Ok(false) };
        if self.writer.free_cached() >= wanted {
            return Ok(true);
        }
        Ok(self.writer.free()? >= wanted)
    }

    /// Writes a completion into the room promised for it.
    #[inline]
    fn complete(&mut self, body: &Body, payload: &[u8]) -> Result<(), RingError> {
        let pushed = self.writer.push(&OutgoingPacket {
            kind: PacketKind::Completion,
            wants_completion: false,
            transaction_id: body.transaction_id,
            extension: &[],
            payload: &[payload],
        });
        match pushed {
            Ok(()) => Ok(()),
            Err(PushError::Ring(error)) => Err(error),
            // Promised room cannot be full, and the payload is within bounds.
            Err(PushError::Full { .. } | PushError::TooLarge { .. }) => {
                debug_assert!(false, "a completion did not fit the room promised to it");
                Ok(())
            }
        }
    }
}

/// What became of a packet that was to be sent.
pub(crate) enum Sent {
    /// In the ring; no completion is expected, so it is done.
    Done(Box<PacketBody>),
    /// In flight, or behind others in the queue.
    Kept,
    /// First in the queue: the receiver has to ask the peer for room.
    Blocked,
}

/// The signal to give once the lock is released, if any.
#[must_use]
pub(crate) struct Ring(Option<Arc<dyn Signal>>);

impl Ring {
    pub(crate) fn give(self) {
        if let Some(signal) = self.0 {
            signal.signal();
        }
    }
}

/// What a completed packet asks the caller to do once the lock is released.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[must_use = "somebody waits for it"]
pub(crate) struct Consequences {
    /// The last outstanding packet is back, and somebody waits for that.
    pub(crate) drained: bool,
    /// The receiver can go on.
    pub(crate) restart: bool,
    /// No packet of a frozen channel is with its device any more.
    pub(crate) settled: bool,
}

impl Consequences {
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            drained: self.drained | other.drained,
            restart: self.restart | other.restart,
            settled: self.settled | other.settled,
        }
    }
}

impl Traffic {
    pub(crate) fn new() -> Self {
        Self {
            ring: None,
            opening: 0,
            pool: Vec::new(),
            outstanding: 0,
            quota: u32::MAX,
            completion_size: 0,
            starved: false,
            wants_room: false,
            draining: false,
            followers: Consequences::default(),
            handed_back: None,
            frozen: false,
            still: false,
            restoring: false,
            held: Vec::new(),
            waiting: Vec::new(),
            queue: VecDeque::new(),
            transactions: Transactions::default(),
            free_packets: Vec::new(),
            packets: 0,
            transmit: false,
            queued: 0,
            staging_thread: 0,
        }
    }

    /// Takes over the ring of a channel that opens.
    pub(crate) fn attach(
        &mut self,
        writer: RingWriter,
        signal: Arc<dyn Signal>,
        mut pool: Vec<Box<Body>>,
        completion_size: u32,
        resumed: bool,
    ) {
        self.opening += 1;
        pool.iter_mut().for_each(|body| body.opening = self.opening);
        self.ring = Some(OutgoingRing {
            resumable: resumed.then(|| writer.write_index()),
            writer,
            signal,
            completion_room: packet_ring_bytes(0, completion_size),
            promised: 0,
            asked: false,
        });
        self.pool = pool;
        self.outstanding = 0;
        self.starved = false;
        self.wants_room = false;
        self.completion_size = completion_size;
    }

    /// Lets go of the ring and of everything that was reserved for it.
    pub(crate) fn detach(&mut self) {
        self.ring = None;
        self.opening += 1;
        self.outstanding = 0;
        self.draining = false;
        self.transmit = false;
        self.handed_back = None;
        (self.frozen, self.still) = (false, false);
        self.held = Vec::new();
        self.waiting = Vec::new();
        self.pool = Vec::new();
    }

    pub(crate) fn transmit_on(&mut self) {
        self.transmit = true;
    }

    // ---- Incoming packets ------------------------------------------------------------------------

    /// Moves up to `wanted` bodies from the pool to `grant`, each with ring room for a completion.
    pub(crate) fn grant(
        &mut self,
        wanted: u32,
        grant: &mut Vec<Box<Body>>,
    ) -> Result<Result<(), Starved>, RingError> {
        let Some(ring) = &mut self.ring else { return Ok(Err(Starved::Packets)) };
        let pooled = u32::try_from(self.pool.len()).unwrap_or(u32::MAX);
        let packets = wanted.min(self.quota.saturating_sub(self.outstanding)).min(pooled);
        if packets == 0 {
            self.starved = true;
            return Ok(Err(Starved::Packets));
        }
        // Multiplied as 64 bits: both factors are below 2^20 here, but need not stay so.
        let room_wanted =
            u64::from(ring.promised) + u64::from(packets) * u64::from(ring.completion_room);
        let mut free = ring.writer.free_cached();
        if u64::from(free) < room_wanted {
            free = ring.writer.free()?;
        }
        // Promises must not grow so far that the oldest queued packet would not fit an empty ring:
        // a busy device would keep it waiting for ever. One packet may always be outstanding.
        let room = ring.completion_room.max(1);
        let spare = match self.queue.front() {
            Some(packet) if ring.promised != 0 => {
                ring.most().saturating_sub(packet.ring_bytes().saturating_add(room))
            }
            _ => ring.most(),
        };
        let packets = packets.min(spare.saturating_sub(ring.promised) / room);
        if packets == 0 {
            self.starved = true;
            return Ok(Err(Starved::Packets));
        }
        let packets = packets.min(free.saturating_sub(ring.promised) / room);
        if packets == 0 {
            self.starved = true;
            self.wants_room = true;
            return Ok(Err(Starved::Room));
        }
        ring.promised += packets * ring.completion_room;
        self.outstanding += packets;
        let keep = self.pool.len().saturating_sub(packets as usize);
        grant.extend(self.pool.drain(keep..));
        Ok(Ok(()))
    }

    /// Takes bodies back that were granted and not used.
    pub(crate) fn give_back(&mut self, grant: &mut Vec<Box<Body>>) -> Consequences {
        let starved = self.starved;
        let consequences = self.retired(grant.len());
        self.pool.append(grant);
        self.starved = starved;
        Consequences { restart: false, ..consequences }
    }

    /// Writes the completion of a packet into the room promised for it, and takes its body back.
    pub(crate) fn complete(
        &mut self,
        body: Box<Body>,
        payload: &[u8],
    ) -> (Consequences, Result<(), RingError>) {
        debug_assert!(payload.len() <= self.completion_size as usize, "completion too large");
        let payload = payload.get(..self.completion_size as usize).unwrap_or(payload);
        if self.is_stale(&body) {
            return (Consequences::default(), Ok(()));
        }
        if self.frozen && body.wants_completion {
            return (self.hold(body, payload), Ok(()));
        }
        let written = match &mut self.ring {
            Some(ring) if body.wants_completion => ring.complete(&body, payload),
            _ => Ok(()),
        };
        (self.retire(body), written)
    }

    /// As [`Self::complete`], with the payload that `body` keeps.
    pub(crate) fn complete_kept(
        &mut self,
        body: Box<Body>,
    ) -> (Consequences, Result<(), RingError>) {
        if self.is_stale(&body) {
            return (Consequences::default(), Ok(()));
        }
        if self.frozen && body.wants_completion {
            return (self.hold_kept(body), Ok(()));
        }
        let written = match &mut self.ring {
            Some(ring) if body.wants_completion => ring.complete(&body, body.payload()),
            _ => Ok(()),
        };
        (self.retire(body), written)
    }

    /// As [`Self::complete`], for all of `bodies`, with the payloads that they keep. Only the first
    /// thing that goes wrong is told.
    pub(crate) fn complete_all(
        &mut self,
        bodies: &mut Vec<Box<Body>>,
    ) -> (Consequences, Result<(), RingError>) {
        let mut written = Ok(());
        if bodies.iter().any(|body| self.is_stale(body)) {
            bodies.retain(|body| !self.is_stale(body));
        }
        if let Some(ring) = &mut self.ring {
            for body in bodies.iter().filter(|body| body.wants_completion) {
                if let Err(error) = ring.complete(body, body.payload()) {
                    written = Err(error);
                    break;
                }
            }
        }
        let consequences = self.retired(bodies.len());
        self.pool.append(bodies);
        (consequences, written)
    }

    /// Whether a packet belongs to an opening that has moved away.
    pub(crate) fn is_stale(&self, body: &Body) -> bool {
        body.opening != self.opening
    }

    /// Takes back the body, and the room promised to a packet that is over.
    pub(crate) fn retire(&mut self, body: Box<Body>) -> Consequences {
        debug_assert!(!self.is_stale(&body));
        self.pool.push(body);
        self.retired(1)
    }

    /// Counts `packets` as over.
    fn retired(&mut self, packets: usize) -> Consequences {
        if packets == 0 {
            return Consequences::default();
        }
        // A count of bodies fits: the pool has at most `Limits::PACKETS`.
        let packets = u32::try_from(packets).unwrap_or(u32::MAX);
        if let Some(ring) = &mut self.ring {
            let room = packets.saturating_mul(ring.completion_room);
            ring.promised = ring.promised.saturating_sub(room);
        }
        self.outstanding = self.outstanding.saturating_sub(packets);
        let drained = self.takes_part_in_drain();
        let settled = self.is_settled();
        Consequences { drained, restart: std::mem::take(&mut self.starved), settled }
    }

    /// Whether the last packet that somebody waits for has just come back.
    fn takes_part_in_drain(&mut self) -> bool {
        let drained = self.draining && self.outstanding == 0;
        if drained {
            self.draining = false;
        }
        drained
    }

    /// Keeps a packet that its callback handed back. It is nobody's while it waits, so a pause does
    /// not wait for it; the room for its completion stays promised. Only one can be kept: the body of
    /// a second comes back.
    pub(crate) fn hand_back(&mut self, handed_back: Waiting) -> Result<Consequences, Box<Body>> {
        if self.handed_back.is_some() {
            return Err(handed_back.body);
        }
        self.handed_back = Some(handed_back);
        self.outstanding = self.outstanding.saturating_sub(1);
        Ok(Consequences { drained: self.takes_part_in_drain(), ..Consequences::default() })
    }

    /// The packet that was handed back since the last look.
    pub(crate) fn take_handed_back(&mut self) -> Option<Waiting> {
        self.handed_back.take()
    }

    /// A packet that waited is delivered.
    pub(crate) fn deliver_again(&mut self) {
        self.outstanding += 1;
    }

    /// Keeps consequences for whoever ends the batch.
    pub(crate) fn follow_later(&mut self, consequences: Consequences) {
        self.followers = self.followers.and(consequences);
    }

    pub(crate) fn take_followers(&mut self) -> Consequences {
        std::mem::take(&mut self.followers)
    }

    /// Asks for [`Consequences::drained`] when nothing is outstanding any more; `true` if that is now.
    pub(crate) fn await_drain(&mut self) -> bool {
        self.draining = self.outstanding != 0;
        !self.draining
    }

    /// Incoming packets that the device has.
    pub(crate) fn outstanding(&self) -> u32 {
        self.outstanding
    }

    // ---- Outgoing packets ------------------------------------------------------------------------

    /// An idle packet object with room for a message of that size, or `None` at the bound.
    ///
    /// One that a restore brings back takes no more than the message that was saved: otherwise a few
    /// bytes of a saved state would cost as much memory as the largest message.
    pub(crate) fn allocate_packet(&mut self, message_size: u32) -> Option<Box<PacketBody>> {
        if let Some(packet) = self.free_packets.pop() {
            return Some(packet);
        }
        if self.packets >= Limits::PACKETS {
            return None;
        }
        self.packets += 1;
        Some(Box::new(PacketBody::new(if self.restoring { 0 } else { message_size })))
    }

    /// Takes an idle packet object back. A few are kept, the rest given up.
    pub(crate) fn free_packet(&mut self, mut packet: Box<PacketBody>) {
        const KEPT: usize = 1024;
        if !packet.pooled {
            return;
        }
        if self.free_packets.len() < KEPT {
            packet.reset();
            self.free_packets.push(packet);
        } else {
            self.packets = self.packets.saturating_sub(1);
        }
    }

    /// Idle packet objects made for other settings are of no use.
    pub(crate) fn forget_idle_packets(&mut self) {
        let idle = u32::try_from(self.free_packets.len()).unwrap_or(u32::MAX);
        self.packets = self.packets.saturating_sub(idle);
        self.free_packets = Vec::new();
    }

    /// Whether a packet of `needed` ring bytes would go into the ring at once.
    pub(crate) fn has_room(&mut self, needed: u32) -> Result<bool, RingError> {
        match &mut self.ring {
            Some(ring) if self.transmit && !self.still && self.queue.is_empty() => {
                ring.has_room(needed)
            }
            _ => Ok(false),
        }
    }

    /// Sends `packet` with `message`: into the ring, or behind those that wait for room.
    pub(crate) fn send(
        &mut self,
        mut packet: Box<PacketBody>,
        message: Message<'_>,
    ) -> Result<Sent, (Box<PacketBody>, SendRefused)> {
        if packet.transaction && self.transactions.reserve().is_none() {
            return Err((packet, SendRefused::TooManyTransactions));
        }
        let needed = packet_ring_bytes(packet.extension_len(), message.len());
        let refused = match self.has_room(needed) {
            _ if needed > MAX_PACKET_BYTES + TRAILER_SIZE => SendRefused::TooLarge,
            Ok(false) => {
                packet.keep(message);
                self.enqueue(packet);
                let first = self.transmit && !self.still && self.queue.len() == 1;
                return Ok(if first { Sent::Blocked } else { Sent::Kept });
            }
            Ok(true) => match self.write(&packet, message) {
                Ok(()) => return Ok(self.transactions.begin(packet)),
                Err(refused) => refused,
            },
            Err(error) => SendRefused::Ring(error),
        };
        self.transactions.unreserve(packet.transaction);
        Err((packet, refused))
    }

    #[inline]
    fn write(&mut self, packet: &PacketBody, message: Message<'_>) -> Result<(), SendRefused> {
        let ring = self.ring.as_mut().ok_or(SendRefused::TooLarge)?;
        let transaction_id = self.transactions.next_id(packet.transaction);
        match write(&mut ring.writer, packet, transaction_id, message) {
            Ok(()) => Ok(()),
            Err(PushError::Ring(error)) => Err(SendRefused::Ring(error)),
            Err(PushError::Full { .. } | PushError::TooLarge { .. }) => Err(SendRefused::TooLarge),
        }
    }

    fn enqueue(&mut self, mut packet: Box<PacketBody>) {
        self.queued += 1;
        packet.queued = self.queued;
        self.queue.push_back(packet);
    }

    /// Moves queued packets into the ring while there is room; gives each that is done at once to
    /// `done`. [`Self::await_room`] says what becomes of the rest.
    pub(crate) fn flush(&mut self, done: &mut Vec<Box<PacketBody>>) -> Result<(), RingError> {
        if self.queue.is_empty() || !self.transmit || self.still {
            return Ok(());
        }
        let Some(ring) = &mut self.ring else { return Ok(()) };
        while let Some(packet) = self.queue.front() {
            if !ring.has_room(packet.ring_bytes())? {
                break;
            }
            let Some(packet) = self.queue.pop_front() else { break };
            let transaction_id = self.transactions.next_id(packet.transaction);
            match write(
                &mut ring.writer,
                &packet,
                transaction_id,
                Message { header: &[], body: packet.message() },
            ) {
                Ok(()) => {
                    if let Sent::Done(packet) = self.transactions.begin(packet) {
                        done.push(packet);
                    }
                }
                Err(PushError::Ring(error)) => {
                    self.queue.push_front(packet);
                    return Err(error);
                }
                Err(PushError::Full { .. } | PushError::TooLarge { .. }) => {
                    // There was room, and a send of more than a packet can be was refused.
                    debug_assert!(false, "a queued packet does not fit the outgoing ring");
                    self.transactions.unreserve(packet.transaction);
                    done.push(packet);
                }
            }
        }
        Ok(())
    }

    /// Where the queue or the receiver lacks room, asks the peer for a signal once there is enough
    /// for one of them. `true`: there is already. Everything written must have been published: what
    /// is not will not be read. Asked for by the receiver only, since a ring holds one request.
    pub(crate) fn await_room(&mut self) -> Result<bool, RingError> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        let queued = match self.queue.front() {
            Some(packet) if self.transmit && !self.still => {
                let wanted = ring.wanted_for(packet.ring_bytes());
                self.starved |= wanted.is_none();
                wanted
            }
            _ => None,
        };
        let completion = std::mem::take(&mut self.wants_room)
            .then(|| ring.promised.saturating_add(ring.completion_room));
        match queued.into_iter().chain(completion).min() {
            Some(wanted) => {
                ring.asked = true;
                ring.writer.request_space(wanted)
            }
            None => {
                if std::mem::take(&mut ring.asked) {
                    ring.writer.clear_space_request();
                }
                Ok(false)
            }
        }
    }

    /// All of [`Self::flush`], publishing and [`Self::await_room`], outside a batch.
    pub(crate) fn flush_now(&mut self, done: &mut Vec<Box<PacketBody>>) -> Result<Ring, RingError> {
        let mut ring = Ring(None);
        loop {
            self.flush(done)?;
            if let Ring(Some(signal)) = self.publish_now(false) {
                ring = Ring(Some(signal));
            }
            if !self.await_room()? {
                return Ok(ring);
            }
        }
    }

    /// The packet whose transaction the peer completes, or `None` for an id that we did not choose.
    pub(crate) fn end_transaction(&mut self, transaction_id: u64) -> Option<Box<PacketBody>> {
        self.transactions.end(transaction_id)
    }

    /// Every packet that is queued or in flight, for the end of the channel.
    pub(crate) fn take_outgoing(&mut self) -> Vec<Box<PacketBody>> {
        let mut packets: Vec<_> = self.transactions.take_all();
        packets.extend(self.queue.drain(..));
        packets
    }

    /// Takes one queued packet out, for a send that is given up before it reached the ring.
    pub(crate) fn withdraw(&mut self, tag: u64) -> Option<Box<PacketBody>> {
        let at = self.queue.iter().position(|packet| packet.tag == tag)?;
        let packet = self.queue.remove(at)?;
        self.transactions.unreserve(packet.transaction);
        Some(packet)
    }

    /// Takes a packet in flight out, so that a late completion finds nobody.
    pub(crate) fn abandon(&mut self, tag: u64) -> Option<Box<PacketBody>> {
        self.transactions.abandon(tag)
    }

    /// Outgoing packets queued and in flight.
    pub(crate) fn in_use(&self) -> (usize, usize) {
        (self.queue.len(), self.transactions.in_flight())
    }

    // ---- Publishing ------------------------------------------------------------------------------

    /// From here to [`Self::end_batch`] what this thread writes is not shown to the peer.
    pub(crate) fn begin_batch(&mut self) {
        self.staging_thread = thread_mark::current();
    }

    /// Ends the batch and shows the peer what was written; `also` says that it must be signalled
    /// for another reason as well.
    pub(crate) fn end_batch(&mut self, also: bool) -> Ring {
        self.staging_thread = 0;
        self.publish_now(also)
    }

    /// Shows the peer what was written, unless this thread is in a batch.
    pub(crate) fn publish(&mut self) -> Ring {
        if self.staging_thread != 0 && self.staging_thread == thread_mark::current() {
            return Ring(None);
        }
        self.publish_now(false)
    }

    fn publish_now(&mut self, also: bool) -> Ring {
        let Some(ring) = &mut self.ring else { return Ring(None) };
        let needed = ring.writer.publish() | also;
        Ring(needed.then(|| Arc::clone(&ring.signal)))
    }
}

/// Why a packet could not be sent or queued.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SendRefused {
    /// The channel has gone down meanwhile.
    Removed,
    /// [`Limits::PACKETS`] transactions are in flight.
    TooManyTransactions,
    /// Message and external data together are more than a packet can be.
    TooLarge,
    /// The peer's index is impossible.
    Ring(RingError),
}

#[inline]
fn write(
    writer: &mut RingWriter,
    packet: &PacketBody,
    transaction_id: u64,
    message: Message<'_>,
) -> Result<(), PushError> {
    writer.push(&OutgoingPacket {
        kind: packet.kind(),
        wants_completion: packet.transaction,
        transaction_id,
        extension: &[packet.extension()],
        payload: &[message.header, message.body],
    })
}
