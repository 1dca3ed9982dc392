//! What the writer reads: everything at the start, what the commands of a batch name, and what it can claim.
//!
//! Invariants: over what the database has, the open batch's own changes are laid; an offer looks at as many rows as it returns,
//! for each type and priority.

use super::packed::{EntryPlace, Found};
use super::staged::AGENT_BLOCK;
use super::{BLOCK, PATIENCE, PAUSE, PgStore, Staged, failed};
use crate::store::ready::Ready;
use crate::store::rows::{Cells, Shared, record_columns};
use ledger_core::store::{
    Ask, BudgetRow, Counts, KeyHolder, Known, News, Recovered, RequestRow, StoreError, Totals, Want,
};
use ledger_core::{AgentId, Now, Record, Task, TaskId, Timestamp};
use sqlx::postgres::{PgArguments, PgConnection, PgRow};
use sqlx::query::Query;
use sqlx::{Postgres, Row, ValueRef};
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

const META: &str = "SELECT m.seed, s.last_seq, s.last_session, \
    (extract(epoch FROM clock_timestamp()) * 1000)::bigint, \
    (SELECT COALESCE(json_agg(slot), '[]')::text FROM slots WHERE owner IS NOT NULL AND slot <> $1) \
    FROM meta AS m CROSS JOIN slots AS s WHERE s.slot = $1";
const BUDGETS: &str = "SELECT agent, millitokens, updated_at FROM budgets WHERE slot = $1 ORDER BY agent";
const SESSIONS: &str = "SELECT worker, incarnation, session, connected_at, beat_at, open FROM sessions";
/// One statement: what is told of one moment belongs together.
const TOTALS: &str = "SELECT s.transitions, c.n, c.agent, c.state \
    FROM (SELECT sum(last_seq)::bigint AS transitions FROM slots) AS s LEFT JOIN ( \
        SELECT agent, state, sum(n)::bigint AS n FROM counts GROUP BY agent, state) AS c ON true";
/// The columns that [`Found::read`] reads.
macro_rules! found_columns {
    () => {
        concat!($crate::store::rows::task_columns!(), ", t.history_slot, t.history_seq, t.history_at")
    };
}
pub(super) use found_columns;
/// Rows of the tasks `found`. Each is looked up by itself: a plain join may be planned to read all there are, where tables were
/// empty when the server last looked at them.
macro_rules! of_found {
    () => {
        "CROSS JOIN LATERAL (SELECT * FROM tasks AS of_task WHERE of_task.id = found.task_id OFFSET 0) AS t \
         CROSS JOIN LATERAL (SELECT * FROM task_specs AS of_task WHERE of_task.id = found.task_id OFFSET 0) AS s"
    };
}
pub(super) const TASKS: &str =
    concat!("SELECT ", found_columns!(), " FROM unnest($1::bigint[]) AS found (task_id) ", of_found!());
/// Who holds keys $2 of agents $1; the answers to requests $3, which have no agent here; and of which agents $4 something waits.
const NAMED: &str = "SELECT k.agent, k.key, k.task_id, k.digest, NULL::bytea, NULL::bigint \
    FROM unnest($1::bigint[], $2::text[]) AS asked (agent, key) CROSS JOIN LATERAL ( \
        SELECT own.agent, own.key, own.id AS task_id, own.digest FROM task_specs AS own \
        WHERE own.agent = asked.agent AND own.key = asked.key COLLATE \"C\" AND own.key_freed IS NULL OFFSET 0) AS k \
    UNION ALL SELECT NULL, id, NULL, digest, answer, at FROM requests WHERE id = ANY($3) \
    UNION ALL SELECT asked.agent, NULL, NULL, NULL, NULL, NULL FROM unnest($4::bigint[]) AS asked (agent) CROSS JOIN LATERAL ( \
        SELECT r.task_id FROM ready AS r WHERE r.agent = asked.agent LIMIT 1) AS waits";
