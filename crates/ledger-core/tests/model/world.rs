//! What a state of the model is: the real task, what was handed out, and what may be said about it at any time.
//!
//! No network is modelled, since none is needed: a message that may be lost, repeated and late is one that may arrive at
//! any time, any number of times, or never. So each worker may say anything about any fence it was ever given.

use ledger_core::fold::Folded;
use ledger_core::{
    Applied, Caller, Context, Event, Holder, Outcome, Reason, Record, Refusal, SessionId, Settings, State,
    StopCause, Task, Timestamp,
};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::Fault;
use crate::support::folded;

/// One delivery, as the ledger remembers it.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) fence: u64,
    pub(super) worker: u8,
    /// Digest of the outcome that settled it.
    pub(super) settled: Option<u64>,
    /// Its grace ended.
    pub(super) revoked: bool,
    /// Results its breaker permit has given; none without a permit.
    pub(super) samples: Option<u8>,
}

/// A state.
///
/// Two of them are the same when nothing that is decided later can tell them apart: times count only as what is left of
/// them, and the counters that no decision reads (version, fence, delivery, attempt, preemptions) not at all. The workers
/// are alike, so it does not matter which is which. Free releases and blocks are counts that decisions do read, but only
/// after a hundred and a thousand: they are left out, and their ends are not reached here.
#[derive(Clone)]
pub(super) struct World {
    pub(super) task: Task,
    pub(super) now: Timestamp,
    pub(super) claims: Vec<Claim>,
    /// Every row so far. Not part of the identity of a state: folding is a left fold, so proving each step of it on one
    /// way to a state proves it for all ways.
    pub(super) history: Vec<Arc<Record>>,
    pub(super) fault: Option<Fault>,
}

pub(super) const NAMES: [&str; 2] = ["a", "b"];

pub(super) fn caller(worker: u8) -> Caller {
    Caller { worker: NAMES[usize::from(worker)].into(), session: Some(SessionId(u64::from(worker) + 1)) }
}

pub(super) fn holder(worker: u8) -> Holder {
    Holder {
        worker: NAMES[usize::from(worker)].into(),
        incarnation: 1,
        session: SessionId(u64::from(worker) + 1),
    }
}

impl World {
    pub(super) fn new(task: Task, first: Record, now: Timestamp) -> Self {
        Self { task, now, claims: Vec::new(), history: vec![Arc::new(first)], fault: None }
    }

    /// Whether the task is in the hands of this worker, or would be if it came back.
    pub(super) fn is_holder(&self, worker: u8) -> bool {
        self.task.holder.as_ref().is_some_and(|holder| *holder.worker == *NAMES[usize::from(worker)])
    }

    /// The newest claim, if its fence is still the task's.
    pub(super) fn current(&self) -> Option<&Claim> {
        self.claims.last().filter(|claim| claim.fence == self.task.fence)
    }

    /// One fence of each kind that `worker` was given and lost: settled or not, the newest.
    pub(super) fn stale(&self, worker: u8) -> [Option<&Claim>; 2] {
        [false, true].map(|settled| {
            self.claims.iter().rev().find(|claim| {
                claim.worker == worker && claim.fence != self.task.fence && claim.settled.is_some() == settled
            })
        })
    }

    /// Does `event` to the real task.
    pub(super) fn apply(
        &mut self,
        event: &Event,
        settings: &Settings,
        affords: bool,
        digest: u64,
    ) -> Result<Applied, Refusal> {
        let cx = Context {
            now: ledger_core::Now::steady(self.now),
            settings,
            draw: 0,
            affords: &|_| affords,
            digest,
            lost_with: ledger_core::LostWith::ALONE,
        };
        self.task.apply(event, &cx)
    }

    /// Keeps the books on a transition that happened, and judges it.
    pub(super) fn note(&mut self, before: &Self, event: &Event, applied: &Applied) -> Result<(), Fault> {
        let (task, was) = (&self.task, &before.task);
        if task.fence < was.fence {
            return Err(Fault::Fence);
        }
        if let (Event::Settle(_, fence, _) | Event::Ack(_, fence) | Event::Beat(_, fence), true) =
            (event, *task != *was)
            && *fence != was.fence
        {
            return Err(Fault::Zombie);
        }
        if was.state.is_terminal()
            && *task != *was
            && !(was.state == State::Failed && matches!(event, Event::Redrive { .. } | Event::Discard { .. }))
        {
            return Err(Fault::Terminal);
        }
        self.tokens(before, event, applied)?;
        self.books(before, event, applied)?;
        if let Some(record) = &applied.record {
            self.history.push(Arc::new(record.clone()));
        }
        Ok(())
    }

