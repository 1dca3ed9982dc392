//! What the breakers of an agent let through now, and what its sessions may therefore ask the store for.

use super::batch::Batch;
use breaker_core::{Availability, State};
use ledger_core::dispatch::Group;
use ledger_core::limits::BATCH_OPERATIONS;
use ledger_core::store::{Ask, StoreError};
use ledger_core::{AgentId, Event, Guard, Task, TaskId};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// What one breaker lets through.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// All that there is room for.
    Free,
    /// So many; as probes, or while it ramps up.
    Narrow { most: usize, probing: bool },
    /// Nothing; what could run becomes BLOCKED if it is open.
    Shut { open: bool },
}

/// Tasks of an agent that go one way.
struct Scope {
    key: Arc<str>,
    way: Way,
    last_probe: Option<TaskId>,
    /// None: all types.
    only: Option<Arc<[Arc<str>]>>,
    except: Arc<[Arc<str>]>,
}

impl Scope {
    /// What a session of `group` may ask for; none when it takes none of these types.
    fn ask(&self, group: &Group, limit: usize, gated: bool) -> Option<Ask> {
        let types = match (&self.only, &group.1) {
            (None, taken) => taken.clone(),
            (Some(only), None) => Some(Arc::clone(only)),
            (Some(only), Some(taken)) => {
                let both: Arc<[Arc<str>]> =
                    taken.iter().filter(|name| only.contains(name)).cloned().collect();
                if both.is_empty() {
                    return None;
                }
                Some(both)
            }
        };
        Some(Ask { agent: group.0, types, limit, gated, except: Arc::clone(&self.except) })
    }
}

/// What was asked for whom.
pub(super) struct Asked {
    pub(super) asks: Vec<Ask>,
    groups: Vec<(Group, Option<TaskId>)>,
}

impl Asked {
    /// The answers, by group, in the usual order; a former probe comes last: one bad task cannot hold an agent down.
    pub(super) fn sort(self, answers: Vec<Vec<Arc<Task>>>) -> HashMap<Group, VecDeque<Arc<Task>>> {
        let mut offers: HashMap<Group, VecDeque<Arc<Task>>> = HashMap::new();
        for ((group, last_probe), tasks) in self.groups.into_iter().zip(answers) {
            match offers.get_mut(&group) {
                None if last_probe.is_none() => {
                    offers.insert(group, tasks.into());
                }
                before => {
                    let before = before.map(std::mem::take).unwrap_or_default();
                    let mut all: Vec<Arc<Task>> = before.into_iter().chain(tasks).collect();
                    all.sort_by_key(|task| {
                        (Some(task.id) == last_probe, 9 - task.priority, task.run_at, task.id)
                    });
                    offers.insert(group, all.into());
                }
            }
        }
        offers
    }
}

