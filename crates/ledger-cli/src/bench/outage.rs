//! `ledgerd bench outage`: what an outage of the agents' backend does to load and goodput, on a daemon that is killed again
//! and again.
//!
//! Many agents share one backend, which is in this process. It fails for a while, or becomes slow; the calls that reach it
//! are counted, and the tasks whose call succeeded. The same is done with agents that have neither breaker nor budget, as a
//! control: a bound that anything would keep says nothing.
//!
//! `docs/outage/simulation.md` has the same experiment in virtual time, with more agents and policies.

mod backend;
mod fleet;
mod keeper;
mod report;

use std::time::Duration;

use ledgerd_client::v1::{GetStatsRequest, GetStatsResponse, TaskState};
use ledgerd_client::{CancellationToken, Client};
use tokio::time::{Instant, interval, sleep_until, timeout};

use super::count;
use crate::daemon::{self, cannot};
use crate::failure::{Exit, Failure};
use crate::guard::Guard;
use crate::output::{print, remark};
use crate::policy::Span;
use backend::{Backend, Health, TIMEOUT};
use keeper::Keeper;
use report::{Report, Run, Seen};

/// Slots of a worker in the control: nothing bounds the retries of clients without a ledger.
const UNBOUNDED: u32 = 1_000;
/// How long the rest may take when nothing arrives any more. A breaker may be open, and budgets may be empty.
const DRAIN: Duration = Duration::from_secs(180);
/// Time that the daemon gets to close its store.
const STOP: Duration = Duration::from_secs(10);
/// How often the ledger is asked whether everything has ended.
const LOOK: Duration = Duration::from_millis(250);

/// `bench outage`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// Agents, with a worker each
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    agents: u32,
    /// Tasks that arrive each second; the backend serves a quarter more
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(8..=2_000))]
    rate: u32,
    /// How long breakers stay open
    #[arg(long, value_name = "DUR", default_value = "5s")]
    open: Span,
    /// Kill the daemon with SIGKILL so often, during the whole run; 0s: never
    #[arg(long, value_name = "DUR", default_value = "5s")]
    kill_every: Span,
    /// Only this fault
    #[arg(long, value_enum)]
    fault: Option<Fault>,
    /// Only this policy
    #[arg(long, value_enum)]
    policy: Option<Policy>,
    /// Shorter phases, to see whether it works
    #[arg(long)]
    quick: bool,
}

/// What is wrong with the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Fault {
    /// A: every call fails
    #[value(name = "a")]
    Down,
    /// B: 40 % of the capacity
    #[value(name = "b")]
    Slow,
}

/// What the agents have against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Policy {
    /// Breaker and budget
    Ledgerd,
    /// Neither, and workers with many slots
    Control,
}

/// Lengths of the phases.
#[derive(Clone, Copy, Debug)]
struct Phases {
    before: Duration,
    fault: Duration,
    /// Tasks arrive for at most so long after the fault,
    after: Duration,
    /// or until goodput has kept up with them for so long.
    steady: Duration,
}

impl Fault {
    const fn letter(self) -> &'static str {
        match self {
            Self::Down => "A",
            Self::Slow => "B",
        }
    }
}

impl Policy {
    const fn name(self) -> &'static str {
        match self {
            Self::Ledgerd => "ledgerd",
            Self::Control => "control",
        }
    }
}

impl Args {
    /// Slots of each agent's worker: as many as its arrivals need when every call takes until its timeout.
    fn slots(&self, policy: Policy) -> u32 {
        match policy {
            Policy::Ledgerd => {
                (f64::from(self.rate) * TIMEOUT.as_secs_f64() / f64::from(self.agents)).ceil() as u32
            }
            Policy::Control => UNBOUNDED,
        }
    }

    const fn capacity(&self) -> u32 {
        self.rate + self.rate / 4
    }

    const fn phases(&self, fault: Fault) -> Phases {
        let seconds = Duration::from_secs;
        match (self.quick, fault) {
            (true, _) => {
                Phases { before: seconds(5), fault: seconds(12), after: seconds(30), steady: seconds(10) }
            }
            (false, Fault::Down) => {
                Phases { before: seconds(20), fault: seconds(30), after: seconds(120), steady: seconds(60) }
            }
            (false, Fault::Slow) => {
                Phases { before: seconds(20), fault: seconds(20), after: seconds(120), steady: seconds(60) }
            }
        }
    }

    pub(super) async fn run(self) -> Result<(), Failure> {
        let (told_to_end, guard) = (daemon::told_to_end()?, daemon::guard()?);
        let report = tokio::select! {
            report = self.all(&guard) => report?,
            () = told_to_end => return Err(Failure::new(Exit::Failure, "interrupted; nothing was measured")),
        };
        remark(report.table().trim_end());
        print(&report.json())?;
        report.fault().map_or(Ok(()), |misses| Err(Failure::new(Exit::Failure, misses)))
    }

