//! Reading for everybody but the writer: committed rows, on connections that cannot write.
//!
//! Invariants: a list looks at a bounded number of rows and says where it stopped; no read waits for the writer or makes
//! it wait.

use super::failed;
use super::packed::{record_columns, row_of, task_columns};
use super::payloads::{Folder, Place};
use super::recover::{Columns, each};
use super::write::ids;
use crate::store::fresh::Fresh;
use crate::store::page::next;
use crate::store::rows::{Shared, data_columns, dead_letter_columns, event_columns, note_columns};
use crate::store::text;
use bytes::Bytes;
use ledger_core::limits::LETTERS_LOOKED_AT;
use ledger_core::store::{
    AgentEvent, DeadLetter, DeadLetterFilter, Fut, HistoryView, Leaving, LetterGroup, LetterGroups, Notes,
    Page, Reader, Sizes, StoreError, TaskData, TaskFilter, TaskView,
};
use ledger_core::watch::{Cut, End, Stretch, in_order};
use ledger_core::{AgentId, State, TaskId, Timestamp};
use sqlx::pool::PoolConnection;
use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqlitePool, SqlitePoolOptions};
use sqlx::{Row, Sqlite};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Rows that one call for a list looks at.
const LOOK: usize = 2_000;
/// Each takes memory for pages of its own; more than there are processors would not read faster.
const CONNECTIONS: u32 = 4;

const NEWEST: &str = "SELECT id FROM tasks WHERE id < ?1 ORDER BY id DESC LIMIT ?2";
/// The plus keeps SQLite from making an index by agent for the occasion.
const NEWEST_OF_AGENT: &str = "SELECT s.id FROM agent_blocks AS a \
    CROSS JOIN task_specs AS s ON s.id BETWEEN a.block << 4 AND (a.block << 4) + 15 \
    WHERE a.agent = ?3 AND a.block <= ?1 >> 4 AND s.id < ?1 AND +s.agent = ?3 \
    ORDER BY a.block DESC, s.id DESC LIMIT ?2";
const NEWEST_LIVE: &str = "SELECT t.id FROM live_blocks AS b \
    CROSS JOIN tasks AS t ON t.id BETWEEN b.block << 12 AND (b.block << 12) + 4095 \
    WHERE b.block <= ?1 >> 12 AND b.live > 0 AND t.id < ?1 \
    ORDER BY b.block DESC, t.id DESC LIMIT ?2";
const NEWEST_LIVE_OF_AGENT: &str = "SELECT s.id FROM live_blocks AS b \
    CROSS JOIN agent_blocks AS a ON a.agent = ?3 AND a.block BETWEEN b.block << 8 AND (b.block << 8) + 255 \
    CROSS JOIN task_specs AS s ON s.id BETWEEN a.block << 4 AND (a.block << 4) + 15 \
    WHERE b.block <= ?1 >> 12 AND b.live > 0 AND s.id < ?1 AND +s.agent = ?3 \
    ORDER BY b.block DESC, a.block DESC, s.id DESC LIMIT ?2";
const NEWEST_FAILED: &str =
    "SELECT task_id FROM dead_letter_queue WHERE task_id < ?1 ORDER BY task_id DESC LIMIT ?2";
const NEWEST_FAILED_OF_AGENT: &str =
    "SELECT task_id FROM dead_letter_queue WHERE agent = ?3 AND task_id < ?1 ORDER BY task_id DESC LIMIT ?2";
