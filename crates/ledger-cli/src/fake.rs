//! A daemon that says what a test tells it to, over a real connection.
//!
//! Calls and streams pass as bytes, so it needs no generated server.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::{Buf, BufMut};
use ledgerd_client::v1::work_request::Frame as In;
use ledgerd_client::v1::work_response::Frame as Out;
use ledgerd_client::v1::{WorkRequest, WorkResponse};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};

use crate::{Format, Global};

/// Method and request of each call.
type Calls = Arc<Mutex<Vec<(String, Vec<u8>)>>>;
type Answer = Result<Vec<u8>, Status>;
type Script = Arc<dyn Fn(&str, &[u8]) -> Answer + Send + Sync>;

/// A running fake. Ends with the test's runtime.
pub(crate) struct Fake {
    address: SocketAddr,
    calls: Calls,
    /// Streams of workers, as they come.
    pub(crate) sessions: mpsc::UnboundedReceiver<Session>,
}

/// The daemon's end of a worker's stream.
pub(crate) struct Session {
    from_worker: Streaming<Vec<u8>>,
    to_worker: mpsc::UnboundedSender<Result<Vec<u8>, Status>>,
}

impl Session {
    pub(crate) fn say(&self, frame: Out) {
        let frame = WorkResponse { frame: Some(frame) };
        self.to_worker.send(Ok(frame.encode_to_vec())).expect("the stream is open");
    }

    /// The next frame of the worker.
    pub(crate) async fn hear(&mut self) -> In {
        let bytes = self.from_worker.message().await.expect("a frame").expect("the stream goes on");
        WorkRequest::decode(bytes.as_slice()).expect("a frame").frame.expect("content")
    }
}

struct Sessions(Arc<mpsc::UnboundedSender<Session>>);

impl StreamingService<Vec<u8>> for Sessions {
    type Response = Vec<u8>;
    type ResponseStream = UnboundedReceiverStream<Result<Vec<u8>, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let (to_worker, receiver) = mpsc::unbounded_channel();
        let _ = self.0.send(Session { from_worker: request.into_inner(), to_worker });
        Box::pin(async move { Ok(Response::new(UnboundedReceiverStream::new(receiver))) })
    }
}

impl Fake {
    /// `script` gets the name of the method and the encoded request.
    pub(crate) async fn start(script: impl Fn(&str, &[u8]) -> Answer + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let calls = Calls::default();
        let (say, sessions) = mpsc::unbounded_channel();
        let service =
            Scripted { script: Arc::new(script), calls: Arc::clone(&calls), sessions: Arc::new(say) };
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().serve_with_incoming(service, incoming));
        Self { address, calls, sessions }
    }

    pub(crate) fn global(&self, output: Format) -> Global {
        Global { address: self.address.to_string(), output, ..Global::default() }
    }

    /// The requests that came to a method, in order.
    pub(crate) fn requests<M: Message + Default>(&self, method: &str) -> Vec<M> {
        let calls = self.calls.lock().expect("no panic");
        let of_method = calls.iter().filter(|(name, _)| name == method);
        of_method.map(|(_, bytes)| M::decode(bytes.as_slice()).expect("a request")).collect()
    }
}

#[derive(Clone)]
struct Scripted {
    script: Script,
    calls: Calls,
    sessions: Arc<mpsc::UnboundedSender<Session>>,
}

impl NamedService for Scripted {
    const NAME: &'static str = "ledger.v1";
}

impl Service<http::Request<tonic::body::Body>> for Scripted {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        if request.uri().path().ends_with("/Work") {
            let sessions = Sessions(Arc::clone(&self.sessions));
            return Box::pin(async move { Ok(Grpc::new(Bytes).streaming(sessions, request).await) });
        }
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let unary = Unary { method, scripted: self.clone() };
        Box::pin(async move { Ok(Grpc::new(Bytes).unary(unary, request).await) })
    }
}

struct Unary {
    method: String,
    scripted: Scripted,
}

impl UnaryService<Vec<u8>> for Unary {
    type Response = Vec<u8>;
    type Future = BoxFuture<Response<Vec<u8>>, Status>;

    fn call(&mut self, request: Request<Vec<u8>>) -> Self::Future {
        let request = request.into_inner();
        let answer = (self.scripted.script)(&self.method, &request);
        self.scripted.calls.lock().expect("no panic").push((self.method.clone(), request));
        Box::pin(async move { answer.map(Response::new) })
    }
}

/// Messages as the bytes they are.
#[derive(Clone, Copy)]
struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}
