//! A whole worker against a scripted daemon: what it says, what its programs are given, how it leaves.

use std::time::Duration;

use clap::Parser;
use ledgerd_client::v1::outcome::Outcome as Kind;
use ledgerd_client::v1::work_request::Frame as In;
use ledgerd_client::v1::work_response::Frame as Out;
use ledgerd_client::v1::*;
use prost_types::Duration as Wire;

use super::Exec;
use crate::Format;
use crate::child::tests::guard_command;
use crate::fake::{Fake, Session};

const LONG: Duration = Duration::from_secs(60);

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    exec: Exec,
}

fn seconds(seconds: i64) -> Option<Wire> {
    Some(Wire { seconds, nanos: 0 })
}

fn assignment(task_id: &str, payload: &str) -> Assignment {
    Assignment {
        task_id: task_id.into(),
        fence: 3,
        agent: "claude".into(),
        task_type: "review".into(),
        payload: payload.to_owned().into(),
        delivery: 2,
        attempt: 1,
        ack_timeout: seconds(10),
        time_left: seconds(600),
        lease_duration: seconds(60),
        traceparent: "00-a-b-01".into(),
        ..Assignment::default()
    }
}

async fn welcome(fake: &mut Fake) -> (Session, Hello) {
    let mut session = fake.sessions.recv().await.expect("a worker connects");
    let In::Hello(hello) = session.hear().await else { panic!("the first frame is Hello") };
    session.say(Out::Welcome(Welcome {
        session_id: 1,
        heartbeat_interval: seconds(20),
        idle_interval: seconds(15),
        ack_delay_max: seconds(1),
        max_message_bytes: 4 << 20,
        max_result_bytes: 1 << 20,
        max_checkpoint_bytes: 256 << 10,
        ..Welcome::default()
    }));
    (session, hello)
}

/// Receipts every outcome until there are so many, by task.
async fn outcomes(session: &mut Session, count: usize) -> Vec<(String, Kind)> {
    let mut found = Vec::new();
    while found.len() < count {
        let In::Outcomes(frame) = session.hear().await else { continue };
        for outcome in frame.items {
            let lease = outcome.lease.expect("a lease");
            let kind = ReceiptKind::Outcome.into();
            let receipt = Receipt { lease: Some(lease.clone()), kind, ..Receipt::default() };
            session.say(Out::Receipts(Receipts { items: vec![receipt] }));
            found.push((lease.task_id, outcome.outcome.expect("an outcome")));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// Runs the worker as long as the daemon's side of the story goes on.
async fn tell<T>(args: &[&str], story: impl AsyncFnOnce(Session, Hello) -> T) -> T {
    let mut fake = Fake::start(|_, _| Ok(Vec::new())).await;
    let global = fake.global(Format::Table);
    let line = Line::try_parse_from(std::iter::once(&"exec").chain(args)).expect("arguments");
    let worker = line.exec.run_guarded(&global, guard_command());
    let daemon = async {
        let (session, hello) = welcome(&mut fake).await;
        story(session, hello).await
    };
    let told = tokio::time::timeout(LONG, async {
        tokio::select! {
            ended = worker => panic!("the worker ended: {ended:?}"),
            told = daemon => told,
        }
    });
    told.await.expect("in time")
}

#[tokio::test]
async fn tasks_are_runs_of_the_program() {
    let script = "echo \"$1 $LEDGERD_TASK_ID $LEDGERD_FENCE $TRACEPARENT ${LEDGERD_DEADLINE:+limited}\"; \
                  echo why >&2; exit $2";
    let worker =
        ["--agent", "claude", "--agent", "codex", "--type", "review", "--capacity", "3", "--worker-id", "w"];
    let program = ["--", "/bin/sh", "-c", script, "sh", "{{payload.word}}", "{{payload.code}}"];
    let found = tell(&[&worker[..], &program].concat(), async |mut session, hello| {
        assert_eq!((hello.worker_id.as_str(), hello.capacity), ("w", 3));
        assert_eq!(hello.agents, ["claude", "codex"]);
        assert_eq!(hello.task_types, ["review"]);
        let items = vec![
            assignment("t1", r#"{"word":"hello","code":0}"#),
            assignment("t2", r#"{"word":"hello","code":78}"#),
            assignment("t3", r#"{"code":0}"#),
        ];
        session.say(Out::Assignments(Assignments { items }));
        outcomes(&mut session, 3).await
    })
    .await;
    let (Kind::Complete(done), Kind::Fail(failed), Kind::Fail(bad)) = (&found[0].1, &found[1].1, &found[2].1)
    else {
        panic!("{found:?}")
    };
    assert_eq!(done.result, "hello t1 3 00-a-b-01 limited\n");
    let error = failed.error.as_ref().expect("an error");
    assert_eq!((error.class(), error.code.as_str()), (ErrorClass::Permanent, "EXIT_78"));
    assert_eq!((error.message.as_str(), error.detail.as_str()), ("why", "why\n"));
    let error = bad.error.as_ref().expect("an error");
    assert_eq!((error.class(), error.code.as_str()), (ErrorClass::Permanent, "BAD_PAYLOAD"));
}

#[tokio::test]
async fn the_answer_to_a_question_is_in_the_environment() {
    let program = ["--agent", "claude", "--", "/bin/sh", "-c", "echo \"$LEDGERD_QUESTION $LEDGERD_ANSWER\""];
    let found = tell(&program, async |mut session, _| {
        let item = Assignment { question: "why?".into(), answer: "because".into(), ..assignment("t1", "{}") };
        session.say(Out::Assignments(Assignments { items: vec![item] }));
        outcomes(&mut session, 1).await
    })
    .await;
    let Kind::Complete(done) = &found[0].1 else { panic!("{found:?}") };
    assert_eq!(done.result, "why? because\n");
}

#[tokio::test]
async fn a_stop_ends_the_program_and_is_answered() {
    let found = tell(&["--agent", "claude", "--", "/bin/sleep", "1000"], async |mut session, hello| {
        assert!(hello.task_types.is_empty(), "all types");
        session.say(Out::Assignments(Assignments { items: vec![assignment("t1", "{}")] }));
        // A task that goes on is acknowledged once its ack was held back for long enough.
        while !matches!(session.hear().await, In::Acks(_)) {}
        session.say(Out::Stop(Stop {
            items: vec![LeaseVerdict {
                lease: Some(Lease { task_id: "t1".into(), fence: 3 }),
                state: LeaseState::Stop.into(),
                stop_cause: StopCause::User.into(),
                stop_grace: seconds(30),
            }],
        }));
        outcomes(&mut session, 1).await
    })
    .await;
    assert!(matches!(found[0].1, Kind::Cancelled(_)), "{found:?}");
}
