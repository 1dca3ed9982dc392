//! The loop on a real store behind a gate: what is said when, and what a failed commit does.

mod beats;
mod clocks;
mod failures;
mod lost;

use super::command::{
    BatchMode, BreakerOrder, Enqueued, FromWorker, LedgerError, NewTask, Opened, Settlement, ToWorker,
};
use super::memory::Memory;
use super::{Fatal, Handle, decide, start};
use crate::clock::Clock;
use crate::store::{Committed, DynStore, Options, open};
use ledger_core::explain::GateKind;
use ledger_core::session::Hello;
use ledger_core::store::{
    Ask, BreakerRow, Changes, Fut, Known, News, Piece, Recovered, Store, StoreError, TaskData, Want,
};
use ledger_core::{
    AgentId, AgentOverrides, EventKind, Now, Outcome, Overrides, Record, State, Task, TaskId, Timestamp,
};
use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Holds commits until they are let through, and makes them fail on demand.
#[derive(Default)]
struct Gate {
    reached: Notify,
    pass: Option<Semaphore>,
    failures: Mutex<VecDeque<StoreError>>,
    /// Holds what the loop hears of commits.
    heard: Option<Semaphore>,
    /// So many writes are overtaken by somebody else.
    overtakes: AtomicU32,
    /// So often the store goes away while a start reads.
    interruptions: AtomicU32,
    /// What lives is found one by one.
    one_by_one: AtomicBool,
    /// What another daemon did.
    news: Mutex<Option<News>>,
    /// There is no room for new tasks.
    is_short: AtomicBool,
    /// How often all was read.
    recoveries: AtomicU32,
    side_by_side: usize,
    /// Rows of tasks in each batch, the open one last.
    rows: Mutex<Vec<usize>>,
}

struct GatedStore {
    inner: DynStore,
    gate: Arc<Gate>,
    /// What was handed over: to the store, or nowhere, for it fails.
    submitted: VecDeque<Result<(), StoreError>>,
    let_through: bool,
}

impl Store for GatedStore {
    type Proof = Committed;

