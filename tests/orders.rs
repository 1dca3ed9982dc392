//! The breaker in full: rates, slow attempts, hints, ramps, one per task type, and what operators order. Every move is an
//! event with its cause.

use crate::support::worker::{Stream, complete, fail, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::{Client, v1};
use std::time::Duration;
use v1::{BreakerState, TaskState};

fn with(breaker: v1::BreakerSettings) -> v1::AgentSettings {
    let quick = quick();
    let policy = v1::TaskPolicy { max_retries: Some(100), ..quick.policy.unwrap_or_default() };
    // No ramp unless a test is about it.
    let breaker = v1::BreakerSettings { ramp_for: breaker.ramp_for.or_else(|| ms(0)), ..breaker };
    v1::AgentSettings { breaker: Some(breaker), policy: Some(policy), ..quick }
}

fn typed(agent: &str, task_type: &str) -> v1::NewTask {
    v1::NewTask { task_type: task_type.into(), ..task(agent) }
}

async fn breaker_of(client: &Client, agent: &str, task_type: &str) -> v1::Breaker {
    let request = v1::GetBreakerRequest { agent: agent.into(), task_type: task_type.into() };
    client.admin().get_breaker(request).await.expect("there").into_inner().breaker.expect("set")
}

async fn breaker(client: &Client, agent: &str) -> v1::Breaker {
    breaker_of(client, agent, "").await
}

/// Moves of the breaker, oldest first.
async fn moves(client: &Client, agent: &str) -> Vec<v1::AgentEvent> {
    let request = v1::ListAgentEventsRequest { agent: agent.into(), ..Default::default() };
    let mut found = client.admin().list_agent_events(request).await.expect("listed").into_inner().events;
    found.retain(|event| event.event == "BREAKER");
    found.reverse();
    found
}

async fn causes(client: &Client, agent: &str) -> Vec<String> {
    moves(client, agent).await.into_iter().map(|event| event.cause).collect()
}

fn trip(agent: &str, period_ms: i64) -> v1::TripBreakerRequest {
    v1::TripBreakerRequest {
        agent: agent.into(),
        duration: ms(period_ms),
        actor: "ada".into(),
        reason: "bad deploy".into(),
        ..Default::default()
    }
}

fn force(agent: &str, state: BreakerState) -> v1::ForceBreakerRequest {
    v1::ForceBreakerRequest {
        agent: agent.into(),
        state: state.into(),
        actor: "ada".into(),
        reason: "we look into it".into(),
        ..Default::default()
    }
}

/// Settles the next assignment as told.
async fn settle_next(worker: &mut Stream, how: v1::outcome::Outcome) -> v1::Receipt {
    let assignment = worker.assignment().await;
    worker.settle(vec![outcome(lease(&assignment), how)]).await;
    worker.outcome_receipt().await
}

#[tokio::test]
async fn a_tripped_breaker_blocks_then_probes_and_says_who_did_it() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", with(v1::BreakerSettings::default())).await;
    let opened = client.admin().trip_breaker(trip("a", 60_000)).await.expect("tripped").into_inner();
    let opened = opened.breaker.expect("set");
    assert_eq!(opened.state(), BreakerState::Open);
    let wait = opened.retry_after.expect("it says when");
    assert!((50..=60).contains(&wait.seconds), "{wait:?}");
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    in_state(&client, &id, TaskState::Blocked).await;

    // Tripped again, for a short time: then a probe goes out, and two successes close it.
    client.admin().trip_breaker(trip("a", 20)).await.expect("tripped");
    worker.complete_next("up").await;
    let second = enqueue(&client, task("a")).await;
    worker.complete_next("up").await;
    in_state(&client, &second, TaskState::Done).await;
    assert_eq!(breaker(&client, "a").await.state(), BreakerState::Closed);

    let moves = moves(&client, "a").await;
    let causes: Vec<_> = moves.iter().map(|event| event.cause.as_str()).collect();
    assert_eq!(causes, ["TRIPPED", "TRIPPED", "OPEN_ELAPSED", "PROBES_SUCCEEDED"]);
    assert_eq!((moves[0].actor.as_str(), moves[0].reason.as_str()), ("ada", "bad deploy"));
    assert!(moves[0].until.is_some() && moves[2].actor.is_empty());
    assert_eq!((moves[0].from(), moves[0].to()), (BreakerState::Closed, BreakerState::Open));
    let epochs: Vec<_> = moves.iter().map(|event| event.epoch).collect();
    assert_eq!(epochs, [1, 2, 3, 4]);
}

