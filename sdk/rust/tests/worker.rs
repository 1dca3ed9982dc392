//! A worker against a daemon that the test plays frame by frame.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context as Poller, Poll};
use std::time::Duration;

use ledgerd_client::v1::outcome::Outcome;
use ledgerd_client::v1::work_request::Frame as Said;
use ledgerd_client::v1::work_response::Frame as Heard;
use ledgerd_client::{
    CancellationToken, Client, Context, Error, NewTask, TaskError, Worker, WorkerBuilder, v1,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

const PATIENCE: Duration = Duration::from_secs(10);

/// The daemon's end of one stream.
struct Session {
    said: Streaming<v1::WorkRequest>,
    heard: mpsc::Sender<Result<v1::WorkResponse, Status>>,
}

/// Hands every stream, and every outcome settled outside of one, to the test.
#[derive(Clone)]
struct Daemon {
    sessions: mpsc::Sender<Session>,
    settled: mpsc::Sender<v1::Outcome>,
}

type Reply<T> = Pin<Box<dyn Future<Output = Result<T, Status>> + Send>>;

impl Service<Request<Streaming<v1::WorkRequest>>> for Daemon {
    type Response = Response<ReceiverStream<Result<v1::WorkResponse, Status>>>;
    type Error = Status;
    type Future = Reply<Self::Response>;

    fn poll_ready(&mut self, _: &mut Poller<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<v1::WorkRequest>>) -> Self::Future {
        let (heard, frames) = mpsc::channel(16);
        let (session, sessions) = (Session { said: request.into_inner(), heard }, self.sessions.clone());
        Box::pin(async move {
            sessions.send(session).await.map_err(|_| Status::unavailable("the test is over"))?;
            Ok(Response::new(ReceiverStream::new(frames)))
        })
    }
}

impl Service<Request<v1::SettleTasksRequest>> for Daemon {
    type Response = Response<v1::SettleTasksResponse>;
    type Error = Status;
    type Future = Reply<Self::Response>;

    fn poll_ready(&mut self, _: &mut Poller<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<v1::SettleTasksRequest>) -> Self::Future {
        let settled = self.settled.clone();
        Box::pin(async move {
            let mut receipts = Vec::new();
            for outcome in request.into_inner().outcomes {
                receipts.push(receipt(outcome.lease.clone(), v1::ReceiptKind::Outcome));
                settled.send(outcome).await.map_err(|_| Status::unavailable("the test is over"))?;
            }
            Ok(Response::new(v1::SettleTasksResponse { receipts }))
        })
    }
}

impl Service<http::Request<Body>> for Daemon {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Poller<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let daemon = self.clone();
        Box::pin(async move {
            Ok(if request.uri().path().ends_with("/Work") {
                let codec = ProstCodec::<v1::WorkResponse, v1::WorkRequest>::default();
                tonic::server::Grpc::new(codec).streaming(daemon, request).await
            } else {
                let codec = ProstCodec::<v1::SettleTasksResponse, v1::SettleTasksRequest>::default();
                tonic::server::Grpc::new(codec).unary(daemon, request).await
            })
        })
    }
}

/// A running worker and the daemon it talks to.
struct Stage {
    sessions: mpsc::Receiver<Session>,
    settled: mpsc::Receiver<v1::Outcome>,
    stop: CancellationToken,
    worker: JoinHandle<Result<(), Error>>,
}

