//! What every store promises, asked of each of them: SQLite, PostgreSQL, and the model, calm and overtaking.
//!
//! The promises speak through [`Rig`], a ledger of a few lines: it decides with ledger-core, writes, and decides anew
//! what was overtaken.

use super::rig::{AGENT, New, Rig, START, caller, everything, failure};
use bytes::Bytes;
use ledger_core::fold::Folded;
use ledger_core::store::{
    AgentRow, Ask, BreakerRow, BudgetRow, Changes, Pause, RequestRow, SessionRow, Want,
};
use ledger_core::watch::{Cut, Happening, Placed};
use ledger_core::{
    AgentId, AgentOverrides, Class, Event, Outcome, Overrides, Reason, Record, SessionId, State, Task, TaskId,
};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

macro_rules! promises {
    ($($name:ident)+) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Rig::sqlite().await).await;
            })+
        }
        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                if let Some(rig) = super::Rig::postgres().await {
                    super::$name(rig).await;
                }
            })+
        }
        mod model {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Rig::model(None).await).await;
            })+
        }
        mod overtaking {
            $(#[tokio::test]
            async fn $name() {
                for seed in 0..20 {
                    super::$name(super::Rig::model(Some(seed * 1_000)).await).await;
                }
            })+
        }
    };
}

promises! {
    a_batch_reads_what_it_wrote
    a_batch_knows_those_that_are_on_their_way
    offers_come_in_the_usual_order
    a_task_is_offered_when_its_time_has_come
    calendar_tasks_go_by_the_wall_clock
    gated_tasks_are_offered_only_when_asked_for
    types_that_are_left_out_are_not_offered
    those_that_come_before_a_task_are_counted
    what_lives_is_found_piece_by_piece
    many_changes_of_one_task_are_one
    a_key_is_held_until_it_is_freed
    an_answer_is_remembered
    the_row_that_settled_a_fence_is_found
    everything_reads_back_after_a_restart
    an_uncommitted_batch_leaves_nothing
    rows_beside_the_tasks_read_back
    what_is_removed_is_gone_with_all_that_belongs_to_it
    folding_the_history_gives_the_state
    the_history_is_read_on_from_any_place
}

/// Hands the open batch over, with so many new tasks that it takes a while to be written.
async fn submit_many(rig: &mut Rig) -> Vec<TaskId> {
    let ids = rig.enqueue_all((0..1_000).map(|_| New { agent: 2, ..New::of("many") })).await;
    rig.store().submit().await.expect("it is handed over");
    ids
}

async fn a_batch_knows_those_that_are_on_their_way(mut rig: Rig) {
    let keyed = |key| New { key, ..New::of("a") };
    let old =
        [rig.enqueue(keyed("gone")).await, rig.enqueue(New { frees_key: true, ..keyed("freed") }).await];
    rig.complete(old[0]).await;
    let waits = rig.enqueue(New::of("a")).await;
    rig.commit().await;

    let asked = ["gone", "freed", "new"].map(|key| (AGENT, Arc::from(key)));
    let want = || Want { keys: asked.to_vec(), requests: vec!["r".into(), "s".into()], ..Want::default() };
    rig.complete(old[1]).await;
    let done = rig.enqueue(keyed("new")).await;
    rig.complete(done).await;
    let answer = RequestRow { id: "r".into(), digest: 1, answer: Bytes::from_static(b"yes"), at: rig.now.at };
    assert!(rig.get(old[0]).await.is_some());
    rig.write(Changes { removed: vec![old[0]], requests: vec![answer], ..Changes::default() }).await;
    let first = submit_many(&mut rig).await;

    // Whatever of it is durable by now.
    assert_eq!(rig.get(old[0]).await, None, "it is removed");
    for ended in [old[1], done] {
        assert_eq!(rig.get(ended).await.map(|task| task.state), Some(State::Done));
    }
    let known = rig.known(want()).await;
    let holders = asked.each_ref().map(|key| known.keys.get(key).map(|holder| holder.task));
    assert_eq!(holders, [None, None, Some(done)]);
    assert_eq!(known.requests.keys().collect::<Vec<_>>(), [&Arc::from("r")]);
    let settled = rig.store().settled(&[(done, 1), (first[0], 1)]).await.expect("it looks");
    assert_eq!(settled.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false]);
    // What waits is offered once, wherever it is known from.
    assert_eq!(rig.offer(everything()).await, [waits]);
    let of_others = Ask { agent: AgentId(2), limit: 3, ..everything() };
    assert_eq!(rig.offer(of_others.clone()).await, first[..3]);
    rig.claim(waits).await;
    rig.complete(first[0]).await;
    // Another on top of it, that changes what the first did.
    submit_many(&mut rig).await;
    assert_eq!(rig.get(first[0]).await.map(|task| task.state), Some(State::Done));
    assert_eq!(rig.offer(of_others.clone()).await, first[1..4]);
    assert!(rig.offer(everything()).await.is_empty(), "it is claimed");
    let proofs = [rig.store().durable().await, rig.store().durable().await].map(Result::unwrap);
    assert!(proofs[0].seq() < proofs[1].seq());
    rig.enqueue_all([keyed("gone"), keyed("freed")]).await;
    rig.commit().await;
    assert_eq!(rig.known(want()).await.keys.len(), 3, "both keys were free");
    let mut again = rig.reopen().await;
    assert_eq!(again.get(first[0]).await.map(|task| task.state), Some(State::Done));
    assert_eq!(again.offer(of_others).await, first[1..4]);
}

