//! `ledgerd bench waiting`: whether tasks that cannot run stand in the way of those that can.
//!
//! Two daemons, one empty and one that holds tasks of an agent whose breaker is open, of one that is paused, and of a type
//! nobody serves, each with a worker that would take them. A healthy agent is loaded on the one and the other in turn, and
//! its times from enqueue to start are compared within the run: one machine, one minute, no stored figure.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ledgerd_client::Client;
use ledgerd_client::v1::{
    EnqueueTasksRequest, GetAgentRequest, GetTaskRequest, NewTask, PauseAgentRequest, TaskState,
    TripBreakerRequest,
};
use serde::Serialize;
use tokio::task::JoinSet;

use super::machine::Machine;
use super::worker::Stream;
use super::{Args as Load, Run};
use crate::Global;
use crate::daemon::{self, Daemon, cannot};
use crate::failure::{Exit, Failure};
use crate::guard::Guard;
use crate::output::{Facts, print, remark};
use crate::policy::Span;
use crate::time::duration_to_wire;

const HEALTHY: &str = "healthy";
const BROKEN: &str = "broken";
const PAUSED: &str = "paused";
/// What the workers of this bench do not take.
const UNSERVED: &str = "unserved";
/// Tasks in a call: the ledger's limit.
const CALL: u32 = 1_000;
/// The longest period a breaker can be opened for.
const OPEN: Duration = Duration::from_secs(24 * 3_600);
/// The most that the time at p99 may grow.
const BOUND: f64 = 1.5;
const STOP: Duration = Duration::from_secs(10);

/// `bench waiting`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// Waiting tasks of each of the three kinds
    #[arg(long, value_name = "N", default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(1..=2_000_000))]
    tasks: u32,
    /// Rounds, each with a load on either daemon
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long each load takes
    #[arg(long, value_name = "DUR", default_value = "5s")]
    duration: Span,
    /// Producers of the load, each with one call at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    callers: u32,
}

#[derive(Debug, Serialize)]
struct Report {
    version: String,
    waiting_of_each_kind: u32,
    callers: u32,
    rounds: Vec<Round>,
    /// Medians of the rounds.
    p99_without_ms: f64,
    p99_with_ms: f64,
    ratio: f64,
    bound: f64,
    held: bool,
    machine: Machine,
}

#[derive(Debug, Serialize)]
struct Round {
    without: Times,
    with: Times,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Times {
    p50_ms: f64,
    p99_ms: f64,
    lifecycles_per_s: f64,
}

impl Args {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (told_to_end, guard) = (daemon::told_to_end()?, daemon::guard()?);
        let report = tokio::select! {
            report = self.both(&guard) => report?,
            () = told_to_end => return Err(Failure::new(Exit::Failure, "interrupted; nothing was measured")),
        };
        remark(report.table().trim_end());
        let mut text = serde_json::to_string(&report).expect("numbers and text have a JSON form");
        text.push('\n');
        print(&text)?;
        if report.held {
            return Ok(());
        }
        let what = format!(
            "p99 is {} times what it is without waiting tasks; at most {BOUND} is allowed",
            report.ratio
        );
        Err(Failure::new(Exit::Failure, what))
    }

    async fn both(&self, guard: &Guard) -> Result<Report, Failure> {
        let folder = tempfile::Builder::new()
            .prefix("ledgerd-waiting-")
            .tempdir()
            .map_err(|error| cannot("make a temporary folder", &error))?;
        let mut empty = Daemon::start(&folder.path().join("empty"), None, guard).await?;
        let mut crowded = Daemon::start(&folder.path().join("crowded"), None, guard).await?;
        let measured = self.measure(&empty, &crowded).await;
        let measured = measured.map_err(|failure| crowded.blame(failure));
        empty.process.stop(STOP).await;
        crowded.process.stop(STOP).await;
        measured
    }

    async fn measure(&self, empty: &Daemon, crowded: &Daemon) -> Result<Report, Failure> {
        let client = Client::connect(&crowded.address).await?;
        // Workers that would take the tasks, if only they were let.
        let (mut idle, mut runs) = (JoinSet::new(), Vec::new());
        for agent in [BROKEN, PAUSED] {
            let run = Arc::new(Run::new(self.load(agent)));
            let stream = Stream::open(Client::connect(&crowded.address).await?, &run, 0).await?;
            idle.spawn(stream.serve(Arc::clone(&run)));
            runs.push(run);
        }
        let reason = || "bench waiting".to_owned();
        let trip = TripBreakerRequest {
            agent: BROKEN.into(),
            reason: reason(),
            duration: Some(duration_to_wire(OPEN)),
            ..TripBreakerRequest::default()
        };
        client.admin().trip_breaker(trip).await?;
        let pause =
            PauseAgentRequest { agent: PAUSED.into(), reason: reason(), ..PauseAgentRequest::default() };
        client.admin().pause_agent(pause).await?;
        let kinds = [(BROKEN, super::TASK_TYPE), (PAUSED, super::TASK_TYPE), (HEALTHY, UNSERVED)];
        for (agent, task_type) in kinds {
            self.fill(&client, agent, task_type).await?;
        }
        remark(&format!("{} tasks of each kind wait", self.tasks));
        let mut rounds = Vec::new();
        for number in 0..self.rounds {
            // Now the one first and now the other: whatever drifts touches both.
            let (without, with);
            if number % 2 == 0 {
                without = self.one(empty).await?;
                with = self.one(crowded).await?;
            } else {
                with = self.one(crowded).await?;
                without = self.one(empty).await?;
            }
            rounds.push(Round { without, with });
        }
        for agent in [BROKEN, PAUSED, HEALTHY] {
            let request = GetAgentRequest { agent: agent.into() };
            let found = client.admin().get_agent(request).await?.into_inner().agent.unwrap_or_default();
            let waiting: u64 = found
                .counts
                .iter()
                .filter(|count| matches!(count.state(), TaskState::Queued | TaskState::Blocked))
                .map(|count| count.count)
                .sum();
            if waiting != u64::from(self.tasks) {
                let what = format!("{waiting} tasks of {agent} wait at the end, {} should", self.tasks);
                return Err(Failure::new(Exit::Failure, what));
            }
        }
        let version = super::stats(&client).await?.version;
        for run in &runs {
            run.workers_stop.cancel();
        }
        while idle.join_next().await.is_some() {}
        Ok(Report::new(self, version, rounds))
    }

