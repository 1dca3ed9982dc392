//! History in days: partitions are made before they are needed, and dropped whole when their tasks have gone.
//!
//! Not the way rows are written (`write`) or read (the view `history`). A day's rows outlive their tasks, unseen, until
//! few of them are of tasks that are still stored; these few are moved to `task_history_kept`, and the partition goes. So
//! retention pays for what it keeps, and next to nothing for what it removes. What has no partition of its day is in
//! DEFAULT, whose rows go the same way.
//!
//! Any daemon does any step, and two never the same: a day is walked by whoever holds its row in `history_days`. Invariants:
//! a row of a stored task is found at every moment; nobody who writes is kept waiting longer than [`WAIT`] and a change of
//! the catalogue; a step is one transaction that ends within the session's limits.

use super::failed;
use super::packed::{DAY, tasks_of};
use ledger_core::Timestamp;
use ledger_core::store::StoreError;
use sqlx::postgres::{PgConnection, PgPool, PgRow};
use sqlx::{AssertSqlSafe, Connection, Row};
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Days that have a partition before they begin, beside the one that goes on.
const AHEAD: i64 = 7;
/// Rows in one step, of 16 entries mostly: some 20 ms.
const STEP: i64 = 600;
/// Rows that DEFAULT may have when partitions are made: they are moved under the lock that this needs.
const FEW: i64 = 300;
/// Of so many entries of a day one may be of a stored task, and it is dropped: to move one costs several times what it costs
/// to delete one, and less than to keep ten.
const ONE_STAYS_OF: i64 = 10;
/// Pages of a day that are looked at to see how many stay: some 10,000 entries.
const SAMPLE: i64 = 100;
/// The longest time from one such look to the next.
const SELDOM: Duration = Duration::from_secs(6 * 3_600);
/// How long a lock is waited for that writers would queue up behind; in the statement below.
#[cfg(test)]
pub(super) const WAIT: Duration = Duration::from_millis(100);

const WAIT_LITTLE: &str = "SET LOCAL lock_timeout = '100ms'";
/// In the class of the locks of slots; no slot has this number.
const TRY_LOCK: &str = "SELECT pg_try_advisory_xact_lock(1279611975, -1)";
const TODAY: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint";
/// A day's table.
macro_rules! table {
    ($day:literal) => {
        concat!(
            "to_char(to_timestamp(",
            $day,
            "::bigint * 86400) AT TIME ZONE 'UTC', '\"task_history_\"YYYYMMDD')"
        )
    };
}
/// What makes those of the days $1 to $2 that have no partition. Attached, for that lets others write meanwhile, as
/// `PARTITION OF` does not; a new table has nothing to be looked through.
const MISSING: &str = concat!(
    "SELECT format('CREATE TABLE %1$I (LIKE task_history INCLUDING ALL); \
        ALTER TABLE %1$I ALTER COLUMN slot SET STATISTICS 0, ALTER COLUMN seq SET STATISTICS 0, \
            ALTER COLUMN task SET STATISTICS 0, ALTER COLUMN at SET STATISTICS 0, ALTER COLUMN entries SET STATISTICS 0; \
        ALTER TABLE task_history ATTACH PARTITION %1$I FOR VALUES FROM (%2$s) TO (%3$s); \
        INSERT INTO history_days (day) VALUES (%4$s)', ",
    table!("d.day"),
    ", d.day * 86400000, (d.day + 1) * 86400000, d.day) \
     FROM generate_series($1::bigint, $2::bigint) AS d (day) \
     WHERE NOT EXISTS (SELECT 1 FROM history_days AS h WHERE h.day = d.day) ORDER BY d.day"
);
/// In this order, as a look-up takes them. Attaching a partition needs both: the second, on DEFAULT, to look whether it has
/// rows of that day, which is why it is empty by then. Writers need neither.
const LOCK_DEFAULT: &str = "LOCK TABLE ONLY task_history IN SHARE UPDATE EXCLUSIVE MODE; \
    LOCK TABLE task_history_default IN ACCESS EXCLUSIVE MODE";
