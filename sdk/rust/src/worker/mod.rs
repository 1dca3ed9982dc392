//! The worker: it takes tasks from the daemon, runs handlers, and says how they ended.
//!
//! The parts: `book` and `outbox` decide what to say and when, without I/O; `link` keeps a stream; `run` joins them.

mod book;
mod context;
mod handler;
mod link;
mod outbox;
mod run;
mod soft;
mod task_error;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

pub use context::Context;
use handler::Handlers;
use run::Loop;
pub use task_error::TaskError;

use crate::client::Client;
use crate::error::Error;
use crate::{clock, limits};

const DEFAULT_CAPACITY: u32 = 16;
const DEFAULT_DRAIN: Duration = Duration::from_secs(30);
const MAX_WORKER_ID_BYTES: usize = 128;
const MAX_AGENTS: usize = 64;
const MAX_TASK_TYPES: usize = 256;

/// Tells workers of one process apart, in the order in which they are built.
static BUILT: AtomicU64 = AtomicU64::new(0);

/// A worker that is set up and not yet running. Made by [`Worker::builder`].
pub struct Worker {
    config: Config,
    client: Client,
}

/// What a worker says in Hello, and how it runs.
pub(crate) struct Config {
    worker_id: String,
    incarnation: u64,
    agents: Vec<String>,
    capacity: u32,
    drain: Duration,
    labels: BTreeMap<String, String>,
    handlers: Handlers,
}

impl Worker {
    /// Begins the set-up of a worker.
    pub fn builder(client: Client) -> WorkerBuilder {
        let config = Config {
            worker_id: String::new(),
            incarnation: 0,
            agents: Vec::new(),
            capacity: DEFAULT_CAPACITY,
            drain: DEFAULT_DRAIN,
            labels: BTreeMap::new(),
            handlers: Handlers::default(),
        };
        WorkerBuilder { config, client }
    }

    /// Its name.
    pub fn worker_id(&self) -> &str {
        &self.config.worker_id
    }

    /// Works until SIGTERM or SIGINT (elsewhere than on Unix: Ctrl-C), then drains: takes no new tasks, waits for its
    /// handlers as long as the drain time, gives the rest back with their checkpoints, and ends. A second signal ends the
    /// drain.
    ///
    /// # Errors
    ///
    /// As [`Worker::run_until`]; [`Error::Io`] when signals cannot be watched.
    pub async fn run_until_signal(self) -> Result<(), Error> {
        let (stop, hurry) = (CancellationToken::new(), CancellationToken::new());
        let mut signals = Signals::watch()?;
        let watch = async {
            signals.next().await;
            stop.cancel();
            signals.next().await;
            hurry.cancel();
            std::future::pending::<()>().await;
        };
        let work = Loop::new(self.config, self.client).run(stop.clone(), hurry.clone());
        tokio::select! {
            ended = work => ended,
            () = watch => Ok(()),
        }
    }

    /// Works until `stop` fires, then drains as [`Worker::run_until_signal`] does. A daemon that is away does not end a
    /// worker: handlers go on, and their outcomes wait for it. Dropping this future aborts the handlers; the ledger then
    /// finds their leases run out.
    ///
    /// # Errors
    ///
    /// [`Error::FailedPrecondition`] with `WORKER_SUPERSEDED` when a newer process has this worker's name;
    /// [`Error::InvalidArgument`] and [`Error::Denied`] when the daemon refuses the first Hello.
    pub async fn run_until(self, stop: CancellationToken) -> Result<(), Error> {
        Loop::new(self.config, self.client).run(stop, CancellationToken::new()).await
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("worker_id", &self.config.worker_id)
            .field("agents", &self.config.agents)
            .field("capacity", &self.config.capacity)
            .finish_non_exhaustive()
    }
}

/// Sets up a [`Worker`].
#[must_use = "a worker is made by build"]
pub struct WorkerBuilder {
    config: Config,
    client: Client,
}

impl WorkerBuilder {
    /// Its name, 1 to 128 bytes, the same over restarts and used by one process at a time. Default: host name, first agent
    /// and a number that counts the workers of this process, such as `host/claude/0`.
    pub fn worker_id(mut self, id: impl Into<String>) -> Self {
        self.config.worker_id = id.into();
        self
    }

    /// Tells processes with the same name apart; must rise with each start. Default: milliseconds since 1970.
    pub fn incarnation(mut self, incarnation: u64) -> Self {
        self.config.incarnation = incarnation;
        self
    }

    /// The agents it works for, 1 to 64. Adds to those given before.
    pub fn agents<I: IntoIterator<Item: Into<String>>>(mut self, agents: I) -> Self {
        self.config.agents.extend(agents.into_iter().map(Into::into));
        self
    }

    /// How many tasks it runs at one time, 1 to 10,000. Default 16.
    pub fn capacity(mut self, tasks: u32) -> Self {
        self.config.capacity = tasks;
        self
    }

    /// How long handlers may go on when the worker leaves. Default 30 s.
    pub fn drain(mut self, time: Duration) -> Self {
        self.config.drain = time;
        self
    }

