//! Retries: their delay, their price, what a hint and a deadline do to them, and probes.

use crate::support::{LATER, Life, START, cancels, error, fails, redrives, releases, seconds};
use ledger_core::event::Fact;
use ledger_core::{
    AgentOverrides, Class, Event, EventKind, Outcome, Overrides, Reason, Refusal, ReleaseCause, Settings,
    State,
};
use std::time::Duration;

fn hinted(after: Duration) -> Outcome {
    Outcome::Fail { error: error(Class::Overloaded), retry_after: Some(after) }
}

fn waits(life: &Life) -> Duration {
    life.task.run_at.since(life.now.at)
}

// Tokens.

#[test]
fn a_retry_reserves_a_token_and_its_claim_spends_it() {
    let mut life = Life::new();
    life.start();
    let effects = life.settle(fails(Class::Transient)).effects;
    assert_eq!((effects.reserve, life.task.tokens, life.tokens), (1, 1, 99));
    assert_eq!(life.last().fact(Fact::Tokens), Some("1"));
    let effects = life.wait(LATER).claim().effects;
    assert_eq!((effects.refund, life.task.tokens, life.tokens), (0, 0, 99));
}

#[test]
fn a_reserved_token_goes_back_when_the_retry_is_not_dispatched() {
    let ends: [fn(&mut Life); 4] = [
        |life| drop(life.apply(&cancels())),
        |life| drop(life.apply(&Event::DeadlinePassed)),
        |life| {
            life.wait(LATER).apply(&Event::Gate);
            life.apply(&cancels());
        },
        |life| {
            life.wait(LATER).apply(&Event::Gate);
            life.apply(&Event::Ungate);
            life.apply(&cancels());
        },
    ];
    for end in ends {
        let mut life = Life::new();
        life.start().settle(fails(Class::Timeout));
        assert_eq!(life.tokens, 98, "where no answer came a retry costs double");
        end(&mut life);
        assert_eq!((life.tokens, life.task.tokens), (100, 0));
    }
}

#[test]
fn a_late_outcome_gives_the_token_of_the_loss_back() {
    let mut life = Life::new();
    life.lose_once();
    assert_eq!((life.task.tokens, life.tokens), (1, 99));
    let effects = life.settle(Outcome::Complete).effects;
    assert_eq!((effects.refund, life.tokens), (1, 100));
    assert!(effects.deposit, "a success funds the budget, late or not");
}

#[test]
fn an_empty_budget_defers_the_retry_until_a_token_comes() {
    let mut life = Life::new();
    life.tokens = 0;
    life.start();
    let effects = life.settle(fails(Class::Timeout)).effects;
    life.is(State::Retry, Reason::Budget, EventKind::Failed);
    assert_eq!((effects.reserve, life.task.tokens, life.task.retry_count), (0, 2, 1));
    life.wait(LATER);
    assert!(!life.task.can_be_claimed(life.now), "due or not");
    assert_eq!(life.refuses(&Event::Gate), Refusal::WrongState(State::Retry), "the breaker is asked later");
    life.tokens = 5;
    let effects = life.apply(&Event::BudgetGranted).effects;
    life.is(State::Retry, Reason::Backoff, EventKind::BudgetGranted);
    assert_eq!((effects.reserve, life.tokens), (2, 3));
    assert!(life.task.can_be_claimed(life.now));
}

#[test]
fn a_grant_does_not_cut_the_back_off_short() {
    let mut life = Life::new();
    life.tokens = 0;
    life.start().settle(fails(Class::Transient));
    let run_at = life.task.run_at;
    life.tokens = 5;
    life.apply(&Event::BudgetGranted);
    assert_eq!(life.task.run_at, run_at);
}

#[test]
fn a_retry_that_no_token_comes_for_fails_and_gives_nothing_back() {
    let mut life = Life::new();
    life.tokens = 0;
    life.start().settle(fails(Class::Transient));
    let effects = life.apply(&Event::BudgetExpired).effects;
    life.is(State::Failed, Reason::Budget, EventKind::BudgetExpired);
    assert_eq!((effects.refund, life.tokens), (0, 0));
}

#[test]
fn no_retry_costs_more_than_its_budget_can_hold() {
    let mut life = Life::new();
    let given = AgentOverrides { budget_capacity: Some(1.0), ..AgentOverrides::default() };
    life.settings = Settings::of(given).expect("valid");
    life.tokens = 1;
    life.start().settle(fails(Class::Timeout));
    life.is(State::Retry, Reason::Backoff, EventKind::Failed);
    assert_eq!(life.tokens, 0, "two tokens would never be there at once");
}

#[test]
fn without_a_budget_nothing_is_reserved() {
    let mut life = Life::new();
    let given = AgentOverrides { budget_enabled: Some(false), ..AgentOverrides::default() };
    life.settings = Settings::of(given).expect("valid");
    life.tokens = 0;
    life.fail_once();
    life.is(State::Retry, Reason::Backoff, EventKind::Failed);
    life.lose_once();
    assert_eq!((life.task.tokens, life.task.reason), (0, Reason::Lost));
}

