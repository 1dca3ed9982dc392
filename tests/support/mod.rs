//! Runs the real binary in a folder of its own, and speaks to it through generated stubs alone.

pub(crate) mod canary;
pub(crate) mod postgres;
pub(crate) mod program;
pub(crate) mod secure;
pub(crate) mod sockets;
pub(crate) mod transcript;
pub(crate) mod worker;

use ledgerd_client::{Client, ClientBuilder, v1};
use std::ffi::OsString;
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpSocket;

/// Longer than anything that is not stuck takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A folder that goes away with the test, and the port of its daemon.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    port: TcpSocket,
}

impl Folder {
    pub(crate) fn new() -> Arc<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ledgerd-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        Self::at(path)
    }

    /// This one, which goes away as well.
    pub(crate) fn at(path: PathBuf) -> Arc<Self> {
        std::fs::create_dir_all(&path).expect("the folder is writable");
        // Bound, and never listening: nobody else is given it, also while no daemon runs that is to come back to it.
        let port = TcpSocket::new_v4().expect("a socket");
        port.set_reuseaddr(true).expect("an option");
        port.bind(([127, 0, 0, 1], 0).into()).expect("a port");
        Arc::new(Self { path, port })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn address(&self) -> String {
        self.port.local_addr().expect("it is bound").to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// A running daemon. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    pub(crate) folder: Arc<Folder>,
    pub(crate) address: String,
    /// Where probes and metrics are, when the flags say so.
    pub(crate) http: Option<String>,
    /// What it was started with, beyond what every daemon of the tests has.
    pub(crate) flags: Vec<String>,
    /// What it said on standard output after where it listens.
    output: Arc<Mutex<String>>,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        Self::start_in(Folder::new())
    }

    pub(crate) fn start_in(folder: Arc<Folder>) -> Self {
        Self::start_at(folder, "127.0.0.1:0")
    }

    pub(crate) fn start_at(folder: Arc<Folder>, listen: &str) -> Self {
        Self::start_with(folder, listen, &[])
    }

    /// With more flags than every daemon of the tests has.
    pub(crate) fn start_with(folder: Arc<Folder>, listen: &str, flags: &[&str]) -> Self {
        Self::launch(folder, listen, flags, &[]).unwrap_or_else(|fault| panic!("{fault}"))
    }

    /// With variables of its own; what it said where it does not start.
    pub(crate) fn launch(
        folder: Arc<Folder>,
        listen: &str,
        flags: &[&str],
        environment: &[(&str, OsString)],
    ) -> Result<Self, String> {
        let has_http = flags.contains(&"--http-listen");
        // Any port: the folder's own, so that a daemon that starts there again finds it free.
        let held = folder.address();
        let listen = if listen == "127.0.0.1:0" { &held } else { listen };
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(folder.path().join("log"))
            .expect("the folder is writable");
        let mut child = command()
            .args(["serve", "--listen", listen, "--data-dir"])
            .arg(folder.path().join("data"))
            .args(["--http-listen", "off"].iter().filter(|_| !has_http))
            .args(postgres::store_flags(&folder, flags))
            .args(flags)
            // Everything that it may say of itself, so that no secret is in it only because nobody asked.
            .env("LEDGERD_LOG", "info,ledgerd=debug")
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        let stdout = child.stdout.take().expect("stdout is piped");
        let mut lines = BufReader::new(stdout).lines();
        let first = lines.next().and_then(Result::ok).unwrap_or_default();
        let Some(address) = first.strip_prefix("ledgerd listening on ").map(str::to_owned) else {
            let log = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("the daemon did not start: {first:?}\n{log}"));
        };
        let second = if has_http { lines.next().and_then(Result::ok) } else { None };
        let http = second.and_then(|line| Some(line.strip_prefix("http listening on ")?.to_owned()));
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let output = Arc::<Mutex<String>>::default();
        let all = Arc::clone(&output);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut all = all.lock().expect("not poisoned");
                all.extend([line.as_str(), "\n"]);
            }
        });
        Ok(Self { child, folder, address, http, flags, output })
    }

    /// Kills it as a power cut would, and starts it again on the same files and port.
    pub(crate) fn kill_and_restart(mut self) -> Self {
        self.kill();
        let (folder, address) = (Arc::clone(&self.folder), self.address.clone());
        drop(self);
        Self::start_at(folder, &address)
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} works");
    }

    /// Waits for the end of the process.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        eventually("the daemon ends", async || self.child.try_wait().expect("it is our child")).await
    }

    pub(crate) async fn client(&self) -> Client {
        self.builder().connect().await.expect("the daemon listens")
    }

    /// A client that finds it, and trusts it where it has TLS.
    pub(crate) fn builder(&self) -> ClientBuilder {
        match self.ca() {
            None => Client::builder(&self.address),
            Some(ca) => {
                Client::builder(format!("https://{}", self.address)).ca_file(ca).expect("a certificate")
            }
        }
    }

    /// Who signed its certificate, where it has TLS.
    pub(crate) fn ca(&self) -> Option<PathBuf> {
        self.flags.iter().any(|flag| flag == "--tls-cert").then(|| self.folder.path().join("ca.pem"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// What it said on standard output after where it listens.
    pub(crate) fn output(&self) -> String {
        self.output.lock().expect("not poisoned").clone()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        let (log, output) = (self.log(), self.output());
        if std::thread::panicking() {
            eprintln!("--- log of the daemon ---\n{log}");
        } else if let Some(line) = canary::in_text(&log).or_else(|| canary::in_text(&output)) {
            panic!("a log has what is for nobody who reads logs: {line}");
        }
    }
}

/// The binary under test: the one that was built with the tests, or that of `LEDGERD_BIN`, as one of a release build.
pub(crate) fn command() -> Command {
    let built = || env!("CARGO_BIN_EXE_ledgerd").into();
    let mut command = Command::new(std::env::var_os("LEDGERD_BIN").unwrap_or_else(built));
    for (name, _) in
        std::env::vars().filter(|(name, _)| name.starts_with("LEDGERD_") || name.starts_with("OTEL_"))
    {
        command.env_remove(name);
    }
    command
}

/// Looks again until there is something to see, 10 ms apart; a failure after [`PATIENCE`].
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(seen) = look().await {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(what, found).await
}

/// Awaits `future`, but not for ever.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing happened within {PATIENCE:?}"),
    }
}

