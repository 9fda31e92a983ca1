//! The requests of one channel that are with a back end.
//!
//! Each is in one of two stages: *gathered*, so it has never started; or *submitted*, so only the back
//! end can say. A request that is finished is answered at once and is in neither. While the channel is
//! frozen, one that comes back unfinished is in neither as well: it is handed over to the channel, with
//! how far it came.

use std::collections::VecDeque;
use std::sync::Arc;

use kmcl::{Fence, IncomingPacket, NtStatus};
use vstor_wire::packet::{PacketForm, VstorPacket};
use vstor_wire::srb::ScsiAddress;

use super::reset::{PendingReset, ResetScope};
use crate::block::{Buffers, IoDone, IoOperation, IoOutcome, IoRequest};
use crate::scsi::bus::Lun;
use crate::scsi::{Answer, ByteRange};

/// Most requests of one channel that are in flight; what the channel's pool of packets holds.
pub const REQUESTS_PER_CHANNEL: u32 = 256;

/// Most resets that are told apart until all older requests have come again; more count as a reset of
/// everything.
const MAX_ABORTS: usize = 64;

/// Where a request in flight is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stage {
    /// It waits for the end of its batch: the back end does not know it.
    Gathered,
    /// The back end has it.
    Submitted,
}

/// A request in flight.
pub(super) struct InFlight {
    pub(super) packet: IncomingPacket,
    /// The SRB; becomes the answer.
    pub(super) request: VstorPacket,
    pub(super) form: PacketForm,
    pub(super) lun: Arc<Lun>,
    pub(super) stage: Stage,
    /// Bytes of data that are moved when it succeeds.
    pub(super) moved: u32,
    /// What was done of it before its present I/O.
    pub(super) progress: Progress,
    /// Ranges to discard after the present one.
    pub(super) ranges: VecDeque<ByteRange>,
    /// Resets that wait for its end.
    pub(super) resets: Vec<Arc<PendingReset>>,
}

/// How far a request came.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Progress {
    /// Something of it was begun, here or in a process of the past.
    pub(super) was_begun: bool,
    /// Ranges that are done.
    pub(super) ranges: u32,
    /// Bytes of the range after those that are done: whole sectors.
    pub(super) bytes: u64,
}

/// A request that came back unfinished, of which nothing is under way.
pub(super) struct Settled {
    pub(super) packet: IncomingPacket,
    pub(super) request: VstorPacket,
    pub(super) form: PacketForm,
    pub(super) lun: Arc<Lun>,
    pub(super) fence: Fence,
    pub(super) progress: Progress,
    pub(super) resets: Vec<Arc<PendingReset>>,
}

/// A request that has ended: the packet, and its answer.
pub(super) struct Ended {
    pub(super) packet: IncomingPacket,
    pub(super) answer: VstorPacket,
    pub(super) form: PacketForm,
    pub(super) resets: Vec<Arc<PendingReset>>,
}

/// Requests for the disk of one LUN.
pub(super) struct Gathered {
    pub(super) lun: Arc<Lun>,
    pub(super) requests: Vec<IoRequest>,
}

/// A place for a request in flight.
pub(super) struct Slot(u32);

/// What became of a finished request.
pub(super) enum Outcome {
    /// It has ended.
    Ended(Ended),
    /// It goes on with its next range.
    Again(Arc<Lun>, IoRequest),
    /// It waits for the thaw.
    Settled(Settled),
}

/// See the module.
#[derive(Default)]
pub(super) struct Requests {
    slots: Vec<Option<InFlight>>,
    free: Vec<u32>,
    /// Requests of the present batch, by disk.
    gathered: Vec<Gathered>,
    /// Nothing is begun: the channel is frozen.
    is_frozen: bool,
    /// Requests that were handed over since it froze.
    handed_over: u32,
    /// Resets since the channel thawed or was restored, while requests may still come that are older.
    aborts: Vec<ResetScope>,
    // Kept for their memory.
    idle_buffers: Vec<Buffers>,
    idle_vectors: Vec<Vec<IoRequest>>,
}

impl Requests {
    /// Buffers for a new request.
    pub(super) fn take_buffers(&mut self) -> Buffers {
        self.idle_buffers.pop().unwrap_or_default()
    }

    pub(super) fn keep_buffers(&mut self, mut buffers: Buffers) {
        buffers.clear();
        self.idle_buffers.push(buffers);
    }

