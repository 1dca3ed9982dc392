//! What is done to a ledger by itself, without serving it: its schema, and its way to another store.
//!
//! Only says which store does it.

use crate::config::StoreAt;
use crate::store::moving::{self, Backup, MoveError, Total};
use crate::store::schema::{Standing, Step};
use crate::store::{self, OpenError, Options, postgres};
use ledger_core::store::Reader as _;
use std::io::{BufRead, Write};
use std::path::Path;

/// How the schema stands, one step for each migration, by number; nothing is made or changed.
///
/// # Errors
/// That the store cannot be read.
pub async fn steps(at: &StoreAt) -> Result<Vec<Step>, MoveError> {
    match at {
        StoreAt::Sqlite(dir) => Ok(store::steps(dir).await?),
        StoreAt::Postgres(url) => Ok(postgres::steps(url.reveal()).await?),
    }
}

/// Applies the migrations that are pending, and makes a ledger where there is none. On SQLite no daemon may serve it.
///
/// # Errors
/// That a daemon serves it, that it is newer than this program or altered, or that a migration failed, which changed nothing.
pub async fn apply(at: &StoreAt) -> Result<Vec<Step>, MoveError> {
    moving::applicable(Standing::of(&steps(at).await?))?;
    match at {
        StoreAt::Sqlite(dir) => {
            make_directory(dir)?;
            let (store, reader) = store::open(dir, Options::default()).await?;
            reader.close().await?;
            store.close().await?;
        }
        StoreAt::Postgres(url) => postgres::apply(url.reveal()).await?,
    }
    steps(at).await
}

/// Writes the ledger to `out` as it was at one moment, a daemon may serve it; what was written of each table.
///
/// # Errors
/// That there is no ledger of this program's schema, that it cannot be read, or that `out` cannot be written.
pub async fn export(at: &StoreAt, out: impl Write) -> Result<Vec<Total>, MoveError> {
    match at {
        StoreAt::Sqlite(dir) => moving::export_sqlite(dir, out).await,
        StoreAt::Postgres(url) => moving::export_postgres(url.reveal(), out).await,
    }
}

/// Makes a ledger of what was exported; what the file, and now the store, has of each table.
///
/// # Errors
/// That a daemon serves the store, or that it has a ledger; that the file is damaged, cut short or newer. The store is as it
/// was then, but for an empty schema.
pub async fn import(at: &StoreAt, from: impl BufRead) -> Result<Vec<Total>, MoveError> {
    match at {
        StoreAt::Sqlite(dir) => {
            make_directory(dir)?;
            moving::import_sqlite(dir, from).await
        }
        StoreAt::Postgres(url) => moving::import_postgres(url.reveal(), from).await,
    }
}

/// Copies the ledger to a file, or to one in a directory, as it is at one moment; a daemon may serve it.
///
/// # Errors
/// That it is in PostgreSQL, that there is no ledger of this program's schema, that the file is there, or that one of them cannot
/// be read or written. There is no file of that name then.
pub async fn backup(at: &StoreAt, to: &Path) -> Result<Backup, MoveError> {
    match at {
        StoreAt::Sqlite(dir) => moving::backup_sqlite(dir, to).await,
        StoreAt::Postgres(_) => Err(MoveError::ByItsOwnMeans(
            "a ledger in PostgreSQL is backed up by PostgreSQL: pg_dump, or base backups with archived logs (docs/backup.md)",
        )),
    }
}

/// Looks through a backup, every page and row.
///
/// # Errors
/// What is wrong with it.
pub async fn check_backup(file: &Path) -> Result<Backup, MoveError> {
    moving::check_backup(file).await
}

/// Makes a ledger of a backup where there is none.
///
/// # Errors
/// That the place has a ledger, is in use, or is in PostgreSQL; what is wrong with the backup. Nothing is kept then.
pub async fn restore(at: &StoreAt, file: &Path) -> Result<Backup, MoveError> {
    match at {
        StoreAt::Sqlite(dir) => {
            make_directory(dir)?;
            moving::restore_sqlite(file, dir).await
        }
        StoreAt::Postgres(_) => Err(MoveError::ByItsOwnMeans(
            "a ledger in PostgreSQL is restored by PostgreSQL, then ledgerd restore --raise-fences (docs/backup.md)",
        )),
    }
}

/// Makes void what may have been given out since a ledger was what it is, after it was restored by other means; how many tasks
/// have a new fence.
///
/// # Errors
/// That there is no ledger of this program's schema, or that a daemon serves it.
pub async fn raise_fences(at: &StoreAt) -> Result<u64, MoveError> {
    match at {
        StoreAt::Sqlite(dir) => moving::raise_sqlite(dir).await,
        StoreAt::Postgres(url) => moving::raise_postgres(url.reveal()).await,
    }
}

fn make_directory(dir: &Path) -> Result<(), MoveError> {
    crate::make_directory(dir).map_err(|source| OpenError::Io { path: dir.to_owned(), source }.into())
}
