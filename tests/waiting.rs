//! What makes a task wait, and what ends its waiting: pauses, questions and answers, follow-ups, hints, losses.

use crate::support::worker::{Stream, complete, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::Client;
use ledgerd_client::v1::{self, TaskState};

fn block(question: &str) -> v1::outcome::Outcome {
    v1::outcome::Outcome::Block(v1::Block { question: question.to_owned(), ..v1::Block::default() })
}

async fn unblock(client: &Client, id: &str, answer: &str) -> Result<v1::Task, tonic::Status> {
    let request = v1::UnblockTaskRequest {
        task_id: id.to_owned(),
        answer: answer.to_owned(),
        actor: "ann".to_owned(),
        request_id: String::new(),
    };
    let answered = client.tasks().unblock_task(request).await?;
    Ok(answered.into_inner().task.expect("it is set"))
}

async fn pause(
    client: &Client,
    agent: &str,
    reason: &str,
    millis: Option<i64>,
) -> Result<v1::Agent, tonic::Status> {
    let request = v1::PauseAgentRequest {
        agent: agent.to_owned(),
        reason: reason.to_owned(),
        actor: "ann".to_owned(),
        duration: millis.and_then(ms),
    };
    let paused = client.admin().pause_agent(request).await?;
    Ok(paused.into_inner().agent.expect("it is set"))
}

async fn resume(client: &Client, agent: &str) -> v1::Agent {
    let request = v1::ResumeAgentRequest { agent: agent.to_owned(), ..v1::ResumeAgentRequest::default() };
    let resumed = client.admin().resume_agent(request).await.expect("the agent is there");
    resumed.into_inner().agent.expect("it is set")
}

#[tokio::test]
async fn a_blocked_tasks_next_attempt_gets_the_answer_over_a_kill() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let first = worker.assignment().await;
    assert_eq!((first.question.as_str(), first.answer.as_str()), ("", ""));
    // It takes no more, so that the answered task stays where it can be seen.
    worker.send(v1::work_request::Frame::Capacity(v1::Capacity { capacity: 0 })).await;
    worker.settle(vec![outcome(lease(&first), block("delete it?"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Blocked);
    let blocked = get(&client, &id).await;
    assert_eq!((blocked.reason.as_str(), blocked.question.as_str()), ("WORKER", "delete it?"));
    drop(worker);

    let unblocked = unblock(&client, &id, "yes, all of it").await.expect("it is blocked");
    assert_eq!((unblocked.state(), unblocked.answer.as_str()), (TaskState::Queued, "yes, all of it"));
    let again = unblock(&client, &id, "no").await.expect_err("it is answered");
    assert_eq!(reason(&again), "WRONG_STATE");

    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    let mut worker = Stream::open(&daemon, v1::Hello { incarnation: 2, ..hello("w", "a", 1) }).await;
    let second = worker.assignment().await;
    assert_eq!((second.question.as_str(), second.answer.as_str()), ("delete it?", "yes, all of it"));
    worker.settle(vec![outcome(lease(&second), block("and the backups?"))]).await;
    worker.outcome_receipt().await;
    assert_eq!(get(&client, &id).await.answer, "", "no answer to the new question");
    let rows = history(&client, &id).await;
    let row = rows.iter().find(|row| row.event == "UNBLOCKED").expect("it is in the history");
    assert_eq!(row.facts.get("answer").map(String::as_str), Some("yes, all of it"));
    assert_eq!(row.facts.get("note").map(String::as_str), Some("ann"));
}

#[tokio::test]
async fn what_cannot_be_unblocked_or_updated_is_refused_by_name() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    assert_eq!(reason(&unblock(&client, &id, "x").await.expect_err("it is QUEUED")), "WRONG_STATE");
    assert_eq!(reason(&unblock(&client, "t9zz", "x").await.expect_err("unknown")), "TASK_NOT_FOUND");
    let long = unblock(&client, &id, &"x".repeat(16 * 1_024 + 1)).await.expect_err("too long");
    assert_eq!(reason(&long), "INVALID_FIELD");
    let nothing = v1::UpdateTaskRequest { task_id: id.clone(), ..v1::UpdateTaskRequest::default() };
    let refused = client.tasks().update_task(nothing.clone()).await.expect_err("nothing to do");
    assert_eq!(reason(&refused), "INVALID_FIELD");
    for priority in [-1, 10] {
        let wrong = v1::UpdateTaskRequest { priority: Some(priority), ..nothing.clone() };
        let refused = client.tasks().update_task(wrong).await.expect_err("no such priority");
        assert_eq!(reason(&refused), "INVALID_FIELD");
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.assignment().await;
    let late = v1::UpdateTaskRequest { priority: Some(9), ..nothing };
    assert_eq!(reason(&client.tasks().update_task(late).await.expect_err("it runs")), "WRONG_STATE");
}

#[tokio::test]
async fn an_update_changes_who_is_next() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let first = enqueue(&client, task("a")).await;
    let second = enqueue(&client, task("a")).await;
    let update = v1::UpdateTaskRequest {
        task_id: second.clone(),
        priority: Some(9),
        reason: "ann: urgent".to_owned(),
        request_id: "u1".to_owned(),
        ..v1::UpdateTaskRequest::default()
    };
    for _ in 0..2 {
        let task = client.tasks().update_task(update.clone()).await.expect("it waits").into_inner().task;
        assert_eq!(task.expect("it is set").priority, 9);
    }
    assert_eq!(events(&client, &second).await, ["ENQUEUED", "UPDATED"], "repeated, not done twice");
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    assert_eq!(worker.assignment().await.task_id, second);
    assert_eq!(get(&client, &first).await.state(), TaskState::Queued);
}

#[tokio::test]
async fn a_paused_agent_hands_out_nothing_until_it_is_resumed_over_a_kill() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let paused = pause(&client, "a", "the model is being replaced", None).await.expect("it is there");
    let shown = paused.pause.expect("it is paused");
    assert_eq!((shown.actor.as_str(), shown.reason.as_str()), ("ann", "the model is being replaced"));
    assert!(shown.time.is_some() && shown.until.is_none());

    let daemon = daemon.kill_and_restart();
    let client = daemon.client().await;
    // The same worker takes what is not paused, so it would have got the paused task first.
    let both = v1::Hello { agents: vec!["a".to_owned(), "b".to_owned()], ..hello("w", "a", 5) };
    let mut worker = Stream::open(&daemon, both).await;
    let other = enqueue(&client, task("b")).await;
    assert_eq!(worker.assignment().await.task_id, other);
    assert_eq!(get(&client, &id).await.state(), TaskState::Queued);
    assert!(resume(&client, "a").await.pause.is_none());
    assert_eq!(worker.assignment().await.task_id, id);
    assert!(resume(&client, "a").await.pause.is_none(), "once more is no error");
}

#[tokio::test]
async fn a_pause_with_an_end_ends_by_itself() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    pause(&client, "a", "one moment", Some(1_000)).await.expect("it is there");
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    assert_eq!(worker.assignment().await.task_id, id);
    let request = v1::GetAgentRequest { agent: "a".to_owned() };
    let agent = client.admin().get_agent(request).await.expect("there").into_inner().agent.expect("set");
    assert!(agent.pause.is_none());
}

