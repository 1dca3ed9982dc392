//! The model: which steps there are in a state, and what the ledger makes of each.

use super::graph::Walked;
use super::variant::Variant;
use super::world::{Claim, World, caller, digest, holder};
use super::{Fault, Scope};
use crate::support::{START, error, seconds};
use breaker_core::Permit;
use ledger_core::limits::IDLE_DELIVERIES;
use ledger_core::{
    AgentId, AgentOverrides, Class, Event, EventKind, Now, Outcome, Overrides, Reason, Refusal, ReleaseCause,
    Settings, Spec, State, Task, TaskId,
};
use retry_core::Jitter;
use stateright::{Model, Property};
use std::collections::{BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The unit of the abstract clock. Every delay of the model is one of it.
const TICK: Duration = seconds(1);

/// Something that may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Time passes.
    Wait,
    /// A worker is handed the task, under a probe's permit or an ordinary one.
    Claim(u8, bool),
    /// A worker says it has started what it was given under this fence.
    Ack(u8, u64),
    /// A worker says it still holds it.
    Beat(u8, u64),
    /// A worker says how it ended; and whether the budget has a token then.
    Settle(u8, u64, Said, bool),
    /// The ledger's own events; and whether the budget has a token then.
    Ledger(Own, bool),
}

/// An outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    Complete,
    Transient,
    Permanent,
    Decline,
    Drain,
    Preempted,
    Block,
    BlockUntil,
    Cancelled,
}

/// An event that no worker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Own {
    LeaseOver,
    TakenBack,
    TakenBackTogether,
    ProbePasses,
    Gate,
    Ungate,
    Answer,
    BlockOver,
    Cancel,
    Preempt,
    Deadline,
    AttemptTimeout,
    QueueTimeout,
    GraceOver,
    Granted,
    Expired,
    Undeliverable,
    Redrive,
    Discard,
}

impl Said {
    const ALL: [Self; 9] = [
        Self::Complete,
        Self::Transient,
        Self::Permanent,
        Self::Decline,
        Self::Drain,
        Self::Preempted,
        Self::Block,
        Self::BlockUntil,
        Self::Cancelled,
    ];

    pub(super) fn outcome(self, world: &World) -> Outcome {
        let releases = |cause| Outcome::Release { cause, delay: Duration::ZERO };
        let blocks = |until| Outcome::Block { question: "may I?".into(), until };
        let fails = |class| Outcome::Fail { error: error(class), retry_after: None };
        match self {
            Self::Complete => Outcome::Complete,
            Self::Transient => fails(Class::Transient),
            Self::Permanent => fails(Class::Permanent),
            Self::Decline => releases(ReleaseCause::Declined),
            Self::Drain => releases(ReleaseCause::Drain),
            Self::Preempted => releases(ReleaseCause::Preempted),
            Self::Block => blocks(None),
            Self::BlockUntil => blocks(Some(world.now.after(TICK))),
            Self::Cancelled => Outcome::Cancelled,
        }
    }
}

/// What a person does, and time or programs never do.
pub(super) const PERSONS: [&str; 4] = ["a person cancels", "a person answers", "redrive", "discard"];

/// What was come by.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Fingerprints of states in which life has ended, or in which the scope ends.
    pub(super) ended: HashSet<u64>,
    /// Fingerprints of states that wait for an answer, and for nothing else.
    pub(super) waits_for_a_person: HashSet<u64>,
    pub(super) reasons: BTreeSet<Reason>,
}

pub(super) struct Life {
    pub(super) scope: Scope,
    pub(super) variant: Variant,
    pub(super) walked: Arc<Walked>,
    pub(super) seen: Arc<Mutex<Seen>>,
    pub(super) settings: Settings,
}

pub(super) const MAX_RETRIES: u32 = 1;
pub(super) const MAX_LOSSES: u32 = 2;

impl Life {
    pub(super) fn new(scope: Scope, variant: Variant) -> Self {
        let policy = Overrides {
            max_retries: Some(MAX_RETRIES),
            max_losses: Some(MAX_LOSSES),
            base_delay: Some(TICK),
            max_delay: Some(TICK),
            exponential_base: Some(1.0),
            jitter: Some(Jitter::None),
            ..Overrides::NONE
        };
        let given =
            AgentOverrides { policy, budget_enabled: Some(scope.budget), ..AgentOverrides::default() };
        let settings = Settings::of(given).expect("valid");
        Self { scope, variant, walked: Arc::default(), seen: Arc::default(), settings }
    }

