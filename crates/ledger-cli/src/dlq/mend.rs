//! `dlq redrive` and `dlq discard`: what is done about dead letters, by id or by filter.
//!
//! A filter is counted before anything is done, and asked about. The time of that count is made part of it: what fails
//! again while the command works is not taken up a second time, so the command ends.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;
use jiff::Timestamp;
use ledgerd_client::v1::{
    DeadLetterFilter, DeadLetterResult, DiscardDeadLettersRequest, DiscardDeadLettersResponse,
    RedriveDeadLettersRequest, RedriveDeadLettersResponse,
};
use tonic::Code;

use super::Which;
use crate::Global;
use crate::actor::Actor;
use crate::connect::connect;
use crate::enqueue::payload;
use crate::failure::{Exit, Failure, exit_of};
use crate::output::{Format, one_line, print, print_json, remark};
use crate::time::{Direction, When, now, to_wire};

/// Ids in one call, the ledger's limit.
const CALL_IDS: usize = 1_000;

/// Which dead letters, and how sure.
#[derive(Debug, Args)]
pub(super) struct Chosen {
    /// Ids of tasks; or choose by a filter
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    #[command(flatten)]
    filter: Which,
    /// Only count those that a filter chooses
    #[arg(long)]
    dry_run: bool,
    /// Do not ask before all that a filter chooses are changed
    #[arg(long, short)]
    yes: bool,
    /// Makes a repeated call harmless
    #[arg(long, value_name = "ID", default_value = "")]
    request_id: String,
    #[command(flatten)]
    actor: Actor,
}

/// `dlq redrive`.
#[derive(Debug, Args)]
pub struct Redrive {
    #[command(flatten)]
    chosen: Chosen,
    /// New deadline; else the old one, unless it is past
    #[arg(long, value_name = "TIME|DUR", value_parser = When::parse, allow_hyphen_values = true)]
    deadline: Option<When>,
    /// So many become due each second; 0: all at once. Else 10 for a filter, all at once for ids
    #[arg(long, value_name = "PER_SECOND")]
    rate: Option<f64>,
    /// When the first becomes due
    #[arg(long, value_name = "TIME|DUR", value_parser = When::parse, allow_hyphen_values = true)]
    start: Option<When>,
    /// New priority, 0 to 9
    #[arg(long, value_name = "N")]
    priority: Option<i32>,
    /// New payload: JSON, @FILE, or - for standard input
    #[arg(long, value_name = "JSON")]
    payload: Option<String>,
    /// The payload need not be JSON
    #[arg(long, requires = "payload")]
    raw: bool,
    /// Give them to another agent; keys of theirs must be free there
    #[arg(long, value_name = "AGENT")]
    to_agent: Option<String>,
    /// Why, for the audit trail; kept with each task's history
    #[arg(long, value_name = "TEXT", default_value = "")]
    note: String,
}

/// `dlq discard`.
#[derive(Debug, Args)]
pub struct Discard {
    #[command(flatten)]
    chosen: Chosen,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    note: String,
}

/// What is left to do: ids in pieces, or a filter until nothing fits it.
enum Rest {
    Ids(Vec<Vec<String>>),
    Filter(DeadLetterFilter),
}

impl Chosen {
    /// Ids or a filter, never both or neither.
    fn rest(&self, now: Timestamp) -> Result<Rest, Failure> {
        match (self.ids.is_empty(), self.filter.is_empty()) {
            (true, true) => Err(Failure::usage(
                "name ids, or a filter: --agent, --type, --reason, --fingerprint, --since, --until",
            )),
            (false, false) => Err(Failure::usage("name ids or a filter, not both")),
            (false, true) if self.dry_run => {
                Err(Failure::usage("--dry-run counts what a filter chooses; these are ids"))
            }
            (false, true) => Ok(Rest::Ids(self.ids.chunks(CALL_IDS).map(<[String]>::to_vec).collect())),
            (true, false) => {
                let mut filter = self.filter.wire(now);
                filter.failed_before.get_or_insert_with(|| to_wire(now));
                Ok(Rest::Filter(filter))
            }
        }
    }

