//! Which daemons there are, and our place among them.
//!
//! A daemon has a slot: a row that it writes with each commit, and a lock of its session. It is gone when nobody has heard
//! of it for [`LEASE`], or when its session has ended and it was quiet for [`QUIET`]. Whoever sees that first takes over
//! what it left; should it come back, it finds the slot no longer its own, can commit nothing, and starts over with another.
//!
//! Invariant: only the owner of a slot commits under it.

use super::hints::Hint;
use super::recover::{all, one};
use super::{PgStore, failed};
use ledger_core::store::{Replicas, StoreError};
use ledger_core::{AgentId, SessionId, Timestamp};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// A daemon that nobody has heard of for so long is gone.
pub(super) const LEASE: Duration = Duration::from_secs(10);
/// One whose session has ended, for so long: longer than it needs to notice and to open another.
pub(super) const QUIET: Duration = Duration::from_secs(3);
/// Before any transaction.
const NOTHING: &str = "0";
/// How long the end of a session is waited for that a predecessor had.
const LOCKED_FOR: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);

/// The class of the locks of slots: a number of no meaning.
macro_rules! lock {
    ($function:literal, $slot:literal) => {
        concat!($function, "(1279611975, ", $slot, "::int4)")
    };
}
pub(super) use lock;

/// This server's clock, in ms.
macro_rules! clock {
    () => {
        "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
    };
}
pub(super) use clock;

const DRAW: &str = "SELECT ('x' || substr(md5(gen_random_uuid()::text), 1, 16))::bit(64)::bigint";
const SLOTS: &str =
    concat!("SELECT slot, owner, beat_at, last_session, name, ", clock!(), " FROM slots ORDER BY slot");
const TRY_LOCK: &str = concat!("SELECT ", lock!("pg_try_advisory_lock", "$1"));
const UNLOCK: &str = concat!("SELECT ", lock!("pg_advisory_unlock", "$1"));
/// Slot $1, which was found to have owner $2, for $3, who is called $4.
const TAKE_SLOT: &str = concat!(
    "UPDATE slots SET owner = $3, name = $4, heir = NULL, beat_at = ",
    clock!(),
    " WHERE slot = $1 AND owner IS NOT DISTINCT FROM $2 RETURNING slot::bigint"
);
const NEW_SLOT: &str = concat!(
    "INSERT INTO slots (slot, owner, name, beat_at, last_seq, last_session) \
     VALUES ($1::bigint, $2, $3, ",
    clock!(),
    ", 0, $1::bigint << 48) ON CONFLICT (slot) DO NOTHING RETURNING slot::bigint"
);
const EMPTY_BUDGETS: &str = concat!(
    "INSERT INTO budgets (agent, slot, millitokens, updated_at) SELECT of.id, $1::bigint, 0, ",
    clock!(),
    " FROM (SELECT id FROM agents UNION ALL SELECT 0) AS of"
);
/// Proves that a slot is its owner's; leaves the number of the batch's transaction there, and tells it, so that its fate can be asked
/// for when its commit is not answered. Its parameters, from this number on: slot, last_seq, last_session, owner.
pub(super) fn slot_text(first: usize) -> String {
    let [slot, seq, session, owner] = [0, 1, 2, 3].map(|at| first + at);
    format!(
        "UPDATE slots SET last_seq = ${seq}, last_session = GREATEST(last_session, ${session}), beat_at = {}, \
         batch = pg_current_xact_id(), batch_owner = owner \
         WHERE slot = ${slot} AND owner = ${owner} RETURNING batch::text",
        clock!()
    )
}
const SHOW_LIFE: &str = concat!(
    "UPDATE slots SET beat_at = ",
    clock!(),
    " WHERE slot = $1 AND owner = $2 RETURNING slot::bigint"
);
const LEAVE: &str = "UPDATE slots SET beat_at = 0 WHERE slot = $1 AND owner = $2";

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 9] =
    [EMPTY_BUDGETS, DRAW, SLOTS, TRY_LOCK, UNLOCK, TAKE_SLOT, NEW_SLOT, SHOW_LIFE, LEAVE];

/// Our place among the daemons.
#[derive(Debug, Default)]
pub(super) struct Place {
    pub(super) slot: u16,
    /// What this daemon is called.
    name: String,
    /// What we drew when we took it; none: we have none.
    pub(super) owner: Option<i64>,
    /// The session that we have now holds its lock.
    pub(super) locked: bool,
    /// Whoever had it before left it without a word, and what it watched over to us.
    pub(super) inherits: bool,
    /// The others that live.
    pub(super) others: Vec<u16>,
    /// Transactions before this one are known of, as the server writes it.
    pub(super) seen: String,
    /// The last look and the next; none: the ledger did not ask for news so far.
    pub(super) looked: Option<(Timestamp, Timestamp)>,
    /// What is stored of agents and breakers as we read or wrote it last: their revisions, and the epochs of breakers.
    pub(super) agents: HashMap<AgentId, i64>,
    pub(super) breakers: HashMap<BreakerKey, (i64, u64)>,
}

/// An agent, and the type whose breaker it is.
pub(super) type BreakerKey = (AgentId, Arc<str>);

impl Place {
    pub(super) fn named(name: &str) -> Self {
        Self { name: name.to_owned(), seen: NOTHING.to_owned(), ..Self::default() }
    }

    pub(super) fn replicas(&self, time: Option<Timestamp>) -> Replicas {
        Replicas { slot: self.slot, others: self.others.clone(), time }
    }
}

/// A row of `slots`.
struct Slot {
    slot: u16,
    owner: Option<i64>,
    beat_at: i64,
    last_session: u64,
    name: String,
}

