//! A batch on its way to the file: what was decided, and the statements it becomes.
//!
//! Decides nothing. Invariants: one row image per task, the last; history in the order it was decided; the whole batch in
//! one transaction; the number of statements grows with the number of tables touched, not of tasks.

use super::bind::{self, add};
use super::insert::{MOST, Table};
use super::text;
use crate::store::ready::{Entry, Ready};
use bytes::Bytes;
use ledger_core::limits::{FORGOTTEN_AT_ONCE, REQUEST_MEMORY, SALVAGED};
use ledger_core::store::{
    AgentEvent, AgentRow, BreakerRow, BudgetRow, Counts, DeadLetter, Notes, RequestRow, SessionRow, TaskData,
};
use ledger_core::{AgentId, Record, State, Task, TaskId, Timestamp};
use sqlx::Arguments;
use sqlx::sqlite::SqliteArguments;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

/// Task numbers whose live ones are counted together: 2 to the power of this.
pub(super) const BLOCK_BITS: u32 = 12;
/// A statement with more variables than this runs alone: preparing one anew costs more than the hop it saves.
const SMALL: usize = 256;

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
    pub(super) salvage: Vec<(TaskId, u64, Bytes)>,
    pub(super) notes: Vec<(TaskId, Notes)>,
    /// None: there is no letter any more.
    pub(super) letters: BTreeMap<TaskId, Option<DeadLetter>>,
    pub(super) freed: BTreeSet<TaskId>,
    pub(super) requests: Vec<RequestRow>,
    pub(super) agents: BTreeMap<AgentId, AgentRow>,
    pub(super) breakers: BTreeMap<(AgentId, Arc<str>), BreakerRow>,
    pub(super) budgets: BTreeMap<AgentId, BudgetRow>,
    pub(super) sessions: BTreeMap<Arc<str>, SessionRow>,
    pub(super) events: Vec<AgentEvent>,
    pub(super) removed: Vec<TaskId>,
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

/// Numbers kept beside the tasks, all of them written where they changed.
#[derive(Default)]
pub(super) struct Tallies {
    pub(super) counts: HashMap<AgentId, Counts>,
    pub(super) blocks: HashMap<u64, u64>,
    pub(super) meta: Meta,
}

impl Tallies {
    fn live(&self, block: u64) -> u64 {
        self.blocks.get(&block).copied().unwrap_or(0)
    }
}

/// A statement of the batch.
pub(super) struct Step {
    pub(super) text: &'static str,
    pub(super) variables: usize,
    /// Tells its text from the others'.
    pub(super) tag: u32,
    bind: Bind,
}

enum Bind {
    Nothing,
    Json(String),
    Payload(usize),
    Salvaged(String),
    Meta,
    Purge { before: i64, most: i64 },
    Rows(Table, Range<usize>, usize),
}

/// The statements of a batch, in order, and the rows they are bound to.
pub(super) struct Plan<'a> {
    pub(super) steps: Vec<Step>,
    staged: &'a Staged,
    ready: &'a Ready,
    tallies: &'a Tallies,
    plain: Vec<TaskId>,
    held: Vec<TaskId>,
    full: Vec<TaskId>,
    keys: Vec<(AgentId, &'a TaskData, TaskId)>,
    letters: Vec<&'a DeadLetter>,
    agents: Vec<&'a AgentRow>,
    breakers: Vec<&'a BreakerRow>,
    budgets: Vec<&'a BudgetRow>,
    sessions: Vec<&'a SessionRow>,
    counts: Vec<(AgentId, u8)>,
    blocks: Vec<u64>,
}

const BEGIN: &str = "BEGIN IMMEDIATE";
const COMMIT: &str = "COMMIT";
const META: &str = "UPDATE meta SET last_task = ?, last_seq = ?, last_session = ? WHERE id = 1";
const FREE_KEYS: &str = "DELETE FROM idempotency_keys \
    WHERE (agent, key) IN ( \
        SELECT s.agent, s.key FROM json_each(?) AS freed \
        CROSS JOIN task_specs AS s ON s.id = freed.value \
        WHERE s.key IS NOT NULL AND idempotency_keys.task_id = s.id)";
