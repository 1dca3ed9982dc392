//! When beats are answered.

use super::*;
use crate::ledger::command::HeldTask;

#[tokio::test]
async fn a_beat_of_a_worker_that_holds_nothing_waits_for_company() {
    let fixture = Fixture::new("beats", false).await;
    let handle = &fixture.handle;
    let mut opened = handle.hello(hello()).await.expect("welcome");
    let session = opened.session;
    let batches = || fixture.gate.rows.lock().expect("nobody panicked").len();
    let beat = async |held, number| {
        handle.frame(session, FromWorker::Beat(held, number)).await.expect("taken");
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    };
    // It stands still while anybody has something to do.
    tokio::time::pause();
    let before = batches();
    beat(Vec::new(), 1).await;
    assert_eq!(batches(), before, "one of its own would be a commit for nothing");
    let stored = handle.enqueue(vec![task("b")], BatchMode::Atomic, None).await;
    assert!(stored.is_ok() && batches() == before + 1, "what comes takes it along");
    assert!(matches!(opened.outbox.recv().await, Some(ToWorker::HeartbeatAck(_, 1))));

    beat(Vec::new(), 2).await;
    assert_eq!(batches(), before + 1);
    let began = tokio::time::Instant::now();
    assert!(matches!(opened.outbox.recv().await, Some(ToWorker::HeartbeatAck(_, 2))));
    assert_eq!(batches(), before + 2, "nobody came");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());

    handle.enqueue(vec![task("a")], BatchMode::Atomic, None).await.expect("stored");
    let Some(ToWorker::Assignments(assigned)) = opened.outbox.recv().await else { panic!("it comes") };
    let held =
        HeldTask { task: assigned[0].task, fence: assigned[0].fence, progress: None, checkpoint: None };
    let before = batches();
    beat(vec![held], 3).await;
    assert_eq!(batches(), before + 1, "a lease is moved at once");
    assert!(matches!(opened.outbox.recv().await, Some(ToWorker::HeartbeatAck(_, 3))));
    let before = batches();
    // What it does not name is lost to it, and gone from its room.
    beat(Vec::new(), 4).await;
    assert_eq!(batches(), before + 1, "it held something");
}
