//! The whole life of a task: one function, one table.
//!
//! Pure: no clock, no dice, no store. A pair of state and event that is not in the table is refused by name and changes
//! nothing. Every change but that of soft fields (lease end, progress) yields exactly one history row.

use crate::event::{Applied, Caller, Context, Effects, Event, Fact, Outcome, Record, Refusal, ReleaseCause};
use crate::id::TaskId;
use crate::limits::IDLE_DELIVERIES;
use crate::task::{
    Class, EventKind, Lease, Reason, Sample, Spec, State, Stop, StopCause, Task, TaskError,
};
use crate::time::{Now, Timestamp};
use retry_core::{Decision, ErrorClass, Failure, Hint, Progress};
use std::sync::Arc;
use std::time::Duration;

/// How a caller stands to the newest fence.
enum Standing {
    /// It holds the lease.
    Holds,
    /// It held it, lost it, and nobody took it since.
    MayResume,
}

impl Task {
    /// A new task and its first history row.
    #[must_use]
    pub fn enqueue(
        id: TaskId,
        spec: Arc<Spec>,
        priority: u8,
        run_at: Option<Timestamp>,
        deadline: Option<Timestamp>,
        now: Now,
    ) -> (Self, Record) {
        let due = run_at.unwrap_or(now.at);
        let mut task = Self {
            id,
            state: State::Queued,
            reason: Reason::None,
            priority,
            run_at: due,
            calendar: run_at.is_some(),
            deadline,
            queued_at: if run_at.is_some() { now.at.max(now.from_wall(due)) } else { now.at },
            updated_at: now.at,
            version: 0,
            fence: 0,
            delivery: 0,
            attempt: 0,
            retry_count: 0,
            losses: 0,
            idle_deliveries: 0,
            preemptions: 0,
            redrives: 0,
            probe_failures: 0,
            tokens: 0,
            previous_delay: 0,
            holder: None,
            lease: None,
            sample: None,
            stop: None,
            discarded: false,
            spec,
        };
        let mut record = task.record(EventKind::Enqueued, None, now);
        record.until = run_at;
        (task, record)
    }

