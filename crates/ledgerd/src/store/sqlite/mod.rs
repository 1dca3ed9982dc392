//! The ledger in one SQLite file, with one writer; large payloads in files beside it.
//!
//! One process owns everything, so nothing is ever overtaken and what is live is in memory. Invariants: one connection
//! writes, one transaction per batch, in the order in which they were decided; whatever a batch on its way to the file has
//! changed is in memory until it is durable, so what is read from the file is never older than what was decided; memory
//! that a failed batch has touched is not used again before a recovery.

mod args;
pub(super) mod backup;
mod ballast;
mod checkpoint;
mod insert;
mod lookup;
pub(super) mod moving;
mod open;
mod packed;
mod payloads;
mod pipeline;
#[cfg(test)]
mod rate;
mod read;
mod recover;
mod staged;
mod sweep;
#[cfg(test)]
mod tests;
mod write;

pub use open::{OpenError, Options, open, steps};
pub use read::SqliteReader;

use crate::store::fresh::Fresh;
use crate::store::ready::Ready;
use crate::store::{Committed, SMALL_RESULT};
use ballast::Ballast;
use checkpoint::Checkpoints;
use ledger_core::limits::REQUEST_MEMORY;
use ledger_core::store::{Ask, Changed, Changes, Fut, Known, Piece, Recovered, Store, StoreError, Want};
use ledger_core::{AgentId, Now, Record, State, Task, TaskId, Timestamp};
use lookup::Lookup;
use pipeline::Pipeline;
use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;
use staged::{BLOCK_BITS, Born, Image, Part, Row, Sealed, Staged, Tallies, WORTH, is_live};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::sync::Arc;
use sweep::Sweeper;

const FULL: i32 = 13;
const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const READ_ONLY: i32 = 8;
const IO: i32 = 10;
const CORRUPT: i32 = 11;
const CANNOT_OPEN: i32 = 14;
const NOT_A_DATABASE: i32 = 26;

/// The writing half.
pub struct SqliteStore {
    pipeline: Pipeline,
    lookup: Lookup,
    /// For what is read at the start, and of tasks that have ended. Sees what is committed.
    conn: SqliteConnection,
    checkpoints: Checkpoints,
    ballast: Ballast,
    sweeper: Sweeper,
    fresh: Arc<Fresh>,
    ready: Ready,
    staged: Staged,
    /// Handed over and not known to be durable, the oldest first.
    underway: VecDeque<Underway>,
    tallies: Tallies,
    /// Read for this batch although they have ended.
    visited: Vec<TaskId>,
    /// Tasks that the batch gives to another agent, whose row is still to be written: in whose count they are.
    counted: HashMap<TaskId, AgentId>,
    oldest_request: Timestamp,
    /// A batch failed: memory may say what the file does not.
    broken: bool,
    /// Held locked; the lock ends with the file.
    _lock: File,
}

/// A batch on its way to the file, as far as the next ones have to know of it.
struct Underway {
    parts: Vec<Arc<Part>>,
    sealed: Arc<Sealed>,
    visited: Vec<TaskId>,
    /// Number of its last history row.
    seq: u64,
}

impl Underway {
    fn parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter().map(|part| &**part).chain([&self.sealed.last])
    }
}

impl std::fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteStore").field("meta", &self.tallies.meta).finish_non_exhaustive()
    }
}

impl SqliteStore {
    fn new(
        (pipeline, lookup): (Pipeline, Lookup),
        conn: SqliteConnection,
        (checkpoints, ballast, sweeper): (Checkpoints, Ballast, Sweeper),
        fresh: Arc<Fresh>,
        lock: File,
    ) -> Self {
        Self {
            pipeline,
            lookup,
            conn,
            checkpoints,
            ballast,
            sweeper,
            fresh,
            ready: Ready::new(Now::steady(Timestamp::EPOCH)),
            staged: Staged::default(),
            underway: VecDeque::new(),
            tallies: Tallies::default(),
            visited: Vec::new(),
            counted: HashMap::new(),
            oldest_request: Timestamp::FAR,
            broken: true,
            _lock: lock,
        }
    }

    /// Closes the file in good order: the last connection moves the log into it. Readers are to be closed before.
    ///
    /// # Errors
    /// That SQLite could not; everything committed is durable all the same.
    pub async fn close(self) -> Result<(), StoreError> {
        self.sweeper.close().await;
        self.checkpoints.close().await.map_err(|error| failed(&error))?;
        self.conn.close().await.map_err(|error| failed(&error))?;
        self.lookup.close().map_err(|error| failed(&error))?;
        self.pipeline.close().map_err(|error| failed(&error))
    }