/// Where a payload is that is in no row.
macro_rules! place_columns {
    () => {
        "p.file, p.at, p.length, p.digest"
    };
}
/// Of the tasks ?1 those that fit, newest first.
const VIEWS: &str = concat!(
    "SELECT ",
    task_columns!(),
    ", a.name, CASE WHEN ?2 THEN s.payload END, ",
    data_columns!(),
    ", COALESCE(p.length, LENGTH(s.payload)), COALESCE(LENGTH(t.result), LENGTH(r.result)), \
     CASE WHEN ?2 THEN COALESCE(t.result, r.result) END, ",
    note_columns!(),
    ", ",
    place_columns!(),
    " FROM json_each(?1) AS wanted \
     CROSS JOIN tasks AS t ON t.id = wanted.value \
     CROSS JOIN task_specs AS s ON s.id = t.id \
     LEFT JOIN agents AS a ON a.id = s.agent \
     LEFT JOIN results AS r ON r.task_id = t.id \
     LEFT JOIN task_notes AS n ON n.task_id = t.id \
     LEFT JOIN payload_places AS p ON p.task_id = t.id \
     WHERE (?4 IS NULL OR t.state IN (SELECT value FROM json_each(?4))) \
     AND (?5 IS NULL OR s.task_type = ?5) \
     AND (?6 IS NULL OR t.priority = ?6) \
     AND (?7 IS NULL OR s.created_at >= ?7) \
     AND (?8 IS NULL OR s.created_at < ?8) \
     AND (?9 IS NULL OR NOT EXISTS ( \
        SELECT 1 FROM json_each(?9) AS needed \
        WHERE NOT EXISTS ( \
            SELECT 1 FROM json_each(s.labels) AS label \
            WHERE label.value ->> 0 = needed.value ->> 0 AND label.value ->> 1 = needed.value ->> 1))) \
     ORDER BY t.id DESC LIMIT ?3"
);
/// Along the chain of a task's entries.
const HISTORY: &str = concat!(
    "WITH RECURSIVE chain (seq, task, at, value) AS ( \
        SELECT t.history, r.task, r.at, r.entries -> (t.history - r.seq) FROM tasks AS t ",
    row_of!("t.history"),
    " WHERE t.id = ? \
        UNION ALL \
        SELECT e.seq - (e.value ->> 2), r.task, r.at, r.entries -> (e.seq - (e.value ->> 2) - r.seq) FROM chain AS e ",
    row_of!("e.seq - (e.value ->> 2)"),
    " WHERE e.value ->> 2 > 0 \
     ) \
     SELECT e.seq, ",
    record_columns!(),
    " FROM chain AS e ORDER BY e.seq"
);
const END: &str = "SELECT seed, last_seq, removed_seq FROM meta WHERE id = 1";
/// Rows in the order of their key and entries in theirs, which is the order of their numbers.
const AFTER: &str = concat!(
    "SELECT 0, e.seq + e.key, ",
    record_columns!(),
    ", s.agent, s.task_type, s.labels \
     FROM (SELECT r.seq, r.task, r.at, each.key, each.value FROM task_history AS r CROSS JOIN json_each(r.entries) AS each \
        WHERE r.seq >= COALESCE((SELECT MAX(seq) FROM task_history WHERE seq <= ?1), 0) \
        AND r.seq + each.key > ?1 AND each.type = 'array' ORDER BY r.seq LIMIT ?2) AS e \
     LEFT JOIN task_specs AS s ON s.id = e.task + (e.value ->> 0)"
);
const REMOVED: &str = "SELECT removed_seq FROM meta WHERE id = 1";
const DEAD_LETTERS: &str = concat!(
    "SELECT ",
    dead_letter_columns!(),
    " FROM json_each(?1) AS wanted \
     CROSS JOIN dead_letter_queue AS d ON d.task_id = wanted.value \
     WHERE (?3 OR d.discarded_at IS NULL) \
     AND (?4 IS NULL OR d.task_type = ?4) \
     AND (?5 IS NULL OR d.reason = ?5) \
     AND (?6 IS NULL OR d.fingerprint = ?6) \
     AND (?7 IS NULL OR d.failed_at >= ?7) \
     AND (?8 IS NULL OR d.failed_at < ?8) \
     ORDER BY d.task_id DESC LIMIT ?2"
);
const DATA: &str = concat!(
    "SELECT s.id, s.payload, ",
    data_columns!(),
    ", ",
    place_columns!(),
    " FROM json_each(?) AS wanted CROSS JOIN task_specs AS s ON s.id = wanted.value \
     LEFT JOIN payload_places AS p ON p.task_id = s.id"
);
const NOTES: &str = concat!(
    "SELECT n.task_id, ",
    note_columns!(),
    " FROM json_each(?) AS wanted CROSS JOIN task_notes AS n ON n.task_id = wanted.value"
);
const SIZES: &str = "SELECT (SELECT COUNT(*) FROM dead_letter_queue WHERE discarded_at IS NULL), \
    (SELECT page_count FROM pragma_page_count) * (SELECT page_size FROM pragma_page_size), \
    (SELECT freelist_count FROM pragma_freelist_count) * (SELECT page_size FROM pragma_page_size)";
