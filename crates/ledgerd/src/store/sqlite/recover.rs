//! What the writer reads: everything at the start, and what the commands of a batch name.
//!
//! Invariant: a start looks into the blocks that have live tasks, never at finished ones elsewhere.

use super::packed::{record_columns, row_of, task_columns};
use super::staged::Staged;
use super::write::ids;
use super::{SqliteStore, failed};
use crate::store::ready::Ready;
use crate::store::rows::{Cells, Shared};
use futures_util::TryStreamExt;
use ledger_core::store::{Counts, KeyHolder, Known, Recovered, StoreError, Want};
use ledger_core::{AgentId, ByKey, Now, Reason, Record, State, Task, TaskId};
use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

const META: &str = "SELECT seed, last_task, last_seq, last_session FROM meta WHERE id = 1";
const AGENTS: &str = "SELECT id, name, settings, created_at, pause FROM agents ORDER BY id";
const BREAKERS: &str = "SELECT agent, task_type, version, state, epoch, run, successes, reopens, \
    since_ns, until_ns, cause, ramp_until_ns, probes, window, digest, actor, order_reason, stats, last_probe \
    FROM breakers ORDER BY agent, task_type";
const BUDGETS: &str = "SELECT agent, millitokens, updated_at FROM budgets ORDER BY agent";
const SESSIONS: &str = "SELECT worker, incarnation, session, connected_at, beat_at, open FROM sessions";
const COUNTS: &str = "SELECT agent, state, n FROM counts";
const BLOCKS: &str = "SELECT block, live FROM live_blocks WHERE live > 0";
/// The newest instant that the ledger measured: of its last transitions, or of what it says without one.
const NEWEST: &str = "SELECT max( \
    coalesce((SELECT max(h.at + (e.value ->> 7)) \
        FROM task_history AS h, json_each(h.entries) AS e WHERE h.seq = (SELECT max(seq) FROM task_history)), 0), \
    coalesce((SELECT max(beat_at) FROM sessions), 0), \
    coalesce((SELECT max(updated_at) FROM budgets), 0))";
/// CROSS JOIN fixes the order: blocks, then their tasks, then the data of those that live.
pub(super) const LIVE: &str = concat!(
    "SELECT ",
    task_columns!(),
    ", t.history FROM live_blocks AS b \
     CROSS JOIN tasks AS t ON t.id BETWEEN b.block << 12 AND (b.block << 12) + 4095 \
     CROSS JOIN task_specs AS s ON s.id = t.id \
     WHERE b.live > 0 AND t.state <= 4"
);
const TASKS: &str = concat!(
    "SELECT ",
    task_columns!(),
    ", t.history FROM json_each(?) AS wanted \
     CROSS JOIN tasks AS t ON t.id = wanted.value \
     CROSS JOIN task_specs AS s ON s.id = t.id"
);
/// Follows each task's chain of entries back, no further than the fence that is looked for.
const SETTLED: &str = concat!(
    "WITH RECURSIVE chain (n, fence, seq, task, at, value) AS ( \
        SELECT wanted.key, wanted.value ->> 1, t.history, r.task, r.at, r.entries -> (t.history - r.seq) \
        FROM json_each(?) AS wanted \
        CROSS JOIN tasks AS t ON t.id = wanted.value ->> 0 ",
    row_of!("t.history"),
    " UNION ALL \
        SELECT e.n, e.fence, e.seq - (e.value ->> 2), r.task, r.at, r.entries -> (e.seq - (e.value ->> 2) - r.seq) \
        FROM chain AS e ",
    row_of!("e.seq - (e.value ->> 2)"),
    " WHERE e.value ->> 2 > 0 AND e.value ->> 8 >= e.fence \
        AND NOT (e.value ->> 8 = e.fence AND e.value ->> 12 IS NOT NULL) \
     ) \
     SELECT e.n, ",
    record_columns!(),
    " FROM chain AS e WHERE e.value ->> 8 = e.fence AND e.value ->> 12 IS NOT NULL"
);

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 11] =
    [META, AGENTS, BREAKERS, BUDGETS, SESSIONS, COUNTS, BLOCKS, NEWEST, LIVE, TASKS, SETTLED];

