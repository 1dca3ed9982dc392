//! The ledger loop: the only writer of a process.
//!
//! It takes every command that waits, up to a limit, as one batch: decides them in order, claims for sessions with room,
//! writes, commits once, then answers everybody. While one batch is being made durable the next one gathers by itself, and
//! when it has become large it is decided too; there is no timer and no window. Memory is believed only after a commit: a
//! failed one throws it away, and what was decided on it.
//!
//! Not here: what may happen to a task (ledger-core), how it is stored (`store`), how it is said on the wire (`grpc`).

mod admit;
mod batch;
mod breakers;
mod claims;
pub mod command;
mod decide;
mod explain;
mod handle;
mod letters;
mod memory;
pub mod observed;
mod produce;
mod pulse;
mod replicas;
mod retention;
#[cfg(test)]
mod tests;
mod timers;
mod watch;
mod work;

pub use handle::Handle;
pub use pulse::Beat;
pub use retention::Retention;

use crate::clock::Clock;
use crate::store::{Committed, DynStore, Wake};
use batch::{Answered, Batch, Said, speak};
use command::{AgentRules, Assignment, Command, LedgerError, ToWorker};
use handle::{Order, Shared};
use ledger_core::limits::{BATCH_BYTES, BATCH_OPERATIONS};
use ledger_core::store::{Reader, StoreError};
use ledger_core::{Now, SessionId, TaskId};
use memory::Memory;
use observed::Observer;
pub(crate) use pulse::Pulse;
use replicas::{Heard, Undo, tell_of_refused_defaults};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::Duration;
use tokio::runtime::RuntimeFlavor;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
pub(crate) use watch::Watch;

/// Commands that may wait. One batch takes 3,000 operations, so a few batches' worth: beyond that waiting is only delay,
/// and the caller is told so.
const CALLS: usize = 8_192;
/// Frames that may wait before streams are read more slowly.
const FRAMES: usize = 4_096;
/// Operations of a batch after which the store hears of them.
const PIECE: usize = 400;
/// Operations that make a batch worth deciding while another is on its way to the disk. Fewer are better served with those
/// that come until then: each commit waits for the disk once.
const WORTH: usize = 256;
/// Batches that may be on their way at least: one that is written, and one that is ready when it is.
const UNDERWAY: usize = 2;
/// How long a beat of a worker that holds nothing waits for company. It moves no lease, and with thousands of such workers each would
/// be a commit of its own.
const BEAT_WAITS: Duration = Duration::from_millis(200);
/// A timer that fires so much too late tells that the process stood still.
const PAUSE: Duration = Duration::from_secs(2);
/// How long the wall clock is believed while something waits for a time.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(60);
/// How often a command is decided when others are faster with its tasks.
const TRIES: usize = 8;
/// How often a whole batch is, before its commands are on their own.
const WHOLE_TRIES: usize = 3;
/// How long to wait before trying again what time brought and the store refused.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why the ledger had to end.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The fate of a commit is unclear, or the disk fails: a restart finds out what is durable. The database must not be
    /// closed in an orderly way, since that would write.
    #[error("{0}; restart to find out what is durable")]
    Store(StoreError),
}

