//! One channel of a controller: its packets become commands, and finished requests become answers.
//! The only place that handles packets of the library.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use kmcl::{
    Channel, Error, ExternalData, ExternalDataFlags, IncomingPacket, NtStatus, ProcessPacket,
    ResumedPacket, SaveRestorePacket, StateChange,
};
use vstor_wire::packet::{Operation, PacketForm, VstorPacket};
use vstor_wire::srb::{DataDirection, ScsiRequest, ScsiStatus, SrbStatus};
use zerocopy::FromBytes;

use super::requests::{
    Ended, Gathered, InFlight, Outcome, Progress, Requests, Settled, Stage, answer_srb, lane_of,
};
use super::{Core, lock};
use crate::block::{Buffers, InlineIo, IoDone, IoError, IoOperation, IoRequest};
use crate::scsi::bus::Lun;
use crate::scsi::{Answer, ByteRange, Data, DataBuffer, IoPlan, Plan};

/// See the module. The primary channel is lane 0, the nth subchannel lane n.
pub(super) struct Lane {
    /// Never used twice by a controller: requests of a channel of the past must not be taken for
    /// those of its successor.
    pub(super) id: u32,
    index: u16,
    /// A circle, which closing the controller opens.
    pub(super) core: Arc<Core>,
    requests: Mutex<Requests>,
    /// Requests are gathered, or may be.
    pub(super) has_gathered: AtomicBool,
    /// Requests may come that were handed over before a thaw or a restore.
    pub(super) is_resuming: AtomicBool,
    scratch: Mutex<Scratch>,
}

/// Vectors of a thread that handles finished requests, kept for their memory; empty between uses.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) done: Vec<IoDone>,
    ended: Vec<Ended>,
    again: Vec<(Arc<Lun>, IoRequest)>,
    settled: Vec<Settled>,
}

/// What becomes of an SRB that is not done at once.
pub(super) enum Verdict {
    /// It ends with this.
    Answer(Answer),
    /// A back end has to do something first.
    Io(Work),
    /// Guest memory has to be brought in first.
    Redeliver,
}

/// What a back end has to do for an SRB.
pub(super) struct Work {
    pub(super) lun: Arc<Lun>,
    /// All of it, or all of its present range.
    pub(super) io: IoPlan,
    /// Ranges that follow, one after the other.
    pub(super) more: VecDeque<ByteRange>,
    /// What is done already.
    pub(super) progress: Progress,
    /// It was handed over, and has come again.
    pub(super) is_resumed: bool,
}

impl Work {
    /// That of a request that is new.
    fn new(lun: &Arc<Lun>, io: IoPlan, more: VecDeque<ByteRange>) -> Self {
        let progress = Progress::default();
        Self { lun: Arc::clone(lun), io, more, progress, is_resumed: false }
    }
}

impl Lane {
    pub(super) fn new(id: u32, index: u16, core: Arc<Core>) -> Arc<Self> {
        Arc::new(Self {
            id,
            index,
            core,
            requests: Mutex::default(),
            has_gathered: AtomicBool::new(false),
            is_resuming: AtomicBool::new(false),
            scratch: Mutex::default(),
        })
    }