/// How many were looked at, the last of them, and those that leave: DONE is 5, FAILED 6, CANCELLED 7.
const EXPIRED: &str = "SELECT COUNT(*), COALESCE(MAX(id), 0), COALESCE(json_group_array(id) FILTER (WHERE \
        updated_at < CASE WHEN state IN (5, 7) OR state = 6 AND rare ->> 9 = 1 THEN ?3 WHEN state = 6 THEN ?4 END), '[]') \
    FROM (SELECT id, state, updated_at, rare FROM tasks WHERE id > ?1 ORDER BY id LIMIT ?2)";
/// What fits a filter, ?1 to ?7.
macro_rules! letter_fits {
    () => {
        "(?7 OR d.discarded_at IS NULL) \
         AND (?1 IS NULL OR d.agent = ?1) \
         AND (?2 IS NULL OR d.task_type = ?2) \
         AND (?3 IS NULL OR d.reason = ?3) \
         AND (?4 IS NULL OR d.fingerprint = ?4) \
         AND (?5 IS NULL OR d.failed_at >= ?5) \
         AND (?6 IS NULL OR d.failed_at < ?6)"
    };
}
const OLDEST_LETTERS: &str = concat!(
    "SELECT d.task_id FROM dead_letter_queue AS d WHERE ",
    letter_fits!(),
    " ORDER BY d.task_id LIMIT ?8"
);
const COUNT_LETTERS: &str = concat!(
    "SELECT COUNT(*) FROM (SELECT 1 FROM dead_letter_queue AS d WHERE ",
    letter_fits!(),
    " LIMIT ?8)"
);
const LETTER_GROUPS: &str = concat!(
    "SELECT MAX(task_id), COUNT(*), MIN(failed_at), MAX(failed_at), COUNT(*) OVER (), SUM(COUNT(*)) OVER () \
     FROM (SELECT * FROM dead_letter_queue AS d WHERE ",
    letter_fits!(),
    " ORDER BY d.task_id DESC LIMIT ?8) \
     GROUP BY agent, task_type, reason, fingerprint \
     ORDER BY COUNT(*) DESC, MAX(task_id) DESC LIMIT ?9"
);
const EVENTS: &str = concat!(
    "SELECT ",
    event_columns!(),
    " FROM agent_events AS e WHERE e.seq < ?1 ORDER BY e.seq DESC LIMIT ?2"
);
const EVENTS_OF_AGENT: &str = concat!(
    "SELECT ",
    event_columns!(),
    " FROM agent_events AS e WHERE e.agent = ?3 AND e.seq < ?1 ORDER BY e.seq DESC LIMIT ?2"
);
/// The files that rows name, and how long each has to be.
const FILES: &str = "\
    WITH RECURSIVE files (file) AS ( \
        SELECT MIN(file) FROM payload_places \
        UNION ALL SELECT (SELECT MIN(file) FROM payload_places WHERE file > f.file) FROM files AS f WHERE f.file IS NOT NULL \
    ) \
    SELECT f.file, (SELECT p.at + p.length FROM payload_places AS p WHERE p.file = f.file ORDER BY p.at DESC LIMIT 1) \
    FROM files AS f WHERE f.file IS NOT NULL";
const QUICK_CHECK: &str = "PRAGMA quick_check(1)";

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 23] = [
    EXPIRED,
    NEWEST,
    NEWEST_OF_AGENT,
    NEWEST_LIVE,
    NEWEST_LIVE_OF_AGENT,
    NEWEST_FAILED,
    NEWEST_FAILED_OF_AGENT,
    VIEWS,
    HISTORY,
    END,
    AFTER,
    REMOVED,
    DEAD_LETTERS,
    DATA,
    NOTES,
    SIZES,
    OLDEST_LETTERS,
    COUNT_LETTERS,
    LETTER_GROUPS,
    EVENTS,
    EVENTS_OF_AGENT,
    FILES,
    QUICK_CHECK,
];

