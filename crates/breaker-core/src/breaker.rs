//! The machine: closed, open, half-open, and what a person may order instead.
//!
//! Not a clock, not a lock, not a store: `now` and every random draw are arguments, sharing is
//! [`Shared`](crate::Shared)'s work, and a [`Snapshot`](crate::Snapshot) is how it becomes a row.
//!
//! Invariants:
//!
//! - Every transition adds one to the epoch and clears run, successes and probes.
//! - A result decides only in the epoch of its permit, and a probe's only while its slot is taken.
//! - Slots in use never underflow, and a permit is given only while fewer than the limit are in use.
//! - An open period never grows after it was set: not by a restore, not by new settings, and not by
//!   a clock that goes back.

use std::time::Duration;

use crate::config::{Config, ConfigErrors};
use crate::words::{
    Availability, Cause, Order, Permit, Recorded, RejectCause, Rejected, Sample, State, Stats, Tally,
    Transition,
};

/// A circuit breaker as a plain value.
///
/// `now` is the time since an epoch of the caller's choosing. It may stand still or run
/// backwards; the breaker then errs towards an early probe, never towards a longer refusal.
///
/// ```
/// use breaker_core::{Breaker, Config, Sample, State};
/// use std::time::Duration;
///
/// let mut breaker = Breaker::new(Config::default())?;
/// let start = Duration::ZERO;
/// for _ in 0..5 {
///     let permit = breaker.try_acquire(start).expect("closed lets through");
///     breaker.record(permit, Sample::Failure, start, 0);
/// }
/// assert_eq!(breaker.state(), State::Open);
///
/// let rejected = breaker.try_acquire(start + Duration::from_secs(20)).unwrap_err();
/// assert_eq!(rejected.retry_after, Some(Duration::from_secs(40)));
///
/// let probe = breaker.try_acquire(start + Duration::from_secs(60)).expect("the period is over");
/// assert!(probe.probe);
/// # Ok::<(), breaker_core::ConfigErrors>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Breaker {
    pub(crate) config: Config,
    pub(crate) state: State,
    pub(crate) epoch: u64,
    pub(crate) run: u32,
    pub(crate) successes: u32,
    pub(crate) probes: u32,
    pub(crate) reopens: u32,
    /// When the present state was entered.
    pub(crate) since: Duration,
    /// When it ends by time: the open period, the longest half-open, the end of an order.
    pub(crate) until: Option<Duration>,
    /// Boxed, since nearly all breakers have none and there may be many of them.
    pub(crate) order: Option<Box<Order>>,
    pub(crate) stats: Stats,
    pub(crate) last: Option<Transition>,
}

impl Breaker {
    /// A closed breaker in epoch 0.
    ///
    /// # Errors
    ///
    /// Every rule that `config` breaks.
    pub fn new(config: Config) -> Result<Self, ConfigErrors> {
        config.validate()?;
        Ok(Self {
            config,
            state: State::Closed,
            epoch: 0,
            run: 0,
            successes: 0,
            probes: 0,
            reopens: 0,
            since: Duration::ZERO,
            until: None,
            order: None,
            stats: Stats::default(),
            last: None,
        })
    }

    /// Asks to make a call.
    ///
    /// Three moves can happen here, visible in [`last_transition`](Self::last_transition): an
    /// open breaker whose period is over becomes half-open and this caller gets probe 1; an
    /// order that has ended gives way to closed; and half-open past its longest opens again,
    /// without jitter, because no draw is at hand ([`tick`](Self::tick) first to have it).
    ///
    /// # Errors
    ///
    /// A refusal that says why and, where known, when to come back.
    pub fn try_acquire(&mut self, now: Duration) -> Result<Permit, Rejected> {
        self.tick(now, 0);
        match self.state {
            State::Closed | State::Observe => {
                count(&mut self.stats.calls);
                Ok(Permit { epoch: self.epoch, probe: false })
            }
            State::Disabled => Ok(Permit { epoch: self.epoch, probe: false }),
            State::Open if self.remaining(now).is_zero() => {
                let until = self.config.half_open_max.map(|max| now.saturating_add(max));
                self.enter(State::HalfOpen, Cause::OpenElapsed, now, until);
                Ok(self.take_slot())
            }
            State::HalfOpen if self.probes < self.config.half_open_permits => Ok(self.take_slot()),
            State::Open => self.refuse(RejectCause::Open, now),
            State::HalfOpen => self.refuse(RejectCause::ProbesInFlight, now),
            State::ForcedOpen => self.refuse(RejectCause::ForcedOpen, now),
        }
    }

