//! Every row survives the way between stores, in both directions, as the same bytes; and nothing of a file that is not sound
//! is kept.

use super::*;
use crate::store::bind::Cell;
use crate::store::rig::{Folder, Kind as Rigged, New, Rig, database, failure, notes};
use crate::store::text;
use ledger_core::store::{
    AgentEvent, AgentEventKind, AgentRow, BudgetRow, Changes, Pause, Reader as _, RequestRow, SessionRow,
    Want,
};
use ledger_core::{
    AgentId, AgentOverrides, Class, Event, Outcome, Reason, SessionId, State, TaskId, Timestamp,
};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, Row};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Draws of a test, the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> i64 {
        (self.roll() % end).cast_signed()
    }

    fn text(&mut self) -> String {
        const PIECES: [&str; 8] = ["a", "\\", "\n", "\t", "\r", "\"", "ü€", "\\N"];
        (0..self.below(6)).map(|_| PIECES[self.below(8) as usize]).collect()
    }

    fn bytes(&mut self) -> Vec<u8> {
        // About as long as a result that fits into its task's row.
        let length = [0, 1, 255, 256, 257, 3_000][self.below(6) as usize];
        (0..length).map(|_| self.roll() as u8).collect()
    }
}

/// A value that a column of both stores takes.
fn value(dice: &mut Dice, table: &Table, at: usize, row: i64) -> Value {
    let (name, kind) = table.columns[at];
    let is_key = at == 0 || name == "fence" && table.name == "salvage" || name == "task_type";
    match (table.name, name) {
        ("meta", "task_blocks") => return Value::Int(7),
        ("meta", "last_seq") => return Value::Int(1_000),
        ("tasks", "worker" | "lease_until") | ("tasks", "stop_cause" | "stop_until") if row % 3 == 0 => {
            return Value::Null;
        }
        ("agents", "name") | ("sessions", "worker") | ("requests", "id") => {
            return Value::Text(format!("{row}{}", dice.text()));
        }
        // Each of some brings the key of the one before it.
        ("task_specs", "agent") => return Value::Int(row / 2 % 3),
        ("task_specs", "key") if row % 5 > 0 => return Value::Text(format!("\\\n{}", row / 2)),
        // Of what is packed, JSON stays JSON.
        ("task_history", "error" | "facts") if dice.below(3) > 0 => {
            return Value::Text(text::written(&[dice.text()]));
        }
        ("task_history", "error" | "facts") => return Value::Null,
        ("task_history", "version") => return Value::Int(row % 3 + 1),
        ("task_history", "task_id") => return Value::Int(row / 3 + 1),
        ("task_history", "seq") => return Value::Int(row / 3 + 1 + 100 * (row % 3)),
        ("breakers", "state") => return Value::Text("HALF_OPEN".to_owned()),
        ("requests", "at") => return Value::Int(row / 2),
        (_, "state" | "from_state" | "to_state") if kind == Kind::Int => return Value::Int(row % 7 + 1),
        (_, "priority") => return Value::Int(row % 10),
        (_, "calendar" | "frees_key" | "open" | "discarded" | "sample_told") => {
            return Value::Int(row % 2);
        }
        _ => {}
    }
    let optional = matches!(
        name,
        "pause"
            | "labels"
            | "policy"
            | "parent"
            | "key"
            | "error"
            | "checkpoint"
            | "progress_fraction"
            | "question"
            | "answer"
            | "deadline"
            | "lost_at"
            | "until_ns"
            | "cause"
            | "digest"
            | "facts"
            | "until"
    ) && matches!(
        table.name,
        "agents" | "task_specs" | "task_notes" | "tasks" | "task_history" | "agent_events"
    ) && !(table.name == "task_specs" && name == "digest");
    if optional && dice.below(3) == 0 {
        return Value::Null;
    }
    match kind {
        Kind::Int if is_key => Value::Int(row + 1),
        Kind::Int if matches!(name, "digest" | "fingerprint" | "seed" | "incarnation" | "epoch") => {
            Value::Int(dice.roll().cast_signed())
        }
        // Versions begin at 1.
        Kind::Int | Kind::Rare | Kind::Session => {
            Value::Int(dice.below(200).max(i64::from(name == "version")))
        }
        Kind::Real => Value::Real(1.0 / (dice.below(1_000) as f64 + 3.0)),
        Kind::Text if is_key => Value::Text(format!("{row}")),
        Kind::Text => Value::Text(dice.text()),
        Kind::Bytes => Value::Bytes(dice.bytes()),
    }
}

