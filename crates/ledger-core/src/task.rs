//! A task as the ledger knows it: what its producer said, and where it is in its life.
//!
//! Not its data: payload, result and checkpoint are kept apart and never needed to decide.

use crate::id::{AgentId, SessionId, TaskId};
use crate::settings::Overrides;
use crate::time::Timestamp;
use std::sync::Arc;

macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $code:literal $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$vmeta])* $variant = $code),+ }

        impl $name {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The number stored in a row. Never given another meaning.
            #[must_use]
            pub const fn code(self) -> u8 { self as u8 }

            /// Reads a stored number back.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }

            /// The name on the wire.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.pad(self.as_str()) }
        }
    };
}

words! {
    /// Where a task is in its life.
    State {
        /// Waits for a worker.
        Queued = 1 "QUEUED",
        /// Handed to a worker.
        Running = 2 "RUNNING",
        /// Will be tried again.
        Retry = 3 "RETRY",
        /// Waits for a breaker, a person or an event.
        Blocked = 4 "BLOCKED",
        /// Completed.
        Done = 5 "DONE",
        /// Has a dead letter.
        Failed = 6 "FAILED",
        /// Cancelled.
        Cancelled = 7 "CANCELLED",
    }
}

impl State {
    /// Whether life ends here (but for a redrive).
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

words! {
    /// Finer meaning of a state.
    Reason {
        /// Nothing finer.
        None = 0 "",
        /// RETRY: waits for its back-off, with a budget token reserved where one is needed.
        Backoff = 1 "BACKOFF",
        /// RETRY: waits for a budget token. FAILED: none came in time.
        Budget = 2 "BUDGET",
        /// RETRY: its lease ran out.
        Lost = 3 "LOST",
        /// BLOCKED: the agent's breaker is open.
        BreakerOpen = 4 "BREAKER_OPEN",
        /// BLOCKED: its worker waits for a person or an event.
        Worker = 5 "WORKER",
        /// FAILED: the error will not pass.
        Permanent = 6 "PERMANENT",
        /// FAILED: no retries left.
        RetriesExhausted = 7 "RETRIES_EXHAUSTED",
        /// FAILED: the deadline passed or would pass.
        Deadline = 8 "DEADLINE",
        /// FAILED: too many losses.
        Poison = 9 "POISON",
        /// FAILED: too many deliveries in a row without an ended attempt.
        Undeliverable = 10 "UNDELIVERABLE",
        /// FAILED: waited too long for the first ack.
        QueueTimeout = 11 "QUEUE_TIMEOUT",
        /// CANCELLED: the worker did not end it within the grace.
        Abandoned = 12 "ABANDONED",
        /// QUEUED: made room for more urgent work.
        Preempted = 13 "PREEMPTED",
        /// QUEUED: the worker did not want it.
        Declined = 14 "DECLINED",
        /// QUEUED: the worker went away.
        Drain = 15 "DRAIN",
        /// QUEUED: not acknowledged in time.
        AckTimeout = 16 "ACK_TIMEOUT",
        /// QUEUED: redriven.
        Redriven = 17 "REDRIVEN",
        /// CANCELLED: by a user.
        User = 18 "USER",
    }
}

words! {
    /// Why a running task is asked to end.
    StopCause {
        /// Cancelled by a user.
        User = 1 "USER",
        /// Its deadline passed.
        Deadline = 2 "DEADLINE",
        /// The attempt ran too long.
        Timeout = 3 "TIMEOUT",
        /// Beats came, progress did not.
        Stall = 4 "STALL",
        /// More urgent work needs the slot.
        Preempt = 5 "PREEMPT",
    }
}

words! {
    /// What a history row records.
    EventKind {
        /// Came into being.
        Enqueued = 1 "ENQUEUED",
        /// Claimed for a session.
        Assigned = 2 "ASSIGNED",
        /// Acknowledged: an execution began.
        Started = 3 "STARTED",
        /// Completed.
        Completed = 4 "COMPLETED",
        /// The attempt failed.
        Failed = 5 "FAILED",
        /// Given back undone.
        Released = 6 "RELEASED",
        /// Blocked by its worker.
        Blocked = 7 "BLOCKED",
        /// The worker ended it because of a stop.
        Stopped = 8 "STOPPED",
        /// Not acknowledged in time.
        AckTimeout = 9 "ACK_TIMEOUT",
        /// Its lease ran out.
        Lost = 10 "LOST",
        /// Its holder came back in time.
        Resumed = 11 "RESUMED",
        /// Held back by an open breaker.
        Gated = 12 "GATED",
        /// Let go by the breaker.
        Ungated = 13 "UNGATED",
        /// Answered, or its block ran out.
        Unblocked = 14 "UNBLOCKED",
        /// Waited too long.
        QueueTimeout = 15 "QUEUE_TIMEOUT",
        /// Its deadline passed while it waited.
        DeadlinePassed = 16 "DEADLINE_PASSED",
        /// Asked to end.
        StopRequested = 17 "STOP_REQUESTED",
        /// The grace of a stop ended; its holder may no longer settle it.
        Abandoned = 18 "ABANDONED",
        /// Cancelled while waiting.
        Cancelled = 19 "CANCELLED",
        /// A budget token came.
        BudgetGranted = 20 "BUDGET_GRANTED",
        /// No budget token came in time.
        BudgetExpired = 21 "BUDGET_EXPIRED",
        /// Delivered too often in vain.
        Undeliverable = 22 "UNDELIVERABLE",
        /// Taken out of the dead letters.
        Redriven = 23 "REDRIVEN",
        /// Its dead letter was marked as not to be redriven.
        Discarded = 24 "DISCARDED",
        /// Priority or time changed while it waited.
        Updated = 25 "UPDATED",
        /// The ledger was restored from a backup: leases given out since are void, for the fence was raised.
        Restored = 26 "RESTORED",
    }
}

words! {
    /// What kind of failure an attempt had, as a worker may say it.
    Class {
        /// May pass by itself.
        Transient = 1 "TRANSIENT",
        /// Nobody knows.
        Unknown = 2 "UNKNOWN",
        /// Took too long.
        Timeout = 3 "TIMEOUT",
        /// A connection ended midway.
        StreamLost = 4 "STREAM_LOST",
        /// The other side is overloaded.
        Overloaded = 5 "OVERLOADED",
        /// Will never succeed.
        Permanent = 6 "PERMANENT",
    }
}

impl Class {
    /// The same in the words of retry-core, which knows what is retried and at what price.
    #[must_use]
    pub const fn retry(self) -> retry_core::ErrorClass {
        match self {
            Self::Transient => retry_core::ErrorClass::Transient,
            Self::Unknown => retry_core::ErrorClass::Unknown,
            Self::Timeout => retry_core::ErrorClass::Timeout,
            Self::StreamLost => retry_core::ErrorClass::StreamLost,
            Self::Overloaded => retry_core::ErrorClass::Overloaded,
            Self::Permanent => retry_core::ErrorClass::Permanent,
        }
    }
}

/// The failure of one attempt, in the worker's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskError {
    /// Its kind.
    pub class: Class,
    /// A short code of the worker's own; may be empty.
    pub code: String,
    /// One sentence.
    pub message: String,
    /// More, for people; may be empty.
    pub detail: String,
}

