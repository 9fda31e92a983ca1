//! What a scan finds out about a disk, read from the data of INQUIRY, READ CAPACITY and MODE SENSE.

use vstor_wire::scsi::capacity::{Capacity10, Capacity16};
use vstor_wire::scsi::inquiry::{PERIPHERAL_DISK, StandardInquiry};
use vstor_wire::scsi::vpd::{
    BlockDeviceCharacteristics, BlockLimits, LogicalBlockProvisioning, PageHeader,
};
use vstor_wire::srb::ScsiAddress;
use zerocopy::FromBytes;

use crate::error::Error;
use crate::pipeline::Extent;

/// Smallest and largest blocks a disk may have, in bytes.
const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 512..=65536;

/// A disk, as it describes itself.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct DiskInfo {
    /// Where it is on the controller.
    pub address: ScsiAddress,
    /// Maker, without the padding.
    pub vendor: String,
    /// Kind, without the padding.
    pub product: String,
    /// Revision, without the padding.
    pub revision: String,
    /// Serial number, if it has one.
    pub serial: Option<String>,
    /// Number of logical blocks.
    pub blocks: u64,
    /// Bytes of a logical block: a power of two from 512 to 65536.
    pub block_bytes: u32,
    /// Bytes of a physical block: a multiple of the logical one.
    pub physical_block_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// A write may be answered before it is on the medium: flush when that matters.
    pub write_cache: bool,
    /// The medium does not rotate.
    pub solid_state: bool,
    /// What UNMAP can do, if it is supported.
    pub unmap: Option<UnmapLimits>,
}

/// What a disk can unmap.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct UnmapLimits {
    /// Most blocks of one UNMAP, at least 1.
    pub max_blocks: u32,
    /// Most runs of one UNMAP, at least 1.
    pub max_descriptors: u32,
    /// Runs should be multiples of this many blocks.
    pub granularity_blocks: u32,
    /// Unmapped blocks read as zeros.
    pub reads_zero: bool,
}

impl DiskInfo {
    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(u64::from(self.block_bytes))
    }

    /// The blocks of the `bytes` bytes from `offset` on: first block, number of blocks.
    ///
    /// # Errors
    /// [`Error::Range`] for none, for parts of blocks, and beyond the end.
    pub fn blocks(&self, offset: u64, bytes: u64) -> Result<(u64, u64), Error> {
        let block = u64::from(self.block_bytes).max(1);
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes());
        if bytes == 0 || !offset.is_multiple_of(block) || !bytes.is_multiple_of(block) || !inside {
            let (disk_bytes, block_bytes) = (self.bytes(), self.block_bytes);
            return Err(Error::Range { offset, bytes, disk_bytes, block_bytes });
        }
        Ok((offset / block, bytes / block))
    }

    /// The blocks of `extent`: first block, number of blocks.
    pub(crate) fn short_run(&self, extent: Extent) -> Result<(u64, u32), Error> {
        let (lba, _) = self.blocks(extent.offset, u64::from(extent.bytes))?;
        Ok((lba, extent.bytes / self.block_bytes.max(1)))
    }
}

/// Printable text in a fixed field, without padding; what is not printable shows as `?`.
fn text(field: &[u8]) -> String {
    let text: String = field
        .iter()
        .map(|byte| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '?' })
        .collect();
    let is_padding = |c: char| c == ' ' || c == '?';
    text.trim_end_matches(is_padding).trim_start().to_owned()
}

/// The standard data of INQUIRY, if it is that of a disk.
pub(crate) fn parse_inquiry(address: ScsiAddress, data: &[u8]) -> Option<DiskInfo> {
    let (inquiry, _) = StandardInquiry::read_from_prefix(data).ok()?;
    if inquiry.peripheral != PERIPHERAL_DISK {
        return None;
    }
    Some(DiskInfo {
        address,
        vendor: text(&inquiry.vendor),
        product: text(&inquiry.product),
        revision: text(&inquiry.revision),
        serial: None,
        blocks: 0,
        block_bytes: 0,
        physical_block_bytes: 0,
        read_only: false,
        write_cache: false,
        solid_state: false,
        unmap: None,
    })
}

