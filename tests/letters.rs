//! Dead letters as a tool: grouped, chosen by what they are, counted first, put back at a rate or with something changed.

use crate::support::worker::{Stream, complete, fail_as, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::{Client, v1};
use std::collections::BTreeSet;
use v1::{ErrorClass, TaskState};

/// Fails `count` tasks of this type for good, with this message.
async fn letters(daemon: &Daemon, agent: &str, task_type: &str, message: &str, count: usize) -> Vec<String> {
    let client = daemon.client().await;
    let mut worker = Stream::open(
        daemon,
        v1::Hello { task_types: vec![task_type.into()], ..hello(task_type, agent, 100) },
    )
    .await;
    let mut ids = Vec::new();
    for chunk in (0..count).collect::<Vec<_>>().chunks(100) {
        let tasks =
            chunk.iter().map(|_| v1::NewTask { task_type: task_type.into(), ..task(agent) }).collect();
        let request = v1::EnqueueTasksRequest { tasks, ..Default::default() };
        let stored = client.tasks().enqueue_tasks(request).await.expect("stored").into_inner();
        ids.extend(stored.results.into_iter().map(|result| result.task_id));
        let mut outcomes = Vec::new();
        for _ in chunk {
            let assignment = worker.assignment().await;
            outcomes.push(outcome(lease(&assignment), fail_as(ErrorClass::Permanent, message)));
        }
        worker.settle(outcomes).await;
        for _ in chunk {
            assert_eq!(worker.outcome_receipt().await.state(), TaskState::Failed);
        }
    }
    ids
}

fn filter(task_type: &str) -> Option<v1::DeadLetterFilter> {
    Some(v1::DeadLetterFilter { task_type: task_type.into(), ..Default::default() })
}

async fn redrive(client: &Client, request: v1::RedriveDeadLettersRequest) -> v1::RedriveDeadLettersResponse {
    client.admin().redrive_dead_letters(request).await.expect("answered").into_inner()
}

async fn matched(client: &Client, filter: v1::DeadLetterFilter) -> u64 {
    let request = v1::RedriveDeadLettersRequest { filter: Some(filter), dry_run: true, ..Default::default() };
    let counted = redrive(client, request).await;
    assert!(counted.results.is_empty());
    counted.matched
}

#[tokio::test]
async fn letters_alike_are_one_group_the_largest_first() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    letters(&daemon, "a", "parse", "bad input in line 17", 3).await;
    letters(&daemon, "a", "parse", "bad input in line 9", 1).await;
    let fetched = letters(&daemon, "b", "fetch", "no such host", 2).await;
    let group = async |filter| {
        let request = v1::GroupDeadLettersRequest { filter, limit: 0 };
        client.admin().group_dead_letters(request).await.expect("grouped").into_inner()
    };
    let all = group(None).await;
    let told: Vec<_> = all.groups.iter().map(|g| (g.agent.as_str(), g.task_type.as_str(), g.count)).collect();
    assert_eq!(
        told,
        [("a", "parse", 4), ("b", "fetch", 2)],
        "numbers in a message do not tell failures apart"
    );
    assert_eq!((all.dead_letters, all.total_groups, all.more), (6, 2, false));
    let of_b = group(Some(v1::DeadLetterFilter { agent: "b".into(), ..Default::default() })).await;
    let one = &of_b.groups[0];
    assert_eq!((of_b.groups.len(), one.reason.as_str(), &one.sample_task_id), (1, "PERMANENT", &fetched[1]));
    assert_eq!(one.sample_error.as_ref().map(|error| error.message.as_str()), Some("no such host"));
    assert!(one.first_fail_time.is_some() && one.last_fail_time.is_some() && one.fingerprint.len() == 16);
    let few = v1::GroupDeadLettersRequest { limit: 1, ..Default::default() };
    let few = client.admin().group_dead_letters(few).await.expect("grouped").into_inner();
    assert_eq!((few.groups.len(), few.dead_letters, few.total_groups), (1, 6, 2));
}

