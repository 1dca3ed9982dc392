//! Connecting to a database that holds a ledger, or is to hold one.
//!
//! Refused is what would lose commits that were spoken of: a standby, a server without fsync or full_page_writes, a connection
//! over a network that anybody could read. Limits of time are the server's, set for the session, so that no future of a
//! statement is ever dropped half-way.

use super::{FRESH_BYTES, PgReader, PgStore, history};
use crate::store::fresh::Fresh;
use crate::store::schema::{self, Applied, Step};
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgSslMode};
use sqlx::{ConnectOptions, Connection as _, Row};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

pub(super) const MIGRATIONS: [(i64, &str, &str); 9] = [
    (1, "ledger", include_str!("../../../migrations/postgres/0001_ledger.sql")),
    (2, "watch", include_str!("../../../migrations/postgres/0002_watch.sql")),
    (3, "rows", include_str!("../../../migrations/postgres/0003_rows.sql")),
    (4, "lean rows", include_str!("../../../migrations/postgres/0004_lean_rows.sql")),
    (5, "packed history", include_str!("../../../migrations/postgres/0005_packed_history.sql")),
    (6, "agent blocks", include_str!("../../../migrations/postgres/0006_agent_blocks.sql")),
    (7, "ends", include_str!("../../../migrations/postgres/0007_ends.sql")),
    (8, "keys", include_str!("../../../migrations/postgres/0008_keys.sql")),
    (9, "batch", include_str!("../../../migrations/postgres/0009_batch.sql")),
];

/// Settings of each session. A statement that takes longer is ended by the server, and its batch with it.
const SESSION: [(&str, &str); 8] = [
    ("synchronous_commit", "on"),
    ("statement_timeout", "5s"),
    ("lock_timeout", "2s"),
    ("idle_in_transaction_session_timeout", "10s"),
    ("default_transaction_isolation", "read committed"),
    // Plans are made once and are small.
    ("jit", "off"),
    ("timezone", "UTC"),
    // What the server notes is for its own log.
    ("client_min_messages", "error"),
];
/// Of sessions that serve: all that they read is looked up by indexes, row by row. Otherwise a plan that was made while a table was
/// small, or not known to be large, would read all of it, and would stay.
pub(super) const BY_INDEX: [(&str, &str); 3] =
    [("enable_seqscan", "off"), ("enable_hashjoin", "off"), ("enable_mergejoin", "off")];
/// Of those of batches: a plan is made once, for it takes longer than a small batch's statements do.
const PLANNED_ONCE: [(&str, &str); 1] = [("plan_cache_mode", "force_generic_plan")];
const STATE: &str = "SELECT pg_is_in_recovery(), current_setting('fsync'), current_setting('full_page_writes'), \
    current_setting('server_version_num')::int4";
/// The oldest release with what we use of it, `pg_current_xact_id` and `xid8` for two.
const OLDEST: i32 = 130_000;
/// Long enough for a server that is starting.
const SLOW_ACQUIRE: Duration = Duration::from_secs(10);

/// Why a database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address cannot be right.
    #[error("the address of the store is not right: {0}")]
    Address(String),
    /// What is said could be read or changed on the way.
    #[error(
        "{host} is not on this machine, so the connection needs sslmode=verify-full (and sslrootcert, where the certificate is \
         not publicly trusted); {found} would let others read or change what is said"
    )]
    Plaintext {
        /// Where.
        host: String,
        /// What was asked for.
        found: &'static str,
    },
    /// The server cannot be reached, or refuses us.
    #[error("PostgreSQL at {server}: {source}")]
    Unreachable {
        /// Which.
        server: String,
        /// Why.
        source: sqlx::Error,
    },
    /// It is not shown to be the server that is meant.
    #[error(
        "PostgreSQL at {server} does not prove who it is: {what}; name its host as its certificate does, and with sslrootcert \
         the authority that signed it, where that is not a public one"
    )]
    Untrusted {
        /// Which.
        server: String,
        /// Why.
        what: String,
    },
    /// The server is set so that commits may be lost.
    #[error("PostgreSQL at {server} {what}")]
    Unfit {
        /// Which.
        server: String,
        /// What is wrong, and what to do.
        what: String,
    },
    /// The schema was made by a later ledgerd.
    #[error(
        "the database at {server} has schema {found}, which is newer than this ledgerd knows; run the newer release"
    )]
    Newer {
        /// Which.
        server: String,
        /// Version of the schema.
        found: i64,
    },
    /// A migration failed, and was undone.
    #[error("the schema at {server} could not be brought up to date: {what}")]
    Migration {
        /// Which.
        server: String,
        /// Why.
        what: String,
    },
}

