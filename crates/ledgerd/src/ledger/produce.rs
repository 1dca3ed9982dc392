//! What producers want: tasks made, keys honoured, and an answer that can be given again.

use super::batch::Batch;
use super::command::{BatchMode, Enqueued, LedgerError, NewTask};
use bytes::Bytes;
use ledger_core::agent::Agent;
use ledger_core::store::KeyHolder;
use ledger_core::{AgentId, ByKey, Fact, Spec, Task, TaskId};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

impl Batch<'_> {
    pub(super) async fn enqueue(
        &mut self,
        tasks: &[Result<NewTask, LedgerError>],
        mode: BatchMode,
    ) -> Result<Vec<Enqueued>, LedgerError> {
        let mut admitted: HashMap<AgentId, u64> = HashMap::new();
        let mut plans = Vec::with_capacity(tasks.len());
        let mut created: ByKey<(usize, u64)> = ByKey::default();
        // All is judged before anything is made: an ATOMIC call fails with nothing done.
        for task in tasks {
            let plan = match task {
                Err(error) => Err(error.clone()),
                Ok(task) => self.judge(task, plans.len(), &mut created, &mut admitted),
            };
            if let (Err(error), BatchMode::Atomic) = (&plan, mode) {
                return Err(error.clone());
            }
            plans.push(plan);
        }
        let new = plans.iter().filter(|plan| matches!(plan, Ok(Plan::Create(_)))).count();
        if new > 0 && self.store.is_short() {
            return Err(LedgerError::Short);
        }
        let mut next = if new > 0 { self.store.ids(new).await.map_err(LedgerError::Store)? } else { 0 };
        let mut items: Vec<Enqueued> = Vec::with_capacity(tasks.len());
        for (plan, task) in plans.into_iter().zip(tasks) {
            items.push(match (plan, task) {
                (Ok(Plan::Create(agent)), Ok(task)) => {
                    let id = TaskId(next);
                    next += 1;
                    self.make(id, agent, task);
                    Enqueued::Created(id)
                }
                (Ok(Plan::Same(id)), _) => Enqueued::Existing(id),
                (Ok(Plan::SameAs(index)), _) => match items.get(index) {
                    Some(Enqueued::Created(id) | Enqueued::Existing(id)) => Enqueued::Existing(*id),
                    Some(Enqueued::Refused(error)) => Enqueued::Refused(error.clone()),
                    None => Enqueued::Refused(LedgerError::RequestConflict),
                },
                (Err(error), _) => Enqueued::Refused(error),
                (_, Err(error)) => Enqueued::Refused(error.clone()),
            });
        }
        Ok(items)
    }

    fn judge(
        &mut self,
        task: &NewTask,
        index: usize,
        created: &mut ByKey<(usize, u64)>,
        admitted: &mut HashMap<AgentId, u64>,
    ) -> Result<Plan, LedgerError> {
        let agent = self.agent_at_work(&task.agent)?;
        let key = (!task.data.key.is_empty()).then(|| Arc::clone(&task.data.key));
        if let Some(key) = &key {
            let place = (agent, Arc::clone(key));
            if let Some((first, digest)) = created.get(&place) {
                return match *digest == task.data.digest {
                    true => Ok(Plan::SameAs(*first)),
                    false => Err(LedgerError::RequestConflict),
                };
            }
            if let Some(holder) = self.known.keys.get(&place).filter(|holder| !self.was_freed(holder.task)) {
                return match holder.digest == task.data.digest {
                    true => Ok(Plan::Same(holder.task)),
                    false => Err(LedgerError::KeyConflict(holder.task)),
                };
            }
        }
        let waiting = self.memory.agents.get(&agent).map_or(0, Agent::waiting);
        let most = self.memory.agents.get(&agent).map_or(u64::MAX, |agent| agent.settings.max_waiting);
        let admitted = admitted.entry(agent).or_default();
        if waiting + *admitted >= most {
            return Err(LedgerError::Exhausted {
                what: "the agent's queue (max_waiting)",
                retry_after: Duration::from_secs(1),
            });
        }
        *admitted += 1;
        if let Some(key) = key {
            created.insert((agent, key), (index, task.data.digest));
        }
        Ok(Plan::Create(agent))
    }

    /// Whether the holder of a key ended in this very batch and frees it.
    fn was_freed(&self, task: TaskId) -> bool {
        self.open.get(&task).is_some_and(|open| open.task.spec.frees_key && open.task.state.is_terminal())
    }

    fn make(&mut self, id: TaskId, agent: AgentId, task: &NewTask) {
        let spec = Spec {
            agent,
            task_type: Arc::clone(&task.task_type),
            policy: task.policy,
            created_at: self.now.at,
            frees_key: task.frees_key,
        };
        let spec = spec.shared(&mut self.spec);
        let (made, mut record) = Task::enqueue(id, spec, task.priority, task.run_at, task.deadline, self.now);
        if let Some(parent) = task.data.parent {
            record.facts.push((Fact::Parent, parent.to_string().into()));
        }
        if !task.data.key.is_empty() {
            let holder = KeyHolder { task: id, digest: task.data.digest };
            self.known.keys.insert((agent, Arc::clone(&task.data.key)), holder);
        }
        self.changes.data.push((id, Arc::clone(&task.data)));
        self.create(made, record);
    }

    /// Whether the agents of these tasks exist or can be made: nothing else can refuse a follow-up.
    pub(super) fn admits_follow_ups(&self, tasks: &[NewTask]) -> Result<(), LedgerError> {
        let new: HashSet<&Arc<str>> = tasks
            .iter()
            .map(|task| &task.agent)
            .filter(|name| !self.memory.names.contains_key(*name))
            .collect();
        if let Some(name) = new.iter().next().filter(|_| !self.memory.rules.auto_create) {
            return Err(LedgerError::UnknownAgent(Arc::clone(name)));
        }
        if self.memory.agents.len() + new.len() > ledger_core::limits::AGENTS {
            return Err(too_many_agents());
        }
        Ok(())
    }

    /// Enqueues what follows a completion. A key that is taken yields the task that holds it.
    pub(super) async fn follow(&mut self, tasks: &[NewTask]) -> Result<Vec<TaskId>, LedgerError> {
        let mut next = self.store.ids(tasks.len()).await.map_err(LedgerError::Store)?;
        let mut ids = Vec::with_capacity(tasks.len());
        for task in tasks {
            let agent = self.agent(&task.agent)?;
            let place = (agent, Arc::clone(&task.data.key));
            let holder = self.known.keys.get(&place).filter(|_| !task.data.key.is_empty()).copied();
            ids.push(match holder.filter(|holder| !self.was_freed(holder.task)) {
                Some(holder) => holder.task,
                None => {
                    self.make(TaskId(next), agent, task);
                    next += 1;
                    TaskId(next - 1)
                }
            });
        }
        Ok(ids)
    }

    /// The agent that work names, made if it is new and work may do so.
    pub(super) fn agent_at_work(&mut self, name: &Arc<str>) -> Result<AgentId, LedgerError> {
        if self.memory.rules.auto_create { self.agent(name) } else { self.known_agent(name) }
    }

    /// The agent of that name, made if it is new.
    pub(super) fn agent(&mut self, name: &Arc<str>) -> Result<AgentId, LedgerError> {
        if let Some(id) = self.memory.names.get(name) {
            return Ok(*id);
        }
        if self.memory.agents.len() >= ledger_core::limits::AGENTS {
            return Err(too_many_agents());
        }
        let id = AgentId(self.memory.agents.last_key_value().map_or(1, |(last, _)| last.0 + 1));
        self.memory
            .agents
            .insert(id, Agent::new(id, Arc::clone(name), Arc::clone(&self.memory.rules.defaults), self.now));
        self.memory.names.insert(Arc::clone(name), id);
        self.said.new_agents.push((Arc::clone(name), id));
        self.configured.insert(id);
        Ok(id)
    }
}

