//! The ledger in PostgreSQL.
//!
//! A batch is one transaction. What it names is read when it begins; what it changes stays in memory until its end, then
//! what is new is written with one statement, the rest with another, and the transaction committed, while the next batches are
//! decided on other connections. Rows of tasks are written only where they are as they were read; a task that somebody else changed fails
//! the batch by name. Invariants: what a batch reads is what is committed with the changes of those before it and its own laid over; no
//! statement is dropped half-way, for all of them run on the ledger's own thread and time limits are the server's; a commit without
//! an answer is asked for by the number of its transaction.

mod flight;
mod hints;
mod history;
mod living;
pub(super) mod moving;
mod news;
mod open;
mod packed;
mod read;
mod recover;
mod shared;
mod slots;
mod staged;
mod statements;
mod table;
#[cfg(test)]
mod tests;
mod watch;
mod write;

pub(crate) use open::options;
pub use open::{ConnectError, apply, open, steps};
pub use read::PgReader;

use crate::store::fresh::Fresh;
use crate::store::ready::Ready;
use crate::store::{Committed, Wake};
use flight::{Flying, Handed, Landed, Session};
use hints::{Hint, Hints};
use ledger_core::store::{
    Ask, Changed, Changes, Fut, KeyHolder, Known, News, Piece, Recovered, Store, StoreError, Want,
};
use ledger_core::{AgentId, ByTask, Now, Record, SessionId, State, Task, TaskId, Timestamp};
use packed::{Entered, EntryPlace, Found};
use shared::{Basis, Met, Written};
use slots::Place;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use staged::{Image, Staged, agent_block, waits};
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Batches that are written at one time: one with all that it changes, and what is new of those after it.
const SIDE_BY_SIDE: usize = 3;
/// Numbers that are taken at once.
const BLOCK: u64 = 1_000;
/// How long a server that went away is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// Data of new tasks that is kept for their workers.
const FRESH_BYTES: usize = 64 << 20;
/// Between two tries of that.
const PAUSE: Duration = Duration::from_millis(100);
/// Batches with answers to remember, after which old answers are looked for.
const PURGE_EVERY: u32 = 16;

/// The writing half.
pub struct PgStore {
    options: PgConnectOptions,
    /// Where the open batch is decided; none: it was lost, or not opened yet.
    session: Option<Session>,
    /// Those that are free.
    spare: Vec<Session>,
    /// Batches before the open one that are being written, the oldest first.
    flying: VecDeque<Flying>,
    place: Place,
    hints: Hints,
    wake: Arc<Wake>,
    /// When a commit was last made to say that we live, on the server's clock, in ms.
    beat_at: i64,
    meta: Meta,
    /// Numbers that are ours to give: the next, and the end.
    numbers: (u64, u64),
    /// The batch has a transaction.
    begun: bool,
    staged: Staged,
    /// What producers said of the newest tasks.
    fresh: Arc<Fresh>,
    /// Tasks that run with workers of ours, as we wrote them last: a hint, for a write of one that somebody else changed is
    /// refused, and mail tells of it.
    kept: ByTask<Found>,
    /// Tasks that the batch has read, as they are in the database.
    read: ByTask<Found>,
    /// Keys that were held when the batch asked for them.
    held: HashSet<(AgentId, Arc<str>)>,
    /// Agents of which the database had nothing that waits when the batch asked: what comes later is told by a hint, and found then.
    nothing_waits: BTreeSet<AgentId>,
    met: Met,
    /// Those that the batch has changed, for offers.
    ready: Ready,
    /// Tasks that the batch gives to another agent: in whose count they are.
    counted: HashMap<TaskId, AgentId>,
    /// The first time at which a task in the database becomes due, on the steady clock; none is later than the last look.
    due: Option<Timestamp>,
    /// Batches with answers since old ones were looked for.
    answered: u32,
    /// At a start, the other daemons watch over what this one does not hold.
    watches_own: bool,
    /// A batch failed: memory may say what the database does not.
    broken: bool,
    /// One was overtaken: the next is written while nothing else is decided.
    alone: bool,
}

