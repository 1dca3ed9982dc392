//! What configuration says of agents: whether work brings them into being, and what they go by.

use crate::support::worker::{Stream, complete, fail, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::Client;
use ledgerd_client::v1::{self, TaskState, work_request::Frame};
use tonic::Code;

async fn try_enqueue(client: &Client, agent: &str) -> Result<(), (Code, String)> {
    let request = v1::EnqueueTaskRequest { task: Some(task(agent)), request_id: String::new() };
    let answer = client.tasks().enqueue_task(request).await;
    answer.map(drop).map_err(|status| (status.code(), reason(&status)))
}

async fn agents(client: &Client) -> Vec<String> {
    let listed = client.admin().list_agents(v1::ListAgentsRequest::default()).await.expect("listed");
    listed.into_inner().agents.into_iter().map(|agent| agent.agent).collect()
}

fn not_found() -> (Code, String) {
    (Code::NotFound, "AGENT_NOT_FOUND".to_owned())
}

#[tokio::test]
async fn work_for_an_agent_that_nobody_configured_is_refused_where_that_is_asked_for() {
    let folder = Folder::new();
    let file = folder.path().join("ledgerd.toml");
    let say = |text: &str| std::fs::write(&file, text).expect("the folder is writable");
    say("agents_auto_create = \"off\"\n");
    let flags = ["--config", file.to_str().expect("it is text")];
    let daemon = Daemon::start_with(folder.clone(), "127.0.0.1:0", &flags);
    let client = daemon.client().await;
    assert_eq!(try_enqueue(&client, "tpyo").await, Err(not_found()));
    let hello_there = Stream::try_open(&daemon, Some(Frame::Hello(hello("w", "tpyo", 1)))).await;
    let status = hello_there.expect_err("nobody has work for it");
    assert_eq!((status.code(), reason(&status)), not_found());
    assert!(agents(&client).await.is_empty(), "what is refused leaves no agent behind");

    configure(&client, "known", quick()).await;
    let id = enqueue(&client, task("known")).await;
    let mut worker = Stream::open(&daemon, hello("w", "known", 1)).await;
    let held = worker.assignment().await;
    let follow_ups = vec![task("known"), task("tpyo")];
    let done = v1::outcome::Outcome::Complete(v1::Complete { follow_ups, ..v1::Complete::default() });
    worker.settle(vec![outcome(lease(&held), done)]).await;
    let refused = worker.outcome_receipt().await;
    assert_eq!(refused.error.expect("one agent of two is there").reason, "AGENT_NOT_FOUND");
    assert_eq!(get(&client, &id).await.state(), TaskState::Running, "and nothing of it was done");
    worker.settle(vec![outcome(lease(&held), complete("done"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    let redrive = v1::RedriveDeadLettersRequest {
        task_ids: vec![id.clone()],
        agent: "tpyo".to_owned(),
        ..v1::RedriveDeadLettersRequest::default()
    };
    let status = client.admin().redrive_dead_letters(redrive).await.expect_err("it is not there");
    assert_eq!((status.code(), reason(&status)), not_found());
    assert_eq!(agents(&client).await, ["known"]);

    // What cannot be used leaves it as it was.
    say("agents_auto_create = \"perhaps\"\n");
    daemon.signal("HUP");
    eventually("it is told", async || daemon.log().contains("write on or off").then_some(())).await;
    assert_eq!(try_enqueue(&client, "tpyo").await, Err(not_found()));
    say("agents_auto_create = \"on\"\n");
    daemon.signal("HUP");
    eventually("it is read", async || daemon.log().contains("settings were read again").then_some(())).await;
    eventually("work makes agents", async || try_enqueue(&client, "new").await.ok()).await;
    assert_eq!(agents(&client).await, ["known", "new"]);
}

#[tokio::test]
async fn an_agent_that_was_configured_at_another_daemon_is_not_refused() {
    let Some(server) = postgres::server() else { return };
    let folder = Folder::new();
    let store = postgres::database(&server, &folder);
    let flags = ["--store", &store, "--agents-auto-create", "off"];
    let start = || Daemon::start_with(Folder::new(), "127.0.0.1:0", &flags);
    let (here, there) = (start(), start());
    let (here, other) = (here.client().await, there.client().await);
    for n in 0..10 {
        let agent = format!("agent-{n}");
        configure(&here, &agent, quick()).await;
        match n % 2 {
            0 => assert_eq!(try_enqueue(&other, &agent).await, Ok(())),
            _ => drop(Stream::open(&there, hello(&agent, &agent, 1)).await),
        }
    }
    assert_eq!(try_enqueue(&other, "tpyo").await, Err(not_found()));
}

async fn retries(client: &Client, agent: &str) -> Option<i32> {
    let request = v1::GetAgentRequest { agent: agent.to_owned() };
    let found = client.admin().get_agent(request).await.ok()?.into_inner().agent?;
    found.settings?.policy?.max_retries
}

/// A folder with a configuration file.
fn configured(text: &str) -> (std::sync::Arc<Folder>, std::path::PathBuf) {
    let folder = Folder::new();
    let file = folder.path().join("ledgerd.toml");
    std::fs::write(&file, text).expect("the folder is writable");
    (folder, file)
}

#[tokio::test]
async fn what_was_not_set_for_an_agent_is_as_the_file_says_and_is_read_again() {
    let defaults = |policy: &str| format!("[agent_defaults.policy]\n{policy}\n");
    let (folder, file) = configured(&defaults("max_retries = 0"));
    let daemon = Daemon::start_with(folder, "127.0.0.1:0", &["--config", file.to_str().expect("it is text")]);
    let client = daemon.client().await;
    let said = async |text: &str| {
        eventually("it is told", async || daemon.log().contains(text).then_some(())).await;
    };
    let say = |policy: &str| {
        std::fs::write(&file, defaults(policy)).expect("the folder is writable");
        daemon.signal("HUP");
    };

    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    worker.settle(vec![outcome(lease(&held), fail("no"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Failed);
    assert_eq!(get(&client, &id).await.reason, "RETRIES_EXHAUSTED");
    let own = v1::TaskPolicy { max_retries: Some(2), ..v1::TaskPolicy::default() };
    configure(&client, "own", v1::AgentSettings { policy: Some(own), ..Default::default() }).await;
    assert_eq!((retries(&client, "a").await, retries(&client, "own").await), (Some(0), Some(2)));

    // What cannot be used leaves it as it was.
    say("max_retries = 1001");
    said("agent_defaults.policy.max_retries (from ").await;
    assert_eq!(retries(&client, "a").await, Some(0));

    // It holds for agents that are there, and for those that are yet to come.
    say("max_retries = 7");
    eventually("it is read again", async || (retries(&client, "a").await == Some(7)).then_some(())).await;
    enqueue(&client, task("new")).await;
    assert_eq!((retries(&client, "new").await, retries(&client, "own").await), (Some(7), Some(2)));
    let id = enqueue(&client, task("a")).await;
    let held = worker.assignment().await;
    worker.settle(vec![outcome(lease(&held), fail("no"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Retry);
    assert_eq!(get(&client, &id).await.retry_count, 1);

    // One whose own settings contradict them does without them, and the log says which and why.
    let short = v1::TaskPolicy { max_delay: ms(200), ..v1::TaskPolicy::default() };
    configure(&client, "short", v1::AgentSettings { policy: Some(short), ..Default::default() }).await;
    say("max_retries = 9\nbase_delay = '10s'");
    eventually("it is read again", async || (retries(&client, "a").await == Some(9)).then_some(())).await;
    assert_eq!(retries(&client, "short").await, Some(3), "built in");
    said("agent=short rules=\"settings.policy.max_delay: ").await;
}

#[tokio::test]
async fn what_waits_longer_than_the_file_allows_fails_over_a_kill_as_well() {
    let timeout = |time: &str| format!("[agent_defaults.policy]\nqueue_timeout = '{time}'\n");
    let (folder, file) = configured("");
    let flags = ["--config", file.to_str().expect("it is text")];
    let mut daemon = Daemon::start_with(folder.clone(), "127.0.0.1:0", &flags);
    let client = daemon.client().await;
    let early = enqueue(&client, task("a")).await;
    std::fs::write(&file, timeout("1s")).expect("the folder is writable");
    daemon.signal("HUP");
    assert_eq!(in_state(&client, &early, TaskState::Failed).await.reason, "QUEUE_TIMEOUT");
    std::fs::write(&file, timeout("3s")).expect("the folder is writable");
    daemon.kill();
    drop(daemon);
    let mut daemon = Daemon::start_with(folder.clone(), "127.0.0.1:0", &flags);
    let late = enqueue(&daemon.client().await, task("a")).await;
    daemon.kill();
    drop(daemon);
    let daemon = Daemon::start_with(folder, "127.0.0.1:0", &flags);
    let late = in_state(&daemon.client().await, &late, TaskState::Failed).await;
    assert_eq!(late.reason, "QUEUE_TIMEOUT");
}

#[tokio::test]
async fn what_waits_too_long_at_a_daemon_that_is_gone_fails_at_its_heir() {
    let Some(server) = postgres::server() else { return };
    let (folder, file) = configured("[agent_defaults.policy]\nqueue_timeout = '4s'\n");
    let store = postgres::database(&server, &folder);
    let flags = ["--store", &store, "--config", file.to_str().expect("it is text")];
    let start = || Daemon::start_with(Folder::new(), "127.0.0.1:0", &flags);
    let (mut gone, heir) = (start(), start());
    let id = enqueue(&gone.client().await, task("a")).await;
    gone.kill();
    assert_eq!(in_state(&heir.client().await, &id, TaskState::Failed).await.reason, "QUEUE_TIMEOUT");
}

#[tokio::test]
async fn what_a_breaker_held_back_runs_when_configuration_has_none_any_more() {
    let breaker = |said: &str| format!("[agent_defaults.breaker]\n{said}\n");
    for asks in [true, false] {
        let (folder, file) = configured(&breaker("failure_threshold = 1\nopen_timeout = '1h'"));
        let flags = ["--config", file.to_str().expect("it is text")];
        let mut daemon = Daemon::start_with(folder.clone(), "127.0.0.1:0", &flags);
        let client = daemon.client().await;
        let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
        let policy = Some(v1::TaskPolicy { max_retries: Some(0), ..v1::TaskPolicy::default() });
        enqueue(&client, v1::NewTask { policy, ..task("a") }).await;
        worker.fail_next("down").await;
        let held = enqueue(&client, task("a")).await;
        let held = in_state(&client, &held, TaskState::Blocked).await;
        assert_eq!(held.reason, "BREAKER_OPEN");
        std::fs::write(&file, breaker("enabled = false")).expect("the folder is writable");
        if asks {
            daemon.signal("HUP");
        } else {
            daemon.kill();
            drop(daemon);
            daemon = Daemon::start_with(folder, "127.0.0.1:0", &flags);
            worker = Stream::open(&daemon, hello("another", "a", 1)).await;
        }
        let run = within("it runs", worker.assignment()).await;
        assert_eq!(run.task_id, held.task_id, "by SIGHUP: {asks}");
    }
}
