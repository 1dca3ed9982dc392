//! A whole ledger out of a data directory, and into one.
//!
//! Read is one transaction, beside a daemon if there is one. Written is a file of another name, which becomes the ledger when
//! it is whole, was read back and is on the disk: until then, and where anything fails, the directory has none.

use super::open::{self, DATABASE, OpenError};
use super::{failed, failed_to_write, write};
use crate::store::SMALL_RESULT;
use crate::store::bind::Cell;
use crate::store::moving::{
    Kind, MoveError, Reader, TABLES, TASK_BLOCK, Table, Total, Value, Writer, exportable, same,
};
use crate::store::schema::Standing;
use ledger_core::State;
use ledger_core::store::StoreError;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Statement};
use std::fs::{self, File};
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};

/// What an import writes to, in the data directory. One that was killed leaves it, and the next one begins it anew.
const COMING: &str = "ledger.db.import";

/// The newest row of each task's history, and the row before another: a look each, a fifth of what a recursive statement costs.
const NEWEST_ROWS: &str = "SELECT history FROM tasks WHERE history > 0 ORDER BY id";
const ROW_BEFORE: &str = "SELECT prev FROM task_history WHERE seq = ?";
/// Rows were numbered anew: nobody goes on from a place in another ledger.
const META: &str = "UPDATE meta SET seed = ?1, created_at = ?2, last_task = ?3, last_seq = ?4, removed_seq = ?4, \
    last_session = ?5 WHERE id = 1";
const SMALL: &str = "UPDATE tasks SET result = ?2 WHERE id = ?1 AND state = ?3";
const NEWEST: &str = "UPDATE tasks SET history = ? WHERE id = ?";
/// What is derived. Below 5 are the states that have not ended.
pub(super) const DERIVED: &str = "\
    INSERT INTO counts (agent, state, n) \
    SELECT s.agent, t.state, COUNT(*) FROM tasks AS t CROSS JOIN task_specs AS s ON s.id = t.id \
    GROUP BY s.agent, t.state; \
    INSERT INTO live_blocks (block, live) SELECT id >> 12, COUNT(*) FROM tasks WHERE state <= 4 GROUP BY id >> 12; \
    INSERT OR IGNORE INTO agent_blocks (agent, block) SELECT agent, id >> 4 FROM task_specs;";

/// As `store::moving` has it.
pub(in crate::store) async fn export(dir: &Path, out: impl Write) -> Result<Vec<Total>, MoveError> {
    exportable(Standing::of(&open::steps(dir).await?))?;
    let conn = look_into(&dir.join(DATABASE))?;
    // The first read fixes what is seen, for all of them.
    conn.execute_batch("BEGIN").map_err(|error| failed(&error))?;
    read(&conn, out)
}

/// As `store::moving` has it.
pub(in crate::store) async fn import(dir: &Path, from: impl BufRead) -> Result<Vec<Total>, MoveError> {
    let _lock = open::lock(dir)?;
    let path = dir.join(DATABASE);
    match Standing::of(&open::steps(dir).await?) {
        Standing::Missing if path.exists() => refuse_unless_nothing(&look_into(&path)?, &path)?,
        Standing::Missing => {}
        Standing::UpToDate => refuse_unless_empty(&look_into(&path)?)?,
        other => exportable(other)?,
    }
    let file = Reader::begin(from)?;
    let coming = Coming::new(dir, COMING)?;
    open::make(coming.path()).await?;
    let conn = write_into(coming.path())?;
    let told = fill(&conn, file)?;
    conn.close().map_err(|(_, error)| failed_to_write(&error))?;
    same(&told, &read(&look_into(coming.path())?, io::sink())?)?;
    coming.arrive(&path)?;
    Ok(told)
}

/// The file that is being written. It goes when it does not arrive.
pub(super) struct Coming(PathBuf);

impl Coming {
    /// Makes an empty one of this name in `dir`, in place of one that was left.
    pub(super) fn new(dir: &Path, name: &str) -> Result<Self, MoveError> {
        let path = dir.join(name);
        remove(&path, &ALL).map_err(|source| OpenError::Io { path: path.clone(), source })?;
        open::create(dir, &path)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// It is the ledger from now on, in place of an empty one.
    pub(super) fn arrive(self, path: &Path) -> Result<(), OpenError> {
        let moved = File::open(&self.0)
            .and_then(|file| file.sync_all())
            // A log of the empty one would be taken for ours.
            .and_then(|()| remove(path, &SIDES))
            .and_then(|()| fs::rename(&self.0, path))
            .and_then(|()| path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all()));
        moved.map_err(|source| OpenError::Io { path: path.to_owned(), source })
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0, &ALL) {
            tracing::warn!(file = %self.0.display(), %error, "what is not finished could not be removed");
        }
    }
}

