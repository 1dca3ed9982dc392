//! A whole ledger out of a data directory, and into one.
//!
//! Read is one transaction, beside a daemon if there is one. Written is a file of another name, which becomes the ledger when
//! it is whole, was read back and is on the disk: until then, and where anything fails, the directory has none.

use super::open::{self, DATABASE, OpenError};
use super::packed::Entries;
use super::payloads::{Folder, Place};
use super::sweep;
use super::{failed, failed_to_write, write};
use crate::store::SMALL_RESULT;
use crate::store::bind::Cell;
use crate::store::moving::{
    Kind, MoveError, Reader, TABLES, TASK_BLOCK, Table, Total, Value, Writer, exportable, same,
};
use crate::store::schema::Standing;
use bytes::Bytes;
use ledger_core::State;
use ledger_core::store::StoreError;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Statement};
use std::fs::{self, File};
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};

/// What an import writes to, in the data directory. One that was killed leaves it, and the next one begins it anew.
const COMING: &str = "ledger.db.import";

const PLACE: &str = "SELECT file, at, length, digest FROM payload_places WHERE task_id = ?";
/// The newest entry of each task's history.
const NEWEST_ENTRIES: &str = "SELECT history FROM tasks WHERE history > 0 ORDER BY id";
/// Rows were numbered anew: nobody goes on from a place in another ledger.
const META: &str = "UPDATE meta SET seed = ?1, created_at = ?2, last_task = ?3, last_seq = ?4, removed_seq = ?4, \
    last_session = ?5 WHERE id = 1";
const SMALL: &str = "UPDATE tasks SET result = ?2 WHERE id = ?1 AND state = ?3";
/// Columns of a file; from ?15 on packed, as the daemon writes them.
const TASK: &str = "INSERT INTO tasks (id, state, reason, priority, run_at, calendar, deadline, queued_at, updated_at, version, \
        fence, delivery, attempt, idle_deliveries, history, held, rare) \
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, 0, \
        CASE WHEN COALESCE(?15, ?18, ?21) IS NOT NULL THEN json_array(?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23) END, \
        CASE WHEN ?24 | ?25 | ?26 | ?27 | ?28 | ?29 | ?30 | ?33 | ?34 | ?36 | ?37 <> 0 OR COALESCE(?31, ?35) IS NOT NULL \
        THEN json_array(NULLIF(?24, 0), NULLIF(?25, 0), NULLIF(?26, 0), NULLIF(?27, 0), NULLIF(?28, 0), NULLIF(?29, 0), \
            NULLIF(?30, 0), ?31, ?32, NULLIF(?33, 0), NULLIF(?34, 0), ?35, NULLIF(?36, 0), NULLIF(?37, 0)) END)";
/// Entries come task by task, and are packed in the order of their numbers when all are there.
const COMING_HISTORY: &str = "CREATE TEMP TABLE coming_history ( \
    task_id INTEGER NOT NULL, version INTEGER NOT NULL, seq INTEGER PRIMARY KEY, kind INTEGER NOT NULL, from_state INTEGER, \
    to_state INTEGER NOT NULL, reason INTEGER NOT NULL, at INTEGER NOT NULL, fence INTEGER NOT NULL, attempt INTEGER NOT NULL, \
    worker TEXT, until INTEGER, digest INTEGER, error TEXT, facts TEXT) STRICT";
const PACK_HISTORY: &str = "\
    INSERT INTO task_history (seq, task, at, entries) \
    SELECT MIN(seq), 0, 0, json_group_array(json_array(task_id, version, back, kind, from_state, to_state, reason, at, fence, \
        attempt, worker, until, digest, json(error), json(facts)) ORDER BY seq) \
    FROM (SELECT *, COALESCE(seq - lag(seq) OVER (PARTITION BY task_id ORDER BY version), 0) AS back, \
        seq - row_number() OVER (ORDER BY seq) AS run FROM coming_history) \
    GROUP BY run, seq >> 4 ORDER BY run, seq >> 4; \
    UPDATE tasks SET history = newest.seq \
    FROM (SELECT task_id, MAX(seq) AS seq FROM coming_history GROUP BY task_id) AS newest WHERE newest.task_id = tasks.id; \
    DROP TABLE coming_history";
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
    let _held = sweep::hold(dir)?;
    let conn = look_into(&dir.join(DATABASE))?;
    // The first read fixes what is seen, for all of them.
    conn.execute_batch("BEGIN").map_err(|error| failed(&error))?;
    read(&conn, &Folder::of(dir), out)
}