/// What never changes after enqueue and is needed to decide.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The class of workers it is for.
    pub agent: AgentId,
    /// What is to be done.
    pub task_type: Arc<str>,
    /// Settings that differ from the agent's.
    pub policy: Overrides,
    /// When it was enqueued.
    pub created_at: Timestamp,
    /// An idempotency key that a terminal state frees.
    pub frees_key: bool,
}

impl Spec {
    /// Itself, or `last` where that is the same: tasks that came together are alike, and one spec is enough for them. `last` is
    /// what was returned last.
    pub fn shared(self, last: &mut Option<Arc<Self>>) -> Arc<Self> {
        match last {
            Some(known) if **known == self => Arc::clone(known),
            _ => Arc::clone(last.insert(Arc::new(self))),
        }
    }
}

/// Who holds, or last held, a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The worker.
    pub worker: Arc<str>,
    /// Its process.
    pub incarnation: u64,
    /// The stream it was handed to, or that spoke for it last.
    pub session: SessionId,
}

/// The lease of a running task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// When it runs out. Soft: beats move it without a history row.
    pub until: Timestamp,
    /// When the execution began; none before the ack.
    pub acked_at: Option<Timestamp>,
    /// When progress was last seen. Soft.
    pub progress_at: Timestamp,
}

/// A breaker permit that a delivery was made under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The permit.
    pub permit: breaker_core::Permit,
    /// Its result has been told to the breaker; what comes later decides nothing.
    pub told: bool,
}

