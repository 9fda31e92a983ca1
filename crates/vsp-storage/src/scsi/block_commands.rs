//! Commands that read, write and give back blocks.

use vstor_wire::scsi::cdb::{ByteCheck, CdbForm, Extent, Transfer};
use vstor_wire::scsi::sense::{AdditionalSense, FieldPointer, SenseData, SenseKey};
use vstor_wire::scsi::unmap::{UnmapDescriptor, UnmapHeader};
use vstor_wire::srb::DataDirection;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{
    Answer, ByteRange, Data, IoPlan, MAX_UNMAP_BYTES, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BYTES,
    Plan,
};
use crate::block::IoOperation;
use crate::disk::{MAX_TRANSFER_BYTES, Profile};

/// Everything that was written is stable.
pub(super) const FLUSH: IoPlan =
    IoPlan { operation: IoOperation::Flush, offset: 0, bytes: 0, data_bytes: 0 };

/// Bytes of the largest sector.
const MAX_SECTOR_BYTES: usize = 4096;

#[inline]
pub(super) fn read(disk: &Profile, data: &Data<'_>, read: &Transfer) -> Plan {
    let range = range(disk, &read.extent)
        .and_then(|range| data_for(data, DataDirection::In, &read.extent, range, range.bytes));
    // Force unit access changes nothing: the host's cache and the medium never disagree about what a
    // read returns.
    transfer(range, IoOperation::Read)
}

#[inline]
pub(super) fn write(disk: &Profile, data: &Data<'_>, write: &Transfer) -> Plan {
    let range = writable(disk)
        .and_then(|()| range(disk, &write.extent))
        .and_then(|range| data_for(data, DataDirection::Out, &write.extent, range, range.bytes));
    transfer(range, IoOperation::Write { fua: write.fua })
}

#[inline]
fn transfer(range: Result<(ByteRange, u32), Answer>, operation: IoOperation) -> Plan {
    match range {
        Ok((ByteRange { bytes: 0, .. }, _)) => Plan::Answer(Answer::good(0)),
        Ok((ByteRange { offset, bytes }, data_bytes)) => {
            Plan::Io(IoPlan { operation, offset, bytes, data_bytes })
        }
        Err(answer) => Plan::Answer(answer),
    }
}

pub(super) fn verify(disk: &Profile, data: &Data<'_>, extent: &Extent, compare: ByteCheck) -> Plan {
    let range = range(disk, extent);
    let (range, operation) = match compare {
        ByteCheck::Medium => (range.map(|range| (range, 0)), IoOperation::Verify),
        ByteCheck::Blocks | ByteCheck::OneBlock => {
            let range = range.and_then(|range| {
                let wanted = match compare {
                    ByteCheck::OneBlock => range.bytes.min(u64::from(disk.sector_bytes)),
                    _ => range.bytes,
                };
                data_for(data, DataDirection::Out, extent, range, wanted)
            });
            (range, IoOperation::Compare)
        }
    };
    transfer(range, operation)
}

pub(super) fn synchronize(disk: &Profile, extent: &Extent) -> Plan {
    // Flushing only a part is allowed, flushing all is too.
    match range(disk, extent) {
        Ok(_) => Plan::Io(FLUSH),
        Err(answer) => Plan::Answer(answer),
    }
}

pub(super) fn write_same(
    disk: &Profile,
    data: &Data<'_>,
    extent: &Extent,
    unmap: bool,
    no_data: bool,
) -> Plan {
    match plan_write_same(disk, data, extent, unmap, no_data) {
        Ok(io) => Plan::Io(io),
        Err(answer) => Plan::Answer(answer),
    }
}

fn plan_write_same(
    disk: &Profile,
    data: &Data<'_>,
    extent: &Extent,
    unmap: bool,
    no_data: bool,
) -> Result<IoPlan, Answer> {
    writable(disk)?;
    let whole = range(disk, extent)?;
    if whole.bytes == 0 || whole.bytes > MAX_WRITE_SAME_BYTES {
        // As the page of block limits says.
        return Err(Answer::invalid_field(length_field(extent)));
    }
    let sector_bytes = u64::from(disk.sector_bytes);
    let mut sector = [0; MAX_SECTOR_BYTES];
    let mut data_bytes = 0;
    if !no_data {
        (_, data_bytes) = data_for(data, DataDirection::Out, extent, whole, sector_bytes)?;
        let sector = sector.get_mut(..disk.sector_bytes as usize).unwrap_or_default();
        if !data.buffer.read_at(0, sector) {
            return Err(Answer::invalid_request());
        }
    }
    let ByteRange { offset, bytes } = whole;
    Ok(if sector.iter().any(|&byte| byte != 0) {
        IoPlan { operation: IoOperation::WriteSame, offset, bytes, data_bytes }
    } else {
        let operation = if unmap { IoOperation::Discard } else { IoOperation::WriteZeroes };
        IoPlan { operation, offset, bytes, data_bytes: 0 }
    })
}

