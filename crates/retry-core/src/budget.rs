//! A budget for retries over many tasks: a token bucket that successes fill.
//!
//! Not a rate limit on first attempts. Back-off alone only moves load in time: while everything fails, n retries are
//! still n + 1 times the load. A bucket that successes fill dries up in an outage and ends that.
//!
//! Invariants, in whole millitokens:
//! - `0 ≤ millitokens ≤ capacity`;
//! - over every window T, tokens withdrawn and not refunded ≤ capacity + ⌈floor × T⌉ + deposit × successes(T);
//! - time running backwards mints nothing, nor does the same time lived twice;
//! - a restored bucket holds what was saved, so a crash loop mints nothing either.

use crate::error::{ConfigErrors, Findings};
use std::time::Duration;

/// The thousandth of a token: 0.1 per success must add up exactly.
const MILLI: u64 = 1_000;

/// Far above any fleet, far below where products leave 128 bits.
const MOST_TOKENS: u32 = 1_000_000;

/// What a user sets. [`BucketConfig::build`] makes [`Limits`] of it. The default suits one agent; for all agents
/// together 100 tokens and a floor of 1.0 are a good start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BucketConfig {
    /// Tokens that a full bucket holds: 1..=1,000,000, default 10. How long a burst of retries may be.
    pub capacity: u32,
    /// Tokens per success, to the nearest thousandth: 0, or 0.001..=1.0; default 0.1, so that in the long run one
    /// call in ten is a retry.
    pub deposit: f64,
    /// Tokens per second that arrive even without any success, to the nearest thousandth: 0, or
    /// 0.001..=1,000,000; default 0.1. What keeps probing alive in an outage.
    pub floor: f64,
}

impl Default for BucketConfig {
    fn default() -> Self {
        Self { capacity: 10, deposit: 0.1, floor: 0.1 }
    }
}

impl BucketConfig {
    /// Validates, and turns fractions into whole millitokens.
    ///
    /// # Errors
    ///
    /// All fields outside the ranges given above, NaN and infinity among them.
    pub fn build(self) -> Result<Limits, ConfigErrors> {
        let usable = |value: f64, most: f64| value == 0.0 || (0.001..=most).contains(&value);
        let mut findings = Findings::default();
        findings.require(
            (1..=MOST_TOKENS).contains(&self.capacity),
            "capacity",
            &self.capacity,
            "1..=1000000",
        );
        findings.require(
            usable(self.deposit, 1.0),
            "deposit",
            &self.deposit,
            "0, or a number in 0.001..=1.0",
        );
        findings.require(
            usable(self.floor, f64::from(MOST_TOKENS)),
            "floor",
            &self.floor,
            "0, or a number in 0.001..=1000000.0",
        );
        findings.finish()?;
        // Rounded, not cut: 0.7 × 1,000 is a double below 700, and a ratio that loses its tail is another ratio.
        let milli = |value: f64| (value * MILLI as f64).round() as u64;
        Ok(Limits {
            capacity: u64::from(self.capacity) * MILLI,
            deposit: milli(self.deposit),
            floor: milli(self.floor),
        })
    }
}

/// The validated limits of a bucket, in millitokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    capacity: u64,
    deposit: u64,
    floor: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { capacity: 10 * MILLI, deposit: 100, floor: 100 }
    }
}

impl Limits {
    /// Millitokens of a full bucket.
    #[must_use]
    pub const fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Millitokens per success.
    #[must_use]
    pub const fn deposit(&self) -> u64 {
        self.deposit
    }

    /// Millitokens per second without any success.
    #[must_use]
    pub const fn floor(&self) -> u64 {
        self.floor
    }

    /// The same, with the floor divided among `replicas` (0 counts as 1), rounded down: the floor belongs to the
    /// cluster. One per client would grow with the clients and feed an overload for ever.
    #[must_use]
    pub const fn shared_by(self, replicas: u32) -> Self {
        Self { floor: if replicas > 1 { self.floor / replicas as u64 } else { self.floor }, ..self }
    }

    /// The floor alone: no successes, and at most `tokens` saved up. See [`reserve_with_floor`].
    #[must_use]
    pub const fn floor_only(self, tokens: u32) -> Self {
        Self { capacity: tokens as u64 * MILLI, deposit: 0, floor: self.floor }
    }
}

/// What a bucket holds, to be stored and restored as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Level {
    /// Millitokens at `updated_at`.
    pub millitokens: u64,
    /// Milliseconds since the epoch of the caller's choosing; for a stored bucket one that outlives the process.
    pub updated_at: u64,
}

/// A token bucket.
///
/// `now` is read in whole milliseconds; earlier than a `now` that the bucket has seen, it counts as that one.
///
/// ```
/// use retry_core::{Bucket, BucketConfig};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), retry_core::ConfigErrors> {
/// let now = Duration::from_secs(5);
/// let mut bucket = Bucket::full(BucketConfig { capacity: 2, ..BucketConfig::default() }.build()?, now);
/// assert!(bucket.withdraw(now, 2));
/// assert!(!bucket.withdraw(now, 1));
/// assert_eq!(bucket.next_at(now, 1), Some(Duration::from_secs(15))); // the floor of 0.1 a second
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    limits: Limits,
    level: Level,
}

impl Bucket {
    /// A bucket that never was before. One that was is [restored](Self::restore).
    #[must_use]
    pub fn full(limits: Limits, now: Duration) -> Self {
        Self { limits, level: Level { millitokens: limits.capacity, updated_at: millis(now) } }
    }

