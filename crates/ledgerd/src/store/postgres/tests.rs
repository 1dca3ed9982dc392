//! What only PostgreSQL has to keep: the statements, who may serve a database, and what becomes of a commit when the server,
//! the connection or somebody else comes between.

mod ends;
mod fates;
mod flights;
mod history;
mod keys;
mod lists;
mod migrations;
mod readers;

use super::{
    ConnectError, PgStore, flight, hints, history as days, living, news, open, options, read, recover, slots,
    statements, watch,
};
use crate::store::rig::{AGENT, Kind, New, Rig, database, everything};
use bytes::Bytes;
use ledger_core::store::{Ask, BreakerRow, Changed, Changes, Store, StoreError, Want};
use ledger_core::{Event, Now, Outcome, State, TaskId};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, Row, SqlSafeStr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

fn store_of(rig: &mut Rig) -> &mut PgStore {
    match &mut rig.kind {
        Kind::Postgres { store: Some(store), .. } => store,
        _ => panic!("these tests are PostgreSQL's"),
    }
}

fn slot_of(rig: &mut Rig) -> u16 {
    store_of(rig).place.slot
}

/// One more daemon's store on the same database.
async fn rig_on(url: &str) -> Rig {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("another {}", NEXT.fetch_add(1, Ordering::Relaxed));
    let (store, reader) = open(url, &name).await.expect("the ledger opens");
    Rig::of(Kind::Postgres { url: url.to_owned(), store: Some(Box::new(store)), reader }).await
}

