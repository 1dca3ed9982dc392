//! The statements that a batch becomes.
//!
//! Decides nothing. What is new of a batch is one statement, what it changes another, and only what is rare goes by itself.
//! Invariant: rows are locked in the order of their numbers.

use super::packed::{Packed, packed};
use super::recover::Columns;
use super::shared::{self, Basis, Met, Written};
use super::slots::slot_text;
use super::staged::{AgentBlock, Image, Staged, agent_block};
use super::table::Kind::{self, Int, Int2, Int4, Real, Text};
use super::table::{Rows, Table, Together, rows};
use super::{Meta, failed};
use crate::store::SMALL_RESULT;
use crate::store::bind::{self, Sink};
use bytes::Bytes;
use ledger_core::limits::{FORGOTTEN_AT_ONCE, REQUEST_MEMORY, SALVAGED};
use ledger_core::store::{KeyHolder, StoreError};
use ledger_core::{AgentId, State, Task, TaskId, Timestamp};
use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};
use std::collections::BTreeSet;

/// The columns of a task's row that most need, as `bind` has them, where its newest entry stands, and more.
macro_rules! lean_row {
    ($($more:expr),*) => {
        &[
            ("id", Int), ("state", Int2), ("reason", Int2), ("priority", Int2), ("run_at", Int), ("calendar", Int2),
            ("deadline", Int), ("queued_at", Int), ("updated_at", Int), ("version", Int), ("fence", Int),
            ("delivery", Int4), ("attempt", Int4), ("idle_deliveries", Int4), ("worker", Text), ("incarnation", Int),
            ("session", Int), ("lease_until", Int), ("acked_at", Int), ("progress_at", Int), ("sample_epoch", Int),
            ("sample_probe", Int2), ("sample_told", Int2), ("history_slot", Int2), ("history_seq", Int),
            ("history_at", Int), $($more),*
        ]
    };
}
/// The same with what few have, and a result.
macro_rules! task_row {
    ($($more:expr),*) => {
        lean_row!(
            ("retry_count", Int4), ("losses", Int4), ("preemptions", Int4), ("redrives", Int4), ("probe_failures", Int4),
            ("tokens", Int4), ("previous_delay", Int), ("stop_cause", Int2), ("stop_until", Int), ("discarded", Int2),
            ("loss_weight", Int4), ("lost_at", Int), ("free_releases", Int4), ("blocks", Int4), ("result", Kind::Bytes)
            $(, $more)*
        )
    };
}

static SPECS: Table = Table::new(
    "lean_task_specs",
    "INSERT INTO task_specs",
    &[
        ("id", Int),
        ("agent", Int4),
        ("task_type", Text),
        ("created_at", Int),
        ("payload", Kind::Bytes),
        ("labels", Text),
        ("policy", Text),
        ("traceparent", Text),
        ("tracestate", Text),
        ("key", Text),
        ("digest", Int),
        ("frees_key", Int2),
        ("parent", Int),
    ],
    "",
);
static NEW_TASKS: Table = Table::new("new_tasks", "INSERT INTO tasks", task_row!(), "");
static LEAN_NEW_TASKS: Table = Table::new("lean_tasks", "INSERT INTO tasks", lean_row!(), "");
macro_rules! update_tasks {
    ($rare:expr) => {
        concat!(
            "UPDATE tasks AS t SET state = new.state, reason = new.reason, priority = new.priority, run_at = new.run_at, \
             calendar = new.calendar, deadline = new.deadline, queued_at = new.queued_at, updated_at = new.updated_at, \
             version = new.version, fence = new.fence, delivery = new.delivery, attempt = new.attempt, \
             idle_deliveries = new.idle_deliveries, worker = new.worker, incarnation = new.incarnation, \
             session = new.session, lease_until = new.lease_until, acked_at = new.acked_at, \
             progress_at = new.progress_at, sample_epoch = new.sample_epoch, sample_probe = new.sample_probe, \
             sample_told = new.sample_told, history_slot = new.history_slot, history_seq = new.history_seq, \
             history_at = new.history_at, result = COALESCE(new.result, t.result), ",
            $rare
        )
    };
}
/// Only those that are as they were read; names them. A comparison with an array of one number is looked up by the index as one with
/// the number is, but has no join in the order of that index, which may be planned to walk through all of it.
const AS_READ: &str = "WHERE t.id = ANY (ARRAY[new.id]) AND t.version = new.expected AND t.session IS NOT DISTINCT FROM new.held \
    RETURNING t.id";
