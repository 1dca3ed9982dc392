//! `ledgerd bench suite`: every goal of the project, measured.
//!
//! A figure by itself says more of the machine and the minute than of the ledger, so each goal is a ratio: of what the
//! ledger does, and what SQLite, gRPC or the disk do without it, taken in turns within one run. After each load on a fresh
//! ledger its daemon is killed and started again, and its rows are counted: a figure for work that was not done is none.

mod collector;
mod curves;
pub(super) mod echo;
pub(super) mod goal;
mod hold;
mod reads;
pub(super) mod stage;
pub(super) mod yardstick;

use std::path::PathBuf;
use std::time::Duration;

use ledgerd_client::v1::TaskState;
use serde::Serialize;
use tokio::time::Instant;

use super::Args as Load;
use super::machine::{self, Machine, Spent};
use super::report::Report as Loaded;
use crate::daemon;
use crate::failure::{Exit, Failure};
use crate::policy::Span;
use collector::Collector;
use goal::{Goals, Row};
use stage::{Kind, Stage};
use yardstick::Which;

const KIB64: u32 = 64 << 10;
/// Tasks in a commit of plain SQLite.
const COMMIT: u32 = 1_000;
/// Tasks a second beside which lists and look-ups are timed.
const BESIDE_READS: u32 = 10_000;
/// Tasks a second at which nothing waits for anything but its own commit.
const LOW: u32 = 250;
const IDLE_WORKERS: u32 = 1_000;
/// All there are, by the words that they begin with.
const GOALS: [&str; 18] = [
    "G1",
    "G2",
    "G3",
    "G4",
    "G11",
    "G11b",
    "G12",
    "G13",
    "G14 bulk",
    "G14 written",
    "G14 unary",
    "memory",
    "payload",
    "idle",
    "reads",
    "traces",
    "lost spans",
    "telemetry",
];

/// `bench suite`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// Fewer and shorter rounds, a tenth of the stored tasks
    #[arg(long)]
    quick: bool,
    /// Only rows whose goal has these first words
    #[arg(long, value_name = "GOAL", value_delimiter = ',')]
    only: Vec<String>,
    /// Also the curves of the plots: rate by batch and callers, latency by load, rate by stored tasks
    #[arg(long)]
    curves: bool,
    /// Folder for the ledgers; else a temporary one
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

/// How much of everything.
#[derive(Clone, Copy, Debug, Serialize)]
struct Size {
    rounds: usize,
    seconds: u64,
    finished: u64,
    waiting: u64,
    live: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    quick: bool,
    machine: Machine,
    size: Size,
    rows: Vec<Row>,
    facts: Facts,
    #[serde(skip_serializing_if = "Option::is_none")]
    curves: Option<curves::Curves>,
    seconds: f64,
}

/// What has no goal but is good to know, for sizing.
#[derive(Debug, Default, Serialize)]
struct Facts {
    binary_bytes: u64,
    fast_schema_per_s: Vec<f64>,
    /// CPU time that plain SQLite takes for a lifecycle: what G14 is to be read beside on another machine.
    fast_schema_cpu_us: Vec<f64>,
    bulk_implied_per_s: Vec<f64>,
    bulk_explicit_per_s: Vec<f64>,
    unary_per_s: Vec<f64>,
    traced_per_s: Vec<f64>,
    /// CPU time for a lifecycle of a daemon that makes no spans, and of one that exports every span, both at once.
    untraced_traced_cpu_us: Vec<(f64, f64)>,
    echo_per_s: Vec<f64>,
    /// CPU time of one echo, of caller and server.
    echo_cpu_us: Vec<f64>,
    /// CPU time of plain SQLite for a lifecycle, with as many tasks a commit as lone calls bring about.
    unary_fast_schema_cpu_us: Vec<f64>,
    /// What G3 would be on a machine whose cores are busy, if there were nothing but that echo and those rows: no worker's
    /// stream, no ledger.
    unary_bound: Vec<f64>,
    flush_p50_ms: Vec<f64>,
    paced_flush_p50_ms: Vec<f64>,
    start_p50_p99_ms: Vec<(f64, f64)>,
    payload_mb_per_s: Vec<f64>,
    append_mb_per_s: Vec<f64>,
    reads_p50_p99_ms: Vec<(&'static str, f64, f64)>,
    restart_s: Vec<f64>,
    file_bytes_per_finished_task: f64,
    memory_bytes_per_waiting_task: f64,
    memory_bytes_per_running_task: f64,
    idle_cpu_percent_without_workers: f64,
    idle_cpu_percent_with_1000_workers: f64,
    idle_memory_mb_with_1000_workers: f64,
    rows_counted_after_a_kill: u64,
}

impl Args {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (told_to_end, guard) = (daemon::told_to_end()?, daemon::guard()?);
        let stage = Stage::new(self.data_dir.as_deref(), guard)?;
        let report = tokio::select! {
            report = self.all(&stage) => report?,
            () = told_to_end => return Err(Failure::new(Exit::Failure, "interrupted; nothing was measured")),
        };
        goal::tell(&report, &report.rows)
    }

