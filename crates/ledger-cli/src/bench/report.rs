//! The figures of a run: for programs, for people, and whether they can be believed.

use std::time::Duration;

use serde::Serialize;

use super::machine::{Machine, Spent};
use super::producer::Produced;
use super::worker::Worked;
use super::{Args, Histogram};
use crate::output::Facts;
use crate::time::show_duration;

/// What was seen.
pub(super) struct Outcome {
    pub(super) args: Args,
    /// Whether the daemon was started for the run.
    pub(super) own: bool,
    pub(super) version: String,
    /// How long producers called.
    pub(super) window: Duration,
    /// Until the last task was done.
    pub(super) total: Duration,
    /// Outcomes receipted as DONE, until the end and within the window.
    pub(super) done: u64,
    pub(super) done_in_time: u64,
    /// Tasks that were stored and not done.
    pub(super) lost: u64,
    /// By the daemon's count: tasks that became DONE, transitions and commits.
    pub(super) counted: u64,
    pub(super) transitions: u64,
    pub(super) commits: u64,
    pub(super) spent: Spent,
    /// Bytes of memory that the daemon had at the end, when it was started for the run.
    pub(super) memory: Option<u64>,
    /// CPU time of producers and workers.
    pub(super) client_cpu: Option<Duration>,
    pub(super) produced: Produced,
    pub(super) worked: Worked,
    pub(super) first_error: Option<String>,
}

/// The one object on standard output. Names are stable.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    lifecycles_per_s: f64,
    enqueues_per_s: f64,
    call_ms: Percentiles,
    enqueue_to_start_ms: Percentiles,
    server_cpu_us_per_lifecycle: Option<f64>,
    client_cpu_us_per_lifecycle: Option<f64>,
    server_memory_mb: Option<f64>,
    written_bytes_per_lifecycle: Option<f64>,
    fsyncs_per_lifecycle: Option<f64>,
    tasks_per_frame: Option<f64>,
    tasks: u64,
    errors: u64,
    first_error: Option<String>,
    refused_and_retried: u64,
    duration_s: f64,
    drain_s: f64,
    verified: bool,
    verification: Verification,
    settings: Settings,
    machine: Machine,
}

#[derive(Debug, Serialize)]
struct Percentiles {
    p50: Option<f64>,
    p99: Option<f64>,
    p99_9: Option<f64>,
}

/// Pairs that must be equal.
#[derive(Debug, Serialize)]
struct Verification {
    tasks_acknowledged: u64,
    outcomes_receipted: u64,
    tasks_done_in_ledger: u64,
    transitions_in_ledger: u64,
    transitions_expected: u64,
}

#[derive(Debug, Serialize)]
struct Settings {
    daemon: &'static str,
    version: String,
    callers: u32,
    batch: u32,
    connections: u32,
    workers: u32,
    capacity: u32,
    payload_bytes: u32,
    backlog: Option<u32>,
    explicit_acks: bool,
    request_ids: bool,
    keys: bool,
    rate: Option<u32>,
    store: Option<String>,
}

impl Percentiles {
    fn of(histogram: &Histogram) -> Self {
        let at = |share| histogram.percentile_ms(share).map(|ms| rounded(ms, 3));
        Self { p50: at(0.5), p99: at(0.99), p99_9: at(0.999) }
    }

    fn show(&self) -> String {
        let one = |ms: Option<f64>| ms.map_or_else(|| "-".into(), |ms| format!("{ms:.2}"));
        format!("p50 {}  p99 {}  p99.9 {} ms", one(self.p50), one(self.p99), one(self.p99_9))
    }
}

impl Report {
    /// From enqueue to start in ms, p50 and p99.
    pub(super) fn starts(&self) -> (Option<f64>, Option<f64>) {
        (self.enqueue_to_start_ms.p50, self.enqueue_to_start_ms.p99)
    }

    /// Of a call in ms, p50 and p99.
    pub(super) fn calls(&self) -> (Option<f64>, Option<f64>) {
        (self.call_ms.p50, self.call_ms.p99)
    }

