//! What other daemons have done: agents and breakers that they changed, mail, and what those left that are gone.
//!
//! Mail is for one slot: numbers of tasks that its daemon runs or watches over and that were changed elsewhere, and names of
//! workers that went elsewhere. It is deleted by the transaction that heeds it. Invariant: what a daemon watches over is
//! watched over by its heir once that has gone through what lives, which it does from the commit on that makes it one.

use super::hints::Hint;
use super::recover::{all, numbers, one};
use super::slots::{LEASE, Place, QUIET, clock, lock};
use super::{PgStore, failed};
use crate::store::text;
use ledger_core::store::{News, SessionRow, StoreError};
use ledger_core::{Now, TaskId, Timestamp};
use std::sync::Arc;
use std::time::Duration;

/// From one look to the next.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The shortest time from one sign of life to the next, which comes with a look: so one comes with each that is not hurried.
const BEAT_EVERY: Duration = Duration::from_millis(500);
/// A look by those who wait for the ends of tasks.
const LOOK_OFTEN: Duration = Duration::from_millis(250);
/// And where a hint says that some have ended, as all the time under load.
const LOOK_AT_ENDS: Duration = Duration::from_millis(50);

/// Mail for slot $1, and for those whose heir it is: whoever sent it may not have seen yet that they are gone.
macro_rules! mail {
    () => {
        "mail WHERE slot IN (SELECT $1::bigint UNION ALL SELECT slot FROM slots WHERE heir = $1 AND owner IS NULL)"
    };
}
/// Until the end of the transaction.
const TRY_LOCK_HERE: &str = concat!("SELECT ", lock!("pg_try_advisory_xact_lock", "$1"));
/// What is new since transaction $2 for slot $1: the clock, the oldest transaction that goes on, whether agents or breakers
/// changed, whether there is mail, and who lives.
const LOOK: &str = concat!(
    "SELECT ",
    clock!(),
    ", pg_snapshot_xmin(pg_current_snapshot())::text, \
     EXISTS (SELECT 1 FROM agents WHERE changed >= $2::text::xid8) \
        OR EXISTS (SELECT 1 FROM breakers WHERE changed >= $2::text::xid8), \
     EXISTS (SELECT 1 FROM ",
    mail!(),
    "), \
     COALESCE((SELECT json_agg(json_build_array(slot, owner, beat_at) ORDER BY slot) FROM slots \
        WHERE owner IS NOT NULL), '[]')::text"
);
/// Slot $1 of owner $2, last heard of at $3: nobody's, with $4 for an heir. Not while it commits.
const TAKE_OVER: &str = "UPDATE slots SET owner = NULL, heir = $4 WHERE slot = ( \
    SELECT slot FROM slots WHERE slot = $1 AND owner = $2 AND beat_at = $3 FOR UPDATE SKIP LOCKED) RETURNING slot::bigint";
const INHERIT: &str = "UPDATE slots SET heir = $2 WHERE heir = $1 AND owner IS NULL";
const THEIR_WORKERS: &str = "UPDATE sessions SET open = 0 WHERE session >> 48 = $1 \
    RETURNING worker, incarnation, session, connected_at, beat_at, open";
/// Streams at other daemons than slot $1's, as they were shown with their last beat.
const OPEN_ELSEWHERE: &str = "SELECT worker, incarnation, session, connected_at, beat_at, open, shown FROM sessions \
    WHERE open = 1 AND shown IS NOT NULL AND session >> 48 <> $1";
const TAKE_MAIL: &str = concat!("DELETE FROM ", mail!(), " RETURNING task_id, worker");
/// To slots $1, or to who took over from them, but not to ourselves, who are $4: tasks $2 and workers $3.
pub(super) const SEND_MAIL: &str = "INSERT INTO mail (slot, task_id, worker) \
    SELECT to_slot, task_id, worker FROM ( \
        SELECT CASE WHEN s.owner IS NULL THEN COALESCE(s.heir, s.slot) ELSE s.slot END AS to_slot, m.task_id, m.worker \
        FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS m (slot, task_id, worker) \
        JOIN slots AS s ON s.slot = m.slot) AS sent \
    WHERE to_slot <> $4";
const CHANGED_AGENTS: &str = "SELECT id, name, settings, created_at, pause, revision FROM agents \
    WHERE $1::text IS NULL OR changed >= $1::text::xid8 ORDER BY id";
const CHANGED_BREAKERS: &str = "SELECT agent, task_type, version, state, epoch, run, successes, reopens, since_ns, \
    until_ns, cause, ramp_until_ns, probes, \"window\", digest, actor, order_reason, stats, last_probe, revision \
    FROM breakers WHERE $1::text IS NULL OR changed >= $1::text::xid8 ORDER BY agent, task_type";
