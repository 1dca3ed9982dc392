//! The one backend: a queue, and one call after the other.

use std::collections::VecDeque;

use super::{Micros, SECOND};

/// How much longer than the base rate needs it could go on, in percent.
const CAPACITY: u64 = 125;
/// Calls that wait at most, in seconds of full capacity.
const QUEUE_SECONDS: u64 = 3;

/// First come, first served. A call whose caller has left is served like any other.
pub(super) struct Backend {
    /// What a call takes at full capacity.
    service: Micros,
    limit: usize,
    waiting: VecDeque<u32>,
    serving: Option<(Micros, u32)>,
}

impl Backend {
    /// One that serves a quarter more than `rate` calls a second.
    pub(super) fn new(rate: u32) -> Self {
        let per_second = u64::from(rate) * CAPACITY / 100;
        Self {
            service: SECOND / per_second,
            limit: usize::try_from(per_second * QUEUE_SECONDS).expect("it fits"),
            waiting: VecDeque::new(),
            serving: None,
        }
    }

    /// Takes a call; false when the queue is full.
    pub(super) fn offer(&mut self, call: u32, now: Micros, capacity: u64) -> bool {
        if self.serving.is_none() {
            self.serving = Some((now + self.takes(capacity), call));
            return true;
        }
        let has_room = self.waiting.len() < self.limit;
        if has_room {
            self.waiting.push_back(call);
        }
        has_room
    }

    /// When the call that is being served is done.
    pub(super) fn due(&self) -> Option<Micros> {
        self.serving.map(|(at, _)| at)
    }

    /// Ends it, and begins the next.
    pub(super) fn finish(&mut self, now: Micros, capacity: u64) -> u32 {
        let (_, call) = self.serving.take().expect("only called when one is due");
        let takes = self.takes(capacity);
        self.serving = self.waiting.pop_front().map(|call| (now + takes, call));
        call
    }

    fn takes(&self, capacity: u64) -> Micros {
        self.service * 100 / capacity
    }
}
