//! Ledgers of releases before, brought up to date.

use super::history::KEPT;
use super::keys::holder;
use super::{database, number, open, raw, rig_on};
use crate::store::rig::New;
use crate::store::schema;
use ledger_core::TaskId;
use sqlx::migrate::Migrator;
use sqlx::postgres::PgConnection;
use sqlx::{Executor as _, Row as _};

/// A ledger as it was with so many migrations, and a connection to it.
async fn ledger_of(migrations: usize) -> Option<(String, PgConnection)> {
    let url = database().await?;
    let before = schema::migrations(&open::MIGRATIONS[..migrations]);
    let mut conn = raw(&url).await;
    Migrator::with_migrations(before).run_direct(None, &mut conn, false).await.expect("it is new");
    Some((url, conn))
}

/// Nobody brings it up to date while a daemon of before serves it.
async fn refuses_while_it_is_served(url: &str, conn: &mut PgConnection) {
    let serves = "INSERT INTO slots (slot, name, owner, beat_at, last_seq, last_session) \
        VALUES (0, 'before', 7, (extract(epoch FROM clock_timestamp()) * 1000)::bigint, 0, 0)";
    conn.execute(serves).await.expect("it is as before");
    let error = open(url, "after").await.expect_err("it is served");
    assert!(error.to_string().contains("stop all of them first"), "{error}");
}

#[tokio::test]
async fn a_migration_takes_as_long_as_it_takes_and_batches_keep_their_limits() {
    let Some((url, mut busy)) = ledger_of(1).await else { return };
    busy.execute("BEGIN; LOCK TABLE task_history IN ROW EXCLUSIVE MODE").await.expect("nobody holds it");
    let coming = tokio::spawn(async move { open(&url, "one").await.map(|(store, _)| store) });
    // Longer than a statement of a batch waits for a lock.
    busy.execute("SELECT pg_sleep(2.5); COMMIT").await.expect("the server is there");
    let mut store = coming.await.expect("no panic").expect("the ledger opens");
    let limits = "SELECT current_setting('statement_timeout'), current_setting('lock_timeout')";
    let row = sqlx::query(limits).fetch_one(store.connection().expect("it is open")).await.expect("it reads");
    assert_eq!((row.get::<String, _>(0), row.get::<String, _>(1)), ("5s".to_owned(), "2s".to_owned()));
}

/// One that serves could not go on after it.
#[tokio::test]
async fn a_ledger_that_a_daemon_of_before_serves_stays_as_it_is() {
    let Some((url, mut conn)) = ledger_of(4).await else { return };
    refuses_while_it_is_served(&url, &mut conn).await;
    let types = "SELECT count(*) FROM pg_type WHERE typname IN ('lean_task_history', 'packed_history')";
    assert_eq!(number(&url, types).await, 1, "undone");
    // It leaves, as at its end.
    conn.execute("UPDATE slots SET beat_at = 0").await.expect("it runs");
    rig_on(&url).await;
}

/// A ledger whose history had a row for each entry.
#[tokio::test]
async fn history_of_before_rows_were_shared_is_kept_and_goes_on() {
    let Some((url, mut conn)) = ledger_of(4).await else { return };
    let rows = "INSERT INTO slots (slot, name, beat_at, last_seq, last_session) VALUES (0, '', 0, 4, 0); \
        INSERT INTO agents (id, name, settings, created_at) VALUES (1, 'a', '{}', 1700000000000); \
        INSERT INTO task_specs (id, agent, task_type, created_at, payload, digest, frees_key) \
            SELECT n, 1, 't', 1700000000000, '', n, 0 FROM generate_series(1, 2) AS n; \
        INSERT INTO tasks (id, run_at, queued_at, updated_at, version, fence, delivery, attempt, idle_deliveries, state, \
                reason, priority, calendar) \
            SELECT n, 1700000000000, 1700000000000, 1700000000000, n, 0, 0, 0, 0, 1, 1, 5, 0 FROM generate_series(1, 2) AS n; \
        INSERT INTO ready (agent, task_type, gated, urgency, run_at, calendar, task_id) \
            SELECT 1, 't', 0, 4, 1700000000000, 0, n FROM generate_series(1, 2) AS n; \
        INSERT INTO counts (slot, agent, state, n) VALUES (0, 1, 1, 2); \
        INSERT INTO live_blocks (block, slot, n) VALUES (0, 0, 2); \
        SELECT setval('task_blocks', 1); \
        INSERT INTO task_history (task_id, version, seq, at, fence, attempt, slot, kind, to_state, reason) \
            VALUES (1, 1, 1, 1700000000000, 0, 0, 0, 1, 1, 1), (2, 1, 2, 1700000000000, 0, 0, 0, 1, 1, 1), \
                (2, 2, 3, 1700000000000, 0, 0, 0, 1, 1, 1), (3, 1, 4, 1700000000000, 0, 0, 0, 1, 1, 1)";
    conn.execute(rows).await.expect("they are as before");
    let mut rig = rig_on(&url).await;
    assert_eq!(number(&url, KEPT).await, 3, "the third task is gone");
    for (id, entries) in [(TaskId(1), 1), (TaskId(2), 2)] {
        let before = rig.history(id).await;
        assert_eq!(before.len(), entries);
        rig.complete(id).await;
        rig.commit().await;
        let after = rig.history(id).await;
        assert_eq!((&after[..entries], after.len()), (&before[..], entries + 3));
    }
    let reader = rig.reader().expect("it can be read");
    let cut = [(0, 1)].into_iter().collect();
    let told = reader.after(&cut, 100).await.expect("it reads").expect("nothing was removed");
    assert_eq!(told.rows.len(), 8);
}

/// A ledger whose keys had a table of their own: who held one holds it, and who did not does not.
#[tokio::test]
async fn keys_of_before_rows_held_them_are_held_by_whom_they_were() {
    let Some((url, mut conn)) = ledger_of(7).await else { return };
    let rows = "INSERT INTO agents (id, name, settings, created_at) VALUES (1, 'a', '{}', 1700000000000); \
        INSERT INTO task_specs (id, agent, task_type, created_at, payload, key, digest, frees_key) \
            SELECT 5000 + n, 1, 't', 1700000000000, '', (ARRAY['k', 'k', NULL, 'j', 'i'])[n], n, 0 \
            FROM generate_series(1, 5) AS n; \
        INSERT INTO idempotency_keys (agent, key, task_id, digest) VALUES (1, 'k', 5002, 2), (1, 'j', 5004, 4)";
    conn.execute(rows).await.expect("it is as before");
    refuses_while_it_is_served(&url, &mut conn).await;
    let types = "SELECT count(*) FROM pg_type WHERE typname LIKE '%_idempotency_keys' AND typtype = 'c'";
    assert_eq!(number(&url, types).await, 2, "undone");
    conn.execute("UPDATE slots SET beat_at = 0").await.expect("it runs");
    let mut rig = rig_on(&url).await;
    assert_eq!(holder(&mut rig, "k").await, Some(TaskId(5_002)));
    assert_eq!(holder(&mut rig, "j").await, Some(TaskId(5_004)));
    assert_eq!(holder(&mut rig, "i").await, None);
    let taken = rig.enqueue(New { key: "i", ..New::of("a") }).await;
    rig.commit().await;
    assert_eq!(holder(&mut rig, "i").await, Some(taken));
    assert_eq!(number(&url, "SELECT count(*) FROM task_specs WHERE key_freed = 1").await, 2);
}
