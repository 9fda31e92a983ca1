//! What follows the descriptor of a packet, by kind.
//!
//! For sending, each extension's fixed part is a struct whose bytes go into the ring. For receiving,
//! the parsers take the extension as 64-bit words in this machine's byte order, as a reader copies
//! it out of the ring: [`gpa_direct`], [`TransferPages::parse`], [`page_set`], [`gpadl`],
//! [`additional_data`].

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ranges::{GpaRanges, RangeError};

/// Fixed part of [`AddPageSet`](super::PacketKind::AddPageSet) and
/// [`RemovePageSet`](super::PacketKind::RemovePageSet).
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct PageSetHeader {
    /// The GPADL that holds the pages.
    pub gpadl_id: U32,
    /// The name of the set.
    pub page_set_id: U16,
    /// Zero.
    pub reserved: U16,
}

/// Fixed part of [`EstablishGpadl`](super::PacketKind::EstablishGpadl); ranges follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct EstablishGpadlHeader {
    /// The GPADL to be.
    pub gpadl_id: U32,
    /// Number of ranges that follow.
    pub range_count: U32,
}

/// The whole extension of [`TeardownGpadl`](super::PacketKind::TeardownGpadl) and
/// [`Gpadl`](super::PacketKind::Gpadl).
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct GpadlReference {
    /// The GPADL meant.
    pub gpadl_id: U32,
    /// Zero.
    pub reserved: U32,
}

/// Fixed part of [`TransferPages`](super::PacketKind::TransferPages); [`TransferPageRange`]s follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct TransferPagesHeader {
    /// The set that the ranges lie in.
    pub page_set_id: U16,
    /// Nonzero if the sender owns the set.
    pub sender_owns_set: u8,
    /// Zero.
    pub reserved: u8,
    /// Number of ranges that follow.
    pub range_count: U32,
}

/// A range within a set of transfer pages.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct TransferPageRange {
    /// Length in bytes.
    pub byte_count: U32,
    /// Start within the set, in bytes.
    pub byte_offset: U32,
}

/// Fixed part of [`GpaDirect`](super::PacketKind::GpaDirect); ranges as in [`crate::ranges`] follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct GpaDirectHeader {
    /// Zero when sent; garbage must be tolerated.
    pub reserved: U32,
    /// Number of ranges that follow; at least 1.
    pub range_count: U32,
}

impl GpaDirectHeader {
    /// The fixed part in front of `range_count` ranges.
    #[inline]
    #[must_use]
    pub const fn new(range_count: u32) -> Self {
        Self { reserved: U32::ZERO, range_count: U32::new(range_count) }
    }
}

/// The whole extension of [`DataWithAdditional`](super::PacketKind::DataWithAdditional) and
/// [`AdditionalData`](super::PacketKind::AdditionalData).
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct AdditionalDataHeader {
    /// Bytes of data in all packets together.
    pub total_bytes: U64,
    /// Where the data of this packet belongs, in bytes.
    pub byte_offset: U32,
    /// Bytes of data in this packet.
    pub byte_count: U32,
}

const _: () = {
    assert!(size_of::<PageSetHeader>() == 8);
    assert!(size_of::<EstablishGpadlHeader>() == 8);
    assert!(size_of::<GpadlReference>() == 8);
    assert!(size_of::<TransferPagesHeader>() == 8);
    assert!(size_of::<TransferPageRange>() == 8);
    assert!(size_of::<GpaDirectHeader>() == 8);
    assert!(size_of::<AdditionalDataHeader>() == 16);
};

/// An 8-byte struct of the wire is also one word of an extension.
macro_rules! one_word {
    ($($name:ident)*) => {$(
        impl $name {
            /// From the extension's word, in this machine's byte order.
            #[inline]
            #[must_use]
            pub const fn from_word(word: u64) -> Self {
                zerocopy::transmute!(word.to_le_bytes())
            }

            /// The extension's word, in this machine's byte order.
            #[inline]
            #[must_use]
            pub const fn to_word(self) -> u64 {
                u64::from_le_bytes(zerocopy::transmute!(self))
            }
        }
    )*};
}

one_word! {
    PageSetHeader EstablishGpadlHeader GpadlReference TransferPagesHeader TransferPageRange GpaDirectHeader
}

/// Why an extension was refused. Always the peer's doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExtensionError {
    /// The extension is shorter than what it must hold.
    #[error("extension of {words} words, {needed} are needed")]
    Truncated {
        /// Words needed.
        needed: u64,
        /// Words there are.
        words: usize,
    },
    /// The ranges are malformed.
    #[error(transparent)]
    Ranges(#[from] RangeError),
}