/// What SQLite keeps beside a database, and those with the database itself, which goes last.
const SIDES: [&str; 3] = ["-wal", "-shm", "-journal"];
const ALL: [&str; 4] = ["-wal", "-shm", "-journal", ""];

/// Removes files of a database that may be there.
fn remove(path: &Path, suffixes: &[&str]) -> io::Result<()> {
    for suffix in suffixes {
        match fs::remove_file(open::side(path, suffix)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

pub(super) fn look_into(path: &Path) -> Result<Connection, MoveError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    connect(path, flags)
}

/// Nothing is to be kept of a file that is not finished, so nothing is written but the file.
pub(super) fn write_into(path: &Path) -> Result<Connection, MoveError> {
    let conn = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    for (name, value) in [("journal_mode", "OFF"), ("synchronous", "OFF")] {
        conn.pragma_update(None, name, value).map_err(|error| failed_to_write(&error))?;
    }
    Ok(conn)
}

pub(super) fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, MoveError> {
    let conn = Connection::open_with_flags(path, flags).map_err(|error| failed(&error))?;
    conn.busy_timeout(open::BUSY).map_err(|error| failed(&error))?;
    // What is sorted may be long: on the disk, not in memory.
    let settings = open::PRAGMAS.into_iter().filter(|(name, _)| *name != "temp_store");
    for (name, value) in settings {
        conn.pragma_update(None, name, value).map_err(|error| failed(&error))?;
    }
    Ok(conn)
}

/// A file in which nobody has made a table, as a daemon leaves that is killed in its first moments; another is somebody's.
fn refuse_unless_nothing(conn: &Connection, path: &Path) -> Result<(), MoveError> {
    let look = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE tbl_name <> '_sqlx_migrations')";
    match conn.query_row(look, [], |row| row.get(0)).map_err(|error| failed(&error))? {
        false => Ok(()),
        true => Err(MoveError::Schema(format!("{} is no ledger, and would be lost", path.display()))),
    }
}

fn refuse_unless_empty(conn: &Connection) -> Result<(), MoveError> {
    for table in TABLES.iter().filter(|table| !table.is_of_new_stores()) {
        let look = format!("SELECT EXISTS (SELECT 1 FROM {})", table.name);
        if conn.query_row(&look, [], |row| row.get(0)).map_err(|error| failed(&error))? {
            return Err(MoveError::NotEmpty { table: table.name });
        }
    }
    Ok(())
}

/// Writes all tables to `out`.
pub(super) fn read(conn: &Connection, out: impl Write) -> Result<Vec<Total>, MoveError> {
    let mut writer = Writer::begin(out)?;
    for table in &TABLES {
        writer.table(table)?;
        let mut rows = conn.prepare(&table.select(table.sqlite)).map_err(|error| failed(&error))?;
        if table.name == "task_history" {
            read_history(conn, &mut rows, table, &mut writer)?;
        } else {
            read_rows(&mut rows, None, table, &mut writer)?;
        }
        writer.done(table);
    }
    writer.end()
}

/// The history of each task, in the order in which it happened.
fn read_history(
    conn: &Connection,
    row: &mut Statement<'_>,
    table: &Table,
    writer: &mut Writer<impl Write>,
) -> Result<(), MoveError> {
    let mut tasks = conn.prepare(NEWEST_ROWS).map_err(|error| failed(&error))?;
    let mut before = conn.prepare(ROW_BEFORE).map_err(|error| failed(&error))?;
    let mut tasks = tasks.query([]).map_err(|error| failed(&error))?;
    let mut chain = Vec::new();
    while let Some(task) = tasks.next().map_err(|error| failed(&error))? {
        let mut next: Option<i64> = task.get(0).map_err(|error| failed(&error))?;
        while let Some(seq) = next {
            chain.push(seq);
            let found = before.query_row([seq], |row| row.get(0)).optional();
            let missing = || StoreError::Corrupt(format!("row {seq} of the history is missing"));
            next = found.map_err(|error| failed(&error))?.ok_or_else(missing)?;
        }
        for seq in chain.drain(..).rev() {
            read_rows(row, Some(seq), table, writer)?;
        }
    }
    Ok(())
}

fn read_rows(
    statement: &mut Statement<'_>,
    parameter: Option<i64>,
    table: &Table,
    writer: &mut Writer<impl Write>,
) -> Result<(), MoveError> {
    let rows = match parameter {
        Some(parameter) => statement.query([parameter]),
        None => statement.query([]),
    };
    let mut rows = rows.map_err(|error| failed(&error))?;
    while let Some(row) = rows.next().map_err(|error| failed(&error))? {
        writer.row(table, |at, kind| {
            Ok(match row.get_ref(at).map_err(|error| failed(&error))? {
                ValueRef::Null => Cell::Null,
                ValueRef::Integer(value) => Cell::Int(value),
                ValueRef::Real(value) => Cell::Real(value),
                ValueRef::Text(text) if kind == Kind::Text => {
                    let text = std::str::from_utf8(text).map_err(|_| not_text(table))?;
                    Cell::Text(text.into())
                }
                ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Cell::Bytes(bytes),
            })
        })?;
    }
    Ok(())
}

fn not_text(table: &Table) -> StoreError {
    StoreError::Corrupt(format!("a text of {} is not UTF-8", table.name))
}

/// Writes what the file has, and what is derived from it.
fn fill(conn: &Connection, mut file: Reader<impl BufRead>) -> Result<Vec<Total>, MoveError> {
    conn.execute_batch("BEGIN").map_err(|error| failed_to_write(&error))?;
    for table in &TABLES {
        file.table(table)?;
        let mut filling = Filling::begin(conn, table).map_err(|error| failed_to_write(&error))?;
        while let Some(row) = file.row(table)? {
            filling.row(&row).map_err(|error| failed_to_write(&error))?;
        }
        filling.end().map_err(|error| failed_to_write(&error))?;
    }
    let told = file.end()?;
    conn.execute_batch(DERIVED).map_err(|error| failed_to_write(&error))?;
    conn.execute_batch("COMMIT").map_err(|error| failed_to_write(&error))?;
    Ok(told)
}

/// Rows of one table on their way into the file.
struct Filling<'c> {
    table: &'static Table,
    insert: Statement<'c>,
    /// Of results: into the row of the task.
    small: Statement<'c>,
    /// Of history: names a task's newest row.
    newest: Statement<'c>,
    /// Of history: the task and the number of the row before.
    before: Option<(i64, i64)>,
}

