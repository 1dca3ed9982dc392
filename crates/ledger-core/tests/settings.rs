//! Settings: what may be set, which value counts, and what an agent keeps over a restart.

use crate::support::{START, seconds};
use ledger_core::store::{AgentRow, BreakerRow, BudgetRow, Counts};
use ledger_core::{
    Agent, AgentId, AgentOverrides, Now, Overrides, Settings, State, TaskId, Violation, agent,
};
use retry_core::Jitter;
use std::sync::Arc;
use std::time::Duration;

fn fields(given: AgentOverrides) -> Vec<String> {
    let found = Settings::of(given).err().unwrap_or_default();
    let says = |rule: &str| rule.starts_with("set it to ") && !rule.contains(" must ");
    assert!(found.iter().all(|violation| says(&violation.rule)), "{found:?}");
    found.into_iter().map(|violation| violation.field).collect()
}

fn task_fields(given: Overrides) -> Vec<String> {
    let mut found: Vec<Violation> = Vec::new();
    given.check("tasks[3].policy.", &mut found);
    found.into_iter().map(|violation| violation.field).collect()
}

#[test]
fn the_defaults_are_the_documented_ones() {
    let settings = Settings::of(AgentOverrides::default()).expect("valid");
    assert_eq!(settings, Settings::default());
    let retry = settings.retry.config();
    assert_eq!((retry.max_retries, retry.max_losses), (3, 3));
    assert_eq!((retry.base_delay, retry.max_delay), (Duration::from_millis(100), seconds(30)));
    assert_eq!((retry.exponential_base, retry.jitter), (2.0, Jitter::Proportional(0.5)));
    assert_eq!((settings.ack_timeout, settings.lease_duration), (seconds(10), seconds(60)));
    assert_eq!((settings.attempt_timeout, settings.stop_grace), (seconds(1_800), seconds(30)));
    assert_eq!((settings.stall_timeout, settings.queue_timeout), (None, None));
    let breaker = settings.breaker;
    assert_eq!((breaker.failure_threshold, breaker.success_threshold), (5, 2));
    assert_eq!((breaker.open_timeout, breaker.half_open_permits), (seconds(60), 2));
}

#[test]
fn everything_that_is_wrong_is_said_at_once_in_the_words_of_the_wire() {
    let wrong = AgentOverrides {
        policy: Overrides {
            hint_max: Some(seconds(60)),
            max_retries: Some(1_001),
            base_delay: Some(seconds(8 * 86_400)),
            exponential_base: Some(f64::NAN),
            max_delay: Some(seconds(8 * 86_400)),
            jitter: Some(Jitter::Proportional(1.5)),
            ack_timeout: Some(Duration::ZERO),
            lease_duration: Some(Duration::from_millis(999)),
            attempt_timeout: Some(Duration::ZERO),
            stall_timeout: Some(Duration::ZERO),
            queue_timeout: Some(Duration::MAX),
            stop_grace: Some(Duration::MAX),
            max_losses: Some(0),
        },
        failure_threshold: Some(0),
        success_threshold: Some(201),
        open_timeout: Some(Duration::ZERO),
        half_open_permits: Some(0),
        open_multiplier: Some(0.5),
        open_jitter: Some(1.5),
        failure_rate: Some(0.0),
        slow_rate: Some(1.1),
        slow_after: Some(seconds(1)),
        ramp_for: Some(seconds(601)),
        ramp_start: Some(0.0),
        window: Some(Some(breaker_core::Window::Count { size: 4, min_calls: 9 })),
        half_open_max: None,
        open_max: None,
        per_task_type: None,
        hint_opens: None,
        breaker_enabled: None,
        budget_capacity: Some(1.5),
        budget_floor: Some(-1.0),
        budget_deposit: Some(f64::INFINITY),
        budget_enabled: None,
        max_waiting: Some(0),
    };
    let mut found = fields(wrong);
    found.sort();
    let mut expected = [
        "settings.policy.max_retries",
        "settings.policy.base_delay",
        "settings.policy.exponential_base",
        "settings.policy.max_delay",
        "settings.policy.jitter_ratio",
        "settings.policy.ack_timeout",
        "settings.policy.lease_duration",
        "settings.policy.attempt_timeout",
        "settings.policy.stall_timeout",
        "settings.policy.queue_timeout",
        "settings.policy.stop_grace",
        "settings.policy.max_losses",
        "settings.breaker.failure_threshold",
        "settings.breaker.success_threshold",
        "settings.breaker.open_timeout",
        "settings.breaker.half_open_permits",
        "settings.breaker.open_multiplier",
        "settings.breaker.open_jitter",
        "settings.breaker.failure_rate",
        "settings.breaker.slow_rate",
        "settings.breaker.ramp_for",
        "settings.breaker.ramp_start",
        "settings.breaker.count_window.size",
        "settings.breaker.count_window.min_calls",
        "settings.budget.capacity",
        "settings.budget.floor_per_second",
        "settings.budget.deposit",
        "settings.max_waiting",
    ];
    expected.sort_unstable();
    assert_eq!(found, expected);
}