async fn types_that_are_left_out_are_not_offered(mut rig: Rig) {
    let [a, b, c] =
        [rig.enqueue(New::of("a")).await, rig.enqueue(New::of("b")).await, rig.enqueue(New::of("c")).await];
    rig.commit().await;
    let names = |names: &[&str]| -> Arc<[Arc<str>]> { names.iter().map(|name| Arc::from(*name)).collect() };
    let ask = |types: Option<&[&str]>, except: &[&str]| Ask {
        types: types.map(names),
        except: names(except),
        ..everything()
    };
    assert_eq!(rig.offer(ask(None, &["b"])).await, [a, c]);
    assert_eq!(rig.offer(ask(None, &["a", "b", "c", "d"])).await, []);
    assert_eq!(rig.offer(ask(Some(&["a", "b"]), &["a"])).await, [b]);
    assert_eq!(rig.offer(ask(Some(&["a"]), &["a"])).await, []);
}

/// All tasks of these agents that have not ended, from one on.
async fn living(rig: &mut Rig, agents: &[u32], from: TaskId) -> Vec<TaskId> {
    let agents = agents.iter().map(|agent| AgentId(*agent)).collect();
    let (mut found, mut from) = (BTreeSet::new(), Some(from));
    while let Some(next) = from {
        let (tasks, rest) = rig.store().live(&agents, next).await.expect("it looks");
        assert!(rest.is_none_or(|rest| rest > next), "it gets on");
        found.extend(tasks.iter().map(|task| task.id));
        from = rest;
    }
    found.into_iter().collect()
}

async fn what_lives_is_found_piece_by_piece(mut rig: Rig) {
    let old = rig.enqueue_all((0..8).map(|_| New::of("a"))).await;
    let other = rig.enqueue(New { agent: 2, ..New::of("a") }).await;
    rig.complete(old[2]).await;
    rig.claim(old[3]).await;
    rig.commit().await;
    let lives = [old[0], old[1], old[3], old[4], old[5], old[6], old[7]];
    assert_eq!(living(&mut rig, &[AGENT.0], TaskId(0)).await, lives);
    assert_eq!(living(&mut rig, &[AGENT.0, 2], old[6]).await, [old[6], old[7], other]);
    assert_eq!(living(&mut rig, &[AGENT.0], TaskId(old[7].0 + 1)).await, []);
    assert_eq!(living(&mut rig, &[3], TaskId(0)).await, []);
    // What is on its way counts, and what the open batch did.
    rig.complete(old[0]).await;
    let many = submit_many(&mut rig).await;
    rig.complete(old[1]).await;
    rig.complete(many[0]).await;
    let new = rig.enqueue(New::of("a")).await;
    let lives = [old[3], old[4], old[5], old[6], old[7], new];
    assert_eq!(living(&mut rig, &[AGENT.0], TaskId(0)).await, lives);
    assert_eq!(living(&mut rig, &[2], TaskId(0)).await, [&[other], &many[1..]].concat());
    rig.store().durable().await.expect("it is written");
    rig.commit().await;
    rig = rig.reopen().await;
    assert_eq!(living(&mut rig, &[AGENT.0], TaskId(0)).await, lives);
}