impl Value {
    fn cell(&self) -> Cell<'_> {
        match self {
            Self::Null => Cell::Null,
            Self::Int(value) => Cell::Int(*value),
            Self::Real(value) => Cell::Real(*value),
            Self::Text(value) => Cell::Text(value.as_str().into()),
            Self::Bytes(value) => Cell::Bytes(value),
        }
    }
}

/// Keys that tasks of these rows hold: of two that brought one, the later; and not each that is the only one.
fn held_keys(specs: &[Vec<Value>]) -> Vec<Vec<Value>> {
    let at = |name| {
        let specs = TABLES.iter().find(|table| table.name == "task_specs").expect("it is there");
        specs.columns.iter().position(|(column, _)| *column == name).expect("it has it")
    };
    let columns = ["agent", "key", "id", "digest"].map(at);
    let mut held = BTreeMap::new();
    for (row, spec) in specs.iter().enumerate() {
        if let [Value::Int(agent), Value::Text(key), ..] = columns.map(|at| &spec[at])
            && row % 11 > 0
        {
            held.insert((*agent, key.clone()), columns.map(|at| spec[at].clone()).to_vec());
        }
    }
    held.into_values().collect()
}

/// The file of a ledger whose rows mean nothing, with `rows` of each table.
fn awkward(seed: u64, rows: i64) -> Vec<u8> {
    let mut dice = Dice(seed);
    let mut file = Vec::new();
    let mut writer = Writer::begin(&mut file).expect("memory takes it");
    let mut keys = Vec::new();
    for table in &TABLES {
        writer.table(table).expect("memory takes it");
        let rows = if table.name == "meta" { 1 } else { rows };
        let mut rows: Vec<Vec<Value>> = (0..rows)
            .map(|row| (0..table.columns.len()).map(|at| value(&mut dice, table, at, row)).collect())
            .collect();
        match table.name {
            "task_specs" => keys = held_keys(&rows),
            "idempotency_keys" => rows = std::mem::take(&mut keys),
            _ => {}
        }
        if table.name == "sessions" {
            rows.sort_by_key(|row| match &row[0] {
                Value::Text(worker) => worker.clone(),
                _ => String::new(),
            });
        }
        if table.name == "requests" {
            rows.sort_by_key(|row| match (&row[3], &row[0]) {
                (Value::Int(at), Value::Text(id)) => (*at, id.clone()),
                _ => (0, String::new()),
            });
        }
        for row in &rows {
            writer.row(table, |at, _| Ok(row[at].cell())).expect("memory takes it");
        }
        writer.done(table);
    }
    writer.end().expect("memory takes it");
    file
}

async fn out_of_sqlite(dir: &Path) -> Vec<u8> {
    let mut file = Vec::new();
    export_sqlite(dir, &mut file).await.expect("it exports");
    file
}

async fn out_of_postgres(url: &str) -> Vec<u8> {
    let mut file = Vec::new();
    export_postgres(url, &mut file).await.expect("it exports");
    file
}

fn equal(left: &[u8], right: &[u8]) {
    let lines = |file: &[u8]| String::from_utf8_lossy(file).lines().map(str::to_owned).collect::<Vec<_>>();
    for (left, right) in lines(left).iter().zip(lines(right)) {
        assert_eq!(*left, right);
    }
    assert_eq!(left, right);
}

#[tokio::test]
async fn an_export_of_an_import_is_the_same_bytes_on_both_stores() {
    for seed in 1..=12 {
        let file = awkward(seed, 21);
        let folder = Folder::new();
        import_sqlite(&folder.0, &file[..]).await.expect("a sound file is imported");
        equal(&out_of_sqlite(&folder.0).await, &file);
        if seed % 4 == 0
            && let Some(url) = database().await
        {
            import_postgres(&url, &file[..]).await.expect("a sound file is imported");
            equal(&out_of_postgres(&url).await, &file);
        }
    }
}

