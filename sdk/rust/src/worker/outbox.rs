//! Outcomes that the ledger has not receipted yet. No I/O: it is told the time and says what to send.
//!
//! An outcome stays until its receipt comes, over any number of streams, and is sent again while it does not.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use prost::Message as _;
use tokio::time::Instant;

use super::task_error::TaskError;
use crate::{limits, v1};

/// An ack or outcome without a receipt for so long is sent again. Far more than a commit takes, far less than a lease.
pub(crate) const RESEND: Duration = Duration::from_secs(5);

/// Place of a lease in a [`Queue`].
pub(crate) type Slot = (Instant, u64);

/// Leases by the time at which something is to be done about them.
#[derive(Default)]
pub(crate) struct Queue {
    due: BTreeMap<Slot, v1::Lease>,
    pushed: u64,
}

impl Queue {
    pub(crate) fn push(&mut self, at: Instant, lease: v1::Lease) -> Slot {
        self.pushed += 1;
        let slot = (at, self.pushed);
        self.due.insert(slot, lease);
        slot
    }

    pub(crate) fn remove(&mut self, slot: Slot) {
        self.due.remove(&slot);
    }

    /// When the first is due.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.due.first_key_value().map(|(slot, _)| slot.0)
    }

    pub(crate) fn pop(&mut self, now: Instant) -> Option<v1::Lease> {
        self.due.first_entry().filter(|first| first.key().0 <= now).map(|first| first.remove())
    }
}

/// What a receipt did.
#[derive(Debug, PartialEq)]
pub(crate) enum Settled {
    /// No outcome was waiting for it: it is a repeat.
    Unknown,
    /// The ledger could not say: the outcome stays.
    Again,
    /// The ledger found the completion at fault and still holds the lease: a failure that says so takes its place.
    Failed(v1::ItemError),
    /// It is over, with the ledger's refusal if it refused.
    Over(Option<v1::ItemError>),
}

struct Entry {
    outcome: v1::Outcome,
    bytes: usize,
    slot: Slot,
}

#[derive(Default)]
pub(crate) struct Outbox {
    entries: HashMap<v1::Lease, Entry>,
    due: Queue,
}

impl Outbox {
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn contains(&self, lease: &v1::Lease) -> bool {
        self.entries.contains_key(lease)
    }

    pub(crate) fn leases(&self) -> Vec<v1::Lease> {
        self.entries.keys().cloned().collect()
    }

    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.due.next()
    }

    /// Takes the outcome of a lease in, to be sent at once. The first outcome of a lease stands.
    pub(crate) fn put(&mut self, lease: &v1::Lease, outcome: v1::outcome::Outcome, now: Instant) {
        if self.contains(lease) {
            return;
        }
        let outcome = v1::Outcome { lease: Some(lease.clone()), outcome: Some(outcome) };
        let slot = self.due.push(now, lease.clone());
        let bytes = outcome.encoded_len() + 8;
        self.entries.insert(lease.clone(), Entry { outcome, bytes, slot });
    }

    /// The outcomes to send now, at most 1,000 and at most `limit` bytes (but always one). Each is due again later.
    pub(crate) fn take(&mut self, now: Instant, limit: usize) -> Vec<v1::Outcome> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        while taken.len() < limits::MAX_ITEMS {
            let Some(lease) = self.due.pop(now) else { break };
            let Some(entry) = self.entries.get_mut(&lease) else { continue };
            if !taken.is_empty() && bytes + entry.bytes > limit {
                entry.slot = self.due.push(now, lease);
                break;
            }
            bytes += entry.bytes;
            entry.slot = self.due.push(now + RESEND, lease);
            taken.push(entry.outcome.clone());
        }
        taken
    }

    pub(crate) fn receipt(&mut self, lease: &v1::Lease, error: Option<&v1::ItemError>) -> Settled {
        if !self.contains(lease) {
            return Settled::Unknown;
        }
        if error.is_some_and(passes) {
            return Settled::Again;
        }
        let Some(entry) = self.entries.get_mut(lease) else { return Settled::Unknown };
        self.due.remove(entry.slot);
        if let Some(refusal) = error
            && let Some(failure) = instead(&entry.outcome, refusal)
        {
            entry.outcome.outcome = Some(failure);
            entry.bytes = entry.outcome.encoded_len() + 8;
            // Due since the completion was sent, so at once.
            entry.slot =
                self.due.push(entry.slot.0.checked_sub(RESEND).unwrap_or(entry.slot.0), lease.clone());
            return Settled::Failed(refusal.clone());
        }
        self.entries.remove(lease);
        Settled::Over(error.cloned())
    }

    /// After a new stream opened: what went down the old one may never have arrived.
    pub(crate) fn send_all_again(&mut self, now: Instant) {
        self.due = Queue::default();
        for (lease, entry) in &mut self.entries {
            entry.slot = self.due.push(now, lease.clone());
        }
    }
}

/// What to say in place of a completion that the ledger cannot take, for instance since a follow-up has a policy out of
/// range: every attempt would end so, and the lease would only run out.
fn instead(outcome: &v1::Outcome, refusal: &v1::ItemError) -> Option<v1::outcome::Outcome> {
    let completes = matches!(outcome.outcome, Some(v1::outcome::Outcome::Complete(_)));
    (completes && refusal.code == tonic::Code::InvalidArgument as i32).then(|| {
        TaskError::fatal(format!("the ledger cannot take the completion: {}", refusal.message))
            .code("BAD_COMPLETION")
            .into_outcome(None)
    })
}