async fn eventually<T>(mut look: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..500 {
        if let Some(seen) = look().await {
            return seen;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came");
}

fn url_of(rig: &Rig) -> String {
    match &rig.kind {
        Kind::Postgres { url, .. } => url.clone(),
        _ => panic!("these tests are PostgreSQL's"),
    }
}

/// A connection past the store, to look and to do harm.
async fn raw(url: &str) -> PgConnection {
    url.parse::<sqlx::postgres::PgConnectOptions>().expect("an address").connect().await.expect("it connects")
}

async fn end_sessions(url: &str) {
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
        WHERE datname = current_database() AND pid <> pg_backend_pid()";
    raw(url).await.execute(end).await.expect("a superuser may");
}

async fn number(url: &str, sql: &'static str) -> i64 {
    sqlx::query(sql).fetch_one(&mut raw(url).await).await.expect("the query runs").get(0)
}

#[tokio::test]
async fn every_statement_can_be_prepared() {
    let Some(rig) = Rig::postgres().await else { return };
    let mut conn = raw(&url_of(&rig)).await;
    let others =
        [hints::SEND].into_iter().chain(read::STATEMENTS).chain(watch::STATEMENTS).chain(days::STATEMENTS);
    for text in of_batches().chain(others.map(str::to_owned)) {
        let prepared = conn.prepare(AssertSqlSafe(text.clone()).into_sql_str()).await;
        prepared.unwrap_or_else(|error| panic!("{error}: {text:.300}"));
    }
}

/// Every statement of the connections that batches are decided and written on.
fn of_batches() -> impl Iterator<Item = String> {
    let fixed = recover::STATEMENTS
        .into_iter()
        .chain(living::STATEMENTS)
        .chain(slots::STATEMENTS)
        .chain(news::STATEMENTS)
        .chain([flight::FATE]);
    statements::statements().into_iter().chain(fixed.map(str::to_owned))
}

/// Whatever is stored: a plan that is made once for all must not read all of it.
#[tokio::test]
async fn what_a_watch_reads_is_looked_up_by_indexes_alone() {
    let Some(mut rig) = Rig::postgres().await else { return };
    rig.enqueue_all((0..3_000).map(|_| New::of("a"))).await;
    rig.commit().await;
    let mut conn = raw(&url_of(&rig)).await;
    conn.execute("ANALYZE; SET plan_cache_mode = force_generic_plan; SET jit = off").await.expect("it can");
    // The rows are of a day far ahead, which has no partition yet.
    let prepared = format!("PREPARE looked (bigint[], bigint[], bigint) AS {}", watch::AFTER);
    conn.execute(AssertSqlSafe(prepared).into_sql_str()).await.expect("it is one");
    let plan = "EXPLAIN (COSTS off) EXECUTE looked (ARRAY[0], ARRAY[2990], 500)";
    let plan = conn.fetch_all(plan).await.expect("it has a plan");
    let plan: String = plan.iter().map(|line| line.get::<String, _>(0) + "\n").collect();
    for index in ["task_specs_pkey", "task_history_default_slot_seq_idx"] {
        assert!(plan.contains(&format!("Index Scan using {index}")), "{index}\n{plan}");
    }
    for whole in ["Seq Scan on task_specs", "Seq Scan on task_history_default"] {
        assert!(!plan.contains(whole), "{whole}\n{plan}");
    }
    // Rows are unpacked until there are enough.
    assert!(plan.contains("Presorted Key: r"), "{plan}");
}

/// The server may have looked at tables last when they were empty, and plans that were made then stay.
#[tokio::test]
async fn what_a_batch_reads_is_looked_up_by_indexes_whatever_statistics_say() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let mut conn = raw(&url_of(&rig)).await;
    // A partitioned table has no such setting.
    for table in LARGE.iter().filter(|table| **table != "task_history") {
        let off = format!("ALTER TABLE {table} SET (autovacuum_enabled = off)");
        conn.execute(AssertSqlSafe(off).into_sql_str()).await.expect("it can");
    }
    for (setting, value) in open::BY_INDEX {
        let set = format!("SET {setting} = {value}");
        conn.execute(AssertSqlSafe(set).into_sql_str()).await.expect("it can");
    }
    conn.execute("ANALYZE; SET plan_cache_mode = force_generic_plan").await.expect("it can");
    for tasks in [0, 5_000] {
        let keyed = |n: u32| New { key: Box::leak(format!("k{n}").into_boxed_str()), ..New::of("a") };
        rig.enqueue_all((0..tasks).map(keyed)).await;
        rig.commit().await;
        let of_readers = read::STATEMENTS.into_iter().chain(watch::STATEMENTS).map(str::to_owned);
        let batches = store_of(&mut rig).connection().expect("it is open");
        let once = of_batches().filter(|text| text != news::GATED_COUNTS);
        let looked_up = [look_ups(batches, once).await, look_ups(&mut conn, of_readers).await];
        assert!(looked_up[0] > 40 && looked_up[1] > 20, "{looked_up:?}");
    }
}

/// How often these look up rows of large tables by an index or where they are, and that they read no such table otherwise.
async fn look_ups(conn: &mut PgConnection, statements: impl Iterator<Item = String>) -> usize {
    let mut found = 0;
    for text in statements {
        let values = (1..30).take_while(|at| text.contains(&format!("${at}"))).map(|_| "NULL");
        let values = values.collect::<Vec<_>>().join(", ");
        let values = if values.is_empty() { values } else { format!("({values})") };
        let explain = format!(
            "PREPARE looked AS {text}; EXPLAIN (FORMAT JSON) EXECUTE looked{values}; DEALLOCATE looked"
        );
        let plan = sqlx::raw_sql(AssertSqlSafe(explain)).fetch_one(&mut *conn).await.expect("it has a plan");
        let plan: String = plan.try_get_unchecked(0).expect("a text");
        let plan: serde_json::Value = serde_json::from_str(&plan).expect("JSON");
        let looked_up = look_ups_of(&plan[0]["Plan"], false);
        found += looked_up.unwrap_or_else(|read| panic!("{read}: {text}\n{plan:#}"));
    }
    found
}

/// Tables that grow with the number of tasks.
const LARGE: [&str; 11] = [
    "agent_blocks",
    "tasks",
    "task_specs",
    "task_history",
    "requests",
    "ready",
    "results",
    "salvage",
    "task_notes",
    "dead_letter_queue",
    "agent_events",
];

/// The same of a plan, or which it reads otherwise.
fn look_ups_of(plan: &serde_json::Value, few: bool) -> Result<usize, String> {
    let kind = plan["Node Type"].as_str().expect("a node has a type");
    // A range is to be looked up, and not to be seen of each row of two tables.
    if let Some(filter) = plan["Join Filter"].as_str().filter(|filter| filter.contains(" >= ")) {
        return Err(format!("{filter} of a {kind}"));
    }
    let table = plan["Relation Name"].as_str().unwrap_or_default();
    let large = LARGE.contains(&table) || table.starts_with("task_history");
    let by_index = match plan["Index Cond"].as_str() {
        // All that an agent has, but for what waits of it at a gate.
        Some(cond) => !cond.starts_with("(agent = ") || plan["Index Name"] == "ready_gated",
        None => plan.get("TID Cond").is_some() || kind == "Bitmap Heap Scan",
    };
    let mut found = 0;
    if large && kind.ends_with("Scan") {
        if !by_index && !few {
            return Err(format!("{kind} of {table}"));
        }
        found = 1;
    }
    // The first rows in the order of an index.
    let few = kind == "Limit" || few && !matches!(kind, "Sort" | "Aggregate" | "Hash");
    for part in plan["Plans"].as_array().into_iter().flatten() {
        found += look_ups_of(part, few)?;
    }
    Ok(found)
}

/// No statement may look at all that waits, or the server ends it.
#[tokio::test]
async fn what_lives_is_read_a_few_blocks_at_a_time() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    let id = rig.enqueue(New::of("a")).await;
    rig.claim(id).await;
    rig.commit().await;
    // The same in each of many blocks, of which a few are full.
    let copy = |table: &str| {
        format!(
            "INSERT INTO {table} SELECT (jsonb_populate_record(own, jsonb_build_object('id', own.id + 4096 * n))).* \
             FROM {table} AS own CROSS JOIN generate_series(1, 40) AS n"
        )
    };
    let blocks = "INSERT INTO live_blocks (block, slot, n) SELECT n, 0, CASE WHEN n % 10 = 0 THEN 4096 ELSE 1 END \
        FROM generate_series(1, 40) AS n";
    let mut conn = raw(&url).await;
    for text in [copy("task_specs"), copy("tasks"), blocks.to_owned()] {
        conn.execute(AssertSqlSafe(text).into_sql_str()).await.expect("it runs");
    }
    let all: Vec<TaskId> = (0..=40).map(|n| TaskId(id.0 + 4_096 * n)).collect();
    let (mut pieces, mut from) = (Vec::new(), Some(TaskId(0)));
    while let Some(next) = from {
        let (mut tasks, rest) = rig.store().live(&[AGENT].into(), next).await.expect("it looks");
        tasks.sort_unstable_by_key(|task| task.id);
        pieces.push(tasks.iter().map(|task| task.id).collect::<Vec<_>>());
        from = rest;
    }
    assert_eq!(pieces.concat(), all);
    assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [10, 1, 9, 1, 9, 1, 9, 1]);
    rig.commit().await;
    let beat = "SELECT beat_at FROM slots WHERE slot = 0";
    conn.execute("UPDATE slots SET beat_at = 0 WHERE slot = 0").await.expect("it runs");
    rig.recover().await;
    assert_eq!(rig.timed(&[]).await, all);
    assert!(number(&url, beat).await > 0, "the others are told meanwhile that it lives");
}