async fn what_is_removed_is_gone_with_all_that_belongs_to_it(mut rig: Rig) {
    let keyed = |key: &'static str| New { key, ..New::of("a") };
    let [gone, stays, waits] = [
        rig.enqueue(keyed("gone")).await,
        rig.enqueue(keyed("stays")).await,
        rig.enqueue(New::of("a")).await,
    ];
    for id in [gone, stays] {
        rig.complete(id).await;
    }
    rig.commit().await;
    let removed = vec![gone];
    assert!(rig.get(gone).await.is_some());
    assert!(rig.write(Changes { removed, ..Changes::default() }).await.is_empty());
    rig.commit().await;
    for reopened in [false, true] {
        if reopened {
            rig = rig.reopen().await;
        }
        assert_eq!(rig.get(gone).await, None);
        assert_eq!(rig.get(stays).await.map(|task| task.state), Some(State::Done));
        assert_eq!(rig.get(waits).await.map(|task| task.state), Some(State::Queued));
        let keys = ["gone", "stays"].map(|key| (AGENT, Arc::from(key)));
        let known = rig.known(Want { keys: keys.to_vec(), ..Want::default() }).await;
        assert_eq!(known.keys.get(&keys[0]), None, "its key is free");
        assert_eq!(known.keys.get(&keys[1]).map(|holder| holder.task), Some(stays));
        assert_eq!(rig.history(stays).await.len(), 4);
    }
    let again = rig.enqueue(keyed("gone")).await;
    rig.commit().await;
    assert!(again > waits, "no number is given twice");
    let now = rig.now;
    let found = rig.store().recover(now).await.expect("it recovers");
    let mut counts = [0; 8];
    counts[usize::from(State::Done.code())] = 1;
    counts[usize::from(State::Queued.code())] = 2;
    assert_eq!(found.counts.get(&AGENT), Some(&counts));
}

async fn a_batch_reads_what_it_wrote(mut rig: Rig) {
    let id = rig.enqueue(New::of("a")).await;
    assert_eq!(rig.get(id).await.map(|task| task.state), Some(State::Queued));
    assert_eq!(rig.offer(everything()).await, [id]);
    rig.claim(id).await;
    assert_eq!(rig.offer(everything()).await, []);
    assert_eq!(rig.get(id).await.map(|task| task.state), Some(State::Running));
    rig.commit().await;
    assert_eq!(rig.get(id).await.map(|task| task.state), Some(State::Running));
    assert_eq!(rig.get(TaskId(id.0 + 1)).await, None);
}

async fn offers_come_in_the_usual_order(mut rig: Rig) {
    let types = ["a", "b", "c"];
    let mut expected = Vec::new();
    for n in 0..300_u64 {
        let draw = retry_core::draw(5, n, 0);
        let new = New { priority: (draw % 10) as u8, ..New::of(types[(draw / 16 % 3) as usize]) };
        let id = rig.enqueue(new.clone()).await;
        expected.push((9 - new.priority, rig.now.at, id, new.task_type));
        rig.wait(Duration::from_millis(draw / 64 % 2));
        if n % 50 == 0 {
            rig.commit().await;
        }
    }
    expected.sort_unstable();
    for (asked, limit) in
        [(None, 7), (None, 1_000), (Some(vec!["b"]), 1_000), (Some(vec!["c", "a", "x"]), 20)]
    {
        let types = asked.as_ref().map(|names| names.iter().map(|name| Arc::from(*name)).collect());
        let offered = rig.offer(Ask { types, limit, ..everything() }).await;
        let fits =
            expected.iter().filter(|(_, _, _, name)| asked.as_ref().is_none_or(|asked| asked.contains(name)));
        let fits: Vec<TaskId> = fits.map(|(_, _, id, _)| *id).take(limit).collect();
        assert_eq!(offered, fits, "asked for {asked:?}");
    }
    assert_eq!(rig.offer(Ask { agent: AgentId(9), ..everything() }).await, []);
}

async fn a_task_is_offered_when_its_time_has_come(mut rig: Rig) {
    let id = rig.enqueue(New::of("a")).await;
    let fence = rig.run(id).await;
    let record = rig.end(id, fence, failure(Class::Transient)).await;
    assert_eq!((record.to, record.reason), (State::Retry, Reason::Backoff));
    let due = rig.get(id).await.expect("it is stored").run_at;
    assert!(due > rig.now.at);
    assert_eq!(rig.offer(everything()).await, []);
    let now = rig.now;
    assert_eq!(rig.store().next_due(now), Some(due));
    rig.commit().await;
    rig.now.at = due.before(Duration::from_millis(1));
    assert_eq!(rig.offer(everything()).await, []);
    rig.now.at = due;
    assert_eq!(rig.offer(everything()).await, [id]);
    let now = rig.now;
    assert_eq!(rig.store().next_due(now), None, "what is due is not waited for");
}

