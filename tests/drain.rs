//! A daemon that is asked to go loses nothing and keeps nobody waiting.

use crate::support::worker::{Frame, Stream, complete, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1::TaskState;
use std::sync::Arc;

#[tokio::test]
async fn sigterm_tells_every_session_takes_last_outcomes_and_exits_zero() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    worker.receipt().await;
    daemon.signal("TERM");
    let drain = loop {
        if let Frame::Drain(drain) = worker.other().await {
            break drain;
        }
    };
    assert!(drain.deadline.is_some());
    worker.settle(vec![outcome(lease(&held), complete("last words"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    drop(worker);
    let status = daemon.ended().await;
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
    let folder = Arc::clone(&daemon.folder);
    drop(daemon);
    let again = Daemon::start_in(folder);
    let task = get(&again.client().await, &id).await;
    assert_eq!((task.state(), &task.result[..]), (TaskState::Done, &b"last words"[..]));
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let mut daemon = Daemon::start();
    let _worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    daemon.signal("TERM");
    eventually("the drain began", async || daemon.log().contains("draining").then_some(())).await;
    daemon.signal("TERM");
    let status = daemon.ended().await;
    assert_ne!(status.code(), Some(0));
}

#[tokio::test]
async fn a_second_daemon_on_the_same_files_is_refused() {
    if postgres::is_store() {
        return; // There are no files.
    }
    let daemon = Daemon::start();
    let output = command()
        .args(["serve", "--listen", "127.0.0.1:0", "--http-listen", "off", "--data-dir"])
        .arg(daemon.data())
        .output()
        .expect("the binary runs");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("in use") || said.contains("lock"), "{said}");
}

#[tokio::test]
async fn a_bind_that_is_not_loopback_is_refused() {
    let folder = Folder::new();
    let output = command()
        .args(["serve", "--listen", "0.0.0.0:0", "--http-listen", "off", "--data-dir"])
        .arg(folder.path().join("data"))
        .output()
        .expect("the binary runs");
    assert_eq!(output.status.code(), Some(78));
    assert!(!folder.path().join("data/ledger.db").exists());
}

#[tokio::test]
async fn database_files_are_for_owner_and_group_alone() {
    if postgres::is_store() {
        return; // There are no files.
    }
    use std::os::unix::fs::PermissionsExt;
    let daemon = Daemon::start();
    enqueue(&daemon.client().await, task("a")).await;
    for entry in std::fs::read_dir(daemon.data()).expect("there").flatten() {
        let mode = entry.metadata().expect("readable").permissions().mode() & 0o777;
        assert_eq!(mode & !0o640, 0, "{} has mode {mode:o}", entry.path().display());
    }
}