    /// Lifecycles a second.
    pub(super) fn rate(&self) -> f64 {
        self.lifecycles_per_s
    }

    /// Calls that were answered a second.
    pub(super) fn calls_rate(&self) -> f64 {
        self.enqueues_per_s / f64::from(self.settings.batch)
    }

    /// CPU time of the daemon for one lifecycle, in microseconds.
    pub(super) fn server_cpu(&self) -> Option<f64> {
        self.server_cpu_us_per_lifecycle
    }

    /// Memory of the daemon at the end, in MB.
    pub(super) fn server_memory(&self) -> Option<f64> {
        self.server_memory_mb
    }

    /// Lifecycles that share a commit.
    pub(super) fn tasks_per_commit(&self) -> Option<f64> {
        self.fsyncs_per_lifecycle.filter(|commits| *commits > 0.0).map(|commits| 1.0 / commits)
    }

    /// Bytes that one lifecycle wrote to storage.
    pub(super) fn written(&self) -> Option<f64> {
        self.written_bytes_per_lifecycle
    }

    /// Tasks that were done, and transitions that were made.
    pub(super) fn made(&self) -> (u64, u64) {
        (self.tasks, self.verification.transitions_in_ledger)
    }

    pub(super) fn new(seen: Outcome) -> Self {
        let args = &seen.args;
        let tasks = seen.produced.tasks;
        let per_task = |number: f64| (tasks > 0).then(|| number / tasks as f64);
        let cpu = |time: Option<Duration>| {
            time.and_then(|time| per_task(time.as_secs_f64() * 1e6)).map(|micros| rounded(micros, 2))
        };
        // Enqueued, assigned, and completed: an outcome that stands for its ack is one transition with it.
        let steps = if args.explicit_acks { 4 } else { 3 };
        let verification = Verification {
            tasks_acknowledged: tasks,
            outcomes_receipted: seen.done,
            tasks_done_in_ledger: seen.counted,
            transitions_in_ledger: seen.transitions,
            transitions_expected: tasks * steps,
        };
        let errors = seen.produced.errors + seen.worked.errors + seen.lost;
        Self {
            lifecycles_per_s: rate(seen.done_in_time, seen.window),
            enqueues_per_s: rate(tasks, seen.window),
            call_ms: Percentiles::of(&seen.produced.calls),
            enqueue_to_start_ms: Percentiles::of(&seen.worked.starts),
            server_cpu_us_per_lifecycle: cpu(seen.spent.cpu),
            client_cpu_us_per_lifecycle: cpu(seen.client_cpu),
            server_memory_mb: seen.memory.map(|bytes| rounded(bytes as f64 / 1e6, 1)),
            written_bytes_per_lifecycle: seen
                .spent
                .written
                .and_then(|bytes| per_task(bytes as f64))
                .map(|n| rounded(n, 1)),
            fsyncs_per_lifecycle: per_task(seen.commits as f64).map(|n| rounded(n, 5)),
            tasks_per_frame: (seen.worked.frames > 0)
                .then(|| rounded(tasks as f64 / seen.worked.frames as f64, 1)),
            tasks,
            errors,
            first_error: seen.first_error,
            refused_and_retried: seen.produced.refusals,
            duration_s: rounded(seen.window.as_secs_f64(), 3),
            drain_s: rounded(seen.total.saturating_sub(seen.window).as_secs_f64(), 3),
            verified: errors == 0 && tasks > 0 && verification.agrees(),
            verification,
            settings: Settings {
                daemon: if seen.own { "own" } else { "target" },
                version: seen.version,
                callers: args.callers,
                batch: args.batch,
                connections: args.connections.min(args.callers),
                workers: args.workers,
                capacity: args.capacity,
                payload_bytes: args.payload,
                backlog: match args.backlog {
                    Some(0) => None,
                    Some(backlog) => Some(backlog.max(args.batch)),
                    None => Some((2 * args.workers * args.capacity).max(args.batch)),
                },
                explicit_acks: args.explicit_acks,
                request_ids: args.request_ids,
                keys: args.keys,
                rate: args.rate,
                store: args.store.as_deref().map(without_secret),
            },
            machine: Machine::this(),
        }
    }

