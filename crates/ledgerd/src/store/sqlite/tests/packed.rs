//! Rows of several values in one: as they were as rows of their own, on the way into them and out of them.

use super::raw;
use crate::store::bind::Cell;
use crate::store::moving::TABLES;
use crate::store::rig::{Folder, New, Rig, failure};
use crate::store::schema;
use crate::store::sqlite::moving::export;
use crate::store::sqlite::packed::Entries;
use crate::store::sqlite::{Options, open, open::MIGRATIONS};
use ledger_core::store::{Changes, Reader as _};
use ledger_core::watch::Cut;
use ledger_core::{Class, Outcome, State, TaskId};
use rusqlite::types::Value;
use sqlx::migrate::Migrator;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};
use std::path::Path;

/// All rows of a query.
fn dump(folder: &Path, query: &str) -> Vec<Vec<Value>> {
    let conn = rusqlite::Connection::open(folder.join("ledger.db")).expect("it opens");
    let mut statement = conn.prepare(query).expect("it prepares");
    let width = statement.column_count();
    let rows = statement.query_map([], |row| (0..width).map(|at| row.get(at)).collect()).expect("it runs");
    rows.collect::<Result<_, _>>().expect("rows")
}

/// 1,000 tasks of every kind of row that there was, and a history with gaps where tasks were removed.
const OF_BEFORE: &str = r#"
    WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 1000)
    INSERT INTO tasks (id, state, reason, priority, run_at, calendar, deadline, queued_at, updated_at, version, fence, delivery,
        attempt, idle_deliveries, history, worker, incarnation, session, lease_until, acked_at, progress_at, sample_epoch,
        sample_probe, sample_told, retry_count, losses, previous_delay, stop_cause, stop_until, discarded, loss_weight, lost_at,
        blocks, result)
    SELECT n, n % 7 + 1, n % 9, n % 10, n * 1000, n % 2, iif(n % 5, NULL, n), n, n + 1, 3, n, 1, 1, 0, 3 * n,
        iif(n % 7 = 1, 'w "ü" ' || n, NULL), iif(n % 7 = 1, -9223372036854775807 + n, NULL), iif(n % 7 = 1, n, NULL),
        iif(n % 7 = 1, n + 9, NULL), iif(n % 14 = 1, n, NULL), iif(n % 7 = 1, n, NULL), iif(n % 21 = 1, n, NULL),
        iif(n % 21 = 1, 0, NULL), iif(n % 21 = 1, 1, NULL), n % 11 = 1, n % 13 = 1, (n % 11 = 1) * 700, iif(n % 17, NULL, 2),
        iif(n % 17, NULL, n), n % 19 = 1, (n % 13 = 1) * 1000, iif(n % 13 = 1, n, NULL), n % 23 = 1, iif(n % 3, NULL, x'00ff')
    FROM n;
    WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 3000)
    INSERT INTO task_history (seq, task_id, version, prev, kind, from_state, to_state, reason, at, fence, attempt, worker, until,
        digest, error, facts)
    SELECT n, (n + 2) / 3, (n + 2) % 3 + 1, iif(n % 3 = 1, NULL, n - 1), n % 5 + 1, iif(n % 3 = 1, NULL, 1), 2, 0, n, n % 3, 1,
        iif(n % 2, 'w "ü" ' || n, NULL), iif(n % 4, NULL, n + 30000), iif(n % 6, NULL, -9223372036854775807 + n),
        iif(n % 8, NULL, '{"class":2,"message":"a \"b\" \n ü"}'), iif(n % 9, NULL, '[["note","why \\ \u0001"]]')
    FROM n;
    DELETE FROM task_history WHERE task_id % 10 = 3 OR task_id BETWEEN 500 AND 600;
    DELETE FROM tasks WHERE id % 10 = 3 OR id BETWEEN 500 AND 600;
