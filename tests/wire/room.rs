//! Many large messages at once, which callers may send: what they take of memory together is bounded, and small calls go on.

use super::attacks::{MOST_KIB, peak_kib};
use super::framing::message;
use crate::support::*;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use http::Request;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use std::time::Duration;
use tokio::task::JoinSet;

const ENQUEUE: &str = "/ledger.v1.TaskService/EnqueueTask";
const ENQUEUE_MANY: &str = "/ledger.v1.TaskService/EnqueueTasks";
const WORK: &str = "/ledger.v1.WorkerService/Work";
const MESSAGE: usize = 4 << 20;

/// A body that never ends: this, and then nothing.
pub(super) fn unended(
    body: &Bytes,
) -> impl hyper::body::Body<Data = Bytes, Error = Infallible> + Send + use<> {
    let pieces: Vec<_> =
        (0..body.len()).step_by(16 << 10).map(|at| body.slice(at..body.len().min(at + (16 << 10)))).collect();
    let pieces = tokio_stream::iter(pieces).map(|piece| Ok(Frame::data(piece)));
    StreamBody::new(pieces.chain(tokio_stream::pending()))
}

/// Sends the same on each of some connections, as often as told. What was answered, as codes, within some time.
async fn flood(
    daemon: &Daemon,
    path: &'static str,
    body: &Bytes,
    connections: usize,
    streams: usize,
) -> JoinSet<Option<i32>> {
    let mut all = JoinSet::new();
    for _ in 0..connections {
        let socket = tokio::net::TcpStream::connect(&daemon.address).await.expect("the daemon listens");
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
                .await
                .expect("the daemon speaks HTTP/2");
        tokio::spawn(connection);
        for _ in 0..streams {
            let request = Request::post(format!("http://{}{path}", daemon.address))
                .header("te", "trailers")
                .header("content-type", "application/grpc")
                .body(unended(body))
                .expect("a request");
            let mut sender = sender.clone();
            all.spawn(async move {
                let (parts, body) = sender.send_request(request).await.ok()?.into_parts();
                let trailers = body.collect().await.ok().and_then(|body| body.trailers().cloned());
                let status = parts.headers.get("grpc-status").cloned();
                let status = status.or_else(|| trailers?.get("grpc-status").cloned())?;
                status.to_str().ok()?.parse().ok()
            });
        }
    }
    all
}

/// The largest message there may be, but for its last byte.
fn nearly_whole() -> Bytes {
    let mut bytes = BytesMut::from(&message(&vec![7; MESSAGE])[..]);
    bytes.truncate(bytes.len() - 1);
    bytes.freeze()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_messages_of_many_connections_take_no_more_than_their_room() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    enqueue(&client, task("a")).await;
    assert!(daemon.log().contains("messages_mib=64"), "{}", daemon.log());
    // Half a GiB.
    let mut calls = flood(&daemon, ENQUEUE, &nearly_whole(), 8, 16).await;
    for _ in 0..50 {
        within("a small call beside them", enqueue(&client, task("a"))).await;
    }
    let mut refused = 0;
    while refused < 8 * 16 - 20 {
        let code = within("those without room are told", calls.join_next()).await;
        match code.expect("they are not all").expect("no panic") {
            Some(8) => refused += 1,
            // A slow machine takes all of its time to read them.
            Some(4) => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(refused > 0);
    let peak = peak_kib(&daemon);
    eprintln!("128 messages of 4 MiB, nearly whole: peak {} MiB", peak >> 10);
    assert!(peak < MOST_KIB, "{peak} KiB");
    drop(calls);
    // The daemon hears a moment later that they are gone.
    let big = ledgerd_client::v1::NewTask { payload: vec![7; 1 << 20].into(), ..task("a") };
    let taken = async {
        let again =
            || ledgerd_client::v1::EnqueueTaskRequest { task: Some(big.clone()), ..Default::default() };
        while let Err(status) = client.tasks().enqueue_task(again()).await {
            assert_eq!(reason(&status), "NO_ROOM", "{status:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within("there is room again", taken).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_frames_of_many_workers_take_no_more_than_their_room() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let mut streams = flood(&daemon, WORK, &nearly_whole(), 8, 16).await;
    for _ in 0..50 {
        within("a small call beside them", enqueue(&client, task("a"))).await;
    }
    // A stream has 5 s to say a whole Hello; by then all have sent what they may.
    let code = within("one without a Hello ends", streams.join_next()).await;
    assert_eq!(code.expect("they are not all").expect("no panic"), Some(4));
    let peak = peak_kib(&daemon);
    eprintln!("128 frames of 4 MiB, nearly whole: peak {} MiB", peak >> 10);
    assert!(peak < MOST_KIB, "{peak} KiB");
    drop(streams);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_of_very_many_things_is_refused_before_they_are_made() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let mut empty = BytesMut::new();
    while empty.len() < MESSAGE {
        // tasks, of no bytes
        empty.put_slice(&[0x0a, 0]);
    }
    let mut calls = flood(&daemon, ENQUEUE_MANY, &message(&empty), 4, 2).await;
    for _ in 0..8 {
        let code = within("it is refused", calls.join_next()).await;
        assert_eq!(code.expect("they are not all").expect("no panic"), Some(3));
    }
    enqueue(&client, task("a")).await;
    let peak = peak_kib(&daemon);
    eprintln!("8 messages of 2 Mi empty tasks: peak {} MiB", peak >> 10);
    assert!(peak < MOST_KIB, "{peak} KiB");
}
