//! What producers say.

use super::check::{At, Check};
use super::digest::Digest;
use crate::grpc::{status, wire};
use crate::ledger::command::{Enqueued, LedgerError, NewTask, RequestKey};
use bytes::Bytes;
use ledger_core::limits::{
    KEY_BYTES, NOTE_BYTES, PAYLOAD_BYTES, RUN_AT_AHEAD, TASK_TYPE_BYTES, TRACEPARENT_BYTES, TRACESTATE_BYTES,
};
use ledger_core::store::{HistoryView, TaskData, TaskFilter, TaskView};
use ledger_core::watch::Happening;
use ledger_core::{Class, Overrides, Reason, Settings, State, StopCause, TaskError, TaskId, Timestamp};
use prost::Message;
use retry_core::Jitter;
use std::sync::Arc;
use std::time::Duration;

/// Names that one call may say over and over, each kept once for as long as it is the same.
#[derive(Debug, Default)]
pub(in crate::grpc) struct Names {
    agent: Option<Arc<str>>,
    task_type: Option<Arc<str>>,
}

/// The name as it was kept last, if it is that.
fn kept(last: &mut Option<Arc<str>>, said: String) -> Arc<str> {
    match last {
        Some(known) if **known == *said => Arc::clone(known),
        _ => Arc::clone(last.insert(said.into())),
    }
}

/// A task to be, with everything about it checked; it is good when `check` is. `wall` is what the wall clock shows, `names` are
/// those of the tasks before it.
pub(in crate::grpc) fn new_task(
    check: &mut Check,
    at: At,
    new: wire::NewTask,
    wall: Timestamp,
    names: &mut Names,
) -> NewTask {
    check.agent(at, "agent", &new.agent);
    check.plain(at, "task_type", &new.task_type, 1..=TASK_TYPE_BYTES);
    check.must_fit(at, "payload", new.payload.len(), PAYLOAD_BYTES);
    check.plain(at, "idempotency_key", &new.idempotency_key, 0..=KEY_BYTES);
    check.plain(at, "traceparent", &new.traceparent, 0..=TRACEPARENT_BYTES);
    check.plain(at, "tracestate", &new.tracestate, 0..=TRACESTATE_BYTES);
    let priority = match new.priority.map_or(Ok(5), u8::try_from) {
        Ok(priority @ 0..=9) => priority,
        _ => {
            check.refuse(at, "priority", "set it to 0 to 9");
            5
        }
    };
    let run_at = check.time(at, "run_at", new.run_at);
    if run_at.is_some_and(|run_at| run_at > wall.after(RUN_AT_AHEAD)) {
        check.refuse(at, "run_at", "set it to at most 366 days ahead");
    }
    let deadline = check.time(at, "deadline", new.deadline);
    let unique = check.word::<wire::UniqueScope>(at, "unique", new.unique);
    let labels = check.labels(at, new.labels.into_iter());
    // What was given, not what it means: the agent's settings may change between two calls.
    let given = new.policy.as_ref().map(Message::encode_to_vec).unwrap_or_default();
    let policy = overrides(check, at, new.policy);
    if !given.is_empty() {
        policy.check(&at.path("policy."), check.found());
    }
    let digest = if new.idempotency_key.is_empty() {
        0
    } else {
        let digest = Digest::of("task").part(new.agent.as_bytes()).part(new.task_type.as_bytes());
        let digest = labels.iter().fold(digest.part(&new.payload), |digest, (key, value)| {
            digest.part(key.as_bytes()).part(value.as_bytes())
        });
        digest.part(&given).finish()
    };
    NewTask {
        agent: kept(&mut names.agent, new.agent),
        task_type: kept(&mut names.task_type, new.task_type),
        priority,
        run_at,
        deadline,
        policy,
        frees_key: unique == Some(wire::UniqueScope::WhileActive),
        data: Arc::new(TaskData {
            // In memory of its own. What comes out of a message is a part of the buffer that the message was read into, 8 KiB
            // at least and up to a whole call of a thousand tasks, and holds all of it for as long as this is kept.
            payload: Bytes::copy_from_slice(&new.payload),
            labels,
            traceparent: new.traceparent,
            tracestate: new.tracestate,
            key: new.idempotency_key.into(),
            digest,
            parent: None,
        }),
    }
}

