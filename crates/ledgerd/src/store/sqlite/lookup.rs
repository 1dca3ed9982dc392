//! What the file has under keys and request ids, read by the thread that decides.
//!
//! Why a connection of its own: the one that writes answers nobody while it commits, and a batch cannot be decided before
//! its keys are known. This one sees what is committed, and nothing else; what is on its way is for the caller to lay over
//! it. Invariant: its transaction ends with the look, so that it never keeps the log from starting over.

use super::write::request_hash;
use ledger_core::store::{KeyHolder, RequestRow};
use ledger_core::{AgentId, TaskId, Timestamp};
use rusqlite::{Connection, OpenFlags, OptionalExtension, Result, params};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const KEY: &str = "SELECT task_id, digest FROM idempotency_keys WHERE agent = ? AND key = ?";
const REQUEST: &str = "SELECT digest, answer, at FROM requests WHERE hash = ? AND id = ?";

/// Both, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 2] = [KEY, REQUEST];

/// Its answer, in the order of the question.
pub(super) struct Found {
    pub(super) keys: Vec<Option<KeyHolder>>,
    pub(super) requests: Vec<Option<RequestRow>>,
}

/// See the module.
pub(super) struct Lookup {
    conn: Connection,
}

impl Lookup {
    /// Opens a file that has its schema.
    pub(super) fn open(path: &Path, busy: Duration, pragmas: &[(&str, &str)]) -> Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = Connection::open_with_flags(path, flags)?;
        conn.busy_timeout(busy)?;
        for (name, value) in pragmas {
            conn.pragma_update(None, name, value)?;
        }
        Ok(Self { conn })
    }

    /// Reads what is committed.
    pub(super) fn look(&mut self, keys: &[(AgentId, Arc<str>)], requests: &[Arc<str>]) -> Result<Found> {
        // One snapshot: its locks are taken once, and pages stay cached from one row to the next.
        let snapshot = self.conn.unchecked_transaction()?;
        let mut of_key = snapshot.prepare_cached(KEY)?;
        let mut of_request = snapshot.prepare_cached(REQUEST)?;
        let holder = |(agent, key): &(AgentId, Arc<str>)| {
            let holder = of_key.query_row(params![agent.0, &**key], |row| {
                Ok(KeyHolder {
                    task: TaskId(row.get::<_, i64>(0)?.cast_unsigned()),
                    digest: row.get::<_, i64>(1)?.cast_unsigned(),
                })
            });
            holder.optional()
        };
        let keys = keys.iter().map(holder).collect::<Result<_>>()?;
        let answer = |id: &Arc<str>| {
            let answer = of_request.query_row(params![request_hash(id), &**id], |row| {
                Ok(RequestRow {
                    id: Arc::clone(id),
                    digest: row.get::<_, i64>(0)?.cast_unsigned(),
                    answer: row.get::<_, Vec<u8>>(1)?.into(),
                    at: Timestamp::from_millis(row.get(2)?),
                })
            });
            answer.optional()
        };
        let requests = requests.iter().map(answer).collect::<Result<_>>()?;
        Ok(Found { keys, requests })
    }

    pub(super) fn close(self) -> Result<()> {
        self.conn.close().map_err(|(_, error)| error)
    }
}
