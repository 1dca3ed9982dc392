//! Connections that are none, headers that are too many, streams over the limit: rows 1 to 30 of the table, and what the library
//! below would do by itself.

use super::alone::{bare, cpu, leave_descriptors};
use super::framing::{exchange, message, send};
use super::raw::*;
use crate::support::secure::Way;
use crate::support::sockets::Place;
use crate::support::*;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

both_ways!(
    what_does_not_speak_http_2_is_dropped,
    streams_are_limited_where_the_library_alone_has_no_limit,
    silent_connections_are_dropped_where_the_library_alone_keeps_them,
    requests_that_are_none_get_the_code_of_the_table,
    a_daemon_out_of_descriptors_waits_and_goes_on,
);

const GET_TASK: &str = "/ledger.v1.TaskService/GetTask";
const WAIT_TASK: &str = "/ledger.v1.TaskService/WaitTask";
/// A number of SETTINGS.
const MAX_CONCURRENT_STREAMS: u16 = 3;

/// Reads to the end of a connection; how long that took.
async fn dropped(socket: &mut (impl AsyncRead + Unpin)) -> Duration {
    let start = Instant::now();
    let mut heard = [0; 1_024];
    while matches!(within("it is dropped", socket.read(&mut heard)).await, Ok(bytes) if bytes > 0) {}
    start.elapsed()
}

async fn what_does_not_speak_http_2_is_dropped(way: Way) {
    let daemon = way.start();
    // The first bytes of a TLS handshake, and a request as browsers send it.
    let hello: &[u8] =
        &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9];
    let cases: [(&str, &[u8]); 2] =
        [("2 HTTP/1.1", b"GET / HTTP/1.1\r\nhost: ledger\r\n\r\n"), ("3 TLS hello", hello)];
    for (row, bytes) in cases {
        let mut socket = Place::of(&daemon).connect().await.expect("the daemon listens");
        socket.write_all(bytes).await.expect("it is sent");
        socket.flush().await.expect("it is sent");
        assert!(dropped(&mut socket).await < Duration::from_secs(5), "{row}");
    }
    let (_, status) = send(&Place::of(&daemon), GET_TASK, &[], message(&[])).await;
    assert_eq!(status, Some(3), "it still answers");
}

/// Streams that a server allows, as its first frame says.
async fn streams_allowed(place: &Place) -> Option<u32> {
    let mut raw = Raw::open(place).await.expect("it listens");
    let settings = within("its settings", raw.next_of(SETTINGS)).await.expect("it says them");
    settings.payload.chunks_exact(6).find_map(|setting| {
        let number = u16::from_be_bytes([setting[0], setting[1]]);
        let value = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
        (number == MAX_CONCURRENT_STREAMS).then_some(value)
    })
}

async fn streams_are_limited_where_the_library_alone_has_no_limit(way: Way) {
    let daemon = way.start();
    assert_eq!(streams_allowed(&bare().await).await, None, "tonic itself sets none");
    assert_eq!(streams_allowed(&Place::of(&daemon)).await, Some(1_024));
    // 30: those over it are refused, and the others go on.
    let mut raw = Raw::open(&Place::of(&daemon)).await.expect("the daemon listens");
    raw.next_of(SETTINGS).await.expect("its settings");
    raw.send(&frame(SETTINGS, ACK, 0, &[])).await.expect("sent");
    let headers = block(WAIT_TASK, &[]);
    for stream in 0..1_025 {
        raw.send(&frame(HEADERS, END_HEADERS, 2 * stream + 1, &headers)).await.expect("sent");
    }
    let refused = within("one is refused", raw.next_of(RST_STREAM)).await.expect("it is told");
    assert_eq!((refused.error(), refused.stream), (REFUSED_STREAM, 2 * 1_024 + 1));
    raw.send(&frame(PING, 0, 0, &[7; 8])).await.expect("sent");
    let pong = within("the others go on", raw.next_of(PING)).await.expect("an answer");
    assert_eq!(pong.flags, ACK);
}

