//! The statements that a batch becomes, and the connection that runs them.
//!
//! Decides nothing. The writing connection is not sqlx's: a statement there is a hop to another thread and back, and costs
//! more than the row that it writes (docs/benchmarks.md). Here one thread runs all statements of a batch, each prepared
//! once. Invariant: the whole batch in one transaction.

use super::args::Args;
use super::insert::Table;
use super::packed::{self, Packed, packed};
use super::payloads::{self, Growing, Place};
use super::staged::{Born, Image, Part, Sealed};
use super::{FULL, Failure};
use crate::store::bind::{self, Sink};
use crate::store::text;
use bytes::Bytes;
use ledger_core::limits::{FORGOTTEN_AT_ONCE, SALVAGED};
use ledger_core::store::KeyHolder;
use ledger_core::{AgentId, TaskId, Timestamp};
use rusqlite::{Connection, Error, OpenFlags, OptionalExtension, Result, ffi};
use std::cell::{RefCell, RefMut};
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Task numbers that share an entry of each agent that has one of them: 2 to the power of this.
const AGENT_BLOCK_BITS: u32 = 4;
/// What a history entry counts for in the guess of what a commit writes. That is more than it takes since entries are packed, but
/// how often checkpoints come was found with it.
const ENTRY_VALUES: usize = 16;
/// More than there are statements.
const STATEMENTS_KEPT: usize = 64;

/// What a commit tells.
#[derive(Clone, Debug, Default)]
pub(super) struct Done {
    /// Bytes that it added to the log, about.
    pub(super) bytes: u64,
    /// Files of payloads that have less in them than before.
    pub(super) left: BTreeSet<u64>,
    /// When the oldest answer was given that is remembered; of a batch that purged.
    pub(super) oldest_request: Option<Timestamp>,
}

const BEGIN: &str = "BEGIN IMMEDIATE";
const COMMIT: &str = "COMMIT";
const OLDEST_REQUEST: &str = "SELECT at FROM requests ORDER BY seq LIMIT 1";
const META: &str = "UPDATE meta SET last_task = ?, last_seq = ?, last_session = ? WHERE id = 1";
/// One by one: of a list SQLite looks up the agents alone, or nothing, and goes through all keys that there are.
const FREE_KEY: &str = "DELETE FROM idempotency_keys \
    WHERE agent = (SELECT agent FROM task_specs WHERE id = ?1) \
    AND key = (SELECT key FROM task_specs WHERE id = ?1) AND task_id = ?1";
const REDRIVEN: &str = "DELETE FROM dead_letter_queue WHERE task_id = ?";
/// Task, agent, agent before.
const MOVE_KEY: &str = "UPDATE idempotency_keys SET agent = ?2 \
    WHERE agent = ?3 AND key = (SELECT key FROM task_specs WHERE id = ?1) AND task_id = ?1";
const MOVE_SPEC: &str = "UPDATE task_specs SET agent = ?2 WHERE id = ?1";
const NEW_PAYLOAD: &str = "UPDATE task_specs SET payload = ? WHERE id IN (SELECT value FROM json_each(?))";
/// Of tasks that have another payload now, or leave.
const PLACES: &str =
    "DELETE FROM payload_places WHERE task_id IN (SELECT value FROM json_each(?)) RETURNING file";
const EMPTY_BLOCK: &str = "DELETE FROM live_blocks WHERE block = ?";
/// [agent, block] each, of tasks that left.
const LEFT_BLOCKS: &str = "DELETE FROM agent_blocks \
    WHERE (agent, block) IN (SELECT value ->> 0, value ->> 1 FROM json_each(?)) \
    AND NOT EXISTS ( \
        SELECT 1 FROM task_specs AS s \
        WHERE s.id BETWEEN agent_blocks.block << 4 AND (agent_blocks.block << 4) + 15 \
        AND s.agent = agent_blocks.agent)";
const PRUNE_SALVAGE: &str = "DELETE FROM salvage \
    WHERE task_id IN (SELECT value FROM json_each(?)) \
    AND fence NOT IN ( \
        SELECT newest.fence FROM salvage AS newest \
        WHERE newest.task_id = salvage.task_id \
        ORDER BY newest.fence DESC LIMIT ?)";
/// Looks at the oldest rows alone, whether or not they go: never a scan.
const PURGE_REQUESTS: &str = "DELETE FROM requests WHERE seq IN ( \
    SELECT seq FROM (SELECT seq, at FROM requests ORDER BY seq LIMIT ?) WHERE at < ?)";

