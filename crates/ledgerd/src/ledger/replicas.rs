//! What other daemons on the same ledger do to this one's memory.
//!
//! A task that runs is watched over by the daemon that serves its worker's session; what waits, by whoever wrote it last, and
//! by the heir of one that is gone. Two that watch over the same task do no harm: its row is written by the first, and the
//! other finds nothing left to do. Invariant: on a ledger with one daemon nothing here does anything.

use super::batch::{Batch, Open};
use super::command::{LeaseVerdict, LedgerError, ToWorker, Verdict};
use super::memory::{Memory, Worker, global_budget, global_limits};
use super::timers::{Beaten, lease_end};
use ledger_core::session::Session;
use ledger_core::store::{AgentRow, BreakerRow, News, Replicas, SessionRow};
use ledger_core::{Agent, AgentId, ByTask, Now, SessionId, State, Task, TaskId, TaskSet};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What of the news a batch has to act on.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Breakers that another daemon closed; none for all of an agent's.
    pub(super) let_go: Vec<(AgentId, Option<Arc<str>>)>,
    /// Tasks that were changed elsewhere.
    pub(super) changed: Vec<TaskId>,
    /// Workers that went elsewhere.
    pub(super) moved: Vec<Arc<str>>,
    /// Agents whose times are others.
    pub(super) reconfigured: BTreeSet<AgentId>,
    /// Tasks that have ended, of those that are waited for.
    pub(super) ended: Vec<TaskId>,
    /// Agents that were made elsewhere.
    pub(super) new_agents: Vec<(Arc<str>, AgentId)>,
}

impl Heard {
    pub(super) fn add(&mut self, other: Self) {
        self.let_go.extend(other.let_go);
        self.changed.extend(other.changed);
        self.moved.extend(other.moved);
        self.reconfigured.extend(other.reconfigured);
    }
}

/// What batches did to memory that no row says.
#[derive(Debug, Default)]
pub(super) struct Undo {
    opened: Vec<SessionId>,
    closed: Vec<Session>,
    /// The newest batch's first.
    tasks: Vec<ByTask<Open>>,
}

impl Undo {
    pub(super) fn of(batch: &mut Batch<'_>) -> Self {
        Self {
            opened: std::mem::take(&mut batch.opened),
            closed: std::mem::take(&mut batch.shut),
            tasks: vec![std::mem::take(&mut batch.open)],
        }
    }

    /// What an earlier batch did as well.
    pub(super) fn add(&mut self, earlier: Self) {
        self.opened.extend(earlier.opened);
        self.closed.extend(earlier.closed);
        self.tasks.extend(earlier.tasks);
    }

