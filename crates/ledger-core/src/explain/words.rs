//! What is said of a task and of each gate: one plain sentence, with names, numbers and spans.
//!
//! What users wrote is put on one line and cut, so that a sentence stays one.

use super::{AHEAD, BreakerFacts, Facts, Gate, GateKind, RampFacts, WorkerFacts};
use crate::event::Fact;
use crate::limits::{MAX_DEFER, UNACKED_RUN};
use crate::store::Pause;
use crate::task::{Lease, Reason, State, Task};
use std::time::Duration;

/// Longest quotation, in characters.
const QUOTED: usize = 200;

pub(super) fn summary(facts: &Facts, gates: &[Gate]) -> String {
    let task = &facts.task;
    match (task.state, task.lease) {
        (State::Running, Some(lease)) => running(facts, lease),
        (State::Done | State::Failed | State::Cancelled, _) => ended(facts),
        _ => waiting(facts, gates),
    }
}

fn waiting(facts: &Facts, gates: &[Gate]) -> String {
    let mut said = match gates.first() {
        None => "Nothing stands in its way: it is handed out next".to_owned(),
        Some(first) => gist(facts, first),
    };
    match gates.len() {
        0 | 1 => {}
        2 => said += "; 1 more gate is shut",
        n => said += &format!("; {} more gates are shut", n - 1),
    }
    if let Some(holder) = facts.task.holder.as_ref().filter(|_| facts.task.is_resumable()) {
        said += &format!("; {}, which held it last, may still come back for it", plain(&holder.worker));
    }
    said + "."
}

fn gist(facts: &Facts, gate: &Gate) -> String {
    match gate.kind {
        GateKind::Blocked => "It waits for the answer to a question".to_owned(),
        GateKind::NotDue => {
            format!("It is due in {}", span(facts.task.due_at(facts.now).since(facts.now.at)))
        }
        GateKind::Budget => {
            format!("Its retry waits for {}", count(facts.task.tokens as usize, "budget token"))
        }
        GateKind::Paused => format!("Agent {} is paused", facts.agent),
        GateKind::Breaker => {
            let state = facts.breaker.as_ref().map_or("shut", |breaker| breaker.state.as_str());
            format!("{} is {state}", subject(facts))
        }
        GateKind::Ramp => format!("{} has just closed and lets only part through", subject(facts)),
        GateKind::NoWorker => format!("No worker of agent {} is connected", facts.agent),
        GateKind::TypeNotServed => {
            format!("No connected worker takes type {}", plain(&facts.task.spec.task_type))
        }
        GateKind::NoRoom => "No worker that takes it has room".to_owned(),
        GateKind::Behind => first_come(facts.ahead),
        GateKind::Draining => "The daemon is shutting down".to_owned(),
    }
}

fn running(facts: &Facts, lease: Lease) -> String {
    let (task, now) = (&facts.task, facts.now.at);
    let worker = task.holder.as_ref().map_or_else(|| "a worker".to_owned(), |holder| plain(&holder.worker));
    let until = facts.runner.map_or(lease.until, |runner| runner.lease_until).since(now);
    let mut said = match lease.acked_at {
        None => format!(
            "It was handed to {worker} {} ago, and {} are left to acknowledge it",
            span(now.since(task.updated_at)),
            span(until)
        ),
        Some(acked_at) => {
            let beat = match facts.runner {
                Some(runner) if runner.connected => {
                    format!("its last beat came {} ago", span(now.since(runner.beat_at)))
                }
                _ => "it is not connected".to_owned(),
            };
            let ran = span(now.since(acked_at));
            let left = span(until);
            format!(
                "{worker} has run attempt {} for {ran}; {beat} and the lease ends in {left}",
                task.attempt
            )
        }
    };
    if let Some(stop) = task.stop {
        let left = span(stop.until.since(now));
        said += &format!("; it was asked to stop ({}), for which {left} are left", stop.cause);
    }
    said + "."
}

fn ended(facts: &Facts) -> String {
    let task = &facts.task;
    let told = facts.told.as_ref();
    let since = told.map_or(task.updated_at, |row| row.at);
    let name = match task.reason {
        Reason::None => task.state.to_string(),
        reason => format!("{} ({reason})", task.state),
    };
    let attempts = match task.attempt {
        0 => "without an attempt".to_owned(),
        n => format!("after {}", count(n as usize, "attempt")),
    };
    let why = told.and_then(|row| match &row.error {
        Some(error) => Some(plain(&error.message)),
        None => row.fact(Fact::Note).map(plain),
    });
    let why = why.filter(|why| !why.is_empty()).map(|why| format!(": {why}")).unwrap_or_default();
    let mend = match (task.state, task.discarded) {
        (State::Failed, false) => format!("; `ledgerd dlq redrive {}` puts it back into the queue", task.id),
        (State::Failed, true) => "; its dead letter was discarded".to_owned(),
        _ => String::new(),
    };
    let ago = span(facts.now.at.since(since));
    format!("It has been {name} for {ago}, {attempts}{why}{mend}.")
}

