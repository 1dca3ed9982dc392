//! The guard: a second process that ends the worker's children when the worker is gone, however it went.
//!
//! A worker that is killed with SIGKILL runs no line of code any more, so somebody else must act. The guard is this
//! same binary started anew with a hidden subcommand. It holds one end of a socket whose other end only the worker has;
//! the kernel closes that end with the worker, whatever ended it, and the guard then kills every process group that it
//! was told of. One guard serves a worker, so a task costs no second process.
//!
//! Two simpler ways were refused. `PR_SET_PDEATHSIG` reaches only the direct child, not what the child started, and is
//! tied to the *thread* that spawned it. A supervisor around each child would have to forward streams, signals and exit
//! codes, and its own death would be mistaken for the child's.
//!
//! What must hold, and how:
//! - *No child runs unknown to the guard.* The child itself sends its group number, between fork and exec. Until the
//!   exec it holds a copy of the worker's end, so even when the worker dies in that moment the guard reads the number
//!   before it reads the end.
//! - *No stranger is killed.* A group is struck off before its leader is reaped; until then its number is not reused.
//! - *The guard outlives what kills the worker's group* (ctrl-C, `kill -9 -GROUP`): it is a session of its own.
//! - *A guard that was killed itself is replaced*, and is told all live groups, before the next child starts and as
//!   soon as its end is noticed.
//!
//! Out of reach: a descendant that leaves its process group (setsid) on purpose.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::sockopt::socket_type;
use rustix::net::{RecvFlags, SendFlags, recv};
use rustix::process::{Pid, Signal, kill_process_group, setsid};
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::{Exit, Failure};

/// One record on the socket: positive for a group that begins, negative for one that ended. Small writes to a stream
/// socket are whole, so records of many children never interleave.
pub(crate) fn record(group: i32) -> [u8; 4] {
    group.to_ne_bytes()
}

/// Makes the command that becomes a guard: it must call [`serve`] with its standard input.
pub(crate) type MakeCommand = Box<dyn Fn() -> io::Result<Command> + Send>;

/// The worker's side.
#[derive(Clone)]
pub(crate) struct Guard(Arc<Mutex<Inner>>);

struct Inner {
    make: MakeCommand,
    socket: UnixStream,
    process: Child,
    /// Rises with each guard, so that who notices an end late does not end the next one.
    generation: u64,
    live: HashSet<i32>,
}

impl Guard {
    /// Starts the guard and waits until it stands on its own.
    ///
    /// # Errors
    /// When the process cannot start.
    pub(crate) fn start(make: MakeCommand) -> io::Result<Self> {
        let (socket, process) = launch(&make)?;
        let inner = Inner { make, socket, process, generation: 0, live: HashSet::new() };
        let guard = Self(Arc::new(Mutex::new(inner)));
        guard.watch()?;
        Ok(guard)
    }

    /// The socket that a child about to exec announces itself on. When the guard is gone, a new one comes first.
    ///
    /// # Errors
    /// When no guard can be had; a child must not start then.
    pub(crate) fn socket(&self) -> io::Result<OwnedFd> {
        let mut inner = self.lock();
        if is_closed(&inner.socket) {
            inner.replace()?;
            drop(inner);
            self.watch()?;
            inner = self.lock();
        }
        Ok(inner.socket.try_clone()?.into())
    }

    /// Remembers a group, so that the next guard is told of it. This one is told again: it may have taken its place
    /// between the child's own word, which then went nowhere, and this call.
    pub(crate) fn joined(&self, group: i32) {
        let mut inner = self.lock();
        inner.live.insert(group);
        let _ = send(&inner.socket, group);
    }

    /// Strikes a group off. Call it before its leader is reaped.
    pub(crate) fn left(&self, group: i32) {
        let mut inner = self.lock();
        inner.live.remove(&group);
        // A guard that is gone needs no telling, and the next one is not told of this group.
        let _ = send(&inner.socket, -group);
    }

    /// The process number of the guard.
    #[cfg(test)]
    pub(crate) fn process(&self) -> i32 {
        i32::try_from(self.lock().process.id()).expect("process numbers fit")
    }