static TASKS: Table = Table::new(
    "changed_tasks",
    update_tasks!(
        "retry_count = new.retry_count, losses = new.losses, preemptions = new.preemptions, redrives = new.redrives, \
         probe_failures = new.probe_failures, tokens = new.tokens, previous_delay = new.previous_delay, \
         stop_cause = new.stop_cause, stop_until = new.stop_until, discarded = new.discarded, \
         loss_weight = new.loss_weight, lost_at = new.lost_at, free_releases = new.free_releases, blocks = new.blocks"
    ),
    task_row!(("expected", Int), ("held", Int)),
    AS_READ,
);
/// For a task without what few have: whatever its row had of it goes.
macro_rules! nothing_rare {
    () => {
        "retry_count = NULL, losses = NULL, preemptions = NULL, redrives = NULL, probe_failures = NULL, tokens = NULL, \
         previous_delay = NULL, stop_cause = NULL, stop_until = NULL, discarded = NULL, loss_weight = NULL, \
         lost_at = NULL, free_releases = NULL, blocks = NULL"
    };
}
static LEAN_TASKS: Table = Table::new(
    "lean_changed_tasks",
    update_tasks!(nothing_rare!()),
    lean_row!(("result", Kind::Bytes), ("expected", Int), ("held", Int)),
    AS_READ,
);
/// Where all of them end: what an end takes from a row is said by the statement, and what it leaves is not sent.
static ENDED_TASKS: Table = Table::new(
    "lean_ended_tasks",
    concat!(
        "UPDATE tasks AS t SET state = new.state, reason = new.reason, updated_at = new.updated_at, version = new.version, \
         attempt = new.attempt, idle_deliveries = new.idle_deliveries, worker = NULL, incarnation = NULL, session = NULL, \
         lease_until = NULL, acked_at = NULL, progress_at = NULL, sample_epoch = NULL, sample_probe = NULL, \
         sample_told = NULL, history_slot = new.history_slot, history_seq = new.history_seq, \
         history_at = new.history_at, result = COALESCE(new.result, t.result), ",
        nothing_rare!()
    ),
    &[
        ("id", Int),
        ("state", Int2),
        ("reason", Int2),
        ("updated_at", Int),
        ("version", Int),
        ("attempt", Int4),
        ("idle_deliveries", Int4),
        ("history_slot", Int2),
        ("history_seq", Int),
        ("history_at", Int),
        ("result", Kind::Bytes),
        ("expected", Int),
        ("held", Int),
    ],
    AS_READ,
);
static HISTORY: Table = Table::new(
    "packed_history",
    "INSERT INTO task_history",
    &[("slot", Int2), ("seq", Int), ("task", Int), ("at", Int), ("entries", Text)],
    "",
);
static READY: Table = Table::new(
    "new_ready",
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
    "new_results",
    "INSERT INTO results",
    &[("task_id", Int), ("result", Kind::Bytes)],
    "ON CONFLICT (task_id) DO UPDATE SET result = excluded.result",
);
static SALVAGE: Table = Table::new(
    "new_salvage",
    "INSERT INTO salvage",
    &[("task_id", Int), ("fence", Int), ("result", Kind::Bytes)],
    "ON CONFLICT (task_id, fence) DO UPDATE SET result = excluded.result",
);
static NOTES: Table = Table::new(
    "new_task_notes",
    "INSERT INTO task_notes AS n",
    &[
        ("task_id", Int),
        ("error", Text),
        ("checkpoint", Kind::Bytes),
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
    "new_dead_letters",
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
    "lean_idempotency_keys",
    "INSERT INTO idempotency_keys",
    &[("agent", Int4), ("key", Text), ("task_id", Int), ("digest", Int)],
    "",
);
static REQUESTS: Table = Table::new(
    "new_requests",
    "INSERT INTO requests",
    &[("id", Text), ("digest", Int), ("answer", Kind::Bytes), ("at", Int)],
    "",
);
static EVENTS: Table = Table::new(
    "new_agent_events",
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
/// One that is there is held until the commit, so that nobody takes it away meanwhile: see [`HOLD_BLOCKS`].
static AGENT_BLOCKS: Table = Table::new(
    "new_agent_blocks",
    "INSERT INTO agent_blocks",
    &[("agent", Int4), ("block", Int)],
    "ON CONFLICT (agent, block) DO UPDATE SET block = excluded.block",
);
static COUNTS: Table = Table::new(
    "new_counts",
    "INSERT INTO counts AS c",
    &[("slot", Int), ("agent", Int), ("state", Int), ("n", Int)],
    "ON CONFLICT (slot, agent, state) DO UPDATE SET n = c.n + excluded.n",
);
const BLOCK_ROW: &[(&str, Kind)] = &[("block", Int), ("slot", Int), ("n", Int)];
/// But for those that [`EMPTY_BLOCKS`] takes away, by the same statement.
static LIVE_BLOCKS: Table = Table::new(
    "new_live_blocks",
    "INSERT INTO live_blocks AS b",
    BLOCK_ROW,
    "WHERE NOT EXISTS (SELECT FROM live_blocks AS own \
        WHERE own.block = new.block AND own.slot = new.slot AND own.n + new.n = 0) \
     ON CONFLICT (block, slot) DO UPDATE SET n = b.n + excluded.n",
);
static EMPTY_BLOCKS: Table = Table::new(
    "new_live_blocks",
    "DELETE FROM live_blocks AS b",
    BLOCK_ROW,
    "WHERE b.block = new.block AND b.slot = new.slot AND b.n + new.n = 0",
);

const LEAVE_READY: &str = "DELETE FROM ready WHERE task_id = ANY($1)";
/// The same, but for those that another daemon holds; names one of these.
const LEAVE_READY_AT_ONCE: &str = "WITH gone AS ( \
    DELETE FROM ready AS r USING (SELECT ctid AS place FROM ready WHERE task_id = ANY($1) FOR UPDATE SKIP LOCKED) AS free \
    WHERE r.ctid = free.place RETURNING r.task_id) \
    SELECT r.task_id FROM ready AS r WHERE r.task_id = ANY($1) AND r.task_id NOT IN (SELECT task_id FROM gone) LIMIT 1";
/// The key `k` of the task `s`, if it holds it.
macro_rules! held_key {
    () => {
        "CROSS JOIN LATERAL (SELECT own.ctid AS place FROM idempotency_keys AS own \
            WHERE own.agent = s.agent AND own.key = s.key OFFSET 0) AS held \
         WHERE k.ctid = held.place AND k.task_id = s.id"
    };
}
const FREE_KEYS: &str = concat!(
    "DELETE FROM idempotency_keys AS k USING (SELECT * FROM task_specs WHERE id = ANY($1) OFFSET 0) AS s ",
    held_key!()
);
/// Tasks and the agents they go to.
macro_rules! moved {
    () => {
        "unnest($1::bigint[], $2::bigint[]) AS moved (id, agent)"
    };
}
const MOVE_KEYS: &str = concat!(
    "UPDATE idempotency_keys AS k SET agent = moved.agent FROM ",
    moved!(),
    " CROSS JOIN LATERAL (SELECT * FROM task_specs AS own WHERE own.id = moved.id OFFSET 0) AS s ",
    held_key!()
);
const MOVE_SPECS: &str = concat!(
    "UPDATE task_specs AS t SET agent = moved.agent FROM ",
    moved!(),
    " WHERE t.id = ANY (ARRAY[moved.id])"
);
const NEW_PAYLOAD: &str = "UPDATE task_specs SET payload = $1 WHERE id = ANY($2)";
const REDRIVEN: &str = "DELETE FROM dead_letter_queue WHERE task_id = ANY($1)";
const PRUNE_SALVAGE: &str = "DELETE FROM salvage AS s WHERE s.task_id = ANY($1) AND s.fence NOT IN ( \
    SELECT newest.fence FROM salvage AS newest WHERE newest.task_id = s.task_id ORDER BY newest.fence DESC LIMIT $2)";
/// The oldest alone, a bounded number; two daemons at this do not wait for each other. They are found once: as a subquery they
/// might be looked for again for each row of the table.
const PURGE_REQUESTS: &str = "DELETE FROM requests WHERE id = ANY(ARRAY( \
    SELECT id FROM requests WHERE at < $1 ORDER BY at LIMIT $2 FOR UPDATE SKIP LOCKED))";
const GONE_WORKERS: &str = "DELETE FROM sessions WHERE worker = ANY($1) AND open = 0";
const OLD_EVENTS: &str = "DELETE FROM agent_events WHERE seq = ANY(ARRAY( \
    SELECT seq FROM (SELECT seq, at FROM agent_events ORDER BY seq LIMIT $1) AS oldest WHERE at < $2))";
/// First, so that the statement after it sees tasks of whoever held them.
const HOLD_BLOCKS: &str = "SELECT count(*) FROM unnest($1::integer[], $2::bigint[]) AS w (agent, block) CROSS JOIN LATERAL ( \
    SELECT own.block FROM agent_blocks AS own WHERE own.agent = w.agent AND own.block = w.block FOR UPDATE) AS held";
/// Those without a task of their agent.
const LEFT_BLOCKS: &str = "DELETE FROM agent_blocks AS b USING unnest($1::integer[], $2::bigint[]) AS w (agent, block) \
    CROSS JOIN LATERAL (SELECT own.ctid AS place FROM agent_blocks AS own \
        WHERE own.agent = w.agent AND own.block = w.block OFFSET 0) AS found \
    WHERE b.ctid = found.place AND (SELECT s.id FROM task_specs AS s \
        WHERE s.id BETWEEN w.block << 4 AND (w.block << 4) + 15 AND s.agent = w.agent LIMIT 1) IS NULL";
/// Before their rows go. In the order of slots, as another daemon that is at it.
const REMOVED: &str = "INSERT INTO removed_history AS r (slot, seq) \
    SELECT newest.slot, max(newest.seq) FROM ( \
        SELECT history_slot AS slot, history_seq AS seq FROM tasks WHERE id = ANY($1) AND history_slot IS NOT NULL \
        UNION ALL SELECT slot, seq FROM task_history_kept WHERE task_id = ANY($1) \
    ) AS newest GROUP BY newest.slot ORDER BY newest.slot \
    ON CONFLICT (slot) DO UPDATE SET seq = excluded.seq WHERE r.seq < excluded.seq";
/// Those that are as they were judged; names them.
const REMOVE_TASKS: &str = "DELETE FROM tasks AS t USING unnest($1::bigint[], $2::bigint[]) AS judged (id, version) \
    WHERE t.id = ANY (ARRAY[judged.id]) AND t.version = judged.version RETURNING t.id";
/// All that belongs to tasks, but their keys, and history that goes with its day.
const REMOVE: [&str; 6] = [
    "DELETE FROM task_history_kept WHERE task_id = ANY($1)",
    "DELETE FROM results WHERE task_id = ANY($1)",
    "DELETE FROM salvage WHERE task_id = ANY($1)",
    "DELETE FROM task_notes WHERE task_id = ANY($1)",
    "DELETE FROM dead_letter_queue WHERE task_id = ANY($1)",
    "DELETE FROM task_specs WHERE id = ANY($1)",
];

/// How all that a batch has is written.
#[cfg(test)]
pub(super) fn tables() -> impl Iterator<Item = &'static Table> {
    let here = [
        &SPECS,
        &NEW_TASKS,
        &LEAN_NEW_TASKS,
        &TASKS,
        &LEAN_TASKS,
        &ENDED_TASKS,
        &HISTORY,
        &READY,
        &RESULTS,
        &SALVAGE,
        &NOTES,
        &LETTERS,
        &KEYS,
        &REQUESTS,
        &EVENTS,
        &AGENT_BLOCKS,
        &COUNTS,
        &LIVE_BLOCKS,
        &EMPTY_BLOCKS,
    ];
    here.into_iter().chain(shared::TABLES)
}

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) fn statements() -> Vec<String> {
    let fixed = [
        REMOVED,
        REMOVE_TASKS,
        LEAVE_READY,
        LEAVE_READY_AT_ONCE,
        FREE_KEYS,
        MOVE_KEYS,
        MOVE_SPECS,
        NEW_PAYLOAD,
        REDRIVEN,
        PRUNE_SALVAGE,
        PURGE_REQUESTS,
        GONE_WORKERS,
        OLD_EVENTS,
        HOLD_BLOCKS,
        LEFT_BLOCKS,
    ];
    let alone = tables().map(|table| table.text(1));
    let new: [&Table; 3] = [&SPECS, &LEAN_NEW_TASKS, &HISTORY];
    let changed: [&Table; 9] =
        [&KEYS, &READY, &RESULTS, &LETTERS, &NOTES, &SALVAGE, &REQUESTS, &EVENTS, &LEAN_TASKS];
    let tallies: [&Table; 4] = [&EMPTY_BLOCKS, &LIVE_BLOCKS, &AGENT_BLOCKS, &COUNTS];
    let together = [
        Together::text(&new),
        Together::text(&changed),
        Together::text(&[&new[..], &changed[..]].concat()),
        Together::text_before(&tallies, slot_text),
        Together::text_before(&[], slot_text),
    ];
    alone.chain(together).chain(fixed.into_iter().chain(REMOVE).map(str::to_owned)).collect()
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

/// A row of `tasks`; without what few have, where none of its statement's rows has any of it.
fn image(row: &mut Rows, image: &Image, lean: bool) {
    bind::task(row, &image.task);
    bind::held(row, &image.task);
    newest(row, image);
    if !lean {
        bind::rare(&image.task).into_iter().for_each(|number| row.add(number));
    }
}

/// Where the newest entry of a task stands.
fn newest(row: &mut Rows, image: &Image) {
    row.add(image.newest.map(|place| i64::from(place.slot)));
    row.add(image.newest.map(|place| place.seq.cast_signed()));
    row.add(image.newest.map(|place| place.at.millis()));
}

/// A row of `tasks` with what an end changes; its result and what guards it follow.
fn end(row: &mut Rows, image: &Image) {
    let task = &image.task;
    row.add(task.id.0.cast_signed());
    row.add(i64::from(task.state.code()));
    row.add(i64::from(task.reason.code()));
    row.add(task.updated_at.millis());
    row.add(task.version.cast_signed());
    row.add(i64::from(task.attempt));
    row.add(i64::from(task.idle_deliveries));
    newest(row, image);
}

/// Whether none of these has what few have. All rows of a batch go in one statement, in the order of their numbers.
fn are_lean<'i>(images: impl IntoIterator<Item = &'i Image>) -> bool {
    images.into_iter().all(|image| bind::rare(&image.task).iter().all(Option::is_none))
}

