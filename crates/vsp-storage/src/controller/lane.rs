//! One channel of a controller: its packets become commands, and finished requests become answers.
//! The only place that handles packets of the library.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use kmcl::{
    Channel, Error, ExternalData, ExternalDataFlags, IncomingPacket, NtStatus, ProcessPacket,
    StateChange,
};
use vstor_wire::packet::{Operation, PacketForm, VstorPacket};
use vstor_wire::srb::{DataDirection, ScsiRequest};

use super::requests::{Ended, Gathered, InFlight, Outcome, Requests, Stage, answer_srb, lane_of};
use super::{Core, lock};
use crate::block::{InlineIo, IoDone, IoOperation};
use crate::scsi::bus::Lun;
use crate::scsi::{Answer, ByteRange, Data, DataBuffer, IoPlan, Plan};

/// See the module. The primary channel is lane 0, the nth subchannel lane n.
pub(super) struct Lane {
    /// Never used twice by a controller: requests of a channel of the past must not be taken for
    /// those of its successor.
    pub(super) id: u32,
    index: u16,
    core: Weak<Core>,
    requests: Mutex<Requests>,
    /// The batch has gathered requests. Set and cleared by the thread that processes the channel.
    has_gathered: AtomicBool,
    scratch: Mutex<Scratch>,
}

/// Vectors of a thread that handles finished requests, kept for their memory; empty between uses.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) done: Vec<IoDone>,
    ended: Vec<Ended>,
    again: Vec<(Arc<Lun>, crate::block::IoRequest)>,
}

/// What becomes of a packet.
enum Verdict {
    /// It is answered with this.
    Answer(VstorPacket),
    /// A back end has to do something first.
    Io(Work),
    /// Guest memory has to be brought in first.
    Redeliver,
}

/// What a back end has to do for an SRB.
struct Work {
    lun: Arc<Lun>,
    srb: ScsiRequest,
    operation: IoOperation,
    /// Bytes of the guest's data that go with it.
    data_bytes: u32,
    range: ByteRange,
    /// Ranges that follow, one after the other.
    more: VecDeque<ByteRange>,
}

impl Lane {
    pub(super) fn new(id: u32, index: u16, core: Weak<Core>) -> Arc<Self> {
        Arc::new(Self {
            id,
            index,
            core,
            requests: Mutex::default(),
            has_gathered: AtomicBool::new(false),
            scratch: Mutex::default(),
        })
    }

    pub(super) fn requests(&self) -> MutexGuard<'_, Requests> {
        lock(&self.requests)
    }

    /// An SRB: a SCSI command for a LUN.
    fn execute(
        &self,
        core: &Core,
        packet: IncomingPacket,
        request: &VstorPacket,
        form: PacketForm,
    ) {
        let verdict = match core.ready_form() {
            None => Verdict::Answer(VstorPacket::answer(NtStatus::INVALID_DEVICE_STATE)),
            // The last fields of the SRB are missing, where this version has them.
            Some(PacketForm::Full) if form == PacketForm::Compact => {
                Verdict::Answer(VstorPacket::answer(NtStatus::INVALID_PARAMETER))
            }
            Some(_) => judge(core, &packet, request.body()),
        };
        match verdict {
            Verdict::Answer(answer) => packet.complete(answer.bytes(form)),
            Verdict::Redeliver => packet.redeliver(),
            Verdict::Io(work) => self.gather(packet, form, work),
        }
    }

    /// Puts a request aside until the end of the batch.
    fn gather(&self, packet: IncomingPacket, form: PacketForm, work: Work) {
        let Work { lun, srb, operation, data_bytes, range, more } = work;
        let mut requests = self.requests();
        let Some(slot) = requests.reserve() else {
            drop(requests);
            return packet.complete(answer_srb(srb, &Answer::busy()).bytes(form));
        };
        let mut buffers = requests.take_buffers();
        if data_bytes > 0 {
            let set = external_data(&packet, srb.direction().unwrap_or(DataDirection::None))
                .map(|data| buffers.set(data.memory(), data.segments(), u64::from(data_bytes)));
            if !matches!(set, Ok(Ok(()))) {
                requests.keep_buffers(buffers);
                requests.cancel(slot);
                drop(requests);
                return packet.complete(answer_srb(srb, &Answer::invalid_request()).bytes(form));
            }
        }
        let in_flight = InFlight {
            packet,
            srb,
            form,
            lun,
            stage: Stage::Gathered,
            moved: data_bytes,
            ranges: more,
            resets: Vec::new(),
        };
        requests.gather(self.id, slot, in_flight, operation, range, buffers);
        self.has_gathered.store(true, Ordering::Relaxed);
    }

    /// Gives what the batch has gathered to the back ends.
    fn submit(&self, core: &Core) {
        self.has_gathered.store(false, Ordering::Relaxed);
        let mut scratch = std::mem::take(&mut *lock(&self.scratch));
        loop {
            let gathered = self.requests().take_gathered();
            let Some(Gathered { lun, mut requests }) = gathered else { break };
            lun.disk.backend().submit(&mut requests, &mut scratch.done);
            self.requests().keep_vector(requests);
            core.finish(&mut scratch);
        }
        *lock(&self.scratch) = scratch;
    }
}