    /// Tells how a permitted call ended. `draw` is used up only if this opens the breaker.
    pub fn record(&mut self, permit: Permit, sample: Sample, now: Duration, draw: u64) -> Recorded {
        if sample == Sample::Neutral {
            return self.release(permit);
        }
        let success = sample == Sample::Success;
        if !self.holds(permit) {
            count(if success { &mut self.stats.late_ok } else { &mut self.stats.late_err });
            return Recorded::quiet(Tally::Late);
        }
        if self.state == State::Disabled {
            return Recorded::quiet(Tally::Uncounted);
        }
        count(if success { &mut self.stats.successes } else { &mut self.stats.failures });
        match (self.state, success) {
            (State::HalfOpen, true) => self.probe_succeeded(now),
            (State::HalfOpen, false) => {
                self.reopens = self.reopens.saturating_add(1);
                moved(self.open(Cause::ProbeFailed, now, draw))
            }
            (_, true) => {
                self.run = 0;
                Recorded::quiet(Tally::Counted)
            }
            (_, false) => self.call_failed(now, draw),
        }
    }

    /// Gives a permit back unused: frees the slot of a probe and does nothing else. The same as
    /// recording [`Sample::Neutral`], for where there is no time at hand.
    pub fn release(&mut self, permit: Permit) -> Recorded {
        if permit.probe && self.holds(permit) {
            self.probes -= 1;
        }
        Recorded::quiet(Tally::Uncounted)
    }

    /// Looks without taking a permit or moving.
    #[must_use]
    pub fn is_available(&self, now: Duration) -> Availability {
        match self.state {
            State::Closed | State::Disabled | State::Observe => Availability::Yes,
            State::Open => match self.remaining(now) {
                Duration::ZERO => Availability::Probe,
                wait => Availability::No { retry_after: Some(wait), cause: RejectCause::Open },
            },
            // What `try_acquire` would do there: open, and refuse.
            State::HalfOpen if self.inconclusive(now) => Availability::No {
                retry_after: Some(self.config.open_period(self.reopens, 0)),
                cause: RejectCause::Open,
            },
            State::HalfOpen if self.probes < self.config.half_open_permits => Availability::Probe,
            State::HalfOpen => Availability::No { retry_after: None, cause: RejectCause::ProbesInFlight },
            State::ForcedOpen if self.order_expired(now) => Availability::Yes,
            State::ForcedOpen => Availability::No {
                retry_after: self.until.map(|until| until.saturating_sub(now)),
                cause: RejectCause::ForcedOpen,
            },
        }
    }

    /// How long a call would have to wait; `None` when it would get a permit now, or when nobody can know.
    #[must_use]
    pub fn retry_after(&self, now: Duration) -> Option<Duration> {
        match self.is_available(now) {
            Availability::No { retry_after, .. } => retry_after,
            Availability::Yes | Availability::Probe => None,
        }
    }

    /// Lets time do its work: ends an order that has expired, and opens a half-open breaker that came
    /// to no verdict. It does not make an open breaker half-open: only somebody who wants to call does.
    pub fn tick(&mut self, now: Duration, draw: u64) -> Option<Transition> {
        self.follow_clock_back(now);
        if self.order_expired(now) {
            return Some(self.close(Cause::Expired, now));
        }
        // Not a reopening: without a verdict there is no news that the other side is still ill.
        self.inconclusive(now).then(|| self.open(Cause::Inconclusive, now, draw))
    }

    /// When to look again: the end of the open period (a probe is possible), of the longest
    /// half-open or of an order ([`tick`](Self::tick)). May lie in the past; then it is due.
    #[must_use]
    pub const fn next_deadline(&self) -> Option<Duration> {
        self.until
    }