    async fn all(&self, stage: &Stage) -> Result<Report, Failure> {
        let started = Instant::now();
        let size = match self.quick {
            true => Size { rounds: 2, seconds: 2, finished: 300_000, waiting: 100_000, live: 10_000 },
            false => Size { rounds: 5, seconds: 5, finished: 3_000_000, waiting: 1_000_000, live: 100_000 },
        };
        let program = daemon::this_program()?;
        let binary_bytes = program.metadata().map_or(0, |found| found.len());
        let mut suite = Suite {
            stage,
            size,
            goals: Goals::of(&self.only, &GOALS)?,
            facts: Facts { binary_bytes, ..Facts::default() },
        };
        suite.bulk().await?;
        suite.in_process().await?;
        suite.unary().await?;
        suite.traces().await?;
        suite.telemetry().await?;
        suite.latency().await?;
        suite.payloads().await?;
        suite.idle().await?;
        suite.stored().await?;
        suite.waiting().await?;
        let Suite { goals, facts, .. } = suite;
        let curves = match self.curves {
            true => Some(curves::measure(stage, size).await?),
            false => None,
        };
        Ok(Report {
            version: env!("CARGO_PKG_VERSION"),
            quick: self.quick,
            machine: Machine::this(),
            size,
            rows: goals.rows,
            facts,
            curves,
            seconds: started.elapsed().as_secs_f64().round(),
        })
    }
}

struct Suite<'a> {
    stage: &'a Stage,
    size: Size,
    goals: Goals<'a>,
    facts: Facts,
}

