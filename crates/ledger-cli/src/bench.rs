//! `ledgerd bench`: load over real gRPC, and what it cost.
//!
//! Producers call, workers hold one stream each and complete what they are given at once; both are tasks of this one
//! process, so that the time from enqueue to start is read from one monotonic clock. They use the generated clients
//! and not the SDK's worker, to leave the machine to the daemon.
//!
//! A figure is only worth something when the work was done: the run ends when all that was enqueued is DONE, and the
//! daemon's own counts must agree with the receipts. Figures of one machine move by 10 to 30 % from run to run; compare
//! ratios of runs made side by side.

mod histogram;
mod machine;
mod outage;
mod postgres;
mod producer;
mod report;
mod suite;
mod waiting;
mod worker;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ledgerd_client::v1::{GetAgentRequest, GetStatsRequest, GetStatsResponse, TaskState};
use ledgerd_client::{CancellationToken, Client};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::Code;

use crate::Global;
use crate::connect::connect;
use crate::daemon::{self, Daemon, cannot};
use crate::failure::{Exit, Failure};
use crate::output::{print, remark};
use crate::policy::Span;
use crate::time::{duration_from_wire, now};
pub(crate) use histogram::Histogram;
use machine::Spent;
use producer::Produced;
use report::{Outcome, Report};
use worker::Worked;

/// The type of all tasks, and the one that workers take.
const TASK_TYPE: &str = "bench";
/// A drain in which nothing ends for so long will not end.
const STUCK: Duration = Duration::from_secs(30);
/// How often the end of the drain is looked for.
const LOOK: Duration = Duration::from_millis(2);
/// Time that the daemon gets to close its store.
const STOP: Duration = Duration::from_secs(10);

/// `bench`.
#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    other: Option<Other>,
    /// Load the daemon that listens there, instead of one of its own; or several that serve one ledger
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', conflicts_with_all = ["data_dir", "store"])]
    target: Vec<String>,
    /// Workers go to these daemons on the same ledger; else to those that are loaded
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', requires = "target")]
    workers_at: Vec<String>,
    /// Producers, each with one call at a time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4_096))]
    callers: u32,
    /// Tasks a call; 1 is EnqueueTask, more is EnqueueTasks
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    batch: u32,
    /// Connections that the producers share
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4_096))]
    connections: u32,
    /// Worker streams
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    workers: u32,
    /// Tasks that each worker may hold
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    capacity: u32,
    /// Size of a payload; its first 8 bytes are the time of the call
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=1 << 20))]
    payload: u32,
    /// How long producers call
    #[arg(long, value_name = "DUR", default_value = "10s")]
    duration: Span,
    /// Tasks enqueued and not yet done at one time: producers wait beyond it; 0: without bound; else twice what the
    /// workers hold
    #[arg(long, value_name = "N")]
    backlog: Option<u32>,
    /// Acknowledge each task before its outcome, instead of letting the outcome stand for both
    #[arg(long)]
    explicit_acks: bool,
    /// Send a request id with each call
    #[arg(long)]
    request_ids: bool,
    /// Give each task an idempotency key of its own
    #[arg(long)]
    keys: bool,
    /// Tasks a second, spread evenly over the producers; else as fast as they are answered
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// End when so many tasks are enqueued, if that is before the duration
    #[arg(long, value_name = "N")]
    tasks: Option<u64>,
    /// Agent of the tasks
    #[arg(long, value_name = "NAME", default_value = "bench")]
    agent: String,
    /// Data directory of its own daemon; else a temporary one
    #[arg(long, value_name = "DIR")]
    data_dir: Option<std::path::PathBuf>,
    /// Store of its own daemon
    #[arg(long, value_name = "URL")]
    store: Option<String>,
}

