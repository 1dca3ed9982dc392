//! One run of a program: its process group, its streams, its end.
//!
//! The child leads a process group of its own, so that a stop reaches all that it started. Its leader is waited for
//! without being reaped, then the rest of the group is killed, then it is struck off the guard's list, and only then is
//! it reaped: as long as the leader is a zombie its number belongs to nobody else, so a signal to the group can never
//! hit a stranger. What a program leaves running behind itself ends with it: the task is over, and nothing may hold its
//! output open.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

use crate::guard::{Guard, record};
use crate::tail::Tail;

/// How much of standard output is the result: the ledger's limit.
pub(crate) const RESULT_LIMIT: usize = 1024 * 1024;
/// How much of standard error is kept as the detail of a failure: the ledger's limit.
pub(crate) const DETAIL_LIMIT: usize = 16 * 1024;
/// How long output is awaited after the whole group was killed. Only a descendant that left the group can still hold
/// the pipes open, and it must not hold the task as well.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What to run.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    pub(crate) program: &'a OsStr,
    pub(crate) args: Vec<String>,
    /// Variables set, or taken out of what is inherited.
    pub(crate) env: Vec<(&'static str, Option<String>)>,
    pub(crate) stdin: bytes::Bytes,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct Ended<S> {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Tail,
    pub(crate) stderr: Tail,
    /// Why it was asked to end, if it was.
    pub(crate) stopped: Option<S>,
}

impl<S> Ended<S> {
    /// The exit code, or the signal that ended it.
    pub(crate) fn cause(&self) -> Cause {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => Cause::Code(code),
            (None, signal) => Cause::Signal(signal.unwrap_or(0)),
        }
    }
}

/// What ended a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Code(i32),
    Signal(i32),
}

/// Runs a program to its end. `stop` completing asks it to end: TERM to the group, KILL after `grace`.
///
/// # Errors
/// When it cannot be started.
pub(crate) async fn run<S>(
    run: Run<'_>,
    guard: &Guard,
    stop: impl Future<Output = S>,
    grace: Duration,
) -> io::Result<Ended<S>> {
    let mut spawned = spawn(run, guard)?;
    let mut stdout = Tail::new(RESULT_LIMIT);
    let mut stderr = Tail::new(DETAIL_LIMIT);
    let group = Arc::clone(&spawned.group.0);
    let mut stopped = None;
    let ended = {
        let streams = async {
            tokio::join!(
                feed(spawned.stdin, &spawned.payload),
                drain(spawned.stdout, &mut stdout),
                drain(spawned.stderr, &mut stderr)
            );
        };
        tokio::pin!(streams, stop);
        let mut streams_open = true;
        let ended = loop {
            tokio::select! {
                // What has ended by itself was not stopped.
                biased;
                ended = &mut spawned.ended => break ended,
                () = &mut streams, if streams_open => streams_open = false,
                why = &mut stop, if stopped.is_none() => {
                    stopped = Some(why);
                    group.signal(Signal::TERM);
                    // A group that is suspended would keep TERM pending for ever.
                    group.signal(Signal::CONT);
                    let group = Arc::clone(&group);
                    tokio::spawn(async move {
                        tokio::time::sleep(grace).await;
                        group.signal(Signal::KILL);
                    });
                }
            }
        };
        if streams_open {
            let _ = tokio::time::timeout(LAST_WORDS, streams).await;
        }
        ended
    };
    let status = ended.map_err(|_| io::Error::other("the thread that waits for the program is gone"))??;
    Ok(Ended { status, stdout, stderr, stopped })
}

struct Spawned {
    group: KillOnDrop,
    payload: bytes::Bytes,
    stdin: Option<tokio::process::ChildStdin>,
    stdout: Option<tokio::process::ChildStdout>,
    stderr: Option<tokio::process::ChildStderr>,
    ended: oneshot::Receiver<io::Result<ExitStatus>>,
}

