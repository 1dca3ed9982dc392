//! A bare tonic server and its callers: the cost of a call with nothing behind it.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use ledgerd_client::v1::{EnqueueTaskRequest, NewTask};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::{NamedService, UnaryService};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::super::machine::Spent;
use super::super::{Args as Load, TASK_TYPE};
use super::yardstick::Figure;
use crate::daemon::cannot;
use crate::failure::{Exit, Failure};
use crate::output::print;

/// Windows as the daemon and its client have them.
const STREAM: u32 = 1 << 20;
const CONNECTION: u32 = 4 << 20;

type Codec = ProstCodec<EnqueueTaskRequest, EnqueueTaskRequest>;

const PATH: PathAndQuery = PathAndQuery::from_static("/ledgerd.bench.Echo/Echo");

/// Serves on a port of its own choice, which it says first.
///
/// # Errors
/// When it cannot listen.
pub(super) async fn serve() -> Result<(), Failure> {
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| cannot("listen", &error))?;
    let address = listener.local_addr().map_err(|error| cannot("listen", &error))?;
    print(&format!("{address}\n"))?;
    let mut server =
        Server::builder().initial_stream_window_size(STREAM).initial_connection_window_size(CONNECTION);
    let served = server.add_service(Echo);
    let served = served.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))).await;
    served.map_err(|error| Failure::new(Exit::Failure, format!("the echo ended: {error}")))
}

/// Calls a second, as `load` says: callers, connections, payload, duration. The CPU time is the server's and the callers'.
///
/// # Errors
/// When a call fails.
pub(super) async fn call(address: &str, server: u32, load: &Load) -> Result<Figure, Failure> {
    let failed =
        |error: &dyn std::fmt::Display| Failure::new(Exit::Failure, format!("the echo failed: {error}"));
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| failed(&error))?;
    let endpoint = endpoint.initial_stream_window_size(STREAM).initial_connection_window_size(CONNECTION);
    let mut connections = Vec::new();
    for _ in 0..load.connections.min(load.callers) {
        connections.push(endpoint.connect().await.map_err(|error| failed(&error))?);
    }
    let task = NewTask {
        agent: load.agent.clone(),
        task_type: TASK_TYPE.into(),
        payload: Bytes::from(vec![b'x'; load.payload as usize]),
        ..NewTask::default()
    };
    let request = EnqueueTaskRequest { task: Some(task), request_id: String::new() };
    let both = [server, std::process::id()];
    let before = both.map(Spent::read);
    let (began, end) = (Instant::now(), Instant::now() + load.duration.0);
    let mut callers = JoinSet::new();
    for (_, channel) in (0..load.callers).zip(connections.iter().cycle()) {
        callers.spawn(one(channel.clone(), request.clone(), end));
    }
    let mut calls = 0;
    while let Some(one) = callers.join_next().await {
        calls += one.expect("a caller does not panic").map_err(|status| failed(&status))?;
    }
    let value = calls as f64 / began.elapsed().as_secs_f64();
    let spent = std::iter::zip(both, before).map(|(process, before)| Spent::read(process).since(&before).cpu);
    let spent: Option<Duration> = spent.sum();
    Ok(Figure { value, cpu_us: spent.map(|cpu| cpu.as_secs_f64() * 1e6 / (calls as f64).max(1.0)) })
}

async fn one(channel: Channel, request: EnqueueTaskRequest, end: Instant) -> Result<u64, Status> {
    let mut client = tonic::client::Grpc::new(channel);
    let mut calls = 0;
    while Instant::now() < end {
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        client.unary(Request::new(request.clone()), PATH, Codec::default()).await?;
        calls += 1;
    }
    Ok(calls)
}

#[derive(Clone)]
struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "ledgerd.bench.Echo";
}

impl UnaryService<EnqueueTaskRequest> for Echo {
    type Response = EnqueueTaskRequest;
    type Future = Ready<Result<Response<EnqueueTaskRequest>, Status>>;

    fn call(&mut self, request: Request<EnqueueTaskRequest>) -> Self::Future {
        ready(Ok(Response::new(request.into_inner())))
    }
}

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move { Ok(tonic::server::Grpc::new(Codec::default()).unary(Self, request).await) })
    }
}
