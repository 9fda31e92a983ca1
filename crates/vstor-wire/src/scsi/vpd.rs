//! Vital product data (VPD) pages of INQUIRY.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::inquiry::VENDOR;

/// Page code: list of the pages there are.
pub const SUPPORTED_PAGES: u8 = 0x00;
/// Page code: serial number.
pub const UNIT_SERIAL_NUMBER: u8 = 0x80;
/// Page code: names of the device.
pub const DEVICE_IDENTIFICATION: u8 = 0x83;
/// Page code: largest and best sizes of requests.
pub const BLOCK_LIMITS: u8 = 0xb0;
/// Page code: what the medium is.
pub const BLOCK_DEVICE_CHARACTERISTICS: u8 = 0xb1;
/// Page code: what unmapping does.
pub const LOGICAL_BLOCK_PROVISIONING: u8 = 0xb2;

/// The pages a disk has, ascending, as [`SUPPORTED_PAGES`] lists them.
pub const PAGES: [u8; 6] = [
    SUPPORTED_PAGES,
    UNIT_SERIAL_NUMBER,
    DEVICE_IDENTIFICATION,
    BLOCK_LIMITS,
    BLOCK_DEVICE_CHARACTERISTICS,
    LOGICAL_BLOCK_PROVISIONING,
];

/// Longest serial number in bytes; printable ASCII.
pub const MAX_SERIAL_BYTES: usize = 36;

/// Bytes of the longest page.
pub const MAX_PAGE_BYTES: usize = 68;

/// Start of every page.
///
/// Source: SPC-4, 7.8.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct PageHeader {
    /// Same as in the standard INQUIRY data.
    pub peripheral: u8,
    /// Page code.
    pub page: u8,
    /// Bytes after this field.
    pub length: U16,
}

impl PageHeader {
    /// The start of a disk's `page` with `length` bytes after it.
    #[must_use]
    pub fn disk(page: u8, length: u16) -> Self {
        Self { peripheral: super::inquiry::PERIPHERAL_DISK, page, length: U16::new(length) }
    }
}

/// Start of a designator in [`DEVICE_IDENTIFICATION`].
///
/// Source: SPC-4, 7.8.5.1.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct DesignatorHeader {
    /// 1 binary, 2 ASCII.
    pub code_set: u8,
    /// Bits 5:4: what it names, 0 is the LUN. Bits 3:0: kind of designator.
    pub kind: u8,
    /// Zero.
    pub reserved: u8,
    /// Bytes after this field.
    pub length: u8,
}

/// A designator that is [`VENDOR`] and a serial number after it (T10 vendor ID based). Only
/// [`T10Designator::bytes`] go on the wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct T10Designator {
    header: DesignatorHeader,
    vendor: [u8; 8],
    serial: [u8; MAX_SERIAL_BYTES],
}

impl T10Designator {
    /// For a disk of this serial number, of which at most [`MAX_SERIAL_BYTES`] count.
    #[must_use]
    pub fn new(serial: &[u8]) -> Self {
        let mut text = [0; MAX_SERIAL_BYTES];
        let mut length = 8; // of the vendor
        for (to, from) in text.iter_mut().zip(serial) {
            *to = *from;
            length += 1;
        }
        Self {
            header: DesignatorHeader { code_set: 2, kind: 1, reserved: 0, length },
            vendor: VENDOR,
            serial: text,
        }
    }

    /// The bytes on the wire.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let length = size_of::<DesignatorHeader>() + usize::from(self.header.length);
        self.as_bytes().get(..length).unwrap_or_default()
    }
}

/// A designator that is a locally assigned 60-bit number (NAA 3h). World-wide unique ones would need
/// a registered company.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct LocalDesignator {
    header: DesignatorHeader,
    naa: U64,
}

impl LocalDesignator {
    /// The designator of the number in the low 60 bits of `id`.
    #[must_use]
    pub fn new(id: u64) -> Self {
        Self {
            header: DesignatorHeader { code_set: 1, kind: 3, reserved: 0, length: 8 },
            naa: U64::new(3 << 60 | (id & ((1 << 60) - 1))),
        }
    }
}

/// Largest and best sizes of requests; page [`BLOCK_LIMITS`] after its header. All in blocks; zero
/// means that nothing is said.
///
/// Source: SBC-3, 6.6.4.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    PartialEq,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
    Unaligned,
)]
pub struct BlockLimits {
    /// Bit 0 (WSNZ): WRITE SAME does not take 0 blocks.
    pub write_same_nonzero: u8,
    /// Largest COMPARE AND WRITE; 0 if there is none.
    pub max_compare_and_write: u8,
    /// Transfers should be multiples of this.
    pub optimal_granularity: U16,
    /// Largest READ, WRITE and VERIFY.
    pub max_transfer: U32,
    /// Best size of a transfer.
    pub optimal_transfer: U32,
    /// Largest prefetch.
    pub max_prefetch: U32,
    /// Most blocks of one UNMAP.
    pub max_unmap_blocks: U32,
    /// Most descriptors of one UNMAP.
    pub max_unmap_descriptors: U32,
    /// Runs to unmap should be multiples of this.
    pub unmap_granularity: U32,
    /// Bit 31: the rest is valid, the first block at which `unmap_granularity` counts from.
    pub unmap_alignment: U32,
    /// Most blocks of one WRITE SAME.
    pub max_write_same: U64,
    /// Atomic writes: none.
    pub atomic: [u8; 20],
}