    pub(super) fn requests(&self) -> MutexGuard<'_, Requests> {
        lock(&self.requests)
    }

    pub(super) fn take_scratch(&self) -> Scratch {
        std::mem::take(&mut *lock(&self.scratch))
    }

    pub(super) fn put_scratch(&self, scratch: Scratch) {
        *lock(&self.scratch) = scratch;
    }

    /// An SRB: a SCSI command for a LUN.
    pub(super) fn execute(&self, packet: IncomingPacket, form: PacketForm) {
        let refusal = match self.core.ready_form() {
            None => Some(NtStatus::INVALID_DEVICE_STATE),
            // The last fields of the SRB are missing, where this version has them.
            Some(PacketForm::Full) if form == PacketForm::Compact => {
                Some(NtStatus::INVALID_PARAMETER)
            }
            Some(_) => None,
        };
        if let Some(status) = refusal {
            return packet.complete(VstorPacket::answer(status).bytes(form));
        }
        // Looked at where it lies; what goes on for longer makes its own copy.
        let padded;
        let request = match VstorPacket::ref_from_bytes(packet.payload()) {
            Ok(request) => request,
            Err(_) => {
                padded = read_request(&packet);
                &padded
            }
        };
        let mut success = *request;
        match judge(&self.core, &packet, request, &mut success) {
            None => packet.complete(success.bytes(form)),
            Some(Verdict::Answer(answer)) => {
                let mut request = read_request(&packet);
                answer_srb(&mut request, &answer);
                packet.complete(request.bytes(form));
            }
            Some(Verdict::Redeliver) => packet.redeliver(),
            Some(Verdict::Io(work)) => {
                let request = read_request(&packet);
                self.gather(packet, request, form, work);
            }
        }
    }

    /// Puts a request aside until the end of the batch.
    pub(super) fn gather(
        &self,
        packet: IncomingPacket,
        mut request: VstorPacket,
        form: PacketForm,
        work: Work,
    ) {
        let Work { lun, io, more, progress, is_resumed } = work;
        let IoPlan { operation, offset, bytes, data_bytes } = io;
        // A pattern that is written or compared over and over starts again at every sector.
        let skip = if u64::from(data_bytes) == bytes { progress.bytes } else { 0 };
        let mut requests = self.requests();
        let mut buffers = requests.take_buffers();
        let prepared = if is_resumed && requests.is_aborted(lun.address) {
            Err(Answer::aborted())
        } else {
            set_buffers(&mut buffers, &packet, request.srb(), skip, data_bytes)
                .and_then(|()| requests.reserve().ok_or(Answer::busy()))
        };
        let slot = match prepared {
            Ok(slot) => slot,
            Err(answer) => {
                requests.keep_buffers(buffers);
                drop(requests);
                answer_srb(&mut request, &answer);
                return packet.complete(request.bytes(form));
            }
        };
        let in_flight = InFlight {
            packet,
            request,
            form,
            lun,
            stage: Stage::Gathered,
            moved: data_bytes,
            progress,
            ranges: more,
            resets: Vec::new(),
        };
        let range = ByteRange { offset: offset + progress.bytes, bytes: bytes - progress.bytes };
        requests.gather(self.id, slot, in_flight, operation, range, buffers);
        self.has_gathered.store(true, Ordering::Relaxed);
    }

    /// Gives what the batch has gathered to the back ends.
    pub(super) fn submit(&self) {
        self.has_gathered.store(false, Ordering::Relaxed);
        let mut scratch = self.take_scratch();
        loop {
            let gathered = self.requests().take_gathered();
            let Some(Gathered { lun, mut requests }) = gathered else { break };
            lun.disk.backend().submit(&mut requests, &mut scratch.done);
            self.requests().keep_vector(requests);
            self.core.finish(&mut scratch);
        }
        self.put_scratch(scratch);
    }
}