"#;
macro_rules! of_tasks {
    ($from:literal) => {
        concat!(
            "SELECT id, state, reason, priority, run_at, calendar, deadline, queued_at, updated_at, version, fence, delivery, attempt, \
             idle_deliveries, history, worker, incarnation, session, lease_until, acked_at, progress_at, sample_epoch, sample_probe, \
             sample_told, retry_count, losses, preemptions, redrives, probe_failures, tokens, previous_delay, stop_cause, stop_until, \
             discarded, loss_weight, lost_at, free_releases, blocks, result FROM ",
            $from,
            " ORDER BY id"
        )
    };
}
const TASKS: [&str; 2] = [of_tasks!("tasks"), of_tasks!("tasks_wide")];
const HISTORY: [&str; 2] = [
    "SELECT seq, task_id, version, prev, kind, from_state, to_state, reason, at, fence, attempt, worker, until, digest, error, \
        facts FROM task_history ORDER BY seq",
    "SELECT * FROM history ORDER BY seq",
];

#[tokio::test]
async fn a_ledger_of_before_keeps_every_value() {
    let folder = Folder::new();
    let options = SqliteConnectOptions::new().filename(folder.0.join("ledger.db")).create_if_missing(true);
    let mut conn = options.connect().await.expect("a new file");
    let first = schema::migrations(&MIGRATIONS[..6]);
    Migrator::with_migrations(first).run_direct(None, &mut conn, false).await.expect("a new ledger");
    conn.execute(OF_BEFORE).await.expect("rows of before");
    conn.close().await.expect("it closes");
    let tasks = dump(&folder.0, TASKS[0]);
    let history = dump(&folder.0, HISTORY[0]);
    assert!(tasks.len() > 700 && history.len() == 3 * tasks.len());

    let (_store, reader) = open(&folder.0, Options::default()).await.expect("it is brought up to date");
    assert_eq!(dump(&folder.0, TASKS[1]), tasks);
    assert_eq!(dump(&folder.0, HISTORY[1]), history);
    let conn = rusqlite::Connection::open(folder.0.join("ledger.db")).expect("it opens");
    let mut entries = Entries::of(&conn).expect("it prepares");
    let table = TABLES.iter().find(|table| table.name == "task_history").expect("it is one");
    for row in dump(&folder.0, &table.select(table.sqlite)) {
        let Value::Integer(seq) = row[2] else { panic!("a number") };
        let entry = entries.entry(seq).expect("it is there");
        let fields = entry.fields().expect("they can be read");
        for (at, (value, (name, kind))) in row.iter().zip(table.columns).enumerate() {
            let read = match fields.cell(at, *kind).expect("it can be read") {
                Cell::Null => Value::Null,
                Cell::Int(number) => Value::Integer(number),
                Cell::Text(text) => Value::Text(text.into_owned()),
                Cell::Real(_) | Cell::Bytes(_) => panic!("no column has one"),
            };
            assert_eq!(&read, value, "{name} of entry {seq}");
        }
    }
    for id in [1, 2, 499, 601, 1000] {
        let rows = reader.history(TaskId(id)).await.expect("it reads").expect("it has a history");
        assert_eq!(rows.iter().map(|row| row.seq).collect::<Vec<_>>(), [3 * id - 2, 3 * id - 1, 3 * id]);
    }
}

