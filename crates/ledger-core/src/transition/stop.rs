//! Asking a running task to end, and ending it when its worker does not.

use super::row::push_fact;
use crate::event::{Applied, Context, Fact, Outcome, ReleaseCause};
use crate::task::{Class, EventKind, Reason, State, Stop, StopCause, Task, TaskError};
use std::sync::Arc;
use std::time::Duration;

impl StopCause {
    /// Whether this cause, and not the outcome itself, says where the task goes. What is complete is complete; who was
    /// asked to make room did so by failing or blocking, too.
    pub(super) const fn decides(self, outcome: &Outcome) -> bool {
        match outcome {
            Outcome::Complete => false,
            Outcome::Fail { .. } | Outcome::Block { .. } => !matches!(self, Self::Preempt),
            Outcome::Release { .. } | Outcome::Cancelled => true,
        }
    }
}

impl Task {
    pub(super) fn request_stop(&mut self, cause: StopCause, cx: &Context<'_>) -> Applied {
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

    pub(super) fn grace_over(&mut self, cx: &Context<'_>) -> Applied {
        let Some(stop) = self.stop else { return Applied::soft() };
        // Whoever still works on it has had its time: nothing it sends may change the task any more.
        self.fence += 1;
        self.stopped(EventKind::Abandoned, stop.cause, Duration::ZERO, cx)
    }

    /// The end of a running task as the cause of its stop says. `asked`: a released task is not offered before.
    pub(super) fn stopped(
        &mut self,
        kind: EventKind,
        cause: StopCause,
        asked: Duration,
        cx: &Context<'_>,
    ) -> Applied {
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
            StopCause::Preempt => self.release(kind, ReleaseCause::Preempted, asked, cx),
        };
        if let Some(record) = applied.record.as_mut() {
            record.worker = worker;
            record.facts.push((Fact::Cause, cause.as_str().into()));
        }
        applied
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
