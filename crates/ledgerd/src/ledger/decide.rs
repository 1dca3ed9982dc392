//! What each command does. In order, one after the other; the store is asked only for what no list could name ahead.

use super::batch::Batch;
use super::breakers::By;
use super::command::{
    AgentRules, Answer, Command, FromWorker, LedgerError, RequestKey, Settlement, ToWorker,
};
use super::memory::{Memory, Walk};
use super::produce::{decode, encode};
use super::replicas::tell_of_refused_defaults;
use crate::clock::NOISE_MS;
use crate::store::settings_text;
use bytes::Bytes;
use ledger_core::store::{AgentEventKind, Pause, RequestRow, StoreError, Want};
use ledger_core::{Agent, AgentId, AgentOverrides, Caller, Event, Now, Settings, TaskId, Violation};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Adds what `command` names to what is read for the batch.
pub(super) fn want(command: &Command, memory: &Memory, want: &mut Want) {
    let mut request =
        |key: &Option<RequestKey>| want.requests.extend(key.iter().map(|key| Arc::clone(&key.id)));
    match command {
        Command::Enqueue { tasks, request: key, .. } => {
            request(key);
            for task in tasks.iter().flatten().filter(|task| !task.data.key.is_empty()) {
                if let Some(agent) = memory.names.get(&task.agent) {
                    want.keys.push((*agent, Arc::clone(&task.data.key)));
                }
            }
        }
        Command::Cancel { task, request: key, .. }
        | Command::Update { task, request: key, .. }
        | Command::Unblock { task, request: key, .. } => {
            request(key);
            want.tasks.push(*task);
        }
        Command::Explain(task) => want.tasks.push(*task),
        Command::Hello(hello, ..) => {
            want.workers.push(Arc::clone(&hello.worker));
            want.tasks.extend(hello.held.iter().chain(&hello.unreceipted).map(|(task, _)| *task));
            if let Some(worker) = memory.workers.get(&hello.worker) {
                want.tasks.extend(&worker.tasks);
            }
        }
        Command::Frame(session, frame) => match frame {
            FromWorker::Acks(items) => want.tasks.extend(items.iter().map(|(task, _)| *task)),
            FromWorker::Beat(held, _) => want.tasks.extend(held.iter().map(|held| held.task)),
            FromWorker::Outcomes(items) => want_settled(items, memory, want),
            FromWorker::Goodbye => {
                let worker = memory.sessions.get(session).and_then(|s| memory.workers.get(&s.worker));
                want.tasks.extend(worker.into_iter().flat_map(|worker| &worker.tasks));
            }
            FromWorker::Capacity(_) | FromWorker::Closed => {}
        },
        Command::Settle(_, items) => want_settled(items, memory, want),
        Command::Redrive { tasks, request: key, .. } | Command::Discard { tasks, request: key, .. } => {
            request(key);
            want.tasks.extend(tasks);
        }
        Command::Remove { tasks, .. } => want.tasks.extend(tasks),
        _ => {}
    }
}

fn want_settled(items: &[Settlement], memory: &Memory, want: &mut Want) {
    want.tasks.extend(items.iter().map(|item| item.task));
    let follow_ups = items.iter().flat_map(|item| &item.follow_ups);
    for task in follow_ups.filter(|task| !task.data.key.is_empty()) {
        if let Some(agent) = memory.names.get(&task.agent) {
            want.keys.push((*agent, Arc::clone(&task.data.key)));
        }
    }
}