/// What `slots` has of ours.
#[derive(Clone, Copy, Debug, Default)]
struct Meta {
    last_seq: u64,
    last_session: u64,
}

impl std::fmt::Debug for PgStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PgStore")
            .field("place", &self.place)
            .field("meta", &self.meta)
            .finish_non_exhaustive()
    }
}

impl PgStore {
    async fn new(options: PgConnectOptions, conn: PgConnection, fresh: Arc<Fresh>, name: &str) -> Self {
        let wake = Arc::default();
        Self {
            hints: Hints::start(&options, Arc::clone(&wake)).await,
            wake,
            options,
            session: Some(Session::new(conn)),
            spare: Vec::new(),
            flying: VecDeque::new(),
            place: Place::named(name),
            beat_at: 0,
            meta: Meta::default(),
            numbers: (0, 0),
            begun: false,
            staged: Staged::default(),
            fresh,
            kept: ByTask::default(),
            read: ByTask::default(),
            held: HashSet::new(),
            nothing_waits: BTreeSet::new(),
            met: Met::default(),
            ready: Ready::new(Now::steady(Timestamp::EPOCH)),
            counted: HashMap::new(),
            due: None,
            answered: PURGE_EVERY,
            watches_own: false,
            broken: true,
            alone: false,
        }
    }

    /// What rings when other daemons have done something that concerns this one.
    #[must_use]
    pub fn wake(&self) -> Arc<Wake> {
        Arc::clone(&self.wake)
    }

    fn connection(&mut self) -> Result<&mut PgConnection, StoreError> {
        let lost = || StoreError::Unavailable("the connection was lost".to_owned());
        self.session.as_mut().map(|session| &mut session.conn).ok_or_else(lost)
    }

    /// Has a connection to decide on.
    async fn connect_once(&mut self) -> Result<(), StoreError> {
        if self.session.is_none() {
            self.session = self.spare.pop();
        }
        if self.session.is_none() {
            let conn = open::connect(&self.options).await;
            let conn = conn.map_err(|error| StoreError::Unavailable(error.to_string()))?;
            self.session = Some(Session::new(conn));
        }
        Ok(())
    }

    fn usable(&self) -> Result<(), StoreError> {
        if self.broken {
            Err(StoreError::Unavailable("a batch failed; recover first".to_owned()))
        } else {
            Ok(())
        }
    }

    /// Opens the batch's transaction, if it is not.
    async fn begin_once(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        if !self.begun {
            self.connect_once().await?;
            sqlx::raw_sql("BEGIN").execute(self.connection()?).await.map_err(|error| failed(&error))?;
            self.begun = true;
        }
        Ok(())
    }

    async fn roll_back(&mut self) {
        if std::mem::take(&mut self.begun)
            && let Some(session) = &mut self.session
            && sqlx::raw_sql("ROLLBACK").execute(&mut session.conn).await.is_err()
        {
            self.lose_connection();
        }
    }

    fn lose_connection(&mut self) {
        self.begun = false;
        // Its locks went with it.
        if self.session.take().is_some_and(|session| session.locks) {
            self.place.locked = false;
        }
    }