/// What else there is to measure.
#[derive(Clone, Debug, clap::Subcommand)]
enum Other {
    /// Let the agents' backend fail, and see what retries do to it
    ///
    /// Agents with scripted workers share one backend, which fails for 30 s or has 40 % of its capacity for 20 s, while the
    /// daemon is killed with SIGKILL every few seconds; then the same without breaker and budget. One JSON object on
    /// standard output. Fails when a bound on load, goodput or tasks does not hold. Takes about eight minutes.
    Outage(outage::Args),
    /// Let many tasks wait that cannot run, and see what that does to those that can
    ///
    /// Tasks of an agent whose breaker is open, of one that is paused, and of a type nobody serves. One JSON object on
    /// standard output. Fails when a healthy agent's time from enqueue to start, at p99, is over 1.5 times what it is
    /// without them. Takes about two minutes.
    Waiting(waiting::Args),
    /// Put every goal of the project beside what this machine can do
    ///
    /// Each is a ratio of two figures of the same run: of the ledger, and of SQLite, gRPC or the disk without it. A table on
    /// standard error, one JSON object on standard output. Fails when a figure misses its floor, or when the rows of a
    /// ledger are not those that were acknowledged. Takes about ten minutes and 8 GB of disk; --quick under three.
    Suite(suite::Args),
    /// The goals on PostgreSQL, beside what its own pgbench does on the same server
    ///
    /// Takes databases of its own on the server and removes them. A table on standard error, one JSON object on standard
    /// output. Fails when a figure misses its floor, or when the rows of a ledger are not those that were acknowledged.
    /// Takes about fifteen minutes, --quick about three.
    Postgres(postgres::Args),
    /// One figure of this machine without a ledger, for the suite
    #[command(hide = true)]
    Yardstick(suite::yardstick::Args),
}

impl Default for Args {
    /// What the command line has without options.
    fn default() -> Self {
        Self {
            other: None,
            target: Vec::new(),
            workers_at: Vec::new(),
            callers: 16,
            batch: 100,
            connections: 4,
            workers: 4,
            capacity: 1_000,
            payload: 256,
            duration: Span(Duration::from_secs(10)),
            backlog: None,
            explicit_acks: false,
            request_ids: false,
            keys: false,
            rate: None,
            tasks: None,
            agent: "bench".into(),
            data_dir: None,
            store: None,
        }
    }
}

/// What producers and workers share.
struct Run {
    args: Args,
    /// Unique for the run; incarnations and request ids are made of it.
    id: u64,
    /// Where the clock of the payloads starts.
    start: Instant,
    /// Room for tasks that are not done.
    room: Semaphore,
    /// Outcomes receipted as DONE.
    done: AtomicU64,
    /// Tasks still to be enqueued.
    left: AtomicU64,
    /// The first error in words.
    error: Mutex<Option<String>>,
    workers_stop: CancellationToken,
    /// Worker streams that are open.
    streams: AtomicU64,
}

impl Run {
    fn new(args: Args) -> Self {
        let backlog = match args.backlog {
            Some(0) => Semaphore::MAX_PERMITS / 2,
            Some(backlog) => backlog.max(args.batch) as usize,
            None => (2 * args.workers as usize * args.capacity as usize).max(args.batch as usize),
        };
        let left = AtomicU64::new(args.tasks.unwrap_or(u64::MAX));
        Self {
            left,
            args,
            id: u64::try_from(now().as_millisecond()).unwrap_or(1).max(1),
            start: Instant::now(),
            room: Semaphore::new(backlog),
            done: AtomicU64::new(0),
            error: Mutex::new(None),
            workers_stop: CancellationToken::new(),
            streams: AtomicU64::new(0),
        }
    }

    /// Nanoseconds since the start.
    fn clock(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn blame(&self, what: impl FnOnce() -> String) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(what);
    }
}

