//! The only reader of the clocks, and of chance.
//!
//! Steady time starts as wall time and then follows the monotonic clock: whatever is done to the wall clock, a lease is
//! as long as it says. Where the two drift apart by more than 2 s, [`Now::skew`] says by how much, and only times that
//! users named go by the wall clock anew.
//!
//! Where several daemons serve one ledger, all of them go by the clock of its store: see [`Clock::follow`].

use ledger_core::{Now, Timestamp};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Below this, wall and steady time are held to agree.
const SLACK_MS: i64 = 2_000;
/// Below this, another clock is held to agree: it takes so long to be read.
pub(crate) const NOISE_MS: i64 = 100;
/// This clock follows no other.
const ALONE: i64 = i64::MIN;

/// A clock that was started once.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    wall: Timestamp,
    started: Instant,
    /// By how much the followed clock is ahead of steady time that began at `wall`, in ms.
    ahead: &'static AtomicI64,
    /// How far a test has set the wall clock, in ms.
    #[cfg(test)]
    set: &'static AtomicI64,
}

impl Clock {
    /// Starts a clock at what the wall clock shows now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
    pub fn start() -> Self {
        Self {
            wall: wall(),
            started: Instant::now(),
            ahead: Box::leak(Box::new(AtomicI64::new(ALONE))),
            #[cfg(test)]
            set: Box::leak(Box::default()),
        }
    }

    /// Sets the wall clock by so much more, as an operator would.
    #[cfg(test)]
    pub(crate) fn set_wall_by(&self, millis: i64) {
        self.set.fetch_add(millis, Ordering::Relaxed);
    }

    fn wall_now(&self) -> Timestamp {
        let wall = wall();
        #[cfg(test)]
        let wall = Timestamp::from_millis(wall.millis() + self.set.load(Ordering::Relaxed));
        wall
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Now {
        let at = self.wall.after(Duration::from_millis(
            u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        ));
        let ahead = self.ahead.load(Ordering::Relaxed);
        if ahead != ALONE {
            return Now::steady(Timestamp::from_millis(at.millis().saturating_add(ahead)));
        }
        let skew = self.wall_now().millis().saturating_sub(at.millis());
        Now { at, skew: if skew.abs() > SLACK_MS { skew } else { 0 } }
    }

    /// Goes by another clock, which shows `time` now: its time is both steady and wall time. By how much it was set since
    /// it was followed last; none where that is within what reading it takes.
    pub fn follow(&self, time: Timestamp) -> Option<i64> {
        let before = self.ahead.load(Ordering::Relaxed);
        let base = if before == ALONE { 0 } else { before };
        let found = time.millis().saturating_sub(self.now().at.millis());
        if before != ALONE && found.abs() <= NOISE_MS {
            return None;
        }
        self.ahead.store(base.saturating_add(found), Ordering::Relaxed);
        Some(found).filter(|_| before != ALONE)
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

/// Random bits, good for names but not for secrets.
#[must_use]
pub fn dice() -> u64 {
    use std::hash::BuildHasher;
    // Each has a key of its own, from the operating system.
    std::hash::RandomState::new().hash_one(std::process::id())
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
fn wall() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_followed_clock_is_both_times_and_small_differences_are_noise() {
        let clock = Clock::start();
        let base = clock.now().at;
        let day = Duration::from_secs(86_400);
        assert_eq!(clock.follow(base.after(day)), None, "the first look tells nothing of being set");
        let now = clock.now();
        assert!(now.at >= base.after(day) && now.skew == 0);
        assert_eq!(clock.follow(clock.now().at.after(Duration::from_millis(50))), None);
        let set = clock.follow(clock.now().at.before(day)).expect("it was set");
        assert!((-86_400_000 - set).abs() <= NOISE_MS, "{set}");
        assert!(clock.now().at < base.after(day));
    }
}
