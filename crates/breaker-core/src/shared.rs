//! One breaker for many threads.
//!
//! Not another machine: every decision is [`Breaker`]'s. This file only answers the two common
//! cases without taking the lock: closed with a clean run and no window, and open with time left.
//!
//! Invariants:
//!
//! - What the word says was true of the machine at some moment during the call, so an answer
//!   from it is one that the machine would have given then.
//! - A clean success (closed, no failure in the run) writes no cache line that another thread
//!   reads: it adds to a counter of its own stripe.
//! - Every change happens under the mutex, so each transition has exactly one winner.

#[cfg(loom)]
use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, fence},
};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, PoisonError};
#[cfg(not(loom))]
use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, fence},
};
use std::time::Duration;

use crate::breaker::Breaker;
use crate::broken::ConfigErrors;
use crate::config::Config;
use crate::snapshot::Snapshot;
use crate::span::nanos;
use crate::words::{
    Availability, Permit, Recorded, RejectCause, Rejected, Sample, State, Stats, Tally, Transition,
};

/// Counters apart from each other. Sixteen suits the cores of one socket; threads beyond that share.
#[cfg(not(loom))]
const STRIPES: usize = 16;
#[cfg(loom)]
const STRIPES: usize = 1;

// The word: epoch 48 bits | publication 14 bits | kind 2 bits.
const SLOW: u64 = 0;
const CLEAN: u64 = 1;
const OPEN: u64 = 2;
const KIND: u64 = 0b11;
const PUBLICATION: u64 = 0x3fff << 2;
const EPOCH_SHIFT: u32 = 16;
/// A larger epoch (reached by a restore only) does not fit, and then every call takes the lock.
const EPOCHS: u64 = 1 << 48;

/// What the fast path reads. A cache line pair to itself, since the mutex beside it is written.
#[repr(align(128))]
struct Hot {
    word: AtomicU64,
    since: AtomicU64,
    until: AtomicU64,
}

#[repr(align(128))]
#[derive(Default)]
struct Stripe {
    calls: AtomicU64,
    successes: AtomicU64,
    rejections: AtomicU64,
}

/// A [`Breaker`] shared by threads.
///
/// Statistics are striped: each call is counted exactly once, and [`stats`](Self::stats) is exact
/// once the calls it asks about have returned. While others are calling it is a sum of counters
/// that were read one after another.
///
/// About 2 KiB each, nearly all of it stripes. Where a program keeps very many breakers and one
/// thread decides, keep plain [`Breaker`]s.
///
/// ```
/// use breaker_core::{Config, Sample, Shared};
/// use std::time::Duration;
///
/// let shared = Shared::new(Config::default())?;
/// let now = Duration::from_secs(1);
/// let guard = shared.acquire(now).expect("closed");
/// guard.record(Sample::Success, now, 0);
/// assert_eq!(shared.stats().successes, 1);
/// # Ok::<(), breaker_core::ConfigErrors>(())
/// ```
pub struct Shared {
    hot: Hot,
    stripes: [Stripe; STRIPES],
    slow: Mutex<Breaker>,
}

impl Shared {
    /// A closed breaker in epoch 0.
    ///
    /// # Errors
    ///
    /// Every rule that `config` breaks.
    pub fn new(config: impl Into<Arc<Config>>) -> Result<Self, ConfigErrors> {
        Breaker::new(config).map(Self::from)
    }

    /// Asks to make a call; as [`Breaker::try_acquire`]. The permit must be recorded or released;
    /// [`acquire`](Self::acquire) sees to that by itself.
    ///
    /// # Errors
    ///
    /// A refusal that says why and, where known, when to come back.
    #[inline]
    pub fn try_acquire(&self, now: Duration) -> Result<Permit, Rejected> {
        match self.acquire_fast(now) {
            Some(answer) => answer,
            None => self.acquire_locked(now),
        }
    }

    #[inline(never)]
    fn acquire_locked(&self, now: Duration) -> Result<Permit, Rejected> {
        self.slow_path().try_acquire(now)
    }

