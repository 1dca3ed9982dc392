//! The model behind all agents: a queue, one call after the other, and callers that lose patience.
//!
//! A call whose caller has left is served like any other: the backend does not know. That is what lets retries keep an
//! overload alive.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

/// How long a caller waits for an answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(1);
/// Calls that wait at most, in seconds of full capacity.
const QUEUE_SECONDS: u32 = 3;
/// How long it takes to be refused.
const REFUSAL: Duration = Duration::from_millis(1);
/// What is left of a slow backend.
const SLOW: f64 = 0.4;

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Well,
    /// Every call is refused.
    Down,
    /// 40 % of the capacity.
    Slow,
}

/// Why a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// It is down.
    Refused,
    /// Its queue is full.
    Overloaded,
    /// No answer in time.
    Timeout,
}

/// What happened in one second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct Second {
    /// Tasks that arrived, whether or not the ledger could take them at once.
    pub(super) arrivals: u32,
    /// Calls made, whatever became of them.
    pub(super) calls: u32,
    /// Tasks whose call succeeded for the first time.
    pub(super) good: u32,
}

/// A backend and its books. Clones are the same one.
#[derive(Clone)]
pub(super) struct Backend(Arc<Inner>);

struct Inner {
    start: Instant,
    health: AtomicU8,
    waiting: AtomicUsize,
    limit: usize,
    queue: mpsc::UnboundedSender<oneshot::Sender<Result<(), Failed>>>,
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    seconds: Vec<Second>,
    /// Whether a task's call has succeeded, by its number.
    succeeded: Vec<bool>,
}

impl Backend {
    /// One that serves `per_second` calls. Its seconds count from now.
    pub(super) fn start(per_second: u32) -> Self {
        let (queue, calls) = mpsc::unbounded_channel();
        let backend = Self(Arc::new(Inner {
            start: Instant::now(),
            health: AtomicU8::new(0),
            waiting: AtomicUsize::new(0),
            limit: (per_second * QUEUE_SECONDS) as usize,
            queue,
            books: Mutex::default(),
        }));
        // It ends with the last clone, which holds the other end of the queue.
        tokio::spawn(serve(Arc::downgrade(&backend.0), calls, Duration::from_secs(1) / per_second));
        backend
    }

    pub(super) fn started(&self) -> Instant {
        self.0.start
    }

    pub(super) fn becomes(&self, health: Health) {
        self.0.health.store(health as u8, Ordering::Relaxed);
    }

    /// A task arrives; its number.
    pub(super) fn arrived(&self) -> u64 {
        self.note(|second| second.arrivals += 1);
        let mut books = self.books();
        books.succeeded.push(false);
        books.succeeded.len() as u64 - 1
    }

    /// One call, for the task of this number.
    pub(super) async fn call(&self, task: u64) -> Result<(), Failed> {
        self.note(|second| second.calls += 1);
        let result = self.answer().await;
        if result.is_ok() {
            let is_first = self
                .books()
                .succeeded
                .get_mut(task as usize)
                .is_some_and(|succeeded| !std::mem::replace(succeeded, true));
            if is_first {
                self.note(|second| second.good += 1);
            }
        }
        result
    }

    async fn answer(&self) -> Result<(), Failed> {
        let refusal = if self.0.health() == Health::Down {
            Some(Failed::Refused)
        } else {
            let has_room = self.0.waiting.fetch_add(1, Ordering::Relaxed) < self.0.limit;
            if !has_room {
                self.0.waiting.fetch_sub(1, Ordering::Relaxed);
            }
            (!has_room).then_some(Failed::Overloaded)
        };
        if let Some(refusal) = refusal {
            tokio::time::sleep(REFUSAL).await;
            return Err(refusal);
        }
        let (reply, answer) = oneshot::channel();
        let _ = self.0.queue.send(reply);
        match timeout(TIMEOUT, answer).await {
            Ok(answer) => answer.unwrap_or(Err(Failed::Refused)),
            Err(_) => Err(Failed::Timeout),
        }
    }

