//! The loop of a worker: it joins the link, the handlers and the book. One loop, one owner of all state.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::Config;
use super::book::{Book, MAX_FRAMES, Ruling, Taken};
use super::context::Context;
use super::link::{Event, Link, request};
use super::outbox::{Queue, Settled};
use super::task_error::{TaskError, given_back, stopped};
use crate::client::Client;
use crate::error::{self, Error};
use crate::spans::{self, Settling};
use crate::v1::outcome::Outcome;
use crate::v1::work_request::Frame as Said;
use crate::v1::work_response::Frame as Heard;
use crate::words::span;
use crate::{limits, v1};

/// Time for the last receipts after the last handler has ended.
const LEAVE: Duration = Duration::from_secs(5);
/// Time for Goodbye to arrive.
const FAREWELL: Duration = Duration::from_secs(1);

type Ended = Result<(Id, Result<Bytes, TaskError>), JoinError>;

enum Phase {
    Serving,
    /// No new tasks; handlers have until then.
    Draining(Instant),
    /// No handlers; receipts have until then.
    Leaving(Instant),
}

struct Job {
    abort: AbortHandle,
    context: Context,
    /// When the grace of a stop ends.
    grace: Option<Instant>,
}

pub(crate) struct Loop {
    config: Config,
    client: Client,
    book: Book,
    link: Link,
    out: Option<mpsc::Sender<v1::WorkRequest>>,
    welcomed: bool,
    served: bool,
    jobs: JoinSet<Result<Bytes, TaskError>>,
    leases: HashMap<Id, v1::Lease>,
    running: HashMap<v1::Lease, Job>,
    /// Outcomes without a receipt whose way is traced.
    settling: HashMap<v1::Lease, Settling>,
    graces: Queue,
    touched: mpsc::UnboundedSender<v1::Lease>,
    news: mpsc::UnboundedReceiver<v1::Lease>,
    draining: CancellationToken,
    phase: Phase,
    max_result_bytes: usize,
    max_checkpoint_bytes: usize,
}

impl Loop {
    pub(crate) fn new(config: Config, client: Client) -> Self {
        let now = Instant::now();
        let (touched, news) = mpsc::unbounded_channel();
        Self {
            config,
            client,
            book: Book::new(now),
            link: Link::new(now),
            out: None,
            welcomed: false,
            served: false,
            jobs: JoinSet::new(),
            leases: HashMap::new(),
            running: HashMap::new(),
            settling: HashMap::new(),
            graces: Queue::default(),
            touched,
            news,
            draining: CancellationToken::new(),
            phase: Phase::Serving,
            max_result_bytes: limits::MAX_RESULT_BYTES,
            max_checkpoint_bytes: limits::MAX_CHECKPOINT_BYTES,
        }
    }

    /// Works until `stop`, then drains; `hurry` ends the drain.
    pub(crate) async fn run(
        mut self,
        stop: CancellationToken,
        hurry: CancellationToken,
    ) -> Result<(), Error> {
        let verdict = self.serve(&stop, &hurry).await;
        self.jobs.abort_all();
        self.settle_rest().await;
        self.say_goodbye().await;
        verdict
    }

    async fn serve(&mut self, stop: &CancellationToken, hurry: &CancellationToken) -> Result<(), Error> {
        loop {
            let now = Instant::now();
            if self.has_left(now) {
                return Ok(());
            }
            self.end_graces(now);
            let due = self.book.next_due();
            let heard = self.welcomed && self.out.is_some();
            let speaks = heard && due <= now;
            let wake = self.next_wake(heard && !speaks, due, now);
            let serving = matches!(self.phase, Phase::Serving);
            let draining = matches!(self.phase, Phase::Draining(_));
            tokio::select! {
                event = self.link.next() => self.on_event(event, now)?,
                Some(ended) = self.jobs.join_next_with_id() => self.on_ended(ended),
                Some(lease) = self.news.recv() => self.on_news(&lease),
                // The room is waited for before the frames are made: while there is none, they grow.
                room = has_room(self.out.as_ref()), if speaks => if room { self.speak() } else { self.out = None },
                () = sleep_until(wake) => {}
                () = stop.cancelled(), if serving => self.begin_drain(),
                () = hurry.cancelled(), if draining => self.phase = Phase::Draining(now),
            }
        }
    }