/// Settings that differ from others. Their ranges are still to be checked.
pub(super) fn overrides(check: &mut Check, at: At, given: Option<wire::TaskPolicy>) -> Overrides {
    let Some(given) = given else { return Overrides::NONE };
    let mut count = |field: &str, value: Option<i32>| {
        let value = value?;
        u32::try_from(value)
            .map_err(|_| check.refuse(at, field, "set it to a number that is not negative"))
            .ok()
    };
    let max_retries = count("policy.max_retries", given.max_retries);
    let max_losses = count("policy.max_losses", given.max_losses);
    let kind = check.word::<wire::JitterKind>(at, "policy.jitter", given.jitter);
    let jitter = match (kind, given.jitter_ratio) {
        (None | Some(wire::JitterKind::Unspecified), None) => None,
        (None | Some(wire::JitterKind::Unspecified | wire::JitterKind::Proportional), ratio) => {
            Some(Jitter::Proportional(ratio.unwrap_or(0.5)))
        }
        (Some(_), Some(_)) => {
            check.refuse(at, "policy.jitter_ratio", "set it with JITTER_KIND_PROPORTIONAL only");
            None
        }
        (Some(wire::JitterKind::None), None) => Some(Jitter::None),
        (Some(wire::JitterKind::Full), None) => Some(Jitter::Full),
        (Some(wire::JitterKind::Equal), None) => Some(Jitter::Equal),
        (Some(wire::JitterKind::Decorrelated), None) => Some(Jitter::Decorrelated),
    };
    Overrides {
        max_retries,
        base_delay: check.span(at, "policy.base_delay", given.base_delay),
        exponential_base: given.exponential_base,
        max_delay: check.span(at, "policy.max_delay", given.max_delay),
        jitter,
        ack_timeout: check.span(at, "policy.ack_timeout", given.ack_timeout),
        lease_duration: check.span(at, "policy.lease_duration", given.lease_duration),
        attempt_timeout: check.span(at, "policy.attempt_timeout", given.attempt_timeout),
        stall_timeout: check.span(at, "policy.stall_timeout", given.stall_timeout),
        queue_timeout: check.span(at, "policy.queue_timeout", given.queue_timeout),
        stop_grace: check.span(at, "policy.stop_grace", given.stop_grace),
        max_losses,
        hint_max: check.span(at, "policy.hint_max", given.hint_max),
    }
}

/// The id of a call with the digest of the call; `rest` is the request without its id.
pub(in crate::grpc) fn request_key(check: &mut Check, id: String, rest: &impl Message) -> Option<RequestKey> {
    if id.is_empty() {
        return None;
    }
    check.plain(At::Root, "request_id", &id, 0..=KEY_BYTES);
    let digest = Digest::of("request").part(&rest.encode_to_vec()).finish();
    Some(RequestKey { id: id.into(), digest })
}

/// A reason for the audit trail.
pub(in crate::grpc) fn note(check: &mut Check, field: &str, text: String) -> Arc<str> {
    check.free(At::Root, field, text, NOTE_BYTES).into()
}

/// A change of a waiting task: priority and time. `wall` is what the wall clock shows.
pub(in crate::grpc) fn update(
    check: &mut Check,
    said: &wire::UpdateTaskRequest,
    wall: Timestamp,
) -> (Option<u8>, Option<Timestamp>) {
    let priority = said.priority.and_then(|priority| {
        let known = u8::try_from(priority).ok().filter(|priority| *priority <= 9);
        check.must(known.is_some(), At::Root, "priority", "set it to 0 to 9");
        known
    });
    let run_at = check.time(At::Root, "run_at", said.run_at);
    let near = run_at.is_none_or(|run_at| run_at <= wall.after(RUN_AT_AHEAD));
    check.must(near, At::Root, "run_at", "set it to at most 366 days ahead");
    check.must(
        said.priority.is_some() || said.run_at.is_some(),
        At::Root,
        "priority",
        "set priority, run_at or both",
    );
    (priority, run_at)
}

/// The id of the one task that a request names.
pub(in crate::grpc) fn task_id(text: &str) -> Result<TaskId, LedgerError> {
    let mut check = Check::default();
    let id = check.task(At::Root, "task_id", text);
    check.done(id)
}

/// Which tasks to list, but for the agent, whose number the ledger knows.
pub(in crate::grpc) fn task_filter(check: &mut Check, request: wire::ListTasksRequest) -> TaskFilter {
    let states = states(check, request.states);
    if !request.agent.is_empty() {
        check.agent(At::Root, "agent", &request.agent);
    }
    check.plain(At::Root, "task_type", &request.task_type, 0..=TASK_TYPE_BYTES);
    let priority = request.priority.and_then(|priority| match u8::try_from(priority) {
        Ok(priority @ 0..=9) => Some(priority),
        _ => {
            check.refuse(At::Root, "priority", "set it to 0 to 9");
            None
        }
    });
    TaskFilter {
        agent: None,
        states,
        task_type: Some(request.task_type).filter(|name| !name.is_empty()),
        priority,
        labels: check.labels(At::Root, request.labels.into_iter()),
        created_after: check.time(At::Root, "created_after", request.created_after),
        created_before: check.time(At::Root, "created_before", request.created_before),
    }
}