async fn calendar_tasks_go_by_the_wall_clock(mut rig: Rig) {
    let hour = Duration::from_secs(3_600);
    let named = rig.now.at.after(hour);
    let id = rig.enqueue(New { run_at: Some(named), ..New::of("a") }).await;
    let plain = rig.enqueue(New::of("a")).await;
    rig.commit().await;
    assert_eq!(rig.offer(everything()).await, [plain]);
    let now = rig.now;
    assert_eq!(rig.store().next_due(now), Some(named));
    // The wall clock is set two hours forward, and back again.
    rig.now.skew = 7_200_000;
    assert_eq!(rig.offer(everything()).await, [plain, id]);
    rig.now.skew = 0;
    assert_eq!(rig.offer(everything()).await, [plain]);
    let now = rig.now;
    assert_eq!(rig.store().next_due(now), Some(named));
    // One hour back: it comes an hour later on the steady clock.
    rig.now.skew = -3_600_000;
    rig.wait(hour);
    assert_eq!(rig.offer(everything()).await, [plain]);
    let now = rig.now;
    assert_eq!(rig.store().next_due(now), Some(named.after(hour)));
    let since = rig.get(plain).await.expect("it is stored").run_at;
    let oldest = rig.store().oldest(now).await.expect("it is readable");
    assert_eq!(oldest.iter().map(|(_, at)| *at).collect::<Vec<_>>(), [since]);
    rig.wait(hour);
    assert_eq!(rig.offer(everything()).await, [plain, id]);
    rig.claim(plain).await;
    rig.commit().await;
    assert_eq!(rig.offer(everything()).await, [id]);
    let now = rig.now;
    let oldest = rig.store().oldest(now).await.expect("it is readable");
    assert_eq!(oldest.iter().map(|(_, at)| *at).collect::<Vec<_>>(), [now.from_wall(named)], "on our clock");
}

async fn gated_tasks_are_offered_only_when_asked_for(mut rig: Rig) {
    let low = rig.enqueue(New { priority: 1, ..New::of("a") }).await;
    let high = rig.enqueue(New { priority: 9, ..New::of("b") }).await;
    let free = rig.enqueue(New::of("a")).await;
    rig.apply(low, Event::Gate).await;
    rig.apply(high, Event::Gate).await;
    for _ in 0..2 {
        assert_eq!(rig.offer(everything()).await, [free]);
        assert_eq!(rig.offer(Ask { gated: true, ..everything() }).await, [high, free, low]);
        let only = Some(Arc::from([Arc::from("a")]));
        assert_eq!(rig.offer(Ask { gated: true, types: only, ..everything() }).await, [free, low]);
        let gated = rig.store().gated(AGENT).await.expect("it reads");
        let ids: Vec<TaskId> = gated.iter().map(|task| task.id).collect();
        assert_eq!(ids, [high, low]);
        rig.commit().await;
    }
    rig.apply(high, Event::Ungate).await;
    assert_eq!(rig.offer(everything()).await, [high, free]);
    rig.claim(low).await;
    assert!(rig.store().gated(AGENT).await.expect("it reads").is_empty());
}

async fn those_that_come_before_a_task_are_counted(mut rig: Rig) {
    let mut ids = Vec::new();
    for (priority, name) in [(1, "a"), (5, "a"), (5, "b"), (9, "b"), (5, "c"), (5, "a")] {
        ids.push(rig.enqueue(New { priority, ..New::of(name) }).await);
    }
    rig.enqueue(New { agent: 2, priority: 9, ..New::of("a") }).await;
    rig.enqueue(New { priority: 9, run_at: Some(rig.now.at.after(Duration::from_secs(60))), ..New::of("a") })
        .await;
    for _ in 0..2 {
        assert_eq!(rig.ahead(ids[5], None, 100).await, 4);
        assert_eq!(rig.ahead(ids[5], None, 3).await, 3, "no further than asked");
        assert_eq!(rig.ahead(ids[5], Some(&["a"]), 100).await, 1);
        assert_eq!(rig.ahead(ids[5], Some(&["b", "c"]), 100).await, 3);
        assert_eq!(rig.ahead(ids[5], Some(&["b", "c"]), 1).await, 1);
        assert_eq!(rig.ahead(ids[5], Some(&["x"]), 100).await, 0);
        assert_eq!(rig.ahead(ids[0], None, 100).await, 5);
        assert_eq!(rig.ahead(ids[3], None, 100).await, 0);
        rig.commit().await;
    }
    // What the breaker holds back comes before it as it did; what runs does not.
    rig.apply(ids[1], Event::Gate).await;
    assert_eq!(rig.ahead(ids[5], None, 100).await, 4);
    assert_eq!(rig.ahead(ids[5], Some(&["b"]), 100).await, 2);
    assert_eq!(rig.ahead(ids[5], Some(&["a"]), 100).await, 1);
    rig.claim(ids[3]).await;
    assert_eq!(rig.ahead(ids[5], None, 100).await, 3);
    rig.wait(Duration::from_secs(60));
    assert_eq!(rig.ahead(ids[5], None, 100).await, 4, "its time has come");
}