/// Two tests of each function: one in the clear and one under TLS.
macro_rules! both_ways {
    ($($name:ident),* $(,)?) => {
        mod in_the_clear {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(crate::support::secure::Way::Clear).await;
            })*
        }
        mod under_tls {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(crate::support::secure::Way::Tls).await;
            })*
        }
    };
}
pub(crate) use both_ways;

/// A task for `agent` that needs nothing special.
pub(crate) fn task(agent: &str) -> v1::NewTask {
    v1::NewTask {
        agent: agent.to_owned(),
        task_type: "test".to_owned(),
        payload: format!("{{\"note\":\"{}\"}}", canary::WORD).into(),
        ..v1::NewTask::default()
    }
}

/// A duration on the wire.
pub(crate) fn ms(millis: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: millis / 1_000, nanos: (millis % 1_000 * 1_000_000) as i32 })
}

/// Enqueues one task and returns its id.
pub(crate) async fn enqueue(client: &Client, task: v1::NewTask) -> String {
    let request = v1::EnqueueTaskRequest { task: Some(task), request_id: String::new() };
    client.tasks().enqueue_task(request).await.expect("the task is stored").into_inner().task_id
}

/// Reads a task, data included.
pub(crate) async fn get(client: &Client, id: &str) -> v1::Task {
    let request = v1::GetTaskRequest { task_id: id.to_owned(), include_data: true };
    client.tasks().get_task(request).await.expect("the task is there").into_inner().task.expect("it is set")
}

/// Waits until the task is in `state`.
pub(crate) async fn in_state(client: &Client, id: &str, state: v1::TaskState) -> v1::Task {
    let what = format!("task {id} becomes {state:?}");
    eventually(&what, async || Some(get(client, id).await).filter(|task| task.state() == state)).await
}

/// The names of a task's history events, oldest first.
pub(crate) async fn events(client: &Client, id: &str) -> Vec<String> {
    history(client, id).await.into_iter().map(|event| event.event).collect()
}

/// A task's history, oldest first.
pub(crate) async fn history(client: &Client, id: &str) -> Vec<v1::HistoryEvent> {
    let request = v1::GetTaskHistoryRequest { task_id: id.to_owned() };
    client.tasks().get_task_history(request).await.expect("the task is there").into_inner().events
}

/// Changes an agent's settings.
pub(crate) async fn configure(client: &Client, agent: &str, settings: v1::AgentSettings) {
    let request =
        v1::ConfigureAgentRequest { agent: agent.to_owned(), settings: Some(settings), ..Default::default() };
    client.admin().configure_agent(request).await.expect("the settings are valid");
}

/// Settings that make failures quick: no back-off worth waiting for, no budget.
pub(crate) fn quick() -> v1::AgentSettings {
    v1::AgentSettings {
        policy: Some(v1::TaskPolicy {
            base_delay: ms(1),
            max_delay: ms(5),
            jitter: v1::JitterKind::None.into(),
            ..v1::TaskPolicy::default()
        }),
        budget: Some(v1::BudgetSettings { enabled: Some(false), ..v1::BudgetSettings::default() }),
        ..v1::AgentSettings::default()
    }
}

/// [`quick`], with a budget and without a breaker, so that nothing else holds a retry back.
pub(crate) fn budgeted(capacity: f64, floor_per_second: f64, deposit: f64) -> v1::AgentSettings {
    let budget = v1::BudgetSettings {
        capacity: Some(capacity),
        floor_per_second: Some(floor_per_second),
        deposit: Some(deposit),
        enabled: Some(true),
    };
    let breaker = v1::BreakerSettings { enabled: Some(false), ..v1::BreakerSettings::default() };
    v1::AgentSettings { budget: Some(budget), breaker: Some(breaker), ..quick() }
}

/// The reason in a status's ErrorInfo.
pub(crate) fn reason(status: &tonic::Status) -> String {
    use tonic_types::StatusExt;
    let info = status.get_details_error_info();
    if let Some(info) = &info {
        assert_eq!(info.domain, "ledgerd");
    }
    info.map(|info| info.reason).unwrap_or_default()
}