    /// Closed, all counts 0, whatever the state. Calls in flight become late.
    pub fn reset(&mut self, now: Duration) -> Transition {
        self.close(Cause::Reset, now)
    }

    /// Refuses every call until told otherwise or until `until`.
    pub fn force_open(
        &mut self,
        actor: impl Into<String>,
        reason: impl Into<String>,
        until: Option<Duration>,
        now: Duration,
    ) -> Transition {
        self.obey(State::ForcedOpen, Order { actor: actor.into(), reason: reason.into() }, until, now)
    }

    /// Lets every call through and counts nothing.
    pub fn disable(
        &mut self,
        actor: impl Into<String>,
        reason: impl Into<String>,
        until: Option<Duration>,
        now: Duration,
    ) -> Transition {
        self.obey(State::Disabled, Order { actor: actor.into(), reason: reason.into() }, until, now)
    }

    /// Lets every call through, counts, and says when it would have opened.
    pub fn observe(
        &mut self,
        actor: impl Into<String>,
        reason: impl Into<String>,
        until: Option<Duration>,
        now: Duration,
    ) -> Transition {
        self.obey(State::Observe, Order { actor: actor.into(), reason: reason.into() }, until, now)
    }

    /// Ends an order: closed, all counts 0. Does nothing where none is in force.
    pub fn auto(&mut self, now: Duration) -> Option<Transition> {
        self.state.is_ordered().then(|| self.close(Cause::Auto, now))
    }

    /// New settings for a live breaker. State, counts and epoch stay; the end of an open period
    /// stays too, unless the new settings could never give one that long, when it is cut.
    ///
    /// # Errors
    ///
    /// Every rule that `config` breaks; the old settings then stay.
    pub fn set_config(&mut self, config: Config, now: Duration) -> Result<(), ConfigErrors> {
        config.validate()?;
        self.config = config;
        self.fit_period(now);
        Ok(())
    }

    /// The settings.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// The state, as of the last event; time alone is let in by [`tick`](Self::tick).
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// The number of transitions so far, the fence of every permit.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Consecutive failures, in closed and observe.
    #[must_use]
    pub const fn run(&self) -> u32 {
        self.run
    }

    /// Consecutive probe successes, in half-open.
    #[must_use]
    pub const fn successes(&self) -> u32 {
        self.successes
    }

    /// Slots in use, in half-open.
    #[must_use]
    pub const fn probes_in_flight(&self) -> u32 {
        self.probes
    }

    /// Half-open periods in a row that ended with a failed probe.
    #[must_use]
    pub const fn reopens(&self) -> u32 {
        self.reopens
    }

    /// When the present state was entered.
    #[must_use]
    pub const fn since(&self) -> Duration {
        self.since
    }

    /// When the open period ends; `None` unless open.
    #[must_use]
    pub const fn open_until(&self) -> Option<Duration> {
        match self.state {
            State::Open => self.until,
            _ => None,
        }
    }

    /// Who ordered the present state; `None` unless it is an ordered one.
    #[must_use]
    pub fn order(&self) -> Option<&Order> {
        self.order.as_deref()
    }

    /// What it has seen.
    #[must_use]
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// The newest transition since this value was made or restored. Its epoch tells whether a call
    /// to [`try_acquire`](Self::try_acquire) caused it.
    #[must_use]
    pub const fn last_transition(&self) -> Option<Transition> {
        self.last
    }

    /// Whether a result with this permit may decide anything now.
    const fn holds(&self, permit: Permit) -> bool {
        permit.epoch == self.epoch
            && match self.state {
                State::Closed | State::Observe | State::Disabled => !permit.probe,
                // Without a slot in use, a probe's result is a repetition.
                State::HalfOpen => permit.probe && self.probes > 0,
                State::Open | State::ForcedOpen => false,
            }
    }

    fn call_failed(&mut self, now: Duration, draw: u64) -> Recorded {
        self.run = self.run.saturating_add(1);
        if self.run < self.config.failure_threshold {
            return Recorded::quiet(Tally::Counted);
        }
        if self.state == State::Observe {
            // As the opening would have done, so that a long outage is told again and again, not once.
            self.run = 0;
            return Recorded { would_open: true, ..Recorded::quiet(Tally::Counted) };
        }
        moved(self.open(Cause::FailureRun, now, draw))
    }

