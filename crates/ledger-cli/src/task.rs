//! `ledgerd task`: look at tasks, wait for them, change, answer and cancel them.

use std::collections::BTreeMap;
use std::io::Read;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use ledgerd_client::limits::MAX_ANSWER_BYTES;
use ledgerd_client::v1::{
    CancelTaskRequest, GetTaskHistoryRequest, GetTaskRequest, HistoryEvent, ListTasksRequest,
    ListTasksResponse, Task, TaskState, UnblockTaskRequest, UpdateTaskRequest,
};

use crate::actor::Actor;
use crate::connect::connect;
use crate::enqueue::Enqueue;
use crate::explain::Explain;
use crate::failure::Failure;
use crate::output::{
    Facts, Format, Rows, cell, instant, moment, one_line, pairs, print, print_json, readable, state_cell,
    task_state, with_reason,
};
use crate::policy::{self, Span, parse_label};
use crate::time::{Direction, When, now, to_wire};
use crate::watch::Watch;
use crate::{Global, wait, watch};

/// Commands on tasks.
#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// Enqueue one task, or many from a file
    Enqueue(Box<Enqueue>),
    /// List tasks, newest first
    List(List),
    /// Show one task
    Show(Show),
    /// Show what happened to a task, oldest first
    History(History),
    /// Say why a task is not running
    Explain(Explain),
    /// Wait until a task is done, failed or cancelled
    Wait(Wait),
    /// Show what happens to tasks as it happens, until interrupted
    Watch(Watch),
    /// Cancel a task
    Cancel(Cancel),
    /// Change priority or time of a waiting task
    Update(Update),
    /// Answer the question of a blocked task
    Unblock(Unblock),
}

impl TaskCommand {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        match self {
            Self::Enqueue(command) => command.run(global).await,
            Self::List(command) => command.run(global).await,
            Self::Show(command) => command.run(global).await,
            Self::History(command) => command.run(global).await,
            Self::Explain(command) => command.run(global).await,
            Self::Wait(command) => wait::run(&command, global).await,
            Self::Watch(command) => watch::run(command, global).await,
            Self::Cancel(command) => command.run(global).await,
            Self::Update(command) => command.run(global).await,
            Self::Unblock(command) => command.run(global).await,
        }
    }
}

/// A state in a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum State {
    Queued,
    Running,
    Retry,
    Blocked,
    Done,
    Failed,
    Cancelled,
}

impl From<State> for TaskState {
    fn from(state: State) -> Self {
        match state {
            State::Queued => Self::Queued,
            State::Running => Self::Running,
            State::Retry => Self::Retry,
            State::Blocked => Self::Blocked,
            State::Done => Self::Done,
            State::Failed => Self::Failed,
            State::Cancelled => Self::Cancelled,
        }
    }
}

/// How much of a list is wanted.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Extent {
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// All of them
    #[arg(long, conflicts_with = "limit")]
    all: bool,
}

impl Extent {
    /// Size of the next page when `have` entries are here already; none when that is enough.
    pub(crate) fn page_size(self, have: usize) -> Option<i32> {
        let left = if self.all { u64::MAX } else { self.limit.saturating_sub(have as u64) };
        (left > 0).then(|| i32::try_from(left.min(1_000)).expect("at most 1,000"))
    }
}

/// Which tasks a list or a watch is about.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Only of this agent
    #[arg(long)]
    agent: Option<String>,
    /// Only in this state; several may be given
    #[arg(long, value_enum, ignore_case = true, value_delimiter = ',')]
    state: Vec<State>,
    /// Only of this type
    #[arg(long = "type", value_name = "TYPE")]
    task_type: Option<String>,
    /// Only with this label; several must all be there
    #[arg(long, value_name = "K=V", value_parser = parse_label)]
    label: Vec<(String, String)>,
}

impl Which {
    /// Agent, states, type and labels, as requests have them.
    pub(crate) fn into_wire(self) -> (String, Vec<i32>, String, BTreeMap<String, String>) {
        let states = self.state.into_iter().map(|state| TaskState::from(state).into()).collect();
        let (agent, task_type) = (self.agent.unwrap_or_default(), self.task_type.unwrap_or_default());
        (agent, states, task_type, self.label.into_iter().collect())
    }
}

