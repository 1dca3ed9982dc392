//! Every reason that an ErrorInfo of ours may have: its code, what it means, and whether trying again helps.
//!
//! Clients branch on reasons, so a name is never given another meaning. The reference is written from here.

use tonic::Code;

/// Whether the same call may be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// It would be answered the same until something else changes.
    No,
    /// Nothing was written, and it may succeed.
    Yes,
    /// It may have been written; by its request_id a second one is known.
    SameRequestId,
    /// The stream is over; another one may be opened.
    NewStream,
}

impl Again {
    #[cfg(test)]
    const fn said(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Yes => "yes",
            Self::SameRequestId => "with the same `request_id`",
            Self::NewStream => "on a new stream",
        }
    }
}

/// A reason, as clients hear it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reason {
    pub(super) name: &'static str,
    pub(super) code: Code,
    pub(super) again: Again,
    pub(super) what: &'static str,
}

/// Constants with the name of their reason, and the list of all: none can be left out of it.
macro_rules! reasons {
    ($($name:ident: $code:ident, $again:ident, $what:literal;)*) => {
        $(pub(super) const $name: Reason =
            Reason { name: stringify!($name), code: Code::$code, again: Again::$again, what: $what };)*
        #[cfg(test)]
        pub(super) const ALL: &[Reason] = &[$($name),*];
    };
}