    fn usable(&self) -> Result<(), StoreError> {
        if self.broken {
            Err(StoreError::Unavailable("a batch failed; recover first".to_owned()))
        } else {
            Ok(())
        }
    }

    fn stage(&mut self, mut changes: Changes) -> Result<(), StoreError> {
        for (id, before, payload) in changes.respecified.drain(..) {
            if !self.staged.moved.iter().any(|(moved, _)| *moved == id) {
                self.staged.moved.push((id, before));
            }
            self.counted.insert(id, before);
            let Some(payload) = payload else { continue };
            self.fresh.forget(id);
            match self.staged.payloads.iter_mut().find(|(known, _)| *known == payload) {
                Some((_, tasks)) => tasks.push(id),
                None => self.staged.payloads.push((payload, vec![id])),
            }
        }
        for changed in changes.tasks.drain(..) {
            self.stage_task(changed)?;
        }
        for record in changes.history.drain(..) {
            self.stage_record(record)?;
        }
        let staged = &mut self.staged;
        if let Some((id, _)) = changes.data.iter().find(|(id, _)| self.ready.entry(*id).is_none()) {
            return Err(StoreError::Statement(format!("data of task {id}, which is not written")));
        }
        staged.data.append(&mut changes.data);
        for (id, result) in changes.results.drain(..) {
            if result.len() <= SMALL_RESULT {
                staged.small.push((id, result));
            } else {
                staged.results.push((id, result));
            }
        }
        staged.salvage.append(&mut changes.salvage);
        staged.notes.append(&mut changes.notes);
        for id in changes.redriven {
            staged.letters.insert(id, None);
        }
        for letter in changes.dead_letters {
            // Both in one piece: the task's own state says which came last.
            let stays = self.ready.entry(letter.task).is_none_or(|entry| entry.task.state == State::Failed);
            staged.letters.insert(letter.task, stays.then_some(letter));
        }
        for id in changes.freed_keys {
            staged.free(id);
        }
        for row in &changes.requests {
            self.oldest_request = self.oldest_request.min(row.at);
        }
        staged.requests.append(&mut changes.requests);
        staged.agents.extend(changes.agents.into_iter().map(|row| (row.id, row)));
        staged
            .breakers
            .extend(changes.breakers.into_iter().map(|row| ((row.agent, Arc::clone(&row.task_type)), row)));
        staged.budgets.extend(changes.budgets.into_iter().map(|row| (row.agent.unwrap_or(AgentId(0)), row)));
        staged.events.append(&mut changes.events);
        staged.gone_workers.append(&mut changes.gone_workers);
        staged.events_before = staged.events_before.max(changes.events_before);
        for row in changes.sessions {
            self.tallies.meta.last_session = self.tallies.meta.last_session.max(row.session.0);
            staged.sessions.insert(Arc::clone(&row.worker), row);
        }
        for id in changes.removed {
            self.stage_removal(id)?;
        }
        if self.staged.history.len() >= WORTH && self.staged.keeps_its_order() {
            let part = Arc::new(self.part());
            self.staged.parts.push(Arc::clone(&part));
            self.pipeline.send(part);
        }
        Ok(())
    }

    /// What of the batch is final.
    fn part(&mut self) -> Part {
        let staged = &mut self.staged;
        let specs = staged.data.drain(..).filter_map(|(id, data)| {
            let spec = Arc::clone(&self.ready.entry(id)?.task.spec);
            let keyed = !data.key.is_empty() && !staged.freed.contains(&id);
            Some(Born { id, spec, data, keyed })
        });
        let specs = specs.collect();
        let agent = |id: TaskId| self.ready.entry(id).map_or(0, |entry| entry.task.spec.agent.0);
        let moved = staged.moved.drain(..).map(|(id, before)| (id.0, agent(id), before.0)).collect();
        Part {
            freed: std::mem::take(&mut staged.freed_since),
            moved,
            specs,
            history: std::mem::take(&mut staged.history),
            results: std::mem::take(&mut staged.results),
        }
    }

