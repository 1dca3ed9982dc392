//! The decision over one failure, as tables.

use crate::support::{ms, policy, secs};
use retry_core::{
    Attempted, Config, Decision, ErrorClass, Failure, Hint, HintMode, Jitter, MAX_FAULTS, Policy, Progress,
    Reason, Sample, Spent,
};
use std::time::Duration;

const NOW: Duration = Duration::from_secs(1_000);

fn steady() -> Policy {
    policy(Jitter::None)
}

fn reason(decision: Decision) -> Option<Reason> {
    match decision {
        Decision::GiveUp { reason } => Some(reason),
        Decision::Retry { .. } => None,
    }
}

fn delay(decision: Decision) -> (Duration, bool) {
    match decision {
        Decision::Retry { delay, hint_cut, at, .. } => {
            assert_eq!(at, NOW + delay);
            (delay, hint_cut)
        }
        Decision::GiveUp { reason } => panic!("{reason}"),
    }
}

#[test]
fn each_class_has_its_line_in_the_table() {
    use ErrorClass::*;
    let table = [
        (Transient, true, Sample::Failure, 1, Ok(Spent::Retry)),
        (Unknown, true, Sample::Failure, 1, Ok(Spent::Retry)),
        (Timeout, true, Sample::Failure, 2, Ok(Spent::Retry)),
        (StreamLost, true, Sample::Failure, 2, Ok(Spent::Retry)),
        (Overloaded, true, Sample::Failure, 1, Ok(Spent::Retry)),
        (Lost, true, Sample::Failure, 1, Ok(Spent::Loss(1_000))),
        (Permanent, false, Sample::Neutral, 0, Err(Reason::NotRetryable)),
        (Cancelled, false, Sample::Neutral, 0, Err(Reason::Cancelled)),
        (DeadlineExceeded, false, Sample::Neutral, 0, Err(Reason::Deadline)),
        (DaemonFault, true, Sample::Neutral, 0, Ok(Spent::Fault)),
        (BreakerOpen, false, Sample::Neutral, 0, Err(Reason::BreakerOpen)),
    ];
    assert_eq!(table.map(|line| line.0), ErrorClass::ALL);
    for (class, retryable, sample, price, outcome) in table {
        assert_eq!((class.retryable(), class.breaker_sample(), class.price()), (retryable, sample, price));
        let decision = steady().next(&Progress::default(), class.into(), NOW, None, 0);
        match outcome {
            Ok(expected) => {
                let Decision::Retry { spent, price: asked, .. } = decision else { panic!("{class:?}") };
                assert_eq!((spent, asked), (expected, price), "{class:?}");
            }
            Err(expected) => assert_eq!(reason(decision), Some(expected), "{class:?}"),
        }
    }
}

#[test]
fn the_last_allowed_retry_is_made_and_the_next_one_is_not() {
    let policy = steady();
    for (retries_made, expected) in
        [(0, None), (2, None), (3, Some(Reason::Exhausted)), (u32::MAX, Some(Reason::Exhausted))]
    {
        let progress = Progress { retries_made, ..Progress::default() };
        let decision = policy.next(&progress, ErrorClass::Timeout.into(), NOW, None, 0);
        assert_eq!(reason(decision), expected, "{retries_made}");
    }
}

#[test]
fn losses_are_counted_apart_and_the_third_is_final() {
    let policy = steady().with_max_retries(0).unwrap();
    let mut progress = Progress::default();
    for expected in [100, 200] {
        let decision = policy.next(&progress, ErrorClass::Lost.into(), NOW, None, 0);
        assert_eq!(delay(decision), (ms(expected), false));
        progress.record(&decision);
    }
    assert_eq!((progress.losses, progress.retries_made), (2, 0));
    let decision = policy.next(&progress, ErrorClass::Lost.into(), NOW, None, 0);
    assert_eq!(reason(decision), Some(Reason::Lost));
}