    fn speak(&mut self) {
        let Some(room) = self.out.as_ref().and_then(|out| out.try_reserve_many(MAX_FRAMES).ok()) else {
            return;
        };
        let frames = self.book.flush(Instant::now());
        room.zip(frames).for_each(|(slot, frame)| slot.send(request(frame)));
    }

    fn on_event(&mut self, event: Event, now: Instant) -> Result<(), Error> {
        match event {
            Event::Ready => {
                let hello = self.hello();
                self.out = Some(self.link.open(&self.client, hello, now));
            }
            Event::Frame(frame) => self.on_frame(frame),
            Event::Closed(status) => {
                (self.out, self.welcomed) = (None, false);
                if let Some(status) = status {
                    if is_final(&status, self.served) {
                        return Err(status.into());
                    }
                    let (code, message) = (status.code(), status.message());
                    tracing::warn!(worker_id = %self.config.worker_id, ?code, message, "stream ended, will reconnect");
                } else {
                    tracing::info!(worker_id = %self.config.worker_id, "stream ended, will reconnect");
                }
            }
        }
        Ok(())
    }

    fn on_frame(&mut self, frame: Heard) {
        let now = Instant::now();
        match frame {
            Heard::Welcome(welcome) => {
                tracing::info!(
                    worker_id = %self.config.worker_id,
                    session_id = welcome.session_id,
                    server_version = %welcome.server_version,
                    "connected"
                );
                (self.welcomed, self.served) = (true, true);
                self.max_result_bytes = limit(welcome.max_result_bytes, limits::MAX_RESULT_BYTES);
                self.max_checkpoint_bytes = limit(welcome.max_checkpoint_bytes, limits::MAX_CHECKPOINT_BYTES);
                self.link.welcomed(span(welcome.idle_interval), span(welcome.heartbeat_interval));
                self.book.welcome(&welcome, now);
                self.on_verdicts(&welcome.leases, now);
                if !matches!(self.phase, Phase::Serving) {
                    // The drain may have begun after Hello was written.
                    self.book.set_capacity(0);
                }
            }
            Heard::Assignments(assignments) => {
                assignments.items.into_iter().for_each(|assignment| self.start(assignment, now));
            }
            Heard::Receipts(receipts) => receipts.items.iter().for_each(|receipt| self.on_receipt(receipt)),
            Heard::HeartbeatAck(ack) => {
                self.book.beat_answered(ack.sequence);
                self.on_verdicts(&ack.leases, now);
            }
            Heard::Stop(stop) => {
                // Stop frames may leave the state out: what they list is to be stopped.
                for mut verdict in stop.items {
                    if verdict.state() == v1::LeaseState::Unspecified {
                        verdict.set_state(v1::LeaseState::Stop);
                    }
                    self.on_verdicts(std::slice::from_ref(&verdict), now);
                }
            }
            Heard::Drain(drain) => self.link.move_after(span(drain.reconnect_after), now),
            Heard::Idle(_) => {}
        }
    }

