//! The reading half: what is asked of committed rows, and who answers.

use super::{AgentEvent, DeadLetter, Fut, Notes, TaskData};
use crate::event::Record;
use crate::id::{AgentId, TaskId};
use crate::task::{Reason, State, Task};
use crate::time::Timestamp;
use crate::watch::{Cut, End, Stretch};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// A task with what is known beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskView {
    /// The task.
    pub task: Task,
    /// Its agent's name.
    pub agent: Arc<str>,
    /// Its data; the payload is empty unless asked for.
    pub data: TaskData,
    /// Size of the payload.
    pub payload_bytes: u64,
    /// Size of the result.
    pub result_bytes: u64,
    /// The result, when asked for.
    pub result: Option<Bytes>,
    /// What is known beside it.
    pub notes: Notes,
}

/// A history row with its number in the ledger.
#[derive(Clone, Debug, PartialEq)]
pub struct HistoryView {
    /// Its number.
    pub seq: u64,
    /// The row.
    pub record: Record,
}

/// Which tasks to list. None and empty do not filter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskFilter {
    /// Of this agent.
    pub agent: Option<AgentId>,
    /// In one of these states.
    pub states: Vec<State>,
    /// Of this type.
    pub task_type: Option<String>,
    /// Of this priority.
    pub priority: Option<u8>,
    /// With all of these labels.
    pub labels: Vec<(String, String)>,
    /// Enqueued then or later.
    pub created_after: Option<Timestamp>,
    /// Enqueued before.
    pub created_before: Option<Timestamp>,
}

/// Which dead letters to list. None does not filter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeadLetterFilter {
    /// Of this agent.
    pub agent: Option<AgentId>,
    /// Of this type.
    pub task_type: Option<String>,
    /// With this reason.
    pub reason: Option<Reason>,
    /// With this fingerprint.
    pub fingerprint: Option<u64>,
    /// Failed then or later.
    pub failed_after: Option<Timestamp>,
    /// Failed before.
    pub failed_before: Option<Timestamp>,
    /// Discarded ones too.
    pub discarded: bool,
}

/// A page of a list, newest first.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    /// What was found.
    pub items: Vec<T>,
    /// Where to go on: only rows older than this; none when that was all.
    pub before: Option<u64>,
}

/// Dead letters that are alike.
#[derive(Clone, Debug, PartialEq)]
pub struct LetterGroup {
    /// The newest of them: its agent, type, reason, fingerprint and error are the group's.
    pub newest: DeadLetter,
    /// How many.
    pub count: u64,
    /// When the first failed.
    pub first_at: Timestamp,
    /// When the last failed.
    pub last_at: Timestamp,
}

/// Groups of dead letters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LetterGroups {
    /// Largest first.
    pub groups: Vec<LetterGroup>,
    /// Letters in all groups, those that are not returned included.
    pub letters: u64,
    /// Groups in all.
    pub total: u64,
    /// Not all letters were looked at.
    pub more: bool,
}

/// Which ended tasks leave the ledger: those that ended before a time; none: they all stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// DONE and CANCELLED ones, and dead letters that were discarded: counted from then.
    pub done: Option<Timestamp>,
    /// FAILED ones.
    pub failed: Option<Timestamp>,
}

impl Leaving {
    /// Whether this task leaves.
    #[must_use]
    pub fn takes(&self, task: &Task) -> bool {
        let before = match task.state {
            State::Done | State::Cancelled => self.done,
            State::Failed if task.discarded => self.done,
            State::Failed => self.failed,
            _ => None,
        };
        before.is_some_and(|before| task.updated_at < before)
    }
}

/// How much is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Dead letters that are not discarded.
    pub dead_letters: u64,
    /// Bytes of the database, and of what it keeps in files of their own.
    pub bytes: u64,
    /// Of those, free for new rows.
    pub free_bytes: u64,
    /// Bytes of the write-ahead log.
    pub log_bytes: u64,
}