    fn stage(&mut self, mut changes: Changes) -> Result<(), StoreError> {
        for (id, before, payload) in changes.respecified.drain(..) {
            self.staged.moved.insert(id);
            self.staged.left.insert(agent_block(before, id));
            self.counted.insert(id, before);
            let Some(payload) = payload else { continue };
            match self.staged.payloads.iter_mut().find(|(known, _)| *known == payload) {
                Some((_, tasks)) => tasks.push(id),
                None => self.staged.payloads.push((payload, vec![id])),
            }
        }
        self.staged.tasks.reserve(changes.tasks.len());
        self.staged.history.reserve(changes.history.len());
        for changed in changes.tasks.drain(..) {
            self.stage_task(changed)?;
        }
        for record in changes.history.drain(..) {
            self.stage_entry(record)?;
        }
        let staged = &mut self.staged;
        for (id, data) in changes.data.iter().filter(|(_, data)| !data.key.is_empty()) {
            let Some(image) = staged.tasks.get(id) else { continue };
            let holder = KeyHolder { task: *id, digest: data.digest };
            let key = (image.task.spec.agent, Arc::clone(&data.key));
            staged.retakes |= self.held.contains(&key);
            staged.keys.insert(key, holder);
        }
        staged.data.append(&mut changes.data);
        staged.results.extend(changes.results);
        staged.salvage.extend(changes.salvage.into_iter().map(|(id, fence, result)| ((id, fence), result)));
        for (id, notes) in changes.notes {
            staged.note(id, notes);
        }
        staged.letters.extend(changes.redriven.into_iter().map(|id| (id, None)));
        for letter in changes.dead_letters {
            // Both in one piece: the task's own state says which came last.
            let stays = staged.tasks.get(&letter.task).is_none_or(|image| image.task.state == State::Failed);
            staged.letters.insert(letter.task, stays.then_some(letter));
        }
        staged.freed.extend(changes.freed_keys);
        staged.requests.extend(changes.requests.into_iter().map(|row| (Arc::clone(&row.id), row)));
        staged.agents.extend(changes.agents.into_iter().map(|row| (row.id, row)));
        let breakers = changes.breakers.into_iter();
        staged.breakers.extend(breakers.map(|row| ((row.agent, Arc::clone(&row.task_type)), row)));
        staged.budgets.extend(changes.budgets.into_iter().map(|row| (row.agent, row)));
        for row in changes.sessions {
            self.meta.last_session = self.meta.last_session.max(row.session.0);
            staged.sessions.insert(Arc::clone(&row.worker), row);
        }
        staged.events.append(&mut changes.events);
        staged.gone_workers.append(&mut changes.gone_workers);
        staged.events_before = staged.events_before.max(changes.events_before);
        for id in changes.removed {
            let Some(Found { task, .. }) = self.read.get(&id).filter(|found| found.task.state.is_terminal())
            else {
                return Err(StoreError::Statement(format!("removal of task {id}, which has not ended")));
            };
            let (was, version) = ((task.spec.agent, task.state), task.version);
            self.staged.count(id, Some(was), None);
            self.staged.left.insert(agent_block(was.0, id));
            self.staged.freed.insert(id);
            self.staged.removed.push((id, version));
        }
        Ok(())
    }

    fn stage_task(&mut self, changed: Changed) -> Result<(), StoreError> {
        let Changed { task, expected, was } = changed;
        let id = task.id;
        let is = (task.spec.agent, task.state);
        let before = match self.staged.tasks.get_mut(&id) {
            Some(image) if image.task.version != expected => {
                return Err(StoreError::Statement(format!(
                    "task {id} was decided from version {expected}, but {} is staged",
                    image.task.version
                )));
            }
            Some(image) => {
                let before = (image.task.spec.agent, image.task.state);
                image.task = Arc::clone(&task);
                Some(before)
            }
            None => {
                let may_have_waited = was.is_some_and(|was| !was.is_terminal() && was != State::Running);
                let found = match expected {
                    0 => None,
                    // One that is offered while the batch that changed it is written was not read in this one.
                    _ => {
                        Some(self.read.get(&id).cloned().or_else(|| self.underway(id).flatten()).ok_or_else(
                            || StoreError::Statement(format!("task {id} was decided without being read")),
                        )?)
                    }
                };
                let (before, newest) = found.map(|found| (found.task, found.newest)).unzip();
                let ran = was == Some(State::Running);
                let newest = newest.flatten();
                let image = Image { task: Arc::clone(&task), expected, may_have_waited, before, ran, newest };
                self.staged.tasks.insert(id, image);
                was.map(|was| (is.0, was))
            }
        };
        // Whose it was, where this batch moved it.
        let before = before.map(|(agent, state)| (self.counted.remove(&id).unwrap_or(agent), state));
        if before != Some(is) {
            self.staged.count(id, before, Some(is));
        }
        // What does not wait is offered to nobody.
        if waits(&task) {
            self.ready.put(task);
        } else {
            self.ready.forget(id);
        }
        Ok(())
    }

