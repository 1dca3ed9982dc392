//! How a handler says that a task did not get done.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::limits::{self, head};
use crate::v1;
use crate::v1::outcome::Outcome;
use crate::words::wire_span;

/// Why a handler did not complete its task, and what is to become of it.
///
/// Any error can be turned into one with `?`; it then counts as [retryable](TaskError::retryable) of class
/// [`Unknown`](v1::ErrorClass::Unknown). Texts over their limits are cut.
#[derive(Debug, Clone)]
pub struct TaskError(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Fail { error: Box<v1::TaskError>, retry_after: Option<Duration> },
    Release { delay: Option<Duration> },
    Block { question: String, until: Option<SystemTime> },
    Cancelled,
}

impl TaskError {
    /// The attempt failed and another one may succeed: class `Transient`.
    pub fn retryable(message: impl Into<String>) -> Self {
        Self::of(v1::ErrorClass::Transient, message)
    }

    /// No attempt will ever succeed: class `Permanent`. The task ends as FAILED.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self::of(v1::ErrorClass::Permanent, message)
    }

    /// As [`TaskError::retryable`], and the other side wants to be asked again after `delay` at the earliest.
    pub fn retry_after(delay: Duration, message: impl Into<String>) -> Self {
        Self::retryable(message).hint(delay)
    }

    /// Adds to a failure when the other side wants to be asked again at the earliest; does nothing to the other kinds.
    pub fn hint(mut self, delay: Duration) -> Self {
        if let Kind::Fail { retry_after, .. } = &mut self.0 {
            *retry_after = Some(delay);
        }
        self
    }

    /// Something took too long: class `Timeout`. Retried at twice the price from the retry budget.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::of(v1::ErrorClass::Timeout, message)
    }

    /// The other side is overloaded or limits the rate: class `Overloaded`. Retried.
    pub fn overloaded(message: impl Into<String>) -> Self {
        Self::of(v1::ErrorClass::Overloaded, message)
    }

    /// The attempt failed in the way that `class` says.
    pub fn of(class: v1::ErrorClass, message: impl Into<String>) -> Self {
        let error = v1::TaskError { class: class as i32, message: message.into(), ..Default::default() };
        Self(Kind::Fail { error: Box::new(error), retry_after: None })
    }

    /// Gives the task back undone, with its checkpoint; no retry is spent. The ledger waits a while before it offers the
    /// task again, and gives up on a task that nobody wants.
    pub fn release() -> Self {
        Self(Kind::Release { delay: None })
    }

    /// As [`TaskError::release`], not to be offered again before `delay` has passed, at most 366 days.
    pub fn release_for(delay: Duration) -> Self {
        Self(Kind::Release { delay: Some(delay.min(limits::MAX_AHEAD)) })
    }

    /// Lets the task wait for a person or an event, with its checkpoint and without taking a slot. `question` has 1 byte
    /// to 4 KiB. It goes on by itself at `until`, at least 1 s ahead; without that only when unblocked.
    pub fn block(question: impl Into<String>, until: Option<SystemTime>) -> Self {
        Self(Kind::Block { question: question.into(), until })
    }

    /// The handler ended because it was [asked to](crate::Context::cancelled). When nobody asked, it is a failure.
    pub fn cancelled() -> Self {
        Self(Kind::Cancelled)
    }

    /// Sets the class of a failure; does nothing to the other kinds.
    pub fn class(self, class: v1::ErrorClass) -> Self {
        self.edit(|error| error.class = class as i32)
    }

    /// Sets a short code of the worker's own, at most 128 bytes; does nothing but to failures.
    pub fn code(self, code: impl Into<String>) -> Self {
        self.edit(|error| error.code = code.into())
    }

    /// Adds a trace or the end of a log, at most 16 KiB; does nothing but to failures.
    pub fn detail(self, detail: impl Into<String>) -> Self {
        self.edit(|error| error.detail = detail.into())
    }

    fn edit(mut self, edit: impl FnOnce(&mut v1::TaskError)) -> Self {
        if let Kind::Fail { error, .. } = &mut self.0 {
            edit(error);
        }
        self
    }

    /// The class of a failure in lower case; none where it is none.
    pub(crate) fn failure(&self) -> Option<String> {
        match &self.0 {
            Kind::Fail { error, .. } => Some(error.class().word().to_ascii_lowercase()),
            _ => None,
        }
    }

    /// The outcome for the ledger, given whether and why the task was asked to stop.
    pub(crate) fn into_outcome(self, stop: Option<v1::StopCause>) -> Outcome {
        match self.0 {
            Kind::Fail { error, retry_after } => Outcome::Fail(v1::Fail {
                error: Some(v1::TaskError {
                    class: error.class,
                    code: head(error.code, limits::MAX_ERROR_CODE_BYTES),
                    message: head(error.message, limits::MAX_ERROR_MESSAGE_BYTES),
                    detail: head(error.detail, limits::MAX_ERROR_DETAIL_BYTES),
                }),
                retry_after: retry_after.map(|delay| wire_span(delay.min(limits::MAX_AHEAD))),
            }),
            Kind::Release { delay } => Outcome::Release(v1::Release {
                cause: v1::ReleaseCause::Declined as i32,
                delay: delay.map(wire_span),
                checkpoint: None,
            }),
            Kind::Block { question, until } => {
                let question = if question.is_empty() { "?".to_owned() } else { question };
                Outcome::Block(v1::Block {
                    question: head(question, limits::MAX_ERROR_MESSAGE_BYTES),
                    until: until.map(Into::into),
                    checkpoint: None,
                })
            }
            Kind::Cancelled => match stop {
                Some(cause) => stopped(cause),
                None => Self::of(v1::ErrorClass::Unknown, "the handler stopped though nobody asked it to")
                    .into_outcome(None),
            },
        }
    }
}

