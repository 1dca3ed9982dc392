//! Where a daemon's spans go to be counted: an OTLP receiver that keeps nothing.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::{NamedService, UnaryService};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::daemon::cannot;
use crate::failure::Failure;

/// As much of opentelemetry/proto/collector/trace/v1/trace_service.proto as it takes to count spans.
#[derive(Clone, PartialEq, prost::Message)]
struct Export {
    #[prost(message, repeated, tag = "1")]
    resources: Vec<OfResource>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct OfResource {
    #[prost(message, repeated, tag = "2")]
    scopes: Vec<OfScope>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct OfScope {
    #[prost(bytes = "bytes", repeated, tag = "2")]
    spans: Vec<Bytes>,
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

impl UnaryService<Export> for Counting {
    type Response = Taken;
    type Future = Ready<Result<Response<Taken>, Status>>;

    fn call(&mut self, request: Request<Export>) -> Self::Future {
        let scopes = request.get_ref().resources.iter().flat_map(|resource| &resource.scopes);
        let spans: usize = scopes.map(|scope| scope.spans.len()).sum();
        self.spans.fetch_add(spans as u64, Ordering::Relaxed);
        ready(Ok(Response::new(Taken {})))
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
        let grpc = tonic::server::Grpc::new(ProstCodec::<Taken, Export>::default());
        let mut grpc = grpc.max_decoding_message_size(64 << 20);
        Box::pin(async move { Ok(grpc.unary(own, request).await) })
    }
}
