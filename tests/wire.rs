//! Rude clients get the answer that the table says, and nothing is written for them.
//!
//! Numbers are rows of the table of bad inputs in `docs/reference/bad-inputs.md`.

mod alone;
mod attacks;
mod deaf;
mod framing;
mod handshakes;
mod raw;
mod room;
mod transport;

use crate::support::secure::Way;
use crate::support::worker::{Stream, complete, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1::{self, work_request::Frame};
use tonic::Code;

both_ways!(
    bad_fields_are_refused_by_name_and_nothing_is_stored,
    good_oddities_are_taken_literally,
    batches_ids_and_tokens_that_cannot_be_are_refused,
    streams_that_begin_wrong_are_ended_by_name,
    a_stream_without_hello_is_ended_after_five_seconds,
    streams_that_go_wrong_later_are_ended_or_refuse_the_item,
    a_thousand_beats_at_once_are_taken,
    the_older_of_two_streams_of_one_process_is_superseded,
    a_full_queue_of_an_agent_says_when_to_come_back,
);

fn seconds(seconds: i64) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds, nanos: 0 })
}

fn now() -> i64 {
    std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64
}

fn policy(policy: v1::TaskPolicy) -> v1::NewTask {
    v1::NewTask { policy: Some(policy), ..task("a") }
}

async fn bad_fields_are_refused_by_name_and_nothing_is_stored(way: Way) {
    let label = |key: &str, value: &str| [(key.to_owned(), value.to_owned())].into();
    let duration = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    let cases: Vec<(&str, v1::NewTask, &str)> = vec![
        (
            "54 idempotency key of 257 bytes",
            v1::NewTask { idempotency_key: "k".repeat(257), ..task("a") },
            "task.idempotency_key",
        ),
        ("55 empty agent", task(""), "task.agent"),
        ("56 agent ../x", task("../x"), "task.agent"),
        ("57 NUL in agent", task("a\0b"), "task.agent"),
        ("58 newline in task_type", v1::NewTask { task_type: "a\nb".into(), ..task("a") }, "task.task_type"),
        (
            "59 bidi control in label",
            v1::NewTask { labels: label("k", "a\u{202e}b"), ..task("a") },
            "task.labels",
        ),
        (
            "60 payload over 1 MiB",
            v1::NewTask { payload: vec![0; (1 << 20) + 1].into(), ..task("a") },
            "task.payload",
        ),
        (
            "61 max_retries -1",
            policy(v1::TaskPolicy { max_retries: Some(-1), ..Default::default() }),
            "task.policy.max_retries",
        ),
        (
            "62 max_retries 1,001",
            policy(v1::TaskPolicy { max_retries: Some(1_001), ..Default::default() }),
            "task.policy.max_retries",
        ),
        (
            "63 negative duration",
            policy(v1::TaskPolicy { base_delay: duration(-1, 0), ..Default::default() }),
            "task.policy.base_delay",
        ),
        (
            "64 nanos 2e9",
            policy(v1::TaskPolicy { base_delay: duration(0, 2_000_000_000), ..Default::default() }),
            "task.policy.base_delay",
        ),
        (
            "65 run_at in year 10000",
            v1::NewTask { run_at: seconds(253_402_300_800), ..task("a") },
            "task.run_at",
        ),
        (
            "66 run_at over 366 days ahead",
            v1::NewTask { run_at: seconds(now() + 367 * 86_400), ..task("a") },
            "task.run_at",
        ),
        ("67 priority 10", v1::NewTask { priority: Some(10), ..task("a") }, "task.priority"),
        ("67 priority -1", v1::NewTask { priority: Some(-1), ..task("a") }, "task.priority"),
        (
            "68 65 labels",
            v1::NewTask { labels: (0..65).map(|n| (format!("k{n}"), String::new())).collect(), ..task("a") },
            "task.labels",
        ),
        ("69 unknown enum", v1::NewTask { unique: 77, ..task("a") }, "task.unique"),
        (
            "70 NaN factor",
            policy(v1::TaskPolicy { exponential_base: Some(f64::NAN), ..Default::default() }),
            "task.policy.exponential_base",
        ),
        (
            "70 infinite factor",
            policy(v1::TaskPolicy { exponential_base: Some(f64::INFINITY), ..Default::default() }),
            "task.policy.exponential_base",
        ),
        (
            "71 lease 0 s",
            policy(v1::TaskPolicy { lease_duration: ms(0), ..Default::default() }),
            "task.policy.lease_duration",
        ),
        (
            "71 lease 25 h",
            policy(v1::TaskPolicy { lease_duration: ms(25 * 3_600_000), ..Default::default() }),
            "task.policy.lease_duration",
        ),
    ];
    let daemon = way.start();
    let client = daemon.client().await;
    for (row, task, field) in cases {
        use tonic_types::StatusExt;
        let request = v1::EnqueueTaskRequest { task: Some(task), request_id: String::new() };
        let refused = client.tasks().enqueue_task(request).await.expect_err(row);
        assert_eq!(
            (refused.code(), reason(&refused).as_str()),
            (Code::InvalidArgument, "INVALID_FIELD"),
            "{row}"
        );
        let violations =
            refused.get_details_bad_request().map(|found| found.field_violations).unwrap_or_default();
        assert!(violations.iter().any(|found| found.field.starts_with(field)), "{row}: {violations:?}");
        assert!(
            !refused.message().is_empty() && !refused.message().contains('\n'),
            "{row}: {:?}",
            refused.message()
        );
    }
    let stats = client.admin().get_stats(v1::GetStatsRequest {}).await.expect("answered").into_inner();
    assert_eq!((stats.transitions, stats.agents), (0, 0));
}

