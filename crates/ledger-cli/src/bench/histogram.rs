//! Durations by size: a count for each of a few thousand classes.
//!
//! A run of a minute has tens of millions of samples; kept one by one they would cost the memory bandwidth that the
//! daemon beside it needs. Classes are 1/128 apart, so a percentile is exact to less than 1 %.

use std::time::Duration;

/// Classes for each doubling.
const SPLIT: u32 = 128;
const SPLIT_BITS: u32 = SPLIT.ilog2();
/// Microseconds of about 71 minutes; what is longer counts as that.
const LONGEST: u64 = u32::MAX as u64;
const CLASSES: usize = class(LONGEST) + 1;

/// How many durations were how long.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; CLASSES], total: 0 }
    }
}

impl Histogram {
    pub(crate) fn record(&mut self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(LONGEST).min(LONGEST);
        self.counts[class(micros)] += 1;
        self.total += 1;
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
        self.total += other.total;
    }

    #[cfg(test)]
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The smallest duration that so large a share of all is not longer than, in milliseconds; none without samples.
    pub(crate) fn percentile_ms(&self, share: f64) -> Option<f64> {
        let rank = ((self.total as f64 * share).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        let class = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(middle(class) / 1_000.0)
    }
}

/// The class of a number of microseconds. Below 256 each number is one; above, the leading eight bits decide.
const fn class(micros: u64) -> usize {
    let bits = u64::BITS - micros.leading_zeros();
    let shift = bits.saturating_sub(SPLIT_BITS + 1);
    ((shift << SPLIT_BITS) as u64 + (micros >> shift)) as usize
}

/// The middle of a class, in microseconds.
fn middle(class: usize) -> f64 {
    let class = class as u64;
    let split = u64::from(SPLIT);
    if class < 2 * split {
        return class as f64;
    }
    let shift = class / split - 1;
    let first = (class - shift * split) << shift;
    first as f64 + ((1_u64 << shift) - 1) as f64 / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(micros: impl IntoIterator<Item = u64>) -> Histogram {
        let mut histogram = Histogram::default();
        micros.into_iter().for_each(|micros| histogram.record(Duration::from_micros(micros)));
        histogram
    }

    #[test]
    fn small_numbers_are_exact() {
        let histogram = of(1..=100);
        for (share, ms) in [(0.0, 0.001), (0.5, 0.05), (0.99, 0.099), (0.999, 0.1), (1.0, 0.1)] {
            assert_eq!(histogram.percentile_ms(share), Some(ms), "{share}");
        }
        assert_eq!(of([7]).percentile_ms(0.5), Some(0.007));
    }

    #[test]
    fn no_samples_have_no_percentile() {
        assert_eq!(Histogram::default().percentile_ms(0.5), None);
    }

    #[test]
    fn large_numbers_are_exact_to_a_hundredth() {
        for micros in [256, 257, 511, 512, 1_000, 12_345, 999_999, 60_000_000, LONGEST] {
            let found = of([micros]).percentile_ms(0.5).expect("a sample") * 1_000.0;
            assert!((found - micros as f64).abs() / (micros as f64) < 0.01, "{micros}: {found}");
        }
        assert!(of([u64::MAX]).percentile_ms(1.0).is_some_and(|ms| ms > 4e6));
    }

    #[test]
    fn classes_rise_without_gaps() {
        let mut last = 0;
        for micros in 1..100_000 {
            let class = class(micros);
            assert!(class == last || class == last + 1, "{micros}");
            last = class;
        }
    }

    #[test]
    fn merged_histograms_are_one() {
        let mut first = of(1..=50);
        first.merge(&of(51..=100));
        assert_eq!(first.percentile_ms(0.99), Some(0.099));
        assert_eq!(first.total(), 100);
    }
}
