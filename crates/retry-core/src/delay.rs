//! From a retry count and 64 random bits to a delay.
//!
//! Not a generator with state: a draw is a function of its key, so any replica, after any crash, computes the same
//! delay for the same attempt. Invariants: `delay ≤ cap`; whole nanoseconds, rounded down; no allocation.

use crate::policy::{CapMode, Config, Jitter};
use std::sync::Arc;
use std::time::Duration;

/// Doubling from 1 ns reaches 7 days in 50 steps; growth so slow that 64 do not reach the cap is computed.
const TABLE_LIMIT: u32 = 64;

const BILLION: u128 = 1_000_000_000;

/// 64 random bits for (seed, task, attempt): a keyed multiply-fold hash.
///
/// Fixed for ever: a task that crashed mid-way must find the delay it had before. Not for secrets.
///
/// ```
/// use retry_core::draw;
///
/// assert_eq!(draw(1, 2, 3), draw(1, 2, 3));
/// assert_ne!(draw(1, 2, 3), draw(1, 2, 4));
/// ```
#[must_use]
#[inline]
pub const fn draw(seed: u64, task: u64, attempt: u64) -> u64 {
    // Each word meets a constant, never another word: a product of two inputs would be 0 for every task
    // whenever one of them happened to be 0. The last fold parts attempts that differ in one bit.
    let hash = fold(seed ^ 0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9);
    let hash = fold(hash ^ task, 0x94D0_49BB_1331_11EB);
    let hash = fold(hash ^ attempt, 0xD6E8_FEB8_6659_FD93);
    fold(hash ^ 0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9)
}

/// Both halves of the 128-bit product, folded.
#[inline]
const fn fold(a: u64, b: u64) -> u64 {
    let product = (a as u128) * (b as u128);
    (product as u64) ^ ((product >> 64) as u64)
}

/// `draw` scaled to `0..span`, by the high half of a product: no division, bias below 2⁻⁶⁴ × span.
#[inline]
pub(crate) const fn scale(draw: u64, span: u64) -> u64 {
    (((draw as u128) * (span as u128)) >> 64) as u64
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A uniform range of whole nanoseconds: `span` values from `low` on. `span` is at least 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) low: u64,
    pub(crate) span: u64,
}

impl Slot {
    const fn between(low: u64, high: u64) -> Self {
        Self { low, span: high.saturating_sub(low).saturating_add(1) }
    }

    pub(crate) const fn high(self) -> u64 {
        self.low.saturating_add(self.span - 1)
    }
}

/// The shape of a policy's delays, in integers.
#[derive(Clone, Debug)]
pub(crate) struct Curve {
    pub(crate) base: u64,
    pub(crate) cap: u64,
    growth: f64,
    pub(crate) jitter: Jitter,
    /// The p of proportional jitter in billionths, so that 0.9 is nine tenths and not the double beside it.
    billionths: u64,
    cap_mode: CapMode,
    /// The first ranges; none for `Decorrelated`, whose ranges depend on the delay before.
    slots: Arc<[Slot]>,
    /// Whether delays grow no more after the last slot.
    settled: bool,
}

impl Curve {
    pub(crate) fn new(config: &Config) -> Self {
        let mut curve = Self {
            base: nanos(config.base_delay),
            cap: nanos(config.max_delay),
            growth: config.exponential_base,
            jitter: config.jitter,
            billionths: match config.jitter {
                Jitter::Proportional(p) => (p * 1e9).round() as u64,
                _ => 0,
            },
            cap_mode: config.cap_mode,
            slots: Arc::new([]),
            settled: false,
        };
        let mut slots = Vec::new();
        let kept = if config.jitter == Jitter::Decorrelated { 0 } else { TABLE_LIMIT };
        for k in 0..kept {
            let nominal = curve.nominal(k);
            slots.push(curve.spread(nominal));
            curve.settled = nominal >= curve.cap || curve.base == 0 || curve.growth == 1.0;
            if curve.settled {
                break;
            }
        }
        curve.slots = slots.into();
        curve
    }

    #[inline]
    pub(crate) fn delay(&self, retries_made: u32, draw: u64, previous: Duration) -> Duration {
        let slot = match self.slots.get(retries_made as usize) {
            Some(slot) => *slot,
            None => self.beyond(retries_made, previous),
        };
        // Cannot overflow: both ends are below twice the cap, which is a week at most. Only `Clamp` reaches above the
        // cap; for the others the minimum changes nothing.
        Duration::from_nanos((slot.low + scale(draw, slot.span)).min(self.cap))
    }