    /// Adds a label that people see in lists of workers: at most 64, keys of 1 to 63 bytes, values up to 255 bytes.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.config.labels.insert(key.into(), value.into());
        self
    }

    /// Runs tasks of this type with `handler`, which takes the payload as JSON of type `T` and gives the result as JSON. A
    /// payload that is no `T` is a permanent failure; a panic is a failure of class Unknown. Replaces the handler given
    /// before for this type.
    pub fn task<T, R, F, Fut>(mut self, task_type: impl Into<String>, handler: F) -> Self
    where
        T: DeserializeOwned,
        R: Serialize,
        F: Fn(T, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, TaskError>> + Send + 'static,
    {
        self.config.handlers.by_type.insert(task_type.into(), handler::json(handler));
        self
    }

    /// As [`WorkerBuilder::task`] with payload and result as they are.
    pub fn task_bytes<F, Fut>(mut self, task_type: impl Into<String>, handler: F) -> Self
    where
        F: Fn(Bytes, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Bytes, TaskError>> + Send + 'static,
    {
        self.config.handlers.by_type.insert(task_type.into(), handler::bytes(handler));
        self
    }

    /// Runs tasks of every type that has no handler of its own; the worker then takes all types.
    pub fn any<T, R, F, Fut>(mut self, handler: F) -> Self
    where
        T: DeserializeOwned,
        R: Serialize,
        F: Fn(T, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, TaskError>> + Send + 'static,
    {
        self.config.handlers.any = Some(handler::json(handler));
        self
    }

    /// As [`WorkerBuilder::any`] with payload and result as they are.
    pub fn any_bytes<F, Fut>(mut self, handler: F) -> Self
    where
        F: Fn(Bytes, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Bytes, TaskError>> + Send + 'static,
    {
        self.config.handlers.any = Some(handler::bytes(handler));
        self
    }

    /// The worker, with what was not given filled in.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] that names every value out of its range, no agent, or no handler.
    pub fn build(mut self) -> Result<Worker, Error> {
        let config = &mut self.config;
        if config.worker_id.is_empty() {
            let agent = config.agents.first().map_or("", String::as_str);
            let tail = format!("/{agent}/{}", BUILT.fetch_add(1, Ordering::Relaxed));
            let room = MAX_WORKER_ID_BYTES.saturating_sub(tail.len());
            config.worker_id = limits::head(host_name(), room) + &tail;
        }
        if config.incarnation == 0 {
            config.incarnation = clock::unix_ms().max(1);
        }
        config.check()?;
        Ok(Worker { config: self.config, client: self.client })
    }
}

impl Config {
    fn check(&self) -> Result<(), Error> {
        let mut found = limits::Found::default();
        found.check(self.worker_id.len() <= MAX_WORKER_ID_BYTES, "worker_id", "must be 1 to 128 bytes");
        found.check((1..=MAX_AGENTS).contains(&self.agents.len()), "agents", "must be 1 to 64");
        let named = self.agents.iter().all(|agent| limits::is_agent(agent));
        found.check(named, "agents", "must match [a-z0-9][a-z0-9._-]{0,62}");
        let capacity = (1..=limits::MAX_CAPACITY).contains(&self.capacity);
        found.check(capacity, "capacity", "must be 1 to 10,000");
        found.check(!self.handlers.is_empty(), "handlers", "must be at least one");
        let types = &self.handlers.by_type;
        found.check(types.len() <= MAX_TASK_TYPES, "task_types", "must be at most 256");
        let named = types.keys().all(|name| limits::is_task_type(name));
        found.check(named, "task_types", "must be 1 to 128 bytes of printable text");
        found.labels(&self.labels);
        found.end()
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = if name.trim().is_empty() { std::env::var("HOSTNAME").unwrap_or_default() } else { name };
    let name = name.trim();
    if name.is_empty() { "worker".to_owned() } else { name.to_owned() }
}

#[cfg(unix)]
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn watch() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn watch() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn echo(input: serde_json::Value, _: Context) -> Result<serde_json::Value, TaskError> {
        Ok(input)
    }

    fn builder() -> WorkerBuilder {
        Worker::builder(Client::lazy("127.0.0.1:1").unwrap())
    }

    #[tokio::test]
    async fn what_is_not_given_is_filled_in() {
        let first = builder().agents(["claude"]).any(echo).build().unwrap();
        let second = builder().agents(["claude"]).any(echo).build().unwrap();
        assert!(first.worker_id().contains("/claude/"));
        assert_ne!(first.worker_id(), second.worker_id());
        assert!(first.config.incarnation > 1_577_836_800_000);
    }

    #[tokio::test]
    async fn every_fault_of_a_set_up_is_named() {
        let built = builder().worker_id("w".repeat(129)).agents(["A"]).capacity(0).label("", "").build();
        let Err(Error::InvalidArgument { violations, .. }) = built else { panic!("must be refused") };
        let fields: Vec<_> = violations.iter().map(|v| v.field.as_str()).collect();
        assert_eq!(fields, ["worker_id", "agents", "capacity", "handlers", "labels"]);
    }

    #[tokio::test]
    async fn a_worker_without_a_daemon_drains_at_once() {
        let stop = CancellationToken::new();
        stop.cancel();
        let worker = builder().agents(["claude"]).any(echo).build().unwrap();
        tokio::time::timeout(Duration::from_secs(5), worker.run_until(stop)).await.unwrap().unwrap();
    }
}
