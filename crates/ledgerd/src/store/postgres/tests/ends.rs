//! Tasks that end: what an end does not change does not travel.

use super::{number, raw, url_of};
use crate::store::rig::{New, Rig, failure};
use ledger_core::{Class, Event, Outcome, State, TaskId};
use sqlx::{AssertSqlSafe, Executor, SqlSafeStr};
use std::time::Duration;

/// Tasks that end in one batch: DONE, DONE though it was to stop, FAILED, and CANCELLED while it waited.
async fn end_all(rig: &mut Rig) -> Vec<TaskId> {
    let ids = rig.enqueue_all((0..4).map(|n| New { priority: n, ..New::of("a") })).await;
    rig.wait(Duration::from_millis(5));
    let mut fences = Vec::new();
    for id in &ids[..3] {
        fences.push(rig.run(*id).await);
    }
    rig.apply(ids[1], Event::Cancel { note: "stop".into() }).await;
    rig.commit().await;
    rig.wait(Duration::from_millis(5));
    rig.end(ids[0], fences[0], Outcome::Complete).await;
    rig.end(ids[1], fences[1], Outcome::Complete).await;
    rig.end(ids[2], fences[2], failure(Class::Permanent)).await;
    rig.apply(ids[3], Event::Cancel { note: "no".into() }).await;
    ids
}

#[tokio::test]
async fn rows_of_tasks_that_ended_are_as_they_were_decided() {
    // Alone in their batch; with one that goes on; and with one that has what few have.
    for beside in [None, Some(Event::Gate), Some(Event::Cancel { note: "stop".into() })] {
        let Some(mut rig) = Rig::postgres().await else { return };
        let other = rig.enqueue(New::of("b")).await;
        if matches!(beside, Some(Event::Cancel { .. })) {
            rig.run(other).await;
        }
        rig.commit().await;
        let mut ids = end_all(&mut rig).await;
        if let Some(event) = beside {
            rig.apply(other, event).await;
        }
        ids.push(other);
        let mut decided = Vec::new();
        for id in &ids {
            decided.push(rig.get(*id).await.expect("it is staged"));
        }
        rig.commit().await;
        let mut rig = rig.reopen().await;
        for (id, task) in ids.iter().zip(decided) {
            assert_eq!(rig.get(*id).await, Some(task.clone()), "{id}");
            let entries = rig.history(*id).await;
            assert_eq!(
                entries.last().map(|entry| (entry.version, entry.to)),
                Some((task.version, task.state))
            );
        }
        let states = [State::Done, State::Done, State::Failed, State::Cancelled];
        for (id, state) in ids.iter().zip(states) {
            assert_eq!(rig.get(*id).await.map(|task| task.state), Some(state), "{id}");
        }
        let left = "SELECT count(*) FROM tasks WHERE state IN (5, 6, 7) AND num_nonnulls(worker, incarnation, session, \
            lease_until, acked_at, progress_at, sample_epoch, sample_probe, sample_told) > 0";
        assert_eq!(number(&url_of(&rig), left).await, 0);
    }
}

#[tokio::test]
async fn what_is_claimed_and_ended_by_one_batch_has_its_fence_and_its_deliveries() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let id = rig.enqueue(New::of("a")).await;
    rig.commit().await;
    rig.complete(id).await;
    let decided = rig.get(id).await.expect("it is staged");
    assert_eq!((decided.fence, decided.delivery, decided.state), (1, 1, State::Done));
    rig.commit().await;
    let mut rig = rig.reopen().await;
    assert_eq!(rig.get(id).await, Some(decided));
}

/// Whoever looks at all by indexes needs none, and taking them costs.
#[tokio::test]
async fn no_statistics_are_taken_of_what_grows_with_tasks() {
    let Some(rig) = Rig::postgres().await else { return };
    let taken = "SELECT count(*) FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid \
        WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind = 'r' AND COALESCE(a.attstattarget, -1) <> 0 \
        AND (c.relname LIKE 'task%' OR c.relname IN ('requests', 'ready', 'results', 'salvage'))";
    let days = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'task_history'::regclass";
    let url = url_of(&rig);
    assert!(number(&url, days).await > 2, "days are made at the start");
    assert_eq!(number(&url, taken).await, 0);
}

/// Each of them alone, for they are one check.
#[tokio::test]
async fn a_row_of_a_task_that_cannot_be_is_refused() {
    let Some(mut rig) = Rig::postgres().await else { return };
    rig.enqueue(New::of("a")).await;
    rig.commit().await;
    let mut conn = raw(&url_of(&rig)).await;
    for wrong in [
        "state = 0",
        "state = 8",
        "reason = -1",
        "reason = 256",
        "priority = 10",
        "calendar = 2",
        "version = 0",
        "fence = -1",
        "worker = 'w'",
        "lease_until = 1",
        "stop_cause = 1",
        "stop_until = 1",
        "discarded = 2",
    ] {
        let update = AssertSqlSafe(format!("UPDATE tasks SET {wrong}")).into_sql_str();
        let error = conn.execute(update).await.expect_err(wrong);
        let constraint = error.as_database_error().and_then(|error| error.constraint());
        assert_eq!(constraint, Some("tasks_check"), "{wrong}");
    }
    conn.execute("UPDATE tasks SET worker = 'w', lease_until = 1, discarded = 1").await.expect("that can be");
}
