//! What operators see: lists with filters, settings, workers, counts; and health and reflection.

use crate::support::worker::{Stream, hello};
use crate::support::*;
use ledgerd_client::v1::{self, TaskState};
use std::collections::BTreeMap as HashMap;

async fn list(client: &ledgerd_client::Client, request: v1::ListTasksRequest) -> Vec<String> {
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let request = v1::ListTasksRequest { page_token: token, ..request.clone() };
        let page = client.tasks().list_tasks(request).await.expect("listed").into_inner();
        found.extend(page.tasks.into_iter().map(|task| task.task_id));
        token = page.next_page_token;
        if token.is_empty() {
            return found;
        }
    }
}

#[tokio::test]
async fn tasks_are_listed_by_agent_state_type_priority_label_and_time() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let label = |value: &str| HashMap::from([("team".to_owned(), value.to_owned())]);
    let a = enqueue(&client, v1::NewTask { priority: Some(9), labels: label("red"), ..task("a") }).await;
    let b =
        enqueue(&client, v1::NewTask { task_type: "other".into(), labels: label("blue"), ..task("b") }).await;
    let c = enqueue(&client, task("a")).await;
    let cancel = v1::CancelTaskRequest { task_id: c.clone(), ..Default::default() };
    client.tasks().cancel_task(cancel).await.expect("cancelled");
    let all = v1::ListTasksRequest::default();
    let created = get(&client, &c).await.create_time;
    let cases = [
        (all.clone(), vec![&c, &b, &a]),
        (v1::ListTasksRequest { page_size: 1, ..all.clone() }, vec![&c, &b, &a]),
        (v1::ListTasksRequest { agent: "a".into(), ..all.clone() }, vec![&c, &a]),
        (v1::ListTasksRequest { agent: "unknown".into(), ..all.clone() }, vec![]),
        (v1::ListTasksRequest { states: vec![TaskState::Queued.into()], ..all.clone() }, vec![&b, &a]),
        (v1::ListTasksRequest { states: vec![TaskState::Cancelled.into()], ..all.clone() }, vec![&c]),
        (v1::ListTasksRequest { task_type: "other".into(), ..all.clone() }, vec![&b]),
        (v1::ListTasksRequest { priority: Some(9), ..all.clone() }, vec![&a]),
        (v1::ListTasksRequest { labels: label("blue"), ..all.clone() }, vec![&b]),
        (
            v1::ListTasksRequest { created_before: Some(prost_types::Timestamp::default()), ..all.clone() },
            vec![],
        ),
        (v1::ListTasksRequest { created_after: created, agent: "a".into(), ..all.clone() }, vec![&c]),
    ];
    for (request, expected) in cases {
        let found = list(&client, request.clone()).await;
        assert!(expected.iter().all(|id| found.contains(id)), "{request:?}: {found:?}");
        if request.created_after.is_none() {
            assert_eq!(found.iter().collect::<Vec<_>>(), expected, "{request:?}");
        }
    }
}

#[tokio::test]
async fn statistics_count_tasks_by_state() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    for _ in 0..3 {
        enqueue(&client, task("a")).await;
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.complete_next("").await;
    let stats = client.admin().get_stats(v1::GetStatsRequest {}).await.expect("answered").into_inner();
    let count = |state: TaskState| {
        stats.counts.iter().find(|count| count.state() == state).map_or(0, |count| count.count)
    };
    assert_eq!((count(TaskState::Done), count(TaskState::Queued) + count(TaskState::Running)), (1, 2));
    assert_eq!((stats.sessions, stats.agents), (1, 1));
    assert!(stats.transitions >= 5 && stats.store_bytes > 0);
}

#[tokio::test]
async fn an_agent_shows_its_effective_settings_and_keeps_them() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { max_retries: Some(7), ..v1::TaskPolicy::default() };
    configure(&client, "a", v1::AgentSettings { policy: Some(policy), ..Default::default() }).await;
    let daemon = daemon.kill_and_restart();
    let request = v1::GetAgentRequest { agent: "a".into() };
    let agent = daemon.client().await.admin().get_agent(request).await.expect("there").into_inner().agent;
    let settings = agent.and_then(|agent| agent.settings).expect("set");
    let policy = settings.policy.expect("set");
    assert_eq!((policy.max_retries, policy.base_delay), (Some(7), ms(100)));
    assert_eq!(settings.breaker.and_then(|breaker| breaker.failure_threshold), Some(5));
}

