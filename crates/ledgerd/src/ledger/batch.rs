//! One batch: what was read for it, what was decided, what is written, and what will be said once it is durable.
//!
//! Nothing here speaks. Replies and frames wait in [`Batch`] until the store has made a [`Committed`].

use super::command::{Answer, LeaseVerdict, LedgerError, Receipt, ToWorker, Verdict};
use super::handle::Order;
use super::memory::Memory;
use super::observed::{Before, Observed, Told, Transition};
use super::replicas::Heard;
use super::{PIECE, decide, weight};
use crate::store::{Committed, DynStore};
use ledger_core::session::Session;
use ledger_core::store::{
    BudgetRow, Changed, Changes, DeadLetter, Known, Notes, Reader, StoreError, TaskData, Want,
};
use ledger_core::{
    AgentId, Applied, ByTask, Context, Event, EventKind, LostWith, Now, Reason, Record, Refusal, SessionId,
    Spec, State, Task, TaskError, TaskId, TaskSet,
};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// A task that the batch has read.
#[derive(Debug)]
pub(super) struct Open {
    /// Shared with the store until it changes.
    pub(super) task: Arc<Task>,
    /// Version and state as read; 0 and none for a new one.
    expected: u64,
    was: Option<State>,
    /// Its row is to be written.
    dirty: bool,
}

impl Open {
    /// Whether it is as it was read.
    pub(super) fn is_untouched(&self) -> bool {
        !self.dirty && self.expected == self.task.version && self.was == Some(self.task.state)
    }
}

/// A claim to be told to its session.
#[derive(Debug)]
pub(super) struct Claimed {
    pub(super) session: SessionId,
    pub(super) task: Arc<Task>,
}

/// One batch of the ledger loop.
pub(super) struct Batch<'a> {
    pub(super) memory: &'a mut Memory,
    pub(super) store: &'a mut DynStore,
    pub(super) reader: &'a Arc<dyn Reader>,
    pub(super) now: Now,
    pub(super) known: Known,
    pub(super) open: ByTask<Open>,
    /// Tasks whose rows are to be written.
    dirty: Vec<TaskId>,
    pub(super) changes: Changes,
    pub(super) breakers: BTreeSet<(AgentId, Arc<str>)>,
    budgets: BTreeSet<Option<AgentId>>,
    /// Of the newest task that was made.
    pub(super) spec: Option<Arc<Spec>>,
    pub(super) configured: BTreeSet<AgentId>,
    pub(super) beaten_sessions: BTreeSet<SessionId>,
    /// A breaker counted a failure since this was last looked at.
    pub(super) counted_failure: bool,
    /// Breakers that let go of what they held back; none for all of an agent's.
    pub(super) ungate: BTreeSet<(AgentId, Option<Arc<str>>)>,
    /// With what the lease ends that is being decided.
    pub(super) lost_with: LostWith,
    pub(super) said: Said,
    /// Streams that it opened.
    pub(super) opened: Vec<SessionId>,
    /// Streams that it closed, as they were.
    pub(super) shut: Vec<Session>,
}

pub(super) type Answered = Result<Answer, LedgerError>;

/// An answer and where it goes.
pub(super) type Reply = (oneshot::Sender<Answered>, Answered);

/// What will be said once the batch is durable.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) replies: Vec<Reply>,
    pub(super) receipts: HashMap<SessionId, Vec<Receipt>>,
    pub(super) frames: Vec<(SessionId, ToWorker)>,
    pub(super) claimed: Vec<Claimed>,
    pub(super) ended: Vec<TaskId>,
    pub(super) new_agents: Vec<(Arc<str>, AgentId)>,
    pub(super) closed: Vec<SessionId>,
    /// For the observer, if there is one.
    pub(super) observed: Vec<Observed>,
}

impl<'a> Batch<'a> {
    pub(super) fn new(
        memory: &'a mut Memory,
        store: &'a mut DynStore,
        reader: &'a Arc<dyn Reader>,
        now: Now,
    ) -> Self {
        Self {
            memory,
            store,
            reader,
            now,
            known: Known::default(),
            open: ByTask::default(),
            dirty: Vec::new(),
            changes: Changes::default(),
            breakers: BTreeSet::new(),
            budgets: BTreeSet::new(),
            configured: BTreeSet::new(),
            spec: None,
            beaten_sessions: BTreeSet::new(),
            counted_failure: false,
            ungate: BTreeSet::new(),
            lost_with: LostWith::ALONE,
            said: Said::default(),
            opened: Vec::new(),
            shut: Vec::new(),
        }
    }

