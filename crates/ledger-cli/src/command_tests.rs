//! Whole commands against a scripted daemon: what they ask, how often, and how they end.

use std::io::Write;

use clap::Parser;
use ledgerd_client::v1::*;
use prost::Message;
use tonic::Status;

use super::{Command, Global};
use crate::Format;
use crate::failure::{Exit, Failure};
use crate::fake::Fake;

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

async fn run(line: &str, global: &Global) -> Result<(), Failure> {
    let cli = Cli::try_parse_from(std::iter::once("ledgerd").chain(line.split(' '))).expect("arguments");
    match cli.command {
        Command::Task(command) => command.run(global).await,
        Command::Agent(command) => command.run(global).await,
        Command::Breaker(command) => command.run(global).await,
        Command::Dlq(command) => command.run(global).await,
        Command::Worker(command) => command.run(global).await,
        Command::Stats(command) => command.run(global).await,
        Command::Demo(command) => command.run(global).await,
        Command::Bench(command) => command.run(global).await,
    }
}

fn exit(result: Result<(), Failure>) -> Option<Exit> {
    match result {
        Ok(()) => None,
        Err(Failure::Said(exit, _)) => Some(exit),
        Err(other) => panic!("{other:?}"),
    }
}

/// Answers `list_tasks` with two tasks a page, the second page empty, three pages in all.
fn pages(_: &str, request: &[u8]) -> Result<Vec<u8>, Status> {
    let request = ListTasksRequest::decode(request).expect("a request");
    let task = || Task { task_id: "t1".into(), ..Task::default() };
    let (tasks, next) = match request.page_token.as_str() {
        "" => (vec![task(), task()], "2"),
        "2" => (vec![], "3"),
        _ => (vec![task(), task()], ""),
    };
    Ok(ListTasksResponse { tasks, next_page_token: next.into() }.encode_to_vec())
}

#[tokio::test]
async fn a_list_follows_its_pages_over_empty_ones() {
    let fake = Fake::start(pages).await;
    let line = "task list --agent a --state failed,retry --label k=v --priority 3 --since 1h --all";
    assert_eq!(run(line, &fake.global(Format::Json)).await, Ok(()));
    let requests = fake.requests::<ListTasksRequest>("ListTasks");
    let tokens: Vec<_> = requests.iter().map(|request| request.page_token.as_str()).collect();
    assert_eq!(tokens, ["", "2", "3"]);
    let first = &requests[0];
    assert_eq!((first.agent.as_str(), first.priority, first.page_size), ("a", Some(3), 1_000));
    assert_eq!(first.states, [TaskState::Failed as i32, TaskState::Retry as i32]);
    assert_eq!(first.labels["k"], "v");
    assert!(first.created_after.is_some() && first.created_before.is_none());
}

#[tokio::test]
async fn a_list_ends_at_its_limit() {
    let fake = Fake::start(pages).await;
    assert_eq!(run("task list --limit 2", &fake.global(Format::Table)).await, Ok(()));
    let requests = fake.requests::<ListTasksRequest>("ListTasks");
    assert_eq!(requests.iter().map(|request| request.page_size).collect::<Vec<_>>(), [2]);
}

#[tokio::test]
async fn waiting_goes_on_until_the_task_ends() {
    let answers = std::sync::atomic::AtomicUsize::new(0);
    let fake = Fake::start(move |_, _| {
        let first = answers.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0;
        let state = if first { TaskState::Running } else { TaskState::Failed };
        let task = Task { task_id: "t1".into(), state: state.into(), ..Task::default() };
        Ok(WaitTaskResponse { task: Some(task) }.encode_to_vec())
    })
    .await;
    assert_eq!(exit(run("task wait t1", &fake.global(Format::Json)).await), Some(Exit::TaskFailed));
    let requests = fake.requests::<WaitTaskRequest>("WaitTask");
    assert_eq!(requests.len(), 2);
    assert!(requests[0].include_data && requests[0].timeout.is_some_and(|timeout| timeout.seconds == 50));
}

#[tokio::test]
async fn waiting_ends_with_its_time() {
    let fake = Fake::start(|_, _| {
        let task = Task { task_id: "t1".into(), state: TaskState::Queued.into(), ..Task::default() };
        Ok(WaitTaskResponse { task: Some(task) }.encode_to_vec())
    })
    .await;
    let line = "task wait t1 --timeout 20ms";
    assert_eq!(exit(run(line, &fake.global(Format::Table)).await), Some(Exit::Timeout));
}