/// The ranges of a GPA-direct packet, from its extension. Words behind the last range are ignored:
/// some guests send a list of fixed size.
///
/// # Errors
/// [`ExtensionError`].
#[inline]
pub fn gpa_direct(extension: &[u64]) -> Result<GpaRanges<'_>, ExtensionError> {
    let (word, words) = first(extension)?;
    let header = GpaDirectHeader::from_word(word);
    let (ranges, _unused) = GpaRanges::parse_prefix(words, header.range_count.get())?;
    Ok(ranges)
}

/// The GPADL and its ranges, from the extension of an establish-GPADL packet.
///
/// # Errors
/// [`ExtensionError`].
pub fn establish_gpadl(extension: &[u64]) -> Result<(u32, GpaRanges<'_>), ExtensionError> {
    let (word, words) = first(extension)?;
    let header = EstablishGpadlHeader::from_word(word);
    let (ranges, _unused) = GpaRanges::parse_prefix(words, header.range_count.get())?;
    Ok((header.gpadl_id.get(), ranges))
}

/// The fixed part of a page-set packet.
///
/// # Errors
/// [`ExtensionError::Truncated`].
pub fn page_set(extension: &[u64]) -> Result<PageSetHeader, ExtensionError> {
    first(extension).map(|(word, _)| PageSetHeader::from_word(word))
}

/// The extension of a packet that names a GPADL.
///
/// # Errors
/// [`ExtensionError::Truncated`].
pub fn gpadl(extension: &[u64]) -> Result<GpadlReference, ExtensionError> {
    first(extension).map(|(word, _)| GpadlReference::from_word(word))
}

/// The extension of a packet of additional data.
///
/// # Errors
/// [`ExtensionError::Truncated`].
pub fn additional_data(extension: &[u64]) -> Result<AdditionalDataHeader, ExtensionError> {
    let [total, place, ..] = *extension else {
        return Err(ExtensionError::Truncated { needed: 2, words: extension.len() });
    };
    Ok(zerocopy::transmute!([total.to_le_bytes(), place.to_le_bytes()]))
}

/// The extension of a transfer-pages packet: which pages of a registered set hold the data. Whether
/// the ranges lie within the set is for whoever knows the set to check.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TransferPages<'a> {
    /// The set that the ranges lie in.
    pub page_set_id: u16,
    /// Whether the sender owns the set.
    pub sender_owns_set: bool,
    ranges: &'a [u64],
}

impl<'a> TransferPages<'a> {
    /// Checks that the extension holds as many ranges as it says. Words behind them are ignored.
    ///
    /// # Errors
    /// [`ExtensionError`].
    #[inline]
    pub fn parse(extension: &'a [u64]) -> Result<Self, ExtensionError> {
        let (word, words) = first(extension)?;
        let header = TransferPagesHeader::from_word(word);
        let range_count = header.range_count.get();
        if range_count == 0 {
            return Err(RangeError::NoRanges.into());
        }
        let ranges = usize::try_from(range_count).ok().and_then(|count| words.get(..count));
        let Some(ranges) = ranges else {
            let needed = 1 + u64::from(range_count);
            return Err(ExtensionError::Truncated { needed, words: extension.len() });
        };
        Ok(Self {
            page_set_id: header.page_set_id.get(),
            sender_owns_set: header.sender_owns_set != 0,
            ranges,
        })
    }

    /// The ranges, in order; at least one.
    #[inline]
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = TransferPageRange> + use<'a> {
        self.ranges.iter().map(|&word| TransferPageRange::from_word(word))
    }
}