    /// Decides all of it, in order, and hands it to the store; one answer for each order.
    pub(super) async fn run(
        &mut self,
        orders: &[Order],
        due: &[TaskId],
        heard: &Heard,
    ) -> Result<Vec<Answered>, StoreError> {
        let mut want = Want { tasks: due.to_vec(), workers: heard.moved.clone(), ..Want::default() };
        want.tasks.extend(&heard.changed);
        for worker in heard.moved.iter().filter_map(|name| self.memory.workers.get(name)) {
            want.tasks.extend(&worker.tasks);
        }
        for order in orders {
            decide::want(&order.command, self.memory, &mut want);
        }
        let known = self.store.begin(&want, self.now).await?;
        self.know(known);
        let unknown = |open: &Open| !self.memory.agents.contains_key(&open.task.spec.agent);
        if self.memory.is_shared && self.open.values().any(unknown) {
            // Another daemon made it a moment ago.
            return Err(StoreError::Outdated("the agent"));
        }
        self.heed(&heard.changed);
        self.part(&heard.moved);
        self.ungate.extend(heard.let_go.iter().cloned());
        self.memory.go_through(heard.reconfigured.clone(), false);
        // What time has brought is for those that wait already, before anybody else fails.
        self.grant().await?;
        let mut answers = Vec::with_capacity(orders.len());
        // Entries are large: to make room as they come would copy each of them again.
        let all: usize = orders.iter().map(|order| weight(&order.command).0).sum();
        self.changes.history.reserve(all.min(PIECE));
        let mut decided = 0;
        for order in orders {
            // In pieces, so that a store can write the one while the next is decided.
            decided += weight(&order.command).0;
            if decided > PIECE {
                decided = 0;
                self.write().await?;
            }
            match self.decide(&order.command).await {
                // The store failed while it was asked: that fails the batch, not the command.
                Err(LedgerError::Store(error)) => return Err(error),
                answer => answers.push(answer),
            }
        }
        self.walk().await?;
        self.elapse(due);
        self.tick_breakers();
        self.end_pauses();
        self.grant().await?;
        self.let_go().await?;
        self.write().await?;
        self.assign().await?;
        self.write().await?;
        Ok(answers)
    }

    /// Takes what the store knows of what the commands name.
    pub(super) fn know(&mut self, mut known: Known) {
        for (id, task) in known.tasks.drain() {
            self.take_up(id, task);
        }
        self.known = known;
    }

    /// Takes up a task that the store offered or read.
    pub(super) fn take_up(&mut self, id: TaskId, task: Arc<Task>) {
        self.open.entry(id).or_insert_with(|| Open {
            expected: task.version,
            was: Some(task.state),
            dirty: false,
            task,
        });
    }

    /// Takes up a new task.
    pub(super) fn create(&mut self, task: Task, record: Record) {
        if let Some(agent) = self.memory.agents.get_mut(&task.spec.agent) {
            agent.counts[usize::from(task.state.code())] += 1;
        }
        self.memory.transitions += 1;
        self.changes.history.push(record);
        let (id, task) = (task.id, Arc::new(task));
        self.dirty.push(id);
        self.open.insert(id, Open { task, expected: 0, was: None, dirty: true });
    }