/// The contents of VPD page `page`, if `data` is that page.
fn page(page: u8, data: &[u8]) -> Option<&[u8]> {
    let (header, rest) = PageHeader::read_from_prefix(data).ok()?;
    let length = usize::from(header.length.get()).min(rest.len());
    rest.get(..length).filter(|_| header.page == page)
}

/// The codes in the VPD page that lists pages.
pub(crate) fn parse_page_list(data: &[u8]) -> &[u8] {
    page(vstor_wire::scsi::vpd::SUPPORTED_PAGES, data).unwrap_or_default()
}

impl DiskInfo {
    /// Takes in VPD page `code`. A page that is cut off or unknown says nothing.
    pub(crate) fn take_page(&mut self, code: u8, data: &[u8]) {
        use vstor_wire::scsi::vpd;
        let Some(contents) = page(code, data) else { return };
        match code {
            vpd::UNIT_SERIAL_NUMBER => {
                self.serial = Some(text(contents)).filter(|serial| !serial.is_empty());
            }
            vpd::BLOCK_LIMITS => {
                if let Ok((limits, _)) = BlockLimits::read_from_prefix(contents) {
                    self.unmap = UnmapLimits::new(&limits);
                }
            }
            vpd::BLOCK_DEVICE_CHARACTERISTICS => {
                if let Ok((device, _)) = BlockDeviceCharacteristics::read_from_prefix(contents) {
                    self.solid_state = device.rotation.get() == 1;
                }
            }
            vpd::LOGICAL_BLOCK_PROVISIONING => {
                if let Ok((thin, _)) = LogicalBlockProvisioning::read_from_prefix(contents) {
                    if thin.flags & LogicalBlockProvisioning::UNMAP == 0 {
                        self.unmap = None;
                    } else if let Some(unmap) = &mut self.unmap {
                        unmap.reads_zero = thin.flags & LogicalBlockProvisioning::READS_ZERO != 0;
                    }
                }
            }
            _ => {}
        }
    }

    /// Takes in the data of READ CAPACITY(10). Returns whether the disk is too large for it.
    pub(crate) fn take_capacity_10(&mut self, data: &[u8]) -> Result<bool, Error> {
        let (capacity, _) = Capacity10::read_from_prefix(data).map_err(|_| short(0x25, data, 8))?;
        self.set_capacity(u64::from(capacity.last_lba.get()), capacity.block_bytes.get(), 0)?;
        Ok(capacity.last_lba.get() == u32::MAX)
    }

    /// Takes in the data of READ CAPACITY(16).
    pub(crate) fn take_capacity_16(&mut self, data: &[u8]) -> Result<(), Error> {
        let (capacity, _) =
            Capacity16::read_from_prefix(data).map_err(|_| short(0x9e, data, 32))?;
        let exponent = capacity.physical_exponent & 0x0f;
        self.set_capacity(capacity.last_lba.get(), capacity.block_bytes.get(), exponent)?;
        if capacity.provisioning & Capacity16::UNMAP_SUPPORTED == 0 {
            self.unmap = None;
        }
        Ok(())
    }