    /// A slot for a new request, or `None` if there are too many, which a channel with a pool of
    /// [`REQUESTS_PER_CHANNEL`] packets does not reach.
    pub(super) fn reserve(&mut self) -> Option<Slot> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < REQUESTS_PER_CHANNEL as usize => {
                self.slots.push(None);
                u32::try_from(self.slots.len() - 1).ok()?
            }
            None => return None,
        };
        Some(Slot(index))
    }

    /// Puts a request aside until the end of the batch.
    pub(super) fn gather(
        &mut self,
        lane: u32,
        slot: Slot,
        in_flight: InFlight,
        operation: IoOperation,
        range: ByteRange,
        buffers: Buffers,
    ) {
        let lun = Arc::clone(&in_flight.lun);
        let Slot(index) = slot;
        if let Some(place) = self.slots.get_mut(index as usize) {
            *place = Some(in_flight);
        }
        let ByteRange { offset, bytes } = range;
        if operation.is_write() {
            lun.disk.note_write(offset);
        }
        let io = IoRequest { token: token(lane, index), operation, offset, bytes, buffers };
        match self.gathered.iter_mut().find(|gathered| Arc::ptr_eq(&gathered.lun, &lun)) {
            Some(gathered) => gathered.requests.push(io),
            None => {
                let mut requests = self.take_vector();
                requests.push(io);
                self.gathered.push(Gathered { lun, requests });
            }
        }
    }

    /// Takes the requests for one disk out of the batch, to be submitted.
    pub(super) fn take_gathered(&mut self) -> Option<Gathered> {
        let gathered = self.gathered.pop()?;
        for request in &gathered.requests {
            if let Some(Some(in_flight)) = self.slots.get_mut(slot_of(request.token)) {
                in_flight.stage = Stage::Submitted;
            }
        }
        Some(gathered)
    }

    /// An empty vector for requests.
    pub(super) fn take_vector(&mut self) -> Vec<IoRequest> {
        self.idle_vectors.pop().unwrap_or_default()
    }

    pub(super) fn keep_vector(&mut self, vector: Vec<IoRequest>) {
        self.idle_vectors.push(vector);
    }

    /// A back end has let go of a request.
    pub(super) fn finish(&mut self, done: IoDone) -> Option<Outcome> {
        let IoDone { mut request, outcome } = done;
        let is_frozen = self.is_frozen;
        let slot = slot_of(request.token);
        let place = self.slots.get_mut(slot)?;
        let in_flight = place.as_mut()?;
        if request.operation.is_write() {
            in_flight.lun.disk.note_write(request.offset);
        }
        let result = match outcome {
            IoOutcome::Done(Ok(())) => match in_flight.ranges.pop_front() {
                None => Ok(()),
                Some(ByteRange { offset, bytes }) => {
                    let ranges = in_flight.progress.ranges + 1; // at most as many as an UNMAP has
                    in_flight.progress = Progress { was_begun: true, ranges, bytes: 0 };
                    (request.offset, request.bytes) = (offset, bytes);
                    if !is_frozen {
                        return Some(Outcome::Again(Arc::clone(&in_flight.lun), request));
                    }
                    return self.settle(slot, request, 0);
                }
            },
            IoOutcome::Done(Err(error)) => Err(error),
            // Where the channel has thawed meanwhile, it will say so.
            IoOutcome::NeverStarted => return self.settle(slot, request, 0),
            IoOutcome::Cancelled { moved } => {
                in_flight.progress.was_begun = true;
                return self.settle(slot, request, moved);
            }
        };
        let InFlight { packet, request: mut answer, form, lun, moved, resets, .. } =
            place.take()?;
        self.free.push(u32::try_from(slot).ok()?);
        self.keep_buffers(request.buffers);
        let end = match result {
            Ok(()) => Answer::good(moved),
            Err(error) => Answer::failed(error, lun.disk.sector_bytes()),
        };
        answer_srb(&mut answer, &end);
        Some(Outcome::Ended(Ended { packet, answer, form, resets }))
    }

    /// A request is over here, `moved` bytes into its present I/O.
    fn settle(&mut self, slot: usize, io: IoRequest, moved: u64) -> Option<Outcome> {
        let InFlight { packet, request, form, lun, mut progress, resets, .. } =
            self.slots.get_mut(slot)?.take()?;
        self.free.push(u32::try_from(slot).ok()?);
        self.keep_buffers(io.buffers);
        // What is done again is done with the same data: to forget a part of a sector costs little,
        // and so does to forget what a 32-bit number cannot say.
        let sector_bytes = u64::from(lun.disk.sector_bytes());
        let most = u64::from(u32::MAX) - u64::from(u32::MAX) % sector_bytes;
        let bytes = progress.bytes.saturating_add(moved.min(io.bytes)).min(most);
        progress.bytes = bytes - bytes % sector_bytes;
        let fence = if progress.was_begun { Fence::Cancelled } else { Fence::NeverStarted };
        Some(Outcome::Settled(Settled { packet, request, form, lun, fence, progress, resets }))
    }

    /// A mistake: takes every request as cancelled, whatever its back end does with it. Their slots are
    /// not used again.
    #[cfg(feature = "faults")]
    pub(super) fn tear_out(&mut self) -> Vec<Settled> {
        let submitted = |one: &mut InFlight| one.stage == Stage::Submitted;
        let torn = self.slots.iter_mut().filter_map(|slot| slot.take_if(submitted));
        torn.map(|InFlight { packet, request, form, lun, resets, .. }| {
            let (fence, progress) = (Fence::Cancelled, Progress::default());
            Settled { packet, request, form, lun, fence, progress, resets }
        })
        .collect()
    }

    /// From now on, requests that come back unfinished settle, or go on.
    pub(super) fn set_frozen(&mut self, is_frozen: bool) {
        self.is_frozen = is_frozen;
        self.handed_over = 0;
    }

    /// One more request was handed over.
    pub(super) fn note_handed_over(&mut self) {
        self.handed_over += 1;
    }

    pub(super) fn handed_over(&self) -> u32 {
        self.handed_over
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.is_frozen
    }

    /// Takes everything gathered back: it has never started.
    pub(super) fn withdraw_gathered(&mut self, done: &mut Vec<IoDone>) {
        while let Some(Gathered { mut requests, .. }) = self.gathered.pop() {
            let outcome = IoOutcome::NeverStarted;
            done.extend(requests.drain(..).map(|request| IoDone { request, outcome }));
            self.keep_vector(requests);
        }
    }

    /// The disks that have requests of this channel.
    pub(super) fn disks(&self) -> Vec<Arc<Lun>> {
        let mut luns: Vec<Arc<Lun>> = Vec::new();
        for InFlight { lun, .. } in self.slots.iter().flatten() {
            if !luns.iter().any(|other| Arc::ptr_eq(other, lun)) {
                luns.push(Arc::clone(lun));
            }
        }
        luns
    }

    /// A request that comes again is over, because a reset has come before it.
    pub(super) fn is_aborted(&self, address: ScsiAddress) -> bool {
        self.aborts.iter().any(|scope| scope.concerns(address))
    }

    /// All that is older than the next reset has come.
    pub(super) fn forget_aborts(&mut self) {
        self.aborts.clear();
    }

    /// Ends requests that come again, but are older than a reset.
    pub(super) fn abort(&mut self, scope: ResetScope) {
        if self.aborts.len() == MAX_ABORTS {
            self.aborts.clear();
            self.aborts.push(ResetScope::All);
        } else if !self.aborts.contains(&scope) {
            self.aborts.push(scope);
        }
    }

    /// Lets `reset` wait for the requests that it concerns.
    pub(super) fn hold_reset(&mut self, reset: &Arc<PendingReset>, scope: ResetScope) {
        for in_flight in self.slots.iter_mut().flatten() {
            if scope.concerns(in_flight.request.srb().address()) {
                reset.hold();
                in_flight.resets.push(Arc::clone(reset));
            }
        }
    }

    /// How many are in flight, by stage: gathered, submitted.
    pub(super) fn count(&self) -> (usize, usize) {
        let at = |stage| self.slots.iter().flatten().filter(|one| one.stage == stage).count();
        (at(Stage::Gathered), at(Stage::Submitted))
    }
}

/// Makes the packet of an SRB its own answer.
pub(super) fn answer_srb(request: &mut VstorPacket, answer: &Answer) {
    request.make_answer(NtStatus::SUCCESS);
    let srb = request.srb_mut();
    match &answer.sense {
        Some(sense) => srb.finish_with_sense(answer.srb, answer.moved, &sense.to_fixed()),
        None => srb.finish(answer.srb, answer.scsi, answer.moved),
    }
}

/// Names a request to its back end: the channel and the slot.
fn token(lane: u32, slot: u32) -> u64 {
    u64::from(lane) << 32 | u64::from(slot)
}

/// The channel that a token names.
pub(super) fn lane_of(token: u64) -> u32 {
    u32::try_from(token >> 32).unwrap_or(u32::MAX) // always fits
}

fn slot_of(token: u64) -> usize {
    usize::try_from(token & 0xffff_ffff).unwrap_or(usize::MAX)
}
