//! What is done to a ledger by itself, without serving it: its schema, and its way to another store.
//!
//! Only says which store does it.

use crate::config::StoreAt;
use crate::store::moving::{self, MoveError, Total};
use crate::store::schema::{Standing, Step};
use crate::store::{self, OpenError, Options, postgres};
use ledger_core::store::Reader as _;
use std::io::{BufRead, Write};

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

fn make_directory(dir: &std::path::Path) -> Result<(), MoveError> {
    crate::make_directory(dir).map_err(|source| OpenError::Io { path: dir.to_owned(), source }.into())
}