const REDRIVEN: &str = "DELETE FROM dead_letter_queue WHERE task_id IN (SELECT value FROM json_each(?))";
/// [task, agent, agent before] each. Before the tasks' own data, which says what the key is.
const MOVE_KEYS: &str = "UPDATE idempotency_keys SET agent = moved.value ->> 1 \
    FROM json_each(?) AS moved CROSS JOIN task_specs AS s ON s.id = moved.value ->> 0 \
    WHERE idempotency_keys.agent = moved.value ->> 2 AND idempotency_keys.key = s.key \
    AND idempotency_keys.task_id = s.id";
const MOVE_SPECS: &str = "UPDATE task_specs SET agent = moved.value ->> 1 \
    FROM json_each(?) AS moved WHERE task_specs.id = moved.value ->> 0";
const NEW_PAYLOAD: &str = "UPDATE task_specs SET payload = ? WHERE id IN (SELECT value FROM json_each(?))";
const EMPTY_BLOCKS: &str = "DELETE FROM live_blocks WHERE block IN (SELECT value FROM json_each(?))";
const PRUNE_SALVAGE: &str = "DELETE FROM salvage \
    WHERE task_id IN (SELECT value FROM json_each(?)) \
    AND fence NOT IN ( \
        SELECT newest.fence FROM salvage AS newest \
        WHERE newest.task_id = salvage.task_id \
        ORDER BY newest.fence DESC LIMIT ?)";
/// Looks at the oldest rows alone, whether or not they go: never a scan.
const PURGE_REQUESTS: &str = "DELETE FROM requests WHERE seq IN ( \
    SELECT seq FROM (SELECT seq, at FROM requests ORDER BY seq LIMIT ?) WHERE at < ?)";

/// Along the chain from the newest row of each.
const REMOVE_HISTORY: &str = "DELETE FROM task_history WHERE seq IN ( \
    WITH RECURSIVE chain (seq) AS ( \
        SELECT t.history FROM json_each(?) AS gone CROSS JOIN tasks AS t ON t.id = gone.value \
        UNION ALL \
        SELECT h.prev FROM chain CROSS JOIN task_history AS h ON h.seq = chain.seq WHERE h.prev IS NOT NULL) \
    SELECT seq FROM chain)";
/// All else that belongs to a task, keyed by its number.
const REMOVE: [&str; 6] = [
    "DELETE FROM task_specs WHERE id IN (SELECT value FROM json_each(?))",
    "DELETE FROM tasks WHERE id IN (SELECT value FROM json_each(?))",
    "DELETE FROM results WHERE task_id IN (SELECT value FROM json_each(?))",
    "DELETE FROM salvage WHERE task_id IN (SELECT value FROM json_each(?))",
    "DELETE FROM task_notes WHERE task_id IN (SELECT value FROM json_each(?))",
    "DELETE FROM dead_letter_queue WHERE task_id IN (SELECT value FROM json_each(?))",
];
const GONE_WORKERS: &str =
    "DELETE FROM sessions WHERE worker IN (SELECT value FROM json_each(?)) AND open = 0";
/// Looks at the oldest rows alone, as above.
const OLD_EVENTS: &str = "DELETE FROM agent_events WHERE seq IN ( \
    SELECT seq FROM (SELECT seq, at FROM agent_events ORDER BY seq LIMIT ?) WHERE at < ?)";

/// Every statement that is no insert, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 18] = [
    REMOVE_HISTORY,
    REMOVE[0],
    REMOVE[1],
    REMOVE[2],
    REMOVE[3],
    REMOVE[4],
    REMOVE[5],
    GONE_WORKERS,
    OLD_EVENTS,
    META,
    FREE_KEYS,
    REDRIVEN,
    MOVE_KEYS,
    MOVE_SPECS,
    NEW_PAYLOAD,
    EMPTY_BLOCKS,
    PRUNE_SALVAGE,
    PURGE_REQUESTS,
];

impl Staged {
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
    }

    fn blob_bytes(&self) -> usize {
        let data: usize = self.data.iter().map(|(_, data)| data.payload.len()).sum();
        let results: usize = self.results.iter().map(|(_, result)| result.len()).sum();
        let salvage: usize = self.salvage.iter().map(|(_, _, result)| result.len()).sum();
        let answers: usize = self.requests.iter().map(|row| row.answer.len()).sum();
        let notes = self.notes.iter().map(|(_, notes)| notes.checkpoint.as_ref().map_or(0, Bytes::len));
        let payloads: usize = self.payloads.iter().map(|(payload, _)| payload.len()).sum();
        data + payloads + results + salvage + answers + notes.sum::<usize>()
    }
}