/// What becomes of a task that ended because it was asked to: one that made room goes back, with its checkpoint.
pub(crate) fn stopped(cause: v1::StopCause) -> Outcome {
    match cause {
        v1::StopCause::Preempt => given_back(v1::ReleaseCause::Preempted),
        _ => Outcome::Cancelled(v1::Cancelled {}),
    }
}

pub(crate) fn given_back(cause: v1::ReleaseCause) -> Outcome {
    Outcome::Release(v1::Release { cause: cause as i32, delay: None, checkpoint: None })
}

impl fmt::Display for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Fail { error, .. } => write!(f, "{} ({})", error.message, error.class()),
            Kind::Release { .. } => f.write_str("given back"),
            Kind::Block { question, .. } => write!(f, "waits: {question}"),
            Kind::Cancelled => f.write_str("cancelled"),
        }
    }
}

/// So that `?` works on any error in a handler. This is why [`TaskError`] is no [`std::error::Error`] itself.
impl<E: std::error::Error> From<E> for TaskError {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(next) = cause {
            let text = next.to_string();
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
            cause = next.source();
        }
        Self::of(v1::ErrorClass::Unknown, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(error: TaskError) -> v1::Fail {
        match error.into_outcome(None) {
            Outcome::Fail(fail) => fail,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn failures_carry_class_code_and_detail_within_their_limits() {
        let fail = failure(
            TaskError::retry_after(Duration::from_secs(3), "m".repeat(5_000))
                .class(v1::ErrorClass::Overloaded)
                .code("c".repeat(200))
                .detail("d".repeat(20_000)),
        );
        let error = fail.error.unwrap();
        assert_eq!(error.class(), v1::ErrorClass::Overloaded);
        assert_eq!((error.code.len(), error.message.len(), error.detail.len()), (128, 4_096, 16_384));
        assert_eq!(fail.retry_after.unwrap().seconds, 3);
        assert_eq!(failure(TaskError::fatal("x")).error.unwrap().class(), v1::ErrorClass::Permanent);
        assert_eq!(failure(TaskError::timeout("x")).error.unwrap().class(), v1::ErrorClass::Timeout);
    }

    #[test]
    fn any_error_becomes_a_failure_of_unknown_class() {
        let parse = || -> Result<u8, TaskError> { Ok("x".parse::<u8>()?) };
        let error = failure(parse().unwrap_err()).error.unwrap();
        assert_eq!(error.class(), v1::ErrorClass::Unknown);
        assert_eq!(error.message, "invalid digit found in string");
    }

    #[test]
    fn a_cancelled_handler_answers_the_stop_it_got() {
        let user = TaskError::cancelled().into_outcome(Some(v1::StopCause::User));
        assert_eq!(user, Outcome::Cancelled(v1::Cancelled {}));
        let preempt = TaskError::cancelled().into_outcome(Some(v1::StopCause::Preempt));
        assert_eq!(preempt, given_back(v1::ReleaseCause::Preempted));
        assert_eq!(failure(TaskError::cancelled()).error.unwrap().class(), v1::ErrorClass::Unknown);
    }

    #[test]
    fn a_question_is_never_empty() {
        let Outcome::Block(block) = TaskError::block("", None).into_outcome(None) else { panic!("no block") };
        assert_eq!(block.question, "?");
    }
}