    fn workers(&self) -> std::ops::Range<u8> {
        0..self.scope.workers
    }

    /// What workers may say: of the newest fence anything, of older ones and of another's enough to show that what they
    /// say does not matter.
    fn said(&self, world: &World, steps: &mut Vec<Step>) {
        let tokens: &[bool] = if self.scope.budget { &[true, false] } else { &[true] };
        for worker in self.workers() {
            let current = world.current().map(|claim| (claim.fence, claim.worker));
            if let Some((fence, _)) = current.filter(|(_, owner)| *owner == worker) {
                steps.push(Step::Ack(worker, fence));
                // To take up again what was given up is an idle delivery, too, and the scope counts them.
                if world.task.state == State::Running || world.task.idle_deliveries < self.scope.idle {
                    steps.push(Step::Beat(worker, fence));
                }
                for said in Said::ALL {
                    steps.extend(tokens.iter().map(|affords| Step::Settle(worker, fence, said, *affords)));
                }
            }
            let foreign = current.filter(|(_, owner)| *owner != worker).map(|(fence, _)| fence);
            let stale = world.stale(worker).into_iter().flatten().map(|claim| claim.fence);
            for fence in stale.chain(foreign) {
                steps.extend([
                    Step::Ack(worker, fence),
                    Step::Beat(worker, fence),
                    Step::Settle(worker, fence, Said::Complete, true),
                    Step::Settle(worker, fence, Said::Transient, true),
                ]);
            }
        }
    }

    fn own(&self, world: &World, steps: &mut Vec<Step>) {
        use Own::{
            Answer, AttemptTimeout, BlockOver, Cancel, Deadline, Discard, Expired, Gate, GraceOver, Granted,
            LeaseOver, Preempt, ProbePasses, QueueTimeout, Redrive, TakenBack, TakenBackTogether, Ungate,
        };
        let mut add = |own, affords| steps.push(Step::Ledger(own, affords));
        // A lease, a grace or a timeout is over at any time: the model asks what happens then, not when that is.
        for own in [LeaseOver, GraceOver, TakenBack, TakenBackTogether] {
            add(own, true);
            if self.scope.budget {
                add(own, false);
            }
        }
        for own in [Gate, Ungate, Answer, Cancel, Preempt, AttemptTimeout, Granted, Expired, Discard] {
            add(own, true);
        }
        if self.scope.queue_timeout {
            add(QueueTimeout, true);
        }
        if self.scope.probes {
            add(ProbePasses, true);
        }
        if world.task.redrives < self.scope.redrives {
            add(Redrive, true);
        }
        if world.task.deadline.is_some_and(|deadline| deadline <= world.now) {
            add(Deadline, true);
        }
        if world.task.calendar && world.task.run_at <= world.now {
            add(BlockOver, true);
        }
    }

    fn event(own: Own) -> Event {
        match own {
            Own::LeaseOver => Event::LeaseOver,
            Own::TakenBack | Own::ProbePasses => Event::TakenBack { sampled: false },
            Own::TakenBackTogether => Event::TakenBack { sampled: true },
            Own::Gate => Event::Gate,
            Own::Ungate => Event::Ungate,
            Own::Answer => Event::Unblock { answer: Some("yes".into()), actor: Some("ann".into()) },
            Own::BlockOver => Event::Unblock { answer: None, actor: None },
            Own::Cancel => Event::Cancel { note: "".into() },
            Own::Preempt => Event::Preempt,
            Own::Deadline => Event::DeadlinePassed,
            Own::AttemptTimeout => Event::AttemptTimeout,
            Own::QueueTimeout => Event::QueueTimeout,
            Own::GraceOver => Event::GraceOver,
            Own::Granted => Event::BudgetGranted,
            Own::Expired => Event::BudgetExpired,
            Own::Undeliverable => Event::Undeliverable,
            Own::Redrive => Event::Redrive(Box::default()),
            Own::Discard => Event::Discard { note: "".into() },
        }
    }