async fn silent_connections_are_dropped_where_the_library_alone_keeps_them(way: Way) {
    let daemon = way.start();
    let mut kept = bare().await.plain().await.expect("it listens");
    let mut idle = Vec::new();
    for _ in 0..2_000 {
        idle.push(TcpStream::connect(&daemon.address).await.expect("the daemon listens"));
    }
    // One that says its preface a byte at a time.
    let mut slow = Place::of(&daemon).connect().await.expect("the daemon listens");
    slow.write_all(b"PRI").await.expect("sent");
    slow.flush().await.expect("sent");
    let client = daemon.client().await;
    for _ in 0..100 {
        enqueue(&client, task("a")).await;
    }
    for (at, socket) in idle.iter_mut().enumerate() {
        dropped(socket).await;
        if at == 0 {
            slow.write_all(b" ").await.expect("it is not over yet, or nobody has looked");
        }
    }
    dropped(&mut slow).await;
    enqueue(&client, task("a")).await;
    let mut heard = [0; 1_024];
    let ended = async { while matches!(kept.read(&mut heard).await, Ok(bytes) if bytes > 0) {} };
    let ended = tokio::time::timeout(Duration::from_millis(100), ended).await;
    assert!(ended.is_err(), "tonic itself would have ended it too");
}

async fn requests_that_are_none_get_the_code_of_the_table(way: Way) {
    let daemon = way.start();
    let place = Place::of(&daemon);
    let uri = format!("{}://{}{GET_TASK}", place.scheme(), place.address);
    let get = Request::builder().method(Method::GET).uri(uri).body(Full::new(Bytes::new()));
    assert_eq!(exchange(&Place::of(&daemon), get.expect("a request")).await.0, 405, "13 GET");
    let (_, status) = send(&Place::of(&daemon), "/ledger.v1.Nobody/GetTask", &[], message(&[])).await;
    assert_eq!(status, Some(12), "15 unknown service");
    let long = "v".repeat(20 << 10);
    let (http, _) = send(&Place::of(&daemon), GET_TASK, &[("long", &long)], message(&[])).await;
    assert_eq!(http, 431, "10 header list of 20 KiB");

    // 11: 80 KiB of headers, in frames as they have to be.
    let mut raw = Raw::open(&Place::of(&daemon)).await.expect("the daemon listens");
    let headers = block(GET_TASK, &[("long", &"v".repeat(80 << 10))]);
    let mut pieces = headers.chunks(16 << 10);
    let first = pieces.next().expect("there is one");
    let _ = raw.send(&frame(HEADERS, END_STREAM, 1, first)).await;
    for piece in pieces {
        // It may be over before all is sent.
        let _ = raw.send(&frame(CONTINUATION, 0, 1, piece)).await;
    }
    let end = within("11", raw.next_of(GOAWAY)).await.expect("it says why");
    assert_eq!(end.error(), ENHANCE_YOUR_CALM, "11 header list of 80 KiB");
}

async fn a_daemon_out_of_descriptors_waits_and_goes_on(way: Way) {
    let daemon = way.start();
    let client = daemon.client().await;
    enqueue(&client, task("a")).await;
    // Below what it was told at its start, so that accepting fails.
    leave_descriptors(daemon.pid(), 8);
    let (begun, busy) = (Instant::now(), cpu(daemon.pid()));
    let mut crowd = Vec::new();
    for _ in 0..64 {
        crowd.push(TcpStream::connect(&daemon.address).await.expect("the queue takes it"));
    }
    let failures = || daemon.log().matches("no connection can be taken").count();
    // The fifth comes 0.75 s after the first, all of which tonic alone spends on trying (`alone`).
    eventually("it runs out", async || (failures() >= 5).then_some(())).await;
    let (took, busy) = (begun.elapsed(), cpu(daemon.pid()) - busy);
    assert!(busy < took / 4, "{busy:?} of {took:?} spent on connections that cannot be taken");
    for _ in 0..50 {
        enqueue(&client, task("a")).await;
    }
    drop(crowd);
    let another = daemon.client().await;
    enqueue(&another, task("a")).await;
    // It waits longer each time: a loop that turns at once would fail thousands of times.
    assert!(failures() < 30, "{}", failures());
}