/// The first $1 rows, and which tasks they have entries of.
const IN_DEFAULT: &str =
    "SELECT slot, seq, task, entries FROM task_history_default ORDER BY slot, seq LIMIT $1";
/// Keeps the tasks from being removed meanwhile, which would not find the entries that move; names those that are stored.
const HOLD: &str = "SELECT COALESCE(array_agg(id), '{}') FROM ( \
    SELECT id FROM tasks WHERE id = ANY($1) ORDER BY id FOR KEY SHARE) AS held";
/// Those that are stored, as of now.
const STORED: &str = "SELECT id FROM tasks WHERE id = ANY($1)";
/// The entries of stored tasks in the rows `gone`. Whether a task is stored is no join, which might read all of `tasks`.
macro_rules! keep_of_gone {
    () => {
        " RETURNING r.slot, r.seq, r.task, r.at, r.entries) INSERT INTO task_history_kept \
         SELECT h.* FROM gone AS r CROSS JOIN LATERAL unpacked(r.slot, r.seq, r.task, r.at, r.entries) AS h \
         WHERE (SELECT t.id FROM tasks AS t WHERE t.id = h.task_id) IS NOT NULL"
    };
}
/// The rows with slots $1 and numbers $2.
const MOVE_FROM_DEFAULT: &str = concat!(
    "WITH gone AS (DELETE FROM task_history_default AS r USING unnest($1::smallint[], $2::bigint[]) AS w (slot, seq) \
        WHERE r.slot = w.slot AND r.seq = w.seq",
    keep_of_gone!()
);
/// Of the day from $3 to $4. The times leave one partition.
const MOVE: &str = concat!(
    "WITH gone AS (DELETE FROM task_history AS r USING unnest($1::smallint[], $2::bigint[]) AS w (slot, seq) \
        WHERE r.slot = w.slot AND r.seq = w.seq AND r.at >= $3 AND r.at < $4",
    keep_of_gone!()
);
/// The first day before $1 whose time to be looked at was $2 or earlier, and that nobody else is at.
const TAKE: &str = "SELECT day::bigint, walked_slot, walked_seq, leaving::text FROM history_days \
    WHERE day < $1 AND look_at <= $2 ORDER BY day LIMIT 1 FOR UPDATE SKIP LOCKED";
/// Pages of day $1.
const PAGES: &str = concat!(
    "SELECT pg_relation_size(to_regclass(",
    table!("$1"),
    ")) / current_setting('block_size')::bigint"
);
/// Of so many per cent of the pages of the day from $1 to $2.
const SAMPLED: &str =
    "SELECT slot, seq, task, entries FROM task_history TABLESAMPLE SYSTEM ($3) WHERE at >= $1 AND at < $2";
/// Of the day from $1 to $2, the next $5 rows after number $4 of slot $3.
const LOOK: &str = "SELECT slot, seq, task, entries FROM task_history \
    WHERE at >= $1 AND at < $2 AND (slot, seq) > ($3::smallint, $4::bigint) ORDER BY slot, seq LIMIT $5";
const GO_ON: &str = "UPDATE history_days SET walked_slot = $2, walked_seq = $3 WHERE day = $1";
const LOOK_AGAIN: &str =
    "UPDATE history_days SET walked_slot = -1, walked_seq = 0, leaving = NULL, look_at = $2 WHERE day = $1";
const LEAVES: &str =
    "UPDATE history_days SET leaving = pg_snapshot_xmin(pg_current_snapshot()) WHERE day = $1";
