//! The only reader of the clocks, and of chance.
//!
//! Steady time starts as wall time and then follows the monotonic clock: whatever is done to the wall clock, a lease is
//! as long as it says. Where the two drift apart by more than 2 s, [`Now::skew`] says by how much, and only times that
//! users named go by the wall clock anew. It never runs back, not even from one process to the next: see [`Clock::go_on_from`].
//!
//! Where several daemons serve one ledger, all of them go by the clock of its store: see [`Clock::follow`].

use ledger_core::{Now, Timestamp};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Below this, wall and steady time are held to agree.
const SLACK_MS: i64 = 2_000;
/// Below this, another clock is held to agree: it takes so long to be read.
pub(crate) const NOISE_MS: i64 = 100;

/// A clock that was started once.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    wall: Timestamp,
    started: Instant,
    /// By how much steady time is ahead of one that began at `wall`, in ms.
    ahead: &'static AtomicI64,
    /// It goes by another clock.
    follows: &'static AtomicBool,
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
            ahead: Box::leak(Box::default()),
            follows: Box::leak(Box::default()),
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
        let at = Timestamp::from_millis(at.millis().saturating_add(self.ahead.load(Ordering::Relaxed)));
        if self.follows.load(Ordering::Relaxed) {
            return Now::steady(at);
        }
        let skew = self.wall_now().millis().saturating_sub(at.millis());
        Now { at, skew: if skew.abs() > SLACK_MS { skew } else { 0 } }
    }

    /// Goes by another clock, which shows `time` now: its time is both steady and wall time. By how much it was set since
    /// it was followed last; none where that is within what reading it takes.
    pub fn follow(&self, time: Timestamp) -> Option<i64> {
        let followed = self.follows.swap(true, Ordering::Relaxed);
        let found = time.millis().saturating_sub(self.now().at.millis());
        if followed && found.abs() <= NOISE_MS {
            return None;
        }
        self.ahead.fetch_add(found, Ordering::Relaxed);
        Some(found).filter(|_| followed)
    }

    /// Goes on from `stored`, the newest instant in the ledger, where it is not that far yet: the wall clock was set back
    /// while nobody served. What is measured is then as long as it says, and the rest goes by the wall clock, as when it is
    /// set while somebody serves. By how much it was behind; none where it was not.
    pub fn go_on_from(&self, stored: Timestamp) -> Option<Duration> {
        let behind = stored.since(self.now().at);
        self.ahead.fetch_add(i64::try_from(behind.as_millis()).unwrap_or(i64::MAX), Ordering::Relaxed);
        Some(behind).filter(|behind| !behind.is_zero())
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

    #[test]
    fn steady_time_goes_on_from_what_is_stored_and_the_wall_clock_stays() {
        let clock = Clock::start();
        let base = clock.now().at;
        let hour = Duration::from_secs(3_600);
        assert_eq!(clock.go_on_from(base.before(hour)), None);
        assert!(clock.now().at < base.after(hour) && clock.now().skew == 0);
        let behind = clock.go_on_from(base.after(hour)).expect("it is not that far");
        assert!(behind <= hour);
        let now = clock.now();
        assert!(now.at >= base.after(hour));
        assert!(now.wall() >= base && now.wall() < base.after(hour), "{now:?}");
        assert_eq!(clock.go_on_from(base.after(hour)), None, "it is now");
    }
}