    /// What the ledger makes of `step`: the state after, and what the step is called. None where nothing changes that
    /// any later decision could see.
    fn take(&self, before: &World, step: Step) -> Option<(World, &'static str)> {
        let mut world = before.clone();
        let (event, affords) = match step {
            Step::Wait => {
                world.now = world.now.after(TICK);
                return (self.fingerprint(&world) != self.fingerprint(before)).then_some((world, "time"));
            }
            Step::Ledger(Own::ProbePasses, _) => {
                let _told = world.task.probe_passes()?;
                let claim = world.claims.last_mut()?;
                claim.samples = claim.samples.map(|samples| samples + 1);
                return Some((world, "the probe passes"));
            }
            Step::Claim(worker, probe) => {
                let permit = self.scope.probes.then_some(Permit { epoch: 1, probe, slot: 0 });
                (Event::Claim { holder: holder(worker), permit }, true)
            }
            Step::Ack(worker, fence) => (Event::Ack(caller(worker), fence), true),
            Step::Beat(worker, fence) => (Event::Beat(caller(worker), fence), true),
            Step::Settle(worker, fence, said, affords) => {
                (Event::Settle(caller(worker), fence, said.outcome(before)), affords)
            }
            Step::Ledger(own, affords) => (Self::event(own), affords),
        };
        let event = self.variant.event(event, before);
        let number = if let Event::Settle(_, _, outcome) = &event { digest(outcome) } else { 0 };
        let label = match world.apply(&event, &self.settings, affords, number) {
            Ok(mut applied) => {
                if applied.record.is_none() && before.task.state != State::Running {
                    return None;
                }
                self.variant.after(&event, before, &mut world, &mut applied);
                if let Err(fault) = self.judge(before, &mut world, step, &event, &applied)
                    && self.variant.shows(fault)
                {
                    world.fault = Some(fault);
                }
                label(before, step, applied.record.as_ref().map(|record| record.kind))
            }
            Err(refusal) => {
                if world.task != before.task {
                    world.fault = Some(Fault::Refused);
                } else if !self.answers_again(before, step, refusal) {
                    world.fault = Some(Fault::Receipt);
                }
                "refused"
            }
        };
        let same = world.fault == before.fault && self.fingerprint(&world) == self.fingerprint(before);
        (!same).then_some((world, label))
    }

    fn judge(
        &self,
        before: &World,
        world: &mut World,
        step: Step,
        event: &Event,
        applied: &ledger_core::Applied,
    ) -> Result<(), Fault> {
        if let Step::Ack(worker, fence) | Step::Beat(worker, fence) | Step::Settle(worker, fence, ..) = step {
            let theirs = |claim: &Claim| claim.fence == fence && claim.worker == worker && !claim.revoked;
            if world.task != before.task && (fence != before.task.fence || !before.claims.iter().any(theirs))
            {
                return Err(Fault::Zombie);
            }
        }
        if matches!(event, Event::Claim { .. }) && !before.task.is_gated() && before.task.run_at > before.now
        {
            return Err(Fault::Early);
        }
        let task = &world.task;
        let bounded = task.retry_count <= MAX_RETRIES
            && task.probe_failures <= MAX_RETRIES
            && task.losses <= MAX_LOSSES
            && task.idle_deliveries <= IDLE_DELIVERIES
            && task.attempt <= task.delivery
            && u64::from(task.delivery) <= task.fence;
        if !bounded {
            return Err(Fault::Counters);
        }
        world.note(before, event, applied)?;
        world.folds()
    }

    /// The ledger's replay check: a refused outcome of a fence that is settled gets the first receipt, if it is the same.
    fn answers_again(&self, world: &World, step: Step, refusal: Refusal) -> bool {
        let Step::Settle(worker, fence, said, _) = step else { return true };
        let settled = world
            .claims
            .iter()
            .find(|claim| claim.fence == fence && claim.worker == worker)
            .and_then(|claim| claim.settled);
        let repeats = settled.is_some_and(|settled| settled == digest(&said.outcome(world)));
        let found = match refusal {
            Refusal::LeaseLost | Refusal::TaskTerminal if self.variant != Variant::NoReplayCheck => settled,
            _ => None,
        };
        !repeats || found == settled
    }

    fn fingerprint(&self, world: &World) -> u64 {
        let mut hasher = DefaultHasher::new();
        world.hash(&mut hasher);
        hasher.finish()
    }
}

