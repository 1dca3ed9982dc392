//! `ledgerd bench postgres`: the goals on a PostgreSQL server, as ratios against the server's own pgbench, and against the
//! ledger itself under better circumstances.
//!
//! Each measurement has a database of its own, made and removed with the server's psql. After a load its daemons are killed
//! and its rows counted, as the suite does.

mod waits;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ledgerd_client::Client;
use serde::Serialize;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use super::Args as Load;
use super::machine::Machine;
use super::report::Report as Loaded;
use super::suite::goal::{self, Goals, Row, rounded};
use crate::Global;
use crate::daemon::{self, Daemon, cannot};
use crate::failure::{Exit, Failure};
use crate::guard::Guard;
use crate::policy::Span;
use crate::time::now;

/// Tasks a second at which nothing waits for anything but commits.
const LOW: u32 = 100;
const STOP: Duration = Duration::from_secs(30);
/// Rows of pgbench's largest table, in 100,000.
const SCALE: &str = "20";
/// All there are.
const GOALS: [&str; 7] = ["G9", "replicas", "elsewhere", "locks", "statistics", "stored", "snapshot"];

/// `bench postgres`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// A database on the server; its user may make others
    #[arg(long, value_name = "URL")]
    store: String,
    /// Fewer and shorter rounds, a tenth of the stored tasks
    #[arg(long)]
    quick: bool,
    /// Only rows whose goal has these first words
    #[arg(long, value_name = "GOAL", value_delimiter = ',')]
    only: Vec<String>,
    /// Folder with the server's psql and pgbench; else as pg_config says
    #[arg(long, value_name = "DIR")]
    bin: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Size {
    rounds: usize,
    seconds: u64,
    finished: u64,
    snapshot_seconds: u64,
}

/// What has no goal but is good to know, for sizing.
#[derive(Debug, Default, Serialize)]
struct Facts {
    server: String,
    pgbench_tps: Vec<f64>,
    lifecycles_per_s: Vec<f64>,
    daemon_cpu_us: Vec<f64>,
    bytes_per_finished_task: f64,
    start_elsewhere_p50_p99_ms: Vec<(f64, f64)>,
    enqueue_p50_ms: Vec<f64>,
    /// Rate while an old snapshot is held open, against before, and dead rows at its end.
    held_snapshot_ratio: Vec<f64>,
    held_snapshot_dead_rows: Vec<u64>,
    /// What was waited for, and how often that was seen: `extend` is room at the end of a table, which the server makes.
    lock_waits: BTreeMap<String, u64>,
    rows_counted_after_a_kill: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    quick: bool,
    machine: Machine,
    size: Size,
    rows: Vec<Row>,
    facts: Facts,
    seconds: f64,
}

impl Args {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (told_to_end, guard) = (daemon::told_to_end()?, daemon::guard()?);
        let server = Server::of(&self, guard).await?;
        let report = tokio::select! {
            report = self.all(&server) => report?,
            () = told_to_end => return Err(Failure::new(Exit::Failure, "interrupted; nothing was measured")),
        };
        goal::tell(&report, &report.rows)
    }

    async fn all(&self, server: &Server) -> Result<Report, Failure> {
        let started = Instant::now();
        let size = match self.quick {
            true => Size { rounds: 1, seconds: 4, finished: 100_000, snapshot_seconds: 15 },
            false => Size { rounds: 3, seconds: 10, finished: 1_000_000, snapshot_seconds: 180 },
        };
        let facts =
            Facts { server: server.ask(&server.url, "SHOW server_version").await?, ..Facts::default() };
        let goals = Goals::of(&self.only, &GOALS)?;
        let mut suite = Suite { server, size, goals, facts };
        suite.throughput().await?;
        suite.elsewhere().await?;
        suite.locks().await?;
        suite.statistics().await?;
        suite.stored().await?;
        suite.snapshot().await?;
        let Suite { goals, facts, .. } = suite;
        Ok(Report {
            version: env!("CARGO_PKG_VERSION"),
            quick: self.quick,
            machine: Machine::this(),
            size,
            rows: goals.rows,
            facts,
            seconds: started.elapsed().as_secs_f64().round(),
        })
    }
}

/// A server, and what comes with it.
struct Server {
    url: String,
    bin: PathBuf,
    guard: Guard,
    folder: tempfile::TempDir,
}

