//! What a breaker is told: thresholds, periods, limits, and the rules they must keep.
//!
//! Not a parser: loose text becomes a [`Config`] elsewhere.
//!
//! Invariant: a [`Breaker`](crate::Breaker) only ever holds a configuration for which
//! [`Config::validate`] said yes, so nothing downstream checks again.

use std::error::Error;
use std::fmt;
use std::time::Duration;

/// Longest failure run that can be asked for. From the design: thirteen bits of a packed word.
const MAX_FAILURE_THRESHOLD: u32 = 8_000;
/// Most successes or permits that half-open can ask for. From the design: eight bits, rounded down.
const MAX_PROBES: u32 = 200;
/// Shorter periods than a coarse timer can keep would turn an open breaker into a busy loop.
const MIN_PERIOD: Duration = Duration::from_millis(10);
/// A first open period over a day is a decommissioned backend; `force_open` says so better.
const MAX_OPEN_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

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
    /// Longest time in half-open before the verdict is "inconclusive" and the breaker opens
    /// again. `None` waits for ever, which is right only for a caller who gives every probe a
    /// time limit of its own. At least 10 ms, default 150 s (five probes of 30 s).
    pub half_open_max: Option<Duration>,
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
            half_open_max: Some(Duration::from_secs(150)),
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
            "must be 1..=8000",
        );
        check(
            (1..=MAX_PROBES).contains(&self.success_threshold),
            "success_threshold",
            &self.success_threshold,
            "must be 1..=200",
        );
        check(
            (MIN_PERIOD..=MAX_OPEN_TIMEOUT).contains(&self.open_timeout),
            "open_timeout",
            &self.open_timeout,
            "must be 10ms..=24h",
        );
        // `contains` is false for NaN and for the infinities, which is what "finite" asks.
        check(
            (1.0..=10.0).contains(&self.open_multiplier),
            "open_multiplier",
            &self.open_multiplier,
            "must be finite and 1..=10",
        );
        check(
            self.open_max >= self.open_timeout,
            "open_max",
            &self.open_max,
            "must be at least open_timeout",
        );
        check((0.0..=1.0).contains(&self.open_jitter), "open_jitter", &self.open_jitter, "must be 0..=1");
        check(
            (1..=MAX_PROBES).contains(&self.half_open_permits),
            "half_open_permits",
            &self.half_open_permits,
            "must be 1..=200",
        );
        check(
            self.half_open_max.is_none_or(|max| max >= MIN_PERIOD),
            "half_open_max",
            &self.half_open_max,
            "must be none or at least 10ms",
        );
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

/// One broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The field of [`Config`].
    pub field: &'static str,
    /// What it was set to.
    pub value: String,
    /// What it must keep.
    pub rule: &'static str,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}: {}", self.field, self.value, self.rule)
    }
}

impl Error for ConfigError {}

/// Every rule that a [`Config`] breaks; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// The broken rules, in the order of the fields.
    pub fn iter(&self) -> std::slice::Iter<'_, ConfigError> {
        self.0.iter()
    }
}

impl<'a> IntoIterator for &'a ConfigErrors {
    type Item = &'a ConfigError;
    type IntoIter = std::slice::Iter<'a, ConfigError>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{error}")?;
        }
        Ok(())
    }
}

impl Error for ConfigErrors {}

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
        assert!(errors.to_string().starts_with("failure_threshold = 8001: must be 1..=8000; "));
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