/// What states a filter names; none for any.
fn states(check: &mut Check, numbers: Vec<i32>) -> Vec<State> {
    let mut states = Vec::new();
    let mut any = false;
    for number in numbers {
        match u8::try_from(number).ok().filter(|code| *code > 0).map(State::from_code) {
            Some(Some(state)) => states.push(state),
            _ if number == 0 => any = true,
            _ => check.refuse(At::Root, "states", "send a number that the enum has"),
        }
    }
    if any { Vec::new() } else { states }
}

/// What a watch is about; the agent is looked at by its name.
#[derive(Debug, Default)]
pub(in crate::grpc) struct WatchFilter {
    pub(in crate::grpc) task: Option<TaskId>,
    states: Vec<State>,
    task_type: Option<String>,
    labels: Vec<(String, String)>,
}

impl WatchFilter {
    /// Whether it fits, as far as it says of itself.
    pub(in crate::grpc) fn fits(&self, what: &Happening) -> bool {
        self.task.is_none_or(|task| task == what.record.task)
            && (self.states.is_empty() || self.states.contains(&what.record.to))
            && self.task_type.as_ref().is_none_or(|name| **name == *what.task_type)
            && self.labels.iter().all(|label| what.labels.contains(label))
    }
}

pub(in crate::grpc) fn watch_filter(check: &mut Check, request: wire::WatchTasksRequest) -> WatchFilter {
    if !request.agent.is_empty() {
        check.agent(At::Root, "agent", &request.agent);
    }
    check.plain(At::Root, "task_type", &request.task_type, 0..=TASK_TYPE_BYTES);
    let task = (!request.task_id.is_empty()).then(|| check.task(At::Root, "task_id", &request.task_id));
    WatchFilter {
        task,
        states: states(check, request.states),
        task_type: Some(request.task_type).filter(|name| !name.is_empty()),
        labels: check.labels(At::Root, request.labels.into_iter()),
    }
}

/// The answer for one new task.
pub(in crate::grpc) fn enqueued(answer: &Enqueued) -> wire::EnqueueResult {
    match answer {
        Enqueued::Created(id) => wire::EnqueueResult { task_id: id.to_string(), created: true, error: None },
        Enqueued::Existing(id) => {
            wire::EnqueueResult { task_id: id.to_string(), created: false, error: None }
        }
        Enqueued::Refused(error) => {
            wire::EnqueueResult { error: Some(status::item(error)), ..wire::EnqueueResult::default() }
        }
    }
}

/// A task as stored.
pub(in crate::grpc) fn task(view: TaskView) -> wire::Task {
    let TaskView { task, agent, data, payload_bytes, result_bytes, result, notes } = view;
    let holds = task.state == State::Running;
    // Kept while the holder of a lost lease may come back, but a lease it is no more.
    let holder = task.holder.filter(|_| holds);
    let lease = task.lease.filter(|_| holds);
    let blocked = task.state == State::Blocked && task.reason == Reason::Worker;
    wire::Task {
        task_id: task.id.to_string(),
        agent: agent.as_ref().to_owned(),
        task_type: task.spec.task_type.as_ref().to_owned(),
        state: state(task.state),
        reason: task.reason.as_str().to_owned(),
        priority: i32::from(task.priority),
        labels: data.labels.into_iter().collect(),
        policy: policy_out(&task.spec.policy),
        create_time: time(task.spec.created_at),
        update_time: time(task.updated_at),
        run_at: time(task.run_at),
        deadline: task.deadline.and_then(time),
        version: task.version,
        fence: task.fence,
        delivery: task.delivery,
        attempt: task.attempt,
        retry_count: task.retry_count,
        losses: task.losses,
        idle_deliveries: task.idle_deliveries,
        redrives: task.redrives,
        worker_id: holder.map(|holder| holder.worker.as_ref().to_owned()).unwrap_or_default(),
        lease_until: lease.and_then(|lease| time(lease.until)),
        stop_cause: task.stop.map_or(0, |stop| stop_cause(stop.cause)),
        last_error: notes.error.as_deref().map(error_out),
        progress: notes.progress.map(|progress| wire::Progress {
            fraction: progress.fraction,
            note: progress.note,
            time: time(progress.at),
        }),
        idempotency_key: data.key.to_string(),
        payload_bytes,
        result_bytes,
        payload: data.payload,
        result: result.unwrap_or_default(),
        question: notes.question.filter(|_| blocked).map(|text| text.as_ref().to_owned()).unwrap_or_default(),
        traceparent: data.traceparent,
        answer: notes.answer.map(|text| text.as_ref().to_owned()).unwrap_or_default(),
        parent_task_id: data.parent.map(|parent| parent.to_string()).unwrap_or_default(),
        loss_weight: f64::from(task.loss_weight) / 1_000.0,
        preemptions: task.preemptions,
    }
}

