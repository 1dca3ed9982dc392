//! Every role, every method, agents within reach and out of it: what is answered, method by method.

use crate::support::secure::{ADMIN, Files, Way, admin, caller, with_token};
use crate::support::*;
use bytes::{Buf, BufMut, Bytes};
use ledgerd_client::{Client, v1};
use prost::Message;
use std::collections::BTreeSet;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Status};

both_ways!(
    every_role_may_what_the_table_says_and_nothing_else,
    what_is_served_beside_the_ledger_has_its_rules_too
);

const OWN: &str = "review-1";
const FOREIGN: &str = "claude";

/// How a method names what it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum About {
    /// An agent: one out of reach is refused, whether it is there or not.
    Agent,
    /// A task: one out of reach is not there.
    Task,
    /// Several tasks: those out of reach are not there, one by one.
    Tasks,
    /// Everything: what is out of reach is left out.
    All,
}

/// A method, who may call it, and how it is asked about an agent or a task of it.
struct Row {
    method: &'static str,
    roles: &'static [&'static str],
    about: About,
    request: fn(agent: &str, task: &str) -> Vec<u8>,
}

const SEE_TASKS: &[&str] = &["producer", "operator", "viewer"];
const CHANGE: &[&str] = &["producer", "operator"];
const SEE: &[&str] = &["operator", "viewer"];

macro_rules! row {
    ($method:ident, $roles:expr, $about:ident, |$agent:ident, $task:ident| $request:ident { $($field:tt)* }) => {
        Row {
            method: stringify!($method),
            roles: $roles,
            about: About::$about,
            request: |$agent, $task| {
                let _ = ($agent, $task);
                v1::$request { $($field)* }.encode_to_vec()
            },
        }
    };
}

fn table() -> Vec<Row> {
    vec![
        row!(EnqueueTask, &["producer"], Agent, |a, t| EnqueueTaskRequest {
            task: Some(task(a)),
            ..Default::default()
        }),
        row!(EnqueueTasks, &["producer"], Agent, |a, t| EnqueueTasksRequest {
            tasks: vec![task(a)],
            mode: v1::BatchMode::Atomic.into(),
            ..Default::default()
        }),
        row!(GetTask, SEE_TASKS, Task, |a, t| GetTaskRequest { task_id: t.into(), ..Default::default() }),
        row!(ListTasks, SEE_TASKS, Agent, |a, t| ListTasksRequest { agent: a.into(), ..Default::default() }),
        row!(GetTaskHistory, SEE_TASKS, Task, |a, t| GetTaskHistoryRequest { task_id: t.into() }),
        row!(WaitTask, SEE_TASKS, Task, |a, t| WaitTaskRequest {
            task_id: t.into(),
            timeout: ms(1),
            ..Default::default()
        }),
        row!(WatchTasks, SEE_TASKS, Agent, |a, t| WatchTasksRequest {
            agent: a.into(),
            ..Default::default()
        }),
        row!(ExplainTask, SEE_TASKS, Task, |a, t| ExplainTaskRequest { task_id: t.into() }),
        row!(CancelTask, CHANGE, Task, |a, t| CancelTaskRequest { task_id: t.into(), ..Default::default() }),
        row!(UpdateTask, CHANGE, Task, |a, t| UpdateTaskRequest {
            task_id: t.into(),
            priority: Some(1),
            ..Default::default()
        }),
        row!(UnblockTask, CHANGE, Task, |a, t| UnblockTaskRequest {
            task_id: t.into(),
            answer: "x".into(),
            ..Default::default()
        }),
        row!(Work, &["worker"], Agent, |a, t| WorkRequest {
            frame: Some(v1::work_request::Frame::Hello(crate::support::worker::hello("w", a, 0)))
        }),
        row!(SettleTasks, &["worker"], Tasks, |a, t| SettleTasksRequest {
            worker_id: "w".into(),
            outcomes: vec![crate::support::worker::outcome(
                v1::Lease { task_id: t.into(), fence: 1 },
                crate::support::worker::complete("x"),
            )],
        }),
        row!(ListAgents, SEE, All, |a, t| ListAgentsRequest { ..Default::default() }),
        row!(GetAgent, SEE, Agent, |a, t| GetAgentRequest { agent: a.into() }),
        row!(ConfigureAgent, &["operator"], Agent, |a, t| ConfigureAgentRequest {
            agent: a.into(),
            ..Default::default()
        }),
        row!(PauseAgent, &["operator"], Agent, |a, t| PauseAgentRequest {
            agent: a.into(),
            reason: "x".into(),
            ..Default::default()
        }),
        row!(ResumeAgent, &["operator"], Agent, |a, t| ResumeAgentRequest {
            agent: a.into(),
            ..Default::default()
        }),
        row!(ListAgentEvents, SEE, Agent, |a, t| ListAgentEventsRequest {
            agent: a.into(),
            ..Default::default()
        }),
        row!(ListBreakers, SEE, All, |a, t| ListBreakersRequest { ..Default::default() }),
        row!(GetBreaker, SEE, Agent, |a, t| GetBreakerRequest { agent: a.into(), ..Default::default() }),
        row!(ResetBreaker, &["operator"], Agent, |a, t| ResetBreakerRequest {
            agent: a.into(),
            ..Default::default()
        }),
        row!(TripBreaker, &["operator"], Agent, |a, t| TripBreakerRequest {
            agent: a.into(),
            reason: "x".into(),
            ..Default::default()
        }),
        row!(ForceBreaker, &["operator"], Agent, |a, t| ForceBreakerRequest {
            agent: a.into(),
            reason: "x".into(),
            state: v1::BreakerState::ForcedOpen.into(),
            ..Default::default()
        }),
        row!(ListDeadLetters, SEE, Agent, |a, t| ListDeadLettersRequest {
            agent: a.into(),
            ..Default::default()
        }),
        row!(GetDeadLetter, SEE, Task, |a, t| GetDeadLetterRequest { task_id: t.into() }),
        row!(GroupDeadLetters, SEE, Agent, |a, t| GroupDeadLettersRequest {
            filter: Some(v1::DeadLetterFilter { agent: a.into(), ..Default::default() }),
            ..Default::default()
        }),
        row!(RedriveDeadLetters, &["operator"], Tasks, |a, t| RedriveDeadLettersRequest {
            task_ids: vec![t.into()],
            ..Default::default()
        }),
        row!(DiscardDeadLetters, &["operator"], Tasks, |a, t| DiscardDeadLettersRequest {
            task_ids: vec![t.into()],
            ..Default::default()
        }),
        row!(ListWorkers, SEE, All, |a, t| ListWorkersRequest { ..Default::default() }),
        row!(GetStats, SEE, All, |a, t| GetStatsRequest {}),
    ]
}

