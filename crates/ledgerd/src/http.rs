//! The plain HTTP port: `/livez` and `/readyz`, for probes that speak no gRPC, and `/metrics`.
//!
//! Nothing here says anything about tasks, so it may listen anywhere. Small on purpose: HTTP/1.1, short requests, a cap
//! on connections.

use crate::ledger::Handle;
use crate::server::Health;
use crate::telemetry::Telemetry;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Probes are few; whoever opens more waits.
const CONNECTIONS: usize = 256;
/// A request's head arrives within this time.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// Pause after an accept that failed.
const PAUSE: Duration = Duration::from_millis(500);

/// Serves until `stop` is cancelled.
pub(crate) async fn serve(listener: TcpListener, about: About, stop: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
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
            let service = service_fn(|request: Request<Incoming>| {
                let about = about.clone();
                async move {
                    Ok::<_, Infallible>(match request.uri().path() {
                        "/metrics" if request.method() == Method::GET => about.metrics().await,
                        _ => answer(&request, &about.health),
                    })
                }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_WITHIN)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

/// What there is to tell of.
#[derive(Clone)]
pub(crate) struct About {
    pub(crate) health: Health,
    pub(crate) telemetry: Arc<Telemetry>,
    pub(crate) handle: Handle,
}

impl About {
    async fn metrics(&self) -> Response<Full<Bytes>> {
        let meters = &self.telemetry.meters;
        meters.look_at(&self.handle).await;
        match meters.text() {
            Ok(metrics) => text(StatusCode::OK, metrics),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}

fn answer<B>(request: &Request<B>, health: &Health) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "use GET\n".to_owned());
    }
    let verbose = request.uri().query().is_some_and(|query| query.split('&').any(|part| part == "verbose"));
    match request.uri().path() {
        "/livez" => text(StatusCode::OK, "ok\n".to_owned()),
        "/readyz" => {
            let (code, word) = if health.is_ready() {
                (StatusCode::OK, "ok")
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, "not ready")
            };
            let mut body = String::new();
            if verbose {
                for (name, good) in health.checks() {
                    let _ = writeln!(body, "[{}] {name}", if good { '+' } else { '-' });
                }
            }
            text(code, body + word + "\n")
        }
        _ => text(StatusCode::NOT_FOUND, "there are /livez, /readyz and /metrics\n".to_owned()),
    }
}

fn text(code: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn probes_say_whether_work_is_taken() {
        let health = Health::started().await;
        let ask = async |path: &str| {
            let response = answer(&Request::get(path).body(()).expect("a request"), &health);
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
    }
}
