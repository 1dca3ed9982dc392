//! Batches that are written side by side.

use super::super::staged::agent_block;
use super::{eventually, number, rig_on, url_of};
use crate::store::rig::{AGENT, New, Rig, everything};
use ledger_core::store::{AgentRow, Changed, Changes, StoreError};
use ledger_core::{Context, Event, Holder, SessionId, Settings, State, TaskId};
use std::collections::BTreeSet;
use std::sync::Arc;

const TASKS: &str = "SELECT count(*) FROM tasks";

pub(super) fn agent(name: &str) -> Changes {
    let row = AgentRow {
        id: AGENT,
        name: name.into(),
        given: ledger_core::AgentOverrides::default(),
        created_at: ledger_core::Timestamp::EPOCH,
        pause: None,
    };
    Changes { agents: vec![row], ..Changes::default() }
}

/// The loop may be busy with a decision when a batch becomes durable.
#[tokio::test]
async fn a_batch_follows_the_one_before_it_though_nobody_asks() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    for _ in 0..3 {
        let id = rig.enqueue(New::of("a")).await;
        assert!(rig.get(id).await.is_some());
        // Each is guarded by what the one before it will have left.
        rig.write(agent("one")).await;
        rig.store().submit().await.expect("it is handed over");
    }
    eventually(async || (number(&url, TASKS).await == 3).then_some(())).await;
    for seq in 1..=3 {
        assert_eq!(rig.store().durable().await.expect("it is committed").seq(), seq);
    }
    assert_eq!(number(&url, "SELECT revision FROM agents").await, 3);
    // What was left by those that are known is known when the next is decided.
    rig.write(agent("one")).await;
    rig.commit().await;
    assert_eq!(number(&url, "SELECT revision FROM agents").await, 4);
}

/// Its entry is known, though no row of it was read.
#[tokio::test]
async fn what_is_offered_while_its_batch_is_written_has_its_history_to_the_first_entry() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let id = rig.enqueue(New::of("a")).await;
    rig.store().submit().await.expect("it is handed over");
    let now = rig.now;
    let offered = rig.store().offer(&[everything()], now).await.expect("it offers").remove(0);
    let mut task = (*offered[0]).clone();
    let holder = Holder { worker: "w".into(), incarnation: 1, session: SessionId(3) };
    let permit = Some(breaker_core::Permit { epoch: 2, probe: false, slot: 0 });
    let cx = Context {
        now,
        settings: &Settings::default(),
        draw: 0,
        affords: &|_| true,
        digest: 0,
        lost_with: ledger_core::LostWith::ALONE,
    };
    let applied = task.apply(&Event::Claim { holder, permit }, &cx).expect("it is due");
    let changed = Changed { expected: 1, was: Some(State::Queued), task: Arc::new(task) };
    let history = applied.record.into_iter().collect();
    rig.write(Changes { tasks: vec![changed], history, ..Changes::default() }).await;
    rig.store().submit().await.expect("it is handed over");
    for seq in 1..=2 {
        assert_eq!(rig.store().durable().await.expect("it is committed").seq(), seq);
    }
    assert_eq!(rig.history(id).await.len(), 2);
}

/// Each would wait for an entry of `agent_blocks` that the other writes.
#[tokio::test]
async fn two_daemons_give_no_numbers_that_share_an_entry_of_an_agent() {
    let Some(mut one) = Rig::postgres().await else { return };
    let mut other = rig_on(&url_of(&one)).await;
    let mut entries = [BTreeSet::new(), BTreeSet::new()];
    for _ in 0..300 {
        for (entries, rig) in entries.iter_mut().zip([&mut one, &mut other]) {
            let first = rig.store().ids(8).await.expect("there are numbers");
            entries.extend((first..first + 8).map(|id| agent_block(AGENT, TaskId(id))));
        }
    }
    assert!(entries[0].is_disjoint(&entries[1]));
    // A run that needs all of a block gets it.
    assert_eq!(one.store().ids(1_000).await.expect("there are numbers") % 1_000, 0);
}

#[tokio::test]
async fn none_follows_one_that_failed() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    rig.write(agent("one")).await;
    rig.commit().await;
    // Another daemon was faster.
    let mut other = super::raw(&url).await;
    sqlx::query("UPDATE agents SET revision = revision + 1").execute(&mut other).await.expect("it can");
    for _ in 0..3 {
        let id = rig.enqueue(New::of("a")).await;
        assert!(rig.get(id).await.is_some());
        rig.write(agent("one")).await;
        rig.store().submit().await.expect("it is handed over");
    }
    let error = rig.store().durable().await.expect_err("it was decided on something else");
    assert!(matches!(error, StoreError::Outdated(_)), "{error}");
    let ended =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'";
    eventually(async || (number(&url, ended).await == 0).then_some(())).await;
    assert_eq!((number(&url, TASKS).await, number(&url, "SELECT revision FROM agents").await), (0, 2));
    rig.recover().await;
    rig.enqueue(New::of("a")).await;
    rig.commit().await;
    assert_eq!(number(&url, "SELECT max(seq) FROM history").await, 1, "and no number is left out");
}

/// Another daemon that was offered a task holds it, and may itself wait for one of ours: the server would see no circle.
#[tokio::test]
async fn beside_others_only_a_batch_that_is_alone_waits_for_what_they_were_offered() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let mut second = rig_on(&url).await;
    let ids = first.enqueue_all((0..3).map(|_| New::of("a"))).await;
    first.commit().await;
    let cancel = || Event::Cancel { note: "no".into() };
    // What nobody holds, and what does not wait at all.
    let fence = second.run(ids[0]).await;
    second.commit().await;
    second.end(ids[0], fence, ledger_core::Outcome::Complete).await;
    second.apply(ids[1], cancel()).await;
    second.commit().await;
    for _ in 0..2 {
        let id = ids[2];
        assert_eq!(first.offer(everything()).await, [id]);
        second.apply(id, cancel()).await;
        let error = second.store().commit().await.expect_err("it is held");
        assert!(matches!(error, StoreError::Overtaken(held) if held == id), "{error}");
        // Decided anew, it waits for the end of the other's batch. That one has not claimed it.
        let now = second.now;
        second.store().anew(&[id], now).await.expect("it reads").expect("the server is there");
        second.apply(id, Event::Gate).await;
        second.store().submit().await.expect("it is handed over");
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
            AND wait_event_type = 'Lock' AND query LIKE 'DELETE FROM ready%'";
        eventually(async || (number(&url, waits).await == 1).then_some(())).await;
        first.commit().await;
        second.store().durable().await.expect("nobody claimed it");
        second.apply(id, Event::Ungate).await;
        second.commit().await;
    }
    assert_eq!(number(&url, "SELECT count(*) FROM ready").await, 1);
}
