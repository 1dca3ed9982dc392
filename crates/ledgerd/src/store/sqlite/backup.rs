//! A copy of the ledger for bad days: made beside a daemon, looked through, and made a ledger again.
//!
//! What is copied is pages, as they are at one moment, and with them a row that says what the tables had: SQLite itself does not
//! notice a byte of a payload that another disk has changed. Invariants: a file has its final name when it is whole, verified and
//! on the disk; what is restored is no file until nothing that was given out after the backup can be taken for its own.

use super::moving::{Coming, DERIVED, connect, look_into, lost, place, read, write_into};
use super::open::{self, DATABASE, OpenError};
use super::payloads::Folder;
use super::sweep;
use super::{failed, failed_to_write};
use crate::store::moving::{
    Backup, FENCES_RAISED, MoveError, SESSIONS_RAISED, TASKS_RAISED, Total, exportable,
};
use crate::store::schema::Standing;
use ledger_core::store::StoreError;
use ledger_core::{EventKind, State};
use rusqlite::backup::StepResult;
use rusqlite::{Connection, OpenFlags};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// What a restore writes to, in the data directory. One that was killed leaves it, and the next one begins it anew.
const COMING: &str = "ledger.db.restore";
/// Pages that are copied at once: 1 MiB.
const STEP: i32 = 256;
/// Steps after which the disk gets what was copied: a commit of the daemon that shares the disk waits for 16 MiB at most, not
/// for the whole file.
const STEPS_UNSYNCED: u32 = 16;

const LAST_SEQ: &str = "SELECT last_seq FROM meta WHERE id = 1";
const NAME: &str = "SELECT strftime('ledger-%Y%m%dT%H%M%SZ.db', 'now')";
const IS_BACKUP: &str =
    "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'backup' AND type = 'table')";
const SAY: &str = "\
    CREATE TABLE backup (id INTEGER PRIMARY KEY CHECK (id = 1), last_seq INTEGER NOT NULL, totals TEXT NOT NULL) STRICT; \
    INSERT INTO backup (id, last_seq, totals) SELECT 1, last_seq, '' FROM meta WHERE id = 1";
const PLACES: &str = "SELECT task_id, file, at, length, digest FROM payload_places ORDER BY task_id";
const PUT: &str = "UPDATE task_specs SET payload = ?2 WHERE id = ?1";
const SAY_TOTALS: &str = "UPDATE backup SET totals = ?";
const SAID: &str = "SELECT last_seq, totals FROM backup WHERE id = 1";
/// Whether the history has an entry beyond what was counted, or a task is not as its newest entry says. One walk through all
/// entries: to look one up for each task would read each row of them many times.
const AHEAD: &str = "SELECT \
    COALESCE((SELECT seq + json_array_length(entries) - 1 FROM task_history ORDER BY seq DESC LIMIT 1), 0) \
        > (SELECT last_seq FROM meta) \
    OR (SELECT COUNT(*) FROM history AS h CROSS JOIN tasks AS t ON t.id = h.task_id \
        WHERE t.history = h.seq AND h.version = t.version AND h.fence = t.fence AND h.to_state = t.state) \
        <> (SELECT COUNT(*) FROM tasks)";
/// All that is derived is made anew: nobody has compared it.
const FORGET_DERIVED: &str =
    "DELETE FROM counts; DELETE FROM live_blocks; DELETE FROM agent_blocks; DROP TABLE backup";
const NOW: &str = "SELECT CAST(unixepoch('subsec') * 1000 AS INTEGER)";
/// ?1 and ?2: states that never change again; ?3: by how much; ?4: now; ?5: the kind of the entry.
const RAISE: &str = "\
    INSERT INTO task_history (seq, task, at, entries) \
    SELECT MIN(seq), 0, 0, json_group_array(json_array( \
        id, version + 1, seq - history, ?5, state, state, reason, max(updated_at, ?4), fence + ?3, attempt) ORDER BY seq) \
    FROM (SELECT *, (SELECT last_seq FROM meta) + row_number() OVER (ORDER BY id) AS seq FROM tasks \
        WHERE state NOT IN (?1, ?2)) \
    GROUP BY seq >> 4";
/// Numbered as above.
const RAISED: &str = "\
    UPDATE tasks SET fence = fence + ?3, version = version + 1, history = h.seq, updated_at = max(updated_at, ?4) \
    FROM (SELECT id, (SELECT last_seq FROM meta) + row_number() OVER (ORDER BY id) AS seq FROM tasks \
        WHERE state NOT IN (?1, ?2)) AS h \
    WHERE h.id = tasks.id";
const NUMBERS: &str = "UPDATE meta SET seed = random(), \
    last_seq = last_seq + ?1, last_task = last_task + ?2, last_session = last_session + ?3 WHERE id = 1";
const NO_STREAMS: &str = "UPDATE sessions SET open = 0";

/// Every statement that runs on a ledger, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 9] =
    [LAST_SEQ, PLACES, PUT, AHEAD, NOW, RAISE, RAISED, NUMBERS, NO_STREAMS];

