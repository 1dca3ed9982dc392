//! Nothing loops without bound: what costs nothing by itself is counted all the same.

use crate::support::*;
use ledger_core::limits::{BLOCKS, FREE_RELEASES, IDLE_DELIVERIES, LOSS_MEMORY};
use ledger_core::{Event, EventKind, Fact, LostWith, Outcome, Overrides, Reason, ReleaseCause, State};
use std::time::Duration;

#[test]
fn releases_for_drain_and_preemption_are_free_a_hundred_times_in_a_row() {
    for cause in [ReleaseCause::Drain, ReleaseCause::Preempted] {
        let mut life = Life::new();
        for _ in 0..FREE_RELEASES {
            life.claim();
            life.settle(releases(cause));
            assert_eq!((life.task.idle_deliveries, life.task.run_at), (0, life.now.at));
        }
        life.claim();
        life.settle(releases(cause));
        assert_eq!(life.task.idle_deliveries, 1, "{cause:?}");
        assert!(life.task.run_at > life.now.at, "now it waits");
        let mut more = 1;
        while life.task.idle_deliveries < IDLE_DELIVERIES {
            life.wait(LATER).claim();
            life.settle(releases(cause));
            more += 1;
        }
        assert_eq!(more, IDLE_DELIVERIES);
        life.apply(&Event::Undeliverable);
        life.is(State::Failed, Reason::Undeliverable, EventKind::Undeliverable);
    }
}

#[test]
fn an_attempt_that_ends_makes_releases_free_again() {
    let mut life = Life::with(Overrides { max_retries: Some(5), ..Overrides::NONE });
    for _ in 0..FREE_RELEASES {
        life.claim();
        life.settle(releases(ReleaseCause::Drain));
    }
    life.claim();
    life.settle(fails(ledger_core::Class::Transient));
    life.wait(LATER).claim();
    life.settle(releases(ReleaseCause::Drain));
    assert_eq!((life.task.idle_deliveries, life.task.free_releases), (0, 1));
}

#[test]
fn a_block_that_ends_by_itself_again_and_again_fails_the_task() {
    let mut life = Life::new();
    let block = |life: &mut Life| {
        let until = Some(life.now.wall().after(seconds(1)));
        life.claim();
        life.settle(Outcome::Block { question: "ready?".into(), until });
    };
    for _ in 0..BLOCKS {
        block(&mut life);
        life.is(State::Blocked, Reason::Worker, EventKind::Blocked);
        life.wait(seconds(1)).apply(&unblocks());
    }
    block(&mut life);
    life.is(State::Failed, Reason::Permanent, EventKind::Blocked);
    let error = life.last().error.as_ref().expect("it says why");
    assert_eq!(error.code, "BLOCKED_TOO_OFTEN");
}

#[test]
fn an_answer_makes_blocks_count_anew() {
    let mut life = Life::new();
    for answered in [false, true] {
        life.claim();
        life.settle(Outcome::Block { question: "ready?".into(), until: None });
        let answer = answered.then(|| "yes".into());
        life.apply(&Event::Unblock { answer, actor: None });
    }
    assert_eq!(life.task.blocks, 0);
}

#[test]
fn beats_alone_bring_an_unstarted_task_back_twenty_times_at_most() {
    let mut life = Life::new();
    life.claim();
    for resumed in 1.. {
        life.apply(&Event::LeaseOver);
        if life.task.idle_deliveries >= IDLE_DELIVERIES {
            assert_eq!(resumed, IDLE_DELIVERIES);
            break;
        }
        let beat = life.beat_event();
        life.apply(&beat);
        life.is(State::Running, Reason::None, EventKind::Resumed);
    }
    life.apply(&Event::Undeliverable);
    life.is(State::Failed, Reason::Undeliverable, EventKind::Undeliverable);
}

/// Loses the task as one of `tasks`.
fn lose(life: &mut Life, tasks: u32) {
    life.wait(LATER).claim();
    life.ack();
    life.lost_with = LostWith { tasks, sampled: false };
    life.apply(&Event::LeaseOver);
}

#[test]
fn of_k_tasks_lost_together_each_weighs_a_kth_toward_poison() {
    let mut life = Life::new();
    for lost in 1..=11 {
        lose(&mut life, 4);
        assert_eq!((life.task.losses, life.task.loss_weight), (lost, 250 * lost));
        assert_eq!(life.last().fact(Fact::Weight), Some("250"));
        life.is(State::Retry, Reason::Lost, EventKind::Lost);
    }
    lose(&mut life, 4);
    life.is(State::Failed, Reason::Poison, EventKind::Lost);
}

#[test]
fn a_share_of_a_loss_is_not_poison_where_one_loss_would_be() {
    let mut life = Life::with(Overrides { max_losses: Some(1), ..Overrides::NONE });
    lose(&mut life, 2);
    life.is(State::Retry, Reason::Lost, EventKind::Lost);
    lose(&mut life, 2);
    life.is(State::Failed, Reason::Poison, EventKind::Lost);
}

#[test]
fn losses_are_forgotten_three_days_after_the_last() {
    for (pause, poison) in [(LOSS_MEMORY - LATER - seconds(1), true), (LOSS_MEMORY, false)] {
        let mut life = Life::new();
        lose(&mut life, 1);
        lose(&mut life, 1);
        life.wait(pause);
        lose(&mut life, 1);
        let expected = if poison { Reason::Poison } else { Reason::Lost };
        assert_eq!((life.task.reason, life.task.losses), (expected, 3), "{pause:?}");
    }
}

#[test]
fn a_hint_is_honoured_as_far_as_the_policy_says() {
    let hint_max = Some(seconds(90));
    for (asked, least, cut) in [(60, 60, false), (3_600, 90, true)] {
        let mut life = Life::with(Overrides { hint_max, ..Overrides::NONE });
        life.claim();
        life.settle(Outcome::Fail {
            error: error(ledger_core::Class::Overloaded),
            retry_after: Some(seconds(asked)),
        });
        let waits = life.task.run_at.since(life.now.at);
        assert!(waits >= seconds(least) && waits <= seconds(least) + seconds(least) / 10, "{waits:?}");
        assert_eq!(life.last().fact(Fact::HintCut).is_some(), cut);
    }
}

#[test]
fn a_redriven_task_may_become_due_later_and_more_urgently() {
    let mut life = Life::new();
    life.claim();
    life.settle(fails(ledger_core::Class::Permanent));
    let at = life.now.at.after(Duration::from_secs(7));
    let redrive = ledger_core::Redrive { run_at: Some(at), priority: Some(9), ..Default::default() };
    life.apply(&Event::Redrive(Box::new(redrive)));
    life.is(State::Queued, Reason::Redriven, EventKind::Redriven);
    assert_eq!((life.task.run_at, life.task.queued_at, life.task.priority), (at, at, 9));
}

#[test]
fn an_update_moves_a_waiting_task_and_leaves_what_it_does_not_name() {
    let mut life = Life::new();
    let at = life.now.wall().after(seconds(30));
    life.apply(&updates(None, Some(at)));
    assert_eq!((life.task.run_at, life.task.queued_at, life.task.priority), (at, at, 5));
    assert!(!life.task.can_be_claimed(life.now));
    life.apply(&updates(Some(0), None));
    assert_eq!((life.task.run_at, life.task.priority), (at, 0));
    life.apply(&updates(None, Some(START)));
    assert!(life.task.can_be_claimed(life.now), "a time that is past is now");
}