/// Leases of stored tasks $1 with fences $2.
const SETTLED: &str = concat!(
    "SELECT asked.n, ",
    record_columns!(),
    " FROM unnest($1::bigint[], $2::bigint[]) WITH ORDINALITY AS asked (task_id, fence, n) \
     CROSS JOIN LATERAL history_of(asked.task_id) AS h WHERE h.fence = asked.fence AND h.digest IS NOT NULL"
);
const NUMBERS: &str = "SELECT nextval('task_blocks')";
/// The types that wait of an agent, one index look each.
macro_rules! waiting_types {
    () => {
        "WITH RECURSIVE types (name) AS ( \
            (SELECT task_type FROM ready WHERE agent = $1 ORDER BY task_type LIMIT 1) \
            UNION ALL \
            SELECT (SELECT r.task_type FROM ready AS r WHERE r.agent = $1 AND r.task_type > types.name \
                ORDER BY r.task_type LIMIT 1) \
            FROM types WHERE types.name IS NOT NULL) "
    };
}
/// Of agent $1, of types $2 (NULL: all) but $3, due at $4 on the steady and $5 on the wall clock, gated ones if $6, none
/// of the tasks $8: at most $7. Each type and priority is asked for itself, so that what is not due, or of another type,
/// is not in the way. Nobody else gets them before the batch has ended.
pub(super) const OFFER: &str = concat!(
    waiting_types!(),
    "SELECT ",
    found_columns!(),
    " FROM ( \
        SELECT found.task_id FROM types \
        CROSS JOIN (VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9)) AS of (urgency) \
        CROSS JOIN (VALUES (0), (1)) AS may (gated) \
        CROSS JOIN LATERAL ( \
            SELECT r.task_id, r.urgency, r.run_at FROM ready AS r \
            WHERE r.agent = $1 AND r.task_type = types.name AND r.gated = may.gated AND r.urgency = of.urgency \
                AND (r.gated = 1 OR r.run_at <= GREATEST($4::bigint, $5::bigint)) \
                AND (r.gated = 1 OR r.run_at <= CASE WHEN r.calendar = 1 THEN $5::bigint ELSE $4::bigint END) \
                AND r.task_id NOT IN (SELECT unnest($8::bigint[])) \
            ORDER BY r.run_at, r.task_id LIMIT $7 FOR UPDATE SKIP LOCKED \
        ) AS found \
        WHERE types.name IS NOT NULL AND ($2::text[] IS NULL OR types.name = ANY($2)) AND types.name <> ALL($3) \
            AND (may.gated = 0 OR $6) \
        ORDER BY found.urgency, found.run_at, found.task_id LIMIT $7 \
     ) AS found ",
    of_found!()
);
pub(super) const GATED: &str = concat!(
    "SELECT ",
    found_columns!(),
    " FROM (SELECT task_id FROM ready WHERE agent = $1 AND gated = 1 AND task_id NOT IN (SELECT unnest($2::bigint[])) OFFSET 0) AS found ",
    of_found!()
);
/// Since when the longest waiting tasks are due, by agent: steady before $1, wall before $2. Of each clock so many at most.
const OLDEST: &str = "SELECT agent, calendar::bigint, min(run_at) FROM ( \
    (SELECT agent, calendar, run_at FROM ready WHERE gated = 0 AND calendar = 0 AND run_at <= $1 \
        ORDER BY run_at LIMIT 10000) \
    UNION ALL (SELECT agent, calendar, run_at FROM ready WHERE gated = 0 AND calendar = 1 AND run_at <= $2 \
        ORDER BY run_at LIMIT 10000)) AS due GROUP BY agent, calendar";
/// As [`OFFER`], those before urgency $4, time $5 and number $6.
const AHEAD: &str = concat!(
    waiting_types!(),
    "SELECT COUNT(*) FROM ( \
        SELECT 1 FROM ( \
            SELECT name FROM types WHERE name IS NOT NULL AND ($2::text[] IS NULL OR name = ANY($2)) LIMIT $3 \
        ) AS types \
        CROSS JOIN LATERAL ( \
            SELECT 1 FROM ready AS r \
            WHERE r.agent = $1 AND r.task_type = types.name \
                AND (r.urgency, r.run_at, r.task_id) < ($4, $5, $6) \
                AND (r.gated = 1 OR r.run_at <= CASE WHEN r.calendar = 1 THEN $8::bigint ELSE $7::bigint END) \
                AND r.task_id NOT IN (SELECT unnest($9::bigint[])) \
            LIMIT $3) AS found \
        LIMIT $3) AS ahead"
);
/// The first that becomes due after now: $1 on the steady and $2 on the wall clock.
pub(super) const NEXT_DUE: &str = "SELECT MIN(run_at) FILTER (WHERE calendar = 0), MIN(run_at) FILTER (WHERE calendar = 1) FROM ( \
    (SELECT run_at, calendar FROM ready WHERE run_at > $1 AND calendar = 0 AND gated = 0 ORDER BY run_at LIMIT 1) \
    UNION ALL \
    (SELECT run_at, calendar FROM ready WHERE run_at > $2 AND calendar = 1 AND gated = 0 ORDER BY run_at LIMIT 1)) AS next";

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 13] =
    [META, BUDGETS, SESSIONS, TOTALS, TASKS, NAMED, SETTLED, NUMBERS, OFFER, OLDEST, GATED, AHEAD, NEXT_DUE];

