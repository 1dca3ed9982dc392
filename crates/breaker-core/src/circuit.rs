//! A breaker around calls: the rim, where a clock is read and dice are thrown.
//!
//! Not a time limit and not a retry: a call that hangs occupies its slot until it ends, and its
//! error goes to the caller as it came.
//!
//! Invariants: a refused call is never started; each started call is recorded once, whether it
//! returns, panics or is dropped half-way.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use crate::broken::ConfigErrors;
use crate::config::Config;
use crate::shared::Shared;
use crate::words::{Permit, Rejected, Sample, Stats, Transition};

/// Where time and chance come from.
#[derive(Clone)]
pub struct Rim {
    now: Arc<dyn Fn() -> Duration + Send + Sync>,
    draw: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl Rim {
    /// A clock and dice of the caller's own; a test steps the first and fixes the second.
    pub fn new(
        now: impl Fn() -> Duration + Send + Sync + 'static,
        draw: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Self {
        Self { now: Arc::new(now), draw: Arc::new(draw) }
    }

    /// The machine's: time since 1970, read from the wall once and counted on monotonically, so
    /// that a step of the wall clock is not felt and yet a snapshot makes sense to the next process.
    #[must_use]
    pub fn system() -> Self {
        // Seeded by the operating system once a thread; jitter needs no more than that.
        Self::new(system_now, || RandomState::new().hash_one(0_u8))
    }
}

impl Default for Rim {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Rim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rim").finish_non_exhaustive()
    }
}

#[expect(clippy::disallowed_methods, reason = "the rim of the crate: the one place that reads a clock")]
fn system_now() -> Duration {
    static START: OnceLock<(Duration, Instant)> = OnceLock::new();
    let (wall, start) = START.get_or_init(|| {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        (wall, Instant::now())
    });
    wall.saturating_add(start.elapsed())
}

/// Why a call gave no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError<E> {
    /// It was not made.
    Rejected(Rejected),
    /// It was made, and this is its own error, untouched.
    Failed(E),
}

impl<E: fmt::Display> fmt::Display for CallError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rejected(rejected) => rejected.fmt(f),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

impl<E: std::error::Error + 'static> std::error::Error for CallError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Rejected(_) => None,
            // Its text is shown already, so its cause is next.
            Self::Failed(error) => error.source(),
        }
    }
}

/// A shared breaker with a clock, for wrapping calls.
///
/// ```
/// # #[cfg(feature = "sync")] {
/// use breaker_core::{CallError, Circuit, Config};
///
/// let circuit = Circuit::new(Config { failure_threshold: 1, ..Config::default() }).unwrap();
/// let failed: Result<(), _> = circuit.call(|| Err("no route"));
/// assert_eq!(failed, Err(CallError::Failed("no route")));
///
/// let refused: Result<(), CallError<&str>> = circuit.call(|| unreachable!("not called while open"));
/// assert!(matches!(refused, Err(CallError::Rejected(_))));
/// # }
/// ```
#[derive(Debug)]
pub struct Circuit {
    shared: Shared,
    rim: Rim,
}

impl Circuit {
    /// A closed breaker with the machine's clock.
    ///
    /// # Errors
    ///
    /// Every rule that `config` breaks.
    pub fn new(config: Config) -> Result<Self, ConfigErrors> {
        Ok(Self::with_rim(Shared::new(config)?, Rim::system()))
    }

    /// Any breaker (a restored one, say) with any clock.
    #[must_use]
    pub fn with_rim(shared: impl Into<Shared>, rim: Rim) -> Self {
        Self { shared: shared.into(), rim }
    }

    /// The breaker, for all that is not a call.
    #[must_use]
    pub fn breaker(&self) -> &Shared {
        &self.shared
    }

    /// The present time of this circuit's clock.
    #[must_use]
    pub fn now(&self) -> Duration {
        (self.rim.now)()
    }

    /// Whether a call would go through now; takes no permit.
    #[must_use]
    pub fn is_available(&self) -> bool {
        !matches!(self.shared.is_available(self.now()), crate::Availability::No { .. })
    }

    /// What it has seen.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Closed, all counts 0.
    pub fn reset(&self) -> Transition {
        let now = self.now();
        self.shared.lock().reset(now)
    }

    /// Makes a call, if the breaker lets it. Every error counts as a failure, and so does a panic.
    ///
    /// # Errors
    ///
    /// The refusal, or the call's own error.
    #[cfg(feature = "sync")]
    pub fn call<T, E>(&self, op: impl FnOnce() -> Result<T, E>) -> Result<T, CallError<E>> {
        self.call_with(op, every_error)
    }

