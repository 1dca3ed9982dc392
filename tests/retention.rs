//! Retention: what ended long enough ago goes with all that belongs to it, and nothing else does.

use crate::support::worker::{Stream, complete, fail_as, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::{Client, v1};
use std::time::Duration;
use tonic::Code;
use v1::{ErrorClass, TaskState};

async fn state(client: &Client, id: &str) -> Option<TaskState> {
    let request = v1::GetTaskRequest { task_id: id.into(), ..Default::default() };
    match client.tasks().get_task(request).await {
        Ok(found) => found.into_inner().task.map(|task| task.state()),
        Err(status) if status.code() == Code::NotFound => None,
        Err(status) => panic!("{status}"),
    }
}

/// Waits until the ledger no longer knows the task.
async fn gone(client: &Client, id: &str) {
    let look = async {
        while state(client, id).await.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), look).await.expect("retention removes it");
}

async fn stats(client: &Client) -> v1::GetStatsResponse {
    client.admin().get_stats(v1::GetStatsRequest {}).await.expect("it answers").into_inner()
}

fn count(stats: &v1::GetStatsResponse, state: TaskState) -> u64 {
    stats.counts.iter().find(|count| count.state() == state).map_or(0, |count| count.count)
}

#[tokio::test(flavor = "multi_thread")]
async fn done_tasks_go_with_their_keys_and_failed_ones_stay_until_they_are_discarded() {
    let folder = Folder::new();
    let flags = ["--retention-done", "1s", "--retention-failed", "off"];
    let mut daemon = Daemon::start_with(folder.clone(), "127.0.0.1:0", &flags);
    let client = daemon.client().await;
    let keyed = |key: &str| v1::NewTask { idempotency_key: key.into(), ..task("a") };
    let enqueue = async |task: v1::NewTask| {
        let request = v1::EnqueueTaskRequest { task: Some(task), ..Default::default() };
        client.tasks().enqueue_task(request).await.expect("stored").into_inner()
    };
    let mut ids = Vec::new();
    for key in ["done", "failed", "cancelled", "waits"] {
        ids.push(enqueue(keyed(key)).await.task_id);
    }
    let [done, failed, cancelled, waits] = &ids[..] else { panic!("four") };
    let request = v1::CancelTaskRequest { task_id: cancelled.clone(), ..Default::default() };
    client.tasks().cancel_task(request).await.expect("it waits");
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    for _ in 0..2 {
        let assignment = worker.assignment().await;
        let ended = if assignment.task_id == *done {
            complete("result")
        } else {
            fail_as(ErrorClass::Permanent, "no")
        };
        worker.settle(vec![outcome(lease(&assignment), ended)]).await;
        worker.outcome_receipt().await;
    }
    drop(worker);
    gone(&client, done).await;
    gone(&client, cancelled).await;
    assert_eq!(state(&client, failed).await, Some(TaskState::Failed));
    assert_ne!(state(&client, waits).await, None);
    let history = v1::GetTaskHistoryRequest { task_id: done.clone() };
    let refused = client.tasks().get_task_history(history).await.expect_err("gone");
    assert_eq!(refused.code(), Code::NotFound);

    let again = enqueue(keyed("done")).await;
    assert!(again.created && again.task_id != *done, "the key went with its task");
    assert!(!enqueue(keyed("failed")).await.created, "and this one did not");

    let found = stats(&client).await;
    assert_eq!(found.removed_tasks, 2);
    assert_eq!((count(&found, TaskState::Done), count(&found, TaskState::Cancelled)), (0, 0));
    assert_eq!(count(&found, TaskState::Failed), 1);
    assert_eq!(found.retention_done.map(|span| span.seconds), Some(1));
    assert_eq!(found.retention_failed, None);
    assert!(found.store_bytes > 0 && (found.log_bytes > 0 || postgres::is_store()), "{found:?}");

    daemon.kill();
    let daemon = Daemon::start_with(folder, "127.0.0.1:0", &flags);
    let client = daemon.client().await;
    assert_eq!(state(&client, done).await, None);
    assert_eq!(state(&client, failed).await, Some(TaskState::Failed));
    let found = stats(&client).await;
    assert_eq!((count(&found, TaskState::Done), count(&found, TaskState::Failed)), (0, 1));

    let request = v1::DiscardDeadLettersRequest {
        task_ids: vec![failed.clone()],
        reason: "not wanted".into(),
        ..Default::default()
    };
    client.admin().discard_dead_letters(request).await.expect("discarded");
    gone(&client, failed).await;
    let letters = v1::ListDeadLettersRequest { include_discarded: true, ..Default::default() };
    let letters = client.admin().list_dead_letters(letters).await.expect("listed").into_inner();
    assert_eq!(letters.dead_letters, []);
}
