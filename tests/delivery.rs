//! At-least-once execution, exactly-once recording; who gets what, in which order.

use crate::support::worker::{Stream, complete, fail, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1::{self, TaskState};
use std::collections::HashMap;

#[tokio::test]
async fn a_task_goes_from_queued_over_running_to_done() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, v1::NewTask { payload: b"input".to_vec().into(), ..task("a") }).await;
    assert_eq!(get(&client, &id).await.state(), TaskState::Queued);
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let assignment = worker.assignment().await;
    assert_eq!((assignment.task_id.as_str(), &assignment.payload[..]), (id.as_str(), &b"input"[..]));
    assert_eq!((assignment.delivery, assignment.attempt), (1, 1));
    assert_eq!(get(&client, &id).await.state(), TaskState::Running);
    worker.ack(lease(&assignment)).await;
    assert_eq!(worker.receipt().await.kind(), v1::ReceiptKind::Ack);
    worker.settle(vec![outcome(lease(&assignment), complete("output"))]).await;
    let receipt = worker.outcome_receipt().await;
    assert_eq!((receipt.state(), receipt.error), (TaskState::Done, None));
    let done = get(&client, &id).await;
    assert_eq!((done.state(), &done.result[..]), (TaskState::Done, &b"output"[..]));
    assert_eq!(events(&client, &id).await, ["ENQUEUED", "ASSIGNED", "STARTED", "COMPLETED"]);
}

#[tokio::test]
async fn an_outcome_without_an_ack_writes_one_row() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.complete_next("x").await;
    assert_eq!(events(&client, &id).await, ["ENQUEUED", "ASSIGNED", "COMPLETED"]);
    assert_eq!(get(&client, &id).await.attempt, 1);
}

#[tokio::test]
async fn higher_priority_goes_first_and_equals_in_order_of_enqueue() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let mut expected = Vec::new();
    for priority in [1, 9, 5, 9, 0] {
        let id = enqueue(&client, v1::NewTask { priority: Some(priority), ..task("a") }).await;
        expected.push((9 - priority, id));
    }
    expected.sort_by_key(|(urgency, _)| *urgency);
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    for (_, id) in expected {
        let assignment = worker.assignment().await;
        assert_eq!(assignment.task_id, id);
        worker.settle(vec![outcome(lease(&assignment), complete(""))]).await;
    }
}

#[tokio::test]
async fn a_worker_is_never_sent_more_than_its_capacity() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    for _ in 0..10 {
        enqueue(&client, task("a")).await;
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 3)).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(worker.assignment().await);
    }
    // A beat is answered in order, so whatever else was assigned would have come before its ack.
    worker.beat(held.iter().map(lease).collect()).await;
    assert_eq!(worker.heartbeat_ack().await.leases.len(), 3);
    let workers = client.admin().list_workers(v1::ListWorkersRequest::default()).await.expect("listed");
    assert_eq!(workers.into_inner().workers[0].held, 3);
}

#[tokio::test]
async fn what_a_worker_brings_to_a_new_stream_takes_room_there() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    for _ in 0..10 {
        enqueue(&client, task("a")).await;
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 3)).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let lease = lease(&worker.assignment().await);
        worker.ack(lease.clone()).await;
        worker.receipt().await;
        held.push(lease);
    }
    drop(worker);
    let mut worker = Stream::open(&daemon, v1::Hello { held: held.clone(), ..hello("w", "a", 3) }).await;
    worker.beat(held.clone()).await;
    assert_eq!(worker.heartbeat_ack().await.leases.len(), 3);
    assert!(worker.assignment_now().await.is_none(), "it has no room");
    let workers = client.admin().list_workers(v1::ListWorkersRequest::default()).await.expect("listed");
    assert_eq!(workers.into_inner().workers[0].held, 3);
    let done = held.pop().expect("three");
    worker.settle(vec![outcome(done.clone(), complete(""))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), v1::TaskState::Done);
    let next = lease(&worker.assignment().await);
    assert!(next != done && !held.contains(&next), "room for one more");
}

#[tokio::test]
async fn capacity_zero_means_send_me_nothing() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let mut idle = Stream::open(&daemon, hello("idle", "a", 0)).await;
    let id = enqueue(&client, task("a")).await;
    idle.beat(vec![]).await;
    assert!(idle.heartbeat_ack().await.leases.is_empty());
    assert_eq!(get(&client, &id).await.state(), TaskState::Queued);
    idle.send(v1::work_request::Frame::Capacity(v1::Capacity { capacity: 1 })).await;
    assert_eq!(idle.assignment().await.task_id, id);
}

