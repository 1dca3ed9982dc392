//! What operators say and see.

use super::breaker::{breaker_overrides, breaker_settings, worst_state};
use super::check::{At, Check};
use super::page::fingerprint_text;
use super::task::{effective_policy, error_out, overrides, time};
use crate::grpc::{status, wire};
use crate::ledger::command::{AgentView, LedgerError, Redriving, WorkerView};
use ledger_core::limits::{ITEMS, PAYLOAD_BYTES, RUN_AT_AHEAD, TASK_TYPE_BYTES};
use ledger_core::store::{Counts, DeadLetter, DeadLetterFilter, LetterGroup};
use ledger_core::{AgentOverrides, Reason, Settings, State, TaskId};
use std::sync::Arc;
use std::time::Duration;

/// The one agent that a request names.
pub(in crate::grpc) fn agent_name(name: &str) -> Result<(), LedgerError> {
    let mut check = Check::default();
    check.agent(At::Root, "agent", name);
    check.done(())
}

/// How long a pause lasts; none: until it is resumed.
pub(in crate::grpc) fn pause_time(
    check: &mut Check,
    duration: Option<prost_types::Duration>,
) -> Option<Duration> {
    let duration = check.span(At::Root, "duration", duration)?;
    let good = (Duration::from_secs(1)..=RUN_AT_AHEAD).contains(&duration);
    check.must(good, At::Root, "duration", "set it to 1 s to 366 days");
    Some(duration)
}

/// Settings to change. Ranges are for the ledger to check, which knows what they are combined with.
pub(in crate::grpc) fn agent_settings(
    name: &str,
    given: Option<wire::AgentSettings>,
) -> Result<AgentOverrides, LedgerError> {
    let mut check = Check::default();
    check.agent(At::Root, "agent", name);
    let given = given.unwrap_or_default();
    let at = At::In("settings");
    let breaker = given.breaker.unwrap_or_default();
    let budget = given.budget.unwrap_or_default();
    let change = AgentOverrides {
        policy: overrides(&mut check, at, given.policy),
        budget_capacity: budget.capacity,
        budget_floor: budget.floor_per_second,
        budget_deposit: budget.deposit,
        budget_enabled: budget.enabled,
        max_waiting: given.max_waiting,
        ..breaker_overrides(&mut check, at, breaker)
    };
    if !check.found().is_empty() {
        // The ledger will not see it, so this is the only chance to name the rest.
        change.policy.check("settings.policy.", check.found());
    }
    check.done(change)
}

/// Which dead letters, but for the agent, whose number the ledger knows. `at`: where the fields stand.
pub(in crate::grpc) fn dead_letter_filter(
    check: &mut Check,
    at: At,
    given: wire::DeadLetterFilter,
) -> DeadLetterFilter {
    if !given.agent.is_empty() {
        check.agent(at, "agent", &given.agent);
    }
    check.plain(at, "task_type", &given.task_type, 0..=TASK_TYPE_BYTES);
    let reason = (!given.reason.is_empty()).then_some(&given.reason).and_then(|text| {
        let known = Reason::ALL.iter().copied().find(|reason| reason.as_str() == text);
        if known.is_none() {
            check.refuse(
                at,
                "reason",
                "use a reason as dead letters show it, for instance RETRIES_EXHAUSTED",
            );
        }
        known
    });
    let fingerprint = (!given.fingerprint.is_empty()).then_some(&given.fingerprint).and_then(|text| {
        let plain = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u64::from_str_radix(text, 16).ok().filter(|_| plain);
        if number.is_none() {
            check.refuse(
                at,
                "fingerprint",
                "use a fingerprint as dead letters show it, 16 hexadecimal digits",
            );
        }
        number
    });
    DeadLetterFilter {
        agent: None,
        task_type: Some(given.task_type).filter(|name| !name.is_empty()),
        reason,
        fingerprint,
        failed_after: check.time(at, "failed_after", given.failed_after),
        failed_before: check.time(at, "failed_before", given.failed_before),
        discarded: false,
    }
}

