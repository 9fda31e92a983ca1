//! Requests across a freeze: how they settle, what is kept with them, and how they go on.
//!
//! ```text
//!   gathered ──────────────────────────────► never started ─┐
//!   submitted ── cancel ──► NeverStarted ──► never started ─┤ handed over ──► thaw, or restore
//!                      └──► Cancelled ─────► cancelled ─────┘                       │
//!                      └──► Done ──► completed: the channel holds the answer        ▼
//!                             └ one range of several ──► cancelled         judged again, continued
//! ```
//!
//! What is kept with a packet says how far its request came, and nothing that the packet does not say
//! itself but as a check. It may come from a saved state, so from anybody: the request is judged anew
//! from the bytes of its packet, on the disk that is there, and a note that does not fit it is not
//! used: the guest is told to try again.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use kmcl::{Channel, Fence, Fenced, HandOverProblem, IncomingPacket, NotHandedOver, ResumedPacket};
use saved_state::bare::{self, BareError};
use saved_state::storage::StorageRequestRecord;
use vstor_wire::packet::{Operation, PacketForm, VstorPacket};
use vstor_wire::srb::ScsiRequest;

use super::Core;
use super::lane::{GuestData, Lane, Verdict, Work, find_data, read_request};
use super::requests::{Progress, Settled, answer_srb};
use crate::block::IoOperation;
use crate::scsi::bus::Lun;
use crate::scsi::{Answer, ByteRange, Data, IoPlan, Plan, plan};

/// Most bytes of what is kept with a packet: the record, each field at its longest.
const MAX_NOTE_BYTES: usize = 256;