/// A row of this database.
pub(super) type Columns<'r> = crate::store::rows::Columns<'r, PgRow>;

/// Integers are as wide as their column; all are told as the widest.
impl Cells for PgRow {
    fn int(&self, at: usize) -> sqlx::Result<Option<i64>> {
        let value = self.try_get_raw(at)?;
        if value.is_null() {
            return Ok(None);
        }
        let bytes = value.as_bytes().map_err(sqlx::Error::Decode)?;
        let number = match *bytes {
            // A truth value.
            [flag] => flag.into(),
            [a, b] => i16::from_be_bytes([a, b]).into(),
            [a, b, c, d] => i32::from_be_bytes([a, b, c, d]).into(),
            [a, b, c, d, e, f, g, h] => i64::from_be_bytes([a, b, c, d, e, f, g, h]),
            _ => return Err(sqlx::Error::Decode("no integer".into())),
        };
        Ok(Some(number))
    }

    fn real(&self, at: usize) -> sqlx::Result<Option<f64>> {
        self.try_get_unchecked(at)
    }

    fn text(&self, at: usize) -> sqlx::Result<Option<&str>> {
        self.try_get_unchecked(at)
    }

    fn bytes(&self, at: usize) -> sqlx::Result<Option<&[u8]>> {
        self.try_get_unchecked(at)
    }
}

/// A query with its parameters.
pub(super) type Asked<'q> = Query<'q, Postgres, PgArguments>;

/// The number in the only row.
pub(super) async fn one(conn: &mut PgConnection, query: Asked<'_>) -> Result<i64, StoreError> {
    let row = query.fetch_one(conn).await.map_err(|error| failed(&error))?;
    Columns::of(&row).int()
}

