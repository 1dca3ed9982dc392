//! A whole ledger on its way from one store to another, of the same kind or not.
//!
//! What both stores share is here: which rows there are (`tables`), and the file that they travel in (`file`). Each store reads
//! and writes them in a module `moving` of its own, and decides nothing. Invariants: what is read is of one moment; a store that
//! is written to was empty, and is so again unless the file was sound to its last line and what was read back equals it.

mod file;
mod tables;

pub(super) use file::{Reader, Value, Writer};
pub(super) use tables::{HISTORY_OF_SLOTS, Kind, TABLES, TASK_BLOCK, Table};

pub use file::{FORMAT, Total};

use super::postgres::ConnectError;
use super::schema::Standing;
use super::{OpenError, postgres, sqlite};
use ledger_core::store::StoreError;
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};

/// Why a ledger was not moved. Nothing is changed then, but for a schema that may have been made.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The data directory cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database cannot be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store has no ledger to export, or one with another schema than this program's.
    #[error("{0}")]
    Schema(String),
    /// The store has a ledger already.
    #[error(
        "the store has a ledger already ({table} has rows); import into a new data directory or database"
    )]
    NotEmpty {
        /// One that is not empty.
        table: &'static str,
    },
    /// A daemon serves the database, or did so until a moment ago.
    #[error("a ledgerd serves the database, or did so within 10 s; stop every one first")]
    Served,
    /// The file was written by a later ledgerd.
    #[error("the file has format {found}, and this ledgerd reads up to {FORMAT}; run the newer release")]
    NewerFile {
        /// Its format.
        found: u64,
    },
    /// The file is not as it was exported.
    #[error("{0}")]
    Damaged(String),
    /// Where a backup should go there is something.
    #[error("{} is there already; name another file", .0.display())]
    Exists(PathBuf),
    /// PostgreSQL is backed up by its own means.
    #[error("{0}")]
    ByItsOwnMeans(&'static str),
    /// What was read back is not what the file says. Nothing was kept.
    #[error("{table} was read back otherwise than the file has it; nothing was imported")]
    Differs {
        /// The first that differs.
        table: &'static str,
    },
    /// The file cannot be read or written.
    #[error("the file: {0}")]
    File(#[from] io::Error),
}

impl MoveError {
    /// The exit code: 65 a file or store that cannot be right, 74 input or output, 78 another file, store or release is needed.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            // The rows of a file do not fit, or a store has what no ledger has.
            Self::Damaged(_)
            | Self::Differs { .. }
            | Self::Open(OpenError::Corrupt { .. })
            | Self::Store(StoreError::Corrupt(_) | StoreError::Statement(_)) => 65,
            Self::Exists(_) => 2,
            Self::Schema(_)
            | Self::ByItsOwnMeans(_)
            | Self::NotEmpty { .. }
            | Self::NewerFile { .. }
            | Self::Open(OpenError::Newer { .. } | OpenError::Parted(_)) => 78,
            Self::Connect(error) if error.is_configuration() => 78,
            Self::Open(_) | Self::Connect(_) | Self::Store(_) | Self::Served | Self::File(_) => 74,
        }
    }
}

/// Writes the ledger in the data directory `dir` to `out`, as it was at one moment; a daemon may serve it.
///
/// # Errors
/// That there is no ledger of this schema, that it cannot be read, or that `out` cannot be written.
pub async fn export_sqlite(dir: &Path, out: impl Write) -> Result<Vec<Total>, MoveError> {
    sqlite::moving::export(dir, out).await
}

/// Writes the ledger in the database at `url` to `out`, as [`export_sqlite`].
///
/// # Errors
/// As [`export_sqlite`].
pub async fn export_postgres(url: &str, out: impl Write) -> Result<Vec<Total>, MoveError> {
    postgres::moving::export(url, out).await
}

/// Makes a ledger in `dir`, which exists and has none, of what was exported; no daemon may serve it.
///
/// # Errors
/// That `dir` is in use, or has a ledger; that the file is damaged, cut short or newer. Nothing is kept then.
pub async fn import_sqlite(dir: &Path, from: impl BufRead) -> Result<Vec<Total>, MoveError> {
    sqlite::moving::import(dir, from).await
}

