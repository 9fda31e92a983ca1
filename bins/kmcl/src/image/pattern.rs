//! Data that proves where and when it was written.
//!
//! Every 512-byte sector of the pattern is different from every other one, at every other place and
//! in every other pass: its first two words say the byte offset and the pass, the other 62 follow
//! from them. So a sector that was lost, that landed in the wrong place, or that an older write
//! overtook is not only found but named.

use super::SECTOR;

/// Bytes of a sector, as a slice length.
const SECTOR_LEN: usize = 512;
const _: () = assert!(SECTOR_LEN as u64 == SECTOR);

/// How a sector differs from what was written there.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("byte {offset}: {found}")]
pub(crate) struct Difference {
    /// First byte of the disk that differs.
    pub(crate) offset: u64,
    /// What lies in its sector instead.
    pub(crate) found: Found,
}

/// What a sector holds instead of what belongs there.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Found {
    /// The whole sector belongs elsewhere.
    #[error("holds the data of byte {offset}, pass {pass}")]
    Misplaced { offset: u64, pass: u64 },
    /// The sector is whole and in its place, but of another pass.
    #[error("holds the data of pass {pass}: a later write is lost, or came too early")]
    Stale { pass: u64 },
    /// Nothing but zeros.
    #[error("holds zeros: the write is lost")]
    Zeros,
    /// Neither of these.
    #[error("holds {found:#04x} where {expected:#04x} belongs")]
    Other { expected: u8, found: u8 },
}

/// The next of a sequence of well-mixed words (SplitMix64, by Steele, Lea and Flood).
pub(crate) fn next_word(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fill_sector(offset: u64, pass: u64, sector: &mut [u8]) {
    let mut state = offset ^ pass.rotate_left(40);
    let (words, _) = sector.as_chunks_mut::<8>();
    for (index, word) in words.iter_mut().enumerate() {
        *word = match index {
            0 => offset,
            1 => pass,
            _ => next_word(&mut state),
        }
        .to_le_bytes();
    }
}

/// Fills `data`, which begins at byte `offset` of the disk, with the pattern of `pass`. Both the
/// offset and the length are multiples of 512.
pub(crate) fn fill(offset: u64, pass: u64, data: &mut [u8]) {
    debug_assert!(offset.is_multiple_of(SECTOR) && data.len().is_multiple_of(SECTOR_LEN));
    for (index, sector) in data.chunks_exact_mut(SECTOR_LEN).enumerate() {
        fill_sector(offset + index as u64 * SECTOR, pass, sector);
    }
}

/// Checks that `data`, which begins at byte `offset` of the disk, is the pattern of `pass`.
///
/// # Errors
/// The first byte that differs, and what lies there instead.
pub(crate) fn check(offset: u64, pass: u64, data: &[u8]) -> Result<(), Difference> {
    let mut expected = [0; SECTOR_LEN];
    for (index, sector) in data.chunks(SECTOR_LEN).enumerate() {
        let sector_offset = offset + index as u64 * SECTOR;
        fill_sector(sector_offset, pass, &mut expected);
        if let Some(at) = super::compare::first_difference(&expected, sector) {
            return Err(judge(sector_offset, pass, &expected, sector, at));
        }
    }
    Ok(())
}

fn judge(offset: u64, pass: u64, expected: &[u8], sector: &[u8], at: usize) -> Difference {
    let word =
        |index: usize| sector.as_chunks::<8>().0.get(index).map(|word| u64::from_le_bytes(*word));
    let found = match (word(0), word(1)) {
        (Some(at_offset), Some(of_pass)) if is_whole(at_offset, of_pass, sector) => {
            if at_offset == offset && of_pass != pass {
                Found::Stale { pass: of_pass }
            } else {
                Found::Misplaced { offset: at_offset, pass: of_pass }
            }
        }
        _ if sector.iter().all(|byte| *byte == 0) => Found::Zeros,
        _ => Found::Other {
            expected: expected.get(at).copied().unwrap_or_default(),
            found: sector.get(at).copied().unwrap_or_default(),
        },
    };
    Difference { offset: offset + at as u64, found }
}

/// Whether `sector` is exactly what belongs at `offset` in `pass`.
fn is_whole(offset: u64, pass: u64, sector: &[u8]) -> bool {
    let mut expected = [0; SECTOR_LEN];
    fill_sector(offset, pass, &mut expected);
    sector == expected
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_wrong_sector_is_found_and_named() {
        let mut good = vec![0; 8 * SECTOR_LEN];
        fill(1 << 20, 3, &mut good);
        assert_eq!(check(1 << 20, 3, &good), Ok(()));
        let third = (1 << 20) + 2 * SECTOR;
        let sector = |offset, pass| {
            let mut sector = [0; SECTOR_LEN];
            fill(offset, pass, &mut sector);
            sector
        };
        let mut flipped = sector(third, 3);
        flipped[100] ^= 0x10;
        for (name, replacement, offset, found) in [
            ("stale", sector(third, 2), third + 8, Found::Stale { pass: 2 }),
            ("zeros", [0; SECTOR_LEN], third + 1, Found::Zeros),
            (
                "misplaced",
                sector(third + SECTOR, 3),
                third + 1,
                Found::Misplaced { offset: third + SECTOR, pass: 3 },
            ),
            (
                "one bit",
                flipped,
                third + 100,
                Found::Other { expected: flipped[100] ^ 0x10, found: flipped[100] },
            ),
        ] {
            let mut data = good.clone();
            data[2 * SECTOR_LEN..3 * SECTOR_LEN].copy_from_slice(&replacement);
            assert_eq!(check(1 << 20, 3, &data), Err(Difference { offset, found }), "{name}");
        }
    }

    #[test]
    fn a_cut_sector_is_a_difference() {
        let mut data = vec![0; SECTOR_LEN];
        fill(0, 1, &mut data);
        assert!(check(0, 1, &data[..500]).is_err());
    }

    proptest! {
        /// One changed byte anywhere is found, exactly there.
        #[test]
        fn one_changed_byte_is_found(
            sector in 0u64..1 << 40, pass: u64, at in 0usize..4096, change in 1u8..
        ) {
            let offset = sector * SECTOR;
            let mut data = vec![0; 4096];
            fill(offset, pass, &mut data);
            prop_assert_eq!(check(offset, pass, &data), Ok(()));
            data[at] ^= change;
            let difference = check(offset, pass, &data).unwrap_err();
            prop_assert_eq!(difference.offset, offset + at as u64);
        }
    }
}