/// A column that is added to a statement needs a new type of its rows, by a migration: daemons of before still use the old one.
#[tokio::test]
async fn types_of_rows_have_the_columns_of_their_statements() {
    let Some(rig) = Rig::postgres().await else { return };
    let mut conn = raw(&url_of(&rig)).await;
    let columns = "SELECT a.attname::text, format_type(a.atttypid, NULL) FROM pg_attribute AS a \
        WHERE a.attrelid = (SELECT typrelid FROM pg_type WHERE oid = to_regtype($1)) ORDER BY a.attnum";
    for table in statements::tables() {
        let found = sqlx::query(columns).bind(table.row).fetch_all(&mut conn).await.expect("the query runs");
        let found: Vec<(String, String)> = found.iter().map(|row| (row.get(0), row.get(1))).collect();
        let here = table.columns.iter().map(|(name, kind)| ((*name).to_owned(), kind.name().to_owned()));
        assert_eq!(found, here.collect::<Vec<_>>(), "{}", table.row);
    }
}

/// Rows of tasks are written without what few have, where none in a batch has any of it.
#[tokio::test]
async fn what_few_tasks_have_is_gone_from_the_row_when_it_is_over() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    let stopped = "SELECT count(*) FROM tasks WHERE stop_cause IS NOT NULL AND stop_until IS NOT NULL";
    let [one, other] = [rig.enqueue(New::of("a")).await, rig.enqueue(New::of("a")).await];
    let fence = rig.run(one).await;
    rig.commit().await;
    rig.apply(one, Event::Cancel { note: "no".into() }).await;
    let last = rig.run(other).await;
    rig.commit().await;
    assert_eq!(number(&url, stopped).await, 1);
    rig.end(one, fence, Outcome::Complete).await;
    rig.end(other, last, Outcome::Complete).await;
    rig.commit().await;
    assert_eq!(number(&url, stopped).await, 0);
    assert_eq!(
        number(&url, "SELECT count(*) FROM tasks WHERE stop_cause IS NULL AND stop_until IS NULL").await,
        2
    );
}

