//! What only SQLite has to keep: files, modes, the lock, the disk, the statements and what they cost.

mod packed;
mod payloads;
mod underway;

use super::insert::Table;
use super::{OpenError, Options, lookup, open, read, recover, write};
use crate::store::rig::{AGENT, Folder, Kind, New, Rig, START, everything, failure, notes};
use bytes::Bytes;
use ledger_core::store::{
    Changed, Changes, DeadLetterFilter, Leaving, Notes, ProgressNote, RequestRow, StoreError, TaskFilter,
    Want,
};
use ledger_core::{AgentId, Class, Event, Now, Reason, State, TaskId, Timestamp};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row, SqlSafeStr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

/// A connection past the store, to look and to do harm.
async fn raw(folder: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(folder.join("ledger.db")).connect().await.expect("the file opens")
}

async fn number(folder: &Path, sql: &'static str) -> i64 {
    let mut conn = raw(folder).await;
    let row = sqlx::query(sql).fetch_one(&mut conn).await.expect("the query runs");
    let found = row.get(0);
    conn.close().await.expect("it closes");
    found
}

fn store_of(rig: &mut Rig) -> &mut super::SqliteStore {
    match &mut rig.kind {
        Kind::Sqlite { store: Some(store), .. } => store,
        _ => panic!("these tests are SQLite's"),
    }
}

#[tokio::test]
async fn every_statement_can_be_prepared() {
    let rig = Rig::sqlite().await;
    let mut conn = raw(rig.folder()).await;
    let fixed = write::STATEMENTS
        .into_iter()
        .chain(lookup::STATEMENTS)
        .chain(super::packed::STATEMENTS)
        .chain(super::backup::STATEMENTS)
        .chain(recover::STATEMENTS)
        .chain(super::sweep::STATEMENTS)
        .chain(read::STATEMENTS);
    let inserts = Table::ALL.iter().map(|table| table.insert().text());
    for text in fixed.chain(inserts) {
        conn.prepare(AssertSqlSafe(text).into_sql_str())
            .await
            .unwrap_or_else(|error| panic!("{error}: {text:.200}"));
    }
}

/// What may be read from its beginning: it is small, or the reading ends at a bound. `b` are blocks with live tasks, `e` the entries of
/// one task or of few rows, `d` as many dead letters as one call looks at, `f` the files of payloads.
const SCANNED: [&str; 14] = [
    "(subquery",
    "CONSTANT ROW",
    "agent_events",
    "agents",
    "b",
    "breakers",
    "budgets",
    "counts",
    "d",
    "e",
    "f",
    "live_blocks",
    "meta",
    "sessions",
];
const LISTS: usize = 6;

#[tokio::test]
async fn no_list_sorts_and_nothing_reads_all_there_is() {
    let rig = Rig::sqlite().await;
    let mut conn = raw(rig.folder()).await;
    let rest = super::packed::STATEMENTS
        .into_iter()
        .chain(read::STATEMENTS.into_iter().skip(LISTS))
        .chain(lookup::STATEMENTS)
        .chain(recover::STATEMENTS)
        .chain(super::sweep::STATEMENTS)
        .chain(write::STATEMENTS);
    let lists = read::STATEMENTS.into_iter().take(LISTS).map(|text| (text, true));
    for (text, is_list) in lists.chain(rest.map(|text| (text, false))) {
        let plan = sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {text}")));
        for row in plan.fetch_all(&mut conn).await.expect("it explains") {
            let step: String = row.get(3);
            assert!(!is_list || !step.contains("TEMP B-TREE FOR ORDER BY"), "{step}: {text}");
            assert!(!step.contains("AUTOMATIC"), "{step}: {text}");
            assert!(!step.contains("(agent=?)"), "all that an agent has, {step}: {text}");
            let Some(scanned) = step.strip_prefix("SCAN ") else { continue };
            // The oldest answers, up to a bound; and how many dead letters there are, of an index.
            let bounded = scanned == "requests" && text.contains("LIMIT")
                || scanned == "dead_letter_queue USING COVERING INDEX dead_letter_queue_by_time";
            let first = scanned.split(['-', ' ']).next().unwrap_or_default();
            let known =
                scanned.contains("VIRTUAL TABLE") || SCANNED.contains(&first) || SCANNED.contains(&scanned);
            assert!(known || bounded, "{step}: {text}");
        }
    }
}