#[tokio::test]
async fn of_a_file_that_is_not_sound_nothing_is_kept() {
    let file = awkward(9, 4);
    let folder = Folder::new();
    let mut dice = Dice(77);
    let refuse = async |file: Vec<u8>, what: &str| {
        let error = import_sqlite(&folder.0, &file[..]).await.expect_err(what);
        assert!(matches!(error.exit_code(), 65 | 78), "{what}: {error}");
        let left: BTreeSet<_> = std::fs::read_dir(&folder.0)
            .expect("it is there")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
            .collect();
        assert!(left.iter().all(|name| name == "ledger.lock"), "{what} leaves {left:?}");
        error.to_string()
    };
    let lines: Vec<&[u8]> = file.split_inclusive(|byte| *byte == b'\n').collect();
    for line in 0..lines.len() {
        let cut = lines[..line].concat();
        let said = refuse(cut, "a file that is cut between lines").await;
        assert!(said.contains("cut short"), "{said}");
        let mut without = lines.clone();
        without.remove(line);
        refuse(without.concat(), "a file without one line").await;
    }
    for _ in 0..100 {
        let at = dice.below(file.len() as u64) as usize;
        refuse(file[..at].to_vec(), "a file that is cut").await;
        let mut altered = file.clone();
        altered[at] ^= 1 << dice.below(8);
        refuse(altered, "a file with one bit changed").await;
    }
    let mut longer = file.clone();
    longer.extend_from_slice(b"\n");
    refuse(longer, "a file that goes on").await;
    let text = String::from_utf8(file.clone()).expect("it is text");
    let newer = text.replace("\"format\":1", "\"format\":2");
    let error = import_sqlite(&folder.0, newer.as_bytes()).await.expect_err("a newer file");
    assert!(matches!(error, MoveError::NewerFile { found: 2 }) && error.exit_code() == 78, "{error}");
    assert!(refuse(b"hello\n".to_vec(), "another file").await.contains("no file of ledgerd export"));
    import_sqlite(&folder.0, &file[..]).await.expect("the directory is as good as new");
    let error = import_sqlite(&folder.0, &file[..]).await.expect_err("it has a ledger now");
    assert!(matches!(error, MoveError::NotEmpty { table: "agents" }), "{error}");
}

#[tokio::test]
async fn of_a_file_that_is_not_sound_no_database_keeps_anything() {
    let Some(url) = database().await else { return };
    let file = awkward(9, 4);
    let text = String::from_utf8(file.clone()).expect("it is text");
    for (broken, code) in [
        (text[..text.len() - 10].to_owned(), 65),
        (text[..text.len() / 2].to_owned(), 65),
        // A digest no longer fits; a state that no task has; a number too large for its column.
        (text.replacen("HALF_OPEN", "DISABLED", 1), 65),
        (text.replacen("HALF_OPEN", "AJAR", 1), 65),
        (text.replacen("[4,\"3", "[99999999999,\"3", 1), 65),
        (text.replacen("\"format\":1", "\"format\":9", 1), 78),
    ] {
        assert_ne!(broken, text);
        let error = import_postgres(&url, broken.as_bytes()).await.expect_err("the file is broken");
        assert_eq!(error.exit_code(), code, "{error}");
    }
    import_postgres(&url, &file[..]).await.expect("the database is as good as new");
    let error = import_postgres(&url, &file[..]).await.expect_err("it has a ledger now");
    assert!(matches!(error, MoveError::NotEmpty { table: "agents" }), "{error}");
    equal(&out_of_postgres(&url).await, &file);
}

