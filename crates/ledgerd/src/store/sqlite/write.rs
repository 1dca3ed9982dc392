//! A batch on its way to the file: what was decided, and the statements it becomes.
//!
//! Decides nothing. The writing connection is not sqlx's: a statement there is a hop to another thread and back, and costs
//! more than the row that it writes (docs/benchmarks.md). Here the thread that decided a batch also writes it, with
//! statements that are prepared once. Invariants: one row image per task, the last; history in the order it was decided;
//! the whole batch in one transaction.

use super::ahead::Part;
use super::bind::{self, Args};
use super::insert::Table;
use super::text;
use crate::store::ready::Ready;
use bytes::Bytes;
use ledger_core::limits::{FORGOTTEN_AT_ONCE, REQUEST_MEMORY, SALVAGED};
use ledger_core::store::{
    AgentEvent, AgentRow, BreakerRow, BudgetRow, Counts, DeadLetter, KeyHolder, Notes, RequestRow,
    SessionRow, TaskData,
};
use ledger_core::{AgentId, ByTask, Record, State, Task, TaskId, Timestamp};
use rusqlite::{Connection, OpenFlags, OptionalExtension, Result, params};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Task numbers whose live ones are counted together: 2 to the power of this.
pub(super) const BLOCK_BITS: u32 = 12;
/// More than there are statements.
const STATEMENTS_KEPT: usize = 64;

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
    /// So many of `data` are written ahead.
    pub(super) data_ahead: usize,
    pub(super) history: Vec<Row>,
    /// History that is written ahead.
    pub(super) ahead: Vec<Arc<Vec<Row>>>,
    pub(super) results: Vec<(TaskId, Bytes)>,
    /// Results that fit into the row of their task.
    pub(super) small: ByTask<Bytes>,
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

const BEGIN: &str = "BEGIN IMMEDIATE";
const COMMIT: &str = "COMMIT";
const KEY: &str = "SELECT task_id, digest FROM idempotency_keys WHERE agent = ? AND key = ?";
const REQUEST: &str = "SELECT digest, answer, at FROM requests WHERE hash = ? AND id = ?";
const OLDEST_REQUEST: &str = "SELECT at FROM requests ORDER BY seq LIMIT 1";
const META: &str = "UPDATE meta SET last_task = ?, last_seq = ?, last_session = ? WHERE id = 1";
const FREE_KEYS: &str = "DELETE FROM idempotency_keys \
    WHERE (agent, key) IN ( \
        SELECT s.agent, s.key FROM json_each(?) AS freed \
        CROSS JOIN task_specs AS s ON s.id = freed.value \
        WHERE s.key IS NOT NULL AND idempotency_keys.task_id = s.id)";
const REDRIVEN: &str = "DELETE FROM dead_letter_queue WHERE task_id = ?";
/// [task, agent, agent before] each. Before the tasks' own data, which says what the key is.
const MOVE_KEYS: &str = "UPDATE idempotency_keys SET agent = moved.value ->> 1 \
    FROM json_each(?) AS moved CROSS JOIN task_specs AS s ON s.id = moved.value ->> 0 \
    WHERE idempotency_keys.agent = moved.value ->> 2 AND idempotency_keys.key = s.key \
    AND idempotency_keys.task_id = s.id";
const MOVE_SPECS: &str = "UPDATE task_specs SET agent = moved.value ->> 1 \
    FROM json_each(?) AS moved WHERE task_specs.id = moved.value ->> 0";
const NEW_PAYLOAD: &str = "UPDATE task_specs SET payload = ? WHERE id IN (SELECT value FROM json_each(?))";
const EMPTY_BLOCK: &str = "DELETE FROM live_blocks WHERE block = ?";
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
const GONE_WORKER: &str = "DELETE FROM sessions WHERE worker = ? AND open = 0";
/// Looks at the oldest rows alone, as above.
const OLD_EVENTS: &str = "DELETE FROM agent_events WHERE seq IN ( \
    SELECT seq FROM (SELECT seq, at FROM agent_events ORDER BY seq LIMIT ?) WHERE at < ?)";

