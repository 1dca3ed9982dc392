//! What a handler knows about its task, and how it tells the ledger how far it is.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use opentelemetry::trace::SpanContext;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::enqueue::NewTask;
use crate::error::Error;
use crate::{clock, limits, spans, v1, words};

/// A task in a handler's hands. Clones are cheap and speak of the same task.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

struct Inner {
    /// Without its payload, which the handler got.
    assignment: v1::Assignment,
    /// The span that the handler runs in, where this program makes spans.
    span: OnceLock<SpanContext>,
    end: Option<Instant>,
    cancelled: CancellationToken,
    draining: CancellationToken,
    stop: AtomicI32,
    news: Mutex<News>,
    follow_ups: Mutex<Vec<v1::NewTask>>,
    touched: mpsc::UnboundedSender<v1::Lease>,
    max_checkpoint_bytes: usize,
}

/// What the ledger has not been told yet: only the newest of each counts.
#[derive(Default)]
pub(crate) struct News {
    pub(crate) progress: Option<v1::Progress>,
    pub(crate) checkpoint: Option<Bytes>,
    /// Whether the worker was told that there are news: one message for any number of them.
    told: bool,
}

impl Context {
    pub(crate) fn new(
        mut assignment: v1::Assignment,
        now: Instant,
        draining: CancellationToken,
        touched: mpsc::UnboundedSender<v1::Lease>,
        max_checkpoint_bytes: usize,
    ) -> Self {
        assignment.payload = Bytes::new();
        let end = assignment.time_left.and_then(|left| now.checked_add(words::span(Some(left))));
        Self(Arc::new(Inner {
            assignment,
            span: OnceLock::new(),
            end,
            cancelled: CancellationToken::new(),
            draining,
            stop: AtomicI32::new(0),
            news: Mutex::default(),
            follow_ups: Mutex::default(),
            touched,
            max_checkpoint_bytes,
        }))
    }

    pub(crate) fn assignment(&self) -> &v1::Assignment {
        &self.0.assignment
    }

    /// The task's id, for instance `t1k3`.
    pub fn task_id(&self) -> &str {
        &self.0.assignment.task_id
    }

    /// The number of this claim. It rises with each claim of the task: a store that keeps the highest one it has seen
    /// and refuses lower ones is safe from workers that have lost their claim.
    pub fn fence(&self) -> u64 {
        self.0.assignment.fence
    }

    /// The number of this execution, from 1.
    pub fn attempt(&self) -> u32 {
        self.0.assignment.attempt
    }

    /// Claims made so far, this one included; at least [`Context::attempt`].
    pub fn delivery(&self) -> u32 {
        self.0.assignment.delivery
    }

    /// The agent that the task came through.
    pub fn agent(&self) -> &str {
        &self.0.assignment.agent
    }

    /// What is to be done.
    pub fn task_type(&self) -> &str {
        &self.0.assignment.task_type
    }

