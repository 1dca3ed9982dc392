//! A whole ledger out of a database, and into one.
//!
//! Read is one transaction that sees one moment and changes nothing, beside daemons if there are any. Written is one transaction
//! too, which keeps daemons from taking a slot: it is committed after what it wrote was read back.

use super::open::{self, connect, migrate, options, reach};
use super::{failed, flight};
use crate::store::bind::Cell;
use crate::store::moving::{
    FENCES_RAISED, HISTORY_OF_SLOTS, Kind, MoveError, Reader, SESSIONS_RAISED, TABLES, TASK_BLOCK,
    TASKS_RAISED, Table, Total, Value, Writer, exportable, same,
};
use crate::store::rows::Cells as _;
use crate::store::schema::Standing;
use futures_util::TryStreamExt;
use ledger_core::store::StoreError;
use ledger_core::{EventKind, State};
use sqlx::AssertSqlSafe;
use sqlx::postgres::PgConnection;
use std::fmt::Write as _;
use std::io::{self, BufRead, Write};

/// All tables are read and written in one go, however long that takes.
const PATIENT: &str = "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0";
const SNAPSHOT: &str = "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY";
const SLOTS: &str = "SELECT count(*) FROM slots WHERE last_seq > 0";
/// The table of a file whose rows share those of the database, where the daemon wrote them.
const HISTORY: &str = "task_history";
/// The table of a file whose rows are those of what producers said here, where these hold their keys.
const KEYS: &str = "idempotency_keys";
/// What says that no key is held twice, which holds when it is known who holds his.
const KEYS_INDEX: &str = "SELECT pg_get_indexdef('task_specs_by_key'::regclass)";
const LOOSEN_KEYS: &str = "DROP INDEX task_specs_by_key; \
    CREATE TABLE imported_keys (agent INTEGER, key TEXT, task_id BIGINT, digest BIGINT)";
/// Whoever is not named holds none.
const FREE_OTHERS: &str = "UPDATE task_specs AS s SET key_freed = 1 WHERE key IS NOT NULL AND NOT EXISTS ( \
        SELECT 1 FROM imported_keys AS k WHERE k.task_id = s.id AND k.agent = s.agent AND k.key = s.key); \
    DROP TABLE imported_keys";
/// Bytes that are sent at once.
const CHUNK: usize = 256 << 10;

/// What is derived. Below 5 are the states that have not ended; QUEUED is 1, RETRY 3, BLOCKED 4. $1 is the reason BUDGET, and
/// $2 the reason BREAKER_OPEN.
const READY: &str = "INSERT INTO ready (agent, task_type, gated, urgency, run_at, calendar, task_id) \
    SELECT s.agent, s.task_type, CASE t.state WHEN 4 THEN 1 ELSE 0 END, 9 - t.priority, t.run_at, t.calendar, t.id \
    FROM tasks AS t JOIN task_specs AS s ON s.id = t.id \
    WHERE t.state = 1 OR t.state = 3 AND t.reason <> $1 OR t.state = 4 AND t.reason = $2";
const COUNTS: &str = "INSERT INTO counts (slot, agent, state, n) \
    SELECT 0, s.agent, t.state, count(*) FROM tasks AS t JOIN task_specs AS s ON s.id = t.id GROUP BY s.agent, t.state";
const AGENT_BLOCKS: &str =
    "INSERT INTO agent_blocks (agent, block) SELECT DISTINCT agent, id >> 4 FROM task_specs";
const LIVE_BLOCKS: &str = "INSERT INTO live_blocks (block, slot, n) \
    SELECT id >> 12, 0, count(*) FROM tasks WHERE state <= 4 GROUP BY id >> 12";
const NEWEST: &str = "UPDATE tasks AS t SET history_slot = h.slot, history_seq = h.seq, history_at = h.at \
    FROM task_history_kept AS h WHERE h.task_id = t.id AND h.version = t.version";
const META: &str = "UPDATE meta SET seed = $1, created_at = $2 WHERE id = 1";
/// Nobody has it; the first daemon that comes takes it, and all that is in it.
const SLOT: &str =
    "INSERT INTO slots (slot, name, beat_at, last_seq, last_session) VALUES (0, '', 0, $1, $2)";
/// Rows were numbered anew: nobody goes on from a place in another ledger.
const BEGINS: &str =
    "INSERT INTO removed_history (slot, seq) SELECT slot, last_seq FROM slots WHERE last_seq > 0";