impl<'c> Filling<'c> {
    fn begin(conn: &'c Connection, table: &'static Table) -> rusqlite::Result<Self> {
        // Columns that are of SQLite alone come last.
        let more = match table.name {
            "tasks" => Some("history"),
            "task_history" => Some("prev"),
            "requests" => Some("hash"),
            _ => None,
        };
        let names = more.map_or_else(|| table.names(), |more| format!("{}, {more}", table.names()));
        let marks = vec!["?"; table.columns.len() + usize::from(more.is_some())].join(", ");
        let insert = match table.name {
            "meta" => META.to_owned(),
            name => format!("INSERT INTO {name} ({names}) VALUES ({marks})"),
        };
        Ok(Self {
            table,
            insert: conn.prepare(&insert)?,
            small: conn.prepare(SMALL)?,
            newest: conn.prepare(NEWEST)?,
            before: None,
        })
    }

    fn row(&mut self, row: &[Value]) -> rusqlite::Result<()> {
        let mut more = None;
        match (self.table.name, row) {
            ("meta", [seed, made, Value::Int(blocks), seq, session]) => {
                // The last number of the block before, or none.
                let last = Value::Int((blocks * TASK_BLOCK - 1).max(0));
                return put(&mut self.insert, [seed, made, &last, seq, session], None);
            }
            // Named when its rows have come.
            ("tasks", _) => more = Some(Value::Int(0)),
            ("task_history", [Value::Int(task), _, Value::Int(seq), ..]) => {
                more = Some(match self.before {
                    Some((of, before)) if of == *task => Value::Int(before),
                    _ => Value::Null,
                });
                if let Some((of, newest)) = self.before.replace((*task, *seq))
                    && of != *task
                {
                    self.newest.execute([newest, of])?;
                }
            }
            ("requests", [Value::Text(id), ..]) => more = Some(Value::Int(write::request_hash(id))),
            ("results", [Value::Int(task), Value::Bytes(result)]) if result.len() <= SMALL_RESULT => {
                // The row of a task that is DONE is not written again, so it keeps it.
                let done = i64::from(State::Done.code());
                if self.small.execute((task, result, done))? > 0 {
                    return Ok(());
                }
            }
            _ => {}
        }
        put(&mut self.insert, row, more.as_ref())
    }

    fn end(mut self) -> rusqlite::Result<()> {
        if let Some((task, newest)) = self.before {
            self.newest.execute([newest, task])?;
        }
        Ok(())
    }
}

fn put<'v>(
    statement: &mut Statement<'_>,
    row: impl IntoIterator<Item = &'v Value>,
    more: Option<&'v Value>,
) -> rusqlite::Result<()> {
    for (at, value) in row.into_iter().chain(more).enumerate() {
        match value {
            Value::Null => statement.raw_bind_parameter(at + 1, rusqlite::types::Null)?,
            Value::Int(value) => statement.raw_bind_parameter(at + 1, value)?,
            Value::Real(value) => statement.raw_bind_parameter(at + 1, value)?,
            Value::Text(value) => statement.raw_bind_parameter(at + 1, value.as_str())?,
            Value::Bytes(value) => statement.raw_bind_parameter(at + 1, value.as_slice())?,
        }
    }
    statement.raw_execute().map(drop)
}