impl Stage {
    async fn set(build: impl FnOnce(WorkerBuilder) -> WorkerBuilder) -> Self {
        let (opened, sessions) = mpsc::channel(16);
        let (put, settled) = mpsc::channel(16);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let daemon = Daemon { sessions: opened, settled: put };
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().serve_with_incoming(daemon, incoming));
        let builder = Worker::builder(Client::lazy(address.to_string()).unwrap());
        let worker = build(builder.worker_id("w").incarnation(7).agents(["a"]).capacity(4)).build().unwrap();
        let stop = CancellationToken::new();
        let worker = tokio::spawn(worker.run_until(stop.clone()));
        Self { sessions, settled, stop, worker }
    }

    /// The next stream, with its Hello answered.
    async fn session(&mut self) -> (Session, v1::Hello) {
        let mut session = within(self.sessions.recv()).await.expect("a stream");
        let Said::Hello(hello) = session.said().await.expect("a first frame") else { panic!("no Hello") };
        let second = Some(span(1_000));
        session
            .hears(Heard::Welcome(v1::Welcome {
                heartbeat_interval: Some(span(300)),
                idle_interval: second,
                ack_delay_max: Some(span(200)),
                ..Default::default()
            }))
            .await;
        (session, hello)
    }

    /// Asks the worker to leave, answers what it says to that, and returns the outcomes said.
    async fn leave(self, session: &mut Session) -> Vec<v1::Outcome> {
        self.stop.cancel();
        let mut outcomes = Vec::new();
        while let Some(frame) = session.said().await {
            match frame {
                Said::Outcomes(said) => {
                    session.receipt(&said.items).await;
                    outcomes.extend(said.items);
                }
                Said::Goodbye(_) => break,
                _ => {}
            }
        }
        // Dropping the stream's other end lets the worker go without waiting for it.
        let (gone, _) = mpsc::channel(1);
        session.heard = gone;
        within(self.worker).await.unwrap().unwrap();
        outcomes
    }
}

impl Session {
    async fn said(&mut self) -> Option<Said> {
        within(self.said.message()).await.unwrap_or(None).and_then(|request| request.frame)
    }

    async fn hears(&self, frame: Heard) {
        within(self.heard.send(Ok(v1::WorkResponse { frame: Some(frame) }))).await.unwrap();
    }

    async fn assign(&self, id: &str, task_type: &str, payload: &'static str) {
        self.assigns(assignment(id, task_type, payload)).await;
    }

    async fn assigns(&self, item: v1::Assignment) {
        self.hears(Heard::Assignments(v1::Assignments { items: vec![item] })).await;
    }

    /// The next frame of the wanted kind; beats in between are answered with silence.
    async fn until<T>(&mut self, wanted: impl Fn(Said) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.said().await.expect("the stream goes on")) {
                return found;
            }
        }
    }

    async fn outcome(&mut self) -> v1::Outcome {
        let outcomes = |said| if let Said::Outcomes(outcomes) = said { Some(outcomes.items) } else { None };
        let mut items = self.until(outcomes).await;
        assert_eq!(items.len(), 1);
        items.remove(0)
    }

    async fn receipt(&self, outcomes: &[v1::Outcome]) {
        let receipts =
            outcomes.iter().map(|outcome| receipt(outcome.lease.clone(), v1::ReceiptKind::Outcome));
        self.hears(Heard::Receipts(v1::Receipts { items: receipts.collect() })).await;
    }

    async fn rules(&self, id: &str, state: v1::LeaseState, grace_ms: i32) {
        let item = v1::LeaseVerdict {
            lease: Some(lease(id)),
            state: state as i32,
            stop_cause: v1::StopCause::User as i32,
            stop_grace: Some(span(grace_ms)),
        };
        self.hears(Heard::Stop(v1::Stop { items: vec![item] })).await;
    }
}

fn assignment(id: &str, task_type: &str, payload: &'static str) -> v1::Assignment {
    v1::Assignment {
        task_id: id.into(),
        fence: 1,
        task_type: task_type.into(),
        payload: payload.as_bytes().into(),
        attempt: 1,
        ack_timeout: Some(span(10_000)),
        lease_duration: Some(span(60_000)),
        ..Default::default()
    }
}

fn receipt(lease: Option<v1::Lease>, kind: v1::ReceiptKind) -> v1::Receipt {
    v1::Receipt { lease, kind: kind as i32, ..Default::default() }
}

fn lease(id: &str) -> v1::Lease {
    v1::Lease { task_id: id.into(), fence: 1 }
}

