//! How an attempt ends: what its worker said, or what is said in its place.

use super::row::push_fact;
use crate::event::{Applied, Context, Fact, Outcome, Refusal, ReleaseCause};
use crate::limits::{BLOCKS, FREE_RELEASES};
use crate::task::{Class, EventKind, Reason, State, Task, TaskError};
use crate::time::Timestamp;
use retry_core::{Decision, Failure, Hint, Progress};
use std::sync::Arc;
use std::time::Duration;

impl Task {
    pub(super) fn settle(
        &mut self,
        outcome: &Outcome,
        late: bool,
        cx: &Context<'_>,
    ) -> Result<Applied, Refusal> {
        let cause = self.stop.map(|stop| stop.cause);
        if *outcome == Outcome::Cancelled && cause.is_none() {
            return Err(Refusal::NotStopped);
        }
        if !self.acked() {
            self.begin_attempt(cx);
        }
        let refund = self.take_tokens();
        let took = self.lease.and_then(|lease| lease.acked_at).map(|acked| cx.now.at.since(acked));
        let worker = self.holder.as_ref().map(|holder| Arc::clone(&holder.worker));
        let kind = match outcome {
            Outcome::Complete => EventKind::Completed,
            Outcome::Fail { .. } => EventKind::Failed,
            Outcome::Release { .. } => EventKind::Released,
            Outcome::Block { .. } => EventKind::Blocked,
            Outcome::Cancelled => EventKind::Stopped,
        };
        let decides = cause.filter(|cause| cause.decides(outcome));
        let mut applied = match (decides, outcome) {
            (Some(cause), Outcome::Release { delay, .. }) => self.stopped(kind, cause, *delay, cx),
            (Some(cause), _) => self.stopped(kind, cause, Duration::ZERO, cx),
            (None, Outcome::Complete) => self.complete(cx),
            (None, Outcome::Fail { error, retry_after }) => self.fail(kind, error.class, *retry_after, cx),
            (None, Outcome::Block { question, until }) => self.block(question, *until, cx),
            (None, Outcome::Release { cause, delay }) => self.release(kind, *cause, *delay, cx),
            // Refused above without a stop, and every stop decides over it.
            (None, Outcome::Cancelled) => return Err(Refusal::NotStopped),
        };
        applied.effects.refund += refund;
        applied.effects.settled = true;
        applied.effects.took = took;
        if let Some(record) = applied.record.as_mut() {
            record.worker = worker;
            record.digest = Some(cx.digest);
            if let Outcome::Fail { error, .. } = outcome {
                record.error = Some(Arc::clone(error));
            }
            if late {
                record.facts.push((Fact::Late, "true".into()));
            }
        }
        Ok(applied)
    }

    pub(super) fn complete(&mut self, cx: &Context<'_>) -> Applied {
        self.attempt_ended();
        let sample = self.take_sample(breaker_core::Sample::Success);
        self.let_go();
        let mut applied = self.moves(EventKind::Completed, State::Done, Reason::None, cx);
        applied.effects.sample = sample;
        applied.effects.deposit = true;
        applied
    }

    pub(super) fn settled_neutral(
        &mut self,
        kind: EventKind,
        to: State,
        reason: Reason,
        cx: &Context<'_>,
    ) -> Applied {
        let sample = self.take_sample(breaker_core::Sample::Neutral);
        self.let_go();
        let mut applied = self.moves(kind, to, reason, cx);
        applied.effects.sample = sample;
        applied
    }

    /// A failed attempt: RETRY while class, retries and deadline allow, FAILED otherwise.
    pub(super) fn fail(
        &mut self,
        kind: EventKind,
        class: Class,
        hint: Option<Duration>,
        cx: &Context<'_>,
    ) -> Applied {
        let retry = class.retry();
        let sample = self.take_sample(match retry.breaker_sample() {
            retry_core::Sample::Failure => breaker_core::Sample::Failure,
            retry_core::Sample::Neutral => breaker_core::Sample::Neutral,
        });
        // An agent must not kill tasks by being tested with them, within reason.
        let probed = sample.is_some_and(|(permit, _)| permit.probe);
        let policy = cx.settings.retry_for(&self.spec.policy);
        let uncounted = probed && self.probe_failures < policy.max_retries();
        let retries_made =
            if uncounted { self.retry_count.min(policy.max_retries() - 1) } else { self.retry_count };
        let mut failure = Failure::new(retry);
        if let Some(hint) = hint {
            failure = failure.with_hint(Hint::After(hint));
        }
        let decision = self.decide(&policy, failure, retries_made, cx);
        let hint_max = policy.config().hint_max;
        let previous = Duration::from_millis(u64::from(self.previous_delay));
        let backoff = policy.delay(retries_made, cx.draw, previous);
        self.attempt_ended();
        self.let_go();
        let mut applied = match decision {
            Ok((delay, at, hint_cut, price)) => {
                if uncounted {
                    self.probe_failures += 1;
                } else {
                    self.retry_count = self.retry_count.saturating_add(1);
                }
                self.previous_delay = u32::try_from(delay.as_millis()).unwrap_or(u32::MAX);
                self.wait_until(at);
                let price = if uncounted || !cx.settings.budget_enabled { 0 } else { price };
                // More than the bucket can ever hold would never come: such a task would starve, not wait.
                let price = price.min(cx.settings.budget.capacity);
                let affordable = price == 0 || (cx.affords)(price);
                self.tokens = price;
                let reason = if affordable { Reason::Backoff } else { Reason::Budget };
                let mut applied = self.moves(kind, State::Retry, reason, cx);
                applied.effects.reserve = if affordable { price } else { 0 };
                if price > 0 {
                    push_fact(&mut applied, Fact::Tokens, &price.to_string());
                }
                if uncounted {
                    push_fact(&mut applied, Fact::Uncounted, "true");
                }
                if delay > backoff {
                    push_fact(&mut applied, Fact::Hint, "true");
                }
                if hint_cut {
                    push_fact(&mut applied, Fact::HintCut, "true");
                }
                applied
            }
            Err(reason) => self.moves(kind, State::Failed, reason, cx),
        };
        applied.effects.sample = sample;
        applied.effects.class = Some(class);
        applied.effects.hint =
            hint.filter(|_| class != Class::Permanent).map(|hint| cx.now.at.after(hint.min(hint_max)));
        applied
    }

