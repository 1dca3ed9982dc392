//! The ledger of the simulation: timers, a breaker, a budget, and receipts; no store, so nothing is ever undone.

use super::{Dice, Down, Message, Up};
use crate::support::updates;
use crate::support::{Life, START, cancels, redrives, seconds, unblocks};
use breaker_core::{Availability, Breaker};
use ledger_core::limits::{IDLE_DELIVERIES, MAX_DEFER, PROBE_PASSES_AFTER};
use ledger_core::{
    AgentOverrides, Applied, Caller, Event, EventKind, Holder, Now, Outcome, Overrides, Reason, Refusal,
    SessionId, Settings, State, TaskId, Timestamp,
};
use retry_core::Bucket;
use std::collections::{BTreeSet, HashMap};

pub(super) struct Ledger {
    pub(super) now: Now,
    lives: Vec<Life>,
    settings: Settings,
    breaker: Breaker,
    budget: Bucket,
    /// Newest incarnation of each worker that said Hello.
    workers: HashMap<usize, u64>,
    /// Who was given which fence.
    claims: HashMap<(TaskId, u64), String>,
    /// Digests of outcomes: one for each fence, for ever.
    outcomes: HashMap<(TaskId, u64), u64>,
}

fn name(worker: usize) -> String {
    format!("worker-{worker}")
}

impl Ledger {
    pub(super) fn new(dice: &mut Dice) -> Self {
        let given = AgentOverrides {
            failure_threshold: Some(3),
            budget_capacity: Some(3.0),
            budget_floor: Some(0.02),
            ..AgentOverrides::default()
        };
        let settings = Settings::of(given).expect("valid");
        let lives = (0..12)
            .map(|id| {
                let policy = Overrides {
                    max_retries: Some(dice.below(5) as u32),
                    lease_duration: Some(seconds(30)),
                    attempt_timeout: dice.one_in(3).then_some(seconds(60)),
                    queue_timeout: dice.one_in(4).then_some(seconds(20)),
                    ..Overrides::NONE
                };
                let run_at = dice.one_in(3).then(|| START.after(seconds(dice.below(600))));
                let deadline = dice.one_in(4).then(|| START.after(seconds(600 + dice.below(1_200))));
                let mut life = Life::enqueued(policy, run_at, deadline);
                life.task.id = TaskId(id);
                life.settings = settings.clone();
                life
            })
            .collect();
        let limits = settings.budget.build().expect("the default");
        Self {
            now: Now::steady(START),
            lives,
            breaker: Breaker::new(settings.breaker).expect("valid"),
            budget: Bucket::full(limits, START.since_epoch()),
            settings,
            workers: HashMap::new(),
            claims: HashMap::new(),
            outcomes: HashMap::new(),
        }
    }

    fn apply(&mut self, at: usize, event: &Event, draw: u64) -> Result<Applied, Refusal> {
        let now = self.now.at.since_epoch();
        let life = &mut self.lives[at];
        life.now = self.now;
        life.draw = draw;
        life.tokens = u32::try_from(self.budget.available(now) / 1_000).unwrap_or(u32::MAX);
        let ended = life.task.state.is_terminal();
        let applied = life.try_apply(event)?;
        if ended && !life.task.state.is_terminal() {
            assert!(matches!(event, Event::Redrive(_)), "{event:?} brought an ended task back");
        }
        self.budget.refund(applied.effects.refund);
        assert!(self.budget.withdraw(now, applied.effects.reserve), "it reserved what is not there");
        if applied.effects.deposit {
            self.budget.deposit(now);
        }
        if let Some((permit, sample)) = applied.effects.sample {
            let _ = self.breaker.record(permit, sample, now, draw);
            self.ungate();
        }
        Ok(applied)
    }

    fn ungate(&mut self) {
        if self.breaker.state() == breaker_core::State::Closed {
            for at in 0..self.lives.len() {
                let _ = self.apply(at, &Event::Ungate, 0);
            }
        }
    }

    fn at(&self, task: TaskId) -> usize {
        task.0 as usize
    }

    /// What a worker says, and what it is answered.
    pub(super) fn hears(&mut self, worker: usize, incarnation: u64, up: &Up) -> Vec<Down> {
        let newest = self.workers.get(&worker).copied().unwrap_or(0);
        if incarnation < newest {
            return Vec::new();
        }
        if incarnation > newest {
            self.workers.insert(worker, incarnation);
            self.take_back(worker, incarnation);
        }
        let who = Caller { worker: name(worker).into(), session: Some(SessionId(incarnation)) };
        match up {
            Up::Hello => Vec::new(),
            Up::Ack(task, fence) => match self.apply(self.at(*task), &Event::Ack(who, *fence), 1) {
                Ok(_) => Vec::new(),
                Err(_) => vec![Down::Lost(*task, *fence)],
            },
            Up::Beat(held) => held.iter().filter_map(|lease| self.beat(&who, *lease)).collect(),
            Up::Outcome(task, fence, outcome, digest) => {
                vec![self.settle(who, (*task, *fence), outcome, *digest)]
            }
        }
    }

