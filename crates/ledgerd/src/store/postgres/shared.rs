//! Rows that any daemon may write: agents, breakers, sessions; and what only the owner of a slot writes: budgets, and the
//! slot itself.
//!
//! Each of them is written only where it is as it was known; otherwise the batch is decided anew. Invariants: the slot's row
//! comes last, so that it is locked no longer than the commit takes; breakers and agents come just before it.

use super::failed;
use super::news::SEND_MAIL;
use super::recover::Columns;
use super::slots::{BreakerKey, Place};
use super::staged::Staged;
use super::table::Kind::{self, Bytes, Int, Text};
use super::table::{Rows, Table, put, rows};
use crate::store::bind::{self, Sink};
use crate::store::text;
use breaker_core::State;
use ledger_core::store::{BreakerRow, SessionRow, StoreError};
use ledger_core::{AgentId, ByName, SessionId};
use sqlx::postgres::PgConnection;
use std::collections::HashMap;
use std::sync::Arc;

static NEW_AGENTS: Table = Table::new(
    "new_agents",
    "INSERT INTO agents",
    &[("id", Int), ("name", Text), ("settings", Text), ("created_at", Int), ("pause", Text)],
    "",
);
/// Only those that are as they were read or written last; names them.
static AGENTS: Table = Table::new(
    "changed_agents",
    "UPDATE agents AS a SET settings = new.settings, pause = new.pause, revision = a.revision + 1, \
     changed = pg_current_xact_id()",
    &[("id", Int), ("name", Text), ("settings", Text), ("created_at", Int), ("pause", Text), ("known", Int)],
    "WHERE a.id = new.id AND a.revision = new.known RETURNING a.id",
);
/// The columns of a breaker's row, as `bind` has them.
macro_rules! breaker_row {
    ($($more:expr),*) => {
        &[
            ("agent", Int), ("task_type", Text), ("version", Int), ("state", Text), ("epoch", Int), ("run", Int),
            ("successes", Int), ("reopens", Int), ("since_ns", Int), ("until_ns", Int), ("cause", Text),
            ("ramp_until_ns", Int), ("probes", Text), ("window", Bytes), ("digest", Int), ("actor", Text),
            ("order_reason", Text), ("stats", Text), ("last_probe", Int), $($more),*
        ]
    };
}
static NEW_BREAKERS: Table = Table::new("new_breakers", "INSERT INTO breakers", breaker_row!(), "");
/// Only those whose epoch is as it was known. Where a permit was given or the breaker moved (`exact`), nothing else may have
/// changed either; what closed ones count meanwhile may overwrite what another daemon counted at the same moment.
static BREAKERS: Table = Table::new(
    "changed_breakers",
    "UPDATE breakers AS b SET version = new.version, state = new.state, epoch = new.epoch, run = new.run, \
     successes = new.successes, reopens = new.reopens, since_ns = new.since_ns, until_ns = new.until_ns, \
     cause = new.cause, ramp_until_ns = new.ramp_until_ns, probes = new.probes, \"window\" = new.\"window\", \
     digest = new.digest, actor = new.actor, order_reason = new.order_reason, stats = new.stats, \
     last_probe = new.last_probe, revision = b.revision + 1, changed = pg_current_xact_id()",
    breaker_row!(("known", Int), ("known_epoch", Int), ("exact", Int)),
    "WHERE b.agent = new.agent AND b.task_type = new.task_type AND b.epoch = new.known_epoch \
        AND (b.revision = new.known OR new.exact = 0) RETURNING b.agent, b.task_type, b.revision, b.epoch",
);
static BUDGETS: Table = Table::new(
    "new_budgets",
    "INSERT INTO budgets",
    &[("agent", Int), ("millitokens", Int), ("updated_at", Int), ("slot", Int)],
    "ON CONFLICT (agent, slot) DO UPDATE SET millitokens = excluded.millitokens, updated_at = excluded.updated_at",
);
const SESSION_ROW: &[(&str, Kind)] = &[
    ("worker", Text),
    ("incarnation", Int),
    ("session", Int),
    ("connected_at", Int),
    ("beat_at", Int),
    ("open", Int),
    ("shown", Text),
    ("replaces", Int),
];
/// Only where it takes the place of the one that was read; names them.
static NEW_SESSIONS: Table = Table::new(
    "new_sessions",
    "INSERT INTO sessions AS s",
    SESSION_ROW,
    "ON CONFLICT (worker) DO UPDATE SET incarnation = excluded.incarnation, session = excluded.session, \
        connected_at = excluded.connected_at, beat_at = excluded.beat_at, open = excluded.open, \
        shown = excluded.shown, replaces = excluded.replaces \
     WHERE s.session = excluded.replaces RETURNING s.worker",
);
/// Of a worker that went to another daemon nothing is written: it is that one's now.
static SESSIONS: Table = Table::new(
    "new_sessions",
    "UPDATE sessions AS s SET beat_at = new.beat_at, open = new.open, shown = new.shown",
    SESSION_ROW,
    "WHERE s.worker = new.worker AND s.session = new.session",
);
/// Every table here, for a test to prepare.
#[cfg(test)]
pub(super) const TABLES: [&Table; 7] =
    [&NEW_AGENTS, &AGENTS, &NEW_BREAKERS, &BREAKERS, &BUDGETS, &NEW_SESSIONS, &SESSIONS];

