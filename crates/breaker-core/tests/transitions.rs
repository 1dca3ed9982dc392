//! The table of transitions, one test a row, and the orders of a person.

mod support;

use breaker_core::{Availability, Breaker, Cause, Config, Permit, Sample, Snapshot, State, Stats, Tally};
use support::{call, closed, config, fail_until_open, half_open_with, open_with, secs};

/// A breaker in each state, at 60 s, with a permit of its epoch where there is one.
fn in_each_state() -> Vec<(Breaker, Option<Permit>)> {
    let mut ordered = [closed(), closed(), closed()];
    ordered[0].force_open("ann", "why", None, secs(60));
    ordered[1].disable("ann", "why", None, secs(60));
    ordered[2].observe("ann", "why", None, secs(60));
    let (half_open, probe) = half_open_with(config());
    let mut all = vec![(half_open, Some(probe)), (open_with(config(), secs(30)), None)];
    for mut breaker in ordered.into_iter().chain([closed()]) {
        let permit = breaker.try_acquire(secs(60)).ok();
        all.push((breaker, permit));
    }
    all
}

#[test]
fn closed_success_clears_the_run_and_failure_adds_to_it() {
    let mut breaker = closed();
    for (sample, run) in [
        (Sample::Success, 0),
        (Sample::Failure, 1),
        (Sample::Neutral, 1),
        (Sample::Failure, 2),
        (Sample::Success, 0),
    ] {
        assert_eq!(call(&mut breaker, sample, secs(0)).transition, None);
        assert_eq!((breaker.state(), breaker.run(), breaker.epoch()), (State::Closed, run, 0));
    }
}

#[test]
fn closed_failure_at_the_threshold_opens_for_the_period_of_the_formula() {
    let config = Config {
        failure_threshold: 1,
        open_timeout: secs(10),
        open_multiplier: 3.0,
        open_max: secs(60),
        open_jitter: 0.5,
        ..config()
    };
    let mut breaker = open_with(config, secs(0));
    let mut now = breaker.open_until().expect("open");
    assert_eq!(now, secs(10));
    // Draw at the half of its range: a quarter of the period is added.
    for (reopens, period) in [(1, 37.5), (2, 75.0), (3, 75.0)] {
        let probe = breaker.try_acquire(now).expect("due");
        breaker.record(probe, Sample::Failure, now, 1 << 63);
        assert_eq!(breaker.reopens(), reopens);
        let until = breaker.open_until().expect("open");
        assert_eq!((until - now).as_secs_f64(), period);
        now = until;
    }
}

#[test]
fn open_refuses_until_due_and_then_gives_one_caller_probe_one() {
    let mut breaker = open_with(config(), secs(0));
    let epoch = breaker.epoch();
    breaker.try_acquire(secs(59)).expect_err("not due");
    assert_eq!(breaker.epoch(), epoch);
    let probe = breaker.try_acquire(secs(60)).expect("due");
    assert_eq!(probe, Permit { epoch: epoch + 1, probe: true, slot: 0 });
    let moved = breaker.last_transition().expect("it moved");
    assert_eq!((moved.cause, moved.epoch), (Cause::OpenElapsed, epoch + 1));
    breaker.try_acquire(secs(60)).expect_err("probe in flight");
    assert_eq!(breaker.probes_in_flight(), 1);
}

#[test]
fn half_open_gives_a_permit_where_a_slot_is_free() {
    let (mut breaker, first) = half_open_with(Config { half_open_permits: 2, ..config() });
    let _second = breaker.try_acquire(secs(60)).expect("second slot");
    breaker.try_acquire(secs(60)).expect_err("none left");
    breaker.record(first, Sample::Success, secs(60), 0);
    assert_eq!(breaker.probes_in_flight(), 1, "a success frees its slot");
    let _third = breaker.try_acquire(secs(60)).expect("free again");
}

#[test]
fn probe_successes_close_and_forget_the_reopenings() {
    let (mut breaker, probe) = half_open_with(config());
    breaker.record(probe, Sample::Failure, secs(60), 0);
    assert_eq!(breaker.reopens(), 1);
    call(&mut breaker, Sample::Success, secs(120));
    let moved = call(&mut breaker, Sample::Success, secs(120)).transition.expect("closes");
    assert_eq!((moved.to, moved.cause), (State::Closed, Cause::ProbesSucceeded));
    assert_eq!((breaker.reopens(), breaker.successes(), breaker.next_deadline()), (0, 0, None));
}