#[tokio::test]
async fn settings_that_break_rules_are_all_named_and_change_nothing() {
    use tonic_types::StatusExt;
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let settings = v1::AgentSettings {
        policy: Some(v1::TaskPolicy {
            exponential_base: Some(f64::NAN),
            lease_duration: ms(0),
            ..Default::default()
        }),
        breaker: Some(v1::BreakerSettings { failure_threshold: Some(0), ..Default::default() }),
        ..Default::default()
    };
    let request =
        v1::ConfigureAgentRequest { agent: "a".into(), settings: Some(settings), ..Default::default() };
    let refused = client.admin().configure_agent(request).await.expect_err("three rules are broken");
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    let fields: Vec<_> = refused
        .get_details_bad_request()
        .map(|details| details.field_violations.into_iter().map(|violation| violation.field).collect())
        .unwrap_or_default();
    for field in ["exponential_base", "lease_duration", "failure_threshold"] {
        assert!(fields.iter().any(|known| known.contains(field)), "{field} is not among {fields:?}");
    }
    let unknown =
        client.admin().get_agent(v1::GetAgentRequest { agent: "a".into() }).await.expect_err("not made");
    assert_eq!(unknown.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn wait_returns_when_the_task_ends_and_after_its_time_when_it_does_not() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let wait =
        |timeout: i64| v1::WaitTaskRequest { task_id: id.clone(), timeout: ms(timeout), include_data: true };
    let waiting = client.tasks().wait_task(wait(50)).await.expect("answered").into_inner().task.expect("set");
    assert_eq!(waiting.state(), TaskState::Queued);
    let (client_2, wait_long) = (client.clone(), wait(20_000));
    let waiter = tokio::spawn(async move { client_2.tasks().wait_task(wait_long).await });
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.complete_next("result").await;
    let ended = within("the wait ends", waiter).await.expect("no panic").expect("answered").into_inner();
    let task = ended.task.expect("set");
    assert_eq!((task.state(), &task.result[..]), (TaskState::Done, &b"result"[..]));
}

#[tokio::test]
async fn healthcheck_says_whether_the_daemon_serves() {
    let daemon = Daemon::start();
    let well = command().args(["healthcheck", "--address", &daemon.address]).status().expect("it runs");
    assert!(well.success());
    let address = daemon.address.clone();
    drop(daemon);
    let gone = command().args(["healthcheck", "--address", &address]).status().expect("it runs");
    assert!(!gone.success());
}

#[tokio::test]
async fn what_happens_to_an_agent_is_listed_with_who_and_why() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let request = v1::ConfigureAgentRequest {
        agent: "a".into(),
        settings: Some(quick()),
        actor: "ann".into(),
        reason: "tests are in a hurry".into(),
    };
    client.admin().configure_agent(request).await.expect("valid");
    configure(&client, "other", quick()).await;
    let pause = |duration| v1::PauseAgentRequest {
        agent: "a".into(),
        reason: "new licence".into(),
        actor: "ann".into(),
        duration,
    };
    client.admin().pause_agent(pause(None)).await.expect("it is there");
    let resume =
        v1::ResumeAgentRequest { agent: "a".into(), reason: "installed".into(), actor: "ben".into() };
    client.admin().resume_agent(resume.clone()).await.expect("it is there");
    client.admin().resume_agent(resume).await.expect("resumed already: nothing happens");
    client.admin().pause_agent(pause(ms(1_000))).await.expect("it is there");
    let list = async |client: &ledgerd_client::Client, agent: &str, size: i32| {
        let (mut found, mut token) = (Vec::new(), String::new());
        loop {
            let request =
                v1::ListAgentEventsRequest { agent: agent.into(), page_size: size, page_token: token };
            let page = client.admin().list_agent_events(request).await.expect("listed").into_inner();
            found.extend(page.events);
            token = page.next_page_token;
            if token.is_empty() {
                return found;
            }
        }
    };
    let found = eventually("the pause ends by itself", async || {
        Some(list(&client, "a", 0).await).filter(|found| found.len() == 5)
    })
    .await;
    let told: Vec<_> =
        found.iter().map(|event| (&*event.event, &*event.actor, event.until.is_some())).collect();
    assert_eq!(
        told,
        [
            ("RESUMED", "", false),
            ("PAUSED", "ann", true),
            ("RESUMED", "ben", false),
            ("PAUSED", "ann", false),
            ("CONFIGURED", "ann", false)
        ]
    );
    let set = &found[4].reason;
    assert!(set.starts_with("tests are in a hurry: {") && set.contains("base_delay"), "{set}");
    assert!(found.is_sorted_by(|a, b| a.seq > b.seq), "newest first");
    assert_eq!(list(&client, "a", 2).await, found, "in pages too");
    assert_eq!(list(&client, "", 0).await.len(), 6, "of all agents");
    let daemon = daemon.kill_and_restart();
    assert_eq!(list(&daemon.client().await, "a", 0).await, found, "kept over a kill");
    let nobody = v1::ListAgentEventsRequest { agent: "nobody".into(), ..Default::default() };
    let refused = daemon.client().await.admin().list_agent_events(nobody).await.expect_err("unknown");
    assert_eq!(refused.code(), tonic::Code::NotFound);
}