    /// Applies `event` to a task and does in memory what goes with it.
    pub(super) fn apply(&mut self, id: TaskId, event: &Event, digest: u64) -> Result<Applied, LedgerError> {
        let open = self.open.get_mut(&id).ok_or(LedgerError::UnknownTask(id))?;
        let agent_id = open.task.spec.agent;
        let now = self.now.at.since_epoch();
        let was_gated = open.task.is_gated();
        let had = open.task.holder.clone();
        let from = open.task.state;
        let elsewhere = self.memory.is_elsewhere(&open.task);
        let before = self.memory.is_observed.then(|| Before::of(&open.task, self.now));
        let agent = self.memory.agents.get_mut(&agent_id).ok_or(LedgerError::UnknownTask(id))?;
        let settings = Arc::clone(&agent.settings);
        let draw = retry_core::draw(
            self.memory.seed,
            id.0,
            u64::from(open.task.delivery) << 8 | u64::from(event_key(event)),
        );
        let (payer, shared, at) = (&*agent, &self.memory.budget, self.now);
        // While others of its agent wait for tokens there are none for who comes later.
        let first = !self.memory.budget_queue.contains_key(&agent_id);
        let affords = |tokens: u32| first && payer.affords(shared, at, tokens);
        let lost_with = self.lost_with;
        let cx = Context { now: self.now, settings: &settings, draw, affords: &affords, digest, lost_with };
        let mut applied = Arc::make_mut(&mut open.task).apply(event, &cx).map_err(LedgerError::Refused)?;
        let Some(record) = applied.record.take() else { return Ok(applied) };
        if !open.dirty {
            open.dirty = true;
            self.dirty.push(id);
        }
        let to = open.task.state;
        agent.counts[usize::from(from.code())] = agent.counts[usize::from(from.code())].saturating_sub(1);
        agent.counts[usize::from(to.code())] += 1;
        let (is_gated, spec) = (open.task.is_gated(), Arc::clone(&open.task.spec));
        let ran = from == State::Running && !elsewhere;
        if was_gated != is_gated || ran != (to == State::Running && !elsewhere) {
            let guard = agent.breakers.of_mut(&spec.task_type);
            guard.gated =
                guard.gated.saturating_add(u64::from(is_gated)).saturating_sub(u64::from(was_gated));
            let runs = u64::from(to == State::Running && !elsewhere);
            guard.running = guard.running.saturating_add(runs).saturating_sub(u64::from(ran));
        }
        if let Some(mut seen) = before.and_then(|before| Transition::of(&record, agent_id, before)) {
            if self.memory.is_traced {
                seen = seen.named(&spec, record.worker.as_ref());
            }
            self.said.observed.push(Observed::Task(seen));
        }
        let effects = applied.effects;
        if effects.reserve > 0 {
            // Both were asked a moment ago, under the same `now`.
            let paid = agent.pay(&mut self.memory.budget, self.now, effects.reserve);
            debug_assert!(paid, "what was affordable is paid");
        }
        if effects.refund > 0 {
            agent.budget.refund(effects.refund);
            self.memory.budget.refund(effects.refund);
        }
        let deposited = effects.deposit && {
            let own = agent.budget.deposit(now);
            self.memory.budget.deposit(now) || own
        };
        if effects.reserve > 0 || effects.refund > 0 || deposited {
            self.budgets.insert(Some(agent_id));
            self.budgets.insert(None);
        }
        self.mind_holder(id, had.as_ref(), to, &effects);
        if let Some(told) = effects.sample {
            self.tell_breaker(agent_id, &spec.task_type, told, &effects, draw);
        }
        self.keep(id, record, to);
        if to == State::Queued
            && self
                .open
                .get(&id)
                .is_some_and(|open| open.task.idle_deliveries >= ledger_core::limits::IDLE_DELIVERIES)
        {
            self.apply(id, &Event::Undeliverable, 0)?;
        }
        Ok(applied)
    }

    /// Keeps the books on who holds what, and pushes a stop to whoever does.
    fn mind_holder(
        &mut self,
        id: TaskId,
        had: Option<&ledger_core::Holder>,
        to: State,
        effects: &ledger_core::Effects,
    ) {
        let Some(open) = self.open.get(&id) else { return };
        let has = open.task.holder.clone();
        if let Some(worker) = had.and_then(|had| self.memory.workers.get_mut(&had.worker)) {
            if to != State::Running {
                worker.tasks.remove(&id);
            }
            // What was merely lost goes on taking room until a beat omits it.
            let gone = has.is_none();
            if gone && let Some(session) = worker.session.and_then(|s| self.memory.sessions.get_mut(&s)) {
                session.held.remove(&id);
            }
        }
        if to == State::Running
            && !self.memory.is_elsewhere(&open.task)
            && let Some(worker) = has.as_ref().and_then(|holder| self.memory.workers.get_mut(&holder.worker))
        {
            worker.tasks.insert(id);
            if let Some(session) = worker.session {
                if let Some(session) = self.memory.sessions.get_mut(&session) {
                    session.held.insert(id);
                }
                if let Some(stop) = effects.stop {
                    let verdict = Verdict::Stop(stop, stop.until.since(self.now.at));
                    let verdict = LeaseVerdict { task: id, fence: open.task.fence, verdict };
                    self.said.frames.push((session, ToWorker::Stop(vec![verdict])));
                }
            }
        }
    }

    /// Marks a budget's row as changed.
    pub(super) fn budget_changed(&mut self, id: AgentId) {
        self.budgets.insert(Some(id));
        self.budgets.insert(None);
    }

