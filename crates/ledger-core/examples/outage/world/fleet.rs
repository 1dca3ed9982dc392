//! The agents and their tasks: who waits, who may start, who pays.
//!
//! It does with the cores what the ledger does with them; where the ledger has a rule of its own (a failed probe does
//! not count as a retry, the next probe is another task) that rule is repeated here, with the same numbers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use breaker_core::{Availability, Config, Permit, Sample};
use ledger_core::{Agent, AgentId, Breakers, Guard, Now, TaskId, Timestamp};
use retry_core::{Bucket, Decision, ErrorClass, Failure, Progress, draw};

use super::{Micros, Policy, Setup, TIMEOUT};

/// Leave to call: a permit, where there is a breaker.
pub(super) type Leave = Option<Permit>;

/// What is kept of a task.
#[derive(Clone, Copy, Default)]
struct Task {
    run_at: Micros,
    retries: u32,
    probe_failures: u32,
    deliveries: u32,
    previous_delay: Duration,
}

struct Member {
    agent: Agent,
    /// Tasks that may run, now or later, in the order in which they will.
    ready: BTreeSet<(Micros, u32)>,
    /// Retries that wait for tokens, oldest first, with their price.
    deferred: BTreeSet<(Micros, u32, u32)>,
    running: u32,
    /// When it is looked at next.
    armed: Option<Micros>,
}

pub(super) struct Fleet {
    policy: Policy,
    seed: u64,
    slots: u32,
    shared: Bucket,
    members: Vec<Member>,
    tasks: Vec<Task>,
    /// Agents with deferred retries.
    waiting: BTreeSet<u32>,
    transitions: u64,
}

impl Fleet {
    pub(super) fn new(setup: &Setup, shared: Bucket) -> Self {
        let all = u64::from(setup.slots) * u64::from(setup.rate) * TIMEOUT / super::SECOND;
        let slots = u32::try_from(all.div_ceil(u64::from(setup.agents))).expect("it fits");
        Self {
            policy: setup.policy,
            seed: setup.seed,
            slots: if setup.policy.slots { slots } else { u32::MAX },
            shared,
            members: (0..setup.agents).map(|id| Member::new(id, setup.policy)).collect(),
            tasks: Vec::new(),
            waiting: BTreeSet::new(),
            transitions: 0,
        }
    }

    /// A new task.
    pub(super) fn enqueue(&mut self, agent: u32, now: Micros) {
        let task = u32::try_from(self.tasks.len()).expect("fewer tasks than that");
        self.tasks.push(Task { run_at: now, ..Task::default() });
        self.members[agent as usize].ready.insert((now, task));
    }

    /// The next task that may start now.
    pub(super) fn claim(&mut self, agent: u32, now: Micros) -> Option<(u32, Leave)> {
        let member = &mut self.members[agent as usize];
        let head = member.ready.first().filter(|(run_at, _)| *run_at <= now).copied()?;
        if member.running >= self.slots {
            return None;
        }
        let (chosen, leave) = if self.policy.open.is_some() {
            let draw = draw(self.seed, u64::from(agent), self.transitions);
            let running = member.running;
            let guard = member.guard_mut();
            let breaker = &mut guard.breaker;
            if let Some(_opened) = breaker.tick(span(now), draw) {
                self.transitions += 1;
            }
            let chosen = match breaker.is_available(span(now)) {
                Availability::Yes if running < breaker.ramp_limit(self.slots, span(now)) => head,
                Availability::Yes | Availability::No { .. } => return None,
                Availability::Probe => member.probe(now)?,
            };
            let guard = member.guard_mut();
            let permit = guard.breaker.try_acquire(span(now)).ok()?;
            if permit.probe {
                guard.last_probe = Some(TaskId(u64::from(chosen.1)));
            }
            (chosen, Some(permit))
        } else {
            (head, None)
        };
        member.ready.remove(&chosen);
        member.running += 1;
        self.tasks[chosen.1 as usize].deliveries += 1;
        Some((chosen.1, leave))
    }

    /// A task is done.
    pub(super) fn succeeded(&mut self, agent: u32, leave: Leave, now: Micros) {
        let member = &mut self.members[agent as usize];
        member.running -= 1;
        if let Some(permit) = leave {
            member.tell(permit, Sample::Success, now, 0);
        }
        if self.policy.budget {
            member.agent.budget.deposit(steady(now).at.since_epoch());
            self.shared.deposit(steady(now).at.since_epoch());
        }
    }

