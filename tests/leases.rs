//! Leases outlive streams and restarts; a worker that lost one cannot change the task once somebody newer holds it.

use crate::support::worker::{Stream, complete, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1::{self, LeaseState, StopCause, TaskState};

/// Quick, and nothing is acknowledged in a hurry: on a slow machine that takes a while.
fn leases(millis: i64) -> v1::AgentSettings {
    timed(v1::TaskPolicy { lease_duration: ms(millis), ..quick().policy.unwrap_or_default() })
}

fn ack_timeouts(millis: i64) -> v1::AgentSettings {
    timed(v1::TaskPolicy { ack_timeout: ms(millis), ..quick().policy.unwrap_or_default() })
}

fn timed(policy: v1::TaskPolicy) -> v1::AgentSettings {
    v1::AgentSettings { policy: Some(policy), ..quick() }
}

#[tokio::test]
async fn expired_lease_is_assigned_again() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", leases(1_000)).await;
    let id = enqueue(&client, task("a")).await;
    let mut first = Stream::open(&daemon, hello("w1", "a", 1)).await;
    let lost = first.assignment().await;
    first.ack(lease(&lost)).await;
    let mut second = Stream::open(&daemon, hello("w2", "a", 1)).await;
    let again = second.assignment().await;
    assert_eq!((again.task_id.as_str(), again.fence, again.attempt), (id.as_str(), 2, 2));
    first.settle(vec![outcome(lease(&lost), complete("too late"))]).await;
    let error = first.outcome_receipt().await.error.expect("somebody newer holds it");
    assert_eq!((error.code, error.reason.as_str()), (9, "LEASE_LOST"));
    second.settle(vec![outcome(lease(&again), complete("mine"))]).await;
    assert_eq!(second.outcome_receipt().await.state(), TaskState::Done);
    let task = get(&client, &id).await;
    assert_eq!((&task.result[..], task.losses), (&b"mine"[..], 1));
}

#[tokio::test]
async fn a_beat_before_the_ack_does_not_outlast_it() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy =
        v1::TaskPolicy { ack_timeout: ms(3_600_000), lease_duration: ms(1_000), ..Default::default() };
    configure(&client, "a", v1::AgentSettings { policy: Some(policy), ..quick() }).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    worker.beat(vec![lease(&held)]).await;
    worker.heartbeat_ack().await;
    worker.ack(lease(&held)).await;
    // An hour was the time for the ack; the lease is a second.
    let lost = async || events(&client, &id).await.contains(&"LOST".to_owned()).then_some(());
    eventually("the lease runs out", lost).await;
}

#[tokio::test]
async fn an_unacked_delivery_goes_back_to_the_queue_and_costs_nothing() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", ack_timeouts(2_000)).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    let first = worker.assignment().await;
    let again = worker.assignment().await;
    assert_eq!((again.task_id.as_str(), again.fence, again.attempt), (first.task_id.as_str(), 2, 1));
    worker.settle(vec![outcome(lease(&again), complete(""))]).await;
    worker.outcome_receipt().await;
    let task = get(&client, &id).await;
    assert_eq!((task.retry_count, task.losses, task.delivery), (0, 0, 2));
    assert_eq!(events(&client, &id).await, ["ENQUEUED", "ASSIGNED", "ACK_TIMEOUT", "ASSIGNED", "COMPLETED"]);
}

#[tokio::test]
async fn three_unacked_deliveries_in_a_row_take_a_session_its_room() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", ack_timeouts(300)).await;
    let mut deaf = Stream::open(&daemon, hello("deaf", "a", 10)).await;
    let id = enqueue(&client, task("a")).await;
    for _ in 0..3 {
        deaf.assignment().await;
    }
    eventually("the third delivery times out", async || {
        let events = events(&client, &id).await;
        (events.iter().filter(|event| *event == "ACK_TIMEOUT").count() == 3).then_some(())
    })
    .await;
    // Due again after a few milliseconds of back-off, but the only session has no room.
    let mut other = Stream::open(&daemon, hello("other", "a", 1)).await;
    assert_eq!(other.assignment().await.fence, 4);
}

