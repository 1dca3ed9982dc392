//! Opening a data directory: the lock, the files and their modes, the settings of every connection, the schema.
//!
//! Invariants: one daemon at a time, by a lock held for life; files are 0640 whatever the umask, and never reached through
//! a symbolic link; a schema that is newer than this program is left alone.

use super::ballast::Ballast;
use super::checkpoint::Checkpoints;
use super::lookup::Lookup;
use super::payloads::{self, Folder, Growing};
use super::pipeline::Pipeline;
use super::read::SqliteReader;
use super::sweep::{self, Sweeper};
use super::write::Writer;
use super::{Failure, SqliteStore};
use crate::store::fresh::Fresh;
use crate::store::schema::{self, Applied, Step};
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, Row};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The database file, in the data directory.
pub(super) const DATABASE: &str = "ledger.db";
/// Held locked for as long as a daemon uses the directory.
const LOCK: &str = "ledger.lock";
pub(super) const MODE: u32 = 0o640;
/// The first release without the write-ahead log reset bug (sqlite.org/wal.html).
const SQLITE_AT_LEAST: [u32; 3] = [3, 51, 3];
/// Nobody else writes; checkpoints and readers hold their locks for moments.
pub(super) const BUSY: Duration = Duration::from_millis(500);

pub(super) const MIGRATIONS: [(i64, &str, &str); 8] = [
    (1, "ledger", include_str!("../../../migrations/sqlite/0001_ledger.sql")),
    (2, "waiting", include_str!("../../../migrations/sqlite/0002_waiting.sql")),
    (3, "failures", include_str!("../../../migrations/sqlite/0003_failures.sql")),
    (4, "small results", include_str!("../../../migrations/sqlite/0004_small_results.sql")),
    (5, "agent blocks", include_str!("../../../migrations/sqlite/0005_agent_blocks.sql")),
    (6, "watch", include_str!("../../../migrations/sqlite/0006_watch.sql")),
    (7, "packed rows", include_str!("../../../migrations/sqlite/0007_packed_rows.sql")),
    (8, "payload places", include_str!("../../../migrations/sqlite/0008_payload_places.sql")),
];

/// A checkpoint follows 8 MiB of log, and may need as much in the database.
const BALLAST: u64 = 16 << 20;

/// What may be set when a data directory is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the data of new tasks kept in memory for the workers that get them next.
    pub fresh_bytes: usize,
    /// Most pages of the database file; none: as many as the disk holds. For tests of a full disk.
    pub max_pages: Option<u32>,
    /// Bytes kept for the day on which the disk is full; 0: none.
    pub ballast_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { fresh_bytes: 64 << 20, max_pages: None, ballast_bytes: BALLAST }
    }
}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon uses it.
    #[error("{} is in use by another ledgerd; stop that one first", .0.display())]
    Locked(PathBuf),
    /// A file of it is a link or no plain file.
    #[error("{} is not a regular file; ledgerd follows no links there", .0.display())]
    NotAFile(PathBuf),
    /// What should be a folder is a link or a file.
    #[error("{} is not a folder; ledgerd follows no links there", .0.display())]
    NotAFolder(PathBuf),
    /// Payloads of a ledger whose database is elsewhere: a new one would take them for nobody's.
    #[error(
        "{} has payloads of a ledger whose ledger.db is not beside it; put that back, or move the folder away",
        .0.display()
    )]
    Parted(PathBuf),
    /// The content cannot be right.
    #[error("{} is corrupt: {what}; restore a backup", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// The SQLite that this program was built with has a known fault.
    #[error("SQLite {0} can corrupt a ledger; build ledgerd with 3.51.3 or later")]
    SqliteTooOld(String),
    /// The schema was made by a later ledgerd.
    #[error("{} has schema {found}, which is newer than this ledgerd knows; run the newer release", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Version of the schema.
        found: i64,
    },
    /// A migration failed.
    #[error("the schema could not be brought up to date: {0}")]
    Migration(String),
    /// A file could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// SQLite could not use the file.
    #[error("{}: {what}", path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        what: String,
    },
}

