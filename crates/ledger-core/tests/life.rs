//! The course of a task's life: what the first specification asked of the ledger, and every counter's rule.

use crate::support::{
    LATER, Life, START, blocks, cancels, discards, error, fails, redrives, releases, seconds,
};
use ledger_core::fold::{Broken, Folded};
use ledger_core::{
    Class, Event, EventKind, Now, Outcome, Overrides, Reason, Refusal, ReleaseCause, State, Timestamp,
};

// What the first specification asked for.

#[test]
fn an_enqueued_task_is_queued_with_one_row() {
    let life = Life::new();
    life.is(State::Queued, Reason::None, EventKind::Enqueued);
    assert_eq!((life.task.version, life.task.fence, life.task.attempt), (1, 0, 0));
    assert_eq!(life.last().from, None);
}

#[test]
fn queued_running_done() {
    let mut life = Life::new();
    life.start().wait(seconds(1));
    let applied = life.settle(Outcome::Complete);
    life.is(State::Done, Reason::None, EventKind::Completed);
    assert!(applied.effects.settled && applied.effects.deposit);
    let kinds = [EventKind::Enqueued, EventKind::Assigned, EventKind::Started, EventKind::Completed];
    assert_eq!(life.kinds(), kinds);
}

#[test]
fn a_failure_leads_to_a_retry_with_the_count_rising() {
    let mut life = Life::new();
    for count in 1..=3 {
        life.fail_once();
        life.is(State::Retry, Reason::Backoff, EventKind::Failed);
        assert_eq!((life.task.retry_count, life.task.attempt), (count, count));
    }
}

#[test]
fn exhaustion_fails_the_task_by_itself() {
    let mut life = Life::new();
    for _ in 0..3 {
        life.fail_once();
    }
    life.fail_once();
    life.is(State::Failed, Reason::RetriesExhausted, EventKind::Failed);
    assert_eq!((life.task.retry_count, life.task.attempt), (3, 4), "a final failure leads to no retry");
}

#[test]
fn without_retries_the_first_failure_is_final() {
    let mut life = Life::with(Overrides { max_retries: Some(0), ..Overrides::NONE });
    life.fail_once();
    life.is(State::Failed, Reason::RetriesExhausted, EventKind::Failed);
}

#[test]
fn a_permanent_failure_is_final_and_can_be_redriven_from_the_dead_letters() {
    let mut life = Life::new();
    life.start();
    let applied = life.settle(fails(Class::Permanent));
    life.is(State::Failed, Reason::Permanent, EventKind::Failed);
    assert_eq!(life.last().error, Some(error(Class::Permanent)), "the dead letter has its error");
    assert_eq!(applied.effects.class, Some(Class::Permanent));
    life.apply(&redrives());
    life.is(State::Queued, Reason::Redriven, EventKind::Redriven);
}

#[test]
fn the_failure_that_opens_the_breaker_is_retried_and_blocked_when_it_is_due() {
    let mut life = Life::new();
    life.claim_as(false);
    let applied = life.settle(fails(Class::Transient));
    life.is(State::Retry, Reason::Backoff, EventKind::Failed);
    let (_, sample) = applied.effects.sample.expect("the breaker is told");
    assert_eq!(sample, breaker_core::Sample::Failure);
    assert_eq!(life.refuses(&Event::Gate), Refusal::WrongState(State::Retry), "not before it is due");
    life.wait(LATER).apply(&Event::Gate);
    life.is(State::Blocked, Reason::BreakerOpen, EventKind::Gated);
    let run_at = life.task.run_at;
    life.apply(&Event::Ungate);
    life.is(State::Queued, Reason::None, EventKind::Ungated);
    assert_eq!(life.task.run_at, run_at, "so that the usual order holds");
}

