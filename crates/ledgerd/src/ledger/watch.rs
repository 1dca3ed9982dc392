//! What happens to tasks, for whoever watches: read from the store once it is durable, by one for all who are as far.
//!
//! Nobody has a queue here. A watch is a place in the history and asks for what follows it when its caller takes more, so one
//! that is slow costs nothing but its own delay. What was read last is kept for the others. The loop only tells that there is
//! something; what other daemons did is looked for.

use super::command::LedgerError;
use super::handle::{Handle, Shared};
use ledger_core::store::{Fut, StoreError};
use ledger_core::watch::{Cut, End, Stretch};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

/// Those who may watch at one time.
const WATCHES: usize = 256;
/// Rows of a slot that are read at once.
const ROWS: usize = 500;
/// What is kept of what was read.
const KEPT_BYTES: usize = 4 << 20;
/// From one read of what is new to the next: under load each commit would be one.
const APART: Duration = Duration::from_millis(20);
/// How often it is looked whether other daemons have done something.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What was read last.
#[derive(Debug)]
pub(super) struct Feed {
    /// Number of the newest transition of this daemon that is durable.
    durable: watch::Sender<u64>,
    recent: Mutex<Recent>,
    places: Arc<Semaphore>,
}

impl Default for Feed {
    fn default() -> Self {
        let places = Arc::new(Semaphore::new(WATCHES));
        Self { durable: watch::Sender::new(0), recent: Mutex::default(), places }
    }
}

impl Feed {
    /// A batch is durable.
    pub(super) fn durable(&self, seq: u64) {
        self.durable.send_if_modified(|newest| std::mem::replace(newest, seq) != seq);
    }

    /// What follows a cut now, from what is kept or as `read`; none when some of it was removed.
    async fn after<'r>(
        &self,
        cut: &Cut,
        read: impl FnOnce() -> Fut<'r, Option<Stretch>>,
    ) -> Result<Option<Arc<Stretch>>, StoreError> {
        loop {
            let mut recent = self.recent.lock().await;
            if let Some(kept) = recent.after(cut) {
                return Ok(Some(kept));
            }
            if !recent.is_behind(cut) {
                // Far back, and nobody else is there.
                drop(recent);
                return Ok(read().await?.map(Arc::new));
            }
            let next = recent.read_at.map(|last| last + APART).filter(|next| *next > Instant::now());
            if let Some(next) = next {
                drop(recent);
                tokio::time::sleep_until(next).await;
                continue;
            }
            recent.read_at = Some(Instant::now());
            let Some(stretch) = read().await? else { return Ok(None) };
            if stretch.more {
                recent.read_at = None;
            }
            return Ok(Some(recent.keep(stretch)));
        }
    }
}

/// Stretches of the history without a gap between them, the oldest first.
#[derive(Debug, Default)]
struct Recent {
    stretches: VecDeque<Arc<Stretch>>,
    bytes: usize,
    read_at: Option<Instant>,
}

impl Recent {
    /// The first that follows a cut, or of which a part does.
    fn after(&self, cut: &Cut) -> Option<Arc<Stretch>> {
        let follows = |stretch: &&Arc<Stretch>| cut.reaches(&stretch.from) && !cut.reaches(&stretch.to);
        self.stretches.iter().find(follows).map(Arc::clone)
    }

    /// Whether all that is kept lies behind a cut.
    fn is_behind(&self, cut: &Cut) -> bool {
        self.stretches.back().is_none_or(|newest| cut.reaches(&newest.to))
    }

    fn keep(&mut self, read: Stretch) -> Arc<Stretch> {
        let read = Arc::new(read);
        if read.to == read.from {
            return read;
        }
        if self.stretches.back().is_some_and(|newest| newest.to != read.from) {
            self.stretches.clear();
            self.bytes = 0;
        }
        self.bytes += bytes(&read);
        self.stretches.push_back(Arc::clone(&read));
        while self.bytes > KEPT_BYTES
            && let Some(oldest) = self.stretches.pop_front()
        {
            self.bytes -= bytes(&oldest);
        }
        read
    }
}

/// What a stretch takes in memory, about.
fn bytes(stretch: &Stretch) -> usize {
    let rows = stretch.rows.iter().map(|row| {
        let record = &row.what.record;
        let error = record.error.as_ref().map_or(0, |error| error.message.len() + error.detail.len());
        let facts: usize = record.facts.iter().map(|(_, text)| 32 + text.len()).sum();
        let labels: usize = row.what.labels.iter().map(|(key, value)| 64 + key.len() + value.len()).sum();
        320 + error + facts + labels
    });
    rows.sum()
}

/// Somebody who watches.
pub(crate) struct Watch {
    shared: Arc<Shared>,
    durable: watch::Receiver<u64>,
    _place: OwnedSemaphorePermit,
}