/// The result that a task's row holds.
fn own_result<'s>(task: &Task, staged: &'s Staged) -> Option<&'s [u8]> {
    staged.results.get(&task.id).filter(|result| stays_with(task, result)).map(|result| &result[..])
}

/// Whether a result is kept in the row of its task: small, and of one that is DONE, for that row is not written again.
fn stays_with(task: &Task, result: &Bytes) -> bool {
    task.state == State::Done && result.len() <= SMALL_RESULT
}

/// What is new and looks at nothing that is stored, so that it may be written while the batch before is.
pub(super) async fn write_new(
    conn: &mut PgConnection,
    staged: &Staged,
    slot: u16,
    meta: Meta,
) -> Result<(), StoreError> {
    let mut rows = Together::default();
    add_new(&mut rows, staged, slot, meta);
    rows.write(conn).await.map(drop)
}

/// What is changed of what is stored; with what is new, where that was not written already.
pub(super) async fn write_changed(
    conn: &mut PgConnection,
    staged: &Staged,
    patient: bool,
    with_new: Option<(u16, Meta)>,
) -> Result<(), StoreError> {
    make_way(conn, staged, patient).await?;
    let mut rows = Together::default();
    if let Some((slot, meta)) = with_new {
        add_new(&mut rows, staged, slot, meta);
    }
    let known: Vec<&Image> = staged.in_order().into_iter().filter(|image| !image.is_new()).collect();
    add_changed(&mut rows, &known, staged);
    let written = rows.write(conn).await?;
    all_as_read(&known, &written)
}

