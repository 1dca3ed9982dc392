//! Where the suite's daemons and yardsticks run: one after the other, each with a folder of its own.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use ledgerd_client::Client;
use ledgerd_client::v1::{
    AgentSettings, ConfigureAgentRequest, EnqueueTasksRequest, NewTask, PauseAgentRequest, TaskState,
};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::task::JoinSet;

use super::super::report::Report as Loaded;
use super::super::{Args as Load, TASK_TYPE, count, stats};
use super::echo;
use super::yardstick::{Figure, Which};
use crate::Global;
use crate::daemon::{self, Daemon, cannot};
use crate::failure::{Exit, Failure};
use crate::guard::Guard;
use crate::time::now;

/// Time that a daemon gets to close its store.
const STOP: Duration = Duration::from_secs(30);
/// Tasks in a call, and calls at one time, of a fill.
const CALL: u64 = 1_000;
const CALLS: u64 = 4;
/// Nothing that is not due becomes due within a run.
const LATER: i64 = 7 * 24 * 3_600;

/// Tasks that a fill makes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// Of the type that workers take.
    Served,
    /// Of a type nobody takes.
    Unserved,
    /// The same, of each priority in turn.
    UnservedOfAllPriorities,
    /// Of the type that workers take, a week ahead.
    NotDue,
    /// Of an agent that is paused.
    Paused,
}

/// Folders, and what is started in them.
pub(super) struct Stage {
    root: PathBuf,
    /// Removed in the end.
    _temporary: TempDir,
    guard: Guard,
}

impl Stage {
    pub(super) fn new(folder: Option<&Path>, guard: Guard) -> Result<Self, Failure> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("ledgerd-suite-");
        let made = match folder {
            Some(folder) => builder.tempdir_in(folder),
            None => builder.tempdir(),
        };
        let temporary = made.map_err(|error| cannot("make a temporary folder", &error))?;
        Ok(Self { root: temporary.path().to_owned(), _temporary: temporary, guard })
    }

    /// A daemon on the ledger of this name.
    pub(super) async fn daemon(&self, name: &str) -> Result<Daemon, Failure> {
        Daemon::start(&self.root.join(name), None, &self.guard).await
    }

    /// A load on a new ledger of this name whose daemon has these variables of the environment, until it has ended.
    pub(super) async fn with(
        &self,
        name: &str,
        variables: &[(&str, &str)],
        load: Load,
    ) -> Result<Loaded, Failure> {
        let folder = self.root.join(name);
        let mut daemon = Daemon::start_with(variables, &folder, &self.guard).await?;
        let loaded = self.load(&mut daemon, load).await?;
        stop(&mut daemon).await;
        std::fs::remove_dir_all(&folder).map_err(|error| cannot("remove a ledger", &error))?;
        Ok(loaded)
    }

    /// Bytes of the files of a ledger.
    pub(super) fn file_bytes(&self, name: &str) -> u64 {
        let bytes = |file: &str| self.root.join(name).join(file).metadata().map_or(0, |found| found.len());
        bytes("ledger.db") + bytes("ledger.db-wal")
    }

    pub(super) async fn load(&self, daemon: &mut Daemon, load: Load) -> Result<Loaded, Failure> {
        let loaded = async {
            let client = Client::connect(&daemon.address).await?;
            load.load(
                &Global::default(),
                &client,
                std::slice::from_ref(&daemon.address),
                Some(daemon.process.id()),
            )
            .await
        };
        let loaded = match loaded.await {
            Ok(loaded) => loaded,
            Err(failure) => return Err(daemon.blame(failure)),
        };
        match loaded.fault() {
            Some(fault) => Err(Failure::new(Exit::Failure, fault)),
            None => Ok(loaded),
        }
    }

    /// A load on a new ledger. Its daemon is killed then and started again, and its rows are counted: how many history rows.
    ///
    /// # Errors
    /// When they are not those that were acknowledged.
    pub(super) async fn fresh(&self, load: Load) -> Result<(Loaded, u64), Failure> {
        let mut daemon = self.daemon("fresh").await?;
        let loaded = self.load(&mut daemon, load).await?;
        daemon.process.kill();
        let mut daemon = self.daemon("fresh").await?;
        let done = self.count(&daemon, TaskState::Done).await?;
        stop(&mut daemon).await;
        let folder = self.root.join("fresh");
        let rows = rows(&folder.join("ledger.db")).map_err(|error| {
            Failure::new(Exit::Failure, format!("cannot count the rows of a ledger: {error}"))
        })?;
        std::fs::remove_dir_all(&folder).map_err(|error| cannot("remove a ledger", &error))?;
        let (tasks, transitions) = loaded.made();
        if (done, rows) == (tasks, (tasks, transitions)) {
            return Ok((loaded, transitions));
        }
        let (stored, history) = rows;
        Err(Failure::new(
            Exit::Failure,
            format!(
                "{tasks} tasks and {transitions} transitions were acknowledged; after a kill {done} are done, {stored} rows \
                 of tasks and {history} of history are there"
            ),
        ))
    }

    /// Tasks in a state, by the daemon's word.
    pub(super) async fn count(&self, daemon: &Daemon, state: TaskState) -> Result<u64, Failure> {
        Ok(count(&stats(&Client::connect(&daemon.address).await?).await?, state))
    }

    /// Makes tasks of these kinds for an agent; those of a paused one are for another.
    pub(super) async fn fill(
        &self,
        daemon: &Daemon,
        agent: &str,
        kinds: &[(Kind, u64)],
    ) -> Result<(), Failure> {
        let client = Client::connect(&daemon.address).await?;
        let paused = format!("{agent}-paused");
        for name in [agent, &paused] {
            let settings = AgentSettings { max_waiting: Some(10_000_000), ..AgentSettings::default() };
            let request = ConfigureAgentRequest {
                agent: name.into(),
                settings: Some(settings),
                ..ConfigureAgentRequest::default()
            };
            client.admin().configure_agent(request).await?;
        }
        let pause = PauseAgentRequest {
            agent: paused.clone(),
            reason: "bench".into(),
            ..PauseAgentRequest::default()
        };
        client.admin().pause_agent(pause).await?;
        for (kind, tasks) in kinds {
            let agent = if *kind == Kind::Paused { paused.as_str() } else { agent };
            let mut calls = JoinSet::new();
            let each = tasks / CALLS;
            for _ in 0..CALLS {
                let (client, agent, kind) = (client.clone(), agent.to_owned(), *kind);
                calls.spawn(async move { fill(&client, &agent, kind, each).await });
            }
            while let Some(one) = calls.join_next().await {
                one.expect("a caller does not panic")?;
            }
        }
        Ok(())
    }

    /// A figure of the machine itself, in a process of its own; `batch` is of SQLite's alone.
    pub(super) async fn yardstick(&self, which: Which, seconds: u64, batch: u32) -> Result<Figure, Failure> {
        let folder = tempfile::tempdir_in(&self.root).map_err(|error| cannot("make a folder", &error))?;
        let mut command = daemon::command()?;
        command
            .args(["bench", "yardstick", which.name(), "--duration", &format!("{seconds}s")])
            .args(["--batch", &batch.to_string(), "--dir"])
            .arg(folder.path());
        let said = output(command).await?;
        serde_json::from_slice(&said).map_err(|_| broken("a yardstick", &said))
    }

    /// Lifecycles a second of the loop in process, and of prepared statements on the same schema, for each round.
    pub(super) async fn in_process(&self, rounds: usize, seconds: u64) -> Result<Vec<(f64, f64)>, Failure> {
        let folder = tempfile::tempdir_in(&self.root).map_err(|error| cannot("make a folder", &error))?;
        let mut command = daemon::command()?;
        command
            .args(["bench-loop", "--rounds", &rounds.to_string(), "--seconds", &seconds.to_string(), "--dir"])
            .arg(folder.path());
        let said = output(command).await?;
        serde_json::from_slice(&said).map_err(|_| broken("the loop in process", &said))
    }

    /// Calls a second that a server with nothing behind it answers.
    pub(super) async fn echo(&self, load: &Load) -> Result<Figure, Failure> {
        let mut command = daemon::command()?;
        command.args(["bench", "yardstick", "echo", "--dir"]).arg(&self.root);
        let mut server = tokio::process::Command::from(command)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| cannot("start a process", &error))?;
        let said = server.stdout.take().ok_or_else(|| broken("the echo", b""))?;
        let address = BufReader::new(said)
            .lines()
            .next_line()
            .await
            .ok()
            .flatten()
            .ok_or_else(|| broken("the echo", b""))?;
        let process = server.id().ok_or_else(|| broken("the echo", b""))?;
        echo::call(&address, process, load).await
    }
}

