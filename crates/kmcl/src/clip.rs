//! A part of a list of ranges: from a byte offset on, for a number of bytes.

use vmbus_wire::PAGE_SIZE_U32;
use vmbus_wire::ranges::{GpaRange, pages_spanned};

use crate::error::Error;

/// Why ranges cannot be clipped so.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ClipError {
    /// A range of so many bytes is none: no bytes, or not the pages that it spans.
    Range(u32),
    /// The ranges end before this offset.
    Offset(u32),
    /// The ranges end before this length does.
    Length(u32),
}

impl ClipError {
    /// The argument at fault, of a function that takes the ranges as its argument `position`, and
    /// offset and length behind them.
    pub(crate) fn at(self, position: u8, names: [&'static str; 3]) -> Error {
        let [ranges, offset, length] = names;
        let (behind, name, value) = match self {
            Self::Range(bytes) => (0, ranges, bytes),
            Self::Offset(value) => (1, offset, value),
            Self::Length(value) => (2, length, value),
        };
        Error::Argument { position: position.saturating_add(behind), name, value: value.into() }
    }
}

/// The `length` bytes of `ranges` from `offset` on, as ranges; a length of 0 means all that follows.
/// `forced` takes `length` from the first range alone, up to the end of its last page, whatever its
/// own length is.
///
/// # Errors
/// [`ClipError`].
pub(crate) fn clip<'r>(
    ranges: &'r [GpaRange<'r>],
    offset: u32,
    length: u32,
    forced: bool,
) -> Result<impl Iterator<Item = GpaRange<'r>> + Clone + 'r, ClipError> {
    for range in ranges {
        range.check().map_err(|_| ClipError::Range(range.byte_count))?;
    }
    let reach = move |range: &GpaRange<'_>| {
        if forced {
            // All of the pages that the range touches, from where it begins.
            let pages = pages_spanned(range.byte_offset, range.byte_count);
            pages * u64::from(PAGE_SIZE_U32) - u64::from(range.byte_offset)
        } else {
            u64::from(range.byte_count)
        }
    };
    let ranges = if forced { ranges.get(..1).unwrap_or_default() } else { ranges };
    let total: u64 = ranges.iter().map(reach).sum();
    let rest = total
        .checked_sub(u64::from(offset))
        .filter(|rest| *rest != 0)
        .ok_or(ClipError::Offset(offset))?;
    let own: u64 = ranges.iter().map(|range| u64::from(range.byte_count)).sum();
    let wanted = match length {
        0 => own.saturating_sub(u64::from(offset)),
        length => u64::from(length),
    };
    if wanted == 0 || wanted > rest {
        return Err(ClipError::Length(length));
    }
    let pieces = ranges.iter().scan((u64::from(offset), wanted), move |(skip, left), range| {
        let reach = reach(range);
        let from = (*skip).min(reach);
        let len = (reach - from).min(*left);
        *skip -= from;
        *left -= len;
        Some(piece(range, from, len))
    });
    Ok(pieces.flatten())
}

/// `len` bytes of `range`, `from` bytes into it; `None` for no bytes.
fn piece<'r>(range: &GpaRange<'r>, from: u64, len: u64) -> Option<GpaRange<'r>> {
    let start = u64::from(range.byte_offset) + from;
    let page = u64::from(PAGE_SIZE_U32);
    let byte_count = u32::try_from(len).ok().filter(|len| *len != 0)?;
    let byte_offset = u32::try_from(start % page).ok()?;
    let first = usize::try_from(start / page).ok()?;
    let pages = usize::try_from(pages_spanned(byte_offset, byte_count)).ok()?;
    let pfns = range.pfns.get(first..first.checked_add(pages)?)?;
    Some(GpaRange { byte_count, byte_offset, pfns })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clips_by_offset_length_and_force() {
        let ranges = [
            GpaRange { byte_count: 0x1800, byte_offset: 0x400, pfns: &[10, 11] },
            GpaRange { byte_count: 0x100, byte_offset: 0xff0, pfns: &[20, 21] },
        ];
        type Pieces = Vec<(u32, u32, Vec<u64>)>;
        type Row = (u32, u32, bool, Result<Pieces, ClipError>);
        let rows: [Row; 9] = [
            (0, 0, false, Ok(vec![(0x1800, 0x400, vec![10, 11]), (0x100, 0xff0, vec![20, 21])])),
            (0, 0x10, false, Ok(vec![(0x10, 0x400, vec![10])])),
            (0xc00, 0x10, false, Ok(vec![(0x10, 0, vec![11])])),
            (0xbff, 2, false, Ok(vec![(2, 0xfff, vec![10, 11])])),
            (0x17ff, 0x12, false, Ok(vec![(1, 0xbff, vec![11]), (0x11, 0xff0, vec![20, 21])])),
            (0x1900, 0, false, Err(ClipError::Offset(0x1900))),
            (0, 0x1901, false, Err(ClipError::Length(0x1901))),
            (0, 0x1c00, true, Ok(vec![(0x1c00, 0x400, vec![10, 11])])),
            (0, 0x1c01, true, Err(ClipError::Length(0x1c01))),
        ];
        for (offset, length, forced, expected) in rows {
            let got = clip(&ranges, offset, length, forced).map(|pieces| {
                pieces.map(|p| (p.byte_count, p.byte_offset, p.pfns.to_vec())).collect::<Vec<_>>()
            });
            assert_eq!(got, expected, "offset={offset:#x} length={length:#x} forced={forced}");
        }
    }
    /// A range that is none is refused, not left out.
    #[test]
    fn malformed_ranges_are_refused() {
        let good = GpaRange { byte_count: 8, byte_offset: 0, pfns: &[1] };
        for bad in [
            GpaRange { byte_count: 8, byte_offset: 16, pfns: &[] },
            GpaRange { byte_count: 8192, byte_offset: 0, pfns: &[1] },
            GpaRange { byte_count: 8, byte_offset: 0, pfns: &[1, 2] },
            GpaRange { byte_count: 8, byte_offset: 4096, pfns: &[1] },
            GpaRange { byte_count: 0, byte_offset: 0, pfns: &[] },
        ] {
            for forced in [false, true] {
                let got = clip(&[bad, good], 0, 4, forced).err();
                assert_eq!(got, Some(ClipError::Range(bad.byte_count)), "{bad:?} forced={forced}");
            }
        }
    }
}
