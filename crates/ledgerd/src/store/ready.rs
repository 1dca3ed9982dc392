//! The tasks that have not ended, and which of them can be claimed: all in memory, so that no index on a mutable column
//! is paid for.
//!
//! Knows nothing of SQL. Invariants: each task stands in at most one of the sets, the one its [`Place`] names; the set of
//! due tasks is kept per (agent, type), so those that nobody can run never stand in the way of those that somebody can;
//! an offer costs what it returns, not what waits.

use ledger_core::store::Ask;
use ledger_core::{AgentId, ById, ByName, ByTask, Now, State, Task, TaskId, Timestamp};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet};
use std::sync::Arc;

/// The usual order: priority, `run_at`, id; the smallest first.
type Key = (u8, Timestamp, TaskId);

fn key_of(task: &Task) -> Key {
    (9u8.saturating_sub(task.priority), task.run_at, task.id)
}

/// Which set a task stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// None: it runs, has ended, or waits for something else than time or room.
    Nowhere,
    /// Due.
    Ready,
    /// Waits for its time on the steady clock.
    Steady,
    /// Waits for its time on the wall clock.
    Wall,
    /// Held back by its agent's breaker.
    Gated,
}

/// A task in memory.
#[derive(Debug)]
pub(super) struct Entry {
    /// As of the last write, committed or not.
    pub(super) task: Arc<Task>,
    /// Number of its newest history row.
    pub(super) history: u64,
    /// It was changed in the open batch.
    pub(super) dirty: bool,
    /// Batches that changed it and are not known to be durable.
    pub(super) underway: u8,
    place: Place,
}

#[derive(Debug, Default)]
struct AgentSets {
    types: ByName<BTreeSet<Key>>,
    gated: BTreeSet<Key>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ready {
    tasks: ByTask<Entry>,
    agents: ById<AgentId, AgentSets>,
    steady: BTreeSet<(Timestamp, TaskId)>,
    wall: BTreeSet<(Timestamp, TaskId)>,
    now: Now,
}

impl Ready {
    /// Empty, at `now`.
    pub(super) fn new(now: Now) -> Self {
        Self {
            tasks: HashMap::default(),
            agents: HashMap::default(),
            steady: BTreeSet::new(),
            wall: BTreeSet::new(),
            now,
        }
    }

    /// The newest time it was told.
    pub(super) const fn now(&self) -> Now {
        self.now
    }

    pub(super) fn entry(&self, id: TaskId) -> Option<&Entry> {
        self.tasks.get(&id)
    }

    pub(super) fn entry_mut(&mut self, id: TaskId) -> Option<&mut Entry> {
        self.tasks.get_mut(&id)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.tasks.values()
    }

    /// Takes a task as it is stored.
    pub(super) fn load(&mut self, task: Arc<Task>, history: u64) {
        let id = task.id;
        self.tasks.insert(id, Entry { task, history, dirty: false, underway: 0, place: Place::Nowhere });
        self.stand(id);
    }

    /// Takes a changed task. Returns the state it was in, none for a new one, and whether the batch changed it before.
    pub(super) fn put(&mut self, task: Arc<Task>) -> (Option<State>, bool) {
        let id = task.id;
        let Some(entry) = self.tasks.get_mut(&id) else {
            self.tasks
                .insert(id, Entry { task, history: 0, dirty: true, underway: 0, place: Place::Nowhere });
            self.stand(id);
            return (None, false);
        };
        // A beat moves the lease of a running task: it stands nowhere before and after.
        let moves = entry.place != Place::Nowhere || !matches!(task.state, State::Running);
        if entry.place != Place::Nowhere {
            leave(&mut self.agents, &mut self.steady, &mut self.wall, &entry.task, entry.place);
            entry.place = Place::Nowhere;
        }
        let was = (Some(entry.task.state), entry.dirty);
        entry.task = task;
        entry.dirty = true;
        if moves {
            self.stand(id);
        }
        was
    }

    /// Forgets a task: it has ended.
    pub(super) fn forget(&mut self, id: TaskId) {
        if let Some(entry) = self.tasks.remove(&id) {
            leave(&mut self.agents, &mut self.steady, &mut self.wall, &entry.task, entry.place);
        }
    }