/// Before their rows go.
const REMOVED: &str = "UPDATE meta SET removed_seq = max(removed_seq, COALESCE( \
    (SELECT max(t.history) FROM json_each(?) AS gone CROSS JOIN tasks AS t ON t.id = gone.value), 0))";
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
    REMOVED,
    REMOVE[0],
    REMOVE[1],
    REMOVE[2],
    REMOVE[3],
    REMOVE[4],
    REMOVE[5],
    GONE_WORKER,
    OLD_EVENTS,
    META,
    FREE_KEY,
    REDRIVEN,
    MOVE_KEY,
    MOVE_SPEC,
    NEW_PAYLOAD,
    PLACES,
    EMPTY_BLOCK,
    LEFT_BLOCKS,
    PRUNE_SALVAGE,
    PURGE_REQUESTS,
    OLDEST_REQUEST,
];

/// The one connection that writes.
pub(super) struct Writer {
    conn: Connection,
    payloads: RefCell<Growing>,
}

impl Writer {
    /// Opens a file that has its schema.
    pub(super) fn open(
        path: &Path,
        busy: Duration,
        pragmas: &[(&str, String)],
        payloads: Growing,
    ) -> Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = Connection::open_with_flags(path, flags)?;
        conn.busy_timeout(busy)?;
        for (name, value) in pragmas {
            conn.pragma_update(None, name, value)?;
        }
        conn.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
        Ok(Self { conn, payloads: RefCell::new(payloads) })
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

    /// Opens the batch's transaction, if it is not.
    fn begin(&self) -> Result<()> {
        if self.conn.is_autocommit() { self.run(BEGIN, |_| {}) } else { Ok(()) }
    }

    /// Ends a transaction that was left open, if there is one.
    pub(super) fn roll_back(&self) {
        if !self.conn.is_autocommit() {
            // Of no effect where SQLite has rolled back by itself.
            let _ = self.conn.execute_batch("ROLLBACK");
        }
        self.payloads().undo();
    }