impl Batch<'_> {
    /// What the sessions of `groups` may ask for, `room` for tasks in each; gates what an open breaker holds back.
    pub(super) async fn admit(&mut self, groups: HashMap<Group, usize>) -> Result<Asked, StoreError> {
        let mut asked = Asked { asks: Vec::new(), groups: Vec::new() };
        let mut agents: HashMap<AgentId, Vec<(Group, usize)>> = HashMap::new();
        for (group, free) in groups {
            agents.entry(group.0).or_default().push((group, free));
        }
        for (id, groups) in agents {
            let free = groups.iter().map(|(_, free)| free).sum();
            for scope in self.scopes(id, free) {
                match scope.way {
                    Way::Shut { open: false } => {}
                    Way::Shut { open: true } => self.gate(id, &scope, &groups).await?,
                    Way::Free => asked.add(&scope, &groups, usize::MAX, false),
                    Way::Narrow { most, probing } => asked.add(&scope, &groups, most, probing),
                }
            }
        }
        Ok(asked)
    }

    /// The ways of an agent's tasks: one for each type that is not free to go, and one for all the rest.
    fn scopes(&self, id: AgentId, free: usize) -> Vec<Scope> {
        let Some(agent) = self.memory.agents.get(&id) else { return Vec::new() };
        let breakers = &agent.breakers;
        let none: Arc<[Arc<str>]> = Arc::default();
        let mut ways = breakers
            .iter()
            .map(|(key, guard)| (Arc::clone(key), self.way(id, key, guard, free), guard.last_probe));
        let Some((key, own, last_probe)) = ways.next() else { return Vec::new() };
        if !breakers.per_type() {
            return vec![Scope { key, way: own, last_probe, only: None, except: none }];
        }
        let mut scopes = Vec::new();
        let (mut known, mut free_types) = (Vec::new(), Vec::new());
        for (name, way, last_probe) in ways {
            known.push(Arc::clone(&name));
            if way == Way::Free {
                free_types.push(name);
            } else {
                let only = Some([Arc::clone(&name)].into());
                scopes.push(Scope { key: name, way, last_probe, only, except: Arc::clone(&none) });
            }
        }
        // Types that have no breaker yet are free to go; tasks without a type, and types beyond the limit, go the
        // agent's own way.
        let unnamed: Option<Arc<[Arc<str>]>> = (!breakers.is_full()).then(|| [Arc::clone(&key)].into());
        let excluded: Vec<Arc<str>> = scopes.iter().map(|scope| Arc::clone(&scope.key)).collect();
        match (own, &unnamed) {
            (Way::Free, _) => {
                let except = excluded.into();
                scopes.push(Scope { key, way: own, last_probe: None, only: None, except });
            }
            (_, Some(_)) => {
                let except = excluded.into_iter().chain([Arc::clone(&key)]).collect();
                scopes.push(Scope {
                    key: Arc::clone(&key),
                    way: own,
                    last_probe,
                    only: unnamed,
                    except: none,
                });
                scopes.push(Scope { key, way: Way::Free, last_probe: None, only: None, except });
            }
            (_, None) => {
                let (only, except) = (Some(free_types.into()), Arc::clone(&none));
                scopes.push(Scope { key: Arc::clone(&key), way: Way::Free, last_probe: None, only, except });
                scopes.push(Scope { key, way: own, last_probe, only: None, except: known.into() });
            }
        }
        scopes
    }

    fn way(&self, id: AgentId, key: &str, guard: &Guard, free: usize) -> Way {
        let now = self.now.at.since_epoch();
        let breaker = &guard.breaker;
        if self.memory.agents.get(&id).is_some_and(|agent| !agent.settings.breaker_enabled) {
            return Way::Free;
        }
        match breaker.is_available(now) {
            Availability::Yes if breaker.ramp_until().is_none() => Way::Free,
            Availability::Yes => {
                let limit = u64::from(breaker.ramp_limit(self.memory.usual(id, key), now));
                match usize::try_from(limit.saturating_sub(guard.running)).unwrap_or(usize::MAX) {
                    0 => Way::Shut { open: false },
                    most if most >= free => Way::Free,
                    most => Way::Narrow { most, probing: false },
                }
            }
            Availability::Probe => {
                let taken = match breaker.state() {
                    State::HalfOpen => breaker.probes_in_flight(),
                    _ => 0,
                };
                match breaker.config().half_open_permits.saturating_sub(taken) {
                    0 => Way::Shut { open: false },
                    permits => Way::Narrow { most: free.min(permits as usize), probing: true },
                }
            }
            Availability::No { .. } => {
                Way::Shut { open: matches!(breaker.state(), State::Open | State::ForcedOpen) }
            }
        }
    }

    /// Shows that an open breaker is what holds work back: as many tasks as could run now become BLOCKED.
    async fn gate(
        &mut self,
        id: AgentId,
        scope: &Scope,
        groups: &[(Group, usize)],
    ) -> Result<(), StoreError> {
        let gated = |batch: &Self| {
            let agent = batch.memory.agents.get(&id);
            agent.and_then(|agent| agent.breakers.of(&scope.key)).map_or(0, |guard| guard.gated) as usize
        };
        let takes = |group: &Group| scope.ask(group, 0, false).is_some();
        let room: usize = groups.iter().filter(|(group, _)| takes(group)).map(|(_, free)| free).sum();
        let mut left = room.saturating_sub(gated(self));
        if left == 0 {
            return Ok(());
        }
        let asks: Vec<Ask> = groups
            .iter()
            .filter_map(|(group, _)| scope.ask(group, left.min(BATCH_OPERATIONS), false))
            .collect();
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
}

impl Asked {
    fn add(&mut self, scope: &Scope, groups: &[(Group, usize)], most: usize, probing: bool) {
        for (group, free) in groups {
            // One more than needed, so that a lost task or a former probe can be passed over.
            let limit = (*free).min(most).min(BATCH_OPERATIONS) + 1;
            if let Some(ask) = scope.ask(group, limit, probing) {
                self.asks.push(ask);
                self.groups.push((group.clone(), scope.last_probe.filter(|_| probing)));
            }
        }
    }
}