/// Runs a query and collects what its rows hold.
pub(super) async fn all<T>(
    conn: &mut PgConnection,
    query: Asked<'_>,
    read: impl FnMut(&mut Columns<'_>) -> Result<T, StoreError>,
) -> Result<Vec<T>, StoreError> {
    let rows = query.fetch_all(conn).await.map_err(|error| failed(&error))?;
    read_all(&rows, read)
}

pub(super) fn read_all<T>(
    rows: &[PgRow],
    mut read: impl FnMut(&mut Columns<'_>) -> Result<T, StoreError>,
) -> Result<Vec<T>, StoreError> {
    rows.iter().map(|row| read(&mut Columns::of(row))).collect()
}

pub(super) fn numbers<'a>(ids: impl IntoIterator<Item = &'a TaskId>) -> Vec<i64> {
    ids.into_iter().map(|id| id.0.cast_signed()).collect()
}

fn names(names: &[Arc<str>]) -> Vec<&str> {
    names.iter().map(|name| &**name).collect()
}

impl PgStore {
    pub(super) async fn read_everything(&mut self, now: Now) -> Result<Recovered, StoreError> {
        self.forget_batch(now).await;
        // A server that was restarted is waited for; nobody can be served without it.
        let end = tokio::time::Instant::now() + PATIENCE;
        loop {
            let found = match self.read_tables(now).await {
                Ok(found) => {
                    self.broken = false;
                    return Ok(found);
                }
                Err(error) => error,
            };
            if !matches!(found, StoreError::Unavailable(_)) || tokio::time::Instant::now() >= end {
                return Err(found);
            }
            self.lose_connection();
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn forget_batch(&mut self, now: Now) {
        // Whoever recovers has heard of all that was on its way.
        for flying in std::mem::take(&mut self.flying) {
            let _ = flying.task.await;
        }
        self.kept.clear();
        self.roll_back().await;
        self.staged = Staged::default();
        self.read.clear();
        self.held.clear();
        self.nothing_waits.clear();
        self.met.last.clear();
        self.counted.clear();
        self.ready = Ready::new(now);
    }

    /// After a conflict: see [`ledger_core::store::Store::anew`].
    pub(super) async fn read_anew(
        &mut self,
        tasks: &[TaskId],
        now: Now,
    ) -> Result<Option<(News, Vec<Task>)>, StoreError> {
        self.forget_batch(now).await;
        self.broken = false;
        self.alone = true;
        // Mail was put back, and is to be read again.
        self.wake.news();
        match self.read_changes_anew(tasks, now).await {
            Ok(found) => Ok(Some(found)),
            Err(StoreError::Unavailable(error)) => {
                tracing::debug!(%error, "a conflict, and the connection is lost as well");
                self.broken = true;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn read_changes_anew(
        &mut self,
        tasks: &[TaskId],
        now: Now,
    ) -> Result<(News, Vec<Task>), StoreError> {
        self.connect_once().await?;
        let mut news = News { replicas: self.place.replicas(None), ..News::default() };
        self.read_changed(&mut news, None).await?;
        self.read_shared(&mut news, &[]).await?;
        news.budgets = Some(self.read_budgets().await?);
        let query = sqlx::query(TASKS).bind(numbers(tasks));
        let mut shared = Shared::default();
        let tasks = all(self.connection()?, query, |row| row.task(&mut shared)).await?;
        let (slot, meta) = (i64::from(self.place.slot), sqlx::query(META));
        let seqs = all(self.connection()?, meta.bind(slot), |row| {
            let _ = row.bits()?;
            row.number()
        });
        if let Some(last_seq) = seqs.await?.first() {
            self.meta.last_seq = *last_seq;
        }
        self.due = self.find_due(now).await?;
        Ok((news, tasks))
    }

    async fn read_budgets(&mut self) -> Result<Vec<BudgetRow>, StoreError> {
        let query = sqlx::query(BUDGETS).bind(i64::from(self.place.slot));
        all(self.connection()?, query, |row| row.budget()).await
    }

    pub(super) async fn read_totals(&mut self) -> Result<Totals, StoreError> {
        let rows = all(self.connection()?, sqlx::query(TOTALS), |row| {
            let (transitions, n) = (row.number()?, row.maybe()?);
            let counted = n.map(|n| Ok((row.agent()?, row.state()?, n))).transpose()?;
            Ok((transitions, counted))
        });
        let mut totals = Totals::default();
        for (transitions, counted) in rows.await? {
            totals.transitions = transitions;
            if let Some((agent, state, n)) = counted {
                let counts: &mut Counts = totals.counts.entry(agent).or_default();
                counts[usize::from(state.code())] = u64::try_from(n).unwrap_or_default();
            }
        }
        Ok(totals)
    }

    async fn read_tables(&mut self, now: Now) -> Result<Recovered, StoreError> {
        self.connect_once().await?;
        let begins = self.place.owner.is_none();
        self.join().await?;
        // The sequence may have fallen back behind the block that we took last, where the server stopped or another took over from it.
        self.numbers = (0, 0);
        let first = self.place.looked.is_none();
        let (slot, conn) = (i64::from(self.place.slot), self.connection()?);
        let mut found = Recovered::default();
        let meta = all(conn, sqlx::query(META).bind(slot), |row| {
            let numbers = (row.bits()?, row.number()?, row.number()?);
            Ok((numbers, row.time()?, row.text()?.to_owned()))
        });
        let meta = meta.await?;
        let asked = tokio::time::Instant::now();
        let Some(((seed, last_seq, last_session), time, others)) = meta.into_iter().next() else {
            return Err(StoreError::Corrupt(format!("slot {slot} has no row")));
        };
        (found.seed, found.last_session) = (seed, last_session);
        self.place.others = crate::store::text::read(&others)?;
        found.begins = begins;
        let mut news = News::default();
        self.read_changed(&mut news, None).await?;
        (found.agents, found.breakers) = (news.agents, news.breakers);
        found.budgets = self.read_budgets().await?;
        found.sessions = all(self.connection()?, sqlx::query(SESSIONS), |row| row.session()).await?;
        let totals = self.read_totals().await?;
        (found.counts, found.transitions) = (totals.counts, totals.transitions);
        self.watches_own = first && !self.place.inherits && !self.place.others.is_empty();
        self.meta.last_seq = last_seq;
        self.meta.last_session = last_session.max(ledger_core::SessionId::before_first(self.place.slot).0);
        found.last_session = self.meta.last_session;
        self.met.committed = ledger_core::SessionId(self.meta.last_session);
        self.due = self.find_due(now).await?;
        // As late as it is by now.
        found.replicas = self.place.replicas(Some(time.after(asked.elapsed())));
        Ok(found)
    }

    /// A run of `n` new numbers, as long as a block at most.
    pub(super) async fn take_numbers(&mut self, n: u64) -> Result<u64, StoreError> {
        if n > BLOCK {
            return Err(StoreError::Statement(format!("{n} numbers in one run")));
        }
        let conn = self.connection()?;
        let block =
            sqlx::query_scalar::<_, i64>(NUMBERS).fetch_one(conn).await.map_err(|error| failed(&error))?;
        let block = block.cast_unsigned() * BLOCK..(block.cast_unsigned() + 1) * BLOCK;
        // Who has the next block may write at the same time: where both had numbers of one entry in `agent_blocks`, one would wait
        // for the other. Only a run that needs all of a block has what it shares with its neighbours.
        let own = block.start.next_multiple_of(AGENT_BLOCK)..block.end - block.end % AGENT_BLOCK;
        let Range { start, end } = if n > own.end - own.start { block } else { own };
        // 0 is no number.
        let first = start.max(1);
        if first + n > end {
            // The very first block is shorter by one.
            return Box::pin(self.take_numbers(n)).await;
        }
        self.numbers = (first + n, end);
        Ok(first)
    }

    pub(super) async fn read_wanted(&mut self, want: &Want) -> Result<Known, StoreError> {
        let mut known = Known::default();
        if self.wake.take_work() {
            // Another daemon may have left what becomes due before what we know of.
            let now = self.ready.now();
            self.due = self.find_due(now).await?;
        }
        if !want.workers.is_empty() {
            self.begin_once().await?;
            self.met.last.extend(want.workers.iter().map(|name| (Arc::clone(name), None)));
            let mut rows = self.read_sessions(&want.workers).await?;
            for staged in self.on_the_way() {
                rows.extend(want.workers.iter().filter_map(|name| staged.sessions.get(name)).cloned());
            }
            for row in rows {
                self.met.last.insert(Arc::clone(&row.worker), Some(row.session));
                known.sessions.insert(Arc::clone(&row.worker), row);
            }
        }
        let mut missing = Vec::new();
        for id in &want.tasks {
            if self.staged.removed.iter().any(|(removed, _)| removed == id) {
                continue;
            }
            let staged = self.staged.tasks.get(id).map(|image| &image.task);
            if let Some(task) = staged.or_else(|| self.read.get(id).map(|found| &found.task)) {
                known.tasks.insert(*id, Arc::clone(task));
                continue;
            }
            let found = match self.underway(*id) {
                // It was removed.
                Some(None) => continue,
                // As its row will be when this batch is written.
                Some(found) => found,
                None => self.kept.get(id).cloned(),
            };
            match found {
                Some(found) => {
                    known.tasks.insert(*id, Arc::clone(&found.task));
                    self.read.insert(*id, found);
                }
                None => missing.push(*id),
            }
        }
        if !missing.is_empty() {
            self.begin_once().await?;
            let query = sqlx::query(TASKS).bind(numbers(&missing));
            let mut shared = Shared::default();
            for found in all(self.connection()?, query, |row| Found::read(row, &mut shared)).await? {
                known.tasks.insert(found.task.id, Arc::clone(&found.task));
                self.read.insert(found.task.id, found);
            }
        }
        self.read_named(want, &mut known).await?;
        Ok(known)
    }

    /// What stands under keys and requests.
    async fn read_named(&mut self, want: &Want, known: &mut Known) -> Result<(), StoreError> {
        if want.keys.is_empty() && want.requests.is_empty() {
            return Ok(());
        }
        self.begin_once().await?;
        let agents: Vec<i64> = want.keys.iter().map(|(agent, _)| i64::from(agent.0)).collect();
        let keys: Vec<&str> = want.keys.iter().map(|(_, key)| &**key).collect();
        let bring: BTreeSet<AgentId> = want.keys.iter().map(|(agent, _)| *agent).collect();
        let told = bring.iter().map(|agent| i64::from(agent.0)).collect::<Vec<_>>();
        let query = sqlx::query(NAMED).bind(agents).bind(keys).bind(names(&want.requests)).bind(told);
        let rows = query.fetch_all(self.connection()?).await.map_err(|error| failed(&error))?;
        self.nothing_waits.extend(bring);
        for row in &rows {
            let mut row = Columns::of(row);
            let agent = row.maybe()?.map(u32::try_from).transpose();
            let agent = agent.map_err(|_| StoreError::Corrupt("a key of no agent".to_owned()))?.map(AgentId);
            match (agent, row.maybe_text()?) {
                (Some(agent), Some(key)) => {
                    let holder = KeyHolder { task: TaskId(row.int()?.cast_unsigned()), digest: row.bits()? };
                    known.keys.insert((agent, key.into()), holder);
                }
                (Some(waits), None) => {
                    self.nothing_waits.remove(&waits);
                }
                (None, id) => {
                    let (id, _) = (id.unwrap_or_default().into(), row.maybe()?);
                    let answered =
                        RequestRow { id, digest: row.bits()?, answer: row.bytes()?, at: row.time()? };
                    known.requests.insert(Arc::clone(&answered.id), answered);
                }
            }
        }
        let mut held: Vec<_> = known.keys.keys().cloned().collect();
        for staged in self.on_the_way().chain([&self.staged]) {
            let answered = want.requests.iter().filter_map(|id| staged.requests.get(id));
            known.requests.extend(answered.map(|row| (Arc::clone(&row.id), row.clone())));
            if !staged.freed.is_empty() {
                known.keys.retain(|_, holder| !staged.freed.contains(&holder.task));
            }
            if staged.keys.is_empty() {
                continue;
            }
            let taken = want.keys.iter().filter_map(|key| Some((key, *staged.keys.get(key)?)));
            let taken = taken.filter(|(_, holder)| !staged.freed.contains(&holder.task));
            for (key, holder) in taken {
                known.keys.insert(key.clone(), holder);
                held.push(key.clone());
            }
        }
        self.held.extend(held);
        Ok(())
    }

    pub(super) async fn read_settled(
        &mut self,
        leases: &[(TaskId, u64)],
    ) -> Result<Vec<Option<Record>>, StoreError> {
        let mut found: Vec<Option<Record>> = vec![None; leases.len()];
        let mut missing: HashMap<(TaskId, u64), usize> =
            leases.iter().enumerate().map(|(at, lease)| (*lease, at)).collect();
        let flying = self.on_the_way().flat_map(|staged| &staged.history);
        let records = flying.chain(&self.staged.history).map(|entry| &entry.record);
        for record in records.filter(|record| record.digest.is_some()) {
            if let Some(at) = missing.remove(&(record.task, record.fence)) {
                found[at] = Some(record.clone());
            }
        }
        if missing.is_empty() {
            return Ok(found);
        }
        self.begin_once().await?;
        let places: Vec<usize> = missing.into_values().collect();
        let query = sqlx::query(SETTLED)
            .bind(numbers(places.iter().map(|at| &leases[*at].0)))
            .bind(places.iter().map(|at| leases[*at].1.cast_signed()).collect::<Vec<_>>());
        let rows = all(self.connection()?, query, |row| Ok((row.number()?, row.record()?))).await?;
        for (n, record) in rows {
            if let Some(at) = usize::try_from(n).ok().and_then(|n| places.get(n - 1)) {
                found[*at] = Some(record);
            }
        }
        Ok(found)
    }

    /// Tasks that the batch has changed, or the one before it: what the database says of them does not hold.
    fn changed(&self) -> Vec<i64> {
        let flying = self.on_the_way().flat_map(|staged| staged.tasks.values());
        let flying = flying.filter(|image| image.may_have_waited || image.waits());
        let waited = self.staged.tasks.values().filter(|image| image.may_have_waited);
        waited.chain(flying).map(|image| image.task.id.0.cast_signed()).collect()
    }

    pub(super) async fn find_offers(
        &mut self,
        asks: &[Ask],
        now: Now,
    ) -> Result<Vec<Vec<Arc<Task>>>, StoreError> {
        let mut offers = Vec::with_capacity(asks.len());
        for ask in asks {
            let stored = if self.nothing_waits.contains(&ask.agent) {
                Vec::new()
            } else {
                self.find_stored(ask, now).await?
            };
            let mut found = self.remember(stored);
            found.extend(self.ready.offer(ask, now));
            found.sort_unstable_by_key(|task| (9_u8.saturating_sub(task.priority), task.run_at, task.id));
            found.truncate(ask.limit);
            offers.push(found);
        }
        if self.due.is_some_and(|due| due <= now.at) {
            self.due = self.find_due(now).await?;
        }
        Ok(offers)
    }

    /// What the database has for an ask; nobody else gets it before the batch has ended.
    async fn find_stored(&mut self, ask: &Ask, now: Now) -> Result<Vec<Found>, StoreError> {
        self.begin_once().await?;
        let query = sqlx::query(OFFER)
            .bind(i64::from(ask.agent.0))
            .bind(ask.types.as_deref().map(names))
            .bind(names(&ask.except))
            .bind(now.at.millis())
            .bind(now.wall().millis())
            .bind(ask.gated)
            .bind(i64::try_from(ask.limit).unwrap_or(i64::MAX))
            .bind(self.changed());
        let mut shared = Shared::default();
        all(self.connection()?, query, |row| Found::read(row, &mut shared)).await
    }

    /// Tasks that the batch has read.
    pub(super) fn remember(&mut self, stored: Vec<Found>) -> Vec<Arc<Task>> {
        let tasks = stored.iter().map(|found| Arc::clone(&found.task)).collect();
        self.read.extend(stored.into_iter().map(|found| (found.task.id, found)));
        tasks
    }

    /// When the next task in the database becomes due.
    pub(super) async fn find_due(&mut self, now: Now) -> Result<Option<Timestamp>, StoreError> {
        let query = sqlx::query(NEXT_DUE).bind(now.at.millis()).bind(now.wall().millis());
        let found = all(self.connection()?, query, |row| Ok((row.maybe_time()?, row.maybe_time()?))).await?;
        let times = |(steady, wall): (Option<Timestamp>, Option<Timestamp>)| {
            steady.into_iter().chain(wall.map(|wall| now.from_wall(wall))).min()
        };
        Ok(found.into_iter().find_map(times))
    }

    pub(super) async fn find_gated(&mut self, agent: AgentId) -> Result<Vec<Arc<Task>>, StoreError> {
        self.begin_once().await?;
        let query = sqlx::query(GATED).bind(i64::from(agent.0)).bind(self.changed());
        let mut shared = Shared::default();
        let stored = all(self.connection()?, query, |row| Found::read(row, &mut shared)).await?;
        let mut found = self.remember(stored);
        found.extend(self.ready.gated(agent));
        found.sort_unstable_by_key(|task| (9_u8.saturating_sub(task.priority), task.run_at, task.id));
        Ok(found)
    }

    /// As the database has it: what is on its way is younger.
    pub(super) async fn find_oldest(&mut self, now: Now) -> Result<Vec<(AgentId, Timestamp)>, StoreError> {
        self.begin_once().await?;
        let query = sqlx::query(OLDEST).bind(now.at.millis()).bind(now.wall().millis());
        let rows = all(self.connection()?, query, |row| {
            let (agent, calendar, at) = (row.agent()?, row.int()? != 0, row.time()?);
            Ok((agent, if calendar { now.from_wall(at) } else { at }))
        });
        let mut oldest = std::collections::BTreeMap::new();
        for (agent, since) in rows.await? {
            let found = oldest.entry(agent).or_insert(since);
            *found = since.min(*found);
        }
        Ok(oldest.into_iter().collect())
    }

    pub(super) async fn count_ahead(
        &mut self,
        task: &Task,
        types: Option<&[Arc<str>]>,
        most: usize,
        now: Now,
    ) -> Result<usize, StoreError> {
        self.begin_once().await?;
        let query = sqlx::query(AHEAD)
            .bind(i64::from(task.spec.agent.0))
            .bind(types.map(names))
            .bind(i64::try_from(most).unwrap_or(i64::MAX))
            .bind(i64::from(9_u8.saturating_sub(task.priority)))
            .bind(task.run_at.millis())
            .bind(task.id.0.cast_signed())
            .bind(now.at.millis())
            .bind(now.wall().millis())
            .bind(self.changed());
        let found = all(self.connection()?, query, |row| row.number()).await?;
        let staged = self.ready.ahead(task, types, most, now);
        let found = found.first().and_then(|found| usize::try_from(*found).ok()).unwrap_or_default();
        Ok((found + staged).min(most))
    }
}

impl Found {
    /// A row with `found_columns`.
    pub(super) fn read(row: &mut Columns<'_>, shared: &mut Shared) -> Result<Self, StoreError> {
        let task = Arc::new(row.task(shared)?);
        Ok(Self { task, newest: EntryPlace::read(row)? })
    }
}