    /// What happened up to now; the present second is left out.
    pub(super) fn seconds(&self) -> Vec<Second> {
        let whole = self.0.start.elapsed().as_secs() as usize;
        let mut seconds = self.books().seconds.clone();
        seconds.resize(whole, Second::default());
        seconds
    }

    /// Tasks whose call has succeeded.
    pub(super) fn succeeded(&self) -> u64 {
        self.books().succeeded.iter().filter(|succeeded| **succeeded).count() as u64
    }

    fn note(&self, note: impl FnOnce(&mut Second)) {
        let second = self.0.start.elapsed().as_secs() as usize;
        let mut books = self.books();
        if books.seconds.len() <= second {
            books.seconds.resize(second + 1, Second::default());
        }
        note(&mut books.seconds[second]);
    }

    fn books(&self) -> std::sync::MutexGuard<'_, Books> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn health(&self) -> Health {
        match self.health.load(Ordering::Relaxed) {
            0 => Health::Well,
            1 => Health::Down,
            _ => Health::Slow,
        }
    }
}

async fn serve(
    inner: std::sync::Weak<Inner>,
    mut calls: mpsc::UnboundedReceiver<oneshot::Sender<Result<(), Failed>>>,
    service: Duration,
) {
    let mut free = Instant::now();
    loop {
        // Counted on from the last end while there is work, not from when a timer woke us: timers are a millisecond late,
        // which must not cost capacity.
        let (reply, begins) = match calls.try_recv() {
            Ok(reply) => (reply, free),
            Err(_) => match calls.recv().await {
                Some(reply) => (reply, free.max(Instant::now())),
                None => return,
            },
        };
        let Some(health) = inner.upgrade().map(|inner| inner.health()) else { return };
        free = begins + if health == Health::Slow { service.div_f64(SLOW) } else { service };
        sleep_until(free).await;
        let Some(inner) = inner.upgrade() else { return };
        inner.waiting.fetch_sub(1, Ordering::Relaxed);
        let result = if inner.health() == Health::Down { Err(Failed::Refused) } else { Ok(()) };
        let _ = reply.send(result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn burst(backend: &Backend, calls: u64) -> Vec<Result<(), Failed>> {
        let mut all = tokio::task::JoinSet::new();
        for task in 0..calls {
            let backend = backend.clone();
            all.spawn(async move { backend.call(task).await });
        }
        all.join_all().await
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_of_calls_is_answered_and_the_rest_of_the_queue_times_out() {
        let backend = Backend::start(100);
        let ended = burst(&backend, 400).await;
        let count = |what| ended.iter().filter(|ended| **ended == what).count();
        assert_eq!(count(Err(Failed::Overloaded)), 100);
        assert_eq!(count(Err(Failed::Timeout)) + count(Ok(())), 300);
        assert!((99..=101).contains(&count(Ok(()))), "{}", count(Ok(())));
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_is_worked_off_for_callers_that_have_left() {
        let backend = Backend::start(100);
        burst(&backend, 300).await;
        assert_eq!(backend.call(0).await, Err(Failed::Timeout), "two seconds of it are left");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_backend_answers_two_fifths() {
        let backend = Backend::start(100);
        backend.becomes(Health::Slow);
        let ended = burst(&backend, 200).await;
        assert!((39..=41).contains(&ended.iter().filter(|ended| ended.is_ok()).count()));
        backend.becomes(Health::Down);
        assert_eq!(backend.call(0).await, Err(Failed::Refused));
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_is_good_once_however_often_it_is_called() {
        let backend = Backend::start(100);
        let task = backend.arrived();
        for _ in 0..3 {
            assert_eq!(backend.call(task).await, Ok(()));
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(backend.seconds(), [Second { arrivals: 1, calls: 3, good: 1 }]);
        assert_eq!(backend.succeeded(), 1);
    }
}
