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
//! - `lane` follows from `state`, `until` and the settings; whoever changes one of them sets `until` anew.

use std::sync::Arc;
use std::time::Duration;

use crate::aside::Aside;
use crate::broken::ConfigErrors;
use crate::config::{Config, LONGEST_TOLD};
use crate::snapshot::Probe;
use crate::span;
use crate::words::{Cause, Permit, Recorded, RejectCause, Rejected, Sample, State, Stats, Tally, Transition};

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
///
/// 128 bytes, and its settings, which breakers can share: give each the same `Arc`.
#[derive(Clone, Debug, PartialEq)]
pub struct Breaker {
    pub(crate) config: Arc<Config>,
    pub(crate) epoch: u64,
    pub(crate) stats: Stats,
    /// When the present state was entered.
    pub(crate) since: Duration,
    /// When it ends by time, as far as `lane` says that it does: see [`until`](Self::until).
    until: Duration,
    /// Probes, window and order: most breakers have none of them, and there may be very many breakers.
    pub(crate) aside: Aside,
    pub(crate) run: u32,
    pub(crate) successes: u32,
    pub(crate) reopens: u32,
    pub(crate) state: State,
    /// Why it was entered; none at first.
    pub(crate) cause: Option<Cause>,
    /// What it was entered from, since this value was made or restored.
    pub(crate) from: Option<State>,
    pub(crate) lane: Lane,
}

/// There may be very many of them.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Breaker>() <= 128);

/// How much there is to think about: one byte that the common calls ask first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Closed, without a ramp or a window: time changes nothing, and a success clears the run.
    Plain,
    /// The same with a window.
    Windowed,
    /// Open.
    Open,
    /// Anything else that ends by time.
    Timed,
    /// Anything else that does not.
    Untimed,
}