    fn start(&mut self, mut assignment: v1::Assignment, now: Instant) {
        let Taken::Start { replaces } = self.book.assign(&assignment, now) else { return };
        if let Some(old) = replaces {
            self.abort(&old, "a newer claim came");
        }
        let lease = v1::Lease { task_id: assignment.task_id.clone(), fence: assignment.fence };
        if !matches!(self.phase, Phase::Serving) {
            self.book.finish(&lease, given_back(v1::ReleaseCause::Drain), now);
            return;
        }
        let Some(handler) = self.config.handlers.find(&assignment.task_type) else {
            self.book.finish(&lease, given_back(v1::ReleaseCause::Declined), now);
            return;
        };
        let payload = std::mem::take(&mut assignment.payload);
        let context = Context::new(
            assignment,
            now,
            self.draining.clone(),
            self.touched.clone(),
            self.max_checkpoint_bytes,
        );
        let (handler, about, inner) = (handler.clone(), context.clone(), context.clone());
        // The handler is called within its own task: what it does before its first await, panics too, stays there.
        let worker = self.config.worker_id.clone();
        let abort = self.jobs.spawn(async move {
            spans::processed(&about, &worker, async move { handler(payload, inner).await }).await
        });
        self.leases.insert(abort.id(), lease.clone());
        self.running.insert(lease, Job { abort, context, grace: None });
    }

    fn on_ended(&mut self, first: Ended) {
        let now = Instant::now();
        let mut next = Some(first);
        while let Some(ended) = next {
            let (id, result) = match ended {
                Ok((id, result)) => (id, result),
                Err(error) => (error.id(), Err(panicked(error))),
            };
            // Without a lease or job it was aborted, and what is to be said was said then.
            if let Some(lease) = self.leases.remove(&id)
                && let Some(job) = self.running.remove(&lease)
            {
                let outcome = self.outcome(&job, result);
                self.finish(&lease, &job, outcome, now);
            }
            next = self.jobs.try_join_next_with_id();
        }
    }

    fn outcome(&self, job: &Job, result: Result<Bytes, TaskError>) -> Outcome {
        match result {
            Ok(result) if result.len() <= self.max_result_bytes => {
                Outcome::Complete(v1::Complete { result, follow_ups: job.context.take_follow_ups() })
            }
            Ok(result) => {
                let limit = self.max_result_bytes;
                TaskError::fatal(format!("the result has {} bytes, over its limit of {limit}", result.len()))
                    .code("RESULT_TOO_LARGE")
                    .into_outcome(None)
            }
            Err(error) => error.into_outcome(job.context.stop_cause()),
        }
    }

    fn finish(&mut self, lease: &v1::Lease, job: &Job, outcome: Outcome, now: Instant) {
        let news = job.context.take_news();
        self.book.news(lease, news.progress, news.checkpoint);
        let word = spans::word(&outcome);
        // Of what is void nobody hears.
        if self.book.finish(lease, outcome, now)
            && let Some(settling) = Settling::begin(&job.context, &self.config.worker_id, word)
        {
            self.settling.insert(lease.clone(), settling);
        }
    }

    fn on_news(&mut self, lease: &v1::Lease) {
        if let Some(job) = self.running.get(lease) {
            let news = job.context.take_news();
            self.book.news(lease, news.progress, news.checkpoint);
        }
    }

    fn on_receipt(&mut self, receipt: &v1::Receipt) {
        let Some(lease) = &receipt.lease else { return };
        let error = receipt.error.as_ref();
        if receipt.kind() == v1::ReceiptKind::Ack {
            if self.book.ack_receipt(lease, error) == Ruling::Lost {
                self.abort(lease, error.map_or("", |error| error.reason.as_str()));
            }
            return;
        }
        let settled = self.book.outcome_receipt(lease, error);
        if let Settled::Over(refusal) = &settled
            && let Some(settling) = self.settling.remove(lease)
        {
            settling.answered(refusal.as_ref());
        }
        if let Settled::Over(Some(refusal)) | Settled::Failed(refusal) = settled {
            let v1::ItemError { reason, message, .. } = refusal;
            tracing::warn!(task_id = %lease.task_id, fence = lease.fence, reason, message, "outcome refused");
        }
    }

