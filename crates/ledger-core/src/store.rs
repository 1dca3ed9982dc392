//! The seam to a store, written for both: SQLite, where one process owns everything, and PostgreSQL, where a replica may
//! be overtaken by another.
//!
//! A batch goes: [`Store::begin`] reads what its commands name, [`Store::write`] takes what was decided,
//! [`Store::offer`] names tasks that can be claimed, the claims are written, [`Store::submit`] hands all of it over and
//! [`Store::durable`] tells when it is safe: another batch may be decided in between.
//! Any task of a write may come back overtaken: somebody else changed it since it was read; it is read again and decided
//! anew. ledger-core picks sessions; the store offers tasks.
//!
//! No async runtime is named here: a future is a boxed one.

use crate::by_id::{ByKey, ByName, ByTask};
use crate::event::Record;
use crate::id::{AgentId, SessionId, TaskId};
use crate::session::Session;
use crate::settings::AgentOverrides;
use crate::task::{Reason, State, Task, TaskError};
use crate::time::{Now, Timestamp};
use bytes::Bytes;
use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

mod read;

pub use read::{
    DeadLetterFilter, HistoryView, Leaving, LetterGroup, LetterGroups, Page, Reader, Sizes, TaskFilter,
    TaskView,
};

/// What a store's methods return.
pub type Fut<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Why a store did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Somebody else changed a task since it was read, again and again; nothing was written.
    #[error("task {0} was changed by somebody else meanwhile; repeat the call")]
    Overtaken(TaskId),
    /// Another daemon changed something else that was decided from; nothing was written.
    #[error("{0} was changed by another daemon meanwhile; repeat the call")]
    Outdated(&'static str),
    /// One statement was refused and the batch rolled back; a bug, or data that no check caught.
    #[error("a statement failed: {0}")]
    Statement(String),
    /// The disk is full; the batch is rolled back.
    #[error("the disk is full")]
    Full,
    /// The store cannot be reached; nothing was written.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// Whether the batch was written is not known.
    #[error("the fate of a commit is unclear: {0}")]
    Unknown(String),
    /// What is stored cannot be right.
    #[error("the store is corrupt: {0}")]
    Corrupt(String),
}

impl StoreError {
    /// Whether somebody else was faster: nothing was written, and deciding anew may well succeed.
    #[must_use]
    pub const fn is_conflict(&self) -> bool {
        matches!(self, Self::Overtaken(_) | Self::Outdated(_))
    }
}

/// What a producer gave that no decision needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskData {
    /// The input.
    pub payload: Bytes,
    /// Free labels, by key.
    pub labels: Vec<(String, String)>,
    /// W3C trace context; may be empty.
    pub traceparent: String,
    /// W3C trace state; may be empty.
    pub tracestate: String,
    /// The user's own key; may be empty.
    pub key: Arc<str>,
    /// Digest of what must be the same when the key comes again.
    pub digest: u64,
    /// The task whose completion enqueued it.
    pub parent: Option<TaskId>,
}

/// What a worker last said about its attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct ProgressNote {
    /// Share done, 0 to 1.
    pub fraction: f64,
    /// A note for people.
    pub note: String,
    /// When it came.
    pub at: Timestamp,
}

/// What is known beside a task, kept out of its narrow row. None: unchanged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Notes {
    /// The last failure.
    pub error: Option<Arc<TaskError>>,
    /// What the next attempt goes on from.
    pub checkpoint: Option<Bytes>,
    /// The last progress.
    pub progress: Option<ProgressNote>,
    /// What a block waits for.
    pub question: Option<Arc<str>>,
    /// What was answered; empty: nothing yet.
    pub answer: Option<Arc<str>>,
}

/// The record of a FAILED task.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// The task.
    pub task: TaskId,
    /// Its agent.
    pub agent: AgentId,
    /// Its type.
    pub task_type: Arc<str>,
    /// Why it failed.
    pub reason: Reason,
    /// Its last error.
    pub error: Option<Arc<TaskError>>,
    /// The same for errors alike.
    pub fingerprint: u64,
    /// When it failed.
    pub failed_at: Timestamp,
    /// Executions that began.
    pub attempt: u32,
    /// Times it was redriven before.
    pub redrives: u32,
    /// When and why it was discarded.
    pub discarded: Option<(Timestamp, Arc<str>)>,
}