    /// Ends the open batch.
    fn seal(&mut self) -> Sealed {
        self.staged.tasks.sort_unstable();
        // The last result of each comes first.
        self.staged.small.reverse();
        self.staged.small.sort_by_key(|(id, _)| *id);
        self.staged.small.dedup_by_key(|(id, _)| *id);
        let mut small = std::mem::take(&mut self.staged.small).into_iter().peekable();
        let mut apart = Vec::new();
        let mut tasks = Vec::with_capacity(self.staged.tasks.len());
        for id in self.staged.tasks.drain(..) {
            let Some(entry) = self.ready.entry_mut(id) else { continue };
            entry.dirty = false;
            entry.underway += 1;
            while let Some(before) = small.next_if(|(of, _)| *of < id) {
                apart.push(before);
            }
            let (task, history) = (Arc::clone(&entry.task), entry.history);
            let mut image = Image { task, history, result: None };
            if let Some((_, result)) = small.next_if(|(of, _)| *of == id) {
                // Never written again, so no other image takes the result away.
                if image.task.state == State::Done {
                    image.result = Some(result);
                } else {
                    apart.push((id, result));
                }
            }
            tasks.push(image);
        }
        apart.extend(small);
        self.staged.results.append(&mut apart);
        let last = self.part();
        let staged = std::mem::take(&mut self.staged);
        let count =
            |agent, state| self.tallies.counts.get(agent).map_or(0, |counts| counts[usize::from(state)]);
        let counts =
            staged.counts.iter().map(|(agent, state)| (*agent, *state, count(agent, *state))).collect();
        let now = self.ready.now().at;
        Sealed {
            last,
            tasks,
            counts,
            blocks: staged.blocks.iter().map(|block| (*block, self.tallies.live(*block))).collect(),
            meta: self.tallies.meta,
            purge: (now >= self.oldest_request.after(REQUEST_MEMORY)).then(|| now.before(REQUEST_MEMORY)),
            staged,
        }
    }

    fn stage_task(&mut self, changed: Changed) -> Result<(), StoreError> {
        let Changed { task, expected, .. } = changed;
        let stored = self.ready.entry(task.id).map_or(0, |entry| entry.task.version);
        if stored != expected {
            return Err(StoreError::Statement(format!(
                "task {} was decided from version {expected}, but {stored} is stored",
                task.id
            )));
        }
        let (id, agent, now) = (task.id, task.spec.agent, task.state);
        self.tallies.meta.last_task = self.tallies.meta.last_task.max(id.0);
        let (was, dirty) = self.ready.put(task);
        if !dirty {
            self.staged.tasks.push(id);
        }
        let before = was.map_or(agent, |_| self.agent_before(id, agent));
        if was == Some(now) && before == agent {
            return Ok(());
        }
        if let Some(was) = was {
            let count = &mut self.tallies.counts.entry(before).or_default()[usize::from(was.code())];
            *count = count.saturating_sub(1);
            self.staged.counts.insert((before, was.code()));
        }
        self.tallies.counts.entry(agent).or_default()[usize::from(now.code())] += 1;
        self.staged.counts.insert((agent, now.code()));
        let (lived, lives) = (was.is_some_and(is_live), is_live(now));
        if lived != lives {
            let block = id.0 >> BLOCK_BITS;
            let live = self.tallies.blocks.entry(block).or_default();
            *live = if lives { *live + 1 } else { live.saturating_sub(1) };
            self.staged.blocks.insert(block);
        }
        Ok(())
    }

    fn stage_removal(&mut self, id: TaskId) -> Result<(), StoreError> {
        let Some(entry) = self.ready.entry(id).filter(|entry| entry.task.state.is_terminal() && !entry.dirty)
        else {
            return Err(StoreError::Statement(format!("removal of task {id}, which has not ended")));
        };
        let (agent, state) = (entry.task.spec.agent, entry.task.state.code());
        let count = &mut self.tallies.counts.entry(agent).or_default()[usize::from(state)];
        *count = count.saturating_sub(1);
        self.staged.counts.insert((agent, state));
        self.staged.free(id);
        self.staged.left.insert(write::agent_block(agent, id));
        self.staged.removed.push(id);
        self.fresh.forget(id);
        self.ready.forget(id);
        Ok(())
    }

    /// Whose count a task was in until this batch gave it to another agent. Told once for each move.
    fn agent_before(&mut self, id: TaskId, agent: AgentId) -> AgentId {
        match self.counted.remove(&id) {
            Some(before) => before,
            None => agent,
        }
    }

