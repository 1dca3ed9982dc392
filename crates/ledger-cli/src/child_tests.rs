//! Real programs, real signals. A named pipe tells what no exit code can: it stays open as long as any process of a
//! group lives, so its end is the end of all of them.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::*;
use crate::guard;

const LONG: Duration = Duration::from_secs(60);
const SH: &str = "/bin/sh";

/// A guard that is this test binary, started anew with nothing but [`act_as_guard`] to run.
pub(crate) fn guard() -> Guard {
    Guard::start(guard_command()).expect("a guard")
}

pub(crate) fn guard_command() -> guard::MakeCommand {
    Box::new(|| Ok(this_binary("act_as_guard")))
}

fn this_binary(entry: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.args(["--exact", &format!("child::tests::{entry}"), "--ignored", "--nocapture"]);
    command
}

#[test]
#[ignore = "the second process of other tests"]
fn act_as_guard() {
    guard::serve(std::io::stdin().as_fd().try_clone_to_owned().expect("standard input")).expect("served");
}

fn sh(script: &str) -> Run<'static> {
    sh_with(script, "")
}

fn sh_with(script: &str, stdin: &str) -> Run<'static> {
    Run {
        program: OsStr::new(SH),
        args: vec!["-c".into(), script.into()],
        env: vec![],
        stdin: stdin.to_owned().into(),
    }
}

async fn run_to_end(run: Run<'_>, guard: &Guard) -> Ended<()> {
    timeout(LONG, super::run(run, guard, std::future::pending(), LONG))
        .await
        .expect("it ends")
        .expect("it starts")
}

/// A named pipe whose readers wait for its writers.
pub(crate) struct Fifo(tempfile::TempDir);

impl Fifo {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mode = Mode::from_raw_mode(0o600);
        mknodat(CWD, folder.path().join("fifo"), FileType::Fifo, mode, 0).expect("a pipe");
        Self(folder)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("fifo")
    }

    /// Shell that holds the pipe open in all that follows, and says so.
    pub(crate) fn hold(&self) -> String {
        hold(&self.path())
    }

    /// The first line, then the end: when everybody who held the pipe is gone.
    pub(crate) fn watch(&self) -> (oneshot::Receiver<String>, oneshot::Receiver<()>) {
        let (say_line, line) = oneshot::channel();
        let (say_end, end) = oneshot::channel();
        let path = self.path();
        std::thread::spawn(move || {
            let mut pipe = BufReader::new(std::fs::File::open(path).expect("the pipe opens"));
            let mut first = String::new();
            pipe.read_line(&mut first).expect("a line");
            let _ = say_line.send(first.trim().to_owned());
            let _ = pipe.read_to_end(&mut Vec::new());
            let _ = say_end.send(());
        });
        (line, end)
    }
}

fn hold(path: &Path) -> String {
    format!("exec 3>{}; echo ready >&3; ", path.display())
}

pub(crate) async fn within<T>(event: oneshot::Receiver<T>) -> T {
    timeout(LONG, event).await.expect("it happens").expect("its sender lives")
}

#[tokio::test]
async fn input_output_and_code_pass_through() {
    let ended = run_to_end(sh_with("cat; echo oops >&2; exit 3", "payload"), &guard()).await;
    assert_eq!(ended.cause(), Cause::Code(3));
    assert_eq!((ended.stdout.bytes(), ended.stderr.bytes()), (&b"payload"[..], &b"oops\n"[..]));
    assert_eq!(ended.stopped, None);
}

#[tokio::test]
async fn a_signal_is_not_a_code() {
    assert_eq!(run_to_end(sh("kill -9 $$"), &guard()).await.cause(), Cause::Signal(9));
}

#[tokio::test]
async fn output_beyond_the_limit_is_its_end() {
    let ended = run_to_end(sh("head -c 5000000 /dev/zero | tr '\\0' x; echo end"), &guard()).await;
    assert_eq!(ended.stdout.seen(), 5_000_004);
    let result = ended.stdout.into_marked();
    assert!(result.len() <= RESULT_LIMIT && result.len() > RESULT_LIMIT - 8);
    assert!(result.starts_with(b"[ledgerd: ") && result.ends_with(b"xxend\n"));
}

#[tokio::test]
async fn input_that_is_not_read_is_no_error() {
    let ended = run_to_end(sh_with("exit 0", &"x".repeat(1_000_000)), &guard()).await;
    assert_eq!(ended.cause(), Cause::Code(0));
}

#[tokio::test]
async fn variables_are_set_and_taken_out() {
    let mut run = sh("echo \"$LEDGERD_TASK_ID:${HOME-none}\"");
    run.env = vec![("LEDGERD_TASK_ID", Some("t1".into())), ("HOME", None)];
    assert_eq!(run_to_end(run, &guard()).await.stdout.bytes(), b"t1:none\n");
}

#[tokio::test]
async fn what_a_program_leaves_behind_ends_with_it() {
    let fifo = Fifo::new();
    let (ready, gone) = fifo.watch();
    // The sleeper keeps standard output open; waiting for its end would take a thousand seconds.
    let script = fifo.hold() + "(trap '' TERM HUP; sleep 1000) & echo done";
    let ended = run_to_end(sh(&script), &guard()).await;
    assert_eq!((ended.cause(), ended.stdout.bytes()), (Cause::Code(0), &b"done\n"[..]));
    within(ready).await;
    within(gone).await;
}

