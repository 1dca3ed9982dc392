//! Asking a running task to end: causes, grace, and the design's table of stops, cell by cell.

use crate::support::{LATER, Life, blocks, cancels, error, fails, releases, seconds};
use ledger_core::event::Fact;
use ledger_core::{
    Class, Event, EventKind, Outcome, Overrides, Reason, Refusal, ReleaseCause, State, StopCause,
};

fn stopped(cause: StopCause) -> Life {
    let mut life = Life::new();
    life.start();
    life.apply(&request(cause));
    life.is(State::Running, Reason::None, EventKind::StopRequested);
    life
}

fn request(cause: StopCause) -> Event {
    match cause {
        StopCause::User => cancels(),
        StopCause::Deadline => Event::DeadlinePassed,
        StopCause::Timeout => Event::AttemptTimeout,
        StopCause::Stall => Event::Stall,
        StopCause::Preempt => Event::Preempt,
    }
}

fn outcomes() -> [Outcome; 5] {
    [
        fails(Class::Transient),
        fails(Class::Permanent),
        releases(ReleaseCause::Declined),
        blocks(),
        Outcome::Cancelled,
    ]
}

#[test]
fn complete_within_the_grace_is_done_whatever_the_cause() {
    for cause in StopCause::ALL {
        let mut life = stopped(*cause);
        let effects = life.settle(Outcome::Complete).effects;
        life.is(State::Done, Reason::None, EventKind::Completed);
        assert!(effects.deposit, "{cause}");
        assert_eq!(life.last().fact(Fact::Cause), None, "{cause}: the stop decided nothing");
    }
}

#[test]
fn user_any_other_outcome_is_cancelled() {
    for outcome in outcomes() {
        let mut life = stopped(StopCause::User);
        life.settle(outcome);
        assert_eq!((life.task.state, life.task.reason), (State::Cancelled, Reason::User));
        assert_eq!(life.last().fact(Fact::Cause), Some("USER"));
    }
}

#[test]
fn user_a_loss_or_ack_timeout_is_cancelled() {
    let mut lost = stopped(StopCause::User);
    lost.apply(&Event::LeaseOver);
    lost.is(State::Cancelled, Reason::User, EventKind::Lost);
    assert_eq!(lost.task.losses, 0);
    let mut unacked = Life::new();
    unacked.claim();
    unacked.apply(&cancels());
    unacked.apply(&Event::LeaseOver);
    unacked.is(State::Cancelled, Reason::User, EventKind::AckTimeout);
}

#[test]
fn user_the_end_of_the_grace_is_cancelled_abandoned() {
    let mut life = stopped(StopCause::User);
    life.apply(&Event::GraceOver);
    life.is(State::Cancelled, Reason::Abandoned, EventKind::Abandoned);
    assert_eq!(life.task.fence, 2);
    assert_eq!(life.last().worker.as_deref(), Some("w"), "who did not end it is known");
}

#[test]
fn deadline_everything_but_complete_is_failed_deadline() {
    for outcome in outcomes() {
        let mut life = stopped(StopCause::Deadline);
        life.settle(outcome);
        assert_eq!((life.task.state, life.task.reason), (State::Failed, Reason::Deadline));
    }
    for (event, kind) in [(Event::LeaseOver, EventKind::Lost), (Event::GraceOver, EventKind::Abandoned)] {
        let mut life = stopped(StopCause::Deadline);
        let fence = life.task.fence + u64::from(kind == EventKind::Abandoned);
        life.apply(&event);
        life.is(State::Failed, Reason::Deadline, kind);
        assert_eq!(life.task.fence, fence);
    }
}

#[test]
fn timeout_and_stall_are_as_a_failure_of_class_timeout() {
    for cause in [StopCause::Timeout, StopCause::Stall] {
        for outcome in outcomes() {
            let mut life = stopped(cause);
            let effects = life.settle(outcome.clone()).effects;
            assert_eq!((life.task.state, life.task.reason), (State::Retry, Reason::Backoff), "{outcome:?}");
            assert_eq!((life.task.retry_count, effects.class), (1, Some(Class::Timeout)), "{outcome:?}");
            assert_eq!(effects.reserve, 2, "a timeout costs two tokens: the work may go on");
            assert!(life.last().error.is_some(), "{outcome:?}");
        }
        for event in [Event::LeaseOver, Event::GraceOver] {
            let mut life = stopped(cause);
            life.apply(&event);
            assert_eq!((life.task.state, life.task.reason), (State::Retry, Reason::Backoff), "{event:?}");
            assert_eq!((life.task.retry_count, life.task.losses), (1, 0), "{event:?}");
            let error = life.last().error.clone().expect("an error of our own");
            assert_eq!((error.class, error.code.as_str()), (Class::Timeout, cause.as_str()), "{event:?}");
        }
    }
}

#[test]
fn timeout_without_retries_left_fails() {
    let mut life = Life::with(Overrides { max_retries: Some(0), ..Overrides::NONE });
    life.start();
    life.apply(&Event::AttemptTimeout);
    life.apply(&Event::GraceOver);
    life.is(State::Failed, Reason::RetriesExhausted, EventKind::Abandoned);
}