impl ProcessPacket for Lane {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        if self.is_resuming.load(Ordering::Relaxed) {
            // Those that come again come first.
            self.is_resuming.store(false, Ordering::Relaxed);
            self.requests().forget_aborts();
        }
        let Some((operation, form)) = VstorPacket::peek(packet.payload()) else {
            tracing::debug!(bytes = packet.payload().len(), "storage packet refused");
            let answer = VstorPacket::answer(NtStatus::INVALID_PARAMETER);
            return packet.complete(answer.bytes(PacketForm::Full));
        };
        if operation == Operation::EXECUTE_SRB {
            return self.execute(packet, form);
        }
        let request = read_request(&packet);
        let answer = match operation {
            Operation::RESET_LUN | Operation::RESET_BUS | Operation::RESET_ADAPTER => {
                return self.core.reset(packet, &request, form);
            }
            Operation::BEGIN_INITIALIZATION
            | Operation::QUERY_PROTOCOL_VERSION
            | Operation::QUERY_PROPERTIES
            | Operation::END_INITIALIZATION
            | Operation::CREATE_SUB_CHANNELS => {
                if self.index == 0 {
                    self.core.initialise(&request)
                } else {
                    // Only the primary channel is initialised.
                    VstorPacket::answer(NtStatus::INVALID_DEVICE_STATE)
                }
            }
            // What only a host says, what only a Fibre Channel adapter does, and the unknown.
            _ => VstorPacket::answer(NtStatus::INVALID_DEVICE_REQUEST),
        };
        packet.complete(answer.bytes(form));
    }

    fn resume_packet(&self, channel: &Channel, packet: ResumedPacket) {
        self.resume(channel, packet);
    }

    fn freeze(&self, _channel: &Channel) {
        self.settle();
    }

    fn thaw(&self, _channel: &Channel) {
        self.go_on();
    }

    fn processing_complete(&self, _channel: &Channel, _packets: u32) {
        if self.has_gathered.load(Ordering::Relaxed) {
            self.submit();
        }
        self.core.luns.forget();
        self.core.retire_disks();
    }
}

/// Only notices to the guest can be in flight, and there is nothing to know of them.
impl SaveRestorePacket for Lane {
    fn restore_packet(
        &self,
        channel: &Channel,
        library_state: &[u8],
        _own_state: &[u8],
    ) -> Result<(), NtStatus> {
        let packet = channel.packet_allocate().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
        packet.restore(library_state).map_err(|refused| refused.error.status())
    }
}

impl StateChange for Lane {
    fn opened(&self, channel: &Channel) -> Result<(), NtStatus> {
        // A guest that had it open before a restore has agreed on what the saved state says.
        if self.index == 0 && !channel.is_resumed() {
            self.core.start_over();
        }
        Ok(())
    }

    /// Everything in flight has ended: the library has waited for it.
    fn closed(&self, _channel: &Channel) {
        if self.index == 0 {
            self.core.start_over();
        }
    }
}

/// Makes the first `data_bytes` bytes of a packet's external data, without the first `skip` of them, the
/// buffers of a request.
fn set_buffers(
    buffers: &mut Buffers,
    packet: &IncomingPacket,
    srb: &ScsiRequest,
    skip: u64,
    data_bytes: u32,
) -> Result<(), Answer> {
    if data_bytes == 0 {
        return Ok(());
    }
    let data = srb
        .direction()
        .ok()
        .and_then(|direction| external_data(packet, direction).ok())
        .ok_or(Answer::invalid_request())?;
    buffers
        .set_from(data.memory(), data.segments(), skip, u64::from(data_bytes).saturating_sub(skip))
        .map_err(|_| Answer::invalid_request())
}

/// A copy of the request in a packet whose length is that of one.
pub(super) fn read_request(packet: &IncomingPacket) -> VstorPacket {
    VstorPacket::parse(packet.payload())
        .map_or_else(|_| VstorPacket::notice(Operation::from_raw(0)), |(request, _)| request)
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

/// Why the external data of a packet is not at hand. Small: it is judged for each request.
#[derive(Clone, Copy)]
pub(super) enum NoData {
    /// It has to be brought in first.
    Absent,
    Refused,
}

impl From<NoData> for Verdict {
    fn from(why: NoData) -> Self {
        match why {
            NoData::Absent => Self::Redeliver,
            NoData::Refused => Self::Answer(Answer::invalid_request()),
        }
    }
}

/// The external data of a packet, if it has some.
#[inline]
pub(super) fn find_data(
    packet: &IncomingPacket,
    direction: DataDirection,
) -> Result<Option<ExternalData<'_>>, NoData> {
    if !packet.has_external_data() {
        return Ok(None);
    }
    match external_data(packet, direction) {
        Ok(data) => Ok(Some(data)),
        Err(Error::Pending) => Err(NoData::Absent),
        Err(error) => {
            tracing::debug!(%error, "data of a SCSI request refused");
            Err(NoData::Refused)
        }
    }
}