/// What guards the rows of a batch.
#[derive(Debug, Default)]
pub(super) struct Basis {
    pub(super) slot: u16,
    pub(super) owner: Option<i64>,
    /// When it was decided.
    known: Revisions,
    /// By the batches that were being written then.
    before: Revisions,
}

/// The last that is known of rows which any daemon may write.
#[derive(Debug, Default)]
pub(super) struct Revisions {
    agents: HashMap<AgentId, i64>,
    /// With epochs.
    breakers: HashMap<BreakerKey, (i64, u64)>,
}

impl Basis {
    pub(super) fn of(staged: &Staged, place: &Place) -> Self {
        let agents = staged.agents.keys().filter_map(|id| Some((*id, *place.agents.get(id)?)));
        let breakers = staged.breakers.keys();
        let breakers = breakers.filter_map(|key| Some((key.clone(), *place.breakers.get(key)?)));
        let known = Revisions { agents: agents.collect(), breakers: breakers.collect() };
        Self { slot: place.slot, owner: place.owner, known, before: Revisions::default() }
    }

    /// Those before it have left these.
    pub(super) fn follow(&mut self, before: Revisions) {
        self.before = before;
    }

    /// What it leaves to the next, together with what those before it left.
    pub(super) fn leave(self, written: &Written) -> Revisions {
        let mut left = self.before;
        left.agents.extend(written.agents.iter().copied());
        left.breakers.extend(written.breakers.iter().cloned());
        left
    }

    /// Revisions rise: of two the higher is the later.
    fn agent(&self, id: AgentId) -> Option<i64> {
        self.known.agents.get(&id).max(self.before.agents.get(&id)).copied()
    }

    fn breaker(&self, key: &BreakerKey) -> Option<(i64, u64)> {
        self.known.breakers.get(key).max(self.before.breakers.get(key)).copied()
    }
}

/// What a batch has written, to be known once it is committed.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// The name of its transaction; empty: there was nothing to write.
    pub(super) transaction: String,
    /// Revisions of agents.
    pub(super) agents: Vec<(AgentId, i64)>,
    /// Revisions and epochs of breakers.
    pub(super) breakers: Vec<(BreakerKey, (i64, u64))>,
    /// Others have mail.
    pub(super) mail: bool,
}

/// What is known of sessions while a batch is written.
#[derive(Debug, Default)]
pub(super) struct Met {
    /// The last ones of workers that were asked for; none: they had none.
    pub(super) last: ByName<Option<SessionId>>,
    /// The newest of ours that was committed.
    pub(super) committed: SessionId,
}

impl Met {
    fn before(&self, row: &SessionRow) -> Option<SessionId> {
        self.last.get(&row.worker).copied().flatten()
    }

    /// Whether this is the first that is written of a session.
    fn is_new(&self, row: &SessionRow) -> bool {
        row.session > self.committed && self.last.contains_key(&row.worker)
    }
}

/// Writes all of it; `basis` says what guards it, and under which slot.
pub(super) async fn write(
    conn: &mut PgConnection,
    staged: &Staged,
    basis: &Basis,
    met: &Met,
) -> Result<Written, StoreError> {
    let mut written = Written::default();
    write_sessions(conn, staged, met).await?;
    written.mail = send_mail(conn, staged, basis.slot, met).await?;
    write_agents(conn, staged, basis, &mut written).await?;
    write_breakers(conn, staged, basis, &mut written).await?;
    let slot = i64::from(basis.slot);
    let budgets = rows(&BUDGETS, staged.budgets.values(), |row, budget| {
        bind::budget(row, budget);
        row.add(slot);
    });
    put(conn, budgets).await?;
    Ok(written)
}

