//! What a restart of the daemon must not change: breakers, leases, and the time that workers were given.

use crate::support::worker::{Stream, complete, fail, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::{CancellationToken, Client, Context, TaskError, Worker, v1};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::Semaphore;
use v1::{BreakerState, TaskState};

async fn breaker(client: &Client, agent: &str) -> v1::Breaker {
    let request = v1::GetBreakerRequest { agent: agent.into(), ..Default::default() };
    client.admin().get_breaker(request).await.expect("there").into_inner().breaker.expect("set")
}

async fn trip(client: &Client, agent: &str, period_ms: i64) {
    let request = v1::TripBreakerRequest {
        agent: agent.into(),
        duration: ms(period_ms),
        actor: "ada".into(),
        reason: "for the test".into(),
        ..Default::default()
    };
    client.admin().trip_breaker(request).await.expect("tripped");
}

/// Enqueues for another agent for as long as it lives, so that each kill meets a daemon at work.
struct Noise(CancellationToken, Arc<AtomicU64>);

impl Noise {
    fn start(address: &str) -> Self {
        let (stop, done) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
        let (address, stopped, count) = (address.to_owned(), stop.clone(), Arc::clone(&done));
        tokio::spawn(stopped.run_until_cancelled_owned(async move {
            loop {
                if let Ok(client) = Client::connect(&address).await {
                    let request =
                        || v1::EnqueueTaskRequest { task: Some(task("noise")), ..Default::default() };
                    while client.tasks().enqueue_task(request()).await.is_ok() {
                        count.fetch_add(1, Relaxed);
                    }
                }
                tokio::task::yield_now().await;
            }
        }));
        Self(stop, done)
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Kills as often as `LEDGERD_KILLS` says (default 6), alternately while the breaker is OPEN and while it is HALF_OPEN with
/// a probe that runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_or_half_open_breaker_is_the_same_after_every_kill() {
    let kills: u64 = std::env::var("LEDGERD_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let settings = v1::BreakerSettings { open_timeout: ms(3_600_000), ..Default::default() };
    let policy = v1::TaskPolicy { max_retries: Some(1_000), ..quick().policy.unwrap_or_default() };
    let settings = v1::AgentSettings { breaker: Some(settings), policy: Some(policy), ..quick() };
    configure(&client, "a", settings).await;
    enqueue(&client, task("a")).await;
    let noise = Noise::start(&daemon.address);
    let (mut open, mut half_open) = (0, 0);
    let mut probe: Option<v1::Lease> = None;
    for kill in 1..=kills {
        let client = daemon.client().await;
        if let Some(held) = probe.take() {
            // The probe of before the kill is still this worker's, and its failure opens the breaker again.
            let resumed = v1::Hello { held: vec![held.clone()], ..hello("w", "a", 1) };
            let mut worker = Stream::open(&daemon, resumed).await;
            assert_eq!(worker.welcome.leases[0].state(), v1::LeaseState::Extended);
            worker.settle(vec![outcome(held, fail("still down"))]).await;
            assert_eq!(worker.outcome_receipt().await.state(), TaskState::Retry);
        }
        if kill % 2 == 0 {
            let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
            trip(&client, "a", 10).await;
            let assignment = worker.assignment().await;
            worker.ack(lease(&assignment)).await;
            worker.receipt().await;
            probe = Some(lease(&assignment));
        } else if breaker(&client, "a").await.state() != BreakerState::Open {
            trip(&client, "a", 3_600_000).await;
        }
        let before = breaker(&client, "a").await;
        let made = noise.1.load(Relaxed);
        eventually("the daemon is at work", async || (noise.1.load(Relaxed) > made).then_some(())).await;
        daemon = daemon.kill_and_restart();
        let after = breaker(&daemon.client().await, "a").await;
        let key = |b: &v1::Breaker| (b.state(), b.epoch, b.open_until, b.probes, b.reopens);
        assert_eq!(key(&after), key(&before), "kill {kill}");
        match after.state() {
            BreakerState::Open => open += 1,
            BreakerState::HalfOpen => half_open += 1,
            state => panic!("{state:?}"),
        }
    }
    eprintln!(
        "{kills} kills under load, {open} of them OPEN, {half_open} HALF_OPEN: state, epoch, end and probes kept in all; {} tasks were enqueued beside",
        noise.1.load(Relaxed)
    );
    assert_eq!((open, half_open), (kills.div_ceil(2), kills / 2));
}

/// A thousand tasks run on workers that live on while the daemon is gone for two leases.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_two_leases_loses_no_task_of_a_living_worker() {
    const LEASE: Duration = Duration::from_secs(5);
    const TASKS: usize = 1_000;
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let lease_duration = ms(LEASE.as_millis() as i64);
    let policy = v1::TaskPolicy { lease_duration, ..quick().policy.unwrap_or_default() };
    configure(&client, "a", v1::AgentSettings { policy: Some(policy), ..quick() }).await;
    let (started, go_on) = (Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
    let stop = CancellationToken::new();
    let workers: Vec<_> = (0..4)
        .map(|number| {
            let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
            let worker = Worker::builder(client.clone())
                .worker_id(format!("w{number}"))
                .agents(["a"])
                .capacity(TASKS as u32 / 4)
                .any(move |_: serde_json::Value, _: Context| {
                    let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
                    async move {
                        started.fetch_add(1, Relaxed);
                        go_on.acquire().await.expect("never closed").forget();
                        Ok::<_, TaskError>(())
                    }
                });
            tokio::spawn(worker.build().expect("it is complete").run_until(stop.clone()))
        })
        .collect();
    let items = (0..TASKS).map(|_| v1::NewTask { payload: b"null".to_vec().into(), ..task("a") }).collect();
    let request = v1::EnqueueTasksRequest { tasks: items, ..Default::default() };
    let answer = client.tasks().enqueue_tasks(request).await.expect("stored").into_inner();
    let ids: Vec<String> = answer.results.iter().map(|result| result.task_id.clone()).collect();
    eventually("all of them run", async || (started.load(Relaxed) as usize == TASKS).then_some(())).await;
    for id in &ids {
        eventually("it is recorded as started", async || {
            events(&client, id).await.contains(&"STARTED".to_owned()).then_some(())
        })
        .await;
    }

    let down = tokio::time::Instant::now();
    daemon.kill();
    // The outage is the experiment.
    tokio::time::sleep(LEASE * 2).await;
    let (folder, address) = (Arc::clone(&daemon.folder), daemon.address.clone());
    let daemon = Daemon::start_at(folder, &address);
    let outage = down.elapsed();
    let client = daemon.client().await;
    go_on.add_permits(TASKS);
    let mut rows = 0;
    for id in &ids {
        let task = in_state(&client, id, TaskState::Done).await;
        assert_eq!((task.losses, task.attempt, task.delivery), (0, 1, 1), "{id}");
        let events = events(&client, id).await;
        assert_eq!(events, ["ENQUEUED", "ASSIGNED", "STARTED", "COMPLETED"], "{id}");
        rows += events.len();
    }
    eprintln!(
        "an outage of {outage:?} with leases of {LEASE:?}: {TASKS} tasks, 0 losses, {rows} history rows"
    );
    assert_eq!(started.load(Relaxed) as usize, TASKS, "nothing ran twice");
    stop.cancel();
    for worker in workers {
        within("the worker ends", worker).await.expect("no panic").expect("in good order");
    }
}

/// The daemon's process is stopped for longer than a lease, as a debugger or a full machine would.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_stood_still_holds_that_against_nobody() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { lease_duration: ms(3_000), ..quick().policy.unwrap_or_default() };
    configure(&client, "a", v1::AgentSettings { policy: Some(policy), ..quick() }).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let held = worker.assignment().await;
    worker.ack(lease(&held)).await;
    worker.receipt().await;
    daemon.signal("STOP");
    // Longer than a lease, and than what it takes for a pause: this is what is tested.
    tokio::time::sleep(Duration::from_millis(5_500)).await;
    daemon.signal("CONT");
    worker.beat(vec![lease(&held)]).await;
    assert_eq!(worker.heartbeat_ack().await.leases[0].state(), v1::LeaseState::Extended);
    worker.settle(vec![outcome(lease(&held), complete("kept"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
    let done = get(&client, &id).await;
    assert_eq!((done.losses, done.delivery), (0, 1));
}

/// A retry that an agent's floor pays for takes a token like any other.
#[tokio::test]
async fn a_retry_out_of_an_empty_shared_budget_is_charged_to_its_agent() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let settings = budgeted(10.0, 0.25, 0.0);
    let slow = v1::TaskPolicy { base_delay: ms(3_600_000), max_delay: ms(3_600_000), ..Default::default() };
    // Ten tokens each of the hundred that all share, until ten retries wait: whatever comes in is theirs, they asked first.
    let mut waiting = 0;
    for number in 0.. {
        let agent = format!("greedy-{number}");
        configure(&client, &agent, v1::AgentSettings { policy: Some(slow), ..settings }).await;
        let mut worker = Stream::open(&daemon, hello(&agent, &agent, 10)).await;
        let mut held = Vec::new();
        for _ in 0..10 {
            enqueue(&client, task(&agent)).await;
            held.push(worker.assignment().await);
        }
        // Together, or what comes in meanwhile is for those that wait.
        worker.settle(held.iter().map(|held| outcome(lease(held), fail("down"))).collect()).await;
        for _ in held {
            waiting += u32::from(worker.outcome_receipt().await.reason == "BUDGET");
        }
        if waiting >= 10 {
            break;
        }
    }
    let id = enqueue(&client, task("poor")).await;
    let mut poor = Stream::open(&daemon, hello("p", "poor", 1)).await;
    let held = poor.assignment().await;
    // Its floor is counted from here.
    configure(&client, "poor", settings).await;
    poor.settle(vec![outcome(lease(&held), fail("down"))]).await;
    let receipt = poor.outcome_receipt().await;
    let tokens = async || {
        let agent =
            client.admin().get_agent(v1::GetAgentRequest { agent: "poor".into() }).await.expect("there");
        agent.into_inner().agent.expect("set").budget_tokens
    };
    assert_eq!((receipt.reason.as_str(), tokens().await), ("BUDGET", 10.0), "its own bucket is full");
    // Four seconds make a token of its floor.
    let again = poor.assignment().await;
    assert_eq!((again.task_id.as_str(), again.attempt), (id.as_str(), 2));
    let left = tokens().await;
    assert!(left < 9.7, "{left} tokens are left");
}
