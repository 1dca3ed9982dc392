//! What the ledger keeps in memory: all of it can be rebuilt from the store, but for the streams that are open.

use super::command::{AgentRules, AgentView, BreakerView, LedgerError, Stats, ToWorker, WorkerView};
use super::timers::{Beaten, Timers, next};
use crate::clock::Clock;
use crate::store::DynStore;
use ledger_core::agent::{Agent, DEAREST};
use ledger_core::session::Session;
use ledger_core::store::{BreakerRow, BudgetRow, Recovered, Replicas, SessionRow, StoreError};
use ledger_core::{AgentId, ByName, ByTask, Now, Reason, SessionId, State, Task, TaskId, TaskSet, Timestamp};
use retry_core::{Bucket, BucketConfig, Limits};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use tokio::sync::mpsc;

/// What is known of a worker, connected or not.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) incarnation: u64,
    pub(super) session: Option<SessionId>,
    pub(super) beat_at: Timestamp,
    /// RUNNING tasks it holds.
    pub(super) tasks: TaskSet,
}

/// Tasks that wait for a budget token: most urgent, then oldest first.
pub(super) type BudgetQueue = BTreeSet<(Reverse<u8>, Timestamp, TaskId, u32)>;

/// Tasks that have not ended and are looked at one after the other, some in each batch: there may be a million.
#[derive(Clone, Debug)]
pub(super) struct Walk {
    /// Of these agents.
    pub(super) agents: BTreeSet<AgentId>,
    /// The next, or the first after it.
    pub(super) from: TaskId,
    /// What daemons left that are gone is taken up.
    pub(super) inherits: bool,
}

/// The ledger's memory.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) seed: u64,
    pub(super) agents: BTreeMap<AgentId, Agent>,
    pub(super) names: ByName<AgentId>,
    /// The budget that all agents share.
    pub(super) budget: Bucket,
    pub(super) sessions: BTreeMap<SessionId, Session>,
    pub(super) outboxes: HashMap<SessionId, mpsc::UnboundedSender<ToWorker>>,
    pub(super) workers: ByName<Worker>,
    pub(super) timers: Timers,
    /// Tasks whose timers are looked at anew.
    pub(super) walk: Option<Walk>,
    pub(super) beaten: ByTask<Beaten>,
    pub(super) budget_queue: BTreeMap<AgentId, BudgetQueue>,
    /// When the daemon could last begin to take beats.
    pub(super) since: Timestamp,
    pub(super) skew: i64,
    pub(super) last_session: u64,
    pub(super) transitions: u64,
    pub(super) commits: u64,
    pub(super) draining: bool,
    /// The daemons that serve the ledger.
    pub(super) replicas: Replicas,
    /// Others may see what is stored.
    pub(super) is_shared: bool,
    /// What configuration says of agents.
    pub(super) rules: Arc<AgentRules>,
    /// What breakers hold back over all daemons has not been heard since the start.
    pub(super) gates_unheard: bool,
    /// Somebody wants to hear of transitions.
    pub(super) is_observed: bool,
    /// And of what they were of.
    pub(super) is_traced: bool,
    /// Streams that were open at other daemons when somebody asked last.
    pub(super) elsewhere: Vec<Session>,
    /// Agents whose tasks are not handed out.
    pub(super) paused: BTreeSet<AgentId>,
    /// Breakers that time alone may move.
    pub(super) restless: BTreeSet<(AgentId, Arc<str>)>,
    /// The worker that left each agent last, and its last beat. Not stored: rows of sessions name no agents.
    pub(super) last_seen: HashMap<AgentId, (Arc<str>, Timestamp)>,
}

/// Ten times an agent's: a hundred tokens, one a second.
pub(super) fn global_limits(daemons: u32) -> Limits {
    let whole = BucketConfig { capacity: 100, floor: 1.0, deposit: 0.1 }.build().unwrap_or_default();
    whole.shared_by(daemons, DEAREST)
}