#[tokio::test]
async fn a_second_daemon_is_refused_while_the_first_lives() {
    let folder = Folder::new();
    let first = open(&folder.0, Options::default()).await.expect("a new ledger opens");
    let refused = open(&folder.0, Options::default()).await.expect_err("it is in use");
    assert!(matches!(refused, OpenError::Locked(_)), "{refused}");
    drop(first);
    open(&folder.0, Options::default()).await.expect("the lock ended with the first");
}

#[tokio::test]
async fn files_are_closed_to_others() {
    let mut rig = Rig::sqlite().await;
    rig.enqueue(New::of("a")).await;
    rig.commit().await;
    for name in ["ledger.db", "ledger.db-wal", "ledger.db-shm", "ledger.lock"] {
        let mode = rig.folder().join(name).metadata().expect("it exists").permissions().mode();
        assert_eq!(mode & 0o777 & !0o640, 0, "{name} is {mode:o}");
    }
    let mode = rig.folder().join("ledger.db").metadata().expect("it exists").permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[tokio::test]
async fn a_link_is_not_followed() {
    for name in ["ledger.db", "ledger.db-wal", "ledger.lock"] {
        let folder = Folder::new();
        let target = folder.0.join("elsewhere");
        std::fs::write(&target, "").expect("the folder is writable");
        std::os::unix::fs::symlink(&target, folder.0.join(name)).expect("links can be made");
        let refused = open(&folder.0, Options::default()).await.expect_err("a link is refused");
        assert!(matches!(refused, OpenError::NotAFile(_)), "{name}: {refused}");
    }
}

#[tokio::test]
async fn what_is_no_ledger_is_refused() {
    let folder = Folder::new();
    std::fs::write(folder.0.join("ledger.db"), vec![7; 8_192]).expect("the folder is writable");
    let refused = open(&folder.0, Options::default()).await.expect_err("not a database");
    assert!(matches!(refused, OpenError::Corrupt { .. }), "{refused}");

    let rig = Rig::sqlite().await;
    let mut conn = raw(rig.folder()).await;
    sqlx::query("UPDATE _sqlx_migrations SET version = 9000 WHERE version = 2")
        .execute(&mut conn)
        .await
        .expect("it runs");
    let path = rig.folder().to_owned();
    let Kind::Sqlite { store, folder: _kept, .. } = rig.kind else { panic!("this is SQLite") };
    drop(store);
    let refused = open(&path, Options::default()).await.expect_err("a newer schema");
    assert!(matches!(refused, OpenError::Newer { found: 9_000, .. }), "{refused}");
}

#[tokio::test]
async fn connections_are_set_as_durability_needs() {
    let mut rig = Rig::sqlite().await;
    let store = store_of(&mut rig);
    for (pragma, expected) in [
        ("synchronous", "2"),
        ("trusted_schema", "0"),
        ("cell_size_check", "1"),
        ("wal_autocheckpoint", "0"),
        ("page_size", "4096"),
        ("cache_size", "-16384"),
        ("temp_store", "2"),
        ("mmap_size", "0"),
        ("journal_mode", "wal"),
    ] {
        assert_eq!(store.pipeline.writer().pragma(pragma), expected, "{pragma}");
    }
}

#[tokio::test]
async fn a_start_does_not_read_finished_tasks() {
    let mut rig = Rig::sqlite().await;
    let finished = rig.enqueue(New::of("a")).await;
    rig.complete(finished).await;
    // Its block has no live task; the next one begins at 4,096.
    for _ in 0..2 {
        let ids = rig.enqueue_all((0..2_500).map(|_| New::of("a"))).await;
        rig.commit().await;
        for id in ids.into_iter().filter(|id| id.0 < 4_096) {
            rig.apply(id, Event::Cancel { note: "no".into() }).await;
        }
        rig.commit().await;
    }
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM live_blocks").await, 1);
    let mut conn = raw(rig.folder()).await;
    sqlx::query("UPDATE tasks SET reason = 200 WHERE id < 4096")
        .execute(&mut conn)
        .await
        .expect("it poisons");
    conn.close().await.expect("it closes");
    let mut rig = rig.reopen().await;
    assert_eq!(rig.offer(everything()).await.len(), 100);
    let want = Want { tasks: vec![finished], ..Want::default() };
    let now = rig.now;
    let error = rig.store().begin(&want, now).await.expect_err("this one is poisoned");
    assert!(matches!(error, StoreError::Corrupt(_)), "{error}");
}

#[tokio::test]
async fn a_full_disk_is_named_and_passes() {
    let mut rig =
        Rig::sqlite_with(Options { max_pages: Some(64), ballast_bytes: 0, ..Options::default() }).await;
    let kept = rig.enqueue(New::of("a")).await;
    rig.commit().await;
    let label = ("k".to_owned(), "v".repeat(200));
    let lost = rig.enqueue_all((0..2_000).map(|_| New { labels: vec![label.clone()], ..New::of("a") })).await;
    let error = rig.store().commit().await.expect_err("it does not fit");
    assert!(matches!(error, StoreError::Full), "{error}");
    let now = rig.now;
    let error = rig.store().begin(&Want::default(), now).await.expect_err("memory is ahead of the file");
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    rig.recover().await;
    assert_eq!(rig.get(lost[0]).await, None);
    assert_eq!(rig.offer(everything()).await, [kept]);
    rig.complete(kept).await;
    rig.commit().await;
    assert_eq!(rig.recovered.counts[&AGENT][1], 1);
}

#[tokio::test]
async fn a_refused_statement_rolls_its_batch_back() {
    let mut rig = Rig::sqlite().await;
    let kept = rig.enqueue(New { key: "k", ..New::of("a") }).await;
    rig.commit().await;
    let twin = rig.enqueue(New { key: "k", ..New::of("a") }).await;
    rig.run(kept).await;
    let error = rig.store().commit().await.expect_err("the key is taken");
    assert!(matches!(error, StoreError::Statement(_)), "{error}");
    rig.recover().await;
    assert_eq!(rig.get(twin).await, None);
    assert_eq!(rig.get(kept).await.map(|task| task.state), Some(State::Queued));
    rig.complete(kept).await;
    rig.commit().await;
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM history").await, 4);
    assert_eq!(number(rig.folder(), "SELECT MAX(seq) FROM history").await, 4, "seq has no gap");
}

#[tokio::test]
async fn a_write_from_another_version_is_a_bug_that_is_caught() {
    let mut rig = Rig::sqlite().await;
    let id = rig.enqueue(New::of("a")).await;
    let task = rig.get(id).await.expect("it exists");
    let changes =
        Changes { tasks: vec![Changed { task: task.into(), expected: 7, was: None }], ..Changes::default() };
    let error = rig.store().write(changes).await.expect_err("7 was never stored");
    assert!(matches!(error, StoreError::Statement(_)), "{error}");
}

#[tokio::test]
async fn the_last_three_refused_results_are_kept() {
    let mut rig = Rig::sqlite().await;
    let id = rig.enqueue(New::of("a")).await;
    for fence in 1..=5 {
        let salvage = vec![(id, fence, Bytes::from(vec![fence as u8]))];
        rig.write(Changes { salvage, ..Changes::default() }).await;
        rig.commit().await;
    }
    let many = [(TaskId(77), 1), (id, 9), (id, 8)].map(|(id, fence)| (id, fence, Bytes::new()));
    rig.write(Changes { salvage: many.to_vec(), ..Changes::default() }).await;
    rig.commit().await;
    let kept = "SELECT SUM(fence * (task_id = 1)) FROM salvage";
    assert_eq!(number(rig.folder(), kept).await, 5 + 8 + 9);
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM salvage").await, 4);
}

#[tokio::test]
async fn notes_are_kept_where_nothing_new_is_said() {
    let mut rig = Rig::sqlite().await;
    let id = rig.enqueue(New { key: "mine", labels: vec![("k".into(), "v".into())], ..New::of("a") }).await;
    let progress = ProgressNote { fraction: 0.5, note: "half".into(), at: rig.now.at };
    let last = Notes { progress: Some(progress), question: Some("why?".into()), ..Notes::default() };
    for notes in [notes(true, false), notes(false, true), last.clone()] {
        rig.write(Changes { notes: vec![(id, notes)], ..Changes::default() }).await;
        rig.commit().await;
    }
    rig.complete(id).await;
    rig.commit().await;
    let expected = Notes { progress: last.progress, question: last.question, ..notes(true, true) };
    let rig = rig.reopen().await;
    let reader = rig.reader().expect("this is SQLite");
    let view = reader.task(id, true).await.expect("it reads").expect("it exists");
    assert_eq!(view.notes, expected);
    assert_eq!(view.data.payload, format!("payload of {id}"));
    assert_eq!((&*view.data.key, view.payload_bytes), ("mine", view.data.payload.len() as u64));
    assert_eq!(view.data.labels, [("k".to_owned(), "v".to_owned())]);
    assert_eq!(view.result, Some(Bytes::from(format!("result of {id}"))));
    let view = reader.task(id, false).await.expect("it reads").expect("it exists");
    assert_eq!((view.result, view.data.payload.len()), (None, 0));
    assert!(view.result_bytes > 0 && view.payload_bytes > 0);
    // From the file, for the process that remembered the data is gone.
    let given = reader.for_workers(&[(id, true), (id, false)]).await.expect("it reads");
    assert_eq!(given[0].0.payload, format!("payload of {id}"));
    assert_eq!((&given[0].1, &given[1].1), (&expected, &Notes::default()));
    let error = reader.for_workers(&[(TaskId(99), false)]).await.expect_err("there is no such task");
    assert!(matches!(error, StoreError::Corrupt(_)), "{error}");
    assert_eq!(reader.task(TaskId(99), true).await.expect("it reads"), None);
    assert_eq!(reader.history(TaskId(99)).await.expect("it reads"), None);
    reader.check().await.expect("the file is sound");
}

/// Which of the tasks numbered from 1 a filter lets through.
type Fits = Box<dyn Fn(u64) -> bool>;

/// Follows pages to the end.
async fn list(rig: &Rig, filter: &TaskFilter, limit: usize) -> Vec<u64> {
    let reader = rig.reader().expect("this is SQLite");
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = reader.tasks(filter, before, limit).await.expect("it lists");
        assert!(page.items.len() <= limit);
        found.extend(page.items.iter().map(|view| view.task.id.0));
        match page.before {
            Some(next) => assert!(before.is_none_or(|before| next < before), "pages go on"),
            None => return found,
        }
        before = page.before;
    }
}

