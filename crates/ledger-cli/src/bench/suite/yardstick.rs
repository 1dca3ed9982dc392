//! What the machine can do without a ledger: the figures that a ledger's are divided by.
//!
//! Each runs in a process of its own, as the daemon does, and says one JSON object on standard output.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, params};
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use super::echo;
use crate::bench::Histogram;
use crate::bench::machine::Spent;
use crate::daemon::cannot;
use crate::failure::{Exit, Failure};
use crate::output::print;
use crate::policy::Span;

/// A page of SQLite's.
const PAGE: usize = 4_096;
/// From one paced flush to the next: as often as the load of G4 enqueues.
const PACE: Duration = Duration::from_millis(1_000 / super::LOW as u64);
/// What one sync of the payload row covers: ten payloads of 64 KiB, a call of its load.
const CHUNK: usize = 640 << 10;

/// `bench yardstick`.
#[derive(Clone, Debug, clap::Args)]
pub(in crate::bench) struct Args {
    /// Which
    #[arg(value_enum)]
    which: Which,
    /// Folder for its files
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// How long
    #[arg(long, value_name = "DUR", default_value = "5s")]
    duration: Span,
    /// Tasks in a commit
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    batch: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
pub(super) enum Which {
    /// Lifecycles a second in plain SQLite, on the narrowest schema that has tasks and their history
    FastSchema,
    /// Milliseconds of an append of 4 KiB and its fdatasync, one after the other
    Flush,
    /// The same at 250 a second: a disk that had nothing to do is slower
    PacedFlush,
    /// Megabytes a second of appends of 640 KiB, each with its fdatasync
    Append,
    /// Answers each EnqueueTaskRequest with itself, until it is killed
    Echo,
}

/// What one says.
#[derive(Debug, Default, Serialize, serde::Deserialize)]
pub(super) struct Figure {
    /// Per second, or milliseconds at p50.
    pub(super) value: f64,
    /// CPU time for one, in microseconds, of what is told per second.
    pub(super) cpu_us: Option<f64>,
}

impl Args {
    pub(in crate::bench) async fn run(self) -> Result<(), Failure> {
        let figure = |value| Figure { value, cpu_us: None };
        let figure = match self.which {
            Which::FastSchema => fast_schema(&self.dir, self.duration.0, self.batch.into())
                .map_err(|error| database("run", &error))?,
            Which::Flush | Which::PacedFlush => {
                let pace = if self.which == Which::PacedFlush { PACE } else { Duration::ZERO };
                figure(
                    flush(&self.dir, self.duration.0, pace).await.map_err(|error| cannot("flush", &error))?,
                )
            }
            Which::Append => {
                figure(append(&self.dir, self.duration.0).map_err(|error| cannot("append", &error))?)
            }
            Which::Echo => return echo::serve().await,
        };
        print(&(serde_json::to_string(&figure).expect("a number has a JSON form") + "\n"))
    }
}

impl Which {
    /// Its name on the command line.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::FastSchema => "fast-schema",
            Self::Flush => "flush",
            Self::PacedFlush => "paced-flush",
            Self::Append => "append",
            Self::Echo => "echo",
        }
    }
}

fn database(what: &str, error: &rusqlite::Error) -> Failure {
    Failure::new(Exit::Failure, format!("cannot {what} SQLite: {error}"))
}

/// Settings as the daemon's, but checkpoints are SQLite's own.
fn open(path: &Path) -> rusqlite::Result<Connection> {
    let conn = Connection::open(path)?;
    conn.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -65536; \
         PRAGMA temp_store = MEMORY; PRAGMA wal_autocheckpoint = 4000;",
    )?;
    Ok(conn)
}

