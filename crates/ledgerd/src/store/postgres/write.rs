//! How a batch is written.
//!
//! Decides nothing. What is new of a batch is one statement, what it changes another, and only what is rare goes by itself.
//! Invariant: rows are locked in the order of their numbers.

use super::packed::{Packed, packed};
use super::recover::Columns;
use super::shared::{self, Basis, Met, Written};
use super::slots::slot_text;
use super::staged::{AgentBlock, Image, Staged, agent_block};
use super::statements::{
    AGENT_BLOCKS, COUNTS, EMPTY_BLOCKS, ENDED_TASKS, EVENTS, FREE_KEYS, FREED_SPECS, GONE_WORKERS, HISTORY,
    HOLD_BLOCKS, LEAN_NEW_TASKS, LEAN_TASKS, LEAVE_READY, LEAVE_READY_AT_ONCE, LEFT_BLOCKS, LETTERS,
    LIVE_BLOCKS, MOVE_SPECS, NEW_PAYLOAD, NEW_TASKS, NOTES, OLD_EVENTS, PRUNE_SALVAGE, PURGE_REQUESTS, READY,
    REDRIVEN, REMOVE, REMOVE_TASKS, REMOVED, REQUESTS, RESULTS, SALVAGE, SPECS, TASKS,
};
use super::table::{Rows, Together, rows};
use super::{Meta, failed};
use crate::store::SMALL_RESULT;
use crate::store::bind::{self, Sink};
use bytes::Bytes;
use ledger_core::limits::{FORGOTTEN_AT_ONCE, REQUEST_MEMORY, SALVAGED};
use ledger_core::store::StoreError;
use ledger_core::{State, Task, TaskId, Timestamp};
use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};
use std::collections::BTreeSet;

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

/// New rows of a batch, as one statement writes them.
#[derive(Clone, Copy)]
pub(super) enum New {
    /// With those of what producers said.
    All(u16, Meta),
    /// Without.
    ButSpecs(u16, Meta),
    /// These alone.
    Specs,
    Nothing,
}

/// What is new and looks at nothing that is stored, so that it may be written while the batch before is.
pub(super) async fn write_new(conn: &mut PgConnection, staged: &Staged, new: New) -> Result<(), StoreError> {
    let mut rows = Together::default();
    add_new(&mut rows, &staged.in_order(), staged, new);
    rows.write(conn).await.map(drop)
}

/// What is changed of what is stored; with what is new, where that was not written already.
pub(super) async fn write_changed(
    conn: &mut PgConnection,
    staged: &Staged,
    patient: bool,
    new: New,
) -> Result<(), StoreError> {
    let images = staged.in_order();
    make_way(conn, &images, staged, patient).await?;
    let mut rows = Together::default();
    add_new(&mut rows, &images, staged, new);
    let known: Vec<&Image> = images.iter().copied().filter(|image| !image.is_new()).collect();
    add_changed(&mut rows, &images, &known, staged);
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
fn add_new(rows: &mut Together, images: &[&Image], staged: &Staged, new: New) {
    match new {
        New::All(slot, meta) => {
            rows.add(specs(staged));
            add_lives(rows, images, staged, slot, meta);
        }
        New::ButSpecs(slot, meta) => add_lives(rows, images, staged, slot, meta),
        New::Specs => rows.add(specs(staged)),
        New::Nothing => {}
    }
}

/// What producers said.
fn specs(staged: &Staged) -> Option<Rows> {
    let is_freed = |id: &TaskId| staged.freed.contains(id);
    let any_freed = !staged.freed.is_empty() && staged.data.iter().any(|(id, _)| is_freed(id));
    rows(if any_freed { &FREED_SPECS } else { &SPECS }, &staged.data, |row, (id, data)| {
        if let Some(image) = staged.tasks.get(id) {
            bind::spec(row, *id, &image.task.spec, data, &data.payload);
            if any_freed {
                row.add(is_freed(id).then_some(1_i64));
            }
        }
    })
}

/// Where tasks begin, and history.
fn add_lives(new: &mut Together, images: &[&Image], staged: &Staged, slot: u16, meta: Meta) {
    let tasks: Vec<&Image> = images.iter().copied().filter(|image| image.is_new()).collect();
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
async fn make_way(
    conn: &mut PgConnection,
    images: &[&Image],
    staged: &Staged,
    patient: bool,
) -> Result<(), StoreError> {
    let waited = images.iter().filter(|image| !image.is_new() && image.may_have_waited);
    leave_ready(conn, waited.map(|image| image.task.id.0.cast_signed()).collect(), patient).await?;
    // What frees keys, and what moves them, comes before what takes them. The rows of tasks that are removed go later; but where
    // nobody takes their keys now, these go with them.
    let go: BTreeSet<TaskId> = staged.removed.iter().map(|(id, _)| *id).filter(|_| !staged.retakes).collect();
    listed(conn, FREE_KEYS, numbers(staged.freed.iter().filter(|id| !go.contains(id)))).await?;
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
fn add_changed(changed: &mut Together, images: &[&Image], known: &[&Image], staged: &Staged) {
    let waits = images.iter().filter(|image| image.waits());
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
        let query = sqlx::query(MOVE_SPECS)
            .bind(numbers(moved().map(|(id, _)| id)))
            .bind(moved().map(|(_, agent)| i64::from(agent.0)).collect::<Vec<_>>());
        query.execute(&mut *conn).await.map_err(|error| failed(&error))?;
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