impl ConnectError {
    /// Whether it is a matter of configuration, which no new try mends.
    #[must_use]
    pub const fn is_configuration(&self) -> bool {
        matches!(
            self,
            Self::Address(_)
                | Self::Plaintext { .. }
                | Self::Untrusted { .. }
                | Self::Unfit { .. }
                | Self::Newer { .. }
        )
    }
}

/// Opens the ledger in the database at `url`, and makes it when there is none, for the daemon called `name`: no two that live
/// have the same.
///
/// The store is empty in memory until `recover` has run.
///
/// # Errors
/// Why the database cannot be used.
pub async fn open(url: &str, name: &str) -> Result<(PgStore, Arc<PgReader>), ConnectError> {
    let options = options(url)?;
    let mut conn = connect(&options).await?;
    migrate(&mut conn, &options).await?;
    if let Err(error) = history::make_days_of_today(&mut conn).await {
        // Nothing depends on it: what has no partition of its day is kept all the same.
        tracing::warn!(%error, "no partitions of history were made; retention will try again");
    }
    let _ = conn.close().await;
    let options = options.options(BY_INDEX);
    let fresh = Arc::new(Fresh::new(FRESH_BYTES));
    let reader = Arc::new(PgReader::open(options.clone(), SLOW_ACQUIRE, Arc::clone(&fresh)));
    let options = options.options(PLANNED_ONCE);
    let conn = connect(&options).await?;
    Ok((PgStore::new(options, conn, fresh, name).await, reader))
}

/// Applies the migrations that are pending in the database at `url`.
///
/// # Errors
/// Why the database cannot be used.
pub async fn apply(url: &str) -> Result<(), ConnectError> {
    let options = options(url)?;
    migrate(&mut connect(&options).await?, &options).await
}

/// How the schema of the database at `url` stands; nothing is made or changed.
///
/// # Errors
/// That the database cannot be read.
pub async fn steps(url: &str) -> Result<Vec<Step>, ConnectError> {
    let options = options(url)?;
    let mut conn = reach(&options).await?;
    steps_of(&mut conn).await.map_err(|source| ConnectError::Unreachable { server: server(&options), source })
}

/// How the schema of a database stands.
pub(super) async fn steps_of(conn: &mut PgConnection) -> sqlx::Result<Vec<Step>> {
    let is_there = "SELECT to_regclass('_sqlx_migrations') IS NOT NULL";
    let mut applied = Vec::new();
    if sqlx::query_scalar(is_there).fetch_one(&mut *conn).await? {
        for row in sqlx::query(schema::APPLIED).fetch_all(&mut *conn).await? {
            applied.push(Applied {
                version: row.try_get(0)?,
                name: row.try_get(1)?,
                checksum: row.try_get(2)?,
                done: row.try_get(3)?,
            });
        }
    }
    Ok(schema::compare(&schema::migrations(&MIGRATIONS), &applied))
}

/// A connection for one that only reads, whoever serves the database.
pub(super) async fn reach(options: &PgConnectOptions) -> Result<PgConnection, ConnectError> {
    options.connect().await.map_err(|source| match distrust(options, &source) {
        Some(what) => ConnectError::Untrusted { server: server(options), what },
        None => ConnectError::Unreachable { server: server(options), source },
    })
}

