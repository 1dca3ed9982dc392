//! Dead letters that are put back, as they were or with another agent, payload or priority, or hidden.

use super::batch::Batch;
use super::command::{Answer, LedgerError, Redriving, RequestKey};
use bytes::Bytes;
use ledger_core::store::{KeyHolder, TaskData, Want};
use ledger_core::{AgentId, Event, Redrive, Refusal, Spec, State, TaskId};
use std::collections::HashMap;
use std::sync::Arc;

type Each = Vec<(TaskId, Result<(), LedgerError>)>;

impl Batch<'_> {
    pub(super) async fn redrive(
        &mut self,
        tasks: &[TaskId],
        how: &Redriving,
        request: Option<&RequestKey>,
    ) -> Result<Answer, LedgerError> {
        if let Some(before) = self.done_before(tasks, request)? {
            return Ok(Answer::Each(before));
        }
        let agent = how.agent.as_ref().map(|name| self.agent_at_work(name)).transpose()?;
        let data = match agent {
            Some(agent) => self.keys_of(tasks, agent).await?,
            None => HashMap::new(),
        };
        let first = how.start.map_or(self.now.at, |start| self.now.from_wall(start).max(self.now.at));
        let mut results = Each::with_capacity(tasks.len());
        let mut place = 0;
        for id in tasks {
            let run_at = Some(first.after(how.gap.saturating_mul(place)));
            let mut event = Redrive {
                deadline: how.deadline,
                run_at,
                priority: how.priority,
                payload: how.payload.is_some(),
                note: Arc::clone(&how.note),
                ..Redrive::default()
            };
            let result = match self.new_spec(*id, agent, &data) {
                Ok(spec) => {
                    event.spec = spec;
                    self.put_back(*id, event, how.payload.as_ref(), data.get(id))
                }
                Err(error) => Err(error),
            };
            // Only those that are put back take a place in the row.
            place += u32::from(result.is_ok());
            results.push((*id, result));
        }
        self.remember_each(request, &results);
        Ok(Answer::Each(results))
    }

    pub(super) async fn discard(
        &mut self,
        tasks: &[TaskId],
        note: &Arc<str>,
        request: Option<&RequestKey>,
    ) -> Result<Answer, LedgerError> {
        if let Some(before) = self.done_before(tasks, request)? {
            return Ok(Answer::Each(before));
        }
        let event = Event::Discard { note: Arc::clone(note) };
        let results: Each =
            tasks.iter().map(|task| (*task, self.apply(*task, &event, 0).map(drop))).collect();
        for task in tasks {
            if self.open.get(task).is_some_and(|open| open.task.discarded)
                && let Some(mut letter) = self.reader.dead_letter(*task).await.map_err(LedgerError::Store)?
                && letter.discarded.is_none()
            {
                letter.discarded = Some((self.now.at, Arc::clone(note)));
                self.changes.dead_letters.push(letter);
            }
        }
        self.remember_each(request, &results);
        Ok(Answer::Each(results))
    }

    /// The answer to an earlier call with this request id.
    fn done_before(
        &self,
        tasks: &[TaskId],
        request: Option<&RequestKey>,
    ) -> Result<Option<Each>, LedgerError> {
        let Some(answer) = self.remembered(request)? else { return Ok(None) };
        let number =
            |bytes: &[u8]| bytes.try_into().map_or(TaskId(0), |bytes| TaskId(u64::from_be_bytes(bytes)));
        let recorded: Vec<TaskId> = answer.chunks_exact(8).map(number).collect();
        // Older answers name no tasks: theirs were always those of the call.
        let done = if recorded.is_empty() { tasks.to_vec() } else { recorded };
        Ok(Some(done.into_iter().map(|task| (task, Ok(()))).collect()))
    }

    /// A call that was refused in part may be repeated for the rest.
    fn remember_each(&mut self, request: Option<&RequestKey>, results: &Each) {
        if results.iter().all(|(_, result)| result.is_ok()) {
            let ids: Vec<u8> = results.iter().flat_map(|(task, _)| task.0.to_be_bytes()).collect();
            self.remember(request, Bytes::from(ids));
        }
    }

    /// Keys and digests of these tasks, and who holds their keys at their agent and at `agent`.
    async fn keys_of(
        &mut self,
        tasks: &[TaskId],
        agent: AgentId,
    ) -> Result<HashMap<TaskId, Arc<TaskData>>, LedgerError> {
        let known: Vec<(TaskId, bool)> =
            tasks.iter().filter(|id| self.open.contains_key(id)).map(|id| (*id, false)).collect();
        let found = self.reader.for_workers(&known).await.map_err(LedgerError::Store)?;
        let data: HashMap<_, _> =
            known.into_iter().zip(found).map(|((id, _), (data, _))| (id, data)).collect();
        let mut want = Want::default();
        for (id, data) in data.iter().filter(|(_, data)| !data.key.is_empty()) {
            let key = Arc::clone(&data.key);
            let before = self.open.get(id).map(|open| open.task.spec.agent);
            want.keys.extend(before.into_iter().chain([agent]).map(|of| (of, Arc::clone(&key))));
        }
        let holders = self.store.begin(&want, self.now).await.map_err(LedgerError::Store)?.keys;
        // The store has not heard yet of what this batch removes.
        let stays = |holder: &KeyHolder| !self.changes.removed.contains(&holder.task);
        for (place, holder) in holders.into_iter().filter(|(_, holder)| stays(holder)) {
            self.known.keys.entry(place).or_insert(holder);
        }
        Ok(data)
    }

    /// What a task is when it belongs to `agent`; none where that is so already.
    fn new_spec(
        &self,
        id: TaskId,
        agent: Option<AgentId>,
        data: &HashMap<TaskId, Arc<TaskData>>,
    ) -> Result<Option<Arc<Spec>>, LedgerError> {
        let Some(task) = self.open.get(&id).map(|open| &open.task) else { return Ok(None) };
        let Some(agent) = agent.filter(|agent| *agent != task.spec.agent) else { return Ok(None) };
        if task.state != State::Failed {
            return Err(LedgerError::Refused(Refusal::WrongState(task.state)));
        }
        let key = data.get(&id).map(|data| &*data.key).filter(|key| !key.is_empty());
        if let Some(key) = key
            && self.holds_key(id, task.spec.agent, key)
            && let Some(other) = self.known.keys.get(&(agent, key.into()))
        {
            return Err(LedgerError::KeyConflict(other.task));
        }
        Ok(Some(Arc::new(Spec { agent, ..(*task.spec).clone() })))
    }

    fn holds_key(&self, id: TaskId, agent: AgentId, key: &str) -> bool {
        self.known.keys.get(&(agent, key.into())).is_some_and(|holder| holder.task == id)
    }

    fn put_back(
        &mut self,
        id: TaskId,
        event: Redrive,
        payload: Option<&Bytes>,
        data: Option<&Arc<TaskData>>,
    ) -> Result<(), LedgerError> {
        let before = self.open.get(&id).map(|open| open.task.spec.agent);
        let to = event.spec.as_ref().map(|spec| spec.agent);
        self.apply(id, &Event::Redrive(Box::new(event)), 0)?;
        let Some(before) = before else { return Ok(()) };
        if to.is_none() && payload.is_none() {
            return Ok(());
        }
        self.changes.respecified.push((id, before, payload.cloned()));
        if let Some(to) = to {
            let queued = usize::from(State::Queued.code());
            if let Some(agent) = self.memory.agents.get_mut(&before) {
                agent.counts[queued] = agent.counts[queued].saturating_sub(1);
            }
            if let Some(agent) = self.memory.agents.get_mut(&to) {
                agent.counts[queued] += 1;
            }
            let key = data.map(|data| &*data.key).filter(|key| !key.is_empty());
            if let Some(key) = key.filter(|key| self.holds_key(id, before, key)) {
                let digest = data.map_or(0, |data| data.digest);
                self.known.keys.remove(&(before, key.into()));
                self.known.keys.insert((to, key.into()), KeyHolder { task: id, digest });
            }
        }
        Ok(())
    }
}
