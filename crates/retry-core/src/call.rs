//! Wrappers that call, wait and call again: the rim of the crate, behind the features `sync` and `async`.
//!
//! Only here a clock is read and entropy taken; every decision is [`Policy::next_if`]'s. Not a timeout: an attempt is
//! never interrupted. Invariants: a budget token is reserved before the wait that it pays for and refunded if the retry
//! is not made; there is no wait after the final failure; the last error comes back; no allocation per retry.

#[cfg(feature = "sync")]
mod blocking;
mod cancel;
mod error;
#[cfg(feature = "async")]
mod future;

#[cfg(feature = "sync")]
pub use blocking::retry;
pub use cancel::Cancel;
pub use error::Error;
#[cfg(feature = "async")]
pub use future::{Sleep, retry_async};

use crate::{Attempted, Bucket, Decision, ErrorClass, Failure, Policy, Progress, Reason, draw};
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Classify<'a, E> = &'a (dyn Fn(&E) -> Failure + Sync);
type Predicate<'a, E> = &'a (dyn Fn(&E, &Attempted) -> bool + Sync);

/// How to call: a policy, and optionally what errors mean, which of them to retry, a budget, a cancel handle.
///
/// By default every error is [`ErrorClass::Unknown`], and so retried. One value serves any number of calls.
///
/// ```
/// # #[cfg(feature = "sync")] {
/// use retry_core::{Config, ErrorClass, Failure, Retry};
/// use std::time::Duration;
///
/// let policy = Config { base_delay: Duration::from_millis(1), ..Config::default() }.build().expect("in range");
/// let mut answers = [Err("timeout"), Ok(7)].into_iter();
/// let answer = Retry::new(&policy)
///     .classify(&|error: &&str| match *error {
///         "timeout" => Failure::new(ErrorClass::Timeout),
///         _ => Failure::new(ErrorClass::Permanent),
///     })
///     .run(|| answers.next().expect("two are enough"));
/// assert_eq!(answer, Ok(7));
/// # }
/// ```
pub struct Retry<'a, E> {
    policy: &'a Policy,
    classify: Classify<'a, E>,
    predicate: Predicate<'a, E>,
    budget: Option<&'a Mutex<Bucket>>,
    cancel: Option<&'a Cancel>,
    deadline: Option<Duration>,
    key: Option<(u64, u64)>,
}

impl<E> Clone for Retry<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Retry<'_, E> {}

impl<E> fmt::Debug for Retry<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retry")
            .field("policy", self.policy)
            .field("budget", &self.budget)
            .field("deadline", &self.deadline)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl<'a, E> Retry<'a, E> {
    /// Any error is retried, as the policy allows.
    #[must_use]
    pub fn new(policy: &'a Policy) -> Self {
        Self {
            policy,
            classify: &|_| Failure::new(ErrorClass::Unknown),
            predicate: &|_, _| true,
            budget: None,
            cancel: None,
            deadline: None,
            key: None,
        }
    }

    /// What an error means. [`ErrorClass::Permanent`] and a few others are never retried.
    #[must_use]
    pub fn classify(self, classify: &'a (dyn Fn(&E) -> Failure + Sync)) -> Self {
        Self { classify, ..self }
    }

    /// A condition on top, asked about retryable errors alone; false gives up ([`Reason::Refused`]).
    #[must_use]
    pub fn only_if(self, predicate: &'a (dyn Fn(&E, &Attempted) -> bool + Sync)) -> Self {
        Self { predicate, ..self }
    }

    /// A budget shared by many calls: successes fill it, retries draw on it, and empty it ends them
    /// ([`Reason::Budget`]). Its times count from the first use of these wrappers in the process, so create it with
    /// `now` zero.
    #[must_use]
    pub fn budget(self, budget: &'a Mutex<Bucket>) -> Self {
        Self { budget: Some(budget), ..self }
    }

    /// Cancelling wakes a waiting call, which then returns its last error ([`Reason::Cancelled`]). An attempt under
    /// way is not interrupted, nor the first one prevented.
    #[must_use]
    pub fn cancel(self, cancel: &'a Cancel) -> Self {
        Self { cancel: Some(cancel), ..self }
    }

    /// The latest start of a retry, counted from the start of each call.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self }
    }

    /// Draws by (seed, task, attempt) instead of entropy, for delays that can be repeated.
    #[must_use]
    pub fn key(self, seed: u64, task: u64) -> Self {
        Self { key: Some((seed, task)), ..self }
    }

    fn succeeded(&self) {
        if let Some(budget) = self.budget {
            lock(budget).deposit(since_first_use());
        }
    }
}

