//! Breakers: their settings, how they stand, and what operators order.

use super::check::{At, Check};
use super::task::{span, time};
use crate::grpc::wire;
use crate::ledger::command::{AgentView, BreakerOrder, BreakerView};
use breaker_core::{State, Window};
use ledger_core::limits::RUN_AT_AHEAD;
use ledger_core::store::{AgentEvent, AgentEventKind};
use ledger_core::{AgentOverrides, Settings, Timestamp};
use std::time::Duration;

/// What is set of a breaker. Ranges are for the ledger to check, which knows what they are combined with.
pub(super) fn breaker_overrides(check: &mut Check, at: At, given: wire::BreakerSettings) -> AgentOverrides {
    use wire::breaker_settings::Window as Given;
    let window = given.window.map(|window| match window {
        Given::CountWindow(window) => Some(Window::Count { size: window.size, min_calls: window.min_calls }),
        Given::TimeWindow(window) => {
            let bucket = check.span(at, "breaker.time_window.bucket", window.bucket).unwrap_or_default();
            Some(Window::Time { bucket, min_calls: window.min_calls })
        }
        Given::NoWindow(_) => None,
    });
    AgentOverrides {
        failure_threshold: given.failure_threshold,
        success_threshold: given.success_threshold,
        open_timeout: check.span(at, "breaker.open_timeout", given.open_timeout),
        half_open_permits: given.half_open_permits,
        breaker_enabled: given.enabled,
        per_task_type: given.per_task_type,
        open_multiplier: given.open_multiplier,
        open_max: check.span(at, "breaker.open_max", given.open_max),
        open_jitter: given.open_jitter,
        half_open_max: check.span(at, "breaker.half_open_max", given.half_open_max),
        window,
        failure_rate: given.failure_rate,
        slow_after: check.span(at, "breaker.slow_after", given.slow_after),
        slow_rate: given.slow_rate,
        ramp_for: check.span(at, "breaker.ramp_for", given.ramp_for),
        ramp_start: given.ramp_start,
        hint_opens: given.hint_opens,
        ..AgentOverrides::default()
    }
}

/// The settings in force, all of them.
pub(super) fn breaker_settings(settings: &Settings) -> wire::BreakerSettings {
    use wire::breaker_settings::Window as Out;
    let breaker = &settings.breaker;
    let window = match breaker.window {
        Some(Window::Count { size, min_calls }) => Out::CountWindow(wire::CountWindow { size, min_calls }),
        Some(Window::Time { bucket, min_calls }) => {
            Out::TimeWindow(wire::TimeWindow { bucket: Some(span(bucket)), min_calls })
        }
        None => Out::NoWindow(wire::NoWindow {}),
    };
    wire::BreakerSettings {
        failure_threshold: Some(breaker.failure_threshold),
        success_threshold: Some(breaker.success_threshold),
        open_timeout: Some(span(breaker.open_timeout)),
        half_open_permits: Some(breaker.half_open_permits),
        enabled: Some(settings.breaker_enabled),
        per_task_type: Some(settings.per_task_type),
        open_multiplier: Some(breaker.open_multiplier),
        open_max: Some(span(breaker.open_max)),
        open_jitter: Some(breaker.open_jitter),
        half_open_max: Some(span(breaker.half_open_max.unwrap_or_default())),
        window: Some(window),
        failure_rate: Some(breaker.failure_rate),
        slow_after: Some(span(breaker.slow_after.unwrap_or_default())),
        slow_rate: Some(breaker.slow_rate),
        ramp_for: Some(span(breaker.ramp_for)),
        ramp_start: Some(breaker.ramp_start),
        hint_opens: Some(settings.hint_opens),
    }
}

/// A breaker of an agent.
pub(in crate::grpc) fn breaker(agent: &AgentView, view: &BreakerView) -> wire::Breaker {
    let breaker = &view.breaker;
    let now = agent.at.since_epoch();
    let instant = |at: Duration| time(Timestamp::from_epoch(at));
    let (window_calls, window_failures, window_slow) = breaker.window_counts(now).unwrap_or_default();
    let ordered = breaker.state().is_ordered();
    wire::Breaker {
        agent: agent.name.as_ref().to_owned(),
        task_type: view.task_type.as_ref().to_owned(),
        state: breaker_state(breaker.state()) as i32,
        epoch: breaker.epoch(),
        failure_run: breaker.run(),
        successes: breaker.successes(),
        probes: breaker.probes_in_flight(),
        open_until: breaker.open_until().and_then(instant),
        reopens: breaker.reopens(),
        blocked: view.gated,
        settings: Some(breaker_settings(&agent.settings)),
        retry_after: breaker.retry_after(now).filter(|wait| !wait.is_zero()).map(span),
        order: breaker.order().map(|order| wire::BreakerOrder {
            actor: order.actor.clone(),
            reason: order.reason.clone(),
            until: breaker.next_deadline().filter(|_| ordered).and_then(instant),
        }),
        half_open_until: breaker.half_open_until().and_then(instant),
        ramp_until: breaker.ramp_until().and_then(instant),
        ramp_share: breaker.ramp_share(now),
        window_calls,
        window_failures,
        window_slow,
    }
}