impl<'a> Plan<'a> {
    /// The statements for all that is staged. `purge`: answers may have grown old enough to be forgotten.
    pub(super) fn new(staged: &'a Staged, ready: &'a Ready, tallies: &'a Tallies, purge: bool) -> Self {
        let mut plan = Self {
            steps: Vec::with_capacity(32),
            staged,
            ready,
            tallies,
            plain: Vec::with_capacity(staged.tasks.len()),
            held: Vec::with_capacity(staged.tasks.len()),
            full: Vec::new(),
            keys: Vec::new(),
            letters: staged.letters.values().flatten().collect(),
            agents: staged.agents.values().collect(),
            breakers: staged.breakers.values().collect(),
            budgets: staged.budgets.values().collect(),
            sessions: staged.sessions.values().collect(),
            counts: staged.counts.iter().copied().collect(),
            blocks: staged.blocks.iter().copied().filter(|block| tallies.live(*block) > 0).collect(),
        };
        for entry in staged.tasks.iter().filter_map(|id| ready.entry(*id)) {
            match form(&entry.task) {
                Table::TasksFull => plan.full.push(entry.task.id),
                Table::TasksHeld => plan.held.push(entry.task.id),
                _ => plan.plain.push(entry.task.id),
            }
        }
        for (id, data) in
            staged.data.iter().filter(|(id, data)| !data.key.is_empty() && !staged.freed.contains(id))
        {
            plan.keys.extend(ready.entry(*id).map(|entry| (entry.task.spec.agent, &**data, *id)));
        }
        plan.write(purge);
        plan
    }

    fn write(&mut self, purge: bool) {
        let staged = self.staged;
        self.step(BEGIN, 0, 0, Bind::Nothing);
        if !staged.freed.is_empty() {
            self.step(FREE_KEYS, 1, 1, Bind::Json(ids(staged.freed.iter())));
        }
        let gone: Vec<_> =
            staged.letters.iter().filter(|(_, letter)| letter.is_none()).map(|(id, _)| id).collect();
        if !gone.is_empty() {
            self.step(REDRIVEN, 1, 2, Bind::Json(ids(gone.into_iter())));
        }
        if !staged.moved.is_empty() {
            let moved: Vec<_> = staged
                .moved
                .iter()
                .map(|(id, before)| (id.0, self.entry(*id).task.spec.agent.0, before.0))
                .collect();
            let moved = text::written(&moved);
            self.step(MOVE_KEYS, 1, 8, Bind::Json(moved.clone()));
            self.step(MOVE_SPECS, 1, 9, Bind::Json(moved));
        }
        for index in 0..staged.payloads.len() {
            self.step(NEW_PAYLOAD, 2, 10, Bind::Payload(index));
        }
        if purge {
            let most = 100 + 2 * staged.requests.len() as i64;
            let before = self.ready.now().at.before(REQUEST_MEMORY).millis();
            self.step(PURGE_REQUESTS, 2, 3, Bind::Purge { before, most });
        }
        if !staged.removed.is_empty() {
            let removed = ids(staged.removed.iter());
            for (tag, statement) in (11..).zip(std::iter::once(REMOVE_HISTORY).chain(REMOVE)) {
                self.step(statement, 1, tag, Bind::Json(removed.clone()));
            }
        }
        if !staged.gone_workers.is_empty() {
            self.step(
                GONE_WORKERS,
                1,
                18,
                Bind::Json(text::written(
                    &staged.gone_workers.iter().map(|name| &**name).collect::<Vec<_>>(),
                )),
            );
        }
        if let Some(before) = staged.events_before {
            let (most, before) = (FORGOTTEN_AT_ONCE as i64, before.millis());
            self.step(OLD_EVENTS, 2, 19, Bind::Purge { before, most });
        }
        let empty: Vec<_> = staged.blocks.iter().filter(|block| self.tallies.live(**block) == 0).collect();
        if !empty.is_empty() {
            self.step(EMPTY_BLOCKS, 1, 7, Bind::Json(text::written(&empty)));
        }
        self.rows(Table::Counts, self.counts.len());
        self.rows(Table::LiveBlocks, self.blocks.len());
        self.step(META, 3, 4, Bind::Meta);
        self.rows(Table::Agents, self.agents.len());
        self.rows(Table::Breakers, self.breakers.len());
        self.rows(Table::Budgets, self.budgets.len());
        self.rows(Table::Sessions, self.sessions.len());
        self.rows(Table::Events, staged.events.len());
        self.rows(Table::Specs, staged.data.len());
        self.rows(Table::TasksPlain, self.plain.len());
        self.rows(Table::TasksHeld, self.held.len());
        self.rows(Table::TasksFull, self.full.len());
        self.rows(Table::History, staged.history.len());
        self.rows(Table::Results, staged.results.len());
        self.rows(Table::Notes, staged.notes.len());
        self.rows(Table::DeadLetters, self.letters.len());
        self.rows(Table::Keys, self.keys.len());
        self.rows(Table::Requests, staged.requests.len());
        self.rows(Table::Salvage, staged.salvage.len());
        // Large ones alone, and the small ones together in front of them: deletes stay before inserts either way.
        self.steps[1..].sort_by_key(|step| step.variables > SMALL);
        if !staged.salvage.is_empty() {
            let tasks: BTreeSet<_> = staged.salvage.iter().map(|(task, _, _)| task).collect();
            self.step(PRUNE_SALVAGE, 2, 5, Bind::Salvaged(ids(tasks.into_iter())));
        }
        self.step(COMMIT, 0, 6, Bind::Nothing);
    }

