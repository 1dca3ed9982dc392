//! Several daemons on one database: any takes any message, and none is missed when it goes.

mod balancer;

use crate::durability::load::{Load, Shape};
use crate::durability::nothing_is_missing;
use crate::postgres::Server;
use crate::support::worker::{Stream, complete, fail, hello, lease, outcome};
use crate::support::*;
use crate::watching::{all_is_told, lives_at};
use balancer::Balancer;
use ledgerd_client::v1::{self, LeaseState, TaskState};
use ledgerd_client::{CancellationToken, Client, Context, TaskError, Worker};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

/// Daemons on one database of their own; none where there is no server.
fn replicas(count: usize) -> Option<Vec<Daemon>> {
    let server = postgres::server()?;
    let folder = Folder::new();
    let store = postgres::database(&server, &folder);
    Some((0..count).map(|_| on(&store)).collect())
}

fn on(store: &str) -> Daemon {
    Daemon::start_with(Folder::new(), "127.0.0.1:0", &["--store", store])
}

/// A lost connection is found by the next beat, and these are quick.
fn short_leases() -> v1::AgentSettings {
    let mut settings = quick();
    settings.policy = settings.policy.map(|policy| v1::TaskPolicy { lease_duration: ms(3_000), ..policy });
    settings
}

#[tokio::test]
async fn a_task_is_assigned_by_one_held_through_another_and_settled_at_a_third() {
    let Some(daemons) = replicas(3) else { return };
    let [a, b, c] = &daemons[..] else { panic!("three were started") };
    configure(&a.client().await, "a", short_leases()).await;
    let mut first = Stream::open(a, hello("w", "a", 2)).await;
    let id = enqueue(&c.client().await, task("a")).await;
    let held = first.assignment().await;
    first.ack(lease(&held)).await;
    first.receipt().await;

    let again = v1::Hello { held: vec![lease(&held)], ..hello("w", "a", 2) };
    let mut second = Stream::open(b, again).await;
    assert_eq!(second.welcome.leases[0].state(), LeaseState::Extended);
    let ended = first.end().await;
    assert_eq!(reason(&ended), "SUPERSEDED", "{ended}");
    // For two leases the first daemon hears nothing of it: it is not its own to time any more.
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        second.beat(vec![lease(&held)]).await;
        assert_eq!(second.heartbeat_ack().await.leases[0].state(), LeaseState::Extended);
    }
    let request = v1::SettleTasksRequest {
        worker_id: "w".into(),
        outcomes: vec![outcome(lease(&held), complete("done"))],
    };
    let settled = c.client().await.workers().settle_tasks(request).await.expect("it is taken").into_inner();
    assert_eq!(settled.receipts[0].state(), TaskState::Done);
    assert_eq!(events(&a.client().await, &id).await, ["ENQUEUED", "ASSIGNED", "STARTED", "COMPLETED"]);
    // The daemon that serves the worker knows that it has room again, before any beat says so.
    let ids = [enqueue(&a.client().await, task("a")).await, enqueue(&b.client().await, task("a")).await];
    let mut given = [second.assignment().await.task_id, second.assignment().await.task_id];
    given.sort();
    let mut ids = ids;
    ids.sort();
    assert_eq!(given, ids);
}

#[tokio::test]
async fn what_a_worker_does_not_name_elsewhere_is_taken_back_from_it() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    configure(&a.client().await, "a", quick()).await;
    let mut first = Stream::open(a, hello("w", "a", 2)).await;
    let client = a.client().await;
    let ids = [enqueue(&client, task("a")).await, enqueue(&client, task("a")).await];
    let one = first.assignment().await;
    first.assignment().await;
    first.ack(lease(&one)).await;
    first.receipt().await;
    let kept = v1::Hello { held: vec![lease(&one)], capacity: 2, ..hello("w", "a", 2) };
    let mut second = Stream::open(b, kept).await;
    // Its lease would have had ten seconds left.
    let again = second.assignment().await;
    let other = if one.task_id == ids[0] { &ids[1] } else { &ids[0] };
    assert_eq!((&again.task_id, again.fence), (other, 2));
}