#[tokio::test]
async fn workers_get_only_the_types_they_take() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let other = enqueue(&client, v1::NewTask { task_type: "other".into(), ..task("a") }).await;
    let mine = enqueue(&client, v1::NewTask { task_type: "mine".into(), ..task("a") }).await;
    let hello = v1::Hello { task_types: vec!["mine".into()], ..hello("w", "a", 10) };
    let mut worker = Stream::open(&daemon, hello).await;
    assert_eq!(worker.assignment().await.task_id, mine);
    assert_eq!(get(&client, &other).await.state(), TaskState::Queued);
}

#[tokio::test]
async fn a_task_with_run_at_ahead_waits_for_it() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as i64;
    let due = now + 3_000;
    let run_at = prost_types::Timestamp { seconds: due / 1_000, nanos: (due % 1_000 * 1_000_000) as i32 };
    let id = enqueue(&client, v1::NewTask { run_at: Some(run_at), ..task("a") }).await;
    assert_eq!(get(&client, &id).await.state(), TaskState::Queued);
    assert_eq!(worker.assignment().await.task_id, id);
    let assigned = history(&client, &id).await[1].time.expect("it has a time");
    let at = assigned.seconds * 1_000 + i64::from(assigned.nanos) / 1_000_000;
    assert!(at >= due, "assigned {} ms too early", due - at);
}

#[tokio::test]
async fn a_repeated_outcome_gets_the_first_receipt_also_after_a_newer_claim() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let (first, receipt) = worker.fail_next("once").await;
    assert_eq!(receipt.state(), TaskState::Retry);
    let second = worker.assignment().await;
    assert_eq!((second.task_id.as_str(), second.fence), (id.as_str(), 2));
    worker.settle(vec![outcome(lease(&first), fail("once"))]).await;
    assert_eq!(worker.outcome_receipt().await, receipt);
    worker.settle(vec![outcome(lease(&first), fail("another"))]).await;
    let conflict = worker.outcome_receipt().await.error.expect("it is refused");
    assert_eq!((conflict.code, conflict.reason.as_str()), (9, "OUTCOME_CONFLICT"));
    assert_eq!(get(&client, &id).await.fence, 2);
}

#[tokio::test]
async fn a_stale_fence_a_stranger_and_an_ended_task_are_refused() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.fail_next("once").await;
    let second = worker.assignment().await;
    let mut stranger = Stream::open(&daemon, hello("stranger", "b", 1)).await;
    stranger.settle(vec![outcome(lease(&second), complete("stolen"))]).await;
    assert_eq!(stranger.outcome_receipt().await.error.expect("refused").reason, "NOT_HOLDER");
    let never = v1::Lease { task_id: id.clone(), fence: 99 };
    worker.settle(vec![outcome(never, complete(""))]).await;
    let error = worker.outcome_receipt().await.error.expect("refused");
    assert_eq!((error.code, error.reason.as_str()), (3, "UNKNOWN_FENCE"));
    worker.settle(vec![outcome(lease(&second), complete("mine"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    assert_eq!(&get(&client, &id).await.result[..], b"mine");
}

#[tokio::test]
async fn a_request_id_makes_a_repeated_call_harmless() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let request = v1::EnqueueTasksRequest {
        tasks: vec![task("a"), v1::NewTask { agent: "../x".into(), ..task("a") }, task("b")],
        request_id: "r1".into(),
        ..v1::EnqueueTasksRequest::default()
    };
    let first = client.tasks().enqueue_tasks(request.clone()).await.expect("stored").into_inner();
    assert_eq!(first.results[1].error.as_ref().map(|e| e.code), Some(3));
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    let again = client.tasks().enqueue_tasks(request.clone()).await.expect("remembered").into_inner();
    assert_eq!(again, first);
    let other = v1::EnqueueTasksRequest { tasks: vec![task("c")], ..request };
    let refused = client.tasks().enqueue_tasks(other).await.expect_err("another body");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (tonic::Code::AlreadyExists, "REQUEST_ID_REUSED")
    );
}

#[tokio::test]
async fn an_idempotency_key_finds_the_task_that_holds_it() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let keyed = |payload: &str, unique: v1::UniqueScope| v1::EnqueueTaskRequest {
        task: Some(v1::NewTask {
            idempotency_key: "k".into(),
            payload: payload.as_bytes().to_vec().into(),
            unique: unique.into(),
            ..task("a")
        }),
        request_id: String::new(),
    };
    let active = v1::UniqueScope::WhileActive;
    let mut tasks = client.tasks();
    let first = tasks.enqueue_task(keyed("1", active)).await.expect("stored").into_inner();
    let same = tasks.enqueue_task(keyed("1", active)).await.expect("known").into_inner();
    assert!(first.created && !same.created && first.task_id == same.task_id);
    let other = tasks.enqueue_task(keyed("2", active)).await.expect_err("other content");
    assert_eq!(other.code(), tonic::Code::AlreadyExists);
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.complete_next("").await;
    let freed = tasks.enqueue_task(keyed("2", active)).await.expect("the key is free").into_inner();
    assert!(freed.created);
}