/// Not one that is planned once: it is to go by the index of what is gated, which is known to be the small one when there are others.
pub(super) const GATED_COUNTS: &str =
    "SELECT agent, task_type, count(*) FROM ready WHERE gated = 1 GROUP BY agent, task_type";
const ENDED: &str = "SELECT id FROM unnest($1::bigint[]) AS asked (id) \
    WHERE COALESCE((SELECT t.state FROM tasks AS t WHERE t.id = asked.id), 9) > 4";
const SESSIONS_OF: &str = "SELECT worker, incarnation, session, connected_at, beat_at, open FROM sessions \
    WHERE worker = ANY($1)";

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 13] = [
    OPEN_ELSEWHERE,
    TRY_LOCK_HERE,
    LOOK,
    TAKE_OVER,
    INHERIT,
    THEIR_WORKERS,
    TAKE_MAIL,
    SEND_MAIL,
    CHANGED_AGENTS,
    CHANGED_BREAKERS,
    GATED_COUNTS,
    ENDED,
    SESSIONS_OF,
];

/// One that has an owner: number, owner, last sign of life.
type Owned = (u16, i64, i64);

impl Place {
    /// When to look next; `ends` where tasks have ended that somebody may wait for. At once where the clock was set back since.
    pub(super) fn look_at(&self, now: Now, ends: bool) -> Option<Timestamp> {
        let (last, next) = self.looked?;
        Some(if now.at < last {
            now.at
        } else if ends {
            next.min(last.after(LOOK_AT_ENDS))
        } else {
            next
        })
    }

    /// Whether to look now.
    pub(super) fn is_due(&self, now: Now, wanted: bool, ends: bool) -> bool {
        self.look_at(now, ends).is_none_or(|at| at <= now.at) || (wanted && !self.others.is_empty())
    }
}

impl PgStore {
    /// What is new; see [`ledger_core::store::Store::news`].
    pub(super) async fn look(
        &mut self,
        awaited: &[TaskId],
        wanted: bool,
        now: Now,
    ) -> Result<News, StoreError> {
        self.wake.heed();
        self.lock_slot().await?;
        let slot = self.place.slot;
        let seen = self.place.seen.clone();
        let query = sqlx::query(LOOK).bind(i64::from(slot)).bind(seen.clone());
        let looked = all(self.connection()?, query, |row| {
            let found = (row.int()?, row.text()?.to_owned(), row.flag()?, row.flag()?);
            Ok((found, row.text()?.to_owned()))
        });
        let looked = looked.await?;
        let asked = tokio::time::Instant::now();
        let Some(((time, xmin, changed, mail), owned)) = looked.into_iter().next() else {
            return Err(StoreError::Corrupt("a look without an answer".to_owned()));
        };
        let owned: Vec<Owned> = text::read(&owned)?;
        if !owned.iter().any(|(number, owner, _)| *number == slot && Some(*owner) == self.place.owner) {
            return Err(self.lose_place());
        }
        let mut news = News::default();
        let mut taken = Vec::new();
        self.place.others.clear();
        for (other, owner, beat_at) in owned.into_iter().filter(|(other, ..)| *other != slot) {
            if self.take_over((other, owner, beat_at), time).await? {
                taken.push(other);
            } else {
                self.place.others.push(other);
            }
        }
        if mail || !taken.is_empty() {
            self.begin_once().await?;
            self.staged.heeds = true;
            let query = sqlx::query(TAKE_MAIL).bind(i64::from(slot));
            let letters = all(self.connection()?, query, |row| {
                let task: Option<i64> = row.maybe()?;
                Ok((task, row.maybe_text()?.map(Arc::from)))
            });
            for (task, worker) in letters.await? {
                let task = task.map(|id| TaskId(id.cast_unsigned()));
                if let Some(id) = task {
                    self.kept.remove(&id);
                }
                news.changed.extend(task);
                news.moved.extend(worker);
            }
        }
        if changed {
            self.read_changed(&mut news, Some(seen)).await?;
        }
        self.place.seen = xmin;
        if !taken.is_empty() || !self.place.others.is_empty() {
            // Who left something that becomes due may be gone, or was not heard.
            self.due = self.find_due(now).await?;
        }
        if !taken.is_empty() {
            news.left = Some(self.read_left(&taken).await?);
        }
        if !self.place.others.is_empty() || !taken.is_empty() {
            self.read_shared(&mut news, awaited).await?;
            if wanted {
                let query = sqlx::query(OPEN_ELSEWHERE).bind(i64::from(slot));
                let rows = all(self.connection()?, query, |row| {
                    let stored = row.session()?;
                    row.text().and_then(|shown| text::session_of(&stored, shown))
                });
                news.sessions = Some(rows.await?);
            }
        }
        if !(0..BEAT_EVERY.as_millis() as i64).contains(&(time - self.beat_at)) {
            // Where nothing else is committed, nothing else says that we live; nor where the server's clock was set back.
            self.staged.heeds = true;
            self.beat_at = time;
        }
        let often = !awaited.is_empty() && !self.place.others.is_empty();
        self.place.looked = Some((now.at, now.at.after(if often { LOOK_OFTEN } else { LOOK_EVERY })));
        // As late as it is by now.
        news.replicas = self.place.replicas(Some(Timestamp::from_millis(time).after(asked.elapsed())));
        Ok(news)
    }