/// What daemons leave that did nothing; a budget that was begun then fills with time alone.
const NO_DAEMONS: &str = "DELETE FROM slots; DELETE FROM mail; DELETE FROM budgets";
/// Who would take a slot waits, and finds the ledger when all is there.
const LOCK: &str = "LOCK TABLE slots IN SHARE ROW EXCLUSIVE MODE";
/// One was heard of within the time after which it is gone.
const SERVED: &str = "SELECT EXISTS (SELECT 1 FROM slots WHERE owner IS NOT NULL \
    AND beat_at > (extract(epoch FROM clock_timestamp()) * 1000)::bigint - 10000)";

/// Somebody has to have written the rows of a restore.
const ANY_SLOT: &str = "INSERT INTO slots (slot, name, beat_at, last_seq, last_session) VALUES (0, '', 0, 0, 0) ON CONFLICT DO NOTHING";
/// $1: the kind of the row; $2: by how much; $3 and $4: states that never change again.
const RAISE: &str = "WITH before AS ( \
        SELECT id, history_slot, history_seq, history_at, \
            GREATEST(updated_at, (extract(epoch FROM clock_timestamp()) * 1000)::bigint) AS at, \
            (SELECT last_seq FROM slots WHERE slot = 0) + row_number() OVER (ORDER BY id) AS seq \
        FROM tasks WHERE state NOT IN ($3, $4) \
    ), raised AS ( \
        UPDATE tasks AS t SET fence = t.fence + $2, version = t.version + 1, updated_at = b.at, \
            history_slot = 0, history_seq = b.seq, history_at = b.at \
        FROM before AS b WHERE t.id = b.id \
        RETURNING t.id, t.version, t.fence, t.attempt, t.state, t.reason, b.at, b.seq, \
            b.history_slot, b.history_seq, b.history_at) \
    INSERT INTO task_history_kept (task_id, version, seq, at, fence, attempt, slot, kind, from_state, to_state, reason, \
        before_slot, before_seq, before_at) \
    SELECT id, version, seq, at, fence, attempt, 0, $1, state, state, reason, history_slot, history_seq, history_at FROM raised";
const RAISE_SLOTS: &str = "UPDATE slots SET last_session = last_session + $2, \
    last_seq = last_seq + CASE slot WHEN 0 THEN $1 ELSE 0 END";
const NEW_SEED: &str = "UPDATE meta SET seed = ('x' || substr(md5(random()::text || clock_timestamp()::text), 1, 16))::bit(64)::bigint";
const TASK_BLOCKS: &str =
    "SELECT CASE WHEN is_called THEN last_value + 1 ELSE last_value END FROM task_blocks";

/// As `store::moving` has it: after a dump or a base backup was restored.
pub(in crate::store) async fn raise(url: &str) -> Result<u64, MoveError> {
    let mut conn = connect(&options(url)?).await?;
    exportable(Standing::of(&open::steps_of(&mut conn).await.map_err(|error| failed(&error))?))?;
    begin_alone(&mut conn).await?;
    let raised = void_what_was_given_out(&mut conn).await.map_err(|error| failed(&error))?;
    // Twice is no harm.
    commit(conn, raised, "raise the fences once more").await
}

/// Begins a transaction beside which no daemon takes a slot.
async fn begin_alone(conn: &mut PgConnection) -> Result<(), MoveError> {
    for statement in ["BEGIN", PATIENT, LOCK] {
        run(conn, statement).await?;
    }
    match sqlx::query_scalar(SERVED).fetch_one(conn).await.map_err(|error| failed(&error))? {
        true => Err(MoveError::Served),
        false => Ok(()),
    }
}

/// Ends it; `or_else` says what to do where its fate is not known.
async fn commit<T>(mut conn: PgConnection, told: T, or_else: &str) -> Result<T, MoveError> {
    match sqlx::raw_sql("COMMIT").execute(&mut conn).await {
        Ok(_) => Ok(told),
        Err(error) if flight::was_refused(&error) => Err(failed(&error).into()),
        Err(error) => Err(StoreError::Unknown(format!("{error}; {or_else}")).into()),
    }
}

async fn void_what_was_given_out(conn: &mut PgConnection) -> sqlx::Result<u64> {
    let code = |state: State| i16::from(state.code());
    sqlx::raw_sql(ANY_SLOT).execute(&mut *conn).await?;
    let raise = sqlx::query(RAISE).bind(i16::from(EventKind::Restored.code())).bind(FENCES_RAISED);
    let raise = raise.bind(code(State::Done)).bind(code(State::Cancelled));
    let raised = raise.execute(&mut *conn).await?.rows_affected();
    let slots = sqlx::query(RAISE_SLOTS).bind(raised.cast_signed()).bind(SESSIONS_RAISED);
    slots.execute(&mut *conn).await?;
    sqlx::raw_sql(NEW_SEED).execute(&mut *conn).await?;
    let blocks: i64 = sqlx::query_scalar(TASK_BLOCKS).fetch_one(&mut *conn).await?;
    let next = blocks + TASKS_RAISED / TASK_BLOCK;
    let restart = AssertSqlSafe(format!("ALTER SEQUENCE task_blocks RESTART WITH {next}"));
    sqlx::raw_sql(restart).execute(&mut *conn).await?;
    Ok(raised)
}