/// The reading half.
#[derive(Debug)]
pub struct SqliteReader {
    pool: SqlitePool,
    fresh: Arc<Fresh>,
    /// The write-ahead log.
    log: PathBuf,
    payloads: Folder,
}

impl SqliteReader {
    /// Connections are made when they are first needed.
    pub(super) fn open(
        options: SqliteConnectOptions,
        fresh: Arc<Fresh>,
        log: PathBuf,
        payloads: Folder,
    ) -> Self {
        let pool = SqlitePoolOptions::new()
            .max_connections(CONNECTIONS)
            .max_lifetime(None)
            .idle_timeout(None)
            .test_before_acquire(false)
            .connect_lazy_with(options);
        Self { pool, fresh, log, payloads }
    }

    async fn conn(&self) -> Result<PoolConnection<Sqlite>, StoreError> {
        self.pool.acquire().await.map_err(|error| failed(&error))
    }

    /// The newest numbers of a source, older than `before`, at most `look`.
    async fn newest(
        &self,
        statement: &'static str,
        before: Option<u64>,
        agent: Option<AgentId>,
        look: usize,
    ) -> Result<Vec<TaskId>, StoreError> {
        let before = before.and_then(|before| i64::try_from(before).ok()).unwrap_or(i64::MAX);
        let mut query = sqlx::query(statement).bind(before).bind(look as i64);
        if let Some(agent) = agent {
            query = query.bind(i64::from(agent.0));
        }
        let rows = query.fetch_all(&self.pool).await.map_err(|error| failed(&error))?;
        rows.iter().map(|row| Columns::of(row).task_id()).collect()
    }

    async fn views(
        &self,
        wanted: &[TaskId],
        with_data: bool,
        filter: &TaskFilter,
        limit: usize,
    ) -> Result<Vec<TaskView>, StoreError> {
        let mut last = false;
        loop {
            let (mut found, places) = self.rows(wanted, with_data, filter, limit).await?;
            match self.in_files(&places).await {
                Ok(payloads) => {
                    places
                        .iter()
                        .zip(payloads)
                        .for_each(|((at, _), payload)| found[*at].data.payload = payload);
                    return Ok(found);
                }
                // The task may have left since its row was read: then there is none now.
                Err(_) if !last => last = true,
                Err(error) => return Err(error),
            }
        }
    }

    /// As [`SqliteReader::views`], without the payloads of those that have one in a file; and where these are.
    async fn rows(
        &self,
        wanted: &[TaskId],
        with_data: bool,
        filter: &TaskFilter,
        limit: usize,
    ) -> Result<(Vec<TaskView>, Vec<(usize, Place)>), StoreError> {
        let states: Vec<u8> = filter.states.iter().map(|state| state.code()).collect();
        let query = sqlx::query(VIEWS)
            .bind(ids(wanted.iter()))
            .bind(with_data)
            .bind(limit as i64)
            .bind((!states.is_empty()).then(|| text::written(&states)))
            .bind(filter.task_type.clone())
            .bind(filter.priority.map(i64::from))
            .bind(filter.created_after.map(Timestamp::millis))
            .bind(filter.created_before.map(Timestamp::millis))
            .bind((!filter.labels.is_empty()).then(|| text::labels(&filter.labels)));
        let mut shared = Shared::default();
        let mut names: HashMap<AgentId, Arc<str>> = HashMap::new();
        let rows = query.fetch_all(&self.pool).await.map_err(|error| failed(&error))?;
        let (mut found, mut places) = (Vec::with_capacity(rows.len()), Vec::new());
        for row in &rows {
            let mut row = Columns::of(row);
            let task = row.task(&mut shared)?;
            let name = row.maybe_text()?.unwrap_or_default();
            let agent = Arc::clone(names.entry(task.spec.agent).or_insert_with(|| name.into()));
            let payload = row.maybe_bytes()?.unwrap_or_default();
            let data = row.data(payload)?;
            let payload_bytes = row.number()?;
            let result_bytes = row.maybe()?.unwrap_or_default().cast_unsigned();
            let result = row.maybe_bytes()?;
            let notes = row.notes()?;
            places.extend(place(&mut row)?.filter(|_| with_data).map(|place| (found.len(), place)));
            found.push(TaskView { task, agent, data, payload_bytes, result_bytes, result, notes });
        }
        Ok((found, places))
    }

