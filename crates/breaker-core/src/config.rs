//! What a breaker is told: thresholds, periods, limits, and the rules they must keep.
//!
//! Not a parser: loose text becomes a [`Config`] elsewhere.
//!
//! Invariant: a [`Breaker`](crate::Breaker) only ever holds a configuration for which
//! [`Config::validate`] said yes, so nothing downstream checks again.

use std::fmt;
use std::time::Duration;

use crate::broken::{ConfigError, ConfigErrors};

/// Longest failure run that can be asked for. From the design: thirteen bits of a packed word.
const MAX_FAILURE_THRESHOLD: u32 = 8_000;
/// Most successes or permits that half-open can ask for. From the design: eight bits, rounded down.
pub(crate) const MAX_PROBES: u32 = 200;
/// Shorter periods than a coarse timer can keep would turn an open breaker into a busy loop.
const MIN_PERIOD: Duration = Duration::from_millis(10);
/// A first open period over a day is a decommissioned backend; `force_open` says so better.
const MAX_OPEN_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// Longest open period that somebody may tell: the other side, or a person.
pub(crate) const LONGEST_TOLD: Duration = MAX_OPEN_TIMEOUT;
/// Longest ramp. From the design; what needs longer to warm up should say so by failing.
const MAX_RAMP: Duration = Duration::from_secs(600);
/// Shortest and longest bucket. From the design: windows of 100 ms to 10 min.
const BUCKET: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(60);
/// Smallest and largest ring. From the design: at most 256 bytes of bits.
const RING: std::ops::RangeInclusive<u32> = 8..=1_024;
/// Ten buckets of sixteen bits each count no more calls than this.
const MOST_IN_BUCKETS: u32 = 10 * u16::MAX as u32;
/// Probes that may run out one after another before half-open ends without a verdict. From the design.
const PROBES_PER_HALF_OPEN: u32 = 5;

/// Which calls the rates are taken over, while closed. A window is empty after each transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// The last calls, exactly.
    Count {
        /// How many. 8..=1,024.
        size: u32,
        /// Fewer calls than this are not judged. 1..=`size`.
        min_calls: u32,
    },
    /// The calls of the last ten buckets of time, the present one included.
    Time {
        /// Length of a bucket. 10 ms..=60 s.
        bucket: Duration,
        /// Fewer calls than this are not judged. 1..=655,350; a bucket counts to 65,535 and no further.
        min_calls: u32,
    },
}

impl Window {
    pub(crate) const fn min_calls(self) -> u32 {
        match self {
            Self::Count { min_calls, .. } | Self::Time { min_calls, .. } => min_calls,
        }
    }
}

/// The settings of one breaker.
///
/// ```
/// use breaker_core::Config;
///
/// let config = Config { failure_threshold: 0, success_threshold: 0, ..Config::default() };
/// let errors = config.validate().unwrap_err();
/// assert_eq!(errors.iter().count(), 2, "all of them at once");
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Consecutive failures that open the breaker; it opens *on* this failure. 1..=8,000, default 5.
    pub failure_threshold: u32,
    /// Consecutive probe successes that close it. 1..=200, default 2.
    pub success_threshold: u32,
    /// The first open period. 10 ms..=24 h, default 60 s.
    pub open_timeout: Duration,
    /// Each reopening in a row multiplies the open period by this. Finite, 1..=10, default 1.
    pub open_multiplier: f64,
    /// Limit of the open period before jitter. At least `open_timeout`, default 10 min.
    pub open_max: Duration,
    /// Part of the open period that is added at most by jitter, never subtracted. 0..=1, default 0.1.
    pub open_jitter: f64,
    /// Probes in flight at one time. 1..=200, default 1.
    pub half_open_permits: u32,
    /// Longest a probe may go without an answer; then it counts as one failed probe. `None`: probes
    /// have no lease of the machine's, which is right only for a caller who gives every probe a time
    /// limit of its own. More than 0, default 30 s.
    pub probe_timeout: Option<Duration>,
    /// Longest time in half-open before the verdict is "inconclusive" and the breaker opens
    /// again. `None`, the default: five times `probe_timeout`, and without that no limit. At least
    /// 10 ms and at least `probe_timeout`.
    pub half_open_max: Option<Duration>,
    /// Which calls the two rates are taken over; `None`, the default: only runs of failures open.
    pub window: Option<Window>,
    /// Part of the window's calls that opens the breaker by failing. Above 0, at most 1, default 0.5.
    pub failure_rate: f64,
    /// A call that takes this long is slow, whatever its result; only
    /// [`record_timed`](crate::Breaker::record_timed) tells how long one took. More than 0 and only
    /// with a window, default none.
    pub slow_after: Option<Duration>,
    /// Part of the window's calls that opens the breaker by being slow. Above 0, at most 1, default 1.
    pub slow_rate: f64,
    /// How long after half-open closed until all calls go through again. At most 10 min, default 0.
    pub ramp_for: Duration,
    /// Part of the ordinary concurrency with which the ramp begins. Above 0, at most 1, default 0.1.
    pub ramp_start: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            failure_threshold: 5,
            success_threshold: 2,
            open_timeout: Duration::from_secs(60),
            open_multiplier: 1.0,
            open_max: Duration::from_secs(600),
            open_jitter: 0.10,
            half_open_permits: 1,
            probe_timeout: Some(Duration::from_secs(30)),
            half_open_max: None,
            window: None,
            failure_rate: 0.5,
            slow_after: None,
            slow_rate: 1.0,
            ramp_for: Duration::ZERO,
            ramp_start: 0.1,
        }
    }
}