/// Every statement that is no insert, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 21] = [
    REMOVE_HISTORY,
    REMOVE[0],
    REMOVE[1],
    REMOVE[2],
    REMOVE[3],
    REMOVE[4],
    REMOVE[5],
    GONE_WORKER,
    OLD_EVENTS,
    META,
    FREE_KEYS,
    REDRIVEN,
    MOVE_KEYS,
    MOVE_SPECS,
    NEW_PAYLOAD,
    EMPTY_BLOCK,
    PRUNE_SALVAGE,
    PURGE_REQUESTS,
    KEY,
    REQUEST,
    OLDEST_REQUEST,
];

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
    }

    /// Whether rows may be written before others of the batch: nothing yet changes what new rows are found by.
    pub(super) fn keeps_its_order(&self) -> bool {
        self.moved.is_empty() && self.payloads.is_empty() && self.removed.is_empty()
    }

    fn new_data(&self) -> &[(TaskId, Arc<TaskData>)] {
        &self.data[self.data_ahead..]
    }

    fn blob_bytes(&self) -> usize {
        let data: usize = self.new_data().iter().map(|(_, data)| data.payload.len()).sum();
        let results = self.results.iter().map(|(_, result)| result).chain(self.small.values());
        let results: usize = results.map(Bytes::len).sum();
        let salvage: usize = self.salvage.iter().map(|(_, _, result)| result.len()).sum();
        let answers: usize = self.requests.iter().map(|row| row.answer.len()).sum();
        let notes = self.notes.iter().map(|(_, notes)| notes.checkpoint.as_ref().map_or(0, Bytes::len));
        let payloads: usize = self.payloads.iter().map(|(payload, _)| payload.len()).sum();
        data + payloads + results + salvage + answers + notes.sum::<usize>()
    }
}

/// The one connection that writes.
pub(super) struct Writer {
    conn: Connection,
}

/// What a commit reads.
pub(super) struct Sources<'a> {
    pub(super) staged: &'a Staged,
    pub(super) ready: &'a Ready,
    pub(super) tallies: &'a Tallies,
    /// Answers may have grown old enough to be forgotten.
    pub(super) purge: bool,
}