    /// Keeps a history row and what else a transition writes.
    fn keep(&mut self, id: TaskId, record: Record, to: State) {
        let Some(open) = self.open.get(&id) else { return };
        let task = &open.task;
        if let Some(error) = &record.error {
            self.changes.notes.push((id, Notes { error: Some(Arc::clone(error)), ..Notes::default() }));
        }
        if let Some((_, question)) =
            record.facts.iter().find(|(fact, _)| *fact == ledger_core::Fact::Question)
        {
            // An answer to an earlier question is none to this one.
            let (question, answer) = (Some(Arc::clone(question)), Some("".into()));
            self.changes.notes.push((id, Notes { question, answer, ..Notes::default() }));
        }
        if let Some((_, answer)) = record.facts.iter().find(|(fact, _)| *fact == ledger_core::Fact::Answer) {
            self.changes.notes.push((id, Notes { answer: Some(Arc::clone(answer)), ..Notes::default() }));
        }
        if to == State::Failed && record.from != Some(State::Failed) {
            self.changes.dead_letters.push(dead_letter(task, &record));
        }
        if record.kind == EventKind::Redriven {
            self.changes.redriven.push(id);
        }
        if to.is_terminal() && record.from.is_none_or(|from| !from.is_terminal()) {
            self.said.ended.push(id);
            if task.spec.frees_key {
                self.changes.freed_keys.push(id);
            }
        }
        if record.from == Some(State::Retry)
            && (to != State::Retry || matches!(record.kind, EventKind::BudgetGranted | EventKind::Updated))
        {
            self.leave_budget_queue(id);
        }
        self.memory.transitions += 1;
        self.changes.history.push(record);
    }

    fn leave_budget_queue(&mut self, id: TaskId) {
        if let Some(agent) = self.open.get(&id).map(|open| open.task.spec.agent) {
            self.memory.leave_budget_queue(agent, id);
        }
    }

    /// Adds a fact to the row that settled this fence a moment ago.
    pub(super) fn add_fact(&mut self, id: TaskId, fact: ledger_core::Fact, text: &Arc<str>) {
        let settles = |record: &&mut Record| record.task == id && record.digest.is_some();
        if let Some(record) = self.changes.history.iter_mut().rev().find(settles) {
            record.facts.push((fact, Arc::clone(text)));
        }
    }

    /// Puts a task's row among what is written although it has no new history row.
    pub(super) fn touch(&mut self, id: TaskId) {
        if let Some(open) = self.open.get_mut(&id).filter(|open| !open.dirty) {
            open.dirty = true;
            self.dirty.push(id);
        }
    }

    /// The row that settled this fence, in this batch or before.
    pub(super) async fn settlement(&mut self, id: TaskId, fence: u64) -> Result<Option<Record>, LedgerError> {
        let settles =
            |record: &&Record| (record.task, record.fence) == (id, fence) && record.digest.is_some();
        if let Some(record) = self.changes.history.iter().rev().find(settles) {
            return Ok(Some(record.clone()));
        }
        let found = self.store.settled(&[(id, fence)]).await.map_err(LedgerError::Store)?;
        Ok(found.into_iter().next().flatten())
    }

    /// Hands everything decided so far to the store.
    pub(super) async fn write(&mut self) -> Result<(), ledger_core::store::StoreError> {
        let mut changes = std::mem::take(&mut self.changes);
        changes.tasks.reserve(self.dirty.len());
        for id in self.dirty.drain(..) {
            let Some(open) = self.open.get_mut(&id) else { continue };
            changes.tasks.push(Changed {
                task: Arc::clone(&open.task),
                expected: open.expected,
                was: open.was,
            });
            open.dirty = false;
            open.expected = open.task.version;
            open.was = Some(open.task.state);
            self.memory.watch(&open.task, self.now);
        }
        for id in std::mem::take(&mut self.configured) {
            changes.agents.extend(self.memory.agents.get(&id).map(ledger_core::Agent::row));
        }
        for (id, key) in std::mem::take(&mut self.breakers) {
            changes
                .breakers
                .extend(self.memory.agents.get(&id).and_then(|agent| agent.breakers.row(id, &key)));
        }
        for id in std::mem::take(&mut self.budgets) {
            match id {
                Some(id) => {
                    changes.budgets.extend(self.memory.agents.get(&id).map(ledger_core::Agent::budget_row));
                }
                None => {
                    changes.budgets.push(BudgetRow { agent: None, level: self.memory.budget.level() });
                }
            }
        }
        for id in std::mem::take(&mut self.beaten_sessions) {
            changes.sessions.extend(self.memory.session_row(id, true));
        }
        if changes.is_empty() {
            return Ok(());
        }
        let overtaken = self.store.write(changes).await?;
        match overtaken.first() {
            None => Ok(()),
            // Somebody else was faster with a task of this batch: all of it is read and decided anew, command by
            // command, so that only what still collides waits.
            Some(task) => Err(ledger_core::store::StoreError::Overtaken(*task)),
        }
    }