/// Why what was kept with a packet is not used.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
enum NoteError {
    #[error(transparent)]
    Record(#[from] BareError),
    #[error("its {field} is not that of its packet")]
    Differs { field: &'static str },
    #[error("{field} is {found}, of {whole}")]
    Beyond { field: &'static str, found: u64, whole: u64 },
}

impl Lane {
    /// The channel was frozen. What has not started is handed over at once, what runs when its back end
    /// lets go of it.
    pub(super) fn settle(&self) {
        let mut scratch = self.take_scratch();
        let disks = {
            let mut requests = self.requests();
            requests.set_frozen(true);
            self.has_gathered.store(false, Ordering::Relaxed);
            requests.withdraw_gathered(&mut scratch.done);
            requests.disks()
        };
        #[cfg(feature = "faults")]
        let disks = if crate::faults::Fault::ReplayWithoutFence.is_on() {
            let torn: Vec<Settled> = self.requests().tear_out();
            torn.into_iter().for_each(|one| self.hand_over(one));
            Vec::new()
        } else {
            disks
        };
        for lun in disks {
            let mine = |token| super::requests::lane_of(token) == self.id;
            lun.disk.backend().cancel(&mine, &mut scratch.done);
        }
        self.core.finish(&mut scratch);
        self.put_scratch(scratch);
    }

    /// The channel thaws: requests that were handed over come next.
    pub(super) fn go_on(&self) {
        self.is_resuming.store(true, Ordering::Relaxed);
        self.requests().set_frozen(false);
        if self.has_gathered.load(Ordering::Relaxed) {
            self.submit();
        }
    }

    /// Hands a request that came back unfinished over to the channel, unless it is over for another
    /// reason.
    pub(super) fn hand_over(&self, settled: Settled) {
        let Settled { packet, mut request, form, lun, fence, progress, resets } = settled;
        let end = |packet: IncomingPacket, request: &mut VstorPacket, answer: &Answer| {
            answer_srb(request, answer);
            packet.complete(request.bytes(form));
        };
        if !resets.is_empty() {
            end(packet, &mut request, &Answer::aborted());
            return resets.iter().for_each(|reset| reset.release());
        }
        let is_there = self.core.luns.table().get(lun.address).is_some_and(|there| {
            // Another disk may have its address by now.
            there.attachment == lun.attachment
        });
        if !is_there {
            return end(packet, &mut request, &Answer::no_lun());
        }
        let mut note = [0; MAX_NOTE_BYTES];
        let Some(note) = write_note(request.srb(), &lun, progress, &mut note) else {
            // Cannot be: an SRB's CDB has 16 bytes at most.
            return end(packet, &mut request, &Answer::aborted());
        };
        let fenced: Fenced = match fence {
            Fence::NeverStarted => packet.never_started(),
            Fence::Cancelled => packet.cancelled(),
        };
        let Err(NotHandedOver { packet, why }) = fenced.hand_over(note) else {
            return self.requests().note_handed_over();
        };
        match why {
            HandOverProblem::NotFrozen => {
                // The channel has thawed meanwhile.
                self.resume_noted(packet, form, fence, note);
                if !self.requests().is_frozen() {
                    self.submit();
                }
            }
            _ => end(packet, &mut request, &Answer::aborted()),
        }
    }

    /// A packet that was handed over comes again.
    pub(super) fn resume(&self, channel: &Channel, resumed: ResumedPacket) {
        use kmcl::ProcessPacket;
        let fence = resumed.fence();
        let note: Box<[u8]> = resumed.device_state().into();
        let packet = resumed.into_packet();
        match VstorPacket::peek(packet.payload()) {
            Some((Operation::EXECUTE_SRB, form)) if !note.is_empty() => {
                self.resume_noted(packet, form, fence, &note);
            }
            // Nothing of this device's is handed over without a note.
            _ => self.process_packet(channel, packet),
        }
    }

    fn resume_noted(&self, packet: IncomingPacket, form: PacketForm, fence: Fence, note: &[u8]) {
        if self.core.ready_form().is_none() {
            return self.execute(packet, form); // which refuses it
        }
        let mut request = read_request(&packet);
        let verdict = judge_again(&self.core, &packet, request.srb(), fence, note);
        match verdict {
            Ok(Verdict::Io(work)) => self.gather(packet, request, form, work),
            Ok(Verdict::Redeliver) => packet.redeliver(),
            Ok(Verdict::Answer(answer)) => {
                answer_srb(&mut request, &answer);
                packet.complete(request.bytes(form));
            }
            Err(error) => {
                let transaction_id = packet.transaction_id();
                tracing::warn!(%error, transaction_id, "a saved request does not fit its packet");
                answer_srb(&mut request, &Answer::aborted());
                packet.complete(request.bytes(form));
            }
        }
    }
}

/// Writes what is kept with a packet.
fn write_note<'a>(
    srb: &ScsiRequest,
    lun: &Lun,
    progress: Progress,
    into: &'a mut [u8; MAX_NOTE_BYTES],
) -> Option<&'a [u8]> {
    let address = lun.address;
    let record = StorageRequestRecord {
        path: address.path.into(),
        target: address.target.into(),
        lun: address.lun.into(),
        cdb: srb.cdb().ok()?.to_vec(),
        transfer_bytes: srb.data_transfer_length.get(),
        moved_bytes: u32::try_from(progress.bytes).ok()?,
        discarded_ranges: progress.ranges,
        attachment: lun.attachment,
    };
    let bytes = bare::encode(&record, into)?;
    into.get(..bytes)
}

/// What an SRB that comes again comes to.
fn judge_again(
    core: &Core,
    packet: &IncomingPacket,
    srb: &ScsiRequest,
    fence: Fence,
    note: &[u8],
) -> Result<Verdict, NoteError> {
    let (Ok(cdb), Ok(direction)) = (srb.cdb(), srb.direction()) else {
        return Ok(Verdict::Answer(Answer::invalid_request()));
    };
    let note: StorageRequestRecord = bare::decode(note)?;
    check_note(&note, srb, cdb)?;
    let external = match find_data(packet, direction) {
        Ok(external) => external,
        Err(why) => return Ok(why.into()),
    };
    let external = external.as_ref();
    let buffer = GuestData(external);
    let available = external.map_or(0, |data| data.len().min(srb.data_transfer_length.get()));
    let data = Data { direction, available, buffer: &buffer };
    core.luns.with_table(|luns| {
        // No unit attention condition concerns it: it was accepted before that arose.
        let there = luns.get(srb.address()).filter(|lun| lun.attachment == note.attachment);
        let Some(lun) = there else { return Ok(Verdict::Answer(Answer::no_lun())) };
        let command = match srb.command() {
            Ok(command) => command,
            Err(error) => return Ok(Verdict::Answer(Answer::check(error.sense()))),
        };
        let mut ranges = Vec::new();
        let (io, more, done) = match plan(&command, lun.disk.profile(), &data, &mut ranges) {
            Plan::Answer(answer) => return Ok(Verdict::Answer(answer)),
            Plan::Io(io) => {
                within("discarded_ranges", note.discarded_ranges.into(), 1)?;
                (io, VecDeque::new(), 0)
            }
            Plan::Discard => {
                let whole = ranges.len() as u64;
                within("discarded_ranges", note.discarded_ranges.into(), whole)?;
                let mut more: VecDeque<ByteRange> =
                    ranges.into_iter().skip(note.discarded_ranges as usize).collect();
                let ByteRange { offset, bytes } =
                    more.pop_front().unwrap_or(ByteRange { offset: 0, bytes: 0 });
                let operation = IoOperation::Discard;
                (IoPlan { operation, offset, bytes, data_bytes: 0 }, more, note.discarded_ranges)
            }
        };
        let bytes = u64::from(note.moved_bytes);
        let sector_bytes = u64::from(lun.disk.sector_bytes());
        within("moved_bytes", bytes, io.bytes.max(1))?;
        if !bytes.is_multiple_of(sector_bytes) {
            let field = "moved_bytes in its last sector";
            let found = bytes % sector_bytes;
            return Err(NoteError::Beyond { field, found, whole: 0 });
        }
        let was_begun = fence == Fence::Cancelled || bytes > 0 || done > 0;
        let progress = Progress { was_begun, ranges: done, bytes };
        Ok(Verdict::Io(Work { lun: lun.clone(), io, more, progress, is_resumed: true }))
    })
}

/// Checks that a note is about the request that its packet has.
fn check_note(note: &StorageRequestRecord, srb: &ScsiRequest, cdb: &[u8]) -> Result<(), NoteError> {
    let address = srb.address();
    for (field, fits) in [
        ("path", note.path == u32::from(address.path)),
        ("target", note.target == u32::from(address.target)),
        ("lun", note.lun == u32::from(address.lun)),
        ("cdb", note.cdb == cdb),
        ("transfer_bytes", note.transfer_bytes == srb.data_transfer_length.get()),
    ] {
        if !fits {
            return Err(NoteError::Differs { field });
        }
    }
    Ok(())
}

fn within(field: &'static str, found: u64, whole: u64) -> Result<(), NoteError> {
    if found < whole { Ok(()) } else { Err(NoteError::Beyond { field, found, whole }) }
}
