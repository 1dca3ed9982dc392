//! A breaker as a row, and back.
//!
//! Not a format: the fields are plain and public, and whoever stores them chooses the columns. The
//! settings are not among them; they belong to whoever configures.
//!
//! Invariants: taking a snapshot and restoring it changes nothing that decides, and a restore never
//! makes an open period longer than it was, whatever the clock did meanwhile.

use std::time::Duration;

use crate::breaker::Breaker;
use crate::config::{Config, ConfigErrors};
use crate::words::{Order, State, Stats};

/// Everything about a [`Breaker`] but its settings.
///
/// The times are those that `now` gave, so they outlive the process exactly if that clock does:
/// time since 1970 does, time since start does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The meaning of the fields, [`Snapshot::VERSION`] when taken. State, counts and times are
    /// kept from any version.
    pub version: u32,
    /// The state.
    pub state: State,
    /// The number of transitions so far.
    pub epoch: u64,
    /// Consecutive failures, in closed and observe.
    pub run: u32,
    /// Consecutive probe successes, in half-open.
    pub successes: u32,
    /// Slots in use, in half-open.
    pub probes_in_flight: u32,
    /// Half-open periods in a row that ended with a failed probe.
    pub reopens: u32,
    /// When the state was entered. Beside `until` it tells how long the period was.
    pub since: Duration,
    /// When the state ends by time: the open period, the longest half-open, the end of an order.
    pub until: Option<Duration>,
    /// Who ordered the state, and why.
    pub order: Option<Order>,
    /// What it has seen. A caller who does not store this passes the default.
    pub stats: Stats,
}

impl Snapshot {
    /// The version that [`Breaker::snapshot`] writes.
    pub const VERSION: u32 = 1;
}

impl Breaker {
    /// All that a restart must not lose.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            version: Snapshot::VERSION,
            state: self.state,
            epoch: self.epoch,
            run: self.run,
            successes: self.successes,
            probes_in_flight: self.probes,
            reopens: self.reopens,
            since: self.since,
            until: self.until,
            order: self.order.as_deref().cloned(),
            stats: self.stats,
        }
    }

    /// The breaker that `snapshot` was taken of, with the settings of today.
    ///
    /// Open stays open for clamp(`until` − `now`, 0, the longest period of `config`), and no
    /// longer than the period was when it began, in case the clock went back. Half-open stays
    /// half-open with its probes in flight. No transition happens.
    ///
    /// ```
    /// use breaker_core::{Breaker, Config, Sample};
    /// use std::time::Duration;
    ///
    /// let config = Config { failure_threshold: 1, ..Config::default() };
    /// let mut before = Breaker::new(config)?;
    /// let permit = before.try_acquire(Duration::from_secs(1_000)).unwrap();
    /// before.record(permit, Sample::Failure, Duration::from_secs(1_000), 0);
    ///
    /// // Half a minute later, in another process:
    /// let after = Breaker::restore(before.snapshot(), config, Duration::from_secs(1_030))?;
    /// assert_eq!(after.retry_after(Duration::from_secs(1_030)), Some(Duration::from_secs(30)));
    /// # Ok::<(), breaker_core::ConfigErrors>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Every rule that `config` breaks. Nothing in a snapshot is an error: a row that contradicts
    /// itself gives a breaker that ends its period at once.
    pub fn restore(snapshot: Snapshot, config: Config, now: Duration) -> Result<Self, ConfigErrors> {
        let mut breaker = Self::new(config)?;
        breaker.state = snapshot.state;
        breaker.epoch = snapshot.epoch;
        breaker.run = snapshot.run;
        breaker.successes = snapshot.successes;
        breaker.probes = snapshot.probes_in_flight;
        breaker.reopens = snapshot.reopens;
        breaker.since = snapshot.since;
        breaker.until = if snapshot.state == State::Closed { None } else { snapshot.until };
        breaker.order = snapshot.order.filter(|_| snapshot.state.is_ordered()).map(Box::new);
        breaker.stats = snapshot.stats;
        breaker.fit_period(now);
        Ok(breaker)
    }
}
