//! Why a task is not running: each situation made for real, and what `ledgerd task explain` says of it, word for word.

use crate::support::worker::{Stream, complete, fail_as, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1::GateKind::{
    Behind, Blocked, Breaker, Budget, NoRoom, NoWorker, NotDue, Paused, Ramp, TypeNotServed,
};
use ledgerd_client::v1::{self, GateKind, TaskState};
use ledgerd_client::{Client, Error, Explanation};
use std::time::SystemTime;

/// Waits until exactly these gates are shut, then compares what the command prints with the transcript.
async fn told(name: &str, daemon: &Daemon, id: &str, gates: &[GateKind]) -> Explanation {
    let client = daemon.client().await;
    let what = format!("{gates:?} are shut for {id}");
    let said = eventually(&what, async || {
        let said = client.task(id).explain().await.expect("it is explained");
        said.gates.iter().map(|gate| gate.kind).eq(gates.iter().copied()).then_some(said)
    })
    .await;
    transcript::check(&format!("explain/{name}"), daemon, &["task", "explain", id], &[id]);
    said
}

fn with_policy(agent: &str, policy: v1::TaskPolicy) -> v1::NewTask {
    v1::NewTask { policy: Some(policy), ..task(agent) }
}

/// A policy whose first back-off is an hour.
fn slow() -> v1::TaskPolicy {
    let hour = ms(3_600_000);
    v1::TaskPolicy {
        base_delay: hour,
        max_delay: hour,
        jitter: v1::JitterKind::None.into(),
        ..Default::default()
    }
}

fn in_seconds(seconds: u64) -> Option<prost_types::Timestamp> {
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    Some(prost_types::Timestamp { seconds: (now + seconds) as i64, nanos: 0 })
}

async fn pause(client: &Client, agent: &str, millis: Option<i64>) {
    let request = v1::PauseAgentRequest {
        agent: agent.to_owned(),
        reason: "the model is being replaced".to_owned(),
        actor: "ann".to_owned(),
        duration: millis.and_then(ms),
    };
    client.admin().pause_agent(request).await.expect("the agent is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_task_shows_its_question() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let ids = [enqueue(&client, task("a")).await, enqueue(&client, task("a")).await];
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    for until in [None, in_seconds(3_600)] {
        let question = "delete it?\nThe backups too?".to_owned();
        let block = v1::outcome::Outcome::Block(v1::Block { question, until, ..v1::Block::default() });
        let assignment = worker.assignment().await;
        worker.settle(vec![outcome(lease(&assignment), block)]).await;
        worker.outcome_receipt().await;
    }
    let said = told("blocked", &daemon, &ids[0], &[Blocked]).await;
    assert_eq!((said.state, said.reason.as_str()), (TaskState::Blocked, "WORKER"));
    assert_eq!(said.gates[0].until, None);
    let said = told("blocked-for-a-time", &daemon, &ids[1], &[Blocked]).await;
    assert!(said.gates[0].until.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_is_not_due_shows_what_it_waits_for() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 9)).await;
    let run_at = in_seconds(3_600);
    let later = enqueue(&client, v1::NewTask { run_at, ..task("a") }).await;
    let said = told("not-due", &daemon, &later, &[NotDue]).await;
    let named = SystemTime::try_from(run_at.expect("it is set")).expect("it is a time");
    let off = said.gates[0]
        .until
        .expect("it has an end")
        .duration_since(named)
        .unwrap_or_else(|off| off.duration());
    assert!(off.as_millis() <= 1, "until is run_at, to the millisecond");

    let failing = enqueue(&client, with_policy("a", slow())).await;
    worker.fail_next("down").await;
    told("back-off", &daemon, &failing, &[NotDue]).await;

    let hinted = enqueue(&client, task("a")).await;
    let assignment = worker.assignment().await;
    let error = v1::TaskError { class: v1::ErrorClass::Overloaded.into(), ..v1::TaskError::default() };
    let fails = v1::Fail { error: Some(error), retry_after: ms(60_000) };
    worker.settle(vec![outcome(lease(&assignment), v1::outcome::Outcome::Fail(fails))]).await;
    told("server-hint", &daemon, &hinted, &[NotDue]).await;

    let declined = enqueue(&client, task("a")).await;
    let assignment = worker.assignment().await;
    let release =
        v1::Release { cause: v1::ReleaseCause::Declined.into(), delay: ms(60_000), ..v1::Release::default() };
    worker.settle(vec![outcome(lease(&assignment), v1::outcome::Outcome::Release(release))]).await;
    told("declined", &daemon, &declined, &[NotDue]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_task_shows_who_may_come_back_for_it() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { lease_duration: ms(1_000), ..slow() };
    let id = enqueue(&client, with_policy("a", policy)).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    let assignment = worker.assignment().await;
    worker.ack(lease(&assignment)).await;
    in_state(&client, &id, TaskState::Retry).await;
    told("lost", &daemon, &id, &[NotDue]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_without_a_token_shows_both_budgets() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", budgeted(1.0, 0.001, 0.0)).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 9)).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(enqueue(&client, task("a")).await);
    }
    // The first pays its retry with the only token.
    for id in &ids {
        let (assignment, _) = worker.fail_next("down").await;
        assert_eq!(assignment.task_id, *id);
    }
    let said = told("budget", &daemon, &ids[1], &[Budget]).await;
    let gate = &said.gates[0];
    assert!(gate.current < 1.0 && gate.limit == 1.0 && gate.until.is_some(), "{gate:?}");
    told("budget-behind-another", &daemon, &ids[2], &[Budget]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_agent_shows_by_whom_and_why() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let _worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    pause(&client, "a", None).await;
    let id = enqueue(&client, task("a")).await;
    told("paused", &daemon, &id, &[Paused]).await;
    pause(&client, "a", Some(3_600_000)).await;
    let said = told("paused-for-a-time", &daemon, &id, &[Paused]).await;
    assert!(said.gates[0].until.is_some());
}

fn failing(open_ms: i64) -> v1::AgentSettings {
    let breaker = v1::BreakerSettings { open_timeout: ms(open_ms), ..v1::BreakerSettings::default() };
    let quick = quick();
    let policy = v1::TaskPolicy { max_retries: Some(100), ..quick.policy.unwrap_or_default() };
    v1::AgentSettings { breaker: Some(breaker), policy: Some(policy), ..quick }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_breaker_shows_when_it_probes() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", failing(60_000)).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    for _ in 0..5 {
        worker.fail_next("down").await;
    }
    in_state(&client, &id, TaskState::Blocked).await;
    let said = told("breaker-open", &daemon, &id, &[Breaker]).await;
    assert!(said.gates[0].until.is_some());
    // One slot is all there is: the next task is not even BLOCKED, and knows why all the same.
    let next = enqueue(&client, task("a")).await;
    let said = told("breaker-open-behind", &daemon, &next, &[Breaker, Behind]).await;
    assert_eq!((said.state, said.gates[1].current), (TaskState::Queued, 1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_breaker_shows_its_probes_in_flight() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", failing(6_000)).await;
    let first = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 9)).await;
    for _ in 0..5 {
        worker.fail_next("down").await;
    }
    let mut ids = vec![first];
    for _ in 0..2 {
        ids.push(enqueue(&client, task("a")).await);
    }
    // All of them while it is open: what becomes due beside a probe only waits.
    for id in &ids {
        in_state(&client, id, TaskState::Blocked).await;
    }
    for _ in 0..2 {
        let probe = worker.assignment().await;
        ids.retain(|id| *id != probe.task_id);
    }
    let [left] = &ids[..] else { panic!("two of three are probes: {ids:?}") };
    let said = told("breaker-half-open", &daemon, left, &[Breaker]).await;
    assert_eq!((said.gates[0].current, said.gates[0].limit), (2.0, 2.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_workers_show() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    told("no-worker", &daemon, &id, &[NoWorker]).await;
    let types = ["resize", "rotate"].map(str::to_owned).to_vec();
    let worker = Stream::open(&daemon, v1::Hello { task_types: types, ..hello("w", "a", 1) }).await;
    let said = told("type-not-served", &daemon, &id, &[TypeNotServed]).await;
    assert_eq!((said.gates[0].current, said.gates[0].limit), (0.0, 1.0));
    drop(worker);
    told("no-worker-any-more", &daemon, &id, &[NoWorker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_workers_and_those_before_show() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    enqueue(&client, task("a")).await;
    worker.assignment().await;
    let second = enqueue(&client, task("a")).await;
    let said = told("no-room", &daemon, &second, &[NoRoom]).await;
    assert_eq!((said.gates[0].current, said.gates[0].limit), (1.0, 1.0));
    let urgent = v1::NewTask { priority: Some(9), ..task("a") };
    enqueue(&client, urgent).await;
    let last = enqueue(&client, task("a")).await;
    let said = told("behind", &daemon, &last, &[NoRoom, Behind]).await;
    assert_eq!(said.gates[1].current, 2.0);
    let args = ["-o", "json", "task", "explain", &last];
    transcript::check("explain/behind-json", &daemon, &args, &[&last]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_with_capacity_zero_and_one_that_is_silent_show() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let _closed = Stream::open(&daemon, hello("v", "a", 0)).await;
    let mut silent = Stream::open(&daemon, hello("w", "a", 9)).await;
    let policy = v1::TaskPolicy {
        ack_timeout: ms(100),
        base_delay: ms(1),
        max_delay: ms(1),
        ..v1::TaskPolicy::default()
    };
    let id = enqueue(&client, with_policy("a", policy)).await;
    for _ in 0..3 {
        silent.assignment().await;
    }
    told("no-room-of-two", &daemon, &id, &[NoRoom]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_gates_show_in_order() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, v1::NewTask { run_at: in_seconds(3_600), ..task("a") }).await;
    pause(&client, "a", None).await;
    told("several", &daemon, &id, &[NotDue, Paused, NoWorker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_task_shows_its_worker_and_an_ended_one_its_end() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { ack_timeout: ms(3_600_000), ..v1::TaskPolicy::default() };
    let id = enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let assignment = worker.assignment().await;
    told("handed-out", &daemon, &id, &[]).await;
    worker.ack(lease(&assignment)).await;
    worker.receipt().await;
    let said = told("running", &daemon, &id, &[]).await;
    assert_eq!(said.state, TaskState::Running);
    client.task(&id).cancel().reason("ann: enough").await.expect("it runs");
    worker.stop().await;
    told("running-stopped", &daemon, &id, &[]).await;
    let cancelled = v1::outcome::Outcome::Cancelled(v1::Cancelled::default());
    worker.settle(vec![outcome(lease(&assignment), cancelled)]).await;
    worker.outcome_receipt().await;
    told("cancelled-running", &daemon, &id, &[]).await;

    let id = enqueue(&client, task("a")).await;
    let assignment = worker.assignment().await;
    worker.settle(vec![outcome(lease(&assignment), complete("yes"))]).await;
    worker.outcome_receipt().await;
    told("done", &daemon, &id, &[]).await;

    let id = enqueue(&client, task("a")).await;
    let assignment = worker.assignment().await;
    let fails = fail_as(v1::ErrorClass::Permanent, "there is no such\nrepository");
    worker.settle(vec![outcome(lease(&assignment), fails)]).await;
    worker.outcome_receipt().await;
    told("failed", &daemon, &id, &[]).await;

    let id = enqueue(&client, task("nobody")).await;
    client.task(&id).cancel().reason("ann: enough").await.expect("it waits");
    told("cancelled", &daemon, &id, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_exist_is_not_explained() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let unknown = client.task("t9zz").explain().await.expect_err("there is none");
    assert!(matches!(unknown, Error::NotFound { .. }), "{unknown}");
    transcript::check("explain/unknown", &daemon, &["task", "explain", "t9zz"], &[]);
    let request = v1::ExplainTaskRequest { task_id: "nonsense".to_owned() };
    let refused = client.tasks().explain_task(request).await.expect_err("it is no id");
    assert_eq!((refused.code(), reason(&refused).as_str()), (tonic::Code::InvalidArgument, "INVALID_FIELD"));
    transcript::check("explain/malformed", &daemon, &["task", "explain", "nonsense"], &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn explaining_changes_nothing() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let before = get(&client, &id).await;
    for _ in 0..10 {
        client.task(&id).explain().await.expect("it is explained");
    }
    assert_eq!(get(&client, &id).await, before);
    assert_eq!(events(&client, &id).await, ["ENQUEUED"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_breaker_and_a_tripped_one_of_a_type_show_who_and_why() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let per_type = v1::BreakerSettings { per_task_type: Some(true), ..Default::default() };
    configure(&client, "a", v1::AgentSettings { breaker: Some(per_type), ..quick() }).await;
    let _worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    let force = v1::ForceBreakerRequest {
        agent: "a".into(),
        task_type: "test".into(),
        state: v1::BreakerState::ForcedOpen.into(),
        actor: "ann".into(),
        reason: "the model is being replaced".into(),
        ..Default::default()
    };
    client.admin().force_breaker(force).await.expect("forced");
    let id = enqueue(&client, task("a")).await;
    in_state(&client, &id, TaskState::Blocked).await;
    told("breaker-forced", &daemon, &id, &[Breaker]).await;
    let trip = v1::TripBreakerRequest {
        agent: "a".into(),
        task_type: "test".into(),
        duration: ms(3_600_000),
        reason: "bad deploy".into(),
        ..Default::default()
    };
    client.admin().trip_breaker(trip).await.expect("tripped");
    told("breaker-tripped", &daemon, &id, &[Breaker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ramp_shows_how_many_may_run() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let ramp =
        v1::BreakerSettings { ramp_for: ms(600_000), success_threshold: Some(1), ..Default::default() };
    configure(&client, "a", v1::AgentSettings { breaker: Some(ramp), ..quick() }).await;
    let trip = v1::TripBreakerRequest {
        agent: "a".into(),
        duration: ms(10),
        reason: "for the test".into(),
        ..Default::default()
    };
    client.admin().trip_breaker(trip).await.expect("tripped");
    enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 10)).await;
    worker.complete_next("up").await;
    let running = [enqueue(&client, task("a")).await, enqueue(&client, task("a")).await];
    for id in &running {
        in_state(&client, id, TaskState::Running).await;
    }
    let id = enqueue(&client, task("a")).await;
    told("ramp", &daemon, &id, &[Ramp]).await;
}