/// A state, as the wire has it.
pub(in crate::grpc) const fn breaker_state(state: State) -> wire::BreakerState {
    match state {
        State::Closed => wire::BreakerState::Closed,
        State::Open => wire::BreakerState::Open,
        State::HalfOpen => wire::BreakerState::HalfOpen,
        State::ForcedOpen => wire::BreakerState::ForcedOpen,
        State::Disabled => wire::BreakerState::Disabled,
        State::Observe => wire::BreakerState::Observe,
    }
}

/// The state of the breaker that lets least through, of all that an agent has.
pub(super) fn worst_state(view: &AgentView) -> i32 {
    let least = |state: &State| match state {
        State::ForcedOpen => 5,
        State::Open => 4,
        State::HalfOpen => 3,
        State::Disabled => 2,
        State::Observe => 1,
        State::Closed => 0,
    };
    let states = view.breakers.iter().map(|breaker| breaker.breaker.state());
    states.max_by_key(least).map_or(wire::BreakerState::Closed, breaker_state) as i32
}

/// Which breaker a call means.
pub(in crate::grpc) fn breaker_named(check: &mut Check, agent: &str, task_type: &str) {
    check.agent(At::Root, "agent", agent);
    check.plain(At::Root, "task_type", task_type, 0..=ledger_core::limits::TASK_TYPE_BYTES);
}

/// How long a trip lasts; none: the usual period.
pub(in crate::grpc) fn trip_time(check: &mut Check, given: Option<prost_types::Duration>) -> BreakerOrder {
    let period = check.span(At::Root, "duration", given);
    let good =
        period.is_none_or(|period| (Duration::from_millis(10)..=Duration::from_hours(24)).contains(&period));
    check.must(good, At::Root, "duration", "set it to 10 ms to 24 h");
    BreakerOrder::Trip(period)
}

/// What a breaker is forced to.
pub(in crate::grpc) fn forced(check: &mut Check, said: &wire::ForceBreakerRequest) -> BreakerOrder {
    let span = check.span(At::Root, "duration", said.duration);
    let good = span.is_none_or(|span| (Duration::from_secs(1)..=RUN_AT_AHEAD).contains(&span));
    check.must(good, At::Root, "duration", "set it to 1 s to 366 days");
    match check.word(At::Root, "state", said.state) {
        Some(wire::BreakerState::ForcedOpen) => BreakerOrder::ForceOpen(span),
        Some(wire::BreakerState::Disabled) => BreakerOrder::Disable(span),
        Some(wire::BreakerState::Observe) => BreakerOrder::Observe(span),
        Some(wire::BreakerState::Closed) => BreakerOrder::Auto,
        _ => {
            check.refuse(At::Root, "state", "use FORCED_OPEN, DISABLED, OBSERVE, or CLOSED to end an order");
            BreakerOrder::Auto
        }
    }
}

/// Something that happened to an agent.
pub(in crate::grpc) fn agent_event(seq: u64, event: &AgentEvent, agent: String) -> wire::AgentEvent {
    let (word, moved) = match event.kind {
        AgentEventKind::Breaker(transition) => ("BREAKER", Some(transition)),
        AgentEventKind::WouldOpen => ("WOULD_OPEN", None),
        AgentEventKind::Paused => ("PAUSED", None),
        AgentEventKind::Resumed => ("RESUMED", None),
        AgentEventKind::Configured => ("CONFIGURED", None),
    };
    let state = |state: Option<State>| state.map_or(wire::BreakerState::Unspecified, breaker_state) as i32;
    wire::AgentEvent {
        seq,
        time: time(event.at),
        agent,
        task_type: event.task_type.as_ref().to_owned(),
        event: word.to_owned(),
        from: state(moved.map(|moved| moved.from)),
        to: state(moved.map(|moved| moved.to)),
        cause: moved.map(|moved| moved.cause.as_str().to_owned()).unwrap_or_default(),
        epoch: moved.map_or(0, |moved| moved.epoch),
        actor: event.actor.as_ref().to_owned(),
        reason: event.reason.as_ref().to_owned(),
        until: event.until.and_then(time),
    }
}