/// The rest, in the order of batches: what goes because of it, rows that others write too, and what each batch adds to. None: the
/// slot is somebody else's.
pub(super) async fn write_rest(
    conn: &mut PgConnection,
    staged: &Staged,
    basis: &Basis,
    met: &Met,
    meta: Meta,
) -> Result<Option<Written>, StoreError> {
    clear_away(conn, staged).await?;
    let mut written = shared::write(conn, staged, basis, met).await?;
    let slot = i64::from(basis.slot);
    let numbers =
        [Some(slot), Some(meta.last_seq.cast_signed()), Some(meta.last_session.cast_signed()), basis.owner];
    let proof = tallies(staged, slot).write_before(conn, slot_text, numbers).await?;
    let Some(proof) = proof else { return Ok(None) };
    written.transaction = Columns::of(&proof).text()?.to_owned();
    Ok(Some(written))
}

/// Forgets answers that are old enough.
pub(super) async fn purge_requests(
    conn: &mut PgConnection,
    now: Timestamp,
    most: usize,
) -> Result<(), StoreError> {
    let before = now.before(REQUEST_MEMORY).millis();
    let query = sqlx::query(PURGE_REQUESTS).bind(before).bind(most as i64);
    query.execute(conn).await.map(drop).map_err(|error| failed(&error))
}

