//! The command line as people and programs use it.

use crate::support::program::said;
use crate::support::worker::{Stream, hello};
use crate::support::*;
use ledgerd_client::v1;
use std::process::Output;

fn ledgerd(daemon: &Daemon, args: &[&str]) -> Output {
    command().args(["--address", &daemon.address]).args(args).output().expect("the binary runs")
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", said(output));
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_tasks_is_enqueued_and_listed() {
    let daemon = Daemon::start();
    let file = daemon.folder.path().join("tasks.jsonl");
    let lines: String = (0..1_500)
        .map(|n| {
            format!(
                "{{\"agent\":\"a\",\"task_type\":\"t\",\"payload\":{{\"n\":{n}}},\"priority\":{}}}\n",
                n % 10
            )
        })
        .collect();
    std::fs::write(&file, lines).expect("writable");
    let path = file.to_str().expect("plain");
    let done = ledgerd(&daemon, &["task", "enqueue", "--from", path]);
    assert!(done.status.success() && said(&done).contains("1500"), "{}", said(&done));
    let listed =
        json(&ledgerd(&daemon, &["-o", "json", "task", "list", "--priority", "3", "--limit", "1000"]));
    assert_eq!(listed["tasks"].as_array().map(Vec::len), Some(150));
    let stats = json(&ledgerd(&daemon, &["-o", "json", "stats"]));
    assert_eq!(stats["sessions"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_line_of_a_file_is_named_and_nothing_is_sent() {
    let daemon = Daemon::start();
    let file = daemon.folder.path().join("tasks.jsonl");
    std::fs::write(&file, "{\"agent\":\"a\",\"task_type\":\"t\"}\n{\"agent\":\"a\",\"colour\":1}\n")
        .expect("writable");
    let refused = ledgerd(&daemon, &["task", "enqueue", "--from", file.to_str().expect("plain")]);
    assert!(!refused.status.success() && said(&refused).contains("line 2"), "{}", said(&refused));
    let listed = json(&ledgerd(&daemon, &["-o", "json", "task", "list"]));
    assert_eq!(listed["tasks"].as_array().map_or(0, Vec::len), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_tell_what_happened() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { max_retries: Some(0), ..v1::TaskPolicy::default() };
    let id = enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.fail_next("no").await;
    let waiting = enqueue(&client, task("b")).await;
    let cases: [(&[&str], i32); 7] = [
        (&["task", "show", &id], 0),
        (&["task", "show", "tzzz"], 3),
        (&["task", "wait", &id], 5),
        (&["task", "wait", &waiting, "--timeout", "100ms"], 124),
        (&["task", "show"], 2),
        (&["task", "cancel", &id], 1),
        (&["agent", "show", "nobody"], 3),
    ];
    for (args, code) in cases {
        let output = ledgerd(&daemon, args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", said(&output));
        if code != 0 {
            assert!(!output.stderr.is_empty() && !said(&output).contains("panicked"), "{args:?}");
        }
    }
    let address = daemon.address.clone();
    drop(daemon);
    let gone = command().args(["--address", &address, "stats"]).output().expect("the binary runs");
    assert_eq!(gone.status.code(), Some(4), "{}", said(&gone));
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_see_and_mend_dead_letters_and_breakers() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let set =
        ledgerd(&daemon, &["agent", "configure", "a", "--max-retries", "0", "--failure-threshold", "1"]);
    assert!(set.status.success(), "{}", said(&set));
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.fail_next("no").await;
    let letters = said(&ledgerd(&daemon, &["dlq", "list"]));
    assert!(letters.contains(&id) && letters.contains("RETRIES_EXHAUSTED"), "{letters}");
    assert!(said(&ledgerd(&daemon, &["breaker", "show", "a"])).contains("OPEN"));
    assert!(ledgerd(&daemon, &["breaker", "reset", "a"]).status.success());
    assert!(said(&ledgerd(&daemon, &["breaker", "list"])).contains("CLOSED"));
    assert!(ledgerd(&daemon, &["dlq", "redrive", &id]).status.success());
    worker.complete_next("yes").await;
    let history = said(&ledgerd(&daemon, &["task", "history", &id]));
    assert!(history.contains("REDRIVEN") && history.contains("COMPLETED"), "{history}");
}

#[test]
fn check_config_shows_where_each_value_comes_from_and_names_what_is_wrong() {
    let folder = Folder::new();
    let file = folder.path().join("ledgerd.toml");
    std::fs::write(&file, "drain_grace = \"3s\"\n").expect("writable");
    let path = file.to_str().expect("plain");
    let shown = command()
        .args(["check-config", "--config", path, "--listen", "127.0.0.1:1"])
        .env("LEDGERD_LOG_FORMAT", "json")
        .output()
        .expect("the binary runs");
    let text = said(&shown);
    assert!(shown.status.success(), "{text}");
    for (key, origin) in
        [("drain_grace", "ledgerd.toml"), ("log_format", "LEDGERD_LOG_FORMAT"), ("listen", "--listen")]
    {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        assert!(line.contains(origin), "{key}: {line:?}\n{text}");
    }
    std::fs::write(&file, "colour = 1\n").expect("writable");
    let refused = command().args(["check-config", "--config", path]).output().expect("the binary runs");
    assert_eq!(refused.status.code(), Some(78));
    assert!(said(&refused).contains("colour"), "{}", said(&refused));
}
