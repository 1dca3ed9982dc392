//! The words a breaker is spoken to in, and answers with: plain values without behaviour.
//!
//! Not the machine: which word follows which is decided in `breaker` alone.

use std::error::Error;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What a breaker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Lets work through and counts failures.
    Closed,
    /// Refuses until its period is over.
    Open,
    /// Lets a bounded number of probes through to find out.
    HalfOpen,
    /// Refuses because a person said so.
    ForcedOpen,
    /// Lets everything through and counts nothing, because a person said so.
    Disabled,
    /// Lets everything through, counts, and tells when it would have opened.
    Observe,
}

impl State {
    /// All six, in the order of their declaration.
    pub const ALL: [Self; 6] =
        [Self::Closed, Self::Open, Self::HalfOpen, Self::ForcedOpen, Self::Disabled, Self::Observe];

    /// A stable name, fit for a row or a label; [`FromStr`] reads it back.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "CLOSED",
            Self::Open => "OPEN",
            Self::HalfOpen => "HALF_OPEN",
            Self::ForcedOpen => "FORCED_OPEN",
            Self::Disabled => "DISABLED",
            Self::Observe => "OBSERVE",
        }
    }

    /// Whether a person put the breaker there, rather than what it saw.
    #[must_use]
    pub const fn is_ordered(self) -> bool {
        matches!(self, Self::ForcedOpen | Self::Disabled | Self::Observe)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for State {
    type Err = UnknownState;

    fn from_str(name: &str) -> Result<Self, UnknownState> {
        Self::ALL
            .into_iter()
            .find(|state| state.as_str() == name)
            .ok_or_else(|| UnknownState { name: name.to_owned() })
    }
}

/// A text that names no [`State`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownState {
    /// The text.
    pub name: String,
}

impl fmt::Display for UnknownState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no breaker state", self.name)
    }
}

impl Error for UnknownState {}

/// Leave to make one call. Plain data, so that it can be kept in a row beside the work.
///
/// The epoch is a fence: a result that comes back after the breaker has moved on decides nothing. The
/// slot is one within the epoch: a result told twice cannot free the slot of another probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "record how the call ended, or the slot of a probe stays taken"]
pub struct Permit {
    /// The epoch it was given in.
    pub epoch: u64,
    /// Whether it occupies one of the half-open slots.
    pub probe: bool,
    /// Which one, for a probe; otherwise 0. Given in turn, so 256 probes of one epoch have 256 numbers.
    pub slot: u8,
}

/// How a permitted call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sample {
    /// The other side works.
    Success,
    /// The other side does not.
    Failure,
    /// Says nothing about the other side: cancelled, a permanent error of the request, a fault of our own.
    Neutral,
}

/// Why a call is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RejectCause {
    /// The open period is not over.
    Open,
    /// Every half-open slot is taken.
    ProbesInFlight,
    /// A person forced it open.
    ForcedOpen,
}

impl RejectCause {
    /// A stable name, fit for a label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "OPEN",
            Self::ProbesInFlight => "PROBES_IN_FLIGHT",
            Self::ForcedOpen => "FORCED_OPEN",
        }
    }
}

/// A refusal, with what is needed to come back at the right time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// When to come back: the end of the open period or of the order, the first lease of a probe that
    /// would end, or when the ramp allows one call more. `None` where nobody can know: forced open
    /// without an end, and probes in flight where neither they nor half-open have a time limit.
    pub retry_after: Option<Duration>,
    /// Why.
    pub cause: RejectCause,
    /// The epoch that refused.
    pub epoch: u64,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.cause {
            RejectCause::Open => "the breaker is open",
            RejectCause::ProbesInFlight => "the breaker is half-open and its probes are in flight",
            RejectCause::ForcedOpen => "the breaker is forced open",
        })?;
        match self.retry_after {
            Some(wait) => write!(f, "; come back in {wait:?}"),
            None => Ok(()),
        }
    }
}

impl Error for Rejected {}

/// What [`is_available`](crate::Breaker::is_available) found. A look, not a promise: a later
/// `try_acquire` may still be refused, because somebody else was quicker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    /// Calls go through.
    Yes,
    /// The next call would be a probe.
    Probe,
    /// Calls are refused.
    No {
        /// When to come back, where that is known.
        retry_after: Option<Duration>,
        /// Why.
        cause: RejectCause,
    },
}