/// Rows of new tasks, and history.
fn add_new(new: &mut Together, staged: &Staged, slot: u16, meta: Meta) {
    new.add(rows(&SPECS, &staged.data, |row, (id, data)| {
        if let Some(image) = staged.tasks.get(id) {
            bind::spec(row, *id, &image.task.spec, data);
        }
    }));
    let tasks: Vec<&Image> = staged.in_order().into_iter().filter(|image| image.is_new()).collect();
    let has_result = |image: &&Image| own_result(&image.task, staged).is_some();
    let lean = are_lean(tasks.iter().copied()) && !tasks.iter().any(has_result);
    new.add(rows(if lean { &LEAN_NEW_TASKS } else { &NEW_TASKS }, tasks, |row, new| {
        image(row, new, lean);
        if !lean {
            row.add(own_result(&new.task, staged));
        }
    }));
    let first = meta.last_seq + 1 - staged.history.len() as u64;
    let packed: Vec<Packed> = packed(&staged.history, first).collect();
    new.add(rows(&HISTORY, packed, |row, packed| {
        row.add(i64::from(slot));
        row.add(packed.seq.cast_signed());
        row.add(packed.task.cast_signed());
        row.add(packed.at);
        row.add(&*packed.entries);
    }));
}

/// What has to be done before rows of tasks and keys are written.
async fn make_way(conn: &mut PgConnection, staged: &Staged, patient: bool) -> Result<(), StoreError> {
    let waited = staged.in_order().into_iter().filter(|image| !image.is_new() && image.may_have_waited);
    leave_ready(conn, waited.map(|image| image.task.id.0.cast_signed()).collect(), patient).await?;
    // What frees keys, and what moves them, comes before what takes them.
    listed(conn, FREE_KEYS, numbers(&staged.freed)).await?;
    write_respecified(conn, staged).await?;
    let redriven = staged.letters.iter().filter(|(_, letter)| letter.is_none()).map(|(id, _)| id);
    listed(conn, REDRIVEN, numbers(redriven)).await
}

