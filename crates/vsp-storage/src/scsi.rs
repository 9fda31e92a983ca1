//! A SCSI target: what each command means for a disk.
//!
//! Everything here is pure: a command and a disk's profile go in, and out comes a [`Plan`]: the
//! answer, or what the back end has to do first. The guest's data is reached through [`DataBuffer`].

mod block_commands;
pub(crate) mod bus;
mod inquiry;
mod mode_sense;

#[cfg(test)]
mod tests;

use vstor_wire::scsi::capacity::{Capacity10, Capacity16};
use vstor_wire::scsi::cdb::Command;
use vstor_wire::scsi::sense::{AdditionalSense, FieldPointer, SenseData, SenseKey};
use vstor_wire::srb::{DataDirection, ScsiStatus, SrbStatus};
use zerocopy::IntoBytes;

use crate::block::{IoError, IoOperation};
use crate::disk::Profile;

/// Most descriptors of one UNMAP.
pub(crate) const MAX_UNMAP_DESCRIPTORS: usize = 64;

/// Most bytes one UNMAP names.
pub(crate) const MAX_UNMAP_BYTES: u64 = 1 << 30;

/// Most bytes one WRITE SAME names.
pub(crate) const MAX_WRITE_SAME_BYTES: u64 = 64 << 20;

/// The guest's side of a command's data.
pub(crate) trait DataBuffer {
    /// Copies from byte `offset` on; `false` if it cannot.
    fn read_at(&self, offset: u32, into: &mut [u8]) -> bool;

    /// Copies to byte `offset` on; `false` if it cannot.
    fn write_at(&self, offset: u32, from: &[u8]) -> bool;
}

/// The data of a command, as its request describes it.
pub(crate) struct Data<'a> {
    pub(crate) direction: DataDirection,
    /// Bytes that there are and that may be moved.
    pub(crate) available: u32,
    pub(crate) buffer: &'a dyn DataBuffer,
}

/// How a command ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Answer {
    pub(crate) srb: SrbStatus,
    pub(crate) scsi: ScsiStatus,
    /// Bytes that were moved.
    pub(crate) moved: u32,
    pub(crate) sense: Option<SenseData>,
}

impl Answer {
    /// Done.
    pub(crate) const fn good(moved: u32) -> Self {
        Self { srb: SrbStatus::SUCCESS, scsi: ScsiStatus::GOOD, moved, sense: None }
    }

    /// Refused or failed: CHECK CONDITION.
    pub(crate) const fn check(sense: SenseData) -> Self {
        let scsi = ScsiStatus::CHECK_CONDITION;
        Self { srb: SrbStatus::ERROR, scsi, moved: 0, sense: Some(sense) }
    }

    /// Refused for a reason without further detail.
    pub(crate) const fn illegal(code: AdditionalSense) -> Self {
        Self::check(SenseData::new(SenseKey::IllegalRequest, code))
    }

    /// Refused for a field of the CDB.
    pub(crate) const fn invalid_field(field: FieldPointer) -> Self {
        let sense = SenseData::new(SenseKey::IllegalRequest, AdditionalSense::INVALID_FIELD_IN_CDB);
        Self::check(sense.with_field(field))
    }

    /// The request around the command makes no sense: its data is missing, or goes the other way.
    pub(crate) const fn invalid_request() -> Self {
        let scsi = ScsiStatus::GOOD;
        Self { srb: SrbStatus::INVALID_REQUEST, scsi, moved: 0, sense: None }
    }

    /// There is no such LUN.
    pub(crate) const fn no_lun() -> Self {
        let sense =
            SenseData::new(SenseKey::IllegalRequest, AdditionalSense::LOGICAL_UNIT_NOT_SUPPORTED);
        Self { srb: SrbStatus::INVALID_LUN, ..Self::check(sense) }
    }

    /// Given up without a fault of the guest's, which may try again.
    pub(crate) const fn aborted() -> Self {
        let sense = SenseData::new(SenseKey::AbortedCommand, AdditionalSense::NONE);
        Self { srb: SrbStatus::ABORTED, ..Self::check(sense) }
    }

    /// The controller holds as many commands as it can.
    pub(crate) const fn busy() -> Self {
        let (srb, scsi) = (SrbStatus::BUSY, ScsiStatus::BUSY);
        Self { srb, scsi, moved: 0, sense: None }
    }

    /// What a failure of the back end means to the guest.
    pub(crate) fn failed(error: IoError, sector_bytes: u32) -> Self {
        let sector = |at: u64| at / u64::from(sector_bytes);
        let medium = |code, at| SenseData::new(SenseKey::MediumError, code).with_block(sector(at));
        Self::check(match error {
            IoError::EndOfMedium { at } | IoError::Read { at, .. } => {
                medium(AdditionalSense::UNRECOVERED_READ_ERROR, at)
            }
            IoError::Write { at, .. } => medium(AdditionalSense::WRITE_ERROR, at),
            IoError::NoSpace => SenseData::new(
                SenseKey::DataProtect,
                AdditionalSense::SPACE_ALLOCATION_FAILED_WRITE_PROTECT,
            ),
            IoError::WriteProtected => {
                SenseData::new(SenseKey::DataProtect, AdditionalSense::WRITE_PROTECTED)
            }
            IoError::Miscompare { at } => {
                SenseData::new(SenseKey::Miscompare, AdditionalSense::MISCOMPARE_DURING_VERIFY)
                    .with_block(sector(at))
            }
            IoError::Memory => {
                SenseData::new(SenseKey::AbortedCommand, AdditionalSense::DATA_PHASE_ERROR)
            }
            IoError::Busy => return Self::busy(),
            IoError::Malformed => {
                SenseData::new(SenseKey::HardwareError, AdditionalSense::INTERNAL_TARGET_FAILURE)
            }
        })
    }
}

