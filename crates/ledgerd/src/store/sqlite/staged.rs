//! What a batch has changed, from the first write to the rows of its commit.
//!
//! Holds, and decides nothing. Invariants: one row image per task, the last; history in the order it was decided; what a part
//! has is nowhere else.

use bytes::Bytes;
use ledger_core::store::{
    AgentEvent, AgentRow, BreakerRow, BudgetRow, Counts, DeadLetter, Notes, RequestRow, SessionRow, TaskData,
};
use ledger_core::{AgentId, Record, Spec, State, Task, TaskId, Timestamp};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Task numbers whose live ones are counted together: 2 to the power of this.
pub(super) const BLOCK_BITS: u32 = 12;
/// History rows, or bytes of payloads and results, from which on it is worth it that another thread writes them.
pub(super) const WORTH: usize = 256;
const WORTH_BYTES: usize = 256 << 10;

/// A history row on its way.
pub(super) struct Row {
    pub(super) seq: u64,
    pub(super) prev: Option<u64>,
    pub(super) record: Record,
}

/// What the open batch has changed.
#[derive(Default)]
pub(super) struct Staged {
    pub(super) tasks: Vec<TaskId>,
    pub(super) data: Vec<(TaskId, Arc<TaskData>)>,
    pub(super) history: Vec<Row>,
    pub(super) results: Vec<(TaskId, Bytes)>,
    /// Results that fit into the row of their task.
    pub(super) small: Vec<(TaskId, Bytes)>,
    /// What is written ahead, and not in the fields above any more.
    pub(super) parts: Vec<Arc<Part>>,
    pub(super) salvage: Vec<(TaskId, u64, Bytes)>,
    pub(super) notes: Vec<(TaskId, Notes)>,
    /// None: there is no letter any more.
    pub(super) letters: BTreeMap<TaskId, Option<DeadLetter>>,
    pub(super) freed: BTreeSet<TaskId>,
    /// Those that no part has.
    pub(super) freed_since: Vec<TaskId>,
    pub(super) requests: Vec<RequestRow>,
    pub(super) agents: BTreeMap<AgentId, AgentRow>,
    pub(super) breakers: BTreeMap<(AgentId, Arc<str>), BreakerRow>,
    pub(super) budgets: BTreeMap<AgentId, BudgetRow>,
    pub(super) sessions: BTreeMap<Arc<str>, SessionRow>,
    pub(super) events: Vec<AgentEvent>,
    pub(super) removed: Vec<TaskId>,
    /// Agents that had those, and the blocks of these.
    pub(super) left: BTreeSet<(u32, u64)>,
    pub(super) gone_workers: Vec<Arc<str>>,
    pub(super) events_before: Option<Timestamp>,
    /// Task, agent before.
    pub(super) moved: Vec<(TaskId, AgentId)>,
    pub(super) payloads: Vec<(Bytes, Vec<TaskId>)>,
    pub(super) counts: BTreeSet<(AgentId, u8)>,
    pub(super) blocks: BTreeSet<u64>,
}

/// What a batch leaves behind in `meta`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Meta {
    pub(super) last_task: u64,
    pub(super) last_seq: u64,
    pub(super) last_session: u64,
}

/// Rows that nothing decided later can change.
#[derive(Default)]
pub(super) struct Part {
    /// Tasks whose keys are free; before the keys of new ones.
    pub(super) freed: Vec<TaskId>,
    /// Task, agent, agent before; before the keys of new tasks too. Of a batch's last part alone.
    pub(super) moved: Vec<(u64, u32, u32)>,
    pub(super) specs: Vec<Born>,
    pub(super) history: Vec<Row>,
    pub(super) results: Vec<(TaskId, Bytes)>,
}

/// A new task.
pub(super) struct Born {
    pub(super) id: TaskId,
    pub(super) spec: Arc<Spec>,
    pub(super) data: Arc<TaskData>,
    /// It has a key, and has not freed it already.
    pub(super) keyed: bool,
}

/// A task's row.
pub(super) struct Image {
    pub(super) task: Arc<Task>,
    /// Number of its newest history row.
    pub(super) history: u64,
    /// In the row of a task that is DONE, when it is small.
    pub(super) result: Option<Bytes>,
}

/// A batch that is decided: what its commit writes.
#[derive(Default)]
pub(super) struct Sealed {
    /// The rest, as it was staged.
    pub(super) staged: Staged,
    pub(super) last: Part,
    /// By number.
    pub(super) tasks: Vec<Image>,
    pub(super) counts: Vec<(AgentId, u8, u64)>,
    /// Blocks, and how many live tasks each has.
    pub(super) blocks: Vec<(u64, u64)>,
    pub(super) meta: Meta,
    /// Answers of before this have grown old enough to be forgotten.
    pub(super) purge: Option<Timestamp>,
}

/// Numbers kept beside the tasks, all of them written where they changed.
#[derive(Default)]
pub(super) struct Tallies {
    pub(super) counts: HashMap<AgentId, Counts>,
    pub(super) blocks: HashMap<u64, u64>,
    pub(super) meta: Meta,
}

impl Tallies {
    pub(super) fn live(&self, block: u64) -> u64 {
        self.blocks.get(&block).copied().unwrap_or(0)
    }
}

impl Staged {
    /// Whether a commit has nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
            && self.data.is_empty()
            && self.history.is_empty()
            && self.results.is_empty()
            && self.small.is_empty()
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
            && self.parts.is_empty()
    }

    /// The key of this task is free.
    pub(super) fn free(&mut self, id: TaskId) {
        if self.freed.insert(id) {
            self.freed_since.push(id);
        }
    }

    /// Whether rows may be written before others of the batch: nothing yet changes what new rows are found by.
    pub(super) fn keeps_its_order(&self) -> bool {
        self.moved.is_empty() && self.payloads.is_empty() && self.removed.is_empty()
    }

    pub(super) fn blob_bytes(&self) -> usize {
        let salvage: usize = self.salvage.iter().map(|(_, _, result)| result.len()).sum();
        let answers: usize = self.requests.iter().map(|row| row.answer.len()).sum();
        let notes = self.notes.iter().map(|(_, notes)| notes.checkpoint.as_ref().map_or(0, Bytes::len));
        let payloads: usize = self.payloads.iter().map(|(payload, _)| payload.len()).sum();
        payloads + salvage + answers + notes.sum::<usize>()
    }
}

impl Sealed {
    /// Whether a commit has nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.staged.is_empty() && self.last.is_empty() && self.tasks.is_empty()
    }

    /// Whether a hand-over would cost more than it saves.
    pub(super) fn is_small(&self) -> bool {
        self.last.history.len() < WORTH && self.last.blob_bytes() < WORTH_BYTES
    }
}

impl Part {
    pub(super) fn is_empty(&self) -> bool {
        self.specs.is_empty()
            && self.history.is_empty()
            && self.results.is_empty()
            && self.freed.is_empty()
            && self.moved.is_empty()
    }

    pub(super) fn blob_bytes(&self) -> usize {
        let payloads: usize = self.specs.iter().map(|born| born.data.payload.len()).sum();
        let results: usize = self.results.iter().map(|(_, result)| result.len()).sum();
        payloads + results
    }
}

/// Whether a task counts as live in its block.
pub(super) const fn is_live(state: State) -> bool {
    !state.is_terminal()
}
