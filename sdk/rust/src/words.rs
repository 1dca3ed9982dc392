//! The words of the wire as people read and type them: `QUEUED` for `TASK_STATE_QUEUED`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;

use crate::error::Error;
use crate::v1;

/// A word that is none of those expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is not known; expected one of {expected}")]
pub struct UnknownWord {
    /// What was given.
    pub word: String,
    /// The words that are known, separated by commas.
    pub expected: String,
}

macro_rules! words {
    ($($name:ident $prefix:literal $last:ident;)*) => {$(
        impl v1::$name {
            /// Its word without the prefix of the wire, in UPPER_SNAKE.
            pub fn word(self) -> &'static str {
                let name = self.as_str_name();
                name.strip_prefix($prefix).unwrap_or(name)
            }

            /// Every value but the unspecified one, in the order of the wire.
            pub fn all() -> impl Iterator<Item = Self> {
                (1..=Self::$last as i32).filter_map(|number| Self::try_from(number).ok())
            }
        }

        impl fmt::Display for v1::$name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.word())
            }
        }

        impl FromStr for v1::$name {
            type Err = UnknownWord;

            /// Reads a word in any case, with `-` or `_` between its parts.
            fn from_str(text: &str) -> Result<Self, UnknownWord> {
                let word = text.trim().to_ascii_uppercase().replace('-', "_");
                Self::all().find(|value| value.word() == word).ok_or_else(|| UnknownWord {
                    word: text.to_owned(),
                    expected: Self::all().map(Self::word).collect::<Vec<_>>().join(", "),
                })
            }
        }
    )*};
}

words! {
    TaskState "TASK_STATE_" Cancelled;
    JitterKind "JITTER_KIND_" Decorrelated;
    StopCause "STOP_CAUSE_" Preempt;
    ErrorClass "ERROR_CLASS_" Permanent;
    UniqueScope "UNIQUE_SCOPE_" WhileActive;
    BatchMode "BATCH_MODE_" Atomic;
    BreakerState "BREAKER_STATE_" HalfOpen;
    ReleaseCause "RELEASE_CAUSE_" Preempted;
    GateKind "GATE_KIND_" Draining;
}

impl v1::TaskState {
    /// Whether a task in this state has ended. A FAILED one can be redriven.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

impl v1::Task {
    /// The result of an ended task that was read with its data.
    ///
    /// # Errors
    ///
    /// [`Error::TaskFailed`] and [`Error::TaskCancelled`] for tasks that ended so; [`Error::Timeout`] for a task that
    /// has not ended.
    pub fn into_result(self) -> Result<Bytes, Error> {
        match self.state() {
            v1::TaskState::Done => Ok(self.result),
            v1::TaskState::Failed => Err(Error::TaskFailed { task: Box::new(self) }),
            v1::TaskState::Cancelled => Err(Error::TaskCancelled { task: Box::new(self) }),
            state => Err(Error::Timeout { message: format!("task {} is still {state}", self.task_id) }),
        }
    }
}

/// A span of the wire; nothing, or a negative one, is zero.
pub(crate) fn span(wire: Option<prost_types::Duration>) -> Duration {
    wire.and_then(|wire| Duration::try_from(wire).ok()).unwrap_or_default()
}

/// A span for the wire, at most some 292 billion years.
pub(crate) fn wire_span(span: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(span.subsec_nanos()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lose_their_prefix_and_are_read_in_any_case() {
        assert_eq!(v1::TaskState::Queued.to_string(), "QUEUED");
        assert_eq!(format!("{:>6}|", v1::TaskState::Done), "  DONE|");
        assert_eq!("half-open".parse(), Ok(v1::BreakerState::HalfOpen));
        assert_eq!(" Cancelled".parse(), Ok(v1::TaskState::Cancelled));
        let error = "unspecified".parse::<v1::TaskState>().unwrap_err();
        assert_eq!(error.expected, "QUEUED, RUNNING, RETRY, BLOCKED, DONE, FAILED, CANCELLED");
    }

    #[test]
    fn every_value_is_listed_once() {
        assert_eq!(v1::TaskState::all().count(), 7);
        assert_eq!(v1::ErrorClass::all().count(), 6);
        assert_eq!(v1::StopCause::all().count(), 5);
        assert_eq!(v1::JitterKind::all().count(), 5);
        assert_eq!(v1::GateKind::all().count(), 11);
    }

    #[test]
    fn three_states_are_terminal() {
        let ends: Vec<_> = v1::TaskState::all().filter(|state| state.is_terminal()).collect();
        assert_eq!(ends, [v1::TaskState::Done, v1::TaskState::Failed, v1::TaskState::Cancelled]);
    }

    #[test]
    fn spans_survive_the_wire_and_negative_ones_are_zero() {
        let span_in = Duration::new(3, 700);
        assert_eq!(span(Some(wire_span(span_in))), span_in);
        assert_eq!(span(Some(prost_types::Duration { seconds: -1, nanos: 0 })), Duration::ZERO);
        assert_eq!(span(None), Duration::ZERO);
    }

    #[test]
    fn an_ended_task_gives_its_result_or_its_failure() {
        let task = |state: v1::TaskState| v1::Task { state: state as i32, ..Default::default() };
        assert!(task(v1::TaskState::Done).into_result().is_ok());
        assert!(matches!(task(v1::TaskState::Failed).into_result(), Err(Error::TaskFailed { .. })));
        assert!(matches!(task(v1::TaskState::Cancelled).into_result(), Err(Error::TaskCancelled { .. })));
        assert!(matches!(task(v1::TaskState::Running).into_result(), Err(Error::Timeout { .. })));
    }
}