/// What an edge of the graph is called: what happened, finer where that tells loops apart.
fn label(before: &World, step: Step, kind: Option<EventKind>) -> &'static str {
    let acked = before.task.acked();
    match (step, kind) {
        (_, Some(EventKind::Resumed)) if matches!(step, Step::Ack(..)) => "resumed by an ack",
        (_, Some(EventKind::Resumed)) if acked => "resumed by a beat, acked",
        (_, Some(EventKind::Resumed)) => "resumed by a beat, unacked",
        (Step::Claim(_, true), _) => "claim as a probe",
        (Step::Claim(..), _) => "claim",
        (Step::Ack(..), _) => "ack",
        (Step::Beat(..), _) => "beat",
        (Step::Settle(..), _) if before.task.stop.is_some() => "outcome of a stopped task",
        (Step::Settle(_, _, said, _), _) => match said {
            Said::Complete => "complete",
            Said::Transient => "fail",
            Said::Permanent => "fail for good",
            Said::Decline => "decline",
            Said::Drain => "release for drain",
            Said::Preempted => "release as preempted",
            Said::Block => "block",
            Said::BlockUntil => "block until",
            Said::Cancelled => "cancelled",
        },
        (Step::Ledger(own, _), _) => match own {
            Own::LeaseOver if acked => "lost",
            Own::LeaseOver => "ack timeout",
            Own::TakenBack | Own::TakenBackTogether => "taken back",
            Own::ProbePasses => "the probe passes",
            Own::Gate => "gate",
            Own::Ungate => "ungate",
            Own::Answer => PERSONS[1],
            Own::BlockOver => "the block ends by itself",
            Own::Cancel => PERSONS[0],
            Own::Preempt => "preempt",
            Own::Deadline => "deadline",
            Own::AttemptTimeout => "attempt timeout",
            Own::QueueTimeout => "queue timeout",
            Own::GraceOver => "grace over",
            Own::Granted => "budget granted",
            Own::Expired => "budget expired",
            Own::Undeliverable => "undeliverable",
            Own::Redrive => PERSONS[2],
            Own::Discard => PERSONS[3],
        },
        (Step::Wait, _) => "time",
    }
}

impl Model for Life {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let spec = Arc::new(Spec {
            agent: AgentId(1),
            task_type: "thumbnail".into(),
            policy: Overrides::NONE,
            created_at: START,
            frees_key: false,
        });
        let deadlines: &[Option<u64>] = if self.scope.deadline { &[None, Some(3)] } else { &[None] };
        let worlds = deadlines.iter().map(|deadline| {
            let deadline = deadline.map(|ticks| START.after(seconds(ticks)));
            let now = Now::steady(START);
            let (task, first) = Task::enqueue(TaskId(7), Arc::clone(&spec), 5, None, deadline, now);
            World::new(task, first, START)
        });
        worlds.collect()
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.fault.is_some() {
            return;
        }
        if world.task.state == State::Queued && world.task.idle_deliveries >= IDLE_DELIVERIES {
            // In the transaction that queued it.
            steps.push(Step::Ledger(Own::Undeliverable, true));
            return;
        }
        steps.push(Step::Wait);
        if world.task.idle_deliveries < self.scope.idle {
            for worker in self.workers() {
                steps.push(Step::Claim(worker, false));
                if self.scope.probes {
                    steps.push(Step::Claim(worker, true));
                }
            }
        }
        self.said(world, steps);
        self.own(world, steps);
    }

    fn next_state(&self, before: &World, step: Step) -> Option<World> {
        let (world, label) = self.take(before, step)?;
        let to = self.fingerprint(&world);
        self.walked.edge(self.fingerprint(before), to, label);
        let (task, mut seen) = (&world.task, self.seen.lock().expect("no walker panics while it holds this"));
        let beyond = self.scope.idle < IDLE_DELIVERIES && task.idle_deliveries >= self.scope.idle;
        if task.state.is_terminal() || (beyond && task.state != State::Running) {
            seen.ended.insert(to);
        }
        if task.state == State::Blocked && task.reason == Reason::Worker && !task.calendar {
            seen.waits_for_a_person.insert(to);
        }
        seen.reasons.insert(task.reason);
        drop(seen);
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        Fault::properties()
    }
}
