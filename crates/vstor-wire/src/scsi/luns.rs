//! What REPORT LUNS answers.

use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Start of the data of REPORT LUNS; one [`LunEntry`] per LUN follows.
///
/// Source: SPC-4, 6.33.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct LunListHeader {
    /// Bytes of all entries.
    pub list_bytes: U32,
    /// Zero.
    pub reserved: U32,
}

/// One LUN: peripheral device addressing, which is what storage channels can address.
///
/// Source: SAM-5, 4.7.7.2.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct LunEntry {
    /// Addressing method and bus: zero.
    pub method: u8,
    /// The LUN.
    pub lun: u8,
    /// Further levels: zero.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<LunListHeader>() == 8 && size_of::<LunEntry>() == 8);

impl LunListHeader {
    /// The start of a list of `count` entries.
    #[must_use]
    pub fn new(count: u8) -> Self {
        Self { list_bytes: U32::new(u32::from(count) * 8), reserved: U32::ZERO }
    }
}

impl LunEntry {
    /// The entry of `lun`.
    #[must_use]
    pub fn new(lun: u8) -> Self {
        Self { method: 0, lun, reserved: [0; 6] }
    }
}

/// The LUNs in the data of REPORT LUNS that can be addressed on a storage channel; others are
/// passed over. Data that is cut off gives the entries that are whole.
pub fn parse_lun_list(data: &[u8]) -> impl Iterator<Item = u8> {
    let (count, entries) = match LunListHeader::read_from_prefix(data) {
        Ok((header, rest)) => (header.list_bytes.get() as usize / size_of::<LunEntry>(), rest),
        Err(_) => (0, Default::default()),
    };
    entries
        .chunks_exact(size_of::<LunEntry>())
        .take(count)
        .filter_map(|bytes| LunEntry::read_from_bytes(bytes).ok())
        .filter(|entry| entry.method == 0)
        .map(|entry| entry.lun)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn a_list_has_these_bytes_and_is_read_back() {
        let mut data = Vec::from(LunListHeader::new(2).as_bytes());
        data.extend_from_slice(LunEntry::new(0).as_bytes());
        data.extend_from_slice(LunEntry::new(0xfe).as_bytes());
        assert_eq!(
            data,
            [0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfe, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(parse_lun_list(&data).collect::<Vec<_>>(), [0, 0xfe]);
    }

    #[test]
    fn a_list_that_lies_gives_no_more_than_there_is() {
        for (data, expected) in [
            (&[][..], &[][..]),
            (&[0, 0, 0, 8, 0, 0, 0], &[]),
            (&[255, 255, 255, 255, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2], &[1]),
            (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0], &[]),
            (&[0, 0, 0, 8, 0, 0, 0, 0, 0x40, 1, 0, 0, 0, 0, 0, 0], &[]),
        ] {
            assert_eq!(parse_lun_list(data).collect::<Vec<_>>(), expected, "{data:?}");
        }
    }
}
