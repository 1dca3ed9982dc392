//! `dlq redrive` and `dlq discard`: what is done about dead letters, by id or by filter.
//!
//! A filter is counted before anything is done, and asked about. The time of that count is made part of it: what fails
//! again while the command works is not taken up a second time, so the command ends.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;
use jiff::Timestamp;
use ledgerd_client::Client;
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

impl Redrive {
    pub(super) async fn run(self, global: &Global) -> Result<(), Failure> {
        let now = now();
        let ahead = |when: When| to_wire(when.resolve(now, Direction::Ahead));
        let rest = self.chosen.rest(now)?;
        let mut request = RedriveDeadLettersRequest {
            deadline: self.deadline.map(ahead),
            start_time: self.start.map(ahead),
            rate_per_second: self.rate,
            priority: self.priority,
            payload: self.payload.as_deref().map(|given| payload(given, self.raw)).transpose()?,
            agent: self.to_agent.clone().unwrap_or_default(),
            reason: self.note.clone(),
            actor: self.chosen.actor.name(),
            ..RedriveDeadLettersRequest::default()
        };
        let client = connect(global).await?;
        let mut merged = RedriveDeadLettersResponse::default();
        let mut pieces = match rest {
            Rest::Filter(filter) => {
                request.filter = Some(filter);
                let counted =
                    redrive(&client, RedriveDeadLettersRequest { dry_run: true, ..request.clone() }).await?;
                if self.chosen.dry_run || counted.matched == 0 {
                    return told_count(
                        global,
                        "RedriveDeadLettersResponse",
                        &counted,
                        (counted.matched, counted.more),
                    );
                }
                self.chosen.confirm("redrive", counted.matched, counted.more)?;
                merged.matched = counted.matched;
                None
            }
            Rest::Ids(pieces) => Some(pieces.into_iter()),
        };
        for number in 0.. {
            if let Some(pieces) = &mut pieces {
                let Some(ids) = pieces.next() else { break };
                request.task_ids = ids;
            }
            request.request_id = part_id(&self.chosen.request_id, number);
            let answer = redrive(&client, request.clone()).await?;
            let done = answer.results.iter().any(|result| result.error.is_none());
            request.start_time = answer.next_start_time.or(request.start_time);
            merged.results.extend(answer.results);
            merged.next_start_time = answer.next_start_time;
            merged.more = pieces.is_none() && answer.more;
            if pieces.is_none() && !(answer.more && done) {
                break;
            }
        }
        match global.output {
            Format::Json => print_json("RedriveDeadLettersResponse", &merged)?,
            Format::Table => print(&told(&merged.results, "QUEUED"))?,
        }
        verdict(&merged.results)
    }
}

async fn redrive(
    client: &Client,
    request: RedriveDeadLettersRequest,
) -> Result<RedriveDeadLettersResponse, Failure> {
    Ok(client.admin().redrive_dead_letters(request).await?.into_inner())
}

impl Discard {
    pub(super) async fn run(self, global: &Global) -> Result<(), Failure> {
        let rest = self.chosen.rest(now())?;
        let mut request = DiscardDeadLettersRequest {
            reason: self.note.clone(),
            actor: self.chosen.actor.name(),
            ..DiscardDeadLettersRequest::default()
        };
        let client = connect(global).await?;
        let mut merged = DiscardDeadLettersResponse::default();
        let mut pieces = match rest {
            Rest::Filter(filter) => {
                request.filter = Some(filter);
                let counted =
                    discard(&client, DiscardDeadLettersRequest { dry_run: true, ..request.clone() }).await?;
                if self.chosen.dry_run || counted.matched == 0 {
                    return told_count(
                        global,
                        "DiscardDeadLettersResponse",
                        &counted,
                        (counted.matched, counted.more),
                    );
                }
                self.chosen.confirm("discard", counted.matched, counted.more)?;
                merged.matched = counted.matched;
                None
            }
            Rest::Ids(pieces) => Some(pieces.into_iter()),
        };
        for number in 0.. {
            if let Some(pieces) = &mut pieces {
                let Some(ids) = pieces.next() else { break };
                request.task_ids = ids;
            }
            request.request_id = part_id(&self.chosen.request_id, number);
            let answer = discard(&client, request.clone()).await?;
            let done = answer.results.iter().any(|result| result.error.is_none());
            merged.results.extend(answer.results);
            merged.more = pieces.is_none() && answer.more;
            if pieces.is_none() && !(answer.more && done) {
                break;
            }
        }
        match global.output {
            Format::Json => print_json("DiscardDeadLettersResponse", &merged)?,
            Format::Table => print(&told(&merged.results, "discarded"))?,
        }
        verdict(&merged.results)
    }
}

async fn discard(
    client: &Client,
    request: DiscardDeadLettersRequest,
) -> Result<DiscardDeadLettersResponse, Failure> {
    Ok(client.admin().discard_dead_letters(request).await?.into_inner())
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
