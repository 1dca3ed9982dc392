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

use crate::broken::ConfigErrors;
use crate::config::{Config, LONGEST_TOLD};
use crate::snapshot::Probe;
use crate::window::Seen;
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
    /// In half-open, those in flight.
    pub(crate) probes: Vec<Probe>,
    pub(crate) next_slot: u8,
    pub(crate) reopens: u32,
    /// When the present state was entered.
    pub(crate) since: Duration,
    /// When it ends by time: the open period, the longest half-open, the end of an order.
    pub(crate) until: Option<Duration>,
    /// Why it was entered; none at first.
    pub(crate) cause: Option<Cause>,
    /// While closed: when the ramp ends.
    pub(crate) ramp_until: Option<Duration>,
    /// While closed or observing, where the settings have a window and there was a call.
    pub(crate) window: Option<Box<Seen>>,
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
            probes: Vec::new(),
            next_slot: 0,
            reopens: 0,
            since: Duration::ZERO,
            until: None,
            cause: None,
            ramp_until: None,
            window: None,
            order: None,
            stats: Stats::default(),
            last: None,
        })
    }

    /// Asks to make a call.
    ///
    /// Moves can happen here, visible in [`last_transition`](Self::last_transition): an open breaker
    /// whose period is over becomes half-open and this caller gets its first probe; and what
    /// [`tick`](Self::tick) does happens first, without jitter, because no draw is at hand (tick
    /// before to have it).
    ///
    /// # Errors
    ///
    /// A refusal that says why and, where known, when to come back.
    pub fn try_acquire(&mut self, now: Duration) -> Result<Permit, Rejected> {
        self.tick(now, 0);
        match self.state {
            State::Closed | State::Observe => {
                count(&mut self.stats.calls);
                Ok(Permit { epoch: self.epoch, probe: false, slot: 0 })
            }
            State::Disabled => Ok(Permit { epoch: self.epoch, probe: false, slot: 0 }),
            State::Open if self.remaining(now).is_zero() => {
                let until = self.config.longest_half_open().map(|max| now.saturating_add(max));
                self.enter(State::HalfOpen, Cause::OpenElapsed, now, until);
                Ok(self.take_slot(now))
            }
            State::HalfOpen if self.has_slot() => Ok(self.take_slot(now)),
            State::Open => self.refuse(RejectCause::Open, now),
            State::HalfOpen => self.refuse(RejectCause::ProbesInFlight, now),
            State::ForcedOpen => self.refuse(RejectCause::ForcedOpen, now),
        }
    }

    /// Tells how a permitted call ended. `draw` is used up only if this opens the breaker.
    pub fn record(&mut self, permit: Permit, sample: Sample, now: Duration, draw: u64) -> Recorded {
        self.tell(permit, sample, Told::default(), now, draw)
    }

    /// As [`record`](Self::record), with the length of the call by the caller's steady clock: at
    /// `slow_after` and beyond it counts as slow in the window, and a slow success clears no run.
    pub fn record_timed(
        &mut self,
        permit: Permit,
        sample: Sample,
        took: Duration,
        now: Duration,
        draw: u64,
    ) -> Recorded {
        let slow = self.config.slow_after.is_some_and(|after| took >= after);
        self.tell(permit, sample, Told { slow, hint: None }, now, draw)
    }

    /// Tells of a failure whose other side said when to come back: opens until then, at most for 24 h.
    /// A time that is over makes it a failure like others.
    pub fn record_hint(&mut self, permit: Permit, until: Duration, now: Duration, draw: u64) -> Recorded {
        let hint = Some(until.min(now.saturating_add(LONGEST_TOLD))).filter(|until| *until > now);
        self.tell(permit, Sample::Failure, Told { slow: false, hint }, now, draw)
    }

    fn tell(&mut self, permit: Permit, sample: Sample, told: Told, now: Duration, draw: u64) -> Recorded {
        let due = self.tick(now, draw);
        if sample == Sample::Neutral {
            return Recorded { transition: due, ..self.release(permit) };
        }
        let success = sample == Sample::Success;
        if !self.holds(permit) {
            count(if success { &mut self.stats.late_ok } else { &mut self.stats.late_err });
            return Recorded { transition: due, ..Recorded::quiet(Tally::Late) };
        }
        if self.state == State::Disabled {
            return Recorded::quiet(Tally::Uncounted);
        }
        count(if success { &mut self.stats.successes } else { &mut self.stats.failures });
        if self.state == State::HalfOpen {
            return if success {
                self.probe_succeeded(permit, now)
            } else {
                self.probe_failed(told, now, draw)
            };
        }
        let rate = self.count_in_window(now, !success, told.slow);
        if success {
            if !told.slow {
                self.run = 0;
            }
        } else {
            self.run = self.run.saturating_add(1);
        }
        let run = !success && self.run >= self.config.failure_threshold;
        let cause = if run { Some(Cause::FailureRun) } else { rate };
        // The longer of what its own counts and the other side ask for.
        let usual = cause.map(|_| now.saturating_add(self.config.open_period(self.reopens, draw)));
        let hint = told.hint.filter(|hint| usual.is_none_or(|usual| *hint > usual));
        let cause = if hint.is_some() { Some(Cause::ServerHint) } else { cause };
        let Some(cause) = cause else { return Recorded::quiet(Tally::Counted) };
        if self.state == State::Observe {
            // As the opening would have done, so that a long outage is told again and again, not once.
            self.run = 0;
            self.window = None;
            return Recorded { would_open: true, ..Recorded::quiet(Tally::Counted) };
        }
        moved(self.open_told(cause, hint, now, draw))
    }

    /// Counts a call in the window, where there is one, and says which rate it has reached. Judged
    /// only on what could have made it reach one.
    fn count_in_window(&mut self, now: Duration, failed: bool, slow: bool) -> Option<Cause> {
        let window = self.config.window?;
        let seen = self.window.get_or_insert_with(|| Box::new(Seen::new(window)));
        seen.count(window, now, failed, slow);
        if !failed && !slow {
            return None;
        }
        let (calls, failures, slow_calls) = seen.counts(now);
        let reached = |part: u32, rate: f64| f64::from(part) / f64::from(calls) >= rate;
        if calls < window.min_calls() {
            None
        } else if failed && reached(failures, self.config.failure_rate) {
            Some(Cause::FailureRate)
        } else if slow && reached(slow_calls, self.config.slow_rate) {
            Some(Cause::SlowRate)
        } else {
            None
        }
    }

    /// Gives a permit back unused: frees the slot of a probe and does nothing else. The same as
    /// recording [`Sample::Neutral`], for where there is no time at hand.
    pub fn release(&mut self, permit: Permit) -> Recorded {
        if permit.probe && self.holds(permit) {
            self.free_slot(permit);
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
            State::HalfOpen if self.verdict_due(now).is_some() => {
                // As `try_acquire` would find it: open since that moment, perhaps long enough.
                let (at, failed) = self.verdict_due(now).unwrap_or((now, false));
                let reopens = self.reopens.saturating_add(u32::from(failed));
                let until = at.saturating_add(self.config.open_period(reopens, 0));
                match until.saturating_sub(now) {
                    Duration::ZERO => Availability::Probe,
                    wait => Availability::No { retry_after: Some(wait), cause: RejectCause::Open },
                }
            }
            State::HalfOpen if self.has_slot() => Availability::Probe,
            State::HalfOpen => {
                let until = self.first_deadline();
                let retry_after = until.map(|until| until.saturating_sub(now.max(self.since)));
                Availability::No { retry_after, cause: RejectCause::ProbesInFlight }
            }
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

    /// Lets time do its work: ends an order that has expired and a ramp that is over, and opens a
    /// half-open breaker with a probe whose lease ran out, or that came to no verdict: from the moment
    /// that this was due. It does not make an open breaker half-open: only somebody who wants to call does.
    pub fn tick(&mut self, now: Duration, draw: u64) -> Option<Transition> {
        self.follow_clock_back(now);
        if self.order_expired(now) {
            return Some(self.close(Cause::Expired, now));
        }
        if self.ramp_until.is_some_and(|until| now >= until) {
            self.ramp_until = None;
            self.reopens = 0;
        }
        let (at, failed) = self.verdict_due(now)?;
        if failed {
            // A probe that never answers is a failed one, once.
            self.reopens = self.reopens.saturating_add(1);
            return Some(self.open(Cause::ProbeTimedOut, at, draw));
        }
        // Not a reopening: without a verdict there is no news that the other side is still ill.
        Some(self.open(Cause::Inconclusive, at, draw))
    }

    /// When to look again: the end of the open period (a probe is possible), of a probe's lease, of
    /// the longest half-open, of a ramp or of an order ([`tick`](Self::tick)). May lie in the past; then it is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        match self.state {
            State::HalfOpen => self.first_deadline(),
            State::Closed => self.ramp_until,
            _ => self.until,
        }
    }

    /// Opens as if it had failed, for `period` or as long as usual; ends an order. After it the
    /// breaker probes as usual. Whoever calls this keeps who did it, and why.
    pub fn trip(&mut self, period: Option<Duration>, now: Duration, draw: u64) -> Transition {
        self.order = None;
        self.ramp_until = None;
        let until = period.map(|period| now.saturating_add(period.min(LONGEST_TOLD)));
        self.open_told(Cause::Tripped, until, now, draw)
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
        if config.digest() != self.config.digest() {
            // Counts of another window mean something else.
            self.window = None;
        }
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
    pub fn probes_in_flight(&self) -> u32 {
        u32::try_from(self.probes.len()).unwrap_or(u32::MAX)
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

    /// When half-open ends without a verdict; `None` unless half-open, or without a limit.
    #[must_use]
    pub const fn half_open_until(&self) -> Option<Duration> {
        match self.state {
            State::HalfOpen => self.until,
            _ => None,
        }
    }

    /// When the ramp after closing ends; `None` where there is none.
    #[must_use]
    pub const fn ramp_until(&self) -> Option<Duration> {
        self.ramp_until
    }

    /// The part of the usual number of calls in flight that is to be let through now, above 0 to 1: grows
    /// evenly from `ramp_start` to 1 over `ramp_for` after closing.
    #[must_use]
    pub fn ramp_share(&self, now: Duration) -> f64 {
        let Some(until) = self.ramp_until.filter(|until| *until > now) else { return 1.0 };
        let (whole, start) = (self.config.ramp_for.as_secs_f64(), self.config.ramp_start);
        let left = until.saturating_sub(now).as_secs_f64().min(whole);
        if whole > 0.0 { start + (1.0 - start) * (1.0 - left / whole) } else { 1.0 }
    }

    /// [`ramp_share`](Self::ramp_share) of `usual` calls, rounded up, at least 1.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a part of a u32, rounded up"
    )]
    pub fn ramp_limit(&self, usual: u32, now: Duration) -> u32 {
        // Less than any step, and more than what rounding adds to a whole number.
        let part = f64::from(usual) * self.ramp_share(now) - 1e-6;
        (part.ceil() as u32).max(1)
    }

    /// Calls in the window, how many of them failed, how many were slow; `None` without a window.
    #[must_use]
    pub fn window_counts(&self, now: Duration) -> Option<(u32, u32, u32)> {
        self.config.window.map(|_| self.window.as_ref().map_or((0, 0, 0), |seen| seen.counts(now)))
    }

    /// Why the present state was entered; `None` at first.
    #[must_use]
    pub const fn cause(&self) -> Option<Cause> {
        self.cause
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
    fn holds(&self, permit: Permit) -> bool {
        permit.epoch == self.epoch
            && match self.state {
                State::Closed | State::Observe | State::Disabled => !permit.probe,
                // Without its slot, a probe's result is a repetition.
                State::HalfOpen => permit.probe && self.probes.iter().any(|probe| probe.slot == permit.slot),
                State::Open | State::ForcedOpen => false,
            }
    }

    fn probe_succeeded(&mut self, permit: Permit, now: Duration) -> Recorded {
        self.free_slot(permit);
        self.successes = self.successes.saturating_add(1);
        if self.successes < self.config.success_threshold {
            return Recorded::quiet(Tally::Counted);
        }
        let reopens = self.reopens;
        let transition = self.close(Cause::ProbesSucceeded, now);
        if !self.config.ramp_for.is_zero() {
            // A relapse during the ramp is another reopening in a row.
            self.reopens = reopens;
            self.ramp_until = Some(now.saturating_add(self.config.ramp_for));
        }
        moved(transition)
    }

    fn probe_failed(&mut self, told: Told, now: Duration, draw: u64) -> Recorded {
        self.reopens = self.reopens.saturating_add(1);
        let usual = now.saturating_add(self.config.open_period(self.reopens, draw));
        match told.hint.filter(|hint| *hint > usual) {
            Some(hint) => moved(self.open_told(Cause::ServerHint, Some(hint), now, draw)),
            None => moved(self.open(Cause::ProbeFailed, now, draw)),
        }
    }

    fn has_slot(&self) -> bool {
        self.probes.len() < self.config.half_open_permits as usize
    }

    fn take_slot(&mut self, now: Duration) -> Permit {
        // More numbers than slots: one in use is found in a few steps.
        while self.probes.iter().any(|probe| probe.slot == self.next_slot) {
            self.next_slot = self.next_slot.wrapping_add(1);
        }
        let slot = self.next_slot;
        self.next_slot = slot.wrapping_add(1);
        let lease_until = self.config.probe_timeout.map(|lease| now.saturating_add(lease));
        self.probes.push(Probe { slot, lease_until });
        count(&mut self.stats.calls);
        Permit { epoch: self.epoch, probe: true, slot }
    }

    fn free_slot(&mut self, permit: Permit) {
        self.probes.retain(|probe| probe.slot != permit.slot);
    }

    /// The first end of a lease, or of half-open.
    fn first_deadline(&self) -> Option<Duration> {
        self.probes.iter().filter_map(|probe| probe.lease_until).chain(self.until).min()
    }

    /// When half-open should have ended by time, and whether by a lease, if that is over.
    fn verdict_due(&self, now: Duration) -> Option<(Duration, bool)> {
        if self.state != State::HalfOpen {
            return None;
        }
        let at = self.first_deadline().filter(|at| *at <= now)?;
        Some((at, self.probes.iter().any(|probe| probe.lease_until == Some(at))))
    }

    fn refuse(&mut self, cause: RejectCause, now: Duration) -> Result<Permit, Rejected> {
        count(&mut self.stats.rejections);
        Err(Rejected { retry_after: self.retry_after(now), cause, epoch: self.epoch })
    }

    fn open(&mut self, cause: Cause, now: Duration, draw: u64) -> Transition {
        let until = now.saturating_add(self.config.open_period(self.reopens, draw));
        self.enter(State::Open, cause, now, Some(until))
    }

    /// Opens until then, where somebody said until when.
    fn open_told(&mut self, cause: Cause, until: Option<Duration>, now: Duration, draw: u64) -> Transition {
        let transition = self.open(cause, now, draw);
        if let Some(until) = until.filter(|_| matches!(cause, Cause::ServerHint | Cause::Tripped)) {
            self.until = Some(until);
        }
        transition
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
        self.cause = Some(cause);
        self.run = 0;
        self.successes = 0;
        self.probes.clear();
        self.next_slot = 0;
        self.window = None;
        self.ramp_until = None;
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

    /// The end of an order is a point in the calendar, so it is compared as it stands.
    fn order_expired(&self, now: Duration) -> bool {
        self.state.is_ordered() && self.until.is_some_and(|until| now >= until)
    }

    /// Moves periods that lie in the clock's future back to now, keeping their length.
    pub(crate) fn follow_clock_back(&mut self, now: Duration) {
        let back = self.since.saturating_sub(now);
        if back.is_zero() {
            return;
        }
        match self.state {
            State::Open | State::HalfOpen => {
                self.until = self.until.map(|until| until.saturating_sub(back));
                for probe in &mut self.probes {
                    probe.lease_until = probe.lease_until.map(|until| until.saturating_sub(back));
                }
                self.since = now;
            }
            State::Closed if self.ramp_until.is_some() => {
                self.ramp_until = self.ramp_until.map(|until| until.saturating_sub(back));
                self.since = now;
            }
            _ => {}
        }
    }

    /// Cuts what the settings could not have given; lengthens nothing.
    pub(crate) fn fit_period(&mut self, now: Duration) {
        self.follow_clock_back(now);
        let bound = |limit| now.saturating_add(limit);
        match self.state {
            State::Open => {
                // What somebody said may be longer than what the settings give.
                let told = matches!(self.cause, Some(Cause::ServerHint | Cause::Tripped));
                let longest = if told { LONGEST_TOLD } else { self.config.longest_open_period() };
                self.until = Some(self.until.unwrap_or(now).min(bound(longest)));
            }
            State::HalfOpen => {
                let longest = self.config.longest_half_open().map(bound);
                self.until = longest.map(|longest| self.until.unwrap_or(longest).min(longest));
                let lease = self.config.probe_timeout.map(bound);
                for probe in &mut self.probes {
                    probe.lease_until = lease.map(|lease| probe.lease_until.unwrap_or(lease).min(lease));
                }
            }
            State::Closed => {
                let longest = bound(self.config.ramp_for);
                self.ramp_until =
                    self.ramp_until.map(|until| until.min(longest)).filter(|until| *until > now);
            }
            State::ForcedOpen | State::Disabled | State::Observe => {}
        }
        if self.window.is_some() && self.config.window.is_none() {
            self.window = None;
        }
    }
}

/// What else is said of a result.
#[derive(Clone, Copy, Default)]
struct Told {
    slow: bool,
    /// When the other side wants to be asked again.
    hint: Option<Duration>,
}

fn moved(transition: Transition) -> Recorded {
    Recorded { transition: Some(transition), ..Recorded::quiet(Tally::Counted) }
}

fn count(counter: &mut u64) {
    *counter = counter.saturating_add(1);
}