#[test]
fn probe_failure_opens_and_makes_the_other_probes_late() {
    let (mut breaker, first) = half_open_with(Config { half_open_permits: 2, ..config() });
    let second = breaker.try_acquire(secs(60)).expect("second slot");
    let moved = breaker.record(first, Sample::Failure, secs(61), 0).transition.expect("opens");
    assert_eq!((moved.to, moved.cause), (State::Open, Cause::ProbeFailed));
    assert_eq!(breaker.record(second, Sample::Failure, secs(61), 0).tally, Tally::Late);
    assert_eq!((breaker.reopens(), breaker.open_until()), (1, Some(secs(121))));
}

#[test]
fn neutral_probe_frees_its_slot_until_half_open_has_lasted_its_longest() {
    let (mut breaker, probe) = half_open_with(config());
    breaker.record(probe, Sample::Neutral, secs(100), 0);
    assert_eq!((breaker.state(), breaker.probes_in_flight()), (State::HalfOpen, 0));
    assert_eq!(breaker.is_available(secs(209)), Availability::Probe);
    assert!(matches!(breaker.is_available(secs(210)), Availability::No { .. }));
    let moved = breaker.tick(secs(210), 0).expect("no verdict");
    assert_eq!((moved.to, moved.cause), (State::Open, Cause::Inconclusive));
    assert_eq!(breaker.reopens(), 0, "no verdict is no failure");
}

#[test]
fn result_with_a_foreign_epoch_changes_nothing_in_any_state() {
    for (mut breaker, _) in in_each_state() {
        let before = breaker.clone();
        for probe in [false, true] {
            for epoch in [breaker.epoch().wrapping_sub(1), breaker.epoch() + 1, u64::MAX] {
                for sample in [Sample::Success, Sample::Failure, Sample::Neutral] {
                    let recorded = breaker.record(Permit { epoch, probe, slot: 0 }, sample, secs(60), 0);
                    assert_eq!(recorded.late(), sample != Sample::Neutral);
                    assert_eq!(recorded.transition, None);
                }
            }
        }
        let stats = Stats { late_ok: 6, late_err: 6, ..before.stats() };
        assert_eq!(breaker.snapshot(), Snapshot { stats, ..before.snapshot() });
    }
}

#[test]
fn orders_and_reset_work_in_every_state_and_start_an_epoch() {
    for (breaker, permit) in in_each_state() {
        for (to, cause) in [
            (State::ForcedOpen, Cause::Ordered),
            (State::Disabled, Cause::Ordered),
            (State::Observe, Cause::Ordered),
            (State::Closed, Cause::Reset),
        ] {
            let mut after = breaker.clone();
            let moved = match to {
                State::ForcedOpen => after.force_open("ann", "why", None, secs(61)),
                State::Disabled => after.disable("ann", "why", None, secs(61)),
                State::Observe => after.observe("ann", "why", None, secs(61)),
                _ => after.reset(secs(61)),
            };
            assert_eq!((moved.from, moved.to, moved.cause), (breaker.state(), to, cause));
            assert_eq!((after.epoch(), moved.epoch), (breaker.epoch() + 1, breaker.epoch() + 1));
            assert_eq!((after.run(), after.successes(), after.probes_in_flight()), (0, 0, 0));
            assert_eq!(after.reopens(), 0);
            let order = after.order().map(|order| (order.actor.as_str(), order.reason.as_str()));
            assert_eq!(order, to.is_ordered().then_some(("ann", "why")));
            if let Some(permit) = permit {
                assert!(after.record(permit, Sample::Failure, secs(61), 0).late());
            }
        }
    }
}

#[test]
fn forced_open_refuses_until_its_end_and_then_closes() {
    let mut breaker = closed();
    breaker.force_open("ann", "maintenance", Some(secs(100)), secs(10));
    let rejected = breaker.try_acquire(secs(40)).expect_err("forced open");
    assert_eq!(rejected.retry_after, Some(secs(60)));
    assert_eq!(breaker.next_deadline(), Some(secs(100)));
    assert!(!breaker.try_acquire(secs(100)).expect("over").probe);
    let moved = breaker.last_transition().expect("it moved");
    assert_eq!((moved.to, moved.cause), (State::Closed, Cause::Expired));
    assert_eq!(breaker.order(), None);
}

#[test]
fn order_without_an_end_lasts_until_auto() {
    let mut breaker = closed();
    breaker.force_open("ann", "maintenance", None, secs(0));
    assert_eq!(breaker.tick(secs(1_000_000), 0), None);
    assert_eq!(breaker.try_acquire(secs(1_000_000)).expect_err("forced open").retry_after, None);
    assert_eq!(breaker.auto(secs(1_000_001)).map(|moved| moved.cause), Some(Cause::Auto));
    assert_eq!(breaker.state(), State::Closed);
    assert_eq!(breaker.auto(secs(1_000_001)), None, "nothing to end");
}