    /// What `event` does to this task.
    ///
    /// # Errors
    /// The named refusal of a pair that is not in the table; the task is as before.
    pub fn apply(&mut self, event: &Event, cx: &Context<'_>) -> Result<Applied, Refusal> {
        use State::{Blocked, Cancelled, Done, Failed, Queued, Retry, Running};
        match (event, self.state) {
            (Event::Claim { .. }, _) if self.can_be_claimed(cx.now) => Ok(self.claim(event, cx)),
            (Event::Ack(caller, fence), _) => match self.standing(caller, *fence)? {
                Standing::Holds => Ok(self.ack(caller, cx)),
                Standing::MayResume => Ok(self.resume(caller, true, cx)),
            },
            (Event::Beat(caller, fence), _) => match self.standing(caller, *fence)? {
                Standing::Holds => Ok(self.beat(caller, cx)),
                Standing::MayResume => Ok(self.resume(caller, false, cx)),
            },
            (Event::Settle(caller, fence, outcome), _) => match self.standing(caller, *fence)? {
                Standing::Holds => self.settle(outcome, false, cx),
                Standing::MayResume => self.settle(outcome, true, cx),
            },
            (Event::LeaseOver, Running) => Ok(match self.acked() {
                true => self.lose(false, cx),
                false => self.ack_timeout(true, cx),
            }),
            (Event::TakenBack { sampled }, Running) => Ok(match self.acked() {
                true => self.lose(*sampled, cx),
                false => self.ack_timeout(false, cx),
            }),
            (Event::Gate, Queued | Retry) if self.can_be_claimed(cx.now) => {
                Ok(self.moves(EventKind::Gated, Blocked, Reason::BreakerOpen, cx))
            }
            (Event::Ungate, Blocked) if self.is_gated() => {
                Ok(self.moves(EventKind::Ungated, Queued, Reason::None, cx))
            }
            (Event::Unblock { .. }, Blocked) if self.is_gated() => Err(Refusal::BlockedByBreaker),
            (Event::Unblock { answer, actor }, Blocked) => Ok(self.unblock(answer, actor, cx)),
            (Event::Cancel { note }, Queued | Retry | Blocked) => {
                let mut applied = self.ends(EventKind::Cancelled, Cancelled, Reason::User, cx);
                note_fact(&mut applied, note);
                Ok(applied)
            }
            (Event::Cancel { note }, Running) => {
                let mut applied = self.request_stop(StopCause::User, cx);
                note_fact(&mut applied, note);
                Ok(applied)
            }
            (Event::Cancel { .. }, Cancelled) => Ok(Applied::soft()),
            (Event::Cancel { .. }, Done | Failed) => Err(Refusal::TaskTerminal),
            (Event::Preempt, Running) => Ok(self.request_stop(StopCause::Preempt, cx)),
            (Event::AttemptTimeout, Running) if self.acked() => Ok(self.request_stop(StopCause::Timeout, cx)),
            (Event::Stall, Running) if self.acked() => Ok(self.request_stop(StopCause::Stall, cx)),
            (Event::DeadlinePassed, Running) => Ok(self.request_stop(StopCause::Deadline, cx)),
            (Event::DeadlinePassed, Queued | Retry | Blocked) => {
                Ok(self.ends(EventKind::DeadlinePassed, Failed, Reason::Deadline, cx))
            }
            (Event::QueueTimeout, Queued | Retry | Blocked) if self.queued_at < Timestamp::FAR => {
                Ok(self.ends(EventKind::QueueTimeout, Failed, Reason::QueueTimeout, cx))
            }
            (Event::GraceOver, Running) if self.stop.is_some() => Ok(self.grace_over(cx)),
            (Event::BudgetGranted, Retry) if self.reason == Reason::Budget => Ok(self.budget_granted(cx)),
            (Event::BudgetExpired, Retry) if self.reason == Reason::Budget => {
                Ok(self.ends(EventKind::BudgetExpired, Failed, Reason::Budget, cx))
            }
            (Event::Undeliverable, Queued) if self.idle_deliveries >= IDLE_DELIVERIES => {
                Ok(self.ends(EventKind::Undeliverable, Failed, Reason::Undeliverable, cx))
            }
            (Event::Redrive { .. }, Failed) if self.discarded => Err(Refusal::Discarded),
            (Event::Redrive { deadline, note }, Failed) => Ok(self.redrive(*deadline, note, cx)),
            (Event::Discard { .. }, Failed) if self.discarded => Ok(Applied::soft()),
            (Event::Discard { note }, Failed) => {
                self.discarded = true;
                let mut applied = self.stays(EventKind::Discarded, cx);
                note_fact(&mut applied, note);
                Ok(applied)
            }
            (_, state) => Err(Refusal::WrongState(state)),
        }
    }

    /// Whether it may be handed out now, as far as the task itself goes.
    #[must_use]
    pub fn can_be_claimed(&self, now: Now) -> bool {
        self.is_gated() || (self.is_claimable_state() && self.due_at(now) <= now.at)
    }

    /// Its probe has run for as long as proves the agent's health: what comes later decides nothing.
    ///
    /// Soft: no history row. None when there is no untold probe.
    pub fn probe_passes(&mut self) -> Option<(breaker_core::Permit, breaker_core::Sample)> {
        match &self.sample {
            Some(sample) if sample.permit.probe && self.state == State::Running => {
                self.take_sample(breaker_core::Sample::Success)
            }
            _ => None,
        }
    }

    /// Whether the execution has begun.
    #[must_use]
    pub fn acked(&self) -> bool {
        self.lease.is_some_and(|lease| lease.acked_at.is_some())
    }