/// Daemons on one database.
struct Ledger<'a> {
    server: &'a Server,
    name: String,
    url: String,
    daemons: Vec<Daemon>,
}

impl Server {
    async fn of(args: &Args, guard: Guard) -> Result<Self, Failure> {
        let bin = match &args.bin {
            Some(bin) => bin.clone(),
            None => PathBuf::from(output(Command::new("pg_config").arg("--bindir")).await?),
        };
        let folder = tempfile::Builder::new()
            .prefix("ledgerd-bench-")
            .tempdir()
            .map_err(|error| cannot("make a temporary folder", &error))?;
        Ok(Self { url: args.store.clone(), bin, guard, folder })
    }

    /// What a statement says.
    async fn ask(&self, url: &str, sql: &str) -> Result<String, Failure> {
        psql(&self.bin, url, &[sql]).await
    }

    async fn number(&self, url: &str, sql: &str) -> Result<u64, Failure> {
        let said = self.ask(url, sql).await?;
        said.parse().map_err(|_| Failure::new(Exit::Failure, format!("no number but {said:?}")))
    }

    /// A database of its own: its name and address.
    async fn database(&self) -> Result<(String, String), Failure> {
        let name = format!("ledgerd_bench_{}", now().as_nanosecond());
        self.ask(&self.url, &format!("CREATE DATABASE {name} TEMPLATE template0")).await?;
        let (base, rest) = self.url.split_once("://").unwrap_or(("postgres", &self.url));
        let (place, parameters) = rest.split_once('?').unwrap_or((rest, ""));
        let host = place.split_once('/').map_or(place, |(host, _)| host);
        let question = if parameters.is_empty() { "" } else { "?" };
        Ok((name.clone(), format!("{base}://{host}/{name}{question}{parameters}")))
    }

    async fn remove(&self, name: &str) -> Result<(), Failure> {
        self.ask(&self.url, &format!("DROP DATABASE {name} WITH (FORCE)")).await.map(drop)
    }

    /// Transactions a second of pgbench's own script of three writes, 16 clients.
    async fn pgbench(&self, seconds: u64) -> Result<f64, Failure> {
        let (name, url) = self.database().await?;
        let pgbench = || Command::new(self.bin.join("pgbench"));
        output(pgbench().args(["-i", "-q", "-s", SCALE, &url])).await?;
        let seconds = seconds.to_string();
        let said =
            output(pgbench().args(["-N", "-c", "16", "-j", "2", "-M", "prepared", "-T", &seconds, &url]))
                .await?;
        self.remove(&name).await?;
        let tps = said
            .lines()
            .find_map(|line| line.strip_prefix("tps = ")?.split_whitespace().next()?.parse().ok());
        tps.ok_or_else(|| Failure::new(Exit::Failure, format!("pgbench told no rate: {said}")))
    }

    async fn ledger(&self, daemons: usize) -> Result<Ledger<'_>, Failure> {
        let (name, url) = self.database().await?;
        let mut ledger = Ledger { server: self, name, url, daemons: Vec::new() };
        for _ in 0..daemons {
            ledger.start().await?;
        }
        Ok(ledger)
    }
}

impl Ledger<'_> {
    async fn start(&mut self) -> Result<(), Failure> {
        let folder: &Path = self.server.folder.path();
        self.daemons.push(Daemon::start(folder, Some(&self.url), &self.server.guard).await?);
        Ok(())
    }

    fn addresses(&self) -> Vec<String> {
        self.daemons.iter().map(|daemon| daemon.address.clone()).collect()
    }

    async fn load(&self, load: Load) -> Result<Loaded, Failure> {
        let client = Client::connect(&self.daemons[0].address).await?;
        let process = (self.daemons.len() == 1).then(|| self.daemons[0].process.id());
        let loaded = load.load(&Global::default(), &client, &self.addresses(), process).await?;
        match loaded.fault() {
            Some(fault) => Err(Failure::new(Exit::Failure, fault)),
            None => Ok(loaded),
        }
    }

    /// Kills the daemons and counts what is stored: how many history rows there are.
    async fn count(&mut self, tasks: u64, transitions: u64) -> Result<u64, Failure> {
        for daemon in &mut self.daemons {
            daemon.process.kill();
        }
        let done = self.server.number(&self.url, "SELECT count(*) FROM tasks WHERE state = 5").await?;
        let rows = self.server.number(&self.url, "SELECT count(*) FROM history").await?;
        if (done, rows) == (tasks, transitions) {
            return Ok(rows);
        }
        let sentence = format!(
            "{tasks} tasks and {transitions} transitions were acknowledged; after a kill {done} tasks are done and {rows} \
             rows of history are there"
        );
        Err(Failure::new(Exit::Failure, sentence))
    }

    async fn end(mut self) -> Result<(), Failure> {
        for daemon in &mut self.daemons {
            daemon.process.stop(STOP).await;
        }
        self.server.remove(&self.name).await
    }
}