async fn many_changes_of_one_task_are_one(mut rig: Rig) {
    let id = rig.enqueue(New::of("a")).await;
    rig.complete(id).await;
    let before = rig.get(id).await;
    rig.commit().await;
    let mut rig = rig.reopen().await;
    assert_eq!(rig.get(id).await, before);
    assert_eq!(before.map(|task| (task.state, task.version)), Some((State::Done, 4)));
    assert_eq!(rig.recovered.counts[&AGENT], [0, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(rig.recovered.transitions, 4);
    assert_eq!(rig.history(id).await.len(), 4);
}

async fn a_key_is_held_until_it_is_freed(mut rig: Rig) {
    let want = || Want { keys: vec![(AGENT, "k".into()), (AgentId(2), "k".into())], ..Want::default() };
    let id = rig.enqueue(New { key: "k", frees_key: true, ..New::of("a") }).await;
    let held = [(AGENT, Arc::from("k"))];
    for _ in 0..2 {
        let known = rig.known(want()).await;
        assert_eq!(known.keys.keys().cloned().collect::<Vec<_>>(), held);
        assert_eq!(known.keys[&held[0]].task, id);
        assert_eq!(known.keys[&held[0]].digest, id.0.wrapping_mul(u64::MAX / 3));
        rig.commit().await;
    }
    rig.complete(id).await;
    assert!(rig.known(want()).await.keys.is_empty(), "freed in this batch");
    // Taken, freed and taken again in the batch that freed it.
    let short = rig.enqueue(New { key: "k", frees_key: true, ..New::of("a") }).await;
    rig.apply(short, Event::Cancel { note: "no".into() }).await;
    let other = rig.enqueue(New { key: "k", ..New::of("a") }).await;
    assert_eq!(rig.known(want()).await.keys[&held[0]].task, other);
    rig.commit().await;
    let mut rig = rig.reopen().await;
    assert_eq!(rig.known(want()).await.keys[&held[0]].task, other);
}

async fn an_answer_is_remembered(mut rig: Rig) {
    let row = RequestRow {
        id: "r-1".into(),
        digest: u64::MAX,
        answer: Bytes::from_static(b"\0yes"),
        at: rig.now.at,
    };
    let want = || Want { requests: vec!["r-1".into(), "r-2".into()], ..Want::default() };
    rig.write(Changes { requests: vec![row.clone()], ..Changes::default() }).await;
    assert_eq!(rig.known(want()).await.requests["r-1"], row);
    rig.commit().await;
    let mut rig = rig.reopen().await;
    let known = rig.known(want()).await;
    assert_eq!(known.requests.len(), 1);
    assert_eq!(known.requests["r-1"], row);
}

async fn the_row_that_settled_a_fence_is_found(mut rig: Rig) {
    let id = rig.enqueue(New::of("a")).await;
    let first = rig.run(id).await;
    let failed = rig.end(id, first, failure(Class::Unknown)).await;
    rig.wait(Duration::from_secs(60));
    let second = rig.run(id).await;
    let leases = [(id, second), (id, first), (TaskId(99), 1), (id, 7)];
    let found = rig.store().settled(&leases).await.expect("it reads");
    assert_eq!(found, [None, Some(failed.clone()), None, None]);
    rig.commit().await;
    let done = rig.end(id, second, Outcome::Complete).await;
    for _ in 0..2 {
        let found = rig.store().settled(&leases).await.expect("it reads");
        assert_eq!(found, [Some(done.clone()), Some(failed.clone()), None, None]);
        rig.commit().await;
    }
}

/// A life of many tasks, drawn with `seed`; batches of changing size. Returns the tasks.
async fn live(rig: &mut Rig, seed: u64, steps: u64) -> Vec<TaskId> {
    let mut ids: Vec<TaskId> = Vec::new();
    for step in 0..steps {
        let draw = retry_core::draw(seed, step, 1);
        let pick = retry_core::draw(seed, step, 2);
        if ids.is_empty() || draw.is_multiple_of(8) {
            let agent = 1 + (draw / 8 % 2) as u32;
            let deadline = (draw / 16).is_multiple_of(3).then(|| rig.now.at.after(Duration::from_secs(90)));
            let policy =
                Overrides { max_retries: (draw / 64).is_multiple_of(2).then_some(1), ..Overrides::NONE };
            let new = New { agent, deadline, policy, priority: (draw % 10) as u8, ..New::of("a") };
            ids.push(rig.enqueue(new).await);
        } else {
            let id = ids[(pick % ids.len() as u64) as usize];
            let task = rig.get(id).await.expect("it exists");
            step_of(rig, &task, draw / 8).await;
        }
        rig.wait(Duration::from_millis(draw / 512 % 300));
        if (draw / 4_096).is_multiple_of(5) {
            rig.commit().await;
        }
    }
    rig.commit().await;
    ids
}

async fn step_of(rig: &mut Rig, task: &Task, draw: u64) {
    let (id, fence, note) = (task.id, task.fence, Arc::<str>::from("ann: why"));
    match (task.state, draw % 8) {
        (State::Queued | State::Retry, 0..5) if task.can_be_claimed(rig.now) => {
            rig.claim(id).await;
        }
        (State::Queued | State::Retry, 5) if task.can_be_claimed(rig.now) => {
            rig.apply(id, Event::Gate).await;
        }
        (State::Queued | State::Retry | State::Running, 6) => {
            rig.apply(id, Event::Cancel { note }).await;
        }
        (State::Running, 0 | 1) => {
            rig.apply(id, Event::Ack(caller(), fence)).await;
        }
        (State::Running, 2 | 3) => {
            rig.end(id, fence, failure(Class::Transient)).await;
        }
        (State::Running, 4) => {
            rig.apply(id, Event::LeaseOver).await;
        }
        (State::Running, 5) => {
            rig.end(id, fence, Outcome::Complete).await;
        }
        (State::Running, _) => {
            rig.apply(id, Event::Beat(caller(), fence)).await;
        }
        (State::Blocked, _) if task.is_gated() => {
            rig.apply(id, Event::Ungate).await;
        }
        (State::Failed, 0..3) if !task.discarded => {
            rig.apply(id, Event::Redrive(Box::new(ledger_core::Redrive { note, ..Default::default() })))
                .await;
        }
        (State::Failed, 7) if !task.discarded => {
            rig.apply(id, Event::Discard { note }).await;
        }
        _ => {}
    }
}

async fn everything_reads_back_after_a_restart(mut rig: Rig) {
    let ids = live(&mut rig, 11, 600).await;
    let mut before = Vec::new();
    for id in &ids {
        before.push(rig.get(*id).await.expect("it exists"));
    }
    let asked = [
        everything(),
        Ask { agent: AgentId(2), limit: 1_000, gated: true, types: None, except: Arc::default() },
    ];
    let now = rig.now;
    let offers = rig.store().offer(&asked, now).await.expect("it offers");
    let due = rig.store().next_due(now);
    let mut rig = rig.reopen().await;
    assert_eq!(rig.store().offer(&asked, now).await.expect("it offers"), offers);
    // Too early is allowed: it costs a look.
    let far = ledger_core::Timestamp::FAR;
    assert!(rig.store().next_due(now).unwrap_or(far) >= due.unwrap_or(far));
    let mut timed: Vec<TaskId> = Vec::new();
    let mut counts = std::collections::HashMap::<AgentId, [u64; 8]>::new();
    for (id, before) in ids.iter().zip(before) {
        let after = rig.get(*id).await.expect("it exists");
        counts.entry(after.spec.agent).or_default()[usize::from(after.state.code())] += 1;
        let timer = matches!(after.state, State::Running | State::Blocked) || after.deadline.is_some();
        timed.extend((timer && !after.state.is_terminal()).then_some(*id));
        assert_eq!(after, before);
    }
    let kept = |counts: &std::collections::HashMap<AgentId, [u64; 8]>| {
        let mut counts: Vec<_> = counts.iter().map(|(agent, counts)| (*agent, *counts)).collect();
        counts.sort_unstable();
        counts
    };
    assert_eq!(kept(&rig.recovered.counts), kept(&counts));
    assert_eq!(rig.timed(&[]).await, timed);
}

async fn an_uncommitted_batch_leaves_nothing(mut rig: Rig) {
    let kept = rig.enqueue(New::of("a")).await;
    rig.commit().await;
    let lost = rig.enqueue(New { key: "k", ..New::of("a") }).await;
    rig.claim(kept).await;
    let mut rig = rig.reopen().await;
    assert_eq!(rig.get(lost).await, None);
    assert_eq!(rig.get(kept).await.map(|task| task.state), Some(State::Queued));
    assert_eq!(rig.recovered.transitions, 1);
    assert_eq!(rig.recovered.counts[&AGENT], [0, 1, 0, 0, 0, 0, 0, 0]);
    let next = rig.enqueue(New::of("a")).await;
    assert!(next >= lost, "a number that nobody was told may be given again, one that was told never is");
    // The same without a restart: after an error the caller recovers.
    rig.recover().await;
    assert_eq!(rig.get(lost).await, None);
    assert_eq!(rig.offer(everything()).await, [kept]);
}

async fn rows_beside_the_tasks_read_back(mut rig: Rig) {
    let policy = Overrides { queue_timeout: Some(Duration::from_secs(5)), ..Overrides::NONE };
    let given = AgentOverrides { policy, max_waiting: Some(10), ..AgentOverrides::default() };
    let (since, until) = (rig.now.at, Some(rig.now.at.after(Duration::from_secs(9))));
    let pause = Pause { actor: "ann".into(), reason: "it's late".into(), since, until };
    let agents = vec![AgentRow {
        id: AGENT,
        name: "claude".into(),
        given,
        created_at: rig.now.at,
        pause: Some(pause),
    }];
    let mut breaker =
        breaker_core::Breaker::new(breaker_core::Config { failure_threshold: 1, ..Default::default() })
            .expect("the defaults are valid");
    let permit = breaker.try_acquire(rig.now.at.since_epoch()).expect("a new breaker is closed");
    breaker.record(permit, breaker_core::Sample::Failure, rig.now.at.since_epoch(), 1 << 60);
    let mut snapshot = breaker.snapshot();
    snapshot.order = Some(breaker_core::Order { actor: "ann".into(), reason: "it's broken".into() });
    let mut of_a_type = snapshot.clone();
    of_a_type.probes =
        vec![breaker_core::Probe { slot: 7, lease_until: Some(std::time::Duration::from_nanos(9)) }];
    of_a_type.ramp_until = Some(std::time::Duration::from_nanos(11));
    (of_a_type.window, of_a_type.digest, of_a_type.cause) = (vec![1, 2, 3], u64::MAX, None);
    let breakers = vec![
        BreakerRow { agent: AGENT, task_type: "".into(), snapshot, last_probe: Some(TaskId(4)) },
        BreakerRow { agent: AGENT, task_type: "t".into(), snapshot: of_a_type, last_probe: None },
    ];
    let level = retry_core::Level { millitokens: 1_234, updated_at: START as u64 };
    let mut budgets = vec![BudgetRow { agent: None, level }, BudgetRow { agent: Some(AGENT), level }];
    let session = SessionRow {
        shown: None,
        worker: "host/claude/0".into(),
        incarnation: u64::MAX,
        session: SessionId(41),
        connected_at: rig.now.at,
        beat_at: rig.now.at,
        open: true,
    };
    for (open, number) in [(true, 41), (false, 42)] {
        let session = SessionRow { open, session: SessionId(number), ..session.clone() };
        // A new session takes the place of the one that is known of.
        rig.known(Want { workers: vec![Arc::clone(&session.worker)], ..Want::default() }).await;
        rig.write(Changes {
            agents: agents.clone(),
            breakers: breakers.clone(),
            budgets: budgets.clone(),
            sessions: vec![session],
            ..Changes::default()
        })
        .await;
    }
    let waiting = rig.enqueue(New::of("a")).await;
    rig.commit().await;
    let seed = rig.recovered.seed;
    let mut rig = rig.reopen().await;
    let found = std::mem::take(&mut rig.recovered);
    assert_eq!(found.seed, seed);
    assert_eq!(found.agents, agents);
    assert_eq!(found.breakers, breakers);
    budgets.sort_by_key(|row| row.agent);
    assert_eq!(found.budgets, budgets);
    assert_eq!(found.sessions, [SessionRow { open: false, session: SessionId(42), ..session }]);
    assert_eq!(found.last_session, 42);
    assert_eq!(rig.timed(&[]).await, []);
    assert_eq!(rig.timed(&[AGENT]).await, [waiting], "its agent has a queue_timeout");
}

async fn folding_the_history_gives_the_state(mut rig: Rig) {
    let ids = live(&mut rig, 23, 500).await;
    for id in ids {
        let task = rig.get(id).await.expect("it exists");
        let rows = rig.history(id).await;
        let folded = Folded::of(&rows).expect("rows follow each other");
        assert_eq!(folded.state, Some(task.state));
        assert_eq!(folded.reason, Some(task.reason));
        assert_eq!((folded.version, folded.fence), (task.version, task.fence));
        assert_eq!((folded.delivery, folded.attempt), (task.delivery, task.attempt));
        assert_eq!((folded.retry_count, folded.losses), (task.retry_count, task.losses));
        assert_eq!((folded.loss_weight, folded.lost_at), (task.loss_weight, task.lost_at));
        assert_eq!((folded.free_releases, folded.blocks), (task.free_releases, task.blocks));
        assert_eq!((folded.redrives, folded.discarded), (task.redrives, task.discarded));
    }
}

/// All that follows a cut, read so many rows at a time; none when some of it was removed.
async fn follows(rig: &Rig, cut: &Cut, limit: usize) -> Option<(Vec<Placed<Happening>>, Cut)> {
    let reader = rig.reader().expect("it is asked where there is one");
    let (mut rows, mut cut) = (Vec::new(), cut.clone());
    loop {
        let stretch = reader.after(&cut, limit).await.expect("it is read")?;
        assert_eq!(stretch.from, cut);
        rows.extend(stretch.rows);
        cut = stretch.to;
        if !stretch.more {
            return Some((rows, cut));
        }
    }
}

async fn the_history_is_read_on_from_any_place(mut rig: Rig) {
    if rig.reader().is_none() {
        return;
    }
    let labels = vec![("run".to_owned(), "7".to_owned())];
    let gone = rig.enqueue(New { labels: labels.clone(), ..New::of("a") }).await;
    let failed = rig.enqueue(New::of("b")).await;
    rig.complete(gone).await;
    rig.commit().await;
    let then = rig.reader().expect("a reader").end().await.expect("it is read");
    let fence = rig.run(failed).await;
    rig.end(failed, fence, failure(Class::Permanent)).await;
    rig.commit().await;

    let (rows, end) = follows(&rig, &Cut::default(), 100).await.expect("all is there");
    let told: Vec<_> = rows.iter().map(|row| row.what.record.clone()).collect();
    let of = |id| told.iter().filter(move |record: &&Record| record.task == id).cloned().collect::<Vec<_>>();
    for id in [gone, failed] {
        assert_eq!(of(id), rig.history(id).await);
    }
    assert_eq!(told.len(), of(gone).len() + of(failed).len());
    assert!(
        rows.iter().all(|row| (row.task, row.version) == (row.what.record.task, row.what.record.version))
    );
    let first = rows.iter().find(|row| row.task == gone).expect("it is there");
    assert_eq!((first.what.agent, &*first.what.task_type, &first.what.labels), (AGENT, "a", &labels));
    assert_eq!(rig.reader().expect("a reader").end().await.expect("it is read").cut, end);
    for limit in 1..4 {
        assert_eq!(follows(&rig, &Cut::default(), limit).await, Some((rows.clone(), end.clone())), "{limit}");
    }
    let later = |row: &&Placed<Happening>| row.seq > then.cut.of(row.slot);
    let later: Vec<_> = rows.iter().filter(later).cloned().collect();
    assert!((1..rows.len()).contains(&later.len()));
    assert_eq!(follows(&rig, &then.cut, 100).await, Some((later.clone(), end.clone())));
    assert_eq!(follows(&rig, &end, 100).await, Some((Vec::new(), end.clone())), "nothing follows the end");

    assert!(rig.get(gone).await.is_some());
    rig.write(Changes { removed: vec![gone], ..Changes::default() }).await;
    rig.commit().await;
    let rig = rig.reopen().await;
    let newest = rows.iter().rfind(|row| row.task == gone).expect("it is there");
    let mut before = Cut::default();
    before.pass(newest.slot, newest.seq - 1);
    assert_eq!(follows(&rig, &before, 100).await, None, "its last row is missing");
    let removed = rig.reader().expect("a reader").end().await.expect("it is read").removed;
    assert_eq!(removed.slots().filter(|(_, seq)| *seq > 0).collect::<Vec<_>>(), [(newest.slot, newest.seq)]);
    assert_eq!(follows(&rig, &then.cut, 100).await, Some((later, end)), "nothing that follows is");
}