    fn standing(&self, caller: &Caller, fence: u64) -> Result<Standing, Refusal> {
        if fence == 0 || fence > self.fence {
            return Err(Refusal::UnknownFence);
        }
        if self.state.is_terminal() {
            return Err(Refusal::TaskTerminal);
        }
        let Some(holder) = self.holder.as_ref().filter(|_| fence == self.fence) else {
            return Err(Refusal::LeaseLost);
        };
        if holder.worker != caller.worker {
            return Err(Refusal::NotHolder);
        }
        match self.state {
            State::Running => Ok(Standing::Holds),
            _ if self.is_resumable() => Ok(Standing::MayResume),
            _ => Err(Refusal::LeaseLost),
        }
    }

    fn claim(&mut self, event: &Event, cx: &Context<'_>) -> Applied {
        let Event::Claim { holder, permit } = event else { return Applied::soft() };
        let at = cx.now.at;
        let until = at.after(cx.settings.ack_timeout(&self.spec.policy));
        self.fence += 1;
        self.delivery = self.delivery.saturating_add(1);
        self.idle_deliveries = self.idle_deliveries.saturating_add(1);
        // The token goes with the delivery that it was reserved for.
        self.tokens = 0;
        self.holder = Some(holder.clone());
        self.lease = Some(Lease { until, acked_at: None, progress_at: at });
        self.sample = permit.map(|permit| Sample { permit, told: false });
        self.stop = None;
        let mut applied = self.moves(EventKind::Assigned, State::Running, Reason::None, cx);
        if permit.is_some_and(|permit| permit.probe) {
            push_fact(&mut applied, Fact::Probe, "true");
        }
        applied
    }

    fn ack(&mut self, caller: &Caller, cx: &Context<'_>) -> Applied {
        self.adopt(caller);
        if self.acked() {
            return Applied::soft();
        }
        self.begin_attempt(cx);
        self.stays(EventKind::Started, cx)
    }

    fn beat(&mut self, caller: &Caller, cx: &Context<'_>) -> Applied {
        self.adopt(caller);
        let duration = cx.settings.lease_duration(&self.spec.policy);
        if let Some(lease) = self.lease.as_mut().filter(|lease| lease.acked_at.is_some()) {
            lease.until = lease.until.max(cx.now.at.after(duration));
        }
        Applied::soft()
    }

    fn resume(&mut self, caller: &Caller, starts: bool, cx: &Context<'_>) -> Applied {
        let refund = self.take_tokens();
        self.adopt(caller);
        let policy = self.spec.policy;
        let lease_duration = cx.settings.lease_duration(&policy);
        let ack_timeout = cx.settings.ack_timeout(&policy);
        if starts && !self.acked() {
            self.begin_attempt(cx);
        }
        if let Some(lease) = self.lease.as_mut() {
            let length = if lease.acked_at.is_some() { lease_duration } else { ack_timeout };
            lease.until = cx.now.at.after(length);
            lease.progress_at = cx.now.at;
        }
        let mut applied = self.moves(EventKind::Resumed, State::Running, Reason::None, cx);
        applied.effects.refund = refund;
        applied
    }

    fn begin_attempt(&mut self, cx: &Context<'_>) {
        let at = cx.now.at;
        let duration = cx.settings.lease_duration(&self.spec.policy);
        self.attempt = self.attempt.saturating_add(1);
        self.queued_at = Timestamp::FAR;
        if let Some(lease) = self.lease.as_mut() {
            *lease = Lease { until: at.after(duration), acked_at: Some(at), progress_at: at };
        }
    }

