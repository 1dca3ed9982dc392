//! The only reader of the clocks.
//!
//! Steady time starts as wall time and then follows the monotonic clock: whatever is done to the wall clock, a lease is
//! as long as it says. Where the two drift apart by more than 2 s, [`Now::skew`] says by how much, and only times that
//! users named go by the wall clock anew.

use ledger_core::{Now, Timestamp};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Below this, wall and steady time are held to agree.
const SLACK_MS: i64 = 2_000;

/// A clock that was started once.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    wall: Timestamp,
    started: Instant,
    /// How far a test has set the wall clock, in ms.
    #[cfg(test)]
    set: &'static std::sync::atomic::AtomicI64,
}

impl Clock {
    /// Starts a clock at what the wall clock shows now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
    pub fn start() -> Self {
        Self {
            wall: wall(),
            started: Instant::now(),
            #[cfg(test)]
            set: Box::leak(Box::default()),
        }
    }

    /// Sets the wall clock by so much more, as an operator would.
    #[cfg(test)]
    pub(crate) fn set_wall_by(&self, millis: i64) {
        self.set.fetch_add(millis, std::sync::atomic::Ordering::Relaxed);
    }

    fn wall_now(&self) -> Timestamp {
        let wall = wall();
        #[cfg(test)]
        let wall =
            Timestamp::from_millis(wall.millis() + self.set.load(std::sync::atomic::Ordering::Relaxed));
        wall
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Now {
        let at = self.wall.after(Duration::from_millis(
            u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        ));
        let skew = self.wall_now().millis().saturating_sub(at.millis());
        Now { at, skew: if skew.abs() > SLACK_MS { skew } else { 0 } }
    }

    /// The instant of the async runtime at which steady time reaches `at`.
    #[must_use]
    pub fn instant(&self, at: Timestamp) -> tokio::time::Instant {
        let ahead = at.since(self.now().at);
        // A year is longer than any process waits for one timer, and adding it never overflows.
        tokio::time::Instant::now() + ahead.min(Duration::from_secs(366 * 24 * 3_600))
    }

    /// Since the clock was started.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
fn wall() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
