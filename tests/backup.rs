//! A backup is the ledger at one moment, taken beside a daemon that goes on; and after a restore nothing that was given out since
//! is taken for the restored ledger's own.

use crate::durability::check_history;
use crate::durability::load::Load;
use crate::support::program::{done, refused, shown};
use crate::support::worker::{Stream, complete, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1::{self, LeaseState, TaskState};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;

/// Backups taken beside a daemon under load.
const BACKUPS: usize = 3;
/// Transitions between two of them.
const BETWEEN: u64 = 300;

/// A daemon on SQLite, whatever store the others have: the directory is the ledger's.
fn start(dir: &Path) -> Daemon {
    let store = format!("sqlite:{}", dir.display());
    Daemon::start_with(Folder::new(), "127.0.0.1:0", &["--store", &store])
}

/// What the file has of its tasks: their last rows, and whether the fold of them is what the task's row says.
fn is_a_point_in_history(file: &Path, last_seq: u64) {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let conn = rusqlite::Connection::open_with_flags(file, flags).expect("it is a database");
    let number = |sql: &str| conn.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("a number");
    assert_eq!(number("SELECT coalesce(max(seq), 0) FROM history"), last_seq as i64, "nothing after it");
    assert_eq!(number("SELECT count(*) FROM history"), last_seq as i64, "and nothing is missing before");
    let unlike = "WITH all_of_it AS MATERIALIZED (SELECT * FROM history) \
        SELECT count(*) FROM tasks AS t LEFT JOIN all_of_it AS h ON h.seq = t.history \
        WHERE h.seq IS NULL OR h.to_state <> t.state OR h.fence <> t.fence OR h.version <> t.version \
        OR h.attempt <> t.attempt OR h.reason <> t.reason";
    assert_eq!(number(unlike), 0, "a task is not what its history says");
    let broken = "WITH all_of_it AS MATERIALIZED (SELECT * FROM history) \
        SELECT count(*) FROM all_of_it AS h LEFT JOIN all_of_it AS b ON b.seq = h.prev \
        WHERE h.version > 1 AND (b.seq IS NULL OR b.task_id <> h.task_id OR b.version + 1 <> h.version \
            OR b.to_state <> h.from_state)";
    assert_eq!(number(broken), 0, "a history has a gap");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_taken_under_load_is_a_point_in_history_and_goes_on_from_there() {
    let folder = Folder::new();
    let daemon = start(&folder.path().join("data"));
    let data = shown(&folder.path().join("data"));
    configure(&daemon.client().await, "load", quick()).await;
    let load = Load::start(&daemon.address);
    let mut files = Vec::new();
    for at in 0..BACKUPS {
        let seen = load.counts.acknowledged.load(Relaxed);
        eventually("the daemon goes on", async || {
            (load.counts.acknowledged.load(Relaxed) >= seen + BETWEEN).then_some(())
        })
        .await;
        let file = folder.path().join(format!("{at}.db"));
        let path = shown(&file);
        let before = load.counts.acknowledged.load(Relaxed);
        let args = ["-o", "json", "backup", &path, "--data-dir", &data].map(str::to_owned);
        let told = tokio::task::spawn_blocking(move || done(&args.each_ref().map(String::as_str)));
        let told: serde_json::Value = serde_json::from_str(&told.await.expect("it ran")).expect("JSON");
        let last_seq = told["last_seq"].as_str().and_then(|text| text.parse().ok()).expect("a number");
        eprintln!(
            "backup {at}: {last_seq} rows, {} transitions acknowledged meanwhile",
            load.counts.acknowledged.load(Relaxed) - before
        );
        is_a_point_in_history(&file, last_seq);
        let mode = file.metadata().expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        assert_eq!(done(&["-o", "json", "restore", "--check", &path]), format!("{told:#}\n"));
        files.push(file);
    }
    load.finish().await;
    drop(daemon);

    let back = folder.path().join("back");
    done(&["restore", &shown(files.last().expect("some")), "--data-dir", &shown(&back)]);
    let daemon = start(&back);
    let client = daemon.client().await;
    let mut page_token = String::new();
    let mut tasks = Vec::new();
    loop {
        let request = v1::ListTasksRequest { page_token, ..v1::ListTasksRequest::default() };
        let page = client.tasks().list_tasks(request).await.expect("listed").into_inner();
        tasks.extend(page.tasks);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    let ended = |task: &v1::Task| matches!(task.state(), TaskState::Done | TaskState::Cancelled);
    for task in &tasks {
        let history = history(&client, &task.task_id).await;
        check_history(&get(&client, &task.task_id).await, &history);
        let last = history.last().expect("a row");
        assert_eq!(last.event == "RESTORED", !ended(task), "{}", task.task_id);
    }
    let live = tasks.iter().filter(|task| !ended(task)).count();
    eprintln!("{} tasks restored, {live} of them with a new fence", tasks.len());
    assert!(live > 0);
    // All that is left is done by workers that come.
    Load::start(&daemon.address).finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_was_given_something_after_the_backup_or_before_is_told_that_it_is_lost() {
    let folder = Folder::new();
    let data = folder.path().join("data");
    let daemon = start(&data);
    let client = daemon.client().await;
    let mut holder = Stream::open(&daemon, hello("holder", "a", 1)).await;
    let running = enqueue(&client, task("a")).await;
    let before = lease(&holder.assignment().await);
    holder.ack(before.clone()).await;
    holder.receipt().await;
    let waiting = enqueue(&client, task("b")).await;
    let file = shown(&folder.path().join("backup.db"));
    done(&["backup", &file, "--data-dir", &shown(&data)]);

    // Given out after it: a lease of a task that the backup has, a task that it has not, and a lease of that.
    let mut late = Stream::open(&daemon, hello("late", "b", 2)).await;
    let after = lease(&late.assignment().await);
    assert_eq!(after.task_id, waiting);
    let unknown = enqueue(&client, task("b")).await;
    let of_unknown = lease(&late.assignment().await);
    drop((holder, late, daemon));

    let back = folder.path().join("back");
    done(&["restore", &file, "--data-dir", &shown(&back)]);
    let daemon = start(&back);
    let client = daemon.client().await;
    // Who comes back with what it holds.
    for (name, agent, held) in [("holder", "a", &before), ("late", "b", &after), ("late", "b", &of_unknown)] {
        let resumed = v1::Hello { held: vec![held.clone()], capacity: 0, ..hello(name, agent, 0) };
        let stream = Stream::open(&daemon, resumed).await;
        assert_eq!(stream.welcome.leases[0].state(), LeaseState::Lost, "{held:?}");
    }
    // Nobody holds it any more, so it is there for the next one: with a fence that nobody was given.
    assert!(matches!(in_state(&client, &running, TaskState::Retry).await.reason.as_str(), "LOST"));
    let mut next = Stream::open(&daemon, hello("next", "b", 1)).await;
    let anew = lease(&next.assignment().await);
    assert_eq!(anew.task_id, waiting);
    assert!(anew.fence > 1 << 32, "{anew:?}");
    // And an outcome under the old one is refused by name, now that somebody newer holds it too.
    for (name, held, why) in [("holder", &before, "LEASE_LOST"), ("late", &after, "LEASE_LOST")] {
        let request = v1::SettleTasksRequest {
            worker_id: name.to_owned(),
            outcomes: vec![outcome(held.clone(), complete("stale"))],
        };
        let answer = client.workers().settle_tasks(request).await.expect("answered").into_inner();
        let error = answer.receipts[0].error.clone().expect("it is refused");
        let text = format!("{error:?}");
        assert!(text.contains(why), "{text}");
    }
    next.settle(vec![outcome(anew, complete("fine"))]).await;
    assert_eq!(next.outcome_receipt().await.state(), TaskState::Done);
    // A number that was given out after the backup is never given to another task.
    let fresh = enqueue(&client, task("c")).await;
    assert_ne!(fresh, unknown);
    let missing = v1::GetTaskRequest { task_id: unknown, include_data: false };
    let missing = client.tasks().get_task(missing).await.expect_err("it is not in the backup");
    assert_eq!(reason(&missing), "TASK_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_backup_or_a_place_for_one_is_refused_by_name() {
    let folder = Folder::new();
    let at = |name: &str| folder.path().join(name);
    let daemon = start(&at("data"));
    let payload = b"something that is easily found in a file".to_vec();
    let big = v1::NewTask { payload: payload.clone().into(), ..task("a") };
    enqueue(&daemon.client().await, big).await;
    let (data, file) = (shown(&at("data")), shown(&at("backup.db")));
    done(&["backup", &file, "--data-dir", &data]);
    refused(&["backup", &file, "--data-dir", &data], 2, "backup.db is there already");
    done(&["backup", &shown(folder.path()), "--data-dir", &data]);
    let named = |name: &str| name.starts_with("ledger-") && name.ends_with("Z.db");
    let files = std::fs::read_dir(folder.path()).expect("a folder").flatten();
    assert!(files.map(|found| found.file_name().into_string().expect("text")).any(|name| named(&name)));
    refused(&["backup", &shown(&at("other")), "--data-dir", &shown(&at("none"))], 78, "no ledger");
    refused(&["backup", "x", "--store", "postgres:///nothing"], 78, "pg_dump");
    refused(&["restore", &file, "--store", "postgres:///nothing"], 78, "--raise-fences");
    refused(&["restore", &file, "--data-dir", &data], 74, "in use by another ledgerd");
    drop(daemon);
    refused(&["restore", &file, "--data-dir", &data], 78, "is there already");
    refused(&["restore", &shown(&at("none.db")), "--data-dir", &shown(&at("back"))], 74, "No such file");

    let bytes = std::fs::read(&file).expect("it is there");
    let found = bytes.windows(payload.len()).position(|window| window == payload).expect("the payload");
    let mut flipped = bytes.clone();
    flipped[found] ^= 1;
    let mut torn = bytes.clone();
    torn.truncate(bytes.len() / 2);
    let mut headless = bytes;
    headless[..16].fill(0);
    let cases: [(&str, &[u8], &str); 4] = [
        ("flipped.db", &flipped, "rows of task_specs are not those that were backed up"),
        ("torn.db", &torn, "torn.db is damaged"),
        ("headless.db", &headless, "headless.db is damaged"),
        ("text.db", b"not even a database", "text.db is damaged"),
    ];
    for (name, bytes, why) in cases {
        let damaged = shown(&at(name));
        std::fs::write(&damaged, bytes).expect("writable");
        refused(&["restore", "--check", &damaged], 65, why);
        refused(&["restore", &damaged, "--data-dir", &shown(&at("back"))], 65, why);
    }
    refused(&["restore", "--check", &shown(&at("data/ledger.db"))], 65, "no file of ledgerd backup");
    let left = std::fs::read_dir(at("back")).expect("a folder").flatten();
    let left: Vec<_> = left.map(|found| found.file_name().into_string().expect("text")).collect();
    assert_eq!(left, ["ledger.lock"], "nothing is kept of what was refused");
    done(&["restore", &file, "--data-dir", &shown(&at("back"))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_killed_leaves_no_file_of_its_name() {
    let folder = Folder::new();
    let data = folder.path().join("data");
    let daemon = start(&data);
    let client = daemon.client().await;
    for _ in 0..8 {
        let tasks = vec![v1::NewTask { payload: vec![7; 400 << 10].into(), ..task("a") }; 8];
        let request = v1::EnqueueTasksRequest { tasks, ..v1::EnqueueTasksRequest::default() };
        client.tasks().enqueue_tasks(request).await.expect("stored");
    }
    let file = folder.path().join("killed.db");
    let mut child = command()
        .args(["backup", &shown(&file), "--data-dir", &shown(&data)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary runs");
    let partial = || {
        let found = std::fs::read_dir(folder.path()).expect("a folder").flatten();
        found.filter(|found| found.file_name().to_string_lossy().starts_with(".ledgerd-backup-")).count()
    };
    eventually("the copy is begun", async || (partial() > 0).then_some(())).await;
    child.kill().expect("it is killed");
    let status = child.wait().expect("it ends");
    assert!(!status.success(), "it was killed before its end");
    assert!(!file.exists());
    // The next one is not disturbed, nor is the daemon.
    done(&["backup", &shown(&file), "--data-dir", &shown(&data)]);
    enqueue(&client, task("a")).await;
    assert!(Command::new("test").arg("-f").arg(&file).status().is_ok_and(|status| status.success()));
}

#[tokio::test(flavor = "multi_thread")]
async fn fences_of_a_database_that_was_restored_are_raised() {
    let Some(server) = postgres::server() else { return };
    let folder = Folder::new();
    let database = postgres::database(&server, &folder);
    let start = || Daemon::start_with(Folder::new(), "127.0.0.1:0", &["--store", &database]);
    let mut daemon = start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = lease(&worker.assignment().await);
    worker.ack(held.clone()).await;
    worker.receipt().await;
    refused(&["restore", "--raise-fences", "--store", &database], 74, "stop every one first");
    drop(worker);
    daemon.signal("TERM");
    assert!(daemon.ended().await.success());
    assert_eq!(done(&["restore", "--raise-fences", "--store", &database]), "1 fences raised\n");
    let daemon = start();
    let client = daemon.client().await;
    let resumed = v1::Hello { held: vec![held.clone()], ..hello("w", "a", 0) };
    let stream = Stream::open(&daemon, resumed).await;
    assert_eq!(stream.welcome.leases[0].state(), LeaseState::Lost);
    in_state(&client, &id, TaskState::Retry).await;
    let history = history(&client, &id).await;
    check_history(&get(&client, &id).await, &history);
    assert!(history.iter().any(|row| row.event == "RESTORED"));
    let fresh = enqueue(&client, task("a")).await;
    assert!(fresh.len() > id.len(), "{fresh}");
}