/// As `store::moving` has it.
pub(in crate::store) async fn import(dir: &Path, from: impl BufRead) -> Result<Vec<Total>, MoveError> {
    let _lock = open::lock(dir)?;
    open::check_folder(dir)?;
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
    same(&told, &read(&look_into(coming.path())?, &Folder::of(dir), io::sink())?)?;
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

/// Writes all tables to `out`; payloads that are in files, too.
pub(super) fn read(conn: &Connection, folder: &Folder, out: impl Write) -> Result<Vec<Total>, MoveError> {
    let mut writer = Writer::begin(out)?;
    for table in &TABLES {
        writer.table(table)?;
        if table.name == "task_history" {
            read_history(conn, table, &mut writer)?;
        } else {
            let mut rows = conn.prepare(&table.select(table.sqlite)).map_err(|error| failed(&error))?;
            let mut reading = folder.clone().reading();
            let mut places = conn.prepare(PLACE).map_err(|error| failed(&error))?;
            read_rows(&mut rows, table, &mut writer, |task| match place_of(&mut places, task)? {
                Some(place) => reading.read(place).map(Some).map_err(|error| lost(task, &error)),
                None => Ok(None),
            })?;
        }
        writer.done(table);
    }
    writer.end()
}

/// The history of each task, in the order in which it happened: along the chain from its newest entry, as tasks that are near
/// each other have entries in the same rows. To sort all entries costs twice as much.
fn read_history(conn: &Connection, table: &Table, writer: &mut Writer<impl Write>) -> Result<(), MoveError> {
    let mut entries = Entries::of(conn).map_err(|error| failed(&error))?;
    let mut tasks = conn.prepare(NEWEST_ENTRIES).map_err(|error| failed(&error))?;
    let mut tasks = tasks.query([]).map_err(|error| failed(&error))?;
    let mut chain = Vec::new();
    while let Some(task) = tasks.next().map_err(|error| failed(&error))? {
        let mut next: i64 = task.get(0).map_err(|error| failed(&error))?;
        while next > 0 {
            let entry = entries.entry(next)?;
            next = entry.before()?;
            chain.push(entry);
        }
        for entry in chain.drain(..).rev() {
            let fields = entry.fields()?;
            writer.row(table, |at, kind| Ok(fields.cell(at, kind)?))?;
        }
    }
    Ok(())
}

fn read_rows(
    statement: &mut Statement<'_>,
    table: &Table,
    writer: &mut Writer<impl Write>,
    mut in_file: impl FnMut(i64) -> Result<Option<Bytes>, StoreError>,
) -> Result<(), MoveError> {
    let mut rows = statement.query([]).map_err(|error| failed(&error))?;
    while let Some(row) = rows.next().map_err(|error| failed(&error))? {
        // Rows of `task_specs` begin with the number of the task.
        let payload = |at: usize| table.columns[at].0 == "payload";
        let empty =
            (0..table.columns.len()).find(|at| payload(*at) && row.get_ref(*at) == Ok(ValueRef::Blob(&[])));
        let apart = match empty {
            Some(_) => in_file(row.get(0).map_err(|error| failed(&error))?)?,
            None => None,
        };
        writer.row(table, |at, kind| {
            if let Some(bytes) = apart.as_ref().filter(|_| empty == Some(at)) {
                return Ok(Cell::Bytes(bytes));
            }
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

/// Where the payload of this task is, unless it is in its row.
fn place_of(places: &mut Statement<'_>, task: i64) -> Result<Option<Place>, StoreError> {
    let place = places.query_row([task], |row| place(row, 0));
    place.optional().map_err(|error| failed(&error))
}

/// A place, from this column on.
pub(super) fn place(row: &rusqlite::Row<'_>, from: usize) -> rusqlite::Result<Place> {
    let number = |at: usize| Ok::<_, rusqlite::Error>(row.get::<_, i64>(from + at)?.cast_unsigned());
    Ok(Place { file: number(0)?, at: number(1)?, length: number(2)?, digest: number(3)? })
}

pub(super) fn lost(task: i64, error: &io::Error) -> StoreError {
    StoreError::Corrupt(format!("the payload of task {task}, which is in a file of its own: {error}"))
}

fn not_text(table: &Table) -> StoreError {
    StoreError::Corrupt(format!("a text of {} is not UTF-8", table.name))
}

/// Writes what the file has, and what is derived from it.
fn fill(conn: &Connection, mut file: Reader<impl BufRead>) -> Result<Vec<Total>, MoveError> {
    conn.execute_batch("BEGIN").map_err(|error| failed_to_write(&error))?;
    conn.execute_batch(COMING_HISTORY).map_err(|error| failed_to_write(&error))?;
    for table in &TABLES {
        file.table(table)?;
        let mut filling = Filling::begin(conn, table).map_err(|error| failed_to_write(&error))?;
        while let Some(row) = file.row(table)? {
            filling.row(&row).map_err(|error| failed_to_write(&error))?;
        }
    }
    let told = file.end()?;
    conn.execute_batch(PACK_HISTORY).map_err(|error| failed_to_write(&error))?;
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
}

impl<'c> Filling<'c> {
    fn begin(conn: &'c Connection, table: &'static Table) -> rusqlite::Result<Self> {
        // A column that is of SQLite alone comes last.
        let more = (table.name == "requests").then_some(", hash");
        let marks = vec!["?"; table.columns.len() + usize::from(more.is_some())].join(", ");
        let (names, more) = (table.names(), more.unwrap_or_default());
        let insert = match table.name {
            "meta" => META.to_owned(),
            "tasks" => TASK.to_owned(),
            "task_history" => format!("INSERT INTO coming_history ({names}) VALUES ({marks})"),
            name => format!("INSERT INTO {name} ({names}{more}) VALUES ({marks})"),
        };
        Ok(Self { table, insert: conn.prepare(&insert)?, small: conn.prepare(SMALL)? })
    }

    fn row(&mut self, row: &[Value]) -> rusqlite::Result<()> {
        let mut more = None;
        match (self.table.name, row) {
            ("meta", [seed, made, Value::Int(blocks), seq, session]) => {
                // The last number of the block before, or none.
                let last = Value::Int((blocks * TASK_BLOCK - 1).max(0));
                return put(&mut self.insert, [seed, made, &last, seq, session], None);
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