#[test]
fn illegal_transitions_are_refused_by_name() {
    let mut life = Life::new();
    assert_eq!(life.refuses(&Event::Ungate), Refusal::WrongState(State::Queued));
    assert_eq!(life.refuses(&redrives()), Refusal::WrongState(State::Queued));
    life.start().settle(Outcome::Complete);
    assert_eq!(life.refuses(&cancels()), Refusal::TaskTerminal);
    let complete = life.settle_event(Outcome::Complete);
    assert_eq!(life.refuses(&complete), Refusal::TaskTerminal);
    assert_eq!(Refusal::WrongState(State::Done).to_string(), "the task is DONE, which does not allow this");
}

#[test]
fn the_history_is_complete_and_in_order() {
    let mut life = Life::new();
    life.fail_once();
    life.start().settle(blocks());
    life.apply(&Event::Unblock { answer: Some("yes".into()), actor: Some("ann".into()) });
    life.start().settle(Outcome::Complete);
    let kinds = [
        EventKind::Enqueued,
        EventKind::Assigned,
        EventKind::Started,
        EventKind::Failed,
        EventKind::Assigned,
        EventKind::Started,
        EventKind::Blocked,
        EventKind::Unblocked,
        EventKind::Assigned,
        EventKind::Started,
        EventKind::Completed,
    ];
    assert_eq!(life.kinds(), kinds);
    assert!(life.history.iter().zip(1..).all(|(row, version)| row.version == version));
    assert!(life.history.windows(2).all(|two| two[1].from == Some(two[0].to) && two[0].at <= two[1].at));
}

// Counters.

#[test]
fn a_claim_raises_fence_and_delivery_and_an_ack_the_attempt() {
    let mut life = Life::new();
    life.claim();
    let counts = |life: &Life| (life.task.fence, life.task.delivery, life.task.attempt);
    assert_eq!(counts(&life), (1, 1, 0));
    life.ack();
    assert_eq!(counts(&life), (1, 1, 1));
    life.settle(fails(Class::Transient));
    life.wait(LATER).claim();
    assert_eq!(counts(&life), (2, 2, 1));
}

#[test]
fn the_fence_rises_at_claims_and_at_the_end_of_a_grace_only() {
    let mut life = Life::new();
    life.start();
    life.apply(&Event::Preempt);
    assert_eq!(life.task.fence, 1);
    life.apply(&Event::GraceOver);
    assert_eq!((life.task.fence, life.task.delivery), (2, 1));
    life.start();
    life.apply(&Event::LeaseOver);
    life.beat();
    life.settle(fails(Class::Permanent));
    life.apply(&redrives());
    assert_eq!(life.task.fence, 3, "loss, resume, outcome and redrive leave it");
}

#[test]
fn an_outcome_without_an_ack_counts_as_both_and_writes_one_row() {
    for outcome in [
        Outcome::Complete,
        fails(Class::Transient),
        blocks(),
        releases(ReleaseCause::Declined),
        releases(ReleaseCause::Drain),
    ] {
        let mut life = Life::new();
        life.claim();
        let rows = life.history.len();
        life.settle(outcome.clone());
        assert_eq!((life.history.len() - rows, life.task.attempt), (1, 1), "{outcome:?}");
        assert_eq!(life.last().attempt, 1, "{outcome:?}");
    }
}

#[test]
fn a_repeated_ack_adds_no_row() {
    let mut life = Life::new();
    life.start();
    assert_eq!(life.ack().record, None);
    assert_eq!(life.task.attempt, 1);
}