    /// As [`try_acquire`](Self::try_acquire), with a permit that returns itself when dropped.
    ///
    /// # Errors
    ///
    /// A refusal that says why and, where known, when to come back.
    pub fn acquire(&self, now: Duration) -> Result<Guard<'_>, Rejected> {
        let permit = self.try_acquire(now)?;
        Ok(Guard { shared: self, permit: Some(permit) })
    }

    /// Tells how a permitted call ended; as [`Breaker::record`].
    #[inline]
    pub fn record(&self, permit: Permit, sample: Sample, now: Duration, draw: u64) -> Recorded {
        match self.record_fast(permit, sample) {
            Some(answer) => answer,
            None => self.record_locked(permit, sample, now, draw),
        }
    }

    #[inline(never)]
    fn record_locked(&self, permit: Permit, sample: Sample, now: Duration, draw: u64) -> Recorded {
        self.slow_path().record(permit, sample, now, draw)
    }

    /// Gives a permit back unused; as [`Breaker::release`].
    pub fn release(&self, permit: Permit) -> Recorded {
        self.record_fast(permit, Sample::Neutral).unwrap_or_else(|| self.slow_path().release(permit))
    }

    /// Looks without taking a permit or moving; as [`Breaker::is_available`].
    #[must_use]
    pub fn is_available(&self, now: Duration) -> Availability {
        match self.look(now) {
            Some(Look::Clean { .. }) => Availability::Yes,
            Some(Look::Open { wait, .. }) => {
                Availability::No { retry_after: Some(wait), cause: RejectCause::Open }
            }
            None => self.slow_path().is_available(now),
        }
    }

    /// Lets time do its work; as [`Breaker::tick`].
    pub fn tick(&self, now: Duration, draw: u64) -> Option<Transition> {
        self.slow_path().tick(now, draw)
    }

    /// The state, as of the last event.
    #[must_use]
    pub fn state(&self) -> State {
        match self.hot.word.load(Acquire) & KIND {
            CLEAN => State::Closed,
            OPEN => State::Open,
            _ => self.slow_path().state(),
        }
    }

    /// What it has seen.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.lock().stats()
    }

    /// All that a restart must not lose.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.lock().snapshot()
    }

    /// The machine itself, for everything that is rare: orders, reset, settings, getters. Others
    /// who need the lock wait meanwhile, so never hold it during a call.
    #[must_use]
    pub fn lock(&self) -> Locked<'_> {
        let mut locked = self.slow_path();
        let stats = &mut locked.breaker.stats;
        // Moved, not copied: each stripe's count arrives in the machine exactly once.
        for stripe in &self.stripes {
            for (total, part) in [
                (&mut stats.calls, &stripe.calls),
                (&mut stats.successes, &stripe.successes),
                (&mut stats.rejections, &stripe.rejections),
            ] {
                *total = total.saturating_add(part.swap(0, Relaxed));
            }
        }
        locked
    }

    /// The answer of the word to somebody who wants to call; `None` means ask the machine.
    #[inline]
    pub(crate) fn acquire_fast(&self, now: Duration) -> Option<Result<Permit, Rejected>> {
        match self.look(now)? {
            Look::Clean { epoch } => {
                self.stripe().calls.fetch_add(1, Relaxed);
                Some(Ok(Permit { epoch, probe: false, slot: 0 }))
            }
            Look::Open { epoch, wait } => {
                self.stripe().rejections.fetch_add(1, Relaxed);
                Some(Err(Rejected { retry_after: Some(wait), cause: RejectCause::Open, epoch }))
            }
        }
    }

    /// A sample that changes nothing but a counter; `None` means ask the machine. Takes no `now`,
    /// which saves whoever reads a clock the second reading.
    #[inline]
    pub(crate) fn record_fast(&self, permit: Permit, sample: Sample) -> Option<Recorded> {
        let word = self.hot.word.load(Acquire);
        let clean = word & KIND == CLEAN && word >> EPOCH_SHIFT == permit.epoch && !permit.probe;
        match sample {
            Sample::Success if clean => {
                self.stripe().successes.fetch_add(1, Relaxed);
                Some(Recorded::quiet(Tally::Counted))
            }
            Sample::Neutral if clean => Some(Recorded::quiet(Tally::Uncounted)),
            Sample::Success | Sample::Neutral | Sample::Failure => None,
        }
    }

    /// The machine, with its own share of the statistics only.
    pub(crate) fn slow_path(&self) -> Locked<'_> {
        // The machine does not panic, and a user's panic while holding `Locked` leaves it between two
        // whole operations: a poisoned lock guards nothing broken.
        let breaker = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { hot: &self.hot, breaker }
    }

    #[inline]
    fn look(&self, now: Duration) -> Option<Look> {
        let word = self.hot.word.load(Acquire);
        let epoch = word >> EPOCH_SHIFT;
        match word & KIND {
            CLEAN => Some(Look::Clean { epoch }),
            OPEN => {
                let since = self.hot.since.load(Relaxed);
                let until = self.hot.until.load(Relaxed);
                // A sequence lock: had the two changed, the word would have changed before them.
                fence(Acquire);
                let whole = self.hot.word.load(Relaxed) == word;
                let now = nanos(now);
                (whole && since <= now && now < until)
                    .then(|| Look::Open { epoch, wait: Duration::from_nanos(until - now) })
            }
            _ => None,
        }
    }

    #[inline]
    fn stripe(&self) -> &Stripe {
        &self.stripes[stripe_of_thread()]
    }
}