    fn beat(&mut self, who: &Caller, (task, fence): (TaskId, u64)) -> Option<Down> {
        let at = self.at(task);
        match self.apply(at, &Event::Beat(who.clone(), fence), 1) {
            // Settled, and its receipt lost: not gone, the outcome is said again and gets it.
            Err(_) if self.outcomes.contains_key(&(task, fence)) => None,
            Err(_) => Some(Down::Lost(task, fence)),
            Ok(_) => self.lives[at].task.stop.map(|_| Down::Stop(task, fence)),
        }
    }

    fn settle(&mut self, who: Caller, lease: (TaskId, u64), outcome: &Outcome, digest: u64) -> Down {
        let (task, fence) = lease;
        let at = self.at(task);
        let before = self.lives[at].task.fence;
        let worker = who.worker.to_string();
        match self.apply(at, &Event::Settle(who, fence, outcome.clone()), digest) {
            Ok(applied) => {
                assert!(applied.effects.settled);
                assert_eq!(fence, before, "a stale fence settled");
                assert_eq!(self.claims.get(&lease), Some(&worker), "a stranger settled");
                assert_eq!(self.outcomes.insert(lease, digest), None, "one fence, two outcomes");
                Down::Receipt(task, fence)
            }
            // `cancelled` without a stop: this worker will not say anything else.
            Err(Refusal::NotStopped) => Down::Lost(task, fence),
            Err(Refusal::LeaseLost | Refusal::TaskTerminal) => match self.outcomes.get(&lease) {
                Some(known) if *known == digest && self.claims.get(&lease) == Some(&worker) => {
                    Down::Receipt(task, fence)
                }
                // Another digest is no bug of the worker: an assignment that came twice was worked on twice.
                _ => Down::Lost(task, fence),
            },
            Err(_) => Down::Lost(task, fence),
        }
    }

    /// A new process: what the old one held is lost, all in one breaker sample.
    fn take_back(&mut self, worker: usize, incarnation: u64) {
        let name = name(worker);
        let mut sampled = false;
        for at in 0..self.lives.len() {
            let task = &self.lives[at].task;
            let held = task.state == State::Running
                && task
                    .holder
                    .as_ref()
                    .is_some_and(|holder| *holder.worker == *name && holder.incarnation < incarnation);
            if held {
                let acked = task.acked();
                self.apply(at, &Event::TakenBack { sampled }, 2).expect("it is RUNNING");
                sampled |= acked;
            }
        }
    }

    /// Users and operators do as they like.
    pub(super) fn users(&mut self, dice: &mut Dice) {
        let at = dice.below(self.lives.len() as u64) as usize;
        let event = match dice.below(200) {
            0 => cancels(),
            1..=3 => redrives(),
            4..=5 => Event::Preempt,
            6..=20 => unblocks(),
            21..=22 => updates(Some(dice.below(10) as u8), Some(self.now.wall())),
            _ => return,
        };
        let _ = self.apply(at, &event, dice.roll());
    }

    /// Timers, grants, and claims.
    pub(super) fn passes_time(&mut self, healed: bool, dice: &mut Dice) -> Vec<Message> {
        let mut said = Vec::new();
        if self.breaker.tick(self.now.at.since_epoch(), dice.roll()).is_some() {
            self.ungate();
        }
        for at in 0..self.lives.len() {
            if let Some(event) = self.due(at, healed) {
                self.apply(at, &event, dice.roll()).expect("it is due");
            }
            self.probe_passes(at);
            said.extend(self.claim(at, healed, dice));
        }
        said
    }