    fn recover(&mut self, now: Now) -> Fut<'_, Recovered> {
        self.submitted.clear();
        self.let_through = false;
        self.gate.recoveries.fetch_add(1, Relaxed);
        self.inner.recover(now)
    }
    fn timed<'a>(&'a mut self, queues: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece> {
        let left = |left: u32| left.checked_sub(1);
        if self.gate.interruptions.fetch_update(Relaxed, Relaxed, left).is_ok() {
            return Box::pin(async { Err(StoreError::Unavailable("it was restarted".into())) });
        }
        self.inner.timed(queues, from)
    }
    fn ids(&mut self, n: usize) -> Fut<'_, u64> {
        self.inner.ids(n)
    }
    fn begin<'a>(&'a mut self, want: &'a Want, now: Now) -> Fut<'a, Known> {
        self.inner.begin(want, now)
    }
    fn settled<'a>(&'a mut self, leases: &'a [(TaskId, u64)]) -> Fut<'a, Vec<Option<Record>>> {
        self.inner.settled(leases)
    }
    fn offer<'a>(&'a mut self, asks: &'a [Ask], now: Now) -> Fut<'a, Vec<Vec<Arc<Task>>>> {
        self.inner.offer(asks, now)
    }
    fn gated(&mut self, agent: AgentId) -> Fut<'_, Vec<Arc<Task>>> {
        self.inner.gated(agent)
    }
    fn ahead<'a>(
        &'a mut self,
        task: &'a Task,
        types: Option<&'a [Arc<str>]>,
        most: usize,
        now: Now,
    ) -> Fut<'a, usize> {
        self.inner.ahead(task, types, most, now)
    }
    fn live<'a>(&'a mut self, agents: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece> {
        Box::pin(async move {
            let (mut live, rest) = self.inner.live(agents, from).await?;
            if !self.gate.one_by_one.load(Relaxed) {
                return Ok((live, rest));
            }
            live.sort_unstable_by_key(|task| task.id);
            let rest = live.get(1).map(|task| task.id);
            live.truncate(1);
            Ok((live, rest))
        })
    }
    fn oldest(&mut self, now: Now) -> Fut<'_, Vec<(AgentId, Timestamp)>> {
        self.inner.oldest(now)
    }
    fn write(&mut self, changes: Changes) -> Fut<'_, Vec<TaskId>> {
        let overtaken = |left: u32| left.checked_sub(1);
        if let Some(first) = changes.tasks.first().map(|changed| changed.task.id)
            && self.gate.overtakes.fetch_update(Relaxed, Relaxed, overtaken).is_ok()
        {
            return Box::pin(async move { Ok(vec![first]) });
        }
        if let Some(rows) = self.gate.rows.lock().expect("nobody panicked").last_mut() {
            *rows += changes.tasks.len();
        }
        self.inner.write(changes)
    }
    fn side_by_side(&self) -> usize {
        self.gate.side_by_side
    }
    fn is_short(&self) -> bool {
        self.gate.is_short.load(Relaxed)
    }
    fn submit(&mut self) -> Fut<'_, ()> {
        self.gate.rows.lock().expect("nobody panicked").push(0);
        Box::pin(async {
            self.gate.reached.notify_one();
            if let Some(pass) = &self.gate.pass {
                pass.acquire().await.expect("the gate is not closed for good").forget();
            }
            let mut failure = self.gate.failures.lock().expect("nobody panicked").pop_front();
            if self.submitted.iter().any(Result::is_err) {
                // Nothing is written after a batch that failed.
                failure = Some(StoreError::Unavailable("an earlier batch failed".into()));
            }
            let submitted = match failure {
                Some(error) => Err(error),
                None => self.inner.submit().await,
            };
            self.submitted.push_back(submitted);
            Ok(())
        })
    }
    fn durable(&mut self) -> Fut<'_, Committed> {
        Box::pin(async {
            if let Some(heard) = self.gate.heard.as_ref().filter(|_| !self.let_through) {
                heard.acquire().await.expect("the gate is not closed for good").forget();
                self.let_through = true;
            }
            let submitted = self.submitted.front().cloned().expect("a batch was handed over");
            let durable = match submitted {
                Ok(()) => self.inner.durable().await,
                Err(error) => Err(error),
            };
            self.submitted.pop_front();
            self.let_through = false;
            durable
        })
    }
    fn next_due(&self, now: Now) -> Option<Timestamp> {
        self.inner.next_due(now)
    }
    fn has_news(&self, _: Now, _: bool) -> bool {
        self.gate.news.lock().expect("nobody panicked").is_some()
    }
    fn news<'a>(&'a mut self, _: &'a [TaskId], _: bool, _: Now) -> Fut<'a, News> {
        let news = self.gate.news.lock().expect("nobody panicked").take();
        Box::pin(std::future::ready(Ok(news.unwrap_or_default())))
    }
}

struct Fixture {
    handle: Handle,
    ended: JoinHandle<Result<(), Fatal>>,
    gate: Arc<Gate>,
    stop: CancellationToken,
    folder: PathBuf,
}

impl Fixture {
    async fn new(name: &str, held: bool) -> Self {
        Self::behind(name, Gate { pass: held.then(|| Semaphore::new(0)), ..Gate::default() }).await
    }