pub(super) fn blocked(facts: &Facts) -> String {
    let Task { id, calendar, .. } = facts.task;
    let who = facts.told.as_ref().map_or_else(
        || "Its worker blocked it".to_owned(),
        |row| {
            let worker = row.worker.as_deref().map_or_else(|| "Its worker".to_owned(), plain);
            let ago = span(facts.now.at.since(row.at));
            match row.fact(Fact::Question).map(plain).filter(|question| !question.is_empty()) {
                Some(question) => format!("{worker} blocked it {ago} ago with the question \"{question}\""),
                None => format!("{worker} blocked it {ago} ago without a question"),
            }
        },
    );
    let end = match calendar {
        true => {
            let left = facts.now.from_wall(facts.task.run_at).since(facts.now.at);
            format!("; without an answer it goes on in {}", span(left))
        }
        false => String::new(),
    };
    format!("{who}; `ledgerd task unblock {id} --answer TEXT` answers it{end}.")
}

pub(super) fn not_due(facts: &Facts, left: Duration) -> String {
    let (task, left) = (&facts.task, span(left));
    if task.calendar {
        return format!("It is not to start before a time that a user named, {left} from now.");
    }
    match task.reason {
        Reason::Backoff | Reason::Budget => {
            let has = |fact| facts.told.as_ref().is_some_and(|row| row.fact(fact).is_some());
            let next = match has(Fact::Uncounted) {
                true => "the next attempt (a failed probe costs no retry)".to_owned(),
                false => format!("retry {} of {}", task.retry_count, facts.max_retries),
            };
            match (has(Fact::Hint), has(Fact::HintCut)) {
                (false, _) => format!("Its back-off before {next} lasts another {left}."),
                (true, false) => {
                    format!("The other side asked for time (retry_after): {next} comes in {left}.")
                }
                (true, true) => format!(
                    "The other side asked for time (retry_after, cut to the longest allowed): {next} comes in {left}."
                ),
            }
        }
        Reason::Lost => {
            let weight = f64::from(task.loss_weight) / 1_000.0;
            let most = facts.max_losses;
            format!(
                "Its worker was lost; its losses weigh {weight} of {most}, and it is tried again in {left}."
            )
        }
        Reason::AckTimeout => {
            format!("Delivery {} was not acknowledged in time; it is offered again in {left}.", task.delivery)
        }
        Reason::Declined => format!("A worker declined it; it is offered again in {left}."),
        Reason::Drain => format!("Its worker went away and gave it back; it is offered again in {left}."),
        Reason::Preempted => format!("It made room for more urgent work; it is offered again in {left}."),
        Reason::Redriven => format!("It was redriven, to start in {left}."),
        _ => format!("It is due in {left}."),
    }
}

pub(super) fn budget(facts: &Facts) -> String {
    let (task, budget, now) = (&facts.task, &facts.budget, facts.now);
    let latest = task.updated_at.after(MAX_DEFER);
    let latest = task.deadline.map_or(latest, |deadline| latest.min(now.from_wall(deadline)));
    let enough = match (budget.affordable_at, budget.before) {
        (None, _) => "only successes bring enough".to_owned(),
        (Some(at), 0) => format!("time alone brings enough in {}", span(at.since(now.at))),
        (Some(_), n) => format!("{} before it", some(n, "retry waits", "retries wait")),
    };
    format!(
        "Its retry needs {}: agent {} has {} and all agents share {}; {enough}, and it may wait another {}.",
        count(task.tokens as usize, "budget token"),
        facts.agent,
        tokens(budget.own),
        tokens(budget.shared),
        span(latest.since(now.at))
    )
}

pub(super) fn paused(facts: &Facts, pause: &Pause) -> String {
    let now = facts.now.at;
    let end = match pause.until {
        Some(until) => format!("for another {}", span(until.since(now))),
        None => "until it is resumed".to_owned(),
    };
    let ordered = ordered(&pause.actor, &pause.reason);
    format!("Agent {} was paused {} ago{ordered}, {end}.", facts.agent, span(now.since(pause.since)))
}

