//! Reading for everybody but the writer: committed rows, on connections of their own.
//!
//! Each read runs on a task of its own: a caller that leaves drops the answer, and never a statement half-way. Invariant: a
//! list looks at a bounded number of rows and says where it stopped.

use super::recover::{Asked, Columns, read_all};
use super::{failed, history};
use crate::store::fresh::Fresh;
use crate::store::page::next;
use crate::store::rows::{
    Shared, data_columns, dead_letter_columns, event_columns, note_columns, record_columns, task_columns,
};
use crate::store::text;
use bytes::Bytes;
use ledger_core::limits::LETTERS_LOOKED_AT;
use ledger_core::store::{
    AgentEvent, DeadLetter, DeadLetterFilter, Fut, HistoryView, Leaving, LetterGroup, LetterGroups, Notes,
    Page, Reader, Sizes, StoreError, TaskData, TaskFilter, TaskView,
};
use ledger_core::watch::{Cut, End, Stretch};
use ledger_core::{AgentId, State, TaskId, Timestamp};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgRow};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Rows that one call for a list looks at.
const LOOK: usize = 2_000;
/// Enough for the reads of a machine; each is a process of the server.
const CONNECTIONS: u32 = 4;

const NEWEST: &str = "SELECT id FROM tasks WHERE id < $1 ORDER BY id DESC LIMIT $2";
const NEWEST_OF_AGENT: &str = "SELECT t.id FROM ( \
        SELECT block FROM agent_blocks WHERE agent = $3 AND block <= $1 >> 4 ORDER BY block DESC LIMIT $2 \
    ) AS b CROSS JOIN LATERAL ( \
        SELECT id FROM task_specs WHERE id BETWEEN b.block << 4 AND (b.block << 4) + 15 AND id < $1 AND agent = $3 \
        ORDER BY id DESC LIMIT $2 \
    ) AS t ORDER BY b.block DESC, t.id DESC LIMIT $2";
/// Block by block, no more of them than it takes. The limit of a block keeps the planner from going through all tasks instead, in the
/// order that is asked for, to see of each whether its block has live ones.
const NEWEST_LIVE: &str = "SELECT t.id FROM ( \
        SELECT block FROM live_blocks WHERE block <= $1 >> 12 GROUP BY block HAVING sum(n) > 0 ORDER BY block DESC LIMIT $2 \
    ) AS b CROSS JOIN LATERAL ( \
        SELECT id FROM tasks WHERE id BETWEEN b.block << 12 AND (b.block << 12) + 4095 AND id < $1 \
        ORDER BY id DESC LIMIT $2 \
    ) AS t ORDER BY b.block DESC, t.id DESC LIMIT $2";
const NEWEST_LIVE_OF_AGENT: &str = "SELECT t.id FROM ( \
        SELECT block FROM live_blocks WHERE block <= $1 >> 12 GROUP BY block HAVING sum(n) > 0 ORDER BY block DESC LIMIT $2 \
    ) AS b CROSS JOIN LATERAL ( \
        SELECT block FROM agent_blocks \
        WHERE agent = $3 AND block BETWEEN b.block << 8 AND (b.block << 8) + 255 AND block <= $1 >> 4 \
        ORDER BY block DESC LIMIT $2 \
    ) AS a CROSS JOIN LATERAL ( \
        SELECT id FROM task_specs WHERE id BETWEEN a.block << 4 AND (a.block << 4) + 15 AND id < $1 AND agent = $3 \
        ORDER BY id DESC LIMIT $2 \
    ) AS t ORDER BY b.block DESC, a.block DESC, t.id DESC LIMIT $2";
const NEWEST_FAILED: &str =
    "SELECT task_id FROM dead_letter_queue WHERE task_id < $1 ORDER BY task_id DESC LIMIT $2";
const NEWEST_FAILED_OF_AGENT: &str =
    "SELECT task_id FROM dead_letter_queue WHERE agent = $3 AND task_id < $1 ORDER BY task_id DESC LIMIT $2";
