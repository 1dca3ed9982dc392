//! One agent's trouble opens that agent's breaker, and a restart changes nothing about it.

use crate::support::worker::{Stream, complete, fail, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::{Client, v1};
use v1::{BreakerState, TaskState, work_request::Frame};

fn settings(open_ms: i64) -> v1::AgentSettings {
    let breaker = v1::BreakerSettings { open_timeout: ms(open_ms), ..Default::default() };
    let quick = quick();
    let policy = v1::TaskPolicy { max_retries: Some(100), ..quick.policy.unwrap_or_default() };
    v1::AgentSettings { breaker: Some(breaker), policy: Some(policy), ..quick }
}

async fn breaker(client: &Client, agent: &str) -> v1::Breaker {
    let request = v1::GetBreakerRequest { agent: agent.to_owned(), ..v1::GetBreakerRequest::default() };
    client.admin().get_breaker(request).await.expect("there").into_inner().breaker.expect("set")
}

async fn trip(worker: &mut Stream) {
    for _ in 0..5 {
        worker.fail_next("down").await;
    }
}

#[tokio::test]
async fn five_failures_open_the_breaker_and_due_tasks_are_blocked() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", settings(60_000)).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    trip(&mut worker).await;
    let open = breaker(&client, "a").await;
    assert_eq!((open.state(), open.epoch), (BreakerState::Open, 1));
    assert!(open.open_until.is_some());
    let blocked = in_state(&client, &id, TaskState::Blocked).await;
    assert_eq!(blocked.reason, "BREAKER_OPEN");
    let events = events(&client, &id).await;
    assert_eq!(events.last().map(String::as_str), Some("GATED"));
}

#[tokio::test]
async fn no_more_tasks_are_blocked_than_could_run() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", settings(60_000)).await;
    for _ in 0..10 {
        enqueue(&client, task("a")).await;
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    let (mut failed, mut waiting) = (0, std::collections::VecDeque::new());
    while failed < 5 {
        waiting.push_back(worker.assignment().await);
        if let Some(assignment) = waiting.pop_front() {
            worker.settle(vec![outcome(lease(&assignment), fail("down"))]).await;
            failed += 1;
        }
    }
    eventually("the free slots are gated", async || {
        let gated = breaker(&client, "a").await.blocked;
        assert!(gated <= 2, "{gated} are gated, 2 could run");
        (gated > 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn probes_close_the_breaker_and_everything_goes_on() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", settings(500)).await;
    let mut ids = vec![
        enqueue(&client, task("a")).await,
        enqueue(&client, task("a")).await,
        enqueue(&client, task("a")).await,
    ];
    let mut worker = Stream::open(&daemon, hello("w", "a", 5)).await;
    trip(&mut worker).await;
    // As many as two of the three may be in flight, whose success says nothing about now: more have to probe.
    for _ in 0..3 {
        ids.push(enqueue(&client, task("a")).await);
    }
    for id in &ids {
        while get(&client, id).await.state() != TaskState::Done {
            worker.complete_next("up").await;
        }
    }
    assert_eq!(breaker(&client, "a").await.state(), BreakerState::Closed);
}

#[tokio::test]
async fn a_failed_probe_opens_it_again_and_does_not_count_as_a_retry() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", settings(300)).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    trip(&mut worker).await;
    let before = get(&client, &id).await.retry_count;
    let probe = worker.assignment().await;
    // Without room for a next probe it stays as the failure of this one leaves it.
    worker.send(Frame::Capacity(v1::Capacity { capacity: 0 })).await;
    worker.settle(vec![outcome(lease(&probe), fail("still down"))]).await;
    let receipt = worker.outcome_receipt().await;
    assert_eq!((probe.task_id.as_str(), receipt.state()), (id.as_str(), TaskState::Retry));
    assert_eq!(get(&client, &id).await.retry_count, before);
    let reopened = breaker(&client, "a").await;
    assert_eq!((reopened.state(), reopened.reopens), (BreakerState::Open, 1));
}

#[tokio::test]
async fn an_open_breaker_survives_a_kill() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", settings(60_000)).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    trip(&mut worker).await;
    in_state(&client, &id, TaskState::Blocked).await;
    let before = breaker(&client, "a").await;
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    let after = breaker(&client, "a").await;
    assert_eq!(
        (after.state(), after.epoch, after.open_until),
        (before.state(), before.epoch, before.open_until)
    );
    assert_eq!(get(&client, &id).await.state(), TaskState::Blocked);
    let reset = v1::ResetBreakerRequest { agent: "a".into(), ..v1::ResetBreakerRequest::default() };
    let closed = client.admin().reset_breaker(reset).await.expect("reset").into_inner().breaker.expect("set");
    assert_eq!(closed.state(), BreakerState::Closed);
    let mut worker = Stream::open(&daemon, v1::Hello { incarnation: 2, ..hello("w", "a", 1) }).await;
    let assignment = worker.assignment().await;
    worker.settle(vec![outcome(lease(&assignment), complete("up"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
}

#[tokio::test]
async fn one_agents_breaker_leaves_the_others_alone() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "bad", settings(60_000)).await;
    enqueue(&client, task("bad")).await;
    let mut bad = Stream::open(&daemon, hello("w1", "bad", 1)).await;
    trip(&mut bad).await;
    let id = enqueue(&client, task("good")).await;
    let mut good = Stream::open(&daemon, hello("w2", "good", 1)).await;
    good.complete_next("").await;
    assert_eq!(get(&client, &id).await.state(), TaskState::Done);
    assert_eq!(breaker(&client, "good").await.state(), BreakerState::Closed);
    let all =
        client.admin().list_breakers(v1::ListBreakersRequest::default()).await.expect("listed").into_inner();
    let states: Vec<_> = all.breakers.iter().map(|b| (b.agent.as_str(), b.state())).collect();
    assert_eq!(states, [("bad", BreakerState::Open), ("good", BreakerState::Closed)]);
}
