//! Values to the parameters of a statement, in the order of the table's columns.
//!
//! Nothing is copied but by SQLite itself. The other way is `rows`.

use super::insert::Table;
use super::staged::{Born, Image, Row};
use super::text;
use bytes::Bytes;
use ledger_core::store::{
    AgentEvent, AgentEventKind, AgentRow, BreakerRow, BudgetRow, DeadLetter, Notes, SessionRow,
};
use ledger_core::{Overrides, TaskId, Timestamp};
use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{Statement, ToSql};

/// The parameters of a prepared statement, bound one after the other; run again and again.
///
/// A parameter keeps its value from run to run, and most are the same or NULL in row after row: those are not bound again.
pub(super) struct Args<'s, 'c> {
    statement: &'s mut Statement<'c>,
    bound: usize,
    /// What each parameter has, as far as that is cheap to compare. None: NULL, as all are at first.
    has: Vec<Option<Had>>,
    /// The first that could not be bound.
    error: Option<rusqlite::Error>,
}

#[derive(Clone, Copy, PartialEq)]
enum Had {
    Integer(i64),
    /// Text, bytes or a fraction.
    Other,
}

impl<'s, 'c> Args<'s, 'c> {
    pub(super) fn of(statement: &'s mut Statement<'c>) -> Self {
        // A statement that was used before comes back without values.
        let has = vec![None; statement.parameter_count()];
        Self { statement, bound: 0, has, error: None }
    }

    /// One value more.
    pub(super) fn add(&mut self, value: impl ToSql) {
        self.bound += 1;
        let bound = value.to_sql().and_then(|value| {
            let now = match value {
                ToSqlOutput::Borrowed(ValueRef::Null) | ToSqlOutput::Owned(Value::Null) => None,
                ToSqlOutput::Borrowed(ValueRef::Integer(number))
                | ToSqlOutput::Owned(Value::Integer(number)) => Some(Had::Integer(number)),
                _ => Some(Had::Other),
            };
            match self.has.get_mut(self.bound - 1) {
                Some(had) if *had == now && now != Some(Had::Other) => return Ok(()),
                Some(had) => *had = now,
                None => {}
            }
            self.statement.raw_bind_parameter(self.bound, value)
        });
        if let Err(error) = bound {
            self.error.get_or_insert(error);
        }
    }

    /// Runs the statement with what was bound, and begins anew with its first parameter.
    pub(super) fn run(&mut self) -> rusqlite::Result<()> {
        self.bound = 0;
        match self.error.take() {
            Some(error) => Err(error),
            None => self.statement.raw_execute().map(drop),
        }
    }
}

/// A row of `task_specs`.
pub(super) fn spec(args: &mut Args<'_, '_>, born: &Born) {
    let Born { id, spec, data, .. } = born;
    args.add(id.0.cast_signed());
    args.add(i64::from(spec.agent.0));
    args.add(&*spec.task_type);
    args.add(spec.created_at.millis());
    args.add(&data.payload[..]);
    args.add((!data.labels.is_empty()).then(|| text::labels(&data.labels)));
    args.add((spec.policy != Overrides::NONE).then(|| text::policy(&spec.policy)));
    args.add(filled(&data.traceparent));
    args.add(filled(&data.tracestate));
    args.add(filled(&data.key));
    args.add(data.digest.cast_signed());
    args.add(spec.frees_key);
    args.add(data.parent.map(|parent| parent.0.cast_signed()));
}

/// A row of `tasks`, as long as its form says.
pub(super) fn task(args: &mut Args<'_, '_>, image: &Image) {
    let task = &image.task;
    let id = task.id;
    args.add(id.0.cast_signed());
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
    args.add(image.history.cast_signed());
    match image.form {
        Table::TasksPlain => return,
        Table::TasksDone => return args.add(image.result.as_ref().map(|result| &result[..])),
        _ => {}
    }
    let holder = task.holder.as_ref();
    args.add(holder.map(|holder| &*holder.worker));
    args.add(holder.map(|holder| holder.incarnation.cast_signed()));
    args.add(holder.map(|holder| holder.session.0.cast_signed()));
    args.add(task.lease.map(|lease| lease.until.millis()));
    args.add(task.lease.and_then(|lease| lease.acked_at).map(Timestamp::millis));
    args.add(task.lease.map(|lease| lease.progress_at.millis()));
    args.add(task.sample.map(|sample| sample.permit.epoch.cast_signed()));
    args.add(
        task.sample.map(|sample| if sample.permit.probe { i64::from(sample.permit.slot) + 1 } else { 0 }),
    );
    args.add(task.sample.map(|sample| sample.told));
    if image.form == Table::TasksHeld {
        return;
    }
    args.add(i64::from(task.retry_count));
    args.add(i64::from(task.losses));
    args.add(i64::from(task.preemptions));
    args.add(i64::from(task.redrives));
    args.add(i64::from(task.probe_failures));
    args.add(i64::from(task.tokens));
    args.add(i64::from(task.previous_delay));
    args.add(task.stop.map(|stop| i64::from(stop.cause.code())));
    args.add(task.stop.map(|stop| stop.until.millis()));
    args.add(task.discarded);
    args.add(i64::from(task.loss_weight));
    args.add(task.lost_at.map(Timestamp::millis));
    args.add(i64::from(task.free_releases));
    args.add(i64::from(task.blocks));
}

