//! Spans of tasks on their way over HTTP. There are two of them for each attempt, so they are written as bytes at once, in the
//! library's messages, of which one is filled again and again; the library carries them.
//!
//! What an encoded message holds may come in pieces: fields that follow each other are one message, and their lists one list.

use super::traces::{About, LINK, Of, WAITS};
use async_trait::async_trait;
use http::{Request, Response};
use ledger_core::Timestamp;
use opentelemetry::trace::TraceState;
use opentelemetry_http::{Bytes, HttpClient, HttpError};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::{Link, SpanKind};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, SpanFlags, Status};
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use prost::{Message, encode_length_delimiter, length_delimiter_len};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// The key of a field that is a message, by the number of the field.
const fn key(field: u8) -> u8 {
    field << 3 | 2
}

const RESOURCE_SPANS: u8 = key(1);
const SCOPE_SPANS: u8 = key(2);
const SPANS: u8 = key(2);

const ROOM: &str = "a vector has room for all";

/// Spans as a field of a request.
pub(super) struct Written {
    /// Of ResourceSpans, what is not a list.
    resource: Vec<u8>,
    /// Of ScopeSpans.
    scope: Vec<u8>,
    spans: Vec<u8>,
    /// Whose strings and lists are used again.
    span: Span,
    /// Of the last spans, by whether they are waits.
    common: [Common; 2],
}

/// Attributes as fields of a span, and what they are of.
#[derive(Default)]
struct Common {
    of: Option<(Arc<str>, Arc<str>)>,
    fields: Vec<u8>,
}

impl Common {
    /// Written anew where they are of something else than those before; mostly they are not.
    fn of(&mut self, about: &About<'_>) -> &[u8] {
        let (agent, task_type) = (about.agent, &about.named.spec.task_type);
        let is_same = |(of, with): &(Arc<str>, Arc<str>)| {
            (Arc::ptr_eq(of, agent) || of == agent) && (Arc::ptr_eq(with, task_type) || with == task_type)
        };
        let is_same = self.of.as_ref().is_some_and(is_same);
        if !is_same {
            let mut attributes = Vec::new();
            about.common_attributes(|key, value| put(&mut attributes, key, &value));
            self.fields = Span { attributes, ..Span::default() }.encode_to_vec();
            self.of = Some((Arc::clone(agent), Arc::clone(task_type)));
        }
        &self.fields
    }
}

impl Written {
    pub(super) fn new(resource: &opentelemetry_sdk::Resource, scope: &str) -> Self {
        let of = ResourceAttributesWithSchema::from(resource);
        let schema_url = of.schema_url.unwrap_or_default();
        let resource = Resource { attributes: of.attributes.0, ..Resource::default() };
        let resource = ResourceSpans { resource: Some(resource), schema_url, ..ResourceSpans::default() };
        let scope = InstrumentationScope { name: scope.to_owned(), ..InstrumentationScope::default() };
        let scope = ScopeSpans { scope: Some(scope), ..ScopeSpans::default() };
        let kind = SpanKind::Internal.into();
        let span = Span { kind, links: Vec::with_capacity(1), ..Span::default() };
        Self {
            resource: resource.encode_to_vec(),
            scope: scope.encode_to_vec(),
            spans: Vec::new(),
            span,
            common: Default::default(),
        }
    }

    pub(super) fn add(&mut self, about: &About<'_>) {
        let span = &mut self.span;
        fill(&mut span.trace_id, &about.trace.to_bytes());
        fill(&mut span.span_id, &about.span.to_bytes());
        span.parent_span_id.clear();
        span.parent_span_id.extend(about.parent.iter().flat_map(|parent| parent.to_bytes()));
        span.trace_state = if about.state == TraceState::NONE { String::new() } else { about.state.header() };
        span.flags = flags(about.parent.is_some()) | 1;
        span.name.clear();
        span.name.extend([about.operation, " ", about.agent]);
        (span.start_time_unix_nano, span.end_time_unix_nano) =
            (nanos(about.seen.since), nanos(about.seen.at));
        let mut count = 0;
        about.own_attributes(|key, value| {
            if count < span.attributes.len() {
                refill(&mut span.attributes[count], key, &value);
            } else {
                put(&mut span.attributes, key, &value);
            }
            count += 1;
        });
        span.attributes.truncate(count);
        span.links.clear();
        span.links.extend(about.link.as_ref().map(|link| Link {
            trace_id: link.trace.to_bytes().to_vec(),
            span_id: link.span.to_bytes().to_vec(),
            attributes: vec![KeyValue {
                key: LINK.to_owned(),
                value: Some(AnyValue { value: Some(Value::StringValue(link.to.to_owned())) }),
                ..KeyValue::default()
            }],
            flags: flags(true) | u32::from(link.flags.to_u8()),
            ..Link::default()
        }));
        let code = if about.error.is_some() { StatusCode::Error } else { StatusCode::Unset };
        span.status = Some(Status { code: code.into(), message: String::new() });
        let common = self.common[usize::from(about.operation == WAITS)].of(about);
        self.spans.push(SPANS);
        encode_length_delimiter(common.len() + span.encoded_len(), &mut self.spans).expect(ROOM);
        self.spans.extend_from_slice(common);
        span.encode(&mut self.spans).expect(ROOM);
    }

