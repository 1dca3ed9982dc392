//! The few columns that hold JSON: errors, facts, labels and what was set of a policy.
//!
//! Not the wire's JSON: the names here are stored and never change. Durations are whole nanoseconds and floats the
//! shortest text that reads back as the same number, so what comes back equals what went in.

use breaker_core::Window;
use ledger_core::session::{Session, Unsent};
use ledger_core::store::{Pause, SessionRow, StoreError};
use ledger_core::{AgentId, AgentOverrides, Class, Fact, Overrides, TaskError, TaskId, Timestamp};
use retry_core::Jitter;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::sync::Arc;
use std::time::Duration;

/// A JSON list of task numbers, read back.
pub(super) fn task_ids(text: &str) -> Result<Vec<TaskId>, StoreError> {
    let numbers: Vec<u64> =
        serde_json::from_str(text).map_err(|error| StoreError::Corrupt(format!("task numbers: {error}")))?;
    Ok(numbers.into_iter().map(TaskId).collect())
}

#[derive(Serialize, Deserialize)]
struct ErrorText<'a> {
    class: u8,
    #[serde(borrow, default, skip_serializing_if = "is_empty")]
    code: std::borrow::Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "is_empty")]
    message: std::borrow::Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "is_empty")]
    detail: std::borrow::Cow<'a, str>,
}

fn is_empty(text: &str) -> bool {
    text.is_empty()
}

/// Settings of a task or agent; only what is set is written.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct PolicyText {
    #[serde(skip_serializing_if = "Option::is_none")]
    max_retries: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_delay_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exponential_base: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_delay_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jitter: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ack_timeout_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease_duration_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attempt_timeout_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stall_timeout_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_timeout_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_grace_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_losses: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint_max_ns: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct PauseText {
    actor: String,
    reason: String,
    since: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<i64>,
}

/// The window of a breaker; `NONE` where one was taken away.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum WindowText {
    None,
    Count { size: u32, min_calls: u32 },
    Time { bucket_ns: u64, min_calls: u32 },
}

impl From<Option<Window>> for WindowText {
    fn from(window: Option<Window>) -> Self {
        match window {
            None => Self::None,
            Some(Window::Count { size, min_calls }) => Self::Count { size, min_calls },
            Some(Window::Time { bucket, min_calls }) => Self::Time { bucket_ns: nanos(bucket), min_calls },
        }
    }
}

