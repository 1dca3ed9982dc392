//! Bytes that are no gRPC.

use super::room::unended;
use crate::support::secure::Way;
use crate::support::sockets::Place;
use crate::support::*;
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use ledgerd_client::v1::task_service_client::TaskServiceClient;
use ledgerd_client::v1::{EnqueueTaskRequest, NewTask};
use prost::Message;
use std::convert::Infallible;
use tonic::Code;

both_ways!(
    malformed_frames_get_the_code_of_the_table,
    a_call_that_says_more_than_its_message_is_refused_before_it_ends,
    gzip_and_zstd_are_taken,
    a_message_that_grows_beyond_the_limit_when_unpacked_is_refused,
    reflection_is_on_where_the_ledger_is_and_off_beside_it,
);

const GET_TASK: &str = "/ledger.v1.TaskService/GetTask";
const ENQUEUE: &str = "/ledger.v1.TaskService/EnqueueTask";

/// Sends a body as it is. Returns the HTTP status and the gRPC status, from headers or trailers.
///
/// Straight over HTTP/2: tonic's client obeys a `grpc-timeout` itself and would not let a bad one out.
pub(super) async fn send(
    place: &Place,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> (u16, Option<i32>) {
    let uri = format!("{}://{}{path}", place.scheme(), place.address);
    let mut request = Request::post(uri).header("te", "trailers");
    if !headers.iter().any(|(name, _)| *name == "content-type") {
        request = request.header("content-type", "application/grpc");
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    exchange(place, request.body(Full::new(body)).expect("it is a request")).await
}

/// As [`send`], any request.
pub(super) async fn exchange<B>(place: &Place, request: Request<B>) -> (u16, Option<i32>)
where
    B: hyper::body::Body<Data = Bytes, Error = Infallible> + Send + Unpin + 'static,
{
    let socket = place.connect().await.expect("the daemon listens");
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
            .await
            .expect("the daemon speaks HTTP/2");
    let connection = tokio::spawn(connection);
    let response = within("an answer", sender.send_request(request)).await.expect("an answer comes");
    let status = |headers: &HeaderMap| {
        headers.get("grpc-status").and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok())
    };
    let (parts, body) = response.into_parts();
    let in_headers = status(&parts.headers);
    let trailers = body.collect().await.ok().and_then(|body| body.trailers().cloned());
    connection.abort();
    (parts.status.as_u16(), in_headers.or_else(|| trailers.as_ref().and_then(status)))
}

/// Row, headers, body, and the code it gets.
type Case = (&'static str, &'static [(&'static str, &'static str)], Bytes, i32);

fn frame(flag: u8, length: u32, bytes: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(flag);
    frame.put_u32(length);
    frame.put_slice(bytes);
    frame.freeze()
}

pub(super) fn message(bytes: &[u8]) -> Bytes {
    frame(0, bytes.len() as u32, bytes)
}

async fn malformed_frames_get_the_code_of_the_table(way: Way) {
    let daemon = way.start();
    let over = vec![0_u8; (4 << 20) + 1];
    // Depth 101 of nested groups: protobuf's own limit is 100.
    let nested: Vec<u8> = std::iter::repeat_n(0x0b, 101).collect();
    let cases: Vec<Case> = vec![
        ("17 length prefix 2^31", &[], frame(0, 1 << 31, &[]), 11),
        ("18 one byte over the limit", &[], frame(0, over.len() as u32, &over), 11),
        ("19 truncated message", &[], frame(0, 10, &[1, 2]), 13),
        ("20 compressed flag without encoding", &[], frame(1, 1, &[0]), 13),
        ("21 flag 7", &[], frame(7, 1, &[0]), 13),
        ("22 grpc-encoding br", &[("grpc-encoding", "br")], message(&[]), 12),
        ("24 random bytes", &[], message(&[0xff, 0x13, 0x37, 0xfe, 0xff]), 13),
        ("25 nesting 101", &[], message(&nested), 13),
        ("26 invalid UTF-8", &[], message(&[0x0a, 0x02, 0xff, 0xfe]), 13),
        ("27 no message", &[], Bytes::new(), 13),
        ("27 two messages", &[], [message(&[]), message(&[])].concat().into(), 13),
        ("28 grpc-timeout abc", &[("grpc-timeout", "abc")], message(&[]), 3),
        ("29 grpc-timeout 0n", &[("grpc-timeout", "0n")], message(&[]), 4),
        ("14 unknown method", &[], message(&[]), 12),
    ];
    for (row, headers, body, code) in cases {
        let path = if row.starts_with("14") { "/ledger.v1.TaskService/Nothing" } else { GET_TASK };
        let (_, status) = send(&Place::of(&daemon), path, headers, body).await;
        assert_eq!(status, Some(code), "{row}");
    }
    let (http, _) =
        send(&Place::of(&daemon), GET_TASK, &[("content-type", "text/plain")], message(&[])).await;
    assert_eq!(http, 415, "12 content-type text/plain");
    let stats = daemon.client().await.admin().get_stats(ledgerd_client::v1::GetStatsRequest {}).await;
    assert_eq!(stats.expect("it still answers").into_inner().transitions, 0);
}

async fn a_call_that_says_more_than_its_message_is_refused_before_it_ends(way: Way) {
    let daemon = way.start();
    let place = Place::of(&daemon);
    // The second has only begun, and neither it nor the call comes to an end: tonic alone would read on for ever.
    let body = [&message(&[])[..], &[0]].concat().into();
    for path in [
        "/ledger.v1.TaskService/WaitTask",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/externalscaler.ExternalScaler/StreamIsActive",
    ] {
        let request = Request::post(format!("{}://{}{path}", place.scheme(), place.address))
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .body(Box::pin(unended(&body)))
            .expect("a request");
        let (_, status) = exchange(&place, request).await;
        assert_eq!(status, Some(13), "{path}");
    }
}

async fn gzip_and_zstd_are_taken(way: Way) {
    use tonic::codec::CompressionEncoding::{Gzip, Zstd};
    let daemon = way.start();
    let channel = daemon.client().await.connection();
    for encoding in [Gzip, Zstd] {
        let client = TaskServiceClient::new(channel.clone());
        let mut client = client.send_compressed(encoding).accept_compressed(encoding);
        let request = EnqueueTaskRequest { task: Some(task("a")), request_id: String::new() };
        // Row 23 has it disabled, which it is not here: both are taken, with a bound on what they unpack to.
        let stored = client.enqueue_task(request).await.expect("23: gzip and zstd are on");
        assert!(stored.into_inner().created);
    }
}

async fn a_message_that_grows_beyond_the_limit_when_unpacked_is_refused(way: Way) {
    use tonic::codec::CompressionEncoding::{Gzip, Zstd};
    let daemon = way.start();
    let channel = daemon.client().await.connection();
    for encoding in [Gzip, Zstd] {
        let mut client = TaskServiceClient::new(channel.clone()).send_compressed(encoding);
        let bomb = NewTask { payload: vec![0; 64 << 20].into(), ..task("a") };
        let request = EnqueueTaskRequest { task: Some(bomb), request_id: String::new() };
        assert!(request.encoded_len() > 4 << 20);
        let refused = client.enqueue_task(request).await.expect_err("64 MiB in a few KiB");
        assert!(matches!(refused.code(), Code::OutOfRange | Code::ResourceExhausted), "{refused}");
    }
    let (_, status) = send(&Place::of(&daemon), ENQUEUE, &[], message(&[])).await;
    assert_eq!(status, Some(3), "it still answers");
}

async fn reflection_is_on_where_the_ledger_is_and_off_beside_it(way: Way) {
    let daemon = way.start_with(&["--http-listen", "127.0.0.1:0"]);
    let beside = Place { address: daemon.http.clone().expect("it listens"), tls: None };
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        // Field 7: list the services. The design has reflection on, so row 16 is about the port of probes alone.
        let list = message(&[0x3a, 0x00]);
        let (_, status) = send(&Place::of(&daemon), &path, &[], list.clone()).await;
        assert_eq!(status, Some(0), "{version}");
        let (_, status) = send(&beside, &path, &[], list).await;
        assert_eq!(status, Some(12), "16 reflection when off, {version}");
    }
}