/// The full paths of all methods of `ledger.v1`.
fn methods() -> Vec<(String, String)> {
    let described = prost_types::FileDescriptorSet::decode(ledgerd_client::DESCRIPTOR).expect("descriptors");
    let mut all = Vec::new();
    for file in described.file.iter().filter(|file| file.package() == "ledger.v1") {
        for service in &file.service {
            for method in &service.method {
                let name = method.name().to_owned();
                all.push((name.clone(), format!("/ledger.v1.{}/{name}", service.name())));
            }
        }
    }
    all
}

/// Bytes as they are.
#[derive(Clone, Copy, Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buf.copy_to_bytes(buf.remaining())))
    }
}

/// Calls a method; for a stream the first answer counts.
async fn call(client: &Client, path: &str, request: Vec<u8>) -> Result<Bytes, Status> {
    let mut grpc = tonic::client::Grpc::new(client.connection());
    grpc.ready().await.expect("the daemon is there");
    let path = path.parse().expect("a path");
    let answer = grpc.server_streaming(tonic::Request::new(Bytes::from(request)), path, Raw);
    let mut answers = within("an answer", answer).await?.into_inner();
    let first = within("an answer", answers.message()).await?;
    Ok(first.unwrap_or_default())
}

/// Whether an answer has this text in it.
fn tells(answer: &Bytes, text: &str) -> bool {
    answer.windows(text.len()).any(|part| part == text.as_bytes())
}