    /// As [`call`](Self::call), where only errors for which `counts` is true count as failures; the
    /// others (bad input, not found) say nothing about the other side and are neutral.
    ///
    /// # Errors
    ///
    /// The refusal, or the call's own error.
    #[cfg(feature = "sync")]
    pub fn call_if<T, E>(
        &self,
        op: impl FnOnce() -> Result<T, E>,
        counts: impl FnOnce(&E) -> bool,
    ) -> Result<T, CallError<E>> {
        self.call_with(op, |result| some_errors(result, counts))
    }

    /// As [`call`](Self::call), where `judge` says what each result means, `Ok` included.
    ///
    /// # Errors
    ///
    /// The refusal, or the call's own error.
    #[cfg(feature = "sync")]
    pub fn call_with<T, E>(
        &self,
        op: impl FnOnce() -> Result<T, E>,
        judge: impl FnOnce(&Result<T, E>) -> Sample,
    ) -> Result<T, CallError<E>> {
        let mut call = self.begin().map_err(CallError::Rejected)?;
        let result = call.run(op);
        call.end(judge(&result));
        result.map_err(CallError::Failed)
    }

    /// Makes an asynchronous call, if the breaker lets it, asked when first polled. Every error counts as
    /// a failure, and so does a panic; a future dropped before its end is neutral.
    ///
    /// # Errors
    ///
    /// The refusal, or the call's own error.
    #[cfg(feature = "async")]
    pub async fn call_async<T, E, F>(&self, op: impl FnOnce() -> F) -> Result<T, CallError<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        self.call_async_with(op, every_error).await
    }

    /// As [`call_async`](Self::call_async), where only errors for which `counts` is true count as
    /// failures; the others are neutral.
    ///
    /// # Errors
    ///
    /// The refusal, or the call's own error.
    #[cfg(feature = "async")]
    pub async fn call_async_if<T, E, F>(
        &self,
        op: impl FnOnce() -> F,
        counts: impl FnOnce(&E) -> bool,
    ) -> Result<T, CallError<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        self.call_async_with(op, |result| some_errors(result, counts)).await
    }

    /// As [`call_async`](Self::call_async), where `judge` says what each result means, `Ok` included.
    ///
    /// # Errors
    ///
    /// The refusal, or the call's own error.
    #[cfg(feature = "async")]
    pub async fn call_async_with<T, E, F>(
        &self,
        op: impl FnOnce() -> F,
        judge: impl FnOnce(&Result<T, E>) -> Sample,
    ) -> Result<T, CallError<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        let mut call = self.begin().map_err(CallError::Rejected)?;
        let mut future = std::pin::pin!(call.run(op));
        // Marked as running only inside each poll: so a drop at an await is told from a panic.
        let result = std::future::poll_fn(|context| call.run(|| future.as_mut().poll(context))).await;
        call.end(judge(&result));
        result.map_err(CallError::Failed)
    }

    fn begin(&self) -> Result<Call<'_>, Rejected> {
        let now = self.now();
        let permit = self.shared.acquire_fast(now).unwrap_or_else(|| {
            // Drawn before the lock is taken: it is the caller's code, and may be slow.
            let draw = (self.rim.draw)();
            let mut breaker = self.shared.slow_path();
            breaker.tick(now, draw);
            breaker.try_acquire(now)
        })?;
        Ok(Call { circuit: self, permit: Some(permit), began: now, running: false })
    }
}

fn every_error<T, E>(result: &Result<T, E>) -> Sample {
    some_errors(result, |_| true)
}

fn some_errors<T, E>(result: &Result<T, E>, counts: impl FnOnce(&E) -> bool) -> Sample {
    match result {
        Ok(_) => Sample::Success,
        Err(error) if counts(error) => Sample::Failure,
        Err(_) => Sample::Neutral,
    }
}

/// A call under way. Dropped while the callee runs, it was a panic; dropped between, a cancellation.
struct Call<'a> {
    circuit: &'a Circuit,
    permit: Option<Permit>,
    began: Duration,
    running: bool,
}

impl Call<'_> {
    fn run<R>(&mut self, op: impl FnOnce() -> R) -> R {
        self.running = true;
        let result = op();
        self.running = false;
        result
    }

    fn end(&mut self, sample: Sample) {
        let Some(permit) = self.permit.take() else { return };
        let Circuit { shared, rim } = self.circuit;
        if shared.record_fast(permit, sample).is_none() {
            // Before the lock is taken: both are the caller's code, and may be slow.
            let (now, draw) = ((rim.now)(), (rim.draw)());
            let took = now.saturating_sub(self.began);
            shared.slow_path().record_timed(permit, sample, took, now, draw);
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.end(if self.running { Sample::Failure } else { Sample::Neutral });
    }
}