#[tokio::test]
async fn enqueue_and_wait_is_one_command() {
    let fake = Fake::start(|method, _| match method {
        "EnqueueTask" => Ok(EnqueueTaskResponse { task_id: "t7".into(), created: true }.encode_to_vec()),
        _ => {
            let task = Task { task_id: "t7".into(), state: TaskState::Done.into(), ..Task::default() };
            Ok(WaitTaskResponse { task: Some(task) }.encode_to_vec())
        }
    })
    .await;
    let line = "task enqueue claude review --payload {} --request-id r --wait --wait-timeout 1m";
    assert_eq!(run(line, &fake.global(Format::Table)).await, Ok(()));
    assert_eq!(fake.requests::<EnqueueTaskRequest>("EnqueueTask")[0].request_id, "r");
    assert_eq!(fake.requests::<WaitTaskRequest>("WaitTask")[0].task_id, "t7");
}

#[tokio::test]
async fn refusals_have_their_exit_codes() {
    let fake = Fake::start(|_, _| Err(Status::not_found("There is no task t9"))).await;
    for line in [
        "task show t9 --data",
        "task history t9",
        "task explain t9",
        "task cancel t9",
        "task unblock t9 --answer x",
        "task update t9 --priority 1",
        "dlq show t9",
        "agent show a",
        "agent resume a",
    ] {
        assert_eq!(exit(run(line, &fake.global(Format::Table)).await), Some(Exit::NotFound), "{line}");
    }
}

#[tokio::test]
async fn every_listing_prints_in_both_forms() {
    let fake = Fake::start(|_, _| Ok(Vec::new())).await;
    for line in [
        "task list",
        "task history t1",
        "task explain t1",
        "agent list",
        "agent show a",
        "agent configure a --max-waiting 3",
        "agent pause a --reason repairs",
        "agent resume a",
        "task update t1 --priority 1",
        "task unblock t1 --answer yes",
        "breaker list",
        "breaker show a",
        "breaker reset a",
        "dlq list",
        "dlq show t1",
        "dlq redrive t1",
        "dlq discard t1 --note old",
        "dlq group --agent a",
        "dlq redrive --agent a --dry-run",
        "worker list",
        "stats",
    ] {
        for format in [Format::Table, Format::Json] {
            assert_eq!(run(line, &fake.global(format)).await, Ok(()), "{line}");
        }
    }
}

fn stored(_: &str, _: &[u8]) -> Result<Vec<u8>, Status> {
    let task = Task { task_id: "t1".into(), state: TaskState::Queued.into(), ..Task::default() };
    // The field of the task is the first one of both answers.
    Ok(UpdateTaskResponse { task: Some(task) }.encode_to_vec())
}

#[tokio::test]
async fn an_update_sends_what_was_given_and_nothing_else() {
    let fake = Fake::start(stored).await;
    let global = fake.global(Format::Table);
    assert_eq!(run("task update t1 --priority 9 --reason hurry --request-id r", &global).await, Ok(()));
    assert_eq!(run("task update t1 --delay 1h", &global).await, Ok(()));
    assert_eq!(run("task update t1 --run-at 2026-01-31T09:00:00Z --priority 0", &global).await, Ok(()));
    let requests = fake.requests::<UpdateTaskRequest>("UpdateTask");
    let first = UpdateTaskRequest {
        task_id: "t1".into(),
        priority: Some(9),
        run_at: None,
        reason: "hurry".into(),
        request_id: "r".into(),
    };
    assert_eq!(requests[0], first);
    let ahead = requests[1].run_at.expect("a time").seconds - crate::time::now().as_second();
    assert!((3_590..=3_600).contains(&ahead) && requests[1].priority.is_none(), "{ahead}");
    assert_eq!(
        (requests[2].priority, requests[2].run_at.map(|at| at.seconds)),
        (Some(0), Some(1_769_850_000))
    );
}