/// Of the tasks $1 those that fit, newest first. Labels are looked at by us: few ask for them. What belongs to a task is looked
/// up for each, which a planner is not left to decide.
const VIEWS: &str = concat!(
    "SELECT ",
    task_columns!(),
    ", a.name, CASE WHEN $2 THEN s.payload END, ",
    data_columns!(),
    ", octet_length(s.payload), octet_length(COALESCE(t.result, r.result)), CASE WHEN $2 THEN COALESCE(t.result, r.result) END, ",
    note_columns!(),
    " FROM tasks AS t \
     CROSS JOIN LATERAL (SELECT * FROM task_specs AS of_task WHERE of_task.id = t.id OFFSET 0) AS s \
     LEFT JOIN agents AS a ON a.id = s.agent \
     LEFT JOIN LATERAL (SELECT * FROM results AS of_task WHERE of_task.task_id = t.id OFFSET 0) AS r ON true \
     LEFT JOIN LATERAL (SELECT * FROM task_notes AS of_task WHERE of_task.task_id = t.id OFFSET 0) AS n ON true \
     WHERE t.id = ANY($1) \
     AND ($3::bigint[] IS NULL OR t.state = ANY($3)) \
     AND ($4::text IS NULL OR s.task_type = $4) \
     AND ($5::bigint IS NULL OR t.priority = $5) \
     AND ($6::bigint IS NULL OR s.created_at >= $6) \
     AND ($7::bigint IS NULL OR s.created_at < $7) \
     ORDER BY t.id DESC"
);
pub(super) const HISTORY: &str = concat!(
    "SELECT h.seq, ",
    record_columns!(),
    " FROM tasks AS t CROSS JOIN LATERAL history_of(t.id) AS h WHERE t.id = $1 ORDER BY h.version"
);
/// What fits a filter, $1 to $7.
macro_rules! letter_fits {
    () => {
        "($7 OR d.discarded_at IS NULL) \
         AND ($1::bigint IS NULL OR d.agent = $1) \
         AND ($2::text IS NULL OR d.task_type = $2) \
         AND ($3::bigint IS NULL OR d.reason = $3) \
         AND ($4::bigint IS NULL OR d.fingerprint = $4) \
         AND ($5::bigint IS NULL OR d.failed_at >= $5) \
         AND ($6::bigint IS NULL OR d.failed_at < $6)"
    };
}
const DEAD_LETTERS: &str = concat!(
    "SELECT ",
    dead_letter_columns!(),
    " FROM dead_letter_queue AS d WHERE d.task_id = ANY($8) AND ",
    letter_fits!(),
    " ORDER BY d.task_id DESC LIMIT $9"
);
const OLDEST_LETTERS: &str = concat!(
    "SELECT d.task_id FROM dead_letter_queue AS d WHERE ",
    letter_fits!(),
    " ORDER BY d.task_id LIMIT $8"
);
const COUNT_LETTERS: &str = concat!(
    "SELECT COUNT(*) FROM (SELECT 1 FROM dead_letter_queue AS d WHERE ",
    letter_fits!(),
    " LIMIT $8) AS fits"
);
const LETTER_GROUPS: &str = concat!(
    "SELECT MAX(task_id), COUNT(*), MIN(failed_at), MAX(failed_at), COUNT(*) OVER (), (SUM(COUNT(*)) OVER ())::bigint \
     FROM (SELECT * FROM dead_letter_queue AS d WHERE ",
    letter_fits!(),
    " ORDER BY d.task_id DESC LIMIT $8) AS newest \
     GROUP BY agent, task_type, reason, fingerprint \
     ORDER BY COUNT(*) DESC, MAX(task_id) DESC LIMIT $9"
);
const DATA: &str =
    concat!("SELECT s.id, s.payload, ", data_columns!(), " FROM task_specs AS s WHERE s.id = ANY($1)");
const NOTES: &str =
    concat!("SELECT n.task_id, ", note_columns!(), " FROM task_notes AS n WHERE n.task_id = ANY($1)");
const SIZES: &str = "SELECT (SELECT COUNT(*) FROM dead_letter_queue WHERE discarded_at IS NULL), \
    pg_database_size(current_database())";
/// How many were looked at, the last of them, and those that leave: DONE is 5, FAILED 6, CANCELLED 7.
const EXPIRED: &str = "SELECT COUNT(*), COALESCE(MAX(id), 0), COALESCE(json_agg(id) FILTER (WHERE \
        updated_at < CASE WHEN state IN (5, 7) OR state = 6 AND discarded = 1 THEN $3::bigint WHEN state = 6 THEN $4::bigint END), \
        '[]')::text \
    FROM (SELECT id, state, updated_at, discarded FROM tasks WHERE id > $1 ORDER BY id LIMIT $2) AS looked";