/// An agent as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentRow {
    /// Its number.
    pub id: AgentId,
    /// Its name.
    pub name: Arc<str>,
    /// What was set.
    pub given: AgentOverrides,
    /// When it was first seen.
    pub created_at: Timestamp,
    /// Why nothing is handed out.
    pub pause: Option<Pause>,
}

/// Why an agent's tasks are not handed out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Who.
    pub actor: Arc<str>,
    /// Why.
    pub reason: Arc<str>,
    /// Since when.
    pub since: Timestamp,
    /// When it ends by itself, on the steady clock.
    pub until: Option<Timestamp>,
}

/// Something that happened to an agent or its breaker: the audit trail of what is no task. Numbered by the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentEvent {
    /// The agent.
    pub agent: AgentId,
    /// The type whose breaker it is; empty: the agent's own.
    pub task_type: Arc<str>,
    /// When.
    pub at: Timestamp,
    /// What.
    pub kind: AgentEventKind,
    /// Who, when a person did it.
    pub actor: Arc<str>,
    /// Why, in their words.
    pub reason: Arc<str>,
    /// When it ends by itself.
    pub until: Option<Timestamp>,
}

/// What can happen to an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentEventKind {
    /// Its breaker moved.
    Breaker(breaker_core::Transition),
    /// Its breaker, which only observes, would have opened.
    WouldOpen,
    /// It was paused.
    Paused,
    /// It was resumed, or its pause ended.
    Resumed,
    /// Its settings changed.
    Configured,
}

/// A breaker as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct BreakerRow {
    /// Whose.
    pub agent: AgentId,
    /// The type it is for; empty: the agent's own.
    pub task_type: Arc<str>,
    /// Its state.
    pub snapshot: breaker_core::Snapshot,
    /// The task that was its last probe.
    pub last_probe: Option<TaskId>,
}

/// A retry budget as stored; the global one has no agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetRow {
    /// Whose.
    pub agent: Option<AgentId>,
    /// What is in it.
    pub level: retry_core::Level,
}

/// A worker's stream as stored, one row per worker_id: its last.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionRow {
    /// The worker.
    pub worker: Arc<str>,
    /// Its process.
    pub incarnation: u64,
    /// The stream.
    pub session: SessionId,
    /// When it was opened.
    pub connected_at: Timestamp,
    /// Its last beat.
    pub beat_at: Timestamp,
    /// Whether it is still open.
    pub open: bool,
    /// All of it, where other daemons are to see it.
    pub shown: Option<Arc<Session>>,
}

/// An answer remembered under a request id.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestRow {
    /// The id.
    pub id: Arc<str>,
    /// Digest of the request.
    pub digest: u64,
    /// The answer, in the ledger's own encoding.
    pub answer: Bytes,
    /// When it was given.
    pub at: Timestamp,
}

/// A task that is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Changed {
    /// As it is now.
    pub task: Arc<Task>,
    /// Version that was read; 0 for a new task.
    pub expected: u64,
    /// State that was read; none for a new task.
    pub was: Option<State>,
}

