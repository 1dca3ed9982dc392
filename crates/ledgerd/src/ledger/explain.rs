//! Gathers what explains where a task is. Reads memory and writes nothing; what is decided and said of it is up to
//! ledger-core.

use super::batch::Batch;
use super::command::{Answer, LedgerError};
use super::timers::lease_end;
use breaker_core::Breaker;
use ledger_core::explain::{AHEAD, BreakerFacts, BudgetFacts, Facts, RampFacts, Runner, WorkerFacts};
use ledger_core::{Agent, Guard, Reason, State, Task, TaskId, Timestamp};
use std::cmp::Reverse;
use std::sync::Arc;

impl Batch<'_> {
    /// Facts of a task, but for what its history tells.
    pub(super) async fn facts(&mut self, id: TaskId) -> Result<Answer, LedgerError> {
        let task = self.open.get(&id).map(|open| (*open.task).clone()).ok_or(LedgerError::UnknownTask(id))?;
        let agent = self.memory.agents.get(&task.spec.agent).ok_or(LedgerError::UnknownTask(id))?;
        let mut workers = WorkerFacts::of(self.memory.sessions_of(agent.id), &task.spec.task_type);
        workers.last_seen = self.memory.last_seen.get(&agent.id).cloned();
        let key = agent.breakers.key(&task.spec.task_type);
        let guard = agent.breakers.of(&key).filter(|_| agent.settings.breaker_enabled);
        let usual = self.memory.usual(agent.id, &key);
        let retry = agent.settings.retry_for(&task.spec.policy);
        let mut facts = Facts {
            now: self.now,
            agent: Arc::clone(&agent.name),
            max_retries: retry.max_retries(),
            max_losses: retry.config().max_losses,
            runner: self.runner(&task, agent),
            budget: self.budget_facts(&task, agent),
            pause: agent.pause.clone(),
            breaker: guard.map(|guard| breaker_facts(&guard.breaker, key)),
            ramp: guard.and_then(|guard| self.ramp_facts(guard, usual)),
            workers,
            ahead: 0,
            draining: self.memory.draining,
            told: None,
            task,
        };
        if !facts.task.state.is_terminal() && facts.task.can_be_claimed(self.now) {
            // Of a type that nobody takes, nobody is in the way of another.
            let own = [Arc::clone(&facts.task.spec.task_type)];
            let types = match facts.workers.takers {
                0 => Some(&own[..]),
                _ => facts.workers.taken.as_deref(),
            };
            let ahead = self.store.ahead(&facts.task, types, AHEAD + 1, self.now).await;
            facts.ahead = ahead.map_err(LedgerError::Store)?;
        }
        Ok(Answer::Facts(Box::new(facts)))
    }

    fn runner(&self, task: &Task, agent: &Agent) -> Option<Runner> {
        let holder = task.holder.as_ref().filter(|_| task.state == State::Running)?;
        if self.memory.is_elsewhere(task) {
            // Of beats that another daemon takes no row is written for the task; it lives, so its workers are served.
            let beat_at =
                self.memory.workers.get(&holder.worker).map_or(task.updated_at, |worker| worker.beat_at);
            return Some(Runner { connected: true, beat_at, lease_until: task.lease?.until });
        }
        let worker = self.memory.workers.get(&holder.worker)?;
        let session = worker.session.and_then(|id| self.memory.sessions.get(&id));
        let beaten = self.memory.beaten.get(&task.id).copied();
        Some(Runner {
            connected: session.is_some(),
            beat_at: session.map_or(worker.beat_at, |session| session.beat_at),
            lease_until: lease_end(task, &agent.settings, beaten, self.memory.since)?,
        })
    }

    fn ramp_facts(&self, guard: &Guard, usual: u32) -> Option<RampFacts> {
        let (breaker, now) = (&guard.breaker, self.now.at.since_epoch());
        Some(RampFacts {
            share: breaker.ramp_share(now),
            limit: breaker.ramp_limit(usual, now),
            running: u32::try_from(guard.running).unwrap_or(u32::MAX),
            until: Timestamp::from_epoch(breaker.ramp_until()?),
        })
    }

    fn budget_facts(&self, task: &Task, agent: &Agent) -> BudgetFacts {
        let (now, shared) = (self.now, &self.memory.budget);
        let queue = self.memory.budget_queue.get(&task.spec.agent);
        let place = (Reverse(task.priority), task.run_at, task.id, task.tokens);
        let waits = task.state == State::Retry && task.reason == Reason::Budget;
        let before = queue.filter(|_| waits).map_or(0, |queue| queue.range(..place).take(AHEAD + 1).count());
        BudgetFacts {
            own: agent.budget.available(now.at.since_epoch()),
            shared: shared.available(now.at.since_epoch()),
            affordable_at: agent.affordable_at(shared, now, task.tokens),
            before,
        }
    }
}

fn breaker_facts(breaker: &Breaker, task_type: Arc<str>) -> BreakerFacts {
    let order = breaker.order();
    BreakerFacts {
        state: breaker.state(),
        cause: breaker.cause(),
        since: Timestamp::from_epoch(breaker.since()),
        until: breaker.next_deadline().map(Timestamp::from_epoch),
        probes: breaker.probes_in_flight(),
        permits: breaker.config().half_open_permits,
        actor: order.map(|order| order.actor.as_str().into()).unwrap_or_default(),
        reason: order.map(|order| order.reason.as_str().into()).unwrap_or_default(),
        task_type,
    }
}
