//! Large payloads, each written once: to the end of a file that has nothing else.
//!
//! In the database a payload is written twice, to the log and then to its pages, and bulk calls wait for the disk with that. Knows
//! nothing of SQL. Invariants: what a committed row names is on the disk before that commit, and never changes; a file grows in one
//! run of the daemon alone, and no batch is written to two of them; what no row names may go whenever nobody reads rows of before.

use bytes::Bytes;
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use twox_hash::XxHash3_64;

/// In the data directory.
pub(super) const FOLDER: &str = "ledger.payloads";
/// Bytes from which on a payload may be in a file.
pub(super) const LARGE: usize = 2 << 10;
/// Bytes of large payloads in one piece of a batch from which on they are: a flush of its own costs as much as writing these twice.
pub(super) const WORTH: usize = 256 << 10;
/// Bytes after which a file is followed by another.
const FILE: u64 = 64 << 20;
/// Each batch begins at a multiple of this: no page that has something committed is written again. Holes are made of whole ones.
pub(super) const PAGE: u64 = 4_096;
/// Bytes that are written at once, of payloads that have less.
const BUFFER: usize = 64 << 10;
const FOLDER_MODE: u32 = 0o750;

/// Where a payload is, as its row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) file: u64,
    pub(super) at: u64,
    pub(super) length: u64,
    /// XXH3 of its bytes.
    pub(super) digest: u64,
}

/// Where the files are. Makes nothing.
#[derive(Clone, Debug)]
pub(super) struct Folder(Arc<Path>);

impl Folder {
    /// That of a data directory.
    pub(super) fn of(dir: &Path) -> Self {
        Self(dir.join(FOLDER).into())
    }

    pub(super) fn path(&self, file: u64) -> PathBuf {
        self.0.join(format!("{file:08}"))
    }

    /// For who reads payloads one after the other.
    pub(super) const fn reading(self) -> Reading {
        Reading { folder: self, open: None }
    }

    /// Numbers of the files that are there, and the room that they take, in bytes.
    pub(super) fn files(&self) -> io::Result<Vec<(u64, u64)>> {
        use std::os::unix::fs::MetadataExt as _;
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry?;
            let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // One may go while they are listed.
            let Ok(found) = entry.metadata() else { continue };
            files.push((number, found.blocks() * 512));
        }
        Ok(files)
    }

    /// Makes it, where it is not there yet.
    fn make(&self) -> io::Result<()> {
        match DirBuilder::new().mode(FOLDER_MODE).create(&self.0) {
            Ok(()) => {
                fs::set_permissions(&self.0, Permissions::from_mode(FOLDER_MODE))?;
                self.0.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if self.0.symlink_metadata()?.is_dir() { Ok(()) } else { Err(error) }
            }
            Err(error) => Err(error),
        }
    }
}

/// Reads payloads. The file of the last one stays open, for the next one is mostly in the same.
#[derive(Debug)]
pub(super) struct Reading {
    folder: Folder,
    open: Option<(u64, File)>,
}

impl Reading {
    /// Reads a payload, and makes sure that it is the one that was written.
    ///
    /// # Errors
    /// That the file cannot be read, or `InvalidData`.
    pub(super) fn read(&mut self, place: Place) -> io::Result<Bytes> {
        let file = match &mut self.open {
            Some((number, file)) if *number == place.file => file,
            open => {
                let path = self.folder.path(place.file);
                let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
                &mut open.insert((place.file, file)).1
            }
        };
        let length = usize::try_from(place.length).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, place.at)?;
        if XxHash3_64::oneshot(&bytes) == place.digest {
            Ok(bytes.into())
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, "its bytes are not those that were written"))
        }
    }
}