#[test]
fn deliveries_are_idle_until_an_attempt_ends_in_complete_fail_or_block() {
    let idle = |end: fn(&mut Life)| {
        let mut life = Life::new();
        for _ in 0..2 {
            life.claim();
            life.apply(&Event::TakenBack { sampled: false });
        }
        life.claim();
        end(&mut life);
        life.task.idle_deliveries
    };
    assert_eq!(idle(|_| ()), 3);
    assert_eq!(idle(|life| drop(life.ack())), 3, "begun is not ended");
    assert_eq!(idle(|life| drop(life.apply(&Event::LeaseOver))), 3);
    assert_eq!(idle(|life| drop(life.settle(releases(ReleaseCause::Declined)))), 3);
    assert_eq!(idle(|life| drop(life.settle(releases(ReleaseCause::Drain)))), 2, "uncounted");
    assert_eq!(idle(|life| drop(life.settle(releases(ReleaseCause::Preempted)))), 2, "uncounted");
    assert_eq!(idle(|life| drop(life.settle(Outcome::Complete))), 0);
    assert_eq!(idle(|life| drop(life.settle(fails(Class::Unknown)))), 0);
    assert_eq!(idle(|life| drop(life.settle(blocks()))), 0);
}

#[test]
fn a_task_delivered_twenty_times_in_vain_is_undeliverable() {
    let mut life = Life::new();
    for _ in 0..19 {
        life.claim();
        life.settle(releases(ReleaseCause::Declined));
        life.wait(LATER);
    }
    assert_eq!(life.refuses(&Event::Undeliverable), Refusal::WrongState(State::Queued));
    life.claim();
    life.settle(releases(ReleaseCause::Declined));
    life.apply(&Event::Undeliverable);
    life.is(State::Failed, Reason::Undeliverable, EventKind::Undeliverable);
}

#[test]
fn a_redrive_resets_the_counts_that_bound_and_keeps_those_that_name() {
    let mut life = Life::new();
    life.fail_once();
    life.lose_once();
    life.start();
    life.apply(&Event::Preempt);
    life.settle(Outcome::Cancelled);
    life.claim();
    life.apply(&Event::LeaseOver);
    life.wait(LATER).start().settle(fails(Class::Permanent));
    let before = life.task.clone();
    assert!(before.retry_count > 0 && before.losses > 0 && before.preemptions > 0);
    life.apply(&redrives());
    let task = &life.task;
    assert_eq!((task.retry_count, task.losses, task.idle_deliveries, task.preemptions), (0, 0, 0, 0));
    assert_eq!((task.fence, task.delivery, task.attempt), (before.fence, before.delivery, before.attempt));
    assert_eq!((task.redrives, task.id), (1, before.id));
    assert_eq!(task.run_at, life.now.at, "it may run at once");
}

#[test]
fn a_redrive_drops_a_past_deadline_unless_a_new_one_is_given() {
    let failed = || {
        let mut life = Life::until(LATER);
        life.start().settle(fails(Class::Permanent));
        life
    };
    let mut early = failed();
    early.apply(&redrives());
    assert_eq!(early.task.deadline, Some(START.after(LATER)), "one that lies ahead stays");
    let mut late = failed();
    late.wait(LATER).apply(&redrives());
    assert_eq!(late.task.deadline, None);
    let mut new = failed();
    let deadline = Some(START.after(3 * LATER));
    new.wait(2 * LATER).apply(&Event::Redrive(Box::new(ledger_core::Redrive {
        deadline,
        note: "ann".into(),
        ..ledger_core::Redrive::default()
    })));
    assert_eq!(new.task.deadline, deadline);
}

#[test]
fn a_discarded_dead_letter_stays_failed_and_is_not_redriven() {
    let mut life = Life::new();
    life.start().settle(fails(Class::Permanent));
    life.apply(&discards());
    life.is(State::Failed, Reason::Permanent, EventKind::Discarded);
    assert_eq!(life.refuses(&redrives()), Refusal::Discarded);
    assert_eq!(life.apply(&discards()).record, None);
}

// Time and extremes.

#[test]
fn a_row_is_never_older_than_the_one_before_it() {
    let mut life = Life::new();
    life.wait(LATER).claim();
    let claimed_at = life.last().at;
    life.now.at = START.before(LATER);
    life.ack();
    life.settle(Outcome::Complete);
    assert_eq!(life.last().at, claimed_at);
}

