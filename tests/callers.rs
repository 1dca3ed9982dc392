//! Callers: who they are, what each role may do with whose tasks, and what ends when it is taken back.
//!
//! Numbers are rows of the table of bad inputs in `docs/reference/bad-inputs.md`.

mod matrix;

use crate::support::secure::{ADMIN, Files, Way, admin, caller, put, with_token};
use crate::support::worker::{Stream, complete, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1::{self, work_request::Frame};
use tonic::{Code, Request};

both_ways!(
    without_good_credentials_nobody_is_known,
    payloads_are_shown_to_those_who_may_read_them,
    workers_reach_their_own_agents_tasks_and_no_others,
    lists_show_what_is_within_reach,
    what_is_taken_back_ends_what_it_opened,
    the_trail_names_the_caller_whatever_they_say,
);

const CI: &str = "ldg_ci-of-the-tests";
const BOX: &str = "ldg_box-of-the-tests";
const EYE: &str = "ldg_eye-of-the-tests";

fn with(more: &[String]) -> Files {
    Files::new(&format!("{}{}", admin(), more.concat()))
}

async fn work(daemon: &Daemon, token: &str, hello: v1::Hello) -> Result<Stream, tonic::Status> {
    Stream::open_over(&with_token(daemon, token).await, Some(Frame::Hello(hello))).await
}

async fn without_good_credentials_nobody_is_known(way: Way) {
    let daemon = way.serve(&with(&[]), &[]);
    let bare = daemon.client().await;
    let bearer = |token: &str| format!("Bearer {token}");
    for (row, headers, said) in [
        ("31 none", vec![], "CREDENTIALS_MISSING"),
        ("32 empty", vec![bearer("")], "CREDENTIALS_MALFORMED"),
        ("33 two", vec![bearer(ADMIN), bearer(ADMIN)], "CREDENTIALS_MALFORMED"),
        ("44 too long", vec![bearer(&"x".repeat(9_000))], "CREDENTIALS_MALFORMED"),
        ("another scheme", vec![format!("Basic {ADMIN}")], "CREDENTIALS_MALFORMED"),
        ("no scheme", vec![ADMIN.to_owned()], "CREDENTIALS_MALFORMED"),
        ("unknown", vec![bearer("ldg_unknown")], "CALLER_UNKNOWN"),
        ("nearly", vec![bearer(&ADMIN[..ADMIN.len() - 1])], "CALLER_UNKNOWN"),
    ] {
        let mut request = Request::new(v1::GetStatsRequest {});
        for header in &headers {
            request.metadata_mut().append("authorization", header.parse().expect("a header"));
        }
        let refused = bare.admin().get_stats(request).await.expect_err(row);
        assert_eq!((refused.code(), &*reason(&refused)), (Code::Unauthenticated, said), "{row}");
    }
    // The scheme is a word of HTTP, whose case says nothing.
    let mut request = Request::new(v1::GetStatsRequest {});
    request.metadata_mut().insert("authorization", format!("bEARER {ADMIN}").parse().expect("a header"));
    assert!(bare.admin().get_stats(request).await.is_ok());
    // Probes have no credentials.
    let mut health = command();
    if let Some(ca) = daemon.ca() {
        health.arg("--tls-ca").arg(ca);
    }
    let health = health.args(["--address", &daemon.address, "healthcheck"]).status();
    assert!(health.expect("it runs").success());
}

async fn payloads_are_shown_to_those_who_may_read_them(way: Way) {
    let may = caller("may", CI, &["viewer"], &["*"], true);
    let daemon = way.serve(&with(&[may, caller("eye", EYE, &["viewer", "producer"], &["*"], false)]), &[]);
    let admin = with_token(&daemon, ADMIN).await;
    let id = enqueue(&admin, task("a")).await;
    let mut stream = work(&daemon, ADMIN, hello("w", "a", 1)).await.expect("a worker");
    assert_eq!(
        &*stream.assignment().await.payload,
        &*task("a").payload,
        "who runs a task is handed what is in it"
    );
    let assigned = get(&admin, &id).await;
    stream
        .settle(vec![outcome(v1::Lease { task_id: id.clone(), fence: assigned.fence }, complete("secret"))])
        .await;
    stream.outcome_receipt().await;
    let (sees, hidden) = (with_token(&daemon, CI).await, with_token(&daemon, EYE).await);
    let seen = get(&sees, &id).await;
    assert_eq!((&*seen.payload, &*seen.result), (&*task("a").payload, &b"secret"[..]));
    let seen = get(&hidden, &id).await;
    assert_eq!((&*seen.payload, &*seen.result), (&b""[..], &b""[..]));
    let length = task("a").payload.len() as u64;
    assert_eq!((seen.payload_bytes, seen.result_bytes), (length, 6), "that there is one is no secret");
    let wait = v1::WaitTaskRequest { task_id: id, include_data: true, ..v1::WaitTaskRequest::default() };
    let waited = hidden.tasks().wait_task(wait).await.expect("it is done").into_inner().task.expect("set");
    assert!(waited.result.is_empty());
}

async fn workers_reach_their_own_agents_tasks_and_no_others(way: Way) {
    let reviewer = caller("box", BOX, &["worker"], &["review-*"], false);
    let daemon = way.serve(&with(&[reviewer, caller("ci", CI, &["producer"], &["review-*"], false)]), &[]);
    let admin = with_token(&daemon, ADMIN).await;
    // 46: a producer opens a worker's stream; 47: a worker for an agent that is not its own.
    let refused = work(&daemon, CI, hello("w", "review-1", 1)).await.expect_err("no worker");
    assert_eq!((refused.code(), &*reason(&refused)), (Code::PermissionDenied, "ROLE_MISSING"));
    let refused = work(&daemon, BOX, hello("w", "claude", 1)).await.expect_err("not its agent");
    assert_eq!((refused.code(), &*reason(&refused)), (Code::PermissionDenied, "AGENT_FORBIDDEN"));
    // Somebody else's worker of the same name is another worker: it keeps its stream and its task.
    let foreign = enqueue(&admin, task("claude")).await;
    let mut others = work(&daemon, ADMIN, hello("w", "claude", 1)).await.expect("a worker");
    let theirs = others.assignment().await;
    let own = enqueue(&admin, task("review-1")).await;
    let newer = v1::Hello { incarnation: 2, ..hello("w", "review-1", 1) };
    let mut stream = work(&daemon, BOX, newer).await.expect("a worker");
    let ours = stream.assignment().await;
    assert_eq!(ours.task_id, own);
    // 51: a report on a task of another agent is one on a task that does not exist, on the stream and beside it.
    stream.ack(lease(&theirs)).await;
    let acked = stream.receipt().await.error.expect("a refusal");
    stream.settle(vec![outcome(lease(&theirs), complete("stolen"))]).await;
    let settled = stream.outcome_receipt().await.error.expect("a refusal");
    let nowhere = v1::Lease { task_id: "t1zzzzzz".into(), fence: 1 };
    stream.settle(vec![outcome(nowhere, complete("nowhere"))]).await;
    let unknown = stream.outcome_receipt().await.error.expect("a refusal");
    let client = with_token(&daemon, BOX).await;
    let request = v1::SettleTasksRequest {
        worker_id: "w".into(),
        outcomes: vec![outcome(lease(&theirs), complete("stolen"))],
    };
    let receipts = client.workers().settle_tasks(request).await.expect("receipts").into_inner().receipts;
    let beside = receipts[0].error.clone().expect("a refusal");
    for error in [&acked, &settled, &unknown, &beside] {
        assert_eq!((error.code, &*error.reason), (Code::NotFound as i32, "TASK_NOT_FOUND"), "{error:?}");
    }
    // A follow-up for an agent out of reach refuses the outcome, which may be sent again without it.
    let follow = |agent: &str| {
        v1::outcome::Outcome::Complete(v1::Complete { follow_ups: vec![task(agent)], ..Default::default() })
    };
    stream.settle(vec![outcome(lease(&ours), follow("claude"))]).await;
    let error = stream.outcome_receipt().await.error.expect("a refusal");
    assert_eq!((error.code, &*error.reason), (Code::PermissionDenied as i32, "AGENT_FORBIDDEN"));
    stream.settle(vec![outcome(lease(&ours), follow("review-2"))]).await;
    let receipt = stream.outcome_receipt().await;
    assert!(receipt.error.is_none() && receipt.follow_up_ids.len() == 1, "{receipt:?}");
    others.settle(vec![outcome(lease(&theirs), complete("done"))]).await;
    assert_eq!(others.outcome_receipt().await.error, None, "nobody touched it");
    let rows = history(&admin, &foreign).await;
    assert!(rows.iter().any(|row| row.worker_id == "admin/w"), "{rows:?}");
}

async fn lists_show_what_is_within_reach(way: Way) {
    let daemon = way.serve(&with(&[caller("eye", EYE, &["viewer"], &["review-*"], false)]), &[]);
    let admin = with_token(&daemon, ADMIN).await;
    for agent in ["claude", "review-1", "review-2"] {
        enqueue(&admin, task(agent)).await;
    }
    let eye = with_token(&daemon, EYE).await;
    let listed = |agent: &str| v1::ListTasksRequest { agent: agent.into(), ..Default::default() };
    let own = eye.tasks().list_tasks(listed("review-1")).await.expect("its own").into_inner();
    assert_eq!(own.tasks.len(), 1);
    // 49: a list of what is not its own, by name and by leaving the name out.
    for (agent, said) in
        [("claude", "AGENT_FORBIDDEN"), ("nobody", "AGENT_FORBIDDEN"), ("", "AGENT_REQUIRED")]
    {
        let refused = eye.tasks().list_tasks(listed(agent)).await.expect_err(agent);
        assert_eq!((refused.code(), &*reason(&refused)), (Code::PermissionDenied, said), "{agent:?}");
    }
    let agents =
        eye.admin().list_agents(v1::ListAgentsRequest::default()).await.expect("agents").into_inner();
    let names: Vec<_> = agents.agents.iter().map(|agent| agent.agent.as_str()).collect();
    assert_eq!(names, ["review-1", "review-2"]);
}

async fn what_is_taken_back_ends_what_it_opened(way: Way) {
    let worker = |agents: &[&str], roles: &[&str]| caller("box", BOX, roles, agents, false);
    let files = with(&[worker(&["a", "b"], &["worker", "viewer"])]);
    let daemon = way.serve(&files, &[]);
    let set = |stanza: &str| put(&files.path("callers.toml"), &format!("{}{stanza}", admin()));
    let admin = with_token(&daemon, ADMIN).await;
    let both = v1::Hello { agents: vec!["a".into(), "b".into()], ..hello("w", "a", 1) };
    let stream = work(&daemon, BOX, both.clone()).await.expect("a worker");
    let mut stays = work(&daemon, ADMIN, hello("w", "a", 1)).await.expect("a worker");
    // An agent less: the stream that was for both ends, one for what is left begins.
    set(&worker(&["a"], &["worker", "viewer"]));
    let end = stream.end().await;
    assert_eq!((end.code(), &*reason(&end)), (Code::PermissionDenied, "AGENT_FORBIDDEN"));
    let stream =
        work(&daemon, BOX, v1::Hello { incarnation: 2, ..hello("w", "a", 0) }).await.expect("still a worker");
    // The role.
    set(&worker(&["a"], &["viewer"]));
    let end = stream.end().await;
    assert_eq!((end.code(), &*reason(&end)), (Code::PermissionDenied, "ROLE_MISSING"));
    // 45: the token, while something waits for it. An empty file is one that is being written: it ends nothing.
    let id = enqueue(&admin, task("c")).await;
    set(&worker(&["*"], &["worker", "viewer"]));
    let box_client = with_token(&daemon, BOX).await;
    let third = v1::Hello { incarnation: 3, ..hello("w", "a", 0) };
    let stream =
        eventually("the rights are back", async || work(&daemon, BOX, third.clone()).await.ok()).await;
    let watch = v1::WatchTasksRequest { agent: "c".into(), ..Default::default() };
    let mut watched = box_client.tasks().watch_tasks(watch).await.expect("it begins").into_inner();
    within("its first message", watched.message()).await.expect("it begins");
    let waiting = tokio::spawn(async move {
        let request = v1::WaitTaskRequest { task_id: id, ..v1::WaitTaskRequest::default() };
        box_client.tasks().wait_task(request).await
    });
    put(&files.path("callers.toml"), "");
    daemon.signal("HUP");
    eventually("the empty file is told", async || daemon.log().contains("no [[caller]]").then_some(())).await;
    assert!(!waiting.is_finished());
    set("");
    let end = stream.end().await;
    assert_eq!((end.code(), &*reason(&end)), (Code::Unauthenticated, "CALLER_REVOKED"));
    let waited =
        within("the long poll ends", waiting).await.expect("no panic").expect_err("it was taken back");
    assert_eq!((waited.code(), &*reason(&waited)), (Code::Unauthenticated, "CALLER_REVOKED"));
    let watched = within("the watch ends", watched.message()).await.expect_err("it was taken back");
    assert_eq!((watched.code(), &*reason(&watched)), (Code::Unauthenticated, "CALLER_REVOKED"));
    let refused = work(&daemon, BOX, both).await.expect_err("nobody any more");
    assert_eq!((refused.code(), &*reason(&refused)), (Code::Unauthenticated, "CALLER_UNKNOWN"));
    enqueue(&admin, task("a")).await;
    assert_eq!(stays.complete_next("ok").await.error, None, "others noticed nothing");
}

async fn the_trail_names_the_caller_whatever_they_say(way: Way) {
    let daemon = way.serve(&with(&[caller("ops", CI, &["operator"], &["*"], false)]), &[]);
    let (admin, ops) = (with_token(&daemon, ADMIN).await, with_token(&daemon, CI).await);
    configure(&ops, "a", quick()).await;
    let pause = v1::PauseAgentRequest {
        agent: "a".into(),
        reason: "repairs".into(),
        actor: "root@elsewhere".into(),
        ..v1::PauseAgentRequest::default()
    };
    let paused = ops.admin().pause_agent(pause).await.expect("paused").into_inner().agent.expect("set");
    assert_eq!(paused.pause.expect("it is").actor, "ops (root@elsewhere)");
    let request = v1::ListAgentEventsRequest::default();
    let events = admin.admin().list_agent_events(request).await.expect("events").into_inner().events;
    let actors: Vec<_> = events.iter().map(|event| (event.event.as_str(), event.actor.as_str())).collect();
    assert_eq!(actors, [("PAUSED", "ops (root@elsewhere)"), ("CONFIGURED", "ops")]);
    let id = enqueue(&admin, task("a")).await;
    let cancel = v1::CancelTaskRequest { task_id: id.clone(), reason: "old".into(), ..Default::default() };
    ops.tasks().cancel_task(cancel).await.expect("cancelled");
    let last = history(&admin, &id).await.pop().expect("a row");
    assert!(last.facts.values().any(|fact| fact == "ops: old"), "{last:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_token_works_and_is_kept_nowhere() {
    let files = Files::new(&admin());
    let path = files.text("callers.toml");
    let daemon = files.serve(&["--log", "trace"]);
    let new = |args: &[&str]| command().args(["token", "new"]).args(args).output().expect("it runs");
    let made = new(&[
        "--name", "ci", "--role", "producer", "--role", "viewer", "--agent", "review-*", "--add", &path,
    ]);
    assert!(made.status.success(), "{made:?}");
    let token = String::from_utf8(made.stdout).expect("text").trim().to_owned();
    assert!(token.starts_with("ldg_") && token.len() == 47, "32 bytes in letters");
    let file = std::fs::read_to_string(&path).expect("a file");
    assert!(!file.contains(&token) && file.contains("\"review-*\""), "{file}");
    let client = with_token(&daemon, &token).await;
    let id = eventually("the daemon has read it", async || {
        let request = v1::EnqueueTaskRequest { task: Some(task("review-1")), ..Default::default() };
        client.tasks().enqueue_task(request).await.ok().map(|answer| answer.into_inner().task_id)
    })
    .await;
    get(&client, &id).await;
    let wrong = with_token(&daemon, "ldg_a-wrong-one").await;
    assert!(wrong.tasks().list_tasks(v1::ListTasksRequest::default()).await.is_err());
    let log = daemon.log();
    assert!(log.contains("TRACE") && !log.contains(&token) && !log.contains("a-wrong-one"));
    // Shown beside, for whoever keeps the file elsewhere; and checked before anything is printed.
    let shown = new(&["--name", "eye", "--role", "viewer", "--agent", "*", "--payloads"]);
    let stanza = String::from_utf8(shown.stderr).expect("text");
    assert!(stanza.contains("[[caller]]") && stanza.contains("payloads = true"), "{stanza}");
    for bad in [
        ["--name", "a b", "--role", "viewer", "--agent", "a"],
        ["--name", "a", "--role", "viewer", "--agent", "*a"],
    ] {
        let refused = new(&bad);
        assert!(refused.status.code() == Some(2) && refused.stdout.is_empty(), "{refused:?}");
    }
    assert!(new(&["--name", "a", "--role", "king", "--agent", "a"]).stdout.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_without_protection_is_refused_unless_accepted() {
    let files = Files::new(&admin());
    let callers = files.text("callers.toml");
    let authority = crate::support::secure::Authority::new();
    files.put_pair("server", &authority.server());
    files.put_pair("other", &authority.server());
    put(&files.path("bad.toml"), "[[caller]]\nname = 'x'\ntoken = 'ldg_oops'\n");
    let (cert, key, wrong) = (files.text("server.pem"), files.text("server.key"), files.text("other.key"));
    let (bad, missing) = (files.text("bad.toml"), files.text("missing.toml"));
    let serve = |args: &[&str]| {
        let data = files.path("data");
        let mut command = command();
        command.args(["serve", "--http-listen", "off", "--data-dir"]).arg(data).args(args);
        command.output().expect("it runs")
    };
    let any = ["--listen", "0.0.0.0:0"];
    let here = ["--listen", "127.0.0.1:0"];
    let flag = "--i-accept-unauthenticated-network-access";
    for (args, said) in [
        (vec![any[0], any[1]], flag),
        (vec![any[0], any[1], "--callers", &callers], flag),
        (vec![any[0], any[1], "--tls-cert", &cert, "--tls-key", &key], flag),
        (vec![here[0], here[1], "--tls-cert", &cert], "tls_key"),
        (vec![here[0], here[1], "--tls-cert", &cert, "--tls-key", &wrong], "server.pem"),
        (vec![here[0], here[1], "--tls-cert", &callers, "--tls-key", &key], "no certificate"),
        (vec![here[0], here[1], "--callers", &missing], "missing.toml"),
        (vec![here[0], here[1], "--callers", &bad], "bad.toml"),
    ] {
        let refused = serve(&args);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(78), "{args:?}: {error}");
        let lines: Vec<_> = error.lines().filter(|line| line.starts_with("ledgerd: ")).collect();
        assert!(lines.len() == 1 && lines[0].contains(said), "{args:?}: {error}");
        assert!(!error.contains("oops"), "{error}");
    }
    let open = Daemon::start_with(Folder::new(), any[1], &[flag]);
    let warned = open.log();
    assert!(warned.contains("WARN") && warned.contains(flag), "{warned}");
    let closed = Daemon::start_with(
        Folder::new(),
        any[1],
        &["--tls-cert", &cert, "--tls-key", &key, "--callers", &callers],
    );
    assert!(!closed.log().contains(flag));
}
