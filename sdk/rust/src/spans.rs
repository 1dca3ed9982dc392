//! Spans of producers and workers, through whatever tracer the program has set up; without one they cost nothing.
//!
//! Names and attributes follow OpenTelemetry's conventions for messaging. A task carries the context of the span that
//! enqueued it; its handler runs in a span whose parent that is.

use std::borrow::Cow;
use std::str::FromStr;

use opentelemetry::global::{self, BoxedSpan, BoxedTracer};
use opentelemetry::trace::{
    FutureExt, Link, Span, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags,
    TraceId, TraceState, Tracer,
};
use opentelemetry::{Context, KeyValue};
use tonic::Request;
use tonic::metadata::MetadataValue;

use crate::error::Error;
use crate::v1;
use crate::v1::outcome::Outcome;
use crate::worker::{Context as Job, TaskError};

fn tracer() -> BoxedTracer {
    global::tracer("ledgerd-client")
}

fn about(operation: &'static str, kind: &'static str, agent: &str) -> Vec<KeyValue> {
    vec![
        KeyValue::new("messaging.system", "ledgerd"),
        KeyValue::new("messaging.operation.name", operation),
        KeyValue::new("messaging.operation.type", kind),
        KeyValue::new("messaging.destination.name", agent.to_owned()),
    ]
}

fn of_task(task: &v1::NewTask) -> KeyValue {
    KeyValue::new("ledgerd.task.type", task.task_type.clone())
}

/// Has a task come from this span, unless the caller named another.
fn originate(task: &mut v1::NewTask, context: &SpanContext) {
    if task.traceparent.is_empty() && context.is_valid() {
        task.traceparent = written(context);
        task.tracestate = context.trace_state().header();
    }
}

/// A context as W3C's headers have it: `traceparent` and `tracestate`.
pub(crate) fn headers(context: &SpanContext) -> (String, String) {
    (written(context), context.trace_state().header())
}

fn written(context: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags().to_u8())
}

/// A W3C trace context; none where it is no such thing.
fn read(traceparent: &str, tracestate: &str) -> Option<SpanContext> {
    let parts: Vec<&str> = traceparent.split('-').collect();
    let [version, trace, span, flags] = parts[..] else { return None };
    let lengths = [version.len(), trace.len(), span.len(), flags.len()];
    if lengths != [2, 32, 16, 2] || version == "ff" {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let state = TraceState::from_str(tracestate).unwrap_or_default();
    Some(SpanContext::new(trace, span, flags, true, state)).filter(SpanContext::is_valid)
}

/// A call that is being made, as its own span says.
#[derive(Debug)]
pub(crate) struct Sending {
    context: Context,
}

impl Sending {
    /// Of one task, which comes from this span.
    pub(crate) fn one(task: &mut v1::NewTask) -> Self {
        let mut attributes = about("enqueue", "send", &task.agent);
        attributes.push(of_task(task));
        let span = SpanBuilder::from_name(format!("enqueue {}", task.agent))
            .with_kind(SpanKind::Producer)
            .with_attributes(attributes)
            .start(&tracer());
        originate(task, span.span_context());
        Self { context: Context::current().with_span(span) }
    }

    /// Of many: each comes from a short span of its own, to which the span of the call is linked.
    pub(crate) fn many(tasks: &mut [v1::NewTask]) -> Self {
        let tracer = tracer();
        let mut links = Vec::new();
        for task in tasks.iter_mut() {
            let mut attributes = about("create", "create", &task.agent);
            attributes.push(of_task(task));
            let mut span = SpanBuilder::from_name(format!("create {}", task.agent))
                .with_kind(SpanKind::Producer)
                .with_attributes(attributes)
                .start(&tracer);
            originate(task, span.span_context());
            if span.span_context().is_sampled() {
                links.push(Link::with_context(span.span_context().clone()));
            }
            span.end();
        }
        let agent = match tasks.first() {
            Some(first) if tasks.iter().all(|task| task.agent == first.agent) => {
                Cow::from(first.agent.clone())
            }
            _ => Cow::from("(several)"),
        };
        let mut attributes = about("enqueue", "send", &agent);
        attributes.push(KeyValue::new("messaging.batch.message_count", tasks.len() as i64));
        let span = SpanBuilder::from_name(format!("enqueue {agent}"))
            .with_kind(SpanKind::Client)
            .with_attributes(attributes)
            .with_links(links)
            .start(&tracer);
        Self { context: Context::current().with_span(span) }
    }

    /// Tells the daemon which span its own belongs under.
    pub(crate) fn inject<T>(&self, request: &mut Request<T>) {
        let span = self.context.span();
        if !span.span_context().is_valid() {
            return;
        }
        if let Ok(value) = MetadataValue::try_from(written(span.span_context())) {
            request.metadata_mut().insert("traceparent", value);
        }
    }

    /// It was answered.
    pub(crate) fn stored(&self, task_id: &str) {
        self.context.span().set_attribute(KeyValue::new("messaging.message.id", task_id.to_owned()));
    }

    pub(crate) fn failed(&self, error: &Error) {
        let span = self.context.span();
        span.set_attribute(KeyValue::new("error.type", error.reason().unwrap_or("_OTHER").to_owned()));
        span.set_status(Status::error(""));
    }
}

/// What spans of one task's attempt have in common.
fn of_attempt(
    operation: &'static str,
    kind: &'static str,
    assignment: &v1::Assignment,
    worker: &str,
) -> Vec<KeyValue> {
    let mut attributes = about(operation, kind, &assignment.agent);
    attributes.extend([
        KeyValue::new("messaging.message.id", assignment.task_id.clone()),
        KeyValue::new("messaging.client.id", worker.to_owned()),
        KeyValue::new("ledgerd.task.type", assignment.task_type.clone()),
        KeyValue::new("ledgerd.attempt.number", i64::from(assignment.attempt)),
    ]);
    attributes
}

/// Runs a handler in its span, which is over with it, and which the handler's context knows.
pub(crate) async fn processed<T>(
    job: &Job,
    worker: &str,
    run: impl Future<Output = Result<T, TaskError>>,
) -> Result<T, TaskError> {
    let assignment = job.assignment();
    let creation = read(&assignment.traceparent, &assignment.tracestate);
    let attributes = of_attempt("process", "process", assignment, worker);
    let builder = SpanBuilder::from_name(format!("process {}", assignment.agent))
        .with_kind(SpanKind::Consumer)
        .with_attributes(attributes)
        .with_links(creation.iter().cloned().map(Link::with_context).collect());
    // Not under whatever this worker does besides.
    let mut parent = Context::new();
    if let Some(creation) = creation {
        parent = parent.with_remote_span_context(creation);
    }
    let span = tracer().build_with_context(builder, &parent);
    job.runs_in(span.span_context());
    let context = parent.with_span(span);
    let done = run.with_context(context.clone()).await;
    if let Some(class) = done.as_ref().err().and_then(TaskError::failure) {
        let span = context.span();
        span.set_attribute(KeyValue::new("error.type", class));
        span.set_status(Status::error(""));
    }
    done
}

/// An outcome in one word.
pub(crate) const fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Complete(_) => "completed",
        Outcome::Fail(_) => "failed",
        Outcome::Block(_) => "blocked",
        Outcome::Release(_) => "released",
        Outcome::Cancelled(_) => "cancelled",
    }
}