/// A ledger of what the stores themselves write, with a row of every table.
async fn rich(rig: &mut Rig) {
    let with = |key, run_at| New { key, run_at, ..New::of("t") };
    let later = Timestamp::from_millis(rig.now.at.millis() + 60_000);
    let ids = rig
        .enqueue_all([
            with("k1", None),
            with("k2", Some(later)),
            with("", None),
            with("", None),
            with("", None),
            New { frees_key: true, ..with("k3", None) },
        ])
        .await;
    rig.commit().await;
    rig.complete(ids[0]).await;
    let fence = rig.run(ids[2]).await;
    rig.end(ids[2], fence, failure(Class::Permanent)).await;
    rig.run(ids[3]).await;
    let fence = rig.run(ids[4]).await;
    rig.end(ids[4], fence, failure(Class::Overloaded)).await;
    rig.commit().await;
    let at = rig.now.at;
    let mut changes = Changes::default();
    changes.agents.push(AgentRow {
        id: AgentId(1),
        name: "ann".into(),
        given: AgentOverrides { max_waiting: Some(9), ..AgentOverrides::default() },
        created_at: at,
        pause: Some(Pause { actor: "ops".into(), reason: "new\tkey".into(), since: at, until: None }),
    });
    let level = retry_core::Level { millitokens: 10_000, updated_at: 5 };
    changes.budgets.extend([None, Some(AgentId(1))].map(|agent| BudgetRow { agent, level }));
    changes.sessions.push(SessionRow {
        shown: None,
        worker: "w".into(),
        incarnation: u64::MAX,
        session: SessionId(3),
        connected_at: at,
        beat_at: at,
        open: true,
    });
    for kind in [AgentEventKind::Paused, AgentEventKind::Resumed] {
        changes.events.push(AgentEvent {
            agent: AgentId(1),
            task_type: "".into(),
            at,
            kind,
            actor: "ops".into(),
            reason: "why".into(),
            until: None,
        });
    }
    changes.requests.push(RequestRow { id: "r1".into(), digest: u64::MAX, answer: b"said"[..].into(), at });
    changes.notes.push((ids[3], notes(true, true)));
    changes.salvage.push((ids[2], 1, b"late"[..].into()));
    rig.known(Want { workers: vec!["w".into()], ..Want::default() }).await;
    assert_eq!(rig.write(changes).await, []);
    rig.commit().await;
}

/// Stops it, but keeps what it wrote.
async fn stop(rig: &mut Rig) {
    match &mut rig.kind {
        Rigged::Sqlite { store, reader, .. } => {
            reader.close().await.expect("it closes");
            store.take().expect("it runs").close().await.expect("it closes");
        }
        Rigged::Postgres { store, reader, .. } => {
            reader.close().await.expect("it closes");
            drop(store.take());
        }
        Rigged::Model(_) => {}
    }
}

/// All rows of a table of SQLite.
fn dump(dir: &Path, query: &str) -> Vec<Vec<rusqlite::types::Value>> {
    let conn = rusqlite::Connection::open(dir.join("ledger.db")).expect("it opens");
    let mut statement = conn.prepare(query).expect("it prepares");
    let width = statement.column_count();
    let rows = statement.query_map([], |row| (0..width).map(|at| row.get(at)).collect()).expect("it runs");
    rows.collect::<Result<_, _>>().expect("rows")
}

#[tokio::test]
async fn what_sqlite_derives_is_made_anew() {
    let mut rig = Rig::sqlite().await;
    rich(&mut rig).await;
    let results = dump(rig.folder(), "SELECT COUNT(*) FROM tasks WHERE result IS NOT NULL");
    assert_eq!(results, [[rusqlite::types::Value::Integer(1)]], "a small result is in its row");
    let file = out_of_sqlite(rig.folder()).await;
    stop(&mut rig).await;
    equal(&out_of_sqlite(rig.folder()).await, &file);
    let folder = Folder::new();
    let told = import_sqlite(&folder.0, &file[..]).await.expect("it is imported");
    let empty: Vec<_> = told.iter().filter(|total| total.rows == 0).map(|total| total.table).collect();
    assert_eq!(empty, ["breakers"], "of all others there are rows");
    for query in [
        "SELECT * FROM tasks",
        "SELECT * FROM history ORDER BY seq",
        "SELECT * FROM live_blocks WHERE live > 0",
        "SELECT * FROM agent_blocks",
        "SELECT * FROM counts WHERE n > 0",
        "SELECT * FROM requests",
        "SELECT * FROM results",
    ] {
        assert_eq!(dump(&folder.0, query), dump(rig.folder(), query), "{query}");
    }
}