impl Suite<'_> {
    fn duration(&self) -> Span {
        Span(Duration::from_secs(self.size.seconds))
    }

    /// The load of the bulk goals: everything that a careful caller sends.
    fn bulk_load(&self) -> Load {
        Load { duration: self.duration(), keys: true, request_ids: true, ..Load::default() }
    }

    /// A load on a ledger that is made for it. Then its rows are counted.
    async fn fresh(&mut self, load: Load) -> Result<Loaded, Failure> {
        let (loaded, rows) = self.stage.fresh(load).await?;
        self.facts.rows_counted_after_a_kill += rows;
        Ok(loaded)
    }

    async fn bulk(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["G2", "G12", "G14 bulk", "G14 written"]) {
            return Ok(());
        }
        let (mut implied, mut explicit, mut tail, mut cpu, mut written) =
            <(Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
        for _ in 0..self.size.rounds {
            let plain = self.stage.yardstick(Which::FastSchema, self.size.seconds, COMMIT).await?;
            let ceiling = plain.value;
            let one = self.fresh(self.bulk_load()).await?;
            let two = self.fresh(Load { explicit_acks: true, ..self.bulk_load() }).await?;
            let large = self.fresh(Load { batch: 1_000, callers: 4, ..self.bulk_load() }).await?;
            implied.push(one.rate() / ceiling);
            explicit.push(two.rate() / ceiling);
            let (p50, p99) = seen(one.calls())?;
            tail.push(p99 / p50);
            cpu.push(one.server_cpu().ok_or_else(no_figure)?);
            written.push(large.written().ok_or_else(no_figure)? / 1e3);
            self.facts.fast_schema_per_s.push(ceiling.round());
            self.facts.fast_schema_cpu_us.extend(plain.cpu_us.map(goal::rounded));
            self.facts.bulk_implied_per_s.push(one.rate().round());
            self.facts.bulk_explicit_per_s.push(two.rate().round());
        }
        self.goals.row(
            "G2 implied acks",
            "lifecycles over gRPC, 16 × 100, against plain SQLite on a bare schema",
            "",
            (0.60, 1.2),
            implied,
        );
        self.goals.row("G2 explicit acks", "the same with a transition more", "", (0.45, 0.9), explicit);
        self.goals.row("G12", "p99 of an enqueue at saturation, against its p50", "×", (4.0, 2.5), tail);
        self.goals.row("G14 bulk", "daemon CPU for a lifecycle, 16 × 100", " µs", (10.0, 6.0), cpu);
        self.goals.row("G14 written", "written for a lifecycle, 1,000 a call", " kB", (2.0, 1.0), written);
        Ok(())
    }

    async fn in_process(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["G1"]) {
            return Ok(());
        }
        let pairs = self.stage.in_process(self.size.rounds, self.size.seconds).await?;
        let ratios = pairs.iter().map(|(ledger, schema)| ledger / schema).collect();
        self.goals.row(
            "G1",
            "the ledger's loop alone, batches of 1,000, against prepared statements on its schema",
            "",
            (0.70, 0.95),
            ratios,
        );
        Ok(())
    }

    async fn unary(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["G3", "G14 unary", "memory"]) {
            return Ok(());
        }
        let load = Load { callers: 256, batch: 1, duration: self.duration(), ..Load::default() };
        let (mut ratios, mut cpu, mut memory) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.size.rounds {
            let echo = self.stage.echo(&load).await?;
            let ledger = self.fresh(load.clone()).await?;
            ratios.push(ledger.calls_rate() / echo.value);
            cpu.push(ledger.server_cpu().ok_or_else(no_figure)?);
            memory.push(ledger.server_memory().ok_or_else(no_figure)?);
            self.facts.echo_per_s.push(echo.value.round());
            let commit = ledger.tasks_per_commit().ok_or_else(no_figure)?.round().max(1.0);
            let plain = self.stage.yardstick(Which::FastSchema, self.size.seconds, commit as u32).await?;
            let bound = echo.cpu_us.zip(plain.cpu_us).map(|(call, rows)| call / (call + rows));
            self.facts.echo_cpu_us.extend(echo.cpu_us.map(goal::rounded));
            self.facts.unary_fast_schema_cpu_us.extend(plain.cpu_us.map(goal::rounded));
            self.facts.unary_bound.extend(bound.map(goal::rounded));
            self.facts.unary_per_s.push(ledger.calls_rate().round());
        }
        self.goals.row(
            "G3",
            "durable enqueues one by one, 256 callers, workers draining, against a bare gRPC echo",
            "",
            (0.80, 1.2),
            ratios,
        );
        self.goals.row("G14 unary", "daemon CPU for a lifecycle, 256 callers × 1", " µs", (40.0, 28.0), cpu);
        self.goals.row("memory", "of the daemon after that load", " MB", (200.0, 100.0), memory);
        Ok(())
    }

    /// What it costs to export every span: of each call, and of each wait and attempt.
    async fn traces(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["traces", "lost spans"]) {
            return Ok(());
        }
        let (mut ratios, mut lost) = (Vec::new(), Vec::new());
        let load = Load { duration: Span(self.duration().0 / 2), ..self.bulk_load() };
        for _ in 0..self.size.rounds {
            let collector = Collector::start().await?;
            let variables = [
                ("OTEL_TRACES_EXPORTER", "otlp"),
                ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.endpoint.as_str()),
                ("OTEL_TRACES_SAMPLER", "always_on"),
            ];
            // The machine gets slower and faster meanwhile, so the order is turned round within a round.
            let before = self.fresh(load.clone()).await?.rate();
            // Until the last span was sent or given up.
            let one = self.stage.with("traced", &variables, load.clone()).await?;
            let two = self.stage.with("traced", &variables, load.clone()).await?;
            let after = self.fresh(load.clone()).await?.rate();
            ratios.push((one.rate() + two.rate()) / (before + after));
            let spans = 2 * (one.made().0 + two.made().0);
            // Those of calls are beside them, one for a hundred tasks.
            lost.push(100.0 * spans.saturating_sub(collector.spans()) as f64 / spans as f64);
            self.facts.traced_per_s.extend([&one, &two].map(|traced| traced.rate().round()));
            let (untraced, traced) = self.cpu_at_once(&variables, &load).await?;
            self.facts.untraced_traced_cpu_us.push((goal::rounded(untraced), goal::rounded(traced)));
        }
        self.goals.row(
            "traces",
            "lifecycles with every span exported, against none, 16 × 100",
            "",
            (0.85, 0.95),
            ratios,
        );
        self.goals.row("lost spans", "of those, given up by the daemon", " %", (1.0, 0.0), lost);
        Ok(())
    }

    /// What telemetry costs that nobody asked for: metrics, and the question whether a line is to be logged.
    async fn telemetry(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["telemetry"]) {
            return Ok(());
        }
        let off = [("OTEL_SDK_DISABLED", "true")];
        let lone = Load { callers: 256, batch: 1, duration: self.duration(), ..Load::default() };
        for (goal, what, load) in [
            (
                "telemetry bulk",
                "daemon CPU for a lifecycle without telemetry, against its defaults, 16 × 100",
                self.bulk_load(),
            ),
            ("telemetry unary", "the same, 256 callers × 1", lone),
        ] {
            let mut ratios = Vec::new();
            for _ in 0..self.size.rounds {
                let (usual, without) = self.cpu_at_once(&off, &load).await?;
                ratios.push(without / usual);
            }
            self.goals.row(goal, what, "", (0.97, 1.0), ratios);
        }
        Ok(())
    }

    /// CPU time for a lifecycle of a usual daemon, and of one with these variables; both at once, for what slows the machine
    /// down meanwhile slows both.
    async fn cpu_at_once(&self, variables: &[(&str, &str)], load: &Load) -> Result<(f64, f64), Failure> {
        let usual = self.stage.with("usual", &[], load.clone());
        let other = self.stage.with("other", variables, load.clone());
        let (usual, other) = tokio::try_join!(usual, other)?;
        let cpu = |loaded: &Loaded| loaded.server_cpu().ok_or_else(no_figure);
        Ok((cpu(&usual)?, cpu(&other)?))
    }

    async fn latency(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["G4"]) {
            return Ok(());
        }
        let duration = Span(Duration::from_secs(2 * self.size.seconds));
        let load = Load {
            callers: 8,
            batch: 1,
            workers: 1,
            capacity: 100,
            rate: Some(LOW),
            duration,
            ..Load::default()
        };
        let (mut half, mut tail) = (Vec::new(), Vec::new());
        for _ in 0..self.size.rounds {
            let seconds = self.size.seconds.min(2);
            let flush = self.stage.yardstick(Which::Flush, seconds, COMMIT).await?.value;
            let paced = self.stage.yardstick(Which::PacedFlush, seconds, COMMIT).await?.value;
            let (p50, p99) = seen(self.fresh(load.clone()).await?.starts())?;
            half.push(p50 / flush);
            tail.push(p99 / flush);
            self.facts.flush_p50_ms.push(flush);
            self.facts.paced_flush_p50_ms.push(paced);
            self.facts.start_p50_p99_ms.push((p50, p99));
        }
        self.goals.row(
            "G4 p50",
            "enqueue to start at 250/s, against fdatasync of 4 KiB",
            "×",
            (5.0, 2.5),
            half,
        );
        self.goals.row("G4 p99", "the same at p99", "×", (12.0, 5.0), tail);
        Ok(())
    }

    async fn payloads(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["payload"]) {
            return Ok(());
        }
        let load =
            Load { batch: 10, capacity: 200, payload: KIB64, duration: self.duration(), ..Load::default() };
        let mut ratios = Vec::new();
        for _ in 0..self.size.rounds {
            let append = self.stage.yardstick(Which::Append, self.size.seconds.min(3), COMMIT).await?.value;
            let ledger = self.fresh(load.clone()).await?.rate() * f64::from(KIB64) / 1e6;
            ratios.push(ledger / append);
            self.facts.append_mb_per_s.push(append.round());
            self.facts.payload_mb_per_s.push(ledger.round());
        }
        self.goals.row(
            "payload",
            "MB/s of payloads of 64 KiB, against write and fdatasync of the same",
            "",
            (0.5, 0.8),
            ratios,
        );
        Ok(())
    }

    async fn idle(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["idle"]) {
            return Ok(());
        }
        let mut daemon = self.stage.daemon("idle").await?;
        let process = daemon.process.id();
        let seconds = 2 * self.size.seconds;
        self.facts.idle_cpu_percent_without_workers = cpu_percent(process, seconds).await?;
        let held = hold::open(&daemon.address, "idle", IDLE_WORKERS, 1).await?;
        let mut cpu = Vec::new();
        for _ in 0..self.size.rounds.min(3) {
            cpu.push(cpu_percent(process, seconds).await?);
        }
        let memory = machine::resident(process).ok_or_else(no_figure)? as f64 / 1e6;
        drop(held);
        stage::stop(&mut daemon).await;
        self.facts.idle_cpu_percent_with_1000_workers = cpu[0];
        self.facts.idle_memory_mb_with_1000_workers = goal::rounded(memory);
        self.goals.row(
            "idle memory",
            "of the daemon with 1,000 workers that wait",
            " MB",
            (150.0, 60.0),
            vec![memory],
        );
        self.goals.row("idle CPU", "of one core, with 1,000 workers that wait", " %", (1.0, 0.2), cpu);
        Ok(())
    }

    /// All that is measured on a ledger with many finished tasks.
    async fn stored(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["G11", "G13", "reads"]) {
            return Ok(());
        }
        let mut daemon = self.stage.daemon("stored").await?;
        let fill = Load {
            tasks: Some(self.size.finished),
            duration: Span(Duration::from_secs(3_600)),
            ..Load::default()
        };
        self.stage.load(&mut daemon, fill).await?;
        self.facts.file_bytes_per_finished_task =
            goal::rounded(self.stage.file_bytes("stored") as f64 / self.size.finished as f64);
        let mut ratios = Vec::new();
        for _ in 0..self.size.rounds {
            let full = self.stage.load(&mut daemon, self.bulk_load()).await?.rate();
            ratios.push(full / self.fresh(self.bulk_load()).await?.rate());
        }
        self.goals.row(
            "G11",
            "rate with 3,000,000 finished tasks, against an empty ledger",
            "",
            (0.90, 1.0),
            ratios,
        );

        let duration = Span(Duration::from_secs(4 * self.size.seconds));
        let beside = Load { rate: Some(BESIDE_READS), duration, ..Load::default() };
        let times = reads::measure(self.stage, &mut daemon, beside).await?;
        let worst = times.iter().map(|(_, _, p99)| *p99).fold(0.0, f64::max);
        self.facts.reads_p50_p99_ms = times;
        self.goals.row(
            "reads",
            "slowest p99 of lists, look-ups and dead letters, with those tasks stored and 10,000/s running",
            " ms",
            (5.0, 1.0),
            vec![worst],
        );

        let before = machine::resident(daemon.process.id()).unwrap_or_default();
        self.stage.fill(&daemon, "stored", &[(Kind::Unserved, self.size.live)]).await?;
        let after = machine::resident(daemon.process.id()).unwrap_or_default();
        self.facts.memory_bytes_per_waiting_task =
            (after.saturating_sub(before) as f64 / self.size.live as f64).round();
        let mut restarts = Vec::new();
        for _ in 0..self.size.rounds {
            daemon.process.kill();
            let began = Instant::now();
            daemon = self.stage.daemon("stored").await?;
            restarts.push(began.elapsed().as_secs_f64());
            let live = self.stage.count(&daemon, TaskState::Queued).await?;
            if live != self.size.live {
                return Err(Failure::new(
                    Exit::Failure,
                    format!("{live} tasks wait after a restart of {}", self.size.live),
                ));
            }
        }
        stage::stop(&mut daemon).await;
        self.facts.restart_s = restarts.clone();
        self.goals.row(
            "G13",
            "from SIGKILL to ready with 3,000,000 finished and 100,000 live tasks",
            " s",
            (2.0, 0.5),
            restarts,
        );
        Ok(())
    }

    async fn waiting(&mut self) -> Result<(), Failure> {
        if !self.goals.wants(&["G11b"]) {
            return Ok(());
        }
        let mut daemon = self.stage.daemon("waiting").await?;
        let quarter = self.size.waiting / 4;
        let kinds = [Kind::Unserved, Kind::UnservedOfAllPriorities, Kind::NotDue, Kind::Paused]
            .map(|kind| (kind, quarter));
        self.stage.fill(&daemon, "bench", &kinds).await?;
        let mut ratios = Vec::new();
        for _ in 0..self.size.rounds {
            let full = self.stage.load(&mut daemon, self.bulk_load()).await?.rate();
            ratios.push(full / self.fresh(self.bulk_load()).await?.rate());
        }
        self.goals.row(
            "G11b",
            "rate with 1,000,000 tasks that wait, against an empty ledger",
            "",
            (0.85, 0.95),
            ratios,
        );

        let before = machine::resident(daemon.process.id()).unwrap_or_default();
        let running = self.size.live;
        let held = hold::open(&daemon.address, "held", 10, u32::try_from(running / 10).unwrap_or(1)).await?;
        self.stage.fill(&daemon, "held", &[(Kind::Served, running)]).await?;
        held.all(running).await;
        let after = machine::resident(daemon.process.id()).unwrap_or_default();
        self.facts.memory_bytes_per_running_task =
            (after.saturating_sub(before) as f64 / running as f64).round();
        drop(held);
        stage::stop(&mut daemon).await;
        Ok(())
    }
}

/// CPU that a process takes, in percent of one core.
async fn cpu_percent(process: u32, seconds: u64) -> Result<f64, Failure> {
    let before = Spent::read(process);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let spent = Spent::read(process).since(&before).cpu.ok_or_else(no_figure)?;
    Ok(100.0 * spent.as_secs_f64() / seconds as f64)
}

fn seen((p50, p99): (Option<f64>, Option<f64>)) -> Result<(f64, f64), Failure> {
    p50.zip(p99).ok_or_else(no_figure)
}

fn no_figure() -> Failure {
    Failure::new(Exit::Failure, "this system does not say what a process uses, or nothing was done")
}