const _: () = assert!(size_of::<PageHeader>() + size_of::<BlockLimits>() == 64);

/// What the medium is; page [`BLOCK_DEVICE_CHARACTERISTICS`] after its header.
///
/// Source: SBC-3, 6.6.3.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct BlockDeviceCharacteristics {
    /// 0 unknown, 1 does not rotate, else revolutions per minute.
    pub rotation: U16,
    /// 0 unknown.
    pub product_type: u8,
    /// 0 unknown.
    pub form_factor: u8,
    /// Zero.
    pub reserved: [u8; 56],
}

const _: () = assert!(size_of::<PageHeader>() + size_of::<BlockDeviceCharacteristics>() == 64);

impl BlockDeviceCharacteristics {
    /// A medium that does not rotate.
    #[must_use]
    pub fn solid_state() -> Self {
        Self { rotation: U16::new(1), product_type: 0, form_factor: 0, reserved: [0; 56] }
    }
}

/// What unmapping does; page [`LOGICAL_BLOCK_PROVISIONING`] after its header.
///
/// Source: SBC-3, 6.6.7.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct LogicalBlockProvisioning {
    /// Zero: no thresholds.
    pub threshold_exponent: u8,
    /// [`LogicalBlockProvisioning::UNMAP`] and the others.
    pub flags: u8,
    /// Bits 2:0: 0 not thin, 1 resource, 2 thin.
    pub provisioning: u8,
    /// Zero.
    pub reserved: u8,
}

const _: () = assert!(size_of::<LogicalBlockProvisioning>() == 4);

impl LogicalBlockProvisioning {
    /// Flag (LBPU): UNMAP is supported.
    pub const UNMAP: u8 = 0x80;
    /// Flag (LBPWS): WRITE SAME(16) with UNMAP is supported.
    pub const WRITE_SAME_16: u8 = 0x40;
    /// Flag (LBPWS10): WRITE SAME(10) with UNMAP is supported.
    pub const WRITE_SAME_10: u8 = 0x20;
    /// Flag (LBPRZ): unmapped blocks read as zeros.
    pub const READS_ZERO: u8 = 0x04;

    /// A thin disk, or one that takes no UNMAP.
    #[must_use]
    pub fn new(thin: bool) -> Self {
        let all = Self::UNMAP | Self::WRITE_SAME_16 | Self::WRITE_SAME_10 | Self::READS_ZERO;
        Self {
            threshold_exponent: 0,
            flags: if thin { all } else { 0 },
            provisioning: if thin { 2 } else { 0 },
            reserved: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_designators_have_these_bytes() {
        assert_eq!(PageHeader::disk(0x83, 0x0102).as_bytes(), [0, 0x83, 1, 2]);
        assert_eq!(T10Designator::new(b"ab12").bytes(), b"\x02\x01\x00\x0cMsft    ab12");
        assert_eq!(T10Designator::new(b"").bytes(), b"\x02\x01\x00\x08Msft    ");
        let longest = T10Designator::new(&[b'x'; 99]);
        assert_eq!(longest.bytes().len(), 4 + 8 + MAX_SERIAL_BYTES);
        assert_eq!(longest.bytes()[3], 44);
        assert_eq!(
            LocalDesignator::new(0xf102_0304_0506_0708).as_bytes(),
            [1, 3, 0, 8, 0x31, 2, 3, 4, 5, 6, 7, 8]
        );
        // The longest identification page fits the bound.
        let page = size_of::<PageHeader>() + longest.bytes().len() + size_of::<LocalDesignator>();
        assert!(page.max(64) <= MAX_PAGE_BYTES, "{page}");
    }

    #[test]
    fn block_pages_have_these_bytes() {
        let limits = BlockLimits {
            write_same_nonzero: 1,
            optimal_granularity: U16::new(0x0203),
            max_transfer: U32::new(0x0405_0607),
            max_unmap_blocks: U32::new(0x0809_0a0b),
            max_unmap_descriptors: U32::new(0x0c0d_0e0f),
            unmap_granularity: U32::new(0x1011_1213),
            unmap_alignment: U32::new(0x8000_0000),
            max_write_same: U64::new(0x1415_1617_1819_1a1b),
            ..Default::default()
        };
        let mut expected = [0u8; 60];
        expected[..8].copy_from_slice(&[1, 0, 2, 3, 4, 5, 6, 7]);
        expected[16..20].copy_from_slice(&[8, 9, 10, 11]);
        expected[20..24].copy_from_slice(&[12, 13, 14, 15]);
        expected[24..28].copy_from_slice(&[16, 17, 18, 19]);
        expected[28] = 0x80;
        expected[32..40].copy_from_slice(&[0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b]);
        assert_eq!(limits.as_bytes(), expected);

        let mut expected = [0u8; 60];
        expected[1] = 1;
        assert_eq!(BlockDeviceCharacteristics::solid_state().as_bytes(), expected);

        assert_eq!(LogicalBlockProvisioning::new(true).as_bytes(), [0, 0xe4, 2, 0]);
        assert_eq!(LogicalBlockProvisioning::new(false).as_bytes(), [0, 0, 0, 0]);
    }
}
