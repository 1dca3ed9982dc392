//! How a breaker moves: what a person may order, and what every transition does.
//!
//! Not when: `breaker` decides that of itself.

use std::sync::Arc;
use std::time::Duration;

use crate::breaker::{Breaker, count};
use crate::broken::ConfigErrors;
use crate::config::{Config, LONGEST_TOLD};
use crate::span;
use crate::words::{Cause, Order, State, Transition};

impl Breaker {
    /// Opens as if it had failed, for `period` or as long as usual; ends an order. After it the
    /// breaker probes as usual. Whoever calls this keeps who did it, and why.
    pub fn trip(&mut self, period: Option<Duration>, now: Duration, draw: u64) -> Transition {
        self.aside.drop_order();
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
    pub fn set_config(&mut self, config: impl Into<Arc<Config>>, now: Duration) -> Result<(), ConfigErrors> {
        let config = config.into();
        config.validate()?;
        if config.digest() != self.config.digest() {
            // Counts of another window mean something else.
            self.aside.drop_window();
        }
        self.config = config;
        self.fit_period(now);
        Ok(())
    }

    pub(crate) fn open(&mut self, cause: Cause, now: Duration, draw: u64) -> Transition {
        let until = now.saturating_add(self.config.open_period(self.reopens, draw));
        self.enter(State::Open, cause, now, Some(until))
    }

    /// Opens until then, where somebody said until when.
    pub(crate) fn open_told(
        &mut self,
        cause: Cause,
        until: Option<Duration>,
        now: Duration,
        draw: u64,
    ) -> Transition {
        let transition = self.open(cause, now, draw);
        if let Some(until) = until.filter(|_| matches!(cause, Cause::ServerHint | Cause::Tripped)) {
            self.set_until(Some(until));
        }
        transition
    }

    pub(crate) fn close(&mut self, cause: Cause, now: Duration) -> Transition {
        self.reopens = 0;
        self.aside.drop_order();
        self.enter(State::Closed, cause, now, None)
    }

    fn obey(&mut self, state: State, order: Order, until: Option<Duration>, now: Duration) -> Transition {
        self.reopens = 0;
        self.aside.set_order(order);
        self.enter(state, Cause::Ordered, now, until)
    }

    pub(crate) fn enter(
        &mut self,
        to: State,
        cause: Cause,
        now: Duration,
        until: Option<Duration>,
    ) -> Transition {
        // Wraps rather than panics at a restored u64::MAX: epochs are compared for equality only.
        self.epoch = self.epoch.wrapping_add(1);
        let transition = Transition { from: self.state, to, cause, epoch: self.epoch };
        self.from = Some(self.state);
        self.state = to;
        self.cause = Some(cause);
        self.run = 0;
        self.successes = 0;
        self.aside.keep_order_alone();
        self.since = now;
        self.set_until(until);
        count(&mut self.stats.transitions);
        transition
    }

    /// Moves periods that lie in the clock's future back to now, keeping their length.
    #[inline]
    pub(crate) fn follow_clock_back(&mut self, now: Duration) {
        if !span::reached(self.since, now) {
            self.move_back(now);
        }
    }

    #[cold]
    fn move_back(&mut self, now: Duration) {
        let back = self.since.saturating_sub(now);
        match self.state {
            State::Open | State::HalfOpen => {
                self.set_until(self.until().map(|until| until.saturating_sub(back)));
                for probe in self.aside.probes_mut() {
                    probe.lease_until = probe.lease_until.map(|until| until.saturating_sub(back));
                }
                self.since = now;
            }
            State::Closed if self.until().is_some() => {
                self.set_until(self.until().map(|until| until.saturating_sub(back)));
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
                self.set_until(Some(self.until().unwrap_or(now).min(bound(longest))));
            }
            State::HalfOpen => {
                let longest = self.config.longest_half_open().map(bound);
                self.set_until(longest.map(|longest| self.until().unwrap_or(longest).min(longest)));
                let lease = self.config.probe_timeout.map(bound);
                for probe in self.aside.probes_mut() {
                    probe.lease_until = lease.map(|lease| probe.lease_until.unwrap_or(lease).min(lease));
                }
            }
            State::Closed => {
                let longest = bound(self.config.ramp_for);
                self.set_until(self.until().map(|until| until.min(longest)).filter(|until| *until > now));
            }
            State::ForcedOpen | State::Disabled | State::Observe => {}
        }
        if self.config.window.is_none() {
            self.aside.drop_window();
        }
        // The settings may be others.
        self.set_until(self.until());
    }
}