/// Takes tasks from those that wait. Another daemon holds some while it decides a claim of them, and may itself wait for a batch
/// that was written before: see [`Handed::patient`](super::flight::Handed::patient).
async fn leave_ready(conn: &mut PgConnection, waited: Vec<i64>, patient: bool) -> Result<(), StoreError> {
    if patient || waited.is_empty() {
        return listed(conn, LEAVE_READY, waited).await;
    }
    let query = sqlx::query_scalar::<_, i64>(LEAVE_READY_AT_ONCE).bind(waited);
    let held = query.fetch_optional(conn).await.map_err(|error| failed(&error))?;
    held.map_or(Ok(()), |id| Err(StoreError::Overtaken(TaskId(id.cast_unsigned()))))
}

/// Refuses where rows of tasks were not written, for somebody else changed them; names one.
fn all_as_read(known: &[&Image], written: &[PgRow]) -> Result<(), StoreError> {
    if known.is_empty() {
        return Ok(());
    }
    let written = written.first().map(|row| row.try_get::<Option<Vec<i64>>, _>(0)).transpose();
    let written = written.map_err(|error| failed(&error))?.flatten().unwrap_or_default();
    if written.len() == known.len() {
        return Ok(());
    }
    let written: std::collections::HashSet<i64> = written.into_iter().collect();
    let overtaken = known.iter().find(|image| !written.contains(&image.task.id.0.cast_signed()));
    Err(overtaken.map_or_else(
        || StoreError::Statement("a task's row was written twice".to_owned()),
        |image| StoreError::Overtaken(image.task.id),
    ))
}