/// Everything a batch writes. One row image per task, whatever happened to it in the batch.
#[derive(Debug, Default)]
pub struct Changes {
    /// Row images.
    pub tasks: Vec<Changed>,
    /// Data of new tasks.
    pub data: Vec<(TaskId, Arc<TaskData>)>,
    /// Transitions, in order.
    pub history: Vec<Record>,
    /// Results of completed tasks.
    pub results: Vec<(TaskId, Bytes)>,
    /// Results of refused outcomes, for salvage: task, fence, result.
    pub salvage: Vec<(TaskId, u64, Bytes)>,
    /// What is known beside tasks.
    pub notes: Vec<(TaskId, Notes)>,
    /// New or changed dead letters.
    pub dead_letters: Vec<DeadLetter>,
    /// Dead letters that are none any more.
    pub redriven: Vec<TaskId>,
    /// Idempotency keys that are free again.
    pub freed_keys: Vec<TaskId>,
    /// Answers to remember.
    pub requests: Vec<RequestRow>,
    /// New or changed agents.
    pub agents: Vec<AgentRow>,
    /// Changed breakers.
    pub breakers: Vec<BreakerRow>,
    /// Changed budgets.
    pub budgets: Vec<BudgetRow>,
    /// New or changed sessions. Of a worker's new session the batch has asked for the last one.
    pub sessions: Vec<SessionRow>,
    /// Tasks whose agent or payload a redrive changed: the agent before, and the payload when it is new. Their rows are
    /// among `tasks`. Idempotency keys move with them.
    pub respecified: Vec<(TaskId, AgentId, Option<Bytes>)>,
    /// What happened to agents.
    pub events: Vec<AgentEvent>,
    /// Terminal tasks to remove with all that belongs to them.
    pub removed: Vec<TaskId>,
    /// Workers whose rows are to be removed.
    pub gone_workers: Vec<Arc<str>>,
    /// The oldest events of agents go when they are of before this; a bounded number at once.
    pub events_before: Option<Timestamp>,
}

impl Changes {
    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
            && self.data.is_empty()
            && self.history.is_empty()
            && self.results.is_empty()
            && self.salvage.is_empty()
            && self.notes.is_empty()
            && self.dead_letters.is_empty()
            && self.redriven.is_empty()
            && self.freed_keys.is_empty()
            && self.requests.is_empty()
            && self.agents.is_empty()
            && self.breakers.is_empty()
            && self.budgets.is_empty()
            && self.sessions.is_empty()
            && self.respecified.is_empty()
            && self.events.is_empty()
            && self.removed.is_empty()
            && self.gone_workers.is_empty()
            && self.events_before.is_none()
    }
}

/// What the commands of a batch name.
#[derive(Clone, Debug, Default)]
pub struct Want {
    /// Tasks.
    pub tasks: Vec<TaskId>,
    /// Idempotency keys.
    pub keys: Vec<(AgentId, Arc<str>)>,
    /// Request ids.
    pub requests: Vec<Arc<str>>,
    /// Workers whose last session is asked for.
    pub workers: Vec<Arc<str>>,
}

/// Who holds an idempotency key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyHolder {
    /// The task.
    pub task: TaskId,
    /// Digest of its content.
    pub digest: u64,
}

/// What is stored of that. What is absent does not exist.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Tasks.
    pub tasks: ByTask<Arc<Task>>,
    /// Holders of keys.
    pub keys: ByKey<KeyHolder>,
    /// Remembered answers.
    pub requests: ByName<RequestRow>,
    /// Last sessions of workers, by their names; none where no other daemon could have opened one.
    pub sessions: ByName<SessionRow>,
}

/// A question for claimable tasks.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Of this agent.
    pub agent: AgentId,
    /// Of these types; none: all.
    pub types: Option<Arc<[Arc<str>]>>,
    /// At most so many.
    pub limit: usize,
    /// Those that the agent's open breaker holds back too (for the choice of a probe).
    pub gated: bool,
    /// Of none of these types: their breakers let nothing through, or less than this asks for.
    pub except: Arc<[Arc<str>]>,
}

/// Numbers of tasks of one agent, indexed by [`State::code`].
pub type Counts = [u64; 8];

/// What a ledger starts from.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// Seed of all keyed draws, made once per ledger.
    pub seed: u64,
    /// Agents.
    pub agents: Vec<AgentRow>,
    /// Breakers that are not in their first state.
    pub breakers: Vec<BreakerRow>,
    /// Budgets that were used.
    pub budgets: Vec<BudgetRow>,
    /// Last session of each worker.
    pub sessions: Vec<SessionRow>,
    /// Tasks stored, by agent.
    pub counts: HashMap<AgentId, Counts>,
    /// Highest session number given.
    pub last_session: u64,
    /// Transitions ever made.
    pub transitions: u64,
    /// Which daemons there are.
    pub replicas: Replicas,
    /// This daemon took its place among them just now: no session is its own.
    pub begins: bool,
    /// No instant that is stored and was measured is later, where daemons go by clocks of their own.
    pub newest: Timestamp,
}

