//! A ledger moves between stores whole: every task, dead letter, key and history row, and goes on where it was; and what
//! cannot be moved is told in a sentence, with nothing changed.

use crate::durability::load::Load;
use crate::support::program::{done, ledgerd, refused, said, shown};
use crate::support::worker::{Stream, complete, fail_as, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::{Client, v1};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use v1::{ErrorClass, TaskState, work_request};

/// Exports taken beside a daemon under load.
const EXPORTS: usize = 5;
/// Transitions between two of them.
const BETWEEN: u64 = 300;

fn sqlite(dir: &Path) -> String {
    format!("sqlite:{}", dir.display())
}

fn start(store: &str) -> Daemon {
    Daemon::start_with(Folder::new(), "127.0.0.1:0", &["--store", store])
}

async fn stop(mut daemon: Daemon) {
    daemon.signal("TERM");
    let status = daemon.ended().await;
    assert!(status.success(), "{status}: {}", daemon.log());
}

/// What a client can see of the ledger's tasks and agents, as text.
async fn seen(client: &Client, ids: &[String]) -> Vec<String> {
    let mut seen = Vec::new();
    for id in ids {
        let mut task = get(client, id).await;
        // A start gives every lease the time in which nobody could be heard.
        task.lease_until = None;
        seen.push(format!("{task:?}"));
        seen.push(format!("{:?}", history(client, id).await));
    }
    let admin = client.admin();
    let letters = v1::ListDeadLettersRequest { include_discarded: true, ..Default::default() };
    seen.push(format!("{:?}", admin.clone().list_dead_letters(letters).await.expect("listed").into_inner()));
    for agent in ["done", "failed", "retry", "held", "asks", "broken"] {
        let request = v1::GetAgentRequest { agent: agent.to_owned() };
        let mut agent = admin.clone().get_agent(request).await.expect("there").into_inner();
        if let Some(agent) = &mut agent.agent {
            // One fills with time, the others come and go.
            (agent.budget_tokens, agent.sessions) = (0.0, 0);
        }
        seen.push(format!("{agent:?}"));
    }
    let events = v1::ListAgentEventsRequest::default();
    seen.push(format!("{:?}", admin.clone().list_agent_events(events).await.expect("listed").into_inner()));
    seen
}

/// The first difference, not all of it.
fn equal(before: &[String], after: &[String]) {
    for (before, after) in before.iter().zip(after) {
        assert_eq!(before, after);
    }
    assert_eq!(before.len(), after.len());
}

/// A ledger with a task in every state, and with all that belongs to one.
struct Rich {
    ids: Vec<String>,
    keyed: String,
    /// Of a worker that holds a task.
    held: v1::Lease,
}

fn keyed() -> v1::EnqueueTaskRequest {
    let task = v1::NewTask {
        idempotency_key: "order 7".to_owned(),
        labels: HashMap::from([("team".to_owned(), "blue \"\\ü".to_owned())]).into_iter().collect(),
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
        ..task("done")
    };
    v1::EnqueueTaskRequest { task: Some(task), request_id: "call 1".to_owned() }
}

async fn enrich(daemon: &Daemon) -> Rich {
    let client = daemon.client().await;
    let slow = || {
        let policy = v1::TaskPolicy {
            base_delay: ms(3_600_000),
            max_delay: ms(3_600_000),
            lease_duration: ms(600_000),
            ..v1::TaskPolicy::default()
        };
        v1::AgentSettings { policy: Some(policy), ..v1::AgentSettings::default() }
    };
    for agent in ["done", "failed", "retry", "held", "asks", "broken"] {
        configure(&client, agent, slow()).await;
    }
    let keyed = client.tasks().enqueue_task(keyed()).await.expect("stored").into_inner().task_id;
    let mut ids = vec![keyed.clone()];

    // DONE, with a small result, a large one, and a task that follows.
    let mut worker = Stream::open(daemon, hello("w-done", "done", 1)).await;
    let assignment = worker.assignment().await;
    let follow_ups = vec![task("waits")];
    let result = b"\x00small\xff".to_vec().into();
    let completed = v1::outcome::Outcome::Complete(v1::Complete { result, follow_ups });
    worker.settle(vec![outcome(lease(&assignment), completed)]).await;
    ids.extend(worker.outcome_receipt().await.follow_up_ids);
    ids.push(enqueue(&client, task("done")).await);
    worker.complete_next(&"large ".repeat(10_000)).await;
    drop(worker);

    // FAILED, one of them discarded.
    let mut worker = Stream::open(daemon, hello("w-failed", "failed", 2)).await;
    for message in ["line 1\n\tline 2", "no"] {
        ids.push(enqueue(&client, task("failed")).await);
        let assignment = worker.assignment().await;
        let failed = fail_as(ErrorClass::Permanent, message);
        worker.settle(vec![outcome(lease(&assignment), failed)]).await;
        assert_eq!(worker.outcome_receipt().await.state(), TaskState::Failed);
    }
    let discard = v1::DiscardDeadLettersRequest {
        task_ids: vec![ids[ids.len() - 1].clone()],
        reason: "known".to_owned(),
        ..Default::default()
    };
    client.admin().discard_dead_letters(discard).await.expect("discarded");
    drop(worker);

    // Waits for a retry; blocked by a question; waiting for another day; cancelled; of a paused agent.
    let mut worker = Stream::open(daemon, hello("w-retry", "retry", 1)).await;
    ids.push(enqueue(&client, task("retry")).await);
    assert_eq!(worker.fail_next("try again").await.1.state(), TaskState::Retry);
    let mut worker = Stream::open(daemon, hello("w-asks", "asks", 1)).await;
    ids.push(enqueue(&client, task("asks")).await);
    let assignment = worker.assignment().await;
    let question =
        v1::Block { question: "delete it?".into(), checkpoint: Some(b"so far".to_vec().into()), until: None };
    worker.settle(vec![outcome(lease(&assignment), v1::outcome::Outcome::Block(question))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Blocked);
    let cancelled = enqueue(&client, task("cancelled")).await;
    let cancel = v1::CancelTaskRequest { task_id: cancelled.clone(), ..Default::default() };
    client.tasks().cancel_task(cancel).await.expect("cancelled");
    ids.push(cancelled);
    let pause = v1::PauseAgentRequest {
        agent: "asks".to_owned(),
        reason: "new licence".to_owned(),
        actor: "ann".to_owned(),
        ..Default::default()
    };
    client.admin().pause_agent(pause).await.expect("paused");

    // Behind a breaker that is open: one that it holds back, and one that would come after it.
    let trip = v1::TripBreakerRequest {
        agent: "broken".into(),
        duration: ms(3_600_000),
        actor: "ada".into(),
        reason: "bad deploy".into(),
        ..Default::default()
    };
    client.admin().trip_breaker(trip).await.expect("tripped");
    let worker = Stream::open(daemon, hello("w-broken", "broken", 1)).await;
    for state in [TaskState::Blocked, TaskState::Queued] {
        let id = enqueue(&client, task("broken")).await;
        in_state(&client, &id, state).await;
        ids.push(id);
    }
    drop(worker);

    // RUNNING, with progress and a checkpoint.
    let mut worker = Stream::open(daemon, hello("w-held", "held", 1)).await;
    ids.push(enqueue(&client, task("held")).await);
    let assignment = worker.assignment().await;
    let held = lease(&assignment);
    worker.ack(held.clone()).await;
    let progress = v1::Progress { fraction: 1.0 / 3.0, note: "a third".into(), ..Default::default() };
    let beat = v1::Held {
        lease: Some(held.clone()),
        progress: Some(progress),
        checkpoint: Some(vec![0, 255, 10].into()),
    };
    worker.send(work_request::Frame::Heartbeat(v1::Heartbeat { held: vec![beat], sequence: 1 })).await;
    worker.heartbeat_ack().await;
    Rich { ids, keyed, held }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_moves_to_postgres_and_back_and_goes_on() {
    let Some(server) = postgres::server() else { return };
    let folder = Folder::new();
    let first = folder.path().join("first");
    let daemon = start(&sqlite(&first));
    let rich = enrich(&daemon).await;
    let before = seen(&daemon.client().await, &rich.ids).await;
    let states = ["Done", "Failed", "Retry", "Running", "Blocked", "Cancelled", "Queued"];
    for state in states {
        let found = before.iter().any(|text| text.contains(&format!("state: {state},")));
        assert!(found, "a task is {state}");
    }
    stop(daemon).await;

    let file = shown(&folder.path().join("ledger.jsonl"));
    let exported = done(&["export", &file, "--store", &sqlite(&first)]);
    let database = postgres::database(&server, &folder);
    let imported = done(&["import", &file, "--store", &database]);
    assert_eq!(exported, imported, "the same rows and digests");
    let again = done(&["export", "-", "--store", &database]);
    assert!(again == std::fs::read_to_string(&file).expect("it is there"), "byte for byte");

    let daemon = start(&database);
    let client = daemon.client().await;
    let after = seen(&client, &rich.ids).await;
    equal(&before, &after);
    // An old key, and an old call, give the old task.
    let known = client.tasks().enqueue_task(keyed()).await.expect("known").into_inner();
    assert_eq!(known.task_id, rich.keyed);
    let other_call = v1::EnqueueTaskRequest { request_id: "call 2".to_owned(), ..keyed() };
    let known = client.tasks().enqueue_task(other_call).await.expect("known").into_inner();
    assert_eq!((known.task_id, known.created), (rich.keyed.clone(), false));
    // Who held a lease settles it.
    let resumed = v1::Hello { held: vec![rich.held.clone()], ..hello("w-held", "held", 1) };
    let mut worker = Stream::open(&daemon, resumed).await;
    assert_eq!(worker.welcome.leases[0].state(), v1::LeaseState::Extended);
    worker.settle(vec![outcome(rich.held.clone(), complete("at last"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    // What the breaker held back goes on when it closes.
    let reset = v1::ResetBreakerRequest {
        agent: "broken".into(),
        actor: "ada".into(),
        reason: "mended".into(),
        ..Default::default()
    };
    client.admin().reset_breaker(reset).await.expect("reset");
    let mut worker = Stream::open(&daemon, hello("w-broken", "broken", 2)).await;
    for _ in 0..2 {
        worker.complete_next("mended").await;
    }
    drop(worker);
    // New numbers are above the old ones, and what waited can be had.
    let new = enqueue(&client, task("waits")).await;
    assert!(!rich.ids.contains(&new));
    let mut worker = Stream::open(&daemon, hello("w-waits", "waits", 2)).await;
    for _ in 0..2 {
        worker.complete_next("waited").await;
    }
    let mut ids = rich.ids.clone();
    ids.push(new);
    let before = seen(&client, &ids).await;
    stop(daemon).await;

    let file = shown(&folder.path().join("back.jsonl"));
    let exported = done(&["-o", "json", "export", &file, "--store", &database]);
    let second = folder.path().join("second");
    let imported = done(&["-o", "json", "import", &file, "--store", &sqlite(&second)]);
    assert_eq!(exported, imported);
    let told: serde_json::Value = serde_json::from_str(&imported).expect("one document");
    assert_eq!(told["tables"].as_array().map(Vec::len), Some(15));
    assert_eq!(
        done(&["export", "-", "--store", &sqlite(&second)]),
        std::fs::read_to_string(&file).expect("it is there")
    );
    let daemon = start(&sqlite(&second));
    equal(&before, &seen(&daemon.client().await, &ids).await);
    let last = enqueue(&daemon.client().await, task("waits")).await;
    assert!(!ids.contains(&last));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_moves_through_a_pipe_to_another_directory() {
    let folder = Folder::new();
    let (first, second) = (sqlite(&folder.path().join("first")), sqlite(&folder.path().join("second")));
    let daemon = start(&first);
    let rich = enrich(&daemon).await;
    let before = seen(&daemon.client().await, &rich.ids).await;
    stop(daemon).await;
    let mut export = command()
        .args(["export", "-", "--store", &first])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let pipe = export.stdout.take().expect("it is piped");
    let import =
        command().args(["import", "-", "--store", &second]).stdin(pipe).output().expect("the binary runs");
    assert!(import.status.success() && export.wait().expect("it ends").success(), "{}", said(&import));
    let daemon = start(&second);
    equal(&before, &seen(&daemon.client().await, &rich.ids).await);
}

/// The files of a directory, but for what locks it, what keeps room in it, and what SQLite keeps beside a database.
fn files(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text"));
    names
        .filter(|name| {
            !["ledger.lock", "ledger.ballast", "ledger.db-wal", "ledger.db-shm"].contains(&name.as_str())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_moved_is_told_and_changes_nothing() {
    let folder = Folder::new();
    let at = |name: &str| folder.path().join(name);
    let (full, empty) = (sqlite(&at("full")), sqlite(&at("empty")));
    let file = shown(&at("ledger.jsonl"));
    refused(&["export", &file, "--store", &full], 78, "the store has no ledger");
    assert!(!at("ledger.jsonl").exists() && !at("full").exists());
    let daemon = start(&full);
    enrich(&daemon).await;
    // A daemon serves it: it can be exported, and neither brought up to date nor replaced.
    done(&["export", &file, "--store", &full]);
    refused(&["import", &file, "--store", &full], 74, "is in use by another ledgerd; stop that one first");
    refused(&["migrate", "apply", "--store", &full], 74, "is in use by another ledgerd");
    assert!(done(&["migrate", "check", "--store", &full]).contains("APPLIED"));
    stop(daemon).await;

    refused(&["export", &file, "--store", &full], 2, "is there already; --force replaces it");
    done(&["export", "--force", &file, "--store", &full]);
    refused(&["export", "/nowhere/x", "--store", &full], 74, "/nowhere/x: ");
    refused(&["import", &file, "--store", &full], 78, "the store has a ledger already");
    refused(&["import", "/nowhere/x", "--store", &empty], 74, "/nowhere/x: ");
    let text = std::fs::read_to_string(&file).expect("it is there");
    assert!(done(&["export", "-", "--store", &full]) == text && files(&at("full")) == ["ledger.db"]);
    let broken = shown(&at("broken.jsonl"));
    for (content, code, sentence) in [
        (text[..text.len() / 2].to_owned(), 65, "the file is cut short"),
        (text[..text.rfind("{\"end\"").expect("it ends")].to_owned(), 65, "the file is cut short"),
        (text.replacen("delete it?", "delete me?", 1), 65, "the file was altered: it says"),
        (text.replacen("\"format\":1", "\"format\":2", 1), 78, "the file has format 2"),
        (format!("{text}more\n"), 65, "goes on after its end"),
        ("{}\n".to_owned(), 65, "no file of ledgerd export"),
    ] {
        std::fs::write(&broken, content).expect("writable");
        refused(&["import", &broken, "--store", &empty], code, sentence);
        assert_eq!(files(&at("empty")), Vec::<String>::new());
        if let Some(server) = postgres::server() {
            let database = postgres::database(&server, &folder);
            refused(&["import", &broken, "--store", &database], code, sentence);
        }
    }
    done(&["import", &file, "--store", &empty]);
    if let Some(server) = postgres::server() {
        let database = postgres::database(&server, &folder);
        done(&["import", &file, "--store", &database]);
        refused(&["import", &file, "--store", &database], 78, "the store has a ledger already");
        assert!(done(&["export", "-", "--store", &database]) == text);
        let daemon = start(&database);
        refused(&["import", &file, "--store", &database], 74, "a ledgerd serves the database");
        assert!(done(&["migrate", "status", "--store", &database]).contains("APPLIED"));
        drop(daemon);
    }
    for args in [["migrate", "status"], ["import", &file], ["export", "-"]] {
        let store = "postgres://ann:hush@127.0.0.1:1/x";
        let output = ledgerd(&[&args[..], &["--store", store]].concat());
        assert_eq!(output.status.code(), Some(74));
        assert!(
            said(&output).contains("127.0.0.1:1/x") && !said(&output).contains("hush"),
            "{}",
            said(&output)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_has_done_nothing_yet_may_be_replaced() {
    let folder = Folder::new();
    let (full, new) = (sqlite(&folder.path().join("full")), sqlite(&folder.path().join("new")));
    let daemon = start(&full);
    let rich = enrich(&daemon).await;
    let before = seen(&daemon.client().await, &rich.ids).await;
    stop(daemon).await;
    // One that was killed leaves a log, which must not be taken for that of what is imported.
    start(&new).kill();
    let file = shown(&folder.path().join("ledger.jsonl"));
    done(&["export", &file, "--store", &full]);
    done(&["import", &file, "--store", &new]);
    let daemon = start(&new);
    equal(&before, &seen(&daemon.client().await, &rich.ids).await);
    if let Some(server) = postgres::server() {
        let database = postgres::database(&server, &folder);
        stop(start(&database)).await;
        done(&["import", &file, "--store", &database]);
    }
}

/// Changes what a store remembers of its migrations.
fn tamper(store: &str, sql: &str) {
    match store.strip_prefix("sqlite:") {
        Some(dir) => {
            let conn = rusqlite::Connection::open(Path::new(dir).join("ledger.db")).expect("it opens");
            conn.execute_batch(sql).expect("it runs");
        }
        None => {
            let bin = std::env::var("LEDGERD_TEST_POSTGRES_BIN").expect("it comes with the server");
            let done = Command::new(format!("{bin}/psql")).args([store, "-qc", sql]).status();
            assert!(done.is_ok_and(|status| status.success()), "{sql}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_tells_how_a_schema_stands() {
    let folder = Folder::new();
    let mut stores = vec![sqlite(&folder.path().join("data"))];
    stores.extend(postgres::server().map(|server| postgres::database(&server, &folder)));
    for store in &stores {
        let migrate = |verb| ["migrate", verb, "--store", store];
        assert!(done(&migrate("status")).contains("PENDING"));
        assert!(
            !folder.path().join("data").exists() || store.starts_with("postgres"),
            "a look makes nothing"
        );
        refused(&migrate("check"), 78, "there is no ledger yet");
        assert!(!done(&migrate("apply")).contains("PENDING"));
        done(&migrate("check"));
        let told = done(&["-o", "json", "migrate", "status", "--store", store]);
        let told: serde_json::Value = serde_json::from_str(&told).expect("one document");
        assert_eq!(
            (told["standing"].as_str(), told["migrations"][0]["state"].as_str()),
            (Some("UP_TO_DATE"), Some("APPLIED"))
        );
        done(&migrate("apply"));

        let same = "SELECT 99, 'later', installed_on, success, checksum, execution_time FROM _sqlx_migrations WHERE version = 1";
        tamper(
            store,
            &format!(
                "INSERT INTO _sqlx_migrations (version, description, installed_on, success, checksum, execution_time) {same}"
            ),
        );
        assert!(done(&migrate("status")).contains("99       later"));
        refused(&migrate("check"), 78, "newer than this ledgerd");
        refused(&migrate("apply"), 78, "newer than this ledgerd");
        refused(&["export", "-", "--store", store], 78, "newer than this ledgerd");
        tamper(
            store,
            "DELETE FROM _sqlx_migrations WHERE version = 99; UPDATE _sqlx_migrations SET description = 'x', checksum = substr(checksum, 1, 9)",
        );
        assert!(done(&migrate("status")).contains("ALTERED"));
        refused(&migrate("check"), 65, "not as released");
        refused(&migrate("apply"), 65, "not as released");
        refused(&["export", "-", "--store", store], 65, "not as released");
        refused(&["import", "/dev/null", "--store", store], 65, "not as released");
    }
    // What is pending after an update is applied.
    let store = sqlite(&folder.path().join("older"));
    done(&["migrate", "apply", "--store", &store]);
    tamper(
        &store,
        "DELETE FROM _sqlx_migrations WHERE version = 5; DROP TABLE agent_blocks; CREATE INDEX task_specs_by_agent ON task_specs (agent, id)",
    );
    refused(&["migrate", "check", "--store", &store], 78, "migrations are pending");
    refused(&["export", "-", "--store", &store], 78, "run ledgerd migrate apply first");
    refused(&["import", "/dev/null", "--store", &store], 78, "run ledgerd migrate apply first");
    done(&["migrate", "apply", "--store", &store]);
    done(&["migrate", "check", "--store", &store]);
    // A database of somebody else is not taken for an empty one.
    let foreign = folder.path().join("foreign");
    std::fs::create_dir_all(&foreign).expect("writable");
    let file = shown(&folder.path().join("older.jsonl"));
    done(&["export", &file, "--store", &store]);
    tamper(&sqlite(&foreign), "CREATE TABLE mine (id INTEGER)");
    refused(&["import", &file, "--store", &sqlite(&foreign)], 78, "is no ledger, and would be lost");
    assert_eq!(files(&foreign), ["ledger.db"]);
    refused(&["migrate", "check", "--store", "mysql"], 78, "store = ");
    refused(&["migrate"], 2, "Usage");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_beside_a_daemon_at_work_is_of_one_moment() {
    let folder = Folder::new();
    let mut stores = vec![sqlite(&folder.path().join("data"))];
    stores.extend(postgres::server().map(|server| postgres::database(&server, &folder)));
    for (number, store) in stores.iter().enumerate() {
        let daemon = start(store);
        configure(&daemon.client().await, "load", quick()).await;
        let load = Load::start(&daemon.address);
        let mut seen = 0;
        for export in 0..EXPORTS {
            eventually("enough is acknowledged", async || {
                (load.counts.acknowledged.load(Relaxed) >= seen + BETWEEN).then_some(())
            })
            .await;
            seen = load.counts.acknowledged.load(Relaxed);
            let file = shown(&folder.path().join(format!("{number}-{export}.jsonl")));
            let (from, to) = (store.clone(), folder.path().join(format!("{number}-{export}")));
            tokio::task::spawn_blocking(move || {
                done(&["export", &file, "--store", &from]);
                done(&["import", &file, "--store", &sqlite(&to)]);
                is_whole(&to);
            })
            .await
            .expect("it is whole");
        }
        load.finish().await;
    }
}

/// Every task has what it was made with and its whole history, and what ended well its result.
fn is_whole(dir: &Path) {
    let conn = rusqlite::Connection::open(dir.join("ledger.db")).expect("it opens");
    let count = |sql: &str| conn.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("it counts");
    assert!(count("SELECT COUNT(*) FROM tasks") > 0);
    for torn in [
        "SELECT COUNT(*) FROM tasks WHERE id NOT IN (SELECT id FROM task_specs)",
        "SELECT COUNT(*) FROM task_specs WHERE id NOT IN (SELECT id FROM tasks)",
        "SELECT COUNT(*) FROM tasks AS t WHERE state = 5 AND result IS NULL AND id NOT IN (SELECT task_id FROM results)",
        "SELECT COUNT(*) FROM tasks WHERE history NOT IN (SELECT seq FROM history)",
        "SELECT COUNT(*) FROM (SELECT task_id FROM history GROUP BY task_id HAVING COUNT(*) <> max(version))",
        "SELECT COUNT(*) FROM idempotency_keys WHERE task_id NOT IN (SELECT id FROM tasks)",
        "SELECT COUNT(*) FROM history WHERE seq > (SELECT last_seq FROM meta)",
        "SELECT (SELECT COUNT(*) FROM history) <> (SELECT last_seq FROM meta)",
    ] {
        assert_eq!(count(torn), 0, "{torn}");
    }
}

#[test]
fn an_import_that_is_killed_leaves_no_ledger_and_can_be_repeated() {
    let folder = Folder::new();
    let dir = folder.path().join("data");
    let empty = folder.path().join("empty");
    done(&["migrate", "apply", "--store", &sqlite(&empty)]);
    let file = done(&["export", "-", "--store", &sqlite(&empty)]);
    let mut child = command()
        .args(["import", "-", "--store", &sqlite(&dir)])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let mut pipe = child.stdin.take().expect("it is piped");
    pipe.write_all(&file.as_bytes()[..file.len() / 2]).expect("it reads");
    let begun = dir.join("ledger.db.import");
    while !begun.exists() {
        std::hint::spin_loop();
        assert!(child.try_wait().expect("it is ours").is_none(), "it reads on");
    }
    child.kill().expect("it is ours");
    child.wait().expect("it ends");
    assert!(begun.exists() && !dir.join("ledger.db").exists());
    let whole = folder.path().join("whole.jsonl");
    std::fs::write(&whole, &file).expect("writable");
    done(&["import", &shown(&whole), "--store", &sqlite(&dir)]);
    assert_eq!(files(&dir), ["ledger.db"]);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &dir.join("ledger.db").metadata().expect("it is there").permissions(),
    );
    assert_eq!(mode & 0o777, 0o640);
}