#[tokio::test]
async fn a_small_result_is_in_the_row_of_its_task_and_a_large_one_is_not() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    let [small, large] = [rig.enqueue(New::of("a")).await, rig.enqueue(New::of("a")).await];
    rig.commit().await;
    rig.complete(small).await;
    rig.complete(large).await;
    let long = Bytes::from(vec![7; 257]);
    rig.write(Changes { results: vec![(large, long.clone())], ..Changes::default() }).await;
    rig.commit().await;
    assert_eq!(number(&url, "SELECT count(*) FROM tasks WHERE result IS NOT NULL").await, 1);
    assert_eq!(number(&url, "SELECT sum(task_id)::bigint FROM results").await, large.0.cast_signed());
    let reader = rig.reader().expect("a reader");
    for (id, result) in [(small, Bytes::from(format!("result of {small}"))), (large, long)] {
        let view = reader.task(id, true).await.expect("it reads").expect("it is there");
        assert_eq!((view.result_bytes, view.result), (result.len() as u64, Some(result)));
    }
}

#[tokio::test]
async fn each_daemon_has_a_slot_and_leaves_it_to_the_next() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let mut second = rig_on(&url).await;
    assert_eq!([slot_of(&mut first), slot_of(&mut second)], [0, 1]);
    assert_eq!(second.recovered.replicas.others, [0]);
    store_of(&mut first).leave().await.expect("the server is there");
    drop(first);
    let mut third = rig_on(&url).await;
    assert_eq!(slot_of(&mut third), 0);
}

#[tokio::test]
async fn a_daemon_that_never_was_begins_with_empty_budgets_even_after_a_conflict() {
    let Some(first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let mut second = rig_on(&url).await;
    let begins: Vec<_> = second.recovered.budgets.iter().map(|row| row.level.millitokens).collect();
    let now = second.now;
    let (news, _) = second.store().anew(&[], now).await.expect("it reads").expect("the server is there");
    let anew = news.budgets.expect("they are made anew");
    assert!(begins.iter().all(|tokens| *tokens == 0) && !begins.is_empty(), "{begins:?}");
    assert_eq!(anew, second.recovered.budgets);
}

#[tokio::test]
async fn whoever_lost_its_slot_commits_nothing_under_it() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    first.enqueue(New::of("a")).await;
    raw(&url).await.execute("UPDATE slots SET owner = NULL, heir = 1 WHERE slot = 0").await.expect("it runs");
    let error = first.store().commit().await.expect_err("the slot is not its own any more");
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    assert_eq!(number(&url, "SELECT COUNT(*) FROM tasks").await, 0);
    first.recover().await;
    first.enqueue(New::of("a")).await;
    first.commit().await;
    assert_eq!(number(&url, "SELECT COUNT(*) FROM tasks").await, 1);
}

