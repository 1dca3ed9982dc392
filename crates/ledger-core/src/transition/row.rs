//! What every transition shares: the history row, and what is let go of with a delivery.

use crate::event::{Applied, Context, Effects, Fact, Record};
use crate::task::{EventKind, Reason, State, Task};
use crate::time::{Now, Timestamp};
use std::sync::Arc;

impl Task {
    pub(super) fn moves(&mut self, kind: EventKind, to: State, reason: Reason, cx: &Context<'_>) -> Applied {
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

    pub(super) fn stays(&mut self, kind: EventKind, cx: &Context<'_>) -> Applied {
        let (state, reason) = (self.state, self.reason);
        self.moves(kind, state, reason, cx)
    }

    pub(super) fn record(&mut self, kind: EventKind, from: Option<State>, now: Now) -> Record {
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

    pub(super) fn wait_until(&mut self, at: Timestamp) {
        self.run_at = at;
        self.calendar = false;
    }

    pub(super) fn let_go(&mut self) {
        self.holder = None;
        self.lease = None;
        self.sample = None;
    }

    /// Tokens that were reserved and are not needed after all.
    pub(super) fn take_tokens(&mut self) -> u32 {
        let tokens = std::mem::take(&mut self.tokens);
        if self.reason == Reason::Budget { 0 } else { tokens }
    }

    /// The permit with its result, the first time; nothing of interest otherwise.
    pub(super) fn take_sample(
        &mut self,
        result: breaker_core::Sample,
    ) -> Option<(breaker_core::Permit, breaker_core::Sample)> {
        let sample = self.sample.as_mut().filter(|sample| !sample.told)?;
        sample.told = true;
        Some((sample.permit, result))
    }
}

pub(super) fn push_fact(applied: &mut Applied, fact: Fact, text: &str) {
    if let Some(record) = applied.record.as_mut() {
        record.facts.push((fact, text.into()));
    }
}

pub(super) fn note_fact(applied: &mut Applied, note: &Arc<str>) {
    if !note.is_empty() {
        push_fact(applied, Fact::Note, note);
    }
}
