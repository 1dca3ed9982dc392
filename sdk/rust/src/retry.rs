//! When the client tries again by itself: which answers allow it, and how long it waits.
//!
//! Only calls that are harmless to repeat come here: reads, and writes that carry a request id.

use std::time::Duration;

use tonic::{Response, Status};

use crate::clock;
use crate::error::{self, Error};

/// Calls made for one request, the first one included.
pub(crate) const MAX_ATTEMPTS: u32 = 4;

/// Waits that double from 0.1 s to 5 s, each spread over its upper half, so that many clients do not return at once.
pub(crate) const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(5) };

/// Exponential waits with jitter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    pub(crate) first: Duration,
    pub(crate) longest: Duration,
}

impl Backoff {
    /// The wait after `failures` failures in a row (1 or more): from half of the full wait up to all of it.
    pub(crate) fn delay(self, failures: u32, draw: u64) -> Duration {
        let doublings = failures.saturating_sub(1).min(20);
        let full = self.first.saturating_mul(1 << doublings).min(self.longest);
        full / 2 + part(full / 2, draw)
    }
}

/// From nothing up to `whole`, by `draw`.
pub(crate) fn part(whole: Duration, draw: u64) -> Duration {
    let share = (draw >> 32) as f64 / f64::from(u32::MAX);
    whole.mul_f64(share.min(1.0))
}

/// Calls until an answer stands, at most [`MAX_ATTEMPTS`] times.
pub(crate) async fn call<T, F, Fut>(mut op: F) -> Result<T, Error>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Response<T>, Status>>,
{
    let mut failures = 0;
    loop {
        let status = match op().await {
            Ok(response) => return Ok(response.into_inner()),
            Err(status) => status,
        };
        failures += 1;
        let repeatable = error::is_repeatable(&status);
        let error = Error::from(status);
        if !repeatable || failures >= MAX_ATTEMPTS {
            return Err(error);
        }
        let hint = error.retry_after().unwrap_or_default().min(BACKOFF.longest);
        tokio::time::sleep(BACKOFF.delay(failures, clock::draw()).max(hint)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_and_stay_within_their_bounds() {
        for (failures, full_ms) in [(1, 100), (2, 200), (3, 400), (6, 3_200), (7, 5_000), (60, 5_000)] {
            let full = Duration::from_millis(full_ms);
            assert_eq!(BACKOFF.delay(failures, 0), full / 2);
            assert_eq!(BACKOFF.delay(failures, u64::MAX), full);
            for draw in (0..100).map(|n| n * (u64::MAX / 100)) {
                let delay = BACKOFF.delay(failures, draw);
                assert!(delay >= full / 2 && delay <= full, "{delay:?}");
            }
        }
    }

    #[test]
    fn a_part_is_never_more_than_the_whole() {
        let whole = Duration::from_secs(8);
        assert_eq!(part(whole, 0), Duration::ZERO);
        assert_eq!(part(whole, u64::MAX), whole);
        assert!(part(whole, u64::MAX / 2) < Duration::from_millis(4_001));
    }

    #[tokio::test]
    async fn a_refusal_is_not_repeated_and_unavailable_is() {
        let mut calls = 0;
        let answer: Result<(), Error> = call(|| {
            calls += 1;
            async { Err(Status::not_found("no such task")) }
        })
        .await;
        assert!(matches!(answer, Err(Error::NotFound { .. })));
        assert_eq!(calls, 1);

        let mut calls = 0;
        let answer: Result<(), Error> = call(|| {
            calls += 1;
            async { Err(Status::unavailable("starting")) }
        })
        .await;
        assert!(matches!(answer, Err(Error::Unavailable { .. })));
        assert_eq!(calls, 4);
    }
}
