//! The history is the truth: folding a task's rows yields its state.
//!
//! Written apart from the transition table on purpose, so that each checks the other. Needs no policy: rows carry the
//! results of decisions. Soft fields (lease end, progress) and the breaker's permit are not in the history.

use crate::event::{Fact, Record};
use crate::limits::LOSS_MEMORY;
use crate::task::{EventKind, Reason, State, StopCause};
use crate::time::Timestamp;
use std::sync::Arc;

/// What the history says of a task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Folded {
    /// Where it is; none before the first row.
    pub state: Option<State>,
    /// Finer meaning; none before the first row.
    pub reason: Option<Reason>,
    /// Transitions so far.
    pub version: u64,
    /// Newest claim.
    pub fence: u64,
    /// Claims made.
    pub delivery: u32,
    /// Executions that began.
    pub attempt: u32,
    /// Failures that led to a retry.
    pub retry_count: u32,
    /// Leases of acknowledged tasks that ran out.
    pub losses: u32,
    /// What those weigh toward POISON, in thousandths.
    pub loss_weight: u32,
    /// When it was last lost.
    pub lost_at: Option<Timestamp>,
    /// Deliveries since the last attempt that ended in complete, fail or block.
    pub idle_deliveries: u32,
    /// Releases in a row that did not count as idle.
    pub free_releases: u32,
    /// Blocks in a row.
    pub blocks: u32,
    /// Times it made room.
    pub preemptions: u32,
    /// Times it was redriven.
    pub redrives: u32,
    /// Failed probes that did not count.
    pub probe_failures: u32,
    /// Who holds it, while RUNNING.
    pub worker: Option<Arc<str>>,
    /// A stop that was asked for.
    pub stop: Option<(StopCause, Timestamp)>,
    /// Its dead letter was discarded.
    pub discarded: bool,
}

/// Why a row cannot follow the ones before it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("history row {version}: {what}")]
pub struct Broken {
    /// Of the row.
    pub version: u64,
    /// What is wrong.
    pub what: &'static str,
}

impl Folded {
    /// Folds rows, oldest first.
    ///
    /// # Errors
    /// The first row that cannot follow those before it.
    pub fn of<'a>(rows: impl IntoIterator<Item = &'a Record>) -> Result<Self, Broken> {
        let mut folded = Self::default();
        let mut last = Timestamp::from_millis(i64::MIN);
        for row in rows {
            folded.step(row)?;
            if row.at < last {
                return Err(Broken { version: row.version, what: "time runs backwards" });
            }
            last = row.at;
        }
        Ok(folded)
    }

    fn step(&mut self, row: &Record) -> Result<(), Broken> {
        let broken = |what| Err(Broken { version: row.version, what });
        if row.version != self.version + 1 {
            return broken("versions have a gap");
        }
        if row.from != self.state {
            return broken("it starts from another state");
        }
        if row.fence < self.fence {
            return broken("the fence fell");
        }
        if row.attempt < self.attempt {
            return broken("the attempt fell");
        }
        self.count(row);
        match row.kind {
            EventKind::Assigned | EventKind::Resumed => self.worker.clone_from(&row.worker),
            EventKind::StopRequested => {
                let (Some(cause), Some(until)) = (cause(row), row.until) else {
                    return broken("a stop without cause or end");
                };
                self.stop = Some((cause, until));
            }
            EventKind::Discarded => self.discarded = true,
            _ => {}
        }
        if row.to != State::Running {
            self.stop = None;
            self.worker = None;
        }
        self.state = Some(row.to);
        self.reason = Some(row.reason);
        self.version = row.version;
        self.fence = row.fence;
        self.attempt = row.attempt;
        Ok(())
    }

    fn lose(&mut self, row: &Record) {
        let weight = row.fact(Fact::Weight).and_then(|text| text.parse().ok()).unwrap_or(1_000);
        if self.lost_at.is_some_and(|lost| row.at.since(lost) >= LOSS_MEMORY) {
            self.loss_weight = 0;
        }
        self.losses = self.losses.saturating_add(1);
        self.loss_weight = self.loss_weight.saturating_add(weight);
        self.lost_at = Some(row.at);
    }

    /// What a row adds to the counters. A cause on the row of an end says that a stop decided where the task went.
    fn count(&mut self, row: &Record) {
        use EventKind::{Assigned, Blocked, Completed, Failed, Lost, Redriven, StopRequested};
        let stopped = cause(row).filter(|_| row.kind != StopRequested);
        match row.kind {
            Assigned => {
                self.delivery = self.delivery.saturating_add(1);
                self.idle_deliveries = self.idle_deliveries.saturating_add(1);
            }
            Lost if stopped.is_none() => self.lose(row),
            EventKind::Resumed if row.fact(Fact::Free).is_some() => {
                self.idle_deliveries = self.idle_deliveries.saturating_add(1);
            }
            EventKind::Unblocked if row.fact(Fact::Answer).is_some() => self.blocks = 0,
            Redriven => {
                self.redrives = self.redrives.saturating_add(1);
                self.retry_count = 0;
                self.losses = 0;
                self.loss_weight = 0;
                self.lost_at = None;
                self.idle_deliveries = 0;
                self.free_releases = 0;
                self.blocks = 0;
                self.preemptions = 0;
                self.probe_failures = 0;
            }
            _ => {}
        }
        let failed = match stopped {
            Some(cause) => matches!(cause, StopCause::Timeout | StopCause::Stall),
            None => row.kind == Failed,
        };
        let ended = failed || stopped.is_none() && row.kind == Completed;
        let blocked = stopped.is_none() && row.kind == Blocked && row.to == State::Blocked;
        if ended || blocked {
            self.idle_deliveries = 0;
            self.free_releases = 0;
            self.blocks = if blocked { self.blocks.saturating_add(1) } else { 0 };
        }
        if failed && row.to == State::Retry {
            let counter = match row.fact(Fact::Uncounted) {
                Some(_) => &mut self.probe_failures,
                None => &mut self.retry_count,
            };
            *counter = counter.saturating_add(1);
        }
        // Deliveries that ended so do not count as idle; only these rows carry the reasons.
        let released = matches!(row.reason, Reason::Drain | Reason::Preempted) && !stays_as_it_was(row.kind);
        if released && row.fact(Fact::Free).is_none() {
            self.idle_deliveries = self.idle_deliveries.saturating_sub(1);
            self.free_releases = self.free_releases.saturating_add(1);
        }
        if released && row.reason == Reason::Preempted {
            self.preemptions = self.preemptions.saturating_add(1);
        }
    }
}

/// Rows that repeat the reason of the row before.
const fn stays_as_it_was(kind: EventKind) -> bool {
    matches!(kind, EventKind::Updated | EventKind::Restored)
}

fn cause(row: &Record) -> Option<StopCause> {
    let text = row.fact(Fact::Cause)?;
    StopCause::ALL.iter().copied().find(|cause| cause.as_str() == text)
}
