//! The book of a worker: what it holds, what it has said about that, and what is to be said next. No I/O: it is told the
//! time and what happened, and returns frames.
//!
//! Invariants: a lease is held, or in the outbox, or forgotten, never two of these; of a task at most one fence is held;
//! an outcome is kept until the ledger has receipted it; every statement is repeated until it is answered, so that any
//! frame may be lost, late or repeated.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::outbox::{self, Outbox, Queue, RESEND, Settled, Slot};
use super::soft::Soft;
use crate::v1::outcome::Outcome;
use crate::v1::work_request::Frame;
use crate::words::span;
use crate::{limits, v1};

/// Most frames that one call of [`Book::flush`] returns.
pub(crate) const MAX_FRAMES: usize = 4;
/// Beats that carry news are at least so far apart.
const NEWS_INTERVAL: Duration = Duration::from_secs(1);
/// Acks are held back no longer than this, whatever the daemon allows: a start should be seen. Less than [`RESEND`].
const MAX_ACK_HOLD: Duration = Duration::from_secs(1);
/// Leases remembered after their end, so that a repeated assignment does not run again.
const REMEMBERED: usize = 1_024;
/// Room in a frame for what surrounds the items, and for the one item that may go over the cut.
const FRAME_MARGIN: usize = 64 << 10;

/// What to do with an assignment.
#[derive(Debug, PartialEq)]
pub(crate) enum Taken {
    /// Run it. An older claim of the task, if there was one, is void: end its handler.
    Start { replaces: Option<v1::Lease> },
    /// It is held or settled already, or void.
    Repeat,
}

/// What the ledger says about a held lease.
#[derive(Debug, PartialEq)]
pub(crate) enum Ruling {
    /// Nothing new.
    Goes,
    /// Ask the handler to end within so much time.
    Stop { cause: v1::StopCause, grace: Duration },
    /// The lease is gone: end the handler; its outcome would be refused.
    Lost,
}

struct Held {
    fence: u64,
    /// When to send the ack (again); none once it was receipted.
    ack: Option<Slot>,
    lease_duration: Duration,
    progress: Soft<v1::Progress>,
    checkpoint: Soft<Bytes>,
}

pub(crate) struct Book {
    held: HashMap<String, Held>,
    outbox: Outbox,
    acks: Queue,
    /// What must be acked before the next beat, out of its turn.
    acks_first: Vec<v1::Lease>,
    /// Checkpoints of leases whose outcome waits to be sent and cannot carry one.
    last_words: Vec<v1::Held>,
    settled: HashSet<v1::Lease>,
    settled_order: VecDeque<v1::Lease>,
    capacity: Option<u32>,
    sequence: u64,
    beat_at: Instant,
    last_beat: Instant,
    beat_interval: Duration,
    ack_hold: Duration,
    frame_bytes: usize,
}