#[tokio::test]
async fn a_forced_state_holds_over_a_kill_and_ends_as_told() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", with(v1::BreakerSettings::default())).await;
    client.admin().force_breaker(force("a", BreakerState::ForcedOpen)).await.expect("forced");
    let id = enqueue(&client, task("a")).await;
    let worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    in_state(&client, &id, TaskState::Blocked).await;
    drop(worker);
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    let held = breaker(&client, "a").await;
    assert_eq!(held.state(), BreakerState::ForcedOpen);
    let order = held.order.expect("it says who");
    assert_eq!((order.actor.as_str(), order.reason.as_str()), ("ada", "we look into it"));
    assert!(order.until.is_none() && held.retry_after.is_none());

    // Ended by itself: the task goes on.
    let short = v1::ForceBreakerRequest { duration: ms(1_000), ..force("a", BreakerState::ForcedOpen) };
    let forced =
        client.admin().force_breaker(short).await.expect("forced").into_inner().breaker.expect("set");
    assert!(forced.order.expect("an order").until.is_some());
    let mut worker = Stream::open(&daemon, v1::Hello { incarnation: 2, ..hello("w", "a", 1) }).await;
    worker.complete_next("up").await;
    in_state(&client, &id, TaskState::Done).await;
    assert_eq!(causes(&client, "a").await, ["ORDERED", "ORDERED", "EXPIRED"]);
}

#[tokio::test]
async fn forced_closed_and_observing_breakers_never_hold_back() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", with(v1::BreakerSettings::default())).await;
    for state in [BreakerState::Disabled, BreakerState::Observe] {
        client.admin().force_breaker(force("a", state)).await.expect("forced");
        let id = enqueue(&client, task("a")).await;
        let mut worker = Stream::open(&daemon, hello(&format!("w{}", state as i32), "a", 1)).await;
        for _ in 0..12 {
            worker.fail_next("down").await;
        }
        worker.complete_next("up").await;
        in_state(&client, &id, TaskState::Done).await;
        assert_eq!(breaker(&client, "a").await.state(), state);
    }
    let request = v1::ListAgentEventsRequest { agent: "a".into(), ..Default::default() };
    let events = client.admin().list_agent_events(request).await.expect("listed").into_inner().events;
    let would = events.iter().filter(|event| event.event == "WOULD_OPEN").count();
    assert_eq!(would, 2, "twelve failures are two runs of five");
    client.admin().force_breaker(force("a", BreakerState::Closed)).await.expect("ended");
    assert_eq!(breaker(&client, "a").await.state(), BreakerState::Closed);
    assert_eq!(causes(&client, "a").await, ["ORDERED", "ORDERED", "AUTO"]);
}

#[tokio::test]
async fn half_of_a_window_failing_opens_it_without_a_run() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let window = v1::breaker_settings::Window::CountWindow(v1::CountWindow { size: 8, min_calls: 8 });
    configure(&client, "a", with(v1::BreakerSettings { window: Some(window), ..Default::default() })).await;
    for _ in 0..4 {
        enqueue(&client, task("a")).await;
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    for round in 0..3 {
        settle_next(&mut worker, fail("down")).await;
        settle_next(&mut worker, complete("up")).await;
        let seen = breaker(&client, "a").await;
        assert_eq!((seen.window_calls, seen.window_failures), (2 * (round + 1), round + 1));
    }
    settle_next(&mut worker, fail("down")).await;
    // The window is a row too: a kill loses none of it.
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    assert_eq!(breaker(&client, "a").await.window_calls, 7);
    let mut worker = Stream::open(&daemon, v1::Hello { incarnation: 2, ..hello("w", "a", 1) }).await;
    settle_next(&mut worker, fail("down")).await;
    let open = breaker(&client, "a").await;
    assert_eq!(open.state(), BreakerState::Open);
    assert_eq!((open.window_calls, causes(&client, "a").await), (0, vec!["FAILURE_RATE".to_owned()]));
}

#[tokio::test]
async fn slow_attempts_open_it_although_all_succeed() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let window =
        v1::breaker_settings::Window::TimeWindow(v1::TimeWindow { bucket: ms(60_000), min_calls: 3 });
    let breaker_settings =
        v1::BreakerSettings { window: Some(window), slow_after: ms(20), ..Default::default() };
    configure(&client, "a", with(breaker_settings)).await;
    for _ in 0..3 {
        enqueue(&client, task("a")).await;
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    for _ in 0..3 {
        let assignment = worker.assignment().await;
        worker.ack(lease(&assignment)).await;
        worker.receipt().await;
        // The attempt is as long as this: its length is what is measured.
        tokio::time::sleep(Duration::from_millis(30)).await;
        worker.settle(vec![outcome(lease(&assignment), complete("late"))]).await;
        assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    }
    assert_eq!(breaker(&client, "a").await.state(), BreakerState::Open);
    assert_eq!(causes(&client, "a").await, ["SLOW_RATE"]);
}