/// Why a breaker moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// As many consecutive failures as the threshold says.
    FailureRun,
    /// As large a part of the window failed as the rate says.
    FailureRate,
    /// As large a part of the window was slow as the rate says.
    SlowRate,
    /// The other side said when to come back.
    ServerHint,
    /// A person opened it.
    Tripped,
    /// The open period is over and somebody wants to call.
    OpenElapsed,
    /// A probe failed.
    ProbeFailed,
    /// A probe gave no answer within its lease.
    ProbeTimedOut,
    /// As many probes succeeded as the threshold says.
    ProbesSucceeded,
    /// Half-open lasted its longest without a verdict.
    Inconclusive,
    /// A person ordered a forced state.
    Ordered,
    /// A person ended a forced state.
    Auto,
    /// A forced state came to the end it was given.
    Expired,
    /// A person reset it.
    Reset,
}

impl Cause {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 14] = [
        Self::FailureRun,
        Self::FailureRate,
        Self::SlowRate,
        Self::ServerHint,
        Self::Tripped,
        Self::OpenElapsed,
        Self::ProbeFailed,
        Self::ProbeTimedOut,
        Self::ProbesSucceeded,
        Self::Inconclusive,
        Self::Ordered,
        Self::Auto,
        Self::Expired,
        Self::Reset,
    ];

    /// The cause of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cause| cause.as_str() == name)
    }

    /// A stable name, fit for a row or a label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FailureRun => "FAILURE_RUN",
            Self::FailureRate => "FAILURE_RATE",
            Self::SlowRate => "SLOW_RATE",
            Self::ServerHint => "SERVER_HINT",
            Self::Tripped => "TRIPPED",
            Self::OpenElapsed => "OPEN_ELAPSED",
            Self::ProbeFailed => "PROBE_FAILED",
            Self::ProbeTimedOut => "PROBE_TIMED_OUT",
            Self::ProbesSucceeded => "PROBES_SUCCEEDED",
            Self::Inconclusive => "INCONCLUSIVE",
            Self::Ordered => "ORDERED",
            Self::Auto => "AUTO",
            Self::Expired => "EXPIRED",
            Self::Reset => "RESET",
        }
    }
}

/// One move of a breaker, to be stored, logged or announced by whoever made it happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transition {
    /// The state left.
    pub from: State,
    /// The state entered.
    pub to: State,
    /// Why.
    pub cause: Cause,
    /// The epoch that begins with it.
    pub epoch: u64,
}

/// What became of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tally {
    /// It counted in the present epoch.
    Counted,
    /// Its permit belongs to another epoch, or its slot is gone: only `late_ok` or `late_err` rose.
    Late,
    /// Nothing to count: a neutral sample, or a disabled breaker.
    Uncounted,
}

/// The answer to a recorded sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// What became of it.
    pub tally: Tally,
    /// The move it caused, or that was due by time before it.
    pub transition: Option<Transition>,
    /// In [`State::Observe`]: this result would have opened the breaker.
    pub would_open: bool,
}

impl Recorded {
    /// Whether the sample counted in the present epoch.
    #[must_use]
    pub const fn counted(&self) -> bool {
        matches!(self.tally, Tally::Counted)
    }

    /// Whether the sample came too late to count.
    #[must_use]
    pub const fn late(&self) -> bool {
        matches!(self.tally, Tally::Late)
    }

    pub(crate) const fn quiet(tally: Tally) -> Self {
        Self { tally, transition: None, would_open: false }
    }
}

/// Who ordered a forced state, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The person or program.
    pub actor: String,
    /// In their words.
    pub reason: String,
}

/// What a breaker has seen since it was made. Saturating, never reset; a disabled breaker adds nothing
/// but late results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Permits given.
    pub calls: u64,
    /// Successes that counted.
    pub successes: u64,
    /// Failures that counted.
    pub failures: u64,
    /// Calls refused.
    pub rejections: u64,
    /// Successes that came after their epoch had ended.
    pub late_ok: u64,
    /// Failures that came after their epoch had ended.
    pub late_err: u64,
    /// Moves from a state to a state.
    pub transitions: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_names_read_back() {
        for state in State::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            assert_eq!(state.to_string(), state.as_str());
        }
        let unknown = "Closed".parse::<State>().expect_err("names are exact");
        assert_eq!(unknown.to_string(), "\"Closed\" is no breaker state");
    }

    #[test]
    fn rejection_says_when_to_come_back() {
        let mut rejected =
            Rejected { retry_after: Some(Duration::from_secs(7)), cause: RejectCause::Open, epoch: 1 };
        assert_eq!(rejected.to_string(), "the breaker is open; come back in 7s");
        rejected.retry_after = None;
        rejected.cause = RejectCause::ForcedOpen;
        assert_eq!(rejected.to_string(), "the breaker is forced open");
    }
}