#[tokio::test]
async fn a_pause_that_cannot_be_is_refused() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    assert_eq!(reason(&pause(&client, "a", "why", None).await.expect_err("unknown")), "AGENT_NOT_FOUND");
    enqueue(&client, task("a")).await;
    for (why, millis) in [("", None), ("why", Some(999)), ("why", Some(367 * 86_400_000))] {
        let refused = pause(&client, "a", why, millis).await.expect_err("a field is wrong");
        assert_eq!(reason(&refused), "INVALID_FIELD");
    }
}

fn completes(follow_ups: Vec<v1::NewTask>) -> v1::outcome::Outcome {
    v1::outcome::Outcome::Complete(v1::Complete { result: b"done".to_vec().into(), follow_ups })
}

#[tokio::test]
async fn follow_ups_come_with_the_completion_and_a_repetition_names_the_same() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let max_waiting = Some(1);
    configure(&client, "b", v1::AgentSettings { max_waiting, ..v1::AgentSettings::default() }).await;
    let keyed = v1::NewTask { idempotency_key: "k".to_owned(), ..task("b") };
    let known = enqueue(&client, keyed.clone()).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let assignment = worker.assignment().await;
    let other = v1::NewTask { payload: b"other content".to_vec().into(), ..keyed };
    let labels = [("x", "1"), ("y", "2"), ("z", "3")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let follow_ups = vec![v1::NewTask { labels, ..task("b") }, other, task("new-agent")];
    let settlement = outcome(lease(&assignment), completes(follow_ups));
    worker.settle(vec![settlement.clone()]).await;
    let receipt = worker.outcome_receipt().await;
    assert_eq!((receipt.state(), receipt.follow_up_ids.len()), (TaskState::Done, 3));
    assert_eq!(receipt.follow_up_ids[1], known, "a key that is taken yields its task");
    let follower = get(&client, &receipt.follow_up_ids[0]).await;
    assert_eq!((follower.agent.as_str(), follower.parent_task_id.as_str()), ("b", id.as_str()));
    assert_eq!(follower.state(), TaskState::Queued, "max_waiting does not bind it");
    let rows = history(&client, &follower.task_id).await;
    assert_eq!(rows[0].facts.get("parent"), Some(&id));

    let daemon = daemon.kill_and_restart();
    let mut worker = Stream::open(&daemon, v1::Hello { incarnation: 2, ..hello("w", "a", 1) }).await;
    worker.settle(vec![settlement]).await;
    assert_eq!(worker.outcome_receipt().await.follow_up_ids, receipt.follow_up_ids);
}

