//! A bare tonic server: the cost of a call with nothing behind it.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::task::{Context, Poll};

use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::daemon::cannot;
use crate::failure::{Exit, Failure};
use crate::output::print;

/// Serves every path of the ledger's TaskService with `answer`, on a port of its own choice that it says first.
///
/// # Errors
/// When it cannot listen.
pub(super) async fn serve<Q, A>(answer: fn(Q) -> A) -> Result<(), Failure>
where
    Q: prost::Message + Default + 'static,
    A: prost::Message + Default + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| cannot("listen", &error))?;
    let address = listener.local_addr().map_err(|error| cannot("listen", &error))?;
    print(&format!("{address}\n"))?;
    let served = Server::builder()
        .add_service(Echo { answer, of: PhantomData })
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await;
    served.map_err(|error| Failure::new(Exit::Failure, format!("the echo ended: {error}")))
}

struct Echo<Q, A> {
    answer: fn(Q) -> A,
    of: PhantomData<fn(Q) -> A>,
}

impl<Q, A> Clone for Echo<Q, A> {
    fn clone(&self) -> Self {
        Self { answer: self.answer, of: PhantomData }
    }
}

impl<Q, A> NamedService for Echo<Q, A> {
    const NAME: &'static str = "ledger.v1.TaskService";
}

impl<Q: 'static, A: 'static> UnaryService<Q> for Echo<Q, A> {
    type Response = A;
    type Future = std::future::Ready<Result<Response<A>, Status>>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        std::future::ready(Ok(Response::new((self.answer)(request.into_inner()))))
    }
}

impl<Q, A> tonic::codegen::Service<http::Request<Body>> for Echo<Q, A>
where
    Q: prost::Message + Default + 'static,
    A: prost::Message + Default + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = tonic::codegen::BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let echo = self.clone();
        Box::pin(async move { Ok(Grpc::new(ProstCodec::<A, Q>::default()).unary(echo, request).await) })
    }
}