#[tokio::test]
async fn stops_and_answers_reach_the_worker_wherever_they_are_given() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    let (here, there) = (a.client().await, b.client().await);
    let mut worker = Stream::open(a, hello("w", "a", 1)).await;
    let (mut stops, mut answers) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        let id = enqueue(&here, task("a")).await;
        let held = worker.assignment().await;
        worker.ack(lease(&held)).await;
        worker.receipt().await;
        let block =
            v1::outcome::Outcome::Block(v1::Block { question: "which?".into(), ..v1::Block::default() });
        worker.settle(vec![outcome(lease(&held), block)]).await;
        assert_eq!(worker.outcome_receipt().await.state(), TaskState::Blocked);
        let told = Instant::now();
        let request = v1::UnblockTaskRequest {
            task_id: id.clone(),
            answer: "this".into(),
            actor: "ann".into(),
            request_id: String::new(),
        };
        there.tasks().unblock_task(request).await.expect("it waits for that");
        let held = worker.assignment().await;
        answers.push(told.elapsed());
        assert_eq!(held.answer, "this");
        worker.ack(lease(&held)).await;
        worker.receipt().await;
        let told = Instant::now();
        let request = v1::CancelTaskRequest { task_id: id.clone(), ..Default::default() };
        there.tasks().cancel_task(request).await.expect("it runs");
        let stop = worker.stop().await;
        stops.push(told.elapsed());
        assert_eq!(stop.lease.map(|lease| lease.task_id), Some(id.clone()));
        worker.settle(vec![outcome(lease(&held), v1::outcome::Outcome::Cancelled(v1::Cancelled {}))]).await;
        worker.outcome_receipt().await;
        in_state(&there, &id, TaskState::Cancelled).await;
    }
    stops.sort();
    answers.sort();
    eprintln!(
        "10 each: stop {:?} median, {:?} last; answer {:?}, {:?}",
        stops[5], stops[9], answers[5], answers[9]
    );
}

#[tokio::test]
async fn work_is_done_by_workers_of_another_daemon_at_once() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    let mut worker = Stream::open(b, hello("w", "a", 1)).await;
    let client = a.client().await;
    let mut took = Vec::new();
    for _ in 0..30 {
        let begun = Instant::now();
        let id = enqueue(&client, task("a")).await;
        let committed = begun.elapsed();
        let held = worker.assignment().await;
        took.push((begun.elapsed(), committed));
        assert_eq!(held.task_id, id);
        worker.settle(vec![outcome(lease(&held), complete("done"))]).await;
        assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    }
    took.sort();
    let ((half, committed), (last, _)) = (took[took.len() / 2], took[took.len() - 1]);
    eprintln!(
        "enqueue to start elsewhere: median {half:?} (the enqueue's own commit {committed:?}), last {last:?}"
    );
}

#[tokio::test]
async fn what_was_made_at_one_daemon_is_known_at_another_at_once() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    let (here, there) = (a.client().await, b.client().await);
    for n in 0..20 {
        let agent = format!("agent-{n}");
        let id = enqueue(&here, task(&agent)).await;
        let list = v1::ListTasksRequest { agent: agent.clone(), ..Default::default() };
        let listed = there.tasks().list_tasks(list).await.expect("it is known").into_inner().tasks;
        assert_eq!(listed.iter().map(|task| &task.task_id).collect::<Vec<_>>(), [&id]);
        let request = v1::CancelTaskRequest { task_id: id, ..Default::default() };
        let other = v1::CancelTaskRequest {
            task_id: enqueue(&here, task(&format!("b-{n}"))).await,
            ..Default::default()
        };
        there.tasks().cancel_task(other).await.expect("its agent is read with it");
        there.tasks().cancel_task(request).await.expect("it waits");
        enqueue(&there, task(&agent)).await;
    }
}