/// What keeps a day's rows as they are, and drops it.
const DROP: &str = concat!(
    "SELECT format('LOCK TABLE %I IN SHARE MODE', ",
    table!("$1"),
    "), format('DROP TABLE %I', ",
    table!("$1"),
    ")"
);
/// Whether an entry of a stored task came to the day from $1 to $2 since transaction $3, by a clock that was set back. The task is
/// asked for last, and for few rows if any.
const LATE: &str = "SELECT EXISTS (SELECT 1 FROM task_history AS r \
    CROSS JOIN LATERAL unpacked(r.slot, r.seq, r.task, r.at, r.entries) AS h WHERE r.at >= $1 AND r.at < $2 \
    AND age(r.xmin) <= age($3::text::xid8::xid) AND (SELECT t.id FROM tasks AS t WHERE t.id = h.task_id) IS NOT NULL)";
/// It reads a whole day, while nobody writes to that day anyhow.
const WAIT_LONG: &str = "SET LOCAL statement_timeout = '60s'; SET LOCAL enable_seqscan = on";
const GONE: &str = "DELETE FROM history_days WHERE day = $1";

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 18] = [
    TRY_LOCK,
    TODAY,
    MISSING,
    IN_DEFAULT,
    HOLD,
    STORED,
    MOVE_FROM_DEFAULT,
    MOVE,
    TAKE,
    PAGES,
    SAMPLED,
    LOOK,
    GO_ON,
    LOOK_AGAIN,
    LEAVES,
    DROP,
    LATE,
    GONE,
];

/// The times of a day's rows: from, and before.
const fn times(day: i64) -> (i64, i64) {
    (day * DAY, (day + 1) * DAY)
}

/// The partitions of today and the days to come, by the server's clock. Not where another daemon is at it.
pub(super) async fn make_days_of_today(conn: &mut PgConnection) -> Result<(), StoreError> {
    let made = async {
        let now: i64 = sqlx::query_scalar(TODAY).fetch_one(&mut *conn).await?;
        let today = now.div_euclid(DAY);
        make_days(conn, today..=today + AHEAD).await
    };
    made.await.or_else(|error| later(&error)).map(drop)
}

/// One step; see [`ledger_core::store::Reader::tidy`].
pub(super) async fn tidy(pool: &PgPool, now: Timestamp, kept: Option<Duration>) -> Result<bool, StoreError> {
    let step = async {
        let mut conn = pool.acquire().await?;
        if empty_default(&mut conn).await? {
            return Ok(true);
        }
        let today = now.millis().div_euclid(DAY);
        make_days(&mut conn, today..=today + AHEAD).await?;
        let Some(kept) = kept else { return Ok(false) };
        walk(&mut conn, now, kept).await
    };
    step.await.or_else(|error| later(&error))
}

/// Somebody was in the way, who is not kept waiting: nothing was done, and there is a next time.
fn later(error: &sqlx::Error) -> Result<bool, StoreError> {
    let code = error.as_database_error().and_then(|said| said.code().map(|code| code.into_owned()));
    match code.as_deref() {
        // A lock that was not free in time; or each waited for the other.
        Some("55P03" | "40P01") => {
            tracing::debug!(%error, "history is tidied another time");
            Ok(false)
        }
        _ => Err(failed(error)),
    }
}

/// Rows of the history, as far as it matters here who they are of.
struct Looked(Vec<OfTasks>);

/// A row, and the tasks of its entries.
struct OfTasks {
    slot: i16,
    seq: i64,
    tasks: Vec<i64>,
}

impl Looked {
    fn at(rows: &[PgRow]) -> Result<Self, sqlx::Error> {
        let row = |row: &PgRow| {
            let tasks = tasks_of(row.try_get("task")?, row.try_get("entries")?);
            // As a value that cannot be read.
            let tasks = tasks.map_err(|error| sqlx::Error::Decode(error.to_string().into()))?;
            Ok(OfTasks { slot: row.try_get("slot")?, seq: row.try_get("seq")?, tasks })
        };
        rows.iter().map(row).collect::<Result<_, _>>().map(Self)
    }

