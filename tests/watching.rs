//! WatchTasks: everything that happens is told once and in order, over restarts and at any daemon, or it is said that it cannot be.

use crate::support::worker::{Stream, complete, fail_as, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::{CancellationToken, Client, Context, TaskError, Watch, Worker, v1};
use std::collections::BTreeMap;
use tokio::task::JoinSet;
use tonic::Code;
use v1::{ErrorClass, TaskState};

fn of_agent(agent: &str) -> v1::WatchTasksRequest {
    v1::WatchTasksRequest { agent: agent.into(), ..Default::default() }
}

/// A watch that has begun, and the token of its first message.
async fn begun(client: &Client, request: v1::WatchTasksRequest) -> (Watch, String) {
    let mut watch = client.watch(request);
    let first = within("the first message", watch.next()).await.expect("it begins");
    assert_eq!(first.events, []);
    (watch, first.resume_token)
}

/// The next so many events, with the token behind them.
async fn next(watch: &mut Watch, count: usize) -> (Vec<v1::TaskEvent>, String) {
    let mut events = Vec::new();
    loop {
        let message = within("a message", watch.next()).await.expect("it goes on");
        events.extend(message.events);
        assert!(events.len() <= count, "{events:?}");
        if events.len() == count {
            return (events, message.resume_token);
        }
    }
}

/// Why a call that is refused is, at once or with its first message.
async fn refused(client: &Client, request: v1::WatchTasksRequest) -> tonic::Status {
    match client.tasks().watch_tasks(request).await {
        Err(status) => status,
        Ok(stream) => within("an end", stream.into_inner().message()).await.expect_err("it is refused"),
    }
}

fn names(events: &[v1::TaskEvent]) -> Vec<(&str, &str)> {
    events.iter().map(|event| (&*event.task_id, event.event.as_ref().map_or("", |row| &*row.event))).collect()
}

/// Takes the next task, and ends it.
async fn work(worker: &mut Stream, how: v1::outcome::Outcome) {
    let assignment = worker.assignment().await;
    worker.settle(vec![outcome(lease(&assignment), how)]).await;
    worker.outcome_receipt().await;
}

#[tokio::test]
async fn what_happens_is_told_in_order_and_a_watch_goes_on_behind_its_token() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    enqueue(&client, task("a")).await;
    let (mut watch, at_first) = begun(&client, of_agent("a")).await;
    let (mut all, _) = begun(&client, v1::WatchTasksRequest::default()).await;
    let labelled = v1::NewTask { labels: [("run".into(), "7".into())].into(), ..task("a") };
    let id = enqueue(&client, labelled).await;
    let other = enqueue(&client, task("b")).await;
    let (events, token) = next(&mut watch, 1).await;
    assert_eq!(names(&events), [(&*id, "ENQUEUED")], "neither what was before nor another agent's");
    assert_eq!((events[0].agent.as_str(), events[0].task_type.as_str()), ("a", "test"));
    assert_eq!(names(&next(&mut all, 2).await.0), [(&*id, "ENQUEUED"), (&*other, "ENQUEUED")]);

    let cancelled = v1::CancelTaskRequest { task_id: id.clone(), reason: "no".into(), ..Default::default() };
    client.tasks().cancel_task(cancelled).await.expect("it waits");
    let (events, _) = next(&mut watch, 1).await;
    let rows = history(&client, &id).await;
    assert_eq!(events[0].event.as_ref(), rows.last(), "an event is the row of the history");

    // The SDK's goes on by itself.
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    let after = enqueue(&client, task("a")).await;
    assert_eq!(names(&next(&mut watch, 1).await.0), [(&*after, "ENQUEUED")]);
    let from = |resume_token: &str, agent: &str| v1::WatchTasksRequest {
        resume_token: resume_token.into(),
        ..of_agent(agent)
    };
    for (token, agent, expected) in [
        (&token, "a", vec![(&*id, "CANCELLED"), (&*after, "ENQUEUED")]),
        (&at_first, "a", vec![(&*id, "ENQUEUED"), (&*id, "CANCELLED"), (&*after, "ENQUEUED")]),
        (&at_first, "b", vec![(&*other, "ENQUEUED")]),
    ] {
        let (mut again, first) = begun(&client, from(token, agent)).await;
        assert_eq!(first, *token);
        assert_eq!(names(&next(&mut again, expected.len()).await.0), expected, "{agent}");
    }
}

