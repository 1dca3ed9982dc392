//! Spans that are over, until they are exported: as many as there is room for, in batches, by a thread of its own.
//!
//! A delivery waits as the ledger told it and becomes a span only when its batch leaves, on the thread that sends it. Made
//! earlier, its dozen strings would be made on one core and read and freed on another, which costs more than all else about it.

use super::asked::variable;
use super::meters::Dropped;
use super::traces::Delivery;
use opentelemetry::Context;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Spans that may wait, unless `OTEL_BSP_MAX_QUEUE_SIZE` says otherwise. Four times what the specification has: a commit of the
/// ledger ends a thousand at once.
const QUEUE: usize = 8_192;

/// Spans that leave at once, or a quarter of a smaller queue, unless `OTEL_BSP_MAX_EXPORT_BATCH_SIZE` says otherwise. Four times as
/// many as well: under load a request of fewer costs half a microsecond more for each task.
const BATCH: usize = 2_048;

/// How much is kept, and how it leaves: the variables of OpenTelemetry's specification.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// `OTEL_BSP_MAX_QUEUE_SIZE`: so many wait at most.
    queue: usize,
    /// `OTEL_BSP_MAX_EXPORT_BATCH_SIZE`: so many leave at once at most.
    batch: usize,
    /// `OTEL_BSP_SCHEDULE_DELAY`, milliseconds: fewer leave after so long.
    delay: Duration,
}

impl Limits {
    pub(super) fn asked() -> Self {
        let number = |name: &str, usual| variable(name).and_then(|text| text.parse().ok()).unwrap_or(usual);
        let queue = number("OTEL_BSP_MAX_QUEUE_SIZE", QUEUE).max(1);
        let batch = number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", BATCH.min(queue / 4)).clamp(1, queue);
        let delay = Duration::from_millis(number("OTEL_BSP_SCHEDULE_DELAY", 5_000) as u64);
        Self { queue, batch, delay }
    }
}

/// What ended.
pub(super) enum Ended {
    Delivery(Delivery),
    Span(Box<SpanData>),
}

/// Takes what ended. Cheap to clone.
#[derive(Clone)]
pub(super) struct Spans(Arc<Shared>);

struct Shared {
    limits: Limits,
    dropped: Arc<Dropped>,
    state: Mutex<State>,
    /// There is a first one, a batch is full, or somebody waits for the end or for a flush.
    wanted: Condvar,
    /// Something has left.
    left: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Ended>,
    /// Some are on their way.
    sending: bool,
    /// Somebody waits until all have left.
    flushing: bool,
    /// No more will be taken.
    closed: bool,
    /// And all that were have left.
    over: bool,
}

impl Spans {
    /// Starts the thread that gives batches to `send`, which says how many spans of it were lost.
    pub(super) fn start(
        limits: Limits,
        dropped: Arc<Dropped>,
        mut send: impl FnMut(Vec<Ended>) -> usize + Send + 'static,
    ) -> std::io::Result<Self> {
        let (state, wanted, left) = Default::default();
        let shared = Arc::new(Shared { limits, dropped, state, wanted, left });
        let own = Over(Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("spans".to_owned());
        thread.spawn(move || {
            // What is said while they are sent is not sent in turn.
            let _suppressed = Context::enter_telemetry_suppressed_scope();
            while let Some(batch) = own.0.batch() {
                own.0.lose(send(batch));
                own.0.lock().sending = false;
                own.0.left.notify_all();
            }
            // Its connections end before anybody hears that it is over.
            drop(send);
        })?;
        Ok(Self(shared))
    }

    /// Takes deliveries that ended together.
    pub(super) fn delivered(&self, deliveries: impl IntoIterator<Item = Delivery>) {
        self.0.add(deliveries.into_iter().map(Ended::Delivery));
    }
}

/// Tells those who wait that the thread has ended, however it did.
struct Over(Arc<Shared>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.left.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, count: usize) {
        self.dropped.spans.fetch_add(count as u64, Ordering::Relaxed);
    }

    fn add(&self, ended: impl Iterator<Item = Ended>) {
        let mut state = self.lock();
        let room = if state.closed { 0 } else { self.limits.queue - state.waiting.len() };
        let was_empty = state.waiting.is_empty();
        let mut ended = ended.fuse();
        state.waiting.extend(ended.by_ref().take(room));
        let is_wanted = was_empty || state.waiting.len() >= self.limits.batch;
        drop(state);
        if is_wanted {
            self.wanted.notify_one();
        }
        self.lose(ended.count());
    }

    /// What leaves next: a full batch, or what there is so long after the first; none at the end.
    fn batch(&self) -> Option<Vec<Ended>> {
        let is_asked = |state: &State| state.flushing || state.closed;
        let has_none = |state: &mut State| state.waiting.is_empty() && !is_asked(state);
        let state = self.wanted.wait_while(self.lock(), has_none).unwrap_or_else(PoisonError::into_inner);
        let is_early = |state: &mut State| state.waiting.len() < self.limits.batch && !is_asked(state);
        let waited = self.wanted.wait_timeout_while(state, self.limits.delay, is_early);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        if state.waiting.is_empty() {
            state.flushing = false;
            if state.closed {
                return None;
            }
        }
        state.sending = true;
        let count = state.waiting.len().min(self.limits.batch);
        Some(state.waiting.drain(..count).collect())
    }
}

