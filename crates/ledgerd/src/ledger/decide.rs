//! What each command does. In order, one after the other; the store is asked only for what no list could name ahead.

use super::batch::{Batch, recorded};
use super::command::{
    Answer, BatchMode, Command, Enqueued, FromWorker, HeldTask, LeaseVerdict, LedgerError, NewTask, Receipt, Recorded,
    RequestKey, Settlement, ToWorker, Verdict,
};
use super::memory::{Memory, Worker};
use super::timers::Beaten;
use bytes::Bytes;
use ledger_core::agent::Agent;
use ledger_core::session::{Hello, Session, Unsent};
use ledger_core::store::{KeyHolder, Notes, ProgressNote, RequestRow, Want};
use ledger_core::{
    AgentId, Caller, Event, Holder, Now, Outcome, Refusal, ReleaseCause, SessionId, Settings, Spec, State, Task, TaskId,
};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Adds what `command` names to what is read for the batch.
pub(super) fn want(command: &Command, memory: &Memory, want: &mut Want) {
    let mut request = |key: &Option<RequestKey>| want.requests.extend(key.iter().map(|key| Arc::clone(&key.id)));
    match command {
        Command::Enqueue { tasks, request: key, .. } => {
            request(key);
            for task in tasks.iter().flatten().filter(|task| !task.data.key.is_empty()) {
                if let Some(agent) = memory.names.get(&task.agent) {
                    want.keys.push((*agent, task.data.key.as_str().into()));
                }
            }
        }
        Command::Cancel { task, request: key, .. } => {
            request(key);
            want.tasks.push(*task);
        }
        Command::Hello(hello, ..) => {
            want.tasks.extend(hello.held.iter().chain(&hello.unreceipted).map(|(task, _)| *task));
            if let Some(worker) = memory.workers.get(&hello.worker) {
                want.tasks.extend(&worker.tasks);
            }
        }
        Command::Frame(session, frame) => match frame {
            FromWorker::Acks(items) => want.tasks.extend(items.iter().map(|(task, _)| *task)),
            FromWorker::Beat(held, _) => want.tasks.extend(held.iter().map(|held| held.task)),
            FromWorker::Outcomes(items) => want.tasks.extend(items.iter().map(|item| item.task)),
            FromWorker::Goodbye => {
                let worker = memory.sessions.get(session).and_then(|s| memory.workers.get(&s.worker));
                want.tasks.extend(worker.into_iter().flat_map(|worker| &worker.tasks));
            }
            FromWorker::Capacity(_) | FromWorker::Closed => {}
        },
        Command::Settle(_, items) => want.tasks.extend(items.iter().map(|item| item.task)),
        Command::Redrive { tasks, request: key, .. } | Command::Discard { tasks, request: key, .. } => {
            request(key);
            want.tasks.extend(tasks);
        }
        _ => {}
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
                if self.remembered(request.as_ref())?.is_none() {
                    self.apply(*task, &Event::Cancel { note: Arc::clone(note) }, 0)?;
                    self.remember(request.as_ref(), Bytes::new());
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
            Command::Configure(name, change) => {
                // Judged before the agent is made, so that a refused call leaves no agent behind.
                let known = self.memory.names.get(name).and_then(|id| self.memory.agents.get(id));
                let given = known.map(|agent| agent.settings.given).unwrap_or_default();
                Settings::of(change.or(given)).map_err(LedgerError::Invalid)?;
                let id = self.agent(name)?;
                let now = self.now;
                if let Some(agent) = self.memory.agents.get_mut(&id) {
                    agent.configure(**change, now).map_err(LedgerError::Invalid)?;
                    if !agent.settings.breaker_enabled {
                        self.ungate.insert(id);
                    }
                }
                self.configured.insert(id);
                self.breaker_changed(id);
                self.budget_changed(id);
                Ok(Answer::Done)
            }
            Command::ResetBreaker(name) => {
                let id = *self.memory.names.get(name).ok_or_else(|| LedgerError::UnknownAgent(Arc::clone(name)))?;
                let now = self.now.at.since_epoch();
                if let Some(agent) = self.memory.agents.get_mut(&id) {
                    agent.breaker.reset(now);
                    agent.last_probe = None;
                }
                self.breaker_changed(id);
                self.ungate.insert(id);
                Ok(Answer::Done)
            }
            Command::Redrive { tasks, deadline, request } => {
                let event = Event::Redrive { deadline: *deadline, note: "".into() };
                self.each(tasks, request.as_ref(), &event)
            }
            Command::Discard { tasks, note, request } => {
                let event = Event::Discard { note: Arc::clone(note) };
                let answer = self.each(tasks, request.as_ref(), &event)?;
                self.mark_discarded(tasks, note).await?;
                Ok(answer)
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
        }
    }

    // --- producers ---

    async fn enqueue(
        &mut self,
        tasks: &[Result<NewTask, LedgerError>],
        mode: BatchMode,
    ) -> Result<Vec<Enqueued>, LedgerError> {
        let mut admitted: HashMap<AgentId, u64> = HashMap::new();
        let mut plans = Vec::with_capacity(tasks.len());
        let mut created: HashMap<(AgentId, Arc<str>), (usize, u64)> = HashMap::new();
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
        created: &mut HashMap<(AgentId, Arc<str>), (usize, u64)>,
        admitted: &mut HashMap<AgentId, u64>,
    ) -> Result<Plan, LedgerError> {
        let agent = self.agent(&task.agent)?;
        let key: Option<Arc<str>> = (!task.data.key.is_empty()).then(|| task.data.key.as_str().into());
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
        let (made, record) =
            Task::enqueue(id, Arc::new(spec), task.priority, task.run_at, task.deadline, self.now);
        if !task.data.key.is_empty() {
            let holder = KeyHolder { task: id, digest: task.data.digest };
            self.known.keys.insert((agent, task.data.key.as_str().into()), holder);
        }
        self.changes.data.push((id, Arc::clone(&task.data)));
        self.create(made, record);
    }

    /// The agent of that name, made if it is new.
    fn agent(&mut self, name: &Arc<str>) -> Result<AgentId, LedgerError> {
        if let Some(id) = self.memory.names.get(name) {
            return Ok(*id);
        }
        if self.memory.agents.len() >= ledger_core::limits::AGENTS {
            return Err(LedgerError::Exhausted {
                what: "the table of agents (10,000)",
                retry_after: Duration::from_secs(3_600),
            });
        }
        let id = AgentId(self.memory.agents.last_key_value().map_or(1, |(last, _)| last.0 + 1));
        self.memory.agents.insert(id, Agent::new(id, Arc::clone(name), self.now));
        self.memory.names.insert(Arc::clone(name), id);
        self.said.new_agents.push((Arc::clone(name), id));
        self.configured.insert(id);
        Ok(id)
    }

    fn remembered(&self, request: Option<&RequestKey>) -> Result<Option<Bytes>, LedgerError> {
        match request.and_then(|request| Some((request, self.known.requests.get(&request.id)?))) {
            Some((request, row)) if row.digest == request.digest => Ok(Some(row.answer.clone())),
            Some(_) => Err(LedgerError::RequestConflict),
            None => Ok(None),
        }
    }

    fn remember(&mut self, request: Option<&RequestKey>, answer: Bytes) {
        if let Some(request) = request {
            let row =
                RequestRow { id: Arc::clone(&request.id), digest: request.digest, answer, at: self.now.at };
            self.known.requests.insert(Arc::clone(&request.id), row.clone());
            self.changes.requests.push(row);
        }
    }

    // --- operators ---

    fn each(
        &mut self,
        tasks: &[TaskId],
        request: Option<&RequestKey>,
        event: &Event,
    ) -> Result<Answer, LedgerError> {
        if self.remembered(request)?.is_some() {
            return Ok(Answer::Each(tasks.iter().map(|_| Ok(())).collect()));
        }
        let results: Vec<_> = tasks.iter().map(|task| self.apply(*task, event, 0).map(drop)).collect();
        // A call that was refused in part may be repeated for the rest.
        if results.iter().all(Result::is_ok) {
            self.remember(request, Bytes::new());
        }
        Ok(Answer::Each(results))
    }

    async fn mark_discarded(&mut self, tasks: &[TaskId], note: &Arc<str>) -> Result<(), LedgerError> {
        for task in tasks {
            if self.open.get(task).is_some_and(|open| open.task.discarded)
                && let Some(mut letter) = self.reader.dead_letter(*task).await.map_err(LedgerError::Store)?
                && letter.discarded.is_none()
            {
                letter.discarded = Some((self.now.at, Arc::clone(note)));
                self.changes.dead_letters.push(letter);
            }
        }
        Ok(())
    }

    // --- workers ---

    fn hello(
        &mut self,
        hello: &Hello,
        unsent: &Unsent,
        outbox: &mpsc::UnboundedSender<ToWorker>,
    ) -> Result<Answer, LedgerError> {
        if self.memory.draining {
            return Err(LedgerError::Draining);
        }
        let mut agents = Vec::with_capacity(hello.agents.len());
        for name in &hello.agents {
            let id = self.agent(name)?;
            if !agents.contains(&id) {
                agents.push(id);
            }
        }
        let intervals = self.intervals(&agents);
        self.take_over(hello, intervals[0])?;
        self.memory.last_session += 1;
        let id = SessionId(self.memory.last_session);
        let now = self.now.at;
        let session = Session {
            id,
            worker: Arc::clone(&hello.worker),
            incarnation: hello.incarnation,
            agents,
            types: hello.types.clone(),
            capacity: hello.capacity,
            labels: hello.labels.clone(),
            sdk: hello.sdk.clone(),
            connected_at: now,
            beat_at: now,
            held: HashSet::new(),
            unacked_run: 0,
            cursor: 0,
            unsent: unsent.clone(),
        };
        self.memory.sessions.insert(id, session);
        self.memory.outboxes.insert(id, outbox.clone());
        let worker = self.memory.workers.entry(Arc::clone(&hello.worker)).or_insert_with(|| Worker {
            incarnation: hello.incarnation,
            session: None,
            beat_at: now,
            tasks: HashSet::new(),
        });
        worker.incarnation = hello.incarnation;
        worker.session = Some(id);
        worker.beat_at = now;
        self.beaten_sessions.insert(id);
        let named: HashSet<TaskId> = hello.held.iter().chain(&hello.unreceipted).map(|(task, _)| *task).collect();
        self.take_back(&hello.worker, |task| !named.contains(&task));
        let caller = Caller { worker: Arc::clone(&hello.worker), session: Some(id) };
        let verdicts =
            hello.held.iter().map(|(task, fence)| self.beat_one(&caller, *task, *fence, None, None)).collect();
        Ok(Answer::Opened(id, verdicts, intervals))
    }

    /// Ends whatever stands in the way of a Hello, or refuses it.
    fn take_over(&mut self, hello: &Hello, beat: Duration) -> Result<(), LedgerError> {
        let Some(worker) = self.memory.workers.get(&hello.worker) else { return Ok(()) };
        let (incarnation, session, beat_at) = (worker.incarnation, worker.session, worker.beat_at);
        if hello.incarnation < incarnation {
            return Err(LedgerError::WorkerSuperseded(Arc::clone(&hello.worker)));
        }
        let fresh = self.now.at.since(beat_at) < beat * 2;
        if hello.incarnation > incarnation {
            if session.is_some() && fresh {
                return Err(LedgerError::WorkerIdInUse(Arc::clone(&hello.worker)));
            }
            // The old process is gone, and with it all it held.
            self.take_back(&hello.worker, |_| true);
        }
        if let Some(session) = session {
            let error = LedgerError::WorkerSuperseded(Arc::clone(&hello.worker));
            self.close(session, Some(error));
        }
        Ok(())
    }

    /// Takes back what a worker holds no more. All of it is one sample for each agent's breaker.
    fn take_back(&mut self, worker: &Arc<str>, gone: impl Fn(TaskId) -> bool) {
        let held = self.memory.workers.get(worker).map(|worker| worker.tasks.clone()).unwrap_or_default();
        let mut sampled: HashSet<AgentId> = HashSet::new();
        let mut held: Vec<_> = held.into_iter().filter(|task| gone(*task)).collect();
        held.sort();
        for task in held {
            let Some(open) = self.open.get(&task) else { continue };
            let (agent, acked) = (open.task.spec.agent, open.task.acked());
            let event = Event::TakenBack { sampled: sampled.contains(&agent) };
            if self.apply(task, &event, 0).is_ok() && acked {
                sampled.insert(agent);
            }
        }
    }

    /// Beat, idle and ack-delay intervals for a worker of these agents.
    fn intervals(&self, agents: &[AgentId]) -> [Duration; 3] {
        let settings = || agents.iter().filter_map(|id| self.memory.agents.get(id)).map(|agent| &agent.settings);
        let lease = settings().map(|s| s.lease_duration).min().unwrap_or(Duration::from_secs(60));
        let ack = settings().map(|s| s.ack_timeout).min().unwrap_or(Duration::from_secs(10));
        [lease / 3, (lease / 4).min(Duration::from_secs(15)), ack / 10]
    }

    async fn frame(&mut self, id: SessionId, frame: &FromWorker) -> Result<(), LedgerError> {
        // A frame of a stream that was superseded: its worker says it again on the new one.
        let Some(session) = self.memory.sessions.get_mut(&id) else { return Ok(()) };
        let caller = Caller { worker: Arc::clone(&session.worker), session: Some(id) };
        match frame {
            FromWorker::Capacity(capacity) => session.capacity = *capacity,
            FromWorker::Acks(items) => {
                session.unacked_run = 0;
                for (task, fence) in items {
                    let event = Event::Ack(caller.clone(), *fence);
                    let result = self.apply(*task, &event, 0).map(|_| self.recorded_now(*task));
                    self.receipt(id, Receipt { task: *task, fence: *fence, is_ack: true, result });
                }
            }
            FromWorker::Beat(held, sequence) => self.beat(id, &caller, held, *sequence),
            FromWorker::Outcomes(items) => {
                session.unacked_run = 0;
                for item in items {
                    let receipt = self.settle(&caller, item).await?;
                    self.receipt(id, receipt);
                }
            }
            FromWorker::Goodbye => {
                let worker = self.memory.workers.get(&caller.worker);
                let mut held: Vec<_> = worker.map(|w| w.tasks.iter().copied().collect()).unwrap_or_default();
                held.sort();
                for task in held {
                    let Some(fence) = self.open.get(&task).map(|open| open.task.fence) else { continue };
                    let outcome = Outcome::Release { cause: ReleaseCause::Drain, delay: Duration::ZERO };
                    let _ = self.apply(task, &Event::Settle(caller.clone(), fence, outcome), 0);
                }
                self.close(id, None);
            }
            FromWorker::Closed => self.close(id, None),
        }
        Ok(())
    }

    fn beat(&mut self, id: SessionId, caller: &Caller, held: &[HeldTask], sequence: u64) {
        let now = self.now.at;
        let verdicts = held
            .iter()
            .map(|held| {
                self.beat_one(caller, held.task, held.fence, held.progress.as_ref(), held.checkpoint.as_ref())
            })
            .collect();
        if let Some(worker) = self.memory.workers.get_mut(&caller.worker) {
            worker.beat_at = now;
            let named: HashSet<TaskId> = held.iter().map(|held| held.task).collect();
            if let Some(session) = self.memory.sessions.get_mut(&id) {
                session.beat_at = now;
                // What was lost and is omitted takes no room any more.
                session.held.retain(|task| named.contains(task) || worker.tasks.contains(task));
            }
        }
        self.beaten_sessions.insert(id);
        self.said.frames.push((id, ToWorker::HeartbeatAck(verdicts, sequence)));
    }

    fn beat_one(
        &mut self,
        caller: &Caller,
        task: TaskId,
        fence: u64,
        progress: Option<&(f64, String)>,
        checkpoint: Option<&Bytes>,
    ) -> LeaseVerdict {
        let verdict = match self.apply(task, &Event::Beat(caller.clone(), fence), 0) {
            Err(_) => Verdict::Lost,
            Ok(_) => self.extend(task, progress.is_some()),
        };
        if verdict != Verdict::Lost && (progress.is_some() || checkpoint.is_some()) {
            let at = self.now.at;
            let progress =
                progress.map(|(fraction, note)| ProgressNote { fraction: *fraction, note: note.clone(), at });
            let notes = Notes { progress, checkpoint: checkpoint.cloned(), ..Notes::default() };
            self.changes.notes.push((task, notes));
        }
        LeaseVerdict { task, fence, verdict }
    }

    /// Moves the soft end of a lease; no row is written for it.
    fn extend(&mut self, id: TaskId, progressed: bool) -> Verdict {
        let Some(open) = self.open.get(&id) else { return Verdict::Lost };
        let (task, now) = (&open.task, self.now.at);
        let Some(lease) = task.lease else { return Verdict::Lost };
        let before = self.memory.beaten.get(&id).copied();
        let progress_at =
            if progressed { now } else { before.map_or(lease.progress_at, |before| before.progress_at) };
        self.memory.beaten.insert(id, Beaten { until: lease.until, progress_at });
        match task.stop {
            Some(stop) => Verdict::Stop(stop, stop.until.since(now)),
            None => Verdict::Extended,
        }
    }

    /// Records an outcome, or finds the receipt it was given before.
    async fn settle(&mut self, caller: &Caller, item: &Settlement) -> Result<Receipt, LedgerError> {
        let event = Event::Settle(caller.clone(), item.fence, item.outcome.clone());
        let applied = match self.outcome_time(item) {
            Ok(()) => self.apply(item.task, &event, item.digest),
            Err(error) => Err(error),
        };
        let result = match applied {
            Ok(_) => {
                if let Some(result) = item.result.as_ref().filter(|_| item.outcome == Outcome::Complete) {
                    self.changes.results.push((item.task, result.clone()));
                }
                if let Some(checkpoint) = &item.checkpoint {
                    let notes = Notes { checkpoint: Some(checkpoint.clone()), ..Notes::default() };
                    self.changes.notes.push((item.task, notes));
                }
                let record = self.changes.history.iter().rev().find(|r| r.task == item.task && r.digest.is_some());
                Ok(record.map_or_else(|| self.recorded_now(item.task), recorded))
            }
            Err(LedgerError::Refused(refusal @ (Refusal::LeaseLost | Refusal::TaskTerminal))) => {
                match self.settlement(item.task, item.fence).await? {
                    Some(record) => Self::replay(&record, &caller.worker, item.digest),
                    None => {
                        if let Some(result) = &item.result {
                            self.changes.salvage.push((item.task, item.fence, result.clone()));
                        }
                        Err(LedgerError::Refused(refusal))
                    }
                }
            }
            Err(error) => Err(error),
        };
        Ok(Receipt { task: item.task, fence: item.fence, is_ack: false, result })
    }

    /// A block must end at least a second ahead, seen from where its time is decided.
    fn outcome_time(&self, item: &Settlement) -> Result<(), LedgerError> {
        match &item.outcome {
            Outcome::Block { until: Some(until), .. } if until.since(self.now.wall()) < Duration::from_secs(1) => {
                Err(LedgerError::Invalid(vec![ledger_core::Violation::new(
                    "block.until",
                    "set it to at least 1 s ahead",
                )]))
            }
            _ => Ok(()),
        }
    }

    fn recorded_now(&self, id: TaskId) -> Recorded {
        match self.open.get(&id) {
            Some(open) => Recorded {
                state: open.task.state,
                reason: open.task.reason,
                version: open.task.version,
                run_at: None,
            },
            None => Recorded { state: State::Queued, reason: ledger_core::Reason::None, version: 0, run_at: None },
        }
    }

    fn receipt(&mut self, session: SessionId, receipt: Receipt) {
        self.said.receipts.entry(session).or_default().push(receipt);
    }

    /// Forgets a stream. Leases go on.
    pub(super) fn close(&mut self, id: SessionId, error: Option<LedgerError>) {
        self.changes.sessions.extend(self.memory.session_row(id, false));
        self.beaten_sessions.remove(&id);
        if let Some(session) = self.memory.sessions.remove(&id)
            && let Some(worker) = self.memory.workers.get_mut(&session.worker)
            && worker.session == Some(id)
        {
            worker.session = None;
        }
        if let Some(error) = error {
            self.said.frames.push((id, ToWorker::End(error)));
        }
        self.said.closed.push(id);
    }
}

/// What is to be done for one new task.
enum Plan {
    Create(AgentId),
    /// Its key belongs to this task.
    Same(TaskId),
    /// Its key belongs to an earlier item of the same call.
    SameAs(usize),
}

/// Makes a holder for a claim.
pub(super) fn holder(session: &Session) -> Holder {
    Holder { worker: Arc::clone(&session.worker), incarnation: session.incarnation, session: session.id }
}

/// An answer as it is remembered: for each item one byte and its number. Runs of new tasks are what bulk calls make,
/// so a run is one entry: `r`, first, length.
fn encode(items: &[Enqueued]) -> Bytes {
    let mut out = Vec::new();
    let mut at = 0;
    while at < items.len() {
        match &items[at] {
            Enqueued::Created(first) => {
                let run = items[at..]
                    .iter()
                    .enumerate()
                    .take_while(|(n, item)| matches!(item, Enqueued::Created(id) if id.0 == first.0 + *n as u64))
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

fn decode(answer: &[u8], tasks: &[Result<NewTask, LedgerError>]) -> Vec<Enqueued> {
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

/// Whether the wall clock was set since the last look: times that users named are armed anew then.
pub(super) fn clock_was_set(memory: &Memory, now: Now) -> bool {
    memory.skew != now.skew
}