/// What a command comes to.
#[derive(Debug)]
pub(crate) enum Plan {
    /// It is done, or refused.
    Answer(Answer),
    /// The back end has to do this.
    Io(IoPlan),
    /// The back end has to discard the ranges that are left in the scratch list, one after the other.
    Discard,
}

/// What the back end has to do for a command.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct IoPlan {
    pub(crate) operation: IoOperation,
    /// First byte of the disk.
    pub(crate) offset: u64,
    /// Bytes of the disk.
    pub(crate) bytes: u64,
    /// Bytes of the guest's data that go with it, from the start.
    pub(crate) data_bytes: u32,
}

/// A range of bytes of the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ByteRange {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// What `command` comes to on a disk. Ranges of a [`Plan::Discard`] are left in `ranges`.
#[inline]
pub(crate) fn plan(
    command: &Command,
    disk: &Profile,
    data: &Data<'_>,
    ranges: &mut Vec<ByteRange>,
) -> Plan {
    match *command {
        Command::Read(transfer) => block_commands::read(disk, data, &transfer),
        Command::Write(transfer) => block_commands::write(disk, data, &transfer),
        Command::Verify { extent, compare } => block_commands::verify(disk, data, &extent, compare),
        Command::SynchronizeCache { extent, .. } => block_commands::synchronize(disk, &extent),
        Command::Unmap { parameter_bytes } => {
            block_commands::unmap(disk, data, parameter_bytes, ranges)
        }
        Command::WriteSame { extent, unmap, no_data } => {
            block_commands::write_same(disk, data, &extent, unmap, no_data)
        }
        Command::StartStopUnit { power_condition, load_eject, start, .. } => {
            if power_condition != 0 {
                Plan::Answer(Answer::invalid_field(FieldPointer::cdb(4).with_bit(7)))
            } else if load_eject {
                // The medium cannot be removed.
                Plan::Answer(Answer::invalid_field(FieldPointer::cdb(4).with_bit(1)))
            } else if start {
                Plan::Answer(Answer::good(0))
            } else {
                // Nothing stops, but a guest that stops a disk wants its data to be safe.
                Plan::Io(block_commands::FLUSH)
            }
        }
        Command::TestUnitReady => Plan::Answer(Answer::good(0)),
        Command::Inquiry { page: None, allocation } => {
            Plan::Answer(reply(data, inquiry::standard().as_bytes(), u32::from(allocation)))
        }
        Command::Inquiry { page: Some(page), allocation } => {
            Plan::Answer(match inquiry::page(disk, page) {
                Some(bytes) => reply(data, bytes.as_slice(), u32::from(allocation)),
                None => Answer::invalid_field(FieldPointer::cdb(2).with_bit(7)),
            })
        }
        Command::ModeSense(request) => Plan::Answer(match mode_sense::data(disk, &request) {
            Ok(bytes) => reply(data, bytes.as_slice(), u32::from(request.allocation)),
            Err(answer) => answer,
        }),
        Command::ReadCapacity10 => {
            let capacity = Capacity10::new(disk.sectors - 1, disk.sector_bytes);
            Plan::Answer(reply(data, capacity.as_bytes(), u32::MAX))
        }
        Command::ReadCapacity16 { allocation } => {
            let exponent = disk.granularity.trailing_zeros().to_le_bytes()[0]; // at most 31
            let mut capacity = Capacity16::new(disk.sectors - 1, disk.sector_bytes, exponent);
            if !disk.read_only {
                capacity = capacity.with_unmap();
            }
            Plan::Answer(reply(data, capacity.as_bytes(), allocation))
        }
        // The bus answers these two, because they concern more than the disk.
        Command::RequestSense { .. } | Command::ReportLuns { .. } => {
            Plan::Answer(Answer::illegal(AdditionalSense::INVALID_COMMAND_OPERATION_CODE))
        }
    }
}

/// Gives the guest as much of `bytes` as it has room for.
pub(crate) fn reply(data: &Data<'_>, bytes: &[u8], allocation: u32) -> Answer {
    let room = data.available.min(allocation) as usize;
    let fitting = bytes.get(..room).unwrap_or(bytes);
    let Ok(moved) = u32::try_from(fitting.len()) else {
        return Answer::invalid_request();
    };
    if moved == 0 {
        return Answer::good(0);
    }
    if data.direction != DataDirection::In || !data.buffer.write_at(0, fitting) {
        return Answer::invalid_request();
    }
    Answer::good(moved)
}

/// Bytes of an answer that is put together piece by piece; longer ones are cut.
#[derive(Debug)]
pub(crate) struct Page<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Page<N> {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; N], len: 0 }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(bytes) {
            *to = *from;
            self.len += 1;
        }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}