/// Filters of `task list`.
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    which: Which,
    /// Only of this priority
    #[arg(long, value_name = "0-9")]
    priority: Option<i32>,
    /// Only enqueued at this time or later: 2026-01-31T09:00, or 1h for an hour ago
    #[arg(long, value_name = "TIME", value_parser = When::parse, allow_hyphen_values = true)]
    since: Option<When>,
    /// Only enqueued before this time
    #[arg(long, value_name = "TIME", value_parser = When::parse, allow_hyphen_values = true)]
    until: Option<When>,
    #[command(flatten)]
    extent: Extent,
}

impl List {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let now = now();
        let instant = |when: When| to_wire(when.resolve(now, Direction::Back));
        let (agent, states, task_type, labels) = self.which.into_wire();
        let mut request = ListTasksRequest {
            agent,
            states,
            task_type,
            priority: self.priority,
            labels,
            created_after: self.since.map(instant),
            created_before: self.until.map(instant),
            page_size: 0,
            page_token: String::new(),
        };
        let client = connect(global).await?;
        let mut merged = ListTasksResponse::default();
        // A page may be empty and not be the last; only an empty token ends the list.
        while let Some(page_size) = self.extent.page_size(merged.tasks.len()) {
            request.page_size = page_size;
            let page = client.tasks().list_tasks(request.clone()).await?.into_inner();
            merged.tasks.extend(page.tasks);
            merged.next_page_token.clone_from(&page.next_page_token);
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                break;
            }
        }
        match global.output {
            Format::Json => print_json("ListTasksResponse", &merged),
            Format::Table => rows(&merged.tasks).print("no tasks"),
        }
    }
}

fn rows(tasks: &[Task]) -> Rows {
    let mut rows = Rows::new(["ID", "AGENT", "TYPE", "STATE", "PRI", "ATTEMPT", "CREATED", "WORKER"]);
    for task in tasks {
        rows.push([
            cell(&task.task_id),
            cell(&task.agent),
            cell(&task.task_type),
            state_cell(task.state, &task.reason),
            cell(task.priority),
            cell(task.attempt),
            cell(instant(task.create_time.as_ref())),
            cell(&task.worker_id),
        ]);
    }
    rows
}

/// `task show`.
#[derive(Debug, Args)]
pub struct Show {
    /// Id of the task
    id: String,
    /// Payload and result too
    #[arg(long)]
    data: bool,
}

impl Show {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let request = GetTaskRequest { task_id: self.id, include_data: self.data };
        let response = connect(global).await?.tasks().get_task(request).await?.into_inner();
        match global.output {
            Format::Json => print_json("GetTaskResponse", &response),
            Format::Table => print(&describe(&response.task.unwrap_or_default())),
        }
    }
}

/// A task as lines for people.
pub(crate) fn describe(task: &Task) -> String {
    let mut facts = Facts::default();
    let positive = |count: u32| if count == 0 { String::new() } else { count.to_string() };
    facts.push("id", &task.task_id);
    facts.push("agent", &task.agent);
    facts.push("type", &task.task_type);
    facts.push("state", with_reason(task_state(task.state), &task.reason));
    facts.push("question", &task.question);
    facts.push("answer", &task.answer);
    facts.push("follows", &task.parent_task_id);
    facts.push("priority", task.priority);
    facts.push("labels", pairs(&task.labels));
    facts.push("key", &task.idempotency_key);
    facts.push("created", instant(task.create_time.as_ref()));
    facts.push("updated", instant(task.update_time.as_ref()));
    facts.push("run at", instant(task.run_at.as_ref()));
    facts.push("deadline", instant(task.deadline.as_ref()));
    facts.push("worker", &task.worker_id);
    facts.push("lease until", instant(task.lease_until.as_ref()));
    if task.stop_cause != 0 {
        let name = task.stop_cause().as_str_name();
        facts.push("stop requested", name.strip_prefix("STOP_CAUSE_").unwrap_or(name));
    }
    facts.push("attempt", positive(task.attempt));
    facts.push("retries", positive(task.retry_count));
    facts.push("losses", positive(task.losses));
    if task.loss_weight != f64::from(task.losses) {
        facts.push("losses that count", format!("{:.2}", task.loss_weight));
    }
    facts.push("preemptions", positive(task.preemptions));
    facts.push("redrives", positive(task.redrives));
    facts.push("fence", task.fence);
    facts.push("version", task.version);
    if let Some(progress) = &task.progress {
        let percent = (progress.fraction * 100.0).round();
        facts.push("progress", format!("{percent}% {}", one_line(&progress.note)));
    }
    if let Some(error) = &task.last_error {
        facts.push("last error", show_error(error));
        facts.push("detail", &error.detail);
    }
    if let Some(given) = &task.policy {
        policy::describe(given, &mut facts);
    }
    describe_bytes("payload", &task.payload, task.payload_bytes, &mut facts);
    describe_bytes("result", &task.result, task.result_bytes, &mut facts);
    facts.render()
}