    fn probe_succeeded(&mut self, now: Duration) -> Recorded {
        self.probes -= 1;
        self.successes = self.successes.saturating_add(1);
        if self.successes < self.config.success_threshold {
            return Recorded::quiet(Tally::Counted);
        }
        moved(self.close(Cause::ProbesSucceeded, now))
    }

    fn take_slot(&mut self) -> Permit {
        self.probes += 1;
        count(&mut self.stats.calls);
        Permit { epoch: self.epoch, probe: true }
    }

    fn refuse(&mut self, cause: RejectCause, now: Duration) -> Result<Permit, Rejected> {
        count(&mut self.stats.rejections);
        Err(Rejected { retry_after: self.retry_after(now), cause, epoch: self.epoch })
    }

    fn open(&mut self, cause: Cause, now: Duration, draw: u64) -> Transition {
        let until = now.saturating_add(self.config.open_period(self.reopens, draw));
        self.enter(State::Open, cause, now, Some(until))
    }

    fn close(&mut self, cause: Cause, now: Duration) -> Transition {
        self.reopens = 0;
        self.order = None;
        self.enter(State::Closed, cause, now, None)
    }

    fn obey(&mut self, state: State, order: Order, until: Option<Duration>, now: Duration) -> Transition {
        self.reopens = 0;
        self.order = Some(Box::new(order));
        self.enter(state, Cause::Ordered, now, until)
    }

    fn enter(&mut self, to: State, cause: Cause, now: Duration, until: Option<Duration>) -> Transition {
        // Wraps rather than panics at a restored u64::MAX: epochs are compared for equality only.
        self.epoch = self.epoch.wrapping_add(1);
        let transition = Transition { from: self.state, to, cause, epoch: self.epoch };
        self.state = to;
        self.run = 0;
        self.successes = 0;
        self.probes = 0;
        self.since = now;
        self.until = until;
        count(&mut self.stats.transitions);
        self.last = Some(transition);
        transition
    }

    /// What is left of a period of the machine's own (open, half-open). Where the clock stands
    /// before the period's beginning it went back, and the whole period is left, not more.
    pub(crate) fn remaining(&self, now: Duration) -> Duration {
        self.until.map_or(Duration::ZERO, |until| until.saturating_sub(now.max(self.since)))
    }

    fn inconclusive(&self, now: Duration) -> bool {
        self.state == State::HalfOpen && self.until.is_some() && self.remaining(now).is_zero()
    }

    /// The end of an order is a point in the calendar, so it is compared as it stands.
    fn order_expired(&self, now: Duration) -> bool {
        self.state.is_ordered() && self.until.is_some_and(|until| now >= until)
    }

    /// Moves a period that lies in the clock's future back to now, keeping its length.
    pub(crate) fn follow_clock_back(&mut self, now: Duration) {
        if now < self.since && matches!(self.state, State::Open | State::HalfOpen) {
            let remaining = self.remaining(now);
            self.until = self.until.map(|_| now.saturating_add(remaining));
            self.since = now;
        }
    }

    /// Cuts what the settings could not have given; lengthens nothing.
    pub(crate) fn fit_period(&mut self, now: Duration) {
        self.follow_clock_back(now);
        let bound = |limit| now.saturating_add(limit);
        match self.state {
            State::Open => {
                let longest = bound(self.config.longest_open_period());
                self.until = Some(self.until.unwrap_or(now).min(longest));
            }
            State::HalfOpen => {
                let longest = self.config.half_open_max.map(bound);
                self.until = longest.map(|longest| self.until.unwrap_or(longest).min(longest));
            }
            State::Closed | State::ForcedOpen | State::Disabled | State::Observe => {}
        }
    }
}

fn moved(transition: Transition) -> Recorded {
    Recorded { transition: Some(transition), ..Recorded::quiet(Tally::Counted) }
}

fn count(counter: &mut u64) {
    *counter = counter.saturating_add(1);
}