    /// An attempt ended that did something: what is counted in a row begins anew.
    fn attempt_ended(&mut self) {
        self.idle_deliveries = 0;
        self.free_releases = 0;
        self.blocks = 0;
    }

    /// Asks retry-core, and puts its answer into the ledger's words.
    pub(super) fn decide(
        &self,
        policy: &retry_core::Policy,
        failure: Failure,
        retries_made: u32,
        cx: &Context<'_>,
    ) -> Result<(Duration, Timestamp, bool, u32), Reason> {
        let progress = Progress {
            retries_made,
            losses: self.loss_weight / 1_000,
            loss_fraction: self.loss_weight % 1_000,
            faults: 0,
            previous_delay: Duration::from_millis(u64::from(self.previous_delay)),
            started: self.spec.created_at.since_epoch(),
        };
        let deadline = self.deadline.map(|deadline| cx.now.from_wall(deadline).since_epoch());
        match policy.next(&progress, failure, cx.now.at.since_epoch(), deadline, cx.draw) {
            Decision::Retry { delay, hint_cut, price, .. } => {
                Ok((delay, cx.now.at.after(delay), hint_cut, price))
            }
            Decision::GiveUp { reason } => Err(match reason {
                retry_core::Reason::Exhausted => Reason::RetriesExhausted,
                retry_core::Reason::Lost => Reason::Poison,
                retry_core::Reason::Deadline | retry_core::Reason::MaxElapsed => Reason::Deadline,
                _ => Reason::Permanent,
            }),
        }
    }

    pub(super) fn release(
        &mut self,
        kind: EventKind,
        cause: ReleaseCause,
        asked: Duration,
        cx: &Context<'_>,
    ) -> Applied {
        let sample = self.take_sample(breaker_core::Sample::Neutral);
        self.let_go();
        // Free only so often: a worker that gives back at once what it is given would go on for ever.
        let free = cause != ReleaseCause::Declined && self.free_releases < FREE_RELEASES;
        let delay = if free { asked } else { asked.max(self.idle_delay(cx)) };
        let reason = match cause {
            ReleaseCause::Declined => Reason::Declined,
            ReleaseCause::Drain => Reason::Drain,
            ReleaseCause::Preempted => Reason::Preempted,
        };
        if free {
            self.idle_deliveries = self.idle_deliveries.saturating_sub(1);
            self.free_releases += 1;
        }
        if cause == ReleaseCause::Preempted {
            self.preemptions = self.preemptions.saturating_add(1);
        }
        self.wait_until(cx.now.at.after(delay));
        let mut applied = self.moves(kind, State::Queued, reason, cx);
        if !free && cause != ReleaseCause::Declined {
            push_fact(&mut applied, Fact::Free, "false");
        }
        applied.effects.sample = sample;
        applied
    }

    pub(super) fn block(
        &mut self,
        question: &Arc<str>,
        until: Option<Timestamp>,
        cx: &Context<'_>,
    ) -> Applied {
        if until.is_some() && self.blocks >= BLOCKS {
            return self.blocked_too_often(cx);
        }
        let sample = self.take_sample(breaker_core::Sample::Neutral);
        self.let_go();
        self.idle_deliveries = 0;
        self.free_releases = 0;
        self.blocks = self.blocks.saturating_add(1);
        self.run_at = until.unwrap_or(Timestamp::FAR);
        self.calendar = until.is_some();
        let mut applied = self.moves(EventKind::Blocked, State::Blocked, Reason::Worker, cx);
        if let Some(record) = applied.record.as_mut() {
            record.until = until;
            record.facts.push((Fact::Question, Arc::clone(question)));
        }
        applied.effects.sample = sample;
        applied
    }

    /// A block that ends by itself, again and again, is a loop like any other.
    fn blocked_too_often(&mut self, cx: &Context<'_>) -> Applied {
        let mut applied = self.settled_neutral(EventKind::Blocked, State::Failed, Reason::Permanent, cx);
        if let Some(record) = applied.record.as_mut() {
            record.error = Some(Arc::new(TaskError {
                class: Class::Permanent,
                code: "BLOCKED_TOO_OFTEN".to_owned(),
                message: format!("it blocked {BLOCKS} times in a row and nobody answered"),
                detail: String::new(),
            }));
        }
        applied
    }

    pub(super) fn idle_delay(&self, cx: &Context<'_>) -> Duration {
        let policy = cx.settings.retry_for(&self.spec.policy);
        policy.delay(self.idle_deliveries.saturating_sub(1), cx.draw, Duration::ZERO)
    }
}