#[tokio::test]
async fn who_is_gone_has_an_heir_who_hears_its_mail_and_knows_its_tasks() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let mut second = rig_on(&url).await;
    let now = second.now;
    let news = second.store().news(&[], false, now).await.expect("it looks");
    assert_eq!((news.replicas.slot, &news.replicas.others[..], news.left), (1, &[0][..], None));
    second.commit().await;
    let id = first.enqueue(New::of("a")).await;
    first.claim(id).await;
    first.commit().await;
    // It ends without a word: its lock goes with its session, and its last sign of life gets old.
    drop(first);
    let mut conn = raw(&url).await;
    conn.execute("UPDATE slots SET beat_at = beat_at - 5000 WHERE slot = 0").await.expect("it runs");
    conn.execute("INSERT INTO mail (slot, task_id) VALUES (0, 77)").await.expect("it runs");
    let news = eventually(async || {
        let news = second.store().news(&[], false, now).await.expect("it looks");
        second.commit().await;
        news.left.is_some().then_some(news)
    })
    .await;
    assert_eq!(news.left, Some(Vec::new()), "no worker of it is known");
    assert_eq!((news.changed, news.replicas.others), (vec![TaskId(77)], Vec::new()));
    // As it does when it was sent by somebody who had not seen yet that its daemon is gone.
    conn.execute("INSERT INTO mail (slot, task_id) VALUES (0, 78)").await.expect("it runs");
    let news = second.store().news(&[], false, now).await.expect("it looks");
    second.commit().await;
    assert_eq!(news.changed, [TaskId(78)]);
    let mut third = rig_on(&url).await;
    assert_eq!(slot_of(&mut third), 0, "the number is free again");
    assert_eq!(number(&url, "SELECT COUNT(*) FROM mail").await, 0);
}

#[tokio::test]
async fn one_that_looks_often_and_commits_nothing_says_that_it_lives() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    let now = rig.now;
    let mut beats = std::collections::BTreeSet::new();
    // More often than it has to say so: one look in a few does.
    eventually(async || {
        rig.store().news(&[TaskId(1)], false, now).await.expect("it looks");
        rig.commit().await;
        beats.insert(number(&url, "SELECT beat_at FROM slots").await);
        (beats.len() > 3).then_some(())
    })
    .await;
}

/// Or nobody would hear of others, nor others of it, until the clock is where it was.
#[tokio::test]
async fn one_whose_clock_was_set_back_looks_at_once_and_says_that_it_lives() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    let now = rig.now;
    rig.store().news(&[], false, now).await.expect("it looks");
    rig.commit().await;
    assert!(!rig.store().has_news(now, false), "it has just looked");
    let back = Now { at: now.at.before(Duration::from_secs(60)), ..now };
    assert!(rig.store().has_news(back, false));
    assert!(rig.store().next_due(back).is_some_and(|due| due <= back.at));
    let ahead = store_of(&mut rig).beat_at + 60_000;
    store_of(&mut rig).beat_at = ahead;
    raw(&url).await.execute("UPDATE slots SET beat_at = beat_at + 60000").await.expect("nobody holds it");
    rig.store().news(&[], false, back).await.expect("it looks");
    rig.commit().await;
    assert!(number(&url, "SELECT beat_at FROM slots").await < ahead);
    assert!(!rig.store().has_news(back, false));
}

#[tokio::test]
async fn a_task_that_runs_elsewhere_is_told_to_who_serves_its_worker() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let mut second = rig_on(&url).await;
    let id = first.enqueue(New::of("a")).await;
    first.claim(id).await;
    first.commit().await;
    second.apply(id, Event::Cancel { note: "no".into() }).await;
    second.commit().await;
    let now = first.now;
    let news = first.store().news(&[], false, now).await.expect("it looks");
    assert_eq!(news.changed, [id]);
    // A batch that fails has not heeded it.
    first.recover().await;
    let news = first.store().news(&[], false, now).await.expect("it looks");
    assert_eq!(news.changed, [id]);
    first.commit().await;
    assert!(first.store().news(&[], false, now).await.expect("it looks").changed.is_empty());
}