#[test]
fn each_wrong_value_is_named_once_and_alone() {
    let policy = |policy| AgentOverrides { policy, ..AgentOverrides::default() };
    let jitter = Overrides { jitter: Some(Jitter::Proportional(2.0)), ..Overrides::NONE };
    assert_eq!(fields(policy(jitter)), ["settings.policy.jitter_ratio"]);
    assert_eq!(task_fields(jitter), ["tasks[3].policy.jitter_ratio"]);
    let base = Overrides { base_delay: Some(seconds(8 * 86_400)), ..Overrides::NONE };
    assert_eq!(task_fields(base), ["tasks[3].policy.base_delay"]);
    assert_eq!(fields(policy(base)), ["settings.policy.base_delay"]);
    let long = Overrides { max_delay: Some(seconds(8 * 86_400)), ..Overrides::NONE };
    assert_eq!(task_fields(long), ["tasks[3].policy.max_delay"]);
    let zero = AgentOverrides { budget_capacity: Some(f64::NAN), ..AgentOverrides::default() };
    assert_eq!(fields(zero), ["settings.budget.capacity"]);
    let open = AgentOverrides { open_timeout: Some(seconds(90_000)), ..AgentOverrides::default() };
    assert_eq!(fields(open), ["settings.breaker.open_timeout"]);
}

#[test]
fn a_longest_delay_below_the_first_is_refused_where_both_are_given() {
    let both = Overrides { base_delay: Some(seconds(10)), max_delay: Some(seconds(5)), ..Overrides::NONE };
    assert_eq!(task_fields(both), ["tasks[3].policy.max_delay"]);
    let agent = AgentOverrides { policy: both, ..AgentOverrides::default() };
    assert_eq!(fields(agent), ["settings.policy.max_delay"]);
}

#[test]
fn a_first_delay_above_the_default_longest_wants_the_longest_set_too() {
    let base = Overrides { base_delay: Some(seconds(60)), ..Overrides::NONE };
    let agent = AgentOverrides { policy: base, ..AgentOverrides::default() };
    assert_eq!(fields(agent), ["settings.policy.max_delay"]);
    assert!(task_fields(base).is_empty(), "a task cannot know what its agent has set");
}

#[test]
fn a_tasks_word_counts_where_its_delay_and_its_agents_disagree() {
    let settings = Settings::default();
    let long = Overrides { base_delay: Some(seconds(60)), ..Overrides::NONE };
    let config = *settings.retry_for(&long).config();
    assert_eq!((config.base_delay, config.max_delay), (seconds(60), seconds(60)));
    let short = Overrides { max_delay: Some(Duration::from_millis(10)), ..Overrides::NONE };
    let config = *settings.retry_for(&short).config();
    let ten = Duration::from_millis(10);
    assert_eq!((config.base_delay, config.max_delay), (ten, ten));
}

#[test]
fn a_tasks_overrides_win_over_its_agents_values() {
    let given = AgentOverrides {
        policy: Overrides {
            hint_max: Some(seconds(60)),
            max_retries: Some(7),
            ack_timeout: Some(seconds(20)),
            stall_timeout: Some(seconds(40)),
            ..Overrides::NONE
        },
        ..AgentOverrides::default()
    };
    let settings = Settings::of(given).expect("valid");
    let own = Overrides { max_retries: Some(1), ack_timeout: Some(seconds(5)), ..Overrides::NONE };
    assert_eq!(settings.retry_for(&own).max_retries(), 1);
    assert_eq!(settings.retry_for(&Overrides::NONE).max_retries(), 7);
    assert_eq!(settings.ack_timeout(&own), seconds(5));
    assert_eq!(settings.ack_timeout(&Overrides::NONE), seconds(20));
    assert_eq!(settings.stall_timeout(&own), Some(seconds(40)));
    assert_eq!(settings.queue_timeout(&own), None);
    assert_eq!(settings.stop_grace(&own), seconds(30));
    let or = own.or(given.policy);
    assert_eq!((or.max_retries, or.stall_timeout), (Some(1), Some(seconds(40))));
}

// An agent.

#[test]
fn an_agents_name_is_short_lower_case_and_plain() {
    for good in ["claude", "a", "9-a.b_c", &"a".repeat(63)] {
        assert!(agent::is_agent_name(good), "{good}");
    }
    for bad in ["", "Claude", "-a", ".a", "_a", "a b", "é", "a\n", &"a".repeat(64)] {
        assert!(!agent::is_agent_name(bad), "{bad:?}");
    }
}

