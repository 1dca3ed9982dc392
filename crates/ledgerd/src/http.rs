//! The plain HTTP port: `/livez` and `/readyz` over HTTP/1.1 and `grpc.health.v1` over HTTP/2 without TLS, for probes, and
//! `/metrics`.
//!
//! Nothing here says anything about single tasks, so it may listen anywhere. Small on purpose: no reflection, short requests, small
//! buffers, a cap on connections and on their age.

use crate::grpc::status::Refused;
use crate::ledger::Handle;
use crate::server::Health;
use crate::telemetry::Telemetry;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tower::{Service, ServiceExt};

/// Probes are few; whoever opens more waits.
const CONNECTIONS: usize = 256;
/// A request's head arrives within this time, and the first one of a connection too, whatever it speaks.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// Connections are closed at this age, so that nobody keeps a slot for ever; whoever watches comes back.
const AGE: Duration = Duration::from_secs(15 * 60);
/// How long a connection has to end when it is told to.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Streams of one connection of HTTP/2.
const STREAMS: u32 = 16;
/// A peer that does not answer pings is gone after both.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of one connection that wait in memory, in either direction.
const BUFFER: usize = 16 << 10;
/// Resets after which a connection is closed, of streams not yet taken up and of those its errors make us send.
const RESETS: usize = 20;
/// Pause after an accept that failed.
const PAUSE: Duration = Duration::from_millis(500);

/// Serves until `stop` is cancelled, and connections have ended with it.
pub(crate) async fn serve(listener: TcpListener, about: About, stop: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            next = next => next,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "no connection can be taken on the HTTP port");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let (about, stop) = (about.clone(), stop.clone());
        tokio::spawn(async move {
            let _slot = slot;
            connection(stream, &about, &stop).await;
        });
    }
    drop(listener);
    let _ = slots.acquire_many(CONNECTIONS as u32).await;
}

/// What there is to tell of.
#[derive(Clone)]
pub(crate) struct About {
    pub(crate) health: Health,
    /// What is counted, and whom to ask for what is now; without them there is no `/metrics`.
    pub(crate) metrics: Option<(Arc<Telemetry>, Handle)>,
}

impl About {
    async fn metrics(&self) -> Response<Body> {
        let Some((telemetry, handle)) = &self.metrics else { return nothing() };
        telemetry.meters.look_at(handle).await;
        match telemetry.meters.text() {
            Ok(metrics) => text(StatusCode::OK, metrics),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}

/// Serves one connection to its end.
async fn connection(stream: TcpStream, about: &About, stop: &CancellationToken) {
    let asked = Notify::new();
    let service = service_fn(|request: Request<Incoming>| {
        asked.notify_one();
        let (about, stop) = (about.clone(), stop.clone());
        async move {
            Ok::<_, Infallible>(match request.uri().path() {
                "/metrics" if request.method() == Method::GET => about.metrics().await,
                _ => answer(request.map(Body::new), &about.health, &stop).await,
            })
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(BUFFER);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(BUFFER as u32)
        .max_frame_size(BUFFER as u32)
        .max_send_buf_size(BUFFER)
        .initial_stream_window_size(BUFFER as u32)
        .initial_connection_window_size(4 * BUFFER as u32)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(RESETS)
        .keep_alive_interval(KEEPALIVE_EVERY)
        .keep_alive_timeout(KEEPALIVE_WITHIN);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    // The builder waits for the first bytes, to see what is spoken, without a limit of its own.
    let silent = async {
        if tokio::time::timeout(HEAD_WITHIN, asked.notified()).await.is_ok() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        _ = connection.as_mut() => return,
        () = silent => return,
        () = tokio::time::sleep(AGE) => {}
        () = stop.cancelled() => {}
    }
    // What was answered leaves: whoever watches hears of the drain.
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(LAST_WORDS, connection).await;
}

/// What probes ask.
async fn answer(request: Request<Body>, health: &Health, stop: &CancellationToken) -> Response<Body> {
    let path = request.uri().path();
    if path.starts_with("/grpc.health.v1.Health/") {
        let mut service = health.gated_service(stop);
        let Ok(service) = ServiceExt::<Request<Body>>::ready(&mut service).await;
        let Ok(response) = service.call(request).await;
        return response;
    }
    let content = request.headers().get(header::CONTENT_TYPE).map_or(&[][..], HeaderValue::as_bytes);
    if request.method() == Method::POST && content.starts_with(b"application/grpc") {
        // Clients of gRPC would make something else of an answer of HTTP.
        return Status::from(Refused::UnknownMethod).into_http();
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "use GET\n".to_owned());
    }
    match path {
        "/livez" if health.is_alive() => text(StatusCode::OK, "ok\n".to_owned()),
        "/livez" => text(StatusCode::SERVICE_UNAVAILABLE, "stuck\n".to_owned()),
        "/readyz" => readiness(health, request.uri().query().unwrap_or_default()),
        _ => nothing(),
    }
}

fn nothing() -> Response<Body> {
    text(StatusCode::NOT_FOUND, "there are /livez, /readyz and /metrics\n".to_owned())
}

/// Whether work is taken, and with `verbose` why not.
fn readiness(health: &Health, query: &str) -> Response<Body> {
    let (code, word) = if health.is_ready() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready")
    };
    let mut body = String::new();
    if query.split('&').any(|part| part == "verbose") {
        for (name, good) in health.checks() {
            let _ = writeln!(body, "[{}] {name}", if good { '+' } else { '-' });
        }
    }
    text(code, body + word + "\n")
}

fn text(code: StatusCode, body: String) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::new(Bytes::from(body))));
    *response.status_mut() = code;
    let plain = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::health_client::HealthClient;