async fn rows(url: &str, query: &'static str) -> Vec<Vec<String>> {
    let options: sqlx::postgres::PgConnectOptions = url.parse().expect("an address");
    let mut conn = options.connect().await.expect("it connects");
    let rows = conn.fetch_all(query).await.expect("it runs");
    rows.iter().map(|row| (0..row.len()).map(|at| row.get(at)).collect()).collect()
}

#[tokio::test]
async fn what_postgres_derives_is_made_anew_and_slots_become_one() {
    let Some(mut rig) = Rig::postgres().await else { return };
    rich(&mut rig).await;
    let Rigged::Postgres { url, .. } = &rig.kind else { panic!("it is PostgreSQL") };
    let url = url.clone();
    stop(&mut rig).await;
    let file = out_of_postgres(&url).await;
    let again = database().await.expect("there is a server");
    import_postgres(&again, &file[..]).await.expect("it is imported");
    equal(&out_of_postgres(&again).await, &file);
    for query in [
        "SELECT agent::text, task_type, gated::text, urgency::text, run_at::text, calendar::text, task_id::text \
         FROM ready ORDER BY task_id",
        "SELECT agent::text, state::text, n::text FROM counts WHERE n > 0 ORDER BY agent, state",
        "SELECT block::text, sum(n)::text FROM live_blocks GROUP BY block HAVING sum(n) > 0 ORDER BY block",
        "SELECT agent::text, block::text FROM agent_blocks ORDER BY agent, block",
        "SELECT slot::text, last_seq::text, last_session::text FROM slots ORDER BY slot",
        "SELECT slot::text, seq::text, task_id::text FROM history ORDER BY seq",
        "SELECT retry_count::text IS NULL || '' || id FROM tasks ORDER BY id",
    ] {
        assert_eq!(rows(&again, query).await, rows(&url, query).await, "{query}");
    }
    // Rows of a second slot come between those of the first, with numbers of their own.
    let options: sqlx::postgres::PgConnectOptions = url.parse().expect("an address");
    let mut conn = options.connect().await.expect("it connects");
    conn.execute(AssertSqlSafe(
        "INSERT INTO slots (slot, name, beat_at, last_seq, last_session) \
         VALUES (1, 'b', 0, 2, (1::bigint << 48) + 90); \
         UPDATE sessions SET session = (1::bigint << 48) + 7; \
         INSERT INTO task_history_kept SELECT * FROM history; \
         DELETE FROM task_history; \
         ALTER TABLE task_history_kept DISABLE TRIGGER ALL; \
         UPDATE task_history_kept SET slot = 1, seq = 1 WHERE task_id = 1 AND version = 2; \
         UPDATE task_history_kept SET slot = 1, seq = 2 WHERE task_id = 3 AND version = 1"
            .to_owned(),
    ))
    .await
    .expect("it runs");
    let file = out_of_postgres(&url).await;
    let folder = Folder::new();
    import_sqlite(&folder.0, &file[..]).await.expect("one numbering fits SQLite");
    equal(&out_of_sqlite(&folder.0).await, &file);
    let last = "SELECT max(seq) = last_seq, last_session, session FROM history, meta, sessions";
    // Of slot 0 there were three sessions.
    let expected = [1, 3 + 90, 3 + 7].map(rusqlite::types::Value::Integer);
    assert_eq!(dump(&folder.0, last), [expected]);
}