#[tokio::test]
async fn a_hint_opens_it_until_then_where_that_is_set() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let hinted = |message: &str| match fail(message) {
        v1::outcome::Outcome::Fail(given) => {
            v1::outcome::Outcome::Fail(v1::Fail { retry_after: ms(90_000), ..given })
        }
        other => other,
    };
    for (agent, opens) in [("plain", false), ("polite", true)] {
        let settings = v1::BreakerSettings { hint_opens: Some(opens), ..Default::default() };
        configure(&client, agent, with(settings)).await;
        enqueue(&client, task(agent)).await;
        let mut worker = Stream::open(&daemon, hello(agent, agent, 1)).await;
        settle_next(&mut worker, hinted("busy")).await;
        let seen = breaker(&client, agent).await;
        if opens {
            assert_eq!(seen.state(), BreakerState::Open);
            let wait = seen.retry_after.expect("it says when").seconds;
            assert!((80..=90).contains(&wait), "{wait} s");
            assert_eq!(causes(&client, agent).await, ["SERVER_HINT"]);
        } else {
            assert_eq!(seen.state(), BreakerState::Closed);
        }
    }
}

#[tokio::test]
async fn each_type_has_its_breaker_where_that_is_set() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let settings = v1::BreakerSettings { per_task_type: Some(true), ..Default::default() };
    configure(&client, "a", with(settings)).await;
    let bad = enqueue(&client, typed("a", "bad")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    for _ in 0..5 {
        worker.fail_next("down").await;
    }
    in_state(&client, &bad, TaskState::Blocked).await;
    assert_eq!(breaker_of(&client, "a", "bad").await.state(), BreakerState::Open);
    // Another type goes on beside it.
    let good = enqueue(&client, typed("a", "good")).await;
    worker.complete_next("up").await;
    in_state(&client, &good, TaskState::Done).await;
    assert_eq!(breaker_of(&client, "a", "good").await.state(), BreakerState::Closed);
    let listed = async |client: &Client| {
        let request = v1::ListBreakersRequest::default();
        let listed = client.admin().list_breakers(request).await.expect("listed").into_inner().breakers;
        listed.into_iter().map(|b| (b.task_type.clone(), b.state(), b.blocked)).collect::<Vec<_>>()
    };
    let before = listed(&client).await;
    assert!(before.contains(&("bad".into(), BreakerState::Open, 1)), "{before:?}");

    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    assert!(listed(&client).await.contains(&("bad".into(), BreakerState::Open, 1)));
    let agent = client.admin().get_agent(v1::GetAgentRequest { agent: "a".into() }).await.expect("there");
    assert_eq!(agent.into_inner().agent.expect("set").breaker_state(), BreakerState::Open);
    let reset = v1::ResetBreakerRequest { agent: "a".into(), task_type: "bad".into(), ..Default::default() };
    client.admin().reset_breaker(reset).await.expect("reset");
    let mut worker = Stream::open(&daemon, v1::Hello { incarnation: 2, ..hello("w", "a", 1) }).await;
    worker.complete_next("up").await;
    in_state(&client, &bad, TaskState::Done).await;
    let moves = moves(&client, "a").await;
    let told: Vec<_> = moves.iter().map(|m| (m.task_type.as_str(), m.cause.as_str())).collect();
    assert_eq!(told, [("bad", "FAILURE_RUN"), ("bad", "RESET")]);

    // One for all again: what a type's breaker holds back goes on.
    client
        .admin()
        .trip_breaker(v1::TripBreakerRequest { task_type: "bad".into(), ..trip("a", 60_000) })
        .await
        .expect("tripped");
    let held = enqueue(&client, typed("a", "bad")).await;
    in_state(&client, &held, TaskState::Blocked).await;
    let off = v1::BreakerSettings { per_task_type: Some(false), ..Default::default() };
    configure(&client, "a", v1::AgentSettings { breaker: Some(off), ..Default::default() }).await;
    worker.complete_next("up").await;
    in_state(&client, &held, TaskState::Done).await;
}

#[tokio::test]
async fn a_probe_that_is_out_while_breakers_become_per_type_does_not_keep_its_slot() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let per_type = |on| v1::BreakerSettings { per_task_type: Some(on), ..Default::default() };
    let one = v1::BreakerSettings { half_open_permits: Some(1), ..per_type(false) };
    configure(&client, "a", with(one)).await;
    client.admin().trip_breaker(trip("a", 20)).await.expect("tripped");
    let first = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    let probe = worker.assignment().await;
    assert_eq!(breaker(&client, "a").await.state(), BreakerState::HalfOpen);
    let switch = |on| v1::AgentSettings { breaker: Some(per_type(on)), ..Default::default() };
    configure(&client, "a", switch(true)).await;
    worker.settle(vec![outcome(lease(&probe), complete("up"))]).await;
    worker.outcome_receipt().await;
    in_state(&client, &first, TaskState::Done).await;

    // What it told decides nothing, and others may probe.
    configure(&client, "a", switch(false)).await;
    assert_eq!(breaker(&client, "a").await.state(), BreakerState::HalfOpen);
    for _ in 0..2 {
        enqueue(&client, task("a")).await;
        worker.complete_next("up").await;
    }
    assert_eq!(breaker(&client, "a").await.state(), BreakerState::Closed);
}