impl SpanProcessor for Spans {
    fn on_start(&self, _span: &mut Span, _cx: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() {
            self.0.add(std::iter::once(Ended::Span(Box::new(span))));
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        let mut state = self.0.lock();
        state.flushing = true;
        self.0.wanted.notify_one();
        let is_busy = |state: &mut State| !state.over && (state.sending || !state.waiting.is_empty());
        drop(self.0.left.wait_while(state, is_busy));
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        let mut state = self.0.lock();
        state.closed = true;
        self.0.wanted.notify_one();
        let waited = self.0.left.wait_timeout_while(state, timeout, |state| !state.over);
        let waited = waited.unwrap_or_else(PoisonError::into_inner).1;
        if waited.timed_out() { Err(OTelSdkError::Timeout(timeout)) } else { Ok(()) }
    }
}

impl std::fmt::Debug for Spans {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spans").field("limits", &self.0.limits).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::InstrumentationScope;
    use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
    use std::sync::mpsc;
    use std::time::SystemTime;

    fn span(number: u64) -> SpanData {
        let (trace, id) = (TraceId::from(1), SpanId::from(number));
        SpanData {
            span_context: SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::NONE),
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: "".into(),
            start_time: SystemTime::UNIX_EPOCH,
            end_time: SystemTime::UNIX_EPOCH,
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::default(),
        }
    }

    /// What is sent, as the numbers of spans; each waits for an answer.
    fn start(
        queue: usize,
        batch: usize,
        delay: Duration,
    ) -> (Spans, Arc<Dropped>, mpsc::Receiver<Vec<u64>>, mpsc::Sender<bool>) {
        let (sent, seen) = mpsc::channel();
        let (answer, answers) = mpsc::channel();
        let dropped = Arc::<Dropped>::default();
        let send = move |batch: Vec<Ended>| {
            let number = |ended: &Ended| match ended {
                Ended::Span(span) => u64::from_be_bytes(span.span_context.span_id().to_bytes()),
                Ended::Delivery(_) => 0,
            };
            let (numbers, count) = (batch.iter().map(number).collect(), batch.len());
            // A flush finds nothing to send.
            if count == 0 {
                return 0;
            }
            let _ = sent.send(numbers);
            if answers.recv() == Ok(true) { 0 } else { count }
        };
        let limits = Limits { queue, batch, delay };
        let spans = Spans::start(limits, Arc::clone(&dropped), send).expect("a thread");
        (spans, dropped, seen, answer)
    }

    const NEVER: Duration = Duration::from_secs(3_600);
    const SOON: Duration = Duration::from_secs(30);

    #[test]
    fn spans_leave_in_full_batches_in_their_order_and_the_rest_at_the_end() {
        let (spans, dropped, seen, answer) = start(10, 3, NEVER);
        (1..=7).for_each(|number| spans.on_end(span(number)));
        (0..3).for_each(|_| answer.send(true).expect("it listens"));
        assert_eq!(seen.recv_timeout(SOON), Ok(vec![1, 2, 3]));
        assert_eq!(seen.recv_timeout(SOON), Ok(vec![4, 5, 6]));
        assert!(spans.shutdown_with_timeout(SOON).is_ok());
        assert_eq!(seen.recv_timeout(SOON), Ok(vec![7]));
        spans.on_end(span(8));
        assert!(seen.recv_timeout(SOON).is_err(), "nothing leaves after the end");
        assert_eq!(dropped.spans.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_few_leave_after_a_while_or_when_somebody_flushes() {
        let (spans, _, seen, answer) = start(10, 3, Duration::from_millis(1));
        answer.send(true).expect("it listens");
        spans.on_end(span(1));
        assert_eq!(seen.recv_timeout(SOON), Ok(vec![1]));
        let (spans, _, seen, answer) = start(10, 3, NEVER);
        answer.send(true).expect("it listens");
        spans.on_end(span(2));
        assert!(spans.force_flush().is_ok());
        assert_eq!(seen.try_recv(), Ok(vec![2]));
        assert!(spans.force_flush().is_ok(), "with nothing to send too");
    }

    #[test]
    fn what_finds_no_room_and_what_is_refused_is_counted() {
        let (spans, dropped, seen, answer) = start(2, 1, NEVER);
        spans.on_end(span(1));
        assert_eq!(seen.recv_timeout(SOON), Ok(vec![1]));
        (2..=5).for_each(|number| spans.on_end(span(number)));
        assert_eq!(dropped.spans.load(Ordering::Relaxed), 2, "two wait behind the one that is sent");
        [false, true, true].into_iter().for_each(|taken| answer.send(taken).expect("it listens"));
        assert!(spans.shutdown_with_timeout(SOON).is_ok());
        assert_eq!(dropped.spans.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn nobody_waits_for_a_thread_that_panicked() {
        let dropped = Arc::<Dropped>::default();
        let limits = Limits { queue: 2, batch: 1, delay: NEVER };
        let send = |_| panic!("as a library may");
        let spans = Spans::start(limits, dropped, send).expect("a thread");
        spans.on_end(span(1));
        assert!(spans.force_flush().is_ok());
        assert!(spans.shutdown_with_timeout(SOON).is_ok());
    }

    #[test]
    fn the_end_waits_for_an_exporter_that_is_away_no_longer_than_it_may() {
        let (spans, _, seen, _answer) = start(2, 1, NEVER);
        spans.on_end(span(1));
        assert_eq!(seen.recv_timeout(SOON), Ok(vec![1]));
        assert!(spans.shutdown_with_timeout(Duration::from_millis(1)).is_err());
    }
}