fn describe_bytes(name: &str, bytes: &[u8], size: u64, facts: &mut Facts) {
    if !bytes.is_empty() {
        facts.push(name, readable(bytes));
    } else if size > 0 {
        facts.push(name, format!("<{size} bytes>"));
    }
}

/// An error on one line.
pub(crate) fn show_error(error: &ledgerd_client::v1::TaskError) -> String {
    let class = error.class().as_str_name();
    let class = class.strip_prefix("ERROR_CLASS_").unwrap_or(class);
    let code = if error.code.is_empty() { String::new() } else { format!(" {}", error.code) };
    format!("{class}{code}: {}", error.message)
}

/// `task history`.
#[derive(Debug, Args)]
pub struct History {
    /// Id of the task
    id: String,
}

impl History {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let request = GetTaskHistoryRequest { task_id: self.id };
        let response = connect(global).await?.tasks().get_task_history(request).await?.into_inner();
        match global.output {
            Format::Json => print_json("GetTaskHistoryResponse", &response),
            Format::Table => history_rows(&response.events).print("no events"),
        }
    }
}

/// Failure, time and facts of an event.
pub(crate) fn remarks(event: &HistoryEvent) -> String {
    let mut note = Vec::new();
    note.extend(event.error.as_ref().map(show_error));
    note.extend(event.until.as_ref().map(|until| format!("until {}", instant(Some(until)))));
    note.extend((!event.facts.is_empty()).then(|| pairs(&event.facts)));
    note.join("; ")
}

fn history_rows(events: &[HistoryEvent]) -> Rows {
    let mut rows = Rows::new(["#", "TIME", "EVENT", "STATE", "ATTEMPT", "FENCE", "WORKER", "NOTE"]);
    for event in events {
        rows.push([
            cell(event.version),
            cell(moment(event.time.as_ref())),
            cell(&event.event),
            state_cell(event.to, &event.reason),
            cell(event.attempt),
            cell(event.fence),
            cell(&event.worker_id),
            cell(remarks(event)),
        ]);
    }
    rows
}

/// `task wait`.
#[derive(Debug, Args)]
pub struct Wait {
    /// Id of the task
    pub(crate) id: String,
    /// Longest wait; without it there is no limit
    #[arg(long, value_name = "DUR")]
    pub(crate) timeout: Option<Span>,
}

/// `task cancel`.
#[derive(Debug, Args)]
pub struct Cancel {
    /// Id of the task
    id: String,
    /// Why, for the audit trail
    #[arg(long, default_value = "")]
    reason: String,
    /// Makes a repeated call harmless
    #[arg(long, value_name = "ID", default_value = "")]
    request_id: String,
}

impl Cancel {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let request =
            CancelTaskRequest { task_id: self.id, reason: self.reason, request_id: self.request_id };
        let response = connect(global).await?.tasks().cancel_task(request).await?.into_inner();
        match global.output {
            Format::Json => print_json("CancelTaskResponse", &response),
            Format::Table => {
                let task = response.task.unwrap_or_default();
                let stopping =
                    if task.state() == TaskState::Cancelled { "" } else { "; its worker is asked to stop" };
                print(&format!("{} {}{stopping}\n", task.task_id, task_state(task.state)))
            }
        }
    }
}