/// One thread, prepared statements, one commit for a batch of tasks: some of them come, those before are claimed, those before
/// these are completed; a history row for each. No index but the keys, no check, nothing else; what differs from task to
/// task is a parameter.
fn fast_schema(dir: &Path, duration: Duration, batch: i64) -> rusqlite::Result<Figure> {
    let conn = open(&dir.join("fast.db"))?;
    conn.execute_batch(
        "CREATE TABLE tasks (id INTEGER PRIMARY KEY, agent TEXT, kind TEXT, state INTEGER, priority INTEGER, \
             run_at INTEGER, attempts INTEGER, max_attempts INTEGER, version INTEGER, worker TEXT, token INTEGER, \
             lease_until INTEGER, created_at INTEGER, updated_at INTEGER, payload BLOB, result BLOB) STRICT; \
         CREATE TABLE history (seq INTEGER PRIMARY KEY, task INTEGER, version INTEGER, from_state INTEGER, \
             to_state INTEGER, at INTEGER, worker TEXT, detail TEXT) STRICT;",
    )?;
    let mut insert = conn.prepare(
        "INSERT INTO tasks (id, agent, kind, state, priority, run_at, attempts, max_attempts, version, created_at, \
         updated_at, payload) VALUES (?1, ?2, ?3, 0, ?4, ?5, 0, ?6, 1, ?7, ?7, ?8)",
    )?;
    let mut claim = conn.prepare(
        "UPDATE tasks SET state = 1, attempts = ?2, version = ?3, worker = ?4, token = ?5, lease_until = ?6, \
         updated_at = ?7 WHERE id = ?1",
    )?;
    let mut complete = conn.prepare(
        "UPDATE tasks SET state = 2, version = ?2, worker = NULL, lease_until = NULL, updated_at = ?3, result = ?4 \
         WHERE id = ?1 AND token = ?5",
    )?;
    let mut history = conn.prepare(
        "INSERT INTO history (task, version, from_state, to_state, at, worker, detail) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?;
    let (payload, result) = ([b'x'; 256], *b"0123456789abcdef");
    let (none, nobody) = (None::<i64>, None::<&str>);
    let before = Spent::read(std::process::id());
    let (start, mut rounds, mut first) = (Instant::now(), 0_u32, 1_i64);
    while start.elapsed() < duration {
        let now = first;
        conn.execute_batch("BEGIN IMMEDIATE")?;
        for id in first..first + batch {
            insert.execute(params![id, "agent-1", "kind-1", 5, now, 3, now, &payload[..]])?;
            history.execute(params![id, 1, none, 0, now, nobody, nobody])?;
        }
        for id in (first - batch).max(1)..first {
            claim.execute(params![id, 1, 2, "worker-1", 1, now, now])?;
            history.execute(params![id, 2, 0, 1, now, "worker-1", nobody])?;
        }
        for id in (first - 2 * batch).max(1)..(first - batch).max(1) {
            complete.execute(params![id, 3, now, &result[..], 1])?;
            history.execute(params![id, 3, 1, 2, now, "worker-1", nobody])?;
        }
        conn.execute_batch("COMMIT")?;
        (rounds, first) = (rounds + 1, first + batch);
    }
    // The first two commits are not whole.
    let lifecycles = f64::from(rounds.saturating_sub(2)) * batch as f64;
    let cpu = Spent::read(std::process::id()).since(&before).cpu;
    Ok(Figure {
        value: lifecycles / start.elapsed().as_secs_f64(),
        cpu_us: cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / lifecycles.max(1.0)),
    })
}

/// The median, in milliseconds. One begins when the one before ended, and `pace` after that began at the earliest.
async fn flush(dir: &Path, duration: Duration, pace: Duration) -> std::io::Result<f64> {
    let mut file = File::create(dir.join("flush"))?;
    let (page, start, mut times) = ([b'x'; PAGE], Instant::now(), Histogram::default());
    while start.elapsed() < duration {
        let began = Instant::now();
        file.write_all(&page)?;
        file.sync_data()?;
        times.record(began.elapsed());
        // A timer waits for the end of a millisecond.
        if !pace.is_zero() {
            sleep_until(began + pace).await;
        }
    }
    Ok(times.percentile_ms(0.5).unwrap_or_default())
}

fn append(dir: &Path, duration: Duration) -> std::io::Result<f64> {
    let mut file = File::create(dir.join("append"))?;
    let (chunk, start, mut written) = (vec![b'x'; CHUNK], Instant::now(), 0_u64);
    while start.elapsed() < duration {
        file.write_all(&chunk)?;
        file.sync_data()?;
        written += CHUNK as u64;
    }
    Ok(written as f64 / 1e6 / start.elapsed().as_secs_f64())
}