    fn stage_entry(&mut self, record: Record) -> Result<(), StoreError> {
        let Some(image) = self.staged.tasks.get_mut(&record.task) else {
            return Err(StoreError::Statement(format!("an entry of task {}, which has no row", record.task)));
        };
        self.meta.last_seq += 1;
        let (slot, seq, at) = (self.place.slot, self.meta.last_seq, record.at);
        let before = image.newest.replace(EntryPlace { slot, seq, at });
        self.staged.history.push(Entered { record, before });
        Ok(())
    }

    /// Ends the open batch: it is written as soon as the one before it is durable.
    fn end(&mut self) -> Result<(), StoreError> {
        self.usable()?;
        let staged = Arc::new(std::mem::take(&mut self.staged));
        self.read.clear();
        self.held.clear();
        self.nothing_waits.clear();
        self.counted.clear();
        let mut purge = None;
        if !staged.requests.is_empty() {
            self.answered += 1;
            if self.answered >= PURGE_EVERY {
                self.answered = 0;
                purge = Some((self.ready.now().at, 100 + 2 * PURGE_EVERY as usize * staged.requests.len()));
            }
        }
        let now = self.ready.now();
        let due = staged.tasks.values().filter(|image| image.task.is_claimable_state());
        let due = due.map(|image| image.task.due_at(now)).filter(|due| *due > now.at).min();
        self.due = self.due.into_iter().chain(due).min();
        if self.flying.len() >= SIDE_BY_SIDE {
            return Err(StoreError::Statement("too many batches at one time".to_owned()));
        }
        let handed = Handed {
            session: self.session.take(),
            begun: std::mem::take(&mut self.begun),
            hint: Self::hint_of(&staged),
            met: Met { last: std::mem::take(&mut self.met.last), committed: self.met.committed },
            meta: self.meta,
            basis: Basis::of(&staged, &self.place),
            specs_ahead: staged.keys.is_empty() || self.keys_are_ours_alone(&staged),
            staged,
            // Without other daemons nobody holds anything.
            patient: std::mem::take(&mut self.alone) || self.place.others.is_empty(),
            purge,
        };
        self.met.committed = SessionId(self.meta.last_session);
        self.session = self.spare.pop();
        let flying = handed.start(self.flying.back_mut(), self.options.clone());
        self.flying.push_back(flying);
        Ok(())
    }

    /// Whether nobody can have a key that a batch brings, not even for a while.
    fn keys_are_ours_alone(&self, staged: &Staged) -> bool {
        self.place.others.is_empty()
            && !staged.retakes
            && self.on_the_way().chain([staged]).all(|staged| staged.moved.is_empty())
    }

    /// Waits for the oldest batch that is being written.
    async fn land(&mut self) -> Result<Committed, StoreError> {
        let Some(flying) = self.flying.front_mut() else {
            return Err(StoreError::Statement("no batch was handed over".to_owned()));
        };
        let landed = (&mut flying.task).await;
        // Nothing is awaited from here on: whoever drops this future asks again before or after all of it.
        let Some(flying) = self.flying.pop_front() else {
            return Err(StoreError::Statement("no batch was handed over".to_owned()));
        };
        let Ok(Landed { session, written }) = landed else {
            self.broken = true;
            return Err(StoreError::Unknown("what wrote a batch has panicked".to_owned()));
        };
        match self.session {
            None => self.session = session,
            Some(_) => self.spare.extend(session),
        }
        // The one that was lost may have had it.
        self.place.locked &= self.holds_lock();
        match written {
            Ok(Some(written)) => {
                self.know(&flying, written);
                Ok(Committed::up_to(flying.meta.last_seq))
            }
            failed => {
                // The next was decided on it. What it was decided in ends with its connection.
                self.broken = true;
                self.flying.clear();
                self.place.locked &= self.holds_lock();
                Err(match failed {
                    Ok(_) => self.lose_place(),
                    Err(error) => error,
                })
            }
        }
    }

    /// Whether one of our connections holds the slot's lock, as far as is known here.
    fn holds_lock(&self) -> bool {
        self.session.iter().chain(&self.spare).any(|session| session.locks)
            || self.flying.iter().any(|flying| flying.locks)
    }

