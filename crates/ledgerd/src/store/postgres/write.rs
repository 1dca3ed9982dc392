//! The statements that a batch becomes.
//!
//! Decides nothing. A table is written with one statement a batch, whatever the number of rows: its columns travel as
//! arrays. Invariants: every statement has a fixed text, so its plan is made once; rows are locked in the order of their
//! numbers.

use super::staged::{Image, Staged};
use super::{PgStore, failed};
use crate::store::bind::{self, Cell, Sink};
use ledger_core::limits::{FORGOTTEN_AT_ONCE, REQUEST_MEMORY, SALVAGED};
use ledger_core::store::{KeyHolder, StoreError};
use ledger_core::{AgentId, Task, TaskId, Timestamp};
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;
use sqlx::{Postgres, Row};
use std::sync::OnceLock;

/// What a column's values travel as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Int,
    Real,
    Text,
    Bytes,
}

use Kind::{Bytes, Int, Real, Text};

impl Kind {
    const fn array(self) -> &'static str {
        match self {
            Int => "bigint[]",
            Real => "float8[]",
            Text => "text[]",
            Bytes => "bytea[]",
        }
    }
}

/// How rows of one shape are written.
pub(super) struct Table {
    /// Before the rows, which are called `new` and have the columns' names.
    head: &'static str,
    columns: &'static [(&'static str, Kind)],
    tail: &'static str,
    text: OnceLock<String>,
}