const EVENTS: &str = concat!(
    "SELECT ",
    event_columns!(),
    " FROM agent_events AS e WHERE e.seq < $1 ORDER BY e.seq DESC LIMIT $2"
);
const EVENTS_OF_AGENT: &str = concat!(
    "SELECT ",
    event_columns!(),
    " FROM agent_events AS e WHERE e.agent = $3 AND e.seq < $1 ORDER BY e.seq DESC LIMIT $2"
);

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 18] = [
    NEWEST,
    NEWEST_OF_AGENT,
    NEWEST_LIVE,
    NEWEST_LIVE_OF_AGENT,
    NEWEST_FAILED,
    NEWEST_FAILED_OF_AGENT,
    VIEWS,
    HISTORY,
    DEAD_LETTERS,
    OLDEST_LETTERS,
    COUNT_LETTERS,
    LETTER_GROUPS,
    DATA,
    NOTES,
    SIZES,
    EXPIRED,
    EVENTS,
    EVENTS_OF_AGENT,
];

/// Ends a transaction that was left open, as none is; alone, a ROLLBACK of nothing is a warning in the server's log.
const LEAVE_NOTHING_OPEN: &str = "BEGIN; ROLLBACK";

/// The reading half.
#[derive(Clone, Debug)]
pub struct PgReader {
    pub(super) pool: PgPool,
    fresh: Arc<Fresh>,
}

impl PgReader {
    /// Connections are made when they are first needed.
    pub(super) fn open(options: PgConnectOptions, wait: Duration, fresh: Arc<Fresh>) -> Self {
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(wait)
            .after_release(|conn, _| {
                Box::pin(async move {
                    sqlx::raw_sql(LEAVE_NOTHING_OPEN).execute(conn).await?;
                    Ok(true)
                })
            })
            .connect_lazy_with(options);
        Self { pool, fresh }
    }

    pub(super) async fn rows(&self, query: Asked<'_>) -> Result<Vec<PgRow>, StoreError> {
        query.fetch_all(&self.pool).await.map_err(|error| failed(&error))
    }

    async fn row(&self, query: Asked<'_>) -> Result<PgRow, StoreError> {
        query.fetch_one(&self.pool).await.map_err(|error| failed(&error))
    }

    /// The newest numbers of a source, older than `before`, at most `look`.
    async fn newest(
        &self,
        statement: &'static str,
        before: Option<u64>,
        agent: Option<AgentId>,
        look: usize,
    ) -> Result<Vec<TaskId>, StoreError> {
        let mut query = sqlx::query(statement).bind(older_than(before)).bind(look as i64);
        if let Some(agent) = agent {
            query = query.bind(i64::from(agent.0));
        }
        read_all(&self.rows(query).await?, |row| row.task_id())
    }

    async fn views(
        &self,
        wanted: &[TaskId],
        with_data: bool,
        filter: &TaskFilter,
        limit: usize,
    ) -> Result<Vec<TaskView>, StoreError> {
        let states: Vec<i64> = filter.states.iter().map(|state| state.code().into()).collect();
        let query = sqlx::query(VIEWS)
            .bind(numbers(wanted))
            .bind(with_data)
            .bind((!states.is_empty()).then_some(states))
            .bind(filter.task_type.clone())
            .bind(filter.priority.map(i64::from))
            .bind(filter.created_after.map(Timestamp::millis))
            .bind(filter.created_before.map(Timestamp::millis));
        let mut shared = Shared::default();
        let views = read_all(&self.rows(query).await?, |row| {
            let task = row.task(&mut shared)?;
            let agent = row.maybe_text()?.unwrap_or_default().into();
            let payload = row.maybe_bytes()?.unwrap_or_default();
            let data = row.data(payload)?;
            let (payload_bytes, result_bytes) =
                (row.number()?, row.maybe()?.unwrap_or_default().cast_unsigned());
            let result = row.maybe_bytes()?;
            Ok(TaskView { task, agent, data, payload_bytes, result_bytes, result, notes: row.notes()? })
        })?;
        let has_all = |view: &TaskView| filter.labels.iter().all(|label| view.data.labels.contains(label));
        Ok(views.into_iter().filter(has_all).take(limit).collect())
    }

    async fn letters(
        &self,
        wanted: &[TaskId],
        filter: &DeadLetterFilter,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let query = by_filter(DEAD_LETTERS, filter).bind(numbers(wanted)).bind(limit as i64);
        read_all(&self.rows(query).await?, |row| row.dead_letter())
    }