#[test]
fn disabled_admits_all_and_counts_nothing() {
    let mut breaker = closed();
    breaker.disable("ann", "known noise", None, secs(0));
    let before = breaker.clone();
    for _ in 0..100 {
        let recorded = call(&mut breaker, Sample::Failure, secs(0));
        assert_eq!((recorded.tally, recorded.transition), (Tally::Uncounted, None));
    }
    assert_eq!(breaker, before);
}

#[test]
fn observe_admits_all_counts_and_tells_when_it_would_have_opened() {
    let mut breaker = closed();
    breaker.observe("ann", "trying settings", None, secs(0));
    let told: Vec<_> = (1..=12).filter(|_| call(&mut breaker, Sample::Failure, secs(0)).would_open).collect();
    assert_eq!(told, [5, 10]);
    assert_eq!((breaker.state(), breaker.run(), breaker.stats().failures), (State::Observe, 2, 12));
    call(&mut breaker, Sample::Success, secs(0));
    assert_eq!(breaker.run(), 0);
}

#[test]
fn new_settings_keep_state_epoch_and_the_end_of_the_period() {
    let mut breaker = open_with(config(), secs(0));
    breaker.set_config(Config { open_timeout: secs(300), ..config() }, secs(1)).expect("valid");
    assert_eq!((breaker.state(), breaker.epoch(), breaker.open_until()), (State::Open, 1, Some(secs(60))));

    let short = Config { open_timeout: secs(5), open_max: secs(5), ..config() };
    breaker.set_config(short, secs(1)).expect("valid");
    assert_eq!(breaker.open_until(), Some(secs(6)), "cut to what the new settings could give");

    let kept = breaker.clone();
    let wrong = Config { failure_threshold: 0, ..config() };
    breaker.set_config(wrong, secs(1)).expect_err("refused");
    assert_eq!(breaker, kept);
}

#[test]
fn lowered_limits_hold_from_the_next_event() {
    let mut breaker = closed();
    for _ in 0..4 {
        call(&mut breaker, Sample::Failure, secs(0));
    }
    breaker.set_config(Config { failure_threshold: 2, ..config() }, secs(0)).expect("valid");
    assert_eq!(breaker.state(), State::Closed);
    call(&mut breaker, Sample::Failure, secs(0));
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn lowered_half_open_limits_arm_and_cut_but_never_lengthen() {
    let (mut breaker, _probe) = half_open_with(Config { half_open_max: None, ..config() });
    assert_eq!(breaker.next_deadline(), None);
    breaker.set_config(config(), secs(100)).expect("valid");
    assert_eq!(breaker.next_deadline(), Some(secs(250)));
    let longer = Config { half_open_max: Some(secs(900)), ..config() };
    breaker.set_config(longer, secs(110)).expect("valid");
    assert_eq!(breaker.next_deadline(), Some(secs(250)));
}

#[test]
fn restore_keeps_open_open_and_half_open_half_open_with_its_probes() {
    let open = open_with(config(), secs(100));
    let restored = Breaker::restore(open.snapshot(), config(), secs(130)).expect("valid");
    assert_eq!(restored.snapshot(), open.snapshot());
    assert_eq!(restored.retry_after(secs(130)), Some(secs(30)));

    let (half_open, probe) = half_open_with(config());
    let mut restored = Breaker::restore(half_open.snapshot(), config(), secs(70)).expect("valid");
    restored.try_acquire(secs(70)).expect_err("the probe is still in flight");
    restored.record(probe, Sample::Success, secs(70), 0);
    call(&mut restored, Sample::Success, secs(70));
    assert_eq!(restored.state(), State::Closed);
}

#[test]
fn restore_after_the_clock_went_back_waits_one_period_and_no_more() {
    let open = open_with(config(), secs(100_000));
    let restored = Breaker::restore(open.snapshot(), config(), secs(500)).expect("valid");
    assert_eq!(restored.open_until(), Some(secs(560)));
    let later = Breaker::restore(open.snapshot(), config(), secs(900_000)).expect("valid");
    assert_eq!(later.is_available(secs(900_000)), Availability::Probe);
}

#[test]
fn restore_takes_a_row_that_contradicts_itself() {
    let mut odd = closed().snapshot();
    odd.version = 99;
    odd.state = State::Open;
    odd.epoch = u64::MAX;
    odd.run = u32::MAX;
    odd.probes = vec![breaker_core::Probe { slot: 9, lease_until: None }; 300];
    odd.since = std::time::Duration::MAX;
    let mut breaker = Breaker::restore(odd, config(), secs(5)).expect("valid");
    assert!(breaker.try_acquire(secs(5)).expect("ends its period at once").probe);
    assert_eq!(breaker.probes_in_flight(), 1);
    breaker.reset(secs(5));
    fail_until_open(&mut breaker, std::time::Duration::MAX);
    assert!(breaker.try_acquire(std::time::Duration::MAX).is_ok(), "the end of time is due");
}
