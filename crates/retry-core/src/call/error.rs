//! What a call returns when it gives up: always the last error, and how it came to that.

use crate::Reason;
use std::fmt;
use std::time::Duration;

/// A call that failed for good. Holds the last error in either form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error<E> {
    /// `max_retries` is 0: the first failure is final, and the error is as the callable returned it.
    Single(E),
    /// There was, or could have been, a retry.
    Exhausted {
        /// The error of the last attempt.
        last: E,
        /// Attempts made, the first included.
        attempts: u32,
        /// Time waited between them.
        slept: Duration,
        /// Why there is no further retry.
        reason: Reason,
    },
}

impl<E> Error<E> {
    /// The error of the last attempt.
    #[must_use]
    pub const fn last(&self) -> &E {
        match self {
            Self::Single(last) | Self::Exhausted { last, .. } => last,
        }
    }

    /// The error of the last attempt, by value.
    #[must_use]
    pub fn into_last(self) -> E {
        match self {
            Self::Single(last) | Self::Exhausted { last, .. } => last,
        }
    }

    /// Attempts made, the first included.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        match self {
            Self::Single(_) => 1,
            Self::Exhausted { attempts, .. } => *attempts,
        }
    }
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Single(last) => last.fmt(f),
            Self::Exhausted { attempts, reason, .. } => {
                write!(f, "gave up after attempt {attempts}: {reason}")
            }
        }
    }
}

impl<E: std::error::Error + 'static> std::error::Error for Error<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Single(last) => last.source(),
            Self::Exhausted { last, .. } => Some(last),
        }
    }
}
