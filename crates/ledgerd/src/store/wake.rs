//! What wakes the ledger when another daemon has done something that concerns it.
//!
//! A hint and nothing more: it may be lost, and whoever is woken looks for itself.

use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Notify;

/// Shared by the ledger and whatever of its store listens to other daemons.
#[derive(Debug, Default)]
pub struct Wake {
    bell: Notify,
    news: AtomicBool,
    work: AtomicBool,
    ends: AtomicBool,
    awaits: AtomicBool,
}

impl Wake {
    /// Another daemon changed what memory holds.
    pub(in crate::store) fn news(&self) {
        self.news.store(true, Ordering::Release);
        self.bell.notify_one();
    }

    /// Another daemon left work that it has no room for.
    pub(in crate::store) fn work(&self) {
        self.work.store(true, Ordering::Release);
        self.bell.notify_one();
    }

    /// Another daemon ended tasks: of interest where somebody waits for ends.
    pub(in crate::store) fn ends(&self) {
        if self.awaits.load(Ordering::Acquire) {
            self.ends.store(true, Ordering::Release);
            self.bell.notify_one();
        }
    }

    /// What there is of news is looked for now.
    pub(in crate::store) fn heed(&self) {
        self.news.store(false, Ordering::Release);
        self.ends.store(false, Ordering::Release);
    }

    /// Whether tasks ended that somebody may wait for.
    pub(in crate::store) fn has_ends(&self) -> bool {
        self.ends.load(Ordering::Acquire)
    }

    /// Whether there is news.
    pub(in crate::store) fn has_news(&self) -> bool {
        self.news.load(Ordering::Acquire)
    }

    /// Whether there is work, and no more from here on.
    pub(in crate::store) fn take_work(&self) -> bool {
        self.work.swap(false, Ordering::AcqRel)
    }

    /// Somebody waits for the ends of tasks, or nobody does any more.
    pub(crate) fn await_ends(&self, awaits: bool) {
        self.awaits.store(awaits, Ordering::Release);
    }

    /// Waits for a hint; one that came before counts.
    pub(crate) async fn rung(&self) {
        self.bell.notified().await;
    }
}