/// Rows of tasks that were read last, for that statement says what it wrote; and what is beside them.
fn add_changed(changed: &mut Together, known: &[&Image], staged: &Staged) {
    let keyed = staged.data.iter().filter(|(id, data)| !data.key.is_empty() && !staged.freed.contains(id));
    changed.add(rows(&KEYS, keyed, |row, (id, data)| {
        let agent = staged.tasks.get(id).map_or(AgentId(0), |image| image.task.spec.agent);
        bind::key(row, agent, &data.key, KeyHolder { task: *id, digest: data.digest });
    }));
    let waits = staged.in_order().into_iter().filter(|image| image.waits());
    changed.add(rows(&READY, waits, |row, image| {
        let task = &image.task;
        row.add(task.spec.agent.0);
        row.add(&*task.spec.task_type);
        row.add(task.is_gated());
        row.add(i64::from(9_u8.saturating_sub(task.priority)));
        row.add(task.run_at.millis());
        row.add(task.calendar);
        row.add(task.id.0.cast_signed());
    }));
    let apart = |(id, result): &(&TaskId, &Bytes)| {
        staged.tasks.get(id).is_none_or(|image| !stays_with(&image.task, result))
    };
    let apart = staged.results.iter().filter(apart);
    changed.add(rows(&RESULTS, apart, |row, (id, result)| bind::result(row, *id, result)));
    changed.add(rows(&LETTERS, staged.letters.values().flatten(), bind::letter));
    changed.add(rows(&NOTES, &staged.notes, |row, (id, notes)| bind::notes(row, *id, notes)));
    changed.add(rows(&SALVAGE, &staged.salvage, |row, ((id, fence), result)| {
        row.add(id.0.cast_signed());
        row.add(fence.cast_signed());
        row.add(&result[..]);
    }));
    changed.add(rows(&REQUESTS, staged.requests.values(), bind::request));
    changed.add(rows(&EVENTS, &staged.events, bind::event));
    let lean = are_lean(known.iter().copied());
    let ends = lean && known.iter().all(|image| image.is_end());
    let table = if ends {
        &ENDED_TASKS
    } else if lean {
        &LEAN_TASKS
    } else {
        &TASKS
    };
    changed.add(rows(table, known, |row, known| {
        if ends {
            end(row, known);
        } else {
            image(row, known, lean);
        }
        row.add(own_result(&known.task, staged));
        row.add(known.expected.cast_signed());
        row.add(known.held().map(|held| held.0.cast_signed()));
    }));
}