    /// Replaces the guard as soon as it ends. It never writes after its first byte, so a read returns only then.
    fn watch(&self) -> io::Result<()> {
        let (mut socket, mut generation) = {
            let inner = self.lock();
            (inner.socket.try_clone()?, inner.generation)
        };
        let inner = Arc::downgrade(&self.0);
        let watcher = move || {
            loop {
                let _ = socket.read(&mut [0]);
                let Some(inner) = inner.upgrade() else { return };
                let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
                // Somebody who was about to start a child noticed first, and set up another watcher.
                if inner.generation != generation {
                    return;
                }
                // When this fails, the next child fails to start and says why.
                let Ok(()) = inner.replace() else { return };
                let Ok(clone) = inner.socket.try_clone() else { return };
                (socket, generation) = (clone, inner.generation);
            }
        };
        std::thread::Builder::new().name("guard-watch".into()).stack_size(128 * 1024).spawn(watcher)?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn replace(&mut self) -> io::Result<()> {
        // Its socket is closed, so it has ended or is about to.
        let _ = self.process.wait();
        let (socket, process) = launch(&self.make)?;
        for group in &self.live {
            send(&socket, *group)?;
        }
        self.socket = socket;
        self.process = process;
        self.generation += 1;
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The guard ends with the socket; waiting for it keeps it from becoming a zombie of a longer-lived program.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let _ = self.process.wait();
    }
}

fn launch(make: &MakeCommand) -> io::Result<(UnixStream, Child)> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let process = make()?.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    // Ready when it says so: before that it still is in the worker's group and could be killed with it.
    ours.read_exact(&mut [0])?;
    Ok((ours, process))
}

/// Asks the socket and not the process: it closes a moment before the process can be waited for.
fn is_closed(socket: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    !matches!(recv(socket.as_fd(), &mut [0u8; 1][..], flags), Err(Errno::AGAIN))
}

fn send(socket: &UnixStream, group: i32) -> io::Result<()> {
    // Through rustix for MSG_NOSIGNAL: a guard that is gone is an error here and not a SIGPIPE.
    rustix::net::send(socket.as_fd(), &record(group), SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The hidden command: what the second process does.
///
/// # Errors
/// When standard input is not a worker's socket.
pub(crate) async fn run() -> Result<(), Failure> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    if socket_type(&socket).is_err() {
        return Err(Failure::usage("this is started by `ledgerd worker exec`, not by hand"));
    }
    // A stop of the service reaches all its processes. The worker drains then and needs its guard to the end, so the
    // guard is deaf: it ends with the worker.
    let _deaf = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    match tokio::task::spawn_blocking(move || serve(socket)).await {
        Ok(served) => Ok(served?),
        Err(error) => Err(Failure::new(Exit::Failure, error.to_string())),
    }
}

/// The command that starts a guard.
///
/// # Errors
/// When this program's own file cannot be found.
pub(crate) fn command() -> io::Result<Command> {
    // The link leads to this program even after its file was replaced by an upgrade.
    let link = Path::new("/proc/self/exe");
    let program = if link.exists() { link.to_owned() } else { std::env::current_exe()? };
    let mut command = Command::new(program);
    command.arg0("ledgerd").args(["worker", "exec-guard"]);
    Ok(command)
}

/// The guard's side: reads records until the worker is gone, then kills what is left.
///
/// # Errors
/// When `socket` is not the worker's socket.
pub(crate) fn serve(socket: OwnedFd) -> io::Result<()> {
    // Fails for a process that leads a group already (started by hand from a shell); it is in no one's way then.
    let _ = setsid();
    let mut socket = UnixStream::from(socket);
    socket.write_all(&[1])?;
    let mut groups = HashSet::new();
    let mut bytes = [0; 4];
    while socket.read_exact(&mut bytes).is_ok() {
        let group = i32::from_ne_bytes(bytes);
        if group > 1 {
            groups.insert(group);
        } else {
            groups.remove(&-group);
        }
    }
    for group in groups {
        if let Some(group) = Pid::from_raw(group) {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
    Ok(())
}
