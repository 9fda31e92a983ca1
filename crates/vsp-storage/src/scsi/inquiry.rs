//! INQUIRY: the standard data and the vital product data pages.

use vstor_wire::scsi::inquiry::StandardInquiry;
use vstor_wire::scsi::vpd::{
    self, BlockDeviceCharacteristics, BlockLimits, LocalDesignator, LogicalBlockProvisioning,
    MAX_PAGE_BYTES, PageHeader, T10Designator,
};
use zerocopy::IntoBytes;
use zerocopy::big_endian::{U16, U32, U64};

use super::{MAX_UNMAP_BYTES, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BYTES, Page};
use crate::disk::{MAX_TRANSFER_BYTES, Profile};

pub(super) fn standard() -> StandardInquiry {
    StandardInquiry::disk()
}

/// The vital product data page `page`, or `None` if a disk has no such page.
pub(super) fn page(disk: &Profile, page: u8) -> Option<Page<MAX_PAGE_BYTES>> {
    Some(match page {
        vpd::SUPPORTED_PAGES => build(page, &[&vpd::PAGES]),
        vpd::UNIT_SERIAL_NUMBER => build(page, &[disk.serial.as_bytes()]),
        vpd::DEVICE_IDENTIFICATION => {
            let name = T10Designator::new(disk.serial.as_bytes());
            let number = LocalDesignator::new(disk.id());
            build(page, &[number.as_bytes(), name.bytes()])
        }
        vpd::BLOCK_LIMITS => build(page, &[limits(disk).as_bytes()]),
        vpd::BLOCK_DEVICE_CHARACTERISTICS => {
            build(page, &[BlockDeviceCharacteristics::solid_state().as_bytes()])
        }
        vpd::LOGICAL_BLOCK_PROVISIONING => {
            build(page, &[LogicalBlockProvisioning::new(!disk.read_only).as_bytes()])
        }
        _ => return None,
    })
}

fn build(code: u8, parts: &[&[u8]]) -> Page<MAX_PAGE_BYTES> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut page = Page::new();
    // At most `MAX_PAGE_BYTES`.
    let length = u16::try_from(length).unwrap_or(u16::MAX);
    page.push(PageHeader::disk(code, length).as_bytes());
    for part in parts {
        page.push(part);
    }
    page
}

fn limits(disk: &Profile) -> BlockLimits {
    let sectors = |bytes: u64| bytes / u64::from(disk.sector_bytes);
    let sectors32 = |bytes| U32::new(u32::try_from(sectors(bytes)).unwrap_or(u32::MAX));
    let transfer = sectors32(u64::from(MAX_TRANSFER_BYTES));
    let mut limits = BlockLimits {
        write_same_nonzero: 1,
        optimal_granularity: U16::new(u16::try_from(disk.granularity).unwrap_or(0)),
        max_transfer: transfer,
        optimal_transfer: transfer,
        ..BlockLimits::default()
    };
    if !disk.read_only {
        limits.max_unmap_blocks = sectors32(MAX_UNMAP_BYTES);
        limits.max_unmap_descriptors =
            U32::new(u32::try_from(MAX_UNMAP_DESCRIPTORS).unwrap_or(u32::MAX));
        limits.unmap_granularity = U32::new(disk.granularity);
        limits.unmap_alignment = U32::new(1 << 31); // valid: multiples count from block 0
        limits.max_write_same = U64::new(sectors(MAX_WRITE_SAME_BYTES));
    }
    limits
}