/// The daemons that serve one ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replicas {
    /// The slot of this one: the number under which it writes, and nobody else.
    pub slot: u16,
    /// Those of the others that live.
    pub others: Vec<u16>,
    /// What the store's clock shows, where daemons go by that.
    pub time: Option<Timestamp>,
}

impl Replicas {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.others.len() as u32 + 1
    }

    /// Whether it falls to this daemon to do what one of them is enough for.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.others.iter().all(|other| *other > self.slot)
    }
}

/// What there is over all daemons at one moment.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Tasks stored, by agent.
    pub counts: HashMap<AgentId, Counts>,
    /// Transitions ever made.
    pub transitions: u64,
}

/// What other daemons did since this one looked.
#[derive(Clone, Debug, Default)]
pub struct News {
    /// Which daemons there are.
    pub replicas: Replicas,
    /// Agents that were made or changed.
    pub agents: Vec<AgentRow>,
    /// Breakers that were changed.
    pub breakers: Vec<BreakerRow>,
    /// This daemon's own budgets; only where memory has to be made anew.
    pub budgets: Option<Vec<BudgetRow>>,
    /// What there is over all; none where nobody else changes it.
    pub totals: Option<Totals>,
    /// Tasks that breakers hold back, by agent and type; none where nobody else changes them.
    pub gated: Option<Vec<(AgentId, Arc<str>, u64)>>,
    /// Tasks that sessions of this daemon run, or that it watches over, and that another daemon changed.
    pub changed: Vec<TaskId>,
    /// Workers of this daemon that went to another.
    pub moved: Vec<Arc<str>>,
    /// Of those asked for, the tasks that have ended.
    pub ended: Vec<TaskId>,
    /// Streams that are open at other daemons; only when they were asked for.
    pub sessions: Option<Vec<Session>>,
    /// Daemons are no more, which left these workers; what their tasks are is to be found with [`Store::live`].
    pub left: Option<Vec<SessionRow>>,
}

/// Some of many tasks, and the number from which there may be more of them; none: there are not.
pub type Piece = (Vec<Arc<Task>>, Option<TaskId>);

/// The writing half of a store. One caller, one open batch at a time.
pub trait Store: Send {
    /// What only a commit can make; replies need it.
    type Proof: Send;

    /// Reads what a ledger starts from, anew after a failed commit as well.
    ///
    /// # Errors
    /// Any; the ledger cannot serve then.
    fn recover(&mut self, now: Now) -> Fut<'_, Recovered>;

    /// At a start, what has to be watched over: tasks that have not ended and have a timer or a holder, RUNNING, BLOCKED, RETRY
    /// (BUDGET), and those with a deadline or a queue_timeout, their own or that of one of these agents. From this number on and a
    /// piece at a time, as [`Store::live`].
    ///
    /// # Errors
    /// As [`Store::recover`], with which a start begins anew then.
    fn timed<'a>(&'a mut self, queues: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece>;

    /// Numbers for `n` new tasks: the first of a run.
    ///
    /// # Errors
    /// Where numbers come from a server, that it is away.
    fn ids(&mut self, n: usize) -> Fut<'_, u64>;

    /// Opens a batch that is decided at `now`, and reads what its commands name.
    ///
    /// # Errors
    /// Nothing was written.
    fn begin<'a>(&'a mut self, want: &'a Want, now: Now) -> Fut<'a, Known>;

    /// The rows that settled these (task, fence) pairs, in order.
    ///
    /// # Errors
    /// Nothing was written.
    fn settled<'a>(&'a mut self, leases: &'a [(TaskId, u64)]) -> Fut<'a, Vec<Option<Record>>>;

    /// Whether [`Store::offer`] could find anything, whoever asks; true where only a look would tell.
    fn may_offer(&mut self, _now: Now) -> bool {
        true
    }