    /// The history says what the task says.
    pub(super) fn folds(&self) -> Result<(), Fault> {
        let rows = self.history.iter().map(|row| &**row);
        if Folded::of(rows) == Ok(folded(&self.task)) { Ok(()) } else { Err(Fault::Fold) }
    }

    /// Reserved tokens are on the task until a claim spends them or they are given back.
    fn tokens(&self, before: &Self, event: &Event, applied: &Applied) -> Result<(), Fault> {
        let reserved = |task: &Task| if task.reason == Reason::Budget { 0 } else { task.tokens };
        let spent = if matches!(event, Event::Claim { .. }) { reserved(&before.task) } else { 0 };
        let effects = &applied.effects;
        let held = reserved(&before.task) + effects.reserve;
        if held == reserved(&self.task) + effects.refund + spent { Ok(()) } else { Err(Fault::Tokens) }
    }

    fn books(&mut self, before: &Self, event: &Event, applied: &Applied) -> Result<(), Fault> {
        if applied.effects.sample.is_some()
            && let Some(claim) = self.claims.last_mut()
        {
            let samples = claim.samples.get_or_insert(0);
            *samples += 1;
            if *samples > 1 {
                return Err(Fault::Sample);
            }
        }
        let over = matches!(event, Event::Claim { .. }) || self.task.state.is_terminal();
        if over && self.claims.last().is_some_and(|claim| claim.samples == Some(0)) {
            return Err(Fault::Sample);
        }
        if applied.effects.settled
            && let Event::Settle(_, fence, _) = event
            && let Some(claim) = self.claims.iter_mut().find(|claim| claim.fence == *fence)
        {
            let digest = applied.record.as_ref().and_then(|record| record.digest);
            if std::mem::replace(&mut claim.settled, digest).is_some() {
                return Err(Fault::Twice);
            }
        }
        match event {
            Event::Claim { holder, permit } => {
                let fence = self.task.fence;
                if fence <= before.task.fence || self.claims.iter().any(|claim| claim.fence >= fence) {
                    return Err(Fault::Fence);
                }
                let worker = u8::from(*holder.worker == *NAMES[1]);
                let samples = permit.map(|_| 0);
                self.claims.push(Claim { fence, worker, settled: None, revoked: false, samples });
            }
            Event::GraceOver if applied.record.is_some() => {
                if let Some(claim) = self.claims.last_mut() {
                    claim.revoked = true;
                }
            }
            _ => {}
        }
        let newest = self.claims.last();
        if newest.is_some_and(|claim| claim.revoked && claim.fence >= self.task.fence) {
            return Err(Fault::Revoked);
        }
        Ok(())
    }

    /// What is left of a time, in whole seconds; times that have passed are all alike.
    fn left(&self, at: Timestamp) -> i64 {
        match at {
            Timestamp::FAR => i64::MAX,
            at => (at.millis() - self.now.millis()).max(0),
        }
    }
}

/// What two states have in common when nothing that is decided later can tell them apart.
type Identity = (
    (State, Reason, u32, u32, u32, u32, u32, u32, bool, bool),
    (i64, Option<i64>, bool, bool, Option<StopCause>, Option<(bool, bool)>),
    Option<(bool, Option<u8>)>,
    [(bool, bool, [bool; 2]); 2],
    Option<Fault>,
);

impl World {
    fn identity(&self) -> Identity {
        let task = &self.task;
        // Which worker is which does not matter: the set of what is true of one of them does.
        let mut workers = [0, 1].map(|worker| {
            let current = self.current().is_some_and(|claim| claim.worker == worker);
            (self.is_holder(worker), current, self.stale(worker).map(|claim| claim.is_some()))
        });
        workers.sort_unstable();
        (
            (
                task.state,
                task.reason,
                task.retry_count,
                task.losses,
                task.idle_deliveries,
                task.probe_failures,
                task.redrives,
                task.tokens,
                task.discarded,
                task.calendar,
            ),
            (
                self.left(task.run_at),
                task.deadline.map(|at| self.left(at)),
                task.queued_at < Timestamp::FAR,
                task.acked(),
                task.stop.map(|stop| stop.cause),
                task.sample.map(|sample| (sample.permit.probe, sample.told)),
            ),
            self.current().map(|claim| (claim.settled.is_some(), claim.samples)),
            workers,
            self.fault,
        )
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.identity().hash(hasher);
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let task = &self.task;
        write!(f, "{} {} fence {} {:?}", task.state, task.reason, task.fence, self.fault)
    }
}

/// A number for an outcome: the same for the same words.
pub(super) fn digest(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Complete => 1,
        Outcome::Fail { error, .. } => 2 + u64::from(error.class.code()),
        Outcome::Release { cause, .. } => 20 + *cause as u64,
        Outcome::Block { until, .. } => 30 + u64::from(until.is_some()),
        Outcome::Cancelled => 40,
    }
}
