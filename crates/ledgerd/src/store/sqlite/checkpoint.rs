//! Moving the write-ahead log into the database file, off the path of commits.
//!
//! Never truncates the log: growing it again costs more than its room. Invariants: at most one checkpoint at a time; a
//! commit never runs one; when readers keep the log from starting over for too long, the writer waits for one restart.

use super::{FULL, Failure as _};
use sqlx::sqlite::SqliteConnection;
use sqlx::{ConnectOptions, Connection, Row};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::Mutex;

/// Bytes of the log after which a checkpoint is worth its syncs.
const EVERY: u64 = 8 << 20;
/// Pages of the log above which the writer waits: 128 MiB. Beyond it reads slow down, for they search the log.
const MOST_PAGES: u64 = (128 << 20) / 4_096;

const PASSIVE: &str = "PRAGMA wal_checkpoint(PASSIVE)";
const RESTART: &str = "PRAGMA wal_checkpoint(RESTART)";

/// A connection of its own for checkpoints.
pub(super) struct Checkpoints {
    conn: Arc<Mutex<SqliteConnection>>,
    /// Bytes since the last one began; a guess.
    written: u64,
    /// Pages in the log when the last one ended.
    pages: Arc<AtomicU64>,
    /// One failed since this was asked for, for the disk was full.
    full: Arc<AtomicBool>,
}

impl Checkpoints {
    pub(super) async fn open(options: &sqlx::sqlite::SqliteConnectOptions) -> Result<Self, sqlx::Error> {
        let conn = options.connect().await?;
        Ok(Self { conn: Arc::new(Mutex::new(conn)), written: 0, pages: Arc::default(), full: Arc::default() })
    }

    /// Tells that a commit added about `bytes` to the log; starts a checkpoint when it is time.
    pub(super) fn wrote(&mut self, bytes: u64) {
        self.written += bytes;
        if self.written < EVERY {
            return;
        }
        // Taken: the one that runs will be followed by another, for `written` stays.
        let Ok(mut conn) = Arc::clone(&self.conn).try_lock_owned() else { return };
        self.written = 0;
        let (pages, full) = (Arc::clone(&self.pages), Arc::clone(&self.full));
        tokio::spawn(async move {
            match run(&mut conn, PASSIVE).await {
                Ok(found) => pages.store(found, Ordering::Relaxed),
                Err(error) => {
                    full.fetch_or(error.code() == Some(FULL), Ordering::Relaxed);
                    tracing::warn!(%error, "a checkpoint failed; the next one will try again");
                }
            }
        });
    }

    /// Whether the log has grown too long.
    pub(super) fn is_long(&self) -> bool {
        self.pages.load(Ordering::Relaxed) >= MOST_PAGES
    }

    /// Whether one did not fit on the disk; told once.
    pub(super) fn was_full(&self) -> bool {
        self.full.load(Ordering::Relaxed) && self.full.swap(false, Ordering::Relaxed)
    }

    /// Waits until the log can start over. Between batches, none on its way.
    pub(super) async fn restart(&self) {
        let mut conn = self.conn.lock().await;
        if let Err(error) = run(&mut conn, RESTART).await {
            tracing::warn!(%error, "the write-ahead log could not start over; it goes on growing");
        }
        // Asked again only after the next checkpoint: a reader that will not end must not stop every batch.
        self.pages.store(0, Ordering::Relaxed);
    }

    /// Waits for the one that runs.
    #[cfg(test)]
    pub(super) async fn idle(&self) {
        drop(self.conn.lock().await);
    }

    /// As if a reader had kept the log from starting over.
    #[cfg(test)]
    pub(super) fn pretend_long(&self) {
        self.pages.store(MOST_PAGES, Ordering::Relaxed);
    }

    pub(super) async fn close(self) -> Result<(), sqlx::Error> {
        match Arc::try_unwrap(self.conn) {
            Ok(conn) => conn.into_inner().close().await,
            // One still runs: it ends by itself, and its connection with it.
            Err(conn) => {
                drop(conn.lock().await);
                Ok(())
            }
        }
    }
}

/// Runs a checkpoint; the number of pages in the log.
async fn run(conn: &mut SqliteConnection, statement: &'static str) -> Result<u64, sqlx::Error> {
    let row = sqlx::query(statement).fetch_one(conn).await?;
    Ok(u64::try_from(row.try_get::<i64, _>(1)?).unwrap_or(0))
}