#[tokio::test]
async fn entries_go_with_their_tasks_and_leave_the_others_where_they_are() {
    let mut rig = Rig::sqlite().await;
    // Their entries stand between one another's, and those of a task in different rows.
    let ids = rig.enqueue_all((0..50).map(|_| New::of("a"))).await;
    let stays = |id: &TaskId| id.0.is_multiple_of(3);
    let mut fences = Vec::new();
    for id in &ids {
        fences.push(rig.run(*id).await);
    }
    rig.commit().await;
    for (id, fence) in ids.iter().zip(&fences) {
        let outcome = if id.0 % 2 == 0 { failure(Class::Permanent) } else { Outcome::Complete };
        rig.end(*id, *fence, outcome).await;
    }
    rig.commit().await;
    let rows = dump(rig.folder(), "SELECT seq FROM task_history").len();
    assert!(rows > 8, "{rows}");
    let before = dump(rig.folder(), "SELECT * FROM history WHERE task_id % 3 = 0 ORDER BY seq");
    let mut kept = Vec::new();
    for id in ids.iter().filter(|id| stays(id)) {
        kept.push((*id, rig.history(*id).await));
    }
    let going: Vec<TaskId> = ids.iter().filter(|id| !stays(id)).copied().collect();
    for some in going.chunks(7) {
        for id in some {
            assert!(rig.get(*id).await.is_some());
        }
        rig.write(Changes { removed: some.to_vec(), ..Changes::default() }).await;
        rig.commit().await;
    }
    assert_eq!(dump(rig.folder(), "SELECT * FROM history ORDER BY seq"), before);
    for (id, history) in &kept {
        assert_eq!(&rig.history(*id).await, history);
        assert_eq!(rig.get(*id).await.map(|task| task.state.is_terminal()), Some(true));
    }
    let reader = rig.reader().expect("SQLite has one");
    let end = reader.end().await.expect("it reads");
    let mut from = Cut::default();
    from.pass(0, end.removed.of(0));
    let is_after =
        |row: &[Value]| matches!(row[0], Value::Integer(seq) if seq.cast_unsigned() > end.removed.of(0));
    let read = reader.after(&from, 100).await.expect("it reads").expect("nothing after it was removed");
    assert_eq!(read.rows.len(), before.iter().filter(|row| is_after(row)).count());
    let ids: Vec<TaskId> = kept.iter().map(|(id, _)| *id).collect();
    for id in &ids {
        rig.get(*id).await;
    }
    rig.write(Changes { removed: ids, ..Changes::default() }).await;
    rig.commit().await;
    assert!(dump(rig.folder(), "SELECT seq FROM task_history").is_empty(), "no row is left of nothing");
}

#[tokio::test]
async fn an_entry_that_is_missing_is_named() {
    let mut rig = Rig::sqlite().await;
    for id in rig.enqueue_all((0..20).map(|_| New::of("a"))).await {
        rig.complete(id).await;
    }
    rig.commit().await;
    let mut conn = raw(rig.folder()).await;
    conn.execute("UPDATE task_history SET entries = json_replace(entries, '$[3]', 0) WHERE seq = 1")
        .await
        .expect("it may go");
    let error = export(rig.folder(), std::io::sink()).await.expect_err("it is missing");
    assert!(error.to_string().contains("entry 4 of the history is missing"), "{error}");
    let bent = "DROP TRIGGER task_history_is_append_only; \
        UPDATE task_history SET entries = json_replace(entries, '$[3]', json_array(0, 1, -1))";
    conn.execute(bent).await.expect("it runs");
    let error = export(rig.folder(), std::io::sink()).await.expect_err("it leads nowhere");
    assert!(error.to_string().contains("-1 after another"), "{error}");
    conn.execute("DELETE FROM task_history WHERE seq = 1").await.expect("it runs");
    let error = export(rig.folder(), std::io::sink()).await.expect_err("they are missing");
    assert!(error.to_string().contains("entry 1 of the history is missing"), "{error}");
    assert_eq!(error.exit_code(), 65);
}

#[tokio::test]
async fn history_cannot_be_changed() {
    let mut rig = Rig::sqlite().await;
    let ids = rig.enqueue_all((0..3).map(|_| New::of("a"))).await;
    rig.complete(ids[1]).await;
    rig.commit().await;
    let mut conn = raw(rig.folder()).await;
    for change in [
        "at = at + 1",
        "task = 7",
        "seq = seq + 1",
        "entries = json_replace(entries, '$[1][8]', 7)",
        "entries = json_remove(entries, '$[0]')",
        "entries = json_insert(entries, '$[#]', json_array(0))",
        "entries = json_replace(entries, '$[1]', 1)",
        "entries = json_replace(entries, '$[1]', null)",
        "entries = '[]'",
    ] {
        let change = AssertSqlSafe(format!("UPDATE task_history SET {change} WHERE seq = 1"));
        let refused = conn.execute(change).await.expect_err("append-only");
        assert!(refused.to_string().contains("append-only"), "{refused}");
    }
    assert_eq!(rig.history(ids[1]).await.last().map(|record| record.to), Some(State::Done));
}
