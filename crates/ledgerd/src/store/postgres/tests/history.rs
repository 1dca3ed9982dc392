//! History in days: made ahead, dropped when its tasks have gone, and whole for those that stay.

use super::{number, raw, rig_on, store_of, url_of};
use crate::store::moving::{export_postgres, import_postgres};
use crate::store::postgres::history::WAIT;
use crate::store::rig::{New, Rig};
use ledger_core::store::{Changes, StoreError};
use ledger_core::{Event, Outcome, Record, ReleaseCause, TaskId};
use sqlx::{Connection, Executor};
use std::time::Duration;

const DAY: Duration = Duration::from_secs(86_400);
const PARTITIONS: &str = "SELECT COUNT(*) FROM pg_inherits WHERE inhparent = 'task_history'::regclass";
const IN_DEFAULT: &str = "SELECT COUNT(*) FROM task_history_default AS r \
    CROSS JOIN LATERAL unpacked(r.slot, r.seq, r.task, r.at, r.entries)";
pub(super) const KEPT: &str = "SELECT COUNT(*) FROM task_history_kept";

/// All that there is to do now, for tasks that are stored for a day at least.
async fn tidy(rig: &Rig) -> Result<usize, StoreError> {
    let reader = rig.reader().expect("it can be read");
    let mut steps = 0;
    while reader.tidy(rig.now.at, Some(DAY)).await? {
        steps += 1;
        assert!(steps < 1_000, "it ends");
    }
    Ok(steps)
}

/// A ledger whose days are there, on a day of its own.
async fn rig_of_today() -> Option<Rig> {
    let rig = Rig::postgres().await?;
    tidy(&rig).await.expect("it can be tidied");
    Some(rig)
}

async fn complete(rig: &mut Rig, tasks: usize) -> Vec<TaskId> {
    let ids = rig.enqueue_all((0..tasks).map(|_| New::of("a"))).await;
    for id in &ids {
        rig.complete(*id).await;
    }
    rig.commit().await;
    ids
}

async fn remove(rig: &mut Rig, removed: &[TaskId]) {
    for id in removed {
        assert!(rig.get(*id).await.is_some());
    }
    let changes = Changes { removed: removed.to_vec(), ..Changes::default() };
    store_of(rig);
    rig.store().write(changes).await.expect("it is staged");
    rig.commit().await;
}

/// What a reader says of a task; none: it is unknown.
async fn told(rig: &Rig, id: TaskId) -> Option<Vec<Record>> {
    let rows = rig.reader().expect("it can be read").history(id).await.expect("it reads");
    rows.map(|rows| rows.into_iter().map(|row| row.record).collect())
}

#[tokio::test]
async fn partitions_are_made_ahead() {
    let Some(rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    assert_eq!(number(&url, PARTITIONS).await, 9, "DEFAULT, today by the server's clock, and a week");
    let today = "SELECT COUNT(*) FROM history_days \
        WHERE day BETWEEN extract(epoch FROM now())::bigint / 86400 AND extract(epoch FROM now())::bigint / 86400 + 7";
    assert_eq!(number(&url, today).await, 8);
    // By the ledger's clock, from then on; and nothing is made twice.
    for _ in 0..2 {
        tidy(&rig).await.expect("it can be tidied");
        assert_eq!(number(&url, PARTITIONS).await, 9, "the others are over, and nothing was in them");
    }
    let named =
        "SELECT COUNT(*) FROM pg_class WHERE relname IN ('task_history_20270115', 'task_history_20270122')";
    assert_eq!(number(&url, named).await, 2);
}

#[tokio::test]
async fn rows_of_a_day_without_a_partition_are_found_and_go_to_those_that_are_kept() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    let ids = complete(&mut rig, 3).await;
    assert_eq!(number(&url, IN_DEFAULT).await, 12);
    let before = [rig.history(ids[0]).await, rig.history(ids[1]).await];
    remove(&mut rig, &ids[2..]).await;
    assert_eq!(told(&rig, ids[2]).await, None);
    assert_eq!(number(&url, IN_DEFAULT).await, 12, "an entry that may go with its day costs nothing");
    tidy(&rig).await.expect("it can be tidied");
    assert_eq!((number(&url, IN_DEFAULT).await, number(&url, KEPT).await), (0, 8));
    assert_eq!([rig.history(ids[0]).await, rig.history(ids[1]).await], before);
    // This day has a partition by now.
    complete(&mut rig, 1).await;
    assert_eq!(number(&url, IN_DEFAULT).await, 0);
    remove(&mut rig, &ids[..1]).await;
    assert_eq!(number(&url, KEPT).await, 4);
}