#[test]
fn a_restored_agent_keeps_its_breaker_and_its_budget_as_they_were_saved() {
    let now = Now::steady(START);
    let at = START.since_epoch();
    let mut agent = Agent::new(AgentId(1), "claude".into(), Arc::default(), now);
    let change = AgentOverrides { failure_threshold: Some(1), ..AgentOverrides::default() };
    agent.configure(change, now).expect("valid");
    let own: Arc<str> = "".into();
    let guard = agent.breakers.of_mut(&own);
    let permit = guard.breaker.try_acquire(at).expect("closed");
    let _ = guard.breaker.record(permit, breaker_core::Sample::Failure, at, 0);
    guard.last_probe = Some(TaskId(9));
    assert!(agent.budget.withdraw(at, 7));
    let breaker = agent.breakers.row(agent.id, &own).expect("in use");
    let (row, budget) = (agent.row(), agent.budget_row());
    let later = Now::steady(START.after(seconds(1)));
    let counts: Counts = [0, 1, 2, 3, 4, 5, 6, 7];
    let again =
        Agent::restore(row.clone(), Arc::default(), vec![breaker.clone()], Some(budget), counts, later);
    let guard = again.breakers.of("any").expect("one for all types");
    assert_eq!((guard.breaker.state(), guard.last_probe), (breaker_core::State::Open, Some(TaskId(9))));
    assert_eq!((again.row(), again.breakers.row(again.id, &own)), (row, Some(breaker)));
    assert_eq!(again.budget_row(), budget);
    assert_eq!(again.created_at, START);
    assert_eq!(again.waiting(), 1 + 3 + 4, "QUEUED, RETRY, BLOCKED");
}

#[test]
fn an_agent_without_rows_of_its_own_starts_closed_and_full() {
    let row = AgentRow {
        id: AgentId(1),
        name: "claude".into(),
        given: AgentOverrides { budget_capacity: Some(4.0), ..AgentOverrides::default() },
        created_at: START,
        pause: None,
    };
    let agent = Agent::restore(row, Arc::default(), Vec::new(), None, Counts::default(), Now::steady(START));
    assert_eq!(agent.breakers.of("").map(|guard| guard.breaker.state()), Some(breaker_core::State::Closed));
    assert_eq!(agent.budget.available(START.since_epoch()), 4_000);
}

#[test]
fn stored_settings_that_a_newer_rule_refuses_fall_back_to_defaults() {
    let given = AgentOverrides { failure_threshold: Some(0), ..AgentOverrides::default() };
    let row = AgentRow { id: AgentId(1), name: "claude".into(), given, created_at: START, pause: None };
    let agent = Agent::restore(row, Arc::default(), Vec::new(), None, Counts::default(), Now::steady(START));
    assert_eq!(*agent.settings, Settings { given, ..Settings::default() });
    assert_eq!(agent.row().given, given, "and are not lost");
}

#[test]
fn settings_that_only_went_with_defaults_are_kept_when_those_go() {
    let now = Now::steady(START);
    let policy = |policy| AgentOverrides { policy, ..AgentOverrides::default() };
    let defaults = Arc::new(policy(Overrides { max_delay: Some(seconds(600)), ..Overrides::NONE }));
    let mut agent = Agent::new(AgentId(1), "claude".into(), Arc::clone(&defaults), now);
    let own = policy(Overrides { base_delay: Some(seconds(60)), ..Overrides::NONE });
    agent.configure(own, now).expect("valid over them");
    agent.default_to(Arc::default(), now);
    assert_eq!(agent.settings.retry.config().base_delay, Duration::from_millis(100), "built in");
    assert!(agent.refuses_defaults().is_some());
    assert_eq!(agent.row().given, own);
    agent.default_to(defaults, now);
    assert_eq!((agent.settings.retry.config().base_delay, agent.refuses_defaults()), (seconds(60), None));
}

#[test]
fn a_refused_change_leaves_an_agent_as_it_was() {
    let mut agent = Agent::new(AgentId(1), "claude".into(), Arc::default(), Now::steady(START));
    let good = AgentOverrides { open_timeout: Some(seconds(5)), ..AgentOverrides::default() };
    agent.configure(good, Now::steady(START)).expect("valid");
    let bad = AgentOverrides {
        open_timeout: Some(Duration::ZERO),
        budget_capacity: Some(5.0),
        ..AgentOverrides::default()
    };
    assert!(agent.configure(bad, Now::steady(START)).is_err());
    assert_eq!(agent.settings.given, good);
    let more = AgentOverrides { max_waiting: Some(9), ..AgentOverrides::default() };
    agent.configure(more, Now::steady(START)).expect("valid");
    assert_eq!((agent.settings.breaker.open_timeout, agent.settings.max_waiting), (seconds(5), 9));
}