#[tokio::test]
async fn filters_leave_out_what_does_not_fit() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let labels = BTreeMap::from([("run".to_owned(), "7".to_owned()), ("by".to_owned(), "ada".to_owned())]);
    let one = enqueue(&client, v1::NewTask { labels: labels.clone(), ..task("a") }).await;
    let request = v1::WatchTasksRequest { task_id: one.clone(), ..Default::default() };
    let (mut of_one, _) = begun(&client, request).await;
    let states = vec![TaskState::Done.into(), TaskState::Failed.into()];
    let (mut ends, _) = begun(&client, v1::WatchTasksRequest { states, ..of_agent("a") }).await;
    let request = v1::WatchTasksRequest { task_type: "other".into(), ..of_agent("a") };
    let (mut of_type, _) = begun(&client, request).await;
    let labels = BTreeMap::from([("run".to_owned(), "7".to_owned())]);
    let (mut of_run, _) = begun(&client, v1::WatchTasksRequest { labels, ..Default::default() }).await;

    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    work(&mut worker, complete("result")).await;
    let other = v1::NewTask { task_type: "other".into(), ..task("a") };
    let two = enqueue(&client, other).await;
    work(&mut worker, fail_as(ErrorClass::Permanent, "no")).await;
    let life = [(&*one, "ASSIGNED"), (&*one, "COMPLETED")];
    assert_eq!(names(&next(&mut of_one, 2).await.0), life);
    assert_eq!(names(&next(&mut of_run, 2).await.0), life);
    assert_eq!(names(&next(&mut ends, 2).await.0), [(&*one, "COMPLETED"), (&*two, "FAILED")]);
    let expected = ["ENQUEUED", "ASSIGNED", "FAILED"].map(|name| (&*two, name));
    let (events, _) = next(&mut of_type, 3).await;
    assert_eq!(names(&events), expected);
    let failure = events[2].event.as_ref().and_then(|event| event.error.as_ref()).expect("it failed");
    assert_eq!(failure.class(), ErrorClass::Permanent);
}

#[tokio::test]
async fn what_cannot_be_watched_is_refused() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let (_watch, token) = begun(&client, of_agent("a")).await;
    let resume = |resume_token: &str| v1::WatchTasksRequest {
        resume_token: resume_token.into(),
        ..Default::default()
    };
    for (request, code, why) in [
        (of_agent("No Agent"), Code::InvalidArgument, "INVALID_FIELD"),
        (
            v1::WatchTasksRequest { states: vec![99], ..Default::default() },
            Code::InvalidArgument,
            "INVALID_FIELD",
        ),
        (
            v1::WatchTasksRequest { task_id: "t0".into(), ..Default::default() },
            Code::InvalidArgument,
            "INVALID_FIELD",
        ),
        (
            v1::WatchTasksRequest { task_id: "t1k3".into(), ..Default::default() },
            Code::NotFound,
            "TASK_NOT_FOUND",
        ),
        (resume("garbage"), Code::InvalidArgument, "INVALID_FIELD"),
        (resume(&token[2..]), Code::InvalidArgument, "INVALID_FIELD"),
        (resume(&"0".repeat(100_000)), Code::InvalidArgument, "INVALID_FIELD"),
    ] {
        let status = refused(&client, request.clone()).await;
        assert_eq!((status.code(), reason(&status).as_str()), (code, why), "{request:?}");
    }
    let elsewhere = Daemon::start();
    let status = refused(&elsewhere.client().await, resume(&token)).await;
    assert_eq!((status.code(), reason(&status).as_str()), (Code::OutOfRange, "RESUME_TOO_OLD"), "{status}");
}

#[tokio::test]
async fn a_token_from_before_a_removal_is_too_old_and_one_from_after_it_is_not() {
    let flags = ["--retention-done", "1s"];
    let daemon = Daemon::start_with(Folder::new(), "127.0.0.1:0", &flags);
    let client = daemon.client().await;
    let (mut watch, before) = begun(&client, of_agent("a")).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    work(&mut worker, complete("result")).await;
    let (_, after) = next(&mut watch, 3).await;
    let look = v1::GetTaskRequest { task_id: id, include_data: false };
    eventually("retention removes it", async || client.tasks().get_task(look.clone()).await.err()).await;

    let resume = |token: &str| v1::WatchTasksRequest { resume_token: token.into(), ..of_agent("a") };
    let status = refused(&client, resume(&before)).await;
    assert_eq!((status.code(), reason(&status).as_str()), (Code::OutOfRange, "RESUME_TOO_OLD"), "{status}");
    let (mut again, _) = begun(&client, resume(&after)).await;
    let new = enqueue(&client, task("a")).await;
    for watch in [&mut watch, &mut again] {
        let (events, _) = next(watch, 2).await;
        assert_eq!(names(&events), [(&*new, "ENQUEUED"), (&*new, "ASSIGNED")]);
    }
}

