//! A batch on its way: it is written on one connection while the next is decided on another.
//!
//! Batches are written one after the other, each in a transaction of its own, so that the next is guarded by what the one
//! before has left. What is new of the next and looks at nothing that is stored goes ahead meanwhile: its history, and tasks that
//! were made. The rest, and its commit, are sent when the one before is known to be durable, which that one tells it: the loop may be
//! busy with the next decision. Invariants: nothing is told before its commit is known; a commit without an answer is known by the
//! number of its transaction in the row of our slot; what is written runs on a task of its own, which nobody drops.

use super::hints::Hint;
use super::shared::{Basis, Met, Revisions, Written};
use super::staged::Staged;
use super::write::New;
use super::{Meta, failed, open, write};
use ledger_core::Timestamp;
use ledger_core::store::StoreError;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgDatabaseError, PgSeverity};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long the fate of a commit is asked for.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two tries of that.
const PAUSE: Duration = Duration::from_millis(100);

/// Whether the last batch of slot $1 and owner $2 is transaction $3, once nobody writes that row. It is the last that a batch writes,
/// and no other of ours is committed until its fate is known. No row: somebody else has the slot, or had it since. Not
/// `pg_xact_status`: what a server that stopped without a checkpoint has lost goes to other transactions under the same number.
/// The number travels as text, for its type is not one of ours.
pub(super) const FATE: &str = "SELECT COALESCE(batch = $3::text::xid8, FALSE) FROM slots \
    WHERE slot = $1 AND (owner = $2 OR owner IS NULL AND batch_owner = $2) FOR SHARE";

/// A connection, and whether the lock of our slot is its own.
pub(super) struct Session {
    pub(super) conn: PgConnection,
    pub(super) locks: bool,
}

impl Session {
    pub(super) const fn new(conn: PgConnection) -> Self {
        Self { conn, locks: false }
    }
}

/// A batch that was decided.
pub(super) struct Handed {
    /// What it was decided on; none: that was lost.
    pub(super) session: Option<Session>,
    /// It has a transaction there.
    pub(super) begun: bool,
    pub(super) staged: Arc<Staged>,
    /// What its rows are guarded by, but for what those before it will have written.
    pub(super) basis: Basis,
    pub(super) met: Met,
    pub(super) meta: Meta,
    /// It waits for tasks that another daemon was offered. Where a batch may follow it must not: that one may have been offered
    /// tasks, too, which it holds until this one is durable, and a batch of the other daemon, before the one that holds ours, may
    /// wait for them. The server would see no circle.
    pub(super) patient: bool,
    /// What producers said may be written before its turn. Who brings a key that is written waits until it is known whether it
    /// stays; ahead of its turn that may be a daemon that this batch waits for, and the server would see no circle.
    pub(super) specs_ahead: bool,
    /// Forget answers as of then, so many at most.
    pub(super) purge: Option<(Timestamp, usize)>,
    pub(super) hint: Hint,
}

/// What the next is told when a batch is durable. Where it is not, nobody tells it anything.
type Turn = oneshot::Receiver<Revisions>;

/// One that is being written.
pub(super) struct Flying {
    pub(super) task: JoinHandle<Landed>,
    pub(super) staged: Arc<Staged>,
    pub(super) meta: Meta,
    pub(super) hint: Hint,
    /// The lock of our slot is its session's.
    pub(super) locks: bool,
    /// For the batch that follows.
    turn: Option<Turn>,
}

/// What became of it.
pub(super) struct Landed {
    pub(super) session: Option<Session>,
    /// None: nothing was written, for the slot is somebody else's.
    pub(super) written: Result<Option<Written>, StoreError>,
}

impl Handed {
    /// Begins to write, behind the newest of those that are being written.
    pub(super) fn start(self, before: Option<&mut Flying>, options: PgConnectOptions) -> Flying {
        let (staged, meta, hint) = (Arc::clone(&self.staged), self.meta, self.hint);
        let locks = self.session.as_ref().is_some_and(|session| session.locks);
        let (next, turn) = oneshot::channel();
        let pilot = Pilot { session: self.session, begun: self.begun, options };
        let before = before.and_then(|before| before.turn.take());
        let Self { basis, met, patient, specs_ahead, purge, .. } = self;
        let load = Load { staged: self.staged, basis, met, meta, patient, specs_ahead, purge };
        let task = tokio::spawn(pilot.fly(load, before, next));
        Flying { task, staged, meta, hint, locks, turn: Some(turn) }
    }
}

/// What a batch writes.
struct Load {
    staged: Arc<Staged>,
    basis: Basis,
    met: Met,
    meta: Meta,
    patient: bool,
    specs_ahead: bool,
    purge: Option<(Timestamp, usize)>,
}

pub(super) struct Pilot {
    pub(super) session: Option<Session>,
    /// The batch has a transaction there.
    pub(super) begun: bool,
    pub(super) options: PgConnectOptions,
}

impl Pilot {
    async fn fly(mut self, mut load: Load, before: Option<Turn>, next: oneshot::Sender<Revisions>) -> Landed {
        let written = self.write_in_turn(&mut load, before).await;
        let lost = match (&written, &mut self.session) {
            (Ok(Some(written)), _) => {
                // It may be that none follows.
                let _ = next.send(load.basis.leave(written));
                false
            }
            // The slot is somebody else's: its lock is of no use to anybody. Or whatever its state, the next one is known.
            (Ok(None) | Err(StoreError::Unavailable(_)), _) | (_, None) => true,
            (Err(_), Some(session)) => sqlx::raw_sql("ROLLBACK").execute(&mut session.conn).await.is_err(),
        };
        if lost {
            self.session = None;
        }
        Landed { session: self.session, written }
    }