pub(super) fn unmap(
    disk: &Profile,
    data: &Data<'_>,
    list_bytes: u16,
    ranges: &mut Vec<ByteRange>,
) -> Plan {
    match read_unmap_list(disk, data, list_bytes, ranges) {
        Ok(()) if ranges.is_empty() => Plan::Answer(Answer::good(0)),
        Ok(()) => Plan::Discard,
        Err(answer) => Plan::Answer(answer),
    }
}

/// An UNMAP parameter list with as many descriptors as are taken.
#[repr(C)]
#[derive(FromBytes, IntoBytes)]
struct UnmapList {
    header: UnmapHeader,
    descriptors: [UnmapDescriptor; MAX_UNMAP_DESCRIPTORS],
}

fn read_unmap_list(
    disk: &Profile,
    data: &Data<'_>,
    list_bytes: u16,
    ranges: &mut Vec<ByteRange>,
) -> Result<(), Answer> {
    const HEADER: usize = size_of::<UnmapHeader>();
    const DESCRIPTOR: usize = size_of::<UnmapDescriptor>();
    ranges.clear();
    writable(disk)?;
    if list_bytes == 0 {
        return Ok(());
    }
    if usize::from(list_bytes) < HEADER {
        return Err(Answer::illegal(AdditionalSense::PARAMETER_LIST_LENGTH_ERROR));
    }
    if data.direction != DataDirection::Out || data.available < u32::from(list_bytes) {
        return Err(Answer::invalid_request());
    }
    // One copy, of no more than is taken; the list in guest memory is not looked at again.
    let mut list = UnmapList::new_zeroed();
    let there = usize::from(list_bytes).min(size_of::<UnmapList>());
    let room = list.as_mut_bytes().get_mut(..there).unwrap_or_default();
    if !data.buffer.read_at(0, room) {
        return Err(Answer::invalid_request());
    }
    let Ok(count) = list.header.count(list_bytes) else {
        return Err(invalid_parameter(2));
    };
    if usize::from(count) > MAX_UNMAP_DESCRIPTORS {
        return Err(invalid_parameter(2));
    }
    let mut total = 0;
    for (index, descriptor) in list.descriptors.iter().take(usize::from(count)).enumerate() {
        let (lba, blocks) = (descriptor.lba.get(), descriptor.blocks.get());
        let extent = Extent { form: CdbForm::Sixteen, lba, blocks };
        let range = range(disk, &extent)?;
        total += range.bytes; // at most 64 times 2^32 sectors
        if total > MAX_UNMAP_BYTES {
            let at = HEADER + index * DESCRIPTOR + size_of::<u64>();
            return Err(invalid_parameter(u16::try_from(at).unwrap_or(u16::MAX)));
        }
        if range.bytes > 0 {
            ranges.push(range);
        }
    }
    Ok(())
}

fn invalid_parameter(byte: u16) -> Answer {
    Answer::check(
        SenseData::new(SenseKey::IllegalRequest, AdditionalSense::INVALID_FIELD_IN_PARAMETER_LIST)
            .with_field(FieldPointer::parameter(byte)),
    )
}

fn writable(disk: &Profile) -> Result<(), Answer> {
    if disk.read_only {
        let sense = SenseData::new(SenseKey::DataProtect, AdditionalSense::WRITE_PROTECTED);
        return Err(Answer::check(sense));
    }
    Ok(())
}

/// The bytes of an extent, if the disk has them.
#[inline]
fn range(disk: &Profile, extent: &Extent) -> Result<ByteRange, Answer> {
    let end = extent.lba.checked_add(u64::from(extent.blocks));
    if end.is_none_or(|end| end > disk.sectors) {
        return Err(Answer::illegal(AdditionalSense::LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE));
    }
    // Below the disk's size in bytes, which is 64 bits.
    let sector_bytes = u64::from(disk.sector_bytes);
    Ok(ByteRange {
        offset: extent.lba * sector_bytes,
        bytes: u64::from(extent.blocks) * sector_bytes,
    })
}

/// Checks that `wanted` bytes of data go `direction`, and that the request brought them.
#[inline]
fn data_for(
    data: &Data<'_>,
    direction: DataDirection,
    extent: &Extent,
    range: ByteRange,
    wanted: u64,
) -> Result<(ByteRange, u32), Answer> {
    let Ok(wanted @ 0..=MAX_TRANSFER_BYTES) = u32::try_from(wanted) else {
        return Err(Answer::invalid_field(length_field(extent)));
    };
    if wanted > 0 && (data.direction != direction || data.available < wanted) {
        return Err(Answer::invalid_request());
    }
    Ok((range, wanted))
}

/// Where a CDB has its number of blocks.
fn length_field(extent: &Extent) -> FieldPointer {
    FieldPointer::cdb(match extent.form {
        CdbForm::Six => 4,
        CdbForm::Ten => 7,
        CdbForm::Twelve => 6,
        CdbForm::Sixteen => 10,
    })
}