struct Suite<'a> {
    server: &'a Server,
    size: Size,
    goals: Goals<'a>,
    facts: Facts,
}

impl Suite<'_> {
    fn bulk(&self) -> Load {
        let duration = Span(Duration::from_secs(self.size.seconds));
        Load { duration, keys: true, request_ids: true, ..Load::default() }
    }

    /// A load on a new ledger with so many daemons, whose rows are counted.
    async fn fresh(&mut self, daemons: usize) -> Result<Loaded, Failure> {
        let mut ledger = self.server.ledger(daemons).await?;
        let loaded = ledger.load(self.bulk()).await?;
        let (tasks, transitions) = loaded.made();
        self.facts.rows_counted_after_a_kill += ledger.count(tasks, transitions).await?;
        ledger.end().await?;
        Ok(loaded)
    }

    async fn throughput(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["G9", "replicas"]) {
            return Ok(());
        }
        let (mut ratios, mut replicas) = (Vec::new(), Vec::new());
        for _ in 0..self.size.rounds {
            let tps = self.server.pgbench(self.size.seconds).await?;
            // The machine gets slower and faster meanwhile: one daemon before three, and after them.
            let before = self.fresh(1).await?;
            let three = self.fresh(3).await?;
            let after = self.fresh(1).await?;
            let one = f64::midpoint(before.rate(), after.rate());
            ratios.push(one / tps);
            replicas.push(three.rate() / one);
            self.facts.pgbench_tps.push(tps.round());
            self.facts.lifecycles_per_s.push(one.round());
            self.facts.daemon_cpu_us.extend(before.server_cpu().map(rounded));
        }
        self.goals.row(
            "G9",
            "lifecycles over gRPC, 16 × 100, against transactions of pgbench -N -c 16",
            "×",
            (6.0, 10.0),
            ratios,
        );
        self.goals.row(
            "replicas",
            "rate of three daemons on this machine, against one",
            "",
            (1.0, 1.5),
            replicas,
        );
        Ok(())
    }

    async fn elsewhere(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["elsewhere"]) {
            return Ok(());
        }
        let mut ratios = Vec::new();
        for _ in 0..self.size.rounds {
            let ledger = self.server.ledger(2).await?;
            let client = Client::connect(&ledger.daemons[0].address).await?;
            let load = Load {
                callers: 4,
                batch: 1,
                workers: 1,
                capacity: 100,
                rate: Some(LOW),
                workers_at: vec![ledger.daemons[1].address.clone()],
                ..self.bulk()
            };
            let loaded =
                load.load(&Global::default(), &client, &[ledger.daemons[0].address.clone()], None).await?;
            let figures = loaded.starts().0.zip(loaded.starts().1).zip(loaded.calls().0);
            let ((p50, p99), commit) =
                figures.ok_or_else(|| Failure::new(Exit::Failure, "nothing was started elsewhere"))?;
            ratios.push(p50 / commit);
            self.facts.start_elsewhere_p50_p99_ms.push((rounded(p50), rounded(p99)));
            self.facts.enqueue_p50_ms.push(rounded(commit));
            ledger.end().await?;
        }
        self.goals.row(
            "elsewhere",
            "enqueue at one daemon to start at another, p50 at 100/s, against an enqueue's own p50",
            "×",
            (3.0, 2.0),
            ratios,
        );
        Ok(())
    }

    async fn locks(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["locks"]) {
            return Ok(());
        }
        let ledger = self.server.ledger(3).await?;
        let seconds = 6 * self.size.seconds;
        let load = Load { duration: Span(Duration::from_secs(seconds)), ..self.bulk() };
        let (loaded, waits) =
            tokio::join!(ledger.load(load), waits::long(&self.server.bin, &ledger.url, seconds));
        loaded?;
        self.facts.lock_waits = waits?;
        ledger.end().await?;
        self.goals.row(
            "locks",
            "waits for a lock over 10 ms that were seen under load of three daemons",
            "",
            (0.0, -1.0),
            vec![self.facts.lock_waits.values().sum::<u64>() as f64],
        );
        Ok(())
    }

    async fn statistics(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["statistics"]) {
            return Ok(());
        }
        let mut ratios = Vec::new();
        for _ in 0..self.size.rounds {
            let fresh = self.fresh(1).await?.rate();
            let ledger = self.server.ledger(1).await?;
            // Nobody looks at the tables again once they have been seen empty.
            let off = "DO $$ DECLARE t text; BEGIN FOR t IN SELECT relname FROM pg_class JOIN pg_namespace AS n \
                ON n.oid = relnamespace WHERE relkind = 'r' AND nspname = 'public' LOOP \
                EXECUTE format('ALTER TABLE %I SET (autovacuum_enabled = off)', t); END LOOP; END $$";
            self.server.ask(&ledger.url, off).await?;
            self.server.ask(&ledger.url, "ANALYZE").await?;
            ratios.push(ledger.load(self.bulk()).await?.rate() / fresh);
            ledger.end().await?;
        }
        self.goals.row(
            "statistics",
            "rate with statistics of empty tables, against fresh ones",
            "",
            (0.8, 1.0),
            ratios,
        );
        Ok(())
    }

    async fn stored(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["stored"]) {
            return Ok(());
        }
        let ledger = self.server.ledger(1).await?;
        let fill = Load {
            tasks: Some(self.size.finished),
            duration: Span(Duration::from_secs(3_600)),
            ..self.bulk()
        };
        ledger.load(fill).await?;
        let size = self.server.number(&ledger.url, "SELECT pg_database_size(current_database())").await?;
        self.facts.bytes_per_finished_task = rounded(size as f64 / self.size.finished as f64);
        let mut ratios = Vec::new();
        for _ in 0..self.size.rounds {
            let full = ledger.load(self.bulk()).await?.rate();
            ratios.push(full / self.fresh(1).await?.rate());
        }
        ledger.end().await?;
        self.goals.row(
            "stored",
            "rate with 1,000,000 finished tasks, against an empty ledger",
            "",
            (0.9, 1.0),
            ratios,
        );
        Ok(())
    }

    async fn snapshot(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["snapshot"]) {
            return Ok(());
        }
        let ledger = self.server.ledger(1).await?;
        let before = ledger.load(self.bulk()).await?.rate();
        let seconds = self.size.snapshot_seconds;
        let held = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM meta; SELECT pg_sleep({}); COMMIT",
            seconds + 5
        );
        let load = Load { duration: Span(Duration::from_secs(seconds)), ..self.bulk() };
        let loaded = async {
            sleep(Duration::from_millis(500)).await;
            ledger.load(load).await
        };
        let (snapshot, loaded) = tokio::join!(self.server.ask(&ledger.url, &held), loaded);
        snapshot?;
        let dead = "SELECT COALESCE(sum(n_dead_tup), 0)::bigint FROM pg_stat_user_tables";
        self.facts.held_snapshot_ratio.push(rounded(loaded?.rate() / before));
        self.facts.held_snapshot_dead_rows.push(self.server.number(&ledger.url, dead).await?);
        ledger.end().await
    }
}

/// What statements of one session say, each a transaction.
async fn psql(bin: &Path, url: &str, statements: &[&str]) -> Result<String, Failure> {
    let mut command = Command::new(bin.join("psql"));
    command.args([url, "-qAtX", "-v", "ON_ERROR_STOP=1"]);
    for sql in statements {
        command.args(["-c", sql]);
    }
    output(&mut command).await
}

/// What a program says.
async fn output(command: &mut Command) -> Result<String, Failure> {
    let program = command.as_std().get_program().display().to_string();
    let said = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| cannot(&format!("run {program}"), &error))?;
    if said.status.success() {
        return Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned());
    }
    let error = String::from_utf8_lossy(&said.stderr);
    Err(Failure::new(Exit::Failure, format!("{program}: {}", error.trim())))
}
