//! A store in plain maps, to hold the real ones against; and the one that is overtaken.
//!
//! With a seed it changes, now and then, a task behind the back of whoever wants to write it, as another replica would:
//! the write of that task is refused by name, and the caller has to read and decide anew.

use super::Committed;
use ledger_core::store::{
    AgentRow, Ask, BreakerRow, BudgetRow, Changes, Counts, Fut, KeyHolder, Known, Piece, Recovered, Replicas,
    RequestRow, SessionRow, Store, StoreError, Want,
};
use ledger_core::{AgentId, Now, Record, State, Task, TaskId, Timestamp};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

#[derive(Clone, Default)]
struct Content {
    tasks: BTreeMap<TaskId, Task>,
    history: Vec<Record>,
    keys: HashMap<(AgentId, Arc<str>), KeyHolder>,
    requests: HashMap<Arc<str>, RequestRow>,
    agents: BTreeMap<AgentId, AgentRow>,
    breakers: BTreeMap<(AgentId, Arc<str>), BreakerRow>,
    budgets: BTreeMap<Option<AgentId>, BudgetRow>,
    sessions: BTreeMap<Arc<str>, SessionRow>,
    last_task: u64,
    /// Transitions made, those of removed tasks too.
    seq: u64,
}

/// See the module.
pub(super) struct ModelStore {
    durable: Content,
    open: Content,
    /// Handed over, the oldest first.
    submitted: VecDeque<Content>,
    /// Tasks that were changed since the caller read them.
    stale: HashSet<TaskId>,
    dice: u64,
    overtakes: bool,
    /// How often somebody was overtaken.
    pub(super) overtaken: usize,
}

impl ModelStore {
    /// Empty. With a seed it overtakes.
    pub(super) fn new(seed: Option<u64>) -> Self {
        Self {
            durable: Content::default(),
            open: Content::default(),
            submitted: VecDeque::new(),
            stale: HashSet::new(),
            dice: seed.unwrap_or_default(),
            overtakes: seed.is_some(),
            overtaken: 0,
        }
    }

    /// The transitions that are durable.
    pub(super) fn history(&self) -> Vec<Record> {
        self.durable.history.clone()
    }

    fn throws(&mut self) -> bool {
        self.dice += 1;
        self.overtakes && retry_core::draw(self.dice, 7, 7).is_multiple_of(4)
    }

    fn counts(&self) -> HashMap<AgentId, Counts> {
        let mut counts: HashMap<AgentId, Counts> = HashMap::new();
        for task in self.open.tasks.values() {
            counts.entry(task.spec.agent).or_default()[usize::from(task.state.code())] += 1;
        }
        counts
    }

    fn take(&mut self, changes: Changes) -> Vec<TaskId> {
        let mut refused = Vec::new();
        for changed in &changes.tasks {
            let id = changed.task.id;
            if changed.expected > 0 && self.throws() {
                // The other's change: one that no event of the tests makes, so that a lost update would show.
                let other = self.open.tasks.get_mut(&id).expect("a task that was read is there");
                other.probe_failures += 1;
                self.stale.insert(id);
            }
            if self.stale.contains(&id) {
                self.overtaken += 1;
                refused.push(id);
            }
        }
        let kept = |id: &TaskId| !refused.contains(id);
        for changed in changes.tasks {
            if !kept(&changed.task.id) {
                continue;
            }
            let before = self.open.tasks.get(&changed.task.id);
            assert_eq!(before.map_or(0, |task| task.version), changed.expected, "a write of another version");
            assert_eq!(before.map(|task| task.state), changed.was, "a write from another state");
            // A redrive alone sets the other's mark back.
            let seen = |task: &Task| {
                task.probe_failures == changed.task.probe_failures || task.redrives < changed.task.redrives
            };
            assert!(before.is_none_or(seen), "an update was lost");
            self.open.last_task = self.open.last_task.max(changed.task.id.0);
            self.open.tasks.insert(changed.task.id, (*changed.task).clone());
        }
        self.open.seq += changes.history.iter().filter(|record| kept(&record.task)).count() as u64;
        self.open.history.extend(changes.history.into_iter().filter(|record| kept(&record.task)));
        for (id, data) in changes.data {
            if !data.key.is_empty() {
                let agent = self.open.tasks[&id].spec.agent;
                self.open
                    .keys
                    .insert((agent, Arc::clone(&data.key)), KeyHolder { task: id, digest: data.digest });
            }
        }
        for (id, before, _) in changes.respecified {
            let agent = self.open.tasks[&id].spec.agent;
            let moved =
                |((of, _), holder): &(&(AgentId, Arc<str>), &KeyHolder)| *of == before && holder.task == id;
            let found: Vec<_> =
                self.open.keys.iter().filter(moved).map(|(place, holder)| (place.clone(), *holder)).collect();
            for ((of, key), holder) in found {
                self.open.keys.remove(&(of, Arc::clone(&key)));
                self.open.keys.insert((agent, key), holder);
            }
        }
        for id in &changes.removed {
            let task = self.open.tasks.remove(id).expect("what is removed is there");
            assert!(task.state.is_terminal(), "{id} is removed in {:?}", task.state);
        }
        self.open.history.retain(|record| !changes.removed.contains(&record.task));
        let gone = |id: &TaskId| changes.freed_keys.contains(id) || changes.removed.contains(id);
        self.open.keys.retain(|_, holder| !gone(&holder.task));
        self.open.requests.extend(changes.requests.into_iter().map(|row| (Arc::clone(&row.id), row)));
        self.open.agents.extend(changes.agents.into_iter().map(|row| (row.id, row)));
        self.open
            .breakers
            .extend(changes.breakers.into_iter().map(|row| ((row.agent, Arc::clone(&row.task_type)), row)));
        self.open.budgets.extend(changes.budgets.into_iter().map(|row| (row.agent, row)));
        self.open.sessions.extend(changes.sessions.into_iter().map(|row| (Arc::clone(&row.worker), row)));
        self.open.sessions.retain(|name, row| row.open || !changes.gone_workers.contains(name));
        refused
    }

