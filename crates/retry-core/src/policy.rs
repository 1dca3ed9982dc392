//! The policy: what a user may set, what is valid, and the validated form that decides.
//!
//! Not the arithmetic of delays (`delay`), nor the decision over one failure (`decision`).
//! Invariant: a [`Policy`] exists only for a [`Config`] that passed validation, so nothing downstream checks again.

use crate::delay::Curve;
use crate::error::{ConfigErrors, Findings};
use crate::total::Total;
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(24 * 3_600);
const WEEK: Duration = Duration::from_secs(7 * 24 * 3_600);

/// The most retries a policy can allow. Beyond that a retry is a poll, which wants another design.
const MAX_RETRIES: u32 = 1_000;

/// How delays are spread, so that callers who failed together do not come back together.
///
/// With k = retries made so far, r = `base_delay` × `exponential_base`^k, cap = `max_delay`, and U(a, b) uniform
/// over the whole nanoseconds from a to b, both included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Jitter {
    /// min(r, cap), always.
    None,
    /// U(c(1 − p), c(1 + p)), 0 ≤ p ≤ 1, taken to the nearest billionth; c depends on [`CapMode`].
    Proportional(f64),
    /// U(0, min(r, cap)). The widest spread; the next try may come at once.
    Full,
    /// c/2 + U(0, c/2) with c = min(r, cap).
    Equal,
    /// U(base, min(cap, 3 × previous)), where previous starts at base. Ignores `exponential_base` and k.
    Decorrelated,
}

/// What the cap does to [`Jitter::Proportional`]. The modes differ once r exceeds cap / (1 + p).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CapMode {
    /// c = min(r, cap / (1 + p)): the whole spread lies below the cap, so jitter still works there.
    #[default]
    Fold,
    /// min(cap, U(c(1 − p), c(1 + p))) with c = min(r, cap), as most others do: at the cap half of all delays
    /// are exactly the cap.
    Clamp,
}

/// What a server's hint does to the delay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HintMode {
    /// The earliest time: max(delay, h + U(0, min(0.1 h, 10 s))).
    #[default]
    AtLeast,
    /// The delay is h.
    Exact,
    /// The hint's time is not looked at. "Do not retry" is still obeyed: it says what failed, not when to come.
    Ignore,
}

/// What a user sets. [`Config::build`] makes a [`Policy`] of it.
///
/// ```
/// use retry_core::{Config, Jitter};
/// use std::time::Duration;
///
/// let config = Config { base_delay: Duration::from_secs(1), jitter: Jitter::Full, ..Config::default() };
/// assert!(config.build().is_ok());
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Retries after the first attempt: 0..=1,000, default 3. 0 makes the first failure final.
    pub max_retries: u32,
    /// The delay before the first retry, without jitter: 0..=24 h, default 100 ms.
    pub base_delay: Duration,
    /// How much longer each delay is than the one before: finite, 1.0..=10.0, default 2.0.
    pub exponential_base: f64,
    /// No delay exceeds it, jitter included: `base_delay`..=7 days, default 30 s.
    pub max_delay: Duration,
    /// Default `Proportional(0.5)`.
    pub jitter: Jitter,
    /// Default `Fold`.
    pub cap_mode: CapMode,
    /// No retry starts later than this after the first attempt: above 0, default none.
    pub max_elapsed: Option<Duration>,
    /// What a retry needs between its start and the deadline to be worth it: 0..=7 days, default 0.
    pub min_window: Duration,
    /// Default `AtLeast`.
    pub hint: HintMode,
    /// A longer hint is cut to this, and the decision says so: 0..=24 h, default 5 min.
    pub hint_max: Duration,
    /// Work lost this many times with its worker is given up: 1..=1,000, default 3.
    pub max_losses: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_retries: 3,
            base_delay: Duration::from_millis(100),
            exponential_base: 2.0,
            max_delay: Duration::from_secs(30),
            jitter: Jitter::Proportional(0.5),
            cap_mode: CapMode::Fold,
            max_elapsed: None,
            min_window: Duration::ZERO,
            hint: HintMode::AtLeast,
            hint_max: HOUR / 12,
            max_losses: 3,
        }
    }
}

