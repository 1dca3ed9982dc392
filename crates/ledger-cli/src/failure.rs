//! How a command ends when it does not end well: one sentence for people, one exit code for scripts.

use std::error::Error as _;
use std::io;
use std::process::ExitCode;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::time::show_duration;

/// Exit codes of the client commands, the same for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Anything that has no code of its own.
    Failure = 1,
    /// The command line, or what it named, is not understood.
    Usage = 2,
    /// What was named does not exist.
    NotFound = 3,
    /// No ledgerd answered.
    Unreachable = 4,
    /// The task that was waited for ended as FAILED or CANCELLED.
    TaskFailed = 5,
    /// The time given for waiting is over; as of `timeout(1)`.
    Timeout = 124,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what it was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Who reads our output went away: nothing more to say, and no error.
    Quiet,
    /// No ledgerd answered; the address is added where it is known.
    Unreachable(String),
    /// One sentence, with its hint.
    Said(Exit, String),
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self::Said(exit, message.into())
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// The sentence to print, if there is one.
    pub(crate) fn sentence(&self, address: &str) -> Option<String> {
        match self {
            Self::Quiet => None,
            Self::Unreachable(cause) => Some(format!(
                "cannot reach ledgerd at {address}: {}; `ledgerd dev` starts one, --address names another",
                without_number(cause)
            )),
            Self::Said(_, message) => Some(message.clone()),
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Quiet => ExitCode::SUCCESS,
            Self::Unreachable(_) => Exit::Unreachable.into(),
            Self::Said(exit, _) => (*exit).into(),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::Quiet;
        }
        Self::new(Exit::Failure, error.to_string())
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let info = status.get_details_error_info();
        // Without our own error detail it was the transport that spoke, whatever it says it was.
        if status.code() == Code::Unavailable && info.is_none() {
            return Self::Unreachable(root_cause(&status));
        }
        let mut message = status.message().to_owned();
        if message.is_empty() {
            message = status.code().description().to_lowercase();
        }
        if let Some(bad) = status.get_details_bad_request()
            && let Some(violation) = bad.field_violations.first()
            && !violation.field.is_empty()
            && !message.contains(&violation.field)
        {
            message = format!("{}: {message}", violation.field);
        }
        if let Some(info) = info {
            message = format!("{message} ({})", info.reason);
        }
        if let Some(delay) = status.get_details_retry_info().and_then(|retry| retry.retry_delay) {
            message = format!("{message}; try again in {}", show_duration(delay));
        }
        Self::new(exit_of(status.code()), message)
    }
}

/// The exit code for a refusal.
pub(crate) fn exit_of(code: Code) -> Exit {
    match code {
        Code::InvalidArgument => Exit::Usage,
        Code::NotFound => Exit::NotFound,
        Code::Unavailable => Exit::Unreachable,
        Code::DeadlineExceeded => Exit::Timeout,
        _ => Exit::Failure,
    }
}

/// "connection refused (os error 111)" says nothing more to a person with its number.
fn without_number(cause: &str) -> &str {
    cause.split_once(" (os error ").map_or(cause, |(text, _)| text)
}

/// What the transport says last is what a person can act upon: "connection refused", not "transport error".
fn root_cause(status: &Status) -> String {
    let mut cause = status.message().to_owned();
    let mut source = status.source();
    while let Some(error) = source {
        cause = error.to_string();
        source = error.source();
    }
    cause.to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic_types::ErrorDetails;

    use super::*;

    fn ours(code: Code, reason: &str) -> Status {
        let details = ErrorDetails::with_error_info(reason, "ledgerd", []);
        Status::with_error_details(code, "No such task.", details)
    }

    #[test]
    fn each_refusal_has_its_exit_code() {
        for (code, exit) in [
            (Code::InvalidArgument, Exit::Usage),
            (Code::NotFound, Exit::NotFound),
            (Code::Unavailable, Exit::Unreachable),
            (Code::DeadlineExceeded, Exit::Timeout),
            (Code::FailedPrecondition, Exit::Failure),
            (Code::AlreadyExists, Exit::Failure),
            (Code::ResourceExhausted, Exit::Failure),
            (Code::Internal, Exit::Failure),
            (Code::Unknown, Exit::Failure),
        ] {
            let Failure::Said(found, _) = Failure::from(ours(code, "WHY")) else { panic!("{code:?}") };
            assert_eq!(found, exit, "{code:?}");
        }
    }

    #[test]
    fn exit_codes_are_the_documented_numbers() {
        let numbers =
            [Exit::Failure, Exit::Usage, Exit::NotFound, Exit::Unreachable, Exit::TaskFailed, Exit::Timeout];
        assert_eq!(numbers.map(|exit| exit as u8), [1, 2, 3, 4, 5, 124]);
    }

    #[test]
    fn a_refusal_is_told_with_its_reason_and_hint() {
        let failure = Failure::from(ours(Code::NotFound, "TASK_NOT_FOUND"));
        assert_eq!(failure.sentence("x").as_deref(), Some("No such task. (TASK_NOT_FOUND)"));

        let mut details = ErrorDetails::with_error_info("QUEUE_FULL", "ledgerd", []);
        details.set_retry_info(Some(Duration::from_millis(1_500)));
        let full = Status::with_error_details(Code::ResourceExhausted, "The queue is full", details);
        let sentence = Failure::from(full).sentence("x");
        assert_eq!(sentence.as_deref(), Some("The queue is full (QUEUE_FULL); try again in 1s500ms"));

        let mut details = ErrorDetails::with_error_info("INVALID", "ledgerd", []);
        details.add_bad_request_violation("task.priority", "is not 0 to 9");
        let bad = Status::with_error_details(Code::InvalidArgument, "Give a number from 0 to 9", details);
        let sentence = Failure::from(bad).sentence("x");
        assert_eq!(sentence.as_deref(), Some("task.priority: Give a number from 0 to 9 (INVALID)"));
    }

    #[test]
    fn silence_names_the_address_and_what_to_do() {
        let failure = Failure::from(Status::unavailable("Connection refused (os error 111)"));
        let sentence = failure.sentence("127.0.0.1:7420").expect("a sentence");
        assert!(
            sentence.starts_with("cannot reach ledgerd at 127.0.0.1:7420: connection refused;"),
            "{sentence}"
        );
    }

    #[test]
    fn a_reader_that_goes_away_is_no_error() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((failure.sentence("x"), failure), (None, Failure::Quiet));
    }
}