pub(super) fn breaker(facts: &Facts, breaker: &BreakerFacts) -> String {
    let now = facts.now.at;
    let mut why = ordered(&breaker.actor, &breaker.reason);
    if why.is_empty() {
        why = breaker.cause.map(|cause| format!(" ({})", cause_of(cause))).unwrap_or_default();
    }
    let left = breaker.until.map(|until| span(until.since(now)));
    let end = match (breaker.state, left) {
        (breaker_core::State::HalfOpen, _) => {
            let (probes, permits) = (breaker.probes, count(breaker.permits as usize, "probe"));
            format!(": {probes} of {permits} in flight, and how they end decides")
        }
        (breaker_core::State::Open, Some(left)) => format!(" and lets a probe through in {left}"),
        (_, Some(left)) => format!(", for another {left}"),
        (_, None) => ", until somebody ends that".to_owned(),
    };
    format!("{} has been {} for {}{why}{end}.", subject(facts), breaker.state, span(now.since(breaker.since)))
}

pub(super) fn ramp(facts: &Facts, ramp: &RampFacts) -> String {
    let percent = (ramp.share * 100.0).round();
    let left = span(ramp.until.since(facts.now.at));
    format!(
        "{} has just closed: {percent} % of the usual number may run, and {} of {} do; all may in {left}.",
        subject(facts),
        ramp.running,
        ramp.limit
    )
}

pub(super) fn no_worker(facts: &Facts) -> String {
    let seen = facts.workers.last_seen.as_ref().map(|(worker, at)| {
        format!("; {} was last seen {} ago", plain(worker), span(facts.now.at.since(*at)))
    });
    format!("No worker of agent {} is connected{}.", facts.agent, seen.unwrap_or_default())
}

pub(super) fn type_not_served(facts: &Facts) -> String {
    let (workers, agent) = (&facts.workers, &facts.agent);
    let name = plain(&facts.task.spec.task_type);
    let (none, take) = match workers.connected {
        1 => (format!("The one connected worker of agent {agent} does not take"), "it takes"),
        n => (format!("None of the {} connected workers of agent {agent} takes", number(n)), "they take"),
    };
    let mut types: Vec<String> = workers.types.iter().map(|name| plain(name)).collect();
    if workers.more_types > 0 {
        types.push(count(workers.more_types, "more type"));
    }
    format!("{none} type {name}: {take} {}.", list(&types))
}

pub(super) fn no_room(workers: &WorkerFacts) -> String {
    let mebibytes = workers.unsent as f64 / f64::from(1 << 20);
    let found = [
        (workers.full, "full".to_owned()),
        (workers.closed, "with capacity 0".to_owned()),
        (workers.slow, format!("behind in reading ({mebibytes:.1} MiB unsent)")),
        (workers.silent, format!("with {UNACKED_RUN} deliveries in a row unacknowledged")),
    ];
    let found: Vec<String> =
        found.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{} {what}", number(*n))).collect();
    let (none, hold) = match workers.takers {
        1 => ("The one worker that takes it has no room".to_owned(), "it holds"),
        n => (format!("None of the {} workers that take it has room", number(n)), "they hold"),
    };
    let (held, capacity) = (number(workers.held), count(workers.capacity, "task"));
    format!("{none}: {}; {hold} {held} of at most {capacity}.", found.join(", "))
}

pub(super) fn behind(ahead: usize) -> String {
    let they = if ahead == 1 { "it is" } else { "they are" };
    format!("{}: {they} more urgent, or as urgent and due earlier.", first_come(ahead))
}

pub(super) fn draining() -> String {
    "The daemon is shutting down and hands out nothing more.".to_owned()
}

fn first_come(ahead: usize) -> String {
    match some(ahead, "task comes first", "tasks come first") {
        said if ahead > AHEAD => format!("M{}", &said[1..]),
        said => said,
    }
}

/// Which breaker.
fn subject(facts: &Facts) -> String {
    match facts.breaker.as_ref().map(|breaker| &*breaker.task_type).filter(|name| !name.is_empty()) {
        Some(name) => format!("The breaker of agent {} for type {}", facts.agent, plain(name)),
        None => format!("The breaker of agent {}", facts.agent),
    }
}

/// ` by ann (her words)`.
fn ordered(actor: &str, reason: &str) -> String {
    let mut said = String::new();
    if !actor.is_empty() {
        said += &format!(" by {}", plain(actor));
    }
    if !reason.is_empty() {
        said += &format!(" ({})", plain(reason));
    }
    said
}

