//! What fails is tried again, within its bounds, and ends among the dead letters.

use crate::support::worker::{Stream, complete, fail, fail_as, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1::{self, ErrorClass, TaskState};

#[tokio::test]
async fn a_failure_leads_to_a_retry_and_the_count_rises() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    for count in 1..=3 {
        let (assignment, receipt) = worker.fail_next("not yet").await;
        assert_eq!((assignment.attempt, receipt.state()), (count, TaskState::Retry));
        assert!(receipt.run_at.is_some());
        assert_eq!(get(&client, &id).await.retry_count, count);
    }
    let fourth = worker.assignment().await;
    assert_eq!(fourth.last_error.as_ref().map(|error| error.message.as_str()), Some("not yet"));
    worker.settle(vec![outcome(lease(&fourth), complete("at last"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
}

#[tokio::test]
async fn exhausted_retries_fail_the_task_by_itself_into_the_dead_letters() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let policy = v1::TaskPolicy { max_retries: Some(1), ..v1::TaskPolicy::default() };
    let id = enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.fail_next("first").await;
    let (_, receipt) = worker.fail_next("second").await;
    assert_eq!((receipt.state(), receipt.reason.as_str()), (TaskState::Failed, "RETRIES_EXHAUSTED"));
    let request = v1::GetDeadLetterRequest { task_id: id.clone() };
    let letter = client.admin().get_dead_letter(request).await.expect("there").into_inner().dead_letter;
    let letter = letter.expect("set");
    assert_eq!((letter.task_id, letter.reason.as_str(), letter.attempt), (id, "RETRIES_EXHAUSTED", 2));
    assert_eq!(letter.error.map(|error| error.message).as_deref(), Some("second"));
}

#[tokio::test]
async fn zero_retries_make_the_first_failure_final() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { max_retries: Some(0), ..v1::TaskPolicy::default() };
    enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let (_, receipt) = worker.fail_next("once").await;
    assert_eq!(receipt.state(), TaskState::Failed);
}

#[tokio::test]
async fn a_permanent_failure_is_not_retried() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let assignment = worker.assignment().await;
    worker.settle(vec![outcome(lease(&assignment), fail_as(ErrorClass::Permanent, "no such file"))]).await;
    let receipt = worker.outcome_receipt().await;
    assert_eq!((receipt.state(), receipt.reason.as_str()), (TaskState::Failed, "PERMANENT"));
}

#[tokio::test]
async fn a_redriven_dead_letter_keeps_its_id_and_history() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { max_retries: Some(0), ..v1::TaskPolicy::default() };
    let id = enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.fail_next("once").await;
    let redrive = v1::RedriveDeadLettersRequest { task_ids: vec![id.clone()], ..Default::default() };
    let results = client.admin().redrive_dead_letters(redrive.clone()).await.expect("answered").into_inner();
    assert_eq!(results.results[0].error, None);
    let again = worker.assignment().await;
    assert_eq!((again.task_id.as_str(), again.fence, again.attempt), (id.as_str(), 2, 2));
    worker.settle(vec![outcome(lease(&again), complete("well"))]).await;
    worker.outcome_receipt().await;
    let done = get(&client, &id).await;
    assert_eq!((done.redrives, done.retry_count), (1, 0));
    let listed =
        client.admin().list_dead_letters(v1::ListDeadLettersRequest::default()).await.expect("listed");
    assert!(listed.into_inner().dead_letters.is_empty());
    let refused = client.admin().redrive_dead_letters(redrive).await.expect("answered").into_inner();
    assert_eq!(refused.results[0].error.as_ref().map(|error| error.code), Some(9));
}

#[tokio::test]
async fn a_discarded_dead_letter_is_hidden_and_not_redriven() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { max_retries: Some(0), ..v1::TaskPolicy::default() };
    let id = enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.fail_next("once").await;
    let discard = v1::DiscardDeadLettersRequest {
        task_ids: vec![id.clone()],
        reason: "known".into(),
        ..Default::default()
    };
    let results = client.admin().discard_dead_letters(discard).await.expect("answered").into_inner();
    assert_eq!(results.results[0].error, None);
    let all = |include_discarded| v1::ListDeadLettersRequest { include_discarded, ..Default::default() };
    let hidden = client.admin().list_dead_letters(all(false)).await.expect("listed").into_inner();
    assert!(hidden.dead_letters.is_empty());
    let shown = client.admin().list_dead_letters(all(true)).await.expect("listed").into_inner();
    let letter = &shown.dead_letters[0];
    assert_eq!((letter.discard_reason.as_str(), letter.discard_time.is_some()), ("known", true));
    assert_eq!(letter.error.as_ref().map(|error| error.message.as_str()), Some("once"));
    let redrive = v1::RedriveDeadLettersRequest { task_ids: vec![id], ..Default::default() };
    let refused = client.admin().redrive_dead_letters(redrive).await.expect("answered").into_inner();
    assert_eq!(refused.results[0].error.as_ref().map(|error| error.reason.as_str()), Some("DISCARDED"));
}

#[tokio::test]
async fn an_empty_budget_defers_a_retry_until_a_token_comes() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", budgeted(1.0, 2.0, 0.0)).await;
    for _ in 0..2 {
        enqueue(&client, task("a")).await;
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    // Together: by half a second later there is a token.
    let held = [worker.assignment().await, worker.assignment().await];
    worker.settle(held.iter().map(|held| outcome(lease(held), fail("down"))).collect()).await;
    let receipts = [worker.outcome_receipt().await, worker.outcome_receipt().await];
    assert_eq!(receipts.map(|receipt| receipt.reason), ["BACKOFF", "BUDGET"]);
    let mut again = [worker.assignment().await.task_id, worker.assignment().await.task_id];
    again.sort();
    let events = events(&client, &again[1]).await;
    assert!(events.contains(&"BUDGET_GRANTED".to_owned()), "{events:?}");
}

#[tokio::test]
async fn a_token_is_for_the_retry_that_waits_and_not_for_who_fails_as_it_comes() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", budgeted(1.0, 0.0, 1.0)).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 4)).await;
    for _ in 0..2 {
        enqueue(&client, task("a")).await;
    }
    let (_, first) = worker.fail_next("takes the only token").await;
    let (waits, second) = worker.fail_next("waits").await;
    assert_eq!((first.reason.as_str(), second.reason.as_str()), ("BACKOFF", "BUDGET"));
    let succeeds = worker.assignment().await;
    assert_eq!(succeeds.attempt, 2, "its retry was paid");
    enqueue(&client, task("a")).await;
    let fails = worker.assignment().await;
    // In one batch, the success first: its token is there when the other fails.
    let told = vec![outcome(lease(&succeeds), complete("ok")), outcome(lease(&fails), fail("later"))];
    worker.settle(told).await;
    let receipts = [worker.outcome_receipt().await, worker.outcome_receipt().await];
    assert_eq!(receipts.map(|receipt| receipt.reason), ["", "BUDGET"]);
    let next = worker.assignment().await;
    assert_eq!((next.task_id, next.attempt), (waits.task_id, 2));
    assert_eq!(get(&client, &fails.task_id).await.reason, "BUDGET", "it goes on waiting");
}

#[tokio::test]
async fn twenty_declined_deliveries_make_a_task_undeliverable() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    for _ in 0..20 {
        let assignment = worker.assignment().await;
        let decline = v1::outcome::Outcome::Release(v1::Release::default());
        worker.settle(vec![outcome(lease(&assignment), decline)]).await;
    }
    assert_eq!(in_state(&client, &id, TaskState::Failed).await.reason, "UNDELIVERABLE");
}