    fn settle(&mut self, outcome: &Outcome, late: bool, cx: &Context<'_>) -> Result<Applied, Refusal> {
        let cause = self.stop.map(|stop| stop.cause);
        if *outcome == Outcome::Cancelled && cause.is_none() {
            return Err(Refusal::NotStopped);
        }
        if !self.acked() {
            self.begin_attempt(cx);
        }
        let refund = self.take_tokens();
        let worker = self.holder.as_ref().map(|holder| Arc::clone(&holder.worker));
        let kind = match outcome {
            Outcome::Complete => EventKind::Completed,
            Outcome::Fail { .. } => EventKind::Failed,
            Outcome::Release { .. } => EventKind::Released,
            Outcome::Block { .. } => EventKind::Blocked,
            Outcome::Cancelled => EventKind::Stopped,
        };
        let mut applied = match (outcome, cause) {
            (Outcome::Complete, _) => self.complete(cx),
            (_, Some(StopCause::User)) => self.settled_neutral(kind, State::Cancelled, Reason::User, cx),
            (_, Some(StopCause::Deadline)) => self.settled_neutral(kind, State::Failed, Reason::Deadline, cx),
            (_, Some(StopCause::Timeout | StopCause::Stall)) => {
                self.fail(kind, Class::Timeout, None, cx)
            }
            (Outcome::Fail { error, retry_after }, _) => self.fail(kind, error.class, *retry_after, cx),
            (Outcome::Block { question, until }, _) => self.block(question, *until, cx),
            (Outcome::Release { delay, .. }, Some(StopCause::Preempt)) => {
                self.release(kind, ReleaseCause::Preempted, *delay, cx)
            }
            (Outcome::Release { cause, delay }, _) => self.release(kind, *cause, *delay, cx),
            // NotStopped above leaves only PREEMPT.
            (Outcome::Cancelled, _) => self.release(kind, ReleaseCause::Preempted, Duration::ZERO, cx),
        };
        applied.effects.refund += refund;
        applied.effects.settled = true;
        if let Some(record) = applied.record.as_mut() {
            record.worker = worker;
            record.digest = Some(cx.digest);
            if let Outcome::Fail { error, .. } = outcome {
                record.error = Some(Arc::clone(error));
            } else if let Some(cause @ (StopCause::Timeout | StopCause::Stall)) =
                cause.filter(|_| *outcome != Outcome::Complete)
            {
                record.error = Some(stop_error(cause));
            }
            if late {
                record.facts.push((Fact::Late, "true".into()));
            }
        }
        Ok(applied)
    }

    fn complete(&mut self, cx: &Context<'_>) -> Applied {
        self.idle_deliveries = 0;
        let sample = self.take_sample(breaker_core::Sample::Success);
        self.let_go();
        let mut applied = self.moves(EventKind::Completed, State::Done, Reason::None, cx);
        applied.effects.sample = sample;
        applied.effects.deposit = true;
        applied
    }

    fn settled_neutral(&mut self, kind: EventKind, to: State, reason: Reason, cx: &Context<'_>) -> Applied {
        let sample = self.take_sample(breaker_core::Sample::Neutral);
        self.let_go();
        let mut applied = self.moves(kind, to, reason, cx);
        applied.effects.sample = sample;
        applied
    }