#[tokio::test]
async fn each_field_of_a_filter_chooses_and_a_dry_run_only_counts() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let first = letters(&daemon, "a", "x", "one", 2).await;
    let last = letters(&daemon, "b", "y", "two", 3).await;
    let letter = async |id: &str| {
        let request = v1::GetDeadLetterRequest { task_id: id.into() };
        client.admin().get_dead_letter(request).await.expect("there").into_inner().dead_letter.expect("set")
    };
    let (old, new) = (letter(&first[0]).await, letter(&last[0]).await);
    let any = v1::DeadLetterFilter::default;
    for (filter, count) in [
        (v1::DeadLetterFilter { agent: "a".into(), ..any() }, 2),
        (v1::DeadLetterFilter { agent: "nobody".into(), ..any() }, 0),
        (v1::DeadLetterFilter { task_type: "y".into(), ..any() }, 3),
        (v1::DeadLetterFilter { reason: "PERMANENT".into(), ..any() }, 5),
        (v1::DeadLetterFilter { reason: "POISON".into(), ..any() }, 0),
        (v1::DeadLetterFilter { fingerprint: old.fingerprint.clone(), ..any() }, 2),
        (v1::DeadLetterFilter { failed_after: new.fail_time, ..any() }, 3),
        (v1::DeadLetterFilter { failed_before: old.fail_time, ..any() }, 0),
        (v1::DeadLetterFilter { agent: "a".into(), task_type: "y".into(), ..any() }, 0),
    ] {
        assert_eq!(matched(&client, filter.clone()).await, count, "{filter:?}");
    }
    for id in first.iter().chain(&last) {
        assert_eq!(get(&client, id).await.state(), TaskState::Failed);
        assert!(!events(&client, id).await.contains(&"REDRIVEN".to_owned()), "nothing was written");
    }
    let by_id = v1::RedriveDeadLettersRequest { task_ids: first, dry_run: true, ..Default::default() };
    assert_eq!(redrive(&client, by_id).await.matched, 2);
}

#[tokio::test]
async fn all_of_everything_both_and_neither_are_refused_by_name() {
    use tonic_types::StatusExt;
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let fields = |status: tonic::Status| -> Vec<String> {
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
        let details = status.get_details_bad_request().expect("violations");
        details.field_violations.into_iter().map(|violation| violation.field).collect()
    };
    let request = v1::RedriveDeadLettersRequest::default;
    for (request, field) in [
        (request(), "task_ids"),
        (
            v1::RedriveDeadLettersRequest { filter: Some(v1::DeadLetterFilter::default()), ..request() },
            "filter",
        ),
        (
            v1::RedriveDeadLettersRequest { filter: filter("x"), task_ids: vec!["t1".into()], ..request() },
            "task_ids",
        ),
        (
            v1::RedriveDeadLettersRequest {
                filter: filter("x"),
                rate_per_second: Some(f64::NAN),
                ..request()
            },
            "rate_per_second",
        ),
    ] {
        let refused = client.admin().redrive_dead_letters(request).await.expect_err("refused");
        assert_eq!(fields(refused), [field]);
    }
    let all =
        v1::DiscardDeadLettersRequest { filter: Some(v1::DeadLetterFilter::default()), ..Default::default() };
    assert_eq!(fields(client.admin().discard_dead_letters(all).await.expect_err("refused")), ["filter"]);
}

