//! What workers say: Hello, acks, beats, outcomes, Goodbye, and the end of a stream, which means nothing.

use super::batch::{Batch, recorded};
use super::command::{
    Answer, FromWorker, HeldTask, LeaseVerdict, LedgerError, Receipt, Recorded, Settlement, ToWorker, Verdict,
};
use super::memory::Worker;
use super::timers::Beaten;
use bytes::Bytes;
use ledger_core::session::{Hello, Session, Unsent};
use ledger_core::store::{Notes, ProgressNote};
use ledger_core::{
    AgentId, Caller, Event, Fact, Holder, LostWith, Outcome, Refusal, ReleaseCause, SessionId, State, TaskId,
    TaskSet,
};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

impl Batch<'_> {
    pub(super) fn hello(
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
            let id = self.agent_at_work(name)?;
            if !agents.contains(&id) {
                agents.push(id);
            }
        }
        let intervals = self.intervals(&agents);
        let elsewhere = self.meet(&hello.worker);
        self.take_over(hello, intervals[0], elsewhere)?;
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
            held: TaskSet::default(),
            unacked_run: 0,
            cursor: 0,
            unsent: unsent.clone(),
        };
        self.memory.sessions.insert(id, session);
        self.memory.outboxes.insert(id, outbox.clone());
        self.opened.push(id);
        let worker = self.memory.workers.entry(Arc::clone(&hello.worker)).or_insert_with(|| Worker {
            incarnation: hello.incarnation,
            session: None,
            beat_at: now,
            tasks: TaskSet::default(),
        });
        worker.incarnation = hello.incarnation;
        worker.session = Some(id);
        worker.beat_at = now;
        self.beaten_sessions.insert(id);
        // A lease that is not the task's newest is another one: what this worker was given since, and does not name, it never got.
        let newest = |(task, fence): &(TaskId, u64)| {
            self.open.get(task).is_none_or(|open| open.task.fence == *fence).then_some(*task)
        };
        let named: TaskSet = hello.held.iter().chain(&hello.unreceipted).filter_map(newest).collect();
        self.take_back(&hello.worker, |task| !named.contains(&task));
        let caller = Caller { worker: Arc::clone(&hello.worker), session: Some(id) };
        let verdicts: Vec<_> = hello
            .held
            .iter()
            .map(|(task, fence)| self.beat_one(&caller, *task, *fence, None, None))
            .collect();
        if let Some(session) = self.memory.sessions.get_mut(&id) {
            // What it brings takes room as what it is sent does.
            let goes_on = |one: &&LeaseVerdict| one.verdict != Verdict::Lost;
            session.held.extend(verdicts.iter().filter(goes_on).map(|one| one.task));
        }
        for (task, fence) in &hello.unreceipted {
            self.bring(&caller, *task, *fence);
        }
        Ok(Answer::Opened(id, verdicts, intervals))
    }

    /// Learns of a worker's last session from the store. Whether another daemon has it open.
    fn meet(&mut self, worker: &Arc<str>) -> bool {
        let Some(row) = self.known.sessions.get(worker).cloned() else { return false };
        let session = self.memory.workers.get(worker).and_then(|worker| worker.session);
        if session.is_some_and(|session| self.opened.contains(&session)) {
            // It said Hello twice in this batch: memory is newer.
            return false;
        }
        self.memory.meet(&row);
        self.memory.is_open_elsewhere(&row)
    }

    /// A task that its worker held, or has ended, on a stream of another daemon is this one's to watch over now.
    fn bring(&mut self, caller: &Caller, id: TaskId, fence: u64) {
        let (slot, Some(session)) = (self.memory.replicas.slot, caller.session) else { return };
        let comes = |task: &ledger_core::Task| {
            let holder = task.holder.as_ref().filter(|holder| holder.worker == caller.worker);
            task.state == State::Running
                && task.fence == fence
                && holder.is_some_and(|holder| holder.session.slot() != slot)
        };
        let Some(open) = self.open.get_mut(&id).filter(|open| comes(&open.task)) else { return };
        if let Some(holder) = &mut Arc::make_mut(&mut open.task).holder {
            holder.session = session;
        }
        let task = Arc::clone(&open.task);
        self.memory.hold(&task);
        self.touch(id);
    }

    /// Ends whatever stands in the way of a Hello, or refuses it.
    fn take_over(&mut self, hello: &Hello, beat: Duration, elsewhere: bool) -> Result<(), LedgerError> {
        let Some(worker) = self.memory.workers.get(&hello.worker) else { return Ok(()) };
        let (incarnation, session, beat_at) = (worker.incarnation, worker.session, worker.beat_at);
        if hello.incarnation < incarnation {
            return Err(LedgerError::WorkerSuperseded(Arc::clone(&hello.worker)));
        }
        let fresh = self.now.at.since(beat_at) < beat * 2;
        if hello.incarnation > incarnation {
            if (session.is_some() || elsewhere) && fresh {
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

    /// Takes back what a worker holds no more. All of it is one sample for each breaker.
    pub(super) fn take_back(&mut self, worker: &Arc<str>, gone: impl Fn(TaskId) -> bool) {
        let held = self.memory.workers.get(worker).map(|worker| worker.tasks.clone()).unwrap_or_default();
        let mut sampled: HashSet<(AgentId, Arc<str>)> = HashSet::new();
        let mut held: Vec<_> = held.into_iter().filter(|task| gone(*task)).collect();
        held.sort();
        let acked = |task: &&TaskId| self.open.get(task).is_some_and(|open| open.task.acked());
        let tasks = held.iter().filter(acked).count() as u32;
        self.lost_with = LostWith { tasks, sampled: false };
        for task in held {
            let Some(open) = self.open.get(&task) else { continue };
            if open.task.holder.as_ref().is_none_or(|holder| holder.worker != *worker)
                || self.memory.is_elsewhere(&open.task)
            {
                // Another daemon knows more of it than this one's memory.
                continue;
            }
            let (id, acked) = (open.task.spec.agent, open.task.acked());
            let Some(agent) = self.memory.agents.get(&id) else { continue };
            let breaker = (id, agent.breakers.key(&open.task.spec.task_type));
            let event = Event::TakenBack { sampled: sampled.contains(&breaker) };
            self.counted_failure = false;
            // One that counted for nothing, for it was to stop or of another time, stands for no other.
            if self.apply(task, &event, 0).is_ok() && acked && self.counted_failure {
                sampled.insert(breaker);
            }
        }
        self.lost_with = LostWith::ALONE;
    }

    /// Beat, idle and ack-delay intervals for a worker of these agents.
    fn intervals(&self, agents: &[AgentId]) -> [Duration; 3] {
        let settings =
            || agents.iter().filter_map(|id| self.memory.agents.get(id)).map(|agent| &agent.settings);
        let lease = settings().map(|s| s.lease_duration).min().unwrap_or(Duration::from_secs(60));
        let ack = settings().map(|s| s.ack_timeout).min().unwrap_or(Duration::from_secs(10));
        [lease / 3, (lease / 4).min(Duration::from_secs(15)), ack / 10]
    }

    pub(super) async fn frame(&mut self, id: SessionId, frame: &FromWorker) -> Result<(), LedgerError> {
        // A frame of a stream that was superseded: its worker says it again on the new one.
        let Some(session) = self.memory.sessions.get_mut(&id) else { return Ok(()) };
        // One without any says only that there is room again.
        let answers = match frame {
            FromWorker::Acks(items) => !items.is_empty(),
            FromWorker::Outcomes(items) => !items.is_empty(),
            _ => false,
        };
        if answers {
            session.unacked_run = 0;
        }
        let caller = Caller { worker: Arc::clone(&session.worker), session: Some(id) };
        match frame {
            FromWorker::Capacity(capacity) => session.capacity = *capacity,
            FromWorker::Acks(items) => {
                for (task, fence) in items {
                    let event = Event::Ack(caller.clone(), *fence);
                    let result = self.apply(*task, &event, 0).map(|_| self.recorded_now(*task));
                    self.receipt(id, Receipt { task: *task, fence: *fence, is_ack: true, result });
                }
            }
            FromWorker::Beat(held, sequence) => self.beat(id, &caller, held, *sequence),
            FromWorker::Outcomes(items) => {
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
            let named: TaskSet = held.iter().map(|held| held.task).collect();
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
        self.bring(caller, task, fence);
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
        // Before the ack the lease is the time for that, which may be the longer one: it must not outlast the ack.
        if lease.acked_at.is_some() {
            self.memory.beaten.insert(id, Beaten { until: lease.until, progress_at });
        }
        match task.stop {
            Some(stop) => Verdict::Stop(stop, stop.until.since(now)),
            None => Verdict::Extended,
        }
    }

    /// Records an outcome, or finds the receipt it was given before.
    pub(super) async fn settle(
        &mut self,
        caller: &Caller,
        item: &Settlement,
    ) -> Result<Receipt, LedgerError> {
        let event = Event::Settle(caller.clone(), item.fence, item.outcome.clone());
        let possible = self.outcome_time(item).and_then(|()| self.admits_follow_ups(&item.follow_ups));
        let is_possible = possible.is_ok();
        let applied = match possible {
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
                if !item.follow_ups.is_empty() {
                    let ids: Vec<_> =
                        self.follow(&item.follow_ups).await?.iter().map(TaskId::to_string).collect();
                    self.add_fact(item.task, Fact::FollowUps, &ids.join(" ").into());
                }
                let record =
                    self.changes.history.iter().rev().find(|r| r.task == item.task && r.digest.is_some());
                Ok(record.map_or_else(|| self.recorded_now(item.task), recorded))
            }
            Err(error) => {
                let is_late =
                    matches!(error, LedgerError::Refused(Refusal::LeaseLost | Refusal::TaskTerminal));
                // What could not be recorded now may have been when it first came.
                match is_late || !is_possible {
                    true => match self.settlement(item.task, item.fence).await? {
                        Some(record) => Self::replay(&record, &caller.worker, item.digest),
                        None => {
                            if let Some(result) = item.result.as_ref().filter(|_| is_late) {
                                self.changes.salvage.push((item.task, item.fence, result.clone()));
                            }
                            Err(error)
                        }
                    },
                    false => Err(error),
                }
            }
        };
        Ok(Receipt { task: item.task, fence: item.fence, is_ack: false, result })
    }

    /// A block must end at least a second ahead, seen from where its time is decided.
    fn outcome_time(&self, item: &Settlement) -> Result<(), LedgerError> {
        match &item.outcome {
            Outcome::Block { until: Some(until), .. }
                if until.since(self.now.wall()) < Duration::from_secs(1) =>
            {
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
                follow_ups: Vec::new(),
            },
            None => Recorded {
                state: State::Queued,
                reason: ledger_core::Reason::None,
                version: 0,
                run_at: None,
                follow_ups: Vec::new(),
            },
        }
    }

    fn receipt(&mut self, session: SessionId, receipt: Receipt) {
        self.said.receipts.entry(session).or_default().push(receipt);
    }

    /// Forgets a stream. Leases go on.
    pub(super) fn close(&mut self, id: SessionId, error: Option<LedgerError>) {
        self.changes.sessions.extend(self.memory.session_row(id, false));
        self.beaten_sessions.remove(&id);
        if let Some(session) = self.memory.sessions.remove(&id) {
            self.shut.push(session.clone());
            for agent in &session.agents {
                self.memory.last_seen.insert(*agent, (Arc::clone(&session.worker), session.beat_at));
            }
            if let Some(worker) = self.memory.workers.get_mut(&session.worker)
                && worker.session == Some(id)
            {
                worker.session = None;
            }
        }
        if let Some(error) = error {
            self.said.frames.push((id, ToWorker::End(error)));
        }
        self.said.closed.push(id);
    }
}

/// Makes a holder for a claim.
pub(super) fn holder(session: &Session) -> Holder {
    Holder { worker: Arc::clone(&session.worker), incarnation: session.incarnation, session: session.id }
}