/// One daemon's part of it, as stored; full where it was not used so far.
pub(super) fn global_budget(row: Option<&BudgetRow>, daemons: u32, now: Now) -> Bucket {
    match row {
        Some(row) => Bucket::restore(global_limits(daemons), row.level),
        None => Bucket::full(global_limits(daemons), now.at.since_epoch()),
    }
}

impl Memory {
    pub(super) fn new(now: Now) -> Self {
        Self {
            seed: 0,
            agents: BTreeMap::new(),
            names: ByName::default(),
            budget: global_budget(None, 1, now),
            sessions: BTreeMap::new(),
            outboxes: HashMap::new(),
            workers: ByName::default(),
            timers: Timers::default(),
            walk: None,
            beaten: ByTask::default(),
            budget_queue: BTreeMap::new(),
            since: now.at,
            skew: now.skew,
            last_session: 0,
            transitions: 0,
            commits: 0,
            draining: false,
            replicas: Replicas::default(),
            is_shared: false,
            rules: Arc::default(),
            gates_unheard: true,
            is_observed: false,
            is_traced: false,
            elsewhere: Vec::new(),
            paused: BTreeSet::new(),
            restless: BTreeSet::new(),
            last_seen: HashMap::new(),
        }
    }

    /// Takes over what the store knows, a piece at a time; open streams stay.
    pub(super) async fn recover(&mut self, store: &mut DynStore, clock: Clock) -> Result<(), StoreError> {
        loop {
            let recovered = store.recover(clock.now()).await?;
            match recovered.replicas.time {
                Some(time) => {
                    clock.follow(time);
                }
                None => {
                    let behind = clock.go_on_from(recovered.newest);
                    // Below that both lines are held to agree.
                    if let Some(behind) = behind.filter(|_| clock.now().skew != 0) {
                        let behind_ms = behind.as_millis() as u64;
                        tracing::warn!(
                            behind_ms,
                            "the wall clock is behind the ledger's newest entry: its time goes on from there"
                        );
                    }
                }
            }
            self.rebuild(recovered, clock.now());
            match self.adopt_all(store, clock).await {
                // A server that was restarted meanwhile is waited for above.
                Err(StoreError::Unavailable(error)) => tracing::warn!(error, "the store is read anew"),
                Err(error) => return Err(error),
                Ok(()) => {
                    // That may have taken a while, and no beats were taken.
                    self.since = clock.now().at;
                    return Ok(());
                }
            }
        }
    }

    async fn adopt_all(&mut self, store: &mut DynStore, clock: Clock) -> Result<(), StoreError> {
        let timed = self.agents.values().filter(|agent| agent.settings.queue_timeout.is_some());
        let queues: BTreeSet<AgentId> = timed.map(|agent| agent.id).collect();
        let mut from = Some(TaskId(0));
        while let Some(next) = from {
            let (tasks, rest) = store.timed(&queues, next).await?;
            for task in &tasks {
                self.adopt(task, clock.now());
            }
            from = rest;
        }
        Ok(())
    }

