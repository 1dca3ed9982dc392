//! What the ledger can be told, and what it answers. Plain values in the ledger's own words; the wire has its own.

use crate::store::settings_text;
use bytes::Bytes;
use ledger_core::explain::Facts;
use ledger_core::session::{Hello, Unsent};
use ledger_core::settings::{AgentOverrides, Settings, Violation};
pub(super) use ledger_core::store::Leaving;
use ledger_core::store::{Counts, Pause, StoreError, TaskData};
use ledger_core::{
    Outcome, Overrides, Reason, Refusal, SessionId, State, Stop, TaskError, TaskId, Timestamp,
};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Why the ledger did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LedgerError {
    /// Fields that break rules.
    #[error("{}", describe(.0))]
    Invalid(Vec<Violation>),
    /// No such task.
    #[error("there is no task {0}")]
    UnknownTask(TaskId),
    /// No such agent.
    #[error("there is no agent {0:?}; enqueue a task for it, connect a worker, or configure it")]
    UnknownAgent(Arc<str>),
    /// The caller's rights do not reach this agent. Told at the rim, like the next.
    #[error("your rights do not reach agent {0:?}")]
    AgentForbidden(Arc<str>),
    /// A filter means every agent, and the caller's rights do not reach all of them.
    #[error("your rights do not reach every agent; name one that they reach")]
    AgentRequired,
    /// The table of §3 does not have this.
    #[error("{0}")]
    Refused(Refusal),
    /// The same key with other content.
    #[error("the idempotency key belongs to task {0}, which has other content; use another key")]
    KeyConflict(TaskId),
    /// The same request id with another body.
    #[error("the request id was used for another request; use a new one")]
    RequestConflict,
    /// The queue of commands, or of the agent's waiting tasks, is full.
    #[error("{what} is full; try again later")]
    Exhausted {
        /// What.
        what: &'static str,
        /// When to try again.
        retry_after: Duration,
    },
    /// A watch was to go on from a place behind which tasks were removed, or which is not of this ledger.
    #[error("not all that happened since then is stored any more; list the tasks, and watch from now on")]
    ResumeTooOld,
    /// A worker of that name is connected and alive.
    #[error("worker id {0:?} is in use by a process that is alive; use another id, or stop that process")]
    WorkerIdInUse(Arc<str>),
    /// A newer process of that worker has been here.
    #[error("a newer process of worker {0:?} has taken over; this one must end")]
    WorkerSuperseded(Arc<str>),
    /// The session is not open any more.
    #[error("the session has ended; open a new stream with Hello")]
    SessionEnded,
    /// The daemon is going away.
    #[error("the daemon is shutting down; connect again")]
    Draining,
    /// New tasks are not taken until the store has room again. It was not asked for any: nothing failed.
    #[error("{}", StoreError::Full)]
    Short,
    /// The store failed.
    #[error("{0}")]
    Store(StoreError),
}

fn describe(violations: &[Violation]) -> String {
    match violations {
        [one] => format!("{}: {}", one.field, one.rule),
        [first, rest @ ..] => format!("{}: {} (and {} more)", first.field, first.rule, rest.len()),
        [] => "a field breaks a rule".to_owned(),
    }
}

/// A task to be, checked against the limits of one task already.
#[derive(Clone, Debug)]
pub struct NewTask {
    /// The agent's name.
    pub agent: Arc<str>,
    /// What is to be done.
    pub task_type: Arc<str>,
    /// 0 to 9.
    pub priority: u8,
    /// Not to be started before.
    pub run_at: Option<Timestamp>,
    /// To be ended by.
    pub deadline: Option<Timestamp>,
    /// Settings that differ.
    pub policy: Overrides,
    /// Its key is free again when it ends.
    pub frees_key: bool,
    /// Payload, labels, trace, key and digest.
    pub data: Arc<TaskData>,
}

/// What an error of one item does to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchMode {
    /// Nothing.
    PerItem,
    /// All fail.
    Atomic,
}

/// A request id with the digest of its request.
#[derive(Clone, Debug)]
pub struct RequestKey {
    /// The id.
    pub id: Arc<str>,
    /// Digest of what it was used for.
    pub digest: u64,
}

/// Answer for one new task.
#[derive(Clone, Debug)]
pub enum Enqueued {
    /// It was created.
    Created(TaskId),
    /// Its key was known: the task that holds it.
    Existing(TaskId),
    /// It was refused.
    Refused(LedgerError),
}