    async fn page(
        &self,
        filter: &TaskFilter,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Page<TaskView>, StoreError> {
        let (statement, all_fit) = source(filter);
        let (mut items, mut before, mut seen) = (Vec::new(), before, 0);
        // A page is mostly found among the newest: few rows first, and more when they do not fill it.
        let mut look = if all_fit { limit.clamp(1, LOOK) } else { (2 * limit).clamp(1, LOOK) };
        loop {
            let looked = self.newest(statement, before, filter.agent, look).await?;
            let room = limit - items.len();
            let found = self.views(&looked, false, filter, room).await?;
            before = next(&looked, look, found.last().map(|view| view.task.id), found.len() == room);
            items.extend(found);
            seen += looked.len();
            if items.len() >= limit || before.is_none() || seen >= LOOK {
                return Ok(Page { items, before });
            }
            look = (4 * look).min(LOOK - seen);
        }
    }

    /// Data that is known without a read, where that is so for all of these.
    fn known_for_workers(&self, wanted: &[(TaskId, bool)]) -> Option<Vec<(Arc<TaskData>, Notes)>> {
        let fresh = self.fresh.get(wanted.iter().map(|(id, _)| *id)).into_iter().zip(wanted);
        fresh.map(|(data, (_, before))| Some((data.filter(|_| !before)?, Notes::default()))).collect()
    }

    async fn read_for_workers(
        &self,
        wanted: &[(TaskId, bool)],
    ) -> Result<Vec<(Arc<TaskData>, Notes)>, StoreError> {
        // One that was delivered or redriven before may have another payload by now, given at another daemon.
        let of_new = |((id, before), data): (&(TaskId, bool), Option<Arc<TaskData>>)| {
            Some((*id, data.filter(|_| !before)?))
        };
        let fresh = self.fresh.get(wanted.iter().map(|(id, _)| *id));
        let mut data: HashMap<TaskId, Arc<TaskData>> = wanted.iter().zip(fresh).filter_map(of_new).collect();
        let missing: Vec<TaskId> =
            wanted.iter().map(|(id, _)| *id).filter(|id| !data.contains_key(id)).collect();
        if !missing.is_empty() {
            let rows = self.rows(sqlx::query(DATA).bind(numbers(&missing))).await?;
            data.extend(read_all(&rows, |row| {
                let (id, payload): (TaskId, Bytes) = (row.task_id()?, row.bytes()?);
                Ok((id, Arc::new(row.data(payload)?)))
            })?);
        }
        let delivered: Vec<TaskId> = wanted.iter().filter(|(_, before)| *before).map(|(id, _)| *id).collect();
        let mut notes: HashMap<TaskId, Notes> = HashMap::new();
        if !delivered.is_empty() {
            let rows = self.rows(sqlx::query(NOTES).bind(numbers(&delivered))).await?;
            notes.extend(read_all(&rows, |row| Ok((row.task_id()?, row.notes()?)))?);
        }
        let of = |(id, before): &(TaskId, bool)| {
            let data = data.get(id).cloned();
            let data = data.ok_or_else(|| StoreError::Corrupt(format!("task {id} has no data")))?;
            Ok((data, notes.get(id).filter(|_| *before).cloned().unwrap_or_default()))
        };
        wanted.iter().map(of).collect()
    }

    async fn count(&self, filter: &DeadLetterFilter) -> Result<(u64, bool), StoreError> {
        let query = by_filter(COUNT_LETTERS, filter).bind(LETTERS_LOOKED_AT as i64 + 1);
        let counted = Columns::of(&self.row(query).await?).number()?;
        let most = LETTERS_LOOKED_AT as u64;
        Ok((counted.min(most), counted > most))
    }

    async fn groups(&self, filter: &DeadLetterFilter, limit: usize) -> Result<LetterGroups, StoreError> {
        let query = by_filter(LETTER_GROUPS, filter).bind(LETTERS_LOOKED_AT as i64).bind(limit as i64);
        let mut found = LetterGroups::default();
        let counted = read_all(&self.rows(query).await?, |row| {
            let group = (row.task_id()?, row.number()?, row.time()?, row.time()?);
            (found.total, found.letters) = (row.number()?, row.number()?);
            Ok(group)
        })?;
        let newest: Vec<TaskId> = counted.iter().map(|(id, ..)| *id).collect();
        let any = DeadLetterFilter { discarded: true, ..DeadLetterFilter::default() };
        let letters = self.letters(&newest, &any, newest.len()).await?;
        let mut letters: HashMap<TaskId, DeadLetter> =
            letters.into_iter().map(|letter| (letter.task, letter)).collect();
        // One that was redriven between the two reads is left out.
        found.groups = counted
            .into_iter()
            .filter_map(|(id, count, first_at, last_at)| {
                Some(LetterGroup { newest: letters.remove(&id)?, count, first_at, last_at })
            })
            .collect();
        found.more = found.letters >= LETTERS_LOOKED_AT as u64 && self.count(filter).await?.1;
        Ok(found)
    }
}

fn numbers(ids: &[TaskId]) -> Vec<i64> {
    ids.iter().map(|id| id.0.cast_signed()).collect()
}

fn older_than(before: Option<u64>) -> i64 {
    before.and_then(|before| i64::try_from(before).ok()).unwrap_or(i64::MAX)
}

/// A statement with what the filter of dead letters binds, $1 to $7.
fn by_filter<'q>(statement: &'static str, filter: &DeadLetterFilter) -> Asked<'q> {
    sqlx::query(statement)
        .bind(filter.agent.map(|agent| i64::from(agent.0)))
        .bind(filter.task_type.clone())
        .bind(filter.reason.map(|reason| i64::from(reason.code())))
        .bind(filter.fingerprint.map(u64::cast_signed))
        .bind(filter.failed_after.map(Timestamp::millis))
        .bind(filter.failed_before.map(Timestamp::millis))
        .bind(filter.discarded)
}

