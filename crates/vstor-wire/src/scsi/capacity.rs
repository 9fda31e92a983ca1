//! What READ CAPACITY answers.

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Data of READ CAPACITY(10).
///
/// Source: SBC-3, 5.15.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct Capacity10 {
    /// Address of the last block; `0xffff_ffff` sends the reader to READ CAPACITY(16).
    pub last_lba: U32,
    /// Bytes per block.
    pub block_bytes: U32,
}

const _: () = assert!(size_of::<Capacity10>() == 8);

impl Capacity10 {
    /// For a disk whose last block is `last_lba`.
    #[must_use]
    pub fn new(last_lba: u64, block_bytes: u32) -> Self {
        let last_lba = u32::try_from(last_lba).unwrap_or(u32::MAX);
        Self { last_lba: U32::new(last_lba), block_bytes: U32::new(block_bytes) }
    }
}

/// Data of READ CAPACITY(16).
///
/// Source: SBC-3, 5.16.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct Capacity16 {
    /// Address of the last block.
    pub last_lba: U64,
    /// Bytes per block.
    pub block_bytes: U32,
    /// Protection information; zero for none.
    pub protection: u8,
    /// Low four bits: 2 to the power of this many blocks make a physical block.
    pub physical_exponent: u8,
    /// [`Capacity16::UNMAP_SUPPORTED`], [`Capacity16::UNMAPPED_READS_ZERO`]; the other bits are
    /// the upper bits of `lowest_aligned_lba`.
    pub provisioning: u8,
    /// Lower bits of the first block that starts a physical one.
    pub lowest_aligned_lba: u8,
    /// Zero.
    pub reserved: [u8; 16],
}

const _: () = assert!(size_of::<Capacity16>() == 32);

impl Capacity16 {
    /// Bit of `provisioning` (LBPME): the disk takes UNMAP, or WRITE SAME with UNMAP.
    pub const UNMAP_SUPPORTED: u8 = 0x80;
    /// Bit of `provisioning` (LBPRZ): unmapped blocks read as zeros.
    pub const UNMAPPED_READS_ZERO: u8 = 0x40;

    /// For a disk whose last block is `last_lba` and whose physical blocks are
    /// `2.pow(physical_exponent)` of its blocks.
    #[must_use]
    pub fn new(last_lba: u64, block_bytes: u32, physical_exponent: u8) -> Self {
        Self {
            last_lba: U64::new(last_lba),
            block_bytes: U32::new(block_bytes),
            protection: 0,
            physical_exponent: physical_exponent & 0x0f,
            provisioning: 0,
            lowest_aligned_lba: 0,
            reserved: [0; 16],
        }
    }

    /// The same for a disk that takes UNMAP and reads zeros afterwards.
    #[must_use]
    pub fn with_unmap(mut self) -> Self {
        self.provisioning |= Self::UNMAP_SUPPORTED | Self::UNMAPPED_READS_ZERO;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacities_have_these_bytes() {
        for (last_lba, expected) in [
            (0x0102_0304, [1, 2, 3, 4, 0, 0, 2, 0]),
            (0xffff_fffe, [255, 255, 255, 254, 0, 0, 2, 0]),
            (0xffff_ffff, [255, 255, 255, 255, 0, 0, 2, 0]),
            (0x1_0000_0000, [255, 255, 255, 255, 0, 0, 2, 0]),
        ] {
            assert_eq!(Capacity10::new(last_lba, 512).as_bytes(), expected, "{last_lba:#x}");
        }
        let mut expected = [0u8; 32];
        expected[..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        expected[10] = 2;
        expected[13] = 3;
        assert_eq!(Capacity16::new(0x0102_0304_0506_0708, 512, 3).as_bytes(), expected);
        expected[14] = 0xc0;
        assert_eq!(
            Capacity16::new(0x0102_0304_0506_0708, 512, 3).with_unmap().as_bytes(),
            expected
        );
    }
}