/// One of them is too late, and takes over what the other made.
#[tokio::test]
async fn an_agent_that_two_make_at_once_is_known_at_both() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    let (here, there) = (a.client().await, b.client().await);
    for n in 0..20 {
        let agent = format!("agent-{n}");
        let (one, two) = tokio::join!(enqueue(&here, task(&agent)), enqueue(&there, task(&agent)));
        for client in [&here, &there] {
            let list = v1::ListTasksRequest { agent: agent.clone(), ..Default::default() };
            let listed = client.tasks().list_tasks(list).await.expect("it is known").into_inner().tasks;
            let listed: BTreeSet<_> = listed.into_iter().map(|task| task.task_id).collect();
            assert_eq!(listed, [one.clone(), two.clone()].into(), "{agent}");
        }
    }
}

#[tokio::test]
async fn workers_are_seen_at_every_daemon_and_explain_knows_of_them() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    let (here, there) = (a.client().await, b.client().await);
    let labels = std::collections::BTreeMap::from([("zone".to_owned(), "north".to_owned())]);
    let worker = v1::Hello { task_types: vec!["test".into()], labels, ..hello("w", "a", 1) };
    let mut worker = Stream::open(a, worker).await;
    let list = || v1::ListWorkersRequest::default();
    let seen = there.admin().list_workers(list()).await.expect("it answers").into_inner().workers;
    assert_eq!(seen, here.admin().list_workers(list()).await.expect("it answers").into_inner().workers);
    assert_eq!(
        (seen[0].worker_id.as_str(), &seen[0].agents[..], seen[0].capacity),
        ("w", &["a".into()][..], 1)
    );
    let agent = |client: Client| async move {
        let request = v1::GetAgentRequest { agent: "a".into() };
        client.admin().get_agent(request).await.expect("it is known").into_inner().agent.expect("it is set")
    };
    assert_eq!(agent(there.clone()).await.sessions, 1);
    // Its only place is taken, and it says so with its next beat.
    let first = enqueue(&here, task("a")).await;
    let held = worker.assignment().await;
    assert_eq!(held.task_id, first);
    worker.ack(lease(&held)).await;
    worker.beat(vec![lease(&held)]).await;
    worker.heartbeat_ack().await;
    let second = enqueue(&there, task("a")).await;
    let request = v1::ExplainTaskRequest { task_id: second };
    let said = there.tasks().explain_task(request).await.expect("it is there").into_inner();
    let gates: Vec<_> = said.gates.iter().map(|gate| gate.kind()).collect();
    assert_eq!(gates, [v1::GateKind::NoRoom], "{said:?}");
}

#[tokio::test]
async fn a_policy_that_is_set_elsewhere_holds_for_what_runs_and_waits() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    let (here, there) = (a.client().await, b.client().await);
    let mut worker = Stream::open(a, hello("w", "a", 1)).await;
    let runs = enqueue(&here, task("a")).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    worker.receipt().await;
    let waits = enqueue(&here, task("a")).await;
    // Its daemon would have looked at it after a whole lease, a minute.
    let policy =
        v1::TaskPolicy { attempt_timeout: ms(1_000), queue_timeout: ms(1_000), ..Default::default() };
    configure(&there, "a", v1::AgentSettings { policy: Some(policy), ..Default::default() }).await;
    let stop = worker.stop().await;
    assert_eq!(
        (stop.lease.clone().map(|lease| lease.task_id), stop.stop_cause()),
        (Some(runs), v1::StopCause::Timeout)
    );
    assert_eq!(in_state(&here, &waits, TaskState::Failed).await.reason, "QUEUE_TIMEOUT");
}

#[tokio::test]
async fn polling_finds_what_hints_do_not_tell() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    let store = a.flags[1].clone();
    let (here, there) = (a.client().await, b.client().await);
    let mut worker = Stream::open(a, hello("w", "a", 1)).await;
    // Nobody hears anybody: whoever listens is cut off, again and again.
    let deaf = CancellationToken::new();
    let cuts = {
        let (deaf, store) = (deaf.clone(), store.clone());
        tokio::task::spawn_blocking(move || {
            let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                WHERE application_name = 'ledgerd hints' AND datname = current_database()";
            while !deaf.is_cancelled() {
                crate::postgres::ask(&store, cut);
            }
        })
    };
    for _ in 0..3 {
        let id = enqueue(&there, task("a")).await;
        let held = worker.assignment().await;
        worker.ack(lease(&held)).await;
        worker.receipt().await;
        let request = v1::CancelTaskRequest { task_id: id.clone(), ..Default::default() };
        there.tasks().cancel_task(request).await.expect("it runs");
        assert_eq!(worker.stop().await.lease.map(|lease| lease.task_id), Some(id.clone()));
        worker.settle(vec![outcome(lease(&held), v1::outcome::Outcome::Cancelled(v1::Cancelled {}))]).await;
        worker.outcome_receipt().await;
        in_state(&here, &id, TaskState::Cancelled).await;
    }
    deaf.cancel();
    cuts.await.expect("it runs");
}

