//! What the ledger does of its own accord in a batch: timers, budget, breakers, and handing out work.

use super::batch::{Batch, Claimed, Open};
use super::breakers::By;
use super::command::LedgerError;
use super::timers::{Due, next};
use super::work::holder;
use ledger_core::dispatch::{Group, choose};
use ledger_core::limits::BATCH_OPERATIONS;
use ledger_core::session::Session;
use ledger_core::store::{AgentEventKind, StoreError};
use ledger_core::{AgentId, Effects, Event, LostWith, SessionId, TaskId};
use std::collections::{HashMap, HashSet};
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
                if self.memory.is_elsewhere(&open.task) {
                    // Its worker went to another daemon, which watches over it.
                    break;
                }
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
                                let key = agent.breakers.key(&open.task.spec.task_type);
                                let known = (place, open.task.spec.agent, key);
                                self.lost_with = LostWith { tasks, sampled: sampled.contains(&known) };
                                process = Some(known);
                            }
                        }
                        self.counted_failure = false;
                        let applied = self.apply(*id, &event, 0);
                        self.lost_with = LostWith::ALONE;
                        // One that counted for nothing stands for no other.
                        sampled.extend(process.filter(|_| self.counted_failure));
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
            let ours = |open: &&Open| open.task.acked() && !self.memory.is_elsewhere(&open.task);
            let Some(open) = self.open.get(id).filter(ours) else { continue };
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
            if self.resume(id) {
                let (nobody, reason) = ("".into(), "its time was over".into());
                let by = Some(By { actor: &nobody, reason: &reason });
                self.happened(id, &nobody, AgentEventKind::Resumed, by, None);
            }
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
        let spec = Arc::clone(&open.task.spec);
        if let Some(told) = Arc::make_mut(&mut open.task).probe_passes() {
            self.touch(id);
            self.tell_breaker(spec.agent, &spec.task_type, told, &Effects::default(), 0);
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
        while let Some((agent, key)) = self.ungate.pop_first() {
            // Gated by this very batch counts too, so it is written first.
            self.write().await?;
            for task in self.store.gated(agent).await? {
                let goes_by =
                    self.memory.agents.get(&agent).map(|agent| agent.breakers.key(&task.spec.task_type));
                if key.is_some() && key != goes_by {
                    continue;
                }
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
        for (id, task) in self.store.begin(&want, self.now).await?.tasks {
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
        // Most batches bring nothing to hand out, and there may be thousands of sessions.
        if !self.store.may_offer(self.now) {
            return Ok(());
        }
        let mut groups: HashMap<Group, usize> = HashMap::new();
        for session in self.memory.sessions.values() {
            let free = session.room();
            if free == 0 {
                continue;
            }
            for agent in session.agents.iter().filter(|agent| !self.memory.paused.contains(agent)) {
                *groups.entry((*agent, session.types.clone())).or_default() += free;
            }
        }
        if groups.is_empty() {
            return Ok(());
        }
        let asked = self.admit(groups).await?;
        if asked.asks.is_empty() {
            return Ok(());
        }
        let offered = self.store.offer(&asked.asks, self.now).await?;
        if offered.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let mut offers = asked.sort(offered);
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

    fn claim(&mut self, session: SessionId, task: Arc<ledger_core::Task>) {
        let (id, agent_id) = (task.id, task.spec.agent);
        let now = self.now.at.since_epoch();
        let Some(holder) = self.memory.sessions.get(&session).map(holder) else { return };
        // It is added up from all sessions.
        let ramps = self.memory.agents.get(&agent_id).is_some_and(|agent| {
            let guard = agent.breakers.of(&task.spec.task_type);
            guard.is_some_and(|guard| guard.breaker.ramp_until().is_some())
        });
        let usual = if ramps { self.memory.usual(agent_id, &task.spec.task_type) } else { 0 };
        let Some(agent) = self.memory.agents.get_mut(&agent_id) else { return };
        let mut moved = None;
        let permit = if agent.settings.breaker_enabled {
            let guard = agent.breakers.of_mut(&task.spec.task_type);
            if ramps && guard.running >= u64::from(guard.breaker.ramp_limit(usual, now)) {
                // What the ramp allows went to another group of this batch.
                return;
            }
            let before = guard.breaker.epoch();
            // The last permit may have gone to another group of this batch.
            let Ok(permit) = guard.breaker.try_acquire(now) else { return };
            if permit.probe {
                guard.last_probe = Some(id);
            }
            let transition = guard.breaker.last_transition().filter(|_| before != guard.breaker.epoch());
            if permit.probe || transition.is_some() {
                moved = Some((agent.breakers.key(&task.spec.task_type), transition));
            }
            Some(permit)
        } else {
            None
        };
        if let Some((key, transition)) = moved {
            tracing::info!(agent = %agent.name, task = %id, task_type = %key, "probe");
            match transition {
                Some(transition) => self.claim_moved(agent_id, &key, transition),
                None => self.breaker_changed(agent_id, &key),
            }
        }
        let task_type = Arc::clone(&task.spec.task_type);
        self.take_up(id, task);
        match self.apply(id, &Event::Claim { holder, permit }, 0) {
            Ok(_) => {
                if let Some(open) = self.open.get(&id) {
                    self.said.claimed.push(Claimed { session, task: Arc::clone(&open.task) });
                }
            }
            Err(error) => {
                tracing::error!(task = %id, %error, "an offered task could not be claimed");
                if let (Some(permit), Some(agent)) = (permit, self.memory.agents.get_mut(&agent_id)) {
                    agent.breakers.of_mut(&task_type).breaker.release(permit);
                    let key = agent.breakers.key(&task_type);
                    self.breaker_changed(agent_id, &key);
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
    /// How many tasks of this agent run when all is well, those of one type if one is named: what the sessions that take
    /// them may hold.
    pub(super) fn usual(&self, id: AgentId, task_type: &str) -> u32 {
        let takes = |session: &&Session| {
            session.agents.contains(&id) && (task_type.is_empty() || session.takes(task_type))
        };
        self.sessions.values().filter(takes).map(|session| session.capacity).fold(0, u32::saturating_add)
    }

    /// When the ledger must look at breakers or budgets of its own accord.
    pub(super) fn next_look(&self, now: ledger_core::Now) -> Option<ledger_core::Timestamp> {
        let at = now.at.since_epoch();
        let breakers = self.restless.iter().flat_map(|(id, key)| {
            let agent = self.agents.get(id).filter(|agent| agent.settings.breaker_enabled);
            let guard = agent.and_then(|agent| agent.breakers.of(key));
            guard.into_iter().flat_map(|guard| {
                // Once an open period is over, room or work brings the next probe, not time.
                let deadline = guard.breaker.next_deadline().filter(|deadline| *deadline > at);
                deadline.into_iter().chain(guard.next_step(self.usual(*id, key), at))
            })
        });
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
