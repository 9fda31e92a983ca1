//! The bytes of one part, in memory of our own: which of its pages are zeros, and its checksum.

use std::ops::Range;

use super::index::{PAGE, PART_BYTES};

/// Room for a part.
pub(super) fn buffer() -> Vec<u8> {
    vec![0; usize::try_from(PART_BYTES).unwrap_or(0)]
}

/// Whether all of it is zeros.
fn is_zeros(bytes: &[u8]) -> bool {
    // In pieces: no branch within one, and most pages that are not zeros end at the first.
    bytes.chunks(256).all(|piece| piece.iter().fold(0, |any, byte| any | byte) == 0)
}

/// The pages of `part` that are not zeros, neighbours together.
pub(super) fn runs(part: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut pages = part.chunks(PAGE).enumerate().peekable();
    std::iter::from_fn(move || {
        let (first, page) = pages.find(|(_, page)| !is_zeros(page))?;
        let mut end = first * PAGE + page.len();
        while let Some((_, page)) = pages.next_if(|(_, page)| !is_zeros(page)) {
            end += page.len();
        }
        Some(first * PAGE..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_pages_with_a_byte_in_them() {
        for (set, expected) in [
            (vec![], vec![]),
            (vec![0], vec![(0, 1)]),
            (vec![4095], vec![(0, 1)]),
            (vec![4096], vec![(1, 2)]),
            (vec![5000, 8191, 8192], vec![(1, 3)]),
            (vec![0, 3 * 4096 + 255, 511 * 4096 + 4095], vec![(0, 1), (3, 4), (511, 512)]),
        ] {
            let mut part = buffer();
            for at in &set {
                part[*at] = 1;
            }
            let found: Vec<_> = runs(&part).map(|run| (run.start / PAGE, run.end / PAGE)).collect();
            assert_eq!(found, expected, "{set:?}");
        }
    }
}
