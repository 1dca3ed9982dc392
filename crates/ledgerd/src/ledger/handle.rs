//! How everybody else speaks to the ledger: send a command, await its answer.
//!
//! A caller that is dropped undoes nothing: the command is in the ledger's hands, and the ledger answers nobody.

use super::command::{
    AgentRules, AgentView, Answer, BatchMode, BreakerOrder, Command, Enqueued, FromWorker, LedgerError,
    NewTask, Opened, Receipt, Redriving, RequestKey, Settlement, Stats, WorkerView,
};
use super::observed::Observer;
use super::pulse::{Beat, Pulse};
use super::replicas::Heard;
use super::retention::Retention;
use super::watch::Feed;
use crate::clock::Clock;
use crate::room::{Held, Taken};
use crate::store::Wake;
use ledger_core::explain::{Explanation, explain};
use ledger_core::session::{Hello, Unsent};
use ledger_core::settings::AgentOverrides;
use ledger_core::store::Reader;
use ledger_core::{AgentId, ByName, SessionId, TaskId, Timestamp};
use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// A command with the place its answer goes to.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) command: Command,
    pub(super) reply: Option<oneshot::Sender<Result<Answer, LedgerError>>>,
    /// What its message takes of the room for messages, until it is done with: whoever sent it may have left.
    pub(super) _room: Option<Taken>,
}

/// The ledger, as seen from outside. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    /// Enqueues, reads of memory, operators: refused when full.
    pub(super) calls: mpsc::Sender<Order>,
    /// Workers' frames: never refused; a full lane slows the reading of streams.
    pub(super) frames: mpsc::Sender<Order>,
    pub(super) shared: Arc<Shared>,
}

/// What loop and callers both look at.
pub(super) struct Shared {
    pub(super) clock: Clock,
    pub(super) reader: Arc<dyn Reader>,
    /// Agents by name; only committed ones.
    pub(super) names: RwLock<ByName<AgentId>>,
    /// Other daemons may serve the ledger too.
    pub(super) is_shared: bool,
    /// Who hears of transitions.
    pub(super) observer: Option<Observer>,
    /// Rings when other daemons have done something.
    pub(super) wake: Arc<Wake>,
    /// Who waits for the end of which task.
    pub(super) waiters: Mutex<HashMap<TaskId, Vec<oneshot::Sender<()>>>>,
    /// How long ended tasks are kept.
    pub(super) retention: OnceLock<Retention>,
    /// Tasks that retention removed since the start.
    pub(super) removed: AtomicU64,
    /// Signs of life of the loop.
    pub(super) pulse: Pulse,
    /// What happened last, for those who watch.
    pub(super) feed: Feed,
}

impl Shared {
    /// Tasks whose ends somebody waits for; so many at most as one look of the store is worth.
    pub(super) fn awaited(&self) -> Vec<TaskId> {
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiters.is_empty() {
            waiters.retain(|_, list| list.iter().any(|waiter| !waiter.is_closed()));
        }
        self.wake.await_ends(!waiters.is_empty());
        waiters.keys().take(AWAITED).copied().collect()
    }

    /// Callers know agents by these names.
    pub(super) fn name(&self, names: &ByName<AgentId>) {
        self.names.write().unwrap_or_else(PoisonError::into_inner).clone_from(names);
    }

    /// Tells callers what other daemons did: agents they made, tasks that ended there.
    pub(super) fn know(&self, heard: &Heard) {
        if !heard.new_agents.is_empty() {
            let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
            names.extend(heard.new_agents.iter().cloned());
        }
        if !heard.ended.is_empty() {
            let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
            for waiter in heard.ended.iter().filter_map(|task| waiters.remove(task)).flatten() {
                let _ = waiter.send(());
            }
        }
    }
}

/// Tasks whose ends are asked for at once.
const AWAITED: usize = 10_000;

impl Handle {
    /// Enqueues tasks in one commit.
    ///
    /// # Errors
    /// Of the whole call; refusals of items are in the answer.
    pub async fn enqueue(
        &self,
        tasks: Vec<Result<NewTask, LedgerError>>,
        mode: BatchMode,
        request: Option<RequestKey>,
    ) -> Result<Vec<Enqueued>, LedgerError> {
        match self.call(Command::Enqueue { tasks, mode, request }).await? {
            Answer::Enqueued(items) => Ok(items),
            _ => Err(LedgerError::SessionEnded),
        }
    }