/// Opens the ledger in `dir`, which exists, and makes it when there is none.
///
/// The store is empty in memory until `recover` has run.
///
/// # Errors
/// Why the directory cannot be used.
pub async fn open(dir: &Path, options: Options) -> Result<(SqliteStore, Arc<SqliteReader>), OpenError> {
    let lock = lock(dir)?;
    let path = dir.join(DATABASE);
    for suffix in ["", "-wal", "-shm"] {
        check(&side(&path, suffix))?;
    }
    check_folder(dir)?;
    create(dir, &path)?;

    let writing = settings(&path).synchronous(synchronous());
    // The wal_autocheckpoint of a connection decides what its own commits do: nothing.
    let writing = writing.journal_mode(SqliteJournalMode::Wal).pragma("wal_autocheckpoint", "0");
    let named = |error: sqlx::Error| of_sqlite(&path, &error);
    let mut conn = writing.connect().await.map_err(named)?;
    check_sqlite(&mut conn).await.map_err(named)??;
    migrate(&mut conn, &path).await?;
    let checkpoints = Checkpoints::open(&writing).await.map_err(named)?;
    // Opened on the final schema.
    let folder = Folder::of(dir);
    let next = next_file(&mut conn, &folder, &path).await?;
    let growing = Growing::new(folder.clone(), next, synchronous() == SqliteSynchronous::Full);
    let sweeper = Sweeper::open(&path, folder.clone(), growing.closed_below());
    let sweeper = sweeper.map_err(|error| of_sqlite(&path, &error))?;
    let writer = Writer::open(&path, BUSY, &pragmas(&options), growing);
    let writer = writer.map_err(|error| of_sqlite(&path, &error))?;
    let lookup = Lookup::open(&path, BUSY, &PRAGMAS).map_err(|error| of_sqlite(&path, &error))?;
    let pipeline = Pipeline::start(writer).map_err(|source| OpenError::Io { path: path.clone(), source })?;
    let fresh = Arc::new(Fresh::new(options.fresh_bytes));
    let reading = settings(&path).read_only(true).pragma("query_only", "ON");
    let reader = Arc::new(SqliteReader::open(reading, Arc::clone(&fresh), side(&path, "-wal"), folder));
    let ballast = Ballast::open(dir, options.ballast_bytes);
    Ok((SqliteStore::new((pipeline, lookup), conn, (checkpoints, ballast, sweeper), fresh, lock), reader))
}

/// A number above that of every file of payloads that there is, or that a row names.
async fn next_file(conn: &mut SqliteConnection, folder: &Folder, path: &Path) -> Result<u64, OpenError> {
    let found = sqlx::query_scalar::<_, i64>(sweep::NEWEST_FILE).fetch_one(conn).await;
    let named = found.map_err(|error| of_sqlite(path, &error))?.cast_unsigned();
    let files = folder.files().map_err(|source| OpenError::Io { path: folder.path(0), source })?;
    Ok(files.into_iter().map(|(number, _)| number).chain([named]).max().unwrap_or(0) + 1)
}

/// How the schema of the ledger in `dir` stands; nothing is made or changed.
///
/// # Errors
/// That the file cannot be read.
pub async fn steps(dir: &Path) -> Result<Vec<Step>, OpenError> {
    let path = dir.join(DATABASE);
    check(&path)?;
    steps_of(&path).await
}

/// As [`steps`], of a database file anywhere.
pub(super) async fn steps_of(path: &Path) -> Result<Vec<Step>, OpenError> {
    let known = schema::migrations(&MIGRATIONS);
    if !path.exists() {
        return Ok(schema::compare(&known, &[]));
    }
    let named = |error: sqlx::Error| of_sqlite(path, &error);
    let mut conn = settings(path).read_only(true).connect().await.map_err(named)?;
    let is_there = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = '_sqlx_migrations')";
    let is_there: bool = sqlx::query_scalar(is_there).fetch_one(&mut conn).await.map_err(named)?;
    let mut applied = Vec::new();
    if is_there {
        for row in sqlx::query(schema::APPLIED).fetch_all(&mut conn).await.map_err(named)? {
            applied.push(Applied {
                version: row.try_get(0).map_err(named)?,
                name: row.try_get(1).map_err(named)?,
                checksum: row.try_get(2).map_err(named)?,
                done: row.try_get(3).map_err(named)?,
            });
        }
    }
    conn.close().await.map_err(named)?;
    Ok(schema::compare(&known, &applied))
}

/// Gives an empty file the schema, with nothing kept for the case that it fails.
pub(super) async fn make(path: &Path) -> Result<(), OpenError> {
    let named = |error: sqlx::Error| of_sqlite(path, &error);
    let making = settings(path).journal_mode(SqliteJournalMode::Off).synchronous(SqliteSynchronous::Off);
    let mut conn = making.connect().await.map_err(named)?;
    check_sqlite(&mut conn).await.map_err(named)??;
    migrate(&mut conn, path).await?;
    conn.close().await.map_err(named)
}

/// The name of a file that SQLite keeps beside a database.
pub(super) fn side(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(suffix);
    PathBuf::from(name)
}

/// What every connection is set to.
pub(super) const PRAGMAS: [(&str, &str); 5] = [
    ("trusted_schema", "OFF"),
    ("cell_size_check", "ON"),
    ("mmap_size", "0"),
    ("cache_size", "-65536"),
    ("temp_store", "MEMORY"),
];

/// Pages that the writer keeps: 16 MiB, more than a batch can change. SQLite looks at each of them at every commit while the
/// file is below 1 GiB, for a tree that grows in its middle, as that of the keys does, moves pages past its end for a moment.
const WRITER_CACHE: &str = "-16384";