/// `task update`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("change").required(true).multiple(true).args(["priority", "run_at", "delay"])))]
pub struct Update {
    /// Id of the task
    id: String,
    /// 0 to 9, higher sooner
    #[arg(long, value_name = "0-9")]
    priority: Option<i32>,
    /// Not before this time; one that is past: now
    #[arg(long, value_name = "TIME", value_parser = When::parse, allow_hyphen_values = true)]
    run_at: Option<When>,
    /// Not before this time has passed
    #[arg(long, value_name = "DUR", conflicts_with = "run_at")]
    delay: Option<Span>,
    /// Why, for the audit trail
    #[arg(long, default_value = "")]
    reason: String,
    /// Makes a repeated call harmless
    #[arg(long, value_name = "ID", default_value = "")]
    request_id: String,
}

impl Update {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let delay =
            self.delay.and_then(|span| jiff::SignedDuration::try_from(span.0).ok()).map(When::Distance);
        let request = UpdateTaskRequest {
            task_id: self.id,
            priority: self.priority,
            run_at: self.run_at.or(delay).map(|when| to_wire(when.resolve(now(), Direction::Ahead))),
            reason: self.reason,
            request_id: self.request_id,
        };
        let response = connect(global).await?.tasks().update_task(request).await?.into_inner();
        match global.output {
            Format::Json => print_json("UpdateTaskResponse", &response),
            Format::Table => {
                let task = response.task.unwrap_or_default();
                let at = instant(task.run_at.as_ref());
                let state = with_reason(task_state(task.state), &task.reason);
                print(&format!("{} {state}, priority {}, run at {at}\n", task.task_id, task.priority))
            }
        }
    }
}

/// `task unblock`.
#[derive(Debug, Args)]
pub struct Unblock {
    /// Id of the task
    id: String,
    /// What the next attempt is told, at most 16 KiB; - reads standard input, less its last line end
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    answer: String,
    #[command(flatten)]
    actor: Actor,
    /// Makes a repeated call harmless
    #[arg(long, value_name = "ID", default_value = "")]
    request_id: String,
}

impl Unblock {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let answer = read_answer(self.answer, std::io::stdin().lock())?;
        let request = UnblockTaskRequest {
            task_id: self.id,
            answer,
            actor: self.actor.name(),
            request_id: self.request_id,
        };
        let response = connect(global).await?.tasks().unblock_task(request).await?.into_inner();
        match global.output {
            Format::Json => print_json("UnblockTaskResponse", &response),
            Format::Table => {
                let task = response.task.unwrap_or_default();
                print(&format!("{} {}\n", task.task_id, with_reason(task_state(task.state), &task.reason)))
            }
        }
    }
}