/// An outcome with what goes with it.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// The task.
    pub task: TaskId,
    /// The fence it was assigned with.
    pub fence: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Result of a completion.
    pub result: Option<Bytes>,
    /// Checkpoint for the next attempt.
    pub checkpoint: Option<Bytes>,
    /// Tasks to enqueue with a completion.
    pub follow_ups: Vec<NewTask>,
    /// Digest over all of that, to recognise a repetition.
    pub digest: u64,
}

/// One task in a beat.
#[derive(Clone, Debug)]
pub struct HeldTask {
    /// The task.
    pub task: TaskId,
    /// Its fence.
    pub fence: u64,
    /// Progress, where it changed: fraction and note.
    pub progress: Option<(f64, String)>,
    /// Checkpoint, where it changed.
    pub checkpoint: Option<Bytes>,
}

/// The durable answer to an ack or outcome.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// The task.
    pub task: TaskId,
    /// The fence that was named.
    pub fence: u64,
    /// An ack's, rather than an outcome's.
    pub is_ack: bool,
    /// What was recorded, or the refusal.
    pub result: Result<Recorded, LedgerError>,
}

/// Where a task was after a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Its state.
    pub state: State,
    /// Finer meaning.
    pub reason: Reason,
    /// Its version.
    pub version: u64,
    /// When it is tried again.
    pub run_at: Option<Timestamp>,
    /// Follow-ups that were enqueued with it.
    pub follow_ups: Vec<TaskId>,
}

/// The ledger's view of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Extended,
    /// It goes on, but the task is to end: why, and the time left.
    Stop(Stop, Duration),
    /// It is gone.
    Lost,
}

/// A verdict with its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseVerdict {
    /// The task.
    pub task: TaskId,
    /// The fence.
    pub fence: u64,
    /// How it stands.
    pub verdict: Verdict,
}

/// A task handed to a session, with its data.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// The task.
    pub task: TaskId,
    /// The fence of this claim.
    pub fence: u64,
    /// The agent's name.
    pub agent: Arc<str>,
    /// What is to be done.
    pub task_type: Arc<str>,
    /// Claims made.
    pub delivery: u32,
    /// Number that this execution will have.
    pub attempt: u32,
    /// Priority.
    pub priority: u8,
    /// Time left to acknowledge.
    pub ack_timeout: Duration,
    /// Time left to run.
    pub time_left: Option<Duration>,
    /// Beats must not be further apart.
    pub lease_duration: Duration,
    /// Payload, labels, trace.
    pub data: Arc<TaskData>,
    /// Checkpoint of the previous attempt.
    pub checkpoint: Option<Bytes>,
    /// Failure of the previous attempt.
    pub last_error: Option<Arc<TaskError>>,
    /// What an earlier attempt asked.
    pub question: Option<Arc<str>>,
    /// What it was answered.
    pub answer: Option<Arc<str>>,
}

/// What a worker says on its stream, after Hello.
#[derive(Clone, Debug)]
pub enum FromWorker {
    /// New capacity.
    Capacity(u32),
    /// Tasks that start: task, fence.
    Acks(Vec<(TaskId, u64)>),
    /// Everything held, and the number of the beat.
    Beat(Vec<HeldTask>, u64),
    /// Tasks that ended.
    Outcomes(Vec<Settlement>),
    /// It leaves; what it holds is released.
    Goodbye,
    /// The stream ended. Means nothing but that it is gone.
    Closed,
}

/// What a session is sent.
#[derive(Debug)]
pub enum ToWorker {
    /// Tasks to run. Already counted as unsent bytes; the stream takes them off when it hands them to the transport.
    Assignments(Vec<Assignment>),
    /// Durable answers.
    Receipts(Vec<Receipt>),
    /// Answer to a beat.
    HeartbeatAck(Vec<LeaseVerdict>, u64),
    /// Tasks to end.
    Stop(Vec<LeaseVerdict>),
    /// The daemon is going away after this time.
    Drain(Duration),
    /// The session is over; the stream ends with this error.
    End(LedgerError),
}

/// An open session, as its stream holds it.
#[derive(Debug)]
pub struct Opened {
    /// Its number.
    pub session: SessionId,
    /// Verdicts for what Hello named as held.
    pub verdicts: Vec<LeaseVerdict>,
    /// Send a beat this often: a third of the shortest lease of its agents.
    pub heartbeat_interval: Duration,
    /// A frame goes out at least this often: min(15 s, a quarter of the shortest lease).
    pub idle_interval: Duration,
    /// An ack may be held back for so long: a tenth of the shortest ack timeout.
    pub ack_delay_max: Duration,
    /// What it is sent. Unbounded in number, bounded by room: assignments stop while too many bytes are unsent, and
    /// everything else answers a frame of the worker's own, of which the stream reads the next only when the last was taken.
    pub outbox: mpsc::UnboundedReceiver<ToWorker>,
    /// Bytes that wait to be sent.
    pub unsent: Unsent,
}