#[test]
fn a_smaller_budget_is_cut_and_a_larger_one_is_not_filled() {
    let now = Now::steady(START);
    let mut agent = Agent::new(AgentId(1), "claude".into(), Arc::default(), now);
    let sized = |n| AgentOverrides { budget_capacity: Some(n), ..AgentOverrides::default() };
    agent.configure(sized(4.0), now).expect("valid");
    assert_eq!(agent.budget_row(), BudgetRow { agent: Some(AgentId(1)), level: agent.budget.level() });
    assert_eq!(agent.budget.available(START.since_epoch()), 4_000);
    agent.configure(sized(40.0), now).expect("valid");
    assert_eq!(agent.budget.available(START.since_epoch()), 4_000);
    let row: BreakerRow = agent.breakers.row(agent.id, &"".into()).expect("its own");
    assert_eq!(row.agent, AgentId(1));
    assert_eq!(State::ALL.len(), 7);
}

#[test]
fn defaults_hold_where_nothing_was_set_for_an_agent_and_change_without_a_trace_in_its_breaker() {
    let now = Now::steady(START);
    let at = START.since_epoch();
    let defaults = |failures, permits| {
        let (failure_threshold, half_open_permits) = (Some(failures), Some(permits));
        Arc::new(AgentOverrides { failure_threshold, half_open_permits, ..AgentOverrides::default() })
    };
    let mut agent = Agent::new(AgentId(1), "claude".into(), defaults(2, 3), now);
    let own = AgentOverrides { half_open_permits: Some(7), ..AgentOverrides::default() };
    agent.configure(own, now).expect("valid");
    let goes_by =
        |agent: &Agent| (agent.settings.breaker.failure_threshold, agent.settings.breaker.half_open_permits);
    assert_eq!(goes_by(&agent), (2, 7));
    assert_eq!(agent.row().given, own, "defaults are nobody's own");
    let fail = |agent: &mut Agent| {
        let guard = agent.breakers.of_mut(&"".into());
        let permit = guard.breaker.try_acquire(at).expect("closed");
        let _ = guard.breaker.record(permit, breaker_core::Sample::Failure, at, 0);
        guard.breaker.state()
    };
    assert_eq!(fail(&mut agent), breaker_core::State::Closed);
    agent.default_to(defaults(3, 5), now);
    assert_eq!(goes_by(&agent), (3, 7));
    assert_eq!(fail(&mut agent), breaker_core::State::Closed);
    assert_eq!(fail(&mut agent), breaker_core::State::Open, "the failure before the change counts");
    let again = Agent::restore(agent.row(), defaults(4, 5), Vec::new(), None, Counts::default(), now);
    assert_eq!(goes_by(&again), (4, 7));
    let row = AgentRow { given: AgentOverrides::default(), ..agent.row() };
    agent.follow(row, now);
    assert_eq!(goes_by(&agent), (3, 5), "what another daemon takes back is the default's again");
}

#[test]
fn an_agent_whose_settings_do_not_go_with_the_defaults_does_without_them_and_says_why() {
    let now = Now::steady(START);
    let short = Overrides { max_delay: Some(seconds(1)), ..Overrides::NONE };
    let own = AgentOverrides { policy: short, ..AgentOverrides::default() };
    let long = Overrides { base_delay: Some(seconds(2)), max_retries: Some(9), ..Overrides::NONE };
    let defaults = Arc::new(AgentOverrides { policy: long, ..AgentOverrides::default() });
    let mut agent = Agent::new(AgentId(1), "claude".into(), Arc::default(), now);
    agent.configure(own, now).expect("valid");
    assert_eq!(agent.refuses_defaults(), None);
    agent.default_to(Arc::clone(&defaults), now);
    assert_eq!((*agent.settings).clone(), Settings::of(own).expect("valid"));
    let fields: Vec<_> = agent.refuses_defaults().into_iter().flatten().map(|one| one.field).collect();
    assert_eq!(fields, ["settings.policy.max_delay"]);
    // Both are named to whoever configures it now.
    let more = AgentOverrides { max_waiting: Some(9), ..AgentOverrides::default() };
    assert!(agent.configure(more, now).is_err());
    let longer =
        AgentOverrides { policy: Overrides { max_delay: Some(seconds(4)), ..Overrides::NONE }, ..more };
    agent.configure(longer, now).expect("valid");
    assert_eq!((agent.settings.retry.config().max_retries, agent.refuses_defaults()), (9, None));
}
