//! The Rust SDK against the real daemon: typed work, and what happens when either side goes away.

use crate::support::*;
use ledgerd_client::v1::{StopCause, TaskState};
use ledgerd_client::{CancellationToken, Context, Error, TaskError, Worker};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

#[derive(Serialize, Deserialize)]
struct Sum {
    numbers: Vec<u32>,
}

async fn add(job: Sum, _: Context) -> Result<u32, TaskError> {
    Ok(job.numbers.iter().sum())
}

fn run(worker: Worker) -> (CancellationToken, tokio::task::JoinHandle<Result<(), Error>>) {
    let stop = CancellationToken::new();
    (stop.clone(), tokio::spawn(worker.run_until(stop)))
}

#[tokio::test]
async fn a_typed_task_is_worked_and_its_result_read() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let worker = Worker::builder(client.clone()).agents(["sums"]).capacity(2).task("add", add);
    let (stop, running) = run(worker.build().expect("it is complete"));
    let task =
        client.enqueue("sums", "add", &Sum { numbers: vec![1, 2, 3] }).key("once").await.expect("stored");
    let sum: u32 = within("the result", task.result().timeout(PATIENCE).read()).await.expect("it is done");
    assert_eq!(sum, 6);
    let same =
        client.enqueue("sums", "add", &Sum { numbers: vec![1, 2, 3] }).key("once").await.expect("known");
    assert_eq!((same.id(), same.created()), (task.id(), false));
    stop.cancel();
    within("the worker ends", running).await.expect("no panic").expect("in good order");
}

#[tokio::test]
async fn a_payload_of_another_shape_is_a_permanent_failure() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let worker = Worker::builder(client.clone()).agents(["sums"]).task("add", add);
    let (_stop, _running) = run(worker.build().expect("it is complete"));
    let task = client.enqueue("sums", "add", &"no sum").await.expect("stored");
    match within("the end", task.result::<u32>().timeout(PATIENCE).read()).await {
        Err(Error::TaskFailed { task, .. }) => assert_eq!(task.reason, "PERMANENT"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_failed_attempt_hands_its_checkpoint_to_the_next() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let worker = Worker::builder(client.clone()).agents(["a"]).any(
        |_: serde_json::Value, context: Context| async move {
            match context.last_checkpoint() {
                None => {
                    context.checkpoint("page 7")?;
                    Err(TaskError::retryable("the other half failed"))
                }
                Some(state) => Ok(String::from_utf8_lossy(state).into_owned()),
            }
        },
    );
    let (_stop, _running) = run(worker.build().expect("it is complete"));
    let task = client.enqueue("a", "pages", &()).await.expect("stored");
    let result: String =
        within("the result", task.result().timeout(PATIENCE).read()).await.expect("it is done");
    assert_eq!(result, "page 7");
    assert_eq!(task.get().await.expect("there").retry_count, 1);
}

#[tokio::test]
async fn a_cancel_reaches_the_handler() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let started = Arc::new(Notify::new());
    let worker = Worker::builder(client.clone()).agents(["a"]).any({
        let started = Arc::clone(&started);
        move |_: (), context: Context| {
            let started = Arc::clone(&started);
            async move {
                started.notify_one();
                context.cancelled().cancelled().await;
                assert_eq!(context.stop_cause(), Some(StopCause::User));
                Err::<(), _>(TaskError::cancelled())
            }
        }
    });
    let (_stop, _running) = run(worker.build().expect("it is complete"));
    let task = client.enqueue("a", "wait", &()).await.expect("stored");
    within("the handler starts", started.notified()).await;
    task.cancel().reason("enough").await.expect("asked");
    assert_eq!(in_state(&client, task.id(), TaskState::Cancelled).await.reason, "USER");
}

#[tokio::test]
async fn a_worker_keeps_its_task_over_a_kill_of_the_daemon() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let (started, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let runs = Arc::new(AtomicU32::new(0));
    let worker = Worker::builder(client.clone()).agents(["a"]).any({
        let (started, go_on, runs) = (Arc::clone(&started), Arc::clone(&go_on), Arc::clone(&runs));
        move |_: (), _: Context| {
            let (started, go_on, runs) = (Arc::clone(&started), Arc::clone(&go_on), Arc::clone(&runs));
            async move {
                runs.fetch_add(1, Ordering::Relaxed);
                started.notify_one();
                go_on.notified().await;
                Ok("kept")
            }
        }
    });
    let (_stop, _running) = run(worker.build().expect("it is complete"));
    let task = client.enqueue("a", "long", &()).await.expect("stored");
    within("the handler starts", started.notified()).await;
    let daemon = daemon.kill_and_restart();
    go_on.notify_one();
    let client = daemon.client().await;
    let done = in_state(&client, task.id(), TaskState::Done).await;
    assert_eq!((&done.result[..], done.delivery, runs.load(Ordering::Relaxed)), (&b"\"kept\""[..], 1, 1));
}

#[tokio::test]
async fn a_drained_worker_gives_back_what_it_cannot_finish() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let started = Arc::new(Notify::new());
    let worker = Worker::builder(client.clone()).agents(["a"]).drain(Duration::from_millis(50)).any({
        let started = Arc::clone(&started);
        move |_: (), _: Context| {
            let started = Arc::clone(&started);
            async move {
                started.notify_one();
                std::future::pending::<Result<(), TaskError>>().await
            }
        }
    });
    let (stop, running) = run(worker.build().expect("it is complete"));
    let task = client.enqueue("a", "for ever", &()).await.expect("stored");
    within("the handler starts", started.notified()).await;
    stop.cancel();
    within("the worker ends", running).await.expect("no panic").expect("in good order");
    let task = in_state(&client, task.id(), TaskState::Queued).await;
    assert_eq!((task.reason.as_str(), task.retry_count, task.losses), ("DRAIN", 0, 0));
}
