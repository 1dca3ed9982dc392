//! The figures of a run, what they are held against, and how they are shown.

use std::time::Duration;

use serde::Serialize;

use super::backend::Second;
use super::{Args, Fault, Policy};
use crate::bench::machine::Machine;
use crate::output::Facts;

/// Goodput is looked at over so many seconds.
const STEADY: usize = 5;
/// It has come back when it is so large a part of the arrivals.
const RECOVERED: f64 = 0.95;
/// Retries need a moment to gather: amplification is counted from here on.
const SETTLED: usize = 2;

/// What we promise.
const MOST_CALLS: f64 = 0.35;
const HIGHEST_PEAK: f64 = 1.4;
const RECOVERY: u64 = 90;
/// What the same agents do without breaker and budget; less would mean that the fault was none.
const CONTROL_CALLS: f64 = 3.0;

/// What was seen of a run.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) seconds: Vec<Second>,
    /// When the fault began and ended, in whole seconds.
    pub(super) fault: std::ops::Range<usize>,
    pub(super) tasks: u64,
    pub(super) done: u64,
    pub(super) failed: u64,
    pub(super) succeeded: u64,
    pub(super) drain: Duration,
    /// The seconds in which the daemon was killed.
    pub(super) kills: Vec<usize>,
    pub(super) slowest_restart: Duration,
}

/// One run.
#[derive(Debug, Serialize)]
pub(super) struct Run {
    policy: &'static str,
    fault: &'static str,
    amplification: f64,
    /// The most calls in one second, as a multiple of the arrivals: of the seconds in which no daemon was killed, nor in
    /// the one before.
    peak: f64,
    /// Of all seconds. A kill stops all calls for a moment, and then every free slot is filled at once.
    peak_with_kills: f64,
    /// Null: it did not.
    recovers_after_s: Option<u64>,
    tasks: u64,
    done: u64,
    failed: u64,
    /// Tasks whose call succeeded: each task that is done must be one of them.
    succeeded: u64,
    drain_s: f64,
    kills: usize,
    slowest_restart_ms: u64,
    fault_from_s: usize,
    fault_until_s: usize,
    /// What does not hold of what was promised.
    misses: Vec<String>,
    seconds: Vec<Second>,
}

/// All runs.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: String,
    agents: u32,
    arrivals_per_s: u32,
    backend_per_s: u32,
    slots_per_agent: u32,
    open_s: f64,
    kill_every_s: f64,
    quick: bool,
    held: bool,
    runs: Vec<Run>,
    machine: Machine,
}

impl Run {
    pub(super) fn of(seen: Seen, policy: Policy, fault: Fault, rate: u32) -> Self {
        let sum = |span: std::ops::Range<usize>, figure: fn(&Second) -> u32| -> f64 {
            seen.seconds[span].iter().map(|second| f64::from(figure(second))).sum()
        };
        let span = seen.fault.start + SETTLED..seen.fault.end;
        let amplification = sum(span.clone(), |s| s.calls) / sum(span, |s| s.arrivals);
        let peak = |counts: &dyn Fn(&usize) -> bool| {
            let calls = (0..seen.seconds.len()).filter(counts).map(|second| seen.seconds[second].calls);
            rounded(f64::from(calls.max().unwrap_or(0)) / f64::from(rate))
        };
        let is_quiet = |second: &usize| !seen.kills.iter().any(|kill| (*kill..=*kill + 1).contains(second));
        let keeps_up = |from: &usize| {
            sum(*from..from + STEADY, |s| s.good) >= RECOVERED * sum(*from..from + STEADY, |s| s.arrivals)
        };
        let windows = seen.fault.end..(seen.seconds.len() + 1).saturating_sub(STEADY);
        let recovered = windows.rev().take_while(keeps_up).last();
        let mut run = Self {
            policy: policy.name(),
            fault: fault.letter(),
            amplification: rounded(amplification),
            peak: peak(&is_quiet),
            peak_with_kills: peak(&|_| true),
            recovers_after_s: recovered.map(|second| (second - seen.fault.end) as u64),
            tasks: seen.tasks,
            done: seen.done,
            failed: seen.failed,
            succeeded: seen.succeeded,
            drain_s: rounded(seen.drain.as_secs_f64()),
            kills: seen.kills.len(),
            slowest_restart_ms: u64::try_from(seen.slowest_restart.as_millis()).unwrap_or(u64::MAX),
            fault_from_s: seen.fault.start,
            fault_until_s: seen.fault.end,
            misses: Vec::new(),
            seconds: seen.seconds,
        };
        run.misses = run.judge(policy);
        run
    }