/// A history row.
pub(in crate::grpc) fn event(view: HistoryView) -> wire::HistoryEvent {
    let HistoryView { seq, record } = view;
    wire::HistoryEvent {
        seq,
        version: record.version,
        event: record.kind.as_str().to_owned(),
        from: record.from.map_or(0, state),
        to: state(record.to),
        reason: record.reason.as_str().to_owned(),
        time: time(record.at),
        fence: record.fence,
        attempt: record.attempt,
        worker_id: record.worker.map(|worker| worker.as_ref().to_owned()).unwrap_or_default(),
        until: record.until.and_then(time),
        error: record.error.as_deref().map(error_out),
        facts: record
            .facts
            .into_iter()
            .map(|(fact, text)| (fact.as_str().to_owned(), text.as_ref().to_owned()))
            .collect(),
    }
}

/// What differs; none when nothing does.
fn policy_out(policy: &Overrides) -> Option<wire::TaskPolicy> {
    if *policy == Overrides::NONE {
        return None;
    }
    let (jitter, jitter_ratio) = policy.jitter.map_or((0, None), jitter_out);
    Some(wire::TaskPolicy {
        max_retries: policy.max_retries.map(count),
        base_delay: policy.base_delay.map(span),
        exponential_base: policy.exponential_base,
        max_delay: policy.max_delay.map(span),
        jitter,
        jitter_ratio,
        ack_timeout: policy.ack_timeout.map(span),
        lease_duration: policy.lease_duration.map(span),
        attempt_timeout: policy.attempt_timeout.map(span),
        stall_timeout: policy.stall_timeout.map(span),
        queue_timeout: policy.queue_timeout.map(span),
        stop_grace: policy.stop_grace.map(span),
        max_losses: policy.max_losses.map(count),
        hint_max: policy.hint_max.map(span),
    })
}

/// What an agent's tasks go by, defaults filled in.
pub(super) fn effective_policy(settings: &Settings) -> wire::TaskPolicy {
    let retry = settings.retry.config();
    let (jitter, jitter_ratio) = jitter_out(retry.jitter);
    wire::TaskPolicy {
        max_retries: Some(count(retry.max_retries)),
        base_delay: Some(span(retry.base_delay)),
        exponential_base: Some(retry.exponential_base),
        max_delay: Some(span(retry.max_delay)),
        jitter,
        jitter_ratio,
        ack_timeout: Some(span(settings.ack_timeout)),
        lease_duration: Some(span(settings.lease_duration)),
        attempt_timeout: Some(span(settings.attempt_timeout)),
        stall_timeout: settings.stall_timeout.map(span),
        queue_timeout: settings.queue_timeout.map(span),
        stop_grace: Some(span(settings.stop_grace)),
        max_losses: Some(count(retry.max_losses)),
        hint_max: Some(span(retry.hint_max)),
    }
}

fn jitter_out(jitter: Jitter) -> (i32, Option<f64>) {
    use wire::JitterKind;
    let (kind, ratio) = match jitter {
        Jitter::None => (JitterKind::None, None),
        Jitter::Proportional(ratio) => (JitterKind::Proportional, Some(ratio)),
        Jitter::Full => (JitterKind::Full, None),
        Jitter::Equal => (JitterKind::Equal, None),
        Jitter::Decorrelated => (JitterKind::Decorrelated, None),
    };
    (kind as i32, ratio)
}

fn count(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// A state's number, which is the same on the wire as in rows.
pub(in crate::grpc) fn state(state: State) -> i32 {
    i32::from(state.code())
}

/// A cause's number.
pub(super) fn stop_cause(cause: StopCause) -> i32 {
    i32::from(cause.code())
}

/// A failure.
pub(super) fn error_out(error: &TaskError) -> wire::TaskError {
    wire::TaskError {
        class: i32::from(error.class.code()),
        code: error.code.clone(),
        message: error.message.clone(),
        detail: error.detail.clone(),
    }
}

/// A class; unspecified is unknown.
pub(super) fn class(check: &mut Check, at: At, field: &str, number: i32) -> Class {
    if number == 0 {
        return Class::Unknown;
    }
    u8::try_from(number).ok().and_then(Class::from_code).unwrap_or_else(|| {
        check.refuse(at, field, "send a number that the enum has");
        Class::Unknown
    })
}

/// A span of time.
pub(in crate::grpc) fn span(span: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        // Below a billion.
        nanos: span.subsec_nanos() as i32,
    }
}

/// An instant; none for one that stands for "never".
pub(in crate::grpc) fn time(time: Timestamp) -> Option<prost_types::Timestamp> {
    let seconds = time.millis().div_euclid(1_000);
    let nanos = time.millis().rem_euclid(1_000) * 1_000_000;
    (seconds <= 253_402_300_799).then_some(prost_types::Timestamp { seconds, nanos: nanos as i32 })
}

#[cfg(test)]
mod tests;