#[tokio::test]
async fn a_ledger_goes_on_where_it_moved_to() {
    let Some(url) = database().await else { return };
    let mut rig = Rig::sqlite().await;
    rich(&mut rig).await;
    let last = rig.enqueue(New::of("t")).await;
    rig.commit().await;
    let before: Vec<_> = {
        let mut tasks = Vec::new();
        for id in 1..=last.0 {
            tasks.push((rig.get(TaskId(id)).await, rig.history(TaskId(id)).await));
        }
        tasks
    };
    let (seed, counts) = (rig.recovered.seed, rig.recovered.transitions);
    assert_eq!(counts, 0, "it was new");
    stop(&mut rig).await;
    let file = out_of_sqlite(rig.folder()).await;
    import_postgres(&url, &file[..]).await.expect("it is imported");
    let (store, reader) = crate::store::postgres::open(&url, "a").await.expect("it opens");
    let mut moved =
        Rig::of(Rigged::Postgres { url: url.clone(), store: Some(Box::new(store)), reader }).await;
    moved.now = rig.now;
    assert_eq!(moved.recovered.seed, seed);
    for (id, (task, history)) in (1..).map(TaskId).zip(&before) {
        assert_eq!((moved.get(id).await.as_ref(), &moved.history(id).await), (task.as_ref(), history));
    }
    // The worker settles what it held, and new numbers are above the old ones.
    let held = before.iter().flat_map(|(task, _)| task).find(|task| task.state == State::Running);
    let held = held.expect("one runs");
    moved.end(held.id, held.fence, Outcome::Complete).await;
    let new = moved.enqueue(New::of("t")).await;
    assert!(new > last, "{new} is new");
    moved.complete(new).await;
    moved.complete(last).await;
    moved.wait(Duration::from_secs(1));
    let retried = before.iter().flat_map(|(task, _)| task).find(|task| task.state == State::Retry);
    let retried = retried.expect("one is tried again");
    assert_ne!(retried.reason, Reason::Budget);
    moved.apply(retried.id, Event::Cancel { note: "".into() }).await;
    moved.commit().await;
    stop(&mut moved).await;
    let file = out_of_postgres(&url).await;
    let folder = Folder::new();
    import_sqlite(&folder.0, &file[..]).await.expect("it moves back");
    equal(&out_of_sqlite(&folder.0).await, &file);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_is_of_one_moment_while_a_store_is_written() {
    for rig in [Some(Rig::sqlite().await), Rig::postgres().await].into_iter().flatten() {
        let mut rig = rig;
        rich(&mut rig).await;
        let place = match &rig.kind {
            Rigged::Sqlite { folder, .. } => folder.0.display().to_string(),
            Rigged::Postgres { url, .. } => url.clone(),
            Rigged::Model(_) => String::new(),
        };
        let export = tokio::spawn(async move {
            let mut files = Vec::new();
            for _ in 0..8 {
                files.push(if place.starts_with("postgres") {
                    out_of_postgres(&place).await
                } else {
                    out_of_sqlite(Path::new(&place)).await
                });
            }
            files
        });
        while !export.is_finished() {
            let id = rig.enqueue(New::of("t")).await;
            rig.commit().await;
            rig.complete(id).await;
            rig.commit().await;
            tokio::task::yield_now().await;
        }
        for file in export.await.expect("it exports") {
            // A task and its rows come in one commit: who saw one saw all, and an import would find what is missing.
            let folder = Folder::new();
            import_sqlite(&folder.0, &file[..]).await.expect("it is sound");
            let torn = dump(
                &folder.0,
                "WITH entries (task, n) AS MATERIALIZED (SELECT task_id, COUNT(*) FROM history GROUP BY task_id) \
                 SELECT id FROM tasks AS t WHERE NOT EXISTS (SELECT 1 FROM task_specs AS s WHERE s.id = t.id) \
                 OR version IS NOT (SELECT n FROM entries WHERE task = t.id) \
                 OR state = 5 AND result IS NULL \
                 UNION ALL SELECT id FROM task_specs WHERE id NOT IN (SELECT id FROM tasks)",
            );
            assert_eq!(torn, Vec::<Vec<_>>::new(), "nothing is torn");
        }
    }
}

/// What each store has beside the columns that are moved: what is derived, and how `meta` is kept.
const OF_SQLITE: [&str; 28] = [
    "agent_blocks.agent",
    "agent_blocks.block",
    "counts.agent",
    "counts.n",
    "counts.state",
    "live_blocks.block",
    "live_blocks.live",
    "meta.created_at",
    "meta.id",
    "meta.last_seq",
    "meta.last_session",
    "meta.last_task",
    "meta.removed_seq",
    "meta.seed",
    "payload_places.at",
    "payload_places.digest",
    "payload_places.file",
    "payload_places.length",
    "payload_places.task_id",
    "requests.hash",
    "requests.seq",
    "task_history.entries",
    "task_history.prev",
    "task_history.task",
    "tasks.held",
    "tasks.history",
    "tasks.rare",
    "tasks.result",
];
const OF_POSTGRES: [&str; 57] = [
    "agent_blocks.agent",
    "agent_blocks.block",
    "agents.changed",
    "agents.revision",
    "breakers.changed",
    "breakers.revision",
    "budgets.slot",
    "counts.agent",
    "counts.n",
    "counts.slot",
    "counts.state",
    "history_days.day",
    "history_days.leaving",
    "history_days.look_at",
    "history_days.walked_seq",
    "history_days.walked_slot",
    "live_blocks.block",
    "live_blocks.n",
    "live_blocks.slot",
    "mail.seq",
    "mail.slot",
    "mail.task_id",
    "mail.worker",
    "meta.created_at",
    "meta.id",
    "meta.seed",
    "ready.agent",
    "ready.calendar",
    "ready.gated",
    "ready.run_at",
    "ready.task_id",
    "ready.task_type",
    "ready.urgency",
    "removed_history.seq",
    "removed_history.slot",
    "sessions.replaces",
    "sessions.shown",
    "slots.batch",
    "slots.batch_owner",
    "slots.beat_at",
    "slots.heir",
    "slots.last_seq",
    "slots.last_session",
    "slots.name",
    "slots.owner",
    "slots.slot",
    "task_history.before_at",
    "task_history.before_seq",
    "task_history.before_slot",
    "task_history.entries",
    "task_history.slot",
    "task_history.task",
    "task_specs.key_freed",
    "tasks.history_at",
    "tasks.history_seq",
    "tasks.history_slot",
    "tasks.result",
];

/// Columns of a store that no table of a file has.
fn rest(columns: Vec<String>) -> Vec<String> {
    let moved: BTreeSet<String> = TABLES
        .iter()
        .filter(|table| table.name != "meta")
        .flat_map(|table| table.columns.iter().map(|(name, _)| format!("{}.{name}", table.name)))
        .collect();
    let columns: BTreeSet<String> = columns.into_iter().collect();
    let missing: Vec<_> = moved.difference(&columns).collect();
    assert!(missing.is_empty(), "the schema has none of {missing:?}");
    columns.difference(&moved).cloned().collect()
}

/// A migration that adds a column must say how it is moved, or that it need not be.
#[tokio::test]
async fn no_column_of_either_schema_is_forgotten() {
    let folder = Folder::new();
    import_sqlite(&folder.0, &awkward(1, 1)[..]).await.expect("it is imported");
    // What is packed is moved as its view shows it.
    let columns = "SELECT CASE m.name WHEN 'tasks_wide' THEN 'tasks' WHEN 'history' THEN 'task_history' ELSE m.name END \
            || '.' || c.name \
        FROM sqlite_schema AS m, pragma_table_info(m.name) AS c \
        WHERE m.type IN ('table', 'view') AND m.name NOT LIKE '%sqlx%'";
    let columns = dump(&folder.0, columns).into_iter().flatten().map(|name| match name {
        rusqlite::types::Value::Text(name) => name,
        other => panic!("{other:?} is no name"),
    });
    assert_eq!(rest(columns.collect()), OF_SQLITE);
    let Some(rig) = Rig::postgres().await else { return };
    let Rigged::Postgres { url, .. } = &rig.kind else { panic!("it is PostgreSQL") };
    // The parts of task_history have its columns, or those of its view.
    let columns = "SELECT CASE table_name WHEN 'history' THEN 'task_history' ELSE table_name END || '.' || column_name \
        FROM information_schema.columns \
        WHERE table_schema = 'public' AND table_name NOT LIKE '%sqlx%' AND table_name NOT LIKE 'task\\_history\\_%'";
    assert_eq!(rest(rows(url, columns).await.into_iter().flatten().collect()), OF_POSTGRES);
}

#[tokio::test]
async fn a_ledger_without_a_task_is_backed_up_too() {
    let (rig, other) = (Rig::sqlite().await, Folder::new());
    let file = other.0.join("backup");
    let taken = backup_sqlite(rig.folder(), &file).await.expect("it is taken");
    assert_eq!(taken.last_seq, 0);
    assert_eq!(check_backup(&file).await.expect("it is sound").totals, taken.totals);
    restore_sqlite(&file, &other.0).await.expect("it becomes a ledger");
}