#[tokio::test]
async fn a_day_goes_when_its_tasks_have_gone_and_who_stays_keeps_its_history() {
    let Some(mut rig) = rig_of_today().await else { return };
    let url = url_of(&rig);
    let ids = complete(&mut rig, 40).await;
    let lives = rig.enqueue(New::of("a")).await;
    let fence = rig.run(lives).await;
    let settled = rig.end(lives, fence, crate::store::rig::failure(ledger_core::Class::Transient)).await;
    rig.commit().await;
    rig.wait(2 * DAY);
    tidy(&rig).await.expect("it can be tidied");
    let day = "SELECT COUNT(*) FROM pg_class WHERE relname = 'task_history_20270115'";
    assert_eq!(number(&url, day).await, 1, "its tasks are stored");
    let other = complete(&mut rig, 1).await;
    remove(&mut rig, &ids).await;
    for id in &ids {
        assert_eq!(told(&rig, *id).await, None, "unseen, though its rows are there");
    }
    let before = rig.history(lives).await;
    assert_eq!(before.len(), 4);
    // Looked at again half a day later.
    rig.wait(DAY);
    tidy(&rig).await.expect("it can be tidied");
    assert_eq!(number(&url, day).await, 0);
    assert_eq!(number(&url, KEPT).await, 4);
    assert_eq!(rig.history(lives).await, before);
    assert_eq!(rig.history(other[0]).await.len(), 4);
    let found = rig.store().settled(&[(lives, fence), (ids[0], 1)]).await.expect("it reads");
    assert_eq!(found, [Some(settled), None]);
    rig.commit().await;
    // It goes on, and is whole to its end.
    rig.complete(lives).await;
    rig.commit().await;
    let after = rig.history(lives).await;
    assert_eq!((&after[..4], after.len()), (&before[..], 7));
    remove(&mut rig, &[lives]).await;
    assert_eq!((told(&rig, lives).await, number(&url, KEPT).await), (None, 0));
}

#[tokio::test]
async fn what_a_clock_that_was_set_back_says_is_found() {
    let Some(mut rig) = rig_of_today().await else { return };
    let made = rig.now.at;
    let id = rig.enqueue(New::of("a")).await;
    let fence = rig.claim(id).await;
    rig.commit().await;
    rig.now.at = rig.now.at.before(30 * DAY);
    rig.apply(id, Event::Ack(crate::store::rig::caller(), fence)).await;
    let record = rig.end(id, fence, ledger_core::Outcome::Complete).await;
    rig.commit().await;
    assert!(record.at >= made, "no row is older than its task");
    assert_eq!(rig.history(id).await.len(), 4);
    assert_eq!(rig.store().settled(&[(id, fence)]).await.expect("it reads"), [Some(record)]);
}

#[tokio::test]
async fn a_row_that_comes_late_to_a_day_stays() {
    let Some(mut rig) = rig_of_today().await else { return };
    let url = url_of(&rig);
    let begin = rig.now;
    let ids = complete(&mut rig, 10).await;
    remove(&mut rig, &ids).await;
    rig.wait(3 * DAY);
    let reader = rig.reader().expect("it can be read");
    assert!(
        reader.tidy(rig.now.at, Some(DAY)).await.expect("it counts"),
        "all have gone: they are moved next"
    );
    let now = std::mem::replace(&mut rig.now, begin);
    let late = complete(&mut rig, 1).await;
    rig.now = now;
    // Past the walk: no step has seen it.
    raw(&url)
        .await
        .execute("UPDATE history_days SET walked_slot = 1 WHERE leaving IS NOT NULL")
        .await
        .expect("it runs");
    assert!(rig.reader().expect("it can be read").tidy(rig.now.at, Some(DAY)).await.expect("it looks"));
    assert_eq!(rig.history(late[0]).await.len(), 4);
    let day = "SELECT COUNT(*) FROM pg_class WHERE relname = 'task_history_20270115'";
    assert_eq!(number(&url, day).await, 1);
    remove(&mut rig, &late).await;
    tidy(&rig).await.expect("it can be tidied");
    assert_eq!(number(&url, day).await, 0);
}