fn spawn(run: Run<'_>, guard: &Guard) -> io::Result<Spawned> {
    let mut child = match start(&run, guard) {
        // The guard was killed between the look at it and the child's word to it; the next look finds a new one.
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            start(&run, guard)?
        }
        started => started?,
    };
    let number = i32::try_from(child.id()).expect("process numbers are positive and fit");
    guard.joined(number);
    let group = Arc::new(Group(Mutex::new(Pid::from_raw(number))));
    let kill = KillOnDrop(Arc::clone(&group));
    let (send, ended) = oneshot::channel();
    let streams = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    // A thread for each child: beside a whole process it is nothing, and it must not be one of the runtime's blocking
    // threads, whose number is limited, else the children beyond it would end unseen.
    let waiter = {
        let (group, guard) = (Arc::clone(&group), guard.clone());
        move || {
            let pid = Pid::from_raw(number).expect("process numbers are positive");
            while let Err(rustix::io::Errno::INTR) =
                waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
            {}
            group.signal(Signal::KILL);
            guard.left(number);
            group.close();
            let _ = send.send(child.wait());
        }
    };
    std::thread::Builder::new().name("child-wait".into()).stack_size(128 * 1024).spawn(waiter)?;
    Ok(Spawned {
        group: kill,
        payload: run.stdin,
        stdin: streams.0.map(tokio::process::ChildStdin::from_std).transpose()?,
        stdout: streams.1.map(tokio::process::ChildStdout::from_std).transpose()?,
        stderr: streams.2.map(tokio::process::ChildStderr::from_std).transpose()?,
        ended,
    })
}

fn start(run: &Run<'_>, guard: &Guard) -> io::Result<Child> {
    let mut command = Command::new(run.program);
    command.args(&run.args);
    for (name, value) in &run.env {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    announce(&mut command, guard.socket()?);
    command.spawn()
}

/// Has the child tell the guard its group before it becomes the program.
#[expect(unsafe_code, reason = "only code between fork and exec can announce a child before it runs")]
fn announce(command: &mut Command, socket: OwnedFd) {
    let tell = move || {
        // The group number is the child's own process number: `process_group(0)` was applied before this.
        let group = rustix::process::getpid().as_raw_nonzero().get();
        let sent = rustix::net::send(socket.as_fd(), &record(group), rustix::net::SendFlags::NOSIGNAL);
        sent.map(|_| ()).map_err(io::Error::from)
    };
    // SAFETY: between fork and exec of a program with threads only async-signal-safe calls are allowed: no allocation,
    // no lock. `tell` makes two system calls, getpid and sendto, directly, on a descriptor that it owns and on bytes on
    // its stack; an `io::Error` made from an error number does not allocate. MSG_NOSIGNAL matters: SIGPIPE is at its
    // default here, and would look like a program that died of it.
    unsafe { command.pre_exec(tell) };
}

/// A process group that may be signalled as long as its leader is not reaped.
#[derive(Debug)]
struct Group(Mutex<Option<Pid>>);

impl Group {
    fn signal(&self, signal: Signal) {
        let pid = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = *pid {
            // The group may be empty but for the zombie; nothing to do then.
            let _ = kill_process_group(pid, signal);
        }
    }

    fn close(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// When a run is dropped half-way its group must not go on; when it has ended this does nothing.
struct KillOnDrop(Arc<Group>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.0.signal(Signal::KILL);
    }
}

/// A program need not read its input: what it leaves unread is nobody's error.
async fn feed(stdin: Option<tokio::process::ChildStdin>, payload: &[u8]) {
    if let Some(mut stdin) = stdin {
        let _ = stdin.write_all(payload).await;
    }
}

/// Reads to the end, keeping the tail: a program is never stopped by a full pipe.
async fn drain(stream: Option<impl AsyncRead + Unpin>, tail: &mut Tail) {
    let Some(mut stream) = stream else { return };
    let mut chunk = vec![0; 64 * 1024];
    while let Ok(count) = stream.read(&mut chunk).await {
        if count == 0 {
            return;
        }
        tail.push(&chunk[..count]);
    }
}

#[cfg(test)]
#[path = "child_tests.rs"]
pub(crate) mod tests;
