//! Room that is kept for the day on which the disk is full.
//!
//! A file of no use, given up when a commit does not fit: what workers have done can be recorded then, and the log be moved into
//! the database. Invariant: while there is no such file the ledger takes no new tasks, so what it frees goes to those that it has.

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ledger_core::Timestamp;

/// In the data directory.
const NAME: &str = "ledger.ballast";
/// How often to look for room again.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes written at once where room cannot be asked for.
const PIECE: usize = 1 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Ballast {
    path: PathBuf,
    /// None are kept where this is 0, and new tasks always taken.
    bytes: u64,
    is_there: bool,
    /// When it was last looked for room.
    looked: Option<Timestamp>,
}

impl Ballast {
    /// The file in `dir`, made when there is room.
    pub(super) fn open(dir: &Path, bytes: u64) -> Self {
        let path = dir.join(NAME);
        let is_there =
            bytes == 0 || path.symlink_metadata().is_ok_and(|found| found.is_file() && found.len() == bytes);
        let mut ballast = Self { path, bytes, is_there, looked: None };
        if !ballast.is_there && !ballast.make() {
            tracing::warn!(
                need_bytes = 2 * bytes,
                "the disk is nearly full: no new tasks are taken until there is room"
            );
        }
        ballast
    }

    /// Whether it was given up.
    pub(super) const fn is_gone(&self) -> bool {
        !self.is_there
    }

    /// Gives it up, for the disk is full; whether there was one.
    pub(super) fn give_up(&mut self) -> bool {
        if self.bytes == 0 || !self.is_there {
            return false;
        }
        self.is_there = false;
        match fs::remove_file(&self.path) {
            Ok(()) => {
                tracing::warn!(
                    freed_bytes = self.bytes,
                    "the disk is full: no new tasks are taken, what runs is still recorded; make room"
                );
                true
            }
            Err(error) => {
                tracing::warn!(%error, "the disk is full, and the ballast cannot be given up");
                false
            }
        }
    }

    /// Makes it again when there is room, looking once a second at most.
    pub(super) fn restore(&mut self, now: Timestamp) {
        // A clock that was set back is no reason to wait.
        let soon = |looked: Timestamp| now >= looked && now.since(looked) < LOOK;
        if self.is_there || self.looked.is_some_and(soon) {
            return;
        }
        self.looked = Some(now);
        if self.make() {
            tracing::info!("the disk has room again: new tasks are taken");
        }
    }

    /// Twice the room must be free: what it takes itself, and as much for what comes, or it would be given up at once.
    fn make(&mut self) -> bool {
        let free = self.path.parent().map_or(Ok(0), free_bytes);
        if free.is_ok_and(|free| free < 2 * self.bytes) {
            return false;
        }
        match self.fill() {
            Ok(()) => self.is_there = true,
            Err(error) => {
                tracing::debug!(%error, "no ballast can be made");
                let _ = fs::remove_file(&self.path);
            }
        }
        self.is_there
    }

    fn fill(&self) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(super::open::MODE)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&self.path)?;
        match fallocate(&file, FallocateFlags::empty(), 0, self.bytes) {
            Ok(()) => Ok(()),
            // A file system that promises no room: bytes take some.
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let piece = vec![0xA5; PIECE];
                let mut left = self.bytes;
                while left > 0 {
                    let part = piece.len().min(usize::try_from(left).unwrap_or(PIECE));
                    file.write_all(&piece[..part])?;
                    left -= part as u64;
                }
                file.sync_all()
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let found = fstatvfs(File::open(dir)?)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_given_up_and_made_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join(NAME);
        let mut ballast = Ballast::open(dir.path(), 1 << 20);
        assert!(!ballast.is_gone());
        assert_eq!(file.metadata().expect("it is there").len(), 1 << 20);
        assert!(ballast.give_up());
        assert!(ballast.is_gone() && !file.exists());
        assert!(!ballast.give_up(), "there is nothing left to give up");
        ballast.restore(Timestamp::from_millis(1_000));
        assert!(!ballast.is_gone() && file.exists());
        // Twice in a second is not looked for.
        assert!(ballast.give_up());
        ballast.restore(Timestamp::from_millis(1_500));
        assert!(ballast.is_gone());
        ballast.restore(Timestamp::from_millis(2_000));
        assert!(!ballast.is_gone());
    }

    #[test]
    fn none_is_kept_where_none_is_wanted_and_none_is_made_without_room() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut none = Ballast::open(dir.path(), 0);
        assert!(!none.is_gone() && !none.give_up());
        let huge = Ballast::open(dir.path(), 1 << 60);
        assert!(huge.is_gone() && !dir.path().join(NAME).exists());
    }
}
