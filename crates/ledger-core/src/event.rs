//! What can happen to a task, what is answered, and what goes with it.

use crate::id::{SessionId, TaskId};
use crate::settings::Settings;
use crate::task::{Class, EventKind, Reason, State, Stop, StopCause, TaskError};
use crate::time::{Now, Timestamp};
use std::sync::Arc;
use std::time::Duration;

/// Why a task is given back undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseCause {
    /// The worker does not want it.
    Declined,
    /// The worker is going away.
    Drain,
    /// The worker made room.
    Preempted,
}

/// How an attempt ended, as far as the state of its task is concerned.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Done.
    Complete,
    /// Failed.
    Fail {
        /// How.
        error: Arc<TaskError>,
        /// When the other side wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// Given back.
    Release {
        /// Why.
        cause: ReleaseCause,
        /// Not to be offered before.
        delay: Duration,
    },
    /// Waits for a person or an event.
    Block {
        /// What for.
        question: Arc<str>,
        /// Goes on by itself at this wall time.
        until: Option<Timestamp>,
    },
    /// Ended because of a stop.
    Cancelled,
}

/// Who speaks for a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The worker.
    pub worker: Arc<str>,
    /// The stream, when it speaks on one.
    pub session: Option<SessionId>,
}

/// What happens to a task.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It is handed to a session.
    Claim {
        /// To whom.
        holder: crate::task::Holder,
        /// Under which permit of the agent's breaker, when it has one.
        permit: Option<breaker_core::Permit>,
    },
    /// Its holder starts.
    Ack(Caller, u64),
    /// A beat or Hello of its holder names it.
    Beat(Caller, u64),
    /// Its holder ends it.
    Settle(Caller, u64, Outcome),
    /// The lease is over: ack timeout before the ack, loss after it.
    LeaseOver,
    /// Its holder is known to hold it no more (takeover, or a Hello that does not name it).
    TakenBack {
        /// This loss is part of a sample that was told already: tasks lost together count once.
        sampled: bool,
    },
    /// The breaker is open and a session has room.
    Gate,
    /// The breaker closed.
    Ungate,
    /// A person answered, or the end of the block came.
    Unblock {
        /// What the next attempt is told.
        answer: Option<Arc<str>>,
        /// Who, or nobody when the time came.
        actor: Option<Arc<str>>,
    },
    /// A user wants it cancelled.
    Cancel {
        /// Who and why.
        note: Arc<str>,
    },
    /// More urgent work needs the slot.
    Preempt,
    /// The deadline passed.
    DeadlinePassed,
    /// It waited too long for its first ack.
    QueueTimeout,
    /// The attempt ran too long.
    AttemptTimeout,
    /// Beats came, progress did not.
    Stall,
    /// The grace of its stop is over.
    GraceOver,
    /// A budget token was reserved for it.
    BudgetGranted,
    /// No token came in time.
    BudgetExpired,
    /// It was delivered too often in vain.
    Undeliverable,
    /// A user wants it sooner, later, or more or less urgently.
    Update {
        /// 0 to 9.
        priority: Option<u8>,
        /// On the wall clock.
        run_at: Option<Timestamp>,
        /// Who and why.
        note: Arc<str>,
    },
    /// An operator wants it tried again.
    Redrive(Box<Redrive>),
    /// An operator wants its dead letter out of sight.
    Discard {
        /// Who and why.
        note: Arc<str>,
    },
}

/// How a FAILED task is tried again. What is none stays as it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Redrive {
    /// A new deadline.
    pub deadline: Option<Timestamp>,
    /// Not before this time on the steady clock.
    pub run_at: Option<Timestamp>,
    /// 0 to 9.
    pub priority: Option<u8>,
    /// What never changes otherwise: another agent.
    pub spec: Option<Arc<crate::task::Spec>>,
    /// It got another payload.
    pub payload: bool,
    /// Who and why.
    pub note: Arc<str>,
}

/// With what a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostWith {
    /// Tasks that the same process lost at the same time, this one included.
    pub tasks: u32,
    /// The breaker has been told of this loss with another of them.
    pub sampled: bool,
}

impl LostWith {
    /// Nothing else was lost.
    pub const ALONE: Self = Self { tasks: 1, sampled: false };
}

/// A named refusal: the pair of state and event is not in the table, or the caller may not. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The fence is not the newest, or was revoked.
    #[error("the lease is gone: end the work, its outcome is not recorded")]
    LeaseLost,
    /// The task has ended.
    #[error("the task has ended; nothing changes it any more, but a FAILED one can be redriven")]
    TaskTerminal,
    /// Somebody else holds it.
    #[error("another worker holds this lease")]
    NotHolder,
    /// The fence was never issued.
    #[error("this fence was never issued")]
    UnknownFence,
    /// A `cancelled` outcome without a stop.
    #[error("no stop was requested; settle the task with another outcome")]
    NotStopped,
    /// The task is not in a state that allows this.
    #[error("the task is {0}, which does not allow this")]
    WrongState(State),
    /// The task is blocked by its agent's breaker: reset that.
    #[error("the task waits for its agent's breaker; reset the breaker instead")]
    BlockedByBreaker,
    /// The dead letter was discarded.
    #[error("the dead letter is discarded")]
    Discarded,
    /// This fence was settled with another outcome.
    #[error("this lease was settled already, with another outcome")]
    OutcomeConflict,
}

impl Refusal {
    /// The reason on the wire.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::LeaseLost => "LEASE_LOST",
            Self::TaskTerminal => "TASK_TERMINAL",
            Self::NotHolder => "NOT_HOLDER",
            Self::UnknownFence => "UNKNOWN_FENCE",
            Self::NotStopped => "STOP_NOT_REQUESTED",
            Self::WrongState(_) => "WRONG_STATE",
            Self::BlockedByBreaker => "BLOCKED_BY_BREAKER",
            Self::Discarded => "DISCARDED",
            Self::OutcomeConflict => "OUTCOME_CONFLICT",
        }
    }
}

