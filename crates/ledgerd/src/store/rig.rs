//! A ledger of a few lines around a store, for tests: it decides with ledger-core, writes, and decides anew what was
//! overtaken.

use super::model::ModelStore;
use super::postgres::{self, PgReader, PgStore};
use super::{Committed, Options, SqliteReader, SqliteStore, open};
use bytes::Bytes;
use ledger_core::store::{
    Ask, Changed, Changes, DeadLetter, Known, Notes, Reader, Recovered, Store, TaskData, Want,
};
use ledger_core::{
    AgentId, Caller, Class, Context, Event, Holder, Now, Outcome, Overrides, Record, SessionId, Settings,
    Spec, State, Task, TaskError, TaskId, Timestamp,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(super) const AGENT: AgentId = AgentId(1);
/// When the tests begin.
pub(super) const START: i64 = 1_800_000_000_000;

/// A folder that goes when the test ends.
pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("ledgerd-store-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("the temporary folder is writable");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) enum Kind {
    Sqlite { folder: Folder, store: Option<Box<SqliteStore>>, reader: Arc<SqliteReader> },
    Postgres { url: String, store: Option<Box<PgStore>>, reader: Arc<PgReader> },
    Model(Box<ModelStore>),
}

/// A store with a ledger around it that is just large enough for the promises.
pub(super) struct Rig {
    pub(super) kind: Kind,
    pub(super) now: Now,
    pub(super) recovered: Recovered,
    settings: Settings,
}

/// A task to be.
#[derive(Clone, Default)]
pub(super) struct New {
    pub(super) agent: u32,
    pub(super) task_type: &'static str,
    pub(super) priority: u8,
    pub(super) run_at: Option<Timestamp>,
    pub(super) deadline: Option<Timestamp>,
    pub(super) key: &'static str,
    pub(super) frees_key: bool,
    pub(super) policy: Overrides,
    pub(super) labels: Vec<(String, String)>,
    /// Bytes that its payload has at least.
    pub(super) bytes: usize,
}

impl New {
    pub(super) fn of(task_type: &'static str) -> Self {
        Self { agent: AGENT.0, task_type, priority: 5, ..Self::default() }
    }
}

impl Rig {
    pub(super) async fn sqlite() -> Self {
        Self::sqlite_with(Options::default()).await
    }

    pub(super) async fn sqlite_with(options: Options) -> Self {
        let folder = Folder::new();
        let (store, reader) = open(&folder.0, options).await.expect("a new ledger opens");
        Self::of(Kind::Sqlite { folder, store: Some(Box::new(store)), reader }).await
    }

    /// On a database of its own; none where there is no server to test with.
    pub(super) async fn postgres() -> Option<Self> {
        let url = database().await?;
        let (store, reader) = postgres::open(&url, "rig").await.expect("a new ledger opens");
        Some(Self::of(Kind::Postgres { url, store: Some(Box::new(store)), reader }).await)
    }

    pub(super) async fn model(seed: Option<u64>) -> Self {
        Self::of(Kind::Model(Box::new(ModelStore::new(seed)))).await
    }

    pub(super) async fn of(kind: Kind) -> Self {
        let now = Now::steady(Timestamp::from_millis(START));
        let mut rig = Self { kind, now, recovered: Recovered::default(), settings: Settings::default() };
        rig.recover().await;
        rig
    }

    pub(super) fn store(&mut self) -> &mut dyn Store<Proof = Committed> {
        match &mut self.kind {
            Kind::Sqlite { store, .. } => &mut **store.as_mut().expect("only reopening takes it"),
            Kind::Postgres { store, .. } => &mut **store.as_mut().expect("only reopening takes it"),
            Kind::Model(store) => &mut **store,
        }
    }

    pub(super) fn reader(&self) -> Option<&dyn Reader> {
        match &self.kind {
            Kind::Sqlite { reader, .. } => Some(&**reader),
            Kind::Postgres { reader, .. } => Some(&**reader),
            Kind::Model(_) => None,
        }
    }

    pub(super) fn folder(&self) -> &Path {
        match &self.kind {
            Kind::Sqlite { folder, .. } => &folder.0,
            Kind::Postgres { .. } | Kind::Model(_) => panic!("only SQLite has a folder"),
        }
    }

    pub(super) async fn recover(&mut self) {
        let now = self.now;
        self.recovered = self.store().recover(now).await.expect("it recovers");
    }

    /// What has to be watched over, with agents whose tasks have a queue_timeout.
    pub(super) async fn timed(&mut self, queues: &[AgentId]) -> Vec<TaskId> {
        let queues = queues.iter().copied().collect();
        let (mut timed, mut from) = (Vec::new(), Some(TaskId(0)));
        while let Some(next) = from {
            let (tasks, rest) = self.store().timed(&queues, next).await.expect("it reads");
            assert!(rest.is_none_or(|rest| rest > next), "it gets on");
            timed.extend(tasks.iter().map(|task| task.id));
            from = rest;
        }
        timed
    }

    /// As after a kill: what is not committed is gone.
    pub(super) async fn reopen(mut self) -> Self {
        match &mut self.kind {
            Kind::Sqlite { folder, store, reader } => {
                reader.close().await.expect("it closes");
                drop(store.take());
                let (again, read) = open(&folder.0, Options::default()).await.expect("it opens again");
                (*store, *reader) = (Some(Box::new(again)), read);
            }
            Kind::Postgres { url, store, reader } => {
                reader.close().await.expect("it closes");
                drop(store.take());
                let (again, read) = postgres::open(url, "rig").await.expect("it opens again");
                (*store, *reader) = (Some(Box::new(again)), read);
            }
            Kind::Model(_) => {}
        }
        self.recover().await;
        self
    }

    pub(super) async fn commit(&mut self) -> Committed {
        self.store().commit().await.expect("it commits")
    }

    pub(super) fn wait(&mut self, span: Duration) {
        self.now.at = self.now.at.after(span);
    }

    pub(super) async fn get(&mut self, id: TaskId) -> Option<Task> {
        let (want, now) = (Want { tasks: vec![id], ..Want::default() }, self.now);
        self.store().begin(&want, now).await.expect("it reads").tasks.remove(&id).map(Arc::unwrap_or_clone)
    }

    pub(super) async fn known(&mut self, want: Want) -> Known {
        let now = self.now;
        self.store().begin(&want, now).await.expect("it reads")
    }

    pub(super) async fn write(&mut self, changes: Changes) -> Vec<TaskId> {
        self.store().write(changes).await.expect("it writes")
    }

    pub(super) async fn enqueue(&mut self, new: New) -> TaskId {
        self.enqueue_all([new]).await.remove(0)
    }

    pub(super) async fn enqueue_all(&mut self, new: impl IntoIterator<Item = New>) -> Vec<TaskId> {
        let mut changes = Changes::default();
        let mut ids = Vec::new();
        for new in new {
            let id = TaskId(self.store().ids(1).await.expect("numbers are local"));
            let spec = Arc::new(Spec {
                agent: AgentId(new.agent),
                task_type: new.task_type.into(),
                policy: new.policy,
                created_at: self.now.at,
                frees_key: new.frees_key,
            });
            let (task, record) = Task::enqueue(id, spec, new.priority, new.run_at, new.deadline, self.now);
            changes.tasks.push(Changed { task: Arc::new(task), expected: 0, was: None });
            changes.history.push(record);
            let data = TaskData {
                payload: payload(id, new.bytes),
                labels: new.labels,
                key: new.key.into(),
                digest: id.0.wrapping_mul(u64::MAX / 3),
                ..TaskData::default()
            };
            changes.data.push((id, Arc::new(data)));
            ids.push(id);
        }
        assert_eq!(self.write(changes).await, [], "a new task cannot be overtaken");
        ids
    }

    /// Lets an event happen to a task, as often as it is overtaken.
    pub(super) async fn apply(&mut self, id: TaskId, event: Event) -> Option<Record> {
        for _ in 0..100 {
            let before = self.get(id).await.expect("the task exists");
            let mut task = before.clone();
            let cx = Context {
                now: self.now,
                settings: &self.settings,
                draw: 1 << 63,
                affords: &|_| true,
                digest: id.0 + 1_000,
                lost_with: ledger_core::LostWith::ALONE,
            };
            let applied = task.apply(&event, &cx).expect("the event is allowed");
            let mut changes = Changes::default();
            if task.state == State::Failed && before.state != State::Failed {
                changes.dead_letters.push(letter(&task, applied.record.as_ref(), self.now));
            }
            if before.state == State::Failed && task.state != State::Failed {
                changes.redriven.push(id);
            }
            if task.state == State::Done {
                changes.results.push((id, Bytes::from(format!("result of {id}"))));
            }
            if task.spec.frees_key && task.state.is_terminal() {
                changes.freed_keys.push(id);
            }
            changes.history.extend(applied.record.clone());
            changes.tasks.push(Changed {
                task: Arc::new(task),
                expected: before.version,
                was: Some(before.state),
            });
            if self.write(changes).await.is_empty() {
                return applied.record;
            }
        }
        panic!("overtaken a hundred times in a row");
    }

    pub(super) async fn claim(&mut self, id: TaskId) -> u64 {
        let holder = Holder { worker: "w".into(), incarnation: 1, session: SessionId(3) };
        let permit = Some(breaker_core::Permit { epoch: 2, probe: false, slot: 0 });
        self.apply(id, Event::Claim { holder, permit }).await.expect("a claim makes history").fence
    }

    pub(super) async fn run(&mut self, id: TaskId) -> u64 {
        let fence = self.claim(id).await;
        self.apply(id, Event::Ack(caller(), fence)).await;
        fence
    }

    pub(super) async fn end(&mut self, id: TaskId, fence: u64, outcome: Outcome) -> Record {
        self.apply(id, Event::Settle(caller(), fence, outcome)).await.expect("an outcome makes history")
    }

    pub(super) async fn complete(&mut self, id: TaskId) {
        let fence = self.run(id).await;
        self.end(id, fence, Outcome::Complete).await;
    }

    pub(super) async fn offer(&mut self, ask: Ask) -> Vec<TaskId> {
        let now = self.now;
        let found = self.store().offer(&[ask], now).await.expect("it offers").remove(0);
        found.iter().map(|task| task.id).collect()
    }

    /// How many come before a task.
    pub(super) async fn ahead(&mut self, id: TaskId, types: Option<&[&str]>, most: usize) -> usize {
        let task = self.get(id).await.expect("the task exists");
        let types: Option<Vec<Arc<str>>> =
            types.map(|types| types.iter().map(|name| Arc::from(*name)).collect());
        let now = self.now;
        self.store().ahead(&task, types.as_deref(), most, now).await.expect("it counts")
    }

    /// The transitions of a task, as far as they can be read.
    pub(super) async fn history(&self, id: TaskId) -> Vec<Record> {
        if let Kind::Model(model) = &self.kind {
            return model.history().into_iter().filter(|record| record.task == id).collect();
        }
        let reader = self.reader().expect("all others can be read");
        let rows = reader.history(id).await.expect("it reads").expect("the task exists");
        assert!(rows.is_sorted_by(|a, b| a.seq < b.seq), "rows come oldest first");
        rows.into_iter().map(|row| row.record).collect()
    }
}

/// A new database on the server that `.ci/postgres` has started; none when it has not.
pub(super) async fn database() -> Option<String> {
    use sqlx::{AssertSqlSafe, ConnectOptions, Executor};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let Ok(url) = std::env::var("LEDGERD_TEST_POSTGRES_URL") else {
        eprintln!("not tested: LEDGERD_TEST_POSTGRES_URL names no server (.ci/postgres COMMAND starts one)");
        return None;
    };
    let name = format!("ledgerd_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let options: sqlx::postgres::PgConnectOptions = url.parse().expect("an address");
    let mut conn = options.connect().await.expect("the server of the tests is there");
    let create = AssertSqlSafe(format!("CREATE DATABASE {name} TEMPLATE template0"));
    conn.execute(create).await.expect("a superuser makes a database");
    let (server, _) = url.rsplit_once('/').expect("an address with a database");
    Some(format!("{server}/{name}"))
}

/// What the rig gives a task, of at least so many bytes.
pub(super) fn payload(id: TaskId, bytes: usize) -> Bytes {
    format!("{:<bytes$}", format!("payload of {id}")).into()
}

pub(super) fn caller() -> Caller {
    Caller { worker: "w".into(), session: Some(SessionId(3)) }
}

pub(super) fn failure(class: Class) -> Outcome {
    let error = TaskError { class, code: "E1".into(), message: "no luck".into(), detail: String::new() };
    Outcome::Fail { error: Arc::new(error), retry_after: None }
}

fn letter(task: &Task, record: Option<&Record>, now: Now) -> DeadLetter {
    DeadLetter {
        task: task.id,
        agent: task.spec.agent,
        task_type: Arc::clone(&task.spec.task_type),
        reason: task.reason,
        error: record.and_then(|record| record.error.clone()),
        fingerprint: u64::MAX - 1,
        failed_at: now.at,
        attempt: task.attempt,
        redrives: task.redrives,
        discarded: None,
    }
}

pub(super) fn everything() -> Ask {
    Ask { agent: AGENT, types: None, limit: 100, gated: false, except: Arc::default() }
}

/// Notes of every kind, for the tests of single stores.
pub(super) fn notes(error: bool, checkpoint: bool) -> Notes {
    let class = Class::Overloaded;
    let told = TaskError { class, code: String::new(), message: "later".into(), detail: "much".into() };
    Notes {
        error: error.then(|| Arc::new(told)),
        checkpoint: checkpoint.then(|| Bytes::from_static(&[0, 255, 1])),
        progress: None,
        question: None,
        answer: None,
    }
}