/// Makes a ledger in the database at `url`, as [`import_sqlite`].
///
/// # Errors
/// As [`import_sqlite`].
pub async fn import_postgres(url: &str, from: impl BufRead) -> Result<Vec<Total>, MoveError> {
    postgres::moving::import(url, from).await
}

/// What a backup has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// The file.
    pub file: PathBuf,
    /// Number of the last history row in it.
    pub last_seq: u64,
    /// What it has of each table, as an export of it would tell.
    pub totals: Vec<Total>,
}

/// Copies the ledger in the data directory `dir` to `to`, or to a file in it named by the time where it is a directory, as it is
/// at one moment; a daemon may serve it. The file has its name when it is whole, verified and on the disk.
///
/// # Errors
/// That there is no ledger of this schema, that `to` is there already, or that one of them cannot be read or written.
pub async fn backup_sqlite(dir: &Path, to: &Path) -> Result<Backup, MoveError> {
    sqlite::backup::backup(dir, to).await
}

/// Looks through a backup: every page, every row, and whether they are those that were backed up.
///
/// # Errors
/// What is wrong with it.
pub async fn check_backup(file: &Path) -> Result<Backup, MoveError> {
    sqlite::backup::check(file).await
}

/// Makes a ledger in `dir`, which exists and has none, of a backup; leases and numbers that may have been given out since are void.
///
/// # Errors
/// That `dir` is in use or has a ledger, or what is wrong with the backup. Nothing is kept then.
pub async fn restore_sqlite(file: &Path, dir: &Path) -> Result<Backup, MoveError> {
    sqlite::backup::restore(file, dir).await
}

/// Makes leases and numbers void that may have been given out since the ledger in `dir` was what it is; no daemon may serve it.
/// The number of tasks whose fence was raised.
///
/// # Errors
/// That there is no ledger of this schema, or that it is in use.
pub async fn raise_sqlite(dir: &Path) -> Result<u64, MoveError> {
    sqlite::backup::raise(dir).await
}

/// As [`raise_sqlite`], in the database at `url`.
///
/// # Errors
/// As [`raise_sqlite`].
pub async fn raise_postgres(url: &str) -> Result<u64, MoveError> {
    postgres::moving::raise(url).await
}

/// By how much a restore raises fences: more than claims of one task in its life.
pub(super) const FENCES_RAISED: i64 = 1 << 32;
/// By how much it raises the number of the last session: more than streams that a daemon takes in the age of a backup. There is
/// room for 65,536 restores below the bits of the slot.
pub(super) const SESSIONS_RAISED: i64 = 1 << 32;
/// By how much it raises the number of the last task: more than 100,000 a second for four months.
pub(super) const TASKS_RAISED: i64 = 1 << 40;

/// Only a ledger with this program's schema is exported.
pub(super) fn exportable(standing: Standing) -> Result<(), MoveError> {
    match standing {
        Standing::Missing => Err(MoveError::Schema("the store has no ledger".to_owned())),
        Standing::Behind => Err(MoveError::Schema(
            "the schema of the store is older than this ledgerd; run ledgerd migrate apply first".to_owned(),
        )),
        standing => applicable(standing),
    }
}

/// Only a schema that this program has made can be brought up to date.
pub(crate) fn applicable(standing: Standing) -> Result<(), MoveError> {
    match standing {
        Standing::UpToDate | Standing::Behind | Standing::Missing => Ok(()),
        Standing::Newer => Err(MoveError::Schema(
            "the schema of the store is newer than this ledgerd; run the newer release".to_owned(),
        )),
        Standing::Altered => {
            Err(StoreError::Corrupt("a migration is not as released; restore a backup".to_owned()).into())
        }
    }
}

/// What was read back must be what the file has.
pub(super) fn same(told: &[Total], found: &[Total]) -> Result<(), MoveError> {
    let differs = told.iter().zip(found).find(|(told, found)| told != found);
    match differs {
        Some((told, _)) => Err(MoveError::Differs { table: told.table }),
        None if told.len() == found.len() => Ok(()),
        None => Err(MoveError::Differs { table: "meta" }),
    }
}

#[cfg(test)]
mod tests;