#[tokio::test]
async fn lists_filter_and_turn_pages() {
    let mut rig = Rig::sqlite().await;
    let label = |n: u64| vec![("n".to_owned(), (n % 3).to_string()), ("all".to_owned(), "yes".to_owned())];
    for n in 1..=60_u64 {
        let new =
            New { agent: 1 + (n % 2) as u32, priority: (n % 10) as u8, labels: label(n), ..New::of("a") };
        let id = rig.enqueue(New { task_type: if n % 5 == 0 { "b" } else { "a" }, ..new }).await;
        match n % 4 {
            0 => rig.complete(id).await,
            1 => {
                let fence = rig.run(id).await;
                rig.end(id, fence, failure(Class::Permanent)).await;
            }
            _ => {}
        }
        rig.wait(Duration::from_millis(1));
    }
    rig.commit().await;
    let all = TaskFilter::default();
    let at = |n: i64| Some(Timestamp::from_millis(START + n - 1));
    let cases: Vec<(TaskFilter, Fits)> = vec![
        (all.clone(), Box::new(|_| true)),
        (TaskFilter { agent: Some(AgentId(2)), ..all.clone() }, Box::new(|n| n % 2 == 1)),
        (TaskFilter { states: vec![State::Failed], ..all.clone() }, Box::new(|n| n % 4 == 1)),
        (
            TaskFilter { states: vec![State::Failed], agent: Some(AgentId(1)), ..all.clone() },
            Box::new(|_| false),
        ),
        (TaskFilter { states: vec![State::Queued, State::Running], ..all.clone() }, Box::new(|n| n % 4 > 1)),
        (
            TaskFilter { states: vec![State::Queued], agent: Some(AgentId(2)), ..all.clone() },
            Box::new(|n| n % 4 == 3),
        ),
        (TaskFilter { states: vec![State::Done, State::Queued], ..all.clone() }, Box::new(|n| n % 4 != 1)),
        (
            TaskFilter { task_type: Some("b".into()), priority: Some(5), ..all.clone() },
            Box::new(|n| n % 10 == 5),
        ),
        (TaskFilter { labels: label(1), ..all.clone() }, Box::new(|n| n % 3 == 1)),
        (TaskFilter { labels: vec![("n".into(), "9".into())], ..all.clone() }, Box::new(|_| false)),
        (
            TaskFilter { created_after: at(10), created_before: at(20), ..all },
            Box::new(|n| (10..20).contains(&n)),
        ),
    ];
    for (filter, fits) in cases {
        let expected: Vec<u64> = (1..=60).rev().filter(|n| fits(*n)).collect();
        for limit in [1, 7, 1_000] {
            assert_eq!(list(&rig, &filter, limit).await, expected, "{filter:?} by {limit}");
        }
    }
}

