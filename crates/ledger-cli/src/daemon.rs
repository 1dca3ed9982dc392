//! Processes of a command's own: the daemon that `demo` and `bench` start, and the demo's workers.
//!
//! They never outlive the command. Each leads a process group that is killed when its [`Process`] is dropped, and the
//! [guard](crate::guard) kills it when this process is killed itself. A terminal's ctrl-C does not reach them directly,
//! so it is the command that ends them, in its order.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};

use crate::failure::{Exit, Failure};
use crate::guard::{self, Guard};

/// How long a daemon may take to listen. It reads its live tasks first, and a data directory that was given may hold
/// many.
const START: Duration = Duration::from_secs(30);
/// How often a process is asked whether it has ended, or a file whether it has grown.
const LOOK: Duration = Duration::from_millis(10);
/// What the daemon says first on standard output.
const LISTENING: &str = "ledgerd listening on ";
/// How much of a log is shown when a process has ended that should not have.
const LAST_LINES: usize = 5;

/// Starts the guard of the processes below.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn guard() -> Result<Guard, Failure> {
    Guard::start(Box::new(guard::command)).map_err(|error| cannot("start the guard of the processes", &error))
}

/// Completes when this process is told to end. What was going on is to be dropped then.
///
/// # Errors
/// When signals cannot be waited for.
pub(crate) fn told_to_end() -> Result<impl Future<Output = ()>, Failure> {
    let on = |kind| signal(kind).map_err(|error| cannot("wait for signals", &error));
    let (mut interrupt, mut terminate) = (on(SignalKind::interrupt())?, on(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// This program.
///
/// # Errors
/// When its file cannot be found.
pub(crate) fn this_program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|error| cannot("find this program's file", &error))
}

/// This program with none of the caller's `LEDGERD_` variables: they are meant for a daemon and a ledger of his own.
///
/// # Errors
/// When its file cannot be found.
pub(crate) fn command() -> Result<Command, Failure> {
    let mut command = Command::new(this_program()?);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("LEDGERD_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    Ok(command)
}

/// One process, and all that it starts in its group.
pub(crate) struct Process {
    child: Child,
    group: Pid,
    guard: Guard,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts it; what it prints goes to `stdout` and `stderr`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start(
        mut command: Command,
        stdout: File,
        stderr: File,
        guard: &Guard,
    ) -> Result<Self, Failure> {
        let child = command
            .stdout(stdout)
            .stderr(stderr)
            .process_group(0)
            .spawn()
            .map_err(|error| cannot("start a process", &error))?;
        let number = i32::try_from(child.id()).expect("process numbers fit");
        guard.joined(number);
        let group = Pid::from_raw(number).expect("process numbers are positive");
        Ok(Self { child, group, guard: guard.clone(), status: None })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, when it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            self.guard.left(self.group.as_raw_nonzero().get());
            self.status = Some(status);
        }
        self.status
    }

    /// Ends it with SIGKILL. Waits for it: that is a matter of a moment, and files can be removed afterwards.
    pub(crate) fn kill(&mut self) {
        if self.ended().is_some() {
            return;
        }
        // Not reaped yet, so the group's number belongs to nobody else.
        let _ = kill_process_group(self.group, Signal::KILL);
        self.guard.left(self.group.as_raw_nonzero().get());
        self.status = self.child.wait().ok();
    }

    /// Asks it to end, and ends it when `patience` is over.
    pub(crate) async fn stop(&mut self, patience: Duration) {
        if self.ended().is_none() {
            let _ = kill_process(self.group, Signal::TERM);
        }
        let end = Instant::now() + patience;
        while self.ended().is_none() && Instant::now() < end {
            sleep(LOOK).await;
        }
        self.kill();
    }

    /// Leaves it running when this process ends.
    pub(crate) fn let_go(mut self) {
        if self.ended().is_none() {
            self.guard.left(self.group.as_raw_nonzero().get());
            std::mem::forget(self);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A daemon that listens on a port of its own choice.
pub(crate) struct Daemon {
    pub(crate) process: Process,
    pub(crate) address: String,
    pub(crate) log: PathBuf,
}

impl Daemon {
    /// Starts a daemon and waits until it listens. Its log is in the data directory.
    ///
    /// # Errors
    /// When it does not listen within half a minute, with what it said.
    pub(crate) async fn start(data_dir: &Path, store: Option<&str>, guard: &Guard) -> Result<Self, Failure> {
        Self::start_at("127.0.0.1:0", data_dir, store, guard).await
    }

    /// As [`start`](Self::start) without a store's URL, with these variables in its environment.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub(crate) async fn start_with(
        variables: &[(&str, &str)],
        data_dir: &Path,
        guard: &Guard,
    ) -> Result<Self, Failure> {
        let mut command = command()?;
        command.envs(variables.iter().copied());
        Self::run(command, "127.0.0.1:0", data_dir, None, guard).await
    }

    /// As [`start`](Self::start), at this address. The log of an earlier daemon in the data directory is continued.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub(crate) async fn start_at(
        listen: &str,
        data_dir: &Path,
        store: Option<&str>,
        guard: &Guard,
    ) -> Result<Self, Failure> {
        Self::run(command()?, listen, data_dir, store, guard).await
    }

    async fn run(
        mut command: Command,
        listen: &str,
        data_dir: &Path,
        store: Option<&str>,
        guard: &Guard,
    ) -> Result<Self, Failure> {
        let (log, said) = (data_dir.join("ledgerd.log"), data_dir.join("ledgerd.out"));
        let append = |file: &Path| File::options().create(true).append(true).open(file);
        let files = fs::create_dir_all(data_dir).and_then(|()| Ok((File::create(&said)?, append(&log)?)));
        let (stdout, stderr) =
            files.map_err(|error| cannot(&format!("write to {}", data_dir.display()), &error))?;
        command.args(["serve", "--listen", listen, "--http-listen", "off", "--data-dir"]).arg(data_dir);
        if let Some(store) = store {
            command.args(["--store", store]);
        }
        // Standard output is a file as well: the end of a pipe would close with us, and a daemon that stays must not
        // fail to print.
        let mut process = Process::start(command, stdout, stderr, guard)?;
        let end = Instant::now() + START;
        loop {
            let status = process.ended();
            if let Some(address) = listening(&fs::read_to_string(&said).unwrap_or_default()) {
                return Ok(Self { process, address: address.into(), log });
            }
            let why = match status {
                Some(status) => format!("it ended with {status}"),
                None if Instant::now() > end => "it does not listen".into(),
                None => {
                    sleep(LOOK).await;
                    continue;
                }
            };
            return Err(Failure::new(
                Exit::Failure,
                format!("the daemon did not start: {why}{}", last_words(&log)),
            ));
        }
    }

    /// The failure of what was done with this daemon: when the daemon has ended, that is what is to be told.
    pub(crate) fn blame(&mut self, failure: Failure) -> Failure {
        match self.process.ended() {
            Some(status) => {
                let last = last_words(&self.log);
                Failure::new(
                    Exit::Failure,
                    format!("the daemon ended with {status} while it was needed{last}"),
                )
            }
            None => failure.at(&self.address),
        }
    }
}

fn listening(said: &str) -> Option<&str> {
    // Only whole lines: the rest of the port may still be on its way.
    let (line, _) = said.split_once('\n')?;
    line.strip_prefix(LISTENING).map(str::trim)
}

fn last_words(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
    last.iter().fold(String::new(), |all, line| all + "\n  " + &crate::output::one_line(line))
}

impl Failure {
    /// Told of this address, whatever address the command line named.
    pub(crate) fn at(self, address: &str) -> Self {
        match self {
            Self::Unreachable(_) => Self::new(Exit::Unreachable, self.sentence(address).unwrap_or_default()),
            other => other,
        }
    }
}

/// A failure of the operating system's.
pub(crate) fn cannot(what: &str, error: &io::Error) -> Failure {
    Failure::new(Exit::Failure, format!("cannot {what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_taken_from_a_whole_line() {
        assert_eq!(listening("ledgerd listening on 127.0.0.1:4100\nmore\n"), Some("127.0.0.1:4100"));
        assert_eq!(listening("ledgerd listening on 127.0.0.1:41"), None);
        assert_eq!(listening("something else\n"), None);
        assert_eq!(listening(""), None);
    }

    #[test]
    fn last_words_are_the_end_of_the_log() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        assert_eq!(last_words(&log), "");
        fs::write(&log, "1\n2\n3\n\n4\n5\n\u{1b}[31m6\n").expect("written");
        assert_eq!(last_words(&log), "\n  2\n  3\n  4\n  5\n  \\u{1b}[31m6");
    }
}
