//! Batches on their way to the file: what the next ones know of them, and what becomes of all when one fails.

use super::{number, raw, store_of};
use crate::store::rig::{AGENT, New, Rig};
use crate::store::sqlite::open::BUSY;
use ledger_core::store::{Changed, Changes, StoreError, Want};
use ledger_core::{AgentId, Spec, State, Task, TaskId};
use sqlx::Executor;
use std::sync::Arc;
use std::time::Duration;

/// So many that another thread writes them.
fn many() -> impl Iterator<Item = New> {
    (0..1_000).map(|_| New::of("a"))
}

fn keyed(key: &'static str) -> New {
    New { key, ..New::of("a") }
}

async fn submit(rig: &mut Rig) {
    rig.store().submit().await.expect("it is handed over");
}

/// Hands a batch over to the thread that writes.
async fn submit_many(rig: &mut Rig) -> Vec<TaskId> {
    let ids = rig.enqueue_all(many()).await;
    submit(rig).await;
    ids
}

#[tokio::test]
async fn what_was_written_ahead_goes_with_its_batch() {
    let mut rig = Rig::sqlite().await;
    let kept = rig.enqueue(keyed("k")).await;
    rig.commit().await;
    for twin_is_ahead in [true, false] {
        let lost = if twin_is_ahead {
            rig.enqueue_all(many().chain([keyed("k")])).await
        } else {
            let lost = rig.enqueue_all(many()).await;
            rig.enqueue(keyed("k")).await;
            lost
        };
        assert!(!store_of(&mut rig).staged.parts.is_empty(), "so many rows are written ahead");
        let error = rig.store().commit().await.expect_err("the key is taken");
        assert!(matches!(error, StoreError::Statement(_)), "{error}");
        rig.recover().await;
        assert_eq!(rig.get(lost[0]).await, None);
        assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM history").await, 1);
        assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM task_specs").await, 1);
    }
    let all = rig.enqueue_all(many()).await;
    rig.complete(all[0]).await;
    rig.complete(kept).await;
    rig.commit().await;
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM history").await, 1_007);
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM task_specs").await, 1_001);
    let mut rig = rig.reopen().await;
    assert_eq!(rig.get(all[0]).await.map(|task| task.state), Some(State::Done));
    assert_eq!(rig.get(all[999]).await.map(|task| task.state), Some(State::Queued));
}

#[tokio::test]
async fn keys_are_known_while_the_writer_waits() {
    let mut rig = Rig::sqlite().await;
    let held = rig.enqueue(keyed("held")).await;
    rig.commit().await;
    let mut other = raw(rig.folder()).await;
    other.execute("BEGIN IMMEDIATE").await.expect("nobody writes");
    let since = tokio::time::Instant::now();
    submit_many(&mut rig).await;
    let asked = ["held", "new"].map(|key| (AGENT, Arc::from(key)));
    let want = Want { keys: asked.to_vec(), ..Want::default() };
    let known =
        tokio::time::timeout(Duration::from_secs(2), rig.known(want)).await.expect("sooner than a write");
    let holders = asked.each_ref().map(|key| known.keys.get(key).map(|holder| holder.task));
    assert_eq!(holders, [Some(held), None]);
    other.execute("ROLLBACK").await.expect("it ends");
    let waited = since.elapsed();
    let written = rig.store().durable().await;
    assert!(written.is_ok() || waited >= BUSY, "the writer had patience: {:?}", written.err());
}

#[tokio::test]
async fn an_ended_task_stays_in_memory_until_its_last_batch_is_durable() {
    let mut rig = Rig::sqlite().await;
    let id = rig.enqueue(New::of("a")).await;
    rig.run(id).await;
    submit_many(&mut rig).await;
    rig.end(id, 1, ledger_core::Outcome::Complete).await;
    submit_many(&mut rig).await;
    rig.store().durable().await.expect("it commits");
    assert!(store_of(&mut rig).ready.entry(id).is_some(), "the file may still have it RUNNING");
    rig.store().durable().await.expect("it commits");
    assert!(store_of(&mut rig).ready.entry(id).is_none(), "the file has it");
    assert_eq!(rig.get(id).await.map(|task| task.state), Some(State::Done));
}

