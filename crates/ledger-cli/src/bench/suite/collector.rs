//! Where a daemon's spans go to be counted: an OTLP receiver that keeps nothing.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use prost::encoding::{WireType, decode_key, decode_varint};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic::codegen::{BoxFuture, Service};
use tonic::server::{NamedService, UnaryService};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

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

/// A request as it came.
#[derive(Clone, Copy, Debug, Default)]
struct Unread;

impl Codec for Unread {
    type Encode = Taken;
    type Decode = Bytes;
    type Encoder = <ProstCodec<Taken, Taken> as Codec>::Encoder;
    type Decoder = Self;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<Taken, Taken>::default().encoder()
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Decoder for Unread {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Nothing was refused.
#[derive(Clone, PartialEq, prost::Message)]
struct Taken {}

/// Serves until it is dropped.
pub(super) struct Collector {
    pub(super) address: String,
    spans: Arc<AtomicU64>,
    serving: JoinHandle<()>,
}

impl Collector {
    /// On a port of its own choice.
    ///
    /// # Errors
    /// When it cannot listen.
    pub(super) async fn start() -> Result<Self, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| cannot("listen", &error))?;
        let address = listener.local_addr().map_err(|error| cannot("listen", &error))?.to_string();
        let spans = Arc::<AtomicU64>::default();
        let service = Counting { spans: Arc::clone(&spans) };
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let serving = Server::builder().add_service(service).serve_with_incoming(incoming);
        // It ends with us; a daemon that it is gone for loses spans, which is what is counted.
        let serving = tokio::spawn(async move { drop(serving.await) });
        Ok(Self { address, spans, serving })
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

#[derive(Clone)]
struct Counting {
    spans: Arc<AtomicU64>,
}

impl NamedService for Counting {
    const NAME: &'static str = "opentelemetry.proto.collector.trace.v1.TraceService";
}

impl UnaryService<Bytes> for Counting {
    type Response = Taken;
    type Future = Ready<Result<Response<Taken>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let counted = spans(request.get_ref()).map(|spans| self.spans.fetch_add(spans, Ordering::Relaxed));
        let taken = counted.ok_or_else(|| Status::invalid_argument("these are no spans"));
        ready(taken.map(|_| Response::new(Taken {})))
    }
}

impl Service<http::Request<Body>> for Counting {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let own = self.clone();
        // A batch of spans may be larger than a message usually is.
        let grpc = tonic::server::Grpc::new(Unread);
        let mut grpc = grpc.max_decoding_message_size(64 << 20);
        Box::pin(async move { Ok(grpc.unary(own, request).await) })
    }
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