    /// The receipt of a repeated outcome, or why it is none.
    pub(super) fn replay(
        record: &Record,
        worker: &str,
        digest: u64,
    ) -> Result<super::command::Recorded, LedgerError> {
        if record.worker.as_deref() != Some(worker) {
            return Err(LedgerError::Refused(Refusal::NotHolder));
        }
        if record.digest != Some(digest) {
            return Err(LedgerError::Refused(Refusal::OutcomeConflict));
        }
        Ok(recorded(record))
    }
}

/// What a history row says in a receipt: the same words when it is said again.
pub(super) fn recorded(record: &Record) -> super::command::Recorded {
    super::command::Recorded {
        state: record.to,
        reason: record.reason,
        version: record.version,
        run_at: record.until.filter(|_| matches!(record.to, State::Retry | State::Queued | State::Blocked)),
        follow_ups: record
            .fact(ledger_core::Fact::FollowUps)
            .map(|ids| ids.split(' ').filter_map(|id| id.parse().ok()).collect())
            .unwrap_or_default(),
    }
}

/// Tells apart the draws of one delivery.
fn event_key(event: &Event) -> u8 {
    match event {
        Event::Settle(..) => 1,
        Event::LeaseOver | Event::TakenBack { .. } => 2,
        Event::GraceOver => 3,
        _ => 0,
    }
}

fn dead_letter(task: &Task, record: &Record) -> DeadLetter {
    DeadLetter {
        task: task.id,
        agent: task.spec.agent,
        task_type: Arc::clone(&task.spec.task_type),
        reason: task.reason,
        error: record.error.clone(),
        fingerprint: fingerprint(task.reason, record.error.as_deref()),
        failed_at: record.at,
        attempt: task.attempt,
        redrives: task.redrives,
        discarded: None,
    }
}

/// The same for failures alike: reason, class, code, and the message without its digits (FNV-1a, 64 bits).
fn fingerprint(reason: Reason, error: Option<&TaskError>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut mix = |bytes: &[u8]| {
        for byte in bytes.iter().filter(|byte| !byte.is_ascii_digit()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        hash = (hash ^ 0xff).wrapping_mul(0x0000_0100_0000_01b3);
    };
    mix(reason.as_str().as_bytes());
    if let Some(error) = error {
        mix(error.class.as_str().as_bytes());
        mix(error.code.as_bytes());
        mix(error.message.as_bytes());
    }
    hash
}

/// What producers said of assigned tasks.
fn origins(assignments: &[(SessionId, ToWorker)]) -> Vec<(TaskId, Arc<TaskData>)> {
    let items = assignments.iter().filter_map(|(_, frame)| match frame {
        ToWorker::Assignments(items) => Some(items),
        _ => None,
    });
    items.flatten().map(|item| (item.task, Arc::clone(&item.data))).collect()
}

/// Says everything, now that it is durable.
pub(super) fn speak(
    said: Said,
    memory: &mut Memory,
    shared: &super::handle::Shared,
    assignments: Vec<(SessionId, ToWorker)>,
    took: Duration,
    proof: &Committed,
) {
    let origins = if memory.is_traced { origins(&assignments) } else { Vec::new() };
    if !said.new_agents.is_empty() {
        let mut names = shared.names.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        names.extend(said.new_agents);
    }
    for (reply, answer) in said.replies {
        let _ = reply.send(answer);
    }
    let send = |session: SessionId, frame: ToWorker| {
        if let Some(outbox) = memory.outboxes.get(&session) {
            // A stream that is gone says so itself.
            let _ = outbox.send(frame);
        }
    };
    for (session, receipts) in said.receipts {
        send(session, ToWorker::Receipts(receipts));
    }
    for (session, frame) in assignments {
        send(session, frame);
    }
    for (session, frame) in said.frames {
        send(session, frame);
    }
    for session in said.closed {
        memory.outboxes.remove(&session);
    }
    // After those who wait for an answer.
    shared.feed.durable(proof.seq());
    if let Some(observer) = &shared.observer {
        observer.tell(Told { seen: said.observed, origins, took });
    }
    if !said.ended.is_empty() {
        let mut waiters = shared.waiters.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !waiters.is_empty() {
            let ended: TaskSet = said.ended.into_iter().collect();
            for task in ended {
                for waiter in waiters.remove(&task).into_iter().flatten() {
                    let _ = waiter.send(());
                }
            }
        }
    }
}