/// Starts the ledger on an open store. Returns when it has recovered and can commit. `observer` hears of what it does.
///
/// It ends when `stop` is cancelled and every command told before is answered.
///
/// # Errors
/// That the store cannot be read.
pub async fn start(
    mut store: DynStore,
    reader: Arc<dyn Reader>,
    clock: Clock,
    wake: Arc<Wake>,
    observer: Option<Observer>,
    rules: Arc<AgentRules>,
    stop: CancellationToken,
) -> Result<(Handle, JoinHandle<Result<(), Fatal>>), StoreError> {
    let now = clock.now();
    let mut memory = Memory::new(now);
    memory.rules = rules;
    memory.recover(&mut store, clock).await?;
    memory.agents.values().for_each(tell_of_refused_defaults);
    // Configuration may be another than when it ended.
    let heard = Heard { let_go: memory.idle_gates(), ..Heard::default() };
    memory.is_observed = observer.is_some();
    memory.is_traced = observer.as_ref().is_some_and(|observer| observer.traces);
    let names = memory.names.clone();
    let shared = Arc::new(Shared {
        clock,
        reader,
        names: RwLock::new(names),
        waiters: Mutex::new(HashMap::new()),
        is_shared: memory.is_shared,
        observer,
        wake: Arc::clone(&wake),
        retention: OnceLock::new(),
        removed: AtomicU64::new(0),
        pulse: Pulse::default(),
        feed: watch::Feed::default(),
    });
    let (calls, call_lane) = mpsc::channel(CALLS);
    let (frames, frame_lane) = mpsc::channel(FRAMES);
    let handle = Handle { calls, frames, shared: Arc::clone(&shared) };
    let ledger = Loop {
        store,
        memory,
        shared,
        stop,
        calls: call_lane,
        frames: frame_lane,
        underway: VecDeque::new(),
        undo: Undo::default(),
        heard,
        decided: now,
        not_before: None,
    };
    let runtime = tokio::runtime::Handle::current();
    let running = match runtime.runtime_flavor() {
        // There is no other thread that could drive the clock of a test.
        RuntimeFlavor::CurrentThread => tokio::spawn(ledger.run()),
        // A commit keeps its thread until the disk has it: a thread of its own, beside those that serve.
        _ => tokio::task::spawn_blocking(move || runtime.block_on(ledger.run())),
    };
    Ok((handle, running))
}

struct Loop {
    store: DynStore,
    memory: Memory,
    shared: Arc<Shared>,
    stop: CancellationToken,
    calls: mpsc::Receiver<Order>,
    frames: mpsc::Receiver<Order>,
    /// Handed over and not known to be durable, the oldest first.
    underway: VecDeque<Underway>,
    /// What batches that failed did to memory.
    undo: Undo,
    /// News that no batch has acted on.
    heard: Heard,
    /// The time by which the last batch was decided.
    decided: Now,
    /// The store refused what time brought: not again before this.
    not_before: Option<ledger_core::Timestamp>,
}

/// A batch that was decided and is said when it is durable.
struct Underway {
    orders: Vec<Order>,
    /// One for each.
    answers: Vec<Answered>,
    said: Said,
    now: Now,
    /// When it was handed over.
    since: Instant,
    /// What it did to memory.
    undo: Undo,
}

/// What the next batch will be.
#[derive(Default)]
struct Gathered {
    orders: Vec<Order>,
    operations: usize,
    bytes: usize,
    /// When the first of them came.
    since: Option<Instant>,
}

impl Gathered {
    fn push(&mut self, order: Order) {
        self.since.get_or_insert_with(Instant::now);
        let (operations, bytes) = weight(&order.command);
        self.operations += operations;
        self.bytes += bytes;
        self.orders.push(order);
    }

    const fn is_full(&self) -> bool {
        self.operations >= BATCH_OPERATIONS || self.bytes >= BATCH_BYTES
    }

    /// Those that came first: as many as it takes for so many operations. The rest stays.
    fn take(&mut self, operations: usize) -> Vec<Order> {
        if self.operations <= operations {
            return std::mem::take(self).orders;
        }
        let mut first = std::mem::take(self).orders;
        let mut taken = 0;
        let full = first.iter().position(|order| {
            taken += weight(&order.command).0;
            taken >= operations
        });
        if let Some(last) = full {
            first.split_off(last + 1).into_iter().for_each(|order| self.push(order));
        }
        first
    }
}

impl Loop {
    async fn run(mut self) -> Result<(), Fatal> {
        let served = self.serve().await;
        if served.is_err() {
            // An orderly end would checkpoint, that is write, on a disk that has just failed.
            std::mem::forget(self.store);
        }
        served
    }