/// What the SRB in `request` comes to; `None` if it is done, and `success` is its answer.
#[inline]
fn judge(
    core: &Core,
    packet: &IncomingPacket,
    request: &VstorPacket,
    success: &mut VstorPacket,
) -> Option<Verdict> {
    let srb = request.srb();
    // The SRB's own length is not looked at: the packet's says the same, and cannot lie.
    let (Ok(_), Ok(direction)) = (srb.cdb(), srb.direction()) else {
        return Some(Verdict::Answer(Answer::invalid_request()));
    };
    let external = match find_data(packet, direction) {
        Ok(external) => external,
        Err(why) => return Some(why.into()),
    };
    let external = external.as_ref();
    let buffer = GuestData(external);
    let available = external.map_or(0, |data| data.len().min(srb.data_transfer_length.get()));
    let data = Data { direction, available, buffer: &buffer };
    let mut verdict = None;
    let done = core.luns.with_table(|luns| {
        let mut ranges = Vec::new();
        let (plan, lun) = luns.plan(srb.address(), srb.command(), &data, &mut ranges);
        let Some(lun) = lun else {
            let answer = if let Plan::Answer(answer) = plan { answer } else { Answer::no_lun() };
            verdict = Some(Verdict::Answer(answer));
            return false;
        };
        verdict = Some(match plan {
            Plan::Answer(answer) => Verdict::Answer(answer),
            Plan::Io(io) => {
                // The answer is made before the data is copied, and the result is one bit: whatever
                // is written now and read at once would wait until the copy has left the processor's
                // store buffer.
                success.make_answer(NtStatus::SUCCESS);
                success.srb_mut().finish(SrbStatus::SUCCESS, ScsiStatus::GOOD, io.data_bytes);
                match run_inline(lun, &io, external) {
                    Some(Ok(())) => return true,
                    Some(Err(error)) => {
                        Verdict::Answer(Answer::failed(error, lun.disk.sector_bytes()))
                    }
                    None => Verdict::Io(Work::new(lun, io, VecDeque::new())),
                }
            }
            Plan::Discard => {
                let mut more = VecDeque::from(ranges);
                let first = more.pop_front().unwrap_or(ByteRange { offset: 0, bytes: 0 });
                let ByteRange { offset, bytes } = first;
                let operation = IoOperation::Discard;
                let io = IoPlan { operation, offset, bytes, data_bytes: 0 };
                Verdict::Io(Work::new(lun, io, more))
            }
        });
        false
    });
    if done { None } else { verdict }
}

/// Reads and writes at once, where the back end can.
fn run_inline(
    lun: &Lun,
    io: &IoPlan,
    external: Option<&ExternalData<'_>>,
) -> Option<Result<(), IoError>> {
    let external = external?;
    let IoPlan { operation, offset, bytes, .. } = *io;
    if !matches!(operation, IoOperation::Read | IoOperation::Write { .. }) {
        return None;
    }
    if operation.is_write() {
        lun.disk.note_write(offset);
    }
    let memory = external.memory();
    let segments = &mut external.segments();
    lun.disk.backend().run_inline(InlineIo { operation, offset, bytes, memory, segments })
}

/// The guest's side of a command's data.
pub(super) struct GuestData<'a>(pub(super) Option<&'a ExternalData<'a>>);

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
        let Scratch { done, ended, again, settled } = scratch;
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
                    Some(Outcome::Settled(one)) => settled.push(one),
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
        for one in settled.drain(..) {
            lane.hand_over(one);
        }
        while let Some((lun, request)) = again.pop() {
            let token = request.token;
            let mut one = lane.requests().take_vector();
            one.push(request);
            lun.disk.backend().submit(&mut one, done);
            let mut requests = lane.requests();
            requests.keep_vector(one);
            let is_frozen = requests.is_frozen();
            drop(requests);
            if is_frozen {
                // It froze in between, and has not asked for this one.
                lun.disk.backend().cancel(&|other| other == token, done);
            }
        }
        self.has_settled(&channel);
    }
}