    fn payloads(&self) -> RefMut<'_, Growing> {
        self.payloads.borrow_mut()
    }

    pub(super) fn close(self) -> Result<()> {
        self.conn.close().map_err(|(_, error)| error)
    }

    /// When the oldest answer was given that is remembered.
    pub(super) fn oldest_request(&self) -> Result<Timestamp> {
        let mut statement = self.conn.prepare_cached(OLDEST_REQUEST)?;
        let at = statement.query_row([], |row| row.get(0)).optional()?;
        Ok(at.map_or(Timestamp::FAR, Timestamp::from_millis))
    }

    /// Makes a batch durable.
    ///
    /// # Errors
    /// SQLite's. Nothing of the batch is visible then; whether it is durable is unclear after an I/O error.
    pub(super) fn commit(&self, sealed: &Sealed) -> Result<Done> {
        if sealed.is_empty() {
            // Of a batch that only looked.
            self.roll_back();
            return Ok(Done::default());
        }
        let written = self.write(sealed);
        if written.is_err() {
            self.roll_back();
        }
        let staged = &sealed.staged;
        let results: usize =
            sealed.tasks.iter().filter_map(|image| image.result.as_ref()).map(Bytes::len).sum();
        let blobs = staged.blob_bytes() + results;
        let bytes = written? + (16 * 1_024 + 1_024 * staged.removed.len() + blobs) as u64;
        // The commit stands; a failed look only means that the next batch purges again.
        let oldest_request = sealed.purge.map(|_| self.oldest_request().unwrap_or(Timestamp::EPOCH));
        Ok(Done { bytes, oldest_request, left: self.payloads().left() })
    }

    /// Writes a part of a batch whose rest is still to come; a guess of its bytes.
    pub(super) fn write_part(&self, part: &Part) -> Result<u64> {
        self.begin()?;
        self.each(FREE_KEY, part.freed.iter(), |args, id| args.add(id.0.cast_signed()))?;
        if !part.moved.is_empty() {
            self.each(MOVE_KEY, part.moved.iter(), |args, (id, agent, before)| {
                args.add(id.cast_signed());
                args.add(*agent);
                args.add(*before);
            })?;
            self.each(MOVE_SPEC, part.moved.iter(), |args, (id, agent, _)| {
                args.add(id.cast_signed());
                args.add(*agent);
            })?;
            let blocks = part.moved.iter().map(|(id, agent, _)| agent_block(AgentId(*agent), TaskId(*id)));
            self.rows(Table::AgentBlocks, blocks, add_agent_block)?;
        }
        let (mut values, in_files) = self.write_specs(&part.specs)?;
        let mut blocks: Vec<_> =
            part.specs.iter().map(|born| agent_block(born.spec.agent, born.id)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        values += self.rows(Table::AgentBlocks, blocks.into_iter(), add_agent_block)?;
        let keyed = part.specs.iter().filter(|born| born.keyed);
        values += self.rows(Table::Keys, keyed, |args, born| {
            let holder = KeyHolder { task: born.id, digest: born.data.digest };
            bind::key(args, born.spec.agent, &born.data.key, holder);
        })?;
        values += ENTRY_VALUES * part.history.len();
        self.rows(Table::History, packed(&part.history), add_history)?;
        values += self.rows(Table::Results, part.results.iter(), |args, (id, result)| {
            bind::result(args, *id, result);
        })?;
        Ok((12 * values + part.blob_bytes() - in_files) as u64)
    }

    /// Writes what producers said; the number of values, and the bytes of payloads that are in no row.
    fn write_specs(&self, specs: &[Born]) -> Result<(usize, usize)> {
        let is_large = |born: &&Born| born.data.payload.len() >= payloads::LARGE;
        let large: usize = specs.iter().filter(is_large).map(|born| born.data.payload.len()).sum();
        if large < payloads::WORTH {
            let values = self.rows(Table::Specs, specs.iter(), |args, born| {
                bind::spec(args, born.id, &born.spec, &born.data, &born.data.payload);
            })?;
            return Ok((values, 0));
        }
        let payloads = specs.iter().filter(is_large).map(|born| &born.data.payload[..]);
        let places = self.payloads().put(payloads).map_err(|error| as_of_sqlite(&error))?;
        let mut values = self.rows(Table::Specs, specs.iter(), |args, born| {
            let payload = if is_large(&born) { &[] } else { &born.data.payload[..] };
            bind::spec(args, born.id, &born.spec, &born.data, payload);
        })?;
        let rows = specs.iter().filter(is_large).zip(places);
        values +=
            self.rows(Table::PayloadPlaces, rows, |args, (born, place)| add_place(args, born.id, place))?;
        Ok((values, large))
    }

    /// Runs the statements of a batch; bytes written but for those of its blobs, about.
    fn write(&self, sealed: &Sealed) -> Result<u64> {
        let staged = &sealed.staged;
        let last = self.write_part(&sealed.last)?;
        let rare = !staged.letters.is_empty()
            || !sealed.last.moved.is_empty()
            || !staged.payloads.is_empty()
            || !staged.removed.is_empty()
            || !staged.gone_workers.is_empty()
            || staged.events_before.is_some();
        if rare {
            self.write_rare(sealed)?;
        }
        if let Some(before) = sealed.purge {
            let most = 100 + 2 * staged.requests.len() as i64;
            let before = before.millis();
            self.run(PURGE_REQUESTS, |args| {
                args.add(most);
                args.add(before);
            })?;
        }
        let empty = sealed.blocks.iter().filter(|(_, live)| *live == 0);
        self.each(EMPTY_BLOCK, empty, |args, (block, _)| args.add(block.cast_signed()))?;
        let meta = sealed.meta;
        self.run(META, |args| {
            args.add(meta.last_task.cast_signed());
            args.add(meta.last_seq.cast_signed());
            args.add(meta.last_session.cast_signed());
        })?;
        let mut values = 0;
        values += self.rows(Table::Counts, sealed.counts.iter(), |args, (agent, state, count)| {
            args.add(agent.0);
            args.add(i64::from(*state));
            args.add(count.cast_signed());
        })?;
        let live = sealed.blocks.iter().filter(|(_, live)| *live > 0);
        values += self.rows(Table::LiveBlocks, live, |args, (block, live)| {
            args.add(block.cast_signed());
            args.add(live.cast_signed());
        })?;
        values += self.rows(Table::Agents, staged.agents.values(), |args, row| bind::agent(args, row))?;
        values +=
            self.rows(Table::Breakers, staged.breakers.values(), |args, row| bind::breaker(args, row))?;
        values += self.rows(Table::Budgets, staged.budgets.values(), |args, row| bind::budget(args, row))?;
        values +=
            self.rows(Table::Sessions, staged.sessions.values(), |args, row| bind::session(args, row))?;
        values += self.rows(Table::Events, staged.events.iter(), |args, row| bind::event(args, row))?;
        values += self.rows(Table::Tasks, sealed.tasks.iter(), add_image)?;
        values +=
            self.rows(Table::Notes, staged.notes.iter(), |args, (id, notes)| bind::notes(args, *id, notes))?;
        values += self.rows(Table::DeadLetters, staged.letters.values().flatten(), |args, row| {
            bind::letter(args, row);
        })?;
        values += self.rows(Table::Requests, staged.requests.iter(), |args, row| {
            args.add(request_hash(&row.id));
            bind::request(args, row);
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
                args.add(tasks.as_str());
                args.add(SALVAGED as i64);
            })?;
        }
        self.payloads().sync().map_err(|error| as_of_sqlite(&error))?;
        let committed = self.run(COMMIT, |_| {});
        // After another error than that the commit may have reached the file.
        if committed.as_ref().err().and_then(Failure::code) != Some(FULL) {
            self.payloads().keep();
        }
        committed?;
        Ok(last + 12 * values as u64)
    }

    /// What few batches do: all that takes something away.
    fn write_rare(&self, sealed: &Sealed) -> Result<()> {
        let staged = &sealed.staged;
        let listed = |text, list: String| self.run(text, |args| args.add(list.as_str()));
        let gone = staged.letters.iter().filter(|(_, letter)| letter.is_none()).map(|(id, _)| id);
        self.each(REDRIVEN, gone, |args, id| args.add(id.0.cast_signed()))?;
        for (payload, tasks) in &staged.payloads {
            let tasks = ids(tasks.iter());
            self.run(NEW_PAYLOAD, |args| {
                args.add(&payload[..]);
                args.add(tasks.as_str());
            })?;
            self.forget_places(&tasks)?;
        }
        if !staged.removed.is_empty() {
            let removed = ids(staged.removed.iter());
            listed(REMOVED, removed.clone())?;
            packed::remove(&self.conn, &removed)?;
            self.forget_places(&removed)?;
            for statement in REMOVE {
                listed(statement, removed.clone())?;
            }
        }
        let moved_away =
            sealed.last.moved.iter().map(|(id, _, agent)| agent_block(AgentId(*agent), TaskId(*id)));
        let left: Vec<_> = staged.left.iter().copied().chain(moved_away).collect();
        if !left.is_empty() {
            listed(LEFT_BLOCKS, text::written(&left))?;
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

    /// What these tasks have in files is nobody's any more.
    fn forget_places(&self, tasks: &str) -> Result<()> {
        let mut places = self.conn.prepare_cached(PLACES)?;
        let files = places.query_map([tasks], |row| row.get::<_, i64>(0))?;
        for file in files {
            self.payloads().leaves(file?.cast_unsigned());
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

/// A row of `tasks`.
fn add_image(args: &mut Args<'_, '_>, image: &Image) {
    bind::task(args, &image.task);
    args.add(image.history.cast_signed());
    args.add(packed::held(&image.task));
    args.add(packed::rare(&image.task));
    args.add(image.result.as_ref().map(|result| &result[..]));
}

/// A row of `payload_places`.
fn add_place(args: &mut Args<'_, '_>, task: TaskId, place: Place) {
    args.add(task.0.cast_signed());
    args.add(place.file.cast_signed());
    args.add(place.at.cast_signed());
    args.add(place.length.cast_signed());
    args.add(place.digest.cast_signed());
}

/// A row of `task_history`.
fn add_history(args: &mut Args<'_, '_>, row: Packed) {
    args.add(row.seq.cast_signed());
    args.add(row.task.cast_signed());
    args.add(row.at);
    args.add(row.entries);
}

/// A row of `agent_blocks`.
fn add_agent_block(args: &mut Args<'_, '_>, (agent, block): (u32, u64)) {
    args.add(agent);
    args.add(block.cast_signed());
}

/// The entry that says that an agent has a task.
pub(super) const fn agent_block(agent: AgentId, task: TaskId) -> (u32, u64) {
    (agent.0, task.0 >> AGENT_BLOCK_BITS)
}

/// A hash of a request id that is stored, so it never changes: FNV-1a.
pub(super) fn request_hash(id: &str) -> i64 {
    let hash = id.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    hash.cast_signed()
}

/// What befell a file of payloads, as SQLite tells the same of its own.
fn as_of_sqlite(error: &io::Error) -> Error {
    let code = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ffi::SQLITE_FULL,
        _ => ffi::SQLITE_IOERR,
    };
    Error::SqliteFailure(ffi::Error::new(code), Some(format!("a file of payloads: {error}")))
}

/// A JSON list of task numbers.
pub(super) fn ids<'a>(ids: impl Iterator<Item = &'a TaskId>) -> String {
    text::written(&ids.map(|id| id.0).collect::<Vec<_>>())
}
