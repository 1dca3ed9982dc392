//! How fast batches are written, by the thread that decides them; a measurement, not a promise.

use super::{Options, open};
use crate::store::rig::{AGENT, Folder, START, caller, everything};
use bytes::Bytes;
use ledger_core::store::Reader;
use ledger_core::store::{Ask, Changed, Changes, Store, TaskData, Want};
use ledger_core::{
    Context, Event, Holder, Now, Outcome, Overrides, SessionId, Settings, Spec, State, Task, TaskId,
    Timestamp,
};
use std::sync::Arc;
use std::time::Duration;

/// The shape of a steady load: tasks come and are claimed in one batch, are acknowledged in the next and completed in a
/// third.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: run it in release with --nocapture"]
async fn rate() {
    for size in [1, 10, 100, 1_000, 3_000] {
        for fused in [false, true] {
            measure(size, if size < 100 { 300 } else { 60_000 / size }, fused).await;
        }
    }
}

async fn measure(size: usize, rounds: usize, fused: bool) {
    let folder = Folder::new();
    let (mut store, reader) = open(&folder.0, Options::default()).await.expect("a new ledger opens");
    let mut now = Now::steady(Timestamp::from_millis(START));
    store.recover(now).await.expect("it recovers");
    let mut spent = [Duration::ZERO; 4];
    let settings = Settings::default();
    let begun = tokio::time::Instant::now();
    for _ in 0..rounds {
        now.at = now.at.after(Duration::from_millis(3));
        let mut at = tokio::time::Instant::now();
        let mut lap = |spent: &mut Duration| {
            *spent += at.elapsed();
            at = tokio::time::Instant::now();
        };
        let first = store.ids(size).await.expect("numbers are local");
        let mut changes = Changes::default();
        for n in 0..size as u64 {
            let (agent, policy) = (AGENT, Overrides::NONE);
            let spec =
                Arc::new(Spec { agent, task_type: "a".into(), policy, created_at: now.at, frees_key: false });
            let (task, record) = Task::enqueue(TaskId(first + n), spec, 5, None, None, now);
            let data = TaskData { payload: Bytes::from(vec![b'x'; 256]), digest: n, ..TaskData::default() };
            changes.data.push((task.id, Arc::new(data)));
            changes.tasks.push(Changed { task: Arc::new(task), expected: 0, was: None });
            changes.history.push(record);
        }
        store.write(changes).await.expect("it writes");
        if !fused {
            store.commit().await.expect("it commits");
        }
        lap(&mut spent[0]);
        let ask = Ask { limit: size, ..everything() };
        let offered = store.offer(&[ask], now).await.expect("it offers").remove(0);
        assert_eq!(offered.len(), size);
        let ids: Vec<TaskId> = offered.iter().map(|task| task.id).collect();
        let holder = Holder { worker: "w".into(), incarnation: 1, session: SessionId(3) };
        let permit = Some(breaker_core::Permit { epoch: 0, probe: false, slot: 0 });
        let claim = Event::Claim { holder, permit };
        step(&mut store, offered, &claim, &settings, now).await;
        store.commit().await.expect("it commits");
        lap(&mut spent[1]);
        let events = [Event::Ack(caller(), 1), Event::Settle(caller(), 1, Outcome::Complete)];
        for (index, event) in events.iter().enumerate() {
            let want = Want { tasks: ids.clone(), ..Want::default() };
            let mut known = store.begin(&want, now).await.expect("it reads").tasks;
            let tasks = ids.iter().filter_map(|id| known.remove(id)).collect();
            step(&mut store, tasks, event, &settings, now).await;
            if !fused || index == 1 {
                store.commit().await.expect("it commits");
            }
            lap(&mut spent[2 + index]);
        }
    }
    let whole = begun.elapsed();
    let tasks = (size * rounds) as f64;
    let micros = spent.map(|spent| (spent.as_secs_f64() * 1e6 / tasks * 100.0).round() / 100.0);
    println!(
        "batch {size:>5} {} {:>8.0} lifecycles/s, us per task: enqueue, claim, ack, complete {micros:?}",
        if fused { "2 commits" } else { "4 commits" },
        tasks / whole.as_secs_f64(),
    );
    reader.close().await.expect("it closes");
    store.close().await.expect("it closes");
}

async fn step(
    store: &mut super::SqliteStore,
    tasks: Vec<Arc<Task>>,
    event: &Event,
    settings: &Settings,
    now: Now,
) {
    let cx = Context {
        now,
        settings,
        draw: 1 << 63,
        affords: &|_| true,
        digest: 5,
        lost_with: ledger_core::LostWith::ALONE,
    };
    let mut changes = Changes::default();
    for mut task in tasks {
        let (expected, was) = (task.version, Some(task.state));
        let applied = Arc::make_mut(&mut task).apply(event, &cx).expect("the event is allowed");
        changes.history.extend(applied.record);
        if task.state == State::Done {
            changes.results.push((task.id, Bytes::from_static(b"a result of 32 bytes, more or so")));
        }
        changes.tasks.push(Changed { task, expected, was });
    }
    store.write(changes).await.expect("it writes");
}