impl Config {
    /// Checks every field.
    ///
    /// # Errors
    ///
    /// All fields outside the ranges given above, NaN and infinity among them.
    pub fn validate(&self) -> Result<(), ConfigErrors> {
        let mut findings = Findings::default();
        findings.require(self.max_retries <= MAX_RETRIES, "max_retries", &self.max_retries, "0..=1000");
        findings.require(self.base_delay <= DAY, "base_delay", &self.base_delay, "at most 24 h");
        findings.require(
            (1.0..=10.0).contains(&self.exponential_base),
            "exponential_base",
            &self.exponential_base,
            "a number in 1.0..=10.0",
        );
        findings.require(
            self.max_delay >= self.base_delay && self.max_delay <= WEEK,
            "max_delay",
            &self.max_delay,
            "at least base_delay and at most 7 days",
        );
        if let Jitter::Proportional(p) = self.jitter {
            findings.require((0.0..=1.0).contains(&p), "jitter", &p, "a number in 0.0..=1.0");
        }
        findings.require(
            self.max_elapsed != Some(Duration::ZERO),
            "max_elapsed",
            &self.max_elapsed,
            "above 0, or none (for no retries set max_retries to 0)",
        );
        findings.require(self.min_window <= WEEK, "min_window", &self.min_window, "at most 7 days");
        findings.require(self.hint_max <= DAY, "hint_max", &self.hint_max, "at most 24 h");
        findings.require(
            (1..=MAX_RETRIES).contains(&self.max_losses),
            "max_losses",
            &self.max_losses,
            "1..=1000",
        );
        findings.finish()
    }

    /// Validates, and computes the table of delays.
    ///
    /// # Errors
    ///
    /// As [`Config::validate`].
    pub fn build(self) -> Result<Policy, ConfigErrors> {
        self.validate()?;
        Ok(Policy { curve: Curve::new(&self), config: self })
    }
}

/// A validated policy. A clone shares the table.
#[derive(Clone, Debug)]
pub struct Policy {
    config: Config,
    curve: Curve,
}

/// The table follows from the configuration, so two policies are equal when those are.
impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        self.config == other.config
    }
}

impl Default for Policy {
    fn default() -> Self {
        let config = Config::default();
        Self { curve: Curve::new(&config), config }
    }
}

impl TryFrom<Config> for Policy {
    type Error = ConfigErrors;

    fn try_from(config: Config) -> Result<Self, ConfigErrors> {
        config.build()
    }
}

impl Policy {
    /// What this policy was built from.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Retries allowed after the first attempt.
    #[must_use]
    pub const fn max_retries(&self) -> u32 {
        self.config.max_retries
    }

    /// The same delays with another limit: the override tasks use most, without computing the table anew.
    ///
    /// # Errors
    ///
    /// When `max_retries` exceeds 1,000.
    pub fn with_max_retries(&self, max_retries: u32) -> Result<Self, ConfigErrors> {
        let config = Config { max_retries, ..self.config };
        config.validate()?;
        Ok(Self { config, curve: self.curve.clone() })
    }

    /// The delay before the next retry, by the formulas at [`Jitter`].
    ///
    /// `retries_made` is k: 0 before the first retry; any value is fine, delays stop growing at the cap.
    /// `draw` is 64 random bits, see [`draw`](crate::draw); 0 gives the shortest delay, `u64::MAX` the longest.
    /// `previous` is the delay before this one (zero, or anything below `base_delay`, stands for `base_delay`);
    /// only [`Jitter::Decorrelated`] looks at it.
    #[must_use]
    #[inline]
    pub fn delay(&self, retries_made: u32, draw: u64, previous: Duration) -> Duration {
        self.curve.delay(retries_made, draw, previous)
    }

    /// What `n` retries wait in all: least, mean and most; hints excluded. `n` may exceed `max_retries`.
    ///
    /// Exact to the nanosecond for n ≤ 1,000, but for the mean of [`Jitter::Decorrelated`]: once the cap can bind
    /// it has no closed form and is integrated numerically, to about one part in a thousand. A policy that after
    /// 65,536 retries still grows is counted as if it stopped growing there.
    #[must_use]
    pub fn total_delay(&self, n: u32) -> Total {
        Total::of(&self.curve, n)
    }
}