    /// None: the slot is somebody else's.
    async fn write_in_turn(
        &mut self,
        load: &mut Load,
        before: Option<Turn>,
    ) -> Result<Option<Written>, StoreError> {
        let mut left = New::All(load.basis.slot, load.meta);
        if let Some(before) = before {
            let ahead = self.write_new(load).await;
            let failed = |_| StoreError::Unavailable("the batch that it was decided on failed".to_owned());
            load.basis.follow(before.await.map_err(failed)?);
            left = ahead?;
        }
        self.write(load, left).await
    }

    /// The connection, in the batch's transaction.
    async fn begin(&mut self) -> Result<&mut PgConnection, StoreError> {
        if !self.begun {
            let conn = self.connection()?;
            sqlx::raw_sql("BEGIN").execute(conn).await.map_err(|error| failed(&error))?;
            self.begun = true;
        }
        self.connection()
    }

    /// What is new of it, and looks at nothing that is stored; what of that is left.
    async fn write_new(&mut self, load: &Load) -> Result<New, StoreError> {
        let (slot, meta) = (load.basis.slot, load.meta);
        if load.staged.history.is_empty() {
            return Ok(New::All(slot, meta));
        }
        let (ahead, left) = match load.specs_ahead {
            true => (New::All(slot, meta), New::Nothing),
            false => (New::ButSpecs(slot, meta), New::Specs),
        };
        write::write_new(self.begin().await?, &load.staged, ahead).await?;
        Ok(left)
    }

    /// What is not written yet, and the commit. None: the slot is somebody else's.
    async fn write(&mut self, load: &Load, new: New) -> Result<Option<Written>, StoreError> {
        let Load { staged, basis, met, meta, patient, purge, .. } = load;
        if staged.is_empty() {
            let begun = self.begun;
            let conn = self.connection()?;
            if begun {
                sqlx::raw_sql("ROLLBACK").execute(conn).await.map_err(|error| failed(&error))?;
            }
            return Ok(Some(Written::default()));
        }
        let conn = self.begin().await?;
        write::write_changed(conn, staged, *patient, new).await?;
        let Some(written) = write::write_rest(conn, staged, basis, met, *meta).await? else {
            return Ok(None);
        };
        if let Some((now, most)) = *purge {
            write::purge_requests(conn, now, most).await?;
        }
        self.commit_as(basis, &written.transaction).await?;
        Ok(Some(written))
    }

    fn connection(&mut self) -> Result<&mut PgConnection, StoreError> {
        let session = self.session.as_mut();
        let lost = || StoreError::Unavailable("the connection was lost".to_owned());
        session.map(|session| &mut session.conn).ok_or_else(lost)
    }

    async fn commit_as(&mut self, basis: &Basis, transaction: &str) -> Result<(), StoreError> {
        match sqlx::raw_sql("COMMIT").execute(self.connection()?).await {
            Ok(_) => Ok(()),
            Err(error) if was_refused(&error) => Err(failed(&error)),
            Err(error) => {
                tracing::warn!(%error, "a commit was not answered; asking what became of it");
                self.session = None;
                self.fate_of(basis, transaction).await
            }
        }
    }

    /// What became of a commit whose answer was lost.
    async fn fate_of(&mut self, basis: &Basis, transaction: &str) -> Result<(), StoreError> {
        let end = tokio::time::Instant::now() + PATIENCE;
        loop {
            match self.ask_fate(basis, transaction).await {
                Ok(Some(true)) => {
                    tracing::info!(transaction, "it was committed");
                    return Ok(());
                }
                Ok(Some(false)) => {
                    return Err(StoreError::Unavailable(
                        "the server went away before it committed".to_owned(),
                    ));
                }
                Ok(None) => {
                    return Err(StoreError::Unknown(
                        "other daemons took over from this one while it committed".to_owned(),
                    ));
                }
                Err(_) if tokio::time::Instant::now() < end => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(StoreError::Unknown(error)),
            }
        }
    }

    /// Whether a transaction of ours was committed; none: nobody can tell. Where its process has not noticed yet that nobody listens,
    /// this waits for it, and fails after a while.
    pub(super) async fn ask_fate(
        &mut self,
        basis: &Basis,
        transaction: &str,
    ) -> Result<Option<bool>, String> {
        let session = match &mut self.session {
            Some(session) => session,
            none => {
                let conn = open::connect(&self.options).await.map_err(|error| error.to_string())?;
                none.insert(Session::new(conn))
            }
        };
        let query = sqlx::query_scalar(FATE).bind(i64::from(basis.slot)).bind(basis.owner).bind(transaction);
        let fate = query.fetch_optional(&mut session.conn).await.map_err(|error| error.to_string());
        if fate.is_err() {
            self.session = None;
        }
        fate
    }
}

/// Whether the server said that it did not commit. Not where it ends the session with that, by its code or by its severity, whatever it
/// did before: it is being stopped, an operator ended it, or its disk failed under the commit, which may be there when it is back.
pub(super) fn was_refused(error: &sqlx::Error) -> bool {
    let Some(said) = error.as_database_error() else { return false };
    let stops = said.code().is_some_and(|code| code.starts_with("57P") || code.starts_with("08"));
    let severity = said.try_downcast_ref::<PgDatabaseError>().map(PgDatabaseError::severity);
    !stops && !matches!(severity, Some(PgSeverity::Fatal | PgSeverity::Panic))
}
