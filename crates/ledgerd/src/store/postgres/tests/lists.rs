//! Lists by agent: what stands for an agent's tasks among 16 numbers, and goes when the last of them has left.

use super::{number, rig_on, store_of, url_of};
use crate::store::rig::{New, Rig};
use ledger_core::store::{Changes, TaskFilter, Want};
use ledger_core::{AgentId, Event, State, TaskId};

const BLOCKS: &str = "SELECT COUNT(*) FROM agent_blocks";

/// All of a list, a page of 7 at a time.
async fn list(rig: &Rig, filter: &TaskFilter) -> Vec<u64> {
    let reader = rig.reader().expect("it can be read");
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = reader.tasks(filter, before, 7).await.expect("it lists");
        found.extend(page.items.iter().map(|view| view.task.id.0));
        match page.before {
            Some(next) => assert!(before.is_none_or(|before| next < before), "pages go on"),
            None => return found,
        }
        before = page.before;
    }
}

fn of(agent: u32) -> TaskFilter {
    TaskFilter { agent: Some(AgentId(agent)), ..TaskFilter::default() }
}

async fn remove(rig: &mut Rig, removed: Vec<TaskId>) {
    let want = Want { tasks: removed.clone(), ..Want::default() };
    assert_eq!(rig.known(want).await.tasks.len(), removed.len());
    rig.write(Changes { removed, ..Changes::default() }).await;
    rig.commit().await;
}

#[tokio::test]
async fn a_list_by_agent_finds_all_of_it_and_no_entry_is_left() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    let each = |n: u32| New { agent: 1 + n % 3, ..New::of("a") };
    // In two batches, which share a block.
    let mut ids = rig.enqueue_all((0..100).map(each)).await;
    rig.commit().await;
    ids.extend(rig.enqueue_all((100..200).map(each)).await);
    rig.complete(ids[3]).await;
    rig.commit().await;
    assert_eq!((ids[0], ids[199]), (TaskId(1), TaskId(200)));
    let newest = |agent: u32| -> Vec<u64> {
        (0..200_u32).rev().filter(|n| 1 + n % 3 == agent).map(|n| ids[n as usize].0).collect()
    };
    for agent in 1..=3 {
        assert_eq!(list(&rig, &of(agent)).await, newest(agent));
    }
    let live = TaskFilter { states: vec![State::Queued], ..of(1) };
    assert_eq!(list(&rig, &live).await.len(), newest(1).len() - 1);
    assert_eq!(number(&url, BLOCKS).await, 3 * 13);
    // All of one agent leave.
    for id in newest(2) {
        rig.apply(TaskId(id), Event::Cancel { note: "no".into() }).await;
    }
    rig.commit().await;
    remove(&mut rig, newest(2).into_iter().map(TaskId).collect()).await;
    assert!(list(&rig, &of(2)).await.is_empty());
    assert_eq!(number(&url, BLOCKS).await, 2 * 13);
    assert_eq!(list(&rig, &of(3)).await, newest(3));
}

/// One that removes the last task of an agent among 16 numbers, and one that makes another there at the same time.
#[tokio::test]
async fn an_entry_that_somebody_needs_again_stays() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    let old = rig.enqueue(New::of("a")).await;
    rig.complete(old).await;
    rig.commit().await;
    let mut other = rig_on(&url).await;
    // The next number, which is in the same block; not committed yet.
    let new = rig.enqueue(New::of("a")).await;
    assert_eq!(old.0 >> 4, new.0 >> 4);
    let mut conn = super::raw(&url).await;
    let mut made = sqlx::Connection::begin(&mut conn).await.expect("it begins");
    let spec = "INSERT INTO task_specs (id, agent, task_type, created_at, payload, digest, frees_key) \
        VALUES ($1, 1, 'a', 1, '', 1, 0)";
    sqlx::query(spec).bind(new.0.cast_signed()).execute(&mut *made).await.expect("it is new");
    let entry = "INSERT INTO agent_blocks (agent, block) VALUES (1, 0) \
        ON CONFLICT (agent, block) DO UPDATE SET block = excluded.block";
    sqlx::query(entry).execute(&mut *made).await.expect("it is held");
    assert!(other.get(old).await.is_some());
    let changes = Changes { removed: vec![old], ..Changes::default() };
    store_of(&mut other);
    other.store().write(changes).await.expect("it is staged");
    other.store().submit().await.expect("it is handed over");
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    super::eventually(async || (number(&url, waits).await == 1).then_some(())).await;
    made.commit().await.expect("it is committed");
    other.store().durable().await.expect("it is committed");
    assert_eq!(number(&url, BLOCKS).await, 1);
}