    /// Labels given at enqueue.
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.0.assignment.labels
    }

    /// 0 to 9, higher sooner.
    pub fn priority(&self) -> i32 {
        self.0.assignment.priority
    }

    /// When this attempt must have ended, if it must: the nearest of attempt_timeout and deadline.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.end
    }

    /// Time until [`Context::deadline`]; zero when it has passed.
    pub fn time_left(&self) -> Option<Duration> {
        self.0.end.map(|end| end.saturating_duration_since(Instant::now()))
    }

    /// The last checkpoint of an earlier attempt.
    pub fn last_checkpoint(&self) -> Option<&Bytes> {
        self.0.assignment.checkpoint.as_ref()
    }

    /// How the previous attempt failed.
    pub fn last_error(&self) -> Option<&v1::TaskError> {
        self.0.assignment.last_error.as_ref()
    }

    /// What an earlier attempt asked when it [blocked](crate::TaskError::block) the task.
    pub fn question(&self) -> Option<&str> {
        Some(self.0.assignment.question.as_str()).filter(|question| !question.is_empty())
    }

    /// The answer to [`Context::question`]; none when nobody was asked, or the block ended by itself, at
    /// its `until`.
    pub fn answer(&self) -> Option<&str> {
        Some(self.0.assignment.answer.as_str()).filter(|answer| !answer.is_empty())
    }

    /// Has `task` enqueued in the same transaction that records this task as DONE: both happen or neither does. Nothing
    /// comes of it when the handler returns an error. A task whose idempotency key is known is not made anew; a delay
    /// counts from now.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for a task that cannot be and for the 101st, [`Error::PayloadTooLarge`] when they do
    /// not fit in one message, [`Error::Codec`] for a payload that is no JSON. Those given before stay.
    pub fn follow_up(&self, task: NewTask) -> Result<(), Error> {
        let now = clock::now();
        let task = task.into_wire(now)?;
        let mut follow_ups = self.0.follow_ups.lock().unwrap_or_else(PoisonError::into_inner);
        limits::follow_up(&follow_ups, &task, now)?;
        follow_ups.push(task);
        Ok(())
    }

    /// W3C trace context of the producer; empty when there is none.
    pub fn traceparent(&self) -> &str {
        &self.0.assignment.traceparent
    }

    /// W3C trace state of the producer; empty when there is none.
    pub fn tracestate(&self) -> &str {
        &self.0.assignment.tracestate
    }

    /// `traceparent` and `tracestate` for what the handler calls or starts: of the span that the handler runs in, or the
    /// producer's where this program makes no spans.
    pub fn onward_trace(&self) -> (String, String) {
        match self.span() {
            Some(span) => spans::headers(span),
            None => (self.traceparent().to_owned(), self.tracestate().to_owned()),
        }
    }

    /// The handler runs in this span. Without a tracer it is the producer's own, or none.
    pub(crate) fn runs_in(&self, span: &SpanContext) {
        if span.is_valid() && !span.is_remote() {
            let _ = self.0.span.set(span.clone());
        }
    }

    /// The span that the handler runs in.
    pub(crate) fn span(&self) -> Option<&SpanContext> {
        self.0.span.get()
    }

    /// Says how far the task is: `fraction` from 0 to 1 (others are brought there), a note of at most 1 KiB (longer ones
    /// are cut). It reaches the ledger within about a second; of several in that time only the last one does.
    pub fn progress(&self, fraction: f64, note: impl Into<String>) {
        let fraction = if fraction.is_nan() { 0.0 } else { fraction.clamp(0.0, 1.0) };
        let note = limits::head(note.into(), limits::MAX_NOTE_BYTES);
        self.tell(|news| news.progress = Some(v1::Progress { fraction, note, time: None }));
    }

    /// Leaves `state` for the next attempt, should there be one. It reaches the ledger within about a second, and with a
    /// failure or release at the latest; only the last one counts.
    ///
    /// # Errors
    ///
    /// [`Error::PayloadTooLarge`] over 256 KiB, or less when the daemon says so.
    pub fn checkpoint(&self, state: impl Into<Bytes>) -> Result<(), Error> {
        let state = state.into();
        let limit = self.0.max_checkpoint_bytes;
        if state.len() > limit {
            return Err(Error::PayloadTooLarge { what: "checkpoint", bytes: state.len(), limit });
        }
        self.tell(|news| news.checkpoint = Some(state));
        Ok(())
    }

    /// Fires when the task is asked to end; [`Context::stop_cause`] says why. The handler then has the task's stop_grace
    /// (30 s by default) to return: a result still counts, [`TaskError::cancelled`](crate::TaskError::cancelled) says
    /// that it gave up. After that it is aborted at its next await. A handler whose lease is lost is aborted at once.
    pub fn cancelled(&self) -> &CancellationToken {
        &self.0.cancelled
    }

    /// Why the task is asked to end; `None` when it is not.
    pub fn stop_cause(&self) -> Option<v1::StopCause> {
        let cause = v1::StopCause::try_from(self.0.stop.load(Ordering::Acquire)).unwrap_or_default();
        (cause != v1::StopCause::Unspecified).then_some(cause)
    }

    /// Fires when the worker begins to leave. A handler that goes on has until the end of the drain; what has not ended
    /// then is given back with its last checkpoint. So this is a good time to make one.
    pub fn draining(&self) -> &CancellationToken {
        &self.0.draining
    }

    pub(crate) fn stop(&self, cause: v1::StopCause) {
        // A stop always has a cause; should a newer daemon send one that is not known here, it is still a stop.
        let cause = if cause == v1::StopCause::Unspecified { v1::StopCause::User } else { cause };
        self.0.stop.store(cause as i32, Ordering::Release);
        self.0.cancelled.cancel();
    }

    pub(crate) fn take_follow_ups(&self) -> Vec<v1::NewTask> {
        std::mem::take(&mut *self.0.follow_ups.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn take_news(&self) -> News {
        std::mem::take(&mut *self.news())
    }

    fn tell(&self, edit: impl FnOnce(&mut News)) {
        let mut news = self.news();
        edit(&mut news);
        if !std::mem::replace(&mut news.told, true) {
            let lease = v1::Lease { task_id: self.task_id().to_owned(), fence: self.fence() };
            // Without a receiver the worker has ended, and this handler is about to.
            let _ = self.0.touched.send(lease);
        }
    }

    fn news(&self) -> MutexGuard<'_, News> {
        self.0.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("task_id", &self.task_id())
            .field("fence", &self.fence())
            .field("attempt", &self.attempt())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> (Context, mpsc::UnboundedReceiver<v1::Lease>) {
        let (touched, received) = mpsc::unbounded_channel();
        let assignment = v1::Assignment {
            task_id: "t1".into(),
            fence: 4,
            payload: Bytes::from_static(b"x"),
            time_left: Some(words::wire_span(Duration::from_secs(60))),
            ..Default::default()
        };
        let context = Context::new(assignment, Instant::now(), CancellationToken::new(), touched, 8);
        (context, received)
    }

    #[test]
    fn many_news_are_one_message_and_the_last_counts() {
        let (context, mut received) = context();
        context.progress(0.1, "a");
        context.progress(7.0, "b".repeat(2_000));
        context.checkpoint("one").unwrap();
        context.checkpoint("two").unwrap();
        assert_eq!(received.try_recv().unwrap(), v1::Lease { task_id: "t1".into(), fence: 4 });
        assert!(received.try_recv().is_err());

        let news = context.take_news();
        let progress = news.progress.unwrap();
        assert_eq!((progress.fraction, progress.note.len()), (1.0, 1_024));
        assert_eq!(news.checkpoint.unwrap(), "two");

        context.progress(f64::NAN, "");
        assert!(received.try_recv().is_ok());
        assert_eq!(context.take_news().progress.unwrap().fraction, 0.0);
    }

    #[test]
    fn a_checkpoint_over_its_limit_is_refused() {
        let (context, _received) = context();
        assert!(matches!(context.checkpoint("123456789"), Err(Error::PayloadTooLarge { limit: 8, .. })));
        assert!(context.take_news().checkpoint.is_none());
    }

    #[test]
    fn follow_ups_are_checked_and_a_hundred_at_most() {
        let (context, _received) = context();
        let task = || NewTask::new("b", "next", &1);
        let nobody = NewTask::new("B!", "next", &1);
        assert!(matches!(context.follow_up(nobody), Err(Error::InvalidArgument { .. })));
        for _ in 0..100 {
            context.follow_up(task()).expect("there is room");
        }
        assert!(matches!(context.follow_up(task()), Err(Error::InvalidArgument { .. })));
        assert_eq!(context.take_follow_ups().len(), 100);
    }

    #[test]
    fn a_stop_fires_the_token_and_a_user_overrides() {
        let (context, _received) = context();
        assert!(context.stop_cause().is_none() && !context.cancelled().is_cancelled());
        context.stop(v1::StopCause::Timeout);
        assert!(context.cancelled().is_cancelled());
        assert_eq!(context.stop_cause(), Some(v1::StopCause::Timeout));
        context.stop(v1::StopCause::User);
        assert_eq!(context.stop_cause(), Some(v1::StopCause::User));
        assert!(context.time_left().unwrap() > Duration::from_secs(50));
    }
}