    fn tasks(&self) -> Vec<i64> {
        let tasks: BTreeSet<i64> = self.0.iter().flat_map(|row| &row.tasks).copied().collect();
        tasks.into_iter().collect()
    }

    /// Slots and numbers of rows with an entry of one of these.
    fn with(&self, tasks: &BTreeSet<i64>) -> (Vec<i16>, Vec<i64>) {
        let has = |row: &&OfTasks| row.tasks.iter().any(|task| tasks.contains(task));
        self.0.iter().filter(has).map(|row| (row.slot, row.seq)).unzip()
    }
}

/// Moves some of what is in DEFAULT to what is kept, and deletes it where its task has gone; whether there may be more.
async fn empty_default(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let mut step = conn.begin().await?;
    let rows = sqlx::query(IN_DEFAULT).bind(STEP).fetch_all(&mut *step).await?;
    if !rows.is_empty() && sqlx::query_scalar(TRY_LOCK).fetch_one(&mut *step).await? {
        move_from_default(&mut step, &rows).await?;
    }
    step.commit().await?;
    Ok(rows.len() as i64 == STEP)
}

async fn move_from_default(conn: &mut PgConnection, rows: &[PgRow]) -> Result<(), sqlx::Error> {
    let looked = Looked::at(rows)?;
    hold(&mut *conn, &looked).await?;
    let (slots, seqs): (Vec<i16>, Vec<i64>) = looked.0.iter().map(|row| (row.slot, row.seq)).unzip();
    sqlx::query(MOVE_FROM_DEFAULT).bind(slots).bind(seqs).execute(conn).await.map(drop)
}

/// Those of their tasks that are stored, and stay so until the step ends.
async fn hold(conn: &mut PgConnection, looked: &Looked) -> Result<BTreeSet<i64>, sqlx::Error> {
    let held: Vec<i64> = sqlx::query_scalar(HOLD).bind(looked.tasks()).fetch_one(conn).await?;
    Ok(held.into_iter().collect())
}

/// Makes those partitions of these days that there are not; whether it did.
async fn make_days(conn: &mut PgConnection, days: RangeInclusive<i64>) -> Result<bool, sqlx::Error> {
    if missing(&mut *conn, &days).await?.is_empty() {
        return Ok(false);
    }
    let mut step = conn.begin().await?;
    if !sqlx::query_scalar(TRY_LOCK).fetch_one(&mut *step).await? {
        return Ok(false);
    }
    sqlx::raw_sql(WAIT_LITTLE).execute(&mut *step).await?;
    sqlx::raw_sql(LOCK_DEFAULT).execute(&mut *step).await?;
    let rows = sqlx::query(IN_DEFAULT).bind(FEW + 1).fetch_all(&mut *step).await?;
    if rows.len() as i64 > FEW {
        // Emptied first, a step at a time.
        return Ok(false);
    }
    if !rows.is_empty() {
        move_from_default(&mut step, &rows).await?;
    }
    for text in missing(&mut step, &days).await? {
        // The server's own text, of numbers and a name that is made of one.
        sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut *step).await?;
    }
    step.commit().await?;
    Ok(true)
}

async fn missing(conn: &mut PgConnection, days: &RangeInclusive<i64>) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(MISSING).bind(days.start()).bind(days.end()).fetch_all(conn).await
}