async fn write_sessions(conn: &mut PgConnection, staged: &Staged, met: &Met) -> Result<(), StoreError> {
    let bind_row = |columns: &mut Rows, row: &SessionRow| {
        bind::session(columns, row);
        columns.add(row.shown.as_deref().map(text::session));
        columns.add(met.before(row).map_or(0, |before| before.0.cast_signed()));
    };
    let (new, known): (Vec<&SessionRow>, Vec<&SessionRow>) =
        staged.sessions.values().partition(|row| met.is_new(row));
    let written = put(conn, rows(&NEW_SESSIONS, new.iter().copied(), bind_row)).await?;
    if written.len() < new.len() {
        return Err(StoreError::Outdated("the session of a worker"));
    }
    put(conn, rows(&SESSIONS, known, bind_row)).await.map(drop)
}

/// Tells other daemons of tasks of their sessions that this one changed, and of workers that came over. Whether there was
/// something to tell.
async fn send_mail(
    conn: &mut PgConnection,
    staged: &Staged,
    slot: u16,
    met: &Met,
) -> Result<bool, StoreError> {
    let (mut slots, mut tasks, mut workers) = (Vec::new(), Vec::new(), Vec::new());
    for image in staged.tasks.values() {
        if let Some(held) = image.held().filter(|held| image.ran && held.slot() != slot) {
            slots.push(i64::from(held.slot()));
            tasks.push(Some(image.task.id.0.cast_signed()));
            workers.push(None);
        }
    }
    for row in staged.sessions.values().filter(|row| met.is_new(row)) {
        if let Some(before) = met.before(row).filter(|before| before.slot() != slot) {
            slots.push(i64::from(before.slot()));
            tasks.push(None);
            workers.push(Some(row.worker.to_string()));
        }
    }
    if slots.is_empty() {
        return Ok(false);
    }
    let query = sqlx::query(SEND_MAIL).bind(slots).bind(tasks).bind(workers).bind(i64::from(slot));
    let sent = query.execute(conn).await.map_err(|error| failed(&error))?;
    Ok(sent.rows_affected() > 0)
}

async fn write_agents(
    conn: &mut PgConnection,
    staged: &Staged,
    basis: &Basis,
    written: &mut Written,
) -> Result<(), StoreError> {
    let revision = |id: &AgentId| basis.agent(*id);
    let (known, new): (Vec<_>, Vec<_>) = staged.agents.values().partition(|row| revision(&row.id).is_some());
    put(conn, rows(&NEW_AGENTS, new.iter().copied(), bind::agent)).await?;
    let columns = rows(&AGENTS, known.iter().copied(), |columns, row| {
        bind::agent(columns, row);
        columns.add(revision(&row.id));
    });
    if put(conn, columns).await?.len() < known.len() {
        return Err(StoreError::Outdated("the agent"));
    }
    written.agents.extend(new.iter().map(|row| (row.id, 1)));
    written.agents.extend(known.iter().map(|row| (row.id, revision(&row.id).unwrap_or_default() + 1)));
    Ok(())
}

async fn write_breakers(
    conn: &mut PgConnection,
    staged: &Staged,
    basis: &Basis,
    written: &mut Written,
) -> Result<(), StoreError> {
    let key = |row: &BreakerRow| (row.agent, Arc::clone(&row.task_type));
    let is = |row: &BreakerRow| basis.breaker(&key(row));
    let (known, new): (Vec<_>, Vec<_>) = staged.breakers.values().partition(|row| is(row).is_some());
    put(conn, rows(&NEW_BREAKERS, new.iter().copied(), bind::breaker)).await?;
    written.breakers.extend(new.iter().map(|row| (key(row), (1, row.snapshot.epoch))));
    let columns = rows(&BREAKERS, known.iter().copied(), |columns, row| {
        let (revision, epoch) = is(row).unwrap_or_default();
        bind::breaker(columns, row);
        columns.add(revision);
        columns.add(epoch.cast_signed());
        columns.add(row.snapshot.state != State::Closed || row.snapshot.epoch != epoch);
    });
    let found = put(conn, columns).await?;
    if found.len() < known.len() {
        return Err(StoreError::Outdated("the breaker"));
    }
    for row in &found {
        let mut row = Columns::of(row);
        let key = (row.agent()?, row.text()?.into());
        written.breakers.push((key, (row.int()?, row.bits()?)));
    }
    Ok(())
}