impl Batch<'_> {
    /// Decides one command.
    pub(super) async fn decide(&mut self, command: &Command) -> Result<Answer, LedgerError> {
        match command {
            Command::Enqueue { tasks, mode, request } => {
                if let Some(answer) = self.remembered(request.as_ref())? {
                    return Ok(Answer::Enqueued(decode(&answer, tasks)));
                }
                let items = self.enqueue(tasks, *mode).await?;
                self.remember(request.as_ref(), encode(&items));
                Ok(Answer::Enqueued(items))
            }
            Command::Cancel { task, note, request } => {
                self.once(*task, request.as_ref(), &Event::Cancel { note: Arc::clone(note) })
            }
            Command::Update { task, priority, run_at, note, request } => {
                let event = Event::Update { priority: *priority, run_at: *run_at, note: Arc::clone(note) };
                self.once(*task, request.as_ref(), &event)
            }
            Command::Unblock { task, answer, actor, request } => {
                let event =
                    Event::Unblock { answer: Some(Arc::clone(answer)), actor: Some(Arc::clone(actor)) };
                self.once(*task, request.as_ref(), &event)
            }
            Command::Pause { agent, reason, actor, duration } => {
                let id = self.known_agent(agent)?;
                let now = self.now.at;
                if let Some(agent) = self.memory.agents.get_mut(&id) {
                    let until = duration.map(|duration| now.after(duration));
                    tracing::info!(agent = %agent.name, %actor, %reason, "paused");
                    agent.pause = Some(Pause {
                        actor: Arc::clone(actor),
                        reason: Arc::clone(reason),
                        since: now,
                        until,
                    });
                }
                self.memory.paused.insert(id);
                self.configured.insert(id);
                let until = duration.map(|duration| now.after(duration));
                self.happened(id, &"".into(), AgentEventKind::Paused, Some(By { actor, reason }), until);
                Ok(Answer::Done)
            }
            Command::Resume { agent, reason, actor } => {
                let id = self.known_agent(agent)?;
                if self.resume(id) {
                    let by = Some(By { actor, reason });
                    self.happened(id, &"".into(), AgentEventKind::Resumed, by, None);
                    tracing::info!(%agent, %actor, %reason, "resumed");
                }
                Ok(Answer::Done)
            }
            Command::Hello(hello, unsent, outbox) => self.hello(hello, unsent, outbox),
            Command::Frame(session, frame) => {
                self.frame(*session, frame).await?;
                Ok(Answer::Done)
            }
            Command::Settle(worker, items) => {
                let caller = Caller { worker: Arc::clone(worker), session: None };
                let mut receipts = Vec::with_capacity(items.len());
                for item in items {
                    receipts.push(self.settle(&caller, item).await?);
                }
                Ok(Answer::Receipts(receipts))
            }
            Command::Configure { agent, change, actor, reason } => {
                self.configure(agent, change, By { actor, reason }).await
            }
            Command::OrderBreaker { agent, task_type, order, actor, reason } => {
                self.order_breaker(agent, task_type, order, (actor, reason))
            }
            Command::Redrive { tasks, how, request } => self.redrive(tasks, how, request.as_ref()).await,
            Command::Discard { tasks, note, request } => self.discard(tasks, note, request.as_ref()).await,
            Command::Explain(task) => self.facts(*task).await,
            Command::Oldest => {
                let now = self.now.at;
                let found = self.store.oldest(self.now).await.map_err(LedgerError::Store)?;
                let named = found.into_iter().filter_map(|(id, since)| {
                    Some((Arc::clone(&self.memory.agents.get(&id)?.name), now.since(since)))
                });
                Ok(Answer::Oldest(named.collect()))
            }
            Command::Agents => Ok(Answer::Agents(self.memory.agent_views(self.now))),
            Command::Workers => Ok(Answer::Workers(self.memory.worker_views())),
            Command::Stats => Ok(Answer::Stats(Box::new(self.memory.stats(self.now)))),
            Command::Drain(grace) => {
                self.memory.draining = true;
                let sessions: Vec<_> = self.memory.sessions.keys().copied().collect();
                self.said.frames.extend(sessions.into_iter().map(|id| (id, ToWorker::Drain(*grace))));
                Ok(Answer::Done)
            }
            Command::Flush => Ok(Answer::Done),
            Command::Rule(rules) => self.rule(rules).await,
            Command::Remove { tasks, leaving } => Ok(Answer::Removed(self.remove(tasks, *leaving))),
            Command::Forget { workers, events } => Ok(Answer::Removed(self.forget(*workers, *events))),
        }
    }

    /// Changes settings of an agent, and makes one that is new.
    async fn configure(
        &mut self,
        name: &Arc<str>,
        change: &AgentOverrides,
        by: By<'_>,
    ) -> Result<Answer, LedgerError> {
        // Judged before the agent is made, so that a refused call leaves no agent behind.
        let known = self.memory.names.get(name).and_then(|id| self.memory.agents.get(id));
        let given = known.map(|agent| agent.settings.given).unwrap_or_default();
        Settings::over(&self.memory.rules.defaults, change.or(given)).map_err(LedgerError::Invalid)?;
        let id = self.agent(name)?;
        let now = self.now;
        let retimed = self.change_settings(id, |agent| agent.configure(*change, now));
        let retimed = retimed.map_err(LedgerError::Invalid)?;
        self.configured.insert(id);
        if let Some(agent) = self.memory.agents.get(&id) {
            self.breakers.extend(agent.breakers.iter().map(|(key, _)| (id, Arc::clone(key))));
        }
        self.budget_changed(id);
        if retimed {
            self.memory.go_through(BTreeSet::from([id]), false);
        }
        let set = settings_text(change);
        let reason = match &**by.reason {
            "" => set.into(),
            reason => format!("{reason}: {set}").into(),
        };
        let by = Some(By { actor: by.actor, reason: &reason });
        self.happened(id, &"".into(), AgentEventKind::Configured, by, None);
        Ok(Answer::Done)
    }

    /// What configuration says of agents from now on. Nothing of it is stored: each daemon has its own.
    async fn rule(&mut self, rules: &Arc<AgentRules>) -> Result<Answer, LedgerError> {
        self.memory.rules = Arc::clone(rules);
        let now = self.now;
        let agents: Vec<_> = self.memory.agents.keys().copied().collect();
        let mut retimed = BTreeSet::new();
        for id in agents {
            let told = self.change_settings(id, |agent| {
                agent.default_to(Arc::clone(&rules.defaults), now);
                tell_of_refused_defaults(agent);
                Ok(())
            });
            if told.map_err(LedgerError::Invalid)? {
                retimed.insert(id);
            }
        }
        self.ungate.extend(self.memory.idle_gates());
        self.memory.go_through(retimed, false);
        Ok(Answer::Done)
    }

    /// Changes settings of an agent, and what they were the reason for. Whether times are others now.
    fn change_settings(
        &mut self,
        id: AgentId,
        change: impl FnOnce(&mut Agent) -> Result<(), Vec<Violation>>,
    ) -> Result<bool, Vec<Violation>> {
        let Some(agent) = self.memory.agents.get_mut(&id) else { return Ok(false) };
        let (before, per_type) = (Arc::clone(&agent.settings), agent.breakers.per_type());
        change(agent)?;
        if agent.settings == before {
            return Ok(false);
        }
        let retimed = agent.settings.times() != before.times();
        if !agent.settings.breaker_enabled || agent.breakers.per_type() != per_type {
            self.ungate.insert((id, None));
        }
        let keys: Vec<_> = agent.breakers.iter().map(|(key, _)| Arc::clone(key)).collect();
        for key in keys {
            self.look_after(id, &key);
        }
        Ok(retimed)
    }

    /// Goes on with the walk through what lives, if there is one.
    pub(super) async fn walk(&mut self) -> Result<(), StoreError> {
        let Some(Walk { agents, from, inherits }) = self.memory.walk.clone() else { return Ok(()) };
        let (tasks, rest) = self.store.live(&agents, from).await?;
        for task in &tasks {
            let task = self.open.get(&task.id).map_or(task, |open| &open.task);
            if inherits {
                self.memory.inherit(task, self.now);
            }
            self.memory.watch(task, self.now);
        }
        self.memory.walk = rest.map(|from| Walk { agents, from, inherits });
        Ok(())
    }

    pub(super) fn remembered(&self, request: Option<&RequestKey>) -> Result<Option<Bytes>, LedgerError> {
        match request.and_then(|request| Some((request, self.known.requests.get(&request.id)?))) {
            Some((request, row)) if row.digest == request.digest => Ok(Some(row.answer.clone())),
            Some(_) => Err(LedgerError::RequestConflict),
            None => Ok(None),
        }
    }

    pub(super) fn remember(&mut self, request: Option<&RequestKey>, answer: Bytes) {
        if let Some(request) = request {
            let row =
                RequestRow { id: Arc::clone(&request.id), digest: request.digest, answer, at: self.now.at };
            self.known.requests.insert(Arc::clone(&request.id), row.clone());
            self.changes.requests.push(row);
        }
    }

    /// Applies an event to a task, once per request id.
    fn once(
        &mut self,
        task: TaskId,
        request: Option<&RequestKey>,
        event: &Event,
    ) -> Result<Answer, LedgerError> {
        if self.remembered(request)?.is_none() {
            self.apply(task, event, 0)?;
            self.remember(request, Bytes::new());
        }
        Ok(Answer::Done)
    }

    pub(super) fn known_agent(&self, name: &Arc<str>) -> Result<AgentId, LedgerError> {
        let id = self.memory.names.get(name).copied();
        id.ok_or_else(|| LedgerError::UnknownAgent(Arc::clone(name)))
    }
}

