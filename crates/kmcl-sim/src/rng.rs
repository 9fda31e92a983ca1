//! The only source of chance: numbers that follow from a seed.

/// A stream of numbers (SplitMix64). Two streams with the same seed are the same.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rng(u64);

impl Rng {
    /// The stream of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 if that is 0.
    pub const fn below(&mut self, end: u64) -> u64 {
        // The bias of the remainder is far below what any test here could notice.
        if end == 0 { 0 } else { self.next() % end }
    }

    /// A number from `first` to `last`.
    pub const fn between(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last - first + 1)
    }

    /// True once in `times`.
    pub const fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// An index into something of `len` elements, at least one.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0) // below `len`: it fits
    }

    /// A stream of its own that follows from this one.
    #[must_use]
    pub const fn fork(&mut self) -> Self {
        Self(self.next())
    }

    /// How many ticks something takes: mostly next to nothing, sometimes long, rarely very long.
    pub const fn delay(&mut self) -> u64 {
        match self.below(40) {
            0 => self.below(400),
            1..=5 => self.below(40),
            _ => self.below(4),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_stream() {
        let first = |seed: u64| {
            let mut rng = Rng::new(seed);
            [rng.next(), rng.next(), rng.below(10), rng.between(3, 3), rng.fork().next()]
        };
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
        // The first two outputs of SplitMix64 for seed 0, from its reference implementation.
        let mut rng = Rng::new(0);
        assert_eq!([rng.next(), rng.next()], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }

    #[test]
    fn bounds_are_kept() {
        let mut rng = Rng::new(7);
        for _ in 0..1000 {
            assert!(rng.below(3) < 3);
            assert!((5..=9).contains(&rng.between(5, 9)));
            assert!(rng.index(2) < 2);
            assert!(rng.delay() < 400);
        }
        assert_eq!(rng.below(0), 0);
    }
}