#[tokio::test]
async fn beats_keep_a_lease_for_longer_than_its_duration() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", leases(3_000)).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    let mut beats = tokio::time::interval(std::time::Duration::from_millis(500));
    for _ in 0..8 {
        beats.tick().await;
        worker.beat(vec![lease(&held)]).await;
        assert_eq!(worker.heartbeat_ack().await.leases[0].state(), LeaseState::Extended);
    }
    worker.settle(vec![outcome(lease(&held), complete(""))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    assert_eq!(events(&client, &id).await, ["ENQUEUED", "ASSIGNED", "STARTED", "COMPLETED"]);
}

#[tokio::test]
async fn a_lost_stream_is_resumed_with_what_is_held() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut first = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = first.assignment().await;
    first.ack(lease(&held)).await;
    first.receipt().await;
    drop(first);
    let resumed = v1::Hello { held: vec![lease(&held)], ..hello("w", "a", 1) };
    let mut second = Stream::open(&daemon, resumed).await;
    assert_eq!(second.welcome.leases[0].state(), LeaseState::Extended);
    second.settle(vec![outcome(lease(&held), complete("kept"))]).await;
    assert_eq!(second.outcome_receipt().await.state(), TaskState::Done);
    assert_eq!(get(&client, &id).await.delivery, 1);
}

#[tokio::test]
async fn a_task_that_hello_does_not_name_is_taken_back() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let id = enqueue(&client, task("a")).await;
    let mut first = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = first.assignment().await;
    first.ack(lease(&held)).await;
    first.receipt().await;
    let mut second = Stream::open(&daemon, hello("w", "a", 1)).await;
    let again = second.assignment().await;
    assert_eq!((again.task_id.as_str(), again.fence), (id.as_str(), 2));
    assert_eq!(get(&client, &id).await.losses, 1);
    assert_eq!(first.end().await.code(), tonic::Code::Aborted);
}

#[tokio::test]
async fn a_new_process_of_a_worker_takes_over_once_the_old_one_is_gone() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    enqueue(&client, task("a")).await;
    let mut old = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = old.assignment().await;
    old.ack(lease(&held)).await;
    old.receipt().await;
    let newer = v1::Hello { incarnation: 2, ..hello("w", "a", 1) };
    let refused = Stream::try_open(&daemon, Some(v1::work_request::Frame::Hello(newer.clone()))).await;
    let refused = refused.expect_err("the old process is alive");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (tonic::Code::FailedPrecondition, "WORKER_ID_IN_USE")
    );
    drop(old);
    let mut new = eventually("the old stream is seen to be gone", async || {
        let hello = v1::work_request::Frame::Hello(newer.clone());
        Stream::try_open(&daemon, Some(hello)).await.ok()
    })
    .await;
    assert_eq!(new.assignment().await.fence, 2);
    let older = Stream::try_open(&daemon, Some(v1::work_request::Frame::Hello(hello("w", "a", 1)))).await;
    assert_eq!(reason(&older.expect_err("superseded")), "WORKER_SUPERSEDED");
}

#[tokio::test]
async fn outcomes_can_be_settled_without_a_stream() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    drop(worker);
    let request = v1::SettleTasksRequest {
        worker_id: "w".into(),
        outcomes: vec![outcome(lease(&held), complete("alone"))],
    };
    let first = client.workers().settle_tasks(request.clone()).await.expect("recorded").into_inner();
    assert_eq!(first.receipts[0].state(), TaskState::Done);
    assert_eq!(client.workers().settle_tasks(request).await.expect("replayed").into_inner(), first);
}