#[tokio::test]
async fn a_stop_is_term_to_the_whole_group() {
    let fifo = Fifo::new();
    let (ready, gone) = fifo.watch();
    let script = fifo.hold() + "sleep 1000 & sleep 1000; wait";
    let ended =
        timeout(LONG, super::run(sh(&script), &guard(), ready, LONG)).await.expect("it ends").expect("runs");
    assert_eq!(ended.cause(), Cause::Signal(15));
    assert!(ended.stopped.is_some());
    within(gone).await;
}

#[tokio::test]
async fn a_suspended_group_is_woken_to_stop() {
    let fifo = Fifo::new();
    let (ready, gone) = fifo.watch();
    let script = fifo.hold() + "kill -STOP $$; sleep 1000";
    let ended =
        timeout(LONG, super::run(sh(&script), &guard(), ready, LONG)).await.expect("it ends").expect("runs");
    assert_eq!(ended.cause(), Cause::Signal(15));
    within(gone).await;
}

#[tokio::test]
async fn a_group_that_does_not_heed_term_is_killed_after_the_grace() {
    let fifo = Fifo::new();
    let (ready, gone) = fifo.watch();
    let script = format!("trap 'echo asked' TERM; {} while :; do sleep 1000; done", fifo.hold());
    let grace = Duration::from_millis(200);
    let ended =
        timeout(LONG, super::run(sh(&script), &guard(), ready, grace)).await.expect("it ends").expect("runs");
    assert_eq!(ended.cause(), Cause::Signal(9));
    within(gone).await;
}

#[tokio::test]
async fn a_dropped_run_takes_its_group_along() {
    let fifo = Fifo::new();
    let (ready, gone) = fifo.watch();
    let script = fifo.hold() + "trap '' TERM; sleep 1000 & sleep 1000; wait";
    let guard = guard();
    let running = tokio::spawn(async move {
        super::run(sh(&script), &guard, std::future::pending::<()>(), LONG).await.map(|ended| ended.cause())
    });
    within(ready).await;
    running.abort();
    within(gone).await;
}

#[tokio::test]
async fn what_cannot_start_is_an_error() {
    let missing = Run { program: OsStr::new("/nowhere/prog"), ..sh("") };
    let error = super::run(missing, &guard(), std::future::pending::<()>(), LONG).await.expect_err("missing");
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let long = sh(&"x".repeat(300_000));
    let error = super::run(long, &guard(), std::future::pending::<()>(), LONG).await.expect_err("too long");
    assert_eq!(error.kind(), io::ErrorKind::ArgumentListTooLong);
}

#[tokio::test]
async fn a_killed_guard_is_replaced_before_the_next_program() {
    let guard = guard();
    let first = guard.process();
    kill(first);
    // Killed is not yet gone: only once it is a zombie are its descriptors closed.
    let gone = async {
        while std::fs::read_to_string(format!("/proc/{first}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
        {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, gone).await.expect("the guard is gone");
    let ended = run_to_end(sh("exit 4"), &guard).await;
    assert_eq!(ended.cause(), Cause::Code(4));
    assert_ne!(guard.process(), first);
}

fn kill(pid: i32) {
    rustix::process::kill_process(Pid::from_raw(pid).expect("a process"), Signal::KILL).expect("killed");
}

/// A worker that is to be killed: it runs a program with a stubborn descendant and tells its guard's number. With
/// `LEDGERD_TEST_LOSE_GUARD` it first kills that guard and waits for the next one.
#[tokio::test]
#[ignore = "the second process of other tests"]
async fn act_as_owner() {
    let fifo = PathBuf::from(std::env::var_os("LEDGERD_TEST_FIFO").expect("a pipe"));
    let guard = guard();
    let lose = std::env::var_os("LEDGERD_TEST_LOSE_GUARD").is_some();
    let script = format!(
        "exec 3>{0}; (trap '' TERM HUP; sleep 1000) & (sleep 1000; true) & echo started; {1} echo ready >&3; wait",
        fifo.display(),
        if lose { "read line;" } else { "" },
    );
    if lose {
        let first = guard.process();
        // The program waits for input that comes only when the new guard is there.
        let (mut child, _spawned) = held(&script, &guard);
        kill(first);
        while guard.process() == first {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        child.write_all(b"go\n").await.expect("written");
        std::future::pending::<()>().await;
    }
    let _ = super::run(sh(&script), &guard, std::future::pending::<()>(), LONG).await;
}

fn held(script: &str, guard: &Guard) -> (tokio::process::ChildStdin, Spawned) {
    let mut spawned = spawn(sh(script), guard).expect("it starts");
    (spawned.stdin.take().expect("its input"), spawned)
}

async fn owner_is_killed(configure: impl FnOnce(&mut Command)) {
    let fifo = Fifo::new();
    let (ready, gone) = fifo.watch();
    let mut command = this_binary("act_as_owner");
    command
        .env("LEDGERD_TEST_FIFO", fifo.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    configure(&mut command);
    let mut owner = command.spawn().expect("an owner");
    let line = within(ready).await;
    assert_eq!(line, "ready");
    owner.kill().expect("SIGKILL, which no code of the owner sees");
    owner.wait().expect("it ended");
    within(gone).await;
}

#[tokio::test]
async fn a_killed_worker_takes_its_programs_and_their_descendants_along() {
    owner_is_killed(|_| {}).await;
}

#[tokio::test]
async fn a_worker_that_lost_its_guard_before_it_was_killed_does_so_too() {
    owner_is_killed(|command| {
        command.env("LEDGERD_TEST_LOSE_GUARD", "1");
    })
    .await;
}
