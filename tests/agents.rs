//! How agents come into being: with work, or only where somebody configures them.

use crate::support::worker::{Stream, complete, hello, lease, outcome};
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
