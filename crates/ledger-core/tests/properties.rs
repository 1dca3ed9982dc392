//! Random lives: any event at any time, by anybody, with any policy and a clock that may run back.
//!
//! `Life` itself checks at every step that a refusal changes nothing and that the history folds to the task; here is what
//! can only be seen over a whole life.

use crate::support::updates;
use crate::support::{
    Life, START, blocks, caller, cancels, discards, error, fails, folded, holder, redrives, releases,
};
use ledger_core::fold::Folded;
use ledger_core::limits::{BLOCKS, FREE_RELEASES};
use ledger_core::{
    AgentOverrides, Applied, Class, Event, EventKind, LostWith, Now, Outcome, Overrides, Refusal,
    ReleaseCause, Settings, State, Task, Timestamp,
};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use retry_core::Jitter;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

const WORKERS: [&str; 3] = ["w", "x", "y"];

/// One step: what, by whom, with which fence, and what the world is like then.
#[derive(Clone, Debug)]
struct Step {
    what: u8,
    who: usize,
    /// Fences back from the newest; -1 is one that was never issued.
    back: i8,
    clock: i64,
    skew: i64,
    draw: u64,
    tokens: u32,
    probe: bool,
}

#[derive(Clone, Debug)]
struct Script {
    policy: Overrides,
    run_at: Option<i64>,
    deadline: Option<i64>,
    budget: bool,
    steps: Vec<Step>,
}

fn step() -> impl Strategy<Value = Step> {
    let clock = prop_oneof![
        6 => 0..60_000_i64,
        2 => 0..10_000_000_i64,
        2 => -60_000..0_i64,
        1 => prop_oneof![Just(i64::MIN), Just(i64::MAX)],
    ];
    let skew = prop_oneof![8 => Just(0_i64), 1 => -100_000..100_000_i64, 1 => any::<i64>()];
    let back = prop_oneof![8 => Just(0_i8), 1 => Just(1_i8), 1 => Just(-1_i8)];
    // The first worker more often, so that holders act.
    let who = prop_oneof![8 => Just(0_usize), 1 => Just(1_usize), 1 => Just(2_usize)];
    let tokens = prop_oneof![3 => Just(100_u32), 1 => 0..3_u32];
    (0..60_u8, who, back, clock, skew, any::<u64>(), tokens, any::<bool>()).prop_map(
        |(what, who, back, clock, skew, draw, tokens, probe)| Step {
            what,
            who,
            back,
            clock,
            skew,
            draw,
            tokens,
            probe,
        },
    )
}

fn script() -> impl Strategy<Value = Script> {
    let jitter = prop_oneof![
        Just(Jitter::None),
        Just(Jitter::Full),
        Just(Jitter::Equal),
        Just(Jitter::Decorrelated),
        (0.0..1.0).prop_map(Jitter::Proportional),
    ];
    let policy = (
        proptest::option::of(0..4_u32),
        proptest::option::of(0..100_000_u64),
        proptest::option::of(1.0..10.0),
        proptest::option::of(jitter),
        proptest::option::of(1..4_u32),
        proptest::option::of(0..100_000_u64),
    )
        .prop_map(|(max_retries, base, exponential_base, jitter, max_losses, grace)| Overrides {
            max_retries,
            base_delay: base.map(Duration::from_millis),
            exponential_base,
            jitter,
            max_losses,
            stop_grace: grace.map(Duration::from_millis),
            ..Overrides::NONE
        });
    let time = || proptest::option::of(prop_oneof![4 => 0..1_000_000_i64, 1 => any::<i64>()]);
    (policy, time(), time(), any::<bool>(), proptest::collection::vec(step(), 1..80)).prop_map(
        |(policy, run_at, deadline, budget, steps)| Script { policy, run_at, deadline, budget, steps },
    )
}