/// The same fields of a request for a list.
pub(in crate::grpc) fn listed(said: &wire::ListDeadLettersRequest) -> wire::DeadLetterFilter {
    wire::DeadLetterFilter {
        agent: said.agent.clone(),
        task_type: said.task_type.clone(),
        reason: said.reason.clone(),
        fingerprint: said.fingerprint.clone(),
        failed_after: said.failed_after,
        failed_before: said.failed_before,
    }
}

/// How dead letters are put back, and what history says of it. `by_filter`: they are spread unless a rate is given.
pub(in crate::grpc) fn redriving(
    check: &mut Check,
    said: &wire::RedriveDeadLettersRequest,
    by_filter: bool,
    note: Arc<str>,
) -> Redriving {
    let rate = said.rate_per_second.unwrap_or(if by_filter { 10.0 } else { 0.0 });
    check.must((0.0..=1_000_000.0).contains(&rate), At::Root, "rate_per_second", "set it to 0 to 1,000,000");
    let gap = if rate > 0.0 {
        Duration::try_from_secs_f64(1.0 / rate).unwrap_or(Duration::MAX)
    } else {
        Duration::ZERO
    };
    let priority = said.priority.and_then(|priority| {
        let known = u8::try_from(priority).ok().filter(|priority| *priority <= 9);
        check.must(known.is_some(), At::Root, "priority", "set it to 0 to 9");
        known
    });
    if let Some(payload) = &said.payload {
        check.must_fit(At::Root, "payload", payload.len(), PAYLOAD_BYTES);
    }
    if !said.agent.is_empty() {
        check.agent(At::Root, "agent", &said.agent);
    }
    let start = check.time(At::Root, "start_time", said.start_time);
    Redriving {
        deadline: check.time(At::Root, "deadline", said.deadline),
        start,
        // A thousand of them stay within what a time can be.
        gap: gap.min(RUN_AT_AHEAD),
        priority,
        payload: said.payload.clone(),
        agent: Some(said.agent.as_str().into()).filter(|_| !said.agent.is_empty()),
        note,
    }
}

/// The tasks that a call names.
pub(in crate::grpc) fn task_ids(check: &mut Check, ids: &[String]) -> Vec<TaskId> {
    if !(1..=ITEMS).contains(&ids.len()) {
        check.refuse(At::Root, "task_ids", "name 1 to 1,000 tasks");
        return Vec::new();
    }
    ids.iter().enumerate().map(|(index, id)| check.task(At::Item("task_ids", index), "", id)).collect()
}

/// Answers for tasks that a call named or chose.
pub(in crate::grpc) fn dead_letter_results(
    results: Vec<(TaskId, Result<(), LedgerError>)>,
) -> Vec<wire::DeadLetterResult> {
    results
        .into_iter()
        .map(|(task, result)| wire::DeadLetterResult {
            task_id: task.to_string(),
            error: result.err().map(|e| status::item(&e)),
        })
        .collect()
}

/// A group of dead letters.
pub(in crate::grpc) fn dead_letter_group(group: LetterGroup, agent: String) -> wire::DeadLetterGroup {
    let newest = group.newest;
    wire::DeadLetterGroup {
        agent,
        task_type: newest.task_type.as_ref().to_owned(),
        reason: newest.reason.as_str().to_owned(),
        fingerprint: fingerprint_text(newest.fingerprint),
        count: group.count,
        first_fail_time: time(group.first_at),
        last_fail_time: time(group.last_at),
        sample_task_id: newest.task.to_string(),
        sample_error: newest.error.as_deref().map(error_out),
    }
}

/// An agent as it is now.
pub(in crate::grpc) fn agent(view: &AgentView) -> wire::Agent {
    wire::Agent {
        agent: view.name.as_ref().to_owned(),
        settings: Some(settings(&view.settings)),
        counts: counts(&view.counts, &[State::Queued, State::Running, State::Retry, State::Blocked]),
        breaker_state: worst_state(view),
        budget_tokens: tokens(view.budget_millitokens),
        sessions: view.sessions,
        create_time: time(view.created_at),
        pause: view.pause.as_ref().map(|pause| wire::Pause {
            actor: pause.actor.as_ref().to_owned(),
            reason: pause.reason.as_ref().to_owned(),
            time: time(pause.since),
            until: pause.until.and_then(time),
        }),
    }
}

