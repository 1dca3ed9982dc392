//! `ledgerd dlq`: dead letters, the records of FAILED tasks.

mod mend;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use ledgerd_client::v1::{
    DeadLetter, DeadLetterFilter, DeadLetterGroup, GetDeadLetterRequest, GroupDeadLettersRequest,
    ListDeadLettersRequest, ListDeadLettersResponse,
};

use crate::Global;
use crate::connect::connect;
use crate::failure::Failure;
use crate::output::{Facts, Format, Rows, cell, instant, print, print_json, remark};
use crate::task::{Extent, show_error};
use crate::time::{Direction, When, now, to_wire};
use mend::{Discard, Redrive};

/// Commands on dead letters.
#[derive(Debug, Subcommand)]
pub enum DlqCommand {
    /// List dead letters, newest first
    List(List),
    /// Count dead letters that are alike, largest group first
    Group(Group),
    /// Show one dead letter
    Show {
        /// Id of the task
        id: String,
    },
    /// Put tasks back into the queue, by id or by filter: same id, same history
    Redrive(Box<Redrive>),
    /// Mark dead letters as not to be redriven, by id or by filter
    Discard(Discard),
}

/// Which dead letters.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Which {
    /// Only of this agent
    #[arg(long)]
    agent: Option<String>,
    /// Only of this type
    #[arg(long = "type", value_name = "TYPE")]
    task_type: Option<String>,
    /// Only with this reason: PERMANENT, RETRIES_EXHAUSTED, DEADLINE, BUDGET, POISON, UNDELIVERABLE, QUEUE_TIMEOUT
    #[arg(long)]
    reason: Option<String>,
    /// Only with this fingerprint, as `dlq group` prints it
    #[arg(long)]
    fingerprint: Option<String>,
    /// Only failed at this time or later: 2026-01-31T09:00, or 1h for an hour ago
    #[arg(long, value_name = "TIME", value_parser = When::parse, allow_hyphen_values = true)]
    since: Option<When>,
    /// Only failed before this time
    #[arg(long, value_name = "TIME", value_parser = When::parse, allow_hyphen_values = true)]
    until: Option<When>,
}

impl Which {
    fn is_empty(&self) -> bool {
        self.agent.is_none()
            && self.task_type.is_none()
            && self.reason.is_none()
            && self.fingerprint.is_none()
            && self.since.is_none()
            && self.until.is_none()
    }

    fn wire(&self, now: Timestamp) -> DeadLetterFilter {
        let instant = |when: When| to_wire(when.resolve(now, Direction::Back));
        DeadLetterFilter {
            agent: self.agent.clone().unwrap_or_default(),
            task_type: self.task_type.clone().unwrap_or_default(),
            reason: self.reason.clone().unwrap_or_default().to_uppercase(),
            fingerprint: self.fingerprint.clone().unwrap_or_default(),
            failed_after: self.since.map(instant),
            failed_before: self.until.map(instant),
        }
    }
}

/// `dlq list`.
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    which: Which,
    /// Discarded ones too
    #[arg(long)]
    discarded: bool,
    #[command(flatten)]
    extent: Extent,
}

/// `dlq group`.
#[derive(Debug, Args)]
pub struct Group {
    #[command(flatten)]
    which: Which,
    /// At most this many groups, 1 to 1,000
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: i32,
}

impl DlqCommand {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        match self {
            Self::List(command) => command.run(global).await,
            Self::Group(command) => command.run(global).await,
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
        let filter = self.which.wire(now());
        let mut request = ListDeadLettersRequest {
            agent: filter.agent,
            task_type: filter.task_type,
            reason: filter.reason,
            fingerprint: filter.fingerprint,
            failed_after: filter.failed_after,
            failed_before: filter.failed_before,
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

impl Group {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let filter = Some(self.which.wire(now())).filter(|_| !self.which.is_empty());
        let request = GroupDeadLettersRequest { filter, limit: self.limit };
        let response = connect(global).await?.admin().group_dead_letters(request).await?.into_inner();
        match global.output {
            Format::Json => print_json("GroupDeadLettersResponse", &response),
            Format::Table => {
                groups(&response.groups).print("no dead letters")?;
                let shown = response.groups.len() as u64;
                if shown < response.total_groups {
                    remark(&format!("{shown} of {} groups; --limit shows more", response.total_groups));
                }
                if response.more {
                    remark(&format!("only the newest {} dead letters were looked at", response.dead_letters));
                }
                Ok(())
            }
        }
    }
}

fn groups(groups: &[DeadLetterGroup]) -> Rows {
    let mut rows = Rows::new(["COUNT", "AGENT", "TYPE", "REASON", "FINGERPRINT", "LAST", "SAMPLE", "ERROR"]);
    for group in groups {
        let error = group.sample_error.as_ref().map(show_error).unwrap_or_default();
        rows.push([
            cell(group.count),
            cell(&group.agent),
            cell(&group.task_type),
            cell(&group.reason),
            cell(&group.fingerprint),
            cell(instant(group.last_fail_time.as_ref())),
            cell(&group.sample_task_id),
            cell(shorten(&error, 60)),
        ]);
    }
    rows
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
    use ledgerd_client::v1::TaskError;

    use super::*;

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
}
