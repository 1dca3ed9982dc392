//! Retention: tasks that ended long enough ago leave the ledger, with all that belongs to them.
//!
//! Works beside the loop and at its leisure: a look at a stretch of tasks, then a few of them removed in one commit, then
//! a rest of several times that. So callers find a loop that is mostly idle, however much there is to remove. Nothing is
//! decided from what was read: the loop judges every task again. What the store can tidy without the loop, it does in
//! steps as small.

use super::batch::Batch;
use super::command::{Answer, Command, Leaving, LedgerError};
use super::handle::Handle;
use ledger_core::limits::{FORGOTTEN_AT_ONCE, REMOVED_AT_ONCE};
use ledger_core::{TaskId, Timestamp};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Tasks in one look.
const LOOK: usize = 1_000;
/// A rest is so many times as long as what was done before it.
const REST: u32 = 4;
/// And no shorter than this.
const SHORTEST_REST: Duration = Duration::from_millis(5);
/// The longest time from one walk through the ledger to the next.
const SELDOM: Duration = Duration::from_secs(600);
/// The shortest.
const OFTEN: Duration = Duration::from_millis(100);
/// A worker that has not been seen for so long, and holds nothing, is forgotten.
const WORKERS: Duration = Duration::from_secs(7 * 24 * 3_600);

/// How long ended tasks are kept; none: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// DONE and CANCELLED ones, and dead letters that were discarded.
    pub done: Option<Duration>,
    /// FAILED ones, and the events of agents.
    pub failed: Option<Duration>,
}

impl Retention {
    fn leaving(self, now: Timestamp) -> Leaving {
        Leaving {
            done: self.done.map(|kept| now.before(kept)),
            failed: self.failed.map(|kept| now.before(kept)),
        }
    }

    /// The shortest time for which an ended task is kept; none: all are for ever.
    fn shortest(self) -> Option<Duration> {
        self.done.into_iter().chain(self.failed).min()
    }

    /// From one walk to the next: nothing stays much longer than it is to be kept.
    fn interval(self) -> Duration {
        (self.shortest().unwrap_or(SELDOM) / 8).clamp(OFTEN, SELDOM)
    }
}

impl Handle {
    /// Removes what retention lets go of, again and again, and has the store tidy up. Ends only with the ledger.
    pub async fn keep(self, retention: Retention) {
        self.shared.retention.get_or_init(|| retention);
        // Beside each other: a long walk of the one is no reason for the other to wait.
        tokio::select! {
            () = self.remove_expired(retention) => {}
            () = self.tidy(retention) => {}
        }
    }

    async fn remove_expired(&self, retention: Retention) {
        let mut forgot = None;
        loop {
            let now = self.clock().uptime();
            // Seldom, however short the retention: it commits whether or not there is something to forget.
            let forget = forgot.is_none_or(|before| now.saturating_sub(before) >= SELDOM);
            if forget {
                forgot = Some(now);
            }
            match self.walk(retention, forget).await {
                Ok(0) => {}
                Ok(tasks) => tracing::info!(tasks, "removed what retention does not keep"),
                Err(LedgerError::Draining) => return,
                Err(error) => tracing::warn!(%error, "retention removed nothing more; it will try again"),
            }
            tokio::time::sleep(retention.interval()).await;
        }
    }

    /// Has the store do what it does by itself, a step at a time. Never ends.
    async fn tidy(&self, retention: Retention) {
        loop {
            let begun = self.clock().uptime();
            match self.reader().tidy(self.clock().now().at, retention.shortest()).await {
                Ok(true) => self.rest(begun).await,
                Ok(false) => tokio::time::sleep(retention.interval()).await,
                Err(error) => {
                    tracing::warn!(%error, "the store could not be tidied; it will be tried again");
                    tokio::time::sleep(retention.interval()).await;
                }
            }
        }
    }

    /// How long ended tasks are kept, once [`Handle::keep`] was told.
    #[must_use]
    pub fn retention(&self) -> Option<Retention> {
        self.shared.retention.get().copied()
    }

    /// Tasks removed since the start.
    #[must_use]
    pub fn removed(&self) -> u64 {
        self.shared.removed.load(Ordering::Relaxed)
    }

    /// Looks at every task once; how many were removed.
    async fn walk(&self, retention: Retention, forget: bool) -> Result<u64, LedgerError> {
        if forget {
            let now = self.clock().now().at;
            let (workers, events) = (now.before(WORKERS), retention.leaving(now).failed);
            self.remove(Command::Forget { workers, events }).await?;
        }
        if retention == (Retention { done: None, failed: None }) {
            return Ok(0);
        }
        let (mut after, mut removed) = (Some(TaskId(0)), 0);
        while let Some(from) = after {
            let begun = self.clock().uptime();
            let leaving = retention.leaving(self.clock().now().at);
            let (tasks, next) =
                self.reader().expired(from, leaving, LOOK).await.map_err(LedgerError::Store)?;
            after = next;
            self.rest(begun).await;
            for tasks in tasks.chunks(REMOVED_AT_ONCE) {
                let begun = self.clock().uptime();
                let count = self.remove(Command::Remove { tasks: tasks.to_vec(), leaving }).await?;
                self.shared.removed.fetch_add(count, Ordering::Relaxed);
                removed += count;
                self.rest(begun).await;
            }
        }
        Ok(removed)
    }

    async fn remove(&self, command: Command) -> Result<u64, LedgerError> {
        match self.frame_call(command).await? {
            Answer::Removed(count) => Ok(count),
            _ => Err(LedgerError::SessionEnded),
        }
    }

    async fn rest(&self, begun: Duration) {
        let took = self.clock().uptime().saturating_sub(begun);
        tokio::time::sleep((took * REST).max(SHORTEST_REST)).await;
    }
}

impl Batch<'_> {
    /// Removes those of `tasks` that leave and that nothing in this batch has touched.
    pub(super) fn remove(&mut self, tasks: &[TaskId], leaving: Leaving) -> u64 {
        let before = self.changes.removed.len();
        if !self.memory.replicas.is_first() {
            // Others do the same, and one is enough.
            return 0;
        }
        for id in tasks {
            let Some(open) = self.open.get(id).filter(|open| open.is_untouched()) else { continue };
            if !leaving.takes(&open.task) {
                continue;
            }
            let task = &open.task;
            if let Some(agent) = self.memory.agents.get_mut(&task.spec.agent) {
                let count = &mut agent.counts[usize::from(task.state.code())];
                *count = count.saturating_sub(1);
            }
            self.open.remove(id);
            self.known.keys.retain(|_, holder| holder.task != *id);
            self.changes.removed.push(*id);
        }
        (self.changes.removed.len() - before) as u64
    }

    /// Forgets workers that were not seen since `workers` and hold nothing, and events of before `events`.
    pub(super) fn forget(&mut self, workers: Timestamp, events: Option<Timestamp>) -> u64 {
        let gone = self.memory.workers.iter().filter(|(_, worker)| {
            worker.session.is_none() && worker.tasks.is_empty() && worker.beat_at < workers
        });
        let gone: Vec<_> = gone.take(FORGOTTEN_AT_ONCE).map(|(name, _)| Arc::clone(name)).collect();
        for name in &gone {
            self.memory.workers.remove(name);
        }
        let count = gone.len() as u64;
        self.changes.gone_workers.extend(gone);
        self.changes.events_before = events;
        count
    }
}
