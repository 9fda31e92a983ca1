//! Random numbers that are the same for the same seed.

use crate::image::pattern;

/// A small generator.
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `end`; 0 if there is none.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        pattern::next_word(&mut self.0).checked_rem(end).unwrap_or(0)
    }

    /// A size from 1 up to `most`: small ones as often as large ones, by their powers of two.
    pub(super) fn size(&mut self, most: u64) -> u64 {
        let top = 1_u64 << self.below(u64::from(u64::BITS - most.leading_zeros()));
        (top + self.below(top)).min(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_every_power_of_two_come() {
        let mut dice = Dice::new(1);
        let sizes: Vec<_> = (0..2000).map(|_| dice.size(1 << 20)).collect();
        assert!(sizes.iter().all(|size| (1..=1 << 20).contains(size)));
        for power in 0..20 {
            let range = 1 << power..2 << power;
            assert!(sizes.iter().any(|size| range.contains(size)), "none in {range:?}");
        }
        let again: Vec<_> = (0..3).map(|_| Dice::new(9).below(1000)).collect();
        assert!(again.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