#[tokio::test]
async fn what_a_budget_allows_is_divided_among_the_daemons_that_live() {
    let Some(mut daemons) = replicas(1) else { return };
    let store = daemons[0].flags[1].clone();
    let client = daemons[0].client().await;
    enqueue(&client, task("a")).await;
    let tokens = async |client: &Client| {
        let request = v1::GetAgentRequest { agent: "a".into() };
        let agent = client.admin().get_agent(request).await.ok()?.into_inner().agent?;
        Some(agent.budget_tokens)
    };
    assert_eq!(tokens(&client).await, Some(10.0), "all of it is one daemon's");
    daemons.push(on(&store));
    eventually("half of it is the first one's", async || (tokens(&client).await? == 5.0).then_some(())).await;
    // The second began with nothing: daemons that come mint no tokens.
    let second = daemons[1].client().await;
    let has = eventually("the second knows the agent", async || tokens(&second).await).await;
    assert!(has < 1.0, "{has}");
}

#[tokio::test]
async fn a_wait_ends_when_the_task_ends_at_another_daemon() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    let mut worker = Stream::open(b, hello("w", "a", 1)).await;
    let client = a.client().await;
    let id = enqueue(&client, task("a")).await;
    let held = worker.assignment().await;
    let request = v1::WaitTaskRequest { task_id: id, ..Default::default() };
    let mut tasks = client.tasks();
    let waits = tokio::spawn(async move { tasks.wait_task(request).await });
    worker.settle(vec![outcome(lease(&held), complete("done"))]).await;
    let ended = within("the wait ends", waits).await.expect("it runs").expect("it is answered").into_inner();
    assert_eq!(ended.task.map(|task| task.state()), Some(TaskState::Done));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_at_any_daemon_is_told_at_every_one_in_order() {
    let Some(daemons) = replicas(3) else { return };
    let mut watch = daemons[2].client().await.watch(v1::WatchTasksRequest::default());
    let first = within("the first message", watch.next()).await.expect("it begins");
    let id = enqueue(&daemons[0].client().await, task("b")).await;
    let enqueued = Instant::now();
    let told = loop {
        let message = within("a message", watch.next()).await.expect("it goes on");
        if let [event] = &message.events[..] {
            break event.clone();
        }
    };
    assert_eq!((&told.task_id, told.agent.as_str()), (&id, "b"));
    eprintln!("told at another daemon after {:?}", enqueued.elapsed());
    let transitions = lives_at(&daemons, 2_000).await;
    all_is_told(&daemons, first.resume_token, transitions).await;
}