#[inline]
fn first(extension: &[u64]) -> Result<(u64, &[u64]), ExtensionError> {
    match extension.split_first() {
        Some((&word, rest)) => Ok((word, rest)),
        None => Err(ExtensionError::Truncated { needed: 1, words: 0 }),
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::collection::vec as vec_of;
    use proptest::prelude::*;

    use super::*;
    use crate::ranges::GpaRange;

    /// The words of these bytes, as a reader of the ring makes them.
    fn words(bytes: &[u8]) -> Vec<u64> {
        assert!(bytes.len().is_multiple_of(8));
        bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }

    #[test]
    fn gpa_direct_has_its_layout() {
        // Garbage in the reserved field, one range, one unused word as of a list of fixed size.
        let extension = words(&[
            0xde, 0xad, 0xbe, 0xef, 1, 0, 0, 0, // reserved, range count
            0, 2, 0, 0, 0x10, 0, 0, 0, // 512 bytes at 16
            0x45, 0x23, 1, 0, 0, 0, 0, 0, // page 0x12345
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        ]);
        let ranges = gpa_direct(&extension).unwrap();
        let expected = GpaRange { byte_count: 512, byte_offset: 16, pfns: &[0x12345] };
        assert_eq!(ranges.single(), Some(expected));
        assert_eq!(GpaDirectHeader::new(3).as_bytes(), [0, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(GpaDirectHeader::new(3).to_word(), 3 << 32);
        assert_eq!(expected.header_word(), extension[1]);
    }

    #[test]
    fn transfer_pages_have_their_layout() {
        let extension = words(&[
            0xfe, 0xca, 1, 0, 2, 0, 0, 0, // page set, owned, range count
            1, 0, 0, 0, 2, 0, 0, 0, // 1 byte at 2
            3, 0, 0, 0, 4, 0, 0, 0, // 3 bytes at 4
        ]);
        let pages = TransferPages::parse(&extension).unwrap();
        assert_eq!((pages.page_set_id, pages.sender_owns_set), (0xcafe, true));
        let ranges: Vec<(u32, u32)> =
            pages.ranges().map(|range| (range.byte_count.get(), range.byte_offset.get())).collect();
        assert_eq!(ranges, [(1, 2), (3, 4)]);
    }

    #[test]
    fn the_other_extensions_have_their_layouts() {
        let set = page_set(&words(&[1, 2, 3, 4, 5, 6, 7, 8])).unwrap();
        assert_eq!((set.gpadl_id.get(), set.page_set_id.get()), (0x0403_0201, 0x0605));
        let reference = gpadl(&words(&[1, 2, 3, 4, 5, 6, 7, 8])).unwrap();
        assert_eq!(reference.gpadl_id.get(), 0x0403_0201);
        let data =
            additional_data(&words(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]))
                .unwrap();
        assert_eq!(data.total_bytes.get(), 0x0807_0605_0403_0201);
        assert_eq!((data.byte_offset.get(), data.byte_count.get()), (0x0c0b_0a09, 0x100f_0e0d));
        let extension = words(&[
            1, 2, 3, 4, 1, 0, 0, 0, // GPADL, range count
            8, 0, 0, 0, 0, 0, 0, 0, // 8 bytes at 0
            9, 0, 0, 0, 0, 0, 0, 0, // page 9
        ]);
        let (id, ranges) = establish_gpadl(&extension).unwrap();
        assert_eq!(id, 0x0403_0201);
        assert_eq!(ranges.single().map(|range| range.pfns), Some(&[9][..]));
    }

    #[test]
    fn short_and_lying_extensions_are_refused() {
        let too_short = |needed, words| Some(ExtensionError::Truncated { needed, words });
        assert_eq!(gpa_direct(&[]).err(), too_short(1, 0));
        assert_eq!(establish_gpadl(&[]).err(), too_short(1, 0));
        assert_eq!(page_set(&[]).err(), too_short(1, 0));
        assert_eq!(gpadl(&[]).err(), too_short(1, 0));
        assert_eq!(additional_data(&[0]).err(), too_short(2, 1));
        assert_eq!(TransferPages::parse(&[]).err(), too_short(1, 0));
        assert_eq!(TransferPages::parse(&[2 << 32, 0]).err(), too_short(3, 2));
        assert_eq!(
            TransferPages::parse(&[u64::MAX, 0]).err(),
            too_short(1 + u64::from(u32::MAX), 2)
        );
        let no_ranges = Some(ExtensionError::Ranges(RangeError::NoRanges));
        assert_eq!(TransferPages::parse(&[0, 0]).err(), no_ranges);
        assert_eq!(gpa_direct(&[0, 8, 9]).err(), no_ranges);
        assert_eq!(
            gpa_direct(&[2 << 32, 8, 9]).err(),
            Some(RangeError::Truncated { range: 1, pages: 1, words: 0 }.into())
        );
    }

    proptest! {
        #[test]
        fn any_extension_is_accepted_or_an_error(extension in vec_of(any::<u64>(), 0..20)) {
            let _ = gpa_direct(&extension);
            let _ = establish_gpadl(&extension);
            let _ = page_set(&extension);
            let _ = gpadl(&extension);
            let _ = additional_data(&extension);
            if let Ok(pages) = TransferPages::parse(&extension) {
                prop_assert!((1..extension.len()).contains(&pages.ranges().len()));
            }
        }

        #[test]
        fn a_word_is_its_struct(word: u64) {
            prop_assert_eq!(PageSetHeader::from_word(word).to_word(), word);
            prop_assert_eq!(EstablishGpadlHeader::from_word(word).to_word(), word);
            prop_assert_eq!(GpadlReference::from_word(word).to_word(), word);
            prop_assert_eq!(TransferPagesHeader::from_word(word).to_word(), word);
            prop_assert_eq!(TransferPageRange::from_word(word).to_word(), word);
            prop_assert_eq!(GpaDirectHeader::from_word(word).to_word(), word);
            let header = GpaDirectHeader::from_word(word);
            prop_assert_eq!(header.as_bytes(), word.to_le_bytes());
        }
    }
}