async fn good_oddities_are_taken_literally(way: Way) {
    let daemon = way.start();
    let client = daemon.client().await;
    let odd = "'; DROP TABLE tasks; --\"";
    let labels = [("q".to_owned(), odd.to_owned())];
    let id = enqueue(&client, v1::NewTask { labels: labels.clone().into(), ..task("a") }).await;
    assert_eq!(get(&client, &id).await.labels, labels.into());
    let request = v1::EnqueueTaskRequest { task: Some(task("a")), request_id: String::new() };
    client.tasks().enqueue_task(request).await.expect("53: a request id is optional");
    let long = v1::NewTask { idempotency_key: "k".repeat(256), ..task("a") };
    enqueue(&client, long).await;
}

async fn batches_ids_and_tokens_that_cannot_be_are_refused(way: Way) {
    let daemon = way.start();
    let client = daemon.client().await;
    for (row, count) in [("72 batch of 0", 0), ("72 batch of 1,001", 1_001)] {
        let request = v1::EnqueueTasksRequest { tasks: vec![task("a"); count], ..Default::default() };
        assert_eq!(
            client.tasks().enqueue_tasks(request).await.expect_err(row).code(),
            Code::InvalidArgument,
            "{row}"
        );
    }
    let keyed = |payload: &str| v1::NewTask {
        idempotency_key: "k".into(),
        payload: payload.as_bytes().to_vec().into(),
        ..task("a")
    };
    let request = v1::EnqueueTasksRequest { tasks: vec![keyed("1"), keyed("1")], ..Default::default() };
    let same =
        client.tasks().enqueue_tasks(request).await.expect("73: equal keys, equal content").into_inner();
    assert_eq!(same.results[0].task_id, same.results[1].task_id);
    assert_eq!((same.results[0].created, same.results[1].created), (true, false));
    for id in ["", "x", "t0", "T1", "t1 ", "-1", &"t".repeat(300)] {
        let request = v1::GetTaskRequest { task_id: id.into(), include_data: false };
        let refused = client.tasks().get_task(request).await.expect_err("74 malformed task id");
        assert_eq!(refused.code(), Code::InvalidArgument, "74 {id:?}");
    }
    for token in ["x", "AAAA", "1"] {
        let request = v1::ListTasksRequest { page_token: token.into(), ..Default::default() };
        let refused = client.tasks().list_tasks(request).await.expect_err("75 forged page token");
        assert_eq!(refused.code(), Code::InvalidArgument, "75 {token:?}");
    }
    let other = v1::EnqueueTaskRequest { task: Some(keyed("2")), request_id: String::new() };
    let refused = client.tasks().enqueue_task(other).await.expect_err("76 same key, other content");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::AlreadyExists, "KEY_REUSED_WITH_OTHER_CONTENT")
    );
    let unknown = v1::GetTaskRequest { task_id: "tzzz".into(), include_data: false };
    let refused = client.tasks().get_task(unknown).await.expect_err("77 unknown task");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::NotFound, "TASK_NOT_FOUND"));
    let cancel = v1::CancelTaskRequest { task_id: "tzzz".into(), ..Default::default() };
    assert_eq!(client.tasks().cancel_task(cancel).await.expect_err("77").code(), Code::NotFound);
    let redrive = v1::RedriveDeadLettersRequest {
        task_ids: vec![same.results[0].task_id.clone()],
        ..Default::default()
    };
    let results = client.admin().redrive_dead_letters(redrive).await.expect("answered").into_inner().results;
    assert_eq!(
        results[0].error.as_ref().map(|error| error.code),
        Some(9),
        "79 redrive of a task that is not dead"
    );
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.complete_next("").await;
    let cancel = v1::CancelTaskRequest { task_id: same.results[0].task_id.clone(), ..Default::default() };
    let refused = client.tasks().cancel_task(cancel).await.expect_err("78 cancel of a DONE task");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "TASK_TERMINAL"));
}