#[test]
fn a_workers_own_error_is_kept_beside_the_stop_that_decided() {
    let mut life = stopped(StopCause::Timeout);
    life.settle(fails(Class::Permanent));
    assert_eq!(life.last().error, Some(error(Class::Permanent)));
    assert_eq!(life.last().fact(Fact::Cause), Some("TIMEOUT"));
}

#[test]
fn preempt_a_release_or_loss_is_queued_and_uncounted() {
    let release = |life: &mut Life| drop(life.settle(releases(ReleaseCause::Declined)));
    let cancel = |life: &mut Life| drop(life.settle(Outcome::Cancelled));
    let loss = |life: &mut Life| drop(life.apply(&Event::LeaseOver));
    for end in [release, cancel, loss] {
        let mut life = stopped(StopCause::Preempt);
        end(&mut life);
        assert_eq!((life.task.state, life.task.reason), (State::Queued, Reason::Preempted));
        assert_eq!((life.task.preemptions, life.task.idle_deliveries, life.task.losses), (1, 0, 0));
        assert_eq!(life.task.run_at, life.now.at, "without delay");
        assert_eq!(life.last().fact(Fact::Cause), Some("PREEMPT"));
    }
}

#[test]
fn preempt_a_failure_is_a_failure() {
    let mut life = stopped(StopCause::Preempt);
    life.settle(fails(Class::Transient));
    life.is(State::Retry, Reason::Backoff, EventKind::Failed);
    assert_eq!((life.task.retry_count, life.task.preemptions), (1, 0));
    let mut life = stopped(StopCause::Preempt);
    life.settle(fails(Class::Permanent));
    life.is(State::Failed, Reason::Permanent, EventKind::Failed);
}

#[test]
fn preempt_the_end_of_the_grace_queues_it_with_a_new_fence() {
    let mut life = stopped(StopCause::Preempt);
    let outcome = life.settle_event(Outcome::Complete);
    life.apply(&Event::GraceOver);
    life.is(State::Queued, Reason::Preempted, EventKind::Abandoned);
    assert_eq!((life.task.fence, life.task.delivery), (2, 1));
    assert_eq!(life.refuses(&outcome), Refusal::LeaseLost, "its holder has had its time");
}

#[test]
fn the_grace_starts_with_the_request() {
    let mut life = Life::new();
    life.start().wait(seconds(7));
    let stop = life.apply(&cancels()).effects.stop.expect("it is pushed");
    assert_eq!((stop.cause, stop.until), (StopCause::User, life.now.at.after(seconds(30))));
    assert_eq!(life.last().until, Some(stop.until));
    let mut own = Life::with(Overrides { stop_grace: Some(seconds(2)), ..Overrides::NONE });
    own.start();
    let stop = own.apply(&Event::Preempt).effects.stop.expect("it is pushed");
    assert_eq!(stop.until, own.now.at.after(seconds(2)));
}

#[test]
fn the_first_cause_counts_but_user_overrides() {
    for first in StopCause::ALL {
        for second in StopCause::ALL {
            let mut life = stopped(*first);
            let until = life.task.stop.map(|stop| stop.until);
            life.wait(seconds(5));
            let again = life.apply(&request(*second));
            let overrides = *second == StopCause::User && *first != StopCause::User;
            assert_eq!(again.record.is_some(), overrides, "{first} then {second}");
            let expected = if overrides { second } else { first };
            assert_eq!(life.task.stop.map(|stop| stop.cause), Some(*expected), "{first} then {second}");
            assert_eq!(life.task.stop.map(|stop| stop.until), until, "one grace, from the first request");
        }
    }
}

#[test]
fn a_stop_survives_ack_and_beats_and_ends_with_the_delivery() {
    let mut life = Life::new();
    life.claim();
    life.apply(&Event::Preempt);
    life.ack();
    life.beat();
    assert!(life.task.stop.is_some());
    life.settle(Outcome::Cancelled);
    assert_eq!(life.task.stop, None);
    life.wait(LATER).claim();
    assert_eq!(life.task.stop, None);
}

#[test]
fn an_attempt_that_never_began_cannot_time_out() {
    for event in [Event::AttemptTimeout, Event::Stall] {
        let mut life = Life::new();
        life.claim();
        assert_eq!(life.refuses(&event), Refusal::WrongState(State::Running));
    }
}

#[test]
fn a_stop_other_than_of_a_failure_is_neutral_to_the_breaker() {
    for (cause, expected) in [
        (StopCause::User, breaker_core::Sample::Neutral),
        (StopCause::Deadline, breaker_core::Sample::Neutral),
        (StopCause::Timeout, breaker_core::Sample::Failure),
        (StopCause::Stall, breaker_core::Sample::Failure),
        (StopCause::Preempt, breaker_core::Sample::Neutral),
    ] {
        let mut life = Life::new();
        life.claim_as(true);
        life.ack();
        life.apply(&request(cause));
        let effects = life.apply(&Event::GraceOver).effects;
        assert_eq!(effects.sample.map(|(_, sample)| sample), Some(expected), "{cause}");
    }
}
