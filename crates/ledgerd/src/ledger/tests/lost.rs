//! What is lost on its way, and with whom.

use super::*;

#[tokio::test]
async fn a_block_is_known_again_when_its_time_is_over() {
    let fixture = Fixture::new("block-again", false).await;
    let handle = &fixture.handle;
    handle.enqueue(vec![task("a")], BatchMode::Atomic, None).await.expect("stored");
    let mut opened = handle.hello(hello()).await.expect("welcome");
    let ToWorker::Assignments(first) = next(&mut opened).await else { panic!("an assignment comes") };
    let until = handle.clock().now().wall().after(Duration::from_secs(60));
    let block = async |fence, digest| {
        let item = Settlement {
            task: first[0].task,
            fence,
            outcome: Outcome::Block { question: "why?".into(), until: Some(until) },
            result: None,
            checkpoint: None,
            follow_ups: Vec::new(),
            digest,
        };
        handle.settle("w".into(), vec![item]).await.expect("answered").remove(0).result
    };
    let recorded = block(1, 7).await.expect("recorded");
    assert_eq!(recorded.state, State::Blocked);
    // The receipt was lost, and its worker comes back after the time that it had named.
    handle.clock().set_wall_by(3_600_000);
    let again = block(1, 7).await.expect("it is the same");
    assert_eq!((again.state, again.version), (State::Blocked, recorded.version));
    let other = block(1, 8).await.expect_err("it is another");
    assert!(matches!(other, LedgerError::Refused(ledger_core::Refusal::OutcomeConflict)), "{other}");
    let refused = block(2, 9).await.expect_err("that one was never recorded");
    assert!(matches!(refused, LedgerError::Invalid(_)), "{refused}");
}

#[tokio::test]
async fn a_task_that_counts_for_nothing_stands_for_no_other_that_was_lost_with_it() {
    let fixture = Fixture::new("lost-together", false).await;
    let handle = &fixture.handle;
    handle.enqueue(vec![task("a"), task("a"), task("a")], BatchMode::Atomic, None).await.expect("stored");
    let opened = handle.hello(Hello { capacity: 3, ..hello() }).await.expect("welcome");
    let tasks = [1, 2, 3].map(TaskId);
    let acks = tasks.map(|id| (id, 1)).to_vec();
    handle.frame(opened.session, FromWorker::Acks(acks)).await.expect("taken");
    handle.flush().await.expect("it goes on");
    handle.cancel(tasks[0], "".into(), None).await.expect("it is asked to stop");
    drop(opened);
    handle.flush().await.expect("its stream is closed");
    handle.hello(Hello { incarnation: 2, ..hello() }).await.expect("the old process is gone");
    reaches(&fixture, tasks[0], State::Cancelled).await;
    let agents = handle.agents().await.expect("listed");
    let breaker = &agents.iter().find(|agent| &*agent.name == "a").expect("it is there").breakers[0].breaker;
    assert_eq!(breaker.run(), 1, "the others are one sample");
}
