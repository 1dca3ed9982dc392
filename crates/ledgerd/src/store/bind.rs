//! Values to columns, in the order of the tables' columns, for either database.
//!
//! Nothing is copied but by the database itself, or where it takes a column at a time. The other way is `rows`.

use super::text;
use bytes::Bytes;
use ledger_core::store::{
    AgentEvent, AgentEventKind, AgentRow, BreakerRow, BudgetRow, DeadLetter, KeyHolder, Notes, RequestRow,
    SessionRow, TaskData,
};
use ledger_core::{AgentId, Overrides, Spec, Task, TaskId, Timestamp};
use std::borrow::Cow;

/// One value.
pub(super) enum Cell<'v> {
    Null,
    Int(i64),
    Real(f64),
    Text(Cow<'v, str>),
    Bytes(&'v [u8]),
}

/// What takes the values of a row, one after the other.
pub(super) trait Sink {
    fn add<'v>(&mut self, value: impl Into<Cell<'v>>);
}

impl From<i64> for Cell<'_> {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<u32> for Cell<'_> {
    fn from(value: u32) -> Self {
        Self::Int(value.into())
    }
}

impl From<bool> for Cell<'_> {
    fn from(value: bool) -> Self {
        Self::Int(value.into())
    }
}

impl From<f64> for Cell<'_> {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl<'v> From<&'v str> for Cell<'v> {
    fn from(value: &'v str) -> Self {
        Self::Text(value.into())
    }
}

impl From<String> for Cell<'_> {
    fn from(value: String) -> Self {
        Self::Text(value.into())
    }
}

impl<'v> From<&'v [u8]> for Cell<'v> {
    fn from(value: &'v [u8]) -> Self {
        Self::Bytes(value)
    }
}

impl<'v, T: Into<Self>> From<Option<T>> for Cell<'v> {
    fn from(value: Option<T>) -> Self {
        value.map_or(Cell::Null, Into::into)
    }
}

/// A row of `task_specs`, with `payload` for that of the task.
pub(super) fn spec(args: &mut impl Sink, id: TaskId, spec: &Spec, data: &TaskData, payload: &[u8]) {
    args.add(id.0.cast_signed());
    args.add(i64::from(spec.agent.0));
    args.add(&*spec.task_type);
    args.add(spec.created_at.millis());
    args.add(payload);
    args.add((!data.labels.is_empty()).then(|| text::labels(&data.labels)));
    args.add((spec.policy != Overrides::NONE).then(|| text::policy(&spec.policy)));
    args.add(filled(&data.traceparent));
    args.add(filled(&data.tracestate));
    args.add(filled(&data.key));
    args.add(data.digest.cast_signed());
    args.add(spec.frees_key);
    args.add(data.parent.map(|parent| parent.0.cast_signed()));
}

/// What every row of `tasks` has.
pub(super) fn task(args: &mut impl Sink, task: &Task) {
    args.add(task.id.0.cast_signed());
    args.add(i64::from(task.state.code()));
    args.add(i64::from(task.reason.code()));
    args.add(i64::from(task.priority));
    args.add(task.run_at.millis());
    args.add(task.calendar);
    args.add(task.deadline.map(Timestamp::millis));
    args.add(task.queued_at.millis());
    args.add(task.updated_at.millis());
    args.add(task.version.cast_signed());
    args.add(task.fence.cast_signed());
    args.add(i64::from(task.delivery));
    args.add(i64::from(task.attempt));
    args.add(i64::from(task.idle_deliveries));
}

/// Its holder, its lease and its sample.
pub(super) fn held(args: &mut impl Sink, task: &Task) {
    args.add(task.holder.as_ref().map(|holder| &*holder.worker));
    held_numbers(task).into_iter().for_each(|number| args.add(number));
}

/// The same but for the worker's name.
pub(super) fn held_numbers(task: &Task) -> [Option<i64>; 8] {
    let (holder, lease, sample) = (task.holder.as_ref(), task.lease, task.sample);
    let probe = |permit: breaker_core::Permit| if permit.probe { i64::from(permit.slot) + 1 } else { 0 };
    [
        holder.map(|holder| holder.incarnation.cast_signed()),
        holder.map(|holder| holder.session.0.cast_signed()),
        lease.map(|lease| lease.until.millis()),
        lease.and_then(|lease| lease.acked_at).map(Timestamp::millis),
        lease.map(|lease| lease.progress_at.millis()),
        sample.map(|sample| sample.permit.epoch.cast_signed()),
        sample.map(|sample| probe(sample.permit)),
        sample.map(|sample| sample.told.into()),
    ]
}

/// What few have. None: nothing, or 0.
pub(super) fn rare(task: &Task) -> [Option<i64>; 14] {
    let stop = task.stop.map_or((0, 0), |stop| (stop.cause.code().into(), stop.until.millis()));
    [
        task.retry_count.into(),
        task.losses.into(),
        task.preemptions.into(),
        task.redrives.into(),
        task.probe_failures.into(),
        task.tokens.into(),
        task.previous_delay.into(),
        stop.0,
        stop.1,
        task.discarded.into(),
        task.loss_weight.into(),
        task.lost_at.map_or(0, Timestamp::millis),
        task.free_releases.into(),
        task.blocks.into(),
    ]
    .map(|number: i64| (number != 0).then_some(number))
}

/// A row of `results`.
pub(super) fn result(args: &mut impl Sink, task: TaskId, result: &Bytes) {
    args.add(task.0.cast_signed());
    args.add(&result[..]);
}

