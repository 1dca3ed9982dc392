//! What the demo came to: a table for people, one object for programs.

use serde::Serialize;

use super::program::Program;
use crate::bench::Histogram;
use crate::output::{Facts, Rows, cell};

/// What happened to one task.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Fate {
    pub(super) done: bool,
    pub(super) failed: bool,
    pub(super) attempts: u64,
    pub(super) retries: u64,
    pub(super) losses: u64,
    /// From its enqueue to the start of its first attempt.
    pub(super) start: Option<std::time::Duration>,
    /// Whether its result is the right one.
    pub(super) right: bool,
}

/// The tasks of one agent, or of all.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub(super) tasks: u64,
    pub(super) done: u64,
    pub(super) failed: u64,
    pub(super) attempts: u64,
    pub(super) retries: u64,
    /// Losses of tasks that were done in the end.
    pub(super) recovered: u64,
    pub(super) trips: u64,
    pub(super) right: u64,
    pub(super) starts: Histogram,
}

impl Tally {
    pub(super) fn add(&mut self, fate: &Fate) {
        self.tasks += 1;
        self.done += u64::from(fate.done);
        self.failed += u64::from(fate.failed);
        self.attempts += fate.attempts;
        self.retries += fate.retries;
        self.recovered += if fate.done { fate.losses } else { 0 };
        self.right += u64::from(fate.right);
        if let Some(start) = fate.start {
            self.starts.record(start);
        }
    }

    fn merge(&mut self, other: &Self) {
        self.tasks += other.tasks;
        self.done += other.done;
        self.failed += other.failed;
        self.attempts += other.attempts;
        self.retries += other.retries;
        self.recovered += other.recovered;
        self.trips += other.trips;
        self.right += other.right;
        self.starts.merge(&other.starts);
    }

    fn start_ms(&self, share: f64) -> f64 {
        (self.starts.percentile_ms(share).unwrap_or(0.0) * 10.0).round() / 10.0
    }
}

/// The whole of it.
#[derive(Debug)]
pub(super) struct Summary {
    pub(super) agents: Vec<(Program, Tally)>,
    /// From the first enqueue until all had ended.
    pub(super) seconds: f64,
    /// Who computed the digests to compare with.
    pub(super) digests_by: &'static str,
}

/// The one object on standard output. Names are stable; all but the last three are counts of tasks or events.
#[derive(Debug, Serialize)]
struct Object {
    tasks: u64,
    done: u64,
    failed: u64,
    retries: u64,
    losses_recovered: u64,
    breaker_trips: u64,
    /// Tasks whose result was computed again and agreed.
    verified: u64,
    lifecycles_per_s: f64,
    start_p50_ms: f64,
    start_p99_ms: f64,
}

impl Summary {
    pub(super) fn total(&self) -> Tally {
        self.agents.iter().fold(Tally::default(), |mut total, (_, tally)| {
            total.merge(tally);
            total
        })
    }

    fn lifecycles_per_s(&self) -> f64 {
        let rate = if self.seconds > 0.0 { self.total().done as f64 / self.seconds } else { 0.0 };
        (rate * 10.0).round() / 10.0
    }

    pub(super) fn json(&self) -> String {
        let total = self.total();
        let object = Object {
            tasks: total.tasks,
            done: total.done,
            failed: total.failed,
            retries: total.retries,
            losses_recovered: total.recovered,
            breaker_trips: total.trips,
            verified: total.right,
            lifecycles_per_s: self.lifecycles_per_s(),
            start_p50_ms: total.start_ms(0.5),
            start_p99_ms: total.start_ms(0.99),
        };
        serde_json::to_string(&object).expect("numbers have a JSON form") + "\n"
    }

    pub(super) fn table(&self) -> String {
        let mut rows = Rows::new([
            "AGENT",
            "TASKS",
            "DONE",
            "FAILED",
            "ATTEMPTS",
            "RETRIES",
            "LOSSES RECOVERED",
            "TRIPS",
            "START P50",
            "P99",
            "VERIFIED",
        ]);
        let total = self.total();
        let named = self.agents.iter().map(|(program, tally)| (program.name(), tally));
        for (name, tally) in named.chain([("all", &total)]) {
            rows.push([
                cell(name),
                cell(tally.tasks),
                cell(tally.done),
                cell(tally.failed),
                cell(tally.attempts),
                cell(tally.retries),
                cell(tally.recovered),
                cell(tally.trips),
                cell(format!("{} ms", tally.start_ms(0.5))),
                cell(format!("{} ms", tally.start_ms(0.99))),
                cell(tally.right),
            ]);
        }
        let mut facts = Facts::default();
        facts.push("lifecycles/s", self.lifecycles_per_s());
        facts.push("duration", format!("{:.1} s", self.seconds));
        facts.push(
            "start",
            "from enqueue to the ack of the first attempt, by the tasks' history: with the outage of outline, and\nwith up to 25 ms that a worker holds back an ack",
        );
        facts.push("verified", format!("computed again in another way; digests by {}", self.digests_by));
        format!("{}\n{}", rows.render(), facts.render())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn summary() -> Summary {
        let done = Fate {
            done: true,
            attempts: 1,
            start: Some(Duration::from_millis(20)),
            right: true,
            ..Fate::default()
        };
        let mut outline = Tally { trips: 2, ..Tally::default() };
        outline.add(&Fate { attempts: 3, retries: 2, ..done });
        let mut digest = Tally::default();
        digest.add(&Fate { attempts: 2, losses: 1, ..done });
        digest.add(&Fate { done: false, failed: true, losses: 3, right: false, ..done });
        let agents = vec![(Program::Outline, outline), (Program::Digest, digest)];
        Summary { agents, seconds: 4.0, digests_by: "sha256sum" }
    }

    #[test]
    fn the_object_is_one_line_with_stable_names() {
        assert_eq!(
            summary().json(),
            "{\"tasks\":3,\"done\":2,\"failed\":1,\"retries\":2,\"losses_recovered\":1,\"breaker_trips\":2,\
             \"verified\":2,\"lifecycles_per_s\":0.5,\"start_p50_ms\":20.0,\"start_p99_ms\":20.0}\n"
        );
    }

    #[test]
    fn the_table_has_a_row_for_each_agent_and_one_for_all() {
        let text = summary().table();
        let row = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).expect("a row");
            line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(row("outline"), "1 1 0 3 2 0 2 20 ms 20 ms 1");
        assert_eq!(row("digest"), "2 1 1 3 0 1 0 20 ms 20 ms 1");
        assert_eq!(row("all"), "3 2 1 6 2 1 2 20 ms 20 ms 2");
        assert_eq!(row("lifecycles/s"), "0.5");
    }
}
