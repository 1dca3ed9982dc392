//! Where a daemon's spans go to be counted: an OTLP receiver that keeps nothing.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use prost::encoding::{WireType, decode_key, decode_varint};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use crate::daemon::cannot;
use crate::failure::Failure;

/// Spans of an `ExportTraceServiceRequest` (opentelemetry/proto/collector/trace/v1/trace_service.proto): lengths are read
/// and what they are of is passed over, so that what is measured is the daemon and hardly this.
fn spans(request: &[u8]) -> Option<u64> {
    let mut spans = 0;
    for resource in fields(request, RESOURCE_SPANS)? {
        for scope in fields(resource, SCOPE_SPANS)? {
            spans += fields(scope, SPANS)?.len() as u64;
        }
    }
    Some(spans)
}

const RESOURCE_SPANS: u32 = 1;
const SCOPE_SPANS: u32 = 2;
const SPANS: u32 = 2;

/// What stands in the fields of this number; all fields on the way down have a length. None where it is no such message.
fn fields(mut message: &[u8], wanted: u32) -> Option<Vec<&[u8]>> {
    let mut found = Vec::new();
    while !message.is_empty() {
        let (number, kind) = decode_key(&mut message).ok()?;
        let length = usize::try_from(decode_varint(&mut message).ok()?).ok()?;
        let (field, rest) = message.split_at_checked(length).filter(|_| kind == WireType::LengthDelimited)?;
        message = rest;
        if number == wanted {
            found.push(field);
        }
    }
    Some(found)
}

/// Serves until it is dropped.
pub(super) struct Collector {
    pub(super) endpoint: String,
    spans: Arc<AtomicU64>,
    serving: JoinHandle<()>,
}

impl Collector {
    /// Over HTTP, as exporters do it that are told nothing else, on a port of its own choice.
    ///
    /// # Errors
    /// When it cannot listen.
    pub(super) async fn start() -> Result<Self, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| cannot("listen", &error))?;
        let address = listener.local_addr().map_err(|error| cannot("listen", &error))?;
        let spans = Arc::<AtomicU64>::default();
        let serving = tokio::spawn(serve(listener, Arc::clone(&spans)));
        Ok(Self { endpoint: format!("http://{address}/v1/traces"), spans, serving })
    }

    /// Spans that have come.
    pub(super) fn spans(&self) -> u64 {
        self.spans.load(Ordering::Relaxed)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// A daemon whose connection breaks loses spans, which is what is counted.
async fn serve(listener: TcpListener, spans: Arc<AtomicU64>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let spans = Arc::clone(&spans);
        let service = service_fn(move |request| count(request, Arc::clone(&spans)));
        connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

async fn count(
    request: Request<Incoming>,
    sum: Arc<AtomicU64>,
) -> Result<Response<Empty<Bytes>>, Infallible> {
    let body = request.into_body().collect().await.ok();
    let counted = body.and_then(|body| spans(&body.to_bytes()));
    let mut response = Response::new(Empty::new());
    match counted {
        Some(spans) => {
            sum.fetch_add(spans, Ordering::Relaxed);
        }
        None => *response.status_mut() = StatusCode::BAD_REQUEST,
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field with a length, of less than 128 bytes.
    fn field(number: u8, body: &[&[u8]]) -> Vec<u8> {
        let body = body.concat();
        [&[number << 3 | 2, body.len() as u8], body.as_slice()].concat()
    }

    #[test]
    fn spans_are_counted_and_nothing_else() {
        let span = |name: &[u8]| field(2, &[&field(5, &[name])]);
        let scope = field(2, &[&field(1, &[b"scope"]), &span(b"a"), &span(b"b"), &field(3, &[b"schema"])]);
        let other = field(2, &[&span(b"c")]);
        let request = [field(1, &[&field(1, &[b"resource"]), &scope, &other]), field(1, &[&other])].concat();
        assert_eq!(spans(&request), Some(4));
        assert_eq!(spans(b""), Some(0));
        assert_eq!(spans(&request[..request.len() - 1]), None);
        assert_eq!(spans(b"no message"), None);
    }
}