/// What a decision is made from, besides task and event.
pub struct Context<'a> {
    /// When.
    pub now: Now,
    /// The agent's settings.
    pub settings: &'a Settings,
    /// 64 random bits, keyed by (seed, task, delivery).
    pub draw: u64,
    /// Whether the budget has so many tokens.
    pub affords: &'a dyn Fn(u32) -> bool,
    /// Digest of the outcome, kept to recognise its repetition.
    pub digest: u64,
    /// With what a lease ended, when it did.
    pub lost_with: LostWith,
}

/// A history row to be: one transition.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Whose.
    pub task: TaskId,
    /// Position in the task's own history.
    pub version: u64,
    /// What happened.
    pub kind: EventKind,
    /// State before; none for the first.
    pub from: Option<State>,
    /// State after.
    pub to: State,
    /// Finer meaning of it.
    pub reason: Reason,
    /// When; never before the task's previous.
    pub at: Timestamp,
    /// Fence after.
    pub fence: u64,
    /// Attempt after.
    pub attempt: u32,
    /// The worker concerned.
    pub worker: Option<Arc<str>>,
    /// `run_at`, the end of a block or of a grace.
    pub until: Option<Timestamp>,
    /// Digest of the outcome, when it settles this fence.
    pub digest: Option<u64>,
    /// The failure.
    pub error: Option<Arc<TaskError>>,
    /// Further facts.
    pub facts: Vec<(Fact, Arc<str>)>,
}

/// Names of further facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fact {
    /// Cause of a stop; on the row of an end: the stop, not the outcome, decided where the task went.
    Cause,
    /// The outcome came after the lease had run out.
    Late,
    /// A failed probe that did not count as a retry.
    Uncounted,
    /// Budget tokens reserved.
    Tokens,
    /// The other side's hint was cut to the longest allowed.
    HintCut,
    /// The other side's hint made the wait longer than the back-off.
    Hint,
    /// Who and why.
    Note,
    /// What the next attempt is told.
    Answer,
    /// What a block waits for.
    Question,
    /// A deadline that was set or dropped.
    Deadline,
    /// The delivery was a probe.
    Probe,
    /// What a loss weighs, in thousandths, where it was not alone.
    Weight,
    /// A release that did not count as idle; on a beat that resumed an unacknowledged task: that it did count.
    Free,
    /// A new priority.
    Priority,
    /// Another agent, by number.
    Agent,
    /// Another payload.
    Payload,
    /// Ids of the follow-ups, with spaces between.
    FollowUps,
    /// The task that this one follows.
    Parent,
}

impl Fact {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::Cause,
        Self::Late,
        Self::Uncounted,
        Self::Tokens,
        Self::HintCut,
        Self::Hint,
        Self::Note,
        Self::Answer,
        Self::Question,
        Self::Deadline,
        Self::Probe,
        Self::Weight,
        Self::Free,
        Self::Priority,
        Self::Agent,
        Self::Payload,
        Self::FollowUps,
        Self::Parent,
    ];

    /// The name on the wire and in rows.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cause => "cause",
            Self::Late => "late",
            Self::Uncounted => "uncounted",
            Self::Tokens => "tokens",
            Self::HintCut => "hint_cut",
            Self::Hint => "hint",
            Self::Note => "note",
            Self::Answer => "answer",
            Self::Question => "question",
            Self::Deadline => "deadline",
            Self::Probe => "probe",
            Self::Weight => "weight",
            Self::Free => "free",
            Self::Priority => "priority",
            Self::Agent => "agent",
            Self::Payload => "payload",
            Self::FollowUps => "follow_ups",
            Self::Parent => "parent",
        }
    }

    /// Reads a name back.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fact| fact.as_str() == name)
    }
}

impl Record {
    /// The fact of that name.
    #[must_use]
    pub fn fact(&self, name: Fact) -> Option<&str> {
        self.facts.iter().find(|(fact, _)| *fact == name).map(|(_, text)| &**text)
    }
}

/// What goes with a transition in the same transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// To be told to the agent's breaker.
    pub sample: Option<(breaker_core::Permit, breaker_core::Sample)>,
    /// Budget tokens to take.
    pub reserve: u32,
    /// Budget tokens to give back.
    pub refund: u32,
    /// A success that funds the budget.
    pub deposit: bool,
    /// The outcome settled this fence: store its result or checkpoint.
    pub settled: bool,
    /// A stop to push to the holder.
    pub stop: Option<Stop>,
    /// The failure's class, for the agent's statistics.
    pub class: Option<Class>,
    /// The other side wants to be asked again then at the earliest, on the steady clock.
    pub hint: Option<Timestamp>,
    /// How long the attempt ran.
    pub took: Option<Duration>,
}

/// A transition that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// Its history row; none when only soft fields changed, or nothing did.
    pub record: Option<Record>,
    /// What goes with it.
    pub effects: Effects,
}

impl Applied {
    /// Nothing changed, or only soft fields.
    #[must_use]
    pub const fn soft() -> Self {
        Self {
            record: None,
            effects: Effects {
                sample: None,
                reserve: 0,
                refund: 0,
                deposit: false,
                settled: false,
                stop: None,
                class: None,
                hint: None,
                took: None,
            },
        }
    }
}

impl StopCause {
    /// Whether an asked-for end by this cause gives way to `other`: the first counts, but USER overrides.
    #[must_use]
    pub const fn gives_way_to(self, other: Self) -> bool {
        matches!(other, Self::User) && !matches!(self, Self::User)
    }
}
