//! `ledgerd dlq`: dead letters, the records of FAILED tasks.

use clap::{Args, Subcommand};
use ledgerd_client::v1::{
    DeadLetter, DeadLetterResult, DiscardDeadLettersRequest, DiscardDeadLettersResponse,
    GetDeadLetterRequest, ListDeadLettersRequest, ListDeadLettersResponse, RedriveDeadLettersRequest,
    RedriveDeadLettersResponse,
};
use tonic::Code;

use crate::Global;
use crate::connect::connect;
use crate::failure::{Exit, Failure, exit_of};
use crate::output::{Facts, Format, Rows, cell, instant, one_line, print, print_json, remark};
use crate::task::{Extent, show_error};
use crate::time::{Direction, When, now, to_wire};

/// Ids in one call, the ledger's limit.
const CALL_IDS: usize = 1_000;

/// Commands on dead letters.
#[derive(Debug, Subcommand)]
pub enum DlqCommand {
    /// List dead letters, newest first
    List(List),
    /// Show one dead letter
    Show {
        /// Id of the task
        id: String,
    },
    /// Put tasks back into the queue: same id, same history
    Redrive(Redrive),
    /// Mark dead letters as not to be redriven
    Discard(Discard),
}

/// Filters of `dlq list`.
#[derive(Debug, Args)]
pub struct List {
    /// Only of this agent
    #[arg(long)]
    agent: Option<String>,
    /// Only of this type
    #[arg(long = "type", value_name = "TYPE")]
    task_type: Option<String>,
    /// Only with this reason: PERMANENT, RETRIES_EXHAUSTED, DEADLINE, BUDGET, POISON, UNDELIVERABLE, QUEUE_TIMEOUT
    #[arg(long)]
    reason: Option<String>,
    /// Only with this fingerprint, as `dlq show` prints it
    #[arg(long)]
    fingerprint: Option<String>,
    /// Only failed at this time or later: 2026-01-31T09:00, or 1h for an hour ago
    #[arg(long, value_name = "TIME", value_parser = When::parse, allow_hyphen_values = true)]
    since: Option<When>,
    /// Only failed before this time
    #[arg(long, value_name = "TIME", value_parser = When::parse, allow_hyphen_values = true)]
    until: Option<When>,
    /// Discarded ones too
    #[arg(long)]
    discarded: bool,
    #[command(flatten)]
    extent: Extent,
}

/// `dlq redrive`.
#[derive(Debug, Args)]
pub struct Redrive {
    /// Ids of tasks
    #[arg(value_name = "ID", required = true)]
    ids: Vec<String>,
    /// New deadline; else the old one, unless it is past
    #[arg(long, value_name = "TIME|DUR", value_parser = When::parse, allow_hyphen_values = true)]
    deadline: Option<When>,
    /// Makes a repeated call harmless
    #[arg(long, value_name = "ID", default_value = "")]
    request_id: String,
}

/// `dlq discard`.
#[derive(Debug, Args)]
pub struct Discard {
    /// Ids of tasks
    #[arg(value_name = "ID", required = true)]
    ids: Vec<String>,
    /// Why, for the audit trail
    #[arg(long)]
    reason: String,
    /// Makes a repeated call harmless
    #[arg(long, value_name = "ID", default_value = "")]
    request_id: String,
}

impl DlqCommand {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        match self {
            Self::List(command) => command.run(global).await,
            Self::Show { id } => {
                let request = GetDeadLetterRequest { task_id: id };
                let response = connect(global).await?.admin().get_dead_letter(request).await?.into_inner();
                match global.output {
                    Format::Json => print_json("GetDeadLetterResponse", &response),
                    Format::Table => print(&describe(&response.dead_letter.unwrap_or_default())),
                }
            }
            Self::Redrive(command) => command.run(global).await,
            Self::Discard(command) => command.run(global).await,
        }
    }
}

impl List {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let now = now();
        let instant = |when: When| to_wire(when.resolve(now, Direction::Back));
        let mut request = ListDeadLettersRequest {
            agent: self.agent.unwrap_or_default(),
            task_type: self.task_type.unwrap_or_default(),
            reason: self.reason.unwrap_or_default().to_uppercase(),
            fingerprint: self.fingerprint.unwrap_or_default(),
            failed_after: self.since.map(instant),
            failed_before: self.until.map(instant),
            include_discarded: self.discarded,
            ..ListDeadLettersRequest::default()
        };
        let client = connect(global).await?;
        let mut merged = ListDeadLettersResponse::default();
        while let Some(page_size) = self.extent.page_size(merged.dead_letters.len()) {
            request.page_size = page_size;
            let page = client.admin().list_dead_letters(request.clone()).await?.into_inner();
            merged.dead_letters.extend(page.dead_letters);
            merged.next_page_token.clone_from(&page.next_page_token);
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                break;
            }
        }
        match global.output {
            Format::Json => print_json("ListDeadLettersResponse", &merged),
            Format::Table => rows(&merged.dead_letters).print("no dead letters"),
        }
    }
}

