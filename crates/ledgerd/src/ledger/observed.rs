//! What the ledger tells whoever observes it: transitions and commits, once they are durable.
//!
//! Nobody is waited for: where the observer does not keep up, a whole batch is not told, and counted.

use ledger_core::store::TaskData;
use ledger_core::{AgentId, Class, EventKind, Now, Reason, Record, Spec, State, Task, TaskId, Timestamp};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

/// Batches that may wait for the observer.
const WAITING: usize = 64;

/// A transition that begins or ends a delivery, makes a retry or a dead letter.
#[derive(Clone, Debug)]
pub struct Transition {
    /// Whose.
    pub task: TaskId,
    /// Its agent.
    pub agent: AgentId,
    /// What happened.
    pub kind: EventKind,
    /// State before; none for the first.
    pub from: Option<State>,
    /// State after.
    pub to: State,
    /// Finer meaning of it.
    pub reason: Reason,
    /// When.
    pub at: Timestamp,
    /// Of an assignment: since when it could have been handed out. Of its end: when the attempt began.
    pub since: Timestamp,
    /// The newest claim.
    pub fence: u64,
    /// Executions that began.
    pub attempt: u32,
    /// How the attempt failed.
    pub class: Option<Class>,
    /// When it is tried again.
    pub until: Option<Timestamp>,
    /// The attempt was held to be lost before it ended.
    pub was_lost: bool,
    /// Where somebody traces. What is only counted goes without: counts of what is shared are moved between cores.
    pub named: Option<Named>,
}

/// What a transition was of, and with whom.
#[derive(Clone, Debug)]
pub struct Named {
    /// What never changes of the task.
    pub spec: Arc<Spec>,
    /// Who had it, or has it.
    pub worker: Option<Arc<str>>,
}

/// Times of a task before a transition.
#[derive(Clone, Copy, Debug)]
pub(super) struct Before {
    ready_at: Timestamp,
    began_at: Option<Timestamp>,
    was_lost: bool,
}

impl Before {
    pub(super) fn of(task: &Task, now: Now) -> Self {
        let ready_at = if task.queued_at == Timestamp::FAR {
            task.updated_at.max(task.due_at(now))
        } else {
            task.queued_at
        };
        let began_at = task.lease.map(|lease| lease.acked_at.unwrap_or(task.updated_at));
        let was_lost = began_at.zip(task.lost_at).is_some_and(|(began, lost)| lost >= began);
        Self { ready_at, began_at, was_lost }
    }
}

impl Transition {
    /// None where it is of no interest.
    pub(super) fn of(record: &Record, agent: AgentId, before: Before) -> Option<Self> {
        use EventKind as Kind;
        let since = match record.kind {
            Kind::Assigned => before.ready_at,
            Kind::Completed
            | Kind::Failed
            | Kind::Released
            | Kind::Blocked
            | Kind::Stopped
            | Kind::AckTimeout
            | Kind::Lost
            | Kind::Abandoned => before.began_at.unwrap_or(record.at),
            _ if record.to == State::Failed && record.from != Some(State::Failed) => record.at,
            _ => return None,
        };
        Some(Self {
            task: record.task,
            agent,
            kind: record.kind,
            from: record.from,
            to: record.to,
            reason: record.reason,
            at: record.at,
            since: since.min(record.at),
            fence: record.fence,
            attempt: record.attempt,
            class: record.error.as_ref().map(|error| error.class),
            until: record.until,
            was_lost: before.was_lost,
            named: None,
        })
    }

    pub(super) fn named(mut self, spec: &Arc<Spec>, worker: Option<&Arc<str>>) -> Self {
        self.named = Some(Named { spec: Arc::clone(spec), worker: worker.cloned() });
        self
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Observed {
    /// To a task.
    Task(Transition),
    /// To a breaker.
    Breaker {
        /// Whose.
        agent: Arc<str>,
        /// Of which tasks; empty for all.
        task_type: Arc<str>,
        /// State before.
        from: &'static str,
        /// State after.
        to: &'static str,
    },
}

/// One batch.
#[derive(Debug)]
pub struct Told {
    /// In their order.
    pub seen: Vec<Observed>,
    /// What producers said of the tasks that were assigned, where somebody traces.
    pub origins: Vec<(TaskId, Arc<TaskData>)>,
    /// From the hand-over to the store until it was durable.
    pub took: Duration,
}

/// Where the ledger tells it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Observer {
    lane: mpsc::Sender<Told>,
    missed: Arc<AtomicU64>,
    /// Wants to know where tasks came from.
    pub(super) traces: bool,
}

impl Observer {
    /// One, and what it will hear; `traces`: with where tasks came from.
    #[must_use]
    pub fn new(traces: bool) -> (Self, mpsc::Receiver<Told>) {
        let (lane, told) = mpsc::channel(WAITING);
        (Self { lane, missed: Arc::default(), traces }, told)
    }

    /// Things that were not told because the observer was too slow.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    pub(super) fn tell(&self, told: Told) {
        let count = told.seen.len() as u64;
        if self.lane.try_send(told).is_err() {
            self.missed.fetch_add(count, Ordering::Relaxed);
        }
    }
}