/// The file that grows, of the one who writes.
#[derive(Debug)]
pub(super) struct Growing {
    folder: Folder,
    /// The first number that no file has.
    next: u64,
    open: Option<Open>,
    /// Bytes after which a file is followed by another.
    pub(super) most: u64,
    /// Whether a batch is to survive a power cut. For a test of just that.
    durable: bool,
    /// Files with less in them than before, not told of yet.
    left: BTreeSet<u64>,
    /// Every file below this number is closed, and the rows of all that is in it are committed.
    closed_below: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Open {
    file: File,
    number: u64,
    /// Where the next payload begins.
    end: u64,
    /// The same, of what is committed.
    kept: u64,
    /// There is what may not be on the disk.
    is_ahead: bool,
}

impl Growing {
    /// `next`: a number above that of every file that there is, or that a row names. Nothing is made before it is needed.
    pub(super) fn new(folder: Folder, next: u64, durable: bool) -> Self {
        let closed_below = Arc::new(AtomicU64::new(next));
        Self { folder, next, open: None, most: FILE, durable, left: BTreeSet::new(), closed_below }
    }

    /// Every file below this number is closed, and the rows of all that is in it are committed.
    pub(super) fn closed_below(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.closed_below)
    }

    /// Writes payloads of a batch; where they are. Not on the disk until [`Growing::sync`].
    pub(super) fn put<'p>(&mut self, payloads: impl Iterator<Item = &'p [u8]>) -> io::Result<Vec<Place>> {
        // Only between batches: the rows of those before are committed.
        if let Some(full) = self.open.take_if(|open| open.kept >= self.most && open.end == open.kept) {
            self.left.insert(full.number);
        }
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(begin(&self.folder, &mut self.next, &self.closed_below)?),
        };
        open.is_ahead = true;
        open.file.seek(SeekFrom::Start(open.end))?;
        // Large ones go past it.
        let mut file = BufWriter::with_capacity(BUFFER, &open.file);
        let mut places = Vec::new();
        for bytes in payloads {
            file.write_all(bytes)?;
            let (at, length) = (open.end, bytes.len() as u64);
            places.push(Place { file: open.number, at, length, digest: XxHash3_64::oneshot(bytes) });
            open.end = at + length;
        }
        file.flush()?;
        Ok(places)
    }

    /// Waits until all that was written is on the disk. Before the commit of the rows that name it.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        let Some(open) = self.open.as_mut().filter(|open| open.is_ahead) else { return Ok(()) };
        if self.durable {
            open.file.sync_data()?;
        }
        open.is_ahead = false;
        Ok(())
    }

    /// What was written since the batch before may be named by committed rows from now on.
    pub(super) fn keep(&mut self) {
        if let Some(open) = &mut self.open {
            open.end = open.end.next_multiple_of(PAGE);
            open.kept = open.end;
        }
    }

    /// The batch failed, and no row will name what it wrote.
    pub(super) fn undo(&mut self) {
        let Some(open) = self.open.as_mut().filter(|open| open.is_ahead || open.end > open.kept) else {
            return;
        };
        (open.end, open.is_ahead) = (open.kept, false);
        // Otherwise it takes room until something is written over it.
        if let Err(error) = open.file.set_len(open.kept) {
            tracing::debug!(%error, "what a batch left in a file of payloads could not be cut off");
        }
    }

    /// A payload in this file is nobody's any more.
    pub(super) fn leaves(&mut self, file: u64) {
        self.left.insert(file);
    }

    /// The files that have less in them, since this was asked for.
    pub(super) fn left(&mut self) -> BTreeSet<u64> {
        std::mem::take(&mut self.left)
    }
}

/// Begins a file.
fn begin(folder: &Folder, next: &mut u64, closed_below: &AtomicU64) -> io::Result<Open> {
    folder.make()?;
    let number = *next;
    // Whatever becomes of it, it is not begun twice.
    *next += 1;
    let path = folder.path(number);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(super::open::MODE)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)?;
    file.set_permissions(Permissions::from_mode(super::open::MODE))?;
    // Its name, which no later sync of the file would bring to the disk.
    File::open(&folder.0)?.sync_all()?;
    closed_below.store(number, Ordering::Release);
    Ok(Open { file, number, end: 0, kept: 0, is_ahead: false })
}