impl Book {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            held: HashMap::new(),
            outbox: Outbox::default(),
            acks: Queue::default(),
            acks_first: Vec::new(),
            last_words: Vec::new(),
            settled: HashSet::new(),
            settled_order: VecDeque::new(),
            capacity: None,
            sequence: 0,
            beat_at: now,
            last_beat: now,
            beat_interval: Duration::from_secs(20),
            ack_hold: Duration::ZERO,
            frame_bytes: limits::MAX_MESSAGE_BYTES - FRAME_MARGIN,
        }
    }

    pub(crate) fn all_receipted(&self) -> bool {
        self.outbox.is_empty()
    }

    pub(crate) fn holds(&self, lease: &v1::Lease) -> bool {
        self.held.get(&lease.task_id).is_some_and(|held| held.fence == lease.fence)
    }

    /// What Hello names: held leases, and leases whose outcome waits for its receipt.
    pub(crate) fn statement(&self) -> (Vec<v1::Lease>, Vec<v1::Lease>) {
        let held = self.held.iter().map(|(task_id, held)| lease_of(task_id, held));
        (held.collect(), self.outbox.leases())
    }

    /// A new stream is open. Whatever went down the old one and was not answered is said again.
    pub(crate) fn welcome(&mut self, welcome: &v1::Welcome, now: Instant) {
        let interval = span(welcome.heartbeat_interval);
        if interval > Duration::ZERO {
            self.beat_interval = interval;
        }
        // Half of what is allowed leaves the other half to the way there.
        self.ack_hold = (span(welcome.ack_delay_max) / 2).min(MAX_ACK_HOLD);
        let bytes = usize::try_from(welcome.max_message_bytes).unwrap_or(usize::MAX);
        if bytes > 0 {
            self.frame_bytes = bytes.min(limits::MAX_MESSAGE_BYTES).saturating_sub(FRAME_MARGIN);
        }
        self.capacity = None;
        self.acks = Queue::default();
        let mut unsaid = !self.last_words.is_empty();
        for (task_id, held) in &mut self.held {
            if held.ack.is_some() {
                held.ack = Some(self.acks.push(now, lease_of(task_id, held)));
            }
            held.progress.unsend();
            held.checkpoint.unsend();
            unsaid |= held.progress.is_due(0) || held.checkpoint.is_due(0);
        }
        self.outbox.send_all_again(now);
        self.last_beat = now;
        self.beat_at = if unsaid { now } else { now + self.interval() };
    }

    pub(crate) fn assign(&mut self, assignment: &v1::Assignment, now: Instant) -> Taken {
        let lease = v1::Lease { task_id: assignment.task_id.clone(), fence: assignment.fence };
        if self.outbox.contains(&lease) || self.settled.contains(&lease) {
            return Taken::Repeat;
        }
        let mut replaces = None;
        if let Some(held) = self.held.get(&lease.task_id) {
            if held.fence >= lease.fence {
                return Taken::Repeat;
            }
            let old = lease_of(&lease.task_id, held);
            self.forget(&old);
            replaces = Some(old);
        }
        let hold = self.ack_hold.min(span(assignment.ack_timeout) / 20);
        let ack = Some(self.acks.push(now + hold, lease.clone()));
        let lease_duration = span(assignment.lease_duration);
        if !lease_duration.is_zero() {
            self.beat_at = self.beat_at.min(self.last_beat + lease_duration / 3);
        }
        let held = Held {
            fence: lease.fence,
            ack,
            lease_duration,
            progress: Soft::default(),
            checkpoint: Soft::default(),
        };
        self.held.insert(lease.task_id, held);
        Taken::Start { replaces }
    }

    /// What the handler wants the ledger to know.
    pub(crate) fn news(
        &mut self,
        lease: &v1::Lease,
        progress: Option<v1::Progress>,
        checkpoint: Option<Bytes>,
    ) {
        let Some(held) = self.held.get_mut(&lease.task_id).filter(|held| held.fence == lease.fence) else {
            return;
        };
        if progress.is_none() && checkpoint.is_none() {
            return;
        }
        held.progress.set(progress);
        held.checkpoint.set(checkpoint);
        self.beat_at = self.beat_at.min(self.last_beat + NEWS_INTERVAL);
    }

    /// The handler of a held lease has ended. False when the lease is not held any more: then the outcome is void.
    pub(crate) fn finish(&mut self, lease: &v1::Lease, mut outcome: Outcome, now: Instant) -> bool {
        if !self.holds(lease) {
            return false;
        }
        let Some(mut held) = self.held.remove(&lease.task_id) else { return false };
        if let Some(slot) = held.ack {
            self.acks.remove(slot);
        }
        if let Some(checkpoint) = held.checkpoint.take_unsent() {
            match &mut outcome {
                Outcome::Release(release) => release.checkpoint = Some(checkpoint),
                Outcome::Block(block) => block.checkpoint = Some(checkpoint),
                Outcome::Complete(_) => {}
                // These cannot carry it, and the next attempt wants it: a beat that goes before them does.
                Outcome::Fail(_) | Outcome::Cancelled(_) => {
                    if held.ack.is_some() {
                        self.acks_first.push(lease.clone());
                    }
                    let (lease, checkpoint) = (Some(lease.clone()), Some(checkpoint));
                    self.last_words.push(v1::Held { lease, progress: None, checkpoint });
                    self.beat_at = now;
                }
            }
        }
        self.outbox.put(lease, outcome, now);
        true
    }

    pub(crate) fn set_capacity(&mut self, capacity: u32) {
        self.capacity = Some(capacity);
    }

    /// The durable answer to an ack: [`Ruling::Lost`] when it was refused.
    pub(crate) fn ack_receipt(&mut self, lease: &v1::Lease, error: Option<&v1::ItemError>) -> Ruling {
        let Some(held) = self.held.get_mut(&lease.task_id).filter(|held| held.fence == lease.fence) else {
            return Ruling::Goes;
        };
        match error {
            Some(error) if outbox::passes(error) => Ruling::Goes,
            Some(_) => {
                self.forget(lease);
                Ruling::Lost
            }
            None => {
                if let Some(slot) = held.ack.take() {
                    self.acks.remove(slot);
                }
                Ruling::Goes
            }
        }
    }

    /// The durable answer to an outcome.
    pub(crate) fn outcome_receipt(&mut self, lease: &v1::Lease, error: Option<&v1::ItemError>) -> Settled {
        let settled = self.outbox.receipt(lease, error);
        if let Settled::Over(_) = settled {
            self.remember(lease);
        }
        settled
    }

    pub(crate) fn verdict(&mut self, verdict: &v1::LeaseVerdict) -> Ruling {
        let Some(lease) = verdict.lease.as_ref().filter(|lease| self.holds(lease)) else {
            return Ruling::Goes;
        };
        match verdict.state() {
            v1::LeaseState::Lost => {
                self.forget(lease);
                Ruling::Lost
            }
            v1::LeaseState::Stop => {
                Ruling::Stop { cause: verdict.stop_cause(), grace: span(verdict.stop_grace) }
            }
            v1::LeaseState::Extended | v1::LeaseState::Unspecified => Ruling::Goes,
        }
    }

    pub(crate) fn beat_answered(&mut self, sequence: u64) {
        for held in self.held.values_mut() {
            held.progress.confirm(sequence);
            held.checkpoint.confirm(sequence);
        }
    }

    /// When [`Book::flush`] has something to say.
    pub(crate) fn next_due(&self) -> Instant {
        let lists = [self.acks.next(), self.outbox.next_due()];
        let soonest = lists.into_iter().flatten().fold(self.beat_at, Instant::min);
        if self.capacity.is_some() || !self.acks_first.is_empty() {
            soonest.min(self.last_beat)
        } else {
            soonest
        }
    }

    /// What to send now, in this order; at most [`MAX_FRAMES`]. Call again while [`Book::next_due`] is not ahead.
    pub(crate) fn flush(&mut self, now: Instant) -> Vec<Frame> {
        let mut frames = Vec::with_capacity(MAX_FRAMES);
        if let Some(capacity) = self.capacity.take() {
            frames.push(Frame::Capacity(v1::Capacity { capacity }));
        }
        let acks = self.due_acks(now);
        if !acks.is_empty() {
            frames.push(Frame::Acks(v1::Acks { items: acks }));
        }
        if self.beat_at <= now {
            frames.push(Frame::Heartbeat(self.beat(now)));
        }
        let outcomes = self.outbox.take(now, self.frame_bytes);
        if !outcomes.is_empty() {
            frames.push(Frame::Outcomes(v1::Outcomes { items: outcomes }));
        }
        frames
    }

    /// The outcomes to settle outside of a stream.
    pub(crate) fn take_outcomes(&mut self, now: Instant) -> Vec<v1::Outcome> {
        self.outbox.take(now, self.frame_bytes)
    }

    pub(crate) fn send_all_again(&mut self, now: Instant) {
        self.outbox.send_all_again(now);
    }

    /// Once one ack is due, those that soon will be go with it.
    fn due_acks(&mut self, now: Instant) -> Vec<v1::Lease> {
        let mut acks = std::mem::take(&mut self.acks_first);
        if self.acks.next().is_some_and(|next| next <= now) {
            while let Some(lease) = self.acks.pop(now + self.ack_hold / 2) {
                if let Some(held) = self.held.get_mut(&lease.task_id).filter(|held| held.fence == lease.fence)
                {
                    held.ack = Some(self.acks.push(now + RESEND, lease.clone()));
                    acks.push(lease);
                }
            }
        }
        acks
    }

    fn beat(&mut self, now: Instant) -> v1::Heartbeat {
        self.sequence += 1;
        let sequence = self.sequence;
        let words: usize =
            self.last_words.iter().map(|held| held.checkpoint.as_ref().map_or(0, Bytes::len)).sum();
        let names: usize = self.held.keys().map(|task_id| task_id.len() + 24).sum();
        // News share what the names leave; those that find no room go with the next beat. Last words go first, as their
        // outcome follows at once; should they be too many (a thousand failures at one time), some are not said.
        let mut room = self.frame_bytes.saturating_sub(names);
        let mut spend = |bytes: usize| {
            let fits = bytes <= room;
            room -= if fits { bytes } else { 0 };
            fits
        };
        let mut held: Vec<v1::Held> = std::mem::take(&mut self.last_words);
        if words > 0 {
            held.retain(|held| spend(held.checkpoint.as_ref().map_or(0, Bytes::len) + 64));
        }
        let mut more = false;
        for (task_id, own) in &mut self.held {
            let mut item = v1::Held { lease: Some(lease_of(task_id, own)), ..Default::default() };
            if own.progress.is_due(sequence) {
                if spend(own.progress.size(|progress| progress.note.len() + 32)) {
                    item.progress = own.progress.send(sequence);
                } else {
                    more = true;
                }
            }
            if own.checkpoint.is_due(sequence) {
                if spend(own.checkpoint.size(|bytes| bytes.len() + 8)) {
                    item.checkpoint = own.checkpoint.send(sequence);
                } else {
                    more = true;
                }
            }
            held.push(item);
        }
        self.last_beat = now;
        self.beat_at = now + if more { NEWS_INTERVAL } else { self.interval() };
        v1::Heartbeat { held, sequence }
    }

    /// A third of the shortest lease held, if that is less than the daemon's interval. A shortest lease that has ended
    /// keeps the beats close until the next one: too often is harmless.
    fn interval(&self) -> Duration {
        let leases = self.held.values().map(|held| held.lease_duration).filter(|lease| !lease.is_zero());
        leases.min().map_or(self.beat_interval, |lease| self.beat_interval.min(lease / 3))
    }

    fn forget(&mut self, lease: &v1::Lease) {
        if let Some(held) = self.held.remove(&lease.task_id)
            && let Some(slot) = held.ack
        {
            self.acks.remove(slot);
        }
        self.remember(lease);
    }

    fn remember(&mut self, lease: &v1::Lease) {
        if self.settled.insert(lease.clone()) {
            self.settled_order.push_back(lease.clone());
            if self.settled_order.len() > REMEMBERED
                && let Some(oldest) = self.settled_order.pop_front()
            {
                self.settled.remove(&oldest);
            }
        }
    }
}

fn lease_of(task_id: &str, held: &Held) -> v1::Lease {
    v1::Lease { task_id: task_id.to_owned(), fence: held.fence }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