enum Look {
    Clean { epoch: u64 },
    Open { epoch: u64, wait: Duration },
}

impl From<Breaker> for Shared {
    fn from(breaker: Breaker) -> Self {
        let hot = Hot { word: AtomicU64::new(SLOW), since: AtomicU64::new(0), until: AtomicU64::new(0) };
        hot.publish(&breaker);
        Self { hot, stripes: Default::default(), slow: Mutex::new(breaker) }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Shared").field(&*self.lock()).finish()
    }
}

impl Hot {
    /// Only with the mutex held.
    fn publish(&self, breaker: &Breaker) {
        let old = self.word.load(Relaxed);
        let kind = match breaker.state {
            _ if breaker.epoch >= EPOCHS => SLOW,
            // A window has to hear of every call.
            State::Closed if breaker.run == 0 && breaker.config().window.is_none() => CLEAN,
            State::Open => OPEN,
            _ => SLOW,
        };
        let since = nanos(breaker.since);
        let until = breaker.until().map_or(0, nanos);
        let epoch = if kind == SLOW { 0 } else { breaker.epoch };
        let same = old & KIND == kind
            && old >> EPOCH_SHIFT == epoch
            && (kind != OPEN || (self.since.load(Relaxed), self.until.load(Relaxed)) == (since, until));
        if same {
            // Most visits change nothing that the word says; then no reader's line is taken away.
            return;
        }
        let publication = old.wrapping_add(1 << 2) & PUBLICATION;
        // A reader that catches one of the new times must find a word that is not the old one.
        self.word.store(publication | SLOW, Relaxed);
        fence(Release);
        self.since.store(since, Relaxed);
        self.until.store(until, Relaxed);
        self.word.store(epoch << EPOCH_SHIFT | publication | kind, Release);
    }
}

/// The machine of a [`Shared`], locked. What the fast path may answer is renewed when this is dropped.
pub struct Locked<'a> {
    hot: &'a Hot,
    breaker: MutexGuard<'a, Breaker>,
}

impl Deref for Locked<'_> {
    type Target = Breaker;

    fn deref(&self) -> &Breaker {
        &self.breaker
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Breaker {
        &mut self.breaker
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Runs before the mutex guard's own drop, so still under the lock, and also when unwinding.
        self.hot.publish(&self.breaker);
    }
}

impl fmt::Debug for Locked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.breaker.fmt(f)
    }
}

/// A permit that returns itself: dropped without a result it counts as neutral, so that a
/// cancelled probe cannot keep its slot.
#[derive(Debug)]
#[must_use = "dropping it gives the permit back"]
pub struct Guard<'a> {
    shared: &'a Shared,
    permit: Option<Permit>,
}

impl Guard<'_> {
    /// Tells how the call ended.
    pub fn record(mut self, sample: Sample, now: Duration, draw: u64) -> Recorded {
        match self.permit.take() {
            Some(permit) => self.shared.record(permit, sample, now, draw),
            None => Recorded::quiet(Tally::Uncounted),
        }
    }

    /// Takes the permit out; from now on the caller must record or release it.
    pub fn into_permit(mut self) -> Permit {
        self.permit.take().expect("a guard holds its permit until it is consumed")
    }

    /// The permit.
    pub fn permit(&self) -> Permit {
        self.permit.expect("a guard holds its permit until it is consumed")
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            self.shared.release(permit);
        }
    }
}

#[cfg(not(loom))]
#[inline]
fn stripe_of_thread() -> usize {
    use std::cell::Cell;
    use std::sync::atomic::AtomicUsize;

    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    // `try_with`: a permit may be dropped while a thread's locals are being torn down.
    MINE.try_with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(NEXT.fetch_add(1, Relaxed) % STRIPES);
        }
        mine.get()
    })
    .unwrap_or(0)
}

/// The model's threads share the only one.
#[cfg(loom)]
const fn stripe_of_thread() -> usize {
    0
}