/// An outcome that is on its way, as its own span says: from the end of the handler until the ledger has it.
#[derive(Debug)]
pub(crate) struct Settling(BoxedSpan);

impl Settling {
    /// None where the attempt has no span that anybody sees.
    pub(crate) fn begin(job: &Job, worker: &str, outcome: &'static str) -> Option<Self> {
        let process = job.span().filter(|span| span.is_sampled())?;
        let assignment = job.assignment();
        let mut attributes = of_attempt("settle", "settle", assignment, worker);
        attributes.push(KeyValue::new("ledgerd.outcome", outcome));
        let builder = SpanBuilder::from_name(format!("settle {}", assignment.agent))
            .with_kind(SpanKind::Client)
            .with_attributes(attributes);
        let parent = Context::new().with_remote_span_context(process.clone());
        Some(Self(tracer().build_with_context(builder, &parent)))
    }

    /// The ledger has answered for good.
    pub(crate) fn answered(mut self, refusal: Option<&v1::ItemError>) {
        if let Some(refusal) = refusal {
            self.0.set_attribute(KeyValue::new("error.type", refusal.reason.clone()));
            self.0.set_status(Status::error(""));
        }
        self.0.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_tracer_a_task_keeps_what_its_caller_said() {
        let mut task = v1::NewTask { agent: "a".into(), ..Default::default() };
        let _ = Sending::one(&mut task);
        assert_eq!(task.traceparent, "");
        let given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        task.traceparent = given.into();
        let sending = Sending::many(std::slice::from_mut(&mut task));
        assert_eq!(task.traceparent, given);
        let mut request = Request::new(());
        sending.inject(&mut request);
        assert!(request.metadata().is_empty());
    }

    #[test]
    fn contexts_are_read_and_written_as_w3c_has_it() {
        let given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(read(given, "x=y").map(|context| written(&context)).as_deref(), Some(given));
        for bad in ["", "00-1-2-01", "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"] {
            assert!(read(bad, "").is_none(), "{bad:?}");
        }
    }
}
