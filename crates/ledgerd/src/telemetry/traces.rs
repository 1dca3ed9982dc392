//! The spans of a task: how long it waited, and each attempt, with true times, in the trace of whoever enqueued it.
//!
//! The numbers of spans are made of task and fence, so an attempt can name the one before it although the daemon was
//! restarted in between. A span is written when it is over and durable.

use crate::ledger::observed::{Named, Transition};
use ledger_core::store::TaskData;
use ledger_core::{EventKind, State, TaskId, Timestamp};
use opentelemetry::trace::{
    Link, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{Context, InstrumentationScope, KeyValue, Value};
use opentelemetry_sdk::trace::{Config, SamplingDecision, SpanData, SpanEvents, SpanLinks};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A delivery that began or ended, as the ledger told it.
pub(super) struct Delivery {
    /// The name of the agent.
    pub(super) agent: Arc<str>,
    pub(super) seen: Transition,
    /// Where its task came from.
    pub(super) creation: SpanContext,
}

/// Makes the spans of tasks.
///
/// They are over when they are made, some of them by another daemon, so they go without the library's tracer, which is there
/// for spans that live; sampler and limits are those that it has from the environment.
#[derive(Debug)]
pub(super) struct Traces {
    asked: Config,
    scope: InstrumentationScope,
    /// A delivery that ends so long after its task was enqueued has a trace of its own, linked to the task's; none: never.
    join_age: Option<Duration>,
    /// The parent that was sampled last, or was not, and with which state: tasks of one call came from one place.
    last: Option<(SpanContext, Option<TraceState>)>,
}

impl Traces {
    pub(super) fn new(join_age: Option<Duration>) -> Self {
        let scope = InstrumentationScope::builder("ledgerd").build();
        Self { asked: Config::default(), scope, join_age, last: None }
    }

    /// The wait that an assignment ended, or the attempt that anything else did. None where it is not sampled.
    pub(super) fn span(&mut self, delivery: &Delivery) -> Option<SpanData> {
        let Delivery { agent, seen, creation } = delivery;
        let named = seen.named.as_ref()?;
        let (operation, which) = match seen.kind {
            EventKind::Assigned => ("wait", WAIT),
            EventKind::Lost => ("attempt", ATTEMPT),
            _ if seen.was_lost => ("attempt", AGAIN),
            _ => ("attempt", ATTEMPT),
        };
        let mut links = SpanLinks::default();
        let age = seen.at.since(named.spec.created_at);
        let joins = self.join_age.is_none_or(|join_age| age <= join_age);
        if !joins {
            // Of a trace of its own nobody knows the number afterwards, so nothing names the attempt before.
            let (trace, span) = (creation.trace_id(), creation.span_id());
            links.links.push(link(trace, span, creation.trace_flags(), "creation"));
        } else if which != WAIT && seen.fence > 1 {
            let before = span_id(seen.task, seen.fence - 1, ATTEMPT);
            links.links.push(link(creation.trace_id(), before, creation.trace_flags(), "previous_attempt"));
        }
        let trace = if joins { creation.trace_id() } else { self.asked.id_generator.new_trace_id() };
        let trace_state = self.sampled(trace, joins.then_some(creation))?;
        let error = error_type(seen);
        let status = if error.is_some() { Status::error("") } else { Status::Unset };
        let mut attributes = attributes(operation, delivery, named, error);
        let limits = self.asked.span_limits;
        links.dropped_count = cut(&mut links.links, limits.max_links_per_span);
        for link in &mut links.links {
            link.dropped_attributes_count = cut(&mut link.attributes, limits.max_attributes_per_link);
        }
        let span = span_id(seen.task, seen.fence, which);
        Some(SpanData {
            span_context: SpanContext::new(trace, span, TraceFlags::SAMPLED, false, trace_state),
            parent_span_id: if joins { creation.span_id() } else { SpanId::INVALID },
            parent_span_is_remote: joins,
            span_kind: SpanKind::Internal,
            name: [operation, " ", agent].concat().into(),
            start_time: system(seen.since),
            end_time: system(seen.at),
            dropped_attributes_count: cut(&mut attributes, limits.max_attributes_per_span),
            attributes,
            events: SpanEvents::default(),
            links,
            status,
            instrumentation_scope: self.scope.clone(),
        })
    }

    /// The state of a trace whose spans below `parent` are sampled. No sampler that the environment can ask for looks at more
    /// than this.
    fn sampled(&mut self, trace: TraceId, parent: Option<&SpanContext>) -> Option<TraceState> {
        if let Some((last, state)) = &self.last
            && parent == Some(last)
        {
            return state.clone();
        }
        let cx = parent
            .map_or_else(Context::new, |parent| Context::new().with_remote_span_context(parent.clone()));
        let kind = SpanKind::Internal;
        let sampled = self.asked.sampler.should_sample(Some(&cx), trace, "", &kind, &[], &[]);
        let state = (sampled.decision == SamplingDecision::RecordAndSample).then_some(sampled.trace_state);
        if let Some(parent) = parent {
            self.last = Some((parent.clone(), state.clone()));
        }
        state
    }
}

fn attributes(
    operation: &'static str,
    delivery: &Delivery,
    named: &Named,
    error: Option<Value>,
) -> Vec<KeyValue> {
    let seen = &delivery.seen;
    let mut attributes = Vec::with_capacity(ATTRIBUTES);
    attributes.extend([
        KeyValue::new("messaging.system", "ledgerd"),
        KeyValue::new("messaging.operation.name", operation),
        super::meters::label("messaging.destination.name", &delivery.agent),
        KeyValue::new("messaging.message.id", seen.task.to_string()),
        super::meters::label("ledgerd.task.type", &named.spec.task_type),
        KeyValue::new("ledgerd.attempt.number", i64::from(attempt(seen))),
    ]);
    if let Some(worker) = &named.worker {
        attributes.push(super::meters::label("messaging.client.id", worker));
    }
    if let Some(error) = error {
        attributes.push(KeyValue::new("error.type", error));
    }
    if seen.to == State::Retry
        && let Some(until) = seen.until
    {
        attributes.push(KeyValue::new("ledgerd.retry.delay", until.since(seen.at).as_secs_f64()));
    }
    attributes
}

/// Keeps so many, and says how many went.
fn cut<T>(all: &mut Vec<T>, most: u32) -> u32 {
    let before = all.len();
    all.truncate(most as usize);
    u32::try_from(before - all.len()).unwrap_or(u32::MAX)
}

fn link(trace: TraceId, span: SpanId, flags: TraceFlags, to: &'static str) -> Link {
    let context = SpanContext::new(trace, span, flags, true, TraceState::NONE);
    Link::new(context, vec![KeyValue::new("ledgerd.link", to)], 0)
}

/// The most that a span has.
const ATTRIBUTES: usize = 9;

/// An assignment is the delivery of an attempt that has not begun.
fn attempt(seen: &Transition) -> u32 {
    let before_its_ack = matches!(seen.kind, EventKind::Assigned | EventKind::AckTimeout);
    seen.attempt + u32::from(before_its_ack)
}

/// Why an attempt did not succeed, as spans say it.
fn error_type(seen: &Transition) -> Option<Value> {
    Some(match seen.kind {
        EventKind::Failed => match seen.class {
            Some(class) => class.as_str().to_ascii_lowercase().into(),
            None => "_OTHER".into(),
        },
        EventKind::Lost => "lease_lost".into(),
        EventKind::AckTimeout => "ack_timeout".into(),
        EventKind::Abandoned => "abandoned".into(),
        EventKind::Stopped => "stopped".into(),
        _ => return None,
    })
}

/// Where a task came from, as its producer said; none where that is no W3C trace context.
pub(super) fn creation(data: &TaskData) -> Option<SpanContext> {
    context(&data.traceparent, &data.tracestate)
}

/// A W3C trace context; none where it is no such thing.
pub(crate) fn context(traceparent: &str, tracestate: &str) -> Option<SpanContext> {
    let mut parts = traceparent.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let lengths = [version.len(), trace.len(), span.len(), flags.len()];
    if lengths != [2, 32, 16, 2] || version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let trace = TraceId::from_hex(trace).ok()?;
    let span = SpanId::from_hex(span).ok()?;
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let state = TraceState::from_str(tracestate).unwrap_or_default();
    Some(SpanContext::new(trace, span, flags, true, state)).filter(SpanContext::is_valid)
}

/// The context of a span as a task carries it.
pub(crate) fn traceparent(span: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8())
}