impl From<WindowText> for Option<Window> {
    fn from(text: WindowText) -> Self {
        match text {
            WindowText::None => None,
            WindowText::Count { size, min_calls } => Some(Window::Count { size, min_calls }),
            WindowText::Time { bucket_ns, min_calls } => {
                Some(Window::Time { bucket: Duration::from_nanos(bucket_ns), min_calls })
            }
        }
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct AgentText {
    policy: PolicyText,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure_threshold: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    success_threshold: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    open_timeout_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    half_open_permits: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    breaker_enabled: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    per_task_type: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    open_multiplier: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    open_max_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    open_jitter: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    half_open_max_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    window: Option<WindowText>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure_rate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slow_after_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slow_rate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ramp_for_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ramp_start: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint_opens: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget_capacity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget_floor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget_deposit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget_enabled: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_waiting: Option<u64>,
}

pub(super) fn error(error: &TaskError) -> String {
    written(&error_text(error))
}

/// The same as a part of a longer text.
pub(super) fn error_text(error: &TaskError) -> impl Serialize {
    ErrorText {
        class: error.class.code(),
        code: error.code.as_str().into(),
        message: error.message.as_str().into(),
        detail: error.detail.as_str().into(),
    }
}

pub(super) fn error_of(text: &str) -> Result<Arc<TaskError>, StoreError> {
    let text: ErrorText<'_> = serde_json::from_str(text)
        .map_err(|error| StoreError::Corrupt(format!("a stored failure: {error}")))?;
    let class = Class::from_code(text.class)
        .ok_or_else(|| StoreError::Corrupt(format!("a stored failure of class {}", text.class)))?;
    Ok(Arc::new(TaskError {
        class,
        code: text.code.into_owned(),
        message: text.message.into_owned(),
        detail: text.detail.into_owned(),
    }))
}

/// Pairs, not an object: their order is part of the record.
pub(super) fn facts_text(facts: &[(Fact, Arc<str>)]) -> impl Serialize {
    facts.iter().map(|(fact, text)| (fact.as_str(), &**text)).collect::<Vec<_>>()
}

pub(super) fn facts_of(text: &str) -> Result<Vec<(Fact, Arc<str>)>, StoreError> {
    let pairs: Vec<(String, String)> = read(text)?;
    pairs
        .into_iter()
        .map(|(name, text)| match Fact::from_name(&name) {
            Some(fact) => Ok((fact, text.into())),
            None => Err(StoreError::Corrupt(format!("a stored fact {name:?}"))),
        })
        .collect()
}

pub(super) fn labels(labels: &[(String, String)]) -> String {
    written(&labels)
}

pub(super) fn labels_of(text: &str) -> Result<Vec<(String, String)>, StoreError> {
    read(text)
}

pub(super) fn policy(policy: &Overrides) -> String {
    written(&policy_text(policy))
}

pub(super) fn policy_of(text: &str) -> Result<Overrides, StoreError> {
    overrides(&read(text)?)
}

pub(super) fn agent(given: &AgentOverrides) -> String {
    written(&AgentText {
        policy: policy_text(&given.policy),
        failure_threshold: given.failure_threshold,
        success_threshold: given.success_threshold,
        open_timeout_ns: given.open_timeout.map(nanos),
        half_open_permits: given.half_open_permits,
        breaker_enabled: given.breaker_enabled,
        per_task_type: given.per_task_type,
        open_multiplier: given.open_multiplier.map(float),
        open_max_ns: given.open_max.map(nanos),
        open_jitter: given.open_jitter.map(float),
        half_open_max_ns: given.half_open_max.map(nanos),
        window: given.window.map(WindowText::from),
        failure_rate: given.failure_rate.map(float),
        slow_after_ns: given.slow_after.map(nanos),
        slow_rate: given.slow_rate.map(float),
        ramp_for_ns: given.ramp_for.map(nanos),
        ramp_start: given.ramp_start.map(float),
        hint_opens: given.hint_opens,
        budget_capacity: given.budget_capacity.map(float),
        budget_floor: given.budget_floor.map(float),
        budget_deposit: given.budget_deposit.map(float),
        budget_enabled: given.budget_enabled,
        max_waiting: given.max_waiting,
    })
}

/// What was set of an agent, for people: as stored, without what is empty.
pub(crate) fn settings_text(given: &AgentOverrides) -> String {
    agent(given).replace("\"policy\":{},", "").replace("\"policy\":{}", "")
}

pub(super) fn agent_of(text: &str) -> Result<AgentOverrides, StoreError> {
    let text: AgentText = read(text)?;
    Ok(AgentOverrides {
        policy: overrides(&text.policy)?,
        failure_threshold: text.failure_threshold,
        success_threshold: text.success_threshold,
        open_timeout: text.open_timeout_ns.map(Duration::from_nanos),
        half_open_permits: text.half_open_permits,
        breaker_enabled: text.breaker_enabled,
        per_task_type: text.per_task_type,
        open_multiplier: text.open_multiplier.as_deref().map(float_of).transpose()?,
        open_max: text.open_max_ns.map(Duration::from_nanos),
        open_jitter: text.open_jitter.as_deref().map(float_of).transpose()?,
        half_open_max: text.half_open_max_ns.map(Duration::from_nanos),
        window: text.window.map(Into::into),
        failure_rate: text.failure_rate.as_deref().map(float_of).transpose()?,
        slow_after: text.slow_after_ns.map(Duration::from_nanos),
        slow_rate: text.slow_rate.as_deref().map(float_of).transpose()?,
        ramp_for: text.ramp_for_ns.map(Duration::from_nanos),
        ramp_start: text.ramp_start.as_deref().map(float_of).transpose()?,
        hint_opens: text.hint_opens,
        budget_capacity: text.budget_capacity.as_deref().map(float_of).transpose()?,
        budget_floor: text.budget_floor.as_deref().map(float_of).transpose()?,
        budget_deposit: text.budget_deposit.as_deref().map(float_of).transpose()?,
        budget_enabled: text.budget_enabled,
        max_waiting: text.max_waiting,
    })
}

pub(super) fn pause(pause: &Pause) -> String {
    written(&PauseText {
        actor: pause.actor.as_ref().to_owned(),
        reason: pause.reason.as_ref().to_owned(),
        since: pause.since.millis(),
        until: pause.until.map(Timestamp::millis),
    })
}

pub(super) fn pause_of(text: &str) -> Result<Pause, StoreError> {
    let text: PauseText = read(text)?;
    Ok(Pause {
        actor: text.actor.into(),
        reason: text.reason.into(),
        since: Timestamp::from_millis(text.since),
        until: text.until.map(Timestamp::from_millis),
    })
}

/// What a stream takes and holds.
#[derive(Serialize, Deserialize)]
struct SessionText {
    agents: Vec<u32>,
    types: Option<Vec<String>>,
    capacity: u32,
    labels: Vec<(String, String)>,
    sdk: String,
    held: Vec<u64>,
    unacked_run: u32,
}

pub(super) fn session(session: &Session) -> String {
    written(&SessionText {
        agents: session.agents.iter().map(|agent| agent.0).collect(),
        types: session.types.as_ref().map(|types| types.iter().map(|name| name.to_string()).collect()),
        capacity: session.capacity,
        labels: session.labels.clone(),
        sdk: session.sdk.clone(),
        held: session.held.iter().map(|task| task.0).collect(),
        unacked_run: session.unacked_run,
    })
}

pub(super) fn session_of(row: &SessionRow, text: &str) -> Result<Session, StoreError> {
    let text: SessionText = read(text)?;
    Ok(Session {
        id: row.session,
        worker: Arc::clone(&row.worker),
        incarnation: row.incarnation,
        agents: text.agents.into_iter().map(AgentId).collect(),
        types: text.types.map(|types| types.into_iter().map(Arc::from).collect()),
        capacity: text.capacity,
        labels: text.labels,
        sdk: text.sdk,
        connected_at: row.connected_at,
        beat_at: row.beat_at,
        held: text.held.into_iter().map(TaskId).collect(),
        unacked_run: text.unacked_run,
        cursor: 0,
        unsent: Unsent::default(),
    })
}

fn policy_text(policy: &Overrides) -> PolicyText {
    PolicyText {
        max_retries: policy.max_retries,
        base_delay_ns: policy.base_delay.map(nanos),
        exponential_base: policy.exponential_base.map(float),
        max_delay_ns: policy.max_delay.map(nanos),
        jitter: policy.jitter.map(jitter),
        ack_timeout_ns: policy.ack_timeout.map(nanos),
        lease_duration_ns: policy.lease_duration.map(nanos),
        attempt_timeout_ns: policy.attempt_timeout.map(nanos),
        stall_timeout_ns: policy.stall_timeout.map(nanos),
        queue_timeout_ns: policy.queue_timeout.map(nanos),
        stop_grace_ns: policy.stop_grace.map(nanos),
        max_losses: policy.max_losses,
        hint_max_ns: policy.hint_max.map(nanos),
    }
}

fn overrides(text: &PolicyText) -> Result<Overrides, StoreError> {
    Ok(Overrides {
        max_retries: text.max_retries,
        base_delay: text.base_delay_ns.map(Duration::from_nanos),
        exponential_base: text.exponential_base.as_deref().map(float_of).transpose()?,
        max_delay: text.max_delay_ns.map(Duration::from_nanos),
        jitter: text.jitter.as_deref().map(jitter_of).transpose()?,
        ack_timeout: text.ack_timeout_ns.map(Duration::from_nanos),
        lease_duration: text.lease_duration_ns.map(Duration::from_nanos),
        attempt_timeout: text.attempt_timeout_ns.map(Duration::from_nanos),
        stall_timeout: text.stall_timeout_ns.map(Duration::from_nanos),
        queue_timeout: text.queue_timeout_ns.map(Duration::from_nanos),
        stop_grace: text.stop_grace_ns.map(Duration::from_nanos),
        max_losses: text.max_losses,
        hint_max: text.hint_max_ns.map(Duration::from_nanos),
    })
}

fn jitter(jitter: Jitter) -> String {
    match jitter {
        Jitter::None => "NONE".to_owned(),
        Jitter::Full => "FULL".to_owned(),
        Jitter::Equal => "EQUAL".to_owned(),
        Jitter::Decorrelated => "DECORRELATED".to_owned(),
        Jitter::Proportional(share) => float(share),
    }
}

fn jitter_of(text: &str) -> Result<Jitter, StoreError> {
    Ok(match text {
        "NONE" => Jitter::None,
        "FULL" => Jitter::Full,
        "EQUAL" => Jitter::Equal,
        "DECORRELATED" => Jitter::Decorrelated,
        share => Jitter::Proportional(float_of(share)?),
    })
}

pub(super) fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

fn float(number: f64) -> String {
    format!("{number:?}")
}

fn float_of(text: &str) -> Result<f64, StoreError> {
    text.parse().map_err(|_| StoreError::Corrupt(format!("a stored number {text:?}")))
}

pub(super) fn written<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain structs with text keys always serialize")
}

pub(super) fn read<T: DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Corrupt(format!("stored JSON: {error}")))
}