    pub(super) fn json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("numbers and text have a JSON form");
        text.push('\n');
        text
    }

    pub(super) fn table(&self) -> String {
        let mut facts = Facts::default();
        let (set, seconds) =
            (&self.settings, |s: f64| show_duration(Duration::from_millis((s * 1e3) as u64)));
        let acks = if set.explicit_acks { "explicit acks" } else { "outcomes stand for acks" };
        let ids = if set.request_ids { "request ids" } else { "no request ids" };
        let keys = if set.keys { ", keys" } else { "" };
        let pace = set.rate.map(|rate| format!(", {rate} tasks/s")).unwrap_or_default();
        facts.push("load", format!("{} callers × {} a call, {ids}{keys}{pace}", set.callers, set.batch));
        facts.push("workers", format!("{} × {}, {acks}", set.workers, set.capacity));
        facts.push("lifecycles/s", format!("{:.0}", self.lifecycles_per_s));
        facts.push("enqueues/s", format!("{:.0}", self.enqueues_per_s));
        facts.push("call", self.call_ms.show());
        facts.push("enqueue to start", self.enqueue_to_start_ms.show());
        let number = |value: Option<f64>, unit: &str| {
            value.map_or_else(|| "-".into(), |value| format!("{value}{unit}"))
        };
        facts.push("daemon CPU", number(self.server_cpu_us_per_lifecycle, " µs a lifecycle"));
        facts.push("client CPU", number(self.client_cpu_us_per_lifecycle, " µs a lifecycle"));
        facts.push("daemon memory", number(self.server_memory_mb, " MB at the end"));
        facts.push("written", number(self.written_bytes_per_lifecycle, " bytes a lifecycle"));
        facts.push("commits", number(self.fsyncs_per_lifecycle, " a lifecycle"));
        let ran =
            format!("{} in {}, drained in {}", self.tasks, seconds(self.duration_s), seconds(self.drain_s));
        facts.push("tasks", ran);
        facts.push("errors", self.errors);
        facts.push("refused, sent again", self.refused_and_retried);
        facts.push("verified", if self.verified { "yes" } else { "NO" });
        facts.render()
    }

    /// Why the figures mean nothing, when they do.
    pub(super) fn fault(&self) -> Option<String> {
        if self.verified {
            return None;
        }
        let Verification {
            tasks_acknowledged: acknowledged,
            outcomes_receipted: receipted,
            tasks_done_in_ledger: done,
            transitions_in_ledger: transitions,
            transitions_expected: expected,
        } = self.verification;
        let error =
            self.first_error.as_ref().map(|error| format!("; first error: {error}")).unwrap_or_default();
        Some(format!(
            "the run does not hold up: {acknowledged} tasks were acknowledged, {receipted} outcomes were receipted, the \
             ledger counts {done} done and {transitions} transitions of {expected} expected, {} errors{error}",
            self.errors
        ))
    }
}

impl Verification {
    fn agrees(&self) -> bool {
        self.tasks_acknowledged == self.outcomes_receipted
            && self.tasks_acknowledged == self.tasks_done_in_ledger
            && self.transitions_in_ledger == self.transitions_expected
    }
}

fn rate(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { rounded(count as f64 / time.as_secs_f64(), 1) }
}

fn rounded(value: f64, digits: i32) -> f64 {
    let factor = 10_f64.powi(digits);
    (value * factor).round() / factor
}

/// The address of a store without its password: reports are pasted into issues.
fn without_secret(store: &str) -> String {
    match (store.find("://"), store.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}://***{}", &store[..scheme], &store[at..]),
        _ => store.into(),
    }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