#[tokio::test]
async fn nothing_is_written_after_a_batch_that_failed() {
    let mut rig = Rig::sqlite().await;
    let kept = rig.enqueue(keyed("k")).await;
    rig.commit().await;
    rig.enqueue(keyed("k")).await;
    submit_many(&mut rig).await;
    for _ in 0..2 {
        // One that would do for itself, and a small one.
        submit_many(&mut rig).await;
        rig.enqueue(New::of("a")).await;
        submit(&mut rig).await;
    }
    let error = rig.store().durable().await.expect_err("the key is taken");
    assert!(matches!(error, StoreError::Statement(_)), "{error}");
    rig.recover().await;
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM history").await, 1);
    let all = submit_many(&mut rig).await;
    rig.store().durable().await.expect("it goes on");
    rig.complete(kept).await;
    rig.commit().await;
    assert_eq!(rig.get(all[0]).await.map(|task| task.state), Some(State::Queued));
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM history").await, 1_004);
}

/// It would be written by the thread that decides, which has not been told yet.
#[tokio::test]
async fn a_small_batch_is_not_written_after_one_that_failed_unheard() {
    for (large, waits) in [(true, true), (false, false)] {
        let mut rig = Rig::sqlite().await;
        rig.enqueue(keyed("k")).await;
        rig.commit().await;
        rig.enqueue(keyed("k")).await;
        if large {
            rig.enqueue_all(many()).await;
        }
        submit(&mut rig).await;
        if waits {
            // For the log to start over, and so for what is on its way.
            store_of(&mut rig).checkpoints.pretend_long();
            rig.known(Want::default()).await;
        }
        rig.enqueue(New::of("a")).await;
        submit(&mut rig).await;
        for _ in 0..2 {
            assert!(
                rig.store().durable().await.is_err(),
                "the key is taken, and the other was decided on that"
            );
        }
        rig.recover().await;
        assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM history").await, 1);
        assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM tasks").await, 1);
    }
}

#[tokio::test]
async fn a_log_that_grew_too_long_starts_over_when_nothing_is_on_its_way() {
    let mut rig = Rig::sqlite().await;
    submit_many(&mut rig).await;
    store_of(&mut rig).checkpoints.pretend_long();
    let ids = submit_many(&mut rig).await;
    assert!(rig.get(ids[0]).await.is_some(), "it waited for both");
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM tasks").await, 2_000);
    for _ in 0..2 {
        rig.store().durable().await.expect("both are told all the same");
    }
}

#[tokio::test]
async fn a_key_that_moves_away_is_free_for_a_new_task_of_the_same_batch() {
    let mut rig = Rig::sqlite().await;
    let old = rig.enqueue(keyed("k")).await;
    rig.commit().await;
    let before = rig.get(old).await.expect("it exists");
    let spec = Spec { agent: AgentId(2), ..(*before.spec).clone() };
    let task = Task { spec: Arc::new(spec), ..before.clone() };
    let changed = Changed { task: task.into(), expected: before.version, was: Some(before.state) };
    let respecified = vec![(old, AGENT, None)];
    rig.write(Changes { tasks: vec![changed], respecified, ..Changes::default() }).await;
    let new = rig.enqueue(keyed("k")).await;
    rig.commit().await;
    let keys = [AGENT, AgentId(2)].map(|agent| (agent, Arc::from("k")));
    let known = rig.known(Want { keys: keys.to_vec(), ..Want::default() }).await;
    assert_eq!(keys.each_ref().map(|key| known.keys[key].task), [new, old]);
    assert_eq!(number(rig.folder(), "SELECT COUNT(*) FROM agent_blocks").await, 2);
}