/// The reading half of a store: committed rows only, any number of callers, never in the writer's way.
pub trait Reader: Send + Sync {
    /// One task.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn task(&self, id: TaskId, with_data: bool) -> Fut<'_, Option<TaskView>>;

    /// Tasks newest first, older than `before`. Looks at a bounded number of rows.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn tasks<'a>(
        &'a self,
        filter: &'a TaskFilter,
        before: Option<u64>,
        limit: usize,
    ) -> Fut<'a, Page<TaskView>>;

    /// A task's history, oldest first; none for an unknown task.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn history(&self, id: TaskId) -> Fut<'_, Option<Vec<HistoryView>>>;

    /// Where the history of all tasks ends.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn end(&self) -> Fut<'_, End>;

    /// What follows a cut that the history reaches, at most so many rows of each slot; none when tasks were removed whose rows did.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn after<'a>(&'a self, cut: &'a Cut, limit: usize) -> Fut<'a, Option<Stretch>>;

    /// One dead letter.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn dead_letter(&self, id: TaskId) -> Fut<'_, Option<DeadLetter>>;

    /// Dead letters newest first (by task), older than `before`.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn dead_letters<'a>(
        &'a self,
        filter: &'a DeadLetterFilter,
        before: Option<u64>,
        limit: usize,
    ) -> Fut<'a, Page<DeadLetter>>;

    /// Dead letters that fit, oldest first (by task), and whether there are more.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn oldest_letters<'a>(
        &'a self,
        filter: &'a DeadLetterFilter,
        limit: usize,
    ) -> Fut<'a, (Vec<TaskId>, bool)>;

    /// How many dead letters fit, [`LETTERS_LOOKED_AT`](crate::limits::LETTERS_LOOKED_AT) at most, and whether there are
    /// more.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn count_letters<'a>(&'a self, filter: &'a DeadLetterFilter) -> Fut<'a, (u64, bool)>;

    /// Dead letters that fit, by agent, type, reason and fingerprint, of the newest
    /// [`LETTERS_LOOKED_AT`](crate::limits::LETTERS_LOOKED_AT) that do; largest group first.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn letter_groups<'a>(&'a self, filter: &'a DeadLetterFilter, limit: usize) -> Fut<'a, LetterGroups>;

    /// What happened to agents, newest first, older than `before`, each with its number.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn agent_events(
        &self,
        agent: Option<AgentId>,
        before: Option<u64>,
        limit: usize,
    ) -> Fut<'_, Page<(u64, AgentEvent)>>;

    /// What the workers of these tasks need: data, and notes of those that were delivered or redriven before. In the order
    /// asked.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn for_workers<'a>(&'a self, ids: &'a [(TaskId, bool)]) -> Fut<'a, Vec<(Arc<TaskData>, Notes)>>;

    /// Looks at `look` tasks by number, those after `after`, and names the ones that leave; and the last one looked at,
    /// none when that was the end.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn expired(&self, after: TaskId, leaving: Leaving, look: usize)
    -> Fut<'_, (Vec<TaskId>, Option<TaskId>)>;

    /// One step of what the store has to do by itself from time to time, beside what the ledger writes; `kept` is the shortest
    /// time for which an ended task is stored, none where all of them are for ever. Whether a next step has something to
    /// do now.
    ///
    /// # Errors
    /// That the store cannot be used; whatever was begun is undone, and a later call tries again.
    fn tidy(&self, _now: Timestamp, _kept: Option<Duration>) -> Fut<'_, bool> {
        Box::pin(std::future::ready(Ok(false)))
    }

    /// How much is stored.
    ///
    /// # Errors
    /// That the store cannot be read.
    fn sizes(&self) -> Fut<'_, Sizes>;

    /// Looks through all that is stored for damage; slow. At once where the store does so by itself.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`](super::StoreError::Corrupt) with what was found; that the store cannot be read.
    fn check(&self) -> Fut<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Ends its connections, once the reads that run have ended.
    ///
    /// # Errors
    /// None so far.
    fn close(&self) -> Fut<'_, ()>;
}