impl Table {
    const fn new(head: &'static str, columns: &'static [(&'static str, Kind)], tail: &'static str) -> Self {
        Self { head, columns, tail, text: OnceLock::new() }
    }

    /// Its statement.
    pub(super) fn text(&'static self) -> &'static str {
        self.text.get_or_init(|| {
            let names: Vec<_> = self.columns.iter().map(|(name, _)| format!("\"{name}\"")).collect();
            let arrays: Vec<_> = self
                .columns
                .iter()
                .enumerate()
                .map(|(at, (_, kind))| format!("${}::{}", at + 1, kind.array()))
                .collect();
            let (names, arrays) = (names.join(", "), arrays.join(", "));
            let rows = format!("unnest({arrays}) AS new ({names})");
            match self.head.strip_prefix("INSERT INTO ") {
                Some(_) => format!("{} ({names}) SELECT {names} FROM {rows} {}", self.head, self.tail),
                None => format!("{} FROM {rows} {}", self.head, self.tail),
            }
        })
    }
}

/// Rows on their way, a column at a time.
struct Rows {
    columns: Vec<Column>,
    at: usize,
}

enum Column {
    Int(Vec<Option<i64>>),
    Real(Vec<Option<f64>>),
    Text(Vec<Option<String>>),
    Bytes(Vec<Option<Vec<u8>>>),
}

impl Rows {
    fn of(table: &Table) -> Self {
        let column = |(_, kind): &(&str, Kind)| match kind {
            Int => Column::Int(Vec::new()),
            Real => Column::Real(Vec::new()),
            Text => Column::Text(Vec::new()),
            Bytes => Column::Bytes(Vec::new()),
        };
        Self { columns: table.columns.iter().map(column).collect(), at: 0 }
    }

    fn bind(self, mut query: Query<'_, Postgres, PgArguments>) -> Query<'_, Postgres, PgArguments> {
        for column in self.columns {
            query = match column {
                Column::Int(values) => query.bind(values),
                Column::Real(values) => query.bind(values),
                Column::Text(values) => query.bind(values),
                Column::Bytes(values) => query.bind(values),
            };
        }
        query
    }
}

impl Sink for Rows {
    fn add<'v>(&mut self, value: impl Into<Cell<'v>>) {
        let at = self.at;
        self.at = (at + 1) % self.columns.len();
        match (&mut self.columns[at], value.into()) {
            (Column::Int(values), Cell::Int(value)) => values.push(Some(value)),
            (Column::Real(values), Cell::Real(value)) => values.push(Some(value)),
            (Column::Text(values), Cell::Text(value)) => values.push(Some(value.into_owned())),
            (Column::Bytes(values), Cell::Bytes(value)) => values.push(Some(value.to_vec())),
            (Column::Int(values), _) => values.push(None),
            (Column::Real(values), _) => values.push(None),
            (Column::Text(values), _) => values.push(None),
            (Column::Bytes(values), _) => values.push(None),
        }
    }
}

/// The columns of a task's row, as `bind` has them, and the version it had.
macro_rules! task_row {
    ($($more:expr),*) => {
        &[
            ("id", Int), ("state", Int), ("reason", Int), ("priority", Int), ("run_at", Int), ("calendar", Int),
            ("deadline", Int), ("queued_at", Int), ("updated_at", Int), ("version", Int), ("fence", Int),
            ("delivery", Int), ("attempt", Int), ("idle_deliveries", Int), ("worker", Text), ("incarnation", Int),
            ("session", Int), ("lease_until", Int), ("acked_at", Int), ("progress_at", Int), ("sample_epoch", Int),
            ("sample_probe", Int), ("sample_told", Int), ("retry_count", Int), ("losses", Int), ("preemptions", Int),
            ("redrives", Int), ("probe_failures", Int), ("tokens", Int), ("previous_delay", Int), ("stop_cause", Int),
            ("stop_until", Int), ("discarded", Int), ("loss_weight", Int), ("lost_at", Int), ("free_releases", Int),
            ("blocks", Int), $($more),*
        ]
    };
}

static SPECS: Table = Table::new(
    "INSERT INTO task_specs",
    &[
        ("id", Int),
        ("agent", Int),
        ("task_type", Text),
        ("created_at", Int),
        ("payload", Bytes),
        ("labels", Text),
        ("policy", Text),
        ("traceparent", Text),
        ("tracestate", Text),
        ("key", Text),
        ("digest", Int),
        ("frees_key", Int),
        ("parent", Int),
    ],
    "",
);
static NEW_TASKS: Table = Table::new("INSERT INTO tasks", task_row!(), "");
/// Only those that are as they were read; names them.
static TASKS: Table = Table::new(
    "UPDATE tasks AS t SET state = new.state, reason = new.reason, priority = new.priority, run_at = new.run_at, \
     calendar = new.calendar, deadline = new.deadline, queued_at = new.queued_at, updated_at = new.updated_at, \
     version = new.version, fence = new.fence, delivery = new.delivery, attempt = new.attempt, \
     idle_deliveries = new.idle_deliveries, worker = new.worker, incarnation = new.incarnation, \
     session = new.session, lease_until = new.lease_until, acked_at = new.acked_at, progress_at = new.progress_at, \
     sample_epoch = new.sample_epoch, sample_probe = new.sample_probe, sample_told = new.sample_told, \
     retry_count = new.retry_count, losses = new.losses, preemptions = new.preemptions, redrives = new.redrives, \
     probe_failures = new.probe_failures, tokens = new.tokens, previous_delay = new.previous_delay, \
     stop_cause = new.stop_cause, stop_until = new.stop_until, discarded = new.discarded, \
     loss_weight = new.loss_weight, lost_at = new.lost_at, free_releases = new.free_releases, blocks = new.blocks",
    task_row!(("expected", Int)),
    "WHERE t.id = new.id AND t.version = new.expected RETURNING t.id",
);
static HISTORY: Table = Table::new(
    "INSERT INTO task_history",
    &[
        ("slot", Int),
        ("seq", Int),
        ("task_id", Int),
        ("version", Int),
        ("kind", Int),
        ("from_state", Int),
        ("to_state", Int),
        ("reason", Int),
        ("at", Int),
        ("fence", Int),
        ("attempt", Int),
        ("worker", Text),
        ("until", Int),
        ("digest", Int),
        ("error", Text),
        ("facts", Text),
    ],
    "",
);
static READY: Table = Table::new(
    "INSERT INTO ready",
    &[
        ("agent", Int),
        ("task_type", Text),
        ("gated", Int),
        ("urgency", Int),
        ("run_at", Int),
        ("calendar", Int),
        ("task_id", Int),
    ],
    "",
);
static RESULTS: Table = Table::new(
    "INSERT INTO results",
    &[("task_id", Int), ("result", Bytes)],
    "ON CONFLICT (task_id) DO UPDATE SET result = excluded.result",
);
static SALVAGE: Table = Table::new(
    "INSERT INTO salvage",
    &[("task_id", Int), ("fence", Int), ("result", Bytes)],
    "ON CONFLICT (task_id, fence) DO UPDATE SET result = excluded.result",
);
static NOTES: Table = Table::new(
    "INSERT INTO task_notes AS n",
    &[
        ("task_id", Int),
        ("error", Text),
        ("checkpoint", Bytes),
        ("progress_fraction", Real),
        ("progress_note", Text),
        ("progress_at", Int),
        ("question", Text),
        ("answer", Text),
    ],
    "ON CONFLICT (task_id) DO UPDATE SET \
        error = COALESCE(excluded.error, n.error), \
        checkpoint = COALESCE(excluded.checkpoint, n.checkpoint), \
        progress_fraction = COALESCE(excluded.progress_fraction, n.progress_fraction), \
        progress_note = COALESCE(excluded.progress_note, n.progress_note), \
        progress_at = COALESCE(excluded.progress_at, n.progress_at), \
        question = COALESCE(excluded.question, n.question), \
        answer = COALESCE(excluded.answer, n.answer)",
);
static LETTERS: Table = Table::new(
    "INSERT INTO dead_letter_queue",
    &[
        ("task_id", Int),
        ("agent", Int),
        ("task_type", Text),
        ("reason", Int),
        ("error", Text),
        ("fingerprint", Int),
        ("failed_at", Int),
        ("attempt", Int),
        ("redrives", Int),
        ("discarded_at", Int),
        ("discard_reason", Text),
    ],
    "ON CONFLICT (task_id) DO UPDATE SET agent = excluded.agent, task_type = excluded.task_type, \
        reason = excluded.reason, error = excluded.error, fingerprint = excluded.fingerprint, \
        failed_at = excluded.failed_at, attempt = excluded.attempt, redrives = excluded.redrives, \
        discarded_at = excluded.discarded_at, discard_reason = excluded.discard_reason",
);
static KEYS: Table = Table::new(
    "INSERT INTO idempotency_keys",
    &[("agent", Int), ("key", Text), ("task_id", Int), ("digest", Int)],
    "",
);
static REQUESTS: Table =
    Table::new("INSERT INTO requests", &[("id", Text), ("digest", Int), ("answer", Bytes), ("at", Int)], "");
static AGENTS: Table = Table::new(
    "INSERT INTO agents",
    &[("id", Int), ("name", Text), ("settings", Text), ("created_at", Int), ("pause", Text)],
    "ON CONFLICT (id) DO UPDATE SET settings = excluded.settings, pause = excluded.pause",
);
static BREAKERS: Table = Table::new(
    "INSERT INTO breakers",
    &[
        ("agent", Int),
        ("task_type", Text),
        ("version", Int),
        ("state", Text),
        ("epoch", Int),
        ("run", Int),
        ("successes", Int),
        ("reopens", Int),
        ("since_ns", Int),
        ("until_ns", Int),
        ("cause", Text),
        ("ramp_until_ns", Int),
        ("probes", Text),
        ("window", Bytes),
        ("digest", Int),
        ("actor", Text),
        ("order_reason", Text),
        ("stats", Text),
        ("last_probe", Int),
    ],
    "ON CONFLICT (agent, task_type) DO UPDATE SET version = excluded.version, state = excluded.state, \
        epoch = excluded.epoch, run = excluded.run, successes = excluded.successes, reopens = excluded.reopens, \
        since_ns = excluded.since_ns, until_ns = excluded.until_ns, cause = excluded.cause, \
        ramp_until_ns = excluded.ramp_until_ns, probes = excluded.probes, \"window\" = excluded.\"window\", \
        digest = excluded.digest, actor = excluded.actor, order_reason = excluded.order_reason, \
        stats = excluded.stats, last_probe = excluded.last_probe",
);
static BUDGETS: Table = Table::new(
    "INSERT INTO budgets",
    &[("agent", Int), ("millitokens", Int), ("updated_at", Int)],
    "ON CONFLICT (agent) DO UPDATE SET millitokens = excluded.millitokens, updated_at = excluded.updated_at",
);
static SESSIONS: Table = Table::new(
    "INSERT INTO sessions",
    &[
        ("worker", Text),
        ("incarnation", Int),
        ("session", Int),
        ("connected_at", Int),
        ("beat_at", Int),
        ("open", Int),
    ],
    "ON CONFLICT (worker) DO UPDATE SET incarnation = excluded.incarnation, session = excluded.session, \
        connected_at = excluded.connected_at, beat_at = excluded.beat_at, open = excluded.open",
);
static EVENTS: Table = Table::new(
    "INSERT INTO agent_events",
    &[
        ("agent", Int),
        ("task_type", Text),
        ("at", Int),
        ("kind", Int),
        ("from_state", Text),
        ("to_state", Text),
        ("cause", Text),
        ("epoch", Int),
        ("actor", Text),
        ("reason", Text),
        ("until", Int),
    ],
    "",
);
static COUNTS: Table = Table::new(
    "INSERT INTO counts AS c",
    &[("slot", Int), ("agent", Int), ("state", Int), ("n", Int)],
    "ON CONFLICT (slot, agent, state) DO UPDATE SET n = c.n + excluded.n",
);
static LIVE_BLOCKS: Table = Table::new(
    "INSERT INTO live_blocks AS b",
    &[("block", Int), ("slot", Int), ("n", Int)],
    "ON CONFLICT (block, slot) DO UPDATE SET n = b.n + excluded.n",
);

/// Names the transaction, whose fate can be asked for by this name when its commit is not answered.
const SLOT: &str = "UPDATE slots SET last_seq = $2, last_session = GREATEST(last_session, $3) WHERE slot = $1 \
    RETURNING pg_current_xact_id()::text";
const LEAVE_READY: &str = "DELETE FROM ready WHERE task_id = ANY($1)";
const FREE_KEYS: &str = "DELETE FROM idempotency_keys AS k USING task_specs AS s \
    WHERE s.id = ANY($1) AND k.agent = s.agent AND k.key = s.key AND k.task_id = s.id";
/// Tasks and the agents they go to.
const MOVE_KEYS: &str = "UPDATE idempotency_keys AS k SET agent = moved.agent \
    FROM unnest($1::bigint[], $2::bigint[]) AS moved (id, agent) JOIN task_specs AS s ON s.id = moved.id \
    WHERE k.agent = s.agent AND k.key = s.key AND k.task_id = s.id";
const MOVE_SPECS: &str = "UPDATE task_specs AS s SET agent = moved.agent \
    FROM unnest($1::bigint[], $2::bigint[]) AS moved (id, agent) WHERE s.id = moved.id";
const NEW_PAYLOAD: &str = "UPDATE task_specs SET payload = $1 WHERE id = ANY($2)";
const REDRIVEN: &str = "DELETE FROM dead_letter_queue WHERE task_id = ANY($1)";
const EMPTY_BLOCKS: &str = "DELETE FROM live_blocks WHERE block = ANY($1) AND slot = $2 AND n = 0";
const PRUNE_SALVAGE: &str = "DELETE FROM salvage AS s WHERE s.task_id = ANY($1) AND s.fence NOT IN ( \
    SELECT newest.fence FROM salvage AS newest WHERE newest.task_id = s.task_id ORDER BY newest.fence DESC LIMIT $2)";
/// The oldest alone, a bounded number; two daemons at this do not wait for each other.
const PURGE_REQUESTS: &str = "DELETE FROM requests WHERE id IN ( \
    SELECT id FROM requests WHERE at < $1 ORDER BY at LIMIT $2 FOR UPDATE SKIP LOCKED)";
const GONE_WORKERS: &str = "DELETE FROM sessions WHERE worker = ANY($1) AND open = 0";
const OLD_EVENTS: &str = "DELETE FROM agent_events WHERE seq IN ( \
    SELECT seq FROM (SELECT seq, at FROM agent_events ORDER BY seq LIMIT $1) AS oldest WHERE at < $2)";
/// All that belongs to tasks, but their keys.
const REMOVE: [&str; 7] = [
    "DELETE FROM task_history WHERE task_id = ANY($1)",
    "DELETE FROM results WHERE task_id = ANY($1)",
    "DELETE FROM salvage WHERE task_id = ANY($1)",
    "DELETE FROM task_notes WHERE task_id = ANY($1)",
    "DELETE FROM dead_letter_queue WHERE task_id = ANY($1)",
    "DELETE FROM task_specs WHERE id = ANY($1)",
    "DELETE FROM tasks WHERE id = ANY($1)",
];

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) fn statements() -> Vec<&'static str> {
    let tables = [
        &SPECS,
        &NEW_TASKS,
        &TASKS,
        &HISTORY,
        &READY,
        &RESULTS,
        &SALVAGE,
        &NOTES,
        &LETTERS,
        &KEYS,
        &REQUESTS,
        &AGENTS,
        &BREAKERS,
        &BUDGETS,
        &SESSIONS,
        &EVENTS,
        &COUNTS,
        &LIVE_BLOCKS,
    ];
    let fixed = [
        SLOT,
        LEAVE_READY,
        FREE_KEYS,
        MOVE_KEYS,
        MOVE_SPECS,
        NEW_PAYLOAD,
        REDRIVEN,
        EMPTY_BLOCKS,
        PRUNE_SALVAGE,
        PURGE_REQUESTS,
        GONE_WORKERS,
        OLD_EVENTS,
    ];
    tables.into_iter().map(Table::text).chain(fixed).chain(REMOVE).collect()
}

/// Rows of one table. Made before anything is awaited, for a future that holds an iterator over many types is not known to
/// be safe to move between threads.
fn rows<T>(
    table: &'static Table,
    rows: impl IntoIterator<Item = T>,
    mut bind: impl FnMut(&mut Rows, T),
) -> Option<(&'static Table, Rows)> {
    let mut rows = rows.into_iter().peekable();
    rows.peek()?;
    let mut columns = Rows::of(table);
    rows.for_each(|row| bind(&mut columns, row));
    Some((table, columns))
}

/// Writes them with one statement.
async fn put(conn: &mut PgConnection, rows: Option<(&'static Table, Rows)>) -> Result<(), StoreError> {
    let Some((table, columns)) = rows else { return Ok(()) };
    let query = columns.bind(sqlx::query(table.text()));
    query.execute(conn).await.map(drop).map_err(|error| failed(&error))
}

async fn listed(conn: &mut PgConnection, text: &'static str, list: Vec<i64>) -> Result<(), StoreError> {
    if list.is_empty() {
        return Ok(());
    }
    sqlx::query(text).bind(list).execute(conn).await.map(drop).map_err(|error| failed(&error))
}

fn numbers<'a>(ids: impl IntoIterator<Item = &'a TaskId>) -> Vec<i64> {
    ids.into_iter().map(|id| id.0.cast_signed()).collect()
}

fn image(row: &mut Rows, task: &Task) {
    bind::task(row, task);
    bind::held(row, task);
    bind::rare(&mut Sparse(row), task);
}

/// A NULL takes no room, a 0 does.
struct Sparse<'r>(&'r mut Rows);