    async fn serve(&mut self) -> Result<(), Fatal> {
        let mut next = Gathered::default();
        let bell = Arc::clone(&self.shared.wake);
        if self.store.has_news(self.shared.clock.now(), false) {
            self.batch(Vec::new()).await?;
        }
        loop {
            self.shared.pulse.beat(!self.underway.is_empty());
            let room = self.underway.len() < self.store.side_by_side().max(UNDERWAY);
            let enough = next.operations >= if self.underway.is_empty() { 1 } else { WORTH };
            let waits = next.since.filter(|_| enough && self.can_wait(&next)).map(|since| since + BEAT_WAITS);
            let waits = waits.filter(|until| Instant::now() < *until);
            if room && enough && waits.is_none() {
                self.gather(&mut next);
                let orders = next.take(self.share(next.operations));
                self.batch(orders).await?;
                continue;
            }
            let wake = self.wake().filter(|_| room);
            let woken = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(self.shared.clock.instant(at)).await,
                    None => std::future::pending().await,
                }
            };
            let company = async {
                match waits {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            let takes = !next.is_full();
            tokio::select! {
                biased;
                durable = self.store.durable(), if !self.underway.is_empty() => self.landed(durable).await?,
                Some(order) = self.frames.recv(), if takes => {
                    next.push(order);
                    self.gather(&mut next);
                }
                Some(order) = self.calls.recv(), if takes => {
                    next.push(order);
                    self.gather(&mut next);
                }
                () = woken => {
                    self.gather(&mut next);
                    self.batch(std::mem::take(&mut next).orders).await?;
                }
                () = company, if room => {}
                () = bell.rung(), if room => {
                    self.gather(&mut next);
                    self.batch(std::mem::take(&mut next).orders).await?;
                }
                () = self.stop.cancelled(), if room => {
                    self.gather(&mut next);
                    if next.orders.is_empty() {
                        return self.leave().await;
                    }
                    self.batch(std::mem::take(&mut next).orders).await?;
                }
            }
        }
    }

    /// Whether nothing would come of these but that their workers live.
    fn can_wait(&self, next: &Gathered) -> bool {
        use command::FromWorker;
        let holds_nothing =
            |id: &SessionId| self.memory.sessions.get(id).is_some_and(|session| session.held.is_empty());
        !next.is_full()
            && next.orders.iter().all(|order| match &order.command {
                Command::Frame(id, FromWorker::Beat(held, _)) => held.is_empty() && holds_nothing(id),
                _ => false,
            })
    }

    /// How many of the operations that wait make the next batch. Callers whose work came together answer together, so a large batch
    /// would be followed by a large one, and what is written beside it would be small, and soon done.
    fn share(&self, waiting: usize) -> usize {
        match self.store.side_by_side() {
            0 | 1 => usize::MAX,
            batches => {
                let underway = self.underway.iter().flat_map(|batch| &batch.orders);
                let underway: usize = underway.map(|order| weight(&order.command).0).sum();
                (underway + waiting).div_ceil(batches).max(WORTH)
            }
        }
    }

    /// Ends in good order.
    async fn leave(&mut self) -> Result<(), Fatal> {
        self.land().await?;
        if let Err(error) = self.store.leave().await {
            tracing::warn!(%error, "other daemons were not told; they will notice");
        }
        Ok(())
    }

    /// Takes what else waits, from both lanes in turn, up to the limit of one batch.
    fn gather(&mut self, next: &mut Gathered) {
        loop {
            let mut found = false;
            for lane in [&mut self.frames, &mut self.calls] {
                if next.is_full() {
                    return;
                }
                if let Ok(order) = lane.try_recv() {
                    next.push(order);
                    found = true;
                }
            }
            if !found {
                return;
            }
        }
    }

