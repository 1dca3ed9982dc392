//! Handing a task out, starting it, and losing it.

use super::row::push_fact;
use crate::event::{Applied, Caller, Context, Event, Fact};
use crate::limits::LOSS_MEMORY;
use crate::task::{EventKind, Lease, Reason, Sample, State, Task};
use crate::time::Timestamp;
use retry_core::{ErrorClass, Failure};
use std::sync::Arc;
use std::time::Duration;

impl Task {
    pub(super) fn claim(&mut self, event: &Event, cx: &Context<'_>) -> Applied {
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

    pub(super) fn ack(&mut self, caller: &Caller, cx: &Context<'_>) -> Applied {
        self.adopt(caller);
        if self.acked() {
            return Applied::soft();
        }
        self.begin_attempt(cx);
        self.stays(EventKind::Started, cx)
    }

    pub(super) fn beat(&mut self, caller: &Caller, cx: &Context<'_>) -> Applied {
        self.adopt(caller);
        let duration = cx.settings.lease_duration(&self.spec.policy);
        if let Some(lease) = self.lease.as_mut().filter(|lease| lease.acked_at.is_some()) {
            lease.until = lease.until.max(cx.now.at.after(duration));
        }
        Applied::soft()
    }

    pub(super) fn resume(&mut self, caller: &Caller, starts: bool, cx: &Context<'_>) -> Applied {
        let refund = self.take_tokens();
        self.adopt(caller);
        // Beats alone must not bring an unstarted task back for ever.
        let idles = !starts && !self.acked();
        if idles {
            self.idle_deliveries = self.idle_deliveries.saturating_add(1);
        }
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
        if idles {
            push_fact(&mut applied, Fact::Free, "false");
        }
        applied
    }

    pub(super) fn begin_attempt(&mut self, cx: &Context<'_>) {
        let at = cx.now.at;
        let duration = cx.settings.lease_duration(&self.spec.policy);
        self.attempt = self.attempt.saturating_add(1);
        self.queued_at = Timestamp::FAR;
        if let Some(lease) = self.lease.as_mut() {
            *lease = Lease { until: at.after(duration), acked_at: Some(at), progress_at: at };
        }
    }

    /// Nobody acknowledged: as a release, or what a pending stop says. Its holder may come back (`keeps`) unless it
    /// said itself that it does not hold the task.
    pub(super) fn ack_timeout(&mut self, keeps: bool, cx: &Context<'_>) -> Applied {
        if let Some(stop) = self.stop {
            return self.stopped(EventKind::AckTimeout, stop.cause, Duration::ZERO, cx);
        }
        let sample = self.take_sample(breaker_core::Sample::Neutral);
        let worker = self.holder.as_ref().map(|holder| Arc::clone(&holder.worker));
        if !keeps {
            self.let_go();
        }
        let delay = if keeps { self.idle_delay(cx) } else { Duration::ZERO };
        self.wait_until(cx.now.at.after(delay));
        let mut applied = self.moves(EventKind::AckTimeout, State::Queued, Reason::AckTimeout, cx);
        applied.effects.sample = sample;
        if let Some(record) = applied.record.as_mut() {
            record.worker = worker;
        }
        applied
    }

    /// The lease of a started task ran out. Its holder may still come back, until somebody else claims it.
    pub(super) fn lose(&mut self, sampled: bool, cx: &Context<'_>) -> Applied {
        if let Some(stop) = self.stop {
            let mut applied = self.stopped(EventKind::Lost, stop.cause, Duration::ZERO, cx);
            if let Some((_, sample)) = applied.effects.sample.as_mut().filter(|_| sampled) {
                *sample = breaker_core::Sample::Neutral;
            }
            return applied;
        }
        let sample = self.take_sample(match sampled {
            true => breaker_core::Sample::Neutral,
            false => breaker_core::Sample::Failure,
        });
        let policy = cx.settings.retry_for(&self.spec.policy);
        // A machine that dies with many tasks says little about each of them.
        let weight = 1_000 / cx.lost_with.tasks.clamp(1, 1_000);
        let at = self.updated_at.max(cx.now.at);
        self.forget_losses(at);
        let failure = Failure::new(ErrorClass::Lost).weighing(weight);
        let decision = self.decide(&policy, failure, self.retry_count, cx);
        self.losses = self.losses.saturating_add(1);
        self.loss_weight = self.loss_weight.saturating_add(weight);
        self.lost_at = Some(at);
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
        if weight != 1_000 {
            push_fact(&mut applied, Fact::Weight, &weight.to_string());
        }
        applied.effects.sample = sample;
        applied
    }

    fn forget_losses(&mut self, at: Timestamp) {
        if self.lost_at.is_some_and(|lost| at.since(lost) >= LOSS_MEMORY) {
            self.loss_weight = 0;
        }
    }

    pub(super) fn adopt(&mut self, caller: &Caller) {
        if let (Some(holder), Some(session)) = (self.holder.as_mut(), caller.session) {
            holder.session = session;
        }
    }
}
