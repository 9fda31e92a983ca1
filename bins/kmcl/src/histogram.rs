//! Latencies: counted in buckets whose width grows with the value, so that any percentile is known
//! to within 1.6 percent from a fixed and small amount of memory.

use std::time::Duration;

/// Buckets per power of two: 2^6.
const SUB_BITS: u32 = 6;
const SUB: u64 = 1 << SUB_BITS;

/// A bucket for each of the 2^6 steps of each power of two of 64-bit nanoseconds.
const BUCKETS: usize = ((64 - SUB_BITS as usize) + 1) << SUB_BITS;

/// How often which latency was seen. 32 KiB.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    max: u64,
    sum: u128,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into(), total: 0, max: 0, sum: 0 }
    }
}

/// The bucket of `value`: values below 2^6 have their own, later ones share one with values that
/// have the same leading 7 bits.
fn bucket(value: u64) -> usize {
    let shift = (64 - SUB_BITS).saturating_sub(value.leading_zeros() + 1);
    let index = (u64::from(shift) << SUB_BITS) + (value >> shift);
    usize::try_from(index).unwrap_or(BUCKETS) // below BUCKETS for every value
}

/// The largest value that falls into bucket `index`.
fn upper_end(index: usize) -> u64 {
    let index = index as u64;
    if index < 2 * SUB {
        return index;
    }
    let shift = (index >> SUB_BITS) - 1;
    let lead = index - (shift << SUB_BITS);
    (lead << shift) + ((1 << shift) - 1)
}

impl Histogram {
    /// Counts `latency` once.
    pub(crate) fn record(&mut self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get_mut(bucket(nanoseconds)) {
            *count += 1;
        }
        self.total += 1;
        self.max = self.max.max(nanoseconds);
        self.sum += u128::from(nanoseconds);
    }

    /// How many latencies were counted.
    pub(crate) fn count(&self) -> u64 {
        self.total
    }

    /// The latency that `per_mille` of a thousand do not exceed; zero where nothing was counted.
    pub(crate) fn percentile(&self, per_mille: u64) -> Duration {
        let rank = (self.total * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(upper_end(index).min(self.max));
            }
        }
        Duration::from_nanos(self.max)
    }

    /// The mean latency; zero where nothing was counted.
    pub(crate) fn mean(&self) -> Duration {
        let mean = self.sum.checked_div(u128::from(self.total)).unwrap_or(0);
        Duration::from_nanos(u64::try_from(mean).unwrap_or(u64::MAX))
    }

    /// The longest latency.
    pub(crate) fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn percentiles_of_a_known_distribution() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(500), Duration::ZERO);
        for microseconds in 1..=1000 {
            histogram.record(Duration::from_micros(microseconds));
        }
        for (per_mille, expected) in [(1, 1.0), (500, 500.0), (990, 990.0), (1000, 1000.0)] {
            let got = histogram.percentile(per_mille).as_secs_f64() * 1e6;
            assert!((got / expected - 1.0).abs() < 0.016, "{per_mille}: {got} µs");
        }
        assert_eq!(histogram.mean(), Duration::from_nanos(500_500));
        assert_eq!(histogram.max(), Duration::from_millis(1));
        assert_eq!(histogram.count(), 1000);
    }

    proptest! {
        /// Every value has a bucket, whose upper end is at most 1/64 above it and never below.
        #[test]
        fn a_bucket_is_narrow(value: u64) {
            let index = bucket(value);
            prop_assert!(index < BUCKETS);
            let end = upper_end(index);
            prop_assert!(end >= value && end - value <= value / 64, "{} in ..={}", value, end);
        }

        /// Larger values never fall into earlier buckets.
        #[test]
        fn buckets_are_ordered(a: u64, b: u64) {
            prop_assert_eq!(a.cmp(&b).then(std::cmp::Ordering::Equal).is_le(), a <= b);
            if a <= b { prop_assert!(bucket(a) <= bucket(b)); }
        }
    }
}