/// Runs a read to its end, whatever becomes of who asked.
fn apart<'a, T: Send + 'static>(
    read: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Fut<'a, T> {
    Box::pin(async move {
        match tokio::spawn(read).await {
            Ok(found) => found,
            Err(error) => Err(StoreError::Unavailable(format!("a read ended: {error}"))),
        }
    })
}

impl Reader for PgReader {
    fn task(&self, id: TaskId, with_data: bool) -> Fut<'_, Option<TaskView>> {
        let reader = self.clone();
        apart(async move {
            Ok(reader.views(&[id], with_data, &TaskFilter::default(), 1).await?.into_iter().next())
        })
    }

    fn tasks<'a>(
        &'a self,
        filter: &'a TaskFilter,
        before: Option<u64>,
        limit: usize,
    ) -> Fut<'a, Page<TaskView>> {
        let (reader, filter) = (self.clone(), filter.clone());
        apart(async move { reader.page(&filter, before, limit).await })
    }

    fn history(&self, id: TaskId) -> Fut<'_, Option<Vec<HistoryView>>> {
        let reader = self.clone();
        apart(async move {
            let rows = reader.rows(sqlx::query(HISTORY).bind(id.0.cast_signed())).await?;
            let views = read_all(&rows, |row| Ok(HistoryView { seq: row.number()?, record: row.record()? }))?;
            // A task has at least the row of its enqueue.
            Ok(Some(views).filter(|views| !views.is_empty()))
        })
    }

    fn end(&self) -> Fut<'_, End> {
        let reader = self.clone();
        apart(async move { reader.history_end().await })
    }

    fn after<'a>(&'a self, cut: &'a Cut, limit: usize) -> Fut<'a, Option<Stretch>> {
        let (reader, cut) = (self.clone(), cut.clone());
        apart(async move { reader.history_after(&cut, limit).await })
    }

    fn dead_letter(&self, id: TaskId) -> Fut<'_, Option<DeadLetter>> {
        let reader = self.clone();
        apart(async move {
            let any = DeadLetterFilter { discarded: true, ..DeadLetterFilter::default() };
            Ok(reader.letters(&[id], &any, 1).await?.into_iter().next())
        })
    }

    fn dead_letters<'a>(
        &'a self,
        filter: &'a DeadLetterFilter,
        before: Option<u64>,
        limit: usize,
    ) -> Fut<'a, Page<DeadLetter>> {
        let (reader, filter) = (self.clone(), filter.clone());
        apart(async move {
            let statement = if filter.agent.is_some() { NEWEST_FAILED_OF_AGENT } else { NEWEST_FAILED };
            let looked = reader.newest(statement, before, filter.agent, LOOK).await?;
            let items = reader.letters(&looked, &filter, limit).await?;
            let before = next(&looked, LOOK, items.last().map(|letter| letter.task), items.len() == limit);
            Ok(Page { items, before })
        })
    }

    fn oldest_letters<'a>(
        &'a self,
        filter: &'a DeadLetterFilter,
        limit: usize,
    ) -> Fut<'a, (Vec<TaskId>, bool)> {
        let (reader, filter) = (self.clone(), filter.clone());
        apart(async move {
            let query = by_filter(OLDEST_LETTERS, &filter).bind(limit as i64 + 1);
            let mut ids = read_all(&reader.rows(query).await?, |row| row.task_id())?;
            let more = ids.len() > limit;
            ids.truncate(limit);
            Ok((ids, more))
        })
    }

    fn count_letters<'a>(&'a self, filter: &'a DeadLetterFilter) -> Fut<'a, (u64, bool)> {
        let (reader, filter) = (self.clone(), filter.clone());
        apart(async move { reader.count(&filter).await })
    }

    fn letter_groups<'a>(&'a self, filter: &'a DeadLetterFilter, limit: usize) -> Fut<'a, LetterGroups> {
        let (reader, filter) = (self.clone(), filter.clone());
        apart(async move { reader.groups(&filter, limit).await })
    }

    fn agent_events(
        &self,
        agent: Option<AgentId>,
        before: Option<u64>,
        limit: usize,
    ) -> Fut<'_, Page<(u64, AgentEvent)>> {
        let reader = self.clone();
        apart(async move {
            let statement = if agent.is_some() { EVENTS_OF_AGENT } else { EVENTS };
            let mut query = sqlx::query(statement).bind(older_than(before)).bind(limit as i64);
            if let Some(agent) = agent {
                query = query.bind(i64::from(agent.0));
            }
            let items = read_all(&reader.rows(query).await?, |row| row.event())?;
            let before = items.last().filter(|_| items.len() == limit).map(|(seq, _)| *seq);
            Ok(Page { items, before })
        })
    }

    fn for_workers<'a>(&'a self, wanted: &'a [(TaskId, bool)]) -> Fut<'a, Vec<(Arc<TaskData>, Notes)>> {
        if let Some(known) = self.known_for_workers(wanted) {
            return Box::pin(std::future::ready(Ok(known)));
        }
        let (reader, wanted) = (self.clone(), wanted.to_vec());
        apart(async move { reader.read_for_workers(&wanted).await })
    }

    fn expired(
        &self,
        after: TaskId,
        leaving: Leaving,
        look: usize,
    ) -> Fut<'_, (Vec<TaskId>, Option<TaskId>)> {
        let reader = self.clone();
        apart(async move {
            let query = sqlx::query(EXPIRED)
                .bind(after.0.cast_signed())
                .bind(look as i64)
                .bind(leaving.done.map(Timestamp::millis))
                .bind(leaving.failed.map(Timestamp::millis));
            let row = reader.row(query).await?;
            let mut row = Columns::of(&row);
            let (looked, last) = (row.number()?, row.number()?);
            let found = text::task_ids(row.text()?)?;
            Ok((found, (looked == look as u64).then_some(TaskId(last))))
        })
    }

    fn tidy(&self, now: Timestamp, kept: Option<Duration>) -> Fut<'_, bool> {
        let reader = self.clone();
        apart(async move { history::tidy(&reader.pool, now, kept).await })
    }

    fn sizes(&self) -> Fut<'_, Sizes> {
        let reader = self.clone();
        apart(async move {
            let row = reader.row(sqlx::query(SIZES)).await?;
            let mut row = Columns::of(&row);
            let (dead_letters, bytes) = (row.number()?, row.number()?);
            Ok(Sizes { dead_letters, bytes, free_bytes: 0, log_bytes: 0 })
        })
    }

    fn close(&self) -> Fut<'_, ()> {
        let reader = self.clone();
        apart(async move {
            reader.pool.close().await;
            Ok(())
        })
    }
}

/// Where a list gets its numbers from, and whether every one of them fits.
fn source(filter: &TaskFilter) -> (&'static str, bool) {
    let of_agent = filter.agent.is_some();
    let rest = filter.task_type.is_none()
        && filter.priority.is_none()
        && filter.labels.is_empty()
        && filter.created_after.is_none()
        && filter.created_before.is_none();
    let states = &filter.states;
    let statement = if !states.is_empty() && states.iter().all(|state| *state == State::Failed) {
        if of_agent { NEWEST_FAILED_OF_AGENT } else { NEWEST_FAILED }
    } else if !states.is_empty() && states.iter().all(|state| !state.is_terminal()) {
        if of_agent { NEWEST_LIVE_OF_AGENT } else { NEWEST_LIVE }
    } else if of_agent {
        NEWEST_OF_AGENT
    } else {
        NEWEST
    };
    let all_fit = rest && (states.is_empty() || states.iter().all(|state| *state == State::Failed));
    (statement, all_fit)
}