/// As `store::moving` has it.
pub(in crate::store) async fn backup(dir: &Path, to: &Path) -> Result<Backup, MoveError> {
    exportable(Standing::of(&open::steps(dir).await?))?;
    let held = sweep::hold(dir)?;
    let from = look_into(&dir.join(DATABASE))?;
    let file = target(&from, to)?;
    let folder =
        file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    // SQLite makes no file of its own there: one that may be read by others is never one for a moment.
    let made = tempfile::Builder::new().prefix(".ledgerd-backup-").tempfile_in(folder)?;
    copy(&from, made.path(), made.as_file())?;
    drop(from);
    say(made.path(), &Folder::of(dir))?;
    drop(held);
    let found = look_through(made.path()).await?;
    let kept = made.as_file().set_permissions(Permissions::from_mode(open::MODE)).and_then(|()| {
        made.as_file().sync_all()?;
        made.persist_noclobber(&file).map_err(|error| error.error)?;
        File::open(folder)?.sync_all()
    });
    match kept {
        Ok(()) => Ok(Backup { file, ..found }),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(MoveError::Exists(file)),
        Err(error) => Err(error.into()),
    }
}

/// As `store::moving` has it.
pub(in crate::store) async fn check(file: &Path) -> Result<Backup, MoveError> {
    // Where there is none SQLite would say that it cannot be opened, and not why.
    fs::metadata(file)?;
    look_through(file).await.map_err(|error| damaged(file, error))
}

/// As `store::moving` has it.
pub(in crate::store) async fn restore(file: &Path, dir: &Path) -> Result<Backup, MoveError> {
    let _lock = open::lock(dir)?;
    let path = dir.join(DATABASE);
    if path.symlink_metadata().is_ok() {
        return Err(MoveError::Schema(format!(
            "{} is there already; restore into a directory that has no ledger",
            path.display()
        )));
    }
    open::check_folder(dir)?;
    let coming = Coming::new(dir, COMING)?;
    let mut from = File::open(file)?;
    let mut to = fs::OpenOptions::new().write(true).open(coming.path())?;
    io::copy(&mut from, &mut to)?;
    drop(to);
    // The copy, for that is what is kept: what a disk hands out twice may differ.
    let found = look_through(coming.path()).await.map_err(|error| damaged(file, error))?;
    let conn = write_into(coming.path())?;
    make_a_ledger(&conn).map_err(|error| failed_to_write(&error))?;
    conn.close().map_err(|(_, error)| failed_to_write(&error))?;
    coming.arrive(&path)?;
    Ok(Backup { file: file.to_owned(), ..found })
}

/// As `store::moving` has it.
pub(in crate::store) async fn raise(dir: &Path) -> Result<u64, MoveError> {
    exportable(Standing::of(&open::steps(dir).await?))?;
    let _lock = open::lock(dir)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = connect(&dir.join(DATABASE), flags)?;
    let raise = || {
        conn.pragma_update(None, "synchronous", "FULL")?;
        conn.execute_batch("BEGIN IMMEDIATE")?;
        let raised = void_what_was_given_out(&conn)?;
        conn.execute_batch("COMMIT")?;
        Ok(raised)
    };
    raise().map_err(|error: rusqlite::Error| failed_to_write(&error).into())
}

/// The file that a backup becomes.
fn target(from: &Connection, to: &Path) -> Result<PathBuf, MoveError> {
    let file = if to.is_dir() {
        let name: String = from.query_row(NAME, [], |row| row.get(0)).map_err(|error| failed(&error))?;
        to.join(name)
    } else {
        to.to_owned()
    };
    match file.symlink_metadata() {
        Ok(_) => Err(MoveError::Exists(file)),
        Err(_) => Ok(file),
    }
}

/// Copies all pages. Takes no lock that a commit waits for: it is one more reader of the log.
fn copy(from: &Connection, to: &Path, file: &File) -> Result<(), MoveError> {
    // The first read fixes what is seen, for the whole copy. Without it SQLite begins anew after each commit of somebody else, that
    // is for ever.
    from.execute_batch("BEGIN").map_err(|error| failed(&error))?;
    from.query_row(LAST_SEQ, [], |row| row.get::<_, i64>(0)).map_err(|error| failed(&error))?;
    let mut into = write_into(to)?;
    let copying = rusqlite::backup::Backup::new(from, &mut into).map_err(|error| failed(&error))?;
    let mut steps = 0;
    loop {
        match copying.step(STEP).map_err(|error| failed_to_write(&error))? {
            StepResult::Done => break,
            StepResult::More => {
                steps += 1;
                if steps % STEPS_UNSYNCED == 0 {
                    file.sync_data()?;
                }
            }
            // Nobody else has the copy open, and what is read is read already.
            _ => return Err(StoreError::Unavailable("the ledger is locked".to_owned()).into()),
        }
    }
    drop(copying);
    into.close().map_err(|(_, error)| failed_to_write(&error))?;
    Ok(())
}

