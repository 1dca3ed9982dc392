//! Instants as the ledger stores them: whole milliseconds since the Unix epoch.
//!
//! Not a clock: nothing here reads one. Arithmetic saturates, so no input can make it panic or wrap.

use std::fmt;
use std::time::Duration;

/// A stored instant, in whole milliseconds since the Unix epoch.
///
/// What comes back from SQL equals what went in, which a finer type could not promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The Unix epoch.
    pub const EPOCH: Self = Self(0);
    /// Later than any instant the ledger accepts.
    pub const FAR: Self = Self(i64::MAX);

    /// From milliseconds since the Unix epoch.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the Unix epoch.
    #[must_use]
    pub const fn millis(self) -> i64 {
        self.0
    }

    /// Later by `delay`, rounded up to the next millisecond: a wait is never cut short.
    #[must_use]
    pub fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(millis_up(delay)))
    }

    /// Earlier by `span`.
    #[must_use]
    pub fn before(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(millis_up(span)))
    }

    /// From `earlier` until this instant; zero when it is not earlier.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// As a span since the Unix epoch, the time the leaf crates speak; zero before it.
    #[must_use]
    pub fn since_epoch(self) -> Duration {
        self.since(Self::EPOCH)
    }

    /// From a span since the Unix epoch.
    #[must_use]
    pub fn from_epoch(span: Duration) -> Self {
        Self::EPOCH.after(span)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms", self.0)
    }
}

fn millis_up(span: Duration) -> i64 {
    i64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX)
}

/// The time of a decision: one line for everything the ledger measures, one for what calendars say.
///
/// `at` starts as wall time and then follows the monotonic clock, so a lease or a back-off is as long as it says
/// whatever is done to the wall clock. Times that a user named (`run_at`, `deadline`, the end of a block) are wall
/// times; `skew` says how far the wall clock has been set off since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// The ledger's own steady time.
    pub at: Timestamp,
    /// Wall time minus steady time in milliseconds; 0 while they agree to 2 s.
    pub skew: i64,
}

impl Now {
    /// Both lines agree.
    #[must_use]
    pub const fn steady(at: Timestamp) -> Self {
        Self { at, skew: 0 }
    }

    /// The steady instant at which the wall clock will show `wall`.
    #[must_use]
    pub const fn from_wall(self, wall: Timestamp) -> Timestamp {
        Timestamp(wall.0.saturating_sub(self.skew))
    }

    /// What the wall clock shows.
    #[must_use]
    pub const fn wall(self) -> Timestamp {
        Timestamp(self.at.0.saturating_add(self.skew))
    }
}
