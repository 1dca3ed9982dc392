//! What was seen a moment ago, for all who ask within that moment.
//!
//! Ports that anybody may reach ask the ledger for the same things: however many ask, it is asked as often as one would.

use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// What was seen last.
#[derive(Debug)]
pub(crate) struct Lately<T> {
    fresh: Duration,
    last: Mutex<Option<(Instant, Arc<T>)>>,
}

impl<T> Lately<T> {
    /// Nothing so far; what is seen counts for `fresh`.
    pub(crate) fn new(fresh: Duration) -> Self {
        Self { fresh, last: Mutex::new(None) }
    }

    /// What was seen lately, or what `look` sees now. Others who ask meanwhile wait for it.
    ///
    /// # Errors
    /// Those of `look`; the next one looks again.
    pub(crate) async fn seen<E>(&self, look: impl Future<Output = Result<T, E>>) -> Result<Arc<T>, E> {
        let mut last = self.last.lock().await;
        if let Some((at, seen)) = &*last
            && at.elapsed() < self.fresh
        {
            return Ok(Arc::clone(seen));
        }
        let seen = Arc::new(look.await?);
        *last = Some((Instant::now(), Arc::clone(&seen)));
        Ok(seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test(start_paused = true)]
    async fn it_is_looked_once_in_a_moment_and_again_after_an_error() {
        let lately = Lately::new(Duration::from_millis(500));
        let looks = Cell::new(0);
        let look = |good: bool| {
            looks.set(looks.get() + 1);
            async move { if good { Ok(()) } else { Err(()) } }
        };
        assert_eq!(lately.seen(async { look(false).await }).await, Err(()));
        for _ in 0..3 {
            assert!(lately.seen(async { look(true).await }).await.is_ok());
        }
        assert_eq!(looks.get(), 2);
        tokio::time::advance(Duration::from_millis(500)).await;
        assert!(lately.seen(async { look(true).await }).await.is_ok());
        assert_eq!(looks.get(), 3);
    }
}