    /// For each question its claimable tasks that are due, in the order priority, run_at, id; those written in this
    /// batch included.
    ///
    /// # Errors
    /// Nothing was written.
    fn offer<'a>(&'a mut self, asks: &'a [Ask], now: Now) -> Fut<'a, Vec<Vec<Arc<Task>>>>;

    /// Tasks of this agent that its open breaker holds back.
    ///
    /// # Errors
    /// Nothing was written.
    fn gated(&mut self, agent: AgentId) -> Fut<'_, Vec<Arc<Task>>>;

    /// Tasks of these agents that have not ended, from this number on, a piece at a time. Those that were changed and may not be durable are in every piece.
    ///
    /// # Errors
    /// Nothing was written.
    fn live<'a>(&'a mut self, agents: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece>;

    /// How many due tasks of its agent come before this one in the usual order, those that the agent's breaker holds back
    /// included; of these types, none: all. Counts to `most` and looks at no more than `most` types. Knows what was
    /// written, in this batch or before.
    ///
    /// # Errors
    /// Nothing was written.
    fn ahead<'a>(
        &'a mut self,
        task: &'a Task,
        types: Option<&'a [Arc<str>]>,
        most: usize,
        now: Now,
    ) -> Fut<'a, usize>;

    /// Takes what was decided. Returns the tasks that somebody else changed since they were read: nothing was written
    /// of those, neither rows nor history.
    ///
    /// # Errors
    /// The batch is rolled back.
    fn write(&mut self, changes: Changes) -> Fut<'_, Vec<TaskId>>;

    /// Ends the batch and hands it over to be made durable, after those before it. The next one may begin at once: it
    /// knows what this one wrote.
    ///
    /// # Errors
    /// The batch is rolled back; the caller recovers.
    fn submit(&mut self) -> Fut<'_, ()>;

    /// How many batches are written at one time, in part: those of like size are written sooner then than a large one and small ones
    /// beside it. Where it is one after the other, the larger the better.
    fn side_by_side(&self) -> usize {
        1
    }

    /// Waits until the oldest batch that was handed over is durable. May be dropped and called again.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] when it may be; otherwise it is rolled back, with all that were handed over after it, and
    /// so is what the store remembers: the caller recovers.
    fn durable(&mut self) -> Fut<'_, Self::Proof>;

    /// Makes the batch durable where none before it is on its way.
    ///
    /// # Errors
    /// As [`Store::durable`].
    fn commit(&mut self) -> Fut<'_, Self::Proof> {
        Box::pin(async move {
            self.submit().await?;
            self.durable().await
        })
    }

    /// Since when the longest waiting due task of each agent is due, on the steady clock. An agent may be left out whose tasks
    /// are all younger than many others'.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn oldest(&mut self, now: Now) -> Fut<'_, Vec<(AgentId, Timestamp)>>;

    /// The earliest time after `now` at which a waiting task becomes due, on the steady clock, or at which to look for news;
    /// may be told too early, never too late.
    fn next_due(&self, now: Now) -> Option<Timestamp>;

    /// Whether the disk is so full that new tasks must not be taken, for what is left of it is for those that there are.
    fn is_short(&self) -> bool {
        false
    }

    /// Whether to ask for news before the next batch is decided; `wanted` when that batch is about what others may have
    /// changed. Never where there is one daemon at most.
    fn has_news(&self, _now: Now, _wanted: bool) -> bool {
        false
    }

    /// What others did since this was asked last, with their open streams if `wanted`. The next commit takes note of it.
    ///
    /// # Errors
    /// Nothing was written.
    fn news<'a>(&'a mut self, _awaited: &'a [TaskId], _wanted: bool, _now: Now) -> Fut<'a, News> {
        Box::pin(std::future::ready(Ok(News::default())))
    }

    /// After a conflict: rolls back, and reads what memory has to be made anew from, these tasks for one. None: only
    /// [`Store::recover`] helps.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn anew<'a>(&'a mut self, _tasks: &'a [TaskId], _now: Now) -> Fut<'a, Option<(News, Vec<Task>)>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Gives up what other daemons may have. Nothing can be written after it.
    ///
    /// # Errors
    /// That the store cannot be reached; they will notice by themselves.
    fn leave(&mut self) -> Fut<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}