    fn wake(&self) -> Option<ledger_core::Timestamp> {
        // Seen from the last batch, not from now: what has become due since then nobody has looked at.
        let then = self.decided;
        let walk = self.memory.walk.as_ref().map(|_| then.at);
        let first = [walk, self.memory.timers.next(), self.store.next_due(then), self.memory.next_look(then)];
        // Nobody tells when the wall clock is set, so what waits for a time is looked at once a minute.
        let first = first.into_iter().flatten().min()?.min(then.at.after(LOOK_AT_CLOCK));
        Some(self.not_before.map_or(first, |patience| first.max(patience)))
    }

    /// Decides one batch and hands it over.
    async fn batch(&mut self, mut orders: Vec<Order>) -> Result<(), Fatal> {
        // What reads past the store sees only what is durable.
        let reads = orders.iter().any(|order| reads_what_is_durable(&order.command));
        if reads || self.may_hear(&orders, self.shared.clock.now()) {
            self.land().await?;
        }
        let attempted = self.attempt(&mut orders).await;
        if reads || attempted.is_err() {
            self.land().await?;
        }
        match attempted {
            Ok(()) => Ok(()),
            Err(error) => self.refuse(&error, orders, Vec::new()).await,
        }
    }

    /// Waits for all that is on its way.
    async fn land(&mut self) -> Result<(), Fatal> {
        while !self.underway.is_empty() {
            let durable = self.store.durable().await;
            self.landed(durable).await?;
        }
        Ok(())
    }

    /// The oldest batch on its way is durable, or it is not.
    async fn landed(&mut self, durable: Result<Committed, StoreError>) -> Result<(), Fatal> {
        self.shared.pulse.beat(true);
        let Some(batch) = self.underway.pop_front() else { return Ok(()) };
        match durable {
            Ok(proof) => {
                self.say(batch, &proof).await;
                Ok(())
            }
            Err(error) => {
                let mut later = Vec::new();
                // The newest first: each was decided on what the one before had done.
                while let Some(after) = self.underway.pop_back() {
                    later.splice(0..0, after.orders);
                    self.undo.add(after.undo);
                }
                self.undo.add(batch.undo);
                self.refuse(&error, batch.orders, later).await
            }
        }
    }

    /// After a batch that the store refused: its commands one by one, so that only the guilty one suffers, and then those
    /// that were decided after it. Where somebody else was faster nobody is guilty: all of it at once.
    async fn refuse(
        &mut self,
        error: &StoreError,
        mut orders: Vec<Order>,
        later: Vec<Order>,
    ) -> Result<(), Fatal> {
        if error.is_conflict() {
            let decided = match self.begin_anew(error).await {
                Ok(()) => self.again(orders).await,
                fatal => fatal,
            };
            if decided.is_err() || later.is_empty() {
                unwritten(later);
                return decided;
            }
            return self.again(later).await;
        }
        tracing::warn!(%error, commands = orders.len(), "a batch was not committed");
        let unclear = matches!(error, StoreError::Unknown(_) | StoreError::Corrupt(_));
        if unclear || orders.len() == 1 {
            if let Err(fatal) = self.refused(error, &mut orders).await {
                unwritten(later);
                return Err(fatal);
            }
            orders.clear();
        } else {
            self.begin_anew(error).await?;
        }
        for order in orders.into_iter().chain(later) {
            self.alone(order).await?;
        }
        Ok(())
    }

    /// Decides commands anew after somebody else was faster: as one batch, and in the end one by one.
    async fn again(&mut self, mut orders: Vec<Order>) -> Result<(), Fatal> {
        for _ in 0..WHOLE_TRIES {
            match self.durably(&mut orders).await {
                Ok(()) => return Ok(()),
                Err(error) if error.is_conflict() => {
                    self.begin_anew(&error).await?;
                }
                Err(error) => return Box::pin(self.refuse(&error, orders, Vec::new())).await,
            }
        }
        for order in orders {
            self.alone(order).await?;
        }
        Ok(())
    }