#[tokio::test]
async fn a_breaker_that_another_daemon_moved_is_not_overwritten() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let mut second = rig_on(&url).await;
    let config = Arc::new(breaker_core::Config::default());
    let now = first.now.at.since_epoch();
    let mut breaker = breaker_core::Breaker::new(config).expect("the default is valid");
    let row = |breaker: &breaker_core::Breaker| BreakerRow {
        agent: AGENT,
        task_type: "".into(),
        snapshot: breaker.snapshot(),
        last_probe: None,
    };
    let write = |rows| Changes { breakers: rows, ..Changes::default() };
    let closed = row(&breaker);
    first.store().write(write(vec![closed.clone()])).await.expect("it is staged");
    first.commit().await;
    let at = second.now;
    assert_eq!(second.store().news(&[], false, at).await.expect("it looks").breakers.len(), 1);
    second.commit().await;
    breaker.trip(None, now, 0);
    first.store().write(write(vec![row(&breaker)])).await.expect("it is staged");
    first.commit().await;
    second.store().write(write(vec![closed])).await.expect("it is staged");
    let error = second.store().commit().await.expect_err("it counts in a breaker that is open");
    assert!(matches!(error, StoreError::Outdated(_)), "{error}");
    let (news, _) = second.store().anew(&[], at).await.expect("it reads").expect("it can");
    assert_eq!(news.breakers[0].snapshot.state, breaker_core::State::Open);
}

#[tokio::test]
async fn what_would_lose_commits_is_refused() {
    for (url, fits) in [
        ("postgres://db.example.com/ledger", true),
        ("postgres://db.example.com/ledger?sslmode=verify-full", true),
        ("postgres://db.example.com/ledger?sslmode=require", false),
        ("postgres://db.example.com/ledger?sslmode=verify-ca", false),
        ("postgres://db.example.com/ledger?sslmode=disable", false),
        ("postgres://127.0.0.1/ledger?sslmode=disable", true),
        ("postgres:///ledger?host=/run/postgresql", true),
    ] {
        match options(url) {
            Ok(_) => assert!(fits, "{url}"),
            Err(error) => assert!(!fits && error.is_configuration(), "{url}: {error}"),
        }
    }
    let Some(url) = database().await else { return };
    // The one of the two that a session may set.
    let mut conn = raw(&url).await;
    let name = url.rsplit_once('/').expect("a database").1;
    conn.execute(AssertSqlSafe(format!("ALTER DATABASE {name} SET default_transaction_read_only = on")))
        .await
        .expect("a superuser may");
    let refused = open(&url, "rig").await.expect_err("nothing can be written");
    assert!(matches!(refused, ConnectError::Migration { .. }), "{refused}");
}

#[tokio::test]
async fn a_task_that_somebody_else_changed_is_named_and_nothing_is_written() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let [ours, theirs] = [rig.enqueue(New::of("a")).await, rig.enqueue(New::of("a")).await];
    rig.commit().await;
    rig.apply(ours, Event::Cancel { note: "no".into() }).await;
    rig.apply(theirs, Event::Cancel { note: "no".into() }).await;
    let mut conn = raw(&url_of(&rig)).await;
    let other =
        sqlx::query("UPDATE tasks SET version = version + 1 WHERE id = $1").bind(theirs.0.cast_signed());
    other.execute(&mut conn).await.expect("nobody holds it");
    let error = rig.store().commit().await.expect_err("somebody was faster");
    assert!(matches!(error, StoreError::Overtaken(id) if id == theirs), "{error}");
    rig.recover().await;
    assert_eq!(rig.get(ours).await.map(|task| task.state), Some(State::Queued));
    assert_eq!(number(&url_of(&rig), "SELECT COUNT(*) FROM history").await, 2);
}