    async fn all(&self, guard: &Guard) -> Result<Report, Failure> {
        let (mut runs, mut version) = (Vec::new(), String::new());
        for policy in [Policy::Ledgerd, Policy::Control] {
            for fault in [Fault::Down, Fault::Slow] {
                if self.policy.is_some_and(|only| only != policy)
                    || self.fault.is_some_and(|only| only != fault)
                {
                    continue;
                }
                let (seen, stats) = self.one(policy, fault, guard).await?;
                version = stats.version;
                let run = Run::of(seen, policy, fault, self.rate);
                remark(&format!("{}, fault {}: {}", policy.name(), fault.letter(), run.line()));
                runs.push(run);
            }
        }
        Ok(Report::new(self, version, runs))
    }

    /// One run with a daemon of its own.
    async fn one(
        &self,
        policy: Policy,
        fault: Fault,
        guard: &Guard,
    ) -> Result<(Seen, GetStatsResponse), Failure> {
        // Declared first, removed last: after the daemon that writes to it.
        let folder = tempfile::Builder::new()
            .prefix("ledgerd-outage-")
            .tempdir()
            .map_err(|error| cannot("make a temporary folder", &error))?;
        let mut keeper = Keeper::start(&folder.path().join("data"), guard).await?;
        let seen = self.measure(policy, fault, &mut keeper).await;
        let (seen, stats) = seen.map_err(|failure| keeper.daemon.blame(failure))?;
        keeper.daemon.process.stop(STOP).await;
        Ok((seen, stats))
    }

    async fn measure(
        &self,
        policy: Policy,
        fault: Fault,
        keeper: &mut Keeper,
    ) -> Result<(Seen, GetStatsResponse), Failure> {
        let address = keeper.daemon.address.clone();
        let client = Client::lazy(&address)?;
        fleet::configure(&client, self, policy).await?;
        let backend = Backend::start(self.capacity());
        let [enough, no_kills, workers_stop] = [(); 3].map(|()| CancellationToken::new());
        let mut workers = fleet::workers(&address, self, policy, &backend, &workers_stop)?;
        let phases = self.phases(fault);
        let play = async {
            let produce = fleet::produce(client.clone(), self, &backend, &enough);
            let script = async {
                self.script(fault, phases, &backend).await;
                enough.cancel();
            };
            let (tasks, ()) = tokio::join!(produce, script);
            let (seconds, tasks) = (backend.seconds(), tasks?);
            let began = Instant::now();
            // The control is about load alone; what it has lost is lost.
            if policy == Policy::Ledgerd {
                let _ = timeout(DRAIN, drained(&client, tasks)).await;
            }
            no_kills.cancel();
            Ok::<_, Failure>((tasks, seconds, began.elapsed()))
        };
        let killed = keeper.kill_every(self.kill_every.0, &no_kills);
        let ((tasks, seconds, drain), ()) = tokio::try_join!(play, killed)?;
        let stats = stats(&client).await?;
        workers_stop.cancel();
        let left = async {
            while let Some(ended) = workers.join_next().await {
                ended.expect("a worker does not panic")?;
            }
            Ok::<_, Failure>(())
        };
        // One that cannot give back what it holds has nothing more to tell.
        timeout(STOP, left).await.unwrap_or(Ok(()))?;
        let start = backend.started();
        let kills = keeper.kills.iter().map(|kill| kill.saturating_duration_since(start).as_secs() as usize);
        let from = phases.before.as_secs() as usize;
        let seen = Seen {
            seconds,
            fault: from..from + phases.fault.as_secs() as usize,
            tasks,
            done: count(&stats, TaskState::Done),
            failed: count(&stats, TaskState::Failed),
            succeeded: backend.succeeded(),
            drain,
            kills: kills.collect(),
            slowest_restart: keeper.slowest,
        };
        Ok((seen, stats))
    }

    /// What befalls the backend. Ends when no more tasks are needed.
    async fn script(&self, fault: Fault, phases: Phases, backend: &Backend) {
        let start = backend.started();
        sleep_until(start + phases.before).await;
        backend.becomes(match fault {
            Fault::Down => Health::Down,
            Fault::Slow => Health::Slow,
        });
        sleep_until(start + phases.before + phases.fault).await;
        backend.becomes(Health::Well);
        let over = (phases.before + phases.fault).as_secs() as usize;
        let mut look = interval(Duration::from_secs(1));
        while start.elapsed() < phases.before + phases.fault + phases.after {
            look.tick().await;
            let seconds = backend.seconds();
            let last = seconds.len().saturating_sub(phases.steady.as_secs() as usize);
            let keeps_up = |second: &backend::Second| second.good * 10 >= second.arrivals * 9;
            if last >= over && seconds[last..].iter().all(keeps_up) {
                return;
            }
        }
    }
}

/// Waits until every task has ended.
async fn drained(client: &Client, tasks: u64) {
    let mut look = interval(LOOK);
    loop {
        look.tick().await;
        // While the daemon is down there is nothing to learn.
        if let Ok(stats) = stats(client).await
            && count(&stats, TaskState::Done) + count(&stats, TaskState::Failed) >= tasks
        {
            return;
        }
    }
}

async fn stats(client: &Client) -> Result<GetStatsResponse, Failure> {
    Ok(client.admin().get_stats(GetStatsRequest {}).await?.into_inner())
}
