//! `ledgerd bench-loop`: the ledger's loop by itself, and prepared statements on the same schema without it.
//!
//! For `bench suite`. Both make the same rows durable: a task and what its producer said, its result, and a history entry for
//! each of three transitions, in two commits: enqueue with claim, and completion. The loop also decides, keeps what waits
//! and what runs in memory, and answers.

use bytes::Bytes;
use clap::Parser;
use ledger_core::session::Hello;
use ledger_core::store::TaskData;
use ledger_core::{Outcome, Overrides};
use ledgerd::clock::Clock;
use ledgerd::ledger::command::{BatchMode, FromWorker, NewTask, Settlement, ToWorker};
use ledgerd::ledger::start;
use ledgerd::store::{Options, open};
use rusqlite::{Connection, Statement, params};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Tasks in a batch.
const BATCH: u64 = 1_000;
/// Entries of history in a row, as the ledger has them.
const ENTRIES: usize = 16;
/// Batches on their way at one time, so that the loop never waits for its caller.
const AHEAD: usize = 3;

type Fault = Box<dyn std::error::Error + Send + Sync>;

/// `bench-loop`.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    #[arg(long)]
    rounds: usize,
    #[arg(long)]
    seconds: u64,
    #[arg(long)]
    dir: PathBuf,
}

impl Args {
    /// Lifecycles a second of both, for each round, as JSON.
    pub(crate) async fn run(&self) -> Result<(), Fault> {
        let duration = Duration::from_secs(self.seconds);
        let mut pairs = Vec::new();
        for round in 0..self.rounds {
            let dir = self.dir.join(format!("loop-{round}"));
            std::fs::create_dir(&dir)?;
            let ledger = ledger(&dir, duration).await?;
            let schema =
                tokio::task::spawn_blocking(move || same_schema(&dir.join("ledger.db"), duration)).await??;
            pairs.push((ledger, schema));
        }
        println!("{}", serde_json::to_string(&pairs)?);
        Ok(())
    }
}

/// Lifecycles a second of the loop.
async fn ledger(dir: &Path, duration: Duration) -> Result<f64, Fault> {
    let (store, reader) = open(dir, Options::default()).await?;
    let stop = CancellationToken::new();
    let (handle, running) =
        start(Box::new(store), reader, Clock::start(), Arc::default(), None, Arc::default(), stop.clone())
            .await?;
    let agent: Arc<str> = "bench".into();
    let hello = Hello {
        worker: "worker-1".into(),
        incarnation: 1,
        agents: vec![Arc::clone(&agent)],
        types: None,
        capacity: 100_000,
        labels: Vec::new(),
        sdk: String::new(),
        held: Vec::new(),
        unreceipted: Vec::new(),
    };
    let mut opened = handle.hello(hello).await?;
    let session = opened.session;
    let task = move |_| {
        Ok(NewTask {
            agent: Arc::clone(&agent),
            task_type: "bench".into(),
            priority: 5,
            run_at: None,
            deadline: None,
            policy: Overrides::NONE,
            frees_key: false,
            data: Arc::new(TaskData { payload: Bytes::from_static(&[b'x'; 256]), ..TaskData::default() }),
        })
    };
    let began = Instant::now();
    let mut producers = tokio::task::JoinSet::new();
    for _ in 0..AHEAD {
        let (handle, task) = (handle.clone(), task.clone());
        producers.spawn(async move {
            while began.elapsed() < duration {
                handle.enqueue((0..BATCH).map(&task).collect(), BatchMode::PerItem, None).await?;
            }
            Ok::<_, ledgerd::ledger::command::LedgerError>(())
        });
    }
    let mut done = 0_u64;
    while began.elapsed() < duration {
        let Some(frame) = opened.outbox.recv().await else { return Err("the session ended".into()) };
        match frame {
            ToWorker::Assignments(items) => {
                opened.unsent.sent(items.iter().map(|item| item.data.payload.len()).sum());
                let outcome = |item: &ledgerd::ledger::command::Assignment| Settlement {
                    task: item.task,
                    fence: item.fence,
                    outcome: Outcome::Complete,
                    result: Some(Bytes::from_static(b"0123456789abcdef")),
                    checkpoint: None,
                    follow_ups: Vec::new(),
                    digest: item.fence,
                };
                handle.frame(session, FromWorker::Outcomes(items.iter().map(outcome).collect())).await?;
            }
            ToWorker::Receipts(receipts) => {
                done += receipts.iter().filter(|receipt| receipt.result.is_ok()).count() as u64;
            }
            _ => {}
        }
    }
    let rate = done as f64 / began.elapsed().as_secs_f64();
    producers.abort_all();
    stop.cancel();
    drop(handle);
    running.await??;
    Ok(rate)
}