    /// Agents and breakers that others changed since a transaction, or all of them.
    pub(super) async fn read_changed(
        &mut self,
        news: &mut News,
        since: Option<String>,
    ) -> Result<(), StoreError> {
        let whole = since.is_none();
        let query = sqlx::query(CHANGED_AGENTS).bind(since.clone());
        for (row, revision) in
            all(self.connection()?, query, |row| Ok((row.agent_row()?, row.int()?))).await?
        {
            if self.place.agents.insert(row.id, revision) != Some(revision) || whole {
                news.agents.push(row);
            }
        }
        let query = sqlx::query(CHANGED_BREAKERS).bind(since);
        for (row, revision) in all(self.connection()?, query, |row| Ok((row.breaker()?, row.int()?))).await? {
            let (place, is) = ((row.agent, Arc::clone(&row.task_type)), (revision, row.snapshot.epoch));
            if self.place.breakers.insert(place, is) != Some(is) || whole {
                news.breakers.push(row);
            }
        }
        Ok(())
    }

    /// What no daemon knows of itself alone.
    pub(super) async fn read_shared(
        &mut self,
        news: &mut News,
        awaited: &[TaskId],
    ) -> Result<(), StoreError> {
        news.totals = Some(self.read_totals().await?);
        let gated = all(self.connection()?, sqlx::query(GATED_COUNTS).persistent(false), |row| {
            Ok((row.agent()?, row.text()?.into(), row.number()?))
        });
        news.gated = Some(gated.await?);
        if !awaited.is_empty() {
            let query = sqlx::query(ENDED).bind(numbers(awaited));
            news.ended = all(self.connection()?, query, |row| row.task_id()).await?;
        }
        Ok(())
    }

    /// Becomes the heir of a daemon that is gone; false where it lives, or somebody else does.
    async fn take_over(&mut self, (other, owner, beat_at): Owned, time: i64) -> Result<bool, StoreError> {
        let quiet = time - beat_at;
        if quiet <= QUIET.as_millis() as i64 {
            return Ok(false);
        }
        self.begin_once().await?;
        if quiet <= LEASE.as_millis() as i64 {
            let free = sqlx::query(TRY_LOCK_HERE).bind(i32::from(other));
            if one(self.connection()?, free).await? == 0 {
                return Ok(false);
            }
        }
        let query = sqlx::query(TAKE_OVER)
            .bind(i64::from(other))
            .bind(owner)
            .bind(beat_at)
            .bind(i64::from(self.place.slot));
        if all(self.connection()?, query, |row| row.number()).await?.is_empty() {
            return Ok(false);
        }
        self.staged.heeds = true;
        self.staged.hint = Hint::NEWS;
        let query = sqlx::query(INHERIT).bind(i64::from(other)).bind(i64::from(self.place.slot));
        query.execute(self.connection()?).await.map_err(|error| failed(&error))?;
        tracing::info!(
            slot = other,
            left = beat_at == 0,
            "a daemon is gone; this one takes over what it left"
        );
        Ok(true)
    }

    async fn read_left(&mut self, gone: &[u16]) -> Result<Vec<SessionRow>, StoreError> {
        let mut workers = Vec::new();
        for slot in gone {
            let query = sqlx::query(THEIR_WORKERS).bind(i64::from(*slot));
            workers.extend(all(self.connection()?, query, |row| row.session()).await?);
        }
        Ok(workers)
    }

    /// The last sessions of these workers.
    pub(super) async fn read_sessions(
        &mut self,
        workers: &[Arc<str>],
    ) -> Result<Vec<SessionRow>, StoreError> {
        let names: Vec<String> = workers.iter().map(|name| name.to_string()).collect();
        let query = sqlx::query(SESSIONS_OF).bind(names);
        all(self.connection()?, query, |row| row.session()).await
    }
}