    #[inline(never)]
    fn beyond(&self, retries_made: u32, previous: Duration) -> Slot {
        match self.jitter {
            Jitter::Decorrelated => self.after(nanos(previous)),
            _ => self.slot(retries_made),
        }
    }

    /// The range of a retry; for `Decorrelated`, of the first one.
    pub(crate) fn slot(&self, k: u32) -> Slot {
        match (self.slots.get(k as usize), self.slots.last()) {
            (Some(slot), _) => *slot,
            (None, Some(last)) if self.settled => *last,
            _ => self.spread(self.nominal(k)),
        }
    }

    /// Whether every retry from the k-th on has the same range.
    pub(crate) fn settled_at(&self, k: u32) -> bool {
        self.settled && k as usize + 1 >= self.slots.len()
    }

    /// The range that follows `previous` under decorrelated jitter.
    pub(crate) fn after(&self, previous: u64) -> Slot {
        let high = previous.max(self.base).saturating_mul(3).min(self.cap);
        Slot::between(self.base, high.max(self.base))
    }

    /// min(cap, base × growth^k).
    fn nominal(&self, k: u32) -> u64 {
        if self.base == 0 {
            return 0;
        }
        let raw = self.base as f64 * power(self.growth, k);
        // 1.7 × 1.7 is a double just below 2.89: without the nudge, larger than what squaring can lose (some 40
        // units in the last place), rounding down would show 288.999999 ms where the user expects 289.
        let raw = raw + raw * (1.0 / (1_u64 << 47) as f64);
        if raw >= self.cap as f64 { self.cap } else { raw as u64 }
    }

    fn spread(&self, nominal: u64) -> Slot {
        match self.jitter {
            Jitter::None => Slot::between(nominal, nominal),
            Jitter::Full => Slot::between(0, nominal),
            Jitter::Equal => Slot::between(nominal / 2, nominal / 2 * 2),
            Jitter::Decorrelated => self.after(self.base),
            Jitter::Proportional(_) => {
                let p = u128::from(self.billionths);
                let centre = match self.cap_mode {
                    CapMode::Clamp => u128::from(nominal),
                    CapMode::Fold => u128::from(nominal).min(u128::from(self.cap) * BILLION / (BILLION + p)),
                };
                let part = |share: u128| u64::try_from(centre * share / BILLION).unwrap_or(u64::MAX);
                Slot::between(part(BILLION - p), part(BILLION + p))
            }
        }
    }
}

/// By squaring, in plain multiplications: `powf` may differ between platforms, and replicas must agree.
fn power(base: f64, mut exponent: u32) -> f64 {
    let (mut result, mut square) = (1.0, base);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= square;
        }
        square *= square;
        exponent >>= 1;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_fixed_for_ever() {
        // Stored schedules depend on these values, computed apart: a change here is a breaking change.
        assert_eq!(draw(0, 0, 0), 0xC1A6_F679_A609_117B);
        assert_eq!(draw(1, 2, 3), 0xAE46_68CB_6F11_93FA);
        assert_eq!(draw(u64::MAX, u64::MAX, u64::MAX), 0x0C8C_E04D_B6FF_15FC);
    }

    #[test]
    fn one_flipped_bit_of_any_input_flips_about_half_of_the_draw() {
        for word in 0..3 {
            for bit in 0..64 {
                let mut flipped = 0;
                for n in 0..256_u64 {
                    let key = [11, n, n / 7];
                    let mut other = key;
                    other[word] ^= 1 << bit;
                    flipped +=
                        (draw(key[0], key[1], key[2]) ^ draw(other[0], other[1], other[2])).count_ones();
                }
                let mean = f64::from(flipped) / 256.0;
                assert!((24.0..=40.0).contains(&mean), "word {word} bit {bit}: {mean}");
            }
        }
    }

    #[test]
    fn scale_reaches_both_ends() {
        for span in [1, 2, 3, 1_000, 604_800_000_000_001] {
            assert_eq!(scale(0, span), 0);
            assert_eq!(scale(u64::MAX, span), span - 1);
        }
    }
}