    /// Runs one command as a batch of its own; where somebody else was faster, a few times.
    async fn alone(&mut self, order: Order) -> Result<(), Fatal> {
        let mut one = vec![order];
        let mut tries = 1;
        while let Err(error) = self.durably(&mut one).await {
            if tries == TRIES || !error.is_conflict() {
                return self.refused(&error, &mut one).await;
            }
            self.begin_anew(&error).await?;
            tries += 1;
        }
        Ok(())
    }

    /// Runs a batch to its end; nothing is on its way before or after.
    async fn durably(&mut self, orders: &mut Vec<Order>) -> Result<(), StoreError> {
        self.attempt(orders).await?;
        let durable = self.store.durable().await;
        let Some(batch) = self.underway.pop_back() else { return durable.map(drop) };
        match durable {
            Ok(proof) => {
                self.say(batch, &proof).await;
                Ok(())
            }
            Err(error) => {
                *orders = batch.orders;
                self.undo.add(batch.undo);
                Err(error)
            }
        }
    }

    /// Tells whoever was alone in a refused batch.
    async fn refused(&mut self, error: &StoreError, orders: &mut [Order]) -> Result<(), Fatal> {
        tracing::error!(%error, "a command was not committed");
        for order in orders.iter_mut() {
            if let Some(reply) = order.reply.take() {
                let _ = reply.send(Err(Batch::failed(error)));
            } else if let Command::Frame(session, _) = &order.command
                && let Some(outbox) = self.memory.outboxes.get(session)
            {
                let _ = outbox.send(ToWorker::End(Batch::failed(error)));
            }
        }
        self.begin_anew(error).await
    }

    /// After a failed commit: memory is rebuilt from the store, or the ledger ends.
    async fn begin_anew(&mut self, error: &StoreError) -> Result<(), Fatal> {
        self.shared.pulse.beat(true);
        if matches!(error, StoreError::Unknown(_) | StoreError::Corrupt(_)) {
            // Whoever waits in the lanes was not written at all.
            self.calls.close();
            self.frames.close();
            unwritten(std::iter::from_fn(|| self.calls.try_recv().ok()));
            return Err(Fatal::Store(error.clone()));
        }
        let now = self.shared.clock.now();
        let mut undo = std::mem::take(&mut self.undo);
        if error.is_conflict() {
            tracing::debug!(%error, "somebody else was faster; decided anew");
            if let Some(found) = self.store.anew(&undo.touched(), now).await.map_err(Fatal::Store)? {
                let heard = self.memory.put_back(undo, found, now);
                // An agent that both had made was never told as new.
                self.shared.name(&self.memory.names);
                self.shared.know(&heard);
                self.heard.add(heard);
                return Ok(());
            }
        } else {
            self.not_before = Some(now.at.after(PATIENCE));
        }
        self.memory.put_back_sessions(&mut undo);
        self.memory.recover(&mut self.store, self.shared.clock).await.map_err(Fatal::Store)?;
        self.heard.let_go.extend(self.memory.idle_gates());
        self.shared.name(&self.memory.names);
        Ok(())
    }

    /// Decides a batch and hands it over, its orders with it.
    async fn attempt(&mut self, orders: &mut Vec<Order>) -> Result<(), StoreError> {
        self.shared.pulse.beat(true);
        let now = self.hear(orders).await?;
        let due = self.due(now);
        self.decided = now;
        let heard = std::mem::take(&mut self.heard);
        let mut batch = Batch::new(&mut self.memory, &mut self.store, &self.shared.reader, now);
        let answers = batch.run(orders, &due, &heard).await;
        let said = std::mem::take(&mut batch.said);
        let undo = Undo::of(&mut batch);
        drop(batch);
        let submitted = match answers {
            Ok(answers) => self.store.submit().await.map(|()| answers),
            Err(error) => Err(error),
        };
        match submitted {
            Ok(answers) => {
                let orders = std::mem::take(orders);
                let since = Instant::now();
                self.underway.push_back(Underway { orders, answers, said, now, since, undo });
                Ok(())
            }
            Err(error) => {
                self.undo.add(undo);
                // Nobody has acted on it; what memory took over of it will not be told again.
                self.heard.add(heard);
                Err(error)
            }
        }
    }