/// Every commit is on the disk before anybody hears of it. A test of that must be able to fail, so a debug build can be told
/// not to wait for the disk; a release build cannot.
fn synchronous() -> SqliteSynchronous {
    if cfg!(debug_assertions) && std::env::var_os("LEDGERD_TEST_SYNCHRONOUS").is_some_and(|set| set == "OFF")
    {
        tracing::warn!("nothing is durable: LEDGERD_TEST_SYNCHRONOUS is OFF");
        return SqliteSynchronous::Off;
    }
    SqliteSynchronous::Full
}

/// What the writing connection is set to. Its own commits run no checkpoint.
fn pragmas(options: &Options) -> Vec<(&'static str, String)> {
    let mut pragmas: Vec<_> = PRAGMAS.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    let off = matches!(synchronous(), SqliteSynchronous::Off);
    pragmas.push(("synchronous", if off { "OFF" } else { "FULL" }.to_owned()));
    pragmas.push(("wal_autocheckpoint", "0".to_owned()));
    pragmas.push(("cache_size", WRITER_CACHE.to_owned()));
    pragmas.extend(options.max_pages.map(|pages| ("max_page_count", pages.to_string())));
    pragmas
}

fn settings(path: &Path) -> SqliteConnectOptions {
    let settings = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .page_size(4_096)
        .busy_timeout(BUSY)
        .disable_statement_logging();
    PRAGMAS.into_iter().fold(settings, |settings, (name, value)| settings.pragma(name, value))
}

pub(super) fn lock(dir: &Path) -> Result<File, OpenError> {
    let path = dir.join(LOCK);
    check(&path)?;
    let io = |source| OpenError::Io { path: path.clone(), source };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(MODE)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

/// Looks at a file that may be there. Wider modes and foreign owners are told of: to change them is the owner's affair.
fn check(path: &Path) -> Result<(), OpenError> {
    let found = match path.symlink_metadata() {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(OpenError::Io { path: path.to_owned(), source }),
    };
    if !found.file_type().is_file() {
        return Err(OpenError::NotAFile(path.to_owned()));
    }
    let mode = found.permissions().mode() & 0o777;
    if mode & !MODE != 0 {
        tracing::warn!(file = %path.display(), mode = format!("{mode:o}"), "others can reach this file; set 0640");
    }
    let parent = path.parent().and_then(|dir| dir.metadata().ok());
    if parent.is_some_and(|dir| dir.uid() != found.uid()) {
        tracing::warn!(file = %path.display(), owner = found.uid(), "the owner is not that of the data directory");
    }
    Ok(())
}

/// Looks at the folder of payloads, which may be there where the database is.
pub(super) fn check_folder(dir: &Path) -> Result<(), OpenError> {
    let path = dir.join(payloads::FOLDER);
    let files = match path.symlink_metadata() {
        Ok(found) if !found.is_dir() => return Err(OpenError::NotAFolder(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
        Ok(_) => Folder::of(dir).files(),
    };
    match files {
        Ok(files) if !files.is_empty() && !dir.join(DATABASE).exists() => Err(OpenError::Parted(path)),
        Ok(_) => Ok(()),
        Err(source) => Err(OpenError::Io { path, source }),
    }
}

/// Makes an empty database file: SQLite gives its side files the mode of this one, and would itself go by the umask.
pub(super) fn create(dir: &Path, path: &Path) -> Result<(), OpenError> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(MODE)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .and_then(|file| {
            file.set_permissions(std::fs::Permissions::from_mode(MODE))?;
            file.sync_all()
        })
        .and_then(|()| File::open(dir)?.sync_all());
    match made {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(OpenError::Io { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

async fn check_sqlite(conn: &mut SqliteConnection) -> Result<Result<(), OpenError>, sqlx::Error> {
    let row = sqlx::query("SELECT sqlite_version()").fetch_one(conn).await?;
    let version: String = row.try_get(0)?;
    let numbers: Vec<u32> = version.split('.').filter_map(|part| part.parse().ok()).collect();
    Ok(if numbers.as_slice() >= SQLITE_AT_LEAST.as_slice() {
        Ok(())
    } else {
        Err(OpenError::SqliteTooOld(version))
    })
}

async fn migrate(conn: &mut SqliteConnection, path: &Path) -> Result<(), OpenError> {
    use sqlx::migrate::MigrateError;
    match Migrator::with_migrations(schema::migrations(&MIGRATIONS)).run_direct(None, conn, false).await {
        Ok(()) => Ok(()),
        Err(MigrateError::VersionMissing(found)) => Err(OpenError::Newer { path: path.to_owned(), found }),
        Err(MigrateError::VersionMismatch(found)) => Err(OpenError::Corrupt {
            path: path.to_owned(),
            what: format!("migration {found} is not as released"),
        }),
        Err(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) => {
            Err(of_sqlite(path, &error))
        }
        Err(error) => Err(OpenError::Migration(error.to_string())),
    }
}

fn of_sqlite(path: &Path, error: &impl Failure) -> OpenError {
    let path = path.to_owned();
    match error.code() {
        Some(super::CORRUPT | super::NOT_A_DATABASE) => OpenError::Corrupt { path, what: error.to_string() },
        _ => OpenError::Database { path, what: error.to_string() },
    }
}
