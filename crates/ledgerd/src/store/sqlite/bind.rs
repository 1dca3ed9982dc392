//! Values to the arguments of a statement, in the order of the table's columns.
//!
//! The other way is `rows`.

use super::insert::Table;
use super::text;
use super::write::Row;
use crate::store::ready::Entry;
use ledger_core::store::{AgentEvent, AgentEventKind, BreakerRow, DeadLetter, Notes, TaskData};
use ledger_core::{Overrides, Spec, TaskId, Timestamp};
use sqlx::Arguments;
use sqlx::sqlite::SqliteArguments;
use std::sync::Arc;

/// A row of `task_specs`.
pub(super) fn spec(args: &mut SqliteArguments, id: TaskId, spec: &Spec, data: &TaskData) {
    let filled = |text: &String| (!text.is_empty()).then(|| text.clone());
    add(args, id.0.cast_signed());
    add(args, i64::from(spec.agent.0));
    add(args, Arc::clone(&spec.task_type));
    add(args, spec.created_at.millis());
    add(args, data.payload.to_vec());
    add(args, (!data.labels.is_empty()).then(|| text::labels(&data.labels)));
    add(args, (spec.policy != Overrides::NONE).then(|| text::policy(&spec.policy)));
    add(args, filled(&data.traceparent));
    add(args, filled(&data.tracestate));
    add(args, filled(&data.key));
    add(args, data.digest.cast_signed());
    add(args, spec.frees_key);
    add(args, data.parent.map(|parent| parent.0.cast_signed()));
}

/// A row of `tasks`, as long as `table` says.
pub(super) fn task(args: &mut SqliteArguments, entry: &Entry, table: Table) {
    let task = &entry.task;
    let id = task.id;
    add(args, id.0.cast_signed());
    add(args, i64::from(task.state.code()));
    add(args, i64::from(task.reason.code()));
    add(args, i64::from(task.priority));
    add(args, task.run_at.millis());
    add(args, task.calendar);
    add(args, task.deadline.map(Timestamp::millis));
    add(args, task.queued_at.millis());
    add(args, task.updated_at.millis());
    add(args, task.version.cast_signed());
    add(args, task.fence.cast_signed());
    add(args, i64::from(task.delivery));
    add(args, i64::from(task.attempt));
    add(args, i64::from(task.idle_deliveries));
    add(args, entry.history.cast_signed());
    if table == Table::TasksPlain {
        return;
    }
    let holder = task.holder.as_ref();
    add(args, holder.map(|holder| Arc::clone(&holder.worker)));
    add(args, holder.map(|holder| holder.incarnation.cast_signed()));
    add(args, holder.map(|holder| holder.session.0.cast_signed()));
    add(args, task.lease.map(|lease| lease.until.millis()));
    add(args, task.lease.and_then(|lease| lease.acked_at).map(Timestamp::millis));
    add(args, task.lease.map(|lease| lease.progress_at.millis()));
    add(args, task.sample.map(|sample| sample.permit.epoch.cast_signed()));
    add(
        args,
        task.sample.map(|sample| if sample.permit.probe { i64::from(sample.permit.slot) + 1 } else { 0 }),
    );
    add(args, task.sample.map(|sample| sample.told));
    if table == Table::TasksHeld {
        return;
    }
    add(args, i64::from(task.retry_count));
    add(args, i64::from(task.losses));
    add(args, i64::from(task.preemptions));
    add(args, i64::from(task.redrives));
    add(args, i64::from(task.probe_failures));
    add(args, i64::from(task.tokens));
    add(args, i64::from(task.previous_delay));
    add(args, task.stop.map(|stop| i64::from(stop.cause.code())));
    add(args, task.stop.map(|stop| stop.until.millis()));
    add(args, task.discarded);
    add(args, i64::from(task.loss_weight));
    add(args, task.lost_at.map(Timestamp::millis));
    add(args, i64::from(task.free_releases));
    add(args, i64::from(task.blocks));
}