impl SqliteStore {
    pub(super) async fn read_everything(&mut self, now: Now) -> Result<Recovered, StoreError> {
        // Of a batch that failed half-way.
        self.pipeline.anew().await;
        self.staged = Staged::default();
        self.underway.clear();
        self.visited.clear();
        self.counted.clear();
        self.ready = Ready::new(now);
        self.tallies.counts.clear();
        self.tallies.blocks.clear();
        let mut found = Recovered::default();
        let conn = &mut self.conn;
        each(conn, META, None, |row| {
            found.seed = row.bits()?;
            self.tallies.meta.last_task = row.number()?;
            self.tallies.meta.last_seq = row.number()?;
            self.tallies.meta.last_session = row.number()?;
            Ok(())
        })
        .await?;
        found.transitions = self.tallies.meta.last_seq;
        found.last_session = self.tallies.meta.last_session;
        found.agents = all(conn, AGENTS, |row| row.agent_row()).await?;
        found.breakers = all(conn, BREAKERS, |row| row.breaker()).await?;
        found.budgets = all(conn, BUDGETS, |row| row.budget()).await?;
        found.sessions = all(conn, SESSIONS, |row| row.session()).await?;
        each(conn, COUNTS, None, |row| {
            let (agent, state, n) = (row.agent()?, row.state()?, row.number()?);
            let counts: &mut Counts = found.counts.entry(agent).or_default();
            counts[usize::from(state.code())] = n;
            Ok(())
        })
        .await?;
        each(conn, BLOCKS, None, |row| {
            self.tallies.blocks.insert(row.number()?, row.number()?);
            Ok(())
        })
        .await?;
        found.newest = all(conn, NEWEST, |row| row.time()).await?.pop().unwrap_or_default();
        let mut shared = Shared::default();
        each(conn, LIVE, None, |row| {
            let (task, history) = (row.task(&mut shared)?, row.number()?);
            self.ready.load(Arc::new(task), history);
            Ok(())
        })
        .await?;
        self.tallies.counts.clone_from(&found.counts);
        self.oldest_request = self.pipeline.writer().oldest_request().map_err(|error| failed(&error))?;
        self.broken = false;
        Ok(found)
    }

    pub(super) fn find_timed(&self, queues: &BTreeSet<AgentId>, from: TaskId) -> Vec<Arc<Task>> {
        let tasks = self.ready.entries().map(|entry| &entry.task);
        let mut timed: Vec<_> =
            tasks.filter(|task| task.id >= from && has_timer(task, queues)).cloned().collect();
        // The map has no order of its own; the same file must give the same answer.
        timed.sort_unstable_by_key(|task| task.id);
        timed
    }

    pub(super) async fn read_wanted(&mut self, want: &Want) -> Result<Known, StoreError> {
        let mut known = Known::default();
        known.tasks.reserve(want.tasks.len());
        let mut missing = Vec::new();
        for id in &want.tasks {
            match self.ready.entry(*id) {
                Some(entry) => {
                    known.tasks.insert(*id, Arc::clone(&entry.task));
                }
                // A number that was never given needs no look.
                None if id.0 <= self.tallies.meta.last_task && !self.leaves(*id) => missing.push(*id),
                None => {}
            }
        }
        if !missing.is_empty() {
            let mut shared = Shared::default();
            each(&mut self.conn, TASKS, Some(ids(missing.iter())), |row| {
                let (task, history) = (row.task(&mut shared)?, row.number()?);
                self.visited.push(task.id);
                let task = Arc::new(task);
                known.tasks.insert(task.id, Arc::clone(&task));
                self.ready.load(task, history);
                Ok(())
            })
            .await?;
        }
        self.read_remembered(want, &mut known)?;
        Ok(known)
    }

    /// Keys and requests: what is in the file, and over it what is on its way there or staged.
    fn read_remembered(&mut self, want: &Want, known: &mut Known) -> Result<(), StoreError> {
        if want.keys.is_empty() && want.requests.is_empty() {
            return Ok(());
        }
        let found = self.lookup.look(&want.keys, &want.requests).map_err(|error| failed(&error))?;
        let changed: Vec<&Staged> =
            self.underway.iter().map(|batch| &batch.sealed.staged).chain([&self.staged]).collect();
        let is_free = |id: &TaskId| changed.iter().any(|batch| batch.freed.contains(id));
        for (asked, holder) in want.keys.iter().zip(found.keys) {
            known
                .keys
                .extend(holder.filter(|holder| !is_free(&holder.task)).map(|holder| (asked.clone(), holder)));
        }
        let found = want.requests.iter().zip(found.requests);
        known.requests.extend(found.filter_map(|(id, row)| Some((Arc::clone(id), row?))));
        self.look_over(want, known, is_free);
        if changed.iter().any(|batch| !batch.requests.is_empty()) {
            let asked: HashSet<&Arc<str>> = want.requests.iter().collect();
            let rows = changed.iter().flat_map(|batch| &batch.requests).filter(|row| asked.contains(&row.id));
            known.requests.extend(rows.map(|row| (Arc::clone(&row.id), row.clone())));
        }
        Ok(())
    }