fn event(step: &Step, task: &Task) -> Event {
    let who = caller(WORKERS[step.who]);
    let fence = match step.back {
        -1 => task.fence.saturating_add(1),
        back => task.fence.saturating_sub(back.unsigned_abs().into()),
    };
    let settle = |outcome| Event::Settle(who.clone(), fence, outcome);
    match step.what {
        0..=13 => {
            // The epoch is the delivery's own, so that each permit can be told from the others.
            let permit = breaker_core::Permit { epoch: task.fence + 1, probe: step.probe, slot: 0 };
            let permit = (!step.draw.is_multiple_of(4)).then_some(permit);
            Event::Claim { holder: holder(WORKERS[step.who]), permit }
        }
        14..=21 => Event::Ack(who, fence),
        22..=24 => Event::Beat(who, fence),
        25 => settle(Outcome::Complete),
        26..=29 => settle(fails(Class::Transient)),
        30 => settle(Outcome::Fail {
            error: error(Class::Timeout),
            retry_after: Some(Duration::from_millis(step.draw)),
        }),
        31 => settle(fails(Class::Permanent)),
        32 => settle(releases(ReleaseCause::Declined)),
        33 => settle(releases(ReleaseCause::Drain)),
        34 => settle(releases(ReleaseCause::Preempted)),
        35 => settle(blocks()),
        36 => settle(Outcome::Block {
            question: "q".into(),
            until: Some(Timestamp::from_millis(step.draw as i64)),
        }),
        37 => settle(Outcome::Cancelled),
        38..=40 => Event::LeaseOver,
        41 => Event::TakenBack { sampled: step.probe },
        42 => Event::Gate,
        43 => Event::Ungate,
        44 => Event::Unblock { answer: None, actor: None },
        45 if step.probe => {
            let at = step.draw.is_multiple_of(2).then(|| Timestamp::from_millis(step.draw as i64));
            updates(Some((step.draw % 10) as u8), at)
        }
        45 => cancels(),
        46 => Event::Preempt,
        47 => Event::DeadlinePassed,
        48 => Event::QueueTimeout,
        49 => Event::AttemptTimeout,
        50 => Event::Stall,
        51 | 52 => Event::GraceOver,
        53 => Event::BudgetGranted,
        54 => Event::BudgetExpired,
        55 => Event::Undeliverable,
        56..=58 => redrives(),
        _ => discards(),
    }
}

/// Lives `script`, and shows each step to `see`: before, event, answer, after.
fn live(script: &Script, mut see: impl FnMut(&Task, &Event, &Result<Applied, Refusal>, &Task)) -> Life {
    let time = |millis: i64| Timestamp::from_millis(START.millis().saturating_add(millis));
    let mut life = Life::enqueued(script.policy, script.run_at.map(time), script.deadline.map(time));
    let given = AgentOverrides { budget_enabled: Some(script.budget), ..AgentOverrides::default() };
    life.settings = Settings::of(given).expect("valid");
    for step in &script.steps {
        let at = Timestamp::from_millis(life.now.at.millis().saturating_add(step.clock));
        life.now = Now { at, skew: step.skew };
        life.draw = step.draw;
        life.tokens = step.tokens;
        life.lost_with = LostWith { tasks: 1 + step.tokens, sampled: step.probe };
        let event = event(step, &life.task);
        let before = life.task.clone();
        let answer = life.try_apply(&event);
        see(&before, &event, &answer, &life.task);
    }
    life
}

fn kind(answer: &Result<Applied, Refusal>) -> Option<EventKind> {
    answer.as_ref().ok().and_then(|applied| applied.record.as_ref()).map(|record| record.kind)
}

