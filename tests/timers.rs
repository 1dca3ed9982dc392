//! Timers fire when they are due: driven by events, not by a look now and then.

use crate::support::worker::{Stream, hello, lease};
use crate::support::*;
use ledger_core::limits::UNACKED_RUN;
use ledgerd_client::{Client, v1};

/// Tasks for each kind of timer. Odd, so that there is a median: one machine's hiccup moves no median.
const TASKS: usize = 21;
/// What a timer may be late, in ms.
const SLACK: i64 = 50;

fn millis(at: &prost_types::Timestamp) -> i64 {
    at.seconds * 1_000 + i64::from(at.nanos) / 1_000_000
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
    let policy = |policy: v1::TaskPolicy| v1::AgentSettings { policy: Some(policy), ..quick() };
    let short = v1::TaskPolicy { max_retries: Some(0), ..Default::default() };
    configure(&client, "ack", policy(v1::TaskPolicy { ack_timeout: ms(300), ..short })).await;
    configure(&client, "lease", policy(v1::TaskPolicy { lease_duration: ms(1_000), ..short })).await;
    configure(&client, "attempt", policy(v1::TaskPolicy { attempt_timeout: ms(1_000), ..short })).await;
    configure(&client, "queue", policy(v1::TaskPolicy { queue_timeout: ms(1_000), ..short })).await;
    let start = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as i64;
    // When all of them are there: each is a commit, and the server's take longer.
    let later = start + if postgres::is_store() { 6_000 } else { 1_500 };
    let mut workers = Vec::new();
    for agent in ["lease", "attempt", "later"] {
        workers.push(Stream::open(&daemon, hello(agent, agent, TASKS as u32)).await);
    }
    // After as many ack timeouts in a row a worker is given no more, and the first may be over before the last task is there.
    let each = UNACKED_RUN as usize;
    for n in 0..TASKS.div_ceil(each) {
        workers.push(Stream::open(&daemon, hello(&format!("ack-{n}"), "ack", each as u32)).await);
    }
    let mut ids = std::collections::HashMap::new();
    for agent in ["ack", "lease", "attempt", "queue", "later", "late"] {
        for n in 0..TASKS as i64 {
            let new = match agent {
                "later" => v1::NewTask { run_at: at(later + n), ..task(agent) },
                "late" => v1::NewTask { deadline: at(later + n), ..task(agent) },
                _ => task(agent),
            };
            ids.entry(agent).or_insert_with(Vec::new).push(enqueue(&client, new).await);
        }
    }
    for worker in &mut workers[..2] {
        for _ in 0..TASKS {
            let held = worker.assignment().await;
            worker.ack(lease(&held)).await;
        }
    }
    for (agent, from, to, after) in [
        ("ack", "ASSIGNED", "ACK_TIMEOUT", 300),
        ("lease", "STARTED", "LOST", 1_000),
        ("attempt", "STARTED", "STOP_REQUESTED", 1_000),
        ("queue", "ENQUEUED", "QUEUE_TIMEOUT", 1_000),
    ] {
        let mut late = Vec::new();
        for id in &ids[agent] {
            late.push(when(&client, id, to).await - when(&client, id, from).await - after);
        }
        held_to_be_exact(agent, late);
    }
    for (agent, name) in [("later", "ASSIGNED"), ("late", "DEADLINE_PASSED")] {
        let mut late = Vec::new();
        for (n, id) in (0..).zip(&ids[agent]) {
            late.push(when(&client, id, name).await - (later + n));
        }
        held_to_be_exact(agent, late);
    }
}