fn cause_of(cause: breaker_core::Cause) -> &'static str {
    match cause {
        breaker_core::Cause::FailureRun => "too many failures in a row",
        breaker_core::Cause::ProbeFailed => "a probe failed",
        breaker_core::Cause::OpenElapsed => "its open time is over",
        breaker_core::Cause::Inconclusive => "its probes came to no verdict",
        breaker_core::Cause::FailureRate => "too large a part of calls failed",
        breaker_core::Cause::SlowRate => "too large a part of calls was slow",
        breaker_core::Cause::ServerHint => "the other side said when to come back",
        breaker_core::Cause::ProbeTimedOut => "a probe took too long",
        breaker_core::Cause::Tripped => "it was tripped",
        other => other.as_str(),
    }
}

/// What a user wrote, on one line, and cut.
fn plain(text: &str) -> String {
    let mut words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = words.char_indices().nth(QUOTED) {
        words.truncate(end);
        words.push('…');
    }
    words
}

/// `a, b and c`.
fn list(items: &[String]) -> String {
    match items {
        [] => "nothing".to_owned(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// `1 task`, `2 tasks`.
fn count(n: usize, what: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{} {what}{plural}", number(n))
}

/// A number that was counted as far as [`AHEAD`], with its words.
fn some(n: usize, one: &str, many: &str) -> String {
    match n {
        1 => format!("1 {one}"),
        n if n > AHEAD => format!("more than {} {many}", number(AHEAD)),
        n => format!("{} {many}", number(n)),
    }
}

/// With a comma between thousands.
fn number(n: usize) -> String {
    let digits = n.to_string();
    let head = digits.len() % 3;
    digits.chars().enumerate().fold(String::new(), |mut text, (at, digit)| {
        if at > 0 && at % 3 == head {
            text.push(',');
        }
        text.push(digit);
        text
    })
}

/// Tokens to one place, rounded down: what is not there yet is not said to be.
fn tokens(milli: u64) -> String {
    match milli / 100 % 10 {
        0 => (milli / 1_000).to_string(),
        tenth => format!("{}.{tenth}", milli / 1_000),
    }
}

/// A span in its two largest units, rounded.
fn span(span: Duration) -> String {
    let millis = span.as_millis();
    if millis < 1_000 {
        return format!("{millis} ms");
    }
    if millis < 9_950 {
        let tenths = (millis + 50) / 100;
        return match tenths % 10 {
            0 => format!("{} s", tenths / 10),
            tenth => format!("{}.{tenth} s", tenths / 10),
        };
    }
    let seconds = (millis + 500) / 1_000;
    let (large, rest, names) = match seconds {
        0..60 => return format!("{seconds} s"),
        60..3_600 => (seconds / 60, seconds % 60, ("min", "s")),
        3_600..86_400 => (seconds / 3_600, seconds % 3_600 / 60, ("h", "min")),
        _ => (seconds / 86_400, seconds % 86_400 / 3_600, ("d", "h")),
    };
    match rest {
        0 => format!("{large} {}", names.0),
        rest => format!("{large} {} {rest} {}", names.0, names.1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_said_in_two_units() {
        for (millis, said) in [
            (0, "0 ms"),
            (999, "999 ms"),
            (1_000, "1 s"),
            (1_449, "1.4 s"),
            (9_949, "9.9 s"),
            (9_950, "10 s"),
            (59_499, "59 s"),
            (59_500, "1 min"),
            (61_000, "1 min 1 s"),
            (3_599_499, "59 min 59 s"),
            (3_599_500, "1 h"),
            (86_399_000, "23 h 59 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(span(Duration::from_millis(millis)), said, "{millis} ms");
        }
    }

    #[test]
    fn numbers_have_commas_and_tokens_are_rounded_down() {
        for (n, said) in
            [(0, "0"), (999, "999"), (1_000, "1,000"), (12_345, "12,345"), (1_234_567, "1,234,567")]
        {
            assert_eq!(number(n), said);
        }
        for (milli, said) in [(0, "0"), (999, "0.9"), (1_000, "1"), (45_250, "45.2")] {
            assert_eq!(tokens(milli), said);
        }
    }

    #[test]
    fn what_users_wrote_is_one_line_of_200_characters() {
        assert_eq!(plain(" two\n\tlines "), "two lines");
        assert_eq!(plain(&"é".repeat(200)), "é".repeat(200));
        assert_eq!(plain(&"é".repeat(201)), format!("{}…", "é".repeat(200)));
    }

    #[test]
    fn lists_read_as_people_say_them() {
        let items = |n: usize| (0..n).map(|n| n.to_string()).collect::<Vec<_>>();
        assert_eq!([list(&items(0)), list(&items(1)), list(&items(3))], ["nothing", "0", "0, 1 and 2"]);
        assert_eq!(first_come(1), "1 task comes first");
        assert_eq!(first_come(AHEAD), "10,000 tasks come first");
        assert_eq!(first_come(AHEAD + 1), "More than 10,000 tasks come first");
    }
}