    fn on_verdicts(&mut self, verdicts: &[v1::LeaseVerdict], now: Instant) {
        for verdict in verdicts {
            let Some(lease) = &verdict.lease else { continue };
            match self.book.verdict(verdict) {
                Ruling::Goes => {}
                Ruling::Lost => self.abort(lease, "LEASE_LOST"),
                Ruling::Stop { cause, grace } => {
                    let Some(job) = self.running.get_mut(lease) else { continue };
                    job.context.stop(cause);
                    // A little early, so that the outcome is there before the grace ends.
                    let end = now + grace.saturating_sub((grace / 10).min(Duration::from_secs(1)));
                    job.grace = Some(end);
                    self.graces.push(end, lease.clone());
                }
            }
        }
    }

    /// Ends a handler whose lease is gone. It has no outcome.
    fn abort(&mut self, lease: &v1::Lease, why: &str) {
        if let Some(job) = self.running.remove(lease) {
            tracing::warn!(task_id = %lease.task_id, fence = lease.fence, why, "lease lost, handler aborted");
            job.context.cancelled().cancel();
            job.abort.abort();
        }
    }

    fn end_graces(&mut self, now: Instant) {
        while let Some(lease) = self.graces.pop(now) {
            // A stop is repeated with each beat: only the latest statement of its grace counts.
            if self.running.get(&lease).is_some_and(|job| job.grace.is_some_and(|end| end <= now))
                && let Some(job) = self.running.remove(&lease)
            {
                tracing::warn!(task_id = %lease.task_id, fence = lease.fence, "grace is over, handler aborted");
                job.abort.abort();
                let outcome = stopped(job.context.stop_cause().unwrap_or_default());
                self.finish(&lease, &job, outcome, now);
            }
        }
    }

    fn hello(&self) -> v1::Hello {
        let (held, unreceipted) = self.book.statement();
        let capacity = if matches!(self.phase, Phase::Serving) { self.config.capacity } else { 0 };
        v1::Hello {
            worker_id: self.config.worker_id.clone(),
            incarnation: self.config.incarnation,
            agents: self.config.agents.clone(),
            task_types: self.config.handlers.task_types(),
            capacity,
            labels: self.config.labels.clone(),
            sdk: concat!("ledgerd-client-rust/", env!("CARGO_PKG_VERSION")).to_owned(),
            protocol_version: 1,
            held,
            unreceipted,
        }
    }

    fn begin_drain(&mut self) {
        tracing::info!(worker_id = %self.config.worker_id, running = self.running.len(), "draining");
        self.draining.cancel();
        self.phase = Phase::Draining(Instant::now() + self.config.drain);
        self.book.set_capacity(0);
    }

    /// Moves through the phases of the end; true at the end of the last.
    fn has_left(&mut self, now: Instant) -> bool {
        if let Phase::Draining(until) = self.phase
            && (self.running.is_empty() || until <= now)
        {
            for (lease, job) in std::mem::take(&mut self.running) {
                job.abort.abort();
                let outcome = match job.context.stop_cause() {
                    Some(cause) => stopped(cause),
                    None => given_back(v1::ReleaseCause::Drain),
                };
                self.finish(&lease, &job, outcome, now);
            }
            self.phase = Phase::Leaving(now + LEAVE);
        }
        match self.phase {
            Phase::Leaving(until) => self.book.all_receipted() || until <= now || !self.welcomed,
            _ => false,
        }
    }

    fn next_wake(&self, listens: bool, due: Instant, now: Instant) -> Instant {
        let phase = match self.phase {
            Phase::Serving => None,
            Phase::Draining(until) | Phase::Leaving(until) => Some(until),
        };
        let due = listens.then_some(due);
        let wakes = [phase, due, self.graces.next()];
        wakes.into_iter().flatten().min().unwrap_or(now + Duration::from_secs(60))
    }