impl Breaker {
    /// A closed breaker in epoch 0.
    ///
    /// # Errors
    ///
    /// Every rule that `config` breaks.
    pub fn new(config: impl Into<Arc<Config>>) -> Result<Self, ConfigErrors> {
        let config = config.into();
        config.validate()?;
        let mut breaker = Self {
            config,
            epoch: 0,
            stats: Stats::default(),
            since: Duration::ZERO,
            until: Duration::ZERO,
            aside: Aside::default(),
            run: 0,
            successes: 0,
            reopens: 0,
            state: State::Closed,
            cause: None,
            from: None,
            lane: Lane::Untimed,
        };
        breaker.set_until(None);
        Ok(breaker)
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
    #[inline(always)]
    pub fn try_acquire(&mut self, now: Duration) -> Result<Permit, Rejected> {
        if self.is_simply_closed() {
            count(&mut self.stats.calls);
            return Ok(Permit { epoch: self.epoch, probe: false, slot: 0 });
        }
        if self.lane == Lane::Open
            && let Some(wait) = span::clearly_left(self.since, self.until, now)
        {
            return self.refuse_open(wait);
        }
        self.acquire_thinking(now)
    }

    #[inline(never)]
    fn acquire_thinking(&mut self, now: Duration) -> Result<Permit, Rejected> {
        if self.lane == Lane::Open
            && span::reached(self.since, now)
            && let Some(wait) = span::left(self.until, now)
        {
            return self.refuse_open(wait);
        }
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
    #[inline(always)]
    pub fn record(&mut self, permit: Permit, sample: Sample, now: Duration, draw: u64) -> Recorded {
        if sample == Sample::Success && self.is_clean(permit) {
            return self.clean_success();
        }
        self.tell_of_call(permit, sample, false, now, draw)
    }

    /// As [`record`](Self::record), with the length of the call by the caller's steady clock: at
    /// `slow_after` and beyond it counts as slow in the window, and a slow success clears no run.
    #[inline(always)]
    pub fn record_timed(
        &mut self,
        permit: Permit,
        sample: Sample,
        took: Duration,
        now: Duration,
        draw: u64,
    ) -> Recorded {
        // Without a window nothing is slow.
        if sample == Sample::Success && self.is_clean(permit) {
            return self.clean_success();
        }
        let slow = self.config.slow_after.is_some_and(|after| took >= after);
        self.tell_of_call(permit, sample, slow, now, draw)
    }

    /// Tells of a failure whose other side said when to come back: opens until then, at most for 24 h.
    /// A time that is over makes it a failure like others.
    pub fn record_hint(&mut self, permit: Permit, until: Duration, now: Duration, draw: u64) -> Recorded {
        let hint = Some(until.min(now.saturating_add(LONGEST_TOLD))).filter(|until| *until > now);
        self.tell(permit, Sample::Failure, Told { slow: false, hint }, now, draw)
    }

    #[inline(never)]
    fn tell_of_call(
        &mut self,
        permit: Permit,
        sample: Sample,
        slow: bool,
        now: Duration,
        draw: u64,
    ) -> Recorded {
        if self.is_simply_closed() && permit.epoch == self.epoch && !permit.probe && sample != Sample::Neutral
        {
            return self.count_closed(sample == Sample::Failure, slow, now, draw);
        }
        self.tell(permit, sample, Told { slow, hint: None }, now, draw)
    }

    /// A success or failure that counts, while closed or observing.
    #[inline]
    fn count_closed(&mut self, failed: bool, slow: bool, now: Duration, draw: u64) -> Recorded {
        match self.count_call(failed, slow, now) {
            None => Recorded::quiet(Tally::Counted),
            cause => self.enough(cause, None, now, draw),
        }
    }

    /// Counts it, and says what it makes reach its limit.
    #[inline]
    fn count_call(&mut self, failed: bool, slow: bool, now: Duration) -> Option<Cause> {
        count(if failed { &mut self.stats.failures } else { &mut self.stats.successes });
        let rate = self.count_in_window(now, failed, slow);
        if failed {
            self.run = self.run.saturating_add(1);
            if self.run >= self.config.failure_threshold {
                return Some(Cause::FailureRun);
            }
        } else if !slow {
            self.run = 0;
        }
        rate
    }

    #[inline(never)]
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
        if self.state == State::HalfOpen {
            count(if success { &mut self.stats.successes } else { &mut self.stats.failures });
            return if success {
                self.probe_succeeded(permit, now)
            } else {
                self.probe_failed(told, now, draw)
            };
        }
        match (self.count_call(!success, told.slow, now), told.hint) {
            (None, None) => Recorded::quiet(Tally::Counted),
            (cause, hint) => self.enough(cause, hint, now, draw),
        }
    }

    /// Its own counts say that it is enough (`cause`), or the other side says so (`hint`).
    #[cold]
    fn enough(&mut self, cause: Option<Cause>, hint: Option<Duration>, now: Duration, draw: u64) -> Recorded {
        // The longer of what the two ask for.
        let usual = cause.map(|_| now.saturating_add(self.config.open_period(self.reopens, draw)));
        let hint = hint.filter(|hint| usual.is_none_or(|usual| *hint > usual));
        let cause = if hint.is_some() { Some(Cause::ServerHint) } else { cause };
        let Some(cause) = cause else { return Recorded::quiet(Tally::Counted) };
        if self.state == State::Observe {
            // As the opening would have done, so that a long outage is told again and again, not once.
            self.run = 0;
            self.aside.drop_window();
            return Recorded { would_open: true, ..Recorded::quiet(Tally::Counted) };
        }
        moved(self.open_told(cause, hint, now, draw))
    }

    /// Counts a call in the window, where there is one, and says which rate it has reached. Judged
    /// only on what could have made it reach one.
    #[inline]
    fn count_in_window(&mut self, now: Duration, failed: bool, slow: bool) -> Option<Cause> {
        if self.lane == Lane::Plain {
            return None;
        }
        let window = self.config.window?;
        let seen = self.aside.window_or_new(window);
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
            self.aside.free_slot(permit.slot);
        }
        Recorded::quiet(Tally::Uncounted)
    }