#[tokio::test]
async fn a_list_looks_at_a_bounded_number_of_rows() {
    let mut rig = Rig::sqlite().await;
    let first = rig.enqueue(New::of("rare")).await;
    rig.enqueue_all((0..4_500).map(|_| New::of("a"))).await;
    rig.commit().await;
    let filter = TaskFilter { task_type: Some("rare".into()), ..TaskFilter::default() };
    let reader = rig.reader().expect("this is SQLite");
    let page = reader.tasks(&filter, None, 10).await.expect("it lists");
    assert!(page.items.is_empty() && page.before.is_some(), "nothing found yet is no end");
    assert_eq!(list(&rig, &filter, 10).await, [first.0]);
}

#[tokio::test]
async fn a_list_by_agent_finds_all_of_it_and_no_entry_is_left() {
    let mut rig = Rig::sqlite().await;
    let each = |n: u32| New { agent: 1 + n % 3, ..New::of("a") };
    let ids = rig.enqueue_all((0..200).map(each)).await;
    rig.complete(ids[3]).await;
    rig.commit().await;
    let of = |agent| TaskFilter { agent: Some(AgentId(agent)), ..TaskFilter::default() };
    let newest = |agent: u32| -> Vec<u64> {
        (0..200_u32).rev().filter(|n| 1 + n % 3 == agent).map(|n| ids[n as usize].0).collect()
    };
    for agent in 1..=3 {
        assert_eq!(list(&rig, &of(agent), 7).await, newest(agent));
    }
    let live = TaskFilter { states: vec![State::Queued], ..of(1) };
    assert_eq!(list(&rig, &live, 7).await.len(), newest(1).len() - 1);
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM agent_blocks").await, 3 * 13);

    // All of one agent leave.
    for id in newest(2) {
        rig.apply(TaskId(id), Event::Cancel { note: "no".into() }).await;
    }
    rig.commit().await;
    let removed: Vec<_> = newest(2).into_iter().map(TaskId).collect();
    assert_eq!(
        rig.known(Want { tasks: removed.clone(), ..Want::default() }).await.tasks.len(),
        removed.len()
    );
    rig.write(Changes { removed, ..Changes::default() }).await;
    rig.commit().await;
    assert!(list(&rig, &of(2), 7).await.is_empty());
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM agent_blocks").await, 2 * 13);
    assert_eq!(list(&rig, &of(3), 7).await, newest(3));
}