/// As `store::moving` has it.
pub(in crate::store) async fn export(url: &str, out: impl Write) -> Result<Vec<Total>, MoveError> {
    let mut conn = reach(&options(url)?).await?;
    run(&mut conn, SNAPSHOT).await?;
    run(&mut conn, PATIENT).await?;
    exportable(Standing::of(&open::steps_of(&mut conn).await.map_err(|error| failed(&error))?))?;
    read(&mut conn, out).await
}

/// As `store::moving` has it.
pub(in crate::store) async fn import(url: &str, from: impl BufRead) -> Result<Vec<Total>, MoveError> {
    let options = options(url)?;
    let mut conn = connect(&options).await?;
    match Standing::of(&open::steps_of(&mut conn).await.map_err(|error| failed(&error))?) {
        Standing::Missing | Standing::UpToDate => {}
        other => exportable(other)?,
    }
    let file = Reader::begin(from)?;
    migrate(&mut conn, &options).await?;
    begin_alone(&mut conn).await?;
    refuse_unless_empty(&mut conn).await?;
    let told = fill(&mut conn, file).await?;
    run(&mut conn, "ANALYZE").await?;
    same(&told, &read(&mut conn, io::sink()).await?)?;
    commit(conn, told, "export the store to see whether it was").await
}

async fn run(conn: &mut PgConnection, statement: &'static str) -> Result<(), StoreError> {
    sqlx::raw_sql(statement).execute(conn).await.map(drop).map_err(|error| failed(&error))
}

async fn refuse_unless_empty(conn: &mut PgConnection) -> Result<(), MoveError> {
    for table in TABLES.iter().filter(|table| !table.is_of_new_stores()) {
        let rows = if table.name == HISTORY { "history" } else { table.name };
        let look = AssertSqlSafe(format!("SELECT EXISTS (SELECT 1 FROM {rows})"));
        if sqlx::query_scalar(look).fetch_one(&mut *conn).await.map_err(|error| failed(&error))? {
            return Err(MoveError::NotEmpty { table: table.name });
        }
    }
    Ok(())
}

/// Writes all tables to `out`.
async fn read(conn: &mut PgConnection, out: impl Write) -> Result<Vec<Total>, MoveError> {
    let slots: i64 = sqlx::query_scalar(SLOTS).fetch_one(&mut *conn).await.map_err(|error| failed(&error))?;
    let mut writer = Writer::begin(out)?;
    for table in &TABLES {
        writer.table(table)?;
        let source = match table.name {
            HISTORY if slots > 1 => HISTORY_OF_SLOTS,
            _ => table.postgres,
        };
        let mut rows = sqlx::query(AssertSqlSafe(table.select_of_slots(source))).fetch(&mut *conn);
        while let Some(row) = rows.try_next().await.map_err(|error| failed(&error))? {
            writer.row(table, |at, kind| {
                let cell = match kind {
                    Kind::Int | Kind::Rare | Kind::Session => row.int(at).map(Cell::from),
                    Kind::Real => row.real(at).map(Cell::from),
                    Kind::Text => row.text(at).map(Cell::from),
                    Kind::Bytes => row.bytes(at).map(Cell::from),
                };
                Ok(cell.map_err(|error| failed(&error))?)
            })?;
        }
        drop(rows);
        writer.done(table);
    }
    writer.end()
}

/// Writes what the file has, and what is derived from it.
async fn fill(conn: &mut PgConnection, mut file: Reader<impl BufRead>) -> Result<Vec<Total>, MoveError> {
    run(conn, NO_DAEMONS).await?;
    let index = sqlx::query_scalar::<_, String>(KEYS_INDEX).fetch_one(&mut *conn).await;
    let index = AssertSqlSafe(index.map_err(|error| failed(&error))?);
    run(conn, LOOSEN_KEYS).await?;
    for table in &TABLES {
        file.table(table)?;
        if table.name == "meta" {
            while let Some(row) = file.row(table)? {
                fill_meta(conn, &row).await.map_err(|error| failed(&error))?;
            }
        } else {
            fill_table(conn, table, &mut file).await?;
        }
    }
    let told = file.end()?;
    run(conn, FREE_OTHERS).await?;
    sqlx::raw_sql(index).execute(&mut *conn).await.map_err(|error| failed(&error))?;
    let (budget, breaker) = (ledger_core::Reason::Budget.code(), ledger_core::Reason::BreakerOpen.code());
    let ready = sqlx::query(READY).bind(i64::from(budget)).bind(i64::from(breaker));
    ready.execute(&mut *conn).await.map_err(|error| failed(&error))?;
    run(conn, NEWEST).await?;
    run(conn, COUNTS).await?;
    run(conn, LIVE_BLOCKS).await?;
    run(conn, AGENT_BLOCKS).await?;
    Ok(told)
}

