//! Blocking calls: the thread parks on a condition variable between attempts, so that cancelling wakes it at once.

use super::{Cancel, Error, Retry, Run};
use crate::{Policy, Reason};

/// Calls `op`, and again while it fails and the policy allows. Every error is retried; for conditions see [`Retry`].
///
/// ```
/// use retry_core::{Policy, retry};
///
/// let answer = retry(&Policy::default(), || "7".parse::<u32>());
/// assert_eq!(answer, Ok(7));
/// ```
///
/// # Errors
///
/// The last error, when no retry is left.
pub fn retry<T, E>(policy: &Policy, op: impl FnMut() -> Result<T, E>) -> Result<T, Error<E>> {
    Retry::new(policy).run(op)
}

impl<E> Retry<'_, E> {
    /// Calls `op`, and again while it fails and this allows, parking the thread in between.
    ///
    /// # Errors
    ///
    /// The last error, with the reason why there is no further retry.
    pub fn run<T>(&self, mut op: impl FnMut() -> Result<T, E>) -> Result<T, Error<E>> {
        let mut run = Run::start(*self);
        let mut own = None;
        loop {
            let error = match op() {
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
            // Without a handle the thread parks on one that nobody else has; made once, and only if it waits.
            let cancel = self.cancel.unwrap_or_else(|| own.get_or_insert_with(Cancel::new));
            if !cancel.park(delay) {
                return Err(run.end(error, Reason::Cancelled));
            }
            run.slept = run.slept.saturating_add(delay);
            reserved.spend();
        }
    }
}