#[tokio::test]
async fn an_invalid_follow_up_refuses_the_outcome_and_a_refused_outcome_enqueues_nothing() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let assignment = worker.assignment().await;
    let wrong = v1::NewTask { priority: Some(10), ..task("b") };
    worker.settle(vec![outcome(lease(&assignment), completes(vec![task("b"), wrong]))]).await;
    let error = worker.outcome_receipt().await.error.expect("it is refused");
    assert!(error.field.ends_with("complete.follow_ups[1].priority"), "{}", error.field);
    worker.settle(vec![outcome(lease(&assignment), completes(vec![task("b"); 101]))]).await;
    let error = worker.outcome_receipt().await.error.expect("it is refused");
    assert!(error.field.ends_with("complete.follow_ups"), "{}", error.field);
    assert_eq!(get(&client, &id).await.state(), TaskState::Running, "it may be settled still");

    let stale = v1::Lease { fence: assignment.fence + 1, ..lease(&assignment) };
    worker.settle(vec![outcome(stale, completes(vec![task("b")]))]).await;
    assert_eq!(worker.outcome_receipt().await.error.expect("refused").reason, "UNKNOWN_FENCE");
    let filter = v1::ListTasksRequest { agent: "b".to_owned(), ..v1::ListTasksRequest::default() };
    assert!(client.tasks().list_tasks(filter).await.expect("listed").into_inner().tasks.is_empty());
    worker.settle(vec![outcome(lease(&assignment), complete("at last"))]).await;
    assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
}

#[tokio::test]
async fn a_servers_hint_moves_the_retry_and_is_cut_to_the_longest() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let policy = v1::TaskPolicy { hint_max: ms(20_000), ..v1::TaskPolicy::default() };
    let id = enqueue(&client, v1::NewTask { policy: Some(policy), ..task("a") }).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let assignment = worker.assignment().await;
    let error = v1::TaskError { class: v1::ErrorClass::Overloaded.into(), ..v1::TaskError::default() };
    let fail = v1::Fail { error: Some(error), retry_after: ms(3_600_000) };
    worker.settle(vec![outcome(lease(&assignment), v1::outcome::Outcome::Fail(fail))]).await;
    worker.outcome_receipt().await;
    let row = history(&client, &id).await.pop().expect("it failed");
    assert_eq!(row.facts.get("hint").map(String::as_str), Some("true"));
    assert_eq!(row.facts.get("hint_cut").map(String::as_str), Some("true"));
    let seconds = row.until.expect("set").seconds - row.time.expect("set").seconds;
    assert!((19..=23).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn four_tasks_lost_with_one_process_weigh_a_quarter_each() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(enqueue(&client, task("a")).await);
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 4)).await;
    for _ in 0..4 {
        let assignment = worker.assignment().await;
        worker.ack(lease(&assignment)).await;
        worker.receipt().await;
    }
    drop(worker);
    eventually("the old stream is gone", async || {
        let request = v1::ListWorkersRequest::default();
        let workers = client.admin().list_workers(request).await.expect("listed").into_inner().workers;
        workers.is_empty().then_some(())
    })
    .await;
    let _newer = Stream::open(&daemon, v1::Hello { incarnation: 2, ..hello("w", "a", 0) }).await;
    for id in ids {
        let task = get(&client, &id).await;
        assert_eq!((task.losses, task.loss_weight), (1, 0.25));
    }
}
