//! How long all retries together wait: least, mean, most.
//!
//! Not what one task waits: that depends on its draws, and on hints. Invariant: `min ≤ mean ≤ max`, and every sum of
//! delays lies between the outer two.

use crate::delay::{Curve, Slot};
use crate::policy::Jitter;
use std::time::Duration;

/// Up to here each retry is summed on its own. A table that has not reached the cap after so many grows by less
/// than a thousandth each time; longer sums would take seconds, for policies that nobody writes.
const SUMMED_SINGLY: u32 = 65_536;

/// Fraction bits of the mean, so that the halves and shares of 1,000 retries add up before they are cut.
const FRACTION: u32 = 20;

/// Points per factor of three in the integration of decorrelated jitter.
const POINTS: usize = 64;

/// The time some retries wait in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Total {
    /// When every draw is 0.
    pub min: Duration,
    /// The expectation, rounded down.
    pub mean: Duration,
    /// When every draw is `u64::MAX`.
    pub max: Duration,
}

impl Total {
    pub(crate) fn of(curve: &Curve, n: u32) -> Self {
        match curve.jitter {
            Jitter::Decorrelated => decorrelated(curve, n),
            _ => independent(curve, n),
        }
    }
}

fn independent(curve: &Curve, n: u32) -> Total {
    let (mut min, mut mean, mut max) = (0_u128, 0_u128, 0_u128);
    let mut k = 0;
    while k < n {
        let slot = curve.slot(k);
        let times = if curve.settled_at(k) || k >= SUMMED_SINGLY { n - k } else { 1 };
        min += u128::from(slot.low) * u128::from(times);
        mean += mean_of(slot, curve.cap) * u128::from(times);
        max += u128::from(slot.high().min(curve.cap)) * u128::from(times);
        k += times;
    }
    Total { min: duration(min), mean: duration(mean >> FRACTION), max: duration(max) }
}

/// The expectation of min(cap, U(slot)), in 2⁻²⁰ ns.
fn mean_of(slot: Slot, cap: u64) -> u128 {
    let (low, high, cap) = (u128::from(slot.low), u128::from(slot.high()), u128::from(cap));
    if high <= cap {
        return (low + high) << (FRACTION - 1);
    }
    // low..cap have their own values, cap..=high all count as the cap.
    let below = (low + cap).saturating_sub(1) * (cap - low) / 2;
    ((below + (high - cap + 1) * cap) << FRACTION) / u128::from(slot.span)
}

fn decorrelated(curve: &Curve, n: u32) -> Total {
    let min = u128::from(curve.base) * u128::from(n);
    let (mut max, mut longest, mut k) = (0_u128, curve.base, 0);
    while k < n {
        let next = curve.after(longest).high();
        let times = if next == longest { n - k } else { 1 };
        max += u128::from(next) * u128::from(times);
        longest = next;
        k += times;
    }
    // `as` saturates; the clamp keeps the order where a double is too coarse for the last nanoseconds.
    let mean = (decorrelated_mean(curve.base as f64, curve.cap as f64, n) as u128).clamp(min, max);
    Total { min: duration(min), mean: duration(mean), max: duration(max) }
}

/// V_n(x) = 1/(m − b) × ∫ from b to m of (y + V_(n−1)(y)) dy, m = min(cap, 3x): what n retries wait after a delay
/// of x; asked for x = b. Exact while the cap does not bind, since V is linear then and so is the trapezoid.
fn decorrelated_mean(base: f64, cap: f64, n: u32) -> f64 {
    // No delay ever leaves 0, and the points below would not move either.
    if base == 0.0 || base >= cap {
        return base * f64::from(n);
    }
    // Points lie at base × 3^(j / POINTS), so three times a point is a point again; the cap comes last.
    let mut points = Vec::new();
    while let x = base * 3_f64.powf(points.len() as f64 / POINTS as f64)
        && x < cap
    {
        points.push(x);
    }
    points.push(cap);
    let last = points.len() - 1;
    let mut rest = vec![0.0; points.len()];
    let mut area = vec![0.0; points.len()];
    let mut step = 0.0;
    for done in 0..n {
        for j in 1..points.len() {
            let width = points[j] - points[j - 1];
            area[j] = area[j - 1] + width * (points[j] + points[j - 1] + rest[j] + rest[j - 1]) / 2.0;
        }
        let before = rest[0];
        for (j, value) in rest.iter_mut().enumerate() {
            let end = (j + POINTS).min(last);
            *value = area[end] / (points[end] - base);
        }
        let grown = rest[0] - before;
        // What came before is soon forgotten: once a further retry adds what the last one added, so do all others.
        if done >= 1_000 || (grown - step).abs() <= grown * 1e-12 {
            return rest[0] + grown * f64::from(n - done - 1);
        }
        step = grown;
    }
    rest[0]
}

fn duration(nanos: u128) -> Duration {
    const SECOND: u128 = 1_000_000_000;
    u64::try_from(nanos / SECOND).map_or(Duration::MAX, |s| Duration::new(s, (nanos % SECOND) as u32))
}