    /// A batch is durable.
    fn know(&mut self, flying: &Flying, written: Written) {
        let mut hint = flying.hint;
        hint.news |= written.mail;
        self.place.agents.extend(written.agents);
        self.place.breakers.extend(written.breakers);
        if !self.place.others.is_empty() || flying.staged.hint.news {
            self.hints.tell(self.place.slot, hint);
        }
        let ended = flying.staged.tasks.values().filter(|image| image.task.state.is_terminal());
        self.fresh.change(
            flying.staged.data.iter().map(|(id, data)| (*id, Arc::clone(data))),
            ended.map(|image| image.task.id),
        );
        // What waits is found in the database from now on, but for what was changed since.
        self.nothing_waits.clear();
        for image in flying.staged.tasks.values() {
            let id = image.task.id;
            let holder = image.task.holder.as_ref();
            let ours = holder.is_some_and(|holder| holder.session.slot() == self.place.slot);
            if ours && image.task.state == State::Running {
                self.kept.insert(id, image.found());
            } else {
                self.kept.remove(&id);
            }
            let changed = |staged: &Staged| staged.tasks.contains_key(&id);
            if self.ready.entry(id).is_some() && !changed(&self.staged) && !self.on_the_way().any(changed) {
                self.ready.forget(id);
            }
        }
    }

    /// The last that was said of a task by a batch that is not known to be durable; none of it: it was removed.
    fn underway(&self, id: TaskId) -> Option<Option<Found>> {
        let mut said = None;
        for staged in self.on_the_way() {
            if staged.removed.iter().any(|(removed, _)| *removed == id) {
                said = Some(None);
            } else if let Some(image) = staged.tasks.get(&id) {
                said = Some(Some(image.found()));
            }
        }
        said
    }

    /// What batches before the open one have changed and may not be durable, the oldest first.
    fn on_the_way(&self) -> impl Iterator<Item = &Staged> {
        self.flying.iter().map(|flying| &*flying.staged)
    }

    /// What of a batch concerns other daemons.
    fn hint_of(staged: &Staged) -> Hint {
        let mut hint = staged.hint;
        hint.news |= !staged.agents.is_empty() || !staged.breakers.is_empty();
        hint.work = staged.tasks.values().any(Image::waits);
        hint.ends = staged.tasks.values().any(|image| image.task.state.is_terminal());
        hint
    }

    /// After an error the transaction is over, and what was staged is void.
    async fn or_end<T>(&mut self, done: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(error) = &done {
            self.broken = true;
            if matches!(error, StoreError::Unavailable(_)) {
                // Whatever its state, the next one is known.
                self.lose_connection();
            } else {
                self.roll_back().await;
            }
        }
        done
    }
}

impl Store for PgStore {
    type Proof = Committed;