async fn streams_that_begin_wrong_are_ended_by_name(way: Way) {
    let daemon = way.start();
    let cases = [
        ("84 first frame is not Hello", Some(Frame::Goodbye(v1::Goodbye {})), Code::FailedPrecondition),
        (
            "86 unknown protocol version",
            Some(Frame::Hello(v1::Hello { protocol_version: 99, ..hello("w", "a", 1) })),
            Code::FailedPrecondition,
        ),
        ("88 capacity over 10,000", Some(Frame::Hello(hello("w", "a", 10_001))), Code::InvalidArgument),
        ("84 nothing at all", None, Code::FailedPrecondition),
        (
            "no agents",
            Some(Frame::Hello(v1::Hello { agents: vec![], ..hello("w", "a", 1) })),
            Code::InvalidArgument,
        ),
        ("no worker id", Some(Frame::Hello(hello("", "a", 1))), Code::InvalidArgument),
    ];
    for (row, first, code) in cases {
        let refused = Stream::try_open(&daemon, first).await.expect_err(row);
        assert_eq!(refused.code(), code, "{row}: {refused}");
        assert!(!reason(&refused).is_empty(), "{row}: {refused:?}");
    }
    let client = daemon.client().await;
    let workers = client.admin().list_workers(v1::ListWorkersRequest::default()).await.expect("listed");
    assert!(workers.into_inner().workers.is_empty());
}

async fn a_stream_without_hello_is_ended_after_five_seconds(way: Way) {
    let daemon = way.start();
    let client = daemon.client().await;
    let frames = tokio_stream::pending::<v1::WorkRequest>();
    let opened = within("87 no Hello in 5 s", client.workers().work(frames)).await;
    let refused = match opened {
        Err(status) => status,
        Ok(stream) => within("87", stream.into_inner().message()).await.expect_err("87 no Hello in 5 s"),
    };
    assert_eq!(refused.code(), Code::DeadlineExceeded);
}

async fn streams_that_go_wrong_later_are_ended_or_refuse_the_item(way: Way) {
    let daemon = way.start();
    let client = daemon.client().await;
    let worker = Stream::open(&daemon, hello("w1", "a", 1)).await;
    worker.send(Frame::Hello(hello("w1", "a", 1))).await;
    assert_eq!(worker.end().await.code(), Code::FailedPrecondition, "85 second Hello");
    let worker = Stream::open(&daemon, hello("w2", "a", 1)).await;
    worker.send(Frame::Capacity(v1::Capacity { capacity: u32::MAX })).await;
    assert_eq!(worker.end().await.code(), Code::InvalidArgument, "88 capacity over 10,000");
    let worker = Stream::open(&daemon, hello("w4", "a", 1)).await;
    worker.send_empty().await;
    assert_eq!(worker.end().await.code(), Code::InvalidArgument, "89 empty oneof");

    let id = enqueue(&client, task("b")).await;
    let mut worker = Stream::open(&daemon, hello("w3", "b", 1)).await;
    let held = worker.assignment().await;
    let huge = vec![0_u8; (1 << 20) + 1];
    let complete_huge =
        v1::outcome::Outcome::Complete(v1::Complete { result: huge.into(), ..Default::default() });
    worker.settle(vec![outcome(lease(&held), complete_huge)]).await;
    let error = worker.outcome_receipt().await.error.expect("a result over 1 MiB is refused");
    assert_eq!(error.code, 3);
    let never = v1::Lease { task_id: id.clone(), fence: 7 };
    worker.settle(vec![outcome(never, complete(""))]).await;
    let error = worker.outcome_receipt().await.error.expect("91 fence never issued");
    assert_eq!(error.code, 3, "91");
    worker.settle(vec![outcome(lease(&held), complete("fine"))]).await;
    assert_eq!(worker.outcome_receipt().await.error, None, "the stream lives");
}

async fn a_thousand_beats_at_once_are_taken(way: Way) {
    let daemon = way.start();
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    for sequence in 1..=1_000 {
        worker.send(Frame::Heartbeat(v1::Heartbeat { held: vec![], sequence })).await;
    }
    loop {
        // 94: coalesced or not, never refused; the last one is answered.
        if worker.heartbeat_ack().await.sequence == 1_000 {
            break;
        }
    }
}

async fn the_older_of_two_streams_of_one_process_is_superseded(way: Way) {
    let daemon = way.start();
    let older = Stream::open(&daemon, hello("w", "a", 1)).await;
    let _newer = Stream::open(&daemon, hello("w", "a", 1)).await;
    assert_eq!(older.end().await.code(), Code::Aborted, "96");
}

async fn a_full_queue_of_an_agent_says_when_to_come_back(way: Way) {
    use tonic_types::StatusExt;
    let daemon = way.start();
    let client = daemon.client().await;
    configure(&client, "a", v1::AgentSettings { max_waiting: Some(2), ..Default::default() }).await;
    enqueue(&client, task("a")).await;
    enqueue(&client, task("a")).await;
    let request = v1::EnqueueTaskRequest { task: Some(task("a")), request_id: String::new() };
    let refused = client.tasks().enqueue_task(request).await.expect_err("the queue is full");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.get_details_retry_info().is_some_and(|info| info.retry_delay.is_some()));
}