/// How dead letters are put back. What is none stays as it was.
#[derive(Clone, Debug, Default)]
pub struct Redriving {
    /// On the wall clock.
    pub deadline: Option<Timestamp>,
    /// When the first becomes due, on the wall clock; none: now.
    pub start: Option<Timestamp>,
    /// From one to the next.
    pub gap: Duration,
    /// 0 to 9.
    pub priority: Option<u8>,
    /// Checked against the limit already.
    pub payload: Option<Bytes>,
    /// Name of another agent.
    pub agent: Option<Arc<str>>,
    /// Who and why.
    pub note: Arc<str>,
}

/// A breaker as it is now.
#[derive(Clone, Debug)]
pub struct BreakerView {
    /// The type it is for; empty: the agent's own.
    pub task_type: Arc<str>,
    /// Its state, counts and settings.
    pub breaker: breaker_core::Breaker,
    /// Tasks it holds back.
    pub gated: u64,
}

/// What an operator tells a breaker. Spans are from now; none: until told otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerOrder {
    /// Open as if it had failed; none: for its usual period.
    Trip(Option<Duration>),
    /// Refuse everything.
    ForceOpen(Option<Duration>),
    /// Let everything through and count nothing.
    Disable(Option<Duration>),
    /// Let everything through and tell when it would have opened.
    Observe(Option<Duration>),
    /// End an order.
    Auto,
    /// Close, with all counts zero.
    Reset,
}

/// An agent as it is now.
#[derive(Clone, Debug)]
pub struct AgentView {
    /// Its name.
    pub name: Arc<str>,
    /// What its tasks go by.
    pub settings: Arc<Settings>,
    /// Tasks by state code.
    pub counts: Counts,
    /// When this was so.
    pub at: Timestamp,
    /// Its own breaker, and those of its types.
    pub breakers: Vec<BreakerView>,
    /// Millitokens in its budget.
    pub budget_millitokens: u64,
    /// Sessions that serve it.
    pub sessions: u32,
    /// When it was first seen.
    pub created_at: Timestamp,
    /// Why nothing is handed out.
    pub pause: Option<Pause>,
}

/// A session as it is now.
#[derive(Clone, Debug)]
pub struct WorkerView {
    /// The worker's name.
    pub worker: Arc<str>,
    /// Its process.
    pub incarnation: u64,
    /// Its session.
    pub session: SessionId,
    /// Agents it works for.
    pub agents: Vec<Arc<str>>,
    /// Types it takes; empty: all.
    pub types: Vec<Arc<str>>,
    /// How many tasks it may hold.
    pub capacity: u32,
    /// How many it holds.
    pub held: u32,
    /// Labels it showed.
    pub labels: Vec<(String, String)>,
    /// Its library.
    pub sdk: String,
    /// When it connected.
    pub connected_at: Timestamp,
    /// Its last beat.
    pub beat_at: Timestamp,
}

/// Counts of the whole ledger.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Tasks stored, by state code.
    pub counts: Counts,
    /// Open sessions.
    pub sessions: u32,
    /// Agents known.
    pub agents: u32,
    /// Transitions since the ledger began.
    pub transitions: u64,
    /// Millitokens in the global budget.
    pub budget_millitokens: u64,
    /// Commits since the daemon started.
    pub commits: u64,
}

/// What configuration says of agents.
#[derive(Clone, PartialEq)]
pub struct AgentRules {
    /// Tasks and workers bring agents into being that nobody has configured.
    pub auto_create: bool,
    /// What agents go by where nothing was set for them.
    pub defaults: Arc<AgentOverrides>,
}

impl Default for AgentRules {
    fn default() -> Self {
        Self { auto_create: true, defaults: Arc::default() }
    }
}

/// Of many defaults those that are set.
impl fmt::Debug for AgentRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let defaults = settings_text(&self.defaults);
        f.debug_struct("AgentRules")
            .field("auto_create", &self.auto_create)
            .field("defaults", &defaults)
            .finish()
    }
}

