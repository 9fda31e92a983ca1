//! The requests of one channel that are with a back end.
//!
//! Each is in one of two stages, kept explicit because saving a controller has to know: *gathered*,
//! so it has never started; or *submitted*, so only the back end can say. A request that is finished
//! is answered at once and is in neither.

use std::collections::VecDeque;
use std::sync::Arc;

use kmcl::{IncomingPacket, NtStatus};
use vstor_wire::packet::{PacketForm, VstorPacket};
use vstor_wire::srb::ScsiAddress;

use super::reset::PendingReset;
use crate::block::{Buffers, IoDone, IoOperation, IoOutcome, IoRequest};
use crate::scsi::bus::Lun;
use crate::scsi::{Answer, ByteRange};

/// Most requests of one channel that are in flight; what the channel's pool of packets holds.
pub const REQUESTS_PER_CHANNEL: u32 = 256;

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
    /// Ranges to discard after the present one.
    pub(super) ranges: VecDeque<ByteRange>,
    /// Resets that wait for its end.
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
}

/// See the module.
#[derive(Default)]
pub(super) struct Requests {
    slots: Vec<Option<InFlight>>,
    free: Vec<u32>,
    /// Requests of the present batch, by disk.
    gathered: Vec<Gathered>,
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

    /// A back end has finished with a request.
    pub(super) fn finish(&mut self, done: IoDone) -> Option<Outcome> {
        let IoDone { mut request, outcome } = done;
        let IoOutcome::Done(result) = outcome else { return None };
        let slot = slot_of(request.token);
        let place = self.slots.get_mut(slot)?;
        let in_flight = place.as_mut()?;
        if result.is_ok()
            && let Some(ByteRange { offset, bytes }) = in_flight.ranges.pop_front()
        {
            (request.offset, request.bytes) = (offset, bytes);
            return Some(Outcome::Again(Arc::clone(&in_flight.lun), request));
        }
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

    /// Lets `reset` wait for the requests that it concerns.
    pub(super) fn hold_reset(
        &mut self,
        reset: &Arc<PendingReset>,
        concerns: impl Fn(ScsiAddress) -> bool,
    ) {
        for in_flight in self.slots.iter_mut().flatten() {
            if concerns(in_flight.request.srb().address()) {
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
