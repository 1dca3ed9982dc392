//! The whole life of a task: one function, one table.
//!
//! Pure: no clock, no dice, no store. A pair of state and event that is not in the table is refused by name and changes
//! nothing. Every change but that of soft fields (lease end, progress) yields exactly one history row.

mod lease;
mod outcome;
mod row;
mod stop;

use crate::event::{Applied, Caller, Context, Event, Fact, Record, Redrive, Refusal};
use crate::id::TaskId;
use crate::limits::IDLE_DELIVERIES;
use crate::task::{EventKind, Reason, Spec, State, StopCause, Task};
use crate::time::{Now, Timestamp};
use row::{note_fact, push_fact};
use std::sync::Arc;

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
            loss_weight: 0,
            lost_at: None,
            idle_deliveries: 0,
            free_releases: 0,
            blocks: 0,
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
                true => self.lose(cx.lost_with.sampled, cx),
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
            (Event::Update { priority, run_at, note }, Queued | Retry | Blocked) => {
                // A blocked task waits for an answer, not for a time.
                if self.state == Blocked && !self.is_gated() && run_at.is_some() {
                    return Err(Refusal::WrongState(Blocked));
                }
                Ok(self.update(*priority, *run_at, note, cx))
            }
            (Event::Redrive(_), Failed) if self.discarded => Err(Refusal::Discarded),
            (Event::Redrive(redrive), Failed) => Ok(self.redrive(redrive, cx)),
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

    fn unblock(&mut self, answer: &Option<Arc<str>>, actor: &Option<Arc<str>>, cx: &Context<'_>) -> Applied {
        if answer.is_some() {
            self.blocks = 0;
        }
        self.wait_until(cx.now.at);
        let mut applied = self.moves(EventKind::Unblocked, State::Queued, Reason::None, cx);
        for (fact, text) in [(Fact::Answer, answer), (Fact::Note, actor)] {
            if let Some(text) = text {
                push_fact(&mut applied, fact, text);
            }
        }
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

    /// Changes when and how urgently a waiting task is run. One that the breaker holds back goes on waiting for its new
    /// time in the queue; one that waits for a token or an answer goes on waiting for that.
    fn update(
        &mut self,
        priority: Option<u8>,
        run_at: Option<Timestamp>,
        note: &Arc<str>,
        cx: &Context<'_>,
    ) -> Applied {
        self.priority = priority.unwrap_or(self.priority);
        let (mut to, mut reason) = (self.state, self.reason);
        if let Some(at) = run_at {
            if self.is_gated() {
                (to, reason) = (State::Queued, Reason::None);
            }
            self.run_at = at.max(cx.now.wall());
            self.calendar = true;
            if self.queued_at < Timestamp::FAR {
                self.queued_at = cx.now.at.max(cx.now.from_wall(self.run_at));
            }
        }
        let mut applied = self.moves(EventKind::Updated, to, reason, cx);
        if let Some(record) = applied.record.as_mut() {
            record.until = Some(self.run_at).filter(|at| *at < Timestamp::FAR);
        }
        if priority.is_some() {
            push_fact(&mut applied, Fact::Priority, &self.priority.to_string());
        }
        note_fact(&mut applied, note);
        applied
    }

    fn redrive(&mut self, redrive: &Redrive, cx: &Context<'_>) -> Applied {
        let kept = self.deadline.filter(|deadline| *deadline > cx.now.wall());
        self.deadline = redrive.deadline.or(kept);
        self.retry_count = 0;
        self.losses = 0;
        self.loss_weight = 0;
        self.lost_at = None;
        self.idle_deliveries = 0;
        self.free_releases = 0;
        self.blocks = 0;
        self.priority = redrive.priority.unwrap_or(self.priority);
        self.preemptions = 0;
        self.probe_failures = 0;
        self.previous_delay = 0;
        self.redrives = self.redrives.saturating_add(1);
        let at = redrive.run_at.map_or(cx.now.at, |at| at.max(cx.now.at));
        self.queued_at = at;
        self.wait_until(at);
        let mut applied = self.moves(EventKind::Redriven, State::Queued, Reason::Redriven, cx);
        if let Some(spec) = redrive.spec.as_ref().filter(|spec| spec.agent != self.spec.agent) {
            self.spec = Arc::clone(spec);
            push_fact(&mut applied, Fact::Agent, &spec.agent.0.to_string());
        }
        if redrive.priority.is_some() {
            push_fact(&mut applied, Fact::Priority, &self.priority.to_string());
        }
        if redrive.payload {
            push_fact(&mut applied, Fact::Payload, "replaced");
        }
        let text = self.deadline.map_or_else(|| "none".to_owned(), |deadline| deadline.millis().to_string());
        push_fact(&mut applied, Fact::Deadline, &text);
        note_fact(&mut applied, &redrive.note);
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
}