    fn stage_record(&mut self, record: Record) -> Result<(), StoreError> {
        let Some(entry) = self.ready.entry_mut(record.task) else {
            return Err(StoreError::Statement(format!(
                "history of task {}, which is not written",
                record.task
            )));
        };
        self.tallies.meta.last_seq += 1;
        let seq = self.tallies.meta.last_seq;
        let prev = (entry.history != 0).then_some(entry.history);
        entry.history = seq;
        // The task's row names its newest history row, so it is written again.
        if !entry.dirty {
            entry.dirty = true;
            self.staged.tasks.push(record.task);
        }
        self.staged.history.push(Row { seq, prev, record });
        Ok(())
    }

    /// A batch is durable: what has ended, and nothing on its way changes, leaves memory.
    fn settle(&mut self, mut batch: Underway) {
        for image in &batch.sealed.tasks {
            if let Some(entry) = self.ready.entry_mut(image.task.id) {
                entry.underway -= 1;
            }
        }
        let changed = batch.sealed.tasks.iter().map(|image| image.task.id);
        for id in changed.chain(batch.visited.drain(..)) {
            let Some(entry) = self.ready.entry(id) else { continue };
            if entry.task.state.is_terminal() && !entry.dirty && entry.underway == 0 {
                self.ready.forget(id);
            }
        }
        for (block, _) in &batch.sealed.blocks {
            if self.tallies.blocks.get(block) == Some(&0) {
                self.tallies.blocks.remove(block);
            }
        }
        let new = batch.parts().flat_map(|part| &part.specs);
        let ended = batch.sealed.tasks.iter().filter(|image| image.task.state.is_terminal());
        self.fresh
            .change(new.map(|born| (born.id, Arc::clone(&born.data))), ended.map(|image| image.task.id));
    }

    /// Rows that the file may not have yet: of batches on their way, and of the open one.
    fn sent(&self) -> impl Iterator<Item = &Part> {
        let underway = self.underway.iter().flat_map(Underway::parts);
        underway.chain(self.staged.parts.iter().map(|part| &**part))
    }

    /// Whether a batch on its way removes this task.
    fn leaves(&self, id: TaskId) -> bool {
        self.underway.iter().any(|batch| batch.sealed.staged.removed.contains(&id))
    }
}

impl Store for SqliteStore {
    type Proof = Committed;