/// Lifecycles a second of the same rows, written into the ledger's own file after it.
fn same_schema(file: &Path, duration: Duration) -> Result<f64, rusqlite::Error> {
    let conn = Connection::open(file)?;
    conn.execute_batch(
        "PRAGMA synchronous = FULL; PRAGMA cache_size = -65536; PRAGMA temp_store = MEMORY; \
         PRAGMA wal_autocheckpoint = 4000;",
    )?;
    let number = |sql: &str| conn.query_row(sql, [], |row| row.get::<_, i64>(0));
    let mut id = number("SELECT MAX(id) FROM tasks")?;
    let mut seq = number("SELECT last_seq FROM meta")?;
    let mut spec = conn.prepare(
        "INSERT INTO task_specs (id, agent, task_type, created_at, payload, digest, frees_key) \
         VALUES (?1, 1, 'bench', ?2, ?3, 0, 0)",
    )?;
    let mut insert = conn.prepare(
        "INSERT INTO tasks (id, state, reason, priority, run_at, calendar, queued_at, updated_at, version, fence, delivery, \
             attempt, idle_deliveries, history, held) \
         VALUES (?1, 2, 0, 5, ?2, 0, ?2, ?2, 2, 1, 1, 0, 1, ?3, ?4)",
    )?;
    let mut complete = conn.prepare(
        "UPDATE tasks SET state = 5, updated_at = ?2, version = 3, attempt = 1, idle_deliveries = 0, history = ?3, \
             held = NULL, result = ?4 \
         WHERE id = ?1",
    )?;
    let mut history =
        conn.prepare("INSERT INTO task_history (seq, task, at, entries) VALUES (?1, ?2, ?3, ?4)")?;
    let (payload, output) = ([b'x'; 256], *b"0123456789abcdef");
    let (began, mut rounds) = (Instant::now(), 0_u64);
    while began.elapsed() < duration {
        let (now, first) = (id, id + 1);
        conn.execute_batch("BEGIN IMMEDIATE")?;
        let mut entries = Vec::with_capacity(2 * BATCH as usize);
        for _ in 0..BATCH {
            id += 1;
            spec.execute(params![id, now, &payload[..]])?;
            insert.execute(params![
                id,
                now,
                seq + 2,
                format!(r#"["worker-1",1,1,{now},null,{now},0,0,0]"#)
            ])?;
            entries.push(format!("[{id},1,0,1,null,1,0,0,0,0]"));
            entries.push(format!(r#"[{id},2,1,2,1,2,0,0,1,0,"worker-1"]"#));
            seq += 2;
        }
        put(&mut history, seq, now, &entries)?;
        conn.execute_batch("COMMIT; BEGIN IMMEDIATE")?;
        entries.clear();
        for (id, before) in (first..=id).zip((seq - 2 * BATCH as i64 + 2..).step_by(2)) {
            seq += 1;
            complete.execute(params![id, now, seq, &output[..]])?;
            entries.push(format!(r#"[{id},3,{},4,2,5,0,0,1,1,"worker-1",null,1]"#, seq - before));
        }
        put(&mut history, seq, now, &entries)?;
        conn.execute_batch("COMMIT")?;
        rounds += 1;
    }
    Ok((rounds * BATCH) as f64 / began.elapsed().as_secs_f64())
}

/// Writes entries of history, the last of them with this number.
fn put(statement: &mut Statement<'_>, last: i64, at: i64, entries: &[String]) -> Result<(), rusqlite::Error> {
    let first = last - entries.len() as i64 + 1;
    for (seq, entries) in (first..).step_by(ENTRIES).zip(entries.chunks(ENTRIES)) {
        statement.execute(params![seq, 0, at, format!("[{}]", entries.join(","))])?;
    }
    Ok(())
}
