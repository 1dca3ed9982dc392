//! Async calls, on any runtime: sleeping is given by the caller.

use super::{Cancel, Error, Retry, Run};
use crate::{Policy, Reason};
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

/// A way to sleep. Every function or closure from a duration to a future is one: `tokio::time::sleep`, for instance.
pub trait Sleep {
    /// Ready once the time is over.
    type Wait: Future<Output = ()>;

    /// Begins to wait.
    fn sleep(&self, delay: Duration) -> Self::Wait;
}

impl<F, W> Sleep for F
where
    F: Fn(Duration) -> W,
    W: Future<Output = ()>,
{
    type Wait = W;

    fn sleep(&self, delay: Duration) -> W {
        self(delay)
    }
}

/// Calls `op`, and again while it fails and the policy allows. Every error is retried; for conditions see [`Retry`].
///
/// ```
/// use retry_core::{Policy, retry_async};
///
/// async fn answer() -> Result<u32, std::num::ParseIntError> {
///     let sleep = |_delay| std::future::ready(()); // in a program: the runtime's own
///     retry_async(&Policy::default(), sleep, async || "7".parse()).await.map_err(|error| error.into_last())
/// }
/// # let _ = answer();
/// ```
///
/// # Errors
///
/// The last error, when no retry is left.
pub async fn retry_async<T, E, F>(
    policy: &Policy,
    sleep: impl Sleep,
    op: impl FnMut() -> F,
) -> Result<T, Error<E>>
where
    F: Future<Output = Result<T, E>>,
{
    Retry::new(policy).run_async(sleep, op).await
}

impl<E> Retry<'_, E> {
    /// Calls `op`, and again while it fails and this allows, awaiting `sleep` in between.
    ///
    /// Dropping the future is fine at any point: tokens reserved for a retry that was not made go back.
    ///
    /// # Errors
    ///
    /// The last error, with the reason why there is no further retry.
    pub async fn run_async<T, F>(&self, sleep: impl Sleep, mut op: impl FnMut() -> F) -> Result<T, Error<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        let mut run = Run::start(*self);
        let mut place = None;
        loop {
            let error = match op().await {
                Ok(value) => {
                    self.succeeded();
                    return Ok(value);
                }
                Err(error) => error,
            };
            let (delay, reserved) = match run.failed(&error) {
                Ok(wait) => wait,
                Err(reason) => return Err(run.end(error, reason)),
            };
            if place.is_none() {
                place = self.cancel.map(Cancel::enrol);
            }
            let mut wait = pin!(sleep.sleep(delay));
            let slept = poll_fn(|cx| match &place {
                Some(place) if place.poll_cancelled(cx).is_ready() => Poll::Ready(false),
                _ => wait.as_mut().poll(cx).map(|()| true),
            })
            .await;
            if !slept {
                return Err(run.end(error, Reason::Cancelled));
            }
            run.slept = run.slept.saturating_add(delay);
            reserved.spend();
        }
    }
}