/// A row of `task_history`.
pub(super) fn history(args: &mut Args<'_, '_>, row: &Row) {
    let record = &row.record;
    args.add(row.seq.cast_signed());
    args.add(record.task.0.cast_signed());
    args.add(record.version.cast_signed());
    args.add(row.prev.map(u64::cast_signed));
    args.add(i64::from(record.kind.code()));
    args.add(record.from.map(|state| i64::from(state.code())));
    args.add(i64::from(record.to.code()));
    args.add(i64::from(record.reason.code()));
    args.add(record.at.millis());
    args.add(record.fence.cast_signed());
    args.add(i64::from(record.attempt));
    args.add(record.worker.as_deref());
    args.add(record.until.map(Timestamp::millis));
    args.add(record.digest.map(u64::cast_signed));
    args.add(record.error.as_deref().map(text::error));
    args.add((!record.facts.is_empty()).then(|| text::facts(&record.facts)));
}

/// A row of `results`.
pub(super) fn result(args: &mut Args<'_, '_>, task: TaskId, result: &Bytes) {
    args.add(task.0.cast_signed());
    args.add(&result[..]);
}

/// A row of `idempotency_keys`.
pub(super) fn key(args: &mut Args<'_, '_>, born: &Born) {
    let Born { id, spec, data, .. } = born;
    args.add(spec.agent.0);
    args.add(&*data.key);
    args.add(id.0.cast_signed());
    args.add(data.digest.cast_signed());
}

/// A row of `agent_blocks`.
pub(super) fn agent_block(args: &mut Args<'_, '_>, (agent, block): (u32, u64)) {
    args.add(agent);
    args.add(block.cast_signed());
}

/// A row of `task_notes`.
pub(super) fn notes(args: &mut Args<'_, '_>, (task, notes): &(TaskId, Notes)) {
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
pub(super) fn letter(args: &mut Args<'_, '_>, letter: &DeadLetter) {
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
pub(super) fn agent(args: &mut Args<'_, '_>, row: &AgentRow) {
    args.add(row.id.0);
    args.add(&*row.name);
    args.add(text::agent(&row.given));
    args.add(row.created_at.millis());
    args.add(row.pause.as_ref().map(text::pause));
}

/// A row of `budgets`.
pub(super) fn budget(args: &mut Args<'_, '_>, row: &BudgetRow) {
    args.add(row.agent.map_or(0, |agent| agent.0));
    args.add(row.level.millitokens.cast_signed());
    args.add(row.level.updated_at.cast_signed());
}

/// A row of `sessions`.
pub(super) fn session(args: &mut Args<'_, '_>, row: &SessionRow) {
    args.add(&*row.worker);
    args.add(row.incarnation.cast_signed());
    args.add(row.session.0.cast_signed());
    args.add(row.connected_at.millis());
    args.add(row.beat_at.millis());
    args.add(row.open);
}

/// A row of `breakers`.
pub(super) fn breaker(args: &mut Args<'_, '_>, row: &BreakerRow) {
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
pub(super) fn event(args: &mut Args<'_, '_>, event: &AgentEvent) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;

    #[test]
    fn a_parameter_that_is_not_bound_again_has_the_value_it_had() {
        let conn = Connection::open_in_memory().expect("it opens");
        conn.execute_batch("CREATE TABLE rows (a, b)").expect("a table");
        let rows = [
            (Value::Null, Value::Integer(0)),
            (Value::Integer(0), Value::Integer(0)),
            (Value::Text("x".into()), Value::Integer(0)),
            (Value::Text("y".into()), Value::Null),
            (Value::Integer(0), Value::Null),
            (Value::Null, Value::Blob(vec![1])),
            (Value::Null, Value::Blob(vec![2])),
        ];
        for _ in 0..2 {
            // The second time from the cache, where nothing is left of the last row.
            let mut statement = conn.prepare_cached("INSERT INTO rows VALUES (?, ?)").expect("a statement");
            let mut args = Args::of(&mut statement);
            for (a, b) in &rows {
                args.add(a);
                args.add(b);
                args.run().expect("a row");
            }
        }
        let mut found = conn.prepare("SELECT a, b FROM rows ORDER BY rowid").expect("a statement");
        let found = found.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).expect("rows");
        let found: Vec<(Value, Value)> = found.collect::<Result<_, _>>().expect("rows");
        assert_eq!(found, [rows.clone(), rows].concat());
    }
}