    /// Whether a batch of these begins with news.
    fn may_hear(&self, orders: &[Order], now: Now) -> bool {
        let asks = |order: &Order| decide::asks_for_news(&order.command, &self.memory);
        self.store.has_news(now, true) && self.store.has_news(now, orders.iter().any(asks))
    }

    /// Takes over what other daemons did, where there are any. The time by which the batch is decided.
    async fn hear(&mut self, orders: &[Order]) -> Result<Now, StoreError> {
        let clock = self.shared.clock;
        let now = clock.now();
        // It is laid over what is durable; what is on its way is not yet.
        if !self.underway.is_empty() || !self.may_hear(orders, now) {
            return Ok(now);
        }
        let wanted = orders.iter().any(|order| decide::asks_for_news(&order.command, &self.memory));
        let news = self.store.news(&self.shared.awaited(), wanted, now).await?;
        if let Some(set_ms) = news.replicas.time.and_then(|time| clock.follow(time)) {
            tracing::warn!(set_ms, "the clock of the store was set, or differs; leases start anew");
            self.memory.since = clock.now().at;
        }
        let now = clock.now();
        let heard = self.memory.hear(news, now);
        self.shared.know(&heard);
        self.heard.add(heard);
        Ok(now)
    }

    /// A batch is durable.
    async fn say(&mut self, batch: Underway, proof: &Committed) {
        let Underway { orders, answers, mut said, now, since, .. } = batch;
        let took = since.elapsed();
        self.memory.commits += 1;
        self.not_before = None;
        for (order, answer) in orders.into_iter().zip(answers) {
            if let Some(reply) = order.reply {
                said.replies.push((reply, answer));
            }
        }
        let assignments = Self::assignments(&self.shared, &self.memory, &mut said, now).await;
        speak(said, &mut self.memory, &self.shared, assignments, took, proof);
    }

    /// Tasks whose time has come, after a look at the clocks.
    fn due(&mut self, now: Now) -> Vec<TaskId> {
        if decide::clock_was_set(&self.memory, now) {
            tracing::warn!(skew_ms = now.skew, "the wall clock was set; run_at and deadlines go by it anew");
            self.memory.skew = now.skew;
            self.memory.timers.all_due(now.at);
        }
        if self.not_before.is_some_and(|patience| patience > now.at) {
            return Vec::new();
        }
        let (due, first) = self.memory.timers.due(now.at, BATCH_OPERATIONS);
        // One that was due at the last look, or at the start, has waited behind others or was armed for the past: that was no pause.
        let looked = self.decided.at.max(self.memory.since);
        let late = first.map(|armed| now.at.since(armed.max(looked)));
        if let Some(late) = late.filter(|late| *late > PAUSE && self.not_before.is_none()) {
            // The process stood still: no lease ends before beats could be taken for a whole lease again.
            let late_ms = late.as_millis() as u64;
            tracing::warn!(late_ms, "the daemon stood still; leases start anew");
            self.memory.since = now.at;
        }
        due
    }