    fn rebuild(&mut self, recovered: Recovered, now: Now) {
        let mut breakers: HashMap<_, Vec<BreakerRow>> = HashMap::new();
        for row in recovered.breakers {
            breakers.entry(row.agent).or_default().push(row);
        }
        let (global, own): (Vec<BudgetRow>, Vec<BudgetRow>) =
            recovered.budgets.into_iter().partition(|row| row.agent.is_none());
        let mut budgets: HashMap<_, _> = own.into_iter().map(|row| (row.agent, row)).collect();
        self.seed = recovered.seed;
        // A stream whose opening was not committed was not welcomed either; and of a daemon that was taken for dead all are
        // somebody else's to serve.
        let ours = |id: &SessionId| !recovered.begins && id.0 <= recovered.last_session;
        self.sessions.retain(|id, _| ours(id));
        for (_, outbox) in self.outboxes.extract_if(|id, _| !ours(id)) {
            // Of one that was not welcomed nobody listens.
            let _ = outbox.send(ToWorker::End(LedgerError::SessionEnded));
        }
        self.last_session = recovered.last_session;
        self.budget = global_budget(global.first(), recovered.replicas.count(), now);
        self.agents.clear();
        self.names.clear();
        self.paused.clear();
        self.restless.clear();
        for row in recovered.agents {
            let (id, name) = (row.id, Arc::clone(&row.name));
            let counts = recovered.counts.get(&id).copied().unwrap_or_default();
            let mut agent = Agent::restore(
                row,
                Arc::clone(&self.rules.defaults),
                breakers.remove(&id).unwrap_or_default(),
                budgets.remove(&Some(id)),
                counts,
                now,
            );
            agent.share(recovered.replicas.count(), now);
            self.names.insert(name, id);
            if agent.pause.is_some() {
                self.paused.insert(id);
            }
            let restless = agent.breakers.iter().filter(|(_, guard)| guard.is_restless());
            self.restless.extend(restless.map(|(key, _)| (id, Arc::clone(key))));
            self.agents.insert(id, agent);
        }
        self.workers.clear();
        for row in recovered.sessions {
            let session = self.sessions.contains_key(&row.session).then_some(row.session);
            let worker = Worker {
                incarnation: row.incarnation,
                session,
                beat_at: row.beat_at,
                tasks: TaskSet::default(),
            };
            self.workers.insert(row.worker, worker);
        }
        self.timers.clear();
        self.walk = None;
        self.beaten.clear();
        self.budget_queue.clear();
        for session in self.sessions.values_mut() {
            session.held.clear();
        }
        self.since = now.at;
        self.skew = now.skew;
        self.gates_unheard = true;
        self.transitions = recovered.transitions;
        self.is_shared = recovered.replicas.time.is_some();
        self.replicas = recovered.replicas;
    }

    /// Breakers that hold tasks back although they let through what comes.
    pub(super) fn idle_gates(&self) -> Vec<(AgentId, Option<Arc<str>>)> {
        let of = |agent: &Agent| {
            let idle = agent.breakers.idle(agent.settings.breaker_enabled);
            idle.map(|key| (agent.id, Some(Arc::clone(key)))).collect::<Vec<_>>()
        };
        self.agents.values().flat_map(of).collect()
    }

    /// Takes up a task that was found in the store.
    pub(super) fn adopt(&mut self, task: &Task, now: Now) {
        if self.is_elsewhere(task) {
            return;
        }
        if let Some(agent) = self.agents.get_mut(&task.spec.agent)
            && (task.is_gated() || task.state == State::Running)
        {
            let guard = agent.breakers.of_mut(&task.spec.task_type);
            guard.gated += u64::from(task.is_gated());
            guard.running += u64::from(task.state == State::Running);
        }
        if let Some(holder) = task.holder.as_ref().filter(|_| task.state == State::Running)
            && let Some(worker) = self.workers.get_mut(&holder.worker)
        {
            worker.tasks.insert(task.id);
            if let Some(session) = worker.session.and_then(|id| self.sessions.get_mut(&id)) {
                session.held.insert(task.id);
            }
        }
        self.watch(task, now);
    }

    /// What time does to tasks of these agents may be another thing at another time: each is looked at once, from the first on.
    pub(super) fn go_through(&mut self, agents: BTreeSet<AgentId>, inherits: bool) {
        if agents.is_empty() {
            return;
        }
        let mut walk = Walk { agents, from: TaskId(0), inherits };
        if let Some(before) = self.walk.take() {
            walk.agents.extend(before.agents);
            walk.inherits |= before.inherits;
        }
        self.walk = Some(walk);
    }