    /// Payloads that are in files, in this order.
    async fn in_files<K>(&self, places: &[(K, Place)]) -> Result<Vec<Bytes>, StoreError> {
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let (folder, places) =
            (self.payloads.clone(), places.iter().map(|(_, place)| *place).collect::<Vec<_>>());
        let read = move || {
            let mut reading = folder.reading();
            places.into_iter().map(|place| reading.read(place).map_err(|error| lost(place, &error))).collect()
        };
        tokio::task::spawn_blocking(read).await.map_err(|error| StoreError::Unavailable(error.to_string()))?
    }

    /// What producers said of these tasks, as far as they are stored.
    async fn data(&self, wanted: &[TaskId]) -> Result<HashMap<TaskId, Arc<TaskData>>, StoreError> {
        let mut last = false;
        loop {
            let (mut found, mut places) = (HashMap::new(), Vec::new());
            each(&mut *self.conn().await?, DATA, Some(ids(wanted.iter())), |row| {
                let (id, payload) = (row.task_id()?, row.bytes()?);
                found.insert(id, row.data(payload)?);
                places.extend(place(row)?.map(|place| (id, place)));
                Ok(())
            })
            .await?;
            match self.in_files(&places).await {
                Ok(payloads) => {
                    for ((id, _), payload) in places.iter().zip(payloads) {
                        found.entry(*id).and_modify(|data| data.payload = payload);
                    }
                    return Ok(found.into_iter().map(|(id, data)| (id, Arc::new(data))).collect());
                }
                Err(_) if !last => last = true,
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether the files of payloads are there, and long enough.
    async fn check_files(&self) -> Result<(), StoreError> {
        let rows = sqlx::query(FILES).fetch_all(&self.pool).await.map_err(|error| failed(&error))?;
        for row in &rows {
            let mut row = Columns::of(row);
            let (file, needed) = (row.number()?, row.number()?);
            let path = self.payloads.path(file);
            let what = match tokio::fs::metadata(&path).await {
                Ok(found) if found.len() >= needed => continue,
                Ok(found) => format!("has {} bytes of {needed}", found.len()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => "is missing".to_owned(),
                Err(error) => return Err(StoreError::Unavailable(format!("{}: {error}", path.display()))),
            };
            return Err(StoreError::Corrupt(format!(
                "{}, which has payloads of tasks, {what}",
                path.display()
            )));
        }
        Ok(())
    }

    async fn letters(
        &self,
        wanted: &[TaskId],
        filter: &DeadLetterFilter,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let query: Query<'_, Sqlite, SqliteArguments> = sqlx::query(DEAD_LETTERS)
            .bind(ids(wanted.iter()))
            .bind(limit as i64)
            .bind(filter.discarded)
            .bind(filter.task_type.clone())
            .bind(filter.reason.map(|reason| i64::from(reason.code())))
            .bind(filter.fingerprint.map(u64::cast_signed))
            .bind(filter.failed_after.map(Timestamp::millis))
            .bind(filter.failed_before.map(Timestamp::millis));
        let rows = query.fetch_all(&self.pool).await.map_err(|error| failed(&error))?;
        rows.iter().map(|row| Columns::of(row).dead_letter()).collect()
    }
}

/// Where a payload is, unless it is in the row.
fn place(row: &mut Columns<'_>) -> Result<Option<Place>, StoreError> {
    let [file, at, length, digest] = row.numbers()?.map(|number| number.map(i64::cast_unsigned));
    let place = || Some(Place { file: file?, at: at?, length: length?, digest: digest? });
    Ok(place())
}

fn lost(place: Place, error: &io::Error) -> StoreError {
    let what = format!("a payload of {} bytes in {:08} at {}: {error}", place.length, place.file, place.at);
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
            StoreError::Corrupt(what)
        }
        _ => StoreError::Unavailable(what),
    }
}

/// A statement with what the filter of dead letters binds, ?1 to ?7.
fn by_filter<'q>(statement: &'static str, filter: &DeadLetterFilter) -> Query<'q, Sqlite, SqliteArguments> {
    sqlx::query(statement)
        .bind(filter.agent.map(|agent| i64::from(agent.0)))
        .bind(filter.task_type.clone())
        .bind(filter.reason.map(|reason| i64::from(reason.code())))
        .bind(filter.fingerprint.map(u64::cast_signed))
        .bind(filter.failed_after.map(Timestamp::millis))
        .bind(filter.failed_before.map(Timestamp::millis))
        .bind(filter.discarded)
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
    let statement = if states.is_empty() {
        if of_agent { NEWEST_OF_AGENT } else { NEWEST }
    } else if states.iter().all(|state| *state == State::Failed) {
        if of_agent { NEWEST_FAILED_OF_AGENT } else { NEWEST_FAILED }
    } else if states.iter().all(|state| !state.is_terminal()) {
        if of_agent { NEWEST_LIVE_OF_AGENT } else { NEWEST_LIVE }
    } else if of_agent {
        NEWEST_OF_AGENT
    } else {
        NEWEST
    };
    let all_fit = rest && (states.is_empty() || states.iter().all(|state| *state == State::Failed));
    (statement, all_fit)
}

