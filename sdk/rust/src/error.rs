//! What can go wrong for a caller, by name.
//!
//! Every answer of the daemon carries a reason in UPPER_SNAKE; it is kept beside the text, for programs to match on.

use std::error::Error as _;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::connection::root_cause;
use crate::v1;

/// Who a reason comes from: the daemon, and not a proxy between.
const DOMAIN: &str = "ledgerd";
const OUTCOME_UNKNOWN: &str = "OUTCOME_UNKNOWN";

/// One field that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field in the request, for instance `tasks[3].agent`.
    pub field: String,
    /// What it must be.
    pub description: String,
}

/// Why a call did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something of that name is not there.
    #[error("{message}")]
    NotFound {
        /// The daemon's reason, for instance `TASK_NOT_FOUND`; empty when there is none.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// The request cannot be accepted as it is, whatever the state of the ledger.
    #[error("{message}")]
    InvalidArgument {
        /// One sentence.
        message: String,
        /// The fields at fault, when they are known.
        violations: Vec<Violation>,
    },
    /// A payload, result, checkpoint or message is over its limit.
    #[error("the {what} has {bytes} bytes, over its limit of {limit}")]
    PayloadTooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size in bytes; 0 when the daemon refused it.
        bytes: usize,
        /// The limit in bytes; 0 when the daemon refused it.
        limit: usize,
    },
    /// The key is taken by something with other content.
    #[error("{message}")]
    AlreadyExists {
        /// The daemon's reason.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// The state of the task or agent does not allow it.
    #[error("{message}")]
    FailedPrecondition {
        /// The daemon's reason, for instance `TASK_TERMINAL` or `LEASE_LOST`.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// A queue, disk or limit is full.
    #[error("{message}")]
    ResourceExhausted {
        /// The daemon's reason.
        reason: String,
        /// One sentence.
        message: String,
        /// When it is worth trying again, when the daemon said so.
        retry_after: Option<Duration>,
    },
    /// The daemon could not be reached or does not serve yet; the client tried [again](crate#retries) in vain.
    #[error("{message}")]
    Unavailable {
        /// The daemon's reason; empty when the transport spoke, and then the call may have been carried out.
        reason: String,
        /// One sentence.
        message: String,
        /// When it is worth trying again, when the daemon said so.
        retry_after: Option<Duration>,
    },
    /// The daemon cannot say whether the call was carried out. Safe to repeat with the same request id.
    #[error("{message}")]
    OutcomeUnknown {
        /// One sentence.
        message: String,
    },
    /// A certificate, key or token cannot be used.
    #[error("{message}")]
    Credentials {
        /// One sentence.
        message: String,
    },
    /// The caller is not known, or may not do this.
    #[error("{message}")]
    Denied {
        /// `UNAUTHENTICATED` or `PERMISSION_DENIED`.
        code: Code,
        /// One sentence.
        message: String,
    },
    /// Time ran out before an answer or before the task ended.
    #[error("{message}")]
    Timeout {
        /// One sentence.
        message: String,
    },
    /// The task ended as FAILED.
    #[error("task {} failed: {}", task.task_id, why(task))]
    TaskFailed {
        /// The task with its reason and last error.
        task: Box<v1::Task>,
    },
    /// The task ended as CANCELLED.
    #[error("task {} was cancelled", task.task_id)]
    TaskCancelled {
        /// The task.
        task: Box<v1::Task>,
    },
    /// A payload or result is not what its type says.
    #[error("cannot convert the {what}: {source}")]
    Codec {
        /// What could not be converted.
        what: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The address is not `host:port` or an `http://` address.
    #[error("{address:?} is no address: {message}")]
    Address {
        /// What was given.
        address: String,
        /// What it should be.
        message: String,
    },
    /// The operating system refused, for instance to watch for signals.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Any other answer.
    #[error("{code:?}: {message}")]
    Rpc {
        /// The gRPC code.
        code: Code,
        /// The daemon's reason; empty when there is none.
        reason: String,
        /// One sentence.
        message: String,
    },
}

impl Error {
    /// The daemon's reason in UPPER_SNAKE, when it gave one.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::NotFound { reason, .. }
            | Self::AlreadyExists { reason, .. }
            | Self::FailedPrecondition { reason, .. }
            | Self::ResourceExhausted { reason, .. }
            | Self::Unavailable { reason, .. }
            | Self::Rpc { reason, .. } => Some(reason.as_str()).filter(|reason| !reason.is_empty()),
            Self::OutcomeUnknown { .. } => Some(OUTCOME_UNKNOWN),
            Self::TaskFailed { task } => Some(&task.reason),
            _ => None,
        }
    }

    /// When the daemon asked to be called again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::ResourceExhausted { retry_after, .. } | Self::Unavailable { retry_after, .. } => {
                *retry_after
            }
            _ => None,
        }
    }

    pub(crate) fn invalid(field: &str, description: &str) -> Self {
        Self::InvalidArgument {
            message: format!("{field} {description}"),
            violations: vec![Violation { field: field.to_owned(), description: description.to_owned() }],
        }
    }

    /// The same fault, told of one task of a batch.
    pub(crate) fn in_item(self, index: usize) -> Self {
        match self {
            Self::InvalidArgument { message, mut violations } => {
                for violation in &mut violations {
                    violation.field = format!("tasks[{index}].{}", violation.field);
                }
                Self::InvalidArgument { message: format!("tasks[{index}]: {message}"), violations }
            }
            other => other,
        }
    }

    fn named(code: Code, reason: String, message: String) -> Self {
        if matches!(reason.as_str(), "PAYLOAD_TOO_LARGE" | "MESSAGE_TOO_LARGE") {
            let what = if reason == "PAYLOAD_TOO_LARGE" { "payload" } else { "message" };
            return Self::PayloadTooLarge { what, bytes: 0, limit: 0 };
        }
        match code {
            Code::NotFound => Self::NotFound { reason, message },
            Code::AlreadyExists => Self::AlreadyExists { reason, message },
            Code::FailedPrecondition => Self::FailedPrecondition { reason, message },
            Code::InvalidArgument => Self::InvalidArgument { message, violations: Vec::new() },
            Code::ResourceExhausted => Self::ResourceExhausted { reason, message, retry_after: None },
            Code::Unavailable => Self::Unavailable { reason, message, retry_after: None },
            Code::Unauthenticated | Code::PermissionDenied => Self::Denied { code, message },
            Code::DeadlineExceeded => Self::Timeout { message },
            Code::Unknown if reason == OUTCOME_UNKNOWN => Self::OutcomeUnknown { message },
            _ => Self::Rpc { code, reason, message },
        }
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
        let hint = details.retry_info().and_then(|info| info.retry_delay);
        let message = if status.message().is_empty() {
            format!("the call ended with {:?}", status.code())
        } else if let Some(cause) = status.source() {
            // The transport spoke, and says little itself: a certificate that the daemon misses, for instance.
            format!("{}: {}", status.message(), root_cause(cause))
        } else {
            status.message().to_owned()
        };
        let mut error = if is_local_timeout(&status) {
            Self::Timeout { message: "the call got no answer in its time".to_owned() }
        } else {
            Self::named(status.code(), reason, message)
        };
        match &mut error {
            Self::InvalidArgument { violations, .. } => {
                let bad =
                    details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
                violations.extend(bad.iter().map(|violation| Violation {
                    field: violation.field.clone(),
                    description: violation.description.clone(),
                }));
            }
            Self::ResourceExhausted { retry_after, .. } | Self::Unavailable { retry_after, .. } => {
                *retry_after = hint;
            }
            _ => {}
        }
        error
    }
}

