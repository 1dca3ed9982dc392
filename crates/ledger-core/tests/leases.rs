//! Leases: how long they are, how they end, and how a holder comes back.

use crate::support::{LATER, Life, blocks, caller, fails, holder, releases, seconds};
use ledger_core::{
    Caller, Class, Event, EventKind, Outcome, Overrides, Reason, Refusal, ReleaseCause, SessionId, State,
    Timestamp,
};
use std::time::Duration;

fn lease(life: &Life) -> Timestamp {
    life.task.lease.expect("it is held").until
}

#[test]
fn a_lease_lasts_ack_timeout_before_the_ack_and_lease_duration_after_it() {
    let mut life = Life::new();
    life.claim();
    assert_eq!(lease(&life), life.now.at.after(seconds(10)));
    life.wait(seconds(4)).ack();
    assert_eq!(lease(&life), life.now.at.after(seconds(60)));
}

#[test]
fn a_beat_moves_the_end_of_an_acked_lease_and_adds_no_row() {
    let mut life = Life::new();
    life.claim();
    let until = lease(&life);
    life.wait(seconds(3)).beat();
    assert_eq!(lease(&life), until, "an ack is still owed");
    life.ack();
    life.wait(seconds(20));
    assert_eq!(life.beat().record, None);
    assert_eq!(lease(&life), life.now.at.after(seconds(60)));
    let until = lease(&life);
    life.now.at = life.now.at.before(seconds(40));
    life.beat();
    assert_eq!(lease(&life), until, "a clock that runs back shortens none");
}

#[test]
fn a_tasks_own_timeouts_win_over_its_agents() {
    let mut life = Life::with(Overrides {
        ack_timeout: Some(seconds(2)),
        lease_duration: Some(seconds(5)),
        ..Overrides::NONE
    });
    life.claim();
    assert_eq!(lease(&life), life.now.at.after(seconds(2)));
    life.ack();
    assert_eq!(lease(&life), life.now.at.after(seconds(5)));
}

#[test]
fn the_stream_that_spoke_last_is_remembered() {
    let mut life = Life::new();
    life.start();
    let on = |session| Caller { session, ..caller("w") };
    life.apply(&Event::Beat(on(Some(SessionId(9))), 1));
    life.apply(&Event::Beat(on(None), 1));
    assert_eq!(life.task.holder.as_ref().map(|holder| holder.session), Some(SessionId(9)));
}

#[test]
fn a_task_nobody_acknowledged_is_queued_again_after_a_back_off() {
    let mut life = Life::new();
    let mut last = Duration::ZERO;
    for _ in 0..4 {
        life.claim();
        life.apply(&Event::LeaseOver);
        life.is(State::Queued, Reason::AckTimeout, EventKind::AckTimeout);
        let delay = life.task.run_at.since(life.now.at);
        assert!(delay > last, "{delay:?} after {last:?}");
        last = delay;
        life.wait(LATER);
    }
    assert_eq!((life.task.retry_count, life.task.losses, life.task.attempt), (0, 0, 0), "no retry is spent");
}

#[test]
fn an_ack_timeout_is_neutral_to_breaker_and_budget() {
    let mut life = Life::new();
    life.claim_as(true);
    let effects = life.apply(&Event::LeaseOver).effects;
    assert_eq!(effects.sample.map(|(_, sample)| sample), Some(breaker_core::Sample::Neutral));
    assert_eq!((effects.reserve, effects.refund), (0, 0));
}

#[test]
fn a_lost_task_is_retried_after_a_back_off_over_its_losses() {
    let mut life = Life::with(Overrides { max_losses: Some(10), ..Overrides::NONE });
    let mut last = Duration::ZERO;
    for losses in 1..5 {
        life.start().apply(&Event::LeaseOver);
        life.is(State::Retry, Reason::Lost, EventKind::Lost);
        assert_eq!((life.task.losses, life.task.retry_count), (losses, 0));
        let delay = life.task.run_at.since(life.now.at);
        assert!(delay > last, "{delay:?} after {last:?}");
        last = delay;
        life.wait(LATER);
    }
}

#[test]
fn a_task_lost_max_losses_times_is_poison() {
    let mut life = Life::new();
    life.lose_once();
    life.lose_once();
    life.is(State::Retry, Reason::Lost, EventKind::Lost);
    life.lose_once();
    life.is(State::Failed, Reason::Poison, EventKind::Lost);
    assert_eq!(life.task.losses, 3);
    assert_eq!(life.last().worker.as_deref(), Some("w"), "who lost it is known");
}

#[test]
fn tasks_lost_together_are_one_breaker_sample() {
    for stop in [None, Some(Event::AttemptTimeout)] {
        for (sampled, expected) in
            [(false, breaker_core::Sample::Failure), (true, breaker_core::Sample::Neutral)]
        {
            let mut life = Life::new();
            life.claim_as(false);
            life.ack();
            if let Some(stop) = &stop {
                life.apply(stop);
            }
            let effects = life.apply(&Event::TakenBack { sampled }).effects;
            assert_eq!(effects.sample.map(|(_, sample)| sample), Some(expected), "{stop:?}");
        }
    }
}

#[test]
fn what_a_worker_says_it_does_not_hold_is_taken_back_at_once() {
    let mut life = Life::new();
    life.claim();
    life.apply(&Event::TakenBack { sampled: false });
    life.is(State::Queued, Reason::AckTimeout, EventKind::AckTimeout);
    assert_eq!(life.task.run_at, life.now.at, "nobody is slow: no delay");
    assert_eq!(life.last().worker.as_deref(), Some("w"));
    let ack = life.ack_event();
    assert_eq!(life.refuses(&ack), Refusal::LeaseLost, "it said so itself");
}