/// A row of `idempotency_keys`.
pub(super) fn key(args: &mut impl Sink, agent: AgentId, key: &str, holder: KeyHolder) {
    args.add(agent.0);
    args.add(key);
    args.add(holder.task.0.cast_signed());
    args.add(holder.digest.cast_signed());
}

/// A row of `requests`, but for the hash of its id.
pub(super) fn request(args: &mut impl Sink, row: &RequestRow) {
    args.add(&*row.id);
    args.add(row.digest.cast_signed());
    args.add(&row.answer[..]);
    args.add(row.at.millis());
}

/// A row of `task_notes`.
pub(super) fn notes(args: &mut impl Sink, task: TaskId, notes: &Notes) {
    args.add(task.0.cast_signed());
    args.add(notes.error.as_deref().map(text::error));
    args.add(notes.checkpoint.as_deref());
    args.add(notes.progress.as_ref().map(|progress| progress.fraction));
    args.add(notes.progress.as_ref().map(|progress| progress.note.as_str()));
    args.add(notes.progress.as_ref().map(|progress| progress.at.millis()));
    args.add(notes.question.as_deref());
    args.add(notes.answer.as_deref());
}

/// A row of `dead_letter_queue`.
pub(super) fn letter(args: &mut impl Sink, letter: &DeadLetter) {
    args.add(letter.task.0.cast_signed());
    args.add(i64::from(letter.agent.0));
    args.add(&*letter.task_type);
    args.add(i64::from(letter.reason.code()));
    args.add(letter.error.as_deref().map(text::error));
    args.add(letter.fingerprint.cast_signed());
    args.add(letter.failed_at.millis());
    args.add(i64::from(letter.attempt));
    args.add(i64::from(letter.redrives));
    args.add(letter.discarded.as_ref().map(|(at, _)| at.millis()));
    args.add(letter.discarded.as_ref().map(|(_, why)| &**why));
}

/// A row of `agents`.
pub(super) fn agent(args: &mut impl Sink, row: &AgentRow) {
    args.add(row.id.0);
    args.add(&*row.name);
    args.add(text::agent(&row.given));
    args.add(row.created_at.millis());
    args.add(row.pause.as_ref().map(text::pause));
}

/// A row of `budgets`.
pub(super) fn budget(args: &mut impl Sink, row: &BudgetRow) {
    args.add(row.agent.map_or(0, |agent| agent.0));
    args.add(row.level.millitokens.cast_signed());
    args.add(row.level.updated_at.cast_signed());
}

/// A row of `sessions`.
pub(super) fn session(args: &mut impl Sink, row: &SessionRow) {
    args.add(&*row.worker);
    args.add(row.incarnation.cast_signed());
    args.add(row.session.0.cast_signed());
    args.add(row.connected_at.millis());
    args.add(row.beat_at.millis());
    args.add(row.open);
}

/// A row of `breakers`.
pub(super) fn breaker(args: &mut impl Sink, row: &BreakerRow) {
    let snapshot = &row.snapshot;
    let stats = &snapshot.stats;
    let seen = [
        stats.calls,
        stats.successes,
        stats.failures,
        stats.rejections,
        stats.late_ok,
        stats.late_err,
        stats.transitions,
    ];
    let span = |span| i64::try_from(text::nanos(span)).unwrap_or(i64::MAX);
    args.add(i64::from(row.agent.0));
    args.add(&*row.task_type);
    args.add(i64::from(snapshot.version));
    args.add(snapshot.state.as_str());
    args.add(snapshot.epoch.cast_signed());
    args.add(i64::from(snapshot.run));
    args.add(i64::from(snapshot.successes));
    args.add(i64::from(snapshot.reopens));
    args.add(span(snapshot.since));
    args.add(snapshot.until.map(span));
    args.add(snapshot.cause.map(breaker_core::Cause::as_str));
    args.add(snapshot.ramp_until.map(span));
    let probes: Vec<_> =
        snapshot.probes.iter().map(|probe| (probe.slot, probe.lease_until.map(span))).collect();
    args.add(text::written(&probes));
    args.add(&snapshot.window[..]);
    args.add(snapshot.digest.cast_signed());
    args.add(snapshot.order.as_ref().map(|order| order.actor.as_str()));
    args.add(snapshot.order.as_ref().map(|order| order.reason.as_str()));
    args.add(text::written(&seen));
    args.add(row.last_probe.map(|task| task.0.cast_signed()));
}

/// A row of `agent_events`.
pub(super) fn event(args: &mut impl Sink, event: &AgentEvent) {
    let moved = match event.kind {
        AgentEventKind::Breaker(transition) => Some(transition),
        _ => None,
    };
    args.add(i64::from(event.agent.0));
    args.add(&*event.task_type);
    args.add(event.at.millis());
    args.add(event_code(event.kind));
    args.add(moved.map(|moved| moved.from.as_str()));
    args.add(moved.map(|moved| moved.to.as_str()));
    args.add(moved.map(|moved| moved.cause.as_str()));
    args.add(moved.map(|moved| moved.epoch.cast_signed()));
    args.add(&*event.actor);
    args.add(&*event.reason);
    args.add(event.until.map(Timestamp::millis));
}

/// The stored number of what happened to an agent. Never changes.
pub(super) const fn event_code(kind: AgentEventKind) -> i64 {
    match kind {
        AgentEventKind::Breaker(_) => 1,
        AgentEventKind::WouldOpen => 2,
        AgentEventKind::Paused => 3,
        AgentEventKind::Resumed => 4,
        AgentEventKind::Configured => 5,
    }
}

/// None for an empty text.
fn filled(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}
