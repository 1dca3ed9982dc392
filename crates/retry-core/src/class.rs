//! What a failure means: for retrying, for a breaker, for the budget.
//!
//! Not how it looked on the wire: the caller maps statuses, exit codes and exceptions to a class. The set is closed,
//! so that every place that decides by class can be read as one table.

use std::time::Duration;

/// The class of a failure.
///
/// | class | retry | breaker | price |
/// |---|---|---|---|
/// | Transient, Unknown, Overloaded | yes | failure | 1 |
/// | Timeout, StreamLost | yes | failure | 2 |
/// | Lost | yes, as a loss | failure | 1 |
/// | Permanent, Cancelled, DeadlineExceeded | no | neutral | 0 |
/// | DaemonFault | yes, uncounted | neutral | 0 |
/// | BreakerOpen | no: the breaker wakes it, not the clock | neutral | 0 |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Likely to pass by itself.
    Transient,
    /// Nothing is known about it; treated as transient.
    Unknown,
    /// No answer in time. The work may still be going on, so whoever retries fences it off first.
    Timeout,
    /// The connection broke before an answer; as with a timeout, the work may go on.
    StreamLost,
    /// The other side asks for less, usually with a [`Hint`].
    Overloaded,
    /// The worker disappeared with the work. Counted as a loss, not as a failure.
    Lost,
    /// Bad input, not found, denied: the same call would fail again.
    Permanent,
    /// Somebody no longer wants the answer.
    Cancelled,
    /// The answer would come too late.
    DeadlineExceeded,
    /// The caller's own side failed (its store, its shutdown, its routing): says nothing about the callee.
    DaemonFault,
    /// A breaker refused the call. It was never made, so this is neither an attempt nor a failure.
    BreakerOpen,
}

impl ErrorClass {
    /// Every class, in the order of the table.
    pub const ALL: [Self; 11] = [
        Self::Transient,
        Self::Unknown,
        Self::Timeout,
        Self::StreamLost,
        Self::Overloaded,
        Self::Lost,
        Self::Permanent,
        Self::Cancelled,
        Self::DeadlineExceeded,
        Self::DaemonFault,
        Self::BreakerOpen,
    ];

    /// Whether another try after some time may help.
    #[must_use]
    pub const fn retryable(self) -> bool {
        match self {
            Self::Transient
            | Self::Unknown
            | Self::Timeout
            | Self::StreamLost
            | Self::Overloaded
            | Self::Lost
            | Self::DaemonFault => true,
            Self::Permanent | Self::Cancelled | Self::DeadlineExceeded | Self::BreakerOpen => false,
        }
    }

    /// What a breaker learns from it.
    #[must_use]
    pub const fn breaker_sample(self) -> Sample {
        match self {
            Self::Transient
            | Self::Unknown
            | Self::Timeout
            | Self::StreamLost
            | Self::Overloaded
            | Self::Lost => Sample::Failure,
            Self::Permanent
            | Self::Cancelled
            | Self::DeadlineExceeded
            | Self::DaemonFault
            | Self::BreakerOpen => Sample::Neutral,
        }
    }

    /// What a retry after it costs, in whole budget tokens.
    ///
    /// Where no answer came the first try may still be using the callee, so its retry costs double. A `Lost` that
    /// nobody is to blame for (drain, preemption, a restart) is free; the class cannot tell, its caller can.
    #[must_use]
    pub const fn price(self) -> u32 {
        match self {
            Self::Timeout | Self::StreamLost => 2,
            Self::Transient | Self::Unknown | Self::Overloaded | Self::Lost => 1,
            Self::Permanent
            | Self::Cancelled
            | Self::DeadlineExceeded
            | Self::DaemonFault
            | Self::BreakerOpen => 0,
        }
    }
}

/// What a breaker counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sample {
    /// The callee failed.
    Failure,
    /// Says nothing about the callee's health, neither good nor bad.
    Neutral,
}

/// What the callee said about coming back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hint {
    /// Not before this much time has passed.
    After(Duration),
    /// Do not retry. Makes the failure permanent.
    Never,
}

impl Hint {
    /// A hint in milliseconds, as gRPC push-back sends it: a negative one means do not retry.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self::from_nanos(millis as i128 * 1_000_000)
    }

    /// A hint in nanoseconds; negative means do not retry, and what a [`Duration`] cannot hold is its maximum.
    #[must_use]
    pub const fn from_nanos(nanos: i128) -> Self {
        const SECOND: i128 = 1_000_000_000;
        if nanos < 0 {
            Self::Never
        } else if nanos / SECOND > u64::MAX as i128 {
            Self::After(Duration::MAX)
        } else {
            Self::After(Duration::new((nanos / SECOND) as u64, (nanos % SECOND) as u32))
        }
    }
}

/// One failure, as far as retrying is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Failure {
    /// What kind it is.
    pub class: ErrorClass,
    /// What the callee said about coming back, if anything.
    pub hint: Option<Hint>,
    /// What it counts toward `max_losses` when it is a loss, in thousandths: of k lost together each weighs 1,000 / k.
    pub weight: u32,
}

impl Failure {
    /// A failure without a hint.
    #[must_use]
    pub const fn new(class: ErrorClass) -> Self {
        Self { class, hint: None, weight: 1_000 }
    }

    /// The same failure with a hint.
    #[must_use]
    pub const fn with_hint(self, hint: Hint) -> Self {
        Self { hint: Some(hint), ..self }
    }

    /// The same failure, weighing so many thousandths of a loss.
    #[must_use]
    pub const fn weighing(self, thousandths: u32) -> Self {
        Self { weight: thousandths, ..self }
    }
}

impl From<ErrorClass> for Failure {
    fn from(class: ErrorClass) -> Self {
        Self::new(class)
    }
}