#[tokio::test]
async fn daemons_that_tidy_at_once_are_in_nobodys_way() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let mut rigs = [rig_on(&url).await, rig_on(&url).await, rig_on(&url).await];
    for day in 0..12 {
        let ids = complete(&mut first, 20).await;
        remove(&mut first, &ids[1..]).await;
        let tidied = rigs.each_ref().map(tidy);
        for steps in futures(tidied).await {
            steps.expect("it can be tidied");
        }
        first.wait(DAY);
        rigs.iter_mut().for_each(|rig| rig.now = first.now);
        assert_eq!(first.history(ids[0]).await.len(), 4, "day {day}");
    }
    // Whoever found a lock taken left it for later.
    for rig in &rigs {
        tidy(rig).await.expect("it can be tidied");
    }
    let days = number(&url, "SELECT COUNT(*) FROM history_days").await;
    assert_eq!(number(&url, PARTITIONS).await, days + 1);
    assert_eq!(number(&url, IN_DEFAULT).await, 0);
    assert_eq!(number(&url, "SELECT COUNT(*) FROM history_days WHERE leaving IS NOT NULL").await, 0);
    assert_eq!(
        number(&url, "SELECT COUNT(*) FROM history WHERE task_id IN (SELECT id FROM tasks)").await,
        48
    );
    // Yesterday, today, a week ahead.
    assert_eq!(days, 9, "all days that are over have gone");
}