#[test]
fn an_empty_budget_holds_no_loss_back() {
    let mut life = Life::new();
    life.tokens = 0;
    life.start().apply(&Event::LeaseOver);
    life.is(State::Retry, Reason::Lost, EventKind::Lost);
    assert_eq!(life.task.tokens, 0);
    assert!(life.wait(LATER).task.can_be_claimed(ledger_core::Now::steady(START.after(LATER))));
}

#[test]
fn a_release_and_a_block_cost_nothing() {
    for outcome in [releases(ReleaseCause::Declined), crate::support::blocks()] {
        let mut life = Life::new();
        life.start().settle(outcome);
        assert_eq!((life.tokens, life.task.tokens, life.task.retry_count), (100, 0, 0));
    }
}

// Delays.

#[test]
fn back_off_doubles_within_its_jitter() {
    for (draw, expected) in [(0, [50, 100, 200]), (u64::MAX, [150, 300, 600])] {
        let mut life = Life::new();
        life.draw = draw;
        for delay in expected {
            life.start().settle(fails(Class::Transient));
            assert_eq!(waits(&life), Duration::from_millis(delay));
            assert_eq!(life.last().until, Some(life.task.run_at), "the row says when");
            life.wait(LATER);
        }
    }
}

#[test]
fn decorrelated_jitter_grows_from_the_delay_before() {
    let jitter = Some(retry_core::Jitter::Decorrelated);
    let mut life = Life::with(Overrides { jitter, ..Overrides::NONE });
    life.draw = u64::MAX;
    for delay in [300, 900, 2_700] {
        life.start().settle(fails(Class::Transient));
        assert_eq!(waits(&life), Duration::from_millis(delay));
        life.wait(LATER);
    }
}

#[test]
fn a_hint_moves_run_at_and_is_cut_at_its_limit() {
    let mut life = Life::new();
    life.start().settle(hinted(seconds(60)));
    assert!(waits(&life) >= seconds(60) && waits(&life) <= seconds(66), "{:?}", waits(&life));
    assert_eq!(life.last().fact(Fact::HintCut), None);
    assert_eq!(life.last().fact(Fact::Hint), Some("true"));
    let mut life = Life::new();
    life.start().settle(hinted(seconds(86_400)));
    assert!(waits(&life) >= seconds(300) && waits(&life) <= seconds(310), "{:?}", waits(&life));
    assert_eq!(life.last().fact(Fact::HintCut), Some("true"));
}

#[test]
fn a_shorter_hint_does_not_cut_the_back_off_short() {
    let mut life = Life::new();
    life.draw = 0;
    life.start().settle(hinted(Duration::from_millis(1)));
    assert_eq!(life.last().fact(Fact::Hint), None, "it moved nothing");
    assert_eq!(waits(&life), Duration::from_millis(50));
}

// Deadlines.

#[test]
fn a_retry_that_could_not_start_before_the_deadline_is_not_scheduled() {
    let mut life = Life::until(seconds(30));
    life.start().settle(hinted(seconds(60)));
    life.is(State::Failed, Reason::Deadline, EventKind::Failed);
    assert_eq!(life.task.retry_count, 0);
    let mut life = Life::until(seconds(90));
    life.start().settle(hinted(seconds(60)));
    life.is(State::Retry, Reason::Backoff, EventKind::Failed);
}

#[test]
fn a_loss_that_leaves_no_time_fails_by_the_deadline() {
    let mut life = Life::until(seconds(30));
    life.start().wait(seconds(30)).apply(&Event::LeaseOver);
    life.is(State::Failed, Reason::Deadline, EventKind::Lost);
}

#[test]
fn a_deadline_is_a_wall_time() {
    let mut life = Life::until(seconds(90));
    life.now.skew = 60_000;
    life.start().settle(hinted(seconds(60)));
    life.is(State::Failed, Reason::Deadline, EventKind::Failed);
}

#[test]
fn a_deadline_wins_over_a_permanent_failure() {
    let mut life = Life::until(seconds(30));
    life.start().wait(seconds(31)).settle(fails(Class::Permanent));
    life.is(State::Failed, Reason::Deadline, EventKind::Failed);
}

// Probes.

#[test]
fn a_failed_probe_does_not_count_the_first_max_retries_times() {
    let mut life = Life::new();
    for failures in 1..=3 {
        life.claim_as(true);
        let effects = life.settle(fails(Class::Transient)).effects;
        life.is(State::Retry, Reason::Backoff, EventKind::Failed);
        assert_eq!((life.task.retry_count, life.task.probe_failures), (0, failures));
        assert_eq!((effects.reserve, life.task.tokens), (0, 0), "and costs nothing");
        assert_eq!(life.last().fact(Fact::Uncounted), Some("true"));
        assert_eq!(effects.sample.map(|(_, sample)| sample), Some(breaker_core::Sample::Failure));
        life.wait(LATER);
    }
    life.claim_as(true);
    life.settle(fails(Class::Transient));
    assert_eq!((life.task.retry_count, life.task.probe_failures), (1, 3));
}