impl From<v1::ItemError> for Error {
    fn from(item: v1::ItemError) -> Self {
        let v1::ItemError { code, reason, message, field } = item;
        match Self::named(Code::from_i32(code), reason, message) {
            Self::InvalidArgument { message, .. } if !field.is_empty() => {
                let violations = vec![Violation { field, description: message.clone() }];
                Self::InvalidArgument { message, violations }
            }
            other => other,
        }
    }
}

/// Whether the same call may be sent again: nothing was written, or its request id makes a second one harmless.
pub(crate) fn is_repeatable(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable => true,
        Code::Unknown if reason_of(status).as_deref() == Some(OUTCOME_UNKNOWN) => true,
        // The transport spoke, not the daemon: the connection broke or the call timed out half-way.
        Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded => {
            reason_of(status).is_none() && (status.source().is_some() || is_local_timeout(status))
        }
        _ => false,
    }
}

/// The daemon's reason.
pub(crate) fn reason_of(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN).then_some(info.reason)
}

/// The transport ends a call whose time is over with CANCELLED, which is also what a peer's reset looks like.
fn is_local_timeout(status: &Status) -> bool {
    status.code() == Code::DeadlineExceeded
        || (status.code() == Code::Cancelled && status.message().contains("Timeout expired"))
}

fn why(task: &v1::Task) -> String {
    match &task.last_error {
        Some(error) if !error.message.is_empty() => format!("{} ({})", error.message, task.reason),
        _ => task.reason.clone(),
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::{ErrorDetails, StatusExt};

    use super::*;

    fn named(code: Code, reason: &str) -> Status {
        let details = ErrorDetails::with_error_info(reason, DOMAIN, []);
        Status::with_error_details(code, "do this", details)
    }

    #[test]
    fn codes_become_named_errors_with_their_reason() {
        let error = Error::from(named(Code::FailedPrecondition, "TASK_TERMINAL"));
        assert!(matches!(&error, Error::FailedPrecondition { reason, .. } if reason == "TASK_TERMINAL"));
        assert_eq!(error.reason(), Some("TASK_TERMINAL"));
        assert_eq!(error.to_string(), "do this");
        assert!(matches!(Error::from(named(Code::NotFound, "TASK_NOT_FOUND")), Error::NotFound { .. }));
        assert!(matches!(Error::from(named(Code::AlreadyExists, "KEY_REUSED")), Error::AlreadyExists { .. }));
        assert!(matches!(Error::from(named(Code::Unknown, OUTCOME_UNKNOWN)), Error::OutcomeUnknown { .. }));
        assert!(matches!(Error::from(Status::unauthenticated("who")), Error::Denied { .. }));
        assert!(matches!(Error::from(Status::data_loss("x")), Error::Rpc { code: Code::DataLoss, .. }));
        assert!(matches!(
            Error::from(named(Code::InvalidArgument, "PAYLOAD_TOO_LARGE")),
            Error::PayloadTooLarge { .. }
        ));
    }

    #[test]
    fn fields_and_hints_are_kept() {
        let mut details = ErrorDetails::with_bad_request_violation("task.agent", "must match");
        details.set_error_info("INVALID_AGENT", DOMAIN, []);
        let status = Status::with_error_details(Code::InvalidArgument, "bad agent", details);
        let Error::InvalidArgument { violations, .. } = Error::from(status) else { panic!("other error") };
        assert_eq!(violations, [Violation { field: "task.agent".into(), description: "must match".into() }]);

        let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(700)));
        let status = Status::with_error_details(Code::ResourceExhausted, "full", details);
        assert_eq!(Error::from(status).retry_after(), Some(Duration::from_millis(700)));
    }

    #[test]
    fn only_harmless_repeats_are_repeatable() {
        assert!(is_repeatable(&Status::unavailable("starting")));
        assert!(is_repeatable(&named(Code::Unavailable, "STARTING")));
        assert!(is_repeatable(&named(Code::Unknown, OUTCOME_UNKNOWN)));
        assert!(is_repeatable(&Status::cancelled("Timeout expired")));
        assert!(!is_repeatable(&named(Code::Unknown, "SOMETHING")));
        assert!(!is_repeatable(&Status::unknown("said by the other side")));
        assert!(!is_repeatable(&named(Code::Internal, "BUG")));
        assert!(!is_repeatable(&named(Code::ResourceExhausted, "QUEUE_FULL")));
        assert!(!is_repeatable(&Status::cancelled("by the caller")));
    }

    #[test]
    fn an_item_error_names_its_field() {
        let item = v1::ItemError {
            code: 3,
            reason: "INVALID_AGENT".into(),
            message: "agent must match".into(),
            field: "agent".into(),
        };
        let Error::InvalidArgument { violations, .. } = Error::from(item) else { panic!("other error") };
        assert_eq!(violations[0].field, "agent");
    }
}
