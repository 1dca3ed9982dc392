//! A handle that ends waiting, in blocking and in async calls.
//!
//! Invariants: cancelling is final; nobody who waits misses it, whether it comes before, during or after they begin;
//! a call uses one place in the list of wakers however often it waits.

use super::lock;
use std::fmt;
use std::sync::{Arc, Mutex};
#[cfg(feature = "async")]
use std::task::{Context, Poll, Waker};
#[cfg(feature = "sync")]
use std::{
    sync::{Condvar, PoisonError},
    time::Duration,
};

/// Ends the waiting of every call it was given to. Clones are the same handle.
///
/// ```
/// use retry_core::Cancel;
///
/// let cancel = Cancel::new();
/// cancel.clone().cancel();
/// assert!(cancel.is_cancelled());
/// ```
#[derive(Clone, Default)]
pub struct Cancel {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    #[cfg(feature = "sync")]
    woken: Condvar,
}

#[derive(Default)]
struct State {
    cancelled: bool,
    #[cfg(feature = "async")]
    wakers: Vec<Place>,
}

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancel").field("cancelled", &self.is_cancelled()).finish()
    }
}

impl Cancel {
    /// A handle that is not cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes all who wait, and keeps others from waiting. Doing it again changes nothing.
    pub fn cancel(&self) {
        let mut state = lock(&self.shared.state);
        state.cancelled = true;
        #[cfg(feature = "sync")]
        self.shared.woken.notify_all();
        #[cfg(feature = "async")]
        {
            let wakers: Vec<Waker> = state.wakers.iter_mut().filter_map(Place::take).collect();
            // A waker may run its task at once, and that task may ask this handle.
            drop(state);
            wakers.into_iter().for_each(Waker::wake);
        }
        #[cfg(not(feature = "async"))]
        drop(state);
    }

    /// Whether it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        lock(&self.shared.state).cancelled
    }

    /// Parks the thread until `delay` is over (true) or the handle is cancelled (false).
    #[cfg(feature = "sync")]
    pub(super) fn park(&self, delay: Duration) -> bool {
        let state = lock(&self.shared.state);
        let (state, _) = self
            .shared
            .woken
            .wait_timeout_while(state, delay, |state| !state.cancelled)
            .unwrap_or_else(PoisonError::into_inner);
        !state.cancelled
    }

    /// A place in the list of wakers, for one async call.
    #[cfg(feature = "async")]
    pub(super) fn enrol(&self) -> Enrolled<'_> {
        let mut state = lock(&self.shared.state);
        let free = state.wakers.iter().position(|place| matches!(place, Place::Free));
        let index = free.unwrap_or(state.wakers.len());
        if free.is_none() {
            state.wakers.push(Place::Free);
        }
        state.wakers[index] = Place::Taken(None);
        Enrolled { cancel: self, index }
    }
}

#[cfg(feature = "async")]
enum Place {
    Free,
    Taken(Option<Waker>),
}

#[cfg(feature = "async")]
impl Place {
    fn take(&mut self) -> Option<Waker> {
        match self {
            Self::Free => None,
            Self::Taken(waker) => waker.take(),
        }
    }
}

/// Gives its place back when dropped.
#[cfg(feature = "async")]
pub(super) struct Enrolled<'a> {
    cancel: &'a Cancel,
    index: usize,
}

#[cfg(feature = "async")]
impl Enrolled<'_> {
    pub(super) fn poll_cancelled(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = lock(&self.cancel.shared.state);
        if state.cancelled {
            return Poll::Ready(());
        }
        match &mut state.wakers[self.index] {
            Place::Taken(Some(waker)) => waker.clone_from(cx.waker()),
            place => *place = Place::Taken(Some(cx.waker().clone())),
        }
        Poll::Pending
    }
}

#[cfg(feature = "async")]
impl Drop for Enrolled<'_> {
    fn drop(&mut self) {
        let place = std::mem::replace(&mut lock(&self.cancel.shared.state).wakers[self.index], Place::Free);
        // Outside the lock: dropping a waker may drop a task, and that may drop another call of this handle.
        drop(place);
    }
}