#[test]
fn a_probe_cannot_kill_a_task_without_retries_left() {
    let mut life = Life::new();
    for _ in 0..3 {
        life.fail_once();
    }
    life.claim_as(true);
    life.settle(fails(Class::Transient));
    life.is(State::Retry, Reason::Backoff, EventKind::Failed);
    assert_eq!((life.task.retry_count, life.task.probe_failures), (3, 1));
}

#[test]
fn a_permanent_failure_of_a_probe_is_final_and_says_nothing_of_the_agent() {
    let mut life = Life::new();
    life.claim_as(true);
    let effects = life.settle(fails(Class::Permanent)).effects;
    life.is(State::Failed, Reason::Permanent, EventKind::Failed);
    assert_eq!(effects.sample.map(|(_, sample)| sample), Some(breaker_core::Sample::Neutral));
}

#[test]
fn a_probe_passes_once_and_what_comes_later_decides_nothing() {
    let mut life = Life::new();
    assert_eq!(life.task.probe_passes(), None, "nothing was delivered");
    life.claim_as(false);
    assert_eq!(life.task.probe_passes(), None, "no probe");
    life.settle(releases(ReleaseCause::Drain));
    life.claim_as(true);
    assert_eq!(life.last().fact(Fact::Probe), Some("true"));
    life.ack();
    let passed = life.task.probe_passes().map(|(_, sample)| sample);
    assert_eq!(passed, Some(breaker_core::Sample::Success));
    assert_eq!(life.task.probe_passes(), None);
    let effects = life.settle(fails(Class::Transient)).effects;
    assert_eq!(effects.sample, None);
    assert_eq!(life.task.retry_count, 1, "a failure of its own, no probe's");
}

#[test]
fn a_redriven_task_may_be_a_failed_probe_anew() {
    let mut life = Life::new();
    life.claim_as(true);
    life.settle(fails(Class::Transient));
    life.wait(LATER).start().settle(fails(Class::Permanent));
    life.apply(&redrives());
    assert_eq!(life.task.probe_failures, 0);
}

#[test]
fn every_delivery_under_a_permit_tells_the_breaker_once() {
    let ends: [fn(&Life) -> Event; 6] = [
        |life| life.settle_event(Outcome::Complete),
        |life| life.settle_event(fails(Class::Overloaded)),
        |life| life.settle_event(releases(ReleaseCause::Declined)),
        |life| life.settle_event(crate::support::blocks()),
        |_| Event::LeaseOver,
        |_| Event::TakenBack { sampled: true },
    ];
    for end in ends {
        for acked in [false, true] {
            let mut life = Life::new();
            life.claim_as(true);
            if acked {
                life.ack();
            }
            let event = end(&life);
            assert!(life.apply(&event).effects.sample.is_some(), "{event:?}");
        }
    }
}

#[test]
fn a_tasks_own_retry_settings_win_over_its_agents() {
    let mut life = Life::with(Overrides {
        base_delay: Some(seconds(2)),
        jitter: Some(retry_core::Jitter::None),
        max_retries: Some(1),
        ..Overrides::NONE
    });
    life.start().settle(fails(Class::Transient));
    assert_eq!(waits(&life), seconds(2));
    life.wait(LATER).fail_once();
    life.is(State::Failed, Reason::RetriesExhausted, EventKind::Failed);
}

mod floor {
    use ledger_core::store::BudgetRow;
    use ledger_core::{Agent, AgentId, Now, Timestamp};
    use retry_core::{Bucket, Level, Limits};
    use std::sync::Arc;
    use std::time::Duration;

    fn at(ms: i64) -> Now {
        Now::steady(Timestamp::from_millis(1_000_000 + ms))
    }

    fn empty() -> Bucket {
        Bucket::restore(Limits::default().floor_only(0), Level::default())
    }

    #[test]
    fn an_empty_shared_budget_delays_an_agent_but_not_below_its_own_floor() {
        let mut agent = Agent::new(AgentId(1), "a".into(), Arc::default(), at(0));
        let mut shared = empty();
        // The floor is a tenth of a token a second, and starts with nothing saved up.
        assert!(!agent.affords(&shared, at(9_999), 1));
        assert_eq!(agent.affordable_at(&shared, at(0), 1), Some(at(10_000).at));
        assert!(agent.affords(&shared, at(10_000), 1) && agent.pay(&mut shared, at(10_000), 1));
        assert!(!agent.affords(&shared, at(10_001), 1), "one token was paid twice");
        assert_eq!(agent.budget.available(at(10_000).at.since_epoch()), 9_000, "its own budget pays too");
    }

    #[test]
    fn a_restart_mints_no_floor() {
        let now = at(0);
        let row = Agent::new(AgentId(1), "a".into(), Arc::default(), now).row();
        let level =
            Level { millitokens: 5_000, updated_at: u64::try_from(now.at.millis()).expect("after 1970") };
        let budget = Some(BudgetRow { agent: Some(AgentId(1)), level });
        let agent = Agent::restore(row, Arc::default(), Vec::new(), budget, [0; 8], now);
        assert!(!agent.affords(&empty(), at(Duration::from_secs(9).as_millis() as i64), 1));
    }
}