impl Sink for Sparse<'_> {
    fn add<'v>(&mut self, value: impl Into<Cell<'v>>) {
        match value.into() {
            Cell::Int(0) => self.0.add(Cell::Null),
            other => self.0.add(other),
        }
    }
}

impl PgStore {
    /// Runs the statements of the open batch, but for its commit; the name of its transaction.
    pub(super) async fn write_staged(&mut self, staged: &Staged) -> Result<String, StoreError> {
        let (slot, meta) = (i64::from(self.slot), self.meta);
        let conn = self.connection()?;
        // What frees keys, and what moves them, comes before what takes them.
        let freed = numbers(&staged.freed);
        listed(conn, FREE_KEYS, freed).await?;
        write_respecified(conn, staged).await?;
        put(
            conn,
            rows(&SPECS, &staged.data, |row, (id, data)| {
                if let Some(image) = staged.tasks.get(id) {
                    bind::spec(row, *id, &image.task.spec, data);
                }
            }),
        )
        .await?;
        let (new, known): (Vec<&Image>, Vec<&Image>) =
            staged.in_order().into_iter().partition(|image| image.expected == 0);
        put(conn, rows(&NEW_TASKS, &new, |row, new| image(row, &new.task))).await?;
        write_known(conn, &known).await?;
        let keyed =
            staged.data.iter().filter(|(id, data)| !data.key.is_empty() && !staged.freed.contains(id));
        put(
            conn,
            rows(&KEYS, keyed, |row, (id, data)| {
                let agent = staged.tasks.get(id).map_or(AgentId(0), |image| image.task.spec.agent);
                bind::key(row, agent, &data.key, KeyHolder { task: *id, digest: data.digest });
            }),
        )
        .await?;
        let first = meta.last_seq + 1 - staged.history.len() as u64;
        put(
            conn,
            rows(&HISTORY, staged.history.iter().zip(first..), |row, (record, seq)| {
                row.add(slot);
                row.add(seq.cast_signed());
                bind::record(row, record);
            }),
        )
        .await?;
        let waited = known.iter().filter(|image| image.may_have_waited);
        listed(conn, LEAVE_READY, waited.map(|image| image.task.id.0.cast_signed()).collect()).await?;
        let waits = staged.in_order().into_iter().filter(|image| image.waits());
        put(
            conn,
            rows(&READY, waits, |row, image| {
                let task = &image.task;
                row.add(task.spec.agent.0);
                row.add(&*task.spec.task_type);
                row.add(task.is_gated());
                row.add(i64::from(9_u8.saturating_sub(task.priority)));
                row.add(task.run_at.millis());
                row.add(task.calendar);
                row.add(task.id.0.cast_signed());
            }),
        )
        .await?;
        put(conn, rows(&RESULTS, &staged.results, |row, (id, result)| bind::result(row, *id, result)))
            .await?;
        write_rest(conn, staged, slot).await?;
        let live = staged.blocks.iter().filter(|(_, n)| **n != 0);
        put(
            conn,
            rows(&LIVE_BLOCKS, live.clone(), |row, (block, n)| {
                row.add(block.cast_signed());
                row.add(slot);
                row.add(*n);
            }),
        )
        .await?;
        let shrunk: Vec<i64> = live.filter(|(_, n)| **n < 0).map(|(block, _)| block.cast_signed()).collect();
        if !shrunk.is_empty() {
            let query = sqlx::query(EMPTY_BLOCKS).bind(shrunk).bind(slot);
            query.execute(&mut *conn).await.map_err(|error| failed(&error))?;
        }
        let query = sqlx::query(SLOT)
            .bind(slot)
            .bind(meta.last_seq.cast_signed())
            .bind(meta.last_session.cast_signed());
        let row = query.fetch_one(&mut *conn).await.map_err(|error| failed(&error))?;
        row.try_get(0).map_err(|error| failed(&error))
    }

