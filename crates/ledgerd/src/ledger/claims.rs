//! What the ledger does of its own accord in a batch: timers, budget, breakers, and handing out work.

use super::batch::{Batch, Claimed};
use super::command::LedgerError;
use super::timers::{Due, next};
use super::work::holder;
use breaker_core::Availability;
use ledger_core::dispatch::{Group, choose};
use ledger_core::limits::BATCH_OPERATIONS;
use ledger_core::store::{Ask, StoreError};
use ledger_core::{AgentId, Event, LostWith, SessionId, TaskId};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

impl Batch<'_> {
    /// Does what time has brought to these tasks.
    pub(super) fn elapse(&mut self, due: &[TaskId]) {
        let lost = self.lost_together(due);
        let mut sampled = HashSet::new();
        for id in due {
            // One task may have several things due; each leaves less to do, so this ends.
            for _ in 0..4 {
                let Some(open) = self.open.get(id) else { break };
                let Some(agent) = self.memory.agents.get(&open.task.spec.agent) else { break };
                let beaten = self.memory.beaten.get(id).copied();
                match next(&open.task, &agent.settings, beaten, self.memory.since, self.now) {
                    Some((at, Due::Event(event))) if at <= self.now.at => {
                        let mut process = None;
                        if matches!(event, Event::LeaseOver) {
                            if !open.task.acked() {
                                self.count_unacked(*id);
                            } else if let Some(holder) = &open.task.holder {
                                let place = (Arc::clone(&holder.worker), holder.incarnation);
                                let tasks = lost.get(&place).copied().unwrap_or(1);
                                let known = (place, open.task.spec.agent);
                                self.lost_with = LostWith { tasks, sampled: sampled.contains(&known) };
                                process = Some(known);
                            }
                        }
                        let applied = self.apply(*id, &event, 0);
                        self.lost_with = LostWith::ALONE;
                        sampled.extend(process);
                        if let Err(error) = applied {
                            tracing::debug!(task = %id, %error, "a timer found nothing to do");
                            break;
                        }
                    }
                    Some((at, Due::ProbePasses)) if at <= self.now.at => self.pass_probe(*id),
                    // Too early: a lease was extended meanwhile. Armed anew for the rest.
                    Some((at, _)) => {
                        self.memory.timers.arm(*id, at);
                        break;
                    }
                    None => break,
                }
            }
        }
    }

    /// Which started tasks were lost together: how many of each process have a lease that is over now.
    fn lost_together(&self, due: &[TaskId]) -> HashMap<(Arc<str>, u64), u32> {
        let mut lost = HashMap::new();
        for id in due {
            let Some(open) = self.open.get(id).filter(|open| open.task.acked()) else { continue };
            let (Some(holder), Some(agent)) =
                (&open.task.holder, self.memory.agents.get(&open.task.spec.agent))
            else {
                continue;
            };
            let beaten = self.memory.beaten.get(id).copied();
            let due = next(&open.task, &agent.settings, beaten, self.memory.since, self.now);
            if due.is_some_and(|(at, due)| at <= self.now.at && matches!(due, Due::Event(Event::LeaseOver))) {
                *lost.entry((Arc::clone(&holder.worker), holder.incarnation)).or_default() += 1;
            }
        }
        lost
    }

    /// Ends the pauses whose time is over.
    pub(super) fn end_pauses(&mut self) {
        let now = self.now.at;
        let agents = &self.memory.agents;
        let over = |id: &AgentId| {
            let pause = agents.get(id).and_then(|agent| agent.pause.as_ref());
            pause.is_none_or(|pause| pause.until.is_some_and(|until| until <= now))
        };
        let ended: Vec<AgentId> = self.memory.paused.iter().copied().filter(over).collect();
        for id in ended {
            self.resume(id);
        }
    }

    /// Ends a pause; false where there is none.
    pub(super) fn resume(&mut self, id: AgentId) -> bool {
        self.memory.paused.remove(&id);
        let pause = self.memory.agents.get_mut(&id).and_then(|agent| agent.pause.take());
        if pause.is_some() {
            self.configured.insert(id);
        }
        pause.is_some()
    }

    fn count_unacked(&mut self, id: TaskId) {
        let worker =
            self.open.get(&id).and_then(|open| open.task.holder.as_ref()).map(|holder| &holder.worker);
        let session =
            worker.and_then(|worker| self.memory.workers.get(worker)).and_then(|worker| worker.session);
        if let Some(session) = session.and_then(|id| self.memory.sessions.get_mut(&id)) {
            session.unacked_run += 1;
        }
    }

    fn pass_probe(&mut self, id: TaskId) {
        let Some(open) = self.open.get_mut(&id) else { return };
        let agent = open.task.spec.agent;
        if let Some((permit, sample)) = open.task.probe_passes() {
            self.touch(id);
            self.tell_breaker(agent, permit, sample, 0);
        }
    }

    /// Grants budget tokens to those who wait, most urgent and oldest first.
    pub(super) async fn grant(&mut self) -> Result<(), StoreError> {
        let agents: Vec<AgentId> = self.memory.budget_queue.keys().copied().collect();
        for agent in agents {
            for _ in 0..BATCH_OPERATIONS {
                let Some((_, _, task, price)) =
                    self.memory.budget_queue.get(&agent).and_then(|queue| queue.first()).copied()
                else {
                    break;
                };
                let payer = self.memory.agents.get(&agent);
                if !payer.is_some_and(|payer| payer.affords(&self.memory.budget, self.now, price)) {
                    break;
                }
                self.load(&[task]).await?;
                if self.apply(task, &Event::BudgetGranted, 0).is_err() {
                    // It moved on in this batch; its place in the queue goes.
                    if let Some(queue) = self.memory.budget_queue.get_mut(&agent) {
                        queue.pop_first();
                    }
                }
            }
        }
        Ok(())
    }

    /// Lets go of what closed breakers held back.
    pub(super) async fn let_go(&mut self) -> Result<(), StoreError> {
        while let Some(agent) = self.ungate.pop_first() {
            // Gated by this very batch counts too, so it is written first.
            self.write().await?;
            for task in self.store.gated(agent).await? {
                let id = task.id;
                self.take_up(id, task);
                let _ = self.apply(id, &Event::Ungate, 0);
            }
        }
        Ok(())
    }

    /// Reads tasks that the batch has not read yet.
    async fn load(&mut self, ids: &[TaskId]) -> Result<(), StoreError> {
        let missing: Vec<_> = ids.iter().filter(|id| !self.open.contains_key(id)).copied().collect();
        if missing.is_empty() {
            return Ok(());
        }
        let want = ledger_core::store::Want { tasks: missing, ..ledger_core::store::Want::default() };
        for (id, task) in self.store.begin(&want).await?.tasks {
            self.take_up(id, task);
        }
        Ok(())
    }

    /// Hands due tasks to sessions with room.
    pub(super) async fn assign(&mut self) -> Result<(), StoreError> {
        if self.memory.draining {
            return Ok(());
        }
        let gone: Vec<SessionId> =
            self.memory.outboxes.iter().filter(|(_, outbox)| outbox.is_closed()).map(|(id, _)| *id).collect();
        for id in gone {
            self.close(id, None);
        }
        let mut room: BTreeMap<AgentId, usize> = BTreeMap::new();
        let mut groups: HashMap<Group, usize> = HashMap::new();
        for session in self.memory.sessions.values() {
            let free = session.room();
            if free == 0 {
                continue;
            }
            for agent in session.agents.iter().filter(|agent| !self.memory.paused.contains(agent)) {
                *room.entry(*agent).or_default() += free;
                *groups.entry((*agent, session.types.clone())).or_default() += free;
            }
        }
        if room.is_empty() {
            return Ok(());
        }
        let mut admitted = HashMap::new();
        for (agent, free) in room {
            let (most, gated) = self.admits(agent, free);
            if most > 0 {
                admitted.insert(agent, (most, gated));
            } else {
                self.gate(agent, free, &groups).await?;
            }
        }
        let mut asks = Vec::new();
        let mut asked = Vec::new();
        for (group, free) in groups {
            if let Some((most, gated)) = admitted.get(&group.0) {
                // One more than needed, so that a lost task or a former probe can be passed over.
                let limit = free.min(*most).min(BATCH_OPERATIONS) + 1;
                asks.push(Ask { agent: group.0, types: group.1.clone(), limit, gated: *gated });
                asked.push(group);
            }
        }
        if asks.is_empty() {
            return Ok(());
        }
        let offered = self.store.offer(&asks, self.now).await?;
        if offered.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let mut offers: HashMap<Group, VecDeque<_>> = HashMap::new();
        for (group, mut tasks) in asked.into_iter().zip(offered) {
            if let Some(agent) = self.memory.agents.get(&group.0)
                && admitted.get(&group.0).is_some_and(|(_, probing)| *probing)
                && tasks.len() > 1
                && tasks.first().is_some_and(|first| Some(first.id) == agent.last_probe)
            {
                // One bad task cannot hold an agent down: the next probe is another.
                tasks.rotate_left(1);
            }
            offers.insert(group, tasks.into());
        }
        let mut sessions: Vec<_> = self.memory.sessions.values_mut().collect();
        // Sessions take turns at being first.
        if !sessions.is_empty() {
            let turn = self.memory.commits as usize % sessions.len();
            sessions.rotate_left(turn);
        }
        for (session, task) in choose(&mut sessions, &mut offers) {
            self.claim(session, task);
        }
        Ok(())
    }

    /// How many deliveries the agent's breaker lets through, and whether they are probes.
    fn admits(&mut self, id: AgentId, free: usize) -> (usize, bool) {
        let now = self.now.at.since_epoch();
        let draw = retry_core::draw(self.memory.seed, u64::from(id.0), self.memory.transitions);
        let Some(agent) = self.memory.agents.get_mut(&id) else { return (0, false) };
        if !agent.settings.breaker_enabled {
            return (free, false);
        }
        let ticked = agent.breaker.tick(now, draw).is_some();
        let permits = agent.breaker.config().half_open_permits as usize;
        let taken = match agent.breaker.state() {
            breaker_core::State::HalfOpen => agent.breaker.probes_in_flight() as usize,
            _ => 0,
        };
        let admits = match agent.breaker.is_available(now) {
            Availability::Yes => (free, false),
            Availability::Probe => (free.min(permits.saturating_sub(taken)), true),
            Availability::No { .. } => (0, false),
        };
        if ticked {
            self.breaker_changed(id);
        }
        admits
    }

    /// Shows that an open breaker is what holds work back: as many tasks as could run now become BLOCKED.
    async fn gate(
        &mut self,
        id: AgentId,
        free: usize,
        groups: &HashMap<Group, usize>,
    ) -> Result<(), StoreError> {
        let Some(agent) = self.memory.agents.get(&id) else { return Ok(()) };
        let open = agent.breaker.state() == breaker_core::State::Open;
        let more = free.saturating_sub(agent.gated as usize);
        if !open || more == 0 {
            return Ok(());
        }
        let asks: Vec<_> = groups
            .keys()
            .filter(|(agent, _)| *agent == id)
            .map(|(agent, types)| Ask { agent: *agent, types: types.clone(), limit: more, gated: false })
            .collect();
        let mut left = more;
        for task in self.store.offer(&asks, self.now).await?.into_iter().flatten() {
            if left == 0 {
                break;
            }
            let task_id = task.id;
            self.take_up(task_id, task);
            if self.apply(task_id, &Event::Gate, 0).is_ok() {
                left -= 1;
            }
        }
        Ok(())
    }

    fn claim(&mut self, session: SessionId, task: ledger_core::Task) {
        let (id, agent_id) = (task.id, task.spec.agent);
        let now = self.now.at.since_epoch();
        let Some(holder) = self.memory.sessions.get(&session).map(holder) else { return };
        let Some(agent) = self.memory.agents.get_mut(&agent_id) else { return };
        let permit = if agent.settings.breaker_enabled {
            let before = agent.breaker.epoch();
            match agent.breaker.try_acquire(now) {
                Ok(permit) => {
                    if permit.probe {
                        agent.last_probe = Some(id);
                    }
                    if permit.probe || before != agent.breaker.epoch() {
                        tracing::info!(agent = %agent.name, task = %id, state = %agent.breaker.state(), "probe");
                        self.breaker_changed(agent_id);
                    }
                    Some(permit)
                }
                // The last permit went to another group of this batch.
                Err(_) => return,
            }
        } else {
            None
        };
        self.take_up(id, task);
        match self.apply(id, &Event::Claim { holder, permit }, 0) {
            Ok(_) => {
                if let Some(open) = self.open.get(&id) {
                    self.said.claimed.push(Claimed { session, task: open.task.clone() });
                }
            }
            Err(error) => {
                tracing::error!(task = %id, %error, "an offered task could not be claimed");
                if let (Some(permit), Some(agent)) = (permit, self.memory.agents.get_mut(&agent_id)) {
                    agent.breaker.release(permit);
                    self.breaker_changed(agent_id);
                }
            }
        }
    }

    /// The error of a whole batch, as each of its callers is told it.
    pub(super) fn failed(error: &StoreError) -> LedgerError {
        LedgerError::Store(error.clone())
    }
}

impl super::memory::Memory {
    /// When the ledger must look at breakers or budgets of its own accord.
    pub(super) fn next_look(&self, now: ledger_core::Now) -> Option<ledger_core::Timestamp> {
        let at = now.at.since_epoch();
        let breakers = self
            .agents
            .values()
            .filter(|agent| {
                agent.settings.breaker_enabled && agent.breaker.state() != breaker_core::State::Closed
            })
            .filter_map(|agent| agent.breaker.next_deadline())
            // Once an open period is over, room or work brings the next probe, not time.
            .filter(|deadline| *deadline > at);
        let budgets = self.budget_queue.iter().filter_map(|(id, queue)| {
            let (_, _, _, price) = queue.first()?;
            let affordable = self.agents.get(id)?.affordable_at(&self.budget, now, *price)?;
            Some(affordable.since_epoch().max(at + Duration::from_millis(1)))
        });
        let pauses = self.paused.iter().filter_map(|id| {
            let until = self.agents.get(id)?.pause.as_ref()?.until?;
            Some(until.since_epoch().max(at))
        });
        breakers.chain(budgets).chain(pauses).min().map(ledger_core::Timestamp::from_epoch)
    }
}