    async fn behind(name: &str, gate: Gate) -> Self {
        let folder = std::env::temp_dir().join(format!("ledgerd-loop-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
        Self::on(folder, Arc::new(gate), Clock::start()).await
    }

    async fn on(folder: PathBuf, gate: Arc<Gate>, clock: Clock) -> Self {
        let (store, reader) = open(&folder, Options::default()).await.expect("a store opens");
        let (submitted, let_through) = (VecDeque::new(), false);
        let store =
            Box::new(GatedStore { inner: Box::new(store), gate: Arc::clone(&gate), submitted, let_through });
        let stop = CancellationToken::new();
        let (handle, ended) = start(store, reader, clock, Arc::default(), None, Arc::default(), stop.clone())
            .await
            .expect("it starts");
        Self { handle, ended, gate, stop, folder }
    }

    /// Ends it, and starts it anew by this clock.
    async fn again(&mut self, clock: Clock) {
        self.stop.cancel();
        within(&mut self.ended).await.expect("no panic").expect("an orderly end");
        let folder = std::mem::take(&mut self.folder);
        *self = Self::on(folder, Arc::clone(&self.gate), clock).await;
    }

    /// With a loop that hears of no commit until it is let.
    async fn unheard(name: &str) -> Self {
        Self::behind(name, Gate { heard: Some(Semaphore::new(0)), ..Gate::default() }).await
    }

    /// Lets the loop hear of so many commits.
    fn hear(&self, commits: usize) {
        self.gate.heard.as_ref().expect("this fixture holds what is heard").add_permits(commits);
    }

    /// Enqueues so many tasks in one call that its batch may be followed by another before it is durable. Returns when it is
    /// handed over.
    async fn hand_over_many(&self, agent: &'static str) -> JoinHandle<Result<Vec<Enqueued>, LedgerError>> {
        let handle = self.handle.clone();
        let many = std::iter::repeat_with(move || task(agent)).take(300).collect();
        let call = tokio::spawn(async move { handle.enqueue(many, BatchMode::Atomic, None).await });
        within(self.gate.reached.notified()).await;
        call
    }

    fn fail_next(&self, errors: impl IntoIterator<Item = StoreError>) {
        self.gate.failures.lock().expect("nobody panicked").extend(errors);
    }

    /// Lets one commit through.
    fn pass(&self) {
        self.gate.pass.as_ref().expect("this fixture holds commits").add_permits(1);
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn task(agent: &str) -> Result<NewTask, LedgerError> {
    Ok(NewTask {
        agent: agent.into(),
        task_type: "t".into(),
        priority: 5,
        run_at: None,
        deadline: None,
        policy: Overrides::NONE,
        frees_key: false,
        data: Arc::new(TaskData::default()),
    })
}

fn hello() -> Hello {
    Hello {
        worker: "w".into(),
        incarnation: 1,
        agents: vec!["a".into()],
        types: None,
        capacity: 1,
        labels: Vec::new(),
        sdk: String::new(),
        held: Vec::new(),
        unreceipted: Vec::new(),
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it happens within 20 s")
}

async fn next(opened: &mut Opened) -> ToWorker {
    within(opened.outbox.recv()).await.expect("the session is open")
}

#[tokio::test]
async fn nothing_is_said_before_the_commit_that_it_reports() {
    let fixture = Fixture::new("held", true).await;
    let handle = fixture.handle.clone();
    let opening = tokio::spawn(async move { handle.hello(hello()).await });
    within(fixture.gate.reached.notified()).await;
    assert!(!opening.is_finished(), "Welcome was sent before its commit");
    fixture.pass();
    let mut opened = within(opening).await.expect("no panic").expect("welcome");

    let handle = fixture.handle.clone();
    let enqueuing =
        tokio::spawn(async move { handle.enqueue(vec![task("a")], BatchMode::Atomic, None).await });
    within(fixture.gate.reached.notified()).await;
    // Everything is decided, the claim for the idle worker included, and waits for the disk.
    assert!(!enqueuing.is_finished() && opened.outbox.is_empty(), "reply or assignment before the commit");
    let found = fixture.handle.reader().task(TaskId(1), false).await.expect("readable");
    assert_eq!(found, None, "a reader sees what is not committed");
    fixture.pass();
    let answer = within(enqueuing).await.expect("no panic").expect("stored");
    assert!(matches!(answer[..], [Enqueued::Created(TaskId(1))]));
    let ToWorker::Assignments(assigned) = next(&mut opened).await else {
        panic!("an assignment comes first")
    };

    let settlement = Settlement {
        task: assigned[0].task,
        fence: assigned[0].fence,
        outcome: Outcome::Complete,
        result: None,
        checkpoint: None,
        follow_ups: Vec::new(),
        digest: 1,
    };
    fixture.handle.frame(opened.session, FromWorker::Outcomes(vec![settlement])).await.expect("taken");
    within(fixture.gate.reached.notified()).await;
    assert!(opened.outbox.is_empty(), "a receipt before its commit");
    fixture.pass();
    let ToWorker::Receipts(receipts) = next(&mut opened).await else { panic!("a receipt comes") };
    assert_eq!(receipts[0].result.as_ref().map(|recorded| recorded.state).ok(), Some(State::Done));
}

#[tokio::test]
async fn a_large_batch_is_decided_while_another_is_on_its_way_and_said_after_it() {
    let fixture = Fixture::unheard("underway").await;
    let first = fixture.hand_over_many("first").await;
    let second = fixture.hand_over_many("second").await;
    assert!(!first.is_finished() && !second.is_finished(), "an answer before it is known to be durable");
    fixture.hear(1);
    let ids = |stored: Result<Vec<Enqueued>, LedgerError>| match stored.expect("stored")[..] {
        [Enqueued::Created(first), .., Enqueued::Created(last)] => (first, last),
        ref other => panic!("{other:?}"),
    };
    assert_eq!(ids(within(first).await.expect("no panic")), (TaskId(1), TaskId(300)));
    assert!(!second.is_finished(), "an answer before it is known to be durable");
    fixture.hear(1);
    assert_eq!(ids(within(second).await.expect("no panic")), (TaskId(301), TaskId(600)));
}

#[tokio::test]
async fn batches_are_of_like_size_where_they_are_written_side_by_side_and_large_elsewhere() {
    for (side_by_side, batches) in
        [(2, [300, 1_500, 900, 0]), (3, [300, 900, 900, 600]), (1, [300, 2_400, 0, 0])]
    {
        let gate = Gate {
            pass: Some(Semaphore::new(0)),
            side_by_side,
            rows: Mutex::new(vec![0]),
            ..Gate::default()
        };
        let fixture = Fixture::behind(&format!("side-by-side-{side_by_side}"), gate).await;
        let mut calls = vec![fixture.hand_over_many("a").await];
        for waiting in 1..=8 {
            let (handle, many) = (fixture.handle.clone(), (0..300).map(|_| task("a")).collect());
            calls.push(tokio::spawn(async move { handle.enqueue(many, BatchMode::Atomic, None).await }));
            let lane = &fixture.handle.calls;
            while lane.max_capacity() - lane.capacity() < waiting {
                tokio::task::yield_now().await;
            }
        }
        (0..9).for_each(|_| fixture.pass());
        for call in calls {
            assert_eq!(within(call).await.expect("no panic").expect("stored").len(), 300);
        }
        let mut rows = fixture.gate.rows.lock().expect("nobody panicked").clone();
        rows.resize(4, 0);
        assert_eq!(rows, batches, "{side_by_side}");
    }
}

/// Each look at the two clocks finds them a millisecond nearer or farther.
#[test]
fn a_clock_that_was_set_once_is_not_set_at_every_look() {
    let look = |skew| Now { at: Timestamp::from_millis(1_000_000), skew };
    let mut memory = Memory::new(look(0));
    for (skew, was_set) in [(0, false), (3_600_000, true), (3_600_001, false), (3_599_999, false), (0, true)]
    {
        assert_eq!(decide::clock_was_set(&memory, look(skew)), was_set, "{skew}");
        memory.skew = skew;
    }
}

#[tokio::test]
async fn a_caller_that_leaves_undoes_nothing() {
    let fixture = Fixture::new("left", true).await;
    let handle = fixture.handle.clone();
    let call = tokio::spawn(async move { handle.enqueue(vec![task("a")], BatchMode::Atomic, None).await });
    within(fixture.gate.reached.notified()).await;
    call.abort();
    for _ in 0..4 {
        fixture.pass();
    }
    let stats = within(fixture.handle.stats()).await.expect("it goes on");
    assert_eq!(stats.counts[usize::from(State::Queued.code())], 1);
}

#[tokio::test]
async fn a_start_that_the_store_interrupts_begins_anew() {
    let gate = Gate { interruptions: AtomicU32::new(2), ..Gate::default() };
    let fixture = Fixture::behind("interrupted", gate).await;
    assert_eq!(fixture.gate.interruptions.load(Relaxed), 0);
    let stored = within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await;
    assert!(stored.is_ok_and(|items| matches!(items[..], [Enqueued::Created(_)])));
}

#[tokio::test]
async fn times_that_are_changed_reach_every_task_though_nobody_says_anything_more() {
    let fixture = Fixture::new("walk", false).await;
    fixture.gate.one_by_one.store(true, Relaxed);
    let stored =
        within(fixture.handle.enqueue((0..5).map(|_| task("a")).collect(), BatchMode::Atomic, None)).await;
    assert_eq!(stored.expect("stored").len(), 5);
    let policy = Overrides { queue_timeout: Some(Duration::from_secs(1)), ..Overrides::NONE };
    let change = AgentOverrides { policy, ..AgentOverrides::default() };
    within(fixture.handle.configure("a".into(), change, "test".into(), "".into()))
        .await
        .expect("it is known");
    for id in 1..=5 {
        within(fixture.handle.wait(TaskId(id), Duration::from_secs(20))).await.expect("it ends");
        let found = fixture.handle.reader().task(TaskId(id), false).await.expect("readable");
        assert_eq!(found.map(|found| found.task.state), Some(State::Failed), "{id}");
    }
}

#[tokio::test]
async fn what_becomes_due_while_a_batch_is_handed_over_is_not_missed() {
    let fixture = Fixture::new("due", true).await;
    let handle = fixture.handle.clone();
    let opening = tokio::spawn(async move { handle.hello(hello()).await });
    fixture.pass();
    let mut opened = within(opening).await.expect("no panic").expect("welcome");
    within(fixture.gate.reached.notified()).await;
    let clock = fixture.handle.clock();
    let due = clock.now().at.after(Duration::from_secs(1));
    let soon = task("a").map(|task| NewTask { run_at: Some(due), ..task });
    let handle = fixture.handle.clone();
    let enqueuing = tokio::spawn(async move { handle.enqueue(vec![soon], BatchMode::Atomic, None).await });
    within(fixture.gate.reached.notified()).await;
    assert!(clock.now().at < due, "it was decided before its time");
    within(tokio::time::sleep_until(clock.instant(due.after(Duration::from_millis(5))))).await;
    fixture.pass();
    within(enqueuing).await.expect("no panic").expect("stored");
    // Nobody says anything more.
    fixture.pass();
    assert!(matches!(next(&mut opened).await, ToWorker::Assignments(tasks) if tasks.len() == 1));
}

#[tokio::test]
async fn a_command_that_is_overtaken_is_decided_anew_and_not_for_ever() {
    let fixture = Fixture::new("overtaken", false).await;
    fixture.gate.overtakes.store(5, Relaxed);
    let stored = within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await;
    assert!(stored.is_ok_and(|items| matches!(items[..], [Enqueued::Created(_)])));
    fixture.gate.overtakes.store(1_000, Relaxed);
    let lost = within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await;
    assert!(matches!(lost, Err(LedgerError::Store(StoreError::Overtaken(_)))), "{lost:?}");
    fixture.gate.overtakes.store(0, Relaxed);
    let stats = within(fixture.handle.stats()).await.expect("it goes on");
    assert_eq!(stats.counts[usize::from(State::Queued.code())], 1);
}

#[tokio::test]
async fn news_of_a_closed_breaker_is_acted_on_after_a_conflict_too() {
    let fixture = Fixture::new("news", false).await;
    let handle = &fixture.handle;
    let _opened = within(handle.hello(hello())).await.expect("welcome");
    let force = BreakerOrder::ForceOpen(None);
    within(handle.order_breaker("a".into(), "".into(), force, "ann".into(), "".into()))
        .await
        .expect("it is known");
    within(handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await.expect("stored");
    let kinds = async || {
        let rows = handle.reader().history(TaskId(1)).await.expect("readable").expect("it is there");
        rows.iter().map(|row| row.record.kind).collect::<Vec<_>>()
    };
    assert_eq!(kinds().await, [EventKind::Enqueued, EventKind::Gated]);
    // Another daemon closes it, and this one is overtaken while it lets the task go.
    let closed = breaker_core::Breaker::new(breaker_core::Config::default()).expect("the default is valid");
    let row =
        BreakerRow { agent: AgentId(1), task_type: "".into(), snapshot: closed.snapshot(), last_probe: None };
    let news = News { breakers: vec![row], ..News::default() };
    *fixture.gate.news.lock().expect("nobody panicked") = Some(news);
    fixture.gate.overtakes.store(1, Relaxed);
    within(handle.flush()).await.expect("it commits");
    assert!(kinds().await.contains(&EventKind::Ungated), "{:?}", kinds().await);
}

#[tokio::test]
async fn a_ledger_that_drains_says_so() {
    let fixture = Fixture::new("drains", false).await;
    within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await.expect("stored");
    within(fixture.handle.drain(Duration::from_secs(1))).await.expect("it drains");
    let said = within(fixture.handle.explain(TaskId(1))).await.expect("it is explained");
    let kinds: Vec<_> = said.gates.iter().map(|gate| gate.kind).collect();
    assert_eq!(kinds, [GateKind::NoWorker, GateKind::Draining]);
    let unknown = within(fixture.handle.explain(TaskId(2))).await;
    assert!(matches!(unknown, Err(LedgerError::UnknownTask(TaskId(2)))), "{unknown:?}");
}

async fn state(fixture: &Fixture, id: TaskId) -> State {
    let found = fixture.handle.reader().task(id, false).await.expect("readable");
    found.expect("the task is stored").task.state
}

#[tokio::test]
async fn tasks_of_one_call_share_no_more_than_they_have_in_common() {
    let fixture = Fixture::new("alike", false).await;
    let patient = Overrides { max_retries: Some(9), ..Overrides::NONE };
    let said = [
        ("a", "t", Overrides::NONE, false),
        ("a", "t", patient, false),
        ("a", "t", patient, false),
        ("a", "u", patient, false),
        ("b", "u", patient, false),
        ("b", "u", patient, true),
        ("a", "t", Overrides::NONE, false),
    ];
    let tasks = said.map(|(agent, task_type, policy, frees_key)| {
        Ok(NewTask { task_type: task_type.into(), policy, frees_key, ..task(agent).expect("a task") })
    });
    fixture.handle.enqueue(tasks.into(), BatchMode::Atomic, None).await.expect("stored");
    for (id, (agent, task_type, policy, frees_key)) in (1..).zip(said) {
        let found = fixture.handle.reader().task(TaskId(id), false).await.expect("readable");
        let spec = &found.expect("the task is stored").task.spec;
        assert_eq!(Some(spec.agent), fixture.handle.agent_id(agent).await, "{id}");
        assert_eq!((&*spec.task_type, spec.policy, spec.frees_key), (task_type, policy, frees_key), "{id}");
    }
}

/// Makes the ledger look at its clock, as any call does, until the task is in this state.
async fn reaches(fixture: &Fixture, id: TaskId, wanted: State) {
    within(async {
        while state(fixture, id).await != wanted {
            fixture.handle.flush().await.expect("it goes on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_frame_that_acks_nothing_says_nothing_of_a_worker() {
    let fixture = Fixture::new("silent", false).await;
    let handle = &fixture.handle;
    let policy = Overrides { ack_timeout: Some(Duration::from_secs(1)), ..Overrides::NONE };
    let tasks = (0..3).map(|_| task("a").map(|task| NewTask { policy, ..task })).collect();
    handle.enqueue(tasks, BatchMode::Atomic, None).await.expect("stored");
    let mut opened = handle.hello(Hello { capacity: 9, ..hello() }).await.expect("welcome");
    assert!(matches!(next(&mut opened).await, ToWorker::Assignments(tasks) if tasks.len() == 3));
    let is_silent = async || {
        let found = handle.explain(TaskId(1)).await.expect("known");
        found.gates.iter().any(|gate| gate.detail.contains("unacknowledged"))
    };
    within(async {
        while !is_silent().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    for nothing in [FromWorker::Acks(Vec::new()), FromWorker::Outcomes(Vec::new())] {
        handle.frame(opened.session, nothing).await.expect("taken");
        handle.flush().await.expect("it goes on");
        assert!(is_silent().await);
    }
    handle.frame(opened.session, FromWorker::Acks(vec![(TaskId(1), 1)])).await.expect("taken");
    assert!(matches!(next(&mut opened).await, ToWorker::Assignments(_) | ToWorker::Receipts(_)));
    assert!(!is_silent().await);
}

#[tokio::test]
async fn workers_that_are_long_gone_are_forgotten_and_no_others() {
    let fixture = Fixture::new("forget", false).await;
    let handle = &fixture.handle;
    handle.enqueue(vec![task("a")], BatchMode::Atomic, None).await.expect("stored");
    let mut open = Vec::new();
    for worker in ["gone", "holds", "here"] {
        let hello = Hello { worker: worker.into(), agents: vec!["b".into()], ..hello() };
        let hello = if worker == "holds" { Hello { agents: vec!["a".into()], ..hello } } else { hello };
        let opened = handle.hello(hello).await.expect("welcome");
        if worker == "holds" {
            handle.frame(opened.session, FromWorker::Acks(vec![(TaskId(1), 1)])).await.expect("taken");
        }
        if worker != "here" {
            handle.frame(opened.session, FromWorker::Closed).await.expect("taken");
        }
        open.push(opened);
    }
    let far = Timestamp::from_millis(handle.clock().now().at.millis() + 1_000);
    let forget = |workers| super::command::Command::Forget { workers, events: Some(far) };
    let count = async |workers| match within(handle.frame_call(forget(workers))).await.expect("it commits") {
        super::command::Answer::Removed(count) => count,
        other => panic!("{other:?}"),
    };
    assert_eq!(count(Timestamp::EPOCH).await, 0, "nobody has been gone for so long");
    assert_eq!(count(far).await, 1, "one is connected, one holds a task");
    assert_eq!(count(far).await, 0);
    // A lower incarnation of one that is remembered is refused; of one that is forgotten it is not.
    let lower =
        |worker: &str| Hello { worker: worker.into(), incarnation: 0, agents: vec!["b".into()], ..hello() };
    assert!(matches!(handle.hello(lower("holds")).await, Err(LedgerError::WorkerSuperseded(_))));
    assert!(handle.hello(lower("gone")).await.is_ok());
}

#[tokio::test]
async fn a_loop_that_waits_for_its_store_shows_it_and_one_that_rests_turns_when_it_is_woken() {
    for (name, gate) in [
        ("pulse-handing", Gate { pass: Some(Semaphore::new(0)), ..Gate::default() }),
        ("pulse-hearing", Gate { heard: Some(Semaphore::new(0)), ..Gate::default() }),
    ] {
        let fixture = Fixture::behind(name, gate).await;
        let handle = fixture.handle.clone();
        let first = handle.beat();
        assert!(!first.may_wait_for_the_store(), "{name}: it has nothing to do");
        let flushing = {
            let handle = handle.clone();
            tokio::spawn(async move { handle.flush().await })
        };
        within(fixture.gate.reached.notified()).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let waits = handle.beat();
        assert!(waits.may_wait_for_the_store() && !flushing.is_finished(), "{name}: the store has it");
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(handle.beat(), waits, "{name}: it does not turn meanwhile");
        for held in [&fixture.gate.pass, &fixture.gate.heard].into_iter().flatten() {
            held.add_permits(1);
        }
        within(flushing).await.expect("no panic").expect("committed");
        let rests = handle.beat();
        assert!(rests != waits && !rests.may_wait_for_the_store(), "{name}: it has turned, and rests");
    }
}