    /// Forgets answers that are old enough.
    pub(super) async fn purge_requests(&mut self, now: Timestamp, most: usize) -> Result<(), StoreError> {
        let before = now.before(REQUEST_MEMORY).millis();
        let conn = self.connection()?;
        let query = sqlx::query(PURGE_REQUESTS).bind(before).bind(most as i64);
        query.execute(conn).await.map(drop).map_err(|error| failed(&error))
    }
}

/// Rows of tasks that were read; all of them, or it names one that somebody else changed.
async fn write_known(conn: &mut PgConnection, known: &[&Image]) -> Result<(), StoreError> {
    if known.is_empty() {
        return Ok(());
    }
    let mut columns = Rows::of(&TASKS);
    for known in known {
        image(&mut columns, &known.task);
        columns.add(known.expected.cast_signed());
    }
    let query = columns.bind(sqlx::query(TASKS.text()));
    let written = query.fetch_all(conn).await.map_err(|error| failed(&error))?;
    if written.len() == known.len() {
        return Ok(());
    }
    let written: std::collections::HashSet<i64> =
        written.iter().filter_map(|row| row.try_get::<i64, _>(0).ok()).collect();
    let overtaken = known.iter().find(|image| !written.contains(&image.task.id.0.cast_signed()));
    Err(overtaken.map_or_else(
        || StoreError::Statement("a task's row was written twice".to_owned()),
        |image| StoreError::Overtaken(image.task.id),
    ))
}

