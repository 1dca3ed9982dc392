//! Durable, then spoken: what was acknowledged is there after SIGKILL, at whatever moment it came.

pub(crate) mod load;

use crate::support::worker::{Stream, complete, hello, lease, outcome};
use crate::support::*;
use futures_util::future::join_all;
use ledgerd_client::v1::{self, LeaseState, TaskState};
use load::Load;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Transitions that must have been acknowledged since the last kill, else the next proves little.
const BETWEEN_KILLS: u64 = 1_000;

#[tokio::test]
async fn a_worker_that_held_a_task_through_a_restart_settles_it() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    worker.receipt().await;
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    let before = get(&client, &id).await;
    assert_eq!((before.state(), before.fence, before.worker_id.as_str()), (TaskState::Running, 1, "w"));
    let resumed = v1::Hello { held: vec![lease(&held)], ..hello("w", "a", 1) };
    let mut worker = Stream::open(&daemon, resumed).await;
    assert_eq!(worker.welcome.leases[0].state(), LeaseState::Extended);
    worker.settle(vec![outcome(lease(&held), complete("kept"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    assert_eq!(events(&client, &id).await, ["ENQUEUED", "ASSIGNED", "STARTED", "COMPLETED"]);
}

#[tokio::test]
async fn tasks_persist_over_an_orderly_restart() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let id =
        enqueue(&client, v1::NewTask { labels: BTreeMap::from([("k".into(), "v".into())]), ..task("a") })
            .await;
    let before = get(&client, &id).await;
    daemon.signal("TERM");
    assert_eq!(daemon.ended().await.code(), Some(0));
    let again = Daemon::start_in(Arc::clone(&daemon.folder));
    assert_eq!(get(&again.client().await, &id).await, before);
}

/// Kills as many times as `LEDGERD_KILLS` says (default 5), each under load, and checks everything that was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_work_survives_kills_under_load() {
    let kills: u64 = std::env::var("LEDGERD_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let mut daemon = Daemon::start();
    configure(&daemon.client().await, "load", quick()).await;
    let load = Load::start(&daemon.address);
    let mut seen = 0;
    for kill in 1..=kills {
        eventually("enough is acknowledged and everything is in flight", async || {
            let counts = &load.counts;
            let ripe = counts.acknowledged.load(Relaxed) >= seen + BETWEEN_KILLS
                && [&counts.enqueues, &counts.acks, &counts.outcomes, &counts.cancels]
                    .iter()
                    .all(|flying| flying.load(Relaxed) > 0);
            ripe.then_some(())
        })
        .await;
        let flying = load.counts.flying();
        daemon.kill();
        let acknowledged = load.counts.acknowledged.load(Relaxed);
        eprintln!(
            "kill {kill}: {} transitions acknowledged since the last; in flight: {flying}",
            acknowledged - seen
        );
        seen = acknowledged;
        let (folder, address) = (Arc::clone(&daemon.folder), daemon.address.clone());
        daemon = Daemon::start_at(folder, &address);
    }
    let record = load.finish().await;
    let found = nothing_is_missing(&daemon.client().await, &record).await;
    eprintln!("{kills} kills, {found}: nothing is missing");
}

/// Looks for everything that was acknowledged; says how much that is.
pub(crate) async fn nothing_is_missing(client: &ledgerd_client::Client, record: &load::Record) -> String {
    let mut rows = 0;
    let mut histories = HashMap::new();
    // Many at one time, for most of it is waiting for answers.
    for ids in record.enqueued.chunks(64) {
        let looked =
            ids.iter().map(async |id| (id, in_terminal_state(client, id).await, history(client, id).await));
        for (id, task, history) in join_all(looked).await {
            rows += history.len();
            check_history(&task, &history);
            histories.insert(id, history);
        }
    }
    for (lease, answer) in &record.receipts {
        let history = &histories[&lease.0];
        let row = history.iter().find(|row| row.version == answer.version);
        let row = row.unwrap_or_else(|| panic!("the receipted row {answer:?} of {lease:?} is gone"));
        assert_eq!((row.to(), row.fence), (answer.state(), lease.1), "{lease:?}");
    }
    for id in &record.cancelled {
        let asked = histories[id].iter().any(|row| row.event == "CANCELLED" || row.event == "STOP_REQUESTED");
        assert!(asked, "the acknowledged cancel of {id} is gone");
    }
    let distinct: HashSet<_> =
        record.assigned.iter().map(|(lease, worker)| (lease.clone(), worker.clone())).collect();
    let leases: HashSet<_> = distinct.iter().map(|(lease, _)| lease).collect();
    assert_eq!(leases.len(), distinct.len(), "one fence was given to two workers");
    format!(
        "{} tasks, {} receipts, {} cancels, {} leases, {rows} history rows",
        record.enqueued.len(),
        record.receipts.len(),
        record.cancelled.len(),
        leases.len()
    )
}

async fn in_terminal_state(client: &ledgerd_client::Client, id: &str) -> v1::Task {
    let what = format!("task {id} is not stuck");
    eventually(&what, async || {
        let task = get(client, id).await;
        matches!(task.state(), TaskState::Done | TaskState::Failed | TaskState::Cancelled).then_some(task)
    })
    .await
}

pub(crate) fn check_history(task: &v1::Task, history: &[v1::HistoryEvent]) {
    let mut fence = 0;
    for (at, row) in history.iter().enumerate() {
        assert_eq!(row.version, at as u64 + 1, "the history of {} has a gap", task.task_id);
        let before = at.checked_sub(1).map_or(0, |before| history[before].to);
        assert_eq!(row.from, before, "row {at} of {} starts elsewhere", task.task_id);
        if row.event == "ASSIGNED" {
            assert_eq!(row.fence, fence + 1, "a fence of {} was skipped or used twice", task.task_id);
        }
        fence = row.fence;
    }
    let last = history.last().expect("there is one row at least");
    assert_eq!(
        (last.to, last.fence, last.version),
        (task.state, task.fence, task.version),
        "{}",
        task.task_id
    );
}

/// What cannot be right is not served on: the process ends, and does not stay without answering.
#[tokio::test]
async fn a_ledger_that_lacks_payloads_is_not_served_on() {
    if postgres::is_store() {
        return; // All of it is in the database.
    }
    let daemon = Daemon::start();
    let new = v1::NewTask { payload: vec![7; 30 << 10].into(), ..task("a") };
    let request = v1::EnqueueTasksRequest { tasks: vec![new; 10], ..Default::default() };
    daemon.client().await.tasks().enqueue_tasks(request).await.expect("they are stored");
    let folder = daemon.data().join("ledger.payloads");
    let mut daemon = daemon.kill_and_restart();
    daemon.kill();
    std::fs::rename(&folder, daemon.data().join("elsewhere")).expect("it is moved");
    let mut daemon = daemon.kill_and_restart();
    assert_eq!(daemon.ended().await.code(), Some(65));
    assert!(daemon.log().contains("00000001, which has payloads of tasks, is missing"), "{}", daemon.log());
    std::fs::rename(daemon.data().join("elsewhere"), &folder).expect("it is put back");
    let daemon = daemon.kill_and_restart();
    let list = v1::ListTasksRequest { page_size: 10, ..Default::default() };
    let client = daemon.client().await;
    let found = client.tasks().list_tasks(list).await.expect("it is served").into_inner().tasks;
    assert_eq!(found.len(), 10);
    assert_eq!(get(&client, &found[0].task_id).await.payload.len(), 30 << 10);
}

/// Row 82 of the table of bad inputs. Needs the right to mount, which CI has; elsewhere it says so and ends.
#[tokio::test]
async fn on_a_full_disk_new_tasks_are_refused_and_what_runs_is_still_recorded() {
    if postgres::is_store() {
        return; // The disk is the server's.
    }
    let folder = Folder::new();
    let data = folder.path().join("data");
    std::fs::create_dir_all(&data).expect("writable");
    let Some(disk) = SmallDisk::mount(&data) else {
        eprintln!("skipped: this user may not mount a small file system");
        return;
    };
    let ballast = data.join("ledger.ballast");
    let daemon = Daemon::start_in(folder);
    assert_eq!(ballast.metadata().expect("it is made at the start").len(), 16 << 20);
    let client = daemon.client().await;
    let mut held = Vec::new();
    for name in ["first", "second"] {
        enqueue(&client, task(name)).await;
        let mut worker = Stream::open(&daemon, hello(name, name, 1)).await;
        let assignment = worker.assignment().await;
        worker.ack(lease(&assignment)).await;
        worker.receipt().await;
        held.push((worker, lease(&assignment)));
    }
    let (mut second, second_lease) = held.pop().expect("two");
    let (mut first, first_lease) = held.pop().expect("two");

    let (stored, refused) = fill(&client).await;
    is_full(&refused);
    assert!(!stored.is_empty() && !ballast.exists());
    first.settle(vec![outcome(first_lease.clone(), complete("on a full disk"))]).await;
    assert_eq!(first.outcome_receipt().await.state(), TaskState::Done);
    is_full(&fill(&client).await.1);
    // A result as large as they may be.
    let large = "r".repeat(1 << 20);

    drop((first, second.beat(Vec::new()).await));
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    let (more, refused) = fill(&client).await;
    is_full(&refused);
    assert_eq!(more, Vec::<String>::new(), "a restart changes nothing");
    let resumed = v1::Hello { held: vec![second_lease.clone()], ..hello("second", "second", 1) };
    second = Stream::open(&daemon, resumed).await;
    second.settle(vec![outcome(second_lease.clone(), complete(&large))]).await;
    assert_eq!(second.outcome_receipt().await.state(), TaskState::Done);
    assert!(daemon.log().contains("no new tasks are taken"), "{}", daemon.log());

    disk.grow();
    let grown = eventually("tasks are taken again", async || fill_one(&client, FILLING[0]).await.ok()).await;
    assert!(ballast.exists() && daemon.log().contains("new tasks are taken"), "{}", daemon.log());
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    for id in stored.iter().chain([&grown]) {
        let found = get(&client, id).await;
        assert_eq!(found.state(), TaskState::Queued);
        assert!(
            found.payload.iter().all(|byte| *byte == 7) && found.payload.len() as u64 == found.payload_bytes
        );
    }
    assert!(data.join("ledger.payloads/00000001").exists(), "some payloads are in a file of their own");
    for lease in [first_lease, second_lease] {
        assert_eq!(get(&client, &lease.task_id).await.state(), TaskState::Done);
    }
    eprintln!("{} tasks of 200 and 300 KiB filled the disk", stored.len());
    drop(daemon);
    drop(disk);
}

/// Payloads that fill a disk: in rows, and in a file of their own.
const FILLING: [usize; 2] = [200 << 10, 300 << 10];

async fn fill_one(client: &ledgerd_client::Client, bytes: usize) -> Result<String, tonic::Status> {
    let big = v1::NewTask { payload: vec![7; bytes].into(), ..task("a") };
    let request = v1::EnqueueTaskRequest { task: Some(big), request_id: String::new() };
    Ok(client.tasks().enqueue_task(request).await?.into_inner().task_id)
}

/// Enqueues until it is refused.
async fn fill(client: &ledgerd_client::Client) -> (Vec<String>, tonic::Status) {
    let mut stored = Vec::new();
    for bytes in FILLING.into_iter().cycle() {
        match fill_one(client, bytes).await {
            Ok(id) => stored.push(id),
            Err(status) => return (stored, status),
        }
    }
    unreachable!("it goes round and round")
}

fn is_full(refused: &tonic::Status) {
    use tonic_types::StatusExt;
    assert_eq!((refused.code(), reason(refused).as_str()), (tonic::Code::ResourceExhausted, "STORE_FULL"));
    assert!(refused.get_details_retry_info().is_some());
}

/// A file system of 64 MiB, unmounted when dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: &std::path::Path) -> Option<Self> {
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64m,mode=0750", "tmpfs"])
            .arg(at)
            .stderr(std::process::Stdio::null())
            .status();
        status.is_ok_and(|status| status.success()).then(|| Self(at.to_owned()))
    }

    /// Makes room, as an operator would.
    fn grow(&self) {
        let status =
            std::process::Command::new("mount").args(["-o", "remount,size=256m"]).arg(&self.0).status();
        assert!(status.is_ok_and(|status| status.success()), "who may mount may remount");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