/// A row of `task_history`.
pub(super) fn history(args: &mut SqliteArguments, row: &Row) {
    let record = &row.record;
    add(args, row.seq.cast_signed());
    add(args, record.task.0.cast_signed());
    add(args, record.version.cast_signed());
    add(args, row.prev.map(u64::cast_signed));
    add(args, i64::from(record.kind.code()));
    add(args, record.from.map(|state| i64::from(state.code())));
    add(args, i64::from(record.to.code()));
    add(args, i64::from(record.reason.code()));
    add(args, record.at.millis());
    add(args, record.fence.cast_signed());
    add(args, i64::from(record.attempt));
    add(args, record.worker.clone());
    add(args, record.until.map(Timestamp::millis));
    add(args, record.digest.map(u64::cast_signed));
    add(args, record.error.as_deref().map(text::error));
    add(args, (!record.facts.is_empty()).then(|| text::facts(&record.facts)));
}

/// A row of `task_notes`.
pub(super) fn notes(args: &mut SqliteArguments, (task, notes): &(TaskId, Notes)) {
    add(args, task.0.cast_signed());
    add(args, notes.error.as_deref().map(text::error));
    add(args, notes.checkpoint.as_deref().map(<[u8]>::to_vec));
    add(args, notes.progress.as_ref().map(|progress| progress.fraction));
    add(args, notes.progress.as_ref().map(|progress| progress.note.clone()));
    add(args, notes.progress.as_ref().map(|progress| progress.at.millis()));
    add(args, notes.question.clone());
    add(args, notes.answer.clone());
}

/// A row of `dead_letter_queue`.
pub(super) fn letter(args: &mut SqliteArguments, letter: &DeadLetter) {
    add(args, letter.task.0.cast_signed());
    add(args, i64::from(letter.agent.0));
    add(args, Arc::clone(&letter.task_type));
    add(args, i64::from(letter.reason.code()));
    add(args, letter.error.as_deref().map(text::error));
    add(args, letter.fingerprint.cast_signed());
    add(args, letter.failed_at.millis());
    add(args, i64::from(letter.attempt));
    add(args, i64::from(letter.redrives));
    add(args, letter.discarded.as_ref().map(|(at, _)| at.millis()));
    add(args, letter.discarded.as_ref().map(|(_, why)| Arc::clone(why)));
}

/// A row of `breakers`.
pub(super) fn breaker(args: &mut SqliteArguments, row: &BreakerRow) {
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
    add(args, i64::from(row.agent.0));
    add(args, Arc::clone(&row.task_type));
    add(args, i64::from(snapshot.version));
    add(args, snapshot.state.as_str());
    add(args, snapshot.epoch.cast_signed());
    add(args, i64::from(snapshot.run));
    add(args, i64::from(snapshot.successes));
    add(args, i64::from(snapshot.reopens));
    add(args, span(snapshot.since));
    add(args, snapshot.until.map(span));
    add(args, snapshot.cause.map(breaker_core::Cause::as_str));
    add(args, snapshot.ramp_until.map(span));
    let probes: Vec<_> =
        snapshot.probes.iter().map(|probe| (probe.slot, probe.lease_until.map(span))).collect();
    add(args, text::written(&probes));
    add(args, snapshot.window.clone());
    add(args, snapshot.digest.cast_signed());
    add(args, snapshot.order.as_ref().map(|order| order.actor.clone()));
    add(args, snapshot.order.as_ref().map(|order| order.reason.clone()));
    add(args, text::written(&seen));
    add(args, row.last_probe.map(|task| task.0.cast_signed()));
}

/// A row of `agent_events`.
pub(super) fn event(args: &mut SqliteArguments, event: &AgentEvent) {
    let moved = match event.kind {
        AgentEventKind::Breaker(transition) => Some(transition),
        _ => None,
    };
    add(args, i64::from(event.agent.0));
    add(args, Arc::clone(&event.task_type));
    add(args, event.at.millis());
    add(args, event_code(event.kind));
    add(args, moved.map(|moved| moved.from.as_str()));
    add(args, moved.map(|moved| moved.to.as_str()));
    add(args, moved.map(|moved| moved.cause.as_str()));
    add(args, moved.map(|moved| moved.epoch.cast_signed()));
    add(args, Arc::clone(&event.actor));
    add(args, Arc::clone(&event.reason));
    add(args, event.until.map(Timestamp::millis));
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

/// One value more.
pub(super) fn add<'q, T>(args: &mut SqliteArguments, value: T)
where
    T: sqlx::Encode<'q, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
{
    args.add(value).expect("encoding a number, text or blob cannot fail");
}
