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

/// Above every capacity, and adds up with it.
const NEVER_FITS: u64 = u64::MAX / 2;

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

    /// Millitokens the floor has minted from the epoch to `at`. Differences of it add up exactly however often they
    /// are taken, which minting "elapsed × rate" does not: its lost fractions depend on how often somebody asks.
    fn ticks(self, at: u64) -> u128 {
        u128::from(at) * u128::from(self.floor) / u128::from(MILLI)
    }

    /// The same, with capacity and floor divided among `replicas` (0 counts as 1), rounded down: both belong to the
    /// cluster. A floor per client would grow with the clients and feed an overload for ever. A bucket goes on holding
    /// `dearest` tokens, or what it held where that is less, so that everything can still be paid.
    #[must_use]
    pub const fn shared_by(self, replicas: u32, dearest: u32) -> Self {
        if replicas <= 1 {
            return self;
        }
        let (part, least) = (self.capacity / replicas as u64, dearest as u64 * MILLI);
        let least = if least < self.capacity { least } else { self.capacity };
        let capacity = if part > least { part } else { least };
        Self { capacity, floor: self.floor / replicas as u64, ..self }
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
#[derive(Clone, Debug)]
pub struct Bucket {
    limits: Limits,
    /// What a success puts in; where that is nothing, more than any bucket holds, so that one comparison finds both.
    step: u64,
    /// What there was when the floor had minted `minted`, and what was put in since. What the floor minted since is
    /// added when somebody asks: min(capacity, …) of a sum is the same whichever part comes first.
    millitokens: u64,
    /// In all time from the epoch.
    minted: u128,
    /// In seconds: before this, what the floor has minted is computed in 64 bits.
    plain_before: u64,
    /// The newest `now`: time before it is not lived again.
    seen: Duration,
}

/// Two are equal that hold the same, whenever that was worked out.
impl PartialEq for Bucket {
    fn eq(&self, other: &Self) -> bool {
        self.limits == other.limits && self.level() == other.level()
    }
}

impl Eq for Bucket {}

impl Bucket {
    /// A bucket that never was before. One that was is [restored](Self::restore).
    #[must_use]
    pub fn full(limits: Limits, now: Duration) -> Self {
        Self::restore(limits, Level { millitokens: limits.capacity, updated_at: millis(now) })
    }

    /// A bucket as it was saved; cut to the capacity, should that have shrunk.
    #[must_use]
    pub fn restore(limits: Limits, level: Level) -> Self {
        Self {
            limits,
            step: if limits.deposit == 0 { NEVER_FITS } else { limits.deposit },
            millitokens: level.millitokens.min(limits.capacity),
            minted: limits.ticks(level.updated_at),
            plain_before: u64::MAX / MILLI / limits.floor.max(1),
            seen: Duration::from_millis(level.updated_at),
        }
    }

    /// What to save.
    #[must_use]
    pub fn level(&self) -> Level {
        Level { millitokens: self.at(self.seen).0, updated_at: millis(self.seen) }
    }

    /// What it was built with.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// Changes the limits from `now` on. What was earned under the old ones stays, as far as it fits.
    pub fn resize(&mut self, limits: Limits, now: Duration) {
        self.settle(now);
        *self = Self { seen: self.seen, ..Self::restore(limits, self.level()) };
    }

    /// Millitokens there are at `now`.
    #[must_use]
    pub fn available(&self, now: Duration) -> u64 {
        self.at(now.max(self.seen)).0
    }

    /// A success. Whether anything changed, and needs saving: a full bucket, as in all good times, stays as it is.
    #[inline]
    pub fn deposit(&mut self, now: Duration) -> bool {
        let sum = self.millitokens + self.step;
        if sum > self.limits.capacity {
            return self.millitokens < self.limits.capacity && self.deposit_settled(now);
        }
        if is_before(now, self.seen) {
            return self.deposit_settled(now);
        }
        self.seen = now;
        self.millitokens = sum;
        true
    }

    #[cold]
    #[inline(never)]
    fn deposit_settled(&mut self, now: Duration) -> bool {
        let before = self.millitokens;
        self.settle(now);
        self.put(self.limits.deposit);
        self.millitokens != before
    }

    /// Takes `tokens`, all or none. Whether it could; 0 tokens always can, and change nothing.
    #[must_use]
    #[inline]
    pub fn withdraw(&mut self, now: Duration, tokens: u32) -> bool {
        if tokens == 0 {
            return true;
        }
        if is_before(now, self.seen) {
            return self.withdraw_again(tokens);
        }
        let (millitokens, minted) = self.at(now);
        let price = u64::from(tokens) * MILLI;
        if millitokens < price {
            return false;
        }
        self.millitokens = millitokens - price;
        self.minted = minted;
        self.seen = now;
        true
    }

    /// In time that was lived already.
    #[cold]
    #[inline(never)]
    fn withdraw_again(&mut self, tokens: u32) -> bool {
        self.withdraw(self.seen, tokens)
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
        // The first t with ticks(t) ≥ minted + missing.
        let due = self.minted + u128::from(price - self.millitokens);
        let at = (due * u128::from(MILLI)).div_ceil(u128::from(self.limits.floor));
        Some(Duration::from_millis(u64::try_from(at).unwrap_or(u64::MAX)))
    }

    /// What it holds at `now`, which is not before `seen`; and what the floor has minted by then.
    #[inline]
    fn at(&self, now: Duration) -> (u64, u128) {
        if now.as_secs() >= self.plain_before {
            return self.at_the_end_of_time(now);
        }
        let minted = (now.as_secs() * MILLI + u64::from(now.subsec_millis())) * self.limits.floor / MILLI;
        // No overflow: the older figure is no greater, and a capacity is far below where the sum would end.
        let sum = self.millitokens + (minted - self.minted as u64);
        (sum.min(self.limits.capacity), u128::from(minted))
    }

    #[cold]
    #[inline(never)]
    fn at_the_end_of_time(&self, now: Duration) -> (u64, u128) {
        let minted = self.limits.ticks(millis(now));
        let new = u64::try_from(minted - self.minted).unwrap_or(u64::MAX);
        (self.millitokens.saturating_add(new).min(self.limits.capacity), minted)
    }

    /// Brings it up to date.
    fn settle(&mut self, now: Duration) {
        self.seen = self.seen.max(now);
        (self.millitokens, self.minted) = self.at(self.seen);
    }

    fn put(&mut self, millitokens: u64) {
        self.millitokens = (self.millitokens + millitokens).min(self.limits.capacity);
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

/// As `a < b`, in a third of the instructions: two words side by side, compared as one number.
#[inline]
const fn is_before(a: Duration, b: Duration) -> bool {
    const fn wide(time: Duration) -> u128 {
        (time.as_secs() as u128) << 64 | time.subsec_nanos() as u128
    }
    wide(a) < wide(b)
}
