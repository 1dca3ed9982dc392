//! What a breaker can be asked without moving it.

use std::time::Duration;

use crate::breaker::Breaker;
use crate::config::Config;
use crate::span;
use crate::words::{Availability, Cause, Order, RejectCause, State, Stats, Transition};

impl Breaker {
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
                retry_after: self.until().map(|until| until.saturating_sub(now)),
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

    /// When to look again: the end of the open period (a probe is possible), of a probe's lease, of
    /// the longest half-open, of a ramp or of an order ([`tick`](Self::tick)). May lie in the past; then it is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        match self.state {
            State::HalfOpen => self.first_deadline(),
            _ => self.until(),
        }
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &Config {
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
        u32::try_from(self.aside.probes().len()).unwrap_or(u32::MAX)
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
            State::Open => self.until(),
            _ => None,
        }
    }

    /// When half-open ends without a verdict; `None` unless half-open, or without a limit.
    #[must_use]
    pub const fn half_open_until(&self) -> Option<Duration> {
        match self.state {
            State::HalfOpen => self.until(),
            _ => None,
        }
    }

    /// When the ramp after closing ends; `None` where there is none.
    #[must_use]
    pub const fn ramp_until(&self) -> Option<Duration> {
        match self.state {
            State::Closed => self.until(),
            _ => None,
        }
    }

    /// The part of the usual number of calls in flight that is to be let through now, above 0 to 1: grows
    /// evenly from `ramp_start` to 1 over `ramp_for` after closing.
    #[must_use]
    pub fn ramp_share(&self, now: Duration) -> f64 {
        let Some(until) = self.ramp_until().filter(|until| *until > now) else { return 1.0 };
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
        self.config.window.map(|_| self.aside.window().map_or((0, 0, 0), |seen| seen.counts(now)))
    }

    /// Why the present state was entered; `None` at first.
    #[must_use]
    pub const fn cause(&self) -> Option<Cause> {
        self.cause
    }

    /// Who ordered the present state; `None` unless it is an ordered one.
    #[must_use]
    pub fn order(&self) -> Option<&Order> {
        self.aside.order()
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
        match (self.from, self.cause) {
            (Some(from), Some(cause)) => Some(Transition { from, to: self.state, cause, epoch: self.epoch }),
            _ => None,
        }
    }

    /// The first end of a lease, or of half-open.
    pub(crate) fn first_deadline(&self) -> Option<Duration> {
        let mut first = self.until();
        for until in self.probes().iter().filter_map(|probe| probe.lease_until) {
            if first.is_none_or(|first| !span::reached(first, until)) {
                first = Some(until);
            }
        }
        first
    }

    /// When half-open should have ended by time, and whether by a lease, if that is over.
    pub(crate) fn verdict_due(&self, now: Duration) -> Option<(Duration, bool)> {
        if self.state != State::HalfOpen {
            return None;
        }
        let at = self.first_deadline().filter(|at| span::reached(*at, now))?;
        Some((at, self.probes().iter().any(|probe| probe.lease_until == Some(at))))
    }

    /// What is left of a period of the machine's own (open, half-open). Where the clock stands
    /// before the period's beginning it went back, and the whole period is left, not more.
    pub(crate) fn remaining(&self, now: Duration) -> Duration {
        self.until().map_or(Duration::ZERO, |until| until.saturating_sub(now.max(self.since)))
    }

    /// The end of an order is a point in the calendar, so it is compared as it stands.
    pub(crate) fn order_expired(&self, now: Duration) -> bool {
        self.state.is_ordered() && self.until().is_some_and(|until| now >= until)
    }
}
