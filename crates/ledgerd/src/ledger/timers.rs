//! When to look at which task again. One entry per task, whatever number of clocks run for it.
//!
//! An entry may be early (a lease was extended since it was armed): then nothing is due and it is armed anew. It is never
//! late. So a beat costs nothing here, and a task that ends quickly leaves nothing behind.

use ledger_core::limits::{MAX_DEFER, PROBE_PASSES_AFTER};
use ledger_core::{ByTask, Event, Now, Reason, Settings, State, Task, TaskId, Timestamp};
use std::collections::BTreeSet;

/// Armed timers.
#[derive(Debug, Default)]
pub(super) struct Timers {
    order: BTreeSet<(Timestamp, TaskId)>,
    armed: ByTask<Timestamp>,
}

impl Timers {
    /// Looks at `task` at `at`, or earlier if it is armed for earlier.
    pub(super) fn arm(&mut self, task: TaskId, at: Timestamp) {
        match self.armed.get(&task) {
            Some(before) if *before <= at => {}
            before => {
                if let Some(before) = before.copied() {
                    self.order.remove(&(before, task));
                }
                self.armed.insert(task, at);
                self.order.insert((at, task));
            }
        }
    }

    /// Never looks at `task`.
    pub(super) fn disarm(&mut self, task: TaskId) {
        if let Some(at) = self.armed.remove(&task) {
            self.order.remove(&(at, task));
        }
    }

    /// The earliest time to look.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Takes at most `limit` tasks whose time has come, and the time that the first was armed for.
    pub(super) fn due(&mut self, now: Timestamp, limit: usize) -> (Vec<TaskId>, Option<Timestamp>) {
        let first = self.next().filter(|at| *at <= now);
        let mut due = Vec::new();
        while due.len() < limit {
            match self.order.first() {
                Some((at, task)) if *at <= now => {
                    let task = *task;
                    self.order.pop_first();
                    self.armed.remove(&task);
                    due.push(task);
                }
                _ => break,
            }
        }
        (due, first)
    }

    /// Makes every task due: the clock was set, so each is looked at once.
    pub(super) fn all_due(&mut self, now: Timestamp) {
        let tasks: Vec<TaskId> = self.armed.keys().copied().collect();
        for task in tasks {
            self.arm(task, now);
        }
    }

    pub(super) fn clear(&mut self) {
        self.order.clear();
        self.armed.clear();
    }
}

/// What beats changed of a running task; rows do not have it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beaten {
    /// The lease ends no sooner.
    pub(super) until: Timestamp,
    /// When progress was last seen.
    pub(super) progress_at: Timestamp,
}

/// What is to happen when the time comes.
#[derive(Debug)]
pub(super) enum Due {
    /// An event.
    Event(Event),
    /// Its probe has run long enough.
    ProbePasses,
}

/// The next thing that time will do to `task`, and when.
///
/// `since` is when the daemon could last begin to take beats: no lease ends before it was able to for a whole lease.
pub(super) fn next(
    task: &Task,
    settings: &Settings,
    beaten: Option<Beaten>,
    since: Timestamp,
    now: Now,
) -> Option<(Timestamp, Due)> {
    let policy = &task.spec.policy;
    let mut found: Option<(Timestamp, Due)> = None;
    let mut at = |time: Timestamp, due: Due| {
        if found.as_ref().is_none_or(|(first, _)| time < *first) {
            found = Some((time, due));
        }
    };
    match (task.state, task.lease) {
        (State::Running, Some(lease)) => {
            let until = lease_end(task, settings, beaten, since).unwrap_or(lease.until);
            at(until, Due::Event(Event::LeaseOver));
            if let Some(stop) = task.stop {
                at(stop.until, Due::Event(Event::GraceOver));
            } else {
                if let Some(deadline) = task.deadline {
                    at(now.from_wall(deadline), Due::Event(Event::DeadlinePassed));
                }
                if let Some(acked_at) = lease.acked_at {
                    at(acked_at.after(settings.attempt_timeout(policy)), Due::Event(Event::AttemptTimeout));
                    if let Some(stall) = settings.stall_timeout(policy) {
                        let seen = lease.progress_at.max(beaten.map_or(lease.progress_at, |b| b.progress_at));
                        at(seen.max(since).after(stall), Due::Event(Event::Stall));
                    }
                }
            }
            if let (Some(sample), Some(acked_at)) = (task.sample, lease.acked_at)
                && sample.permit.probe
                && !sample.told
                && let Some(beaten) = beaten
            {
                // Its worker must have sent beats until then, which come every third of a lease: of a dead one the last is
                // older. One that comes later is seen when the lease is looked at.
                let (passes, length) = (acked_at.after(PROBE_PASSES_AFTER), settings.lease_duration(policy));
                if beaten.until.before(length / 2) >= passes {
                    at(passes, Due::ProbePasses);
                }
            }
        }
        (State::Queued | State::Retry | State::Blocked, _) => {
            if let Some(deadline) = task.deadline {
                at(now.from_wall(deadline), Due::Event(Event::DeadlinePassed));
            }
            if let Some(timeout) = settings.queue_timeout(policy)
                && task.queued_at < Timestamp::FAR
            {
                at(task.queued_at.after(timeout), Due::Event(Event::QueueTimeout));
            }
            if task.state == State::Retry && task.reason == Reason::Budget {
                at(task.updated_at.after(MAX_DEFER), Due::Event(Event::BudgetExpired));
            }
            if task.state == State::Blocked && task.reason == Reason::Worker && task.calendar {
                at(now.from_wall(task.run_at), Due::Event(Event::Unblock { answer: None, actor: None }));
            }
        }
        _ => {}
    }
    found
}