    /// Cancels a waiting task, or asks for the end of a running one.
    ///
    /// # Errors
    /// UnknownTask, or TaskTerminal for one that is DONE or FAILED.
    pub async fn cancel(
        &self,
        task: TaskId,
        note: Arc<str>,
        request: Option<RequestKey>,
    ) -> Result<(), LedgerError> {
        self.call(Command::Cancel { task, note, request }).await.map(drop)
    }

    /// Changes priority or time of a waiting task.
    ///
    /// # Errors
    /// UnknownTask; Refused unless it waits.
    pub async fn update(
        &self,
        task: TaskId,
        priority: Option<u8>,
        run_at: Option<Timestamp>,
        note: Arc<str>,
        request: Option<RequestKey>,
    ) -> Result<(), LedgerError> {
        self.call(Command::Update { task, priority, run_at, note, request }).await.map(drop)
    }

    /// Answers a task that its worker blocked.
    ///
    /// # Errors
    /// UnknownTask; Refused unless it is BLOCKED (WORKER).
    pub async fn unblock(
        &self,
        task: TaskId,
        answer: Arc<str>,
        actor: Arc<str>,
        request: Option<RequestKey>,
    ) -> Result<(), LedgerError> {
        self.call(Command::Unblock { task, answer, actor, request }).await.map(drop)
    }

    /// Hands out none of an agent's tasks until it is resumed, or for a time.
    ///
    /// # Errors
    /// UnknownAgent.
    pub async fn pause(
        &self,
        agent: Arc<str>,
        reason: Arc<str>,
        actor: Arc<str>,
        duration: Option<Duration>,
    ) -> Result<(), LedgerError> {
        self.call(Command::Pause { agent, reason, actor, duration }).await.map(drop)
    }

    /// Ends a pause; of an agent that is not paused nothing changes.
    ///
    /// # Errors
    /// UnknownAgent.
    pub async fn resume(
        &self,
        agent: Arc<str>,
        reason: Arc<str>,
        actor: Arc<str>,
    ) -> Result<(), LedgerError> {
        self.call(Command::Resume { agent, reason, actor }).await.map(drop)
    }

    /// Says why the task is where it is.
    ///
    /// The ledger gathers what it has in memory; the history is read, and the sentences are made, out of its way.
    ///
    /// # Errors
    /// UnknownTask; Store when its history cannot be read; as [`Handle::agents`].
    pub async fn explain(&self, task: TaskId) -> Result<Explanation, LedgerError> {
        let Answer::Facts(mut facts) = self.call(Command::Explain(task)).await? else {
            return Err(LedgerError::SessionEnded);
        };
        if facts.asks_history() {
            let rows = self.reader().history(task).await.map_err(LedgerError::Store)?;
            facts.hear(rows.into_iter().flatten().map(|row| row.record));
        }
        Ok(explain(&facts))
    }

    /// Waits until the task has ended, or `timeout` is over. Look at the task to know which.
    ///
    /// # Errors
    /// UnknownTask; Store when it cannot be read.
    pub async fn wait(&self, task: TaskId, timeout: Duration) -> Result<(), LedgerError> {
        let (ended, wait) = oneshot::channel();
        {
            let mut waiters = self.shared.waiters.lock().unwrap_or_else(PoisonError::into_inner);
            let list = waiters.entry(task).or_default();
            // Callers that left stay until here; so a task that never ends keeps no crowd of them.
            list.retain(|waiter| !waiter.is_closed());
            list.push(ended);
            self.shared.wake.await_ends(true);
        }
        let view = self.reader().task(task, false).await.map_err(LedgerError::Store)?;
        match view {
            None => {
                self.shared.waiters.lock().unwrap_or_else(PoisonError::into_inner).remove(&task);
                Err(LedgerError::UnknownTask(task))
            }
            Some(view) if view.task.state.is_terminal() => Ok(()),
            Some(_) => {
                let _ = tokio::time::timeout(timeout, wait).await;
                Ok(())
            }
        }
    }

    /// Committed rows.
    #[must_use]
    pub fn reader(&self) -> &dyn Reader {
        &*self.shared.reader
    }