// Coming back.

#[test]
fn a_holder_resumes_its_lost_task_with_the_same_fence_and_delivery() {
    for says in [Life::ack_event, Life::beat_event] {
        let mut life = Life::new();
        life.start().apply(&Event::LeaseOver);
        let tokens = life.task.tokens;
        let before = life.task.clone();
        life.wait(seconds(5));
        let event = says(&life);
        let effects = life.apply(&event).effects;
        life.is(State::Running, Reason::None, EventKind::Resumed);
        let task = &life.task;
        assert_eq!(
            (task.fence, task.delivery, task.attempt),
            (before.fence, before.delivery, before.attempt)
        );
        assert_eq!(lease(&life), life.now.at.after(seconds(60)), "lease anew");
        assert_eq!((effects.refund, life.task.tokens), (tokens, 0), "token back");
        assert_eq!((tokens, life.task.losses), (1, 1), "losses stay");
    }
}

#[test]
fn the_time_a_task_was_lost_is_no_stall() {
    let mut life = Life::new();
    life.start().wait(LATER).apply(&Event::LeaseOver);
    life.wait(seconds(5)).beat();
    assert_eq!(life.task.lease.map(|lease| lease.progress_at), Some(life.now.at));
}

#[test]
fn an_ack_that_comes_late_begins_the_attempt() {
    let mut life = Life::new();
    life.claim();
    life.apply(&Event::LeaseOver);
    life.ack();
    life.is(State::Running, Reason::None, EventKind::Resumed);
    assert_eq!((life.task.attempt, life.last().attempt), (1, 1));
    assert!(life.task.acked());
}

#[test]
fn a_beat_of_an_unacknowledged_task_resumes_it_and_begins_nothing() {
    let mut life = Life::new();
    life.claim();
    life.apply(&Event::LeaseOver);
    life.beat();
    life.is(State::Running, Reason::None, EventKind::Resumed);
    assert!(!life.task.acked());
    assert_eq!((life.task.attempt, lease(&life)), (0, life.now.at.after(seconds(10))));
}

#[test]
fn nobody_resumes_what_another_has_claimed() {
    let mut life = Life::new();
    life.lose_once();
    let (ack, complete) = (life.ack_event(), life.settle_event(Outcome::Complete));
    life.apply(&Event::Claim { holder: holder("w2"), permit: None });
    assert_eq!(life.refuses(&ack), Refusal::LeaseLost);
    assert_eq!(life.refuses(&complete), Refusal::LeaseLost);
    let newest = life.ack_event();
    assert_eq!(life.refuses(&newest), Refusal::NotHolder);
}

#[test]
fn a_lost_task_that_the_breaker_gates_can_still_be_resumed_and_settled() {
    let mut life = Life::new();
    life.lose_once();
    life.apply(&Event::Gate);
    let mut settled = life.clone();
    life.beat();
    life.is(State::Running, Reason::None, EventKind::Resumed);
    settled.settle(Outcome::Complete);
    settled.is(State::Done, Reason::None, EventKind::Completed);
}

#[test]
fn late_outcomes_are_marked_and_are_no_second_sample() {
    let unacked = |life: &mut Life| drop(life.claim_as(false));
    let acked = |life: &mut Life| {
        life.claim_as(false);
        life.ack();
    };
    for begin in [unacked, acked] {
        for outcome in
            [Outcome::Complete, fails(Class::Transient), releases(ReleaseCause::Declined), blocks()]
        {
            let mut life = Life::new();
            begin(&mut life);
            assert!(life.apply(&Event::LeaseOver).effects.sample.is_some());
            let effects = life.settle(outcome.clone()).effects;
            assert_eq!(life.last().fact(ledger_core::event::Fact::Late), Some("true"), "{outcome:?}");
            assert_eq!(effects.sample, None, "{outcome:?}");
            assert_eq!(life.task.attempt, 1, "{outcome:?}");
        }
    }
}

#[test]
fn an_outcome_in_time_is_not_marked_late() {
    let mut life = Life::new();
    life.start().apply(&Event::LeaseOver);
    life.beat();
    life.settle(Outcome::Complete);
    assert_eq!(life.last().fact(ledger_core::event::Fact::Late), None, "it had resumed before");
}

#[test]
fn only_a_stopped_task_can_be_settled_as_cancelled() {
    let mut life = Life::new();
    life.start();
    let cancelled = life.settle_event(Outcome::Cancelled);
    assert_eq!(life.refuses(&cancelled), Refusal::NotStopped);
    life.apply(&Event::LeaseOver);
    assert_eq!(life.refuses(&cancelled), Refusal::NotStopped);
}

// Giving back.

#[test]
fn a_declined_task_waits_for_the_back_off_and_at_least_what_the_worker_asks() {
    let declined = |delay| {
        let mut life = Life::new();
        life.start().settle(Outcome::Release { cause: ReleaseCause::Declined, delay });
        life.is(State::Queued, Reason::Declined, EventKind::Released);
        assert_eq!((life.task.retry_count, life.task.losses), (0, 0), "no retry is spent");
        life.task.run_at.since(life.now.at)
    };
    let backoff = declined(Duration::ZERO);
    assert!(backoff >= Duration::from_millis(50) && backoff <= Duration::from_millis(150), "{backoff:?}");
    assert_eq!(declined(seconds(9)), seconds(9));
}

#[test]
fn a_drained_task_is_queued_without_delay() {
    let mut life = Life::new();
    life.start().settle(releases(ReleaseCause::Drain));
    life.is(State::Queued, Reason::Drain, EventKind::Released);
    assert_eq!((life.task.run_at, life.task.idle_deliveries), (life.now.at, 0));
}