    fn set_capacity(&mut self, last: u64, block_bytes: u32, exponent: u8) -> Result<(), Error> {
        if !block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_bytes) {
            return Err(Error::BlockSize(block_bytes));
        }
        // A last block of 2^64-1 would make a size of 2^64 blocks: what can be addressed counts.
        self.blocks = last.saturating_add(1).min(u64::MAX / u64::from(block_bytes));
        self.block_bytes = block_bytes;
        self.physical_block_bytes = u64::from(block_bytes) << exponent;
        Ok(())
    }

    /// Takes in the data of MODE SENSE(6) for the caching page.
    pub(crate) fn take_mode(&mut self, data: &[u8]) {
        use vstor_wire::scsi::mode::{CACHING_PAGE, CachingPage, ModeHeader6, WRITE_PROTECTED};
        let Ok((header, rest)) = ModeHeader6::read_from_prefix(data) else { return };
        self.read_only = header.device_specific & WRITE_PROTECTED != 0;
        // The page may be shorter than this version of it: only its third byte is of interest.
        let page = rest.get(usize::from(header.descriptor_bytes)..).unwrap_or_default();
        if let Some([code, _, flags]) = page.first_chunk()
            && code & 0x3f == CACHING_PAGE
        {
            self.write_cache = flags & CachingPage::WRITE_CACHE != 0;
        }
    }
}

impl UnmapLimits {
    /// `None` for a disk that unmaps nothing. Zero limits, where they mean "not said", become the
    /// smallest that make sense.
    fn new(limits: &BlockLimits) -> Option<Self> {
        let max_blocks = limits.max_unmap_blocks.get();
        (max_blocks != 0).then(|| Self {
            max_blocks,
            max_descriptors: limits.max_unmap_descriptors.get().max(1),
            granularity_blocks: limits.unmap_granularity.get().max(1),
            reads_zero: false,
        })
    }
}