#[test]
fn faults_of_our_own_are_free_ten_times_and_then_count() {
    let policy = steady().with_max_retries(1).unwrap();
    let mut progress = Progress::default();
    let mut prices = Vec::new();
    let last = loop {
        let decision = policy.next(&progress, ErrorClass::DaemonFault.into(), NOW, None, 0);
        match decision {
            Decision::Retry { price, .. } => prices.push(price),
            Decision::GiveUp { reason } => break reason,
        }
        progress.record(&decision);
    };
    assert_eq!(last, Reason::Exhausted);
    assert_eq!(prices, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!((progress.faults, progress.retries_made), (MAX_FAULTS, 1));
}

#[test]
fn a_retry_that_cannot_start_before_the_deadline_is_given_up_at_once() {
    let config = Config { jitter: Jitter::None, min_window: ms(50), ..Config::default() };
    let policy = config.build().unwrap();
    let failure = Failure::new(ErrorClass::Transient);
    let at = |deadline| reason(policy.next(&Progress::default(), failure, NOW, Some(deadline), 0));
    assert_eq!(at(NOW + ms(150)), None);
    assert_eq!(at(NOW + ms(150) - Duration::from_nanos(1)), Some(Reason::Deadline));
    assert_eq!(at(Duration::ZERO), Some(Reason::Deadline));
    assert_eq!(at(Duration::MAX), None);
}

#[test]
fn the_longest_time_for_retries_counts_from_the_first_attempt() {
    let config = Config { jitter: Jitter::None, max_elapsed: Some(secs(10)), ..Config::default() };
    let policy = config.build().unwrap();
    let failure = Failure::new(ErrorClass::Transient);
    let from =
        |started| reason(policy.next(&Progress { started, ..Progress::default() }, failure, NOW, None, 0));
    assert_eq!(from(NOW - secs(10) + ms(100)), None);
    assert_eq!(from(NOW - secs(10) + ms(99)), Some(Reason::MaxElapsed));
    // A clock that went back: the first attempt lies ahead, and nothing is over.
    assert_eq!(from(NOW + secs(10)), None);
    // Both bounds broken: the deadline is the one that is named.
    let decision = policy.next(&Progress::default(), failure, NOW, Some(secs(1)), 0);
    assert_eq!(reason(decision), Some(Reason::Deadline));
}

#[test]
fn the_first_rule_that_applies_wins() {
    use ErrorClass::*;
    let (past, ahead) = (Some(NOW - ms(1)), Some(NOW + ms(1)));
    let used_up = Progress { retries_made: 3, losses: 2, ..Progress::default() };
    let table = [
        (Cancelled, past, Reason::Cancelled),
        (Permanent, past, Reason::Deadline),
        (Permanent, ahead, Reason::NotRetryable),
        (Transient, past, Reason::Deadline),
        (Transient, ahead, Reason::Exhausted),
        (Lost, ahead, Reason::Lost),
        (DaemonFault, ahead, Reason::Deadline),
    ];
    for (class, deadline, expected) in table {
        let decision = steady().next(&used_up, class.into(), NOW, deadline, 0);
        assert_eq!(reason(decision), Some(expected), "{class:?}");
    }
    let refused = steady().next_if(&used_up, Transient.into(), NOW, ahead, 0, |_| false);
    assert_eq!(reason(refused), Some(Reason::Refused));
}

#[test]
fn a_predicate_only_narrows() {
    let used_up = Progress { retries_made: 3, ..Progress::default() };
    let yes = steady().next_if(&used_up, ErrorClass::Timeout.into(), NOW, None, 0, |_| true);
    assert_eq!(reason(yes), Some(Reason::Exhausted));
    for class in ErrorClass::ALL.into_iter().filter(|class| !class.retryable()) {
        let decision = steady().next_if(&Progress::default(), class.into(), NOW, None, 0, |_| {
            panic!("nobody asks whether {class:?} may be retried")
        });
        assert!(reason(decision).is_some());
    }
    let progress = Progress { retries_made: 2, started: NOW - secs(7), ..Progress::default() };
    let mut seen = None;
    let no = steady().next_if(&progress, ErrorClass::Timeout.into(), NOW, None, 0, |attempted| {
        seen = Some(*attempted);
        false
    });
    assert_eq!(reason(no), Some(Reason::Refused));
    assert_eq!(seen, Some(Attempted { class: ErrorClass::Timeout, retries_made: 2, elapsed: secs(7) }));
}

#[test]
fn a_hint_is_the_earliest_time_and_its_jitter_goes_upward() {
    let hinted = |hint: Duration, draw| {
        let failure = Failure::new(ErrorClass::Overloaded).with_hint(Hint::After(hint));
        delay(steady().next(&Progress::default(), failure, NOW, None, draw))
    };
    // The complement of the draw moves the hint, so a draw of u64::MAX adds nothing.
    assert_eq!(hinted(secs(60), u64::MAX), (secs(60), false));
    assert_eq!(hinted(secs(60), 0), (secs(66), false));
    assert_eq!(hinted(secs(200), 0), (secs(210), false), "never more than 10 s later");
    assert_eq!(hinted(ms(5), 0), (ms(100), false), "the back-off is longer");
    assert_eq!(hinted(secs(301), u64::MAX), (secs(300), true), "cut, and said so");
    assert_eq!(hinted(secs(300), u64::MAX), (secs(300), false));
    assert_eq!(hinted(Duration::MAX, 0), (secs(310), true));
}

#[test]
fn exact_hints_are_taken_as_they_are_and_ignored_ones_are_not_taken() {
    for (mode, expected) in [(HintMode::Exact, (ms(5), secs(300))), (HintMode::Ignore, (ms(100), ms(100)))] {
        let policy = Config { jitter: Jitter::None, hint: mode, ..Config::default() }.build().unwrap();
        let hinted = |hint| {
            let failure = Failure::new(ErrorClass::Overloaded).with_hint(Hint::After(hint));
            delay(policy.next(&Progress::default(), failure, NOW, None, 0)).0
        };
        assert_eq!((hinted(ms(5)), hinted(secs(400))), expected, "{mode:?}");
        let never = Failure::new(ErrorClass::Overloaded).with_hint(Hint::Never);
        let decision = policy.next(&Progress::default(), never, NOW, None, 0);
        assert_eq!(reason(decision), Some(Reason::NotRetryable), "{mode:?}");
    }
}

#[test]
fn a_hint_beyond_the_deadline_gives_up_now_and_raises_no_limit() {
    let failure = Failure::new(ErrorClass::Overloaded).with_hint(Hint::After(secs(60)));
    let decision = steady().next(&Progress::default(), failure, NOW, Some(NOW + secs(59)), 0);
    assert_eq!(reason(decision), Some(Reason::Deadline));
    let used_up = Progress { retries_made: 3, ..Progress::default() };
    assert_eq!(reason(steady().next(&used_up, failure, NOW, None, 0)), Some(Reason::Exhausted));
}

#[test]
fn a_negative_hint_means_do_not_retry() {
    for (hint, expected) in [
        (Hint::from_millis(-1), Hint::Never),
        (Hint::from_millis(i64::MIN), Hint::Never),
        (Hint::from_millis(0), Hint::After(Duration::ZERO)),
        (Hint::from_millis(1_500), Hint::After(ms(1_500))),
        (Hint::from_nanos(-1), Hint::Never),
        (Hint::from_nanos(1), Hint::After(Duration::from_nanos(1))),
        (Hint::from_nanos(i128::MAX), Hint::After(Duration::MAX)),
        (Hint::from_nanos(Duration::MAX.as_nanos() as i128), Hint::After(Duration::MAX)),
    ] {
        assert_eq!(hint, expected);
    }
}

#[test]
fn recording_a_retry_counts_it_and_keeps_its_delay() {
    let mut progress = Progress::default();
    let decision = steady().next(&progress, ErrorClass::Transient.into(), NOW, None, 0);
    progress.record(&decision);
    assert_eq!(progress, Progress { retries_made: 1, previous_delay: ms(100), ..Progress::default() });
    progress.record(&Decision::GiveUp { reason: Reason::Exhausted });
    assert_eq!(progress.retries_made, 1);
    let mut full = Progress { retries_made: u32::MAX, ..Progress::default() };
    full.record(&decision);
    assert_eq!(full.retries_made, u32::MAX);
}