async fn every_role_may_what_the_table_says_and_nothing_else(way: Way) {
    let token = |role: &str| format!("ldg_{role}-of-the-matrix");
    let roles = ["producer", "worker", "operator", "viewer"];
    let stanzas: String =
        roles.iter().map(|role| caller(role, &token(role), &[role], &["review-*"], false)).collect();
    let daemon = way.serve(&Files::new(&format!("{}{stanzas}", admin())), &[]);
    let admin = with_token(&daemon, ADMIN).await;
    let mut clients = Vec::new();
    for role in roles {
        clients.push((role, with_token(&daemon, &token(role)).await));
    }
    let (table, methods) = (table(), methods());
    let tested: BTreeSet<&str> = table.iter().map(|row| row.method).collect();
    let served: BTreeSet<&str> = methods.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(tested, served, "every method has a row");
    let bare = daemon.client().await;
    let mut seen = 0;
    for row in &table {
        let (_, path) = methods.iter().find(|(name, _)| name == row.method).expect("it is served");
        let own = enqueue(&admin, task(OWN)).await;
        let foreign = enqueue(&admin, task(FOREIGN)).await;
        let unnamed = call(&bare, path, (row.request)(OWN, &own)).await.expect_err("nobody is known");
        assert_eq!(unnamed.code(), Code::Unauthenticated, "{}", row.method);
        for (role, client) in &clients {
            let case = format!("{role} calls {}", row.method);
            let ours = call(client, path, (row.request)(OWN, &own)).await;
            let theirs = call(client, path, (row.request)(FOREIGN, &foreign)).await;
            seen += 2;
            if !row.roles.contains(role) {
                for refused in [ours, theirs] {
                    let refused = refused.expect_err(&case);
                    assert_eq!(
                        (refused.code(), &*reason(&refused)),
                        (Code::PermissionDenied, "ROLE_MISSING"),
                        "{case}"
                    );
                }
                continue;
            }
            // What the state of the task does not allow is another matter.
            let allowed = |answer: &Result<Bytes, Status>| match answer {
                Ok(_) => true,
                Err(status) => {
                    status.code() == Code::FailedPrecondition || reason(status) == "DEAD_LETTER_NOT_FOUND"
                }
            };
            assert!(allowed(&ours), "{case}: {ours:?}");
            match row.about {
                About::Agent => {
                    let refused = theirs.expect_err(&case);
                    let said = (refused.code(), reason(&refused));
                    assert_eq!(said, (Code::PermissionDenied, "AGENT_FORBIDDEN".into()), "{case}");
                }
                About::Task => {
                    // 50: word for word what is said of a task that does not exist.
                    let refused = theirs.expect_err(&case);
                    let unknown =
                        call(client, path, (row.request)(FOREIGN, "t1zzzzzz")).await.expect_err(&case);
                    assert_eq!(
                        (refused.code(), &*reason(&refused)),
                        (Code::NotFound, "TASK_NOT_FOUND"),
                        "{case}"
                    );
                    assert_eq!(refused.message().replace(&foreign, "t1zzzzzz"), unknown.message(), "{case}");
                    assert_eq!(refused.code(), unknown.code(), "{case}");
                }
                About::Tasks => {
                    let answer = theirs.expect(&case);
                    assert!(tells(&answer, "TASK_NOT_FOUND"), "{case}: {answer:?}");
                    let unknown = call(client, path, (row.request)(FOREIGN, "t1zzzzzz")).await.expect(&case);
                    assert!(tells(&unknown, "TASK_NOT_FOUND"), "{case}: {unknown:?}");
                }
                About::All => {
                    let answer = theirs.expect(&case);
                    assert!(!tells(&answer, FOREIGN), "{case} and hears of {FOREIGN}");
                    let everything = call(&admin, path, (row.request)(FOREIGN, &foreign)).await.expect(&case);
                    let is_told = row.method != "GetStats" && row.method != "ListWorkers";
                    assert_eq!(tells(&everything, FOREIGN), is_told, "{case}: the test would see it");
                }
            }
        }
    }
    assert_eq!(seen, table.len() * roles.len() * 2);
}

async fn what_is_served_beside_the_ledger_has_its_rules_too(way: Way) {
    let eye = caller("eye", "ldg_eye-of-the-matrix", &["worker"], &["a"], false);
    let daemon = way.serve(&Files::new(&eye), &[]);
    let (bare, known) = (daemon.client().await, with_token(&daemon, "ldg_eye-of-the-matrix").await);
    // Reflection asks for a caller, whoever it is: field 7, list the services.
    let list = vec![0x3a, 0x00];
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let refused = call(&bare, &path, list.clone()).await.expect_err("nobody is known");
        assert_eq!(refused.code(), Code::Unauthenticated, "{version}");
        let services = call(&known, &path, list.clone()).await.expect("anybody who is known");
        assert!(tells(&services, "ledger.v1.TaskService"), "{version}");
    }
    // Health asks nobody.
    for method in ["Check", "Watch"] {
        assert!(
            call(&bare, &format!("/grpc.health.v1.Health/{method}"), Vec::new()).await.is_ok(),
            "{method}"
        );
    }
    // What there is not is told to those who are known.
    for path in ["/ledger.v1.TaskService/Nope", "/nope.Nope/Nope"] {
        let refused = call(&bare, path, Vec::new()).await.expect_err("nobody is known");
        assert_eq!(refused.code(), Code::Unauthenticated, "{path}");
        let refused = call(&known, path, Vec::new()).await.expect_err("there is none");
        assert_eq!((refused.code(), &*reason(&refused)), (Code::Unimplemented, "UNKNOWN_METHOD"), "{path}");
    }
}