    fn recover(&mut self, now: Now) -> Fut<'_, Recovered> {
        Box::pin(self.read_everything(now))
    }

    fn timed<'a>(&'a mut self, queues: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece> {
        Box::pin(async move {
            let timed = self.find_timed(queues, from).await;
            self.or_end(timed).await
        })
    }

    fn ids(&mut self, n: usize) -> Fut<'_, u64> {
        Box::pin(async move {
            let n = n as u64;
            let (next, end) = self.numbers;
            if next + n <= end {
                self.numbers.0 += n;
                return Ok(next);
            }
            self.usable()?;
            let first = self.take_numbers(n).await;
            self.or_end(first).await
        })
    }

    fn begin<'a>(&'a mut self, want: &'a Want, now: Now) -> Fut<'a, Known> {
        Box::pin(async move {
            self.usable()?;
            self.ready.advance(now);
            let known = match self.connect_once().await {
                Ok(()) => self.read_wanted(want).await,
                Err(error) => Err(error),
            };
            self.or_end(known).await
        })
    }

    fn settled<'a>(&'a mut self, leases: &'a [(TaskId, u64)]) -> Fut<'a, Vec<Option<Record>>> {
        Box::pin(async move {
            let found = self.read_settled(leases).await;
            self.or_end(found).await
        })
    }

    fn offer<'a>(&'a mut self, asks: &'a [Ask], now: Now) -> Fut<'a, Vec<Vec<Arc<Task>>>> {
        Box::pin(async move {
            let offers = self.find_offers(asks, now).await;
            self.or_end(offers).await
        })
    }

    fn gated(&mut self, agent: AgentId) -> Fut<'_, Vec<Arc<Task>>> {
        Box::pin(async move {
            let gated = self.find_gated(agent).await;
            self.or_end(gated).await
        })
    }

    fn live<'a>(&'a mut self, agents: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece> {
        Box::pin(async move {
            let live = self.find_live(agents, from).await;
            self.or_end(live).await
        })
    }

    fn oldest(&mut self, now: Now) -> Fut<'_, Vec<(AgentId, Timestamp)>> {
        Box::pin(async move {
            let oldest = self.find_oldest(now).await;
            self.or_end(oldest).await
        })
    }

    fn ahead<'a>(
        &'a mut self,
        task: &'a Task,
        types: Option<&'a [Arc<str>]>,
        most: usize,
        now: Now,
    ) -> Fut<'a, usize> {
        Box::pin(async move {
            let count = self.count_ahead(task, types, most, now).await;
            self.or_end(count).await
        })
    }

    fn write(&mut self, changes: Changes) -> Fut<'_, Vec<TaskId>> {
        let written = self.usable().and_then(|()| self.stage(changes));
        self.broken |= written.is_err();
        Box::pin(std::future::ready(written.map(|()| Vec::new())))
    }

    fn submit(&mut self) -> Fut<'_, ()> {
        let ended = self.end();
        self.broken |= ended.is_err();
        Box::pin(std::future::ready(ended))
    }

    /// Where there are other daemons, theirs are beside ours already.
    fn side_by_side(&self) -> usize {
        if self.place.others.is_empty() { SIDE_BY_SIDE } else { 1 }
    }

    fn durable(&mut self) -> Fut<'_, Self::Proof> {
        Box::pin(self.land())
    }

    fn next_due(&self, now: Now) -> Option<Timestamp> {
        let staged = self.ready.next_due(now);
        self.due
            .filter(|due| *due > now.at)
            .into_iter()
            .chain(staged)
            .chain(self.place.look_at(now, self.wake.has_ends()))
            .min()
    }

    fn has_news(&self, now: Now, wanted: bool) -> bool {
        self.wake.has_news() || self.place.is_due(now, wanted, self.wake.has_ends())
    }

    fn news<'a>(&'a mut self, awaited: &'a [TaskId], wanted: bool, now: Now) -> Fut<'a, News> {
        Box::pin(async move {
            self.usable()?;
            let news = match self.connect_once().await {
                Ok(()) => self.look(awaited, wanted, now).await,
                Err(error) => Err(error),
            };
            self.or_end(news).await
        })
    }

    fn anew<'a>(&'a mut self, tasks: &'a [TaskId], now: Now) -> Fut<'a, Option<(News, Vec<Task>)>> {
        Box::pin(self.read_anew(tasks, now))
    }

    fn leave(&mut self) -> Fut<'_, ()> {
        Box::pin(self.leave_slot())
    }
}

/// What an error says, of anything but a commit: nothing was written.
fn failed(error: &sqlx::Error) -> StoreError {
    let Some(said) = error.as_database_error() else {
        return match error {
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => {
                StoreError::Corrupt(error.to_string())
            }
            _ => StoreError::Unavailable(error.to_string()),
        };
    };
    let code = said.code().unwrap_or_default();
    match &*code {
        // A key, a request or an agent that another daemon wrote at the same time; or each waited for the other.
        "23505" => StoreError::Outdated("what was to be made"),
        "40001" | "40P01" => StoreError::Outdated("a row"),
        "53100" => StoreError::Full,
        "XX001" | "XX002" => StoreError::Corrupt(said.to_string()),
        // Standing by, shutting down, out of connections or memory, or cancelled by a time limit.
        "25006" | "55P03" | "57014" => StoreError::Unavailable(said.to_string()),
        code if code.starts_with("57P") || code.starts_with("08") || code.starts_with("53") => {
            StoreError::Unavailable(said.to_string())
        }
        _ => StoreError::Statement(said.to_string()),
    }
}