impl Config {
    /// Checks every field.
    ///
    /// # Errors
    ///
    /// All broken rules at once, so that a person mends a file in one round.
    pub fn validate(&self) -> Result<(), ConfigErrors> {
        let mut errors = Vec::new();
        let mut check = |holds: bool, field: &'static str, value: &dyn fmt::Debug, rule: &'static str| {
            if !holds {
                errors.push(ConfigError { field, value: format!("{value:?}"), rule });
            }
        };
        check(
            (1..=MAX_FAILURE_THRESHOLD).contains(&self.failure_threshold),
            "failure_threshold",
            &self.failure_threshold,
            "1..=8000",
        );
        check(
            (1..=MAX_PROBES).contains(&self.success_threshold),
            "success_threshold",
            &self.success_threshold,
            "1..=200",
        );
        check(
            (MIN_PERIOD..=MAX_OPEN_TIMEOUT).contains(&self.open_timeout),
            "open_timeout",
            &self.open_timeout,
            "10ms..=24h",
        );
        // `contains` is false for NaN and for the infinities, which is what "finite" asks.
        check(
            (1.0..=10.0).contains(&self.open_multiplier),
            "open_multiplier",
            &self.open_multiplier,
            "finite and 1..=10",
        );
        check(self.open_max >= self.open_timeout, "open_max", &self.open_max, "at least open_timeout");
        check((0.0..=1.0).contains(&self.open_jitter), "open_jitter", &self.open_jitter, "0..=1");
        check(
            (1..=MAX_PROBES).contains(&self.half_open_permits),
            "half_open_permits",
            &self.half_open_permits,
            "1..=200",
        );
        check(
            self.probe_timeout.is_none_or(|timeout| !timeout.is_zero()),
            "probe_timeout",
            &self.probe_timeout,
            "none or more than 0",
        );
        check(
            self.half_open_max
                .is_none_or(|max| max >= self.probe_timeout.unwrap_or_default().max(MIN_PERIOD)),
            "half_open_max",
            &self.half_open_max,
            "none or at least 10ms and probe_timeout",
        );
        match self.window {
            None => {}
            Some(Window::Count { size, min_calls }) => {
                check(RING.contains(&size), "count_window.size", &size, "8..=1024");
                check((1..=size).contains(&min_calls), "count_window.min_calls", &min_calls, "1..=size");
            }
            Some(Window::Time { bucket, min_calls }) => {
                check(BUCKET.contains(&bucket), "time_window.bucket", &bucket, "10ms..=60s");
                check(
                    (1..=MOST_IN_BUCKETS).contains(&min_calls),
                    "time_window.min_calls",
                    &min_calls,
                    "1..=655350",
                );
            }
        }
        let part = |rate: f64| rate > 0.0 && rate <= 1.0;
        check(part(self.failure_rate), "failure_rate", &self.failure_rate, "above 0 and at most 1");
        check(
            self.slow_after.is_none_or(|after| !after.is_zero() && self.window.is_some()),
            "slow_after",
            &self.slow_after,
            "none, or more than 0 and with a window",
        );
        check(part(self.slow_rate), "slow_rate", &self.slow_rate, "above 0 and at most 1");
        check(self.ramp_for <= MAX_RAMP, "ramp_for", &self.ramp_for, "at most 10min");
        check(part(self.ramp_start), "ramp_start", &self.ramp_start, "above 0 and at most 1");
        if errors.is_empty() { Ok(()) } else { Err(ConfigErrors(errors)) }
    }

    /// The open period of the opening that follows `reopens` failed half-open periods:
    /// min(`open_timeout` × `open_multiplier`^`reopens`, `open_max`) × (1 + `open_jitter` × draw),
    /// the draw read as a number in `[0, 1)`.
    #[must_use]
    pub fn open_period(&self, reopens: u32, draw: u64) -> Duration {
        // The upper 53 bits: as many as a double can hold without rounding up to 1.
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit a double exactly")]
        let fraction = (draw >> 11) as f64 / (1_u64 << 53) as f64;
        let base = self.grown(reopens);
        base.saturating_add(part(base, self.open_jitter * fraction))
    }

    /// The longest open period these settings can give.
    #[must_use]
    pub fn longest_open_period(&self) -> Duration {
        self.open_max.saturating_add(part(self.open_max, self.open_jitter))
    }

    /// The longest half-open these settings allow: `half_open_max`, else five times `probe_timeout`;
    /// `None` where neither is set.
    #[must_use]
    pub fn longest_half_open(&self) -> Option<Duration> {
        let leases = || self.probe_timeout.map(|timeout| timeout.saturating_mul(PROBES_PER_HALF_OPEN));
        self.half_open_max.or_else(leases)
    }

