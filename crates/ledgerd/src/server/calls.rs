//! Every unary call, measured, and a span where spans are exported.
//!
//! Streams are left out: they last as long as a worker does, so their length says nothing. Names and attributes are those of
//! OpenTelemetry's conventions for RPC.

use crate::grpc;
use crate::telemetry::{CALLS, Telemetry, context};
use http::{HeaderMap, HeaderValue, Request, Response};
use opentelemetry::trace::TraceContextExt;
use opentelemetry::{Context as Cx, KeyValue, StringValue, Value};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument, Span, field};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Puts [`Calls`] before a service.
#[derive(Clone, Debug)]
pub(super) struct CallsLayer(Arc<About>);

#[derive(Debug)]
struct About {
    telemetry: Arc<Telemetry>,
    /// Paths of unary methods, with their places in the list. Others are the caller's words, and no labels.
    paths: HashMap<String, usize>,
    methods: Vec<Method>,
}

#[derive(Debug)]
struct Method {
    name: StringValue,
    /// What a call that goes well is counted under.
    ok: [KeyValue; 2],
}

impl CallsLayer {
    pub(super) fn new(telemetry: &Arc<Telemetry>) -> Self {
        let names = || grpc::unary_methods().map(StringValue::from);
        let paths = names().enumerate().map(|(place, name)| (format!("/{}", name.as_str()), place));
        let methods = names().map(|name| Method { ok: labels(&name, Code::Ok), name });
        let (telemetry, paths, methods) = (Arc::clone(telemetry), paths.collect(), methods.collect());
        Self(Arc::new(About { telemetry, paths, methods }))
    }
}

impl About {
    fn count(&self, method: &Method, code: Code, took: Duration) {
        if !self.telemetry.measures() {
            return;
        }
        match code {
            Code::Ok => self.telemetry.meters.called(&method.ok, took),
            other => self.telemetry.meters.called(&labels(&method.name, other), took),
        }
    }
}

fn labels(method: &StringValue, code: Code) -> [KeyValue; 2] {
    [KeyValue::new("rpc.method", Value::String(method.clone())), KeyValue::new("rpc.status_code", word(code))]
}

impl<S> Layer<S> for CallsLayer {
    type Service = Calls<S>;

    fn layer(&self, inner: S) -> Calls<S> {
        Calls { inner, about: Arc::clone(&self.0) }
    }
}

/// Measures what passes.
#[derive(Clone, Debug)]
pub(super) struct Calls<S> {
    inner: S,
    about: Arc<About>,
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
        let Some(place) = self.about.paths.get(request.uri().path()).copied() else {
            return Box::pin(self.inner.call(request));
        };
        let about = Arc::clone(&self.about);
        let telemetry = &about.telemetry;
        let span = if telemetry.is_traced() {
            begin(about.methods[place].name.as_str(), request.headers(), telemetry.propagates())
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
            let method = &about.methods[place];
            about.count(method, code, took);
            span.in_scope(|| tracing::debug!(method = %method.name, code = word(code), ?took, "answered"));
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