impl Args {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        match self.other {
            Some(Other::Outage(args)) => return args.run().await,
            Some(Other::Waiting(args)) => return args.run().await,
            Some(Other::Suite(args)) => return args.run().await,
            Some(Other::Postgres(args)) => return args.run().await,
            Some(Other::Yardstick(args)) => return args.run().await,
            None => {}
        }
        if let Some(address) = self.target.first().cloned() {
            let target = Global { address: address.clone(), ..global.clone() };
            let loaded = async {
                let client = connect(&target).await?;
                refuse_leftovers(&client, &self.agent, "--agent names another for the run").await?;
                let addresses = self.target.clone();
                self.load(&target, &client, &addresses, None).await
            };
            return loaded.await.map_err(|failure| failure.at(&address))?.say();
        }
        let folder = tempfile::Builder::new()
            .prefix("ledgerd-bench-")
            .tempdir()
            .map_err(|error| cannot("make a temporary folder", &error))?;
        let data_dir = self.data_dir.clone().unwrap_or_else(|| folder.path().join("data"));
        let (told_to_end, guard) = (daemon::told_to_end()?, daemon::guard()?);
        let mut daemon = Daemon::start(&data_dir, self.store.as_deref(), &guard).await?;
        if machine::is_memory(&data_dir) && self.store.is_none() {
            remark("the data directory is in memory, where a flush costs nothing; --data-dir names a disk");
        }
        let (address, id) = (daemon.address.clone(), daemon.process.id());
        let loaded = async {
            // It asks nobody who they are, whatever the flags say about other daemons.
            let own = Global { address: address.clone(), output: global.output, ..Global::default() };
            let client = connect(&own).await?;
            refuse_leftovers(&client, &self.agent, "--agent names another for the run").await?;
            self.load(&own, &client, std::slice::from_ref(&address), Some(id)).await
        };
        let loaded = tokio::select! {
            loaded = loaded => loaded,
            () = told_to_end => Err(Failure::new(Exit::Failure, "interrupted; nothing was measured")),
        };
        let loaded = loaded.map_err(|failure| daemon.blame(failure));
        daemon.process.stop(STOP).await;
        loaded?.say()
    }

    /// Loads the daemons at `addresses`, in turn; counts are the first one's, which `client` speaks to. `global` says how to
    /// connect to all of them.
    async fn load(
        self,
        global: &Global,
        client: &Client,
        addresses: &[String],
        process: Option<u32>,
    ) -> Result<Report, Failure> {
        let args = self.clone();
        let workers_at = if args.workers_at.is_empty() { addresses } else { &args.workers_at };
        let run = Arc::new(Run::new(self));
        let before = stats(client).await?;
        let (spent_before, own_before) = (Spent::of(process, &before), Spent::read(std::process::id()));
        let at = |address: &String| Global { address: address.clone(), ..global.clone() };
        let mut workers = JoinSet::new();
        for (index, address) in (0..args.workers).zip(workers_at.iter().cycle()) {
            let stream = worker::Stream::open(at(address).connect().await?, &run, index).await?;
            workers.spawn(stream.serve(Arc::clone(&run)));
        }
        let mut connections = Vec::new();
        let share = addresses.len() as u32;
        for (_, address) in (0..args.connections.max(share).min(args.callers)).zip(addresses.iter().cycle()) {
            connections.push(at(address).connect().await?);
        }

        let (began, end) = (run.clock(), Instant::now() + args.duration.0);
        let mut producers = JoinSet::new();
        for (caller, connection) in (0..args.callers).zip(connections.iter().cycle()) {
            producers.spawn(producer::produce(connection.clone(), Arc::clone(&run), caller, end));
        }
        let mut all = Box::pin(async move {
            let mut produced = Produced::default();
            while let Some(one) = producers.join_next().await {
                produced.merge(&one.expect("a producer does not panic"));
            }
            produced
        });
        // They end before their time when they have no more tasks to send.
        let ended = timeout_at(end, &mut all).await.ok();
        let (done_in_time, window) = (run.done.load(Ordering::Relaxed), elapsed(&run, began));
        // Calls that are on their way are waited for, but not for room: nothing more is sent.
        run.room.close();
        let produced = match ended {
            Some(produced) => produced,
            None => all.await,
        };
        let lost = drained(&run, produced.tasks).await;
        let total = elapsed(&run, began);
        let after = stats(client).await?;
        let spent = Spent::of(process, &after).since(&spent_before);
        let own_spent = Spent::read(std::process::id()).since(&own_before);
        let memory = process.and_then(machine::resident);
        run.workers_stop.cancel();
        let mut worked = Worked::default();
        while let Some(one) = workers.join_next().await {
            worked.merge(&one.expect("a worker does not panic"));
        }
        let done = run.done.load(Ordering::Relaxed);
        let first_error = run.error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Report::new(Outcome {
            args,
            own: process.is_some(),
            version: after.version.clone(),
            window,
            total,
            done,
            done_in_time,
            lost,
            counted: count(&after, TaskState::Done).saturating_sub(count(&before, TaskState::Done)),
            transitions: after.transitions.saturating_sub(before.transitions),
            commits: after.commits.saturating_sub(before.commits),
            spent,
            memory,
            client_cpu: own_spent.cpu,
            produced,
            worked,
            first_error,
        }))
    }
}