impl ProcessPacket for Lane {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        let Some(core) = self.core.upgrade() else {
            // The controller is gone, and its channels go with it.
            return packet.complete(&[]);
        };
        let (request, form) = match VstorPacket::parse(packet.payload()) {
            Ok(parsed) => parsed,
            Err(error) => {
                tracing::debug!(%error, "storage packet refused");
                let answer = VstorPacket::answer(NtStatus::INVALID_PARAMETER);
                return packet.complete(answer.bytes(PacketForm::Full));
            }
        };
        match request.operation {
            Operation::EXECUTE_SRB => self.execute(&core, packet, &request, form),
            Operation::RESET_LUN | Operation::RESET_BUS | Operation::RESET_ADAPTER => {
                core.reset(packet, &request, form);
            }
            Operation::BEGIN_INITIALIZATION
            | Operation::QUERY_PROTOCOL_VERSION
            | Operation::QUERY_PROPERTIES
            | Operation::END_INITIALIZATION
            | Operation::CREATE_SUB_CHANNELS => {
                let answer = if self.index == 0 {
                    core.initialise(&request)
                } else {
                    // Only the primary channel is initialised.
                    VstorPacket::answer(NtStatus::INVALID_DEVICE_STATE)
                };
                packet.complete(answer.bytes(form));
            }
            // What only a host says, what only a Fibre Channel adapter does, and the unknown.
            _ => {
                let answer = VstorPacket::answer(NtStatus::INVALID_DEVICE_REQUEST);
                packet.complete(answer.bytes(form));
            }
        }
    }

    fn processing_complete(&self, _channel: &Channel, _packets: u32) {
        if self.has_gathered.load(Ordering::Relaxed)
            && let Some(core) = self.core.upgrade()
        {
            self.submit(&core);
            core.retire_disks();
        }
    }
}

impl StateChange for Lane {
    fn opened(&self, _channel: &Channel) -> Result<(), NtStatus> {
        if self.index == 0
            && let Some(core) = self.core.upgrade()
        {
            core.start_over();
        }
        Ok(())
    }

    /// Everything in flight has ended: the library has waited for it.
    fn closed(&self, _channel: &Channel) {
        if self.index == 0
            && let Some(core) = self.core.upgrade()
        {
            core.start_over();
        }
    }
}

/// The external data of a packet; only to be read, if the command's data comes from there.
fn external_data(
    packet: &IncomingPacket,
    direction: DataDirection,
) -> Result<ExternalData<'_>, Error> {
    packet.external_data(match direction {
        DataDirection::In => ExternalDataFlags::empty(),
        DataDirection::Out | DataDirection::None => ExternalDataFlags::READ_ONLY,
    })
}

/// What an SRB comes to.
fn judge(core: &Core, packet: &IncomingPacket, srb: ScsiRequest) -> Verdict {
    let refuse = |srb| Verdict::Answer(answer_srb(srb, &Answer::invalid_request()));
    // The SRB's own length is not looked at: the packet's says the same, and cannot lie.
    let (Ok(cdb), Ok(direction)) = (srb.cdb(), srb.direction()) else {
        return refuse(srb);
    };
    let external = if packet.has_external_data() {
        match external_data(packet, direction) {
            Ok(data) => Some(data),
            Err(Error::Pending) => return Verdict::Redeliver,
            Err(error) => {
                tracing::debug!(%error, "data of a SCSI request refused");
                return refuse(srb);
            }
        }
    } else {
        None
    };
    let buffer = GuestData(external.as_ref());
    let available =
        external.as_ref().map_or(0, |data| data.len().min(srb.data_transfer_length.get()));
    let data = Data { direction, available, buffer: &buffer };
    let mut ranges = Vec::new();
    let (plan, lun) = {
        let luns = core.luns();
        let (plan, lun) = luns.plan(srb.address(), cdb, &data, &mut ranges);
        match (plan, lun) {
            (Plan::Answer(answer), _) => return Verdict::Answer(answer_srb(srb, &answer)),
            (plan, Some(lun)) => (plan, Arc::clone(lun)),
            (_, None) => return Verdict::Answer(answer_srb(srb, &Answer::no_lun())),
        }
    };
    let work = match plan {
        Plan::Io(io) => {
            if let Some(answer) = run_inline(&lun, &io, external.as_ref()) {
                return Verdict::Answer(answer_srb(srb, &answer));
            }
            let IoPlan { operation, offset, bytes, data_bytes } = io;
            let (range, more) = (ByteRange { offset, bytes }, VecDeque::new());
            Work { lun, srb, operation, data_bytes, range, more }
        }
        Plan::Discard => {
            let mut more = VecDeque::from(ranges);
            let Some(range) = more.pop_front() else {
                return Verdict::Answer(answer_srb(srb, &Answer::good(0)));
            };
            Work { lun, srb, operation: IoOperation::Discard, data_bytes: 0, range, more }
        }
        Plan::Answer(answer) => return Verdict::Answer(answer_srb(srb, &answer)),
    };
    Verdict::Io(work)
}

