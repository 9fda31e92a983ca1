//! The standard data of INQUIRY.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Vendor by which guests know a disk of this protocol; Linux turns features on by it.
pub const VENDOR: [u8; 8] = *b"Msft    ";

/// Product by which guests know a disk of this protocol.
pub const PRODUCT: [u8; 16] = *b"Virtual Disk    ";

/// Peripheral byte of a LUN that is a disk: qualifier 000, type 00.
pub const PERIPHERAL_DISK: u8 = 0x00;

/// Peripheral byte of a LUN that is not there and cannot be: qualifier 011, type 1F.
pub const PERIPHERAL_ABSENT: u8 = 0x7f;

/// Standard INQUIRY data, without version descriptors.
///
/// Source: SPC-4, 6.6.2.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct StandardInquiry {
    /// [`PERIPHERAL_DISK`] or [`PERIPHERAL_ABSENT`].
    pub peripheral: u8,
    /// Bit 7: the medium can be removed.
    pub removable: u8,
    /// Version of SPC: 5 is SPC-3, 6 is SPC-4.
    pub version: u8,
    /// Bits 3:0: 2. Bit 4: hierarchical LUNs.
    pub response_format: u8,
    /// Bytes after this field: 31.
    pub additional_bytes: u8,
    /// Zero: no embedded storage array, access control or protection.
    pub flags5: u8,
    /// Zero: one port, no enclosure services.
    pub flags6: u8,
    /// Bit 1: commands are queued.
    pub flags7: u8,
    /// [`VENDOR`].
    pub vendor: [u8; 8],
    /// [`PRODUCT`].
    pub product: [u8; 16],
    /// Printable, padded with spaces.
    pub revision: [u8; 4],
}

const _: () = assert!(size_of::<StandardInquiry>() == 36);

impl StandardInquiry {
    /// Value of `version`: SPC-4.
    pub const SPC_4: u8 = 6;
    /// Bit of `flags7`: commands are queued.
    pub const COMMAND_QUEUEING: u8 = 0x02;

    /// The data of a disk.
    #[must_use]
    pub fn disk() -> Self {
        Self {
            peripheral: PERIPHERAL_DISK,
            removable: 0,
            version: Self::SPC_4,
            response_format: 2,
            additional_bytes: 31,
            flags5: 0,
            flags6: 0,
            flags7: Self::COMMAND_QUEUEING,
            vendor: VENDOR,
            product: PRODUCT,
            revision: *b"1.0 ",
        }
    }

    /// The data of a LUN that is not there. It keeps the names on LUN 0, where a guest looks for
    /// the target itself, and has none elsewhere.
    #[must_use]
    pub fn absent(lun: u8) -> Self {
        let mut data = Self { peripheral: PERIPHERAL_ABSENT, flags7: 0, ..Self::disk() };
        if lun != 0 {
            data.vendor = [0; 8];
            data.product = [0; 16];
            data.revision = [0; 4];
        }
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inquiry_data_has_these_bytes() {
        assert_eq!(
            StandardInquiry::disk().as_bytes(),
            b"\x00\x00\x06\x02\x1f\x00\x00\x02Msft    Virtual Disk    1.0 "
        );
        assert_eq!(
            StandardInquiry::absent(0).as_bytes(),
            b"\x7f\x00\x06\x02\x1f\x00\x00\x00Msft    Virtual Disk    1.0 "
        );
        let mut nameless = [0u8; 36];
        nameless[..5].copy_from_slice(&[0x7f, 0, 6, 2, 31]);
        assert_eq!(StandardInquiry::absent(1).as_bytes(), nameless);
    }
}
