//! Asks of every call who makes it and whether they may, before anything of it is read.
//!
//! Health is open: load balancers and probes have no credentials. Whatever else is not known here is refused where callers
//! are known, so that a service is never served by accident.

use super::tls::Peer;
use crate::callers::Permission;
use crate::grpc::status::Refused;
use crate::grpc::{Access, Method};
use crate::trust::Trusted;
use http::{Request, Response};
use std::pin::Pin;
use std::task::{Context, Poll};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

pub(super) const HEALTH: &str = "/grpc.health.v1.Health/";
pub(super) const REFLECTION: &str = "/grpc.reflection.";

/// Puts an [`Authorize`] before a service.
#[derive(Clone, Debug)]
pub(super) struct AuthorizeLayer {
    pub(super) trusted: Trusted,
}

impl<S> Layer<S> for AuthorizeLayer {
    type Service = Authorize<S>;

    fn layer(&self, inner: S) -> Authorize<S> {
        Authorize { inner, trusted: self.trusted.clone() }
    }
}

/// Passes on what its caller may do.
#[derive(Clone, Debug)]
pub(super) struct Authorize<S> {
    inner: S,
    trusted: Trusted,
}

impl<S> Authorize<S> {
    fn asked(&self, request: &Request<Body>) -> Result<Option<Access>, Status> {
        let path = request.uri().path();
        let method = Method::at(path);
        let permission = match method {
            Some(method) => method.permission(),
            None if path.starts_with(HEALTH) => return Ok(None),
            None => Permission::Describe,
        };
        let names = request.extensions().get::<Peer>().map(|peer| &*peer.names).unwrap_or_default();
        let access =
            Access::of_call(&self.trusted, request.headers(), names, permission).map_err(|refused| {
                tracing::debug!(path, ?refused, "a call was refused");
                Status::from(refused)
            })?;
        let is_served = method.is_some() || path.starts_with(REFLECTION);
        if !is_served && access.is_known() {
            return Err(Refused::UnknownMethod.into());
        }
        Ok(Some(access))
    }
}

impl<S> Service<Request<Body>> for Authorize<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match self.asked(&request) {
            Ok(access) => {
                if let Some(access) = access {
                    request.extensions_mut().insert(access);
                }
                Box::pin(self.inner.call(request))
            }
            Err(status) => Box::pin(async move { Ok(status.into_http()) }),
        }
    }
}
