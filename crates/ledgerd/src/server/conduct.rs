//! How a connection behaves: what it sends to no purpose, and how many calls it takes back at once.
//!
//! HTTP/2 has many frames that cost the sender nothing and say nothing (PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty DATA), and
//! a call that is reset at once costs us more than its caller. h2 bounds some of them, each by a rule of its own; this bounds all
//! of them together, by bytes. Not here: who may call, and how many connections there may be.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Bytes that may come in [`WINDOW`] without a call that begins or a piece of a message that is taken up: 1 MiB, and what may wait
/// for slow handlers, which is as much as the window of a connection.
const UNPRODUCTIVE: u64 = (1 << 20) + super::CONNECTION_WINDOW as u64;
/// After this the count begins anew, so that a client that listens for days is not held to account for its PINGs.
const WINDOW: Duration = Duration::from_secs(60);
/// Calls that may be taken back within [`CANCEL_WINDOW`], each sooner than [`EARLY`] and before its answer.
const CANCELS: u32 = 100;
const CANCEL_WINDOW: Duration = Duration::from_secs(10);
const EARLY: Duration = Duration::from_secs(1);

/// What a connection and its calls know of it in common.
#[derive(Clone, Debug)]
pub(super) struct Conduct(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    /// Bytes that came since something useful did.
    unproductive: AtomicU64,
    /// When those began to be counted; looked at only when there are too many.
    counted_since: Mutex<Instant>,
    /// How many calls were taken back, and since when.
    cancels: Mutex<(Instant, u32)>,
    ends: AtomicBool,
}

impl Conduct {
    /// Of a connection that begins.
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self(Arc::new(Counts {
            unproductive: AtomicU64::new(0),
            counted_since: Mutex::new(now),
            cancels: Mutex::new((now, 0)),
            ends: AtomicBool::new(false),
        }))
    }

    /// Bytes came. Whether the connection may go on.
    pub(super) fn came(&self, bytes: usize) -> bool {
        let counts = &self.0;
        let before = counts.unproductive.fetch_add(bytes as u64, Ordering::Relaxed);
        if before + bytes as u64 > UNPRODUCTIVE {
            let mut since = counts.counted_since.lock().unwrap_or_else(PoisonError::into_inner);
            if since.elapsed() > WINDOW {
                *since = Instant::now();
                counts.unproductive.store(0, Ordering::Relaxed);
            } else {
                self.end("it sends much and says nothing");
            }
        }
        !counts.ends.load(Ordering::Relaxed)
    }

    /// A call begins, or a piece of a message is taken up.
    pub(super) fn says_something(&self) {
        self.0.unproductive.store(0, Ordering::Relaxed);
    }

    /// A call begins, which may be taken back.
    pub(super) fn call(&self) -> Call {
        self.says_something();
        Call { conduct: self.clone(), began: Instant::now(), answered: false }
    }

    fn taken_back(&self) {
        let mut cancels = self.0.cancels.lock().unwrap_or_else(PoisonError::into_inner);
        if cancels.0.elapsed() > CANCEL_WINDOW {
            *cancels = (Instant::now(), 0);
        }
        cancels.1 += 1;
        if cancels.1 > CANCELS {
            self.end("it takes its calls back at once");
        }
    }

    fn end(&self, why: &'static str) {
        if !self.0.ends.swap(true, Ordering::Relaxed) {
            tracing::warn!(why, "a connection is closed");
        }
    }
}

/// A call that has no answer yet.
#[derive(Debug)]
pub(super) struct Call {
    conduct: Conduct,
    began: Instant,
    answered: bool,
}

impl Call {
    pub(super) const fn answered(&mut self) {
        self.answered = true;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.answered && self.began.elapsed() < EARLY {
            self.conduct.taken_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bytes_that_say_nothing_end_a_connection_unless_they_take_long() {
        let budget = UNPRODUCTIVE as usize;
        let conduct = Conduct::new();
        assert!(conduct.came(budget));
        conduct.says_something();
        assert!(conduct.came(budget), "something was said");
        tokio::time::advance(WINDOW * 2).await;
        assert!(conduct.came(1), "it took long");
        assert!(conduct.came(budget));
        assert!(!conduct.came(1), "it is too much within a minute");
        conduct.says_something();
        assert!(!conduct.came(1), "what has ended has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn calls_taken_back_at_once_end_a_connection_and_others_do_not() {
        let conduct = Conduct::new();
        for _ in 0..10_000 {
            conduct.call().answered();
        }
        for _ in 0..CANCELS {
            drop(conduct.call());
        }
        let late = conduct.call();
        tokio::time::advance(EARLY).await;
        drop(late);
        assert!(conduct.came(1));
        tokio::time::advance(CANCEL_WINDOW).await;
        for _ in 0..CANCELS {
            drop(conduct.call());
        }
        assert!(conduct.came(1), "it was counted anew");
        drop(conduct.call());
        assert!(!conduct.came(1));
    }
}