reasons! {
    INVALID_FIELD: InvalidArgument, No, "A field breaks its rule. BadRequest lists fields and rules, up to 16 of them.";
    TOO_MANY_ITEMS: InvalidArgument, No, "The message lists more than any call or frame may.";
    UNKNOWN_FENCE: InvalidArgument, No, "The fence of a lease was never issued.";
    MALFORMED_TIMEOUT: InvalidArgument, No, "`grpc-timeout` is no time.";
    TASK_NOT_FOUND: NotFound, No, "There is no such task, or none within the caller's reach.";
    AGENT_NOT_FOUND: NotFound, No, "There is no such agent: no task, worker or setting has named it.";
    DEAD_LETTER_NOT_FOUND: NotFound, No, "The task has not failed, so it has no dead letter.";
    KEY_REUSED_WITH_OTHER_CONTENT: AlreadyExists, No, "The idempotency key belongs to a task with other content.";
    REQUEST_ID_REUSED: AlreadyExists, No, "The request id was used for another request.";
    LEASE_LOST: FailedPrecondition, No,
        "The lease has run out or was taken back: its work is to be ended, and its outcome is not recorded.";
    TASK_TERMINAL: FailedPrecondition, No, "The task has ended. A FAILED one can be redriven.";
    NOT_HOLDER: FailedPrecondition, No, "Another worker holds the lease.";
    STOP_NOT_REQUESTED: FailedPrecondition, No, "An outcome says that the task was stopped, and nobody asked for that.";
    WRONG_STATE: FailedPrecondition, No, "The task is in a state that does not allow this; `state` says which.";
    BLOCKED_BY_BREAKER: FailedPrecondition, No,
        "The task waits for the breaker of its agent and not for an answer; reset the breaker.";
    OUTCOME_CONFLICT: FailedPrecondition, No, "The lease was settled with another outcome.";
    DISCARDED: FailedPrecondition, No, "The dead letter was discarded.";
    WORKER_ID_IN_USE: FailedPrecondition, No, "A process that is alive works under this worker id.";
    HELLO_EXPECTED: FailedPrecondition, NewStream, "A stream did not begin with Hello.";
    HELLO_AGAIN: FailedPrecondition, NewStream, "A stream said Hello twice.";
    PROTOCOL_VERSION: FailedPrecondition, No, "Hello names a version of the protocol that is not spoken here.";
    HELLO_MISSING: DeadlineExceeded, NewStream, "A stream said nothing within 5 s.";
    MESSAGE_UNFINISHED: DeadlineExceeded, NewStream, "Half a message came, and for 30 s no more of it.";
    DEADLINE_EXCEEDED: DeadlineExceeded, SameRequestId, "No answer in the time of the call; it may have been recorded.";
    RESUME_TOO_OLD: OutOfRange, No,
        "A watch cannot go on from its token: tasks to which something happened since were removed, or the ledger was restored or moved. \
         List the tasks, and watch from now on.";
    WORKER_SUPERSEDED: Aborted, No, "A newer process of this worker has taken over; this one ends.";
    SUPERSEDED: Aborted, NewStream, "The session is over, or a newer stream of the same process has taken over.";
    OVERTAKEN: Aborted, Yes, "Another daemon changed the same thing, again and again; nothing was written.";
    NO_ROOM: ResourceExhausted, Yes, "Messages of all callers on their way take all the room there is. RetryInfo says when to try again.";
    EXHAUSTED: ResourceExhausted, Yes,
        "A queue is full: the daemon's, the agent's of waiting tasks, or the list of those who watch. RetryInfo says when to try again.";
    STORE_FULL: ResourceExhausted, Yes, "The disk of the ledger is full; nothing was written. RetryInfo says when to try again.";
    STREAM_STALLED: ResourceExhausted, NewStream, "Nothing was read from a stream for 30 s.";
    DRAINING: Unavailable, Yes, "The daemon is about to end; nothing was written. RetryInfo says when to try again.";
    STORE_UNAVAILABLE: Unavailable, Yes, "The store cannot be reached; nothing was written. RetryInfo says when to try again.";
    OUTCOME_UNKNOWN: Unknown, SameRequestId, "Whether it was recorded is not known.";
    CREDENTIALS_MISSING: Unauthenticated, No, "A call without token and certificate.";
    CREDENTIALS_MALFORMED: Unauthenticated, No, "An authorization header that is no bearer token, or several of them.";
    CALLER_UNKNOWN: Unauthenticated, No, "The token or certificate belongs to no caller.";
    CALLER_REVOKED: Unauthenticated, No, "The token or certificate was taken back while its stream was open.";
    AGENT_FORBIDDEN: PermissionDenied, No, "The caller's rights do not reach the agent.";
    AGENT_REQUIRED: PermissionDenied, No, "The call is about every agent, and the caller's rights do not reach all; name one.";
    ROLE_MISSING: PermissionDenied, No, "The caller's roles do not allow the method.";
    UNKNOWN_METHOD: Unimplemented, No, "There is no such method.";
    TOO_MANY_MESSAGES: Internal, No, "A call of a method that takes one message says more; nothing was written.";
    INTERNAL: Internal, No, "The daemon is at fault; its log says why.";
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fmt::Write as _;

    const HEAD: &str = "# Errors

Generated from the code; a test holds that it is so. A status has an ErrorInfo (`google.rpc`) of domain `ledgerd` with one of these reasons; the
refusal of one item of a batch, or of a lease in a receipt, has the same reasons in its `ItemError`. UNAVAILABLE with a reason promises that
nothing was written. What the transport itself refuses has no reason; [what that is](bad-inputs.md). SDKs repeat by themselves what is to be
repeated; whoever repeats by hand waits longer each time.

| reason | code | again? | what it means |
| --- | --- | --- | --- |
";

    /// A code as the specification spells it.
    fn spelled(code: Code) -> String {
        let mut name = String::new();
        for letter in format!("{code:?}").chars() {
            if letter.is_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.push(letter.to_ascii_uppercase());
        }
        name
    }

    #[test]
    fn the_reference_has_every_reason() {
        let mut text = HEAD.to_owned();
        for reason in ALL {
            let code = spelled(reason.code);
            let _ =
                writeln!(text, "| `{}` | {code} | {} | {} |", reason.name, reason.again.said(), reason.what);
        }
        crate::reference::is_kept("errors.md", &text);
        let names: BTreeSet<_> = ALL.iter().map(|reason| reason.name).collect();
        assert_eq!(names.len(), ALL.len(), "each has a name of its own");
    }
}