    fn recover(&mut self, now: Now) -> Fut<'_, Recovered> {
        Box::pin(self.read_everything(now))
    }

    /// All in one piece: they are in memory.
    fn timed<'a>(&'a mut self, queues: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece> {
        let timed = self.usable().map(|()| (self.find_timed(queues, from), None));
        Box::pin(std::future::ready(timed))
    }

    fn ids(&mut self, n: usize) -> Fut<'_, u64> {
        let first = self.tallies.meta.last_task + 1;
        self.tallies.meta.last_task += n as u64;
        Box::pin(std::future::ready(Ok(first)))
    }

    fn begin<'a>(&'a mut self, want: &'a Want, now: Now) -> Fut<'a, Known> {
        Box::pin(async move {
            self.usable()?;
            if self.checkpoints.was_full() {
                self.ballast.give_up();
            }
            self.ballast.restore(now.at);
            self.sweeper.start(now.at);
            if self.checkpoints.is_long() {
                // The log starts over when nothing of it is being written.
                self.pipeline.drain().await;
                self.checkpoints.restart().await;
            }
            self.ready.advance(now);
            self.read_wanted(want).await
        })
    }

    fn settled<'a>(&'a mut self, leases: &'a [(TaskId, u64)]) -> Fut<'a, Vec<Option<Record>>> {
        Box::pin(self.read_settled(leases))
    }

    fn may_offer(&mut self, now: Now) -> bool {
        self.ready.has_any(now)
    }

    fn offer<'a>(&'a mut self, asks: &'a [Ask], now: Now) -> Fut<'a, Vec<Vec<Arc<Task>>>> {
        let offers = asks.iter().map(|ask| self.ready.offer(ask, now)).collect();
        Box::pin(std::future::ready(self.usable().map(|()| offers)))
    }

    fn gated(&mut self, agent: AgentId) -> Fut<'_, Vec<Arc<Task>>> {
        Box::pin(std::future::ready(Ok(self.ready.gated(agent))))
    }

    /// All in one piece: they are in memory.
    fn live<'a>(&'a mut self, agents: &'a BTreeSet<AgentId>, from: TaskId) -> Fut<'a, Piece> {
        let live = self.usable().map(|()| (self.ready.live(agents, from), None));
        Box::pin(std::future::ready(live))
    }

    fn oldest(&mut self, now: Now) -> Fut<'_, Vec<(AgentId, Timestamp)>> {
        let oldest = self.usable().map(|()| self.ready.oldest(now));
        Box::pin(std::future::ready(oldest))
    }

    fn ahead<'a>(
        &'a mut self,
        task: &'a Task,
        types: Option<&'a [Arc<str>]>,
        most: usize,
        now: Now,
    ) -> Fut<'a, usize> {
        let ahead = self.usable().map(|()| self.ready.ahead(task, types, most, now));
        Box::pin(std::future::ready(ahead))
    }

    fn write(&mut self, changes: Changes) -> Fut<'_, Vec<TaskId>> {
        let written = self.usable().and_then(|()| self.stage(changes));
        self.broken |= written.is_err();
        Box::pin(std::future::ready(written.map(|()| Vec::new())))
    }

    fn submit(&mut self) -> Fut<'_, ()> {
        let submitted = self.usable().map(|()| {
            let parts = std::mem::take(&mut self.staged.parts);
            let sealed = Arc::new(self.seal());
            self.pipeline.commit(Arc::clone(&sealed));
            let (visited, seq) = (std::mem::take(&mut self.visited), self.tallies.meta.last_seq);
            self.underway.push_back(Underway { parts, sealed, visited, seq });
        });
        Box::pin(std::future::ready(submitted))
    }

    fn durable(&mut self) -> Fut<'_, Self::Proof> {
        Box::pin(async move {
            let done = self.pipeline.next().await;
            let Some(batch) = self.underway.pop_front() else {
                return Err(StoreError::Statement("no batch was handed over".to_owned()));
            };
            // Until a recovery memory is ahead of the file.
            let done =
                done.inspect_err(|_| self.broken = true).map_err(|error| match failed_to_write(&error) {
                    // There is room now, and what needs none of it is decided as before.
                    StoreError::Full if self.ballast.give_up() => {
                        StoreError::Outdated("the room on the disk")
                    }
                    error => error,
                })?;
            self.checkpoints.wrote(done.bytes);
            self.sweeper.left(done.left);
            if let Some(oldest) = done.oldest_request {
                self.oldest_request = oldest;
            }
            let proof = Committed::up_to(batch.seq);
            self.settle(batch);
            Ok(proof)
        })
    }

    fn is_short(&self) -> bool {
        self.ballast.is_gone()
    }

    fn next_due(&self, now: Now) -> Option<Timestamp> {
        self.ready.next_due(now)
    }
}

/// An error of either way to SQLite.
trait Failure: std::fmt::Display {
    /// SQLite's own number, without the finer part.
    fn code(&self) -> Option<i32>;
}

impl Failure for sqlx::Error {
    fn code(&self) -> Option<i32> {
        let code = self.as_database_error()?.code()?;
        code.parse::<i32>().ok().map(|code| code & 0xff)
    }
}

impl Failure for rusqlite::Error {
    fn code(&self) -> Option<i32> {
        Some(self.sqlite_error()?.extended_code & 0xff)
    }
}

/// A read that failed: nothing was written.
fn failed(error: &impl Failure) -> StoreError {
    match error.code() {
        Some(CORRUPT | NOT_A_DATABASE) => StoreError::Corrupt(error.to_string()),
        Some(BUSY | LOCKED | IO | CANNOT_OPEN) | None => StoreError::Unavailable(error.to_string()),
        Some(_) => StoreError::Statement(error.to_string()),
    }
}

/// A statement of a batch failed, its commit included.
fn failed_to_write(error: &impl Failure) -> StoreError {
    match error.code() {
        Some(FULL) => StoreError::Full,
        Some(CORRUPT | NOT_A_DATABASE) => StoreError::Corrupt(error.to_string()),
        Some(BUSY | LOCKED | READ_ONLY | CANNOT_OPEN) => StoreError::Unavailable(error.to_string()),
        // The commit may have reached the file.
        Some(IO) => StoreError::Unknown(error.to_string()),
        _ => StoreError::Statement(error.to_string()),
    }
}