/// All of them, at once.
async fn futures<F: Future, const N: usize>(all: [F; N]) -> Vec<F::Output> {
    let mut all = all.map(Box::pin);
    let mut done: [Option<F::Output>; N] = std::array::from_fn(|_| None);
    std::future::poll_fn(|cx| {
        for (future, done) in all.iter_mut().zip(&mut done).filter(|(_, done)| done.is_none()) {
            if let std::task::Poll::Ready(output) = future.as_mut().poll(cx) {
                *done = Some(output);
            }
        }
        if done.iter().all(Option::is_some) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done.into_iter().flatten().collect()
}

#[tokio::test]
async fn nobody_queues_up_behind_a_drop_that_has_to_wait() {
    let Some(mut rig) = rig_of_today().await else { return };
    let url = url_of(&rig);
    let ids = complete(&mut rig, 10).await;
    remove(&mut rig, &ids).await;
    rig.wait(3 * DAY);
    tidy_until_leaving(&rig).await;
    // A backup reads everything, for hours.
    let mut backup = raw(&url).await;
    let mut reads = backup.begin().await.expect("it begins");
    reads.execute("SELECT 1 FROM task_history LIMIT 1").await.expect("it reads");
    let begun = tokio::time::Instant::now();
    assert_eq!(tidy(&rig).await.expect("it is left for later"), 0);
    assert!(begun.elapsed() < WAIT + Duration::from_secs(2), "{:?}", begun.elapsed());
    let day = "SELECT COUNT(*) FROM pg_class WHERE relname = 'task_history_20270115'";
    assert_eq!(number(&url, day).await, 1);
    reads.rollback().await.expect("it ends");
    tidy(&rig).await.expect("it can be tidied");
    assert_eq!(number(&url, day).await, 0);
}

/// The days ahead are made, and the walk has said of the oldest day that it goes.
async fn tidy_until_leaving(rig: &Rig) {
    let reader = rig.reader().expect("it can be read");
    assert!(reader.tidy(rig.now.at, Some(DAY)).await.expect("it counts"));
}

#[tokio::test]
async fn no_row_of_history_can_be_changed() {
    let Some(mut rig) = rig_of_today().await else { return };
    let url = url_of(&rig);
    complete(&mut rig, 1).await;
    for text in ["UPDATE task_history SET entries = '[]'", "UPDATE task_history_20270115 SET at = at + 1"] {
        let error = raw(&url).await.execute(text).await.expect_err("append-only");
        assert!(error.to_string().contains("append-only"), "{error}");
    }
}

#[tokio::test]
async fn what_is_exported_has_no_history_of_removed_tasks() {
    let Some(mut rig) = rig_of_today().await else { return };
    let ids = complete(&mut rig, 3).await;
    rig.wait(2 * DAY);
    tidy(&rig).await.expect("it can be tidied");
    remove(&mut rig, &ids[..2]).await;
    let mut file = Vec::new();
    let told = export_postgres(&url_of(&rig), &mut file).await.expect("it is exported");
    let rows = told.iter().find(|total| total.table == "task_history").map(|total| total.rows);
    assert_eq!(rows, Some(4));
    let url = crate::store::rig::database().await.expect("the server is there");
    import_postgres(&url, &file[..]).await.expect("it is imported");
    assert_eq!(number(&url, "SELECT COUNT(*) FROM history").await, 4);
    assert_eq!(number(&url, KEPT).await, 4, "what it brings along is kept until its task goes");
}

#[tokio::test]
async fn an_entry_is_looked_up_in_its_day_alone() {
    let Some(rig) = rig_of_today().await else { return };
    let mut conn = raw(&url_of(&rig)).await;
    let prepare = "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; \
        PREPARE looked (smallint, bigint, bigint) AS SELECT * FROM packed_entry($1, $2, $3)";
    conn.execute(prepare).await.expect("it is one");
    let at = rig.now.at.after(3 * DAY).millis();
    let plan = format!("EXPLAIN EXECUTE looked (0, 5, {at})");
    let rows = conn.fetch_all(sqlx::AssertSqlSafe(plan)).await.expect("it explains");
    let plan: String = rows.iter().map(|row| sqlx::Row::get::<String, _>(row, 0) + "\n").collect();
    let index = "Index Scan Backward using task_history_20270118_slot_seq_idx";
    assert!(plan.contains(index), "{plan}");
    assert_eq!(plan.matches("Scan").count(), 2, "and what is in the row:\n{plan}");
}

/// Whatever moved, and whoever wrote it.
#[tokio::test]
async fn a_history_is_whole_across_days_slots_and_rows() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    // In DEFAULT, for this day has no partition yet.
    let id = first.enqueue(New::of("a")).await;
    first.commit().await;
    tidy(&first).await.expect("it can be tidied");
    assert_eq!(number(&url, KEPT).await, 1);
    let mut other = rig_on(&url).await;
    for (day, more) in (1..=4).zip([20, 0, 40, 3]) {
        first.wait(DAY);
        // Beside others in rows that begin before it, at one daemon and at another.
        for of_other in [false, true] {
            first.wait(Duration::from_secs(3_600));
            other.now = first.now;
            let rig = if of_other { &mut other } else { &mut first };
            rig.enqueue_all((0..more).map(|_| New::of("b"))).await;
            let fence = rig.run(id).await;
            let given_back = Outcome::Release { cause: ReleaseCause::Drain, delay: Duration::ZERO };
            rig.end(id, fence, given_back).await;
            rig.enqueue_all((0..more).map(|_| New::of("c"))).await;
            rig.commit().await;
        }
        let told = told(&first, id).await.expect("it is stored");
        let versions: Vec<u64> = told.iter().map(|record| record.version).collect();
        assert_eq!(versions, (1..=versions.len() as u64).collect::<Vec<_>>(), "day {day}");
        assert_eq!(versions.len(), 1 + 6 * day);
        tidy(&first).await.expect("it can be tidied");
    }
    assert_eq!(told(&other, id).await, told(&first, id).await);
    assert_eq!(number(&url, "SELECT count(*) FROM history").await, 25 + 4 * 63, "and none is told twice");
}