#[tokio::test]
async fn a_batch_that_fails_takes_along_the_one_that_was_decided_on_it() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let [ours, theirs] = [rig.enqueue(New::of("a")).await, rig.enqueue(New::of("a")).await];
    rig.commit().await;
    let url = url_of(&rig);
    rig.apply(theirs, Event::Cancel { note: "no".into() }).await;
    let other = "UPDATE tasks SET version = version + 1 WHERE id = (SELECT max(id) FROM tasks)";
    raw(&url).await.execute(other).await.expect("nobody holds it");
    rig.store().submit().await.expect("it is handed over");
    rig.apply(ours, Event::Cancel { note: "no".into() }).await;
    let made = rig.enqueue(New::of("a")).await;
    rig.store().submit().await.expect("it is handed over");
    let error = rig.store().durable().await.expect_err("somebody was faster");
    assert!(matches!(error, StoreError::Overtaken(id) if id == theirs), "{error}");
    assert!(rig.store().durable().await.is_err(), "nothing more is on its way");
    let now = rig.now;
    let (_, found) = rig.store().anew(&[ours, theirs, made], now).await.expect("it reads").expect("it can");
    let mut found: Vec<_> = found.iter().map(|task| (task.id, task.version, task.state)).collect();
    found.sort_by_key(|(id, ..)| *id);
    assert_eq!(found, [(ours, 1, State::Queued), (theirs, 2, State::Queued)]);
    // The numbers of what was not written are given again: no gap.
    rig.apply(ours, Event::Cancel { note: "no".into() }).await;
    rig.commit().await;
    assert_eq!(number(&url, "SELECT max(seq) FROM history").await, 3);
    assert_eq!(number(&url, "SELECT count(*) FROM history").await, 3);
    assert_eq!(number(&url, "SELECT last_seq FROM slots").await, 3);
}

#[tokio::test]
async fn what_is_new_of_a_batch_is_written_while_the_one_before_it_is() {
    for fails in [false, true] {
        let Some(mut rig) = Rig::postgres().await else { return };
        let url = url_of(&rig);
        let known = rig.enqueue(New::of("a")).await;
        rig.commit().await;
        let mut other = raw(&url).await;
        other.execute("BEGIN; SELECT 1 FROM tasks FOR UPDATE").await.expect("nobody holds it");
        rig.apply(known, Event::Cancel { note: "no".into() }).await;
        rig.store().submit().await.expect("it is handed over");
        let made = rig.enqueue(New::of("a")).await;
        rig.complete(made).await;
        rig.store().submit().await.expect("it is handed over");
        // The first waits for the row. The second has sent its last new rows, and sends nothing more until it is its turn.
        let ahead = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
            AND state = 'idle in transaction' AND query LIKE 'WITH part0 AS (INSERT INTO task_specs %'";
        eventually(async || (number(&url, ahead).await == 1).then_some(())).await;
        assert_eq!(number(&url, "SELECT count(*) FROM history").await, 1, "nothing of it can be seen");
        let end = if fails { "UPDATE tasks SET version = version + 1; COMMIT" } else { "ROLLBACK" };
        other.execute(end).await.expect("the server is there");
        let durable = rig.store().durable().await;
        if fails {
            assert!(matches!(durable, Err(StoreError::Overtaken(id)) if id == known), "{durable:?}");
            // Undone once the server has noticed that its session is over.
            let gone = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                AND state = 'idle in transaction'";
            eventually(async || (number(&url, gone).await == 0).then_some(())).await;
            assert_eq!(number(&url, "SELECT count(*) FROM history").await, 1);
            continue;
        }
        assert_eq!(durable.expect("it is committed").seq(), 2);
        assert_eq!(rig.store().durable().await.expect("it is committed").seq(), 6);
        assert_eq!(number(&url, "SELECT count(*) FROM history").await, 6);
        assert_eq!(rig.get(made).await.map(|task| task.state), Some(State::Done));
    }
}

#[tokio::test]
async fn what_one_batch_is_offered_no_other_gets_meanwhile() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let ids = rig.enqueue_all((0..4).map(|_| New::of("a"))).await;
    rig.commit().await;
    assert_eq!(rig.offer(Ask { limit: 2, ..everything() }).await, ids[..2]);
    let mut other = raw(&url_of(&rig)).await;
    let free = "SELECT task_id FROM ready ORDER BY task_id FOR UPDATE SKIP LOCKED";
    let rows = other.fetch_all(free).await.expect("it reads");
    let free: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(free, ids[2..].iter().map(|id| id.0.cast_signed()).collect::<Vec<_>>());
}