    /// What was added since, as a field of a request; nothing where nothing was.
    pub(super) fn take(&mut self) -> Bytes {
        if self.spans.is_empty() {
            return Bytes::new();
        }
        let scope_spans = self.scope.len() + self.spans.len();
        let resource_spans = self.resource.len() + 1 + length_delimiter_len(scope_spans) + scope_spans;
        let mut out = Vec::with_capacity(resource_spans + 1 + length_delimiter_len(resource_spans));
        let mut begin = |key, len, fields: &[u8]| {
            out.push(key);
            encode_length_delimiter(len, &mut out).expect(ROOM);
            out.extend_from_slice(fields);
        };
        begin(RESOURCE_SPANS, resource_spans, &self.resource);
        begin(SCOPE_SPANS, scope_spans, &self.scope);
        out.append(&mut self.spans);
        out.into()
    }
}

fn fill(bytes: &mut Vec<u8>, with: &[u8]) {
    bytes.clear();
    bytes.extend_from_slice(with);
}

fn nanos(at: Timestamp) -> u64 {
    u64::try_from(at.millis()).unwrap_or(0).saturating_mul(1_000_000)
}

/// As the specification has them: whether the other span is of another process is known.
const fn flags(is_remote: bool) -> u32 {
    let remote = if is_remote { SpanFlags::ContextIsRemoteMask as u32 } else { 0 };
    SpanFlags::ContextHasIsRemoteMask as u32 | remote
}

fn put(attributes: &mut Vec<KeyValue>, key: &str, value: &Of<'_>) {
    attributes.push(KeyValue::default());
    if let Some(place) = attributes.last_mut() {
        refill(place, key, value);
    }
}

/// Makes another attribute of one, with its strings.
fn refill(place: &mut KeyValue, key: &str, value: &Of<'_>) {
    place.key.clear();
    place.key.push_str(key);
    let place = &mut place.value.get_or_insert_default().value;
    let text: &str = match value {
        Of::Word(word) => word,
        Of::Name(name) => name,
        Of::Text(text) => text.as_str(),
        Of::Whole(number) => return *place = Some(Value::IntValue(*number)),
        Of::Part(number) => return *place = Some(Value::DoubleValue(*number)),
    };
    match place {
        Some(Value::StringValue(known)) => {
            known.clear();
            known.push_str(text);
        }
        other => *other = Some(Value::StringValue(text.to_owned())),
    }
}

/// What is to leave with the library's next request.
#[derive(Clone, Default)]
pub(super) struct Load(Arc<Mutex<(Bytes, bool)>>);

impl Load {
    /// With each request until there is another; `alone`: the library has nothing to send.
    pub(super) fn set(&self, bytes: Bytes, alone: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (bytes, alone);
    }
}

impl fmt::Debug for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Load")
    }
}

/// A client whose requests take a load with them.
#[derive(Debug)]
pub(super) struct Loaded<C> {
    pub(super) client: C,
    pub(super) load: Load,
}

#[async_trait]
impl<C: HttpClient> HttpClient for Loaded<C> {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (load, alone) = self.load.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let joined = request.map(|own| match (load.is_empty(), alone) {
            (true, _) => own,
            (false, true) => load,
            (false, false) => [load, own].concat().into(),
        });
        self.client.send_bytes(joined).await
    }
}