    /// Enqueues what will wait.
    async fn fill(&self, client: &Client, agent: &str, task_type: &str) -> Result<(), Failure> {
        let task = NewTask {
            agent: agent.into(),
            task_type: task_type.into(),
            payload: Bytes::from_static(&[0; 64]),
            ..NewTask::default()
        };
        let (mut left, mut last) = (self.tasks, String::new());
        while left > 0 {
            let tasks = vec![task.clone(); left.min(CALL) as usize];
            left -= tasks.len() as u32;
            let request = EnqueueTasksRequest { tasks, ..EnqueueTasksRequest::default() };
            let stored = client.tasks().enqueue_tasks(request).await?.into_inner();
            last = stored.results.last().map(|result| result.task_id.clone()).unwrap_or_default();
        }
        let request = GetTaskRequest { task_id: last, ..GetTaskRequest::default() };
        let state = client.tasks().get_task(request).await?.into_inner().task.unwrap_or_default().state();
        if matches!(state, TaskState::Queued | TaskState::Blocked) {
            return Ok(());
        }
        Err(Failure::new(
            Exit::Failure,
            format!("a task of {agent} does not wait: it is {}", state.as_str_name()),
        ))
    }

    /// The healthy agent under load.
    async fn one(&self, daemon: &Daemon) -> Result<Times, Failure> {
        let client = Client::connect(&daemon.address).await?;
        let global = Global::default();
        let load = self.load(HEALTHY).load(
            &global,
            &client,
            std::slice::from_ref(&daemon.address),
            Some(daemon.process.id()),
        );
        let report = load.await?;
        if let Some(fault) = report.fault() {
            return Err(Failure::new(Exit::Failure, fault));
        }
        let (p50, p99) = report.starts();
        let times = |ms: Option<f64>| ms.ok_or_else(|| Failure::new(Exit::Failure, "no task was started"));
        Ok(Times { p50_ms: times(p50)?, p99_ms: times(p99)?, lifecycles_per_s: report.rate() })
    }

    fn load(&self, agent: &str) -> Load {
        Load {
            callers: self.callers,
            batch: 1,
            workers: 2,
            capacity: 100,
            duration: self.duration,
            agent: agent.into(),
            ..Load::default()
        }
    }
}

impl Report {
    fn new(args: &Args, version: String, rounds: Vec<Round>) -> Self {
        let p99_without_ms = median(rounds.iter().map(|round| round.without.p99_ms).collect());
        let p99_with_ms = median(rounds.iter().map(|round| round.with.p99_ms).collect());
        let ratio = (p99_with_ms / p99_without_ms * 1e3).round() / 1e3;
        Self {
            version,
            waiting_of_each_kind: args.tasks,
            callers: args.callers,
            rounds,
            p99_without_ms,
            p99_with_ms,
            ratio,
            bound: BOUND,
            held: ratio <= BOUND,
            machine: Machine::this(),
        }
    }

    fn table(&self) -> String {
        let mut facts = Facts::default();
        for (number, round) in (1..).zip(&self.rounds) {
            let show = |times: Times| {
                format!("p50 {} p99 {} ms, {}/s", times.p50_ms, times.p99_ms, times.lifecycles_per_s)
            };
            let line = format!("without {}; with {}", show(round.without), show(round.with));
            facts.push(format!("round {number}"), line);
        }
        let line =
            format!("{} ms without, {} ms with: ratio {}", self.p99_without_ms, self.p99_with_ms, self.ratio);
        facts.push("enqueue to start, p99", line);
        facts.push("bound", if self.held { "held" } else { "MISSED" });
        facts.render()
    }
}

pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_of_medians_and_has_a_bound() {
        let args = Args { tasks: 1, rounds: 3, duration: Span(OPEN), callers: 1 };
        let times = |p99_ms| Times { p50_ms: 1.0, p99_ms, lifecycles_per_s: 1.0 };
        let round = |without, with| Round { without: times(without), with: times(with) };
        let report = |last| {
            Report::new(&args, String::new(), vec![round(2.0, 3.0), round(9.0, 1.0), round(1.0, last)])
        };
        assert_eq!((report(99.0).ratio, report(99.0).held), (1.5, true));
        let report = Report::new(&args, String::new(), vec![round(1.0, 1.6), round(1.0, 1.6)]);
        assert_eq!((report.ratio, report.held), (1.6, false));
    }
}