#[tokio::test]
async fn after_closing_few_run_at_first_and_a_kill_keeps_it_so() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let settings = v1::BreakerSettings { ramp_for: ms(600_000), ..Default::default() };
    configure(&client, "a", with(settings)).await;
    client.admin().trip_breaker(trip("a", 10)).await.expect("tripped");
    for _ in 0..22 {
        enqueue(&client, task("a")).await;
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 20)).await;
    for _ in 0..2 {
        worker.complete_next("up").await;
    }
    let ramping = eventually("it has closed", async || {
        let seen = breaker(&client, "a").await;
        (seen.state() == BreakerState::Closed).then_some(seen)
    })
    .await;
    assert!(ramping.ramp_until.is_some());
    assert!((0.1..0.15).contains(&ramping.ramp_share), "{}", ramping.ramp_share);
    // A tenth of the twenty that usually run, and no more however often one asks.
    let running = async |client: &Client| {
        let agent = client.admin().get_agent(v1::GetAgentRequest { agent: "a".into() }).await.expect("there");
        let counts = agent.into_inner().agent.expect("set").counts;
        counts.iter().find(|count| count.state() == TaskState::Running).map_or(0, |count| count.count)
    };
    eventually("some run", async || (running(&client).await > 0).then_some(())).await;
    for _ in 0..20 {
        client.admin().get_stats(v1::GetStatsRequest::default()).await.expect("stats");
        let run = running(&client).await;
        assert!(run <= 3, "{run} run of twenty");
    }
    drop(worker);
    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    let after = breaker(&client, "a").await;
    assert_eq!(after.ramp_until, ramping.ramp_until);
    let mut worker = Stream::open(&daemon, v1::Hello { incarnation: 2, ..hello("w", "a", 20) }).await;
    eventually("some run", async || (running(&client).await > 0).then_some(())).await;
    assert!(running(&client).await <= 3);
    // Without a ramp all that there is room for runs.
    let off = v1::BreakerSettings { ramp_for: ms(0), ..Default::default() };
    configure(&client, "a", v1::AgentSettings { breaker: Some(off), ..Default::default() }).await;
    for _ in 0..20 {
        worker.complete_next("up").await;
    }
}

#[tokio::test]
async fn orders_and_settings_that_make_no_sense_are_refused_by_name() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", with(v1::BreakerSettings::default())).await;
    let fields = |status: tonic::Status| -> Vec<String> {
        use tonic_types::StatusExt;
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
        let details = status.get_details_bad_request().expect("violations");
        details.field_violations.into_iter().map(|violation| violation.field).collect()
    };
    let no_reason = v1::TripBreakerRequest { reason: String::new(), ..trip("a", 5) };
    let refused = client.admin().trip_breaker(no_reason).await.expect_err("refused");
    assert_eq!(fields(refused), ["reason", "duration"]);
    let typed = v1::TripBreakerRequest { task_type: "t".into(), ..trip("a", 100) };
    assert_eq!(fields(client.admin().trip_breaker(typed).await.expect_err("refused")), ["task_type"]);
    let open = force("a", BreakerState::Open);
    assert_eq!(fields(client.admin().force_breaker(open).await.expect_err("refused")), ["state"]);
    let nobody = client.admin().trip_breaker(trip("nobody", 100)).await.expect_err("refused");
    assert_eq!(nobody.code(), tonic::Code::NotFound);

    let window = v1::breaker_settings::Window::CountWindow(v1::CountWindow { size: 4, min_calls: 9 });
    let bad = v1::BreakerSettings {
        window: Some(window),
        failure_rate: Some(0.0),
        open_multiplier: Some(f64::NAN),
        ramp_for: ms(700_000),
        ..Default::default()
    };
    let request = v1::ConfigureAgentRequest {
        agent: "a".into(),
        settings: Some(v1::AgentSettings { breaker: Some(bad), ..Default::default() }),
        ..Default::default()
    };
    let mut found = fields(client.admin().configure_agent(request).await.expect_err("refused"));
    found.sort();
    let expected =
        ["count_window.min_calls", "count_window.size", "failure_rate", "open_multiplier", "ramp_for"]
            .map(|field| format!("settings.breaker.{field}"));
    assert_eq!(found, expected);
    assert_eq!(breaker(&client, "a").await.epoch, 0, "nothing was done");
}