/// The values of a JSON array, each as its text.
pub(super) fn parts(text: &str) -> Result<Vec<&RawValue>, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Corrupt(format!("stored JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_read_back_as_they_were() {
        let policy = Overrides {
            max_retries: Some(7),
            base_delay: Some(Duration::from_nanos(1_500)),
            exponential_base: Some(1.1 + 0.2),
            jitter: Some(Jitter::Proportional(1.0 / 3.0)),
            stop_grace: Some(Duration::ZERO),
            hint_max: Some(Duration::from_secs(90)),
            ..Overrides::NONE
        };
        assert_eq!(policy_of(&super::policy(&policy)).unwrap(), policy);
        let given = AgentOverrides {
            policy,
            budget_floor: Some(0.1),
            breaker_enabled: Some(false),
            max_waiting: Some(9),
            ..AgentOverrides::default()
        };
        assert_eq!(agent_of(&agent(&given)).unwrap(), given);
        assert_eq!(super::policy(&Overrides::NONE), "{}");
    }

    #[test]
    fn failures_and_facts_read_back_as_they_were() {
        let error = TaskError {
            class: Class::Timeout,
            code: "E\"1\"".to_owned(),
            message: "slow\nbut sure".to_owned(),
            detail: String::new(),
        };
        assert_eq!(*error_of(&super::error(&error)).unwrap(), error);
        let facts = vec![(Fact::Note, Arc::from("ann: no")), (Fact::Cause, Arc::from("USER"))];
        assert_eq!(facts_of(&written(&facts_text(&facts))).unwrap(), facts);
        assert!(matches!(facts_of("[[\"colour\",\"red\"]]"), Err(StoreError::Corrupt(_))));
    }
}