    fn judge(&self, policy: Policy) -> Vec<String> {
        let mut misses = Vec::new();
        let mut hold = |holds: bool, miss: &dyn Fn() -> String| {
            if !holds {
                misses.push(format!("{}, fault {}: {}", self.policy, self.fault, miss()));
            }
        };
        if policy == Policy::Control {
            hold(self.amplification > CONTROL_CALLS, &|| {
                format!("{} calls per arrival, over {CONTROL_CALLS} were expected", self.amplification)
            });
            return misses;
        }
        hold(self.amplification <= MOST_CALLS, &|| {
            format!("{} calls per arrival, at most {MOST_CALLS} are allowed", self.amplification)
        });
        hold(self.peak <= HIGHEST_PEAK, &|| {
            format!("peak of {}, at most {HIGHEST_PEAK} is allowed", self.peak)
        });
        hold(self.recovers_after_s.is_some_and(|after| after <= RECOVERY), &|| match self.recovers_after_s {
            Some(after) => format!("goodput was back after {after} s, {RECOVERY} s are allowed"),
            None => "goodput did not come back".into(),
        });
        hold(self.done == self.tasks && self.succeeded == self.tasks, &|| {
            format!(
                "of {} tasks {} are done, {} failed, and {} calls succeeded",
                self.tasks, self.done, self.failed, self.succeeded
            )
        });
        misses
    }

    /// One line for people.
    pub(super) fn line(&self) -> String {
        let recovers =
            self.recovers_after_s.map_or_else(|| "never".into(), |after| format!("after {after} s"));
        format!(
            "{} calls per arrival, peak {} ({} with kills), goodput back {recovers}, {} of {} tasks done and {} failed, {} kills",
            self.amplification,
            self.peak,
            self.peak_with_kills,
            self.done,
            self.tasks,
            self.failed,
            self.kills
        )
    }
}

impl Report {
    pub(super) fn new(args: &Args, version: String, runs: Vec<Run>) -> Self {
        Self {
            version,
            agents: args.agents,
            arrivals_per_s: args.rate,
            backend_per_s: args.capacity(),
            slots_per_agent: args.slots(Policy::Ledgerd),
            open_s: args.open.0.as_secs_f64(),
            kill_every_s: args.kill_every.0.as_secs_f64(),
            quick: args.quick,
            held: runs.iter().all(|run| run.misses.is_empty()),
            runs,
            machine: Machine::this(),
        }
    }

    pub(super) fn json(&self) -> String {
        let mut text = serde_json::to_string(self).expect("numbers and text have a JSON form");
        text.push('\n');
        text
    }

    pub(super) fn table(&self) -> String {
        let mut facts = Facts::default();
        for run in &self.runs {
            facts.push(format!("{}, fault {}", run.policy, run.fault), run.line());
        }
        facts.push("bounds", if self.held { "held" } else { "MISSED" });
        facts.render()
    }

    /// What does not hold.
    pub(super) fn fault(&self) -> Option<String> {
        let misses: Vec<&str> = self.runs.iter().flat_map(|run| &run.misses).map(String::as_str).collect();
        (!misses.is_empty()).then(|| misses.join("; "))
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten good seconds, a fault of ten with so many calls in each, and a recovery from a second on.
    fn seen(calls: u32, back: usize) -> Seen {
        let second = |at: usize| match at {
            10..20 => Second { arrivals: 100, calls, good: 0 },
            _ if at >= 20 && at < back => Second { arrivals: 100, calls: 100, good: 50 },
            _ => Second { arrivals: 100, calls: 100, good: 100 },
        };
        Seen {
            seconds: (0..60).map(second).collect(),
            fault: 10..20,
            tasks: 6_000,
            done: 6_000,
            failed: 0,
            succeeded: 6_000,
            drain: Duration::ZERO,
            kills: vec![5, 12],
            slowest_restart: Duration::ZERO,
        }
    }

    #[test]
    fn what_holds_is_not_missed() {
        let run = Run::of(seen(20, 30), Policy::Ledgerd, Fault::Down, 100);
        assert_eq!((run.amplification, run.peak), (0.2, 1.0));
        assert_eq!(run.recovers_after_s, Some(10));
        assert!(run.misses.is_empty(), "{:?}", run.misses);
    }

    #[test]
    fn a_kill_and_the_second_after_it_have_a_peak_of_their_own() {
        let mut seen = seen(20, 20);
        (seen.seconds[5].calls, seen.seconds[13].calls, seen.seconds[30].calls) = (190, 200, 120);
        let run = Run::of(seen, Policy::Ledgerd, Fault::Down, 100);
        assert_eq!((run.peak, run.peak_with_kills), (1.2, 2.0));
    }

    #[test]
    fn every_bound_is_looked_at() {
        let mut seen = seen(150, 60);
        seen.done = 5_999;
        let run = Run::of(seen, Policy::Ledgerd, Fault::Slow, 100);
        assert_eq!(run.recovers_after_s, None);
        assert_eq!(run.misses.len(), 4, "{:?}", run.misses);
    }

    #[test]
    fn a_control_without_overload_is_no_control() {
        assert_eq!(Run::of(seen(300, 20), Policy::Control, Fault::Slow, 100).misses.len(), 1);
        assert!(Run::of(seen(301, 60), Policy::Control, Fault::Slow, 100).misses.is_empty());
    }
}