    /// A bucket as it was saved; cut to the capacity, should that have shrunk.
    #[must_use]
    pub fn restore(limits: Limits, level: Level) -> Self {
        Self { limits, level: Level { millitokens: level.millitokens.min(limits.capacity), ..level } }
    }

    /// What to save.
    #[must_use]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// What it was built with.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// Changes the limits from `now` on. What was earned under the old ones stays, as far as it fits.
    pub fn resize(&mut self, limits: Limits, now: Duration) {
        self.settle(now);
        self.limits = limits;
        self.level.millitokens = self.level.millitokens.min(limits.capacity);
    }

    /// Millitokens there are at `now`.
    #[must_use]
    pub fn available(&self, now: Duration) -> u64 {
        self.at(millis(now))
    }

    /// A success. Whether anything changed, and needs saving: a full bucket, as in all good times, stays as it is.
    pub fn deposit(&mut self, now: Duration) -> bool {
        if self.level.millitokens >= self.limits.capacity {
            return false;
        }
        let before = self.level.millitokens;
        self.settle(now);
        self.put(self.limits.deposit);
        self.level.millitokens != before
    }

    /// Takes `tokens`, all or none. Whether it could; 0 tokens always can, and change nothing.
    #[must_use]
    pub fn withdraw(&mut self, now: Duration, tokens: u32) -> bool {
        if tokens == 0 {
            return true;
        }
        let price = u64::from(tokens) * MILLI;
        let available = self.available(now);
        if available < price {
            return false;
        }
        self.settle(now);
        self.level.millitokens = available - price;
        true
    }

    /// Gives back tokens whose retry was never dispatched; what does not fit any more is lost.
    pub fn refund(&mut self, tokens: u32) {
        self.put(u64::from(tokens) * MILLI);
    }

    /// The earliest time from `now` on at which the floor alone has paid for `tokens`; to the millisecond. None if
    /// that never comes: more than the capacity, or no floor. A success may bring it forward.
    #[must_use]
    pub fn next_at(&self, now: Duration, tokens: u32) -> Option<Duration> {
        let price = u64::from(tokens) * MILLI;
        if self.available(now) >= price {
            return Some(now);
        }
        if price > self.limits.capacity || self.limits.floor == 0 {
            return None;
        }
        // The first t with ticks(t) ≥ ticks(updated_at) + missing.
        let due = self.ticks(self.level.updated_at) + u128::from(price - self.level.millitokens);
        let at = (due * u128::from(MILLI)).div_ceil(u128::from(self.limits.floor));
        Some(Duration::from_millis(u64::try_from(at).unwrap_or(u64::MAX)))
    }

    /// Millitokens the floor has minted from the epoch to `at`. Differences of it add up exactly however often they
    /// are taken, which minting "elapsed × rate" does not: its lost fractions depend on how often somebody asks.
    fn ticks(&self, at: u64) -> u128 {
        u128::from(at) * u128::from(self.limits.floor) / u128::from(MILLI)
    }

    fn at(&self, now: u64) -> u64 {
        let minted = self.ticks(now).saturating_sub(self.ticks(self.level.updated_at));
        let minted = u64::try_from(minted).unwrap_or(u64::MAX);
        self.level.millitokens.saturating_add(minted).min(self.limits.capacity)
    }

    fn settle(&mut self, now: Duration) {
        let now = millis(now);
        self.level = Level { millitokens: self.at(now), updated_at: self.level.updated_at.max(now) };
    }

    fn put(&mut self, millitokens: u64) {
        self.level.millitokens = self.level.millitokens.saturating_add(millitokens).min(self.limits.capacity);
    }
}

/// Which bucket refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Empty {
    /// The caller's own.
    Own,
    /// The one shared with others; the own one is as it was.
    Shared,
}

/// Who paid, and so who gets a refund.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Paid {
    /// Both buckets.
    Both,
    /// The own bucket and its floor.
    OwnFloor,
}

/// Takes `tokens` from both buckets, or from neither.
///
/// # Errors
///
/// [`Empty`] names the bucket that lacked them; the own one is asked first.
pub fn reserve_both(own: &mut Bucket, shared: &mut Bucket, now: Duration, tokens: u32) -> Result<(), Empty> {
    if !own.withdraw(now, tokens) {
        return Err(Empty::Own);
    }
    if !shared.withdraw(now, tokens) {
        own.refund(tokens);
        return Err(Empty::Shared);
    }
    Ok(())
}

/// As [`reserve_both`]; but where the shared bucket is empty, `floor` may pay in its place.
///
/// So the trouble of others can delay the owner, but never below the rate of its own floor. `floor` is a bucket of
/// [`Limits::floor_only`], one for each owner.
///
/// # Errors
///
/// [`Empty::Own`], or [`Empty::Shared`] when the floor has nothing either.
pub fn reserve_with_floor(
    own: &mut Bucket,
    shared: &mut Bucket,
    floor: &mut Bucket,
    now: Duration,
    tokens: u32,
) -> Result<Paid, Empty> {
    match reserve_both(own, shared, now, tokens) {
        Ok(()) => Ok(Paid::Both),
        // The own bucket had the tokens a moment ago, under the same `now` and the same exclusive borrow.
        Err(Empty::Shared) if floor.withdraw(now, tokens) && own.withdraw(now, tokens) => Ok(Paid::OwnFloor),
        Err(empty) => Err(empty),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