    /// Outcomes without a receipt go by themselves, outside of the stream. What fails here is lost to this process: the
    /// ledger will find the lease run out.
    async fn settle_rest(&mut self) {
        let end = Instant::now() + LEAVE;
        self.book.send_all_again(Instant::now());
        loop {
            let outcomes = self.book.take_outcomes(Instant::now());
            if outcomes.is_empty() {
                break;
            }
            let request = v1::SettleTasksRequest { worker_id: self.config.worker_id.clone(), outcomes };
            match tokio::time::timeout_at(end, self.client.settle(request)).await {
                Ok(Ok(receipts)) => receipts.iter().for_each(|receipt| self.on_receipt(receipt)),
                Ok(Err(error)) => {
                    tracing::warn!(%error, "outcomes could not be settled");
                    break;
                }
                Err(_) => break,
            }
        }
        if !self.book.all_receipted() {
            let (_, unreceipted) = self.book.statement();
            tracing::error!(count = unreceipted.len(), "ending with outcomes that have no receipt");
        }
    }

    async fn say_goodbye(&mut self) {
        let Some(out) = self.out.take().filter(|_| self.welcomed) else { return };
        let farewell = async {
            // Should the stream have ended, there is nobody to say it to.
            let _ = out.send(request(Said::Goodbye(v1::Goodbye {}))).await;
            drop(out);
            while let Event::Frame(_) = self.link.next().await {}
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}

/// Waits until a whole flush fits. False when the stream takes nothing any more.
async fn has_room(out: Option<&mpsc::Sender<v1::WorkRequest>>) -> bool {
    match out {
        Some(out) => out.reserve_many(MAX_FRAMES).await.is_ok(),
        None => false,
    }
}

/// Whether another stream would end in the same way. A worker that has served before takes a refusal for a passing one,
/// unless a newer process has its name.
fn is_final(status: &Status, served: bool) -> bool {
    if error::reason_of(status).as_deref() == Some("WORKER_SUPERSEDED") {
        return true;
    }
    let refused = matches!(
        status.code(),
        Code::InvalidArgument | Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented
    );
    refused && !served
}

fn limit(said: u64, ours: usize) -> usize {
    usize::try_from(said).ok().filter(|said| *said > 0).map_or(ours, |said| said.min(ours))
}

fn panicked(error: JoinError) -> TaskError {
    let text = match error.try_into_panic() {
        Ok(panic) => match panic.downcast::<String>() {
            Ok(text) => *text,
            Err(panic) => panic.downcast_ref::<&str>().copied().unwrap_or("no message").to_owned(),
        },
        Err(_) => return TaskError::of(v1::ErrorClass::Unknown, "the handler was aborted").code("ABORTED"),
    };
    TaskError::of(v1::ErrorClass::Unknown, format!("the handler panicked: {text}")).code("PANIC")
}

#[cfg(test)]
mod tests {
    use tonic_types::{ErrorDetails, StatusExt};

    use super::*;

    #[test]
    fn only_refusals_that_will_stay_end_a_worker() {
        let superseded = |code| {
            Status::with_error_details(
                code,
                "x",
                ErrorDetails::with_error_info("WORKER_SUPERSEDED", "ledgerd", []),
            )
        };
        assert!(is_final(&superseded(Code::FailedPrecondition), true));
        assert!(is_final(&Status::invalid_argument("agents"), false));
        assert!(!is_final(&Status::invalid_argument("agents"), true));
        assert!(!is_final(&Status::failed_precondition("WORKER_ID_IN_USE"), false));
        assert!(!is_final(&Status::unavailable("down"), false));
    }

    #[tokio::test]
    async fn a_panic_is_told_with_its_message() {
        let error = tokio::spawn(async { panic!("at {}", 7) }).await.unwrap_err();
        assert_eq!(panicked(error).to_string(), "the handler panicked: at 7 (UNKNOWN)");
        let error = tokio::spawn(async { panic!("flat") }).await.unwrap_err();
        assert_eq!(panicked(error).to_string(), "the handler panicked: flat (UNKNOWN)");
    }
}