    /// The clock the ledger goes by.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.shared.clock
    }

    /// The number of an agent. One that is not known may have been made by another daemon a moment ago.
    pub async fn agent_id(&self, name: &str) -> Option<AgentId> {
        let known = || self.shared.names.read().unwrap_or_else(PoisonError::into_inner).get(name).copied();
        if known().is_none() && self.shared.is_shared {
            // Whoever asks for agents makes the ledger look.
            let _ = self.agents().await;
        }
        known()
    }

    /// The name of an agent.
    #[must_use]
    pub fn agent_name(&self, id: AgentId) -> Option<Arc<str>> {
        let names = self.shared.names.read().unwrap_or_else(PoisonError::into_inner);
        names.iter().find(|(_, known)| **known == id).map(|(name, _)| Arc::clone(name))
    }

    /// Opens a session.
    ///
    /// # Errors
    /// WorkerIdInUse, WorkerSuperseded, UnknownAgent, Draining.
    pub async fn hello(&self, hello: Hello) -> Result<Opened, LedgerError> {
        let unsent = Unsent::default();
        let (outbox, rest) = mpsc::unbounded_channel();
        match self.frame_call(Command::Hello(Box::new(hello), unsent.clone(), outbox)).await? {
            Answer::Opened(session, verdicts, [heartbeat_interval, idle_interval, ack_delay_max]) => {
                Ok(Opened {
                    session,
                    verdicts,
                    heartbeat_interval,
                    idle_interval,
                    ack_delay_max,
                    outbox: rest,
                    unsent,
                })
            }
            _ => Err(LedgerError::SessionEnded),
        }
    }

    /// Passes a frame on. Waits while the lane is full; the answers come on the session's outbox.
    ///
    /// # Errors
    /// Draining when the ledger has ended.
    pub async fn frame(&self, session: SessionId, frame: FromWorker) -> Result<(), LedgerError> {
        self.frame_with(session, frame, None).await
    }

    /// As [`Handle::frame`], with the room that the frame takes.
    pub(crate) async fn frame_with(
        &self,
        session: SessionId,
        frame: FromWorker,
        room: Option<Taken>,
    ) -> Result<(), LedgerError> {
        let order = Order { command: Command::Frame(session, frame), reply: None, _room: room };
        self.frames.send(order).await.map_err(|_| LedgerError::Draining)
    }

    /// Records outcomes outside of a session.
    ///
    /// # Errors
    /// Of the whole call; refusals of items are in the answer.
    pub async fn settle(
        &self,
        worker: Arc<str>,
        items: Vec<Settlement>,
    ) -> Result<Vec<Receipt>, LedgerError> {
        match self.frame_call(Command::Settle(worker, items)).await? {
            Answer::Receipts(receipts) => Ok(receipts),
            _ => Err(LedgerError::SessionEnded),
        }
    }

    /// Creates an agent, or changes the given settings of one.
    ///
    /// # Errors
    /// Invalid with every rule that is broken.
    pub async fn configure(
        &self,
        agent: Arc<str>,
        change: AgentOverrides,
        actor: Arc<str>,
        reason: Arc<str>,
    ) -> Result<(), LedgerError> {
        self.call(Command::Configure { agent, change: Box::new(change), actor, reason }).await.map(drop)
    }

    /// Tells a breaker what to do; `task_type` is empty for the agent's own.
    ///
    /// # Errors
    /// UnknownAgent; Invalid where it has no breaker for that type, or none at all.
    pub async fn order_breaker(
        &self,
        agent: Arc<str>,
        task_type: Arc<str>,
        order: BreakerOrder,
        actor: Arc<str>,
        reason: Arc<str>,
    ) -> Result<(), LedgerError> {
        self.call(Command::OrderBreaker { agent, task_type, order, actor, reason }).await.map(drop)
    }

    /// Puts FAILED tasks back into the queue.
    ///
    /// # Errors
    /// Of the whole call; refusals of items are in the answer, in order. To a repeated call it names the tasks of the first.
    pub async fn redrive(
        &self,
        tasks: Vec<TaskId>,
        how: Redriving,
        request: Option<RequestKey>,
    ) -> Result<Vec<(TaskId, Result<(), LedgerError>)>, LedgerError> {
        match self.call(Command::Redrive { tasks, how: Box::new(how), request }).await? {
            Answer::Each(items) => Ok(items),
            _ => Err(LedgerError::SessionEnded),
        }
    }

    /// Hides dead letters and keeps them from being redriven.
    ///
    /// # Errors
    /// As [`Handle::redrive`].
    pub async fn discard(
        &self,
        tasks: Vec<TaskId>,
        note: Arc<str>,
        request: Option<RequestKey>,
    ) -> Result<Vec<(TaskId, Result<(), LedgerError>)>, LedgerError> {
        match self.call(Command::Discard { tasks, note, request }).await? {
            Answer::Each(items) => Ok(items),
            _ => Err(LedgerError::SessionEnded),
        }
    }

    /// All agents, by name.
    ///
    /// # Errors
    /// Draining when the ledger has ended, Exhausted when its lane is full.
    pub async fn agents(&self) -> Result<Vec<AgentView>, LedgerError> {
        match self.call(Command::Agents).await? {
            Answer::Agents(agents) => Ok(agents),
            _ => Err(LedgerError::SessionEnded),
        }
    }

    /// How long the longest waiting due task of each agent has been waiting; without agents that have none due.
    ///
    /// # Errors
    /// Unavailable; that the store cannot be read.
    pub async fn oldest(&self) -> Result<Vec<(Arc<str>, Duration)>, LedgerError> {
        match self.call(Command::Oldest).await? {
            Answer::Oldest(oldest) => Ok(oldest),
            _ => Err(LedgerError::SessionEnded),
        }
    }

    /// Open sessions, by worker.
    ///
    /// # Errors
    /// As [`Handle::agents`].
    pub async fn workers(&self) -> Result<Vec<WorkerView>, LedgerError> {
        match self.call(Command::Workers).await? {
            Answer::Workers(workers) => Ok(workers),
            _ => Err(LedgerError::SessionEnded),
        }
    }

    /// Counts of the whole ledger.
    ///
    /// # Errors
    /// As [`Handle::agents`].
    pub async fn stats(&self) -> Result<Stats, LedgerError> {
        match self.call(Command::Stats).await? {
            Answer::Stats(stats) => Ok(*stats),
            _ => Err(LedgerError::SessionEnded),
        }
    }

    /// Assigns nothing more, and tells every session that the daemon goes away after `grace`.
    ///
    /// # Errors
    /// Draining when the ledger has ended already.
    pub async fn drain(&self, grace: Duration) -> Result<(), LedgerError> {
        self.frame_call(Command::Drain(grace)).await.map(drop)
    }

    /// What configuration says of agents from now on.
    ///
    /// # Errors
    /// Draining when the ledger has ended.
    pub async fn rule(&self, rules: Arc<AgentRules>) -> Result<(), LedgerError> {
        self.frame_call(Command::Rule(rules)).await.map(drop)
    }

    /// Returns when everything that was told before is committed; the test of "can commit".
    ///
    /// # Errors
    /// Draining when the ledger has ended.
    pub async fn flush(&self) -> Result<(), LedgerError> {
        self.frame_call(Command::Flush).await.map(drop)
    }

    /// What can be seen of the loop, without asking it. One that is left alone turns when [`Handle::flush`] wakes it.
    #[must_use]
    pub fn beat(&self) -> Beat {
        self.shared.pulse.seen()
    }

    async fn call(&self, command: Command) -> Result<Answer, LedgerError> {
        let (reply, answer) = oneshot::channel();
        self.calls.try_send(Order { command, reply: Some(reply), _room: of_this_call() }).map_err(
            |refused| match refused {
                mpsc::error::TrySendError::Full(_) => LedgerError::Exhausted {
                    what: "the queue of commands",
                    retry_after: Duration::from_millis(100),
                },
                mpsc::error::TrySendError::Closed(_) => LedgerError::Draining,
            },
        )?;
        answer.await.unwrap_or(Err(LedgerError::Draining))
    }

    pub(super) async fn frame_call(&self, command: Command) -> Result<Answer, LedgerError> {
        let (reply, answer) = oneshot::channel();
        self.frames
            .send(Order { command, reply: Some(reply), _room: of_this_call() })
            .await
            .map_err(|_| LedgerError::Draining)?;
        answer.await.unwrap_or(Err(LedgerError::Draining))
    }
}

/// What the call has taken that a command is of.
fn of_this_call() -> Option<Taken> {
    Held::of_this_call()?.hand_on()
}