#[tokio::test]
async fn a_filtered_redrive_is_spread_and_says_where_to_go_on() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let ids = letters(&daemon, "a", "x", "down", 4).await;
    letters(&daemon, "a", "other", "down", 1).await;
    let request = v1::RedriveDeadLettersRequest {
        filter: filter("x"),
        rate_per_second: Some(0.01),
        actor: "ada".into(),
        reason: "mended".into(),
        ..Default::default()
    };
    let done = redrive(&client, request).await;
    let named: Vec<_> = done.results.iter().map(|result| result.task_id.clone()).collect();
    assert_eq!((named, done.matched, done.more), (ids.clone(), 4, false));
    assert!(done.results.iter().all(|result| result.error.is_none()));
    let mut times = Vec::new();
    for id in &ids {
        let task = get(&client, id).await;
        assert_eq!((task.state(), task.reason.as_str(), task.redrives), (TaskState::Queued, "REDRIVEN", 1));
        times.push(task.run_at.expect("set").seconds);
    }
    for pair in times.windows(2) {
        assert!((99..=101).contains(&(pair[1] - pair[0])), "a hundred seconds apart: {times:?}");
    }
    let next = done.next_start_time.expect("set").seconds;
    assert!((99..=101).contains(&(next - times[3])), "the next in turn: {next} after {times:?}");
    let told = history(&client, &ids[0]).await;
    let row = told.iter().find(|row| row.event == "REDRIVEN").expect("its row");
    assert!(format!("{row:?}").contains("ada: mended"), "{row:?}");
}

#[tokio::test]
async fn what_is_changed_reaches_the_worker_the_history_and_every_count() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let ids = letters(&daemon, "old", "x", "wrong agent", 2).await;
    let change = v1::RedriveDeadLettersRequest {
        task_ids: ids.clone(),
        payload: Some(b"{\"mended\":true}".to_vec().into()),
        priority: Some(9),
        agent: "new".into(),
        ..Default::default()
    };
    let done = redrive(&client, change).await;
    assert!(done.results.iter().all(|result| result.error.is_none()), "{done:?}");
    let counts = async |client: &Client, agent: &str| -> Vec<u64> {
        let agent =
            client.admin().get_agent(v1::GetAgentRequest { agent: agent.into() }).await.expect("there");
        agent.into_inner().agent.expect("set").counts.iter().map(|count| count.count).collect()
    };
    // QUEUED, RUNNING, RETRY, BLOCKED.
    assert_eq!((counts(&client, "old").await, counts(&client, "new").await), (vec![0; 4], vec![2, 0, 0, 0]));
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    assert_eq!((counts(&client, "old").await, counts(&client, "new").await), (vec![0; 4], vec![2, 0, 0, 0]));
    let listed = async |agent: &str| -> Vec<String> {
        let request = v1::ListTasksRequest { agent: agent.into(), ..Default::default() };
        let page = client.tasks().list_tasks(request).await.expect("it lists").into_inner();
        page.tasks.into_iter().map(|task| task.task_id).rev().collect()
    };
    assert_eq!((listed("old").await, listed("new").await), (Vec::new(), ids.clone()));
    let mut worker = Stream::open(&daemon, hello("w", "new", 2)).await;
    for id in &ids {
        let assignment = worker.assignment().await;
        assert_eq!((&assignment.task_id, assignment.priority), (id, 9));
        assert_eq!((&assignment.payload[..], assignment.agent.as_str()), (&b"{\"mended\":true}"[..], "new"));
        worker.settle(vec![outcome(lease(&assignment), complete("ok"))]).await;
        worker.outcome_receipt().await;
        let task = get(&client, id).await;
        assert_eq!((task.agent.as_str(), task.state()), ("new", TaskState::Done));
        let told = history(&client, id).await;
        let row = told.iter().find(|row| row.event == "REDRIVEN").expect("its row");
        let text = format!("{row:?}");
        assert!(text.contains("priority") && text.contains("payload") && text.contains("agent"), "{text}");
    }
}