#[tokio::test]
async fn dead_letters_come_and_go_with_the_state() {
    let mut rig = Rig::sqlite().await;
    let mut failed = Vec::new();
    for n in 0..6_u32 {
        let id = rig.enqueue(New { agent: 1 + n % 2, ..New::of("a") }).await;
        let fence = rig.run(id).await;
        rig.end(id, fence, failure(Class::Permanent)).await;
        rig.wait(Duration::from_millis(1));
        failed.push(id);
    }
    // Redriven, and failed again in the same batch.
    for id in [failed[0], failed[1]] {
        rig.apply(id, Event::Redrive(Box::default())).await;
    }
    let fence = rig.run(failed[1]).await;
    rig.end(failed[1], fence, failure(Class::Permanent)).await;
    let mut discarded = {
        rig.commit().await;
        let reader = rig.reader().expect("this is SQLite");
        reader.dead_letter(failed[5]).await.expect("it reads").expect("it is there")
    };
    discarded.discarded = Some((rig.now.at, "no use".into()));
    rig.write(Changes { dead_letters: vec![discarded.clone()], ..Changes::default() }).await;
    rig.commit().await;
    let reader = rig.reader().expect("this is SQLite");
    assert_eq!(reader.dead_letter(failed[0]).await.expect("it reads"), None);
    assert_eq!(reader.dead_letter(failed[5]).await.expect("it reads"), Some(discarded));
    let all = DeadLetterFilter::default();
    for (filter, expected) in [
        (all.clone(), vec![failed[4], failed[3], failed[2], failed[1]]),
        (DeadLetterFilter { discarded: true, ..all.clone() }, failed[1..].iter().rev().copied().collect()),
        (DeadLetterFilter { agent: Some(AgentId(1)), ..all.clone() }, vec![failed[4], failed[2]]),
        (DeadLetterFilter { reason: Some(Reason::Poison), ..all.clone() }, vec![]),
        (
            DeadLetterFilter { failed_after: Some(Timestamp::from_millis(START + 4)), ..all.clone() },
            vec![failed[4], failed[1]],
        ),
        (DeadLetterFilter { fingerprint: Some(1), ..all }, vec![]),
    ] {
        let mut found = Vec::new();
        let mut before = None;
        loop {
            let page = reader.dead_letters(&filter, before, 2).await.expect("it lists");
            found.extend(page.items.iter().map(|letter| letter.task));
            before = page.before;
            if before.is_none() {
                break;
            }
        }
        assert_eq!(found, expected, "{filter:?}");
    }
    let sizes = reader.sizes().await.expect("it reads");
    assert_eq!(sizes.dead_letters, 4);
    assert!(sizes.bytes >= 4_096 && sizes.log_bytes >= 4_096, "{sizes:?}");
}