    /// Asks whoever sits there; where nobody does, `--yes` has to be said.
    fn confirm(&self, deed: &str, count: u64, more: bool) -> Result<(), Failure> {
        if self.yes {
            return Ok(());
        }
        let many = format!("{}{count}", if more { "at least " } else { "" });
        if !std::io::stdin().is_terminal() {
            return Err(Failure::usage(format!(
                "{many} dead letters fit; --yes to {deed} them, --dry-run to count only"
            )));
        }
        let mut stderr = std::io::stderr().lock();
        write!(stderr, "{deed} {many} dead letters? [y/N] ")?;
        stderr.flush()?;
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Failure::new(Exit::Failure, "nothing was done")),
        }
    }
}

/// One call.
struct Step {
    task_ids: Vec<String>,
    filter: Option<DeadLetterFilter>,
    dry_run: bool,
    request_id: String,
}

/// What one call, or all of them, came to.
#[derive(Default)]
struct Sum {
    results: Vec<DeadLetterResult>,
    matched: u64,
    more: bool,
    next_start_time: Option<prost_types::Timestamp>,
}

impl Chosen {
    /// Calls until all that is chosen is done, or nothing more can be. Whether that was a count alone comes with the sum.
    async fn each(
        &self,
        deed: &str,
        now: Timestamp,
        mut call: impl AsyncFnMut(Step) -> Result<Sum, Failure>,
    ) -> Result<(Sum, bool), Failure> {
        let step = |task_ids, filter: &Option<DeadLetterFilter>, number| Step {
            task_ids,
            filter: filter.clone(),
            dry_run: false,
            request_id: part_id(&self.request_id, number),
        };
        let mut sum = Sum::default();
        match self.rest(now)? {
            Rest::Ids(pieces) => {
                for (number, ids) in pieces.into_iter().enumerate() {
                    let answer = call(step(ids, &None, number)).await?;
                    sum.results.extend(answer.results);
                    sum.next_start_time = answer.next_start_time;
                }
            }
            Rest::Filter(filter) => {
                let filter = Some(filter);
                let counted = call(Step { dry_run: true, ..step(Vec::new(), &filter, 0) }).await?;
                if self.dry_run || counted.matched == 0 {
                    return Ok((counted, true));
                }
                self.confirm(deed, counted.matched, counted.more)?;
                sum.matched = counted.matched;
                for number in 0.. {
                    let answer = call(step(Vec::new(), &filter, number)).await?;
                    let done = answer.results.iter().any(|result| result.error.is_none());
                    sum.results.extend(answer.results);
                    (sum.more, sum.next_start_time) = (answer.more, answer.next_start_time);
                    // What is refused fits again, for ever.
                    if !(answer.more && done) {
                        break;
                    }
                }
            }
        }
        Ok((sum, false))
    }
}

impl Redrive {
    pub(super) async fn run(self, global: &Global) -> Result<(), Failure> {
        let now = now();
        let ahead = |when: When| to_wire(when.resolve(now, Direction::Ahead));
        let base = RedriveDeadLettersRequest {
            deadline: self.deadline.map(ahead),
            rate_per_second: self.rate,
            priority: self.priority,
            payload: self.payload.as_deref().map(|given| payload(given, self.raw)).transpose()?,
            agent: self.to_agent.clone().unwrap_or_default(),
            reason: self.note.clone(),
            actor: self.chosen.actor.name(),
            ..RedriveDeadLettersRequest::default()
        };
        let mut start_time = self.start.map(ahead);
        // Refused before there is a connection.
        self.chosen.rest(now)?;
        let client = connect(global).await?;
        let call = async |step: Step| {
            let Step { task_ids, filter, dry_run, request_id } = step;
            let request = RedriveDeadLettersRequest {
                task_ids,
                filter,
                dry_run,
                request_id,
                start_time,
                ..base.clone()
            };
            let answer = client.admin().redrive_dead_letters(request).await?.into_inner();
            if !dry_run {
                start_time = answer.next_start_time.or(start_time);
            }
            let RedriveDeadLettersResponse { results, matched, more, next_start_time } = answer;
            Ok(Sum { results, matched, more, next_start_time })
        };
        let (sum, counted) = self.chosen.each("redrive", now, call).await?;
        let Sum { results, matched, more, next_start_time } = sum;
        let answer = RedriveDeadLettersResponse { results, matched, more, next_start_time };
        if counted {
            return told_count(global, "RedriveDeadLettersResponse", &answer, (matched, more));
        }
        match global.output {
            Format::Json => print_json("RedriveDeadLettersResponse", &answer)?,
            Format::Table => print(&told(&answer.results, "QUEUED"))?,
        }
        verdict(&answer.results)
    }
}