/// How to connect, as `url` says and a ledger needs.
///
/// # Errors
/// That the address cannot be right, or would be unsafe.
pub(crate) fn options(url: &str) -> Result<PgConnectOptions, ConnectError> {
    let options =
        PgConnectOptions::from_str(url).map_err(|error| ConnectError::Address(error.to_string()))?;
    let options = options.application_name("ledgerd").options(SESSION).disable_statement_logging();
    let host = options.get_host();
    let local = options.get_socket().is_some()
        || host.starts_with('/')
        || host == "localhost"
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    let found = match options.get_ssl_mode() {
        // What is said when nothing was asked for.
        PgSslMode::Prefer if !local => return Ok(options.ssl_mode(PgSslMode::VerifyFull)),
        PgSslMode::Disable => "sslmode=disable",
        PgSslMode::Allow => "sslmode=allow",
        PgSslMode::Require => "sslmode=require",
        PgSslMode::VerifyCa => "sslmode=verify-ca",
        PgSslMode::Prefer | PgSslMode::VerifyFull => return Ok(options),
    };
    if local { Ok(options) } else { Err(ConnectError::Plaintext { host: host.to_owned(), found }) }
}

/// For hints between daemons, which may be lost: they wait for no disk.
pub(super) fn hint_options(options: &PgConnectOptions) -> PgConnectOptions {
    options.clone().application_name("ledgerd hints").options([("synchronous_commit", "off")])
}

/// Where that is, without secrets.
fn server(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or_else(|| options.get_username());
    match options.get_socket() {
        Some(socket) => format!("{}/{database}", socket.display()),
        None => format!("{}:{}/{database}", options.get_host(), options.get_port()),
    }
}

/// A connection for the one that writes: to a server that keeps what it says is kept.
pub(super) async fn connect(options: &PgConnectOptions) -> Result<PgConnection, ConnectError> {
    let named = |source| ConnectError::Unreachable { server: server(options), source };
    let mut conn = reach(options).await?;
    let row = sqlx::query(STATE).fetch_one(&mut conn).await.map_err(named)?;
    let (standby, fsync, pages, version): (bool, String, String, i32) = (
        row.try_get(0).map_err(named)?,
        row.try_get(1).map_err(named)?,
        row.try_get(2).map_err(named)?,
        row.try_get(3).map_err(named)?,
    );
    let unfit = |what: &str| Err(ConnectError::Unfit { server: server(options), what: what.to_owned() });
    if standby {
        return unfit("is a standby, which takes no writes; name the primary");
    }
    if fsync != "on" {
        return unfit("runs with fsync=off, so a crash may take commits that were spoken of; set fsync=on");
    }
    if pages != "on" {
        return unfit(
            "runs with full_page_writes=off, so a crash may tear its pages; set full_page_writes=on",
        );
    }
    if version < OLDEST {
        return unfit("is older than release 13; run a newer one");
    }
    Ok(conn)
}

/// What is wrong with the server's proof of who it is; none when that was not the trouble.
fn distrust(options: &PgConnectOptions, error: &sqlx::Error) -> Option<String> {
    use std::io::ErrorKind::{InvalidData, NotFound};
    match error {
        sqlx::Error::Tls(what) => Some(what.to_string()),
        // Nothing else says so before there is a connection.
        sqlx::Error::Io(error) if error.kind() == InvalidData => Some(error.to_string()),
        // A host has no file to miss.
        sqlx::Error::Io(error) if error.kind() == NotFound && options.get_socket().is_none() => {
            Some(format!("a file of certificates cannot be read: {error}"))
        }
        _ => None,
    }
}

pub(super) async fn migrate(conn: &mut PgConnection, options: &PgConnectOptions) -> Result<(), ConnectError> {
    let server = || server(options);
    // An index over all of history takes its time, and so does another daemon that is at it. Not the limits of a batch.
    let named = |source| ConnectError::Unreachable { server: server(), source };
    sqlx::raw_sql("SET statement_timeout = 0; SET lock_timeout = 0")
        .execute(&mut *conn)
        .await
        .map_err(named)?;
    match Migrator::with_migrations(schema::migrations(&MIGRATIONS)).run_direct(None, &mut *conn, false).await
    {
        Ok(()) => {
            let limits = sqlx::raw_sql("RESET statement_timeout; RESET lock_timeout").execute(conn).await;
            limits.map(drop).map_err(named)
        }
        Err(MigrateError::VersionMissing(found)) => Err(ConnectError::Newer { server: server(), found }),
        Err(MigrateError::VersionMismatch(found)) => Err(ConnectError::Unfit {
            server: server(),
            what: format!("has migration {found} otherwise than as released; restore a backup"),
        }),
        Err(error) => Err(ConnectError::Migration { server: server(), what: error.to_string() }),
    }
}