#[tokio::test]
async fn old_answers_are_forgotten_bit_by_bit() {
    let mut rig = Rig::sqlite().await;
    let row = |n: usize, at| RequestRow { id: n.to_string().into(), digest: 1, answer: Bytes::new(), at };
    let requests = (0..250).map(|n| row(n, rig.now.at)).collect();
    rig.write(Changes { requests, ..Changes::default() }).await;
    rig.commit().await;
    rig.wait(Duration::from_secs(24 * 3_600 + 1));
    for (n, left) in [(1_000, 149), (1_001, 48), (1_002, 3), (1_003, 4)] {
        rig.offer(everything()).await;
        let requests = vec![row(n, rig.now.at)];
        rig.write(Changes { requests, ..Changes::default() }).await;
        rig.commit().await;
        assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM requests").await, left);
    }
    let rig = rig.reopen().await;
    assert_eq!(number(rig.folder(), "SELECT MIN(CAST(id AS INTEGER)) FROM requests").await, 1_000);
}

#[tokio::test]
async fn the_newest_instant_is_found_among_entries_that_share_a_row() {
    let mut rig = Rig::sqlite().await;
    let now = rig.now;
    assert_eq!(rig.store().recover(now).await.expect("it recovers").newest, Timestamp::EPOCH);
    let ids = rig.enqueue_all((0..40).map(|_| New::of("a"))).await;
    rig.commit().await;
    rig.now.at = rig.now.at.after(Duration::from_secs(7));
    rig.apply(ids[3], Event::Cancel { note: "no".into() }).await;
    rig.commit().await;
    let mut rig = rig.reopen().await;
    let now = Now { at: now.at.before(Duration::from_secs(3_600)), ..now };
    assert_eq!(rig.store().recover(now).await.expect("it recovers").newest, rig.now.at);
}

#[tokio::test]
async fn the_log_is_moved_into_the_file_beside_the_commits() {
    let mut rig = Rig::sqlite().await;
    let ids = rig.enqueue_all((0..10_000).map(|_| New::of("a"))).await;
    rig.commit().await;
    let log = rig.folder().join("ledger.db-wal");
    let size = |path: &Path| path.metadata().expect("it exists").len();
    let before = size(&rig.folder().join("ledger.db"));
    for _ in 0..12 {
        let results = ids.iter().map(|id| (*id, Bytes::from(vec![7; 100]))).collect();
        rig.write(Changes { results, ..Changes::default() }).await;
        rig.commit().await;
        store_of(&mut rig).checkpoints.idle().await;
    }
    assert!(size(&rig.folder().join("ledger.db")) > before);
    assert!(size(&log) < 16 << 20, "the log starts over after a checkpoint: {}", size(&log));
}