    /// Keys of tasks that are not in the file yet.
    fn look_over(&self, want: &Want, known: &mut Known, is_free: impl Fn(&TaskId) -> bool) {
        let sent = self.sent().flat_map(|part| &part.specs);
        let sent = sent.map(|born| (born.id, born.spec.agent, &born.data));
        let staged = self.staged.data.iter();
        let staged =
            staged.filter_map(|(id, data)| Some((*id, self.ready.entry(*id)?.task.spec.agent, data)));
        let mut keyed = sent.chain(staged).filter(|(_, _, data)| !data.key.is_empty()).peekable();
        if want.keys.is_empty() || keyed.peek().is_none() {
            return;
        }
        let mut asked: ByKey<()> = ByKey::default();
        asked.extend(want.keys.iter().map(|key| (key.clone(), ())));
        for (id, agent, data) in keyed {
            let key = (agent, Arc::clone(&data.key));
            if asked.contains_key(&key) && !is_free(&id) {
                known.keys.insert(key, KeyHolder { task: id, digest: data.digest });
            }
        }
    }

    pub(super) async fn read_settled(
        &mut self,
        leases: &[(TaskId, u64)],
    ) -> Result<Vec<Option<Record>>, StoreError> {
        let mut found = vec![None; leases.len()];
        if leases.is_empty() {
            return Ok(found);
        }
        let sent = self.sent().flat_map(|part| &part.history);
        let mut missing: Vec<usize> = (0..leases.len()).collect();
        for row in sent.chain(&self.staged.history).filter(|row| row.record.digest.is_some()) {
            missing.retain(|index| {
                let is_it = (row.record.task, row.record.fence) == leases[*index];
                if is_it {
                    found[*index] = Some(row.record.clone());
                }
                !is_it
            });
        }
        if !missing.is_empty() {
            let asked: Vec<(u64, u64)> =
                missing.iter().map(|index| (leases[*index].0.0, leases[*index].1)).collect();
            each(&mut self.conn, SETTLED, Some(crate::store::text::written(&asked)), |row| {
                let asked = usize::try_from(row.number()?).unwrap_or(usize::MAX);
                if let Some(index) = missing.get(asked) {
                    found[*index] = Some(row.record()?);
                }
                Ok(())
            })
            .await?;
        }
        Ok(found)
    }
}

/// A row of this database.
pub(super) type Columns<'r> = crate::store::rows::Columns<'r, SqliteRow>;

/// STRICT tables: the type of a column is known, and checking it again per value is a fifth of a scan.
impl Cells for SqliteRow {
    const PACKED: bool = true;

    fn int(&self, at: usize) -> sqlx::Result<Option<i64>> {
        self.try_get_unchecked(at)
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

/// Runs a query and hands each row over as it comes.
pub(super) async fn each(
    conn: &mut SqliteConnection,
    statement: &'static str,
    json: Option<String>,
    mut row: impl FnMut(&mut Columns<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut query = sqlx::query(statement);
    if let Some(json) = json {
        query = query.bind(json);
    }
    let mut rows = query.fetch(conn);
    while let Some(found) = rows.try_next().await.map_err(|error| failed(&error))? {
        row(&mut Columns::of(&found))?;
    }
    Ok(())
}

/// Runs a query and collects what its rows hold.
async fn all<T>(
    conn: &mut SqliteConnection,
    statement: &'static str,
    read: impl Fn(&mut Columns<'_>) -> Result<T, StoreError>,
) -> Result<Vec<T>, StoreError> {
    let mut found = Vec::new();
    each(conn, statement, None, |row| {
        found.push(read(row)?);
        Ok(())
    })
    .await?;
    Ok(found)
}

fn has_timer(task: &Task, queues: &BTreeSet<AgentId>) -> bool {
    match task.state {
        State::Running | State::Blocked => true,
        State::Retry if task.reason == Reason::Budget => true,
        state => {
            !state.is_terminal()
                && (task.deadline.is_some()
                    || task.spec.policy.queue_timeout.is_some()
                    || queues.contains(&task.spec.agent))
        }
    }
}
