//! Gives back the room of payloads that are nobody's any more.
//!
//! Compares the rows that name a file with the file, so it needs no memory of its own: what a crash left behind is found at the next
//! start. Invariants: a file is looked at when it is closed, and its last row committed; nothing goes while somebody reads rows of
//! before in one long transaction, which holds a lock on the data directory; at most one sweep at a time.

use super::open::{BUSY, PRAGMAS};
use super::payloads::{Folder, PAGE};
use ledger_core::Timestamp;
use rusqlite::{Connection, OpenFlags};
use rustix::fs::{FallocateFlags, fallocate};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;

/// Time between two sweeps, and what one of them looks at.
const EVERY: Duration = Duration::from_secs(10);
const FILES: usize = 256;
/// Bytes that are nobody's from which on a file is worth a look at its holes.
const WORTH: u64 = 1 << 20;

const LIVE: &str = "SELECT at, length FROM payload_places WHERE file = ? ORDER BY at";

/// The newest file that a row names.
pub(super) const NEWEST_FILE: &str = "SELECT COALESCE(MAX(file), 0) FROM payload_places";

/// Both, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 2] = [LIVE, NEWEST_FILE];

/// Keeps what no row names from going, for as long as it is held: for a reader whose transaction sees rows of before.
///
/// # Errors
/// That the directory cannot be opened or locked.
pub(super) fn hold(dir: &Path) -> io::Result<File> {
    let dir = File::open(dir)?;
    dir.lock_shared()?;
    Ok(dir)
}

/// See the module.
pub(super) struct Sweeper {
    own: Arc<Mutex<Own>>,
    /// Files that have less in them than when they were looked at, if they ever were.
    left: Arc<Mutex<BTreeSet<u64>>>,
    closed_below: Arc<AtomicU64>,
    last: Option<Timestamp>,
    running: Option<JoinHandle<()>>,
}

struct Own {
    dir: PathBuf,
    folder: Folder,
    conn: Connection,
}

impl Sweeper {
    /// For the ledger at `path`. All files that are there are looked at.
    pub(super) fn open(path: &Path, folder: Folder, closed_below: Arc<AtomicU64>) -> rusqlite::Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = Connection::open_with_flags(path, flags)?;
        conn.busy_timeout(BUSY)?;
        for (name, value) in PRAGMAS {
            conn.pragma_update(None, name, value)?;
        }
        let left = match folder.files() {
            Ok(files) => files.into_iter().map(|(number, _)| number).collect(),
            Err(error) => {
                tracing::warn!(%error, "the files of payloads cannot be listed; none gives its room back");
                BTreeSet::new()
            }
        };
        let dir = path.parent().unwrap_or_else(|| Path::new(".")).to_owned();
        let own = Arc::new(Mutex::new(Own { dir, folder, conn }));
        Ok(Self { own, left: Arc::new(Mutex::new(left)), closed_below, last: None, running: None })
    }

    /// These have less in them than before, and that is durable.
    pub(super) fn left(&self, files: BTreeSet<u64>) {
        if !files.is_empty() {
            lock(&self.left).extend(files);
        }
    }

    /// Starts a sweep when it is time and there is something to look at.
    pub(super) fn start(&mut self, now: Timestamp) {
        // A clock that was set back is no reason to wait.
        let soon = |last: Timestamp| now >= last && now.since(last) < EVERY;
        let runs = self.running.as_ref().is_some_and(|running| !running.is_finished());
        if self.last.is_some_and(soon) || runs || self.due().is_empty() {
            return;
        }
        self.last = Some(now);
        let (own, left, due) = (Arc::clone(&self.own), Arc::clone(&self.left), self.due());
        self.running = Some(tokio::task::spawn_blocking(move || lock(&own).sweep(&due, &left)));
    }

    /// Files to look at: those that are closed. Before any row is read, so that all of what is in them is in rows by then.
    fn due(&self) -> Vec<u64> {
        let closed_below = self.closed_below.load(Ordering::Acquire);
        lock(&self.left).range(..closed_below).take(FILES).copied().collect()
    }

    /// Sweeps now, whatever was before.
    #[cfg(test)]
    pub(super) fn now(&self) {
        lock(&self.own).sweep(&self.due(), &self.left);
    }

    /// Waits for the one that runs.
    pub(super) async fn close(self) {
        if let Some(running) = self.running {
            // An error is a panic, which was told.
            let _ = running.await;
        }
    }
}

impl Own {
    fn sweep(&self, files: &[u64], left: &Mutex<BTreeSet<u64>>) {
        // Held until the end: whoever comes to read a long time waits for this.
        let _alone = match self.alone() {
            Ok(Some(dir)) => dir,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "the data directory cannot be locked; payloads keep their room");
                return;
            }
        };
        for file in files {
            // Before its rows are read: what leaves it from now on is told anew.
            lock(left).remove(file);
            if let Err(error) = self.give_back(*file) {
                tracing::warn!(file = %self.folder.path(*file).display(), %error, "its room cannot be given back");
            }
        }
    }

    /// The lock, if nobody holds it.
    fn alone(&self) -> io::Result<Option<File>> {
        let dir = File::open(&self.dir)?;
        match dir.try_lock() {
            Ok(()) => Ok(Some(dir)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Removes a file that nothing is left of, or makes holes where nothing is.
    fn give_back(&self, file: u64) -> io::Result<()> {
        let live = self.live(file).map_err(io::Error::other)?;
        let path = self.folder.path(file);
        if live.is_empty() {
            return match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&path)?;
        let found = file.metadata()?;
        let kept: u64 = live.iter().map(|(_, length)| length).sum();
        if found.blocks() * 512 < kept + WORTH {
            return Ok(());
        }
        let mut from = 0;
        for (at, length) in live {
            hole(&file, from, at)?;
            from = at + length;
        }
        hole(&file, from, found.len())
    }

    /// Where something of this file is somebody's, and how much.
    fn live(&self, file: u64) -> rusqlite::Result<Vec<(u64, u64)>> {
        let mut live = self.conn.prepare_cached(LIVE)?;
        let place = |row: &rusqlite::Row<'_>| {
            Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get::<_, i64>(1)?.cast_unsigned()))
        };
        live.query_map([file.cast_signed()], place)?.collect()
    }
}

/// Gives back the pages of which nothing is before `from` or after `to`.
fn hole(file: &File, from: u64, to: u64) -> io::Result<()> {
    let (from, to) = (from.next_multiple_of(PAGE), to - to % PAGE);
    if from >= to {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, from, to - from) {
        // A file system without holes: the room comes back with the whole file.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        done => Ok(done?),
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
