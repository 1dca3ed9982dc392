//! Batches that fail: who is told, who is not, and what of them is decided anew.

use super::*;

#[tokio::test]
async fn a_refused_batch_is_decided_anew_command_by_command() {
    let fixture = Fixture::new("single", true).await;
    let mut calls = Vec::new();
    for agent in ["first", "second", "third"] {
        let handle = fixture.handle.clone();
        calls.push(tokio::spawn(
            async move { handle.enqueue(vec![task(agent)], BatchMode::Atomic, None).await },
        ));
        tokio::task::yield_now().await;
    }
    // The first may be alone in its batch; whatever follows is in the next.
    within(fixture.gate.reached.notified()).await;
    let refused = || StoreError::Statement("planted".into());
    fixture.fail_next([refused(), refused()]);
    for _ in 0..8 {
        fixture.pass();
    }
    let mut internal = 0;
    for call in calls {
        match within(call).await.expect("no panic") {
            Ok(items) => assert!(matches!(items[..], [Enqueued::Created(_)])),
            Err(LedgerError::Store(StoreError::Statement(_))) => internal += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(internal <= 2, "a neighbour of the guilty command suffered");
    let stats = within(fixture.handle.stats()).await.expect("it goes on");
    assert_eq!(stats.counts[usize::from(State::Queued.code())], 3 - internal);
}

/// What it closed is open again by then.
#[tokio::test]
async fn a_goodbye_in_a_batch_that_failed_is_heard_when_it_is_decided_anew() {
    let fixture = Fixture::new("goodbye", true).await;
    let handle = fixture.handle.clone();
    let opening = tokio::spawn(async move { handle.hello(hello()).await });
    within(fixture.gate.reached.notified()).await;
    fixture.pass();
    let mut opened = within(opening).await.expect("no panic").expect("welcome");
    let enqueue = |agent: &'static str| {
        let handle = fixture.handle.clone();
        tokio::spawn(async move { handle.enqueue(vec![task(agent)], BatchMode::Atomic, None).await })
    };
    let held = enqueue("a");
    within(fixture.gate.reached.notified()).await;
    fixture.pass();
    within(held).await.expect("no panic").expect("stored");
    assert!(matches!(next(&mut opened).await, ToWorker::Assignments(tasks) if tasks.len() == 1));
    // While this one is on its way, two more come to stand behind it, in one batch.
    let before = enqueue("b");
    within(fixture.gate.reached.notified()).await;
    fixture.handle.frame(opened.session, FromWorker::Goodbye).await.expect("taken");
    let neighbour = enqueue("c");
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    fixture.pass();
    within(before).await.expect("no panic").expect("stored");
    within(fixture.gate.reached.notified()).await;
    fixture.fail_next([StoreError::Statement("planted".into())]);
    for _ in 0..8 {
        fixture.pass();
    }
    within(neighbour).await.expect("no panic").expect("stored");
    assert!(within(opened.outbox.recv()).await.is_none(), "its stream is over");
    assert_eq!(state(&fixture, TaskId(1)).await, State::Queued, "released");
}

/// Leases would never end: after a recovery nobody's silence is held against him for as long as a lease.
#[tokio::test]
async fn a_task_that_is_refused_for_want_of_room_fails_no_batch() {
    let fixture = Fixture::new("short", false).await;
    fixture.gate.is_short.store(true, Relaxed);
    let refused = within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await;
    assert!(matches!(refused, Err(LedgerError::Short)), "{refused:?}");
    assert_eq!(fixture.gate.recoveries.load(Relaxed), 1, "the start alone has read all");
    fixture.gate.is_short.store(false, Relaxed);
    let stored = within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await;
    assert!(matches!(stored.expect("there is room")[..], [Enqueued::Created(_)]));
}

#[tokio::test]
async fn what_was_decided_on_a_batch_that_failed_is_decided_anew() {
    let fixture = Fixture::unheard("fell").await;
    fixture.fail_next([StoreError::Full]);
    let guilty = fixture.hand_over_many("guilty").await;
    let neighbour = fixture.hand_over_many("neighbour").await;
    fixture.hear(10);
    let refused = within(guilty).await.expect("no panic");
    assert!(matches!(refused, Err(LedgerError::Store(StoreError::Full))), "{refused:?}");
    let stored = within(neighbour).await.expect("no panic").expect("stored");
    assert!(matches!(stored[..], [Enqueued::Created(TaskId(1)), ..]), "{stored:?}");
    let stats = within(fixture.handle.stats()).await.expect("it goes on");
    assert_eq!(stats.counts[usize::from(State::Queued.code())], 300);
    assert_eq!(stats.transitions, 300);
}

#[tokio::test]
async fn an_unclear_commit_answers_those_behind_it_too() {
    let mut fixture = Fixture::unheard("unclear").await;
    fixture.fail_next([StoreError::Unknown("planted".into())]);
    let first = fixture.hand_over_many("first").await;
    let second = fixture.hand_over_many("second").await;
    fixture.hear(10);
    let unclear = within(first).await.expect("no panic");
    assert!(matches!(unclear, Err(LedgerError::Store(StoreError::Unknown(_)))), "{unclear:?}");
    let unwritten = within(second).await.expect("no panic");
    assert!(matches!(unwritten, Err(LedgerError::Store(StoreError::Unavailable(_)))), "{unwritten:?}");
    assert!(within(&mut fixture.ended).await.expect("no panic").is_err());
}

#[tokio::test]
async fn a_full_disk_refuses_the_call_and_the_ledger_goes_on() {
    let fixture = Fixture::new("full", false).await;
    fixture.fail_next([StoreError::Full]);
    let refused = within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await;
    assert!(matches!(refused, Err(LedgerError::Store(StoreError::Full))), "{refused:?}");
    let stored = within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await;
    assert!(stored.is_ok_and(|items| matches!(items[..], [Enqueued::Created(_)])));
}

#[tokio::test]
async fn a_commit_of_unclear_fate_ends_the_ledger_and_says_so() {
    let mut fixture = Fixture::new("unknown", false).await;
    fixture.fail_next([StoreError::Unknown("planted".into())]);
    let unclear = within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await;
    assert!(matches!(unclear, Err(LedgerError::Store(StoreError::Unknown(_)))), "{unclear:?}");
    let ended = within(&mut fixture.ended).await.expect("no panic");
    assert!(matches!(ended, Err(Fatal::Store(StoreError::Unknown(_)))));
    let later = within(fixture.handle.enqueue(vec![task("a")], BatchMode::Atomic, None)).await;
    assert!(later.is_err());
}