    /// A failed attempt: RETRY while class, retries and deadline allow, FAILED otherwise.
    fn fail(&mut self, kind: EventKind, class: Class, hint: Option<Duration>, cx: &Context<'_>) -> Applied {
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
        self.idle_deliveries = 0;
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
                if hint_cut {
                    push_fact(&mut applied, Fact::HintCut, "true");
                }
                applied
            }
            Err(reason) => self.moves(kind, State::Failed, reason, cx),
        };
        applied.effects.sample = sample;
        applied.effects.class = Some(class);
        applied
    }

    /// Asks retry-core, and puts its answer into the ledger's words.
    fn decide(
        &self,
        policy: &retry_core::Policy,
        failure: Failure,
        retries_made: u32,
        cx: &Context<'_>,
    ) -> Result<(Duration, Timestamp, bool, u32), Reason> {
        let progress = Progress {
            retries_made,
            losses: self.losses,
            faults: 0,
            previous_delay: Duration::from_millis(u64::from(self.previous_delay)),
            started: self.spec.created_at.since_epoch(),
        };
        let deadline = self.deadline.map(|deadline| cx.now.from_wall(deadline).since_epoch());
        match policy.next(&progress, failure, cx.now.at.since_epoch(), deadline, cx.draw) {
            Decision::Retry { delay, hint_cut, price, .. } => Ok((delay, cx.now.at.after(delay), hint_cut, price)),
            Decision::GiveUp { reason } => Err(match reason {
                retry_core::Reason::Exhausted => Reason::RetriesExhausted,
                retry_core::Reason::Lost => Reason::Poison,
                retry_core::Reason::Deadline | retry_core::Reason::MaxElapsed => Reason::Deadline,
                _ => Reason::Permanent,
            }),
        }
    }

    fn release(&mut self, kind: EventKind, cause: ReleaseCause, asked: Duration, cx: &Context<'_>) -> Applied {
        let sample = self.take_sample(breaker_core::Sample::Neutral);
        self.let_go();
        let (reason, delay) = match cause {
            ReleaseCause::Declined => (Reason::Declined, asked.max(self.idle_delay(cx))),
            ReleaseCause::Drain => (Reason::Drain, asked),
            ReleaseCause::Preempted => (Reason::Preempted, asked),
        };
        if cause != ReleaseCause::Declined {
            self.idle_deliveries = self.idle_deliveries.saturating_sub(1);
        }
        if cause == ReleaseCause::Preempted {
            self.preemptions = self.preemptions.saturating_add(1);
        }
        self.wait_until(cx.now.at.after(delay));
        let mut applied = self.moves(kind, State::Queued, reason, cx);
        applied.effects.sample = sample;
        applied
    }

    fn block(&mut self, question: &Arc<str>, until: Option<Timestamp>, cx: &Context<'_>) -> Applied {
        let sample = self.take_sample(breaker_core::Sample::Neutral);
        self.let_go();
        self.idle_deliveries = 0;
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

    fn unblock(&mut self, answer: &Option<Arc<str>>, actor: &Option<Arc<str>>, cx: &Context<'_>) -> Applied {
        self.wait_until(cx.now.at);
        let mut applied = self.moves(EventKind::Unblocked, State::Queued, Reason::None, cx);
        for (fact, text) in [(Fact::Answer, answer), (Fact::Note, actor)] {
            if let Some(text) = text {
                push_fact(&mut applied, fact, text);
            }
        }
        applied
    }

    /// Nobody acknowledged: as a release, or what a pending stop says. Its holder may come back (`keeps`) unless it
    /// said itself that it does not hold the task.
    fn ack_timeout(&mut self, keeps: bool, cx: &Context<'_>) -> Applied {
        if let Some(stop) = self.stop {
            return self.stopped(EventKind::AckTimeout, stop.cause, cx);
        }
        let sample = self.take_sample(breaker_core::Sample::Neutral);
        if !keeps {
            self.let_go();
        }
        let delay = if keeps { self.idle_delay(cx) } else { Duration::ZERO };
        self.wait_until(cx.now.at.after(delay));
        let mut applied = self.moves(EventKind::AckTimeout, State::Queued, Reason::AckTimeout, cx);
        applied.effects.sample = sample;
        applied
    }

    /// The lease of a started task ran out. Its holder may still come back, until somebody else claims it.
    fn lose(&mut self, sampled: bool, cx: &Context<'_>) -> Applied {
        if let Some(stop) = self.stop {
            return self.stopped(EventKind::Lost, stop.cause, cx);
        }
        let sample = self.take_sample(match sampled {
            true => breaker_core::Sample::Neutral,
            false => breaker_core::Sample::Failure,
        });
        let policy = cx.settings.retry_for(&self.spec.policy);
        let decision = self.decide(&policy, Failure::new(ErrorClass::Lost), self.retry_count, cx);
        self.losses = self.losses.saturating_add(1);
        let mut applied = match decision {
            Ok((_, at, _, price)) => {
                self.wait_until(at);
                // Losses are bounded by max_losses, so an empty budget need not hold one back.
                let price = if cx.settings.budget_enabled && (cx.affords)(price) { price } else { 0 };
                self.tokens = price;
                let mut applied = self.moves(EventKind::Lost, State::Retry, Reason::Lost, cx);
                applied.effects.reserve = price;
                if price > 0 {
                    push_fact(&mut applied, Fact::Tokens, &price.to_string());
                }
                applied
            }
            Err(reason) => {
                let worker = self.holder.as_ref().map(|holder| Arc::clone(&holder.worker));
                self.let_go();
                let mut applied = self.moves(EventKind::Lost, State::Failed, reason, cx);
                if let Some(record) = applied.record.as_mut() {
                    record.worker = worker;
                }
                applied
            }
        };
        applied.effects.sample = sample;
        applied
    }

    /// The end of a running task that was asked to end, without an outcome of its own.
    fn stopped(&mut self, kind: EventKind, cause: StopCause, cx: &Context<'_>) -> Applied {
        let worker = self.holder.as_ref().map(|holder| Arc::clone(&holder.worker));
        let over = kind == EventKind::Abandoned;
        let mut applied = match cause {
            StopCause::User => {
                let reason = if over { Reason::Abandoned } else { Reason::User };
                self.settled_neutral(kind, State::Cancelled, reason, cx)
            }
            StopCause::Deadline => self.settled_neutral(kind, State::Failed, Reason::Deadline, cx),
            StopCause::Timeout | StopCause::Stall => {
                let mut applied = self.fail(kind, Class::Timeout, None, cx);
                if let Some(record) = applied.record.as_mut() {
                    record.error = Some(stop_error(cause));
                }
                applied
            }
            StopCause::Preempt => self.release(kind, ReleaseCause::Preempted, Duration::ZERO, cx),
        };
        if let Some(record) = applied.record.as_mut() {
            record.worker = worker;
            record.facts.push((Fact::Cause, cause.as_str().into()));
        }
        applied
    }

    fn grace_over(&mut self, cx: &Context<'_>) -> Applied {
        let Some(stop) = self.stop else { return Applied::soft() };
        // Whoever still works on it has had its time: nothing it sends may change the task any more.
        self.fence += 1;
        self.stopped(EventKind::Abandoned, stop.cause, cx)
    }

    fn request_stop(&mut self, cause: StopCause, cx: &Context<'_>) -> Applied {
        let until = match self.stop {
            Some(stop) if !stop.cause.gives_way_to(cause) => return Applied::soft(),
            Some(stop) => stop.until,
            None => cx.now.at.after(cx.settings.stop_grace(&self.spec.policy)),
        };
        let stop = Stop { cause, until };
        self.stop = Some(stop);
        let mut applied = self.stays(EventKind::StopRequested, cx);
        applied.effects.stop = Some(stop);
        if let Some(record) = applied.record.as_mut() {
            record.until = Some(until);
        }
        push_fact(&mut applied, Fact::Cause, cause.as_str());
        applied
    }

    fn budget_granted(&mut self, cx: &Context<'_>) -> Applied {
        let price = self.tokens;
        let at = self.run_at.max(cx.now.at);
        self.wait_until(at);
        let mut applied = self.moves(EventKind::BudgetGranted, State::Retry, Reason::Backoff, cx);
        applied.effects.reserve = price;
        applied
    }

    fn redrive(&mut self, deadline: Option<Timestamp>, note: &Arc<str>, cx: &Context<'_>) -> Applied {
        let kept = self.deadline.filter(|deadline| *deadline > cx.now.wall());
        self.deadline = deadline.or(kept);
        self.retry_count = 0;
        self.losses = 0;
        self.idle_deliveries = 0;
        self.preemptions = 0;
        self.probe_failures = 0;
        self.previous_delay = 0;
        self.redrives = self.redrives.saturating_add(1);
        self.queued_at = cx.now.at;
        self.wait_until(cx.now.at);
        let mut applied = self.moves(EventKind::Redriven, State::Queued, Reason::Redriven, cx);
        let text = self.deadline.map_or_else(|| "none".to_owned(), |deadline| deadline.millis().to_string());
        push_fact(&mut applied, Fact::Deadline, &text);
        note_fact(&mut applied, note);
        applied
    }

    /// A waiting task ends without a worker's word.
    fn ends(&mut self, kind: EventKind, to: State, reason: Reason, cx: &Context<'_>) -> Applied {
        let refund = self.take_tokens();
        self.let_go();
        let mut applied = self.moves(kind, to, reason, cx);
        applied.effects.refund = refund;
        applied
    }

    fn moves(&mut self, kind: EventKind, to: State, reason: Reason, cx: &Context<'_>) -> Applied {
        let from = self.state;
        self.state = to;
        self.reason = reason;
        if to != State::Running {
            self.stop = None;
        }
        let mut record = self.record(kind, Some(from), cx.now);
        if matches!(to, State::Retry | State::Queued) {
            record.until = Some(self.run_at);
        }
        Applied { record: Some(record), effects: Effects::default() }
    }

    fn stays(&mut self, kind: EventKind, cx: &Context<'_>) -> Applied {
        let (state, reason) = (self.state, self.reason);
        self.moves(kind, state, reason, cx)
    }

    fn record(&mut self, kind: EventKind, from: Option<State>, now: Now) -> Record {
        self.version += 1;
        self.updated_at = self.updated_at.max(now.at);
        Record {
            task: self.id,
            version: self.version,
            kind,
            from,
            to: self.state,
            reason: self.reason,
            at: self.updated_at,
            fence: self.fence,
            attempt: self.attempt,
            worker: self.holder.as_ref().map(|holder| Arc::clone(&holder.worker)),
            until: None,
            digest: None,
            error: None,
            facts: Vec::new(),
        }
    }

    fn wait_until(&mut self, at: Timestamp) {
        self.run_at = at;
        self.calendar = false;
    }

    fn idle_delay(&self, cx: &Context<'_>) -> Duration {
        let policy = cx.settings.retry_for(&self.spec.policy);
        policy.delay(self.idle_deliveries.saturating_sub(1), cx.draw, Duration::ZERO)
    }

    fn adopt(&mut self, caller: &Caller) {
        if let (Some(holder), Some(session)) = (self.holder.as_mut(), caller.session) {
            holder.session = session;
        }
    }

    fn let_go(&mut self) {
        self.holder = None;
        self.lease = None;
        self.sample = None;
    }

    /// Tokens that were reserved and are not needed after all.
    fn take_tokens(&mut self) -> u32 {
        let tokens = std::mem::take(&mut self.tokens);
        if self.reason == Reason::Budget { 0 } else { tokens }
    }

    /// The permit with its result, the first time; nothing of interest otherwise.
    fn take_sample(
        &mut self,
        result: breaker_core::Sample,
    ) -> Option<(breaker_core::Permit, breaker_core::Sample)> {
        let sample = self.sample.as_mut().filter(|sample| !sample.told)?;
        sample.told = true;
        Some((sample.permit, result))
    }
}

/// What is recorded when a stop of ours, not a worker, ended an attempt.
fn stop_error(cause: StopCause) -> Arc<TaskError> {
    let message = match cause {
        StopCause::Stall => "the attempt made no progress for stall_timeout",
        _ => "the attempt ran longer than attempt_timeout",
    };
    Arc::new(TaskError {
        class: Class::Timeout,
        code: cause.as_str().to_owned(),
        message: message.to_owned(),
        detail: String::new(),
    })
}

fn push_fact(applied: &mut Applied, fact: Fact, text: &str) {
    if let Some(record) = applied.record.as_mut() {
        record.facts.push((fact, text.into()));
    }
}

fn note_fact(applied: &mut Applied, note: &Arc<str>) {
    if !note.is_empty() {
        push_fact(applied, Fact::Note, note);
    }
}