/// A request that a running task end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// Why.
    pub cause: StopCause,
    /// End of the grace.
    pub until: Timestamp,
}

/// A task: the narrow part that decisions read and write.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Its number.
    pub id: TaskId,
    /// What never changes.
    pub spec: Arc<Spec>,
    /// Where it is.
    pub state: State,
    /// Finer meaning of that.
    pub reason: Reason,
    /// 0 to 9, higher sooner.
    pub priority: u8,
    /// Not to be started before; for a BLOCKED (WORKER) task the end of the block, `FAR` for none.
    pub run_at: Timestamp,
    /// `run_at` is a time that a user named, on the wall clock.
    pub calendar: bool,
    /// To be ended by then, on the wall clock.
    pub deadline: Option<Timestamp>,
    /// The latest of enqueue, `run_at` and redrive: queue_timeout counts from here; `FAR` after the first ack since.
    pub queued_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// Transitions so far.
    pub version: u64,
    /// Newest claim.
    pub fence: u64,
    /// Claims made.
    pub delivery: u32,
    /// Executions that began.
    pub attempt: u32,
    /// Failures that led to a retry.
    pub retry_count: u32,
    /// Leases of acknowledged tasks that ran out.
    pub losses: u32,
    /// What those weigh toward POISON, in thousandths: of k lost together each weighs 1,000 / k.
    pub loss_weight: u32,
    /// When it was last lost; what its losses weigh is forgotten [72 h](crate::limits::LOSS_MEMORY) later.
    pub lost_at: Option<Timestamp>,
    /// Deliveries since the last attempt that ended in complete, fail or block.
    pub idle_deliveries: u32,
    /// Releases that did not count as idle deliveries, since the last attempt that ended otherwise.
    pub free_releases: u32,
    /// Blocks since an attempt last completed or failed, or a person answered.
    pub blocks: u32,
    /// Times it made room.
    pub preemptions: u32,
    /// Times it was redriven.
    pub redrives: u32,
    /// Failed probes that did not count as retries.
    pub probe_failures: u32,
    /// Budget tokens reserved for the coming retry; while it waits for them (RETRY, BUDGET), how many it needs.
    pub tokens: u32,
    /// Delay of the last back-off in milliseconds, for decorrelated jitter.
    pub previous_delay: u32,
    /// Who holds it, or held it last and may come back.
    pub holder: Option<Holder>,
    /// The lease of `holder`; there is one exactly when there is the other.
    pub lease: Option<Lease>,
    /// The permit of the newest delivery.
    pub sample: Option<Sample>,
    /// A request to end, while RUNNING.
    pub stop: Option<Stop>,
    /// Its dead letter was discarded.
    pub discarded: bool,
}

impl Task {
    /// Whether its holder may still come back and speak for the newest fence.
    ///
    /// Besides RETRY (LOST) and QUEUED after an ack timeout this holds for a lost task that the breaker has since
    /// gated: the holder did nothing that the others did not.
    #[must_use]
    pub const fn is_resumable(&self) -> bool {
        self.holder.is_some() && matches!(self.state, State::Retry | State::Queued | State::Blocked)
    }

    /// Whether it waits to be handed out, now or later.
    #[must_use]
    pub fn is_claimable_state(&self) -> bool {
        match self.state {
            State::Queued => true,
            State::Retry => self.reason != Reason::Budget,
            _ => false,
        }
    }

    /// Whether its agent's open breaker holds it back.
    #[must_use]
    pub fn is_gated(&self) -> bool {
        self.state == State::Blocked && self.reason == Reason::BreakerOpen
    }

    /// When `run_at` comes on the steady clock.
    #[must_use]
    pub fn due_at(&self, now: crate::time::Now) -> Timestamp {
        if self.calendar { now.from_wall(self.run_at) } else { self.run_at }
    }
}
