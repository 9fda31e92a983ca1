//! The parameter list of UNMAP.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Start of the list; [`UnmapDescriptor`]s follow.
///
/// Source: SBC-3, 5.30.2.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct UnmapHeader {
    /// Bytes of the list after this field.
    pub data_bytes: U16,
    /// Bytes of the descriptors.
    pub descriptor_bytes: U16,
    /// Zero.
    pub reserved: U32,
}

/// A run of blocks to unmap.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct UnmapDescriptor {
    /// First block.
    pub lba: U64,
    /// Number of blocks; 0 is allowed and does nothing.
    pub blocks: U32,
    /// Zero.
    pub reserved: U32,
}

const _: () = assert!(size_of::<UnmapHeader>() == 8 && size_of::<UnmapDescriptor>() == 16);

/// Bytes of an [`UnmapHeader`].
const HEADER_BYTES: u16 = 8;

impl UnmapHeader {
    /// The start of a list of `count` descriptors.
    ///
    /// Returns `None` for more than fit into the fields: 4095.
    #[must_use]
    pub fn new(count: u16) -> Option<Self> {
        let descriptor_bytes = count.checked_mul(16)?;
        Some(Self {
            data_bytes: U16::new(descriptor_bytes.checked_add(6)?),
            descriptor_bytes: U16::new(descriptor_bytes),
            reserved: U32::ZERO,
        })
    }

    /// How many descriptors follow in a list of `list_bytes` bytes in all, this header included. A
    /// last one that is cut off does not count, as the standard has it.
    ///
    /// # Errors
    /// [`UnmapListError`] where the fields contradict each other or the list.
    pub fn count(&self, list_bytes: u16) -> Result<u16, UnmapListError> {
        let (data, descriptors) = (self.data_bytes.get(), self.descriptor_bytes.get());
        let there = list_bytes.saturating_sub(HEADER_BYTES);
        if descriptors > there || descriptors > data.saturating_sub(6) {
            return Err(UnmapListError { descriptors, data, list: list_bytes });
        }
        Ok(descriptors / 16)
    }
}

impl UnmapDescriptor {
    /// The run of `blocks` blocks from `lba` on.
    #[must_use]
    pub fn new(lba: u64, blocks: u32) -> Self {
        Self { lba: U64::new(lba), blocks: U32::new(blocks), reserved: U32::ZERO }
    }
}

/// The descriptors of an UNMAP parameter list go beyond the list. Always the guest's doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("UNMAP descriptors of {descriptors} bytes in data of {data} and a list of {list}")]
pub struct UnmapListError {
    /// Bytes of descriptors, by the header.
    pub descriptors: u16,
    /// Bytes of data after the header's first field, by the header.
    pub data: u16,
    /// Bytes of the list, by the command.
    pub list: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_these_bytes() {
        let header = UnmapHeader::new(2).unwrap();
        assert_eq!(header.as_bytes(), [0, 38, 0, 32, 0, 0, 0, 0]);
        let run = UnmapDescriptor::new(0x0102_0304_0506_0708, 0x090a_0b0c);
        assert_eq!(run.as_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0]);
        assert_eq!(UnmapHeader::new(4095).unwrap().data_bytes.get(), 65526);
        assert_eq!(UnmapHeader::new(4096), None);
    }

    #[test]
    fn headers_that_contradict_themselves_are_refused() {
        for (data, descriptors, list, expected) in [
            (38, 32, 40, Some(2)),
            (38, 32, 64, Some(2)),
            (38, 31, 40, Some(1)),
            (21, 15, 40, Some(0)),
            (6, 0, 8, Some(0)),
            (0, 0, 8, Some(0)),
            (38, 32, 39, None),
            (37, 32, 40, None),
            (0, 16, 40, None),
            (0xffff, 0xfff0, 8, None),
        ] {
            let expected = expected.ok_or(UnmapListError { descriptors, data, list });
            let header = UnmapHeader {
                data_bytes: U16::new(data),
                descriptor_bytes: U16::new(descriptors),
                reserved: U32::ZERO,
            };
            assert_eq!(header.count(list), expected, "{data} {descriptors} {list}");
        }
    }
}