    /// What time does to a task.
    fn due(&self, at: usize, healed: bool) -> Option<Event> {
        let (task, now) = (&self.lives[at].task, self.now);
        let past = |at: Timestamp| at <= now.at;
        let deadline = task.deadline.is_some_and(|deadline| past(now.from_wall(deadline)));
        let policy = &task.spec.policy;
        match (task.state, task.lease) {
            (State::Running, Some(lease)) => {
                let timeout = self.settings.attempt_timeout(policy);
                if task.stop.is_some_and(|stop| past(stop.until)) {
                    Some(Event::GraceOver)
                } else if past(lease.until) {
                    Some(Event::LeaseOver)
                } else if task.stop.is_none() && deadline {
                    Some(Event::DeadlinePassed)
                } else if task.stop.is_none()
                    && lease.acked_at.is_some_and(|acked_at| past(acked_at.after(timeout)))
                {
                    Some(Event::AttemptTimeout)
                } else {
                    None
                }
            }
            (State::Done | State::Failed | State::Cancelled, _) => None,
            _ if deadline => Some(Event::DeadlinePassed),
            (State::Queued, _) if task.idle_deliveries >= IDLE_DELIVERIES => Some(Event::Undeliverable),
            _ if task.queued_at < Timestamp::FAR
                && self
                    .settings
                    .queue_timeout(policy)
                    .is_some_and(|timeout| past(task.queued_at.after(timeout))) =>
            {
                Some(Event::QueueTimeout)
            }
            (State::Retry, _) if task.reason == Reason::Budget => {
                let enough = self.budget.available(now.at.since_epoch()) >= u64::from(task.tokens) * 1_000;
                match enough {
                    true => Some(Event::BudgetGranted),
                    false => past(task.updated_at.after(MAX_DEFER)).then_some(Event::BudgetExpired),
                }
            }
            // The person who was asked answers at last.
            (State::Blocked, _) if healed && task.reason == Reason::Worker => Some(unblocks()),
            _ => None,
        }
    }

    fn probe_passes(&mut self, at: usize) {
        let task = &mut self.lives[at].task;
        let ran = task.lease.and_then(|lease| lease.acked_at).map(|acked_at| self.now.at.since(acked_at));
        if ran.is_some_and(|ran| ran >= PROBE_PASSES_AFTER)
            && let Some((permit, sample)) = task.probe_passes()
        {
            let _ = self.breaker.record(permit, sample, self.now.at.since_epoch(), 0);
            self.ungate();
        }
    }

    fn claim(&mut self, at: usize, healed: bool, dice: &mut Dice) -> Option<Message> {
        if !self.lives[at].task.can_be_claimed(self.now) || !(healed || dice.one_in(2)) {
            return None;
        }
        let worker = dice.below(4) as usize;
        let incarnation = *self.workers.get(&worker)?;
        let now = self.now.at.since_epoch();
        let permit = match self.breaker.is_available(now) {
            Availability::No { .. } => {
                if self.breaker.state() == breaker_core::State::Open && !self.lives[at].task.is_gated() {
                    self.apply(at, &Event::Gate, 0).expect("it is due");
                }
                return None;
            }
            Availability::Yes | Availability::Probe => self.breaker.try_acquire(now).ok()?,
        };
        let name = name(worker);
        let holder = Holder { worker: name.as_str().into(), incarnation, session: SessionId(incarnation) };
        let fence = self.lives[at].task.fence;
        self.apply(at, &Event::Claim { holder, permit: Some(permit) }, 3).expect("it can be claimed");
        let task = &self.lives[at].task;
        assert_eq!(task.fence, fence + 1);
        assert_eq!(self.claims.insert((task.id, task.fence), name), None, "a fence is claimed once");
        let down = Down::Assignment(task.id, task.fence);
        Some(Message::Down { worker, incarnation, down })
    }

    /// What must hold at every moment.
    pub(super) fn keeps_its_rules(&self) {
        let probes = self
            .lives
            .iter()
            .filter_map(|life| life.task.sample.filter(|_| life.task.state == State::Running))
            .filter(|sample| sample.permit.probe && !sample.told)
            .filter(|sample| sample.permit.epoch == self.breaker.epoch())
            .count();
        assert!(probes <= 2, "{probes} probes under way");
        assert_eq!(self.breaker.probes_in_flight() as usize, probes, "a slot of a probe leaked");
    }

    pub(super) fn all_ended(&self) -> bool {
        let ended = self.lives.iter().all(|life| life.task.state.is_terminal());
        if ended {
            for life in &self.lives {
                let claims: Vec<_> = life
                    .history
                    .iter()
                    .filter(|row| row.kind == EventKind::Assigned)
                    .map(|row| row.fence)
                    .collect();
                assert!(claims.windows(2).all(|two| two[0] < two[1]), "fences rise with each claim");
            }
        }
        ended
    }

    pub(super) fn kinds(&self) -> BTreeSet<EventKind> {
        self.lives.iter().flat_map(Life::kinds).collect()
    }

    pub(super) fn unfinished(&self) -> String {
        let open = self.lives.iter().filter(|life| !life.task.state.is_terminal());
        open.map(|life| format!("{:?}\n", life.task)).collect()
    }
}