async fn write_respecified(conn: &mut PgConnection, staged: &Staged) -> Result<(), StoreError> {
    let moved = || staged.moved.iter().filter_map(|id| Some((id, staged.tasks.get(id)?.task.spec.agent)));
    if !staged.moved.is_empty() {
        for text in [MOVE_KEYS, MOVE_SPECS] {
            let query = sqlx::query(text)
                .bind(numbers(moved().map(|(id, _)| id)))
                .bind(moved().map(|(_, agent)| i64::from(agent.0)).collect::<Vec<_>>());
            query.execute(&mut *conn).await.map_err(|error| failed(&error))?;
        }
    }
    for (payload, ids) in &staged.payloads {
        let query = sqlx::query(NEW_PAYLOAD).bind(&payload[..]).bind(numbers(ids));
        query.execute(&mut *conn).await.map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// All that is beside tasks.
async fn write_rest(conn: &mut PgConnection, staged: &Staged, slot: i64) -> Result<(), StoreError> {
    let redriven = staged.letters.iter().filter(|(_, letter)| letter.is_none()).map(|(id, _)| id);
    listed(conn, REDRIVEN, numbers(redriven)).await?;
    put(conn, rows(&LETTERS, staged.letters.values().flatten(), bind::letter)).await?;
    put(conn, rows(&NOTES, &staged.notes, |row, (id, notes)| bind::notes(row, *id, notes))).await?;
    put(
        conn,
        rows(&SALVAGE, &staged.salvage, |row, ((id, fence), result)| {
            row.add(id.0.cast_signed());
            row.add(fence.cast_signed());
            row.add(&result[..]);
        }),
    )
    .await?;
    if !staged.salvage.is_empty() {
        let query = sqlx::query(PRUNE_SALVAGE)
            .bind(numbers(staged.salvage.keys().map(|(id, _)| id)))
            .bind(SALVAGED as i64);
        query.execute(&mut *conn).await.map_err(|error| failed(&error))?;
    }
    put(conn, rows(&REQUESTS, staged.requests.values(), bind::request)).await?;
    put(conn, rows(&AGENTS, staged.agents.values(), bind::agent)).await?;
    put(conn, rows(&BREAKERS, staged.breakers.values(), bind::breaker)).await?;
    put(conn, rows(&BUDGETS, staged.budgets.values(), bind::budget)).await?;
    put(conn, rows(&SESSIONS, staged.sessions.values(), bind::session)).await?;
    put(conn, rows(&EVENTS, &staged.events, bind::event)).await?;
    let counts = staged.counts.iter().filter(|(_, n)| **n != 0);
    put(
        conn,
        rows(&COUNTS, counts, |row, ((agent, state), n)| {
            row.add(slot);
            row.add(agent.0);
            row.add(i64::from(*state));
            row.add(*n);
        }),
    )
    .await?;
    if !staged.removed.is_empty() {
        for text in REMOVE {
            listed(conn, text, numbers(&staged.removed)).await?;
        }
    }
    if !staged.gone_workers.is_empty() {
        let gone: Vec<String> = staged.gone_workers.iter().map(|name| name.to_string()).collect();
        sqlx::query(GONE_WORKERS).bind(gone).execute(&mut *conn).await.map_err(|error| failed(&error))?;
    }
    if let Some(before) = staged.events_before {
        let query = sqlx::query(OLD_EVENTS).bind(FORGOTTEN_AT_ONCE as i64).bind(before.millis());
        query.execute(&mut *conn).await.map_err(|error| failed(&error))?;
    }
    Ok(())
}