impl PgStore {
    /// Takes a slot, unless we have one.
    pub(super) async fn join(&mut self) -> Result<(), StoreError> {
        if self.place.owner.is_some() {
            return self.lock_slot().await;
        }
        // No two daemons draw the same; the server's own dice, for we have none here.
        let owner = one(self.connection()?, sqlx::query(DRAW)).await?;
        let until = tokio::time::Instant::now() + LOCKED_FOR;
        loop {
            let (slots, now) = self.read_slots().await?;
            let mut predecessor = false;
            for found in &slots {
                // Who had our name is not there any more, for we have its place; the server may have to notice.
                let before = found.owner.is_some() && found.name == self.place.name;
                let quiet = now - found.beat_at > QUIET.as_millis() as i64;
                if found.owner.is_some() && !quiet && !before {
                    continue;
                }
                if !self.try_lock(found.slot).await? {
                    predecessor |= before;
                    continue;
                }
                let taken = sqlx::query(TAKE_SLOT)
                    .bind(i64::from(found.slot))
                    .bind(found.owner)
                    .bind(owner)
                    .bind(self.place.name.clone());
                if all(self.connection()?, taken, |row| row.number()).await?.is_empty() {
                    self.unlock(found.slot).await?;
                    continue;
                }
                self.take_place(found.slot, owner, found.last_session);
                self.place.inherits = found.owner.is_some();
                return Ok(());
            }
            if predecessor && tokio::time::Instant::now() < until {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            let next = slots.last().map_or(0, |last| last.slot + 1);
            let made = sqlx::query(NEW_SLOT).bind(i64::from(next)).bind(owner).bind(self.place.name.clone());
            if !all(self.connection()?, made, |row| row.number()).await?.is_empty() {
                self.take_place(next, owner, 0);
                if next > 0 {
                    // The others have their parts of every budget; this one begins with nothing, so that restarts mint nothing.
                    let query = sqlx::query(EMPTY_BUDGETS).bind(i64::from(next));
                    query.execute(self.connection()?).await.map_err(|error| failed(&error))?;
                }
                self.place.locked = false;
                if let Some(session) = &mut self.session {
                    session.locks = false;
                }
                self.place.inherits = false;
                return self.lock_slot().await;
            }
        }
    }

    async fn read_slots(&mut self) -> Result<(Vec<Slot>, i64), StoreError> {
        let mut now = 0;
        let slots = all(self.connection()?, sqlx::query(SLOTS), |row| {
            let found = Slot {
                slot: row.narrow()?,
                owner: row.maybe()?,
                beat_at: row.int()?,
                last_session: row.number()?,
                name: row.text()?.to_owned(),
            };
            now = row.int()?;
            Ok(found)
        });
        Ok((slots.await?, now))
    }

    fn take_place(&mut self, slot: u16, owner: i64, last_session: u64) {
        self.place.slot = slot;
        self.place.owner = Some(owner);
        self.hold_lock();
        self.meta.last_session = last_session.max(SessionId::before_first(slot).0);
        tracing::info!(slot, "this daemon has its place among those that serve the ledger");
        self.hints.tell(slot, Hint::NEWS);
    }

    /// The connection has the lock.
    fn hold_lock(&mut self) {
        self.place.locked = true;
        // The server may have stopped since a session of ours had it, and gives numbers once more whose transactions left no trace.
        NOTHING.clone_into(&mut self.place.seen);
        if let Some(session) = &mut self.session {
            session.locks = true;
        }
    }

    async fn try_lock(&mut self, slot: u16) -> Result<bool, StoreError> {
        Ok(one(self.connection()?, sqlx::query(TRY_LOCK).bind(i32::from(slot))).await? != 0)
    }

    async fn unlock(&mut self, slot: u16) -> Result<(), StoreError> {
        one(self.connection()?, sqlx::query(UNLOCK).bind(i32::from(slot))).await.map(drop)
    }

    /// Has the session hold the slot's lock again after it was opened anew. The server may not have noticed yet that the last
    /// one has ended: then the next look tries again.
    pub(super) async fn lock_slot(&mut self) -> Result<(), StoreError> {
        if !self.place.locked && self.try_lock(self.place.slot).await? {
            self.hold_lock();
        }
        Ok(())
    }

    /// Somebody has taken the slot over: everything that was thought to be ours is not.
    pub(super) fn lose_place(&mut self) -> StoreError {
        tracing::warn!(
            slot = self.place.slot,
            "other daemons took over from this one, which did not move for too long; it starts over"
        );
        // Its lock is of no use to anybody.
        self.session = None;
        self.spare.clear();
        self.begun = false;
        self.place.owner = None;
        self.place.locked = false;
        StoreError::Unavailable("other daemons took over from this one; it starts over".to_owned())
    }

    /// Tells the others that we live, outside of any batch.
    pub(super) async fn show_life(&mut self) -> Result<(), StoreError> {
        let query = sqlx::query(SHOW_LIFE).bind(i64::from(self.place.slot)).bind(self.place.owner);
        match all(self.connection()?, query, |row| row.number()).await?.is_empty() {
            true => Err(self.lose_place()),
            false => Ok(()),
        }
    }

    /// Leaves the slot to whoever sees that first.
    pub(super) async fn leave_slot(&mut self) -> Result<(), StoreError> {
        let Some(owner) = self.place.owner.take() else { return Ok(()) };
        self.roll_back().await;
        self.broken = true;
        self.connect_once().await?;
        let query = sqlx::query(LEAVE).bind(i64::from(self.place.slot)).bind(owner);
        query.execute(self.connection()?).await.map_err(|error| failed(&error))?;
        self.hints.tell(self.place.slot, Hint::NEWS);
        Ok(())
    }
}
