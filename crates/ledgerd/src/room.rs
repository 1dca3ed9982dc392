//! Room for messages on their way in: one bound over all connections.
//!
//! Windows bound what is unread, but what is read waits in a buffer until its message is whole: 4 MiB a stream, 4 GiB a
//! connection. So bytes take room as they are taken up. A call keeps it until it is answered, for so long its message lives;
//! what is passed on to the ledger, until the ledger has done with it. Where there is none, nothing more is read, for a while:
//! halves of messages that wait for each other would wait for ever.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// The beginning of a message, which has a room of its own: large messages that fill theirs keep no small one waiting.
pub(crate) const BEGINNING: usize = 8 << 10;
const BEGINNINGS: usize = 16 << 20;
/// What comes after the beginnings: as much as twelve of the largest messages.
const REST: usize = 48 << 20;
/// A call waits so long for room, and no more than so many do: with each up to a window of unread bytes waits.
const PATIENCE: Duration = Duration::from_secs(1);
const WAITING: usize = 16;
/// A stream waits longer: what a worker says is read later rather than refused.
const PATIENCE_OF_STREAMS: Duration = Duration::from_secs(10);

/// There was none in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoRoom;

/// Room for all; see the module.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    beginnings: Arc<Semaphore>,
    rest: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Room {
    /// Most bytes of messages at once.
    pub(crate) const BYTES: usize = BEGINNINGS + REST;

    pub(crate) fn new() -> Self {
        let of = |permits| Arc::new(Semaphore::new(permits));
        Self { beginnings: of(BEGINNINGS), rest: of(REST), waiting: of(WAITING) }
    }

    fn take_now(&self, weight: Weight) -> Option<Taken> {
        let beginnings = Arc::clone(&self.beginnings).try_acquire_many_owned(weight.beginnings).ok()?;
        let rest = Arc::clone(&self.rest).try_acquire_many_owned(weight.rest).ok()?;
        Some(Taken { beginnings, rest })
    }

    async fn take(&self, weight: Weight) -> Result<Taken, AcquireError> {
        let beginnings = Arc::clone(&self.beginnings).acquire_many_owned(weight.beginnings).await?;
        let rest = Arc::clone(&self.rest).acquire_many_owned(weight.rest).await?;
        Ok(Taken { beginnings, rest })
    }
}

/// Bytes, by the room they take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Weight {
    pub(crate) beginnings: u32,
    pub(crate) rest: u32,
}

impl Weight {
    /// Of what is made at once: all of it is large, or none.
    fn of(bytes: usize) -> Self {
        let weight = u32::try_from(bytes).unwrap_or(u32::MAX);
        if bytes <= BEGINNING {
            Self { beginnings: weight, rest: 0 }
        } else {
            Self { beginnings: 0, rest: weight }
        }
    }
}

/// Room that is taken, until it is dropped.
#[derive(Debug)]
pub(crate) struct Taken {
    beginnings: OwnedSemaphorePermit,
    rest: OwnedSemaphorePermit,
}

tokio::task_local! {
    /// What the call has taken that is answered here.
    pub(crate) static HELD: Held;
}

/// What one call has taken. Its body, which takes more, and its answer share it.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    room: Room,
    is_stream: bool,
    taken: Arc<Mutex<Option<Taken>>>,
}

impl Held {
    pub(crate) fn new(room: Room, is_stream: bool) -> Self {
        Self { room, is_stream, taken: Arc::default() }
    }

    /// That of the call that is answered here, unless it is not weighed.
    pub(crate) fn of_this_call() -> Option<Self> {
        HELD.try_with(Self::clone).ok()
    }

    /// What is made of a message takes more than the message.
    ///
    /// # Errors
    /// There is no room, and this is a call. Decoding cannot wait, and a frame that was read is not refused.
    pub(crate) fn grows(&self, bytes: usize) -> Result<(), NoRoom> {
        if bytes == 0 || self.take_now(Weight::of(bytes)) || self.is_stream { Ok(()) } else { Err(NoRoom) }
    }

    /// Takes room where there is some. Whether there was.
    pub(crate) fn take_now(&self, weight: Weight) -> bool {
        let taken = self.room.take_now(weight);
        taken.map(|taken| self.keep(taken)).is_some()
    }

    /// Waits for room.
    ///
    /// # Errors
    /// None came in time, or this would be one call too many to wait.
    pub(crate) async fn take(self, weight: Weight) -> Result<(), NoRoom> {
        let (patience, waiting) = if self.is_stream {
            (PATIENCE_OF_STREAMS, None)
        } else {
            (PATIENCE, Some(self.room.waiting.try_acquire().map_err(|_| NoRoom)?))
        };
        let taken = timeout(patience, self.room.take(weight)).await;
        drop(waiting);
        // The room is never closed, so the second error is none that happens.
        let taken = taken.map_err(|_| NoRoom)?.map_err(|_| NoRoom)?;
        self.keep(taken);
        Ok(())
    }

    fn keep(&self, more: Taken) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *taken {
            Some(taken) => {
                taken.beginnings.merge(more.beginnings);
                taken.rest.merge(more.rest);
            }
            None => *taken = Some(more),
        }
    }

    /// The body asks for more. A stream that does, and is between two messages, has done with the last one; a call has not.
    pub(crate) fn asks_for_the_next(&self) {
        if self.is_stream {
            drop(self.hand_on());
        }
    }

    /// What was taken, for whoever the message is passed on to.
    pub(crate) fn hand_on(&self) -> Option<Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn rest(bytes: usize) -> Weight {
        Weight { beginnings: 0, rest: bytes as u32 }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_waits_for_room_and_not_for_ever() {
        let room = Room::new();
        let first = Held::new(room.clone(), false);
        assert!(first.take_now(rest(REST)));
        let second = Held::new(room.clone(), false);
        assert!(!second.take_now(rest(1)));
        assert!(second.take_now(Weight { beginnings: 1, rest: 0 }), "a small message has a room of its own");
        assert_eq!(second.clone().take(rest(1)).await, Err(NoRoom), "it took too long");
        let waits = tokio::spawn(second.take(rest(1)));
        tokio::task::yield_now().await;
        first.asks_for_the_next();
        assert!(!waits.is_finished(), "a call keeps its room until it is answered");
        drop(first);
        assert_eq!(waits.await.expect("no panic"), Ok(()));
        assert_eq!(room.rest.available_permits(), REST, "what nobody has any more is free");
    }

    #[tokio::test(start_paused = true)]
    async fn few_calls_wait_and_every_stream_does_and_longer() {
        let room = Room::new();
        let stream = Held::new(room.clone(), true);
        assert!(stream.take_now(rest(REST)));
        let call = || tokio::spawn(Held::new(room.clone(), false).take(rest(1)));
        let calls: Vec<_> = (0..WAITING).map(|_| call()).collect();
        let another = tokio::spawn(Held::new(room.clone(), true).take(rest(1)));
        tokio::task::yield_now().await;
        assert_eq!(call().await.expect("no panic"), Err(NoRoom), "one too many");
        for call in calls {
            assert_eq!(call.await.expect("no panic"), Err(NoRoom), "it took too long");
        }
        tokio::time::advance(PATIENCE).await;
        assert!(!another.is_finished());
        stream.asks_for_the_next();
        assert_eq!(another.await.expect("no panic"), Ok(()));
    }
}