#[tokio::test]
async fn a_late_outcome_counts_while_nobody_newer_holds_the_task() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", leases(1_000)).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    in_state(&client, &id, TaskState::Retry).await;
    worker.settle(vec![outcome(lease(&held), complete("late"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    let last = history(&client, &id).await.pop().expect("it has rows");
    assert_eq!(last.facts.get("late").map(String::as_str), Some("true"));
}

#[tokio::test]
async fn a_task_that_is_lost_too_often_is_poison() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", leases(1_000)).await;
    let policy = v1::TaskPolicy { max_losses: Some(2), ..v1::TaskPolicy::default() };
    let id = enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    for incarnation in 1..=2 {
        let hello = v1::Hello { incarnation, ..hello("w", "a", 1) };
        let mut worker = eventually("the stream before is seen to be gone", async || {
            let hello = v1::work_request::Frame::Hello(hello.clone());
            Stream::try_open(&daemon, Some(hello)).await.ok()
        })
        .await;
        let held = worker.assignment().await;
        worker.ack(lease(&held)).await;
        worker.receipt().await;
    }
    let failed = in_state(&client, &id, TaskState::Failed).await;
    assert_eq!((failed.reason.as_str(), failed.losses), ("POISON", 2));
}

#[tokio::test]
async fn a_cancel_reaches_the_worker_and_its_word_ends_the_task() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    let request =
        v1::CancelTaskRequest { task_id: id.clone(), reason: "enough".into(), ..Default::default() };
    let asked = client.tasks().cancel_task(request).await.expect("asked").into_inner().task.expect("set");
    assert_eq!((asked.state(), asked.stop_cause()), (TaskState::Running, StopCause::User));
    let stop = worker.stop().await;
    assert_eq!((stop.stop_cause(), stop.lease), (StopCause::User, Some(lease(&held))));
    worker.beat(vec![lease(&held)]).await;
    assert_eq!(worker.heartbeat_ack().await.leases[0].state(), LeaseState::Stop);
    worker.settle(vec![outcome(lease(&held), v1::outcome::Outcome::Cancelled(v1::Cancelled {}))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Cancelled);
}

#[tokio::test]
async fn a_worker_that_ignores_a_stop_loses_its_say() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { stop_grace: ms(200), ..v1::TaskPolicy::default() };
    let id = enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    let request = v1::CancelTaskRequest { task_id: id.clone(), ..Default::default() };
    client.tasks().cancel_task(request).await.expect("asked");
    let ended = in_state(&client, &id, TaskState::Cancelled).await;
    assert_eq!((ended.reason.as_str(), ended.fence), ("ABANDONED", 2));
    worker.settle(vec![outcome(lease(&held), complete("too late"))]).await;
    assert_eq!(worker.outcome_receipt().await.error.expect("refused").reason, "TASK_TERMINAL");
}

#[tokio::test]
async fn attempt_timeout_stall_timeout_and_deadline_ask_for_the_end() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let limited = |policy: v1::TaskPolicy| v1::NewTask {
        policy: Some(v1::TaskPolicy { max_retries: Some(0), ..policy }),
        ..task("a")
    };
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64;
    let cases = [
        (
            limited(v1::TaskPolicy { attempt_timeout: ms(1_000), ..Default::default() }),
            StopCause::Timeout,
            "RETRIES_EXHAUSTED",
        ),
        (
            limited(v1::TaskPolicy { stall_timeout: ms(1_000), ..Default::default() }),
            StopCause::Stall,
            "RETRIES_EXHAUSTED",
        ),
        (
            v1::NewTask {
                deadline: Some(prost_types::Timestamp { seconds: now + 2, nanos: 0 }),
                ..task("a")
            },
            StopCause::Deadline,
            "DEADLINE",
        ),
    ];
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    for (task, cause, ends) in cases {
        let id = enqueue(&client, task).await;
        let held = worker.assignment().await;
        worker.ack(lease(&held)).await;
        assert_eq!(worker.stop().await.stop_cause(), cause);
        worker.settle(vec![outcome(lease(&held), v1::outcome::Outcome::Cancelled(v1::Cancelled {}))]).await;
        let receipt = worker.outcome_receipt().await;
        assert_eq!((receipt.state(), receipt.reason.as_str()), (TaskState::Failed, ends), "{cause:?} {id}");
    }
}

#[tokio::test]
async fn a_task_that_nobody_takes_in_time_fails_by_queue_timeout() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { queue_timeout: ms(1_000), ..v1::TaskPolicy::default() };
    let id = enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    assert_eq!(in_state(&client, &id, TaskState::Failed).await.reason, "QUEUE_TIMEOUT");
}

#[tokio::test]
async fn a_goodbye_releases_what_is_held_at_once() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.assignment().await;
    worker.send(v1::work_request::Frame::Goodbye(v1::Goodbye {})).await;
    let task = in_state(&client, &id, TaskState::Queued).await;
    assert_eq!((task.reason.as_str(), task.idle_deliveries), ("DRAIN", 0));
}

#[tokio::test]
async fn a_queue_timeout_that_is_set_later_holds_for_what_waits() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let ids = [enqueue(&client, task("a")).await, enqueue(&client, task("a")).await];
    let other = enqueue(&client, task("other")).await;
    let policy = v1::TaskPolicy { queue_timeout: ms(1_000), ..Default::default() };
    configure(&client, "a", v1::AgentSettings { policy: Some(policy), ..Default::default() }).await;
    for id in ids {
        assert_eq!(in_state(&client, &id, TaskState::Failed).await.reason, "QUEUE_TIMEOUT");
    }
    assert_eq!(get(&client, &other).await.state(), TaskState::Queued);
}
