//! Who holds which key, where rows of what producers said are what says so.

use super::{eventually, number, raw, rig_on, url_of};
use crate::store::rig::{AGENT, New, Rig, everything};
use ledger_core::store::{StoreError, Want};
use ledger_core::{Event, Outcome, TaskId};
use sqlx::Executor as _;
use std::sync::Arc;

pub(super) async fn holder(rig: &mut Rig, key: &str) -> Option<TaskId> {
    let key: (_, Arc<str>) = (AGENT, key.into());
    let known = rig.known(Want { keys: vec![key.clone()], ..Want::default() }).await;
    known.keys.get(&key).map(|holder| holder.task)
}

fn cancel() -> Event {
    Event::Cancel { note: "no".into() }
}

/// Sessions that wait for their turn after they wrote rows of this table first.
async fn ahead_with(url: &str, table: &str) -> i64 {
    let waits = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
         AND state = 'idle in transaction' AND query LIKE 'WITH part0 AS (INSERT INTO {table} %'"
    );
    sqlx::query_scalar(sqlx::AssertSqlSafe(waits)).fetch_one(&mut raw(url).await).await.expect("it counts")
}

/// The row that holds it may be there until then.
#[tokio::test]
async fn a_key_that_was_held_is_not_taken_ahead_of_its_turn() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    let keyed = |key| New { key, frees_key: true, ..New::of("a") };
    let mut held = rig.enqueue(keyed("k")).await;
    let ids = rig.enqueue_all((0..3).map(|_| New::of("a"))).await;
    rig.commit().await;
    // A key that nobody held; one that is freed by a batch on its way; one that is freed by the batch that takes it.
    for (id, key, freed_before, ahead) in
        [(ids[0], "j", false, "task_specs"), (ids[1], "k", true, "tasks"), (ids[2], "k", false, "tasks")]
    {
        let mut other = raw(&url).await;
        other.execute("BEGIN; SELECT 1 FROM tasks FOR UPDATE").await.expect("nobody holds it");
        rig.apply(id, cancel()).await;
        if freed_before {
            rig.apply(held, cancel()).await;
        }
        rig.store().submit().await.expect("it is handed over");
        let known = holder(&mut rig, key).await;
        assert_eq!(known, (key == "k" && !freed_before).then_some(held));
        if known.is_some() {
            rig.apply(held, cancel()).await;
        }
        let taken = rig.enqueue(keyed(key)).await;
        rig.store().submit().await.expect("it is handed over");
        eventually(async || (ahead_with(&url, ahead).await == 1).then_some(())).await;
        other.execute("ROLLBACK").await.expect("the server is there");
        for _ in 0..2 {
            rig.store().durable().await.expect("it is committed");
        }
        assert_eq!(holder(&mut rig, key).await, Some(taken));
        rig.commit().await;
        held = if key == "k" { taken } else { held };
    }
    assert_eq!(number(&url, "SELECT count(*) FROM task_specs WHERE key_freed = 1").await, 2);
}

/// It would wait for the end of the batch that took it, which waits its turn.
#[tokio::test]
async fn beside_others_nobody_waits_for_a_key_that_is_taken_out_of_turn() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let mut second = rig_on(&url).await;
    let id = first.enqueue(New::of("a")).await;
    first.commit().await;
    // It hears that there is another.
    first.recover().await;
    let mut other = raw(&url).await;
    other.execute("BEGIN; SELECT 1 FROM tasks FOR UPDATE").await.expect("nobody holds it");
    first.apply(id, cancel()).await;
    first.store().submit().await.expect("it is handed over");
    assert_eq!(holder(&mut first, "k").await, None);
    first.enqueue(New { key: "k", ..New::of("a") }).await;
    first.store().submit().await.expect("it is handed over");
    eventually(async || (ahead_with(&url, "tasks").await == 1).then_some(())).await;
    assert_eq!(holder(&mut second, "k").await, None);
    let taken = second.enqueue(New { key: "k", ..New::of("a") }).await;
    second.commit().await;
    other.execute("ROLLBACK").await.expect("the server is there");
    first.store().durable().await.expect("it is committed");
    let error = first.store().durable().await.expect_err("the key is held");
    assert!(matches!(error, StoreError::Outdated(_)), "{error}");
    first.recover().await;
    assert_eq!(holder(&mut first, "k").await, Some(taken));
    first.commit().await;
    assert_eq!(number(&url, "SELECT count(*) FROM idempotency_keys").await, 1);
}

/// Who asks for keys hears whether anything waits, and asks for none of it where nothing does.
#[tokio::test]
async fn what_waits_since_a_batch_asked_is_offered_in_the_next() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let mut other = rig_on(&url_of(&rig)).await;
    assert_eq!(holder(&mut rig, "k").await, None);
    let theirs = other.enqueue(New::of("a")).await;
    other.commit().await;
    let ours = rig.enqueue(New::of("a")).await;
    assert_eq!(rig.offer(everything()).await, [ours], "nothing waited when it asked");
    rig.commit().await;
    assert_eq!(holder(&mut rig, "k").await, None);
    let mut both = [theirs, ours];
    both.sort();
    assert_eq!(rig.offer(everything()).await, both);
    rig.commit().await;
    // A batch of its own that was on its way when it asked is found in memory, and in the database when it has landed.
    other.recover().await;
    for id in both {
        let fence = rig.run(id).await;
        rig.end(id, fence, Outcome::Complete).await;
    }
    rig.commit().await;
    let underway = rig.enqueue(New::of("a")).await;
    rig.store().submit().await.expect("it is handed over");
    assert_eq!(holder(&mut rig, "k").await, None);
    assert_eq!(rig.offer(everything()).await, [underway]);
    rig.store().durable().await.expect("it is committed");
    assert_eq!(rig.offer(everything()).await, [underway]);
}
