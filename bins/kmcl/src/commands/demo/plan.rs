//! Which part of a disk the demonstration overwrites, and in what order.

use std::collections::HashSet;

use vsc_storage::Extent;

use crate::image::pattern;

/// Bytes of a random write.
pub(super) const UNIT: u32 = 4096;

/// Pieces into which the area is divided on a disk that is not overwritten whole. Spread evenly, so
/// that small and large block addresses are used.
const PIECES: u64 = 64;

/// The pass of the pattern that is written sequentially, over the whole area.
pub(super) const SEQUENTIAL_PASS: u64 = 1;

/// The pass of the pattern that is written at random places, over a part of it.
pub(super) const RANDOM_PASS: u64 = 2;

/// One unit in so many is written at random.
const RANDOM_SHARE: usize = 4;

/// The area of a disk that is overwritten.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Area {
    /// First byte and bytes of each piece, ascending; each begins at a multiple of [`UNIT`].
    pieces: Vec<(u64, u64)>,
}

impl Area {
    /// All of a disk of `disk_bytes` bytes, or about `limit` bytes of a larger one.
    pub(super) fn new(disk_bytes: u64, limit: u64) -> Self {
        let unit = u64::from(UNIT);
        let piece = limit / PIECES / unit * unit;
        if disk_bytes <= limit || piece == 0 {
            return Self { pieces: vec![(0, disk_bytes.min(limit.max(unit)))] };
        }
        let last = disk_bytes - piece; // where the last piece begins, or a little before
        let start = |index: u64| {
            let at = u128::from(last) * u128::from(index) / u128::from(PIECES - 1);
            u64::try_from(at).unwrap_or(last) / unit * unit
        };
        Self { pieces: (0..PIECES).map(|index| (start(index), piece)).collect() }
    }

    /// Bytes of the area.
    pub(super) fn bytes(&self) -> u64 {
        self.pieces.iter().map(|(_, bytes)| bytes).sum()
    }

    /// The first piece: first byte and bytes.
    pub(super) fn first_piece(&self) -> (u64, u64) {
        self.pieces.first().copied().unwrap_or_default()
    }

    /// The area from front to back, in extents of at most `step` bytes.
    pub(super) fn extents(&self, step: u32) -> impl Iterator<Item = Extent> {
        self.pieces.iter().flat_map(move |(start, bytes)| Extent::cut(*start, *bytes, step))
    }

    /// A part of the area's units, in an order that looks random and is always the same.
    pub(super) fn random_units(&self) -> Vec<Extent> {
        let mut units: Vec<Extent> = self.extents(UNIT).collect();
        let mut state = 0x6b6d_636c;
        let chosen = units.len().div_ceil(RANDOM_SHARE);
        for index in 0..chosen {
            let left = units.len() - index;
            let word = pattern::next_word(&mut state) % left.max(1) as u64;
            units.swap(index, index + usize::try_from(word).unwrap_or(0));
        }
        units.truncate(chosen);
        units
    }
}

/// Which pass of the pattern each unit was written in last.
pub(super) struct Passes {
    random: HashSet<u64>,
}

impl Passes {
    /// After the units in `random` were overwritten.
    pub(super) fn new(random: &[Extent]) -> Self {
        Self { random: random.iter().map(|unit| unit.offset / u64::from(UNIT)).collect() }
    }

    /// Checks `data`, which begins at byte `offset` of the disk, a multiple of [`UNIT`].
    ///
    /// # Errors
    /// The first byte that differs.
    pub(super) fn check(&self, offset: u64, data: &[u8]) -> Result<(), pattern::Difference> {
        let mut at = offset;
        for unit in data.chunks(UNIT as usize) {
            let is_random = self.random.contains(&(at / u64::from(UNIT)));
            pattern::check(at, if is_random { RANDOM_PASS } else { SEQUENTIAL_PASS }, unit)?;
            at += unit.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_small_disk_is_overwritten_whole() {
        for (disk, limit) in [(512, 1 << 30), (1 << 20, 1 << 20), ((1 << 30) - 512, 1 << 30)] {
            let area = Area::new(disk, limit);
            assert_eq!((area.first_piece(), area.bytes()), ((0, disk), disk), "{disk} of {limit}");
        }
    }

    #[test]
    fn random_units_differ_and_are_a_quarter() {
        let area = Area::new(1 << 20, 1 << 30);
        let units = area.random_units();
        assert_eq!(units.len(), 64);
        assert_eq!(units.iter().map(|unit| unit.offset).collect::<HashSet<_>>().len(), 64);
        assert!(units.windows(2).any(|pair| pair[0].offset > pair[1].offset), "not ascending");
        assert_eq!(units, area.random_units(), "the same every time");
    }

    #[test]
    fn the_right_pass_is_expected_of_each_unit() {
        let random = [Extent { offset: 8192, bytes: UNIT }];
        let passes = Passes::new(&random);
        let mut data = vec![0; 16384];
        pattern::fill(0, SEQUENTIAL_PASS, &mut data);
        assert_eq!(passes.check(0, &data).unwrap_err().offset, 8200, "the second pass is lost");
        pattern::fill(8192, RANDOM_PASS, &mut data[8192..12288]);
        assert_eq!(passes.check(0, &data), Ok(()));
        pattern::fill(4096, RANDOM_PASS, &mut data[4096..8192]);
        assert_eq!(passes.check(0, &data).unwrap_err().offset, 4104, "a write that went astray");
    }

    proptest! {
        /// The pieces lie on the disk, in order, without overlap, and are not more than asked for.
        #[test]
        fn pieces_lie_on_the_disk(sectors in 1u64..1 << 33, limit_mib in 1u64..4096) {
            let (disk, limit) = (sectors * 512, limit_mib << 20);
            let area = Area::new(disk, limit);
            let mut end = 0;
            for (start, bytes) in &area.pieces {
                prop_assert!(*start >= end && start % u64::from(UNIT) == 0);
                prop_assert!(bytes % 512 == 0);
                end = start + bytes;
            }
            prop_assert!(end <= disk);
            prop_assert!(area.bytes() <= limit && area.bytes() > 0);
            prop_assert!(disk > limit || area.bytes() == disk);
        }
    }
}