    /// Identifies what the counts of a window mean: its shape and what is slow; 0 without a window.
    /// Stable, so that a stored window is told from one of other settings.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let shape = match self.window {
            None => return 0,
            Some(Window::Count { size, .. }) => [1, u128::from(size)],
            Some(Window::Time { bucket, .. }) => [2, bucket.as_nanos()],
        };
        // FNV-1a, 64 bits (the constants are its own).
        let slow_after = self.slow_after.map_or(0, |after| after.as_nanos());
        shape
            .into_iter()
            .chain([slow_after])
            .flat_map(u128::to_le_bytes)
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }

    fn grown(&self, reopens: u32) -> Duration {
        // Not through floating point when nothing grows: 60 s must be exactly 60 s.
        if reopens == 0 || self.open_multiplier <= 1.0 {
            return self.open_timeout.min(self.open_max);
        }
        let exponent = i32::try_from(reopens).unwrap_or(i32::MAX);
        let factor = self.open_multiplier.powi(exponent);
        part(self.open_timeout, factor).max(self.open_timeout).min(self.open_max)
    }
}

/// `whole` × `factor`, at most [`Duration::MAX`]; `Duration::mul_f64` would panic there.
fn part(whole: Duration, factor: f64) -> Duration {
    Duration::try_from_secs_f64(whole.as_secs_f64() * factor).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_documented_ones_and_valid() {
        let config = Config::default();
        assert_eq!(config.validate(), Ok(()));
        assert_eq!((config.failure_threshold, config.success_threshold), (5, 2));
        assert_eq!(config.open_timeout, Duration::from_secs(60));
        assert_eq!(config.half_open_permits, 1);
    }

    #[test]
    fn every_broken_rule_is_reported_at_once() {
        let config = Config {
            failure_threshold: 8_001,
            success_threshold: 201,
            open_timeout: Duration::from_millis(9),
            open_multiplier: f64::NAN,
            open_max: Duration::ZERO,
            open_jitter: -0.1,
            half_open_permits: 0,
            half_open_max: Some(Duration::ZERO),
            ..Config::default()
        };
        let errors = config.validate().expect_err("each field is wrong");
        let fields: Vec<_> = errors.iter().map(|error| error.field).collect();
        assert_eq!(
            fields,
            [
                "failure_threshold",
                "success_threshold",
                "open_timeout",
                "open_multiplier",
                "open_max",
                "open_jitter",
                "half_open_permits",
                "half_open_max"
            ]
        );
        assert!(errors.to_string().starts_with("failure_threshold is 8001, must be 1..=8000; "));
    }

    #[test]
    fn limits_themselves_are_valid() {
        for (low, high) in [(1, 1), (8_000, 200)] {
            let config = Config {
                failure_threshold: low,
                success_threshold: high,
                half_open_permits: high,
                half_open_max: None,
                ..Config::default()
            };
            assert_eq!(config.validate(), Ok(()));
        }
        for (open_timeout, open_multiplier, open_jitter) in
            [(MIN_PERIOD, 1.0, 0.0), (MAX_OPEN_TIMEOUT, 10.0, 1.0)]
        {
            let open_max = MAX_OPEN_TIMEOUT;
            let config = Config { open_timeout, open_multiplier, open_jitter, open_max, ..Config::default() };
            assert_eq!(config.validate(), Ok(()));
        }
        for open_multiplier in [0.999, 10.001, f64::INFINITY, f64::NEG_INFINITY, -2.0] {
            assert!(Config { open_multiplier, ..Config::default() }.validate().is_err());
        }
        for open_jitter in [1.001, f64::NAN] {
            assert!(Config { open_jitter, ..Config::default() }.validate().is_err());
        }
    }

    #[test]
    fn open_period_grows_to_its_limit_and_jitter_only_adds() {
        let config = Config {
            open_timeout: Duration::from_secs(10),
            open_multiplier: 2.0,
            open_max: Duration::from_secs(60),
            open_jitter: 0.5,
            ..Config::default()
        };
        let without: Vec<_> = (0..5).map(|reopens| config.open_period(reopens, 0).as_secs()).collect();
        assert_eq!(without, [10, 20, 40, 60, 60]);
        assert_eq!(config.open_period(u32::MAX, 0), Duration::from_secs(60));
        let most = config.open_period(0, u64::MAX);
        assert!(most > Duration::from_millis(14_999) && most <= Duration::from_secs(15));
        // Jitter is not clipped at the limit: those who wait longest need spreading most.
        assert!(config.open_period(9, u64::MAX) > Duration::from_secs(89));
        assert_eq!(config.longest_open_period(), Duration::from_secs(90));
    }

    #[test]
    fn huge_limits_saturate() {
        let config =
            Config { open_max: Duration::MAX, open_multiplier: 10.0, open_jitter: 1.0, ..Config::default() };
        assert_eq!(config.validate(), Ok(()));
        assert_eq!(config.open_period(u32::MAX, u64::MAX), Duration::MAX);
        assert_eq!(config.longest_open_period(), Duration::MAX);
    }
}