#[tokio::test]
async fn an_atomic_batch_with_one_bad_item_stores_nothing() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let request = v1::EnqueueTasksRequest {
        tasks: vec![task("a"), v1::NewTask { priority: Some(10), ..task("a") }],
        mode: v1::BatchMode::Atomic.into(),
        request_id: String::new(),
    };
    let refused = client.tasks().enqueue_tasks(request).await.expect_err("one item is bad");
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    let listed =
        client.tasks().list_tasks(v1::ListTasksRequest::default()).await.expect("listed").into_inner();
    assert!(listed.tasks.is_empty());
}

#[tokio::test]
async fn agents_of_one_worker_take_turns() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    for agent in ["a", "a", "a", "b", "b", "b"] {
        enqueue(&client, task(agent)).await;
    }
    let both = v1::Hello { agents: vec!["a".into(), "b".into()], ..hello("w", "a", 1) };
    let mut worker = Stream::open(&daemon, both).await;
    let mut order = Vec::new();
    for _ in 0..6 {
        let assignment = worker.assignment().await;
        order.push(assignment.agent.clone());
        worker.settle(vec![outcome(lease(&assignment), complete(""))]).await;
    }
    assert_eq!(order, ["a", "b", "a", "b", "a", "b"]);
}

#[tokio::test]
async fn a_blocked_task_frees_its_slot_and_goes_on_by_itself_at_its_time() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let (first, second) = (enqueue(&client, task("a")).await, enqueue(&client, task("a")).await);
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let assignment = worker.assignment().await;
    let until = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64 + 2;
    let block = v1::outcome::Outcome::Block(v1::Block {
        question: "which branch?".into(),
        until: Some(prost_types::Timestamp { seconds: until, nanos: 0 }),
        checkpoint: Some(b"half".to_vec().into()),
    });
    worker.settle(vec![outcome(lease(&assignment), block)]).await;
    let receipt = worker.outcome_receipt().await;
    assert_eq!((receipt.state(), receipt.reason.as_str()), (TaskState::Blocked, "WORKER"));
    assert_eq!(get(&client, &first).await.question, "which branch?");
    let next = worker.assignment().await;
    assert_eq!(next.task_id, second);
    worker.settle(vec![outcome(lease(&next), complete(""))]).await;
    let again = worker.assignment().await;
    assert_eq!((again.task_id.as_str(), again.checkpoint.as_deref()), (first.as_str(), Some(&b"half"[..])));
}

#[tokio::test]
async fn work_is_spread_over_workers_with_room() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let mut first = Stream::open(&daemon, hello("w1", "a", 10)).await;
    let mut second = Stream::open(&daemon, hello("w2", "a", 10)).await;
    let tasks = vec![task("a"); 10];
    let request = v1::EnqueueTasksRequest { tasks, ..v1::EnqueueTasksRequest::default() };
    client.tasks().enqueue_tasks(request).await.expect("stored");
    let mut got: HashMap<&str, usize> = HashMap::new();
    for _ in 0..5 {
        first.assignment().await;
        *got.entry("w1").or_default() += 1;
        second.assignment().await;
        *got.entry("w2").or_default() += 1;
    }
    assert_eq!(got.values().copied().collect::<Vec<_>>(), [5, 5]);
}