    fn step(&mut self, text: &'static str, variables: usize, tag: u32, bind: Bind) {
        self.steps.push(Step { text, variables, tag, bind });
    }

    fn rows(&mut self, table: Table, count: usize) {
        let insert = table.insert();
        let mut from = 0;
        while from < count {
            let size = MOST.min((count - from).next_power_of_two());
            let to = count.min(from + size);
            let tag = (table as u32 + 1) * 1_024 + size as u32;
            self.step(insert.text(size), size * insert.width(), tag, Bind::Rows(table, from..to, size));
            from = to;
        }
    }

    /// The statements, from `first` on, that go to the connection in one hop; none after the last.
    pub(super) fn hop(&self, first: usize) -> Range<usize> {
        let mut variables = 0;
        let fits = |step: &&Step| {
            variables += step.variables;
            step.variables <= SMALL && variables <= 4 * SMALL
        };
        let rest = &self.steps[first..];
        first..first + rest.iter().take_while(fits).count().max(1).min(rest.len())
    }

    /// The values of these statements.
    pub(super) fn args(&self, hop: &Range<usize>) -> SqliteArguments {
        let mut args = SqliteArguments::default();
        for index in hop.clone() {
            self.bind(&mut args, &self.steps[index], index + 1 == hop.end);
        }
        args
    }

    /// A guess of the bytes that the commit adds to the write-ahead log.
    pub(super) fn bytes(&self) -> u64 {
        let variables: usize = self.steps.iter().map(|step| step.variables).sum();
        let removed = 1_024 * self.staged.removed.len();
        (16 * 1_024 + 12 * variables + removed + self.staged.blob_bytes()) as u64
    }

    /// Binds what `step` takes. `last`: nothing follows in the same hop, so trailing NULLs need no binding.
    fn bind(&self, args: &mut SqliteArguments, step: &Step, last: bool) {
        match &step.bind {
            Bind::Nothing => {}
            Bind::Json(json) => add(args, json.clone()),
            Bind::Payload(index) => {
                let (payload, tasks) = &self.staged.payloads[*index];
                add(args, payload.to_vec());
                add(args, ids(tasks.iter()));
            }
            Bind::Salvaged(json) => {
                add(args, json.clone());
                add(args, SALVAGED as i64);
            }
            Bind::Purge { before, most } => {
                add(args, *most);
                add(args, *before);
            }
            Bind::Meta => {
                let meta = self.tallies.meta;
                add(args, meta.last_task.cast_signed());
                add(args, meta.last_seq.cast_signed());
                add(args, meta.last_session.cast_signed());
            }
            Bind::Rows(table, range, size) => {
                args.reserve(step.variables, 0);
                for index in range.clone() {
                    self.row(args, *table, index);
                }
                if !last {
                    for _ in 0..(size - range.len()) * table.insert().width() {
                        add(args, None::<i64>);
                    }
                }
            }
        }
    }

