//! One failure in, one decision out.
//!
//! Not the budget: that is state shared between tasks, reserved by the caller after a decision to retry and before
//! anything waits for it. Not the breaker: it is asked when the retry is due.
//!
//! The first rule that applies wins: cancelled, deadline passed, not retryable, refused by the predicate, limit
//! reached, and last whether the delay still ends before the deadline.

use crate::class::{ErrorClass, Failure, Hint};
use crate::delay::{nanos, scale};
use crate::policy::{HintMode, Policy};
use std::fmt;
use std::time::Duration;

/// Faults of the caller's own side that are retried for free; after that they count as [`ErrorClass::Unknown`],
/// since a side that keeps failing would otherwise retry without bound.
pub const MAX_FAULTS: u32 = 10;

/// The jitter added to a hint is at most a tenth of it and never more than this: whoever says "in an hour" wants
/// the callers spread, not six minutes late.
const HINT_SPREAD: Duration = Duration::from_secs(10);

/// How far a task has come. Plain data, to be stored with the task; the default is a task before its first failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Progress {
    /// Failures that led to a retry.
    pub retries_made: u32,
    /// Times it was lost together with its worker, whole ones.
    pub losses: u32,
    /// What weighs less than a whole loss, in thousandths; [`Failure::weight`] says what a loss adds.
    pub loss_fraction: u32,
    /// Faults of the caller's own side so far.
    pub faults: u32,
    /// The last delay; zero before the first.
    pub previous_delay: Duration,
    /// When the first attempt began, for `max_elapsed`.
    pub started: Duration,
}

impl Progress {
    /// Takes note of a decision that is carried out. Giving up changes nothing.
    pub fn record(&mut self, decision: &Decision) {
        if let Decision::Retry { delay, spent, .. } = decision {
            let counter = match spent {
                Spent::Retry => &mut self.retries_made,
                Spent::Loss(weight) => {
                    let sum = self.loss_sum().saturating_add(u64::from(*weight));
                    self.loss_fraction = (sum % 1_000) as u32;
                    self.losses = u32::try_from(sum / 1_000).unwrap_or(u32::MAX);
                    self.previous_delay = *delay;
                    return;
                }
                Spent::Fault => &mut self.faults,
            };
            *counter = counter.saturating_add(1);
            self.previous_delay = *delay;
        }
    }

    /// Losses so far in thousandths.
    const fn loss_sum(&self) -> u64 {
        self.losses as u64 * 1_000 + self.loss_fraction as u64
    }

    /// What a failure of this class counts as by now: after [`MAX_FAULTS`] a `DaemonFault` is `Unknown`.
    #[must_use]
    pub const fn effective(&self, class: ErrorClass) -> ErrorClass {
        match class {
            ErrorClass::DaemonFault if self.faults >= MAX_FAULTS => ErrorClass::Unknown,
            other => other,
        }
    }
}

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub enum Decision {
    /// Try again.
    Retry {
        /// How long to wait.
        delay: Duration,
        /// When that is over: now + delay.
        at: Duration,
        /// The callee asked for more than `hint_max`.
        hint_cut: bool,
        /// Which count the retry adds to.
        spent: Spent,
        /// Budget tokens to reserve before anything waits for this retry.
        price: u32,
    },
    /// The failure is final.
    GiveUp {
        /// Why.
        reason: Reason,
    },
}

/// The count that a retry adds to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Spent {
    /// `retries_made`, bounded by `max_retries`.
    Retry,
    /// `losses`, bounded by `max_losses`; in thousandths of a loss.
    Loss(u32),
    /// `faults`, bounded by [`MAX_FAULTS`].
    Fault,
}

/// Why there is no further retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Its class, or its hint, says that trying again is useless.
    NotRetryable,
    /// The caller's predicate said no.
    Refused,
    /// `max_retries` are used up.
    Exhausted,
    /// Lost `max_losses` times.
    Lost,
    /// The deadline has passed, or the retry could not start early enough before it.
    Deadline,
    /// The same, for `max_elapsed`.
    MaxElapsed,
    /// The budget is empty. Only call wrappers say so, see [`Bucket`](crate::Bucket).
    Budget,
    /// Somebody no longer wants the answer.
    Cancelled,
    /// Not a failure: the call was never made. Keep the work; the breaker's closing wakes it.
    BreakerOpen,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotRetryable => "the failure is permanent",
            Self::Refused => "the condition for a retry does not hold",
            Self::Exhausted => "all retries are used up",
            Self::Lost => "lost too often",
            Self::Deadline => "the deadline leaves no time for a retry",
            Self::MaxElapsed => "the longest time for retries is over",
            Self::Budget => "the retry budget is empty",
            Self::Cancelled => "cancelled",
            Self::BreakerOpen => "the breaker is open",
        })
    }
}