    /// An attempt failed; false when it was the last one.
    pub(super) fn failed(
        &mut self,
        agent: u32,
        id: u32,
        leave: Leave,
        class: ErrorClass,
        now: Micros,
    ) -> bool {
        let member = &mut self.members[agent as usize];
        member.running -= 1;
        if let Some(permit) = leave {
            self.transitions += 1;
            member.tell(permit, Sample::Failure, now, draw(self.seed, u64::from(agent), self.transitions));
        }
        let policy = &member.agent.settings.retry;
        let task = &mut self.tasks[id as usize];
        // The ledger's rule: an agent must not kill tasks by being tested with them, within reason.
        let is_probe = leave.is_some_and(|permit| permit.probe);
        let uncounted = is_probe && task.probe_failures < policy.max_retries();
        let retries_made = if uncounted { task.retries.min(policy.max_retries() - 1) } else { task.retries };
        let progress = Progress { retries_made, previous_delay: task.previous_delay, ..Progress::default() };
        let draw = draw(self.seed, u64::from(id), u64::from(task.deliveries));
        let decision = policy.next(&progress, Failure::new(class), span(now), None, draw);
        let Decision::Retry { delay, at, price, .. } = decision else { return false };
        if uncounted {
            task.probe_failures += 1;
        } else {
            task.retries += 1;
        }
        task.previous_delay = delay;
        task.run_at = u64::try_from(at.as_micros()).expect("it fits");
        let price = if uncounted || !self.policy.budget { 0 } else { price };
        if price == 0 || member.agent.pay(&mut self.shared, steady(now), price) {
            member.ready.insert((task.run_at, id));
        } else {
            member.deferred.insert((now, id, price));
            self.waiting.insert(agent);
        }
        true
    }

    /// Whether a retry waits for tokens.
    pub(super) fn someone_waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Grants tokens to the retries that wait for them, and tells whose they are.
    pub(super) fn grant(&mut self, now: Micros) -> Vec<u32> {
        let mut granted = Vec::new();
        for id in &self.waiting {
            let Member { agent, deferred, ready, .. } = &mut self.members[*id as usize];
            let before = deferred.len();
            while let Some((_, task, price)) = deferred.first().copied()
                && agent.pay(&mut self.shared, steady(now), price)
            {
                deferred.pop_first();
                ready.insert((self.tasks[task as usize].run_at, task));
            }
            if deferred.len() < before {
                granted.push(*id);
            }
        }
        self.waiting.retain(|id| !self.members[*id as usize].deferred.is_empty());
        granted
    }

    /// When time alone may let the next task of an agent start; told once for each such time.
    pub(super) fn next_look(&mut self, agent: u32, now: Micros) -> Option<Micros> {
        let member = &mut self.members[agent as usize];
        let (run_at, _) = member.ready.first()?;
        // Up to the next microsecond: a look that comes early finds the period not over.
        let micros = |at: Duration| u64::try_from(at.as_nanos().div_ceil(1_000)).expect("it fits");
        let guard = member.guard();
        let step =
            Guard { running: u64::from(member.running), ..guard.clone() }.next_step(self.slots, span(now));
        let opens = step.or_else(|| guard.breaker.next_deadline()).map(micros);
        // What is due and does not start waits for the breaker, or for a call to end.
        let at = (*run_at).max(opens.filter(|_| self.policy.open.is_some()).unwrap_or(0));
        if at <= now || member.armed.is_some_and(|armed| armed > now && armed <= at) {
            return None;
        }
        member.armed = Some(at);
        Some(at)
    }
}

impl Member {
    fn new(id: u32, policy: Policy) -> Self {
        let mut agent = Agent::new(AgentId(id), Arc::from(format!("agent-{id}")), Arc::default(), steady(0));
        if let Some(open_timeout) = policy.open {
            let ramp_for = if policy.ramp { agent.settings.breaker.ramp_for } else { Duration::ZERO };
            let config = Config { open_timeout, ramp_for, ..agent.settings.breaker };
            agent.breakers = Breakers::new(config, false);
        }
        Self { agent, ready: BTreeSet::new(), deferred: BTreeSet::new(), running: 0, armed: None }
    }

    /// The task to probe with: the first that was not the last probe, unless it is alone.
    fn probe(&self, now: Micros) -> Option<(Micros, u32)> {
        let mut due = self.ready.iter().copied().take_while(|(run_at, _)| *run_at <= now);
        let first = due.next()?;
        if self.guard().last_probe == Some(TaskId(u64::from(first.1))) {
            due.next().or(Some(first))
        } else {
            Some(first)
        }
    }

    fn guard(&self) -> &Guard {
        self.agent.breakers.of("").expect("the agent's own")
    }

    fn guard_mut(&mut self) -> &mut Guard {
        self.agent.breakers.of_mut(&Arc::from(""))
    }

    fn tell(&mut self, permit: Permit, sample: Sample, now: Micros, draw: u64) {
        self.guard_mut().breaker.record(permit, sample, span(now), draw);
    }
}

fn span(now: Micros) -> Duration {
    Duration::from_micros(now)
}

/// Budgets count in the ledger's time, which is whole milliseconds.
fn steady(now: Micros) -> Now {
    Now::steady(Timestamp::from_millis(i64::try_from(now / 1_000).expect("it fits")))
}