    fn entry(&self, id: TaskId) -> &Entry {
        self.ready.entry(id).expect("what a batch writes is in memory until its commit")
    }

    fn row(&self, args: &mut SqliteArguments, table: Table, index: usize) {
        let staged = self.staged;
        match table {
            Table::Specs => {
                let (id, data) = &staged.data[index];
                bind::spec(args, *id, &self.entry(*id).task.spec, data);
            }
            Table::TasksPlain => bind::task(args, self.entry(self.plain[index]), table),
            Table::TasksHeld => bind::task(args, self.entry(self.held[index]), table),
            Table::TasksFull => bind::task(args, self.entry(self.full[index]), table),
            Table::History => bind::history(args, &staged.history[index]),
            Table::Results => {
                let (task, result) = &staged.results[index];
                add(args, task.0.cast_signed());
                add(args, result.to_vec());
            }
            Table::Salvage => {
                let (task, fence, result) = &staged.salvage[index];
                add(args, task.0.cast_signed());
                add(args, fence.cast_signed());
                add(args, result.to_vec());
            }
            Table::Notes => bind::notes(args, &staged.notes[index]),
            Table::DeadLetters => bind::letter(args, self.letters[index]),
            Table::Keys => {
                let (agent, data, task) = self.keys[index];
                add(args, i64::from(agent.0));
                add(args, data.key.clone());
                add(args, task.0.cast_signed());
                add(args, data.digest.cast_signed());
            }
            Table::Requests => {
                let row = &staged.requests[index];
                add(args, request_hash(&row.id));
                add(args, Arc::clone(&row.id));
                add(args, row.digest.cast_signed());
                add(args, row.answer.to_vec());
                add(args, row.at.millis());
            }
            Table::Agents => {
                let row = self.agents[index];
                add(args, i64::from(row.id.0));
                add(args, Arc::clone(&row.name));
                add(args, text::agent(&row.given));
                add(args, row.created_at.millis());
                add(args, row.pause.as_ref().map(text::pause));
            }
            Table::Breakers => bind::breaker(args, self.breakers[index]),
            Table::Budgets => {
                let row = self.budgets[index];
                add(args, row.agent.map_or(0, |agent| i64::from(agent.0)));
                add(args, row.level.millitokens.cast_signed());
                add(args, row.level.updated_at.cast_signed());
            }
            Table::Sessions => {
                let row = self.sessions[index];
                add(args, Arc::clone(&row.worker));
                add(args, row.incarnation.cast_signed());
                add(args, row.session.0.cast_signed());
                add(args, row.connected_at.millis());
                add(args, row.beat_at.millis());
                add(args, row.open);
            }
            Table::Events => bind::event(args, &staged.events[index]),
            Table::Counts => {
                let (agent, state) = self.counts[index];
                add(args, i64::from(agent.0));
                add(args, i64::from(state));
                add(
                    args,
                    self.tallies
                        .counts
                        .get(&agent)
                        .map_or(0, |counts| counts[usize::from(state)])
                        .cast_signed(),
                );
            }
            Table::LiveBlocks => {
                let block = self.blocks[index];
                add(args, block.cast_signed());
                add(args, self.tallies.live(block).cast_signed());
            }
        }
    }
}

/// The shortest form of a task's row.
fn form(task: &Task) -> Table {
    let rare = task.retry_count | task.losses | task.preemptions | task.redrives | task.probe_failures;
    let rare = rare | task.free_releases | task.blocks;
    if rare | task.tokens | task.previous_delay != 0 || task.stop.is_some() || task.discarded {
        Table::TasksFull
    } else if task.holder.is_some() || task.lease.is_some() || task.sample.is_some() {
        Table::TasksHeld
    } else {
        Table::TasksPlain
    }
}

/// A hash of a request id that is stored, so it never changes: FNV-1a.
pub(super) fn request_hash(id: &str) -> i64 {
    let hash = id.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    hash.cast_signed()
}

/// A JSON list of task numbers.
pub(super) fn ids<'a>(ids: impl Iterator<Item = &'a TaskId>) -> String {
    text::written(&ids.map(|id| id.0).collect::<Vec<_>>())
}

/// Whether a task counts as live in its block.
pub(super) const fn is_live(state: State) -> bool {
    !state.is_terminal()
}