/// Whether a command gives work to an agent that is not known, or takes work of it.
fn works_for_unknown(command: &Command, memory: &Memory) -> bool {
    let is_unknown = |name: &Arc<str>| !memory.names.contains_key(name);
    match command {
        Command::Enqueue { tasks, .. } => tasks.iter().flatten().any(|task| is_unknown(&task.agent)),
        Command::Hello(hello, ..) => hello.agents.iter().any(is_unknown),
        Command::Frame(_, FromWorker::Outcomes(items)) | Command::Settle(_, items) => {
            items.iter().flat_map(|item| &item.follow_ups).any(|task| is_unknown(&task.agent))
        }
        Command::Redrive { how, .. } => how.agent.iter().any(is_unknown),
        _ => false,
    }
}

/// Whether a command is about what other daemons may have changed as well, beyond tasks.
pub(super) fn asks_for_news(command: &Command, memory: &Memory) -> bool {
    // Before an agent is said not to be there, somebody looks.
    if !memory.rules.auto_create && works_for_unknown(command, memory) {
        return true;
    }
    matches!(
        command,
        Command::Agents
            | Command::Oldest
            | Command::Stats
            | Command::Workers
            | Command::Explain(_)
            | Command::Pause { .. }
            | Command::Resume { .. }
            | Command::Configure { .. }
            | Command::OrderBreaker { .. }
    )
}

/// Whether the wall clock was set since the last look: times that users named are armed anew then. Each look finds it a
/// millisecond to and fro.
pub(super) const fn clock_was_set(memory: &Memory, now: Now) -> bool {
    memory.skew.abs_diff(now.skew) > NOISE_MS.unsigned_abs()
}