    /// Whether any task is due, or held back by a breaker.
    pub(super) fn has_any(&mut self, now: Now) -> bool {
        self.advance(now);
        self.agents.values().any(|sets| !sets.types.is_empty() || !sets.gated.is_empty())
    }

    /// Claimable tasks in the usual order.
    pub(super) fn offer(&mut self, ask: &Ask, now: Now) -> Vec<Arc<Task>> {
        self.advance(now);
        let Some(sets) = self.agents.get(&ask.agent) else { return Vec::new() };
        let mut types: Vec<_> = match &ask.types {
            Some(types) => types
                .iter()
                .filter(|name| !ask.except.contains(name))
                .filter_map(|name| sets.types.get(name))
                .map(BTreeSet::iter)
                .collect(),
            None if ask.except.is_empty() => sets.types.values().map(BTreeSet::iter).collect(),
            None => {
                let except: HashSet<&str> = ask.except.iter().map(|name| &**name).collect();
                let types = sets.types.iter().filter(|(name, _)| !except.contains(&***name));
                types.map(|(_, keys)| keys.iter()).collect()
            }
        };
        let mut gated = sets.gated.iter().filter(|(_, _, id)| {
            let name = &self.tasks[id].task.spec.task_type;
            ask.types.as_ref().is_none_or(|types| types.contains(name)) && !ask.except.contains(name)
        });
        let mut heads = BinaryHeap::with_capacity(types.len() + 1);
        for (index, keys) in types.iter_mut().enumerate() {
            heads.extend(keys.next().map(|key| Reverse((*key, index))));
        }
        let of_gated = types.len();
        if ask.gated {
            heads.extend(gated.next().map(|key| Reverse((*key, of_gated))));
        }
        let mut found = Vec::with_capacity(ask.limit.min(64));
        while found.len() < ask.limit
            && let Some(Reverse((key, index))) = heads.pop()
        {
            let next = if index == of_gated { gated.next() } else { types[index].next() };
            heads.extend(next.map(|key| Reverse((*key, index))));
            // Two equal names in one question must not offer a task twice.
            if found.last().is_none_or(|last: &Arc<Task>| last.id != key.2) {
                found.push(Arc::clone(&self.tasks[&key.2].task));
            }
        }
        found
    }

    /// How many due tasks of these types come before `task`, gated ones included, up to `most`. Looks at what it counts,
    /// and at `most` types.
    pub(super) fn ahead(&mut self, task: &Task, types: Option<&[Arc<str>]>, most: usize, now: Now) -> usize {
        self.advance(now);
        let Some(sets) = self.agents.get(&task.spec.agent) else { return 0 };
        let key = key_of(task);
        let named =
            |id: &TaskId| types.is_none_or(|types| types.contains(&self.tasks[id].task.spec.task_type));
        let mut count = sets.gated.range(..key).take(most).filter(|(_, _, id)| named(id)).count();
        let mut add = |keys: &BTreeSet<Key>| {
            count += keys.range(..key).take(most.saturating_sub(count)).count();
            count < most
        };
        match types {
            Some(types) => types.iter().take(most).filter_map(|name| sets.types.get(name)).all(&mut add),
            None => sets.types.values().take(most).all(&mut add),
        };
        count
    }

    /// Tasks that the agent's breaker holds back, in the usual order.
    pub(super) fn gated(&self, agent: AgentId) -> Vec<Arc<Task>> {
        let sets = self.agents.get(&agent);
        sets.iter().flat_map(|sets| &sets.gated).map(|(_, _, id)| Arc::clone(&self.tasks[id].task)).collect()
    }

    /// Tasks of these agents that have not ended, from this number on.
    pub(super) fn live(&self, agents: &BTreeSet<AgentId>, from: TaskId) -> Vec<Arc<Task>> {
        let of = |task: &&Arc<Task>| {
            task.id >= from && !task.state.is_terminal() && agents.contains(&task.spec.agent)
        };
        self.tasks.values().map(|entry| &entry.task).filter(of).cloned().collect()
    }