#[test]
fn a_calendar_time_follows_the_wall_clock() {
    let mut life = Life::enqueued(Overrides::NONE, Some(START.after(LATER)), None);
    assert!(!life.task.can_be_claimed(life.now));
    life.now.skew = 3_600_000;
    assert!(life.task.can_be_claimed(life.now), "the wall clock was set forward");
    life.now = Now { at: START.after(LATER), skew: -1 };
    assert!(!life.task.can_be_claimed(life.now));
}

#[test]
fn extreme_times_and_counts_panic_nowhere() {
    for millis in [i64::MIN, -1, 0, i64::MAX] {
        for skew in [i64::MIN, 0, i64::MAX] {
            for deadline in [None, Some(Timestamp::from_millis(i64::MIN)), Some(Timestamp::FAR)] {
                let mut life = Life::new();
                life.now = Now { at: Timestamp::from_millis(millis), skew };
                life.task.deadline = deadline;
                life.task.run_at = Timestamp::from_millis(i64::MIN);
                for counter in [
                    &mut life.task.delivery,
                    &mut life.task.attempt,
                    &mut life.task.retry_count,
                    &mut life.task.losses,
                    &mut life.task.idle_deliveries,
                    &mut life.task.preemptions,
                    &mut life.task.redrives,
                    &mut life.task.probe_failures,
                    &mut life.task.previous_delay,
                ] {
                    *counter = u32::MAX;
                }
                run_to_every_end(&life);
            }
        }
    }
}

/// Every way a delivery can end, without the history: it does not tell of counters set by hand.
fn run_to_every_end(life: &Life) {
    let ends: [fn(&Life) -> Event; 7] = [
        |life| life.settle_event(Outcome::Complete),
        |life| {
            life.settle_event(Outcome::Fail {
                error: error(Class::Timeout),
                retry_after: Some(std::time::Duration::MAX),
            })
        },
        |life| {
            life.settle_event(Outcome::Release {
                cause: ReleaseCause::Declined,
                delay: std::time::Duration::MAX,
            })
        },
        |life| life.settle_event(releases(ReleaseCause::Preempted)),
        |_| Event::LeaseOver,
        |_| Event::AttemptTimeout,
        |_| cancels(),
    ];
    let cx = ledger_core::Context {
        now: life.now,
        settings: &life.settings,
        draw: u64::MAX,
        affords: &|_| false,
        digest: 0,
        lost_with: ledger_core::LostWith::ALONE,
    };
    for end in ends {
        let mut life = life.clone();
        let claim = Event::Claim {
            holder: crate::support::holder("w"),
            permit: Some(breaker_core::Permit { epoch: u64::MAX, probe: true, slot: 0 }),
        };
        let _ = life.task.apply(&claim, &cx);
        let _ = life.task.apply(&life.ack_event(), &cx);
        let event = end(&life);
        let _ = life.task.apply(&event, &cx);
        let _ = life.task.apply(&Event::GraceOver, &cx);
        let _ = life.task.apply(&redrives(), &cx);
    }
}

#[test]
fn a_broken_history_is_named_by_its_row() {
    let mut life = Life::new();
    life.start().settle(Outcome::Complete);
    let broken = |change: fn(&mut Vec<ledger_core::Record>)| {
        let mut rows = life.history.clone();
        change(&mut rows);
        Folded::of(&rows).map(drop).expect_err("broken")
    };
    let at = |version, what| Broken { version, what };
    assert_eq!(broken(|rows| drop(rows.remove(1))), at(3, "versions have a gap"));
    assert_eq!(broken(|rows| rows[2].from = Some(State::Retry)), at(3, "it starts from another state"));
    assert_eq!(broken(|rows| rows[2].fence = 0), at(3, "the fence fell"));
    assert_eq!(broken(|rows| rows[3].attempt = 0), at(4, "the attempt fell"));
    assert_eq!(broken(|rows| rows[3].at = START.before(LATER)), at(4, "time runs backwards"));
}