    #[tokio::test]
    async fn probes_say_whether_work_is_taken() {
        let health = Health::started().await;
        let stop = CancellationToken::new();
        let ask = async |path: &str| {
            let request = Request::get(path).body(Body::empty()).expect("a request");
            let response = answer(request, &health, &stop).await;
            let code = response.status().as_u16();
            let body = response.into_body().collect().await.expect("a body").to_bytes();
            (code, String::from_utf8_lossy(&body).into_owned())
        };
        assert_eq!(ask("/livez").await, (200, "ok\n".to_owned()));
        assert_eq!(ask("/readyz").await, (200, "ok\n".to_owned()));
        assert_eq!(ask("/").await.0, 404);
        health.drain().await;
        assert_eq!(ask("/livez").await.0, 200);
        let (code, body) = ask("/readyz?verbose").await;
        assert_eq!((code, body.as_str()), (503, "[+] ledger commits\n[-] not draining\nnot ready\n"));
        health.alive(false).await;
        assert_eq!(ask("/livez").await, (503, "stuck\n".to_owned()));
        assert_eq!(ask("/grpc.health.v1.Health/Check").await.0, 405, "that is asked over gRPC");
    }

    #[tokio::test]
    async fn one_port_speaks_http_and_grpc_and_lets_nobody_be_silent() {
        let health = Health::started().await;
        let stop = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let served =
            tokio::spawn(serve(listener, About { health: health.clone(), metrics: None }, stop.clone()));
        let plain = async |said: &'static [u8]| {
            let mut stream = TcpStream::connect(address).await.expect("it listens");
            stream.write_all(said).await.expect("it reads");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("it answers and ends");
            answer
        };
        let answer = plain(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"), "{answer}");
        let endpoint =
            tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let mut client = HealthClient::new(endpoint.connect().await.expect("it speaks HTTP/2"));
        let mut check = async |service: &str| {
            let request = HealthCheckRequest { service: service.to_owned() };
            client.check(request).await.map(|answer| answer.into_inner().status())
        };
        for name in ["", "liveness", "readiness", "startup", "ledger.v1.TaskService"] {
            assert_eq!(check(name).await.expect("known"), ServingStatus::Serving, "{name}");
        }
        assert_eq!(check("nothing").await.expect_err("unknown").code(), tonic::Code::NotFound);
        health.drain().await;
        assert_eq!(check("readiness").await.expect("known"), ServingStatus::NotServing);
        assert_eq!(check("liveness").await.expect("known"), ServingStatus::Serving);
        let start = tokio::time::Instant::now();
        // One that says nothing, and one that began to speak.
        assert_eq!(tokio::join!(plain(b""), plain(b"PRI * HT")), (String::new(), String::new()));
        assert!(start.elapsed() >= HEAD_WITHIN, "it was given its time");
        stop.cancel();
        served.await.expect("it ends");
    }
}