/// One step with a day whose tasks may all have gone; whether there may be a next.
async fn walk(conn: &mut PgConnection, now: Timestamp, kept: Duration) -> Result<bool, sqlx::Error> {
    let mut step = conn.begin().await?;
    let query = sqlx::query(TAKE).bind(now.before(kept).millis().div_euclid(DAY)).bind(now.millis());
    let Some(row) = query.fetch_optional(&mut *step).await? else { return Ok(false) };
    let day: i64 = row.try_get(0)?;
    let walked: (i16, i64) = (row.try_get(1)?, row.try_get(2)?);
    let leaving: Option<String> = row.try_get(3)?;
    let Some(leaving) = leaving else {
        if few_stay(&mut step, day).await? {
            sqlx::query(LEAVES).bind(day).execute(&mut *step).await?;
        } else {
            let again = now.after((kept / 2).min(SELDOM));
            sqlx::query(LOOK_AGAIN).bind(day).bind(again.millis()).execute(&mut *step).await?;
        }
        step.commit().await?;
        return Ok(true);
    };
    let (from, before) = times(day);
    let query = sqlx::query(LOOK).bind(from).bind(before).bind(walked.0).bind(walked.1).bind(STEP);
    let looked = Looked::at(&query.fetch_all(&mut *step).await?)?;
    let held = hold(&mut step, &looked).await?;
    let (slots, seqs) = looked.with(&held);
    if !slots.is_empty() {
        let query = sqlx::query(MOVE).bind(slots).bind(seqs).bind(from).bind(before);
        query.execute(&mut *step).await?;
    }
    match looked.0.last() {
        Some(last) if looked.0.len() as i64 == STEP => {
            sqlx::query(GO_ON).bind(day).bind(last.slot).bind(last.seq).execute(&mut *step).await?;
            step.commit().await?;
            Ok(true)
        }
        _ => drop_day(step, day, &leaving, now).await,
    }
}

/// Whether few of a day's entries are of stored tasks, as far as some of its pages tell.
async fn few_stay(conn: &mut PgConnection, day: i64) -> Result<bool, sqlx::Error> {
    let pages: i64 = sqlx::query_scalar(PAGES).bind(day).fetch_one(&mut *conn).await?;
    let (from, before) = times(day);
    let share = (100.0 * SAMPLE as f32 / pages.max(1) as f32).min(100.0);
    let query = sqlx::query(SAMPLED).bind(from).bind(before).bind(share);
    let looked = Looked::at(&query.fetch_all(&mut *conn).await?)?;
    let stored = sqlx::query_scalar(STORED).bind(looked.tasks()).fetch_all(conn).await?;
    let stored: BTreeSet<i64> = stored.into_iter().collect();
    let tasks = || looked.0.iter().flat_map(|row| &row.tasks);
    let stay = tasks().filter(|task| stored.contains(task)).count() as i64;
    Ok(stay * ONE_STAYS_OF <= tasks().count() as i64)
}

/// Drops a day of which nothing stays.
///
/// `DETACH … CONCURRENTLY` would let others write meanwhile, but is refused where there is a DEFAULT, and cannot be in a
/// transaction. A drop has the whole table for itself, for as long as the catalogue takes; the files go after that.
async fn drop_day(
    mut step: sqlx::Transaction<'_, sqlx::Postgres>,
    day: i64,
    leaving: &str,
    now: Timestamp,
) -> Result<bool, sqlx::Error> {
    // Two that have read the table and want it for themselves would wait for each other.
    if !sqlx::query_scalar(TRY_LOCK).fetch_one(&mut *step).await? {
        return Ok(false);
    }
    let (from, before) = times(day);
    let row = sqlx::query(DROP).bind(day).fetch_one(&mut *step).await?;
    let (lock, drop): (String, String) = (row.try_get(0)?, row.try_get(1)?);
    sqlx::raw_sql(WAIT_LITTLE).execute(&mut *step).await?;
    sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut *step).await?;
    sqlx::raw_sql(WAIT_LONG).execute(&mut *step).await?;
    let query = sqlx::query_scalar(LATE).bind(from).bind(before).bind(leaving);
    if query.fetch_one(&mut *step).await? {
        sqlx::query(LOOK_AGAIN).bind(day).bind(now.millis()).execute(&mut *step).await?;
        step.commit().await?;
        return Ok(true);
    }
    sqlx::query(GONE).bind(day).execute(&mut *step).await?;
    // Last, for everybody waits from here to the commit.
    sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut *step).await?;
    step.commit().await?;
    tracing::info!(day, "a day of history was dropped");
    Ok(true)
}