    /// Fetches what the workers of new claims need, now that the claims are durable.
    async fn assignments(
        shared: &Shared,
        memory: &Memory,
        said: &mut Said,
        now: Now,
    ) -> Vec<(SessionId, ToWorker)> {
        let claimed = std::mem::take(&mut said.claimed);
        if claimed.is_empty() {
            return Vec::new();
        }
        let before = |task: &ledger_core::Task| task.delivery > 1 || task.redrives > 0;
        let ids: Vec<_> = claimed.iter().map(|claim| (claim.task.id, before(&claim.task))).collect();
        let data = match shared.reader.for_workers(&ids).await {
            Ok(data) => data,
            Err(error) => {
                tracing::error!(%error, "claimed tasks could not be read for their workers, whose streams end");
                // They come back, and what they do not name is taken back from them at once. To wait for ack timeouts would
                // be held against them: three in a row leave a session without room.
                let sessions: BTreeSet<SessionId> = claimed.iter().map(|claim| claim.session).collect();
                let end = |session| (session, ToWorker::End(LedgerError::Store(error.clone())));
                return sessions.into_iter().map(end).collect();
            }
        };
        let mut frames: HashMap<SessionId, Vec<Assignment>> = HashMap::new();
        for (claim, (data, notes)) in claimed.into_iter().zip(data) {
            let task = claim.task;
            let Some(agent) = memory.agents.get(&task.spec.agent) else { continue };
            let policy = &task.spec.policy;
            let to_deadline = task.deadline.map(|deadline| now.from_wall(deadline).since(now.at));
            let longest = agent.settings.attempt_timeout(policy);
            if let Some(session) = memory.sessions.get(&claim.session) {
                session.unsent.add(data.payload.len());
            }
            frames.entry(claim.session).or_default().push(Assignment {
                task: task.id,
                fence: task.fence,
                agent: Arc::clone(&agent.name),
                task_type: Arc::clone(&task.spec.task_type),
                delivery: task.delivery,
                attempt: task.attempt + 1,
                priority: task.priority,
                ack_timeout: agent.settings.ack_timeout(policy),
                time_left: Some(to_deadline.map_or(longest, |left| left.min(longest))),
                lease_duration: agent.settings.lease_duration(policy),
                data,
                checkpoint: notes.checkpoint,
                last_error: notes.error,
                question: notes.question,
                answer: notes.answer.filter(|answer| !answer.is_empty()),
            });
        }
        frames.into_iter().map(|(session, items)| (session, ToWorker::Assignments(items))).collect()
    }
}

/// Whether deciding it reads more than the store's writing half knows, or changes what later batches read there.
const fn reads_what_is_durable(command: &Command) -> bool {
    matches!(command, Command::Redrive { .. } | Command::Discard { .. })
}

/// Tells callers whose commands were not written at all that nobody will.
fn unwritten(orders: impl IntoIterator<Item = Order>) {
    for reply in orders.into_iter().filter_map(|order| order.reply) {
        let _ = reply.send(Err(LedgerError::Store(StoreError::Unavailable("the daemon ends".into()))));
    }
}

/// Operations and bytes of a command.
fn weight(command: &Command) -> (usize, usize) {
    use command::FromWorker;
    match command {
        Command::Enqueue { tasks, .. } => {
            (tasks.len(), tasks.iter().flatten().map(|task| task.data.payload.len()).sum())
        }
        Command::Frame(_, FromWorker::Acks(items)) => (items.len(), 0),
        // A beat writes one row, whatever it holds.
        Command::Frame(_, FromWorker::Beat(held, _)) => (1 + held.len() / 100, 0),
        Command::Frame(_, FromWorker::Outcomes(items)) | Command::Settle(_, items) => {
            let follow_ups = items.iter().flat_map(|item| &item.follow_ups);
            let bytes =
                items.iter().map(|item| item.result.as_ref().map_or(0, bytes::Bytes::len)).sum::<usize>();
            let more = follow_ups.clone().map(|task| task.data.payload.len()).sum::<usize>();
            (items.len() + follow_ups.count(), bytes + more)
        }
        Command::Redrive { tasks, .. } | Command::Discard { tasks, .. } | Command::Remove { tasks, .. } => {
            (tasks.len(), 0)
        }
        _ => (1, 0),
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}
