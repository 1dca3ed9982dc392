//! Timers fire when they are due: driven by events, not by a look now and then.

use crate::support::worker::{Stream, hello, lease};
use crate::support::*;
use ledgerd_client::{Client, v1};

/// Tasks for each kind of timer. Odd, so that there is a median: one machine's hiccup moves no median.
const TASKS: usize = 21;
/// What a timer may be late, in ms.
const SLACK: i64 = 50;
/// From one timer of a kind to the next, in ms: a disk that hangs for a moment is in the way of a few of each kind.
const SPACING: i64 = 120;

fn millis(at: &prost_types::Timestamp) -> i64 {
    at.seconds * 1_000 + i64::from(at.nanos) / 1_000_000
}

/// Enqueues them in one call and returns their ids, in the same order.
async fn enqueue_all(client: &Client, tasks: impl Iterator<Item = v1::NewTask>) -> Vec<String> {
    let request = v1::EnqueueTasksRequest { tasks: tasks.collect(), ..Default::default() };
    let answer = client.tasks().enqueue_tasks(request).await.expect("stored").into_inner();
    answer.results.into_iter().map(|result| result.task_id).collect()
}

/// When the task's first event of this name was.
async fn when(client: &Client, id: &str, name: &str) -> i64 {
    eventually(&format!("{name} of {id}"), async || {
        let events = history(client, id).await;
        events.iter().find(|event| event.event == name).and_then(|event| event.time.as_ref()).map(millis)
    })
    .await
}

fn held_to_be_exact(what: &str, mut late: Vec<i64>) {
    late.sort_unstable();
    assert!(late[0] >= 0, "{what}: early by {} ms", -late[0]);
    assert!(late[TASKS / 2] <= SLACK, "{what}: late by {late:?} ms");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_timer_is_exact_beside_a_hundred_thousand_that_wait() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as i64;
    let at = |millis: i64| {
        Some(prost_types::Timestamp { seconds: millis / 1_000, nanos: (millis % 1_000 * 1_000_000) as i32 })
    };
    // An hour ahead, each with a timer of its own.
    for call in 0..100_i64 {
        let tasks = (0..1_000).map(|n| v1::NewTask {
            run_at: at(now + 3_600_000 + call * 1_000 + n),
            deadline: at(now + 7_200_000 + call * 1_000 + n),
            ..task("crowd")
        });
        let request = v1::EnqueueTasksRequest { tasks: tasks.collect(), ..Default::default() };
        client.tasks().enqueue_tasks(request).await.expect("stored");
    }
    let mut workers = Vec::new();
    for agent in ["ack", "lease", "attempt", "later"] {
        configure(&client, agent, quick()).await;
        workers.push(Stream::open(&daemon, hello(agent, agent, TASKS as u32)).await);
    }
    // All of a kind in one call, so that they are there long before the first is due. Those of the kinds come in turn, each a
    // while after the one before, so that it finds the daemon as a lone timer would.
    let spread = |first: i64| (0..TASKS as i64).map(move |n| first + n * SPACING);
    let calendar = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as i64;
    let (later, late) = (calendar + 5_000, calendar + 5_060);
    let tasks = spread(later).map(|due| v1::NewTask { run_at: at(due), ..task("later") });
    let late_tasks = spread(late).map(|due| v1::NewTask { deadline: at(due), ..task("late") });
    let calendars = [
        ("later", "ASSIGNED", later, enqueue_all(&client, tasks).await),
        ("late", "DEADLINE_PASSED", late, enqueue_all(&client, late_tasks).await),
    ];
    let short = v1::TaskPolicy { max_retries: Some(0), ..Default::default() };
    let mut kinds = Vec::new();
    for (agent, from, to, first) in [
        ("ack", "ASSIGNED", "ACK_TIMEOUT", 1_000),
        ("lease", "STARTED", "LOST", 1_030),
        ("attempt", "STARTED", "STOP_REQUESTED", 1_060),
        ("queue", "ENQUEUED", "QUEUE_TIMEOUT", 1_090),
    ] {
        let tasks = spread(first).map(|after| {
            let policy = match agent {
                "ack" => v1::TaskPolicy { ack_timeout: ms(after), ..short },
                "lease" => v1::TaskPolicy { lease_duration: ms(after), ..short },
                "attempt" => v1::TaskPolicy { attempt_timeout: ms(after), ..short },
                _ => v1::TaskPolicy { queue_timeout: ms(after), ..short },
            };
            v1::NewTask { policy: Some(policy), ..task(agent) }
        });
        kinds.push((agent, from, to, first, enqueue_all(&client, tasks).await));
    }
    for worker in &mut workers[1..3] {
        for _ in 0..TASKS {
            let held = worker.assignment().await;
            worker.ack(lease(&held)).await;
        }
    }
    for (agent, from, to, first, ids) in kinds {
        let mut late = Vec::new();
        for (after, id) in spread(first).zip(&ids) {
            late.push(when(&client, id, to).await - when(&client, id, from).await - after);
        }
        held_to_be_exact(agent, late);
    }
    for (agent, name, first, ids) in calendars {
        let mut late = Vec::new();
        for (due, id) in spread(first).zip(&ids) {
            late.push(when(&client, id, name).await - due);
        }
        held_to_be_exact(agent, late);
    }
}

/// A timer that is set for a time long past is late the moment it is set; the daemon is not.
#[tokio::test]
async fn what_is_due_since_long_is_no_sign_that_the_daemon_stood_still() {
    const LEASE: i64 = 4_000;
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = |policy: v1::TaskPolicy| v1::AgentSettings { policy: Some(policy), ..quick() };
    configure(&client, "a", policy(v1::TaskPolicy { lease_duration: ms(LEASE), ..Default::default() })).await;
    let waits = enqueue(&client, task("b")).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    worker.receipt().await;
    // Longer than a queue_timeout and what is taken for a pause: it is over for more than that when it is set.
    tokio::time::sleep(std::time::Duration::from_millis(3_300)).await;
    configure(&client, "b", policy(v1::TaskPolicy { queue_timeout: ms(1_000), ..Default::default() })).await;
    in_state(&client, &waits, v1::TaskState::Failed).await;
    let lasted = when(&client, &id, "LOST").await - when(&client, &id, "STARTED").await;
    assert!(lasted < LEASE + 2_500, "the lease began anew: {lasted} ms");
}