/// Ends a daemon in good order.
pub(in crate::bench) async fn stop(daemon: &mut Daemon) {
    daemon.process.stop(STOP).await;
}

/// Rows of tasks and of history.
fn rows(file: &Path) -> rusqlite::Result<(u64, u64)> {
    let conn = rusqlite::Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    conn.query_row("SELECT (SELECT COUNT(*) FROM tasks), (SELECT COUNT(*) FROM history)", [], |row| {
        Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get::<_, i64>(1)?.cast_unsigned()))
    })
}

async fn fill(client: &Client, agent: &str, kind: Kind, tasks: u64) -> Result<(), Failure> {
    let later = prost_types::Timestamp { seconds: now().as_second() + LATER, nanos: 0 };
    let task = |number: u64| NewTask {
        agent: agent.into(),
        task_type: if matches!(kind, Kind::Unserved | Kind::UnservedOfAllPriorities) {
            "unserved"
        } else {
            TASK_TYPE
        }
        .into(),
        payload: Bytes::from_static(&[b'x'; 256]),
        priority: (kind == Kind::UnservedOfAllPriorities).then_some((number % 10) as i32),
        run_at: (kind == Kind::NotDue).then_some(later),
        ..NewTask::default()
    };
    let mut made = 0;
    while made < tasks {
        let many = CALL.min(tasks - made);
        let request = EnqueueTasksRequest {
            tasks: (made..made + many).map(task).collect(),
            ..EnqueueTasksRequest::default()
        };
        let answer = client.tasks().enqueue_tasks(request).await?.into_inner();
        if let Some(error) = answer.results.into_iter().find_map(|result| result.error) {
            return Err(Failure::new(Exit::Failure, format!("a task was refused: {}", error.message)));
        }
        made += many;
    }
    Ok(())
}

async fn output(command: std::process::Command) -> Result<Vec<u8>, Failure> {
    let ended = tokio::process::Command::from(command)
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| cannot("start a process", &error))?;
    match ended.status.success() {
        true => Ok(ended.stdout),
        false => {
            Err(Failure::new(Exit::Failure, format!("a process of the suite ended with {}", ended.status)))
        }
    }
}

fn broken(who: &str, said: &[u8]) -> Failure {
    Failure::new(Exit::Failure, format!("{who} said {:.80?}", String::from_utf8_lossy(said)))
}