    /// Tasks that the batch looked at.
    pub(super) fn touched(&self) -> Vec<TaskId> {
        let mut all: Vec<TaskId> = self.tasks.iter().flat_map(|batch| batch.keys().copied()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

impl Memory {
    /// Whether the task runs with a worker of another daemon.
    pub(super) fn is_elsewhere(&self, task: &Task) -> bool {
        !self.replicas.others.is_empty()
            && task.state == State::Running
            && task
                .holder
                .as_ref()
                .is_some_and(|holder| self.replicas.others.contains(&holder.session.slot()))
    }

    /// Takes note of who serves the ledger, and divides budgets anew where their number has changed.
    pub(super) fn know_replicas(&mut self, replicas: &Replicas, now: Now) {
        let daemons = replicas.count();
        let before = std::mem::replace(&mut self.replicas, replicas.clone()).count();
        if before == daemons {
            return;
        }
        self.budget.resize(global_limits(daemons), now.at.since_epoch());
        for agent in self.agents.values_mut() {
            agent.share(daemons, now);
        }
    }

    /// Takes over what others did. Nothing of this daemon's own may be under way.
    pub(super) fn hear(&mut self, news: News, now: Now) -> Heard {
        let mut heard =
            Heard { changed: news.changed, moved: news.moved, ended: news.ended, ..Heard::default() };
        self.know_replicas(&news.replicas, now);
        for row in news.agents {
            self.hear_agent(row, &mut heard, now);
        }
        for row in news.breakers {
            self.hear_breaker(row, &mut heard, now);
        }
        for agent in self.agents.values_mut() {
            if let Some(totals) = &news.totals {
                agent.counts = totals.counts.get(&agent.id).copied().unwrap_or_default();
            }
            if let Some(gated) = &news.gated {
                let own = gated.iter().filter(|(of, ..)| *of == agent.id);
                agent.breakers.count_gated(own.map(|(_, task_type, n)| (task_type, *n)));
            }
        }
        if news.gated.is_some() && std::mem::take(&mut self.gates_unheard) {
            heard.let_go.extend(self.idle_gates());
        }
        if let Some(totals) = news.totals {
            self.transitions = totals.transitions;
        }
        if self.replicas.others.is_empty() {
            self.elsewhere.clear();
        } else if let Some(sessions) = news.sessions {
            self.elsewhere = sessions;
        }
        if let Some(workers) = news.left {
            for row in workers {
                self.meet(&row);
            }
            self.go_through(self.agents.keys().copied().collect(), true);
        }
        heard
    }

    fn hear_agent(&mut self, row: AgentRow, heard: &mut Heard, now: Now) {
        let id = row.id;
        if row.pause.is_some() {
            self.paused.insert(id);
        } else {
            self.paused.remove(&id);
        }
        match self.agents.get_mut(&id).filter(|agent| agent.name == row.name) {
            Some(agent) => {
                let before = Arc::clone(&agent.settings);
                agent.follow(row, now);
                if agent.settings.given != before.given {
                    tell_of_refused_defaults(agent);
                }
                if agent.settings.times() != before.times() {
                    heard.reconfigured.insert(id);
                }
                let held = before.breaker_enabled || agent.breakers.gated() > 0;
                if held && !agent.settings.breaker_enabled {
                    heard.let_go.push((id, None));
                }
            }
            None => {
                let name = Arc::clone(&row.name);
                let defaults = Arc::clone(&self.rules.defaults);
                let mut agent = Agent::restore(row, defaults, Vec::new(), None, [0; 8], now);
                agent.share(self.replicas.count(), now);
                tell_of_refused_defaults(&agent);
                self.names.retain(|_, known| *known != id);
                self.names.insert(Arc::clone(&name), id);
                self.agents.insert(id, agent);
                heard.new_agents.push((name, id));
            }
        }
    }

    fn hear_breaker(&mut self, row: BreakerRow, heard: &mut Heard, now: Now) {
        let (id, key) = (row.agent, Arc::clone(&row.task_type));
        let Some(agent) = self.agents.get_mut(&id) else { return };
        if agent.breakers.follow(row, now) {
            heard.let_go.push((id, Some(Arc::clone(&key))));
        }
        let restless = agent.breakers.of(&key).is_some_and(ledger_core::Guard::is_restless);
        if restless {
            self.restless.insert((id, key));
        } else {
            self.restless.remove(&(id, key));
        }
    }

    /// Takes up a task that a daemon may have left that is gone: its worker has a whole lease to be heard of.
    pub(super) fn inherit(&mut self, task: &Task, now: Now) {
        if task.holder.as_ref().is_some_and(|holder| holder.session.slot() != self.replicas.slot)
            && !self.is_elsewhere(task)
        {
            self.give_a_lease(task, now);
            self.hold(task);
        }
    }

    /// Lets the lease of a task that runs begin anew.
    fn give_a_lease(&mut self, task: &Task, now: Now) {
        let (Some(lease), Some(agent)) = (task.lease, self.agents.get(&task.spec.agent)) else { return };
        if task.state != State::Running || lease.acked_at.is_none() {
            return;
        }
        let until = now.at.after(agent.settings.lease_duration(&task.spec.policy));
        self.beaten.insert(task.id, Beaten { until, progress_at: lease.progress_at.max(now.at) });
    }

    /// What the store says of a worker's last session.
    pub(super) fn meet(&mut self, row: &SessionRow) {
        let session = self.sessions.contains_key(&row.session).then_some(row.session);
        let worker = self.workers.entry(Arc::clone(&row.worker)).or_insert_with(|| Worker {
            incarnation: row.incarnation,
            session,
            beat_at: row.beat_at,
            tasks: TaskSet::default(),
        });
        worker.incarnation = row.incarnation;
        worker.beat_at = worker.beat_at.max(row.beat_at);
        // A stream of ours that another has taken the place of stays until it is closed.
        worker.session = session.or(worker.session);
    }

    /// Whether another daemon that lives has this stream open.
    pub(super) fn is_open_elsewhere(&self, row: &SessionRow) -> bool {
        row.open && self.replicas.others.contains(&row.session.slot())
    }

    /// Takes a task off the books of its holder, or of whoever has it on them. Whether it was there.
    fn unhold(&mut self, task: &Task, everywhere: bool) -> bool {
        let named = |name: &Arc<str>| task.holder.as_ref().is_some_and(|holder| holder.worker == *name);
        let mut found = false;
        for (_, worker) in self.workers.iter_mut().filter(|(name, _)| everywhere || named(name)) {
            found |= worker.tasks.remove(&task.id);
        }
        for session in self.sessions.values_mut().filter(|session| everywhere || named(&session.worker)) {
            session.held.remove(&task.id);
        }
        if found && let Some(agent) = self.agents.get_mut(&task.spec.agent) {
            let guard = agent.breakers.of_mut(&task.spec.task_type);
            guard.running = guard.running.saturating_sub(1);
        }
        self.leave_budget_queue(task.spec.agent, task.id);
        found
    }

    /// Puts a task that runs with a worker of this daemon on its books.
    pub(super) fn hold(&mut self, task: &Task) {
        if task.state != State::Running || self.is_elsewhere(task) {
            return;
        }
        let Some(worker) = task.holder.as_ref().and_then(|holder| self.workers.get_mut(&holder.worker))
        else {
            return;
        };
        let is_new = worker.tasks.insert(task.id);
        if let Some(session) = worker.session.and_then(|id| self.sessions.get_mut(&id)) {
            session.held.insert(task.id);
        }
        if is_new && let Some(agent) = self.agents.get_mut(&task.spec.agent) {
            agent.breakers.of_mut(&task.spec.task_type).running += 1;
        }
    }

    /// Puts the books right for a task as it is stored, and watches over it.
    fn book(&mut self, task: &Task, now: Now) {
        self.hold(task);
        if task.state == State::Running
            && let Some(agent) = self.agents.get(&task.spec.agent)
            && lease_end(task, &agent.settings, self.beaten.get(&task.id).copied(), self.since)
                .is_some_and(|until| until <= now.at)
        {
            // Beats are not stored: those of before are not known.
            self.give_a_lease(task, now);
        }
        self.watch(task, now);
    }

    /// Streams as they were before: each frame that opened or closed one is decided anew.
    pub(super) fn put_back_sessions(&mut self, undo: &mut Undo) {
        let opened = std::mem::take(&mut undo.opened);
        for id in &opened {
            self.sessions.remove(id);
            self.outboxes.remove(id);
            for worker in self.workers.values_mut().filter(|worker| worker.session == Some(*id)) {
                worker.session = None;
            }
        }
        let closed = std::mem::take(&mut undo.closed);
        for session in closed.into_iter().filter(|session| !opened.contains(&session.id)) {
            if let Some(worker) = self.workers.get_mut(&session.worker) {
                worker.session = Some(session.id);
            }
            self.sessions.insert(session.id, session);
        }
    }

    /// After a conflict: memory as the store has it, for all that the batch touched.
    pub(super) fn put_back(
        &mut self,
        mut undo: Undo,
        (mut news, tasks): (News, Vec<Task>),
        now: Now,
    ) -> Heard {
        self.put_back_sessions(&mut undo);
        for open in undo.tasks.iter().flat_map(ByTask::values) {
            // As if it had never been; those that are stored are booked below.
            self.unhold(&open.task, false);
            self.timers.disarm(open.task.id);
        }
        // Agents that only the batch has made are none.
        self.agents.retain(|id, _| news.agents.iter().any(|row| row.id == *id));
        self.names.retain(|_, id| news.agents.iter().any(|row| row.id == *id));
        let own = news.budgets.take().unwrap_or_default();
        let global = own.iter().find(|row| row.agent.is_none());
        self.budget = global_budget(global, self.replicas.count(), now);
        for agent in self.agents.values_mut() {
            let row = own.iter().find(|row| row.agent == Some(agent.id)).copied();
            agent.set_budget(row, now);
        }
        let heard = self.hear(news, now);
        for task in &tasks {
            self.book(task, now);
        }
        if let Some(walk) = &mut self.walk {
            // What was gone through is as if it had not been.
            walk.from = TaskId(0);
        }
        heard
    }

    pub(super) fn leave_budget_queue(&mut self, agent: AgentId, id: TaskId) {
        if let Some(queue) = self.budget_queue.get_mut(&agent) {
            queue.retain(|(_, _, queued, _)| *queued != id);
            if queue.is_empty() {
                self.budget_queue.remove(&agent);
            }
        }
    }
}

/// What is set for an agent and what configuration has for all may contradict each other.
pub(super) fn tell_of_refused_defaults(agent: &Agent) {
    let Some(found) = agent.refuses_defaults() else { return };
    let rules: Vec<_> = found.iter().map(|one| format!("{}: {}", one.field, one.rule)).collect();
    tracing::warn!(
        agent = %agent.name,
        rules = rules.join("; "),
        "this agent goes without agent_defaults, or without what was set for it: they do not go together"
    );
}

impl Batch<'_> {
    /// Puts right what memory has of tasks that another daemon changed, and passes stops on.
    pub(super) fn heed(&mut self, changed: &[TaskId]) {
        for id in changed {
            let Some(task) = self.open.get(id).map(|open| Arc::clone(&open.task)) else { continue };
            self.memory.unhold(&task, true);
            self.memory.book(&task, self.now);
            let session =
                task.holder.as_ref().and_then(|holder| self.memory.workers.get(&holder.worker)?.session);
            if let (Some(session), Some(stop)) = (session, task.stop)
                && task.state == State::Running
                && !self.memory.is_elsewhere(&task)
            {
                let verdict = Verdict::Stop(stop, stop.until.since(self.now.at));
                let verdict = LeaseVerdict { task: task.id, fence: task.fence, verdict };
                self.said.frames.push((session, ToWorker::Stop(vec![verdict])));
            }
        }
    }

    /// Ends the streams of workers that went to another daemon. What they did not name there they hold no more.
    pub(super) fn part(&mut self, moved: &[Arc<str>]) {
        for name in moved {
            let Some(row) = self.known.sessions.get(name).cloned() else { continue };
            let Some(worker) = self.memory.workers.get(name) else { continue };
            if row.session.slot() == self.memory.replicas.slot {
                // It came back since.
                continue;
            }
            if let Some(session) = worker.session {
                self.close(session, Some(LedgerError::WorkerSuperseded(Arc::clone(name))));
            }
            self.memory.meet(&row);
            self.take_back(name, |_| true);
        }
    }
}