const fn too_many_agents() -> LedgerError {
    LedgerError::Exhausted { what: "the table of agents (10,000)", retry_after: Duration::from_secs(3_600) }
}

/// What is to be done for one new task.
enum Plan {
    Create(AgentId),
    /// Its key belongs to this task.
    Same(TaskId),
    /// Its key belongs to an earlier item of the same call.
    SameAs(usize),
}

/// An answer as it is remembered: for each item one byte and its number. Runs of new tasks are what bulk calls make,
/// so a run is one entry: `r`, first, length.
pub(super) fn encode(items: &[Enqueued]) -> Bytes {
    let mut out = Vec::new();
    let mut at = 0;
    while at < items.len() {
        match &items[at] {
            Enqueued::Created(first) => {
                let run = items[at..]
                    .iter()
                    .enumerate()
                    .take_while(
                        |(n, item)| matches!(item, Enqueued::Created(id) if id.0 == first.0 + *n as u64),
                    )
                    .count();
                out.push(b'r');
                out.extend(first.0.to_le_bytes());
                out.extend((run as u64).to_le_bytes());
                at += run;
                continue;
            }
            Enqueued::Existing(id) => {
                out.push(b'e');
                out.extend(id.0.to_le_bytes());
            }
            Enqueued::Refused(LedgerError::KeyConflict(id)) => {
                out.push(b'k');
                out.extend(id.0.to_le_bytes());
            }
            Enqueued::Refused(LedgerError::Exhausted { .. }) => out.push(b'x'),
            // Refused for its content: the same content is refused again.
            Enqueued::Refused(_) => out.push(b'i'),
        }
        at += 1;
    }
    out.into()
}

pub(super) fn decode(answer: &[u8], tasks: &[Result<NewTask, LedgerError>]) -> Vec<Enqueued> {
    let mut items = Vec::with_capacity(tasks.len());
    let mut rest = answer;
    while let Some((kind, tail)) = rest.split_first() {
        rest = tail;
        let mut number = || {
            let (bytes, tail) = rest.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
            rest = tail;
            u64::from_le_bytes(*bytes)
        };
        match kind {
            b'r' => {
                let (first, run) = (number(), number());
                items.extend((first..first.saturating_add(run)).map(|id| Enqueued::Created(TaskId(id))));
            }
            b'e' => items.push(Enqueued::Existing(TaskId(number()))),
            b'k' => items.push(Enqueued::Refused(LedgerError::KeyConflict(TaskId(number())))),
            b'x' => items.push(Enqueued::Refused(LedgerError::Exhausted {
                what: "the agent's queue (max_waiting)",
                retry_after: Duration::from_secs(1),
            })),
            _ => items.push(Enqueued::Refused(match tasks.get(items.len()) {
                Some(Err(error)) => error.clone(),
                _ => LedgerError::RequestConflict,
            })),
        }
    }
    items
}