    fn due<'a>(&'a self, ask: &'a Ask, now: Now) -> Vec<Task> {
        let fits = |task: &&Task| {
            task.spec.agent == ask.agent
                && ask.types.as_ref().is_none_or(|types| types.contains(&task.spec.task_type))
                && !ask.except.contains(&task.spec.task_type)
                && ((task.is_claimable_state() && task.due_at(now) <= now.at)
                    || (ask.gated && task.is_gated()))
        };
        let mut found: Vec<Task> = self.open.tasks.values().filter(fits).cloned().collect();
        found.sort_by_key(|task| (9 - task.priority, task.run_at, task.id));
        found.truncate(ask.limit);
        found
    }
}

impl Store for ModelStore {
    type Proof = Committed;

    /// In pieces of three.
    fn timed<'a>(&'a mut self, queues: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece> {
        let timed = pieces(&self.open.tasks, from, |task| {
            matches!(task.state, State::Running | State::Blocked)
                || has_timer(task)
                || queues.contains(&task.spec.agent)
        });
        Box::pin(std::future::ready(Ok(timed)))
    }

    fn recover(&mut self, _now: Now) -> Fut<'_, Recovered> {
        self.open = self.durable.clone();
        self.submitted.clear();
        self.stale.clear();
        let content = &self.open;
        let recovered = Recovered {
            replicas: Replicas::default(),
            begins: false,
            seed: 1,
            agents: content.agents.values().cloned().collect(),
            breakers: content.breakers.values().cloned().collect(),
            budgets: content.budgets.values().copied().collect(),
            sessions: content.sessions.values().cloned().collect(),
            counts: self.counts(),
            last_session: content.sessions.values().map(|row| row.session.0).max().unwrap_or(0),
            transitions: content.seq,
            // Its clock is the test's.
            newest: Timestamp::EPOCH,
        };
        Box::pin(std::future::ready(Ok(recovered)))
    }

    fn ids(&mut self, n: usize) -> Fut<'_, u64> {
        let first = self.open.last_task + 1;
        self.open.last_task += n as u64;
        Box::pin(std::future::ready(Ok(first)))
    }

    fn begin<'a>(&'a mut self, want: &'a Want, _now: Now) -> Fut<'a, Known> {
        let mut known = Known::default();
        for id in &want.tasks {
            self.stale.remove(id);
            known.tasks.extend(self.open.tasks.get(id).map(|task| (*id, Arc::new(task.clone()))));
        }
        for key in &want.keys {
            known.keys.extend(self.open.keys.get(key).map(|holder| (key.clone(), *holder)));
        }
        for id in &want.requests {
            known.requests.extend(self.open.requests.get(id).map(|row| (Arc::clone(id), row.clone())));
        }
        Box::pin(std::future::ready(Ok(known)))
    }

    fn settled<'a>(&'a mut self, leases: &'a [(TaskId, u64)]) -> Fut<'a, Vec<Option<Record>>> {
        let row = |(task, fence): &(TaskId, u64)| {
            let fits = |row: &&Record| row.task == *task && row.fence == *fence && row.digest.is_some();
            self.open.history.iter().find(fits).cloned()
        };
        Box::pin(std::future::ready(Ok(leases.iter().map(row).collect())))
    }

    fn offer<'a>(&'a mut self, asks: &'a [Ask], now: Now) -> Fut<'a, Vec<Vec<Arc<Task>>>> {
        let offers: Vec<Vec<Arc<Task>>> =
            asks.iter().map(|ask| self.due(ask, now).into_iter().map(Arc::new).collect()).collect();
        for task in offers.iter().flatten() {
            self.stale.remove(&task.id);
        }
        Box::pin(std::future::ready(Ok(offers)))
    }

    fn gated(&mut self, agent: AgentId) -> Fut<'_, Vec<Arc<Task>>> {
        let tasks = self.open.tasks.values();
        let mut found: Vec<Task> =
            tasks.filter(|task| task.spec.agent == agent && task.is_gated()).cloned().collect();
        found.sort_by_key(|task| (9 - task.priority, task.run_at, task.id));
        Box::pin(std::future::ready(Ok(found.into_iter().map(Arc::new).collect())))
    }

    /// In pieces of three.
    fn live<'a>(&'a mut self, agents: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece> {
        let live = pieces(&self.open.tasks, from, |task| agents.contains(&task.spec.agent));
        Box::pin(std::future::ready(Ok(live)))
    }

    fn oldest(&mut self, now: Now) -> Fut<'_, Vec<(AgentId, Timestamp)>> {
        let mut oldest = std::collections::BTreeMap::new();
        let due = |task: &&Task| task.is_claimable_state() && task.due_at(now) <= now.at;
        for task in self.open.tasks.values().filter(due) {
            let since = oldest.entry(task.spec.agent).or_insert(now.at);
            *since = task.due_at(now).min(*since);
        }
        Box::pin(std::future::ready(Ok(oldest.into_iter().collect())))
    }

    fn ahead<'a>(
        &'a mut self,
        task: &'a Task,
        types: Option<&'a [Arc<str>]>,
        most: usize,
        now: Now,
    ) -> Fut<'a, usize> {
        let types = types.map(Arc::from);
        let ask =
            Ask { agent: task.spec.agent, types, limit: usize::MAX, gated: true, except: Arc::default() };
        let place = |task: &Task| (9 - task.priority, task.run_at, task.id);
        let ahead = self.due(&ask, now).iter().filter(|other| place(other) < place(task)).count().min(most);
        Box::pin(std::future::ready(Ok(ahead)))
    }

    fn write(&mut self, changes: Changes) -> Fut<'_, Vec<TaskId>> {
        let refused = self.take(changes);
        Box::pin(std::future::ready(Ok(refused)))
    }

    fn submit(&mut self) -> Fut<'_, ()> {
        self.submitted.push_back(self.open.clone());
        Box::pin(std::future::ready(Ok(())))
    }

    fn durable(&mut self) -> Fut<'_, Self::Proof> {
        self.durable = self.submitted.pop_front().expect("a batch was handed over");
        let proof: Result<Committed, StoreError> = Ok(Committed::up_to(self.durable.seq));
        Box::pin(std::future::ready(proof))
    }

    fn next_due(&self, now: Now) -> Option<Timestamp> {
        let waiting = self.open.tasks.values().filter(|task| task.is_claimable_state());
        waiting.map(|task| task.due_at(now)).filter(|due| *due > now.at).min()
    }
}

/// The next three of those that have not ended.
fn pieces(tasks: &BTreeMap<TaskId, Task>, from: TaskId, wanted: impl Fn(&Task) -> bool) -> Piece {
    let tasks = tasks.range(from..).map(|(_, task)| task);
    let mut found: Vec<_> = tasks
        .filter(|task| !task.state.is_terminal() && wanted(task))
        .take(4)
        .cloned()
        .map(Arc::new)
        .collect();
    let rest = found.get(3).map(|task| task.id);
    found.truncate(3);
    (found, rest)
}

fn has_timer(task: &Task) -> bool {
    !task.state.is_terminal()
        && (task.deadline.is_some()
            || task.spec.policy.queue_timeout.is_some()
            || (task.state == State::Retry && task.reason == ledger_core::Reason::Budget))
}