/// Reads and writes at once, where the back end can.
fn run_inline(lun: &Lun, io: &IoPlan, external: Option<&ExternalData<'_>>) -> Option<Answer> {
    let external = external?;
    let IoPlan { operation, offset, bytes, data_bytes } = *io;
    if !matches!(operation, IoOperation::Read | IoOperation::Write { .. }) {
        return None;
    }
    let memory = external.memory();
    let segments = &mut external.segments();
    let inline = InlineIo { operation, offset, bytes, memory, segments };
    Some(match lun.disk.backend().run_inline(inline)? {
        Ok(()) => Answer::good(data_bytes),
        Err(error) => Answer::failed(error, lun.disk.sector_bytes()),
    })
}

/// The guest's side of a command's data.
struct GuestData<'a>(Option<&'a ExternalData<'a>>);

impl DataBuffer for GuestData<'_> {
    fn read_at(&self, offset: u32, into: &mut [u8]) -> bool {
        self.0.is_some_and(|data| data.read_at(offset, into) == Ok(into.len()))
    }

    fn write_at(&self, offset: u32, from: &[u8]) -> bool {
        self.0.is_some_and(|data| data.write_at(offset, from) == Ok(from.len()))
    }
}

impl Core {
    /// Answers the guest about the finished requests in `scratch`, channel by channel, and goes on
    /// with those that have more to do.
    pub(super) fn finish(&self, scratch: &mut Scratch) {
        // A back end that does everything at once may give back what it was given again here; each
        // round uses up one range of an UNMAP.
        while let Some(done) = scratch.done.last() {
            self.finish_lane(lane_of(done.request.token), scratch);
        }
    }

    /// The part of `finish` that concerns one channel.
    fn finish_lane(&self, id: u32, scratch: &mut Scratch) {
        let Scratch { done, ended, again } = scratch;
        let Some((channel, lane)) = self.lane_by_id(id) else {
            // Cannot be: a channel goes when everything in flight has ended.
            tracing::error!(id, "finished disk requests of a channel that is gone");
            return done.retain(|done| lane_of(done.request.token) != id);
        };
        {
            let mut requests = lane.requests();
            let mut at = 0;
            while let Some(candidate) = done.get(at) {
                if lane_of(candidate.request.token) != id {
                    at += 1;
                    continue;
                }
                match requests.finish(done.swap_remove(at)) {
                    Some(Outcome::Ended(end)) => ended.push(end),
                    Some(Outcome::Again(lun, request)) => again.push((lun, request)),
                    None => tracing::error!(id, "a disk request has finished twice"),
                }
            }
        }
        {
            let mut batch = channel.batch();
            for Ended { packet, answer, form, resets } in ended.drain(..) {
                batch.complete(packet, answer.bytes(form));
                for reset in resets {
                    reset.release();
                }
            }
        }
        while let Some((lun, request)) = again.pop() {
            let mut one = lane.requests().take_vector();
            one.push(request);
            lun.disk.backend().submit(&mut one, done);
            lane.requests().keep_vector(one);
        }
    }
}

/// A reset, for [`Core::reset`].
pub(super) fn reset_concerns(
    request: &VstorPacket,
) -> impl Fn(vstor_wire::srb::ScsiAddress) -> bool + use<> {
    let target = request.body::<ScsiRequest>().address();
    let operation = request.operation;
    move |address| match operation {
        Operation::RESET_LUN => address == target,
        Operation::RESET_BUS => address.path == target.path,
        _ => true,
    }
}
