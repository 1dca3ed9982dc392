//! The one place where errors become a [`Status`].
//!
//! Every status carries an ErrorInfo of domain `ledgerd` with an UPPER_SNAKE reason, and what else helps. UNAVAILABLE
//! from here promises that nothing was written. What went wrong inside is for the log alone.

use super::reasons::{self, Reason};
use super::wire::ItemError;
use crate::callers::{Permission, Role};
use crate::ledger::command::LedgerError;
use ledger_core::limits::ITEMS;
use ledger_core::store::StoreError;
use ledger_core::{Refusal, TaskId, Violation};
use std::collections::HashMap;
use std::time::Duration;
use tonic::Status;
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// Domain of every ErrorInfo.
pub(crate) const DOMAIN: &str = "ledgerd";

/// Most violations that a status lists. It travels in a header, and clients take about 8 KiB of those.
const LISTED: usize = 16;

/// What the wire says about an error: reason, and for whom.
struct Spoken {
    reason: Reason,
    facts: Vec<(&'static str, String)>,
    retry_after: Option<Duration>,
    resource: Option<(&'static str, String)>,
    /// Said instead of the error's own words, which are for the log.
    message: Option<&'static str>,
}

impl Spoken {
    const fn new(reason: Reason) -> Self {
        Self { reason, facts: Vec::new(), retry_after: None, resource: None, message: None }
    }

    fn fact(mut self, name: &'static str, value: &impl ToString) -> Self {
        self.facts.push((name, value.to_string()));
        self
    }

    const fn after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    fn resource(mut self, kind: &'static str, name: &impl ToString) -> Self {
        self.resource = Some((kind, name.to_string()));
        self
    }

    const fn saying(mut self, message: &'static str) -> Self {
        self.message = Some(message);
        self
    }
}

/// When to try again what will pass by itself.
const SOON: Duration = Duration::from_secs(1);

fn speak(error: &LedgerError) -> Spoken {
    match error {
        LedgerError::Invalid(_) => Spoken::new(reasons::INVALID_FIELD),
        LedgerError::UnknownTask(task) => {
            Spoken::new(reasons::TASK_NOT_FOUND).fact("task_id", task).resource("ledger.v1.Task", task)
        }
        LedgerError::UnknownAgent(agent) => {
            Spoken::new(reasons::AGENT_NOT_FOUND).fact("agent", agent).resource("ledger.v1.Agent", agent)
        }
        LedgerError::AgentForbidden(agent) => Spoken::new(reasons::AGENT_FORBIDDEN).fact("agent", agent),
        LedgerError::AgentRequired => Spoken::new(reasons::AGENT_REQUIRED),
        LedgerError::Refused(refusal) => match refusal {
            Refusal::UnknownFence => Spoken::new(reasons::UNKNOWN_FENCE),
            Refusal::WrongState(state) => Spoken::new(reasons::WRONG_STATE).fact("state", state),
            Refusal::LeaseLost => Spoken::new(reasons::LEASE_LOST),
            Refusal::TaskTerminal => Spoken::new(reasons::TASK_TERMINAL),
            Refusal::NotHolder => Spoken::new(reasons::NOT_HOLDER),
            Refusal::NotStopped => Spoken::new(reasons::STOP_NOT_REQUESTED),
            Refusal::BlockedByBreaker => Spoken::new(reasons::BLOCKED_BY_BREAKER),
            Refusal::OutcomeConflict => Spoken::new(reasons::OUTCOME_CONFLICT),
            Refusal::Discarded => Spoken::new(reasons::DISCARDED),
        },
        LedgerError::KeyConflict(task) => Spoken::new(reasons::KEY_REUSED_WITH_OTHER_CONTENT)
            .fact("task_id", task)
            .resource("ledger.v1.Task", task),
        LedgerError::RequestConflict => Spoken::new(reasons::REQUEST_ID_REUSED),
        LedgerError::Exhausted { retry_after, .. } => Spoken::new(reasons::EXHAUSTED).after(*retry_after),
        LedgerError::ResumeTooOld => Spoken::new(reasons::RESUME_TOO_OLD),
        LedgerError::WorkerIdInUse(worker) => {
            Spoken::new(reasons::WORKER_ID_IN_USE).fact("worker_id", worker)
        }
        LedgerError::WorkerSuperseded(worker) => {
            Spoken::new(reasons::WORKER_SUPERSEDED).fact("worker_id", worker)
        }
        LedgerError::SessionEnded => Spoken::new(reasons::SUPERSEDED),
        LedgerError::Draining => Spoken::new(reasons::DRAINING).after(SOON),
        LedgerError::Short => speak(&LedgerError::Store(StoreError::Full)),
        LedgerError::Store(error) => match error {
            StoreError::Overtaken(_) | StoreError::Outdated(_) => Spoken::new(reasons::OVERTAKEN),
            StoreError::Full => Spoken::new(reasons::STORE_FULL)
                .after(Duration::from_secs(10))
                .saying("the disk of the ledger is full; free space there, then try again"),
            StoreError::Unavailable(_) => Spoken::new(reasons::STORE_UNAVAILABLE)
                .after(SOON)
                .saying("the store cannot be reached and nothing was written; try again"),
            StoreError::Unknown(_) => Spoken::new(reasons::OUTCOME_UNKNOWN)
                .saying("whether this was recorded is not known; repeat it with the same request_id"),
            StoreError::Statement(_) | StoreError::Corrupt(_) => {
                Spoken::new(reasons::INTERNAL).saying("the ledger could not do this; its log says why")
            }
        },
    }
}

/// The status of a call or stream that ended with `error`.
#[must_use]
pub(crate) fn status(error: &LedgerError) -> Status {
    if let LedgerError::Store(inside) = error {
        tracing::error!(error = %inside, "the store failed a call");
    }
    let spoken = speak(error);
    let mut details = details(spoken.reason, spoken.facts);
    if let LedgerError::Invalid(violations) = error {
        let listed = violations.iter().take(LISTED);
        details.set_bad_request(listed.map(|v| FieldViolation::new(&v.field, &v.rule)).collect::<Vec<_>>());
    }
    if let Some(delay) = spoken.retry_after {
        details.set_retry_info(Some(delay));
    }
    let message = spoken.message.map_or_else(|| error.to_string(), str::to_owned);
    if let Some((kind, name)) = spoken.resource {
        details.set_resource_info(kind, name, "", "");
    }
    Status::with_error_details(spoken.reason.code, message, details)
}

/// The refusal of one item of a call or frame; the same words as [`status`].
pub(super) fn item(error: &LedgerError) -> ItemError {
    let spoken = speak(error);
    let field = match error {
        LedgerError::Invalid(violations) => violations.first().map(|v| v.field.clone()).unwrap_or_default(),
        _ => String::new(),
    };
    ItemError {
        code: spoken.reason.code as i32,
        reason: spoken.reason.name.to_owned(),
        message: spoken.message.map_or_else(|| error.to_string(), str::to_owned),
        field,
    }
}

/// What only the rim can refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// A stream began with something else.
    HelloExpected,
    /// A stream said Hello again.
    HelloAgain,
    /// A stream did not begin in time.
    HelloMissing,
    /// A protocol that is not spoken here.
    ProtocolVersion(u32),
    /// A newer stream of the same process.
    Superseded,
    /// The other side does not read.
    Stalled,
    /// The time of a call is over.
    Deadline,
    /// `grpc-timeout` is no time.
    Timeout,
    /// The task has not failed.
    NoDeadLetter(TaskId),
    /// A handler panicked.
    Panic,
    /// A call without token and certificate.
    CredentialsMissing,
    /// An authorization header that is none, or several.
    CredentialsMalformed,
    /// A token or a certificate of nobody.
    CallerUnknown,
    /// Of nobody any more, while its stream was open.
    CallerRevoked,
    /// Agents of a stream are out of reach now.
    AgentsRevoked,
    /// The caller's roles do not allow it.
    RoleMissing(Permission),
    /// There is no such method.
    UnknownMethod,
    /// Messages of others take all the room there is.
    NoRoom,
    /// Half a message, and then nothing.
    Unfinished,
    /// A message that lists more than any call or frame may.
    TooManyItems,
    /// A call of one message says another.
    TooManyMessages,
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let (reason, message) = match refused {
            Refused::HelloExpected => {
                (reasons::HELLO_EXPECTED, "begin the stream with Hello".to_owned())
            }
            Refused::HelloAgain => (
                reasons::HELLO_AGAIN,
                "say Hello once; open a new stream to say it again".to_owned(),
            ),
            Refused::HelloMissing => {
                (reasons::HELLO_MISSING, "send Hello within 5 s of opening a stream".to_owned())
            }
            Refused::ProtocolVersion(version) => (
                reasons::PROTOCOL_VERSION,
                format!("protocol version {version} is not spoken here; use version 1"),
            ),
            Refused::Superseded => (
                reasons::SUPERSEDED,
                "a newer stream of this worker has taken over; use that one".to_owned(),
            ),
            Refused::Stalled => (
                reasons::STREAM_STALLED,
                "nothing was read from this stream for 30 s; open a new one and read it".to_owned(),
            ),
            Refused::Deadline => (
                reasons::DEADLINE_EXCEEDED,
                "no answer in time, and whether this was recorded is not known; repeat it with the same request_id"
                    .to_owned(),
            ),
            Refused::Timeout => (
                reasons::MALFORMED_TIMEOUT,
                "write grpc-timeout as up to 8 digits and one of H, M, S, m, u, n".to_owned(),
            ),
            Refused::CredentialsMissing => (
                reasons::CREDENTIALS_MISSING,
                "say who you are: send `authorization: Bearer TOKEN`, or connect with a certificate".to_owned(),
            ),
            Refused::CredentialsMalformed => (
                reasons::CREDENTIALS_MALFORMED,
                "send one header `authorization: Bearer TOKEN`".to_owned(),
            ),
            Refused::CallerUnknown => (
                reasons::CALLER_UNKNOWN,
                "this token or certificate belongs to no caller; ask whoever runs the daemon for one".to_owned(),
            ),
            Refused::CallerRevoked => (
                reasons::CALLER_REVOKED,
                "this token or certificate was taken back; ask whoever runs the daemon for another".to_owned(),
            ),
            Refused::AgentsRevoked => (
                reasons::AGENT_FORBIDDEN,
                "your rights do not reach every agent of this stream any more; open one for those they reach"
                    .to_owned(),
            ),
            Refused::RoleMissing(permission) => (
                reasons::ROLE_MISSING,
                format!("this takes the role {}", roles(permission)),
            ),
            Refused::UnknownMethod => {
                (reasons::UNKNOWN_METHOD, "there is no such method here".to_owned())
            }
            Refused::NoRoom => (
                reasons::NO_ROOM,
                "too many messages are on their way at once and nothing was done; try again, or send less at a time"
                    .to_owned(),
            ),
            Refused::Unfinished => (
                reasons::MESSAGE_UNFINISHED,
                "half a message came, and for 30 s no more of it; open a new stream".to_owned(),
            ),
            Refused::TooManyItems => (
                reasons::TOO_MANY_ITEMS,
                format!("the message lists too many things; send up to {ITEMS} items at a time"),
            ),
            Refused::TooManyMessages => (
                reasons::TOO_MANY_MESSAGES,
                "this method takes one message, and more came; end the call after it".to_owned(),
            ),
            Refused::NoDeadLetter(task) => (
                reasons::DEAD_LETTER_NOT_FOUND,
                format!("task {task} has no dead letter; only FAILED tasks have one"),
            ),
            Refused::Panic => {
                (reasons::INTERNAL, "the ledger could not do this; its log says why".to_owned())
            }
        };
        let facts = match refused {
            Refused::NoDeadLetter(task) => vec![("task_id", task.to_string())],
            _ => Vec::new(),
        };
        let mut details = details(reason, facts);
        if refused == Refused::NoRoom {
            details.set_retry_info(Some(SOON));
        }
        Self::with_error_details(reason.code, message, details)
    }
}