    /// Arms what time will do to `task`, and puts it among those that wait for a token if it does.
    pub(super) fn watch(&mut self, task: &Task, now: Now) {
        if self.is_elsewhere(task) {
            // Whoever serves its worker watches over it.
            self.beaten.remove(&task.id);
            self.timers.disarm(task.id);
            return;
        }
        let Some(agent) = self.agents.get(&task.spec.agent) else { return };
        if task.state == State::Retry && task.reason == Reason::Budget {
            self.budget_queue.entry(task.spec.agent).or_default().insert((
                Reverse(task.priority),
                task.run_at,
                task.id,
                task.tokens,
            ));
        }
        if task.state != State::Running {
            self.beaten.remove(&task.id);
        }
        match next(task, &agent.settings, self.beaten.get(&task.id).copied(), self.since, now) {
            Some((at, _)) => self.timers.arm(task.id, at),
            None => self.timers.disarm(task.id),
        }
    }

    pub(super) fn agent_views(&self, now: Now) -> Vec<AgentView> {
        let mut views: Vec<_> = self
            .agents
            .values()
            .map(|agent| AgentView {
                name: Arc::clone(&agent.name),
                settings: Arc::clone(&agent.settings),
                counts: agent.counts,
                at: now.at,
                breakers: agent
                    .breakers
                    .iter()
                    .map(|(key, guard)| BreakerView {
                        task_type: Arc::clone(key),
                        breaker: guard.breaker.clone(),
                        gated: guard.gated,
                    })
                    .collect(),
                budget_millitokens: agent.budget.available(now.at.since_epoch()),
                sessions: self.sessions_of(agent.id).count() as u32,
                created_at: agent.created_at,
                pause: agent.pause.clone(),
            })
            .collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    /// Open streams that serve an agent, those at other daemons as they were when somebody asked last.
    pub(super) fn sessions_of(&self, agent: AgentId) -> impl Iterator<Item = &Session> {
        let all = self.sessions.values().chain(&self.elsewhere);
        all.filter(move |session| session.agents.contains(&agent))
    }

    pub(super) fn worker_views(&self) -> Vec<WorkerView> {
        let mut views: Vec<_> = self
            .sessions
            .values()
            .chain(&self.elsewhere)
            .map(|session| WorkerView {
                worker: Arc::clone(&session.worker),
                incarnation: session.incarnation,
                session: session.id,
                agents: session
                    .agents
                    .iter()
                    .filter_map(|id| self.agents.get(id))
                    .map(|agent| Arc::clone(&agent.name))
                    .collect(),
                types: session.types.as_deref().unwrap_or_default().to_vec(),
                capacity: session.capacity,
                held: session.held.len() as u32,
                labels: session.labels.clone(),
                sdk: session.sdk.clone(),
                connected_at: session.connected_at,
                beat_at: session.beat_at,
            })
            .collect();
        views.sort_by(|a, b| a.worker.cmp(&b.worker));
        views
    }

    pub(super) fn stats(&self, now: Now) -> Stats {
        let mut stats = Stats {
            sessions: (self.sessions.len() + self.elsewhere.len()) as u32,
            agents: self.agents.len() as u32,
            transitions: self.transitions,
            budget_millitokens: self.budget.available(now.at.since_epoch()),
            commits: self.commits,
            ..Stats::default()
        };
        for agent in self.agents.values() {
            for (sum, count) in stats.counts.iter_mut().zip(agent.counts) {
                *sum += count;
            }
        }
        stats
    }

    pub(super) fn session_row(&self, id: SessionId, open: bool) -> Option<SessionRow> {
        self.sessions.get(&id).map(|session| SessionRow {
            worker: Arc::clone(&session.worker),
            incarnation: session.incarnation,
            session: id,
            connected_at: session.connected_at,
            beat_at: session.beat_at,
            open,
            shown: self.is_shared.then(|| Arc::new(session.clone())),
        })
    }
}