#[tokio::test]
async fn a_key_moves_with_its_task_unless_it_is_taken_there() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let keyed = |agent: &str, key: &str| v1::NewTask { idempotency_key: key.into(), ..task(agent) };
    let (free, taken) =
        (enqueue(&client, keyed("old", "k1")).await, enqueue(&client, keyed("old", "k2")).await);
    let holder = enqueue(&client, keyed("new", "k2")).await;
    let mut worker = Stream::open(&daemon, hello("w", "old", 2)).await;
    for _ in 0..2 {
        let assignment = worker.assignment().await;
        worker.settle(vec![outcome(lease(&assignment), fail_as(ErrorClass::Permanent, "no"))]).await;
        worker.outcome_receipt().await;
    }
    let request = v1::RedriveDeadLettersRequest {
        task_ids: vec![free.clone(), taken.clone()],
        agent: "new".into(),
        ..Default::default()
    };
    let done = redrive(&client, request).await;
    assert_eq!(done.results[0].error, None);
    let refused = done.results[1].error.as_ref().expect("its key is taken");
    assert_eq!(refused.reason, "KEY_REUSED_WITH_OTHER_CONTENT");
    assert!(refused.message.contains(&holder), "{refused:?}");
    assert_eq!(
        (get(&client, &taken).await.agent, get(&client, &taken).await.state()),
        ("old".into(), TaskState::Failed)
    );
    // Its key is taken at the new agent now, and free at the old one.
    let request = v1::EnqueueTaskRequest { task: Some(keyed("new", "k1")), ..Default::default() };
    let refused = client.tasks().enqueue_task(request).await.expect_err("taken");
    assert!(refused.message().contains(&free), "{refused}");
    assert_ne!(enqueue(&client, keyed("old", "k1")).await, free);
}

#[tokio::test]
async fn a_repeated_request_names_the_same_tasks_after_a_kill() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    letters(&daemon, "a", "x", "down", 3).await;
    let request = v1::RedriveDeadLettersRequest {
        filter: filter("x"),
        rate_per_second: Some(0.0),
        request_id: "once".into(),
        ..Default::default()
    };
    let first = redrive(&client, request.clone()).await;
    assert_eq!(first.results.len(), 3);
    let daemon = daemon.kill_and_restart();
    // They fail again, and the same request does not take them up again.
    let client = daemon.client().await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 3)).await;
    for _ in 0..3 {
        let assignment = worker.assignment().await;
        worker.settle(vec![outcome(lease(&assignment), fail_as(ErrorClass::Permanent, "again"))]).await;
        worker.outcome_receipt().await;
    }
    let again = redrive(&client, request).await;
    assert_eq!(again.results, first.results);
    for result in &first.results {
        assert_eq!(get(&client, &result.task_id).await.state(), TaskState::Failed);
    }
}

#[tokio::test]
async fn more_than_a_thousand_take_two_calls_and_each_is_done_once() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let ids: BTreeSet<String> = letters(&daemon, "a", "x", "down", 1_100).await.into_iter().collect();
    let request = || v1::RedriveDeadLettersRequest {
        filter: filter("x"),
        rate_per_second: Some(0.0),
        ..Default::default()
    };
    let first = redrive(&client, request()).await;
    assert_eq!((first.results.len(), first.matched, first.more), (1_000, 1_100, true));
    let second = redrive(&client, request()).await;
    assert_eq!((second.results.len(), second.matched, second.more), (100, 100, false));
    let done: BTreeSet<String> =
        first.results.into_iter().chain(second.results).map(|result| result.task_id).collect();
    assert_eq!(done, ids);
}

#[tokio::test]
async fn a_filtered_discard_hides_with_who_and_why() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let ids = letters(&daemon, "a", "x", "known", 2).await;
    let kept = letters(&daemon, "a", "y", "known", 1).await;
    let request = v1::DiscardDeadLettersRequest {
        filter: filter("x"),
        actor: "ada".into(),
        reason: "not worth it".into(),
        ..Default::default()
    };
    let done = client.admin().discard_dead_letters(request).await.expect("done").into_inner();
    assert_eq!((done.results.len(), done.matched, done.more), (2, 2, false));
    let any = v1::DeadLetterFilter { agent: "a".into(), ..Default::default() };
    assert_eq!(matched(&client, any).await, 1);
    let again = v1::RedriveDeadLettersRequest { task_ids: ids, ..Default::default() };
    for result in redrive(&client, again).await.results {
        assert_eq!(result.error.map(|error| error.reason), Some("DISCARDED".to_owned()));
    }
    let request = v1::ListDeadLettersRequest { include_discarded: true, ..Default::default() };
    let listed = client.admin().list_dead_letters(request).await.expect("listed").into_inner().dead_letters;
    assert!(
        listed.iter().all(|letter| letter.task_id == kept[0] || letter.discard_reason == "ada: not worth it")
    );
}