/// What `meta` is here: a row, the row of a slot, and a sequence.
async fn fill_meta(conn: &mut PgConnection, row: &[Value]) -> sqlx::Result<()> {
    let [
        Value::Int(seed),
        Value::Int(created_at),
        Value::Int(blocks),
        Value::Int(last_seq),
        Value::Int(last_session),
    ] = row
    else {
        return Ok(()); // What is missing is seen when it is read back.
    };
    sqlx::query(META).bind(seed).bind(created_at).execute(&mut *conn).await?;
    sqlx::query(SLOT).bind(last_seq).bind(last_session).execute(&mut *conn).await?;
    sqlx::query(BEGINS).execute(&mut *conn).await?;
    // Undone with the transaction, other than setval.
    let restart = AssertSqlSafe(format!("ALTER SEQUENCE task_blocks RESTART WITH {blocks}"));
    sqlx::raw_sql(restart).execute(&mut *conn).await.map(drop)
}

async fn fill_table(
    conn: &mut PgConnection,
    table: &'static Table,
    file: &mut Reader<impl BufRead>,
) -> Result<(), MoveError> {
    let more: String = table.of_postgres.iter().map(|(name, _)| format!(", \"{name}\"")).collect();
    let rest: String = table.of_postgres.iter().map(|(_, value)| format!("\t{value}")).collect();
    let into = match table.name {
        // What a ledger brings along is kept row by row until its tasks go.
        HISTORY => "task_history_kept",
        KEYS => "imported_keys",
        name => name,
    };
    let copy = format!("COPY {into} ({}{more}) FROM STDIN", table.names());
    let mut into = conn.copy_in_raw(&copy).await.map_err(|error| failed(&error))?;
    let (mut chunk, mut last) = (String::new(), None);
    loop {
        let row = match file.row(table) {
            Ok(row) => row,
            Err(error) => {
                // The first failure is what is told; this one only ends the copy.
                let _ = into.abort("the file is damaged").await;
                return Err(error);
            }
        };
        if let Some(row) = &row {
            add(&mut chunk, table, row, &rest);
            last = row.first().cloned();
        }
        if !chunk.is_empty() && (row.is_none() || chunk.len() >= CHUNK) {
            into.send(chunk.as_bytes()).await.map_err(|error| failed(&error))?;
            chunk.clear();
        }
        if row.is_none() {
            break;
        }
    }
    into.finish().await.map_err(|error| failed(&error))?;
    if let ("agent_events", Some(Value::Int(last))) = (table.name, last) {
        let next = last.saturating_add(1);
        let restart = format!("ALTER TABLE agent_events ALTER COLUMN seq RESTART WITH {next}");
        sqlx::raw_sql(AssertSqlSafe(restart)).execute(conn).await.map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// Adds a row in the text form of COPY.
fn add(chunk: &mut String, table: &Table, row: &[Value], rest: &str) {
    for (at, (value, (_, kind))) in row.iter().zip(table.columns).enumerate() {
        if at > 0 {
            chunk.push('\t');
        }
        // Writing to a String cannot fail.
        let _ = match (kind, value) {
            (_, Value::Null) | (Kind::Rare, Value::Int(0)) => chunk.write_str("\\N"),
            (_, Value::Int(value)) => write!(chunk, "{value}"),
            (_, Value::Real(value)) => write!(chunk, "{value:?}"),
            (_, Value::Text(text)) => {
                escape(chunk, text);
                Ok(())
            }
            (_, Value::Bytes(bytes)) => {
                chunk.push_str("\\\\x");
                bytes.iter().try_for_each(|byte| write!(chunk, "{byte:02x}"))
            }
        };
    }
    chunk.push_str(rest);
    chunk.push('\n');
}

fn escape(chunk: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '\\' => chunk.push_str("\\\\"),
            '\n' => chunk.push_str("\\n"),
            '\r' => chunk.push_str("\\r"),
            '\t' => chunk.push_str("\\t"),
            c => chunk.push(c),
        }
    }
}