fn span(ms: i32) -> prost_types::Duration {
    prost_types::Duration { seconds: i64::from(ms / 1_000), nanos: ms % 1_000 * 1_000_000 }
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

fn failure(outcome: v1::Outcome) -> v1::TaskError {
    match outcome.outcome {
        Some(Outcome::Fail(fail)) => fail.error.expect("an error"),
        other => panic!("no failure: {other:?}"),
    }
}

async fn double(n: u32, _: Context) -> Result<u32, TaskError> {
    assert!(n != 13, "unlucky");
    Ok(n * 2)
}

/// Runs until it is asked to end.
async fn wait(_: serde_json::Value, context: Context) -> Result<(), TaskError> {
    context.checkpoint("so far")?;
    context.cancelled().cancelled().await;
    Err(TaskError::cancelled())
}

/// Runs whatever it is asked.
async fn stubborn(_: serde_json::Value, context: Context) -> Result<(), TaskError> {
    context.checkpoint("so far")?;
    std::future::pending().await
}

/// Tells what it was answered.
async fn answered(
    _: serde_json::Value,
    context: Context,
) -> Result<(Option<String>, Option<String>), TaskError> {
    Ok((context.question().map(Into::into), context.answer().map(Into::into)))
}

/// Has two tasks follow it, and fails when it is told so.
async fn followed(fails: bool, context: Context) -> Result<(), TaskError> {
    context.follow_up(NewTask::new("b", "first", &1).key("k").priority(9))?;
    context.follow_up(NewTask::from_bytes("c", "second", "x").delay(Duration::from_secs(60)))?;
    if fails { Err(TaskError::fatal("told so")) } else { Ok(()) }
}

#[tokio::test]
async fn an_answer_reaches_the_handler_with_its_question() {
    let mut stage = Stage::set(|builder| builder.task("answered", answered)).await;
    let (mut session, _) = stage.session().await;
    let asked = |id, answer: &str| v1::Assignment {
        question: "which branch?".into(),
        answer: answer.into(),
        ..assignment(id, "answered", "0")
    };
    for (item, told) in [
        (asked("t1", "main"), r#"["which branch?","main"]"#),
        (asked("t2", ""), r#"["which branch?",null]"#),
        (assignment("t3", "answered", "0"), "[null,null]"),
    ] {
        session.assigns(item).await;
        let outcome = session.outcome().await;
        session.receipt(std::slice::from_ref(&outcome)).await;
        let Some(Outcome::Complete(complete)) = outcome.outcome else { panic!("{outcome:?}") };
        assert_eq!(complete.result, told);
    }
    stage.leave(&mut session).await;
}

#[tokio::test]
async fn follow_ups_go_with_the_completion_over_any_number_of_streams() {
    let mut stage = Stage::set(|builder| builder.task("followed", followed)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "followed", "false").await;
    let first = session.outcome().await;
    let Some(Outcome::Complete(complete)) = &first.outcome else { panic!("{first:?}") };
    let tasks: Vec<_> = complete.follow_ups.iter().map(|task| (&*task.agent, &*task.task_type)).collect();
    assert_eq!(tasks, [("b", "first"), ("c", "second")]);
    assert_eq!((&*complete.follow_ups[0].idempotency_key, complete.follow_ups[0].priority), ("k", Some(9)));
    assert!(complete.follow_ups[0].payload == "1" && complete.follow_ups[1].run_at.is_some());
    drop(session);

    let (mut session, _) = stage.session().await;
    assert_eq!(session.outcome().await, first, "byte for byte: the ledger knows it by its digest");
    session.receipt(&[first]).await;
    stage.leave(&mut session).await;
}

#[tokio::test]
async fn a_failure_has_no_follow_ups_and_a_completion_at_fault_is_one() {
    let mut stage = Stage::set(|builder| builder.task("followed", followed)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "followed", "true").await;
    let outcome = session.outcome().await;
    session.receipt(std::slice::from_ref(&outcome)).await;
    assert_eq!(failure(outcome).message, "told so");

    session.assign("t2", "followed", "false").await;
    let outcome = session.outcome().await;
    let message = "complete.follow_ups[0].policy.max_retries: set it to 0 to 1,000";
    let code = tonic::Code::InvalidArgument as i32;
    let error = Some(v1::ItemError { code, message: message.into(), ..Default::default() });
    let refused = v1::Receipt { error, ..receipt(outcome.lease, v1::ReceiptKind::Outcome) };
    session.hears(Heard::Receipts(v1::Receipts { items: vec![refused] })).await;
    let outcome = session.outcome().await;
    session.receipt(std::slice::from_ref(&outcome)).await;
    let error = failure(outcome);
    assert_eq!((error.class(), error.code.as_str()), (v1::ErrorClass::Permanent, "BAD_COMPLETION"));
    assert!(error.message.ends_with(message), "{}", error.message);
    stage.leave(&mut session).await;
}

#[tokio::test]
async fn a_task_is_run_and_its_outcome_stands_for_the_ack() {
    let mut stage = Stage::set(|builder| builder.task("double", double)).await;
    let (mut session, hello) = stage.session().await;
    assert_eq!((hello.worker_id.as_str(), hello.incarnation, hello.capacity), ("w", 7, 4));
    assert_eq!((hello.task_types, hello.protocol_version), (vec!["double".to_owned()], 1));
    session.assign("t1", "double", "21").await;
    let first = session.said().await;
    let Some(Said::Outcomes(outcomes)) = first else { panic!("{first:?}") };
    let Some(Outcome::Complete(complete)) = &outcomes.items[0].outcome else { panic!("{outcomes:?}") };
    assert_eq!(complete.result, "42");
    session.receipt(&outcomes.items).await;
    assert!(stage.leave(&mut session).await.is_empty());
}

#[tokio::test]
async fn a_panic_and_a_payload_that_does_not_parse_are_failures() {
    let mut stage = Stage::set(|builder| builder.task("double", double)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "double", "13").await;
    let outcome = session.outcome().await;
    session.receipt(std::slice::from_ref(&outcome)).await;
    let error = failure(outcome);
    assert_eq!(
        (error.class(), error.message.as_str()),
        (v1::ErrorClass::Unknown, "the handler panicked: unlucky")
    );
    session.assign("t2", "double", "x").await;
    let outcome = session.outcome().await;
    session.receipt(std::slice::from_ref(&outcome)).await;
    assert_eq!(failure(outcome).class(), v1::ErrorClass::Permanent);
    stage.leave(&mut session).await;
}

#[tokio::test]
async fn a_long_task_is_acked_and_named_in_beats_with_its_checkpoint() {
    let mut stage = Stage::set(|builder| builder.task("wait", wait)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "wait", "0").await;
    let acks = session.until(|said| if let Said::Acks(acks) = said { Some(acks.items) } else { None }).await;
    assert_eq!(acks, [lease("t1")]);
    let with_checkpoint = |said| match said {
        Said::Heartbeat(beat) => beat.held.into_iter().find(|held| held.checkpoint.is_some()),
        _ => None,
    };
    let held = session.until(with_checkpoint).await;
    assert_eq!((held.lease, held.checkpoint.as_deref()), (Some(lease("t1")), Some(&b"so far"[..])));

    session.rules("t1", v1::LeaseState::Stop, 5_000).await;
    let outcome = session.outcome().await;
    assert_eq!(outcome.outcome, Some(Outcome::Cancelled(v1::Cancelled {})));
    session.receipt(&[outcome]).await;
    stage.leave(&mut session).await;
}

#[tokio::test]
async fn a_handler_that_outstays_its_grace_is_aborted() {
    let mut stage = Stage::set(|builder| builder.task("stubborn", stubborn)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "stubborn", "0").await;
    session.rules("t1", v1::LeaseState::Stop, 300).await;
    let outcome = session.outcome().await;
    assert_eq!(outcome.outcome, Some(Outcome::Cancelled(v1::Cancelled {})));
    session.receipt(&[outcome]).await;
    stage.leave(&mut session).await;
}

#[tokio::test]
async fn a_lost_lease_has_no_outcome() {
    let mut stage = Stage::set(|builder| builder.task("stubborn", stubborn)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "stubborn", "0").await;
    session.until(|said| matches!(said, Said::Acks(_)).then_some(())).await;
    session.rules("t1", v1::LeaseState::Lost, 0).await;
    let empty = |said| match said {
        Said::Heartbeat(beat) if beat.held.is_empty() => Some(()),
        Said::Outcomes(outcomes) => panic!("{outcomes:?}"),
        _ => None,
    };
    session.until(empty).await;
    assert!(stage.leave(&mut session).await.is_empty());
}

#[tokio::test]
async fn a_broken_stream_is_resumed_with_everything_held_and_unreceipted() {
    let mut stage = Stage::set(|builder| builder.task("double", double).task("wait", wait)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "wait", "0").await;
    session.assign("t2", "double", "1").await;
    let first = session.outcome().await;
    drop(session);

    let (mut session, hello) = stage.session().await;
    assert_eq!(hello.held, [lease("t1")]);
    assert_eq!(hello.unreceipted, [lease("t2")]);
    let again = session.outcome().await;
    assert_eq!(again, first);
    session.receipt(&[again]).await;
    session.rules("t1", v1::LeaseState::Stop, 5_000).await;
    let outcome = session.outcome().await;
    assert_eq!(outcome.lease, Some(lease("t1")));
    session.receipt(&[outcome]).await;
    stage.leave(&mut session).await;
}

#[tokio::test]
async fn what_outlives_the_drain_goes_back_with_its_checkpoint() {
    let drain = Duration::from_millis(200);
    let mut stage = Stage::set(|builder| builder.task("stubborn", stubborn).drain(drain)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "stubborn", "0").await;
    session.until(|said| matches!(said, Said::Acks(_)).then_some(())).await;
    let outcomes = stage.leave(&mut session).await;
    let Some(Outcome::Release(release)) = &outcomes[0].outcome else { panic!("{outcomes:?}") };
    assert_eq!(release.cause(), v1::ReleaseCause::Drain);
    // It went either here or with a beat that the test left unanswered.
    assert_eq!(release.checkpoint.as_deref(), Some(&b"so far"[..]));
}

#[tokio::test]
async fn outcomes_are_settled_outside_of_a_stream_when_there_is_none() {
    let mut stage = Stage::set(|builder| builder.task("double", double)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "double", "1").await;
    let first = session.outcome().await;
    // The next stream is opened and never welcomed.
    drop(session);
    let _silent = within(stage.sessions.recv()).await;
    stage.stop.cancel();
    assert_eq!(within(stage.settled.recv()).await, Some(first));
    within(stage.worker).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_draining_daemon_is_left_for_a_new_stream() {
    let mut stage = Stage::set(|builder| builder.task("wait", wait)).await;
    let (mut session, _) = stage.session().await;
    session.assign("t1", "wait", "0").await;
    session.until(|said| matches!(said, Said::Acks(_)).then_some(())).await;
    let drain = v1::Drain { deadline: Some(span(5_000)), reconnect_after: Some(span(100)) };
    session.hears(Heard::Drain(drain)).await;
    let (mut session, hello) = stage.session().await;
    assert_eq!(hello.held, [lease("t1")]);
    session.rules("t1", v1::LeaseState::Stop, 5_000).await;
    let outcome = session.outcome().await;
    session.receipt(&[outcome]).await;
    stage.leave(&mut session).await;
}

#[tokio::test]
async fn silence_ends_a_stream() {
    let mut stage = Stage::set(|builder| builder.task("wait", wait)).await;
    let (session, _) = stage.session().await;
    let started = tokio::time::Instant::now();
    let (mut second, _) = stage.session().await;
    let waited = started.elapsed();
    assert!(waited >= Duration::from_millis(6_900), "two idle intervals and 5 s, not {waited:?}");
    drop(session);
    stage.leave(&mut second).await;
}
