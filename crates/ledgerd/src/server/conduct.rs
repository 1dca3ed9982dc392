//! How a connection behaves: what it sends to no purpose, and how many calls it takes back at once.
//!
//! HTTP/2 has many frames that cost the sender nothing and say nothing (PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty DATA), and
//! a call that is reset at once costs us more than its caller. h2 bounds some of them, each by a rule of its own; this bounds all
//! of them together, by bytes. Not here: who may call, and how many connections there may be.

use futures_util::task::AtomicWaker;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Context;
use std::time::Duration;
use tokio::time::Instant;

/// Bytes that may come in [`WINDOW`] to no purpose: 1 MiB, and what may wait for slow handlers, which is as much as the window of
/// a connection.
const UNPRODUCTIVE: u64 = (1 << 20) + super::CONNECTION_WINDOW as u64;
/// More than so many, and the connection is read slowly: what a message brings before its handler comes to it, and what PINGs and
/// windows add in a day.
const UNHURRIED: u64 = 64 << 10;
/// A call that begins, and a message that is whole, makes up for as much as the headers of a call may be: whatever clients send
/// around either is less, and what either costs us is more than the frames that it lets pass.
const WORTH: u64 = super::HEADER_BYTES as u64;
/// A byte of a message makes up for itself and for one more. In pieces of a byte each there are ten more.
const WORTH_OF_BYTE: u64 = 2;
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
    /// Bytes that came and that nothing useful has made up for.
    unproductive: AtomicU64,
    /// When those began to be counted; looked at only when there are too many.
    counted_since: Mutex<Instant>,
    /// How many calls were taken back, and since when.
    cancels: Mutex<(Instant, u32)>,
    ends: AtomicBool,
    /// Who reads, while there is no hurry to.
    reader: AtomicWaker,
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
            reader: AtomicWaker::new(),
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

    /// Whether there is no hurry to read on: it says much to no purpose. Who asks is woken when it has been made up for, as by a
    /// handler that comes to what waits for it.
    pub(super) fn is_unhurried(&self, cx: &Context<'_>) -> bool {
        self.0.reader.register(cx.waker());
        self.0.unproductive.load(Ordering::Relaxed) > UNHURRIED
    }

    /// Bytes of messages were taken up, with which so many messages are whole.
    pub(super) fn says_something(&self, bytes: usize, messages: usize) {
        self.makes_up_for((bytes as u64) * WORTH_OF_BYTE + (messages as u64).saturating_mul(WORTH));
    }

    fn makes_up_for(&self, bytes: u64) {
        let less = |unproductive: u64| Some(unproductive.saturating_sub(bytes));
        let counts = &self.0;
        // It has nothing to refuse.
        if let Ok(before) = counts.unproductive.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            && before > UNHURRIED
            && before.saturating_sub(bytes) <= UNHURRIED
        {
            counts.reader.wake();
        }
    }

    /// A call was refused because there was no room for it: what came of it and is not read any more is not held against anybody.
    pub(super) fn has_no_room(&self) {
        self.makes_up_for(super::STREAM_WINDOW.into());
    }

    /// A call begins, which may be taken back.
    pub(super) fn call(&self) -> Call {
        self.makes_up_for(WORTH);
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
    use std::task::Waker;

    #[tokio::test(start_paused = true)]
    async fn bytes_that_say_nothing_end_a_connection_unless_they_take_long() {
        let budget = UNPRODUCTIVE as usize;
        let conduct = Conduct::new();
        assert!(conduct.came(budget));
        conduct.says_something(budget, 1);
        assert!(conduct.came(budget), "something was said");
        tokio::time::advance(WINDOW * 2).await;
        assert!(conduct.came(1), "it took long");
        assert!(conduct.came(budget));
        assert!(!conduct.came(1), "it is too much within a minute");
        conduct.says_something(budget, 1);
        assert!(!conduct.came(1), "what has ended has ended");
    }

    fn is_unhurried(conduct: &Conduct) -> bool {
        conduct.is_unhurried(&Context::from_waker(Waker::noop()))
    }

    #[tokio::test(start_paused = true)]
    async fn what_we_have_no_room_for_ends_no_connection() {
        let conduct = Conduct::new();
        for _ in 0..1_000 {
            assert!(conduct.came(1 << 20));
            conduct.has_no_room();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_said_makes_up_for_what_it_is_said_with_and_not_for_all_that_came() {
        let (piece, frame) = (16 << 10, 9);
        let large = Conduct::new();
        for _ in 0..100_000 {
            assert!(large.came(frame + piece));
            large.says_something(piece, 0);
            assert!(!is_unhurried(&large));
        }
        let beats = Conduct::new();
        for _ in 0..100_000 {
            // With a record of TLS, a window that is opened and a PING.
            assert!(beats.came(22 + frame + 25 + 26 + 17));
            beats.says_something(25, 1);
        }
        assert!(!is_unhurried(&beats));
        let bytes = Conduct::new();
        let closed = (0..1_000_000).find(|_| {
            bytes.says_something(1, 0);
            !bytes.came(frame + 1)
        });
        assert!(is_unhurried(&bytes));
        assert!(closed.is_some(), "a message in pieces of a byte");
        let calls = Conduct::new();
        let closed = (0..1_000).find(|_| {
            calls.call().answered();
            !calls.came(100 << 10)
        });
        assert!(closed.is_some(), "a call now and then among much that says nothing");
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