/// Rows that nearly every batch adds to: whoever writes them keeps the next waiting.
fn tallies(staged: &Staged, slot: i64) -> Together {
    let mut tallies = Together::default();
    let block = |row: &mut Rows, (block, n): (&u64, &i64)| {
        row.add(block.cast_signed());
        row.add(slot);
        row.add(*n);
    };
    let live = staged.blocks.iter().filter(|(_, n)| **n != 0);
    tallies.add(rows(&EMPTY_BLOCKS, live.clone(), block));
    tallies.add(rows(&LIVE_BLOCKS, live, block));
    tallies.add(rows(&AGENT_BLOCKS, agent_blocks(staged), |row, (agent, block)| {
        row.add(agent.0);
        row.add(block.cast_signed());
    }));
    let counts = staged.counts.iter().filter(|(_, n)| **n != 0);
    tallies.add(rows(&COUNTS, counts, |row, ((agent, state), n)| {
        row.add(slot);
        row.add(agent.0);
        row.add(i64::from(*state));
        row.add(*n);
    }));
    tallies
}

/// Those that new and moved tasks are in.
fn agent_blocks(staged: &Staged) -> BTreeSet<AgentBlock> {
    let comes = |image: &&Image| image.is_new() || staged.moved.contains(&image.task.id);
    let block = |image: &Image| agent_block(image.task.spec.agent, image.task.id);
    staged.tasks.values().filter(comes).map(block).collect()
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

/// What goes because of what was written, and what is old enough.
async fn clear_away(conn: &mut PgConnection, staged: &Staged) -> Result<(), StoreError> {
    if !staged.salvage.is_empty() {
        let query = sqlx::query(PRUNE_SALVAGE)
            .bind(numbers(staged.salvage.keys().map(|(id, _)| id)))
            .bind(SALVAGED as i64);
        query.execute(&mut *conn).await.map_err(|error| failed(&error))?;
    }
    if !staged.removed.is_empty() {
        let ids = numbers(staged.removed.iter().map(|(id, _)| id));
        listed(conn, REMOVED, ids.clone()).await?;
        let query = sqlx::query(REMOVE_TASKS)
            .bind(ids.clone())
            .bind(staged.removed.iter().map(|(_, version)| version.cast_signed()).collect::<Vec<_>>());
        let removed = query.fetch_all(&mut *conn).await.map_err(|error| failed(&error))?;
        if removed.len() < ids.len() {
            return Err(StoreError::Outdated("a task that was to be removed"));
        }
        for text in REMOVE {
            listed(conn, text, ids.clone()).await?;
        }
    }
    if !staged.left.is_empty() {
        let (agents, blocks): (Vec<i32>, Vec<i64>) =
            staged.left.iter().map(|(agent, block)| (agent.0.cast_signed(), block.cast_signed())).unzip();
        for text in [HOLD_BLOCKS, LEFT_BLOCKS] {
            let query = sqlx::query(text).bind(agents.clone()).bind(blocks.clone());
            query.execute(&mut *conn).await.map_err(|error| failed(&error))?;
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