/// Makes one file of the copy, which a log and files of payloads would otherwise stand beside, and writes into it what it has.
fn say(path: &Path, folder: &Folder) -> Result<(), MoveError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = connect(path, flags)?;
    conn.pragma_update(None, "journal_mode", "DELETE").map_err(|error| failed_to_write(&error))?;
    take_in(&conn, folder)?;
    let totals = text(&read(&conn, folder, io::sink())?);
    let said = conn.execute_batch(SAY).and_then(|()| conn.execute(SAY_TOTALS, [&totals]).map(drop));
    said.map_err(|error| failed_to_write(&error))?;
    conn.close().map_err(|(_, error)| failed_to_write(&error))?;
    Ok(())
}

/// Puts payloads that are in files into the rows of their tasks. Nothing is to be kept of a copy that is not finished.
fn take_in(conn: &Connection, folder: &Folder) -> Result<(), MoveError> {
    for (name, value) in [("journal_mode", "OFF"), ("synchronous", "OFF")] {
        conn.pragma_update(None, name, value).map_err(|error| failed_to_write(&error))?;
    }
    conn.execute_batch("BEGIN").map_err(|error| failed_to_write(&error))?;
    let mut places = conn.prepare(PLACES).map_err(|error| failed(&error))?;
    let mut reading = folder.clone().reading();
    let mut put = conn.prepare(PUT).map_err(|error| failed(&error))?;
    let mut rows = places.query([]).map_err(|error| failed(&error))?;
    while let Some(row) = rows.next().map_err(|error| failed(&error))? {
        let (task, place) =
            row.get(0).and_then(|task| Ok((task, place(row, 1)?))).map_err(|error| failed(&error))?;
        let payload = reading.read(place).map_err(|error| lost(task, &error))?;
        put.execute((task, &payload[..])).map_err(|error| failed_to_write(&error))?;
    }
    conn.execute_batch("DELETE FROM payload_places; COMMIT").map_err(|error| failed_to_write(&error))?;
    Ok(())
}

/// Looks at every page and row.
async fn look_through(path: &Path) -> Result<Backup, MoveError> {
    let conn = look_into(path)?;
    let no = |what: String| Err(MoveError::Damaged(what));
    let is_backup: bool = conn.query_row(IS_BACKUP, [], |row| row.get(0)).map_err(|error| failed(&error))?;
    if !is_backup {
        return no("this is no file of ledgerd backup".to_owned());
    }
    exportable(Standing::of(&open::steps_of(path).await?))?;
    let sound: String =
        conn.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(|error| failed(&error))?;
    if sound != "ok" {
        return no(sound);
    }
    let said = conn.query_row(SAID, [], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)));
    let (last_seq, said) = said.map_err(|error| failed(&error))?;
    let ahead: bool = conn.query_row(AHEAD, [], |row| row.get(0)).map_err(|error| failed(&error))?;
    if ahead {
        return no("a task is not as the last row of its history says".to_owned());
    }
    // A backup is one file: what a row names elsewhere is not there.
    let totals = read(&conn, &Folder::of(path), io::sink())?;
    if text(&totals) != said {
        let differs = totals.iter().find(|total| !said.contains(&total.sha256));
        let table = differs.map_or("tables", |total| total.table);
        return no(format!("rows of {table} are not those that were backed up"));
    }
    Ok(Backup { file: path.to_owned(), last_seq: last_seq.cast_unsigned(), totals })
}

/// What is said of each table, in one form.
fn text(totals: &[Total]) -> String {
    serde_json::to_string(totals).expect("plain structs with text keys always serialize")
}

/// Whatever cannot be read in a backup is told as the backup's fault, by its name.
fn damaged(file: &Path, error: MoveError) -> MoveError {
    let what = match error {
        MoveError::Damaged(what)
        | MoveError::Store(StoreError::Corrupt(what) | StoreError::Statement(what)) => what,
        MoveError::Open(OpenError::Corrupt { what, .. }) => what,
        other => return other,
    };
    MoveError::Damaged(format!("{} is damaged: {what}; take another backup", file.display()))
}

fn make_a_ledger(conn: &Connection) -> rusqlite::Result<()> {
    conn.execute_batch("BEGIN")?;
    conn.execute_batch(FORGET_DERIVED)?;
    conn.execute_batch(DERIVED)?;
    void_what_was_given_out(conn)?;
    conn.execute_batch("COMMIT")
}

/// Raises every fence that may have been claimed under since, and moves all counters beyond what may have been handed out.
fn void_what_was_given_out(conn: &Connection) -> rusqlite::Result<u64> {
    let states = (i64::from(State::Done.code()), i64::from(State::Cancelled.code()));
    let kind = i64::from(EventKind::Restored.code());
    let now: i64 = conn.query_row(NOW, [], |row| row.get(0))?;
    conn.execute(RAISE, (states.0, states.1, FENCES_RAISED, now, kind))?;
    let raised = conn.execute(RAISED, (states.0, states.1, FENCES_RAISED, now))?;
    let rows = i64::try_from(raised).unwrap_or(i64::MAX);
    conn.execute(NUMBERS, (rows, TASKS_RAISED, SESSIONS_RAISED))?;
    conn.execute(NO_STREAMS, [])?;
    Ok(raised as u64)
}
