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
use std::borrow::Cow;
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

/// Who made them.
pub(super) const SCOPE: &str = "ledgerd";

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
        let scope = InstrumentationScope::builder(SCOPE).build();
        Self { asked: Config::default(), scope, join_age, last: None }
    }

    /// Whether the limits of the environment leave all that such a span has.
    pub(super) fn are_whole(&self) -> bool {
        let limits = self.asked.span_limits;
        limits.max_attributes_per_span as usize >= ATTRIBUTES
            && limits.max_links_per_span > 0
            && limits.max_attributes_per_link > 0
    }

    /// The wait that an assignment ended, or the attempt that anything else did. None where it is not sampled.
    pub(super) fn about<'a>(&mut self, delivery: &'a Delivery) -> Option<About<'a>> {
        let Delivery { agent, seen, creation } = delivery;
        let named = seen.named.as_ref()?;
        let (operation, which) = match seen.kind {
            EventKind::Assigned => (WAITS, WAIT),
            EventKind::Lost => ("attempt", ATTEMPT),
            _ if seen.was_lost => ("attempt", AGAIN),
            _ => ("attempt", ATTEMPT),
        };
        let age = seen.at.since(named.spec.created_at);
        let joins = self.join_age.is_none_or(|join_age| age <= join_age);
        let (origin, flags) = (creation.trace_id(), creation.trace_flags());
        let link = if !joins {
            // Of a trace of its own nobody knows the number afterwards, so nothing names the attempt before.
            Some(LinkTo { trace: origin, span: creation.span_id(), flags, to: "creation" })
        } else if which != WAIT && seen.fence > 1 {
            let span = span_id(seen.task, seen.fence - 1, ATTEMPT);
            Some(LinkTo { trace: origin, span, flags, to: "previous_attempt" })
        } else {
            None
        };
        let trace = if joins { origin } else { self.asked.id_generator.new_trace_id() };
        let state = self.sampled(trace, joins.then_some(creation))?;
        Some(About {
            operation,
            agent,
            trace,
            span: span_id(seen.task, seen.fence, which),
            parent: joins.then(|| creation.span_id()),
            state,
            link,
            error: error_type(seen),
            seen,
            named,
        })
    }

    /// The same as the library has it.
    pub(super) fn span(&self, about: About<'_>) -> SpanData {
        let mut attributes = Vec::with_capacity(ATTRIBUTES);
        about.attributes(|key, value| attributes.push(KeyValue::new(key, value)));
        let mut links = SpanLinks::default();
        links.links.extend(about.link.as_ref().map(LinkTo::link));
        let limits = self.asked.span_limits;
        links.dropped_count = cut(&mut links.links, limits.max_links_per_span);
        for link in &mut links.links {
            link.dropped_attributes_count = cut(&mut link.attributes, limits.max_attributes_per_link);
        }
        SpanData {
            span_context: SpanContext::new(about.trace, about.span, TraceFlags::SAMPLED, false, about.state),
            parent_span_id: about.parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: about.parent.is_some(),
            span_kind: SpanKind::Internal,
            name: [about.operation, " ", about.agent].concat().into(),
            start_time: system(about.seen.since),
            end_time: system(about.seen.at),
            dropped_attributes_count: cut(&mut attributes, limits.max_attributes_per_span),
            attributes,
            events: SpanEvents::default(),
            links,
            status: if about.error.is_some() { Status::error("") } else { Status::Unset },
            instrumentation_scope: self.scope.clone(),
        }
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

/// What a span says.
pub(super) struct About<'a> {
    pub(super) operation: &'static str,
    pub(super) agent: &'a Arc<str>,
    pub(super) trace: TraceId,
    pub(super) span: SpanId,
    /// Of another process; none: it is the first of its trace.
    pub(super) parent: Option<SpanId>,
    pub(super) state: TraceState,
    pub(super) link: Option<LinkTo>,
    /// Why it did not succeed.
    pub(super) error: Option<Cow<'static, str>>,
    pub(super) seen: &'a Transition,
    pub(super) named: &'a Named,
}

/// The span of another process that one is linked to, and what that is to it.
pub(super) struct LinkTo {
    pub(super) trace: TraceId,
    pub(super) span: SpanId,
    pub(super) flags: TraceFlags,
    pub(super) to: &'static str,
}

impl LinkTo {
    fn link(&self) -> Link {
        let context = SpanContext::new(self.trace, self.span, self.flags, true, TraceState::NONE);
        Link::new(context, vec![KeyValue::new(LINK, self.to)], 0)
    }
}

/// The operation of a span that an assignment ended.
pub(super) const WAITS: &str = "wait";

/// The attribute that says what a link is to.
pub(super) const LINK: &str = "ledgerd.link";

/// The value of an attribute.
pub(super) enum Of<'a> {
    Word(&'static str),
    Name(&'a Arc<str>),
    Text(String),
    Whole(i64),
    Part(f64),
}

impl From<Of<'_>> for Value {
    fn from(of: Of<'_>) -> Self {
        match of {
            Of::Word(word) => word.into(),
            Of::Name(name) => Self::String(Arc::clone(name).into()),
            Of::Text(text) => text.into(),
            Of::Whole(number) => number.into(),
            Of::Part(number) => number.into(),
        }
    }
}

impl About<'_> {
    /// Tells each attribute, [`ATTRIBUTES`] at most.
    fn attributes(&self, mut tell: impl FnMut(&'static str, Of<'_>)) {
        self.common_attributes(&mut tell);
        self.own_attributes(tell);
    }

    /// Those that spans of one operation, agent and type have in common.
    pub(super) fn common_attributes(&self, mut tell: impl FnMut(&'static str, Of<'_>)) {
        tell("messaging.system", Of::Word("ledgerd"));
        tell("messaging.operation.name", Of::Word(self.operation));
        tell("messaging.destination.name", Of::Name(self.agent));
        tell("ledgerd.task.type", Of::Name(&self.named.spec.task_type));
    }

    /// The others.
    pub(super) fn own_attributes(&self, mut tell: impl FnMut(&'static str, Of<'_>)) {
        let seen = self.seen;
        tell("messaging.message.id", Of::Text(seen.task.to_string()));
        tell("ledgerd.attempt.number", Of::Whole(attempt(seen).into()));
        if let Some(worker) = &self.named.worker {
            tell("messaging.client.id", Of::Name(worker));
        }
        match &self.error {
            Some(Cow::Borrowed(error)) => tell("error.type", Of::Word(error)),
            Some(Cow::Owned(error)) => tell("error.type", Of::Text(error.clone())),
            None => {}
        }
        if seen.to == State::Retry
            && let Some(until) = seen.until
        {
            tell("ledgerd.retry.delay", Of::Part(until.since(seen.at).as_secs_f64()));
        }
    }
}

/// Keeps so many, and says how many went.
fn cut<T>(all: &mut Vec<T>, most: u32) -> u32 {
    let before = all.len();
    all.truncate(most as usize);
    u32::try_from(before - all.len()).unwrap_or(u32::MAX)
}

/// The most that a span has.
const ATTRIBUTES: usize = 9;

/// An assignment is the delivery of an attempt that has not begun.
fn attempt(seen: &Transition) -> u32 {
    let before_its_ack = matches!(seen.kind, EventKind::Assigned | EventKind::AckTimeout);
    seen.attempt + u32::from(before_its_ack)
}

/// Why an attempt did not succeed, as spans say it.
fn error_type(seen: &Transition) -> Option<Cow<'static, str>> {
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