fn settings(settings: &Settings) -> wire::AgentSettings {
    wire::AgentSettings {
        policy: Some(effective_policy(settings)),
        breaker: Some(breaker_settings(settings)),
        budget: Some(wire::BudgetSettings {
            capacity: Some(f64::from(settings.budget.capacity)),
            floor_per_second: Some(settings.budget.floor),
            deposit: Some(settings.budget.deposit),
            enabled: Some(settings.budget_enabled),
        }),
        max_waiting: Some(settings.max_waiting),
    }
}

/// Millitokens as tokens.
pub(in crate::grpc) fn tokens(millitokens: u64) -> f64 {
    millitokens as f64 / 1_000.0
}

/// Numbers of tasks in these states.
pub(in crate::grpc) fn counts(counts: &Counts, states: &[State]) -> Vec<wire::StateCount> {
    let count = |state: &State| wire::StateCount {
        state: i32::from(state.code()),
        count: counts[usize::from(state.code())],
    };
    states.iter().map(count).collect()
}

/// A dead letter.
pub(in crate::grpc) fn dead_letter(letter: DeadLetter, agent: String) -> wire::DeadLetter {
    let (discard_time, discard_reason) =
        letter.discarded.map(|(at, why)| (time(at), why.as_ref().to_owned())).unwrap_or_default();
    wire::DeadLetter {
        task_id: letter.task.to_string(),
        agent,
        task_type: letter.task_type.as_ref().to_owned(),
        reason: letter.reason.as_str().to_owned(),
        error: letter.error.as_deref().map(error_out),
        fingerprint: fingerprint_text(letter.fingerprint),
        fail_time: time(letter.failed_at),
        attempt: letter.attempt,
        redrives: letter.redrives,
        discard_time,
        discard_reason,
    }
}

/// An open session.
pub(in crate::grpc) fn worker_view(view: WorkerView) -> wire::Worker {
    let names = |names: Vec<std::sync::Arc<str>>| names.iter().map(|name| name.as_ref().to_owned()).collect();
    wire::Worker {
        worker_id: view.worker.as_ref().to_owned(),
        incarnation: view.incarnation,
        session_id: view.session.0,
        agents: names(view.agents),
        task_types: names(view.types),
        capacity: view.capacity,
        held: view.held,
        labels: view.labels.into_iter().collect(),
        sdk: view.sdk,
        connect_time: time(view.connected_at),
        beat_time: time(view.beat_at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_settings_and_filters_are_named() {
        let fields = |error: LedgerError| match error {
            LedgerError::Invalid(violations) => violations.into_iter().map(|v| v.field).collect::<Vec<_>>(),
            error => panic!("{error}"),
        };
        let breaker = wire::BreakerSettings {
            open_timeout: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
            ..wire::BreakerSettings::default()
        };
        let given = wire::AgentSettings { breaker: Some(breaker), ..wire::AgentSettings::default() };
        let found = fields(agent_settings("../x", Some(given)).expect_err("faults"));
        assert_eq!(found, ["agent", "settings.breaker.open_timeout"]);

        let mut check = Check::default();
        let given = wire::DeadLetterFilter {
            reason: "NOPE".into(),
            fingerprint: "+000000000000001".into(),
            ..wire::DeadLetterFilter::default()
        };
        dead_letter_filter(&mut check, At::In("filter"), given);
        assert_eq!(fields(check.done(()).expect_err("faults")), ["filter.reason", "filter.fingerprint"]);

        let mut check = Check::default();
        let said = wire::RedriveDeadLettersRequest {
            rate_per_second: Some(-1.0),
            priority: Some(10),
            agent: "../x".into(),
            payload: Some(vec![0; PAYLOAD_BYTES + 1].into()),
            ..wire::RedriveDeadLettersRequest::default()
        };
        redriving(&mut check, &said, true, "".into());
        let found = fields(check.done(()).expect_err("faults"));
        assert_eq!(found, ["rate_per_second", "priority", "payload", "agent"]);

        let mut check = Check::default();
        task_ids(&mut check, &[]);
        task_ids(&mut check, &vec!["t1".to_owned(); 1_001]);
        task_ids(&mut check, &["t1".to_owned(), "T1".to_owned()]);
        assert_eq!(fields(check.done(()).expect_err("faults")), ["task_ids", "task_ids", "task_ids[1]"]);
    }
}
