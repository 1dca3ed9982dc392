//! What the open batch has changed: nothing of it is sent before its end.
//!
//! Holds, and decides nothing. Invariants: one row image per task, the last, with the version that its row in the database
//! has; history in the order it was decided.

use super::hints::Hint;
use super::packed::{Entered, EntryPlace, Found};
use bytes::Bytes;
use ledger_core::store::{
    AgentEvent, AgentRow, BreakerRow, BudgetRow, DeadLetter, KeyHolder, Notes, RequestRow, SessionRow,
    TaskData,
};
use ledger_core::{AgentId, ByKey, ByName, ByTask, SessionId, State, Task, TaskId, Timestamp};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A task's row.
pub(super) struct Image {
    pub(super) task: Arc<Task>,
    /// Version of its row in the database; 0 of a new one.
    pub(super) expected: u64,
    /// Its row in the database may stand among those that wait.
    pub(super) may_have_waited: bool,
    /// As its row in the database is; none of a new one.
    pub(super) before: Option<Arc<Task>>,
    /// It was RUNNING.
    pub(super) ran: bool,
    /// Its newest entry of the history.
    pub(super) newest: Option<EntryPlace>,
}

impl Image {
    /// The task as its row will be.
    pub(super) fn found(&self) -> Found {
        Found { task: Arc::clone(&self.task), newest: self.newest }
    }

    /// The session that its row in the database names.
    pub(super) fn held(&self) -> Option<SessionId> {
        Some(self.before.as_ref()?.holder.as_ref()?.session)
    }

    /// Whether nothing of its row changes but what an end changes.
    pub(super) fn is_end(&self) -> bool {
        let waited_by = |task: &Task| {
            let Task { priority, run_at, calendar, deadline, queued_at, fence, delivery, .. } = *task;
            (priority, run_at, calendar, deadline, queued_at, fence, delivery)
        };
        let task = &*self.task;
        task.holder.is_none()
            && task.lease.is_none()
            && task.sample.is_none()
            && self.before.as_ref().is_some_and(|before| waited_by(before) == waited_by(task))
    }

    /// Whether it has no row in the database.
    pub(super) const fn is_new(&self) -> bool {
        self.expected == 0
    }

    /// Whether it stands among those that wait from now on.
    pub(super) fn waits(&self) -> bool {
        waits(&self.task)
    }
}

/// Whether a task is offered: when it is due, or its breaker lets it through.
pub(super) fn waits(task: &Task) -> bool {
    task.is_claimable_state() || task.is_gated()
}

/// See the module.
#[derive(Default)]
pub(super) struct Staged {
    pub(super) tasks: ByTask<Image>,
    pub(super) data: Vec<(TaskId, Arc<TaskData>)>,
    /// Keys that new tasks have.
    pub(super) keys: ByKey<KeyHolder>,
    pub(super) history: Vec<Entered>,
    pub(super) results: BTreeMap<TaskId, Bytes>,
    pub(super) salvage: BTreeMap<(TaskId, u64), Bytes>,
    pub(super) notes: BTreeMap<TaskId, Notes>,
    /// None: there is no letter any more.
    pub(super) letters: BTreeMap<TaskId, Option<DeadLetter>>,
    pub(super) freed: BTreeSet<TaskId>,
    /// A new task has a key that another held when the batch began, and may hold until this one's turn.
    pub(super) retakes: bool,
    pub(super) requests: ByName<RequestRow>,
    pub(super) agents: BTreeMap<AgentId, AgentRow>,
    pub(super) breakers: BTreeMap<(AgentId, Arc<str>), BreakerRow>,
    pub(super) budgets: BTreeMap<Option<AgentId>, BudgetRow>,
    pub(super) sessions: BTreeMap<Arc<str>, SessionRow>,
    pub(super) events: Vec<AgentEvent>,
    /// Tasks that go to another agent.
    pub(super) moved: BTreeSet<TaskId>,
    pub(super) payloads: Vec<(Bytes, Vec<TaskId>)>,
    /// With the version that was judged.
    pub(super) removed: Vec<(TaskId, u64)>,
    /// Agents that had tasks which left, and the blocks of these.
    pub(super) left: BTreeSet<AgentBlock>,
    pub(super) gone_workers: Vec<Arc<str>>,
    pub(super) events_before: Option<Timestamp>,
    /// By how much there are more of each.
    pub(super) counts: BTreeMap<(AgentId, u8), i64>,
    /// By how much more live in each block.
    pub(super) blocks: BTreeMap<u64, i64>,
    /// Something was done already that a commit must keep, or one is due.
    pub(super) heeds: bool,
    /// What others are to be told.
    pub(super) hint: Hint,
}

/// Numbers that an agent has one entry for.
pub(super) const AGENT_BLOCK: u64 = 16;

/// An agent that has tasks among 16 numbers, and which 16.
pub(super) type AgentBlock = (AgentId, u64);

/// See [`AgentBlock`].
pub(super) const fn agent_block(agent: AgentId, task: TaskId) -> AgentBlock {
    (agent, task.0 / AGENT_BLOCK)
}

/// Task numbers whose live ones are counted together: 2 to the power of this.
pub(super) const BLOCK_BITS: u32 = 12;

impl Staged {
    /// Images in the order of their numbers.
    pub(super) fn in_order(&self) -> Vec<&Image> {
        let mut images: Vec<(TaskId, &Image)> = self.tasks.iter().map(|(id, image)| (*id, image)).collect();
        images.sort_unstable_by_key(|(id, _)| *id);
        images.into_iter().map(|(_, image)| image).collect()
    }

    /// Whether a commit has nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
            && self.data.is_empty()
            && self.history.is_empty()
            && self.results.is_empty()
            && self.salvage.is_empty()
            && self.notes.is_empty()
            && self.letters.is_empty()
            && self.freed.is_empty()
            && self.requests.is_empty()
            && self.agents.is_empty()
            && self.breakers.is_empty()
            && self.budgets.is_empty()
            && self.sessions.is_empty()
            && self.events.is_empty()
            && self.moved.is_empty()
            && self.payloads.is_empty()
            && self.removed.is_empty()
            && self.gone_workers.is_empty()
            && self.events_before.is_none()
            && !self.heeds
    }

    /// A task was in one state of one agent and is in another.
    pub(super) fn count(&mut self, id: TaskId, was: Option<(AgentId, State)>, is: Option<(AgentId, State)>) {
        let mut lives = 0;
        for (place, n) in [(was, -1), (is, 1)] {
            let Some((agent, state)) = place else { continue };
            *self.counts.entry((agent, state.code())).or_default() += n;
            lives += if state.is_terminal() { 0 } else { n };
        }
        if lives != 0 {
            *self.blocks.entry(id.0 >> BLOCK_BITS).or_default() += lives;
        }
    }

    /// More is known beside a task; what is said last counts.
    pub(super) fn note(&mut self, id: TaskId, new: Notes) {
        let known = self.notes.entry(id).or_default();
        let Notes { error, checkpoint, progress, question, answer } = new;
        known.error = error.or_else(|| known.error.take());
        known.checkpoint = checkpoint.or_else(|| known.checkpoint.take());
        known.progress = progress.or_else(|| known.progress.take());
        known.question = question.or_else(|| known.question.take());
        known.answer = answer.or_else(|| known.answer.take());
    }
}
