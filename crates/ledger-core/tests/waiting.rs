//! Tasks that wait: until they are due, for a person, for a breaker; and what ends the wait.

use crate::support::{LATER, Life, START, blocks, caller, cancels, fails, redrives, seconds, unblocks};
use ledger_core::event::Fact;
use ledger_core::{Class, Event, EventKind, Outcome, Overrides, Reason, Refusal, State, Timestamp};

#[test]
fn a_task_is_claimed_when_it_is_due_and_not_before() {
    let mut life = Life::enqueued(Overrides::NONE, Some(START.after(seconds(10))), None);
    let claim = Event::Claim { holder: crate::support::holder("w"), permit: None };
    life.wait(seconds(9));
    assert_eq!(life.refuses(&claim), Refusal::WrongState(State::Queued));
    life.wait(seconds(1)).claim();
    life.is(State::Running, Reason::None, EventKind::Assigned);
}

// Before the first ack.

#[test]
fn queue_timeout_counts_from_the_latest_of_enqueue_and_run_at() {
    assert_eq!(Life::new().task.queued_at, START);
    let ahead = START.after(LATER);
    assert_eq!(Life::enqueued(Overrides::NONE, Some(ahead), None).task.queued_at, ahead);
    let past = START.before(LATER);
    assert_eq!(Life::enqueued(Overrides::NONE, Some(past), None).task.queued_at, START);
}

#[test]
fn queue_timeout_ends_a_task_that_nobody_acknowledged() {
    let mut life = Life::new();
    life.claim();
    life.apply(&Event::LeaseOver);
    life.apply(&Event::QueueTimeout);
    life.is(State::Failed, Reason::QueueTimeout, EventKind::QueueTimeout);
    let mut gated = Life::new();
    gated.apply(&Event::Gate);
    gated.apply(&Event::QueueTimeout);
    gated.is(State::Failed, Reason::QueueTimeout, EventKind::QueueTimeout);
}

#[test]
fn queue_timeout_is_over_with_the_first_ack_and_begins_anew_with_a_redrive() {
    let mut life = Life::new();
    life.fail_once();
    assert_eq!(life.refuses(&Event::QueueTimeout), Refusal::WrongState(State::Retry));
    life.start().settle(fails(Class::Permanent));
    life.apply(&redrives());
    assert_eq!(life.task.queued_at, life.now.at);
    life.apply(&Event::QueueTimeout);
    life.is(State::Failed, Reason::QueueTimeout, EventKind::QueueTimeout);
}

// A deadline or a user ends the wait.

#[test]
fn a_deadline_ends_every_wait() {
    let waits: [fn(&mut Life); 4] = [
        |_| (),
        |life| drop(life.fail_once()),
        |life| drop(life.start().settle(blocks())),
        |life| drop(life.apply(&Event::Gate)),
    ];
    for wait in waits {
        let mut life = Life::until(3 * LATER);
        wait(&mut life);
        life.apply(&Event::DeadlinePassed);
        life.is(State::Failed, Reason::Deadline, EventKind::DeadlinePassed);
    }
}

#[test]
fn a_waiting_task_is_cancelled_at_once_and_says_by_whom() {
    let mut life = Life::new();
    life.apply(&cancels());
    life.is(State::Cancelled, Reason::User, EventKind::Cancelled);
    assert_eq!(life.last().fact(Fact::Note), Some("ann: enough"));
    assert_eq!(life.apply(&cancels()).record, None, "again is no other cancel");
}

#[test]
fn a_cancelled_lost_task_takes_no_late_outcome() {
    let mut life = Life::new();
    life.lose_once();
    life.apply(&cancels());
    let late = life.settle_event(Outcome::Complete);
    assert_eq!(life.refuses(&late), Refusal::TaskTerminal);
}

// For a person or an event.

#[test]
fn a_block_keeps_its_question_and_an_unblock_its_answer() {
    let mut life = Life::new();
    life.start();
    let until = Some(START.after(LATER));
    life.settle(Outcome::Block { question: "may I?".into(), until });
    life.is(State::Blocked, Reason::Worker, EventKind::Blocked);
    assert_eq!((life.last().fact(Fact::Question), life.last().until), (Some("may I?"), until));
    assert_eq!((life.task.run_at, life.task.calendar), (START.after(LATER), true));
    assert!(!life.task.can_be_claimed(life.now), "the slot is free, the task is not");
    life.apply(&Event::Unblock { answer: Some("yes".into()), actor: Some("ann".into()) });
    life.is(State::Queued, Reason::None, EventKind::Unblocked);
    assert_eq!(life.last().fact(Fact::Answer), Some("yes"));
    assert_eq!(life.last().fact(Fact::Note), Some("ann"));
    assert!(life.task.can_be_claimed(life.now), "at once");
}

#[test]
fn a_block_without_an_end_waits_for_ever() {
    let mut life = Life::new();
    life.start().settle(blocks());
    assert_eq!((life.task.run_at, life.task.calendar), (Timestamp::FAR, false));
    assert_eq!(life.last().until, None);
}

#[test]
fn a_blocked_task_goes_on_by_itself_when_its_time_comes() {
    let mut life = Life::new();
    life.start();
    let until = Some(START.after(seconds(60)));
    life.settle(Outcome::Block { question: "wait".into(), until });
    life.wait(seconds(60)).apply(&unblocks());
    life.is(State::Queued, Reason::None, EventKind::Unblocked);
    assert!(life.last().facts.is_empty(), "nobody answered");
    assert!(life.task.can_be_claimed(life.now));
}

#[test]
fn a_blocked_task_is_held_by_nobody() {
    let mut life = Life::new();
    life.start().settle(blocks());
    let beat = life.beat_event();
    assert_eq!(life.refuses(&beat), Refusal::LeaseLost);
}

// For a breaker.

#[test]
fn a_task_that_the_breaker_holds_back_is_not_unblocked_by_hand() {
    let mut life = Life::new();
    life.apply(&Event::Gate);
    assert_eq!(life.refuses(&unblocks()), Refusal::BlockedByBreaker);
}

#[test]
fn a_gated_task_may_be_the_probe() {
    let mut life = Life::new();
    life.apply(&Event::Gate);
    assert!(life.task.can_be_claimed(life.now));
    life.claim_as(true);
    life.is(State::Running, Reason::None, EventKind::Assigned);
}

#[test]
fn a_gated_retry_keeps_its_token_and_its_place() {
    let mut life = Life::new();
    life.fail_once();
    let (run_at, tokens) = (life.task.run_at, life.task.tokens);
    life.apply(&Event::Gate);
    life.apply(&Event::Ungate);
    assert_eq!((life.task.run_at, life.task.tokens), (run_at, tokens));
    assert_eq!(life.claim().effects.refund, 0, "its claim spends it");
}

// Who may speak.

#[test]
fn a_caller_is_told_why_it_may_not_speak() {
    let mut life = Life::new();
    assert_eq!(life.refuses(&Event::Ack(caller("w"), 1)), Refusal::UnknownFence);
    life.start();
    assert_eq!(life.refuses(&Event::Ack(caller("x"), 1)), Refusal::NotHolder);
    life.settle(fails(Class::Transient));
    assert_eq!(life.refuses(&Event::Ack(caller("w"), 1)), Refusal::LeaseLost);
    assert_eq!(life.refuses(&Event::Ack(caller("w"), 2)), Refusal::UnknownFence);
    life.wait(LATER).start().settle(Outcome::Complete);
    assert_eq!(life.refuses(&Event::Ack(caller("w"), 2)), Refusal::TaskTerminal);
}