impl Reader for SqliteReader {
    fn task(&self, id: TaskId, with_data: bool) -> Fut<'_, Option<TaskView>> {
        Box::pin(async move {
            let found = self.views(&[id], with_data, &TaskFilter::default(), 1).await?;
            Ok(found.into_iter().next())
        })
    }

    fn tasks<'a>(
        &'a self,
        filter: &'a TaskFilter,
        before: Option<u64>,
        limit: usize,
    ) -> Fut<'a, Page<TaskView>> {
        Box::pin(async move {
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
        })
    }

    fn history(&self, id: TaskId) -> Fut<'_, Option<Vec<HistoryView>>> {
        Box::pin(async move {
            let query = sqlx::query(HISTORY).bind(id.0.cast_signed());
            let rows = query.fetch_all(&self.pool).await.map_err(|error| failed(&error))?;
            let views: Result<Vec<HistoryView>, StoreError> = rows
                .iter()
                .map(|row| {
                    let mut row = Columns::of(row);
                    Ok(HistoryView { seq: row.number()?, record: row.record()? })
                })
                .collect();
            // A task has at least the row of its enqueue.
            Ok(Some(views?).filter(|views| !views.is_empty()))
        })
    }

    fn end(&self) -> Fut<'_, End> {
        Box::pin(async move {
            let row = sqlx::query(END).fetch_one(&self.pool).await.map_err(|error| failed(&error))?;
            let mut row = Columns::of(&row);
            let seed = row.bits()?;
            let mut cut = || Ok::<Cut, StoreError>([(0, row.number()?)].into_iter().collect());
            Ok(End { seed, cut: cut()?, removed: cut()? })
        })
    }

    fn after<'a>(&'a self, cut: &'a Cut, limit: usize) -> Fut<'a, Option<Stretch>> {
        Box::pin(async move {
            let from = cut.of(0);
            let query = sqlx::query(AFTER).bind(from.cast_signed()).bind(limit as i64);
            let rows = query.fetch_all(&self.pool).await.map_err(|error| failed(&error))?;
            // After them: what was removed before they were read is known of.
            let removed = sqlx::query(REMOVED).fetch_one(&self.pool).await.map_err(|error| failed(&error))?;
            if Columns::of(&removed).number()? > from {
                return Ok(None);
            }
            let mut shared = Shared::default();
            let read: Result<Vec<_>, StoreError> =
                rows.iter().map(|row| Columns::of(row).placed(&mut shared)).collect();
            Ok(Some(Stretch::of(cut, in_order(read?, []), rows.len() == limit)))
        })
    }

    fn dead_letter(&self, id: TaskId) -> Fut<'_, Option<DeadLetter>> {
        Box::pin(async move {
            let any = DeadLetterFilter { discarded: true, ..DeadLetterFilter::default() };
            Ok(self.letters(&[id], &any, 1).await?.into_iter().next())
        })
    }

    fn dead_letters<'a>(
        &'a self,
        filter: &'a DeadLetterFilter,
        before: Option<u64>,
        limit: usize,
    ) -> Fut<'a, Page<DeadLetter>> {
        Box::pin(async move {
            let statement = if filter.agent.is_some() { NEWEST_FAILED_OF_AGENT } else { NEWEST_FAILED };
            let looked = self.newest(statement, before, filter.agent, LOOK).await?;
            let items = self.letters(&looked, filter, limit).await?;
            let before = next(&looked, LOOK, items.last().map(|letter| letter.task), items.len() == limit);
            Ok(Page { items, before })
        })
    }

    fn for_workers<'a>(&'a self, wanted: &'a [(TaskId, bool)]) -> Fut<'a, Vec<(Arc<TaskData>, Notes)>> {
        Box::pin(async move {
            let fresh = self.fresh.get(wanted.iter().map(|(id, _)| *id));
            let missing: Vec<TaskId> = wanted
                .iter()
                .zip(&fresh)
                .filter(|(_, data)| data.is_none())
                .map(|((id, _), _)| *id)
                .collect();
            let delivered: Vec<TaskId> =
                wanted.iter().filter(|(_, before)| *before).map(|(id, _)| *id).collect();
            let read = if missing.is_empty() { HashMap::new() } else { self.data(&missing).await? };
            let mut notes: HashMap<TaskId, Notes> = HashMap::new();
            if !delivered.is_empty() {
                each(&mut *self.conn().await?, NOTES, Some(ids(delivered.iter())), |row| {
                    notes.insert(row.task_id()?, row.notes()?);
                    Ok(())
                })
                .await?;
            }
            let of = |((id, before), fresh): (&(TaskId, bool), Option<Arc<TaskData>>)| {
                let data = fresh.or_else(|| read.get(id).cloned());
                let data = data.ok_or_else(|| StoreError::Corrupt(format!("task {id} has no data")))?;
                Ok((data, notes.get(id).filter(|_| *before).cloned().unwrap_or_default()))
            };
            wanted.iter().zip(fresh).map(of).collect()
        })
    }

    fn oldest_letters<'a>(
        &'a self,
        filter: &'a DeadLetterFilter,
        limit: usize,
    ) -> Fut<'a, (Vec<TaskId>, bool)> {
        Box::pin(async move {
            let query = by_filter(OLDEST_LETTERS, filter).bind(limit as i64 + 1);
            let rows = query.fetch_all(&self.pool).await.map_err(|error| failed(&error))?;
            let ids: Result<Vec<TaskId>, _> = rows.iter().map(|row| Columns::of(row).task_id()).collect();
            let mut ids = ids?;
            let more = ids.len() > limit;
            ids.truncate(limit);
            Ok((ids, more))
        })
    }

    fn count_letters<'a>(&'a self, filter: &'a DeadLetterFilter) -> Fut<'a, (u64, bool)> {
        Box::pin(async move {
            let query = by_filter(COUNT_LETTERS, filter).bind(LETTERS_LOOKED_AT as i64 + 1);
            let row = query.fetch_one(&self.pool).await.map_err(|error| failed(&error))?;
            let counted = Columns::of(&row).number()?;
            let most = LETTERS_LOOKED_AT as u64;
            Ok((counted.min(most), counted > most))
        })
    }

    fn letter_groups<'a>(&'a self, filter: &'a DeadLetterFilter, limit: usize) -> Fut<'a, LetterGroups> {
        Box::pin(async move {
            let query = by_filter(LETTER_GROUPS, filter).bind(LETTERS_LOOKED_AT as i64).bind(limit as i64);
            let rows = query.fetch_all(&self.pool).await.map_err(|error| failed(&error))?;
            let mut found = LetterGroups::default();
            let mut counted = Vec::with_capacity(rows.len());
            for row in &rows {
                let mut row = Columns::of(row);
                counted.push((row.task_id()?, row.number()?, row.time()?, row.time()?));
                (found.total, found.letters) = (row.number()?, row.number()?);
            }
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
            found.more = found.letters >= LETTERS_LOOKED_AT as u64 && self.count_letters(filter).await?.1;
            Ok(found)
        })
    }

    fn agent_events(
        &self,
        agent: Option<AgentId>,
        before: Option<u64>,
        limit: usize,
    ) -> Fut<'_, Page<(u64, AgentEvent)>> {
        Box::pin(async move {
            let before = before.and_then(|before| i64::try_from(before).ok()).unwrap_or(i64::MAX);
            let statement = if agent.is_some() { EVENTS_OF_AGENT } else { EVENTS };
            let mut query = sqlx::query(statement).bind(before).bind(limit as i64);
            if let Some(agent) = agent {
                query = query.bind(i64::from(agent.0));
            }
            let rows = query.fetch_all(&self.pool).await.map_err(|error| failed(&error))?;
            let items: Result<Vec<_>, _> = rows.iter().map(|row| Columns::of(row).event()).collect();
            let items = items?;
            let before = items.last().filter(|_| items.len() == limit).map(|(seq, _)| *seq);
            Ok(Page { items, before })
        })
    }

    fn expired(
        &self,
        after: TaskId,
        leaving: Leaving,
        look: usize,
    ) -> Fut<'_, (Vec<TaskId>, Option<TaskId>)> {
        Box::pin(async move {
            let query = sqlx::query(EXPIRED)
                .bind(after.0.cast_signed())
                .bind(look as i64)
                .bind(leaving.done.map(Timestamp::millis))
                .bind(leaving.failed.map(Timestamp::millis));
            let row = query.fetch_one(&self.pool).await.map_err(|error| failed(&error))?;
            let mut row = Columns::of(&row);
            let (looked, last) = (row.number()?, row.number()?);
            let found = text::task_ids(row.text()?)?;
            Ok((found, (looked == look as u64).then_some(TaskId(last))))
        })
    }

    fn sizes(&self) -> Fut<'_, Sizes> {
        Box::pin(async move {
            let row = sqlx::query(SIZES).fetch_one(&self.pool).await.map_err(|error| failed(&error))?;
            let mut row = Columns::of(&row);
            let (dead_letters, bytes, free_bytes) = (row.number()?, row.number()?, row.number()?);
            // Not there between a checkpoint in good order and the next write.
            let log_bytes = tokio::fs::metadata(&self.log).await.map_or(0, |found| found.len());
            let folder = self.payloads.clone();
            let files = tokio::task::spawn_blocking(move || folder.files()).await;
            let files = files.ok().and_then(Result::ok).unwrap_or_default();
            let bytes = bytes + files.iter().map(|(_, room)| room).sum::<u64>();
            Ok(Sizes { dead_letters, bytes, free_bytes, log_bytes })
        })
    }

    fn check(&self) -> Fut<'_, ()> {
        Box::pin(async move {
            let row = sqlx::query(QUICK_CHECK).fetch_one(&self.pool).await.map_err(|error| failed(&error))?;
            match row.try_get::<&str, _>(0) {
                Ok("ok") => {}
                Ok(found) => return Err(StoreError::Corrupt(found.to_owned())),
                Err(error) => return Err(failed(&error)),
            }
            let mut last = false;
            loop {
                match self.check_files().await {
                    // A file may have gone since with its last task.
                    Err(StoreError::Corrupt(_)) if !last => last = true,
                    checked => return checked,
                }
            }
        })
    }

    fn close(&self) -> Fut<'_, ()> {
        Box::pin(async move {
            self.pool.close().await;
            Ok(())
        })
    }
}