#[tokio::test]
async fn a_drain_ends_a_watch() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let mut stream = client.tasks().watch_tasks(of_agent("a")).await.expect("it begins").into_inner();
    within("the first message", stream.message()).await.expect("it begins");
    daemon.signal("TERM");
    let status = within("the end", stream.message()).await.expect_err("it ends");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "DRAINING"), "{status}");
    assert!(daemon.ended().await.success());
}

#[tokio::test]
async fn there_are_so_many_watches_and_not_more() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let mut open = Vec::new();
    for _ in 0..256 {
        open.push(client.tasks().watch_tasks(of_agent("a")).await.expect("there is a place").into_inner());
    }
    let status = refused(&client, of_agent("a")).await;
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "EXHAUSTED"), "{status}");
    open.pop();
    let place = async || client.tasks().watch_tasks(of_agent("a")).await.ok();
    eventually("a place is free again", place).await;
}

/// Versions by task; each has to be the next.
#[derive(Default)]
struct Lives(BTreeMap<String, u64>);

impl Lives {
    fn add(&mut self, events: &[v1::TaskEvent]) {
        for event in events {
            let version = event.event.as_ref().map_or(0, |event| event.version);
            let known = self.0.entry(event.task_id.clone()).or_default();
            assert_eq!(version, *known + 1, "task {}", event.task_id);
            *known = version;
        }
    }

    fn count(&self) -> u64 {
        self.0.values().sum()
    }
}

/// Has tasks done by a worker at each of these daemons; how much happened.
pub(crate) async fn lives_at(daemons: &[Daemon], tasks: usize) -> u64 {
    let mut workers = JoinSet::new();
    for daemon in daemons {
        let handler = |payload: serde_json::Value, _: Context| async move { Ok::<_, TaskError>(payload) };
        let worker = Worker::builder(daemon.client().await).agents(["a"]).capacity(64).any(handler);
        workers.spawn(worker.build().expect("it is complete").run_until(CancellationToken::new()));
    }
    for (n, of_call) in vec![task("a"); tasks].chunks(500).enumerate() {
        let request = v1::EnqueueTasksRequest { tasks: of_call.to_vec(), ..Default::default() };
        let client = daemons[n % daemons.len()].client().await;
        client.tasks().enqueue_tasks(request).await.expect("they are stored");
    }
    let client = daemons[0].client().await;
    eventually("all are done", async || {
        let stats = client.admin().get_stats(v1::GetStatsRequest {}).await.expect("it answers").into_inner();
        let done = stats.counts.iter().find(|count| count.state() == TaskState::Done)?.count;
        (done >= tasks as u64).then_some(stats.transitions)
    })
    .await
}

/// Watches from a token on until so much has happened, now at one daemon and now at another.
pub(crate) async fn all_is_told(daemons: &[Daemon], mut token: String, transitions: u64) {
    let mut lives = Lives::default();
    let mut turn = 0;
    while lives.count() < transitions {
        let client = daemons[turn % daemons.len()].client().await;
        let request = v1::WatchTasksRequest { resume_token: token.clone(), ..Default::default() };
        let (mut watch, _) = begun(&client, request).await;
        for _ in 0..=turn % 3 {
            let message = within("a message", watch.next()).await.expect("it goes on");
            lives.add(&message.events);
            token = message.resume_token;
            if lives.count() >= transitions {
                break;
            }
        }
        turn += 1;
    }
    assert_eq!(lives.count(), transitions);
}

/// Takes up messages until so much has happened.
async fn read_on(watch: &mut Watch, lives: &mut Lives, transitions: u64) {
    while lives.count() < transitions {
        lives.add(&within("a message", watch.next()).await.expect("it goes on").events);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_does_not_read_keeps_nobody_up_and_misses_nothing() {
    let daemons = [Daemon::start()];
    let client = daemons[0].client().await;
    let (mut watch, token) = begun(&client, v1::WatchTasksRequest::default()).await;
    let slow = client.tasks().watch_tasks(v1::WatchTasksRequest::default()).await.expect("it begins");
    let (mut slow, mut lives) = (slow.into_inner(), Lives::default());
    // One reads along while they are done.
    let (transitions, ()) = tokio::join!(lives_at(&daemons, 1_000), read_on(&mut watch, &mut lives, 1_000));
    read_on(&mut watch, &mut lives, transitions).await;
    let mut late = Lives::default();
    while late.count() < transitions {
        let message = within("a message", slow.message()).await.expect("it goes on");
        late.add(&message.expect("it has not ended").events);
    }
    all_is_told(&daemons, token, transitions).await;
}