async fn stats(client: &Client) -> Result<GetStatsResponse, Failure> {
    Ok(client.admin().get_stats(GetStatsRequest {}).await?.into_inner())
}

fn count(stats: &GetStatsResponse, state: TaskState) -> u64 {
    stats.counts.iter().filter(|count| count.state() == state).map(|count| count.count).sum()
}

fn elapsed(run: &Run, since: u64) -> Duration {
    Duration::from_nanos(run.clock().saturating_sub(since))
}

/// Tasks of an earlier run would be worked on as if they were ours.
pub(crate) async fn refuse_leftovers(client: &Client, agent: &str, hint: &str) -> Result<(), Failure> {
    let found = match client.admin().get_agent(GetAgentRequest { agent: agent.into() }).await {
        Err(status) if status.code() == Code::NotFound => return Ok(()),
        found => found?.into_inner().agent.unwrap_or_default(),
    };
    let waiting: u64 = found.counts.iter().map(|count| count.count).sum();
    if waiting > 0 {
        let sentence = format!("agent {agent} has {waiting} tasks that are not done; {hint}");
        return Err(Failure::new(Exit::Failure, sentence));
    }
    Ok(())
}

/// Waits until so many tasks are done; gives the number of those that will not be.
async fn drained(run: &Run, tasks: u64) -> u64 {
    let (mut last, mut moved) = (0, Instant::now());
    loop {
        let done = run.done.load(Ordering::Relaxed);
        if done >= tasks {
            return 0;
        }
        if done != last {
            (last, moved) = (done, Instant::now());
        } else if run.streams.load(Ordering::Relaxed) == 0 {
            return tasks - done;
        } else if moved.elapsed() > STUCK {
            run.blame(|| {
                format!("{} tasks were not done {} s after the last one", tasks - done, STUCK.as_secs())
            });
            return tasks - done;
        }
        sleep(LOOK).await;
    }
}

impl Report {
    fn say(&self) -> Result<(), Failure> {
        remark(self.table().trim_end());
        print(&self.json())?;
        match self.fault() {
            None => Ok(()),
            Some(fault) => Err(Failure::new(Exit::Failure, fault)),
        }
    }
}

impl Spent {
    /// What the daemon has spent so far: the kernel's figures for one of our own, else its word.
    fn of(process: Option<u32>, stats: &GetStatsResponse) -> Self {
        process.map(Self::read).unwrap_or_else(|| Self {
            cpu: stats.cpu_time.as_ref().map(duration_from_wire),
            written: Some(stats.written_bytes).filter(|bytes| *bytes > 0),
        })
    }
}