/// When the lease of a task ends, if it has one; before the ack, when the time for that ends.
pub(super) fn lease_end(
    task: &Task,
    settings: &Settings,
    beaten: Option<Beaten>,
    since: Timestamp,
) -> Option<Timestamp> {
    let lease = task.lease?;
    let length = match lease.acked_at {
        Some(_) => settings.lease_duration(&task.spec.policy),
        None => settings.ack_timeout(&task.spec.policy),
    };
    Some(lease.until.max(since.after(length)).max(beaten.map_or(lease.until, |beaten| beaten.until)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn the_earlier_of_two_times_counts() {
        let mut timers = Timers::default();
        timers.arm(TaskId(1), at(50));
        timers.arm(TaskId(1), at(90));
        timers.arm(TaskId(2), at(40));
        timers.arm(TaskId(2), at(30));
        assert_eq!(timers.next(), Some(at(30)));
        assert_eq!(timers.due(at(60), 10), (vec![TaskId(2), TaskId(1)], Some(at(30))));
        assert_eq!(timers.next(), None);
    }

    /// A probe that was acknowledged at 0 s, with a lease of two minutes.
    fn probe() -> (Task, Settings) {
        let given = ledger_core::AgentOverrides {
            policy: ledger_core::Overrides {
                lease_duration: Some(std::time::Duration::from_secs(120)),
                ..ledger_core::Overrides::default()
            },
            ..ledger_core::AgentOverrides::default()
        };
        let settings = Settings::of(given).expect("valid");
        let spec = ledger_core::Spec {
            agent: ledger_core::AgentId(1),
            task_type: "t".into(),
            policy: ledger_core::Overrides::default(),
            created_at: at(0),
            frees_key: false,
        };
        let (mut task, _) =
            Task::enqueue(TaskId(1), std::sync::Arc::new(spec), 5, None, None, Now::steady(at(0)));
        let session = ledger_core::SessionId(1);
        let holder = ledger_core::Holder { worker: "w".into(), incarnation: 1, session };
        let permit = Some(breaker_core::Permit { epoch: 2, probe: true, slot: 0 });
        let affords = |_| true;
        let now = Now::steady(at(0));
        let lost_with = ledger_core::LostWith::ALONE;
        let cx = ledger_core::Context {
            now,
            settings: &settings,
            draw: 0,
            affords: &affords,
            digest: 0,
            lost_with,
        };
        task.apply(&Event::Claim { holder, permit }, &cx).expect("claimed");
        let caller = ledger_core::Caller { worker: "w".into(), session: None };
        task.apply(&Event::Ack(caller, 1), &cx).expect("acknowledged");
        (task, settings)
    }

    #[test]
    fn a_probe_passes_when_its_worker_sent_beats_for_a_minute_and_not_before() {
        let (task, settings) = probe();
        let passes = |beat_at: Option<i64>, now: i64| {
            let until = |beat| at(beat).after(std::time::Duration::from_secs(120));
            let beaten = beat_at.map(|beat| Beaten { until: until(beat), progress_at: at(0) });
            let due = next(&task, &settings, beaten, at(0), Now::steady(at(now)));
            matches!(due, Some((_, Due::ProbePasses)))
        };
        assert!(!passes(None, 60_000), "no beat at all");
        assert!(!passes(Some(-1), 119_000), "its last beat came before half a lease");
        assert!(passes(Some(40_000), 60_000));
        assert!(passes(Some(90_000), 120_000), "seen late, for the lease is looked at last");
    }

    #[test]
    fn a_disarmed_task_is_not_looked_at() {
        let mut timers = Timers::default();
        timers.arm(TaskId(1), at(50));
        timers.disarm(TaskId(1));
        assert_eq!(timers.due(at(100), 10), (vec![], None));
    }
}