/// What a predicate may look at; codes and messages its caller knows already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attempted {
    /// The class of the failure.
    pub class: ErrorClass,
    /// Retries made before it.
    pub retries_made: u32,
    /// Time since the first attempt began.
    pub elapsed: Duration,
}

impl Policy {
    /// Decides over one failure at `now`. Pure: the same arguments give the same decision.
    ///
    /// A retry needs now + delay + `min_window` ≤ min(`deadline`, started + `max_elapsed`); one that cannot have
    /// that is given up now, not when the time is over. `draw` is 64 random bits, see [`draw`](crate::draw).
    pub fn next(
        &self,
        progress: &Progress,
        failure: Failure,
        now: Duration,
        deadline: Option<Duration>,
        draw: u64,
    ) -> Decision {
        self.next_if(progress, failure, now, deadline, draw, |_| true)
    }

    /// As [`Policy::next`], with a predicate that can only narrow: it is asked about retryable failures alone, and
    /// its yes raises no limit.
    pub fn next_if(
        &self,
        progress: &Progress,
        failure: Failure,
        now: Duration,
        deadline: Option<Duration>,
        draw: u64,
        predicate: impl FnOnce(&Attempted) -> bool,
    ) -> Decision {
        self.decide(progress, failure, now, deadline, draw, predicate)
            .unwrap_or_else(|reason| Decision::GiveUp { reason })
    }

    fn decide(
        &self,
        progress: &Progress,
        failure: Failure,
        now: Duration,
        deadline: Option<Duration>,
        draw: u64,
        predicate: impl FnOnce(&Attempted) -> bool,
    ) -> Result<Decision, Reason> {
        let class = progress.effective(failure.class);
        if class == ErrorClass::Cancelled {
            return Err(Reason::Cancelled);
        }
        self.fits(progress, now, deadline)?;
        match class {
            ErrorClass::DeadlineExceeded => return Err(Reason::Deadline),
            ErrorClass::BreakerOpen => return Err(Reason::BreakerOpen),
            _ if !class.retryable() || failure.hint == Some(Hint::Never) => return Err(Reason::NotRetryable),
            _ => {}
        }
        let elapsed = now.saturating_sub(progress.started);
        if !predicate(&Attempted { class, retries_made: progress.retries_made, elapsed }) {
            return Err(Reason::Refused);
        }
        let (spent, made) = match class {
            ErrorClass::Lost => (Spent::Loss(failure.weight), progress.losses),
            ErrorClass::DaemonFault => (Spent::Fault, progress.faults),
            _ => (Spent::Retry, progress.retries_made),
        };
        match spent {
            Spent::Retry if made >= self.max_retries() => return Err(Reason::Exhausted),
            // The loss that reaches the limit is final itself: it is the one that proves the work poisonous.
            Spent::Loss(weight)
                if progress.loss_sum() + u64::from(weight) >= u64::from(self.config().max_losses) * 1_000 =>
            {
                return Err(Reason::Lost);
            }
            _ => {}
        }
        let (delay, hint_cut) =
            self.hinted(self.delay(made, draw, progress.previous_delay), failure.hint, draw);
        let at = now.saturating_add(delay);
        self.fits(progress, at.saturating_add(self.config().min_window), deadline)?;
        Ok(Decision::Retry { delay, at, hint_cut, spent, price: class.price() })
    }

    /// Whether `end` is early enough; the deadline is named first because it is the stricter promise.
    fn fits(&self, progress: &Progress, end: Duration, deadline: Option<Duration>) -> Result<(), Reason> {
        if deadline.is_some_and(|deadline| end > deadline) {
            return Err(Reason::Deadline);
        }
        match self.config().max_elapsed {
            Some(most) if end > progress.started.saturating_add(most) => Err(Reason::MaxElapsed),
            _ => Ok(()),
        }
    }

    /// The delay after the hint, and whether the hint was cut.
    fn hinted(&self, delay: Duration, hint: Option<Hint>, draw: u64) -> (Duration, bool) {
        let (Some(Hint::After(asked)), HintMode::AtLeast | HintMode::Exact) = (hint, self.config().hint)
        else {
            return (delay, false);
        };
        let hint = asked.min(self.config().hint_max);
        let cut = hint < asked;
        if self.config().hint == HintMode::Exact {
            return (hint, cut);
        }
        // Upward only: everybody got the same hint, and nobody may come before it. The complement of the draw is as
        // random as the draw; one draw a decision is what callers store.
        let spread = nanos((hint / 10).min(HINT_SPREAD));
        let later = hint.saturating_add(Duration::from_nanos(scale(!draw, spread + 1)));
        (delay.max(later), cut)
    }
}