impl Handle {
    /// Watches.
    ///
    /// # Errors
    /// Exhausted when too many do.
    pub(crate) fn watch(&self) -> Result<Watch, LedgerError> {
        let feed = &self.shared.feed;
        let place = Arc::clone(&feed.places).try_acquire_owned().map_err(|_| LedgerError::Exhausted {
            what: "the list of those who watch",
            retry_after: Duration::from_secs(5),
        })?;
        Ok(Watch { shared: Arc::clone(&self.shared), durable: feed.durable.subscribe(), _place: place })
    }
}

impl Watch {
    /// Where the history ends.
    ///
    /// # Errors
    /// Store when it cannot be read.
    pub(crate) async fn end(&self) -> Result<End, LedgerError> {
        self.shared.reader.end().await.map_err(LedgerError::Store)
    }

    /// What follows a cut, once something does. May be dropped before, at no loss.
    ///
    /// # Errors
    /// ResumeTooOld when some of it was removed; Store when it cannot be read.
    pub(crate) async fn after(&mut self, cut: &Cut) -> Result<Arc<Stretch>, LedgerError> {
        loop {
            self.durable.mark_unchanged();
            let read = self.shared.feed.after(cut, || self.shared.reader.after(cut, ROWS)).await;
            let stretch = read.map_err(LedgerError::Store)?.ok_or(LedgerError::ResumeTooOld)?;
            if !cut.reaches(&stretch.to) {
                return Ok(stretch);
            }
            if self.shared.is_shared {
                let _ = tokio::time::timeout(LOOK_EVERY, self.durable.changed()).await;
            } else if self.durable.changed().await.is_err() {
                return Err(LedgerError::Draining);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledger_core::watch::{Happening, Placed};
    use ledger_core::{AgentId, EventKind, Reason, Record, State, TaskId, Timestamp};
    use std::cell::RefCell;

    fn cut(seq: u64) -> Cut {
        [(0, seq)].into_iter().collect()
    }

    /// A history that has come so far, and where it was read from.
    #[derive(Default)]
    struct History {
        end: u64,
        reads: RefCell<Vec<u64>>,
    }

    impl History {
        /// What a feed says follows, as first and last place.
        async fn after(&self, feed: &Feed, from: u64) -> (u64, u64) {
            let read = || -> Fut<'_, Option<Stretch>> {
                self.reads.borrow_mut().push(from);
                let read = Stretch { from: cut(from), rows: Vec::new(), to: cut(self.end), more: false };
                Box::pin(std::future::ready(Ok(Some(read))))
            };
            let stretch = feed.after(&cut(from), read).await.expect("it reads").expect("all is there");
            (stretch.from.of(0), stretch.to.of(0))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_are_as_far_share_what_is_read() {
        let (feed, mut history) = (Feed::default(), History { end: 10, ..History::default() });
        assert_eq!(history.after(&feed, 5).await, (5, 10));
        assert_eq!(history.after(&feed, 5).await, (5, 10));
        assert_eq!(history.after(&feed, 8).await, (5, 10), "a part of it lies ahead");
        history.end = 20;
        let then = Instant::now();
        assert_eq!(history.after(&feed, 10).await, (10, 20));
        assert_eq!(then.elapsed(), APART, "what is new is read now and then");
        assert_eq!(history.after(&feed, 6).await, (5, 10), "one after the other");
        assert_eq!(*history.reads.borrow(), [5, 10]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_far_back_is_in_nobodys_way_and_one_that_is_ahead_begins_anew() {
        let (feed, mut history) = (Feed::default(), History { end: 100, ..History::default() });
        assert_eq!(history.after(&feed, 90).await, (90, 100));
        let then = Instant::now();
        assert_eq!(history.after(&feed, 3).await, (3, 100));
        assert!(then.elapsed().is_zero(), "it does not wait");
        assert_eq!(history.after(&feed, 95).await, (90, 100), "what is kept is still there");
        history.end = 200;
        assert_eq!(history.after(&feed, 150).await, (150, 200), "there is a gap before it");
        assert_eq!(history.after(&feed, 160).await, (150, 200));
        assert_eq!(*history.reads.borrow(), [90, 3, 150]);
    }

    #[test]
    fn so_much_is_kept_and_the_oldest_goes_first() {
        let mut recent = Recent::default();
        let record = Record {
            task: TaskId(1),
            version: 1,
            kind: EventKind::Enqueued,
            from: None,
            to: State::Queued,
            reason: Reason::None,
            at: Timestamp::EPOCH,
            fence: 0,
            attempt: 0,
            worker: None,
            until: None,
            digest: None,
            error: None,
            facts: Vec::new(),
        };
        let labels = vec![("large".to_owned(), "x".repeat(1 << 20))];
        let what = Happening { record, agent: AgentId(1), task_type: "a".into(), labels };
        for seq in 1..=10 {
            let row = Placed { slot: 0, seq, task: TaskId(1), version: 1, what: Some(what.clone()) };
            recent.keep(Stretch::of(&cut(seq - 1), vec![row], false));
        }
        assert!(recent.bytes <= KEPT_BYTES);
        assert_eq!(recent.stretches.front().map(|oldest| oldest.from.of(0)), Some(7));
        assert!(recent.after(&cut(6)).is_none() && recent.after(&cut(9)).is_some());
    }
}