/// One call under way.
struct Run<'a, E> {
    retry: Retry<'a, E>,
    started: Instant,
    progress: Progress,
    attempts: u32,
    slept: Duration,
    key: Option<(u64, u64)>,
}

impl<'a, E> Run<'a, E> {
    fn start(retry: Retry<'a, E>) -> Self {
        Self {
            retry,
            started: clock(),
            progress: Progress::default(),
            attempts: 0,
            slept: Duration::ZERO,
            key: retry.key,
        }
    }

    /// How long to wait before the next attempt, with the token that pays for it; or why there is none.
    fn failed(&mut self, error: &E) -> Result<(Duration, Reserved<'a>), Reason> {
        self.attempts = self.attempts.saturating_add(1);
        if self.retry.cancel.is_some_and(Cancel::is_cancelled) {
            return Err(Reason::Cancelled);
        }
        // Where a sleep takes no real time, as in tests with a stepped clock, what was slept still counts.
        let now = clock().saturating_duration_since(self.started).max(self.slept);
        let (seed, task) = *self.key.get_or_insert_with(|| (entropy(), 0));
        let decision = self.retry.policy.next_if(
            &self.progress,
            (self.retry.classify)(error),
            now,
            self.retry.deadline,
            draw(seed, task, u64::from(self.attempts)),
            |attempted| (self.retry.predicate)(error, attempted),
        );
        match decision {
            Decision::Retry { delay, price, .. } => {
                // Before the wait: a caller who is refused only afterwards has waited for nothing.
                let reserved = Reserved::take(self.retry.budget, price).ok_or(Reason::Budget)?;
                self.progress.record(&decision);
                Ok((delay, reserved))
            }
            Decision::GiveUp { reason } => Err(reason),
        }
    }

    fn end(self, last: E, reason: Reason) -> Error<E> {
        if self.retry.policy.max_retries() == 0 && self.attempts <= 1 {
            return Error::Single(last);
        }
        Error::Exhausted { last, attempts: self.attempts, slept: self.slept, reason }
    }
}

/// Tokens held for a retry that is not made yet. Dropped (a cancelled wait, a dropped future) they go back.
struct Reserved<'a> {
    budget: Option<&'a Mutex<Bucket>>,
    tokens: u32,
}

impl<'a> Reserved<'a> {
    fn take(budget: Option<&'a Mutex<Bucket>>, tokens: u32) -> Option<Self> {
        match budget {
            Some(bucket) if !lock(bucket).withdraw(since_first_use(), tokens) => None,
            _ => Some(Self { budget, tokens }),
        }
    }

    fn spend(mut self) {
        self.budget = None;
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if let Some(budget) = self.budget {
            lock(budget).refund(self.tokens);
        }
    }
}

/// No code of others runs under these locks, and every update leaves whole values: a poisoned one is still sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(clippy::disallowed_methods, reason = "call wrappers wait in real time; this is their one clock")]
fn clock() -> Instant {
    Instant::now()
}

/// One epoch for all calls of the process, for the budgets they share.
fn since_first_use() -> Duration {
    static FIRST_USE: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    clock().saturating_duration_since(*FIRST_USE.get_or_init(clock))
}

/// A constant seed would give all processes the same delays, and their retries would meet. The standard library's
/// hash keys differ per process and per use; nothing here needs more.
fn entropy() -> u64 {
    RandomState::new().build_hasher().finish()
}
