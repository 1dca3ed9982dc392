//! Every unary call, measured, and a span where spans are exported.
//!
//! Streams are left out: they last as long as a worker does, so their length says nothing. Names and attributes are those of
//! OpenTelemetry's conventions for RPC.

use crate::grpc;
use crate::telemetry::{CALLS, Telemetry, context};
use http::{HeaderMap, HeaderValue, Request, Response};
use opentelemetry::trace::TraceContextExt;
use opentelemetry::{Context as Cx, StringValue};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::time::Instant;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument, Span, field};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Puts [`Calls`] before a service.
#[derive(Clone, Debug)]
pub(super) struct CallsLayer {
    telemetry: Arc<Telemetry>,
    /// Paths of unary methods, with their names. Others are the caller's words, and no labels.
    methods: Arc<HashMap<String, StringValue>>,
}

impl CallsLayer {
    pub(super) fn new(telemetry: &Arc<Telemetry>) -> Self {
        let methods = grpc::unary_methods().map(|name| (format!("/{name}"), StringValue::from(name)));
        Self { telemetry: Arc::clone(telemetry), methods: Arc::new(methods.collect()) }
    }
}

impl<S> Layer<S> for CallsLayer {
    type Service = Calls<S>;

    fn layer(&self, inner: S) -> Calls<S> {
        Calls { inner, about: self.clone() }
    }
}

/// Measures what passes.
#[derive(Clone, Debug)]
pub(super) struct Calls<S> {
    inner: S,
    about: CallsLayer,
}

impl<S> Service<Request<Body>> for Calls<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Some(method) = self.about.methods.get(request.uri().path()).cloned() else {
            return Box::pin(self.inner.call(request));
        };
        let telemetry = Arc::clone(&self.about.telemetry);
        let span = if telemetry.is_traced() {
            begin(method.as_str(), request.headers(), telemetry.propagates())
        } else {
            Span::none()
        };
        let since = Instant::now();
        // Inside the span, for a call may be answered while it is made.
        let answer = span.in_scope(|| self.inner.call(request));
        Box::pin(async move {
            let answer = answer.instrument(span.clone()).await;
            let code = match &answer {
                Ok(answer) => code_of(answer),
                Err(_) => Code::Unknown,
            };
            let took = since.elapsed();
            if telemetry.measures() {
                telemetry.meters.called(&method, word(code), took);
            }
            span.in_scope(|| tracing::debug!(%method, code = word(code), ?took, "answered"));
            if !span.is_none() {
                end(&span, code);
            }
            answer
        })
    }
}

fn begin(method: &str, headers: &HeaderMap, propagates: bool) -> Span {
    let span = tracing::info_span!(
        target: CALLS,
        "call",
        otel.name = method,
        otel.kind = "server",
        otel.status_code = field::Empty,
        rpc.system.name = "grpc",
        rpc.method = method,
        rpc.status_code = field::Empty,
        error.type = field::Empty,
    );
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let parent = propagates.then(|| context(text("traceparent"), text("tracestate"))).flatten();
    if let Some(parent) = parent {
        // It fails for a span that nobody exports, which needs no parent.
        let _ = span.set_parent(Cx::new().with_remote_span_context(parent));
    }
    span
}

fn end(span: &Span, code: Code) {
    span.record("rpc.status_code", word(code));
    let ours = matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    );
    if ours {
        span.record("error.type", word(code));
        span.record("otel.status_code", "ERROR");
    }
}

/// A unary error stands in the headers; what comes without one succeeds.
fn code_of(answer: &Response<Body>) -> Code {
    if answer.headers().get("grpc-status").is_some_and(|code| code == HeaderValue::from_static("0")) {
        return Code::Ok;
    }
    Status::from_header_map(answer.headers()).map_or(Code::Ok, |status| status.code())
}

/// A code as the conventions spell it.
const fn word(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
