//! What MODE SENSE answers: headers, block descriptors, pages.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Page code: read and write caches.
pub const CACHING_PAGE: u8 = 0x08;
/// Page code: how commands are queued and reported.
pub const CONTROL_PAGE: u8 = 0x0a;
/// Page code that asks for all pages.
pub const ALL_PAGES: u8 = 0x3f;
/// Subpage code that asks for all subpages.
pub const ALL_SUBPAGES: u8 = 0xff;

/// Bit of the device-specific parameter: the disk is write-protected.
pub const WRITE_PROTECTED: u8 = 0x80;
/// Bit of the device-specific parameter: the disk honours FUA and takes DPO.
pub const DPO_FUA: u8 = 0x10;

/// Start of the data of MODE SENSE(6).
///
/// Source: SPC-4, 7.5.5.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct ModeHeader6 {
    /// Bytes of data after this field.
    pub data_bytes: u8,
    /// Zero for a disk.
    pub medium_type: u8,
    /// [`WRITE_PROTECTED`], [`DPO_FUA`].
    pub device_specific: u8,
    /// Bytes of the block descriptors that follow.
    pub descriptor_bytes: u8,
}

/// Start of the data of MODE SENSE(10).
///
/// Source: SPC-4, 7.5.5.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct ModeHeader10 {
    /// Bytes of data after this field.
    pub data_bytes: U16,
    /// Zero for a disk.
    pub medium_type: u8,
    /// [`WRITE_PROTECTED`], [`DPO_FUA`].
    pub device_specific: u8,
    /// Bit 0: block descriptors are long ones.
    pub long_lba: u8,
    /// Zero.
    pub reserved: u8,
    /// Bytes of the block descriptors that follow.
    pub descriptor_bytes: U16,
}

const _: () = assert!(size_of::<ModeHeader6>() == 4 && size_of::<ModeHeader10>() == 8);

/// Block descriptor.
///
/// Source: SBC-3, 6.4.2.2.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct BlockDescriptor {
    /// Number of blocks; `0xffff_ffff` for more than fit.
    pub blocks: U32,
    /// Bytes per block; the top byte is reserved.
    pub block_bytes: U32,
}

/// Long block descriptor, where MODE SENSE(10) accepts it.
///
/// Source: SBC-3, 6.4.2.3.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct LongBlockDescriptor {
    /// Number of blocks.
    pub blocks: U64,
    /// Zero.
    pub reserved: U32,
    /// Bytes per block.
    pub block_bytes: U32,
}

const _: () = assert!(size_of::<BlockDescriptor>() == 8 && size_of::<LongBlockDescriptor>() == 16);

impl BlockDescriptor {
    /// For a disk of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64, block_bytes: u32) -> Self {
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        Self { blocks: U32::new(blocks), block_bytes: U32::new(block_bytes & 0x00ff_ffff) }
    }
}

impl LongBlockDescriptor {
    /// For a disk of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64, block_bytes: u32) -> Self {
        Self { blocks: U64::new(blocks), reserved: U32::ZERO, block_bytes: U32::new(block_bytes) }
    }
}

/// Caching mode page.
///
/// Source: SBC-3, 6.4.5.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct CachingPage {
    /// [`CACHING_PAGE`].
    pub code: u8,
    /// Bytes after this field: 18.
    pub length: u8,
    /// [`CachingPage::WRITE_CACHE`] and others.
    pub flags: u8,
    /// Retention priorities, prefetch limits, segments: zero here.
    pub tuning: [u8; 17],
}

const _: () = assert!(size_of::<CachingPage>() == 20);

impl CachingPage {
    /// Bit of `flags` (WCE): a write may be answered before it is on the medium; the guest has to
    /// send SYNCHRONIZE CACHE, or FUA.
    pub const WRITE_CACHE: u8 = 0x04;

    /// A page with or without a write cache.
    #[must_use]
    pub fn new(write_cache: bool) -> Self {
        Self {
            code: CACHING_PAGE,
            length: 18,
            flags: if write_cache { Self::WRITE_CACHE } else { 0 },
            tuning: [0; 17],
        }
    }
}

/// Control mode page.
///
/// Source: SPC-4, 7.5.8.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct ControlPage {
    /// [`CONTROL_PAGE`].
    pub code: u8,
    /// Bytes after this field: 10.
    pub length: u8,
    /// Sense format and logging: zero is fixed-format sense.
    pub flags: u8,
    /// Bits 7:4 are [`ControlPage::UNRESTRICTED_REORDERING`] or zero.
    pub queueing: u8,
    /// Software write protection and others: zero.
    pub protection: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Longest time the device is busy, in 100 ms; `0xffff` for no limit.
    pub busy_timeout: U16,
    /// Zero.
    pub self_test_seconds: U16,
}

const _: () = assert!(size_of::<ControlPage>() == 12);

impl ControlPage {
    /// Value of `queueing`: simple commands may be done in any order.
    pub const UNRESTRICTED_REORDERING: u8 = 0x10;

    /// The page of a disk that reorders as it likes, as file systems expect.
    #[must_use]
    pub fn new() -> Self {
        Self {
            code: CONTROL_PAGE,
            length: 10,
            flags: 0,
            queueing: Self::UNRESTRICTED_REORDERING,
            protection: 0,
            reserved: [0; 3],
            busy_timeout: U16::new(u16::MAX),
            self_test_seconds: U16::ZERO,
        }
    }
}

impl Default for ControlPage {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_descriptors_have_these_bytes() {
        let mut caching = [0u8; 20];
        caching[..3].copy_from_slice(&[8, 18, 4]);
        assert_eq!(CachingPage::new(true).as_bytes(), caching);
        caching[2] = 0;
        assert_eq!(CachingPage::new(false).as_bytes(), caching);
        assert_eq!(
            ControlPage::new().as_bytes(),
            [0x0a, 10, 0, 0x10, 0, 0, 0, 0, 0xff, 0xff, 0, 0]
        );
        assert_eq!(BlockDescriptor::new(0x0102_0304, 512).as_bytes(), [1, 2, 3, 4, 0, 0, 2, 0]);
        assert_eq!(
            BlockDescriptor::new(1 << 32, 4096).as_bytes(),
            [255, 255, 255, 255, 0, 0, 16, 0]
        );
        assert_eq!(
            LongBlockDescriptor::new(1 << 32, 4096).as_bytes(),
            [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0]
        );
    }

    #[test]
    fn headers_have_these_bytes() {
        let six = ModeHeader6 {
            data_bytes: 23,
            medium_type: 0,
            device_specific: WRITE_PROTECTED | DPO_FUA,
            descriptor_bytes: 8,
        };
        assert_eq!(six.as_bytes(), [23, 0, 0x90, 8]);
        let ten = ModeHeader10 {
            data_bytes: U16::new(0x0102),
            medium_type: 0,
            device_specific: DPO_FUA,
            long_lba: 1,
            reserved: 0,
            descriptor_bytes: U16::new(16),
        };
        assert_eq!(ten.as_bytes(), [1, 2, 0, 0x10, 1, 0, 0, 16]);
    }
}