/// The answer as it is sent, checked before it travels.
fn read_answer(given: String, input: impl Read) -> Result<String, Failure> {
    let mut answer = given;
    if answer == "-" {
        answer.clear();
        let most = MAX_ANSWER_BYTES as u64 + 2;
        input.take(most + 1).read_to_string(&mut answer).map_err(|error| {
            Failure::usage(format!("the answer cannot be read from standard input: {error}"))
        })?;
        if answer.ends_with('\n') {
            answer.truncate(answer.len() - if answer.ends_with("\r\n") { 2 } else { 1 });
        }
    }
    if answer.len() > MAX_ANSWER_BYTES {
        return Err(Failure::usage(
            "the answer has more than 16 KiB; put it where the worker can read it, and answer with the place",
        ));
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use ledgerd_client::v1::{Progress, TaskError};

    use super::*;

    fn failed() -> Task {
        Task {
            task_id: "t1k3".into(),
            agent: "claude".into(),
            task_type: "review".into(),
            state: TaskState::Failed.into(),
            reason: "PERMANENT".into(),
            priority: 5,
            attempt: 2,
            fence: 3,
            version: 9,
            last_error: Some(TaskError {
                class: 6,
                code: "EXIT_78".into(),
                message: "no repo".into(),
                ..TaskError::default()
            }),
            progress: Some(Progress { fraction: 0.5, note: "cloned".into(), time: None }),
            payload: r#"{"a":1}"#.into(),
            payload_bytes: 7,
            result_bytes: 12,
            ..Task::default()
        }
    }

    #[test]
    fn a_task_reads_as_lines() {
        assert_eq!(
            describe(&failed()),
            "id          t1k3\n\
             agent       claude\n\
             type        review\n\
             state       FAILED (PERMANENT)\n\
             priority    5\n\
             attempt     2\n\
             fence       3\n\
             version     9\n\
             progress    50% cloned\n\
             last error  PERMANENT EXIT_78: no repo\n\
             payload     {\"a\":1}\n\
             result      <12 bytes>\n"
        );
    }

    #[test]
    fn a_task_that_was_answered_reads_as_lines() {
        let mut task = Task {
            question: "which branch?".into(),
            answer: "main\nnot dev".into(),
            parent_task_id: "t1".into(),
            losses: 2,
            loss_weight: 0.5,
            preemptions: 1,
            ..Task::default()
        };
        let text = describe(&task);
        for line in [
            "question           which branch?\n",
            "answer             main\n                   not dev\n",
            "follows            t1\n",
            "losses             2\nlosses that count  0.50\n",
            "preemptions        1\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        task.loss_weight = 2.0;
        assert!(!describe(&task).contains("losses that count"), "nothing that the count does not say");
    }

    #[test]
    fn an_answer_comes_as_text_or_from_standard_input() {
        let read = |given: &str, input: &[u8]| read_answer(given.into(), input);
        assert_eq!(read("yes", b"never read"), Ok("yes".into()));
        assert_eq!(read("", b"never read"), Ok(String::new()));
        assert_eq!(read("-", b"two\nlines\n"), Ok("two\nlines".into()));
        assert_eq!(read("-", b"dos\r\n"), Ok("dos".into()));
        let full = "x".repeat(MAX_ANSWER_BYTES);
        assert_eq!(read("-", format!("{full}\r\n").as_bytes()), Ok(full.clone()));
        for (given, input) in [(format!("{full}x"), String::new()), ("-".into(), format!("{full}xyz"))] {
            let Err(Failure::Said(_, sentence)) = read(&given, input.as_bytes()) else { panic!("was taken") };
            assert!(sentence.contains("more than 16 KiB; put it where"), "{sentence}");
        }
        let Err(Failure::Said(_, sentence)) = read("-", b"\xff") else { panic!("was taken") };
        assert!(sentence.contains("standard input"), "{sentence}");
    }

    #[test]
    fn tasks_read_as_rows() {
        assert_eq!(
            rows(&[failed()]).render(),
            "ID    AGENT   TYPE    STATE               PRI  ATTEMPT  CREATED  WORKER\n\
             t1k3  claude  review  FAILED (PERMANENT)  5    2\n"
        );
    }

    #[test]
    fn history_reads_as_rows() {
        let event = HistoryEvent {
            version: 4,
            event: "FAILED".into(),
            to: TaskState::Retry.into(),
            reason: "BACKOFF".into(),
            attempt: 1,
            fence: 1,
            worker_id: "h/claude/0".into(),
            error: Some(TaskError { class: 1, message: "busy\nnow".into(), ..TaskError::default() }),
            facts: [("late".into(), "true".into())].into(),
            ..HistoryEvent::default()
        };
        assert_eq!(
            history_rows(&[event]).render(),
            "#  TIME  EVENT   STATE            ATTEMPT  FENCE  WORKER      NOTE\n\
             4        FAILED  RETRY (BACKOFF)  1        1      h/claude/0  TRANSIENT: busy now; late=true\n"
        );
    }

    #[test]
    fn pages_are_asked_for_until_the_limit() {
        let extent = Extent { limit: 1_500, all: false };
        assert_eq!(extent.page_size(0), Some(1_000));
        assert_eq!(extent.page_size(1_000), Some(500));
        assert_eq!(extent.page_size(1_500), None);
        assert_eq!(Extent { limit: 50, all: true }.page_size(5_000), Some(1_000));
    }
}