impl Writer {
    /// Opens a file that has its schema.
    pub(super) fn open(path: &Path, busy: Duration, pragmas: &[(&str, String)]) -> Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = Connection::open_with_flags(path, flags)?;
        conn.busy_timeout(busy)?;
        for (name, value) in pragmas {
            conn.pragma_update(None, name, value)?;
        }
        conn.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
        Ok(Self { conn })
    }

    /// The value of a setting.
    #[cfg(test)]
    pub(super) fn pragma(&self, name: &str) -> String {
        let value = |row: &rusqlite::Row<'_>| row.get::<_, rusqlite::types::Value>(0);
        match self.conn.pragma_query_value(None, name, value).expect("it answers") {
            rusqlite::types::Value::Integer(value) => value.to_string(),
            rusqlite::types::Value::Text(value) => value,
            other => panic!("{name} is {other:?}"),
        }
    }

    /// Opens the batch's transaction, if it is not: what is read in one costs no locks of its own.
    pub(super) fn begin(&self) -> Result<()> {
        if self.conn.is_autocommit() { self.run(BEGIN, |_| {}) } else { Ok(()) }
    }

    /// Ends a transaction that was left open, if there is one.
    pub(super) fn roll_back(&self) {
        if !self.conn.is_autocommit() {
            // Of no effect where SQLite has rolled back by itself.
            let _ = self.conn.execute_batch("ROLLBACK");
        }
    }

    pub(super) fn close(self) -> Result<()> {
        self.conn.close().map_err(|(_, error)| error)
    }

    /// The holder of a key: task and digest.
    pub(super) fn key(&self, agent: AgentId, key: &str) -> Result<Option<KeyHolder>> {
        let mut statement = self.conn.prepare_cached(KEY)?;
        let holder = statement.query_row(params![agent.0, key], |row| {
            Ok(KeyHolder {
                task: TaskId(row.get::<_, i64>(0)?.cast_unsigned()),
                digest: row.get::<_, i64>(1)?.cast_unsigned(),
            })
        });
        holder.optional()
    }

    /// The answer to a request that was made before.
    pub(super) fn request(&self, id: &Arc<str>) -> Result<Option<RequestRow>> {
        let mut statement = self.conn.prepare_cached(REQUEST)?;
        let request = statement.query_row(params![request_hash(id), &**id], |row| {
            Ok(RequestRow {
                id: Arc::clone(id),
                digest: row.get::<_, i64>(0)?.cast_unsigned(),
                answer: row.get::<_, Vec<u8>>(1)?.into(),
                at: Timestamp::from_millis(row.get(2)?),
            })
        });
        request.optional()
    }

    /// When the oldest answer was given that is remembered.
    pub(super) fn oldest_request(&self) -> Result<Timestamp> {
        let mut statement = self.conn.prepare_cached(OLDEST_REQUEST)?;
        let at = statement.query_row([], |row| row.get(0)).optional()?;
        Ok(at.map_or(Timestamp::FAR, Timestamp::from_millis))
    }

    /// Makes a batch durable. A guess of the bytes that it adds to the write-ahead log.
    ///
    /// # Errors
    /// SQLite's. Nothing of the batch is visible then; whether it is durable is unclear after an I/O error.
    pub(super) fn commit(&self, from: &Sources<'_>) -> Result<u64> {
        let written = self.write(from);
        if written.is_err() {
            self.roll_back();
        }
        Ok((16 * 1_024 + 12 * written? + 1_024 * from.staged.removed.len() + from.staged.blob_bytes()) as u64)
    }

    /// Writes a part of a batch whose rest is still to come; a guess of its bytes.
    pub(super) fn write_part(&self, part: &Part) -> Result<u64> {
        self.begin()?;
        if let Some(freed) = &part.freed {
            self.run(FREE_KEYS, |args| args.add(freed))?;
        }
        let mut values = self.rows(Table::Specs, part.specs.iter(), |args, (id, spec, data)| {
            bind::spec(args, *id, spec, data);
        })?;
        let keyed = part.specs.iter().filter(|(_, _, data)| !data.key.is_empty());
        values += self.rows(Table::Keys, keyed, |args, (id, spec, data)| bind::key(args, *id, spec, data))?;
        values += self.rows(Table::History, part.history.iter(), bind::history)?;
        values += self.rows(Table::Results, part.results.iter(), |args, (id, result)| {
            bind::result(args, *id, result);
        })?;
        let payloads: usize = part.specs.iter().map(|(_, _, data)| data.payload.len()).sum();
        let results: usize = part.results.iter().map(|(_, result)| result.len()).sum();
        Ok((12 * values + payloads + results) as u64)
    }

    /// Runs the statements of a batch; the number of values written.
    fn write(&self, from: &Sources<'_>) -> Result<usize> {
        let Sources { staged, ready, tallies, purge } = *from;
        let entry =
            |id: &TaskId| ready.entry(*id).expect("what a batch writes is in memory until its commit");
        self.begin()?;
        let rare = !staged.freed.is_empty()
            || !staged.letters.is_empty()
            || !staged.moved.is_empty()
            || !staged.payloads.is_empty()
            || !staged.removed.is_empty()
            || !staged.gone_workers.is_empty()
            || staged.events_before.is_some();
        if rare {
            self.write_rare(from)?;
        }
        if purge {
            let most = 100 + 2 * staged.requests.len() as i64;
            let before = ready.now().at.before(REQUEST_MEMORY).millis();
            self.run(PURGE_REQUESTS, |args| {
                args.add(most);
                args.add(before);
            })?;
        }
        let empty = staged.blocks.iter().filter(|block| tallies.live(**block) == 0);
        self.each(EMPTY_BLOCK, empty, |args, block| args.add(block.cast_signed()))?;
        let meta = tallies.meta;
        self.run(META, |args| {
            args.add(meta.last_task.cast_signed());
            args.add(meta.last_seq.cast_signed());
            args.add(meta.last_session.cast_signed());
        })?;
        let mut values = 0;
        values += self.rows(Table::Counts, staged.counts.iter(), |args, (agent, state)| {
            let counts = tallies.counts.get(agent);
            args.add(agent.0);
            args.add(*state);
            args.add(counts.map_or(0, |counts| counts[usize::from(*state)]).cast_signed());
        })?;
        let live = staged.blocks.iter().filter(|block| tallies.live(**block) > 0);
        values += self.rows(Table::LiveBlocks, live, |args, block| {
            args.add(block.cast_signed());
            args.add(tallies.live(*block).cast_signed());
        })?;
        values += self.rows(Table::Agents, staged.agents.values(), bind::agent)?;
        values += self.rows(Table::Breakers, staged.breakers.values(), bind::breaker)?;
        values += self.rows(Table::Budgets, staged.budgets.values(), bind::budget)?;
        values += self.rows(Table::Sessions, staged.sessions.values(), bind::session)?;
        values += self.rows(Table::Events, staged.events.iter(), bind::event)?;
        values += self.rows(Table::Specs, staged.new_data().iter(), |args, (id, data)| {
            bind::spec(args, *id, &entry(id).task.spec, data);
        })?;
        let small = |task: &Task| staged.small.get(&task.id).filter(|_| task.state == State::Done);
        for table in [Table::TasksPlain, Table::TasksDone, Table::TasksHeld, Table::TasksFull] {
            let form = |task: &Task| match form(task) {
                Table::TasksPlain if small(task).is_some() => Table::TasksDone,
                form => form,
            };
            let tasks = staged.tasks.iter().map(entry).filter(|entry| form(&entry.task) == table);
            values += self.rows(table, tasks, |args, entry| {
                bind::task(args, entry, table, small(&entry.task));
            })?;
        }
        let in_rows = |id: &TaskId| {
            let row = staged.tasks.binary_search(id).ok().and_then(|_| ready.entry(*id));
            row.is_some_and(|entry| entry.task.state == State::Done && form(&entry.task) == Table::TasksPlain)
        };
        let apart = staged.small.iter().filter(|(id, _)| !in_rows(id));
        values += self.rows(Table::Results, apart, |args, (id, result)| bind::result(args, *id, result))?;
        values += self.rows(Table::History, staged.history.iter(), bind::history)?;
        values += self.rows(Table::Results, staged.results.iter(), |args, (id, result)| {
            bind::result(args, *id, result);
        })?;
        values += self.rows(Table::Notes, staged.notes.iter(), bind::notes)?;
        values += self.rows(Table::DeadLetters, staged.letters.values().flatten(), bind::letter)?;
        let keyed =
            staged.new_data().iter().filter(|(id, data)| !data.key.is_empty() && !staged.freed.contains(id));
        values += self.rows(Table::Keys, keyed, |args, (id, data)| {
            bind::key(args, *id, &entry(id).task.spec, data);
        })?;
        values += self.rows(Table::Requests, staged.requests.iter(), |args, row| {
            args.add(request_hash(&row.id));
            args.add(&*row.id);
            args.add(row.digest.cast_signed());
            args.add(&row.answer[..]);
            args.add(row.at.millis());
        })?;
        values += self.rows(Table::Salvage, staged.salvage.iter(), |args, (task, fence, result)| {
            args.add(task.0.cast_signed());
            args.add(fence.cast_signed());
            args.add(&result[..]);
        })?;
        if !staged.salvage.is_empty() {
            let tasks: BTreeSet<_> = staged.salvage.iter().map(|(task, _, _)| task).collect();
            let tasks = ids(tasks.into_iter());
            self.run(PRUNE_SALVAGE, |args| {
                args.add(&tasks);
                args.add(SALVAGED as i64);
            })?;
        }
        self.run(COMMIT, |_| {})?;
        Ok(values)
    }

    /// What few batches do: all that takes something away.
    fn write_rare(&self, from: &Sources<'_>) -> Result<()> {
        let Sources { staged, ready, .. } = *from;
        let listed = |text, list: String| self.run(text, |args| args.add(&list));
        if !staged.freed.is_empty() {
            listed(FREE_KEYS, ids(staged.freed.iter()))?;
        }
        let gone = staged.letters.iter().filter(|(_, letter)| letter.is_none()).map(|(id, _)| id);
        self.each(REDRIVEN, gone, |args, id| args.add(id.0.cast_signed()))?;
        if !staged.moved.is_empty() {
            let agent = |id: &TaskId| ready.entry(*id).map_or(0, |entry| entry.task.spec.agent.0);
            let moved: Vec<_> = staged.moved.iter().map(|(id, before)| (id.0, agent(id), before.0)).collect();
            let moved = text::written(&moved);
            listed(MOVE_KEYS, moved.clone())?;
            listed(MOVE_SPECS, moved)?;
        }
        for (payload, tasks) in &staged.payloads {
            let tasks = ids(tasks.iter());
            self.run(NEW_PAYLOAD, |args| {
                args.add(&payload[..]);
                args.add(&tasks);
            })?;
        }
        if !staged.removed.is_empty() {
            let removed = ids(staged.removed.iter());
            for statement in std::iter::once(REMOVE_HISTORY).chain(REMOVE) {
                listed(statement, removed.clone())?;
            }
        }
        self.each(GONE_WORKER, staged.gone_workers.iter(), |args, name| args.add(&**name))?;
        if let Some(before) = staged.events_before {
            self.run(OLD_EVENTS, |args| {
                args.add(FORGOTTEN_AT_ONCE as i64);
                args.add(before.millis());
            })?;
        }
        Ok(())
    }

    /// Writes rows; the number of values.
    fn rows<T>(
        &self,
        table: Table,
        rows: impl Iterator<Item = T>,
        bind: impl Fn(&mut Args<'_, '_>, T),
    ) -> Result<usize> {
        let insert = table.insert();
        Ok(insert.width() * self.each(insert.text(), rows, bind)?)
    }

    /// Runs a statement once for each item; how often that was.
    fn each<T>(
        &self,
        text: &'static str,
        items: impl Iterator<Item = T>,
        bind: impl Fn(&mut Args<'_, '_>, T),
    ) -> Result<usize> {
        let mut items = items.peekable();
        if items.peek().is_none() {
            return Ok(0);
        }
        let mut statement = self.conn.prepare_cached(text)?;
        let mut args = Args::of(&mut statement);
        let mut count = 0;
        for item in items {
            bind(&mut args, item);
            args.run()?;
            count += 1;
        }
        Ok(count)
    }

    fn run(&self, text: &'static str, bind: impl Fn(&mut Args<'_, '_>)) -> Result<()> {
        self.each(text, std::iter::once(()), |args, ()| bind(args)).map(drop)
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