/// What a span is of, besides its task and fence.
const WAIT: u64 = 1;
const ATTEMPT: u64 = 2;
/// An attempt that was held to be lost and went on.
const AGAIN: u64 = 3;

/// The number of a span: the same whoever computes it, and never 0.
fn span_id(task: TaskId, fence: u64, which: u64) -> SpanId {
    // The finalizer of SplitMix64 (Steele, Lea, Flood 2014), over each part.
    let mix = |mut bits: u64| {
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    };
    let golden = 0x9e37_79b9_7f4a_7c15_u64;
    let bits =
        mix(mix(mix(task.0.wrapping_add(golden)) ^ fence.wrapping_add(golden)) ^ which.wrapping_add(golden));
    SpanId::from(bits.max(1))
}

fn system(at: Timestamp) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(at.millis()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(traceparent: &str) -> Option<SpanContext> {
        creation(&TaskData { traceparent: traceparent.to_owned(), ..TaskData::default() })
    }

    #[test]
    fn a_trace_context_is_read_as_w3c_has_it_and_anything_else_is_none() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = of(good).expect("it is one");
        assert_eq!(traceparent(&context), good);
        assert!(context.is_remote() && context.is_sampled());
        assert!(of("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-later").is_some());
        for bad in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-xyz-b7ad6b7169203331-01",
            "00-1-2-01",
        ] {
            assert!(of(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn a_sampled_parent_decides_each_for_itself_and_keeps_its_state() {
        let parent = |flags, state: &str| {
            let state = TraceState::from_str(state).expect("it is one");
            SpanContext::new(TraceId::from(7), SpanId::from(8), flags, true, state)
        };
        let (yes, no) = (parent(TraceFlags::SAMPLED, "k=v"), parent(TraceFlags::NOT_SAMPLED, ""));
        let other = parent(TraceFlags::SAMPLED, "k=w");
        let mut traces = Traces::new(None);
        for (parent, state) in [
            (&yes, Some("k=v")),
            (&yes, Some("k=v")),
            (&other, Some("k=w")),
            (&no, None),
            (&yes, Some("k=v")),
        ] {
            let sampled = traces.sampled(parent.trace_id(), Some(parent)).map(|state| state.header());
            assert_eq!(sampled.as_deref(), state, "{parent:?}");
        }
        assert!(traces.sampled(TraceId::from(9), None).is_some(), "a trace of its own");
    }

    #[test]
    fn numbers_of_spans_are_stable_and_differ() {
        let id = |task, fence, which| span_id(TaskId(task), fence, which);
        assert_eq!(id(7, 1, ATTEMPT), id(7, 1, ATTEMPT));
        let all: std::collections::HashSet<_> =
            (0..1_000).flat_map(|task| (0..10).map(move |fence| id(task, fence, WAIT))).collect();
        assert_eq!(all.len(), 10_000);
        assert_ne!(id(7, 1, WAIT), id(7, 1, ATTEMPT));
    }
}