/// The roles that allow something: `producer or operator`.
fn roles(permission: Permission) -> String {
    let all = Role::ALL.into_iter().filter(|role| role.may(permission)).map(Role::as_str);
    all.collect::<Vec<_>>().join(" or ")
}

/// One violation as an error of the ledger.
pub(super) fn invalid(field: &str, rule: &str) -> LedgerError {
    LedgerError::Invalid(vec![Violation::new(field, rule)])
}

fn details(reason: Reason, facts: Vec<(&'static str, String)>) -> ErrorDetails {
    let facts: HashMap<String, String> =
        facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    ErrorDetails::with_error_info(reason.name, DOMAIN, facts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledger_core::State;
    use tonic::Code;

    #[test]
    fn every_error_has_its_code_and_reason() {
        use Code::*;
        let store = LedgerError::Store;
        let refused = LedgerError::Refused;
        let text = || "secret".to_owned();
        let table = [
            (invalid("task.agent", "say one"), InvalidArgument, "INVALID_FIELD"),
            (LedgerError::UnknownTask(TaskId(33)), NotFound, "TASK_NOT_FOUND"),
            (LedgerError::UnknownAgent("a".into()), NotFound, "AGENT_NOT_FOUND"),
            (LedgerError::AgentForbidden("a".into()), PermissionDenied, "AGENT_FORBIDDEN"),
            (LedgerError::AgentRequired, PermissionDenied, "AGENT_REQUIRED"),
            (refused(Refusal::LeaseLost), FailedPrecondition, "LEASE_LOST"),
            (refused(Refusal::TaskTerminal), FailedPrecondition, "TASK_TERMINAL"),
            (refused(Refusal::NotHolder), FailedPrecondition, "NOT_HOLDER"),
            (refused(Refusal::UnknownFence), InvalidArgument, "UNKNOWN_FENCE"),
            (refused(Refusal::NotStopped), FailedPrecondition, "STOP_NOT_REQUESTED"),
            (refused(Refusal::WrongState(State::Done)), FailedPrecondition, "WRONG_STATE"),
            (refused(Refusal::BlockedByBreaker), FailedPrecondition, "BLOCKED_BY_BREAKER"),
            (refused(Refusal::OutcomeConflict), FailedPrecondition, "OUTCOME_CONFLICT"),
            (refused(Refusal::Discarded), FailedPrecondition, "DISCARDED"),
            (LedgerError::KeyConflict(TaskId(33)), AlreadyExists, "KEY_REUSED_WITH_OTHER_CONTENT"),
            (LedgerError::RequestConflict, AlreadyExists, "REQUEST_ID_REUSED"),
            (
                LedgerError::Exhausted { what: "the queue", retry_after: Duration::from_millis(100) },
                ResourceExhausted,
                "EXHAUSTED",
            ),
            (LedgerError::ResumeTooOld, OutOfRange, "RESUME_TOO_OLD"),
            (LedgerError::WorkerIdInUse("w".into()), FailedPrecondition, "WORKER_ID_IN_USE"),
            (LedgerError::WorkerSuperseded("w".into()), Aborted, "WORKER_SUPERSEDED"),
            (LedgerError::SessionEnded, Aborted, "SUPERSEDED"),
            (LedgerError::Draining, Unavailable, "DRAINING"),
            (store(StoreError::Overtaken(TaskId(1))), Aborted, "OVERTAKEN"),
            (store(StoreError::Full), ResourceExhausted, "STORE_FULL"),
            (store(StoreError::Unavailable(text())), Unavailable, "STORE_UNAVAILABLE"),
            (store(StoreError::Unknown(text())), Unknown, "OUTCOME_UNKNOWN"),
            (store(StoreError::Statement(text())), Internal, "INTERNAL"),
            (store(StoreError::Corrupt(text())), Internal, "INTERNAL"),
        ];
        for (error, code, reason) in table {
            let status = status(&error);
            assert_eq!(status.code(), code, "{error}");
            let info = status.get_details_error_info().expect("an ErrorInfo");
            assert_eq!((info.domain.as_str(), info.reason.as_str()), (DOMAIN, reason), "{error}");
            assert!(!status.message().contains("secret"), "{error}: the inside is for the log");
            let item = item(&error);
            assert_eq!((item.code, item.reason.as_str()), (code as i32, reason), "{error}");
            if let LedgerError::Refused(refusal) = &error {
                assert_eq!(refusal.reason(), reason, "the core has the same name for it");
            }
            let waits = matches!(code, Unavailable | ResourceExhausted);
            assert_eq!(status.get_details_retry_info().is_some(), waits, "{error}");
        }
    }

    #[test]
    fn a_thousand_violations_fit_into_a_header() {
        let all = (0..1_000).map(|n| Violation::new(format!("tasks[{n}].agent"), "x".repeat(120))).collect();
        let status = status(&LedgerError::Invalid(all));
        assert_eq!(status.get_details_bad_request().map(|bad| bad.field_violations.len()), Some(LISTED));
        assert!(status.details().len() < 5_000 && status.message().contains("999 more"));
    }
}