/// What the program printed on standard output, its remarks, and its exit code.
fn ledgerd(daemon: &Daemon, args: &[&str]) -> (String, String, i32) {
    let output = command()
        .args(["--address", &daemon.address])
        .args(args)
        .stdin(std::process::Stdio::null())
        .output()
        .expect("the program runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (text(output.stdout), text(output.stderr), output.status.code().unwrap_or(-1))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_groups_counts_asks_and_redrives() {
    let daemon = Daemon::start();
    let old = letters(&daemon, "a", "x", "no such file 17", 1_200).await;
    letters(&daemon, "a", "y", "out of paper", 3).await;
    let (groups, _, code) = ledgerd(&daemon, &["dlq", "group"]);
    let lines: Vec<_> = groups.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!((code, lines.len()), (0, 3), "{groups}");
    assert_eq!(lines[1][..4], ["1200", "a", "x", "PERMANENT"], "{groups}");
    let print = lines[1][4];

    for (args, expected) in [
        (vec!["dlq", "redrive"], "name ids, or a filter"),
        (vec!["dlq", "redrive", &old[0], "--type", "x"], "not both"),
        (vec!["dlq", "redrive", &old[0], "--dry-run"], "these are ids"),
        (vec!["dlq", "redrive", "--type", "x"], "1200 dead letters fit; --yes to redrive them"),
        (vec!["dlq", "discard", "--type", "x", "--note", "n"], "--yes to discard them"),
        (vec!["dlq", "redrive", &old[0], "--payload", "{oops"], "not JSON"),
    ] {
        let (stdout, stderr, code) = ledgerd(&daemon, &args);
        assert_eq!((stdout.as_str(), code), ("", 2), "{args:?}: {stderr}");
        assert!(stderr.contains(expected), "{args:?}: {stderr}");
    }
    let filter = ["--fingerprint", print];
    let run = |verb: &str, rest: &[&str]| {
        let args: Vec<_> = ["dlq", verb].into_iter().chain(filter).chain(rest.iter().copied()).collect();
        ledgerd(&daemon, &args)
    };
    assert_eq!(run("redrive", &["--dry-run"]), ("1200 fit\n".into(), String::new(), 0));
    let (told, stderr, code) =
        run("redrive", &["--yes", "--rate", "100", "--priority", "9", "--note", "the file is back"]);
    assert_eq!((code, told.lines().count()), (0, 1_200), "{stderr}");
    assert!(told.lines().all(|line| line.ends_with(" QUEUED")), "{told}");
    assert_eq!(run("redrive", &["--yes"]), (String::new(), "no dead letter fits\n".into(), 0));

    // At 100 a second the last of 1,200 is due twelve seconds after the first, over the calls' edge too.
    let client = daemon.client().await;
    let due = async |id: &str| {
        let request = v1::GetTaskRequest { task_id: id.into(), ..Default::default() };
        let task = client.tasks().get_task(request).await.expect("known").into_inner().task;
        let task = task.expect("a task");
        assert_eq!((task.state(), task.priority), (TaskState::Queued, 9));
        let at = task.run_at.expect("it has a time");
        at.seconds * 1_000 + i64::from(at.nanos) / 1_000_000
    };
    let spread = due(&old[1_199]).await - due(&old[0]).await;
    assert!((11_900..=12_100).contains(&spread), "{spread} ms");

    let (told, stderr, code) =
        ledgerd(&daemon, &["dlq", "discard", "--type", "y", "--yes", "--note", "recycled"]);
    assert_eq!((code, told.lines().count()), (0, 3), "{stderr}");
    assert_eq!(ledgerd(&daemon, &["dlq", "list"]), (String::new(), "no dead letters\n".into(), 0));
}