/// Tokens taken out of the budget for this task and not yet spent.
fn reserved(task: &Task) -> u32 {
    let waits_for_them = task.state == State::Retry && task.reason == ledger_core::Reason::Budget;
    if waits_for_them { 0 } else { task.tokens }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn folding_the_history_gives_the_task(script in script()) {
        let life = live(&script, |_, _, _, _| ());
        prop_assert_eq!(Folded::of(&life.history), Ok(folded(&life.task)));
    }

    #[test]
    fn a_refusal_changes_nothing_and_a_transition_adds_one_version(script in script()) {
        live(&script, |before, event, answer, after| match answer {
            Err(_) => assert_eq!(before, after, "{event:?}"),
            Ok(applied) => {
                let rows = u64::from(applied.record.is_some());
                assert_eq!(before.version + rows, after.version, "{event:?}");
            }
        });
    }

    #[test]
    fn an_ended_task_stays_so_until_it_is_redriven(script in script()) {
        live(&script, |before, event, _, after| {
            if before.state.is_terminal() && after.state != before.state {
                assert!(matches!(event, Event::Redrive(_)), "{event:?}");
                assert_eq!(before.state, State::Failed);
                assert!(!before.discarded);
            }
        });
    }

    #[test]
    fn only_the_newest_fences_holder_changes_anything(script in script()) {
        let mut holders: HashMap<u64, String> = HashMap::new();
        live(&script, |before, event, answer, after| {
            match event {
                Event::Claim { holder, .. } if answer.is_ok() => {
                    let taken = holders.insert(after.fence, holder.worker.to_string());
                    assert_eq!(taken, None, "a fence is claimed once");
                }
                Event::Ack(who, fence) | Event::Beat(who, fence) | Event::Settle(who, fence, _)
                    if answer.is_ok() =>
                {
                    assert_eq!(*fence, before.fence);
                    assert_eq!(holders.get(fence).map(String::as_str), Some(&*who.worker));
                }
                _ => {}
            }
            if after.state == State::Running {
                let holder = after.holder.as_ref().expect("RUNNING is held");
                assert_eq!(holders.get(&after.fence).map(String::as_str), Some(&*holder.worker));
            }
        });
    }

    #[test]
    fn a_fence_rises_by_one_at_claims_and_graces_and_never_otherwise(script in script()) {
        live(&script, |before, event, answer, after| {
            let rises = matches!(kind(answer), Some(EventKind::Assigned | EventKind::Abandoned));
            assert_eq!(before.fence + u64::from(rises), after.fence, "{event:?}");
            assert!(before.attempt <= after.attempt, "{event:?}");
            assert!(after.attempt <= after.delivery, "{event:?}");
        });
    }

    #[test]
    fn each_fence_is_settled_at_most_once(script in script()) {
        let mut settled = HashSet::new();
        live(&script, |before, event, answer, _| {
            if let Ok(Applied { record: Some(record), effects }) = answer {
                assert_eq!(record.digest.is_some(), matches!(event, Event::Settle(..)));
                assert_eq!(record.digest.is_some(), effects.settled);
                assert!(record.digest.is_none() || settled.insert(before.fence), "{event:?}");
            }
        });
    }

    #[test]
    fn tokens_are_neither_made_nor_lost(script in script()) {
        live(&script, |before, event, answer, after| {
            let Ok(applied) = answer else { return };
            let spent = if kind(answer) == Some(EventKind::Assigned) { reserved(before) } else { 0 };
            assert!(applied.effects.refund <= reserved(before), "{event:?}");
            let left = reserved(before) + applied.effects.reserve - applied.effects.refund - spent;
            assert_eq!(left, reserved(after), "{event:?}");
        });
    }

    #[test]
    fn each_permit_is_told_exactly_once(script in script()) {
        let mut told: HashMap<u64, u32> = HashMap::new();
        live(&script, |before, event, answer, after| {
            let Ok(applied) = answer else { return };
            if let (Event::Claim { permit: Some(permit), .. }, Some(_)) = (event, &applied.record) {
                told.insert(permit.epoch, 0);
            }
            if let Some((permit, _)) = applied.effects.sample {
                *told.get_mut(&permit.epoch).expect("given before it is told") += 1;
            }
            if before.state == State::Running && after.state != State::Running {
                assert!(told.values().all(|times| *times == 1), "{event:?}: {told:?}");
            }
        });
    }

    #[test]
    fn nothing_loops_without_bound(script in script()) {
        live(&script, |_, event, answer, after| {
            let policy = after.spec.policy;
            let retries = policy.max_retries.unwrap_or(3);
            assert!(after.retry_count <= retries, "{event:?}");
            assert!(after.probe_failures <= retries, "{event:?}");
            let poison = 1_000 * policy.max_losses.unwrap_or(3);
            assert!(after.loss_weight < poison + 1_000, "{event:?}");
            assert!(after.free_releases <= FREE_RELEASES && after.blocks <= BLOCKS, "{event:?}");
            if kind(answer) == Some(EventKind::Lost) && after.loss_weight >= poison {
                assert_ne!(after.state, State::Retry, "{event:?}");
            }
        });
    }
}

/// Guards the properties against being true of nothing.
#[test]
fn random_lives_see_every_kind_of_row_and_every_way_to_fail() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut kinds, mut reasons) = (HashSet::new(), HashSet::new());
    for _ in 0..3_000 {
        let script = script().new_tree(&mut runner).expect("it has no filter").current();
        for row in live(&script, |_, _, _, _| ()).history {
            kinds.insert(row.kind);
            reasons.insert(row.reason);
        }
    }
    // Twenty idle deliveries in a row are rarer than that, and have tests of their own.
    let rare = (EventKind::Undeliverable, ledger_core::Reason::Undeliverable);
    // A restore writes its rows past the one transition function.
    let elsewhere = [rare.0, EventKind::Restored];
    let missing: Vec<_> =
        EventKind::ALL.iter().filter(|kind| !kinds.contains(kind) && !elsewhere.contains(kind)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let missing: Vec<_> = ledger_core::Reason::ALL
        .iter()
        .filter(|reason| !reasons.contains(reason) && **reason != rare.1)
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