#[tokio::test]
async fn a_log_that_grew_too_long_starts_over_between_batches() {
    let mut rig = Rig::sqlite().await;
    let ids = rig.enqueue_all((0..3_000).map(|_| New::of("a"))).await;
    rig.commit().await;
    let store = store_of(&mut rig);
    store.checkpoints.pretend_long();
    assert!(rig.get(ids[0]).await.is_some());
    let log = rig.folder().join("ledger.db-wal");
    let before = log.metadata().expect("it exists").len();
    rig.enqueue(New::of("a")).await;
    rig.commit().await;
    assert_eq!(
        log.metadata().expect("it exists").len(),
        before,
        "written from its start, and never truncated"
    );
}

#[tokio::test]
async fn those_that_leave_are_found_by_state_and_time() {
    let mut rig = Rig::sqlite().await;
    let ids = rig.enqueue_all((0..7).map(|_| New::of("a"))).await;
    let [done, cancelled, failed, discarded, young, waits, runs] = ids[..] else { panic!("seven") };
    rig.complete(done).await;
    rig.apply(cancelled, Event::Cancel { note: "".into() }).await;
    for id in [failed, discarded] {
        let fence = rig.run(id).await;
        rig.end(id, fence, failure(Class::Permanent)).await;
    }
    rig.apply(discarded, Event::Discard { note: "".into() }).await;
    rig.run(runs).await;
    rig.wait(Duration::from_secs(1));
    rig.complete(young).await;
    rig.commit().await;
    let (early, late) = (Some(rig.now.at), Some(rig.now.at.after(Duration::from_secs(1))));
    for (done_before, failed_before, expected) in [
        (None, None, vec![]),
        (early, None, vec![done, cancelled, discarded]),
        (None, early, vec![failed]),
        (late, late, vec![done, cancelled, failed, discarded, young]),
    ] {
        let leaving = Leaving { done: done_before, failed: failed_before };
        for look in [1, 2, 3, 7, 8] {
            let (mut found, mut after) = (Vec::new(), Some(TaskId(0)));
            while let Some(from) = after {
                let reader = rig.reader().expect("SQLite has one");
                let (some, next) = reader.expired(from, leaving, look).await.expect("it looks");
                found.extend(some);
                after = next;
            }
            assert_eq!(found, expected, "{look} at once");
        }
        for id in [done, cancelled, failed, discarded, young, waits, runs] {
            let task = rig.get(id).await.expect("it is there");
            assert_eq!(leaving.takes(&task), expected.contains(&id), "ledger and store agree on {id}");
        }
    }
}

#[tokio::test]
async fn a_removed_task_leaves_no_row() {
    let mut rig = Rig::sqlite().await;
    let ids = rig.enqueue_all((0..3).map(|_| New { key: "k", ..New::of("a") }).take(1)).await;
    let fence = rig.run(ids[0]).await;
    rig.end(ids[0], fence, failure(Class::Permanent)).await;
    let notes = vec![(ids[0], notes(true, true))];
    let results = vec![(ids[0], Bytes::from_static(b"r"))];
    let salvage = vec![(ids[0], 1, Bytes::from_static(b"s"))];
    rig.write(Changes { notes, results, salvage, ..Changes::default() }).await;
    rig.commit().await;
    let tables = [
        "tasks",
        "task_specs",
        "task_history",
        "results",
        "salvage",
        "task_notes",
        "dead_letter_queue",
        "idempotency_keys",
        "agent_blocks",
    ];
    let mut conn = raw(rig.folder()).await;
    for (removed, rows) in [(false, true), (true, false)] {
        if removed {
            assert!(rig.get(ids[0]).await.is_some());
            rig.write(Changes { removed: ids.clone(), ..Changes::default() }).await;
            rig.commit().await;
        }
        for table in tables {
            let query = AssertSqlSafe(format!("SELECT COUNT(*) FROM {table}"));
            let count: i64 = sqlx::query_scalar(query).fetch_one(&mut conn).await.expect("it counts");
            assert_eq!(count > 0, rows, "{count} rows in {table}");
        }
    }
}