fn short(opcode: u8, data: &[u8], needed: u32) -> Error {
    Error::ShortData { opcode, got: u32::try_from(data.len()).unwrap_or(u32::MAX), needed }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vstor_wire::scsi::mode::{CachingPage, ModeHeader6};
    use vstor_wire::scsi::vpd;
    use zerocopy::IntoBytes;

    use super::*;

    const ADDRESS: ScsiAddress = ScsiAddress::new(0, 1, 2);

    fn disk() -> DiskInfo {
        let mut disk = parse_inquiry(ADDRESS, StandardInquiry::disk().as_bytes()).unwrap();
        disk.take_capacity_10(Capacity10::new(2047, 512).as_bytes()).unwrap();
        disk
    }

    fn page_of(code: u8, contents: &[u8]) -> Vec<u8> {
        let header = PageHeader::disk(code, u16::try_from(contents.len()).unwrap());
        [header.as_bytes(), contents].concat()
    }

    #[test]
    fn a_disk_is_told_from_what_is_none() {
        let disk = disk();
        assert_eq!((disk.vendor.as_str(), disk.product.as_str()), ("Msft", "Virtual Disk"));
        assert_eq!((disk.revision.as_str(), disk.bytes()), ("1.0", 1 << 20));
        assert_eq!(parse_inquiry(ADDRESS, StandardInquiry::absent(2).as_bytes()), None);
        assert_eq!(parse_inquiry(ADDRESS, &[0; 35]), None, "cut off");
        assert_eq!(parse_inquiry(ADDRESS, &[]), None);
    }

    #[test]
    fn names_are_printable_whatever_the_server_sends() {
        let mut inquiry = StandardInquiry::disk();
        inquiry.vendor = *b"a\nb\x1b\x80   ";
        inquiry.product = [0; 16];
        let disk = parse_inquiry(ADDRESS, inquiry.as_bytes()).unwrap();
        assert_eq!((disk.vendor.as_str(), disk.product.as_str()), ("a?b", ""));
    }

    #[test]
    fn capacities_are_read_and_absurd_ones_refused() {
        let mut disk = disk();
        for (last, block_bytes, expected) in [
            (0, 512, Ok((1, 512))),
            (u64::from(u32::MAX), 4096, Ok((1 << 32, 4096))),
            (u64::MAX, 512, Ok((u64::MAX / 512, 512))),
            (9, 0, Err(Error::BlockSize(0))),
            (9, 256, Err(Error::BlockSize(256))),
            (9, 520, Err(Error::BlockSize(520))),
            (9, 1 << 17, Err(Error::BlockSize(1 << 17))),
        ] {
            let data = Capacity16::new(last, block_bytes, 3);
            let got = disk.take_capacity_16(data.as_bytes());
            let got = got.map(|()| (disk.blocks, disk.block_bytes));
            assert_eq!(got, expected, "last={last} block_bytes={block_bytes}");
        }
        assert_eq!(
            disk.take_capacity_16(&[0; 31]),
            Err(Error::ShortData { opcode: 0x9e, got: 31, needed: 32 })
        );
        assert_eq!(disk.take_capacity_10(&Capacity10::new(1 << 33, 512).as_bytes()[..8]), Ok(true));
    }

    #[test]
    fn ranges_are_whole_blocks_inside_the_disk() {
        let disk = disk();
        for (offset, bytes, expected) in [
            (0, 512, Some((0, 1))),
            (1 << 19, 1 << 19, Some((1024, 1024))),
            ((1 << 20) - 512, 512, Some((2047, 1))),
            (0, 0, None),
            (256, 512, None),
            (0, 100, None),
            (1 << 20, 512, None),
            ((1 << 20) - 512, 1024, None),
            (u64::MAX - 511, 512, None),
        ] {
            assert_eq!(disk.blocks(offset, bytes).ok(), expected, "{bytes} bytes at {offset}");
        }
    }

    #[test]
    fn pages_say_what_the_disk_can_do() {
        let mut disk = disk();
        let limits = BlockLimits {
            max_unmap_blocks: 1000.into(),
            max_unmap_descriptors: 8.into(),
            ..BlockLimits::default()
        };
        disk.take_page(vpd::BLOCK_LIMITS, &page_of(vpd::BLOCK_LIMITS, limits.as_bytes()));
        let thin = LogicalBlockProvisioning::new(true);
        let provisioning = vpd::LOGICAL_BLOCK_PROVISIONING;
        disk.take_page(provisioning, &page_of(provisioning, thin.as_bytes()));
        assert_eq!(
            disk.unmap,
            Some(UnmapLimits {
                max_blocks: 1000,
                max_descriptors: 8,
                granularity_blocks: 1,
                reads_zero: true
            })
        );
        let thick = LogicalBlockProvisioning::new(false);
        disk.take_page(provisioning, &page_of(provisioning, thick.as_bytes()));
        assert_eq!(disk.unmap, None);

        let serial = vpd::UNIT_SERIAL_NUMBER;
        disk.take_page(serial, &page_of(serial, b"  0123  "));
        assert_eq!(disk.serial.as_deref(), Some("0123"));
        disk.take_page(serial, &page_of(vpd::BLOCK_LIMITS, b"wrong page"));
        assert_eq!(disk.serial.as_deref(), Some("0123"));

        let mode = ModeHeader6 {
            data_bytes: 23,
            medium_type: 0,
            device_specific: 0x80,
            descriptor_bytes: 8,
        };
        let data = [mode.as_bytes(), &[0; 8], CachingPage::new(true).as_bytes()].concat();
        disk.take_mode(&data);
        assert!(disk.read_only && disk.write_cache);
        disk.take_mode(&data[..12]);
        assert!(
            disk.read_only && disk.write_cache,
            "without the page nothing is said of the cache"
        );
    }

    proptest! {
        /// Whatever data a server answers with, nothing panics, and sizes stay within 64 bits.
        #[test]
        fn any_data_is_read(
            data in proptest::collection::vec(any::<u8>(), 0..80), code: u8
        ) {
            let mut disk = parse_inquiry(ADDRESS, &data).unwrap_or_else(disk);
            disk.take_page(code, &data);
            disk.take_mode(&data);
            let _ = parse_page_list(&data);
            let _ = disk.take_capacity_10(&data);
            if disk.take_capacity_16(&data).is_ok() {
                prop_assert!(disk.blocks.checked_mul(u64::from(disk.block_bytes)).is_some());
            }
        }
    }
}