/// Whether a refusal is about the moment, not about the item: UNAVAILABLE, or UNKNOWN for a commit of unclear fate.
pub(crate) fn passes(error: &v1::ItemError) -> bool {
    matches!(
        tonic::Code::from_i32(error.code),
        tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Aborted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 3 << 20;

    fn lease(n: u64) -> v1::Lease {
        v1::Lease { task_id: format!("t{n}"), fence: n }
    }

    fn done(bytes: usize) -> v1::outcome::Outcome {
        v1::outcome::Outcome::Complete(v1::Complete {
            result: vec![0; bytes].into(),
            ..v1::Complete::default()
        })
    }

    fn refusal(code: tonic::Code) -> v1::ItemError {
        v1::ItemError { code: code as i32, reason: "R".into(), ..Default::default() }
    }

    #[test]
    fn an_outcome_is_sent_again_until_receipted() {
        let start = Instant::now();
        let mut outbox = Outbox::default();
        outbox.put(&lease(1), done(1), start);
        for round in 0..5 {
            let now = start + RESEND * round;
            assert_eq!(outbox.take(now, LIMIT).len(), 1, "round {round}");
            assert!(outbox.take(now, LIMIT).is_empty());
            assert_eq!(outbox.next_due(), Some(now + RESEND));
        }
        assert_eq!(outbox.receipt(&lease(1), None), Settled::Over(None));
        assert_eq!(outbox.receipt(&lease(1), None), Settled::Unknown);
        assert!(outbox.is_empty() && outbox.next_due().is_none());
    }

    #[test]
    fn a_refusal_ends_it_and_a_passing_trouble_does_not() {
        let start = Instant::now();
        let mut outbox = Outbox::default();
        outbox.put(&lease(1), done(1), start);
        outbox.take(start, LIMIT);
        for code in [tonic::Code::Unavailable, tonic::Code::Unknown] {
            assert_eq!(outbox.receipt(&lease(1), Some(&refusal(code))), Settled::Again);
        }
        assert_eq!(outbox.take(start + RESEND, LIMIT).len(), 1);
        let lost = refusal(tonic::Code::FailedPrecondition);
        assert_eq!(outbox.receipt(&lease(1), Some(&lost)), Settled::Over(Some(lost)));
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_completion_at_fault_becomes_a_failure_once() {
        let start = Instant::now();
        let mut outbox = Outbox::default();
        outbox.put(&lease(1), done(1), start);
        outbox.take(start, LIMIT);
        let refused = v1::ItemError {
            message: "complete.follow_ups[0].policy.max_retries".into(),
            ..refusal(tonic::Code::InvalidArgument)
        };
        assert_eq!(outbox.receipt(&lease(1), Some(&refused)), Settled::Failed(refused.clone()));
        let taken = outbox.take(start, LIMIT);
        let Some(v1::outcome::Outcome::Fail(fail)) = &taken[0].outcome else { panic!("{taken:?}") };
        let error = fail.error.as_ref().unwrap();
        assert_eq!((error.class(), error.code.as_str()), (v1::ErrorClass::Permanent, "BAD_COMPLETION"));
        assert!(error.message.ends_with(&refused.message), "{}", error.message);
        assert_eq!(outbox.receipt(&lease(1), Some(&refused)), Settled::Over(Some(refused)));
        assert!(outbox.is_empty() && outbox.next_due().is_none());
    }

    #[test]
    fn a_new_stream_gets_everything_at_once() {
        let start = Instant::now();
        let mut outbox = Outbox::default();
        (0..10).for_each(|n| outbox.put(&lease(n), done(1), start));
        assert_eq!(outbox.take(start, LIMIT).len(), 10);
        outbox.send_all_again(start);
        assert_eq!(outbox.take(start, LIMIT).len(), 10);
        assert_eq!(outbox.leases().len(), 10);
    }

    #[test]
    fn frames_are_cut_by_items_and_by_bytes() {
        let start = Instant::now();
        let mut outbox = Outbox::default();
        (0..1_500).for_each(|n| outbox.put(&lease(n), done(1), start));
        assert_eq!(outbox.take(start, LIMIT).len(), 1_000);
        assert_eq!(outbox.take(start, LIMIT).len(), 500);

        let mut outbox = Outbox::default();
        (0..5).for_each(|n| outbox.put(&lease(n), done(1 << 20), start));
        let sizes: Vec<_> = (0..3).map(|_| outbox.take(start, LIMIT).len()).collect();
        assert_eq!(sizes, [2, 2, 1]);
        outbox.put(&lease(9), done(1 << 20), start);
        assert_eq!(outbox.take(start, 10).len(), 1, "one item always goes");
    }

    #[test]
    fn the_first_outcome_of_a_lease_stands() {
        let start = Instant::now();
        let mut outbox = Outbox::default();
        outbox.put(&lease(1), done(3), start);
        outbox.put(&lease(1), v1::outcome::Outcome::Cancelled(v1::Cancelled {}), start);
        let taken = outbox.take(start, LIMIT);
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].outcome, Some(done(3)));
    }
}