#[cfg(test)]
mod tests {
    use super::super::traces::{Delivery, SCOPE, Traces};
    use super::*;
    use crate::ledger::observed::{Named, Transition};
    use ledger_core::{AgentId, Class, EventKind, Overrides, Reason, Spec, State, TaskId};
    use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId};
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
    use std::str::FromStr;
    use std::time::Duration;

    fn delivery(kind: EventKind, fence: u64, age: u64) -> Delivery {
        let created_at = Timestamp::from_millis(1_700_000_000_000);
        let at = created_at.after(Duration::from_secs(age));
        let spec = Spec {
            agent: AgentId(3),
            task_type: "review".into(),
            policy: Overrides::NONE,
            created_at,
            frees_key: false,
        };
        let seen = Transition {
            task: TaskId(7_000 + fence),
            agent: AgentId(3),
            kind,
            from: Some(State::Running),
            to: if kind == EventKind::Failed { State::Retry } else { State::Done },
            reason: Reason::None,
            at,
            since: created_at.after(Duration::from_millis(1)),
            fence,
            attempt: 2,
            class: (kind == EventKind::Failed).then_some(Class::Overloaded),
            until: Some(at.after(Duration::from_millis(1_250))),
            was_lost: fence.is_multiple_of(3),
            named: Some(Named {
                spec: Arc::new(spec),
                worker: (fence.is_multiple_of(2)).then(|| "host/1".into()),
            }),
        };
        let state =
            TraceState::from_str(if fence.is_multiple_of(5) { "a=b,c=d" } else { "" }).expect("it is one");
        let (trace, span) = (TraceId::from(u128::from(fence) << 70), SpanId::from(fence << 9));
        let creation = SpanContext::new(trace, span, TraceFlags::SAMPLED, true, state);
        let agent = if fence % 4 < 2 { "claude" } else { "codex" }.into();
        Delivery { agent, seen, creation }
    }

    #[test]
    fn spans_are_written_as_the_library_writes_them() {
        let attributes = [opentelemetry::KeyValue::new("service.name", "x")];
        let resource = opentelemetry_sdk::Resource::builder_empty().with_attributes(attributes).build();
        let mut traces = Traces::new(Some(Duration::from_secs(900)));
        let mut written = Written::new(&resource, SCOPE);
        assert!(written.take().is_empty(), "nothing was added");
        // Again and again, so that what one leaves behind would be seen in the next.
        for _ in 0..2 {
            let mut wanted = Vec::new();
            for (n, kind) in [
                EventKind::Completed,
                EventKind::Assigned,
                EventKind::Failed,
                EventKind::Lost,
                EventKind::Assigned,
                EventKind::AckTimeout,
                EventKind::Failed,
                EventKind::Completed,
            ]
            .into_iter()
            .cycle()
            .take(40)
            .enumerate()
            {
                let delivery = delivery(kind, n as u64 % 7 + 1, if n % 4 == 3 { 1_000 } else { 20 });
                let about = traces.about(&delivery).expect("it is sampled");
                written.add(&about);
                wanted.push(traces.span(about));
            }
            let read = ExportTraceServiceRequest::decode(written.take()).expect("it is one");
            let wanted = group_spans_by_resource_and_scope(wanted, &(&resource).into());
            assert_eq!(read.resource_spans, wanted);
        }
    }

    /// Answers with what it was asked to send.
    #[derive(Debug)]
    struct Echo;

    #[async_trait]
    impl HttpClient for Echo {
        async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
            Ok(Response::new(request.into_body()))
        }
    }

    #[test]
    fn a_request_takes_the_load_along_and_is_one_message_with_it() {
        let load = Load::default();
        let client = Loaded { client: Echo, load: load.clone() };
        let send = |own: &ExportTraceServiceRequest| {
            let request = Request::new(own.encode_to_vec().into());
            let sent = futures_executor::block_on(client.send_bytes(request)).expect("it answers");
            let sent = ExportTraceServiceRequest::decode(sent.into_body()).expect("it is one");
            sent.resource_spans.into_iter().map(|of| of.schema_url).collect::<Vec<_>>()
        };
        let named = |name: &str| ResourceSpans { schema_url: name.to_owned(), ..ResourceSpans::default() };
        let of = |name| ExportTraceServiceRequest { resource_spans: vec![named(name)] };
        assert_eq!(send(&of("own")), ["own"]);
        load.set(of("load").encode_to_vec().into(), false);
        assert_eq!(send(&of("own")), ["load", "own"]);
        assert_eq!(send(&of("again")), ["load", "again"], "as often as it is sent");
        load.set(of("load").encode_to_vec().into(), true);
        assert_eq!(send(&of("nothing")), ["load"]);
        load.set(Bytes::new(), false);
        assert_eq!(send(&of("own")), ["own"]);
    }
}