impl Discard {
    pub(super) async fn run(self, global: &Global) -> Result<(), Failure> {
        let now = now();
        let base = DiscardDeadLettersRequest {
            reason: self.note.clone(),
            actor: self.chosen.actor.name(),
            ..DiscardDeadLettersRequest::default()
        };
        // Refused before there is a connection.
        self.chosen.rest(now)?;
        let client = connect(global).await?;
        let call = async |step: Step| {
            let Step { task_ids, filter, dry_run, request_id } = step;
            let request = DiscardDeadLettersRequest { task_ids, filter, dry_run, request_id, ..base.clone() };
            let answer = client.admin().discard_dead_letters(request).await?.into_inner();
            let DiscardDeadLettersResponse { results, matched, more } = answer;
            Ok(Sum { results, matched, more, next_start_time: None })
        };
        let (sum, counted) = self.chosen.each("discard", now, call).await?;
        let Sum { results, matched, more, .. } = sum;
        let answer = DiscardDeadLettersResponse { results, matched, more };
        if counted {
            return told_count(global, "DiscardDeadLettersResponse", &answer, (matched, more));
        }
        match global.output {
            Format::Json => print_json("DiscardDeadLettersResponse", &answer)?,
            Format::Table => print(&told(&answer.results, "discarded"))?,
        }
        verdict(&answer.results)
    }
}

fn told_count(
    global: &Global,
    name: &str,
    answer: &impl prost::Message,
    (matched, more): (u64, bool),
) -> Result<(), Failure> {
    match (global.output, matched) {
        (Format::Json, _) => print_json(name, answer),
        (Format::Table, 0) => {
            remark("no dead letter fits");
            Ok(())
        }
        (Format::Table, _) => print(&format!("{}{matched} fit\n", if more { "at least " } else { "" })),
    }
}

/// Each call of one command line needs an id of its own.
fn part_id(request_id: &str, number: usize) -> String {
    match (request_id, number) {
        ("", _) | (_, 0) => request_id.into(),
        (id, number) => format!("{id}/{number}"),
    }
}

fn told(results: &[DeadLetterResult], done: &str) -> String {
    let done = results.iter().filter(|result| result.error.is_none()).map(|result| (&result.task_id, done));
    done.fold(String::new(), |text, (id, done)| format!("{text}{id} {done}\n"))
}

/// Tells each refusal; when all are of one kind, the exit code is of that kind.
fn verdict(results: &[DeadLetterResult]) -> Result<(), Failure> {
    let refused = || results.iter().filter_map(|result| Some((&result.task_id, result.error.as_ref()?)));
    for (id, error) in refused() {
        remark(&format!("{id}: {} ({})", one_line(&error.message), one_line(&error.reason)));
    }
    let count = refused().count();
    let Some((_, first)) = refused().next() else { return Ok(()) };
    let exit = if count == results.len() && refused().all(|(_, error)| error.code == first.code) {
        exit_of(Code::from_i32(first.code))
    } else {
        Exit::Failure
    };
    Err(Failure::new(exit, format!("{count} of {} refused", results.len())))
}

#[cfg(test)]
mod tests {
    use ledgerd_client::v1::ItemError;

    use super::*;

    fn result(id: &str, code: Option<Code>) -> DeadLetterResult {
        let error =
            code.map(|code| ItemError { code: code.into(), reason: "WHY".into(), ..ItemError::default() });
        DeadLetterResult { task_id: id.into(), error }
    }

    #[test]
    fn refusals_decide_the_exit_code() {
        assert_eq!(verdict(&[result("t1", None)]), Ok(()));
        let exit = |results: &[DeadLetterResult]| match verdict(results) {
            Err(Failure::Said(exit, _)) => exit,
            other => panic!("{other:?}"),
        };
        assert_eq!(exit(&[result("t1", Some(Code::NotFound))]), Exit::NotFound);
        assert_eq!(exit(&[result("t1", Some(Code::NotFound)), result("t2", None)]), Exit::Failure);
        assert_eq!(told(&[result("t1", None), result("t2", Some(Code::NotFound))], "QUEUED"), "t1 QUEUED\n");
    }

    #[test]
    fn each_call_has_a_request_id_of_its_own() {
        assert_eq!((part_id("", 3), part_id("r", 0), part_id("r", 2)), ("".into(), "r".into(), "r/2".into()));
    }
}