/// A command: what is to be decided, without where the answer goes, so that it can be decided again.
#[derive(Clone, Debug)]
pub enum Command {
    /// Enqueue tasks; an item that was refused before stays refused in its place.
    Enqueue {
        /// The tasks.
        tasks: Vec<Result<NewTask, LedgerError>>,
        /// What an error of one does to the others.
        mode: BatchMode,
        /// Its request id.
        request: Option<RequestKey>,
    },
    /// Cancel a task.
    Cancel {
        /// The task.
        task: TaskId,
        /// Who and why.
        note: Arc<str>,
        /// Its request id.
        request: Option<RequestKey>,
    },
    /// Change a waiting task.
    Update {
        /// The task.
        task: TaskId,
        /// 0 to 9.
        priority: Option<u8>,
        /// On the wall clock.
        run_at: Option<Timestamp>,
        /// Who and why.
        note: Arc<str>,
        /// Its request id.
        request: Option<RequestKey>,
    },
    /// Answer a blocked task.
    Unblock {
        /// The task.
        task: TaskId,
        /// What the next attempt is told.
        answer: Arc<str>,
        /// Who.
        actor: Arc<str>,
        /// Its request id.
        request: Option<RequestKey>,
    },
    /// Hand out none of an agent's tasks.
    Pause {
        /// The agent.
        agent: Arc<str>,
        /// Why.
        reason: Arc<str>,
        /// Who.
        actor: Arc<str>,
        /// It ends by itself.
        duration: Option<Duration>,
    },
    /// End that.
    Resume {
        /// The agent.
        agent: Arc<str>,
        /// Why.
        reason: Arc<str>,
        /// Who.
        actor: Arc<str>,
    },
    /// Open a session.
    Hello(Box<Hello>, Unsent, mpsc::UnboundedSender<ToWorker>),
    /// A frame of a session.
    Frame(SessionId, FromWorker),
    /// Outcomes outside of a session.
    Settle(Arc<str>, Vec<Settlement>),
    /// Change settings of an agent, which may be new.
    Configure {
        /// The agent.
        agent: Arc<str>,
        /// What is set.
        change: Box<AgentOverrides>,
        /// Who.
        actor: Arc<str>,
        /// Why.
        reason: Arc<str>,
    },
    /// Tell a breaker what to do.
    OrderBreaker {
        /// The agent.
        agent: Arc<str>,
        /// The type whose breaker it is; empty: the agent's own, to Reset all of them.
        task_type: Arc<str>,
        /// What.
        order: BreakerOrder,
        /// Who.
        actor: Arc<str>,
        /// Why.
        reason: Arc<str>,
    },
    /// Put dead letters back.
    Redrive {
        /// The tasks.
        tasks: Vec<TaskId>,
        /// How.
        how: Box<Redriving>,
        /// Its request id.
        request: Option<RequestKey>,
    },
    /// Hide dead letters.
    Discard {
        /// The tasks.
        tasks: Vec<TaskId>,
        /// Who and why.
        note: Arc<str>,
        /// Its request id.
        request: Option<RequestKey>,
    },
    /// What explains where a task is.
    Explain(TaskId),
    /// All agents.
    Agents,
    /// How long the longest waiting due task of each agent has been waiting.
    Oldest,
    /// Open sessions.
    Workers,
    /// Counts.
    Stats,
    /// Tell every session that the daemon goes away after this time, and assign no more.
    Drain(Duration),
    /// Answers when everything before it is committed.
    Flush,
    /// What configuration says of agents from now on.
    Rule(Arc<AgentRules>),
    /// Remove those of these tasks that leave.
    Remove {
        /// The tasks.
        tasks: Vec<TaskId>,
        /// Which leave.
        leaving: Leaving,
    },
    /// Forget workers that are long gone, and old events of agents.
    Forget {
        /// Not seen since.
        workers: Timestamp,
        /// Of before; none: they all stay.
        events: Option<Timestamp>,
    },
}

/// What a command is answered with.
#[derive(Debug)]
pub enum Answer {
    /// To Enqueue, in its order.
    Enqueued(Vec<Enqueued>),
    /// To Hello.
    Opened(SessionId, Vec<LeaseVerdict>, [Duration; 3]),
    /// To Settle, in its order.
    Receipts(Vec<Receipt>),
    /// To Redrive and Discard, in its order; to a repeated call the tasks of the first.
    Each(Vec<(TaskId, Result<(), LedgerError>)>),
    /// To Explain.
    Facts(Box<Facts>),
    /// To Agents.
    Agents(Vec<AgentView>),
    /// Agents with how long their longest waiting due task has been waiting.
    Oldest(Vec<(Arc<str>, Duration)>),
    /// To Workers.
    Workers(Vec<WorkerView>),
    /// To Stats.
    Stats(Box<Stats>),
    /// To Remove and Forget: how many.
    Removed(u64),
    /// To all others.
    Done,
}
