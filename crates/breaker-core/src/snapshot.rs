//! A breaker as a row, and back.
//!
//! Not a format: the fields are plain and public, and whoever stores them chooses the columns. The
//! settings are not among them; they belong to whoever configures.
//!
//! Invariants: taking a snapshot and restoring it changes nothing that decides, and a restore never
//! makes an open period longer than it was, whatever the clock did meanwhile.

use std::sync::Arc;
use std::time::Duration;

use crate::breaker::Breaker;
use crate::broken::ConfigErrors;
use crate::config::Config;
use crate::window::Seen;
use crate::words::{Cause, Order, State, Stats};

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
    /// Probes in flight, in half-open.
    pub probes: Vec<Probe>,
    /// Half-open periods in a row that ended with a failed probe.
    pub reopens: u32,
    /// When the state was entered. Beside `until` it tells how long the period was.
    pub since: Duration,
    /// When the state ends by time: the open period, the longest half-open, the end of an order.
    pub until: Option<Duration>,
    /// Why the state was entered; none at first, and from version 1.
    pub cause: Option<Cause>,
    /// While closed: when the ramp ends.
    pub ramp_until: Option<Duration>,
    /// Counts of the window; empty where there are none.
    pub window: Vec<u8>,
    /// What the counts mean ([`Config::digest`]): others are dropped.
    pub digest: u64,
    /// Who ordered the state, and why.
    pub order: Option<Order>,
    /// What it has seen. A caller who does not store this passes the default.
    pub stats: Stats,
}

/// A probe in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Which slot it has.
    pub slot: u8,
    /// When it counts as failed; none where probes have no lease.
    pub lease_until: Option<Duration>,
}

impl Snapshot {
    /// The version that [`Breaker::snapshot`] writes. Version 1 had neither slots nor a window, a
    /// ramp or a cause.
    pub const VERSION: u32 = 2;
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
            probes: self.aside.probes().to_vec(),
            reopens: self.reopens,
            since: self.since,
            until: if self.state == State::Closed { None } else { self.until() },
            cause: self.cause,
            ramp_until: self.ramp_until(),
            window: self.aside.window().map(|seen| seen.encode()).unwrap_or_default(),
            digest: self.config.digest(),
            order: self.aside.order().cloned(),
            stats: self.stats,
        }
    }

    /// The breaker that `snapshot` was taken of, with the settings of today.
    ///
    /// Open stays open for clamp(`until` − `now`, 0, the longest period of `config`), and no
    /// longer than the period was when it began, in case the clock went back. Half-open stays
    /// half-open with its probes in flight, and a ramp goes on. The counts of a window are kept where
    /// today's settings mean the same by them. No transition happens.
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
    pub fn restore(
        snapshot: Snapshot,
        config: impl Into<Arc<Config>>,
        now: Duration,
    ) -> Result<Self, ConfigErrors> {
        let config = config.into();
        let mut breaker = Self::new(Arc::clone(&config))?;
        breaker.state = snapshot.state;
        breaker.epoch = snapshot.epoch;
        breaker.run = snapshot.run;
        breaker.successes = snapshot.successes;
        breaker.aside.set_probes(snapshot.probes);
        breaker.cause = snapshot.cause;
        let window = config
            .window
            .filter(|_| snapshot.digest == config.digest() && snapshot.version <= Snapshot::VERSION)
            .and_then(|window| Seen::decode(window, &snapshot.window));
        if let Some(seen) = window {
            breaker.aside.set_window(seen);
        }
        breaker.reopens = snapshot.reopens;
        breaker.since = snapshot.since;
        breaker.set_until(if snapshot.state == State::Closed { snapshot.ramp_until } else { snapshot.until });
        if let Some(order) = snapshot.order.filter(|_| snapshot.state.is_ordered()) {
            breaker.aside.set_order(order);
        }
        breaker.stats = snapshot.stats;
        breaker.fit_period(now);
        Ok(breaker)
    }
}
