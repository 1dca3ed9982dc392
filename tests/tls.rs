//! TLS: who gets through the handshake, and what happens when certificates are replaced.
//!
//! Numbers are rows of the table of bad inputs in `docs/reference/bad-inputs.md`.

use crate::support::secure::{ADMIN, Authority, Files, Leaf, admin, certified, put};
use crate::support::sockets::{Place, config};
use crate::support::worker::{Frame, Stream, hello};
use crate::support::*;
use ledgerd_client::v1::work_request;
use ledgerd_client::{Client, v1};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A daemon's files and its authority's.
fn files(callers: &str) -> (Files, Authority) {
    let files = Files::new(callers);
    let authority = files.certify();
    (files, authority)
}

/// A handshake by hand.
async fn shake(
    address: &str,
    authority: &Authority,
    protocols: &[&[u8]],
    identity: Option<&Leaf>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let tls = Some(config(&authority.pem(), protocols, identity));
    Place { address: address.to_owned(), tls }.shake().await
}

/// Reads until the other side ends it; with the error it ended with, if there was one.
async fn ended(mut stream: impl tokio::io::AsyncRead + Unpin) -> String {
    let mut read = Vec::new();
    match within("the connection ends", stream.read_to_end(&mut read)).await {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    }
}

async fn plain(address: &str, bytes: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.expect("the daemon listens");
    socket.write_all(bytes).await.expect("bytes go out");
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_speak_tls_and_http_2_is_dropped() {
    let (files, authority) = files(&admin());
    let daemon = files.serve_tls(&[]);
    let address = daemon.address.as_str();
    // 4: the preface in the clear; 2: a request of HTTP/1.1.
    ended(plain(address, PREFACE).await).await;
    ended(plain(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await).await;
    // 5: another protocol, and none.
    let error = shake(address, &authority, &[b"http/1.1"], None).await.expect_err("an alert");
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
    if let Ok(stream) = shake(address, &authority, &[], None).await {
        ended(stream).await;
    }
    // HTTP/1.1 after having asked for HTTP/2.
    let mut stream = shake(address, &authority, &[b"h2"], None).await.expect("a handshake");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("bytes go out");
    ended(stream).await;
    // 3: TLS where there is none.
    let bare = Daemon::start();
    assert!(shake(&bare.address, &authority, &[b"h2"], None).await.is_err());
    // They were no trouble for anybody else.
    let client = files.connect_tls(&daemon, Some(ADMIN), None).await.expect("it serves");
    enqueue(&client, task("a")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_dropped_before_and_after_the_handshake() {
    let (files, authority) = files(&admin());
    let daemon = files.serve_tls(&[]);
    let address = daemon.address.as_str();
    // 1: nothing at all, half a hello, and nothing after the handshake; each within its 5 s and a little.
    let started = tokio::time::Instant::now();
    let silent = TcpStream::connect(address).await.expect("the daemon listens");
    let half = plain(address, &[22, 3, 1, 2, 0, 1]).await;
    let shaken = shake(address, &authority, &[b"h2"], None).await.expect("a handshake");
    tokio::join!(ended(silent), ended(half), ended(shaken));
    let took = started.elapsed();
    assert!((Duration::from_secs(4)..Duration::from_secs(15)).contains(&took), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_clients_must_be_good_and_their_names_are_the_callers() {
    let box_7 = "spiffe://test/box-7";
    let callers = certified("box-7", box_7, &["worker", "producer", "viewer"], &["a"]);
    let (files, authority) = files(&callers);
    let ca = files.text("ca.pem");
    let daemon = files.serve_tls(&["--tls-client-ca", &ca]);
    let address = daemon.address.as_str();
    let stranger = Authority::new();
    for (row, identity, alert) in [
        ("6 no certificate", None, "CertificateRequired"),
        ("7 expired", Some(authority.client_valid(box_7, 2000, 2001)), "CertificateExpired"),
        ("8 unknown authority", Some(stranger.client(box_7)), "UnknownCA"),
        ("9 not yet valid", Some(authority.client_valid(box_7, 2990, 3000)), "CertificateExpired"),
    ] {
        // The client's part of the handshake is over before the daemon has looked: the alert comes after.
        let stream = shake(address, &authority, &[b"h2"], identity.as_ref()).await.expect("its own part");
        let error = ended(stream).await;
        assert!(error.contains(alert), "{row}: {error:?}");
    }
    files.put_pair("box-7", &authority.client(box_7));
    files.put_pair("box-8", &authority.client("spiffe://test/box-8"));
    let known = files.connect_tls(&daemon, None, Some("box-7")).await.expect("it is let in");
    let id = enqueue(&known, task("a")).await;
    let mut stream = Stream::open_over(&known, Some(work_request::Frame::Hello(hello("w", "a", 1)))).await;
    let stream = stream.as_mut().expect("it works");
    stream.complete_next("ok").await;
    let rows = history(&known, &id).await;
    assert!(rows.iter().any(|row| row.worker_id == "box-7/w"), "the trail names the caller: {rows:?}");
    // A good certificate of nobody in the file.
    let nobody = files.connect_tls(&daemon, None, Some("box-8")).await.expect("the handshake is good");
    let refused = nobody.tasks().list_tasks(v1::ListTasksRequest::default()).await.expect_err("unknown");
    assert_eq!((refused.code(), &*reason(&refused)), (tonic::Code::Unauthenticated, "CALLER_UNKNOWN"));
    // Whoever is taken out of the file is out, certificate or not.
    put(&files.path("callers.toml"), &admin());
    let end = loop {
        match stream.frame().await {
            Ok(Some(Frame::Idle(_))) => {}
            Ok(other) => panic!("{other:?}"),
            Err(status) => break status,
        }
    };
    assert_eq!((end.code(), &*reason(&end)), (tonic::Code::Unauthenticated, "CALLER_REVOKED"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_holds_for_new_connections_and_ends_none() {
    let (files, _) = files(&admin());
    let daemon = files.serve_tls(&[]);
    let before = files.connect_tls(&daemon, Some(ADMIN), None).await.expect("the first certificate");
    let hello = Some(work_request::Frame::Hello(hello("w", "a", 1)));
    let mut stream = Stream::open_over(&before, hello).await.expect("a stream");
    // A certificate without its key, as between two copies: nothing changes but the log.
    let second = Authority::new();
    let leaf = second.server();
    put(&files.path("server.pem"), &leaf.cert);
    daemon.signal("HUP");
    eventually("the fault is told", async || {
        daemon.log().contains("what it said before stays in force").then_some(())
    })
    .await;
    let still = files.connect_tls(&daemon, Some(ADMIN), None).await.expect("the first is in force");
    enqueue(&still, task("a")).await;
    assert_eq!(stream.complete_next("one").await.error, None);
    // Its key as well: found without being told.
    put(&files.path("server.key"), &leaf.key);
    put(&files.path("ca.pem"), &second.pem());
    let after = eventually("the second certificate holds", async || {
        files.connect_tls(&daemon, Some(ADMIN), None).await.ok()
    })
    .await;
    enqueue(&after, task("a")).await;
    assert_eq!(stream.complete_next("two").await.error, None, "the old stream goes on");
    enqueue(&before, task("a")).await;
    assert_eq!(stream.complete_next("three").await.error, None, "and so does its connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_speaks_tls_and_sends_its_token() {
    let (files, _) = files(&admin());
    let daemon = files.serve_tls(&[]);
    put(&files.path("token"), ADMIN);
    let (ca, token) = (files.text("ca.pem"), files.text("token"));
    let run = |more: &[&str], args: &[&str]| {
        let mut command = command();
        command.args(["--address", &daemon.address]).args(more).args(args);
        command.output().expect("it runs")
    };
    let secure = ["--tls-ca", ca.as_str(), "--token-file", token.as_str()];
    let done = run(&secure, &["task", "enqueue", "a", "t", "--payload", "{}"]);
    assert!(done.status.success(), "{done:?}");
    let counted = run(&secure, &["stats"]);
    assert!(counted.status.success(), "{counted:?}");
    // Health asks nobody who they are, but it is not in the clear either.
    assert!(run(&["--tls-ca", &ca], &["healthcheck"]).status.success());
    assert!(!run(&[], &["healthcheck"]).status.success());
    // What a worker runs does not get its token.
    let mut worker = command();
    worker.args(["--address", &daemon.address, "--tls-ca", &ca]).env("LEDGERD_TOKEN", ADMIN);
    worker.args(["worker", "exec", "--agent", "a", "--capacity", "1", "--", "sh", "-c", "env"]);
    let mut worker = worker.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it runs");
    let client = files.connect_tls(&daemon, Some(ADMIN), None).await.expect("it serves");
    let id = enqueue(&client, task("a")).await;
    let done = in_state(&client, &id, v1::TaskState::Done).await;
    let seen = String::from_utf8_lossy(&done.result).into_owned();
    let _ = worker.kill();
    let _ = worker.wait();
    assert!(seen.contains("LEDGERD_TASK_ID=") && !seen.contains("LEDGERD_TOKEN"), "{seen}");
    let unknown = run(&["--tls-ca", &ca], &["stats"]);
    let said = String::from_utf8_lossy(&unknown.stderr);
    assert!(!unknown.status.success() && said.contains("say who you are"), "{said}");
    let wrong = Client::builder(format!("https://{}", daemon.address)).connect().await;
    assert!(wrong.is_err(), "an authority that nobody trusts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_reaches_workers_under_tls_as_well() {
    let (files, _) = files(&admin());
    let mut daemon = files.serve_tls(&[]);
    let log = daemon.log();
    assert!(log.contains("every user of this machine can read this key"), "{log}");
    let client = files.connect_tls(&daemon, Some(ADMIN), None).await.expect("it serves");
    let hello = Some(work_request::Frame::Hello(hello("w", "a", 1)));
    let mut stream = Stream::open_over(&client, hello).await.expect("a stream");
    daemon.signal("TERM");
    assert!(matches!(stream.other().await, Frame::Drain(_)));
    stream.send(work_request::Frame::Goodbye(v1::Goodbye {})).await;
    drop((stream, client));
    assert!(daemon.ended().await.success());
}