#[tokio::test]
async fn an_answer_names_who_gave_it() {
    let fake = Fake::start(stored).await;
    let global = fake.global(Format::Table);
    assert_eq!(run("task unblock t1 --answer yes --actor ada --request-id r", &global).await, Ok(()));
    assert_eq!(run("task unblock t1 --answer=", &global).await, Ok(()));
    let requests = fake.requests::<UnblockTaskRequest>("UnblockTask");
    let of = |request: &UnblockTaskRequest| (request.answer.clone(), request.actor.clone());
    assert_eq!(of(&requests[0]), ("yes".into(), "ada".into()));
    assert_eq!((requests[0].task_id.as_str(), requests[0].request_id.as_str()), ("t1", "r"));
    let (answer, actor) = of(&requests[1]);
    assert!(answer.is_empty() && actor.ends_with(&format!("@{}", crate::actor::host())), "{actor}");
}

#[tokio::test]
async fn an_agent_is_paused_and_resumed() {
    let fake = Fake::start(|_, _| Ok(Vec::new())).await;
    let global = fake.global(Format::Table);
    assert_eq!(run("agent pause a --reason repairs --for 1h --actor ada", &global).await, Ok(()));
    assert_eq!(run("agent pause a --reason repairs", &global).await, Ok(()));
    assert_eq!(run("agent resume a --reason done --actor ada", &global).await, Ok(()));
    let pauses = fake.requests::<PauseAgentRequest>("PauseAgent");
    let first = PauseAgentRequest {
        agent: "a".into(),
        reason: "repairs".into(),
        actor: "ada".into(),
        duration: Some(prost_types::Duration { seconds: 3_600, nanos: 0 }),
    };
    assert_eq!(pauses[0], first);
    assert!(pauses[1].duration.is_none() && pauses[1].actor.contains('@'));
    let resumed = &fake.requests::<ResumeAgentRequest>("ResumeAgent")[0];
    assert_eq!((&*resumed.agent, &*resumed.reason, &*resumed.actor), ("a", "done", "ada"));
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(text.as_bytes()).expect("written");
    file
}

fn created(request: &[u8]) -> Result<Vec<u8>, Status> {
    let request = EnqueueTasksRequest::decode(request).expect("a request");
    let result = |_| EnqueueResult { task_id: "t1".into(), created: true, error: None };
    Ok(EnqueueTasksResponse { results: request.tasks.iter().map(result).collect() }.encode_to_vec())
}

#[tokio::test]
async fn a_file_is_sent_in_batches_with_ids_of_their_own() {
    let fake = Fake::start(|_, request| created(request)).await;
    let tasks = file(&"{\"payload\":1}\n".repeat(2_100));
    let line = format!("task enqueue claude review --from {} --request-id r", tasks.path().display());
    assert_eq!(run(&line, &fake.global(Format::Json)).await, Ok(()));
    let requests = fake.requests::<EnqueueTasksRequest>("EnqueueTasks");
    let sent: Vec<_> = requests.iter().map(|batch| (batch.tasks.len(), batch.request_id.as_str())).collect();
    assert_eq!(sent, [(1_000, "r/1"), (1_000, "r/2"), (100, "r/3")]);
    assert_eq!(requests[0].mode(), BatchMode::PerItem);
    assert_eq!(
        (requests[0].tasks[0].agent.as_str(), requests[0].tasks[0].payload.as_ref()),
        ("claude", &b"1"[..])
    );
}

#[tokio::test]
async fn nothing_is_sent_of_a_file_with_a_bad_line() {
    let fake = Fake::start(|_, request| created(request)).await;
    let tasks = file("{\"agent\":\"a\",\"task_type\":\"t\"}\n{\"agnet\":\"a\"}\n");
    let line = format!("task enqueue --from {}", tasks.path().display());
    assert_eq!(exit(run(&line, &fake.global(Format::Table)).await), Some(Exit::Usage));
    assert!(fake.requests::<EnqueueTasksRequest>("EnqueueTasks").is_empty());
    assert_eq!(run(&format!("{line} --skip-bad"), &fake.global(Format::Table)).await, Ok(()));
    assert_eq!(fake.requests::<EnqueueTasksRequest>("EnqueueTasks")[0].tasks.len(), 1);
}

#[tokio::test]
async fn an_import_stops_at_the_first_call_that_fails() {
    let fake = Fake::start(|_, _| Err(Status::resource_exhausted("The queue is full"))).await;
    let tasks = file(&"{\"agent\":\"a\",\"task_type\":\"t\"}\n".repeat(5_000));
    let line = format!("task enqueue --from {}", tasks.path().display());
    assert_eq!(exit(run(&line, &fake.global(Format::Table)).await), Some(Exit::Failure));
    assert_eq!(fake.requests::<EnqueueTasksRequest>("EnqueueTasks").len(), 1);
}