#[tokio::test]
async fn settings_pauses_and_breakers_hold_over_all_daemons() {
    let Some(daemons) = replicas(3) else { return };
    let [a, b, c] = &daemons[..] else { panic!("three were started") };
    let (one, two) = (a.client().await, b.client().await);
    let breaker = v1::BreakerSettings {
        failure_threshold: Some(3),
        open_timeout: ms(1_500),
        half_open_permits: Some(2),
        success_threshold: Some(2),
        ..v1::BreakerSettings::default()
    };
    configure(&one, "a", v1::AgentSettings { breaker: Some(breaker), ..quick() }).await;
    let told = eventually("the other knows the settings", async || {
        let request = v1::GetAgentRequest { agent: "a".into() };
        two.admin().get_agent(request).await.ok()?.into_inner().agent
    })
    .await;
    assert_eq!(told.settings.and_then(|s| s.breaker).and_then(|b| b.failure_threshold), Some(3));

    // Three failures at three daemons are three in a row.
    let mut workers = Vec::new();
    for (at, daemon) in [a, b, c].into_iter().enumerate() {
        workers.push(Stream::open(daemon, hello(&format!("w{at}"), "a", 4)).await);
    }
    for worker in &mut workers {
        // Each has room for what the other two have not taken.
        enqueue(&one, v1::NewTask { policy: Some(no_retries()), ..task("a") }).await;
        let _ = worker;
    }
    let mut failed = 0;
    while failed < 3 {
        for worker in &mut workers {
            if let Some(held) = worker.assignment_now().await {
                worker.settle(vec![outcome(lease(&held), fail("no"))]).await;
                worker.outcome_receipt().await;
                failed += 1;
            }
        }
    }
    for daemon in [a, b, c] {
        let client = daemon.client().await;
        eventually("it is open everywhere", async || {
            (breaker_state(&client, "a").await == v1::BreakerState::Open).then_some(())
        })
        .await;
    }
    // Two permits over all daemons, whatever their number.
    for _ in 0..12 {
        enqueue(&two, v1::NewTask { policy: Some(no_retries()), ..task("a") }).await;
    }
    let mut probes = Vec::new();
    eventually("two probes are out", async || {
        for (at, worker) in workers.iter_mut().enumerate() {
            if let Some(held) = worker.assignment_now().await {
                worker.ack(lease(&held)).await;
                probes.push((at, held));
            }
        }
        (probes.len() >= 2).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    for worker in &mut workers {
        assert!(worker.assignment_now().await.is_none(), "a third probe is out");
    }
    for (at, held) in probes {
        workers[at].settle(vec![outcome(lease(&held), complete("well"))]).await;
    }
    let mut done = 2;
    eventually("all is done, for the breaker is closed everywhere", async || {
        for worker in &mut workers {
            while let Some(held) = worker.assignment_now().await {
                worker.settle(vec![outcome(lease(&held), complete("well"))]).await;
                done += 1;
            }
        }
        (done == 12).then_some(())
    })
    .await;

    // A pause at one is one at all.
    let pause = v1::PauseAgentRequest { agent: "a".into(), reason: "night".into(), ..Default::default() };
    two.admin().pause_agent(pause).await.expect("it is known");
    eventually("the pause is known", async || {
        let request = v1::GetAgentRequest { agent: "a".into() };
        one.admin().get_agent(request).await.ok()?.into_inner().agent?.pause
    })
    .await;
    enqueue(&one, task("a")).await;
    for worker in &mut workers {
        assert!(worker.assignment_now().await.is_none(), "nothing is handed out");
    }
}

fn no_retries() -> v1::TaskPolicy {
    v1::TaskPolicy { max_retries: Some(0), ..v1::TaskPolicy::default() }
}

async fn breaker_state(client: &ledgerd_client::Client, agent: &str) -> v1::BreakerState {
    let request = v1::GetBreakerRequest { agent: agent.into(), ..Default::default() };
    let found = client.admin().get_breaker(request).await.expect("the agent is known").into_inner();
    found.breaker.expect("it has one").state()
}

#[tokio::test]
async fn one_that_is_killed_has_an_heir() {
    let Some(mut daemons) = replicas(2) else { return };
    let (b, mut a) = (daemons.pop().expect("two"), daemons.pop().expect("two"));
    let client = b.client().await;
    configure(&client, "a", short_leases()).await;
    // It has a worker that dies with it, a task that waits for its time, and one that has to start in time.
    let mut worker = Stream::open(&a, hello("w", "a", 1)).await;
    let near = a.client().await;
    let lost = enqueue(&near, task("a")).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    worker.receipt().await;
    let policy = v1::TaskPolicy { queue_timeout: ms(4_000), ..v1::TaskPolicy::default() };
    let late = enqueue(&near, v1::NewTask { policy: Some(policy), ..task("nobody") }).await;
    let cancelled = v1::CancelTaskRequest { task_id: lost.clone(), ..Default::default() };
    a.kill();
    drop(worker);
    // Nobody serves the worker: the stop is kept, and its grace runs out at the heir's.
    client.tasks().cancel_task(cancelled).await.expect("it runs");
    let late = in_state(&client, &late, TaskState::Failed).await;
    assert_eq!(late.reason, "QUEUE_TIMEOUT");
    let lost = in_state(&client, &lost, TaskState::Cancelled).await;
    assert_eq!(lost.fence, held.fence, "{lost:?}");
}

#[tokio::test]
async fn one_that_stood_still_too_long_starts_over_and_overwrites_nothing() {
    let Some(daemons) = replicas(2) else { return };
    let [a, b] = &daemons[..] else { panic!("two were started") };
    let (near, far) = (a.client().await, b.client().await);
    configure(&near, "a", short_leases()).await;
    let mut worker = Stream::open(a, hello("w", "a", 1)).await;
    let id = enqueue(&near, task("a")).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    worker.receipt().await;
    a.signal("STOP");
    eventually("the other takes over", async || b.log().contains("takes over what it left").then_some(()))
        .await;
    let again = v1::Hello { held: vec![lease(&held)], ..hello("w", "a", 1) };
    let mut elsewhere = Stream::open(b, again).await;
    assert_eq!(elsewhere.welcome.leases[0].state(), LeaseState::Extended);
    a.signal("CONT");
    let ended = worker.end().await;
    assert_eq!(reason(&ended), "SUPERSEDED", "{ended}");
    elsewhere.settle(vec![outcome(lease(&held), complete("done"))]).await;
    assert_eq!(elsewhere.outcome_receipt().await.state(), TaskState::Done);
    // It serves again, under another number.
    let next = enqueue(&near, task("a")).await;
    assert_eq!(elsewhere.assignment().await.task_id, next);
    assert_eq!(events(&far, &id).await, ["ENQUEUED", "ASSIGNED", "STARTED", "COMPLETED"]);
}

#[tokio::test]
async fn a_client_that_knows_all_addresses_goes_to_one_that_is_there() {
    let Some(mut daemons) = replicas(2) else { return };
    let all = daemons.iter().map(|daemon| daemon.address.clone()).collect::<Vec<_>>().join(",");
    let handler = |payload: serde_json::Value, _: Context| async move { Ok::<_, TaskError>(payload) };
    let stop = CancellationToken::new();
    let client = Client::lazy(&all).expect("two addresses");
    let worker = Worker::builder(client.clone()).agents(["a"]).any(handler).build().expect("it is complete");
    let works = tokio::spawn(worker.run_until(stop.clone()));
    for payload in 0..4 {
        let task = client.enqueue("a", "echo", &payload).await.expect("one of them is there");
        let result: i32 =
            within("the result", task.result().timeout(PATIENCE).read()).await.expect("it is done");
        assert_eq!(result, payload);
        if payload == 1 {
            daemons[0].kill();
        }
        if payload == 2 {
            let address = daemons[0].address.clone();
            let (folder, flags) = (Arc::clone(&daemons[0].folder), daemons[0].flags.clone());
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            daemons[0] = Daemon::start_with(folder, &address, &flags);
            daemons[1].kill();
        }
    }
    stop.cancel();
    within("the worker ends", works).await.expect("no panic").expect("in good order");
}

/// Tasks of the race; `LEDGERD_RACE` says another number.
const RACE: usize = 20_000;

/// Daemons are killed, stopped past their lease and started again, the server is stopped and its sessions are ended, while
/// workers and producers go from one to the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_done_twice_while_daemons_and_the_server_come_and_go() {
    if postgres::server().is_none() {
        return;
    }
    let tasks = std::env::var("LEDGERD_RACE").ok().and_then(|n| n.parse().ok()).unwrap_or(RACE);
    let server = Server::start();
    let store = postgres::database(&server.url, &Folder::new());
    let mut daemons: Vec<Daemon> = (0..3).map(|_| on(&store)).collect();
    let addresses = |daemons: &[Daemon]| daemons.iter().map(|daemon| daemon.address.clone()).collect();
    let balancer = Balancer::before(addresses(&daemons)).await;
    configure(&daemons[0].client().await, "load", short_leases()).await;
    let shape = Shape { producers: 4, cancellers: 2, workers: 48, capacity: 8, tasks: Some(tasks) };
    let load = Load::start_as(&balancer.address, shape);
    let begun = Instant::now();
    let (mut faults, mut turn) = (std::collections::BTreeMap::<&str, u32>::new(), 0_usize);
    // Each part of the work has its fault, so that a slow machine makes as many.
    let parts = 12;
    for part in 1..=parts {
        let until = tasks * part / (parts + 1);
        eventually_long("the next part is enqueued", async || (load.enqueued() >= until).then_some(())).await;
        turn += 1;
        let victim = turn % 3;
        eprintln!("part {part}: {} tasks after {:?}", load.enqueued(), begun.elapsed());
        match part % 4 {
            0 => {
                *faults.entry("server stopped").or_default() += 1;
                server.control(&["-m", "immediate", "stop"]);
                server.control(&["start"]);
            }
            1 => {
                *faults.entry("daemon killed").or_default() += 1;
                daemons[victim].kill();
                daemons[victim] = on(&store);
                balancer.send_to(addresses(&daemons));
            }
            2 => {
                *faults.entry("sessions ended").or_default() += 1;
                let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ledgerd'";
                for _ in 0..5 {
                    crate::postgres::ask(&store, end);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            _ => {
                *faults.entry("daemon stood still").or_default() += 1;
                let others: Vec<String> = daemons
                    .iter()
                    .enumerate()
                    .filter(|(at, _)| *at != victim)
                    .map(|(_, daemon)| daemon.address.clone())
                    .collect();
                balancer.send_to(others);
                daemons[victim].signal("STOP");
                // Past its lease: somebody else takes over.
                tokio::time::sleep(Duration::from_secs(12)).await;
                daemons[victim].signal("CONT");
                balancer.send_to(addresses(&daemons));
            }
        }
    }
    let record = load.finish().await;
    eprintln!("all is done after {:?}", begun.elapsed());
    let found = nothing_is_missing(&daemons[0].client().await, &record).await;
    let doubled =
        "SELECT count(*) FROM (SELECT slot, seq FROM history GROUP BY slot, seq HAVING count(*) > 1) AS d";
    assert_eq!(crate::postgres::ask(&store, doubled), "0", "a number of a history row was used twice");
    let gaps = "SELECT count(*) FROM slots AS s WHERE last_seq <> (SELECT count(*) FROM history AS h WHERE h.slot = s.slot)";
    assert_eq!(crate::postgres::ask(&store, gaps), "0", "a history row is missing");
    let drift = "SELECT count(*) FROM (SELECT agent, state, sum(n) AS n FROM counts GROUP BY agent, state) AS c \
        FULL JOIN (SELECT s.agent, t.state, count(*) AS n FROM tasks AS t JOIN task_specs AS s USING (id) GROUP BY 1, 2) AS t \
        USING (agent, state) WHERE COALESCE(c.n, 0) <> COALESCE(t.n, 0)";
    assert_eq!(crate::postgres::ask(&store, drift), "0", "counts are not what is stored");
    eprintln!("{faults:?}; {found}: nothing is missing, nothing was done twice");
}

/// As [`eventually`], for as long as the whole of it may take.
async fn eventually_long<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(begun.elapsed() < Duration::from_secs(300), "{what}: it never came");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How many tasks are in a state; none: nobody answers.
async fn in_all(client: &Client, state: TaskState) -> Option<u64> {
    let stats = client.admin().get_stats(v1::GetStatsRequest {}).await.ok()?.into_inner();
    let found = stats.counts.iter().find(|count| count.state == i32::from(state));
    Some(found.map_or(0, |count| count.count))
}

/// Workers, and tasks that each runs at one time, while daemons are restarted in turn.
const ROLLED: (usize, u32) = (200, 10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_loses_nothing_and_keeps_nobody_waiting() {
    let Some(server) = postgres::server() else { return };
    let folder = Folder::new();
    let store = postgres::database(&server, &folder);
    let mut daemons: Vec<Daemon> = (0..3).map(|_| on(&store)).collect();
    let balancer = Balancer::before(daemons.iter().map(|daemon| daemon.address.clone()).collect()).await;
    let client = daemons[0].client().await;
    configure(&client, "a", quick()).await;
    let starts = Arc::new(Mutex::new(Vec::new()));
    let stop = CancellationToken::new();
    // None of the first is done before all workers are busy, however long that takes.
    let all_busy = CancellationToken::new();
    let mut running = Vec::new();
    for _ in 0..ROLLED.0 {
        let (starts, all_busy) = (Arc::clone(&starts), all_busy.clone());
        let handler = move |_: serde_json::Value, _: Context| {
            let (starts, all_busy) = (Arc::clone(&starts), all_busy.clone());
            async move {
                starts.lock().expect("nobody panics").push(Instant::now());
                all_busy.cancelled().await;
                tokio::time::sleep(Duration::from_secs(3)).await;
                Ok::<_, TaskError>(())
            }
        };
        let client = Client::lazy(&balancer.address).expect("an address");
        let worker = Worker::builder(client).agents(["a"]).capacity(ROLLED.1).any(handler);
        running.push(tokio::spawn(worker.build().expect("it is complete").run_until(stop.clone())));
    }
    let full = (ROLLED.0 * ROLLED.1 as usize) as u64;
    let producing = CancellationToken::new();
    let producer = {
        let (stop, client) = (producing.clone(), Client::lazy(&balancer.address).expect("an address"));
        tokio::spawn(async move {
            let mut call = 0;
            while !stop.is_cancelled() {
                // Enough for the workers, however slow the machine is.
                if in_all(&client, TaskState::Queued).await.is_some_and(|queued| queued >= full) {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
                let request = v1::EnqueueTasksRequest {
                    tasks: vec![task("a"); 250],
                    request_id: format!("call-{call}"),
                    ..v1::EnqueueTasksRequest::default()
                };
                // Repeated with its id until somebody answers.
                if client.tasks().enqueue_tasks(request).await.is_ok() {
                    call += 1;
                }
            }
            call * 250
        })
    };
    let runs = async || in_all(&client, TaskState::Running).await;
    eventually("all workers are busy", async || (runs().await? >= full * 9 / 10).then_some(())).await;
    all_busy.cancel();
    let begun = Instant::now();
    for daemon in &mut daemons {
        daemon.signal("TERM");
        assert_eq!(daemon.ended().await.code(), Some(0), "{}", daemon.log());
        let address = daemon.address.clone();
        *daemon = Daemon::start_with(Arc::clone(&daemon.folder), &address, &["--store", &store]);
        eventually("workers are busy again", async || (runs().await? >= full / 2).then_some(())).await;
    }
    let took = begun.elapsed();
    producing.cancel();
    let enqueued: usize = producer.await.expect("it runs");
    eventually_long("all is done", async || {
        (in_all(&client, TaskState::Done).await? as usize >= enqueued).then_some(())
    })
    .await;
    let ended = Instant::now();
    stop.cancel();
    for worker in running {
        worker.await.expect("no panic").expect("in good order");
    }
    let look = |sql: &str| crate::postgres::ask(&store, sql);
    let fates = look("SELECT state, count(*), count(losses) FROM tasks GROUP BY state");
    assert_eq!(fates, format!("5|{enqueued}|0"), "all done, none lost on the way");
    let twice = look(
        "SELECT count(*) FROM (SELECT 1 FROM history WHERE to_state = 5 GROUP BY task_id HAVING count(*) > 1) AS d",
    );
    assert_eq!(twice, "0", "an end was recorded twice");
    let mut starts = starts.lock().expect("nobody panics").clone();
    assert_eq!(starts.len(), enqueued, "each ran once");
    starts.retain(|at| *at >= begun && *at <= ended);
    starts.sort();
    let gap = starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
    eprintln!("three restarts in {took:?}, {enqueued} tasks, longest time without a start {gap:?}");
}
