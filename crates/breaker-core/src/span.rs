//! Arithmetic on points in time in as few instructions as it takes.
//!
//! Not another unit: `Duration` compares and subtracts all this too, with three times the work.

use std::time::Duration;

const BILLION: u64 = 1_000_000_000;

/// Whether `now` is at or past `point`.
#[inline]
pub(crate) const fn reached(point: Duration, now: Duration) -> bool {
    wide(point) <= wide(now)
}

/// How long until `until`; none where that is now or over.
#[inline]
pub(crate) fn left(until: Duration, now: Duration) -> Option<Duration> {
    if wide(until) <= wide(now) {
        return None;
    }
    let left = wide(until).wrapping_sub(wide(now));
    // Where the nanoseconds borrowed a second, that second is given back to them.
    let nanos = left as u64;
    let nanos = if nanos >= BILLION { nanos.wrapping_add(BILLION) } else { nanos };
    Some(Duration::new((left >> 64) as u64, nanos as u32))
}

/// How long until `until`, where whole seconds suffice to see that `now` lies between the two; none says nothing.
#[inline]
pub(crate) fn clearly_left(since: Duration, until: Duration, now: Duration) -> Option<Duration> {
    if since.as_secs() >= now.as_secs() || now.as_secs() >= until.as_secs() {
        return None;
    }
    let secs = until.as_secs() - now.as_secs();
    let (nanos, borrowed) = until.subsec_nanos().overflowing_sub(now.subsec_nanos());
    let nanos = if borrowed { nanos.wrapping_add(BILLION as u32) } else { nanos };
    Some(Duration::new(secs - u64::from(borrowed), nanos))
}

/// Whole nanoseconds. Saturates after 584 years; then it is at the end of all time, never in the future.
#[inline]
pub(crate) const fn nanos(time: Duration) -> u64 {
    if time.as_secs() < u64::MAX / BILLION {
        time.as_secs() * BILLION + time.subsec_nanos() as u64
    } else {
        u64::MAX
    }
}

/// A number that compares as the time does. Two words side by side: nothing is computed.
#[inline]
const fn wide(time: Duration) -> u128 {
    (time.as_secs() as u128) << 64 | time.subsec_nanos() as u128
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_arithmetic_of_durations() {
        let seconds = [0, 1, 2, 59, 1_700_000_000, 18_446_744_072, 18_446_744_073, u64::MAX - 1, u64::MAX];
        let times: Vec<Duration> = seconds
            .into_iter()
            .flat_map(|secs| [0, 1, 2, 999_999_998, 999_999_999].map(|nanos| Duration::new(secs, nanos)))
            .collect();
        for &a in &times {
            assert_eq!(
                u128::from(nanos(a)),
                if a.as_secs() < 18_446_744_073 { a.as_nanos() } else { u64::MAX.into() }
            );
            for &b in &times {
                assert_eq!(reached(a, b), a <= b, "{a:?} {b:?}");
                for &c in &times {
                    let clearly = clearly_left(c, a, b);
                    assert!(clearly.is_none_or(|clear| reached(c, b) && Some(clear) == left(a, b)));
                    assert_eq!(clearly.is_some(), c.as_secs() < b.as_secs() && b.as_secs() < a.as_secs());
                }
                assert_eq!(left(a, b), a.checked_sub(b).filter(|left| !left.is_zero()), "{a:?} {b:?}");
            }
        }
    }
}