    /// Since when the longest waiting due task of each agent is due. Looks at one task for each type and priority.
    pub(super) fn oldest(&mut self, now: Now) -> Vec<(AgentId, Timestamp)> {
        self.advance(now);
        let of = |sets: &AgentSets| {
            let heads = |keys: &BTreeSet<Key>| {
                let urgencies = 0..=9_u8;
                let head = |urgency| {
                    let from = (urgency, Timestamp::from_millis(i64::MIN), TaskId(0));
                    keys.range(from..).next().filter(|key| key.0 == urgency).copied()
                };
                urgencies.filter_map(head).map(|(_, _, id)| self.tasks[&id].task.due_at(now)).min()
            };
            sets.types.values().filter_map(heads).min()
        };
        self.agents.iter().filter_map(|(id, sets)| Some((*id, of(sets)?))).collect()
    }

    /// When the next waiting task becomes due, strictly after `now`.
    pub(super) fn next_due(&self, now: Now) -> Option<Timestamp> {
        let after = |set: &BTreeSet<(Timestamp, TaskId)>, at: Timestamp| {
            set.range((at, TaskId(u64::MAX))..).map(|(time, _)| *time).find(|time| *time > at)
        };
        let wall = after(&self.wall, now.wall()).map(|time| now.from_wall(time));
        after(&self.steady, now.at).into_iter().chain(wall).min()
    }

    /// Moves what has become due by `now`.
    pub(super) fn advance(&mut self, now: Now) {
        let back = now.wall() < self.now.wall() || now.at < self.now.at;
        self.now = now;
        if back {
            self.stand_anew();
        }
        while let Some((_, id)) = self.steady.first().filter(|(time, _)| *time <= now.at).copied() {
            self.steady.pop_first();
            self.stand(id);
        }
        while let Some((_, id)) = self.wall.first().filter(|(time, _)| *time <= now.wall()).copied() {
            self.wall.pop_first();
            self.stand(id);
        }
    }

    /// A clock was set back: what was due may not be any more. Looks at every task, for it hardly ever happens.
    fn stand_anew(&mut self) {
        let due: Vec<TaskId> = self
            .tasks
            .values()
            .filter(|entry| entry.place == Place::Ready)
            .map(|entry| entry.task.id)
            .collect();
        for id in due {
            let entry = &self.tasks[&id];
            leave(&mut self.agents, &mut self.steady, &mut self.wall, &entry.task, entry.place);
            self.stand(id);
        }
    }

    /// Puts a task that stands in no set into its set.
    fn stand(&mut self, id: TaskId) {
        let Some(entry) = self.tasks.get_mut(&id) else { return };
        let task = &entry.task;
        let key = key_of(task);
        entry.place = if task.is_gated() {
            self.agents.entry(task.spec.agent).or_default().gated.insert(key);
            Place::Gated
        } else if !task.is_claimable_state() {
            Place::Nowhere
        } else if task.due_at(self.now) <= self.now.at {
            let types = &mut self.agents.entry(task.spec.agent).or_default().types;
            match types.get_mut(&task.spec.task_type) {
                Some(keys) => keys.insert(key),
                None => types.entry(Arc::clone(&task.spec.task_type)).or_default().insert(key),
            };
            Place::Ready
        } else if task.calendar {
            self.wall.insert((task.run_at, id));
            Place::Wall
        } else {
            self.steady.insert((task.run_at, id));
            Place::Steady
        };
    }
}

/// Takes a task out of the set it stands in.
fn leave(
    agents: &mut ById<AgentId, AgentSets>,
    steady: &mut BTreeSet<(Timestamp, TaskId)>,
    wall: &mut BTreeSet<(Timestamp, TaskId)>,
    task: &Task,
    place: Place,
) {
    let key = key_of(task);
    match place {
        Place::Nowhere => {}
        Place::Steady => {
            steady.remove(&(task.run_at, task.id));
        }
        Place::Wall => {
            wall.remove(&(task.run_at, task.id));
        }
        Place::Gated => {
            if let Some(sets) = agents.get_mut(&task.spec.agent) {
                sets.gated.remove(&key);
            }
        }
        Place::Ready => {
            let Some(sets) = agents.get_mut(&task.spec.agent) else { return };
            if let Some(keys) = sets.types.get_mut(&task.spec.task_type) {
                keys.remove(&key);
                // Types are the user's words and may be many: an empty set is not kept.
                if keys.is_empty() {
                    sets.types.remove(&task.spec.task_type);
                }
            }
        }
    }
}