#[tokio::test]
async fn those_that_wait_stand_in_the_table_and_no_others() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let ids = rig.enqueue_all((0..5).map(|_| New::of("a"))).await;
    // Claimed in the batch that made it: it never stood there.
    rig.claim(ids[0]).await;
    rig.apply(ids[1], Event::Gate).await;
    rig.commit().await;
    let url = url_of(&rig);
    assert_eq!(number(&url, "SELECT COUNT(*) FROM ready").await, 4);
    assert_eq!(number(&url, "SELECT COUNT(*) FROM ready WHERE gated = 1").await, 1);
    rig.claim(ids[2]).await;
    rig.apply(ids[1], Event::Ungate).await;
    rig.apply(ids[3], Event::Cancel { note: "no".into() }).await;
    rig.commit().await;
    assert_eq!(number(&url, "SELECT COUNT(*) FROM ready").await, 2);
}

#[tokio::test]
async fn a_batch_goes_when_its_session_is_ended_and_the_next_is_served() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let kept = rig.enqueue(New::of("a")).await;
    rig.commit().await;
    let url = url_of(&rig);
    let lost = rig.enqueue(New::of("a")).await;
    // It has read, so it has a transaction.
    assert!(rig.get(TaskId(u64::MAX >> 1)).await.is_none());
    end_sessions(&url).await;
    let error = rig.store().commit().await.expect_err("its session has ended");
    assert!(matches!(error, StoreError::Unavailable(_)), "nothing was written: {error}");
    rig.recover().await;
    assert_eq!(rig.get(lost).await, None);
    assert_eq!(rig.offer(everything()).await, [kept]);
    rig.claim(kept).await;
    rig.commit().await;
}

#[tokio::test]
async fn settled_rows_and_keys_of_the_open_batch_are_known() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let id = rig.enqueue(New { key: "k", ..New::of("a") }).await;
    let want = Want { keys: vec![(AGENT, "k".into())], ..Want::default() };
    assert_eq!(
        rig.known(want.clone()).await.keys.values().map(|holder| holder.task).collect::<Vec<_>>(),
        [id]
    );
    // Removed before it has ended: refused, and the batch with it.
    let removed = Changes { removed: vec![id], ..Changes::default() };
    assert!(store_of(&mut rig).write(removed).await.is_err());
    rig.recover().await;
    assert!(rig.known(want).await.keys.is_empty());
}

#[tokio::test]
async fn a_task_decided_from_another_version_is_a_bug_and_fails_its_batch() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let id = rig.enqueue(New::of("a")).await;
    let task = rig.get(id).await.expect("it exists");
    let changed = Changed { expected: task.version + 1, was: Some(task.state), task: Arc::new(task) };
    let error = store_of(&mut rig).write(Changes { tasks: vec![changed], ..Changes::default() }).await;
    assert!(matches!(error, Err(StoreError::Statement(_))), "{error:?}");
    assert!(matches!(rig.store().commit().await, Err(StoreError::Unavailable(_))), "recover first");
    rig.recover().await;
    rig.wait(Duration::from_secs(1));
    assert_eq!(rig.offer(everything()).await, []);
}

#[tokio::test]
async fn what_becomes_due_next_is_one_look_at_an_index() {
    let Some(rig) = Rig::postgres().await else { return };
    let mut conn = raw(&url_of(&rig)).await;
    // The table is empty: only what the index can do is asked, not what the planner would choose today.
    conn.execute("SET enable_seqscan = off; SET enable_bitmapscan = off").await.expect("a session may");
    let plan = format!("EXPLAIN {}", recover::NEXT_DUE.replace("$1", "5").replace("$2", "6"));
    let rows = conn.fetch_all(AssertSqlSafe(plan)).await.expect("it explains");
    let plan: String = rows.iter().map(|row| row.get::<String, _>(0) + "\n").collect();
    for condition in ["((calendar = 0) AND (run_at > 5))", "((calendar = 1) AND (run_at > 6))"] {
        assert!(plan.contains(&format!("Index Cond: {condition}")), "{condition} in\n{plan}");
    }
    assert!(!plan.contains("Sort"), "{plan}");
}