    /// Lets time do its work: ends an order that has expired and a ramp that is over, and opens a
    /// half-open breaker with a probe whose lease ran out, or that came to no verdict: from the moment
    /// that this was due. It does not make an open breaker half-open: only somebody who wants to call does.
    pub fn tick(&mut self, now: Duration, draw: u64) -> Option<Transition> {
        self.follow_clock_back(now);
        if self.order_expired(now) {
            return Some(self.close(Cause::Expired, now));
        }
        if self.ramp_until().is_some_and(|until| now >= until) {
            self.set_until(None);
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

    /// Whether it lets everything through and time alone changes nothing.
    #[inline]
    fn is_simply_closed(&self) -> bool {
        matches!(self.lane, Lane::Plain | Lane::Windowed)
    }

    /// Whether a success with this permit only clears the run.
    #[inline]
    fn is_clean(&self, permit: Permit) -> bool {
        self.lane == Lane::Plain && permit.epoch == self.epoch && !permit.probe
    }

    #[inline]
    fn refuse_open(&mut self, wait: Duration) -> Result<Permit, Rejected> {
        count(&mut self.stats.rejections);
        Err(Rejected { retry_after: Some(wait), cause: RejectCause::Open, epoch: self.epoch })
    }

    #[inline]
    fn clean_success(&mut self) -> Recorded {
        self.run = 0;
        count(&mut self.stats.successes);
        Recorded::quiet(Tally::Counted)
    }

    /// When the state ends by time: the open period, the longest half-open, an order; while closed, the ramp.
    pub(crate) const fn until(&self) -> Option<Duration> {
        match self.lane {
            Lane::Open | Lane::Timed => Some(self.until),
            Lane::Plain | Lane::Windowed | Lane::Untimed => None,
        }
    }

    pub(crate) fn set_until(&mut self, until: Option<Duration>) {
        self.until = until.unwrap_or_default();
        self.lane = match (self.state, until) {
            (State::Closed, None) if self.config.window.is_none() => Lane::Plain,
            (State::Closed, None) => Lane::Windowed,
            (State::Open, Some(_)) => Lane::Open,
            (_, Some(_)) => Lane::Timed,
            (_, None) => Lane::Untimed,
        };
    }

    /// Whether a result with this permit may decide anything now.
    fn holds(&self, permit: Permit) -> bool {
        permit.epoch == self.epoch
            && match self.state {
                State::Closed | State::Observe | State::Disabled => !permit.probe,
                // Without its slot, a probe's result is a repetition.
                State::HalfOpen => {
                    permit.probe && self.probes().iter().any(|probe| probe.slot == permit.slot)
                }
                State::Open | State::ForcedOpen => false,
            }
    }

    fn probe_succeeded(&mut self, permit: Permit, now: Duration) -> Recorded {
        self.aside.free_slot(permit.slot);
        self.successes = self.successes.saturating_add(1);
        if self.successes < self.config.success_threshold {
            return Recorded::quiet(Tally::Counted);
        }
        let reopens = self.reopens;
        let transition = self.close(Cause::ProbesSucceeded, now);
        if !self.config.ramp_for.is_zero() {
            // A relapse during the ramp is another reopening in a row.
            self.reopens = reopens;
            self.set_until(Some(now.saturating_add(self.config.ramp_for)));
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

    pub(crate) fn has_slot(&self) -> bool {
        self.probes().len() < self.config.half_open_permits as usize
    }

    fn take_slot(&mut self, now: Duration) -> Permit {
        let lease_until = self.config.probe_timeout.map(|lease| now.saturating_add(lease));
        let slot = self.aside.take_slot(lease_until);
        count(&mut self.stats.calls);
        Permit { epoch: self.epoch, probe: true, slot }
    }

    pub(crate) fn probes(&self) -> &[Probe] {
        self.aside.probes()
    }

    fn refuse(&mut self, cause: RejectCause, now: Duration) -> Result<Permit, Rejected> {
        count(&mut self.stats.rejections);
        Err(Rejected { retry_after: self.retry_after(now), cause, epoch: self.epoch })
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

#[inline]
pub(crate) fn count(counter: &mut u64) {
    *counter = counter.wrapping_add(1);
    if *counter == 0 {
        stay_at_most(counter);
    }
}

/// Out of the way, so that counting is one instruction and a jump that is never taken.
#[cold]
#[inline(never)]
fn stay_at_most(counter: &mut u64) {
    *counter = u64::MAX;
}