impl Redrive {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let deadline = self.deadline.map(|when| to_wire(when.resolve(now(), Direction::Ahead)));
        let client = connect(global).await?;
        let mut merged = RedriveDeadLettersResponse::default();
        for (number, ids) in self.ids.chunks(CALL_IDS).enumerate() {
            let task_ids = ids.to_vec();
            let request_id = part_id(&self.request_id, number);
            let request = RedriveDeadLettersRequest {
                task_ids,
                deadline,
                request_id,
                ..RedriveDeadLettersRequest::default()
            };
            merged.results.extend(client.admin().redrive_dead_letters(request).await?.into_inner().results);
        }
        match global.output {
            Format::Json => print_json("RedriveDeadLettersResponse", &merged)?,
            Format::Table => print(&told(&merged.results, "QUEUED"))?,
        }
        verdict(&merged.results)
    }
}

impl Discard {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let client = connect(global).await?;
        let mut merged = DiscardDeadLettersResponse::default();
        for (number, ids) in self.ids.chunks(CALL_IDS).enumerate() {
            let request = DiscardDeadLettersRequest {
                task_ids: ids.to_vec(),
                reason: self.reason.clone(),
                request_id: part_id(&self.request_id, number),
                ..DiscardDeadLettersRequest::default()
            };
            merged.results.extend(client.admin().discard_dead_letters(request).await?.into_inner().results);
        }
        match global.output {
            Format::Json => print_json("DiscardDeadLettersResponse", &merged)?,
            Format::Table => print(&told(&merged.results, "discarded"))?,
        }
        verdict(&merged.results)
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

fn rows(letters: &[DeadLetter]) -> Rows {
    let mut rows = Rows::new(["ID", "AGENT", "TYPE", "REASON", "ATTEMPT", "FAILED", "ERROR"]);
    for letter in letters {
        let error = letter.error.as_ref().map(show_error).unwrap_or_default();
        let discarded = if letter.discard_time.is_some() { " (discarded)" } else { "" };
        rows.push([
            cell(&letter.task_id),
            cell(&letter.agent),
            cell(&letter.task_type),
            cell(format!("{}{discarded}", letter.reason)),
            cell(letter.attempt),
            cell(instant(letter.fail_time.as_ref())),
            cell(shorten(&error, 80)),
        ]);
    }
    rows
}

fn shorten(text: &str, limit: usize) -> String {
    if text.chars().count() <= limit {
        return text.into();
    }
    let head: String = text.chars().take(limit - 1).collect();
    format!("{head}…")
}

fn describe(letter: &DeadLetter) -> String {
    let mut facts = Facts::default();
    facts.push("id", &letter.task_id);
    facts.push("agent", &letter.agent);
    facts.push("type", &letter.task_type);
    facts.push("reason", &letter.reason);
    facts.push("failed", instant(letter.fail_time.as_ref()));
    facts.push("attempt", letter.attempt);
    facts.push("redrives", letter.redrives);
    facts.push("fingerprint", &letter.fingerprint);
    if let Some(error) = &letter.error {
        facts.push("error", show_error(error));
        facts.push("detail", &error.detail);
    }
    facts.push("discarded", instant(letter.discard_time.as_ref()));
    facts.push("discard reason", &letter.discard_reason);
    facts.render()
}

#[cfg(test)]
mod tests {
    use ledgerd_client::v1::{ItemError, TaskError};

    use super::*;

    fn result(id: &str, code: Option<Code>) -> DeadLetterResult {
        let error =
            code.map(|code| ItemError { code: code.into(), reason: "WHY".into(), ..ItemError::default() });
        DeadLetterResult { task_id: id.into(), error }
    }

    #[test]
    fn dead_letters_read_as_rows() {
        let letter = DeadLetter {
            task_id: "t9".into(),
            agent: "claude".into(),
            task_type: "review".into(),
            reason: "POISON".into(),
            attempt: 3,
            error: Some(TaskError {
                class: 2,
                code: "EXIT_1".into(),
                message: "x".repeat(200),
                ..TaskError::default()
            }),
            ..DeadLetter::default()
        };
        let text = rows(&[letter]).render();
        let (heading, row) = text.split_once('\n').expect("two lines");
        assert_eq!(heading, "ID  AGENT   TYPE    REASON  ATTEMPT  FAILED  ERROR");
        assert!(row.starts_with("t9  claude  review  POISON  3                UNKNOWN EXIT_1: xxx"), "{row}");
        assert!(row.ends_with("x…\n"), "{row}");
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
